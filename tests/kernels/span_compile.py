"""What the compiler makes of the span-attention kernels, without a GPU: registers, spills, memory, instructions.

    python -m tests.kernels.span_compile [head dim ...]

prints one line for every configuration of the table.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.span_attention import launch, triton_kernels
from kernels.span_attention.blocks import CONFIGURATIONS, Blocks, columns_of, configuration

KERNELS = {"forward": "forward", "backward_queries": "queries", "backward_keys": "keys"}
SHARED_BYTES = {8: 163 * 1024, 9: 227 * 1024, 10: 227 * 1024}
TENSOR_MEMORY_COLUMNS = 512
TENSOR_CORES = {8: r"\bHMMA\b", 9: r"\bHGMMA\b", 10: r"\bUTC\w*MMA\b"}
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_NUMBERS = {"heads", "group", "length", "num_blocks"}


@dataclass(frozen=True)
class Code:
    """Machine code of one kernel.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread.
        spills: loads and stores of local memory.
        shared: bytes of a program.
        tensor_memory: columns of a program.
        tensor_core: instructions of the tensor cores.
        vectors: bulk copies by the copy engine, or 16-byte loads.
        narrow: other loads from global memory.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    tensor_memory: int
    tensor_core: int
    vectors: int
    narrow: int


def compile_kernel(kernel: str, head_dim: int, major: int) -> Code:
    """Compile one kernel as it is launched on bf16 tensors."""
    launches = configuration(head_dim, major)
    blocks: Blocks = getattr(launches, KERNELS[kernel])
    constants = {**blocks.constants(head_dim), "UPCAST": False, "TMA": launches.tma}
    function = getattr(triton_kernels, kernel)
    names = function.arg_names
    signature = {
        name: "constexpr" if name in constants else _type(name, blocks, head_dim, launches.tma, kernel == "forward")
        for name in names
    }
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in signature.items() if kind[0] == "*"}
    source = ASTSource(function, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return _read(triton.compile(source, GPUTarget("cuda", major * 10, 32), blocks.options), major)


def _type(name: str, blocks: Blocks, head_dim: int, tma: bool, is_forward: bool) -> str:
    if name == "scale":
        return "fp32"
    if name in _NUMBERS or name.endswith(("_batch", "_head", "_token")):
        return "i32"
    if name in ("lse", "delta"):
        return "*fp32"
    if name in ("first", "last", "table"):
        return "*i32"
    box = launch.box(name, blocks, head_dim, own=is_forward and name == "v")
    return f"tensordesc<bf16{box}>" if tma else "*bf16"


def _read(compiled: Any, major: int) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([_TOOLS / tool[0], tool[1], file.name], capture_output=True, text=True, check=True).stdout
            for tool in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    wide = count(r"\bLDG(STS)?\b\S*\.128\b") if major < 9 else count(r"\bUTMALDG\b")
    return Code(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        spills=count(r"\b(LDL|STL)\b"),
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
        tensor_core=count(TENSOR_CORES[major]),
        vectors=wide,
        narrow=count(r"\bLDG(STS)?\b") - (wide if major < 9 else 0),
    )


if __name__ == "__main__":
    chosen = {columns_of(int(argument)) for argument in sys.argv[1:]}
    for columns, major in CONFIGURATIONS:
        if columns in (chosen or {columns}):
            for kernel in KERNELS:
                print(columns, f"sm_{major}0", kernel, compile_kernel(kernel, columns, major), flush=True)
