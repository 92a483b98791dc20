"""Render small conversations with a chat template, given on stdin, within limits of time and memory.

A process of its own, because nothing inside a process ends a template that multiplies a string by a billion. It imports
nothing but Jinja, so that it starts quickly, and defines what transformers' templates may use; that a template fails is
none of its business, only that it ends. It is run by `template_limits.py`.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 2**30
BUSY_SECONDS = 3
MOST_CHARACTERS = 10**6
EXIT_MEMORY, EXIT_CHARACTERS = 11, 12
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


class GenerationTag(Extension):
    """Renders what stands between generation tags."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Any) -> Any:
        """Return the statements up to the end tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def conversations() -> list[list[dict[str, Any]]]:
    """Return conversations of strings and of parts, short and with every role."""
    short, long = ("user", "assistant"), ("system", "user", "assistant", "user", "assistant")
    return [
        [{"role": role, "content": content} for role in roles]
        for roles in (short, long)
        for content in ("a", [{"type": "text", "text": "a"}])
    ]


def main() -> int:
    """Render the template; return 0, or how it went past a limit."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (BUSY_SECONDS, BUSY_SECONDS))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **options)
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: form}
    try:
        template = environment.from_string(sys.stdin.read())
    except MemoryError:
        return EXIT_MEMORY
    except Exception:
        return 0
    for messages in conversations():
        try:
            rendered = template.render(messages=messages, tools=None, add_generation_prompt=False, **TOKENS)
        except MemoryError:
            return EXIT_MEMORY
        except Exception:
            continue
        if len(rendered) > MOST_CHARACTERS:
            return EXIT_CHARACTERS
    return 0


def _raise(message: str) -> None:
    raise TemplateError(message)


if __name__ == "__main__":
    sys.exit(main())
