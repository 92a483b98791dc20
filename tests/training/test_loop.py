"""The loop's rhythm: steps, logs, evaluations, checkpoints, stops, resumption, export, schedules."""

from __future__ import annotations

import json
import math
import resource
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3ForConditionalGeneration

from megatron_vlm import output
from megatron_vlm.checkpoint.run_owner import OWNER_NAME
from megatron_vlm.errors import CheckpointError
from megatron_vlm.training.loop import Trainer
from tests.ranks import run_ranks
from tests.sizes import full
from tests.training.loop_run import Interference, Outcome, Place, build_place, checkpoint_names, read_lines, train_here

LR, MIN_LR, WARMUP, ITERS = 3e-3, 3e-4, 2, 8
# The same arithmetic in the same order; nothing but the layout of memory may differ.
SAME_LOSS = 1e-6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return build_place(tmp_path_factory.mktemp("place"))


def train(
    place: Place, run_dir: Path, *overrides: str, ranks: int = 1, interfere: Interference | None = None
) -> Outcome:
    """The first rank's outcome of a start that must succeed."""
    outcome: Outcome = run_ranks(ranks, train_here, place.arguments(run_dir, *overrides), interfere)[0]
    assert outcome.error is None, outcome.error
    return outcome


def losses(outcome: Outcome) -> list[float]:
    return [record["loss"] for record in outcome.metrics]


def test_metrics_of_every_step(place: Place, tmp_path: Path) -> None:
    metrics = train(place, tmp_path).metrics
    assert [record["step"] for record in metrics] == [1, 2, 3, 4]
    for record in metrics:
        for key in ("loss", "grad_norm", "lr", "tokens", "label_tokens", "step_seconds"):
            assert math.isfinite(record[key]) and record[key] > 0, key
        # Rows come in file order, every second one with an image.
        assert (record["images"], record["bad_rows"], record["too_long_rows"]) == (2, 0, 0)
        assert record["tokens"] > record["label_tokens"]
        assert set(record["source_losses"]) == {"train"}
    # Eight rows are two global batches: steps 1 and 3 read the same rows.
    assert metrics[0]["tokens"] == metrics[2]["tokens"] != metrics[1]["tokens"]
    assert metrics[2]["loss"] < metrics[0]["loss"]


def no_room_in_steps(first: int, last: int, trainer: Trainer) -> None:
    """Files of this process, and of those it starts, cannot grow past 2 KiB during these steps."""
    output.endure()  # pytest's files for the output have the same limit
    step, (soft, hard) = trainer._step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited() -> int:
        has_room = not first <= trainer.step + 1 <= last
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if has_room else 2048, hard))
        return step()

    trainer._step = limited  # type: ignore[method-assign]


def remove_limit() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_full_disk_delays_an_interim_save(place: Place, tmp_path: Path) -> None:
    settings = ["train.train_iters=9", "checkpoint.save_interval=4", "checkpoint.keep_last=9"]
    outcome = train(place, tmp_path, *settings, interfere=partial(no_room_in_steps, 4, 4))
    again, *regular = (int(name.removeprefix("step_")) for name in checkpoint_names(tmp_path))
    # The failure shows when the writing process has ended, at one of the next steps.
    assert again in (6, 7) and regular == [8, 9]
    assert [record["step"] for record in outcome.metrics] == list(range(1, 10))


def test_full_disk_at_the_end(place: Place, tmp_path: Path) -> None:
    # Written at once: on a busy machine the save of step 2 could still go on when the disk is full.
    arguments = place.arguments(tmp_path, "checkpoint.save_interval=2", "checkpoint.async_save=false")
    (outcome,) = run_ranks(1, train_here, arguments, partial(no_room_in_steps, 4, 4))
    run_ranks(1, remove_limit)
    assert outcome.error is not None and outcome.error.startswith("SaveError: the checkpoint could not be written")
    assert checkpoint_names(tmp_path) == ["step_00000002"]
    train(place, tmp_path)
    assert checkpoint_names(tmp_path)[-1] == "step_00000004"


def test_log_interval_keeps_the_last_step(place: Place, tmp_path: Path) -> None:
    metrics = train(place, tmp_path, "train.log_interval=3").metrics
    assert [record["step"] for record in metrics] == [3, 4]


