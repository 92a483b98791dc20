"""The two passes over a chunk of logits that make up the loss of a linear head (defined in `reference`)."""

from vlm_kernels.linear_cross_entropy.operators import logits_gradient_, vocabulary_statistics

__all__ = ["logits_gradient_", "vocabulary_statistics"]
