"""Searches the layouts of a number of GPUs for those with the least predicted time of a step.

Sizes are tried from few traced parts (`estimate`); the checks are those of training. The best are then traced in full,
so that what is reported of them is what the dry run would count.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_vlm.config import Config
from megatron_vlm.config_checks import validate
from megatron_vlm.errors import UserError
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.planning.estimate import Estimate, Estimator
from megatron_vlm.planning.parts import PartTracer
from megatron_vlm.planning.plan import Plan, Request, make_plan
from megatron_vlm.planning.preflight import check_layout
from megatron_vlm.planning.search_space import SearchSpace, Sizes
from megatron_vlm.planning.state_bytes import FP32_BYTES, optimizer_bytes, value_bytes
from megatron_vlm.planning.step_time import Clock, spans_of

_CLOSE = 1.08  # times the fastest step so far; the waiting of slower ones is not simulated
_MOST_HOLDERS = 4  # chunks with layers of the tower, where the best layout's other way to place it is looked for
_REFINED = 8  # best combinations of sizes for which more micro-batch and expert-tensor sizes are tried

Progress = Callable[[str], None]


@dataclass
class RuledOut:
    """Layouts that cannot be used, for one kind of reason.

    Attributes:
        reason: the reason, of one of them.
        count: how many there are.
    """

    reason: str
    count: int = 0


@dataclass
class SearchResult:
    """What a search found.

    Attributes:
        plans: the best layouts, fastest first.
        num_estimated: layouts that were estimated.
        num_fitting: those of them that fit into memory.
        ruled_out: why others cannot be used.
        closest: the layout that takes least memory, where none fits.
        other_tower: the best layout with its vision tower spread over several chunks where it is whole, or whole where
            it is spread; None with one stage, or without layers of a tower.
    """

    plans: list[Plan] = field(default_factory=list)
    num_estimated: int = 0
    num_fitting: int = 0
    ruled_out: list[RuledOut] = field(default_factory=list)
    closest: Estimate | None = None
    other_tower: Plan | None = None


class Search:
    """One search; `run` carries it out.

    Args:
        request: what is planned for; settings of its configuration that are not searched hold for all layouts.
        fixed: settings that the user chose, by dotted key, which the search leaves alone.
        progress: called with a line from time to time.
    """

    def __init__(self, request: Request, fixed: Mapping[str, Any], progress: Progress = lambda line: None) -> None:
        self._request, self._progress = request, progress
        self._space = SearchSpace(request, fixed)
        self._tracer = PartTracer(
            request.config, request.family, request.model_config, request.images_per_row, request.clips_per_row
        )
        self._estimators: dict[Any, Estimator] = {}
        self._reasons: dict[str, RuledOut] = {}
        self._fitting: dict[Sizes, Estimate] = {}
        self._tried: set[Sizes] = set()
        self._result = SearchResult()
        self._fastest = math.inf
        self._num_parameters = _num_parameters(request)

    def run(self, num_plans: int = 5) -> SearchResult:
        """Return the best layouts."""
        space = self._space
        for tensor in space.tensors:
            for sizes in space.first_points(tensor):
                self._try(sizes)
            self._progress(f"tensor {tensor}: {self._result.num_estimated} layouts estimated")
        for best in self._best_groups(_REFINED):
            for sizes in space.points_near(best):
                self._try(sizes)
        self._progress(f"{self._result.num_estimated} layouts estimated, {len(self._fitting)} fit")
        self._result.num_fitting = len(self._fitting)
        self._trace_best(num_plans)
        self._result.ruled_out = sorted(self._reasons.values(), key=lambda entry: -entry.count)
        return self._result

    def _trace_best(self, num_plans: int) -> None:
        """Trace the best estimates in full; one that turns out not to fit is left out."""
        for sizes in self._best_groups(len(self._fitting)):
            if len(self._result.plans) == num_plans:
                break
            estimate = self._fitting[sizes]
            plan = make_plan(self._request, estimate.config, estimate.layout)
            if plan.most_bytes > self._request.usable_bytes:
                self._rule_out_by_memory(estimate)
                continue
            self._result.plans.append(plan)
            self._progress(f"traced {plan.layout}")
        self._result.plans.sort(key=lambda plan: plan.step.total)
        if self._result.plans:
            self._result.other_tower = self._with_other_tower(self._result.plans[0])

    def _best_groups(self, count: int) -> list[Sizes]:
        """Return the fastest estimates, the best one of each group."""
        best: dict[tuple[int, ...], Sizes] = {}
        for sizes in sorted(self._fitting, key=lambda sizes: self._fitting[sizes].step.total):
            best.setdefault(sizes.group, sizes)
        return list(best.values())[:count]

    def _try(self, sizes: Sizes) -> None:
        """Estimate a point with as little recomputation as it needs to fit."""
        if sizes in self._tried:
            return
        self._tried.add(sizes)
        request = self._request
        config = self._space.applied(sizes)
        try:
            validate(config)
            layout = check_layout(config, request.model_config, request.num_gpus)
        except UserError as error:
            for problem in error.problems or (error,):
                self._rule_out(str(problem))
            return
        if self._least_bytes(config, layout) > request.usable_bytes:
            self._rule_out("parameters, gradients and optimizer state alone exceed the memory of a GPU")
            return
        for recompute in self._space.recompute:
            candidate = dataclasses.replace(config, model=dataclasses.replace(config.model, recompute=recompute))
            estimates = list[Estimate]()
            for staged in self._stagings(candidate, layout):
                known = self._fitting.get(sizes)
                enough = min(_CLOSE * self._fastest, math.inf if known is None else known.step.total)
                estimates.append(self._estimate(*staged, enough=enough))
                self._keep_if_it_fits(sizes, estimates[-1])
            self._result.num_estimated += len(estimates)
            # More recomputation pays only where it lets the faster split of the layers fit.
            if min(estimates, key=lambda estimate: estimate.step.total).most_bytes <= request.usable_bytes:
                return

    def _keep_if_it_fits(self, sizes: Sizes, estimate: Estimate) -> None:
        if estimate.most_bytes > self._request.usable_bytes:
            self._rule_out_by_memory(estimate)
            return
        known = self._fitting.get(sizes)
        if known is None or estimate.step.total < known.step.total:
            self._fitting[sizes] = estimate
            self._fastest = min(self._fastest, estimate.step.total)

    def _stagings(self, config: Config, layout: Layout) -> Iterator[tuple[Config, Layout]]:
        """Yield splits of layers over chunks that even out towers and head, and the even one.

        A tower that takes longer than an average chunk is also spread over as many as it takes, one fewer and one more.
        """
        if self._space.keeps_layers or layout.pipeline_size == 1:
            yield config, layout
            return
        towers = [layout.tower_counts]
        if self._space.spreads_tower:
            estimator, num_chunks = self._estimator(config, layout), len(layout.chunks)
            needed = min(math.ceil(estimator.chunks_of_tower(num_chunks)), num_chunks)
            if needed > 1:
                holders = range(max(2, needed - 1), min(needed + 1, num_chunks) + 1)
                towers += self._spread_towers(estimator, holders, num_chunks)
        for tower_counts in towers:
            staged = self._balanced(config, layout, tower_counts)
            if staged[1].chunks != layout.chunks or staged[1].tower_counts != layout.tower_counts:
                yield staged
        yield config, layout

    def _spread_towers(self, estimator: Estimator, holders: Iterable[int], num_chunks: int) -> list[tuple[int, ...]]:
        """Return the tower's layers per chunk when these numbers of chunks have any."""
        num_layers = self._request.model_config.num_tower_layers
        return [
            tuple(estimator.spread_tower(num_layers, count, num_chunks)) for count in holders if count <= num_layers
        ]

    def _balanced(self, config: Config, layout: Layout, tower_counts: tuple[int, ...]) -> tuple[Config, Layout]:
        """Return a layout with these layers of the tower per chunk, and decoder layers that even out the ranks."""
        counts = self._estimator(config, layout).balanced(layout, tower_counts)
        tower = list(tower_counts) or None
        parallel = dataclasses.replace(config.parallel, pipeline_layout=counts, vision_pipeline_layout=tower)
        config = dataclasses.replace(config, parallel=parallel)
        return config, check_layout(config, self._request.model_config, self._request.num_gpus)

    def _with_other_tower(self, plan: Plan) -> Plan | None:
        """Plan the same sizes with the tower spread, or whole where it is spread; the fastest that fits, or of all."""
        config, layout, num_layers = plan.config, plan.layout, self._request.model_config.num_tower_layers
        if layout.pipeline_size == 1 or num_layers < 2:
            return None
        towers: list[tuple[int, ...]] = [()]
        if layout.embedding_chunk == 0:
            holders = range(2, min(_MOST_HOLDERS, len(layout.chunks)) + 1)
            towers = self._spread_towers(self._estimator(config, layout), holders, len(layout.chunks))
        estimates = [self._estimate(*self._balanced(config, layout, tower_counts)) for tower_counts in towers]
        usable = self._request.usable_bytes
        best = min(estimates, key=lambda estimate: (estimate.most_bytes > usable, estimate.step.total))
        return make_plan(self._request, best.config, best.layout)

    def _estimate(self, config: Config, layout: Layout, enough: float = math.inf) -> Estimate:
        return self._estimator(config, layout).estimate(config, layout, enough)

    def _estimator(self, config: Config, layout: Layout) -> Estimator:
        key = (
            *(layout.tensor_size, layout.pipeline_size, layout.expert_size, layout.expert_tensor_size),
            *(config.train.micro_batch_size, config.model.recompute, config.model.vision_parallelism),
        )
        if key not in self._estimators:
            clock = Clock(self._request.hardware, spans_of(layout, self._request.hardware))
            self._estimators[key] = Estimator(self._tracer.parts(config), clock)
        return self._estimators[key]

    def _least_bytes(self, config: Config, layout: Layout) -> float:
        """Return what every rank holds at least, on average, however parameters are sharded."""
        shards = layout.pipeline_size * max(layout.tensor_size, layout.expert_size * layout.expert_tensor_size)
        bytes_per_value = value_bytes(config) + (0 if config.model.freeze else FP32_BYTES)
        state = (
            0
            if config.model.freeze
            else optimizer_bytes(config, self._num_parameters, self._num_parameters) / layout.world_size
        )
        return self._num_parameters * bytes_per_value / shards + state

    def _rule_out(self, reason: str) -> None:
        kind = re.sub(r"\d+", "N", reason.partition(" -- ")[0])
        self._reasons.setdefault(kind, RuledOut(reason.partition(" -- ")[0])).count += 1

    def _rule_out_by_memory(self, estimate: Estimate) -> None:
        closest = self._result.closest
        if closest is None or estimate.most_bytes < closest.most_bytes:
            self._result.closest = estimate
        reason = (
            f"recompute {estimate.config.model.recompute} takes more than the "
            f"{self._request.usable_bytes / 2**30:.1f} GiB of a GPU that may be used"
        )
        self._reasons.setdefault(reason, RuledOut(reason)).count += 1


def _num_parameters(request: Request) -> int:
    return sum(math.prod(weight.shape) for _, weight in request.family.weight_map(request.model_config).items())
