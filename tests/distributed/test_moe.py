"""The layer of experts against transformers' own, on loads that a trained router never shows; and what it counts.

Shapes: S tokens of a data rank, T tokens of this rank, H hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers import PreTrainedModel
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextSparseMoeBlock

from megatron_vlm.families.qwen3_vl.config import MoEConfig
from megatron_vlm.layers.moe import LocalTokens, MoE, TopKRouter
from megatron_vlm.parallel.chunk_settings import ChunkSettings, MoESettings
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.parallel.mcore_config import build_mcore_config
from megatron_vlm.parallel.parameters import spec_of
from megatron_vlm.parallel.sharding import full_shape, gather_full, own_part
from megatron_vlm.training.step import collect_expert_use, run_global_batch
from tests.distributed.reference import micro_batches, references
from tests.families.qwen3_vl import QWEN3_VL_MOE, TOP_K
from tests.parity.layouts import TestLayout, own_micro_batches, set_up
from tests.parity.tiny_batches import Reference
from tests.ranks import run_ranks
from tests.sizes import two_sizes

HIDDEN, WIDTH, EXPERTS = 64, 32, 8
PADDING = 3  # tokens at the end of the first data rank's
# fp32 sums in another order; the largest error seen is 4e-7 of the largest value.
TOLERANCE = 1e-5

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Load:
    """Tokens and a router.

    Attributes:
        shares: tokens of each data rank, by how many there are.
        chosen: experts that the router can choose.
        top_k: experts per token.
    """

    shares: dict[int, list[int]]
    chosen: tuple[int, ...] = tuple(range(EXPERTS))
    top_k: int = 2

    def tokens(self, data_size: int) -> list[torch.Tensor]:
        """[S, H] of each data rank; put together the same for every number of them.

        No expert is chosen by a margin that bf16 could turn over.
        """
        count = sum(self.shares[data_size])
        tokens = torch.randn(4 * count, HIDDEN, generator=torch.Generator().manual_seed(1))
        tokens[:, 0] = 1.0
        *_, last, next_best = (tokens @ self.weights()["gate.weight"].t()).topk(self.top_k + 1).values.unbind(1)
        return list(tokens[last - next_best > 0.1][:count].split(self.shares[data_size]))

    def weights(self) -> Weights:
        """Under transformers' names."""
        generator = torch.Generator().manual_seed(2)
        shapes = {
            "gate.weight": (EXPERTS, HIDDEN),
            "experts.gate_up_proj": (EXPERTS, 2 * WIDTH, HIDDEN),
            "experts.down_proj": (EXPERTS, HIDDEN, WIDTH),
        }
        weights = {name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for name, shape in shapes.items()}
        # The first feature is one: what stands here is added to the expert's score.
        weights["gate.weight"][:, 0] = -40.0
        weights["gate.weight"][list(self.chosen), 0] = 0.0
        return weights


EVENLY = {1: [32], 2: [20, 12], 4: [12, 8, 4, 8]}
LOADS = {
    "all experts": Load(EVENLY),
    # Of four expert ranks, two have none of these.
    "empty experts": Load(EVENLY, chosen=(0, 1, 3)),
    "one expert": Load(EVENLY, chosen=(5,), top_k=1),
    "ranks without tokens": Load({1: [32], 2: [32, 0], 4: [16, 0, 16, 0]}),
    "one expert, ranks without tokens": Load({1: [32], 2: [32, 0], 4: [16, 0, 16, 0]}, chosen=(2,), top_k=1),
}
# Enough tokens for the sizes of rounding errors to be compared.
MANY_TOKENS = Load({1: [512], 2: [320, 192]})
LAYOUTS = {
    "EP1": TestLayout(),
    "EP2": TestLayout(2, expert=2),
    "EP4": TestLayout(4, expert=4),
    "EP2xTP2+SP": TestLayout(4, tensor=2, expert=2, sequence_parallel=True),
    "ETP2xEP2": TestLayout(4, expert=2, expert_tensor=2),
}
DISPATCHERS = ("alltoall", "allgather")


@dataclass
class Result:
    """What a rank computed: its tokens' outputs and gradients [T, H], whole gradients, tokens counted [E]."""

    place: tuple[int, int]
    output: torch.Tensor
    input_gradient: torch.Tensor
    gradients: Weights
    counts: torch.Tensor


def run_loads(layout: TestLayout, loads: dict[str, Load], dtype: torch.dtype) -> dict[tuple[str, str], Result]:
    """On a rank: every load through both dispatchers."""
    groups = build_groups(layout.ranks())
    initialize_megatron(1, groups)
    return {
        (dispatcher, name): run_load(layout, load, dispatcher, dtype, groups)
        for dispatcher in DISPATCHERS
        for name, load in loads.items()
    }


