"""The layouts in which every family must equal transformers, and what a rank does to be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model

from megatron_vlm import platform
from megatron_vlm.conversion.running_model import load_hf_into_model
from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.data.context_blocks import planned_positions
from megatron_vlm.data.context_shard import ContextSharding, shard_for_context
from megatron_vlm.families import registry
from megatron_vlm.families.build import BuildSettings, build_chunks, wrap_data_parallel
from megatron_vlm.layers.linear import multiply
from megatron_vlm.layers.operands import Operand
from megatron_vlm.model.trainable import Trainable
from megatron_vlm.parallel.chunk_settings import LossSettings, MoESettings
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.sharding import gather_full
from megatron_vlm.training.setup import tower_inputs
from megatron_vlm.training.step import collect_expert_use, run_global_batch


@dataclass(frozen=True)
class TestLayout:
    """How the ranks divide a model and a batch; the data-parallel size is what `world_size` leaves.

    Where a test takes no rows but micro-batches, or no configuration, `micro_batch_size` and
    `precision` mean nothing.
    """

    __test__ = False

    world_size: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    blocks: Literal["planned", "random"] = "planned"
    virtual: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    vision: Literal["tensor", "data"] = "tensor"
    recompute: Literal["none", "selective", "full"] = "none"
    pipeline_layout: tuple[int, ...] | None = None
    vision_pipeline_layout: tuple[int, ...] | None = None
    overlap: bool = False
    expert: int = 1
    expert_tensor: int = 1
    moe: MoESettings = field(default_factory=MoESettings)
    loss: LossSettings = field(default_factory=LossSettings)
    freeze: tuple[str, ...] = ()
    micro_batch_size: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    whole_matrices: bool = False

    def __str__(self) -> str:
        values = ((entry.name, getattr(self, entry.name)) for entry in fields(self))
        given = [f"{name} {value}" for name, value in values if isinstance(value, int) and value > 1]
        return " ".join(given) or "one rank"

    def ranks(self, num_layers: int = 0) -> Layout:
        """The same as the model sees it; without layers where only groups of ranks matter."""
        return Layout.over(
            self.world_size,
            num_layers=num_layers,
            virtual_size=self.virtual,
            pipeline_layout=self.pipeline_layout,
            vision_pipeline_layout=self.vision_pipeline_layout,
            tensor_size=self.tensor,
            sequence_parallel=self.sequence_parallel,
            pipeline_size=self.pipeline,
            context_size=self.context,
            expert_size=self.expert,
            expert_tensor_size=self.expert_tensor,
        )

    def settings(self) -> dict[str, Any]:
        """The same in the words of a run's configuration."""
        return {
            "parallel.tensor_model_parallel_size": self.tensor,
            "parallel.sequence_parallel": self.sequence_parallel,
            "parallel.pipeline_model_parallel_size": self.pipeline,
            "parallel.virtual_pipeline_model_parallel_size": self.virtual,
            "parallel.context_parallel_size": self.context,
            "parallel.pipeline_layout": _list(self.pipeline_layout),
            "parallel.vision_pipeline_layout": _list(self.vision_pipeline_layout),
            "parallel.expert_model_parallel_size": self.expert,
            "parallel.expert_tensor_parallel_size": self.expert_tensor,
            "parallel.moe_token_dispatcher_type": self.moe.token_dispatcher_type,
            "parallel.use_distributed_optimizer": self.distributed_optimizer,
            "parallel.overlap_grad_reduce": self.overlap,
            "parallel.overlap_param_gather": self.overlap and self.distributed_optimizer,
            "model.vision_parallelism": self.vision,
            "model.recompute": self.recompute,
            "model.freeze": list(self.freeze),
            "train.micro_batch_size": self.micro_batch_size,
            "train.precision": self.precision,
        }


def _list(counts: tuple[int, ...] | None) -> list[int] | None:
    return None if counts is None else list(counts)


LAYOUTS = {
    "TP1": TestLayout(),
    "TP2": TestLayout(2, tensor=2),
    "TP2+SP": TestLayout(2, tensor=2, sequence_parallel=True),
    "TP4": TestLayout(4, tensor=4),
    "TP4+SP": TestLayout(4, tensor=4, sequence_parallel=True),
    "PP2": TestLayout(2, pipeline=2),
    "PP2 uneven": TestLayout(2, pipeline=2, pipeline_layout=(3, 1)),
    "PP4": TestLayout(4, pipeline=4),
    "PP4, no layers beside the tower and the head": TestLayout(4, pipeline=4, pipeline_layout=(0, 2, 2, 0)),
    "PP4, stages without layers between": TestLayout(4, pipeline=4, pipeline_layout=(2, 0, 0, 2)),
    "PP2xVPP2": TestLayout(2, pipeline=2, virtual=2),
    "TP2xPP2+SP": TestLayout(4, tensor=2, pipeline=2, sequence_parallel=True),
    "DP2, distributed optimizer": TestLayout(2, distributed_optimizer=True),
    "DP2, overlapped": TestLayout(2, distributed_optimizer=True, overlap=True),
    "DP2xTP2": TestLayout(4, tensor=2),
    "TP2, vision DP": TestLayout(2, tensor=2, vision="data"),
    "TP2+SP, vision DP": TestLayout(2, tensor=2, vision="data", sequence_parallel=True),
    "TP4, vision DP": TestLayout(4, tensor=4, vision="data"),
    "TP2+SP, selective recompute": TestLayout(2, tensor=2, sequence_parallel=True, recompute="selective"),
    "TP2xPP2+SP, full recompute": TestLayout(4, tensor=2, pipeline=2, sequence_parallel=True, recompute="full"),
}


