"""What an export to a Hugging Face directory writes: names, dtypes, files, and a config.json that is true of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_vlm.checkpoint.float8 import find_quantization, open_weights
from megatron_vlm.checkpoint.hf import PROCESSOR_PATTERNS, SafetensorsWriter, copy_assets, has_weights
from megatron_vlm.conversion.passthrough import check_carried, copy_tensors, find_passthrough
from megatron_vlm.families import registry
from megatron_vlm.files.durable import write_durably
from megatron_vlm.files.safetensors_headers import DEFAULT_SHARD_BYTES, StoredTensor, WeightFiles
from megatron_vlm.model.hf_tensors import HfBand, HfTensor
from megatron_vlm.model.weight_map import WeightMap

if TYPE_CHECKING:
    from transformers import PretrainedConfig

UNDIVIDED_BYTES = DEFAULT_SHARD_BYTES
"""Models up to this size are exported into the files that they came in, also from several pipeline stages."""


@dataclass(frozen=True)
class ExportPlan:
    """What an export writes.

    Args:
        source: the Hugging Face directory whose configuration and tokenizer are copied.
        files: weight files, in the order of writing.
        tensors: those that hold weights, by their names in `files`.
        passthrough: names of the others, which are only carried through.
        passthrough_source: a directory with those.
        weight_map: of the model that is exported.
        config: replaces `config.json`; None copies it.
        is_language_model: the language model of a multimodal directory; it has no use for an image processor.
    """

    source: Path
    files: WeightFiles
    tensors: dict[str, HfTensor]
    passthrough: tuple[str, ...]
    passthrough_source: Path | None
    weight_map: WeightMap
    config: bytes | None
    is_language_model: bool

    @property
    def weight_bytes(self) -> int:
        """Bytes in `files`, but for what is only carried through."""
        return sum(stored.num_bytes for stored in self.files if stored.name in self.tensors)

    def bands(self, hf_name: str) -> tuple[HfBand, ...]:
        """What holds weights of the tensor in `files`; nothing, if it is only carried through."""
        return self.tensors[hf_name].bands if hf_name in self.tensors else ()

    def copy_passthrough(self, writer: SafetensorsWriter) -> None:
        """Write what is only carried through."""
        if self.passthrough_source is not None and self.passthrough:
            with open_weights(self.passthrough_source) as reader:
                copy_tensors(reader, [reader.tensors[name] for name in self.passthrough], writer)

    def write_assets(self, directory: Path) -> None:
        """Copy or write configuration, tokenizer and the like."""
        skip = (
            *(PROCESSOR_PATTERNS if self.is_language_model else ()),
            *(() if self.config is None else ("config.json",)),
        )
        copy_assets(self.source, directory, skip)
        if self.config is not None:
            write_durably(directory / "config.json", self.config)


def plan_export(
    hf_dir: str | os.PathLike,
    hf_config: PretrainedConfig,
    weight_map: WeightMap,
    dtypes: dict[str, torch.dtype],
    checkpoint: Path | None = None,
    carried: Sequence[str] = (),
    stages: Mapping[str, int] | None = None,
) -> ExportPlan:
    """Decide names, dtypes and files of an export.

    Everything follows the weights in `hf_dir`, but float8 weights are written as bfloat16 in shards of 5 GB. Where they
    cannot be followed (there are none, or a language model is exported that they hold with its towers), names are those
    of published files, shards are of 5 GB, and dtypes those of the weights in `hf_dir`, else of config.json, else of
    the model. Shards are of 5 GB, too, where other tensors are carried through than `hf_dir` has, and where a
    model of more than `UNDIVIDED_BYTES` is on several pipeline stages: each writes files of its own, because not every
    file system takes one file from two machines.

    Args:
        hf_dir: the model's Hugging Face directory.
        hf_config: its configuration.
        weight_map: of the model to be exported.
        dtypes: by our name, of the model to be exported.
        checkpoint: where tensors that are only carried through are looked for first; see `find_passthrough`.
        carried: names of those that the checkpoint was saved with.
        stages: the pipeline stage that has a weight, by our name, if a running model is exported.

    Raises:
        CheckpointError: some of those tensors are gone, or the weights in `hf_dir` do not fit.
    """
    source = Path(hf_dir).absolute()
    is_language_model = _is_language_model(hf_config, weight_map)
    new_config = _language_model_config if is_language_model else _changed_config
    config = new_config(source, hf_config, weight_map)
    passthrough_source = find_passthrough(checkpoint, source) if weight_map.passthrough else None
    passthrough = {} if passthrough_source is None else _passthrough_in(passthrough_source, weight_map)
    check_carried(carried, passthrough, checkpoint or source)

    def plan(files: WeightFiles, tensors: dict[str, HfTensor]) -> ExportPlan:
        if stages is not None:
            files = _divided(files, {name: min(stages[part.name] for part in t.parts) for name, t in tensors.items()})
        return ExportPlan(
            source,
            files.with_format(),
            tensors,
            tuple(passthrough),
            passthrough_source,
            weight_map,
            config,
            is_language_model,
        )

    default_dtype = _config_dtype(hf_config)
    file_dtypes = {name: default_dtype or dtype for name, dtype in dtypes.items()}
    tensors = weight_map.as_written()
    if has_weights(source):
        with open_weights(source) as reader:
            found = weight_map.match(reader)
            beside = {name: reader.tensors[name] for name in found.passthrough}
            if not (is_language_model or found.unread):
                if _described(passthrough) == _described(beside):
                    return plan(reader.files, found.with_copies)
                tensors = found.with_copies
            file_dtypes = {
                part.name: reader.tensors[hf_name].dtype
                for hf_name, tensor in found.with_copies.items()
                for part in tensor.parts
            }
    described = {hf_name: (file_dtypes[tensor.parts[0].name], tensor.shape) for hf_name, tensor in tensors.items()}
    described |= _described(passthrough)
    return plan(WeightFiles.plan((name, *kind) for name, kind in described.items()), tensors)


def _divided(files: WeightFiles, writers: Mapping[str, int]) -> WeightFiles:
    """Divide files of a large model so that each has one writer; what is only carried through is the first one's."""
    if len(set(writers.values())) <= 1 or files.num_bytes <= UNDIVIDED_BYTES:
        return files
    return WeightFiles.plan(((tensor.name, tensor.dtype, tensor.shape) for tensor in files), writers=writers)


