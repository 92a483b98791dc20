"""Counts of launches, bytes, collectives and waits on the fake GPU, by layer and direction."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_vlm.layers.recompute import layers_run_by
from megatron_vlm.planning.recorder import Recorder, moved_bytes
from megatron_vlm.planning.trace import group_names, leaves, mapped
from tests.fake_gpu.step import FakeRank


@dataclass
class Work:
    """What is done in one direction.

    Attributes:
        launches: kernels and copies that are started, by operator.
        moved_bytes: bytes that they read and write, each tensor once.
        collectives: exchanges with other ranks, by kind and group.
        sent_bytes: what the rank sends in them.
        waits: how often the host waits for the device, by name.
    """

    launches: Counter[str] = field(default_factory=Counter)
    moved_bytes: int = 0
    collectives: Counter[str] = field(default_factory=Counter)
    sent_bytes: int = 0
    waits: Counter[str] = field(default_factory=Counter)


Directions = defaultdict[str, Work]
REST = "rest"
"""What belongs to no decoder layer."""


class LaunchRecorder(Recorder):
    """Adds up what a step does, by decoder layer (its global id, or `REST`) and direction.

    A launch is an operator that computes or copies something on the device, but for ours, which count as the kernels
    that they launch. Views, allocations and what the host does alone are none.
    """

    def __init__(self, group_names: Mapping[str, str]) -> None:
        super().__init__(group_names)
        self.parts: defaultdict[Any, Directions] = defaultdict(lambda: defaultdict(Work))
        self.kept_bytes: Counter[Any] = Counter()
        self.part: Any = REST

    @classmethod
    def of(cls, run: FakeRank) -> LaunchRecorder:
        """Return a recorder of what a rank does and of its waits."""
        recorder = cls(group_names(run.groups))
        run.gpu.on_wait = recorder.add_wait
        return recorder

    @property
    def work(self) -> Work:
        """What is being added to."""
        return self.parts[self.part][self.phase]

    def add_wait(self, name: str) -> None:
        """Note that the host waited."""
        self.work.waits[name] += 1

    def _add_operation(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        is_view = torch.Tag.inplace_view in func.tags
        if is_view or not any(tensor.is_cuda for tensor in leaves((output, *args), torch.Tensor)):
            return
        name = func._schema.name
        self.work.launches[name] += KERNELS.get(name, lambda _: 1)(output)
        self.work.moved_bytes += moved_bytes(name, (args, kwargs), output)

    def _add_collective(self, func: Any, args: Any) -> None:
        before = self.counts.collectives.copy()
        super()._add_collective(func, args)
        for collective, times in (self.counts.collectives - before).items():
            self.work.collectives[f"{collective.kind} of {collective.group}"] += times
            self.work.sent_bytes += collective.sent_bytes * times

    @contextmanager
    def layers(self, ids: Mapping[torch.nn.Module, Any]) -> Iterator[None]:
        """Tell these layers, wherever `run_layer` runs them, from the rest."""

        def run_layer(layer: torch.nn.Module, run: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
            if layer not in ids:
                return run(*inputs)
            outer, live_bytes = self.part, self.live_bytes
            inputs = _mark(inputs, self, ids[layer], outer)
            outputs = run(*inputs)
            self.kept_bytes[ids[layer]] += self.live_bytes - live_bytes - self.bytes_of(leaves(outputs, torch.Tensor))
            return _mark(outputs, self, outer, ids[layer])

        with layers_run_by(run_layer):
            yield


def _mark(value: Any, recorder: LaunchRecorder, part: Any, part_in_backward: Any) -> Any:
    """Let the recorder add to another part from here on, and in the backward pass when it comes back here."""
    recorder.part = part

    def marked(tensor: torch.Tensor) -> Any:
        return _Mark.apply(tensor, recorder, part_in_backward) if tensor.requires_grad else tensor

    return mapped(value, torch.Tensor, marked)


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, recorder: LaunchRecorder, part: Any) -> torch.Tensor:
        ctx.recorder, ctx.part = recorder, part
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.recorder.part = ctx.part
        return gradient, None, None


def _with_sums(output: Any) -> int:
    """Count a backward kernel and, for each gradient of a weight, one that adds up partial sums."""
    return 1 + any(tensor.numel() for tensor in output[1:])


# What our operators launch, by their `.cu` and Triton files, FlexAttention's backward pass, and the two steps in which
# torch makes the gradient of what a part was taken from: zeros, and a copy into them.
KERNELS: dict[str, Callable[[Any], int]] = {
    "vlm_kernels::expert_permutation": lambda _: 2,
    "vlm_kernels::route": lambda _: 2,
    "vlm_kernels::rms_norm_backward": _with_sums,
    "vlm_kernels::rms_norm_add_rms_norm_backward": lambda output: _with_sums(output[1:]),
    "vlm_kernels::qk_norm_rope_backward": lambda output: 1 + sum(tensor.numel() > 0 for tensor in output[2:]),
    "vlm_kernels::span_attention_backward": lambda _: 3,
    "fake_gpu::flex_attention_backward": lambda _: 2,
    "aten::slice_backward": lambda _: 2,
    "aten::select_backward": lambda _: 2,
}
