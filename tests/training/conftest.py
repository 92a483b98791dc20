"""Model directories that the training contracts share; nothing writes into them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.training.tiny_families import FAMILIES, GEMMA3, QWEN3_VL_MOE
from tests.training.tiny_run_config import TinyFiles, build_multimodal, build_text


@pytest.fixture(scope="session")
def multimodal_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyFiles]:
    """The files of a family by its name, built once."""
    built: dict[str, TinyFiles] = {}

    def files(name: str) -> TinyFiles:
        if name not in built:
            built[name] = build_multimodal(tmp_path_factory.mktemp(name), FAMILIES[name])
        return built[name]

    return files


@pytest.fixture(scope="session")
def multimodal(multimodal_of: Callable[[str], TinyFiles]) -> TinyFiles:
    return multimodal_of(GEMMA3.name)


@pytest.fixture(scope="session")
def experts(multimodal_of: Callable[[str], TinyFiles]) -> TinyFiles:
    return multimodal_of(QWEN3_VL_MOE.name)


@pytest.fixture(scope="session")
def multimodal_bf16(tmp_path_factory: pytest.TempPathFactory) -> TinyFiles:
    return build_multimodal(tmp_path_factory.mktemp("multimodal_bf16"), GEMMA3, torch.bfloat16)


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> TinyFiles:
    return build_text(tmp_path_factory.mktemp("text"))
