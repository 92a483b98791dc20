"""Attention's tables of blocks are built once per micro-batch and kind of layer, whatever the number of layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.utils import unwrap_model

import vlm_kernels.span_attention as span_module
from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.training.step import run_global_batch
from tests.families import FAMILIES
from tests.families.tiny_family import TinyFamily
from tests.parity.layouts import TestLayout, set_up
from tests.ranks import run_ranks
from tests.sizes import full
from vlm_kernels import packed_attention
from vlm_kernels.span_attention import Spans, flex, operators, spans

# FlexAttention's mask, and the ranges of our kernels' three launches, whose blocks have different sizes.
TABLES = 1 + 3


@dataclass
class Calls:
    """Attention of a forward and a backward pass as on a GPU, computed by the references."""

    kinds: dict[tuple[int, int | None], Spans] = field(default_factory=dict)
    attention: int = 0
    tables: int = 0

    def attend(self, *inputs: Any) -> torch.Tensor:
        """Attention that needs the tables of both forms."""
        *_, visible, window, _ = inputs
        self.attention += 1
        self.kinds[id(visible), window] = visible  # kept: no other spans get its id
        visible.block_mask(window)
        return operators.attend(*inputs)

    def counted(self, build: Any) -> Any:
        """What builds a table, counted."""

        def count(*inputs: Any) -> Any:
            self.tables += 1
            return build(*inputs)

        return count


def calls_of(hf_dir: str, layout: TestLayout, batch: MicroBatch) -> tuple[int, int, int, int, int]:
    """Calls of attention, tables, kinds of attention in decoders and towers, and kinds that the configuration has."""
    model, groups = set_up(hf_dir, layout)
    calls = Calls()
    with (
        mock.patch.object(span_module, "is_on_gpu", lambda q: True),
        mock.patch.object(packed_attention, "is_on_gpu", lambda q: True),
        mock.patch.object(flex, "attend", calls.attend),
        mock.patch.object(spans, "_block_mask", calls.counted(spans._block_mask)),
        mock.patch.object(spans, "_block_ranges", calls.counted(spans._block_ranges)),
    ):
        run_global_batch(model, [batch], groups)
    in_decoder = sum(torch.equal(visible.low, batch.span_low) for visible in calls.kinds.values())
    configured = 0
    for chunk in unwrap_model(model):
        layers = [chunk.language_model.text.layers[int(name)] for name in chunk.language_model.layers]
        configured += len({(layer.image_mask, layer.window) for layer in layers})
    return calls.attention, calls.tables, in_decoder, len(calls.kinds) - in_decoder, configured


@pytest.mark.parametrize("recompute", [full("none"), full("selective"), "full"])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_tables_are_built_once(family: TinyFamily, recompute: Any, tmp_path: Path) -> None:
    """Of a packed micro-batch, in its forward and backward pass with what that computes again."""
    batch = family.micro_batches("packed")[0].batch
    ((attention, tables, in_decoder, in_tower, configured),) = run_ranks(
        1, calls_of, family.write(tmp_path), TestLayout(recompute=recompute), batch
    )
    print(f"\n{family}: {attention} calls of attention, {tables} tables")
    assert in_decoder == configured and in_tower <= 1
    assert tables == TABLES * (in_decoder + in_tower)
    assert attention > in_decoder + in_tower
