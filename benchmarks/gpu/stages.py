"""The stages, in order of what is learnt per minute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FIGURES = "FIGURES"
"""Stands in a command for the file to which the stage writes its figures."""


@dataclass(frozen=True)
class Stage:
    """A command of its own, so that none can end or block the others.

    Attributes:
        name: unique.
        purpose: what it tells.
        estimate_seconds: on an H200 with 16 cores and cold caches; arithmetic until one has been measured.
        command: arguments of python, on a GPU.
        dry_command: the same on the host, at tiny sizes or as far as it gets without a GPU.
        wrapper: a program that runs python on the GPU, and its arguments.
        environment: variables that are set on the GPU.
    """

    name: str
    purpose: str
    estimate_seconds: int
    command: tuple[str, ...]
    dry_command: tuple[str, ...]
    wrapper: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def _tests(name: str, purpose: str, estimate_seconds: int, *arguments: str) -> Stage:
    """Tests of `tests/gpu`; several processes share the GPU. On the host, references stand in for kernels."""
    command = ("-m", "pytest", "--color=no", f"--junitxml={FIGURES}", "-v", *arguments)
    # Eight processes with a pool of compilers each would fight for the cores.
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return Stage(name, purpose, estimate_seconds, (*command, "-n", "8"), command, environment=environment)


def _script(name: str, purpose: str, estimate_seconds: int, module: str, *arguments: str, dry: str = "--dry") -> Stage:
    command = ("-m", module, "--output", FIGURES, *arguments)
    return Stage(name, purpose, estimate_seconds, command, (*command, dry))


def _demo(model: str) -> Stage:
    command = ("-m", "demo.run", "--processes", "1", "--model", model)
    # Even the shortest demo is minutes of a host: its command line is read, and its recipe.
    return Stage(f"demo_{model}", "training, resuming, export, answers", 90, command, (*command, "--help"))


_KERNEL_TESTS = tuple(
    f"tests/gpu/test_kernels_{operator}.py"
    for operator in ("permute", "rms_norm", "gated", "rope", "linear_cross_entropy", "span_attention")
)
_ATTENTION_CASES = ("128, images", "128, images, window 1024")

STAGES = (
    _script("operators", "every operator once in bf16, strict", 30, "benchmarks.gpu.operators"),
    _tests("short_rows", "FlexAttention at one short row", 90, "tests/gpu/test_flex_attention.py"),
    _tests("kernels", "every kernel against fp64", 100, *_KERNEL_TESTS),
    _tests("experts", "grouped products, experts without tokens", 25, "tests/gpu/test_one_gpu.py", "-k", "experts"),
    _tests("steps", "a step of each family against transformers", 60, "tests/gpu/test_one_gpu.py", "-k", "not experts"),
    _script("recompilations", "variants over 50 lengths", 50, "benchmarks.gpu.recompilations"),
    _script(
        "span_attention",
        "our kernels against FlexAttention at head size 128",
        50,
        "benchmarks.kernels",
        *("--operators", "span_attention", "--cases", *_ATTENTION_CASES, "--no_compile"),
        dry="--tiny",
    ),
    _script("profile", "launches, idle time, waits of a step", 75, "benchmarks.gpu.profile_steps"),
    Stage(
        "memory_checker",
        "accesses out of bounds, at tiny sizes",
        110,
        ("-m", "benchmarks.gpu.operators", "--output", FIGURES),
        ("-m", "benchmarks.gpu.operators", "--output", FIGURES, "--dry"),
        ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"),
        # A tensor beside another in one allocation would hide what lies beyond it.
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    ),
    _script(
        "kernel_benchmark",
        "time of every kernel",
        115,
        *("benchmarks.kernels", "--no_compile", "--rounds", "7"),
        dry="--tiny",
    ),
    _script("step_time", "step time and MFU beside transformers with Liger", 110, "benchmarks.gpu.step_time"),
    _demo("gemma3"),
    _demo("qwen3_vl_moe"),
    _demo("mistral3"),
)