def set_up(
    hf_dir: str, layout: TestLayout, dtype: torch.dtype = torch.float32
) -> tuple[list[torch.nn.Module], ProcessGroupCollection]:
    """A model loaded from a Hugging Face directory, wrapped for data parallelism, in this rank's place."""
    hf_config = registry.load_hf_config(hf_dir)
    family = registry.detect(hf_config)
    # What transformers' forward pass computes.
    image_mask = "transformers" if family.chooses_image_mask(hf_config) else None
    model_config = family.config_from_hf(hf_config, False, image_mask)
    ranks = layout.ranks(len(model_config.text.layers))
    groups = build_groups(ranks)
    initialize_megatron(1, groups)
    settings = BuildSettings(
        ranks,
        dtype,
        layout.recompute,
        layout.vision,
        overlapped=layout.overlap,
        moe=layout.moe,
        loss=layout.loss,
        whole_matrices=layout.whole_matrices,
    )
    chunks = build_chunks(family, model_config, settings, groups)
    load_hf_into_model(chunks, hf_dir, family, model_config, groups)
    Trainable(layout.freeze).freeze(chunks)
    return wrap_data_parallel(chunks, groups, layout.distributed_optimizer, layout.overlap), groups


def random_positions(load: np.ndarray, num_ranks: int) -> np.ndarray:
    """Tokens of every context rank, anywhere."""
    order = np.random.default_rng(len(load)).permutation(len(load))
    return np.sort(order.reshape(num_ranks, -1), axis=1)


def own_micro_batches(
    model: Sequence[torch.nn.Module],
    micro_batches: list[MicroBatch],
    groups: ProcessGroupCollection,
    layout: TestLayout,
) -> list[MicroBatch]:
    """This rank's share, its sequence padded for sequence parallelism, with what its stage's towers read."""
    mine = micro_batches[groups.dp.rank() :: groups.dp.size()]
    assert not layout.sequence_parallel or mine[0].input_ids.shape[1] % layout.tensor == 0
    if layout.context > 1:
        kinds = unwrap_model(list(model))[0].language_model.text.attention_kinds
        ranks = Layout(tensor_size=layout.tensor, sequence_parallel=layout.sequence_parallel)
        plan = planned_positions if layout.blocks == "planned" else random_positions
        sharding = ContextSharding(groups.cp.rank(), layout.context, kinds, ranks.sequence_shards, plan)
        mine = [shard_for_context(batch, sharding) for batch in mine]
    mine = [batch.to(platform.current().device) for batch in mine]
    counts = layout.vision_pipeline_layout or ()
    names = tower_inputs(Layout(pipeline_size=layout.pipeline, tower_counts=counts), groups.pp.rank())
    return [
        replace(batch, media_inputs={name: batch.media_inputs[name] for name in names if name in batch.media_inputs})
        for batch in mine
    ]


@dataclass
class RankResult:
    """What a rank computed: whole gradients, losses, and logits of each micro-batch (last stage, else empty)."""

    gradients: dict[str, torch.Tensor]
    loss_sum: float
    label_tokens: float
    logits: list[torch.Tensor]
    data_rank: int


def run_case(hf_dir: str, layout: TestLayout, cases: dict[str, list[MicroBatch]]) -> dict[str, RankResult]:
    """Forward and backward of each case's global batch; the model is built once."""
    model, groups = set_up(hf_dir, layout)
    logits = _record_logits(model, groups)
    results = {}
    for name, micro_batches in cases.items():
        for chunk in model:
            chunk.zero_grad_buffer()
        logits.clear()
        sums = run_global_batch(model, own_micro_batches(model, micro_batches, groups, layout), groups)[0]
        collect_expert_use(model, groups)
        gradients = whole_gradients(model, groups)
        results[name] = RankResult(gradients, sums[0].item(), sums[1].item(), list(logits), groups.dp.rank())
    return results


