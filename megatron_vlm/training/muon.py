"""Muon on whole matrices, whichever shards of them a rank holds; megatron-core builds it by the name `muon`.

Muon updates parameters of kind `matrix`, AdamW all others (`ParameterSpec.kind`). A parameter with leading dimensions
is several matrices, each orthogonalised by itself: q, k and v of a vision tower, gate and up of every expert. The
update has the root mean square of AdamW's, so that both use one learning rate.

Source: NVIDIA's emerging_optimizers (Newton-Schulz iteration, momentum, decay); Jordan et al., "Muon: An optimizer for
hidden layers in neural networks" (2024), which leaves embeddings, heads and vectors to AdamW; Liu et al., "Muon is
Scalable for LLM Training" (arXiv:2502.16982), for the scale 0.2 sqrt(max(out, in)).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from emerging_optimizers.orthogonalized_optimizers import Muon
from megatron.core.optimizer import ParamKey
from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS, EmergingOptimizerEntry
from megatron.core.optimizer.optimizer_config import OptimizerConfig, ParamPredicate
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlm.parallel.parameters import spec_of
from megatron_vlm.platform import layer_wise


class WholeMatrixMuon(Muon):
    """Muon that gathers momentum over the tensor ranks and orthogonalises whole matrices on each of them.

    The same computation on every rank gives bitwise the update of one rank, for one exchange per matrix.

    Args:
        params: parameter groups, each either of experts or of none (`is_expert_parallel`).
        groups: process groups.
        options: of emerging_optimizers' Muon.
    """

    def __init__(self, params: Any, groups: ProcessGroupCollection, **options: Any) -> None:
        super().__init__(params, **options)
        self._tensor_groups = {False: groups.tp, True: groups.expt_tp}

    def orthogonalize(self, p: torch.Tensor, grad: torch.Tensor, **group: Any) -> torch.Tensor:
        """Return this rank's shard of the orthogonalised matrices [..., out, in] of a parameter.

        Args:
            p: the main parameter, which has megatron-core's marks of the model's parameter, but no declaration.
            grad: this rank's shard of the momentum, fp32.
            group: settings of its parameter group.
        """
        ranks, dim = self._tensor_groups[group["is_expert_parallel"]], p.partition_dim  # type: ignore[attr-defined]
        whole, is_split = grad, dim >= 0 and ranks.size() > 1
        if is_split:
            parts = [torch.empty_like(grad) for _ in range(ranks.size())]
            torch.distributed.all_gather(parts, grad.contiguous(), group=ranks)
            whole = torch.cat(parts, dim)
        matrices = whole.flatten(0, -3) if whole.dim() > 3 else whole  # one batch
        update = self.scaled_orthogonalize_fn(matrices).reshape(whole.shape)
        return update.narrow(dim, ranks.rank() * grad.shape[dim], grad.shape[dim]) if is_split else update


def register() -> None:
    """Let megatron-core build this Muon, and AdamW for what is not a matrix.

    Its own would take what has two dimensions and is not marked as embedding or head (routers, tables of positions),
    leave experts and the towers' q, k and v to AdamW, and by default orthogonalise the shards of matrices.
    """
    layer_wise.install()
    is_no_matrix = ParamPredicate("no matrix", lambda parameter: spec_of(parameter).kind != "matrix")
    _EMERGING_OPTIMIZERS["muon"] = EmergingOptimizerEntry(
        WholeMatrixMuon,
        config_to_kwargs=_options,
        default_param_overrides={ParamKey(predicate=is_no_matrix): {"optimizer": "adam"}},
    )


def _options(config: OptimizerConfig, model: object, groups: ProcessGroupCollection) -> dict[str, Any]:
    return {
        "groups": groups,
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "momentum": config.muon_momentum,
        "nesterov": config.muon_nesterov,
        "num_ns_steps": config.muon_num_ns_steps,
        "extra_scale_factor": config.muon_extra_scale_factor,
        "fp32_matmul_prec": config.muon_fp32_matmul_prec,
    }
