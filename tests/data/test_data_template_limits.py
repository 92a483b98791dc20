"""Chat templates that do not end, fill the memory, or fail in ways that no template should."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.data import template_limits
from megatron_vlm.data.prompts import PromptBuilder
from megatron_vlm.data.rules import PromptRules
from megatron_vlm.errors import DataError
from tests.data.references import encode, refusal, trained_text
from tests.data.tiny_processor import QWEN3_VL_GENERATION_TEMPLATE, QWEN3_VL_TEMPLATE, build_qwen_processor
from tests.sizes import full

Build = Callable[[str], Path]
LOOPS = "{%- for a in range(99999) -%}{%- for b in range(99999) -%}{%- endfor -%}{%- endfor -%}"
MACRO = "{%- macro again(n) -%}{{- again(n + 1) -}}{%- endmacro -%}{{- again(0) -}}"
SLOW = "seconds for a few words"
ENDLESS = {
    "loops": (LOOPS, SLOW),
    "a huge string": ("{%- set x = 'x' * (10 ** 10 + messages | length) -%}", "takes more than 1024 MiB"),
    "a folded constant": ("{%- set x = 'x' * 10 ** 10 -%}", "takes more than 1024 MiB"),
    "doubling": (
        "{%- set x = namespace(s='x') -%}{%- for n in range(60) -%}{%- set x.s = x.s ~ x.s -%}{%- endfor -%}",
        "takes more than 1024 MiB",
    ),
    "a huge number": ("{%- set x = (9 ** 9 + messages | length) ** (9 ** 9) -%}", SLOW),
    "a filter": ("{%- set x = 'x' | center(10 ** 10) -%}", "takes more than 1024 MiB"),
    "a filter's loop": ("{%- set x = [1] | slice(10 ** 10) | list -%}", SLOW),
    "a long text": ("{{- 'x' * 2000000 -}}", "writes more than 1,000,000 characters"),
    "no template": ("{%- if -%}", r"cannot be compiled (Expected an expression"),
    "too deep": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "cannot be compiled ("),
}
SMALL = ("loops", "a huge string", "a long text", "no template", "too deep")


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Writes a directory whose template begins with a text."""

    def make(text: str) -> Path:
        build_qwen_processor(tmp_path / "model")
        (tmp_path / "model" / "chat_template.jinja").write_text(text + QWEN3_VL_TEMPLATE)
        return tmp_path / "model"

    return make


@pytest.mark.parametrize("name", [name if name in SMALL else full(name) for name in ENDLESS])
def test_templates_that_do_not_end(
    build: Build, qwen_rules: PromptRules, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    text, reason = ENDLESS[name]
    if reason == SLOW:
        monkeypatch.setattr(template_limits, "TRIAL_SECONDS", 1)
    began = time.perf_counter()
    refused = refusal(build(text), qwen_rules)
    assert time.perf_counter() - began < 10
    assert reason in refused and "published with the model" in refused and len(refused) < 1000


@pytest.mark.parametrize("text", [MACRO, "{{- 1 / 0 -}}", full("{{- messages[9].content.x.y -}}")])
def test_templates_that_fail(build: Build, qwen_rules: PromptRules, text: str) -> None:
    """On the start's conversation, and on a row's."""
    path = build(text)
    assert "does not mark the assistant's turns" in refusal(path, qwen_rules)
    often = "{%- if messages | length > 2 -%}" + text + "{%- endif -%}"
    (path / "chat_template.jinja").write_text(often + QWEN3_VL_TEMPLATE)
    builder = PromptBuilder(path, qwen_rules)
    messages = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    assert trained_text(builder, encode(builder, messages[:2], path)) == ["a<|im_end|>"]
    with pytest.raises(DataError, match=r"the chat template or processor refuses the row: .") as raised:
        encode(builder, messages, path)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("text", [LOOPS, MACRO.replace("again(n + 1)", "again(n + 1) if n < 30 else ''") + LOOPS])
@pytest.mark.parametrize("tagged", [False, True])
def test_rows_for_which_a_template_does_not_end(
    build: Build, qwen_rules: PromptRules, monkeypatch: pytest.MonkeyPatch, text: str, tagged: bool
) -> None:
    path = build("")
    template = QWEN3_VL_GENERATION_TEMPLATE if tagged else QWEN3_VL_TEMPLATE
    long = "{%- if messages | length > 2 and messages[0].content == 'long' -%}" + text + "{%- endif -%}"
    (path / "chat_template.jinja").write_text(long + template)
    builder = PromptBuilder(path, qwen_rules)
    monkeypatch.setattr(template_limits, "ROW_SECONDS", 1.5)  # good rows take as much where a machine is busy

    def messages(first: str) -> list[dict[str, Any]]:
        return [{"role": role, "content": first} for role in ("user", "assistant", "user")]

    began = time.perf_counter()
    with pytest.raises(DataError, match=r"refuses the row: it takes more than 1.5 seconds"):
        encode(builder, messages("long"), path)
    assert time.perf_counter() - began < 30  # it would not end in days
    assert trained_text(builder, encode(builder, messages("short"), path)) == ["short<|im_end|>"]


def test_rows_of_which_a_template_makes_too_much(build: Build, qwen_rules: PromptRules) -> None:
    path = build("{%- if messages[0].content == 'long' -%}{{- 'x' * 2000000 -}}{%- endif -%}")
    builder = PromptBuilder(path, qwen_rules)
    messages = [{"role": role, "content": "long"} for role in ("user", "assistant")]
    with pytest.raises(DataError, match=r"makes 2,000,0\d\d characters of 8 "):
        encode(builder, messages, path)
