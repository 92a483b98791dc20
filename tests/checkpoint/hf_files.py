"""Hugging Face directories of any family as transformers writes them, rewritten, and held against checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedModel

from megatron_vlm.checkpoint.torch_dist import TorchDistReader

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], Tensors]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja")
# Past the length where the queries of Mistral3's tests grow.
INPUT_IDS = torch.tensor([[2, 17, 40, 63, 5, 9, 80, 81, 82, 83, 84, 85]])


def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Different random values for every parameter; the defaults start norms and the projector at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def save(model: PreTrainedModel, directory: Path, max_shard_size: str = "60KB") -> Path:
    """`save_pretrained`, in several shards, with files that stand for tokenizer, processor and template."""
    model.generation_config = GenerationConfig(eos_token_id=[1, 99], do_sample=False)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    for name in TOKENIZER_FILES:
        (directory / name).write_text(json.dumps({"file": name}))
    (directory / "README.md").write_text("not part of the model")
    return directory


def load_tensors(directory: Path) -> Tensors:
    """All tensors of a directory, read by the safetensors library."""
    tensors: Tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def files(directory: Path) -> dict[str, bytes]:
    """Every file of a directory that an export writes."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "README.md"}


def content(directory: Path) -> dict[str, Any]:
    """What `files` has, but with tensors by their names instead of weight files, as several writers divide them."""
    weight_files, other_files = {}, {}
    for name, held in files(directory).items():
        (weight_files if name.endswith(".safetensors") else other_files)[name] = held
    tensors = {}
    index = json.loads(other_files.pop("model.safetensors.index.json", b'{"weight_map": {}}'))
    for file in weight_files:
        for name, tensor in load_file(directory / file).items():
            assert name not in tensors, f"{name} is stored twice"
            assert index["weight_map"].get(name, "model.safetensors") == file
            tensors[name] = (tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    assert set(index["weight_map"]) <= set(tensors)
    return other_files | tensors


def rewrite(source: Path, target: Path, change: Change) -> Path:
    """Copy a checkpoint into one weight file, with its tensors changed."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja") and not path.name.endswith(".index.json"):
            (target / path.name).write_bytes(path.read_bytes())
    save_file(change(load_tensors(source)), target / "model.safetensors", metadata={"format": "pt"})
    return target


def change_nothing(tensors: Tensors) -> Tensors:
    """For `rewrite`."""
    return tensors


def rename(renames: dict[str, str]) -> Change:
    """A change for `rewrite` that replaces prefixes of names; the first that fits is used."""

    def new_name(name: str) -> str:
        for old, new in renames.items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    return lambda tensors: {new_name(name): tensor for name, tensor in tensors.items()}


def without_weights(source: Path, target: Path) -> Path:
    """Copy what is not weights."""
    target.mkdir()
    for name, content in files(source).items():
        if "safetensors" not in name:
            (target / name).write_bytes(content)
    return target


def read_config(directory: Path) -> dict[str, Any]:
    """config.json."""
    return json.loads((directory / "config.json").read_text())


def write_config(directory: Path, config: dict[str, Any]) -> None:
    """Replace config.json."""
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def change_manifest(source: Path, target: Path, **changes: object) -> Path:
    """Copy a checkpoint that says something else about itself, as if saved so."""
    shutil.copytree(source, target)
    content = json.loads((source / "megatron_vlm.json").read_text())
    del content["crc32"]
    (target / "megatron_vlm.json").write_text(json.dumps(content | changes))
    return target


def pad_vocabulary(tensors: Tensors) -> Tensors:
    """Rows of zeros, up to a multiple of 64, under our names of embedding and head."""
    padded = dict(tensors)
    for name in ("language_model.embed_tokens.weight", "language_model.lm_head.weight"):
        if name in tensors:
            rows = tensors[name]
            padded[name] = torch.cat([rows, rows.new_zeros(-len(rows) % 64, rows.shape[1])])
    return padded


def check_holds(checkpoint: Path, expected: Tensors) -> None:
    """The checkpoint holds these tensors and no others."""
    with TorchDistReader(checkpoint) as reader:
        assert set(reader.tensors) == set(expected)
        for name, tensor in expected.items():
            actual = reader.read_rows(name, 0, len(tensor) if tensor.dim() else 1)
            assert actual.dtype == tensor.dtype and actual.equal(tensor), name


def load(directory: Path, model_class: Any) -> PreTrainedModel:
    """Through transformers, which must find all that it expects and nothing else."""
    model, information = model_class.from_pretrained(directory, output_loading_info=True)
    assert not any(information[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Of a text."""
    with torch.no_grad():
        return model.eval()(INPUT_IDS).logits
