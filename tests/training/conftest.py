"""Model directories that the training contracts share; nothing writes into them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

from tests.families.gemma3 import GEMMA3
from tests.families.qwen3_vl import QWEN3_VL_MOE
from tests.families.tiny_family import TinyFamily
from tests.training.tiny_run_config import TinyFiles, build_multimodal, build_text


@pytest.fixture(scope="session")
def multimodal_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TinyFamily], TinyFiles]:
    """The files of a family, built once."""

    @cache
    def files(family: TinyFamily) -> TinyFiles:
        return build_multimodal(tmp_path_factory.mktemp(family.name), family)

    return files


@pytest.fixture(scope="session")
def multimodal(multimodal_of: Callable[[TinyFamily], TinyFiles]) -> TinyFiles:
    return multimodal_of(GEMMA3)


@pytest.fixture(scope="session")
def experts(multimodal_of: Callable[[TinyFamily], TinyFiles]) -> TinyFiles:
    return multimodal_of(QWEN3_VL_MOE)


@pytest.fixture(scope="session")
def multimodal_bf16(tmp_path_factory: pytest.TempPathFactory) -> TinyFiles:
    return build_multimodal(tmp_path_factory.mktemp("multimodal_bf16"), GEMMA3, torch.bfloat16)


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> TinyFiles:
    return build_text(tmp_path_factory.mktemp("text"))
