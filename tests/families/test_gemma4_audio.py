"""Gemma 4's audio tower and its projector equal transformers' in features and the gradient of every parameter."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.nn.utils.rnn import pad_sequence
from transformers import Gemma4AudioConfig, Gemma4VisionConfig
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4AudioModel,
    Gemma4ClippableLinear,
    Gemma4MultimodalEmbedder,
    Gemma4VisionMLP,
)

from megatron_vlm.errors import ConfigError
from megatron_vlm.families.gemma4 import audio, clipped_linear
from megatron_vlm.families.gemma4.audio import AudioTower
from megatron_vlm.families.gemma4.audio_config import audio_config_from_hf, num_tokens
from megatron_vlm.families.gemma4.clipped_linear import ClippedGatedMLP
from megatron_vlm.families.gemma4.projector import Projector
from megatron_vlm.families.gemma4.tower_weights import audio_tower_weights
from megatron_vlm.model.init_weights import initialize_weights
from megatron_vlm.model_configs import check_numbers
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.mcore_config import build_mcore_config
from megatron_vlm.parallel.parameters import spec_of
from megatron_vlm.parallel.sharding import full_shape, gather_full, own_part
from tests.ranks import run_ranks
from tests.sizes import two_sizes
from vlm_kernels.rms_norm import rms_norm

TEXT_SIZE, NUM_BINS = 24, 16
# 26 tokens are more than two chunks of 12; a clip begins and ends inside a chunk, and lengths leave every remainder.
CLIPS: dict[str, tuple[int, ...]] = {"several": (45, 1, 104, 7, 16, 2), "one": (54,)}
TOLERANCE = 4e-5  # fp32; over six seeds, sums in another order reach 3e-6 to 1.8e-5 of the largest value
CLEARLY_WRONG = 1e-2


def hf_config(clips: bool) -> Gemma4AudioConfig:
    """Limits that activations exceed, and an eps that norms show whose it is."""
    return Gemma4AudioConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        subsampling_conv_channels=(NUM_BINS, 8),
        output_proj_dims=40,
        attention_logit_cap=3.0,
        gradient_clipping=2.0,
        rms_norm_eps=1e-3,
        residual_weight=0.7,
        use_clipped_linears=clips,
    )


@dataclass
class Results:
    """Features, and gradients by name, whole."""

    features: torch.Tensor
    gradients: dict[str, torch.Tensor]


def frames_of(case: str) -> torch.Tensor:
    return torch.randn((sum(CLIPS[case]), NUM_BINS), generator=torch.Generator().manual_seed(1))


def loss_of(features: torch.Tensor) -> torch.Tensor:
    """Another random weight for each number, so that each has a gradient of its own."""
    return (features * torch.randn(features.shape, generator=torch.Generator().manual_seed(2))).sum()


def their_features(tower: Gemma4AudioModel, embedder: Gemma4MultimodalEmbedder, case: str) -> torch.Tensor:
    lengths = CLIPS[case]
    padded = pad_sequence(list(frames_of(case).split(lengths)), batch_first=True, padding_value=7.0)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    output = tower(padded, attention_mask=mask)
    return embedder(output.last_hidden_state)[output.attention_mask]


@cache
def hf_modules(clips: bool) -> tuple[Gemma4AudioModel, Gemma4MultimodalEmbedder]:
    """Every parameter random, and bounds that each clip some of the values that come."""
    config, generator = hf_config(clips), torch.Generator().manual_seed(0)
    tower = Gemma4AudioModel(config)
    embedder = Gemma4MultimodalEmbedder(config, SimpleNamespace(hidden_size=TEXT_SIZE))
    with torch.no_grad():
        for parameter in (*tower.parameters(), *embedder.parameters()):
            is_vector = parameter.dim() == 1
            scale = 0.3 if is_vector else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + is_vector)
        if clips:
            hooks = [linear.register_forward_pre_hook(set_bounds) for linear in linears_of(tower)]
            their_features(tower, embedder, "several")
            for hook in hooks:
                hook.remove()
    return tower, embedder


def linears_of(tower: torch.nn.Module) -> list[Gemma4ClippableLinear]:
    return [module for module in tower.modules() if isinstance(module, Gemma4ClippableLinear)]


def set_bounds(linear: Gemma4ClippableLinear, arguments: tuple[torch.Tensor]) -> None:
    """Let each bound clip some of this pass's values: of inputs 8 % to 16 %, of outputs 2 % to 6 %.

    The next layer's input may have as many equal values, among which there is no place for a bound.
    """
    (x,) = arguments
    linear.input_min.copy_(bound(x, 0.08, 0.16))
    linear.input_max.copy_(-bound(-x, 0.08, 0.16))
    output = linear.linear(x.clamp(linear.input_min, linear.input_max))
    linear.output_min.copy_(bound(output, 0.02, 0.06))
    linear.output_max.copy_(-bound(-output, 0.02, 0.06))


def bound(values: torch.Tensor, least: float, most: float) -> torch.Tensor:
    """The middle of the widest gap between values in this range of shares.

    Whether a value is clipped, and has a gradient, must not depend on its last bits.
    """
    ranked = values.flatten().sort().values
    ranked = ranked[int(least * len(ranked)) : int(most * len(ranked))]
    index = ranked.diff().argmax()
    return ranked[index : index + 2].mean()


@cache
def theirs(case: str, clips: bool = True) -> Results:
    modules = hf_modules(clips)
    for module in modules:
        module.zero_grad()
    features = their_features(*modules, case)
    loss_of(features).backward()
    gradients = {name: parameter.grad for module in modules for name, parameter in module.named_parameters()}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
    return Results(features.detach(), gradients)


def state(clips: bool = True) -> dict[str, torch.Tensor]:
    return {name: value.detach() for module in hf_modules(clips) for name, value in module.state_dict().items()}


def test_every_bound_clips() -> None:
    shares: list[torch.Tensor] = []

    def record(linear: Gemma4ClippableLinear, arguments: tuple[torch.Tensor], output: torch.Tensor) -> None:
        (x,) = arguments
        shares.extend((x < linear.input_min, x > linear.input_max))
        shares.extend((output == linear.output_min, output == linear.output_max))

    tower, embedder = hf_modules(True)
    hooks = [linear.register_forward_hook(record) for linear in linears_of(tower)]
    their_features(tower, embedder, "several")
    for hook in hooks:
        hook.remove()
    assert len(shares) == 2 * 10 * 4
    assert all(0.01 < share.float().mean() < 0.2 for share in shares)


# Ours


def build(groups: ProcessGroupCollection, clips: bool = True, recompute: bool = False) -> tuple[AudioTower, Projector]:
    config = audio_config_from_hf(hf_config(clips))
    layout = Layout.over(1, num_layers=config.num_hidden_layers)
    mcore_config = build_mcore_config(config.hidden_size, config.num_attention_heads, torch.float32, layout)
    tower = AudioTower(config, mcore_config, groups.tp, recompute)
    return tower, Projector(config.output_size, TEXT_SIZE, config.norm_eps, mcore_config, groups.tp)


def named_parameters(*modules: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [named for module in modules for named in module.named_parameters()]


def load(weights: dict[str, torch.Tensor], groups: ProcessGroupCollection, *modules: torch.nn.Module) -> None:
    """transformers' weights, of which one is ours in another shape."""
    assert {name for name, _ in named_parameters(*modules)} == set(weights)
    for name, parameter in named_parameters(*modules):
        whole = weights[name].view(full_shape(parameter, groups))
        with torch.no_grad():
            parameter.copy_(own_part(whole, parameter, groups))


