"""Images divided over the tensor ranks: each encodes a share with a whole tower, then all exchange features.

Shapes: R rows of pixels (an image each, or a patch each), T rows of features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch.nn.functional import pad


def assign_images(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Images of each rank, ascending: the costliest first, each to the rank with the least so far.

    No rank has more than 4/3 of the work of the best division (Graham, 1969). A function of numbers that all ranks
    know, so that they agree without asking each other.
    """
    loads, shares = [0] * num_ranks, [list[int]() for _ in range(num_ranks)]
    for image in sorted(range(len(costs)), key=lambda image: (-costs[image], image)):
        rank = loads.index(min(loads))
        loads[rank] += costs[image]
        shares[rank].append(image)
    return [sorted(share) for share in shares]


class ImageDivision:
    """Which images this rank encodes, and how the features of all come together again.

    Every rank runs its tower, so that all ranks have gradients for all of its parameters: one without a share takes a
    blank image, whose gradients are zero because nobody reads its features.

    Args:
        rows: of `pixels` that each image (or frame of a video) has; at least one image.
        costs: of encoding each, in any unit.
        group: ranks that divide the images.
    """

    def __init__(self, rows: Sequence[int], costs: Sequence[int], group: torch.distributed.ProcessGroup) -> None:
        self.rows, self.group = list(rows), group
        self.shares = assign_images(costs, group.size())
        self.own = self.shares[group.rank()]

    def take(self, pixels: torch.Tensor, blank_rows: int) -> torch.Tensor:
        """Rows of this rank's images, or `blank_rows` of zeros if it has none.

        Args:
            pixels: [R, ...], the images in a row, the same on every rank.
            blank_rows: size of the smallest image.
        """
        if not self.own:
            return pixels.new_zeros((blank_rows, *pixels.shape[1:]))
        images = pixels.split(self.rows)
        return torch.cat([images[image] for image in self.own])

    def gather(self, features: torch.Tensor, rows_per_feature: int = 1) -> torch.Tensor:
        """Features of all images on every rank, [T, ...], in the order of the images.

        Each rank goes on with the same whole features and gets the same whole gradient for them, so the backward pass
        takes a rank's own share of it.

        Args:
            features: those of `take`'s images.
            rows_per_feature: rows of `pixels` that make one of `features`.
        """
        sizes = [rows // rows_per_feature for rows in self.rows]
        totals = [sum(sizes[image] for image in share) for share in self.shares]
        # Equal shares on the wire: gloo cannot gather unequal ones, and NCCL sends those one after the other.
        largest = max(totals)
        own = features[: totals[self.group.rank()]]
        padded = pad(own, (0, 0) * (features.dim() - 1) + (0, largest - own.shape[0]))
        gathered = gather_from_sequence_parallel_region(padded, tensor_parallel_output_grad=False, group=self.group)
        by_image: dict[int, torch.Tensor] = {}
        for share, total, part in zip(self.shares, totals, gathered.split(largest), strict=True):
            *found, _padding = part.split([*(sizes[image] for image in share), largest - total])
            by_image.update(zip(share, found, strict=True))
        return torch.cat([by_image[image] for image in range(len(sizes))])
