"""Launches, bytes, collectives and waits of decoder layers on a GPU, counted on the host by a fake one.

    python benchmarks/launches.py [--label before|after|NAME] [--output FILE.json]

One rank of each case runs a step of a micro-batch of 4,096 tokens with full recomputation, on the shapes of a published
model (`tests/fake_gpu`). Counted is the last layer of each kind of attention; the first of its kind also makes the
tables that later ones share. A launch is an operator that computes or copies something; ours count as their kernels,
and attention as FlexAttention. Collectives are counted apart.

The results of a label replace those that the file has of it; others stay. With `before` and another label, ratios are
printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the fake GPU is the only one
REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]

import torch  # noqa: E402
from transformers import PretrainedConfig  # noqa: E402

from megatron_vlm import platform  # noqa: E402

platform.initialize("cpu")
from megatron_vlm.training.step import run_global_batch  # noqa: E402
from tests import published_gemma3, published_gemma4, published_mistral3, published_qwen3_vl  # noqa: E402
from tests.fake_gpu.device import CUDA  # noqa: E402
from tests.fake_gpu.launches import LaunchRecorder, Work  # noqa: E402
from tests.fake_gpu.step import fake_rank, few_layers  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "launches.json"
FIRST = "before"
DIRECTIONS = "forward", "recompute", "backward"


@dataclass(frozen=True)
class Case:
    """A model on one rank of a layout.

    Attributes:
        hf_config: the published configuration.
        num_layers: how many of its layers run, two of each kind or more.
        tensor_size: number of tensor ranks, with sequence parallelism where there are several.
        expert_size: number of ranks that experts are split over.
    """

    hf_config: PretrainedConfig
    num_layers: int = 2
    tensor_size: int = 1
    expert_size: int = 1

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor_size * self.expert_size

    @property
    def overrides(self) -> list[str]:
        """The run's keys."""
        return [
            "model.recompute=full",
            f"parallel.tensor_model_parallel_size={self.tensor_size}",
            f"parallel.sequence_parallel={str(self.tensor_size > 1).lower()}",
            f"parallel.expert_model_parallel_size={self.expert_size}",
        ]


_QWEN, _GEMMA3 = published_qwen3_vl.published_config, published_gemma3.published_config
CASES = {
    "Qwen3-VL 30B-A3B EP8 TP2": Case(_QWEN("30b_a3b"), tensor_size=2, expert_size=8),
    "Qwen3-VL 30B-A3B EP1": Case(_QWEN("30b_a3b")),
    "Qwen3-VL 2B": Case(_QWEN("2b")),
    "Qwen3-VL 8B": Case(_QWEN("8b")),
    "Gemma 3 27B TP8": Case(_GEMMA3("27b"), 12, tensor_size=8),
    "Gemma 3 27B TP2": Case(_GEMMA3("27b"), 12, tensor_size=2),
    "Gemma 4 26B-A4B EP8": Case(published_gemma4.published_config("26b_a4b"), 12, expert_size=8),
    "Gemma 4 26B-A4B EP1": Case(published_gemma4.published_config("26b_a4b"), 12),
    "Mistral Small 3 24B TP2": Case(published_mistral3.published_config("mistral3_24b"), tensor_size=2),
}


def main() -> int:
    """Count, write and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--label", default="after", help="name of these results in the file (default: after)")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"results (default: {RESULTS.name})")
    options = parser.parse_args()
    torch.set_num_threads(1)
    layers = {f"{name}, {kind}": work for name, case in CASES.items() for kind, work in count(case).items()}
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    results[options.label] = {"torch": torch.__version__, "commit": _commit(), "layers": layers}
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(table(results, options.label)))
    return 0


def count(case: Case) -> dict[str, dict[str, Any]]:
    """Return what the last layer of each kind of attention does, by direction, and the bytes that it keeps."""
    hf_config = few_layers(case.hf_config, case.num_layers)
    with fake_rank(hf_config, *case.overrides, world_size=case.world_size, text_only=True) as run:
        recorder, batch = LaunchRecorder.of(run), run.batch.to(CUDA, non_blocking=True)
        with recorder, recorder.layers(run.layers):
            run_global_batch(run.model, [batch], run.groups)
    kinds = {
        "full attention" if layer.window is None else "sliding attention": index
        for index, layer in enumerate(run.model_config.text.layers)
    }
    return {
        kind: {direction: _numbers(recorder.parts[layer][direction]) for direction in DIRECTIONS}
        | {"kept_bytes": recorder.kept_bytes[layer]}
        for kind, layer in kinds.items()
    }


def _numbers(work: Work) -> dict[str, Any]:
    return {
        "launches": sum(work.launches.values()),
        "moved_bytes": work.moved_bytes,
        "collectives": dict(sorted(work.collectives.items())),
        "sent_bytes": work.sent_bytes,
        "waits": dict(work.waits),
        "operators": dict(sorted(work.launches.items(), key=lambda item: (-item[1], item[0]))),
    }


def table(results: Mapping[str, Any], label: str) -> list[str]:
    """Return lines with launches, bytes and waits in each direction; after `before`, as ratios too."""
    before = results.get(FIRST, {}).get("layers", {}) if label != FIRST else {}
    titles = "".join(f"{f'{direction}: launches, MiB moved':>34s}" for direction in DIRECTIONS)
    lines = [f"{'':44s}{titles}  waits"]
    for name, work in results[label]["layers"].items():
        cells = "".join(f"{_cell(work[way], before.get(name, {}).get(way)):>34s}" for way in DIRECTIONS)
        lines.append(f"{name:44s}{cells}{sum(sum(work[way]['waits'].values()) for way in DIRECTIONS):7d}")
    return lines


def _cell(work: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    cell = f"{work['launches']:4d} {work['moved_bytes'] / 2**20:8,.0f}"
    if before is None:
        return cell
    return f"{cell}  x {work['launches'] / before['launches']:.2f} {work['moved_bytes'] / before['moved_bytes']:.2f}"


def _commit() -> str:
    command = ["git", "-C", str(REPOSITORY), "log", "-1", "--format=%h", "--", "megatron_vlm", "kernels"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
