"""What the samples of a step cost in rows of their own and packed, with and without context ranks, by count.

Nothing runs and nothing is timed: micro-batches are collated as for training, and the planner's traces say what each
of them does. Tokens, positions, pairs and the model's own FLOPs are those of all micro-batches; everything else is
that of a few traced ones, each of which stands for those around its length.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import batched
from typing import Any

import numpy as np
import torch

from megatron_vlm import platform
from megatron_vlm.config import Config
from megatron_vlm.data.balance import TokenCosts, assign
from megatron_vlm.data.collate import LoadedSample, MicroBatch, collate
from megatron_vlm.data.context_blocks import padded_length
from megatron_vlm.data.context_shard import shard_for_context
from megatron_vlm.data.media import Medium
from megatron_vlm.data.packing import best_fit_decreasing
from megatron_vlm.data.prompts import Sample
from megatron_vlm.data.rules import PromptRules
from megatron_vlm.families.build import context_sharding
from megatron_vlm.families.registry import Family
from megatron_vlm.model.trainable import Trainable
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.simulate import simulated_rank
from megatron_vlm.planning.data_parallel import count_step
from megatron_vlm.planning.flops import ModelFlops, visible_keys
from megatron_vlm.planning.hardware import GPUS
from megatron_vlm.planning.plan import exchanged_seconds, schedule_of, step_seconds
from megatron_vlm.planning.preflight import check_layout
from megatron_vlm.planning.recorder import fake_tensors
from megatron_vlm.planning.stages import fake_chunks
from megatron_vlm.planning.step_time import Clock, Seconds, spans_of
from megatron_vlm.planning.trace import ChunkCounts, Tracer

SAMPLES, MEDIAN, SIGMA, SEED = 288, 600, 1.0, 11  # fill 64 rows of 4,096 tokens, a step of the recipes, to 99.7 %
SHORTEST, LONGEST = 32, 4096
IMAGE_TOKENS, TEXT_BEFORE_IMAGE = 256, 8
WITH_IMAGE = 2  # every so many of the samples of which an image is less than half
GPU = "H100"
QUANTILES = 8


@dataclass(frozen=True)
class Case:
    """One way to put the samples into micro-batches, and these on ranks.

    Attributes:
        row_tokens: most tokens of a packed row; None for a row for each sample.
        micro_batch_size: rows of a micro-batch.
        context_size: context ranks.
    """

    title: str
    row_tokens: int | None = None
    micro_batch_size: int = 1
    context_size: int = 1


CASES = (
    Case("unpacked, one row"),
    Case("unpacked, four rows", micro_batch_size=4),
    Case("packed, 4,096", 4096),
    Case("packed, 32,768", 32_768),
    Case("packed, 32,768, CP2", 32_768, context_size=2),
    Case("packed, 32,768, CP4", 32_768, context_size=4),
)


@dataclass(frozen=True)
class Model:
    """A recipe: its configuration, the family and the model configuration that it trains, and its number of GPUs."""

    config: Config
    family: Family
    model_config: Any
    num_gpus: int

    @property
    def rules(self) -> PromptRules:
        """The family's prompt rules."""
        return self.family.prompt_rules(self.model_config)


def sample_lengths(count: int = SAMPLES) -> np.ndarray:
    """Return lognormal lengths in tokens, int64."""
    lengths = np.random.default_rng(SEED).lognormal(math.log(MEDIAN), SIGMA, count)
    return np.clip(lengths.astype(np.int64), SHORTEST, LONGEST)


def make_samples(model: Model, lengths: Sequence[int]) -> list[LoadedSample]:
    """Return samples of these lengths, all of them trained; every second one with room for it has an image.

    Pixels are left out: a trace makes them without memory (`_with_pixels`).
    """
    rules, samples, with_room = model.rules, [], 0
    assert rules.image_token_id is not None
    for number, length in enumerate(lengths):
        ids = np.ones(length, np.int64)
        media = []
        if length > 2 * (TEXT_BEFORE_IMAGE + IMAGE_TOKENS):
            with_room += 1
            if with_room % WITH_IMAGE == 0:
                ids[TEXT_BEFORE_IMAGE : TEXT_BEFORE_IMAGE + IMAGE_TOKENS] = rules.image_token_id
                media = [Medium("image", image_grid(model))]
        samples.append(LoadedSample(Sample(ids, np.ones(length, bool), media), 0, f"sample {number}"))
    return samples


