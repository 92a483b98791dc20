"""Draws the data set of the demo: one coloured shape per image, and questions about its colour, shape and place.

A training sample is a chat about one image with all three questions in random order; a held-out sample is one question.
Samples cycle through all combinations, so that answers are balanced: without looking, 22 % can be guessed.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "red": (216, 48, 44),
    "green": (46, 158, 68),
    "blue": (44, 92, 214),
    "yellow": (240, 196, 32),
    "purple": (140, 60, 176),
    "black": (32, 32, 36),
}
SHAPES = ("circle", "square", "triangle", "star")
# Column and row of a 3 x 3 grid: one cell is what one image token of the demo's model covers.
PLACES = {"top left": (0, 0), "top right": (2, 0), "bottom left": (0, 2), "bottom right": (2, 2)}
QUESTIONS = {
    "colour": ("What colour is the shape?", "Which colour do you see?"),
    "shape": ("What shape is it?", "Which shape do you see?"),
    "place": ("Where is the shape?", "In which corner is it?"),
}
IMAGE_SIZE_PIXELS = 96
_OVERSAMPLING = 4  # drawn larger and averaged down, so that edges are smooth


@dataclass(frozen=True)
class Scene:
    """What an image shows; the fields are the kinds of questions."""

    colour: str
    shape: str
    place: str

    def answer(self, kind: str) -> str:
        return getattr(self, kind)


@dataclass(frozen=True)
class DatasetSummary:
    """Where the data set lies and how many samples it has."""

    train_path: Path
    heldout_path: Path
    train_samples: int
    heldout_samples: int


def all_scenes() -> list[Scene]:
    """Returns every combination of colour, shape and place (6 x 4 x 4 = 96)."""
    return [Scene(*combination) for combination in product(COLOURS, SHAPES, PLACES)]


def draw_dataset(
    folder: Path,
    train_samples: int,
    heldout_samples: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> DatasetSummary:
    """Draws `train.jsonl` and `heldout.jsonl` with their images; no two images of the data set have equal pixels.

    Args:
        folder: Receives the two files and the folders `images/train` and `images/heldout`.
        train_samples: Number of chats of three questions; multiples of 96 are perfectly balanced.
        heldout_samples: Number of single questions; multiples of 288 are perfectly balanced.
        seed: The same seed draws the same files.
        progress: Called now and then with (images drawn, images in all).
    """
    seen_pixels: set[str] = set()
    total = train_samples + heldout_samples
    single_questions = [(scene, (kind,)) for scene in all_scenes() for kind in QUESTIONS]
    whole_chats = [(scene, tuple(QUESTIONS)) for scene in all_scenes()]
    paths = {}
    # Held-out first: the set of seen images then keeps every later train image apart from it.
    for split, count, contents in (
        ("heldout", heldout_samples, single_questions),
        ("train", train_samples, whole_chats),
    ):
        rng = random.Random(f"{seed}:{split}")
        (folder / "images" / split).mkdir(parents=True, exist_ok=True)
        rows = []
        for index, (scene, kinds) in enumerate(_shuffled_rounds(contents, count, rng)):
            name = f"images/{split}/{index:05d}.png"
            _draw_unseen(scene, rng, seen_pixels).save(folder / name, compress_level=1)
            asked = rng.sample(kinds, len(kinds))
            rows.append(chat_row(name, [(rng.choice(QUESTIONS[kind]), scene.answer(kind)) for kind in asked]))
            if progress and (len(seen_pixels) % 100 == 0 or len(seen_pixels) == total):
                progress(len(seen_pixels), total)
        paths[split] = folder / f"{split}.jsonl"
        paths[split].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DatasetSummary(paths["train"], paths["heldout"], train_samples, heldout_samples)


def chat_row(image_name: str, questions_and_answers: Sequence[tuple[str, str]]) -> dict:
    """Returns one JSONL row: user and assistant in turn, the image in the first user turn."""
    messages = []
    for turn, (question, answer) in enumerate(questions_and_answers):
        image = [{"type": "image", "image": image_name}] if turn == 0 else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"messages": messages}


def pixel_digest(image: Image.Image) -> str:
    """Returns a hash of the pixels, whatever the file format."""
    return hashlib.sha256(repr((image.mode, image.size)).encode() + image.tobytes()).hexdigest()


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """Returns the scene as an RGB image; `rng` varies position, size, angle, tint and background."""
    scale = _OVERSAMPLING
    image = Image.new("RGB", (IMAGE_SIZE_PIXELS * scale,) * 2, _vary((238, 236, 230), 12, rng))
    column, row = PLACES[scene.place]
    cell_pixels = IMAGE_SIZE_PIXELS / 3
    radius = rng.uniform(13.5, 15.5)
    centre_x, centre_y = ((cell + 0.5) * cell_pixels + rng.uniform(-1.5, 1.5) for cell in (column, row))
    colour = _vary(COLOURS[scene.colour], 16, rng)
    draw = ImageDraw.Draw(image)
    if scene.shape == "circle":
        box = (centre_x - radius, centre_y - radius, centre_x + radius, centre_y + radius)
        draw.ellipse([value * scale for value in box], fill=colour)
    else:
        outline = _outline(scene.shape, rng.uniform(-0.08, 0.08))
        points = [((centre_x + radius * x) * scale, (centre_y + radius * y) * scale) for x, y in outline]
        draw.polygon(points, fill=colour)
    return image.reduce(scale)


def _shuffled_rounds[Content](contents: Sequence[Content], count: int, rng: random.Random) -> list[Content]:
    """Returns whole shuffled rounds through all contents, cut to `count`."""
    rounds: list[Content] = []
    while len(rounds) < count:
        rounds += rng.sample(contents, len(contents))
    return rounds[:count]


def _draw_unseen(scene: Scene, rng: random.Random, seen_pixels: set[str]) -> Image.Image:
    """Draws until the pixels are new to the data set (practically the first try)."""
    while True:
        image = render(scene, rng)
        digest = pixel_digest(image)
        if digest not in seen_pixels:
            seen_pixels.add(digest)
            return image


def _outline(shape: str, tilt: float) -> list[tuple[float, float]]:
    """Returns the corners of a shape in the unit circle, rotated by `tilt` radians."""
    corners, inner_radius = {"square": (4, None), "triangle": (3, None), "star": (4, 0.45)}[shape]
    steps = corners if inner_radius is None else 2 * corners
    start = tilt + (math.pi / 4 if shape == "square" else -math.pi / 2)
    points = []
    for step in range(steps):
        radius = inner_radius if inner_radius is not None and step % 2 else 1.0
        angle = start + 2 * math.pi * step / steps
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    return points


def _vary(colour: tuple[int, int, int], amount: int, rng: random.Random) -> tuple[int, ...]:
    """Shifts each channel by up to `amount`, clipped to 0..255."""
    return tuple(min(255, max(0, channel + rng.randint(-amount, amount))) for channel in colour)
