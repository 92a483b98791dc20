"""Check a run before it costs anything: can the model be split over the ranks, and does everything named exist?

Every check collects its problems, so that one start reports all that is wrong.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_vlm.checkpoint.float8 import open_weights
from megatron_vlm.checkpoint.run_folder import check_in_the_way, read_json
from megatron_vlm.config import Config
from megatron_vlm.config_checks import divisors, nearest_multiples
from megatron_vlm.conversion.convert import check_tied_copies
from megatron_vlm.conversion.passthrough import describe, describe_unread
from megatron_vlm.errors import ConfigError, LaunchError, UserError, combine
from megatron_vlm.files.durable import check_export_target
from megatron_vlm.files.small_files import replace_durably
from megatron_vlm.model.trainable import Trainable, part_of
from megatron_vlm.model.weight_map import WeightMap
from megatron_vlm.model_configs import TowerConfig, VisionLanguageConfig
from megatron_vlm.parallel.layout import Layout, assign_layers, tower_chunks
from megatron_vlm.planning.expert_checks import expert_problems, expert_rank_problems
from megatron_vlm.planning.state_bytes import FP32_BYTES, optimizer_bytes, value_bytes

EXPORT_RECORD = "exported.json"
LARGEST_TENSOR_SIZE = 64  # vocabulary rows are padded to a multiple of it


def check_layout(
    config: Config,
    model_config: VisionLanguageConfig,
    world_size: int,
    names: Iterable[str] | None = None,
    buffers: Collection[str] = (),
) -> Layout:
    """Split the model and the global batch over the ranks.

    Args:
        config: a validated configuration.
        model_config: the family's configuration of the model (`.parts`, `.text`, `.vision`).
        world_size: number of ranks that run.
        names: names of the model's parameters, to check `model.freeze` and `optimizer.lr_multipliers`; None skips that.
        buffers: those of them that never train.

    Returns:
        The layout.

    Raises:
        ConfigError: lists every size that does not split evenly, with values that would.
        LaunchError: only the number of ranks is wrong.
    """
    parallel = config.parallel
    problems: list[UserError] = [*_tensor_problems(config, model_config), *expert_problems(config, model_config)]
    # With a wrong number of ranks the data-parallel size is unknown, so neither batch nor experts can be judged.
    problems += list(_world_problems(config, world_size)) or [
        *_batch_problems(config, world_size),
        *expert_rank_problems(config, world_size),
    ]
    if names is not None:
        problems += _name_problems(config, list(names), buffers)
    problems += _tower_problems(config, model_config)
    try:
        tower_counts = tower_chunks(
            parallel.vision_pipeline_layout,
            parallel.pipeline_model_parallel_size * parallel.virtual_pipeline_model_parallel_size,
        )
        chunks = assign_layers(
            len(model_config.text.layers),
            parallel.pipeline_model_parallel_size,
            parallel.virtual_pipeline_model_parallel_size,
            parallel.pipeline_layout,
            tower_counts,
        )
    except ConfigError as problem:
        problems.append(problem)
    if problems:
        raise problems[0] if len(problems) == 1 else combine(ConfigError, problems)
    return Layout(
        tensor_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_size=parallel.pipeline_model_parallel_size,
        context_size=parallel.context_parallel_size,
        data_size=world_size // _model_ranks(config),
        expert_size=parallel.expert_model_parallel_size,
        expert_tensor_size=parallel.expert_tensor_parallel_size,
        chunks=tuple(map(tuple, chunks)),
        tower_counts=tower_counts,
    )


def _model_ranks(config: Config) -> int:
    """Return the number of ranks that hold one copy of the model."""
    parallel = config.parallel
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size


def _tower_problems(config: Config, model_config: VisionLanguageConfig) -> Iterator[ConfigError]:
    """Check the layout of the vision tower against its number of layers."""
    counts, num_layers = config.parallel.vision_pipeline_layout, model_config.num_tower_layers
    if counts is not None and not num_layers:
        yield ConfigError(
            "parallel.vision_pipeline_layout is given, but the model has no layers of a vision tower",
            fix="set it to null",
        )
    elif counts is not None and sum(counts) != num_layers:
        yield ConfigError(
            f"parallel.vision_pipeline_layout {counts} sums to {sum(counts)}, the vision tower has {num_layers} layers",
            fix=f"give numbers of at least 0 that sum to {num_layers}",
        )


def _world_problems(config: Config, world_size: int) -> Iterator[UserError]:
    parallel, model_ranks = config.parallel, _model_ranks(config)
    if world_size % model_ranks or world_size < model_ranks:
        yield LaunchError(
            f"{world_size} ranks are not a multiple of {model_ranks} = tensor {parallel.tensor_model_parallel_size} "
            f"x pipeline {parallel.pipeline_model_parallel_size} x context {parallel.context_parallel_size}",
            fix=f"start {nearest_multiples(world_size, model_ranks)} ranks (torchrun --nproc-per-node), "
            "or change the parallel sizes",
        )


def _batch_problems(config: Config, world_size: int) -> Iterator[UserError]:
    """Check the global batch against the data-parallel size and the interleaved schedule."""
    parallel, train = config.parallel, config.train
    data_size = world_size // _model_ranks(config)
    rows = train.micro_batch_size * data_size
    if train.global_batch_size % rows:
        yield ConfigError(
            f"train.global_batch_size {train.global_batch_size} is not a multiple of {rows} = "
            f"micro_batch_size {train.micro_batch_size} x data-parallel size {data_size}",
            fix=f"use {nearest_multiples(train.global_batch_size, rows)}",
        )
        return
    num_micro_batches, pipeline = train.global_batch_size // rows, parallel.pipeline_model_parallel_size
    if parallel.virtual_pipeline_model_parallel_size > 1 and num_micro_batches % pipeline:
        yield ConfigError(
            f"{num_micro_batches} micro-batches per step are not a multiple of the pipeline size {pipeline}, "
            "which virtual_pipeline_model_parallel_size > 1 needs",
            fix=f"use a global_batch_size of {nearest_multiples(train.global_batch_size, rows * pipeline)}",
        )


def _tensor_problems(config: Config, model_config: VisionLanguageConfig) -> Iterator[UserError]:
    """Check heads, feed-forward columns and vocabulary rows against the tensor-parallel size."""
    size = config.parallel.tensor_model_parallel_size
    if size == 1:
        return
    if LARGEST_TENSOR_SIZE % size:
        yield ConfigError(
            f"parallel.tensor_model_parallel_size {size} does not divide the padded vocabulary "
            f"(a multiple of {LARGEST_TENSOR_SIZE} rows)",
            fix=f"use {divisors(LARGEST_TENSOR_SIZE, LARGEST_TENSOR_SIZE)}",
        )
    divided: dict[tuple[str, int], None] = {}  # ordered, without the repetition of equal layers
    for layer in model_config.text.layers:
        divided[("attention heads", layer.num_attention_heads)] = None
        if layer.moe is None or layer.moe_beside_dense:
            divided[("feed-forward size", layer.intermediate_size)] = None
    divided |= dict.fromkeys(model_config.text.sharded_sizes.items())
    vision = model_config.vision
    if vision is not None and config.model.vision_parallelism == "tensor":
        if isinstance(vision, TowerConfig):
            divided[("vision attention heads", vision.num_attention_heads)] = None
            divided[("vision feed-forward size", vision.intermediate_size)] = None
        else:
            divided[("vision embedding size", vision.hidden_size)] = None
        # A projector of a single linear layer is split along the language model's hidden size.
        projector_size = getattr(vision, "projector_hidden_size", model_config.text.hidden_size)
        divided[("vision projector size", projector_size)] = None
    if model_config.audio is not None:
        divided |= dict.fromkeys(model_config.audio.sharded_sizes.items())
        divided[("audio projector size", model_config.text.hidden_size)] = None
    for name, number in divided:
        if number % size:
            remedy = f"use {divisors(number, LARGEST_TENSOR_SIZE)}"
            if name.startswith("vision"):
                remedy += ", or model.vision_parallelism data"
            yield ConfigError(
                f"{name} {number} cannot be divided over parallel.tensor_model_parallel_size {size}", fix=remedy
            )
    for heads in dict.fromkeys(layer.num_key_value_heads for layer in model_config.text.layers):
        if heads % size and size % heads:
            yield ConfigError(
                f"key-value heads {heads} neither divide nor are a multiple of "
                f"parallel.tensor_model_parallel_size {size}",
                fix=f"use {divisors(heads, LARGEST_TENSOR_SIZE)}, or a multiple of {heads} "
                "(its heads are then replicated)",
            )


def _name_problems(config: Config, names: list[str], buffers: Collection[str]) -> Iterator[UserError]:
    """Check the parts and parameters that the configuration names against those of the model."""
    yield from Trainable(config.model.freeze, buffers).problems(names)
    parts = sorted(set(map(part_of, names)))
    for part in config.optimizer.lr_multipliers:
        if part not in parts:
            yield ConfigError(
                f"optimizer.lr_multipliers names {part}, which the model does not have",
                fix=f"this model has {', '.join(parts)}",
            )


def check_run_dir(config: Config) -> None:
    """Make sure that the run folder can be written, without creating it, and that nothing is in the way there.

    Raises:
        ConfigError: the folder cannot be written.
        CheckpointError: something else has the name of a file or folder that the run writes.
    """
    folder, nearest = Path(config.run_dir).absolute(), _existing(config.run_dir)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir {config.run_dir} cannot be written", where=str(nearest), fix="name another folder")
    check_in_the_way(folder)


def check_export(config: Config) -> bool:
    """Return whether an export is still to be written; call it before training starts.

    Returns:
        False when `checkpoint.export_hf` is null, or when this run wrote it after its last step already.

    Raises:
        CheckpointError: the target holds anything else.
    """
    if config.checkpoint.export_hf is None:
        return False
    record = Path(config.run_dir) / EXPORT_RECORD
    fix = "remove it, and the exported directory if it is complete"
    if record.exists() and read_json(record, fix) == _export_record(config):
        return False
    check_export_target(config.checkpoint.export_hf)
    return True


def check_weights(config: Config, weight_map: WeightMap) -> str:
    """Compare names and shapes in the HF directory with the model's; returns in words what is there.

    Raises:
        CheckpointError: tensors are missing, or of another shape.
    """
    if not config.model.load_weights:
        return "weights   random (model.load_weights is false)"
    with open_weights(config.model.hf_path) as reader:
        found = weight_map.match(reader)
        check_tied_copies(reader, found)
        names = found.with_copies
        num_bytes = sum(reader.tensors[name].num_bytes for name in names)
    lines = [f"weights   {len(names)} tensors, {num_bytes / 2**30:.2f} GiB, names and shapes fit the model"]
    lines += [describe(found.passthrough)] if found.passthrough else []
    lines += [describe_unread(found.unread)] if found.unread else []
    return "\n  ".join(lines)


def checkpoint_bytes(config: Config, weight_map: WeightMap) -> int:
    """Return the size of a checkpoint's tensors: weights, and of those that train main weights and moments.

    With Muon it is less: which weights are matrices is known when the model is built.
    """
    trainable = Trainable(config.model.freeze, weight_map.buffers)
    sizes = {name: math.prod(weight.padded_shape) for name, weight in weight_map.items()}
    trained = sum(size for name, size in sizes.items() if trainable.trains(name))
    # The distributed optimizer's state contains weights also where these are the parameters themselves.
    copies = FP32_BYTES * (config.parallel.use_distributed_optimizer and value_bytes(config) == FP32_BYTES)
    return sum(sizes.values()) * value_bytes(config) + optimizer_bytes(config, trained, 0) + trained * copies


def check_space(config: Config, weight_map: WeightMap) -> str:
    """Make sure that a checkpoint, and the export, fit on the disk; returns in words what they take.

    Raises:
        ConfigError: they do not.
    """
    needs = {config.run_dir: checkpoint_bytes(config, weight_map)}
    if config.checkpoint.export_hf is not None:
        weights = sum(math.prod(weight.padded_shape) for _, weight in weight_map.items()) * value_bytes(config)
        needs[config.checkpoint.export_hf] = needs.get(config.checkpoint.export_hf, 0) + weights
    by_disk: dict[int, list[str]] = {}
    for path in needs:
        by_disk.setdefault(_existing(path).stat().st_dev, []).append(path)
    for paths in by_disk.values():
        needed, free = sum(needs[path] for path in paths), shutil.disk_usage(_existing(paths[0])).free
        if needed > free:
            raise ConfigError(
                f"a checkpoint{' and the export take' if len(paths) > 1 else ' takes'} {needed / 2**30:.1f} GiB, and "
                f"{free / 2**30:.1f} GiB are free",
                " and ".join(paths),
                "make room, or name folders on another disk",
            )
    return f"space     {needs[config.run_dir] / 2**30:.2f} GiB per checkpoint; there is room for it"


def _existing(path: str) -> Path:
    """Return a path, or the nearest of its parents that exists."""
    folder = Path(path).absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def record_export(config: Config) -> None:
    """Remember in the run folder that the export of the last step is complete; call it on one rank."""
    replace_durably(Path(config.run_dir) / EXPORT_RECORD, json.dumps(_export_record(config)))


def _export_record(config: Config) -> dict[str, Any]:
    assert config.checkpoint.export_hf is not None
    target = Path(config.checkpoint.export_hf).absolute()
    return {"directory": str(target), "step": config.train.train_iters}
