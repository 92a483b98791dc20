"""The dry run of Gemma 4: images and audio, what stages pass on, and what each variant cannot be divided over."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from PIL import Image

import pretrain_vlm
from megatron_vlm.config import Config
from megatron_vlm.errors import ConfigError
from megatron_vlm.families import registry
from megatron_vlm.planning import dry_run
from megatron_vlm.planning.memory import estimate_memory, format_boundaries
from megatron_vlm.planning.preflight import check_layout
from tests.data.rows import assistant, audio, image, row, user, write_jsonl
from tests.data.sounds import write_tones
from tests.families.gemma4 import AUDIO_TOWER, GEMMA4, TEXT, UNIFIED, VISION, WITH_MOE
from tests.families.tiny_family import TinyFamily
from tests.published_gemma4 import published_config
from tests.refusals import check_refusal
from tests.test_preflight import PIPELINE, STAGES, TENSOR, run_config

TENSOR_RANKS, DATA_IMAGES = f"--{TENSOR}", "--model.vision_parallelism=data"


def write_model(folder: Path, family: TinyFamily) -> Path:
    processor = family.build_processor(folder)
    family.build(tokenizer=processor.tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def e2b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("e2b"), GEMMA4)


@pytest.fixture(scope="module")
def with_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("experts"), WITH_MOE)


def command_line(model: Path, folder: Path, rows: list[Any]) -> list[str]:
    write_jsonl(folder / "train.jsonl", rows)
    content = {
        "run_dir": str(folder / "run"),
        "model": {"hf_path": str(model)},
        "data": {"train": [{"path": str(folder / "train.jsonl")}], "seq_length": 192, "shuffle": False},
        "train": {"train_iters": 2, "global_batch_size": 4},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return ["--config", str(folder / "run.yaml"), "--dry_run"]


@pytest.fixture
def arguments(e2b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line that is in order."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    Image.new("RGB", (40, 24), (90, 200, 0)).save(tmp_path / "0.png")
    write_tones(tmp_path, {"0": 0.3, "1": 0.2})
    rows = [
        row(user("how many?"), assistant("three.")),
        row(user(image("0.png"), "what colour?"), assistant("green.")),
        row(user(audio("0.wav"), image("0.png"), audio("1.wav"), "which?"), assistant("neither.")),
    ]
    return command_line(e2b, tmp_path, rows)


@pytest.fixture
def expert_arguments(with_experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return command_line(with_experts, tmp_path, [row(user("how many?"), assistant("three."))])


def test_dry_run_describes_the_run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    tensor = [f"{TENSOR_RANKS}=2", "--parallel.sequence_parallel=true"]
    stages = [f"--{PIPELINE}=2", f"--{STAGES}=[3,1]"]
    assert pretrain_vlm.main([*arguments, *tensor, *stages, "--model.freeze=[audio_tower]"]) == 0
    out = capsys.readouterr().out
    assert "gemma4, with images and audio, " in out
    assert "4 ranks = tensor 2 x pipeline 2 x context 1 x data 1" in out
    assert "chunk 0 on pipeline rank 0: vision_tower, audio_tower, projector, embedding, layers 0-2" in out
    assert "names and shapes fit the model" in out
    assert "train: 3 rows, 2 images, 2 audio clips, 0 bad rows" in out
    assert "[[neither.<turn|>]]" in out and "[[which?" not in out
    # Per rank: half of a token's hidden states and embedding, and one head of the keys and values that layer 3 shares.
    hidden, lent = TEXT["hidden_size"] // 2, 2 * TEXT["global_head_dim"]
    assert f"bytes per token: {2 * (2 * hidden + lent)} before layer 3; hidden states are {2 * hidden}" in out


def test_dry_run_counts_audio(arguments: list[str]) -> None:
    """As many images and clips as the rows have, of the largest size."""
    with mock.patch.object(dry_run, "estimate_memory", wraps=estimate_memory) as estimate:
        assert pretrain_vlm.main(arguments) == 0
    assert estimate.call_args.args[-2:] == (2 / 3, 2 / 3)


def test_audio_takes_memory() -> None:
    """A clip of 30 seconds in E2B's tower, where there is one."""
    config, family, model_config = published("e2b")
    layout = check_layout(config, model_config, 1)
    without, one, two = (
        estimate_memory(config, family, model_config, layout, 0, clips)[0].activation_bytes for clips in range(3)
    )
    # The clip fills one of run_config's rows of 512 tokens, of each of which 12 layers keep 100 vectors of 1,024
    # numbers in bf16. There is no room for a second.
    assert one - without == pytest.approx(512 * 12 * 100 * 1024 * 2, rel=0.05)
    assert two == one


