"""Saving: in the background, atomic under kills and write errors, never over an older checkpoint."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import random
import resource
import signal
import time
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint import FileSystemWriter

from megatron_vlm import progress
from megatron_vlm.checkpoint import run_folder
from megatron_vlm.errors import CheckpointError
from megatron_vlm.platform import checkpointing
from tests.checkpoint.tiny_run import EMBEDDING, Run, Settings
from tests.parity.layouts import TestLayout
from tests.ranks import run_ranks

PAIR = Settings(TestLayout(2))


def embedding(run: Run) -> torch.Tensor:
    return dict(run.chunks[0].module.named_parameters())[EMBEDDING].detach().clone()


def test_background_save_holds_the_values_of_its_step(tmp_path):
    for saved, loaded, later in run_ranks(2, _save_in_background, str(tmp_path)):
        assert torch.equal(saved, loaded)
        assert not torch.equal(saved, later)


def _save_in_background(folder: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    run = Run(PAIR, folder, async_save=True)
    run.train(2)
    saved = embedding(run)
    assert run.save()
    run.train(3)  # while the writer writes
    waited_until = time.monotonic() + 30
    while not run.manager.finalize():
        assert time.monotonic() < waited_until
    assert run.manager.latest_step() == 2
    resumed = Run(PAIR, folder)
    resumed.load()
    return saved, embedding(resumed), embedding(run)


def test_writer_outlives_a_signal_to_the_whole_job(tmp_path):
    assert run_ranks(2, _signal_the_writer, str(tmp_path)) == [1, 1]


def _signal_the_writer(folder: str) -> int | None:
    run = Run(PAIR, folder, async_save=True)
    others = multiprocessing.active_children()
    write = filesystem_async.FileSystemWriterAsync.write_preloaded_data

    def write_slowly(*arguments, **keywords):
        time.sleep(0.3)
        return write(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filesystem_async.FileSystemWriterAsync, "write_preloaded_data", write_slowly)
        run.train(1)
        run.save()
        time.sleep(0.1)
        (writer,) = set(multiprocessing.active_children()) - set(others)
        os.kill(writer.pid, signal.SIGTERM)
        run.manager.finalize(blocking=True)
    return run.manager.latest_step()


def test_save_starts_no_process_and_is_not_repeated(tmp_path):
    assert run_ranks(2, _save_twice, str(tmp_path)) == [(True, False)] * 2
    assert os.listdir(tmp_path) == ["step_00000001"]


def _save_twice(folder: str) -> tuple[bool, bool]:
    children = multiprocessing.active_children()
    run = Run(PAIR, folder)
    run.train(1)
    first = run.save()
    before = (Path(folder) / "step_00000001" / ".metadata").stat()
    second = run.save()
    assert (Path(folder) / "step_00000001" / ".metadata").stat() == before
    assert multiprocessing.active_children() == children
    assert isinstance(filesystem_async._results_queue, checkpointing._WriteResults)
    return first, second


PROGRESS_SETTINGS = {
    "tensor and pipeline": Settings(TestLayout(4, tensor=2, pipeline=2, expert=2)),
    "optimizer not distributed": Settings(TestLayout(2), distributed_optimizer=False),
    "bf16, gathered late": Settings(TestLayout(2), bf16=True, overlap_param_gather=True),
}


@pytest.mark.parametrize("settings", PROGRESS_SETTINGS.values(), ids=PROGRESS_SETTINGS)
def test_a_save_that_is_waited_for_shows_the_bytes_on_disk(tmp_path, settings):
    """The bytes announced are those of the tensors on disk, where torch.save adds a header to each."""
    ranks = run_ranks(settings.layout.world_size, _save_slowly, settings, str(tmp_path))
    announced, lines = ranks[0]
    assert {other for other, _ in ranks} == {announced} and not any(lines for _, lines in ranks[1:])
    files = list((tmp_path / "step_00000001").glob("*.distcp"))
    on_disk = sum(path.stat().st_size for path in files)
    tensors = torch.distributed.checkpoint.FileSystemReader(tmp_path / "step_00000001").read_metadata()
    headers = 4096 * len(tensors.storage_data)
    assert announced <= on_disk <= announced + headers
    assert lines and all(line.startswith("saving step_00000001: ") and "/s" in line for line in lines)


def _save_slowly(settings: Settings, folder: str) -> tuple[int, list[str]]:
    rank, stream = dist.get_rank(), io.StringIO()
    write = filesystem_async.FileSystemWriterAsync.write_preloaded_data

    def write_slowly(*arguments, **keywords):
        time.sleep(0.4 if rank else 0.1)
        return write(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filesystem_async.FileSystemWriterAsync, "write_preloaded_data", write_slowly)
        patch.setattr(progress, "LINE_AFTER_SECONDS", 0.05)
        patch.setattr(progress, "LINE_EVERY_SECONDS", 0.05)
        patch.setattr("sys.stderr", stream)
        patch.setenv("RANK", str(rank))
        run = Run(settings, folder)
        run.train(1)
        run.save()
    return run.manager._num_bytes, stream.getvalue().splitlines()


def test_keep_last(tmp_path):
    run_ranks(2, _save_often, str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["step_00000003", "step_00000004"]


def _save_often(folder: str) -> None:
    run = Run(PAIR, folder, keep_last=2, async_save=True)
    for _ in range(4):
        run.train(1)
        run.save()
    run.manager.finalize(blocking=True)


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("failure", ["data", "metadata", "writer killed"])
def test_write_error_leaves_earlier_checkpoints(tmp_path, failure, async_save):
    messages = run_ranks(2, _save_into_trouble, str(tmp_path), failure, async_save)
    expected = {"data": "File too large", "metadata": "No space left on device", "writer killed": "ended early"}
    for message in messages:
        assert expected[failure] in message and "earlier checkpoints are intact" in message
        assert failure == "metadata" or "rank 1: " in message
    assert sorted(os.listdir(tmp_path)) == ["step_00000001", "step_00000003"]


def _save_into_trouble(folder: str, failure: str, async_save: bool) -> str:
    run = Run(PAIR, folder, async_save=async_save)
    run.train(1)
    run.save()
    run.manager.finalize(blocking=True)
    run.train(1)
    with pytest.raises(CheckpointError) as caught, _Trouble(failure):
        run.save()
        run.manager.finalize(blocking=True)
    assert run.manager.latest_step() == 1
    run.train(1)
    run.save()
    run.manager.finalize(blocking=True)
    return str(caught.value)


class _Trouble:
    """Rank 1 cannot write its data, or its writer dies; or rank 0 cannot write the metadata."""

    def __init__(self, failure: str) -> None:
        self.failure = failure
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> None:
        if self.failure == "metadata":

            def full(*_: object) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            self.patch.setattr(FileSystemWriter, "finish", full)
        elif dist.get_rank() == 1 and self.failure == "data":
            self.old = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2048, self.old[1]))
        elif dist.get_rank() == 1:
            kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
            self.patch.setattr(checkpointing, "_write_files", kill)

    def __exit__(self, *_: object) -> None:
        self.patch.undo()
        if dist.get_rank() == 1 and self.failure == "data":
            resource.setrlimit(resource.RLIMIT_FSIZE, self.old)


# Moments at which the whole run is killed: what is replaced, and whether the new checkpoint counts afterwards.
MOMENTS = {
    "while the data is written": (checkpointing, "_write_files", False),
    "before the metadata": (FileSystemWriter, "finish", False),
    "before the manifest": (run_folder.Manifest, "write", False),
    "before publishing": (run_folder, "publish", False),
    "before retiring": (run_folder, "retire", True),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_while_saving_keeps_the_previous_checkpoint(tmp_path, moment):
    counts = MOMENTS[moment][2]
    killed = _fork(partial(_die_while_saving, str(tmp_path), moment))
    assert killed.exitcode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2  # one complete, and the other half-way or complete
    steps = run_folder.published_steps(tmp_path)
    assert steps == ([1, 2] if counts else [1])
    assert _fork(partial(_resume_and_save, str(tmp_path), steps[-1])).exitcode == 0
    assert run_folder.published_steps(tmp_path) == [*steps, steps[-1] + 1]
    assert len(os.listdir(tmp_path)) == len(steps) + 1, "the half-written checkpoint was not cleaned"


def _fork(target) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=partial(_alone, target))
    process.start()
    process.join(60)
    return process


def _alone(target) -> None:
    """Run `target` as the only rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    target()


