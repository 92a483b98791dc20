"""The stages of `python -m benchmarks.gpu`, in order of what is learnt per minute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

FIGURES = "FIGURES"
"""Placeholder in a command for the path of the file to which the stage writes its figures."""


@dataclass(frozen=True)
class Stage:
    """A command that runs in a process of its own, so that none can end or block the others.

    Attributes:
        name: unique name.
        purpose: what the stage checks or measures.
        estimate_seconds: expected duration on an H200 with 16 cores and cold caches; computed, until it is measured.
        command: arguments of python, on a GPU.
        dry_command: arguments of python on the host, at tiny sizes or as far as it gets without a GPU.
        wrapper: a program that runs python on the GPU, and its arguments.
        environment: environment variables that are set on the GPU.
        limit_seconds: time after which the stage is ended.
    """

    name: str
    purpose: str
    estimate_seconds: int
    command: tuple[str, ...]
    dry_command: tuple[str, ...]
    wrapper: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    limit_seconds: int = 120


def _tests(name: str, purpose: str, estimate_seconds: int, *arguments: str) -> Stage:
    """A stage of tests in several processes that share the GPU. On the host, references run in place of kernels."""
    command = ("-m", "pytest", "--color=no", f"--junitxml={FIGURES}", "-v", *arguments)
    # Eight processes with a pool of compilers each would fight for the cores.
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    processes = ("-n", "8"), ("-n", "2")
    return Stage(name, purpose, estimate_seconds, *((*command, *each) for each in processes), environment=environment)


def _script(name: str, purpose: str, estimate_seconds: int, module: str, *arguments: str, dry: str = "--dry") -> Stage:
    command = ("-m", module, "--output", FIGURES, *arguments)
    return Stage(name, purpose, estimate_seconds, command, (*command, dry))


def _demo(model: str) -> Stage:
    command = ("-m", "demo.run", "--processes", "1", "--device", "cuda", "--model", model)
    # A demo takes minutes on a host too: only its command line is parsed there.
    return Stage(
        f"demo_{model}", "training, resuming, export, answers", 150, command, (*command, "--help"), limit_seconds=400
    )


_KERNEL_TESTS = tuple(
    f"tests/gpu/test_kernels_{operator}.py"
    for operator in ("permute", "router", "rms_norm", "gated", "rope", "linear_cross_entropy", "grouped_gradient")
)
_PRODUCT_CASES = ("plain", "capped at 30", "64, images", "256, images, window 1024", "512, images", "512, causal")
_ATTENTION_CASES = ("128, images", "128, images, window 1024")

STAGES = (
    replace(
        _script("operators", "every operator once in bf16, strict", 30, "benchmarks.gpu.operators"),
        environment={"CUDA_LAUNCH_BLOCKING": "1"},  # an error then names the call that caused it
    ),
    _tests("short_rows", "FlexAttention at one short row", 90, "tests/gpu/test_flex_attention.py"),
    _tests("kernels", "kernels of CUDA, and of experts' gradients, against fp64", 60, *_KERNEL_TESTS),
    _tests("experts", "grouped products, experts without tokens", 25, "tests/gpu/test_one_gpu.py", "-k", "experts"),
    _tests("steps", "a step of each family against transformers", 60, "tests/gpu/test_one_gpu.py", "-k", "not experts"),
    _tests("attention", "kernels of Triton against fp64", 95, "tests/gpu/test_kernels_span_attention.py"),
    _script("optimizers", "an update by AdamW and by Muon", 30, "benchmarks.gpu.optimizers"),
    _script("recompilations", "variants over 50 lengths", 45, "benchmarks.gpu.recompilations"),
    _script(
        "span_attention",
        "our kernels against FlexAttention at head size 128",
        50,
        "benchmarks.kernels",
        *("--operators", "span_attention", "--cases", *_ATTENTION_CASES, "--no_compile", "--measure_only"),
        dry="--tiny",
    ),
    _script("profile", "launches, idle time, waits of a step", 70, "benchmarks.gpu.profile_steps"),
    Stage(
        "memory_checker",
        "accesses out of bounds, at tiny sizes",
        110,
        ("-m", "benchmarks.gpu.operators", "--output", FIGURES, "--uncounted"),
        ("-m", "benchmarks.gpu.operators", "--output", FIGURES, "--uncounted", "--dry"),
        ("compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"),
        # A tensor beside another in one allocation would hide what lies beyond it.
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    ),
    _script(
        "kernel_benchmark",
        "time of kernels that memory bounds, and of experts' weight gradients",
        55,
        *("benchmarks.kernels", "--operators", "rms_norm", "rope", "gated", "permute", "router", "grouped_gradient"),
        *("--no_compile", "--rounds", "5", "--measure_only"),
        dry="--tiny",
    ),
    _script(
        "product_benchmark",
        "time of the loss, and of attention at other head sizes",
        100,
        *("benchmarks.kernels", "--operators", "linear_cross_entropy", "span_attention"),
        *("--cases", *_PRODUCT_CASES, "--no_compile", "--rounds", "7", "--measure_only"),
        dry="--tiny",
    ),
    _script("step_time", "step time and MFU beside transformers with Liger", 110, "benchmarks.gpu.step_time"),
    _demo("gemma3"),
    _demo("qwen3_vl_moe"),
    _demo("mistral3"),
)
