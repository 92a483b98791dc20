"""Conversion between Hugging Face directories and distributed checkpoints: streaming, one process, no GPU.

Tensors go by in small blocks of rows, experts one at a time, so that neither direction ever holds a large tensor, let
alone the model. Every tensor keeps its exact bits; only vocabulary rows are padded with zeros on import and cut off
again on export.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_vlm.checkpoint.float8 import open_weights
from megatron_vlm.checkpoint.hf import SafetensorsReader, SafetensorsWriter, has_weights
from megatron_vlm.checkpoint.run_folder import PASSTHROUGH_NAME, Manifest, ModelIdentity, find_checkpoint
from megatron_vlm.checkpoint.torch_dist import TorchDistReader, TorchDistWriter
from megatron_vlm.conversion.export_plan import ExportPlan, plan_export
from megatron_vlm.conversion.passthrough import keep_passthrough
from megatron_vlm.errors import CheckpointError
from megatron_vlm.families import registry
from megatron_vlm.files.block_memory import BlockMemory
from megatron_vlm.files.durable import check_export_target, staged_directory
from megatron_vlm.files.safetensors_headers import row_blocks
from megatron_vlm.model.hf_tensors import HfPart, HfTensor
from megatron_vlm.model.weight_map import FoundTensors, WeightMap
from megatron_vlm.model_configs import VisionLanguageConfig
from megatron_vlm.progress import Progress


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


def import_checkpoint(hf_dir: str | os.PathLike, out_dir: str | os.PathLike) -> FoundTensors:
    """Write a Hugging Face directory's weights as a distributed checkpoint that loads in any layout.

    Args:
        hf_dir: configuration and safetensors.
        out_dir: the new checkpoint; missing or empty.

    Returns:
        The tensors of the directory: those that were read, those that are only carried through, and those that were
        left out.

    Raises:
        CheckpointError: unreadable source, weights that do not fit config.json, or a target that is not empty.
    """
    check_export_target(out_dir)
    hf_config = registry.load_hf_config(hf_dir)
    family = registry.detect(hf_config)
    model_config = family.config_from_hf(hf_config, text_only=False)
    weight_map: WeightMap = family.weight_map(model_config)
    with open_weights(hf_dir) as reader:
        found = weight_map.match(reader)
        check_tied_copies(reader, found)
        with staged_directory(out_dir) as staging:
            _import_weights(reader, found.tensors, staging)
            keep_passthrough(reader, found.passthrough, staging)
            identity = identity_of(hf_dir, family.name, model_config)
            Manifest(identity=identity, passthrough=found.passthrough).write(staging)
    return found


def _import_weights(reader: SafetensorsReader, tensors: Mapping[str, HfTensor], staging: Path) -> None:
    memory, transposed = BlockMemory(), BlockMemory()
    writer = TorchDistWriter(staging)
    try:
        with Progress("importing", sum(reader.tensors[hf_name].num_bytes for hf_name in tensors)) as progress:
            for stored in reader.files:
                for band in tensors[stored.name].bands if stored.name in tensors else ():
                    for part in band.parts:
                        writer.add(part.name, part.weight.padded_shape, stored.dtype)
                    for first_row, end_row in band.blocks(stored.dtype):
                        rows = reader.read_rows(stored.name, *band.file_rows(first_row, end_row), memory)
                        for part, own_rows in zip(band.parts, band.from_file(rows, transposed), strict=True):
                            writer.write(part.name, own_rows)
                        progress.advance(rows.nbytes)
                    for part in band.parts:
                        writer.write(part.name, _padding_rows(part, stored.dtype))
            writer.close(common_state={})
    finally:
        writer.abort()


def _padding_rows(part: HfPart, dtype: torch.dtype) -> torch.Tensor:
    """The zeros after the vocabulary's rows; none for other weights."""
    shape, padded_shape = part.weight.own_shape, part.weight.padded_shape
    return torch.zeros(padded_shape[0] - shape[0], *shape[1:], dtype=dtype) if shape else torch.empty(0, dtype=dtype)


def export_checkpoint(
    checkpoint: str | os.PathLike,
    hf_dir: str | os.PathLike,
    out_dir: str | os.PathLike,
) -> tuple[str, ...]:
    """Write the weights of a distributed checkpoint as a Hugging Face directory.

    Args:
        checkpoint: an imported checkpoint, a checkpoint of a run, or a run folder (its newest checkpoint).
        hf_dir: the model's Hugging Face directory. Names, dtypes and shards follow its weights, if it has any (see
            `plan_export`); float8 weights are written as bfloat16.
        out_dir: the new directory; missing or empty.

    Returns:
        Names of the tensors that are only carried through.

    Raises:
        CheckpointError: the checkpoint is unreadable or of another model, or the target is not empty.
    """
    check_export_target(out_dir)
    reader, plan = open_for_export(checkpoint, hf_dir, tie_follows_checkpoint=True)
    with reader, staged_directory(out_dir) as staging:
        _export_weights(reader, plan, staging)
        plan.write_assets(staging)
    return plan.passthrough


