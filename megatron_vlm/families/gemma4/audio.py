"""Gemma 4's audio tower: a conformer over clips of any length.

The clips of a micro-batch lie one after the other without padding. Where one operation looks at neighbours in time
(sub-sampling, depthwise convolution, attention), a clip sees zeros before its begin and after its end, or nothing.

Source: transformers models/gemma4 (`Gemma4AudioModel`), which pads clips and masks them.
Shapes: F frames, T tokens of all clips, H hidden, N heads of this rank, D head dim, C tokens of a chunk, K chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import conv1d, glu, pad, relu, silu, softplus

from megatron_vlm.families.gemma4.audio_config import AudioConfig, halved_length, num_tokens
from megatron_vlm.families.gemma4.clipped_linear import (
    ClippedColumnParallelLinear,
    ClippedRowParallelLinear,
    clipped_column_parallel,
)
from megatron_vlm.layers.linear import ColumnParallelLinear, Group, column_parallel
from megatron_vlm.layers.norm import RMSNorm, norm_and_add
from megatron_vlm.layers.recompute import run_layer
from megatron_vlm.layers.side_by_side import add_side_by_side
from megatron_vlm.parallel.parameters import declare, normal, ones, zeros

NORM_EPS = 1e-6  # of the norms for which transformers does not read the configuration
LONGEST_PERIOD = 10_000.0
KEY_SCALE = math.log(1 + math.e) / math.log(2)


def place(lengths: Sequence[int], starts: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return the new index of each element of a packed sequence of clips, int64.

    Args:
        lengths: number of elements of each clip, known on the host.
        starts: new index of each clip's first element.
        device: device of the result; the host sends one small table and waits for nothing.
    """
    ends = tuple(accumulate(lengths))
    shifts = [start - end + length for start, end, length in zip(starts, ends, lengths, strict=True)]
    lengths_I, shifts_I = torch.tensor((lengths, shifts)).to(device, non_blocking=True)
    return torch.arange(ends[-1], device=device) + torch.repeat_interleave(shifts_I, lengths_I, output_size=ends[-1])


def starts_with_gaps(lengths: Sequence[int], gap: int) -> list[int]:
    """Return where clips start that follow each other with `gap` elements between them, and where the next would."""
    return [0, *accumulate(length + gap for length in lengths)]


@dataclass(frozen=True)
class TokenPlaces:
    """The places of packed tokens in the operations that look at neighbours, once for all layers.

    Attributes:
        visible: [K, C, 2 C], whether a query of a chunk sees a key of the chunk before, or of its own.
        spaced: [T], the index of each token where clips are as far apart as the depthwise convolution sees.
        spaced_length: length of that sequence.
    """

    visible: torch.Tensor
    spaced: torch.Tensor
    spaced_length: int

    @staticmethod
    def of(lengths: Sequence[int], config: AudioConfig, device: torch.device) -> TokenPlaces:
        """Return the places of clips of these numbers of tokens."""
        size = config.chunk_size
        inside_T = place(lengths, [0] * len(lengths), device)
        inside_KC = pad(inside_T, (0, -len(inside_T) % size)).unflatten(0, (-1, size))
        index = torch.arange(2 * size, device=device)
        distance = index[size:, None] - index
        visible = (distance >= 0) & (distance < size) & (distance <= inside_KC[:, :, None])
        starts = starts_with_gaps(lengths, config.conv_kernel_size - 1)
        return TokenPlaces(visible, place(lengths, starts[:-1], device), starts[-1])


