"""From a sweep file to points, and what a sweep file is refused for."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from typing import Any

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.files.config_files import read_config_file
from megatron_vlm.sweeps.distributions import draw
from megatron_vlm.sweeps.expressions import evaluate
from megatron_vlm.sweeps.points import Draft, expand
from megatron_vlm.sweeps.sweep_file import read_sweep_file
from tests.sweeps.sweep_files import Files


def drafts_of(files: Files, **content: Any) -> list[Draft]:
    settings, file = read_sweep_file(files.write(**content))
    return expand(settings, file, read_config_file(settings.base))[0]


def refusal(files: Files, **content: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        drafts_of(files, **content)
    return str(caught.value)


def test_every_combination(files: Files) -> None:
    grid = {"optimizer.lr": [1e-3, 1e-2], "train.seed": [1, 2, 3]}
    points = [{"optimizer.eps": 1e-8}, {"optimizer.eps": 1e-6}]
    drafts = drafts_of(files, grid=grid, points=points, set={"train.log_interval": 2})
    expected = [
        {"train.log_interval": 2, **point, "optimizer.lr": lr, "train.seed": seed}
        for point, lr, seed in itertools.product(points, *grid.values())
    ]
    assert [draft.overrides for draft in drafts] == expected
    assert drafts[0].name == "eps=1e-08,lr=0.001,seed=1"
    assert drafts[0].run_dir == files.folder / "out/runs/eps=1e-08,lr=0.001,seed=1"
    assert drafts[0].content["optimizer"] == {"lr": 1e-3, "schedule": "constant", "eps": 1e-8}
    assert drafts[0].content["train"]["train_iters"] == 4, "the base's"


def test_a_section_as_a_value(files: Files) -> None:
    layouts = [{"tensor_model_parallel_size": 1}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}]
    drafts = drafts_of(files, grid={"parallel": layouts})
    assert [draft.overrides for draft in drafts] == [
        {f"parallel.{key}": value for key, value in layout.items()} for layout in layouts
    ]


def test_samples_are_those_of_their_seed(files: Files) -> None:
    keys = {"optimizer.lr": {"log_uniform": [1e-5, 1e-2]}, "train.seed": {"int": [1, 6]}}
    first = drafts_of(files, grid=None, random={"samples": 5, "seed": 3, "keys": keys})
    more = {**keys, "optimizer.eps": {"choice": [1e-8, 1e-7]}}
    second = drafts_of(files, grid=None, random={"samples": 9, "seed": 3, "keys": more})
    assert [{key: draft.overrides[key] for key in keys} for draft in second[:5]] == [d.overrides for d in first]
    other = drafts_of(files, grid=None, random={"samples": 5, "seed": 4, "keys": keys})
    assert not {draft.name for draft in other} & {draft.name for draft in first}


def test_distributions() -> None:
    """Against their definitions: 4,000 draws, whose mean is within four standard errors."""
    generator, count = random.Random(0), 4000
    uniform = [draw({"uniform": [2, 6]}, generator) for _ in range(count)]
    assert min(uniform) >= 2 and max(uniform) <= 6
    assert abs(statistics.fmean(uniform) - 4) < 4 * (4 / math.sqrt(12)) / math.sqrt(count)
    logarithms = [math.log(draw({"log_uniform": [1e-5, 1e-1]}, generator)) for _ in range(count)]
    spread = math.log(1e4)
    assert min(logarithms) >= math.log(1e-5) - 1e-9 and max(logarithms) <= math.log(1e-1) + 1e-9
    assert abs(statistics.fmean(logarithms) - math.log(1e-3)) < 4 * spread / math.sqrt(12) / math.sqrt(count)
    assert {draw({"int": [3, 5]}, generator) for _ in range(200)} == {3, 4, 5}
    assert {draw({"choice": ["a", None]}, generator) for _ in range(200)} == {"a", None}


def test_derived_values_and_exclusions(files: Files) -> None:
    drafts = drafts_of(
        files,
        grid={"optimizer.lr": [1e-4, 3e-4], "train.global_batch_size": [4, 8]},
        derived={
            "optimizer.min_lr": "optimizer.lr / 10",
            "train.micro_batch_size": "train.global_batch_size // 2 if optimizer.lr > 2e-4 else 1",
            "checkpoint.export_hf": "run_dir + '/export'",
            "optimizer.eps": 1e-6,
        },
        exclude=["optimizer.lr == 1e-4 and train.global_batch_size > train.train_iters"],
    )
    found = [(d.overrides["optimizer.lr"], d.overrides["train.global_batch_size"]) for d in drafts]
    assert found == [(1e-4, 4), (3e-4, 4), (3e-4, 8)]
    assert [draft.overrides["optimizer.min_lr"] for draft in drafts] == [1e-5, 3e-5, 3e-5], "without float noise"
    assert [draft.overrides["train.micro_batch_size"] for draft in drafts] == [1, 2, 4]
    assert drafts[0].overrides["checkpoint.export_hf"] == f"{drafts[0].run_dir}/export"
    assert "min_lr" not in drafts[0].name


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "open('/etc/passwd')",
        "optimizer.__class__",
        "model.hf_path.__class__.__mro__",
        "model.hf_path.format(1)",
        "(lambda: 1)()",
        "[x for x in range(10 ** 9)]",
        "9 ** 9 ** 9",
        "'a' * 10 ** 9",
        "optimizer.lr.real",
        "optimizer",
        "1 +",
        "optimizer.lr = 1",
        "optimizer.lr == 1; 1",
        "",
    ],
)
def test_expressions_reach_only_keys(expression: str) -> None:
    content = {"optimizer": {"lr": 1.0}, "model": {"hf_path": "x"}}
    with pytest.raises(ConfigError, match=r"sweep.yaml:3"):
        evaluate(expression, content, "sweep.yaml:3")


def test_names_of_run_folders(files: Files) -> None:
    drafts = drafts_of(files, point_name="{train.seed:03}/lr{optimizer.lr:g}", set={"train.seed": 7})
    assert [draft.name for draft in drafts] == ["007/lr0.001", "007/lr0.002", "007/lr0.003"]
    (draft,) = drafts_of(files, grid={"model.freeze": [["../x y", "a/b"]]})
    assert draft.name == "freeze=-..-x-y-,-a-b-", "values make no folders"
    assert draft.run_dir.parent == files.folder / "out/runs"
    assert "is no name of a folder" in refusal(files, point_name="../{optimizer.lr}")
    assert "optimizer.lr.__class__ is no key" in refusal(files, point_name="{optimizer.lr.__class__}")
    assert "point_name '{0}' does not work" in refusal(files, point_name="{0}")
    assert "too long" in refusal(files, grid={"model.freeze": [["language_model.*" * 30]]})


def test_what_a_sweep_file_is_refused_for(files: Files) -> None:
    """All at once, in one line each, with the line of the file."""
    text = refusal(
        files,
        grid={"optimizer.lr": [], "optimizer.lrr": [1], "train.seed": [1]},
        set={"run_dir": "x", "train.seed": 1},
        random={"samples": 2, "keys": {"optimizer.eps": {"gauss": [0, 1]}, "optimizer.min_lr": {"uniform": [2, 1]}}},
        concurrency=0,
    )
    for line in (
        "concurrency is 0 [sweep.yaml:",
        "grid.optimizer.lr is empty [sweep.yaml:4] -- list its values",
        "random.keys.optimizer.eps is {'gauss': [0, 1]} [sweep.yaml:",
        "random.keys.optimizer.min_lr has uniform: [2, 1] [sweep.yaml:",
        "run_dir is set by the sweep [sweep.yaml:",
        "unknown key optimizer.lrr [sweep.yaml:5] -- did you mean optimizer.lr?",
        "train.seed stands in set and in grid [sweep.yaml:7] -- keep one of them",
    ):
        assert f") {line}" in text
    assert text.startswith("7 problems:")


def test_keys_of_the_file_itself(files: Files) -> None:
    text = refusal(files, base=None, grid={}, grids={}, resources={"node": 2, "time": 30}, **{"optimizer.lr": 1})
    assert ") unknown key grids [sweep.yaml:3] -- did you mean grid?" in text
    assert "unknown key resources.node [sweep.yaml:5] -- did you mean resources.nodes?" in text
    assert "unknown key optimizer.lr [sweep.yaml:7] -- keys of the configuration stand below set, grid" in text
    assert "base is missing [sweep.yaml]" in text
    assert "the sweep has no points" in refusal(files, grid=None)
    assert "leaves out all 3 points" in refusal(files, exclude=["optimizer.lr > 0"])
    assert "names optimizer.lrr, which is no key" in refusal(files, exclude=["optimizer.lrr > 0"])
    assert "did you mean optimizer.lr?" in refusal(files, derived={"optimizer.min_lr": "optimizer.lrr"})
    assert "300,000 points" in refusal(files, grid={"train.seed": [*range(300)], "train.log_interval": [*range(1000)]})


def test_a_comparison_with_one_sign_is_refused(files: Files) -> None:
    for expression in ("train.seed = 0", "optimizer.lr == 1e-3 and train.seed=1"):
        text = refusal(files, exclude=[expression])
        assert f"'{expression}' has =, which compares nothing [sweep.yaml:" in text and "did you mean ==?" in text
    drafts = drafts_of(files, exclude=["optimizer.lr >= 2e-3", "train.seed != 1234", "optimizer.eps == null"])
    assert [draft.overrides["optimizer.lr"] for draft in drafts] == [1e-3]
    assert len(drafts_of(files, exclude=["data.packing == true and data.packing == false"])) == 3


def test_a_key_that_is_given_in_two_ways(files: Files) -> None:
    """Whole and in part, or in the two forms of a section; also in the same part of the file."""
    multiplier = "optimizer.lr_multipliers.vision_tower"
    both = {multiplier: [0.1, 0.5], "optimizer.lr_multipliers": [{"projector": 1.0}, {}]}
    part = "and one is a part of the other"
    assert f"{multiplier} stands in grid and optimizer.lr_multipliers in grid, {part}" in refusal(files, grid=both)
    text = refusal(files, grid={"optimizer.lr_multipliers": [{}]}, set={multiplier: 0.1})
    assert f"{multiplier} stands in set and optimizer.lr_multipliers in grid, {part}" in text
    points = [{"optimizer": {"lr": 1e-3}, "optimizer.lr": 2e-3}]
    assert "optimizer.lr stands twice in one of points [sweep.yaml:3]" in refusal(files, grid=None, points=points)
    layouts = {"parallel": [{"tensor_model_parallel_size": 1}], "parallel.tensor_model_parallel_size": [2]}
    assert "parallel.tensor_model_parallel_size stands twice in grid [sweep.yaml:6]" in refusal(files, grid=layouts)
    text = refusal(files, set={key: values[0] for key, values in layouts.items()})
    assert "parallel.tensor_model_parallel_size stands twice in set [sweep.yaml:" in text
    keys = {multiplier: {"uniform": [0, 1]}, "optimizer.lr_multipliers": {"choice": [{}]}}
    assert part in refusal(files, grid=None, random={"samples": 2, "keys": keys})
    drafts = drafts_of(files, grid={"parallel": [{"tensor_model_parallel_size": 1}, {"context_parallel_size": 2}]})
    assert len(drafts) == 2, "values of one key may give different parts"


def test_remedies_for_slips(files: Files) -> None:
    """Each says what to write instead, and none ends in a traceback."""
    assert "expected a mapping of keys to lists, such as {optimizer.lr: [" in refusal(files, grid={"train.seed": 3})
    assert "expected a mapping of keys to lists" in refusal(files, grid={"optimizer": {"lr": [1, 2]}})
    text = refusal(files, resources={"environment": {"MAX_CRASHES": 5}})
    assert "expected a mapping such as {NAME: '5'}, with text in quotes" in text
    assert "1 is no key [sweep.yaml:3] -- write keys as section.key" in refusal(files, grid={1: [1, 2]})
    for template in ("{optimizer.betas:g}", "{train.eval_interval:d}", "{train.seed:999999999999}"):
        assert "does not work: " in refusal(files, point_name=template)
    assert "is no name of a folder" in refusal(files, point_name="lr\n{optimizer.lr:g}")
