"""Build everything a training run needs, cheapest checks first, so that mistakes are reported before heavy work."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from megatron_vlm import platform
from megatron_vlm.checkpoint.manager import CheckpointManager, load_weights
from megatron_vlm.checkpoint.run_folder import CHECKPOINTS_NAME, ModelIdentity, newest_complete
from megatron_vlm.checkpoint.run_owner import RunOwner
from megatron_vlm.config import Config
from megatron_vlm.conversion import passthrough
from megatron_vlm.conversion.running_model import load_hf_into_model
from megatron_vlm.data.lengths_on_ranks import measure_row_lengths
from megatron_vlm.data.loader import (
    BatchLoader,
    BatchSharding,
    MicroBatchLoader,
    build_train_loader,
    build_valid_loader,
)
from megatron_vlm.data.media import AUDIO, PIXELS
from megatron_vlm.data.stage_loader import Stages, build_on_stages
from megatron_vlm.families import registry
from megatron_vlm.families.build import DTYPES, build_chunks, build_settings, context_sharding, wrap_data_parallel
from megatron_vlm.model.init_weights import initialize_weights
from megatron_vlm.model.trainable import Trainable
from megatron_vlm.model.weight_map import WeightMap
from megatron_vlm.model_configs import VisionLanguageConfig
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.placement import Node, find_nodes
from megatron_vlm.planning.flops import ModelFlops
from megatron_vlm.planning.preflight import check_export, check_layout, check_run_dir, check_space, check_weights
from megatron_vlm.platform.agreement import on_first_rank
from megatron_vlm.training.arrival import meet
from megatron_vlm.training.optimizer import build_optimizer, build_scheduler
from megatron_vlm.training.rank_checks import check_same_data, check_same_program, measure_groups
from megatron_vlm.training.rank_watch import collective_timeout
from megatron_vlm.training.signals import StopRequests


@dataclass
class Run:
    """A run that is ready to train.

    Attributes:
        flops: counts the FLOPs of its model.
        due_export: whether `checkpoint.export_hf` is still to be written.
        nodes: where ranks run; on the first rank.
        group_report: lines on how fast groups communicate; on the first rank.
    """

    config: Config
    layout: Layout
    groups: ProcessGroupCollection
    family: registry.Family
    model_config: VisionLanguageConfig
    model: list[DistributedDataParallel]
    optimizer: ChainedOptimizer
    scheduler: OptimizerParamScheduler
    train_loader: BatchLoader
    valid_loader: BatchLoader | None
    flops: ModelFlops
    checkpoints: CheckpointManager
    due_export: bool
    owner: RunOwner
    nodes: list[Node]
    group_report: list[str]

    @property
    def is_first_rank(self) -> bool:
        """Whether this rank writes logs."""
        return torch.distributed.get_rank() == 0


def initialize_distributed(timeout_minutes: int, device: str = "auto") -> None:
    """Join the ranks that torchrun or srun started, computing on `device`; otherwise be the only one."""
    backend = platform.initialize(device).backend
    timeout = collective_timeout(timeout_minutes)
    if "RANK" in os.environ:
        store, rank, world_size = meet(timeout)
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    else:
        torch.distributed.init_process_group(
            backend, store=torch.distributed.HashStore(), rank=0, world_size=1, timeout=timeout
        )


def set_up(config: Config, owner: RunOwner, requests: StopRequests) -> Run:
    """Check, read, build and load; torch.distributed must be initialised.

    Args:
        config: a validated configuration.
        owner: takes the run folder, after the checks that are cheap and before anything in it is changed.
        requests: asked between the parts that take long.

    Raises:
        UserError: whatever the configuration, data, weights or checkpoints are refused for, or the folder is in use.
        StoppedBeforeTraining: some rank received a signal.
    """
    hf_config = registry.load_hf_config(config.model.hf_path)
    check_same_program(config, hf_config.to_dict())
    family = registry.detect(hf_config)
    model_config = family.config_from_hf(hf_config, config.model.text_only, config.model.image_mask)
    weight_map = family.weight_map(model_config)
    names = [name for name, _ in weight_map.items()]
    layout = check_layout(config, model_config, torch.distributed.get_world_size(), names, weight_map.buffers)
    check_run_dir(config)
    due_export = check_export(config)
    on_first_rank(lambda: check_space(config, weight_map))
    on_first_rank(lambda: owner.take(lambda: requests.poll() != 0))
    requests.raise_if_stopped()
    groups = build_groups(layout, collective_timeout(config.parallel.distributed_timeout_minutes))
    nodes = find_nodes()
    group_report = measure_groups(groups, nodes)
    initialize_megatron(config.train.seed, groups)
    if config.train.deterministic:
        platform.current().use_deterministic_algorithms()

    if config.data.packing:
        measure_row_lengths(config, family.prompt_rules(model_config), lambda: requests.poll() != 0)
        requests.raise_if_stopped()
    flops = ModelFlops(family, model_config, Trainable(config.model.freeze), groups)
    train_loader, valid_loader = _build_loaders(config, layout, groups, flops)
    check_same_data({"data.train": train_loader.plan} | ({"data.valid": valid_loader.plan} if valid_loader else {}))
    on_first_rank(lambda: _check_first_weights(config, weight_map))
    requests.raise_if_stopped()
    identity = _identity(family, hf_config, model_config)
    checkpoints = _open_checkpoints(config, layout, groups, identity, owner)
    chunks = _build_model(config, layout, family, model_config, groups)
    if checkpoints.latest_step() is None:
        loaded = _load_first_weights(config, chunks, family, model_config, groups, identity)
        checkpoints.passthrough = on_first_rank(
            lambda: passthrough.begin_run(checkpoints.directory, loaded, config.model.hf_path, weight_map)
        )
    requests.raise_if_stopped()
    model = _with_data_parallel(config, chunks, groups)
    optimizer = build_optimizer(
        model,
        config.optimizer,
        DTYPES[config.train.precision],
        config.parallel.use_distributed_optimizer,
        groups,
    )
    return Run(
        config,
        layout,
        groups,
        family,
        model_config,
        model,
        optimizer,
        build_scheduler(optimizer, config),
        train_loader,
        valid_loader,
        flops,
        checkpoints,
        due_export,
        owner,
        nodes,
        group_report,
    )


def _identity(family: registry.Family, hf_config: Any, model_config: VisionLanguageConfig) -> ModelIdentity:
    """Return what the run's checkpoints say of its model."""
    tied = model_config.text.tie_word_embeddings
    return ModelIdentity(family.name, hf_config.model_type, model_config.text_only, tied, hf_config.to_dict())


