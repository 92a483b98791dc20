"""The Adam that megatron-core's optimizers use: NVIDIA's fused ones, or AdamW of torch in their state layout.

megatron-core's distributed optimizer describes and loads the state of the fused Adam: `step` in the parameter group,
where our manifest takes it from, `exp_avg` and `exp_avg_sq` per parameter. Its fallback, `torch.optim.AdamW`, keeps
`step` per parameter: a new optimizer cannot be described ("assert len(steps) == 1"). `FusedLayoutAdam` has torch's
arithmetic and the fused layout. It goes when megatron-core can describe and reload the state of torch's Adam.

megatron-core takes what it can import, from a package by name and whatever the device. NVIDIA's classes need a GPU;
apex built without its CUDA extensions has the class, which then raises; and PyPI's package "apex" is another project.
So `select` replaces that choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from megatron_vlm.errors import ConfigError


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


Library = Literal["torch", "transformer_engine", "apex"]


def nvidia_adams() -> dict[Library, type[torch.optim.Optimizer]]:
    """Return NVIDIA's fused Adams whose kernels can be imported, the preferred one first."""
    found: dict[Library, type[torch.optim.Optimizer]] = {}
    try:
        from transformer_engine.pytorch.optimizers import FusedAdam

        found["transformer_engine"] = FusedAdam
    except ImportError:
        pass
    try:
        from amp_C import multi_tensor_adam  # noqa: F401  # built with apex's option --cuda_ext only
        from apex.optimizers import FusedAdam as ApexAdam

        found["apex"] = ApexAdam
    except ImportError:
        pass
    return found


def select(backend: Literal["auto", "torch", "transformer_engine", "apex"], accelerated: bool) -> Library:
    """Give megatron-core an Adam, and return whose it is.

    Args:
        backend: whose Adam is wanted; auto takes NVIDIA's where there is one.
        accelerated: whether this process computes on CUDA.

    Raises:
        ConfigError: there is none of that library's here.
    """
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import distrib_optimizer

    adams = nvidia_adams() if accelerated and backend != "torch" else {}
    if backend not in ("auto", "torch", *adams):
        lack, install = (
            ("imported", "install it (docs/kernels.md says how), or ") if accelerated else ("used on a CPU", "")
        )
        raise ConfigError(
            f"optimizer.adam_backend is {backend}, but its fused Adam cannot be {lack}",
            fix=f"{install}set optimizer.adam_backend to auto",
        )
    library: Library = next(iter(adams), "torch") if backend == "auto" else backend
    optimizer.Adam = distrib_optimizer.Adam = adams.get(library, FusedLayoutAdam)
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_TE_OPTIMIZER = library == "transformer_engine"
    distrib_optimizer.USING_APEX_OPTIMIZER = library != "transformer_engine"  # ours has the layout of apex's
    return library
