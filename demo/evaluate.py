"""Answers the held-out questions with plain transformers and counts exact matches; nothing of megatron_vlm is used."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

MAX_ANSWER_TOKENS = 6  # the longest answer has two, and an end of turn


@dataclass(frozen=True)
class HeldoutSample:
    """One question about one image.

    `answer` is what the image of the data set shows; `shown_answer` is what the image at `image_path` shows, another
    one once images are swapped.
    """

    image_path: Path
    question: str
    answer: str
    shown_answer: str
    kind: str


def load_samples(path: Path, kind_of_question: dict[str, str]) -> list[HeldoutSample]:
    """Reads the chat rows of a held-out file.

    Args:
        path: JSONL file; image paths in it are relative to its folder.
        kind_of_question: What each question text asks about.
    """
    samples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        user, assistant = json.loads(line)["messages"]
        image, question = user["content"]
        answer = assistant["content"][0]["text"]
        kind = kind_of_question[question["text"]]
        samples.append(HeldoutSample(path.parent / image["image"], question["text"], answer, answer, kind))
    return samples


def swap_images(samples: Sequence[HeldoutSample]) -> list[HeldoutSample]:
    """Gives every question the image of the next sample of its kind; questions, answers and order stay.

    Images move within a kind, so that what the swapped image shows is known as well. A model that reads the image
    then matches `answer` only by coincidence, and `shown_answer` as often as before.
    """
    of_kind = defaultdict(list)
    for position, sample in enumerate(samples):
        of_kind[sample.kind].append(position)
    swapped = list(samples)
    for positions in of_kind.values():
        for position, donor in zip(positions, positions[1:] + positions[:1], strict=True):
            swapped[position] = replace(
                samples[position], image_path=samples[donor].image_path, shown_answer=samples[donor].answer
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
    """Returns the fraction that the commonest answer to each kind of question gets: what can be had without looking."""
    answers_of_kind = defaultdict(Counter)
    for sample in samples:
        answers_of_kind[sample.kind][sample.answer] += 1
    return sum(counter.most_common(1)[0][1] for counter in answers_of_kind.values()) / len(samples)


def _question_turn(sample: HeldoutSample) -> list[dict]:
    """Returns the chat that asks the question, with the decoded image."""
    with Image.open(sample.image_path) as image:
        pixels = image.convert("RGB")
    return [
        {"role": "user", "content": [{"type": "image", "image": pixels}, {"type": "text", "text": sample.question}]}
    ]
