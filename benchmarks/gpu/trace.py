"""Summary of a profiler's trace of a GPU: launches, idle time of the GPU, and where the host waited.

Source: Chrome's trace format as torch.profiler writes it, with Kineto's categories.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
FROM_HOST = ("cuda_runtime", "cuda_driver")
# Calls that return only when the device has finished some work.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize")
COPY = "cudaMemcpyAsync"  # waits where it copies from the device to memory that is not page-locked
Event = dict[str, Any]


def summarize(events: Iterable[Event], num_steps: int, top: int = 25) -> dict[str, Any]:
    """Return figures per step of a trace of `num_steps` steps that ends with a wait for the device.

    Args:
        events: the trace's `traceEvents`, with times in microseconds.
        num_steps: number of steps, by which sums are divided.
        top: number of kernels that are listed.

    Returns:
        launches, busy_seconds, span_seconds (from the first to the last thing on the device), idle_share (fraction of
        the span), waits by call (number and seconds), and the kernels with the most time (name, number, seconds).
    """
    complete = [event for event in events if event.get("ph") == "X" and "dur" in event]
    on_device = [event for event in complete if event.get("cat") in ON_DEVICE]
    kernels = [event for event in on_device if event["cat"] == "kernel"]
    # Synchronisations after the last launch are those of the profiler.
    until = max((event["ts"] for event in complete if "aunch" in event["name"]), default=float("inf"))
    intervals = sorted((event["ts"], event["ts"] + event["dur"]) for event in on_device)
    busy = _union(intervals)
    span = max(end for _, end in intervals) - intervals[0][0] if intervals else 0.0
    to_pageable = {_correlation(event) for event in on_device if re.search("DtoH.*Pageable", event["name"])}
    waits: dict[str, list[float]] = defaultdict(list)
    for event in complete:
        if event.get("cat") in FROM_HOST and event["ts"] < until:
            if event["name"] in WAITS:
                waits[event["name"]].append(event["dur"])
            elif event["name"] == COPY and _correlation(event) in to_pageable:
                waits[f"{COPY} to pageable memory"].append(event["dur"])
    seconds: Counter[str] = Counter()
    number: Counter[str] = Counter()
    for event in kernels:
        seconds[event["name"]] += event["dur"] / 1e6
        number[event["name"]] += 1
    return {
        "launches": len(kernels) / num_steps,
        "copies": (len(on_device) - len(kernels)) / num_steps,
        "busy_seconds": busy / 1e6 / num_steps,
        "span_seconds": span / 1e6 / num_steps,
        "idle_share": 1 - busy / span if span else None,
        "waits": {
            name: {"number": len(times) / num_steps, "seconds": sum(times) / 1e6 / num_steps}
            for name, times in sorted(waits.items())
        },
        "kernels": [
            {"name": name[:120], "number": number[name] / num_steps, "seconds": total / num_steps}
            for name, total in seconds.most_common(top)
        ],
    }


def _correlation(event: Event) -> Any:
    return event.get("args", {}).get("correlation")


def _union(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of sorted intervals, which overlap where streams do."""
    total, end = 0.0, float("-inf")
    for begin, stop in intervals:
        total += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return total
