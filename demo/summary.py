"""The demo's verdict: scores against the bar, the closing table, and the content of the report."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.console import Phases, print_table
from demo.evaluate import HeldoutSample, best_blind_guess, exact_match
from megatron_vlm.report.page import Figure, Sample
from megatron_vlm.report.run_report import write_report

LEAST_EXACT_MATCH = 0.90
# Coincidence gives about half of each: one in five answers about images, one in ten about clips.
MOST_SWAPPED_MATCH = {"image": 0.40, "clip": 0.20}
_SAMPLES_SHOWN = 24
_VERBS = {"image": "look", "clip": "listen"}


@dataclass(frozen=True)
class Swap:
    """The samples with one kind of medium swapped, and the answers to them.

    Samples without such a medium, which are not asked again, are there as well: with the answer from before.
    """

    samples: Sequence[HeldoutSample]
    answers: Sequence[str]


@dataclass(frozen=True)
class Answers:
    """The held-out samples, and what was answered to them before training, after it, and with each medium swapped."""

    samples: Sequence[HeldoutSample]
    before: Sequence[str]
    after: Sequence[str]
    swaps: Mapping[str, Swap]

    def where(self, condition: Callable[[HeldoutSample], bool]) -> "Answers":
        """Returns the part about some of the samples."""
        chosen = [index for index, sample in enumerate(self.samples) if condition(sample)]

        def pick[Item](column: Sequence[Item]) -> list[Item]:
            return [column[index] for index in chosen]

        swaps = {name: Swap(pick(swap.samples), pick(swap.answers)) for name, swap in self.swaps.items()}
        return Answers(pick(self.samples), pick(self.before), pick(self.after), swaps)


@dataclass(frozen=True)
class SwapScores:
    """Exact match of the questions that have one kind of medium.

    Attributes:
        after: with their own media.
        swapped: with swapped media.
        follows: with swapped media, against the answers that are true of those.
    """

    after: float
    swapped: float
    follows: float


@dataclass(frozen=True)
class Scores:
    """Exact match with the data set's answers, in all and for each kind of medium."""

    before: float
    after: float
    blind_guess: float
    media: Mapping[str, SwapScores]

    @classmethod
    def of(cls, answers: Answers) -> "Scores":
        """Computes the scores of the answers."""
        expected = [sample.answer for sample in answers.samples]
        media = {}
        for medium in answers.swaps:
            part = answers.where(lambda sample, medium=medium: medium in sample.media)
            if part.samples:
                wanted = [sample.answer for sample in part.samples]
                swap = part.swaps[medium]
                media[medium] = SwapScores(
                    after=exact_match(part.after, wanted),
                    swapped=exact_match(swap.answers, wanted),
                    follows=exact_match(swap.answers, [sample.shown_answer for sample in swap.samples]),
                )
        return cls(
            before=exact_match(answers.before, expected),
            after=exact_match(answers.after, expected),
            blind_guess=best_blind_guess(answers.samples),
            media=media,
        )

    @property
    def passed(self) -> bool:
        """Whether every kind of medium is used, and the answers are right."""
        return self.after >= LEAST_EXACT_MATCH and all(
            scores.after >= LEAST_EXACT_MATCH and scores.swapped <= MOST_SWAPPED_MATCH[medium]
            for medium, scores in self.media.items()
        )


def print_summary(scores: Scores, phases: Phases, heldout_samples: int, report: Path, export: Path) -> None:
    """Prints the closing table, where things lie, and whether the bars were met."""
    print(f"\nExact match on {heldout_samples} held-out questions, greedy generate() of plain transformers")
    rows = [
        ("before training", f"{scores.before:.1%}"),
        (f"after training (bar: at least {LEAST_EXACT_MATCH:.0%})", f"{scores.after:.1%}"),
    ]
    for medium, of_medium in scores.media.items():
        if len(scores.media) > 1:
            rows.append((f"  questions with {medium}s (the same bar)", f"{of_medium.after:.1%}"))
        rows += [
            (f"{medium}s swapped (bar: at most {MOST_SWAPPED_MATCH[medium]:.0%})", f"{of_medium.swapped:.1%}"),
            (f"  of these, answers that are true of the swapped {medium}", f"{of_medium.follows:.1%}"),
        ]
    rows.append((f"best guess without {_senses(scores)}", f"{scores.blind_guess:.1%}"))
    print_table(rows)
    print("\nSeconds")
    rows = [(name, f"{seconds:.1f}") for name, seconds in phases.seconds.items()]
    print_table([*rows, ("", ""), ("in all", f"{phases.total_seconds:.1f}")])
    print(f"\nModel:  {export}\nReport: {report}")
    used = " and ".join(f"the {medium}" for medium in scores.media)
    print(f"\nPassed: the model answers from {used}." if scores.passed else "\nFAILED: a bar was not met.")


