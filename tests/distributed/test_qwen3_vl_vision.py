"""Qwen3-VL's tower and mergers equal transformers' in all features and the gradient of every parameter.

Shapes: P patches, H vision hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from unittest import mock

import pytest
import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel, apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_position_ids

from megatron_vlm.layers import patches
from megatron_vlm.layers.linear import Group
from megatron_vlm.layers.patches import Grid, PackedImages
from megatron_vlm.model import qwen_vision as vision
from megatron_vlm.model.qwen_vision import Projector, QwenVisionConfig, VisionTower
from megatron_vlm.parallel.chunk_settings import ChunkSettings
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.parallel.images import assign_images
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.mcore_config import build_mcore_config
from megatron_vlm.parallel.parameters import redeclare
from megatron_vlm.parallel.sharding import full_shape, gather_full, own_part
from megatron_vlm.parallel.stage_state import StageState
from tests.ranks import run_ranks
from tests.sizes import two_sizes

CONFIG = QwenVisionConfig(
    hidden_size=32,
    intermediate_size=44,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_channels=3,
    patch_size=4,
    temporal_patch_size=2,
    spatial_merge_size=2,
    num_positions_per_side=5,
    out_hidden_size=40,
    deepstack_layers=(0, 1, 3),
)
# The table of 5 x 5 positions is stretched and shrunk; a video of two frames; two images of the same size.
GRIDS: dict[str, list[Grid]] = {
    "many": [(1, 4, 6), (2, 8, 4), (1, 2, 2), (1, 4, 6), (1, 6, 10)],
    "fewer frames than ranks": [(2, 2, 4), (1, 4, 2)],
}

# fp32 sums in another order; the largest error seen is 2e-6. Mistakes below are off by 7.7e-5 and more.
TOLERANCE = 1e-5


@dataclass
class Results:
    """Features by level and gradients by name, whole."""

    features: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]


@cache
def hf_model(scale: float = 1.0) -> Qwen3VLVisionModel:
    """Every parameter random; `scale` shrinks what enters the first layer."""
    config = Qwen3VLVisionConfig(
        depth=CONFIG.num_hidden_layers,
        hidden_size=CONFIG.hidden_size,
        intermediate_size=CONFIG.intermediate_size,
        num_heads=CONFIG.num_attention_heads,
        in_channels=CONFIG.num_channels,
        patch_size=CONFIG.patch_size,
        temporal_patch_size=CONFIG.temporal_patch_size,
        spatial_merge_size=CONFIG.spatial_merge_size,
        num_position_embeddings=CONFIG.num_positions_per_side**2,
        out_hidden_size=CONFIG.out_hidden_size,
        deepstack_visual_indexes=list(CONFIG.deepstack_layers),
    )
    model = Qwen3VLVisionModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            if name.startswith(("patch_embed", "pos_embed")):
                parameter *= scale
    return model


def pixels_of(grids: list[Grid]) -> torch.Tensor:
    num_patches = sum(frames * height * width for frames, height, width in grids)
    return torch.randn((num_patches, CONFIG.patch_features), generator=torch.Generator().manual_seed(1))


def loss_of(features: list[torch.Tensor]) -> torch.Tensor:
    """Another random weight for each number, so that each has a gradient of its own."""
    generator = torch.Generator().manual_seed(2)
    weights = (torch.randn(feature.shape, generator=generator) for feature in features)
    return torch.stack([(feature * weight).sum() for feature, weight in zip(features, weights, strict=True)]).sum()


@cache
def theirs(case: str, scale: float = 1.0) -> Results:
    model, grids = hf_model(scale), GRIDS[case]
    model.zero_grad()
    output = model(pixels_of(grids), torch.tensor(grids))
    features = [output.pooler_output, *output.deepstack_features]
    loss_of(features).backward()
    return Results(
        [feature.detach() for feature in features],
        {name: parameter.grad for name, parameter in model.named_parameters()},
    )


def build(
    weights: dict[str, torch.Tensor], groups: ProcessGroupCollection, divided: bool = False, recompute: bool = False
) -> tuple[VisionTower, Projector]:
    """Our modules with transformers' weights, whose fused projections are ours in another shape."""
    mcore_config = build_mcore_config(
        CONFIG.hidden_size,
        CONFIG.num_attention_heads,
        torch.float32,
        Layout.over(1, num_layers=CONFIG.num_hidden_layers),
    )
    group = groups.cp if divided else groups.tp
    chunk = ChunkSettings(
        layers=(),
        num_layers_before=0,
        is_first=True,
        is_last=True,
        virtual_stage=None,
        mcore_config=mcore_config,
        tower_layers=range(CONFIG.num_hidden_layers),
        recompute="full" if recompute else "none",
    )
    tower, projector = VisionTower(CONFIG, chunk, group), Projector(CONFIG, mcore_config, group)
    for name, parameter in named_parameters(tower, projector):
        if divided:
            redeclare(parameter, tensor_dim=None)
        whole = weights[name].view(full_shape(parameter, groups))
        with torch.no_grad():
            parameter.copy_(own_part(whole, parameter, groups))
    return tower, projector


