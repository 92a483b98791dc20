"""Fixtures of the fuzz tests."""

from __future__ import annotations

import pytest

from megatron_vlm.data.prompts import PromptBuilder
from megatron_vlm.families.gemma4.prompt import prompt_rules
from tests.data.conftest import (  # noqa: F401
    builder,
    folder,
    gemma4_builder,
    gemma4_path,
    gemma4_rules,
    hf_path,
    mistral_builder,
    mistral_path,
    mistral_rules,
    qwen_builder,
    qwen_path,
    qwen_rules,
    rules,
)
from tests.data.references import GEMMA4_VARIANTS, gemma4_config


@pytest.fixture(scope="session")
def gemma4_variant() -> str:
    """Of `gemma4_builder`."""
    return "E2B"


@pytest.fixture(scope="session")
def gemma4_unified_builder(tmp_path_factory: pytest.TempPathFactory) -> PromptBuilder:
    """The same for the size without towers."""
    path = tmp_path_factory.mktemp("gemma4_unified")
    GEMMA4_VARIANTS["12B"](path)
    return PromptBuilder(path, prompt_rules(gemma4_config("12B")))


@pytest.fixture(scope="session")
def factor(request: pytest.FixtureRequest) -> int:
    """How many times as many cases as `make test` are run; `pytest tests/fuzz --fuzz_factor 100` takes an hour."""
    factor: int = request.config.getoption("fuzz_factor")
    return factor
