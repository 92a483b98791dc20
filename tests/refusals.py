"""What a user reads when a start is refused."""

from __future__ import annotations

import re


def check_refusal(text: str) -> str:
    """Return the text of an error, of which there must be one line, or the number of problems and a line for each."""
    first, *problems = text.strip().splitlines()
    assert first.endswith(f"{len(problems)} problems:") if problems else " problems" not in first, text
    assert all(re.match(rf"  \({number}\) \S", line) for number, line in enumerate(problems, 1)), text
    return text.strip()
