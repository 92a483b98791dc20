"""What stages send each other: named tensors of any shape, and their gradients from every stage that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.families.build import BuildSettings, build_chunks
from megatron_vlm.model.language_model import LanguageModelChunk
from megatron_vlm.model.model_chunk import ModelChunk
from megatron_vlm.model_configs import TEXT_PARTS
from megatron_vlm.parallel.chunk_settings import ChunkSettings
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.parameters import declare, normal
from megatron_vlm.parallel.stage_state import Boundary, StageState, pack, packed_shape, unpack, with_zero_gradient
from megatron_vlm.training.step import run_global_batch
from tests.ranks import run_ranks

HIDDEN, WIDTH, ROWS = 8, 6, 2  # a row of the tensor that is sent holds 16 elements, and 6 is no divisor
PRODUCER, CONSUMERS, NUM_LAYERS = 1, (3, 4, 5), 6


# A toy whose second layer makes keys, which are values too, for all of its later half


@dataclass(frozen=True)
class Text:
    vocab_size: int = 50
    hidden_size: int = HIDDEN
    norm_eps: float = 1e-6
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    layers: tuple[Any, ...] = (SimpleNamespace(num_attention_heads=1, moe=None),) * NUM_LAYERS


@dataclass(frozen=True)
class Model:
    text: Text = Text()
    parts: tuple[str, ...] = TEXT_PARTS
    num_tower_layers: int = 0


class Layer(torch.nn.Module):
    def __init__(self, index: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.index = index
        shapes = {"weight": (HIDDEN, HIDDEN)}
        if index == PRODUCER:
            shapes["keys"] = (WIDTH, HIDDEN)
        if index in CONSUMERS:
            shapes |= {"queries": (WIDTH, HIDDEN), "output": (HIDDEN, WIDTH)}
        for name, shape in shapes.items():
            weight = torch.nn.Parameter(torch.empty(shape, dtype=dtype))
            self.register_parameter(name, declare(weight, "matrix", normal))

    def forward(self, x_SBH: torch.Tensor, *keys: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if self.index in CONSUMERS:
            (keys_SBK,) = keys
            scores = torch.einsum("sbk,tbk->bst", x_SBH @ self.queries.t(), keys_SBK).softmax(-1)
            x_SBH = x_SBH + torch.einsum("bst,tbk->sbk", scores, keys_SBK) @ self.output.t()
        after = x_SBH + torch.tanh(x_SBH @ self.weight.t())
        return (after, x_SBH @ self.keys.t()) if self.index == PRODUCER else after


class ToyLanguageModel(LanguageModelChunk):
    def layer_inputs(self, batch: MicroBatch, dtype: torch.dtype) -> tuple[Any, ...]:
        return ()

    def layer_reads(self, layer: int, state: StageState) -> tuple[torch.Tensor, ...]:
        return (state.carried["keys"],) if layer in CONSUMERS else ()

    def after_layer(self, layer: int, output: Any, state: StageState, inputs: tuple[Any, ...]) -> StageState:
        if layer == PRODUCER:
            return StageState(output[0], {"keys": output[1]})
        return super().after_layer(layer, output, state, inputs)


class ToyChunk(ModelChunk):
    def __init__(self, config: Model, chunk: ChunkSettings, groups: ProcessGroupCollection) -> None:
        super().__init__(config, chunk, groups)
        dtype = chunk.mcore_config.params_dtype
        make_layer = lambda index: Layer(index, dtype)  # noqa: E731
        self.language_model = ToyLanguageModel(config.text, chunk, groups, make_layer, zero_centered_norm=False)

    def embed(self, batch: MicroBatch, features: Sequence[torch.Tensor]) -> StageState:
        return StageState(self.to_sequence_first(self.language_model.embed(batch.input_ids)))

    def boundary(self, layer: int, batch: MicroBatch) -> Boundary:
        boundary = super().boundary(layer, batch)
        if not PRODUCER < layer <= CONSUMERS[-1]:
            return boundary
        length, rows, _ = boundary.hidden
        return replace(boundary, carried={"keys": (length, rows, WIDTH)})


class Toy:
    """As much of a family as `build_chunks` asks for."""

    build_chunk = staticmethod(ToyChunk)


def micro_batch(number: int) -> MicroBatch:
    """Rows of a length of its own."""
    length = 5 + number % 3
    generator = torch.Generator().manual_seed(number)
    ids, labels = (torch.randint(0, Text.vocab_size, (ROWS, length), generator=generator) for _ in range(2))
    nothing = torch.zeros(ROWS, length, dtype=torch.int32)
    return MicroBatch(ids, labels, nothing.long(), nothing, nothing, nothing, nothing - 1, {}, nothing[:, 0])


def gradients(pipeline: int, virtual: int, recompute: str, num_micro_batches: int) -> dict[str, torch.Tensor]:
    """On a rank: the gradients of its parameters."""
    layout = Layout.over(pipeline, num_layers=NUM_LAYERS, virtual_size=virtual, pipeline_size=pipeline)
    groups = build_groups(layout)
    initialize_megatron(1, groups)
    settings = BuildSettings(layout, torch.float32, recompute=recompute)  # type: ignore[arg-type]
    chunks = build_chunks(Toy, Model(), settings, groups)  # type: ignore[arg-type]
    named = {name: parameter for chunk in chunks for name, parameter in chunk.named_parameters()}
    with torch.no_grad():
        for name, parameter in named.items():
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    for chunk in chunks:
        chunk.train()
        chunk.config.finalize_model_grads_func = lambda *arguments, **keywords: None  # nothing wraps the chunks
    run_global_batch(chunks, [micro_batch(number) for number in range(num_micro_batches)], groups)
    return {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(("pipeline", "virtual"), [(1, 1), (2, 1), (3, 1), (3, 2)])
def test_a_tensor_that_two_stages_read_has_the_gradients_of_one_process(
    pipeline: int, virtual: int, recompute: str
) -> None:
    num_micro_batches = 2 * pipeline
    (expected,) = run_ranks(1, gradients, 1, 1, "none", num_micro_batches)
    ranks = run_ranks(pipeline, gradients, pipeline, virtual, recompute, num_micro_batches)
    found = {name: gradient for rank in ranks for name, gradient in rank.items()}
    assert found.keys() == expected.keys() and len(found) == 3 + NUM_LAYERS + 1 + 2 * len(CONSUMERS)
    for name, gradient in expected.items():
        assert gradient.any(), name
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packing(dtype: torch.dtype) -> None:
    """Names, shapes and values come back, of what crosses alone; numbers with more than the dtype's precision."""
    shapes = {"keys": (5, 2, 3), "table": (7,), "features": (5, 2, 4)}
    carried = {name: torch.randn(shape).to(dtype).requires_grad_() for name, shape in shapes.items()}
    hidden, scalars = torch.randn(5, 2, 4).to(dtype).requires_grad_(), torch.tensor([1 / 3, 1e4 / 7, 2e-5])
    carried["left behind"] = torch.randn(3)
    boundary = Boundary((5, 2, 4), shapes, 3)
    packed = pack(StageState(hidden, carried, scalars), boundary, None)
    # 5 rows, 30 and 7 elements in rows of 8, 5 rows, 6 numbers in one row.
    assert packed.shape == (5 + 4 + 1 + 5 + 1, 2, 4) and packed.dtype == dtype
    found = unpack(packed, boundary)
    assert list(found.carried) == list(shapes)
    for name, tensor in found.carried.items():
        assert torch.equal(tensor, carried[name])
    assert torch.equal(found.hidden, hidden) and found.scalars is not None
    torch.testing.assert_close(found.scalars, scalars, rtol=2**-15, atol=0)
    (found.hidden.sum() + sum(tensor.sum() for tensor in found.carried.values())).backward()
    assert all((tensor.grad == 1).all() for tensor in [hidden, *(carried[name] for name in shapes)])


