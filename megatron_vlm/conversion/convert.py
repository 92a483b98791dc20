"""Conversion between Hugging Face directories and distributed checkpoints: streaming, one process, no GPU.

Tensors go by in small blocks of rows, experts one at a time, so that neither direction ever holds a large tensor, let
alone the model. Every tensor keeps its exact bits; only vocabulary rows are padded with zeros on import and cut off
again on export.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_vlm.checkpoint.float8 import open_weights
from megatron_vlm.checkpoint.hf import SafetensorsReader, SafetensorsWriter, has_weights
from megatron_vlm.checkpoint.run_folder import Manifest, ModelIdentity, find_checkpoint
from megatron_vlm.checkpoint.torch_dist import TorchDistReader, TorchDistWriter
from megatron_vlm.conversion.export_plan import ExportPlan, plan_export
from megatron_vlm.errors import CheckpointError
from megatron_vlm.families import registry
from megatron_vlm.files.durable import check_export_target, staged_directory
from megatron_vlm.files.safetensors_headers import BLOCK_BYTES, row_blocks
from megatron_vlm.model.weight_map import HfWeight, WeightMap
from megatron_vlm.model_configs import VisionLanguageConfig

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same on both sides, and why."""

    hf_name: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """What `verify_checkpoint` found."""

    num_tensors: int
    num_bytes: int
    differences: tuple[Difference, ...]


def import_checkpoint(hf_dir: str | os.PathLike, out_dir: str | os.PathLike, progress: Progress | None = None) -> None:
    """Write a Hugging Face directory's weights as a distributed checkpoint that loads in any layout.

    Args:
        hf_dir: configuration and safetensors.
        out_dir: the new checkpoint; missing or empty.
        progress: called with (bytes done, bytes in all).

    Raises:
        CheckpointError: unreadable source, weights that do not fit config.json, or a target that is not empty.
    """
    check_export_target(out_dir)
    hf_config = registry.load_hf_config(hf_dir)
    family = registry.detect(hf_config)
    model_config = family.config_from_hf(hf_config, text_only=False)
    weight_map: WeightMap = family.weight_map(model_config)
    with open_weights(hf_dir) as reader:
        weights = weight_map.match(reader)
        check_tied_copies(weight_map, reader, weights)
        with staged_directory(out_dir) as staging:
            _import_weights(reader, weights, staging, progress)
            Manifest(identity=identity_of(hf_dir, family.name, model_config)).write(staging)


def _import_weights(
    reader: SafetensorsReader, weights: dict[str, HfWeight], staging: Path, progress: Progress | None
) -> None:
    wanted = {entry.name: entry for entry in weights.values()}  # one of each, where a file repeats a tied weight
    done_bytes, total_bytes = 0, sum(reader.tensors[entry.hf_name].num_bytes for entry in wanted.values())
    buffer = _new_buffer(weights.values(), max(stored.dtype.itemsize for stored in reader.files))
    writer = TorchDistWriter(staging)
    try:
        for stored in reader.files:
            entry = weights.get(stored.name)
            if entry is None or wanted[entry.name] is not entry:
                continue
            writer.write(entry.name, entry.weight.padded_shape, stored.dtype, _padded_rows(reader, entry, buffer))
            done_bytes += stored.num_bytes
            if progress is not None:
                progress(done_bytes, total_bytes)
        writer.close(common_state={})
    finally:
        writer.abort()


def _new_buffer(weights: Iterable[HfWeight], itemsize: int) -> torch.Tensor:
    """Memory for one block, used again for all blocks: new pages for each would cost as much as the copying."""
    row_bytes = max(math.prod(entry.weight.own_shape[1:]) * itemsize for entry in weights)
    return torch.empty(max(BLOCK_BYTES, row_bytes), dtype=torch.uint8)


