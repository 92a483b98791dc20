"""The demo's tiny Gemma 3: every part of the real architecture, under a million parameters.

The directory that `build_model_directory` writes is an ordinary Hugging Face model directory: transformers loads it,
and so does the training command.
"""

from pathlib import Path

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor, GenerationConfig

IMAGE_SIZE_PIXELS = 48
PATCH_SIZE_PIXELS = 8
SOFT_TOKENS_PER_IMAGE = 9  # 6 x 6 patches, pooled 2 x 2
# Gemma 3 starts from a trained SigLIP and a zero projector; from scratch both initial values stall for hundreds of
# steps. Measured here: with the usual position embeddings (0.1) "where" stays at chance, with 0.5 it is learnt early.
PROJECTOR_INITIAL_STD = 0.05
POSITION_EMBEDDING_INITIAL_STD = 0.5


def tiny_config(processor: Gemma3Processor) -> Gemma3Config:
    """Returns a Gemma 3 configuration of four text layers and three SigLIP layers, for the processor's vocabulary."""
    tokenizer = processor.tokenizer
    end_of_turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    return Gemma3Config(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "query_pre_attn_scalar": 24,
            "max_position_embeddings": 512,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "initializer_range": 0.04,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "tie_word_embeddings": True,
        },
        vision_config={
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE_PIXELS,
            "patch_size": PATCH_SIZE_PIXELS,
            "vision_use_head": False,
        },
        mm_tokens_per_image=SOFT_TOKENS_PER_IMAGE,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, end_of_turn],
        tie_word_embeddings=True,
        initializer_range=0.04,
    )


def build_model_directory(folder: Path, processor: Gemma3Processor, seed: int) -> int:
    """Writes configuration, processor and random weights in Hugging Face format.

    Returns:
        Number of parameters.
    """
    config = tiny_config(processor)
    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(config)
    position_embedding = model.model.vision_tower.embeddings.position_embedding.weight
    torch.nn.init.normal_(position_embedding, std=POSITION_EMBEDDING_INITIAL_STD)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=PROJECTOR_INITIAL_STD)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())
