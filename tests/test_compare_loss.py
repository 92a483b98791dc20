"""tools/compare_loss.py: the loss of rows by transformers and by this project's model, side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.families.gemma3 import GEMMA3
from tests.families.gemma4 import GEMMA4
from tests.families.mistral3 import MISTRAL3
from tests.families.qwen3_vl import QWEN3_VL
from tests.families.tiny_family import TinyFamily
from tests.training.tiny_run_config import TinyFiles, build_multimodal
from tools import compare_loss


def compare(files: TinyFiles, *options: str) -> int:
    return compare_loss.main(["--hf", str(files.model), "--data", str(files.data), *options])


@pytest.mark.parametrize("family", [GEMMA3, GEMMA4, QWEN3_VL, MISTRAL3], ids=str)
def test_losses_are_equal_row_by_row(family: TinyFamily, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = build_multimodal(tmp_path, family)
    assert compare(files, "--num", "8") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and all(line.endswith("(equal)") for line in lines)
    losses = [line.split("transformers ")[1].split(", megatron_vlm ") for line in lines]
    assert len({theirs for theirs, _ in losses}) == 8
    assert all(abs(float(theirs) - float(ours.split()[0])) < 1e-5 for theirs, ours in losses)
    assert compare(files, "--first", "2", "--num", "1") == 0
    assert capsys.readouterr().out.splitlines() == lines[2:3]


def test_bad_rows_and_directories_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = build_multimodal(tmp_path, GEMMA3)
    with files.data.open("a") as file:
        file.write('{"messages": []}\n')
    assert compare(files, "--first", "8") == 2
    assert "mixed.jsonl:9" in capsys.readouterr().err
    for none in (("--first", "9"), ("--first", "-1"), ("--num", "0")):
        assert compare(files, *none) == 2
        assert "names no row, for the file has 9" in capsys.readouterr().err
    for path in files.model.glob("*.safetensors"):
        tensors = load_file(path)
        save_file(dict(list(tensors.items())[1:]), path, metadata={"format": "pt"})
    assert compare(files, "--num", "1") == 2
    assert "finds no weights for 2 parameters" in capsys.readouterr().err


def test_weights_that_transformers_would_make_up_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = build_multimodal(tmp_path, GEMMA3)
    config = json.loads((files.model / "config.json").read_text())
    (files.model / "config.json").write_text(json.dumps(config["text_config"]))
    # Rows of text alone, which a text-only model can read.
    files.data.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    assert compare(files) == 2
    assert "transformers finds no weights for" in capsys.readouterr().err
