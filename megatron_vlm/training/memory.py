"""Memory that a run will need on each pipeline rank, from shapes alone.

Parameters, gradients and optimizer state are counted exactly. Activations are an estimate: bytes that autograd keeps
per layer and token, times the micro-batches that the pipeline schedule keeps alive. Not counted: the runtime itself
(about 1 GiB per GPU), communication buffers, and what the allocator loses to fragmentation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_vlm.config import Config
from megatron_vlm.families.registry import Family
from megatron_vlm.layers.embedding import padded_vocab_size
from megatron_vlm.parallel.build import build_chunks
from megatron_vlm.parallel.simulate import simulated_rank
from megatron_vlm.training.preflight import Layout
from megatron_vlm.training.setup import build_settings

FP32_BYTES = 4
ADAM_MOMENT_BYTES = 2 * FP32_BYTES


@dataclass(frozen=True)
class RankMemory:
    """One tensor-parallel rank of one pipeline rank; all fields but the first two are in bytes."""

    pipeline_rank: int
    num_parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    logits_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum of all kinds."""
        return (
            self.parameter_bytes
            + self.gradient_bytes
            + self.optimizer_bytes
            + self.activation_bytes
            + self.logits_bytes
        )


def estimate_memory(
    config: Config,
    family: Family,
    model_config: Any,
    layout: Layout,
    images_per_row: float = 1.0,
) -> list[RankMemory]:
    """Memory of every pipeline rank.

    Args:
        config: a validated configuration.
        family: of the model.
        model_config: the family's record of the model.
        layout: from `check_layout`.
        images_per_row: images in an average row.

    Returns:
        One entry per pipeline rank.
    """
    value_bytes = _value_bytes(config)
    counts = count_parameters(config, family, model_config, layout)
    memory = []
    for rank, by_part in enumerate(counts):
        trainable = sum(count for part, count in by_part.items() if part not in config.model.freeze)
        total = sum(by_part.values())
        memory.append(
            RankMemory(
                pipeline_rank=rank,
                num_parameters=total,
                parameter_bytes=total * value_bytes,
                gradient_bytes=trainable * FP32_BYTES,
                optimizer_bytes=_optimizer_bytes(config, layout, trainable),
                activation_bytes=_activation_bytes(config, model_config, layout, rank, images_per_row),
                logits_bytes=_logits_bytes(config, model_config, layout, rank),
            )
        )
    return memory


def count_parameters(config: Config, family: Family, model_config: Any, layout: Layout) -> list[dict[str, int]]:
    """Parameters per part that one tensor-parallel rank holds, for every pipeline rank.

    The model's own code builds each stage on torch's meta device, so nothing is allocated and nothing told twice.
    torch.distributed must not be initialised.
    """
    counts: list[dict[str, int]] = []
    ranks_per_stage = layout.world_size // layout.pipeline_size
    for stage in range(layout.pipeline_size):
        counts.append({})
        rank = (stage * ranks_per_stage, layout.world_size)
        with simulated_rank(*rank, layout.tensor_size, layout.pipeline_size) as groups:
            chunks = build_chunks(family, model_config, build_settings(config, layout), groups, torch.device("meta"))
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                part = name.partition(".")[0]
                counts[-1][part] = counts[-1].get(part, 0) + parameter.numel()
    return counts


def _value_bytes(config: Config) -> int:
    return FP32_BYTES if config.train.precision == "fp32" else 2


def _optimizer_bytes(config: Config, layout: Layout, trainable: int) -> int:
    """Main weights (unless the parameters are fp32 themselves) and moments."""
    main_bytes = 0 if config.train.precision == "fp32" else FP32_BYTES
    moment_bytes = ADAM_MOMENT_BYTES if config.optimizer.name == "adamw" else 0
    shards = layout.data_size if config.parallel.use_distributed_optimizer else 1
    return math.ceil(trainable / shards) * (main_bytes + moment_bytes)


def _logits_bytes(config: Config, model_config: Any, layout: Layout, pipeline_rank: int) -> int:
    """Logits, their fp32 softmax and its gradient, for one micro-batch, on the last pipeline rank."""
    if pipeline_rank != layout.pipeline_size - 1:
        return 0
    vocabulary_rows = padded_vocab_size(model_config.text.vocab_size)
    tokens = config.train.micro_batch_size * config.data.seq_length
    return tokens * vocabulary_rows // layout.tensor_size * (_value_bytes(config) + 2 * FP32_BYTES)


