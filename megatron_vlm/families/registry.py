"""The registry of families: a Hugging Face configuration determines the family that builds, maps and prompts its model.

A family is found by `model_type` only. transformers registers some configurations under several classes (Gemma3Config
is both a causal language model and an image-text-to-text model); the architecture named in a file is ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, PretrainedConfig

from megatron_vlm.errors import ConfigError, UserError
from megatron_vlm.files.assets import ASSET_PATTERNS
from megatron_vlm.files.small_files import read_small
from megatron_vlm.model_configs import check_numbers, check_raw_config

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.module import MegatronModule

    from megatron_vlm.data.rules import PromptRules
    from megatron_vlm.model.weight_map import WeightMap
    from megatron_vlm.model_configs import VisionLanguageConfig
    from megatron_vlm.parallel.chunk_settings import ChunkSettings


@dataclass(frozen=True)
class Family:
    """One architecture: a folder under `megatron_vlm.families` with `config`, `model`, `prompt` and `weights` modules.

    Attributes:
        name: name of the folder.
        model_types: values of `model_type` in config.json.
        chunk_class: class in `model.py`, called with (model configuration, chunk settings, process groups).
        head_tells_tie: whether the weight files decide if embedding and head are tied: they are if and only if the
            files hold no head. Published config.json files lack the key, or have it where transformers does not look.
        image_mask_types: those of `model_types` with a choice of what tokens of images see (`model.image_mask`).
    """

    name: str
    model_types: tuple[str, ...]
    chunk_class: str
    head_tells_tie: bool = False
    image_mask_types: tuple[str, ...] = ()

    def config_from_hf(self, hf_config: PretrainedConfig, text_only: bool, image_mask: str | None = None) -> Any:
        """Return the family's model configuration; ConfigError where its modules cannot compute what is asked."""
        choices = {} if image_mask is None else {"image_mask": image_mask}
        if choices and not self.chooses_image_mask(hf_config):
            raise ConfigError(
                f"model.image_mask is {image_mask}, but {hf_config.model_type} models have no choice",
                fix="set it to null",
            )
        try:
            config = self._function("config", "config_from_hf")(hf_config, text_only, **choices)
        except UserError:
            raise
        except Exception as error:  # transformers has errors of its own, for attributes that layers do not share
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"a value cannot be used ({reason})", "config.json", "use a published configuration"
            ) from error
        check_numbers(config, self.name)
        return config

    def chooses_image_mask(self, hf_config: PretrainedConfig) -> bool:
        """Whether a model has a choice of what tokens of images see."""
        return hf_config.model_type in self.image_mask_types

    def build_chunk(
        self, model_config: VisionLanguageConfig, chunk: ChunkSettings, groups: ProcessGroupCollection
    ) -> MegatronModule:
        """Build one pipeline chunk with uninitialised parameters."""
        return self._function("model", self.chunk_class)(model_config, chunk, groups)

    def weight_map(self, model_config: VisionLanguageConfig) -> WeightMap:
        """Return names and shapes of all weights, here and in Hugging Face files."""
        return self._function("weights", "weight_map")(model_config)

    def prompt_rules(self, model_config: VisionLanguageConfig) -> PromptRules:
        """Return the rules by which turns, images and videos are written."""
        rules = self._function("prompt", "prompt_rules")(model_config)
        return replace(rules, vocab_size=model_config.text.vocab_size)

    def _function(self, module: str, name: str) -> Callable[..., Any]:
        # The import is lazy: converting and reading data need no model code.
        return getattr(import_module(f"megatron_vlm.families.{self.name}.{module}"), name)


_AGAIN = "download or export it again"
FAMILIES = (
    Family("gemma3", ("gemma3", "gemma3_text"), "Gemma3Chunk"),
    Family(
        "gemma4",
        ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"),
        "Gemma4Chunk",
        image_mask_types=("gemma4_unified", "gemma4_unified_text"),
    ),
    Family("qwen3_vl", ("qwen3_vl", "qwen3_vl_moe"), "Qwen3VLChunk"),
    Family("mistral3", ("mistral3", "mistral", "ministral3"), "Mistral3Chunk", head_tells_tie=True),
)


