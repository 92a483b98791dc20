"""Loading Mistral3 from files, float8 among them, and exporting it, in layouts that divide it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vlm.checkpoint.manager import CheckpointManager
from megatron_vlm.checkpoint.torch_dist import TorchDistReader
from megatron_vlm.conversion.convert import export_checkpoint, identity_of, import_checkpoint, verify_checkpoint
from megatron_vlm.conversion.running_model import export_hf_from_model, load_hf_into_model
from megatron_vlm.families import registry
from megatron_vlm.families.build import BuildSettings, build_chunks, wrap_data_parallel
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.sharding import own_part
from tests.checkpoint import mistral3_files
from tests.checkpoint.hf_files import content, files, load_tensors, read_config
from tests.checkpoint.mistral3_files import saved_float8
from tests.ranks import run_ranks
from tests.sizes import two_sizes

# Ranks, and the tensor and pipeline sizes.
LAYOUTS = {
    "tp4, more than key heads": (4, (4, 1)),
    "tp2 pp2": (4, (2, 2)),
    "dp2 tp2": (4, (2, 1)),
}


def load_and_export(
    source: Path, target: Path, sizes: tuple[int, int], dtype: torch.dtype, text_only: bool, expected: dict
) -> set[str]:
    """One rank: load, compare with `expected`, export, save a checkpoint as a run does; the names it holds."""
    family = registry.detect(source)
    config = family.config_from_hf(registry.load_hf_config(source), text_only)
    layout = Layout.over(
        torch.distributed.get_world_size(),
        num_layers=len(config.text.layers),
        tensor_size=sizes[0],
        sequence_parallel=sizes[0] > 1,
        pipeline_size=sizes[1],
    )
    groups = build_groups(layout)
    initialize_megatron(0, groups)
    chunks = build_chunks(family, config, BuildSettings(layout, dtype), groups)
    held = {name: parameter for chunk in chunks for name, parameter in chunk.named_parameters()}
    for parameter in held.values():
        torch.nn.init.constant_(parameter, float("nan"))  # whatever is not loaded must show
    wrapped = wrap_data_parallel(chunks, groups, use_distributed_optimizer=True)
    load_hf_into_model(wrapped, source, family, config, groups)
    for name, parameter in held.items():
        assert parameter.equal(own_part(expected[name], parameter, groups).to(dtype)), name
    export_hf_from_model(wrapped, source, target, family, config, groups)
    identity = identity_of(source, family.name, config)
    manager = CheckpointManager(target.parent / "checkpoints", groups, identity, {}, "fp32", async_save=False)
    manager.save(3, wrapped, None, None, data_state={}, config_yaml="")
    return set(held)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mistral3_files.saved(tmp_path_factory.mktemp("saved") / "hf")


@pytest.mark.parametrize("name", two_sizes(LAYOUTS, "tp4, more than key heads", "tp2 pp2"))
def test_every_rank_holds_its_parts_and_they_come_together_again(saved: Path, tmp_path: Path, name: str) -> None:
    ranks, sizes = LAYOUTS[name]
    dtype = torch.float32 if name == "tp2 pp2" else torch.bfloat16
    expected = mistral3_files.ours(load_tensors(saved))
    held = run_ranks(ranks, load_and_export, saved, tmp_path / "out", sizes, dtype, False, expected)
    assert set().union(*held) == set(expected)
    assert content(tmp_path / "out") == content(saved)
    assert verify_checkpoint(saved, tmp_path).differences == ()
    export_checkpoint(tmp_path, saved, tmp_path / "again")
    assert files(tmp_path / "again") == files(saved)


@pytest.mark.parametrize(
    ("ranks", "sizes", "block_size"),
    [(4, (4, 1), None), (4, (2, 2), (20, 24))],
    ids=["tp4 per tensor", "tp2 pp2 blocks across ranks"],
)
def test_float8_weights_are_dequantised_into_every_part(
    tmp_path: Path, ranks: int, sizes: tuple[int, int], block_size: tuple[int, int] | None
) -> None:
    saved = mistral3_files.saved(tmp_path / "saved", tied=True)
    source = saved_float8(saved, tmp_path / "float8", block_size)
    import_checkpoint(source, tmp_path / "imported")
    reader = TorchDistReader(tmp_path / "imported")
    expected = {name: reader.read_rows(name, 0, tensor.size[0]) for name, tensor in reader.tensors.items()}
    # A run in fp32 starts from the same numbers.
    run_ranks(ranks, load_and_export, source, tmp_path / "out", sizes, torch.float32, False, expected)
    assert verify_checkpoint(source, tmp_path).differences == ()
    assert verify_checkpoint(tmp_path / "out", tmp_path / "imported").differences == ()
    config = read_config(tmp_path / "out")
    assert "quantization_config" not in config and config["text_config"]["tie_word_embeddings"] is True
    assert {tensor.dtype for tensor in load_tensors(tmp_path / "out").values()} == {torch.bfloat16}


def test_a_language_model_is_taken_out_of_a_multimodal_directory(saved: Path, tmp_path: Path) -> None:
    tensors = load_tensors(saved)
    expected = mistral3_files.ours(tensors)
    run_ranks(2, load_and_export, saved, tmp_path / "out", (2, 1), torch.float32, True, expected)
    assert read_config(tmp_path / "out")["architectures"] == ["Ministral3ForCausalLM"]
    exported = load_tensors(tmp_path / "out")
    assert set(exported) == {
        name.removeprefix("language_model.") for name in tensors if name.startswith("language_model.")
    }
    for name, tensor in exported.items():
        source = tensors["language_model." + name]
        assert tensor.dtype == source.dtype and tensor.equal(source), name
