"""Images divided over the tensor ranks: each encodes a share with a whole tower, then all exchange features.

Shapes: I images, T tokens per image, H hidden.
"""

from __future__ import annotations

import torch
import torch.distributed
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region


def divide_images(pixels: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """This rank's share of the images, [ceil(I / ranks), ...]; blank images fill the last shares.

    Every rank runs its tower, so that all ranks have gradients for all of its parameters; a blank image's are zero,
    because nobody reads its features.
    """
    share = -(-pixels.shape[0] // group.size())
    blank = pixels.new_zeros((share * group.size() - pixels.shape[0], *pixels.shape[1:]))
    return torch.cat((pixels, blank)).narrow(0, group.rank() * share, share)


def gather_image_features(
    features_ITH: torch.Tensor, num_images: int, group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    """Features of all images on every rank, [num_images, T, H].

    Each rank goes on with the same whole features and gets the same whole gradient for them, so the backward pass takes
    a rank's own share of it.
    """
    gathered = gather_from_sequence_parallel_region(
        features_ITH.contiguous(), tensor_parallel_output_grad=False, group=group
    )
    return gathered[:num_images]
