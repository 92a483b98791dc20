"""Counts what a pipeline chunk keeps, computes, launches and sends, by running its own code on tensors without memory.

Floating-point tensors have shapes and no values. Tensors of integers (token ids, spans, choices of experts) are real,
so that visible keys and the sizes of exchanges are those of the batch. Every distinct layer runs once, forward and
backward; at its other positions a stand-in has its outputs and adds what was counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlm import platform
from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.layers.moe import MoE
from megatron_vlm.layers.recompute import layers_run_by
from megatron_vlm.layers.side_by_side import lay_side_by_side
from megatron_vlm.model.model_chunk import ModelChunk
from megatron_vlm.parallel.stage_state import Boundary, packed_shape
from megatron_vlm.planning.recorder import Counts, Recorder

_GROUPS = {"tp": "tensor", "cp": "context", "ep": "expert", "expt_tp": "expert-tensor", "tp_ep": "experts"}
"""Names of the groups that a chunk communicates in; two that are the same group have the first name."""


@dataclass(frozen=True)
class ChunkCounts:
    """What a micro-batch does on a chunk.

    Attributes:
        total: counts of the full chunk.
        layers: counts of its decoder layers, by global id.
        head: counts of the final norm, the head and the loss; None on all chunks but the last.
        received: what the chunk receives from the previous one; None on the first.
        received_bytes: its size, with what pads it; the chunk keeps it.
        returned_bytes: size of what the chunk sends to the next one, and does not keep.
    """

    total: Counts
    layers: Mapping[int, Counts]
    head: Counts | None
    received: Boundary | None
    received_bytes: int
    returned_bytes: int

    @property
    def kept_bytes(self) -> int:
        """Memory between the forward and the backward pass."""
        return self.total.kept_bytes + self.received_bytes


class Tracer:
    """Traces chunks of one model, layout and batch; counts of a distinct layer are kept for the next chunk."""

    def __init__(self) -> None:
        self._counted: dict[Any, tuple[Counts, Any]] = {}
        self._recorder: Recorder | None = None
        self._group_names: dict[str, str] = {}

    def trace(self, chunk: ModelChunk, batch: MicroBatch) -> ChunkCounts:
        """Run a chunk as training does; call it inside `fake_tensors`, where the chunk was built.

        Args:
            chunk: the chunk, whose parameters require gradients where they train.
            batch: the micro-batch, on the device of the chunk.
        """
        self._group_names = group_names(chunk.groups)
        language_model = chunk.language_model
        ids = {layer: int(name) for name, layer in language_model.layers.items()}
        layers: dict[int, Counts] = {}
        heads: list[Counts] = []
        boundary, received = None, []

        def run_layer(layer: torch.nn.Module, run: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
            counts, outputs = self._once(_signature(layer), run, inputs)
            if layer in ids:
                layers[ids[layer]] = counts
            return outputs

        def losses(*inputs: Any) -> Any:
            counts, outputs = self._once("head", type(language_model).losses.__get__(language_model), inputs)
            heads.append(counts)
            return outputs

        with _as_in_training(chunk), layers_run_by(run_layer):
            language_model.losses = losses  # type: ignore[method-assign,assignment]
            if not chunk.pre_process:
                boundary = chunk.boundary_before(batch)
                shape = torch.Size(packed_shape(boundary))
                received.append(_Shape(shape, chunk.config.params_dtype, batch.labels.device, True))
                chunk.set_input_tensor(received[0].make())
            total, outputs = self._count(chunk.train(), (batch,))
        returned = [] if chunk.post_process else leaves(outputs, _Shape)
        received_bytes, returned_bytes = (sum(shape.num_bytes for shape in shapes) for shapes in (received, returned))
        return ChunkCounts(total, layers, heads[0] if heads else None, boundary, received_bytes, returned_bytes)

    def _count(self, run: Callable[..., Any], inputs: tuple[Any, ...]) -> tuple[Counts, Any]:
        """Return the counts of a forward and backward pass, and the outputs with a shape for every tensor."""
        outer, self._recorder = self._recorder, Recorder(self._group_names)
        recorder, counts = self._recorder, self._recorder.counts
        with recorder:
            outputs = run(*inputs)
            tensors = leaves(outputs, torch.Tensor)
            counts.kept_bytes = recorder.live_bytes - recorder.bytes_of(tensors)
            counts.forward_peak_bytes, recorder.peak_bytes = recorder.peak_bytes, 0
            shapes = mapped(outputs, torch.Tensor, _Shape.of)
            trained = [tensor for tensor in tensors if tensor.requires_grad]
            rest = _Rest.apply(*trained) if trained else None
            del outputs, tensors, trained  # what follows holds them no longer than it needs them
            if rest is not None:
                rest.backward()
            counts.backward_peak_bytes = recorder.peak_bytes
        self._recorder = outer
        return counts, shapes

    def _once(self, key: Any, run: Callable[..., Any], inputs: tuple[Any, ...]) -> tuple[Counts, Any]:
        """Run a part of the model if it is the first of its kind; return its counts and the outputs of a stand-in."""
        recorder = self._recorder
        assert recorder is not None
        differentiable = [value for value in inputs if _is_differentiable(value)]
        key = (key, *map(_Shape.of, differentiable), *map(_values, leaves(inputs, torch.Tensor)))
        if key not in self._counted:
            with recorder.paused():
                first, _ = self._count(run, _own(inputs))
                self._counted[key] = self._count(run, _own(inputs))
            # The first layer of a kind makes tables that serve the others too (`Spans`).
            counts, _ = self._counted[key]
            recorder.counts.add_work(first.without([counts]))
            recorder.grow(first.kept_bytes - counts.kept_bytes)
        counts, shapes = self._counted[key]
        recorder.counts.add_work(counts)
        outputs = iter(_StandIn.of(recorder, counts, leaves(shapes, _Shape), inputs, differentiable))
        return counts, mapped(shapes, _Shape, lambda _: next(outputs))


def _own(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return inputs of a part that is run alone, whose gradients go no further."""
    return tuple(_Shape.of(value).make() if _is_differentiable(value) else value for value in inputs)


