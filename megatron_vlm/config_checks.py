"""Checks of a configuration that need no model, no data and no devices; all problems are reported together."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator

from megatron_vlm.config import PART_NAMES, Config, OptimizerSettings, source_names
from megatron_vlm.errors import ConfigError, UserError, combine

MOST = 2**31 - 1
MOST_RANKS = 1_000_000
MOST_NAME_BYTES, MOST_PATH_BYTES = 255, 4095  # of Linux


def validate(config: Config) -> None:
    """Check every value by itself and against the others.

    Raises:
        ConfigError: lists every problem found, each with its key and a remedy.
    """
    problems: list[UserError] = [
        *_ranges(config),
        *_paths(config),
        *_model(config),
        *_parallel(config),
        *_data(config),
        *_train(config),
        *_optimizer(config),
    ]
    if problems:
        raise combine(ConfigError, problems)


def _ranges(config: Config) -> Iterator[UserError]:
    """Check the numbers that have a smallest and a largest value; the largest are far above any that makes sense."""
    parallel, data, train = config.parallel, config.data, config.train
    optimizer, checkpoint = config.optimizer, config.checkpoint
    ranges: list[tuple[str, float | None, float, float]] = [
        ("parallel.tensor_model_parallel_size", parallel.tensor_model_parallel_size, 1, MOST_RANKS),
        ("parallel.pipeline_model_parallel_size", parallel.pipeline_model_parallel_size, 1, MOST_RANKS),
        ("parallel.virtual_pipeline_model_parallel_size", parallel.virtual_pipeline_model_parallel_size, 1, MOST_RANKS),
        ("parallel.context_parallel_size", parallel.context_parallel_size, 1, MOST_RANKS),
        ("parallel.expert_model_parallel_size", parallel.expert_model_parallel_size, 1, MOST_RANKS),
        ("parallel.expert_tensor_parallel_size", parallel.expert_tensor_parallel_size, 1, MOST_RANKS),
        ("parallel.distributed_timeout_minutes", parallel.distributed_timeout_minutes, 1, 1_000_000),
        ("model.moe_aux_loss_coeff", config.model.moe_aux_loss_coeff, 0, MOST),
        ("model.loss_chunk_mib", config.model.loss_chunk_mib, 1, 1_000_000),
        ("model.z_loss_coeff", config.model.z_loss_coeff, 0, MOST),
        ("data.seq_length", data.seq_length, 2, 1_000_000_000),
        ("data.min_pixels", data.min_pixels, 1, MOST),
        ("data.max_pixels", data.max_pixels, 1, MOST),
        ("data.num_workers", data.num_workers, 0, 1024),
        ("train.train_iters", train.train_iters, 1, MOST),
        ("train.global_batch_size", train.global_batch_size, 1, 1_000_000_000),
        ("train.micro_batch_size", train.micro_batch_size, 1, 1_000_000_000),
        ("train.seed", train.seed, 0, MOST),
        ("train.eval_interval", train.eval_interval, 1, MOST),
        ("train.eval_iters", train.eval_iters, 1, MOST),
        ("train.log_interval", train.log_interval, 1, MOST),
        ("train.exit_interval", train.exit_interval, 1, MOST),
        ("train.spike_ratio", train.spike_ratio, 1, MOST),
        ("optimizer.lr", optimizer.lr, 0, MOST),
        ("optimizer.min_lr", optimizer.min_lr, 0, MOST),
        ("optimizer.weight_decay", optimizer.weight_decay, 0, MOST),
        ("optimizer.clip_grad", optimizer.clip_grad, 0, MOST),
        ("optimizer.warmup_iters", optimizer.warmup_iters, 0, MOST),
        ("optimizer.wsd_decay_iters", optimizer.wsd_decay_iters, 1, MOST),
        ("optimizer.muon_num_ns_steps", optimizer.muon_num_ns_steps, 1, 100),
        ("checkpoint.save_interval", checkpoint.save_interval, 1, MOST),
        ("checkpoint.keep_last", checkpoint.keep_last, 1, MOST),
    ]
    for key, value, least, most in ranges:
        if value is not None and not least <= value <= most:
            yield ConfigError(f"{key} is {value}", fix=f"give a number of at least {least} and at most {most}")


def _paths(config: Config) -> Iterator[UserError]:
    """Check that paths can be paths."""
    paths: list[tuple[str, str | None]] = [("run_dir", config.run_dir), ("model.hf_path", config.model.hf_path)]
    paths += [("checkpoint.load", config.checkpoint.load), ("checkpoint.export_hf", config.checkpoint.export_hf)]
    for key, sources in (("data.train", config.data.train), ("data.valid", config.data.valid)):
        paths += [(f"the path of a source in {key}", source.path) for source in sources]
    for key, path in paths:
        if path is None:
            continue
        try:
            names = path.encode().split(b"/")
        except UnicodeEncodeError:
            yield ConfigError(f"{key} has characters that are no text: {path[:80]!r}", fix="write it as UTF-8")
            continue
        if not path.strip():
            yield ConfigError(f"{key} is empty", fix="name a file or directory")
        elif b"\0" in path.encode():
            yield ConfigError(f"{key} has a zero byte: {path[:80]!r}", fix="remove it")
        elif max(map(len, names)) > MOST_NAME_BYTES or len(path.encode()) > MOST_PATH_BYTES:
            yield ConfigError(f"{key} is longer than a path can be: {path[:80]!r}...", fix="shorten it")


def _model(config: Config) -> Iterator[UserError]:
    freeze = config.model.freeze
    for entry in freeze:
        if entry not in PART_NAMES and not set(entry) & set(".*?["):
            yield ConfigError(
                f"model.freeze names {entry!r}, which is no part",
                fix=f"parts are {', '.join(PART_NAMES)}; patterns of parameter names have dots or *",
            )
    if "language_model" in freeze and config.model.text_only:
        yield ConfigError("model.freeze leaves nothing to train", fix="take a part out of the list")
    if config.model.attention_backend == "transformer_engine" and config.train.precision == "fp32":
        yield ConfigError(
            "model.attention_backend transformer_engine has no attention in fp32",
            fix="set it to flex, or train.precision to bf16",
        )


def _parallel(config: Config) -> Iterator[UserError]:
    parallel = config.parallel
    pipeline, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if virtual > 1 and pipeline == 1:
        yield ConfigError(
            f"parallel.virtual_pipeline_model_parallel_size is {virtual} with a pipeline of one rank",
            fix="set it to 1, or pipeline_model_parallel_size to 2 or more",
        )
    layout = parallel.pipeline_layout
    if layout is not None and len(layout) != pipeline * virtual:
        yield ConfigError(
            f"parallel.pipeline_layout has {len(layout)} entries",
            fix=f"give one per chunk: {pipeline} pipeline ranks x {virtual} virtual = {pipeline * virtual}",
        )
    if layout is not None and any(count < 0 for count in layout):
        yield ConfigError(f"parallel.pipeline_layout {layout} has a negative entry", fix="use 0 for no layers")
    tower = parallel.vision_pipeline_layout
    if tower is not None and (len(tower) > pipeline * virtual or any(count < 0 for count in tower)):
        yield ConfigError(
            f"parallel.vision_pipeline_layout {tower} does not fit {pipeline * virtual} pipeline chunks",
            fix=f"give at most {pipeline * virtual} numbers of at least 0, one per chunk from the first",
        )
    if tower is not None and config.model.text_only:
        yield ConfigError(
            "parallel.vision_pipeline_layout spreads a vision tower, but model.text_only is true",
            fix="set parallel.vision_pipeline_layout to null",
        )
    if config.optimizer.name == "sgd" and parallel.use_distributed_optimizer:
        yield ConfigError(
            "optimizer.name sgd does not work with parallel.use_distributed_optimizer true",
            fix="set parallel.use_distributed_optimizer to false, or optimizer.name to adamw",
        )
    if parallel.overlap_param_gather and not parallel.use_distributed_optimizer:
        yield ConfigError(
            "parallel.overlap_param_gather needs the distributed optimizer",
            fix="set parallel.use_distributed_optimizer to true, or overlap_param_gather to false",
        )
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield ConfigError(
            "parallel.overlap_param_gather needs parallel.overlap_grad_reduce", fix="set overlap_grad_reduce to true"
        )


def _data(config: Config) -> Iterator[UserError]:
    data = config.data
    if not data.train:
        yield ConfigError("data.train is empty", fix="list at least one {path, weight}")
    for key, sources in (("data.train", data.train), ("data.valid", data.valid)):
        for source in sources:
            if not 0 < source.weight <= MOST:
                yield ConfigError(f"{key}: the weight of {source.path} is {source.weight}", fix="give a number above 0")
    if data.min_pixels and data.max_pixels and data.min_pixels > data.max_pixels:
        yield ConfigError(
            f"data.min_pixels {data.min_pixels} is above data.max_pixels {data.max_pixels}",
            fix="exchange them, or leave one out for the processor's own value",
        )
        names = source_names(sources)
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield ConfigError(f"{key} has several sources called {name}", fix="give each a name of its own")
    if data.allow_private_urls and not data.allow_urls:
        yield ConfigError("data.allow_private_urls is true, but data.allow_urls is false", fix="set both, or neither")
    for key in ("max_bad_fraction", "max_too_long_fraction"):
        if not 0 <= getattr(data, key) <= 1:
            yield ConfigError(f"data.{key} is {getattr(data, key)}", fix="give a fraction between 0 and 1")


def _train(config: Config) -> Iterator[UserError]:
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    if micro >= 1 and batch >= 1 and batch % micro:
        yield ConfigError(
            f"train.global_batch_size {batch} is not a multiple of train.micro_batch_size {micro}",
            fix=f"use a global batch of {nearest_multiples(batch, micro)}, or a micro batch that divides {batch}",
        )
    profile = config.logging.profile
    if profile is not None and not (len(profile) == 2 and 1 <= profile[0] <= profile[1]):
        yield ConfigError(f"logging.profile is {profile}", fix="give [first step, last step], counted from 1")


def _optimizer(config: Config) -> Iterator[UserError]:
    optimizer, iters = config.optimizer, config.train.train_iters
    yield from _muon(optimizer)
    if optimizer.min_lr > optimizer.lr:
        yield ConfigError(
            f"optimizer.min_lr {optimizer.min_lr} is above optimizer.lr {optimizer.lr}", fix="lower min_lr"
        )
    if optimizer.warmup_iters >= iters > 0:  # megatron-core's schedule asserts this
        yield ConfigError(
            f"optimizer.warmup_iters {optimizer.warmup_iters} is not less than train.train_iters {iters}",
            fix=f"use at most {iters - 1}",
        )
    decay = optimizer.wsd_decay_iters
    if decay is not None and optimizer.schedule != "wsd":
        yield ConfigError("optimizer.wsd_decay_iters has no effect", fix="set optimizer.schedule to wsd, or remove it")
    elif decay is not None and optimizer.warmup_iters + decay > iters:
        yield ConfigError(
            f"optimizer.warmup_iters {optimizer.warmup_iters} + wsd_decay_iters {decay} exceed train_iters {iters}"
        )
    adam = optimizer.adam_backend
    if adam != "auto" and optimizer.name == "sgd":
        yield ConfigError(
            f"optimizer.adam_backend {adam} has no effect on optimizer.name sgd", fix="set it to auto, or name to adamw"
        )
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        yield ConfigError(f"optimizer.betas are {list(optimizer.betas)}", fix="give two numbers from 0 to below 1")
    if not 0 < optimizer.eps <= MOST:
        yield ConfigError(f"optimizer.eps is {optimizer.eps}", fix="give a number above 0")
    for name, factor in optimizer.lr_multipliers.items():
        if name not in PART_NAMES:
            yield ConfigError(
                f"optimizer.lr_multipliers names {name!r}, which is no part", fix=f"parts are {', '.join(PART_NAMES)}"
            )
        elif not 0 <= factor <= MOST:
            yield ConfigError(f"optimizer.lr_multipliers.{name} is {factor}", fix="give a number of at least 0")


def _muon(optimizer: OptimizerSettings) -> Iterator[UserError]:
    if optimizer.name != "muon":
        for entry in dataclasses.fields(optimizer):
            if entry.name.startswith("muon_") and getattr(optimizer, entry.name) != entry.default:
                yield ConfigError(
                    f"optimizer.{entry.name} has no effect", fix="set optimizer.name to muon, or remove it"
                )
        return
    if importlib.util.find_spec("emerging_optimizers") is None:
        yield ConfigError(
            "optimizer.name muon needs the package emerging-optimizers, which is not installed",
            fix="install the extra: pip install -c constraints.txt -e '.[muon]'",
        )
    if not 0 <= optimizer.muon_momentum < 1:
        yield ConfigError(
            f"optimizer.muon_momentum is {optimizer.muon_momentum}", fix="give a number from 0 to below 1"
        )
    if not 0 < optimizer.muon_extra_scale_factor <= MOST:
        yield ConfigError(
            f"optimizer.muon_extra_scale_factor is {optimizer.muon_extra_scale_factor}",
            fix=f"give a number above 0 and at most {MOST:g}",
        )


def nearest_multiples(number: int, divisor: int) -> str:
    """Return the multiples of `divisor` around `number` that are above 0, in words."""
    below = number // divisor * divisor
    return f"{below} or {below + divisor}" if below else f"{divisor}"


def divisors(number: int, largest: int) -> str:
    """Return the divisors of a number up to `largest`, in words."""
    return alternatives([size for size in range(1, min(number, largest) + 1) if number % size == 0])


def alternatives(sizes: list[int]) -> str:
    """Return the numbers to choose from, in words."""
    return " or ".join(map(str, sizes))
