"""Settings that change how a step is computed, and whether what it computes stays the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.sizes import full
from tests.training.loop_run import Outcome, Place, build_place, train_here

TENSOR, SEQUENCE = "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"
PLAIN = "parallel.use_distributed_optimizer=false"
SGD = ["optimizer.name=sgd", PLAIN, "optimizer.lr=0.05"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return build_place(tmp_path_factory.mktemp("place"))


def train(place: Place, run_dir: Path, *overrides: str, ranks: int = 1) -> Outcome:
    outcome: Outcome = run_ranks(ranks, train_here, place.arguments(run_dir, *overrides))[0]
    assert outcome.error is None, outcome.error
    return outcome


def losses(outcome: Outcome) -> list[float]:
    return [record["loss"] for record in outcome.metrics]


@pytest.fixture(scope="module")
def plain(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Four steps of SGD on one rank; SGD does not enlarge rounding differences as AdamW does."""
    return train(place, tmp_path_factory.mktemp("plain"), *SGD)


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        full(1, ["model.recompute=selective"]),
        full(1, ["model.recompute=full"]),
        (1, ["train.deterministic=true"]),
        (1, ["train.micro_batch_size=4"]),
        full(2, [TENSOR, SEQUENCE, "model.recompute=full"]),
        full(2, [TENSOR, "model.vision_parallelism=data"]),
        (2, ["parallel.pipeline_model_parallel_size=2", "model.recompute=selective"]),
        (2, ["parallel.overlap_grad_reduce=true"]),
        full(4, []),
    ],
    ids=lambda value: " ".join(item.rpartition(".")[2] for item in value) if isinstance(value, list) else str(value),
)
def test_the_same_training(place: Place, plain: Outcome, tmp_path: Path, ranks: int, overrides: list[str]) -> None:
    """Rows with images lie on every second data rank only when there are two or four."""
    outcome = train(place, tmp_path, *SGD, *overrides, ranks=ranks)
    # fp32 sums in another order, over four steps; measured: at most 3e-7.
    assert losses(outcome) == pytest.approx(losses(plain), rel=2e-6)
    norms = [record["grad_norm"] for record in plain.metrics]
    assert [record["grad_norm"] for record in outcome.metrics] == pytest.approx(norms, rel=2e-6)


def test_sgd_step_is_minus_rate_times_gradient(place: Place, tmp_path: Path) -> None:
    """With no momentum, twice the rate moves every parameter twice as far."""
    still = ["train.train_iters=1", "optimizer.clip_grad=0", "optimizer.weight_decay=0", *SGD]
    single = train(place, tmp_path / "single", *still)
    double = train(place, tmp_path / "double", *still, "optimizer.lr=0.1")
    assert single.optimizer_elements == 0
    for name, before in single.before.items():
        step = single.after[name] - before
        # What is lost is the rounding of the parameters themselves, whose size is about one.
        torch.testing.assert_close(double.after[name] - before, 2 * step, rtol=1e-4, atol=1e-6)


def test_multipliers_scale_each_part(place: Place, tmp_path: Path) -> None:
    """SGD's step of a part is its multiplier times the step without one; a multiplier of zero keeps the part."""
    still = ["train.train_iters=1", "optimizer.clip_grad=0", "optimizer.weight_decay=0", *SGD]
    plain = train(place, tmp_path / "plain", *still)
    factors = {"language_model": 1.0, "vision_tower": 0.5, "projector": 0.0}
    scaled = train(place, tmp_path / "scaled", *still, "optimizer.lr_multipliers={vision_tower: 0.5, projector: 0}")
    for name, before in plain.before.items():
        step = (plain.after[name] - before) * factors[name.partition(".")[0]]
        torch.testing.assert_close(scaled.after[name] - before, step, rtol=1e-4, atol=1e-6)
    assert not scaled.changed("projector")
    assert scaled.metrics[0]["lr_by_part"] == pytest.approx({"vision_tower": 0.025, "projector": 0.0})


def test_multiplier_on_a_stage_without_other_parts(place: Place, tmp_path: Path) -> None:
    """The first rank of a pipeline logs the rate, whatever groups of parameters it has."""
    settings = ["parallel.pipeline_model_parallel_size=2", "optimizer.lr_multipliers={vision_tower: 0.5}"]
    outcome = train(place, tmp_path, "model.freeze=[language_model, projector]", *settings, ranks=2)
    assert [record["lr"] for record in outcome.metrics] == pytest.approx([3e-3] * 4)
    assert outcome.metrics[0]["lr_by_part"] == pytest.approx({"vision_tower": 1.5e-3})


def test_text_only(place: Place, tmp_path: Path) -> None:
    """The language model of a multimodal directory, with its weights: the first loss is that of the whole model."""
    rows = [f"data.train=[{{path: {place.data}/text.jsonl}}]"]
    whole = train(place, tmp_path / "whole", *rows)
    text = train(place, tmp_path / "text", *rows, "model.text_only=true")
    assert {name.partition(".")[0] for name in text.after} == {"language_model"}
    # Of the tower only zeros take part, in the norm by which gradients are clipped: they group its sum otherwise.
    assert losses(text)[0] == losses(whole)[0]
    assert losses(text) == pytest.approx(losses(whole), rel=1e-6)
    assert all(record["images"] == 0 for record in text.metrics)


def test_random_weights_do_not_depend_on_the_layout(place: Place, tmp_path: Path) -> None:
    settings = ["model.load_weights=false", *SGD]
    single = train(place, tmp_path / "single", *settings)
    double = train(place, tmp_path / "double", *settings, TENSOR, SEQUENCE, ranks=2)
    other = train(place, tmp_path / "other", *settings, "train.seed=4321", "train.train_iters=1")
    assert losses(double) == pytest.approx(losses(single), rel=2e-6)
    assert losses(other)[0] != pytest.approx(losses(single)[0], rel=1e-4)
    assert single.changed("language_model")


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [full(2, [TENSOR, SEQUENCE]), (2, ["parallel.overlap_grad_reduce=true"])],
    ids=["TP2+SP", "DP2, distributed optimizer"],
)
def test_bf16_learns(place: Place, tmp_path: Path, ranks: int, overrides: list[str]) -> None:
    """Twenty steps over the same eight rows: the loss falls to less than half."""
    settings = ["train.precision=bf16", "train.train_iters=20", "optimizer.lr=5e-3"]
    settings += ["train.global_batch_size=8", "train.micro_batch_size=4"]
    outcome = train(place, tmp_path, *settings, *overrides, ranks=ranks)
    assert all(parameter.dtype == torch.bfloat16 for parameter in outcome.after.values())
    assert losses(outcome)[-1] < 0.5 * losses(outcome)[0]
    fp32 = train(place, tmp_path / "fp32", *settings, "train.precision=fp32", "train.train_iters=1")
    # bf16 keeps 8 bits; the loss is a mean over about forty tokens.
    assert losses(outcome)[0] == pytest.approx(losses(fp32)[0], rel=0.02)