def _export_weights(reader: TorchDistReader, plan: ExportPlan, staging: Path) -> None:
    file_memory, part_memory = BlockMemory(), defaultdict[int, BlockMemory](BlockMemory)
    writer = SafetensorsWriter(staging, plan.files)
    try:
        with Progress("exporting", plan.weight_bytes) as progress:
            for stored in plan.files:
                for band in plan.bands(stored.name):
                    for first_row, end_row in band.blocks(stored.dtype):
                        rows = [
                            reader.read_rows(part.name, first_row, end_row, part_memory[index])
                            for index, part in enumerate(band.parts)
                        ]
                        block = band.to_file(rows, stored.dtype, file_memory)
                        writer.write(stored.name, band.file_rows(first_row, end_row)[0], block)
                        progress.advance(block.nbytes)
        plan.copy_passthrough(writer)
        reader.check_rest()
        writer.close()
    finally:
        writer.abort()


def verify_checkpoint(hf_dir: str | os.PathLike, checkpoint: str | os.PathLike) -> Comparison:
    """Compare a Hugging Face directory with a distributed checkpoint, bit by bit.

    A checkpoint of another precision is compared after conversion to the type in the Hugging Face file. Whatever else
    the checkpoint holds, the optimizer's state for example, is compared with its checksums.

    Args:
        hf_dir: configuration and safetensors.
        checkpoint: see `export_checkpoint`.

    Returns:
        How much was compared, and every tensor that differs.
    """
    saved, plan = open_for_export(checkpoint, hf_dir)
    differences = []
    with saved, open_weights(hf_dir) as reader:
        found = plan.weight_map.match(reader)
        compared = [*found.with_copies, *found.passthrough]
        total_bytes = sum(reader.tensors[hf_name].num_bytes for hf_name in compared)
        with Progress("comparing", total_bytes) as progress:
            for hf_name in compared:
                if hf_name in found.passthrough:
                    reason = _compare_passthrough(reader, hf_name, saved.directory)
                    progress.advance(reader.tensors[hf_name].num_bytes)
                else:
                    reason = _difference(_pairs(reader, found.with_copies[hf_name], saved, progress))
                if reason is not None:
                    differences.append(Difference(hf_name, reason))
        saved.check_all()
    return Comparison(len(compared), total_bytes, tuple(differences))


def _pairs(
    reader: SafetensorsReader, tensor: HfTensor, saved: TorchDistReader, progress: Progress
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield rows as they are saved, in the file's type, and as they should be."""
    dtype = reader.tensors[tensor.hf_name].dtype
    memory, transposed, saved_memory = BlockMemory(), BlockMemory(), BlockMemory()
    for band in tensor.bands:
        for first_row, end_row in band.blocks(dtype):
            rows = reader.read_rows(tensor.hf_name, *band.file_rows(first_row, end_row), memory)
            for part, expected in zip(band.parts, band.from_file(rows, transposed), strict=True):
                yield saved.read_rows(part.name, first_row, end_row, saved_memory).to(dtype), expected
            progress.advance(rows.nbytes)
        for part in band.parts:
            padding = _padding_rows(part, dtype)
            if len(padding):
                yield saved.read_rows(part.name, band.num_rows, band.num_rows + len(padding)).to(dtype), padding


def _compare_passthrough(reader: SafetensorsReader, hf_name: str, checkpoint: Path) -> str | None:
    """Why a tensor that is carried through differs, or None."""
    if not (checkpoint / PASSTHROUGH_NAME).is_dir():
        return "not in the checkpoint"
    stored = reader.tensors[hf_name]
    with SafetensorsReader(checkpoint / PASSTHROUGH_NAME) as kept:
        found = kept.tensors.get(hf_name)
        if found is None:
            return "not in the checkpoint"
        if (found.dtype, found.shape) != (stored.dtype, stored.shape):
            return f"{found.dtype} {list(found.shape)} instead of {stored.dtype} {list(stored.shape)}"
        blocks = row_blocks(stored.shape, stored.dtype)
        return _difference((kept.read_rows(hf_name, *block), reader.read_rows(hf_name, *block)) for block in blocks)


def _difference(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> str | None:
    """Why a tensor differs, or None."""
    num_different, largest = 0, 0.0
    for actual, expected in pairs:
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
    manifest = Manifest.read(directory)
    identity = manifest.identity
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
        carried = manifest.passthrough or ()
        return reader, plan_export(hf_dir, hf_config, weight_map, dtypes, directory, carried)
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


def check_tied_copies(reader: SafetensorsReader, found: FoundTensors) -> None:
    """Where a file repeats a tied weight, both must hold the same bits: transformers would train them apart otherwise.

    Raises:
        CheckpointError: they differ.
    """
    holders = {part.name: hf_name for hf_name, tensor in found.tensors.items() for part in tensor.parts}
    for copy_name, tensor in found.tied_copies.items():
        first, copy = sorted((holders[tensor.parts[0].name], copy_name))
        for first_row, end_row in row_blocks(reader.tensors[first].shape, reader.tensors[first].dtype):
            left, right = (reader.read_rows(name, first_row, end_row) for name in (first, copy))
            if left.dtype != right.dtype or not torch.equal(_bits(left), _bits(right)):
                raise CheckpointError(
                    f"{first} and {copy} differ although config.json ties them",
                    str(reader.directory),
                    'set "tie_word_embeddings": false in config.json to keep both',
                )