def _open_checkpoints(
    config: Config, layout: Layout, groups: ProcessGroupCollection, identity: ModelIdentity, owner: RunOwner
) -> CheckpointManager:
    """Return the manager of the run's checkpoints."""
    return CheckpointManager(
        Path(config.run_dir) / CHECKPOINTS_NAME,
        groups,
        identity,
        layout.sizes(),
        config.train.precision,
        config.checkpoint.keep_last,
        config.checkpoint.async_save,
        owner,
    )


def _check_first_weights(config: Config, weight_map: WeightMap) -> None:
    """Check the weight files of a new run before it builds anything."""
    if config.checkpoint.load is None and newest_complete(Path(config.run_dir) / CHECKPOINTS_NAME)[0] is None:
        check_weights(config, weight_map)


def tower_inputs(layout: Layout, pipeline_rank: int) -> list[str]:
    """Return the names of the towers' inputs that a pipeline rank reads."""
    readers = {PIXELS: 0, AUDIO: layout.embedding_rank}
    return [name for name, reader in readers.items() if reader == pipeline_rank]


def _build_loaders(
    config: Config, layout: Layout, groups: ProcessGroupCollection, flops: ModelFlops
) -> tuple[BatchLoader, BatchLoader | None]:
    """Build the loaders of this rank's training and held-out data; on later stages, what receives from the first."""
    rules = flops.family.prompt_rules(flops.model_config)
    sharding = BatchSharding(
        config.train.global_batch_size,
        config.train.micro_batch_size,
        groups.dp.rank(),
        layout.data_size,
        pad_to_multiple_of=layout.sequence_shards,
        context=context_sharding(layout, flops.model_config, groups.cp.rank()),
    )
    pin_memory = platform.current().accelerated
    inputs = [tower_inputs(layout, rank) for rank in range(layout.pipeline_size)]
    stages = Stages(groups.pp, inputs, platform.current().device)
    costs = on_first_rank(flops.token_costs) if config.data.packing and layout.data_size > 1 else None

    def build() -> tuple[MicroBatchLoader, MicroBatchLoader | None]:
        reports = groups.tp.rank() == 0 and groups.cp.rank() == 0 and stages.is_first
        options: dict[str, Any] = {"token_costs": costs, "pin_memory": pin_memory, "report_problems": reports}
        return (
            build_train_loader(config, rules, sharding, **options),
            build_valid_loader(config, rules, sharding, **options),
        )

    if layout.pipeline_size == 1:
        return build()
    return build_on_stages(build, sharding, stages, pin_memory)


def _build_model(
    config: Config,
    layout: Layout,
    family: registry.Family,
    model_config: VisionLanguageConfig,
    groups: ProcessGroupCollection,
) -> list[MegatronModule]:
    chunks = build_chunks(family, model_config, build_settings(config, layout), groups)
    Trainable(config.model.freeze).freeze(chunks)
    return chunks


def _with_data_parallel(
    config: Config, chunks: list[MegatronModule], groups: ProcessGroupCollection
) -> list[DistributedDataParallel]:
    parallel = config.parallel
    return wrap_data_parallel(
        chunks,
        groups,
        parallel.use_distributed_optimizer,
        parallel.overlap_grad_reduce,
        parallel.overlap_param_gather,
    )


def _load_first_weights(
    config: Config,
    chunks: list[MegatronModule],
    family: registry.Family,
    model_config: VisionLanguageConfig,
    groups: ProcessGroupCollection,
    identity: ModelIdentity,
) -> Path | None:
    """Load the weights of a new run: from a checkpoint (whose path is returned), from HF files, or random ones."""
    if config.checkpoint.load is not None:
        return load_weights(config.checkpoint.load, chunks, groups, identity)
    if config.model.load_weights:
        load_hf_into_model(chunks, config.model.hf_path, family, model_config, groups)
    else:
        initialize_weights(chunks, config.train.seed, model_config.text.initializer_range, groups)
    return None
