"""The demo's data set: deterministic, balanced, and nothing of the training set held out."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.console import Phases
from demo.draw import COLOURS, QUESTIONS, draw_dataset, pixel_digest
from demo.evaluate import HeldoutSample, best_blind_guess, exact_match, load_samples, swap_images
from demo.summary import Answers, Scores, samples_to_show, write_demo_report

KIND_OF_QUESTION = {question: kind for kind, questions in QUESTIONS.items() for question in questions}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return draw_dataset(tmp_path_factory.mktemp("demo"), train_samples=400, heldout_samples=288, seed=7)


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def digests(path: Path) -> list[str]:
    """Hashes of the pixels as they are read back from the files."""
    paths = [path.parent / row["messages"][0]["content"][0]["image"] for row in read_rows(path)]
    return [pixel_digest(Image.open(image)) for image in paths]


def test_no_image_occurs_twice(dataset):
    train, heldout = digests(dataset.train_path), digests(dataset.heldout_path)
    assert (len(train), len(heldout)) == (400, 288)
    assert len(set(train) | set(heldout)) == 688


def test_same_seed_draws_the_same_files(dataset, tmp_path):
    again = draw_dataset(tmp_path, train_samples=20, heldout_samples=20, seed=7)
    other = draw_dataset(tmp_path / "other", train_samples=20, heldout_samples=20, seed=8)
    assert read_rows(again.heldout_path) == read_rows(dataset.heldout_path)[:20]
    assert digests(again.heldout_path) == digests(dataset.heldout_path)[:20]
    assert not set(digests(other.train_path)) & set(digests(dataset.train_path))


def test_a_train_image_equal_to_a_heldout_one_is_drawn_again(monkeypatch, tmp_path):
    """With a renderer that can only make three pictures, three samples are all there is room for."""
    shades = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in range(3)]
    monkeypatch.setattr("demo.draw.render", lambda scene, rng: rng.choice(shades))
    small = draw_dataset(tmp_path, train_samples=2, heldout_samples=1, seed=1)
    assert len(set(digests(small.train_path) + digests(small.heldout_path))) == 3


def test_heldout_answers_are_balanced(dataset):
    samples = load_samples(dataset.heldout_path, KIND_OF_QUESTION)
    assert {sample.kind for sample in samples} == {"colour", "shape", "place"}
    # 1/6 of the colours, 1/4 of the shapes, 1/4 of the places, each a third of the questions.
    assert best_blind_guess(samples) == pytest.approx((1 / 6 + 1 / 4 + 1 / 4) / 3)


def test_rows_are_chats_about_one_image(dataset):
    for path, questions in ((dataset.train_path, 3), (dataset.heldout_path, 1)):
        for row in read_rows(path):
            turns = row["messages"]
            assert [turn["role"] for turn in turns] == ["user", "assistant"] * questions
            images = [part["image"] for turn in turns for part in turn["content"] if part["type"] == "image"]
            texts = [part["text"] for turn in turns for part in turn["content"] if part["type"] == "text"]
            assert turns[0]["content"][0]["image"] == images[0] and len(images) == 1
            assert len({KIND_OF_QUESTION[text] for text in texts[::2]}) == questions
            assert (path.parent / images[0]).is_file()


def test_answers_say_what_the_image_shows(dataset):
    """The colour and the place are read back from the pixels."""
    for row in read_rows(dataset.train_path)[:60]:
        turns = row["messages"]
        answers = {
            KIND_OF_QUESTION[user["content"][-1]["text"]]: assistant["content"][0]["text"]
            for user, assistant in zip(turns[::2], turns[1::2], strict=True)
        }
        pixels = np.asarray(Image.open(dataset.train_path.parent / turns[0]["content"][0]["image"]), dtype=int)
        on_shape = np.abs(pixels - pixels[48, 48]).sum(axis=2) > 60  # the middle is always background
        rows, columns = np.nonzero(on_shape)
        assert (
            answers["place"]
            == f"{'top' if rows.mean() < 48 else 'bottom'} {'left' if columns.mean() < 48 else 'right'}"
        )
        colour = np.median(pixels[on_shape], axis=0)
        nearest = min(COLOURS, key=lambda name: np.abs(colour - COLOURS[name]).sum())
        assert answers["colour"] == nearest


def test_swapping_moves_every_image_within_its_kind(dataset):
    samples = load_samples(dataset.heldout_path, KIND_OF_QUESTION)
    swapped = swap_images(samples)
    answer_of_image = {sample.image_path: (sample.kind, sample.answer) for sample in samples}
    assert sorted(sample.image_path for sample in swapped) == sorted(answer_of_image)
    for sample, other in zip(samples, swapped, strict=True):
        assert (other.question, other.answer) == (sample.question, sample.answer)
        assert other.image_path != sample.image_path
        assert answer_of_image[other.image_path] == (other.kind, other.shown_answer)


def test_a_model_that_looks_fails_the_swapped_check_and_one_that_does_not_passes_both_alike(dataset):
    samples = load_samples(dataset.heldout_path, KIND_OF_QUESTION)
    expected = [sample.answer for sample in samples]
    looks = [sample.shown_answer for sample in swap_images(samples)]
    # 22 % of the swapped images have the same answer on average; 288 samples scatter by 2.4 % (one sigma).
    assert exact_match(looks, expected) < 0.32
    assert exact_match(expected, expected) == 1.0


def test_exact_match_forgives_nothing():
    assert exact_match(["red", "Red", "red ", "blue"], ["red"] * 4) == 0.25
    with pytest.raises(ValueError):
        exact_match(["red"], ["red", "blue"])


def test_swap_leaves_nothing_to_swap_with_alone():
    alone = HeldoutSample(Path("a.png"), "?", "red", "red", "colour")
    assert swap_images([alone]) == [alone]


def test_the_report_has_the_demo_beside_the_run(dataset, tmp_path):
    samples = load_samples(dataset.heldout_path, KIND_OF_QUESTION)
    after = [sample.answer for sample in samples]
    answers = Answers(samples, swap_images(samples), [""] * 288, after, after)
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "loss": {9 - step}}}\n' for step in (1, 2, 3)))
    write_demo_report(tmp_path / "a.html", "Model", tmp_path, answers, Scores.of(answers), Phases(1), num_starts=2)
    text = (tmp_path / "a.html").read_text()
    assert "A tiny Model learns to look" in text and "resumed in another layout" in text
    assert text.count('class="sample right"') == 24 and ">Loss</div>" in text and ">Held-out loss" not in text
    assert text.count("data:image/png;base64,") == 24


def test_report_shows_wrong_answers_first_and_then_all_kinds_in_turn(dataset):
    samples = load_samples(dataset.heldout_path, KIND_OF_QUESTION)
    after = [sample.answer for sample in samples]
    after[200] = "wrong"
    answers = Answers(samples, swap_images(samples), [""] * 288, after, after)
    shown = samples_to_show(answers)
    assert shown[0].prediction == "wrong"
    assert {KIND_OF_QUESTION[sample.question] for sample in shown[1:4]} == set(QUESTIONS)
    scores = Scores.of(answers)
    assert (scores.before, scores.after) == (0.0, 287 / 288)
    assert not scores.passed, "answers that ignore the image match as well when images are swapped"
