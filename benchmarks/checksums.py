"""Time of loading a checkpoint with its checksums compared, against torch's own reader, which does not look at them.

    python benchmarks/checksums.py [--gigabytes 2] [--rounds 7] [--output FILE.json]

Both read the same records into the same memory, in turn, out of the page cache: the cost beside a real disk is smaller.
The ratio is that of the medians. Saving costs nothing more than before: torch always writes the checksums.

Limit: 1.25; the exit code is 1 beyond it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint
from torch.distributed.checkpoint import FileSystemReader

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]

from megatron_vlm.checkpoint.torch_dist import CheckedFileReader  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "checksums.json"
TENSOR_BYTES = 128 * 2**20
MAX_RATIO = 1.25
READERS: dict[str, type[FileSystemReader]] = {"torch": FileSystemReader, "checked": CheckedFileReader}


def main() -> int:
    """Measure, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", help="where to write the checkpoint (default: the system's temporary directory)")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"results (default: {RESULTS.name})")
    options = parser.parse_args()
    count = max(1, round(options.gigabytes * 1e9 / TENSOR_BYTES))
    state = {f"weight.{number}": torch.randn(TENSOR_BYTES // 4096, 1024) for number in range(count)}
    seconds: dict[str, list[float]] = {name: [] for name in READERS}
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        torch.distributed.checkpoint.save(state, checkpoint_id=folder, no_dist=True)
        for number in range(options.rounds + 1):
            for name, reader in READERS.items():
                began = time.perf_counter()
                torch.distributed.checkpoint.load(state, storage_reader=reader(folder), no_dist=True)
                if number:  # the first round fills the page cache
                    seconds[name].append(time.perf_counter() - began)
    ratio = statistics.median(seconds["checked"]) / statistics.median(seconds["torch"])
    gigabytes = count * TENSOR_BYTES / 1e9
    for name, times in seconds.items():
        print(f"{name:8s} {statistics.median(times):6.2f} s, {gigabytes / statistics.median(times):5.2f} GB/s")
    print(f"ratio {ratio:.2f}, at most {MAX_RATIO}")
    results = {"torch": torch.__version__, "machine": platform.machine(), "cores": os.cpu_count()}
    results |= {"gigabytes": gigabytes, "seconds": seconds, "ratio": ratio}
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if ratio <= MAX_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
