"""Every family comes back from a checkpoint bit for bit, with and without an example, and transformers loads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from megatron_vlm.conversion.convert import export_checkpoint, import_checkpoint, verify_checkpoint
from tests.checkpoint.hf_files import load, load_tensors
from tests.families import FAMILIES
from tests.families.tiny_family import TinyFamily


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_round_trip(family: TinyFamily, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    family.write(source)
    import_checkpoint(source, tmp_path / "checkpoint")
    comparison = verify_checkpoint(source, tmp_path / "checkpoint")
    assert comparison.num_tensors and not comparison.differences
    export_checkpoint(tmp_path / "checkpoint", source, tmp_path / "export")
    theirs, ours = load_tensors(source), load_tensors(tmp_path / "export")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)

    # Without weights to follow, names and layouts are ours to choose: transformers must find all of them.
    for file in source.glob("*.safetensors*"):
        file.unlink()
    export_checkpoint(tmp_path / "checkpoint", source, tmp_path / "alone")
    config = AutoConfig.from_pretrained(tmp_path / "alone")
    classes = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if family.has_tower else MODEL_FOR_CAUSAL_LM_MAPPING
    loaded = load(tmp_path / "alone", classes[type(config)]).state_dict()
    expected = family.model().state_dict()
    assert all(torch.equal(expected[name], value) for name, value in loaded.items())
