"""Names and shapes of a decoder's weights, which families share; the tables are read by `weight_tables.resolve`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megatron_vlm.model.weight_tables import Table, Weight, WeightGroup, resolve
from megatron_vlm.model_configs import DecoderConfig

# Prefix of a language model alone, in its files.
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
    """The head alone: a file may hold it although it is tied.

    Args:
        text: the language model.
        hf_prefixes: of the head in files.
    """
    weight = Weight("weight", (text.vocab_size, text.hidden_size), has_vocabulary_rows=True)
    return WeightGroup("language_model.lm_head.", hf_prefixes, (weight,))


def decoder_weights(text: DecoderConfig, table_of: Callable[[Any], Table]) -> Iterator[Weight]:
    """Embedding, layers and final norm.

    Args:
        text: the language model.
        table_of: gives the table of a layer, from its record.
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
