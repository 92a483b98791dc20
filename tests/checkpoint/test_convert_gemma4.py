"""Conversion of Gemma 4 both ways, against transformers: every variant, weights that no layer reads, text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
)

from megatron_vlm.conversion.convert import export_checkpoint, import_checkpoint, verify_checkpoint
from megatron_vlm.errors import CheckpointError
from tests.checkpoint.hf_files import (
    Change,
    Tensors,
    change_manifest,
    change_nothing,
    check_holds,
    files,
    load,
    load_tensors,
    logits,
    pad_vocabulary,
    read_config,
    rename,
    rewrite,
    save,
    without_weights,
    write_config,
)
from tests.families import gemma4

LAYERS = "model.language_model.layers."
VARIANTS = tuple(gemma4.VARIANTS)
IN_MEMORY_STYLE = rename(
    {
        "model.embed_vision.": "model.embed_vision.multimodal_embedder.",
        "model.vision_embedder.": "model.embed_vision.",
    }
)


def saved(directory: Path, variant: str) -> Path:
    """What transformers saves: names as published, all scalars and bounds of its own."""
    return save(gemma4.build(variant).to(torch.bfloat16).eval(), directory)


def check_round_trip(source: Path, folder: Path) -> None:
    """Import, verify, export: the same files to the last byte."""
    import_checkpoint(source, folder / "checkpoint")
    assert verify_checkpoint(source, folder / "checkpoint").differences == ()
    export_checkpoint(folder / "checkpoint", source, folder / "again")
    assert files(folder / "again") == files(source)


@pytest.mark.parametrize(
    ("variant", "style"),
    [*((variant, change_nothing) for variant in VARIANTS), ("12B", IN_MEMORY_STYLE)],
    ids=[*VARIANTS, "12B in memory"],
)
def test_every_style_round_trips_and_loads(tmp_path: Path, variant: str, style: Change) -> None:
    source = rewrite(saved(tmp_path / "saved", variant), tmp_path / "hf", style)
    check_round_trip(source, tmp_path)
    again = load(tmp_path / "again", AutoModelForImageTextToText)
    assert logits(again).equal(logits(load(source, AutoModelForImageTextToText)))


def test_names_in_memory_are_those_of_the_modules(tmp_path: Path) -> None:
    source = saved(tmp_path / "hf", "12B")
    stored = load(source, AutoModelForImageTextToText).state_dict().keys() - {"lm_head.weight"}
    assert set(IN_MEMORY_STYLE(load_tensors(source))) == stored


def test_a_checkpoint_has_a_part_of_each_fused_tensor_for_every_layer(tmp_path: Path) -> None:
    """Cut here, apart from the weight map; towers and scalars are what they are in files."""
    source = saved(tmp_path / "hf", "E2B")
    theirs, expected = load_tensors(source), {}
    prefixes = {
        "model.language_model.": "language_model.",
        "model.embed_vision.": "projector.vision.",
        "model.embed_audio.": "projector.audio.",
        "model.": "",
    }
    inside = {
        "per_layer_input_gate.": "per_layer_input.gate.",
        "per_layer_projection.": "per_layer_input.projection.",
        "post_per_layer_input_norm.": "per_layer_input.post_norm.",
    }
    fused = {
        "embed_tokens_per_layer.weight": (1, "table"),
        "per_layer_model_projection.weight": (0, "model_projection"),
    }
    width = gemma4.SMALL["hidden_size_per_layer_input"]
    for name, tensor in rename(prefixes)(theirs).items():
        if name.startswith("language_model.layers."):
            for old, new in inside.items():
                name = name.replace(old, new)
        if name.endswith("linear_start.linear.weight"):
            tensor = tensor.unflatten(0, (2, -1))
        if name.removeprefix("language_model.") in fused:
            dim, own = fused[name.removeprefix("language_model.")]
            for layer, part in enumerate(tensor.split(width, dim)):
                expected[f"language_model.layers.{layer}.per_layer_input.{own}.weight"] = part
        else:
            expected[name] = tensor
    import_checkpoint(source, tmp_path / "checkpoint")
    check_holds(tmp_path / "checkpoint", pad_vocabulary(expected))


def with_unread_keys(tensors: Tensors) -> Tensors:
    """Layers that attend with keys and values of others hold some too, as published files do."""
    added = {}
    for layer, size in ((2, gemma4.TEXT["head_dim"]), (3, gemma4.TEXT["global_head_dim"])):
        rows = gemma4.TEXT["num_key_value_heads"] * size
        prefix = f"{LAYERS}{layer}.self_attn."
        added |= {f"{prefix}{name}_proj.weight": torch.randn(rows, 32).bfloat16() for name in "kv"}
        added[f"{prefix}k_norm.weight"] = torch.randn(size).bfloat16()
    return tensors | added


def test_keys_that_no_layer_reads_are_carried_through(tmp_path: Path) -> None:
    source = rewrite(saved(tmp_path / "saved", "E2B"), tmp_path / "hf", with_unread_keys)
    check_round_trip(source, tmp_path)
    assert len(load_tensors(tmp_path / "again")) == len(load_tensors(tmp_path / "saved")) + 6
    load(tmp_path / "again", AutoModelForImageTextToText)


@pytest.mark.parametrize(
    ("variant", "has_example", "change"),
    [
        *((variant, has_example, change_nothing) for variant in VARIANTS for has_example in (True, False)),
        ("E2B", True, with_unread_keys),
    ],
)
def test_the_language_model_of_a_multimodal_model(
    tmp_path: Path, variant: str, has_example: bool, change: Change
) -> None:
    """transformers' text-only classes load nothing of a multimodal file: the export has names of its own."""
    source = rewrite(saved(tmp_path / "saved", variant), tmp_path / "hf", change)
    import_checkpoint(source, tmp_path / "whole")
    change_manifest(tmp_path / "whole", tmp_path / "checkpoint", text_only=True)
    reference = source if has_example else without_weights(source, tmp_path / "bare")
    export_checkpoint(tmp_path / "checkpoint", reference, tmp_path / "out")
    model = load(tmp_path / "out", AutoModelForCausalLM)
    assert type(model).__name__ == ("Gemma4UnifiedForCausalLM" if variant == "12B" else "Gemma4ForCausalLM")
    # The same arithmetic on the same bits, without media: equal to the last bit.
    assert logits(model).equal(logits(load(source, AutoModelForImageTextToText)))
    # And what was exported is a checkpoint like any other.
    import_checkpoint(tmp_path / "out", tmp_path / "again")
    assert verify_checkpoint(tmp_path / "out", tmp_path / "checkpoint").differences == ()


