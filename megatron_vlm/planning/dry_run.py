"""`--dry_run`: check everything that a run will need and show what it will do, without a GPU and without torchrun.

The checks do not depend on one another where they need not, and their problems are reported together.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vlm import platform
from megatron_vlm.checkpoint.run_folder import (
    CHECKPOINTS_NAME,
    Manifest,
    find_checkpoint,
    newest_complete,
    step_folder,
)
from megatron_vlm.checkpoint.torch_dist import TorchDistReader
from megatron_vlm.config import Config
from megatron_vlm.conversion.convert import identity_of
from megatron_vlm.data.describe import LengthCheck, RowCheck, check_lengths, check_rows, describe_samples
from megatron_vlm.data.packing import samples_per_pack
from megatron_vlm.data.rows import reader_for
from megatron_vlm.data.rules import PromptRules
from megatron_vlm.errors import ConfigError, UserError, combine
from megatron_vlm.families import registry
from megatron_vlm.model.trainable import Trainable
from megatron_vlm.model.weight_map import WeightMap
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.planning.expert_checks import experts_of, fewest_ranks
from megatron_vlm.planning.memory import (
    estimate_memory,
    format_boundaries,
    format_communication,
    format_memory,
)
from megatron_vlm.planning.preflight import (
    check_export,
    check_layout,
    check_run_dir,
    check_space,
    check_weights,
)

SAMPLES_SHOWN = 3
ROWS_MEASURED = 64  # of each source


@dataclass
class _Report:
    """Prints what is found and keeps the problems for the end."""

    say: Callable[[str], None]
    problems: list[UserError] = field(default_factory=list)

    def attempt(self, check: Callable[[], str]) -> None:
        """Run one check and print its finding, or keep its problem."""
        try:
            self.say(check())
        except UserError as problem:
            self.problems.append(problem)


def dry_run(config: Config, say: Callable[[str], None] = print) -> int:
    """Check a run and describe it.

    Args:
        config: a validated configuration.
        say: called with every line of output; prints it by default.

    Returns:
        0, which means that everything is in order.

    Raises:
        UserError: lists all problems found.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        return 0  # under torchrun the first rank reports for all
    platform.initialize("cpu")  # the tensors that are counted need no device
    hf_config = registry.load_hf_config(config.model.hf_path)
    family = registry.detect(hf_config)
    model_config = family.config_from_hf(hf_config, config.model.text_only, config.model.image_mask)
    weight_map = family.weight_map(model_config)
    shapes = {name: weight.padded_shape for name, weight in weight_map.items()}
    say(f"model     {config.model.hf_path}: {family.name}, {model_config.media}, {_millions(shapes)} parameters")

    report = _Report(say)
    layouts: list[Layout] = []
    checks: list[RowCheck] = []
    lengths: list[LengthCheck] = []
    report.attempt(lambda: _describe_layout(config, model_config, weight_map, layouts))
    report.attempt(lambda: check_weights(config, weight_map))
    report.attempt(lambda: _check_load(config, family, model_config))
    report.attempt(lambda: _check_places(config))
    report.attempt(lambda: check_space(config, weight_map))
    report.attempt(lambda: _check_data(config, family.prompt_rules(model_config), checks))
    if checks:
        report.attempt(lambda: _check_lengths(config, family.prompt_rules(model_config), lengths))
    if lengths:
        say(f"length    {_describe_length(config, checks[0], lengths[0])}")
    if layouts:
        media_per_row = _media_per_row(checks[0], _samples_per_row(config, lengths)) if checks else (1.0, 1.0)
        report.attempt(lambda: _describe_memory(config, family, model_config, layouts[0], media_per_row))
    if checks:
        report.attempt(lambda: describe_samples(config, family.prompt_rules(model_config), SAMPLES_SHOWN))
    if report.problems:
        first = report.problems[0]
        raise first if len(report.problems) == 1 else combine(ConfigError, report.problems)
    say("dry run: everything is in order")
    return 0


def _media_per_row(check: RowCheck, samples: float) -> tuple[float, float]:
    """Return the images and the clips of audio in an average row of the batch, which has so many samples.

    Images are infinitely many where there are videos, each of which may fill its row.
    """
    if not check.rows:
        return 1.0, 1.0
    each = samples / check.rows
    return math.inf if check.videos else check.images * each, check.audio_clips * each


def _samples_per_row(config: Config, lengths: Sequence[LengthCheck]) -> float:
    """Return the samples in an average row of the batch, by the lengths of some rows of the training data."""
    return samples_per_pack(lengths[0].lengths, config.data.seq_length) if config.data.packing and lengths else 1.0


def _millions(shapes: dict[str, tuple[int, ...]]) -> str:
    return f"{sum(map(math.prod, shapes.values())) / 1e6:,.1f} M"


def world_size_to_check(config: Config) -> int:
    """Return the ranks to check for: `WORLD_SIZE` when set, else the fewest that hold one copy of the model."""
    given = os.environ.get("WORLD_SIZE", str(fewest_ranks(config)))
    if not given.isdigit() or int(given) < 1:
        raise ConfigError(f"the environment variable WORLD_SIZE is {given!r}", fix="set it to a number of ranks")
    return int(given)