def groups_of(tensor_size: int) -> ProcessGroupCollection:
    groups = build_groups(Layout(tensor_size=tensor_size))
    initialize_megatron(1, groups)
    return groups


def encode(
    weights: dict[str, torch.Tensor], tensor_size: int, recompute: bool, clips: bool, case: str, mistake: str = ""
) -> Results:
    """This rank's features, and whole gradients under the rule of each parameter."""
    groups = groups_of(tensor_size)
    tower, projector = build(groups, clips, recompute)
    load(weights, groups, tower, projector)
    frames = frames_of(case).requires_grad_()
    with MISTAKES[mistake]() if mistake else ExitStack():
        (features,) = projector(*tower(frames, CLIPS[case]))
        loss_of(features).backward()
    gradients = {}
    for name, parameter in named_parameters(tower, projector):
        if not parameter.requires_grad:
            assert spec_of(parameter).kind == "buffer" and parameter.grad is None
            continue
        assert parameter.grad is not None, name
        if spec_of(parameter).partial:
            torch.distributed.all_reduce(parameter.grad, group=groups.tp)
        gradients[name] = gather_full(parameter.grad, parameter, groups)
    return Results(features.detach(), gradients)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    return ((ours.view(theirs.shape) - theirs).abs().max() / theirs.abs().max()).item()


def worst_error(ours: Results, theirs: Results) -> tuple[float, str]:
    """Over features and gradients, and where."""
    assert set(ours.gradients) == set(theirs.gradients)
    errors = [(error(ours.gradients[name], gradient), name) for name, gradient in theirs.gradients.items()]
    return max([(error(ours.features, theirs.features), "features"), *errors])


