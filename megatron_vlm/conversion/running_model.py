"""A running model's weights from and to a Hugging Face directory, in any layout.

Loading: each rank reads its own parts and little else. Exporting: each pipeline stage of a large model writes files of
its own. A few rows of one tensor at a time (of experts at least one, all of it) go to the stage's first rank, which
writes them; no rank ever holds more than that. The directory gets its name when all stages have written their files.
"""

from __future__ import annotations

import math
import os
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model

from megatron_vlm import platform
from megatron_vlm.checkpoint.float8 import open_weights
from megatron_vlm.checkpoint.hf import SafetensorsReader, SafetensorsWriter
from megatron_vlm.checkpoint.manager import gather_parameters
from megatron_vlm.conversion.convert import check_tied_copies
from megatron_vlm.conversion.export_plan import ExportPlan, plan_export
from megatron_vlm.errors import CheckpointError
from megatron_vlm.families import registry
from megatron_vlm.files.block_memory import BlockMemory
from megatron_vlm.files.durable import check_export_target, staged_directory, write_durably, writing_failed
from megatron_vlm.files.safetensors_headers import INDEX_FILE, Shard, StoredTensor, WeightFiles, row_blocks
from megatron_vlm.model.hf_tensors import HfBand, HfTensor
from megatron_vlm.model.weight_tables import Weight
from megatron_vlm.model_configs import VisionLanguageConfig
from megatron_vlm.parallel.parameters import spec_of
from megatron_vlm.parallel.sharding import Group, full_shape, replica_group, splits
from megatron_vlm.platform.agreement import gather_if_any, on_first_rank
from megatron_vlm.progress import Progress

GATHERED_BYTES = 16 * 2**20  # what goes to the writing rank at a time: enough that starting a transfer costs little

Chunks = Sequence[torch.nn.Module]
_Receive = Callable[[], torch.Tensor]
"""Gives memory for rows from another rank."""


def load_hf_into_model(
    model_chunks: Chunks,
    hf_dir: str | os.PathLike,
    family: registry.Family,
    model_config: VisionLanguageConfig,
    groups: ProcessGroupCollection,
) -> None:
    """Fill this rank's parameters from a Hugging Face directory; values are converted to the parameters' types.

    Vocabulary padding becomes zero. fp32 main parameters of an optimizer that exists already are the caller's.

    Args:
        model_chunks: this rank's stages, wrapped for data parallelism or not.
        hf_dir: a directory with safetensors.
        family: of the model.
        model_config: of the model; a text-only one takes the language model out of a multimodal directory.
        groups: process groups.

    Raises:
        CheckpointError: the files are missing, damaged, or do not fit the model; every rank raises the same.
    """
    weight_map = family.weight_map(model_config)
    parameters = defaultdict[str, list[torch.nn.Parameter]](list)
    for name, parameter in _named_parameters(model_chunks):
        parameters[name].append(parameter)
    with open_weights(hf_dir) as reader, torch.no_grad():
        found = weight_map.match(reader)
        check_tied_copies(reader, found)
        work = [
            (held, tensor, band)
            for tensor in found.tensors.values()
            for band in tensor.bands
            if (held := [(part.weight, own) for part in band.parts for own in parameters[part.name]])
        ]
        sizes = [_num_bytes(held, reader.tensors[tensor.hf_name].dtype) for held, tensor, _ in work]
        with Progress("loading weights", sum(sizes)) as progress:
            for (held, tensor, band), num_bytes in zip(work, sizes, strict=True):
                _load(held, reader, tensor, band, groups)
                progress.advance(num_bytes)


def _num_bytes(held: Sequence[tuple[Weight, torch.nn.Parameter]], dtype: torch.dtype) -> int:
    """Bytes of a file's tensor of this type that go into the parameters."""
    return sum(parameter.numel() for _, parameter in held) * dtype.itemsize


