"""What `make test` leaves to `make test_full`: every two features of layouts that meet anywhere meet in it too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import combinations
from typing import Any

import pytest

from tests.families import FAMILIES
from tests.families.layouts import LAYOUT_TABLES
from tests.families.tiny_family import TinyFamily
from tests.parity.layouts import TestLayout

# Those that compare gradients, their norm or an update with transformers'.
COMPARED = ("parity", "rules", "no_images", "step", "text_step", "adamw", "norm")
# What says nothing about how ranks divide the work, or what the other fields say already.
NO_FEATURES = {"world_size", "loss", "freeze", "micro_batch_size", "precision"}
MODEL_TYPES = sorted({family.config.model_type for family in FAMILIES})

Feature = tuple[str, Any]
Pair = tuple[Feature, ...]


def data_size(layout: TestLayout) -> int:
    return layout.world_size // (layout.tensor * layout.context * layout.pipeline)


def features(family: TinyFamily, layout: TestLayout) -> list[Feature]:
    found = {each.name: getattr(layout, each.name) for each in fields(layout) if each.name not in NO_FEATURES}
    if layout.pipeline_layout is not None:
        found["pipeline_layout"] = "stages without layers" if 0 in layout.pipeline_layout else "uneven"
    if layout.vision_pipeline_layout is not None:
        found["vision_pipeline_layout"] = "spread"
    return [("model_type", family.config.model_type), ("data", data_size(layout)), *found.items()]


def small_layouts(family: TinyFamily, suite: str) -> list[TestLayout]:
    """Those that `make test` runs."""
    table = getattr(family.tables, suite)
    return [layout for name, layout in table.items() if family.tables.is_small(suite, name)]


def all_layouts(family: TinyFamily, suite: str) -> list[TestLayout]:
    return list(getattr(family.tables, suite).values())


def pairs(families: Sequence[TinyFamily], layouts: Callable[[TinyFamily, str], list[TestLayout]]) -> set[Pair]:
    """Every two features that meet in some layout."""
    return {
        pair
        for family in families
        for suite in COMPARED
        for layout in layouts(family, suite)
        for pair in combinations(features(family, layout), 2)
    }


def of_kind(has_experts: bool) -> list[TinyFamily]:
    return [family for family in FAMILIES if family.has_experts == has_experts]


@pytest.mark.parametrize("has_experts", [False, True])
def test_every_two_features_meet_in_make_test(has_experts: bool) -> None:
    """Among them the type of model, which meets every feature that any of its layouts has."""
    families = of_kind(has_experts)
    missing = pairs(families, all_layouts) - pairs(families, small_layouts)
    assert not missing, "name a layout with these in `LayoutTables.small`"


@pytest.mark.parametrize(
    ("suite", "left_out"),
    [
        ("step", "DP4, one rank without images"),
        ("parity", "TP2xPP2+SP, full recompute"),
        ("adamw", "DP2xPP2xVPP2, overlapped"),
    ],
)
def test_a_layout_that_is_left_out_shows(suite: str, left_out: str) -> None:
    def without(family: TinyFamily) -> TinyFamily:
        suites = family.tables
        kept = [name for name in getattr(suites, suite) if name != left_out and suites.is_small(suite, name)]
        return replace(family, tables=replace(suites, small={**suites.small, suite: kept}))

    families = of_kind(has_experts=False)
    assert pairs(families, all_layouts) - pairs([without(family) for family in families], small_layouts)


# In which one family of a kind stands for others, as rows differ no more between them than in other suites.
OF_KINDS = ("packed_step",)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_every_suite_of_a_family_runs_in_make_test(family: TinyFamily) -> None:
    for suite, names in family.tables.small.items():
        assert suite in LAYOUT_TABLES
        assert set(names) <= getattr(family.tables, suite).keys(), f"{suite} has no such layouts"
        assert names or suite in OF_KINDS or not getattr(family.tables, suite), suite


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_model_type_equals_transformers_in_several_layouts(model_type: str) -> None:
    """In three at least, one of which divides it over four ranks in two ways."""
    layouts = [
        layout
        for family in FAMILIES
        if family.config.model_type == model_type
        for layout in small_layouts(family, "parity")
    ]
    assert len(set(layouts)) >= 3
    sizes = [(layout.tensor, layout.pipeline, data_size(layout)) for layout in layouts if layout.world_size == 4]
    assert any(sorted(each) == [1, 2, 2] for each in sizes)
