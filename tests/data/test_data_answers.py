"""Which tokens are trained, whatever the order of roles, against character offsets of what the assistant says."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jinja2.exceptions import TemplateError
from PIL import Image
from tokenizers import AddedToken
from transformers import AutoProcessor, AutoTokenizer

from demo import gemma3, mistral3, qwen3_vl
from megatron_vlm.data.answers import find_answers, find_marks, find_thinking, tokens_of_spans
from megatron_vlm.data.prompts import PromptBuilder
from megatron_vlm.data.rules import PromptRules
from megatron_vlm.errors import DataError
from tests.data.references import Messages, draw_pictures, encode, trained_text
from tests.data.rows import assistant, image, user
from tests.data.tiny_processor import (
    GEMMA3_GENERATION_TEMPLATE,
    MISTRAL_GENERATION_TEMPLATE,
    QWEN3_VL_GENERATION_TEMPLATE,
    build_mistral_processor,
    build_processor,
    build_qwen_processor,
)
from tests.sizes import full

Piece = tuple[str, bool]
"""A text of a rendered conversation, and whether it is trained."""


def replaced(template: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert old in template
        template = template.replace(old, new)
    return template


def gemma3_pieces(messages: Messages) -> list[Piece]:
    """Gemma's format, in Python; texts are trimmed, a system prompt that comes first is put into the first turn."""
    pieces, prefix = [("<bos>", False)], ""
    if messages[0]["role"] == "system":
        content = messages[0]["content"]
        prefix = (content if isinstance(content, str) else content[0]["text"]) + "\n\n"
        messages = messages[1:]
    for number, message in enumerate(messages):
        answers = message["role"] == "assistant"
        pieces.append((f"<start_of_turn>{'model' if answers else message['role']}\n", False))
        pieces.append((prefix if number == 0 and not answers else "", False))
        pieces += [(text, answers) for text in parts(message, "<start_of_image>", str.strip)]
        pieces += [("<end_of_turn>", answers), ("\n", False)]
    return pieces


def qwen3_vl_pieces(messages: Messages) -> list[Piece]:
    """ChatML, in Python."""
    pieces = []
    for message in messages:
        answers = message["role"] == "assistant"
        pieces.append((f"<|im_start|>{message['role']}\n", False))
        pieces += [(text, answers) for text in parts(message, "<|vision_start|><|image_pad|><|vision_end|>")]
        pieces += [("<|im_end|>", answers), ("\n", False)]
    return pieces


def mistral3_pieces(messages: Messages) -> list[Piece]:
    """Mistral's format, in Python; one image after one text of a user is put before it."""
    pieces = [("<s>", False)]
    around = {
        "system": ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        "user": ("[INST]", "[/INST]"),
        "assistant": ("", "</s>"),
    }
    for message in messages:
        role, content = message["role"], message["content"]
        texts = parts(message, "[IMG]")
        if role == "user" and not isinstance(content, str) and [p["type"] for p in content] == ["text", "image"]:
            texts.reverse()
        before, after = around[role]
        pieces += [(text, role == "assistant") for text in (before, *texts, after)]
    return pieces


def parts(message: dict[str, Any], placeholder: str, change: Callable[[str], str] = str) -> list[str]:
    content = message["content"]
    if isinstance(content, str):
        return [change(content)]
    return [change(part["text"]) if part["type"] == "text" else placeholder for part in content]


@dataclass(frozen=True)
class Format:
    """A family's processor, its templates, and its format in Python."""

    build: Callable[..., object]
    rules: str
    template: str
    tagged: str
    lax: tuple[tuple[str, str], ...]
    """Changes to a template that make it take roles in any order, and images in answers."""
    pieces: Callable[[Messages], list[Piece]]

    def templates(self) -> dict[str, str]:
        return {
            "strict": self.template,
            "strict, tagged": self.tagged,
            "lax": replaced(self.template, *self.lax),
            "lax, tagged": replaced(self.tagged, *self.lax),
        }