def load_hf_config(directory: str | os.PathLike) -> PretrainedConfig:
    """Read config.json of a local directory through transformers; no code from it is run.

    `tie_word_embeddings` is corrected where the family's weight files decide it (`Family.head_tells_tie`).

    Raises:
        ConfigError: the directory or its config.json is missing, is not JSON, or names no architecture built here.
        CheckpointError: the weight files decide whether weights are tied, and are damaged.
    """
    path = Path(directory) / "config.json"
    try:
        content = json.loads(read_small(path))
    except (FileNotFoundError, NotADirectoryError):
        raise _no_config(Path(directory)) from None
    except OSError as error:
        raise ConfigError(f"config.json cannot be read: {error.strerror}", str(path), _AGAIN) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"config.json cannot be read: {error}", str(path), _AGAIN) from None
    if not isinstance(content, dict):
        raise ConfigError("config.json is not an object with keys", str(path), _AGAIN)
    _check_kinds_of_files(Path(directory))
    check_raw_config(content, str(path))
    family = _find(content.get("model_type"), str(path))
    try:
        hf_config = AutoConfig.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # whatever transformers' validation raises
        raise ConfigError(f"transformers refuses config.json: {str(error)[:300]}", str(path), "correct it") from None
    if family.head_tells_tie:
        # The import is lazy because it imports torch.
        from megatron_vlm.checkpoint.hf import stored_names

        names = stored_names(Path(directory))
        if names is not None:
            set_tie(hf_config, not any(name.endswith("lm_head.weight") for name in names))
        elif "tie_word_embeddings" not in content:
            # The class's default, tied, is right for the smallest published size only; the text part's is for all.
            set_tie(hf_config, bool(hf_config.get_text_config().tie_word_embeddings))
    return hf_config


def _no_config(directory: Path) -> ConfigError:
    """Tell what a directory is that has no config.json."""
    fix = "give a directory in Hugging Face format"
    if (directory / "adapter_config.json").is_file():
        fix = "this is an adapter: merge it into its base model (PEFT's merge_and_unload), and give the merged one"
    elif (directory / "params.json").is_file() or (directory / "consolidated.safetensors").is_file():
        fix = "these are files in Mistral's own format: give the model's files in Hugging Face format"
    elif directory.is_file():
        fix = "this is a file: give the directory that it is in"
    elif not directory.exists():
        fix = "there is no such directory: give one in Hugging Face format; nothing is downloaded"
    return ConfigError("no config.json", str(directory), fix)


def _check_kinds_of_files(directory: Path) -> None:
    """Refuse pipes and devices among a model's files, which libraries would wait for or read without end."""
    patterns = (*ASSET_PATTERNS, "*.safetensors*", "*.json")
    for path in sorted({path for pattern in patterns for path in directory.glob(pattern)}):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ConfigError("a pipe or device stands where a file belongs", str(path), _AGAIN)


def set_tie(hf_config: PretrainedConfig, is_tied: bool) -> None:
    """Set whether embedding and head are tied, for the multimodal model and for its text part."""
    hf_config.tie_word_embeddings = hf_config.get_text_config().tie_word_embeddings = is_tied


def detect(hf_config_or_dir: PretrainedConfig | str | os.PathLike) -> Family:
    """Return the family of a configuration or of a directory with config.json.

    Raises:
        ConfigError: no family has this model_type.
    """
    if not isinstance(hf_config_or_dir, PretrainedConfig):
        hf_config_or_dir = load_hf_config(hf_config_or_dir)
    return _find(hf_config_or_dir.model_type, type(hf_config_or_dir).__name__)


def _find(model_type: str | None, where: str) -> Family:
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise ConfigError(f"model_type {model_type!r} is not supported", where, f"supported: {known}")
