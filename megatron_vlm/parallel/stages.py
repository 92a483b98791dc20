"""Which decoder layers each pipeline chunk holds.

A pipeline of `pipeline_size` ranks with `virtual_size` chunks each has `pipeline_size * virtual_size` global chunks.
Chunk c is run by pipeline rank `c % pipeline_size` as its virtual stage `c // pipeline_size`, as in megatron-core. The
embedding and the towers belong to chunk 0, the final norm and the head to the last chunk, whatever the layers are.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vlm.errors import ConfigError


def assign_layers(
    num_layers: int, pipeline_size: int, virtual_size: int = 1, layout: Sequence[int] | None = None
) -> list[list[int]]:
    """Global layer ids of every global chunk, in chunk order.

    Args:
        num_layers: decoder layers of the whole model.
        pipeline_size: pipeline ranks.
        virtual_size: chunks per pipeline rank.
        layout: layers of each chunk, zeros allowed; None splits evenly, and where the number does not divide gives one
            layer more to the chunks in the middle, because the first also holds the towers and the last the head.

    Returns:
        `pipeline_size * virtual_size` lists of consecutive layer ids which together are `range(num_layers)`.

    Raises:
        ConfigError: the layout's length or sum is wrong, or the even split would leave a chunk empty.
    """
    num_chunks = pipeline_size * virtual_size
    counts = _even_counts(num_layers, num_chunks) if layout is None else list(layout)
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
    ends = [sum(counts[: chunk + 1]) for chunk in range(num_chunks)]
    return [list(range(end - count, end)) for count, end in zip(counts, ends, strict=True)]


def _even_counts(num_layers: int, num_chunks: int) -> list[int]:
    """Equal counts, the remainder going to the middle chunks."""
    if num_layers < num_chunks:
        raise ConfigError(
            f"{num_layers} decoder layers do not fill {num_chunks} pipeline chunks",
            fix=f"use at most {num_layers} chunks (pipeline_model_parallel_size x "
            "virtual_pipeline_model_parallel_size), or list zeros in parallel.pipeline_layout",
        )
    layers_per_chunk, remainder = divmod(num_layers, num_chunks)
    first_larger = (num_chunks - remainder) // 2
    return [layers_per_chunk + (first_larger <= chunk < first_larger + remainder) for chunk in range(num_chunks)]