def image_grid(model: Model) -> tuple[int, int, int]:
    """Return the grid of a square image that becomes `IMAGE_TOKENS` tokens."""
    vision = model.model_config.vision
    if hasattr(vision, "image_size"):
        side = vision.image_size // vision.patch_size
    else:
        side = math.isqrt(IMAGE_TOKENS) * vision.spatial_merge_size
    return 1, side, side


def make_micro_batches(model: Model, case: Case, samples: Sequence[LoadedSample], multiple: int) -> list[MicroBatch]:
    """Return the micro-batches of a step, packed rows in the order of the data ranks that take them.

    Args:
        model: the recipe.
        case: how samples are put into rows.
        samples: the samples.
        multiple: micro-batches have a multiple of this many positions per row.
    """
    rows: list[list[LoadedSample]] = [[sample] for sample in samples]
    if case.row_tokens is not None:
        lengths = np.array([len(sample.sample.input_ids) for sample in samples])
        rows = [[samples[item] for item in pack] for pack in best_fit_decreasing(lengths, case.row_tokens)]
    return [collate(part, model.rules, 0, multiple) for part in batched(rows, case.micro_batch_size)]


def layout_of(model: Model, case: Case, rows: int) -> tuple[Config, Layout]:
    """Return the recipe's configuration and layout for one step of these rows.

    Context ranks are made of data ranks, or come on top where the recipe has too few of these.
    """
    config, context = model.config, case.context_size
    ranks_of_a_copy = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    gpus = model.num_gpus if model.num_gpus % (ranks_of_a_copy * context) == 0 else model.num_gpus * context
    config = replace(
        config,
        parallel=replace(config.parallel, context_parallel_size=context),
        train=replace(config.train, global_batch_size=rows, micro_batch_size=case.micro_batch_size),
    )
    return config, check_layout(config, model.model_config, gpus)


@dataclass(frozen=True)
class Group:
    """Micro-batches of about one length.

    Attributes:
        traced: the one of them that is traced.
        members: indices of all of them in the step.
    """

    traced: MicroBatch
    members: list[int]


def groups_of(batches: Sequence[MicroBatch], costs: TokenCosts, quantiles: int = QUANTILES) -> list[Group]:
    """Group micro-batches by quantiles of their cost, padding included; the traced one is nearest to the group's mean.

    Args:
        batches: the micro-batches.
        costs: what positions and patches cost.
        quantiles: most groups.
    """
    cost = np.array(
        [costs.token * batch.labels.numel() + costs.patch * sum(map(math.prod, batch.grids)) for batch in batches]
    )
    groups = []
    for part in np.array_split(np.argsort(cost, kind="stable"), min(quantiles, len(batches))):
        nearest = part[np.abs(cost[part] - cost[part].mean()).argmin()]
        groups.append(Group(batches[nearest], part.tolist()))
    return groups


def pairs_of(batch: MicroBatch, window: int | None) -> int:
    """Return the pairs of a token and a key that it sees in a layer with this window."""
    return visible_keys(batch, batch.document_ids >= 0, window)


@dataclass
class Stage:
    """What a rank of a pipeline stage does in a step.

    Attributes:
        chunks: of each traced micro-batch, what each of its chunks does.
        gradients_seconds: what sums of gradients and gathers of parameters take.
        update_seconds: what the optimizer takes.
    """

    chunks: list[list[ChunkCounts]]
    gradients_seconds: float
    update_seconds: float


def trace_stage(
    model: Model, config: Config, layout: Layout, rank: int, clock: Clock, batches: Sequence[MicroBatch]
) -> Stage:
    """Trace micro-batches on the chunks of a rank."""
    sharding = context_sharding(layout, model.model_config, rank=0)
    tracer = Tracer()
    with simulated_rank(rank, layout) as groups, fake_tensors():
        chunks = fake_chunks(config, model.family, model.model_config, layout, groups)
        found = []
        for batch in batches:
            own = batch if sharding is None else shard_for_context(batch, sharding)
            own = _with_pixels(model, own).to(platform.current().device)
            found.append([tracer.trace(chunk, own) for chunk in chunks])
        step = count_step(config, chunks, groups)
    update = clock.update_seconds(max(step.dense_shards) + max(step.expert_shards))
    return Stage(found, exchanged_seconds(clock, step.exchanges, config), update)


