"""Gemma 4's model FLOPs against torch's own counter on transformers' models of every variant."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.data.media import Medium
from megatron_vlm.families import registry
from megatron_vlm.planning.flops import visible_keys
from tests.families.gemma4 import VARIANTS, build, make_batch
from tests.parity.tiny_batches import Reference, Rows
from tests.sizes import full
from tests.training.model_flops import batch_flops
from tests.versions import needs_transformers_5_23

LENGTH = 40
# Media of two rows, which text fills up to `LENGTH`: nothing is padded. Images and frames of a micro-batch have equally
# many patches, and clips of audio are whole chunks of the tower.
MEDIA: dict[str, list[list[Any]]] = {
    "text": [[], []],
    "images": [[(4, 6), (2, 12)], [(2, 4, 6)]],
    "audio": [[(16,)], [(16,), (16,)]],
    "both": [[(4, 6), (16,)], [(16,), (6, 4)]],
}
# Of 12B, for which a patch is a token, and so is a frame of audio; clips are equally long.
MEDIA_OF_12B: dict[str, list[list[Any]]] = {
    "text": [[], []],
    "images": [[(2, 3), (1, 6)], [(2, 3, 2)]],
    "audio": [[(7,)], [(7,), (7,)]],
    "both": [[(2, 3), (7,)], [(7,), (3, 2)]],
}
PARTS = ("language_model", "vision_tower", "audio_tower", "projector")
FROZEN: list[set[str]] = [
    set(),
    {"language_model"},
    {"vision_tower"},
    {"audio_tower"},
    {"projector"},
    {"language_model", "vision_tower", "projector"},
    {"language_model", "audio_tower", "projector"},
    {"vision_tower", "audio_tower", "projector"},
    set(PARTS),
]
KINDS, WITH_AUDIO = ("text", "images"), ("E2B", "12B")
ALL_KINDS = [(variant, kind) for variant in VARIANTS for kind in MEDIA if variant in WITH_AUDIO or kind in KINDS]
# `make test` freezes nothing, and what decides in which micro-batches gradients pass the language model.
CASES = [
    (variant, kind, frozen) if not frozen or (kind == "both" and len(frozen) == 3) else full(variant, kind, frozen)
    for variant, kind in ALL_KINDS
    for frozen in FROZEN
]


def words(value: Any) -> str:
    return value if isinstance(value, str) else "frozen: " + (", ".join(sorted(value)) or "nothing")


def full_rows(variant: str, kind: str) -> Reference:
    """The micro-batch, with text behind each medium."""
    rows: Rows = [
        [1, *(part for medium in media for part in (medium, 1))]
        for media in (MEDIA_OF_12B if variant == "12B" else MEDIA)[kind]
    ]
    ends = (make_batch(rows, variant=variant).batch.document_ids >= 0).sum(1).tolist()
    rows = [[*row, LENGTH - end] for row, end in zip(rows, ends, strict=True)]
    return make_batch(rows, variant=variant)


def without_the_rest(model: PreTrainedModel) -> PreTrainedModel:
    """transformers' model without the products that are none of the model's.

    Its pooling is a product with a matrix of ones and zeros. The keys of relative positions of audio do not depend on
    the batch, and one of them is for a distance that no token sees.
    """
    if hasattr(model.model, "vision_tower"):
        model.model.vision_tower.pooler._avg_pool_by_positions = _pooled
    audio_tower = getattr(model.model, "audio_tower", None)
    for layer in [] if audio_tower is None else audio_tower.layers:
        layer.self_attn.relative_k_proj = _Relative(layer.self_attn.relative_k_proj)
        layer.self_attn._rel_shift = partial(_shifted, layer.self_attn._rel_shift)
    return model


def _pooled(hidden: torch.Tensor, positions: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    means = hidden.unflatten(1, (length, -1)).float().mean(2)  # of some patches: which ones is no matter
    return means.to(hidden.dtype), torch.ones(means.shape[:2], dtype=torch.bool)


class _Relative(torch.nn.Module):
    """A linear layer by sums, which are not counted, without the farthest distance."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return (positions[..., 1:, None, :] * self.weight).sum(-1)


def _shifted(shift: Any, scores: torch.Tensor) -> torch.Tensor:
    shifted: torch.Tensor = shift(torch.nn.functional.pad(scores, (1, 0)))
    return shifted


def part_of(name: str) -> str:
    """The part that one of transformers' parameters belongs to."""
    if "multimodal_embedder" in name or "embedding_projection" in name:
        return "projector"
    if name.startswith("model.audio_tower."):
        return "audio_tower"
    return "vision_tower" if name.startswith(("model.vision_tower.", "model.embed_vision.")) else "language_model"


