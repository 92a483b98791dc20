"""The ranks of `startup_counts.py`: one program for every checkout, so it imports only what all of them have.

python -m benchmarks.startup_ranks prepare FOLDER MEGABYTES | train FOLDER NAME | compare FOLDER NAME NAME
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import mmap
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed

from benchmarks.startup_counts import PIPELINE, RANKS, ROW_CHARACTERS, TENSOR

STEPS, GLOBAL_BATCH = 3, 4


def prepare(folder: Path, megabytes: str) -> dict[str, Any]:
    """Build a model directory and a data file whose first rows are those that are read."""
    from tests.training.loop_run import build_place

    place = build_place(folder)
    rows = (place.data / "train.jsonl").read_text().rstrip("\n") + "\n"
    filling = json.dumps({"messages": [{"role": "user", "content": "x" * ROW_CHARACTERS}]}) + "\n"
    with (place.data / "large.jsonl").open("w") as file:
        file.write(rows * 4)
        for _ in range(int(megabytes) * 1_000_000 // len(filling)):
            file.write(filling)
    (folder / "model_path").write_text(str(place.model))
    return {}


def train(folder: Path, name: str) -> dict[str, Any]:
    """Train on eight ranks, forked from this process after the imports, and then start once more."""
    from megatron_vlm import platform

    platform.initialize("cpu")
    import megatron_vlm.training.loop  # noqa: F401

    context = multiprocessing.get_context("fork")
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for start in ("first", "second"):
            queue = context.Queue()
            port = _free_port()
            processes = [
                context.Process(target=_rank, args=(rank, port, folder, name, start, temporary, queue))
                for rank in range(RANKS)
            ]
            for process in processes:
                process.start()
            found = {}
            for _ in processes:
                rank, counted = queue.get(timeout=300)
                if "error" in counted:
                    raise RuntimeError(f"rank {rank} of {name}: {counted['error']}")
                found[rank] = counted
            for process in processes:
                process.join()
            results[start] = [found[rank] for rank in range(RANKS)]
    for first, second in zip(results["first"], results["second"], strict=True):
        first |= {f"second_{key}": second[key] for key in ("loader_seconds", "hashed_bytes")}
    code = Path(platform.__file__).resolve().parents[2]
    data_bytes = (folder / "data" / "large.jsonl").stat().st_size
    return {"ranks": results["first"], "data_bytes": data_bytes, "code": str(code)}


def compare(folder: Path, left: str, right: str) -> dict[str, Any]:
    """Whether two exports have the same tensors, bit for bit, and the same other files."""
    from tests.checkpoint.hf_files import content

    return {"equal": content(folder / left / "export") == content(folder / right / "export")}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _rank(rank: int, port: int, folder: Path, name: str, start: str, temporary: str, queue: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    tempfile.tempdir = temporary
    out = os.open(folder / f"{name}.{start}.{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    is_first = start == "first"
    try:
        queue.put((rank, _train(folder, name if is_first else f"{name}.second", is_first)))
    except BaseException as error:
        queue.put((rank, {"error": repr(error)}))
        raise


def _train(folder: Path, name: str, is_first: bool) -> dict[str, Any]:
    """One start of a run; the second only sets up."""
    from megatron_vlm.checkpoint.hf import SafetensorsWriter
    from megatron_vlm.checkpoint.run_owner import RunOwner
    from megatron_vlm.cli import load_config
    from megatron_vlm.conversion import export_plan
    from megatron_vlm.data import index
    from megatron_vlm.training import setup
    from megatron_vlm.training.loop import Trainer
    from megatron_vlm.training.signals import StopRequests

    settings = {
        "run_dir": folder / name,
        "model.hf_path": (folder / "model_path").read_text(),
        "data.train": f"[{{path: {folder / 'data' / 'large.jsonl'}}}]",
        "data.seq_length": 96,
        "data.num_workers": 0,
        "data.shuffle": "false",
        "train.train_iters": STEPS,
        "train.global_batch_size": GLOBAL_BATCH,
        "train.precision": "fp32",
        "parallel.tensor_model_parallel_size": TENSOR,
        "parallel.pipeline_model_parallel_size": PIPELINE,
        "checkpoint.save_interval": 1,
        "checkpoint.export_hf": folder / name / "export",
        "device": "cpu",
    }
    export_plan.UNDIVIDED_BYTES = 0  # as if the model were large; earlier code does not look at it
    counts = Counter[str]()
    try:
        from megatron_vlm.data import media_loading as loading
    except ImportError:  # earlier code
        from megatron_vlm.data import rows as loading
    _count(loading, "load_image", lambda *_: counts.update(images=1))
    _count(SafetensorsWriter, "write", lambda *given: counts.update(written_bytes=given[-1].nbytes))
    blocks = index._blocks

    def counted_blocks(*given: Any) -> Any:
        for block in blocks(*given):
            counts.update(hashed_bytes=len(block))
            yield block

    index._blocks = counted_blocks
    build_loaders = setup._build_loaders

    def timed_loaders(*given: Any) -> Any:
        began = time.perf_counter()
        loaders = build_loaders(*given)
        counts.update(loader_seconds=time.perf_counter() - began)  # type: ignore[arg-type]
        return loaders

    setup._build_loaders = timed_loaders
    calls: dict[str, list[int]] = {"step_calls": [], "save_calls": [], "save_bytes": []}
    config = load_config([f"--{key}={value}" for key, value in settings.items()])
    setup.initialize_distributed(config.parallel.distributed_timeout_minutes, "cpu")
    began = time.perf_counter()
    with StopRequests() as requests, RunOwner(config.run_dir) as owner:
        run = setup.set_up(config, owner, requests)
        counts.update(setup_seconds=time.perf_counter() - began)  # type: ignore[arg-type]
        if is_first:
            counts.update(_index_bytes())
            trainer = Trainer(run, requests)
            _count_calls(trainer, calls)
            trainer.run()
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    names = "images written_bytes hashed_bytes loader_seconds setup_seconds index_bytes pickled_bytes".split()
    return {name: counts[name] for name in names} | calls


def _count(owner: Any, name: str, note: Any) -> None:
    kept = getattr(owner, name)

    @functools.wraps(kept)
    def counted(*given: Any, **options: Any) -> Any:
        note(*given)
        return kept(*given, **options)

    setattr(owner, name, counted)


def _index_bytes() -> dict[str, int]:
    """Bytes of offsets in this process' own memory, and bytes of the largest reader of rows, pickled."""
    from megatron_vlm.data.index import JsonlIndex
    from megatron_vlm.data.rows import RowReader

    found: dict[str, int] = {"index_bytes": 0, "pickled_bytes": 0}
    for each in gc.get_objects():
        if isinstance(each, JsonlIndex):
            arrays = (each.starts, each.ends, each.rows_after_blanks)
            found["index_bytes"] += sum(array.nbytes for array in arrays if not _is_mapped(array))
        elif isinstance(each, RowReader):
            found["pickled_bytes"] = max(found["pickled_bytes"], len(pickle.dumps(each.sources)))
    return found