def _passthrough_in(directory: Path, weight_map: WeightMap) -> dict[str, StoredTensor]:
    """The tensors of a directory that are only carried through."""
    with open_weights(directory) as reader:
        return {name: reader.tensors[name] for name in weight_map.passthrough_in(reader.tensors)}


def _described(tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape by name."""
    return {name: (stored.dtype, stored.shape) for name, stored in tensors.items()}


def _is_language_model(hf_config: PretrainedConfig, weight_map: WeightMap) -> bool:
    """Whether the map is of the language model only while the configuration describes a multimodal model."""
    is_text = {name.split(".")[0] for name, _ in weight_map.items()} == {"language_model"}
    return is_text and weight_map.text_only_class is not None and hf_config.get_text_config() is not hf_config


def _config_dtype(hf_config: PretrainedConfig) -> torch.dtype | None:
    """The dtype that config.json declares, for the model or for its text part."""
    for config in (hf_config, getattr(hf_config, "text_config", None)):
        dtype = getattr(config, "dtype", None)
        if dtype is not None:
            return getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return None


def _language_model_config(source: Path, hf_config: PretrainedConfig, weight_map: WeightMap) -> bytes:
    """`config.json` of the language model alone, from a multimodal model's: its text part and what both share."""
    assert weight_map.text_only_class is not None
    architecture, model_type = weight_map.text_only_class
    whole: dict[str, Any] = json.loads((source / "config.json").read_bytes())
    # With all defaults filled in: another class may have others.
    config = {**hf_config.get_text_config().to_diff_dict(), **weight_map.text_only_settings}
    shared = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")
    config |= {key: whole[key] for key in shared if key in whole and key not in config}
    config |= {"architectures": [architecture], "model_type": model_type}
    config["tie_word_embeddings"] = bool(weight_map.tied_groups)
    config.pop("quantization_config", None)
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _changed_config(source: Path, hf_config: PretrainedConfig, weight_map: WeightMap) -> bytes | None:
    """`config.json` where it would not be true of what is exported; None where it is.

    Exported are plain values, and a tied model or not, where it does not say so in both parts.
    """
    content: dict[str, Any] = json.loads((source / "config.json").read_bytes())
    parts = [content, *([content["text_config"]] if isinstance(content.get("text_config"), dict) else [])]
    changes: dict[str, Any] = {}
    if registry.detect(hf_config).head_tells_tie:
        changes["tie_word_embeddings"] = bool(weight_map.tied_groups)
    if find_quantization(content) is None and all(changes.items() <= part.items() for part in parts):
        return None
    for part in parts:
        part.pop("quantization_config", None)
        part.update(changes)
    return (json.dumps(content, indent=2) + "\n").encode()
