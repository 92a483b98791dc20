"""The map of all weights of a model, by which Hugging Face directories and checkpoints are read and checked.

A family's `weights.py` builds its `WeightMap` from tables (weight_tables.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from megatron_vlm.checkpoint.hf import SafetensorsReader
from megatron_vlm.errors import CheckpointError
from megatron_vlm.model.hf_tensors import HfPart, HfTensor, tensors_of
from megatron_vlm.model.weight_tables import Weight, WeightGroup

NAMES_SHOWN = 4
VALUE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class FoundTensors:
    """The tensors of a Hugging Face directory, by the names there.

    Attributes:
        tensors: tensors that hold every weight exactly once.
        tied_copies: further tensors that repeat a tied weight.
        passthrough: names of tensors that are only carried through.
        unread: names of tensors of towers, which a text-only model does not read.
    """

    tensors: dict[str, HfTensor]
    tied_copies: dict[str, HfTensor]
    passthrough: tuple[str, ...]
    unread: tuple[str, ...]

    @property
    def with_copies(self) -> dict[str, HfTensor]:
        """All tensors that hold weights."""
        return self.tensors | self.tied_copies


@dataclass(frozen=True)
class WeightMap:
    """All weights of one model.

    Args:
        groups: groups that hold every tensor exactly once.
        tied_groups: groups whose tensors, where a file has them, must repeat another weight: (group, our name of it).
        unread_hf_prefixes: prefixes of those tensors of a multimodal file that a text-only model does not read.
        passthrough: regular expressions, found in names of tensors that transformers ignores
            (`_keys_to_ignore_on_load_unexpected`). They are carried through: kept as they are, and exported again.
        text_only_class: (architecture, model_type) of the text-only language model, for `config.json`.
        text_only_settings: keys of its `config.json` that differ from the text part of a multimodal one.
        buffer_patterns: regular expressions that match the whole of our names of what never trains.
    """

    groups: tuple[WeightGroup, ...]
    tied_groups: tuple[tuple[WeightGroup, str], ...] = ()
    unread_hf_prefixes: tuple[str, ...] = ()
    passthrough: tuple[str, ...] = ()
    text_only_class: tuple[str, str] | None = None
    text_only_settings: Mapping[str, object] = field(default_factory=dict)
    buffer_patterns: tuple[str, ...] = ()

    def items(self) -> Iterator[tuple[str, Weight]]:
        """Yield (our name, weight) in the order of the model."""
        for group in self.groups:
            for weight in group.weights:
                yield group.prefix + weight.suffix, weight

    @property
    def buffers(self) -> frozenset[str]:
        """Our names of the weights that never train: parameters of kind `buffer`."""
        names = (name for name, _ in self.items())
        return frozenset(name for name in names if any(re.fullmatch(each, name) for each in self.buffer_patterns))

    def as_written(self) -> dict[str, HfTensor]:
        """Return the tensors that an export writes without an example, by their names there."""
        tensors: dict[str, HfTensor] = {}
        for group in self.groups:
            tensors |= tensors_of(group, group.hf_prefixes[0], group.written_transposed)
        return tensors

    def passthrough_in(self, hf_names: Iterable[str]) -> tuple[str, ...]:
        """Return the names of tensors that are only carried through."""
        read = (name for name in hf_names if not name.startswith(self.unread_hf_prefixes))
        return tuple(name for name in read if any(re.search(pattern, name) for pattern in self.passthrough))

    def match(self, reader: SafetensorsReader) -> FoundTensors:
        """Find every weight in a Hugging Face directory.

        Args:
            reader: reader of the directory's weights.

        Raises:
            CheckpointError: tensors are missing, unexpected or wrongly shaped, which are listed together; or weights
                are quantised; or experts have neither of the two layouts that are read.
        """
        tensors: dict[str, HfTensor] = {}
        for group in self.groups:
            prefix = _used_prefix(group, reader.tensors)
            tensors |= tensors_of(group, prefix, group.transposable and _is_transposed(group, prefix, reader))
        copies: dict[str, HfTensor] = {}
        for group, source in self.tied_groups:
            for name, copy in tensors_of(group, _used_prefix(group, reader.tensors)).items():
                if name in reader.tensors:
                    copies[name] = replace(copy, parts=(HfPart(source, copy.parts[0].weight),))
        unread = tuple(name for name in reader.tensors if name.startswith(self.unread_hf_prefixes))
        found = FoundTensors(tensors, copies, self.passthrough_in(reader.tensors), unread)
        assert found.with_copies.keys().isdisjoint(found.passthrough), f"{self.passthrough} fit weights of the model"
        _refuse_quantized(reader, found.with_copies)
        read = reader.tensors.keys() - set(unread)
        _refuse_differences(
            {name: tensor.shape for name, tensor in found.with_copies.items()},
            {name: reader.tensors[name].shape for name in sorted(read.difference(found.passthrough))},
            str(reader.directory),
            "use the config.json that belongs to these weights",
        )
        return found

    def check_stored(self, stored: Mapping[str, Sequence[int]], where: str) -> None:
        """Compare with the shapes in a distributed checkpoint, which may hold more (the optimizer's state).

        Raises:
            CheckpointError: tensors are missing, wrongly shaped, or surplus in the same parts; all are listed together.
        """
        parts = tuple({group.prefix.split(".")[0] + "." for group in self.groups})
        relevant = {name: shape for name, shape in stored.items() if name.startswith(parts)}
        _refuse_differences(
            {name: weight.padded_shape for name, weight in self.items()},
            relevant,
            where,
            "use the model.hf_path (tools/convert.py: --hf) that the checkpoint was made from",
        )


def _used_prefix(group: WeightGroup, names: Mapping[str, object]) -> str:
    if group.transposable:  # the first weight need not be there under this name
        used = (prefix for prefix in group.hf_prefixes if any(name.startswith(prefix) for name in names))
    else:
        used = (prefix for prefix in group.hf_prefixes if prefix + group.weights[0].hf_suffix in names)
    return next(used, group.hf_prefixes[0])


def _is_transposed(group: WeightGroup, prefix: str, reader: SafetensorsReader) -> bool:
    """Return whether a file holds a transposable group transposed; missing tensors are reported elsewhere."""
    found = {name: list(tensor.shape) for name, tensor in reader.tensors.items() if name.startswith(prefix)}
    layouts = []
    for is_transposed in (False, True):
        layout = {name: list(tensor.shape) for name, tensor in tensors_of(group, prefix, is_transposed).items()}
        if all(shape == layout.get(name) for name, shape in found.items()):
            return is_transposed
        layouts.append(" with ".join(f"{name.removeprefix(prefix)} {shape}" for name, shape in layout.items()))
    raise CheckpointError(
        f"experts in a layout that is not read: {abbreviate([f'{name} {shape}' for name, shape in found.items()])}; "
        f"read are {' and '.join(layouts)}",
        str(reader.directory),
        "use the published files, or load and save the model with a current transformers",
    )


def _refuse_quantized(reader: SafetensorsReader, names: Iterable[str]) -> None:
    """Refuse quantised tensors without scales, which would be converted, and trained on, as if they were the values."""
    dtypes = {name: reader.tensors[name].dtype for name in names if name in reader.tensors}
    found = [f"{name} {dtype}" for name, dtype in dtypes.items() if dtype not in VALUE_DTYPES]
    if found:
        raise CheckpointError(
            f"{len(found)} quantised tensors without the scales that give their values ({abbreviate(found)})",
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
    problems = [f"{len(names)} {kind} ({abbreviate(names)})" for kind, names in found if names]
    if problems:
        raise CheckpointError(
            f"the weights do not fit the model that config.json describes: {', '.join(problems)}",
            where,
            fix,
        )


def abbreviate(names: Sequence[str]) -> str:
    """Return the first few of many names, and how many more there are."""
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"
