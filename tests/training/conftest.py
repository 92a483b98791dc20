"""Model directories that the training contracts share; nothing writes into them."""

from __future__ import annotations

import pytest
import torch

from tests.training.tiny_run_config import TinyFiles, build_multimodal, build_text


@pytest.fixture(scope="session")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> TinyFiles:
    return build_multimodal(tmp_path_factory.mktemp("multimodal"))


@pytest.fixture(scope="session")
def multimodal_bf16(tmp_path_factory: pytest.TempPathFactory) -> TinyFiles:
    return build_multimodal(tmp_path_factory.mktemp("multimodal_bf16"), torch.bfloat16)


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> TinyFiles:
    return build_text(tmp_path_factory.mktemp("text"))
