"""A parameter of which every pipeline chunk holds a copy, and values that never train, in a toy model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from megatron_vlm.config import OptimizerSettings
from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.families.build import BuildSettings, build_chunks, wrap_data_parallel
from megatron_vlm.layers.linear import RowParallelLinear
from megatron_vlm.model.init_weights import initialize_weights
from megatron_vlm.model.language_model import LanguageModelChunk
from megatron_vlm.model.model_chunk import ModelChunk
from megatron_vlm.model_configs import TEXT_PARTS
from megatron_vlm.parallel.chunk_settings import ChunkSettings
from megatron_vlm.parallel.gradients import finalize_gradients
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.mcore_config import build_mcore_config
from megatron_vlm.parallel.parameters import declare, normal, ones
from megatron_vlm.parallel.stage_state import StageState
from megatron_vlm.training.optimizer import apply_gradients, build_optimizer, gradient_norm
from megatron_vlm.training.step import run_global_batch
from tests.distributed.test_stage_state import micro_batch
from tests.parity.layouts import TestLayout
from tests.ranks import run_ranks

HIDDEN, NUM_LAYERS, STD = 8, 6, 0.3
SHARED, BOUND = "language_model.per_layer_norm.weight", "language_model.clip_bound"


@dataclass(frozen=True)
class Text:
    vocab_size: int = 50
    hidden_size: int = HIDDEN
    norm_eps: float = 1e-6
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    layers: tuple[Any, ...] = (SimpleNamespace(num_attention_heads=1, moe=None),) * NUM_LAYERS


@dataclass(frozen=True)
class Model:
    text: Text = Text()
    parts: tuple[str, ...] = TEXT_PARTS
    num_tower_layers: int = 0


class PerLayerNorm(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = declare(torch.nn.Parameter(torch.empty(HIDDEN, dtype=dtype)), "vector", normal, stages="all")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Layer(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = declare(torch.nn.Parameter(torch.empty(HIDDEN, HIDDEN, dtype=dtype)), "matrix", normal)
        self.undecayed = declare(torch.nn.Parameter(torch.empty(HIDDEN, 1, dtype=dtype)), "matrix", ones, decay=False)
        self.layer_scalar = declare(torch.nn.Parameter(torch.empty(1, dtype=dtype)), "buffer", ones)

    def forward(self, x: torch.Tensor, norm: PerLayerNorm, bound: torch.Tensor) -> torch.Tensor:
        branch = torch.tanh(norm(x) @ self.weight.t()) @ self.undecayed
        return (x + branch.clamp(max=bound)) * self.layer_scalar


def a_quarter(whole: torch.Tensor, std: float, generator: torch.Generator) -> None:
    whole.fill_(0.25)


class ToyLanguageModel(LanguageModelChunk):
    def __init__(self, config: Model, chunk: ChunkSettings, groups: ProcessGroupCollection) -> None:
        dtype = chunk.mcore_config.params_dtype
        super().__init__(config.text, chunk, groups, lambda _: Layer(dtype), zero_centered_norm=False)
        self.per_layer_norm = PerLayerNorm(dtype)
        bound = torch.nn.Parameter(torch.empty((), dtype=dtype))
        self.clip_bound = declare(bound, "buffer", a_quarter, stages="all")

    def layer_inputs(self, batch: MicroBatch, dtype: torch.dtype) -> tuple[Any, ...]:
        return self.per_layer_norm, self.clip_bound


class ToyChunk(ModelChunk):
    def __init__(self, config: Model, chunk: ChunkSettings, groups: ProcessGroupCollection) -> None:
        super().__init__(config, chunk, groups)
        self.language_model = ToyLanguageModel(config, chunk, groups)

    def embed(self, batch: MicroBatch, features: Sequence[torch.Tensor]) -> StageState:
        return StageState(self.to_sequence_first(self.language_model.embed(batch.input_ids)))


class Toy:
    """As much of a family as `build_chunks` asks for."""

    build_chunk = staticmethod(ToyChunk)


class Undeclared(Toy):
    @staticmethod
    def build_chunk(*arguments: Any) -> ToyChunk:
        chunk = ToyChunk(*arguments)
        chunk.language_model.extra = torch.nn.Linear(2, 2)
        return chunk


@dataclass
class Copy:
    """A parameter of one chunk."""

    name: str
    first: torch.Tensor
    gradient: torch.Tensor | None
    after: torch.Tensor
    decays: bool | None


def build(layout: TestLayout, groups: ProcessGroupCollection, family: type[Toy] = Toy) -> list[Any]:
    settings = BuildSettings(layout.ranks(NUM_LAYERS), overlapped=layout.overlap)
    return build_chunks(family, Model(), settings, groups)  # type: ignore[arg-type]


def one_step(layout: TestLayout, num_micro_batches: int) -> tuple[float, list[Copy]]:
    """On a rank: the gradient norm, and every parameter before, with its gradient, and after a step."""
    groups = build_groups(layout.ranks(NUM_LAYERS))
    initialize_megatron(1, groups)
    chunks = build(layout, groups)
    initialize_weights(chunks, 5, STD, groups)
    named = [named for chunk in chunks for named in chunk.named_parameters()]
    first = [parameter.detach().clone() for _, parameter in named]
    model = wrap_data_parallel(
        chunks,
        groups,
        layout.distributed_optimizer,
        overlap_grad_reduce=layout.overlap,
        overlap_param_gather=layout.overlap,
    )
    settings = OptimizerSettings(lr=0.01, weight_decay=0.1)
    optimizer = build_optimizer(model, settings, torch.float32, layout.distributed_optimizer, groups)
    batches = [micro_batch(number) for number in range(num_micro_batches)][groups.dp.rank() :: groups.dp.size()]
    for _ in range(2 if layout.overlap else 1):  # megatron-core overlaps from the second step on
        for chunk in model:
            chunk.train()
            chunk.zero_grad_buffer()
        run_global_batch(model, batches, groups)
    gradients = list(_whole_gradients(model, groups))
    norm = gradient_norm(optimizer)
    apply_gradients(optimizer, norm, 0.5 * norm)
    for chunk in model:
        if layout.overlap:
            chunk.start_param_sync(force_sync=True)
    decays = {parameter: group["wd_mult"] > 0 for group in optimizer.param_groups for parameter in group["params"]}
    return norm, [
        Copy(name, before, gradient, parameter.detach().clone(), decays.get(parameter))
        for (name, parameter), before, gradient in zip(named, first, gradients, strict=True)
    ]


def _whole_gradients(model: Sequence[torch.nn.Module], groups: ProcessGroupCollection) -> Iterator[torch.Tensor | None]:
    """In the parameters' order; data ranks have valid shards alone with the distributed optimizer."""
    for chunk in model:
        for bucket in (bucket for buffer in chunk.buffers for bucket in buffer.buckets):
            if chunk.ddp_config.use_distributed_optimizer:
                shard = bucket.grad_data.chunk(groups.dp.size())[groups.dp.rank()].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, shard, group=groups.dp)
        for parameter in chunk.module.parameters():
            yield parameter.main_grad.clone() if hasattr(parameter, "main_grad") else None


