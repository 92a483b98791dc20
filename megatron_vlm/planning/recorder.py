"""Records what operators do to tensors without memory: FLOPs, launches, bytes sent, and bytes alive.

Source: storages are followed as in `torch.distributed._tools.mem_tracker`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def _product_flops(rows: torch.Tensor, weights: torch.Tensor) -> int:
    """Count two FLOPs per multiply-add, and none for products with vectors: sums are written as such."""
    return 0 if 1 in (*rows.shape, *weights.shape) else 2 * rows.numel() * weights.shape[-1]


def _attention_flops(q: torch.Tensor, k: torch.Tensor, num_products: int) -> int:
    return 2 * num_products * q.numel() * k.shape[-2]


_aten = torch.ops.aten
# What torch does not count, or counts otherwise.
_FLOP_FORMULAS: dict[Any, Callable[..., int]] = {
    _aten.mm: lambda rows, weights, *_, **__: _product_flops(rows, weights),
    _aten.addmm: lambda _, rows, weights, *__, **___: _product_flops(rows, weights),
    _aten.addmm_: lambda _, rows, weights, **__: _product_flops(rows, weights),
    # However many rows each expert gets, together they are all rows; a rank may hold a single expert.
    _aten._grouped_mm: lambda rows, weights, *_, **__: 2 * rows.numel() * weights.shape[-1],
    # A fused backward pass computes the scores again: five matmuls for the forward pass's two.
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: _attention_flops(q, k, 2),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, q, k, *__, **___: _attention_flops(q, k, 5),
}


class Operation(NamedTuple):
    """What one operator does on a device.

    Attributes:
        phase: "forward", "backward" or "recompute".
        kind: "matmul", "attention", or "other", which has no matmul.
        flops: FLOPs of its matmuls.
        moved_bytes: bytes that it reads and writes, each tensor once.
    """

    phase: str
    kind: str
    flops: int
    moved_bytes: int


class Collective(NamedTuple):
    """One exchange of a rank with the others of a group.

    Attributes:
        phase: "forward", "backward", "recompute", or "step" for what is exchanged once per step.
        kind: "allreduce", "allgather", "reduce_scatter", "alltoall" and the like.
        group: our name of the group.
        size: number of its ranks, at least two.
        payload_bytes: bytes of its input or output on this rank, whichever is more.
        kept_bytes: what of an all-to-all's payload the rank sends to itself; None where all parts are equal. A context
            rank keeps all of its own keys, and sends others few of them where windows and documents are short.
    """

    phase: str
    kind: str
    group: str
    size: int
    payload_bytes: int
    kept_bytes: int | None = None

    @property
    def sent_bytes(self) -> int:
        """What the rank sends in a ring: of an all-reduce its tensor twice, of others once, each less one shard."""
        if self.kept_bytes is not None:
            return self.payload_bytes - self.kept_bytes
        return self.payload_bytes * (self.size - 1) // self.size * (2 if self.kind == "allreduce" else 1)


@dataclass
class Counts:
    """What a forward and backward pass does on one rank.

    Attributes:
        kept_bytes: memory that the forward pass leaves to the backward pass, outputs not included.
        forward_peak_bytes: most memory in the forward pass.
        backward_peak_bytes: most memory in the backward pass, what is kept included.
        operations: operators that compute something, and how often each ran.
        collectives: exchanges with other ranks, and how often each was made.
    """

    kept_bytes: int = 0
    forward_peak_bytes: int = 0
    backward_peak_bytes: int = 0
    operations: Counter[Operation] = field(default_factory=Counter)
    collectives: Counter[Collective] = field(default_factory=Counter)

    @property
    def working_bytes(self) -> int:
        """Most memory beyond `kept_bytes`."""
        return max(self.forward_peak_bytes, self.backward_peak_bytes) - self.kept_bytes

    @property
    def flops(self) -> Counter[str]:
        """FLOPs of matmuls, by phase."""
        return self._flops({"matmul", "attention"})

    @property
    def attention_flops(self) -> Counter[str]:
        """The part of `flops` that attention has."""
        return self._flops({"attention"})

    def _flops(self, kinds: set[str]) -> Counter[str]:
        flops: Counter[str] = Counter()
        for operation, times in self.operations.items():
            if operation.flops and operation.kind in kinds:
                flops[operation.phase] += operation.flops * times
        return flops

    @property
    def launches(self) -> Counter[str]:
        """Operators that compute something, by phase."""
        launches: Counter[str] = Counter()
        for operation, times in self.operations.items():
            launches[operation.phase] += times
        return launches

    @property
    def sent_bytes(self) -> Counter[tuple[str, str]]:
        """Bytes that the rank sends, by kind of collective and group."""
        sent: Counter[tuple[str, str]] = Counter()
        for collective, times in self.collectives.items():
            sent[collective.kind, collective.group] += collective.sent_bytes * times
        return sent

    def add_work(self, other: Counts) -> None:
        """Add all counts but those of memory."""
        self.operations.update(other.operations)
        self.collectives.update(other.collectives)

    def without(self, others: Iterable[Counts]) -> Counts:
        """Return the work of these counts that is not that of parts of them; memory is left out."""
        rest = Counts(operations=self.operations.copy(), collectives=self.collectives.copy())
        for other in others:
            rest.operations.subtract(other.operations)
            rest.collectives.subtract(other.collectives)
        rest.operations, rest.collectives = +rest.operations, +rest.collectives
        return rest


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Give new floating-point tensors a shape and no memory; integer tensors stay real."""
    with FakeTensorMode(allow_non_fake_inputs=True), _RealIntegers():
        yield


