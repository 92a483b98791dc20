"""A bit that flips in a stored checkpoint is found by whatever reads it: resumption, loading, export and verify."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_vlm.checkpoint import torch_dist
from megatron_vlm.checkpoint.manager import load_weights
from megatron_vlm.checkpoint.run_folder import Manifest, ModelIdentity, find_checkpoint
from megatron_vlm.checkpoint.torch_dist import CheckedFileReader, TorchDistReader, TorchDistWriter
from megatron_vlm.conversion.convert import export_checkpoint, import_checkpoint, verify_checkpoint
from megatron_vlm.errors import CheckpointError
from tests.checkpoint import gemma3_files
from tests.checkpoint.test_distributed_layouts import SOURCE, STEPS, train_and_save
from tests.checkpoint.tiny_run import IDENTITY, Run, Settings
from tests.parity.layouts import TestLayout
from tests.ranks import run_ranks

NORM = "language_model.layers.1.input_layernorm.weight"
CHANGED = "its checksum differs"


def records(folder: Path) -> Iterator[tuple[str, Path, int, bytes]]:
    """Key, file, position and content of every record, through torch's own reader of the metadata."""
    for index, storage in FileSystemReader(folder).read_metadata().storage_data.items():
        content = (folder / storage.relative_path).read_bytes()[storage.offset : storage.offset + storage.length]
        yield index.fqn, folder / storage.relative_path, storage.offset, content