def _with_pixels(model: Model, batch: MicroBatch) -> MicroBatch:
    """Return the micro-batch with the inputs of the vision tower; call it inside `fake_tensors`."""
    vision, num_images = model.model_config.vision, len(batch.media)
    if not num_images:
        return batch
    if hasattr(vision, "image_size"):
        shape = (num_images, vision.num_channels, vision.image_size, vision.image_size)
    else:
        shape = (num_images * math.prod(image_grid(model)), vision.patch_features)
    return replace(batch, media_inputs={"pixel_values": torch.empty(shape)})


def count(model: Model, case: Case, samples: Sequence[LoadedSample]) -> dict[str, Any]:
    """Return the figures of one case: of all ranks together, but for those that are named otherwise.

    Args:
        model: the recipe.
        case: how samples are put into rows, and these on ranks.
        samples: the samples of a step.
    """
    multiple = model.config.parallel.tensor_model_parallel_size if model.config.parallel.sequence_parallel else 1
    batches = make_micro_batches(model, case, samples, multiple)
    rows = sum(len(batch.labels) for batch in batches)
    config, layout = layout_of(model, case, rows)
    clock = Clock(GPUS[GPU], spans_of(layout, GPUS[GPU]))
    own_flops, costs = _own_flops(model, batches)
    groups = groups_of(batches, costs)
    largest = max(batches, key=lambda batch: (batch.labels.numel(), len(batch.media)))
    traced = [group.traced for group in groups]
    if not any(batch is largest for batch in traced):
        traced.append(largest)
    stride = layout.world_size // layout.pipeline_size
    stages = [
        trace_stage(model, config, layout, stage * stride, clock, traced) for stage in range(layout.pipeline_size)
    ]
    seconds = _seconds_of(groups, stages, layout, clock, len(batches))
    return {
        **_exact(model, batches, layout, own_flops),
        **_traced(groups, stages, layout),
        **_predicted(
            config, layout, stages, groups, clock, seconds, _slowest_to_mean(case, seconds, own_flops, layout)
        ),
    }


def _own_flops(model: Model, batches: Sequence[MicroBatch]) -> tuple[list[int], TokenCosts]:
    """Return what the model needs for each micro-batch, without padding and what is computed twice; and its parts."""
    alone = Layout.over(1, num_layers=len(model.model_config.text.layers))
    with simulated_rank(0, alone) as groups:
        flops = ModelFlops(model.family, model.model_config, Trainable(model.config.model.freeze), groups)
        return [int(flops.of(flops.lengths(batch))) for batch in batches], flops.token_costs()


def _exact(model: Model, batches: Sequence[MicroBatch], layout: Layout, own_flops: Sequence[int]) -> dict[str, Any]:
    """Return what is known of all micro-batches."""
    counters = sum((Counter(batch.counters) for batch in batches), Counter())
    positions = sum(len(batch.labels) * _row_positions(batch, layout) for batch in batches)
    windows = dict.fromkeys(window for window, _ in model.model_config.text.attention_kinds)
    return {
        "gpus": layout.world_size,
        "layout": str(layout),
        "samples": counters["samples"],
        "tokens": counters["real_tokens"],
        "label_tokens": counters["label_tokens"],
        "images": counters["images"],
        "rows": sum(len(batch.labels) for batch in batches),
        "micro_batches_per_data_rank": len(batches) / layout.data_size,
        "positions": positions,
        "padding_share": 1 - counters["real_tokens"] / positions,
        "model_flops": sum(own_flops),
        "pairs": {
            "all" if window is None else f"window {window}": sum(pairs_of(batch, window) for batch in batches)
            for window in windows
        },
    }


def _row_positions(batch: MicroBatch, layout: Layout) -> int:
    """Return the positions of a row over all context ranks, which are equally many on each."""
    length = batch.labels.shape[1]
    return padded_length(length, layout.context_size, layout.sequence_shards) if layout.context_size > 1 else length


