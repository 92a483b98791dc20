"""A run of a real model for checkpoint tests: training steps, saved and loaded in any layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.distributed import DistributedDataParallelConfig

from megatron_vlm.checkpoint.manager import CheckpointManager
from megatron_vlm.checkpoint.run_folder import ModelIdentity
from megatron_vlm.config import OptimizerSettings
from megatron_vlm.conversion.running_model import load_hf_into_model
from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.families import build, registry
from megatron_vlm.families.build import BuildSettings, build_chunks, wrap_data_parallel
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.training.optimizer import apply_gradients, build_optimizer, gradient_norm
from megatron_vlm.training.step import run_global_batch
from tests.checkpoint.tiny_run import prepare_process
from tests.checkpoint.whole_state import Pieces, pieces
from tests.parity.layouts import TestLayout, own_micro_batches

STEPS, MORE_STEPS = 2, 2
# Without a schedule nothing would be exempt from weight decay; tiny_run has both. A small eps would make full steps out
# of gradients that are rounding noise.
SETTINGS = OptimizerSettings(lr=1e-2, weight_decay=0.0, eps=1e-4, clip_grad=1.0)
BUCKET_ELEMENTS = 4000  # several buckets in a tiny model, where gradients or parameters are exchanged bucket by bucket

Figures = list[tuple[float, float]]
"""Loss and gradient norm of each step."""

BatchesOfStep = Callable[[int], Sequence[MicroBatch]]
"""The global batch of a step, in micro-batches."""


class FamilyRun:
    """Model, AdamW and checkpoints of one rank; the model starts from a Hugging Face directory."""

    def __init__(
        self,
        hf_dir: str,
        batches_of_step: BatchesOfStep,
        layout: TestLayout,
        folder: str,
        dtype: torch.dtype,
    ) -> None:
        prepare_process()
        self.batches_of_step, self.layout = batches_of_step, layout
        hf_config = registry.load_hf_config(hf_dir)
        family = registry.detect(hf_config)
        model_config = family.config_from_hf(hf_config, text_only=False)
        ranks = layout.ranks(len(model_config.text.layers))
        self.groups = build_groups(ranks)
        initialize_megatron(1, self.groups)
        settings = BuildSettings(
            ranks,
            dtype,
            vision_parallelism=layout.vision,
            overlapped=layout.overlap,
        )
        chunks = build_chunks(family, model_config, settings, self.groups)
        load_hf_into_model(chunks, hf_dir, family, model_config, self.groups)
        small_buckets = partial(DistributedDataParallelConfig, bucket_size=BUCKET_ELEMENTS)
        with patch.object(build, "DistributedDataParallelConfig", small_buckets):
            self.model = wrap_data_parallel(
                chunks, self.groups, layout.distributed_optimizer, layout.overlap, layout.overlap
            )
        gradients = [parameter.main_grad for chunk in self.model for parameter in chunk.parameters()]
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        self.optimizer = build_optimizer(self.model, SETTINGS, dtype, layout.distributed_optimizer, self.groups)
        self.step = 0
        identity = ModelIdentity(family.name, hf_config.model_type, text_only=False, tied=True)
        sizes = {name: value for name, value in asdict(layout).items() if isinstance(value, int)}
        precision = "bf16" if dtype == torch.bfloat16 else "fp32"
        self.manager = CheckpointManager(folder, self.groups, identity, sizes, precision, async_save=True)

    def train(self, num_steps: int) -> Figures:
        figures = []
        for _ in range(num_steps):
            for chunk in self.model:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            mine = own_micro_batches(self.model, list(self.batches_of_step(self.step)), self.groups, self.layout)
            loss_sum, num_labels = run_global_batch(self.model, mine, self.groups)[0].tolist()
            norm = gradient_norm(self.optimizer)
            apply_gradients(self.optimizer, norm, SETTINGS.clip_grad)
            figures.append((loss_sum / num_labels, norm))
            self.step += 1
            self.manager.finalize()
        return figures

    def pieces(self) -> Pieces:
        return pieces(self.model, self.optimizer, self.groups)


def start_run(*arguments: Any) -> tuple[Pieces, Figures, Pieces]:
    """On a rank: train a new `FamilyRun`, save it, train on; the state saved, figures after it, the last state."""
    run = FamilyRun(*arguments)
    run.train(STEPS)
    run.manager.save(run.step, run.model, run.optimizer, None, {}, "")
    saved = run.pieces()
    figures = run.train(MORE_STEPS)  # while the writer writes
    run.manager.finalize(blocking=True)
    return saved, figures, run.pieces()


def continue_run(*arguments: Any) -> tuple[Pieces, Figures, Pieces]:
    """On a rank: load and train on; the state loaded, figures after it, the last state."""
    run = FamilyRun(*arguments)
    resumed = run.manager.load(run.model, run.optimizer, None)
    assert resumed is not None
    run.step = resumed.step
    return run.pieces(), run.train(MORE_STEPS), run.pieces()
