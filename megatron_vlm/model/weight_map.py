"""Names of a family's weights on both sides: in Hugging Face files and in our models and checkpoints.

A family's `weights.py` is a table of `WeightGroup`s. Within a group a weight has the same last part of its name on
both sides; only the prefix differs, and Hugging Face files come with several (`hf_prefixes`): the published files, a
fresh `save_pretrained`, and the names that modules have in memory.

The values are the same on both sides, but not always the shapes. Ours may divide a file's dimension ([3h, h] there is
[3, h, h] here, where ranks share the second dimension), vocabulary rows are padded here, and files may hold experts'
matrices transposed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from megatron_vlm.checkpoint.hf import SafetensorsReader
from megatron_vlm.errors import CheckpointError

VOCABULARY_ROWS_MULTIPLE = 64
NAMES_SHOWN = 4
VALUE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Weight:
    """One tensor.

    Args:
        suffix: the end of its name.
        shape: in Hugging Face files.
        has_vocabulary_rows: its rows are the vocabulary, which our models pad.
        divided_shape: in our models, where that is another one.
    """

    suffix: str
    shape: tuple[int, ...]
    has_vocabulary_rows: bool = False
    divided_shape: tuple[int, ...] | None = None

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


def resolve(table: Mapping[str, str], sizes: Mapping[str, int], prefix: str = "") -> Iterator[Weight]:
    """Turn a table of names into weights.

    Args:
        table: the dimensions of each suffix, as numbers or words of `sizes`. Those in parentheses are a single one in
            files: `(3 hidden) hidden` is [3h, h] there and [3, h, h] here.
        sizes: numbers for the words.
        prefix: before every suffix.
    """
    for suffix, dimensions in table.items():
        merged = [(many or one).split() for many, one in re.findall(r"\(([^)]*)\)|(\S+)", dimensions)]
        divided = [[int(word) if word.isdigit() else sizes[word] for word in words] for words in merged]
        shape = tuple(math.prod(each) for each in divided)
        divided_shape = tuple(size for each in divided for size in each)
        yield Weight(prefix + suffix, shape, divided_shape=None if divided_shape == shape else divided_shape)


@dataclass(frozen=True)
class WeightGroup:
    """Weights that share their prefixes.

    Args:
        prefix: of our names.
        hf_prefixes: of the names in Hugging Face files; an export without an example writes the first.
        weights: the group's tensors; the first one tells which prefix a file uses.
        transposable: a file may hold the matrices of all these tensors transposed. Their shapes tell, all together: a
            single one may be square.
        written_transposed: an export without an example transposes them.
    """

    prefix: str
    hf_prefixes: tuple[str, ...]
    weights: tuple[Weight, ...]
    transposable: bool = False
    written_transposed: bool = False


@dataclass(frozen=True)
class HfWeight:
    """A weight in a Hugging Face file: its names there and here, and whether its matrices are transposed there."""

    hf_name: str
    name: str
    weight: Weight
    is_transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """In the file."""
        return self.weight.transposed_shape if self.is_transposed else self.weight.shape

    def file_row(self, row: int) -> int:
        """Where a row of our tensor begins in the file's."""
        return row * self.shape[0] // self.weight.own_shape[0] if self.shape else row

    def from_file(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the file in our shape; a view, unless they are transposed."""
        rows = _transpose(rows) if self.is_transposed else rows
        return rows.view(-1, *self.weight.own_shape[1:]) if self.shape else rows

    def to_file(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of ours in the file's shape; a view, unless they are transposed."""
        rows = rows.view(-1, *self.weight.shape[1:]) if self.shape else rows
        return _transpose(rows) if self.is_transposed else rows


def _transpose(matrices: torch.Tensor) -> torch.Tensor:
    """Each in memory of the result, one at a time: torch copies a single transposed matrix three times as fast."""
    result = matrices.new_empty(matrices.transpose(-2, -1).shape)
    for target, matrix in zip(result, matrices, strict=True):
        target.copy_(matrix.t())
    return result


@dataclass(frozen=True)
class WeightMap:
    """All weights of one model.

    Args:
        groups: every tensor exactly once.
        tied_groups: groups whose tensors, where a file has them, must repeat another weight: (group, our name of it).
        unread_hf_prefixes: parts of a multimodal file that a text-only model leaves alone.
        text_only_class: (architecture, model_type) of the language model alone, for `config.json`.
        text_only_settings: what its `config.json` says otherwise than the text part of a multimodal one.
    """

    groups: tuple[WeightGroup, ...]
    tied_groups: tuple[tuple[WeightGroup, str], ...] = ()
    unread_hf_prefixes: tuple[str, ...] = ()
    text_only_class: tuple[str, str] | None = None
    text_only_settings: Mapping[str, object] = field(default_factory=dict)

    def items(self) -> Iterator[tuple[str, Weight]]:
        """Yield (our name, weight) in the order of the model."""
        for group in self.groups:
            for weight in group.weights:
                yield group.prefix + weight.suffix, weight

    def as_written(self) -> dict[str, HfWeight]:
        """Every weight as an export writes it without an example, by its name there."""
        weights: dict[str, HfWeight] = {}
        for group in self.groups:
            weights |= _in_file(group, group.hf_prefixes[0], group.written_transposed)
        return weights

    def match(self, reader: SafetensorsReader) -> dict[str, HfWeight]:
        """Find every weight in a Hugging Face directory.

        Args:
            reader: the directory's weights.

        Returns:
            Each weight by its name in the file, tied copies included; unread parts are left out.

        Raises:
            CheckpointError: lists all missing, unexpected and wrongly shaped tensors together; or there are quantised
                weights; or experts are held in another way than in either of the two that are read.
        """
        expected: dict[str, HfWeight] = {}
        for group in self.groups:
            prefix = _used_prefix(group, reader.tensors)
            expected |= _in_file(group, prefix, group.transposable and _is_transposed(group, prefix, reader))
        for group, source in self.tied_groups:
            copies = _in_file(group, _used_prefix(group, reader.tensors), False)
            expected |= {name: replace(copy, name=source) for name, copy in copies.items() if name in reader.tensors}
        _refuse_quantized(reader, expected)
        read = {name for name in reader.tensors if not name.startswith(self.unread_hf_prefixes)}
        _refuse_differences(
            {name: weight.shape for name, weight in expected.items()},
            {name: reader.tensors[name].shape for name in sorted(read)},
            str(reader.directory),
            "use the config.json that belongs to these weights",
        )
        return expected

    def check_stored(self, stored: Mapping[str, Sequence[int]], where: str) -> None:
        """Compare with the shapes in a distributed checkpoint, which may hold more (the optimizer's state).

        Raises:
            CheckpointError: lists all missing and wrongly shaped tensors together, and surplus ones of the same parts.
        """
        parts = tuple({group.prefix.split(".")[0] + "." for group in self.groups})
        relevant = {name: shape for name, shape in stored.items() if name.startswith(parts)}
        _refuse_differences(
            {name: weight.padded_shape for name, weight in self.items()},
            relevant,
            where,
            "use the model.hf_path (tools/convert.py: --hf) that the checkpoint was made from",
        )


def _in_file(group: WeightGroup, prefix: str, is_transposed: bool) -> dict[str, HfWeight]:
    return {
        prefix + weight.suffix: HfWeight(prefix + weight.suffix, group.prefix + weight.suffix, weight, is_transposed)
        for weight in group.weights
    }


def _used_prefix(group: WeightGroup, names: Mapping[str, object]) -> str:
    if group.transposable:  # also when all its names are others
        used = (prefix for prefix in group.hf_prefixes if any(name.startswith(prefix) for name in names))
    else:
        used = (prefix for prefix in group.hf_prefixes if prefix + group.weights[0].suffix in names)
    return next(used, group.hf_prefixes[0])


def _is_transposed(group: WeightGroup, prefix: str, reader: SafetensorsReader) -> bool:
    """In which of its two layouts a file holds a transposable group; what is missing is reported elsewhere."""
    found = {name: list(tensor.shape) for name, tensor in reader.tensors.items() if name.startswith(prefix)}
    layouts = []
    for is_transposed in (False, True):
        layout = {name: list(weight.shape) for name, weight in _in_file(group, prefix, is_transposed).items()}
        if all(shape == layout.get(name) for name, shape in found.items()):
            return is_transposed
        layouts.append(" with ".join(f"{name.removeprefix(prefix)} {shape}" for name, shape in layout.items()))
    raise CheckpointError(
        f"experts in a layout that is not read: {_abbreviate([f'{name} {shape}' for name, shape in found.items()])}; "
        f"read are {' and '.join(layouts)}",
        str(reader.directory),
        "use the published files, or load and save the model with a current transformers",
    )


def _refuse_quantized(reader: SafetensorsReader, names: Iterable[str]) -> None:
    """Refuse numbers that are values only times their scales: they would be converted, and trained on, as they are."""
    dtypes = {name: reader.tensors[name].dtype for name in names if name in reader.tensors}
    found = [f"{name} {dtype}" for name, dtype in dtypes.items() if dtype not in VALUE_DTYPES]
    if found:
        raise CheckpointError(
            f"{len(found)} quantised tensors without the scales that give their values ({_abbreviate(found)})",
            str(reader.directory),
            'float8 weights are read where config.json has a quantization_config with quant_method "fp8" and each has '
            "its weight_scale_inv beside it; otherwise use the unquantised weights of this model",
        )


def _refuse_differences(
    expected: Mapping[str, Sequence[int]], actual: Mapping[str, Sequence[int]], where: str, fix: str
) -> None:
    missing = [name for name in expected if name not in actual]
    unexpected = [name for name in actual if name not in expected]
    misshapen = [
        f"{name} {list(actual[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in actual and tuple(actual[name]) != tuple(shape)
    ]
    found = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
    problems = [f"{len(names)} {kind} ({_abbreviate(names)})" for kind, names in found if names]
    if problems:
        raise CheckpointError(
            f"the weights do not fit the model that config.json describes: {', '.join(problems)}",
            where,
            fix,
        )


def _abbreviate(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"
