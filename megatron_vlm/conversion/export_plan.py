"""What an export to a Hugging Face directory writes: names, dtypes, files, and a config.json that is true of them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_vlm.checkpoint.float8 import find_quantization, open_weights
from megatron_vlm.checkpoint.hf import PROCESSOR_PATTERNS, copy_companion_files, has_weights
from megatron_vlm.families import registry
from megatron_vlm.files.durable import write_durably
from megatron_vlm.files.safetensors_headers import WeightFiles
from megatron_vlm.model.weight_map import HfWeight, WeightMap

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class ExportPlan:
    """What an export writes.

    Args:
        source: the Hugging Face directory whose configuration and tokenizer are copied.
        files: weight files, in the order of writing.
        weights: by each name in `files`.
        weight_map: of the model that is exported.
        config: replaces `config.json`; None copies it.
        is_alone: the language model of a multimodal directory; it has no use for an image processor.
    """

    source: Path
    files: WeightFiles
    weights: dict[str, HfWeight]
    weight_map: WeightMap
    config: bytes | None
    is_alone: bool

    def write_companions(self, directory: Path) -> None:
        """Copy or write configuration, tokenizer and the like."""
        skip = (*(PROCESSOR_PATTERNS if self.is_alone else ()), *(() if self.config is None else ("config.json",)))
        copy_companion_files(self.source, directory, skip)
        if self.config is not None:
            write_durably(directory / "config.json", self.config)


def plan_export(
    hf_dir: str | os.PathLike, hf_config: PretrainedConfig, weight_map: WeightMap, dtypes: dict[str, torch.dtype]
) -> ExportPlan:
    """Decide names, dtypes and files of an export.

    Everything follows the weights in `hf_dir`, but float8 weights are written as bfloat16 in shards of 5 GB. Where they
    cannot be followed (there are none, or the language model of a multimodal model is exported alone), names are those
    of published files, shards are of 5 GB, and dtypes those of the weights in `hf_dir`, else of config.json, else of
    the model.

    Args:
        hf_dir: the model's Hugging Face directory.
        hf_config: its configuration.
        weight_map: of the model to be exported.
        dtypes: by our name, of the model to be exported.
    """
    source = Path(hf_dir).absolute()
    is_alone = _is_alone(hf_config, weight_map)
    new_config = _language_model_config if is_alone else _changed_config
    config = new_config(source, hf_config, weight_map)
    default_dtype = _config_dtype(hf_config)
    file_dtypes = {name: default_dtype or dtype for name, dtype in dtypes.items()}
    if has_weights(source):
        with open_weights(source) as reader:
            weights = weight_map.match(reader)
            if not is_alone:
                return ExportPlan(source, reader.files, weights, weight_map, config, is_alone)
            file_dtypes = {entry.name: reader.tensors[hf_name].dtype for hf_name, entry in weights.items()}
    weights = weight_map.as_written()
    files = WeightFiles.plan((entry.hf_name, file_dtypes[entry.name], entry.shape) for entry in weights.values())
    return ExportPlan(source, files, weights, weight_map, config, is_alone)


def _is_alone(hf_config: PretrainedConfig, weight_map: WeightMap) -> bool:
    """Whether the map is of the language model only while the configuration describes a multimodal model."""
    is_text = {name.split(".")[0] for name, _ in weight_map.items()} == {"language_model"}
    return is_text and hf_config.get_text_config() is not hf_config


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
