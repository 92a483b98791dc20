"""The layouts in which each suite runs a family: by default, with experts, and all that there are (Gemma 3).

A row is in one table only where another suite shows the same of every family. `make test` runs the rows that
`LayoutTables.small` names, in which every two features of layouts meet that meet in any row (`test_layouts.py`);
`make test_full` runs all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial

from megatron_vlm.parallel.chunk_settings import MoESettings
from tests.families.rows import GLOBAL_BATCH
from tests.parity.layouts import LAYOUTS, TestLayout

Table = Mapping[str, TestLayout]
ALLGATHER = MoESettings(token_dispatcher_type="allgather")
_shared = partial(TestLayout, distributed_optimizer=True)


def some(table: Table, *names: str) -> dict[str, TestLayout]:
    """These rows of a table."""
    return {name: table[name] for name in names}


def without(table: Table, *names: str) -> dict[str, TestLayout]:
    """All but these rows of a table."""
    return {name: layout for name, layout in table.items() if name not in names}


# Tokens over context ranks; tests/parity deals them in planned and in random blocks

CONTEXT = {
    "CP2, random blocks": TestLayout(2, context=2, blocks="random"),
    "CP4": TestLayout(4, context=4),
    "CP2xTP2+SP": TestLayout(4, context=2, tensor=2, sequence_parallel=True),
    "CP2xTP2, vision DP, selective recompute": TestLayout(
        4, context=2, tensor=2, vision="data", recompute="selective", blocks="random"
    ),
    "CP2xPP2xVPP2, full recompute": TestLayout(4, context=2, pipeline=2, virtual=2, recompute="full"),
    "CP2xDP2, overlapped": TestLayout(4, context=2, distributed_optimizer=True, overlap=True),
}
CONTEXT_OF_EXPERTS = some(CONTEXT, "CP2, random blocks", "CP2xPP2xVPP2, full recompute", "CP2xDP2, overlapped") | {
    "CP2, EP2": TestLayout(2, context=2, expert=2),
    "CP4, EP2, all-gather": TestLayout(4, context=4, expert=2, moe=ALLGATHER),
    "CP2xTP2+SP, EP4": TestLayout(4, context=2, tensor=2, sequence_parallel=True, expert=4),
}
FEW_CONTEXT = some(CONTEXT, "CP2, random blocks", "CP2xTP2+SP")

# tests/parity: logits, loss, every gradient

PARITY = without(
    LAYOUTS,
    "TP4+SP",
    "PP4, no layers beside the tower and the head",
    "DP2xTP2",
    "TP2+SP, vision DP",
    "TP4, vision DP",
)
PARITY |= CONTEXT
PARITY_OF_EXPERTS = some(LAYOUTS, "TP1", "TP2+SP", "TP4+SP", "PP2", "PP4", "PP4, stages without layers between")
PARITY_OF_EXPERTS |= some(LAYOUTS, "PP2xVPP2", "TP2xPP2+SP", "DP2, distributed optimizer", "TP2+SP, vision DP")
PARITY_OF_EXPERTS |= CONTEXT_OF_EXPERTS
PARITY_OF_EXPERTS |= {
    "PP2 uneven": TestLayout(2, pipeline=2, pipeline_layout=(1, 3)),
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
}


def spread_tower(num_layers: int) -> dict[str, TestLayout]:
    """Layouts that spread the layers of a vision tower over chunks; the last has the embedding, on various ranks."""
    two, three = (1, num_layers - 1), (num_layers - 1, 0, 1) if num_layers < 4 else (1, num_layers - 2, 1)
    pp2 = TestLayout(2, pipeline=2, vision_pipeline_layout=two)
    return {
        "PP2, tower on both": pp2,
        "PP2, frozen tower on both": replace(pp2, freeze=("vision_tower",)),
        "PP2xVPP2, tower on two": replace(pp2, virtual=2),
        "PP4, tower on two": TestLayout(4, pipeline=4, vision_pipeline_layout=two),
        "TP2xPP2xVPP2+SP, full recompute, tower on three": TestLayout(
            4,
            tensor=2,
            pipeline=2,
            virtual=2,
            sequence_parallel=True,
            recompute="full",
            vision_pipeline_layout=three,
        ),
        "TP2xPP2+SP, vision DP, tower on both": TestLayout(
            4, tensor=2, pipeline=2, sequence_parallel=True, vision="data", vision_pipeline_layout=two
        ),
        "DP2xPP2, overlapped, tower on both": TestLayout(
            4, pipeline=2, distributed_optimizer=True, overlap=True, vision_pipeline_layout=two
        ),
    }


def spread_tower_with_experts(num_layers: int) -> dict[str, TestLayout]:
    """Those of them in which experts are sharded too."""
    return some(
        spread_tower(num_layers),
        "TP2xPP2xVPP2+SP, full recompute, tower on three",
        "TP2xPP2+SP, vision DP, tower on both",
    )


CONTEXT_OF_TOWERS = {
    "CP2xPP2, tower on both": TestLayout(4, context=2, pipeline=2, vision_pipeline_layout=(1, 1), blocks="random")
}
FEW = some(LAYOUTS, "TP1", "TP2xPP2+SP") | FEW_CONTEXT

# tests/distributed/test_gradient_rules.py: what each rank's own backward pass leaves

RULES = some(LAYOUTS, "TP4+SP", "TP4, vision DP")
RULES |= some(CONTEXT, "CP2xTP2, vision DP, selective recompute")
ALL_RULES = some(LAYOUTS, "TP2", "TP2+SP", "TP4", "TP4+SP", "TP2, vision DP", "TP2+SP, vision DP", "TP4, vision DP")
ALL_RULES |= some(CONTEXT, "CP2xTP2+SP", "CP2xTP2, vision DP, selective recompute")
RULES_OF_EXPERTS = some(CONTEXT_OF_EXPERTS, "CP2xTP2+SP, EP4") | {
    "TP2+SP, experts whole": TestLayout(2, tensor=2, sequence_parallel=True),
    "EP2 of tensor ranks": TestLayout(2, tensor=2, sequence_parallel=True, expert=2),
    "ETP2xTP2+SP": TestLayout(2, tensor=2, sequence_parallel=True, expert_tensor=2),
    "DP2xTP2+SP, EP2": TestLayout(4, tensor=2, sequence_parallel=True, expert=2),
    "EP2 of data ranks": TestLayout(2, expert=2),
}

# tests/distributed/test_parts.py: a data rank without images, and first weights

NO_IMAGES = {
    "DP2": TestLayout(2, distributed_optimizer=True, overlap=True),
    "DP2xTP2, vision DP": TestLayout(4, tensor=2, distributed_optimizer=True, overlap=True, vision="data"),
    "DP2xPP2": TestLayout(4, pipeline=2, distributed_optimizer=True, overlap=True),
    "EP2": TestLayout(2, expert=2, distributed_optimizer=True, overlap=True),
    "EP2xTP2+SP, vision DP": TestLayout(
        4, tensor=2, expert=2, sequence_parallel=True, distributed_optimizer=True, overlap=True, vision="data"
    ),
}
FIRST_WEIGHTS = some(LAYOUTS, "TP2", "TP4", "PP2xVPP2", "TP2xPP2+SP", "TP2, vision DP")
FIRST_WEIGHTS_OF_EXPERTS = {
    "ETP2xEP2xTP2+SP": TestLayout(4, tensor=2, sequence_parallel=True, expert=2, expert_tensor=2)
}

# tests/training/test_one_step.py: from rows to an export. Micro-batches of two rows hold padding, and in file order
# rows with and without images.

STEP = {
    "TP1": TestLayout(),
    "TP1, one micro-batch": TestLayout(micro_batch_size=GLOBAL_BATCH),
    "TP2": TestLayout(2, tensor=2, micro_batch_size=2),
    "TP2+SP": TestLayout(2, tensor=2, sequence_parallel=True, micro_batch_size=2),
    "TP4": TestLayout(4, tensor=4, micro_batch_size=4),
    "PP2": TestLayout(2, pipeline=2),
    "PP2 uneven": TestLayout(2, pipeline=2, pipeline_layout=(1, 3), micro_batch_size=2),
    "PP4": TestLayout(4, pipeline=4, micro_batch_size=2),
    "PP2xVPP2": TestLayout(2, pipeline=2, virtual=2),
    "TP2xPP2+SP": TestLayout(4, tensor=2, pipeline=2, sequence_parallel=True, micro_batch_size=2),
    "DP2": TestLayout(2, micro_batch_size=2),
    "DP2, overlapped": TestLayout(2, overlap=True),
    "DP4, one rank without images": TestLayout(4),
    "DP2xTP2": TestLayout(4, tensor=2),
    "TP2, vision DP": TestLayout(2, tensor=2, vision="data", micro_batch_size=2),
    "TP2+SP, vision DP": TestLayout(2, tensor=2, sequence_parallel=True, vision="data"),
    "CP2": TestLayout(2, context=2, micro_batch_size=2),
    "CP2xTP2+SP": TestLayout(4, context=2, tensor=2, sequence_parallel=True, micro_batch_size=2),
    "CP2xPP2": TestLayout(4, context=2, pipeline=2),
}
STEP_OF_EXPERTS = some(STEP, "DP2, overlapped") | {
    "EP2": TestLayout(2, expert=2),
    "EP2, overlapped": TestLayout(2, expert=2, overlap=True, recompute="full"),
    "EP4": TestLayout(4, expert=4, micro_batch_size=2),
    "EP2xTP2+SP": TestLayout(4, tensor=2, sequence_parallel=True, expert=2, micro_batch_size=2),
    "EP2xPP2": TestLayout(4, pipeline=2, expert=2),
    "CP2xDP2, EP2": TestLayout(4, context=2, expert=2),
    "ETP2": TestLayout(2, tensor=2, sequence_parallel=True, expert_tensor=2, micro_batch_size=2),
    "ETP2 of data ranks, all-gather": TestLayout(4, expert=2, expert_tensor=2, moe=ALLGATHER),
}
# What is left out here is in tests/parity, without the path around the model.
MOST_STEPS = without(
    STEP, "TP1, one micro-batch", "DP2, overlapped", "DP4, one rank without images", "DP2xTP2", "TP2+SP, vision DP"
)

# tests/training/test_packing.py: the same of packed rows, of which a global batch has four

PACKED_STEP = some(
    STEP, "TP2xPP2+SP", "PP2xVPP2", "DP2xTP2", "DP4, one rank without images", "TP2, vision DP", "TP2+SP, vision DP"
)
PACKED_STEP |= some(STEP, "CP2", "CP2xTP2+SP", "CP2xPP2")
PACKED_STEP_OF_EXPERTS = some(
    STEP_OF_EXPERTS, "EP2, overlapped", "EP2xPP2", "EP2xTP2+SP", "ETP2 of data ranks, all-gather", "CP2xDP2, EP2"
)

# tests/training/test_adamw.py: five updates

ADAMW = {
    "TP1": _shared(),
    "DP2": _shared(2),
    "DP2xTP2+SP": _shared(4, tensor=2, sequence_parallel=True),
    "PP2": _shared(2, pipeline=2),
    "TP2xPP2+SP": _shared(4, tensor=2, pipeline=2, sequence_parallel=True),
    "DP2, overlapped": _shared(2, overlap=True),
    "DP2xPP2, overlapped": _shared(4, pipeline=2, overlap=True),
    "DP2xPP2xVPP2, overlapped": _shared(4, pipeline=2, virtual=2, overlap=True),
    "DP2xTP2, vision DP, overlapped": _shared(4, tensor=2, vision="data", overlap=True),
    "DP2, whole optimizer on each rank": TestLayout(2),
    "CP2xDP2": _shared(4, context=2),
}
ADAMW_OF_EXPERTS = some(ADAMW, "TP2xPP2+SP", "DP2, overlapped") | {
    "EP2": _shared(2, expert=2),
    "EP2, whole optimizer on each rank": TestLayout(2, expert=2),
    "EP2xDP2, overlapped": _shared(4, expert=2, overlap=True),
    "EP2xPP2, overlapped": _shared(4, pipeline=2, expert=2, overlap=True),
    "ETP2xTP2+SP": _shared(2, tensor=2, sequence_parallel=True, expert_tensor=2),
}

# tests/training/test_grad_norm.py: the norm over all ranks and the step clipped by it

NORM = {
    "TP1": TestLayout(),
    "TP2": TestLayout(2, tensor=2),
    "TP2+SP": TestLayout(2, tensor=2, sequence_parallel=True),
    "TP4, keys and values replicated": TestLayout(4, tensor=4),
    "PP2, tied embedding on both": TestLayout(2, pipeline=2),
    "TP2, vision DP": TestLayout(2, tensor=2, vision="data"),
    "TP2xPP2": TestLayout(4, tensor=2, pipeline=2),
    "DP2, distributed optimizer": _shared(2),
    "DP2xPP2, distributed optimizer, overlapped": _shared(4, pipeline=2, overlap=True),
    "DP2xTP2, distributed optimizer, vision DP": _shared(4, tensor=2, vision="data"),
    "CP2xTP2+SP": TestLayout(4, context=2, tensor=2, sequence_parallel=True),
}
NORM_OF_EXPERTS = {
    "ETP2xEP2xTP2+SP": TestLayout(4, tensor=2, sequence_parallel=True, expert=2, expert_tensor=2),
    "EP2xDP2, distributed optimizer": _shared(4, expert=2),
}

# tests/training/test_resume.py: a run that stops and starts again, in its layout or in others, each with its steps

CONTINUED = {"TP2+SP, bf16": _shared(2, tensor=2, sequence_parallel=True, precision="bf16")}
Turns = Sequence[tuple[TestLayout, int]]
IN_TURN: Turns = ((_shared(2, tensor=2, sequence_parallel=True), 3), (_shared(2, pipeline=2), 3))

# What `make test` runs of each suite: these layouts, and all of a suite that is not named

Small = Mapping[str, Sequence[str]]
SMALL: Small = {
    "parity": (
        "PP2 uneven",
        "PP4, stages without layers between",
        "TP2+SP, selective recompute",
        "TP2xPP2+SP, full recompute",
        "CP4",
        "CP2xTP2, vision DP, selective recompute",
    ),
    "rules": ("TP4+SP",),
    "no_images": ("DP2xTP2, vision DP",),
    "step": ("PP2xVPP2",),
    "packed_step": ("CP2xPP2",),
    "norm": ("TP4, keys and values replicated",),
}
SMALL_OF_EXPERTS: Small = {
    "parity": (
        "TP4+SP",
        "TP2+SP, vision DP",
        "PP2 uneven",
        "PP2xVPP2",
        "PP4",
        "PP4, stages without layers between",
        "EP2, full recompute",
        "EP2xTP2+SP, all-gather",
        "EP4xTP2+SP",
        "CP4, EP2, all-gather",
        "CP2xTP2+SP, EP4",
        "CP2xDP2, overlapped",
        "CP2xPP2xVPP2, full recompute",
        "CP2, random blocks",
        "CP2, EP2",
    ),
    "rules": ("EP2 of tensor ranks",),
    "no_images": ("EP2xTP2+SP, vision DP",),
    "step": ("DP2, overlapped", "EP2, overlapped", "EP4", "ETP2 of data ranks, all-gather"),
    "packed_step": ("CP2xDP2, EP2",),
    "adamw": ("EP2xDP2, overlapped", "EP2xPP2, overlapped", "ETP2xTP2+SP"),
    "norm": ("ETP2xEP2xTP2+SP",),
}
SMALL_OF_EVERYTHING: Small = {
    "parity": (
        "TP4, vision DP",
        "PP4, stages without layers between",
        "TP2+SP, selective recompute",
        "TP2xPP2+SP, full recompute",
        "TP2xPP2xVPP2+SP, full recompute, tower on three",
        "CP2xDP2, overlapped",
        "CP2xPP2xVPP2, full recompute",
        "CP2xTP2+SP",
        "CP2xTP2, vision DP, selective recompute",
        "CP2xPP2, tower on both",
        "CP4",
    ),
    "rules": ("TP2",),
    "no_images": ("DP2xTP2, vision DP",),
    "step": ("PP2 uneven", "DP2, overlapped", "DP4, one rank without images"),
    "packed_step": ("DP2xTP2", "CP2xTP2+SP"),
    "text_step": ("TP1",),
    "adamw": ("DP2xTP2+SP", "DP2xPP2xVPP2, overlapped"),
    "norm": ("PP2, tied embedding on both",),
    "continued": ("PP2, fp32",),
}


@dataclass(frozen=True)
class LayoutTables:
    """The layouts of each suite; the defaults are for a family without experts.

    Attributes:
        parity: logits, loss and gradients.
        rules: gradients before ranks exchange them.
        no_images: one data rank has no image.
        first_weights: drawn, not loaded.
        step: a step of SGD from rows to an export.
        packed_step: the same of packed rows.
        text_step: the same of the language model taken out.
        adamw: five steps.
        norm: gradient norm and clipped step.
        continued: stopped and started again, bit for bit.
        in_turn: stopped and started again in other layouts.
        small: names of the layouts that `make test` runs, by suite.
    """

    parity: Table = field(default_factory=lambda: PARITY)
    rules: Table = field(default_factory=lambda: RULES)
    no_images: Table = field(default_factory=lambda: some(NO_IMAGES, "DP2", "DP2xTP2, vision DP"))
    first_weights: Table = field(default_factory=lambda: some(FIRST_WEIGHTS, "TP2xPP2+SP"))
    step: Table = field(default_factory=lambda: MOST_STEPS)
    packed_step: Table = field(default_factory=lambda: PACKED_STEP)
    text_step: Table = field(default_factory=lambda: some(STEP, "TP2xPP2+SP"))
    adamw: Table = field(default_factory=lambda: some(ADAMW, "DP2xTP2, vision DP, overlapped"))
    norm: Table = field(
        default_factory=lambda: some(
            NORM, "TP4, keys and values replicated", "DP2xTP2, distributed optimizer, vision DP"
        )
    )
    continued: Table = field(default_factory=lambda: CONTINUED)
    in_turn: Turns = IN_TURN
    small: Small = field(default_factory=lambda: SMALL)

    def is_small(self, suite: str, layout: str) -> bool:
        """Whether `make test` runs a suite in a layout."""
        return layout in self.small.get(suite, (layout,))


LAYOUT_TABLES = tuple(suite.name for suite in fields(LayoutTables) if suite.name != "small")
NOTHING = LayoutTables(**{suite: {} for suite in LAYOUT_TABLES}, small={})
FEW_PARITY = replace(NOTHING, parity=FEW, small={"parity": ("TP1",)})
WITH_EXPERTS = LayoutTables(
    parity=PARITY_OF_EXPERTS,
    rules=RULES_OF_EXPERTS,
    no_images=some(NO_IMAGES, "EP2", "EP2xTP2+SP, vision DP"),
    first_weights=FIRST_WEIGHTS_OF_EXPERTS,
    step=STEP_OF_EXPERTS,
    packed_step=PACKED_STEP_OF_EXPERTS,
    adamw=ADAMW_OF_EXPERTS,
    norm=NORM_OF_EXPERTS,
    continued={"EP2, overlapped, bf16": _shared(2, expert=2, overlap=True, precision="bf16")},
    in_turn=(
        (_shared(2, expert=2), 2),
        (_shared(), 1),
        (_shared(4, expert=4), 1),
        (_shared(2, tensor=2, sequence_parallel=True), 1),
        (_shared(2, pipeline=2), 1),
    ),
    small=SMALL_OF_EXPERTS,
)
EVERYTHING = LayoutTables(
    parity=LAYOUTS | CONTEXT | spread_tower(2) | CONTEXT_OF_TOWERS,
    rules=ALL_RULES,
    no_images=some(NO_IMAGES, "DP2", "DP2xTP2, vision DP", "DP2xPP2"),
    step=STEP | some(spread_tower(2), "PP2xVPP2, tower on two"),
    text_step=some(STEP, "TP1", "TP2xPP2+SP"),
    adamw=without(ADAMW, "TP2xPP2+SP"),
    norm=NORM,
    continued={
        "TP2xDP2, bf16": _shared(4, tensor=2, precision="bf16"),
        "PP2, fp32": _shared(2, pipeline=2),
    },
    in_turn=(
        (_shared(2, tensor=2), 2),
        (_shared(2, pipeline=2), 1),
        (_shared(2, pipeline=2, virtual=2, vision_pipeline_layout=(1, 1)), 1),
        (_shared(2, context=2), 1),
        (_shared(2), 2),
    ),
    small=SMALL_OF_EVERYTHING,
)
