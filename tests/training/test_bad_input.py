"""The entry point, training: every bad input that a start or a resumption can meet gives one line and exit code 2.

tests/test_dry_run.py, test_config.py and test_preflight.py have those that are found without training.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vlm.cli import load_config
from megatron_vlm.errors import CheckpointError
from megatron_vlm.planning.preflight import check_export
from megatron_vlm.training.start import changes_since
from tests.data.rows import assistant, image, row, user, write_jsonl
from tests.ranks import run_ranks
from tests.training.loop_run import (
    Place,
    build_place,
    checkpoint_names,
    read_lines,
    refused,
    start_torchrun,
    train_here,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return build_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def stopped(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after two steps of four; tests work on copies."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    # Not in this process: pool workers forked later would share what megatron-core keeps of a save.
    (outcome,) = run_ranks(1, train_here, place.arguments(run_dir, "train.exit_interval=2"))
    assert outcome.error is None
    return run_dir


@pytest.fixture
def run_dir(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


@pytest.fixture
def refusal(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Starts a run that must end with exit code 2 and gives its one line on stderr."""

    def start(*overrides: str, run_dir: Path | None = None) -> str:
        return refused(place.arguments(run_dir or tmp_path / "new", *overrides), capsys)

    return start


Refusal = Callable[..., str]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["parallel.tensor_model_parallel_size=2"], "LaunchError: 1 ranks are not a multiple of 2 = tensor 2"),
        (["parallel.tensor_model_parallel_size=3"], "attention heads 4 cannot be divided"),
        (["parallel.pipeline_model_parallel_size=5"], "4 decoder layers do not fill 5 pipeline chunks"),
        (["checkpoint.load=/nowhere"], "CheckpointError: no such folder [/nowhere]"),
        (["model.hf_path=/nowhere"], "/nowhere"),
        (["data.valid=[{path: /nowhere.jsonl}]"], "DataError: data file /nowhere.jsonl does not exist"),
        (["data.seq_length=5"], "data.seq_length 5 is too short for one image"),
        (["model.freeze=[audio_tower]"], "audio_tower, which the model does not have"),
        (["logging.wandb=project"], "logging.wandb needs the package wandb"),
        (["model.attention_backend=flex"], "model.attention_backend flex is for GPUs, and this run has none"),
        (
            ["model.attention_backend=transformer_engine", "train.precision=bf16"],
            "model.attention_backend transformer_engine is for GPUs, and this run has none",
        ),
        (["optimizer.adam_backend=apex"], "optimizer.adam_backend is apex, but its fused Adam cannot be used on a CPU"),
    ],
)
def test_settings(refusal: Refusal, overrides: list[str], expected: str) -> None:
    assert expected in refusal(*overrides)


def test_checkpoint_load_of_a_model_directory(refusal: Refusal, place: Place) -> None:
    assert "an HF directory, not a checkpoint" in refusal(f"checkpoint.load={place.model}")