def test_checkpoints_stop_resume_and_export(place: Place, tmp_path: Path) -> None:
    """Stopped after three steps of six, resumed to the end, then started again: as if it had never stopped."""
    settings = ["train.train_iters=6", "checkpoint.save_interval=1", "checkpoint.keep_last=2"]
    settings.append(f"checkpoint.export_hf={tmp_path}/parents/export")
    run_dir = tmp_path / "run"
    straight = train(place, tmp_path / "straight", "train.train_iters=6")

    train(place, run_dir, *settings, "train.exit_interval=3")
    assert json.loads((run_dir / "stopped.json").read_text()) == {"reason": "exit_interval", "step": 3}
    assert checkpoint_names(run_dir) == ["step_00000002", "step_00000003"]
    assert not (tmp_path / "parents").exists(), "exported before the end"

    done = train(place, run_dir, *settings)
    assert not (run_dir / "stopped.json").exists()
    assert checkpoint_names(run_dir) == ["step_00000005", "step_00000006"]
    assert [record["step"] for record in done.metrics] == [1, 2, 3, 4, 5, 6]
    assert losses(done) == losses(straight)  # bit for bit
    exported = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "parents" / "export").state_dict()
    norm = done.after["language_model.norm.weight"]
    assert exported["model.language_model.norm.weight"].float().equal(norm)

    lines = (run_dir / "metrics.jsonl").read_text()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "parents" / "export").iterdir()}
    again = train(place, run_dir, *settings)
    assert (run_dir / "metrics.jsonl").read_text() == lines
    assert all(again.after[name].equal(value) for name, value in done.after.items())
    assert {path: path.stat().st_mtime_ns for path in files} == files, "exported twice"


def test_an_interval_without_saves_leaves_the_last_step(place: Place, tmp_path: Path) -> None:
    train(place, tmp_path, "checkpoint.async_save=false")
    assert checkpoint_names(tmp_path) == ["step_00000004"]


def _export_here(trainer: Trainer) -> None:
    raise AssertionError("training began")


def test_export_is_refused_before_training(place: Place, tmp_path: Path) -> None:
    target = tmp_path / "export"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    arguments = place.arguments(tmp_path / "run", f"checkpoint.export_hf={target}")
    for outcome in run_ranks(2, train_here, arguments, _export_here):
        assert outcome.error and "not empty" in outcome.error and str(target) in outcome.error
    assert not (tmp_path / "run").exists()
    assert [path.name for path in target.iterdir()] == ["notes.txt"]


EVALUATION = ["train.eval_interval=2", "train.train_iters=5", "train.eval_iters=3"]


def test_evaluation_changes_nothing(place: Place, tmp_path: Path) -> None:
    """Held-out losses after steps 2, 4 and the last; training goes on as without them."""
    plain = train(place, tmp_path / "plain", "train.train_iters=5", ranks=2)
    valid = f"data.valid=[{{path: {place.data}/train.jsonl}}, {{path: {place.data}/text.jsonl}}]"
    watched = train(place, tmp_path / "watched", *EVALUATION, valid, ranks=2)
    assert losses(watched) == losses(plain)
    assert [record["step"] for record in watched.evaluations] == [2, 4, 5]
    for record in watched.evaluations:
        assert set(record["source_losses"]) == {"train", "text"}
    assert not plain.evaluations
    evaluated = [record["loss"] for record in watched.evaluations]
    assert evaluated[2] < evaluated[0]


def test_evaluation_is_the_loss_of_the_same_rows(place: Place, tmp_path: Path) -> None:
    """The first training step reports the loss before its update; with no update, evaluation must find the same."""
    still = ["optimizer.lr=0", "train.train_iters=1", "train.global_batch_size=8"]
    outcome = train(place, tmp_path, *still, f"data.valid=[{{path: {place.data}/train.jsonl}}]", ranks=2)
    # The same rows in the same order through the same arithmetic: dropout, had it been left on, would differ.
    assert outcome.evaluations[0]["loss"] == pytest.approx(outcome.metrics[0]["loss"], rel=SAME_LOSS)


def _request_in_evaluation(trainer: Trainer) -> None:
    evaluate = trainer._evaluate

    def interrupted() -> int:
        trainer.requests.number = signal.SIGUSR2
        return evaluate()

    trainer._evaluate = interrupted  # type: ignore[method-assign]


def test_a_request_ends_an_evaluation(place: Place, tmp_path: Path) -> None:
    valid = f"data.valid=[{{path: {place.data}/train.jsonl}}]"
    outcome = train(place, tmp_path, *EVALUATION, valid, interfere=_request_in_evaluation)
    assert json.loads((tmp_path / "stopped.json").read_text()) == {"reason": "signal SIGUSR2", "step": 2}
    assert not outcome.evaluations
    assert checkpoint_names(tmp_path) == ["step_00000002"]


