"""The loader gives the planned rows, whatever the number of workers and ranks, and resumes exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_vlm.config import Config, DataSource
from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.data.describe import describe_samples
from megatron_vlm.data.loader import BatchSharding, MicroBatchLoader, build_train_loader, build_valid_loader
from megatron_vlm.data.plan import START, Position
from megatron_vlm.data.rules import PromptRules
from megatron_vlm.errors import DataError
from tests.data.rows import assistant, image, numbered_rows, row, user, video, write_jsonl

Make = Callable[..., Config]


@pytest.fixture
def sources(folder: Path) -> list[DataSource]:
    return [
        DataSource(write_jsonl(folder / "a.jsonl", numbered_rows(21, "a")), 2.0),
        DataSource(write_jsonl(folder / "b.jsonl", numbered_rows(9, "b")), 1.0),
    ]


def names(batches: list[MicroBatch]) -> list[str]:
    return [Path(name).name for batch in batches for name in batch.document_names]


def global_batch_names(loaders: list[MicroBatchLoader]) -> list[str]:
    """Rows of the next global batch in plan order, from the loaders of all data-parallel ranks."""
    parts = [loader.global_batch() for loader in loaders]
    return [name for step in zip(*parts, strict=True) for name in names(list(step))]


def rank_loaders(
    config: Config, rules: PromptRules, ranks: int, micro: int, build: Callable[..., Any] = build_train_loader
) -> list[Any]:
    shares = [BatchSharding(config.train.global_batch_size, micro, rank, ranks) for rank in range(ranks)]
    return [build(config, rules, share, report_problems=False) for share in shares]


def assert_same(first: MicroBatch, second: MicroBatch) -> None:
    assert first.document_names == second.document_names and first.counters == second.counters
    for name, value in vars(first).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(second, name)), name
    assert first.media_inputs.keys() == second.media_inputs.keys()
    for name, value in first.media_inputs.items():
        assert torch.equal(value, second.media_inputs[name])


def test_workers_change_nothing_and_survive_signals(
    make_config: Make, rules: PromptRules, sources: list[DataSource]
) -> None:
    """Two workers behind the fork server give what this process gives, and ignore a scheduler's signals."""
    share = BatchSharding(8, 2, 1, 2)
    plain = build_train_loader(make_config(sources), rules, share)
    parallel = build_train_loader(make_config(sources, num_workers=2), rules, share)
    for _ in range(3):
        assert_same(next(plain), next(parallel))
    for process in psutil.Process().children(recursive=True):
        if "multiprocessing" in " ".join(process.cmdline()):
            for number in (signal.SIGUSR1, signal.SIGTERM):
                os.kill(process.pid, number)
    for _ in range(20):
        assert_same(next(plain), next(parallel))
    assert parallel.wait_seconds > 0
    for loader in (plain, parallel):
        loader.seek(Position(16))
    assert_same(next(plain), next(parallel))
    parallel.close()


def test_workers_send_grids(make_config: Make, qwen_path: Path, qwen_rules: PromptRules, folder: Path) -> None:
    rows = [row(user(image(f"{n % 8}.png"), video(["0.png"] * (2 + n % 3))), assistant(f"{n}.")) for n in range(8)]
    config = make_config([DataSource(write_jsonl(folder / "a.jsonl", rows))], global_batch_size=4, num_workers=1)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, hf_path=str(qwen_path)))
    here = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=0))
    loaders = [build_train_loader(settings, qwen_rules, BatchSharding(4, 2)) for settings in (config, here)]
    for _ in range(4):
        sent, own = (next(loader) for loader in loaders)
        assert sent.media == own.media and len(own.media) == 4
        assert torch.equal(sent.position_ids, own.position_ids)
        assert torch.equal(sent.media_inputs["pixel_values"], own.media_inputs["pixel_values"])
    for loader in loaders:
        loader.close()


def test_workers_end_with_their_rank(hf_path: Path, sources: list[DataSource]) -> None:
    """A rank that fails exits at once instead of waiting for workers; workers of a killed rank do not live on."""
    command = [sys.executable, "-m", "tests.data.loader_process", str(hf_path), sources[0].path]
    failing, killed = (
        subprocess.Popen(
            [*command, ending],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for ending in ("error", "wait")
    )
    pids = [int(pid) for rank in (failing, killed) for pid in rank.stdout.readline().split()]
    assert len(pids) == 4
    workers = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):  # those of the rank that fails may be gone already
            workers.append(psutil.Process(pid))
    killed.kill()
    # Far more than they need, far less than forever.
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    assert "the program ends here" in failing.communicate(timeout=60)[1]
    killed.communicate(timeout=60)


