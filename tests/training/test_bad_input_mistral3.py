"""The entry point with configurations of Mistral3 that these modules do not compute: refused in one line each."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import Mistral4Config

from tests.families.mistral3 import MISTRAL3
from tests.training.loop_run import Place, build_place, edit_config, refused


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return build_place(tmp_path_factory.mktemp("place"), MISTRAL3)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            edit_config(lambda config: config.update(text_config=Mistral4Config().to_dict())),
            "a language model of type 'mistral4' is not supported for Mistral3",
        ),
        (
            edit_config(lambda config: config.update(vision_feature_layer=[-2, -1])),
            "vision_feature_layer [-2, -1] is not supported for Mistral3",
        ),
        (
            edit_config(lambda config: config.update(projector_hidden_act="silu")),
            "projector_hidden_act 'silu' is not supported for Mistral3",
        ),
        (
            edit_config(lambda config: config["vision_config"].update(hidden_act="relu")),
            "vision hidden_act 'relu' is not supported for Mistral3",
        ),
        (
            edit_config(lambda config: config["text_config"]["rope_parameters"].pop("llama_4_scaling_beta")),
            "a Ministral3 without rope_parameters.llama_4_scaling_beta is not supported for Mistral3",
        ),
        (
            edit_config(lambda config: config["text_config"]["rope_parameters"].update(rope_type="linear")),
            "rope_type 'linear' is not supported for Mistral3",
        ),
    ],
    ids=["Mistral4", "several layers of the tower", "projector", "tower", "query scale", "rotation"],
)
def test_model_directory(
    place: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    expected: str,
) -> None:
    broken = Path(shutil.copytree(place.model, tmp_path / "model"))
    change(broken)
    line = refused(place.arguments(tmp_path / "new", f"model.hf_path={broken}"), capsys)
    assert line.startswith("ConfigError: ") and expected in line
