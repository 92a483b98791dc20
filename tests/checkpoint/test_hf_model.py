"""Loading a model from Hugging Face directories and exporting it, in several layouts; transformers wrote the files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed
from safetensors.torch import load_file

from megatron_vlm.checkpoint.hf import SafetensorsReader, SafetensorsWriter
from megatron_vlm.checkpoint.manager import CheckpointManager
from megatron_vlm.conversion import export_plan
from megatron_vlm.conversion.convert import export_checkpoint, identity_of, verify_checkpoint
from megatron_vlm.conversion.running_model import export_hf_from_model, load_hf_into_model
from megatron_vlm.errors import CheckpointError
from megatron_vlm.families import registry
from megatron_vlm.families.build import DTYPES, BuildSettings, build_chunks, wrap_data_parallel
from megatron_vlm.files.safetensors_headers import StoredTensor
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.parallel.layout import Layout
from tests.checkpoint import gemma3_files
from tests.checkpoint.hf_files import content, files, load_tensors
from tests.parity.layouts import TestLayout
from tests.ranks import run_ranks
from tests.sizes import full

FOUR_LAYERS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}


LAYOUTS = {
    "single": TestLayout(precision="bf16"),
    "tp2": TestLayout(2, tensor=2, precision="bf16"),
    "tp2 vision data": TestLayout(2, tensor=2, vision="data", precision="bf16"),
    "tp2 pp2 fp32": TestLayout(4, tensor=2, pipeline=2),
    "pp4": TestLayout(4, pipeline=4, precision="bf16"),
    "pp2 vpp2": TestLayout(2, pipeline=2, virtual=2, precision="bf16"),
    "dp2 tp2": TestLayout(4, tensor=2, precision="bf16", distributed_optimizer=True),
}


def load_and_export(source: Path, target: Path, layout: TestLayout, text_only: bool) -> dict[str, torch.Tensor]:
    """One rank: build, load, export; returns this rank's parameters."""
    family = registry.detect(source)
    config = family.config_from_hf(registry.load_hf_config(source), text_only)
    ranks = layout.ranks(len(config.text.layers))
    groups = build_groups(ranks)
    initialize_megatron(0, groups)
    settings = BuildSettings(ranks, DTYPES[layout.precision], vision_parallelism=layout.vision)
    chunks = build_chunks(family, config, settings, groups)
    for chunk in chunks:
        for parameter in chunk.parameters():
            torch.nn.init.constant_(parameter, float("nan"))  # whatever is not loaded must show
    wrapped = wrap_data_parallel(chunks, groups, use_distributed_optimizer=layout.distributed_optimizer)
    load_hf_into_model(wrapped, source, family, config, groups)
    export_hf_from_model(wrapped, source, target, family, config, groups)
    return {name: parameter.detach().clone() for chunk in chunks for name, parameter in chunk.named_parameters()}


