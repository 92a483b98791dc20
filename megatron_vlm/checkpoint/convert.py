"""Conversion between Hugging Face directories and distributed checkpoints: streaming, one process, no GPU.

Tensors go by in small blocks of rows, so that neither direction ever holds a large tensor, let alone the model. Every
tensor keeps its exact bits; only vocabulary rows are padded with zeros on import and cut off again on export.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_vlm.checkpoint.hf import (
    PROCESSOR_PATTERNS,
    SafetensorsReader,
    SafetensorsWriter,
    copy_companion_files,
    has_weights,
)
from megatron_vlm.checkpoint.run_folder import Manifest, ModelIdentity, find_checkpoint
from megatron_vlm.checkpoint.safetensors_files import BLOCK_BYTES, StoredTensor, WeightFiles, row_blocks
from megatron_vlm.checkpoint.staging import check_export_target, staged_directory, write_durably
from megatron_vlm.checkpoint.torch_dist import TorchDistReader, TorchDistWriter
from megatron_vlm.checkpoint.weight_map import WeightMap
from megatron_vlm.errors import CheckpointError
from megatron_vlm.families import registry

if TYPE_CHECKING:
    from transformers import PretrainedConfig

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


@dataclass(frozen=True)
class ExportPlan:
    """What an export writes.

    Args:
        source: the Hugging Face directory whose configuration and tokenizer are copied.
        files: weight files, in the order of writing.
        names: our name for each name in `files`.
        weight_map: of the model that is exported.
        config: replaces `config.json`; None copies it.
    """

    source: Path
    files: WeightFiles
    names: dict[str, str]
    weight_map: WeightMap
    config: bytes | None

    def write_companions(self, directory: Path) -> None:
        """Copy configuration, tokenizer and the like; a language model alone has no use for an image processor."""
        skip = () if self.config is None else ("config.json", *PROCESSOR_PATTERNS)
        copy_companion_files(self.source, directory, skip)
        if self.config is not None:
            write_durably(directory / "config.json", self.config)


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
    with SafetensorsReader(hf_dir) as reader:
        names = weight_map.match(reader)
        check_tied_copies(weight_map, reader, names)
        with staged_directory(out_dir) as staging:
            _import_weights(reader, names, weight_map, staging, progress)
            Manifest(identity=identity_of(hf_dir, family.name, model_config)).write(staging)


def _import_weights(
    reader: SafetensorsReader, names: dict[str, str], weight_map: WeightMap, staging: Path, progress: Progress | None
) -> None:
    weights = dict(weight_map.items())
    hf_names = {name: hf_name for hf_name, name in names.items()}  # one of each, where a file repeats a tied weight
    done_bytes, total_bytes = 0, sum(reader.tensors[hf_name].num_bytes for hf_name in hf_names.values())
    buffer = _new_buffer()
    writer = TorchDistWriter(staging)
    try:
        for stored in reader.files:
            name = names.get(stored.name, "")
            if hf_names.get(name) != stored.name:
                continue
            writer.write(name, weights[name].padded_shape, stored.dtype, _padded_rows(reader, stored, buffer))
            done_bytes += stored.num_bytes
            if progress is not None:
                progress(done_bytes, total_bytes)
        writer.close(common_state={})
    finally:
        writer.abort()


def _new_buffer() -> torch.Tensor:
    """Memory for one block, used again for all blocks: new pages for each would cost as much as the copying."""
    return torch.empty(BLOCK_BYTES, dtype=torch.uint8)


def _padded_rows(
    reader: SafetensorsReader, stored: StoredTensor, buffer: torch.Tensor
) -> Callable[[int, int], torch.Tensor]:
    """Reads rows of a stored tensor into `buffer`; beyond its end come zeros."""

    def read(first_row: int, end_row: int) -> torch.Tensor:
        num_rows = stored.shape[0] if stored.shape else 1
        if end_row <= num_rows:
            return reader.read_rows(stored.name, first_row, end_row, buffer)
        rows = torch.zeros((end_row - first_row, *stored.shape[1:]), dtype=stored.dtype)
        if first_row < num_rows:
            rows[: num_rows - first_row] = reader.read_rows(stored.name, first_row, num_rows)
        return rows

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
        hf_dir: the model's Hugging Face directory. Names, dtypes and shards follow its weights, if it has any.
        out_dir: the new directory; missing or empty.
        progress: called with (bytes done, bytes in all).

    Raises:
        CheckpointError: the checkpoint is unreadable or of another model, or the target is not empty.
    """
    check_export_target(out_dir)
    reader, plan = open_for_export(checkpoint, hf_dir)
    with staged_directory(out_dir) as staging:
        _export_weights(reader, plan, staging, progress)
        plan.write_companions(staging)


