"""A throw-away family whose files hold what no present family's do.

One tensor is several weights: rows of unequal size (queries, keys and values), columns (a table of which every layer
has some), the middle dimension (two matrices of each expert). There are scalars and buffers, and tensors that
transformers ignores.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors.torch import save_file
from transformers import AutoConfig, PretrainedConfig

from megatron_vlm.families import registry
from megatron_vlm.model.decoder_weights import LANGUAGE_MODEL_ALONE, head_weights
from megatron_vlm.model.weight_map import WeightMap
from megatron_vlm.model.weight_tables import PartOf, Weight, WeightGroup, resolve
from megatron_vlm.parallel.parameters import declare, ones
from megatron_vlm.parallel.sharding import splits
from tests.checkpoint.hf_files import Tensors

VOCABULARY, HIDDEN, LAYERS = 100, 8, 4
QUERY, VALUE, HEADS, PER_LAYER, EXPERTS, GATE, UP = 4, 12, 2, 6, 3, 4, 10

LAYER = {
    "input_layernorm.weight": "hidden",
    "linear_attn.in_proj_qkv.weight": {
        "linear_attn.q_proj.weight": "query hidden",
        "linear_attn.k_proj.weight": "query hidden",
        "linear_attn.v_proj.weight": "(heads per_head) hidden",
    },
    "linear_attn.conv1d.weight": {
        "linear_attn.q_conv.weight": "query 1 4",
        "linear_attn.k_conv.weight": "query 1 4",
        "linear_attn.v_conv.weight": "value 1 4",
    },
    "linear_attn.A_log": "heads",
    "linear_attn.out_proj.weight": "hidden value",
    "layer_scalar": "1",
    "clip_max": "",
}
# The divided dimension over tensor ranks; what is not here every tensor rank holds.
TENSOR_DIMS = {
    "embed_tokens.weight": 0,
    "lm_head.weight": 0,
    "per_layer_embedding.weight": 0,
    "q_proj.weight": 0,
    "k_proj.weight": 0,
    "v_proj.weight": 0,
    "q_conv.weight": 0,
    "k_conv.weight": 0,
    "v_conv.weight": 0,
    "A_log": 0,
    "out_proj.weight": 1,
    "experts.gate": 1,
    "experts.up": 1,
}
BUFFERS = ("layer_scalar", "clip_max")


class ToyConfig(PretrainedConfig):
    model_type = "toy_parts"

    def __init__(self, vocabulary: int = VOCABULARY, per_layer: int = PER_LAYER, **others: Any) -> None:
        super().__init__(**others)
        self.vocabulary, self.per_layer = vocabulary, per_layer


AutoConfig.register("toy_parts", ToyConfig, exist_ok=True)


@dataclass(frozen=True)
class ToyText:
    vocab_size: int
    hidden_size: int
    tie_word_embeddings: bool


@dataclass(frozen=True)
class ToyModel:
    text: ToyText
    per_layer: int
    text_only: bool = True


class ToyFamily(registry.Family):
    """Methods in place of the files of a family's folder."""

    def config_from_hf(self, hf_config: Any, text_only: bool) -> ToyModel:
        return ToyModel(ToyText(hf_config.vocabulary, HIDDEN, hf_config.tie_word_embeddings), hf_config.per_layer)

    def weight_map(self, model_config: ToyModel) -> WeightMap:
        text = model_config.text
        head = head_weights(text, ("lm_head.",))
        groups = [WeightGroup("language_model.", LANGUAGE_MODEL_ALONE, tuple(_language_model(model_config)))]
        return WeightMap(
            groups=tuple(groups if text.tie_word_embeddings else [*groups, head]),
            tied_groups=((head, "language_model.embed_tokens.weight"),) if text.tie_word_embeddings else (),
            passthrough=(r"^mtp\.", r"rotary_emb\.inv_freq$"),
        )