FORMATS = {
    "gemma3": Format(
        build_processor,
        "rules",
        gemma3.CHAT_TEMPLATE,
        GEMMA3_GENERATION_TEMPLATE,
        (("(message['role'] == 'user') != (loop.index0 % 2 == 0)", "false"),),
        gemma3_pieces,
    ),
    "qwen3_vl": Format(
        build_qwen_processor,
        "qwen_rules",
        qwen3_vl.CHAT_TEMPLATE,
        QWEN3_VL_GENERATION_TEMPLATE,
        (
            (
                "{{- item.text if 'text' in item else '' -}}",
                "{{- item.text if 'text' in item else '<|vision_start|><|image_pad|><|vision_end|>' -}}",
            ),
        ),
        qwen3_vl_pieces,
    ),
    "mistral3": Format(
        build_mistral_processor,
        "mistral_rules",
        mistral3.CHAT_TEMPLATE,
        MISTRAL_GENERATION_TEMPLATE,
        (
            ("{{- raise_exception('an assistant answers a user') -}}", ""),
            ("{{- raise_exception('an assistant says something') -}}", ""),
            ("{{- item.text -}}", "{{- '[IMG]' if item.type == 'image' else item.text -}}"),
        ),
        mistral3_pieces,
    ),
}


def system(*texts: str) -> dict[str, Any]:
    return {**user(*texts), "role": "system"}


