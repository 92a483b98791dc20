"""Positions on three axes against transformers' own, for anything that a processor may write."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel

from megatron_vlm.data.collate import LoadedSample, MicroBatch, collate
from megatron_vlm.data.media import Medium
from megatron_vlm.data.prompts import Sample
from megatron_vlm.data.rows import RowReader
from megatron_vlm.data.rules import PromptRules
from megatron_vlm.families.qwen3_vl.prompt import prompt_rules
from tests.data.rows import assistant, image, row, user, video
from tests.families import qwen3_vl

Make = Callable[..., RowReader]
IMAGE, VIDEO, TEXT = 1, 2, 0


def tiny_config(rules: PromptRules, merge_size: int = 2) -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text_config=qwen3_vl.TEXT | {"vocab_size": 416},
        vision_config=qwen3_vl.VISION | {"spatial_merge_size": merge_size},
        image_token_id=rules.image_token_id,
        video_token_id=rules.video_token_id,
    )


def random_row(random: np.random.Generator, rules: PromptRules, merge_size: int) -> Sample:
    """Text, images and videos in any order; visual runs of different kinds may touch, and begin or end the row."""
    ids: list[int] = []
    media: list[Medium] = []

    def add_text(fewest: int) -> None:
        ids.extend(random.integers(0, 300, random.integers(fewest, 5)).tolist())

    kinds = random.choice([TEXT, IMAGE, VIDEO], random.integers(1, 6))
    for previous, kind in zip([TEXT, *kinds], kinds, strict=False):
        height, width = (random.integers(1, 5, 2) * merge_size).tolist()
        if kind == TEXT:
            add_text(1)
            continue
        # transformers takes touching runs of one kind for one run.
        add_text(int(previous == kind))
        frames = 1 if kind == IMAGE else int(random.integers(1, 4))
        media.append(Medium("image" if kind == IMAGE else "video", (frames, height, width)))
        token = rules.image_token_id if kind == IMAGE else rules.video_token_id
        for frame in range(frames):
            if frame:
                add_text(1)
            ids.extend([token] * (height * width // merge_size**2))
    ids = ids or [0]
    return Sample(np.array(ids), np.zeros(len(ids), bool), media=media)


def theirs(batch: MicroBatch, rules: PromptRules, model: Qwen3VLModel) -> torch.Tensor:
    """[3, B, S] positions of transformers."""
    is_image, is_video = batch.input_ids == rules.image_token_id, batch.input_ids == rules.video_token_id
    kinds = is_image.int() + 2 * is_video.int()
    grids: dict[int, list[Any]] = {IMAGE: [], VIDEO: []}
    starts = torch.nn.functional.pad(kinds, (1, 0))
    queue = iter(batch.grids)
    frames_left = 0
    for b, s in torch.nonzero((kinds > 0) & (kinds != starts[:, :-1])).tolist():
        if frames_left == 0:
            grid = next(queue)
            grids[int(kinds[b, s])].append(grid)
            frames_left = grid[0]
        frames_left -= 1
    tensors = {kind: torch.tensor(rows) if rows else None for kind, rows in grids.items()}
    mask = (batch.document_ids >= 0).long()
    return model.get_rope_index(batch.input_ids, kinds, tensors[IMAGE], tensors[VIDEO], mask)[0]


@pytest.mark.parametrize("merge_size", [1, 2, 3])
def test_positions_equal_transformers(qwen_rules: PromptRules, merge_size: int) -> None:
    """Each row of a padded micro-batch is numbered by itself, as get_rope_index does."""
    vision = SimpleNamespace(patch_size=4, temporal_patch_size=2, spatial_merge_size=merge_size)
    tokens = {"image_token_id": qwen_rules.image_token_id, "video_token_id": qwen_rules.video_token_id}
    # As a worker process gets them.
    rules = pickle.loads(pickle.dumps(prompt_rules(SimpleNamespace(text_only=False, vision=vision, **tokens))))
    with torch.device("meta"):
        model = Qwen3VLModel(tiny_config(rules, merge_size))
    random = np.random.default_rng(merge_size)
    for _ in range(100):
        rows = [LoadedSample(random_row(random, rules, merge_size), 0, "row") for _ in range(random.integers(1, 4))]
        batch = collate(
            [[loaded] for loaded in rows], rules, padding_token_id=0, pad_to_multiple_of=int(random.integers(1, 9))
        )
        assert batch.position_ids.dtype == torch.int64
        assert torch.equal(batch.position_ids, theirs(batch, rules, model))
        for number, loaded in enumerate(rows):
            alone = collate([[loaded]], rules, padding_token_id=0)
            length = alone.input_ids.shape[1]
            assert torch.equal(batch.position_ids[:, number, :length], alone.position_ids[:, 0])


def test_text_alone_is_counted_on_all_axes(make_qwen_reader: Make, qwen_rules: PromptRules) -> None:
    reader = make_qwen_reader([row(user("Hello, how are you?"), assistant("Fine.")), "broken"])
    batch = collate([[reader.read(0, 0)], [reader.read(0, 1)]], qwen_rules, 0)
    length = len(reader.read(0, 0).sample.input_ids)
    assert torch.equal(batch.position_ids[:, 0], torch.arange(length).expand(3, -1))
    assert not batch.position_ids[:, 1].any()
    text_only = prompt_rules(SimpleNamespace(text_only=True))
    assert torch.equal(collate([[reader.read(0, 0)]], text_only, 0).position_ids[:, 0], batch.position_ids[:, 0])


def test_numbering_goes_on_after_the_larger_side(make_qwen_reader: Make, qwen_rules: PromptRules) -> None:
    """A 20 x 30 image is 2 x 4 tokens: the text after it begins four positions on, not eight."""
    reader = make_qwen_reader([row(user(image("0.png"), "What?"), assistant("Red."))])
    batch = collate([[reader.read(0, 0)]], qwen_rules, 0)
    assert batch.grids == [(1, 8, 4)]
    is_image = batch.input_ids[0] == qwen_rules.image_token_id
    time, height, width = batch.position_ids[:, 0, is_image] - batch.position_ids[0, 0, is_image][0]
    assert time.tolist() == [0] * 8
    assert height.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and width.tolist() == [0, 1] * 4
    last = int(torch.nonzero(is_image)[-1])
    assert (batch.position_ids[:, 0, last + 1] - batch.position_ids[0, 0, last]).tolist() == [4, 4, 4]
    assert batch.position_ids.max() == batch.input_ids.shape[1] - 1 - (8 - 4)


def test_positions_do_not_depend_on_what_the_model_saw_before(make_qwen_reader: Make, qwen_rules: PromptRules) -> None:
    """transformers keeps the last batch's offset on the model and adds it where it is given embeddings without ids.

    With our positions given explicitly, the model gives the same logits as with its own, and as a model that has seen
    no images.
    """
    reader = make_qwen_reader(
        [row(user("a", video(["0.png", "0.png"]), image("1.png")), assistant("b")), row(user("Hello?"), assistant("c"))]
    )
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(tiny_config(qwen_rules)).eval()
    visual, text = (collate([[reader.read(0, number)]], qwen_rules, 0) for number in range(2))
    sizes = [t * h * w for t, h, w in visual.grids]
    video_pixels, image_pixels = visual.media_inputs["pixel_values"].split(sizes)
    inputs = {
        "input_ids": visual.input_ids,
        "pixel_values": image_pixels,
        "pixel_values_videos": video_pixels,
        "video_grid_thw": torch.tensor(visual.grids[:1]),
        "image_grid_thw": torch.tensor(visual.grids[1:]),
    }
    kinds = (visual.input_ids == qwen_rules.image_token_id).int() + 2 * (
        visual.input_ids == qwen_rules.video_token_id
    ).int()
    with torch.no_grad():
        fresh = model(input_ids=text.input_ids).logits
        own = model(**inputs, mm_token_type_ids=kinds).logits
        assert torch.equal(model(**inputs, position_ids=visual.position_ids).logits, own)
        assert model.model.rope_deltas is not None
        embeddings = model.get_input_embeddings()(text.input_ids)
        explicit = model(inputs_embeds=embeddings, position_ids=text.position_ids).logits
    assert torch.equal(explicit, fresh)
