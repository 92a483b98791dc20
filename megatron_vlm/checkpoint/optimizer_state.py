"""Optimizer state in one form on disk, whichever of megatron-core's three kinds of optimizer wrote it.

Tensors are stored per parameter in global shape: `optimizer.state.exp_avg.<parameter name>` and so on, cut into pieces
as the ranks have them (optimizer_shards.py has those of the distributed optimizer). The three differ in where they keep
the fp32 main parameters (`_MAIN_PREFIX`) and in how they nest the groups' settings; we store the settings in the
checkpoint's manifest, once, and rebuild each optimizer's own nesting on load. So a run may change
`use_distributed_optimizer` between starts.

With Muon, matrices have an optimizer of their own beside AdamW's. Where state is sharded, a data rank has whole
matrices, which are stored as the distributed optimizer stores the rest.

A model with experts has two optimizers of one kind, chained: the second holds the experts, whose replicas are other
ranks. Every rank has both, with empty groups where its stage has no experts; or a stub of one, where nothing of its
kind trains on any rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch.distributed
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_inplace,
    dict_list_map_outplace,
    extract_matching_values,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
    param_group_identifier_keys,
)

from megatron_vlm.checkpoint.optimizer_shards import sharded_shards
from megatron_vlm.errors import CheckpointError
from megatron_vlm.platform import current

# Settings that a resumed run takes from its configuration; the scheduler sets learning rates and weight decay. The last
# is one of NVIDIA's Adams, which a checkpoint of torch's lacks.
_CONFIGURED = ("betas", "eps", "momentum", "bias_correction")
# Where each optimizer's fp32 main parameters are stored, before the parameter's name. An fp32 model without the
# distributed optimizer has none: its parameters are stored once, under their own names.
_MAIN_PREFIX = {
    DistributedOptimizer: "optimizer.state.param.",
    Float16OptimizerWithFloat16Params: "optimizer.state.fp32_param.",
    FP32Optimizer: "",
}


def describe(optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Everything about the optimizer but its tensors, for the manifest; called on every rank.

    Returns:
        `name`, `main_prefix` and `groups`: the settings of every parameter group, equal on all ranks.
    """
    _align_steps(optimizer)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return {"name": optimizer.config.optimizer, "main_prefix": _main_prefix(optimizer), "groups": groups}


def sharded_state(
    optimizer: MegatronOptimizer, model_state: dict[str, ShardedTensor], is_loading: bool
) -> dict[int, Any]:
    """The optimizer's tensors, described by their places in global tensors; called on every rank.

    Args:
        optimizer: megatron-core's optimizer.
        model_state: result of `sharded_model_state`.
        is_loading: allocate what a first step would allocate.

    Returns:
        Trees of sharded tensors, by number of the optimizer in the chain.
    """
    state: dict[int, Any] = {}
    of_one_rank = _of_one_data_rank(optimizer)
    for index, member in enumerate(_chained(optimizer)):
        if member.optimizer is None:  # megatron-core's stub, where nothing of its kind trains on any rank
            state[index] = {}
            continue
        if member.init_state_fn is None:  # SGD without momentum has no state, and megatron-core calls the None
            member.init_state_fn = lambda *_: None
        # Allocates the moments where no step was taken yet: before a load, or where all were skipped.
        member.init_state_fn(member.optimizer, member.config)
        if isinstance(member, DistributedOptimizer):
            state[index] = sharded_shards(member, model_state)
            continue
        state[index] = _tensors(member, member.sharded_state_dict(model_state, is_loading=is_loading))
        if member in of_one_rank:
            dict_list_map_inplace(partial(_without_copies, _MAIN_PREFIX[type(member)]), state[index])
    return state


def _without_copies(prefix: str, leaf: Any) -> Any:
    """Describe a tensor that only this data rank has, under the distributed optimizer's name; `prefix` is its own."""
    if not isinstance(leaf, ShardedTensor):
        return leaf
    key = leaf.key
    if prefix and key.startswith(prefix):
        key = _MAIN_PREFIX[DistributedOptimizer] + key.removeprefix(prefix)
    return replace(leaf, key=key, replica_id=(*leaf.replica_id[:2], 0))


def _tensors(member: Any, described: dict[str, Any]) -> dict[Any, Any]:
    """Of what megatron-core stores, the tensors alone, in dictionaries: the rest is in the manifest.

    What is no sharded tensor is stored once, as on the first rank. Lists and settings among it do not fit a rank that
    has more or fewer parameters or groups.
    """
    if isinstance(member, Float16OptimizerWithFloat16Params):
        mains = (main for group in described["fp32_from_fp16_params"] for main in group)
        return {"state": described["optimizer"]["state"], "main_parameters": dict(enumerate(mains))}
    return {"state": described["state"]}


