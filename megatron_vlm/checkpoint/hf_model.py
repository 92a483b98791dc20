"""A running model's weights from and to a Hugging Face directory, in any layout.

Loading: each rank reads its own slices and nothing else. Exporting: one tensor at a time goes to the first rank, which
writes it; no rank ever holds more than one gathered tensor. How a parameter is split stands on the parameter
(megatron-core's `tensor_model_parallel` and `partition_dim`); any other parameter is a replica on every tensor rank.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model

from megatron_vlm.checkpoint.convert import ExportPlan, check_tied_copies, plan_export
from megatron_vlm.checkpoint.distributed import on_first_rank
from megatron_vlm.checkpoint.hf import SafetensorsReader, SafetensorsWriter
from megatron_vlm.checkpoint.safetensors_files import row_blocks
from megatron_vlm.checkpoint.staging import check_export_target, staged_directory
from megatron_vlm.errors import CheckpointError
from megatron_vlm.families import registry

Chunks = Sequence[torch.nn.Module]


def load_hf_into_model(
    model_chunks: Chunks,
    hf_dir: str | os.PathLike,
    family: registry.Family,
    model_config: Any,
    groups: ProcessGroupCollection,
) -> None:
    """Fill this rank's parameters from a Hugging Face directory; values are converted to the parameters' types.

    Vocabulary padding becomes zero. fp32 main parameters of an optimizer that exists already are the caller's.

    Args:
        model_chunks: this rank's stages, wrapped for data parallelism or not.
        hf_dir: a directory with safetensors.
        family: of the model.
        model_config: of the model; a text-only one takes the language model out of a multimodal directory.
        groups: process groups; `tp` is read.

    Raises:
        CheckpointError: the files are missing, damaged, or do not fit the model; every rank raises the same.
    """
    weight_map = family.weight_map(model_config)
    with SafetensorsReader(hf_dir) as reader, torch.no_grad():
        names = weight_map.match(reader)
        check_tied_copies(weight_map, reader, names)
        hf_names = {name: hf_name for hf_name, name in names.items()}
        for name, parameter in _named_parameters(model_chunks):
            _load_parameter(parameter, reader, hf_names[name], groups)


def _load_parameter(
    parameter: torch.nn.Parameter, reader: SafetensorsReader, hf_name: str, groups: ProcessGroupCollection
) -> None:
    shape = reader.tensors[hf_name].shape
    dim = _split_dim(parameter)
    if dim is None:
        dim, start = 0, 0
    else:
        start = groups.tp.rank() * parameter.shape[dim]
    if not shape:
        parameter.copy_(reader.read(hf_name))
        return
    # Rows past the file's are vocabulary padding; whole ranks may hold nothing else.
    count = max(0, min(parameter.shape[dim], shape[dim] - start))
    parameter.narrow(dim, 0, count).copy_(reader.read_slice(hf_name, dim, min(start, shape[dim]), start + count))
    parameter.narrow(dim, count, parameter.shape[dim] - count).zero_()


def export_hf_from_model(
    model_chunks: Chunks,
    hf_dir: str | os.PathLike,
    out_dir: str | os.PathLike,
    family: registry.Family,
    model_config: Any,
    groups: ProcessGroupCollection,
) -> None:
    """Write the model as a Hugging Face directory; called on every rank.

    Names, dtypes and shards follow `hf_dir`; see `plan_export`. Call `check_export_target` before training, too.

    Args:
        model_chunks: this rank's stages, wrapped for data parallelism or not.
        hf_dir: the model's Hugging Face directory, with or without weights.
        out_dir: the new directory; missing or empty. Only the first rank needs to reach it.
        family: of the model.
        model_config: of the model.
        groups: process groups; `tp`, `pp` and `dp_cp` are read.

    Raises:
        CheckpointError: the target is not empty or cannot be written; every rank raises the same.
    """
    on_first_rank(lambda: check_export_target(out_dir))
    for chunk in model_chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)  # otherwise updates arrive with the next forward pass
    source = _Gatherer(model_chunks, groups)
    weight_map = family.weight_map(model_config)
    plan = on_first_rank(lambda: plan_export(hf_dir, registry.load_hf_config(hf_dir), weight_map, source.dtypes()))
    failure: CheckpointError | None = None
    if groups.dp_cp.rank() == 0:
        gathered = (source.gather(plan.names[stored.name]) for stored in plan.files)
        try:
            if source.is_writer:
                _write(plan, gathered, out_dir)
        except CheckpointError as error:
            failure = error
        finally:
            for _ in gathered:  # ranks that do not write, and the writer after a full disk: the others are sending
                pass
    on_first_rank(lambda: _raise(failure))


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def _write(plan: ExportPlan, gathered: Iterator[torch.Tensor | None], out_dir: str | os.PathLike) -> None:
    with staged_directory(out_dir) as staging:
        writer = SafetensorsWriter(staging, plan.files)
        try:
            for stored, tensor in zip(plan.files, gathered, strict=False):
                assert tensor is not None
                # Block by block: parameters may live on another device and in another precision. Rows past the
                # file's are vocabulary padding.
                for first_row, end_row in row_blocks(stored.shape, stored.dtype):
                    rows = tensor[first_row:end_row] if stored.shape else tensor
                    host_rows = torch.empty(rows.shape, dtype=stored.dtype)
                    writer.write(stored.name, first_row, host_rows.copy_(rows))
            writer.close()
        finally:
            writer.abort()
        plan.write_companions(staging)


@dataclass(frozen=True)
class _Place:
    """Where a parameter is: pipeline rank, dtype, shape of a tensor rank's part, and the split dimension."""

    pipeline_rank: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    split_dim: int | None