def _load(
    held: Sequence[tuple[Weight, torch.nn.Parameter]],
    reader: SafetensorsReader,
    tensor: HfTensor,
    band: HfBand,
    groups: ProcessGroupCollection,
) -> None:
    """Fill the parameters that this rank has of a band."""
    if not tensor.shape:
        for _, parameter in held:
            parameter.copy_(reader.read(tensor.hf_name))
        return
    parts = []
    for weight, parameter in held:
        part = [(0, size) for size in parameter.shape]
        for split in splits(parameter, groups):
            size = parameter.shape[split.dim]
            part[split.dim] = (split.group.rank() * size, (split.group.rank() + 1) * size)
        # Rows past the file's are vocabulary padding; whole ranks may hold nothing else.
        part[0] = (min(part[0][0], band.num_rows), min(part[0][1], band.num_rows))
        count = part[0][1] - part[0][0]
        parameter[count:].zero_()
        if len(band.parts) > 1:
            assert weight.part_of is not None
            part[band.dim] = (part[band.dim][0] + weight.part_of.start, part[band.dim][1] + weight.part_of.start)
        parts.append((parameter[:count], part))
    if band.is_transposed:
        memory, transposed = BlockMemory(), BlockMemory()
        for target, (rows, *inner) in parts:
            for index, row in enumerate(range(*rows)):
                (matrices,) = band.from_file(reader.read_rows(tensor.hf_name, row, row + 1, memory), transposed)
                target[index].copy_(matrices[0][tuple(slice(*bounds) for bounds in inner)])
        return
    shape = band.shape if len(band.parts) > 1 else held[0][0].own_shape
    reader.read_parts(tensor.hf_name, shape, parts, band.first_row * math.prod(band.shape[1:]))


def export_hf_from_model(
    model_chunks: Chunks,
    hf_dir: str | os.PathLike,
    out_dir: str | os.PathLike,
    family: registry.Family,
    model_config: VisionLanguageConfig,
    groups: ProcessGroupCollection,
    checkpoint: Path | None = None,
    carried: Sequence[str] = (),
) -> tuple[str, ...]:
    """Write the model as a Hugging Face directory; called on every rank.

    Names and dtypes follow `hf_dir`; see `plan_export`. Call `check_export_target` before training, too.

    Args:
        model_chunks: this rank's stages, wrapped for data parallelism or not.
        hf_dir: the model's Hugging Face directory, with or without weights.
        out_dir: the new directory; missing or empty. The first rank of every stage has to reach it.
        family: of the model.
        model_config: of the model.
        groups: process groups.
        checkpoint: the folder of the run's checkpoints, or a checkpoint: where tensors that are only carried through
            are looked for first. Else those of `hf_dir` are written.
        carried: names of those that the run began with.

    Returns:
        Names of the tensors that are only carried through.

    Raises:
        CheckpointError: the target is not empty or cannot be written, or tensors that are only carried through are
            gone; every rank raises the same.
    """
    on_first_rank(lambda: check_export_target(out_dir))
    gather_parameters(model_chunks)
    source = _Gatherer(model_chunks, groups)
    weight_map = family.weight_map(model_config)
    plan = on_first_rank(
        lambda: plan_export(
            *(hf_dir, registry.load_hf_config(hf_dir), weight_map, source.dtypes(), checkpoint, carried),
            source.stages(),
        )
    )
    target = Path(out_dir).absolute()
    with _staged_by_first_rank(out_dir) as staging:
        failure: CheckpointError | None = None
        gathered = source.gather(plan)
        try:
            if source.is_first_of_stage:
                _write(plan, source.files_of_stage(plan), gathered, staging, target)
        except CheckpointError as error:
            failure = error
        finally:
            for _ in gathered:  # ranks that do not write, and a writer after a full disk: the others are sending
                pass
        for failed in gather_if_any(failure):
            if failed is not None:
                raise failed
        on_first_rank(lambda: _complete(plan, staging, target))
    return plan.passthrough


@contextmanager
def _staged_by_first_rank(out_dir: str | os.PathLike) -> Iterator[Path]:
    """`staged_directory` of the first rank, for all ranks, which leave the block with the same error or none."""
    with ExitStack() as stack:
        yield on_first_rank(lambda: stack.enter_context(staged_directory(out_dir)))
        on_first_rank(stack.close)


class _Rows(NamedTuple):
    """Some rows of a file's tensor, as rows of its parts; None except on the rank that writes them."""

    stored: StoredTensor
    band: HfBand
    first_row: int
    of_parts: list[torch.Tensor | None]