class SubsamplingLayer(torch.nn.Module):
    """A convolution that halves frames and bins, a norm over its channels and a ReLU."""

    def __init__(self, in_channels: int, out_channels: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False, dtype=dtype)
        self.norm = torch.nn.LayerNorm(out_channels, eps, bias=False, dtype=dtype)
        declare(self.conv.weight, "filter", normal)
        declare(self.norm.weight, "vector", ones)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [channels, frames, bins] to [frames / 2, bins / 2, channels]."""
        return relu(self.norm(self.conv(x).permute(1, 2, 0)))


class Subsampling(torch.nn.Module):
    """Two convolutions that make one token of four frames, and a linear layer; replicated: under 1 % of the tower."""

    def __init__(self, config: AudioConfig, dtype: torch.dtype) -> None:
        super().__init__()
        first, second = config.subsampling_channels
        self.layer0 = SubsamplingLayer(1, first, config.norm_eps, dtype)
        self.layer1 = SubsamplingLayer(first, second, config.norm_eps, dtype)
        self.input_proj_linear = torch.nn.Linear(
            config.num_bins // 4 * second, config.hidden_size, bias=False, dtype=dtype
        )
        declare(self.input_proj_linear.weight, "matrix", normal)

    def forward(self, frames_FB: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Map packed frames [F, bins] of clips of these numbers of frames to packed tokens [T, H]."""
        device = frames_FB.device
        tokens = [num_tokens(length) for length in lengths]
        # Every clip starts at a whole token, and zeros of one token at least separate it from the next: a convolution
        # over all of them sees what it would see of each alone.
        starts = starts_with_gaps(tokens, 1)
        at_frame = place(lengths, [4 * start for start in starts[:-1]], device)
        frames = frames_FB.to(self.input_proj_linear.weight.dtype)
        spaced = frames.new_zeros(4 * starts[-1], frames.shape[1]).index_copy(0, at_frame, frames)
        halved = self.layer0(spaced[None])
        # The convolution made something of the zeros next to a clip's last frame.
        at_half = place([halved_length(length) for length in lengths], [2 * start for start in starts[:-1]], device)
        is_inside = halved.new_zeros(2 * starts[-1]).index_fill(0, at_half, 1)
        quartered = self.layer1((halved * is_inside[:, None, None]).permute(2, 0, 1))
        return self.input_proj_linear(quartered[place(tokens, starts[:-1], device)].flatten(1))


def position_table(config: AudioConfig, device: torch.device) -> torch.Tensor:
    """Return sines and cosines [C, H] of the distances C - 1 to 0, fp32."""
    count = config.hidden_size // 2
    step = math.log(LONGEST_PERIOD) / max(count - 1, 1)
    frequencies = torch.exp(torch.arange(count, device=device) * -step)
    angles = torch.arange(config.chunk_size - 1, -1, -1, device=device)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def limited(x: torch.Tensor, config: AudioConfig) -> torch.Tensor:
    """Clip absolute values to the configuration's limit, or to the largest number of the dtype."""
    limit = min(config.activation_limit, torch.finfo(x.dtype).max)
    return torch.clamp(x, -limit, limit)


def chunked_attention(
    q_TND: torch.Tensor,
    k_TND: torch.Tensor,
    v_TND: torch.Tensor,
    relative_CND: torch.Tensor,
    visible: torch.Tensor,
    cap: float,
) -> torch.Tensor:
    """Attend to the last C tokens of the same clip, in chunks of C queries and 2 C keys, some of which are masked.

    Args:
        q_TND: scaled queries.
        k_TND: scaled keys.
        v_TND: values.
        relative_CND: keys of the distances C - 1 to 0, added to those of the tokens.
        visible: [K, C, 2 C], from `TokenPlaces`.
        cap: scores are squeezed into (-cap, cap).

    Returns:
        The output, [T, N, D].
    """
    size, length = len(relative_CND), len(q_TND)
    after = -length % size
    q_NKCD = pad(q_TND, (0, 0, 0, 0, 0, after)).unflatten(0, (-1, size)).permute(2, 0, 1, 3)
    k_NKWD, v_NKWD = (_with_chunk_before(x, size, after).permute(2, 0, 1, 3) for x in (k_TND, v_TND))
    by_distance = q_NKCD.flatten(1, 2) @ relative_CND.permute(1, 2, 0)
    # Query i's last key is key C + i of its 2 C: rows of 2 C + 1 that are read as rows of 2 C move by one per query.
    shifted = pad(by_distance.unflatten(1, (-1, size)), (1, size)).flatten(2)
    relative = shifted[..., : 2 * size * size].unflatten(2, (size, 2 * size))
    scores = torch.tanh((q_NKCD @ k_NKWD.transpose(2, 3) + relative) / cap) * cap
    weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
    return (weights @ v_NKWD).permute(1, 2, 0, 3).flatten(0, 1)[:length]


def _with_chunk_before(x_TND: torch.Tensor, size: int, after: int) -> torch.Tensor:
    """Return chunks with those before them, [K, 2 C, N, D]."""
    chunks = pad(x_TND, (0, 0, 0, 0, size, after)).unflatten(0, (-1, size))
    return torch.cat((chunks[:-1], chunks[1:]), dim=1)