def _record_logits(model: Sequence[torch.nn.Module], groups: ProcessGroupCollection) -> list[torch.Tensor]:
    """Keep the whole logits [B, S, V] of every forward pass of the last stage, which the loss itself never makes."""
    recorded: list[torch.Tensor] = []
    language_model = unwrap_model(list(model))[-1].language_model
    compute = language_model.losses

    @torch.no_grad()
    def logits(x: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        head = language_model.head
        weight = Operand(language_model.head_weight())
        (part,) = multiply(language_model.norm(x), [weight], groups.tp, head.sequence_parallel)
        parts = [torch.empty_like(part) for _ in range(groups.tp.size())]
        torch.distributed.all_gather(parts, part.contiguous(), group=groups.tp)
        whole = _from_context_ranks(torch.cat(parts, dim=-1).transpose(0, 1), batch, groups).cpu()
        return whole if head.softcap is None else head.softcap * torch.tanh(whole / head.softcap)

    def losses(x: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        recorded.append(logits(x, batch))
        return compute(x, batch)

    if hasattr(language_model, "norm"):
        language_model.losses = losses
    return recorded


def _from_context_ranks(values_BS: torch.Tensor, batch: MicroBatch, groups: ProcessGroupCollection) -> torch.Tensor:
    """Values of the tokens of all context ranks, in their places."""
    if batch.context is None:
        return values_BS
    parts = [torch.empty_like(values_BS, memory_format=torch.contiguous_format) for _ in range(groups.cp.size())]
    torch.distributed.all_gather(parts, values_BS.contiguous(), group=groups.cp)
    positions = [torch.empty_like(batch.context.positions) for _ in parts]
    torch.distributed.all_gather(positions, batch.context.positions, group=groups.cp)
    return torch.cat(parts, dim=1)[:, torch.cat(positions, dim=1)[0].argsort()]


def whole_gradients(model: Sequence[torch.nn.Module], groups: ProcessGroupCollection) -> dict[str, torch.Tensor]:
    """Main gradients by name, gathered over all splits and, with the distributed optimizer, over data ranks."""
    gradients: dict[str, torch.Tensor] = {}
    for chunk in model:
        if chunk.ddp_config.use_distributed_optimizer:
            for buffers, group in ((chunk.buffers, groups.dp_cp), (chunk.expert_parallel_buffers, groups.expt_dp)):
                for bucket in (bucket for buffer in buffers for bucket in buffer.buckets):
                    shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                    torch.distributed.all_gather_into_tensor(bucket.grad_data, shard, group=group)
        for name, parameter in chunk.module.named_parameters():
            if parameter.requires_grad:
                gradients[name] = gather_parameter(parameter, parameter.main_grad, groups)
    return gradients


def gather_parameter(
    parameter: torch.nn.Parameter, values: torch.Tensor, groups: ProcessGroupCollection
) -> torch.Tensor:
    """Whole values of a parameter-shaped tensor, as a copy on the host."""
    return gather_full(values.detach(), parameter, groups).cpu().clone()


def hf_gradients(model: Any) -> dict[str, torch.Tensor]:
    """Gradients of a transformers model under our names."""
    return by_our_names(model, {name: parameter.grad for name, parameter in model.named_parameters()})


def by_our_names(model: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors of a transformers model under our names, cut where one is several weights of ours.

    Args:
        model: of transformers.
        tensors: by their names in its memory; None for a gradient that it does not compute.
    """
    renamed = {our_name(name): tensor for name, tensor in tensors.items()}
    family = registry.detect(model.config)
    weights = family.weight_map(family.config_from_hf(model.config, text_only=False)).items()
    parts = [(name, weight, weight.part_of) for name, weight in weights if weight.part_of is not None]
    cut = {}
    for name, weight, part in parts:
        tensor = renamed[name.removesuffix(weight.suffix) + part.suffix]
        cut[name] = None if tensor is None else tensor.narrow(part.dim, part.start, part.stop - part.start)
    fused = {name.removesuffix(weight.suffix) + part.suffix for name, weight, part in parts}
    return {name: tensor for name, tensor in renamed.items() if name not in fused} | cut


def our_name(name: str) -> str:
    """Our name of a parameter in transformers' memory (not in its files)."""
    name = name.removeprefix("model.").replace("vision_model.", "")
    for theirs, ours in OUR_PREFIXES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return f"language_model.{name}"


OUR_PREFIXES = {
    "multi_modal_projector.": "projector.",
    "embed_vision.multimodal_embedder.": "projector.vision.",
    "embed_vision.embedding_projection.": "projector.vision.embedding_projection.",
    "embed_vision.": "vision_tower.",
    "embed_audio.": "projector.audio.",
    "audio_tower.": "audio_tower.",
    "visual.merger.": "projector.merger.",
    "visual.deepstack_merger_list.": "projector.deepstack_merger_list.",
    "visual.": "vision_tower.",
    "language_model.": "language_model.",
    "vision_tower.": "vision_tower.",
}
