"""Names, manifest and finding of checkpoints, without ranks."""

from __future__ import annotations

import json

import pytest

from megatron_vlm.checkpoint import run_folder
from megatron_vlm.checkpoint.run_folder import Manifest, ModelIdentity, find_checkpoint
from megatron_vlm.errors import CheckpointError

IDENTITY = ModelIdentity("gemma3", "gemma3_text", text_only=True, tied=True, hf_config={"hidden_size": 8})


def complete(directory, step):
    incomplete = run_folder.begin(directory, step)
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
        (None, "no megatron_vlm.json"),
        ("{", "cannot be read"),
        ("[]", "format version None"),
        (json.dumps({"format_version": 99}), "format version 99"),
        (json.dumps({"format_version": 1, "family": "gemma3"}), "'model_type' is missing"),
    ],
)
def test_bad_manifest_is_one_clear_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "megatron_vlm.json").write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Manifest.read(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_folders_without_a_checkpoint_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        find_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="HF directory"):
        find_checkpoint(tmp_path)
