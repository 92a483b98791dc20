"""Every registered family has an entry, and equals transformers in logits, loss and all gradients, in every layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from megatron_vlm.families import registry
from tests.families import FAMILIES
from tests.families.layouts import LAYOUT_TABLES
from tests.families.parameters import each_layout
from tests.families.tiny_family import TinyFamily
from tests.parity.comparison import check_layout, record


@pytest.fixture(scope="session")
def hf_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TinyFamily], str]:
    """Writes a model, once."""

    @cache
    def write(family: TinyFamily) -> str:
        return family.write(tmp_path_factory.mktemp("hf"))

    return write


def cases_of(family: TinyFamily, layout: str) -> list[str]:
    """Four ranks, whose messages take longest, see a mixed batch and a packed one; fewer see every case."""
    return list(family.cases)[-2:] if family.tables.parity[layout].world_size == 4 else list(family.cases)


@pytest.mark.parametrize(("family", "layout"), each_layout("parity"))
def test_parity(family: TinyFamily, layout: str, hf_directory: Callable[[TinyFamily], str]) -> None:
    cases = {case: family.expected(case) for case in cases_of(family, layout)}
    worst = check_layout(family.tables.parity[layout], hf_directory(family), cases, family.vocabulary)
    record(f"{family}, {layout}", *worst)


@pytest.mark.parametrize("registered", registry.FAMILIES, ids=lambda registered: registered.name)
def test_every_registered_family_runs_every_suite(registered: registry.Family) -> None:
    """Each model_type with a tower has an entry that leaves out no suite that another entry of its family has not."""
    with_tower = {name for name in registered.model_types if name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    entries = {family.name: family for family in FAMILIES if family.name in registered.model_types}
    missing = with_tower - entries.keys()
    assert entries and not missing, f"no entry in tests/families for {missing or registered.name}"
    assert all(registry.detect(family.config) is registered for family in entries.values())
    for suite in LAYOUT_TABLES:
        assert any(getattr(family.tables, suite) for family in entries.values()), suite