def _request_before_the_first_step(trainer: Trainer) -> None:
    trainer.requests.number = signal.SIGINT


@pytest.mark.parametrize("resumed", [False, full(True)])
def test_a_request_before_the_first_step(place: Place, tmp_path: Path, resumed: bool) -> None:
    """Nothing is trained, saved or exported, whatever was there before."""
    if resumed:
        train(place, tmp_path, "train.exit_interval=2")
    before = checkpoint_names(tmp_path)
    train(place, tmp_path, f"checkpoint.export_hf={tmp_path}/export", interfere=_request_before_the_first_step)
    assert json.loads((tmp_path / "stopped.json").read_text()) == {"reason": "signal SIGINT", "step": 2 * resumed}
    assert checkpoint_names(tmp_path) == before and not (tmp_path / "export").exists()


def _lose_the_folder(trainer: Trainer) -> None:
    """During the second step another start takes the folder over, as the first rank's heartbeat finds out."""
    read, run_dir = trainer.run_state.train_loader.global_batch, trainer.run_dir

    def read_and_lose() -> Any:
        if trainer.step == 1 and trainer.run_state.is_first_rank:
            found = {"pid": 1, "host": "other", "token": "another"}
            (run_dir / OWNER_NAME).write_text(json.dumps(found))
            with pytest.raises(CheckpointError):
                trainer.run_state.owner.confirm()
        return read()

    trainer.run_state.train_loader.global_batch = read_and_lose  # type: ignore[method-assign]


def test_a_run_that_lost_its_folder_ends_without_saving(place: Place, tmp_path: Path) -> None:
    for outcome in run_ranks(2, train_here, place.arguments(tmp_path), _lose_the_folder):
        assert outcome.error is not None and "taken over by process 1 on other" in outcome.error
        assert [record["step"] for record in outcome.metrics] == [1, 2]
    assert checkpoint_names(tmp_path) == [] and not (tmp_path / "stopped.json").exists()
    assert "another" in (tmp_path / OWNER_NAME).read_text(), "the other's file is left alone"


def expected_rates(schedule: str) -> list[float]:
    """The learning rate that update k uses, from the definitions: the decay would end one step after the last."""
    rates = []
    for step in range(1, ITERS + 1):
        share = (step - WARMUP) / (ITERS + 1 - WARMUP)
        if step <= WARMUP:
            rate = LR * step / WARMUP
        elif schedule == "constant":
            rate = LR
        elif schedule == "linear":
            rate = LR + (MIN_LR - LR) * share
        elif schedule == "cosine":
            rate = MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * share)) / 2
        else:  # wsd: held, then four steps on the way down
            rate = LR + (MIN_LR - LR) * max(0, step - (ITERS - 4)) / 5
        rates.append(rate)
    return rates


@pytest.mark.parametrize("schedule", [full("constant"), full("linear"), "cosine", "wsd"])
def test_schedule(place: Place, tmp_path: Path, schedule: str) -> None:
    """The rates that the steps used, also after a stop in the middle."""
    settings = [f"optimizer.schedule={schedule}", f"train.train_iters={ITERS}"]
    settings += ["optimizer.wsd_decay_iters=4"] * (schedule == "wsd")
    settings += [f"optimizer.lr={LR}", f"optimizer.min_lr={MIN_LR}", f"optimizer.warmup_iters={WARMUP}"]
    settings += [f"data.train=[{{path: {place.data}/text.jsonl}}]", "model.text_only=true"]
    settings.append("optimizer.lr_multipliers={language_model: 0.5}")
    train(place, tmp_path, *settings, "train.exit_interval=5")
    metrics = train(place, tmp_path, *settings).metrics
    # Double precision; the formulas may be evaluated in another order.
    assert [record["lr"] for record in metrics] == pytest.approx(expected_rates(schedule), rel=1e-12)
    halves = [record["lr_by_part"]["language_model"] for record in metrics]
    assert halves == pytest.approx([rate / 2 for rate in expected_rates(schedule)], rel=1e-12)


def test_nothing_is_left_open(place: Place, tmp_path: Path) -> None:
    """Each start writes its resolved configuration, which starts the same run again."""
    first = train(place, tmp_path, "train.exit_interval=2")
    config = tmp_path / "config.yaml"
    (outcome,) = run_ranks(1, train_here, ["--config", str(config)])
    assert outcome.error is None
    assert [record["step"] for record in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert losses(outcome)[:2] == losses(first)