def test_a_killed_worker_is_named(
    make_config: Make, rules: PromptRules, sources: list[DataSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a kernel that ran out of memory: one line with rank and process, not torch's traceback."""
    monkeypatch.setenv("RANK", "3")
    loader = build_train_loader(make_config(sources, num_workers=1), rules, BatchSharding(8, 1))
    next(loader)
    (worker,) = loader._workers
    worker.kill()
    with pytest.raises(DataError) as caught:
        for _ in range(100):  # what the worker had read ahead comes first
            next(loader)
    line = str(caught.value)
    assert line.startswith(f"data worker {worker.pid} of rank 3 on ") and "SIGKILL" in line
    assert "out of memory" in line and "data.num_workers" in line
    loader.close()


@pytest.mark.parametrize(("ranks", "micro"), [(1, 8), (2, 2), (4, 1), (8, 1)])
def test_global_batches_do_not_depend_on_ranks(
    make_config: Make, rules: PromptRules, sources: list[DataSource], ranks: int, micro: int
) -> None:
    config = make_config(sources)
    loaders, alone = rank_loaders(config, rules, ranks, micro), rank_loaders(config, rules, 1, 1)
    for _ in range(4):
        assert global_batch_names(loaders) == global_batch_names(alone)


def test_resume_at_another_number_of_ranks(make_config: Make, rules: PromptRules, sources: list[DataSource]) -> None:
    config = make_config(sources)
    straight = rank_loaders(config, rules, 1, 2)
    expected = [global_batch_names(straight) for _ in range(9)]
    first = rank_loaders(config, rules, 2, 1)
    assert [global_batch_names(first) for _ in range(5)] == expected[:5]
    next(first[0])  # a step that has begun does not count
    states = [loader.state_dict() for loader in first]
    assert states[0] == states[1] and states[0]["consumed_samples"] == 40
    second = rank_loaders(config, rules, 4, 2)
    for loader in second:
        loader.load_state_dict(json.loads(json.dumps(states[0])))
    assert [global_batch_names(second) for _ in range(4)] == expected[5:]


def test_changed_data_are_refused_on_resume(make_config: Make, rules: PromptRules, sources: list[DataSource]) -> None:
    state = rank_loaders(make_config(sources), rules, 1, 8)[0].state_dict()
    rows = numbered_rows(21, "a")
    rows[3]["messages"][1]["content"] = "changed"
    write_jsonl(Path(sources[0].path), rows)
    with pytest.raises(DataError, match=r"the content of .*a.jsonl changed"):
        rank_loaders(make_config(sources), rules, 1, 8)[0].load_state_dict(state)


def test_without_shuffle_global_batch_k_has_the_kth_rows(
    make_config: Make, rules: PromptRules, sources: list[DataSource]
) -> None:
    loaders = rank_loaders(make_config(sources[:1], shuffle=False), rules, 2, 2)
    read = [name for _ in range(5) for name in global_batch_names(loaders)]
    assert read == [f"a.jsonl:{number % 21 + 1}" for number in range(40)]


def test_blend_reaches_the_micro_batches(make_config: Make, rules: PromptRules, sources: list[DataSource]) -> None:
    loader = rank_loaders(make_config(sources), rules, 1, 8)[0]
    ids = torch.cat([next(loader).document_sources for _ in range(12)])
    assert ids.bincount().tolist() == [64, 32]
    assert loader.source_names == [Path(source.path).stem for source in sources]


def test_bad_rows_are_reported_with_their_name(
    make_config: Make, rules: PromptRules, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*numbered_rows(7), "oops"]
    config = make_config([DataSource(write_jsonl(folder / "a.jsonl", rows))], shuffle=False)
    batch = next(build_train_loader(config, rules, BatchSharding(8, 8)))
    assert batch.counters["bad_rows"] == 1 and (batch.labels[7] == -100).all()
    assert "a.jsonl:8" in caplog.text and "not JSON" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 1])
def test_strict_refusals_leave_workers_as_one_line(
    make_config: Make, rules: PromptRules, folder: Path, num_workers: int
) -> None:
    rows = numbered_rows(8)
    rows[2]["messages"][0]["content"] = [{"type": "image", "image": "nothing.png"}]
    source = DataSource(write_jsonl(folder / "a.jsonl", rows))
    config = make_config([source], shuffle=False, strict=True, num_workers=num_workers)
    loader = build_train_loader(config, rules, BatchSharding(8, 1))
    assert names([next(loader), next(loader)]) == ["a.jsonl:1", "a.jsonl:2"]
    with pytest.raises(DataError) as raised:
        next(loader)
    assert "nothing.png does not exist" in str(raised.value) and "Traceback" not in str(raised.value)
    loader.close()


def test_evaluation_reads_every_row_once(make_config: Make, rules: PromptRules, sources: list[DataSource]) -> None:
    config = make_config(sources)
    assert build_valid_loader(config, rules, BatchSharding(8, 2)) is None
    object.__setattr__(config.data, "valid", sources)
    loaders = rank_loaders(config, rules, 2, 2, build_valid_loader)
    for _ in range(2):
        read = [name for loader in loaders for name in names(list(loader))]
        real = [name for name in read if name]
        expected = [f"a.jsonl:{n}" for n in range(1, 22)] + [f"b.jsonl:{n}" for n in range(1, 10)]
        assert sorted(real) == sorted(expected)
        assert len(read) == 8 * loaders[0].num_global_batches
        for loader in loaders:
            loader.seek(START)


def test_description_of_a_run(make_config: Make, rules: PromptRules, sources: list[DataSource]) -> None:
    described = describe_samples(make_config(sources), rules, num=2)
    assert described.count("[[") == 2 and described.startswith("sample 1 of 2: ")
    first = next(build_train_loader(make_config(sources), rules, BatchSharding(8, 1))).document_names[0]
    assert described.splitlines()[0].startswith(f"sample 1 of 2: {first} (")


def test_inspect_data_prints_samples(
    hf_path: Path, sources: list[DataSource], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "image_token_index": 8,
        "mm_tokens_per_image": 4,
        "text_config": {"vocab_size": 512},
    }
    (hf_path / "config.json").write_text(json.dumps(config))
    tool = Path(__file__).parents[2] / "tools" / "inspect_data.py"
    command = [str(tool), "--hf", str(hf_path), "--num", "2", "--check", "--data"]
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [*command, sources[0].path])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(tool), run_name="__main__")
    printed = capsys.readouterr().out
    assert "[[0.<end_of_turn>]]" in printed and "21 rows, 7 images, 0 bad rows" in printed
    monkeypatch.setattr(sys, "argv", [*command, "nothing.jsonl"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(tool), run_name="__main__")
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: data file nothing.jsonl does not exist")
