"""Random initial weights that do not depend on the layout."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
import torch.distributed


def initialize_weights(
    chunks: Iterable[torch.nn.Module],
    seed: int,
    std: float,
    vocab_size: int,
    group: torch.distributed.ProcessGroup,
) -> None:
    """Set every parameter from a generator of its own, by seed and name: every layout starts from the same model.

    Matrices are normal with deviation `std`; biases and zero-centred norms are zero; layer norms' weights are one;
    vocabulary padding is zero.

    Args:
        chunks: this rank's pipeline chunks.
        seed: of the run.
        std: `initializer_range` of the configuration.
        vocab_size: rows without padding.
        group: tensor ranks.
    """
    for chunk in chunks:
        layer_norms = {id(m.weight) for m in chunk.modules() if isinstance(m, torch.nn.LayerNorm)}
        for name, parameter in chunk.named_parameters():
            with torch.no_grad():
                if parameter.dim() >= 2:
                    whole = _normal(name, parameter, seed, std, group)
                    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                        whole[vocab_size:] = 0
                    parameter.copy_(_own_part(whole, parameter, group))
                else:
                    parameter.fill_(1.0 if id(parameter) in layer_norms else 0.0)


def _normal(
    name: str, parameter: torch.nn.Parameter, seed: int, std: float, group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= group.size()
    # On the host, whose generator gives the same numbers on every machine, and takes 32 bits of seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def _own_part(
    whole: torch.Tensor, parameter: torch.nn.Parameter, group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    size = parameter.shape[parameter.partition_dim]
    return whole.narrow(parameter.partition_dim, group.rank() * size, size)
