"""Weights stored as float8 numbers with scales, read as bfloat16.

In a Hugging Face directory with `quantization_config: {"quant_method": "fp8"}`, a float8 tensor `x.weight` stands
beside `x.weight_scale_inv`: one number for the whole tensor, or one for each block of `weight_block_size` rows and
columns (the last ones may be smaller). A weight is the product of both, computed in fp32 and rounded once.
`x.activation_scale` is for computing in float8; it is left out.

Source: transformers `integrations/finegrained_fp8.py` (`FP8Linear`, `Fp8Dequantize`). `Fp8Dequantize` guesses the block
size from the number of scales, which is wrong where blocks do not divide a dimension; here config.json tells it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_vlm.checkpoint.hf import SafetensorsReader
from megatron_vlm.errors import CheckpointError
from megatron_vlm.files.block_memory import BlockMemory
from megatron_vlm.files.safetensors_headers import StoredTensor, WeightFiles

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RESULT_DTYPE = torch.bfloat16
DEFAULT_BLOCK_SIZE = (128, 128)  # of transformers' FineGrainedFP8Config
USE_OTHER_WEIGHTS = "use the unquantised weights of this model, or save it dequantised with the tool that quantised it"


def open_weights(directory: str | os.PathLike) -> SafetensorsReader:
    """Open a Hugging Face directory's weights, dequantised where config.json says that they are float8.

    Args:
        directory: config.json and safetensors.

    Raises:
        CheckpointError: the weights are quantised in another way, their scales do not fit, or see `SafetensorsReader`.
    """
    path = Path(directory).absolute() / "config.json"
    quantization = find_quantization(json.loads(path.read_bytes())) if path.is_file() else None
    if quantization is None:
        return SafetensorsReader(directory)
    if not isinstance(quantization, Mapping):
        what = f"quantization_config is a JSON {type(quantization).__name__}, not an object"
        raise CheckpointError(what, str(path), USE_OTHER_WEIGHTS)
    method, scale_format = quantization.get("quant_method"), quantization.get("scale_fmt") or "float"
    if method != "fp8" or scale_format != "float":
        what = f"quant_method {method!r}" + (f" with scale_fmt {scale_format!r}" if method == "fp8" else "")
        raise CheckpointError(f"weights quantised by {what} are not read", str(path), USE_OTHER_WEIGHTS)
    block_size = quantization.get("weight_block_size", DEFAULT_BLOCK_SIZE)
    if block_size is None:
        return DequantizingReader(directory, None)
    valid = isinstance(block_size, list) and len(block_size) == 2 and all(type(n) is int and n > 0 for n in block_size)
    if not valid:
        what = f"weight_block_size {block_size} is not a number of rows and columns"
        raise CheckpointError(what, str(path), USE_OTHER_WEIGHTS)
    return DequantizingReader(directory, (block_size[0], block_size[1]))


def find_quantization(config: Mapping[str, Any]) -> Any:
    """The `quantization_config` of a config.json, where transformers looks for it; None where there is none."""
    text_config = config.get("text_config")
    nested = text_config.get("quantization_config") if isinstance(text_config, Mapping) else None
    return config.get("quantization_config") or nested


@dataclass(frozen=True)
class _Quantized:
    """A float8 tensor: where it is, where its scales are, and rows and columns of a block."""

    stored: StoredTensor
    scales: StoredTensor
    block_size: tuple[int, int]


class DequantizingReader(SafetensorsReader):
    """Reads a directory with float8 weights as if it held their bfloat16 products, and no scales.

    A float8 tensor without scales keeps its type, for `WeightMap.match` to refuse.

    Args:
        directory: holds safetensors.
        block_size: rows and columns that share a scale; None: all of a tensor.

    Raises:
        CheckpointError: scales of another number or type, or see `SafetensorsReader`.
    """

    def __init__(self, directory: str | os.PathLike, block_size: tuple[int, int] | None) -> None:
        super().__init__(directory)
        self._stored = self.tensors
        try:
            self._quantized = {
                stored.name: _pair(stored, self._stored[stored.name + "_scale_inv"], block_size, self.directory)
                for stored in self._stored.values()
                if stored.dtype in FLOAT8 and stored.name + "_scale_inv" in self._stored
            }
        except CheckpointError:
            self.close()
            raise
        beside = {name + "_scale_inv" for name in self._quantized}
        beside |= {name.removesuffix("weight") + "activation_scale" for name in self._quantized}
        # What an export writes that follows these files.
        self.files = WeightFiles.plan(
            (stored.name, RESULT_DTYPE if stored.name in self._quantized else stored.dtype, stored.shape)
            for stored in self._stored.values()
            if stored.name not in beside
        )
        self.tensors = {tensor.name: tensor for tensor in self.files}
        self._latest_scales: tuple[str, torch.Tensor] | None = None

    def _read_range(
        self, stored: StoredTensor, begin_byte: int, end_byte: int, memory: BlockMemory | None = None
    ) -> torch.Tensor:
        quantized = self._quantized.get(stored.name)
        if quantized is None:
            return super()._read_range(self._stored[stored.name], begin_byte, end_byte, memory)
        first, end = begin_byte // stored.dtype.itemsize, end_byte // stored.dtype.itemsize
        values = super()._read_range(quantized.stored, first, end, memory)  # of one byte each
        return values.float().mul_(_expand(self._scales(quantized), quantized, first, end)).to(RESULT_DTYPE)

    def _scales(self, quantized: _Quantized) -> torch.Tensor:
        """All scales of a tensor; the latest are kept, because tensors are read in many pieces."""
        name = quantized.scales.name
        if self._latest_scales is None or self._latest_scales[0] != name:
            scales = super()._read_range(quantized.scales, 0, quantized.scales.num_bytes).float()
            if not scales.isfinite().all():
                raise CheckpointError(f"{name} is not finite", str(self.directory), USE_OTHER_WEIGHTS)
            self._latest_scales = (name, scales)
        return self._latest_scales[1]


def _pair(
    stored: StoredTensor, scales: StoredTensor, block_size: tuple[int, int] | None, directory: Path
) -> _Quantized:
    """A tensor with its scales, if their type and number fit."""
    *_, rows, columns = (1, 1, *stored.shape)
    is_one_number = math.prod(scales.shape) == 1
    block_rows, block_columns = (rows, columns) if block_size is None or is_one_number else block_size
    grid = (*stored.shape[:-2], math.ceil(rows / block_rows), math.ceil(columns / block_columns))
    if scales.dtype not in SCALE_DTYPES or not (is_one_number or scales.shape == grid):
        raise CheckpointError(
            f"{scales.name} is {scales.dtype} {list(scales.shape)}: for blocks of {block_rows} x {block_columns} "
            f"(weight_block_size {block_size}) one float or {list(grid)} is read",
            str(directory),
            USE_OTHER_WEIGHTS,
        )
    return _Quantized(stored, scales, (block_rows, block_columns))


def _expand(scales: torch.Tensor, quantized: _Quantized, first: int, end: int) -> torch.Tensor:
    """The scale of each element of a flat range."""
    if len(scales) == 1:
        return scales
    *_, num_rows, num_columns = quantized.stored.shape
    grid_rows, grid_columns = quantized.scales.shape[-2:]
    block_rows, block_columns = quantized.block_size
    first_row, end_row = first // num_columns, math.ceil(end / num_columns)
    rows = torch.arange(first_row, end_row)
    scale_rows = rows // num_rows * grid_rows + rows % num_rows // block_rows
    by_row = scales.view(-1, grid_columns)[scale_rows].repeat_interleave(block_columns, dim=1)[:, :num_columns]
    return by_row.reshape(-1)[first - first_row * num_columns : end - first_row * num_columns]
