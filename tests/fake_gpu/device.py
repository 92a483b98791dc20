"""A GPU that this machine does not have: tensors on "cuda" have shapes, no values and no memory.

Inside `fake_gpu` the platform is CUDA, the host's tensors are real, and those on the device are fake. Whatever would
make the host wait for the device, or mixes tensors of the two, raises `DeviceFault`, in the forward pass and in the
backward pass; waits in `KNOWN_WAITS` are counted.

autograd's engine takes a stream for every tensor on CUDA, from a driver. Here it runs without: where C++ asks a fake
tensor for its device, the answer is "meta", which has no streams; in Python it is "cuda".
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, Literal
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.utils import GlobalMemoryBuffer
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vlm import platform
from megatron_vlm.planning.recorder import SHAPES, tensors_among
from megatron_vlm.planning.trace import mapped
from megatron_vlm.platform import device as platform_device
from megatron_vlm.platform import megatron_cpu
from tests.fake_gpu.attention import attention_as_on_cuda
from tests.fake_gpu.cuda import cuda_without_driver
from tests.fake_gpu.experts import even_choices

_aten = torch.ops.aten
CUDA, _META = torch.device("cuda", 0), torch.device("meta")


class DeviceFault(AssertionError):
    """Something that a GPU would refuse, or that makes the host wait for it."""


@dataclass(frozen=True)
class KnownWait:
    """A function in which the host may wait for the device.

    Attributes:
        name: what it waits for.
        file: end of the path of the function's file.
        function: its name.
        times: how often it may wait.
        per: each layer with experts and micro-batch, each micro-batch and chunk, or step.
    """

    name: str
    file: str
    function: str
    times: int
    per: Literal["layer", "micro-batch", "step"]


KNOWN_WAITS = (
    # One copy of all counts, for the sizes of the exchange and of what is kept.
    KnownWait("sizes of the exchange between experts", "layers/expert_exchange.py", "on_host", 1, "layer"),
    # It decides whether the update is applied.
    KnownWait("norm of the gradients", "training/optimizer.py", "gradient_norm", 1, "step"),
)


class FakeGpu(TorchDispatchMode):
    """Runs operators on fake tensors of the device and on real ones of the host, and refuses what a GPU would not do.

    Attributes:
        waits: how often the host waited, by the name of the known wait.
        on_wait: called with that name too.
        sets_up: whether a run is being set up, when the host may wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.on_wait: Callable[[str], None] = lambda name: None
        self.sets_up = False

    def wait(self, what: str) -> None:
        """Count a known wait.

        Raises:
            DeviceFault: it is none.
        """
        if self.sets_up:
            return
        known = _known_wait()
        if known is None:
            raise DeviceFault(f"the host waits for the device in {what}{_caller()}")
        self.waits[known.name] += 1
        self.on_wait(known.name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(tensors_among((args, kwargs)))
        fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        if func is torch.ops.prim.device.default:
            return _META if fakes else func(*args, **kwargs)
        if kwargs.get("device") == _META:  # C++ makes something where it believes another tensor to be
            kwargs = {**kwargs, "device": CUDA}
        if not fakes:
            return self._from_host(func, args, kwargs)
        if func is _aten._to_copy.default:
            return self._copy(args[0], args, kwargs)
        if func is _aten._local_scalar_dense.default:
            self.wait("item()")
            with unset_fake_temporarily():
                return self._values(args[0]).item()
        if len(fakes) < len(tensors):
            _check_mixture(func, args, [tensor for tensor in tensors if not isinstance(tensor, FakeTensor)])
        if func in _TAKES_MASK and any(_is_mask(index) for index in args[1]) and not _is_fill(func, args):
            raise DeviceFault(f"the host waits to count the true entries of a mask: {func}{_caller()}")
        try:
            return SHAPES.get(func, func)(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            raise DeviceFault(f"the host waits for values or their number: {func}{_caller()}") from None

    def _from_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator without tensors of the device: one that makes some, or one of the host alone."""
        device = kwargs.get("device")
        if device is None or device.type != "cuda":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is _aten._to_copy.default and not kwargs.get("non_blocking"):
            self.wait("a copy from the host without non_blocking=True")
        return func(*args, **kwargs)

    def _copy(self, source: FakeTensor, args: Any, kwargs: Any) -> torch.Tensor:
        """Copy a tensor of the device to itself or to the host."""
        device = kwargs.get("device") or CUDA
        if device.type == "cuda":
            # C++ that compares devices sees "meta", and copies where it would return the tensor itself.
            is_same = kwargs.get("dtype") in (None, source.dtype) and kwargs.get("memory_format") in (
                None,
                torch.preserve_format,
            )
            return _aten.alias.default(source) if is_same else _aten._to_copy.default(*args, **kwargs)
        if not kwargs.get("non_blocking"):
            self.wait("a copy to the host")
        elif all(frame.f_code is not platform.HostCopy.__init__.__code__ for frame in _frames()):
            raise DeviceFault(f"a copy to the host, whose values nobody waits for{_caller()}")
        return self._values(source)

    def _values(self, source: FakeTensor) -> torch.Tensor:
        """Return what the host finds in a tensor: ones, where nobody says what."""
        with unset_fake_temporarily():
            return torch.ones(tuple(source.shape), dtype=source.dtype)


_TAKES_MASK = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default)


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def _is_fill(func: Any, args: Any) -> bool:
    """Return whether values are put by one mask and one number, which torch does without counting."""
    return func is not _aten.index.Tensor and args[2].numel() == 1 and not (len(args) > 3 and args[3])


def _check_mixture(func: Any, args: Any, of_host: list[torch.Tensor]) -> None:
    """Let numbers of the host enter operators of the device, and nothing else but a copy that does not wait."""
    if func is _aten.copy_.default and isinstance(args[0], FakeTensor):
        if not (len(args) > 2 and args[2]) and args[1].dim():
            raise DeviceFault(f"the host waits for a copy from the host without non_blocking=True{_caller()}")
        return
    if func is _aten.copy_.default:
        raise DeviceFault(f"the host waits for a copy to the host{_caller()}")
    if any(tensor.dim() for tensor in of_host):
        raise DeviceFault(f"a tensor of the host is mixed with those of the device: {func}{_caller()}")


def _known_wait() -> KnownWait | None:
    for frame in _frames():
        code = frame.f_code
        for known in KNOWN_WAITS:
            if code.co_name == known.function and code.co_filename.endswith(known.file):
                return known
    return None


def _caller() -> str:
    """Return the innermost line of this project or megatron-core that is being executed."""
    for frame in _frames():
        name = frame.f_globals.get("__name__", "")
        if name.startswith(("megatron_vlm", "vlm_kernels", "megatron.")):
            return f", called in {name} line {frame.f_lineno} ({frame.f_code.co_name})"
    return ""


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


@contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """Let this process compute on a fake GPU; the machine has no other, and megatron-core is as it is on CUDA."""
    assert not torch.cuda.is_available(), "the fake GPU would hide a real one: set CUDA_VISIBLE_DEVICES to nothing"
    gpu = FakeGpu()
    with ExitStack() as stack:
        stack.enter_context(_megatron_as_on_cuda())
        stack.enter_context(cuda_without_driver(gpu.wait))
        stack.enter_context(attention_as_on_cuda())
        stack.enter_context(even_choices())
        stack.enter_context(
            mock.patch.object(platform_device, "_CURRENT", platform.Platform(CUDA, "fake", accelerated=True))
        )
        stack.enter_context(mock.patch.object(parallel_state, "_GLOBAL_MEMORY_BUFFER", GlobalMemoryBuffer()))
        stack.enter_context(mock.patch.object(torch, "tensor", partial(_tensor, torch.tensor)))
        for name, value in _PROPERTIES.items():
            stack.enter_context(mock.patch.object(FakeTensor, name, value, create=True))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(gpu)
        yield gpu


def _tensor(make: Callable[..., torch.Tensor], data: Any, **options: Any) -> torch.Tensor:
    """Make a tensor of data, which takes each number in it from the device by itself."""
    return make(mapped(data, FakeTensor, lambda number: number.item()), **options)


def _type(tensor: FakeTensor, *args: Any, **kwargs: Any) -> Any:
    return torch.Tensor.type(tensor, *args, **kwargs).replace("torch.meta.", "torch.cuda.")


# What C++ answers by the device that it sees, or by a stream of the driver.
_PROPERTIES: dict[str, Any] = {
    "is_cuda": True,
    "is_meta": False,
    "type": _type,
    "record_stream": lambda tensor, stream: None,
    "tolist": lambda tensor: tensor.cpu().tolist(),
}


@contextmanager
def _megatron_as_on_cuda() -> Iterator[None]:
    """Take back what `platform.megatron_cpu` and `platform.single_rank` gave megatron-core's modules."""
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    substitute: Callable[[Any], None] = megatron_cpu.substitute
    with ExitStack() as stack:
        for target, name, value in (
            (megatron_cpu, "substitute", lambda module: None),
            (torch.Tensor, "type", megatron_cpu._tensor_type),
            (token_dispatcher, "maybe_move_tensor_to_cpu", moe_utils.maybe_move_tensor_to_cpu),
            (param_and_grad_buffer, "dist_reduce_scatter_func", torch.distributed.reduce_scatter_tensor),
            (param_and_grad_buffer, "dist_all_gather_func", torch.distributed.all_gather_into_tensor),
            (param_and_grad_buffer, "_coalescing_manager", torch.distributed._coalescing_manager),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        for module in _megatron_modules():
            for name, original in (("torch", torch), ("dist", torch.distributed)):
                if module.__dict__.get(name) in (megatron_cpu._torch, megatron_cpu._dist):
                    module.__dict__[name] = original
        try:
            yield
        finally:
            for module in _megatron_modules():
                substitute(module)


def _megatron_modules() -> list[Any]:
    return [module for name, module in sys.modules.items() if name.startswith("megatron.") and module is not None]
