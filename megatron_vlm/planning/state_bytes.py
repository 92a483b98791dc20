"""Sizes of what is kept of a parameter beside its gradient."""

from __future__ import annotations

from megatron_vlm.config import Config

FP32_BYTES = 4
ADAM_MOMENT_BYTES = 2 * FP32_BYTES


def value_bytes(config: Config) -> int:
    """Return the bytes of one element of a parameter or an activation."""
    return FP32_BYTES if config.train.precision == "fp32" else 2


def optimizer_bytes(config: Config, trainable: int) -> int:
    """Return the bytes of main weights (none for fp32 parameters) and moments of parameters that a rank updates."""
    main_bytes = 0 if config.train.precision == "fp32" else FP32_BYTES
    moment_bytes = ADAM_MOMENT_BYTES if config.optimizer.name == "adamw" else 0
    return trainable * (main_bytes + moment_bytes)