def say(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


A, B, WIDE = image("0.png"), image("3.png"), image("photo.jpg")
SHAPES: dict[str, Messages] = {
    "one turn": [user("a"), assistant("b")],
    "two turns": [user("a"), assistant("b"), user("c"), assistant("d")],
    "ends with the user": [user("a"), assistant("b"), user("c")],
    "plain strings": [say("user", "a"), say("assistant", "b"), say("user", "c"), say("assistant", "d")],
    "system first": [system("s"), user("a"), assistant("b")],
    "system first, as a string": [say("system", "s"), user("a"), assistant("b"), user("c"), assistant("d")],
    "system after the user": [user("a"), system("s"), assistant("b")],
    "system in between": [user("a"), assistant("b"), system("s"), user("c"), assistant("d")],
    "system after every user": [user("a"), system("s"), assistant("b"), user("c"), system("t"), assistant("d")],
    "system last": [user("a"), assistant("b"), system("s")],
    "two systems": [system("s"), system("t"), user("a"), assistant("b")],
    "system, then the assistant": [system("s"), system("t"), assistant("b"), user("a"), assistant("d")],
    "two users": [user("a"), user("b"), assistant("c")],
    "three users, then two": [user("a"), user("b"), user("c"), assistant("d"), user("e"), user("f"), assistant("g")],
    "users at the end": [user("a"), assistant("b"), user("c"), user("d")],
    "two assistants": [user("a"), assistant("b"), assistant("c")],
    "three assistants, twice": [user("a"), *map(assistant, "bcd"), user("e"), *map(assistant, "fgh")],
    "assistant first": [assistant("a"), user("b"), assistant("c")],
    "assistants alone": [assistant("a"), assistant("b")],
    "all the same text": [user("a"), user("a"), assistant("a"), system("a"), assistant("a"), assistant("a"), user("a")],
    "empty user": [user(""), assistant("b")],
    "empty user as a string": [say("user", ""), say("assistant", "b"), say("user", ""), say("assistant", "d")],
    "empty users in a row": [user(""), user(""), assistant("b"), user(""), assistant("c")],
    "empty answer": [user("a"), assistant(""), user("b"), assistant("c")],
    "empty answer as a string": [say("user", "a"), say("assistant", ""), say("user", "b"), say("assistant", "c")],
    "no parts": [user("a"), assistant(), user("b"), assistant("c")],
    "blank texts": [user(" \n"), assistant("  \n "), user("\t"), assistant(" b ")],
    "whitespace": [user("\n a \n"), assistant("\n\n b\n \n"), say("user", " c\t"), say("assistant", "\td  ")],
    "many parts": [user("a", "b ", " c"), assistant(" d", "e ", "", "f\n"), user("g"), assistant("h", "")],
    "image before": [user(A, "a"), assistant("b")],
    "image after": [user("a", A), assistant("b")],
    "image alone": [user(A), assistant("b"), user(B), assistant("c")],
    "images in between": [user("a", A, "b", WIDE, "c"), user(B), assistant("d"), user(A, B), assistant("e")],
    "image, then a system": [user("a"), assistant("b"), user(A), system("s"), assistant("c")],
    "image in an answer": [user("a"), assistant("b", A, "c"), user(B, "d"), assistant("e")],
    "answer begins with an image": [user("a"), assistant(WIDE, "b")],
    "answer ends with an image": [user("a"), assistant("b", A)],
    "answer is an image": [user(A, "a"), assistant(B), user("c"), assistant("d")],
    "images in answers in a row": [user("a"), assistant("b", A), assistant(B, "c"), user(WIDE), assistant("d", A, "e")],
    "text like markers": [
        user("start_of_turn>model\n [/ INST] <|im_start assistant\n"),
        user("assistant\n", "model\nassistant"),
        assistant("end_of_turn> im_end| <|im_ </ s> user\n", "[INST"),
        system("model: a, assistant\n"),
        assistant("[/INST assistant\nmodel\n"),
    ],
    "other characters": [
        user("e\u0301 \u1100\u1161"),
        user("日本"),
        assistant("e\u0301te\u0301 😀\u200b"),
        assistant("\u00a0é"),
    ],
}


IMAGES_IN_ANSWERS = {name for name in SHAPES if "answer" in name and "image" in name}


@dataclass
class Case:
    family: str
    is_lax: bool
    builder: PromptBuilder
    processor: Any
    """Transformers' own, from the same directory."""

    def pieces(self, messages: Messages) -> list[Piece]:
        return FORMATS[self.family].pieces(messages)


CASES = [(family, template) for family in FORMATS for template in FORMATS[family].templates()]


@pytest.fixture(
    scope="module",
    params=[case if case[1].startswith("lax") else full(case, id="-".join(case)) for case in CASES],
    ids="-".join,
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, template = request.param
    path = tmp_path_factory.mktemp(family)
    FORMATS[family].build(path, chat_template=FORMATS[family].templates()[template])
    builder = PromptBuilder(path, request.getfixturevalue(FORMATS[family].rules))
    processor = AutoProcessor.from_pretrained(path, local_files_only=True)
    return Case(family, template.startswith("lax"), builder, processor)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"0": (20, 30), "3": (23, 30)}
    return draw_pictures(tmp_path_factory.mktemp("pictures"), sizes)


def expected(case: Case, messages: Messages, folder: Path) -> tuple[list[int], list[bool]]:
    """Ids, and which tokens consist of characters that the assistant said."""
    opened = [
        message
        if isinstance(message["content"], str)
        else {
            **message,
            "content": [
                {**part, "image": Image.open(folder / part["image"])} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]
    pieces = case.pieces(messages)
    assert "".join(text for text, _ in pieces) == case.processor.apply_chat_template(opened, tokenize=False)
    output = case.processor.apply_chat_template(
        opened,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_offsets_mapping": True, "return_text_replacement_offsets": True},
    )
    said = [is_said for text, is_said in pieces for _ in text]
    # From the last one on, so that the places of those before stay as they are.
    for item in reversed((output.get("text_replacement_offsets") or [[]])[0]):
        start, end = item["span"]
        said[start:end] = [said[start]] * len(item["replacement"])
    ids = np.asarray(output["input_ids"][0]).tolist()
    placeholder = case.builder.rules.image_token_id
    return ids, [
        start < end and all(said[start:end]) and token != placeholder
        for token, (start, end) in zip(ids, np.asarray(output["offset_mapping"][0]).tolist(), strict=True)
    ]


@pytest.mark.parametrize("name", SHAPES)
def test_only_what_the_assistant_says_is_trained(case: Case, pictures: Path, name: str) -> None:
    """The demos' templates refuse some orders; those that refuse none give the right tokens for all."""
    messages = SHAPES[name]
    # The demos' own templates leave images in answers out, but Gemma's.
    refused = not case.is_lax and case.family != "gemma3" and name in IMAGES_IN_ANSWERS
    if not refused:
        try:
            ids, trained = expected(case, messages, pictures)
        except TemplateError:
            assert not case.is_lax
            refused = True
    if refused:
        with pytest.raises(DataError):
            encode(case.builder, messages, pictures)
        return
    sample = encode(case.builder, messages, pictures)
    assert sample.input_ids.tolist() == ids
    assert sample.trained.tolist() == trained
    last_trained = max(position for position, is_trained in enumerate(trained, 1) if is_trained)
    assert len(sample.answer_ends) == sum(message["role"] == "assistant" for message in messages)
    assert sample.answer_ends[-1] == last_trained


WORDS = """\
{%- macro words(content) -%}
    {{- content if content is string else content | map(attribute='text') | join -}}
{%- endmacro -%}
"""
# Mistral's format of other days: spaces around words, the system prompt in the last user's turn.
SYSTEM_IN_LAST_TURN = f"""\
{WORDS}
{{{{- bos_token -}}}}
{{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}}
{{%- for message in messages -%}}
    {{%- if message.role == 'user' -%}}
        {{{{- '[INST] ' -}}}}
        {{%- if message is sameas users[-1] and messages[0].role == 'system' -%}}
            {{{{- words(messages[0].content) + '\n\n' -}}}}
        {{%- endif -%}}
        {{{{- words(message.content) + '[/INST]' -}}}}
    {{%- elif message.role == 'assistant' -%}}
        {{{{- ' ' + words(message.content) | trim + eos_token -}}}}
    {{%- endif -%}}
{{%- endfor -%}}
"""
# ChatML that joins neighbours of one role and drops the thoughts of earlier answers; it does odd things to some texts.
JOINING = f"""\
{WORDS}
{{%- for message in messages -%}}
    {{%- set text = words(message.content) -%}}
    {{%- if loop.first or loop.previtem.role != message.role -%}}
        {{{{- '<|im_start|>' + message.role + '\n' -}}}}
    {{%- endif -%}}
    {{%- if not loop.last -%}}{{%- set text = text.split('</think>')[-1].lstrip('\n') -%}}{{%- endif -%}}
    {{{{- text + ('?' if text.endswith('!') else '') -}}}}
    {{%- if loop.last or loop.nextitem.role != message.role -%}}
        {{{{- '\n' if text.startswith('never ends') else '<|im_end|>\n' -}}}}
    {{%- endif -%}}
{{%- endfor -%}}
"""


@pytest.fixture(scope="module")
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PromptBuilder]:
    """Makes a family's builder with another template."""

    def make(family: str, template: str, **options: Any) -> PromptBuilder:
        path = tmp_path_factory.mktemp(family)
        FORMATS[family].build(path, chat_template=template)
        return PromptBuilder(path, request.getfixturevalue(FORMATS[family].rules), **options)

    return make


def conversation(roles: str, *texts: str) -> Messages:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [say(names[role], text) for role, text in zip(roles, texts, strict=True)]


@pytest.mark.parametrize(
    ("family", "template", "messages", "trained"),
    [
        ("mistral3", SYSTEM_IN_LAST_TURN, conversation("suaua", *"abcde"), [" c</s>", " e</s>"]),
        ("mistral3", SYSTEM_IN_LAST_TURN, conversation("suuaa", *"abcde"), [" d</s> e</s>"]),
        ("qwen3_vl", JOINING, conversation("uuaua", *"abcde"), ["c<|im_end|>", "e<|im_end|>"]),
        (
            "qwen3_vl",
            JOINING,
            conversation("uaua", "a", "<think>no</think>\n\nb", "c", "<think>yes</think>d"),
            ["b<|im_end|>", "<think>yes</think>d<|im_end|>"],
        ),
    ],
)
def test_other_templates(
    build: Callable[..., PromptBuilder],
    tmp_path: Path,
    family: str,
    template: str,
    messages: Messages,
    trained: list[str],
) -> None:
    builder = build(family, template)
    assert trained_text(builder, encode(builder, messages, tmp_path)) == trained


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (conversation("uaa", *"abc"), "does not mark the end of the answer in message 2"),
        (conversation("uau", "a", "never ends", "b"), "does not mark the end of the answer in message 2"),
        (conversation("ua", "a", "b!"), "changes texts by what they end with"),
        (conversation("ua", "a", "b\ufdd0text0\ufdd1"), "changes texts by what they end with"),
    ],
)
def test_answers_that_cannot_be_told_are_bad_rows(
    build: Callable[..., PromptBuilder], tmp_path: Path, messages: Messages, reason: str
) -> None:
    with pytest.raises(DataError, match=reason) as raised:
        encode(build("qwen3_vl", JOINING), messages, tmp_path)
    assert raised.value.where == "rows.jsonl:7"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{%- for message in messages[-2:] -%}", "writes the answer in message 2 not at all"),
        ("{%- for message in messages + messages[:2] -%}", "writes the answer in message 2 in 2 places"),
        ("{%- for message in messages | reverse -%}", "answers in another order"),
    ],
)
def test_templates_that_move_answers(
    build: Callable[..., PromptBuilder], tmp_path: Path, template: str, reason: str
) -> None:
    builder = build("qwen3_vl", replaced(qwen3_vl.CHAT_TEMPLATE, ("{%- for message in messages -%}", template)))
    with pytest.raises(DataError, match=reason):
        encode(builder, conversation("uaua", *"abcd"), tmp_path)


