"""What a start says on the console, and what it keeps of itself in `run_dir/starts.jsonl`."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform as machine
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed

from megatron_vlm import platform
from megatron_vlm.config import Config, changed_settings, to_dict
from megatron_vlm.data.loader import BatchLoader
from megatron_vlm.data.plan import BatchPlan
from megatron_vlm.errors import CheckpointError, ConfigError
from megatron_vlm.files.config_files import read_config_file
from megatron_vlm.model.trainable import Trainable
from megatron_vlm.model_configs import VisionLanguageConfig
from megatron_vlm.parallel.placement import Node, describe_placement
from megatron_vlm.training.setup import Run
from vlm_kernels.span_attention import transformer_engine

_PACKAGES = ("megatron-vlm", "torch", "megatron-core", "transformers", "safetensors", "numpy")
# What schedulers and launchers call a start.
_JOB_VARIABLES = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_NODELIST")
STARTS_NAME = "starts.jsonl"


def environment(nodes: Sequence[Node]) -> dict[str, Any]:
    """Describe what this process runs on: host, command, job, versions, commit, devices.

    Args:
        nodes: the nodes of the run.
    """
    current = platform.current()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "command": shlex.join([sys.executable, *sys.argv]),
        "job": {name: os.environ[name] for name in _JOB_VARIABLES if name in os.environ},
        "versions": {"python": machine.python_version()} | {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "device": current.device_name,
        "driver": current.driver_version,
        "ranks": torch.distributed.get_world_size(),
        "nodes": len(nodes),
    }


def record_start(run_dir: Path, described: Mapping[str, Any], step: int, config: Config) -> None:
    """Append this start, with its configuration, to the run's `starts.jsonl`.

    Args:
        run_dir: the run's folder.
        described: the result of `environment`.
        step: step after which the start goes on.
        config: the configuration.
    """
    with (run_dir / STARTS_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps({**described, "after_step": step, "config": to_dict(config)}) + "\n")


def banner(run: Run, described: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a start says: versions, devices, model, layout, data, schedule, and where it writes.

    Args:
        run: what was set up.
        described: the result of `environment`.
    """
    versions, config, commit = described["versions"], run.config, described["commit"]
    others = ", ".join(f"{name} {versions[name]}" for name in ("torch", "megatron-core", "transformers", "python"))
    yield f"megatron_vlm {versions['megatron-vlm']}{f' ({commit})' if commit else ''}, {others}"
    nodes = run.nodes
    yield f"device    {described['ranks']} x {described['device']} on {len(nodes)} node{'s' * (len(nodes) > 1)}"
    yield f"model     {config.model.hf_path}: {run.family.name}, {run.model_config.media}, {_parameters(run)}"
    yield f"layout    {run.layout}"
    yield from describe_placement(run.layout, nodes)
    yield from run.group_report
    yield f"data      train: {_sources(run.train_loader)}"
    if run.valid_loader is not None:
        yield f"          valid: {_sources(run.valid_loader)}"
    yield f"schedule  {_schedule(config, run.train_loader.plan)}"
    if platform.current().accelerated:
        yield f"kernels   {kernels(config, run.model_config, run.adam)}"
    interval = config.checkpoint.save_interval
    saves = (
        f"a checkpoint every {interval} steps and after the last" if interval else "a checkpoint after the last step"
    )
    export = f"; export to {config.checkpoint.export_hf}" if run.due_export and config.checkpoint.export_hf else ""
    yield f"writes    {config.run_dir}: {saves}{export}"


def kernels(config: Config, model_config: VisionLanguageConfig, adam: str) -> str:
    """Return in words what of NVIDIA's libraries a run on a GPU uses.

    Args:
        config: the configuration.
        model_config: the family's configuration of the model.
        adam: whose Adam megatron-core's optimizers use.
    """
    backend, names = config.model.attention_backend, {"transformer_engine": "Transformer Engine", "apex": "apex"}
    text = f"attention: {backend}"
    if backend == "transformer_engine":
        sizes = [layer.head_dim for layer in model_config.text.layers]
        taken = sum(map(transformer_engine.has_head_size, sizes))
        text = (
            f"attention: Transformer Engine in {taken} of {len(sizes)} decoder layers where no image sees ahead, "
            "FlexAttention elsewhere"
        )
    return text if config.optimizer.name == "sgd" else f"{text}; Adam: {names.get(adam, adam)}"


def _parameters(run: Run) -> str:
    weight_map = run.family.weight_map(run.model_config)
    sizes = {name: math.prod(weight.padded_shape) for name, weight in weight_map.items()}
    trainable = Trainable(run.config.model.freeze, weight_map.buffers)
    trained = sum(size for name, size in sizes.items() if trainable.trains(name))
    amount = f"{trained / 1e6:,.1f} M" if run.config.model.freeze else "all"
    return f"{sum(sizes.values()) / 1e6:,.1f} M parameters, {amount} trained"


def _sources(loader: BatchLoader) -> str:
    pairs = zip(loader.source_names, loader.plan.sources, strict=True)
    total = sum(source.weight for source in loader.plan.sources)
    many = len(loader.source_names) > 1
    parts = [
        f"{name} {source.num_rows:,} rows" + (f" ({source.weight / total:.0%})" if many else "")
        for name, source in pairs
    ]
    return ", ".join(parts)


def _schedule(config: Config, plan: BatchPlan) -> str:
    train, optimizer, each = config.train, config.optimizer, plan.samples_per_pack
    passes = train.train_iters * train.global_batch_size * each / plan.num_rows
    rows = f"{train.global_batch_size} rows = {passes:.2f}"
    if config.data.packing:
        rows = f"{train.global_batch_size} packed rows of {each:.1f} samples in the mean = about {passes:.2f}"
    text = f"{train.train_iters:,} steps of {rows} passes; {optimizer.name}, lr {optimizer.lr:g} {optimizer.schedule}"
    return text + (f" after {optimizer.warmup_iters} steps of warm-up" if optimizer.warmup_iters else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the checkout that this code is in, "+" behind it where files differ; None elsewhere."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def changes_since(path: Path, config: Config) -> list[str]:
    """Return the settings that differ from those in a run's file, in words.

    Raises:
        CheckpointError: the file is damaged.
    """
    fix = "remove the file; the run then goes on without telling which settings changed"
    try:
        return list(changed_settings(read_config_file(str(path)).content, to_dict(config)))
    except ConfigError as error:
        raise CheckpointError(f"damaged: {error.what}", error.where, fix) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"damaged: {error}", str(path), fix) from None
