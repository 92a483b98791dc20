"""Mistral3's model FLOPs against torch's own counter on transformers' models, with Mistral's and Ministral's text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Ministral3ForCausalLM, PreTrainedModel

from megatron_vlm.families import registry
from megatron_vlm.planning.flops import visible_keys
from tests.families.mistral3 import build, make_batch
from tests.parity.tiny_batches import Reference, Rows
from tests.training.model_flops import FROZEN, batch_flops
from tests.versions import needs_transformers_5_23

# Two rows of 22 tokens each: an image of h x w patches takes (h / 2) x (w / 2 + 1) tokens.
FULL_ROWS: dict[str, Rows] = {"images": [[3, (4, 6), 5, (4, 2), 2], [2, (6, 6), 8]], "text": [[22], [22]]}


def encode_one_by_one(model: PreTrainedModel) -> None:
    """Let transformers' tower see images one at a time: over all of them it computes pairs that its mask then hides,
    and convolves what pads them to the largest."""
    tower = model.model.vision_tower

    def forward(pixel_values: torch.Tensor, image_sizes: torch.Tensor, **kwargs: Any) -> Any:
        outputs = [
            type(tower).forward(
                tower, pixels[None, :, :height, :width], image_sizes=[(height, width)], output_hidden_states=True
            )
            for pixels, (height, width) in zip(pixel_values, image_sizes.tolist(), strict=True)
        ]
        last = torch.cat([output.hidden_states[-1] for output in outputs], dim=1)
        return type(outputs[0])(last_hidden_state=last, hidden_states=(last,))

    tower.forward = forward


def torch_flops(model: PreTrainedModel, inputs: dict[str, torch.Tensor], backward: bool) -> int:
    with FlopCounterMode(display=False) as counter:
        loss = model(**inputs).logits.sum()
        if backward and loss.requires_grad:
            loss.backward()
    return counter.get_total_flops()


def freeze(model: PreTrainedModel, frozen: set[str]) -> None:
    for name, parameter in model.named_parameters():
        part = "language_model"
        if name.startswith("model.vision_tower."):
            part = "vision_tower"
        elif name.startswith("model.multi_modal_projector."):
            part = "projector"
        parameter.requires_grad_(part not in frozen)


def on_later_stages(case: Reference) -> Any:
    """The batch without pixels, and with tokens that all see each other: transformers computes all pairs whatever the
    mask. Which pairs a mask leaves is another test's."""
    batch, length = case.batch, case.batch.input_ids.shape[1]
    assert (batch.document_ids >= 0).all()
    return replace(
        batch,
        span_low=torch.zeros_like(batch.span_low),
        span_high=torch.full_like(batch.span_high, length - 1),
        media_inputs={},
    )


@pytest.mark.parametrize("kind", sorted(FULL_ROWS))
@pytest.mark.parametrize("frozen", FROZEN, ids=lambda frozen: "frozen: " + (", ".join(sorted(frozen)) or "nothing"))
@needs_transformers_5_23
def test_count_equals_torch(kind: str, frozen: set[str]) -> None:
    """Forward and backward, exactly; and the forward pass alone, which is the count with everything frozen."""
    model = build(ministral=kind == "images")
    encode_one_by_one(model)
    freeze(model, frozen)
    case = make_batch(FULL_ROWS[kind], pad_to_multiple_of=1)
    family = registry.detect(model.config)
    record, batch = family.config_from_hf(model.config, text_only=False), on_later_stages(case)
    assert batch_flops(family, record, batch, frozen) == torch_flops(model, case.inputs, backward=True)
    everything = {"language_model", "vision_tower", "projector"}
    assert batch_flops(family, record, batch, everything) == torch_flops(model, case.inputs, backward=False)


@needs_transformers_5_23
def test_text_only_model_counts_no_vision() -> None:
    whole = build(ministral=True)
    model = Ministral3ForCausalLM._from_config(whole.config.text_config, attn_implementation="eager")
    family, case = registry.detect(model.config), make_batch(FULL_ROWS["text"], pad_to_multiple_of=1)
    record = family.config_from_hf(model.config, text_only=False)
    assert batch_flops(family, record, on_later_stages(case)) == torch_flops(model, case.inputs, backward=True)
    assert record == family.config_from_hf(whole.config, text_only=True)


@pytest.mark.parametrize("ministral", [False, True], ids=["mistral", "ministral"])
@pytest.mark.parametrize("window", [None, 6])
def test_visible_keys_equal_transformers_masks(ministral: bool, window: int | None) -> None:
    """Count the attention weights of real queries above zero, in padded rows longer than the window."""
    model = build(ministral, sliding_window=window)
    case = make_batch([[3, (4, 6), 5], [17]], pad_to_multiple_of=1)
    record = registry.detect(model.config).config_from_hf(model.config, text_only=False)
    is_real = case.batch.document_ids >= 0
    with torch.no_grad():
        attentions = model(**case.inputs, output_attentions=True).attentions
    assert len(attentions) == len(record.text.layers)
    for layer, weights_BNSS in zip(record.text.layers, attentions, strict=True):
        expected = int(((weights_BNSS[:, 0] > 0) & is_real[..., None]).sum())
        assert visible_keys(case.batch, is_real, layer.window) == expected
