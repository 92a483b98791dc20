"""Write a run as one HTML page: curves, figures, data sources, starts, settings.

    python tools/report.py RUN_DIR [--output FILE]

Works for any run folder, also while the run is going on. The page needs nothing else: mail it, or open it anywhere.
Exit codes: 0 written, 2 a folder that is no run, or a file that cannot be written.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_vlm import output
from megatron_vlm.errors import EXIT_USER_ERROR, UserError
from megatron_vlm.report.run_report import write_report


def main(arguments: list[str] | None = None) -> int:
    """Write the report and return the exit code."""
    options = _parse(arguments)
    try:
        path = write_report(Path(options.run_dir), options.output and Path(options.output))
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(f"wrote {path}")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write a run as one HTML page.")
    parser.add_argument("run_dir", type=os.path.expanduser, metavar="RUN_DIR", help="folder of the run")
    parser.add_argument(
        "--output", type=os.path.expanduser, metavar="FILE", help="the page (default: report.html in the run folder)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    output.endure()
    sys.exit(main())