def _without(pattern: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for path in folder.glob(pattern):
            path.unlink()

    return change


def _cut(name: str, remaining: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, remaining)


def _edit(name: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        content.pop("crc32", None)
        (folder / name).write_text(json.dumps(content | values))

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_without("config.json"), "no config.json"),
        (_cut("config.json", 40), "config.json cannot be read"),
        (_edit("config.json", model_type="llama", architectures=["LlamaForCausalLM"]), "llama"),
        (_without("*processor*"), "no processor can be loaded"),
        (_cut("tokenizer.json", 40), "no processor can be loaded"),
        (_without("chat_template*"), "no chat template"),
        (_without("model.safetensors"), "neither model.safetensors nor model.safetensors.index.json"),
        (_cut("model.safetensors", 100_000), "model.safetensors] -- download or save this file again"),
        (_cut("model.safetensors", 3), "not a safetensors file, or cut short"),
    ],
)
def test_model_directory(
    refusal: Refusal, place: Place, tmp_path: Path, change: Callable[[Path], None], expected: str
) -> None:
    broken = Path(shutil.copytree(place.model, tmp_path / "model"))
    change(broken)
    line = refusal(f"model.hf_path={broken}")
    assert expected in line and str(broken) in line


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_edit("megatron_vlm.json", family="another", model_type="another_one"), "checkpoint of family another"),
        (_edit("megatron_vlm.json", format_version=99), "format version 99"),
        (_edit("megatron_vlm.json", step=7), "step is unusable"),
        (_edit("megatron_vlm.json", data=None), "data is unusable"),
        (_edit("megatron_vlm.json", extra={}), "extra is unusable (KeyError: 'guard')"),
        (_edit("megatron_vlm.json", scheduler=None), "scheduler is unusable"),
        (
            _edit("megatron_vlm.json", scheduler={"num_steps": 1}),
            "scheduler is unusable (AssertionError: it is after step 1",
        ),
        (_edit("megatron_vlm.json", optimizer={}), "optimizer is unusable"),
        (_cut("megatron_vlm.json", 40), "damaged: Unterminated string"),
        (_without("megatron_vlm.json"), "no checkpoint is complete"),
        (_without("__0_0.distcp"), "__0_0.distcp"),
        (_cut("__0_0.distcp", 2000), "__0_0.distcp is cut short"),
        (_without(".metadata"), ".metadata"),
        (_cut(".metadata", 40), "cannot read its metadata"),
        (_without("metadata.json"), "metadata.json is missing"),
    ],
)
def test_damaged_checkpoint_at_resumption(
    refusal: Refusal, run_dir: Path, change: Callable[[Path], None], expected: str
) -> None:
    """Nothing is deleted or trained; the message names the checkpoint."""
    change(run_dir / "checkpoints" / "step_00000002")
    line = refusal(run_dir=run_dir)
    assert line.startswith("CheckpointError: ") and expected in line and "step_00000002" in line
    assert checkpoint_names(run_dir) == ["step_00000002"]
    assert len(read_lines(run_dir / "metrics.jsonl")) == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.precision=bf16", "saved with precision fp32, this run uses bf16"),
        ("optimizer.lr=1e-4", "optimizer settings differ: max_lr 0.003 there, 0.0001 here"),
        ("data.shuffle=true", "data.shuffle was False, now True"),
        ("train.train_iters=1", "train.train_iters is 1, but this run has done 2 steps"),
    ],
)
def test_settings_that_a_resumption_cannot_change(
    refusal: Refusal, run_dir: Path, override: str, expected: str
) -> None:
    assert expected in refusal(override, run_dir=run_dir)


def test_run_folder_of_another_model(refusal: Refusal, place: Place, run_dir: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(place.model, tmp_path / "other"))
    text = json.loads((other / "config.json").read_text())["text_config"]
    _edit("config.json", text_config=text | {"intermediate_size": 128})(other)
    line = refusal(f"model.hf_path={other}", run_dir=run_dir)
    assert "does not fit the model: language_model.layers.0.mlp.down_proj.weight is [32, 64]" in line
    rows = f"data.train=[{{path: {place.data}/text.jsonl}}]"
    line = refusal("model.text_only=true", rows, run_dir=run_dir)
    assert "saved with model.text_only False, this run uses True" in line


def test_run_folder_of_other_data(refusal: Refusal, place: Place, run_dir: Path) -> None:
    line = refusal(f"data.train=[{{path: {place.data}/text.jsonl}}]", run_dir=run_dir)
    assert "text.jsonl had 8 rows, now 4" in line