def run_load(
    layout: TestLayout, load: Load, dispatcher: Any, dtype: torch.dtype, groups: ProcessGroupCollection
) -> Result:
    mcore_config = build_mcore_config(HIDDEN, 4, dtype, layout.ranks(num_layers=1))
    chunk = ChunkSettings((0,), 0, True, True, None, mcore_config, moe=MoESettings(dispatcher))
    config = MoEConfig(EXPERTS, load.top_k, WIDTH)
    layer = MoE(HIDDEN, config, TopKRouter(HIDDEN, config, mcore_config), chunk, groups)
    weights = load.weights()
    for name, parameter in layer.named_parameters():
        with torch.no_grad():
            parameter.copy_(own_part(weights[name].view(full_shape(parameter, groups)), parameter, groups))
    expert_forward = layer.experts.forward

    def forward(x_TH: torch.Tensor, ends: torch.Tensor, weights_T: torch.Tensor) -> torch.Tensor:
        assert ends[-1] == len(x_TH) == len(weights_T), "rows past the last group stay unwritten"
        return expert_forward(x_TH, ends, weights_T)

    layer.experts.forward = forward  # type: ignore[method-assign]

    tokens_SH = load.tokens(groups.dp.size())[groups.dp.rank()]
    document_ids = torch.zeros(1, len(tokens_SH), dtype=torch.int32)
    if groups.dp.rank() == 0:
        document_ids[0, -PADDING:] = -1
    x_TH = tokens_SH.chunk(groups.tp.size())[groups.tp.rank()].to(dtype).requires_grad_()
    output, routing = layer(x_TH.unsqueeze(1), LocalTokens.of(document_ids, chunk, groups))
    loss_of(output.squeeze(1)).backward()
    gradients = {}
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient, whose exchange other ranks wait for"
        # In fp32, as main gradients are. The router is a replica on ranks with tokens of their own; so are experts on
        # those of `expt_dp`.
        gradient = parameter.grad.float()
        torch.distributed.all_reduce(gradient, group=groups.expt_dp if spec_of(parameter).is_expert else None)
        gradients[name] = gather_full(gradient, parameter, groups).reshape(weights[name].shape)
    torch.distributed.all_reduce(routing.tokens)
    place = (groups.dp.rank(), groups.tp.rank())
    assert x_TH.grad is not None
    return Result(place, output.detach().squeeze(1), x_TH.grad, gradients, routing.tokens)


def loss_of(output_TH: torch.Tensor) -> torch.Tensor:
    """Has another gradient at each number, which does not depend on where the token is."""
    return (output_TH.float().sin() * torch.arange(1.0, HIDDEN + 1)).sum()


@cache
def block(top_k: int, dtype: torch.dtype) -> Qwen3VLMoeTextSparseMoeBlock:
    config = Qwen3VLMoeTextConfig(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_experts=EXPERTS, num_experts_per_tok=top_k
    )
    config._experts_implementation = "eager"
    return Qwen3VLMoeTextSparseMoeBlock(config).to(dtype)


def theirs(load: Load, dtype: torch.dtype = torch.float32) -> Result:
    """Of all tokens, by transformers; weights and tokens are rounded to `dtype` first where it is narrower."""
    layer = block(load.top_k, dtype)
    layer.load_state_dict(load.weights())
    layer.zero_grad()
    x_TH = torch.cat(load.tokens(1)).to(dtype).requires_grad_()
    output = layer(x_TH.unsqueeze(0)).squeeze(0)
    loss_of(output).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    _, _, chosen = layer.gate(x_TH)
    assert x_TH.grad is not None
    return Result((0, 0), output.detach(), x_TH.grad, gradients, chosen.flatten().bincount(minlength=EXPERTS))


def parts_of(ranks: Sequence[Result]) -> dict[str, torch.Tensor]:
    """Outputs and gradients of all tokens in order, and whole gradients, which are the same on every rank."""
    in_order = sorted(ranks, key=lambda result: result.place)
    for result in ranks:
        assert all(torch.equal(result.gradients[name], value) for name, value in ranks[0].gradients.items())
    tokens = {name: torch.cat([getattr(each, name) for each in in_order]) for name in ("output", "input_gradient")}
    return tokens | ranks[0].gradients


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", two_sizes(LAYOUTS, "EP1", "EP2xTP2+SP", "ETP2xEP2"))
def test_any_load_gives_what_transformers_gives(name: str) -> None:
    layout = LAYOUTS[name]
    ranks, worst = run_ranks(layout.world_size, run_loads, layout, LOADS, torch.float32), 0.0
    for dispatcher, load_name in ranks[0]:
        load = LOADS[load_name]
        expected = theirs(load)
        # What the load is for.
        assert {expert for expert, count in enumerate(expected.counts) if count} <= set(load.chosen)
        results = [found[dispatcher, load_name] for found in ranks]
        for part, ours in parts_of(results).items():
            wanted = parts_of([expected])[part]
            if part == "gate.weight" and load.top_k == 1:
                # One expert has the whole weight, whatever its score.
                assert not ours.any() and wanted.abs().max() <= 1e-4
                continue
            error = relative_error(ours, wanted)
            worst = max(worst, error)
            assert error <= TOLERANCE, f"{dispatcher}, {load_name}: {part}: {error}"
        check_counts(results, load, layout)
    print(f"{name}: worst error {worst:.1e}")


