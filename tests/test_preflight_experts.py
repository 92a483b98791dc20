"""Layouts of models with experts: how the ranks of a stage are divided anew, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_vlm.cli import load_config
from megatron_vlm.config import Config
from megatron_vlm.errors import ConfigError, LaunchError, UserError
from megatron_vlm.families.gemma3.config import config_from_hf as gemma3_from_hf
from megatron_vlm.families.qwen3_vl.config import config_from_hf
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.planning.dry_run import world_size_to_check
from megatron_vlm.planning.preflight import check_layout
from tests import published_gemma3
from tests.published_qwen3_vl import published_config
from tests.refusals import check_refusal

TENSOR, PIPELINE = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
EXPERT, EXPERT_TENSOR = "parallel.expert_model_parallel_size", "parallel.expert_tensor_parallel_size"
SEQUENCE = "parallel.sequence_parallel=true"
FP32 = "train.precision=fp32"


def run_config(*overrides: str) -> Config:
    """A configuration with `overrides` (section.key=value)."""
    required = ["run_dir=run", "model.hf_path=model", "data.train=[{path: a}]", "data.seq_length=512"]
    required += ["train.train_iters=10", "train.global_batch_size=64"]
    return load_config([f"--{override}" for override in [*required, *overrides]])


def record(name: str, **experts: int) -> Any:
    """A published size as the family's record; `experts` replaces numbers of its experts."""
    model_config = config_from_hf(published_config(name), text_only=False)
    if not experts:
        return model_config
    layers = tuple(
        dataclasses.replace(layer, moe=dataclasses.replace(layer.moe, **experts)) for layer in model_config.text.layers
    )
    return dataclasses.replace(model_config, text=dataclasses.replace(model_config.text, layers=layers))


def layout_of(world_size: int, *overrides: str, model_config: Any = None) -> Layout:
    return check_layout(run_config(*overrides), model_config or record("30b_a3b"), world_size)


def refusal(world_size: int, *overrides: str, model_config: Any = None) -> UserError:
    with pytest.raises(UserError) as caught:
        layout_of(world_size, *overrides, model_config=model_config)
    check_refusal(str(caught.value))
    return caught.value


def test_layout_spells_out_how_experts_divide_the_ranks() -> None:
    layout = layout_of(32, f"{TENSOR}=2", SEQUENCE, f"{PIPELINE}=2", f"{EXPERT}=4", f"{EXPERT_TENSOR}=2")
    assert (layout.expert_size, layout.expert_tensor_size, layout.data_size, layout.expert_data_size) == (4, 2, 8, 2)
    assert str(layout) == (
        "32 ranks = tensor 2 x pipeline 2 x context 1 x data 8; for experts tensor 2 x pipeline 2 x expert 4 x data 2"
    )


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (4, [f"{EXPERT}=4"]),  # experts over data ranks
        (4, [f"{TENSOR}=4", SEQUENCE, f"{EXPERT}=4"]),  # over tensor ranks
        (8, [f"{TENSOR}=4", SEQUENCE, f"{EXPERT}=8"]),  # over both
        (2, [f"{EXPERT_TENSOR}=2"]),
        (1, []),
    ],
)
def test_layouts_that_divide(world_size: int, overrides: list[str]) -> None:
    layout_of(world_size, *overrides)


@pytest.mark.parametrize(
    ("world_size", "overrides", "expected"),
    [
        (3, [f"{EXPERT}=3", "train.global_batch_size=3"], ["128 experts cannot be divided", "1 or 2 or 4", "or 128"]),
        (5, [f"{EXPERT_TENSOR}=5", "train.global_batch_size=5"], ["expert width 768 cannot be divided", "use 1 or 2"]),
        (2, [f"{TENSOR}=2"], ["with experts needs parallel.sequence_parallel", "set parallel.sequence_parallel"]),
        (8, [f"{EXPERT}=16"], ["the 8 ranks of a pipeline stage are not a multiple of 16", "start 16 ranks"]),
        (8, [f"{PIPELINE}=2", f"{EXPERT}=8"], ["the 4 ranks of a pipeline stage", "start 16 ranks"]),
        (
            12,
            [f"{TENSOR}=4", SEQUENCE, f"{EXPERT}=8", "train.global_batch_size=6"],
            ["the 12 ranks of a pipeline stage are not a multiple of 8 = expert 8 x expert-tensor 1", "8 or 16 ranks"],
        ),
    ],
)
def test_layouts_that_do_not_divide(world_size: int, overrides: list[str], expected: list[str]) -> None:
    message = str(refusal(world_size, *overrides))
    for text in expected:
        assert text in message