LAYOUTS = {
    "TP1": (1, False, True),
    "TP2": (2, False, True),
    "TP4": (4, False, True),
    "TP2, recompute": (2, True, True),
    "TP1, no bounds": (1, False, False),
    "TP2, no bounds": (2, False, False),
}


@pytest.mark.parametrize("case", CLIPS)
@pytest.mark.parametrize("layout", two_sizes(LAYOUTS, "TP1", "TP4", "TP2, recompute", "TP2, no bounds"))
def test_tower_and_projector_are_those_of_transformers(layout: str, case: str) -> None:
    size, recompute, clips = LAYOUTS[layout]
    for ours in run_ranks(size, encode, state(clips), size, recompute, clips, case):
        worst = worst_error(ours, theirs(case, clips))
        print(f"{layout}, {case}: {worst[0]:.1e} in {worst[1]}")
        assert worst[0] <= TOLERANCE, worst


# What the comparison must see

places_of = audio.TokenPlaces.of


def with_places(change: Callable[..., audio.TokenPlaces]) -> mock._patch:
    return mock.patch.object(audio.TokenPlaces, "of", change)


def attention_across_clips() -> mock._patch:
    return with_places(
        lambda lengths, *rest: replace(places_of(lengths, *rest), visible=places_of([sum(lengths)], *rest).visible)
    )


def depthwise_convolution_across_clips() -> mock._patch:
    return with_places(
        lambda lengths, *rest: replace(places_of([sum(lengths)], *rest), visible=places_of(lengths, *rest).visible)
    )


def thirteen_keys() -> mock._patch:
    def places(*arguments: object) -> audio.TokenPlaces:
        found = places_of(*arguments)
        # The last query of a chunk that sees all twelve is followed, in the next, by one that could see thirteen.
        full = found.visible.sum(-1, keepdim=True) == 12
        index = torch.arange(24)
        return replace(found, visible=found.visible | (full & (index[12:, None] - index == 12)))

    return with_places(places)


def subsampling_across_clips() -> mock._patch:
    """A clip begins where the last one ends, without zeros between them."""
    gaps = audio.starts_with_gaps
    return mock.patch.object(audio, "starts_with_gaps", lambda lengths, gap: gaps(lengths, gap if gap > 1 else 0))


def nothing_zeroed_after_the_first_convolution() -> mock._patch:
    return mock.patch.object(torch.Tensor, "index_fill", lambda self, *_: torch.ones_like(self))


def outputs_clipped_before_their_sum() -> mock._patch:
    def forward(layer: clipped_linear.ClippedRowParallelLinear, x: torch.Tensor) -> torch.Tensor:
        bounds, summand = layer.bounds, layer.linear._forward_impl
        layer.linear._forward_impl = lambda *rest, **named: bounds.clip_output(summand(*rest, **named))
        return layer.linear(bounds.clip_input(x))

    return mock.patch.object(clipped_linear.ClippedRowParallelLinear, "forward", forward)


def norm_of_a_ranks_own_channels() -> mock._patch:
    return mock.patch.object(audio.ShardedRMSNorm, "forward", lambda norm, x: rms_norm(x, norm.weight, norm.eps))


MISTAKES = {
    mistake.__name__: mistake
    for mistake in (
        attention_across_clips,
        depthwise_convolution_across_clips,
        thirteen_keys,
        subsampling_across_clips,
        nothing_zeroed_after_the_first_convolution,
        outputs_clipped_before_their_sum,
        norm_of_a_ranks_own_channels,
    )
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake: str) -> None:
    ours, _ = run_ranks(2, encode, state(), 2, False, True, "several", mistake)
    assert error(ours.features, theirs("several").features) >= CLEARLY_WRONG


# Exchanges


def exchanges(clips: bool) -> tuple[int, int]:
    """Number of sums over the tensor ranks in the forward pass and in the backward pass."""
    groups = groups_of(2)
    tower, projector = build(groups, clips)
    load(state(clips), groups, tower, projector)
    with mock.patch.object(torch.distributed, "all_reduce", wraps=torch.distributed.all_reduce) as sums:
        (features,) = projector(*tower(frames_of("one"), CLIPS["one"]))
        forward = sums.call_count
        loss_of(features).backward()
        return forward, sums.call_count - forward


@pytest.mark.parametrize("clips", [True, False])
def test_one_exchange_for_queries_keys_and_values(clips: bool) -> None:
    """A layer's four row-parallel outputs and its norm of all channels; backwards the same, and the projector."""
    assert run_ranks(2, exchanges, clips) == [(2 * 5, 2 * 5 + 1)] * 2


def shapes_on_meta() -> torch.Size:
    tower, projector = (module.to("meta") for module in build(groups_of(1)))
    (features,) = projector(*tower(frames_of("several").to("meta"), CLIPS["several"]))
    features.sum().backward()
    return features.shape


