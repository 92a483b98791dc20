"""What pipeline stages send each other, packed into the one tensor that megatron-core's schedules send.

Besides the hidden states a stage may pass on tensors of any shape that later layers read (features that are added
there, keys and values that layers share) and a few scalars. Sender and receiver derive from the model and the
micro-batch what crosses a boundary; nothing that no later layer reads is sent. Gradients come back along the same
tensor.

Shapes: S sequence (a shard of it under sequence parallelism), B batch, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch.nn.functional import pad


@dataclass(frozen=True)
class StageState:
    """What flows through the layers and stages.

    Attributes:
        hidden: [S, B, H].
        carried: what earlier layers left for later ones, by name; of any shape, in the dtype of the hidden states.
        scalars: [n] fp32, or None.
    """

    hidden: torch.Tensor
    carried: Mapping[str, torch.Tensor] = field(default_factory=dict)
    scalars: torch.Tensor | None = None


@dataclass(frozen=True)
class Boundary:
    """What crosses from one chunk to the next for one micro-batch.

    Attributes:
        hidden: shape of the hidden states.
        carried: shapes of what is carried, by name, in the order in which it is sent.
        num_scalars: how many; 0 for None.
    """

    hidden: tuple[int, int, int]
    carried: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    num_scalars: int = 0


def pack(state: StageState, boundary: Boundary, received: torch.Tensor | None) -> torch.Tensor:
    """One tensor [rows, B, H] of its own memory: the schedule frees what was sent.

    Args:
        state: of this stage; what is carried and does not cross the boundary is left out.
        boundary: to the next stage.
        received: what this stage got, which it must not send on as it is.
    """
    row = prod(boundary.hidden[1:])
    parts = [state.hidden]
    for name, shape in boundary.carried.items():
        tensor = state.carried[name]
        assert tensor.shape == shape and tensor.dtype == state.hidden.dtype, f"{name}: {tensor.shape}, {tensor.dtype}"
        parts.append(_rows(tensor, row))
    if boundary.num_scalars:
        assert state.scalars is not None and state.scalars.shape == (boundary.num_scalars,)
        # Each as a rounded number and what the rounding left out; gradients pass through the first alone.
        rounded = state.scalars.to(state.hidden.dtype)
        rest = (state.scalars.detach() - rounded.detach().float()).to(state.hidden.dtype)
        parts.append(_rows(torch.cat((rounded, rest)), row))
    if len(parts) > 1:
        return torch.cat([part.view(-1, *boundary.hidden[1:]) for part in parts])
    is_own = state.hidden._base is None and state.hidden is not received
    return state.hidden if is_own else state.hidden.clone()


def unpack(packed: torch.Tensor, boundary: Boundary) -> StageState:
    """The state of which `pack` made a tensor, as views of it."""
    if not boundary.carried and not boundary.num_scalars:
        return StageState(packed)
    row = prod(boundary.hidden[1:])
    shapes = {"": boundary.hidden, **boundary.carried}
    end = sum(_num_rows(prod(shape), row) for shape in shapes.values())
    pieces = packed[:end].split([_num_rows(prod(shape), row) for shape in shapes.values()])
    hidden, *carried = (
        piece.flatten()[: prod(shape)].view(shape) for piece, shape in zip(pieces, shapes.values(), strict=True)
    )
    scalars = None
    if boundary.num_scalars:
        rounded, rest = packed[end:].flatten()[: 2 * boundary.num_scalars].float().chunk(2)
        scalars = rounded + rest
    return StageState(hidden, dict(zip(boundary.carried, carried, strict=True)), scalars)


def _num_rows(num_elements: int, row: int) -> int:
    return -(-num_elements // row)


def _rows(tensor: torch.Tensor, row: int) -> torch.Tensor:
    """All elements in whole rows, zeros at the end."""
    flat = tensor.flatten()
    return pad(flat, (0, -flat.numel() % row)) if flat.numel() % row else flat


def packed_shape(boundary: Boundary) -> tuple[int, int, int]:
    """Shape of the tensor that `pack` makes."""
    rest = [prod(shape) for shape in boundary.carried.values()] + [2 * boundary.num_scalars]
    rows = sum(_num_rows(num_elements, prod(boundary.hidden[1:])) for num_elements in rest)
    return boundary.hidden[0] + rows, *boundary.hidden[1:]
