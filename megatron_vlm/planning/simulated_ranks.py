"""Checks that ranks of a layout agree with its plan and with each other, on one process, for layouts of any size.

Each rank is built alone, as it would build itself: nothing that one knows of another is taken for granted.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlm import platform
from megatron_vlm.config import Config
from megatron_vlm.errors import ConfigError
from megatron_vlm.families.build import build_chunks, build_settings
from megatron_vlm.families.registry import Family
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.parameters import spec_of
from megatron_vlm.parallel.sharding import full_shape, splits
from megatron_vlm.parallel.simulate import simulated_rank
from megatron_vlm.parallel.stage_state import packed_shape
from megatron_vlm.planning.plan import Plan, Request
from megatron_vlm.planning.recorder import fake_tensors
from megatron_vlm.planning.stages import fake_chunks, full_batch
from megatron_vlm.planning.state_bytes import value_bytes

SAMPLED = "sampled"
_NUM_SAMPLED = 4


@dataclass(frozen=True)
class RankGroup:
    """A process group as one of its ranks sees it.

    Attributes:
        ranks: its ranks.
        position: the rank's own position in it.
    """

    ranks: tuple[int, ...]
    position: int


@dataclass(frozen=True)
class RankChunk:
    """A pipeline chunk as its rank built it.

    Attributes:
        layers: first decoder layer and the one after the last, global ids.
        receives: shape of what it receives; None on the first chunk.
        sends: shape of what it sends; None on the last.
        parameters: full shape of each of its parameters, and the chunks that should hold a copy.
    """

    layers: tuple[int, int]
    receives: tuple[int, ...] | None
    sends: tuple[int, ...] | None
    parameters: Mapping[str, tuple[tuple[int, ...], str]]


@dataclass
class RankChecks:
    """Asks ranks of one layout, each of which is built once.

    Attributes:
        config: a validated configuration.
        family: the model's family.
        model_config: the family's configuration of the model.
        layout: the layout.
        problems: what was found.
    """

    config: Config
    family: Family
    model_config: Any
    layout: Layout
    problems: list[str] = field(default_factory=list)
    _groups: dict[int, dict[str, RankGroup]] = field(default_factory=dict)
    _chunks: dict[int, list[RankChunk]] = field(default_factory=dict)

    def check(self, ranks: Iterable[int]) -> None:
        """Check ranks: their groups, their pipelines, and who holds which parameters and experts."""
        for rank in ranks:
            for name, group in self.groups_of(rank).items():
                self._check_group(rank, name, group)
            self._check_pipeline(rank)

    @property
    def num_asked(self) -> int:
        """Ranks whose groups were built."""
        return len(self._groups)

    def groups_of(self, rank: int) -> dict[str, RankGroup]:
        """Return the process groups that a rank builds for itself, by megatron-core's names."""
        if rank not in self._groups:
            with simulated_rank(rank, self.layout) as groups:
                self._groups[rank] = _groups(groups)
        return self._groups[rank]

    def chunks_of(self, rank: int) -> list[RankChunk]:
        """Return the chunks that a rank builds for itself."""
        if rank not in self._chunks:
            with simulated_rank(rank, self.layout) as groups, fake_tensors():
                self._groups[rank] = _groups(groups)
                batch = full_batch(self.config, self.family, self.model_config, self.layout, 1.0, 1.0)
                chunks = fake_chunks(self.config, self.family, self.model_config, self.layout, groups)
                for chunk in chunks:
                    self._check_splits(rank, chunk, groups)
                self._chunks[rank] = [
                    RankChunk(
                        (chunk.first_layer, chunk.end_layer),
                        None if chunk.pre_process else packed_shape(chunk.boundary_before(batch)),
                        None if chunk.post_process else packed_shape(chunk.boundary_after(batch)),
                        {
                            name: (full_shape(parameter, groups), spec_of(parameter).stages)
                            for name, parameter in chunk.named_parameters()
                        },
                    )
                    for chunk in chunks
                ]
        return self._chunks[rank]

    def _check_group(self, rank: int, name: str, group: RankGroup) -> None:
        """Check that members of a rank's group build the same one, each at a position of its own."""
        others = group.ranks[0], group.ranks[-1], group.ranks[group.position - 1], group.ranks[len(group.ranks) // 2]
        for position, member in enumerate(group.ranks):
            if member not in (rank, *others):
                continue
            found = self.groups_of(member).get(name)
            if found != RankGroup(group.ranks, position):
                self.problems.append(f"rank {rank} has rank {member} in its group {name}, which has {found} itself")

    def _check_splits(self, rank: int, chunk: torch.nn.Module, groups: ProcessGroupCollection) -> None:
        """Check that a rank's shards are those of its positions in the groups that it is asked about."""
        known = {own.ranks: own.position for own in self._groups[rank].values()}
        for name, parameter in chunk.named_parameters():
            for split in splits(parameter, groups):
                ranks = tuple(torch.distributed.get_process_group_ranks(split.group))
                if known.get(ranks) != split.group.rank():
                    self.problems.append(f"rank {rank} has no shard of its own of {name}")

    def _check_pipeline(self, rank: int) -> None:
        """Check a rank's pipeline: each layer once, messages that match, every parameter where it belongs."""
        stages = self.groups_of(rank)["pp"].ranks
        num_chunks = len(self.layout.chunks)
        chunks = [self.chunks_of(stages[index % len(stages)])[index // len(stages)] for index in range(num_chunks)]
        end = 0
        for index, chunk in enumerate(chunks):
            if chunk.layers[0] != end:
                self.problems.append(
                    f"chunk {index} of rank {rank}'s pipeline begins with layer {chunk.layers[0]}, not {end}"
                )
            end = chunk.layers[1]
            if index and chunk.receives != chunks[index - 1].sends:
                self.problems.append(
                    f"chunk {index} of rank {rank}'s pipeline receives {chunk.receives}, but is sent "
                    f"{chunks[index - 1].sends}"
                )
        if end != len(self.model_config.text.layers):
            self.problems.append(f"rank {rank}'s pipeline ends before layer {end}")
        self.problems += _misplaced(chunks, self.layout, self.family, self.model_config)


def _groups(groups: ProcessGroupCollection) -> dict[str, RankGroup]:
    """Return a rank's groups by name."""
    return {
        name: RankGroup(tuple(torch.distributed.get_process_group_ranks(group)), group.rank())
        for name, group in vars(groups).items()
        if isinstance(group, torch.distributed.ProcessGroup)
    }


def _misplaced(chunks: Sequence[RankChunk], layout: Layout, family: Family, model_config: Any) -> Iterator[str]:
    """Yield the parameters of the model that are on other chunks than they should, or of another full shape."""
    weights = {name: tuple(weight.padded_shape) for name, weight in family.weight_map(model_config).items()}
    copies = {"one": 1, "embedding_and_head": 1 + (layout.embedding_chunk < len(chunks) - 1), "all": len(chunks)}
    held: Counter[str] = Counter()
    for chunk in chunks:
        for name, (shape, stages) in chunk.parameters.items():
            held[name] += 1
            if shape != weights.get(name):
                yield f"{name} is {shape} in full, but the model's is {weights.get(name)}"
            if (count := sum(name in other.parameters for other in chunks)) != copies[stages]:
                yield f"{name} is on {count} chunks, not on {copies[stages]}"
    yield from (f"{name} is on no chunk" for name in weights if not held[name])


def check_plan(which: str, request: Request, plan: Plan) -> tuple[list[str], str]:
    """Compare ranks with a plan and with each other.

    Args:
        which: a rank, or `SAMPLED`.
        request: what was planned for.
        plan: the plan.

    Returns:
        What is wrong, and what was checked in words.

    Raises:
        ConfigError: there is no such rank.
    """
    layout = plan.layout
    ranks = ranks_to_check(which, layout.world_size)
    checks = RankChecks(plan.config, request.family, request.model_config, layout)
    checks.check(ranks)
    problems, lines = checks.problems, []
    for rank in ranks:
        found = real_parameter_bytes(plan.config, request.family, request.model_config, layout, rank)
        stage = plan.memory[rank // (layout.world_size // layout.pipeline_size)]
        planned = stage.num_parameters * value_bytes(plan.config)
        lines.append(f"rank {rank} has {found:,} bytes of parameters")
        if found != planned:
            problems.append(f"rank {rank} has {found:,} bytes of parameters, planned are {planned:,}")
    said = f"{len(problems)} difference{'s' * (len(problems) > 1)}"
    if not problems:
        said = (
            f"{'; '.join(lines)}: as planned. Groups agree among the {checks.num_asked} ranks that were asked, and the "
            "stages of these ranks' pipelines fit each other"
        )
    return problems, said


def ranks_to_check(which: str, size: int) -> list[int]:
    """Return the ranks, of this many, that `which` names.

    Raises:
        ConfigError: there is no such rank.
    """
    if which == SAMPLED:
        return sample_ranks(size)
    if which.isascii() and which.isdecimal() and int(which) < size:
        return [int(which)]
    raise ConfigError(f"--check is {which!r}", fix=f"give {SAMPLED}, or a rank from 0 to {size - 1}")


def sample_ranks(size: int) -> list[int]:
    """Return the first and the last of this many ranks, and some between, always the same."""
    between = random.Random(size).sample(range(size), min(size, _NUM_SAMPLED - 2))
    return sorted({0, size - 1, *between})


def real_parameter_bytes(config: Config, family: Family, model_config: Any, layout: Layout, rank: int) -> int:
    """Build a rank's chunks with memory, which the system gives only where it is written, and count their bytes."""
    with simulated_rank(rank, layout) as groups:
        settings = build_settings(config, layout)
        chunks = build_chunks(family, model_config, settings, groups, platform.current().device)
        return sum(parameter.nbytes for chunk in chunks for parameter in chunk.parameters())
