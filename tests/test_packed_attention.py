"""Packed attention against one dense masked softmax, in both of its forms.

Shapes: N heads, P packed patches, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

import vlm_kernels.packed_attention as module
from vlm_kernels.packed_attention import Segments, packed_attention, reference
from vlm_kernels.span_attention import flex as flex_form

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Segments, float], torch.Tensor]

LENGTHS = {
    "one": (24,),
    "equal": (12, 12, 12),
    "different": (24, 4, 60),
    "a video between images": (4, 24, 24, 8, 4, 24),
    "longer than a block": (140, 4, 300, 140),
}


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float) -> torch.Tensor:
    """The definition, by a mask of [P, P]."""
    segment = torch.repeat_interleave(torch.arange(len(segments.lengths)), torch.tensor(segments.lengths))
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(segment[:, None] != segment, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


def results(attention: Attention, lengths: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and the gradients of q, k and v, whose patches are not next to each other in memory, as in the tower."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn((sum(lengths), 3, 4, 16), generator=generator, dtype=torch.float64).to(dtype)
    packed.requires_grad_()
    q, k, v = packed.permute(1, 2, 0, 3)
    output = attention(q, k, v, Segments(lengths, packed.device), 0.3)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(dtype)
    (gradient,) = torch.autograd.grad((output * weights).sum(), packed)
    return [output.detach(), *gradient.unbind(1)]


@pytest.fixture
def flex(monkeypatch: pytest.MonkeyPatch) -> Iterator[Attention]:
    """The form for GPUs, not compiled, with the check of the device lifted."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex_form, "compiled", lambda: flex_attention)
    monkeypatch.setattr(module, "span_attention", flex_form.attend)
    yield module._on_gpu


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_reference_is_the_definition(lengths: tuple[int, ...]) -> None:
    for ours, theirs in zip(
        results(reference, lengths, torch.float64), results(dense, lengths, torch.float64), strict=True
    ):
        # float64 on both sides: sums of up to 300 terms in another order.
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_flex_attention_is_the_definition(flex: Attention, lengths: tuple[int, ...]) -> None:
    for ours, theirs in zip(results(flex, lengths, torch.float32), results(dense, lengths, torch.float32), strict=True):
        # fp32 on both sides, with sums of up to 300 terms in another order.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_block_masks_leave_out_other_segments() -> None:
    segments = Segments((256, 128, 512), torch.get_default_device())
    assert segments.spans is segments.spans, "one mask for all layers"
    # Blocks of 128: 4 + 1 + 16 of 49.
    assert segments.spans.block_mask(None).sparsity() == pytest.approx(100 * (1 - 21 / 49))


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


def test_nothing_grows_with_the_square_of_the_sequence() -> None:
    """Trap: a mask over all patches of a micro-batch has the square of their number."""
    lengths = (64,) * 64
    q = torch.zeros((1, sum(lengths), 4), requires_grad=True)
    with _Largest() as largest:
        packed_attention(q, q, q, Segments(lengths, q.device), 1.0).sum().backward()
    assert q.numel() <= largest.elements < sum(lengths) ** 2 / 32
