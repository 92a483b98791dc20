"""Loggers of a run's figures: console, JSON lines, TensorBoard, Weights & Biases. Only rank 0 has them."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import sys
import uuid
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TextIO

from megatron_vlm.config import Config, to_dict
from megatron_vlm.errors import CheckpointError, ConfigError
from megatron_vlm.files.small_files import replace_durably
from megatron_vlm.training.metrics import StepMetrics, evaluation_record, scalars, to_record

COLUMNS = 100
LEAST_WAIT_SHOWN = 0.02  # of a step's time
LEAST_SLOWNESS_SHOWN = 1.2  # of the slowest rank


class Callback(Protocol):
    """The interface of what attaches to the training loop."""

    def on_step(self, metrics: StepMetrics) -> None:
        """A step that is to be logged has ended."""

    def on_evaluation(self, step: int, losses: dict[str, float]) -> None:
        """Held-out losses after `step`: the mean over all label tokens under "all", and each source's."""

    def close(self) -> None:
        """The run has ended; write out what is buffered."""


def check_packages(config: Config) -> None:
    """Refuse loggers whose packages are missing, before anything else takes time.

    Raises:
        ConfigError: a package that `logging` asks for is not installed.
    """
    if config.logging.tensorboard:
        _import("tensorboard", "logging.tensorboard", "false")
    if config.logging.wandb is not None:
        _import("wandb", "logging.wandb", "null")


def build_loggers(config: Config, run_dir: str | os.PathLike, resume_step: int) -> list[Callback]:
    """Build the loggers that the configuration asks for; call it on rank 0, before the first step.

    Args:
        config: the run's configuration.
        run_dir: the run's folder.
        resume_step: last step that this start does not repeat; 0 in a new run.

    Raises:
        ConfigError: a package that `logging` asks for is not installed.
    """
    # Loggers that may be refused come first, before anything has been written.
    loggers: list[Callback] = []
    if config.logging.tensorboard:
        loggers.append(TensorBoard(run_dir, resume_step))
    if config.logging.wandb is not None:
        loggers.append(WandB(run_dir, config.logging.wandb, to_dict(config)))
    return [Console(), JsonLines(run_dir, resume_step), *loggers]


class Console:
    """Prints a line per logged step, and more below it for what does not fit into 100 columns.

    `wait` is the share of the time in which the slowest rank waited for data. Under packing, `straggler` is the cost
    predicted for the data rank that has most of it over the mean, and what it would be had the ranks taken packed rows
    in turn. Tokens per expert are shown as the fewest, the mean and the most.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout

    def on_step(self, metrics: StepMetrics) -> None:
        """Print the step."""
        width = len(str(metrics.train_iters))
        parts = [
            f"step {metrics.step:>{width}}/{metrics.train_iters}",
            f"loss {metrics.loss:.4f}",
            f"norm {metrics.grad_norm:.3g}",
            f"lr {metrics.lr:.1e}".replace("e-0", "e-"),
            f"{_short(metrics.tokens_per_second)} tok/s",
            *([] if metrics.mfu is None else [f"MFU {metrics.mfu:.0%}"]),
            f"{_short(metrics.peak_memory_bytes / 2**30)} GiB",
            f"eta {_hours(metrics.seconds_left)}",
        ]
        if metrics.data_wait_share >= LEAST_WAIT_SHOWN:
            parts.append(f"wait {metrics.data_wait_share:.0%}")
        if metrics.slowest_ratio is not None and metrics.slowest_ratio >= LEAST_SLOWNESS_SHOWN:
            parts.append(f"slowest {metrics.slowest_ratio:.2f}x: rank {metrics.slowest_rank} on {metrics.slowest_host}")
        if metrics.step_samples != metrics.batch_rows:
            parts.append(f"{metrics.step_samples} samples in {metrics.batch_rows} rows")
            parts.append(f"padding {metrics.padding_share:.1%}")
        if metrics.straggler_ratio_predicted is not None:
            in_order = metrics.straggler_ratio_predicted_in_order
            parts.append(f"straggler {metrics.straggler_ratio_predicted:.2f}x (in order {in_order:.2f}x)")
        if metrics.skipped:
            parts.append("UPDATE SKIPPED")
        if metrics.bad_rows:
            parts.append(f"BAD ROWS {metrics.bad_rows}")
        if metrics.too_long_rows:
            parts.append(f"too long rows {metrics.too_long_rows}")
        if metrics.empty_answers:
            parts.append(f"empty answers {metrics.empty_answers}")
        parts += _expert_figures(metrics)
        lines = [parts[0]]
        for part in parts[1:]:
            if len(lines[-1]) + len(part) + 2 <= COLUMNS:
                lines[-1] += f"  {part}"
            else:
                lines.append(f"    {part}")
        print("\n".join(lines), file=self._stream, flush=True)

    def on_evaluation(self, step: int, losses: dict[str, float]) -> None:
        """Print the losses; that of a single source equals the mean and is left out."""
        sources = [f"{name} {loss:.4f}" for name, loss in losses.items() if name != "all" and len(losses) > 2]
        print(" | ".join([f"evaluation after step {step}", f"loss {losses['all']:.4f}", *sources]), file=self._stream)
        self._stream.flush()

    def close(self) -> None:
        """Nothing is buffered."""


def _hours(seconds: float) -> str:
    """Format a time: 12:34, 1:02:03, 123:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _short(number: float) -> str:
    """Format a number with three digits: 412, 4.12k, 41.2k, 4.12M."""
    for unit in ("", "k", "M"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}G"


