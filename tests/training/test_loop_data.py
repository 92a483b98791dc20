"""Steps that should not be applied and rows that cannot be used: what stops a run, what it says, what goes on."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.utils import unwrap_model

from megatron_vlm.training.loop import Trainer
from megatron_vlm.training.step_check import StepCheck
from tests.data.rows import assistant, image, row, user, write_jsonl
from tests.ranks import run_ranks
from tests.sizes import full
from tests.training.loop_run import Interference, Outcome, Place, build_place, checkpoint_names, train_here

TENSOR, PIPELINE = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
STRICT, SKIP = "data.strict=true", "train.nonfinite=skip"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return build_place(tmp_path_factory.mktemp("place"))


def start(
    place: Place, run_dir: Path, *overrides: str, ranks: int = 1, interfere: Interference | None = None
) -> list[Outcome]:
    results: list[Outcome] = run_ranks(ranks, train_here, place.arguments(run_dir, *overrides), interfere)
    assert len({outcome.error for outcome in results}) == 1, "every rank must end in the same way"
    return results


def _poison_parameter(trainer: Trainer) -> None:
    """One number of the last rank's model is lost before the third step."""
    read = trainer.run_state.train_loader.global_batch

    def read_and_poison() -> Any:
        if trainer.step == 2 and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            chunk = unwrap_model(list(trainer.run_state.model))[-1]
            with torch.no_grad():
                next(iter(chunk.language_model.layers.parameters())).view(-1)[0] = math.nan
        return read()

    trainer.run_state.train_loader.global_batch = read_and_poison  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [full(1, []), full(2, []), full(2, [TENSOR]), (2, [PIPELINE, "parallel.overlap_grad_reduce=true"])],
    ids=["one rank", "DP2", "TP2", "PP2"],
)
def test_stop_names_the_rows(place: Place, tmp_path: Path, ranks: int, overrides: list[str]) -> None:
    """Every rank ends with the same line: what, in which step, which rows, what to do. Earlier steps stay saved."""
    settings = ["checkpoint.save_interval=1", *overrides]
    results = start(place, tmp_path, *settings, ranks=ranks, interfere=_poison_parameter)
    error = results[0].error
    assert error is not None and error.startswith("DivergenceError: the loss is nan at step 3, which was not applied")
    named = error.partition("[rows ")[2].partition("]")[0].split(", ")
    assert sorted(named) == [f"{place.data}/train.jsonl:{line}" for line in (1, 2, 3, 4)]
    assert "train.nonfinite" in error and "\n" not in error
    assert [record["step"] for record in results[0].metrics] == [1, 2]
    assert checkpoint_names(tmp_path) == ["step_00000001", "step_00000002"]
    (resumed, *_) = start(place, tmp_path, *settings, ranks=ranks)
    assert resumed.error is None
    assert [record["step"] for record in resumed.metrics] == [1, 2, 3, 4]


def _poison_gradient(trainer: Trainer, factor: float, at_step: int) -> None:
    """The last rank's gradients are multiplied in one step; the next step must find all tensors as that one did."""
    optimizer, model = trainer.run_state.optimizer, trainer.run_state.model
    prepare, kept = optimizer.prepare_grads, []

    def tensors() -> list[torch.Tensor]:
        inner = [part.optimizer for part in optimizer.chained_optimizers if part.optimizer is not None]
        moments = [state["exp_avg"] for part in inner for state in part.state.values()]
        return [parameter.detach().clone() for chunk in model for parameter in chunk.parameters()] + moments

    def prepare_and_poison() -> Any:
        if trainer.step == at_step:
            assert kept and all(old.equal(new) for old, new in zip(kept, tensors(), strict=True))
        if trainer.step == at_step - 1:
            kept.extend(tensor.clone() for tensor in tensors())
            if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
                for parameter in (parameter for chunk in model for parameter in chunk.parameters()):
                    parameter.main_grad.mul_(factor)
        return prepare()

    optimizer.prepare_grads = prepare_and_poison


@pytest.mark.parametrize(
    ("ranks", "overrides"), [(2, []), full(2, [TENSOR]), full(2, [PIPELINE])], ids=["DP2", "TP2", "PP2"]
)
def test_skip_leaves_the_update_out(place: Place, tmp_path: Path, ranks: int, overrides: list[str]) -> None:
    """One rank's gradient is infinite: no rank applies the step, the log says so, training goes on."""
    poison = partial(_poison_gradient, factor=math.inf, at_step=3)
    (outcome, *_) = start(place, tmp_path, SKIP, *overrides, ranks=ranks, interfere=poison)
    assert outcome.error is None
    assert [record["skipped"] for record in outcome.metrics] == [False, False, True, False]
    assert outcome.metrics[2]["grad_norm"] is None and math.isfinite(outcome.metrics[2]["loss"])
    assert outcome.changed("language_model")


