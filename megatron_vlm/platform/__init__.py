"""The one place that knows the device; everything else asks here."""

from megatron_vlm.platform.device import HostCopy, Platform, current, initialize, select_adam

__all__ = ["HostCopy", "Platform", "current", "initialize", "select_adam"]
