"""Rows as users write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def image(path: str | Path) -> dict[str, str]:
    return {"type": "image", "image": str(path)}


def video(given: str | list[str], fps: float | None = None) -> dict[str, Any]:
    return {"type": "video", "video": given} | ({} if fps is None else {"fps": fps})


def audio(path: str | Path) -> dict[str, str]:
    return {"type": "audio", "audio": str(path)}


def user(*parts: dict[str, Any] | str) -> dict[str, Any]:
    return {"role": "user", "content": [text(part) if isinstance(part, str) else part for part in parts]}


def assistant(*parts: dict[str, str] | str) -> dict[str, Any]:
    return {"role": "assistant", "content": [text(part) if isinstance(part, str) else part for part in parts]}


def row(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages)}


# What every family's template takes; the pictures are those of `references.draw_pictures`.
CONVERSATIONS = {
    "text": [user("Hello, how are you?"), assistant("I am fine.")],
    "plain strings": [{"role": "user", "content": " Hello "}, {"role": "assistant", "content": " fine\n"}],
    "one image": [user(image("0.png"), "What colour?"), assistant("Red.")],
    "large image": [user(image("photo.jpg"), "What?"), assistant("A photo.")],
    "transparent": [user(image("glass.png"), "What?"), assistant("Glass.")],
    "system": [{"role": "system", "content": "Be kind."}, user(image("2.png")), assistant("Yes.")],
    "system parts": [{"role": "system", "content": [text("Be kind.")]}, user("Hi"), assistant("Yes.")],
    "several turns": [user("a"), assistant("b"), user(image("1.png"), "c"), assistant("d"), user("e"), assistant("f")],
    "last turn is the user's": [user("a"), assistant("b"), user("c")],
    "answer in parts": [user("a"), assistant(" b ", "c\n")],
}


def numbered_rows(count: int, name: str = "") -> list[dict[str, Any]]:
    """Rows that tell their number; every third has an image."""
    return [
        row(
            user(*([image(f"{number % 8}.png")] if number % 3 == 0 else []), f"{name}{number}?"),
            assistant(f"{number}."),
        )
        for number in range(count)
    ]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    """Write rows, one per line; strings and bytes are written as they are. Returns the path as text."""
    lines = [item if isinstance(item, str | bytes) else json.dumps(item, ensure_ascii=False) for item in rows]
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return str(path)
