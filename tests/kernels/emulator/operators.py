"""Run the launch code of a .cu file too: its operators on CPU tensors, every launch on the emulated threads.

    rope = load_operators("rope/rope.cu", [operator, ...])
    rope.qk_norm_rope(...)

What is compiled is the file itself, by g++ against torch's stable ABI, but that launches `kernel<<<...>>>(...)` call
the emulator and that there is no device, stream or CUDA runtime. So conversions of arguments, checks, strides, the
choice of a variant and the sizes of grids and of partial sums are those that a GPU gets. Memory around tensors is not
guarded here, as it is by `compile_kernels`.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.library import Library

from tests.kernels.emulator.emulate import CACHE, FLAGS, HEADER, KERNELS, EmulatorError

TORCH = Path(torch.__file__).parent
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY", f'-DEMULATOR="{HEADER}"']
LAUNCH = re.compile(r"(\w+<[^<>;]*>)<<<(.*?)>>>\(\s*(.*?)\);", re.DOTALL)
CUDA_HEADERS = ("#include <cuda_runtime.h>\n", "#include <torch/csrc/stable/accelerator.h>\n")
DEVICE = re.compile(r"class OnDevice \{.*?\n\};", re.DOTALL)
NO_DEVICE = """
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  int multiprocessors() const { return 1; }
  int stream = 0;
};
inline void check_emulated() {
  const std::string error = std::move(emulator::error);
  emulator::error.clear();
  STD_TORCH_CHECK(error.empty(), error);
}
#define STD_CUDA_KERNEL_LAUNCH_CHECK() check_emulated()
"""
_libraries: dict[str, Library] = {}


def load_operators(source: str, operators: Sequence[Any]) -> Any:
    """Compile and load.

    Args:
        source: relative to kernels/vlm_kernels/.
        operators: those that it registers, as defined by the package.

    Returns:
        Operators of the same names, for CPU tensors.

    Raises:
        EmulatorError: the file does not compile.
    """
    namespace = f"emulated_{Path(source).stem}"
    if namespace not in _libraries:
        _libraries[namespace] = Library(namespace, "DEF")
        for operator in operators:
            _libraries[namespace].define(str(operator._schema).partition("::")[2])
        torch.ops.load_library(_compiled(source, namespace))
    return getattr(torch.ops, namespace)


def _compiled(source: str, namespace: str) -> Path:
    launch = (KERNELS / "csrc/launch.h").read_text()
    for header in CUDA_HEADERS:
        assert header in launch
        launch = launch.replace(header, "")
    launch, found = DEVICE.subn(lambda _: NO_DEVICE, launch)
    text, launches = LAUNCH.subn(_emulated_launch, (KERNELS / source).read_text())
    registration = "STABLE_TORCH_LIBRARY_IMPL(vlm_kernels, CUDA, m)"
    assert found == 1 and launches > 0 and "<<<" not in text and registration in text
    text = text.replace(registration, f"STABLE_TORCH_LIBRARY_IMPL({namespace}, CPU, m)")
    headers = "".join(path.read_text() for path in sorted(KERNELS.rglob("*.cuh")))
    digest = hashlib.sha256("".join([text, launch, headers, HEADER.read_text(), torch.__version__, *FLAGS]).encode())
    library = CACHE / f"{digest.hexdigest()[:32]}.so"
    if not library.exists():
        CACHE.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as name:
            folder = Path(name)
            (folder / "csrc").mkdir()
            (folder / "csrc/launch.h").write_text(launch)
            (folder / "operators.cpp").write_text(text)
            includes = [f"-I{folder}", f"-I{KERNELS}", "-isystem", TORCH / "include"]
            built = folder / "built.so"
            # All variants of a kernel: compiling takes longer than running.
            command = ["g++", *FLAGS, "-O0", *DEFINES, *includes, folder / "operators.cpp", "-o", built]
            done = subprocess.run([*command, f"-L{TORCH / 'lib'}", "-ltorch_cpu"], capture_output=True, text=True)
            if done.returncode:
                raise EmulatorError(done.stderr[-4000:])
            os.replace(built, library)
    return library


def _emulated_launch(launch: re.Match[str]) -> str:
    kernel, configuration, arguments = launch.groups()
    grid, block, shared, _ = _split(configuration)
    return f"emulator::launch(dim3({grid}), dim3({block}), {shared}, [=] {{ {kernel}({arguments}); }});"


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
