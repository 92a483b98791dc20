"""Tables of a family's weights: our names, their shapes, and where they are in Hugging Face files.

Within a group a weight's name ends alike on both sides; only the prefix differs, and Hugging Face files come with
several (`hf_prefixes`): the published files, a fresh `save_pretrained`, and the names that modules have in memory.

The values are the same on both sides, but not always the shapes. Ours may unflatten a file's dimension ([3h, h] there
is [3, h, h] here, where the second dimension is sharded), vocabulary rows are padded here, files may hold experts'
matrices transposed, and one tensor of a file may be several weights of ours (`PartOf`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

VOCABULARY_ROWS_MULTIPLE = 64

Table = Mapping[str, str | Mapping[str, str]]
"""Mapping of a suffix to dimensions, or of a file's tensor's suffix to a table of the weights that follow in it."""


@dataclass(frozen=True)
class PartOf:
    """The slice of a file's tensor that is one of our weights.

    Args:
        suffix: the end of the tensor's name in files.
        dim: the dimension that is cut; the same for all parts of a tensor.
        start: first index.
        stop: one past the last index; the next part starts there.
    """

    suffix: str
    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class Weight:
    """One of our weights.

    Args:
        suffix: the end of its name.
        shape: shape in Hugging Face files, or of the slice where the weight is a part of a tensor there.
        has_vocabulary_rows: whether its rows are the vocabulary, which our models pad.
        divided_shape: shape in our models, where it differs from `shape`.
        part_of: the slice of a file's tensor that the weight is; None for a tensor of its own.
    """

    suffix: str
    shape: tuple[int, ...]
    has_vocabulary_rows: bool = False
    divided_shape: tuple[int, ...] | None = None
    part_of: PartOf | None = None

    @property
    def hf_suffix(self) -> str:
        """End of the name of the file's tensor that holds the weight."""
        return self.suffix if self.part_of is None else self.part_of.suffix

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Shape in our models without padding."""
        return self.divided_shape or self.shape

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """Shape in our models: vocabulary rows are padded to a multiple of 64 in every layout."""
        if not self.has_vocabulary_rows:
            return self.own_shape
        rows = math.ceil(self.shape[0] / VOCABULARY_ROWS_MULTIPLE) * VOCABULARY_ROWS_MULTIPLE
        return (rows, *self.shape[1:])

    @property
    def transposed_shape(self) -> tuple[int, ...]:
        """Shape in files that hold its matrices transposed."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2])


def resolve(table: Table, sizes: Mapping[str, int], prefix: str = "") -> Iterator[Weight]:
    """Turn a table of names into weights.

    Args:
        table: the dimensions of each suffix, as numbers or words of `sizes`. Those in parentheses are one dimension in
            files: `(3 hidden) hidden` is [3h, h] there and [3, h, h] here. Where a table stands instead of dimensions,
            the suffix is that of a file's tensor, in which the rows of its weights follow each other.
        sizes: size of each word.
        prefix: prefix of every suffix.
    """
    for suffix, dimensions in table.items():
        if isinstance(dimensions, str):
            shape, divided_shape = _shapes(dimensions, sizes)
            yield Weight(prefix + suffix, shape, divided_shape=divided_shape)
            continue
        start = 0
        for part, part_dimensions in dimensions.items():
            shape, divided_shape = _shapes(part_dimensions, sizes)
            part_of = PartOf(prefix + suffix, 0, start, start + shape[0])
            yield Weight(prefix + part, shape, divided_shape=divided_shape, part_of=part_of)
            start = part_of.stop


def _shapes(dimensions: str, sizes: Mapping[str, int]) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Return the shape in files, and the shape in our models where it differs."""
    merged = [(many or one).split() for many, one in re.findall(r"\(([^)]*)\)|(\S+)", dimensions)]
    divided = [[int(word) if word.isdigit() else sizes[word] for word in words] for words in merged]
    shape = tuple(math.prod(each) for each in divided)
    divided_shape = tuple(size for each in divided for size in each)
    return shape, None if divided_shape == shape else divided_shape


@dataclass(frozen=True)
class WeightGroup:
    """Weights with common prefixes.

    Args:
        prefix: prefix of our names.
        hf_prefixes: prefixes of the names in Hugging Face files; an export without an example writes the first.
        weights: the group's weights, all parts of a file's tensor in their order; the first one determines which prefix
            a file uses.
        transposable: whether a file may hold the matrices of all these tensors transposed. Their shapes taken together
            determine it, because a single matrix may be square.
        written_transposed: whether an export without an example transposes them.
    """

    prefix: str
    hf_prefixes: tuple[str, ...]
    weights: tuple[Weight, ...]
    transposable: bool = False
    written_transposed: bool = False
