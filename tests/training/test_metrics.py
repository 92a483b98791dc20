"""Step figures, and the files that loggers leave."""

from __future__ import annotations

import gzip
import io
import json
import math
import resource
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_vlm import platform
from megatron_vlm.config import Config, DataSettings, DataSource, LoggingSettings, ModelSettings, TrainSettings
from megatron_vlm.errors import CheckpointError, ConfigError
from megatron_vlm.report import run_report
from megatron_vlm.report.run_record import read_run
from megatron_vlm.report.run_report import write_report
from megatron_vlm.training import metrics as metrics_module
from megatron_vlm.training.loggers import Console, JsonLines, TensorBoard, WandB, build_loggers
from megatron_vlm.training.metrics import ExpertStatistics, Pace, StepMetrics, expert_statistics, over_steps, to_record
from megatron_vlm.training.profiling import ProfileWindow

METRICS = StepMetrics(
    step=7,
    train_iters=20,
    loss=2.5,
    grad_norm=1.25,
    lr=3e-4,
    lr_by_part={"language_model": 3e-4, "vision_tower": 3e-5},
    tokens=800,
    label_tokens=200,
    padded_tokens=200,
    images=6,
    videos=1,
    audio_clips=2,
    bad_rows=0,
    too_long_rows=0,
    step_seconds=2.0,
    data_wait_seconds=0.5,
    source_losses={"a.jsonl": 2.0, "b.jsonl": 3.0},
    source_label_tokens={"a.jsonl": 100, "b.jsonl": 100},
    peak_memory_bytes=3 * 2**30,
    model_flops=8e12,
    world_size=4,
    skipped=False,
    seconds_left=26.0,
)


def _config(run_dir: Path, **logging: Any) -> Config:
    return Config(
        run_dir=str(run_dir),
        model=ModelSettings(hf_path="model"),
        data=DataSettings(train=[DataSource("train.jsonl")], seq_length=64),
        train=TrainSettings(train_iters=20, global_batch_size=4),
        logging=LoggingSettings(**logging),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _steps(run_dir: Path) -> list[int]:
    return [line["step"] for line in _lines(run_dir / "metrics.jsonl")]


def test_derived_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform.Platform, "peak_flops", lambda self: 1e13)
    assert METRICS.tokens_per_second == 400
    assert METRICS.flops_per_second == 1e12
    assert METRICS.mfu == 0.1
    assert METRICS.padding_share == 0.2
    assert METRICS.label_token_share == 0.25
    assert METRICS.data_wait_share == 0.25
    monkeypatch.setattr(platform.Platform, "peak_flops", lambda self: None)
    assert METRICS.mfu is None


def test_record_has_the_promised_keys_and_is_json() -> None:
    record = to_record(replace(METRICS, loss=math.nan, grad_norm=math.inf, source_losses={"a.jsonl": math.nan}))
    assert {"step", "loss", "grad_norm", "lr", "tokens", "label_tokens", "step_seconds"} <= record.keys()
    assert record["loss"] is None and record["grad_norm"] is None and record["source_losses"] == {"a.jsonl": None}
    json.dumps(record, allow_nan=False)  # strict JSON, unlike Python's default


def test_expert_statistics_take_the_worst_layer() -> None:
    tokens = torch.tensor([[4, 0, 8, 0], [1, 3, 4, 4]], dtype=torch.float64)
    statistics = expert_statistics(tokens)
    assert statistics == ExpertStatistics(
        expert_tokens_min=0, expert_tokens_mean=3.0, expert_tokens_max=8, dead_experts=2
    )
    assert statistics.expert_imbalance == 8 / 3
    assert expert_statistics(tokens[1:]).dead_experts == 0
    assert expert_statistics(torch.zeros(2, 4)).expert_imbalance == 1


