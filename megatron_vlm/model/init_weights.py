"""Random initial weights that do not depend on the layout."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlm.parallel.parameters import Initial, spec_of
from megatron_vlm.parallel.sharding import full_shape, own_part


@torch.no_grad()
def initialize_weights(
    chunks: Iterable[torch.nn.Module], seed: int, std: float, groups: ProcessGroupCollection
) -> None:
    """Initialise every parameter as declared, so that every layout starts from the same model.

    Each parameter has a random generator of its own, seeded by the run's seed and the parameter's name.

    Args:
        chunks: this rank's pipeline chunks.
        seed: seed of the run.
        std: standard deviation of random values (`initializer_range` of the configuration).
        groups: process groups.
    """
    for name, parameter in (named for chunk in chunks for named in chunk.named_parameters()):
        spec, shape = spec_of(parameter, name), full_shape(parameter, groups)
        if not spec.is_expert:
            parameter.copy_(own_part(_whole(name, shape, spec.initial, seed, std), parameter, groups))
            continue
        # One expert at a time: all of them together may be larger than the host's memory.
        first = groups.ep.rank() * parameter.shape[0]
        for index, expert in enumerate(parameter):
            whole = _whole(f"{name} {first + index}", (1, *shape[1:]), spec.initial, seed, std)
            expert.copy_(own_part(whole, parameter, groups, first_dim=1)[0])


def _whole(name: str, shape: Sequence[int], initial: Initial, seed: int, std: float) -> torch.Tensor:
    # Values are drawn on the host, whose generator is the same on every machine, and takes 32 bits of seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    whole = torch.empty(shape)
    initial(whole, std, generator)
    return whole