class _Gatherer:
    """Brings single parameters to the writing rank (first of the tensor, pipeline and data groups)."""

    def __init__(self, model_chunks: Chunks, groups: ProcessGroupCollection) -> None:
        self._groups = groups
        self._parameters = dict(_named_parameters(model_chunks))
        mine = {
            name: _Place(groups.pp.rank(), parameter.dtype, tuple(parameter.shape), _split_dim(parameter))
            for name, parameter in self._parameters.items()
        }
        stages: list[dict[str, _Place]] = [{} for _ in range(groups.pp.size())]
        torch.distributed.all_gather_object(stages, mine, group=groups.pp)
        # The first stage that has a parameter owns it: the last stage's tied embedding is a copy.
        self._places = {name: place for stage in reversed(stages) for name, place in stage.items()}
        self.is_writer = groups.tp.rank() == 0 and groups.pp.rank() == 0

    def dtypes(self) -> dict[str, torch.dtype]:
        """Of all parameters of all stages."""
        return {name: place.dtype for name, place in self._places.items()}

    def gather(self, name: str) -> torch.Tensor | None:
        """The whole tensor on the writing rank, None elsewhere; every rank calls it with the same name."""
        place, tensor_group, pipeline_group = self._places[name], self._groups.tp, self._groups.pp
        tensor: torch.Tensor | None = None
        if pipeline_group.rank() == place.pipeline_rank:
            tensor = self._gather_over_tensor_ranks(self._parameters[name].detach(), place)
        if place.pipeline_rank == 0 or tensor_group.rank() != 0:
            return tensor if self.is_writer else None
        if tensor is not None:
            writer = torch.distributed.get_global_rank(pipeline_group, 0)
            torch.distributed.send(tensor.contiguous(), writer, group=pipeline_group)
        elif self.is_writer:
            owner = torch.distributed.get_global_rank(pipeline_group, place.pipeline_rank)
            received = self._like_parameters(self._whole_shape(place), place.dtype)
            torch.distributed.recv(received, owner, group=pipeline_group)
            return received
        return None

    def _gather_over_tensor_ranks(self, part: torch.Tensor, place: _Place) -> torch.Tensor | None:
        """The whole tensor on tensor rank 0."""
        group = self._groups.tp
        if place.split_dim is None or group.size() == 1:
            return part if group.rank() == 0 else None
        first = torch.distributed.get_global_rank(group, 0)
        if group.rank() != 0:
            torch.distributed.gather(part.contiguous(), None, dst=first, group=group)
            return None
        # Row blocks of one tensor need no concatenation, and the largest tensors are split by rows.
        whole = torch.empty(self._whole_shape(place), dtype=part.dtype, device=part.device)
        parts = list(whole.chunk(group.size(), dim=place.split_dim))
        buffers = [target if target.is_contiguous() else torch.empty_like(part) for target in parts]
        torch.distributed.gather(part.contiguous(), buffers, dst=first, group=group)
        for target, buffer in zip(parts, buffers, strict=True):
            if target is not buffer:
                target.copy_(buffer)
        return whole

    def _whole_shape(self, place: _Place) -> list[int]:
        shape = list(place.shape)
        if place.split_dim is not None:
            shape[place.split_dim] *= self._groups.tp.size()
        return shape

    def _like_parameters(self, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised, on the device of this rank's parameters."""
        device = next(iter(self._parameters.values())).device
        return torch.empty(shape, dtype=dtype, device=device)


def _named_parameters(model_chunks: Chunks) -> list[tuple[str, torch.nn.Parameter]]:
    return [pair for chunk in unwrap_model(list(model_chunks)) for pair in chunk.named_parameters()]


def _split_dim(parameter: Any) -> int | None:
    """The dimension that is divided over the tensor ranks; None for a replica."""
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
