"""Reading and writing Hugging Face directories, against the safetensors library and transformers."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_vlm.checkpoint import hf
from megatron_vlm.checkpoint.hf import SafetensorsReader, SafetensorsWriter
from megatron_vlm.errors import CheckpointError
from megatron_vlm.files import durable
from megatron_vlm.files.safetensors_headers import TORCH_DTYPES, WeightFiles, row_blocks
from tests.checkpoint import gemma3_files
from tests.checkpoint.hf_files import load_tensors, randomise, save


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint, written by transformers."""
    return gemma3_files.multimodal(tmp_path_factory.mktemp("hf") / "sharded")


@pytest.fixture
def copied(sharded: Path, tmp_path: Path) -> Path:
    """A copy of the sharded checkpoint, to be damaged."""
    return Path(shutil.copytree(sharded, tmp_path / "copied"))


def write(directory: Path, files: WeightFiles, tensors: dict[str, torch.Tensor]) -> None:
    directory.mkdir()
    writer = SafetensorsWriter(directory, files)
    for stored in files:
        for first_row, end_row in row_blocks(stored.shape, stored.dtype, block_bytes=64):
            tensor = tensors[stored.name]
            writer.write(stored.name, first_row, tensor[first_row:end_row] if stored.shape else tensor)
    writer.close()