def _die_while_saving(folder: str, moment: str) -> None:
    run = Run(Settings(), folder)
    run.train(1)
    run.save()
    run.train(1)
    owner, name, _ = MOMENTS[moment]
    original, process = getattr(owner, name), os.getpid()

    def kill(*arguments, **keywords):
        os.kill(process, signal.SIGKILL)
        time.sleep(0.5)  # only the writer process gets here: it outlives the run and goes on writing
        return original(*arguments, **keywords)

    setattr(owner, name, kill)
    run.save()


def _resume_and_save(folder: str, expected_step: int) -> None:
    run = Run(Settings(), folder)
    run.manager.clean()
    resumed = run.load()
    assert resumed is not None and resumed.step == expected_step
    reference = Run(Settings(), folder)
    reference.train(expected_step)
    assert torch.equal(embedding(run), embedding(reference))
    run.train(1)
    assert run.save()


def test_folder_that_cannot_be_made_is_reported_on_every_rank(tmp_path):
    (tmp_path / "file").write_text("")
    for message in run_ranks(2, _save_fails, str(tmp_path / "file")):
        assert str(tmp_path / "file") in message


def _save_fails(folder: str) -> str:
    run = Run(PAIR, folder)
    with pytest.raises(CheckpointError) as caught:
        run.save()
    return str(caught.value)


def test_saves_planned_before_hold_what_a_first_save_holds(tmp_path):
    """Later saves follow the plans of the first, but not where other tensors are saved than before."""
    for same in run_ranks(4, _save_many, str(tmp_path)):
        assert same == [True] * 4


def _save_many(folder: str) -> list[bool]:
    settings = Settings(TestLayout(4, pipeline=2))
    run = Run(settings, f"{folder}/run", async_save=False)
    run.train(1)
    weights_only = run.manager.save(0, run.chunks, None, None, {}, "")
    same = [weights_only]
    for step in (1, 2, 3):
        if step > 1:
            run.train(1)
        assert run.save()
        state = run.local_state()
        resumed = Run(settings, f"{folder}/run")
        assert resumed.load().step == step
        same.append(_are_equal(resumed.local_state(), state))
    return same


def _are_equal(left: dict, right: dict) -> bool:
    values = [(value, right[key]) for key, value in left.items()]
    return left.keys() == right.keys() and all(
        torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other for one, other in values
    )


def test_random_states_of_earlier_checkpoints_are_restored():
    name, keys, *rest = numpy.random.RandomState(3).get_state()
    python = random.Random(3)
    python.gauss()
    earlier = checkpointing.random_state() | {
        "python": python.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(numpy.int64)), *rest),
    }
    before = checkpointing.random_state()
    try:
        checkpointing.set_random_state(earlier)
        again = checkpointing.random_state()
        drawn = [random.gauss(), numpy.random.rand()]
        assert drawn == [python.gauss(), numpy.random.RandomState(3).rand()]
        checkpointing.set_random_state(again)
        assert drawn == [random.gauss(), numpy.random.rand()]
    finally:
        checkpointing.set_random_state(before)
