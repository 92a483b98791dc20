"""The entry point with --dry_run: one clear line and exit code 2 for every bad input, and a description otherwise."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

import pretrain_vlm
from megatron_vlm.checkpoint.run_folder import MANIFEST_NAME
from megatron_vlm.conversion.convert import import_checkpoint
from megatron_vlm.planning import dry_run as dry_run_module
from tests.data.rows import assistant, image, row, user, write_jsonl
from tests.data.tiny_processor import build_processor
from tests.refusals import check_refusal

SOFT_TOKENS = 4
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 3 directory with processor and several weight files."""
    folder = tmp_path_factory.mktemp("model")
    processor = build_processor(folder, image_size=32, soft_tokens=SOFT_TOKENS)
    tokenizer = processor.tokenizer
    config = Gemma3Config(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 16,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "vision_use_head": False,
        },
        mm_tokens_per_image=SOFT_TOKENS,
        image_token_index=tokenizer.image_token_id,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two images and four rows; the second row has an image."""
    for number in range(2):
        Image.new("RGB", (40, 30), (number * 90, 200, 0)).save(tmp_path / f"{number}.png")
    rows = [
        row(user("how many?"), assistant("three.")),
        row(user(image("0.png"), "what colour?"), assistant("green.")),
        row(user(image("1.png"), image("0.png"), "which?"), assistant("neither.")),
        row(user("one"), assistant("two"), user("three"), assistant("four")),
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    return tmp_path


@pytest.fixture
def arguments(model_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line that is in order."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    content = {
        "run_dir": str(folder / "run"),
        "model": {"hf_path": str(model_dir)},
        "data": {"train": [{"path": str(folder / "train.jsonl")}], "seq_length": 128, "shuffle": False},
        "train": {"train_iters": 2, "global_batch_size": 2},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return ["--config", str(folder / "run.yaml"), "--dry_run"]


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error on stderr of a run that must end with exit code 2."""
    assert pretrain_vlm.main(arguments) == 2
    return check_refusal(capsys.readouterr().err)


