"""Micro-batches of one data-parallel rank, read ahead by worker processes.

A worker builds whole micro-batches from the plan, so the result does not depend on how many workers there are.
"""

from __future__ import annotations

import abc
import atexit
import logging
import multiprocessing
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader, Dataset

from megatron_vlm.config import Config
from megatron_vlm.data.balance import Assignment, TokenCosts, assign
from megatron_vlm.data.collate import LoadedSample, MicroBatch, collate
from megatron_vlm.data.context_shard import ContextSharding, shard_for_context
from megatron_vlm.data.packing import PackedPlan
from megatron_vlm.data.plan import START, BatchPlan, Pack, Position, RowReference, SamplePlan
from megatron_vlm.data.row_lengths import find_row_lengths
from megatron_vlm.data.rows import RowReader, empty_answer_note, reader_for, unknown_key_note
from megatron_vlm.data.rules import PromptRules
from megatron_vlm.data.worker_processes import raise_if_killed, signals_blocked, start_fork_server, start_worker
from megatron_vlm.errors import UserError

FEWEST_AHEAD_PER_WORKER, MOST_AHEAD_PER_WORKER = 2, 16
"""Micro-batches that a worker reads ahead: its part of a whole step, so that the next step's rows are read during this
one, within limits on shared memory."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchSharding:
    """The part of every global batch that a rank reads, the shape of its micro-batches, and its shard of them."""

    global_batch_size: int
    micro_batch_size: int
    data_parallel_rank: int = 0
    data_parallel_size: int = 1
    pad_to_multiple_of: int = 1
    context: ContextSharding | None = None

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one rank per global batch."""
        rows_per_pass = self.micro_batch_size * self.data_parallel_size
        assert self.global_batch_size % rows_per_pass == 0, "the configuration was checked against the layout"
        return self.global_batch_size // rows_per_pass

    def assign(self, plan: BatchPlan, packs: Sequence[Pack]) -> Assignment:
        """Assign the packs of a global batch to all data ranks."""
        return assign(self.global_batch_size, self.data_parallel_size, self.micro_batch_size, plan.costs(packs))


@dataclass(frozen=True)
class _Refusal:
    """A user error on its way out of a worker, where raising it would wrap it in a traceback."""

    error: UserError


class _MicroBatches(Dataset[MicroBatch | _Refusal]):
    """Micro-batches of a rank, by (position of the global batch in the plan, number of the micro-batch in it)."""

    def __init__(self, reader: RowReader, plan: BatchPlan, sharding: BatchSharding) -> None:
        self.reader = reader
        self.plan = plan
        self.sharding = sharding
        self._position: Position | None = None
        self._packs: list[Pack] = []
        """Of this rank, in the global batch at `_position`."""

    def __getitem__(self, item: tuple[Position, int]) -> MicroBatch | _Refusal:
        position, number = item
        size = self.sharding.micro_batch_size
        try:
            rows = [self._read(pack) for pack in self._packs_at(position)[number * size : (number + 1) * size]]
        except UserError as error:
            return _Refusal(error)
        builder, sharding = self.reader.builder, self.sharding
        batch = collate(rows, builder.rules, builder.padding_token_id, sharding.pad_to_multiple_of)
        return batch if sharding.context is None else shard_for_context(batch, sharding.context)

    def _packs_at(self, position: Position) -> list[Pack]:
        if position != self._position:
            packs = self.plan.packs(position, self.sharding.global_batch_size)
            mine = self.sharding.assign(self.plan, packs).packs[self.sharding.data_parallel_rank]
            self._position, self._packs = position, [packs[pack] for pack in mine]
        return self._packs

    def _read(self, pack: Pack) -> list[LoadedSample]:
        """Return the documents of one row of the batch."""
        return [self._read_row(row) for row in pack] or [self.reader.empty(0)]

    def _read_row(self, row: RowReference) -> LoadedSample:
        if self.plan.lengths is None:
            return self.reader.read(row.source, row.row)
        return self.reader.read_measured(row.source, row.row, self.plan.lengths[row.source])


class _Order:
    """Sampler of (position of a global batch, number of a micro-batch), from `start` on."""

    def __init__(self, plan: BatchPlan, sharding: BatchSharding, num_global_batches: int | None) -> None:
        self.plan = plan
        self.sharding = sharding
        self.num_global_batches = num_global_batches
        self.start = START

    def __iter__(self) -> Iterator[tuple[Position, int]]:
        position = self.start
        for _ in count() if self.num_global_batches is None else range(self.num_global_batches):
            for micro_batch in range(self.sharding.num_micro_batches):
                yield position, micro_batch
            position = self.plan.advance(position, self.sharding.global_batch_size)


