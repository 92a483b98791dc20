"""The dry run of Mistral3: images of any size in rows of placeholders, and what its tower cannot be divided over."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from PIL import Image
from transformers import Mistral3ForConditionalGeneration

import pretrain_vlm
from tests.data.rows import assistant, image, row, user, write_jsonl
from tests.data.tiny_processor import build_mistral_processor
from tests.families import mistral3
from tests.refusals import check_refusal


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    processor = build_mistral_processor(folder)
    config = mistral3.build(ministral=True).config
    config.text_config.vocab_size = len(processor.tokenizer)
    config.image_token_index = processor.image_token_id
    Mistral3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line that is in order."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for number, size in enumerate(((40, 24), (24, 40))):
        Image.new("RGB", size, (number * 90, 200, 0)).save(tmp_path / f"{number}.png")
    rows = [
        row(user("how many?"), assistant("three.")),
        row(user(image("0.png"), "what colour?"), assistant("green.")),
        row(user(image("1.png"), image("0.png"), "which?"), assistant("neither.")),
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    content = {
        "run_dir": str(tmp_path / "run"),
        "model": {"hf_path": str(model_dir)},
        "data": {"train": [{"path": str(tmp_path / "train.jsonl")}], "seq_length": 128, "shuffle": False},
        "train": {"train_iters": 2, "global_batch_size": 4},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return ["--config", str(tmp_path / "run.yaml"), "--dry_run"]


def test_dry_run_describes_the_run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    tensor = ["--parallel.tensor_model_parallel_size=2", "--parallel.sequence_parallel=true"]
    assert pretrain_vlm.main([*arguments, *tensor, "--parallel.pipeline_model_parallel_size=2"]) == 0
    out = capsys.readouterr().out
    assert "mistral3, with images" in out
    assert "4 ranks = tensor 2 x pipeline 2 x context 1 x data 1" in out
    assert "chunk 0 on pipeline rank 0: vision_tower, projector, embedding, layers 0-1" in out
    assert "names and shapes fit the model" in out
    assert "train: 3 rows, 3 images, 0 bad rows" in out
    assert "[[green.</s>]]" in out and "[[neither.</s>]]" in out and "[[what colour?" not in out


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["--parallel.tensor_model_parallel_size=8"],
            f"vision attention heads {mistral3.VISION['num_attention_heads']} cannot be divided",
        ),
        (["--parallel.expert_model_parallel_size=2"], "the model has no experts"),
        (["--model.text_only=true", "--model.freeze=[projector]"], "model.freeze names projector"),
        (["--data.seq_length=4"], "too short for one image"),
    ],
)
def test_bad_settings(
    arguments: list[str], overrides: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain_vlm.main([*arguments, *overrides]) == 2
    line = check_refusal(capsys.readouterr().err)
    assert expected in line
