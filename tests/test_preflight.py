"""Layouts that do and do not divide, and parameter counts per rank."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma4UnifiedConfig, PretrainedConfig

from megatron_vlm import platform
from megatron_vlm.cli import load_config
from megatron_vlm.config import Config
from megatron_vlm.errors import CheckpointError, ConfigError, LaunchError, UserError
from megatron_vlm.families import registry
from megatron_vlm.parallel.layout import Layout, assign_layers
from megatron_vlm.planning.memory import estimate_memory, format_memory
from megatron_vlm.planning.preflight import (
    check_attention_backend,
    check_export,
    check_layout,
    check_run_dir,
    record_export,
)
from megatron_vlm.planning.stages import HeldParameter, trace_stages
from megatron_vlm.training.start import kernels
from tests import published_mistral3
from tests.published_gemma3 import TEXT_ONLY, published_config
from tests.published_gemma4 import published_config as published_gemma4
from tests.stand_ins import transformer_engine as stand_in
from vlm_kernels.span_attention import transformer_engine

FAMILY = registry.FAMILIES[0]


def run_config(*overrides: str) -> Config:
    """A configuration with `overrides` (section.key=value)."""
    required = ["run_dir=run", "model.hf_path=model", "data.train=[{path: a}]", "data.seq_length=512"]
    required += ["train.train_iters=10", "train.global_batch_size=8"]
    return load_config([f"--{override}" for override in [*required, *overrides]])


def model_config_of(name: str) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """A published size as the family's record, and the shapes of its parameters."""
    hf_config = published_config(name)
    family = FAMILY
    model_config = family.config_from_hf(hf_config, text_only=name in TEXT_ONLY)
    return model_config, {name: weight.padded_shape for name, weight in family.weight_map(model_config).items()}


def layout_of(name: str, world_size: int, *overrides: str) -> Layout:
    model_config, shapes = model_config_of(name)
    return check_layout(run_config(*overrides), model_config, world_size, shapes)


TENSOR, PIPELINE = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
VIRTUAL, STAGES = "parallel.virtual_pipeline_model_parallel_size", "parallel.pipeline_layout"
TOWER = "parallel.vision_pipeline_layout"


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        ((8, 1, 1), [8]),
        ((8, 4, 1), [2, 2, 2, 2]),
        ((8, 2, 2), [2, 2, 2, 2]),
        ((7, 2, 1), [4, 3]),
        ((7, 3, 1), [2, 3, 2]),
        ((34, 4, 1), [8, 9, 9, 8]),
        ((6, 2, 2, [1, 0, 3, 2]), [1, 0, 3, 2]),
        ((7, 4, 1, None, [1, 1]), [0, 2, 3, 2]),
        ((7, 4, 1, [0, 0, 4, 3], [1, 0, 1]), [0, 0, 4, 3]),
    ],
)
def test_assign_layers(arguments: tuple[Any, ...], counts: list[int]) -> None:
    chunks = assign_layers(*arguments)
    assert [len(chunk) for chunk in chunks] == counts
    assert [layer for chunk in chunks for layer in chunk] == list(range(arguments[0]))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((3, 4, 1), "3 decoder layers do not fill 4 pipeline chunks"),
        ((6, 2, 2, [3, 3]), "2 pipeline ranks x 2 virtual = 4"),
        ((6, 2, 1, [3, 4]), "sums to 7, the model has 6 decoder layers"),
        ((6, 2, 1, [-1, 7]), "at least 0"),
        ((6, 3, 1, [1, 3, 2], [1, 1]), "has decoder layers before the embedding"),
        ((1, 3, 1, None, [1, 1]), "1 decoder layers do not fill 2 pipeline chunks"),
    ],
)
def test_assign_layers_refuses(arguments: tuple[Any, ...], expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)):
        assign_layers(*arguments)


def test_layout_spells_out_the_world() -> None:
    layout = layout_of("4b", 16, f"{TENSOR}=4", f"{PIPELINE}=2")
    assert str(layout) == "16 ranks = tensor 4 x pipeline 2 x context 1 x data 2"
    assert layout.chunks_of(1) == [1]


def test_virtual_chunks_alternate_between_ranks() -> None:
    layout = layout_of("27b", 2, f"{PIPELINE}=2", f"{VIRTUAL}=2", f"{STAGES}=[15,16,16,15]")
    assert layout.chunks_of(0) == [0, 2] and layout.chunks_of(1) == [1, 3]
    assert layout.chunks[2] == tuple(range(31, 47))