@pytest.mark.parametrize("tagged", [False, True])
@pytest.mark.parametrize("family", FORMATS)
def test_answers_without_loss(build: Callable[..., PromptBuilder], pictures: Path, family: str, tagged: bool) -> None:
    """Each answer by itself, also where answers follow each other or have images in them."""
    builder = build(family, FORMATS[family].templates()["lax, tagged" if tagged else "lax"])
    messages = [user("a"), assistant("b", A, "c"), assistant("d"), user("e"), assistant("f")]
    answers = [1, 2, 4]
    samples = []
    for trained in answers:
        losses = [{"loss": number == trained} if number in answers else {} for number in range(len(messages))]
        samples.append(encode(builder, [a | b for a, b in zip(messages, losses, strict=True)], pictures))
    end = builder.rules.assistant_end
    texts = ["".join(trained_text(builder, sample)) for sample in samples]
    assert texts[1:] == [f"d{end}", f"f{end}"]
    assert texts[0].startswith("b") and texts[0].endswith(f"c{end}")
    whole = encode(builder, messages, pictures)
    assert np.array_equal(sum(sample.trained.astype(int) for sample in samples), whole.trained)
    assert all(sample.answer_ends.tolist() == whole.answer_ends.tolist() for sample in samples)


def test_loss_of_one_tagged_answer_needs_one_block_for_each(
    build: Callable[..., PromptBuilder], tmp_path: Path
) -> None:
    """Two blocks for one answer and none for another are as many as there are answers."""
    template = replaced(
        QWEN3_VL_GENERATION_TEMPLATE,
        (
            "{%- generation -%}",
            "{%- generation -%}{{- words(message.content) -}}{%- endgeneration -%}{%- generation -%}",
        ),
        ("{%- if message.role == 'assistant' -%}", "{%- if message.role == 'assistant' and loop.index < 3 -%}"),
    )
    builder = build("qwen3_vl", template)
    messages = conversation("uaua", *"abcd")
    assert encode(builder, messages, tmp_path).trained.any()
    messages[1]["loss"] = False
    with pytest.raises(DataError, match="answers cannot be left out of the loss"):
        encode(builder, messages, tmp_path)


