"""megatron-core's layer-wise distributed optimizer, repaired.

It gives each data rank whole parameters to update, which Muon needs. Three things of megatron-core 0.19.2 are replaced
(tests/training/test_muon.py fails without each):

- with one data rank it shards nothing, though experts may have several (`expt_dp`; tensor ranks share the tokens): each
  of these would update all experts, most of them with a part of their gradient.
- in fp32 its members are bare torch optimizers, which lack what a chain calls.
- its members are not given their process groups, and look for global ones, which do not exist here.

This goes when megatron-core has repaired them.
"""

from __future__ import annotations

from typing import Any

from megatron.core import optimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.process_groups_config import ProcessGroupCollection


class LayerWiseOptimizer(LayerWiseDistributedOptimizer):
    """A chain of optimizers of those parameters that this data rank updates."""

    def __init__(
        self,
        optimizers: list[Any],
        config: Any,
        pg_collection: ProcessGroupCollection,
        init_state_fn_list: list[Any],
        model_chunks: list[Any],
    ) -> None:
        super().__init__(optimizers, config, pg_collection, init_state_fn_list, model_chunks)
        if not config.bf16:
            self.config = config
            self.chained_optimizers = [
                FP32Optimizer(member, config, init_state)
                for member, init_state in zip(optimizers, init_state_fn_list, strict=True)
            ]
        for member in (self, *self.chained_optimizers):
            member.tp_group, member.expert_tp_group = pg_collection.tp, pg_collection.expt_tp
            member.grad_stats_parallel_group = pg_collection.intra_dist_opt

    def shard_params(self, optimizers: list[Any], full_param_layouts: Any = None) -> None:
        """Leave to the optimizers the parameters in this rank's shards of the buffers."""
        self._shard_params_from_layout(optimizers, full_param_layouts, self.dp_cp.size(), self.expt_dp.size())


def install() -> None:
    """Give megatron-core this class where it uses its own."""
    optimizer.LayerWiseDistributedOptimizer = LayerWiseOptimizer
