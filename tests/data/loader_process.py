"""A program that reads with workers and then ends in a way that leaves it no time to close them.

Arguments: model directory, JSONL file, "error" (ends by an exception) or "wait" (waits to be killed). Prints the
workers' process ids.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from types import SimpleNamespace

from megatron_vlm.config import Config, DataSettings, DataSource, ModelSettings, TrainSettings
from megatron_vlm.data.loader import BatchSharding, build_train_loader
from megatron_vlm.families.gemma3.prompt import prompt_rules

if __name__ == "__main__":
    hf_path, path, ending = sys.argv[1:]
    config = Config(
        run_dir="unused",
        model=ModelSettings(hf_path=hf_path),
        data=DataSettings(train=[DataSource(path)], seq_length=128, num_workers=2),
        train=TrainSettings(train_iters=1, global_batch_size=2),
    )
    vision = SimpleNamespace(image_size=16, patch_size=4)
    model = SimpleNamespace(text_only=False, image_token_id=8, mm_tokens_per_image=4, vision=vision)
    rules = prompt_rules(model)
    loader = build_train_loader(config, rules, BatchSharding(2, 1))
    next(loader)
    print(*[process.pid for process in multiprocessing.active_children()], flush=True)
    if ending == "error":
        raise RuntimeError("the program ends here")
    time.sleep(600)