def _traced(groups: Sequence[Group], stages: Sequence[Stage], layout: Layout) -> dict[str, Any]:
    """Return what the traces say: FLOPs of all ranks, and of one rank of the pipeline stage that has most the rest."""
    flops, launches, peaks = 0, list[int](), list[int]()
    sent: list[Counter[str]] = []
    for stage in stages:
        of_stage: Counter[str] = Counter()
        launched = 0
        for group, chunks in zip(groups, stage.chunks, strict=False):  # the largest may come behind
            for chunk in chunks:
                flops += len(group.members) * chunk.total.flops.total()
                launched += len(group.members) * chunk.total.launches.total()
                for (_, name), num_bytes in chunk.total.sent_bytes.items():
                    of_stage[name] += len(group.members) * num_bytes
        launches.append(launched)
        sent.append(of_stage)
        peaks += [
            chunk.received_bytes + max(chunk.total.forward_peak_bytes, chunk.total.backward_peak_bytes)
            for chunks in stage.chunks
            for chunk in chunks
        ]
    names = dict.fromkeys(name for of_stage in sent for name in of_stage)
    return {
        "traced_micro_batches": len(stages[0].chunks),
        "positions_of_traced": sum(len(group.members) * group.traced.labels.numel() for group in groups),
        "images_of_traced": sum(len(group.members) * len(group.traced.media) for group in groups),
        "flops": flops * layout.tensor_size * layout.context_size,
        "launches_per_rank": max(launches) / layout.data_size,
        "sent_bytes_per_rank": {name: max(each[name] for each in sent) / layout.data_size for name in names},
        "peak_activation_bytes": max(peaks),
    }


def _seconds_of(
    groups: Sequence[Group], stages: Sequence[Stage], layout: Layout, clock: Clock, num_micro_batches: int
) -> list[list[Seconds]]:
    """Return the time of every micro-batch on every chunk, in global order of the chunks."""
    found: list[list[Seconds]] = [[] for _ in range(num_micro_batches)]
    for number, group in enumerate(groups):
        chunks = [
            stages[chunk % layout.pipeline_size].chunks[number][chunk // layout.pipeline_size]
            for chunk in range(len(layout.chunks))
        ]
        seconds = [clock.seconds(chunk.total) for chunk in chunks]
        for member in group.members:
            found[member] = seconds
    return found


def _predicted(
    config: Config,
    layout: Layout,
    stages: Sequence[Stage],
    groups: Sequence[Group],
    clock: Clock,
    seconds: Sequence[Sequence[Seconds]],
    slowest_to_mean: float,
) -> dict[str, Any]:
    """Return the time of a step in which every micro-batch takes the mean of all; then with waits of data ranks."""
    means = [sum(of_chunk, start=Seconds()).times(1 / len(seconds)) for of_chunk in zip(*seconds, strict=True)]
    mean_bytes = np.zeros(len(layout.chunks))
    for number, group in enumerate(groups):
        for chunk in range(len(layout.chunks)):
            traced = stages[chunk % layout.pipeline_size].chunks[number][chunk // layout.pipeline_size]
            mean_bytes[chunk] += traced.returned_bytes * len(group.members) / len(seconds)
    num_micro_batches = config.train.num_micro_batches(layout.data_size)
    schedule = schedule_of(clock, means, mean_bytes.astype(np.int64).tolist(), layout, num_micro_batches)
    gradients, update = (
        max(stage.gradients_seconds for stage in stages),
        max(stage.update_seconds for stage in stages),
    )
    step = step_seconds(schedule, means, layout, num_micro_batches, gradients, update)
    return {
        "step_seconds": step.total,
        "waited_seconds": step.total + schedule.total * (slowest_to_mean - 1),
        "computing_seconds": step.computing,
        "exchanging_seconds": step.exchanging,
        "bubble_seconds": step.waiting,
        "gradients_and_update_seconds": step.gradients + step.update,
        "slowest_to_mean": slowest_to_mean,
    }


def _slowest_to_mean(
    case: Case, seconds: Sequence[Sequence[Seconds]], own_flops: Sequence[int], layout: Layout
) -> float:
    """Return how much longer the passes take where data ranks wait for each other: once per step, or in every layer.

    They wait in every layer where experts are spread over them.
    """
    total = np.array([sum(of_chunk.total for of_chunk in of_batch) for of_batch in seconds])
    costs = np.array(own_flops, np.int64) if case.row_tokens is not None else None
    ranks = np.array(assign(len(total), layout.data_size, 1, costs).packs)
    of_ranks = total[ranks]  # [data ranks, micro-batches]
    spread = layout.expert_size > layout.tensor_size * layout.context_size
    slowest = of_ranks.max(0).sum() if spread else of_ranks.sum(1).max()
    return float(slowest / of_ranks.sum(1).mean())
