"""Bundles what a container without network lacks in one folder: wheels, and the extension built for x86-64.

    python -m benchmarks.gpu.bundle [gpu_bundle]     # make it, where a registry can be reached

Containers bring torch, torchvision, transformers and pytest, in versions like the lower bounds of `pyproject.toml`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
# Requirements of this project and of its benchmarks that clusters' containers do not bring.
MISSING = (
    *("absl-py", "docstring_parser", "emerging-optimizers", "isal", "jsonargparse", "liger-kernel", "megatron-core"),
    *("protobuf", "rich", "sentencepiece", "simpleeval", "soundfile", "soxr"),
)
KERNELS = Path("kernels/vlm_kernels")
BINARY, BUILD_LOG = "_C.abi3.so", "_C.txt"
MAX_BYTES = 60 * 2**20


def main(arguments: list[str]) -> int:
    """Make the folder and return the exit code."""
    folder = Path(arguments[0] if arguments else REPOSITORY / "gpu_bundle").resolve()
    size = make(folder)
    print(f"{folder}: {size / 2**20:.1f} MiB")
    return 0


def make(folder: Path, repository: Path = REPOSITORY) -> int:
    """Fill the folder, replacing an earlier bundle; return its size in bytes.

    Raises:
        SystemExit: the extension is not built from the present sources, or a wheel cannot be downloaded.
    """
    kernels = repository / KERNELS
    if not (kernels / BINARY).exists():
        raise SystemExit(f"{kernels / BINARY} does not exist: `make install` builds it where there is a CUDA toolkit")
    if folder.exists() and not (folder / BUILD_LOG).exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} holds something else than a bundle; name another folder")
    pins = _pins(repository / "constraints.txt")
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        new = Path(work) / "bundle"
        wheels = new / "wheels"
        wheels.mkdir(parents=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        platforms = [f"--platform={name}" for name in ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "any")]
        subprocess.run(
            [*command, "--python-version=3.12", *platforms, f"--dest={wheels}", *(pins[name] for name in MISSING)],
            check=True,
        )
        for name in (BINARY, BUILD_LOG):
            shutil.copy2(kernels / name, new / name)
        size = sum(path.stat().st_size for path in new.rglob("*") if path.is_file())
        if size > MAX_BYTES:
            raise SystemExit(f"the bundle takes {size} bytes, more than {MAX_BYTES}")
        if folder.exists():
            shutil.rmtree(folder)
        new.rename(folder)
    return size


def install(folder: Path, repository: Path) -> Path:
    """Copy the extension to where the kernels look for it, and install the wheels into a folder, which is returned.

    Raises:
        SystemExit: the folder is not a bundle, or its extension was built from other sources.
    """
    log = folder / BUILD_LOG
    if not log.exists():
        raise SystemExit(f"{folder} is no bundle: `make gpu_bundle` makes one")
    built = log.read_text().splitlines()[1]
    if built != (expected := _source_hash(repository)):
        raise SystemExit(
            f"{folder / BINARY} was built from other sources ({built[:12]}, the present ones are {expected[:12]}): "
            "`make gpu_bundle` makes it again"
        )
    for name in (BINARY, BUILD_LOG):
        shutil.copy2(folder / name, repository / KERNELS / name)
    packages = Path(tempfile.mkdtemp(prefix="gpu-packages-"))
    wheels = sorted(map(str, (folder / "wheels").glob("*.whl")))
    pip = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "install", "--quiet"]
    done = subprocess.run([*pip, "--no-index", "--no-deps", "--no-compile", f"--target={packages}", *wheels])
    if done.returncode:
        raise SystemExit(f"pip cannot install {folder / 'wheels'}; its own words are above")
    return packages


def _source_hash(repository: Path) -> str:
    """Hash of the sources that the extension is built from, as `setup.py` computes and records it."""
    code = "import setup; print(setup.source_hash())"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _pins(constraints: Path) -> dict[str, str]:
    """The pinned requirement of each package, by its name."""
    lines = (line.strip() for line in constraints.read_text().splitlines())
    return {line.partition("==")[0]: line for line in lines if "==" in line}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
