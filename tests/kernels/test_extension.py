"""The compiled extension: made from these sources, reached by calls, well compiled; and what happens without it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.kernels.load_extension import CUDA, check_calls, kernel_of, registered
from tests.kernels.marks import needs_extension
from tests.kernels.static_code import ARCHITECTURES, read_code
from tests.sizes import two_sizes
from vlm_kernels import library

ROOT = Path(__file__).parents[2]


def _setup() -> ModuleType:
    specification = importlib.util.spec_from_file_location("setup_of_kernels", ROOT / "setup.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


setup = _setup()


def _has_nvcc() -> bool:
    try:
        return bool(setup.find_nvcc())
    except setup.NoKernelsError:
        return False


needs_toolkit = pytest.mark.skipif(not _has_nvcc(), reason="no CUDA toolkit")


@needs_toolkit
def test_it_is_built_from_these_sources() -> None:
    log = library.BUILD_LOG.read_text().splitlines()
    assert library.BINARY.exists() and log[1] == setup.source_hash(), f"{log[0]}, from other sources: make install"


@needs_toolkit
def test_calls_reach_it() -> None:
    """Through the dispatcher, torch's stable ABI and our checks, up to the launch: nothing is launched for no rows."""
    check_calls()


@needs_toolkit
def test_every_operator_has_its_kernel() -> None:
    names = registered()
    assert len(names) > 5
    assert [name for name in names if kernel_of(name) is None] == []


# Kernels whose accesses are scattered or a handful of numbers.
NO_VECTORS = {
    *("sum_partials", "expert_counts", "expert_index", "chunk_index"),
    *("choose_top", "route_tokens", "route_gradient"),
}
# What only reads rows and writes a few numbers for each.
NO_WIDE_STORES = {"statistics_kernel"}


@needs_toolkit
@pytest.mark.parametrize("architecture", two_sizes(ARCHITECTURES, "sm_90"))
def test_no_spills_and_wide_accesses(architecture: str) -> None:
    codes = read_code(architecture)
    assert len(codes) > 50
    for code in codes:
        assert code.stack_bytes == 0, f"{code.name} keeps {code.stack_bytes} bytes of each thread out of registers"
        assert code.shared_bytes <= 48 << 10
        if code.kernel.startswith("rms_norm") and not code.name.endswith(", 1, 0>"):
            assert code.wide_loads and code.wide_stores, f"{code.name} reads or writes less than 16 bytes at a time"
        if code.kernel.startswith("rope_") and code.name.endswith((", 8>", "float, float, 4>")):
            # Both halves of a head, in and out.
            assert code.wide_loads >= 2 and code.wide_stores >= 2, f"{code.name} has narrow accesses"
    for kernel in {code.kernel for code in codes} - NO_VECTORS:
        variants = [code for code in codes if code.kernel == kernel]
        assert any(code.wide_loads for code in variants), f"no variant of {kernel} loads 16 bytes"
        if kernel not in NO_WIDE_STORES:
            assert any(code.wide_stores for code in variants), f"no variant of {kernel} stores 16 bytes"


