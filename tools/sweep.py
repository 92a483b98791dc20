"""Sweeps: many configurations from one file, trained as a Slurm job array or on this machine.

    python tools/sweep.py check SWEEP.yaml                 every point, all problems at once; writes nothing
    python tools/sweep.py make SWEEP.yaml                  the same, then writes the manifest and the points
    python tools/sweep.py submit SWEEP.yaml                makes it, and submits one job array
    python tools/sweep.py run SWEEP.yaml [--at_once K]     makes it, and trains its points on this machine
    python tools/sweep.py status SWEEP.yaml                the state of every point
    python tools/sweep.py retry SWEEP.yaml [--here]        submits what failed, was stopped, or is missing
    python tools/sweep.py report SWEEP.yaml                one table (CSV) and one page (HTML) of all points

Each takes the sweep's folder in place of its file, once it was made. Exit codes: 0 done, 1 points are not done, 2 a
mistake that the user can correct.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_vlm import output
from megatron_vlm.errors import EXIT_USER_ERROR, ConfigError, LaunchError, UserError
from megatron_vlm.sweeps.manifest import Sweep, check_point_file, read_sweep
from megatron_vlm.sweeps.status import STATES, PointStatus, count_states, point_status, status_of
from megatron_vlm.sweeps.sweep_file import read_sweep_file, sweep_folder

if TYPE_CHECKING:
    from megatron_vlm.sweeps.checks import CheckedSweep

EXIT_NOT_DONE = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out a command and return the exit code."""
    options = _parse(arguments)
    try:
        return options.command(options)
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def check(options: argparse.Namespace) -> int:
    """Check a sweep file, with Slurm too where there is one."""
    from megatron_vlm.sweeps import slurm
    from megatron_vlm.sweeps.checks import check_sweep_file

    checked = check_sweep_file(options.sweep)
    _warn_of_idle(checked)
    sweep = checked.sweep
    said = "Slurm does not answer here: partition, account and nodes were not checked"
    if slurm.is_available():
        said = f"Slurm: {slurm.check_with_slurm(sweep, sweep.points)}"
    left_out = f", {checked.excluded} left out by exclude" if checked.excluded else ""
    print(f"{len(sweep.points)} points are in order{left_out}; they go to {sweep.folder}")
    for point in sweep.points:
        print(f"  {point.index:>4}  {point.name}")
    print(said)
    return 0


def make(options: argparse.Namespace) -> int:
    """Check a sweep file and write its folder."""
    sweep = _make(options.sweep)
    print(f"{len(sweep.points)} points in {sweep.folder}")
    return 0


def submit(options: argparse.Namespace) -> int:
    """Submit the points that have not begun."""
    return _submit(_made(options.sweep), ("pending",))


def run(options: argparse.Namespace) -> int:
    """Train, here, the points that are not done and have not failed."""
    return _run(_made(options.sweep), ("pending", "stopped"), options)


def retry(options: argparse.Namespace) -> int:
    """Submit, or train here, the points that failed, were stopped, or are missing."""
    sweep, states = _made(options.sweep), ("pending", "stopped", "failed")
    return _run(sweep, states, options) if options.here else _submit(sweep, states)


def status(options: argparse.Namespace) -> int:
    """Print the state of every point."""
    statuses = _statuses(read_sweep(_folder(options.sweep)))
    width = max(len(each.point.name) for each in statuses)
    for each in statuses:
        steps = f"{each.step}/{each.train_iters}" if each.train_iters is not None else "-"
        print(
            f"{each.point.index:>4}  {each.point.name:<{width}}  {each.state:<7}  {steps:>11}  {each.detail}".rstrip()
        )
    print(count_states(statuses))
    return 0


def report(options: argparse.Namespace) -> int:
    """Write the table and the page."""
    from megatron_vlm.sweeps.sweep_report import write_sweep_report

    sweep = read_sweep(_folder(options.sweep))
    for path in write_sweep_report(sweep, _statuses(sweep), options.output and Path(options.output), options.metric):
        print(f"wrote {path}")
    return 0


