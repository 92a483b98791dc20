"""Declarations of parameters, made where the parameters are created.

Initialisation, optimizer, gradient sums, sharding, memory and checkpoints read the declaration: none of them depends on
names, classes or numbers of dimensions. It is one attribute of the parameter, beside those of megatron-core that follow
from it and are set with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

Kind = Literal["matrix", "filter", "table", "vector", "buffer"]
Stages = Literal["one", "embedding_and_head", "all"]
Initial = Callable[[torch.Tensor, float, torch.Generator], object]
"""A function that fills an unsharded tensor in place, given a standard deviation and the parameter's generator."""


def zeros(whole: torch.Tensor, std: float, generator: torch.Generator) -> None:
    """Fill with zeros."""
    whole.zero_()


def ones(whole: torch.Tensor, std: float, generator: torch.Generator) -> None:
    """Fill with ones."""
    whole.fill_(1.0)


def normal(whole: torch.Tensor, std: float, generator: torch.Generator) -> None:
    """Draw from a normal distribution."""
    whole.normal_(0.0, std, generator=generator)


def normal_rows(count: int, padding_id: int | None = None) -> Initial:
    """Return an initialiser that draws `count` rows from a normal distribution.

    The rows after them, which pad the vocabulary, and the row of the padding token are zero.
    """

    def initial(whole: torch.Tensor, std: float, generator: torch.Generator) -> None:
        normal(whole, std, generator)
        whole[count:] = 0
        if padding_id is not None:
            whole[padding_id] = 0

    return initial


@dataclass(frozen=True)
class ParameterSpec:
    """The declaration of one parameter.

    Attributes:
        kind: `matrix` maps vectors to vectors: its last two dimensions are [out, in] (or [in, out]), and those before
            count several of them (experts, sections); `filter` maps pixels or frames of sound to features (patch
            projections, convolutions), of any shape; `table` has rows that are looked up or scored one by one
            (embedding, positions, head, router); `vector` scales or shifts channels; `buffer` is a value of the
            checkpoint that never trains, of any shape.
        initial: function that fills it when a run starts from random weights.
        decay: whether the optimizer applies weight decay.
        tensor_dim: dimension that is split over the tensor ranks (of an expert, over the expert-tensor ranks); None if
            it is replicated on them.
        is_expert: whether dimension 0 counts experts, which are split over the expert ranks; gradients are summed over
            the ranks of `expt_dp`.
        partial: whether each tensor rank's gradient is partial, from some heads, some of the sequence or some images;
            the parts are summed over the tensor ranks (of an expert, the expert-tensor ranks) once per step.
        stages: pipeline chunks that hold a copy. Gradients of copies are summed over them, and that of the embedding's
            chunk, or of `all` the first chunk's, counts in the gradient norm and in checkpoints. With `all`, every
            chunk must compute with its copy.
    """

    kind: Kind
    initial: Initial
    decay: bool
    tensor_dim: int | None
    is_expert: bool
    partial: bool
    stages: Stages


def declare(
    parameter: torch.Tensor,
    kind: Kind,
    initial: Initial,
    *,
    decay: bool | None = None,
    tensor_dim: int | None = None,
    is_expert: bool = False,
    partial: bool = False,
    stages: Stages = "one",
) -> torch.nn.Parameter:
    """Declare a parameter; see `ParameterSpec`.

    Args:
        parameter: parameter that has just been created.
        kind: kind of the parameter.
        initial: function that fills the parameter in a new model.
        decay: whether weight decay applies; by default, to matrices, filters and tables.
        tensor_dim: dimension that is split over tensor ranks.
        is_expert: whether the parameter holds experts.
        partial: whether tensor ranks have partial gradients.
        stages: pipeline chunks that hold a copy.

    Returns:
        The parameter.
    """
    assert isinstance(parameter, torch.nn.Parameter)
    decays = kind in ("matrix", "filter", "table") if decay is None else decay
    _attach(parameter, ParameterSpec(kind, initial, decays, tensor_dim, is_expert, partial, stages))
    return parameter


def redeclare(parameter: torch.nn.Parameter, **changes: Any) -> None:
    """Change fields of a declaration that only the owner of a layer knows."""
    _attach(parameter, dataclasses.replace(spec_of(parameter), **changes))


def spec_of(parameter: torch.nn.Parameter, name: str = "a parameter") -> ParameterSpec:
    """Return the declaration of a parameter; `name` is for the message if there is none."""
    spec: ParameterSpec | None = getattr(parameter, "spec", None)
    assert spec is not None, f"{name} is not declared: give it to `declare` of {__name__} where it is created"
    return spec


def mark_copies(chunk: torch.nn.Module, is_first: bool, has_embedding: bool) -> None:
    """Mark the parameters of which other pipeline chunks hold copies, for megatron-core.

    Each gets a bucket of its own, so that all copies are split alike over data ranks, and only the copy of one chunk
    counts in the gradient norm and is saved (`ParameterSpec.stages`).
    """
    counts = {"embedding_and_head": has_embedding, "all": is_first}
    for parameter in chunk.parameters():
        stages = spec_of(parameter).stages
        if stages != "one":
            parameter.shared_embedding = True  # type: ignore[attr-defined]
            parameter.shared = not counts[stages]  # type: ignore[attr-defined]


def mark_matrices(chunk: torch.nn.Module) -> None:
    """Mark what Muon updates, for megatron-core: buffers of its own, in which no matrix is split over data ranks."""
    for parameter in chunk.parameters():
        parameter.is_managed_by_layer_wise_optimizer = (  # type: ignore[attr-defined]
            spec_of(parameter).kind == "matrix"
        )


def _attach(parameter: torch.nn.Parameter, spec: ParameterSpec) -> None:
    marks: dict[str, Any] = {
        "spec": spec,
        # megatron-core's gradient norm counts a parameter with this mark on every rank, others on the first tensor
        # rank. There are no copies of an expert over `expt_tp` and `ep`.
        "tensor_model_parallel": spec.tensor_dim is not None or spec.is_expert,
        "partition_dim": -1 if spec.tensor_dim is None else spec.tensor_dim,
        "partition_stride": 1,
    }
    if spec.is_expert:
        # This is set also with a single expert rank, so that the optimizer has the same parts in every layout and its
        # state can be resharded.
        marks["allreduce"] = False
    for name, value in marks.items():
        setattr(parameter, name, value)
    if spec.kind == "buffer":
        parameter.requires_grad_(False)
