"""Which files a tokenizer and processor may be made of, and what is refused among them.

Judges: SentencePiece's own encoder, and numpy on the pixels.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from megatron_vlm.data.prompts import PromptBuilder
from megatron_vlm.data.rules import PromptRules
from tests.data.references import draw_pictures, encode, refusal, trained_text
from tests.data.rows import assistant, image, user
from tests.data.tiny_processor import CORPUS, SPECIAL_TOKENS, build_processor

TEXTS = (
    "What colour is the shape?",
    "  two   spaces, a\ttab\n\nand lines\n",
    "täst 漢字 🙂 12345 6.7",
    "x" * 50,
)


@pytest.fixture(scope="module")
def spm_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as Gemma's, without tokenizer.json: a SentencePiece model with the settings of Gemma's."""
    folder = tmp_path_factory.mktemp("spm") / "model"
    build_processor(folder)
    (folder / "tokenizer.json").unlink()
    generator = random.Random(0)
    words = " ".join(CORPUS).split()
    lines = [*CORPUS, *(" ".join(generator.choices(words, k=12)) for _ in range(300))]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=450,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=[*SPECIAL_TOKENS[4:], "<mask>", "\n", "\n\n", "▁▁", "▁▁▁", "\t"],
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    base = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    content = {"tokenizer_class": "GemmaTokenizer", "processor_class": "Gemma3Processor"} | base | names
    (folder / "tokenizer_config.json").write_text(json.dumps(content | {"extra_special_tokens": names}))
    return folder


def test_a_sentencepiece_model_alone_gives_its_own_tokens(spm_path: Path, rules: PromptRules, tmp_path: Path) -> None:
    """Ids of whole conversations, with and without an image, are those that SentencePiece gives for their text."""
    builder = PromptBuilder(spm_path, rules)
    judge = sentencepiece.SentencePieceProcessor(str(spm_path / "tokenizer.model"))
    draw_pictures(tmp_path, {})
    for text in TEXTS:
        for answer, *parts in ((f"{text}.", text), ("Red.", image("photo.jpg"), text)):
            messages = [user(*parts), assistant(answer)]
            sample = encode(builder, messages, tmp_path)
            prompt = builder.processor.apply_chat_template(messages, tokenize=False)
            placeholders = "\n\n<start_of_image>" + "<image_soft_token>" * 4 + "<end_of_image>\n\n"
            prompt = prompt.removeprefix("<bos>").replace("<start_of_image>", placeholders)
            assert sample.input_ids.tolist() == [judge.bos_id(), *judge.encode(prompt)]
            assert trained_text(builder, sample) == [answer.strip() + "<end_of_turn>"]


def test_symbols_that_get_lost_are_missed(spm_path: Path, rules: PromptRules, tmp_path: Path) -> None:
    """As where tokenizer_config.json was saved by transformers 5: its empty list replaces the model's symbols."""
    copy = Path(shutil.copytree(spm_path, tmp_path / "copy"))
    content = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(content | {"extra_special_tokens": []}))
    assert "splits its symbol <start_of_turn> into" in refusal(copy, rules)


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"no model"])
def test_a_damaged_sentencepiece_model(spm_path: Path, rules: PromptRules, tmp_path: Path, content: bytes) -> None:
    build_processor(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(content)
    line = refusal(tmp_path, rules)
    assert "tokenizer.model is no SentencePiece model" in line and str(tmp_path) in line


def test_no_vocabulary_at_all(hf_path: Path, rules: PromptRules, tmp_path: Path) -> None:
    build_processor(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    line = refusal(tmp_path, rules)
    assert f"no tokenizer.json in {tmp_path}, nor tokenizer.model, tekken.json, vocab.json with merges.txt" in line


def test_missing_files_are_named(rules: PromptRules, tmp_path: Path) -> None:
    build_processor(tmp_path)
    (tmp_path / "processor_config.json").unlink()
    assert "processor_config.json or preprocessor_config.json" in refusal(tmp_path, rules)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_std", [0.5, 0.0, 0.5]),
        ("image_std", [0.5, math.nan, 0.5]),
        ("image_std", 0),
        ("image_mean", [0.5, math.inf, 0.5]),
        ("rescale_factor", 0),
        ("rescale_factor", -1),
        ("rescale_factor", math.nan),
        ("rescale_factor", 1e300),
        ("size", {"height": -16, "width": 16}),
        ("size", {"height": 0, "width": 16}),
    ],
)
def test_processor_values_that_spoil_pixels(rules: PromptRules, tmp_path: Path, name: str, value: Any) -> None:
    build_processor(tmp_path)
    path = tmp_path / "processor_config.json"
    content = json.loads(path.read_text())
    assert name in content["image_processor"]
    content["image_processor"][name] = value
    path.write_text(json.dumps(content))
    line = refusal(tmp_path, rules)
    assert name in line and str(tmp_path) in line