@pytest.mark.parametrize("counts", ["[14,13]", "[14,13,0,0]"])
def test_a_tower_over_two_chunks(counts: str) -> None:
    layout = layout_of("4b", 2, f"{PIPELINE}=2", f"{VIRTUAL}=2", f"{TOWER}={counts}")
    assert [layout.tower_layers(chunk, 27) for chunk in range(4)] == [range(14), range(14, 27), None, None]
    assert (layout.embedding_chunk, layout.embedding_rank) == (1, 1)
    assert [len(layers) for layers in layout.chunks] == [0, 11, 12, 11]


def test_a_tower_on_the_first_chunk() -> None:
    layout = layout_of("4b", 2, f"{PIPELINE}=2")
    assert [layout.tower_layers(chunk, 27) for chunk in range(2)] == [range(27), None]
    assert layout == layout_of("4b", 2, f"{PIPELINE}=2", f"{STAGES}=[17,17]")


def test_a_model_without_tower_layers_has_none_to_spread() -> None:
    """Gemma 4's 12B embeds pixels by linear layers."""
    hf_config = Gemma4UnifiedConfig()
    model_config = registry.detect(hf_config).config_from_hf(hf_config, text_only=False)
    with pytest.raises(ConfigError, match="has no layers of a vision tower"):
        check_layout(run_config(f"{PIPELINE}=2", f"{TOWER}=[1]"), model_config, 2)


