"""Answers the held-out questions with plain transformers and counts exact matches; nothing of megatron_vlm is used."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from demo.sounds import DIGITS

MAX_ANSWER_TOKENS = 6  # the longest answer has two, and an end of turn


@dataclass(frozen=True)
class HeldoutSample:
    """One question about an image, a clip, or both.

    Attributes:
        kind: what it asks about.
        question: its words.
        media: file of its "image" and its "clip", as far as it has them.
        answers: part of the data set's answer that each of them gives; an answer says first what is seen.
        shown: the same of the files in `media`, other parts once these are swapped.
    """

    kind: str
    question: str
    media: Mapping[str, Path]
    answers: Mapping[str, str]
    shown: Mapping[str, str]

    @property
    def answer(self) -> str:
        """The data set's answer."""
        return " ".join(self.answers.values())

    @property
    def shown_answer(self) -> str:
        """The answer that is true of the files in `media`."""
        return " ".join(self.shown.values())


def load_samples(path: Path, kind_of_question: Mapping[str, str]) -> list[HeldoutSample]:
    """Reads the chat rows of a held-out file.

    Args:
        path: JSONL file; paths of images and clips in it are relative to its folder.
        kind_of_question: What each question text asks about.
    """
    samples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        user, assistant = json.loads(line)["messages"]
        *parts, question = user["content"]
        paths = {part["type"]: path.parent / part[part["type"]] for part in parts}
        media = {medium: paths[kind] for medium, kind in (("image", "image"), ("clip", "audio")) if kind in paths}
        words = assistant["content"][0]["text"].split()
        heard = [word for word in words if word in DIGITS]
        seen = [word for word in words if word not in DIGITS]
        answers = {medium: " ".join({"image": seen, "clip": heard}[medium]) for medium in media}
        samples.append(HeldoutSample(kind_of_question[question["text"]], question["text"], media, answers, answers))
    return samples


def swap(samples: Sequence[HeldoutSample], medium: str) -> list[HeldoutSample]:
    """Gives every sample with such a medium that of the next sample of its kind; all else stays, the others whole.

    Media move within a kind, so that what is shown then is known as well. A model that looks (listens) then matches
    `answer` only by coincidence, and `shown_answer` as often as before.
    """
    of_kind = defaultdict(list)
    for position, sample in enumerate(samples):
        if medium in sample.media:
            of_kind[sample.kind].append(position)
    swapped = list(samples)
    for positions in of_kind.values():
        for position, donor in zip(positions, positions[1:] + positions[:1], strict=True):
            sample, giver = samples[position], samples[donor]
            swapped[position] = replace(
                sample,
                media={**sample.media, medium: giver.media[medium]},
                shown={**sample.shown, medium: giver.answers[medium]},
            )
    return swapped


def answer_questions(
    model_folder: Path,
    samples: Sequence[HeldoutSample],
    batch_size: int = 72,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Returns the model's greedy answer to every sample.

    Args:
        model_folder: Hugging Face directory with model, tokenizer and processor.
        progress: Called after every batch with (questions answered, questions in all).
    """
    model = AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(model_folder)
    answers: list[str] = []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        inputs = processor.apply_chat_template(
            [_question_turn(sample) for sample in batch],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [text.strip() for text in texts]
        if progress:
            progress(len(answers), len(samples))
    return answers


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Returns the fraction of answers that equal the expected ones, letter for letter."""
    return sum(answer == truth for answer, truth in zip(answers, expected, strict=True)) / len(expected)


def best_blind_guess(samples: Sequence[HeldoutSample]) -> float:
    """Returns the fraction that the commonest answer to each kind of question gets: what can be had without media."""
    answers_of_kind = defaultdict(Counter)
    for sample in samples:
        answers_of_kind[sample.kind][sample.answer] += 1
    return sum(counter.most_common(1)[0][1] for counter in answers_of_kind.values()) / len(samples)


def _question_turn(sample: HeldoutSample) -> list[dict]:
    """Returns the chat that asks the question, with the decoded image and the path of the clip."""
    content = []
    if "image" in sample.media:
        with Image.open(sample.media["image"]) as image:
            content.append({"type": "image", "image": image.convert("RGB")})
    if "clip" in sample.media:
        content.append({"type": "audio", "audio": str(sample.media["clip"])})
    return [{"role": "user", "content": [*content, {"type": "text", "text": sample.question}]}]
