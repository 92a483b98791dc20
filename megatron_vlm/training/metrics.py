"""Metrics of one optimizer step, and their form in the logs."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from time import monotonic
from typing import Any

import torch

from megatron_vlm import platform

FEWEST_STEPS_OF_PACE = 20
_COUNTS = (
    "tokens label_tokens padded_tokens images videos audio_clips bad_rows too_long_rows empty_answers step_samples "
    "batch_rows"
).split()
_MEANS = "grad_norm step_seconds data_wait_seconds model_flops".split()
_PREDICTED = ("straggler_ratio_predicted", "straggler_ratio_predicted_in_order")


@dataclass(frozen=True)
class ExpertStatistics:
    """How evenly the experts were used in a step; padding is not counted.

    Attributes:
        expert_tokens_min: tokens of the expert that got fewest, in any layer.
        expert_tokens_mean: mean over all experts and layers.
        expert_tokens_max: tokens of the expert that got most, in any layer.
        dead_experts: experts that got none, in the layer that has most of them.
    """

    expert_tokens_min: int
    expert_tokens_mean: float
    expert_tokens_max: int
    dead_experts: int

    @property
    def expert_imbalance(self) -> float:
        """The busiest expert's tokens over the mean; 1 when all get the same."""
        return self.expert_tokens_max / self.expert_tokens_mean if self.expert_tokens_mean else 1.0


def expert_statistics(tokens: torch.Tensor) -> ExpertStatistics:
    """Summarise tokens per expert.

    Args:
        tokens: [layers with experts, experts], how many tokens of the global batch were routed to each expert.
    """
    return ExpertStatistics(
        expert_tokens_min=int(tokens.min()),
        expert_tokens_mean=float(tokens.double().mean()),
        expert_tokens_max=int(tokens.max()),
        dead_experts=int((tokens == 0).sum(-1).max()),
    )


@dataclass(frozen=True)
class StepMetrics:
    """Figures of one optimizer step, or of several in a row (`over_steps`); counts are over the global batches.

    Attributes:
        step: number of the step, from 1.
        train_iters: steps of the whole run.
        loss: mean over the label tokens.
        grad_norm: global gradient norm before clipping; of several steps, the mean.
        lr: learning rate of parts without a multiplier.
        lr_by_part: learning rate of each part that trains.
        tokens: real tokens, image tokens included and padding not.
        label_tokens: tokens with a loss.
        padded_tokens: positions of the batch that hold no token.
        images: number of images, not counting frames of videos.
        videos: number of videos.
        audio_clips: number of clips of audio.
        bad_rows: rows without weight because they cannot be used.
        too_long_rows: rows without weight because they have more than data.seq_length tokens.
        step_seconds: wall-clock time of a step, waiting for data included.
        data_wait_seconds: part of it spent waiting for the next batch.
        source_losses: mean loss per data source that has label tokens.
        source_label_tokens: label tokens per data source.
        peak_memory_bytes: peak memory of the rank that held most.
        model_flops: FLOPs that the model needs for a batch, forward and backward (`planning.flops`).
        world_size: number of devices.
        skipped: whether the update was left out, because loss or gradient norm was not finite or leapt up.
        empty_answers: answers that say nothing, of which at most the end-of-turn token is trained.
        steps: how many steps the figures are of.
        step_samples: rows of the data.
        batch_rows: rows of the batch, which under packing have several rows of the data each.
        samples: rows of the data taken in the whole run so far.
        epoch: the same in passes over the data.
        time: when the step ended, in seconds since 1970.
        seconds_left: time to the end of the run at the pace of the last steps, evaluations and saves included.
        load_balancing_loss: the loss without its coefficient, mean over the micro-batches weighted by their label
            tokens; None where there is none. `loss` does not contain it.
        experts: how evenly experts were used; None where there are none.
        slowest_rank: the rank that took longest until its gradients were complete, since the last logged step; None
            without data parallelism, as are the next two.
        slowest_host: its machine.
        slowest_ratio: its time over the mean of its data-parallel group.
        straggler_ratio_predicted: under packing, the FLOPs predicted for the data rank that has most of them over the
            mean of all; None without data parallelism or packing, as is the next one; of several steps, the mean.
        straggler_ratio_predicted_in_order: the same, had the data ranks taken packed rows in turn.
    """

    step: int
    train_iters: int
    loss: float
    grad_norm: float
    lr: float
    lr_by_part: dict[str, float]
    tokens: int
    label_tokens: int
    padded_tokens: int
    images: int
    videos: int
    audio_clips: int
    bad_rows: int
    too_long_rows: int
    step_seconds: float
    data_wait_seconds: float
    source_losses: dict[str, float]
    source_label_tokens: dict[str, int]
    peak_memory_bytes: int
    model_flops: float
    world_size: int
    skipped: bool
    empty_answers: int = 0
    steps: int = 1
    step_samples: int = 0
    batch_rows: int = 0
    samples: int = 0
    epoch: float = 0.0
    time: float = 0.0
    seconds_left: float = 0.0
    load_balancing_loss: float | None = None
    experts: ExpertStatistics | None = None
    slowest_rank: int | None = None
    slowest_host: str | None = None
    slowest_ratio: float | None = None
    straggler_ratio_predicted: float | None = None
    straggler_ratio_predicted_in_order: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Real tokens per second over all devices."""
        return self.tokens / (self.steps * self.step_seconds)

    @property
    def images_per_second(self) -> float:
        """Images per second over all devices."""
        return self.images / (self.steps * self.step_seconds)

    @property
    def flops_per_second(self) -> float:
        """Model FLOPs per second and device."""
        return self.model_flops / self.step_seconds / self.world_size

    @property
    def mfu(self) -> float | None:
        """Model FLOP/s over the device's dense bf16 peak, whatever the precision; None where the peak is unknown."""
        peak = platform.current().peak_flops()
        return None if peak is None else self.flops_per_second / peak

    @property
    def padding_share(self) -> float:
        """Fraction of the batch's positions that are padding."""
        return self.padded_tokens / (self.tokens + self.padded_tokens)

    @property
    def label_token_share(self) -> float:
        """Fraction of the real tokens that have a loss."""
        return self.label_tokens / self.tokens

    @property
    def data_wait_share(self) -> float:
        """Fraction of the step spent waiting for data."""
        return self.data_wait_seconds / self.step_seconds


