"""How an operator of this package is defined, and what runs it on which device.

An operator is one function of tensors with a reference in plain PyTorch, which is its definition and what runs on a
CPU, and a CUDA kernel in the compiled extension (`setup.py` builds it where a CUDA toolkit is found). Without the
extension the reference runs on CUDA too, with one warning; `MEGATRON_VLM_STRICT_KERNELS=1` makes that an error.

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
from torch.library import Library

NAMESPACE = "megatron_vlm"
STRICT_VARIABLE = "MEGATRON_VLM_STRICT_KERNELS"
BINARY = Path(__file__).with_name("_C.abi3.so")

_library = Library(NAMESPACE, "DEF")


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Any:
    """Define an operator.

    Args:
        schema: name and types, as in `rms_norm(Tensor x, float eps) -> Tensor`. The extension implements the same name.
        reference: the definition. It computes in fp32, in fp64 where the input is fp64.
        fake: shapes and dtypes of the results, from those of the arguments.
        backward: `backward(ctx, *gradients)`, for operators with a gradient; it calls an operator of its own.
        setup_context: `setup_context(ctx, inputs, output)`, which saves what `backward` needs.

    Returns:
        The operator.
    """
    name = schema.partition("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, reference, "CPU")
    if not _load_binary():
        _library.impl(name, _warn_once(name, reference), "CUDA")
    torch.library.register_fake(qualified, fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


@cache
def _load_binary() -> bool:
    """Load the extension, whose kernels then wait for their operators' definitions; false where it was not built."""
    if not BINARY.exists():
        return False
    torch.ops.load_library(BINARY)
    return True


def _warn_once(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(reference)
    def run(*arguments: Any, **keywords: Any) -> Any:
        _complain()
        return reference(*arguments, **keywords)

    return run


@cache
def _complain() -> None:
    message = (
        "the CUDA kernels were not built: reference operators run instead, which is slow and takes more memory; "
        "install again where nvcc is found"
    )
    if os.environ.get(STRICT_VARIABLE) == "1":
        raise RuntimeError(f"{message}, or unset {STRICT_VARIABLE}")
    warnings.warn(message, stacklevel=2)
