"""Tensors that are carried through: files hold them, transformers ignores them, and no model here has them.

A checkpoint keeps them in a folder of its own, `passthrough`, as safetensors under their names in the files. A run
keeps them beside its checkpoints from its first start on, whatever becomes of the files that they came from, and every
checkpoint shares them. An export writes them as they are. A file beside them has the CRC-32 of each.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from isal import isal_zlib

from megatron_vlm.checkpoint.float8 import open_weights
from megatron_vlm.checkpoint.hf import SafetensorsReader, SafetensorsWriter, has_weights
from megatron_vlm.checkpoint.run_folder import PASSTHROUGH_NAME, read_json
from megatron_vlm.errors import CheckpointError
from megatron_vlm.files.block_memory import BlockMemory
from megatron_vlm.files.durable import staged_directory, write_durably
from megatron_vlm.files.safetensors_headers import StoredTensor, WeightFiles, row_blocks
from megatron_vlm.model.weight_map import WeightMap, abbreviate
from megatron_vlm.progress import Progress

CHECKSUMS_NAME = "passthrough_crc32.json"


def find_passthrough(checkpoint: Path | None, hf_dir: Path) -> Path | None:
    """Where the tensors are that come with a model's weights: with its checkpoint, else in its Hugging Face directory.

    Args:
        checkpoint: a checkpoint, or the folder of a run's checkpoints; None for a model from files.
        hf_dir: the model's Hugging Face directory, with or without weights.
    """
    if checkpoint is not None and (checkpoint / PASSTHROUGH_NAME).is_dir():
        return checkpoint / PASSTHROUGH_NAME
    return hf_dir if has_weights(hf_dir) else None


def check_carried(carried: Sequence[str], found: Collection[str], checkpoint: Path) -> None:
    """Make sure that tensors that a checkpoint was saved with were found again.

    Args:
        carried: their names, of the checkpoint's manifest.
        found: names of those that were found.
        checkpoint: the checkpoint, or the folder of a run's checkpoints.

    Raises:
        CheckpointError: some are gone.
    """
    gone = [name for name in carried if name not in found]
    if gone:
        raise CheckpointError(
            f"{len(gone)} tensors that are only carried through are gone: {abbreviate(gone)}",
            str(checkpoint / PASSTHROUGH_NAME),
            "put this folder back (every checkpoint of the run has the same), or give a model directory with weights",
        )


def check_kept(carried: Sequence[str], checkpoints: Path, hf_dir: Path) -> None:
    """Make sure that a run that goes on still has the tensors that it began with, for its export.

    They are read, to compare their checksums: at the export it would be too late. See `check_carried`.

    Args:
        carried: their names.
        checkpoints: the folder of the run's checkpoints.
        hf_dir: the model's Hugging Face directory.
    """
    source = find_passthrough(checkpoints, hf_dir) if carried else None
    if source is None:
        return check_carried(carried, (), checkpoints)
    with open_weights(source) as reader:
        check_carried(carried, reader.tensors, checkpoints)
        _read_checked(reader, [reader.tensors[name] for name in carried], "checking tensors carried through")


def keep_passthrough(reader: SafetensorsReader, names: Sequence[str], folder: Path) -> None:
    """Copy the tensors of these names into a checkpoint, or beside a run's checkpoints; without names do nothing."""
    if not names:
        return
    stored = [reader.tensors[name] for name in names]
    files = WeightFiles.plan((tensor.name, tensor.dtype, tensor.shape) for tensor in stored)
    with staged_directory(folder / PASSTHROUGH_NAME) as staging:
        writer = SafetensorsWriter(staging, files)
        try:
            checksums = copy_tensors(reader, stored, writer)
            write_durably(staging / CHECKSUMS_NAME, json.dumps(checksums, indent=1).encode())
            writer.close()
        finally:
            writer.abort()


def begin_run(
    checkpoints: Path, loaded: Path | None, hf_dir: str | os.PathLike, weight_map: WeightMap
) -> tuple[str, ...]:
    """Keep, beside the checkpoints of a run that begins, the tensors that come with its first weights.

    Args:
        checkpoints: the folder of the run's checkpoints, of which there is none yet.
        loaded: the checkpoint that the weights are from, if they are.
        hf_dir: the model's Hugging Face directory.
        weight_map: of the model.

    Returns:
        Their names.
    """
    shutil.rmtree(checkpoints / PASSTHROUGH_NAME, ignore_errors=True)  # of a start that was killed
    source = find_passthrough(loaded, Path(hf_dir)) if weight_map.passthrough else None
    if source is None:
        return ()
    with open_weights(source) as reader:
        names = weight_map.passthrough_in(reader.tensors)
        keep_passthrough(reader, names, checkpoints)
    return names


def copy_tensors(
    reader: SafetensorsReader, tensors: Sequence[StoredTensor], writer: SafetensorsWriter
) -> dict[str, int]:
    """Copy tensors from one directory to another, bit for bit.

    Returns:
        The CRC-32 of each by its name.

    Raises:
        CheckpointError: the directory has another checksum for one.
    """
    return _read_checked(reader, tensors, "copying tensors carried through", writer.write)


def _read_checked(
    reader: SafetensorsReader,
    tensors: Sequence[StoredTensor],
    label: str,
    take: Callable[[str, int, torch.Tensor], None] | None = None,
) -> dict[str, int]:
    """Read tensors and compare them with the directory's checksums, if it has any; returns the checksums.

    Args:
        reader: of the directory.
        tensors: those that are read.
        label: what this is done for.
        take: is given name, first row and rows of each block.
    """
    path, expected = reader.directory / CHECKSUMS_NAME, None
    fix = "take this folder from another import of the model, or delete it and name a model directory with weights"
    if path.exists():
        expected = read_json(path, fix)
        if not isinstance(expected, dict):
            raise CheckpointError("damaged: it holds no names", str(path), fix)
    memory, checksums = BlockMemory(), {}
    with Progress(label, sum(stored.num_bytes for stored in tensors)) as progress:
        for stored in tensors:
            crc = 0
            for first_row, end_row in row_blocks(stored.shape, stored.dtype):
                rows = reader.read_rows(stored.name, first_row, end_row, memory)
                crc = isal_zlib.crc32(rows.reshape(-1).view(torch.uint8).numpy(), crc)
                if take is not None:
                    take(stored.name, first_row, rows)
                progress.advance(rows.nbytes)
            if expected is not None and expected.get(stored.name) != crc:
                what = f"{stored.name} is not what was saved: its checksum differs"
                raise CheckpointError(what, str(reader.directory), fix)
            checksums[stored.name] = crc
    return checksums


def describe(names: Sequence[str]) -> str:
    """One line about tensors that are only carried through."""
    return f"{len(names)} tensors are carried through as they are, untrained: {abbreviate(names)}"


def describe_unread(names: Sequence[str]) -> str:
    """One line about tensors that a text-only model does not read."""
    return f"{len(names)} tensors of towers are not read, as the model is text-only: {abbreviate(names)}"