class _RealIntegers(TorchDispatchMode):
    """Computes with values where all tensors have values, and creates integer tensors with values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(tensors_among((args, kwargs)))
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            run = _selected if func is _aten.masked_select.default else SHAPES.get(func, func)
            return run(*args, **kwargs)
        if not tensors and not _makes_integers(func, args, kwargs):
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def _selected(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with unset_fake_temporarily():
        num_selected = int(mask.sum())
    return values.new_empty(num_selected)


def _grouped_product(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor, *_: Any) -> torch.Tensor:
    groups = ends.shape if weights.dim() == 2 else ()
    return rows.new_empty((*groups, rows.shape[0], weights.shape[-1]))


_JOINED = {
    torch.ops.c10d.allreduce_coalesced_: "allreduce",
    torch.ops.c10d.allgather_into_tensor_coalesced_: "allgather",
    torch.ops.c10d.reduce_scatter_tensor_coalesced_: "reduce_scatter",
}
# Results that have a shape, which torch does not know (before 2.15: of products in fp32, or into another dtype).
# The work of collectives that megatron-core's data parallelism joins is finished at once.
SHAPES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((operator.default for operator in _JOINED), lambda *_, **__: FakeWork().boxed()),
    _aten._grouped_mm.default: _grouped_product,
    _aten.addmm.dtype_out: lambda *_, out, **__: out,
}


def _makes_integers(func: Any, args: Any, kwargs: Any) -> bool:
    if kwargs.get("dtype") is not None:
        return not kwargs["dtype"].is_floating_point
    return func._schema.name == "aten::arange" and all(isinstance(number, int) for number in args)


class Recorder(TorchDispatchMode):
    """Counts operators while it is on, and follows the memory that they make.

    Args:
        group_names: our names of process groups, by torch's names.
    """

    def __init__(self, group_names: Mapping[str, str]) -> None:
        super().__init__()
        self.counts = Counts()
        self.live_bytes = self.peak_bytes = 0
        self._group_names = group_names
        self._is_paused = False
        self._bytes: dict[int, int] = {}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing inside."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def bytes_of(self, tensors: Iterable[torch.Tensor]) -> int:
        """Return the memory of tensors, as far as it was allocated while the recorder was on."""
        return sum(self._bytes.get(key, 0) for key in _storages(tensors))

    def grow(self, num_bytes: int, peak_bytes: int = 0) -> None:
        """Note that memory grew, or shrank where negative, after it had grown by `peak_bytes` in between."""
        self.peak_bytes = max(self.peak_bytes, self.live_bytes + max(num_bytes, peak_bytes))
        self.live_bytes += num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self._is_paused:
            return output
        if func.namespace == "c10d":
            self._add_collective(func, args)
            return output
        makes_memory = self._follow(_storages(tensors_among((args, kwargs))), _storages(tensors_among(output)))
        if (makes_memory or func._schema.is_mutable) and "empty" not in func._schema.name:
            self._add_operation(func, args, kwargs, output)
        return output

    def _add_operation(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        kind, flops = "other", 0
        formula = _FLOP_FORMULAS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=output)
            kind = "attention" if "attention" in func._schema.name else "matmul"
        num_bytes = moved_bytes(func._schema.name, (args, kwargs), output)
        self.counts.operations[Operation(self.phase, kind, flops, num_bytes)] += 1

    @property
    def phase(self) -> str:
        """What is running: "forward", "backward" or "recompute"."""
        if torch._C._current_graph_task_id() == -1:
            return "forward"
        # Recomputation runs under saved-tensor hooks; nothing else in a backward pass does.
        return "recompute" if torch._C._autograd._top_saved_tensors_default_hooks(True) else "backward"

    def _follow(self, inputs: Mapping[int, Any], outputs: Mapping[int, torch.UntypedStorage]) -> bool:
        """Add new memory, which is subtracted when it is freed; returns whether there is any."""
        made = {key: storage for key, storage in outputs.items() if key not in inputs and key not in self._bytes}
        for key, storage in made.items():
            self._bytes[key] = storage.nbytes()
            self.grow(storage.nbytes())
            weakref.finalize(storage, self._free, key)
        return bool(made)

    def _free(self, key: int) -> None:
        self.grow(-self._bytes.pop(key))

    def _add_collective(self, func: Any, args: Any) -> None:
        (group,) = (torch.distributed.ProcessGroup.unbox(arg) for arg in args if _is_group(arg))
        size = group.size()
        if size == 1:
            return
        name = func._schema.name.removeprefix("c10d::").strip("_").removesuffix("_base")
        kind = _JOINED.get(func._overloadpacket, name)
        payload = max(sum(tensor.nbytes for tensor in tensors_among(arg)) for arg in args)
        group_name = self._group_names.get(group.group_name, f"{size} ranks")
        kept = _bytes_to_itself(args, group.rank()) if kind == "alltoall" else None
        self.counts.collectives[Collective(self.phase, kind, group_name, size, payload, kept)] += 1


# They read as many rows of a table as they return.
_LOOKUPS = ("aten::embedding", "aten::index", "aten::index_select", "aten::gather")


def moved_bytes(name: str, inputs: Any, output: Any) -> int:
    """Return the bytes of all inputs and of outputs that are no inputs, which an operator writes in place."""
    read, written = ({id(tensor): tensor.nbytes for tensor in tensors_among(value)} for value in (inputs, output))
    if name in _LOOKUPS:
        return 2 * sum(written.values())
    return sum((read | written).values()) + sum(size for key, size in written.items() if key in read)


def _bytes_to_itself(args: Any, rank: int) -> int | None:
    """Return what a rank sends to itself in an all-to-all of one tensor with parts of different sizes."""
    _, sent, _, _, part_sizes, *_ = args
    return sent.nbytes * part_sizes[rank] // max(1, sum(part_sizes)) if part_sizes else None


def _is_group(arg: Any) -> bool:
    return isinstance(arg, torch.ScriptObject) and arg._type().name() == "ProcessGroup"  # type: ignore[attr-defined]


def tensors_among(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors among an operator's arguments; torch's own `tree_leaves` takes many times as long."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_among(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_among(item)


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
