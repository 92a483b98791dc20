"""What a save takes of each rank: bytes copied, bytes from other ranks, memory, and the time that training waits.

    python benchmarks/save_memory.py [--before CHECKOUT] [--rounds 3] [--output FILE.json]

Four ranks on the CPU hold a bf16 model with fp32 main parameters and two moments in the distributed optimizer: without
experts as DP4, and with most of the parameters in experts as EP2 x DP2. They save three times in the background. The
first plans what the others follow, the second is traced, the third is timed. `--before` measures another checkout, too,
with this one's tiny run: a checkout that lacks what that imports needs the script of its own time (the committed
`before` is of 7388a22, by the script at its first commit).

What a rank writes goes through host memory first (`aten.copy_`), as it does from a GPU; a checkout that has no
`HostMemory` is measured without the copy that it, too, makes on a GPU. `aten.clone` are views, which are cloned on the
CPU alone. State in collectives, which a rank sends and receives, is in the device's memory on a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY))  # behind the checkout that is measured

from benchmarks import figures  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "save_memory.json"
RANKS = 4
EXPERT_SIZES = {"DP4": 1, "EP2 x DP2": 2}
HIDDEN, VOCABULARY, NUM_EXPERTS, EXPERT_HIDDEN = 512, 8192, 8, 512
MEGABYTE = 1e6


def main() -> int:
    """Measure one or two checkouts, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--before", type=Path, help="another checkout, which is measured too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"results (default: {RESULTS.name})")
    parser.add_argument("--ranks-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ranks_of:
        print(json.dumps(measure(options.ranks_of)))
        return 0
    sides = {"before": options.before.resolve()} if options.before else {}
    sides["after"] = REPOSITORY
    results: dict[str, Any] = {"commit": figures.commit(), "machine": platform.machine(), "cores": os.cpu_count()}
    for layout in EXPERT_SIZES:
        rounds: dict[str, list[Any]] = {side: [] for side in sides}
        for _ in range(options.rounds):
            for side, checkout in sides.items():
                rounds[side].append(run_side(checkout, layout))
        results[layout] = {side: summary(measured) for side, measured in rounds.items()}
    print(json.dumps(results, indent=1))
    figures.write(options.output, results)
    return 0


def run_side(checkout: Path, layout: str) -> list[dict[str, Any]]:
    """Measure a checkout with the tests and benchmarks of this one; returns the figures of every rank."""
    with tempfile.TemporaryDirectory() as links:
        Path(links, "megatron_vlm").symlink_to(checkout / "megatron_vlm")
        Path(links, "vlm_kernels").symlink_to(checkout / "kernels" / "vlm_kernels")
        environment = {**os.environ, "PYTHONPATH": f"{links}:{REPOSITORY}", "OMP_NUM_THREADS": "1"}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "benchmarks.save_memory", "--ranks-of", layout]
        done = subprocess.run(command, env=environment, cwd=links, stdout=subprocess.PIPE, text=True, check=True)
    ranks: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    assert all(Path(rank.pop("code")) == checkout for rank in ranks), f"other code than that of {checkout} was measured"
    return ranks


def summary(rounds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Counts of the first round, by rank where ranks differ; memory and times are medians of the largest rank's."""
    counted: dict[str, Any] = {
        name: [rank[name] for rank in rounds[0]] for name in rounds[0][0] if name.startswith("MB")
    }
    counted = {name: ranks if any(rank != ranks[0] for rank in ranks) else ranks[0] for name, ranks in counted.items()}
    measured = {
        name: round(statistics.median(max(rank[name] for rank in ranks) for ranks in rounds), 3)
        for name in rounds[0][0]
        if not name.startswith("MB")
    }
    return counted | measured


def measure(layout: str) -> list[dict[str, Any]]:
    """Run four ranks, forked after the imports; returns the figures of every rank."""
    from megatron_vlm import platform as device

    device.initialize("cpu")
    import tests.checkpoint.tiny_run  # noqa: F401

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_rank, args=(rank, port, layout, folder, queue)) for rank in range(RANKS)]
        for process in processes:
            process.start()
        results: dict[int, dict[str, Any]] = {}
        for _ in processes:
            rank, found = queue.get(timeout=300)
            if "error" in found:
                raise RuntimeError(f"rank {rank} of {layout}: {found['error']}")
            results[rank] = found
        for process in processes:
            process.join()
    return [results[rank] for rank in range(RANKS)]


def _rank(rank: int, port: int, layout: str, folder: str, queue: Any) -> None:
    import torch

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "RANK": str(rank)}
    os.dup2(2, 1)  # what saves print
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=RANKS)
    try:
        queue.put((rank, _save_three_times(layout, folder)))
    except BaseException as error:
        queue.put((rank, {"error": repr(error)}))
        raise


def _save_three_times(layout: str, folder: str) -> dict[str, Any]:
    import megatron_vlm
    from tests.checkpoint import tiny_run
    from tests.checkpoint.moved_bytes import Copies, bytes_on_disk, counted_collectives
    from tests.parity.layouts import TestLayout

    tiny_run.HIDDEN, tiny_run.VOCABULARY = HIDDEN, VOCABULARY
    tiny_run.NUM_EXPERTS, tiny_run.EXPERT_HIDDEN = NUM_EXPERTS, EXPERT_HIDDEN
    tiny_run.FIRST_MOE_LAYER = 0 if EXPERT_SIZES[layout] > 1 else tiny_run.NUM_LAYERS
    run = tiny_run.Run(
        tiny_run.Settings(TestLayout(RANKS, expert=EXPERT_SIZES[layout]), bf16=True), folder, async_save=True
    )
    if importlib.util.find_spec("megatron_vlm.platform.host_memory") is not None:
        from megatron_vlm.platform.host_memory import HostMemory

        run.manager._host_memory = HostMemory()
    found: dict[str, Any] = {"code": str(Path(megatron_vlm.__file__ or "").resolve().parents[1])}
    for name in ("first", "traced", "later"):
        run.train(1)
        if name == "traced":
            with counted_collectives() as calls, Copies() as copies:
                run.save()
            operators = copies.num_bytes.most_common()
            found["MB that operators write"] = {name: round(count / MEGABYTE, 1) for name, count in operators}
            received = sum(num_bytes for call, dtype, num_bytes in calls if dtype.is_floating_point)
            found["MB of state in collectives"] = round(received / MEGABYTE, 1)
        else:
            before = _reset_peak()
            began = time.perf_counter()
            run.save()
            found[f"seconds that training waits, {name} save"] = time.perf_counter() - began
            found[f"largest growth of resident memory, MB, {name} save"] = (_memory_bytes("VmHWM") - before) / MEGABYTE
        run.manager.finalize(blocking=True)
    rank, checkpoint = run.groups.dp_cp.rank(), Path(folder) / "step_00000003"
    found["MB of state, all ranks"] = round(sum(bytes_on_disk(checkpoint, RANKS)) / MEGABYTE, 1)
    found["MB that this rank writes"] = round(bytes_on_disk(checkpoint, RANKS)[rank] / MEGABYTE, 1)
    return found


def _reset_peak() -> int:
    """Let the peak of resident memory begin at what is resident now, which is returned."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory_bytes("VmRSS")


def _memory_bytes(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