def named_parameters(*modules: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [named for module in modules for named in module.named_parameters()]


def features_of(
    tower: VisionTower, projector: Projector, grids: list[Grid], divided_over: tuple[Group, Group] | None = None
) -> list[torch.Tensor]:
    images = PackedImages.of(CONFIG, grids, next(tower.parameters()).device, divided_over)
    pixels = images.take(pixels_of(grids)).to(images.device)
    return images.gather(projector(*tower.finish(tower(pixels, images))), None)


def encode(weights: dict[str, torch.Tensor], tensor_size: int, divided: bool, recompute: bool, case: str) -> Results:
    """This rank's whole features, and gradients under the rule of each parameter."""
    groups, grids = build_groups(Layout(tensor_size=tensor_size)), GRIDS[case]
    initialize_megatron(1, groups)
    tower, projector = build(weights, groups, divided, recompute)
    features = features_of(tower, projector, grids, (groups.tp, groups.cp) if divided else None)
    loss_of(features).backward()
    gradients = {}
    for name, parameter in named_parameters(tower, projector):
        assert parameter.grad is not None, f"{name} has no gradient, whose exchange other ranks wait for"
        if divided:
            torch.distributed.all_reduce(parameter.grad, group=groups.tp)
        gradients[name] = gather_full(parameter.grad, parameter, groups)
    return Results([feature.detach() for feature in features], gradients)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    return ((ours.view(theirs.shape) - theirs).abs().max() / theirs.abs().max()).item()


def worst_error(ours: Results, theirs: Results) -> tuple[float, str]:
    """Over features and gradients, and where."""
    assert len(ours.features) == len(theirs.features)
    assert set(ours.gradients) == set(theirs.gradients)
    errors = [
        (error(*both), f"features of level {level}")
        for level, both in enumerate(zip(ours.features, theirs.features, strict=True))
    ]
    errors += [(error(ours.gradients[name], gradient), name) for name, gradient in theirs.gradients.items()]
    return max(errors)


def state(scale: float = 1.0) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in hf_model(scale).named_parameters()}


LAYOUTS = {
    "TP1": (1, False, False),
    "TP2": (2, False, False),
    "TP4": (4, False, False),
    "TP2, recompute": (2, False, True),
    "vision DP2": (2, True, False),
    "vision DP4": (4, True, False),
    "vision DP4, recompute": (4, True, True),
}


@pytest.mark.parametrize("case", GRIDS)
@pytest.mark.parametrize("layout", two_sizes(LAYOUTS, "TP1", "TP4", "TP2, recompute", "vision DP4"))
def test_tower_and_mergers_are_those_of_transformers(layout: str, case: str) -> None:
    size, divided, recompute = LAYOUTS[layout]
    for ours in run_ranks(size, encode, state(), size, divided, recompute, case):
        worst = worst_error(ours, theirs(case))
        assert worst[0] <= TOLERANCE, worst


# What the comparison must see


def exact_gelu_in_the_tower(tower: VisionTower, projector: Projector) -> None:
    for block in tower.layers.values():
        block.mlp.approximate = "none"


def approximate_gelu_in_mergers(tower: VisionTower, projector: Projector) -> None:
    for merger in (projector.merger, *projector.deepstack_merger_list):
        merger.approximate = "tanh"


