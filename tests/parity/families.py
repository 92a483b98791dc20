"""Every family in its smallest form: one entry runs the whole comparison with transformers, in every layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from megatron_vlm.parallel.chunk import MoESettings
from tests.parity import gemma3_tiny, mistral3_tiny, qwen3_vl_tiny
from tests.parity.battery import Expected, expected
from tests.parity.layouts import LAYOUTS, TestLayout
from tests.parity.tiny_batches import Reference


@dataclass(frozen=True, eq=False)
class TinyModel:
    """A tiny random model, its batches, and the layouts in which it is compared.

    Attributes:
        name: for test names.
        build: makes transformers' model, the same each time.
        make_batch: a micro-batch from rows and a seed.
        cases: micro-batches of rows, by name.
        vocabulary: rows without padding.
        layouts: by name.
    """

    name: str
    build: Callable[[], PreTrainedModel]
    make_batch: Callable[[Any, int], Reference]
    cases: Mapping[str, Sequence[Any]]
    vocabulary: int
    layouts: Mapping[str, TestLayout]

    @cache  # noqa: B019
    def model(self) -> PreTrainedModel:
        """Transformers' model, built once."""
        return self.build().train()

    @property
    def has_tower(self) -> bool:
        """Not a language model alone."""
        return hasattr(self.model().config, "vision_config")

    def micro_batches(self, case: str) -> list[Reference]:
        """The global batch of a case."""
        return [self.make_batch(rows, seed) for seed, rows in enumerate(self.cases[case])]

    @cache  # noqa: B019
    def expected(self, case: str) -> Expected:
        """What transformers computes."""
        return expected(self.model(), self.micro_batches(case))

    def write(self, folder: Path) -> str:
        """The model as a Hugging Face directory."""
        self.model().save_pretrained(folder)
        return str(folder)


def _some(*names: str) -> dict[str, TestLayout]:
    return {name: LAYOUTS[name] for name in names}


# Gemma 3: micro-batches of one row.


def _gemma3_batch(with_vision: bool, rows: Sequence[gemma3_tiny.Row], seed: int) -> Reference:
    batch = gemma3_tiny.make_batch(rows, seed)
    # Padding sees only itself here; transformers' padding sees the row.
    return Reference(batch, gemma3_tiny.transformers_inputs(batch, with_vision), [count for count, _ in rows])


def _gemma3(name: str, layouts: Mapping[str, TestLayout], cases: Sequence[str], vision: bool, tied: bool) -> TinyModel:
    return TinyModel(
        name,
        partial(gemma3_tiny.build, vision, tied),
        partial(_gemma3_batch, vision),
        {case: [[row] for row in gemma3_tiny.ROWS[case]] for case in cases},
        gemma3_tiny.VOCABULARY,
        layouts,
    )


# Qwen3-VL: DeepStack levels enter after decoder layers 0, 1 and 2; these splits make none, some or all cross stages.

DEEPSTACK_LAYOUTS = {
    "PP2, DeepStack crossing": TestLayout(2, pipeline=2, pipeline_layout=(1, 3)),
    "PP2xVPP2, DeepStack crossing": TestLayout(2, pipeline=2, virtual=2, pipeline_layout=(0, 1, 1, 2)),
    "TP2xPP2+SP, vision alone": TestLayout(
        4, tensor=2, pipeline=2, sequence_parallel=True, pipeline_layout=(0, 4), vision="data"
    ),
    "DP2xPP2, overlapped, DeepStack crossing": TestLayout(
        4, pipeline=2, pipeline_layout=(1, 3), distributed_optimizer=True, overlap=True
    ),
    "DP2, overlapped, full recompute": TestLayout(2, distributed_optimizer=True, overlap=True, recompute="full"),
}

