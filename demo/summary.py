"""The demo's verdict: scores against the bar, the closing table, and the content of the report."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.console import Phases, print_table
from demo.evaluate import HeldoutSample, best_blind_guess, exact_match
from megatron_vlm.report.page import Figure, Sample
from megatron_vlm.report.run_report import write_report

LEAST_EXACT_MATCH = 0.90
MOST_SWAPPED_MATCH = 0.40
_SAMPLES_SHOWN = 24


@dataclass(frozen=True)
class Answers:
    """The held-out samples, and what was answered to them before training, after it, and with swapped images."""

    samples: Sequence[HeldoutSample]
    swapped_samples: Sequence[HeldoutSample]
    before: Sequence[str]
    after: Sequence[str]
    swapped: Sequence[str]

    def restricted_to(self, kinds: set[str]) -> "Answers":
        """Returns the part about these kinds of questions."""
        chosen = [index for index, sample in enumerate(self.samples) if sample.kind in kinds]
        columns = (self.samples, self.swapped_samples, self.before, self.after, self.swapped)
        return Answers(*([column[index] for index in chosen] for column in columns))


@dataclass(frozen=True)
class Scores:
    """Exact match with the data set's answers; `swapped_follows_image` is that with the swapped image's own answer."""

    before: float
    after: float
    swapped: float
    swapped_follows_image: float
    blind_guess: float

    @classmethod
    def of(cls, answers: Answers) -> "Scores":
        """Computes the scores of the answers."""
        expected = [sample.answer for sample in answers.samples]
        return cls(
            before=exact_match(answers.before, expected),
            after=exact_match(answers.after, expected),
            swapped=exact_match(answers.swapped, expected),
            swapped_follows_image=exact_match(
                answers.swapped, [sample.shown_answer for sample in answers.swapped_samples]
            ),
            blind_guess=best_blind_guess(answers.samples),
        )

    @property
    def passed(self) -> bool:
        return self.after >= LEAST_EXACT_MATCH and self.swapped <= MOST_SWAPPED_MATCH


def print_summary(scores: Scores, phases: Phases, heldout_samples: int, report: Path, export: Path) -> None:
    """Prints the closing table, where things lie, and whether the bar was met."""
    print(f"\nExact match on {heldout_samples} held-out questions, greedy generate() of plain transformers")
    print_table(
        [
            ("before training", f"{scores.before:.1%}"),
            (f"after training (bar: at least {LEAST_EXACT_MATCH:.0%})", f"{scores.after:.1%}"),
            (f"images swapped (bar: at most {MOST_SWAPPED_MATCH:.0%})", f"{scores.swapped:.1%}"),
            ("  of these, answers that are true of the swapped image", f"{scores.swapped_follows_image:.1%}"),
            ("best guess without looking", f"{scores.blind_guess:.1%}"),
        ]
    )
    print("\nSeconds")
    rows = [(name, f"{seconds:.1f}") for name, seconds in phases.seconds.items()]
    print_table([*rows, ("", ""), ("in all", f"{phases.total_seconds:.1f}")])
    print(f"\nModel:  {export}\nReport: {report}")
    print("\nPassed: the model answers from the image." if scores.passed else "\nFAILED: the bar was not met.")


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
    figures = [
        Figure(
            "Exact match, held out",
            f"{scores.after:.1%}",
            f"at least {LEAST_EXACT_MATCH:.0%}",
            scores.after >= LEAST_EXACT_MATCH,
        ),
        Figure(
            "With swapped images",
            f"{scores.swapped:.1%}",
            f"at most {MOST_SWAPPED_MATCH:.0%}",
            scores.swapped <= MOST_SWAPPED_MATCH,
        ),
        Figure("Before training", f"{scores.before:.1%}", f"best blind guess {scores.blind_guess:.1%}"),
        Figure("Time in all", f"{phases.total_seconds:.0f} s", "two processes, no accelerator"),
    ]
    write_report(
        run_folder,
        path,
        title=f"A tiny {title} learns to look",
        subtitle=(
            f"Trained from random weights on drawn images, {resumed}exported, and asked {len(answers.samples)} "
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
        scores = Scores.of(answers.restricted_to(chosen))
        rows.append(
            {
                "questions": name,
                "best guess without looking": f"{scores.blind_guess:.1%}",
                "before training": f"{scores.before:.1%}",
                "after training": f"{scores.after:.1%}",
                "images swapped": f"{scores.swapped:.1%}",
                "true of the swapped image": f"{scores.swapped_follows_image:.1%}",
            }
        )
    return rows


def _table_of_seconds(phases: Phases) -> list[dict]:
    rows = [{"phase": name, "seconds": f"{seconds:.1f}"} for name, seconds in phases.seconds.items()]
    return [*rows, {"phase": "in all", "seconds": f"{phases.total_seconds:.1f}"}]


def samples_to_show(answers: Answers) -> list[Sample]:
    """Returns two dozen samples, wrong answers first, each with its answer when images were swapped."""
    seen_of_kind: Counter[str] = Counter()
    ranks = []
    for index, sample in enumerate(answers.samples):
        is_right = answers.after[index] == sample.answer
        ranks.append((is_right, seen_of_kind[sample.kind], index))  # the kinds take turns
        seen_of_kind[sample.kind] += 1
    order = [index for _, _, index in sorted(ranks)]
    return [
        Sample(
            answers.samples[index].image_path,
            answers.samples[index].question,
            answers.samples[index].answer,
            answers.after[index],
            f"with another image: {answers.swapped[index]}",
        )
        for index in order[:_SAMPLES_SHOWN]
    ]