class AudioAttention(torch.nn.Module):
    """Attention over the last tokens of a clip, with relative positions; heads split over the tensor ranks.

    `per_dim_scale` acts on every head, of which a rank has some: its gradient is partial.
    """

    q_proj: ClippedColumnParallelLinear
    k_proj: ClippedColumnParallelLinear
    v_proj: ClippedColumnParallelLinear

    def __init__(self, config: AudioConfig, mcore_config: TransformerConfig, group: Group) -> None:
        super().__init__()
        self.config, self.group, size = config, group, config.hidden_size
        q_proj, k_proj, v_proj = (
            ClippedColumnParallelLinear(size, size, mcore_config, group, config.clips) for _ in range(3)
        )
        add_side_by_side(self, q_proj=q_proj, k_proj=k_proj, v_proj=v_proj)
        self.post = ClippedRowParallelLinear(size, size, mcore_config, group, config.clips)
        self.relative_k_proj = ColumnParallelLinear(size, size, mcore_config, group)
        scale = torch.nn.Parameter(torch.empty(config.head_dim, dtype=mcore_config.params_dtype))
        self.per_dim_scale = declare(scale, "vector", zeros, partial=True)

    def forward(self, x_TH: torch.Tensor, positions_CH: torch.Tensor, places: TokenPlaces) -> torch.Tensor:
        """Map [T, H] to the same shape."""
        dim, cap = self.config.head_dim, self.config.attention_logit_cap
        projected = clipped_column_parallel(x_TH, (self.q_proj, self.k_proj, self.v_proj), self.group)
        projected += column_parallel(positions_CH, (self.relative_k_proj,), self.group, False)
        q, k, v, relative = (tensor.float().unflatten(-1, (-1, dim)) for tensor in projected)
        q = q * (dim**-0.5 / math.log(2)) * softplus(self.per_dim_scale)
        attended_TND = chunked_attention(q, k * KEY_SCALE, v, relative, places.visible, cap)
        return self.post(attended_TND.flatten(1).to(x_TH.dtype))


