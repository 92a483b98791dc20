"""Random initial weights that do not depend on the layout."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlm.layers.embedding import TokenEmbedding
from megatron_vlm.layers.norm import RMSNorm
from megatron_vlm.parallel.sharding import is_expert, own_part, whole_shape


def initialize_weights(
    chunks: Iterable[torch.nn.Module], seed: int, std: float, vocab_size: int, groups: ProcessGroupCollection
) -> None:
    """Set every parameter from a generator of its own, by seed and name: every layout starts from the same model.

    Matrices are normal with deviation `std`; biases and zero-centred norms are zero; other norms' weights are one;
    vocabulary padding and the embedding of the padding token are zero.

    Args:
        chunks: this rank's pipeline chunks.
        seed: of the run.
        std: `initializer_range` of the configuration.
        vocab_size: rows without padding.
        groups: process groups.
    """
    for chunk in chunks:
        padding_ids = {id(module.weight): [module.padding_id] for module in chunk.modules() if _has_padding_id(module)}
        ones = {id(module.weight) for module in chunk.modules() if _starts_at_one(module)}
        for name, parameter in chunk.named_parameters():
            with torch.no_grad():
                if id(parameter) in ones:
                    parameter.fill_(1.0)
                elif parameter.dim() == 1 or name.endswith(".bias"):
                    parameter.zero_()
                elif is_expert(parameter):
                    _fill_experts(name, parameter, seed, std, groups)
                else:
                    whole = _normal(name, whole_shape(parameter, groups), seed, std)
                    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                        whole[vocab_size:] = 0
                        whole[padding_ids.get(id(parameter), [])] = 0
                    parameter.copy_(own_part(whole, parameter, groups))


def _has_padding_id(module: torch.nn.Module) -> bool:
    return isinstance(module, TokenEmbedding) and module.padding_id is not None


def _starts_at_one(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.LayerNorm) or (isinstance(module, RMSNorm) and not module.zero_centered)


def _fill_experts(
    name: str, parameter: torch.nn.Parameter, seed: int, std: float, groups: ProcessGroupCollection
) -> None:
    """One expert at a time: all of them together may be larger than the host's memory."""
    first = groups.ep.rank() * parameter.shape[0]
    expert_shape = whole_shape(parameter, groups)[1:]
    for place in range(parameter.shape[0]):
        whole = _normal(f"{name} {first + place}", (1, *expert_shape), seed, std)
        parameter[place].copy_(own_part(whole, parameter, groups, first_dim=1)[0])


def _normal(name: str, shape: Sequence[int], seed: int, std: float) -> torch.Tensor:
    # On the host, whose generator gives the same numbers on every machine, and takes 32 bits of seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.empty(shape).normal_(0.0, std, generator=generator)
