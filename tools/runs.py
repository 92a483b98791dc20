"""Run folders side by side.

    python tools/runs.py list [FOLDER ...] [--depth N]     every run below the folders: state, steps, losses, start
    python tools/runs.py compare RUN_DIR RUN_DIR           settings, versions and machines that differ; figures

Works for any run folder, also while runs go on. Exit codes: 0 done, 2 a folder that is no run, or none found.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_vlm import output
from megatron_vlm.errors import EXIT_USER_ERROR, UserError
from megatron_vlm.report.run_comparison import compare_runs, describe_run, find_runs

_WIDTH_OF_FILES = 200  # where the output goes to a file or a pipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out a command and return the exit code."""
    options = _parse(arguments)
    try:
        return options.command(options)
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def list_runs(options: argparse.Namespace) -> int:
    """List the runs below folders."""
    rows = [describe_run(path) for path in find_runs([Path(folder) for folder in options.folders], options.depth)]
    _print_table("", rows[0].keys(), [row.values() for row in rows])
    return 0


def compare(options: argparse.Namespace) -> int:
    """Compare two runs."""
    first, second = Path(options.run_dirs[0]), Path(options.run_dirs[1])
    tables = compare_runs(first, second)
    print(f"A  {first}\nB  {second}")
    for heading, rows in tables.items():
        print()
        if rows:
            _print_table(heading, ["", "A", "B"], rows)
        else:
            print(f"{heading}: nothing")
    return 0


def _print_table(title: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for name in head:
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_OF_FILES)
    with console.capture() as capture:
        console.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="every run below folders")
    listing.add_argument("folders", nargs="*", default=["runs"], type=os.path.expanduser, metavar="FOLDER")
    listing.add_argument("--depth", type=int, default=4, help="levels of folders that are searched (default: 4)")
    listing.set_defaults(command=list_runs)
    comparing = commands.add_parser("compare", help="two runs side by side")
    comparing.add_argument("run_dirs", nargs=2, type=os.path.expanduser, metavar="RUN_DIR")
    comparing.set_defaults(command=compare)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    output.endure()
    sys.exit(main())
