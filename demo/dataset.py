"""Writes the data sets of the demos: chats about drawn images, about synthesised clips, and about both.

A training sample is a chat of several questions; a held-out sample is one question. Samples cycle through all
combinations, so that answers are balanced: without looking, 22 % of those about images can be guessed.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo import draw, sounds
from demo.draw import Scene, all_scenes
from demo.sounds import DIGITS

COLOUR_AND_DIGIT = "colour and digit"
CLIPS_PER_CHAT = 2


@dataclass(frozen=True)
class Chat:
    """What a sample asks and of what, before anything is drawn.

    Attributes:
        kinds: kinds of its questions, which come in random order.
        scene: what its image shows, which comes with the first question; None has no image.
        digits: what its clips say; each question brings one, as long as there are any.
    """

    kinds: tuple[str, ...]
    scene: Scene | None = None
    digits: tuple[str, ...] = ()

    def answer(self, kind: str, turn: int) -> str:
        """Returns the answer to the question of one turn: of its latest clip, or its image, or both."""
        digit = self.digits[min(turn, len(self.digits) - 1)] if self.digits else ""
        if kind == "digit":
            return digit
        assert self.scene is not None  # every other kind asks about an image
        if kind == COLOUR_AND_DIGIT:
            return f"{self.scene.colour} {digit}"
        return self.scene.answer(kind)


Rounds = tuple[int, Callable[[random.Random], list[Chat]]]
"""A number of samples, and what makes a list of chats in which all answers are equally frequent."""


@dataclass(frozen=True)
class Task:
    """What a demo's model learns.

    Attributes:
        questions: wordings of each kind of question.
        media: "image", and "clip" where there are clips.
        train: the training samples, several sorts after each other.
        heldout: the held-out samples.
    """

    questions: dict[str, tuple[str, ...]]
    media: tuple[str, ...]
    train: tuple[Rounds, ...]
    heldout: tuple[Rounds, ...]

    def kind_of_question(self) -> dict[str, str]:
        """Returns what each question asks about."""
        return {question: kind for kind, questions in self.questions.items() for question in questions}

    def texts(self) -> list[str]:
        """Returns what a tokenizer learns from: every question, and every answer as often as it is balanced."""
        texts = [question for questions in self.questions.values() for question in questions]
        texts += [scene.answer(kind) for scene in all_scenes() for kind in draw.QUESTIONS]
        if "clip" in self.media:
            texts += [answer for digit in DIGITS for colour in draw.COLOURS for answer in (digit, f"{colour} {digit}")]
        return texts


@dataclass(frozen=True)
class DatasetSummary:
    """Where the data set lies and how many samples it has."""

    train_path: Path
    heldout_path: Path
    train_samples: int
    heldout_samples: int


def write_dataset(
    folder: Path, task: Task, seed: int, progress: Callable[[int, int], None] | None = None
) -> DatasetSummary:
    """Writes `train.jsonl` and `heldout.jsonl` with their media; no image or clip of the data set occurs twice.

    Args:
        folder: Receives the two files and the folders `images` and `clips`.
        task: What is asked, and how often.
        seed: The same seed writes the same samples.
        progress: Called now and then with (samples written, samples in all).
    """
    seen: set[str] = set()
    counts = {split: sum(count for count, _ in rounds) for split, rounds in _splits(task)}
    paths, written = {}, 0
    # Held-out first: the set of what was seen then keeps everything later in training apart from it.
    for split, rounds in _splits(task):
        rng = random.Random(f"{seed}:{split}")
        for name in ("images", "clips") if "clip" in task.media else ("images",):
            (folder / name / split).mkdir(parents=True, exist_ok=True)
        rows = []
        for chat in _chats(rounds, rng):
            rows.append(_write_chat(folder, f"{split}/{len(rows):05d}", chat, task.questions, rng, seen))
            written += 1
            if progress and (written % 100 == 0 or written == sum(counts.values())):
                progress(written, sum(counts.values()))
        paths[split] = folder / f"{split}.jsonl"
        paths[split].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DatasetSummary(paths["train"], paths["heldout"], counts["train"], counts["heldout"])


def chat_row(turns: Sequence[tuple[list[dict[str, Any]], str, str]]) -> dict:
    """Returns one JSONL row of turns of (media parts, question, answer)."""
    messages = []
    for media, question, answer in turns:
        messages.append({"role": "user", "content": [*media, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"messages": messages}


def _splits(task: Task) -> list[tuple[str, tuple[Rounds, ...]]]:
    return [("heldout", task.heldout), ("train", task.train)]


def _chats(sorts: Sequence[Rounds], rng: random.Random) -> Iterator[Chat]:
    """Iterates over shuffled rounds of every sort, the last one cut to the sort's number."""
    for count, make_round in sorts:
        chats: list[Chat] = []
        while len(chats) < count:
            chats += make_round(rng)
        yield from chats[:count]


