"""Reference of the two passes over a chunk of logits, in fp32 (fp64 where the logits are fp64).

A cap bounds logits to `cap * tanh(logits / cap)`; 0 stands for none. Columns from `columns` on are padding and take
no part in the softmax. Labels count from this rank's first column; other ranks' labels fall outside of
`0 .. columns - 1`.

Shapes: T tokens, V columns of this rank.
"""

from __future__ import annotations

import torch


def vocabulary_statistics(
    logits_TV: torch.Tensor, labels_T: torch.Tensor, columns: int, softcap: float
) -> torch.Tensor:
    """Return each token's largest logit, sum of exponentials relative to it, and label's logit, [T, 3].

    The label's logit is 0 where another rank has it. Without columns the largest is -inf and the sum 0.
    """
    values = capped(logits_TV[:, :columns], softcap)
    if columns == 0:
        nothing = values.new_zeros(values.shape[0])
        return torch.stack((nothing - torch.inf, nothing, nothing), dim=-1)
    is_mine, column = _place(labels_T, columns)
    at_label = torch.where(is_mine, values.gather(1, column.unsqueeze(1)).squeeze(1), 0.0)
    largest = values.amax(-1, keepdim=True)
    total = (values - largest).exp_().sum(-1)
    return torch.stack((largest.squeeze(1), total, at_label), dim=-1)


def logits_gradient_(
    logits_TV: torch.Tensor, labels_T: torch.Tensor, factors_T4: torch.Tensor, columns: int, softcap: float
) -> None:
    """Overwrite logits with the gradient of `scale * logsumexp - weight * label's logit` with respect to them.

    `scale` and `weight` are constants. `factors` holds for each token the largest logit of all ranks,
    the logarithm of the sum of exponentials relative to it, `scale`, and `weight`.
    """
    largest, log_total, scale, weight = factors_T4.unsqueeze(-1).unbind(1)
    values = capped(logits_TV[:, :columns], softcap)
    in_place = softcap == 0 and values.data_ptr() == logits_TV.data_ptr()
    gradient = values.sub_(largest) if in_place else values - largest
    gradient.sub_(log_total).exp_().mul_(scale)
    if columns > 0:
        is_mine, column = _place(labels_T, columns)
        token = torch.arange(len(labels_T), device=labels_T.device)
        gradient[token, column] -= torch.where(is_mine, weight.squeeze(1), 0.0)
    if softcap != 0:
        gradient.mul_(1 - (values / softcap).square())
    if not in_place:
        logits_TV[:, :columns] = gradient
    logits_TV[:, columns:] = 0


def capped(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """Return logits in the dtype of the computation, bounded by the cap."""
    values = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return values if softcap == 0 else softcap * torch.tanh(values / softcap)


def _place(labels_T: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask of the labels that are among the columns, and a valid column for every label."""
    is_mine = (labels_T >= 0) & (labels_T < columns)
    return is_mine, labels_T.clamp(0, columns - 1)
