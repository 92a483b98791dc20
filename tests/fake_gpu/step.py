"""A training step of one rank on the fake GPU: published layer shapes, few layers, no other ranks."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers import PretrainedConfig

from megatron_vlm.cli import load_config
from megatron_vlm.config import Config
from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.data.context_shard import shard_for_context
from megatron_vlm.families import registry
from megatron_vlm.families.build import DTYPES, build_chunks, build_settings, context_sharding, wrap_data_parallel
from megatron_vlm.layers.moe import MoE
from megatron_vlm.model.trainable import Trainable
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.simulate import simulated_rank
from megatron_vlm.planning.example_batch import example_batch
from megatron_vlm.planning.preflight import check_layout
from megatron_vlm.training.optimizer import apply_gradients, build_optimizer, gradient_norm
from megatron_vlm.training.step import collect_expert_use, run_global_batch
from tests.fake_gpu.device import CUDA, KNOWN_WAITS, DeviceFault, FakeGpu, fake_gpu


def few_layers(hf_config: PretrainedConfig, num_layers: int, num_tower_layers: int = 2) -> PretrainedConfig:
    """Return a configuration with the first layers only, of decoder and towers."""
    short = copy.deepcopy(hf_config)
    text = short.get_text_config()
    shared = getattr(text, "num_kv_shared_layers", 0)
    if shared:
        text.num_kv_shared_layers = shared * num_layers // text.num_hidden_layers
    text.num_hidden_layers = num_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:num_layers]
    for tower in (getattr(short, "vision_config", None), getattr(short, "audio_config", None)):
        for name in ("num_hidden_layers", "depth"):
            if hasattr(tower, name):
                setattr(tower, name, num_tower_layers)
    if hasattr(getattr(short, "vision_config", None), "deepstack_visual_indexes"):
        short.vision_config.deepstack_visual_indexes = [0, 1]
    return short


_MAX_PIXELS, _CLIP_TOKENS = 2**19, 64


@dataclass(frozen=True)
class FakeRank:
    """A rank of a run that trains on the fake GPU."""

    gpu: FakeGpu
    config: Config
    model_config: Any
    layout: Layout
    groups: ProcessGroupCollection
    model: Sequence[DistributedDataParallel]
    optimizer: MegatronOptimizer
    batch: MicroBatch

    @property
    def layers(self) -> dict[torch.nn.Module, int]:
        """The decoder layers, with their global ids."""
        chunks = (wrapped.module for wrapped in self.model)
        return {layer: int(name) for chunk in chunks for name, layer in chunk.language_model.layers.items()}

    def step(self, num_micro_batches: int = 1) -> None:
        """Do what training does with the micro-batches of a step."""
        for chunk in self.model:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        batches = [self.batch.to(CUDA, non_blocking=True) for _ in range(num_micro_batches)]
        run_global_batch(self.model, batches, self.groups)
        collect_expert_use(self.model, self.groups)
        apply_gradients(self.optimizer, gradient_norm(self.optimizer), self.config.optimizer.clip_grad)

    def check_waits(self, num_micro_batches: int = 1) -> None:
        """Raise `DeviceFault` if the host waited more often than it may in a step."""
        with_experts = sum(isinstance(module, MoE) for chunk in self.model for module in chunk.modules())
        factors = {"step": 1, "micro-batch": num_micro_batches * len(self.model)}
        factors["layer"] = with_experts * num_micro_batches  # recomputation knows the sizes
        for known in KNOWN_WAITS:
            if (times := self.gpu.waits[known.name]) > (most := known.times * factors[known.per]):
                raise DeviceFault(f"the host waits {times} times for {known.name}, which is allowed {most} times")


@contextmanager
def fake_rank(
    hf_config: PretrainedConfig,
    *overrides: str,
    world_size: int,
    rank: int = 0,
    length: int = 4096,
    images_per_row: float = 1.0,
    text_only: bool = False,
) -> Iterator[FakeRank]:
    """Yield a rank whose model is wrapped for data parallelism, and a micro-batch on its device.

    Args:
        hf_config: configuration of the model.
        overrides: keys of the run's configuration.
        world_size: number of ranks of the run.
        rank: this rank.
        length: tokens of the micro-batch's one row.
        images_per_row: images in it.
        text_only: leave the towers out.
    """
    family = registry.detect(hf_config)
    model_config = family.config_from_hf(hf_config, text_only=text_only)
    required = ["run_dir=run", "model.hf_path=model", "data.train=[{path: a}]", f"data.seq_length={length}"]
    required += ["train.train_iters=1", f"train.global_batch_size={world_size}", "train.precision=bf16"]
    config = load_config([f"--{override}" for override in [*required, *overrides]])
    layout = check_layout(config, model_config, world_size)
    rules = family.prompt_rules(model_config)
    batch = example_batch(model_config, rules, 1, length, images_per_row, _MAX_PIXELS, 1.0, _CLIP_TOKENS)
    sharding = context_sharding(layout, model_config, rank=0)
    if sharding is not None:
        batch = shard_for_context(batch, sharding)
    with simulated_rank(rank, layout) as groups, fake_gpu() as gpu:
        gpu.sets_up = True
        chunks = build_chunks(family, model_config, build_settings(config, layout), groups)
        Trainable(config.model.freeze).freeze(chunks)
        is_sharded = config.parallel.use_distributed_optimizer
        model = wrap_data_parallel(chunks, groups, is_sharded)
        with mock.patch.object(torch.distributed, "all_gather_object", _all_alike):
            optimizer = build_optimizer(model, config.optimizer, DTYPES[config.train.precision], is_sharded, groups)
        gpu.sets_up = False
        yield FakeRank(gpu, config, model_config, layout, groups, model, optimizer, batch)


def _all_alike(objects: list[Any], own: Any, group: Any = None) -> None:
    objects[:] = [own] * len(objects)