def _padded_rows(
    reader: SafetensorsReader, entry: HfWeight, buffer: torch.Tensor
) -> Callable[[int, int], torch.Tensor]:
    """Reads rows of our tensor by way of `buffer`; beyond the file's end come zeros."""
    shape = entry.weight.own_shape
    num_rows = shape[0] if shape else 1

    def read(first_row: int, end_row: int) -> torch.Tensor:
        first_read, end_read = min(first_row, num_rows), min(end_row, num_rows)
        rows = reader.read_rows(entry.hf_name, entry.file_row(first_read), entry.file_row(end_read), buffer)
        rows = entry.from_file(rows)
        padding_rows = end_row - first_row - (end_read - first_read)
        return torch.cat([rows, rows.new_zeros(padding_rows, *shape[1:])]) if padding_rows else rows

    return read


def export_checkpoint(
    checkpoint: str | os.PathLike,
    hf_dir: str | os.PathLike,
    out_dir: str | os.PathLike,
    progress: Progress | None = None,
) -> None:
    """Write the weights of a distributed checkpoint as a Hugging Face directory.

    Args:
        checkpoint: an imported checkpoint, a checkpoint of a run, or a run folder (its newest checkpoint).
        hf_dir: the model's Hugging Face directory. Names, dtypes and shards follow its weights, if it has any (see
            `plan_export`); float8 weights are written as bfloat16.
        out_dir: the new directory; missing or empty.
        progress: called with (bytes done, bytes in all).

    Raises:
        CheckpointError: the checkpoint is unreadable or of another model, or the target is not empty.
    """
    check_export_target(out_dir)
    reader, plan = open_for_export(checkpoint, hf_dir, tie_follows_checkpoint=True)
    with reader, staged_directory(out_dir) as staging:
        _export_weights(reader, plan, staging, progress)
        plan.write_companions(staging)


def _export_weights(reader: TorchDistReader, plan: ExportPlan, staging: Path, progress: Progress | None) -> None:
    done_bytes, total_bytes = 0, plan.files.num_bytes
    itemsize = max(tensor.properties.dtype.itemsize for tensor in reader.tensors.values())
    buffer = _new_buffer(plan.weights.values(), itemsize)
    writer = SafetensorsWriter(staging, plan.files)
    try:
        for stored in plan.files:
            entry = plan.weights[stored.name]
            for first_row, end_row in row_blocks(entry.weight.own_shape, stored.dtype):
                rows = reader.read_rows(entry.name, first_row, end_row, buffer).to(stored.dtype)
                writer.write(stored.name, entry.file_row(first_row), entry.to_file(rows))
            done_bytes += stored.num_bytes
            if progress is not None:
                progress(done_bytes, total_bytes)
        writer.close()
    finally:
        writer.abort()


def verify_checkpoint(
    hf_dir: str | os.PathLike, checkpoint: str | os.PathLike, progress: Progress | None = None
) -> Comparison:
    """Compare a Hugging Face directory with a distributed checkpoint, bit by bit.

    A checkpoint of another precision is compared after conversion to the type in the Hugging Face file.

    Args:
        hf_dir: configuration and safetensors.
        checkpoint: see `export_checkpoint`.
        progress: called with (bytes done, bytes in all).

    Returns:
        How much was compared, and every tensor that differs.
    """
    stored_checkpoint, plan = open_for_export(checkpoint, hf_dir)
    differences = []
    with stored_checkpoint, open_weights(hf_dir) as reader:
        weights = plan.weight_map.match(reader)
        total_bytes = sum(reader.tensors[hf_name].num_bytes for hf_name in weights)
        done_bytes = 0
        for hf_name, entry in weights.items():
            reason = _compare(reader, entry, stored_checkpoint)
            if reason is not None:
                differences.append(Difference(hf_name, reason))
            done_bytes += reader.tensors[hf_name].num_bytes
            if progress is not None:
                progress(done_bytes, total_bytes)
    return Comparison(len(weights), total_bytes, tuple(differences))


