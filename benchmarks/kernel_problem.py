"""Cases of `benchmarks/kernels.py`: inputs, sides that compute one result from them, floors and targets."""

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
    """Device, dtype and size class with which a case is built."""

    device: torch.device
    dtype: torch.dtype
    is_tiny: bool

    def size(self, real: int, tiny: int) -> int:
        """Return the size that applies in this setting."""
        return tiny if self.is_tiny else real

    def randn(self, *shape: int) -> torch.Tensor:
        """Return a random leaf tensor that requires a gradient."""
        return torch.randn(shape, device=self.device, dtype=self.dtype).requires_grad_()


@dataclass(frozen=True)
class Floor:
    """Lower bound of a direction's time: bytes at the speed of a copy, plus FLOPs at the speed of a matmul."""

    num_bytes: float = 0.0
    num_operations: float = 0.0


@dataclass(frozen=True)
class Target:
    """A target: a fraction of the floor, a side's time over ours, or temporary memory.

    Attributes:
        direction: the direction that has to reach it.
        limit: the least fraction or ratio, or the most bytes.
        against: a side, "floor", "published" or "memory".
    """

    direction: Direction
    limit: float
    against: str


@dataclass
class Problem:
    """Inputs on a device, and the functions that are timed on them.

    Attributes:
        inputs: arguments of every side; those that require a gradient get one.
        sides: functions by name; each returns one tensor or several.
        floors: floors by direction, where the time of no side is the floor.
        into_main: index of the input whose gradient our side adds to its `main_grad`.
        label: the sizes, as they are printed.
    """

    inputs: list[torch.Tensor]
    sides: dict[str, Callable[..., Any]]
    floors: dict[str, Floor]
    label: str
    into_main: int | None = None

    def __post_init__(self) -> None:
        self.originals = [tensor.detach().clone() for tensor in self.inputs]

    def restore(self) -> None:
        """Restore the inputs' values: some of Liger's backward passes write over them."""
        with torch.no_grad():
            for tensor, original in zip(self.inputs, self.originals, strict=True):
                tensor.copy_(original)


@dataclass(frozen=True)
class Case:
    """An operator at one size.

    Attributes:
        operator: name of the operator's package in `vlm_kernels`.
        name: unique name of the case.
        build: builds the problem.
        targets: the targets that are judged.
        published: seconds that others published for an H200, by direction.
        floor_side: the side whose time is the floor.
        measures_memory: whether temporary memory is measured and printed.
    """

    operator: str
    name: str
    build: Callable[[Setting], Problem]
    targets: tuple[Target, ...] = ()
    published: dict[str, float] = field(default_factory=dict)
    floor_side: str | None = None
    measures_memory: bool = False


def of_floor(share: float, *more: Target) -> tuple[Target, ...]:
    """Targets of at least this fraction of the floor in both directions, and more."""
    return (Target("forward", share, "floor"), Target("backward", share, "floor"), *more)


def liger(name: str) -> Callable[..., Any]:
    """Return a function of Liger's that is imported when it is called: Liger is not a requirement."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module("liger_kernel.ops"), name).apply(*arguments)

    return call