def test_a_language_model_that_calls_itself_multimodal(tmp_path: Path) -> None:
    """Its config.json says gemma4, without towers; files have the names of a multimodal model, and keep them."""
    config: Any = Gemma4Config(
        text_config=gemma4.build_config("31B", with_towers=False), vision_config=None, audio_config=None
    )
    model = gemma4.randomise(Gemma4ForConditionalGeneration(config)).to(torch.bfloat16).eval()
    source = save(model, tmp_path / "hf")
    assert read_config(source)["model_type"] == "gemma4"
    check_round_trip(source, tmp_path)
    export_checkpoint(tmp_path / "checkpoint", without_weights(source, tmp_path / "bare"), tmp_path / "out")
    assert load_tensors(tmp_path / "out").keys() == load_tensors(source).keys()
    again, first = (load(path, AutoModelForImageTextToText) for path in (tmp_path / "out", source))
    assert logits(again).equal(logits(first))


def test_a_text_only_configuration_beside_multimodal_files(tmp_path: Path) -> None:
    """All of the language model is read, towers are named, and the export has the names of a text-only model."""
    source = saved(tmp_path / "hf", "31B")
    write_config(source, read_config(source)["text_config"] | {"architectures": ["Gemma4ForCausalLM"]})
    found = import_checkpoint(source, tmp_path / "checkpoint")
    assert found.unread and all(
        name.startswith(("model.vision_tower.", "model.embed_vision.")) for name in found.unread
    )
    export_checkpoint(tmp_path / "checkpoint", source, tmp_path / "out")
    theirs, ours = load_tensors(source), load_tensors(tmp_path / "out")
    read = {name: value for name, value in theirs.items() if name not in found.unread}
    assert {name.replace("model.language_model.", "model."): name for name in read}.keys() == ours.keys()
    assert all(ours[name.replace("model.language_model.", "model.")].equal(value) for name, value in read.items())
    load(tmp_path / "out", AutoModelForCausalLM)


def test_towers_in_files_without_towers_in_the_configuration(tmp_path: Path) -> None:
    source = saved(tmp_path / "hf", "31B")
    write_config(source, read_config(source) | {"vision_config": None, "audio_config": None})
    with pytest.raises(CheckpointError, match=r"unexpected.*vision"):
        import_checkpoint(source, tmp_path / "checkpoint")


def test_missing_and_unexpected_tensors_are_named_together(tmp_path: Path) -> None:
    bound = "model.vision_tower.encoder.layers.0.mlp.up_proj.input_max"

    def change(tensors: Tensors) -> Tensors:
        changed = {name: tensor for name, tensor in tensors.items() if name != bound}
        return changed | {f"{LAYERS}0.mlp.bias": torch.zeros(2)}

    source = rewrite(saved(tmp_path / "saved", "E2B"), tmp_path / "hf", change)
    with pytest.raises(CheckpointError) as error:
        import_checkpoint(source, tmp_path / "checkpoint")
    assert bound in str(error.value) and f"{LAYERS}0.mlp.bias" in str(error.value)
