"""Builds the CUDA kernels as `vlm_kernels/_C.abi3.so` where a CUDA toolkit is found; the rest is in pyproject.toml.

The extension uses torch's stable ABI, so one binary serves torch 2.11 and later, and any Python. It is built for those
of the wanted architectures that the compiler knows. Without a toolkit, or with one that does not work or belongs to
another major version of CUDA than torch, the installation succeeds without the extension and `_C.txt` beside it says
why; MEGATRON_VLM_STRICT_KERNELS=1 makes that an error. CUDA_HOME names a toolkit that is not on the path.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
PACKAGE = "vlm_kernels"
KERNELS = ROOT / "kernels" / PACKAGE
STRICT_VARIABLE = "MEGATRON_VLM_STRICT_KERNELS"
WANTED_ARCHITECTURES = ("80", "90", "100")  # Ampere, Hopper, Blackwell
# 2.11, the oldest torch that the binary is to load on.
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY", "-DUSE_CUDA"]
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "--extended-lambda", "-Xcompiler=-fPIC,-fvisibility=hidden"]


class NoKernelsError(Exception):
    """Why the kernels cannot be built here, in one line, and what the compiler said."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.output = output


class BuildKernels(build_ext):
    """Compiles every *.cu of the package, as many at a time as there are cores, and links them."""

    def run(self) -> None:
        """Build, or leave the package without a binary."""
        binary = Path(self.get_ext_fullpath(f"{PACKAGE}._C"))
        log = binary.with_name("_C.txt")
        binary.parent.mkdir(parents=True, exist_ok=True)
        binary.unlink(missing_ok=True)
        digest = source_hash()
        try:
            message, output = build(binary, Path(self.build_temp))
        except NoKernelsError as error:
            if os.environ.get(STRICT_VARIABLE) == "1":
                raise
            output, message = error.output, f"CUDA kernels: not built, {error}"
        log.write_text(f"{message}\n{digest}\n{output}")
        print(message, file=sys.stderr)

    def get_ext_filename(self, fullname: str) -> str:
        """Without the Python version: nothing in it depends on one."""
        return str(Path(*fullname.split("."))) + ".abi3.so"

    def get_outputs(self) -> list[str]:
        """What is installed: the binary, if there is one, and the log."""
        binary = Path(self.get_ext_fullpath(f"{PACKAGE}._C"))
        return [str(path) for path in (binary, binary.with_name("_C.txt")) if path.exists()]


class Compiler(NamedTuple):
    """nvcc, and what it can build for.

    Attributes:
        path: of nvcc.
        cuda: version of the toolkit, as in "13.0".
        architectures: the wanted ones that it knows, oldest first; never empty.
    """

    path: str
    cuda: str
    architectures: tuple[str, ...]

    @property
    def targets(self) -> list[str]:
        """Options: machine code for each architecture, and PTX of the newest for GPUs that are newer still."""
        newest = self.architectures[-1]
        codes = [(architecture, f"sm_{architecture}") for architecture in self.architectures]
        return [f"-gencode=arch=compute_{a},code={code}" for a, code in [*codes, (newest, f"compute_{newest}")]]

    def summary(self) -> str:
        """What was built and what was left out, in one line."""
        unknown = [a for a in WANTED_ARCHITECTURES if a not in self.architectures]
        left_out = f"; not for {_names(unknown)}, which nvcc of CUDA {self.cuda} does not know" if unknown else ""
        return f"CUDA kernels: built for {_names(self.architectures)}{left_out}"


def _names(architectures: Iterable[str]) -> str:
    return ", ".join(f"sm_{architecture}" for architecture in architectures)


def build(binary: Path, folder: Path) -> tuple[str, str]:
    """Compile and link; returns a summary and what the compiler said. Raises NoKernelsError."""
    compiler = find_compiler()
    torch = find_torch(compiler)
    nvcc, targets = compiler.path, compiler.targets
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / "probe.cu"
    probe.write_text("__global__ void probe(float* x) { *x = 1.0f; }\n")
    common = [nvcc, *FLAGS, *targets, *DEFINES, f"-I{KERNELS}", "-isystem", torch / "include"]
    # A toolkit without its compiler back end, its headers or a host compiler fails here.
    run([*common, "-c", probe, "-o", folder / "probe.o"], f"{nvcc} cannot compile an empty kernel")
    bodies = sorted(KERNELS.glob("*/*.cu"))
    objects = [folder / f"{body.stem}.o" for body in bodies]

    def compile_one(source: Path, target: Path) -> str:
        return run([*common, "-c", source, "-o", target], f"{nvcc} cannot compile {source.relative_to(ROOT)}")

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        outputs = list(pool.map(compile_one, bodies, objects))
    link = [nvcc, *targets, "-shared", "-cudart=shared", *objects, f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch_cuda"]
    outputs.append(run([*link, "-o", binary], f"{nvcc} cannot link the kernels"))
    return compiler.summary(), "".join(outputs)


def find_compiler() -> Compiler:
    """CUDA_HOME's nvcc, or the one on the path, with what it says of itself."""
    path = find_nvcc()
    version = re.search(r"release (\d+\.\d+)", run([path, "--version"], f"{path} --version fails"))
    listed = run([path, "--list-gpu-arch"], f"{path} does not list its architectures, as CUDA 11.1 and later do")
    known = set(re.findall(r"\bcompute_(\d+)\b", listed))
    architectures = tuple(a for a in WANTED_ARCHITECTURES if a in known)
    if version is None:
        raise NoKernelsError(f"{path} does not say of which CUDA it is")
    if not architectures:
        raise NoKernelsError(f"{path} knows none of {_names(WANTED_ARCHITECTURES)}", listed)
    return Compiler(path, version[1], architectures)


def find_nvcc() -> str:
    """CUDA_HOME's, or the one on the path."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [str(Path(home) / "bin/nvcc")] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if found := shutil.which(candidate):
            return found
    where = f"in {home}/bin" if home else "on the path; CUDA_HOME may name a CUDA toolkit"
    raise NoKernelsError(f"no nvcc {where}")


def find_torch(compiler: Compiler) -> Path:
    """Folder of the torch that is installed where this runs; the binary needs the CUDA runtime that it brings."""
    try:
        import torch
    except ImportError:
        raise NoKernelsError("torch must be installed first, and pip be told --no-build-isolation") from None
    if torch.version.cuda is None:
        raise NoKernelsError("this torch is made without CUDA")
    major = torch.version.cuda.partition(".")[0]
    if compiler.cuda.partition(".")[0] != major:
        raise NoKernelsError(
            f"{compiler.path} is of CUDA {compiler.cuda} and torch {torch.__version__} of CUDA {torch.version.cuda}; "
            f"CUDA_HOME may name a toolkit of CUDA {major}"
        )
    return Path(torch.__file__).parent


def run(command: list[str | Path], failure: str) -> str:
    """Output of a command; NoKernelsError where it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise NoKernelsError(failure, done.stdout)
    return done.stdout


def sources() -> list[Path]:
    """Everything that the binary is made from."""
    return sorted([ROOT / "setup.py", *(path for end in ("cu", "cuh", "h") for path in KERNELS.rglob(f"*.{end}"))])


def source_hash() -> str:
    """Of `sources`; a binary of others is told by it."""
    digest = hashlib.sha256()
    for path in sources():
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    depends = [str(path.relative_to(ROOT)) for path in sources()]
    setup(
        ext_modules=[Extension(f"{PACKAGE}._C", sources=[], depends=depends, py_limited_api=True)],
        cmdclass={"build_ext": BuildKernels},
        options={"bdist_wheel": {"py_limited_api": "cp312"}},
    )
