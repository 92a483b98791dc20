"""The one place that knows the device; everything else asks here."""

from megatron_vlm.platform.device import (
    HostCopy,
    Platform,
    current,
    has_transformer_engine,
    initialize,
)

__all__ = ["HostCopy", "Platform", "current", "has_transformer_engine", "initialize"]
