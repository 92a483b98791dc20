"""Converting, loading and exporting take no more memory with more experts."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import Qwen3VLMoeConfig

from megatron_vlm.checkpoint.hf import SafetensorsReader, SafetensorsWriter
from megatron_vlm.conversion import running_model
from megatron_vlm.conversion.convert import export_checkpoint, import_checkpoint, verify_checkpoint
from megatron_vlm.conversion.running_model import export_hf_from_model, load_hf_into_model
from megatron_vlm.families import registry
from megatron_vlm.families.build import BuildSettings, build_chunks
from megatron_vlm.files.safetensors_headers import WeightFiles
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.parallel.layout import Layout
from tests.families import qwen3_vl
from tests.ranks import run_ranks

# One expert's gate and up are 1 MiB.
SIZES = {"hidden_size": 1024, "moe_intermediate_size": 256, "num_hidden_layers": 1, "mlp_only_layers": []}
FEW, MANY = 8, 64
GATE_UP = "model.language_model.layers.0.mlp.experts.gate_up_proj"
MIB = 2**20
ALLOWED_BYTES = 16 * MIB  # a few experts and blocks; all gate and up of one layer are 64 MiB


def write_published(directory: Path, num_experts: int) -> Path:
    """Random bits in the published layout."""
    config = Qwen3VLMoeConfig(
        text_config=qwen3_vl.TEXT | qwen3_vl.MOE | SIZES | {"num_experts": num_experts},
        vision_config=qwen3_vl.VISION | {"out_hidden_size": SIZES["hidden_size"], "deepstack_visual_indexes": [0]},
    )
    config.save_pretrained(directory)
    family = registry.detect(directory)
    weight_map = family.weight_map(family.config_from_hf(registry.load_hf_config(directory), False))
    weights = weight_map.as_written()
    assert any(entry.is_transposed for entry in weights.values())
    files = WeightFiles.plan((name, torch.bfloat16, entry.shape) for name, entry in weights.items())
    writer = SafetensorsWriter(directory, files)
    for stored in files:
        writer.write(stored.name, 0, torch.randint(0, 2**15, stored.shape, dtype=torch.int16).view(torch.bfloat16))
    writer.close()
    return directory


def memory_bytes(kind: str) -> int:
    """`VmRSS` or its peak, `VmHWM`, of this process."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def growth_bytes(action: Callable[[], object]) -> int:
    """How far memory rose above what it was while `action` ran."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or memory freed before would be taken again and not show
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before_bytes = memory_bytes("VmRSS")
    action()
    return memory_bytes("VmHWM") - before_bytes


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("experts")
    return {num_experts: write_published(folder / str(num_experts), num_experts) for num_experts in (FEW, MANY)}


def convert(source: Path, folder: Path) -> list[int]:
    """How far memory rises in an import, an export and a comparison."""
    return [
        growth_bytes(lambda: import_checkpoint(source, folder / "checkpoint")),
        growth_bytes(lambda: export_checkpoint(folder / "checkpoint", source, folder / "out")),
        growth_bytes(lambda: verify_checkpoint(source, folder / "checkpoint")),
    ]


# In both tests the small model goes first: pages of libraries, which a process maps when it first needs them, count as
# its memory too, and how many are mapped at a time depends on what else the machine does.


@pytest.mark.full
def test_conversion_takes_one_expert_at_a_time(published: dict[int, Path], tmp_path: Path) -> None:
    for num_experts, source in published.items():
        growths = convert(source, tmp_path / str(num_experts))
        print(num_experts, [f"{growth / MIB:.1f} MiB" for growth in growths])
        written = (tmp_path / str(num_experts) / "out" / "model.safetensors").read_bytes()
        assert written == (source / "model.safetensors").read_bytes()
    assert max(growths) < ALLOWED_BYTES
    with SafetensorsReader(published[MANY]) as reader:  # and this measurement would have seen more
        assert growth_bytes(lambda: reader.read(GATE_UP)) > 0.9 * MANY * MIB
    for _ in range(2):  # also expert by expert, in memory that was in use before
        assert growth_bytes(lambda: [torch.zeros(MIB, dtype=torch.uint8) for _ in range(MANY)]) > 0.9 * MANY * MIB


def load_and_export(sources: Sequence[Path], targets: Sequence[Path]) -> tuple[int, int]:
    """How far one rank's memory rises while it loads the last model and while it exports it."""
    layout = Layout.over(2, num_layers=1, expert_size=2)
    groups = build_groups(layout)
    initialize_megatron(0, groups)
    for source, target in zip(sources, targets, strict=True):
        family = registry.detect(source)
        config = family.config_from_hf(registry.load_hf_config(source), False)
        chunks = build_chunks(family, config, BuildSettings(layout, torch.bfloat16), groups)
        for chunk in chunks:
            for parameter in chunk.parameters():
                torch.nn.init.zeros_(parameter)  # so that its memory counts before
        loading = growth_bytes(lambda: load_hf_into_model(chunks, source, family, config, groups))  # noqa: B023
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(running_model, "GATHERED_BYTES", MIB)
            exporting = growth_bytes(lambda: export_hf_from_model(chunks, source, target, family, config, groups))  # noqa: B023
    return loading, exporting


def test_a_running_model_moves_one_expert_at_a_time(published: dict[int, Path], tmp_path: Path) -> None:
    targets = {num_experts: tmp_path / str(num_experts) for num_experts in published}
    growths = run_ranks(2, load_and_export, list(published.values()), list(targets.values()))
    print([[f"{growth / MIB:.1f} MiB" for growth in rank] for rank in growths])
    for num_experts, source in published.items():
        written = (targets[num_experts] / "model.safetensors").read_bytes()
        assert written == (source / "model.safetensors").read_bytes()
    assert max(max(rank) for rank in growths) < ALLOWED_BYTES