def _is_mapped(array: Any) -> bool:
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return isinstance(array, mmap.mmap)


def _count_calls(trainer: Any, calls: dict[str, list[int]]) -> None:
    """Count collectives of all ranks that carry objects, in each step and each save."""
    from tests.object_collectives import counted

    step, save, finalize = trainer._step, trainer._save, trainer.run_state.checkpoints.finalize

    def counted_step() -> Any:
        with counted() as made:
            request = step()
        calls["step_calls"].append(sum(count for (_, ranks), count in made.items() if ranks == RANKS))
        return request

    def counted_save() -> None:
        sizes: list[int] = []
        with counted() as made, _sizes_of_objects(sizes):
            save()
            finalize(blocking=True)
        calls["save_calls"].append(sum(count for (_, ranks), count in made.items() if ranks == RANKS))
        calls["save_bytes"].append(sum(sizes))

    trainer._step, trainer._save = counted_step, counted_save


@contextlib.contextmanager
def _sizes_of_objects(sizes: list[int]) -> Any:
    """Note the bytes of each object that this rank sends to all ranks or to the first."""
    from torch.distributed import distributed_c10d

    kept = distributed_c10d._object_to_tensor

    def noted(*given: Any) -> Any:
        result = kept(*given)
        group = next((each for each in given[1:] if isinstance(each, torch.distributed.ProcessGroup)), None)
        if torch.distributed.get_world_size(group) == RANKS:
            sizes.append(len(result[0]))
        return result

    distributed_c10d._object_to_tensor = noted
    try:
        yield
    finally:
        distributed_c10d._object_to_tensor = kept


if __name__ == "__main__":
    program, directory, *arguments = sys.argv[1:]
    functions = {"prepare": prepare, "train": train, "compare": compare}
    print(json.dumps(functions[program](Path(directory), *arguments)))