class BatchLoader(abc.ABC):
    """A rank's micro-batches and the position in the plan.

    Args:
        plan: the order in which rows are read.
        sharding: this rank's part of every global batch.
        source_names: names of the data sources, for reports.
        num_global_batches: length of one iteration; None is endless.
    """

    def __init__(
        self, plan: BatchPlan, sharding: BatchSharding, source_names: Sequence[str], num_global_batches: int | None
    ) -> None:
        self.plan = plan
        self.sharding = sharding
        self.source_names = source_names
        self.num_global_batches = num_global_batches
        self.position = START
        """Behind the whole global batches that have been handed out; to be saved."""
        self.wait_seconds = 0.0
        """Time spent waiting for data since the loader was made."""
        self._last = START
        """Where the last global batch began."""

    @property
    def consumed_samples(self) -> int:
        """Rows of the data in the whole global batches that have been handed out, over all ranks."""
        return self.position.samples

    def facts(self) -> dict[str, Any]:
        """Return what is the same for loaders of all stages, by the names of this class' arguments."""
        return {
            "plan": self.plan,
            "source_names": self.source_names,
            "num_global_batches": self.num_global_batches,
        }

    @abc.abstractmethod
    def global_batch(self) -> list[MicroBatch]:
        """Return this rank's micro-batches of the next global batch."""

    @abc.abstractmethod
    def seek(self, position: Position) -> None:
        """Continue from a position of the plan (START: from the beginning)."""

    @abc.abstractmethod
    def close(self) -> None:
        """Stop the workers."""

    def last_assignment(self) -> Assignment:
        """Return which data rank took which packs of the last global batch."""
        return self.sharding.assign(self.plan, self.plan.packs(self._last, self.sharding.global_batch_size))

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what it refers to, as plain values; they are the same on every rank."""
        return self.plan.state(self.position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was saved, at any data-parallel size, micro-batch size or number of workers.

        Raises:
            DataError: the data or their order changed; the message names what changed.
        """
        self.seek(self.plan.check_state(state))

    def _advance(self) -> None:
        """Note that a global batch has been handed out."""
        self._last = self.position
        self.position = self.plan.advance(self.position, self.sharding.global_batch_size)


