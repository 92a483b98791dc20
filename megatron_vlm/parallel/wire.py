"""What pipeline stages send each other, packed into the one tensor that megatron-core's schedules send.

Besides the hidden states a stage may pass on sequences of the same shape (features that a later layer adds) and a few
numbers. Sender and receiver know from the model and the micro-batch what there is; nothing that no later stage reads is
sent. Gradients come back along the same tensor.

Shapes: S sequence (a shard of it under sequence parallelism), B batch, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad


@dataclass
class StageState:
    """What flows through the stages.

    Attributes:
        hidden: [S, B, H].
        sequences: each [S, B, H].
        numbers: [n] fp32, or None.
    """

    hidden: torch.Tensor
    sequences: list[torch.Tensor] = field(default_factory=list)
    numbers: torch.Tensor | None = None


def pack(state: StageState, received: torch.Tensor | None) -> torch.Tensor:
    """One tensor [rows, B, H] of its own memory: the schedule frees what was sent.

    Args:
        state: of this stage.
        received: what this stage got, which it must not send on as it is.
    """
    parts = [state.hidden, *state.sequences]
    if state.numbers is not None:
        batch, hidden = state.hidden.shape[1:]
        # Each as a rounded number and what the rounding left out; gradients pass through the first alone.
        rounded = state.numbers.to(state.hidden.dtype)
        rest = (state.numbers.detach() - rounded.detach().float()).to(state.hidden.dtype)
        numbers = torch.cat((rounded, rest))
        parts.append(pad(numbers, (0, -numbers.numel() % (batch * hidden))).view(-1, batch, hidden))
    if len(parts) > 1:
        return torch.cat(parts)
    is_own = state.hidden._base is None and state.hidden is not received
    return state.hidden if is_own else state.hidden.clone()


def unpack(wire: torch.Tensor, length: int, num_sequences: int, num_numbers: int) -> StageState:
    """The state of which `pack` made `wire`.

    Args:
        wire: [rows, B, H].
        length: S.
        num_sequences: of the state.
        num_numbers: of the state; 0 for None.
    """
    if not num_sequences and not num_numbers:
        return StageState(wire)
    end = (1 + num_sequences) * length
    hidden, *sequences = wire[:end].split(length)
    numbers = None
    if num_numbers:
        rounded, rest = wire[end:].flatten()[: 2 * num_numbers].float().chunk(2)
        numbers = rounded + rest
    return StageState(hidden, sequences, numbers)
