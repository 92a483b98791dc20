"""What of `benchmarks/kernels.py` can be proven without a GPU: its cases, its arithmetic and its committed results."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kernels
from benchmarks.kernel_cases import CASES
from benchmarks.kernel_problem import GIB, OURS, TORCH, Case, Setting, Target

TINY = Setting(torch.device("cpu"), torch.float32, is_tiny=True)
REAL = Setting(torch.device("meta"), torch.bfloat16, is_tiny=False)
MIB = 2**20


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operator}, {case.name}")
def test_sides_compute_the_same(case: Case) -> None:
    torch.manual_seed(0)
    problem = case.build(TINY)
    sides = {OURS: problem.sides[OURS], TORCH: problem.sides[TORCH]}
    # fp32 on both sides.
    assert kernels.largest_difference(problem, sides) < kernels.MAX_DIFFERENCE[torch.float32]
    wrong = sides | {TORCH: lambda *inputs: tuple(1.01 * out for out in kernels.results(sides[TORCH](*inputs)))}
    assert kernels.largest_difference(problem, wrong) > 5e-3


@pytest.mark.parametrize(
    ("operator", "name", "forward_mib", "backward_mib"),
    [
        ("rms_norm", "rms_norm 4096", 128, 192),
        ("rms_norm", "add_rms_norm 4096", 256, 256),
        ("rms_norm", "rms_norm_add_rms_norm 5376 around 0", 336, 504),
        ("rope", "Qwen3-VL 8B", 160, 240),
        ("rope", "Gemma 3 27B", 192, 288),
        ("rope", "heads of 256", 384, 576),
        ("rope", "vision, two axes", 144, 144),
        ("gated", "SwiGLU 12288", 576, 960),
        ("gated", "GeGLU 21504", 1008, 1680),
        ("permute", "permute", 288, 288),
        ("permute", "unpermute weighted", 288, 544),
    ],
)
def test_floors(operator: str, name: str, forward_mib: int, backward_mib: int) -> None:
    """Bytes that must be read and written at the real sizes, counted by hand."""
    (case,) = (case for case in CASES if (case.operator, case.name) == (operator, name))
    floors = case.build(REAL).floors
    assert floors["forward"].num_bytes == forward_mib * MIB
    assert floors["backward"].num_bytes == backward_mib * MIB


def test_operations_of_attention() -> None:
    (case,) = (case for case in CASES if case.name == "512, causal")
    pairs = 32 * 8192 * 8193 / 2
    floors = case.build(REAL).floors
    assert floors["forward"].num_operations == 4 * 512 * pairs
    assert floors["backward"].num_operations == 10 * 512 * pairs
    (sliding,) = (case for case in CASES if case.name == "128, images, window 1024")
    beyond_causal = 16 * 255 * 256 / 2  # keys after a query in its image: 16 images of 256 tokens
    within = sum(min(query + 1, 1024) for query in range(8192)) + beyond_causal
    assert sliding.build(REAL).floors["forward"].num_operations == 4 * 128 * 32 * within


def test_every_operator_has_a_case_and_every_case_a_target() -> None:
    folders = {path.parent.name for path in kernels.KERNELS.glob("*/__init__.py")}
    assert {case.operator for case in CASES} == folders
    assert all(case.targets for case in CASES)
    assert len({(case.operator, case.name) for case in CASES}) == len(CASES)


def test_a_gradient_that_is_no_number_differs() -> None:
    """Also one that is not the first of what is compared."""
    problem = CASES[0].build(TINY)

    def broken(*inputs: torch.Tensor) -> torch.Tensor:
        output = problem.sides[TORCH](*inputs)
        output.register_hook(lambda gradient: gradient * torch.nan)
        return output

    difference = kernels.largest_difference(problem, problem.sides | {OURS: broken})
    assert not difference <= 1e9


def test_what_a_side_writes_over_is_restored() -> None:
    problem = CASES[0].build(TINY)

    def destroys(*inputs: torch.Tensor) -> torch.Tensor:
        output = problem.sides[TORCH](*inputs)
        output.register_hook(lambda _: [tensor.data.zero_() for tensor in inputs] and None)
        return output

    kernels.measure(problem, {"another": destroys}, 1, kernels.Clock(TINY.device))
    assert not any(tensor.any() for tensor in problem.inputs)
    assert kernels.largest_difference(problem, problem.sides) < kernels.MAX_DIFFERENCE[torch.float32]


def run_tiny(path: Path, *options: str) -> list[dict[str, Any]]:
    assert kernels.main(["--tiny", "--rounds", "2", "--output", str(path), *options]) == 0
    figures = json.loads(path.read_text())
    assert figures["tiny"] and figures["kernel_hash"] == kernels.kernel_hash()
    return figures["rows"]


def test_every_step_runs_on_the_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_tiny(tmp_path / "kernels.json", "--no_compile")
    assert {(row["operator"], row["case"]) for row in rows} == {(case.operator, case.name) for case in CASES}
    for row in rows:
        assert "error" not in row and not row["failures"], row
        assert row["floor_share"] > 0 and all(math.isfinite(value) for value in row["seconds"].values())
        assert row["seconds"].keys() >= {OURS, TORCH}
    printed = capsys.readouterr().out
    judged = [target["reached"] for row in rows for target in row["targets"]]
    assert (printed.count(": ok]"), printed.count(": MISS]")) == (sum(judged), len(judged) - sum(judged))


def test_compiled_side_takes_part(tmp_path: Path) -> None:
    assert all("compiled" in row["seconds"] for row in run_tiny(tmp_path / "kernels.json", "--operators", "gated"))


def test_a_failing_side_is_told_and_the_rest_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = next(case for case in CASES if case.operator == "gated")

    def build(setting: Setting) -> kernels.Problem:
        def fails(*inputs: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no such kernel\nand more")

        problem = case.build(setting)
        return replace(problem, sides=problem.sides | {broken: fails})

    monkeypatch.setattr(kernels, "CASES", [replace(case, build=build)])
    for broken in (TORCH, OURS):
        rows = run_tiny(tmp_path / "kernels.json", "--no_compile")
        assert f"{broken} fails: RuntimeError: no such kernel\n" in capsys.readouterr().out
        assert ("error" in rows[0]) == (broken == OURS)


def row(ours: float, **others: float) -> dict[str, Any]:
    seconds = {OURS: ours} | others
    return {
        "direction": "forward",
        "seconds": seconds,
        "times_ours": {name: value / ours for name, value in others.items()},
        "floor_share": 0.5 / ours,
        "temporary_bytes": {OURS: GIB},
    }


@pytest.mark.parametrize(
    ("target", "reached"),
    [
        (Target("forward", 0.49, "floor"), True),
        (Target("forward", 0.51, "floor"), False),
        (Target("forward", 1.9, "liger"), True),
        (Target("forward", 2.1, "liger"), False),
        (Target("forward", GIB + 1.0, "memory"), True),
        (Target("forward", GIB, "memory"), False),
        (Target("forward", 1.0, "flex"), None),
    ],
)
def test_targets(target: Target, reached: bool | None) -> None:
    judged = kernels.judge(target, CASES[0], row(1.0, liger=2.0))
    assert (None if judged is None else judged["reached"]) == reached


def test_hash_of_the_sources(tmp_path: Path) -> None:
    """Any change of a source changes it, in whatever folder; what is built or cached does not."""
    copy = Path(shutil.copytree(kernels.KERNELS, tmp_path / "kernels"))
    original = kernels.kernel_hash()
    assert kernels.kernel_hash(copy) == original
    for name in ("_C.abi3.so", "_C.txt", "rope/__pycache__/reference.cpython-312.pyc"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("built")
    assert kernels.kernel_hash(copy) == original
    seen = {original}
    for pattern in ("*/*.cu", "*/*.cuh", "span_attention/triton_kernels.py", "csrc/*", "library.py"):
        path = next(copy.glob(pattern))
        path.write_bytes(path.read_bytes() + b"\n")
        changed = kernels.kernel_hash(copy)
        assert changed not in seen, path
        seen.add(changed)
    path.rename(copy / "other.py")
    assert kernels.kernel_hash(copy) not in seen


def test_committed_results_are_of_the_present_sources() -> None:
    """Figures of other kernels than those here are none: measure again (`make gpu`), or remove the file."""
    for path in sorted(kernels.RESULTS.glob("kernels_*.json")):
        figures = json.loads(path.read_text())
        assert not figures["tiny"] and path.stem == f"kernels_{kernels._slug(figures['device'])}", path.name
        assert figures["kernel_hash"] == kernels.kernel_hash(), path.name
