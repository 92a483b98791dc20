"""Records where megatron-core meets a replacement of the CPU layer, and takes single replacements away."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import FrameType, ModuleType
from typing import Any
from unittest import mock

from megatron.core.tensor_parallel import random

from megatron_vlm.platform import megatron_cpu

_NAMESPACES: dict[str, ModuleType] = {
    "torch": megatron_cpu._torch,
    "torch.cuda": megatron_cpu._cuda,
    "torch.distributed": megatron_cpu._dist,
}
_FUNCTIONS = {
    random: ("_get_cuda_rng_state", "_set_cuda_rng_state"),
}


def replacements() -> dict[str, tuple[ModuleType, str]]:
    """Every replaced function by its full name: the namespace that holds it, and its name there."""
    own = set(vars(megatron_cpu._Proxy(ModuleType("empty"), {})))
    found = {
        f"{prefix}.{name}": (namespace, name)
        for prefix, namespace in _NAMESPACES.items()
        for name, value in vars(namespace).items()
        if name not in own and not isinstance(value, ModuleType)
    }
    return found | {
        f"{module.__name__}.{name}": (module, name) for module, names in _FUNCTIONS.items() for name in names
    }


def _changes_something(name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """Whether a call is answered differently from torch's own."""
    if name.removeprefix("torch.") in megatron_cpu._FACTORIES:
        return megatron_cpu._is_cuda(keywords.get("device"))
    if name == "torch.distributed.all_gather":
        return len({part.shape for part in arguments[0]}) > 1
    return True


@contextlib.contextmanager
def recorded() -> Iterator[set[str]]:
    """Collect "module:function replacement" for every redirected call from megatron-core."""
    sites: set[str] = set()

    def add(frame: FrameType, name: str) -> None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("megatron."):
            sites.add(f"{module}:{frame.f_code.co_qualname} {name}")

    def recording(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if _changes_something(name, arguments, keywords):
                add(sys._getframe(1), name)
            return function(*arguments, **keywords)

        return call

    is_megatron = megatron_cpu._is_megatron

    def recording_is_megatron(frame: FrameType) -> bool:
        add(frame, "Tensor.type")
        return is_megatron(frame)

    with contextlib.ExitStack() as stack:
        for name, (namespace, attribute) in replacements().items():
            wrapped = recording(name, vars(namespace)[attribute])
            stack.enter_context(mock.patch.dict(vars(namespace), {attribute: wrapped}))
        stack.enter_context(mock.patch.object(megatron_cpu, "_is_megatron", recording_is_megatron))
        yield sites


@contextlib.contextmanager
def without(name: str) -> Iterator[None]:
    """Take one replacement away, as if the layer did not have it."""
    if name == "Tensor.type":
        with mock.patch("torch.Tensor.type", megatron_cpu._tensor_type):
            yield
        return
    namespace, attribute = replacements()[name]
    # A proxy falls back to torch's own; megatron-core's module has its own function back.
    original = _ORIGINALS.get(name) or getattr(vars(namespace)["_original"], attribute)
    with mock.patch.dict(vars(namespace), {attribute: original}):
        yield


def _original_functions() -> dict[str, Callable[..., Any]]:
    """The functions as megatron-core defines them, from second copies of their modules."""
    import importlib.util

    found = {}
    for module, names in _FUNCTIONS.items():
        spec = importlib.util.find_spec(module.__name__)
        assert spec is not None and spec.loader is not None
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        found |= {f"{module.__name__}.{name}": vars(copy)[name] for name in names}
    return found


_ORIGINALS = _original_functions()
