"""Model FLOPs against torch's own counter on transformers' model, and visible keys against transformers' masks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.data.context_shard import ContextSharding, shard_for_context
from megatron_vlm.families import registry
from megatron_vlm.model.trainable import Trainable
from megatron_vlm.planning.flops import ModelFlops, visible_keys
from tests.families.gemma3 import GEMMA3, LENGTH, ROWS, build, make_batch, reference
from tests.families.gemma4 import GEMMA4
from tests.families.qwen3_vl import QWEN3_VL
from tests.families.tiny_family import TinyFamily
from tests.training.model_flops import FROZEN, batch_flops
from tests.versions import needs_transformers_5_23

FAMILY = registry.FAMILIES[0]
FULL_ROWS = {"images": [(LENGTH, [3]), (LENGTH, [1, 9]), (LENGTH, [])], "text": [(LENGTH, []), (LENGTH, [])]}


def _model(with_vision: bool, **text: object) -> tuple[PreTrainedModel, Any]:
    model = build(with_vision, **text)
    # Plain products and whole attention weights: torch counts a fused backward pass with the scores computed twice.
    model.set_attn_implementation("eager")
    return model, registry.detect(model.config).config_from_hf(model.config, text_only=False)


def _torch_flops(model: PreTrainedModel, batch: MicroBatch, backward: bool) -> int:
    with FlopCounterMode(display=False) as counter:
        loss = reference(model, batch)[1]
        if backward and loss.requires_grad:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["images", "text"])
@pytest.mark.parametrize("frozen", FROZEN, ids=lambda frozen: "frozen: " + (", ".join(sorted(frozen)) or "nothing"))
@needs_transformers_5_23
def test_count_equals_torch(kind: str, frozen: set[str]) -> None:
    """Forward and backward, exactly, for rows without padding whose tokens all see each other.

    transformers' eager attention computes all pairs whatever the mask; the spans here say the same, so that both count
    the same pairs. Which pairs a mask leaves is the next test's.
    """
    model, config = _model(True, sliding_window=LENGTH)
    _freeze(model, frozen)
    batch = make_batch(FULL_ROWS[kind])
    everything = replace(
        batch,
        span_low=torch.zeros_like(batch.span_low),
        span_high=torch.full_like(batch.span_high, LENGTH - 1),
        media_inputs={},  # as on later pipeline stages
    )
    assert batch_flops(FAMILY, config, everything, frozen) == _torch_flops(model, batch, backward=True)
    # Only the forward pass: the same count with everything frozen.
    assert batch_flops(FAMILY, config, everything, {"language_model", "vision_tower", "projector"}) == _torch_flops(
        model, batch, backward=False
    )


def _freeze(model: PreTrainedModel, frozen: set[str]) -> None:
    parts = {
        "language_model": model.model.language_model,
        "vision_tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
    }
    for name, part in parts.items():
        part.requires_grad_(name not in frozen)


@needs_transformers_5_23
def test_text_only_model_counts_no_vision() -> None:
    """`Gemma3ForCausalLM`, untied head."""
    model, config = _model(False, tied=False, sliding_window=LENGTH)
    batch = make_batch(FULL_ROWS["text"])
    everything = replace(
        batch, span_low=torch.zeros_like(batch.span_low), span_high=torch.full_like(batch.span_high, LENGTH - 1)
    )
    assert batch_flops(FAMILY, config, everything) == _torch_flops(model, batch, backward=True)


@pytest.mark.parametrize("kind", sorted(ROWS))
def test_visible_keys_equal_transformers_masks(kind: str) -> None:
    """Count the attention weights of real queries that transformers' masks leave above zero.

    Rows are padded, windows are shorter than rows, images see forward past a window's past side.
    """
    model, config = _model(True)
    batch = make_batch(ROWS[kind])
    is_real = batch.document_ids >= 0
    inputs = {"attention_mask": is_real.long(), "token_type_ids": (batch.feature_index >= 0).long()}
    with torch.no_grad():
        attentions = model(input_ids=batch.input_ids, **inputs, **batch.media_inputs, output_attentions=True).attentions
    for layer, weights_BNSS in zip(config.text.layers, attentions, strict=True):
        expected = int(((weights_BNSS[:, 0] > 0) & is_real[..., None]).sum())
        assert visible_keys(batch, is_real, layer.window) == expected


def test_padding_is_free() -> None:
    """Twice the padded length costs nothing."""
    _, config = _model(True)
    rows = [(14, [2]), (9, [])]
    short, long = (make_batch(rows, pad_to_multiple_of=length) for length in (LENGTH, 2 * LENGTH))
    assert batch_flops(FAMILY, config, short) == batch_flops(FAMILY, config, long)


@pytest.mark.parametrize("family", [GEMMA3, GEMMA4, QWEN3_VL], ids=str)
def test_context_ranks_count_a_micro_batch_once(family: TinyFamily) -> None:
    """Tokens and keys that their queries see where they are, media on one of them."""
    model_config = registry.detect(family.config).config_from_hf(family.config, text_only=False)
    kinds = model_config.text.attention_kinds

    def lengths(batch: MicroBatch, rank: int) -> torch.Tensor:
        groups: Any = SimpleNamespace(cp=SimpleNamespace(rank=lambda: rank))
        counted = ModelFlops(registry.detect(family.config), model_config, Trainable(()), groups)
        return torch.tensor(counted.lengths(batch))

    for reference_of_family in family.micro_batches("packed"):
        batch = reference_of_family.batch
        shards = [shard_for_context(batch, ContextSharding(rank, 3, kinds)) for rank in range(3)]
        assert torch.equal(sum(map(lengths, shards, range(3))), lengths(batch, 0))