def flip_bit(folder: Path, key: str, last: bool = False) -> None:
    """Change the lowest bit of the first or last byte of what the first or last record of `key` holds."""
    _, path, position, content = [record for record in records(folder) if record[0] == key][-1 if last else 0]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [member for member in archive.infolist() if "/data/" in member.filename]
        values = archive.read(max(members, key=lambda member: member.file_size))
    place = content.index(values) + (len(values) - 1 if last else 0)
    with path.open("r+b") as stream:
        stream.seek(position + place)
        stream.write(bytes([content[place] ^ 1]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run_ranks(SOURCE.world_size, train_and_save, Settings(SOURCE), str(folder))
    return folder


def damaged(trained: Path, folder: Path, key: str) -> str:
    """A copy of the run folder in which one record has changed."""
    shutil.copytree(trained, folder)
    flip_bit(folder / f"step_{STEPS:08d}", key)
    return str(folder)


def refusals(settings: Settings, folders: list[str], weights_only: bool) -> list[str]:
    """On a rank: what each of these run folders is refused for."""
    messages = []
    for folder in folders:
        run = Run(settings, folder)
        with pytest.raises(CheckpointError) as caught:
            if weights_only:
                load_weights(folder, run.chunks, run.groups, IDENTITY)
            else:
                run.load()
        messages.append(str(caught.value))
    return messages


def test_what_is_resumed_is_checked(trained: Path, tmp_path: Path) -> None:
    """Weights, moments, main parameters and random states, on every rank, in the same layout and another."""
    keys = {key for key, *_ in records(trained / f"step_{STEPS:08d}")}
    weight = "language_model.layers.0.self_attn.o_proj.weight"
    moments = [f"optimizer.state.{kind}.{weight}" for kind in ("exp_avg", "exp_avg_sq")]
    random_state = min(key for key in keys if key.startswith("random_state"))
    wanted = [weight, *moments, random_state]
    assert keys.issuperset(wanted)
    folders = [damaged(trained, tmp_path / str(number), key) for number, key in enumerate(wanted)]
    for layout, count in ((SOURCE, 4), (TestLayout(2, tensor=2), 3)):
        for found in run_ranks(layout.world_size, refusals, Settings(layout), folders[:count], False):
            assert all(CHANGED in line and key in line for line, key in zip(found, wanted, strict=False)), found
    (found,) = run_ranks(1, refusals, Settings(TestLayout(1)), folders[:1], True)
    assert CHANGED in found[0] and weight in found[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gemma3_files.multimodal(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture
def imported(model: Path, tmp_path: Path) -> Path:
    import_checkpoint(model, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_import_writes_the_checksums_of_the_zip_format(imported: Path) -> None:
    """Python's own reader of zip files finds that all members have theirs."""
    contents = [content for *_, content in records(imported)]
    assert len(contents) > 60
    for content in contents:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            assert archive.testzip() is None


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("key", [NORM, "language_model.embed_tokens.weight"])
def test_export_and_verify_check_what_they_read(
    model: Path, imported: Path, tmp_path: Path, key: str, last: bool
) -> None:
    """The last rows of the embedding are padding, which an export does not write."""
    flip_bit(imported, key, last)
    with pytest.raises(CheckpointError, match=f"{key}.*{CHANGED}"):
        export_checkpoint(imported, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match=f"{key}.*{CHANGED}"):
        verify_checkpoint(model, imported)


def test_verify_checks_the_state_of_the_optimizer(model: Path, imported: Path, tmp_path: Path) -> None:
    key = "optimizer.state.exp_avg.language_model.norm.weight"
    with TorchDistReader(imported) as reader:
        state = {name: reader.read_rows(name, 0, shape[0] if shape else 1) for name, shape in reader.shapes.items()}
    checkpoint = tmp_path / "step_00000001"
    torch.distributed.checkpoint.save(state | {key: torch.randn(32)}, checkpoint_id=checkpoint, no_dist=True)
    shutil.copyfile(imported / "metadata.json", checkpoint / "metadata.json")
    Manifest.read(imported).write(checkpoint)
    assert verify_checkpoint(model, checkpoint).differences == ()
    flip_bit(checkpoint, key)
    with pytest.raises(CheckpointError, match=f"{key}.*{CHANGED}"):
        verify_checkpoint(model, checkpoint)


@pytest.mark.parametrize("name", ["megatron_vlm.json", ".metadata"])
def test_small_files_are_checked(imported: Path, name: str) -> None:
    content = (imported / name).read_bytes()
    # In the manifest the step becomes another number; in the metadata a name another name.
    old, new = (b'"step": 0', b'"step": 1') if name == "megatron_vlm.json" else (b"norm.weight", b"nnrm.weight")
    assert old in content
    (imported / name).write_bytes(content.replace(old, new, 1))
    with pytest.raises(CheckpointError, match=f"{CHANGED}.*{name}"):
        Manifest.read(find_checkpoint(imported))


def test_the_description_in_a_record_is_checked(model: Path, imported: Path, tmp_path: Path) -> None:
    """Another stride, for example, would give other values without an error."""
    key = "language_model.layers.1.mlp.down_proj.weight"
    _, path, position, content = next(record for record in records(imported) if record[0] == key)
    with TorchDistReader(imported) as reader:
        num_rows, num_columns = reader.shapes[key]
    strides = bytes([ord("K"), num_columns, ord("K"), 1])  # as pickle writes them
    with path.open("r+b") as stream:
        stream.seek(position + content.index(strides))
        stream.write(strides[:3] + b"\x00")
    with pytest.raises(CheckpointError, match=f"{key}.*CRC"):
        export_checkpoint(imported, model, tmp_path / "out")
    state = {key: torch.empty(num_rows, num_columns, dtype=torch.bfloat16)}
    with pytest.raises(torch.distributed.checkpoint.CheckpointException, match="CRC"):
        torch.distributed.checkpoint.load(state, storage_reader=CheckedFileReader(imported), no_dist=True)


@pytest.fixture
def large(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A checkpoint of one tensor of 2000 rows in four records."""
    values = torch.randn(2000, 512)
    writer = TorchDistWriter(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_dist, "RECORD_BYTES", 2**20)
        writer.add("x", tuple(values.shape), values.dtype)
        for rows in values.split(300):
            writer.write("x", rows)
        writer.close({})
    return tmp_path, values


@pytest.mark.parametrize("order", [[0, 300, 700, 2000], [700, 2000, 300, 0], [0, 300, 0, 2000]])
def test_rows_are_checked_in_any_order(large: tuple[Path, torch.Tensor], order: list[int]) -> None:
    """Whichever rows are read first; of records that are read in part, the rest is read at the end."""
    folder, values = large

    def read_all() -> None:
        with TorchDistReader(folder) as reader:
            for begin, end in itertools.pairwise(order):
                first, last = sorted((begin, end))
                assert reader.read_rows("x", first, last).equal(values[first:last])
            reader.check_rest()

    read_all()
    flip_bit(folder, "x")
    with pytest.raises((CheckpointError, AssertionError)):
        read_all()
    with TorchDistReader(folder) as reader, pytest.raises(CheckpointError, match=CHANGED):
        reader.read_rows("x", 100, 200)
        reader.check_rest()


def test_nothing_is_read_for_the_checksum_alone(
    large: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, values = large
    read = [0]
    preadv = os.preadv

    def counted(descriptor: int, buffers: Any, offset: int) -> int:
        count = preadv(descriptor, buffers, offset)
        read[0] += count
        return count

    monkeypatch.setattr(os, "preadv", counted)
    state = {"x": torch.empty_like(values)}
    torch.distributed.checkpoint.load(state, storage_reader=CheckedFileReader(folder), no_dist=True)
    assert state["x"].equal(values)
    assert values.nbytes < read[0] < 1.01 * values.nbytes
    read[0] = 0
    with TorchDistReader(folder) as reader:
        assert reader.read_rows("x", 0, 2000).equal(values)
        reader.check_rest()
    assert values.nbytes < read[0] < 1.01 * values.nbytes


def test_a_call_that_reads_less_than_was_asked_for(
    large: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux reads at most 2 GiB at once, which larger records exceed."""
    folder, values = large
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, views, at: preadv(descriptor, [views[0][:100_000]], at))
    state = {"x": torch.empty_like(values)}
    torch.distributed.checkpoint.load(state, storage_reader=CheckedFileReader(folder), no_dist=True)
    assert state["x"].equal(values)
    with TorchDistReader(folder) as reader:
        assert reader.read_rows("x", 0, 2000).equal(values)
        reader.check_all()


def test_imports_of_earlier_versions_have_no_checksums(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their zip files have 0 in its place, and their manifest none."""
    monkeypatch.setattr(torch_dist, "_locate_crcs", lambda record: ())
    import_checkpoint(model, tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "megatron_vlm.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in manifest.items() if "crc32" not in key}))
    with zipfile.ZipFile(io.BytesIO(next(records(path.parent))[3])) as archive:
        assert archive.testzip() is not None
    assert verify_checkpoint(model, path.parent).differences == ()
    export_checkpoint(path.parent, model, tmp_path / "out")
    with TorchDistReader(path.parent) as reader:
        shape = reader.shapes[NORM]
    state = {NORM: torch.empty(shape, dtype=torch.bfloat16)}
    torch.distributed.checkpoint.load(state, storage_reader=CheckedFileReader(path.parent), no_dist=True)


def test_a_manifest_is_compared_as_it_is_read(tmp_path: Path) -> None:
    """JSON makes strings of keys, which sort otherwise than numbers."""
    identity = ModelIdentity("gemma3", "gemma3", False, True)
    Manifest(identity, extra={"passes": dict.fromkeys(range(12), 1)}).write(tmp_path)
    assert Manifest.read(tmp_path).extra["passes"]["11"] == 1
