"""Functions that build this rank's pipeline chunks and wrap them for data parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import (
    _compute_default_per_buffer_param_layout,
    group_params_for_buffers,
)
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.param_layout import FullParamLayout
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from megatron_vlm import platform
from megatron_vlm.config import Config
from megatron_vlm.data.context_shard import ContextSharding
from megatron_vlm.families.registry import Family
from megatron_vlm.layers.side_by_side import lay_side_by_side
from megatron_vlm.model_configs import VisionLanguageConfig
from megatron_vlm.parallel.chunk_settings import ChunkSettings, LossSettings, MoESettings
from megatron_vlm.parallel.gradients import finalize_gradients
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.mcore_config import build_mcore_config
from megatron_vlm.parallel.parameters import mark_copies, mark_matrices, spec_of

_SMALLEST_BUCKET, _BUCKET_PER_RANK = 40_000_000, 1_000_000  # elements; `DistributedDataParallel`'s defaults
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class BuildSettings:
    """How a model is sharded and computed.

    Attributes:
        layout: sizes of all groups, and the decoder layers of every chunk.
        overlapped: whether `wrap_data_parallel` will be asked to overlap gradient or parameter exchanges.
        whole_matrices: whether a data rank's shard of the optimizer state has whole matrices, as Muon needs.
    """

    layout: Layout
    dtype: torch.dtype = torch.float32
    recompute: Literal["none", "selective", "full"] = "none"
    vision_parallelism: Literal["tensor", "data"] = "tensor"
    deterministic: bool = False
    overlapped: bool = False
    moe: MoESettings = field(default_factory=MoESettings)
    loss: LossSettings = field(default_factory=LossSettings)
    whole_matrices: bool = False


def build_settings(config: Config, layout: Layout) -> BuildSettings:
    """Return the build settings that the configuration asks for."""
    return BuildSettings(
        layout,
        DTYPES[config.train.precision],
        config.model.recompute,
        config.model.vision_parallelism,
        config.train.deterministic,
        config.parallel.overlap_grad_reduce or config.parallel.overlap_param_gather,
        MoESettings(
            config.parallel.moe_token_dispatcher_type, config.model.moe_load_balancing, config.model.moe_aux_loss_coeff
        ),
        LossSettings(config.model.loss_chunk_mib * 2**20, config.model.z_loss_coeff),
        config.optimizer.name == "muon" and config.parallel.use_distributed_optimizer,
    )


def context_sharding(layout: Layout, model_config: VisionLanguageConfig, rank: int) -> ContextSharding | None:
    """Return which shard of every micro-batch a context rank takes; None where there is only one."""
    if layout.context_size == 1:
        return None
    return ContextSharding(rank, layout.context_size, model_config.text.attention_kinds, layout.sequence_shards)


def build_chunks(
    family: Family,
    model_config: VisionLanguageConfig,
    settings: BuildSettings,
    groups: ProcessGroupCollection,
    device: torch.device | None = None,
) -> list[MegatronModule]:
    """Build this rank's chunks with uninitialised parameters, in the order of its virtual stages.

    Args:
        family: family of the model.
        model_config: the family's model configuration.
        settings: how the model is sharded and computed.
        groups: process groups.
        device: device of the parameters; the platform's when None, `meta` to inspect shapes.
    """
    text, layout, has_tower = model_config.text, settings.layout, "vision_tower" in model_config.parts
    mcore_config = build_mcore_config(
        hidden_size=text.hidden_size,
        num_attention_heads=text.layers[0].num_attention_heads,
        dtype=settings.dtype,
        layout=layout,
        deterministic=settings.deterministic,
    )
    mcore_config.finalize_model_grads_func = finalize_gradients
    chunks = []
    for stage, index in enumerate(layout.chunks_of(groups.pp.rank())):
        chunk = ChunkSettings(
            layers=layout.chunks[index],
            num_layers_before=layout.first_layer(index),
            is_first=index == 0,
            is_last=index == len(layout.chunks) - 1,
            virtual_stage=stage if layout.virtual_size > 1 else None,
            mcore_config=mcore_config,
            has_embedding=index == layout.embedding_chunk,
            tower_layers=layout.tower_layers(index, model_config.num_tower_layers) if has_tower else None,
            recompute=settings.recompute,
            vision_parallelism=settings.vision_parallelism,
            moe=settings.moe,
            loss=settings.loss,
            overlapped=settings.overlapped,
        )
        with device or platform.current().device:
            built = family.build_chunk(model_config, chunk, groups)
        for name, parameter in built.named_parameters():
            spec_of(parameter, name)
        if layout.pipeline_size > 1:
            mark_copies(built, chunk.is_first, chunk.has_embedding)
        if settings.whole_matrices:
            mark_matrices(built)
        chunks.append(built)
    return chunks


def data_parallel_config(
    use_distributed_optimizer: bool, overlap_grad_reduce: bool = False, overlap_param_gather: bool = False
) -> DistributedDataParallelConfig:
    """Return megatron-core's settings of data parallelism."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=use_distributed_optimizer,
        overlap_grad_reduce=overlap_grad_reduce,
        overlap_param_gather=overlap_param_gather,
    )


def buffer_layout(
    chunk: torch.nn.Module, index: int, config: DistributedDataParallelConfig, groups: ProcessGroupCollection
) -> FullParamLayout:
    """Return where megatron-core's data parallelism puts the parameters of a rank's chunk with this index.

    With the distributed optimizer, each data rank has an equal shard of every bucket; matrices that `mark_matrices` has
    marked are whole in one.
    """
    parameters = [parameter for parameter in chunk.parameters() if parameter.requires_grad]
    bucket_size = None
    if config.overlap_grad_reduce and index == 0 and groups.pp.rank() == 0:
        bucket_size = config.bucket_size or max(_SMALLEST_BUCKET, _BUCKET_PER_RANK * groups.dp.size())
    if config.use_distributed_optimizer:
        return LayerWiseDistributedOptimizer.compute_full_param_layout(
            parameters,
            bucket_size,
            groups.dp_cp.size(),
            config,
            expert_data_parallel_world_size=groups.expt_dp.size(),
        )
    buffers = group_params_for_buffers(parameters, config.grad_reduce_in_fp32).items()
    return FullParamLayout(
        {key: _compute_default_per_buffer_param_layout(members, bucket_size) for key, (members, _) in buffers}
    )


def wrap_data_parallel(
    chunks: Sequence[MegatronModule],
    groups: ProcessGroupCollection,
    use_distributed_optimizer: bool,
    overlap_grad_reduce: bool = False,
    overlap_param_gather: bool = False,
) -> list[DistributedDataParallel]:
    """Wrap every chunk in megatron-core's data parallelism; frozen parameters take no part and no memory in it.

    Which parameters train is settled here: weights that one product can use are laid side by side first.
    """
    for chunk in chunks:
        lay_side_by_side(chunk)
    config = data_parallel_config(use_distributed_optimizer, overlap_grad_reduce, overlap_param_gather)
    mcore_config = chunks[0].config
    wrapped = [
        DistributedDataParallel(
            mcore_config,
            config,
            chunk,
            disable_bucketing=index > 0,
            pg_collection=groups,
            full_param_layout=buffer_layout(chunk, index, config, groups) if use_distributed_optimizer else None,
        )
        for index, chunk in enumerate(chunks)
    ]
    if overlap_grad_reduce:
        mcore_config.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return wrapped
