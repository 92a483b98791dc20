"""What the parts of a model hold and do: embedding and towers, each kind of decoder layer, final norm and head.

A part is traced once for each way in which it can be sharded and computed. Any chunk of any pipeline is put together
from its parts, so that thousands of layouts take few traces. What a part does depends on few of a layout's sizes:
towers and head are not sharded over experts' ranks, and no part on the number of stages or of data ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import lcm, prod
from typing import Any

from megatron_vlm.config import Config
from megatron_vlm.families.registry import Family
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.simulate import simulated_rank
from megatron_vlm.parallel.stage_state import packed_shape
from megatron_vlm.planning.recorder import Counts, fake_tensors
from megatron_vlm.planning.stages import HeldParameter, fake_chunks, full_batch, held_parameters
from megatron_vlm.planning.state_bytes import value_bytes
from megatron_vlm.planning.trace import Tracer

_LAYER = "language_model.layers."


@dataclass(frozen=True)
class Part:
    """What a part of a chunk holds and does for a micro-batch.

    Attributes:
        parameters: its parameters by name.
        work: its operators and exchanges.
        kept_bytes: memory between its forward and its backward pass.
        working_bytes: most memory that a pass needs beyond what is kept.
    """

    parameters: Mapping[str, HeldParameter]
    work: Counts
    kept_bytes: int
    working_bytes: int


@dataclass(frozen=True)
class Parts:
    """The parts of a model, as one rank of a layout has them.

    Attributes:
        first: embedding and towers.
        frame: what every chunk with layers has beside them, such as rotary tables.
        layers: every decoder layer; those that do the same are one object.
        last: final norm, head and loss.
        hidden_bytes: size of the hidden states that a layer reads and, if it trains, keeps.
        received_bytes: by the global id of a layer, what a chunk receives that begins with it; the last entry is for
            a chunk with only the head.
    """

    first: Part
    frame: Part
    layers: tuple[Part, ...]
    last: Part
    hidden_bytes: int
    received_bytes: tuple[int, ...]


class PartTracer:
    """Traces the parts of a model for any layout, each once.

    Args:
        config: a validated configuration; its settings beside those that `parts` reads hold for all layouts.
        family: the model's family.
        model_config: the family's configuration of the model.
        images_per_row: images in an average row.
        clips_per_row: clips of audio in an average row.
    """

    def __init__(
        self, config: Config, family: Family, model_config: Any, images_per_row: float, clips_per_row: float
    ) -> None:
        self._config, self._family, self._model_config = config, family, model_config
        self._media_per_row = images_per_row, clips_per_row
        self._known: dict[Any, Any] = {}

    def parts(self, config: Config) -> Parts:
        """Return the parts in the layout of a configuration, which may differ from the tracer's in nothing else.

        Read are tensor, sequence, expert and expert-tensor parallelism, `train.micro_batch_size`, `model.recompute` and
        `model.vision_parallelism`.
        """
        parallel, model = config.parallel, config.model
        dense = (parallel.tensor_model_parallel_size, parallel.sequence_parallel, config.train.micro_batch_size)
        experts = (parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size)
        first = self._once(("first", *dense, model.recompute, model.vision_parallelism), config, self._first)
        frame, layers = self._once(("layers", *dense, *experts, model.recompute), config, self._layers)
        last, hidden_bytes, received_bytes = self._once(("last", *dense), config, self._last)
        return Parts(first, frame, layers, last, hidden_bytes, received_bytes)

    def _once(self, key: Any, config: Config, trace: Any) -> Any:
        if key not in self._known:
            self._known[key] = trace(config)
        return self._known[key]

    def _first(self, config: Config) -> Part:
        (chunk,) = self._trace(_without_experts(config), [()], position=0)
        return chunk.rest

    def _layers(self, config: Config) -> tuple[Part, tuple[Part, ...]]:
        kinds: dict[Any, list[int]] = {}
        for index, layer in enumerate(self._model_config.text.layers):
            kinds.setdefault(layer, []).append(index)
        # One from the middle: what is added to the first few layers is no part of all.
        chosen = [indices[len(indices) // 2] for indices in kinds.values()]
        traced = self._trace(config, [(index,) for index in chosen], position=1)
        by_kind = {kind: chunk.layers[index] for kind, index, chunk in zip(kinds, chosen, traced, strict=True)}
        frame = max((chunk.rest for chunk in traced), key=lambda part: part.kept_bytes)
        return frame, tuple(by_kind[layer] for layer in self._model_config.text.layers)

    def _last(self, config: Config) -> tuple[Part, int, tuple[int, ...]]:
        num_layers = len(self._model_config.text.layers)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, recompute="full"))
        (chunk,) = self._trace(_without_experts(config), [(num_layers - 1,)], position=2)
        return chunk.rest, chunk.hidden_bytes, chunk.received_bytes

    def _trace(self, config: Config, chunks: Iterable[tuple[int, ...]], position: int) -> list[_TracedChunk]:
        """Trace chunks with these layers as the first (0), a middle (1) or the last (2) of three stages."""
        parallel = config.parallel
        tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
        shared = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
        layout = Layout(
            tensor_size=tensor,
            sequence_parallel=parallel.sequence_parallel,
            pipeline_size=3,
            context_size=context,
            data_size=lcm(tensor * context, shared) // (tensor * context),
            expert_size=parallel.expert_model_parallel_size,
            expert_tensor_size=parallel.expert_tensor_parallel_size,
            chunks=((), (), ()),
        )
        num_layers = len(self._model_config.text.layers)
        rank, tracer, traced = position * (layout.world_size // 3), Tracer(), []
        with simulated_rank(rank, layout) as groups, fake_tensors():
            batch = full_batch(config, self._family, self._model_config, layout, *self._media_per_row)
            for layers in chunks:
                held = [layers if stage == position else () for stage in range(3)]
                held[position - 1] = tuple(range(num_layers - len(layers)))  # somewhere else
                placed = dataclasses.replace(layout, chunks=tuple(held))
                (chunk,) = fake_chunks(config, self._family, self._model_config, placed, groups)
                counts = tracer.trace(chunk, batch)
                parameters = held_parameters([chunk])
                boundaries = [chunk.boundary(layer, batch) for layer in range(num_layers + 1)]
                traced.append(
                    _TracedChunk(
                        rest=_rest(parameters, counts),
                        layers={
                            index: Part(
                                _of_layer(parameters, index), layer, layer.kept_bytes, counts.total.working_bytes
                            )
                            for index, layer in counts.layers.items()
                        },
                        hidden_bytes=prod(boundaries[0].hidden) * value_bytes(config),
                        received_bytes=tuple(
                            prod(packed_shape(boundary)) * value_bytes(config) for boundary in boundaries
                        ),
                    )
                )
        return traced


@dataclass(frozen=True)
class _TracedChunk:
    """What a trace found in one chunk."""

    rest: Part
    layers: Mapping[int, Part]
    hidden_bytes: int
    received_bytes: tuple[int, ...]


def _without_experts(config: Config) -> Config:
    """Return a configuration that does not shard experts, for parts without any."""
    parallel = dataclasses.replace(config.parallel, expert_model_parallel_size=1, expert_tensor_parallel_size=1)
    return dataclasses.replace(config, parallel=parallel)


def _rest(parameters: Mapping[str, HeldParameter], counts: Any) -> Part:
    """Return the part of a traced chunk beside its layers."""
    return Part(
        {name: entry for name, entry in parameters.items() if not name.startswith(_LAYER)},
        counts.total.without(counts.layers.values()),
        counts.total.kept_bytes - sum(layer.kept_bytes for layer in counts.layers.values()),
        counts.total.working_bytes,
    )


def _of_layer(parameters: Mapping[str, HeldParameter], index: int) -> dict[str, HeldParameter]:
    prefix = f"{_LAYER}{index}."
    return {name: entry for name, entry in parameters.items() if name.startswith(prefix)}
