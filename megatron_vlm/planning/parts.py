"""What the parts of a model hold and do: embedding and towers, each kind of decoder layer, final norm and head.

A part is traced once for each way in which it can be sharded and computed. Any chunk of any pipeline is put together
from its parts, so that thousands of layouts take few traces. What a part does depends on few of a layout's sizes:
towers and head are not sharded over experts' ranks, and no part on the number of stages or of data ranks.

The layers of a vision tower are alike: chunks of one that is spread are known from those with none, one or two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import lcm, prod
from typing import Any

from megatron_vlm.config import Config
from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.families.registry import Family
from megatron_vlm.model.model_chunk import ModelChunk
from megatron_vlm.model.vision_tower import tower_boundary
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
class TowerPart:
    """What a chunk holds and does of a spread vision tower, traced with two numbers of its layers.

    Attributes:
        nums_layers: the two numbers; they may be the same.
        traced: the parts with as many.
    """

    nums_layers: tuple[int, int]
    traced: tuple[Part, Part]


@dataclass(frozen=True)
class SpreadTower:
    """A vision tower whose layers lie on several chunks.

    Attributes:
        start: on the first chunk: what is before the layers, and some of them.
        middle: on a chunk between: layers alone.
        end: on the last: layers, what is behind them, and the embedding.
        received_bytes: by the global id of a layer, what a chunk receives that begins with it.
    """

    start: TowerPart
    middle: TowerPart
    end: TowerPart
    received_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Parts:
    """The parts of a model, as one rank of a layout has them.

    Attributes:
        first: embedding and whole towers.
        frame: what every chunk with layers has beside them, such as rotary tables.
        layers: every decoder layer; those that do the same are one object.
        last: final norm, head and loss.
        hidden_bytes: size of the hidden states that a layer reads and, if it trains, keeps.
        received_bytes: by the global id of a layer, what a chunk receives that begins with it; the last entry is for
            a chunk with only the head.
        tower: traces a vision tower that is spread, when it is asked for.
    """

    first: Part
    frame: Part
    layers: tuple[Part, ...]
    last: Part
    hidden_bytes: int
    received_bytes: tuple[int, ...]
    tower: Callable[[], SpreadTower]


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
        # Layers of towers are computed again only where everything is.
        first_key = (*dense, model.recompute == "full", model.vision_parallelism)
        first = self._once(("first", *first_key), config, self._first)
        frame, layers = self._once(("layers", *dense, *experts, model.recompute), config, self._layers)
        last, hidden_bytes, received_bytes = self._once(("last", *dense), config, self._last)
        return Parts(
            first,
            frame,
            layers,
            last,
            hidden_bytes,
            received_bytes,
            partial(self._once, ("tower", *first_key), config, self._tower),
        )

    def _once(self, key: Any, config: Config, trace: Any) -> Any:
        if key not in self._known:
            self._known[key] = trace(config)
        return self._known[key]

    def _first(self, config: Config) -> Part:
        (chunk,) = self._trace(_without_experts(config), [()], position=0)
        return chunk.rest

    def _tower(self, config: Config) -> SpreadTower:
        config, num_layers = _without_experts(config), self._model_config.num_tower_layers
        starts, middles, ends = (
            (0, min(2, num_layers - 1)),
            (1, min(2, max(1, num_layers - 1))),
            (1, min(2, num_layers)),
        )
        # The layers on the chunks up to the one that is traced, and behind it; each layer is traced once.
        before: list[tuple[int, ...]] = [(0, count, num_layers - count) for count in middles]
        before += [(num_layers - count, count) for count in ends]
        tracer = Tracer()
        start = self._trace(config, [()], 0, [(count, num_layers - count) for count in starts], tracer)
        middle_and_end = self._trace(config, [()], 1, before, tracer)
        return SpreadTower(
            TowerPart(starts, (start[0].rest, start[1].rest)),
            TowerPart(middles, (middle_and_end[0].rest, middle_and_end[1].rest)),
            TowerPart(ends, (middle_and_end[2].rest, middle_and_end[3].rest)),
            start[0].received_patch_bytes,
        )

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

    def _trace(
        self,
        config: Config,
        chunks: Iterable[tuple[int, ...]],
        position: int,
        towers: Sequence[tuple[int, ...]] = ((),),
        tracer: Tracer | None = None,
    ) -> list[_TracedChunk]:
        """Trace chunks with these layers as the first (0), a middle (1) or the last (2) of three stages.

        Args:
            config: the configuration.
            chunks: decoder layers of each chunk to trace.
            position: the stage.
            towers: the vision tower's layers on the first stages, each combined with each of `chunks`.
            tracer: knows layers of earlier traces of the same configuration.
        """
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
        rank, tracer, traced = position * (layout.world_size // 3), tracer or Tracer(), []
        with simulated_rank(rank, layout) as groups, fake_tensors():
            batch = full_batch(config, self._family, self._model_config, layout, *self._media_per_row)
            for layers, tower_counts in product(chunks, towers):
                held = [layers if stage == position else () for stage in range(3)]
                # The others are somewhere else: not before the embedding.
                held[2 if tower_counts else position - 1] = tuple(range(num_layers - len(layers)))
                placed = dataclasses.replace(layout, chunks=tuple(held), tower_counts=tower_counts)
                (chunk,) = fake_chunks(config, self._family, self._model_config, placed, groups)
                counts = tracer.trace(chunk, batch)
                parameters = held_parameters([chunk], groups)
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
                        received_patch_bytes=self._received_patch_bytes(config, chunk, batch) if tower_counts else (),
                    )
                )
        return traced

    def _received_patch_bytes(self, config: Config, chunk: ModelChunk, batch: MicroBatch) -> tuple[int, ...]:
        boundaries = [
            tower_boundary(self._model_config.vision, layer, chunk.packed_images(batch))
            for layer in range(self._model_config.num_tower_layers)
        ]
        return tuple(prod(packed_shape(boundary)) * value_bytes(config) for boundary in boundaries)


@dataclass(frozen=True)
class _TracedChunk:
    """What a trace found in one chunk."""

    rest: Part
    layers: Mapping[int, Part]
    hidden_bytes: int
    received_bytes: tuple[int, ...]
    received_patch_bytes: tuple[int, ...]


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
