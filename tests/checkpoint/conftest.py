"""What holds in every test of checkpoints and conversions."""

from __future__ import annotations

from types import TracebackType

import pytest

from megatron_vlm.progress import Progress


class ExactProgress(Progress):
    """Work that ends without an error has gone through exactly the bytes that were announced."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert error is not None or self.done_bytes == self.total_bytes, self.label
        super().__exit__(kind, error, trace)


@pytest.fixture(autouse=True)
def exact_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process; ranks of a test's own are others."""
    # Not above: pytest may read this file before the platform is initialised, and these import megatron-core.
    from megatron_vlm.conversion import convert, passthrough, running_model

    for module in (convert, passthrough, running_model):
        monkeypatch.setattr(module, "Progress", ExactProgress)
