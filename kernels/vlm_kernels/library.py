"""Definition and registration of this package's operators.

An operator is one function of tensors with a reference in plain PyTorch, which defines it and runs on a CPU, and a
CUDA kernel: written in Triton, or in the compiled extension (`setup.py` builds it where a CUDA toolkit is found).
Without the extension the reference runs on CUDA too, with one warning; `MEGATRON_VLM_STRICT_KERNELS=1` makes that an
error.

Source: torch.library; the extension uses torch's stable ABI.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.library import Library

NAMESPACE = "vlm_kernels"
STRICT_VARIABLE = "MEGATRON_VLM_STRICT_KERNELS"
BINARY = Path(__file__).with_name("_C.abi3.so")
BUILD_LOG = Path(__file__).with_name("_C.txt")

_library = Library(NAMESPACE, "DEF")
_names: list[str] = []


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    kernel: Callable[..., Any] | None = None,
) -> Any:
    """Define an operator.

    Args:
        schema: name and types, as in `rms_norm(Tensor x, float eps) -> Tensor`. The extension implements the same name.
        reference: the implementation that defines the operator; it computes in fp32, and in fp64 for fp64 inputs.
        fake: the fake implementation, which returns results' shapes and dtypes from those of the arguments.
        backward: `backward(ctx, *gradients)`, for operators with a gradient; it calls an operator that itself has no
            gradient: second derivatives are refused.
        setup_context: `setup_context(ctx, inputs, output)`, which saves what `backward` needs.
        kernel: the CUDA implementation, for operators whose kernel is written in Triton and not in the extension.

    Returns:
        The operator; for operators with a gradient a function of the same positional arguments that models call
        instead, because it costs the host half as much (`_function`).
    """
    name = schema.partition("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _names.append(name)
    _library.impl(name, reference, "CPU")
    _load_binary()
    if kernel is not None:
        _library.impl(name, kernel, "CUDA")
    elif not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CUDA"):
        _library.impl(name, _warn_once(reference), "CUDA")
    torch.library.register_fake(qualified, fake, lib=_library)
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    if backward is None:
        return operator
    assert setup_context is not None
    # For compilers, which see one operator and no function around it.
    registered = once_differentiable(backward)
    torch.library.register_autograd(qualified, registered, setup_context=setup_context, lib=_library)
    return _function(operator, backward, setup_context)


def _function(operator: Any, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that applies an operator, with the gradient that is registered for it, in fewer steps.

    What torch registers takes the way through Python twice, checks the arguments against the schema and counts
    gradients, for every call; this is one node around the operator's kernel
    (`benchmarks/operator_host_cost.py`).
    """
    refusing = once_differentiable(backward)

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = operator(*arguments)
            setup_context(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            # Gradients are enabled here only if somebody asks for derivatives of the result.
            return (refusing if torch.is_grad_enabled() else backward)(ctx, *gradients)

    Node.__name__ = f"{operator._opname}_node"
    apply = Node.apply

    @wraps(operator)
    def call(*arguments: Any) -> Any:
        return operator(*arguments) if torch.compiler.is_compiling() else apply(*arguments)

    return call


def operators() -> list[str]:
    """Return the names of the operators that have been defined."""
    return list(_names)


@cache
def _load_binary() -> str | None:
    """Load the extension, whose kernels are registered before their operators; return the reason if there is none."""
    if not BINARY.exists():
        return BUILD_LOG.read_text().partition("\n")[0] if BUILD_LOG.exists() else "CUDA kernels: not built"
    try:
        torch.ops.load_library(BINARY)
    except OSError as error:
        # It was built for another version of torch, or this torch has no CUDA.
        return f"CUDA kernels: {error}"
    return None


def _warn_once(reference: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(reference)
    def run(*arguments: Any, **keywords: Any) -> Any:
        _complain()
        return reference(*arguments, **keywords)

    return run


@cache
def _complain() -> None:
    message = (
        f"{_load_binary() or 'CUDA kernels: built from older sources'}. Reference operators run instead, which is slow "
        "and takes more memory. Fix: install again where nvcc is found"
    )
    if os.environ.get(STRICT_VARIABLE) == "1":
        raise RuntimeError(f"{message}, or unset {STRICT_VARIABLE}")
    warnings.warn(message, stacklevel=2)
