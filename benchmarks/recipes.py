"""The predicted step of every recipe, beside that of the recipes of another commit.

    python benchmarks/recipes.py [--before COMMIT] [--only NAME ...] [--output FILE.json]

On the GPUs that a recipe is made for (H100), and on H200 with the file of `configs/h200` that goes with it, if there is
one. Rows are full of images. Both sides are predicted by this commit's code (`planning/plan.py`): the ratio is that of
the settings alone. Nothing of this was measured on a GPU.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]

from benchmarks import figures  # noqa: E402
from megatron_vlm import platform  # noqa: E402
from megatron_vlm.cli import load_config  # noqa: E402
from megatron_vlm.planning.hardware import GPUS  # noqa: E402
from megatron_vlm.planning.plan import Request, make_plan  # noqa: E402
from megatron_vlm.planning.preflight import check_layout  # noqa: E402
from tests.test_recipes import SIZES, images_of_a_full_row, record  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "recipes.json"
BEFORE = "7388a22"
"""The last commit whose recipes were not chosen by the planner."""


def main() -> int:
    """Plan, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--before", default=BEFORE, help=f"commit whose recipes to compare with (default: {BEFORE})")
    parser.add_argument("--only", nargs="+", default=list(SIZES), choices=list(SIZES), help="recipes (default: all)")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"results (default: {RESULTS.name})")
    options = parser.parse_args()
    torch.set_num_threads(1)
    platform.initialize("cpu")
    print("recipe               GPUs        before                    now                      ratio")
    with tempfile.TemporaryDirectory() as folder:
        entries = [entry for name in options.only for entry in _entries(name, options.before, Path(folder))]
    figures.write(options.output, {"commit": figures.commit(), "before": options.before, "recipes": entries})
    return 0


def _entries(name: str, commit: str, folder: Path) -> list[dict[str, Any]]:
    """Return what is predicted of a recipe on each kind of GPU."""
    now, former = REPOSITORY / "configs" / f"{name}.yaml", folder / f"{name}.yaml"
    command = ["git", "show", f"{commit}:configs/{name}.yaml"]
    former.write_text(subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout)
    entries = []
    for gpu, files in (("H100", [now]), ("H200", [now, REPOSITORY / "configs" / "h200" / f"{name}.yaml"])):
        if not files[-1].exists():
            continue
        before, after = _plan(name, gpu, [former]), _plan(name, gpu, files)
        ratio = before["step_seconds"] / after["step_seconds"]
        entries.append({"recipe": name, "gpu": gpu, "before": before, "now": after, "ratio": ratio})
        sides = (f"{side['step_seconds']:7.3f} s {side['most_gib']:6.1f} GiB" for side in (before, after))
        print(f"{name:20s} {before['gpus']:4d} {gpu}  {'   '.join(sides)}   {ratio:.2f}", flush=True)
    return entries


def _plan(name: str, gpu: str, files: list[Path]) -> dict[str, Any]:
    """Return the predicted step of a configuration on as many GPUs as the first file's command line starts."""
    family, model_config, shapes = record(name)
    started = re.search(r"torchrun --nnodes (\d+) --nproc-per-node (\d+) ", files[0].read_text())
    assert started
    num_gpus = int(started[1]) * int(started[2])
    config = load_config([argument for file in files for argument in ("--config", str(file))])
    layout = check_layout(config, model_config, num_gpus, shapes)
    request = Request(config, family, model_config, GPUS[gpu], num_gpus, images_of_a_full_row(family), 1.0, 0.1)
    plan = make_plan(request, config, layout)
    return {
        "gpus": num_gpus,
        "layout": layout.sizes(),
        "micro_batch_size": config.train.micro_batch_size,
        "recompute": config.model.recompute,
        "vision_parallelism": config.model.vision_parallelism,
        "step_seconds": plan.step.total,
        "most_gib": plan.most_bytes / 2**30,
    }


if __name__ == "__main__":
    sys.exit(main())
