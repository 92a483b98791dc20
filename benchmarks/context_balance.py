"""How evenly context ranks share attention over packed rows, by four assignments of tokens to ranks; host arithmetic.

    python benchmarks/context_balance.py [--output FILE.json]

Rows of 32,768 tokens are packed with documents of lognormal lengths (median 4,096 or 1,024, sigma 1) or have one
document, with and without images of 256 tokens, two fifths of all tokens, that see ahead. Over 20 rows:

- the load of the busiest rank divided by the mean, on layers without a window and with one of 1,024 tokens: pairs of a
  query and a key that it sees;
- the share of the row's keys and values that a rank must receive from others for a layer of each kind.

Contiguous parts, and zigzag (two parts for each rank, the one as far from the start as the other from the end), suit
rows of one text; stripes deal blocks of 128 tokens in turn; planned blocks are those of
`megatron_vlm/data/context_blocks.py`, planned by the pairs of layers without a window. The exit code is 1 if the
busiest of eight ranks has more than 1.05 times the mean with them in any row.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]

from benchmarks.figures import commit, write  # noqa: E402
from megatron_vlm.data.collate import spans  # noqa: E402
from megatron_vlm.data.context_blocks import largest_to_mean, planned_positions  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "context_balance.json"
ROW_TOKENS, ROWS, WINDOW = 32_768, 20, 1024
DOCUMENTS = {"one document": ROW_TOKENS, "documents around 4,096": 4096, "documents around 1,024": 1024}
IMAGES = {"text": (0, 1), "images": (256, 640)}  # tokens of an image, at every so many of a document
RANKS = (2, 4, 8, 16)
STRIPE = 128  # tokens
LONG_ROW = 131_072  # tokens


def document_lengths(random: np.random.Generator, median: int, length: int) -> list[int]:
    """Return lognormal lengths of documents that fill a row; the last one is cut. A median of `length` is one of it."""
    if median == length:
        return [length]
    lengths: list[int] = []
    while (left := length - sum(lengths)) > 0:
        lengths.append(min(left, int(np.clip(random.lognormal(np.log(median), 1.0), 64, length))))
    return lengths


def seen_keys(lengths: list[int], images: tuple[int, int], window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and last key that each token of a packed row sees, int64."""
    counts, (image, every) = torch.tensor(lengths), images
    document_ids = torch.arange(len(lengths)).repeat_interleave(counts)
    place = torch.arange(len(document_ids))
    place_in_document = place - (counts.cumsum(0) - counts)[document_ids]
    low, high = spans(document_ids[None], (place_in_document % every < image)[None])
    first = low[0] if window is None else torch.maximum(low[0], place - window + 1)
    return first.long().numpy(), high[0].long().numpy()


def contiguous(load: np.ndarray, num_ranks: int) -> np.ndarray:
    """Deal the row in parts of equal length."""
    return np.arange(len(load)).reshape(num_ranks, -1)


def zigzag(load: np.ndarray, num_ranks: int) -> np.ndarray:
    """Deal twice as many parts, the first and the last to the first rank, and so on."""
    parts = np.arange(len(load)).reshape(2 * num_ranks, -1)
    return np.concatenate((parts[:num_ranks], parts[num_ranks:][::-1]), axis=1)


def striped(load: np.ndarray, num_ranks: int) -> np.ndarray:
    """Deal blocks of `STRIPE` tokens in turn."""
    return np.arange(len(load)).reshape(-1, num_ranks, STRIPE).swapaxes(0, 1).reshape(num_ranks, -1)


ASSIGNMENTS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "contiguous": contiguous,
    "zigzag": zigzag,
    "striped": striped,
    "planned": planned_positions,
}


def received_share(positions: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return the keys that each rank's queries see and it does not have, as shares of all keys, [C]."""
    shares = []
    for own in positions:
        change = np.zeros(len(first) + 1, dtype=np.int64)
        np.add.at(change, first[own], 1)
        np.add.at(change, last[own] + 1, -1)
        needed = change.cumsum()[:-1] > 0
        needed[own] = False
        shares.append(needed.mean())
    return np.array(shares)


def figures_of(median: int, images: tuple[int, int], num_ranks: int) -> dict[str, dict[str, float]]:
    """Return for each assignment the ratios and shares over all rows."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in ASSIGNMENTS}
    for seed in range(ROWS):
        lengths = document_lengths(np.random.default_rng(seed), median, ROW_TOKENS)
        full, sliding = (seen_keys(lengths, images, window) for window in (None, WINDOW))
        loads = [last - first + 1 for first, last in (full, sliding)]
        for name, assign in ASSIGNMENTS.items():
            positions = assign(loads[0], num_ranks)
            ratios = (largest_to_mean(load[positions].sum(1)) for load in loads)
            shares = (received_share(positions, *seen).mean() for seen in (full, sliding))
            found[name].append((*ratios, *shares))
    return {name: _summary(np.array(rows)) for name, rows in found.items()}


def _summary(rows: np.ndarray) -> dict[str, float]:
    values = {
        "full_ratio": rows[:, 0].mean(),
        "full_ratio_worst": rows[:, 0].max(),
        "sliding_ratio": rows[:, 1].mean(),
        "sliding_ratio_worst": rows[:, 1].max(),
        "full_received": rows[:, 2].mean(),
        "sliding_received": rows[:, 3].mean(),
    }
    return {name: round(float(value), 4) for name, value in values.items()}


def planning_milliseconds() -> float:
    """Return the time of one plan for a long row of many documents and 16 ranks, the median of 5."""
    lengths = document_lengths(np.random.default_rng(0), 1024, LONG_ROW)
    first, last = seen_keys(lengths, IMAGES["images"], None)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        planned_positions(last - first + 1, 16)
        seconds.append(time.perf_counter() - began)
    return round(1000 * sorted(seconds)[2], 1)


def main() -> int:
    """Print the table and write it; returns the exit code, 1 where planned blocks are not even at eight ranks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"results (default: {RESULTS.name})")
    options = parser.parse_args()
    results: dict[str, Any] = {"commit": commit(), "row_tokens": ROW_TOKENS, "rows": ROWS, "window": WINDOW}
    results["planning_milliseconds"] = planning_milliseconds()
    worst = 0.0
    print("largest / mean load of ranks, mean (worst) of 20 rows; keys that a rank receives, of all, mean")
    for documents, median in DOCUMENTS.items():
        for kind, images in IMAGES.items():
            for num_ranks in RANKS:
                title = f"{documents}, {kind}, CP{num_ranks}"
                results[title] = figures_of(median, images, num_ranks)
                print(f"\n{title:44}full layers            sliding layers         received: full, sliding")
                for name, row in results[title].items():
                    print(
                        f"  {name:42}{row['full_ratio']:.2f} ({row['full_ratio_worst']:.2f})"
                        f"{row['sliding_ratio']:18.2f} ({row['sliding_ratio_worst']:.2f})"
                        f"{row['full_received']:18.0%}{row['sliding_received']:7.0%}"
                    )
                if num_ranks == 8:
                    worst = max(worst, results[title]["planned"]["full_ratio_worst"])
    print(f"\nplanned blocks at CP8: at most {worst:.3f}; a plan for {LONG_ROW:,} tokens takes", end=" ")
    print(f"{results['planning_milliseconds']} ms")
    write(options.output, results)
    return 1 if worst > 1.05 else 0


if __name__ == "__main__":
    sys.exit(main())
