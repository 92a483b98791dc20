"""What a case of `benchmarks/kernels.py` is: inputs, sides that compute one result from them, floors and targets."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Tensors = Sequence[torch.Tensor]
Direction = Literal["forward", "backward", "both"]
OURS, TORCH, COMPILED, LIGER, FLEX, PRODUCTS = "ours", "torch", "compiled", "liger", "flex", "products"
TOKENS = 8192
GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """Where and how large a case is built."""

    device: torch.device
    dtype: torch.dtype
    is_tiny: bool

    def size(self, real: int, tiny: int) -> int:
        """The one that applies."""
        return tiny if self.is_tiny else real

    def randn(self, *shape: int) -> torch.Tensor:
        """A leaf with a gradient."""
        return torch.randn(shape, device=self.device, dtype=self.dtype).requires_grad_()


@dataclass(frozen=True)
class Floor:
    """What a direction cannot go below: bytes at the copy's speed, or operations at the matrix product's."""

    num_bytes: float = 0.0
    num_operations: float = 0.0


@dataclass(frozen=True)
class Target:
    """What is to be reached: a share of the floor, a side's time over ours, or temporary memory.

    Attributes:
        direction: of which.
        limit: least share or ratio, or most bytes.
        against: a side, "floor", "published" or "memory".
    """

    direction: Direction
    limit: float
    against: str


@dataclass
class Problem:
    """Inputs on a device, and what is done with them.

    Attributes:
        inputs: given to every side; those that require a gradient get one.
        sides: by name; each gives a tensor or several.
        floors: by direction, where the time of no side is the floor.
        into_main: position of the input whose gradient our side adds to its `main_grad`.
        label: sizes.
    """

    inputs: list[torch.Tensor]
    sides: dict[str, Callable[..., Any]]
    floors: dict[str, Floor]
    label: str
    into_main: int | None = None

    def __post_init__(self) -> None:
        self.originals = [tensor.detach().clone() for tensor in self.inputs]

    def restore(self) -> None:
        """Give the inputs their values again: some of Liger's backward passes write over them."""
        with torch.no_grad():
            for tensor, original in zip(self.inputs, self.originals, strict=True):
                tensor.copy_(original)


@dataclass(frozen=True)
class Case:
    """An operator at one size.

    Attributes:
        operator: its package.
        name: unique.
        build: makes the problem.
        targets: what issue 5 asks for.
        published: others' seconds by direction, on an H200.
        floor_side: side whose time is the floor.
        measures_memory: whether temporary memory is printed.
    """

    operator: str
    name: str
    build: Callable[[Setting], Problem]
    targets: tuple[Target, ...] = ()
    published: dict[str, float] = field(default_factory=dict)
    floor_side: str | None = None
    measures_memory: bool = False


def of_floor(share: float, *more: Target) -> tuple[Target, ...]:
    """At least this share of the floor in both directions."""
    return (Target("forward", share, "floor"), Target("backward", share, "floor"), *more)


def liger(name: str) -> Callable[..., Any]:
    """A function of Liger's, imported when it is called: it is no requirement."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module("liger_kernel.ops"), name).apply(*arguments)

    return call
