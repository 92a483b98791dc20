"""Loading Qwen3-VL from files in both layouts of experts and exporting it, in layouts that divide the experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from megatron_vlm.checkpoint import hf
from megatron_vlm.checkpoint.hf import SafetensorsReader
from megatron_vlm.checkpoint.manager import CheckpointManager
from megatron_vlm.conversion import running_model
from megatron_vlm.conversion.convert import export_checkpoint, identity_of, verify_checkpoint
from megatron_vlm.conversion.running_model import export_hf_from_model, load_hf_into_model
from megatron_vlm.families import registry
from megatron_vlm.families.build import BuildSettings, build_chunks, wrap_data_parallel
from megatron_vlm.files.safetensors_headers import StoredTensor
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.sharding import own_part
from tests.checkpoint import qwen3_vl_files
from tests.checkpoint.hf_files import content, files, load_tensors, rename
from tests.families.qwen3_vl import VOCABULARY
from tests.ranks import run_ranks
from tests.sizes import two_sizes

# Ranks, and the tensor, pipeline, expert and expert-tensor sizes.
LAYOUTS = {
    "single": (1, (1, 1, 1, 1)),
    "ep4": (4, (1, 1, 4, 1)),
    "etp2": (2, (1, 1, 1, 2)),
    "tp2 ep2": (2, (2, 1, 2, 1)),
    "tp2 ep2 etp2": (4, (2, 1, 2, 2)),
    "pp2 ep2": (4, (1, 2, 2, 1)),
    "pp4 with empty stages": (4, (1, 4, 1, 1)),
    "tp2 dp2": (4, (2, 1, 1, 1)),
}
Sizes = tuple[int, int, int, int]


def build(
    source: Path, sizes: Sizes, dtype: torch.dtype, text_only: bool = False
) -> tuple[list[MegatronModule], ProcessGroupCollection]:
    """One rank's chunks, full of NaN: whatever is not loaded must show."""
    tensor, pipeline, expert, expert_tensor = sizes
    layout = Layout.over(
        torch.distributed.get_world_size(),
        num_layers=4,
        pipeline_layout=[2, 0, 0, 2] if pipeline == 4 else None,
        tensor_size=tensor,
        sequence_parallel=tensor > 1,
        pipeline_size=pipeline,
        expert_size=expert,
        expert_tensor_size=expert_tensor,
    )
    groups = build_groups(layout)
    initialize_megatron(0, groups)
    family = registry.detect(source)
    config = family.config_from_hf(registry.load_hf_config(source), text_only)
    chunks = build_chunks(family, config, BuildSettings(layout, dtype), groups)
    for chunk in chunks:
        for parameter in chunk.parameters():
            torch.nn.init.constant_(parameter, float("nan"))
    return chunks, groups


def load_and_export(
    saved: Path, source: Path, target: Path, sizes: Sizes, dtype: torch.dtype, text_only: bool = False
) -> set[str]:
    """One rank: load, compare with what transformers saved, export; returns the names of its parameters."""
    chunks, groups = build(source, sizes, dtype, text_only)
    family = registry.detect(source)
    config = family.config_from_hf(registry.load_hf_config(source), text_only)
    wrapped = wrap_data_parallel(chunks, groups, use_distributed_optimizer=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running_model, "GATHERED_BYTES", 1000)  # an expert at a time
        load_hf_into_model(wrapped, source, family, config, groups)
        export_hf_from_model(wrapped, source, target, family, config, groups)
    expected = qwen3_vl_files.ours(load_tensors(saved))
    held = {name: parameter for chunk in chunks for name, parameter in chunk.named_parameters()}
    for name, parameter in held.items():
        assert parameter.equal(own_part(expected[name], parameter, groups).to(dtype)), name
    return set(held)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3_vl_files.saved(tmp_path_factory.mktemp("saved") / "hf")


@pytest.fixture(scope="module")
def published(saved: Path) -> Path:
    return qwen3_vl_files.published(saved, saved.parent / "published")


