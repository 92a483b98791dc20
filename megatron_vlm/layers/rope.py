"""Tables of rotary position embedding: the angles by which `vlm_kernels.rope` rotates queries and keys.

Shapes: S sequence, B batch, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vlm_kernels.rope import RopeTable


def rope_table(
    positions_BS: torch.Tensor,
    head_dim: int,
    theta: float,
    scaling_factor: float,
    dtype: torch.dtype,
    num_angles: int | None = None,
) -> RopeTable:
    """Return cosines and sines of the rotation angles, computed in fp32.

    Args:
        positions_BS: token positions.
        head_dim: D.
        theta: base of the geometric series of frequencies.
        scaling_factor: divisor of the frequencies (linear scaling).
        dtype: dtype of the result.
        num_angles: number of pairs that rotate, the fastest; the others stay ("proportional"). None for all.

    Returns:
        Two tensors [S, B, D / 2].

    Source: "default", "linear" and "proportional" in transformers' modeling_rope_utils.
    """
    frequencies = geometric_frequencies(head_dim, theta, positions_BS.device) / scaling_factor
    if num_angles is not None:
        frequencies[num_angles:] = 0
    return _table(positions_BS.t().float()[..., None] * frequencies, dtype)


@dataclass(frozen=True)
class YarnScaling:
    """How YaRN stretches positions: low frequencies are divided by `factor`, high ones stay, with a ramp in between.

    Attributes:
        factor: ratio of the longest sequence to `original_length`.
        original_length: tokens of the sequences that the unscaled frequencies were trained on.
        beta_fast: frequencies that rotate more often than this in `original_length` tokens stay.
        beta_slow: frequencies that rotate less often than this are divided by `factor`.
        mscale: numerator of the scale of cosines and sines, together with `mscale_all_dim`.
        mscale_all_dim: see `mscale`.
        attention_factor: the scale of cosines and sines itself, where it is given.
        truncate: whether the ramp begins and ends at integer frequency indices.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def scale(self) -> float:
        """Factor on cosines and sines."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    def ramp(self, head_dim: int, theta: float) -> tuple[float, float]:
        """Return the indices of the frequencies between which stretching sets in."""
        first, last = (
            head_dim * math.log(self.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))
            for rotations in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        return first, last + 0.001 if first == last else last

    def _mscale(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


def yarn_table(
    positions_BS: torch.Tensor, head_dim: int, theta: float, yarn: YarnScaling, dtype: torch.dtype
) -> RopeTable:
    """Return what `rope_table` does, with frequencies stretched by YaRN.

    Source: `_compute_yarn_parameters` of transformers' modeling_rope_utils; arXiv 2309.00071.
    """
    frequencies = geometric_frequencies(head_dim, theta, positions_BS.device)
    first, last = yarn.ramp(head_dim, theta)
    indices = torch.arange(head_dim // 2, dtype=torch.float32, device=positions_BS.device)
    stretched = ((indices - first) / (last - first)).clamp(0, 1)
    frequencies = frequencies * (stretched / yarn.factor + 1 - stretched)
    return _table(positions_BS.t().float()[..., None] * frequencies, dtype, yarn.scale)


def geometric_frequencies(head_dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """Return the geometric series of D / 2 frequencies."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)


def _table(angles: torch.Tensor, dtype: torch.dtype, scale: float = 1.0) -> RopeTable:
    """Return cosines and sines [S, B, D / 2] of angles of that shape."""
    angles = angles.contiguous()  # once here, as the kernel of every layer needs it
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def mrope_table(
    positions_ABS: torch.Tensor, head_dim: int, theta: float, sections: tuple[int, ...], dtype: torch.dtype
) -> RopeTable:
    """Return cosines and sines where each frequency rotates with one of several position axes, interleaved.

    Frequency i belongs to axis a = i % axes while i < axes * sections[a], and to axis 0 otherwise: with sections
    (24, 20, 20) the axes alternate up to frequency 59, and 60 to 63 belong to axis 0.

    Args:
        positions_ABS: positions on each axis (time, height, width).
        head_dim: D.
        theta: base of the geometric series of frequencies.
        sections: number of frequencies of each axis.
        dtype: dtype of the result.

    Returns:
        Two tensors [S, B, D / 2].

    Source: `recomposition_frequencies` in transformers' Qwen3-VL; megatron-core has the older, contiguous kind.
    """
    num_axes, num_frequencies, device = len(sections), head_dim // 2, positions_ABS.device
    index = torch.arange(num_frequencies, device=device)
    axis = torch.zeros_like(index)
    for number, section in enumerate(sections[1:], start=1):
        axis[number : num_axes * section : num_axes] = number
    frequencies = geometric_frequencies(head_dim, theta, device)
    return _table(positions_ABS.permute(2, 1, 0).float()[..., axis] * frequencies, dtype)
