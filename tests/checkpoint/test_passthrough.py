"""Tensors that are only carried through come back bit for bit, from imports and from runs, or somebody says so."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_vlm.checkpoint import run_folder
from megatron_vlm.checkpoint.manager import CheckpointManager
from megatron_vlm.checkpoint.run_folder import Manifest
from megatron_vlm.conversion import passthrough
from megatron_vlm.conversion.convert import export_checkpoint, identity_of, import_checkpoint, verify_checkpoint
from megatron_vlm.conversion.running_model import export_hf_from_model, load_hf_into_model
from megatron_vlm.errors import CheckpointError
from megatron_vlm.families import registry
from megatron_vlm.files import safetensors_headers
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.parallel.layout import Layout
from tests.checkpoint import toy_family
from tests.checkpoint.hf_files import Tensors, content, files, load_tensors, rewrite, without_weights
from tests.checkpoint.toy_family import FAMILY, Stage
from tests.ranks import run_ranks
from tools import convert as convert_tool

CARRIED = {"mtp.fc.weight", "mtp.layers.0.num_batches", "mtp.layers.0.is_used", "model.rotary_emb.inv_freq"}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with toy_family.registered():
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_family.write(tmp_path_factory.mktemp("source") / "hf", toy_family.hf_tensors())


@pytest.fixture
def imported(source: Path, tmp_path: Path) -> Path:
    import_checkpoint(source, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def check_carried(directory: Path, expected: Tensors) -> None:
    actual = load_tensors(directory)
    for name in CARRIED:
        assert actual[name].dtype == expected[name].dtype and actual[name].equal(expected[name]), name


def other_values(tensors: Tensors) -> Tensors:
    return tensors | {"mtp.fc.weight": tensors["mtp.fc.weight"] + 1}


def without_carried(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name not in CARRIED}


def fewer_and_others(tensors: Tensors) -> Tensors:
    return without_carried(tensors) | {"mtp.norm.weight": torch.ones(3)}


@pytest.mark.parametrize("change", [other_values, without_carried, fewer_and_others])
def test_the_checkpoint_counts_where_the_reference_has_others(
    source: Path, imported: Path, tmp_path: Path, change: Callable[[Tensors], Tensors]
) -> None:
    reference = rewrite(source, tmp_path / "reference", change)
    assert set(export_checkpoint(imported, reference, tmp_path / "out")) == CARRIED
    expected, actual = load_tensors(source), load_tensors(tmp_path / "out")
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and actual[name].equal(tensor), name


def test_a_checkpoint_without_them_takes_those_of_the_reference(source: Path, tmp_path: Path) -> None:
    """As one that was imported before its family declared them."""
    import_checkpoint(rewrite(source, tmp_path / "bare", without_carried), tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint" / run_folder.PASSTHROUGH_NAME).exists()
    assert set(export_checkpoint(tmp_path / "checkpoint", source, tmp_path / "out")) == CARRIED
    assert files(tmp_path / "out") == files(source)


def test_those_that_are_gone_are_missed(source: Path, imported: Path, tmp_path: Path) -> None:
    """Deleted by hand: an export without them would say nothing. A reference with weights stands in for them."""
    assert set(Manifest.read(imported).passthrough or ()) == CARRIED
    shutil.rmtree(imported / run_folder.PASSTHROUGH_NAME)
    bare = without_weights(source, tmp_path / "bare")
    with pytest.raises(CheckpointError, match=r"4 tensors that are only carried through are gone: mtp.*passthrough\]"):
        export_checkpoint(imported, bare, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert set(export_checkpoint(imported, source, tmp_path / "out")) == CARRIED
    with pytest.raises(CheckpointError, match="are gone"):
        passthrough.check_kept(sorted(CARRIED), imported, bare)
    passthrough.check_kept(sorted(CARRIED), imported, source)
    passthrough.check_kept((), imported, bare)


def test_one_that_has_changed_is_refused(source: Path, imported: Path, tmp_path: Path) -> None:
    """By an export, and by a run that goes on, which would find out at its end otherwise."""
    folder = imported / run_folder.PASSTHROUGH_NAME
    bare = without_weights(source, tmp_path / "bare")
    (path,) = folder.glob("*.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="its checksum differs"):
        export_checkpoint(imported, bare, tmp_path / "out")
    with pytest.raises(CheckpointError, match="its checksum differs"):
        passthrough.check_kept(sorted(CARRIED), imported, bare)
    path.write_bytes(content)
    passthrough.check_kept(sorted(CARRIED), imported, bare)
    for damaged in ("", "[]", "{}"):
        (folder / passthrough.CHECKSUMS_NAME).write_text(damaged)
        with pytest.raises(CheckpointError):
            passthrough.check_kept(sorted(CARRIED), imported, bare)


def test_a_manifest_that_does_not_name_them(source: Path, imported: Path, tmp_path: Path) -> None:
    """As earlier versions wrote it; they are exported all the same."""
    path = imported / run_folder.MANIFEST_NAME
    content = json.loads(path.read_text())
    for name in ("passthrough", "crc32", "metadata_crc32"):
        del content[name]
    path.write_text(json.dumps(content))
    assert Manifest.read(imported).passthrough is None
    assert set(export_checkpoint(imported, without_weights(source, tmp_path / "bare"), tmp_path / "out")) == CARRIED


def test_several_files(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_headers.WeightFiles.plan.__func__, "__defaults__", (100,))
    import_checkpoint(source, tmp_path / "checkpoint")
    assert len(list((tmp_path / "checkpoint" / run_folder.PASSTHROUGH_NAME).glob("*.safetensors"))) > 1
    export_checkpoint(tmp_path / "checkpoint", source, tmp_path / "out")
    assert files(tmp_path / "out") == files(source)


def test_what_is_not_declared_is_refused(source: Path, tmp_path: Path) -> None:
    unknown = rewrite(source, tmp_path / "hf", lambda tensors: tensors | {"draft.mtp.fc.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"1 unexpected \(draft\.mtp\.fc\.weight\)"):
        import_checkpoint(unknown, tmp_path / "checkpoint")


def test_verify_names_what_is_missing_or_different(source: Path, imported: Path, tmp_path: Path) -> None:
    result = verify_checkpoint(rewrite(source, tmp_path / "others", fewer_and_others), imported)
    assert [(difference.hf_name, difference.reason) for difference in result.differences] == [
        ("mtp.norm.weight", "not in the checkpoint")
    ]

    def another_shape(tensors: Tensors) -> Tensors:
        return tensors | {"mtp.fc.weight": tensors["mtp.fc.weight"].float()}

    result = verify_checkpoint(rewrite(source, tmp_path / "shape", another_shape), imported)
    assert [difference.reason for difference in result.differences] == [
        "torch.bfloat16 [8, 16] instead of torch.float32 [8, 16]"
    ]
    import_checkpoint(rewrite(source, tmp_path / "bare", without_carried), tmp_path / "without")
    result = verify_checkpoint(source, tmp_path / "without")
    assert {difference.hf_name for difference in result.differences} == CARRIED


def test_the_command_line_says_what_was_not_trained(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, checkpoint, out = str(source), str(tmp_path / "checkpoint"), str(tmp_path / "out")
    line = "4 tensors are carried through as they are, untrained: "
    assert convert_tool.main(["import", "--hf", hf, "--out", checkpoint]) == 0
    assert line in capsys.readouterr().out
    assert convert_tool.main(["export", "--ckpt", checkpoint, "--hf", hf, "--out", out]) == 0
    assert line in capsys.readouterr().out


def save_twice_and_export(source: Path, reference: Path, folder: Path) -> tuple[str, ...]:
    """On a rank: a run whose weights come from `source`; two checkpoints, of which one is kept, and an export."""
    layout = Layout(pipeline_size=2)
    groups = build_groups(layout)
    initialize_megatron(0, groups)
    stage = Stage(toy_family.ours(load_tensors(source)), groups)
    with toy_family.registered():
        config = FAMILY.config_from_hf(registry.load_hf_config(source), True)
        load_hf_into_model([stage], source, FAMILY, config, groups)
        checkpoints = folder / "checkpoints"
        if groups.pp.rank() == 0:
            passthrough.begin_run(checkpoints, None, source, FAMILY.weight_map(config))
        torch.distributed.barrier()
        identity = identity_of(source, FAMILY.name, config)
        manager = CheckpointManager(
            checkpoints, groups, identity, layout.sizes(), "fp32", keep_last=1, async_save=False
        )
        manager.passthrough = sorted(CARRIED)
        for step in (1, 2):
            manager.save(step, [stage], None, None, data_state={}, config_yaml="")
        return export_hf_from_model([stage], reference, folder / "out", FAMILY, config, groups, checkpoints)


@pytest.mark.parametrize("has_weights", [True, False], ids=["the files are there", "the files are gone"])
def test_a_run_keeps_them_in_every_checkpoint(source: Path, tmp_path: Path, has_weights: bool) -> None:
    expected = load_tensors(source)
    reference = source if has_weights else without_weights(source, tmp_path / "bare")
    for names in run_ranks(2, save_twice_and_export, source, reference, tmp_path / "run"):
        assert set(names) == CARRIED
    if has_weights:
        assert content(tmp_path / "run" / "out") == content(source)
    check_carried(tmp_path / "run" / "out", expected)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["passthrough", "step_00000002"]
    check_carried(checkpoints / "step_00000002" / "passthrough", expected)
    assert set(Manifest.read(checkpoints / "step_00000002").passthrough or ()) == CARRIED
    kept, shared = (
        folder / "passthrough" / "model.safetensors" for folder in (checkpoints, checkpoints / "step_00000002")
    )
    assert os.path.samefile(kept, shared), "a copy for every checkpoint"
    export_checkpoint(tmp_path / "run", reference, tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / "run" / "out")


def test_a_file_system_without_links(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    run_folder.share_passthrough(tmp_path, tmp_path)  # nothing to share
    with toy_family.registered():
        config = FAMILY.config_from_hf(registry.load_hf_config(source), True)
        assert set(passthrough.begin_run(tmp_path, None, source, FAMILY.weight_map(config))) == CARRIED
    (tmp_path / "step").mkdir()
    run_folder.share_passthrough(tmp_path, tmp_path / "step")
    check_carried(tmp_path / "step" / "passthrough", load_tensors(source))
