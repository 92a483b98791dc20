"""Images divided over ranks: each encodes some of them, then all ranks exchange features.

Shapes: R rows of pixels (one row per image, or one per patch), T rows of features (one per block of patches).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch.nn.functional import pad

Group = torch.distributed.ProcessGroup


def assign_images(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Return the images of each rank, ascending; the costliest image goes first, each to the rank with the least work.

    No rank has more than 4/3 of the work of the best assignment (Graham, 1969). The result depends only on values that
    all ranks know, so that they agree without communication.
    """
    loads, assigned = [0] * num_ranks, [list[int]() for _ in range(num_ranks)]
    for image in sorted(range(len(costs)), key=lambda image: (-costs[image], image)):
        rank = loads.index(min(loads))
        loads[rank] += costs[image]
        assigned[rank].append(image)
    return [sorted(images) for images in assigned]


class ImageDivision:
    """The assignment of images to ranks: which ones this rank encodes, and how the features of all are gathered.

    Every rank runs its tower, so that all ranks have gradients for all of its parameters: a rank without images encodes
    a blank one, whose gradients are zero because nobody reads its features.

    Args:
        patches: number of patches of each image (or frame of a video); at least one image.
        costs: cost of encoding each image, in any unit.
        tensor_group: tensor ranks over which the images are divided, each with a full tower.
        context_group: context ranks over which they are divided.
    """

    def __init__(self, patches: Sequence[int], costs: Sequence[int], tensor_group: Group, context_group: Group) -> None:
        self.patches, self.tensor_group, self.context_group = list(patches), tensor_group, context_group
        self.assigned = assign_images(costs, tensor_group.size() * context_group.size())
        self.rank = context_group.rank() * tensor_group.size() + tensor_group.rank()
        self.own = self.assigned[self.rank]

    def take(self, pixels: torch.Tensor, patches_per_row: int, blank_rows: int) -> torch.Tensor:
        """Return rows of this rank's images, or `blank_rows` rows of zeros if it has none.

        Args:
            pixels: [R, ...], the concatenated images, the same on every rank.
            patches_per_row: number of patches that one row of `pixels` is.
            blank_rows: number of rows of the smallest image.
        """
        if not self.own:
            return pixels.new_zeros((blank_rows, *pixels.shape[1:]))
        images = pixels.split([patches // patches_per_row for patches in self.patches])
        return torch.cat([images[image] for image in self.own])

    def gather(self, features: torch.Tensor, patches_per_feature: int) -> torch.Tensor:
        """Return the features of all images of this context rank, [T, ...], in the order of the images.

        Its tensor ranks continue with the same features and get the same full gradient for them, so that the backward
        pass slices a rank's own part of it.

        Args:
            features: features of the images that `take` returned.
            patches_per_feature: number of patches that make one row of `features`.
        """
        sizes = [patches // patches_per_feature for patches in self.patches]
        first = self.context_group.rank() * self.tensor_group.size()
        assigned = self.assigned[first : first + self.tensor_group.size()]
        totals = [sum(sizes[image] for image in images) for images in assigned]
        # Ranks send equally many rows: gloo cannot gather unequal parts, and NCCL sends those one after the other.
        largest = max(totals)
        own = features[: totals[self.tensor_group.rank()]]
        padded = pad(own, (0, 0) * (features.dim() - 1) + (0, largest - own.shape[0]))
        gathered = gather_from_sequence_parallel_region(
            padded, tensor_parallel_output_grad=False, group=self.tensor_group
        )
        if not largest:
            return gathered
        by_image: dict[int, torch.Tensor] = {}
        for images, total, part in zip(assigned, totals, gathered.split(largest), strict=True):
            *found, _padding = part.split([*(sizes[image] for image in images), largest - total])
            by_image.update(zip(images, found, strict=True))
        return torch.cat([by_image[image] for image in sorted(by_image)])

    def context_ranks(self, patches_per_feature: int) -> np.ndarray:
        """Return which context rank encodes each feature of all images, [T] int64."""
        ranks = np.empty(len(self.patches), np.int64)
        for rank, images in enumerate(self.assigned):
            ranks[images] = rank // self.tensor_group.size()
        return np.repeat(ranks, np.array(self.patches) // patches_per_feature)
