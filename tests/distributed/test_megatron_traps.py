"""What trains silently wrong in megatron-core 0.19.2: our settings avoid it, and it is still there.

Where a trap's own test fails, megatron-core has mended it, and what guards against it can go. Two more are tested
elsewhere: the state of torch's Adam on load (tests/test_platform.py), and in tests/parity what all of them would break.
docs/architecture.md lists also what nothing here uses.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed.finalize_model_grads import finalize_model_grads as megatron_finalize
from megatron.core.pipeline_parallel import schedules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.utils import get_model_config

from megatron_vlm.checkpoint.manager import sharded_model_state
from megatron_vlm.layers.load_balancing import LoadBalancing
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.mcore_config import build_mcore_config
from megatron_vlm.parallel.parameters import declare, zeros
from megatron_vlm.training import step
from megatron_vlm.training.step import LossSums, run_global_batch
from tests.distributed.reference import TOLERANCE, label_tokens, loss_sum_gradients, micro_batches, relative_error
from tests.families import gemma3
from tests.families.gemma3 import GEMMA3
from tests.parity.comparison import ZERO_GRADIENT
from tests.parity.layouts import LAYOUTS, gather_parameter, set_up
from tests.ranks import run_ranks

CASES = ("mixed", "text", "one image", "several images")


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return GEMMA3.write(Path(tmp_path_factory.mktemp("model")))


def worst_errors(ranks: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Of every parameter's mean gradient, over ranks."""
    reference, count = loss_sum_gradients(GEMMA3, CASES), label_tokens(GEMMA3, CASES)
    worst: dict[str, float] = {}
    for gradients in ranks:
        for name, gradient in gradients.items():
            if not name.endswith(ZERO_GRADIENT):
                error = relative_error(gradient * count, reference[name])
                worst[name] = max(worst.get(name, 0.0), error)
    assert set(worst) == {name for name in reference if not name.endswith(ZERO_GRADIENT)}
    return worst