def _export_weights(reader: TorchDistReader, plan: ExportPlan, staging: Path, progress: Progress | None) -> None:
    done_bytes, total_bytes = 0, plan.files.num_bytes
    buffer = _new_buffer()
    writer = SafetensorsWriter(staging, plan.files)
    try:
        for stored in plan.files:
            for first_row, end_row in row_blocks(stored.shape, stored.dtype):
                rows = reader.read_rows(plan.names[stored.name], first_row, end_row, buffer)
                writer.write(stored.name, first_row, rows.to(stored.dtype))
            done_bytes += stored.num_bytes
            if progress is not None:
                progress(done_bytes, total_bytes)
        writer.close()
    finally:
        writer.abort()
        reader.close()


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
    with SafetensorsReader(hf_dir) as reader:
        names = plan.weight_map.match(reader)
        total_bytes = sum(reader.tensors[hf_name].num_bytes for hf_name in names)
        done_bytes = 0
        for hf_name, name in names.items():
            reason = _compare(reader, hf_name, stored_checkpoint, name)
            if reason is not None:
                differences.append(Difference(hf_name, reason))
            done_bytes += reader.tensors[hf_name].num_bytes
            if progress is not None:
                progress(done_bytes, total_bytes)
    return Comparison(len(names), total_bytes, tuple(differences))


