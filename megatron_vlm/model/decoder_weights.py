"""Names and shapes of decoder weights that families have in common; `weight_tables.resolve` reads the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megatron_vlm.model.weight_tables import Table, Weight, WeightGroup, resolve
from megatron_vlm.model_configs import DecoderConfig

# Prefix of a text-only language model in its files.
LANGUAGE_MODEL_ALONE = ("model.",)

ATTENTION = {
    "self_attn.q_proj.weight": "query hidden",
    "self_attn.k_proj.weight": "key hidden",
    "self_attn.v_proj.weight": "key hidden",
    "self_attn.o_proj.weight": "hidden query",
}
QUERY_KEY_NORMS = {"self_attn.q_norm.weight": "head", "self_attn.k_norm.weight": "head"}
GATED_MLP = {
    "mlp.gate_proj.weight": "ffn hidden",
    "mlp.up_proj.weight": "ffn hidden",
    "mlp.down_proj.weight": "hidden ffn",
}


def head_weights(text: DecoderConfig, hf_prefixes: tuple[str, ...]) -> WeightGroup:
    """Return the group of the head only: a file may hold it although it is tied.

    Args:
        text: configuration of the language model.
        hf_prefixes: prefixes of the head in Hugging Face files.
    """
    weight = Weight("weight", (text.vocab_size, text.hidden_size), has_vocabulary_rows=True)
    return WeightGroup("language_model.lm_head.", hf_prefixes, (weight,))


def decoder_weights(text: DecoderConfig, table_of: Callable[[Any], Table]) -> Iterator[Weight]:
    """Yield the weights of embedding, layers and final norm.

    Args:
        text: configuration of the language model.
        table_of: function that returns the table of a layer, given its configuration.
    """
    yield Weight("embed_tokens.weight", (text.vocab_size, text.hidden_size), has_vocabulary_rows=True)
    for index, layer in enumerate(text.layers):
        sizes = {
            "hidden": text.hidden_size,
            "query": layer.num_attention_heads * layer.head_dim,
            "key": layer.num_key_value_heads * layer.head_dim,
            "head": layer.head_dim,
            "ffn": layer.intermediate_size,
        }
        yield from resolve(table_of(layer), sizes, f"layers.{index}.")
    yield Weight("norm.weight", (text.hidden_size,))
