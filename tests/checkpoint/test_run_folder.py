"""Names, manifest and finding of checkpoints, without ranks."""

from __future__ import annotations

import json
import os

import pytest
import torch

from megatron_vlm.checkpoint import run_folder
from megatron_vlm.checkpoint.run_folder import Manifest, ModelIdentity, find_checkpoint
from megatron_vlm.checkpoint.torch_dist import TorchDistWriter
from megatron_vlm.errors import CheckpointError

GOOD = {"format_version": 1, "family": "gemma3", "model_type": "x", "text_only": True, "tied": True, "hf_config": {}}
IDENTITY = ModelIdentity("gemma3", "gemma3_text", text_only=True, tied=True, hf_config={"hidden_size": 8})


def complete(directory, step):
    incomplete = run_folder.incomplete_folder(directory, step, run_folder.begin(directory, step))
    writer = TorchDistWriter(incomplete)
    writer.add("weight", (2, 3), torch.float32)
    writer.write("weight", torch.ones(2, 3))
    writer.close({})
    Manifest(IDENTITY, step=step).write(incomplete)
    run_folder.publish(incomplete, run_folder.step_folder(directory, step))


def test_newest_complete_checkpoint_is_found(tmp_path):
    directory = tmp_path / "checkpoints"
    for step in (100, 99, 20):
        complete(directory, step)
    run_folder.begin(directory, 200)
    (directory / "step_300").mkdir()  # not a name we write
    assert run_folder.published_steps(directory) == [20, 99, 100]
    newest = directory / "step_00000100"
    assert find_checkpoint(tmp_path) == find_checkpoint(directory) == find_checkpoint(newest) == newest
    assert Manifest.read(newest) == Manifest(IDENTITY, step=100)


def test_retire_and_clean_delete_only_what_they_should(tmp_path):
    for step in (1, 2, 3):
        complete(tmp_path, step)
    run_folder.begin(tmp_path, 4)
    (tmp_path / "step_00000002.mine").mkdir()
    run_folder.retire(tmp_path, None)
    assert run_folder.published_steps(tmp_path) == [1, 2, 3]
    run_folder.retire(tmp_path, 2)
    assert run_folder.published_steps(tmp_path) == [2, 3]
    assert len(run_folder.clean(tmp_path)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000002.mine", "step_00000003"]


def test_publish_never_overwrites(tmp_path):
    complete(tmp_path, 1)
    with pytest.raises(CheckpointError, match="exists"):
        complete(tmp_path, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "damaged: Expecting property name"),
        ("", "damaged: Expecting value"),
        ("[" * 100_000, "damaged: maximum recursion depth"),
        ("\xffx", "damaged: 'utf-8' codec can't decode"),
        ("[]", "format version None"),
        (json.dumps({"format_version": 99}), "format version 99"),
        (json.dumps({"format_version": 1, "family": "gemma3"}), "damaged: 'model_type' is missing"),
        (json.dumps(GOOD | {"hf_config": []}), r"damaged: 'hf_config' is '\[\]'"),
        (json.dumps(GOOD | {"step": "x"}), "damaged: 'step' is 'x'"),
        (json.dumps(GOOD | {"layout": None}), "damaged: 'layout' is 'None'"),
        (json.dumps(GOOD | {"data": [1]}), r"damaged: 'data' is '\[1\]'"),
        (json.dumps(GOOD | {"passthrough": "a"}), "damaged: 'passthrough' is 'a'"),
    ],
)
def test_bad_manifest_is_one_clear_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "megatron_vlm.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=message) as caught:
        Manifest.read(tmp_path)
    assert f"[{tmp_path}/megatron_vlm.json] -- " in str(caught.value) and "\n" not in str(caught.value)


def test_folders_without_a_checkpoint_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        find_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="HF directory"):
        find_checkpoint(tmp_path)