THINKING = {"type": "thinking", "thinking": "two and two"}
MISTRAL_THINKS = replaced(
    mistral3.CHAT_TEMPLATE,
    *FORMATS["mistral3"].lax[:2],
    ("{{- item.text -}}", "{{- '[THINK]' + item.thinking + '[/THINK]' if item.type == 'thinking' else item.text -}}"),
)
# As Qwen3's: thinking is a key of its own, and what was thought before the last user's turn is left out.
QWEN_SAYS = "{{- words(message.content) + '<|im_end|>' -}}"
QWEN_THINKS = replaced(
    qwen3_vl.CHAT_TEMPLATE,
    (
        "{%- if message.role == 'assistant' -%}\n        " + QWEN_SAYS,
        "{%- if message.role == 'assistant' -%}"
        "{%- set last = (messages | selectattr('role', 'equalto', 'user') | list)[-1] -%}"
        "{%- if message.reasoning_content and last not in messages[loop.index:] -%}"
        "{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' -}}"
        "{%- endif -%}" + QWEN_SAYS,
    ),
)
TAGGED_THINKS = {
    "mistral3": replaced(
        MISTRAL_THINKS,
        ("{{- words(message.content) + eos_token -}}", "{%- generation -%}{{- words(message.content) + eos_token -}}"),
        ("{%- elif message.role != 'user' -%}", "{%- endgeneration -%}{%- elif message.role != 'user' -%}"),
    ),
    "qwen3_vl": replaced(
        QWEN_THINKS,
        ("{%- if message.reasoning", "{%- generation -%}{%- if message.reasoning"),
        ("{%- endif -%}" + QWEN_SAYS, "{%- endif -%}" + QWEN_SAYS + "{%- endgeneration -%}"),
    ),
}
THINKS = {"mistral3": MISTRAL_THINKS, "qwen3_vl": QWEN_THINKS}


