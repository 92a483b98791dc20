"""Train a vision-language model.

    torchrun --nproc-per-node N pretrain_vlm.py --config FILE.yaml [--section.key value ...]
    srun --ntasks-per-node N python pretrain_vlm.py --config FILE.yaml
    python pretrain_vlm.py --config FILE.yaml --dry_run

Exit codes: 0 done, or stopped early on request (`stopped.json` in the run folder says which); 2 a mistake that the user
can correct, printed in one line each; anything else a crash.
"""

from __future__ import annotations

import signal
import sys

from megatron_vlm import output
from megatron_vlm.cli import parse_command_line
from megatron_vlm.error_report import report
from megatron_vlm.errors import EXIT_USER_ERROR, UserError
from megatron_vlm.slurm_step import join_slurm_step


def main(argv: list[str]) -> int:
    """Parse the command line, then check (`--dry_run`) or train; returns the exit code."""
    try:
        join_slurm_step()
        command = parse_command_line(argv)
        from megatron_vlm import platform

        # Before megatron-core is imported, which takes longer without it; the dry run counts without a device.
        platform.initialize("cpu" if command.dry_run else command.config.device)
        if command.dry_run:
            from megatron_vlm.planning.dry_run import dry_run

            return dry_run(command.config)
        from megatron_vlm.training.loop import train

        return train(command.config)
    except UserError as error:
        report(error)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    output.endure()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback; training has a handler of its own
    sys.exit(main(sys.argv[1:]))
