"""How a model and a global batch are sharded over ranks, defined in one place.

A pipeline of `pipeline_size` ranks with `virtual_size` chunks each has `pipeline_size * virtual_size` global chunks.
Chunk c is run by pipeline rank `c % pipeline_size` as its virtual stage `c // pipeline_size`, as in megatron-core. The
layers of a vision tower lie on chunk 0, or on the first few chunks; the embedding, the projector and an audio tower
belong to the last of these, the final norm and the head to the last chunk, whatever the decoder layers are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm

from megatron_vlm.errors import ConfigError, LaunchError


@dataclass(frozen=True)
class Layout:
    """Sizes of all groups of ranks, and the decoder layers of every pipeline chunk.

    Ranks are numbered tensor fastest, then context, data, pipeline. For experts the ranks of a pipeline stage are
    regrouped: expert-tensor fastest, then expert, then expert data.

    Attributes:
        tensor_size: number of ranks over which each layer is sharded.
        sequence_parallel: whether activations between sharded layers are split along the sequence over tensor ranks.
        pipeline_size: number of ranks that each hold a pipeline stage.
        context_size: number of ranks over which each sequence is split.
        data_size: number of ranks that process different micro-batches.
        expert_size: number of ranks over which the experts are split.
        expert_tensor_size: number of ranks over which each expert is sharded.
        chunks: global ids of the decoder layers of every global chunk; empty where only groups of ranks matter.
        tower_counts: number of the vision tower's layers on each chunk that has any part of it; empty for a tower that
            is whole on chunk 0.
    """

    tensor_size: int = 1
    sequence_parallel: bool = False
    pipeline_size: int = 1
    context_size: int = 1
    data_size: int = 1
    expert_size: int = 1
    expert_tensor_size: int = 1
    chunks: tuple[tuple[int, ...], ...] = ()
    tower_counts: tuple[int, ...] = ()

    @classmethod
    def over(
        cls,
        world_size: int,
        *,
        num_layers: int = 0,
        virtual_size: int = 1,
        pipeline_layout: Sequence[int] | None = None,
        vision_pipeline_layout: Sequence[int] | None = None,
        tensor_size: int = 1,
        sequence_parallel: bool = False,
        pipeline_size: int = 1,
        context_size: int = 1,
        expert_size: int = 1,
        expert_tensor_size: int = 1,
    ) -> Layout:
        """Return the layout of a number of ranks: the data-parallel size follows from the other sizes.

        Args:
            world_size: number of ranks.
            num_layers: decoder layers to assign; 0 leaves `chunks` empty.
            virtual_size: number of chunks of each pipeline rank.
            pipeline_layout: see `assign_layers`.
            vision_pipeline_layout: see `tower_chunks`.
            tensor_size: see `Layout`.
            sequence_parallel: see `Layout`.
            pipeline_size: see `Layout`.
            context_size: see `Layout`.
            expert_size: see `Layout`.
            expert_tensor_size: see `Layout`.

        Raises:
            LaunchError: the number of ranks is not a multiple of tensor x context x pipeline, or of expert x
                expert-tensor x pipeline.
            ConfigError: see `assign_layers`.
        """
        sizes = (world_size, virtual_size, tensor_size, context_size, pipeline_size, expert_size, expert_tensor_size)
        assert min(sizes) > 0, f"sizes are at least 1, not {sizes}"
        assert num_layers or (pipeline_layout is None and virtual_size == 1), "layers to assign are not given"
        model_size = tensor_size * context_size * pipeline_size
        if world_size % model_size:
            context = f" x context {context_size}" if context_size > 1 else ""
            raise LaunchError(
                f"{world_size} ranks do not divide by tensor {tensor_size}{context} x pipeline {pipeline_size}",
                fix=f"start a multiple of {model_size} ranks",
            )
        stage_size, ranks_of_experts = world_size // pipeline_size, expert_size * expert_tensor_size
        if stage_size % ranks_of_experts:
            raise LaunchError(
                f"the {stage_size} ranks of a pipeline stage do not divide by expert {expert_size} x expert-tensor "
                f"{expert_tensor_size}",
                fix=f"start a multiple of {lcm(ranks_of_experts * pipeline_size, model_size)} ranks",
            )
        tower_counts = tower_chunks(vision_pipeline_layout, pipeline_size * virtual_size)
        chunks: list[list[int]] = []
        if num_layers:
            chunks = assign_layers(num_layers, pipeline_size, virtual_size, pipeline_layout, tower_counts)
        return cls(
            tensor_size,
            sequence_parallel,
            pipeline_size,
            context_size,
            world_size // model_size,
            expert_size,
            expert_tensor_size,
            tuple(map(tuple, chunks)),
            tower_counts,
        )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor_size * self.context_size * self.data_size * self.pipeline_size

    @property
    def sequence_shards(self) -> int:
        """Number of tensor ranks over which a rank's tokens are split between sharded layers."""
        return self.tensor_size if self.sequence_parallel else 1

    @property
    def expert_data_size(self) -> int:
        """Number of ranks that hold copies of one expert."""
        return self.world_size // (self.pipeline_size * self.expert_size * self.expert_tensor_size)

    @property
    def virtual_size(self) -> int:
        """Number of chunks of each pipeline rank."""
        return max(1, len(self.chunks) // self.pipeline_size)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers of the full model."""
        return sum(map(len, self.chunks))

    @property
    def embedding_chunk(self) -> int:
        """Global id of the chunk with the embedding and the projector: the last with a part of the vision tower."""
        return _embedding_chunk(self.tower_counts)

    @property
    def embedding_rank(self) -> int:
        """Pipeline rank of that chunk."""
        return self.embedding_chunk % self.pipeline_size

    def tower_layers(self, chunk: int, num_layers: int) -> range | None:
        """Return the vision tower's layers on a chunk; None on chunks behind the embedding.

        Args:
            chunk: global id of the chunk.
            num_layers: number of layers of the full tower.
        """
        if chunk > self.embedding_chunk:
            return None
        counts = self.tower_counts or (num_layers,)
        return range(sum(counts[:chunk]), sum(counts[: chunk + 1]))

    def chunks_of(self, pipeline_rank: int) -> list[int]:
        """Return the global ids of one pipeline rank's chunks, in the order of its virtual stages."""
        return list(range(pipeline_rank, len(self.chunks), self.pipeline_size))

    def first_layer(self, chunk: int) -> int:
        """Return the global id of a chunk's first decoder layer, or of the next one where it has none."""
        return self.chunks[chunk][0] if self.chunks[chunk] else sum(map(len, self.chunks[:chunk]))

    def sizes(self) -> dict[str, int]:
        """Return the sizes that determine on which rank an element lies, as a checkpoint's manifest states them."""
        return {
            "tensor": self.tensor_size,
            "context": self.context_size,
            "pipeline": self.pipeline_size,
            "virtual": self.virtual_size,
            "data": self.data_size,
            "expert": self.expert_size,
            "expert_tensor": self.expert_tensor_size,
            "sequence_parallel": int(self.sequence_parallel),
        }

    def __str__(self) -> str:
        text = (
            f"{self.world_size} ranks = tensor {self.tensor_size} x pipeline {self.pipeline_size} "
            f"x context {self.context_size} x data {self.data_size}"
        )
        if self.expert_size * self.expert_tensor_size > 1:
            text += (
                f"; for experts tensor {self.expert_tensor_size} x pipeline {self.pipeline_size} "
                f"x expert {self.expert_size} x data {self.expert_data_size}"
            )
        return text


def tower_chunks(layout: Sequence[int] | None, num_chunks: int) -> tuple[int, ...]:
    """Return the number of the vision tower's layers on each chunk up to the one with its last layer.

    Args:
        layout: number of layers of each of the first chunks, zeros allowed; None for a tower that is whole on chunk 0.
        num_chunks: number of chunks of the pipeline.
    """
    counts = list(layout or ())
    assert len(counts) <= num_chunks and min(counts, default=0) >= 0, "the configuration was checked"
    while counts and not counts[-1]:
        counts.pop()
    return tuple(counts)


def assign_layers(
    num_layers: int,
    pipeline_size: int,
    virtual_size: int = 1,
    layout: Sequence[int] | None = None,
    tower_counts: Sequence[int] = (),
) -> list[list[int]]:
    """Return the global layer ids of every global chunk, in chunk order.

    Args:
        num_layers: number of decoder layers of the full model.
        pipeline_size: number of pipeline ranks.
        virtual_size: number of chunks per pipeline rank.
        layout: number of layers of each chunk, zeros allowed; None splits evenly, with the remainder on the chunks
            in the middle, because the first also holds the towers and the last the head.
        tower_counts: see `Layout`; chunks before the embedding hold no decoder layers.

    Returns:
        `pipeline_size * virtual_size` lists of consecutive layer ids which together are `range(num_layers)`.

    Raises:
        ConfigError: the layout's length or sum is wrong, it has layers before the embedding, or the even split would
            leave a chunk empty.
    """
    num_chunks = pipeline_size * virtual_size
    embedding_chunk = _embedding_chunk(tower_counts)
    without = [0] * embedding_chunk
    counts = without + _even_counts(num_layers, num_chunks - embedding_chunk) if layout is None else list(layout)
    if len(counts) != num_chunks:
        raise ConfigError(
            f"parallel.pipeline_layout has {len(counts)} entries",
            fix=f"give one per chunk: {pipeline_size} pipeline ranks x {virtual_size} virtual = {num_chunks}",
        )
    if min(counts) < 0 or sum(counts) != num_layers:
        raise ConfigError(
            f"parallel.pipeline_layout {counts} sums to {sum(counts)}, the model has {num_layers} decoder layers",
            fix=f"give {num_chunks} numbers of at least 0 that sum to {num_layers}",
        )
    if counts[:embedding_chunk] != without:
        raise ConfigError(
            f"parallel.pipeline_layout {counts} has decoder layers before the embedding, which "
            f"parallel.vision_pipeline_layout puts on chunk {embedding_chunk}",
            fix=f"begin it with {embedding_chunk} zeros, or set it to null",
        )
    ends = [sum(counts[: chunk + 1]) for chunk in range(num_chunks)]
    return [list(range(end - count, end)) for count, end in zip(counts, ends, strict=True)]


def _embedding_chunk(tower_counts: Sequence[int]) -> int:
    return max(1, len(tower_counts)) - 1


def _even_counts(num_layers: int, num_chunks: int) -> list[int]:
    """Return equal counts, with the remainder on the middle chunks."""
    if num_layers < num_chunks:
        raise ConfigError(
            f"{num_layers} decoder layers do not fill {num_chunks} pipeline chunks",
            fix=f"use at most {num_layers} chunks (pipeline_model_parallel_size x "
            "virtual_pipeline_model_parallel_size), or list zeros in parallel.pipeline_layout",
        )
    layers_per_chunk, remainder = divmod(num_layers, num_chunks)
    first_larger = (num_chunks - remainder) // 2
    return [layers_per_chunk + (first_larger <= chunk < first_larger + remainder) for chunk in range(num_chunks)]
