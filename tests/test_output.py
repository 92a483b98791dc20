"""Lines that cannot be written are lost; the run is not."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

PRINTS = """
import sys
from megatron_vlm import output
output.endure()
sys.stdin.readline()  # until the reader has gone
for _ in range(3):
    print("nobody reads this", flush=True)
print("done", file=sys.stderr)
"""


def test_a_reader_that_has_gone_ends_nothing() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate("go\n", timeout=60)
    assert errors.splitlines()[0] == "done"


def test_a_full_disk_ends_nothing() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PRINTS], input="go\n", stdout=full, stderr=subprocess.PIPE, text=True, env=os.environ
        )
    assert done.stderr.splitlines()[0] == "done"


def test_streams_that_are_closed_end_nothing() -> None:
    """Before the start, as a shell closes them, and later."""
    program = """
import sys
from megatron_vlm import output
from megatron_vlm.progress import Progress
assert sys.stderr is None
output.endure()
print("lost", file=sys.stderr, flush=True)
with Progress("work", 10) as progress:
    progress.advance(10)
print("here", flush=True)
sys.stdout.close()
print("lost", flush=True)
sys.exit(3)
"""
    command = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(program)} 2>&-"
    result = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (3, "here\n")
