"""Tensors of Hugging Face files, and how their rows become those of our weights and back.

A tensor holds one weight, or several: one after another in its rows, or side by side in another dimension. Either way
it is a sequence of bands, the rows of which all belong to the same weights. Readers and writers go through the bands of
a tensor once, in blocks of rows, and touch nothing twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_vlm.files.block_memory import BlockMemory
from megatron_vlm.files.safetensors_headers import BLOCK_BYTES, row_blocks
from megatron_vlm.model.weight_tables import Weight, WeightGroup


@dataclass(frozen=True)
class HfPart:
    """One of our weights, with our name of it, as a part of a file's tensor."""

    name: str
    weight: Weight


@dataclass(frozen=True)
class HfBand:
    """Rows of a file's tensor that belong to the same of our weights: to one, or to several side by side.

    Args:
        parts: the weights.
        first_row: row of the tensor at which the band begins.
        shape: shape of the band in the file.
        dim: dimension in which several parts lie side by side; each of them has the same shape in our models.
        is_transposed: whether the matrices are transposed in the file.
    """

    parts: tuple[HfPart, ...]
    first_row: int
    shape: tuple[int, ...]
    dim: int = 0
    is_transposed: bool = False

    @property
    def num_rows(self) -> int:
        """Number of rows of each of our weights, without padding; a scalar is one row."""
        own_shape = self.parts[0].weight.own_shape
        return own_shape[0] if own_shape else 1

    @property
    def _rows_ratio(self) -> int:
        """Number of rows of the file in one row of ours."""
        return self.shape[0] // self.num_rows if self.shape else 1

    def file_rows(self, first_row: int, end_row: int) -> tuple[int, int]:
        """Return where rows of ours begin and end in the file's tensor."""
        return self.first_row + first_row * self._rows_ratio, self.first_row + end_row * self._rows_ratio

    def blocks(self, dtype: torch.dtype, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
        """Yield (first row, end row) of ours in blocks of at most `block_bytes` for all parts together, or one row."""
        return row_blocks((self.num_rows, math.prod(self.shape) // self.num_rows), dtype, block_bytes)

    def from_file(self, rows: torch.Tensor, memory: BlockMemory) -> Sequence[torch.Tensor]:
        """Return rows of the file in the shape of each part: views, or in `memory` if they are transposed."""
        if len(self.parts) > 1:
            return rows.split(self._sizes, self.dim)
        if self.is_transposed:
            rows = _transpose(rows, memory.take(rows.transpose(-2, -1).shape, rows.dtype))
        return [rows.view(-1, *self.parts[0].weight.own_shape[1:]) if self.shape else rows]

    def to_file(self, rows: Sequence[torch.Tensor], dtype: torch.dtype, memory: BlockMemory) -> torch.Tensor:
        """Return rows of every part as the file holds them.

        Args:
            rows: the same rows of each part, on any device.
            dtype: dtype in the file.
            memory: host memory for what cannot be a view of `rows`.
        """
        shape = (len(rows[0]) * self._rows_ratio, *self.shape[1:]) if self.shape else ()
        if len(rows) == 1 and not self.is_transposed and (rows[0].dtype, rows[0].device) == (dtype, memory.device):
            return rows[0].view(shape)
        block = memory.take(shape, dtype)
        if self.is_transposed:
            return _transpose(rows[0].view(-1, *self.parts[0].weight.shape[1:]), block)
        targets = [block] if len(rows) == 1 else block.split(self._sizes, self.dim)
        for target, part in zip(targets, rows, strict=True):
            target.copy_(part.view(target.shape))
        return block

    @property
    def _sizes(self) -> list[int]:
        """Sizes of the parts along `dim`."""
        return [part.weight.shape[self.dim] for part in self.parts]


def _transpose(matrices: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """Transpose matrices into `result`, one at a time: torch copies a single one three times as fast."""
    for target, matrix in zip(result, matrices, strict=True):
        target.copy_(matrix.t())
    return result


@dataclass(frozen=True)
class HfTensor:
    """A tensor of a Hugging Face file.

    Args:
        hf_name: its name in the file.
        parts: the weights that it holds: a single one, or slices of one dimension in their order.
        is_transposed: whether the matrices of its one weight are transposed in the file.
    """

    hf_name: str
    parts: tuple[HfPart, ...]
    is_transposed: bool = False

    def __post_init__(self) -> None:
        if [part.weight.part_of for part in self.parts] == [None]:
            return
        end = 0
        for part in self.parts:
            shape, section = part.weight.shape, part.weight.part_of
            assert section is not None and not self.is_transposed, f"{part.name} cannot be a part of {self.hf_name}"
            assert (section.dim, section.start) == (self.dim, end), f"{part.name} does not follow in {self.hf_name}"
            end = section.stop
            full_shape = (*shape[: self.dim], sum(self._sizes), *shape[self.dim + 1 :])
            assert (end - section.start, full_shape) == (shape[self.dim], self.shape), f"{part.name} is {shape}"
            assert self.dim == 0 or part.weight.divided_shape is None, f"{part.name} has another shape here"

    @property
    def dim(self) -> int:
        """The dimension in which its parts follow each other."""
        part_of = self.parts[0].weight.part_of
        return 0 if part_of is None else part_of.dim

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the file."""
        weight = self.parts[0].weight
        if self.is_transposed:
            return weight.transposed_shape
        if weight.part_of is None:
            return weight.shape
        return (*weight.shape[: self.dim], sum(self._sizes), *weight.shape[self.dim + 1 :])

    @property
    def _sizes(self) -> list[int]:
        """Sizes of the parts along `dim`."""
        return [part.weight.shape[self.dim] for part in self.parts]

    @property
    def bands(self) -> tuple[HfBand, ...]:
        """Bands of the tensor in their order: one for each weight, or a single one of all weights side by side."""
        if self.dim or self.is_transposed:
            return (HfBand(self.parts, 0, self.shape, self.dim, self.is_transposed),)
        bands = []
        for part in self.parts:
            first_row = 0 if part.weight.part_of is None else part.weight.part_of.start
            bands.append(HfBand((part,), first_row, part.weight.shape))
        return tuple(bands)


def tensors_of(group: WeightGroup, hf_prefix: str, is_transposed: bool = False) -> dict[str, HfTensor]:
    """Return the tensors of a group in files that use one of its prefixes, by their names there."""
    parts: dict[str, list[HfPart]] = {}
    for weight in group.weights:
        parts.setdefault(hf_prefix + weight.hf_suffix, []).append(HfPart(group.prefix + weight.suffix, weight))
    return {hf_name: HfTensor(hf_name, tuple(found), is_transposed) for hf_name, found in parts.items()}