def torch_default_eps(tower: VisionTower, projector: Projector) -> None:
    for module in (*tower.modules(), *projector.modules()):
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5


def channel_major_blocks(tower: VisionTower, projector: Projector) -> None:
    forward = projector.merger.linear_fc1.forward
    order = torch.arange(4 * CONFIG.hidden_size).view(4, -1).t().flatten()
    projector.merger.linear_fc1.forward = lambda: replace(forward(), weight=forward().weight[:, order])


def patches_in_raster_order(tower: VisionTower, projector: Projector) -> None:
    raster = partial(patches.patch_positions, merge_size=1)
    mock.patch.object(
        patches, "patch_positions", lambda frames, merge_size, device: raster(frames, device=device)
    ).start()


def one_segment_per_video(tower: VisionTower, projector: Projector) -> None:
    lengths = tuple(frames * height * width for frames, height, width in GRIDS["many"])
    segments = patches.Segments
    mock.patch.object(patches, "Segments", lambda _, *rest: segments(lengths, *rest)).start()


def taps_before_their_layers(tower: VisionTower, projector: Projector) -> None:
    finish = tower.finish

    def early(state: StageState) -> tuple[torch.Tensor, list[torch.Tensor]]:
        last, taps = finish(state)
        return last, [taps[0], taps[0], taps[1]]

    tower.finish = early  # type: ignore[method-assign]


MISTAKES: dict[Callable[[VisionTower, Projector], None], float] = {
    exact_gelu_in_the_tower: 1.0,
    approximate_gelu_in_mergers: 1.0,
    # Where a norm's input is small: elsewhere eps is lost in rounding.
    torch_default_eps: 1e-3,
    channel_major_blocks: 1.0,
    patches_in_raster_order: 1.0,
    one_segment_per_video: 1.0,
    taps_before_their_layers: 1.0,
}


def encode_with(mistake: Callable[[VisionTower, Projector], None] | None, weights: dict) -> list[torch.Tensor]:
    groups, grids = build_groups(Layout()), GRIDS["many"]
    initialize_megatron(1, groups)
    tower, projector = build(weights, groups)
    try:
        if mistake is not None:
            mistake(tower, projector)
        return [feature.detach() for feature in features_of(tower, projector, grids)]
    finally:
        mock.patch.stopall()


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_the_comparison_sees_a_mistake(mistake: Callable[[VisionTower, Projector], None]) -> None:
    scale = MISTAKES[mistake]
    right, wrong = (run_ranks(1, encode_with, made, state(scale))[0] for made in (None, mistake))
    expected = theirs("many", scale).features
    right_error, wrong_error = (max(map(error, found, expected)) for found in (right, wrong))
    assert right_error <= TOLERANCE
    assert wrong_error >= 5 * TOLERANCE, "the comparison cannot see this"


