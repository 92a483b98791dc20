"""Attention by Transformer Engine against the reference and FlexAttention: results first, then time.

    python -m benchmarks.gpu.transformer_engine [--dry] [--output FILE.json]

At small sizes, output and gradients are compared with the reference in fp64; at those of training, both are timed in
turn. It prints which head sizes may be added to `PROVEN` in kernels/vlm_kernels/span_attention/transformer_engine.py:
those whose results are right and that are not slower in any case. The exit code is 1 where a result is wrong. Where
Transformer Engine is not installed, it says so and does nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch

from benchmarks import figures
from benchmarks.kernel_problem import FLEX, OURS, Problem, Setting
from benchmarks.kernels import MAX_DIFFERENCE, Clock, measure, release_memory, run
from megatron_vlm import platform
from vlm_kernels.span_attention import Documents, Spans, flex, reference, transformer_engine

ROUNDS = 7
SMALLER = 16  # of lengths and windows, for the reference, which needs memory for all scores
TEXT, PACKED, FRAMES = (8192,), (300, 1200, 2500, 800, 3392), (1024, 1024, 4096, 500, 1548)


@dataclass(frozen=True)
class Case:
    """Attention of one row: its documents, heads, and what a query sees of its document."""

    lengths: tuple[int, ...]
    heads: int
    key_heads: int
    head_dim: int
    window: int | None = None
    seen: Literal["past", "all"] = "past"

    @property
    def name(self) -> str:
        """The sizes in words."""
        documents = f"{len(self.lengths)} documents of {sum(self.lengths)} tokens, of which queries see {self.seen}"
        return f"{self.heads}/{self.key_heads} x {self.head_dim}, window {self.window}, {documents}"

    def smaller(self, factor: int) -> Case:
        """The same with shorter documents."""
        window = self.window and -(-self.window // factor)
        return replace(self, lengths=tuple(-(-length // factor) for length in self.lengths), window=window)

    def spans(self, device: torch.device) -> Spans:
        """The visible ranges, with what the host knows of them."""
        lengths = torch.tensor(self.lengths)
        place, end = torch.arange(int(lengths.sum())), lengths.cumsum(0)
        low, last = (torch.repeat_interleave(values, lengths) for values in (end - lengths, end - 1))
        high = place if self.seen == "past" else last
        bounds = (bound[None].int().to(device) for bound in (low, high))
        return Spans(*bounds, documents=Documents(self.lengths, self.seen), backend="transformer_engine")

    def problem(self, setting: Setting) -> Problem:
        """Random tensors as projections write them, and both sides."""
        length, spans = sum(self.lengths), self.spans(setting.device)
        shapes = [(length, 1, heads, self.head_dim) for heads in (self.heads, self.key_heads, self.key_heads)]
        inputs = [setting.randn(*shape).detach().permute(1, 2, 0, 3).requires_grad_() for shape in shapes]
        sides = {OURS: self.side(transformer_engine.attend, spans), FLEX: self.side(flex.attend, spans)}
        return Problem(inputs, sides, {}, self.name)

    def side(self, form: Callable[..., torch.Tensor], spans: Spans) -> Callable[..., torch.Tensor]:
        """One implementation as a function of queries, keys and values."""
        return lambda q, k, v: form(q, k, v, spans, self.window, self.head_dim**-0.5)


CASES = (
    Case(FRAMES, 16, 16, 64, seen="all"),  # Pixtral, Qwen3-VL 2B
    Case(FRAMES, 16, 16, 72, seen="all"),  # Qwen3-VL 8B and larger
    Case(TEXT, 32, 8, 128),  # Qwen3-VL 8B
    Case(PACKED, 32, 8, 128),
    Case(PACKED, 32, 16, 128, window=1024),  # Gemma 3 27B
    Case(TEXT, 8, 4, 256, window=1024),  # Gemma 3 4B
    Case(PACKED, 8, 4, 256),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on the host, with stand-ins, at tiny sizes")
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    options = parser.parse_args(arguments)
    device = platform.initialize().device
    with ExitStack() as stack:
        if options.dry:
            from tests.stand_ins.transformer_engine import installed

            stack.enter_context(installed())
            stack.enter_context(mock.patch.object(flex, "attend", reference))
        absent = transformer_engine.why_absent()
        if absent is None:
            found = examine(device, options.dry)
        else:
            print(f"Transformer Engine is not installed, nothing is measured: {absent}")
            found = {"absent": absent}
    if options.output:
        figures.write(options.output, found)
    return 1 if found.get("wrong") else 0


def examine(device: torch.device, is_dry: bool) -> dict[str, Any]:
    """Compare and time every case; return the figures."""
    setting = Setting(device, torch.float32 if is_dry else torch.bfloat16, is_dry)
    clock, rows = Clock(device), []
    for case in CASES:
        difference = compare(case.smaller(SMALLER), setting)
        problem = (case.smaller(8 * SMALLER) if is_dry else case).problem(setting)
        for side in problem.sides.values():  # compiles
            run(problem, side)
        seconds = measure(problem, problem.sides, 1 if is_dry else ROUNDS, clock)
        ratio = seconds[FLEX]["both"] / seconds[OURS]["both"]
        is_right = difference <= MAX_DIFFERENCE[setting.dtype]
        print(f"{case.name}: differs by {difference:.1e}, {ratio:.2f} times as fast as FlexAttention", flush=True)
        rows.append({"case": case.name, "head_dim": case.head_dim, "difference": difference, "seconds": seconds})
        rows[-1] |= {"times_as_fast_as_flex": ratio, "is_right": is_right}
        del problem
        release_memory()
    behind = {row["head_dim"] for row in rows if not row["is_right"] or row["times_as_fast_as_flex"] < 1}
    provable = sorted({row["head_dim"] for row in rows} - behind)
    print(f"right, and not slower than FlexAttention in any case: head sizes {provable or 'none'}")
    return {"rows": rows, "provable": provable, "wrong": [row["case"] for row in rows if not row["is_right"]]}


def compare(case: Case, setting: Setting) -> float:
    """Return the largest difference of output and gradients from the reference in fp64, relative to the norm."""
    problem = case.problem(setting)
    wide = [tensor.detach().double().requires_grad_() for tensor in problem.inputs]
    exact = case.side(reference, case.spans(setting.device))
    found = []
    for side, inputs in ((problem.sides[OURS], problem.inputs), (exact, wide)):
        output = side(*inputs)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        found.append([output, *torch.autograd.grad(output, inputs, weights)])
    differences = [((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in zip(*found, strict=True)]
    return max(differences)


if __name__ == "__main__":
    sys.exit(main())
