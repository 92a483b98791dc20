"""Rows as users write them: text alone, one image, images of different sizes, videos, and two turns."""

from __future__ import annotations

from typing import Any

from tests.data.rows import assistant, audio, image, row, user, video

GLOBAL_BATCH = 8
# Height and width of "0.png", "1.png", ...
IMAGE_SIZES = ((16, 16), (40, 24), (9, 31), (20, 20), (20, 20), (20, 20))

Rows = tuple[dict[str, Any], ...]
# Unequal answers, so that a mean of means is far from the mean over label tokens. Rows 0 and 4 are the share of one of
# four data ranks, which so has no image at all.
MIXED_ROWS: Rows = (
    row(user("Hello, how are you today?"), assistant("I am fine, thank you. How are you?")),
    row(user(image("0.png"), "What colour is the shape?"), assistant("red")),
    row(user(image("1.png"), image("2.png"), "Describe these."), assistant("A red circle, then three squares.")),
    row(user("Answer with one word."), assistant("Yes")),
    row(user("Hi"), assistant("Hello there."), user("Where is the circle?"), assistant("It is at the top left of it.")),
    row(user("Is it ", image("3.png"), " or ", image("0.png"), "?"), assistant("left")),
    row(user(image("2.png"), "How many squares are there?"), assistant("There are three squares, I am sure of it.")),
    row(user(image("1.png")), assistant("blue"), user("And now?", image("3.png")), assistant("yellow or green")),
)
FRAMES = ["3.png", "4.png", "5.png"]
# The same with a video beside an image and one alone, of an odd number of frames.
VIDEO_ROWS: Rows = (
    *MIXED_ROWS[:5],
    row(user("Is it ", video(FRAMES[:2]), " or ", image("1.png"), "?"), assistant("left")),
    row(user(video(FRAMES, fps=2), "How many squares are there?"), assistant("There are three squares, I am sure.")),
    *MIXED_ROWS[7:],
)
# Seconds of "0.wav", "1.wav", ...
SOUND_LENGTHS = (0.31, 0.17, 0.42)
# The same with clips of different lengths, of which some stand beside an image and one in another's turn.
AUDIO_ROWS: Rows = (
    VIDEO_ROWS[0],
    row(user(image("0.png"), audio("0.wav"), "What colour is the shape?"), assistant("red")),
    row(user("What is said in ", audio("1.wav"), " and ", audio("2.wav"), "?"), assistant("Three, then four.")),
    *VIDEO_ROWS[3:5],
    VIDEO_ROWS[5],
    row(user(audio("2.wav")), assistant("It is four."), user("And here?", audio("0.wav")), assistant("seven")),
    VIDEO_ROWS[7],
)
TEXT_ROWS: Rows = tuple(
    row(user(f"Say the colour {count} times."), assistant(" ".join(["red", "green", "blue"] * count)))
    for count in (1, 4, 2, 1, 3, 2, 1, 4)
)
