"""Convert between Hugging Face directories and distributed checkpoints.

    python tools/convert.py import --hf DIR --out CKPT
    python tools/convert.py export --ckpt CKPT --hf REFERENCE_DIR --out DIR
    python tools/convert.py verify --hf DIR --ckpt CKPT

Exit codes: 0 done (verify: everything equal), 2 a user's mistake (verify: something differs), 130 interrupted.

A distributed checkpoint contains pickles: give --ckpt only what this program wrote on a machine that you trust.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_vlm import output
from megatron_vlm.errors import EXIT_USER_ERROR, UserError

DIFFERENCES_SHOWN = 20
EXIT_INTERRUPTED = 128 + signal.SIGINT
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code."""
    options = _parse(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End the command; no further signal disturbs it while it removes what it has begun."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    _received.append(number)
    raise KeyboardInterrupt


def _raise_if_interrupted() -> None:
    """Packages that were being imported may have swallowed the interruption."""
    if _received:
        raise KeyboardInterrupt


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Hugging Face directories <-> distributed checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    folder: dict[str, Any] = {"type": os.path.expanduser, "required": True}
    hf_help = "Hugging Face directory: config.json, tokenizer, safetensors"
    ckpt_help = "distributed checkpoint, or a run folder (its newest checkpoint)"
    command = commands.add_parser("import", help="safetensors to a distributed checkpoint")
    command.add_argument("--hf", **folder, metavar="DIR", help=hf_help)
    command.add_argument("--out", **folder, metavar="CKPT", help="new directory")
    command.set_defaults(run=_import)
    command = commands.add_parser("export", help="a distributed checkpoint to safetensors")
    command.add_argument("--ckpt", **folder, metavar="CKPT", help=ckpt_help)
    command.add_argument("--hf", **folder, metavar="REFERENCE_DIR", help=f"{hf_help} (weights not needed)")
    command.add_argument("--out", **folder, metavar="DIR", help="new directory")
    command.set_defaults(run=_export)
    command = commands.add_parser("verify", help="compare both, tensor by tensor")
    command.add_argument("--hf", **folder, metavar="DIR", help=hf_help)
    command.add_argument("--ckpt", **folder, metavar="CKPT", help=ckpt_help)
    command.set_defaults(run=_verify)
    return parser.parse_args(arguments)


def _import(options: argparse.Namespace) -> int:
    from megatron_vlm.conversion.convert import import_checkpoint
    from megatron_vlm.conversion.passthrough import describe, describe_unread

    _raise_if_interrupted()
    began = time.monotonic()
    found = import_checkpoint(options.hf, options.out)
    print(f"imported {options.hf} to {options.out} in {time.monotonic() - began:.2f} s")
    if found.passthrough:
        print(describe(found.passthrough))
    if found.unread:
        print(describe_unread(found.unread))
    return 0


def _export(options: argparse.Namespace) -> int:
    from megatron_vlm.conversion.convert import export_checkpoint
    from megatron_vlm.conversion.passthrough import describe

    _raise_if_interrupted()
    began = time.monotonic()
    carried = export_checkpoint(options.ckpt, options.hf, options.out)
    print(f"exported {options.ckpt} to {options.out} in {time.monotonic() - began:.2f} s")
    if carried:
        print(describe(carried))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from megatron_vlm.conversion.convert import verify_checkpoint

    _raise_if_interrupted()
    result = verify_checkpoint(options.hf, options.ckpt)
    for difference in result.differences[:DIFFERENCES_SHOWN]:
        print(f"differs: {difference.hf_name}: {difference.reason}")
    if len(result.differences) > DIFFERENCES_SHOWN:
        print(f"... and {len(result.differences) - DIFFERENCES_SHOWN} more")
    equal = result.num_tensors - len(result.differences)
    print(f"{equal} of {result.num_tensors} tensors equal ({result.num_bytes / 1e9:.3f} GB compared)")
    return EXIT_USER_ERROR if result.differences else 0


if __name__ == "__main__":
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    output.endure()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    sys.exit(main())