def _describe_layout(config: Config, model_config: Any, weight_map: WeightMap, layouts: list[Layout]) -> str:
    shapes, buffers = {name: weight.padded_shape for name, weight in weight_map.items()}, weight_map.buffers
    layout = check_layout(config, model_config, world_size_to_check(config), shapes, buffers)
    layouts.append(layout)
    num_micro_batches = config.train.num_micro_batches(layout.data_size)
    rows = "packed rows" if config.data.packing else "rows"
    lines = [
        f"layout    {layout} (set WORLD_SIZE to check another number of ranks)",
        f"batch     {config.train.global_batch_size} {rows} = {num_micro_batches} micro-batches "
        f"x {config.train.micro_batch_size} {rows} x {layout.data_size} data-parallel ranks",
    ]
    lines += _describe_experts(config, model_config, layout)
    for chunk in range(len(layout.chunks)):
        held = ", ".join(_held_parts(model_config, layout, chunk))
        lines.append(f"  chunk {chunk} on pipeline rank {chunk % layout.pipeline_size}: {held}")
    if config.model.freeze:
        trainable = Trainable(config.model.freeze, buffers)
        trained = {name: shape for name, shape in shapes.items() if trainable.trains(name)}
        lines.append(f"frozen    all but {len(trained)} of {len(shapes)} tensors, {_millions(trained)} parameters")
    return "\n".join(lines)


def _held_parts(model_config: Any, layout: Layout, chunk: int) -> Iterator[str]:
    """Yield what a chunk holds."""
    tower, layers = layout.tower_layers(chunk, model_config.num_tower_layers), layout.chunks[chunk]
    if tower is not None and "vision_tower" in model_config.parts:
        part = f" layers {tower.start}-{tower.stop - 1}" if tower else " without layers"
        yield f"vision_tower{part}" if layout.tower_counts else "vision_tower"
    if chunk == layout.embedding_chunk:
        yield from (part for part in model_config.parts if part not in ("language_model", "vision_tower"))
        yield "embedding"
    if chunk >= layout.embedding_chunk:
        yield f"layers {layers[0]}-{layers[-1]}" if layers else "no layers"
    if chunk == len(layout.chunks) - 1:
        yield "head"


def _describe_experts(config: Config, model_config: Any, layout: Layout) -> list[str]:
    """Describe each kind of layer with experts in one line."""
    kinds = Counter(moe for layer in model_config.text.layers if (moe := experts_of(layer)) is not None)
    return [
        f"experts   {moe.num_experts} in each of {count} layers, {moe.top_k} per token; a rank holds "
        f"{moe.num_experts // layout.expert_size} of them, {moe.intermediate_size // layout.expert_tensor_size} of "
        f"{moe.intermediate_size} wide; dispatcher {config.parallel.moe_token_dispatcher_type}, load balancing "
        f"{config.model.moe_load_balancing}"
        for moe, count in kinds.items()
    ]


def _describe_memory(
    config: Config, family: registry.Family, model_config: Any, layout: Layout, media_per_row: tuple[float, float]
) -> str:
    estimate = estimate_memory(config, family, model_config, layout, *media_per_row)
    lines = ["memory", *(f"  {line}" for line in format_memory(estimate))]
    sent = [f"  {line}" for line in (*format_communication(estimate), *format_boundaries(estimate))]
    return "\n".join([*lines, "sent by a rank", *sent] if sent else lines)


def _check_load(config: Config, family: registry.Family, model_config: Any) -> str:
    """Compare the checkpoint of `checkpoint.load` with the model, as `load_weights` does."""
    if config.checkpoint.load is None:
        return "load      nothing (checkpoint.load is null)"
    folder = find_checkpoint(config.checkpoint.load)
    Manifest.read(folder).identity.check_family(identity_of(config.model.hf_path, family.name, model_config), folder)
    with TorchDistReader(folder) as reader:
        family.weight_map(model_config).check_stored(reader.shapes, str(folder))
    return f"load      {folder}, names and shapes fit the model"


def _check_places(config: Config) -> str:
    """Check the folders that the run writes."""
    check_run_dir(config)
    lines = [f"run_dir   {config.run_dir}"]
    step, incomplete = newest_complete(Path(config.run_dir) / CHECKPOINTS_NAME)
    lines += [f"  checkpoint {reason}" for reason in incomplete]
    if step is None:
        lines[0] += " (a new run)"
    else:
        Manifest.read(step_folder(Path(config.run_dir) / CHECKPOINTS_NAME, step))
        lines[0] += f" (resumes after step {step})"
    if check_export(config):
        lines.append(f"export    {config.checkpoint.export_hf} after the last step")
    return "\n".join(lines)


def _check_data(config: Config, rules: PromptRules, checks: list[RowCheck]) -> str:
    """Check that every row parses and every image file exists."""
    lines = []
    for key, sources in (("train", config.data.train), ("valid", config.data.valid)):
        if not sources:
            continue
        reader = reader_for(config, sources, rules)
        if not checks:
            lines += [f"note      {note}" for note in reader.builder.notes]
        check = check_rows(reader)
        checks.append(check)
        lines.append(f"data      {key}: {check}")
        lines += [f"  {line}" for line in (*check.problems, *check.notes)]
    return "\n".join(lines)


def _check_lengths(config: Config, rules: PromptRules, checks: list[LengthCheck]) -> str:
    """Check on a sample of the rows that enough of them fit into data.seq_length."""
    lines = []
    for key, sources in (("train", config.data.train), ("valid", config.data.valid)):
        if sources:
            checks.append(check_lengths(reader_for(config, sources, rules), ROWS_MEASURED))
            lines.append(f"lengths   {key}: {checks[-1]}")
    return "\n".join(lines)


def _describe_length(config: Config, rows: RowCheck, lengths: LengthCheck) -> str:
    """Describe how long the run is."""
    samples, steps = _samples_per_row(config, [lengths]), config.train.train_iters
    passes = steps * config.train.global_batch_size * samples / max(1, rows.rows)
    if not config.data.packing:
        return f"{steps} steps = {passes:.2f} passes over the training rows"
    return f"{steps} steps = about {passes:.2f} passes over the training rows, about {samples:.1f} in a packed row"
