"""Norm and rotary position embedding of queries and keys, in one pass over both.

Every kind of rotation is given by a table and, for two-dimensional ones, a number of sections: pairs (i, i + R / 2) of
the first R elements of a head are rotated by angle i of their token, and the other elements are copied. Partial
rotation has R < D; proportional rotation has angles of zero; with interleaved axes only the table differs; with C
sections, the elements of a pair are R / 2C apart inside each of C sections of the rotated elements.

Shapes: T token dimensions (one or two), N heads of queries or keys, D head dim, R rotated elements (R <= D).
"""

from __future__ import annotations

from typing import Any

import torch

from vlm_kernels.library import define
from vlm_kernels.rope import reference

RopeTable = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines [*T, R / 2] of the angles by which each token's pairs are rotated."""


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    table: RopeTable,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float | None = None,
    zero_centered: bool = False,
    query_scale: torch.Tensor | None = None,
    sections: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise heads of queries and keys, rotate them, and scale the queries.

    Everything is computed in fp32 and rounded where transformers' chain of operations rounds: after the norm, after the
    rotation, after the scale, and where the table has the dtype of `q`, also after the multiplications of the rotation.
    Gradients are rounded once. The table and the scale have no gradient.

    Args:
        q: queries [*T, N, D]; any strides, but the last dimension contiguous: both may be views of one projection.
        k: keys [*T, N', D], in the dtype of `q`.
        table: cosines and sines [*T, R / 2], in fp32 or the dtype of `q`.
        q_weight: weight of the norm of queries, [D].
        k_weight: weight of the norm of keys, [D].
        eps: added to the mean square of a head; None for no norms.
        zero_centered: whether norms multiply by `1 + weight`.
        query_scale: factor on rotated queries, [*T], in the table's dtype.
        sections: number of sections of the rotated elements, each of which is rotated by itself.

    Returns:
        Queries and keys, contiguous, in the shapes and the dtype of `q` and `k`.
    """
    assert eps is not None or (q_weight is None and k_weight is None), "a norm needs eps"
    return _forward(q, k, q_weight, k_weight, *table, query_scale, eps, zero_centered, sections)[:2]


def _forward_fake(
    q: torch.Tensor, k: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    eps = arguments[5]
    return _like(q), _like(k), _rstd_like(q, eps), _rstd_like(k, eps)


def _backward_fake(
    q_grad: torch.Tensor, k_grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    q_rstd, k_rstd, q_weight, k_weight = arguments[:4]
    return _like(q), _like(k), _weight_grad_like(q_rstd, q_weight), _weight_grad_like(k_rstd, k_weight)


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rstd_like(x: torch.Tensor, eps: float | None) -> torch.Tensor:
    shape = (0,) if eps is None else (*x.shape[:-1], 1)
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _weight_grad_like(rstd: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return rstd.new_empty(0) if weight is None or rstd.dim() == 1 else torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, q_weight, k_weight, cosine, sine, query_scale, eps, zero_centered, sections = inputs
    kept = (q, k) if eps is not None else (None, None)  # the gradient of a rotation does not need its inputs
    ctx.save_for_backward(*kept, *output[2:], q_weight, k_weight, cosine, sine, query_scale)
    ctx.zero_centered, ctx.sections = zero_centered, sections
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # zeros for what has no gradient would be two launches
    ctx.shapes = q.shape, k.shape


def _gradients(
    ctx: Any, q_grad: torch.Tensor | None, k_grad: torch.Tensor | None, *_: Any
) -> tuple[torch.Tensor | None, ...]:
    q, k, *saved = ctx.saved_tensors
    given = k_grad if q_grad is None else q_grad
    if given is None:
        return (None,) * 10
    q_grad, k_grad = (
        given.new_zeros(shape) if grad is None else grad
        for grad, shape in zip((q_grad, k_grad), ctx.shapes, strict=True)
    )
    inputs = (q_grad, k_grad) if q is None else (q, k)
    *grads, q_weight, k_weight = _backward(q_grad, k_grad, *inputs, *saved, ctx.zero_centered, ctx.sections)
    weights = (None if weight is None else grad for weight, grad in zip(saved[2:4], (q_weight, k_weight), strict=True))
    return (*grads, *weights, *[None] * 6)


_backward = define(
    "qk_norm_rope_backward(Tensor q_grad, Tensor k_grad, Tensor q, Tensor k, Tensor q_rstd, Tensor k_rstd, "
    "Tensor? q_weight, Tensor? k_weight, Tensor cosine, Tensor sine, Tensor? query_scale, bool zero_centered, "
    "int sections) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.backward,
    _backward_fake,
)
_forward = define(
    "qk_norm_rope(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor cosine, Tensor sine, "
    "Tensor? query_scale, float? eps, bool zero_centered, int sections) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.forward,
    _forward_fake,
    _gradients,
    _save,
)