def test_dry_run_describes_the_run(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["--parallel.tensor_model_parallel_size=2", "--parallel.pipeline_model_parallel_size=2"]
    assert pretrain_vlm.main(arguments + overrides) == 0
    out = capsys.readouterr().out
    assert "4 ranks = tensor 2 x pipeline 2 x context 1 x data 1" in out
    assert "names and shapes fit the model" in out
    assert "train: 4 rows, 3 images, 0 bad rows" in out
    assert "1.00 passes" in out
    # Trained text is what stands in the rows' answers, with the end of the turn.
    assert "[[three.<end_of_turn>]]" in out and "[[green.<end_of_turn>]]" in out and "[[neither.<end_of_turn>]]" in out
    assert "how many?" in out and "[[how many?" not in out
    assert f"x {SOFT_TOKENS}" in out
    assert not (folder / "run").exists()


def test_dry_run_of_packed_rows(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows hold several samples: so many more passes, and so many more images, whose memory is estimated."""
    images, estimate = [], dry_run_module.estimate_memory

    def estimate_memory(*given: Any) -> Any:
        images.append(given[4])
        return estimate(*given)

    monkeypatch.setattr(dry_run_module, "estimate_memory", estimate_memory)
    assert pretrain_vlm.main([*arguments, "--data.packing=true"]) == 0
    out = capsys.readouterr().out
    assert "batch     2 packed rows = 2 micro-batches x 1 packed rows x 1 data-parallel ranks" in out
    found = re.search(r"2 steps = about ([0-9.]+) passes over the training rows, about ([0-9.]+) in a packed row", out)
    assert found is not None
    passes, samples = map(float, found.groups())
    assert samples > 1.5 and passes == pytest.approx(2 * 2 * samples / 4, abs=0.06)
    assert images == [pytest.approx(3 * samples / 4, abs=0.05)]


def test_dry_run_describes_a_tower_on_two_stages(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["--parallel.pipeline_model_parallel_size=2", "--parallel.vision_pipeline_layout=[1,1]"]
    assert pretrain_vlm.main(arguments + overrides) == 0
    out = capsys.readouterr().out
    assert "chunk 0 on pipeline rank 0: vision_tower layers 0-0\n" in out
    assert "chunk 1 on pipeline rank 1: vision_tower layers 1-1, projector, embedding, layers 0-3, head" in out
    # An image has 16 patches of 32 numbers of two bytes.
    assert f"bytes of the vision tower's patches per micro-batch: {16 * 32 * 2:,} before layer 1\n" in out


def test_dry_run_takes_the_world_size_from_the_environment(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert pretrain_vlm.main(arguments) == 0
    assert "2 ranks = tensor 1 x pipeline 1 x context 1 x data 2" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "3")
    line = refusal([*arguments, "--parallel.tensor_model_parallel_size=2"], capsys)
    assert "3 ranks are not a multiple of 2" in line


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--data.seqlength=3", "did you mean data.seq_length?"),
        ("--parallel.tensor_model_parallel_size=3", "attention heads 4 cannot be divided"),
        ("--parallel.pipeline_model_parallel_size=5", "4 decoder layers do not fill 5 pipeline chunks"),
        ("--parallel.pipeline_layout=[3]", "the model has 4 decoder layers"),
        ("--data.seq_length=10", "too short for one image"),
        ("--model.hf_path=/nowhere", "/nowhere"),
        ("--checkpoint.load=/nowhere", "/nowhere"),
        ("--data.train=[{path: /nowhere.jsonl}]", "/nowhere.jsonl"),
        ("--data.min_pixels=5", "data.min_pixels"),
    ],
)
def test_bad_settings(arguments: list[str], override: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refusal([*arguments, override], capsys)


def test_export_target_that_is_not_empty(
    arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal([*arguments, f"--checkpoint.export_hf={folder}"], capsys)
    assert "not empty" in line and str(folder) in line


def test_problems_of_different_kinds_come_together(
    arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = ["--parallel.tensor_model_parallel_size=3", "--checkpoint.load=/nowhere", f"--checkpoint.export_hf={folder}"]
    line = refusal([*arguments, *bad, "--data.train=[{path: /nowhere.jsonl}]"], capsys)
    assert line.startswith("ConfigError: 10 problems:")  # seven of them of the tensor size
    for text in ("attention heads 4", "no such folder", "not empty", "/nowhere.jsonl"):
        assert text in line


@pytest.mark.parametrize(
    ("bad_row", "expected"),
    [
        ("{this is not JSON", "train.jsonl:2"),
        (row(user(image("missing.png"), "?"), assistant("!")), "missing.png"),
        (
            {"conversations": [{"from": "human", "value": "<image><image> ?"}, {"from": "gpt", "value": "!"}]}
            | {"image": "0.png"},
            "train.jsonl:2",
        ),
    ],
    ids=["not JSON", "missing image", "placeholders"],
)
def test_bad_rows(
    arguments: list[str], folder: Path, bad_row: object, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(folder / "train.jsonl", [row(user("a"), assistant("b")), bad_row])
    assert expected in refusal([*arguments, "--data.strict=true"], capsys)
    # Not strict: one of two rows is still more than the allowed share.
    assert "max_bad_fraction" in refusal(arguments, capsys)
    assert pretrain_vlm.main([*arguments, "--data.max_bad_fraction=0.5"]) == 0
    assert "1 bad rows" in capsys.readouterr().out


def test_rows_that_are_too_long(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short, long = row(user("a"), assistant("b")), row(user("a"), assistant("b " * 500))
    write_jsonl(folder / "train.jsonl", [short, long, long])
    message = refusal([*arguments, "--data.too_long=drop"], capsys)
    assert "too many rows are too long" in message and "2 longer than data.seq_length" in message
    assert "too long" in refusal([*arguments, "--data.too_long=error", "--data.max_too_long_fraction=1"], capsys)
    for accepted in ("--data.max_too_long_fraction=0.7", "--data.too_long=truncate"):
        assert pretrain_vlm.main([*arguments, accepted]) == 0
        assert "2 longer than data.seq_length" in capsys.readouterr().out


def copied(model_dir: Path, target: Path) -> Path:
    shutil.copytree(model_dir, target)
    return target


def test_missing_shard(arguments: list[str], model_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = copied(model_dir, folder / "broken")
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal([*arguments, f"--model.hf_path={broken}"], capsys)
    # Weights that are not loaded are not looked at.
    assert pretrain_vlm.main([*arguments, f"--model.hf_path={broken}", "--model.load_weights=false"]) == 0


def test_truncated_shard(
    arguments: list[str], model_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = copied(model_dir, folder / "broken")
    shard = sorted(broken.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1)
    assert shard.name in refusal([*arguments, f"--model.hf_path={broken}"], capsys)


def test_weights_of_another_size(
    arguments: list[str], model_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copied(model_dir, folder / "other")
    content = json.loads((other / "config.json").read_text())
    content["text_config"]["intermediate_size"] = 128
    (other / "config.json").write_text(json.dumps(content))
    assert "mlp" in refusal([*arguments, f"--model.hf_path={other}"], capsys)


def test_family_that_is_not_known(
    arguments: list[str], model_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copied(model_dir, folder / "other")
    (other / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    assert "llama" in refusal([*arguments, f"--model.hf_path={other}"], capsys)


def test_checkpoint_of_another_family(
    arguments: list[str], model_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = folder / "checkpoint"
    import_checkpoint(model_dir, checkpoint)
    assert pretrain_vlm.main([*arguments, f"--checkpoint.load={checkpoint}"]) == 0
    assert f"{checkpoint}, names and shapes fit the model" in capsys.readouterr().out
    manifest = checkpoint / MANIFEST_NAME
    content = json.loads(manifest.read_text()) | {"family": "another", "model_type": "another_one"}
    del content["crc32"]
    manifest.write_text(json.dumps(content))
    line = refusal([*arguments, f"--checkpoint.load={checkpoint}"], capsys)
    assert "checkpoint of family another (another_one), this run trains gemma3" in line and str(checkpoint) in line


def test_checkpoint_of_the_other_kind(
    arguments: list[str], model_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As at the start: the language model comes out of a multimodal checkpoint, the towers out of none."""
    text_dir = folder / "text"
    Gemma3ForCausalLM(Gemma3Config.from_pretrained(model_dir).text_config).save_pretrained(text_dir)
    whole, text = folder / "whole", folder / "language_model"
    import_checkpoint(model_dir, whole)
    import_checkpoint(text_dir, text)
    capsys.readouterr()  # transformers shows its progress
    line = refusal([*arguments, f"--checkpoint.load={text}"], capsys)
    assert "missing (vision_tower." in line and str(text) in line
    assert "use the model.hf_path" in line and "that the checkpoint was made from" in line
    write_jsonl(folder / "train.jsonl", [row(user("a"), assistant("b"))])
    for checkpoint in (whole, text):
        assert pretrain_vlm.main([*arguments, "--model.text_only=true", f"--checkpoint.load={checkpoint}"]) == 0


def test_text_only_takes_the_language_model_out(
    arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(folder / "train.jsonl", [row(user("a"), assistant("b"))])
    assert pretrain_vlm.main([*arguments, "--model.text_only=true"]) == 0
    assert "text only" in capsys.readouterr().out
    line = refusal([*arguments, "--model.text_only=true", "--model.freeze=[vision_tower]"], capsys)
    assert "vision_tower, which the model does not have" in line


def test_the_script_itself(arguments: list[str]) -> None:
    """As a process: exit code 2, one line on stderr, no traceback."""
    command = [sys.executable, str(ROOT / "pretrain_vlm.py"), *arguments, "--optimizer.name=sgd"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "ConfigError: optimizer.name sgd does not work with parallel.use_distributed_optimizer true -- set "
        "parallel.use_distributed_optimizer to false, or optimizer.name to adamw"
    ]
