"""Gemma 4's traps: each mistake that other stacks make, or that its layouts invite, is seen by the comparison.

Without the line of code that avoids it, logits or gradients are off by far more than rounding. Mistakes inside the
audio tower are in tests/families/test_gemma4_audio.py; wrong rules for gradients of replicated parameters in
tests/distributed/test_gradient_rules.py; images that touch those of other documents in test_packing.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_vlm.families.gemma4 import attention, model, moe, per_layer, vision
from megatron_vlm.layers import patches
from megatron_vlm.layers.attention import AttentionCore
from megatron_vlm.layers.moe import MoE
from megatron_vlm.model.language_model import LanguageModelChunk
from megatron_vlm.parallel.parameters import redeclare
from tests.families.gemma4 import DENSE, GEMMA4, UNIFIED, WITH_MOE
from tests.families.tiny_family import TinyFamily
from tests.parity.comparison import CLEARLY_WRONG, Expected, relative_error, worst_logits
from tests.parity.layouts import LAYOUTS, RankResult, TestLayout, run_case
from tests.ranks import run_ranks
from vlm_kernels import gated

Patch = Callable[[], AbstractContextManager[Any]]
Outputs = dict[str, RankResult]


def put(owner: Any, name: str, value: Any) -> Patch:
    """Another value in place of an attribute."""
    return lambda: mock.patch.object(owner, name, value)


def after(owner: Any, name: str, change: Callable[..., Any]) -> Patch:
    """A method whose result is changed: called with the result and its arguments."""
    method = getattr(owner, name)

    def changed(*arguments: Any, **options: Any) -> Any:
        return change(method(*arguments, **options), *arguments)

    return put(owner, name, changed)


def before(owner: Any, name: str, change: Callable[..., tuple[Any, ...]]) -> Patch:
    """A method whose arguments are changed."""
    method = getattr(owner, name)
    return put(owner, name, lambda *arguments, **options: method(*change(*arguments), **options))


def _scaled_scores(core: AttentionCore, window: int | None, scale: float, recompute: bool) -> tuple[Any, ...]:
    return core, window, scale * 32**-0.5, recompute


def _rotary_fraction(
    positions: torch.Tensor, size: int, theta: float, factor: float, dtype: torch.dtype, num_angles: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The usual partial rotation, whose frequencies are spread over the part that rotates."""
    angles = positions.t().float()[..., None] * theta ** -(torch.arange(num_angles) / num_angles)
    rest = torch.zeros(*angles.shape[:-1], size // 2 - num_angles)
    angles = torch.cat((angles, rest), dim=-1)
    return angles.cos(), angles.sin()


def _scalar_on_the_branch(output: tuple[Any, ...], layer: Any, x: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    return x + output[0] - x * layer.layer_scalar, *output[1:]


def _own_ids(inputs: tuple[Any], chunk: Any, batch: Any, *_: Any) -> tuple[Any]:
    return (replace(inputs[0], ids=batch.input_ids.t()),)


def _without_gradient(reads: tuple[Any, ...], *_: Any) -> tuple[Any, ...]:
    return tuple(None if tensor is None else tensor.detach() for tensor in reads)


def _without_gradient_to_embeddings(reads: tuple[Any, ...], *_: Any) -> tuple[Any, ...]:
    return reads[0].detach(), *reads[1:]


def _one_stage_has_the_norm(_: None, chunk: Any, *__: Any) -> None:
    redeclare(chunk.per_layer_projection_norm.weight, stages="one")


def _unmasked_padding(_: None, table: Any, *__: Any) -> None:
    table.padding_id = None


def _without_softcap(_: None, chunk: Any, *__: Any) -> None:
    chunk.head = replace(chunk.head, softcap=None)


@contextmanager
def _router_of_experts_input() -> Iterator[None]:
    method = MoE.forward
    with mock.patch.object(MoE, "forward", lambda layer, x, tokens, router_input: method(layer, x, tokens, x)):
        yield


def _without_scales(result: tuple[Any, ...], router: Any, *_: Any) -> tuple[Any, ...]:
    weights, *rest = result
    return weights / router.per_expert_scale, *rest


def _swapped(positions: Any, *_: Any) -> Any:
    return replace(positions, row=positions.column, column=positions.row)


def _rope_by_row_first(table: Any, *_: Any) -> Any:
    return tuple(half.roll(half.shape[-1] // 2, -1) for half in table)


@dataclass(frozen=True)
class Mistake:
    """A way to go wrong: what it changes, and where it is seen."""

    patch: Patch
    family: TinyFamily = DENSE
    case: str = "two images"
    layout: TestLayout = LAYOUTS["TP1"]


MISTAKES = {
    "scores scaled by the size of a head": Mistake(before(AttentionCore, "__init__", _scaled_scores)),
    "rotary frequencies of the part that rotates": Mistake(put(model, "rope_table", _rotary_fraction)),
    "values without a norm": Mistake(put(attention, "rms_norm", lambda v, weight, eps: v)),
    "images seen ahead on global layers": Mistake(put(model, "masked_spans", lambda spans, mask: spans)),
    "images not seen ahead": Mistake(put(model, "masked_spans", lambda spans, mask: spans.causal())),
    "windows that hide nothing of an image": Mistake(
        put(
            model, "masked_spans", lambda spans, mask: spans.causal() if mask == "causal" else spans.with_whole_blocks()
        )
    ),
    "12B with the rule of the others": Mistake(put(model, "masked_spans", lambda spans, mask: spans.causal()), UNIFIED),
    "layer scalar on the branch alone": Mistake(after(model.DecoderLayer, "forward", _scalar_on_the_branch)),
    "exact GELU": Mistake(put(gated, "ACTIVATIONS", gated.ACTIVATIONS | {"gelu_tanh": gated.ACTIVATIONS["gelu"]})),
    "logits not capped": Mistake(after(LanguageModelChunk, "__init__", _without_softcap)),
    "features scaled like embeddings": Mistake(
        before(model, "place_features", lambda x, features, index: (x, features * 32**0.5, index))
    ),
    "embeddings not scaled": Mistake(after(LanguageModelChunk, "embed", lambda x, *_: x * 32**-0.5)),
    "media's own ids in per-layer tables": Mistake(
        after(model.Gemma4LanguageModel, "layer_inputs", _own_ids), GEMMA4, "image and audio"
    ),
    "a gradient of the padding token in per-layer tables": Mistake(
        after(per_layer.PerLayerTable, "__init__", _unmasked_padding), GEMMA4
    ),
    "no gradient through embeddings to later layers": Mistake(
        after(model.Gemma4LanguageModel, "layer_reads", _without_gradient_to_embeddings), GEMMA4
    ),
    "no gradient to shared keys": Mistake(after(model.Gemma4LanguageModel, "layer_reads", _without_gradient), GEMMA4),
    "per-layer norm summed over one stage": Mistake(
        after(model.Gemma4LanguageModel, "__init__", _one_stage_has_the_norm), GEMMA4, "mixed", LAYOUTS["PP2"]
    ),
    "a router of the experts' input": Mistake(_router_of_experts_input, WITH_MOE),
    "experts without scales": Mistake(after(moe.Router, "forward", _without_scales), WITH_MOE),
    "places in rows for places in columns": Mistake(after(patches, "patch_positions", _swapped), GEMMA4),
    "a head's first half rotated by the row": Mistake(after(vision, "patch_rope", _rope_by_row_first), GEMMA4),
    "images that attend to each other": Mistake(
        after(patches, "Segments", lambda segments, *_: replace(segments, lengths=(sum(segments.lengths),))), GEMMA4
    ),
    "pixels between zero and one": Mistake(
        before(vision.PatchEmbedder, "forward", lambda module, pixels, places: (module, pixels / 2 + 0.5, places)),
        GEMMA4,
    ),
}


def run_mistaken(directory: str, name: str, micro_batches: Sequence[Any]) -> Outputs:
    mistake = MISTAKES[name]
    with mistake.patch():
        return run_case(directory, mistake.layout, {mistake.case: list(micro_batches)})


def worst_error(ranks: Sequence[RankResult], expected: Expected, vocabulary: int) -> float:
    """Of logits and of gradients, over all ranks."""
    errors = [worst_logits(rank.logits, expected, vocabulary) for rank in ranks if rank.logits]
    for rank in ranks:
        for name, ours in rank.gradients.items():
            theirs = expected.gradients[name]
            if theirs.any():
                errors.append(relative_error(ours.flatten()[: theirs.numel()], theirs.flatten()))
    return max(errors)


@pytest.fixture(scope="module")
def directory_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TinyFamily], str]:
    return cache(lambda family: family.write(tmp_path_factory.mktemp("hf")))


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_seen(name: str, directory_of: Callable[[TinyFamily], str]) -> None:
    mistake = MISTAKES[name]
    expected = mistake.family.expected(mistake.case)
    ranks = run_ranks(
        mistake.layout.world_size, run_mistaken, directory_of(mistake.family), name, expected.micro_batches
    )
    error = worst_error([rank[mistake.case] for rank in ranks], expected, mistake.family.vocabulary)
    assert error > CLEARLY_WRONG, error