def _expert_figures(metrics: StepMetrics) -> list[str]:
    """Format what the console shows about experts; empty for models without experts."""
    parts = [] if metrics.load_balancing_loss is None else [f"load-balancing {metrics.load_balancing_loss:.4f}"]
    experts = metrics.experts
    if experts is not None:
        tokens = f"{experts.expert_tokens_min}/{experts.expert_tokens_mean:.0f}/{experts.expert_tokens_max}"
        dead = f" ({experts.dead_experts} dead)" if experts.dead_experts else ""
        parts.append(f"expert tokens {tokens}{dead}")
    return parts


class JsonLines:
    """Writes one object per line: steps in `metrics.jsonl`, evaluations in `evaluations.jsonl`.

    A run that went on past its last checkpoint before it ended repeats steps; their earlier lines are dropped, so that
    each step occurs once, and so is a last line cut short by a crash; other lines that are no record of a step are an
    error. Where the disk is full, lines are kept and written later.
    """

    def __init__(self, run_dir: str | os.PathLike, resume_step: int) -> None:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        self._steps, self._evaluations = (
            LineFile(_kept_up_to(Path(run_dir) / name, resume_step)) for name in ("metrics.jsonl", "evaluations.jsonl")
        )

    def on_step(self, metrics: StepMetrics) -> None:
        """Append the step."""
        self._steps.append(json.dumps(to_record(metrics)))

    def on_evaluation(self, step: int, losses: dict[str, float]) -> None:
        """Append the evaluation."""
        self._evaluations.append(json.dumps(evaluation_record(step, losses)))

    def close(self) -> None:
        """Write what is left and close both files."""
        self._steps.close()
        self._evaluations.close()


