"""Sizes of what is kept of a parameter beside its gradient."""

from __future__ import annotations

from megatron_vlm.config import Config

FP32_BYTES = 4
_MOMENTS = {"adamw": 2, "sgd": 0, "muon": 2}  # muon: of what is not a matrix
_MUON_MOMENTS = 1


def value_bytes(config: Config) -> int:
    """Return the bytes of one element of a parameter or an activation."""
    return FP32_BYTES if config.train.precision == "fp32" else 2


def optimizer_bytes(config: Config, trainable: int, matrices: int) -> int:
    """Return the bytes of main weights (none for fp32 parameters) and moments of parameters that a rank updates.

    Args:
        config: the configuration.
        trainable: elements of the parameters.
        matrices: elements of those of kind `matrix` among them.
    """
    mains = 0 if config.train.precision == "fp32" else 1
    name = config.optimizer.name
    of_matrices = matrices * (_MUON_MOMENTS if name == "muon" else _MOMENTS[name])
    return FP32_BYTES * (trainable * mains + (trainable - matrices) * _MOMENTS[name] + of_matrices)