def _compare(reader: SafetensorsReader, hf_name: str, checkpoint: TorchDistReader, name: str) -> str | None:
    """Why a tensor differs, or None."""
    stored, saved = reader.tensors[hf_name], checkpoint.tensors[name]
    read_expected = _padded_rows(reader, stored, _new_buffer())
    num_different, largest = 0, 0.0
    for first_row, end_row in row_blocks(tuple(saved.size), saved.properties.dtype):
        expected = read_expected(first_row, end_row)
        actual = checkpoint.read_rows(name, first_row, end_row).to(stored.dtype)
        if not torch.equal(_bits(actual), _bits(expected)):
            num_different += int((_bits(actual) != _bits(expected)).sum())
            largest = max(largest, float((actual.double() - expected.double()).abs().max()))
    return f"{num_different} bytes differ, largest difference {largest:.3g}" if num_different else None


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def open_for_export(checkpoint: str | os.PathLike, hf_dir: str | os.PathLike) -> tuple[TorchDistReader, ExportPlan]:
    """Open a checkpoint, make sure that it belongs to the model of `hf_dir`, and plan its export.

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
    model_config = family.config_from_hf(hf_config, text_only=identity.text_only)
    weight_map: WeightMap = family.weight_map(model_config)
    reader = TorchDistReader(directory)
    stored = {name: _Shape(tuple(tensor.size)) for name, tensor in reader.tensors.items()}
    weight_map.check_stored(stored, str(directory))
    dtypes = {name: tensor.properties.dtype for name, tensor in reader.tensors.items()}
    return reader, plan_export(hf_dir, hf_config, weight_map, dtypes)


@dataclass(frozen=True)
class _Shape:
    shape: tuple[int, ...]


def plan_export(
    hf_dir: str | os.PathLike, hf_config: PretrainedConfig, weight_map: WeightMap, dtypes: dict[str, torch.dtype]
) -> ExportPlan:
    """Decide names, dtypes and files of an export.

    Everything follows the weights in `hf_dir`. Where they cannot be followed (there are none, or the language model of
    a multimodal model is exported alone), names are those of published files, shards are of 5 GB, and dtypes those of
    the weights in `hf_dir`, else of config.json, else of the model.

    Args:
        hf_dir: the model's Hugging Face directory.
        hf_config: its configuration.
        weight_map: of the model to be exported.
        dtypes: by our name, of the model to be exported.
    """
    source = Path(hf_dir).expanduser().absolute()
    weights = dict(weight_map.items())
    config = _language_model_config(source, weight_map) if _is_alone(hf_config, weight_map) else None
    default_dtype = _config_dtype(hf_config)
    file_dtypes = {name: default_dtype or dtype for name, dtype in dtypes.items()}
    if has_weights(source):
        with SafetensorsReader(source) as reader:
            names = weight_map.match(reader)
            if config is None:
                return ExportPlan(source, reader.files, names, weight_map, config)
            file_dtypes = {name: reader.tensors[hf_name].dtype for hf_name, name in names.items()}
    names = weight_map.hf_names()
    files = WeightFiles.plan((hf_name, file_dtypes[name], weights[name].shape) for hf_name, name in names.items())
    return ExportPlan(source, files, names, weight_map, config)


def _is_alone(hf_config: PretrainedConfig, weight_map: WeightMap) -> bool:
    """Whether the map is of the language model only while the configuration describes a multimodal model."""
    text_only_class = weight_map.text_only_class
    is_text = {name.split(".")[0] for name, _ in weight_map.items()} == {"language_model"}
    return is_text and text_only_class is not None and hf_config.model_type != text_only_class[1]


def _config_dtype(hf_config: PretrainedConfig) -> torch.dtype | None:
    """The dtype that config.json declares, for the model or for its text part."""
    for config in (hf_config, getattr(hf_config, "text_config", None)):
        dtype = getattr(config, "dtype", None)
        if dtype is not None:
            return getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return None


def _language_model_config(source: Path, weight_map: WeightMap) -> bytes:
    """`config.json` of the language model alone, from a multimodal model's: its text part and what both share."""
    assert weight_map.text_only_class is not None
    architecture, model_type = weight_map.text_only_class
    whole: dict[str, Any] = json.loads((source / "config.json").read_bytes())
    config = dict(whole["text_config"])
    shared = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")
    config |= {key: whole[key] for key in shared if key in whole and key not in config}
    config |= {"architectures": [architecture], "model_type": model_type}
    config["tie_word_embeddings"] = bool(weight_map.tied_groups)
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def identity_of(hf_dir: str | os.PathLike, family: str, model_config: Any) -> ModelIdentity:
    """What a checkpoint of this model says about itself, with config.json as it stands on disk."""
    hf_config = json.loads((Path(hf_dir).expanduser() / "config.json").read_bytes())
    return ModelIdentity(
        family=family,
        model_type=hf_config.get("model_type", ""),
        text_only=model_config.text_only,
        tied=model_config.text.tie_word_embeddings,
        hf_config=hf_config,
    )


def check_tied_copies(weight_map: WeightMap, reader: SafetensorsReader, names: dict[str, str]) -> None:
    """Where a file repeats a tied weight, both must hold the same bits: transformers would train them apart otherwise.

    Raises:
        CheckpointError: they differ.
    """
    sources = {source for _, source in weight_map.tied_groups}
    for source in sources:
        first, *copies = sorted(hf_name for hf_name, name in names.items() if name == source)
        for copy in copies:
            for first_row, end_row in row_blocks(reader.tensors[first].shape, reader.tensors[first].dtype):
                left, right = (reader.read_rows(name, first_row, end_row) for name in (first, copy))
                if left.dtype != right.dtype or not torch.equal(_bits(left), _bits(right)):
                    raise CheckpointError(
                        f"{first} and {copy} differ although config.json ties them",
                        str(reader.directory),
                        'set "tie_word_embeddings": false in config.json to keep both',
                    )