def features_of_a_naive_division(weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """A rank's rows of the fused projection taken together, not of each section."""
    groups, grids = build_groups(Layout(tensor_size=2)), GRIDS["many"]
    initialize_megatron(1, groups)
    tower, projector = build(weights, groups)
    for name, parameter in tower.named_parameters():
        if ".qkv." in name:
            with torch.no_grad():
                parameter.copy_(weights[name].chunk(2)[groups.tp.rank()].view(parameter.shape))
    return [feature.detach() for feature in features_of(tower, projector, grids)]


def test_fused_projections_divide_by_section() -> None:
    for wrong in run_ranks(2, features_of_a_naive_division, state()):
        assert max(map(error, wrong, theirs("many").features)) > 0.1


# Parts


@pytest.mark.parametrize("grid", [(4, 6), (10, 14), (2, 2), (2, 8)])
def test_positions_are_torchs_interpolation_in_fp32(grid: tuple[int, int]) -> None:
    """With a table in bf16 too, whose samples are rounded once, when they are added."""
    table = vision.PositionTable(CONFIG, torch.bfloat16)
    torch.nn.init.normal_(table.weight, generator=torch.Generator().manual_seed(0))
    height, width = grid
    ours = table(patches.patch_positions([(1, *grid)], 2, table.weight.device))
    square = table.weight.detach().float().t().view(1, -1, table.side, table.side)
    stretched = torch.nn.functional.interpolate(square, grid, mode="bilinear", align_corners=True)
    blocks = stretched[0].unflatten(1, (height // 2, 2)).unflatten(3, (width // 2, 2)).permute(1, 3, 2, 4, 0)
    assert ours.dtype == torch.float32
    # Weights that sum to one, rounded in fp32; bf16 would be off by 4e-3.
    torch.testing.assert_close(ours.detach(), blocks.flatten(0, 3), rtol=0, atol=5e-6)


def rotated_in_bf16(grid: Grid) -> tuple[torch.Tensor, ...]:
    """Query and key as attention sees them in a bf16 tower, the projection before, and transformers' rotation of it."""
    groups = build_groups(Layout())
    mcore_config = build_mcore_config(
        CONFIG.hidden_size, CONFIG.num_attention_heads, torch.bfloat16, Layout.over(1, num_layers=1)
    )
    attention = vision.VisionAttention(CONFIG, mcore_config, groups.tp)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    x = torch.randn((grid[1] * grid[2], CONFIG.hidden_size), generator=torch.Generator().manual_seed(1)).bfloat16()
    positions = patches.patch_positions([grid], 2, x.device)
    segments = vision.Segments((len(x),), x.device)
    with mock.patch.object(vision, "packed_attention", side_effect=lambda q, *_: q) as attend:
        attention(x, vision.patch_rope(positions, 8), segments)
    q, k = (tensor.transpose(0, 1) for tensor in attend.call_args.args[:2])
    qkv = attention.qkv()
    weight, bias = qkv.weight.flatten(0, 1), qkv.bias
    projected = (torch.matmul(x, weight.t()) + bias).view(len(x), 3, -1, 8)
    positions = get_vision_position_ids(torch.tensor([grid]), 2)
    cosine, sine = hf_model().rotary_pos_emb(x, positions)
    expected = apply_rotary_pos_emb_vision(projected[:, 0], projected[:, 1], cosine, sine)
    return tuple(tensor.detach() for tensor in (q, k, *expected))


def test_queries_and_keys_turn_in_fp32() -> None:
    """Bit for bit in bf16: an angle or a product rounded to bf16 would differ somewhere."""
    ((q, k, expected_q, expected_k),) = run_ranks(1, rotated_in_bf16, (1, 40, 36))
    assert q.dtype == torch.bfloat16
    assert torch.equal(q, expected_q)
    assert torch.equal(k, expected_k)


def shapes_on_meta() -> list[torch.Size]:
    groups, grids = build_groups(Layout()), GRIDS["many"]
    tower, projector = build(state(), groups)
    features = features_of(tower.to("meta"), projector.to("meta"), grids)
    loss = torch.stack([feature.sum() for feature in features]).sum()
    loss.backward()
    return [feature.shape for feature in features]


def test_no_host_waits_for_the_device() -> None:
    """On a device without values, whatever would read one raises."""
    num_tokens = sum(frames * height * width for frames, height, width in GRIDS["many"]) // 4
    assert run_ranks(1, shapes_on_meta) == [[(num_tokens, CONFIG.out_hidden_size)] * 4]


# Division of images


def test_images_are_divided_by_their_cost() -> None:
    generator = torch.Generator().manual_seed(0)
    for num_images in (0, 1, 3, 17, 100):
        costs = torch.randint(1, 5000, (num_images,), generator=generator).tolist()
        for num_ranks in (1, 2, 4):
            shares = assign_images(costs, num_ranks)
            assert shares == assign_images(list(costs), num_ranks)
            assert len(shares) == num_ranks
            assert sorted(image for share in shares for image in share) == list(range(num_images))
            # No division does better than an even one, than the costliest image alone, or, with more images than
            # ranks, than the cheapest two of the first that must share a rank.
            ranked = sorted(costs, reverse=True)
            bound = max(sum(costs) / num_ranks, *ranked[:1], sum(ranked[num_ranks - 1 : num_ranks + 1]), 0)
            assert max(sum(costs[image] for image in share) for share in shares) <= 4 / 3 * bound


def test_equal_images_are_divided_evenly() -> None:
    for num_images in range(1, 10):
        sizes = sorted(len(share) for share in assign_images([7] * num_images, 4))
        assert sizes[-1] - sizes[0] <= 1