@needs_extension
@pytest.mark.parametrize("architecture", two_sizes(ARCHITECTURES, "sm_80", "sm_90"))
@pytest.mark.parametrize("size", [2560, 4096, 5376, 8192])
@pytest.mark.parametrize(("kernel", "weights"), [("rms_norm_gradient", 1), ("rms_norm_add_rms_norm_gradient", 2)])
def test_blocks_of_wide_norms_hide_each_others_barriers(
    kernel: str, weights: int, size: int, architecture: str
) -> None:
    """Of rows of 16-bit elements, in blocks of the threads that rms_norm.cu chooses.

    Before weights' gradients moved to shared memory, one block of 5,376 or 8,192 elements fitted.
    """
    threads = -(-size // (2 * 8) // 32) * 32
    sums_bytes = weights * 2 * 8 * threads * 4
    codes = [code for code in read_code(architecture) if code.kernel == kernel and code.name.endswith(" 8, 2>")]
    assert len(codes) == 2
    for code in codes:
        blocks = code.blocks_per_multiprocessor(architecture, threads, sums_bytes)
        least = 1 if (architecture, weights, size) == ("sm_100", 2, 8192) else 2
        assert blocks >= least, f"{code.name}: {blocks} blocks of {threads} threads"


@needs_extension
@pytest.mark.parametrize("architecture", two_sizes(ARCHITECTURES, "sm_90"))
def test_kernels_of_the_loss_are_compiled_as_intended(architecture: str) -> None:
    """Rows that divide into vectors are read, and written, 16 bytes at a time, and blocks fill a multiprocessor."""
    codes = [code for code in read_code(architecture) if code.kernel in ("statistics_kernel", "gradient_kernel")]
    assert len(codes) == 24
    for code in codes:
        # 2048 threads of 32 registers, or 1536 of 40, or 1280 of 48 fit.
        assert code.stack_bytes == 0 and code.registers <= 48
        if ", 1, " not in code.name:
            # Vectors under way at once, and those of the rest; or those and the token's factors.
            assert code.wide_loads >= 5
            assert code.wide_stores == (4 if code.kernel == "gradient_kernel" else 0)


@pytest.fixture
def no_binary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The library as where nothing was built; yields the log's path."""
    log = tmp_path / "_C.txt"
    monkeypatch.setattr(library, "BINARY", tmp_path / "_C.abi3.so")
    monkeypatch.setattr(library, "BUILD_LOG", log)
    for cached in (library._load_binary, library._complain):
        cached.cache_clear()
    yield log
    for cached in (library._load_binary, library._complain):
        cached.cache_clear()


def _define_double(name: str):
    return library.define(f"{name}(Tensor x) -> Tensor", lambda x: 2 * x, torch.empty_like)


def test_without_it_the_reference_runs_with_one_warning(no_binary: Path) -> None:
    no_binary.write_text("CUDA kernels: not built, no nvcc on the path\nhash\n")
    double, x = _define_double("test_double"), torch.ones(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        double(x)
    with pytest.warns(UserWarning, match="no nvcc on the path. Reference operators run instead.*install again"):
        assert double.redispatch(CUDA, x).equal(2 * x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        double.redispatch(CUDA, x)


def test_strict_mode_refuses_the_reference(no_binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.STRICT_VARIABLE, "1")
    double = _define_double("test_strict_double")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"not built.*or unset {library.STRICT_VARIABLE}"):
            double.redispatch(CUDA, torch.ones(3))
    assert double(torch.ones(3)).sum() == 6


def test_a_binary_that_does_not_load_is_told(no_binary: Path) -> None:
    library.BINARY.write_bytes(b"no library")
    double = _define_double("test_broken_double")
    with pytest.warns(UserWarning, match="CUDA kernels: .*_C.abi3.so"):
        double.redispatch(CUDA, torch.ones(3))


def test_an_operator_that_the_binary_lacks_runs_its_reference() -> None:
    library._complain.cache_clear()
    double = _define_double("test_new_double")
    with pytest.warns(UserWarning, match="CUDA kernels"):
        double.redispatch(CUDA, torch.ones(3))


# Stands in for nvcc: prints a given version and architectures, compiles for these alone and notes each call.
NVCC = """#!{python}
import sys
arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("Cuda compilation tools, release {cuda}, V{cuda}.1")
elif arguments == ["--list-gpu-arch"]:
    print({known!r})
else:
    wanted = [option.split("=")[-1] for option in arguments if option.startswith("-gencode")]
    unknown = [code for code in wanted if code.replace("sm_", "compute_") not in {known!r}.split()]
    if unknown:
        sys.exit(f"nvcc fatal : Unsupported gpu architecture {{unknown[0]!r}}")
    open({log!r}, "a").write(" ".join(wanted) + "\\n")
    open(arguments[arguments.index("-o") + 1], "w").close()
"""
CUDA_OF_TORCH = torch.version.cuda or "13.0"


@pytest.fixture
def fake_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Puts a stand-in of a CUDA version that knows some architectures in CUDA_HOME; gives the log of its calls."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", CUDA_OF_TORCH)

    def install(known: str, cuda: str = CUDA_OF_TORCH) -> Path:
        nvcc, log = tmp_path / "bin/nvcc", tmp_path / "calls"
        nvcc.parent.mkdir(exist_ok=True)
        nvcc.write_text(NVCC.format(python=sys.executable, cuda=cuda, known=known.replace(" ", "\n"), log=str(log)))
        nvcc.chmod(0o755)
        return log

    return install


@pytest.mark.parametrize(
    ("known", "codes", "message"),
    [
        ("compute_80 compute_90 compute_100", "sm_80 sm_90 sm_100 compute_100", "built for sm_80, sm_90, sm_100"),
        (
            "compute_75 compute_80 compute_90",
            "sm_80 sm_90 compute_90",
            f"built for sm_80, sm_90; not for sm_100, which nvcc of CUDA {CUDA_OF_TORCH} does not know",
        ),
        (
            "compute_90 compute_90a compute_100 compute_120",
            "sm_90 sm_100 compute_100",
            f"built for sm_90, sm_100; not for sm_80, which nvcc of CUDA {CUDA_OF_TORCH} does not know",
        ),
    ],
)
def test_it_is_built_for_what_nvcc_knows(
    fake_nvcc: Callable[..., Path], tmp_path: Path, known: str, codes: str, message: str
) -> None:
    log = fake_nvcc(known)
    summary, _ = setup.build(tmp_path / "kernels.so", tmp_path / "build")
    assert summary == f"CUDA kernels: {message}"
    assert (tmp_path / "kernels.so").exists()
    calls = log.read_text().splitlines()
    assert set(calls) == {codes} and len(calls) == 2 + len(list(setup.KERNELS.glob("*/*.cu")))


@pytest.mark.parametrize(
    ("known", "cuda", "message"),
    [
        ("compute_50 compute_60", CUDA_OF_TORCH, "nvcc knows none of sm_80, sm_90, sm_100"),
        (
            "compute_80 compute_90",
            "11.8",
            rf"nvcc is of CUDA 11.8 and torch .* of CUDA {CUDA_OF_TORCH}; CUDA_HOME may name a toolkit of CUDA "
            rf"{CUDA_OF_TORCH.partition('.')[0]}$",
        ),
    ],
)
def test_an_nvcc_that_cannot_serve_is_refused(
    fake_nvcc: Callable[..., Path], tmp_path: Path, known: str, cuda: str, message: str
) -> None:
    log = fake_nvcc(known, cuda)
    with pytest.raises(setup.NoKernelsError, match=message):
        setup.build(tmp_path / "kernels.so", tmp_path / "build")
    assert not log.exists(), "nothing was compiled"


def test_a_missing_or_broken_toolkit_is_named(fake_nvcc: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(setup.NoKernelsError, match=f"no nvcc in {tmp_path}/bin"):
        setup.build(tmp_path / "kernels.so", tmp_path / "build")
    fake_nvcc("compute_80 compute_90 compute_100")
    nvcc = tmp_path / "bin/nvcc"
    nvcc.write_text(nvcc.read_text().replace("wanted =", "sys.exit('cicc: not found')\n    wanted ="))
    with pytest.raises(setup.NoKernelsError, match="nvcc cannot compile an empty kernel") as error:
        setup.build(tmp_path / "kernels.so", tmp_path / "build")
    assert "cicc: not found" in error.value.output
    nvcc.write_text("#!/bin/sh\necho no license; exit 1\n")
    with pytest.raises(setup.NoKernelsError, match="nvcc --version fails") as error:
        setup.build(tmp_path / "kernels.so", tmp_path / "build")
    assert "no license" in error.value.output


@pytest.mark.parametrize("strict", ["0", "1"])
def test_installing_without_a_toolkit(strict: str, tmp_path: Path) -> None:
    for path in ("setup.py", "pyproject.toml", "LICENSE"):
        (tmp_path / path).write_bytes((ROOT / path).read_bytes())
    (tmp_path / "kernels/vlm_kernels").mkdir(parents=True)
    environment = {**os.environ, "CUDA_HOME": "/no/toolkit", library.STRICT_VARIABLE: strict}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    reason = "no nvcc in /no/toolkit/bin"
    if strict == "1":
        assert done.returncode != 0 and reason in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "kernels/vlm_kernels/_C.txt").read_text().startswith(f"CUDA kernels: not built, {reason}\n")
