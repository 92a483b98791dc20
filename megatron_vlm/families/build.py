"""Functions that build this rank's pipeline chunks and wrap them for data parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from megatron_vlm import platform
from megatron_vlm.config import Config
from megatron_vlm.data.context_shard import ContextSharding
from megatron_vlm.families.registry import Family
from megatron_vlm.model_configs import VisionLanguageConfig
from megatron_vlm.parallel.chunk_settings import ChunkSettings, LossSettings, MoESettings
from megatron_vlm.parallel.gradients import finalize_gradients
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.mcore_config import build_mcore_config
from megatron_vlm.parallel.parameters import mark_copies, spec_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class BuildSettings:
    """How a model is sharded and computed.

    Attributes:
        layout: sizes of all groups, and the decoder layers of every chunk.
        overlapped: whether `wrap_data_parallel` will be asked to overlap gradient or parameter exchanges.
    """

    layout: Layout
    dtype: torch.dtype = torch.float32
    recompute: Literal["none", "selective", "full"] = "none"
    attention_backend: Literal["auto", "flex", "transformer_engine"] = "auto"
    vision_parallelism: Literal["tensor", "data"] = "tensor"
    deterministic: bool = False
    overlapped: bool = False
    moe: MoESettings = field(default_factory=MoESettings)
    loss: LossSettings = field(default_factory=LossSettings)


def build_settings(config: Config, layout: Layout) -> BuildSettings:
    """Return the build settings that the configuration asks for."""
    return BuildSettings(
        layout,
        DTYPES[config.train.precision],
        config.model.recompute,
        config.model.attention_backend,
        config.model.vision_parallelism,
        config.train.deterministic,
        config.parallel.overlap_grad_reduce or config.parallel.overlap_param_gather,
        MoESettings(
            config.parallel.moe_token_dispatcher_type, config.model.moe_load_balancing, config.model.moe_aux_loss_coeff
        ),
        LossSettings(config.model.loss_chunk_mib * 2**20, config.model.z_loss_coeff),
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
            attention_backend=settings.attention_backend,
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


def wrap_data_parallel(
    chunks: Sequence[MegatronModule],
    groups: ProcessGroupCollection,
    use_distributed_optimizer: bool,
    overlap_grad_reduce: bool = False,
    overlap_param_gather: bool = False,
) -> list[DistributedDataParallel]:
    """Wrap every chunk in megatron-core's data parallelism; frozen parameters take no part and no memory in it."""
    config = data_parallel_config(use_distributed_optimizer, overlap_grad_reduce, overlap_param_gather)
    mcore_config = chunks[0].config
    wrapped = [
        DistributedDataParallel(mcore_config, config, chunk, disable_bucketing=index > 0, pg_collection=groups)
        for index, chunk in enumerate(chunks)
    ]
    if overlap_grad_reduce:
        mcore_config.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return wrapped
