"""Keep chat templates, which are programs that come with a model, within limits of time and memory.

The start renders small conversations in a process of its own (`template_trial.py`), which ends whatever a template does
to every conversation. While rows are read, a template's loops and macros are ended after some seconds, and what it
writes beside the texts is limited. What is left is a template that only for some rows multiplies strings or calls a
filter with a huge number: nothing in a process ends that.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import CodeType

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template

from megatron_vlm.data import template_trial
from megatron_vlm.errors import ConfigError

TRIAL_SECONDS = 8
"""More than the time that the trial may compute, for machines that are busy."""
ROW_SECONDS = 5
MOST_ADDED_CHARACTERS = template_trial.MOST_CHARACTERS
_MONITORING_TOOL = 4
_EVENTS = sys.monitoring.events.PY_START | sys.monitoring.events.JUMP
_deadline = float("inf")


class TemplateLimitError(TemplateError):
    """A template takes too long for a row."""


def try_template(template: str, hf_path: str) -> None:
    """Render small conversations in a process of its own.

    Args:
        template: the chat template.
        hf_path: the model directory that it comes from.

    Raises:
        ConfigError: that takes too much time or memory, or gives too long a text, or the template is none.
    """
    problem = _trial(template)
    if problem is None:
        try:
            _compile_jinja_template(template)
        except (TemplateError, RecursionError) as error:
            problem = f"cannot be compiled ({error})"
    if problem is not None:
        raise ConfigError(
            f"the chat template of {hf_path} {problem}",
            "model.hf_path",
            "take the chat template that was published with the model",
        )


@lru_cache
def _trial(template: str) -> str | None:
    """Return what is wrong with a template; a process tries each once."""
    command = [sys.executable, "-P", str(Path(template_trial.__file__))]
    try:
        # Lone surrogates cannot be encoded; transformers refuses such a template when it is rendered.
        trial = subprocess.run(
            command, input=template.encode(errors="replace"), capture_output=True, timeout=TRIAL_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"takes more than {TRIAL_SECONDS} seconds for a few words"
    if trial.returncode == 0:
        return None
    if trial.returncode == template_trial.EXIT_MEMORY:
        return f"takes more than {template_trial.MEMORY_BYTES >> 20} MiB for a few words"
    if trial.returncode == template_trial.EXIT_CHARACTERS:
        return f"writes more than {template_trial.MOST_CHARACTERS:,} characters for a few words"
    if trial.returncode < 0:
        return f"takes more than {template_trial.BUSY_SECONDS} seconds for a few words, or crashes"
    reason = trial.stderr.decode(errors="replace").strip().splitlines()
    return f"cannot be tried ({reason[-1] if reason else f'exit code {trial.returncode}'})"


@contextmanager
def limit_rendering(template: str) -> Iterator[None]:
    """Raise `TemplateLimitError` in the template's code when rendering inside takes longer than `ROW_SECONDS`."""
    global _deadline
    _watch(template)
    _deadline = time.monotonic() + ROW_SECONDS
    try:
        yield
    finally:
        _deadline = float("inf")


@lru_cache
def _watch(template: str) -> None:
    """Have the interpreter call `_check_time` at every turn of the template's loops and every call of its macros."""
    if sys.monitoring.get_tool(_MONITORING_TOOL) is None:
        sys.monitoring.use_tool_id(_MONITORING_TOOL, __name__)
        for event in (sys.monitoring.events.PY_START, sys.monitoring.events.JUMP):
            sys.monitoring.register_callback(_MONITORING_TOOL, event, _check_time)
    compiled = _compile_jinja_template(template)
    for function in (compiled.root_render_func, *compiled.blocks.values()):
        for code in _code_inside(function.__code__):
            sys.monitoring.set_local_events(_MONITORING_TOOL, code, _EVENTS)


def _code_inside(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code_inside(constant)


def _check_time(*_: object) -> None:
    if time.monotonic() > _deadline:
        raise TemplateLimitError(f"it takes more than {ROW_SECONDS} seconds")