def test_figures_of_packed_rows(tmp_path: Path) -> None:
    """How many samples, how much padding, and how even the data ranks are; without packing there is nothing to say."""
    packed = replace(
        METRICS,
        step_samples=37,
        batch_rows=8,
        straggler_ratio_predicted=1.034,
        straggler_ratio_predicted_in_order=1.21,
    )
    plain = replace(METRICS, step_samples=8, batch_rows=8)
    stream = io.StringIO()
    for metrics in (packed, plain, replace(packed, straggler_ratio_predicted=None)):
        Console(stream).on_step(metrics)
    first, second, third = stream.getvalue().replace("\n    ", "  ").splitlines()
    assert "  37 samples in 8 rows  padding 20.0%  straggler 1.03x (in order 1.21x)" in first
    assert "samples" not in second and "padding" not in second and "straggler" not in second
    assert "  37 samples in 8 rows  padding 20.0%" in third and "straggler" not in third
    record = to_record(packed)
    assert (record["step_samples"], record["batch_rows"]) == (37, 8)
    assert (record["straggler_ratio_predicted"], record["straggler_ratio_predicted_in_order"]) == (1.034, 1.21)
    assert not any("straggler" in name for name in to_record(plain))
    several = over_steps([packed, replace(packed, step_samples=3, straggler_ratio_predicted=1.066)])
    assert (several.step_samples, several.batch_rows) == (40, 16)
    assert several.straggler_ratio_predicted == pytest.approx(1.05)
    assert over_steps([plain, plain]).straggler_ratio_predicted is None


def test_figures_of_experts_are_there_only_for_models_with_experts() -> None:
    experts = ExpertStatistics(1, 8.0, 20, 3)
    record = to_record(replace(METRICS, experts=experts, load_balancing_loss=2.125))
    assert record["expert_tokens_min"] == 1 and record["expert_tokens_mean"] == 8 and record["expert_tokens_max"] == 20
    assert record["dead_experts"] == 3 and record["expert_imbalance"] == 2.5 and record["load_balancing_loss"] == 2.125
    assert "experts" not in record
    assert not any("expert" in name or "balancing" in name for name in to_record(METRICS))
    stream = io.StringIO()
    Console(stream).on_step(replace(METRICS, experts=experts, load_balancing_loss=2.125))
    Console(stream).on_step(replace(METRICS, experts=replace(experts, dead_experts=0)))
    both, no_loss = stream.getvalue().replace("\n    ", "  ").splitlines()
    assert both.endswith("  load-balancing 2.1250  expert tokens 1/8/20 (3 dead)")
    assert no_loss.endswith("  expert tokens 1/8/20") and "load-balancing" not in no_loss


def test_report_has_a_row_of_charts_for_experts(tmp_path: Path) -> None:
    def charts(**figures: Any) -> int:
        logger = JsonLines(tmp_path, resume_step=0)
        for step in (1, 2, 3):
            logger.on_step(replace(METRICS, step=step, **figures))
        logger.close()
        return write_report(tmp_path).read_text().count("<svg")

    dense = charts()
    # The loss, eight figures (the peak of this device is not known) and two data sources.
    assert dense == 11
    assert charts(experts=ExpertStatistics(1, 8.0, 20, 3), load_balancing_loss=2.0) == dense + 3


def test_the_report_reads_keys_that_are_written() -> None:
    experts = ExpertStatistics(1, 8.0, 20, 3)
    ratios = {"straggler_ratio_predicted": 1.0, "straggler_ratio_predicted_in_order": 1.0}
    record = to_record(replace(METRICS, experts=experts, load_balancing_loss=2.0, **ratios))
    read = [key for key, _, _ in (run_report._STEP_CHARTS | run_report._EXPERT_CHARTS).values()]
    assert {*read, *run_report._COUNTED_ROWS} <= record.keys()


def test_console_shows_each_figure_and_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform.Platform, "peak_flops", lambda self: 1e13)
    stream = io.StringIO()
    console = Console(stream)
    console.on_step(METRICS)
    console.on_step(replace(METRICS, step=8, loss=math.nan, skipped=True, bad_rows=2, too_long_rows=1))
    console.on_evaluation(8, {"all": 1.5, "a.jsonl": 1.5})
    console.on_evaluation(8, {"all": 1.5, "a.jsonl": 1.0, "b.jsonl": 2.0})
    calm, troubled, single, evaluation = stream.getvalue().replace("\n    ", "  ").splitlines()
    assert calm == ("step  7/20  loss 2.5000  norm 1.25  lr 3.0e-4  400 tok/s  MFU 10%  3 GiB  eta 0:26  wait 25%")
    assert troubled.endswith("  UPDATE SKIPPED  BAD ROWS 2  too long rows 1") and "loss nan" in troubled
    assert single == "evaluation after step 8 | loss 1.5000"
    assert evaluation == "evaluation after step 8 | loss 1.5000 | a.jsonl 1.0000 | b.jsonl 2.0000"