def check_counts(results: Sequence[Result], load: Load, layout: TestLayout) -> None:
    """Tokens that chose each expert, without padding, which is text to the layer itself."""
    shares = load.tokens(layout.world_size // layout.tensor)
    shares[0] = shares[0][:-PADDING]
    with torch.no_grad():
        _, _, chosen = block(load.top_k, torch.float32).gate(torch.cat(shares))
    for result in results:
        assert result.counts.tolist() == chosen.flatten().bincount(minlength=EXPERTS).tolist()


@pytest.mark.parametrize("name", ["EP1", "EP2xTP2+SP"])
def test_bf16_is_as_near_to_fp32_as_transformers(name: str) -> None:
    layout, load = LAYOUTS[name], MANY_TOKENS
    ranks = run_ranks(layout.world_size, run_loads, layout, {"many": load}, torch.bfloat16)
    exact, rounded = parts_of([fp32_of_rounded(load)]), parts_of([theirs(load, torch.bfloat16)])
    for dispatcher in DISPATCHERS:
        for part, ours in parts_of([found[dispatcher, "many"] for found in ranks]).items():
            own, their = ((value.float() - exact[part]).norm().item() for value in (ours, rounded[part]))
            print(f"{name}, {dispatcher}, {part}: {own:.2e}, transformers {their:.2e}")
            assert own <= their, part


def fp32_of_rounded(load: Load) -> Result:
    """The exact results of what bf16 is given."""
    layer = block(load.top_k, torch.float32)
    layer.load_state_dict({name: value.bfloat16() for name, value in load.weights().items()})
    layer.zero_grad()
    x_TH = torch.cat(load.tokens(1)).bfloat16().float().requires_grad_()
    output = layer(x_TH.unsqueeze(0)).squeeze(0)
    loss_of(output).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    assert x_TH.grad is not None
    return Result((0, 0), output.detach(), x_TH.grad, gradients, torch.empty(0))


# Counts and the load-balancing loss of a whole model

CASES = ("mixed", "text", "two images", "image and video")
BALANCED = MoESettings(load_balancing="transformers")
USE_LAYOUTS = {
    "TP1": TestLayout(moe=BALANCED),
    "EP2, all-gather": TestLayout(2, expert=2, moe=MoESettings("allgather", "transformers")),
    "PP2xVPP2": TestLayout(2, pipeline=2, virtual=2, moe=BALANCED),
    "EP2xTP2+SP, full recompute": TestLayout(
        4, tensor=2, sequence_parallel=True, expert=2, recompute="full", moe=BALANCED
    ),
}


@dataclass
class Use:
    """Tokens [layers, E] and the load-balancing sum: of a step, of an evaluation, and of nothing."""

    step: tuple[torch.Tensor, torch.Tensor]
    evaluation: tuple[torch.Tensor, torch.Tensor]
    nothing: tuple[torch.Tensor, torch.Tensor]


def use_of_layout(hf_dir: str, layout: TestLayout) -> Use:
    model, groups = set_up(hf_dir, layout)
    batches = own_micro_batches(model, micro_batches(QWEN3_VL_MOE, CASES), groups, layout)
    collected = []
    for forward_only in (False, True):
        for chunk in model:
            chunk.train(not forward_only)
        with torch.set_grad_enabled(not forward_only):
            run_global_batch(model, batches, groups, forward_only=forward_only)
        collected.append(collect_expert_use(model, groups))
    step, evaluation = collected
    nothing = collect_expert_use(model, groups)
    assert step is not None and evaluation is not None and nothing is not None
    return Use(step, evaluation, nothing)


def use_by_transformers(model: PreTrainedModel, references: Sequence[Reference]) -> tuple[torch.Tensor, float]:
    """Tokens that chose each expert, and the sum of auxiliary losses times label tokens."""
    tokens, balance = torch.zeros(0), 0.0
    for reference in references:
        with torch.no_grad():
            output = model(**reference.inputs, output_router_logits=True)
        is_real = reference.inputs["attention_mask"].flatten().bool()
        counts = torch.stack(
            [
                logits[is_real].topk(TOP_K).indices.flatten().bincount(minlength=logits.shape[1])
                for logits in output.router_logits
            ]
        )
        tokens = counts if not len(tokens) else tokens + counts
        balance += output.aux_loss.item() * int((reference.batch.labels != -100).sum())
    return tokens, balance


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return QWEN3_VL_MOE.write(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", USE_LAYOUTS)
def test_counts_are_the_choices_of_transformers(name: str, hf_dir: str) -> None:
    """Of real tokens; once, also where layers are computed again; and what was counted is counted once."""
    layout = USE_LAYOUTS[name]
    tokens, balance = use_by_transformers(QWEN3_VL_MOE.model(), references(QWEN3_VL_MOE, CASES))
    for use in run_ranks(layout.world_size, use_of_layout, hf_dir, layout):
        for counted, balanced in (use.step, use.evaluation):
            assert torch.equal(counted, tokens.double())
            # fp32 sums in another order; a micro-batch weighted otherwise moves it by 1e-2.
            assert balanced.item() == pytest.approx(balance, rel=1e-5)
        assert not use.nothing[0].any() and not use.nothing[1].any()
