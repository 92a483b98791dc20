"""Fixtures of the fuzz tests."""

from __future__ import annotations

import pytest

from tests.data.conftest import (  # noqa: F401
    builder,
    folder,
    hf_path,
    mistral_builder,
    mistral_path,
    mistral_rules,
    qwen_builder,
    qwen_path,
    qwen_rules,
    rules,
)


@pytest.fixture(scope="session")
def factor(request: pytest.FixtureRequest) -> int:
    """How many times as many cases as `make test` are run; `pytest tests/fuzz --fuzz_factor 100` takes an hour."""
    factor: int = request.config.getoption("fuzz_factor")
    return factor