def test_console_fits_100_columns() -> None:
    large = replace(
        METRICS,
        step=10_000,
        train_iters=99_999,
        grad_norm=12.3456,
        tokens=12_345_678,
        peak_memory_bytes=138 * 2**30,
        model_flops=4.8e15,
        data_wait_seconds=0.0,
        seconds_left=99 * 3600 + 1800.0,
    )
    stream = io.StringIO()
    Console(stream).on_step(large)
    line = stream.getvalue().rstrip("\n")
    assert "  6.17M tok/s  138 GiB  eta 99:30:00" in line and len(line) <= 100, len(line)
    stream.truncate(0)
    Console(stream).on_step(replace(large, data_wait_seconds=0.5, model_flops=1234.0, bad_rows=3))
    lines = stream.getvalue().strip("\0\n").split("\n")
    assert max(map(len, lines)) <= 100 and lines[1].startswith("    ")
    assert "".join(lines).count("wait ") == 1 and lines[-1].endswith("BAD ROWS 3")


def test_figures_of_several_steps() -> None:
    first = replace(METRICS, step=6, bad_rows=1, skipped=True, source_losses={"a.jsonl": 5.0})
    second = replace(
        METRICS,
        loss=1.0,
        grad_norm=3.25,
        tokens=400,
        label_tokens=600,
        step_seconds=4.0,
        source_losses={"a.jsonl": 1.0, "b.jsonl": 1.0},
        source_label_tokens={"a.jsonl": 300, "b.jsonl": 300},
        peak_memory_bytes=2**30,
    )
    first = replace(first, source_label_tokens={"a.jsonl": 200, "b.jsonl": 0})
    both = over_steps([first, second])
    assert over_steps([first]) is first
    assert (both.step, both.steps, both.tokens, both.label_tokens, both.bad_rows) == (7, 2, 1200, 800, 1)
    assert both.loss == (2.5 * 200 + 1.0 * 600) / 800 and both.grad_norm == 2.25
    assert (both.step_seconds, both.tokens_per_second, both.skipped) == (3.0, 200.0, True)
    assert both.source_losses == {"a.jsonl": (5.0 * 200 + 300) / 500, "b.jsonl": 1.0}
    assert both.peak_memory_bytes == 3 * 2**30


def test_pace_counts_what_lies_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 2.0, 13.0])  # an evaluation of ten seconds before the third step
    monkeypatch.setattr(metrics_module, "monotonic", lambda: next(times))
    pace = Pace()
    for expected in (1.0, 1.0, 13 / 3):
        pace.step_ended()
        assert pace.seconds_for(10) == pytest.approx(10 * expected)


def test_json_lines_are_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    loggers = build_loggers(_config(tmp_path / "run"), tmp_path / "run", resume_step=0)
    for logger in loggers:
        logger.on_step(METRICS)
        logger.on_evaluation(7, {"all": 1.5, "a.jsonl": 1.0})
    assert read_run(tmp_path / "run").steps == [to_record(METRICS)]
    expected = {"step": 7, "loss": 1.5, "source_losses": {"a.jsonl": 1.0}}
    assert _lines(tmp_path / "run" / "evaluations.jsonl") == [expected]
    for logger in loggers:
        logger.close()


