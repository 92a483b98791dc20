"""Counts how often FlexAttention is compiled over rows of 50 lengths, windows, training and evaluation, and times it.

    python -m benchmarks.gpu.recompilations [--dry] [--output FILE.json]

Heads are those of Qwen3-VL 2B's text. Results are compared with the reference at some lengths. The exit code is 1 with
more than 10 variants: each costs seconds, and past dynamo's limit attention would silently run uncompiled.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._dynamo.utils import counters

from benchmarks import figures
from megatron_vlm import platform
from vlm_kernels.span_attention import Spans, flex, reference

HEADS, KEY_HEADS, HEAD_DIM = 16, 8, 128
WINDOWS = (None, 1024)
MAX_VARIANTS = 10
MAX_DIFFERENCE = 2e-2  # relative to the norm: bf16 keeps 8 bits
COMPARED_LENGTHS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on the host: traced, not compiled, and evaluation alone")
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    options = parser.parse_args(arguments)
    device = platform.initialize().device
    lengths = random.Random(1).sample(range(2, 200 if options.dry else 4097), 50)
    if options.dry:
        compile_on_gpu = torch.compile
        with mock.patch.object(torch, "compile", lambda function, **o: compile_on_gpu(function, backend="eager", **o)):
            flex.compiled()
    found = measure(lengths, device, (False,) if options.dry else (True, False))
    print(f"{found['variants']} variants, {found['seconds']:.0f} s, differences up to {found['difference']:.1e}")
    if options.output:
        figures.write(options.output, found)
    return 0 if found["variants"] <= MAX_VARIANTS and found["difference"] <= MAX_DIFFERENCE else 1


def measure(lengths: Sequence[int], device: torch.device, modes: Sequence[bool]) -> dict[str, Any]:
    """Run attention over one row of each length, with gradients and without; return the figures."""
    counters.clear()
    torch.manual_seed(0)
    differences, slowest = [], 0.0
    began = time.perf_counter()
    for number, length in enumerate(lengths):
        place = torch.arange(length, dtype=torch.int32, device=device)[None]
        spans = Spans(torch.zeros_like(place), place)
        for window in WINDOWS:
            for is_training in modes:
                turn = time.perf_counter()
                found = attend(flex.attend, length, spans, window, is_training, device)
                slowest = max(slowest, time.perf_counter() - turn)
                if number % (len(lengths) // COMPARED_LENGTHS) == 0:
                    expected = attend(reference, length, spans, window, is_training, device)
                    differences += [
                        (ours.double() - theirs.double()).norm() / theirs.double().norm()
                        for ours, theirs in zip(found, expected, strict=True)
                    ]
    return {
        "variants": counters["stats"]["unique_graphs"],
        "lengths": len(lengths),
        "calls": len(lengths) * len(WINDOWS) * len(modes),
        "seconds": time.perf_counter() - began,
        "slowest_call_seconds": slowest,
        "difference": torch.stack(differences).max().item(),  # NaN if any of them is NaN
    }


def attend(
    form: Any, length: int, spans: Spans, window: int | None, is_training: bool, device: torch.device
) -> list[torch.Tensor]:
    """Return the output and, in training, gradients of one implementation, the same inputs for each."""
    generator = torch.Generator(device).manual_seed(length)
    q, k, v = (
        torch.randn((length, 1, heads, HEAD_DIM), device=device, dtype=torch.bfloat16, generator=generator)
        .permute(1, 2, 0, 3)
        .requires_grad_(is_training)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    output = form(q, k, v, spans, window, HEAD_DIM**-0.5)
    return [output, *torch.autograd.grad(output.float().sum(), (q, k, v))] if is_training else [output]


if __name__ == "__main__":
    sys.exit(main())
