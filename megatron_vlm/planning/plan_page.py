"""The planner's page for readers, its JSON for programs, and the YAML of a plan."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_vlm.planning.memory import format_memory
from megatron_vlm.planning.plan import Plan, Request
from megatron_vlm.planning.search import SearchResult
from megatron_vlm.planning.search_space import SEARCHED

# All that a layout consists of, so that the settings of a plan, put into any configuration, are that layout.
_LAYOUT = ("parallel.context_parallel_size", *SEARCHED)
_GIB = 2**30
_ROWS_SHOWN, _REASONS_SHOWN = 16, 8


def format_page(request: Request, result: SearchResult) -> Iterator[str]:
    """Yield the lines of the page: what was asked, the best layouts, and all about the first."""
    best = result.plans[0]
    yield from _format_request(request)
    yield ""
    yield from _format_table(request, result.plans)
    yield ""
    yield "best layout"
    yield f"  {best.layout}"
    yield f"  limited by    {_limit(best)}"
    yield f"  step          {_breakdown(best)}"
    yield f"  pipeline      {_pipeline(best)}"
    yield f"  tower         {_tower(request, best)}"
    if result.other_tower is not None:
        yield f"  its layers    {_spread(request, best, result.other_tower)}"
    yield f"  GPUs          {best.utilisation(request.hardware):.1%} of their peak, by the model's own matmuls"
    yield "memory"
    lines = list(format_memory(best.memory))
    yield from (f"  {line}" for line in lines[: _ROWS_SHOWN + 1])
    if len(lines) > _ROWS_SHOWN + 1:
        rest = len(lines) - _ROWS_SHOWN - 1
        yield f"  ... {rest} more pipeline ranks; the fullest takes {best.most_bytes / _GIB:.2f}"
    yield "sent by the busiest rank per step, in GiB"
    yield f"  {'group':14}{'in all':>10}{'inside its node':>18}{'to other nodes':>17}"
    for group, traffic in best.traffic.items():
        inside = traffic.sent - traffic.crossing
        yield f"  {group:14}{traffic.sent / _GIB:10.2f}{inside / _GIB:18.2f}{traffic.crossing / _GIB:17.2f}"
    yield ""
    yield from _format_reasons(request, result)
    yield ""
    yield from _format_assumptions(request)
    yield ""
    yield "settings of the best layout"
    yield from (f"  {line}" for line in format_yaml(best).splitlines())


def _format_request(request: Request) -> Iterator[str]:
    hardware, config = request.hardware, request.config
    nodes = -(-request.num_gpus // hardware.gpus_per_node)
    yield f"model     {config.model.hf_path}: {request.family.name}, {request.model_config.media}"
    yield (
        f"GPUs      {request.num_gpus} of {hardware.memory_gib:g} GiB on {nodes:,} node{'s' * (nodes > 1)}, of which "
        f"{request.usable_bytes / _GIB:.1f} GiB may be used"
    )
    media = [f"{request.images_per_row:g} image(s)"] if request.model_config.vision is not None else []
    media += [f"{request.clips_per_row:g} clip(s) of audio"] if request.model_config.audio is not None else []
    each = f", with {' and '.join(media)} each" if media else ""
    rows = "packed rows" if config.data.packing else "rows"
    yield f"batch     {config.train.global_batch_size} {rows} of {config.data.seq_length} tokens{each}"


def _format_table(request: Request, plans: Sequence[Plan]) -> Iterator[str]:
    yield (
        "   step s  of peak  GiB/GPU  tensor  pipeline  virtual  data  expert  expert-tensor  micro-batch  recompute  "
        "vision  waiting"
    )
    for number, plan in enumerate(plans, 1):
        layout, config = plan.layout, plan.config
        yield (
            f"{number} {plan.step.total:7.3f}{plan.utilisation(request.hardware):9.1%}{plan.most_bytes / _GIB:9.1f}"
            f"{layout.tensor_size:8}{layout.pipeline_size:10}{layout.virtual_size:9}{layout.data_size:6}"
            f"{layout.expert_size:8}{layout.expert_tensor_size:15}{config.train.micro_batch_size:13}"
            f"{config.model.recompute:>11}{config.model.vision_parallelism:>8}"
            f"{plan.step.waiting / plan.step.total:9.1%}"
        )


def _breakdown(plan: Plan) -> str:
    total = plan.step.total
    parts = dataclasses.asdict(plan.step)
    return f"{total:.3f} s: " + ", ".join(f"{name} {seconds / total:.1%}" for name, seconds in parts.items())


def _limit(plan: Plan) -> str:
    """Say which part of the step the computing ranks lose most to."""
    reasons = {
        "exchanging": "exchanges between the ranks of a layer: a smaller tensor or expert size would lessen them",
        "waiting": "waiting for other pipeline stages: more micro-batches, fewer stages or more chunks would lessen it",
        "gradients": "gradients and parameters that data ranks exchange after the passes: overlap_grad_reduce and "
        "overlap_param_gather hide them",
        "update": "the optimizer's update",
    }
    losses = {name: getattr(plan.step, name) for name in reasons}
    worst = max(losses, key=lambda name: losses[name])
    if losses[worst] < 0.1 * plan.step.total:
        return "computing; nothing else takes a tenth of the step"
    return f"computing, and {losses[worst] / plan.step.total:.0%} {reasons[worst]}"


def _pipeline(plan: Plan) -> str:
    if plan.layout.pipeline_size == 1:
        return "one stage, no bubble"
    layers = ", ".join(str(len(chunk)) for chunk in plan.layout.chunks)
    return (
        f"bubble {plan.schedule.bubble:.1%} of an average rank's time, of which stages that differ (the busiest has "
        f"{plan.schedule.imbalance:.3f} times the mean) are a part; decoder layers per chunk: {layers}"
    )


def _tower(request: Request, plan: Plan) -> str:
    what = "embedding and towers" if not request.model_config.text_only else "embedding"
    share, rank = plan.tower_share_of_rank
    return (
        f"{what} take {plan.tower_share:.1%} of the time of all chunks, and {share:.1%} of that of pipeline rank {rank}"
    )


def _spread(request: Request, best: Plan, other: Plan) -> str:
    """Say what the step and the bubble are with the tower spread over chunks, and with it whole."""
    spread, whole = _spread_and_whole(best, other)
    counts = spread.layout.tower_counts
    text = (
        f"on {len(counts)} chunks ({', '.join(map(str, counts))}): bubble {spread.schedule.bubble:.1%}, step "
        f"{spread.step.total:.3f} s; all on the first: bubble {whole.schedule.bubble:.1%}, step "
        f"{whole.step.total:.3f} s; "
    )
    if other.most_bytes > request.usable_bytes:
        which = "spreading" if other is spread else "all on the first"
        return f"{text}{which} takes {other.most_bytes / _GIB:.1f} GiB and does not fit"
    if spread.step.total < whole.step.total:
        return f"{text}spreading saves {1 - spread.step.total / whole.step.total:.1%} of the step"
    return f"{text}spreading does not pay"


def _spread_and_whole(best: Plan, other: Plan) -> tuple[Plan, Plan]:
    return (best, other) if best.layout.embedding_chunk else (other, best)


def _format_reasons(request: Request, result: SearchResult) -> Iterator[str]:
    yield f"{result.num_estimated:,} layouts were estimated, {result.num_fitting:,} fit; ruled out:"
    for entry in result.ruled_out[:_REASONS_SHOWN]:
        yield f"  {entry.count:6,}  {entry.reason}"
    if len(result.ruled_out) > _REASONS_SHOWN:
        rest = sum(entry.count for entry in result.ruled_out[_REASONS_SHOWN:])
        yield f"  {rest:6,}  for {len(result.ruled_out) - _REASONS_SHOWN} other reasons"
    size = request.hardware.gpus_per_node
    yield f"  not tried: tensor sizes beyond a node ({size} GPUs), which exchange in every layer;"
    yield "  sharded layers without sequence parallelism, and replicated optimizer state: both only take memory;"
    yield "  other context sizes than parallel.context_parallel_size, over which only long rows gain"


def _format_assumptions(request: Request) -> Iterator[str]:
    hardware = request.hardware
    yield "Memory is counted; times are predicted, and nothing of this has been measured on a GPU. Assumed:"
    yield (
        f"  {hardware.bf16_tflops:g} TFLOP/s, of which matmuls reach {hardware.matmul_fraction:.0%} and attention "
        f"{hardware.attention_fraction:.0%}; memory {hardware.memory_gb_per_second:g} GB/s, of which other operators "
        f"reach {hardware.memory_fraction:.0%};"
    )
    yield (
        f"  {hardware.node_gb_per_second:g} GB/s inside a node and {hardware.network_gb_per_second:g} GB/s per GPU "
        f"between nodes, of which exchanges reach {hardware.link_fraction:.0%};"
    )
    yield (
        f"  {hardware.launch_microseconds:g} us per launched operator, "
        f"{hardware.latency_microseconds:g} us per exchange;"
    )
    yield "  every row full, experts used evenly, data that never makes a step wait. --hardware FILE.yaml changes them."


def format_yaml(plan: Plan) -> str:
    """Return the settings of a plan's layout as YAML, to be put into a configuration or given as a second file."""
    lines: list[str] = []
    for section in dict.fromkeys(key.partition(".")[0] for key in _LAYOUT):
        lines.append(f"{section}:")
        for key in (key for key in _LAYOUT if key.startswith(f"{section}.")):
            value = _setting(plan, key)
            lines.append(f"  {key.partition('.')[2]}: {value if isinstance(value, str) else json.dumps(value)}")
    return "\n".join(lines) + "\n"