def _senses(scores: Scores) -> str:
    return " or ".join(_VERBS[medium] + "ing" for medium in scores.media)


def write_demo_report(
    path: Path,
    title: str,
    run_folder: Path,
    answers: Answers,
    scores: Scores,
    phases: Phases,
    num_starts: int,
) -> None:
    """Writes the report of the demo's run, with what the demo asked the model beside the run's own figures."""
    resumed = "stopped and resumed in another layout, " if num_starts > 1 else ""
    bar = f"at least {LEAST_EXACT_MATCH:.0%}"
    figures = [Figure("Exact match, held out", f"{scores.after:.1%}", bar, scores.after >= LEAST_EXACT_MATCH)]
    for medium, of_medium in scores.media.items():
        most = MOST_SWAPPED_MATCH[medium]
        if len(scores.media) > 1:
            is_met = of_medium.after >= LEAST_EXACT_MATCH
            figures.append(Figure(f"Questions with {medium}s", f"{of_medium.after:.1%}", bar, is_met))
        figures.append(
            Figure(
                f"With swapped {medium}s",
                f"{of_medium.swapped:.1%}",
                f"at most {most:.0%}",
                of_medium.swapped <= most,
            )
        )
    figures += [
        Figure("Before training", f"{scores.before:.1%}", f"best blind guess {scores.blind_guess:.1%}"),
        Figure("Time in all", f"{phases.total_seconds:.0f} s", "two processes, no accelerator"),
    ]
    write_report(
        run_folder,
        path,
        title=f"A tiny {title} learns to " + " and ".join(_VERBS[medium] for medium in scores.media),
        subtitle=(
            f"Trained from random weights on drawn images{' and synthesised clips' * ('clip' in scores.media)}, "
            f"{resumed}exported, and asked {len(answers.samples)} "
            f"held-out questions through plain transformers."
        ),
        figures=figures,
        tables={"Exact match": _table_by_kind(answers), "Time": _table_of_seconds(phases)},
        samples=samples_to_show(answers),
    )


def _table_by_kind(answers: Answers) -> list[dict]:
    """Returns one row per kind of question and one for all."""
    kinds = sorted({sample.kind for sample in answers.samples})
    rows = []
    for name, chosen in [*((kind, {kind}) for kind in kinds), ("all", set(kinds))]:
        scores = Scores.of(answers.where(lambda sample, chosen=chosen: sample.kind in chosen))
        row = {
            "questions": name,
            "best guess without looking": f"{scores.blind_guess:.1%}",
            "before training": f"{scores.before:.1%}",
            "after training": f"{scores.after:.1%}",
        }
        for medium in answers.swaps:
            of_medium = scores.media.get(medium)
            row[f"{medium}s swapped"] = f"{of_medium.swapped:.1%}" if of_medium else ""
            row[f"true of the swapped {medium}"] = f"{of_medium.follows:.1%}" if of_medium else ""
        rows.append(row)
    return rows


def _table_of_seconds(phases: Phases) -> list[dict]:
    rows = [{"phase": name, "seconds": f"{seconds:.1f}"} for name, seconds in phases.seconds.items()]
    return [*rows, {"phase": "in all", "seconds": f"{phases.total_seconds:.1f}"}]


def samples_to_show(answers: Answers) -> list[Sample]:
    """Returns two dozen samples, wrong answers first, each with its answers when its media were swapped."""
    seen_of_kind: Counter[str] = Counter()
    ranks = []
    for index, sample in enumerate(answers.samples):
        is_right = answers.after[index] == sample.answer
        ranks.append((is_right, seen_of_kind[sample.kind], index))  # the kinds take turns
        seen_of_kind[sample.kind] += 1
    return [_sample_to_show(answers, index) for _, _, index in sorted(ranks)[:_SAMPLES_SHOWN]]


def _sample_to_show(answers: Answers, index: int) -> Sample:
    sample = answers.samples[index]
    notes = [
        f"with another {medium}: {swap.answers[index]}"
        for medium, swap in answers.swaps.items()
        if medium in sample.media
    ]
    return Sample(
        sample.media.get("image"),
        sample.question,
        sample.answer,
        answers.after[index],
        "; ".join(notes),
        sample.media.get("clip"),
    )