def test_a_run_whose_first_step_is_skipped_is_saved(place: Place, tmp_path: Path) -> None:
    """The optimizer has no moments then; the run goes on as if it had not been stopped."""
    poison = partial(_poison_gradient, factor=math.inf, at_step=1)
    (straight, *_) = start(place, tmp_path / "straight", SKIP, ranks=2, interfere=poison)
    (stopped, *_) = start(place, tmp_path / "run", SKIP, "train.exit_interval=1", ranks=2, interfere=poison)
    assert stopped.error is None and [record["skipped"] for record in stopped.metrics] == [True]
    (resumed, *_) = start(place, tmp_path / "run", SKIP, ranks=2)
    assert resumed.error is None
    losses = [[(record["step"], record["loss"]) for record in outcome.metrics] for outcome in (resumed, straight)]
    assert losses[0] == losses[1]


SPIKE = ["train.train_iters=23", "train.spike_ratio=50", "checkpoint.async_save=false"]


def test_spike(place: Place, tmp_path: Path) -> None:
    """A gradient norm that leaps up after twenty steps is skipped, or ends the run with the rows."""
    poison = partial(_poison_gradient, factor=1e4, at_step=22)
    (skipped,) = start(place, tmp_path / "skip", *SPIKE, SKIP, interfere=poison)
    assert [record["step"] for record in skipped.metrics if record["skipped"]] == [22]
    (stopped,) = start(place, tmp_path / "stop", *SPIKE, interfere=poison)
    assert stopped.error is not None and "over 50.0 times the recent" in stopped.error
    assert "train.jsonl:5" in stopped.error and "at step 22" in stopped.error


def test_guard_goes_on_after_a_resume() -> None:
    """Its state carries the mean; a spike counts from the twentieth step that was applied."""
    guard = StepCheck(spike_ratio=10.0)
    for _ in range(19):
        guard.applied(1.0)
    assert guard.problem(1.0, 100.0) is None
    guard.applied(1.0)
    resumed = StepCheck(spike_ratio=10.0)
    resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert resumed.problem(1.0, 11.0) and not resumed.problem(1.0, 9.0)
    assert StepCheck(None).problem(1.0, 1e30) is None
    for bad in (math.nan, math.inf):
        assert resumed.problem(bad, 1.0) and resumed.problem(1.0, bad)


def rows_with_a_missing_image(place: Place) -> Path:
    """Eight rows; the third has an image that is not there."""
    lines = (place.data / "train.jsonl").read_text().splitlines()
    lines[2] = json.dumps(row(user(image("gone.png"), "What is it?"), assistant("Nothing.")))
    path = place.data / "missing.jsonl"
    write_jsonl(path, lines)
    return path


