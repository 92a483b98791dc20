"""Pipeline stages send what layers need and no shapes: the receiver knows them from the micro-batches."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.test_stage_state import gradients
from tests.ranks import run_ranks


class Messages(TorchDispatchMode):
    """Collects the shapes of what this rank sends and receives."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[str, list[tuple[int, ...]]] = {"send": [], "recv_": []}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func._schema.name.removeprefix("c10d::") in self.shapes:
            self.shapes[func._schema.name.removeprefix("c10d::")].append(tuple(args[0][0].shape))
        return func(*args, **(kwargs or {}))


def messages(pipeline: int, virtual: int, num_micro_batches: int) -> dict[str, list[tuple[int, ...]]]:
    with Messages() as found:
        gradients(pipeline, virtual, "none", num_micro_batches)
    return found.shapes


@pytest.mark.parametrize(("pipeline", "virtual"), [(2, 1), (3, 2)])
def test_one_message_per_micro_batch_and_boundary(pipeline: int, virtual: int) -> None:
    num_micro_batches, boundaries = 2 * pipeline, pipeline * virtual - 1
    ranks = run_ranks(pipeline, messages, pipeline, virtual, num_micro_batches)
    sent, received = (Counter(shape for rank in ranks for shape in rank[way]) for way in ("send", "recv_"))
    assert sent == received
    assert sum(sent.values()) == 2 * num_micro_batches * boundaries  # forward and backward
    assert len({length for length, *_ in sent}) >= 3, "micro-batches have lengths of their own"
