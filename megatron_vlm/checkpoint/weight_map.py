"""Names of a family's weights on both sides: in Hugging Face files and in our models and checkpoints.

A family's `weights.py` is a table of `WeightGroup`s. Within a group a weight has the same last part of its name on
both sides; only the prefix differs, and Hugging Face files come with several (`hf_prefixes`): the published files, a
fresh `save_pretrained`, and the names that modules have in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_vlm.checkpoint.hf import SafetensorsReader
from megatron_vlm.errors import CheckpointError

VOCABULARY_ROWS_MULTIPLE = 64
NAMES_SHOWN = 4


@dataclass(frozen=True)
class Weight:
    """One tensor: the end of its name, its shape in Hugging Face files, and whether its rows are the vocabulary."""

    suffix: str
    shape: tuple[int, ...]
    has_vocabulary_rows: bool = False

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """Shape in our models: vocabulary rows are padded to a multiple of 64 in every layout."""
        if not self.has_vocabulary_rows:
            return self.shape
        rows = math.ceil(self.shape[0] / VOCABULARY_ROWS_MULTIPLE) * VOCABULARY_ROWS_MULTIPLE
        return (rows, *self.shape[1:])


@dataclass(frozen=True)
class WeightGroup:
    """Weights that share their prefixes.

    Args:
        prefix: of our names.
        hf_prefixes: of the names in Hugging Face files; an export without an example writes the first.
        weights: the group's tensors; the first one tells which prefix a file uses.
    """

    prefix: str
    hf_prefixes: tuple[str, ...]
    weights: tuple[Weight, ...]


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class WeightMap:
    """All weights of one model.

    Args:
        groups: every tensor exactly once.
        tied_groups: groups whose tensors, where a file has them, must repeat another weight: (group, our name of it).
        unread_hf_prefixes: parts of a multimodal file that a text-only model leaves alone.
        text_only_class: (architecture, model_type) of the language model alone, for `config.json`.
    """

    groups: tuple[WeightGroup, ...]
    tied_groups: tuple[tuple[WeightGroup, str], ...] = ()
    unread_hf_prefixes: tuple[str, ...] = ()
    text_only_class: tuple[str, str] | None = None

    def items(self) -> Iterator[tuple[str, Weight]]:
        """Yield (our name, weight) in the order of the model."""
        for group in self.groups:
            for weight in group.weights:
                yield group.prefix + weight.suffix, weight

    def hf_names(self) -> dict[str, str]:
        """Our name for each Hugging Face name, in the names that an export writes without an example."""
        return {
            group.hf_prefixes[0] + weight.suffix: group.prefix + weight.suffix
            for group in self.groups
            for weight in group.weights
        }

    def match(self, reader: SafetensorsReader) -> dict[str, str]:
        """Find every weight in a Hugging Face directory.

        Args:
            reader: the directory's weights.

        Returns:
            Our name for each of the file's names, tied copies included; unread parts are left out.

        Raises:
            CheckpointError: lists all missing, unexpected and wrongly shaped tensors together.
        """
        expected: dict[str, tuple[str, Weight]] = {}
        for group in self.groups:
            prefix = _used_prefix(group, reader.tensors)
            expected |= {prefix + weight.suffix: (group.prefix + weight.suffix, weight) for weight in group.weights}
        for group, source in self.tied_groups:
            prefix = _used_prefix(group, reader.tensors)
            copies = {prefix + weight.suffix: (source, weight) for weight in group.weights}
            expected |= {name: entry for name, entry in copies.items() if name in reader.tensors}
        read = {name for name in reader.tensors if not name.startswith(self.unread_hf_prefixes)}
        _refuse_differences(
            {name: weight.shape for name, (_, weight) in expected.items()},
            {name: reader.tensors[name] for name in sorted(read)},
            str(reader.directory),
        )
        return {name: ours for name, (ours, _) in expected.items()}

    def check_stored(self, stored: Mapping[str, _Shaped], where: str) -> None:
        """Compare with the tensors of a distributed checkpoint, which may hold more (the optimizer's state).

        Raises:
            CheckpointError: lists all missing and wrongly shaped tensors together, and surplus ones of the same parts.
        """
        parts = tuple({group.prefix.split(".")[0] + "." for group in self.groups})
        relevant = {name: tensor for name, tensor in stored.items() if name.startswith(parts)}
        _refuse_differences({name: weight.padded_shape for name, weight in self.items()}, relevant, where)


def _used_prefix(group: WeightGroup, names: Mapping[str, object]) -> str:
    used = (prefix for prefix in group.hf_prefixes if prefix + group.weights[0].suffix in names)
    return next(used, group.hf_prefixes[0])


def _refuse_differences(expected: Mapping[str, Sequence[int]], actual: Mapping[str, _Shaped], where: str) -> None:
    missing = [name for name in expected if name not in actual]
    unexpected = [name for name in actual if name not in expected]
    misshapen = [
        f"{name} {list(actual[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in actual and tuple(actual[name].shape) != tuple(shape)
    ]
    found = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
    problems = [f"{len(names)} {kind} ({_abbreviate(names)})" for kind, names in found if names]
    if problems:
        raise CheckpointError(
            f"the weights do not fit the model that config.json describes: {', '.join(problems)}",
            where,
            "use the config.json that belongs to these weights",
        )


def _abbreviate(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"