def to_json(request: Request, result: SearchResult) -> str:
    """Return everything that the page has as JSON: times in seconds, memory and traffic in bytes."""
    plans = [
        {
            "settings": {key: _setting(plan, key) for key in _LAYOUT},
            "layout": plan.layout.sizes(),
            "layers_per_chunk": list(map(len, plan.layout.chunks)),
            "tower_layers_per_chunk": list(plan.layout.tower_counts),
            "step_seconds": plan.step.total,
            "step": dataclasses.asdict(plan.step),
            "bubble": plan.schedule.bubble,
            "imbalance": plan.schedule.imbalance,
            "tower_share": plan.tower_share,
            "tower_share_of_rank": dict(zip(("share", "rank"), plan.tower_share_of_rank, strict=True)),
            "utilisation": plan.utilisation(request.hardware),
            "chunks": [dataclasses.asdict(chunk) for chunk in plan.chunks],
            "traffic": {group: dataclasses.asdict(traffic) for group, traffic in plan.traffic.items()},
            "memory": [dataclasses.asdict(entry) | {"total_bytes": entry.total_bytes} for entry in plan.memory],
        }
        for plan in result.plans
    ]
    content = {
        "hardware": dataclasses.asdict(request.hardware),
        "gpus": request.num_gpus,
        "usable_bytes": request.usable_bytes,
        "plans": plans,
        "tower": _tower_to_json(result),
        "num_estimated": result.num_estimated,
        "num_fitting": result.num_fitting,
        "ruled_out": [dataclasses.asdict(entry) for entry in result.ruled_out],
    }
    return json.dumps(content, indent=1) + "\n"


def _tower_to_json(result: SearchResult) -> dict[str, Any] | None:
    """Return the best layout with its tower spread and with it whole; None where it cannot be spread."""
    if result.other_tower is None:
        return None
    plans = zip(("spread", "whole"), _spread_and_whole(result.plans[0], result.other_tower), strict=True)
    return {
        name: {
            "layers_per_chunk": list(map(len, plan.layout.chunks)),
            "tower_layers_per_chunk": list(plan.layout.tower_counts),
            "step_seconds": plan.step.total,
            "bubble": plan.schedule.bubble,
            "most_bytes": plan.most_bytes,
        }
        for name, plan in plans
    }


def _setting(plan: Plan, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(plan.config, section), name)
