"""A small model with its data, and runs of the training loop on it: inside the rank pool, or as real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.utils import unwrap_model
from PIL import Image

import pretrain_vlm
from megatron_vlm.checkpoint.run_owner import RunOwner
from megatron_vlm.cli import load_config
from megatron_vlm.errors import UserError
from megatron_vlm.training.loop import Trainer
from megatron_vlm.training.setup import Run, set_up
from megatron_vlm.training.signals import StopRequests
from tests.checkpoint.tiny_run import prepare_process
from tests.data.rows import assistant, image, row, user, write_jsonl
from tests.families.gemma3 import GEMMA3
from tests.families.tiny_family import TinyFamily
from tests.refusals import check_refusal
from tests.training.tiny_run_config import build_multimodal

ROOT = Path(__file__).parent.parent.parent
PARTS = ("language_model", "vision_tower", "projector")
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}
GLOBAL_BATCH = 4


@dataclass(frozen=True)
class Place:
    """Where the model and the data are; every run of a test gets a folder of its own."""

    model: Path
    data: Path

    def arguments(self, run_dir: Path, *overrides: str) -> list[str]:
        """A command line that trains for four steps of four rows; later overrides win."""
        settings = [
            f"run_dir={run_dir}",
            f"model.hf_path={self.model}",
            f"data.train=[{{path: {self.data / 'train.jsonl'}}}]",
            "data.seq_length=96",
            "data.num_workers=0",
            "data.shuffle=false",
            "train.train_iters=4",
            f"train.global_batch_size={GLOBAL_BATCH}",
            "train.precision=fp32",
            "optimizer.lr=3e-3",
            "optimizer.schedule=constant",
        ]
        return [f"--{setting}" for setting in [*settings, *overrides]]


def build_place(folder: Path, family: TinyFamily = GEMMA3) -> Place:
    """Draw four images, write eight rows (text and image in turn) and a random tiny model with its processor."""
    data = folder / "data"
    data.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (32, 32), colour).save(data / f"{name}.png")
    write_jsonl(data / "train.jsonl", sample_rows())
    write_jsonl(data / "text.jsonl", text_rows())
    return Place(build_multimodal(folder, family).model, data)


def sample_rows() -> list[Any]:
    """Rows 1, 3, 5, 7 ask for the colour of an image, the others have none."""
    rows: list[Any] = []
    for name, words in zip(COLOURS, text_rows(), strict=True):
        rows += [row(user(image(f"{name}.png"), "What colour is it?"), assistant(f"It is {name}.")), words]
    return rows


def text_rows() -> list[Any]:
    """Four rows without images, of different lengths."""
    return [row(user(f"Say {name}."), assistant(" ".join([name] * count))) for count, name in enumerate(COLOURS, 1)]


@dataclass
class Outcome:
    """What a rank saw of one start of a run."""

    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    error: str | None
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    trainable: set[str] = field(default_factory=set)
    gradient_buffer_elements: int = 0
    optimizer_elements: int = 0

    def changed(self, part: str) -> set[str]:
        """Names of the part's parameters that are not bit for bit what they were."""
        mine = [name for name in self.after if name.startswith(part)]
        return {name for name in mine if not torch.equal(self.before[name], self.after[name])}


Interference = Callable[[Trainer], None]


def train_here(arguments: list[str], interfere: Interference | None = None) -> Outcome:
    """On a pool rank: one start of a run, after `interfere` had its hands on the trainer."""
    prepare_process()
    config = load_config(arguments)
    run: Run | None = None
    error, before = None, {}
    requests = StopRequests()
    try:
        with RunOwner(config.run_dir) as owner:
            run = set_up(config, owner, requests)
            before = _parameters(run)
            trainer = Trainer(run, requests)
            if interfere is not None:
                interfere(trainer)
            trainer.run()
    except UserError as problem:
        error = f"{type(problem).__name__}: {problem}"
    finally:
        torch.use_deterministic_algorithms(False)
        if run is not None:
            run.train_loader.close()
    torch.distributed.barrier()  # the first rank has written its last line
    folder = Path(config.run_dir)
    outcome = Outcome(read_lines(folder / "metrics.jsonl"), read_lines(folder / "evaluations.jsonl"), error, before, {})
    if run is not None:
        outcome.after = _parameters(run)
        named = [item for chunk in unwrap_model(list(run.model)) for item in chunk.named_parameters()]
        outcome.trainable = {name for name, parameter in named if parameter.requires_grad}
        assert all(hasattr(parameter, "main_grad") == parameter.requires_grad for _, parameter in named)
        outcome.gradient_buffer_elements = sum(
            buffer.grad_data.numel() for chunk in run.model for buffer in chunk.buffers
        )
        outcome.optimizer_elements = _optimizer_elements(run)
    return outcome


def _parameters(run: Run) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach().clone()
        for chunk in unwrap_model(list(run.model))
        for name, parameter in chunk.named_parameters()
    }


def _optimizer_elements(run: Run) -> int:
    """Numbers in this rank's moments; the steps that torch counts per parameter are no tensors worth counting."""
    total = 0
    for part in getattr(run.optimizer, "chained_optimizers", [run.optimizer]):
        for state in part.optimizer.state.values() if part.optimizer is not None else ():
            total += sum(value.numel() for value in state.values() if torch.is_tensor(value) and value.dim() > 0)
    return total


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error on stderr with which the entry point, in this process, must refuse a start with exit code 2."""
    capsys.readouterr()
    assert pretrain_vlm.main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("[transformers]")]
    text = check_refusal("\n".join(lines))
    assert all(" -- " in line for line in lines[1:] or lines), f"no remedy: {text}"
    return text


def edit_config(change: Callable[[Any], None]) -> Callable[[Path], None]:
    """Changes config.json of a model directory."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        change(content)
        (folder / "config.json").write_text(json.dumps(content))

    return edit


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; none when there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def checkpoint_names(run_dir: Path) -> list[str]:
    """What lies in the checkpoints folder."""
    folder = run_dir / "checkpoints"
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def start_torchrun(arguments: list[str], log: Path, ranks: int = 2) -> subprocess.Popen:
    """Start `torchrun --nproc-per-node RANKS pretrain_vlm.py ARGUMENTS`, its output in `log`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        return subprocess.Popen(
            [*command, str(ROOT / "pretrain_vlm.py"), *arguments],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def rank_pids(agent: int) -> list[int]:
    """Processes that a torchrun agent started and that run the training script."""
    found = []
    for pid in map(int, Path(f"/proc/{agent}/task/{agent}/children").read_text().split()):
        if b"pretrain_vlm.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
            found.append(pid)
    return found


def signal_all(pids: list[int], number: signal.Signals) -> None:
    """Send a signal to processes of ours that may have ended meanwhile."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
