"""AdamW in the state layout of NVIDIA's fused Adam, for machines without Transformer Engine and apex.

megatron-core's distributed optimizer describes and loads the state of the fused Adam: `step` in the parameter group,
where our manifest takes it from, `exp_avg` and `exp_avg_sq` per parameter. Its fallback, `torch.optim.AdamW`, keeps
`step` per parameter: a new optimizer cannot be described ("assert len(steps) == 1"). This class has torch's arithmetic
and the fused layout. It goes when megatron-core can describe and reload the state of torch's Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw


class FusedLayoutAdam(torch.optim.Optimizer):
    """Adam (`adam_w_mode=False`) or AdamW with one step counter per parameter group.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: term added to the denominator.
        weight_decay: weight decay, decoupled in AdamW.
        adam_w_mode: AdamW if true.
        capturable: always False; accepted because megatron-core passes it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        assert not capturable, "a captured graph would repeat the step count, which is kept on the host"
        self._update = adamw if adam_w_mode else adam
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            group["step"] = group.get("step", 0) + 1
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                    self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
            self._update(
                parameters,
                [parameter.grad for parameter in parameters],
                [self.state[parameter]["exp_avg"] for parameter in parameters],
                [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
                [],
                # torch counts the step itself, from a tensor of each parameter.
                [torch.full((), group["step"] - 1.0, device=parameter.device) for parameter in parameters],
                fused=True,  # reads and writes everything once
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def install() -> None:
    """Give megatron-core this Adam where it would fall back to torch's."""
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import distrib_optimizer

    optimizer.Adam = FusedLayoutAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = FusedLayoutAdam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True
