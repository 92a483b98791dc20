"""What pipeline stages send each other, packed into the one tensor that megatron-core's schedules send.

Besides the hidden states a stage may pass on tensors of any shape that later layers read (features that are added
there, keys and values that layers share) and a few scalars. Sender and receiver derive from the model and the
micro-batch what crosses a boundary; nothing that no later layer reads is sent. Gradients come back along the same
tensor.

Between the chunks of a vision tower, hidden states are those of patches.

Shapes: S sequence (a shard of it under sequence parallelism), B batch, P patches, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.nn.functional import pad


@dataclass(frozen=True)
class StageState:
    """The state that layers and stages pass on.

    Attributes:
        hidden: hidden states [S, B, H], or [P, H] in a vision tower.
        carried: tensors that earlier layers left for later ones, by name; of any shape, in the dtype of the hidden
            states.
        scalars: [n] fp32, or None.
    """

    hidden: torch.Tensor
    carried: Mapping[str, torch.Tensor] = field(default_factory=dict)
    scalars: torch.Tensor | None = None


@dataclass(frozen=True)
class Boundary:
    """The shapes of what one chunk sends to the next for one micro-batch.

    Attributes:
        hidden: shape of the hidden states [S, B, H], or [P, H] in a vision tower.
        carried: shapes of the carried tensors, by name, in the order in which they are sent.
        num_scalars: number of scalars; 0 where there are none.
    """

    hidden: tuple[int, ...]
    carried: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    num_scalars: int = 0

    @property
    def row(self) -> tuple[int, int]:
        """Shape of one row of the tensor that is sent: [B, H], or [1, H]; megatron-core sends three dimensions."""
        *rows, size = self.hidden[1:]
        return (rows[0] if rows else 1), size


def pack(state: StageState, boundary: Boundary, received: torch.Tensor | None) -> torch.Tensor:
    """Pack a state into one tensor [rows, B or 1, H] with memory of its own, because the schedule frees what was sent.

    Args:
        state: state of this stage; carried tensors that do not cross the boundary are left out.
        boundary: boundary to the next stage.
        received: tensor that this stage received, which it must not send on as it is.
    """
    row = prod(boundary.row)
    assert state.hidden.shape == boundary.hidden, f"{state.hidden.shape} to send, not {boundary.hidden}"
    parts = [state.hidden]
    for name, shape in boundary.carried.items():
        tensor = state.carried[name]
        assert tensor.shape == shape and tensor.dtype == state.hidden.dtype, f"{name}: {tensor.shape}, {tensor.dtype}"
        parts.append(_rows(tensor, row))
    if boundary.num_scalars:
        assert state.scalars is not None and state.scalars.shape == (boundary.num_scalars,)
        # Each scalar is sent as a rounded value and its rounding error; gradients pass through the former only.
        rounded = state.scalars.to(state.hidden.dtype)
        rest = (state.scalars.detach() - rounded.detach().float()).to(state.hidden.dtype)
        parts.append(_rows(torch.cat((rounded, rest)), row))
    if len(parts) > 1:
        return torch.cat([part.view(-1, *boundary.row) for part in parts])
    hidden = state.hidden if state.hidden.dim() == 3 else state.hidden.unsqueeze(1)
    is_own = hidden._base is None and hidden is not received
    return hidden if is_own else hidden.clone(memory_format=torch.contiguous_format)


def unpack(packed: torch.Tensor, boundary: Boundary) -> StageState:
    """Return the state that `pack` packed into a tensor, as views of it."""
    assert packed.shape == packed_shape(boundary), f"{packed.shape} received, not {packed_shape(boundary)}"
    if not boundary.carried and not boundary.num_scalars:
        return StageState(packed if packed.dim() == len(boundary.hidden) else packed.squeeze(1))
    row = prod(boundary.row)
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


class _ZeroGradient(torch.autograd.Function):
    """Passes a tensor on, and gives another one a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
        ctx.shape = received.shape
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient, gradient.new_zeros(ctx.shape)


def with_zero_gradient(tensor: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
    """Return a tensor through which what a stage received, and did not read, gets a gradient of zero.

    megatron-core's schedules send no gradient back where there is none, while the previous stage waits for one.
    """
    return _ZeroGradient.apply(tensor, received)


def _num_rows(num_elements: int, row: int) -> int:
    return -(-num_elements // row)


def _rows(tensor: torch.Tensor, row: int) -> torch.Tensor:
    """Flatten a tensor and pad it with zeros to a multiple of `row` elements."""
    flat = tensor.flatten()
    return pad(flat, (0, -flat.numel() % row)) if flat.numel() % row else flat


def packed_shape(boundary: Boundary) -> tuple[int, int, int]:
    """Return the shape of the tensor that `pack` makes."""
    rest = [prod(shape) for shape in boundary.carried.values()] + [2 * boundary.num_scalars]
    rows = sum(_num_rows(num_elements, prod(boundary.row)) for num_elements in rest)
    return boundary.hidden[0] + rows, *boundary.row
