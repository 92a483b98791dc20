"""The dry run of a model with experts, images of any size and videos."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from PIL import Image
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

import pretrain_vlm
from tests.data.rows import assistant, image, row, user, video, write_jsonl
from tests.data.tiny_processor import build_qwen_processor
from tests.families.qwen3_vl import EXPERTS, MOE, TEXT, TOP_K, VISION
from tests.refusals import check_refusal

EXPERT, EXPERT_TENSOR = "--parallel.expert_model_parallel_size", "--parallel.expert_tensor_parallel_size"
TENSOR = ["--parallel.tensor_model_parallel_size=2", "--parallel.sequence_parallel=true"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_qwen_processor(folder).tokenizer
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    image_id, video_id, start_id, end_id = tokenizer.convert_tokens_to_ids(names)
    config = Qwen3VLMoeConfig(
        text_config=TEXT | MOE | {"vocab_size": len(tokenizer)},
        vision_config=VISION,
        image_token_id=image_id,
        video_token_id=video_id,
        vision_start_token_id=start_id,
        vision_end_token_id=end_id,
    )
    Qwen3VLMoeForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line that is in order."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for number in range(3):
        Image.new("RGB", (40, 24), (number * 90, 200, 0)).save(tmp_path / f"{number}.png")
    rows = [
        row(user("how many?"), assistant("three.")),
        row(user(image("0.png"), "what colour?"), assistant("green.")),
        row(user(video(["0.png", "1.png", "2.png"]), "what moves?"), assistant("nothing.")),
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


def test_dry_run_describes_experts(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Without WORLD_SIZE: the fewest ranks over which both kinds of layers divide."""
    assert pretrain_vlm.main([*arguments, *TENSOR, f"{EXPERT}=2", f"{EXPERT_TENSOR}=2"]) == 0
    out = capsys.readouterr().out
    assert "4 ranks = tensor 2 x pipeline 1 x context 1 x data 2; for experts tensor 2 x pipeline 1 x expert 2" in out
    layers, width = TEXT["num_hidden_layers"] - len(MOE["mlp_only_layers"]), MOE["moe_intermediate_size"]
    held = f"{EXPERTS // 2} of them, {width // 2} of {width} wide"
    assert f"experts   {EXPERTS} in each of {layers} layers, {TOP_K} per token; a rank holds {held}" in out
    assert "3 rows, 1 images, 1 videos, 0 bad rows" in out
    assert "names and shapes fit the model" in out
    assert "[[nothing.<|im_end|>" in out


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([f"{EXPERT}=3"], f"{EXPERTS} experts cannot be divided"),
        ([f"{EXPERT_TENSOR}=4"], "expert width 16 cannot be divided over parallel.expert_tensor_parallel_size 4: 4 is"),
        (TENSOR[:1], "with experts needs parallel.sequence_parallel"),
        ([f"{EXPERT}=2", "--model.text_only=true", "--model.freeze=[projector]"], "model.freeze names projector"),
    ],
)
def test_bad_settings(
    arguments: list[str], overrides: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain_vlm.main([*arguments, *overrides]) == 2
    line = check_refusal(capsys.readouterr().err)
    assert expected in line


def test_ranks_that_experts_do_not_divide(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert pretrain_vlm.main([*arguments, f"{EXPERT}=4"]) == 2
    assert "the 2 ranks of a pipeline stage are not a multiple of 4" in capsys.readouterr().err
