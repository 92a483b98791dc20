"""What transformers makes of the same rows: batch, labels, loss, gradients. Nothing here is read through our code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
)

from tests.training.tiny_run_config import TinyFiles

NO_LOSS = -100
Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


def load_multimodal(folder: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The vision-language model in a directory, with attention as it is written in its source."""
    return _load(AutoModelForImageTextToText, Gemma3ForConditionalGeneration, folder, dtype)


def load_text(folder: Path) -> PreTrainedModel:
    """The language model in a text-only directory."""
    return _load(AutoModelForCausalLM, Gemma3ForCausalLM, folder, "auto")


def _load(auto_class: Any, expected: type[PreTrainedModel], folder: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    model, loading = auto_class.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", local_files_only=True, output_loading_info=True
    )
    assert type(model) is expected
    assert not any(loading.values()), loading
    return model.train()


def language_model_of(model: PreTrainedModel) -> PreTrainedModel:
    """The language model of a vision-language model, alone."""
    alone = Gemma3ForCausalLM(model.config.text_config)
    alone.model.load_state_dict(model.model.language_model.state_dict())
    alone.tie_weights()
    return alone.train()


def multimodal_batch(files: TinyFiles, rows: list[dict[str, Any]]) -> Batch:
    """Rows through `processor.apply_chat_template`, padded on the right to one batch; and labels."""
    processor = AutoProcessor.from_pretrained(files.model, local_files_only=True)
    encoded = [
        processor.apply_chat_template(
            _with_images(row["messages"], files.data.parent), tokenize=True, return_dict=True, return_tensors="pt"
        )
        for row in rows
    ]
    inputs, labels = _pad([output["input_ids"][0] for output in encoded], processor.tokenizer)
    inputs["token_type_ids"] = _stack([output["token_type_ids"][0] for output in encoded], 0)
    pixels = [output["pixel_values"] for output in encoded if "pixel_values" in output]
    if pixels:
        inputs["pixel_values"] = torch.cat(pixels)
    return inputs, labels


def text_batch(files: TinyFiles, rows: list[dict[str, Any]]) -> Batch:
    """Rows of text through `tokenizer.apply_chat_template`, padded on the right to one batch; and labels."""
    tokenizer = AutoTokenizer.from_pretrained(files.model, local_files_only=True)
    ids = [
        tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True, return_tensors="pt")
        for row in rows
    ]
    return _pad([output["input_ids"][0] for output in ids], tokenizer)


def mean_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Mean over all label tokens of the batch."""
    inputs, labels = batch
    logits = model(**inputs).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=NO_LOSS)


def _with_images(messages: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    def part(item: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image", "image": Image.open(folder / item["image"])} if item["type"] == "image" else item

    return [message | {"content": _parts(message["content"], part)} for message in messages]


def _parts(content: Any, part: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else [part(item) for item in content]


def _pad(rows: list[torch.Tensor], tokenizer: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    inputs = {
        "input_ids": _stack(rows, tokenizer.pad_token_id),
        "attention_mask": _stack([torch.ones_like(ids) for ids in rows], 0),
    }
    return inputs, _stack([answers(ids, tokenizer) for ids in rows], NO_LOSS)


def _stack(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def answers(ids: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """`ids` where an assistant speaks, its end-of-turn token included, else -100: read off the token ids alone."""
    opening = tokenizer("<start_of_turn>model\n", add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    labels = torch.full_like(ids, NO_LOSS)
    inside = False
    for place, token in enumerate(ids.tolist()):
        if inside:
            labels[place] = token
            inside = token != end
        elif ids[: place + 1].tolist()[-len(opening) :] == opening:
            inside = True
    return labels
