"""Train a vision-language model.

    torchrun --nproc-per-node N pretrain_vlm.py --config FILE.yaml [--section.key value ...]
    python pretrain_vlm.py --config FILE.yaml --dry_run

Exit codes: 0 done, or stopped early on request (`stopped.json` in the run folder says which); 2 a mistake that the user
can correct, told in one line; anything else a crash.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from megatron_vlm.cli import parse_command_line
from megatron_vlm.errors import EXIT_USER_ERROR, UserError

SECONDS_BEFORE_OTHER_RANKS_REPORT = 10.0  # by which ranks of a busy machine start apart from each other


def main(argv: list[str]) -> int:
    """Parse the command line, then check (`--dry_run`) or train; returns the exit code."""
    try:
        command = parse_command_line(argv)
        from megatron_vlm import platform

        platform.initialize()  # before megatron-core is imported, which takes longer without it
        if command.dry_run:
            from megatron_vlm.planning.dry_run import dry_run

            return dry_run(command.config)
        from megatron_vlm.training.loop import train

        return train(command.config)
    except UserError as error:
        report(error)
        return EXIT_USER_ERROR


def report(error: UserError) -> None:
    """Print the error once: most are the same on all ranks, and torchrun ends the others when the first rank fails."""
    rank, local_rank = os.environ.get("RANK"), int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SECONDS_BEFORE_OTHER_RANKS_REPORT)
    where = f" (rank {rank})" if local_rank > 0 else ""
    print(f"{type(error).__name__}{where}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
