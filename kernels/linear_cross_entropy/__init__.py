"""Cross-entropy of a vocabulary-parallel linear head, without logits of all tokens ever being in memory."""

from kernels.linear_cross_entropy.loss import Head, chunk_tokens, linear_cross_entropy
from kernels.linear_cross_entropy.operators import logits_gradient_, vocabulary_statistics

__all__ = ["Head", "chunk_tokens", "linear_cross_entropy", "logits_gradient_", "vocabulary_statistics"]