def test_dry_run_describes_experts(expert_arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Stages send hidden states alone, and nothing is said of that."""
    tensor = [f"{TENSOR_RANKS}=2", "--parallel.sequence_parallel=true", "--parallel.expert_model_parallel_size=2"]
    assert pretrain_vlm.main([*expert_arguments, *tensor, f"--{PIPELINE}=2"]) == 0
    out = capsys.readouterr().out
    assert "gemma4, with images, " in out
    assert "experts   8 in each of 4 layers, 2 per token; a rank holds 4 of them, 24 of 24 wide" in out
    assert "bytes per token" not in out


def test_dry_run_names_the_image_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 12B, which has a choice and no towers."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    Image.new("RGB", (40, 24), (90, 200, 0)).save(tmp_path / "0.png")
    write_tones(tmp_path, {"0": 0.3})
    rows = [row(user(image("0.png"), audio("0.wav"), "which?"), assistant("neither."))]
    arguments = command_line(write_model(tmp_path / "model", UNIFIED), tmp_path, rows)
    for mask in ("window", "transformers"):
        # What null means is said too.
        override = [] if mask == "window" else [f"--model.image_mask={mask}"]
        assert pretrain_vlm.main([*arguments, *override]) == 0
        out = capsys.readouterr().out
        assert f"gemma4, with images and audio (image_mask {mask}), " in out
        assert "chunk 0 on pipeline rank 0: vision_tower, projector, embedding, layers 0-3, head" in out


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([f"{TENSOR_RANKS}=8"], f"attention heads {TEXT['num_attention_heads']} cannot be divided"),
        ([f"{TENSOR_RANKS}=8"], f"vision attention heads {VISION['num_attention_heads']} cannot be divided"),
        (
            [f"{TENSOR_RANKS}=8", DATA_IMAGES],
            f"audio attention heads {AUDIO_TOWER['num_attention_heads']} cannot be divided over {TENSOR} 8 -- "
            "use 1 or 2 or 4",
        ),
        ([f"{TENSOR_RANKS}=64", DATA_IMAGES], f"audio hidden size {AUDIO_TOWER['hidden_size']} cannot be divided"),
        ([f"{TENSOR_RANKS}=32", DATA_IMAGES], "size of a layer's own input 16 cannot be divided"),
        (["--parallel.expert_model_parallel_size=2"], "the model has no experts"),
        ([f"--{PIPELINE}=2", f"--{STAGES}=[2,3]"], "sums to 5, the model has 4 decoder layers"),
        ([f"--{PIPELINE}=5"], "4 decoder layers do not fill 5 pipeline chunks"),
        (["--model.text_only=true", "--model.freeze=[audio_tower]"], "model.freeze names audio_tower"),
        # Clip bounds and scales of layers are left, which never train.
        (["--model.freeze=['*.weight','*table','*bias','*per_dim_scale']"], "model.freeze leaves nothing to train"),
        (["--model.image_mask=window"], "model.image_mask is window, but gemma4 models have no choice"),
        (["--data.min_pixels=5"], "data.max_pixels is that limit"),
        (["--data.seq_length=4"], "too short for one image"),
    ],
)
def test_bad_settings(
    arguments: list[str], overrides: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain_vlm.main([*arguments, *overrides]) == 2
    assert expected in check_refusal(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([f"{TENSOR_RANKS}=2"], "with experts needs parallel.sequence_parallel"),
        (["--parallel.expert_model_parallel_size=3"], "8 experts cannot be divided"),
        (["--model.freeze=[audio_tower]"], "model.freeze names audio_tower"),
    ],
)
def test_bad_settings_with_experts(
    expert_arguments: list[str], overrides: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain_vlm.main([*expert_arguments, *overrides]) == 2
    assert expected in check_refusal(capsys.readouterr().err)


def test_audio_for_a_model_that_takes_none(
    expert_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tones(tmp_path, {"0": 0.3})
    write_jsonl(tmp_path / "train.jsonl", [row(user(audio("0.wav"), "what?"), assistant("green."))])
    assert pretrain_vlm.main(expert_arguments) == 2
    assert "audio" in check_refusal(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "text_only", "image_mask", "expected"),
    [
        ("e4b", False, None, "with images and audio"),
        ("31b", False, None, "with images"),
        ("12b", False, None, "with images and audio (image_mask window)"),
        ("12b", False, "transformers", "with images and audio (image_mask transformers)"),
        ("12b", True, None, "text only"),
    ],
)
def test_media_that_models_take(name: str, text_only: bool, image_mask: str | None, expected: str) -> None:
    hf_config = published_config(name)
    assert registry.detect(hf_config).config_from_hf(hf_config, text_only, image_mask).media == expected


def published(name: str, *overrides: str) -> tuple[Config, registry.Family, Any]:
    hf_config = published_config(name)
    family = registry.detect(hf_config)
    return run_config(*overrides), family, family.config_from_hf(hf_config, text_only=False)


@pytest.mark.parametrize(
    ("name", "ranks", "overrides", "expected"),
    [
        ("e2b", 8, [], ["vision attention heads 12", "use 1 or 2 or 3 or 4 or 6 or 12, or model.vision_parallelism"]),
        (
            "e2b",
            16,
            ["model.vision_parallelism=data"],
            ["2 problems", "attention heads 8", "audio attention heads 8 cannot be divided over", "use 1 or 2 or 4"],
        ),
        ("26b_a4b", 32, [], ["attention heads 16", "with experts needs parallel.sequence_parallel"]),
        ("12b", 32, [], ["attention heads 16 cannot be divided"]),
    ],
)
def test_tensor_sizes_of_published_sizes(name: str, ranks: int, overrides: list[str], expected: list[str]) -> None:
    config, _, model_config = published(name, f"{TENSOR}={ranks}", *overrides)
    with pytest.raises(ConfigError) as caught:
        check_layout(config, model_config, ranks)
    for text in expected:
        assert text in str(caught.value)
    fitting = {"e2b": 4, "26b_a4b": 16, "12b": 16}[name]  # key-value heads may be fewer
    config, _, model_config = published(name, f"{TENSOR}={fitting}", "parallel.sequence_parallel=true")
    check_layout(config, model_config, fitting)


@pytest.mark.parametrize(
    ("name", "stages", "expected"),
    [
        # Hidden states and embeddings; and behind them keys and values of two layers, of one head or two.
        ("e2b", [10, 5, 20], "6,144 before layer 10, 9,216 before layer 15; hidden states are 3,072"),
        ("e2b", [13, 1, 21], "6,144 before layer 13, 7,168 before layer 14; hidden states are 3,072"),
        ("e4b", [20, 10, 12], "10,240 before layer 20, 16,384 before layer 30; hidden states are 5,120"),
        ("31b", [20, 20, 20], None),
    ],
)
def test_what_stages_of_published_sizes_send(name: str, stages: list[int], expected: str | None) -> None:
    """Bytes per token in bf16, without tensor parallelism."""
    config, family, model_config = published(name, f"{PIPELINE}=3", f"{STAGES}={stages}")
    layout = check_layout(config, model_config, 3)
    lines = list(format_boundaries(estimate_memory(config, family, model_config, layout, 0, 0)))
    assert [line.partition("bytes per token: ")[2] for line in lines] == ([expected] if expected else [])