@pytest.mark.parametrize(
    ("name", "world_size", "overrides", "expected"),
    [
        ("4b", 3, [f"{TENSOR}=3"], ["attention heads 8", "use 1 or 2 or 4 or 8", "padded vocabulary"]),
        ("4b", 16, [f"{TENSOR}=16"], ["attention heads 8 cannot be divided"]),
        ("1b", 8, [f"{TENSOR}=8"], ["attention heads 4", "use 1 or 2 or 4"]),
        ("4b", 6, [f"{TENSOR}=4"], ["6 ranks are not a multiple of 4", "start 4 or 8 ranks"]),
        ("4b", 1, [f"{TENSOR}=4"], ["1 ranks are not a multiple of 4", "start 4 ranks"]),
        ("4b", 3, [], ["global_batch_size 8 is not a multiple of 3", "use 6 or 9"]),
        ("4b", 35, [f"{PIPELINE}=35"], ["34 decoder layers do not fill 35 pipeline chunks"]),
        ("4b", 2, [f"{PIPELINE}=2", f"{STAGES}=[17,18]"], ["sums to 35", "34 decoder layers"]),
        ("4b", 2, [f"{PIPELINE}=2", f"{TOWER}=[14,14]"], ["sums to 28, the vision tower has 27 layers"]),
        ("4b", 2, [f"{PIPELINE}=2", f"{TOWER}=[0,0]"], ["sums to 0, the vision tower has 27 layers"]),
        ("1b", 2, [f"{PIPELINE}=2", f"{TOWER}=[1]"], ["the model has no layers of a vision tower"]),
        (
            "4b",
            2,
            [f"{PIPELINE}=2", f"{TOWER}=[14,13]", f"{STAGES}=[1,33]"],
            ["[1, 33] has decoder layers before the embedding", "puts on chunk 1", "begin it with 1 zeros"],
        ),
        (
            "4b",
            3,
            [f"{PIPELINE}=3", f"{VIRTUAL}=2"],
            ["8 micro-batches per step are not a multiple of the pipeline size 3", "use a global_batch_size of 6 or 9"],
        ),
        ("4b", 1, ["model.freeze=[audio_tower]"], ["model.freeze names audio_tower", "this model has language_model"]),
        ("4b", 1, ["optimizer.lr_multipliers={audio_tower: 1}"], ["optimizer.lr_multipliers names audio_tower"]),
        ("4b", 1, ["model.freeze=[language_model,vision_tower,projector]"], ["nothing to train"]),
        ("4b", 1, ["model.freeze=['*']"], ["nothing to train", "this model has language_model"]),
        ("4b", 1, ["model.freeze=['*.weight','*.bias',projector]"], ["nothing to train"]),
        (
            "4b",
            1,
            ["model.freeze=['language_model.layer.*.mlp.*',vision_tower,'language_model.layers.0.*']"],
            [
                "model.freeze names language_model.layer.*.mlp.*, which the model does not have",
                "the nearest names are language_model.layers.*.mlp.",
            ],
        ),
    ],
)
def test_layouts_that_do_not_divide(name: str, world_size: int, overrides: list[str], expected: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        layout_of(name, world_size, *overrides)
    for text in expected:
        assert text in str(caught.value)


def test_wrong_number_of_ranks_alone_is_a_launch_error() -> None:
    with pytest.raises(LaunchError):
        layout_of("4b", 6, f"{TENSOR}=4")


def test_key_value_heads_may_be_replicated_but_not_split_unevenly() -> None:
    layout_of("4b", 8, f"{TENSOR}=8")  # 4 key-value heads
    layout_of("1b", 4, f"{TENSOR}=4")  # 1 key-value head
    model_config, _ = model_config_of("12b")
    with pytest.raises(ConfigError, match="key-value heads 8 neither divide"):
        # 12 ranks of a model with 8 key-value heads; also its 16 heads and its vocabulary do not divide by 12.
        check_layout(run_config(f"{TENSOR}=12"), model_config, 12)


@pytest.mark.parametrize(
    "hf_config",
    [published_config("27b"), published_mistral3.published_config("ministral3_3b")],
    ids=["gemma3", "mistral3"],
)
def test_vision_heads_matter_only_when_the_tower_is_split(hf_config: PretrainedConfig) -> None:
    model_config = registry.detect(hf_config).config_from_hf(hf_config, text_only=False)
    with pytest.raises(ConfigError, match=r"vision attention heads 16 .* or model.vision_parallelism data"):
        check_layout(run_config(f"{TENSOR}=32"), model_config, 32)
    check_layout(run_config(f"{TENSOR}=32", "model.vision_parallelism=data"), model_config, 32)


def test_mistral3_problems_name_what_it_has() -> None:
    """More ranks than key-value heads divide it; experts and audio are not its."""
    hf_config = published_mistral3.published_config("mistral3_24b")
    family = registry.detect(hf_config)
    model_config = family.config_from_hf(hf_config, text_only=False)
    names = [name for name, _ in family.weight_map(model_config).items()]
    assert {name.partition(".")[0] for name in names} == set(model_config.parts)
    layout = check_layout(run_config(f"{TENSOR}=16", f"{PIPELINE}=2"), model_config, 32, names)
    assert [len(chunk) for chunk in layout.chunks] == [20, 20]
    wrong = run_config(f"{TENSOR}=3", "parallel.expert_model_parallel_size=2", "model.freeze=[audio_tower]")
    with pytest.raises(ConfigError) as caught:
        check_layout(wrong, model_config, 3, names)
    for text in (
        "attention heads 32",
        "feed-forward size 32768",
        "vision attention heads 16",
        "vision projector size 5120",
        "has no experts",
    ):
        assert text in str(caught.value)
    assert "model.freeze names audio_tower" in str(caught.value)


def test_all_layout_problems_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        layout_of("4b", 7, f"{TENSOR}=3", f"{PIPELINE}=2", f"{STAGES}=[1,2]", "model.freeze=[audio_tower]")
    for text in ("attention heads 8", "7 ranks", "sums to 3", "audio_tower"):
        assert text in str(caught.value)


def held_parameters(config: Config, model_config: Any, layout: Layout) -> list[Mapping[str, HeldParameter]]:
    """By one rank of every pipeline stage."""
    return [stage.parameters for stage in trace_stages(config, FAMILY, model_config, layout, images_per_row=0)]


def count(held: Mapping[str, HeldParameter]) -> int:
    return sum(entry.num_values for entry in held.values())


def test_counts_per_rank_add_up() -> None:
    """Over a pipeline every parameter is held once, but for the tied embedding, which both ends hold."""
    model_config, shapes = model_config_of("4b")
    config = run_config(f"{PIPELINE}=4", f"{STAGES}=[0,17,17,0]")
    held = held_parameters(config, model_config, check_layout(config, model_config, 4))
    total = sum(map(count, held))
    embedding = math.prod(shapes["language_model.embed_tokens.weight"])
    assert total == sum(map(math.prod, shapes.values())) + embedding
    parts = [{name.partition(".")[0] for name in parameters} for parameters in held]
    assert parts[0] == set(model_config.parts) and parts[1] == {"language_model"}
    assert count(held[3]) == embedding + model_config.text.hidden_size  # the head and the final norm


def test_counts_per_rank_over_tensor_ranks() -> None:
    """All but a named rest is divided: norms, biases of row-parallel layers, and what is small or read by all ranks."""
    model_config, shapes = model_config_of("4b")
    config = run_config(f"{TENSOR}=4")
    rest = re.compile(r"norm|(out_proj|fc2)\.bias|patch_embedding|position")
    replicated = sum(math.prod(shape) for name, shape in shapes.items() if rest.search(name))
    total = sum(map(math.prod, shapes.values()))
    (held,) = held_parameters(config, model_config, check_layout(config, model_config, 4))
    assert count(held) == (total - replicated) / 4 + replicated
    assert replicated < 0.0025 * total


@pytest.mark.full
def test_memory_follows_the_settings() -> None:
    model_config, shapes = model_config_of("4b")

    def memory(world_size: int, *overrides: str) -> Any:
        config = run_config(*overrides)
        return estimate_memory(config, FAMILY, model_config, check_layout(config, model_config, world_size))

    (one,) = memory(1)
    total = sum(map(math.prod, shapes.values()))
    # Buffers of data parallelism are padded, by less than eight kilobytes.
    exact = partial(pytest.approx, abs=2**13)
    assert (one.parameter_bytes, one.gradient_bytes, one.optimizer_bytes) == exact((2 * total, 4 * total, 12 * total))
    (four,) = memory(4)
    assert four.optimizer_bytes == exact(3 * total) and four.parameter_bytes == one.parameter_bytes
    (frozen,) = memory(1, "model.freeze=[language_model]")
    trained = sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith("language_model"))
    assert frozen.gradient_bytes == exact(4 * trained)
    (plain,) = memory(1, "optimizer.name=sgd", "parallel.use_distributed_optimizer=false", "train.precision=fp32")
    assert plain.optimizer_bytes == 0 and plain.parameter_bytes == 4 * total
    activations = [memory(1, f"model.recompute={kind}")[0].activation_bytes for kind in ("none", "selective", "full")]
    assert activations == sorted(activations, reverse=True) and activations[0] > 4 * activations[2]
    first, last = memory(2, f"{PIPELINE}=2")
    assert first.logits_bytes == 0 < last.logits_bytes
    assert len(list(format_memory([first, last]))) == 3