def _language_model(model_config: ToyModel) -> Iterator[Weight]:
    vocabulary, width = model_config.text.vocab_size, model_config.per_layer
    sizes = {"hidden": HIDDEN, "query": QUERY, "value": VALUE, "heads": HEADS, "per_head": VALUE // HEADS}
    yield Weight("embed_tokens.weight", (vocabulary, HIDDEN), has_vocabulary_rows=True)
    for index in range(LAYERS):
        prefix = f"layers.{index}."
        columns = PartOf("embed_tokens_per_layer.weight", 1, index * width, (index + 1) * width)
        yield Weight(f"{prefix}per_layer_embedding.weight", (vocabulary, width), True, part_of=columns)
        rows = PartOf("per_layer_model_projection.weight", 0, index * width, (index + 1) * width)
        yield Weight(f"{prefix}per_layer_projection.weight", (width, HIDDEN), part_of=rows)
        yield from resolve(LAYER, sizes, prefix)
        both = f"{prefix}experts.gate_up"
        yield Weight(f"{prefix}experts.gate", (EXPERTS, GATE, HIDDEN), part_of=PartOf(both, 1, 0, GATE))
        yield Weight(f"{prefix}experts.up", (EXPERTS, UP, HIDDEN), part_of=PartOf(both, 1, GATE, GATE + UP))
    yield Weight("norm.weight", (HIDDEN,))


FAMILY = ToyFamily("toy_parts", ("toy_parts",), "")


@contextmanager
def registered() -> Iterator[None]:
    """The family is among those that are built, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "FAMILIES", (*registry.FAMILIES, FAMILY))
        yield


def write(directory: Path, tensors: Tensors, **config: Any) -> Path:
    """A directory of these tensors."""
    directory.mkdir(parents=True)
    content = {"model_type": "toy_parts", "tie_word_embeddings": is_tied(tensors), **config}
    (directory / "config.json").write_text(json.dumps(content))
    (directory / "tokenizer.json").write_text("{}")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def hf_tensors(head: str = "tied", vocabulary: int = VOCABULARY, per_layer: int = PER_LAYER) -> Tensors:
    """What a directory holds: every tensor of the model, in several types, and what transformers ignores.

    The head is `tied` (there is none), `copied` (it is tied, but there) or `untied`.
    """
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {
        "model.embed_tokens.weight": random(vocabulary, HIDDEN),
        "model.embed_tokens_per_layer.weight": random(vocabulary, LAYERS * per_layer),
        "model.per_layer_model_projection.weight": random(LAYERS * per_layer, HIDDEN),
        "model.norm.weight": random(HIDDEN),
    }
    if head != "tied":
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = random(vocabulary, HIDDEN) if head == "untied" else embedding.clone()
    for index in range(LAYERS):
        prefix = f"model.layers.{index}."
        tensors |= {
            f"{prefix}input_layernorm.weight": random(HIDDEN),
            f"{prefix}linear_attn.in_proj_qkv.weight": random(2 * QUERY + VALUE, HIDDEN),
            f"{prefix}linear_attn.conv1d.weight": random(2 * QUERY + VALUE, 1, 4),
            f"{prefix}linear_attn.A_log": random(HEADS, dtype=torch.float32),
            f"{prefix}linear_attn.out_proj.weight": random(HIDDEN, VALUE),
            f"{prefix}layer_scalar": random(1),
            f"{prefix}clip_max": torch.tensor(float("inf") if index else 0.3),
            f"{prefix}experts.gate_up": random(EXPERTS, GATE + UP, HIDDEN),
        }
    return tensors | {
        "mtp.fc.weight": random(HIDDEN, 2 * HIDDEN),
        "mtp.layers.0.num_batches": torch.tensor(7),
        "mtp.layers.0.is_used": torch.tensor([True, False]),
        "model.rotary_emb.inv_freq": random(5, dtype=torch.float32),
    }


def ours(tensors: Tensors) -> Tensors:
    """Our weights, cut out of a directory's tensors independently of the weight map."""
    table, projection = (tensors[f"model.{n}.weight"] for n in ("embed_tokens_per_layer", "per_layer_model_projection"))
    width = table.shape[1] // LAYERS
    expected = {
        "language_model.embed_tokens.weight": _padded(tensors["model.embed_tokens.weight"]),
        "language_model.norm.weight": tensors["model.norm.weight"],
    }
    if not is_tied(tensors):
        expected["language_model.lm_head.weight"] = _padded(tensors["lm_head.weight"])
    for index in range(LAYERS):
        source, target = f"model.layers.{index}.", f"language_model.layers.{index}."
        q, k, v = tensors[f"{source}linear_attn.in_proj_qkv.weight"].split([QUERY, QUERY, VALUE])
        q_conv, k_conv, v_conv = tensors[f"{source}linear_attn.conv1d.weight"].split([QUERY, QUERY, VALUE])
        own_columns = slice(index * width, (index + 1) * width)
        expected |= {
            f"{target}per_layer_embedding.weight": _padded(table[:, own_columns]),
            f"{target}per_layer_projection.weight": projection[own_columns],
            f"{target}linear_attn.q_proj.weight": q,
            f"{target}linear_attn.k_proj.weight": k,
            f"{target}linear_attn.v_proj.weight": v.reshape(HEADS, VALUE // HEADS, HIDDEN),
            f"{target}linear_attn.q_conv.weight": q_conv,
            f"{target}linear_attn.k_conv.weight": k_conv,
            f"{target}linear_attn.v_conv.weight": v_conv,
            f"{target}experts.gate": tensors[f"{source}experts.gate_up"][:, :GATE],
            f"{target}experts.up": tensors[f"{source}experts.gate_up"][:, GATE:],
        }
        for name in ("input_layernorm.weight", "linear_attn.A_log", "linear_attn.out_proj.weight", *BUFFERS):
            expected[target + name] = tensors[source + name]
    return expected


def is_tied(tensors: Tensors) -> bool:
    """There is no head, or a copy of the embedding."""
    return tensors.get("lm_head.weight", embedding := tensors["model.embed_tokens.weight"]).equal(embedding)


def _padded(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, rows.new_zeros(-len(rows) % 64, rows.shape[1])])


class Stage(torch.nn.Module):
    """One rank's parameters, full of NaN: whatever is not loaded must show.

    Args:
        whole: our weights; of their shapes, or their types where `dtype` is None, the parameters are.
        groups: tensor and pipeline ranks. The stages share the layers evenly, and each layer has its own columns of
            the table. The last stage has a copy of a tied embedding.
        dtype: of all parameters.
    """

    def __init__(self, whole: Tensors, groups: ProcessGroupCollection, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        rank, size = groups.pp.rank(), groups.pp.size()
        for name, tensor in whole.items():
            stage = size - 1
            if ".layers." in name:
                stage = int(name.split(".")[2]) * size // LAYERS
            elif "embed_tokens" in name:
                stage = 0
            if stage == rank:
                self._add(name, tensor, groups, dtype)
            elif (
                name.endswith("embed_tokens.weight")
                and rank == size - 1
                and "language_model.lm_head.weight" not in whole
            ):
                self._add(name, tensor, groups, dtype).shared = True

    def _add(
        self, name: str, tensor: torch.Tensor, groups: ProcessGroupCollection, dtype: torch.dtype | None
    ) -> torch.nn.Parameter:
        dim = next((dim for suffix, dim in TENSOR_DIMS.items() if name.endswith(suffix)), None)
        shape = list(tensor.shape)
        if dim is not None:
            shape[dim] //= groups.tp.size()
        parameter = torch.nn.Parameter(torch.full(shape, float("nan"), dtype=dtype or tensor.dtype))
        declare(
            parameter,
            "buffer" if name.endswith(BUFFERS) else "matrix",
            ones,
            tensor_dim=dim,
            stages="embedding_and_head" if name.endswith("embed_tokens.weight") else "one",
        )
        *path, last = name.split(".")
        module: torch.nn.Module = self
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, parameter)
        return parameter

    def check(self, whole: Tensors, groups: ProcessGroupCollection) -> None:
        """Every parameter is this rank's part, bit for bit in its type."""
        for name, parameter in self.named_parameters():
            expected = whole[name].to(parameter.dtype)
            for split in splits(parameter, groups):
                expected = expected.chunk(split.group.size(), split.dim)[split.group.rank()]
            assert parameter.equal(expected), name