@pytest.mark.parametrize("tagged", [False, True])
@pytest.mark.parametrize("train_thinking", [True, False])
@pytest.mark.parametrize(
    ("family", "answer", "thought", "said"),
    [
        ("mistral3", {"content": [THINKING, {"type": "text", "text": "4"}]}, "[THINK]two and two[/THINK]", "4</s>"),
        ("mistral3", {"content": "4", "reasoning_content": "two and two"}, "[THINK]two and two[/THINK]", "4</s>"),
        (
            "mistral3",
            {"content": [THINKING, THINKING, {"type": "text", "text": " 4 "}]},
            "[THINK]two and two[/THINK]" * 2 + " ",
            "4 </s>",
        ),
        ("mistral3", {"content": [THINKING]}, "[THINK]two and two[/THINK]", "</s>"),
        ("qwen3_vl", {"content": "4", "reasoning_content": "two"}, "<think>\ntwo\n</think>\n\n", "4<|im_end|>"),
        (
            "qwen3_vl",
            {"content": [THINKING, {"type": "text", "text": "4"}]},
            "<think>\ntwo and two\n</think>\n\n",
            "4<|im_end|>",
        ),
    ],
)
def test_thinking_goes_where_the_template_puts_it(
    build: Callable[..., PromptBuilder],
    tmp_path: Path,
    family: str,
    answer: dict[str, Any],
    thought: str,
    said: str,
    train_thinking: bool,
    tagged: bool,
) -> None:
    template = (TAGGED_THINKS if tagged else THINKS)[family]
    builder = build(family, template, train_thinking=train_thinking)
    messages = [say("user", "1"), say("assistant", "1"), say("user", "2+2?"), {"role": "assistant", **answer}]
    sample = encode(builder, messages, tmp_path)
    one = f"1{builder.rules.assistant_end}"
    assert trained_text(builder, sample) == [one, thought + said if train_thinking else said]
    assert thought in builder.tokenizer.decode(sample.input_ids)


def test_thinking_between_texts(build: Callable[..., PromptBuilder], tmp_path: Path) -> None:
    builder = build("mistral3", MISTRAL_THINKS, train_thinking=False)
    text = [{"type": "text", "text": text} for text in "ab"]
    messages = [
        user("x"),
        assistant("y"),
        {"role": "assistant", "content": [text[0], THINKING, text[1]]},
        assistant("z"),
    ]
    assert trained_text(builder, encode(builder, messages, tmp_path)) == ["y</s>a", "b</s>z</s>"]
    messages[2]["content"] = [text[0], THINKING]
    with pytest.raises(DataError, match="the answer in message 3 ends with thinking"):
        encode(builder, messages, tmp_path)
    # A system prompt may show how to think; it is never trained.
    messages = [{"role": "system", "content": [text[0], THINKING]}, user("x"), assistant("y")]
    sample = encode(builder, messages, tmp_path)
    assert trained_text(builder, sample) == ["y</s>"]
    assert "[SYSTEM_PROMPT]a[THINK]two and two[/THINK][/SYSTEM_PROMPT]" in builder.tokenizer.decode(sample.input_ids)


