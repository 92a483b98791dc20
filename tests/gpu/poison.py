"""Memory that is no number before a kernel gets it: what a kernel does not write shows."""

from __future__ import annotations

import torch

LARGE_ELEMENTS, SMALL_ELEMENTS, NUM_SMALL = 1 << 27, 1 << 17, 128


def poison() -> None:
    """Fill memory of both of the allocator's pools, which it gives out next: small tensors have one of their own."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    blocks = [torch.full((LARGE_ELEMENTS,), torch.nan, device="cuda")]
    blocks += [torch.full((SMALL_ELEMENTS,), torch.nan, device="cuda") for _ in range(NUM_SMALL)]
    del blocks