def test_export_target(tmp_path: Path) -> None:
    target = tmp_path / "out" / "hf"
    config = run_config(f"run_dir={tmp_path}", f"checkpoint.export_hf={target}")
    assert check_export(config)  # absent: parents are made later
    target.mkdir(parents=True)
    assert check_export(config)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        check_export(config)
    record_export(config)
    assert not check_export(config)  # this completed run wrote it
    with pytest.raises(CheckpointError, match="not empty"):
        check_export(run_config(f"run_dir={tmp_path}", f"checkpoint.export_hf={target}", "train.train_iters=11"))
    assert not check_export(run_config())


def test_run_dir_must_be_writable(tmp_path: Path) -> None:
    check_run_dir(run_config(f"run_dir={tmp_path}/new/run"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        check_run_dir(run_config(f"run_dir={tmp_path}/file/run"))
    assert not (tmp_path / "new").exists()


# Transformer Engine

BY_TRANSFORMER_ENGINE = "model.attention_backend=transformer_engine"


def test_transformer_engine_needs_a_layer_that_it_can_compute() -> None:
    layout_of("4b", 1, BY_TRANSFORMER_ENGINE)
    with pytest.raises(ConfigError, match=r"cannot compute a context rank's shard .* is 2"):
        layout_of("4b", 2, BY_TRANSFORMER_ENGINE, "parallel.context_parallel_size=2")
    model_config, _ = model_config_of("4b")
    wide = replace(model_config.text, layers=tuple(replace(layer, head_dim=512) for layer in model_config.text.layers))
    with pytest.raises(ConfigError, match=r"no kernels for heads of 512, only for multiples of 8 up to 256"):
        check_layout(run_config(BY_TRANSFORMER_ENGINE), replace(model_config, text=wide), 1)


def test_transformer_engine_is_refused_where_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    flex, engine = run_config("model.attention_backend=flex"), run_config(BY_TRANSFORMER_ENGINE)
    for config in (flex, engine):
        with pytest.raises(ConfigError, match="is for GPUs, and this run has none"):
            check_attention_backend(config)
    check_attention_backend(run_config())
    monkeypatch.setattr(platform.device, "_CURRENT", replace(platform.current(), accelerated=True))
    check_attention_backend(flex)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    transformer_engine.why_absent.cache_clear()
    with pytest.raises(ConfigError, match=r"is transformer_engine, which cannot be imported: .*transformer_engine"):
        check_attention_backend(engine)
    with stand_in.installed():
        check_attention_backend(engine)


def test_a_start_says_what_it_uses_of_nvidias_libraries() -> None:
    hf_config = published_gemma4("31b")
    model_config = registry.detect(hf_config).config_from_hf(hf_config, text_only=False)
    assert kernels(run_config(), model_config, "torch") == "attention: auto; Adam: torch"
    assert kernels(run_config(BY_TRANSFORMER_ENGINE), model_config, "apex") == (
        "attention: Transformer Engine in 50 of 60 decoder layers where no image sees ahead, FlexAttention elsewhere; "
        "Adam: apex"
    )
    sgd = run_config("optimizer.name=sgd", "parallel.use_distributed_optimizer=false")
    assert kernels(sgd, model_config, "torch") == "attention: auto"