def state(options: argparse.Namespace) -> int:
    """For scripts/sweep.sbatch: print the state and the configuration of a point, a line each."""
    sweep = read_sweep(_folder(options.sweep))
    point = next((point for point in sweep.points if point.index == options.index), None)
    if point is None:
        raise ConfigError(f"there is no point {options.index}", str(sweep.folder), f"give 0 to {len(sweep.points) - 1}")
    check_point_file(sweep, point)
    print(point_status(sweep, point).state, sweep.config_path(point), sep="\n")
    return 0


def _make(path: str) -> Sweep:
    from megatron_vlm.sweeps.checks import check_sweep_file

    checked = check_sweep_file(path)
    _warn_of_idle(checked)
    checked.write()
    return checked.sweep


def _warn_of_idle(checked: CheckedSweep) -> None:
    for expression in checked.idle_excludes:
        print(f"warning: exclude {expression!r} leaves no point out", file=sys.stderr)


def _made(path: str) -> Sweep:
    """Make a sweep from its file, or check the points of one that was made."""
    if not Path(path).is_dir():
        return _make(path)
    from megatron_vlm.sweeps.checks import Problems, check_points

    sweep = read_sweep(Path(path))
    problems = Problems()
    configs = {}
    for point in sweep.points:
        problems.attempt(point, lambda point=point: configs.update({point.index: check_point_file(sweep, point)}))
    problems.raise_if_any()
    check_points(sweep.points, configs, sweep.settings.resources, problems)
    problems.raise_if_any()
    return sweep


def _folder(path: str) -> Path:
    """Return the folder of a sweep that is named by its file or its folder."""
    return Path(path) if Path(path).is_dir() else sweep_folder(read_sweep_file(path)[0])


def _statuses(sweep: Sweep) -> list[PointStatus]:
    statuses, warning = status_of(sweep)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    return statuses


def _submit(sweep: Sweep, states: Collection[str]) -> int:
    from megatron_vlm.sweeps.slurm import index_ranges
    from megatron_vlm.sweeps.submission import sole_submission, submit_once

    with sole_submission(sweep):
        statuses, problem = status_of(sweep)
        if problem:
            what = f"Slurm does not say which points it has already: {problem}"
            raise LaunchError(what, str(sweep.folder), "submit again when it answers")
        points = [each.point for each in statuses if each.state in states and not each.has_job]
        if not points:
            print("nothing to submit")
            return 0
        job = submit_once(sweep, points)
    print(f"submitted job {job}: points {index_ranges(point.index for point in points)}")
    return 0


def _run(sweep: Sweep, states: Collection[str], options: argparse.Namespace) -> int:
    from megatron_vlm.sweeps.local_run import LocalRunner

    runner = LocalRunner(sweep, options.at_once, lambda line: print(line, flush=True))
    done = runner.run([each.point for each in _statuses(sweep) if each.state in states and not each.has_job])
    statuses = _statuses(sweep)
    print(count_states(statuses))
    if any(each.state == "failed" for each in statuses):
        print("what failed trains again with: retry --here")
    return 0 if done and all(each.state == "done" for each in statuses) else EXIT_NOT_DONE


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="States: " + "; ".join(f"{word}: {meaning}" for word, meaning in STATES.items()) + ".",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(command, **described) -> argparse.ArgumentParser:
        added = commands.add_parser(command.__name__, help=command.__doc__.partition("\n")[0], **described)
        takes_file = command in (check, make)
        named = "the sweep file" if takes_file else "the sweep file, or the sweep's folder"
        added.add_argument("sweep", metavar="SWEEP", type=os.path.expanduser, help=named)
        added.set_defaults(command=command)
        return added

    for command in (check, make, submit, status):
        add(command)
    for command in (run, retry):
        added = add(command)
        added.add_argument(
            "--at_once", type=_at_least_one, default=1, metavar="K", help="points at a time (default: 1)"
        )
        if command is retry:
            added.add_argument("--here", action="store_true", help="train them on this machine, without Slurm")
    added = add(report)
    added.add_argument("--output", type=os.path.expanduser, metavar="FOLDER", help="default: the sweep's folder")
    added.add_argument("--metric", metavar="COLUMN", help="that points are ranked by (default: the held-out loss)")
    add(state).add_argument("index", type=int, help="of the point")
    return parser.parse_args(arguments)


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("give a number of at least 1")
    return number


if __name__ == "__main__":
    output.endure()
    sys.exit(main())
