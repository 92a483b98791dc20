"""The two passes over a chunk of logits of which the loss of a linear head is made (`reference`)."""

from vlm_kernels.linear_cross_entropy.operators import logits_gradient_, vocabulary_statistics

__all__ = ["logits_gradient_", "vocabulary_statistics"]