def test_no_host_waits_for_the_device() -> None:
    """On a device without values, whatever would read one raises."""
    num_features = sum(num_tokens(length) for length in CLIPS["several"])
    assert run_ranks(1, shapes_on_meta) == [(num_features, TEXT_SIZE)]


# The feed-forward layer of the vision tower


def vision_mlp(clips: bool) -> Gemma4VisionMLP:
    config = Gemma4VisionConfig(hidden_size=32, intermediate_size=44, use_clipped_linears=clips)
    mlp, generator = Gemma4VisionMLP(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
        if clips:
            for linear in linears_of(mlp):
                linear.register_forward_pre_hook(set_bounds)
            mlp(mlp_input())
            for linear in linears_of(mlp):
                linear._forward_pre_hooks.clear()
    return mlp


def mlp_input() -> torch.Tensor:
    return torch.randn((50, 32), generator=torch.Generator().manual_seed(3))


def mlp_results(weights: dict[str, torch.Tensor], tensor_size: int, clips: bool) -> Results:
    groups = groups_of(tensor_size)
    mcore_config = build_mcore_config(32, 4, torch.float32, Layout.over(1, num_layers=1))
    mlp = ClippedGatedMLP(32, 44, mcore_config, groups.tp, clips)
    load(weights, groups, mlp)
    x = mlp_input().requires_grad_()
    output = mlp(x)
    loss_of(output).backward()
    trained = [(name, parameter) for name, parameter in mlp.named_parameters() if parameter.requires_grad]
    gradients = {name: gather_full(parameter.grad, parameter, groups) for name, parameter in trained}
    return Results(output.detach(), gradients | {"input": x.grad})


@pytest.mark.parametrize("tensor_size", [1, 2])
@pytest.mark.parametrize("clips", [True, False])
def test_gated_mlp_is_that_of_transformers(clips: bool, tensor_size: int) -> None:
    theirs, x = vision_mlp(clips), mlp_input().requires_grad_()
    output = theirs(x)
    loss_of(output).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for ours in run_ranks(tensor_size, mlp_results, theirs.state_dict(), tensor_size, clips):
        worst = worst_error(ours, Results(output.detach(), gradients | {"input": x.grad}))
        assert worst[0] <= TOLERANCE, worst


# Names, shapes and initial weights


@pytest.mark.parametrize("clips", [True, False])
def test_tables_have_the_names_and_shapes_of_transformers(clips: bool) -> None:
    config = audio_config_from_hf(hf_config(clips))
    check_numbers(config, "Gemma 4")
    weights = {weight.suffix: weight.shape for weight in audio_tower_weights(config)}
    assert weights | {"embedding_projection.weight": (TEXT_SIZE, config.output_size)} == {
        name: tuple(value.shape) for name, value in state(clips).items()
    }


def initial_weights(tensor_size: int) -> dict[str, torch.Tensor]:
    groups = groups_of(tensor_size)
    modules = build(groups)
    initialize_weights(modules, 0, 0.02, groups)
    return {name: gather_full(parameter, parameter, groups) for name, parameter in named_parameters(*modules)}


def test_initial_weights_are_distributed_like_those_of_transformers() -> None:
    config = audio_config_from_hf(hf_config(True))
    shapes = {weight.suffix: weight.own_shape for weight in audio_tower_weights(config)}
    (ours,), sharded = run_ranks(1, initial_weights, 1), run_ranks(2, initial_weights, 2)
    for name, expected in Gemma4AudioModel(hf_config(True)).state_dict().items():
        assert tuple(ours[name].shape) == shapes[name]
        assert all(torch.equal(rank[name], ours[name]) for rank in sharded)
        if expected.unique().numel() == 1:
            assert torch.equal(ours[name], expected), name
        else:
            assert abs(ours[name].std() / expected.std() - 1) < 0.35, name


@pytest.mark.parametrize("num_frames", range(1, 20))
def test_number_of_tokens(num_frames: int) -> None:
    assert num_tokens(num_frames) == len(torch.arange(num_frames)[::2][::2])


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"attention_context_right": 1},
        {"attention_context_left": 12},
        {"attention_invalid_logits_value": -1.0},
        {"subsampling_conv_channels": (18, 8)},
        {"num_attention_heads": 5},
        {"num_attention_heads": 1, "hidden_size": 33},
    ],
    ids=str,
)
def test_what_is_not_computed_is_refused(change: dict[str, object]) -> None:
    hf = hf_config(True)
    for name, value in change.items():
        setattr(hf, name, value)
    with pytest.raises(ConfigError, match="is not supported for Gemma 4"):
        audio_config_from_hf(hf)
