"""Activations that are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

LayerRunner = Callable[[torch.nn.Module, Callable[..., Any], tuple[Any, ...]], Any]
"""A function of a layer, the function that runs it, and its inputs, which returns the layer's output."""
_runners: list[LayerRunner] = []


def run_layer(layer: torch.nn.Module, *inputs: Any, recompute: bool) -> Any:
    """Return the output of a layer; with `recompute`, a layer in training mode keeps only its inputs and decisions."""
    run: Callable[..., Any] = layer
    if recompute and layer.training:
        assert not _active, "the inner layer would decide again when the outer one is recomputed"
        # No model draws random numbers (tests/test_recompute.py), so no generator's state is kept.
        run = partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False, context_fn=_passes)
    return _runners[-1](layer, run, inputs) if _runners else run(*inputs)


@contextmanager
def layers_run_by(runner: LayerRunner) -> Iterator[None]:
    """Let `runner` decide how `run_layer` runs layers, such as a trace that runs each kind of layer once."""
    _runners.append(runner)
    try:
        yield
    finally:
        _runners.pop()


def decided[Value](decide: Callable[[], Value]) -> Value:
    """Return `decide()`, or, while a layer is recomputed, what it returned in the layer's first pass.

    For what must not differ between the two passes though it is computed from values that may differ in their last
    bits, such as a choice of experts: sums over ranks and atomic additions need not repeat. The value is kept until the
    backward pass of the layer, and must have no gradient. A layer decides equally often, in the same order, each time.
    """
    return _active[-1].decided(decide) if _active else decide()


class _Pass:
    """A context in which a layer runs: the first time it decides, later it repeats the decisions in their order."""

    def __init__(self, decisions: list[Any], is_first: bool) -> None:
        self._decisions, self._is_first, self._next = decisions, is_first, 0

    def __enter__(self) -> None:
        self._next = 0  # a graph that was retained is recomputed again
        _active.append(self)

    def __exit__(self, *_: object) -> None:
        _active.pop()

    def decided(self, decide: Callable[[], Any]) -> Any:
        if self._is_first:
            self._decisions.append(decide())
            return self._decisions[-1]
        self._next += 1
        return self._decisions[self._next - 1]


_active: list[_Pass] = []
"""Passes that are running: autograd recomputes in a thread of its own, while the thread that called it waits."""


def _passes() -> tuple[_Pass, _Pass]:
    """Return the contexts of one call of a layer: of its first pass, and of its recomputation."""
    decisions: list[Any] = []
    return _Pass(decisions, is_first=True), _Pass(decisions, is_first=False)
