"""Full attention inside consecutive segments of one packed sequence: the frames of images and videos of any size.

Neither the kernels nor the reference create a tensor of size [P, P].

Shapes: N heads, P packed patches, D head dim, F segments (frames).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch.nn.functional import scaled_dot_product_attention

from vlm_kernels.device import is_on_gpu
from vlm_kernels.span_attention import Backend, Documents, Spans, span_attention


@dataclass(frozen=True)
class Segments:
    """Lengths of consecutive segments, and the spans made of them, once for all layers.

    Attributes:
        lengths: number of patches in each segment, known on the host.
        device: the device of the sequence.
        backend: what computes attention on a GPU.
    """

    lengths: tuple[int, ...]
    device: torch.device
    backend: Backend = "auto"

    @cached_property
    def spans(self) -> Spans:
        """Spans in which each patch sees its own segment."""
        ends = tuple(accumulate(self.lengths))
        # A copy that the host does not wait for.
        table = torch.tensor((self.lengths, ends), dtype=torch.int32).to(self.device, non_blocking=True)
        lengths_F, ends_F = table
        spans = torch.stack((ends_F - lengths_F, ends_F - 1))
        low_P, high_P = torch.repeat_interleave(spans, lengths_F, dim=1, output_size=ends[-1])
        documents = Documents(self.lengths, seen="all")
        return Spans(low_P[None], high_P[None], documents=documents, backend=self.backend)


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float
) -> torch.Tensor:
    """Compute attention within segments: over spans on a GPU, by the reference elsewhere.

    Args:
        q: queries [N, P, D].
        k: keys [N, P, D].
        v: values [N, P, D].
        segments: the segments, whose lengths sum to P.
        scale: factor on the scores.

    Returns:
        The output, [N, P, D].
    """
    return (_on_gpu if is_on_gpu(q) else reference)(q, k, v, segments, scale)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float) -> torch.Tensor:
    """Compute `packed_attention` by one batched, unmasked attention for all segments of the same length."""
    lengths = segments.lengths
    split = [tensor.split(lengths, dim=1) for tensor in (q, k, v)]
    attended: list[torch.Tensor] = [q.new_empty(0)] * len(lengths)
    for length in dict.fromkeys(lengths):
        members = [index for index, other in enumerate(lengths) if other == length]
        q_FNPD, k_FNPD, v_FNPD = (torch.stack([parts[index] for index in members]) for parts in split)
        outputs_FNPD = scaled_dot_product_attention(q_FNPD, k_FNPD, v_FNPD, scale=scale)
        for index, output in zip(members, outputs_FNPD, strict=True):
            attended[index] = output
    return torch.cat(attended, dim=1)


def _on_gpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float) -> torch.Tensor:
    return span_attention(q[None], k[None], v[None], segments.spans, None, scale)[0]