class AudioFeedForward(torch.nn.Module):
    """A feed-forward layer with norms before and after it, added to its input with a factor."""

    def __init__(self, config: AudioConfig, mcore_config: TransformerConfig, group: Group) -> None:
        super().__init__()
        self.config, self.group, size = config, group, config.hidden_size
        self.pre_layer_norm, self.post_layer_norm = (_norm(config, NORM_EPS, mcore_config) for _ in range(2))
        self.ffw_layer_1 = ClippedColumnParallelLinear(size, 4 * size, mcore_config, group, config.clips)
        self.ffw_layer_2 = ClippedRowParallelLinear(4 * size, size, mcore_config, group, config.clips)

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Map [T, H] to the same shape."""
        normed = self.pre_layer_norm(limited(x_TH, self.config))
        (hidden,) = clipped_column_parallel(normed, (self.ffw_layer_1,), self.group)
        output = self.post_layer_norm(limited(self.ffw_layer_2(silu(hidden)), self.config))
        return torch.add(x_TH, output, alpha=self.config.residual_weight)


class DepthwiseConvolution(torch.nn.Module):
    """A causal convolution of each channel by itself; channels split over the tensor ranks."""

    def __init__(self, config: AudioConfig, dtype: torch.dtype, group: Group) -> None:
        super().__init__()
        weight = torch.empty(config.hidden_size // group.size(), 1, config.conv_kernel_size, dtype=dtype)
        self.weight = declare(torch.nn.Parameter(weight), "vector", normal, decay=True, tensor_dim=0)

    def forward(self, x_TH: torch.Tensor, places: TokenPlaces) -> torch.Tensor:
        """Map [T, H / tensor ranks] to the same shape; a clip begins after zeros."""
        channels, _, kernel_size = self.weight.shape
        at_input = places.spaced + kernel_size - 1
        spaced = x_TH.new_zeros(places.spaced_length + kernel_size - 1, channels).index_copy(0, at_input, x_TH)
        return conv1d(spaced.t(), self.weight, groups=channels).t()[places.spaced]


class ShardedRMSNorm(torch.nn.Module):
    """An RMS norm over channels that are split over the tensor ranks; each rank has its channels' weights."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, group: Group) -> None:
        super().__init__()
        self.size, self.eps, self.group = size, eps, group
        weight = torch.nn.Parameter(torch.empty(size // group.size(), dtype=dtype))
        self.weight = declare(weight, "vector", ones, tensor_dim=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [T, size / tensor ranks] to the same shape, computed in fp32."""
        wide = x.float()
        squares = wide.square().sum(-1, keepdim=True)
        # Every rank's values depend on the squares of all: they are summed, and so are the gradients of the sum.
        total = tensor_parallel.reduce_from_tensor_model_parallel_region(squares, group=self.group)
        total = tensor_parallel.copy_to_tensor_model_parallel_region(total, group=self.group)
        return (wide * torch.rsqrt(total / self.size + self.eps) * self.weight.float()).to(x.dtype)


class LightConvolution(torch.nn.Module):
    """A gated linear unit, a depthwise convolution and a linear layer; channels split over the tensor ranks.

    `linear_start` has the gated half of its outputs and the gates as two sections, so that a rank has both of a
    channel.
    """

    def __init__(self, config: AudioConfig, mcore_config: TransformerConfig, group: Group) -> None:
        super().__init__()
        self.config, self.group, size, dtype = config, group, config.hidden_size, mcore_config.params_dtype
        self.pre_layer_norm = _norm(config, config.norm_eps, mcore_config)
        self.linear_start = ClippedColumnParallelLinear(size, size, mcore_config, group, config.clips, sections=2)
        self.depthwise_conv1d = DepthwiseConvolution(config, dtype, group)
        self.conv_norm = ShardedRMSNorm(size, config.norm_eps, dtype, group)
        self.linear_end = ClippedRowParallelLinear(size, size, mcore_config, group, config.clips)

    def forward(self, x_TH: torch.Tensor, places: TokenPlaces) -> torch.Tensor:
        """Map [T, H] to the same shape."""
        (hidden,) = clipped_column_parallel(self.pre_layer_norm(x_TH), (self.linear_start,), self.group)
        hidden = limited(self.depthwise_conv1d(glu(hidden), places), self.config)
        return x_TH + self.linear_end(silu(self.conv_norm(hidden)))


class AudioLayer(torch.nn.Module):
    """Attention and a convolution between two feed-forward layers.

    Norms but that of the convolution act on unsharded activations, so they are replicated with full gradients.
    """

    def __init__(self, config: AudioConfig, mcore_config: TransformerConfig, group: Group) -> None:
        super().__init__()
        self.config = config
        self.feed_forward1, self.feed_forward2 = (AudioFeedForward(config, mcore_config, group) for _ in range(2))
        self.self_attn = AudioAttention(config, mcore_config, group)
        self.lconv1d = LightConvolution(config, mcore_config, group)
        self.norm_pre_attn, self.norm_post_attn, self.norm_out = (
            _norm(config, NORM_EPS, mcore_config) for _ in range(3)
        )

    def forward(self, x_TH: torch.Tensor, positions_CH: torch.Tensor, places: TokenPlaces) -> torch.Tensor:
        """Map [T, H] to the same shape."""
        x_TH = self.feed_forward1(x_TH)
        attended = self.self_attn(self.norm_pre_attn(limited(x_TH, self.config)), positions_CH, places)
        x_TH = norm_and_add(limited(attended, self.config), x_TH, self.norm_post_attn)
        x_TH = self.feed_forward2(self.lconv1d(x_TH, places))
        return self.norm_out(limited(x_TH, self.config))


def _norm(config: AudioConfig, eps: float, mcore_config: TransformerConfig) -> RMSNorm:
    return RMSNorm(config.hidden_size, eps, zero_centered=False, dtype=mcore_config.params_dtype)


class AudioTower(torch.nn.Module):
    """The conformer, whose heads, feed-forward columns and convolution channels are split over `group`.

    Sub-sampling, norms and the output's linear layer are replicated: they are about 1 % of the tower.

    Args:
        config: configuration of the tower.
        mcore_config: megatron-core settings without sequence parallelism.
        group: process group over which each layer is sharded.
        recompute: compute each layer again in the backward pass.
    """

    def __init__(self, config: AudioConfig, mcore_config: TransformerConfig, group: Group, recompute: bool) -> None:
        super().__init__()
        self.config, self.recompute, dtype = config, recompute, mcore_config.params_dtype
        self.subsample_conv_projection = Subsampling(config, dtype)
        self.layers = torch.nn.ModuleList(
            AudioLayer(config, mcore_config, group) for _ in range(config.num_hidden_layers)
        )
        self.output_proj = torch.nn.Linear(config.hidden_size, config.output_size, dtype=dtype)
        declare(self.output_proj.weight, "matrix", normal)
        declare(self.output_proj.bias, "vector", zeros)

    def forward(self, frames: torch.Tensor, lengths: Sequence[int]) -> tuple[torch.Tensor]:
        """Encode packed clips.

        Args:
            frames: [F, bins] fp32, the frames of all clips one after the other.
            lengths: number of frames of each clip, known on the host, at least one.

        Returns:
            Tokens of all clips in their order, [T, output size].
        """
        places = TokenPlaces.of([num_tokens(length) for length in lengths], self.config, frames.device)
        x_TH = self.subsample_conv_projection(frames, lengths)
        positions = position_table(self.config, frames.device).to(x_TH.dtype)
        for layer in self.layers:
            x_TH = run_layer(layer, x_TH, positions, places, recompute=self.recompute)
        return (self.output_proj(x_TH),)
