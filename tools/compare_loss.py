"""Compare the loss of a few rows with transformers', in fp32 and without a GPU: is it the model, or the data?

    python tools/compare_loss.py --hf MODEL_DIRECTORY --data rows.jsonl --num 3

Both models are loaded one after the other, each in 4 bytes per parameter. Exit codes: 0 all equal, 1 some differ, 2 a
user's mistake.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_vlm import platform
from megatron_vlm.config import DataSettings, DataSource
from megatron_vlm.conversion.loss_comparison import compare_losses
from megatron_vlm.data.prompts import PromptBuilder
from megatron_vlm.data.rows import RowReader
from megatron_vlm.errors import EXIT_USER_ERROR, DataError, UserError
from megatron_vlm.families.registry import detect, load_hf_config


def main(given: list[str] | None = None) -> int:
    """Compare and print; returns the exit code."""
    arguments = _parse_arguments(given)
    try:
        platform.initialize("cpu")
        hf_config = load_hf_config(arguments.hf)
        family = detect(hf_config)
        rules = family.prompt_rules(family.config_from_hf(hf_config, text_only=False))
        builder = PromptBuilder(arguments.hf, rules, None, None)
        source = DataSource(path=arguments.data)
        reader = RowReader([source], DataSettings(train=[source], seq_length=2**30, strict=True), builder)
        num_rows = reader.sources[0].num_rows
        rows = range(arguments.first, min(arguments.first + arguments.num, num_rows))
        if arguments.first < 0 or not rows:
            asked = f"--first {arguments.first} --num {arguments.num} names no row, for the file has {num_rows}"
            raise DataError(asked, arguments.data, "count rows from 0")
        compared = compare_losses(arguments.hf, family, hf_config, reader, rows)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(*compared, sep="\n")
    return 0 if all(row.is_equal for row in compared) else 1


def _parse_arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=os.path.expanduser, required=True, help="model directory")
    parser.add_argument("--data", type=os.path.expanduser, required=True, help="JSONL file")
    parser.add_argument("--num", type=int, default=3, help="rows to compare (default: 3)")
    parser.add_argument("--first", type=int, default=0, help="row to begin with (default: 0)")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
