"""Random changes of JSON values and of bytes, and the limits within which everything must be refused or taken.

Every change comes from a seed that the name of the failing case shows.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MOST_SECONDS = 10
MOST_BYTES = 2**30
LONGEST_LINE = 1500

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3.5, 10**30, -(2**63), float("inf"), float("nan"), "", " ", "x", "0", "null", "[]",
    "<image>", "<video>", "<audio>", "\ud83d", "\x00", "a" * 5000, "../../etc/passwd", "/dev/zero", "http://[",
    "data:,", [], {}, [[]], [None], {"": None}, {"a": {"b": {}}}, [1, 2, 3],
]  # fmt: skip
NAMES = ["", *"type image images audio text loss weight role __proto__ index".split(), "\ud83d", "a" * 300]


def mutated(value: Any, rng: random.Random) -> Any:
    """Return a copy of a JSON value with one change, or two."""
    changed = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 2))):
        owner, key = rng.choice(list(_places(changed))[1:] or [(changed, 0)])
        _change(owner, key, rng)
    return changed[0]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (list or object, index or key) inside a value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _change(owner: Any, key: Any, rng: random.Random) -> None:
    kind = rng.choice(("replace", "replace", "replace", "delete", "rename", "repeat", "wrap", "stretch"))
    current = owner[key]
    if kind == "delete" and (isinstance(owner, dict) or len(owner) > 1):
        del owner[key]
    elif kind == "rename" and isinstance(owner, dict):
        owner[rng.choice([*NAMES, f"{key}s", str(key).upper()])] = owner.pop(key)
    elif kind == "repeat" and isinstance(owner, list):
        owner.insert(rng.randrange(len(owner) + 1), copy.deepcopy(current))
    elif kind == "wrap":
        owner[key] = rng.choice(([current], {"value": current}, [current, current]))
    elif kind == "stretch" and isinstance(current, int | float) and not isinstance(current, bool):
        owner[key] = rng.choice((-current, current * 2, current + 1, current * 10**9, current / 3))
    elif kind == "stretch" and isinstance(current, str):
        owner[key] = rng.choice((current * 50, current[:-1], current.upper(), f" {current}\n"))
    else:
        owner[key] = copy.deepcopy(rng.choice(VALUES))


def damaged(data: bytes, rng: random.Random, head: int = 200) -> bytes:
    """Return bytes with bits flipped, most of them near the start, or pieces cut out, repeated or added."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not changed:
            break
        place = rng.randrange(min(len(changed), head) if rng.random() < 0.6 else len(changed))
        kind = rng.choice(("flip", "flip", "byte", "cut", "end", "repeat", "number"))
        if kind == "flip":
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == "byte":
            changed[place] = rng.choice((0, 0xFF, rng.randrange(256)))
        elif kind == "cut":
            del changed[place : place + rng.randint(1, 40)]
        elif kind == "end":
            del changed[rng.randrange(len(changed)) :]
        elif kind == "repeat":
            changed[place:place] = changed[place : place + rng.randint(1, 40)]
        else:
            number = rng.choice((0, 1, 2**16, 2**31 - 1, 2**32 - 1, 2**63 - 1))
            changed[place : place + 8] = number.to_bytes(8, rng.choice(("little", "big")))
    return bytes(changed)


@contextmanager
def within_limits(case: str) -> Iterator[None]:
    """Refuse what takes longer than 10 s or a GiB more than is held before."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    began = time.monotonic()
    yield
    seconds, grown = time.monotonic() - began, _status("VmHWM") - before
    assert seconds < MOST_SECONDS, f"{case}: {seconds:.1f} s"
    assert grown < MOST_BYTES, f"{case}: {grown / 2**20:.0f} MiB"


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def check_line(case: str, text: str) -> None:
    """One line of bounded length, which a terminal can show."""
    assert text.strip() and len(text) < LONGEST_LINE and "\n" not in text, f"{case}: {text[:3000]!r}"
    assert "Traceback" not in text, f"{case}: {text}"
    text.encode()
