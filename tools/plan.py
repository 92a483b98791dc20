"""Plan a run: the fastest layouts of a number of GPUs for a model, with memory, time and communication of a step.

    python tools/plan.py --model MODEL --gpus 256 --gpu H100 --seq_length 8192 --global_batch_size 512
    python tools/plan.py --model RUN.yaml --gpus 64 --gpu H200 --keep_layout --check sampled

MODEL is a directory in Hugging Face format, of which only config.json is read, or a configuration such as
configs/qwen3_vl_8b.yaml. Any key of a configuration may follow, such as --parallel.tensor_model_parallel_size 4: the
search leaves those alone. Needs no GPU. Exit codes: 0 done, 1 --check found a difference, 2 a mistake that the user can
correct, or no layout that fits.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_vlm import output
from megatron_vlm.errors import EXIT_USER_ERROR, ConfigError, UserError

if TYPE_CHECKING:
    from megatron_vlm.config import Config
    from megatron_vlm.planning.plan import Plan, Request


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan and print; returns the exit code."""
    try:
        options, overrides = _parse(arguments)
        return plan(options, overrides)
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def plan(options: argparse.Namespace, overrides: list[str]) -> int:
    """Search, print the page, write files, check ranks."""
    from megatron_vlm import platform

    platform.initialize("cpu")  # before megatron-core is imported, which would print warnings without it
    from megatron_vlm.files.small_files import replace_durably
    from megatron_vlm.planning.hardware import find_hardware
    from megatron_vlm.planning.plan_page import format_page, format_yaml, to_json
    from megatron_vlm.planning.planner import make_request, search_layouts, settings_of
    from megatron_vlm.planning.search_space import SEARCHED

    hardware = find_hardware(options.gpu, options.hardware)
    config, directory = _config(options, overrides)
    request = make_request(
        config,
        hardware,
        options.gpus,
        options.images_per_row,
        options.clips_per_row,
        options.headroom,
        directory,
    )
    _check_early(options)
    given = {override.lstrip("-").partition("=")[0] for override in overrides if override.startswith("--")}
    fixed = settings_of(config, tuple(key for key in SEARCHED if options.keep_layout or key in given))
    result = search_layouts(request, fixed, options.plans, _progress)
    print("\n".join(format_page(request, result)))
    for path, text in ((options.json, to_json(request, result)), (options.yaml, format_yaml(result.plans[0]))):
        if path is not None:
            try:
                replace_durably(Path(path), text)
            except OSError as error:
                raise ConfigError(f"cannot write: {error.strerror}", path, "give another file, or make room") from None
    return _check(options.check, request, result.plans[0]) if options.check is not None else 0


def _check_early(options: argparse.Namespace) -> None:
    """Refuse what would be found only after the search."""
    from megatron_vlm.planning.simulated_ranks import ranks_to_check

    for path in filter(None, (options.json, options.yaml)):
        if not os.path.isdir(os.path.dirname(os.path.abspath(path))) or os.path.isdir(path):
            raise ConfigError("cannot write a file of this name", path, "give one in a directory that exists")
    if options.check is not None:
        ranks_to_check(options.check, options.gpus)


def _config(options: argparse.Namespace, overrides: list[str]) -> tuple[Config, str | None]:
    """Return the configuration to plan for, and where its model's config.json is, if not where it says."""
    from megatron_vlm.cli import load_config
    from megatron_vlm.planning.planner import published_directory

    model, arguments, directory = Path(options.model), list[str](), None
    if not model.exists():
        raise ConfigError(
            f"--model {model} does not exist",
            fix="give a directory with config.json, or a configuration such as configs/qwen3_vl_8b.yaml",
        )
    if model.suffix in (".yaml", ".yml"):
        arguments = ["--config", str(model)]
    elif options.keep_layout:
        raise ConfigError("--keep_layout needs a layout to keep", fix="give a YAML file with --model")
    else:
        missing = [name for name in ("seq_length", "global_batch_size") if getattr(options, name) is None]
        if missing:
            asked = " and ".join(f"--{name}" for name in missing)
            raise ConfigError(f"{asked} must be given, as {model} is no YAML file", fix=f"add {asked} NUMBER")
        needed = {"run_dir": "runs/planned", "model.hf_path": str(model), "data.train": "data/train.jsonl"}
        arguments = [f"--{key}={value}" for key, value in needed.items()] + ["--train.train_iters=1000"]
    for key, value in (
        ("data.seq_length", options.seq_length),
        ("train.global_batch_size", options.global_batch_size),
    ):
        arguments += [] if value is None else [f"--{key}={value}"]
    config = load_config([*arguments, *overrides])
    if arguments[0] == "--config" and not Path(config.model.hf_path).exists():
        directory = published_directory(model)
    return config, None if directory is None else str(directory)


def _check(which: str, request: Request, best: Plan) -> int:
    """Build ranks of the best layout and compare them with the plan and with each other."""
    from megatron_vlm.planning.simulated_ranks import check_plan

    problems, said = check_plan(which, request, best)
    print(f"\ncheck     {said}")
    for problem in problems:
        print(f"  {problem}")
    return 1 if problems else 0


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, "command line", "see python tools/plan.py --help")


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--model", type=os.path.expanduser, required=True, help="directory with config.json, or YAML file"
    )
    parser.add_argument("--gpus", type=int, required=True, help="number of GPUs")
    parser.add_argument("--gpu", default="H100", help="A100-40, A100-80, H100, H200, B200, or one of --hardware's")
    parser.add_argument("--hardware", type=os.path.expanduser, help="YAML file with further GPUs, or other fractions")
    parser.add_argument(
        "--seq_length", type=int, help="tokens of a row of the batch; required where MODEL is a directory"
    )
    parser.add_argument("--global_batch_size", type=int, help="rows of a step; required where MODEL is a directory")
    parser.add_argument("--images_per_row", type=float, help="images of an average row of the batch (default: 1)")
    parser.add_argument(
        "--clips_per_row", type=float, help="clips of audio of an average row of the batch (default: 1)"
    )
    parser.add_argument("--headroom", type=float, default=0.1, help="part of the memory to leave free (default: 0.1)")
    parser.add_argument("--plans", type=int, default=5, help="layouts to show (default: 5)")
    parser.add_argument("--keep_layout", action="store_true", help="plan the YAML file's own layout and search nothing")
    parser.add_argument("--check", metavar="RANK", help="build this rank, or sampled, and compare it with the plan")
    parser.add_argument("--json", type=os.path.expanduser, metavar="FILE", help="write everything as JSON")
    parser.add_argument("--yaml", type=os.path.expanduser, metavar="FILE", help="write the best layout's settings")
    return parser.parse_known_args(arguments)


if __name__ == "__main__":
    output.endure()
    sys.exit(main())
