"""The function that models call for an operator: the same as the operator that torch registers, in fewer steps."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.operator_host_cost import cases, functions_entered
from vlm_kernels.library import NAMESPACE

NAMES = list(cases())


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> tuple[Any, Any, tuple[Any, ...]]:
    """The operator, the function that models call, and arguments."""
    torch.manual_seed(0)
    call, arguments = cases()[request.param]
    return getattr(getattr(torch.ops, NAMESPACE), request.param).default, call, arguments


def _run(call: Any, arguments: tuple[Any, ...]) -> tuple[list[Any], list[Any], list[Any]]:
    """Results, gradients, and what was kept for them."""
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        results = call(*arguments)
    results = list(results) if isinstance(results, tuple) else [results]
    inputs = [each for each in arguments if isinstance(each, torch.Tensor) and each.requires_grad]
    outputs = [result for result in results if result.requires_grad]
    gradients = torch.autograd.grad(outputs, inputs, [torch.full_like(each, 0.5) for each in outputs])
    return results, list(gradients), kept


def test_it_equals_the_registered_operator(case: Any) -> None:
    """Also with one argument frozen, where another one trains."""
    operator, call, arguments = case
    trained = [index for index, each in enumerate(arguments) if getattr(each, "requires_grad", False)]
    _compare(operator, call, arguments)
    for index in trained if len(trained) > 1 else ():
        _compare(operator, call, (*arguments[:index], arguments[index].detach(), *arguments[index + 1 :]))


def _compare(operator: Any, call: Any, arguments: tuple[Any, ...]) -> None:
    for mine, registered in zip(_run(call, arguments), _run(operator, arguments), strict=True):
        assert [(each.shape, each.requires_grad) for each in mine] == [
            (each.shape, each.requires_grad) for each in registered
        ]
        assert all(each.equal(other) for each, other in zip(mine, registered, strict=True))


def test_it_enters_fewer_functions(case: Any) -> None:
    operator, call, arguments = case
    assert functions_entered(partial(call, *arguments)) <= functions_entered(partial(operator, *arguments)) - 10


def test_without_gradients_nothing_is_kept(case: Any) -> None:
    _, call, arguments = case
    with torch.no_grad():
        results = call(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    assert not any(result.requires_grad for result in results)


def test_it_is_counted_once_by_dispatch_modes() -> None:
    """A mode sees the operator, not its reference, as FLOP formulas and selective recomputation need."""
    call, arguments = cases()["gated"]
    with FlopCounterMode(display=False, custom_mapping={torch.ops.vlm_kernels.gated: lambda *_, **__: 7}) as mode:
        call(*arguments)
    assert mode.get_flop_counts()["Global"] == {torch.ops.vlm_kernels.gated: 7}
