"""One step of plain SGD at learning rate 1 changes every parameter by minus transformers' own gradient.

The whole path is under test: JSONL, processor, labels, collation, layout, accumulation, update, export.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.ranks import run_ranks
from tests.training.tiny_families import GEMMA3, GLOBAL_BATCH
from tests.training.tiny_run_config import TinyFiles, read_metrics, tiny_config, train_on_rank
from tests.training.transformers_reference import (
    NO_LOSS,
    Batch,
    load_multimodal,
    load_text,
    mean_loss,
    multimodal_batch,
    text_batch,
)

CONTRACT = {
    "optimizer.name": "sgd",
    "parallel.use_distributed_optimizer": False,
    "optimizer.lr": 1.0,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip_grad": 0.0,
    "optimizer.schedule": "constant",
}
# fp32 in another order of summation: 1e-7 per product, amplified by four decoder layers behind two of the tower. The
# gradient's tolerance is relative to the largest entry of each tensor (the worst seen is printed by `pytest -s`); a new
# parameter is rounded once more, by at most half a unit in the last place of fp32, on either side.
GRADIENT_TOLERANCE = 1e-5
ROUNDING = 2.0**-23
LOSS_TOLERANCE = 1e-6
NORM_TOLERANCE = 5e-6  # a replica counted twice, or a share left out, moves it by 1e-3 or more
# Softmax does not change when one number is added to all scores of a query: a key bias has no gradient.
ZERO_GRADIENT = "k_proj.bias"

TENSOR, PIPELINE = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
VIRTUAL, SEQUENCE = "parallel.virtual_pipeline_model_parallel_size", "parallel.sequence_parallel"
MICRO_BATCH, VISION = "train.micro_batch_size", "model.vision_parallelism"
OVERLAP, STAGES = "parallel.overlap_grad_reduce", "parallel.pipeline_layout"
EXPERT, EXPERT_TENSOR = "parallel.expert_model_parallel_size", "parallel.expert_tensor_parallel_size"
DISPATCHER, RECOMPUTE = "parallel.moe_token_dispatcher_type", "model.recompute"

# Ranks, and settings. Micro-batches of two rows hold padding, and in file order rows with and without images.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {MICRO_BATCH: 1}),
    "TP1, one micro-batch": (1, {MICRO_BATCH: GLOBAL_BATCH}),
    "TP2": (2, {TENSOR: 2, MICRO_BATCH: 2}),
    "TP2+SP": (2, {TENSOR: 2, SEQUENCE: True, MICRO_BATCH: 2}),
    "TP4": (4, {TENSOR: 4, MICRO_BATCH: 4}),
    "PP2": (2, {PIPELINE: 2, MICRO_BATCH: 1}),
    "PP2 uneven": (2, {PIPELINE: 2, STAGES: [1, 3], MICRO_BATCH: 2}),
    "PP4": (4, {PIPELINE: 4, MICRO_BATCH: 2}),
    "PP2xVPP2": (2, {PIPELINE: 2, VIRTUAL: 2, MICRO_BATCH: 1}),
    "TP2xPP2+SP": (4, {TENSOR: 2, PIPELINE: 2, SEQUENCE: True, MICRO_BATCH: 2}),
    "DP2": (2, {MICRO_BATCH: 2}),
    "DP2, overlapped": (2, {MICRO_BATCH: 1, OVERLAP: True}),
    "DP4, one rank without images": (4, {MICRO_BATCH: 1}),
    "DP2xTP2": (4, {TENSOR: 2, MICRO_BATCH: 1}),
    "TP2, vision DP": (2, {TENSOR: 2, VISION: "data", MICRO_BATCH: 2}),
    "TP2+SP, vision DP": (2, {TENSOR: 2, SEQUENCE: True, VISION: "data", MICRO_BATCH: 1}),
    "EP2": (2, {EXPERT: 2, MICRO_BATCH: 1}),
    "EP2, overlapped": (2, {EXPERT: 2, MICRO_BATCH: 1, OVERLAP: True, RECOMPUTE: "full"}),
    "EP4": (4, {EXPERT: 4, MICRO_BATCH: 2}),
    "EP2xTP2+SP": (4, {TENSOR: 2, SEQUENCE: True, EXPERT: 2, MICRO_BATCH: 2}),
    "EP2xPP2": (4, {PIPELINE: 2, EXPERT: 2, MICRO_BATCH: 1}),
    "ETP2": (2, {TENSOR: 2, SEQUENCE: True, EXPERT_TENSOR: 2, MICRO_BATCH: 2}),
    "ETP2 of data ranks, all-gather": (4, {EXPERT: 2, EXPERT_TENSOR: 2, DISPATCHER: "allgather", MICRO_BATCH: 1}),
}
WITHOUT_EXPERTS = [name for name in LAYOUTS if "EP" not in name and "ETP" not in name]
# What a family leaves out is in tests/parity, without the path around the model.
LEFT_OUT = (
    "TP1, one micro-batch",
    "DP2, overlapped",
    "DP4, one rank without images",
    "DP2xTP2",
    "TP2+SP, vision DP",
)
OF_FAMILY = {
    "gemma3": WITHOUT_EXPERTS,
    "qwen3_vl": [name for name in WITHOUT_EXPERTS if name not in LEFT_OUT],
    "qwen3_vl_moe": ["DP2, overlapped", *(name for name in LAYOUTS if name not in WITHOUT_EXPERTS)],
    "mistral3": [name for name in WITHOUT_EXPERTS if name not in LEFT_OUT],
}
CASES = [(family, layout) for family, layouts in OF_FAMILY.items() for layout in layouts]
TEXT_LAYOUTS = ["TP1", "TP2xPP2+SP"]
TEXT_CASES = [("gemma3", "TP1"), *((family, "TP2xPP2+SP") for family in OF_FAMILY)]

FilesOf = Callable[[str], TinyFiles]
Step = tuple[float, int, dict[str, torch.Tensor], dict[str, torch.Tensor]]


def take_step(model: torch.nn.Module, batch: Batch) -> Step:
    """Loss, label tokens, and by name every parameter before and its gradient."""
    loss = mean_loss(model, batch)
    loss.backward()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.item(), int((batch[1] != NO_LOSS).sum()), before, gradients


@cache
def multimodal_step(files: TinyFiles) -> Step:
    return take_step(load_multimodal(files.family, files.model), multimodal_batch(files, files.rows))


def train_one_step(files: TinyFiles, folder: Path, layout: str, **settings: Any) -> Path:
    """Run in a layout; returns the export."""
    world_size, layout_settings = LAYOUTS[layout]
    export = folder / "a new folder" / "hf"
    settings = CONTRACT | layout_settings | {"checkpoint.export_hf": str(export)} | settings
    run_ranks(world_size, train_on_rank, tiny_config(files, folder / "run", settings))
    return export


def check_step(folder: Path, exported: torch.nn.Module, step: Step) -> None:
    loss, label_tokens, before, gradients = step
    (record,) = read_metrics(folder / "run")
    assert record["label_tokens"] == label_tokens
    assert record["loss"] == pytest.approx(loss, rel=LOSS_TOLERANCE)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    assert record["grad_norm"] == pytest.approx(norm, rel=NORM_TOLERANCE)
    after = {name: parameter.detach() for name, parameter in exported.named_parameters()}
    assert after.keys() == before.keys()
    worst = 0.0
    for name, gradient in gradients.items():
        rounding = ROUNDING * (before[name].abs().max() + gradient.abs().max())
        error = (after[name] - (before[name] - gradient)).abs().max()
        if name.endswith(ZERO_GRADIENT):
            assert error <= rounding + 1e-7, name
            continue
        largest = gradient.abs().max()
        assert largest > 100 * rounding, f"{name}: its gradient would drown in rounding"
        assert error <= GRADIENT_TOLERANCE * largest + rounding, f"{name}: {error} of {largest}"
        worst = max(worst, ((error - rounding) / largest).item())
    print(f"worst gradient error beyond rounding: {worst:.1e}")


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_step_of_vision_language_model(family: str, layout: str, multimodal_of: FilesOf, tmp_path: Path) -> None:
    files = multimodal_of(family)
    export = train_one_step(files, tmp_path, layout)
    check_step(tmp_path, load_multimodal(files.family, export), multimodal_step(files))
    check_files(export, files.model)
    (record,) = read_metrics(tmp_path / "run")
    kinds = [part["type"] for row in files.rows for message in row["messages"] for part in message["content"]]
    assert (record["images"], record["videos"]) == (kinds.count("image"), kinds.count("video"))


@pytest.mark.parametrize("layout", TEXT_LAYOUTS)
def test_step_of_text_model(layout: str, text_model: TinyFiles, tmp_path: Path) -> None:
    export = train_one_step(text_model, tmp_path, layout)
    step = take_step(load_text(GEMMA3, text_model.model), text_batch(text_model, text_model.rows))
    check_step(tmp_path, load_text(GEMMA3, export), step)
    check_files(export, text_model.model)


@pytest.mark.parametrize(("family", "layout"), TEXT_CASES)
def test_step_of_language_model_taken_out(family: str, layout: str, multimodal_of: FilesOf, tmp_path: Path) -> None:
    """`model.text_only` trains the language model of a multimodal directory, and exports it as a text model."""
    files = multimodal_of(family)
    files = replace(files, data=files.data.with_name("text.jsonl"))
    export = train_one_step(files, tmp_path, layout, **{"model.text_only": True})
    model = files.family.language_model_of(load_multimodal(files.family, files.model))
    check_step(tmp_path, load_text(files.family, export), take_step(model, text_batch(files, files.rows)))


def test_export_has_dtype_of_source(multimodal_bf16: TinyFiles, tmp_path: Path) -> None:
    """A bf16 directory is trained in fp32 and written in bf16, rounded once."""
    files = multimodal_bf16
    export = train_one_step(files, tmp_path, "TP2")
    check_files(export, files.model)
    model = load_multimodal(files.family, files.model, torch.float32)
    _, _, before, gradients = take_step(model, multimodal_batch(files, files.rows))
    for name, parameter in load_multimodal(files.family, export).named_parameters():
        expected = before[name] - gradients[name]
        # Half a unit in the last of bf16's eight places, and what fp32 leaves open.
        assert parameter.dtype == torch.bfloat16
        assert ((parameter.float() - expected).abs() <= 2.0**-8 * expected.abs() + 1e-6).all(), name


def check_files(export: Path, source: Path) -> None:
    """The same tensors by name, dtype and shape, and the same configuration."""
    assert tensor_facts(export) == tensor_facts(source)
    configurations = [json.loads((folder / "config.json").read_text()) for folder in (export, source)]
    assert configurations[0] == configurations[1]


def tensor_facts(folder: Path) -> dict[str, tuple[str, list[int]]]:
    facts = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            facts |= {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    return facts