class Pace:
    """Wall-clock time from the end of one step to the end of the next, over the last steps.

    Args:
        interval: steps in which everything that comes regularly (evaluations, saves) comes once.
    """

    def __init__(self, interval: int = 0) -> None:
        self._ends = deque([monotonic()], maxlen=max(interval, FEWEST_STEPS_OF_PACE) + 1)

    def step_ended(self) -> None:
        """Note the time."""
        self._ends.append(monotonic())

    def seconds_for(self, steps: int) -> float:
        """Return the time that so many steps will take."""
        return steps * (self._ends[-1] - self._ends[0]) / max(1, len(self._ends) - 1)


def over_steps(steps: Sequence[StepMetrics]) -> StepMetrics:
    """Return the figures of several steps in a row: counts add up, the others are means; the rest is the last step's.

    Losses are means over label tokens, as in one step. Experts' figures are the last step's.
    """
    last, count = steps[-1], len(steps)
    if count == 1:
        return last
    sums = {name: sum(getattr(each, name) for each in steps) for name in _COUNTS}
    predicted = _PREDICTED if last.straggler_ratio_predicted is not None else ()
    means = {name: sum(getattr(each, name) for each in steps) / count for name in (*_MEANS, *predicted)}
    labels = {name: sum(each.source_label_tokens[name] for each in steps) for name in last.source_label_tokens}
    source_losses = {
        name: sum(each.source_losses.get(name, 0.0) * each.source_label_tokens[name] for each in steps) / number
        for name, number in labels.items()
        if number
    }
    weights = [each.label_tokens / max(1, sums["label_tokens"]) for each in steps]
    balance = None
    if last.load_balancing_loss is not None:
        balance = sum(weight * (each.load_balancing_loss or 0.0) for weight, each in zip(weights, steps, strict=True))
    return replace(
        last,
        **sums,
        **means,
        loss=sum(weight * each.loss for weight, each in zip(weights, steps, strict=True)),
        source_losses=source_losses,
        source_label_tokens=labels,
        peak_memory_bytes=max(each.peak_memory_bytes for each in steps),
        skipped=any(each.skipped for each in steps),
        load_balancing_loss=balance,
        steps=count,
    )


def to_record(metrics: StepMetrics) -> dict[str, Any]:
    """Return the step as one JSON object: every field and derived figure; numbers that are not finite become null.

    What only models with experts have, or only runs with data parallelism, is left out of other records.
    """
    fields = asdict(metrics)
    experts = fields.pop("experts")
    if metrics.experts is not None:
        fields |= experts | {"expert_imbalance": metrics.experts.expert_imbalance}
    if metrics.load_balancing_loss is None:
        del fields["load_balancing_loss"]
    if metrics.slowest_rank is None:
        del fields["slowest_rank"], fields["slowest_host"], fields["slowest_ratio"]
    if metrics.straggler_ratio_predicted is None:
        del fields["straggler_ratio_predicted"], fields["straggler_ratio_predicted_in_order"]
    record = fields | {
        "tokens_per_second": metrics.tokens_per_second,
        "images_per_second": metrics.images_per_second,
        "flops_per_second_per_device": metrics.flops_per_second,
        "mfu": metrics.mfu,
        "padding_share": metrics.padding_share,
        "label_token_share": metrics.label_token_share,
        "data_wait_share": metrics.data_wait_share,
    }
    return finite(record)


def evaluation_record(step: int, losses: dict[str, float]) -> dict[str, Any]:
    """Return an evaluation as one JSON object.

    Args:
        step: the step after which the evaluation ran.
        losses: mean loss over all label tokens under "all", and per data source.
    """
    sources = {name: loss for name, loss in losses.items() if name != "all"}
    return finite({"step": step, "loss": losses["all"], "source_losses": sources})


def finite(value: Any) -> Any:
    """Return `value` with None in place of nan and infinity, which JSON does not have, at any depth of dictionaries."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """Return a record's numbers, those of inner dictionaries under "outer/inner"; the step and nulls are left out."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        inner = {f"{name}/{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        flat |= {key: float(item) for key, item in inner.items() if isinstance(item, int | float) and key != "step"}
    return flat