LAYOUTS = {
    "PP3": TestLayout(3, pipeline=3),
    "PP3, distributed optimizer": TestLayout(3, pipeline=3, distributed_optimizer=True),
    "PP3xVPP2": TestLayout(3, pipeline=3, virtual=2),
    "PP3xVPP2, distributed optimizer": TestLayout(3, pipeline=3, virtual=2, distributed_optimizer=True),
    "PP2xDP2, overlapped": TestLayout(4, pipeline=2, distributed_optimizer=True, overlap=True),
    "PP2xVPP2xDP2, overlapped": TestLayout(4, pipeline=2, virtual=2, distributed_optimizer=True, overlap=True),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_copies_on_all_chunks(layout: TestLayout) -> None:
    """Equal first values, the gradient of one process, one part of the norm, and equal values after a step."""
    num_micro_batches = 2 * layout.world_size
    ((_, alone),) = run_ranks(1, one_step, TestLayout(), num_micro_batches)
    expected = {copy.name: copy for copy in alone}
    trained = [copy.gradient for copy in alone if copy.gradient is not None]
    norm = torch.stack([gradient.square().sum() for gradient in trained]).sum().sqrt().item()
    ranks = run_ranks(layout.world_size, one_step, layout, num_micro_batches)
    copies = [copy for _, found in ranks for copy in found]
    assert {copy.name for copy in copies} == set(expected)
    assert sum(copy.name == SHARED for copy in copies) == layout.world_size * layout.virtual
    for found, _ in ranks:
        assert found == pytest.approx(norm, rel=1e-6)
    after: dict[str, torch.Tensor] = {}
    for copy in copies:
        theirs = expected[copy.name]
        assert torch.equal(copy.first, theirs.first), copy.name
        assert torch.equal(copy.after, after.setdefault(copy.name, copy.after)), f"copies of {copy.name} differ"
        if theirs.gradient is None:
            assert copy.gradient is None and torch.equal(copy.after, copy.first)
        else:
            assert copy.gradient is not None and copy.gradient.any()
            torch.testing.assert_close(copy.gradient, theirs.gradient, rtol=1e-5, atol=1e-6)
            assert not torch.equal(copy.after, copy.first)


def test_what_is_declared() -> None:
    ((_, alone),) = run_ranks(1, one_step, TestLayout(), 2)
    for copy in alone:
        *_, last = copy.name.split(".")
        if last in ("clip_bound", "layer_scalar"):
            assert copy.gradient is None and copy.decays is None
            value = {"clip_bound": torch.tensor(0.25), "layer_scalar": torch.tensor([1.0])}[last]
            assert torch.equal(copy.after, value)
        else:
            is_matrix = copy.first.dim() == 2 and last != "undecayed"
            assert copy.decays == is_matrix, copy.name


def build_undeclared() -> str:
    groups = build_groups(Layout())
    with pytest.raises(AssertionError) as caught:
        build(TestLayout(), groups, Undeclared)
    return str(caught.value)


def test_an_undeclared_parameter_is_refused() -> None:
    (message,) = run_ranks(1, build_undeclared)
    assert "language_model.extra.weight is not declared" in message and "declare" in message


SHARDED = Layout(tensor_size=2, sequence_parallel=True, chunks=((0,),))


class Biased(MegatronModule):
    share_embeddings_and_output_weights = False

    def __init__(self, groups: ProcessGroupCollection) -> None:
        mcore_config = build_mcore_config(HIDDEN, 2, torch.float32, SHARDED)
        super().__init__(mcore_config)
        self.linear = RowParallelLinear(HIDDEN, HIDDEN, mcore_config, groups.tp, bias=True)


def bias_gradient() -> torch.Tensor:
    groups = build_groups(SHARDED)
    initialize_megatron(1, groups)
    model = wrap_data_parallel([Biased(groups)], groups, use_distributed_optimizer=False)  # type: ignore[list-item]
    linear = model[0].module.linear
    output = linear(torch.ones(4, 1, HIDDEN // 2))
    (output * (1 + groups.tp.rank())).sum().backward()
    finalize_gradients(model, pg_collection=groups)
    return linear.bias.main_grad.clone()


def test_bias_added_to_a_shard_of_the_sequence() -> None:
    """Two places on each of two ranks, with gradients 1 and 2: counted once, by our sum and not by megatron-core's."""
    for gradient in run_ranks(2, bias_gradient):
        assert torch.equal(gradient, torch.full((HIDDEN,), 2.0 * 1 + 2.0 * 2))
