"""Run CUDA kernel bodies on the host: compile them with g++ against `emulator.h`, call them on CPU tensors.

    LAUNCHERS = '''
    #include "scale/scale.cuh"
    extern "C" void scale_float(const float* x, float* y, int64_t size, float factor) {
      emulator::launch(dim3(2), dim3(64), 0, [=] { kernels::scale<float>(x, y, size, factor); });
    }
    '''
    run = compile_kernels(LAUNCHERS)
    run("scale_float", x, y, x.numel(), 2.0)

Tensors become pointers, None a null pointer, int `int64_t`, float `float`, bool `bool`. Around every tensor lies memory
that reads as NaN and must not be written.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path

import torch

KERNELS = Path(__file__).parents[3] / "kernels/vlm_kernels"
HEADER = Path(__file__).with_name("emulator.h")
CACHE = Path(tempfile.gettempdir()) / f"megatron_vlm_emulated_{os.getuid()}"
# -O1 compiles in a second or two. Kernels look at one memory through several types, as nvcc allows. nvcc fuses products
# and sums, g++ here not: results may differ in the last bit of fp32.
FLAGS = "-std=c++20 -O1 -fPIC -shared -fno-strict-aliasing -ffp-contract=off -w".split()
# More than a row of the tests' shapes: a mutation may write that far.
GUARD_BYTES = 64 << 10

Argument = torch.Tensor | int | float | bool | None
Edits = Mapping[str, Sequence[tuple[str, str]]]


class EmulatorError(Exception):
    """What hardware would refuse or hang on, or a write outside of the arguments."""


class Order(IntEnum):
    """Which thread runs first."""

    ASCENDING = 0
    DESCENDING = 1
    SHUFFLED = 2


def compile_kernels(launchers: str, edits: Edits | None = None) -> Callable[..., None]:
    """Compile launchers (C++ text that includes kernel bodies relative to kernels/vlm_kernels/).

    Args:
        launchers: functions `extern "C" void name(...)` that call `emulator::launch`.
        edits: for a mutation check, replacements (old, new) by file relative to kernels/vlm_kernels/. Each old text
            must occur.

    Returns:
        `run(name, *arguments, order=Order.ASCENDING)`.

    Raises:
        EmulatorError: the text does not compile.
    """
    changed = {name: _edited(KERNELS / name, replacements) for name, replacements in (edits or {}).items()}
    sources = [HEADER, *sorted(KERNELS.rglob("*.cuh"))]
    digest = hashlib.sha256(repr((launchers, sorted(changed.items()), FLAGS)).encode())
    for source in sources:
        digest.update(source.read_bytes())
    library = CACHE / f"{digest.hexdigest()[:32]}.so"
    if not library.exists():
        CACHE.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            _compile(Path(folder), launchers, changed, library)
    return _caller(ctypes.CDLL(str(library)))


def _edited(path: Path, replacements: Sequence[tuple[str, str]]) -> str:
    text = path.read_text()
    for old, new in replacements:
        assert old in text, f"{path} has no {old!r}: adapt the mutation to the source"
        text = text.replace(old, new)
    return text


def _compile(folder: Path, launchers: str, changed: Mapping[str, str], library: Path) -> None:
    (folder / "launchers.cpp").write_text('#include "csrc/device.cuh"\n' + launchers)
    for name, text in changed.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    built = folder / "built.so"
    command = ["g++", *FLAGS, f'-DEMULATOR="{HEADER}"', f"-I{folder}", f"-I{KERNELS}"]
    done = subprocess.run([*command, folder / "launchers.cpp", "-o", built], capture_output=True, text=True)
    if done.returncode:
        raise EmulatorError(done.stderr[-4000:])
    os.replace(built, library)


def _caller(library: ctypes.CDLL) -> Callable[..., None]:
    library.emulator_error.restype = ctypes.c_char_p

    def run(name: str, *arguments: Argument, order: Order = Order.ASCENDING) -> None:
        guarded = [_Guarded(argument) if isinstance(argument, torch.Tensor) else None for argument in arguments]
        values = [
            ctypes.c_void_p(guard.pointer) if guard else _value(argument)
            for guard, argument in zip(guarded, arguments, strict=True)
        ]
        library.emulator_begin(int(order))
        getattr(library, name)(*values)
        if error := library.emulator_error():
            raise EmulatorError(error.decode())
        for position, guard in enumerate(guarded):
            if guard is not None:
                guard.give_back(f"argument {position} of {name}")

    return run


def _value(argument: Argument) -> ctypes._SimpleCData:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, bool):
        return ctypes.c_bool(argument)
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_float(argument)


class _Guarded:
    """A copy of a tensor's memory between two guards, at an address that is aligned as the tensor's is."""

    def __init__(self, tensor: torch.Tensor) -> None:
        assert tensor.device.type == "cpu"
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.memory = tensor.detach().as_strided((span if tensor.numel() else 0,), (1,)).view(torch.uint8)
        self.buffer = torch.full((self.memory.numel() + 2 * GUARD_BYTES + 128,), 255, dtype=torch.uint8)
        self.start = GUARD_BYTES + (tensor.data_ptr() - self.buffer.data_ptr() - GUARD_BYTES) % 128
        self.inside = self.buffer[self.start : self.start + self.memory.numel()]
        self.inside.copy_(self.memory)
        self.pointer = self.inside.data_ptr() if tensor.numel() else self.buffer.data_ptr() + self.start

    def give_back(self, what: str) -> None:
        outside = (self.buffer[: self.start], self.buffer[self.start + self.memory.numel() :])
        if any((part != 255).any() for part in outside):
            raise EmulatorError(f"{what} is written outside of its memory")
        self.memory.copy_(self.inside)
