"""Draws the images of the demos: one coloured shape each, of which colour, shape and place are asked."""

import hashlib
import math
import random
from dataclasses import dataclass
from itertools import product

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


def all_scenes() -> list[Scene]:
    """Returns every combination of colour, shape and place (6 x 4 x 4 = 96)."""
    return [Scene(*combination) for combination in product(COLOURS, SHAPES, PLACES)]


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