def load_and_save(source: Path, directory: Path, layout: TestLayout) -> None:
    """One rank: build, load, save a checkpoint as a run does, with megatron-core."""
    family = registry.detect(source)
    config = family.config_from_hf(registry.load_hf_config(source), False)
    ranks = layout.ranks(len(config.text.layers))
    groups = build_groups(ranks)
    initialize_megatron(0, groups)
    chunks = build_chunks(family, config, BuildSettings(ranks, DTYPES[layout.precision]), groups)
    load_hf_into_model(chunks, source, family, config, groups)
    identity = identity_of(source, family.name, config)
    manager = CheckpointManager(directory, groups, identity, {}, "fp32", async_save=False)
    manager.save(3, chunks, None, None, data_state={}, config_yaml="")


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gemma3_files.multimodal(tmp_path_factory.mktemp("multimodal") / "hf", **FOUR_LAYERS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_exports_the_files_it_was_loaded_from(multimodal: Path, tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    run_ranks(layout.world_size, load_and_export, multimodal, tmp_path / "out", layout, False)
    assert files(tmp_path / "out") == files(multimodal)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["tp2", "pp4"])
def test_text_only_models(tmp_path: Path, name: str, tied: bool) -> None:
    source = gemma3_files.text_only(tmp_path / "hf", tie_word_embeddings=tied, **FOUR_LAYERS)
    run_ranks(LAYOUTS[name].world_size, load_and_export, source, tmp_path / "out", LAYOUTS[name], False)
    assert files(tmp_path / "out") == files(source)


def test_the_language_model_is_taken_out_of_a_multimodal_directory(multimodal: Path, tmp_path: Path) -> None:
    run_ranks(4, load_and_export, multimodal, tmp_path / "out", LAYOUTS["tp2 pp2 fp32"], True)
    expected = load_tensors(multimodal)
    actual = load_tensors(tmp_path / "out")
    prefix = "language_model.model."
    assert {name for name in expected if name.startswith(prefix)} == {
        prefix + name.removeprefix("model.") for name in actual
    }
    for name, tensor in actual.items():
        source = expected[prefix + name.removeprefix("model.")]
        assert tensor.dtype == source.dtype and tensor.equal(source), name


def test_each_rank_holds_its_slice_and_zero_padding(multimodal: Path, tmp_path: Path) -> None:
    """100 vocabulary rows are padded to 128: the second rank holds rows 64 to 99 and 28 zero rows."""
    first, second = run_ranks(2, load_and_export, multimodal, tmp_path / "out", LAYOUTS["tp2"], False)
    expected = load_tensors(multimodal)
    embedding = expected["language_model.model.embed_tokens.weight"]
    name = "language_model.embed_tokens.weight"
    assert first[name].equal(embedding[:64]) and second[name][:36].equal(embedding[64:])
    assert second[name].shape == (64, 32) and not second[name][36:].any()
    by_columns = expected["language_model.model.layers.3.mlp.down_proj.weight"]
    for rank, parameters in enumerate((first, second)):
        assert parameters["language_model.layers.3.mlp.down_proj.weight"].equal(by_columns.chunk(2, dim=1)[rank])


@pytest.mark.parametrize("name", ["tp2 pp2 fp32", "pp2 vpp2"])
def test_a_checkpoint_of_a_run_is_exported_without_ranks(multimodal: Path, tmp_path: Path, name: str) -> None:
    run_ranks(LAYOUTS[name].world_size, load_and_save, multimodal, tmp_path / "run" / "checkpoints", LAYOUTS[name])
    assert verify_checkpoint(multimodal, tmp_path / "run").differences == ()
    export_checkpoint(tmp_path / "run", multimodal, tmp_path / "out")
    assert files(tmp_path / "out") == files(multimodal)


def bytes_read(source: Path) -> tuple[int, int]:
    """One rank: bytes that loading reads, and bytes of the rank's parameters."""
    num_read = 0
    read_range = SafetensorsReader._read_range

    def counted(
        reader: SafetensorsReader, stored: StoredTensor, begin_byte: int, end_byte: int, buffer: object = None
    ) -> torch.Tensor:
        nonlocal num_read
        num_read += end_byte - begin_byte
        return read_range(reader, stored, begin_byte, end_byte, buffer)

    layout = Layout.over(2, num_layers=4, pipeline_size=2)
    groups = build_groups(layout)
    initialize_megatron(0, groups)
    family = registry.detect(source)
    config = family.config_from_hf(registry.load_hf_config(source), False)
    chunks = build_chunks(family, config, BuildSettings(layout, torch.bfloat16), groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsReader, "_read_range", counted)
        load_hf_into_model(chunks, source, family, config, groups)
    return num_read, sum(parameter.nbytes for chunk in chunks for parameter in chunk.parameters())


def test_a_rank_reads_only_its_own_tensors(multimodal: Path) -> None:
    """Each of two pipeline stages holds the tied embedding, whose padding rows are not in the file."""
    padding_bytes = 28 * 32 * 2
    for num_read, num_held in run_ranks(2, bytes_read, multimodal):
        assert num_read == num_held - padding_bytes


def bytes_written(source: Path, target: Path, layout: TestLayout) -> tuple[dict[str, int], int]:
    """One rank: bytes of tensors that it writes into each file, and the pipeline stage that it is in."""
    written = Counter[str]()
    write = SafetensorsWriter.write

    def counted(writer: SafetensorsWriter, name: str, first_row: int, rows: torch.Tensor) -> None:
        written[writer._tensors[name].file] += rows.nbytes
        write(writer, name, first_row, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsWriter, "write", counted)
        patch.setattr(export_plan, "UNDIVIDED_BYTES", 0)
        load_and_export(source, target, layout, False)
    return dict(written), torch.distributed.get_rank() // (layout.world_size // layout.pipeline)


@pytest.mark.parametrize("name", ["pp4", "tp2 pp2 fp32", full("pp2 vpp2")])
def test_each_stage_writes_its_own_tensors(multimodal: Path, tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    results = run_ranks(layout.world_size, bytes_written, multimodal, tmp_path / "out", layout)
    by_stage = {stage: written for written, stage in results if written}
    assert len(by_stage) == layout.pipeline == sum(bool(written) for written, _ in results)
    of_files = {
        path.name: sum(tensor.nbytes for tensor in load_file(path).values())
        for path in (tmp_path / "out").glob("*.safetensors")
    }
    assert {file: count for written in by_stage.values() for file, count in written.items()} == of_files
    assert sum(len(written) for written in by_stage.values()) == len(of_files), "two ranks write one file"
    assert content(tmp_path / "out") == content(multimodal)


def no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


def export_refused(source: Path, target: Path, failing_ranks: Sequence[int]) -> str:
    """One rank: the message of the error that exporting raises."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_plan, "UNDIVIDED_BYTES", 0)
        if torch.distributed.get_rank() in failing_ranks:
            patch.setattr(SafetensorsWriter, "write", no_space)
        with pytest.raises(CheckpointError) as caught:
            load_and_export(source, target, LAYOUTS["tp2 pp2 fp32"], False)
    return str(caught.value)


@pytest.mark.parametrize("failing_ranks", [range(4), [2], []], ids=["full disk", "one writer", "target not empty"])
def test_every_rank_learns_why_an_export_failed(multimodal: Path, tmp_path: Path, failing_ranks: Sequence[int]) -> None:
    target = tmp_path / "out"
    if not failing_ranks:
        target.mkdir()
        (target / "mine").write_text("x")
    messages = run_ranks(4, export_refused, multimodal, target, failing_ranks)
    assert len(set(messages)) == 1
    assert ("No space left" if failing_ranks else "not empty") in messages[0]
    assert [path.name for path in tmp_path.iterdir()] == ([] if failing_ranks else ["out"])