def test_wrong_number_of_ranks_alone_is_a_launch_error() -> None:
    assert isinstance(refusal(8, f"{EXPERT}=16"), LaunchError)


def test_grouped_product_needs_rows_of_16_bytes() -> None:
    """768 / 64 = 12 columns are 24 bytes in bf16 and 48 in fp32: only these start every row at a multiple of 16."""
    message = str(refusal(64, f"{EXPERT_TENSOR}=64"))
    assert "12 is no multiple of 8" in message and "use 1 or 2 or 3 or 4 or 6" in message and "or 96" in message
    layout_of(64, f"{EXPERT_TENSOR}=64", FP32)
    narrow = record("30b_a3b", intermediate_size=12)
    assert "set train.precision to fp32" in str(refusal(1, model_config=narrow))
    layout_of(1, FP32, model_config=narrow)
    thin = dataclasses.replace(narrow, text=dataclasses.replace(record("30b_a3b").text, hidden_size=2044))
    assert "hidden size 2044 is no multiple of 8" in str(refusal(1, model_config=thin))
    layout_of(1, FP32, model_config=thin)


def test_torch_refuses_what_the_check_refuses() -> None:
    """The rule is torch's own: the same widths, in both types."""
    import torch

    for dtype, rule in ((torch.bfloat16, 8), (torch.float32, 4)):
        for width in (4, 8, 12, 16, 18):
            tokens, weights = torch.zeros(6, width, dtype=dtype), torch.zeros(2, 16, width, dtype=dtype)
            offsets = torch.tensor([2, 6], dtype=torch.int32)
            try:
                torch.nn.functional.grouped_mm(tokens, weights.transpose(1, 2), offs=offsets)
                accepted = True
            except RuntimeError:
                accepted = False
            assert accepted == (width % rule == 0), (dtype, width)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (f"{EXPERT}=2", "parallel.expert_model_parallel_size is 2, but the model has no experts"),
        (f"{EXPERT_TENSOR}=2", "parallel.expert_tensor_parallel_size is 2, but the model has no experts"),
        ("model.moe_load_balancing=transformers", "model.moe_load_balancing is transformers, but the model has no"),
    ],
)
@pytest.mark.parametrize(
    "dense",
    [record("8b"), gemma3_from_hf(published_gemma3.published_config("4b"), text_only=False)],
    ids=["qwen3_vl 8b", "gemma3 4b"],
)
def test_dense_models_refuse_settings_for_experts(override: str, expected: str, dense: Any) -> None:
    error = refusal(2, override, model_config=dense)
    assert isinstance(error, ConfigError) and expected in str(error)


def test_unused_feed_forward_size_need_not_divide() -> None:
    """Published configurations with experts name a dense size that no layer has; only vision and heads count here."""
    model_config = record("30b_a3b")
    layers = tuple(dataclasses.replace(layer, intermediate_size=6143) for layer in model_config.text.layers)
    unused = dataclasses.replace(model_config, text=dataclasses.replace(model_config.text, layers=layers))
    layout_of(2, f"{TENSOR}=2", SEQUENCE, model_config=unused)
    dense_first = (dataclasses.replace(layers[0], moe=None), *layers[1:])
    used = dataclasses.replace(model_config, text=dataclasses.replace(model_config.text, layers=dense_first))
    assert "feed-forward size 6143 cannot be divided" in str(refusal(2, f"{TENSOR}=2", SEQUENCE, model_config=used))


def test_vision_heads_may_stay_whole() -> None:
    message = str(refusal(32, f"{TENSOR}=32", SEQUENCE))
    assert "vision attention heads 16" in message and "model.vision_parallelism data" in message
    layout_of(32, f"{TENSOR}=32", SEQUENCE, "model.vision_parallelism=data")


def test_dry_run_takes_enough_ranks_for_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    sizes = [f"{TENSOR}=2", SEQUENCE, f"{PIPELINE}=2"]
    assert world_size_to_check(run_config(*sizes)) == 4
    assert world_size_to_check(run_config(*sizes, f"{EXPERT}=3", f"{EXPERT_TENSOR}=2")) == 12
    assert world_size_to_check(run_config(*sizes, f"{EXPERT}=8")) == 16