def group_names(groups: ProcessGroupCollection) -> dict[str, str]:
    """Return our names of the groups that a chunk communicates in, by torch's."""
    return {getattr(groups, key).group_name: name for key, name in reversed(_GROUPS.items())}


def _is_differentiable(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _values(tensor: torch.Tensor) -> Hashable:
    """Return the shape and values of a tensor of integers, on which the work may depend."""
    return None if tensor.is_floating_point() else (tensor.shape, tensor.numpy(force=True).tobytes())


@dataclass(frozen=True)
class _Shape:
    """The properties that are kept of a tensor after it has been counted."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @staticmethod
    def of(tensor: torch.Tensor) -> _Shape:
        return _Shape(tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad)

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def make(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device, requires_grad=self.requires_grad)


class _StandIn(torch.autograd.Function):
    """Stands for a part of the model that has been counted: has its outputs, and its memory between the two passes."""

    @staticmethod
    def of(
        recorder: Recorder, counts: Counts, shapes: list[_Shape], inputs: Any, differentiable: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Return the stand-in's outputs.

        Args:
            recorder: the recorder of what surrounds the part.
            counts: the part's counts.
            shapes: shapes of the outputs.
            inputs: all inputs; a part that trains holds them until its backward pass.
            differentiable: the inputs that may have gradients.
        """
        # Parameters may require gradients where no input does.
        anchor = torch.zeros((), requires_grad=any(shape.requires_grad for shape in shapes))
        outputs: tuple[torch.Tensor, ...] = _StandIn.apply(recorder, counts, shapes, inputs, anchor, *differentiable)
        return outputs

    @staticmethod
    def forward(
        ctx: Any,
        recorder: Recorder,
        counts: Counts,
        shapes: list[_Shape],
        inputs: Any,
        anchor: torch.Tensor,
        *differentiable: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.recorder, ctx.counts, ctx.inputs = recorder, counts, inputs
        ctx.shapes = [dataclasses.replace(_Shape.of(tensor), requires_grad=False) for tensor in differentiable]
        recorder.grow(counts.kept_bytes, counts.forward_peak_bytes)
        outputs = tuple(dataclasses.replace(shape, requires_grad=False).make() for shape in shapes)
        pairs = zip(outputs, shapes, strict=True)
        ctx.mark_non_differentiable(*(output for output, shape in pairs if not shape.requires_grad))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        recorder, counts = ctx.recorder, ctx.counts
        recorder.grow(-counts.kept_bytes)
        # The part's own count has the gradients of its outputs too (`_Rest`).
        recorder.grow(0, counts.backward_peak_bytes - recorder.bytes_of(gradients))
        ctx.inputs = None  # the part's first operators read them last
        needed = zip(ctx.shapes, ctx.needs_input_grad[5:], strict=True)
        return *[None] * 5, *(shape.make() if is_needed else None for shape, is_needed in needed)


class _Rest(torch.autograd.Function):
    """Stands for what follows: takes outputs, and returns gradients for them that nobody else holds."""

    @staticmethod
    def forward(ctx: Any, *outputs: torch.Tensor) -> torch.Tensor:
        ctx.shapes = [dataclasses.replace(_Shape.of(output), requires_grad=False) for output in outputs]
        return outputs[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(shape.make() for shape in ctx.shapes)


@contextmanager
def _as_in_training(chunk: ModelChunk) -> Iterator[None]:
    """Give parameters the gradients that data parallelism holds, and experts equally many tokens."""
    lay_side_by_side(chunk)
    with ExitStack() as undo:
        for parameter, main_gradient in _main_gradients(chunk):
            parameter.main_grad = main_gradient
            parameter.grad_added_to_main_grad = False
            undo.callback(parameter.register_post_accumulate_grad_hook(_add_to_main_gradient).remove)
        for module in chunk.modules():
            if isinstance(module, MoE):
                undo.callback(module.gate.register_forward_hook(partial(_choose_evenly, module.top_k)).remove)
        # megatron-core's buffers would outlive the trace.
        name = "_GLOBAL_MEMORY_BUFFER"
        undo.callback(setattr, parallel_state, name, getattr(parallel_state, name))
        setattr(parallel_state, name, _NewMemory())
        yield


def _main_gradients(chunk: torch.nn.Module) -> Iterator[tuple[Any, torch.Tensor]]:
    """Yield the parameters that train, with gradients in one buffer, in which megatron-core has them in reverse."""
    parameters = [parameter for parameter in chunk.parameters() if parameter.requires_grad][::-1]
    if not parameters:
        return
    sizes = [parameter.numel() for parameter in parameters]
    buffer = torch.empty(sum(sizes), dtype=torch.float32, device=parameters[0].device)
    for parameter, part in zip(parameters, buffer.split(sizes), strict=True):
        yield parameter, part.view(parameter.shape)


class _NewMemory:
    """Stands for megatron-core's `GlobalMemoryBuffer`, without keeping anything."""

    def get_tensor(self, tensor_shape: Any, dtype: torch.dtype, name: str) -> torch.Tensor:
        return torch.empty(tensor_shape, dtype=dtype, device=platform.current().device)


def _add_to_main_gradient(parameter: torch.Tensor) -> None:
    """Accumulate as the hook of megatron-core's `DistributedDataParallel` does."""
    if not parameter.grad_added_to_main_grad:  # type: ignore[attr-defined]
        parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
    parameter.grad = None


def _choose_evenly(top_k: int, router: torch.nn.Module, inputs: Any, output: Any) -> Any:
    """Give a router's choice real values: each token takes the experts that follow those of the token before."""
    weights, chosen, routing = output
    (num_tokens, num_experts), device = chosen.shape, chosen.device
    choices = torch.arange(num_tokens * top_k, device=device).view(num_tokens, top_k) % num_experts
    even = torch.zeros(num_tokens, num_experts, dtype=torch.bool, device=device).scatter_(1, choices, True)
    return weights, even, routing


def _signature(module: torch.nn.Module) -> Any:
    """Return what layers that do the same have in common: classes, settings and parameters."""
    parts = [
        (name, type(part), *((key, value) for key, value in vars(part).items() if _is_setting(value)))
        for name, part in module.named_modules()
    ]
    parameters = [(name, _Shape.of(parameter)) for name, parameter in module.named_parameters()]
    return (*parts, *parameters)


def _is_setting(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_setting, value))
    is_config = dataclasses.is_dataclass(value) and isinstance(value, Hashable)  # frozen
    return is_config or value is None or isinstance(value, bool | int | float | str)


def mapped(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Return `value` with everything of a kind replaced, inside tuples, lists and dataclasses."""
    if isinstance(value, kind):
        return function(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {entry.name: mapped(getattr(value, entry.name), kind, function) for entry in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, tuple | list):
        return type(value)(mapped(item, kind, function) for item in value)
    return value


def leaves(value: Any, kind: type) -> list[Any]:
    """Return everything of a kind in `value`, inside tuples, lists and dataclasses."""
    if isinstance(value, kind):
        return [value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, entry.name) for entry in dataclasses.fields(value)]
    return [leaf for item in value for leaf in leaves(item, kind)] if isinstance(value, tuple | list) else []
