"""Which parameters train: all but those that `model.freeze` names."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Collection, Iterable, Iterator

import torch

from megatron_vlm.config import PART_NAMES
from megatron_vlm.errors import ConfigError
from megatron_vlm.model.model_chunk import ModelChunk

_SHOWN_NAMES = 3


def part_of(name: str) -> str:
    """Return the part of the model that a parameter belongs to: `language_model`, `vision_tower`, `projector`, ..."""
    return name.partition(".")[0]


class Trainable:
    """The interpretation of `model.freeze`, in one place.

    An entry is a part, or a pattern of parameter names as in a shell, in which `*` also stands for dots:
    `language_model.layers.[0-9].*` are the first ten layers.

    Args:
        freeze: the entries of `model.freeze`.
        buffers: names of the parameters that never train (`WeightMap.buffers`), where names are asked about; modules
            know their own.
    """

    def __init__(self, freeze: Iterable[str], buffers: Collection[str] = ()) -> None:
        self.entries, self._buffers = tuple(freeze), frozenset(buffers)
        self._patterns = {
            entry: re.compile(fnmatch.translate(f"{entry}.*" if entry in PART_NAMES else entry))
            for entry in self.entries
        }

    def trains(self, name: str) -> bool:
        """Return whether a parameter trains."""
        return name not in self._buffers and not any(pattern.match(name) for pattern in self._patterns.values())

    def freeze(self, chunks: Iterable[torch.nn.Module]) -> None:
        """Switch off gradients of parameters that do not train."""
        chunks = list(chunks)
        for chunk in chunks:
            if isinstance(chunk, ModelChunk):
                chunk.tower_trains = "vision_tower" not in self.entries
        for name, parameter in (named for chunk in chunks for named in chunk.named_parameters()):
            if not self.trains(name):
                parameter.requires_grad_(False)

    def problems(self, names: Iterable[str]) -> Iterator[ConfigError]:
        """Yield the errors in the entries for a model with parameters of these names."""
        names = list(names)
        parts = sorted({part_of(name) for name in names})
        # Names of layers and experts differ only in their indices.
        patterns = sorted({re.sub(r"\.\d+(?=\.)", ".*", name) for name in names})
        for entry, pattern in self._patterns.items():
            if not any(pattern.match(name) for name in names):
                nearest = difflib.get_close_matches(entry, parts + patterns, _SHOWN_NAMES, cutoff=0)
                yield ConfigError(
                    f"model.freeze names {entry or '(nothing)'}, which the model does not have",
                    fix=f"this model has {', '.join(parts)}; the nearest names are {', '.join(nearest)}",
                )
        if names and not any(map(self.trains, names)):
            yield ConfigError("model.freeze leaves nothing to train", fix=f"this model has {', '.join(parts)}")
