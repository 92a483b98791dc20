"""What the compiler made of the kernels: registers, spills, 16-byte accesses of each, from the built extension.

    python -m tests.kernels.static_code    prints a table

The tools come with Triton's wheel.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import triton

from vlm_kernels.library import BINARY, BUILD_LOG

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SHARED_BYTES = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}  # of a multiprocessor
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_USAGE = re.compile(r" Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_WIDE = {"wide_loads": re.compile(r"\bLDG\.E\.(\w+\.)*128\b"), "wide_stores": re.compile(r"\bSTG\.E\.(\w+\.)*128\b")}


@dataclass
class Code:
    """One kernel, compiled for one architecture.

    Attributes:
        name: with template arguments.
        registers: of each thread.
        stack_bytes: of each thread, spilled registers and arrays that are not in registers.
        shared_bytes: static shared memory of a block.
        wide_loads: instructions that load 16 bytes from global memory.
        wide_stores: the same for stores.
    """

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    wide_loads: int = 0
    wide_stores: int = 0

    def blocks_per_multiprocessor(self, architecture: str, threads: int, dynamic_shared_bytes: int) -> int:
        """Return how many blocks run at a time, by the rules of CUDA's occupancy calculator for these architectures.

        A multiprocessor has 65,536 registers, given to warps in units of 256, 2,048 threads, and shared memory of which
        every block takes 1 KiB more than it uses.
        """
        warps = -(-threads // 32)
        of_registers = 65_536 // (-(-self.registers * 32 // 256) * 256) // 4 * 4 // warps
        shared_bytes = -(-(self.shared_bytes + dynamic_shared_bytes) // 128) * 128 + 1024
        return min(of_registers, SHARED_BYTES[architecture] // shared_bytes, 64 // warps, 32)

    @property
    def kernel(self) -> str:
        """Name without template arguments and namespaces."""
        return self.name.partition("<")[0].rpartition("::")[2]


def built_for(architecture: str) -> bool:
    """Whether the compiler that built the extension knew the architecture, by the first line of the log."""
    return architecture in re.findall(r"sm_\d+", BUILD_LOG.read_text().partition("\n")[0].partition("; not for")[0])


@cache
def read_code(architecture: str) -> list[Code]:
    """All kernels of the extension for one architecture; skips the test where the compiler did not know it."""
    if not built_for(architecture):
        pytest.skip(f"the compiler did not know {architecture}")
    usage = _run("--dump-resource-usage", "-arch", architecture)
    found = {
        name: Code("", int(registers), int(stack) + int(local), int(shared))
        for name, registers, stack, shared, local in _USAGE.findall(usage)
    }
    for part in _run("-sass", "-arch", architecture).split("\t\tFunction : ")[1:]:
        code = found[part.partition("\n")[0].strip()]
        for field, pattern in _WIDE.items():
            setattr(code, field, sum(1 for _ in pattern.finditer(part)))
    names = subprocess.run(["c++filt"], input="\n".join(found), capture_output=True, text=True, check=True).stdout
    for code, name in zip(found.values(), names.splitlines(), strict=True):
        # `void namespace::kernel<arguments>(parameters)`, without what tells anonymous namespaces apart.
        code.name = re.sub(r"\(anonymous namespace\)::", "", name).removeprefix("void ").partition("(")[0]
    return list(found.values())


def _run(*arguments: str) -> str:
    done = subprocess.run([TOOL, *arguments, BINARY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def main() -> None:
    """Print one line for each kernel and architecture: its variants' range of registers, and what is 16 bytes wide."""
    print("| kernel | architecture | variants | registers | spilled bytes | variants with 16-byte loads, stores |")
    print("|---|---|---|---|---|---|")
    for architecture in filter(built_for, ARCHITECTURES):
        kernels: dict[str, list[Code]] = defaultdict(list)
        for code in read_code(architecture):
            kernels[code.kernel].append(code)
        for kernel, variants in sorted(kernels.items()):
            registers = sorted(code.registers for code in variants)
            wide = [sum(getattr(code, field) > 0 for code in variants) for field in _WIDE]
            print(
                f"| {kernel} | {architecture} | {len(variants)} | {registers[0]} to {registers[-1]} "
                f"| {max(code.stack_bytes for code in variants)} | {wide[0]}, {wide[1]} |"
            )


if __name__ == "__main__":
    main()