def test_every_dtype_and_shape_reads_as_the_library_reads(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
        "no_columns": torch.empty(3, 0),
    }
    for code, dtype in TORCH_DTYPES.items():
        data = torch.randint(0, 2, (6, 4, dtype.itemsize), dtype=torch.uint8, generator=generator)
        tensors[code] = data.view(dtype).squeeze(-1)
    save_file(tensors, tmp_path / "model.safetensors")
    with SafetensorsReader(tmp_path) as reader:
        assert set(reader.tensors) == set(tensors)
        for name, expected in tensors.items():
            actual = reader.read(name)
            assert actual.dtype == expected.dtype and actual.shape == expected.shape
            assert actual.reshape(-1).view(torch.uint8).equal(expected.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("block_bytes", [40, 200, 2**20])
def test_parts_cut_along_several_dimensions_and_in_another_shape(
    sharded: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(hf, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(hf, "row_blocks", lambda shape, dtype: row_blocks(shape, dtype, block_bytes))
    expected = load_tensors(sharded)
    with SafetensorsReader(sharded) as reader:
        for name, tensor in expected.items():
            rows = tensor.shape[0]
            divided = tensor.view(2, rows // 2, *tensor.shape[1:]) if rows % 2 == 0 else tensor
            for whole in (tensor, divided):
                part = [(size // 3, size // 3 * 2 + 1) for size in whole.shape]
                own = whole[tuple(slice(*bounds) for bounds in part)]
                target = torch.empty_like(own, memory_format=torch.contiguous_format)
                reader.read_part(name, target, whole.shape, part)
                assert target.equal(own), name


def test_written_files_are_byte_for_byte_those_of_transformers(sharded: Path, tmp_path: Path) -> None:
    with SafetensorsReader(sharded) as reader:
        write(tmp_path / "again", reader.files, load_tensors(sharded))
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (sharded / path.name).read_bytes(), path.name
    assert len(list((tmp_path / "again").iterdir())) >= 3


def test_planned_files_are_those_of_transformers(tmp_path: Path) -> None:
    """Same shards, same layout inside, same index: only the size limit is given."""
    model = randomise(gemma3_files.Gemma3ForCausalLM(gemma3_files.Gemma3TextConfig(**gemma3_files.TEXT)))
    save(model, tmp_path / "theirs", max_shard_size="60KB")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    plan = WeightFiles.plan(((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()), 60_000)
    write(tmp_path / "ours", plan, tensors)
    weight_files = sorted(path.name for path in (tmp_path / "theirs").glob("model*"))
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == weight_files and len(weight_files) >= 3
    for name in weight_files:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


def test_a_small_plan_is_one_file_and_the_library_reads_it(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(2.0)}
    plan = WeightFiles.plan((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())
    write(tmp_path / "one", plan, tensors)
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["model.safetensors"]
    loaded = load_file(tmp_path / "one" / "model.safetensors")
    assert all(loaded[name].equal(tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("present", [None, {"source": "here"}, {"format": "tf"}])
def test_what_is_written_says_that_it_is_for_torch(tmp_path: Path, present: dict[str, str] | None) -> None:
    """Loaders of earlier years refuse files that do not; other metadata stay, and so do the tensors."""
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.arange(4).to(torch.int8)}
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata=present)
    with SafetensorsReader(tmp_path / "source") as reader:
        write(tmp_path / "out", reader.files.with_format(), tensors)
        assert (reader.files.with_format() == reader.files) is False
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as written:
        assert written.metadata() == (present or {}) | {"format": "pt"}
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert loaded.keys() == tensors.keys() and all(loaded[name].equal(tensor) for name, tensor in tensors.items())


def test_a_wrong_total_in_an_index_is_corrected(copied: Path, tmp_path: Path) -> None:
    path = copied / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["metadata"]["total_size"] += 1
    path.write_text(json.dumps(index))
    with SafetensorsReader(copied) as reader:
        assert reader.files.index is not None
        written = json.loads(reader.files.index)
    assert written["metadata"]["total_size"] == index["metadata"]["total_size"] - 1
    assert written["weight_map"] == index["weight_map"]


def test_a_hub_cache_of_links_is_read(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    for path in sharded.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    with SafetensorsReader(tmp_path / "snapshot") as reader:
        assert set(reader.tensors) == set(load_tensors(sharded))


def truncate(path: Path, num_bytes: int) -> None:
    with open(path, "r+b") as stream:
        stream.truncate(num_bytes)


def shard(directory: Path, number: int = 1) -> Path:
    return sorted(directory.glob("model-*.safetensors"))[number - 1]


def overwrite_header(directory: Path, change: Callable[[dict], object]) -> None:
    """Change the header of the first shard; same length, so that only the change itself is wrong."""
    path = shard(directory)
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    change(header)
    encoded = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(struct.pack("<Q", size) + encoded.ljust(size)[:size] + content[8 + size :])


def move_first_tensor(header: dict) -> None:
    first = next(entry for entry in header.values() if entry.get("data_offsets", [1])[0] == 0)
    first["data_offsets"] = [offset + 2 for offset in first["data_offsets"]]


def claim_more_rows(header: dict) -> None:
    first = next(entry for entry in header.values() if entry.get("data_offsets", [1])[0] == 0)
    first["shape"][0] += 1


def first_shape(*shape: object) -> Callable[[dict], None]:
    def change(header: dict) -> None:
        next(entry for name, entry in header.items() if name != "__metadata__")["shape"] = list(shape)

    return change


def small_file(directory: Path, shape: list[int]) -> None:
    """A file without data, which tensors of no elements have."""
    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    shard(directory).write_bytes(struct.pack("<Q", len(header)) + header)


def metadata(value: object) -> Callable[[dict], None]:
    return lambda header: header.update(__metadata__=value)


def replaced_by(
    make: Callable[[Path], object], name: str = "model-00001-of-00002.safetensors"
) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).unlink()
        make(directory / name)

    return change


def repeat_a_key(directory: Path) -> None:
    data = shard(directory).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length].rstrip()
    first = json.loads(header)
    name, entry = next((name, entry) for name, entry in first.items() if name != "__metadata__")
    header = header[:-1] + f",{json.dumps(name)}:{json.dumps(entry)}}}".encode()
    shard(directory).write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def index_entry(file: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"][min(index["weight_map"])] = file
        path.write_text(json.dumps(index))

    return change


def only_a_pickle(directory: Path) -> None:
    for path in directory.glob("model*"):
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"pickle")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "one byte short": (lambda d: truncate(shard(d, 2), shard(d, 2).stat().st_size - 1), "truncated.*model-00002"),
    "cut in the header": (lambda d: truncate(shard(d), 100), "truncated inside its header.*model-00001"),
    "empty file": (lambda d: truncate(shard(d), 0), "not a safetensors file, or cut short.*model-00001"),
    "one byte long": (lambda d: shard(d).open("ab").write(b"x"), "too long.*model-00001"),
    "missing shard": (lambda d: shard(d, 2).unlink(), "missing.*model-00002"),
    "garbage": (lambda d: shard(d).write_bytes(b"\x40" + bytes(7) + b"{" * 200), "corrupt.*model-00001"),
    "overlapping offsets": (lambda d: overwrite_header(d, move_first_tensor), "corrupt.*belong to no tensor"),
    "shape beyond offsets": (lambda d: overwrite_header(d, claim_more_rows), "corrupt.*do not fit"),
    "shape of text": (lambda d: overwrite_header(d, first_shape("4", 2)), "corrupt.*do not fit"),
    "shape of fractions": (lambda d: overwrite_header(d, first_shape(4.0, 2)), "corrupt.*do not fit"),
    "shape of booleans": (lambda d: overwrite_header(d, first_shape(True, 2)), "corrupt.*do not fit"),
    "negative shape": (lambda d: overwrite_header(d, first_shape(-4, -2)), "corrupt.*do not fit"),
    "shape that overflows": (lambda d: small_file(d, [2**62, 2**62]), "corrupt.*do not fit"),
    "empty and too large": (lambda d: small_file(d, [0, 2**70]), "corrupt.*do not fit"),
    "metadata of numbers": (lambda d: overwrite_header(d, metadata({"format": 1})), "corrupt.*__metadata__"),
    "metadata of text": (lambda d: overwrite_header(d, metadata("pt")), "corrupt.*__metadata__"),
    "a key twice": (repeat_a_key, "corrupt.*a key stands twice"),
    "a pipe": (replaced_by(os.mkfifo), "a weight file is a pipe.*model-00001"),
    "a device": (replaced_by(lambda path: path.symlink_to("/dev/zero")), "a weight file is a pipe, a device"),
    "index is a pipe": (
        replaced_by(os.mkfifo, "model.safetensors.index.json"),
        "cannot read the index: this is a pipe or device",
    ),
    "index points up": (index_entry("../model-00001-of-00002.safetensors"), "not a plain safetensors file name"),
    "index is absolute": (index_entry("/etc/passwd"), "not a plain safetensors file name"),
    "index names a pickle": (index_entry("pytorch_model.bin"), "not a plain safetensors file name"),
    "index disagrees": (index_entry("model-00002-of-00002.safetensors"), "index and shards disagree on 2 tensors"),
    "index is not JSON": (lambda d: (d / "model.safetensors.index.json").write_text("{"), "not JSON"),
    "no weights": (lambda d: [path.unlink() for path in d.glob("model*")], "neither model.safetensors nor"),
    "pickles only": (only_a_pickle, "pickles.*only safetensors are read"),
    "no directory": (shutil.rmtree, "no such directory"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused_by_name(copied: Path, damage: str) -> None:
    action, message = DAMAGES[damage]
    action(copied)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsReader(copied)
    assert re.search(message, str(caught.value)), caught.value
    assert caught.value.fix and "\n" not in str(caught.value)


def test_exports_that_were_killed_are_removed(tmp_path: Path) -> None:
    """Not those that somebody may still write: of this process, changed lately, or of another machine."""
    old, here = time.time() - 2 * durable.ABANDONED_SECONDS, socket.gethostname()
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = {
        f".export.partial-{here}-{ended.pid}": old,
        f".export.partial-{here}-{os.getppid()}": old,
        f".export.partial-another-{ended.pid}": old,
        f".another.partial-{here}-{ended.pid}": old,
    }
    for name, changed in names.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"part")
        for path in (tmp_path / name / "model.safetensors", tmp_path / name):
            os.utime(path, (changed, changed))
    abandoned, *others = names
    (tmp_path / abandoned / "model.safetensors").touch()
    with durable.staged_directory(tmp_path / "export"):
        assert (tmp_path / abandoned).exists(), "changed lately"
    os.utime(tmp_path / abandoned / "model.safetensors", (old, old))
    os.utime(tmp_path / abandoned, (old, old))
    (tmp_path / "export").rmdir()
    with durable.staged_directory(tmp_path / "export"):
        assert not (tmp_path / abandoned).exists()
    assert all((tmp_path / name).exists() for name in others)


def test_companions_are_copied_and_weights_are_not(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    names = ["config.json", "tokenizer.model", "chat_template.jinja", "preprocessor_config.json", "vocab.json"]
    for name in [*names, "model.safetensors", "pytorch_model.bin", "notes.txt", "optimizer.pt", "model.gguf"]:
        (tmp_path / "source" / name).write_text(name)
    (tmp_path / "source" / "additional_chat_templates").mkdir()
    (tmp_path / "source" / "additional_chat_templates" / "tool.jinja").write_text("tool")
    (tmp_path / "target").mkdir()
    copied = hf.copy_assets(tmp_path / "source", tmp_path / "target", skip=["*preprocessor_config.json"])
    assert sorted(copied) == sorted(
        ["config.json", "tokenizer.model", "chat_template.jinja", "vocab.json", "additional_chat_templates/tool.jinja"]
    )
    assert all((tmp_path / "target" / name).read_text() == (tmp_path / "source" / name).read_text() for name in copied)


class TestStagedDirectory:
    def test_appears_only_when_complete(self, tmp_path: Path) -> None:
        target = tmp_path / "new" / "parents" / "target"
        with durable.staged_directory(target) as directory:
            (directory / "file").write_text("x")
            assert not target.exists()
        assert [path.name for path in target.iterdir()] == ["file"]
        assert [path.name for path in target.parent.iterdir()] == ["target"]

    def test_leaves_nothing_after_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError), durable.staged_directory(tmp_path / "target") as directory:
            (directory / "file").write_text("x")
            raise RuntimeError
        assert not list(tmp_path.iterdir())

    def test_an_empty_directory_is_fine_and_a_filled_one_is_not(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with durable.staged_directory(tmp_path / "empty") as directory:
            (directory / "file").write_text("x")
        with pytest.raises(CheckpointError, match="not empty"), durable.staged_directory(tmp_path / "empty"):
            raise AssertionError("must not begin")
        assert (tmp_path / "empty" / "file").read_text() == "x"

    def test_a_file_in_the_way_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(CheckpointError, match="not a directory"):
            durable.check_export_target(tmp_path / "file")
        with (
            pytest.raises(CheckpointError, match="writing failed"),
            durable.staged_directory(tmp_path / "file" / "below"),
        ):
            raise AssertionError("must not begin")

    def test_a_full_disk_is_a_clear_error(self, tmp_path: Path) -> None:
        with (
            pytest.raises(CheckpointError, match="No space left"),
            durable.staged_directory(tmp_path / "target"),
            open("/dev/full", "wb", buffering=0) as full,
        ):
            full.write(b"x")
        assert not list(tmp_path.iterdir())
