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
    """Return the output of a layer; with `recompute`, a layer in training mode keeps only its inputs."""
    # No model draws random numbers (tests/test_recompute.py), so no generator's state is kept.
    kept = partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False)
    run = kept if recompute and layer.training else layer
    return _runners[-1](layer, run, inputs) if _runners else run(*inputs)


@contextmanager
def layers_run_by(runner: LayerRunner) -> Iterator[None]:
    """Let `runner` decide how `run_layer` runs layers, such as a trace that runs each kind of layer once."""
    _runners.append(runner)
    try:
        yield
    finally:
        _runners.pop()
