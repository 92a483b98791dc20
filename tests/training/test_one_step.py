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

from tests.families.gemma3 import GEMMA3
from tests.families.layouts import STEP
from tests.families.parameters import each_layout
from tests.families.tiny_family import TinyFamily
from tests.parity.comparison import ZERO_GRADIENT
from tests.parity.layouts import TestLayout
from tests.ranks import run_ranks
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

FilesOf = Callable[[TinyFamily], TinyFiles]
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


def train_one_step(files: TinyFiles, folder: Path, layout: TestLayout, **settings: Any) -> Path:
    """Run in a layout; returns the export."""
    export = folder / "a new folder" / "hf"
    settings = CONTRACT | layout.settings() | {"checkpoint.export_hf": str(export)} | settings
    run_ranks(layout.world_size, train_on_rank, tiny_config(files, folder / "run", settings))
    return export


def check_step(folder: Path, exported: torch.nn.Module, step: Step) -> None:
    loss, label_tokens, before, gradients = step
    (record,) = read_metrics(folder / "run")
    assert record["label_tokens"] == label_tokens
    assert record["loss"] == pytest.approx(loss, rel=LOSS_TOLERANCE)
    norm = torch.stack([gradient.norm() for gradient in gradients.values() if gradient is not None]).norm().item()
    assert record["grad_norm"] == pytest.approx(norm, rel=NORM_TOLERANCE)
    after = {name: parameter.detach() for name, parameter in exported.named_parameters()}
    assert after.keys() == before.keys()
    worst = 0.0
    for name, gradient in gradients.items():
        if gradient is None:  # no loss depends on it
            assert torch.equal(after[name], before[name]), name
            continue
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


@pytest.mark.parametrize(("family", "layout"), each_layout("step"))
def test_step_of_vision_language_model(family: TinyFamily, layout: str, multimodal_of: FilesOf, tmp_path: Path) -> None:
    files = multimodal_of(family)
    export = train_one_step(files, tmp_path, family.tables.step[layout])
    check_step(tmp_path, load_multimodal(files.family, export), multimodal_step(files))
    check_files(export, files.model)
    (record,) = read_metrics(tmp_path / "run")
    kinds = [part["type"] for row in files.rows for message in row["messages"] for part in message["content"]]
    assert (record["images"], record["videos"]) == (kinds.count("image"), kinds.count("video"))


@pytest.mark.parametrize("layout", ["TP1", "TP2xPP2+SP"])
def test_step_of_text_model(layout: str, text_model: TinyFiles, tmp_path: Path) -> None:
    export = train_one_step(text_model, tmp_path, STEP[layout])
    step = take_step(load_text(GEMMA3, text_model.model), text_batch(text_model, text_model.rows))
    check_step(tmp_path, load_text(GEMMA3, export), step)
    check_files(export, text_model.model)


@pytest.mark.parametrize(("family", "layout"), each_layout("text_step"))
def test_step_of_language_model_taken_out(
    family: TinyFamily, layout: str, multimodal_of: FilesOf, tmp_path: Path
) -> None:
    """`model.text_only` trains the language model of a multimodal directory, and exports it as a text model."""
    files = multimodal_of(family)
    files = replace(files, data=files.data.with_name("text.jsonl"))
    export = train_one_step(files, tmp_path, family.tables.text_step[layout], **{"model.text_only": True})
    model = files.family.language_model_of(load_multimodal(files.family, files.model))
    check_step(tmp_path, load_text(files.family, export), take_step(model, text_batch(files, files.rows)))


def test_export_has_dtype_of_source(multimodal_bf16: TinyFiles, tmp_path: Path) -> None:
    """A bf16 directory is trained in fp32 and written in bf16, rounded once."""
    files = multimodal_bf16
    export = train_one_step(files, tmp_path, STEP["TP2"])
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