def _train_and_listen(arguments: list[str]) -> str:
    """On a pool rank: what a start that succeeds prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        outcome = train_here(arguments)
    assert outcome.error is None, outcome.error
    return printed.getvalue()


def test_changed_schedule_is_told_and_followed(place: Place, run_dir: Path) -> None:
    """What a resumption may change takes effect, and the console says so."""
    overrides = ["train.train_iters=6", "optimizer.schedule=linear", "optimizer.betas=[0.9, 0.5]"]
    (out,) = run_ranks(1, _train_and_listen, place.arguments(run_dir, *overrides))
    assert "resuming after step 2 of 6" in out
    (line,) = (line for line in out.splitlines() if line.startswith("settings changed since the last start: "))
    for change in ("train.train_iters 4 -> 6", 'schedule "constant" -> "linear"', "betas [0.9, 0.95] -> [0.9, 0.5]"):
        assert change in line
    rates = [record["lr"] for record in read_lines(run_dir / "metrics.jsonl")]
    assert rates == pytest.approx([3e-3, 3e-3, *(3e-3 * steps_left / 7 for steps_left in (4, 3, 2, 1))])
    manifest = json.loads((run_dir / "checkpoints" / "step_00000006" / "megatron_vlm.json").read_text())
    assert all(group["betas"] == [0.9, 0.5] for group in manifest["optimizer"]["groups"])


def test_files_in_the_way(refusal: Refusal, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "metrics.jsonl").mkdir(parents=True)
    assert f"[{run_dir}/metrics.jsonl]" in refusal(run_dir=run_dir)
    (run_dir / "metrics.jsonl").rmdir()
    (run_dir / "checkpoints").write_text("a file")
    assert f"[{run_dir}/checkpoints" in refusal(run_dir=run_dir)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(run_dir=tmp_path / "file")


def test_damaged_configuration_of_the_last_start(refusal: Refusal, run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text("run_dir: [")
    line = refusal(run_dir=run_dir)
    assert line.startswith("CheckpointError: damaged: ") and f"[{run_dir}/config.yaml" in line
    assert (run_dir / "config.yaml").read_text() == "run_dir: [" and checkpoint_names(run_dir) == ["step_00000002"]


@pytest.mark.parametrize("content", ["", "[1]", "a: &a [*a]", "a: !!set {b}", "a: 1\na: 2", "[" * 5000])
def test_settings_of_the_last_start_that_cannot_be_read(place: Place, tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(CheckpointError, match=r"damaged: .*/config\.yaml(:\d+)?\] -- remove the file"):
        changes_since(tmp_path / "config.yaml", load_config(place.arguments(tmp_path)))


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000])
def test_damaged_record_of_the_export(place: Place, tmp_path: Path, content: str) -> None:
    (tmp_path / "exported.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"damaged: .*/exported\.json\] -- remove it"):
        check_export(load_config(place.arguments(tmp_path, f"checkpoint.export_hf={tmp_path}/out")))


def test_row_found_by_a_worker_process(place: Place, tmp_path: Path) -> None:
    """A line break in the image's name does not break the message's line."""
    good = (place.data / "train.jsonl").read_text().splitlines()[:5]
    write_jsonl(place.data / "bad.jsonl", [*good, row(user(image("not\nthere.png"), "?"), assistant("!"))])
    settings = [f"data.train=[{{path: {place.data}/bad.jsonl}}]", "data.strict=true", "data.num_workers=2"]
    # Not in this process either, for the fork server that it starts.
    (outcome,) = run_ranks(1, train_here, place.arguments(tmp_path, *settings))
    line = outcome.error
    assert line and line.startswith("DataError: image ") and "there.png does not exist" in line
    assert "bad.jsonl:6" in line and "\n" not in line
    assert [record["step"] for record in outcome.metrics] == [1]


def test_wrong_world_size_under_torchrun(place: Place, tmp_path: Path) -> None:
    """Two ranks for a tensor-parallel size of four: the line occurs once, and nothing of ours is a traceback."""
    log = tmp_path / "log"
    with start_torchrun(place.arguments(tmp_path / "run", "parallel.tensor_model_parallel_size=4"), log) as process:
        assert process.wait(120) == 1
    text = log.read_text()
    lines = [line for line in text.splitlines() if "ranks are not a multiple" in line]
    assert lines == [
        "LaunchError: 2 ranks are not a multiple of 4 = tensor 4 x pipeline 1 x context 1 -- "
        "start 4 ranks (torchrun --nproc-per-node), or change the parallel sizes"
    ]
    assert 'pretrain_vlm.py", line' not in text and "megatron_vlm" not in text
    assert not (tmp_path / "run").exists()