def test_thinking_that_a_template_leaves_out(build: Callable[..., PromptBuilder], tmp_path: Path) -> None:
    """A template may forget what was thought in earlier turns, and nothing else."""
    builder = build("qwen3_vl", QWEN_THINKS)
    thinks = {"role": "assistant", "content": "4", "reasoning_content": "two and two"}
    messages = [user("x"), thinks, user("y"), thinks]
    text = builder.tokenizer.decode(encode(builder, messages, tmp_path).input_ids)
    assert text.count("two and two") == 1 and text.index("two and two") > text.index("y")
    forgets_all = replaced(QWEN_THINKS, ("last not in", "messages | length == 2 and last not in"))
    for template, reason in (
        (FORMATS["qwen3_vl"].template, "the chat template writes no thinking"),
        (forgets_all, "leaves out the thinking in message 2"),
    ):
        with pytest.raises(DataError, match=reason):
            encode(build("qwen3_vl", template), [user("x"), thinks, assistant("z")], tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([{"type": "text", "text": "a"}, THINKING], "takes thinking only before what a message says"),
        ([{**THINKING, "closed": False}], "is not closed"),
        ([{**THINKING, "thinking": 7}], "thinking is '7'"),
    ],
)
def test_thinking_that_cannot_be_used(
    build: Callable[..., PromptBuilder], tmp_path: Path, content: list[dict[str, Any]], reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        encode(build("qwen3_vl", QWEN_THINKS), [user("x"), {"role": "assistant", "content": content}], tmp_path)


GROUNDING_TOKENS = "<|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>"
GROUNDING = "<|object_ref_start|>square<|object_ref_end|><|box_start|>(10,20),(300,400)<|box_end|>"


@pytest.mark.parametrize(
    ("family", "tokens", "words"),
    [
        ("qwen3_vl", GROUNDING_TOKENS, GROUNDING),
        ("mistral3", "[THINK] [/THINK]", "[THINK]two and two[/THINK]4"),
        ("gemma3", "<loc0001> <loc0002>", "<loc0001><loc0002>cat"),
    ],
)
def test_answers_with_tokens_that_forge_nothing(
    build: Callable[..., PromptBuilder], tmp_path: Path, family: str, tokens: str, words: str
) -> None:
    """Grounding and thinking have special tokens, which a text may have; they are trained as one token each."""
    path = tmp_path / "model"
    shutil.copytree(build(family, FORMATS[family].template).hf_path, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens.split()])
    tokenizer.save_pretrained(path)
    builder = PromptBuilder(path, build(family, FORMATS[family].template).rules)
    sample = encode(builder, [user(f"Find {words}"), assistant(words)], tmp_path)
    assert trained_text(builder, sample) == [words + builder.rules.assistant_end]
    ids = builder.tokenizer.convert_tokens_to_ids(tokens.split())
    assert set(ids) <= set(sample.input_ids[sample.trained].tolist())


def test_masks_are_linear_in_length(mistral_rules: PromptRules) -> None:
    """A million tokens in 40,000 messages; work for every pair of an answer and a token would take minutes."""
    turns = 20_000
    turn, words = "[INST]a[/INST]", "b" * 24
    rendered = f"{turn}{words}</s>" * turns
    marked = "".join(
        f"[INST]a\ufdd0text{number}\ufdd1[/INST]{words}\ufdd0text{number + 1}\ufdd1</s>"
        for number in range(0, 2 * turns, 2)
    )
    began = time.perf_counter()
    marks = find_marks(rendered, marked, "")
    spans = find_answers(rendered, marks, range(1, 2 * turns, 2), mistral_rules, "")
    offsets = np.arange(len(rendered))[:, None] + np.array([0, 1])
    answers = tokens_of_spans(spans, offsets, [], whole=True)
    assert time.perf_counter() - began < 10
    assert (answers >= 0).sum() == turns * len(f"{words}</s>") and answers[-1] == turns - 1
    assert find_thinking(spans, marks, "") == []
