"""Gemma 4's audio encoders as frozen configurations, read from transformers' configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from transformers import Gemma4AudioConfig, Gemma4UnifiedAudioConfig

from megatron_vlm.model_configs import AudioEncoderConfig, Narrowed, require

_require = partial(require, model="Gemma 4")
# The feature extractor cuts a clip of 16 kHz off past 30 seconds, and the tower makes a token of 40 milliseconds; those
# of unified models keep all of any clip.
MOST_AUDIO_SAMPLES = 30 * 16_000
MOST_TOKENS = 30 * 25


@dataclass(frozen=True)
class AudioConfig(AudioEncoderConfig):
    """The audio tower.

    Attributes:
        subsampling_channels: output channels of the two convolutions over frames and bins.
        conv_kernel_size: tokens that the depthwise convolution sees, the last of which is its own.
        residual_weight: factor on the output of both feed-forward layers.
        chunk_size: tokens of a chunk, and tokens that a token attends to, itself included.
        attention_logit_cap: attention scores are squeezed into (-cap, cap).
        clips: whether linear layers clip their inputs and outputs.
        activation_limit: bound on the absolute values of activations in a few places.
        output_size: width of the output.
        norm_eps: eps of the norms around convolutions and before the projector.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    subsampling_channels: tuple[int, int]
    conv_kernel_size: int
    residual_weight: float
    chunk_size: int
    attention_logit_cap: float
    clips: bool
    activation_limit: float
    output_size: int
    norm_eps: float

    @property
    def frame_size(self) -> int:
        """Number of values in a frame."""
        return self.num_bins

    @property
    def frames_per_token(self) -> int:
        """Frames that one token stands for."""
        return 4

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest clip."""
        return MOST_TOKENS

    @property
    def sharded_sizes(self) -> Mapping[str, int]:
        """Sizes that are split over the tensor ranks."""
        return {"audio attention heads": self.num_attention_heads, "audio hidden size": self.hidden_size}

    @property
    def num_bins(self) -> int:
        """Number of values in a frame; transformers derives it from the first convolution's channels."""
        return self.subsampling_channels[0]

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.hidden_size // self.num_attention_heads


def audio_config_from_hf(hf: Narrowed) -> AudioConfig | RawAudioConfig:
    """Read a `Gemma4AudioConfig` or a `Gemma4UnifiedAudioConfig`.

    Raises:
        ConfigError: the configuration asks for something these modules do not compute.
    """
    if isinstance(hf, Gemma4UnifiedAudioConfig):
        return RawAudioConfig(hf.audio_embed_dim, hf.rms_norm_eps)
    _require(isinstance(hf, Gemma4AudioConfig), f"an audio tower of type {hf.model_type!r}")
    chunk, left, right = hf.attention_chunk_size, hf.attention_context_left, hf.attention_context_right
    channels, size, heads = tuple(hf.subsampling_conv_channels), hf.hidden_size, hf.num_attention_heads
    cap, masked = hf.attention_logit_cap, hf.attention_invalid_logits_value
    _require(hf.hidden_act == "silu", f"audio hidden_act {hf.hidden_act!r}")
    _require(right == 0, f"audio attention_context_right {right}")
    # With another number, transformers misaligns the relative positions.
    _require(chunk == left - 1, f"audio attention_chunk_size {chunk} with attention_context_left {left}")
    # exp(-200) is zero in fp32: then a masked key has no weight.
    _require(masked <= -cap - 200, f"audio attention_invalid_logits_value {masked}")
    _require(len(channels) == 2 and channels[0] % 4 == 0, f"audio subsampling_conv_channels {channels}")
    _require(heads > 0 and size % heads == 0, f"audio hidden_size {size} with num_attention_heads {heads}")
    _require(size % 2 == 0, f"audio hidden_size {size}, an odd number,")
    return AudioConfig(
        hidden_size=size,
        num_hidden_layers=hf.num_hidden_layers,
        num_attention_heads=heads,
        subsampling_channels=channels,
        conv_kernel_size=hf.conv_kernel_size,
        residual_weight=hf.residual_weight,
        chunk_size=chunk,
        attention_logit_cap=cap,
        clips=hf.use_clipped_linears,
        activation_limit=hf.gradient_clipping,
        output_size=hf.output_proj_dims,
        norm_eps=hf.rms_norm_eps,
    )


def num_tokens(num_frames: int) -> int:
    """Return the number of tokens of a clip: each convolution halves its length, rounded up."""
    return halved_length(halved_length(num_frames))


def halved_length(length: int) -> int:
    """Return the length after one convolution of stride two."""
    return (length + 1) // 2


@dataclass(frozen=True)
class RawAudioConfig(AudioEncoderConfig):
    """What 12B has in place of a tower: samples of a frame are projected as they are.

    Attributes:
        output_size: samples of a frame, each of which becomes a token.
        norm_eps: eps of the projector's norm.
    """

    output_size: int
    norm_eps: float

    @property
    def frame_size(self) -> int:
        """Number of values in a frame."""
        return self.output_size

    @property
    def frames_per_token(self) -> int:
        """Frames that one token stands for."""
        return 1

    @property
    def most_tokens(self) -> None:
        """Tokens of the longest clip: a processor of raw samples cuts nothing off."""
        return None

    @property
    def sharded_sizes(self) -> Mapping[str, int]:
        """Sizes that are split over the tensor ranks: those of the projector alone."""
        return {}
