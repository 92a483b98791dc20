"""The two sizes of the suite: `make test` leaves out what is marked `full`, `make test_full` runs everything."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def full(*values: Any, id: str | None = None) -> Any:
    """`pytest.param` of what only `make test_full` runs."""
    return pytest.param(*values, id=id, marks=pytest.mark.full)


def two_sizes(names: Iterable[str], *small: str) -> list[Any]:
    """All names, of which `make test` runs these alone."""
    names = list(names)
    assert set(small) <= set(names)
    return [name if name in small else full(name) for name in names]
