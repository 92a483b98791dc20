"""Every family equals transformers in logits, loss and the gradient of every parameter, in every layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from tests.parity.battery import check_layout, record
from tests.parity.families import FAMILIES, TinyModel


@pytest.fixture(scope="session")
def hf_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TinyModel], str]:
    """Writes a model, once."""

    @cache
    def write(family: TinyModel) -> str:
        return family.write(tmp_path_factory.mktemp("hf"))

    return write


def cases_of(family: TinyModel, layout: str) -> list[str]:
    """Four ranks, whose messages take longest, see a mixed batch and one full of images; fewer see every case."""
    return list(family.cases)[-2:] if family.layouts[layout].world_size == 4 else list(family.cases)


@pytest.mark.parametrize(
    ("family", "layout"),
    [(family, layout) for family in FAMILIES for layout in family.layouts],
    ids=[f"{family.name}, {layout}" for family in FAMILIES for layout in family.layouts],
)
def test_parity(family: TinyModel, layout: str, hf_directory: Callable[[TinyModel], str]) -> None:
    cases = {case: family.expected(case) for case in cases_of(family, layout)}
    worst = check_layout(family.layouts[layout], hf_directory(family), cases, family.vocabulary)
    record(f"{family.name}, {layout}", *worst)