def test_each_step_occurs_once_after_a_crash(tmp_path: Path) -> None:
    """Killed after step 5 in the middle of a line, resumed from the checkpoint of step 3."""
    first = JsonLines(tmp_path, resume_step=0)
    for step in range(1, 6):
        first.on_step(replace(METRICS, step=step, loss=1.0))
        first.on_evaluation(step, {"all": 1.0})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()[:3]
    second = JsonLines(tmp_path, resume_step=3)
    for step in range(4, 7):
        second.on_step(replace(METRICS, step=step, loss=2.0))
    second.close()
    assert _steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:3] == kept
    assert [line["step"] for line in _lines(tmp_path / "evaluations.jsonl")] == [1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluations.jsonl", "metrics.jsonl"]


def test_full_disk_tears_no_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit on the size of files, which the third line passes, cuts that write as a full disk does."""
    logger = JsonLines(tmp_path, resume_step=0)
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        logger.on_step(replace(METRICS, step=step))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, limits[1]))
    try:
        for step in (3, 4):
            logger.on_step(replace(METRICS, step=step))
            assert _steps(tmp_path) == [1, 2]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().out.count("metrics.jsonl cannot be written") == 1
    logger.on_step(replace(METRICS, step=5))
    assert _steps(tmp_path) == [1, 2, 3, 4, 5]
    logger.close()


def test_damaged_line_is_named(tmp_path: Path) -> None:
    logger = JsonLines(tmp_path, resume_step=0)
    logger.on_step(METRICS)
    logger.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(CheckpointError, match=r"line 1 is damaged \[.*metrics.jsonl\]"):
        JsonLines(tmp_path, resume_step=7)


def test_a_clean_resume_does_not_rewrite(tmp_path: Path) -> None:
    JsonLines(tmp_path, resume_step=0).on_step(METRICS)
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    JsonLines(tmp_path, resume_step=7).close()
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before and _steps(tmp_path) == [7]


def test_tensorboard_reads_back(tmp_path: Path) -> None:
    """Through TensorBoard's own reader, with steps 2 and 3 repeated by a resumed run."""
    for resume_step, last, loss in ((0, 3, 5.0), (1, 3, 4.0)):
        writer = TensorBoard(tmp_path, resume_step)
        for step in range(resume_step + 1, last + 1):
            writer.on_step(replace(METRICS, step=step, loss=loss))
        writer.on_evaluation(last, {"all": 1.5, "a.jsonl": 1.0})
        writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 5.0), (2, 4.0), (3, 4.0)]
    assert events.Scalars("train/source_losses/b.jsonl")[0].value == 3.0
    assert [(event.step, event.value) for event in events.Scalars("evaluation/loss")] == [(3, 1.5)]


@pytest.mark.parametrize(("package", "setting"), [("tensorboard", {"tensorboard": True}), ("wandb", {"wandb": "p"})])
def test_missing_package_is_one_line_before_anything_is_written(
    package: str, setting: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what makes an import fail
    with pytest.raises(ConfigError, match=f"logging.{package} needs .* -- pip install {package}"):
        build_loggers(_config(tmp_path / "run", **setting), tmp_path / "run", resume_step=0)
    assert not (tmp_path / "run").exists()


def test_wandb_run_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a recording stand-in: the package is optional and not installed here."""
    starts: list[dict[str, Any]] = []
    logged: list[tuple[int, dict[str, float]]] = []

    def init(**arguments: Any) -> SimpleNamespace:
        starts.append(arguments)
        return SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for _ in range(2):
        logger = WandB(tmp_path, "project", {"run_dir": "x"})
        logger.on_step(METRICS)
        logger.on_evaluation(7, {"all": 1.5})
        logger.close()
    assert starts[0] == starts[1] and starts[0]["project"] == "project" and starts[0]["resume"] == "allow"
    assert logged[0][0] == 7 and logged[0][1]["train/lr_by_part/vision_tower"] == 3e-5
    assert logged[1] == (7, {"evaluation/loss": 1.5})


@pytest.mark.parametrize(("steps", "name"), [((1, 5), "steps_2_3"), ((3, 5), "steps_3_3"), ((1, 2), "steps_2_2")])
def test_profile_window(steps: tuple[int, int], name: str, tmp_path: Path) -> None:
    """Steps 2 and 3 are asked for: of a whole run, of one that resumes at 3, of one that ends after 2."""
    profile = ProfileWindow(tmp_path, [2, 3])
    for step in range(steps[0], steps[1] + 1):
        profile.step(step)
        with torch.profiler.record_function(f"marker of step {step}"):
            torch.ones(4).sum()
    profile.close()
    assert [path.name for path in (tmp_path / "profile").iterdir()] == [f"{name}.json.gz"]
    trace = json.loads(gzip.decompress((tmp_path / "profile" / f"{name}.json.gz").read_bytes()))
    markers = {event["name"] for event in trace["traceEvents"] if event["name"].startswith("marker of step")}
    first, last = name.split("_")[1:]
    assert markers == {f"marker of step {step}" for step in range(int(first), int(last) + 1)}


def test_no_profile_leaves_nothing(tmp_path: Path) -> None:
    profile = ProfileWindow(tmp_path, None)
    profile.step(1)
    profile.close()
    assert not list(tmp_path.iterdir())