@pytest.mark.parametrize("name", two_sizes(LAYOUTS, "single", "tp2 ep2 etp2", "pp2 ep2", "pp4 with empty stages"))
def test_every_rank_holds_its_parts_and_they_come_together_again(
    saved: Path, published: Path, tmp_path: Path, name: str
) -> None:
    ranks, sizes = LAYOUTS[name]
    dtype = torch.float32 if name == "pp2 ep2" else torch.bfloat16
    for source in (published, saved) if name == "tp2 ep2 etp2" else (published,):
        held = run_ranks(ranks, load_and_export, saved, source, tmp_path / source.name, sizes, dtype)
        assert set().union(*held) == set(qwen3_vl_files.ours(load_tensors(saved)))
        assert content(tmp_path / source.name) == content(source)


def test_a_text_only_run_exports_a_qwen3_model(saved: Path, published: Path, tmp_path: Path) -> None:
    """Under the names and in the layout of what transformers saves of Qwen3VLMoeForConditionalGeneration."""
    run_ranks(2, load_and_export, saved, published, tmp_path / "out", (2, 1, 2, 1), torch.float32, True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe" and config["norm_topk_prob"] is True
    expected = {name: tensor for name, tensor in load_tensors(saved).items() if "visual" not in name}
    actual = rename({"model.": "model.language_model."})(load_tensors(tmp_path / "out"))
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and actual[name].equal(tensor), name


def load_and_save(source: Path, directory: Path, sizes: Sizes) -> None:
    """One rank: load, save a checkpoint as a run does, with megatron-core."""
    chunks, groups = build(source, sizes, torch.float32)
    family = registry.detect(source)
    config = family.config_from_hf(registry.load_hf_config(source), False)
    load_hf_into_model(chunks, source, family, config, groups)
    manager = CheckpointManager(
        directory, groups, identity_of(source, family.name, config), {}, "fp32", async_save=False
    )
    manager.save(3, chunks, None, None, data_state={}, config_yaml="")


@pytest.mark.parametrize("name", ["tp2 ep2 etp2", "pp2 ep2"])
def test_a_checkpoint_of_divided_experts_is_exported_without_ranks(published: Path, tmp_path: Path, name: str) -> None:
    ranks, sizes = LAYOUTS[name]
    run_ranks(ranks, load_and_save, published, tmp_path / "run" / "checkpoints", sizes)
    assert verify_checkpoint(published, tmp_path / "run").differences == ()
    export_checkpoint(tmp_path / "run", published, tmp_path / "out")
    assert files(tmp_path / "out") == files(published)


def numbers_read(source: Path, sizes: Sizes) -> tuple[int, int]:
    """One rank: how many numbers loading reads, and how many the rank holds besides vocabulary padding."""
    num_read = 0
    read_range = SafetensorsReader._read_range

    def counted(reader: SafetensorsReader, stored: StoredTensor, begin: int, end: int, *rest: object) -> torch.Tensor:
        nonlocal num_read
        num_read += (end - begin) // stored.dtype.itemsize
        return read_range(reader, stored, begin, end, *rest)

    chunks, groups = build(source, sizes, torch.bfloat16)
    family = registry.detect(source)
    with pytest.MonkeyPatch.context() as patch:
        # Smaller than the rows that a rank takes a part of, as a block is for real sizes.
        patch.setattr(hf, "BLOCK_BYTES", 50)
        patch.setattr(SafetensorsReader, "_read_range", counted)
        config = family.config_from_hf(registry.load_hf_config(source), False)
        load_hf_into_model(chunks, source, family, config, groups)
    num_held = 0
    for name, parameter in (pair for chunk in chunks for pair in chunk.named_parameters()):
        num_held += parameter.numel()
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            end_row = (groups.tp.rank() + 1) * len(parameter)
            num_held -= min(len(parameter), max(0, end_row - VOCABULARY)) * parameter.shape[1]
    return num_read, num_held


@pytest.mark.parametrize("is_published", [True, False], ids=["published", "saved"])
def test_a_rank_reads_only_its_own_parts(saved: Path, published: Path, is_published: bool) -> None:
    for num_read, num_held in run_ranks(4, numbers_read, published if is_published else saved, (2, 1, 4, 1)):
        assert num_read == num_held
