"""`make demo`: draw images, build a tiny Gemma 3, train, stop, resume in another layout, export, ask, report.

    python -m demo.run [--output FOLDER] [--train_iters N] [--seed N]

Exits with 0 only if the exported model answers from the image: at least 90 % exact match on held-out questions, and
at most 40 % once the images are swapped between them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from demo.console import Phases, show_progress
from demo.draw import QUESTIONS, all_scenes, draw_dataset
from demo.evaluate import HeldoutSample, answer_questions, load_samples, swap_images
from demo.launch import RANKS, launch_training
from demo.model import IMAGE_SIZE_PIXELS, SOFT_TOKENS_PER_IMAGE, build_model_directory
from demo.summary import Answers, Scores, print_summary, write_demo_report
from demo.tokenizer import build_processor, train_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = REPOSITORY / "configs" / "demo_gemma3.yaml"
TRAIN_SAMPLES, HELDOUT_SAMPLES = 32 * 96, 288  # whole rounds through all combinations
LEARNED_TOKENS = 192
PIPELINE_MICRO_BATCH_SIZE = 16  # two micro-batches per step, so that both stages have work at once


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo and returns the exit code."""
    options = _parse(arguments)
    folder = options.output or _next_folder(REPOSITORY / "demo_out")
    stop_after = options.train_iters // 2
    torch.set_num_threads(RANKS)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    phases = Phases(total=6)

    with phases.section("Draw the data set"):
        samples = _draw(folder / "data", options.seed)
    with phases.section("Build a tiny Gemma 3 with a tokenizer of its own"):
        _build_model(folder / "model", options.seed)
    with phases.section("Ask the untrained model"):
        before = answer_questions(folder / "model", samples, progress=show_progress)
    with phases.section(f"Train with tensor_model_parallel_size=2, stop after step {stop_after}"):
        tensor = ["--parallel.tensor_model_parallel_size", RANKS, "--train.exit_interval", stop_after]
        launch_training(CONFIG, _overrides(folder, options.train_iters) + tensor, REPOSITORY)
    with phases.section("Resume with pipeline_model_parallel_size=2, export to Hugging Face format"):
        pipeline = ["--parallel.tensor_model_parallel_size", 1, "--parallel.pipeline_model_parallel_size", RANKS]
        pipeline += ["--train.micro_batch_size", PIPELINE_MICRO_BATCH_SIZE]
        launch_training(CONFIG, _overrides(folder, options.train_iters) + pipeline, REPOSITORY)
    with phases.section("Ask the export with plain transformers, then again with swapped images"):
        swapped = swap_images(samples)
        after = answer_questions(folder / "export", samples, progress=show_progress)
        after_swap = answer_questions(folder / "export", swapped, progress=show_progress)

    answers = Answers(samples, swapped, before, after, after_swap)
    scores = Scores.of(answers)
    report = folder / "report.html"
    layout_rows = _layout_rows(options.train_iters, stop_after)
    write_demo_report(report, folder / "run", answers, scores, phases, layout_rows, stop_after)
    print_summary(scores, phases, len(samples), report, folder / "export")
    return 0 if scores.passed else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.run", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, help="empty or new folder (default: the next free demo_out/NUMBER)")
    parser.add_argument("--train_iters", type=int, default=400, help="optimizer steps (default: 400)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the images and initial weights (default: 1)")
    options = parser.parse_args(arguments)
    if options.train_iters < 2:
        parser.error(f"--train_iters {options.train_iters} must be at least 2, since training stops half-way")
    if options.output:
        options.output = options.output.resolve()
        if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
            parser.error(f"--output {options.output} is not an empty folder; name a new one, nothing is overwritten")
    return options


def _next_folder(parent: Path) -> Path:
    """The first of parent/1, parent/2, ... that does not exist, so that an earlier demo is kept."""
    number = 1
    while (parent / str(number)).exists():
        number += 1
    return parent / str(number)


def _overrides(folder: Path, train_iters: int) -> list[object]:
    """What both starts share: where things lie and how long the run is."""
    return [
        *("--run_dir", folder / "run", "--model.hf_path", folder / "model"),
        *("--data.train", f"[{{path: {folder / 'data' / 'train.jsonl'}}}]"),
        *("--data.valid", f"[{{path: {folder / 'data' / 'heldout.jsonl'}}}]"),
        *("--train.train_iters", train_iters, "--checkpoint.export_hf", folder / "export"),
    ]


def _draw(folder: Path, seed: int) -> list[HeldoutSample]:
    summary = draw_dataset(folder, TRAIN_SAMPLES, HELDOUT_SAMPLES, seed, progress=show_progress)
    print(
        f"      {summary.train_samples:,} images with three questions each to train on, "
        f"{summary.heldout_samples} with one question held out; no image occurs twice"
    )
    kind_of_question = {question: kind for kind, questions in QUESTIONS.items() for question in questions}
    samples = load_samples(summary.heldout_path, kind_of_question)
    for kind in QUESTIONS:
        sample = next(sample for sample in samples if sample.kind == kind)
        print(f"      {kind:<6}  {sample.question}  {sample.answer}")
    return samples


def _build_model(folder: Path, seed: int) -> None:
    texts = [question for questions in QUESTIONS.values() for question in questions]
    texts += [scene.answer(kind) for scene in all_scenes() for kind in QUESTIONS]
    tokenizer = train_tokenizer(texts, LEARNED_TOKENS)
    parameters = build_model_directory(
        folder, build_processor(tokenizer, IMAGE_SIZE_PIXELS, SOFT_TOKENS_PER_IMAGE), seed
    )
    print(f"      {parameters:,} parameters, {len(tokenizer)} tokens, {SOFT_TOKENS_PER_IMAGE} tokens per image")


def _layout_rows(train_iters: int, stop_after: int) -> list[dict]:
    tensor = {"steps": f"1 to {stop_after}", "processes": RANKS, "tensor parallel": RANKS, "pipeline parallel": 1}
    pipeline = {"steps": f"{stop_after + 1} to {train_iters}", "processes": RANKS}
    return [tensor, {**pipeline, "tensor parallel": 1, "pipeline parallel": RANKS}]


if __name__ == "__main__":
    sys.exit(main())