def test_hidden_states_alone_are_sent_as_they_are() -> None:
    hidden = torch.randn(5, 2, 4)
    boundary = Boundary((5, 2, 4))
    assert pack(StageState(hidden, {"unread": torch.randn(3)}), boundary, None) is hidden
    assert unpack(hidden, boundary).hidden is hidden
    # The schedule frees what was sent: not what was received, and no view of other memory.
    assert pack(StageState(hidden), boundary, hidden).data_ptr() != hidden.data_ptr()
    assert pack(StageState(hidden[:]), boundary, None).data_ptr() != hidden.data_ptr()


def test_patches_are_sent_in_rows_of_their_own() -> None:
    """A tower's hidden states have two dimensions, and megatron-core sends contiguous tensors of three."""
    hidden, tap = torch.randn(4, 6).t().requires_grad_(), torch.randn(6, 4)
    alone, both = Boundary((6, 4)), Boundary((6, 4), {"tap": (6, 4)})
    for boundary, num_rows in ((alone, 6), (both, 12)):
        packed = pack(StageState(hidden, {"tap": tap}), boundary, None)
        assert packed.shape == packed_shape(boundary) == (num_rows, 1, 4)
        assert packed.is_contiguous() and packed._base is None
        found = unpack(packed, boundary)
        assert torch.equal(found.hidden, hidden)
    assert torch.equal(found.carried["tap"], tap)


def test_what_is_not_read_has_a_gradient_of_zero() -> None:
    received, weight = torch.randn(3, 1, 4).requires_grad_(), torch.randn(5, 2, 4).requires_grad_()
    with_zero_gradient(weight, received).sum().backward()
    assert received.grad is not None and not received.grad.any() and received.grad.shape == received.shape
    assert weight.grad is not None and (weight.grad == 1).all()


def test_what_is_declared_and_what_is_carried_must_agree() -> None:
    state = StageState(torch.randn(5, 2, 4), {"keys": torch.randn(5, 2, 3)})
    with pytest.raises(AssertionError, match="keys"):
        pack(state, Boundary((5, 2, 4), {"keys": (5, 2, 2)}), None)
    with pytest.raises(KeyError, match="values"):
        pack(state, Boundary((5, 2, 4), {"values": (5, 2, 3)}), None)
