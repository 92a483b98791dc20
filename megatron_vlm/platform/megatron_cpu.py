"""Runs megatron-core on CPU by giving its modules other names for `torch` and `torch.distributed`.

Inside `megatron.*` modules only, the globals `torch` and `dist` become proxies: `torch.cuda` answers as a device
without streams, factory functions take device "cuda" as the CPU, `all_gather` accepts uneven shapes (which gloo does
not). The real torch stays as it is for every other library. One tensor method cannot be scoped to a module and looks at
its caller instead: in `megatron.*`, `.type()` names CUDA types.

What is replaced is what the parts of megatron-core that we use ask for, no more; a new part adds its names here. Every
replacement has a test in tests/test_platform.py that fails without it, and the call sites in megatron-core that meet
one are listed there. The layer goes when megatron-core runs on CPU by itself (0.19.2 does not). CUDA installs none.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import logging
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "zeros")
_CUDA_TYPE_NAMES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}
_tensor_type = torch.Tensor.type


class _Proxy(types.ModuleType):
    """A module that looks up its own names first, then those of another module."""

    def __init__(self, original: types.ModuleType, replacements: dict[str, Any]) -> None:
        super().__init__(original.__name__)
        self.__dict__.update(replacements)
        self.__dict__["_original"] = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_original"], name)


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return create


def _all_gather(
    tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
) -> Any:
    """`all_gather` that also takes uneven shapes, as one broadcast per rank."""
    if len({part.shape for part in tensor_list}) == 1:
        return torch.distributed.all_gather(tensor_list, tensor, group=group, async_op=async_op)
    me = torch.distributed.get_rank(group)
    work = None
    for rank, part in enumerate(tensor_list):
        if rank == me:
            part.copy_(tensor)
        source = torch.distributed.get_global_rank(group, rank) if group is not None else rank
        work = torch.distributed.broadcast(part, src=source, group=group, async_op=async_op)
    return work


def _uncompiled(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`torch.compile` that compiles nothing."""
    return (lambda decorated: decorated) if function is None else function


_cuda = _Proxy(
    torch.cuda,
    {
        "current_device": _constant(_CPU),
        "current_stream": _constant(None),
        "synchronize": _constant(None),
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "manual_seed": torch.manual_seed,
    },
)
_dist = _Proxy(torch.distributed, {"all_gather": _all_gather})
_torch = _Proxy(
    torch, {"cuda": _cuda, "distributed": _dist} | {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}
)


def substitute(module: types.ModuleType) -> None:
    """Rebind the names `torch` and `dist` of one module."""
    if module.__dict__.get("torch") is torch:
        module.__dict__["torch"] = _torch
    if module.__dict__.get("dist") is torch.distributed:
        module.__dict__["dist"] = _dist


class _SubstituteOnImport(importlib.abc.MetaPathFinder):
    """Substitutes in modules of megatron that are imported later, whose `torch.compile` does nothing meanwhile.

    That decorator imports torch's compiler, which takes a fifth of the time in which a rank starts.
    """

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith("megatron."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                compile_, torch.compile = torch.compile, _uncompiled  # type: ignore[assignment]
                try:
                    execute(module)
                finally:
                    torch.compile = compile_
                substitute(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _is_megatron(frame: types.FrameType) -> bool:
    return frame.f_globals.get("__name__", "").startswith("megatron.")


def _tensor_type_for_megatron(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    result = _tensor_type(self, *args, **kwargs)
    if isinstance(result, str) and _is_megatron(sys._getframe(1)):
        return _CUDA_TYPE_NAMES.get(result, result)
    return result


def install() -> None:
    """Make megatron-core run on CPU in this process; call once."""
    sys.meta_path.insert(0, _SubstituteOnImport())
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.") and module is not None:
            substitute(module)
    torch.Tensor.type = _tensor_type_for_megatron  # type: ignore[method-assign, assignment]
    from megatron.core.tensor_parallel import random

    # These two import torch's private CUDA helpers by name, past the substitution.
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
