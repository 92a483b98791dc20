"""Print rows of a JSONL file as a model will see them; trained text stands between [[ and ]].

python tools/inspect_data.py --hf MODEL_DIRECTORY --data rows.jsonl --num 3 [--check] [--lengths]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_vlm.config import DataSettings, DataSource
from megatron_vlm.data.describe import check_lengths, check_rows, describe_sample
from megatron_vlm.data.prompts import PromptBuilder
from megatron_vlm.data.rows import RowReader
from megatron_vlm.errors import EXIT_USER_ERROR, UserError
from megatron_vlm.families.registry import detect, load_hf_config


def main() -> int:
    arguments = _parse_arguments()
    try:
        hf_config = load_hf_config(arguments.hf)
        family = detect(hf_config)
        rules = family.prompt_rules(family.config_from_hf(hf_config, arguments.text_only))
        builder = PromptBuilder(arguments.hf, rules, arguments.min_pixels, arguments.max_pixels)
        for note in builder.notes:
            print(f"note: {note}")
        source = DataSource(path=arguments.data)
        reader = RowReader([source], DataSettings(train=[source], seq_length=arguments.seq_length), builder)
        for row in range(arguments.first, min(arguments.first + arguments.num, reader.sources[0].num_rows)):
            print(describe_sample(reader.read(0, row), builder), end="\n\n")
        if arguments.check:
            found = check_rows(reader)
            print(found, *found.problems, *found.notes, sep="\n")
        if arguments.lengths:
            print(check_lengths(reader))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--hf", type=os.path.expanduser, required=True, help="directory with config.json, tokenizer and processor files"
    )
    parser.add_argument("--data", type=os.path.expanduser, required=True, help="JSONL file")
    parser.add_argument("--num", type=int, default=3, help="rows to print (default: 3)")
    parser.add_argument("--first", type=int, default=0, help="row to begin with (default: 0)")
    parser.add_argument("--seq_length", type=int, default=2**30, help="most tokens of a row (default: no limit)")
    parser.add_argument("--min_pixels", type=int, help="fewest pixels of an image (default: the processor's own value)")
    parser.add_argument("--max_pixels", type=int, help="most pixels of an image (default: the processor's own value)")
    parser.add_argument("--text_only", action="store_true", help="use only the language model of a directory")
    parser.add_argument(
        "--check", action="store_true", help="also parse every row and look for every image, video and audio file"
    )
    parser.add_argument("--lengths", action="store_true", help="also encode every row and count its tokens")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
