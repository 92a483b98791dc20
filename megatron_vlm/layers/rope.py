"""Rotary position embedding, half-split ("neox") over the whole head dimension.

Shapes: S sequence, B batch, N heads, D head dim.
"""

from __future__ import annotations

import torch


def rope_table(
    positions_BS: torch.Tensor, head_dim: int, theta: float, scaling_factor: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotation angles, computed in fp32.

    Args:
        positions_BS: token positions.
        head_dim: D.
        theta: base of the geometric series of frequencies.
        scaling_factor: linear scaling: frequencies are divided by it.
        dtype: of the result.

    Returns:
        Two tensors [S, B, 1, D].

    Source: "default" and "linear" of transformers' modeling_rope_utils.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BS.device) / head_dim
    frequencies = 1.0 / theta**exponents / scaling_factor
    angles = positions_BS.t().float()[..., None] * frequencies
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def mrope_table(
    positions_ABS: torch.Tensor, head_dim: int, theta: float, sections: tuple[int, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines where each frequency turns with one of several position axes, interleaved.

    Frequency i belongs to axis a = i % axes while i < axes * sections[a], and to axis 0 otherwise: with sections
    (24, 20, 20) the axes take turns up to frequency 59, and 60 to 63 belong to axis 0.

    Args:
        positions_ABS: positions on each axis (time, height, width).
        head_dim: D.
        theta: base of the geometric series of frequencies.
        sections: frequencies of each axis.
        dtype: of the result.

    Returns:
        Two tensors [S, B, 1, D].

    Source: `recomposition_frequencies` in transformers' Qwen3-VL; megatron-core has the older, contiguous kind.
    """
    num_axes, num_frequencies, device = len(sections), head_dim // 2, positions_ABS.device
    place = torch.arange(num_frequencies, device=device)
    axis = torch.zeros_like(place)
    for number, section in enumerate(sections[1:], start=1):
        axis[number : num_axes * section : num_axes] = number
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = positions_ABS.permute(2, 1, 0).float()[..., axis] * frequencies
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x_SBND: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate pairs (i, i + D/2) of the last dimension by the table's angles."""
    cosine, sine = table
    first, second = x_SBND.chunk(2, dim=-1)
    return x_SBND * cosine + torch.cat((-second, first), dim=-1) * sine
