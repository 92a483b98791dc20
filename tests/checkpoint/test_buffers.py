"""Values that never train, scalars among them, and copies on all stages: from a file into a model and back."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlm.checkpoint.hf import SafetensorsReader
from megatron_vlm.conversion import running_model
from megatron_vlm.conversion.export_plan import ExportPlan
from megatron_vlm.conversion.running_model import export_hf_from_model, load_hf_into_model
from megatron_vlm.families import registry
from megatron_vlm.model.weight_map import WeightMap
from megatron_vlm.model.weight_tables import Weight, WeightGroup
from megatron_vlm.parallel.groups import build_groups
from tests.distributed.test_stage_copies import HIDDEN, NUM_LAYERS, Text, Toy, build
from tests.parity.layouts import TestLayout
from tests.ranks import run_ranks

TABLE = (Text.vocab_size, HIDDEN)
SHAPES = {"clip_bound": (), "per_layer_norm.weight": (HIDDEN,), "norm.weight": (HIDDEN,)}
for layer in range(NUM_LAYERS):
    SHAPES |= {
        f"layers.{layer}.weight": (HIDDEN, HIDDEN),
        f"layers.{layer}.undecayed": (HIDDEN, 1),
        f"layers.{layer}.layer_scalar": (1,),
    }
WEIGHTS = tuple(Weight(suffix, shape) for suffix, shape in SHAPES.items())
MAP = WeightMap(
    (
        WeightGroup(
            "language_model.", ("model.",), (Weight("embed_tokens.weight", TABLE, has_vocabulary_rows=True), *WEIGHTS)
        ),
    )
)


class Stored(Toy):
    @staticmethod
    def weight_map(model_config: object) -> WeightMap:
        return MAP


def load_and_export(source: Path, target: Path, layout: TestLayout) -> dict[str, torch.Tensor]:
    """On a rank: the parameters of its chunks."""
    groups = build_groups(layout.ranks(NUM_LAYERS))
    chunks = build(layout, groups)
    load_hf_into_model(chunks, source, Stored, None, groups)  # type: ignore[arg-type]
    with SafetensorsReader(source) as reader:
        plan = ExportPlan(source, reader.files, MAP.match(reader).tensors, (), None, MAP, None, False)
    with (
        mock.patch.object(running_model, "plan_export", lambda *_: plan),
        mock.patch.object(registry, "load_hf_config"),
    ):
        export_hf_from_model(chunks, source, target, Stored, None, groups)  # type: ignore[arg-type]
    return {
        f"{number} {name}": parameter.detach().clone()
        for number, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }


@pytest.mark.parametrize(
    "layout", [TestLayout(), TestLayout(3, pipeline=3), TestLayout(3, pipeline=3, virtual=2)], ids=str
)
def test_round_trip(tmp_path: Path, layout: TestLayout) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    generator = torch.Generator().manual_seed(3)
    shapes = SHAPES | {"embed_tokens.weight": TABLE}
    stored = {f"model.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(stored, source / "model.safetensors")
    ranks = run_ranks(layout.world_size, load_and_export, source, target, layout)
    for name, values in (held for rank in ranks for held in rank.items()):
        theirs = stored[name.split(maxsplit=1)[1].replace("language_model.", "model.")]
        assert torch.equal(values[: len(theirs)] if values.dim() else values, theirs), name
    copies = [name for rank in ranks for name in rank if name.endswith("clip_bound")]
    assert len(copies) == layout.pipeline * layout.virtual
    exported = load_file(target / "model.safetensors")
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[name], values) for name, values in stored.items())
