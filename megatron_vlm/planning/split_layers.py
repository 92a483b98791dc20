"""How layers are split over pipeline chunks so that ranks take equally long, from the times of a layer and the rest."""

from __future__ import annotations

from collections.abc import Sequence


def balanced_counts(
    num_layers: int,
    num_chunks: int,
    layer_seconds: float,
    tower_seconds: Sequence[float],
    last_seconds: float,
    pipeline_size: int,
) -> list[int]:
    """Return numbers of decoder layers per chunk that even out the ranks, with fewer beside towers and head.

    Args:
        num_layers: decoder layers of the model.
        num_chunks: pipeline size times chunks per rank.
        layer_seconds: time of a layer.
        tower_seconds: times of embedding and towers on the chunks up to the embedding's, before which no layers are.
        last_seconds: time of the head.
        pipeline_size: pipeline ranks.
    """
    without = [0] * (len(tower_seconds) - 1)
    num_chunks -= len(without)
    even = -(-num_layers // num_chunks)
    best: tuple[float, float, list[int]] | None = None
    for first in range(min(even, num_layers) + 1) if num_chunks > 1 else [num_layers]:
        lasts = range(min(even, num_layers - first) + 1) if num_chunks > 2 else [num_layers - first]
        for last in lasts:
            middle = _spread(num_layers - first - last, num_chunks - 2)
            counts = [*without, first, *middle, last][: len(without) + num_chunks]
            loads = [layer_seconds * sum(counts[rank::pipeline_size]) for rank in range(pipeline_size)]
            for chunk, seconds in enumerate(tower_seconds):
                loads[chunk % pipeline_size] += seconds
            loads[-1] += last_seconds
            key = max(loads), max(counts) - min(counts)
            if best is None or key < best[:2]:
                best = *key, counts
    assert best is not None
    return best[2]


def tower_counts(
    num_layers: int,
    num_holders: int,
    start_seconds: float,
    layer_seconds: float,
    end_seconds: float,
    mean_seconds: float,
) -> list[int]:
    """Return how many layers of a vision tower go to each of a number of chunks, all but the last of which get as many.

    The last has decoder layers too, where there is time for them.

    Args:
        num_layers: layers of the tower.
        num_holders: chunks that get any, 2 or more.
        start_seconds: time of the first chunk without layers.
        layer_seconds: time of a layer.
        end_seconds: time of the last of these chunks without layers.
        mean_seconds: time of an average chunk of the pipeline.
    """
    least, most = -(-num_layers // num_holders), (num_layers - 1) // (num_holders - 1)
    if least > most:
        return _spread(num_layers, num_holders)

    def slowest(each: int) -> tuple[float, float]:
        first, last = each * layer_seconds, (num_layers - each * (num_holders - 1)) * layer_seconds
        busiest = max(start_seconds + first, end_seconds + last, mean_seconds)
        return busiest, abs(start_seconds + first - mean_seconds)

    each = min(range(least, most + 1), key=slowest)
    return [each] * (num_holders - 1) + [num_layers - each * (num_holders - 1)]


def _spread(num_layers: int, num_chunks: int) -> list[int]:
    """Return equal numbers, with the rest on the chunks in the middle."""
    if num_chunks < 1:
        return []
    each, rest = divmod(num_layers, num_chunks)
    first_larger = (num_chunks - rest) // 2
    return [each + (first_larger <= chunk < first_larger + rest) for chunk in range(num_chunks)]