def _replace_by(make):
    def change(path):
        path.unlink()
        make(path)

    return change


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("megatron_vlm.json", lambda path: path.unlink(), "megatron_vlm.json is missing"),
        ("metadata.json", lambda path: path.unlink(), "metadata.json is missing"),
        (".metadata", lambda path: path.unlink(), ".metadata is missing"),
        ("__0_0.distcp", lambda path: path.unlink(), "__0_0.distcp is missing"),
        ("__0_0.distcp", lambda path: os.truncate(path, 100), "__0_0.distcp is cut short"),
        ("__0_0.distcp", _replace_by(os.mkfifo), "__0_0.distcp is cut short"),
    ],
)
def test_an_incomplete_checkpoint_is_passed_over_and_set_aside(tmp_path, capsys, name, change, reason):
    """As a copy leaves it that was interrupted; a single one is refused, because the run would begin anew."""
    directory = tmp_path / "checkpoints"
    for step in (1, 2):
        complete(directory, step)
    assert run_folder.newest_complete(directory) == (2, []) and run_folder.set_aside(directory) == []
    change(directory / "step_00000002" / name)
    (directory / "step_00000003").mkdir()
    text = f"step_00000002 is incomplete ({reason})"
    assert run_folder.newest_complete(directory) == (
        1,
        ["step_00000003 is incomplete (megatron_vlm.json is missing)", text],
    )
    assert find_checkpoint(tmp_path) == directory / "step_00000001"
    assert f"checkpoint {text}; step_00000001 is taken instead" in capsys.readouterr().out
    third, second = run_folder.set_aside(directory)
    assert f"checkpoint {text}; it is now step_00000002.damaged." in second and "step 1 is resumed from" in third
    kept = sorted(path.name.rpartition(".")[0] or path.name for path in directory.iterdir())
    assert kept == ["step_00000001", "step_00000002.damaged", "step_00000003.damaged"]
    assert run_folder.clean(directory) == [] and run_folder.newest_complete(directory) == (1, [])
    (directory / "step_00000001" / "megatron_vlm.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is complete: step_00000001 is incomplete"):
        run_folder.newest_complete(directory)
    with pytest.raises(CheckpointError, match="no checkpoint is complete"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("metadata.json", b"", "cannot be read"),
        ("metadata.json", b"null", "cannot be read"),
        ("metadata.json", b"[" * 100_000, "cannot be read"),
        ("metadata.json", b'{"sharded_backend": "zarr", "sharded_backend_version": 1}', "format 'zarr', version 1"),
        (".metadata", b"", "cannot read its metadata"),
        (".metadata", b"[" * 100_000, "cannot read its metadata"),
        (".metadata", b"\x80\x04N.", "cannot read its metadata"),
    ],
)
def test_a_damaged_small_file_is_named(tmp_path, name, content, expected):
    """Also where there is an earlier checkpoint: a damaged file may have a reason that somebody should look at."""
    for step in (1, 2):
        complete(tmp_path, step)
    (tmp_path / "step_00000002" / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        run_folder.newest_complete(tmp_path)
    line = str(caught.value)
    assert expected in line and f"[{tmp_path}/step_00000002/{name}] -- " in line and "\n" not in line


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path), lambda path: path.mkdir()])
@pytest.mark.parametrize("name", ["metadata.json", ".metadata", "megatron_vlm.json"])
def test_pipes_devices_and_folders_are_not_read(tmp_path, name, make):
    complete(tmp_path, 1)
    path = tmp_path / "step_00000001" / name
    _replace_by(make)(path)
    with pytest.raises(CheckpointError, match=r"(directory|pipe or device), not a file"):
        Manifest.read(find_checkpoint(tmp_path))


def test_what_is_in_the_way(tmp_path):
    """Files where folders should be, and the reverse, are found before a run is built."""
    run_folder.check_in_the_way(tmp_path)
    for name in ("checkpoints", "tensorboard", "profile"):
        (tmp_path / name).write_text("")
        with pytest.raises(CheckpointError, match=f"no folder.*{name}. -- move it away"):
            run_folder.check_in_the_way(tmp_path)
        (tmp_path / name).unlink()
    for name in ("config.yaml", "metrics.jsonl", "exported.json"):
        os.symlink(name, tmp_path / name)
        with pytest.raises(CheckpointError, match=f"no regular file.*{name}. -- move it away"):
            run_folder.check_in_the_way(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000004").write_text("")
    with pytest.raises(CheckpointError, match="a file stands where a checkpoint belongs"):
        run_folder.published_steps(tmp_path / "checkpoints")
