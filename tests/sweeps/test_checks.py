"""What is checked of all points before anything is written, and what `make` writes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.checkpoint.run_owner import OWNER_NAME, describe_process
from megatron_vlm.cli import config_from, load_config
from megatron_vlm.config import to_yaml
from megatron_vlm.errors import ConfigError, UserError
from megatron_vlm.files.config_files import load_yaml, read_config_file
from megatron_vlm.sweeps.checks import check_sweep_file, index_ranges
from megatron_vlm.sweeps.manifest import begin_attempt, read_sweep
from megatron_vlm.sweeps.points import digest_of, nested, value_text
from tests.sweeps.sweep_files import Files, leave_run
from tools import sweep as tool

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def refusal(files: Files, **content: Any) -> list[str]:
    """The lines with which a sweep is refused."""
    with pytest.raises(UserError) as caught:
        check_sweep_file(files.write(**content))
    return str(caught.value).splitlines()


@pytest.mark.parametrize("recipe", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_configurations_are_those_of_the_command_line(recipe: str) -> None:
    """`config_from` against jsonargparse, which reads a run's own command line."""
    file = read_config_file(str(CONFIGS / recipe))
    overrides = {
        "optimizer.betas": [0.9, 0.99],
        "optimizer.lr": "2e-4",
        "optimizer.weight_decay": 0,
        "optimizer.lr_multipliers.vision_tower": 1,
        "train.eval_interval": None,
        "data.train": ["~/a.jsonl", "b.jsonl"],
        "logging.profile": [2, 3],
        "model.freeze": ["vision_tower"],
    }
    arguments = [f"--{key}={value_text(value)}" for key, value in overrides.items()]
    expected = load_config(["--config", file.path, *arguments])
    found = config_from(nested(overrides, file.content), file.where)
    assert found == expected and to_yaml(found) == to_yaml(expected)


def test_every_key_that_is_missing() -> None:
    with pytest.raises(ConfigError) as caught:
        config_from({"run_dir": "x", "model": {}}, lambda key: "file.yaml")
    missing = ["model.hf_path", "data.train", "data.seq_length", "train.train_iters", "train.global_batch_size"]
    assert [problem.what for problem in caught.value.problems] == [f"required key {key} is missing" for key in missing]


def test_what_make_writes(files: Files) -> None:
    sweep = files.make(resources={"processes_per_node": 2}, set={"train.log_interval": 2})
    lines = [*map(json.loads, (sweep.folder / "manifest.jsonl").read_text().splitlines())]
    assert [line["index"] for line in lines] == [0, 1, 2]
    for line in lines:
        config = load_config(["--config", str(sweep.folder / f"points/{line['index']:04}.yaml")])
        assert config.optimizer.lr == line["overrides"]["optimizer.lr"]
        assert config.run_dir == line["run_dir"] == str(sweep.folder / "runs" / line["name"])
        assert digest_of(config) == line["digest"]
    assert len({line["digest"] for line in lines}) == 3
    assert read_sweep(sweep.folder) == sweep


def test_all_invalid_points_are_listed(files: Files, place: Any) -> None:
    """A problem of several points is one line that names them; each key has its place."""
    data = str(place.data / "train.jsonl")
    points = [
        {"optimizer.lr": 1e-3},
        {"optimizer.lr": -1.0},
        {"optimizer.lr": "fast"},
        {"train.global_batch_size": 3, "train.micro_batch_size": 2},
    ]
    lines = refusal(files, grid={"train.seed": [1, 2]}, points=points)
    assert lines[0] == "4 problems:"
    assert lines[1].startswith("  (1) points 2-3 (lr=-1.0,seed=1, ...): optimizer.lr is -1.0 -- ")
    assert lines[2].startswith("  (2) points 2-3 (lr=-1.0,seed=1, ...): optimizer.min_lr 0.0 is above optimizer.lr")
    fast = "optimizer.lr cannot be 'fast' [sweep.yaml:7] -- expected a number"
    assert lines[3] == f"  (3) points 4-5 (lr=fast,seed=1, ...): {fast}"
    assert lines[4].startswith("  (4) points 6-7 (seed=1,global_batch_size=3,micro_batch_size=2, ...): train.global_ba")
    lines = refusal(files, grid={"data.train": [data, "nowhere/*.jsonl"], "model.hf_path": [str(place.model), "no"]})
    assert any(line.startswith("  (") and "nowhere/*.jsonl" in line for line in lines)
    assert any(f"no config.json [{files.folder}/no]" in line for line in lines)