def _activation_bytes(
    config: Config, model_config: Any, layout: Layout, pipeline_rank: int, images_per_row: float
) -> int:
    """What one pipeline rank keeps between forward and backward passes, over all micro-batches alive."""
    recompute = config.model.recompute
    tokens = config.train.micro_batch_size * config.data.seq_length
    kept_per_chunk, largest_recomputed = [], 0.0
    for chunk in layout.chunks_of(pipeline_rank):
        layers = [model_config.text.layers[index] for index in layout.chunks[chunk]]
        kept = [_text_layer_bytes(config, model_config, layer, recompute) * tokens for layer in layers]
        whole = [_text_layer_bytes(config, model_config, layer, "none") * tokens for layer in layers]
        if chunk == 0 and model_config.vision is not None:
            images = config.train.micro_batch_size * images_per_row
            kept += _vision_bytes(config, model_config.vision, images, recompute)
            whole += _vision_bytes(config, model_config.vision, images, "none")
        kept_per_chunk.append(sum(kept))
        largest_recomputed = max([largest_recomputed, *whole])
    alive = _chunk_passes_alive(layout, pipeline_rank)
    average = sum(kept_per_chunk) / len(kept_per_chunk)
    return math.ceil(alive * average + (0 if recompute == "none" else largest_recomputed))


def _chunk_passes_alive(layout: Layout, pipeline_rank: int) -> int:
    """Forward passes of one chunk whose backward pass has not run, at most (1F1B; megatron-core's warm-up rule)."""
    virtual_size = len(layout.chunks) // layout.pipeline_size
    passes = layout.num_micro_batches * virtual_size
    ahead = layout.pipeline_size - pipeline_rank - 1
    warm_up = ahead if virtual_size == 1 else 2 * ahead + (virtual_size - 1) * layout.pipeline_size
    return min(passes, warm_up + 1)


def _text_layer_bytes(config: Config, model_config: Any, layer: Any, recompute: str) -> float:
    """Bytes per token that one decoder layer keeps."""
    value, size = _value_bytes(config), config.parallel.tensor_model_parallel_size
    sequence_share = size if config.parallel.sequence_parallel else 1
    hidden = model_config.text.hidden_size / sequence_share
    if recompute == "full":
        return hidden * value
    queries = layer.num_attention_heads * layer.head_dim / size
    keys = max(1, layer.num_key_value_heads / size) * layer.head_dim  # one head where there are more ranks than heads
    # Residual stream and the input and output of both halves; the four norms keep their fp32 input and result.
    kept = hidden * (6 * value + 4 * 2 * FP32_BYTES)
    kept += 4 * layer.intermediate_size / size * value  # gate, up, activation, product
    kept += queries * value  # the attention's result
    if recompute == "none":
        kept += (queries + 2 * keys) * value  # projections
        kept += (queries + keys) * (2 * FP32_BYTES + value)  # q/k norms in fp32, and after the rotation
    return kept


def _vision_bytes(config: Config, vision: Any, images: float, recompute: str) -> list[float]:
    """Bytes that each layer of the vision tower keeps for a micro-batch; nothing when the tower does not train."""
    if "vision_tower" in config.model.freeze:
        return []
    value, size = _value_bytes(config), config.parallel.tensor_model_parallel_size
    width_share, image_share = (size, 1) if config.model.vision_parallelism == "tensor" else (1, size)
    patches = math.ceil(images / image_share) * (vision.image_size // vision.patch_size) ** 2
    hidden = vision.hidden_size
    kept = hidden * value
    if recompute != "full":
        kept += hidden * (3 * value + 2 * 2 * FP32_BYTES) + 2 * vision.intermediate_size / width_share * value
        kept += (1 if recompute == "selective" else 4) * hidden / width_share * value
    return [patches * kept] * vision.num_hidden_layers


def format_memory(memory: list[RankMemory]) -> Iterator[str]:
    """A table in GiB, one line per pipeline rank."""
    yield "pipeline rank  parameters  weights  gradients  optimizer  activations  logits   total  (GiB per rank)"
    for entry in memory:
        columns = (
            (entry.parameter_bytes, 9),
            (entry.gradient_bytes, 11),
            (entry.optimizer_bytes, 11),
            (entry.activation_bytes, 13),
            (entry.logits_bytes, 8),
            (entry.total_bytes, 8),
        )
        figures = "".join(f"{count / 2**30:{width}.2f}" for count, width in columns)
        yield f"{entry.pipeline_rank:13d}{_abbreviated(entry.num_parameters):>12s}{figures}"


def _abbreviated(count: int) -> str:
    """A number of parameters with three digits or so."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return str(count)