class LineFile:
    """A file of whole lines: one that cannot be written is taken back, kept, and tried again with the next.

    Args:
        path: of the file, which ends with a whole line or does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._size = path.stat().st_size
        self._left = b""
        self._has_warned = False

    def append(self, line: str) -> None:
        """Write a line, and those before it that could not be written."""
        self._left += line.encode() + b"\n"
        self._write()

    def close(self) -> None:
        """Close the file, after a last attempt to write what is left."""
        if self._left:
            self._write()
        self._file.close()

    def _write(self) -> None:
        try:
            is_whole = self._file.write(self._left) == len(self._left)
        except OSError as error:
            self._take_back(error.strerror or str(error))
            return
        if not is_whole:
            self._take_back("there is room for a part only")
            return
        self._size, self._left, self._has_warned = self._size + len(self._left), b"", False

    def _take_back(self, reason: str) -> None:
        with contextlib.suppress(OSError):
            os.ftruncate(self._file.fileno(), self._size)
        if not self._has_warned:
            print(f"warning: {self.path} cannot be written ({reason}); its lines are kept and tried again", flush=True)
        self._has_warned = True


def _kept_up_to(path: Path, resume_step: int) -> Path:
    """Drop incomplete last lines and those of steps beyond `resume_step`; returns the path.

    Raises:
        CheckpointError: another line is no record.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = text.split("\n")
    last = lines.pop()  # what no line break ends was cut short
    kept = ""
    for number, line in enumerate(lines, 1):
        step = _step_of(line)
        if step is None:
            raise CheckpointError(
                f"line {number} is damaged", str(path), "correct the line or delete it, and start again"
            )
        kept += f"{line}\n" if step <= resume_step else ""
    if kept != text or last:
        replace_durably(path, kept)
    return path


def _step_of(line: str) -> int | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else None


class TensorBoard:
    """Writes events under `run_dir/tensorboard`; steps that a resumed run repeats replace the earlier ones."""

    def __init__(self, run_dir: str | os.PathLike, resume_step: int) -> None:
        _import("tensorboard", "logging.tensorboard", "false")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=resume_step + 1)

    def on_step(self, metrics: StepMetrics) -> None:
        """Write the step's scalars under `train/`."""
        self._write("train", to_record(metrics), metrics.step)

    def on_evaluation(self, step: int, losses: dict[str, float]) -> None:
        """Write the losses under `evaluation/`."""
        self._write("evaluation", evaluation_record(step, losses), step)

    def close(self) -> None:
        """Write out what is buffered."""
        self._writer.close()

    def _write(self, group: str, record: dict[str, Any], step: int) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(f"{group}/{name}", value, step)


class WandB:
    """Logs to one Weights & Biases run for all starts of a run folder; WANDB_* variables work as usual.

    W&B accepts no earlier step than its last: of steps that a resumed run repeats it keeps the first figures.
    """

    def __init__(self, run_dir: str | os.PathLike, project: str, settings: dict[str, Any]) -> None:
        wandb = _import("wandb", "logging.wandb", "null")
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=project,
            name=folder.resolve().name,
            id=_stable_id(folder / "wandb_run_id"),
            resume="allow",
            dir=str(folder),
            config=settings,
        )

    def on_step(self, metrics: StepMetrics) -> None:
        """Log the step's scalars under `train/`."""
        self._log("train", to_record(metrics), metrics.step)

    def on_evaluation(self, step: int, losses: dict[str, float]) -> None:
        """Log the losses under `evaluation/`."""
        self._log("evaluation", evaluation_record(step, losses), step)

    def close(self) -> None:
        """Send what is buffered and end this start of the run."""
        self._run.finish()

    def _log(self, group: str, record: dict[str, Any], step: int) -> None:
        self._run.log({f"{group}/{name}": value for name, value in scalars(record).items()}, step=step)


def _stable_id(path: Path) -> str:
    if not path.exists():
        replace_durably(path, uuid.uuid4().hex)
    content = path.read_bytes()
    if not re.fullmatch(rb"[0-9a-f]{32}", content):
        fix = "put the id of the W&B run there, or remove the file to log to a new one"
        raise CheckpointError(f"damaged: {content[:40]!r}", str(path), fix)
    return content.decode()


def _import(package: str, key: str, off: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ConfigError(
            f"{key} needs the package {package}, which is not installed", fix=f"pip install {package}, or {key}: {off}"
        ) from None
