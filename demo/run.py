"""`make demo`: draw images (and synthesise clips), build a tiny model, train it, export, ask, report.

Where the recipe has two layouts, training stops halfway and resumes in the other.

    python -m demo.run [--model gemma3 | qwen3_vl_moe | mistral3 | gemma4] [--output FOLDER] [--train_iters N]
                       [--seed N] [--processes 1] [--device cuda]

Exits with 0 only if the exported model answers from the images: at least 90 % exact match on held-out questions, and
at most 40 % once the images are swapped between them; where there are clips, at most 20 % once these are.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from demo.console import Phases, show_progress
from demo.dataset import Task, write_dataset
from demo.evaluate import HeldoutSample, answer_questions, load_samples, swap
from demo.launch import RANKS, launch_training
from demo.recipes import RECIPES, Recipe, Stage
from demo.summary import Answers, Scores, Swap, print_summary, write_demo_report

REPOSITORY = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo and returns the exit code."""
    options = _parse(arguments)
    recipe = RECIPES[options.model] if options.processes == RANKS else RECIPES[options.model].alone()
    folder = options.output or _next_folder(REPOSITORY / recipe.folder)
    torch.set_num_threads(1)  # operations of a tiny model are too short to share: threads mostly wait for each other
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    phases = Phases(total=4 + len(recipe.stages))

    with phases.section("Make the data set"):
        samples = _write_data(folder / "data", recipe.task, options.seed)
    with phases.section(f"Build a tiny {recipe.title} with a tokenizer of its own"):
        print("      " + recipe.build(folder / "model", recipe.task.texts(), options.seed))
    with phases.section("Ask the untrained model"):
        before = answer_questions(folder / "model", samples, progress=show_progress)
    stops = _stops(recipe, options.train_iters)
    for stage, (first, last) in zip(recipe.stages, pairwise(stops), strict=True):
        with phases.section(_heading(stage, first, last, options.train_iters)):
            overrides = [*_overrides(folder, options.train_iters), *stage.arguments(), "--device", options.device]
            if last < options.train_iters:
                overrides += ["--train.exit_interval", last - first]
            launch_training(REPOSITORY / "configs" / recipe.config, overrides, REPOSITORY, options.processes)
    swapped_media = " and ".join(f"with swapped {medium}s" for medium in recipe.task.media)
    with phases.section(f"Ask the export with plain transformers, then again {swapped_media}"):
        after = answer_questions(folder / "export", samples, progress=show_progress)
        swaps = {medium: _ask_swapped(folder / "export", samples, medium, after) for medium in recipe.task.media}

    answers = Answers(samples, before, after, swaps)
    scores = Scores.of(answers)
    report = folder / "report.html"
    write_demo_report(
        report,
        recipe.title,
        folder / "run",
        answers,
        scores,
        phases,
        len(recipe.stages),
    )
    print_summary(scores, phases, len(samples), report, folder / "export")
    return 0 if scores.passed else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.run", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", choices=RECIPES, default="gemma3", help="what to train (default: gemma3)")
    parser.add_argument(
        "--output",
        type=Path,
        help="empty or new folder (default: the next free number in the model's folder below demo_out)",
    )
    parser.add_argument("--train_iters", type=int, help="optimizer steps (default: enough to learn it)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the images and initial weights (default: 1)")
    parser.add_argument(
        "--processes", type=int, choices=(1, RANKS), default=RANKS, help="that train; 1 for a single GPU (default: 2)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="on which they train (default: cpu)")
    options = parser.parse_args(arguments)
    recipe = RECIPES[options.model]
    options.train_iters = recipe.train_iters if options.train_iters is None else options.train_iters
    if options.train_iters < len(recipe.stages):
        parser.error(f"--train_iters {options.train_iters} must be at least {len(recipe.stages)}, a step per layout")
    if options.output:
        options.output = options.output.resolve()
        if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
            parser.error(f"--output {options.output} is not an empty folder; name a new one, nothing is overwritten")
    return options


def _next_folder(parent: Path) -> Path:
    """Returns the first of parent/1, parent/2, ... that does not exist, so that an earlier demo is kept."""
    number = 1
    while (parent / str(number)).exists():
        number += 1
    return parent / str(number)


def _overrides(folder: Path, train_iters: int) -> list[object]:
    """Returns the settings of all starts: where things lie and how long the run is."""
    return [
        *("--run_dir", folder / "run", "--model.hf_path", folder / "model"),
        *("--data.train", f"[{{path: {folder / 'data' / 'train.jsonl'}}}]"),
        *("--data.valid", f"[{{path: {folder / 'data' / 'heldout.jsonl'}}}]"),
        *("--train.train_iters", train_iters, "--checkpoint.export_hf", folder / "export"),
    ]


def _write_data(folder: Path, task: Task, seed: int) -> list[HeldoutSample]:
    summary = write_dataset(folder, task, seed, progress=show_progress)
    things = " and no ".join(task.media)
    print(
        f"      {summary.train_samples:,} chats to train on, {summary.heldout_samples} single questions held out; "
        f"no {things} occurs twice"
    )
    samples = load_samples(summary.heldout_path, task.kind_of_question())
    for kind in task.questions:
        sample = next(sample for sample in samples if sample.kind == kind)
        print(f"      {kind:<{max(map(len, task.questions))}}  {sample.question}  {sample.answer}")
    return samples


def _ask_swapped(model_folder: Path, samples: Sequence[HeldoutSample], medium: str, after: Sequence[str]) -> Swap:
    """Asks the questions that have such a medium again, with another one; the others keep their answers."""
    swapped = swap(samples, medium)
    asked = [position for position, sample in enumerate(swapped) if medium in sample.media]
    answers = list(after)
    again = answer_questions(model_folder, [swapped[position] for position in asked], progress=show_progress)
    for position, answer in zip(asked, again, strict=True):
        answers[position] = answer
    return Swap(swapped, answers)


def _stops(recipe: Recipe, train_iters: int) -> list[int]:
    """Returns the steps between which the stages train, from 0 to the last."""
    return [train_iters * stage // len(recipe.stages) for stage in range(len(recipe.stages) + 1)]


def _heading(stage: Stage, first: int, last: int, train_iters: int) -> str:
    begin = "Resume" if first else "Train"
    end = "export to Hugging Face format" if last == train_iters else f"stop after step {last}"
    return f"{begin} with {stage.name}, {end}"


if __name__ == "__main__":
    sys.exit(main())
