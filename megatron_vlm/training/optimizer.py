"""Build megatron-core's optimizer and schedule from our settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlm import platform
from megatron_vlm.config import Config, OptimizerSettings
from megatron_vlm.errors import ConfigError
from megatron_vlm.model.trainable import part_of
from megatron_vlm.parallel.parameters import spec_of
from megatron_vlm.platform.agreement import is_any

_SCHEDULES = {"constant": "constant", "cosine": "cosine", "linear": "linear", "wsd": "WSD"}


def build_optimizer(
    model: Sequence[DistributedDataParallel],
    settings: OptimizerSettings,
    dtype: torch.dtype,
    use_distributed_optimizer: bool,
    groups: ProcessGroupCollection,
) -> ChainedOptimizer:
    """Build AdamW, SGD, or Muon with AdamW, over the trainable parameters of this rank's model chunks.

    Each parameter declares whether it has weight decay; parts named in `lr_multipliers` have parameter groups of their
    own. Experts have an optimizer of their own in the chain, because their replicas are on other ranks. So have
    matrices with Muon (`training.muon`); where their state is sharded, each data rank updates whole ones.

    Args:
        model: model chunks wrapped for data parallelism; for Muon with sharded state, marked by `mark_matrices` before.
        settings: the configuration's `optimizer` section.
        dtype: dtype of the parameters; with bf16 the optimizer keeps fp32 main weights.
        use_distributed_optimizer: shard the optimizer state over the data-parallel ranks.
        groups: this rank's process groups.

    Raises:
        ConfigError: there is nothing for Muon to update.
    """
    overrides = {
        ParamKey(with_name_predicate=ParamWithNamePredicate("without_decay", _has_no_decay)): (
            ParamGroupOverride(wd_mult=0.0)
        )
    }
    for part, factor in settings.lr_multipliers.items():
        override = ParamGroupOverride(max_lr=settings.lr * factor, min_lr=settings.min_lr * factor)
        overrides[ParamKey(with_name_predicate=ParamWithNamePredicate(part, _is_in(part)))] = override
    is_muon = settings.name == "muon"
    if is_muon:
        trained = (parameter for chunk in model for parameter in chunk.parameters() if parameter.requires_grad)
        if not is_any(any(spec_of(parameter).kind == "matrix" for parameter in trained)):
            raise ConfigError("optimizer.name muon updates matrices, of which none trains", fix="use adamw")
        # It needs a package that other runs can do without.
        from megatron_vlm.training.muon import register

        register()
    config = OptimizerConfig(
        optimizer="adam" if settings.name == "adamw" else settings.name,
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        sgd_momentum=0.0,
        clip_grad=settings.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=use_distributed_optimizer and not is_muon,
        use_layer_wise_distributed_optimizer=use_distributed_optimizer and is_muon,
        overlap_param_gather=model[0].ddp_config.overlap_param_gather,
        muon_momentum=settings.muon_momentum,
        muon_nesterov=settings.muon_nesterov,
        muon_num_ns_steps=settings.muon_num_ns_steps,
        muon_extra_scale_factor=settings.muon_extra_scale_factor,
        muon_fp32_matmul_prec=settings.muon_fp32_matmul_prec,
    )
    chain = get_megatron_optimizer(config, list(model), overrides, use_gloo_process_groups=False, pg_collection=groups)
    assert isinstance(chain, ChainedOptimizer)
    for member in chain.chained_optimizers[:-1]:
        # Each member's step would gather the parameters of all; only the last one's does, when all are updated. This
        # goes when megatron-core's chain gathers once by itself (tests/distributed/test_expert_optimizer.py counts).
        member._defer_param_sync = True
    return chain


def _has_no_decay(parameter: torch.nn.Parameter, name: str) -> bool:
    return not spec_of(parameter, name).decay


def _is_in(part: str) -> Callable[[torch.nn.Parameter, str], bool]:
    """Return a predicate: does a parameter belong to a part, by its name with the data-parallel wrapper's prefix?"""
    return lambda parameter, name: part_of(name.removeprefix("module.")) == part


def build_scheduler(optimizer: MegatronOptimizer, config: Config) -> OptimizerParamScheduler:
    """Build the learning-rate schedule: `step(1)` before update k sets what update k uses.

    Warm-up does not begin at zero, and a decay reaches `min_lr` one step after the last: no update is wasted on a rate
    of zero, not even that of a run of one step.
    """
    settings, train_iters = config.optimizer, config.train.train_iters
    decay_iters = settings.wsd_decay_iters or math.ceil(train_iters / 10)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_iters,
        lr_decay_steps=train_iters + 1,
        lr_decay_style=_SCHEDULES[settings.schedule],
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=train_iters,
        wd_incr_style="constant",
        wsd_decay_steps=decay_iters + 1 if settings.schedule == "wsd" else None,
        lr_wsd_decay_style="linear" if settings.schedule == "wsd" else None,
        # A resumed run follows its configuration; megatron-core would silently follow the checkpoint's.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def learning_rates(optimizer: MegatronOptimizer, settings: OptimizerSettings) -> tuple[float, dict[str, float]]:
    """Return the current rate of parts without a multiplier, and that of each part with one.

    The rates are read from the parameter groups that this rank has; a rank without any (all frozen) reports zero.
    """
    rates = [group["lr"] for group in optimizer.param_groups if "max_lr" not in group or group["max_lr"] == settings.lr]
    if rates:
        base = float(rates[0])
    else:
        scaled = [(float(g["lr"]), float(g["max_lr"])) for g in optimizer.param_groups if g.get("max_lr")]
        base = scaled[0][0] / scaled[0][1] * settings.lr if scaled else 0.0
    return base, {part: base * factor for part, factor in settings.lr_multipliers.items()}


@torch.no_grad()
def gradient_norm(optimizer: ChainedOptimizer) -> float:
    """Return the global norm of the gradients on every rank, and prepare them for `apply_gradients`.

    Without Transformer Engine and apex, megatron-core's own `get_grad_norm` takes the norm of one tensor at a time and
    waits for the device after each. Here one operator takes all norms, and the host waits once, for the result.
    """
    optimizer.prepare_grads()
    gradients: dict[torch.distributed.ProcessGroup, list[torch.Tensor]] = {}
    for member in optimizer.chained_optimizers:
        counted_once = member.get_grads_for_grad_norm()
        gradients.setdefault(member.get_grad_stats_parallel_group(), []).extend(counted_once)
    squares = [_sum_of_squares(own, group) for group, own in gradients.items()]
    return math.sqrt(torch.stack(squares).sum().item())


def _sum_of_squares(gradients: Sequence[torch.Tensor], group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """Return the sum over all elements that the ranks of a group hold, each of which must call this."""
    if gradients:
        square = torch.nn.utils.get_total_norm(gradients).square()
    else:
        square = torch.zeros((), device=platform.current().device)
    torch.distributed.all_reduce(square, group=group)
    return square


@torch.no_grad()
def apply_gradients(optimizer: MegatronOptimizer, norm: float, clip_grad: float) -> None:
    """Clip by the norm that `gradient_norm` returned (not if `clip_grad` is 0), and update the parameters."""
    # In place; without apex, megatron-core's own clipping makes a copy of all gradients first.
    factor = clip_grad / (norm + 1e-6)
    gradients = [parameter.grad for parameter in optimizer.get_parameters() if parameter.grad is not None]
    if 0 < factor < 1 and gradients:
        torch._foreach_mul_(gradients, factor)
    optimizer.step_with_ready_grads()
