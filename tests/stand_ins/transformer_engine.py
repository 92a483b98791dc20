"""A stand-in for NVIDIA Transformer Engine's attention: its names and rules, and plain softmax over each document.

Source: `DotProductAttention` in transformer_engine/pytorch/attention/dot_product_attention/dot_product_attention.py and
`check_set_window_size` in utils.py beside it, version 2.9.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from vlm_kernels.span_attention import transformer_engine as form


@dataclass
class Log:
    """The modules that were built, and for each call its keywords and the shape and dtype of queries."""

    built: list[dict[str, Any]] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)


def dot_product_attention(log: Log, fused: bool = True) -> type[torch.nn.Module]:
    """Return the class; one without fused kernels for anything refuses what is left then."""

    class DotProductAttention(torch.nn.Module):
        def __init__(
            self,
            num_attention_heads: int,
            kv_channels: int,
            num_gqa_groups: int | None = None,
            attention_dropout: float = 0.0,
            qkv_format: str = "sbhd",
            attn_mask_type: str = "causal",
            window_size: tuple[int, int] | None = None,
            sequence_parallel: bool = False,
            tp_size: int = 1,
            get_rng_state_tracker: Any = None,
            tp_group: Any = None,
            layer_number: int | None = None,
            attention_type: str = "self",
            cp_group: Any = None,
            cp_global_ranks: Any = None,
            cp_stream: Any = None,
            cp_comm_type: str = "p2p",
            softmax_scale: float | None = None,
            softmax_type: str = "vanilla",
            return_max_logit: bool | None = False,
        ) -> None:
            super().__init__()
            self.heads, self.channels, self.groups = num_attention_heads, kv_channels, num_gqa_groups
            self.scale = kv_channels**-0.5 if softmax_scale is None else softmax_scale
            assert not attention_dropout and tp_size == 1 and softmax_type == "vanilla"
            log.built.append({"heads": self.heads, "groups": self.groups, "channels": self.channels})

        def forward(
            self,
            query_layer: torch.Tensor,
            key_layer: torch.Tensor,
            value_layer: torch.Tensor,
            attention_mask: Any = None,
            qkv_format: str | None = None,
            cu_seqlens_q: torch.Tensor | None = None,
            cu_seqlens_kv: torch.Tensor | None = None,
            cu_seqlens_q_padded: torch.Tensor | None = None,
            cu_seqlens_kv_padded: torch.Tensor | None = None,
            max_seqlen_q: int | None = None,
            max_seqlen_kv: int | None = None,
            attn_mask_type: str | None = None,
            window_size: tuple[int, int] | None = None,
            checkpoint_core_attention: bool = False,
            core_attention_bias_type: str = "no_bias",
            core_attention_bias: Any = None,
            alibi_slopes: Any = None,
            fast_zero_fill: bool = True,
            inference_params: Any = None,
            pad_between_seqs: bool | None = None,
            fp8_output: bool | None = False,
        ) -> torch.Tensor:
            assert qkv_format == "thd" and attn_mask_type in ("padding", "padding_causal")
            assert query_layer.ndim == 3 and query_layer.shape[1:] == (self.heads, self.channels)
            assert key_layer.shape == value_layer.shape and key_layer.shape[1:] == (self.groups, self.channels)
            assert cu_seqlens_q is not None and cu_seqlens_q is cu_seqlens_kv and cu_seqlens_q.dtype == torch.int32
            before, behind = window_size or (-1, -1)
            # Other pairs are refused, or changed with a warning.
            assert behind == (0 if attn_mask_type == "padding_causal" else -1) and before >= -1
            lengths = cu_seqlens_q.diff().tolist()
            assert sum(lengths) == len(query_layer) == len(key_layer)
            # The host is never asked for the longest: that would wait for the device.
            assert max_seqlen_q == max_seqlen_kv and max_seqlen_q is not None and max_seqlen_q >= max(lengths)
            if not fused:
                assert os.environ["NVTE_UNFUSED_ATTN"] == "0", "dense scores would be made without a word"
                raise ValueError("No dot product attention backend is available for the provided inputs.")
            log.calls.append(
                {
                    "lengths": tuple(lengths),
                    "mask": attn_mask_type,
                    "window": (before, behind),
                    "shape": tuple(query_layer.shape),
                    "groups": self.groups,
                    "scale": self.scale,
                    "dtype": query_layer.dtype,
                }
            )
            parts = zip(*(tensor.split(lengths) for tensor in (query_layer, key_layer, value_layer)), strict=True)
            outputs = [self._attend(*part, before, behind) for part in parts]
            return torch.cat(outputs).reshape(len(query_layer), -1)

        def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, before: int, behind: int) -> torch.Tensor:
            """Attention of one document: query i sees the keys from i - before to i + behind, both included."""
            place = torch.arange(len(q))
            distance = place[None] - place[:, None]
            seen = torch.ones_like(distance, dtype=torch.bool)
            seen &= (distance >= -before) | (before < 0)
            seen &= (distance <= behind) | (behind < 0)
            k, v = (tensor.repeat_interleave(self.heads // self.groups, dim=1) for tensor in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) * self.scale
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            return torch.einsum("hqk,khd->qhd", weights, v)

    return DotProductAttention


@contextlib.contextmanager
def installed(fused: bool = True) -> Iterator[Log]:
    """Transformer Engine's attention can be imported, and computes on the host and in fp32 and fp64 too."""
    log = Log()
    package, pytorch = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    pytorch.DotProductAttention = dot_product_attention(log, fused)  # type: ignore[attr-defined]
    package.pytorch = pytorch  # type: ignore[attr-defined]
    modules = {"transformer_engine": package, "transformer_engine.pytorch": pytorch}
    caches = form.why_absent, form._attention
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.dict(os.environ),
        mock.patch.object(form, "DTYPES", (*form.DTYPES, torch.float32, torch.float64)),
    ):
        try:
            for function in caches:
                function.cache_clear()
            yield log
        finally:
            for function in caches:
                function.cache_clear()