def _write(plan: ExportPlan, files: WeightFiles, gathered: Iterator[_Rows], staging: Path, target: Path) -> None:
    """Write the files of a stage; with them, on the first stage, what is only carried through."""
    if not staging.is_dir():
        where = f"rank {torch.distributed.get_rank()} on {socket.gethostname()}"
        raise CheckpointError(
            f"{where} does not see the folder that rank 0 made for the export",
            str(staging),
            "name a directory on a file system that all nodes share",
        )
    memory, own = BlockMemory(), {stored.name: stored for stored in files}
    try:
        writer = SafetensorsWriter(staging, files)
        try:
            with Progress(
                "exporting", sum(own[name].num_bytes for name in own.keys() & plan.tensors.keys())
            ) as progress:
                for stored, band, first_row, of_parts in gathered:
                    if stored.name not in own:
                        continue
                    # Parameters may live on another device and in another precision.
                    block = band.to_file([rows for rows in of_parts if rows is not None], stored.dtype, memory)
                    writer.write(stored.name, band.file_rows(first_row, first_row)[0], block)
                    progress.advance(block.nbytes)
            if own.keys() >= {*plan.passthrough}:
                plan.copy_passthrough(writer)
            writer.close()
        finally:
            writer.abort()
    except OSError as error:
        raise writing_failed(error, target) from error


def _complete(plan: ExportPlan, staging: Path, target: Path) -> None:
    """Add what is written once: index, configuration, tokenizer; all weight files must have come."""
    try:
        for shard in plan.files.shards:
            size = (staging / shard.file).stat().st_size
            expected = max((tensor.end_byte for tensor in shard.tensors), default=len(shard.header))
            if size != expected:
                raise CheckpointError(
                    f"{shard.file} has {size} bytes here, and {expected} were written",
                    str(staging),
                    "see whether all nodes share this file system, and export again",
                )
        if plan.files.index is not None:
            write_durably(staging / INDEX_FILE, plan.files.index)
        plan.write_assets(staging)
    except OSError as error:
        raise writing_failed(error, target) from error


@dataclass(frozen=True)
class _Location:
    """Where a parameter is: its pipeline rank, dtype, shape over all ranks, and how many of its rows one rank holds."""

    pipeline_rank: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    rows_per_rank: int


class _Gatherer:
    """Brings rows of single parameters to the rank that writes them: the first rank of a stage."""

    def __init__(self, model_chunks: Chunks, groups: ProcessGroupCollection) -> None:
        self._groups = groups
        self._parameters = dict(_named_parameters(model_chunks))
        mine = {
            name: _Location(groups.pp.rank(), parameter.dtype, full_shape(parameter, groups), _num_rows(parameter))
            for name, parameter in self._parameters.items()
        }
        stages: list[dict[str, _Location]] = [{} for _ in range(groups.pp.size())]
        torch.distributed.all_gather_object(stages, mine, group=groups.pp)
        # The first stage that has a parameter owns it: the last stage's tied embedding is a copy.
        self._locations = {name: location for stage in reversed(stages) for name, location in stage.items()}
        self._memory = defaultdict[int, BlockMemory](lambda: BlockMemory(platform.current().device))
        self.is_first_of_stage = groups.tp.rank() == 0 and groups.dp_cp.rank() == 0

    def dtypes(self) -> dict[str, torch.dtype]:
        """Of all parameters of all stages."""
        return {name: location.dtype for name, location in self._locations.items()}

    def stages(self) -> dict[str, int]:
        """Return the stage that owns each parameter of all stages."""
        return {name: location.pipeline_rank for name, location in self._locations.items()}

    def files_of_stage(self, plan: ExportPlan) -> WeightFiles:
        """Return the files that this stage writes, without the index."""
        stage = self._groups.pp.rank()
        return WeightFiles(tuple(shard for shard in plan.files.shards if self._writer(plan, shard) == stage), None)

    def _writer(self, plan: ExportPlan, shard: Shard) -> int:
        """Return the stage that writes a file: the first of those that have anything of it."""
        names = [part.name for stored in shard.tensors for band in plan.bands(stored.name) for part in band.parts]
        has_others = any(not plan.bands(stored.name) for stored in shard.tensors)
        return 0 if has_others else min((self._locations[name].pipeline_rank for name in names), default=0)

    def gather(self, plan: ExportPlan) -> Iterator[_Rows]:
        """Every weight that this stage has or writes, a few rows at a time; each of its ranks goes through all of them.

        Tensors that several stages have parts of come first, in the order of the plan, so that stages meet; then each
        stage goes on by itself.
        """
        alone, together = [], []
        for shard in plan.files.shards:
            writer = self._writer(plan, shard)
            for stored in shard.tensors:
                bands = plan.bands(stored.name)
                stages = {self._locations[part.name].pipeline_rank for band in bands for part in band.parts}
                if stages - {writer}:
                    together.append((stored, writer))
                elif writer == self._groups.pp.rank():
                    alone.append((stored, writer))
        for stored, writer in together + alone:
            for band in plan.bands(stored.name):
                locations = [self._locations[part.name] for part in band.parts]
                for first_row, end_row in _blocks(band, locations):
                    rows = []
                    for index, (part, location) in enumerate(zip(band.parts, locations, strict=True)):
                        shape = (end_row - first_row, *location.shape[1:])
                        receive = partial(self._memory[index].take, shape, location.dtype)
                        rows.append(self._rows(part.name, location, writer, first_row, shape[0], receive))
                    yield _Rows(stored, band, first_row, rows)

    def _rows(
        self, name: str, location: _Location, writer: int, first_row: int, count: int, receive: _Receive
    ) -> torch.Tensor | None:
        """Rows of a parameter on the first rank of the stage that writes them, None elsewhere."""
        rows = None
        if self._groups.pp.rank() == location.pipeline_rank:
            rows = self._rows_of_stage(self._parameters[name], first_row, count, receive)
        if self.is_first_of_stage:
            rows = _bring(rows, location.pipeline_rank, writer, self._groups.pp, receive)
        return rows

    def _rows_of_stage(
        self, parameter: torch.nn.Parameter, first_row: int, count: int, receive: _Receive
    ) -> torch.Tensor | None:
        """Rows of a parameter of this stage on its first rank, None elsewhere."""
        divided = {split.dim: split.group for split in splits(parameter, self._groups)}
        is_replica_over_tensor_ranks = not divided and not spec_of(parameter).is_expert
        if replica_group(parameter, self._groups).rank() or (is_replica_over_tensor_ranks and self._groups.tp.rank()):
            return None
        row_group, rows = divided.pop(0, None), None
        owner, start = divmod(first_row, _num_rows(parameter))
        if row_group is None or row_group.rank() == owner:
            rows = torch.atleast_1d(parameter.detach())[start : start + count].contiguous()
            for dim, group in divided.items():
                rows = None if rows is None else _gather_to_first(rows, dim, group)
        if row_group is not None and all(group.rank() == 0 for group in divided.values()):
            rows = _bring(rows, owner, 0, row_group, receive)
        return rows