def redirect_main_parameters(state: Any, optimizer: MegatronOptimizer, saved: Mapping[str, Any]) -> Any:
    """Let a state to be loaded read its main parameters from where the saved kind of optimizer put them."""
    here, there = _main_prefix(optimizer), saved["main_prefix"]

    def is_main(leaf: Any) -> bool:
        return isinstance(leaf, ShardedTensor) and leaf.key.startswith(here)

    def redirect(leaf: Any) -> Any:
        return replace(leaf, key=there + leaf.key.removeprefix(here)) if is_main(leaf) else leaf

    if here == there or not here:
        return state
    if there:
        return dict_list_map_outplace(redirect, state)
    # The main parameters of an fp32 model are views of its parameters, which are read under their own names.
    return extract_matching_values(state, is_main)[1]


def load_state(optimizer: MegatronOptimizer, loaded: Mapping[int, Any], saved: Mapping[str, Any], where: str) -> None:
    """Give loaded tensors and the manifest's settings to the optimizer.

    Args:
        optimizer: megatron-core's optimizer.
        loaded: what megatron-core loaded for `sharded_state`.
        saved: the manifest's description.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: a parameter group has other settings than any in the checkpoint.
    """
    groups = iter(match_groups(optimizer, saved, where))
    for index, member in enumerate(_chained(optimizer)):
        # megatron-core leaves out what is empty on this rank: a stage may train nothing, or no experts.
        _load_member(member, loaded.get(index, {}), list(islice(groups, len(member.param_groups))))


def _load_member(member: Any, tensors: dict[Any, Any], groups: list[dict[str, Any]]) -> None:
    if member.optimizer is None:
        return
    if isinstance(member, DistributedOptimizer):
        state: dict[str, Any] = {"optimizer": {"param_groups": groups}}  # its tensors were loaded in place
    else:
        local_groups = member.optimizer.state_dict()["param_groups"]
        state = {
            "state": tensors.get("state", {}),
            "param_groups": [
                {**group, "params": local["params"]} for group, local in zip(groups, local_groups, strict=True)
            ],
        }
        if isinstance(member, Float16OptimizerWithFloat16Params):
            # Its main parameters were loaded in place; they are copied onto themselves.
            state = {"optimizer": state, "fp32_from_fp16_params": member.fp32_from_float16_groups}
    member.load_state_dict(state)


def match_groups(optimizer: MegatronOptimizer, saved: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The saved settings of each parameter group, in the optimizer's order.

    Raises:
        CheckpointError: another kind of optimizer, or a group's settings are in no saved group.
    """
    if optimizer.config.optimizer != saved["name"]:
        there, here = (name.replace("adam", "adamw") for name in (saved["name"], optimizer.config.optimizer))
        raise CheckpointError(f"saved by optimizer {there}, this run uses {here}", where, _SETTINGS_FIX)
    candidates = [{key: _from_json(value) for key, value in group.items()} for group in saved["groups"]]
    return [_match(group, candidates, where) for group in optimizer.param_groups]


_SETTINGS_FIX = "resume with the settings it was saved with, or start a new run_dir from its weights (checkpoint.load)"


def _match(group: Mapping[str, Any], candidates: list[dict[str, Any]], where: str) -> dict[str, Any]:
    def differences(candidate: Mapping[str, Any]) -> list[str]:
        return [
            f"{key} {candidate.get(key)} there, {group.get(key)} here"
            for key in param_group_identifier_keys
            if candidate.get(key) != group.get(key)
        ]

    found = min((differences(candidate) for candidate in candidates), key=len, default=["no groups there"])
    if found:
        raise CheckpointError(f"optimizer settings differ: {'; '.join(found)}", where, _SETTINGS_FIX)
    saved = next(candidate for candidate in candidates if not differences(candidate))
    return {**saved, **{key: group[key] for key in _CONFIGURED if key in group}}


def _from_json(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _chained(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers inside megatron-core's chains: of the dense parameters, and of the experts if there are any."""
    if not isinstance(optimizer, ChainedOptimizer):
        return [optimizer]
    return [inner for member in optimizer.chained_optimizers for inner in _chained(member)]


def _of_one_data_rank(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers inside the chain whose parameters no other data rank updates."""
    chain = [optimizer, *getattr(optimizer, "chained_optimizers", [])]
    return [
        inner for member in chain if isinstance(member, LayerWiseDistributedOptimizer) for inner in _chained(member)
    ]


def _main_prefix(optimizer: MegatronOptimizer) -> str:
    is_sharded = bool(_of_one_data_rank(optimizer))
    return _MAIN_PREFIX[DistributedOptimizer if is_sharded else type(_chained(optimizer)[0])]


def _align_steps(optimizer: MegatronOptimizer) -> None:
    """Give every group the number of updates done; a rank that holds no parameter of a group does not count them."""
    groups = optimizer.param_groups
    most = torch.tensor(max((int(group.get("step", 0)) for group in groups), default=0), device=current().device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    done = int(most)
    for group in groups if done else ():
        group["step"] = done
