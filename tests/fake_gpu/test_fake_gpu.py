"""Training steps of every family on a GPU that is not there, and what such a GPU refuses."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from megatron_vlm import platform
from megatron_vlm.layers import mlp
from megatron_vlm.layers.recompute import layers_run_by
from megatron_vlm.training.step import run_global_batch
from tests import published_gemma3, published_gemma4, published_mistral3, published_qwen3_vl
from tests.fake_gpu.device import CUDA, KNOWN_WAITS, DeviceFault, fake_gpu
from tests.fake_gpu.launches import KERNELS, REST, LaunchRecorder
from tests.fake_gpu.step import FakeRank, fake_rank, few_layers
from tests.sizes import full
from vlm_kernels import library

TENSOR = "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"
EXPERT = ("parallel.expert_model_parallel_size=2",)
PIPELINE = ("parallel.pipeline_model_parallel_size=2",)
CONTEXT = ("parallel.context_parallel_size=2",)
QWEN3_VL, GEMMA3 = published_qwen3_vl.published_config, published_gemma3.published_config
GEMMA4, MISTRAL3 = published_gemma4.published_config, published_mistral3.published_config
# A model, its layers that run, the ranks, the layout.
STEPS = [
    pytest.param(QWEN3_VL("8b"), 2, 2, TENSOR, id="qwen3_vl 8B TP2"),
    pytest.param(QWEN3_VL("30b_a3b"), 2, 2, EXPERT, id="qwen3_vl 30B-A3B EP2"),
    pytest.param(GEMMA3("27b"), 6, 2, TENSOR, id="gemma3 27B TP2"),
    pytest.param(GEMMA4("26b_a4b"), 6, 4, (*TENSOR, *EXPERT), id="gemma4 26B-A4B EP2 TP2"),
    pytest.param(GEMMA4("e2b"), 10, 2, PIPELINE, id="gemma4 E2B PP2"),
    pytest.param(MISTRAL3("mistral3_24b"), 2, 2, PIPELINE, id="mistral3 24B PP2"),
    full(QWEN3_VL("2b"), 2, 1, (), id="qwen3_vl 2B"),
    full(QWEN3_VL("2b"), 4, 2, PIPELINE, id="qwen3_vl 2B PP2"),
    full(QWEN3_VL("2b"), 4, 2, (*PIPELINE, "model.freeze=[language_model]"), id="qwen3_vl 2B PP2, towers train"),
    full(QWEN3_VL("2b"), 2, 2, (*TENSOR, "optimizer.name=muon"), id="qwen3_vl 2B TP2, Muon"),
    full(QWEN3_VL("2b"), 2, 2, CONTEXT, id="qwen3_vl 2B CP2"),
    full(QWEN3_VL("30b_a3b"), 2, 1, (), id="qwen3_vl 30B-A3B"),
    full(QWEN3_VL("30b_a3b"), 4, 2, PIPELINE, id="qwen3_vl 30B-A3B PP2"),
    full(QWEN3_VL("30b_a3b"), 2, 4, (*TENSOR, *EXPERT), id="qwen3_vl 30B-A3B EP2 TP2"),
    full(GEMMA3("4b"), 6, 1, (), id="gemma3 4B"),
    full(GEMMA3("4b"), 6, 2, PIPELINE, id="gemma3 4B PP2"),
    full(GEMMA3("4b"), 6, 2, CONTEXT, id="gemma3 4B CP2"),
    full(GEMMA4("e2b"), 10, 1, (), id="gemma4 E2B"),
    full(GEMMA4("e2b"), 10, 2, TENSOR, id="gemma4 E2B TP2"),
    full(GEMMA4("26b_a4b"), 6, 1, (), id="gemma4 26B-A4B"),
    full(GEMMA4("26b_a4b"), 6, 2, PIPELINE, id="gemma4 26B-A4B PP2"),
    full(GEMMA4("31b"), 6, 2, TENSOR, id="gemma4 31B TP2"),
    full(GEMMA4("31b"), 6, 2, PIPELINE, id="gemma4 31B PP2"),
    full(GEMMA4("12b"), 6, 1, (), id="gemma4 12B"),
    full(GEMMA4("12b"), 6, 2, TENSOR, id="gemma4 12B TP2"),
    full(MISTRAL3("ministral3_3b"), 2, 2, TENSOR, id="ministral3 3B TP2"),
]


@pytest.mark.parametrize(("hf_config", "num_layers", "world_size", "layout"), STEPS)
@pytest.mark.parametrize("recompute", ["full", pytest.param("none", marks=pytest.mark.full)])
def test_a_step_waits_only_where_it_is_known(
    hf_config: Any, num_layers: int, world_size: int, layout: tuple[str, ...], recompute: str
) -> None:
    """A step of the first and the last rank: images, audio, layers, loss, gradients, update."""
    is_pipeline = PIPELINE[0] in layout
    num_micro_batches = 1 if recompute == "full" else 2
    for rank in (0, world_size - 1) if is_pipeline else (0,):
        short = few_layers(hf_config, num_layers)
        with fake_rank(short, *layout, f"model.recompute={recompute}", world_size=world_size, rank=rank) as run:
            run.step(num_micro_batches)
            run.check_waits(num_micro_batches)
            for chunk in run.model:
                assert all(parameter.main_grad.is_cuda for parameter in chunk.parameters() if parameter.requires_grad)
        if layout == EXPERT:
            name = KNOWN_WAITS[0].name
            most = run.gpu.waits[name]
            run.gpu.waits[name] += 1
            with pytest.raises(DeviceFault, match=f"waits {most + 1} times for {name}, .* allowed {most} times"):
                run.check_waits(num_micro_batches)


@contextmanager
def small_model() -> Iterator[FakeRank]:
    """A rank with a single layer and no tower."""
    with fake_rank(few_layers(QWEN3_VL("2b"), 1), world_size=1, length=256, text_only=True) as run:
        yield run


def run_step(run: FakeRank) -> None:
    run_global_batch(run.model, [run.batch.to(CUDA, non_blocking=True)], run.groups)


def put_by_mask(x: torch.Tensor) -> None:
    x.detach().clone()[x > 0] = torch.ones(3, device=CUDA)


def of_backward(fault: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
    def hook(gradient: torch.Tensor) -> None:
        fault(gradient)

    return lambda x: x.register_hook(hook)


WAITS, COUNTS, MIXED = "waits for the device", "waits for values|waits to count", "is mixed"
FAULTS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "item": (lambda x: x.sum().item(), WAITS),
    "bool": (lambda x: bool(x.sum() > 0), WAITS),
    "tolist": (lambda x: x[0, 0].tolist(), WAITS),
    "cpu": (lambda x: x.cpu(), WAITS),
    "copy into the host's": (lambda x: torch.empty(x.shape, dtype=x.dtype).copy_(x.detach()), "waits for a copy"),
    "copy that nobody waits for": (lambda x: x.to("cpu", non_blocking=True), "nobody waits for"),
    "number to the device": (lambda x: torch.tensor(1.0, device=x.device), WAITS),
    "numbers to the device": (lambda x: torch.ones(3).to(x.device), WAITS),
    "copy from the host": (lambda x: x.detach()[0, 0].copy_(torch.ones(x.shape[-1])), "waits for a copy"),
    "numbers of the device in one tensor": (lambda x: torch.tensor([x.sum(), x.sum()]), WAITS),
    "mask": (lambda x: x[x > 0], COUNTS),
    "values by mask": (put_by_mask, COUNTS),
    "masked_select": (lambda x: x.masked_select(x > 0), COUNTS),
    "nonzero": (lambda x: x.nonzero(), COUNTS),
    "unique": (lambda x: torch.unique(x.detach()), COUNTS),
    "repeats": (lambda x: x[0, 0].repeat_interleave(x[0, 0].long()), COUNTS),
    "tensor of the host": (lambda x: x + torch.ones(x.shape[-1]), MIXED),
    "index of the host": (lambda x: x[torch.arange(2)], MIXED),
    "torch.where": (lambda x: torch.where(torch.ones(x.shape[-1]) > 0, x, x), MIXED),
    "synchronize": (lambda x: torch.cuda.synchronize(), WAITS),
    "event": (lambda x: torch.cuda.current_stream().record_event().synchronize(), WAITS),
    "platform": (lambda x: platform.current().synchronize(), WAITS),
    "item in the backward pass": (of_backward(lambda x: x.sum().item()), WAITS),
    "mask in the backward pass": (of_backward(lambda x: x[x > 0]), COUNTS),
    "tensor of the host in the backward pass": (of_backward(lambda x: x + torch.ones(x.shape[-1])), MIXED),
}


def test_faults_in_a_layer_are_found() -> None:
    """Planted before a layer, in the forward pass or the backward pass, each makes a step fail with its name."""

    def run_layer(layer: torch.nn.Module, run: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
        plants[-1](inputs[0])
        return run(*inputs)

    found, plants = {}, []
    with small_model() as small, layers_run_by(run_layer):
        for name, (plant, _) in FAULTS.items():
            plants.append(plant)
            try:
                run_step(small)
            except DeviceFault as fault:
                found[name] = str(fault)
    assert [name for name, (_, message) in FAULTS.items() if not re.search(message, found.get(name, ""))] == []


def fill_by_mask(x: torch.Tensor) -> None:
    x.detach().clone()[x > 0] = 0.0


HARMLESS: dict[str, Callable[[torch.Tensor], Any]] = {
    "number of the host": lambda x: x * torch.tensor(2.0),
    "fill by mask": fill_by_mask,
    "copy without waiting": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "the same device": lambda x: x.to(x.device).cuda(),
    "repeats of a known number": lambda x: x[0, 0].repeat_interleave(x[0, 0].long(), output_size=7),
    "item of the host": lambda x: torch.arange(3).sum().item(),
    "event that is recorded": lambda x: torch.cuda.current_stream().wait_event(torch.cuda.Event()),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_does_not_wait_is_let_through(name: str) -> None:
    """What looks like a fault, and is none on a GPU."""
    with fake_gpu() as gpu:
        HARMLESS[name](torch.ones(2, 3, 4, device=CUDA))
        assert not gpu.waits


def test_the_fault_names_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The innermost line of the project."""
    monkeypatch.setattr(mlp, "gated_halves", lambda gate_up, *_, **__: gate_up[gate_up > 0])
    place = r"aten.index.Tensor, called in megatron_vlm.layers.mlp line \d+ \(forward\)"
    with small_model() as small, pytest.raises(DeviceFault, match=place):
        run_step(small)


