"""What the compiler makes of the span-attention kernels, without a GPU: registers, spills, memory, instructions.

    python -m tests.kernels.span_compile [head dim ...]

prints every kernel of every configuration of the table. The kernels are compiled by their own launch, whose driver is a
stand-in that only knows which GPU it would be, so that arguments are typed as they will be there; nothing runs.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.kernels.span_rows import RUN_SHAPES, run_spans
from vlm_kernels.span_attention import Spans, launch
from vlm_kernels.span_attention.blocks import CONFIGURATIONS, Configuration, configuration

SHARED_BYTES = {8: 163 * 1024, 9: 227 * 1024, 10: 227 * 1024}
TENSOR_MEMORY_COLUMNS = 512
_TENSOR_CORES = {8: r"\bHMMA\b", 9: r"\bHGMMA\b", 10: r"\bUTC\w*MMA\b"}
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Code:
    """Machine code of one kernel.

    Attributes:
        variants: codes compiled for all shapes of packed runs and context ranks, and for a single query.
        registers: of a thread.
        stack: bytes of a thread.
        spills: loads and stores of local memory.
        shared: bytes of a program.
        tensor_memory: columns of a program.
        tensor_core: instructions of the tensor cores.
        bulk: copies by the copy mcore_config.
        wide: loads of 16 bytes from global memory.
        narrow: other loads from global memory.
    """

    variants: int
    registers: int
    stack: int
    spills: int
    shared: int
    tensor_memory: int
    tensor_core: int
    bulk: int
    wide: int
    narrow: int


def compile_kernels(head_dim: int, major: int) -> dict[str, Code]:
    """Machine code of all four kernels for bf16 tensors on a GPU of a major compute capability."""

    def launch_all() -> None:
        for shape in (*RUN_SHAPES, (130, 130, 1, 1), (1, 1, 1, 1), (1, 16, 1, 1)):
            _launch(run_spans(*shape), head_dim, configuration(head_dim, major))

    return compiled_by(launch_all, major)


def compiled_by(launch_all: Callable[[], None], major: int) -> dict[str, Code]:
    """Machine code of the kernels that a function launches, by name, on a GPU of a major compute capability."""
    with _compiling_only(GPUTarget("cuda", major * 10, 32)) as compiled:
        launch_all()
    return {name: _read(kernels, major) for name, kernels in compiled.items()}


def _launch(spans: Spans, head_dim: int, launches: Configuration) -> None:
    """Both passes, in a window."""
    (batch, length), window, scale = spans.low.shape, 50, 0.1
    q = torch.zeros((length, batch, 4, head_dim), dtype=torch.bfloat16).permute(1, 2, 0, 3)
    k = v = torch.zeros((spans.num_keys, batch, 2, head_dim), dtype=torch.bfloat16).permute(1, 2, 0, 3)
    forward, by_query, by_key = (
        spans.block_ranges(window, blocks) for blocks in (launches.forward, launches.queries, launches.keys)
    )
    bounds = (spans.first_key(window), spans.high)
    out, lse = launch.forward(q, k, v, *bounds, forward.by_query, scale, launches)
    launch.backward(out, q, k, v, out, lse, *bounds, by_query.by_query, by_key.by_key, scale, launches)


@contextmanager
def _compiling_only(target: GPUTarget) -> Iterator[dict[str, list[Any]]]:
    """Launches compile for the target and do no more; gives what they compiled, by name, each variant once."""
    compiled: dict[str, list[Any]] = {}
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        kernel = run(self, *arguments, grid=grid, warmup=True, **keywords)
        variants = compiled.setdefault(self.__name__, [])
        if not any(kernel is known for known in variants):
            variants.append(kernel)

    stand_in = mock.Mock(spec_set=["get_current_device", "get_current_stream", "get_current_target"])
    stand_in.get_current_device.return_value = target.arch  # launches keep what they compiled by device
    stand_in.get_current_target.return_value = target
    # Not `reset_active`, which asks for a GPU.
    with mock.patch.object(driver, "_active", stand_in), mock.patch.object(JITFunction, "run", compile_only):
        yield compiled


def _read(variants: list[Any], major: int) -> Code:
    """Of the first variant."""
    kernel = variants[0]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([_TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    wide = count(r"\bLDG(?:STS)?\b\S*\.128\b")
    return Code(
        variants=len(variants),
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        spills=count(r"\b(LDL|STL)\b"),
        shared=kernel.metadata.shared,
        tensor_memory=getattr(kernel.metadata, "tmem_size", 0) or 0,
        tensor_core=count(_TENSOR_CORES[major]),
        bulk=count(r"\bUTMALDG\b"),
        wide=wide,
        narrow=count(r"\bLDG(?:STS)?\b") - wide,
    )


if __name__ == "__main__":
    head_dims = [int(argument) for argument in sys.argv[1:]] or sorted({columns for columns, _ in CONFIGURATIONS})
    for head_dim in head_dims:
        for major in SHARED_BYTES:
            for name, code in compile_kernels(head_dim, major).items():
                print(head_dim, f"sm_{major}0", name, code, flush=True)