def _write_chat(
    folder: Path, name: str, chat: Chat, questions: dict[str, tuple[str, ...]], rng: random.Random, seen: set[str]
) -> dict:
    """Draws what the chat is about, writes it to files of that name, and returns the row."""
    media: list[list[dict[str, Any]]] = [[] for _ in chat.kinds]
    if chat.scene is not None:
        scene = chat.scene
        image = _unseen(lambda: draw.render(scene, rng), draw.pixel_digest, seen)
        path = f"images/{name}.png"
        image.save(folder / path, compress_level=1)
        media[0].append({"type": "image", "image": path})
    for turn, digit in enumerate(chat.digits):
        clip = _unseen(lambda digit=digit: sounds.synthesise(digit, rng), sounds.clip_digest, seen)
        path = f"clips/{name}_{turn}{clip.suffix}"
        (folder / path).write_bytes(clip.encoded)
        media[turn].append({"type": "audio", "audio": path})
    asked = rng.sample(chat.kinds, len(chat.kinds))
    turns = [
        (
            rng.sample(parts, len(parts)) if len(parts) > 1 else parts,
            rng.choice(questions[kind]),
            chat.answer(kind, turn),
        )
        for turn, (kind, parts) in enumerate(zip(asked, media, strict=True))
    ]
    return chat_row(turns)


def _unseen[Thing](make: Callable[[], Thing], digest: Callable[[Thing], str], seen: set[str]) -> Thing:
    """Makes things until one is new to the data set (practically the first)."""
    while True:
        thing = make()
        found = digest(thing)
        if found not in seen:
            seen.add(found)
            return thing


def image_chats(rng: random.Random) -> list[Chat]:
    """Returns a chat of three questions about every scene."""
    chats = [Chat(tuple(draw.QUESTIONS), scene) for scene in all_scenes()]
    return rng.sample(chats, len(chats))


def image_questions(rng: random.Random) -> list[Chat]:
    """Returns every question about every scene."""
    chats = [Chat((kind,), scene) for scene in all_scenes() for kind in draw.QUESTIONS]
    return rng.sample(chats, len(chats))


def clip_chats(rng: random.Random) -> list[Chat]:
    """Returns chats of a few clips, one after the other."""
    columns = [rng.sample(DIGITS, len(DIGITS)) for _ in range(CLIPS_PER_CHAT)]
    return [Chat(("digit",) * CLIPS_PER_CHAT, digits=digits) for digits in zip(*columns, strict=True)]


def clip_questions(rng: random.Random) -> list[Chat]:
    """Returns a question about a clip of every digit."""
    return [Chat(("digit",), digits=(digit,)) for digit in rng.sample(DIGITS, len(DIGITS))]


def joint_chats(rng: random.Random) -> list[Chat]:
    """Returns a chat about every scene beside a clip: one question is about both, another about the image."""
    scenes = all_scenes()
    return [
        Chat((COLOUR_AND_DIGIT, rng.choice(("shape", "place"))), scene, (rng.choice(DIGITS),))
        for scene in rng.sample(scenes, len(scenes))
    ]


def joint_questions(rng: random.Random) -> list[Chat]:
    """Returns a question about both for every colour with every digit."""
    chats = [
        Chat((COLOUR_AND_DIGIT,), Scene(colour, rng.choice(draw.SHAPES), rng.choice(tuple(draw.PLACES))), (digit,))
        for colour in draw.COLOURS
        for digit in DIGITS
    ]
    return rng.sample(chats, len(chats))


IMAGES = Task(
    questions=draw.QUESTIONS,
    media=("image",),
    train=((32 * 96, image_chats),),
    heldout=((3 * 96, image_questions),),
)
IMAGES_AND_CLIPS = Task(
    questions={
        **draw.QUESTIONS,
        **sounds.QUESTIONS,
        COLOUR_AND_DIGIT: (
            "Which colour do you see, and which digit do you hear?",
            "What colour is the shape, and what number is said?",
        ),
    },
    media=("image", "clip"),
    train=((16 * 96, image_chats), (48 * 10, clip_chats), (11 * 96, joint_chats)),
    heldout=((3 * 96, image_questions), (6 * 10, clip_questions), (60, joint_questions)),
)