def _compare(reader: SafetensorsReader, entry: HfWeight, checkpoint: TorchDistReader) -> str | None:
    """Why a tensor differs, or None."""
    stored, saved = reader.tensors[entry.hf_name], checkpoint.tensors[entry.name]
    read_expected = _padded_rows(reader, entry, _new_buffer([entry], stored.dtype.itemsize))
    num_different, largest = 0, 0.0
    for first_row, end_row in row_blocks(tuple(saved.size), saved.properties.dtype):
        expected = read_expected(first_row, end_row)
        actual = checkpoint.read_rows(entry.name, first_row, end_row).to(stored.dtype)
        if not torch.equal(_bits(actual), _bits(expected)):
            num_different += int((_bits(actual) != _bits(expected)).sum())
            largest = max(largest, float((actual.double() - expected.double()).abs().max()))
    return f"{num_different} bytes differ, largest difference {largest:.3g}" if num_different else None


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def open_for_export(
    checkpoint: str | os.PathLike, hf_dir: str | os.PathLike, tie_follows_checkpoint: bool = False
) -> tuple[TorchDistReader, ExportPlan]:
    """Open a checkpoint, make sure that it belongs to the model of `hf_dir`, and plan its export.

    Args:
        checkpoint: see `export_checkpoint`.
        hf_dir: the model's Hugging Face directory.
        tie_follows_checkpoint: where files would tell whether embedding and head are tied and `hf_dir` has none, take
            the checkpoint's word, not config.json's.

    Raises:
        CheckpointError: it is unreadable, of another family or kind, or its tensors do not fit.
    """
    directory = find_checkpoint(checkpoint)
    identity = Manifest.read(directory).identity
    hf_config = registry.load_hf_config(hf_dir)
    family = registry.detect(hf_config)
    same_kind = identity.text_only or identity.model_type == hf_config.model_type
    if identity.family != family.name or not same_kind:
        raise CheckpointError(
            f"this is a {identity.model_type} checkpoint of family {identity.family}, "
            f"but {hf_dir} is a {hf_config.model_type} of family {family.name}",
            str(directory),
            "give the Hugging Face directory that the checkpoint was trained from",
        )
    if tie_follows_checkpoint and family.head_tells_tie and not has_weights(Path(hf_dir)):
        registry.set_tie(hf_config, identity.tied)
    model_config = family.config_from_hf(hf_config, text_only=identity.text_only)
    weight_map: WeightMap = family.weight_map(model_config)
    reader = TorchDistReader(directory)
    try:
        weight_map.check_stored(reader.shapes, str(directory))
        dtypes = {name: tensor.properties.dtype for name, tensor in reader.tensors.items()}
        return reader, plan_export(hf_dir, hf_config, weight_map, dtypes)
    except CheckpointError:
        reader.close()
        raise


def identity_of(hf_dir: str | os.PathLike, family: str, model_config: VisionLanguageConfig) -> ModelIdentity:
    """What a checkpoint of this model says about itself, with config.json as it stands on disk."""
    hf_config = json.loads((Path(hf_dir) / "config.json").read_bytes())
    return ModelIdentity(
        family=family,
        model_type=hf_config.get("model_type", ""),
        text_only=model_config.text_only,
        tied=model_config.text.tie_word_embeddings,
        hf_config=hf_config,
    )


def check_tied_copies(weight_map: WeightMap, reader: SafetensorsReader, weights: dict[str, HfWeight]) -> None:
    """Where a file repeats a tied weight, both must hold the same bits: transformers would train them apart otherwise.

    Raises:
        CheckpointError: they differ.
    """
    sources = {source for _, source in weight_map.tied_groups}
    for source in sources:
        first, *copies = sorted(hf_name for hf_name, entry in weights.items() if entry.name == source)
        for copy in copies:
            for first_row, end_row in row_blocks(reader.tensors[first].shape, reader.tensors[first].dtype):
                left, right = (reader.read_rows(name, first_row, end_row) for name in (first, copy))
                if left.dtype != right.dtype or not torch.equal(_bits(left), _bits(right)):
                    raise CheckpointError(
                        f"{first} and {copy} differ although config.json ties them",
                        str(reader.directory),
                        'set "tie_word_embeddings": false in config.json to keep both',
                    )