def torch_flops(model: PreTrainedModel, inputs: dict[str, torch.Tensor], backward: bool) -> int:
    with FlopCounterMode(display=False) as counter:
        loss = model(**inputs).logits.sum()
        if backward and loss.requires_grad:
            loss.backward()
    return counter.get_total_flops()


def all_visible(record: Any, batch: MicroBatch) -> tuple[Any, MicroBatch]:
    """A record and a batch of later stages in which all tokens of a row see each other, in layers of two kinds.

    transformers computes all pairs whatever the mask; which of them a mask leaves is the next test's.
    """
    layers = [
        replace(layer, image_mask="window", window=None if layer.window is None else LENGTH)
        for layer in record.text.layers
    ]
    low = torch.zeros_like(batch.span_low)
    everything = replace(batch, span_low=low, span_high=low + LENGTH - 1, media_inputs={})
    return replace(record, text=replace(record.text, layers=tuple(layers))), everything


@pytest.mark.parametrize(("variant", "kind", "frozen"), CASES, ids=words)
@needs_transformers_5_23
def test_count_equals_torch(variant: str, kind: str, frozen: set[str]) -> None:
    """Forward and backward, exactly; and the forward pass alone, which is the count with everything frozen."""
    # Plain products: torch counts no grouped ones.
    model = without_the_rest(build(variant, sliding_window=LENGTH))
    if variant == "26B-A4B":
        model.set_experts_implementation("eager")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) not in frozen)
    case = full_rows(variant, kind)
    assert (case.batch.document_ids >= 0).all() and case.batch.document_ids.shape[1] == LENGTH
    family = registry.detect(model.config)
    record, batch = all_visible(family.config_from_hf(model.config, text_only=False), case.batch)
    assert batch_flops(family, record, batch, frozen & set(record.parts)) == torch_flops(
        model, case.inputs, backward=True
    )
    assert batch_flops(family, record, batch, set(record.parts)) == torch_flops(model, case.inputs, backward=False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_visible_keys_equal_transformers_masks(variant: str) -> None:
    """Count the attention weights of real queries above zero, in padded rows with images longer than the window.

    12B's rule is that of transformers' forward pass here, which is what a forward pass can be compared with.
    """
    model = build(variant)
    rows: Rows = [[3, (4, 6), 5, (2, 12), 2], [2, (2, 4, 6), 3], [21]]
    case = make_batch(rows, variant=variant)
    is_unified = variant == "12B"
    family = registry.detect(model.config)
    record = family.config_from_hf(model.config, False, "transformers" if is_unified else None)
    is_real = case.batch.document_ids >= 0
    with torch.no_grad():
        attentions = model(**case.inputs, output_attentions=True).attentions
    kinds = set()
    for layer, weights_BNSS in zip(record.text.layers, attentions, strict=True):
        is_query = case.inputs["attention_mask"].bool()[:, None, :, None]
        expected = int(((weights_BNSS > 0) & is_query)[:, 0].sum())
        assert visible_keys(case.batch, is_real, layer.window, layer.image_mask) == expected
        kinds.add((layer.window, layer.image_mask, expected))
    assert len(kinds) == 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_keys_are_free(variant: str) -> None:
    """Layers of both kinds cost what their own pairs cost, at three times two products of their own heads."""
    model = build(variant)
    family = registry.detect(model.config)
    record, batch = family.config_from_hf(model.config, text_only=False), full_rows(variant, "images").batch
    everywhere, everything = all_visible(record, batch)
    is_real = batch.document_ids >= 0
    all_pairs = 2 * LENGTH**2
    hidden = sum(
        3
        * 4
        * layer.num_attention_heads
        * layer.head_dim
        * (all_pairs - visible_keys(batch, is_real, layer.window, layer.image_mask))
        for layer in record.text.layers
    )
    assert hidden > 0
    whole = batch_flops(family, everywhere, everything)
    assert batch_flops(family, record, batch) == whole - hidden


def test_what_does_not_fill_a_token_costs_a_token() -> None:
    """A clip's last frames, fewer than a token stands for; and twice the clips cost twice as much."""
    model = build("E2B")
    family = registry.detect(model.config)
    record, batch = family.config_from_hf(model.config, text_only=False), full_rows("E2B", "audio").batch

    def flops(*clips: int) -> float:
        media = [Medium("audio", (frames, 1, 1)) for frames in clips]
        return batch_flops(family, record, replace(batch, media=media, media_inputs={}))

    assert flops(13) == flops(16) == flops(5, 6) < flops(17)
    assert flops(16, 16, 16) - flops(16, 16) == flops(16, 16) - flops(16)