def _bring(rows: torch.Tensor | None, owner: int, target: int, group: Group, receive: _Receive) -> torch.Tensor | None:
    """Give what the group's `owner` has to its `target`.

    By a broadcast, for which the group's ranks are connected already: on a device, a transfer between two ranks would
    take memory for a connection of their own, from every rank of the group to the first.
    """
    if owner == target:
        return rows
    rows = receive() if rows is None else rows
    torch.distributed.broadcast(rows, torch.distributed.get_global_rank(group, owner), group=group)
    return rows if group.rank() == target else None


def _blocks(band: HfBand, locations: Sequence[_Location]) -> Iterator[tuple[int, int]]:
    """First and end rows of blocks of a band, each of which lies on one rank with all its rows of a part."""
    borders = {0, band.num_rows}
    for location in locations:
        borders.update(range(0, band.num_rows, location.rows_per_rank))
    row_elements = sum(math.prod(location.shape[1:]) for location in locations)
    for start, stop in pairwise(sorted(borders)):
        for first, end in row_blocks((stop - start, row_elements), locations[0].dtype, GATHERED_BYTES):
            yield start + first, start + end


def _num_rows(parameter: torch.nn.Parameter) -> int:
    """Rows that this rank holds; a scalar is one."""
    return parameter.shape[0] if parameter.dim() else 1


def _gather_to_first(part: torch.Tensor, dim: int, group: Group) -> torch.Tensor | None:
    """Put the parts of a group's ranks together on its first rank."""
    first = torch.distributed.get_global_rank(group, 0)
    parts = [torch.empty_like(part) for _ in range(group.size())] if group.rank() == 0 else None
    torch.distributed.gather(part, parts, dst=first, group=group)
    return None if parts is None else torch.cat(parts, dim=dim)


def _named_parameters(model_chunks: Chunks) -> list[tuple[str, torch.nn.Parameter]]:
    return [pair for chunk in unwrap_model(list(model_chunks)) for pair in chunk.named_parameters()]
