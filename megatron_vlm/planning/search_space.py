"""The layouts that a search considers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_vlm.config import Config
from megatron_vlm.planning.expert_checks import experts_of
from megatron_vlm.planning.plan import Request

SEARCHED = (
    "parallel.tensor_model_parallel_size",
    "parallel.sequence_parallel",
    "parallel.pipeline_model_parallel_size",
    "parallel.virtual_pipeline_model_parallel_size",
    "parallel.pipeline_layout",
    "parallel.vision_pipeline_layout",
    "parallel.expert_model_parallel_size",
    "parallel.expert_tensor_parallel_size",
    "train.micro_batch_size",
    "model.recompute",
    "model.vision_parallelism",
)
"""Settings that a search chooses, unless the user did."""

_RECOMPUTE = ("none", "selective", "full")  # the less is computed twice, the better, if it fits
_VIRTUAL = (1, 2, 3, 4, 6, 8)
_MOST_TOKENS = 16_384  # of a micro-batch of several rows: more only take memory
_ROWS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Sizes:
    """One point of the search; recomputation, and the layers of each chunk and of a vision tower, follow from it."""

    tensor: int
    pipeline: int
    virtual: int
    expert: int
    expert_tensor: int
    micro_batch: int
    vision_parallelism: str

    def applied_to(self, config: Config) -> Config:
        """Return a configuration with these sizes, and sequence parallelism wherever layers are sharded."""
        parallel = dataclasses.replace(
            config.parallel,
            tensor_model_parallel_size=self.tensor,
            sequence_parallel=self.tensor > 1,
            pipeline_model_parallel_size=self.pipeline,
            virtual_pipeline_model_parallel_size=self.virtual,
            pipeline_layout=None,
            vision_pipeline_layout=None,
            expert_model_parallel_size=self.expert,
            expert_tensor_parallel_size=self.expert_tensor,
        )
        model = dataclasses.replace(config.model, vision_parallelism=self.vision_parallelism)  # type: ignore[arg-type]
        train = dataclasses.replace(config.train, micro_batch_size=self.micro_batch)
        return dataclasses.replace(config, parallel=parallel, model=model, train=train)

    @property
    def group(self) -> tuple[int, ...]:
        """What distinguishes the layouts of a list for readers."""
        return self.tensor, self.pipeline, self.virtual, self.expert, self.expert_tensor, self.micro_batch


class SearchSpace:
    """The sizes to try for a request.

    Args:
        request: what is planned for.
        fixed: settings that the user chose, by dotted key; no others are tried.
    """

    def __init__(self, request: Request, fixed: Mapping[str, Any]) -> None:
        self._request, self._fixed = request, fixed
        layers = request.model_config.text.layers
        self._num_layers = len(layers)
        self._nums_experts = {moe.num_experts for layer in layers if (moe := experts_of(layer))}

    @property
    def recompute(self) -> Sequence[Any]:
        """Kinds of recomputation, the least first."""
        return self._choices("model.recompute", _RECOMPUTE)

    @property
    def keeps_layers(self) -> bool:
        """Whether the user chose the layers of each chunk."""
        return "parallel.pipeline_layout" in self._fixed

    @property
    def spreads_tower(self) -> bool:
        """Whether layers of a vision tower may go to any chunks."""
        is_free = not self.keeps_layers and "parallel.vision_pipeline_layout" not in self._fixed
        return is_free and self._request.model_config.num_tower_layers > 1

    @property
    def tensors(self) -> Sequence[int]:
        """Tensor sizes, up to a node."""
        ranks = min(self._request.hardware.gpus_per_node, self._request.num_gpus)
        return self._choices("parallel.tensor_model_parallel_size", _divisors(ranks))

    def first_points(self, tensor: int) -> Iterator[Sizes]:
        """Yield points with a tensor size, the smallest micro-batch and unsharded experts."""
        for pipeline in self._pipelines(tensor):
            for expert in self._experts(pipeline):
                yield from self._points(
                    tensor, pipeline, expert, self._expert_tensors(tensor)[:1], self._micro_batches()[:1]
                )

    def points_near(self, sizes: Sizes) -> Iterator[Sizes]:
        """Yield points with the same tensor, pipeline and expert size as another."""
        tensor, pipeline, expert = sizes.tensor, sizes.pipeline, sizes.expert
        yield from self._points(tensor, pipeline, expert, self._expert_tensors(tensor), self._micro_batches())

    def applied(self, sizes: Sizes) -> Config:
        """Return the configuration of a point, with what the user chose."""
        config, parallel = sizes.applied_to(self._request.config), self._request.config.parallel
        own = {
            name: getattr(parallel, name)
            for name in ("sequence_parallel", "pipeline_layout", "vision_pipeline_layout")
            if f"parallel.{name}" in self._fixed
        }
        return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **own))

    def _points(
        self, tensor: int, pipeline: int, expert: int, expert_tensors: Sequence[int], micro_batches: Sequence[int]
    ) -> Iterator[Sizes]:
        for expert_tensor in expert_tensors:
            for micro_batch in micro_batches:
                for virtual in self._virtuals(pipeline):
                    for vision in self._vision(tensor):
                        yield Sizes(tensor, pipeline, virtual, expert, expert_tensor, micro_batch, vision)

    def _choices(self, key: str, values: Sequence[Any]) -> Sequence[Any]:
        return (self._fixed[key],) if key in self._fixed else values

    def _pipelines(self, tensor: int) -> Sequence[int]:
        sizes = [size for size in _divisors(self._request.num_gpus // tensor) if size <= self._num_layers]
        return self._choices("parallel.pipeline_model_parallel_size", sizes)

    def _virtuals(self, pipeline: int) -> Sequence[int]:
        most = self._num_layers // pipeline if pipeline > 1 else 1
        sizes = [size for size in _VIRTUAL if size <= most]
        return self._choices("parallel.virtual_pipeline_model_parallel_size", sizes)

    def _experts(self, pipeline: int) -> Sequence[int]:
        stage = self._request.num_gpus // pipeline
        most = min(self._nums_experts, default=1)
        sizes = [size for size in _divisors(most) if stage % size == 0]
        return self._choices("parallel.expert_model_parallel_size", sizes)

    def _expert_tensors(self, tensor: int) -> Sequence[int]:
        sizes = (1, tensor) if self._nums_experts and tensor > 1 else (1,)
        return self._choices("parallel.expert_tensor_parallel_size", sizes)

    def _micro_batches(self) -> Sequence[int]:
        config = self._request.config
        most = max(1, _MOST_TOKENS // config.data.seq_length)
        sizes = [size for size in _ROWS if size <= most and config.train.global_batch_size % size == 0]
        return self._choices("train.micro_batch_size", sizes)

    def _vision(self, tensor: int) -> Sequence[str]:
        has_tower = self._request.model_config.vision is not None and tensor > 1
        return self._choices("model.vision_parallelism", ("tensor", "data") if has_tower else ("tensor",))


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