def gradients(hf_dir: str, layout: str, mcore_config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Mean gradients by our training step, with some of megatron-core's settings changed."""
    model, groups = set_up(hf_dir, LAYOUTS[layout])
    config = get_model_config(model[0])
    for name, value in mcore_config.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    for chunk in model:
        chunk.zero_grad_buffer()
    run_global_batch(model, micro_batches(GEMMA3, CASES), groups)
    return {
        name: gather_parameter(parameter, parameter.main_grad, groups)
        for chunk in model
        for name, parameter in chunk.module.named_parameters()
    }


# Two pipeline ranks with virtual stages: both neighbours are the same rank, and batched sends mix up the directions.


def test_virtual_stages_on_two_ranks(hf_dir: str) -> None:
    ranks = run_ranks(2, gradients, hf_dir, "PP2xVPP2", {})
    assert max(worst_errors(ranks).values()) <= TOLERANCE


def test_trap_of_batched_sends_between_two_ranks(hf_dir: str) -> None:
    """megatron-core's defaults: no error, wrong gradients."""
    defaults = {"overlap_p2p_comm": False, "batch_p2p_comm": True}
    ranks = run_ranks(2, gradients, hf_dir, "PP2xVPP2", defaults)
    assert max(worst_errors(ranks).values()) > 0.1


# Norms of queries and keys, whole on every tensor rank: each rank's gradient is that of its own heads.


def test_query_and_key_norms(hf_dir: str) -> None:
    worst = worst_errors(run_ranks(2, gradients, hf_dir, "TP2+SP", {}))
    assert max(worst.values()) <= TOLERANCE


def test_trap_of_replicated_parameters(hf_dir: str) -> None:
    """megatron-core's own last step alone leaves the norms' gradients partial, and each rank with another one."""
    ranks = run_ranks(2, gradients, hf_dir, "TP2+SP", {"finalize_model_grads_func": megatron_finalize})
    wrong = {name for name, error in worst_errors(ranks).items() if error > TOLERANCE}
    assert {name.split(".")[-2] for name in wrong} >= {"q_norm", "k_norm", "input_layernorm", "norm"}
    name = "language_model.layers.0.self_attn.q_norm.weight"
    assert not torch.allclose(ranks[0][name], ranks[1][name])


# Losses: a pair is divided by the number of micro-batches, in place; a triple by that of all tokens, once.


def calculate_loss(loss: Any, per_token: bool) -> tuple[torch.Tensor, list[Any]]:
    config = build_mcore_config(8, 1, torch.float32, Layout.over(1, num_layers=1))
    assert config.calculate_per_token_loss, "without it, a mean of micro-batches' means"
    config.calculate_per_token_loss = per_token
    logged: list[Any] = []
    output, _ = schedules.forward_step_calc_loss(
        torch.nn.Identity(),
        torch.tensor([[3.0, 5.0]]),
        loss,
        config,
        vp_stage=None,
        collect_non_loss_data=False,
        num_microbatches=4,
        forward_data_store=logged,
        cp_group_size=1,
        is_last_stage=True,
    )
    return output, logged


def test_loss_is_left_as_it_is() -> None:
    batch = gemma3.make_batch([(gemma3.LENGTH, [])])
    sums = LossSums(1, batch.labels.device)
    losses = torch.rand(batch.labels.shape, generator=torch.Generator().manual_seed(0)) * (batch.labels != -100)
    output, _ = calculate_loss(lambda _: step._loss(sums, batch, losses), per_token=True)
    assert output == losses.sum()
    labels = int((batch.labels != -100).sum())
    assert sums._sums.t().tolist() == [[pytest.approx(losses.sum().item()), labels]]


def test_trap_of_pairs_and_of_division_by_micro_batches() -> None:
    def pair(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = output.sum()
        return loss, loss.detach()

    output, logged = calculate_loss(pair, per_token=True)
    assert output == 8.0 / 4
    assert logged[0] == 8.0 / 4, "what was logged shares the storage that was divided"

    def triple(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        return output.sum(), torch.tensor(2), {}

    assert calculate_loss(triple, per_token=False)[0] == 8.0 / 2 / 4


# The same under context parallelism: each rank counts the label tokens of its own shard.

SHARDS = ([3.0, 5.0, 1.0], [7.0])


def mean_over_context_ranks(per_token: bool) -> float:
    """What both ranks' gradients are of: the sum by the count (`finalize_model_grads`), else a mean over ranks."""
    config = build_mcore_config(8, 1, torch.float32, Layout.over(1, num_layers=1))
    config.calculate_per_token_loss = per_token
    losses, counts = [], []
    for shard in SHARDS:
        loss, count = schedules.forward_step_calc_loss(
            torch.nn.Identity(),
            torch.tensor(shard),
            lambda output: (output.sum(), torch.tensor(output.numel()), {}),
            config,
            vp_stage=None,
            collect_non_loss_data=False,
            num_microbatches=1,
            forward_data_store=[],
            cp_group_size=len(SHARDS),
            is_last_stage=True,
        )
        losses.append(loss.item())
        counts.append(int(count))
    return sum(losses) / (sum(counts) if per_token else len(SHARDS))


def test_the_mean_is_over_the_tokens_of_all_context_ranks() -> None:
    assert mean_over_context_ranks(per_token=True) == (3 + 5 + 1 + 7) / 4


def test_trap_of_counts_of_one_context_rank() -> None:
    assert mean_over_context_ranks(per_token=False) == ((3 + 5 + 1) / 3 + 7 / 1) / 2


# The gradient norm: what has no mark counts on the first tensor rank only, which leaves out other ranks' heads.

SECOND_TENSOR_RANK = SimpleNamespace(rank=lambda: 1, size=lambda: 2)


def test_a_parameter_of_heads_counts_on_every_tensor_rank() -> None:
    sink = declare(torch.nn.Parameter(torch.ones(2)), "vector", zeros, tensor_dim=0)
    assert param_is_not_tensor_parallel_duplicate(sink, SECOND_TENSOR_RANK)
    whole = declare(torch.nn.Parameter(torch.ones(2)), "vector", zeros)
    assert not param_is_not_tensor_parallel_duplicate(whole, SECOND_TENSOR_RANK)


def test_trap_of_heads_without_a_mark() -> None:
    """megatron-core's own attention sinks, of which each tensor rank has those of its heads."""
    config = build_mcore_config(8, 4, torch.float32, Layout.over(1, num_layers=1))
    config.softmax_type = "learnable"
    groups = ProcessGroupCollection(tp=SECOND_TENSOR_RANK)
    attention = DotProductAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)
    assert attention.softmax_offset.shape == (4 // 2,)
    assert not param_is_not_tensor_parallel_duplicate(attention.softmax_offset, SECOND_TENSOR_RANK)


# Collectives without a group take that of the global layout, which need not be the model's.

COLLECTIVES = {
    "scatter": tensor_parallel.scatter_to_sequence_parallel_region,
    "gather sequence": tensor_parallel.gather_from_sequence_parallel_region,
    "gather": tensor_parallel.gather_from_tensor_model_parallel_region,
    "reduce": tensor_parallel.reduce_from_tensor_model_parallel_region,
    "copy": lambda x: tensor_parallel.copy_to_tensor_model_parallel_region(x).sum().backward(),
}


def run_without_a_group() -> list[str]:
    """The collectives that run, where only `build_groups` has made groups."""
    initialize_megatron(1, build_groups(Layout(tensor_size=2)))
    ran = []
    for name, collective in COLLECTIVES.items():
        with suppress(AssertionError, AttributeError):  # "group should not be None", or of the None that it is
            collective(torch.ones(4, 2, requires_grad=True))
            ran.append(name)
    return ran


def test_a_forgotten_group_is_an_error() -> None:
    assert run_ranks(2, run_without_a_group) == [[], []]


def scattered_by_the_global_layout() -> list[float]:
    """What a model on one tensor rank keeps of its sequence, where the global layout has two."""
    groups = build_groups(Layout(tensor_size=2))
    with patch.multiple(parallel_state, _TENSOR_MODEL_PARALLEL_GROUP=groups.tp, _DATA_PARALLEL_GROUP=groups.dp):
        return tensor_parallel.scatter_to_sequence_parallel_region(torch.arange(4.0)).tolist()


def test_trap_of_the_global_tensor_ranks() -> None:
    """No error: megatron-core's LLaVA and GPT models scatter so (tokens, and masks of padding)."""
    assert run_ranks(2, scattered_by_the_global_layout) == [[0.0, 1.0], [2.0, 3.0]]


# Sums over tensor ranks are made in place: what a rank had itself is lost.


def own_sum(ours: bool) -> list[float]:
    """A rank's own values after they were summed over two tensor ranks."""
    groups = build_groups(Layout(tensor_size=2))
    own = torch.ones(4)
    if ours:
        balancing = LoadBalancing("transformers", 1.0, 1, 2, 1, groups.tp, groups.cp)
        assert balancing.loss(own) == 2 * (2.0 * 2.0 + 2.0 * 2.0)
    else:
        assert tensor_parallel.reduce_from_tensor_model_parallel_region(own, group=groups.tp).tolist() == [2.0] * 4
    return own.tolist()


def test_the_load_balancing_sum_of_a_rank_stays() -> None:
    assert run_ranks(2, own_sum, True) == [[1.0] * 4] * 2


def test_trap_of_sums_in_place() -> None:
    """megatron-core's own router reads its own count after the sum."""
    assert run_ranks(2, own_sum, False) == [[2.0] * 4] * 2


# Several tensors from one stage to the next: only the first is followed back.


def test_a_stage_sends_one_tensor(hf_dir: str) -> None:
    assert run_ranks(2, kinds_of_output, hf_dir) == [[torch.Tensor], [torch.Tensor]]


def kinds_of_output(hf_dir: str) -> list[type]:
    model, groups = set_up(hf_dir, LAYOUTS["PP2"])
    kinds = []
    model[0].register_forward_hook(lambda module, arguments, output: kinds.append(type(output)))
    run_global_batch(model, micro_batches(GEMMA3, CASES[:1]), groups, forward_only=True)
    return kinds


def test_trap_of_several_tensors_per_stage() -> None:
    config = build_mcore_config(8, 1, torch.float32, Layout.over(1, num_layers=1))
    config.deallocate_pipeline_outputs = False
    received = [torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)]
    sent = [2 * received[0], 3 * received[1]]
    first, second = schedules.backward_step(received, sent, [torch.ones(2), torch.ones(2)], config)
    assert first.tolist() == [2.0, 2.0]
    assert second is None, "the second tensor's gradient is dropped"


# Checkpoints: megatron-core takes what is in a list or a dictionary of modules to be whole on every tensor rank.


def sharded_shapes(hf_dir: str) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Global shapes by us, and by megatron-core's own method."""
    model, groups = set_up(hf_dir, LAYOUTS["TP2"])
    chunk = model[0].module
    chunk.tp_group = groups.tp
    theirs = chunk.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
    shapes = ({}, {})
    for found, state in zip(shapes, (sharded_model_state(model, groups), theirs), strict=True):
        found.update({tensor.key: tuple(tensor.global_shape) for tensor in state.values()})
    return shapes


def test_shapes_in_checkpoints_and_the_trap_of_module_lists(hf_dir: str) -> None:
    name = "language_model.layers.0.self_attn.q_proj.weight"
    heads, hidden = gemma3.TEXT["num_attention_heads"], gemma3.TEXT["hidden_size"]
    rows = heads * gemma3.TEXT["head_dim"]
    for ours, theirs in run_ranks(2, sharded_shapes, hf_dir):
        assert ours[name] == (rows, hidden)
        assert theirs[name] == (rows // 2, hidden), "megatron-core would write one rank's rows as the whole"