ALLGATHER = MoESettings(token_dispatcher_type="allgather")
EXPERT_LAYOUTS = {
    "TP1": TestLayout(),
    "TP2+SP": TestLayout(2, tensor=2, sequence_parallel=True),
    "TP4+SP": TestLayout(4, tensor=4, sequence_parallel=True),
    "PP2": TestLayout(2, pipeline=2),
    "PP2 uneven": TestLayout(2, pipeline=2, pipeline_layout=(1, 3)),
    "PP4": TestLayout(4, pipeline=4),
    "PP4, stages without layers between": TestLayout(4, pipeline=4, pipeline_layout=(2, 0, 0, 2)),
    "PP2xVPP2": TestLayout(2, pipeline=2, virtual=2),
    "TP2xPP2+SP": TestLayout(4, tensor=2, pipeline=2, sequence_parallel=True),
    "DP2, distributed optimizer": TestLayout(2, distributed_optimizer=True),
    "EP2": TestLayout(2, expert=2),
    "EP2, distributed optimizer, overlapped": TestLayout(2, expert=2, distributed_optimizer=True, overlap=True),
    "EP2, all-gather": TestLayout(2, expert=2, moe=ALLGATHER),
    "EP2, full recompute": TestLayout(2, expert=2, recompute="full"),
    "EP4": TestLayout(4, expert=4),
    "EP2xDP2, distributed optimizer": TestLayout(4, expert=2, distributed_optimizer=True),
    "EP2xTP2+SP": TestLayout(4, tensor=2, sequence_parallel=True, expert=2),
    "EP2xTP2+SP, all-gather": TestLayout(4, tensor=2, sequence_parallel=True, expert=2, moe=ALLGATHER),
    "EP4xTP2+SP": TestLayout(4, tensor=2, sequence_parallel=True, expert=4),
    "EP2xPP2": TestLayout(4, pipeline=2, expert=2),
    "ETP2, TP1": TestLayout(2, expert_tensor=2),
    "ETP2xTP2+SP": TestLayout(2, tensor=2, sequence_parallel=True, expert_tensor=2),
    "ETP2xEP2xTP2+SP": TestLayout(4, tensor=2, sequence_parallel=True, expert=2, expert_tensor=2),
    "ETP2xEP2xTP2+SP, all-gather": TestLayout(
        4, tensor=2, sequence_parallel=True, expert=2, expert_tensor=2, moe=ALLGATHER
    ),
    "TP2+SP, vision DP": TestLayout(2, tensor=2, sequence_parallel=True, vision="data"),
}


def _qwen3_vl(
    name: str, layouts: Mapping[str, TestLayout], cases: Sequence[str], moe: bool = False, tied: bool = False
) -> TinyModel:
    return TinyModel(
        name,
        partial(qwen3_vl_tiny.build, moe, tied),
        partial(qwen3_vl_tiny.make_batch, moe=moe),
        {case: qwen3_vl_tiny.CASES[case] for case in cases},
        qwen3_vl_tiny.VOCABULARY,
        layouts,
    )


# Mistral3


def _mistral3(
    name: str,
    layouts: Mapping[str, TestLayout],
    cases: Sequence[str],
    ministral: bool,
    tied: bool = False,
    **settings: Any,
) -> TinyModel:
    return TinyModel(
        name,
        partial(mistral3_tiny.build, ministral, tied, **settings),
        mistral3_tiny.make_batch,
        {case: mistral3_tiny.CASES[case] for case in cases},
        mistral3_tiny.VOCABULARY,
        layouts,
    )


# Without those in which nothing is a family's own; tests/distributed has the gradient rules of every family at TP4.
OWN_LAYOUTS = {
    name: layout
    for name, layout in LAYOUTS.items()
    if name
    not in (
        "TP4+SP",
        "PP4, no layers beside the tower and the head",
        "DP2xTP2",
        "TP2+SP, vision DP",
        "TP4, vision DP",
    )
}
TEXT_LAYOUTS = _some("TP1", "TP2+SP", "TP4", "PP2xVPP2", "TP2xPP2+SP", "DP2, distributed optimizer")
FEW_LAYOUTS = _some("TP1", "TP2xPP2+SP")
QWEN3_VL_MOE = _qwen3_vl("Qwen3-VL-MoE", EXPERT_LAYOUTS, ("two images", "image and video", "mixed"), moe=True)
FAMILIES = (
    _gemma3("Gemma 3", LAYOUTS, list(gemma3_tiny.ROWS), vision=True, tied=True),
    _gemma3("Gemma 3 text only", TEXT_LAYOUTS, ["text"], vision=False, tied=True),
    _gemma3("Gemma 3 untied", FEW_LAYOUTS, ["mixed"], vision=True, tied=False),
    _qwen3_vl("Qwen3-VL", OWN_LAYOUTS | DEEPSTACK_LAYOUTS, list(qwen3_vl_tiny.CASES)),
    _qwen3_vl("Qwen3-VL tied", FEW_LAYOUTS, ["mixed"], tied=True),
    QWEN3_VL_MOE,
    _mistral3("Ministral3", OWN_LAYOUTS, list(mistral3_tiny.CASES), ministral=True),
    _mistral3("Ministral3 tied", FEW_LAYOUTS, ["mixed"], ministral=True, tied=True),
    _mistral3("Mistral3", _some("TP1", "TP4", "TP2xPP2+SP"), ["images", "mixed"], ministral=False),
    _mistral3("Mistral3 with a window", FEW_LAYOUTS, ["mixed"], ministral=False, sliding_window=6),
)