def test_a_layer_has_the_launches_of_its_operators() -> None:
    """By operator and direction, with the parts that belong to no layer apart; views and allocations are none.

    A dense layer: seven matmuls, two norms, rotation, attention, gate, and the last residual addition.
    """
    hf_config = few_layers(QWEN3_VL("2b"), 3)
    with fake_rank(hf_config, "model.recompute=full", world_size=1, length=256, text_only=True) as run:
        recorder = LaunchRecorder.of(run)
        with recorder, recorder.layers(run.layers):
            run_step(run)
    assert set(recorder.parts) == {0, 1, 2, REST}
    assert recorder.parts[1] == recorder.parts[2]
    forward, recompute = (recorder.parts[2][direction].launches for direction in ("forward", "recompute"))
    ours = ("rms_norm", "qk_norm_rope", "add_rms_norm", "gated")
    assert {name: forward[f"vlm_kernels::{name}"] for name in ours} == dict.fromkeys(ours, 1)
    assert forward["fake_gpu::flex_attention"] == 1
    # Recomputation ends when the last tensor that was kept is there, before the last residual addition.
    assert forward - recompute == {"aten::add": 1}
    assert recorder.parts[2]["backward"].launches["aten::zeros"] == 0  # as gradients of what has none
    text = run.model_config.text
    heads = 2 * text.layers[0].num_attention_heads + 2 * text.layers[0].num_key_value_heads
    matrices = text.hidden_size * (heads * text.layers[0].head_dim + 3 * hf_config.text_config.intermediate_size)
    assert recorder.parts[2]["forward"].moved_bytes > 2 * matrices
    assert recorder.parts[REST]["forward"].launches["vlm_kernels::vocabulary_statistics"] == 1
    assert recorder.kept_bytes[2] == 0  # its input is the output of the layer before


def test_kernels_are_counted_of_operators_that_exist() -> None:
    """A renamed operator would count as one launch."""
    ours = {name.removeprefix("vlm_kernels::") for name in KERNELS if name.startswith("vlm_kernels::")}
    assert ours <= {*library.operators()}


def test_the_process_is_as_before() -> None:
    """The CPU layer of megatron-core, the platform and torch's own classes."""

    def state() -> dict[str, Any]:
        modules = {name: module for name, module in sys.modules.items() if name.startswith("megatron.")}
        names = {
            f"{name}.{key}": module.__dict__.get(key) for name, module in modules.items() for key in ("torch", "dist")
        }
        own = {key: FakeTensor.__dict__.get(key) for key in ("is_cuda", "type", "tolist", "record_stream")}
        cuda = {key: getattr(torch.cuda, key) for key in ("Stream", "Event", "synchronize", "current_device")}
        return names | own | cuda | {"platform": platform.current(), "tensor": torch.tensor, "to": torch.Tensor.cuda}

    before = state()
    with fake_gpu():
        assert platform.current().device == CUDA
        assert state() != before
    assert state() == before
