"""The loss of a few rows by transformers and by this project's model, on one process without a GPU.

A loss that starts too high comes from the data, the weights or the model. Where both agree on a row, it is not the
model: the row itself, its template, or what is trained of it must be looked at.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from megatron_vlm.conversion.running_model import load_hf_into_model
from megatron_vlm.data.collate import LoadedSample, collate
from megatron_vlm.data.rows import RowReader
from megatron_vlm.errors import ConfigError
from megatron_vlm.families.build import BuildSettings, build_chunks
from megatron_vlm.families.registry import Family
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.simulate import simulated_rank

LOSS_TOLERANCE = 1e-4
"""Relative difference of fp32 losses that rounding explains, over a network of many layers."""


@dataclass(frozen=True)
class ComparedRow:
    """One row's losses, each the mean over its trained tokens.

    Attributes:
        name: file and line of the row.
        tokens: its tokens.
        trained: its trained tokens.
        theirs: loss by transformers.
        ours: loss by this project's model.
    """

    name: str
    tokens: int
    trained: int
    theirs: float
    ours: float

    @property
    def is_equal(self) -> bool:
        """Whether the losses differ by no more than rounding does."""
        return abs(self.ours - self.theirs) <= LOSS_TOLERANCE * max(abs(self.theirs), 1e-3)

    def __str__(self) -> str:
        verdict = "equal" if self.is_equal else "DIFFERENT"
        return (
            f"{self.name}: {self.tokens} tokens, {self.trained} trained; transformers {self.theirs:.6f}, "
            f"megatron_vlm {self.ours:.6f} ({verdict})"
        )


@dataclass(frozen=True)
class _Row:
    loaded: LoadedSample
    inputs: dict[str, Any]


def compare_losses(
    hf_path: str, family: Family, hf_config: PretrainedConfig, reader: RowReader, rows: Sequence[int]
) -> list[ComparedRow]:
    """Compute the loss of rows of the reader's first source by both models, one after the other, in fp32.

    transformers takes what its processor makes of the row; the trained tokens are ours. Where a model has a choice of
    image masks, ours follows transformers' forward pass.

    Args:
        hf_path: directory with config.json, weights, tokenizer and processor files.
        family: the model's family.
        hf_config: transformers' configuration of the directory.
        reader: strict reader of the rows.
        rows: numbers of the rows.

    Raises:
        DataError: a row cannot be used.
        ConfigError: transformers cannot load the model, or finds no weights for some of it.
    """
    assert reader.settings.strict, "a bad row is an error here"
    prepared = [_Row(reader.read(0, row), reader.transformers_inputs(0, row)) for row in rows]
    theirs = list(_theirs(hf_path, hf_config, prepared))
    gc.collect()  # the model's memory, before ours is built
    ours = list(_ours(hf_path, family, hf_config, prepared, reader))
    return [
        ComparedRow(
            row.loaded.row_name, len(row.loaded.sample.input_ids), int(row.loaded.sample.trained.sum()), their, own
        )
        for row, their, own in zip(prepared, theirs, ours, strict=True)
    ]


def _theirs(hf_path: str, hf_config: PretrainedConfig, rows: Sequence[_Row]) -> Iterator[float]:
    is_text = hf_config.get_text_config() is hf_config
    auto_class: Any = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
    fix = "give a complete model directory"
    try:
        model, loaded = auto_class.from_pretrained(
            hf_path, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"transformers cannot load the model: {str(error)[:300]}", hf_path, fix) from None
    if missing := sorted(loaded["missing_keys"]):  # which transformers has made up
        what = f"transformers finds no weights for {len(missing)} parameters, such as {missing[0]}"
        raise ConfigError(what, hf_path, fix)
    for row in rows:
        sample = row.loaded.sample
        ids = torch.from_numpy(sample.input_ids)[None]
        assert torch.equal(row.inputs["input_ids"], ids), "both read the same tokens"
        labels = torch.where(torch.from_numpy(sample.trained), ids[0], -100)
        with torch.no_grad():
            logits = model(**row.inputs).logits[0, :-1].float()
        yield cross_entropy(logits, labels[1:], ignore_index=-100).item()


def _ours(
    hf_path: str, family: Family, hf_config: PretrainedConfig, rows: Sequence[_Row], reader: RowReader
) -> Iterator[float]:
    image_mask = "transformers" if family.chooses_image_mask(hf_config) else None
    model_config = family.config_from_hf(hf_config, False, image_mask)
    layout = Layout.over(1, num_layers=len(model_config.text.layers))
    builder = reader.builder
    with simulated_rank(0, layout) as groups, torch.no_grad():
        chunks = build_chunks(family, model_config, BuildSettings(layout, torch.float32), groups, torch.device("cpu"))
        load_hf_into_model(chunks, hf_path, family, model_config, groups)
        (chunk,) = chunks
        chunk.eval()
        for row in rows:
            batch = collate([[row.loaded]], builder.rules, builder.padding_token_id)
            yield (chunk(batch).sum() / len(batch.label_index)).item()
