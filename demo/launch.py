"""Starts the training command under torchrun and shows its output as it comes."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

RANKS = 2


def launch_training(config: Path, overrides: Sequence[object], repository: Path, ranks: int = RANKS) -> None:
    """Runs `torchrun --nproc-per-node RANKS pretrain_vlm.py --config CONFIG OVERRIDES` and waits for it.

    Raises:
        SystemExit: the command failed; its own output, shown before, says why.
    """
    arguments = ["--nproc-per-node", ranks, "pretrain_vlm.py", "--config", config.relative_to(repository), *overrides]
    print("      torchrun " + " ".join(map(str, arguments)), flush=True)
    # `torchrun` is this module's script; started through the interpreter, no PATH has to be right.
    # --standalone picks a free port, so that two demos can run beside each other.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *map(str, arguments)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    with subprocess.Popen(
        command, cwd=repository, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None  # asked for above
        for line in process.stdout:
            print("      │ " + line.rstrip(), flush=True)
    if process.returncode:
        raise SystemExit(f"training ended with exit code {process.returncode}; its last lines above say why")
