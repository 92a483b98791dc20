"""The entry point with Qwen3-VL: layouts of experts, images, videos and files that it refuses, in one line each."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.data.rows import assistant, image, row, user, video, write_jsonl
from tests.families.qwen3_vl import QWEN3_VL_MOE
from tests.training.loop_run import Place, build_place, edit_config, refused

TENSOR, PIPELINE = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
EXPERT, EXPERT_TENSOR = "parallel.expert_model_parallel_size", "parallel.expert_tensor_parallel_size"
GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
Tensors = dict[str, torch.Tensor]
Refusal = Callable[..., str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = build_place(tmp_path_factory.mktemp("place"), QWEN3_VL_MOE)
    Image.new("RGB", (1, 201)).save(place.data / "thread.png")
    Image.new("RGB", (40, 32)).save(place.data / "wide.png")
    return place


@pytest.fixture
def refusal(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Starts a run that must be refused and gives the line."""

    def start(*overrides: str) -> str:
        return refused(place.arguments(tmp_path / "new", *overrides), capsys)

    return start


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([f"{EXPERT}=3"], "8 experts cannot be divided over parallel.expert_model_parallel_size 3"),
        ([f"{EXPERT_TENSOR}=3"], "expert width 16 cannot be divided over parallel.expert_tensor_parallel_size 3"),
        ([f"{EXPERT_TENSOR}=8"], "2 is no multiple of 4, which torch's grouped product needs in fp32"),
        ([f"{TENSOR}=2"], "with experts needs parallel.sequence_parallel"),
        ([f"{EXPERT}=2"], "the 1 ranks of a pipeline stage are not a multiple of 2"),
        (["data.min_pixels=4096", "data.max_pixels=1024"], "data.min_pixels 4096 is above data.max_pixels 1024"),
    ],
)
def test_settings(refusal: Refusal, overrides: list[str], expected: str) -> None:
    assert expected in refusal(*overrides)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([video(["red.png", "wide.png"]), "?"], "the frames of a video differ in size: 32 x 32, 40 x 32"),
        ([video(["red.png", "not there.png"]), "?"], "not there.png does not exist"),
        ([image("thread.png"), "?"], "one side more than 200 times the other"),
        ([image("red.png"), "What is <|image_pad|>?"], "contains the control token <|image_pad|>"),
        ([image("red.png"), "What is <|video_pad|>?"], "contains the control token <|video_pad|>"),
    ],
)
def test_rows(refusal: Refusal, place: Place, content: list[Any], expected: str) -> None:
    write_jsonl(place.data / "bad.jsonl", [row(user(*content), assistant("!"))] * 4)
    line = refusal(f"data.train=[{{path: {place.data}/bad.jsonl}}]", "data.strict=true")
    assert line.startswith("DataError: ") and expected in line and "bad.jsonl:1" in line


def _experts(change: Callable[[str, torch.Tensor], Tensors]) -> Callable[[Path], None]:
    """Rewrite the experts of all layers."""

    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        changed = [change(name, value) if ".experts." in name else {name: value} for name, value in tensors.items()]
        merged = {name: value.contiguous() for part in changed for name, value in part.items()}
        save_file(merged, folder / "model.safetensors", {"format": "pt"})

    return rewrite


def _without_markers(folder: Path) -> None:
    """Neighbouring images become one run of placeholders, whose positions belong to no grid."""
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|vision_start|>", "").replace("<|vision_end|>", ""))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_without_markers, "placeholders in a run where"),
        (edit_config(lambda config: config["vision_config"].update(spatial_merge_size=4)), "merge_size"),
        (edit_config(lambda config: config.update(image_token_id=5)), "config.json says 5"),
        (
            edit_config(lambda config: config["text_config"]["rope_parameters"].update(mrope_section=[2, 2, 4])),
            "mrope_section",
        ),
        (edit_config(lambda config: config["text_config"].update(num_experts_per_tok=9)), "9 of 8 experts"),
        (_experts(lambda name, value: {name: value.transpose(0, 1)}), "experts in a layout that is not read"),
        (
            _experts(lambda name, value: {name: value.transpose(1, 2) if name.endswith(DOWN) else value}),
            "experts in a layout that is not read",
        ),
        (
            _experts(
                lambda name, value: {
                    f"{name.removesuffix(GATE_UP).removesuffix(DOWN)}experts.{index}.{name.rpartition('.')[2]}": part
                    for index, part in enumerate(value)
                }
            ),
            "experts in a layout that is not read",
        ),
    ],
    ids=[
        "template without vision markers",
        "merge size",
        "image token",
        "sections",
        "experts per token",
        "experts in the middle",
        "half transposed",
        "expert by expert",
    ],
)
def test_model_directory(
    refusal: Refusal, place: Place, tmp_path: Path, change: Callable[[Path], None], expected: str
) -> None:
    broken = Path(shutil.copytree(place.model, tmp_path / "model"))
    change(broken)
    rows = [row(user(image("red.png"), image("blue.png"), "?"), assistant("!"))] * 4
    write_jsonl(place.data / "two.jsonl", rows)
    line = refusal(f"model.hf_path={broken}", f"data.train=[{{path: {place.data}/two.jsonl}}]", "data.strict=true")
    assert expected in line
