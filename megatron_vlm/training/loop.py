"""The training loop: steps, evaluations, checkpoints, stops. It knows no family, no layout and no logger."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from megatron.core.utils import get_model_config

from megatron_vlm import platform
from megatron_vlm.checkpoint.run_folder import CHECKPOINTS_NAME, published_steps, reading_manifest
from megatron_vlm.checkpoint.run_owner import RunOwner
from megatron_vlm.config import Config, to_yaml
from megatron_vlm.conversion.passthrough import check_kept, describe
from megatron_vlm.conversion.running_model import export_hf_from_model
from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.data.plan import START
from megatron_vlm.data.row_limits import RowLimits
from megatron_vlm.errors import ConfigError, DataError, DivergenceError, SaveError
from megatron_vlm.files.small_files import replace_durably
from megatron_vlm.parallel.placement import host_of
from megatron_vlm.planning.preflight import record_export
from megatron_vlm.platform.agreement import on_first_rank
from megatron_vlm.training.loggers import Callback, build_loggers, check_packages
from megatron_vlm.training.metrics import Pace, StepMetrics, expert_statistics, over_steps
from megatron_vlm.training.optimizer import apply_gradients, gradient_norm, learning_rates
from megatron_vlm.training.profiling import ProfileWindow
from megatron_vlm.training.rank_files import RankLog
from megatron_vlm.training.rank_watch import RankWatch
from megatron_vlm.training.same_rows import check_same_rows
from megatron_vlm.training.setup import Run, initialize_distributed, set_up
from megatron_vlm.training.signals import StoppedBeforeTraining, StopRequests
from megatron_vlm.training.start import banner, changes_since, environment, record_start
from megatron_vlm.training.step import collect_expert_use, run_global_batch
from megatron_vlm.training.step_check import StepCheck
from megatron_vlm.training.stragglers import StepClock, Straggler

SAVES_TRIED_PER_INTERVAL = 10
COUNTERS = (
    "samples bad_rows too_long_rows empty_answers real_tokens label_tokens padded_tokens images videos audio_clips"
).split()
EXIT_DONE = 0


def train(config: Config) -> int:
    """Train, resuming from `run_dir` if it holds a checkpoint; returns the exit code 0.

    Raises:
        UserError: what the user can correct; nothing that was saved is lost.
    """
    timeout_minutes = config.parallel.distributed_timeout_minutes
    initialize_distributed(timeout_minutes, config.device)
    failed = True
    with StopRequests() as requests, RankLog(torch.distributed.get_rank()) as log:
        try:
            with RankWatch(timeout_minutes * 60) as watch:
                with RunOwner(config.run_dir) as owner:
                    _train_as_owner(config, watch, log, requests, owner)
                torch.distributed.barrier()
            failed = False
        finally:
            platform.current().leave_process_group(failed)
    return EXIT_DONE


def _train_as_owner(config: Config, watch: RankWatch, log: RankLog, requests: StopRequests, owner: RunOwner) -> None:
    try:
        check_packages(config)
        run = set_up(config, owner, requests)
    except StoppedBeforeTraining as stop:
        number = stop.number
        on_first_rank(lambda: _write_stop(Path(config.run_dir), number))
        return
    try:
        trainer = Trainer(run, requests)
        watch.run_dir = trainer.run_dir
        log.open(trainer.run_dir)
        watch.activity = lambda: trainer.activity
        trainer.run()
    finally:
        run.train_loader.close()
        if run.valid_loader is not None:
            run.valid_loader.close()


class Trainer:
    """Runs the steps of a `Run`.

    Args:
        run: everything that was set up.
        requests: the requests to stop (signals) received so far.
    """

    def __init__(self, run: Run, requests: StopRequests) -> None:
        self.run_state, self.requests = run, requests
        self.config, self.device = run.config, platform.current().device
        self.run_dir = Path(run.config.run_dir)
        self.step_check = StepCheck(self.config.train.spike_ratio)
        self.row_limits = RowLimits(self.config.data, run.train_loader.plan.sources, run.train_loader.source_names)
        self.flops = run.flops
        self.clock = StepClock(run.groups)
        mcore_config = get_model_config(run.model[0])
        mcore_config.finalize_model_grads_func = self.clock.before(mcore_config.finalize_model_grads_func)
        self.step = 0
        self.activity = "the start"
        """What is being done, in words."""
        self._retried_at = 0
        """Step after which a save that failed is tried again."""
        self.loggers: list[Callback] = []
        self._failed_loggers: list[Callback] = []
        self._not_logged: list[StepMetrics] = []
        """Steps since the last that was logged."""
        self.pace = Pace(max(self.config.train.eval_interval or 0, self.config.checkpoint.save_interval or 0))
        self.profile = ProfileWindow(self.run_dir, self.config.logging.profile if run.is_first_rank else None)

    def run(self) -> None:
        """Resume, train to the last step or a stop, save, export."""
        described = environment(self.run_state.nodes) if self.run_state.is_first_rank else {}
        if self.run_state.is_first_rank:
            print("\n".join(banner(self.run_state, described)), flush=True)
        self._resume()
        on_first_rank(lambda: self._prepare_folder(described))
        on_first_rank(self._open_loggers)
        try:
            stopped = self._train()
            if self.step > 0:
                self._save()
            self.run_state.checkpoints.finalize(blocking=True)
            if stopped is not None:
                on_first_rank(
                    lambda: _write_json(self.run_dir / "stopped.json", {"reason": stopped, "step": self.step})
                )
            else:
                self.row_limits.check_end()
                self._export()
        finally:
            self.profile.close()
            self._tell_loggers(lambda logger: logger.close())

    def _train(self) -> str | None:
        """Run the steps up to the last; return why training stopped before it, or None."""
        train, first = self.config.train, self.step
        request = self._agree_on_request()
        if request:
            return _reason(request)
        while self.step < train.train_iters:
            request = self._step()
            self._try_to_save(self.run_state.checkpoints.finalize)
            is_last = self.step == train.train_iters
            if self.run_state.valid_loader is not None and (
                is_last or (train.eval_interval and self.step % train.eval_interval == 0)
            ):
                request = self._evaluate() or request
            if is_last:
                return None
            if request:
                return _reason(request)
            if train.exit_interval and self.step - first >= train.exit_interval:
                return "exit_interval"
            interval = self.config.checkpoint.save_interval
            if interval and (self.step % interval == 0 or self.step == self._retried_at):
                self._try_to_save(self._save)
        return None

    def _try_to_save(self, save: Callable[[], object]) -> None:
        """Run a part of an interim save; where the disk is full, training goes on and tries again soon."""
        try:
            save()
        except SaveError as error:
            interval = self.config.checkpoint.save_interval
            later = self.step + max(1, (interval or 0) // SAVES_TRIED_PER_INTERVAL)
            self._retried_at = min(later, self.config.train.train_iters)
            if self.run_state.is_first_rank:
                print(f"warning: {error}; it is tried again after step {self._retried_at}", flush=True)

    def _step(self) -> int:
        """Run one optimizer step; return the number of a signal that some rank received, or 0."""
        run, began, span = self.run_state, time.perf_counter(), platform.current().span
        self.activity = f"step {self.step + 1}, reading data"
        self.profile.step(self.step + 1)
        self.clock.begin()
        waited = run.train_loader.wait_seconds
        with span("data"):
            batches = run.train_loader.global_batch()
            check_same_rows(batches, run.groups.tp_cp)
        waited = run.train_loader.wait_seconds - waited
        self.activity = f"step {self.step + 1}"
        lengths = map(sum, zip(*map(self.flops.lengths, batches), strict=True))
        for chunk in run.model:
            chunk.train()
            chunk.zero_grad_buffer()
        run.optimizer.zero_grad()
        with span("forward and backward"):
            sums = run_global_batch(run.model, self._to_device(batches), run.groups, len(run.train_loader.source_names))
        expert_use = collect_expert_use(run.model, run.groups)
        norm = gradient_norm(run.optimizer)
        losses = sums.tolist()  # waits for the device: the loss and the norm decide whether the step is applied
        loss = sum(total for total, _ in losses) / max(1.0, sum(count for _, count in losses))
        self.step += 1
        run.scheduler.step(1)
        problem = self.step_check.problem(loss, norm)
        if problem is None:
            with span("optimizer"):
                apply_gradients(run.optimizer, norm, self.config.optimizer.clip_grad)
            self.step_check.applied(norm)
        elif self.config.train.nonfinite == "stop":
            self._stop_for(problem, batches)
        # Every context rank has the counters of full micro-batches.
        counted = run.groups.cp.rank() == 0
        own = [counted * sum(batch.counters[name] for batch in batches) for name in COUNTERS]
        counts = self._sum_over_data_ranks([*own, *lengths])
        counters = {name: int(count) for name, count in zip(COUNTERS, counts, strict=False)}
        # Bringing these figures to the host waits for the update too, so that the step's time is honest.
        figures = [self.requests.poll(), self._is_lost(), waited, platform.current().peak_memory_bytes()]
        request, lost, wait, peak = self._largest(figures)
        seconds = time.perf_counter() - began
        self.pace.step_ended()
        self.clock.end()
        slowest = self.clock.slowest() if self._is_logged() else None
        self._log(
            losses,
            loss,
            norm,
            counters,
            counts[len(own) :],
            expert_use,
            seconds,
            wait,
            peak,
            problem is not None,
            slowest,
        )
        problems = [problem for batch in batches for problem in batch.problems]
        try:
            self.row_limits.update(counters, [count for _, count in losses], problems)
        except DataError:
            self._publish_before_failing()
            raise
        self._end_if(lost)
        return int(request)

    def _log(
        self,
        losses: Sequence[Sequence[float]],
        loss: float,
        norm: float,
        counters: Mapping[str, int],
        lengths: Sequence[float],
        expert_use: tuple[torch.Tensor, torch.Tensor] | None,
        seconds: float,
        wait_seconds: float,
        peak_bytes: float,
        skipped: bool,
        slowest: Straggler | None,
    ) -> None:
        train, run = self.config.train, self.run_state
        if not self.loggers:
            return
        names = run.train_loader.source_names
        lr, lr_by_part = learning_rates(run.optimizer, self.config.optimizer)
        assignment = run.train_loader.last_assignment()
        balance = None
        if expert_use is not None and self.config.model.moe_load_balancing != "none":
            balance = expert_use[1].item() / max(1, counters["label_tokens"])
        metrics = StepMetrics(
            step=self.step,
            train_iters=train.train_iters,
            loss=loss,
            grad_norm=norm,
            lr=lr,
            lr_by_part=lr_by_part,
            tokens=counters["real_tokens"],
            label_tokens=counters["label_tokens"],
            padded_tokens=counters["padded_tokens"],
            images=counters["images"],
            videos=counters["videos"],
            audio_clips=counters["audio_clips"],
            bad_rows=counters["bad_rows"],
            too_long_rows=counters["too_long_rows"],
            empty_answers=counters["empty_answers"],
            step_seconds=seconds,
            data_wait_seconds=wait_seconds,
            source_losses={name: total / count for name, (total, count) in zip(names, losses, strict=True) if count},
            source_label_tokens={name: int(count) for name, (_, count) in zip(names, losses, strict=True)},
            peak_memory_bytes=int(peak_bytes),
            model_flops=self.flops.of(lengths),
            world_size=torch.distributed.get_world_size(),
            skipped=skipped,
            step_samples=counters["samples"],
            batch_rows=train.global_batch_size,
            samples=run.train_loader.consumed_samples,
            epoch=run.train_loader.consumed_samples / run.train_loader.plan.num_rows,
            time=time.time(),
            seconds_left=self.pace.seconds_for(train.train_iters - self.step),
            experts=None if expert_use is None else expert_statistics(expert_use[0]),
            load_balancing_loss=balance,
            slowest_rank=None if slowest is None else slowest.rank,
            slowest_host=None if slowest is None else host_of(slowest.rank, run.nodes),
            slowest_ratio=None if slowest is None else slowest.ratio,
            straggler_ratio_predicted=assignment.straggler_ratio,
            straggler_ratio_predicted_in_order=assignment.straggler_ratio_in_order,
        )
        self._not_logged.append(metrics)
        if skipped or self._is_logged():
            logged = over_steps(self._not_logged)
            self._not_logged = []
            self._tell_loggers(lambda logger: logger.on_step(logged))

    def _is_logged(self) -> bool:
        return self.step % self.config.train.log_interval == 0 or self.step == self.config.train.train_iters

    def _tell_loggers(self, what: Callable[[Callback], None]) -> None:
        """Hand something to every logger; one that cannot write is named once, and training goes on without it."""
        for logger in self.loggers:
            try:
                what(logger)
            except OSError as error:
                if logger not in self._failed_loggers:
                    print(f"warning: {type(logger).__name__} cannot log: {error}", file=sys.stderr, flush=True)
                self._failed_loggers.append(logger)

    def _evaluate(self) -> int:
        """Log the loss on the held-out data; return the number of a signal received meanwhile, which ends it early."""
        run = self.run_state
        self.activity = f"the evaluation after step {self.step}"
        loader = run.valid_loader
        assert loader is not None and loader.num_global_batches is not None
        sums = torch.zeros((len(loader.source_names), 2), dtype=torch.float64, device=self.device)
        for chunk in run.model:
            chunk.eval()
        request = 0
        with torch.no_grad():
            for _ in range(loader.num_global_batches):
                batches = loader.global_batch()
                check_same_rows(batches, run.groups.tp_cp)
                batches = self._to_device(batches)
                sums += run_global_batch(run.model, batches, run.groups, len(loader.source_names), forward_only=True)
                request = self._agree_on_request()
                if request:
                    break
        collect_expert_use(run.model, run.groups)  # what was counted here is not part of the next step
        loader.seek(START)
        totals = sums.tolist()
        label_tokens = sum(count for _, count in totals)
        if not label_tokens and not request:
            self._save()
            self._publish_before_failing()
            raise DataError(
                f"the held-out rows ({', '.join(loader.source_names)}) have no trained token",
                "data.valid",
                "look at them with tools/inspect_data.py, or leave data.valid out",
            )
        if self.loggers and label_tokens and not request:
            losses = {"all": sum(total for total, _ in totals) / label_tokens}
            losses |= {
                name: total / count for name, (total, count) in zip(loader.source_names, totals, strict=True) if count
            }
            self._tell_loggers(lambda logger: logger.on_evaluation(self.step, losses))
        return request

    def _agree_on_request(self) -> int:
        """Return the number of a signal that some rank received, or 0; end all ranks if the folder is another's."""
        request, lost = self._largest([self.requests.poll(), self._is_lost()])
        self._end_if(lost)
        return int(request)

    def _is_lost(self) -> bool:
        return self.run_state.owner.lost is not None

    def _end_if(self, lost: float) -> None:
        if lost:
            on_first_rank(self.run_state.owner.confirm)

    def _resume(self) -> None:
        run, train_iters = self.run_state, self.config.train.train_iters
        done = run.checkpoints.latest_step()
        if done is not None and done > train_iters:
            raise ConfigError(
                f"train.train_iters is {train_iters}, but this run has done {done} steps",
                str(self.run_dir),
                f"give at least {done}, or name a new run_dir",
            )
        run.checkpoints.clean()
        resumed = run.checkpoints.load(run.model, run.optimizer, run.scheduler)
        if resumed is not None:
            self.step = resumed.step
            with reading_manifest(resumed.folder, "data"):
                run.train_loader.load_state_dict(dict(resumed.data))
            with reading_manifest(resumed.folder, "extra"):
                self.step_check.load_state_dict(resumed.extra["guard"])
                self.row_limits.load_state_dict(resumed.extra.get("row_limits") or resumed.extra["bad_rows"])
            if run.due_export:
                carried, hf_dir = run.checkpoints.passthrough or (), Path(self.config.model.hf_path)
                on_first_rank(lambda: check_kept(carried, run.checkpoints.directory, hf_dir))
            for line in run.checkpoints.set_aside():
                if run.is_first_rank:
                    print(line, flush=True)
            if run.is_first_rank:
                print(f"resuming after step {self.step} of {train_iters}", flush=True)
                if self.step == train_iters:
                    print("this run is finished: nothing is left to train", flush=True)
        elif run.is_first_rank and (self.run_dir / "metrics.jsonl").is_file():
            print("an earlier start left figures but no checkpoint: training starts over", flush=True)

    def _save(self) -> None:
        """Save this step, unless it is saved already."""
        self.activity = f"saving step {self.step}"
        run = self.run_state
        run.checkpoints.save(
            self.step,
            run.model,
            run.optimizer,
            run.scheduler,
            run.train_loader.state_dict(),
            to_yaml(self.config),
            {"guard": self.step_check.state_dict(), "row_limits": self.row_limits.state_dict()},
        )

    def _export(self) -> None:
        run, target = self.run_state, self.config.checkpoint.export_hf
        if target is None or not run.due_export:
            return
        self.activity = "the export"
        hf_path, checkpoints = self.config.model.hf_path, run.checkpoints.directory
        carried = export_hf_from_model(
            run.model,
            hf_path,
            target,
            run.family,
            run.model_config,
            run.groups,
            checkpoints,
            run.checkpoints.passthrough or (),
        )
        on_first_rank(lambda: record_export(self.config))
        if run.is_first_rank:
            print(f"exported to {target}", flush=True)
            if carried:
                print(describe(carried), flush=True)

    def _prepare_folder(self, described: Mapping[str, Any]) -> None:
        """Write the resolved configuration; an earlier start's `stopped.json` no longer holds."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / "config.yaml"
        if self.step and path.exists():
            changes = changes_since(path, self.config)
            if changes:
                print(f"settings changed since the last start: {', '.join(changes)}", flush=True)
        replace_durably(path, to_yaml(self.config))
        (self.run_dir / "stopped.json").unlink(missing_ok=True)
        record_start(self.run_dir, described, self.step, self.config)

    def _open_loggers(self) -> None:
        self.loggers = build_loggers(self.config, self.run_dir, self.step)

    def _stop_for(self, problem: str, batches: Sequence[MicroBatch]) -> None:
        """End the run with the names of all rows of the global batch."""
        self._publish_before_failing()
        rows: list[list[str]] = [[] for _ in range(self.run_state.groups.dp.size())]
        mine = [name for batch in batches for name in batch.document_names]
        torch.distributed.all_gather_object(rows, mine, group=self.run_state.groups.dp)
        raise DivergenceError(
            f"{problem} at step {self.step}, which was not applied",
            f"rows {', '.join(name for part in rows for name in part)}",
            "look at these rows, lower the learning rate, or set train.nonfinite to skip; "
            "starting again resumes from the last checkpoint",
        )

    def _publish_before_failing(self) -> None:
        """Complete a checkpoint that is being written; for failures that all ranks have at once."""
        self.run_state.checkpoints.finalize(blocking=True)

    def _to_device(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        return [batch.to(self.device, non_blocking=True) for batch in batches]

    def _sum_over_data_ranks(self, values: Sequence[float]) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor, group=self.run_state.groups.dp_cp)
        return tensor.tolist()

    def _largest(self, values: Sequence[float]) -> list[float]:
        """Return the largest of each value over all ranks."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
        return tensor.tolist()


def _reason(number: int) -> str:
    return f"signal {signal.Signals(number).name}"


def _write_stop(run_dir: Path, number: int) -> None:
    """Say why this start did no step."""
    steps = published_steps(run_dir / CHECKPOINTS_NAME)
    _write_json(run_dir / "stopped.json", {"reason": _reason(number), "step": steps[-1] if steps else 0})


def _write_json(path: Path, content: object) -> None:
    replace_durably(path, json.dumps(content) + "\n")
