"""What holds for the model directory and the stages of every demo."""

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from demo.draw import COLOURS, PLACES, QUESTIONS, SHAPES
from demo.evaluate import HeldoutSample, answer_questions
from demo.recipes import RECIPES, Recipe
from demo.run import _heading, _stops
from demo.sounds import DIGITS, synthesise
from tests.versions import TRANSFORMERS


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request) -> Recipe:
    return RECIPES[request.param]


@pytest.fixture(scope="module")
def folder(recipe, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("demo_model")
    recipe.build(path, recipe.task.texts(), 3)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoProcessor.from_pretrained(folder).tokenizer


TEXTS = ["red", "top left", QUESTIONS["colour"][0], "héllo wörld, 12 €\n\nsecond  line", "<0x41>", "\x07"]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not {*ids} & {tokenizer.unk_token_id, *tokenizer.all_special_ids}


def test_answers_are_one_token_per_word(recipe, tokenizer):
    answers = [*COLOURS, *SHAPES, *PLACES]
    if "clip" in recipe.task.media:
        answers += [*DIGITS, *(f"red {digit}" for digit in DIGITS)]
    for answer in answers:
        assert len(tokenizer.tokenize(answer)) == len(answer.split())


def test_answers_do_not_depend_on_the_batch(recipe, folder, tmp_path):
    """Questions of different lengths are padded on the left; each must get the answer it gets alone."""
    samples = []
    for index, questions in enumerate(QUESTIONS.values()):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (96, 96), (80 * index, 40, 200 - 60 * index)).save(path)
        samples += [HeldoutSample("", question, {"image": path}, {}, {}) for question in questions]
    if "clip" in recipe.task.media and Version("5.23") <= TRANSFORMERS:
        clip = synthesise("two", random.Random(0))
        path = tmp_path / f"a{clip.suffix}"
        path.write_bytes(clip.encoded)
        samples[1:1] = [HeldoutSample("", "Which digit do you hear?", {"clip": path}, {}, {})]
        samples += [replace(samples[-1], media={**samples[-1].media, "clip": path})]
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # or an untrained model would give everything the same answer
    model.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    together = answer_questions(tmp_path, samples, batch_size=4)
    assert together == answer_questions(tmp_path, samples, batch_size=1)
    assert len(set(together)) > 1


def test_stages_cover_all_steps(recipe):
    stops = _stops(recipe, 301)
    assert (stops[0], stops[-1], len(stops)) == (0, 301, len(recipe.stages) + 1)
    assert all(first < last for first, last in pairwise(stops))
    assert _heading(recipe.stages[-1], stops[-2], 301, 301).endswith("export to Hugging Face format")


def test_one_process_has_one_layout(recipe):
    alone = recipe.alone()
    assert [stage.overrides for stage in alone.stages] == [stage.overrides for stage in recipe.stages]
    for stage, several in zip(alone.stages, recipe.stages, strict=True):
        assert stage.layout.keys() == several.layout.keys() and {*stage.layout.values()} == {1}
        assert stage.name == "one process" != several.name
