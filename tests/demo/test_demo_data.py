"""The demo's data set: deterministic, balanced, and nothing of the training set held out."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.console import Phases
from demo.dataset import (
    COLOUR_AND_DIGIT,
    IMAGES,
    IMAGES_AND_CLIPS,
    DatasetSummary,
    Task,
    clip_chats,
    image_chats,
    image_questions,
    joint_chats,
    write_dataset,
)
from demo.draw import COLOURS, QUESTIONS, pixel_digest
from demo.evaluate import HeldoutSample, best_blind_guess, exact_match, load_samples, swap
from demo.sounds import CHORDS, DIGITS, TONES_HERTZ, Clip
from demo.summary import MOST_SWAPPED_MATCH, Answers, Scores, Swap, samples_to_show, write_demo_report

KIND_OF_QUESTION = IMAGES.kind_of_question()
ALL_KINDS = IMAGES_AND_CLIPS.kind_of_question()


def write(folder: Path, train_samples: int, heldout_samples: int, seed: int) -> DatasetSummary:
    """A data set of images with other numbers of samples."""
    task = replace(IMAGES, train=((train_samples, image_chats),), heldout=((heldout_samples, image_questions),))
    return write_dataset(folder, task, seed)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write(tmp_path_factory.mktemp("demo"), train_samples=400, heldout_samples=288, seed=7)


def with_clips(**changes) -> Task:
    """Fewer images, as they take most of the time."""
    train = ((8, image_chats), (20, clip_chats), (24, joint_chats))
    return replace(IMAGES_AND_CLIPS, **({"train": train, "heldout": IMAGES_AND_CLIPS.heldout[1:]} | changes))


@pytest.fixture(scope="module")
def sounding(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("sounding"), with_clips(), seed=7)


def swapped_answers(samples: list[HeldoutSample], medium: str, answer: str) -> Swap:
    """As of a model that gives these answers when media are swapped."""
    swapped = swap(samples, medium)
    return Swap(swapped, [getattr(sample, answer) for sample in swapped])


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
    again = write(tmp_path, train_samples=20, heldout_samples=20, seed=7)
    other = write(tmp_path / "other", train_samples=20, heldout_samples=20, seed=8)
    assert read_rows(again.heldout_path) == read_rows(dataset.heldout_path)[:20]
    assert digests(again.heldout_path) == digests(dataset.heldout_path)[:20]
    assert not set(digests(other.train_path)) & set(digests(dataset.train_path))


def test_a_train_image_equal_to_a_heldout_one_is_drawn_again(monkeypatch, tmp_path):
    """With a renderer that can only make three pictures, three samples are all there is room for."""
    shades = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in range(3)]
    monkeypatch.setattr("demo.draw.render", lambda scene, rng: rng.choice(shades))
    small = write(tmp_path, train_samples=2, heldout_samples=1, seed=1)
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
    swapped = swap(samples, "image")
    answer_of_image = {sample.media["image"]: (sample.kind, sample.answer) for sample in samples}
    assert sorted(sample.media["image"] for sample in swapped) == sorted(answer_of_image)
    for sample, other in zip(samples, swapped, strict=True):
        assert (other.question, other.answer) == (sample.question, sample.answer)
        assert other.media != sample.media
        assert answer_of_image[other.media["image"]] == (other.kind, other.shown_answer)


def test_a_model_that_looks_fails_the_swapped_check_and_one_that_does_not_passes_both_alike(dataset):
    samples = load_samples(dataset.heldout_path, KIND_OF_QUESTION)
    expected = [sample.answer for sample in samples]
    looks = [sample.shown_answer for sample in swap(samples, "image")]
    # 22 % of the swapped images have the same answer on average; 288 samples scatter by 2.4 % (one sigma).
    assert exact_match(looks, expected) < 0.32
    assert exact_match(expected, expected) == 1.0


def test_exact_match_forgives_nothing():
    assert exact_match(["red", "Red", "red ", "blue"], ["red"] * 4) == 0.25
    with pytest.raises(ValueError):
        exact_match(["red"], ["red", "blue"])


def test_swap_leaves_nothing_to_swap_with_alone():
    alone = HeldoutSample("colour", "?", {"image": Path("a.png")}, {"image": "red"}, {"image": "red"})
    assert swap([alone], "image") == swap([alone], "clip") == [alone]


def test_the_report_has_the_demo_beside_the_run(dataset, tmp_path):
    samples = load_samples(dataset.heldout_path, KIND_OF_QUESTION)
    after = [sample.answer for sample in samples]
    answers = Answers(samples, [""] * 288, after, {"image": swapped_answers(samples, "image", "answer")})
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "loss": {9 - step}}}\n' for step in (1, 2, 3)))
    write_demo_report(tmp_path / "a.html", "Model", tmp_path, answers, Scores.of(answers), Phases(1), num_starts=2)
    text = (tmp_path / "a.html").read_text()
    assert "A tiny Model learns to look<" in text and "resumed in another layout" in text
    assert text.count('class="sample right"') == 24 and ">Loss</div>" in text and ">Held-out loss" not in text
    assert text.count("data:image/png;base64,") == 24


def test_report_shows_wrong_answers_first_and_then_all_kinds_in_turn(dataset):
    samples = load_samples(dataset.heldout_path, KIND_OF_QUESTION)
    after = [sample.answer for sample in samples]
    after[200] = "wrong"
    answers = Answers(samples, [""] * 288, after, {"image": swapped_answers(samples, "image", "answer")})
    shown = samples_to_show(answers)
    assert shown[0].prediction == "wrong"
    assert {KIND_OF_QUESTION[sample.question] for sample in shown[1:4]} == set(QUESTIONS)
    scores = Scores.of(answers)
    assert (scores.before, scores.after) == (0.0, 287 / 288)
    assert not scores.passed, "answers that ignore the image match as well when images are swapped"


def clips_of(path: Path) -> list[Path]:
    return [path.parent / part["audio"] for part in parts_of(path) if part["type"] == "audio"]


def parts_of(path: Path) -> list[dict]:
    return [part for row in read_rows(path) for turn in row["messages"] for part in turn["content"]]


def decoded(path: Path) -> np.ndarray:
    return Clip(path.read_bytes(), path.suffix).samples()


def test_same_seed_synthesises_the_same_clips(sounding, tmp_path):
    again = write_dataset(tmp_path / "again", with_clips(train=()), seed=7)
    other = write_dataset(tmp_path / "other", with_clips(train=()), seed=8)
    assert read_rows(again.heldout_path) == read_rows(sounding.heldout_path) != read_rows(other.heldout_path)
    for path, other_path in zip(clips_of(again.heldout_path), clips_of(sounding.heldout_path), strict=True):
        assert np.array_equal(decoded(path), decoded(other_path))


def test_no_clip_occurs_twice(sounding):
    clips = [*clips_of(sounding.train_path), *clips_of(sounding.heldout_path)]
    assert len(clips) == 2 * 20 + 24 + 60 + 60
    assert len({decoded(path).tobytes() for path in clips}) == len(clips)
    assert {path.suffix for path in clips} == {".wav", ".flac", ".ogg"}


def test_answers_say_which_chord_the_clip_has(sounding):
    """Of the five tones, the two loudest."""
    samples = load_samples(sounding.heldout_path, ALL_KINDS)
    rates = {".wav": 16000, ".flac": 22050, ".ogg": 24000}
    assert sorted(CHORDS.values()) == sorted(combinations(TONES_HERTZ, 2))
    for sample in samples:
        path = sample.media["clip"]
        wave, rate = decoded(path), rates[path.suffix]
        assert 0.29 < len(wave) / rate < 0.61
        power, frequencies = np.abs(np.fft.rfft(wave)) ** 2, np.fft.rfftfreq(len(wave), 1 / rate)
        heard = sorted(TONES_HERTZ, key=lambda tone: -power[np.abs(frequencies / tone - 1) < 0.04].max())[:2]
        assert CHORDS[sample.answers["clip"]] == tuple(sorted(heard))


def test_heldout_questions_about_clips_are_balanced(sounding):
    samples = load_samples(sounding.heldout_path, ALL_KINDS)
    digits, both = (
        [sample.answer for sample in samples if sample.kind == kind] for kind in ("digit", COLOUR_AND_DIGIT)
    )
    assert sorted(digits) == sorted(DIGITS * 6)
    assert sorted(both) == sorted(f"{colour} {digit}" for colour in COLOURS for digit in DIGITS)


def test_every_clip_comes_with_the_question_about_it(sounding):
    rows = read_rows(sounding.train_path)
    kinds_of_parts = [
        [sorted(part["type"] for part in turn["content"]) for turn in row["messages"][::2]] for row in rows
    ]
    assert kinds_of_parts[:8] == [[["image", "text"], ["text"], ["text"]]] * 8
    assert kinds_of_parts[8:28] == [[["audio", "text"]] * 2] * 20
    assert kinds_of_parts[28:] == [[["audio", "image", "text"], ["text"]]] * 24
    firsts = {row["messages"][0]["content"][0]["type"] for row in rows[28:]}
    assert firsts == {"image", "audio"}


def test_swapping_one_medium_leaves_the_other(sounding):
    samples = load_samples(sounding.heldout_path, ALL_KINDS)
    for medium, other in (("image", "clip"), ("clip", "image")):
        swapped = swap(samples, medium)
        for before, after in zip(samples, swapped, strict=True):
            assert (after.media == before.media) == (medium not in before.media)
            assert after.media.get(other) == before.media.get(other)
            assert after.shown.get(other) == before.answers.get(other) and after.answers == before.answers
            assert {*before.shown} == {*before.media}


@pytest.mark.parametrize("ignored", ["image", "clip", None])
def test_a_model_must_use_both_media(sounding, tmp_path, ignored):
    """One that does not use a medium answers as well when that is swapped; nothing else tells."""
    samples = load_samples(sounding.heldout_path, ALL_KINDS)
    after = [sample.answer for sample in samples]
    swaps = {
        medium: swapped_answers(samples, medium, "answer" if medium == ignored else "shown_answer")
        for medium in IMAGES_AND_CLIPS.media
    }
    answers = Answers(samples, [""] * len(samples), after, swaps)
    scores = Scores.of(answers)
    assert scores.passed == (ignored is None)
    for medium, of_medium in scores.media.items():
        assert (of_medium.swapped <= MOST_SWAPPED_MATCH[medium]) == (medium != ignored)
        assert of_medium.follows == 1 or medium == ignored
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n')
    write_demo_report(tmp_path / "a.html", "Model", tmp_path, answers, scores, Phases(1), num_starts=1)
    text = (tmp_path / "a.html").read_text()
    assert "A tiny Model learns to look and listen<" in text and text.count("<audio controls") == 24


def test_one_medium_alone_does_not_pass(sounding):
    """Most questions of the demo are about images: wrong digits alone must be enough to fail."""
    samples = load_samples(sounding.heldout_path, ALL_KINDS)
    deaf = [" ".join({**sample.answers, "clip": "zero"}.values()) for sample in samples]
    many = [HeldoutSample("colour", "?", {"image": Path("a")}, {"image": "red"}, {"image": "red"})] * 9999
    everything, after = [*samples, *many], [*deaf, *["red"] * 9999]
    answers = Answers(everything, after, after, {"clip": Swap(swap(everything, "clip"), after)})
    assert Scores.of(answers).after > 0.9 and not Scores.of(answers).passed
