"""The planner behind `tools/plan.py`: from a configuration and a number of GPUs to the layouts that a search finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vlm.config import Config
from megatron_vlm.errors import ConfigError, UserError, combine
from megatron_vlm.families import registry
from megatron_vlm.planning.hardware import Hardware
from megatron_vlm.planning.plan import Request
from megatron_vlm.planning.preflight import check_layout
from megatron_vlm.planning.search import Progress, Search, SearchResult

MOST_GPUS = 16_384
_MOST_MEDIA = 10_000.0


def make_request(
    config: Config,
    hardware: Hardware,
    num_gpus: int,
    images_per_row: float | None,
    clips_per_row: float | None,
    headroom: float,
    model_directory: str | None = None,
) -> Request:
    """Return what is to be planned for.

    Args:
        config: a validated configuration.
        hardware: the GPUs and their nodes.
        num_gpus: number of GPUs.
        images_per_row: images in an average row; None for one, if the model takes images.
        clips_per_row: clips of audio in an average row; None for one, if the model takes audio.
        headroom: part of a GPU's memory that must stay free.
        model_directory: directory with config.json; that of the configuration if None.

    Raises:
        ConfigError: a number is out of its range, the model does not take a medium, or cannot be read.
    """
    ranges = {
        "--gpus": (num_gpus, 1, MOST_GPUS),
        "--images_per_row": (1.0 if images_per_row is None else images_per_row, 0, _MOST_MEDIA),
        "--clips_per_row": (1.0 if clips_per_row is None else clips_per_row, 0, _MOST_MEDIA),
        "--headroom": (headroom, 0, 0.9),
    }
    problems: list[UserError] = [
        ConfigError(f"{name} is {value:g}", fix=f"give a number from {least} to {most:g}")
        for name, (value, least, most) in ranges.items()
        if not least <= value <= most
    ]
    if config.train.precision != "bf16":
        problems.append(
            ConfigError(
                f"train.precision is {config.train.precision}, and speeds are known for bf16 only",
                fix="set train.precision to bf16; for the memory of fp32, use --dry_run",
            )
        )
    if problems:
        raise combine(ConfigError, problems)
    hf_config = registry.load_hf_config(model_directory or config.model.hf_path)
    family = registry.detect(hf_config)
    model_config = family.config_from_hf(hf_config, config.model.text_only, config.model.image_mask)
    for name, given, what, taken in (
        ("--images_per_row", images_per_row, "images", model_config.vision is not None),
        ("--clips_per_row", clips_per_row, "audio", model_config.audio is not None),
    ):
        if given and not taken:
            raise ConfigError(f"{name} is {given:g}, but the model takes no {what}", fix=f"leave {name} out")
    images, clips = ranges["--images_per_row"][0], ranges["--clips_per_row"][0]
    return Request(config, family, model_config, hardware, num_gpus, images, clips, headroom)


def published_directory(path: Path) -> Path | None:
    """Return the directory with the config.json of a recipe's model, which lies beside the recipes; None without."""
    directory = path.parent / "models" / path.stem
    return directory if (directory / "config.json").is_file() else None


def search_layouts(
    request: Request, fixed: Mapping[str, Any], num_plans: int, progress: Progress = lambda line: None
) -> SearchResult:
    """Search for the best layouts.

    Args:
        request: what is planned for.
        fixed: settings that the user chose, by dotted key.
        num_plans: number of layouts to return.
        progress: called with a line from time to time.

    Raises:
        ConfigError: nothing fits; says what comes closest, and what to change.
    """
    if num_plans < 1:
        raise ConfigError(f"--plans is {num_plans}", fix="give a number of at least 1")
    result = Search(request, fixed, progress).run(num_plans)
    if not result.plans:
        raise _nothing_fits(request, result)
    return result


def _nothing_fits(request: Request, result: SearchResult) -> ConfigError:
    """Say what comes closest, and what to change."""
    closest, usable_gib = result.closest, request.usable_bytes / 2**30
    if closest is None:
        if not result.ruled_out:  # nothing could be tried: what is fixed does not go with the number of GPUs
            try:
                check_layout(request.config, request.model_config, request.num_gpus)
            except UserError as error:
                return ConfigError(f"no layout of {request.num_gpus} GPUs is possible: {error}")
        reasons = "; ".join(entry.reason for entry in result.ruled_out[:3])
        is_memory = any("alone exceed" in entry.reason for entry in result.ruled_out)
        fix = "use more GPUs, or GPUs with more memory" if is_memory else "change the number of GPUs or what is fixed"
        return ConfigError(f"no layout of {request.num_gpus} GPUs is possible: {reasons}", fix=fix)
    most, fixed = closest.most_bytes / 2**30, closest.fixed_bytes / 2**30
    virtual = f" in {closest.layout.virtual_size} chunks each" if closest.layout.virtual_size > 1 else ""
    if closest.fixed_bytes > request.usable_bytes:
        needed = -(-request.num_gpus * closest.fixed_bytes // int(request.usable_bytes))
        fix = f"use about {needed:,} GPUs, GPUs with more memory, or model.freeze"
    else:
        fix = (
            "use more GPUs, GPUs with more memory, shorter rows (data.seq_length), fewer pixels (data.max_pixels), or "
            "model.freeze"
        )
    return ConfigError(
        f"no layout of {request.num_gpus} GPUs fits into {usable_gib:.1f} GiB each; closest is {closest.layout}"
        f"{virtual} with recompute {closest.config.model.recompute}, which takes {most:.1f} GiB, {fixed:.1f} GiB of it "
        "parameters, gradients and optimizer state",
        fix=fix,
    )


def settings_of(config: Config, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return settings of a configuration by dotted key."""
    sections = dataclasses.asdict(config)
    return {key: sections[key.partition(".")[0]][key.partition(".")[2]] for key in keys}