class MicroBatchLoader(BatchLoader):
    """Iterator over a rank's micro-batches, endless in training.

    Args:
        reader: reads rows of the sources as samples.
        plan: the order in which rows are read.
        sharding: this rank's part of every global batch.
        num_workers: processes that read ahead; 0 reads in this process.
        num_global_batches: length of one iteration; None is endless.
        pin_memory: put tensors into page-locked memory.
        report_problems: log one line for each bad or dropped row.

    Raises (from `next`):
        DataError, ConfigError: a row is refused, see `RowReader.read`; or a worker was killed.
    """

    def __init__(
        self,
        reader: RowReader,
        plan: BatchPlan,
        sharding: BatchSharding,
        *,
        num_workers: int = 0,
        num_global_batches: int | None = None,
        pin_memory: bool = False,
        report_problems: bool = True,
    ) -> None:
        super().__init__(plan, sharding, reader.names, num_global_batches)
        self.report_problems = report_problems
        self._micro_batches_given = 0
        self._with_empty_answers: set[int] = set()
        self._named_keys: set[tuple[int, str]] = set()
        self._drops_empty_answers = reader.builder.drop_empty_answers
        self._order = _Order(plan, sharding, num_global_batches)
        self._iterator: Iterator[Any] | None = None
        self._workers: set[BaseProcess] = set()
        workers: dict[str, Any] = {}
        if num_workers:
            of_a_step = -(-sharding.num_micro_batches // num_workers)
            workers = {
                "multiprocessing_context": start_fork_server(),
                "prefetch_factor": max(FEWEST_AHEAD_PER_WORKER, min(MOST_AHEAD_PER_WORKER, of_a_step)),
                "persistent_workers": True,
            }
        self._loader: DataLoader[Any] = DataLoader(
            _MicroBatches(reader, plan, sharding),
            batch_size=None,
            sampler=self._order,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=start_worker,
            **workers,
        )

    def __iter__(self) -> MicroBatchLoader:
        return self

    def __next__(self) -> MicroBatch:
        began = time.perf_counter()
        if self._iterator is None:
            self._iterator = self._start_iteration()
        try:
            batch = next(self._iterator)
        except (RuntimeError, EOFError, OSError):  # the last two where a tensor is fetched that it had read ahead
            raise_if_killed(self._workers)
            raise
        self.wait_seconds += time.perf_counter() - began
        if isinstance(batch, _Refusal):
            raise batch.error
        self._micro_batches_given += 1
        if self._micro_batches_given % self.sharding.num_micro_batches == 0:
            self._advance()
        for problem in batch.problems if self.report_problems else ():
            logger.warning("%s", problem)
        self._log_notes(batch)
        return batch

    def _log_notes(self, batch: MicroBatch) -> None:
        """Log the first row with an empty answer, and with each key that means nothing, of every source.

        On the first rank of those that read rows.
        """
        if not self.report_problems or self.sharding.data_parallel_rank:
            return
        for source, row_name in batch.empty_answers.items():
            if source not in self._with_empty_answers:
                self._with_empty_answers.add(source)
                logger.warning("%s", empty_answer_note(row_name, self._drops_empty_answers))
        for (source, key), row_name in batch.unknown_keys.items():
            if (source, key) not in self._named_keys:
                self._named_keys.add((source, key))
                logger.warning("%s", unknown_key_note(key, self.source_names[source], f"first in {row_name}"))

    def global_batch(self) -> list[MicroBatch]:
        return [next(self) for _ in range(self.sharding.num_micro_batches)]

    def seek(self, position: Position) -> None:
        self._iterator = None
        self._micro_batches_given = 0
        self._order.start = self.position = position

    def close(self) -> None:
        self._iterator = None
        # torch keeps persistent workers alive on the loader; there is no public way to stop them before it goes.
        self._loader._iterator = None
        for worker in self._workers:
            # Only a worker that hangs in a read is still alive, and it has SIGTERM blocked.
            worker.kill()
        self._workers = set()

    def _start_iteration(self) -> Iterator[Any]:
        others = {*multiprocessing.active_children()}
        with signals_blocked():
            iterator = iter(self._loader)
        started = {*multiprocessing.active_children()} - others
        if started:
            self._workers = started
            # An error may end the program without `close`; multiprocessing would then wait for the workers forever,
            # because it stops them with SIGTERM. Registered after torch's own hooks, this runs before them.
            atexit.register(_close_at_exit, weakref.ref(self))
        return iterator


def _close_at_exit(reference: weakref.ref[MicroBatchLoader]) -> None:
    loader = reference()
    if loader is not None:
        loader.close()


def build_train_loader(
    config: Config,
    rules: PromptRules,
    sharding: BatchSharding,
    *,
    token_costs: TokenCosts | None = None,
    pin_memory: bool = False,
    report_problems: bool = True,
) -> MicroBatchLoader:
    """Build the endless loader over data.train; with data.packing once the lengths of its rows were measured.

    Args:
        config: the run's configuration.
        rules: the family's prompt rules.
        sharding: this rank's part of every global batch.
        token_costs: what balances packed rows over data ranks; None leaves them in their order.
        pin_memory: put tensors into page-locked memory.
        report_problems: log bad and dropped rows; one rank per data-parallel rank should. The first of them also logs
            the notes on the model directory.

    Raises:
        ConfigError, DataError: see `PromptBuilder`, `RowReader` and `find_row_lengths`.
    """
    reader = reader_for(config, config.data.train, rules)
    for note in reader.builder.notes if report_problems and sharding.data_parallel_rank == 0 else ():
        logger.warning("%s", note)
    order = SamplePlan(reader.planned_sources(), config.train.seed, config.data.shuffle)
    return MicroBatchLoader(
        reader,
        _plan(config, order, reader, token_costs),
        sharding,
        num_workers=config.data.num_workers,
        pin_memory=pin_memory,
        report_problems=report_problems,
    )


def build_valid_loader(
    config: Config,
    rules: PromptRules,
    sharding: BatchSharding,
    *,
    token_costs: TokenCosts | None = None,
    pin_memory: bool = False,
    report_problems: bool = True,
) -> MicroBatchLoader | None:
    """Build the loader over data.valid, or return None without held-out data.

    It reads in file order, up to eval_iters global batches, and no row twice. Iterate over it, then `seek(START)`
    before the next evaluation. Arguments and errors are those of `build_train_loader`.
    """
    if not config.data.valid:
        return None
    reader = reader_for(config, config.data.valid, rules)
    order = SamplePlan(reader.planned_sources(), seed=0, shuffle=False, one_pass=True)
    plan = _plan(config, order, reader, token_costs)
    num_packs = plan.count_packs(config.train.eval_iters * sharding.global_batch_size)
    return MicroBatchLoader(
        reader,
        plan,
        sharding,
        num_workers=min(config.data.num_workers, 1),
        num_global_batches=-(-num_packs // sharding.global_batch_size),
        pin_memory=pin_memory,
        report_problems=report_problems,
    )


def _plan(config: Config, order: SamplePlan, reader: RowReader, token_costs: TokenCosts | None) -> BatchPlan:
    if not config.data.packing:
        return order
    return PackedPlan(order, find_row_lengths(reader), config.data.seq_length, token_costs)
