"""Families and layouts as parameters of tests."""

from __future__ import annotations

from typing import Any

import pytest

from tests.families import FAMILIES
from tests.sizes import full


def each_layout(suite: str) -> list[Any]:
    """Every family with every name of its layouts in a suite; those that only `make test_full` runs are marked."""
    return [
        (pytest.param if family.tables.is_small(suite, name) else full)(family, name, id=f"{family}, {name}")
        for family in FAMILIES
        for name in getattr(family.tables, suite)
    ]