def test_files_that_points_name_are_there(files: Files, place: Any) -> None:
    """A plain path is looked up as a pattern is, and so is the checkpoint that points begin with."""
    (line,) = refusal(files, set={"data.train": "nope/train.jsonl"})
    path = files.folder / "nope/train.jsonl"
    assert line.startswith(f"points 0-2 (lr=0.001, ...): data file {path} does not exist")
    lines = refusal(files, set={"data.valid": [str(place.data), str(place.data / "no.jsonl")]})
    assert f"data file {place.data} is a directory" in lines[1] and "no.jsonl does not exist" in lines[2]
    (line,) = refusal(files, grid={"checkpoint.load": [None, "nope"]})
    assert line.startswith(f"point 1 (load=nope): no such folder [{files.folder}/nope]")


def test_an_exclusion_of_nothing_is_mentioned(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.write(exclude=["optimizer.lr > 2e-3", "train.seed == 7"])
    for command in ("check", "make"):
        assert tool.main([command, "sweep.yaml"]) == 0
        assert capsys.readouterr().err == "warning: exclude 'train.seed == 7' leaves no point out\n"


def test_a_base_that_is_not_there(files: Files) -> None:
    (line,) = refusal(files, base="elsewhere.yaml")
    what = "base elsewhere.yaml does not exist [sweep.yaml:1]"
    assert line == f"{what} -- paths are relative to where the command is started"
    with pytest.raises(ConfigError, match="the sweep file does not exist"):
        check_sweep_file("no.yaml")


def test_layouts_are_checked_with_the_ranks_of_a_point(files: Files) -> None:
    grid = {"parallel.tensor_model_parallel_size": [1, 2, 4]}
    (line,) = refusal(files, grid=grid, resources={"nodes": 1, "processes_per_node": 2})
    assert line.startswith("point 2 (tensor_model_parallel_size=4): 2 ranks are not a multiple of 4 = tensor 4 x")


def test_points_that_meet_in_a_folder(files: Files) -> None:
    (line,) = refusal(files, point_name="same", grid={"optimizer.lr": [1e-3, 2e-3]})
    assert "points 0-1 (same, ...): the same run folder" in line and "put {optimizer.lr} into point_name" in line
    (line,) = refusal(files, grid=None, points=[{"train.seed": 5}, {"train.seed": 6}, {"train.seed": 5}])
    assert "points 0,2 (seed=5, ...): the same run folder" in line and "they are the same: remove all but one" in line
    line = refusal(files, grid={"data.train": ["\u00e4.jsonl", "\u00f6.jsonl"]}, point_name="{data.train}")[1]
    assert "the same run folder" in line and line.endswith("-- set a point_name in which they differ")
    (line,) = refusal(files, set={"checkpoint.export_hf": "out_hf"})
    assert "points 0-2 (lr=0.001, ...): the same checkpoint.export_hf" in line and "derived: {" in line


def test_a_run_folder_of_another_configuration(files: Files) -> None:
    sweep = files.make()
    leave_run(sweep, sweep.points[1], 2)
    check_sweep_file(files.write())
    (line,) = refusal(files, set={"train.seed": 9, "data.seq_length": 80})
    assert line == (
        "point 1 (lr=0.002): its run folder belongs to another configuration: data.seq_length 96 -> 80, "
        f"train.seed 1234 -> 9 [{sweep.points[1].run_dir}] -- move that folder away, or give another folder or "
        "point_name"
    )
    path = sweep.points[1].run_dir / "config.yaml"
    content = load_yaml(path.read_text())
    del content["optimizer"]["eps"]  # a key with a default that an older version did not have
    path.write_text(json.dumps(content))
    check_sweep_file(files.write())


def test_a_sweep_that_has_not_begun_is_made_anew(files: Files) -> None:
    files.make()
    sweep = files.make(grid={"train.seed": [1]})
    assert [point.name for point in read_sweep(sweep.folder).points] == ["seed=1"]
    assert [path.name for path in (sweep.folder / "points").iterdir()] == ["0000.yaml"]


def test_a_folder_of_something_else_is_left_alone(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    folder = files.folder / "out"
    mine = {folder / "sweep.yaml": "mine", folder / "points/mine.yaml": "mine too"}
    (folder / "points").mkdir(parents=True)
    for path, text in mine.items():
        path.write_text(text)
    files.write()
    for command in ("check", "make", "run", "submit"):
        assert tool.main([command, "sweep.yaml"]) == 2
        assert "the sweep's folder is not empty, and holds no sweep" in capsys.readouterr().err
    assert {path: path.read_text() for path in folder.rglob("*.yaml")} == mine


def test_a_folder_of_another_sweep_is_left_alone(files: Files) -> None:
    """Also before it has begun, when its own file may change all of it; a note among its points stays."""
    sweep = files.make()
    before = {path: path.read_bytes() for path in sweep.folder.rglob("*.*") if path.is_file()}
    other = files.write("other.yaml", grid={"train.seed": [1]})
    with pytest.raises(UserError, match=f"the folder holds the sweep of {files.folder}/sweep.yaml"):
        check_sweep_file(other)
    assert {path: path.read_bytes() for path in before} == before
    (sweep.folder / "points/mine.yaml").touch()
    files.make(grid={"train.seed": [1]})
    assert {path.name for path in (sweep.folder / "points").iterdir()} == {"0000.yaml", "mine.yaml"}


@pytest.mark.parametrize("lines", [0, 2])
def test_a_manifest_that_was_cut(files: Files, lines: int) -> None:
    path = files.make().folder / "manifest.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))
    with pytest.raises(UserError, match=f"the manifest is damaged: it has {lines} of"):
        read_sweep(path.parent)


def test_a_sweep_that_has_begun_only_grows(files: Files) -> None:
    sweep = files.make()
    begin_attempt(sweep, sweep.points[0], {"id": "1"})
    before = (sweep.folder / "points/0001.yaml").read_bytes()
    sweep = files.make(grid={"optimizer.lr": [5e-4, 1e-3, 2e-3, 3e-3]})
    assert {point.name: point.index for point in sweep.points} == {
        "lr=0.001": 0,
        "lr=0.002": 1,
        "lr=0.003": 2,
        "lr=0.0005": 3,
    }
    assert (sweep.folder / "points/0001.yaml").read_bytes() == before
    lines = refusal(files, grid={"optimizer.lr": [1e-3, 2e-3, 5e-4]})
    assert lines[0].startswith("point 2 (lr=0.003): no longer in the sweep file, which has begun")
    lines = refusal(files, grid={"optimizer.lr": [5e-4, 1e-3, 2e-3, 3e-3]}, set={"train.seed": 3})
    assert lines[0].startswith("points 0-3 (lr=0.001, ...): not the same as when it was made")


def test_paths_of_points_do_not_depend_on_where_they_start(files: Files, place: Any) -> None:
    relative = os.path.relpath(place.data / "train.jsonl")
    (point,) = files.make(grid={"data.train": [relative]}, set={"checkpoint.export_hf": "hf"}).points
    config = load_config(["--config", f"out/points/{point.index:04}.yaml"])
    assert config.data.train[0].path == str(place.data / "train.jsonl")
    assert config.checkpoint.export_hf == str(files.folder / "hf") and Path(config.run_dir).is_absolute()


def test_a_point_that_was_edited_is_not_trained(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = files.make()
    path = sweep.config_path(sweep.points[1])
    path.write_text(path.read_text().replace("seed: 1234", "seed: 4321"))
    begin_attempt(sweep, sweep.points[0], {"id": "1"})
    for arguments in (["run", "out"], ["retry", "out"], ["run", "sweep.yaml"], ["retry", "sweep.yaml"]):
        assert tool.main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith(
            "ConfigError: point 1 (lr=0.002): the configuration of point 1 (lr=0.002) is not the one"
        )
    assert tool.main(["state", "out", "1"]) == 2 and tool.main(["state", "out", "0"]) == 0
    assert tool.main(["state", "out", "3"]) == 2


def test_a_point_that_trains_is_not_in_the_way(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    """While it exports, its target is not empty."""
    sweep = files.make(derived={"checkpoint.export_hf": "run_dir + '/export'"})
    run_dir = leave_run(sweep, sweep.points[0], 4)
    (run_dir / "export").mkdir()
    (run_dir / "export/config.json").touch()
    derived = {"checkpoint.export_hf": "run_dir + '/export'"}
    assert "point 0 (lr=0.001): the target directory is not empty" in refusal(files, derived=derived)[0]
    (run_dir / OWNER_NAME).write_text(json.dumps(describe_process()))
    check_sweep_file(files.write(derived=derived))


def test_nothing_is_written_where_a_point_is_invalid(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.write(grid={"optimizer.lr": [1e-3, -1.0]})
    for command in ("check", "make", "run", "submit"):
        assert tool.main([command, "sweep.yaml"]) == 2
    assert "point 1 (lr=-1.0): optimizer.lr is -1.0" in capsys.readouterr().err
    assert not (files.folder / "out").exists()
    for command in ("status", "report", "retry"):
        assert tool.main([command, "out"]) == 2


def test_a_thousand_points_are_checked_in_seconds(files: Files) -> None:
    """Measured 5 s on a quiet core, of which half are layouts and folders; the command line takes 0.1 s for each."""
    grid = {"optimizer.lr": [number * 1e-5 for number in range(1, 101)], "train.seed": [*range(10)]}
    path = files.write(grid=grid)
    begin = time.process_time()
    assert len(check_sweep_file(path).sweep.points) == 1000
    assert time.process_time() - begin < 60


def test_index_ranges() -> None:
    assert index_ranges([7, 0, 3, 4, 5]) == "0,3-5,7"