@pytest.mark.parametrize("ranks", [full(1), 2])
def test_bad_row_keeps_its_slot_without_weight(place: Place, tmp_path: Path, ranks: int) -> None:
    """The step's loss is the mean over the other rows, as if the row's answer had no label."""
    path = rows_with_a_missing_image(place)
    settings = [f"data.train=[{{path: {path}}}]", "train.train_iters=2"]
    (outcome, *_) = start(place, tmp_path / "bad", *settings, "data.max_bad_fraction=0.2", ranks=ranks)
    assert outcome.error is None
    assert [record["bad_rows"] for record in outcome.metrics] == [1, 0]
    assert [record["images"] for record in outcome.metrics] == [1, 2]

    three = [line for number, line in enumerate(path.read_text().splitlines()[:4]) if number != 2]
    write_jsonl(place.data / "three.jsonl", three)
    settings = [f"data.train=[{{path: {place.data}/three.jsonl}}]", "train.train_iters=1", "train.global_batch_size=3"]
    (others,) = start(place, tmp_path / "three", *settings)
    assert outcome.metrics[0]["label_tokens"] == others.metrics[0]["label_tokens"]
    # The same rows in other micro-batches.
    assert outcome.metrics[0]["loss"] == pytest.approx(others.metrics[0]["loss"], rel=1e-6)
    assert outcome.metrics[0]["grad_norm"] == pytest.approx(others.metrics[0]["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("ranks", [full(1), 2])
def test_too_many_bad_rows_end_the_run(place: Place, tmp_path: Path, ranks: int) -> None:
    """On all ranks at once, naming the row, whichever rank saw it."""
    settings = [f"data.train=[{{path: {rows_with_a_missing_image(place)}}}]", "data.max_bad_fraction=0.1"]
    errors = run_ranks(ranks, train_here, place.arguments(tmp_path, *settings))
    for outcome in errors:
        assert outcome.error and outcome.error.startswith("DataError: 1 of 4 rows are bad, more than data.max_bad_f")
    assert any("missing.jsonl:3" in (outcome.error or "") for outcome in errors)


def test_bad_rows_are_counted_across_starts(place: Place, tmp_path: Path) -> None:
    settings = [f"data.train=[{{path: {rows_with_a_missing_image(place)}}}]", "data.max_bad_fraction=0.13"]
    (first,) = start(place, tmp_path, *settings, "train.exit_interval=2")
    (second,) = start(place, tmp_path, *settings)
    # One of eight is within the limit at first; in step 3 the same row comes again: two of twelve.
    assert first.error is None
    assert second.error is not None and "2 of 12 rows are bad" in second.error


def test_strict_ends_at_the_row(place: Place, tmp_path: Path) -> None:
    settings = [f"data.train=[{{path: {rows_with_a_missing_image(place)}}}]", STRICT]
    (outcome,) = start(place, tmp_path, *settings)
    assert outcome.error and "missing.jsonl:3" in outcome.error and "gone.png" in outcome.error


@pytest.mark.parametrize(
    ("ranks", "overrides"), [full(1, []), full(2, []), (2, [PIPELINE])], ids=["one rank", "DP2", "PP2"]
)
def test_a_batch_without_any_label(place: Place, tmp_path: Path, ranks: int, overrides: list[str]) -> None:
    """Four bad rows: no division by zero, nothing changes without weight decay, and the next batch trains."""
    rows = [row(user(image("gone.png"), "?"), assistant("!"))] * 4
    path = place.data / "nothing.jsonl"
    write_jsonl(path, rows + (place.data / "train.jsonl").read_text().splitlines()[:4])
    settings = [f"data.train=[{{path: {path}}}]", "data.max_bad_fraction=1", "train.train_iters=2", *overrides]
    settings.append("optimizer.weight_decay=0")
    (outcome, *_) = start(place, tmp_path, *settings, ranks=ranks)
    assert outcome.error is None
    assert [record["label_tokens"] > 0 for record in outcome.metrics] == [False, True]
    assert (outcome.metrics[0]["loss"], outcome.metrics[0]["grad_norm"]) == (0.0, 0.0)
    assert math.isfinite(outcome.metrics[1]["loss"]) and outcome.metrics[1]["grad_norm"] > 0
    (idle, *_) = start(place, tmp_path / "idle", *settings, "train.exit_interval=1", ranks=ranks)
    assert not any(idle.changed(part) for part in ("language_model", "vision_tower", "projector"))


def test_rows_that_are_all_too_long_export_nothing(place: Place, tmp_path: Path) -> None:
    path, target = place.data / "long.jsonl", tmp_path / "exported"
    write_jsonl(path, [row(user("? " * 200), assistant("!"))] * 8)
    settings = [f"data.train=[{{path: {path}}}]", "data.max_too_long_fraction=1", "train.train_iters=2"]
    (outcome,) = start(place, tmp_path / "run", *settings, f"checkpoint.export_hf={target}")
    assert outcome.error and "none of the 8 rows of this run had a token to train" in outcome.error
    assert "long.jsonl:" in outcome.error and not target.exists()
    (outcome,) = start(place, tmp_path / "limited", *settings[::2])
    assert outcome.error and "8 of 8 rows are longer than data.seq_length" in outcome.error


def test_held_out_rows_without_a_token_to_train(place: Place, tmp_path: Path) -> None:
    path = place.data / "unusable.jsonl"
    write_jsonl(path, [row(user(image("gone.png"), "?"), assistant("!"))] * 4)
    settings = [f"data.valid=[{{path: {path}, name: held out}}]", "train.train_iters=1"]
    (outcome,) = start(place, tmp_path, *settings)
    assert outcome.error and "the held-out rows (held out) have no trained token" in outcome.error
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
