"""Cross-entropy of a linear head whose rows are split over the tensor ranks, a chunk of tokens at a time.

Only tokens with a label are computed. The forward pass keeps two values per token and the logits of the last chunk; the
backward pass begins with that one, computes the logits of the others again, and overwrites them with their gradient in
place. So a single chunk takes 6 T H V FLOPs, many take up to 8 T H V, and the only memory that grows with the
vocabulary is one chunk's: a cuBLAS matmul writes it, one kernel reads it (forward) or overwrites it (backward), two
matmuls read it. On the last pipeline stage a micro-batch's backward pass follows its forward pass, so that one chunk is
alive at a time.

Shapes: B batch, S sequence (hidden states hold a shard of it under sequence parallelism), H hidden, T tokens with a
label or those of a chunk, V vocabulary rows of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch.autograd.function import once_differentiable

from megatron_vlm.layers.weight_gradient import add_product, added_to_main, main_gradient
from megatron_vlm.parallel.sequence import Group, gather_sequence, reduce_input_gradient
from vlm_kernels.linear_cross_entropy.operators import logits_gradient_, vocabulary_statistics

# Matmuls are computed in tiles of this many rows.
_TILE_TOKENS = 128


@dataclass(frozen=True)
class Head:
    """The settings of a language-model head: its vocabulary, how it is sharded, and its bounds.

    Attributes:
        vocab_size: rows of the full weight without padding, which is outside the softmax.
        group: the tensor-parallel process group, each rank of which has equally many rows.
        sequence_parallel: whether a rank's hidden states are its shard of the sequence.
        softcap: bound of the logits, as `softcap * tanh(logits / softcap)`; None for no bound.
        chunk_bytes: most memory for logits, in bytes.
    """

    vocab_size: int
    group: Group
    sequence_parallel: bool = False
    softcap: float | None = None
    chunk_bytes: int = 768 * 2**20

    @property
    def gathers(self) -> bool:
        """Whether hidden states come in shards, which are gathered."""
        return self.sequence_parallel and self.group.size() > 1

    def first(self, weight: torch.Tensor) -> int:
        """Return the token id of this rank's first row."""
        return self.group.rank() * weight.shape[0]

    def columns(self, weight: torch.Tensor) -> int:
        """Return the number of this rank's rows without padding."""
        return min(max(self.vocab_size - self.first(weight), 0), weight.shape[0])

    def chunks(self, num_tokens: int, weight: torch.Tensor) -> list[slice]:
        """Return slices of the tokens, about equal and the first the largest, whose logits fit into `chunk_bytes`."""
        size = chunk_tokens(num_tokens, weight.shape[0] * weight.element_size(), self.chunk_bytes)
        return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def chunk_tokens(num_tokens: int, token_bytes: int, chunk_bytes: int) -> int:
    """Return the number of tokens of a chunk.

    Args:
        num_tokens: number of tokens of all chunks.
        token_bytes: bytes of one token's logits on this rank.
        chunk_bytes: bound on the bytes of a chunk's logits, unless a single token exceeds it.
    """
    most = max(1, chunk_bytes // token_bytes)
    even = -(-num_tokens // max(1, -(-num_tokens // most)))
    return max(1, min(most, -(-even // _TILE_TOKENS) * _TILE_TOKENS, num_tokens))


# The compiler breaks its graph here: it cannot handle the exchanges, buffers and main gradients.
@torch.compiler.disable
def linear_cross_entropy(
    x_SBH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_BS: torch.Tensor,
    label_index: torch.Tensor,
    head: Head,
    z_loss_coeff: float = 0.0,
) -> torch.Tensor:
    """Return each token's loss in fp32, [B, S], 0 without a label.

    The loss is the cross-entropy plus `z_loss_coeff * logsumexp(logits)^2`.

    The gradient of a parameter with megatron-core's `main_grad` in fp32 is added to that, as megatron-core's own fused
    linear does; any other weight gets one that was summed in fp32 and rounded once. Every tensor rank must have the
    same labels. Evaluation keeps nothing.

    Args:
        x_SBH: hidden states; a shard of the sequence under sequence parallelism, else the same on all tensor ranks.
        weight_VH: this rank's rows.
        labels_BS: token id that each position should predict, or -100; S is the full sequence.
        label_index: [T] int64, the positions `s * B + b` with a label, ascending. Their number is known to the host,
            which would have to wait for the device to count labels.
        head: vocabulary, group and bounds.
        z_loss_coeff: factor of the z-loss; 0 for none.
    """
    losses: torch.Tensor = _LinearCrossEntropy.apply(x_SBH, weight_VH, labels_BS, label_index, head, z_loss_coeff)
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_SBH: torch.Tensor,
        weight: torch.Tensor,
        labels_BS: torch.Tensor,
        label_index: torch.Tensor,
        head: Head,
        z_loss_coeff: float,
    ) -> torch.Tensor:
        whole = gather_sequence(x_SBH, head.group)[0] if head.gathers else x_SBH
        rows = whole.flatten(0, 1)
        labels_T = labels_BS.t().flatten().index_select(0, label_index) - head.first(weight)
        columns, softcap = head.columns(weight), head.softcap or 0.0
        logits, statistics = _Logits(rows, weight, label_index), []
        chunks = head.chunks(len(label_index), weight)
        for chunk in chunks:
            statistics.append(vocabulary_statistics(logits.of(chunk)[1], labels_T[chunk], columns, softcap))
        wide = torch.promote_types(x_SBH.dtype, torch.float32)
        losses = torch.zeros(labels_BS.numel(), dtype=wide, device=labels_BS.device)
        largest = log_total = losses.new_empty(0)
        if statistics:
            largest, total, at_label = _over_ranks(torch.cat(statistics), head.group)
            log_total = total.log()
            of_tokens = log_total + (largest - at_label)
            if z_loss_coeff != 0:
                of_tokens += z_loss_coeff * (largest + log_total).square()
            losses.index_copy_(0, label_index, of_tokens)
        ctx.save_for_backward(x_SBH, weight, labels_T, label_index, largest, log_total)
        ctx.head, ctx.z_loss_coeff = head, z_loss_coeff
        ctx.buffer, ctx.last = logits.buffer, chunks[-1] if chunks else None
        return losses.view(labels_BS.t().shape).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BS: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_SBH, weight, labels_T, label_index, largest, log_total = ctx.saved_tensors
        head: Head = ctx.head
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        whole = gather_sequence(x_SBH, head.group)[0] if head.gathers else x_SBH
        rows = whole.flatten(0, 1)
        upstream = gradient_BS.t().flatten().index_select(0, label_index)
        scale = upstream * (1 + 2 * ctx.z_loss_coeff * (largest + log_total))
        factors_T4 = torch.stack((largest, log_total, scale, upstream), dim=-1)
        columns, softcap = head.columns(weight), head.softcap or 0.0
        x_gradient = torch.zeros_like(rows) if needs_x else None
        weight_gradient = _WeightGradient(weight) if needs_weight else None
        # A second backward pass, of a graph that was retained, would not find the last logits.
        logits, ctx.buffer = _Logits(rows, weight, label_index, ctx.buffer, ctx.last), None
        for chunk in reversed(head.chunks(len(label_index), weight)):
            rows_TH, logits_TV = logits.of(chunk)
            logits_gradient_(logits_TV, labels_T[chunk], factors_T4[chunk], columns, softcap)
            if x_gradient is not None:
                x_gradient.index_copy_(0, label_index[chunk], torch.mm(logits_TV, weight))
            if weight_gradient is not None:
                weight_gradient.add(logits_TV, rows_TH)
        if x_gradient is not None:
            x_gradient, reducing = reduce_input_gradient(x_gradient.view_as(whole), head.group, head.gathers)
            if reducing is not None:
                reducing.wait()
        return x_gradient, None if weight_gradient is None else weight_gradient.result(), None, None, None, None


class _Logits:
    """A buffer that holds the logits of one chunk after the other.

    Args:
        rows: hidden states of all tokens.
        weight: this rank's rows.
        label_index: indices of the tokens with a label.
        buffer: an existing buffer that holds the logits of the chunk `held`; None for a new one.
        held: the chunk whose logits `buffer` holds.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        weight: torch.Tensor,
        label_index: torch.Tensor,
        buffer: torch.Tensor | None = None,
        held: slice | None = None,
    ) -> None:
        self.rows, self.weight, self.label_index = rows, weight, label_index
        self.buffer, self.held = buffer, None if buffer is None else held

    def of(self, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return hidden states [T, H] and logits [T, V] of a chunk; the logits are valid until the next call."""
        rows_TH = self.rows.index_select(0, self.label_index[chunk])
        if self.buffer is None or len(self.buffer) < len(rows_TH):
            self.buffer = self.rows.new_empty((len(rows_TH), self.weight.shape[0]))
        logits_TV = self.buffer[: len(rows_TH)]
        if chunk != self.held:
            torch.mm(rows_TH, self.weight.t(), out=logits_TV)
        self.held = None
        return rows_TH, logits_TV


def _over_ranks(statistics_T3: torch.Tensor, group: Group) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return largest logit, sum of exponentials relative to it, and label's logit over all tensor ranks, [T] each."""
    if group.size() == 1:
        return statistics_T3.unbind(-1)  # type: ignore[return-value]
    every = statistics_T3.new_empty((group.size(), *statistics_T3.shape))
    torch.distributed.all_gather_into_tensor(every.flatten(0, 1), statistics_T3, group=group)
    largest, total, at_label = every.unbind(-1)
    largest_T = largest.amax(0)
    return largest_T, (total * (largest - largest_T).exp()).sum(0), at_label.sum(0)


class _WeightGradient:
    """The weight's gradient, summed over chunks in fp32 (in fp64 where the weight is)."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.main = weight, main_gradient(weight)
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.total = torch.zeros_like(weight, dtype=wide) if self.main is None else self.main

    def add(self, logits_gradient_TV: torch.Tensor, rows_TH: torch.Tensor) -> None:
        """Add one chunk's gradient."""
        add_product(self.total, logits_gradient_TV.t(), rows_TH)

    def result(self) -> torch.Tensor | None:
        """Return what autograd gets; it must add nothing where the gradient is in `main_grad` already."""
        if self.main is None:
            return self.total.to(self.weight.dtype)
        return added_to_main(self.weight, self.main)
