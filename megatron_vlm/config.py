"""The configuration tree: every key, its default and its meaning; `cli.py` reads it and `validate` checks it.

Keys follow megatron-core's words where it has them. Nothing here imports torch, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

PART_NAMES = ("language_model", "vision_tower", "audio_tower", "projector")


@dataclass(frozen=True)
class ModelSettings:
    """The model and how it is held."""

    hf_path: str
    """Directory with config.json, tokenizer and processor files, and weights if `load_weights` is true."""
    load_weights: bool = True
    """Start from the weights in `hf_path`; false starts from random weights."""
    text_only: bool = False
    """Take only the language model out of a multimodal directory and train that."""
    vision_parallelism: Literal["tensor", "data"] = "tensor"
    """Vision tower over the tensor-parallel ranks: split by heads (tensor), or each rank encodes a part of the images
    with a full tower (data)."""
    image_mask: Literal["window", "transformers"] | None = None
    """What tokens of images see in gemma4_unified models (12B), of which transformers has two rules; null elsewhere.
    window, which null means too: as in the other sizes, they see each other on sliding layers only, within the window.
    transformers: as in its forward pass, they see each other on every layer, whatever the window."""
    freeze: list[str] = field(default_factory=list)
    """What does not train: parts (language_model, vision_tower, audio_tower, projector), and patterns of parameter
    names, in which * also stands for dots (language_model.layers.[0-9].* are the first ten layers). Names are those in
    checkpoints; an entry that matches none is refused with the nearest."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: none, attention only (selective), or whole layers (full)."""
    moe_load_balancing: Literal["none", "transformers", "megatron"] = "none"
    """Loss that keeps experts evenly used. transformers: E * sum_e f_e P_e, with f_e the times per token that expert e
    is chosen (their sum is top_k) and P_e its mean softmax probability, both over all layers together. megatron: that
    value of every layer, divided by top_k, summed over the layers. Both per micro-batch, weighted by its label tokens;
    none is how published models are fine-tuned."""
    moe_aux_loss_coeff: float = 0.001
    """Factor on the load-balancing loss before it is added to the loss; unused when moe_load_balancing is none."""
    loss_chunk_mib: int = 768
    """Most memory in MiB for logits: the loss is computed for as many label tokens at a time. Each piece reads and
    writes the head's gradient once, so that pieces below about 1000 tokens (500 MiB for 262144 rows in bf16) slow it
    down."""
    z_loss_coeff: float = 0.0
    """Factor on the squared log-sum-exp of each label token's logits, which is added to the training loss (and to what
    is logged of it) and keeps logits small; 0 for none. Evaluation leaves it out."""


@dataclass(frozen=True)
class ParallelSettings:
    """How the model and the batch are split over ranks; world size = tensor x pipeline x context x data."""

    tensor_model_parallel_size: int = 1
    """Ranks over which each layer's heads, feed-forward columns and vocabulary rows are split."""
    sequence_parallel: bool = False
    """Also split norms and residuals along the sequence over the tensor-parallel ranks; no effect when there is one."""
    pipeline_model_parallel_size: int = 1
    """Ranks in a row, each holding some of the decoder layers."""
    virtual_pipeline_model_parallel_size: int = 1
    """Chunks per pipeline rank (interleaved schedule)."""
    pipeline_layout: list[int] | None = None
    """Decoder layers of each global chunk (pipeline size x virtual size numbers, zeros allowed); null splits evenly."""
    vision_pipeline_layout: list[int] | None = None
    """Layers of the vision tower on each of the first global chunks; the last of them also has the projector and the
    embedding, and the decoder layers begin there. Null leaves the tower on the first chunk."""
    context_parallel_size: int = 1
    """Ranks over which the tokens of every row are divided; attention exchanges keys and values."""
    expert_model_parallel_size: int = 1
    """Ranks over which the experts are partitioned; times expert_tensor_parallel_size it must divide tensor x context
    x data."""
    expert_tensor_parallel_size: int = 1
    """Ranks over which each expert's columns are split, whatever the tensor size is."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens reach the ranks of their experts: each sent where it is needed, or all gathered everywhere."""
    use_distributed_optimizer: bool = True
    """Split optimizer state and main weights over the data-parallel ranks; Muon's by whole matrices (not with sgd)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass runs (needs the distributed optimizer)."""
    distributed_timeout_minutes: int = 10
    """Minutes after which a silent rank, or a collective that does not finish, ends the run."""


@dataclass(frozen=True)
class DataSource:
    """One data set of a blend."""

    path: str
    """JSONL file, file with one JSON array, or pattern such as data/*.jsonl, whose files are one source; image paths
    are relative to the file's folder."""
    weight: float = 1.0
    """Weight in the blend, relative to the other sources."""
    name: str | None = None
    """Name in logs; null takes the file's name without its ending, or the path where two files have the same."""


@dataclass(frozen=True)
class DataSettings:
    """What is read and how it becomes rows of tokens."""

    train: list[DataSource]
    """Training sources: a list of {path, weight, name}."""
    seq_length: int
    """Most tokens that one row may have."""
    valid: list[DataSource] = field(default_factory=list)
    """Held-out sources; empty means no evaluation."""
    packing: bool = False
    """Put several samples into each row, up to seq_length tokens; they do not see each other. Batch sizes then count
    packed rows."""
    too_long: Literal["drop", "truncate", "error"] = "drop"
    """Samples longer than seq_length: leave out, cut at a turn boundary (never inside an image), or exit."""
    train_thinking: bool = True
    """Train the thinking of answers (thinking parts, reasoning_content) too; false trains only what follows it."""
    drop_empty_answers: bool = False
    """Leave answers without text out of the loss; false trains their end-of-turn token."""
    min_pixels: int | None = None
    """Fewest pixels of an image; null keeps the processor's own value."""
    max_pixels: int | None = None
    """Most pixels of an image; null keeps the processor's own value."""
    num_workers: int = 2
    """Processes per rank of the first pipeline stage that read and decode; 0 reads in the training process."""
    shuffle: bool = True
    """Shuffle by train.seed; false reads rows in file order."""
    strict: bool = False
    """Exit on the first bad row instead of keeping its slot without weight and counting it."""
    max_bad_fraction: float = 0.01
    """Fraction of bad rows past which the run ends (strict: false)."""
    max_too_long_fraction: float = 0.5
    """Fraction of rows left out as longer than seq_length past which the run ends (too_long: drop or truncate)."""
    allow_urls: bool = False
    """Fetch images and audio given as http(s) URLs; false refuses them."""
    allow_private_urls: bool = False
    """Also from addresses inside the machine's own network, which whoever wrote the data could not reach otherwise."""


@dataclass(frozen=True)
class TrainSettings:
    """Length, batch, precision and rhythm of a run."""

    train_iters: int
    """Optimizer steps of the whole run."""
    global_batch_size: int
    """Rows per optimizer step, over all ranks; with data.packing packed rows."""
    micro_batch_size: int = 1
    """Rows per forward pass of one rank."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Type of parameters and activations; gradients and main weights are fp32 in both."""
    seed: int = 1234
    """Seed of the initial weights and of the data order."""
    eval_interval: int | None = None
    """Steps between evaluations on data.valid; null evaluates only after the last step."""
    eval_iters: int = 10
    """Global batches per evaluation."""
    log_interval: int = 1
    """Steps between log lines."""
    exit_interval: int | None = None
    """Save and stop after this many steps of this start; the schedule still spans train_iters."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient norm is not finite, or a spike: end the run and name the batch, or leave the update
    out."""
    spike_ratio: float | None = None
    """A gradient norm over this many times the mean of recent steps is a spike; null: none is."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms only."""

    def num_micro_batches(self, data_size: int) -> int:
        """Micro-batches per step of each of `data_size` data-parallel ranks."""
        return self.global_batch_size // (self.micro_batch_size * data_size)


@dataclass(frozen=True)
class OptimizerSettings:
    """The update rule and its schedule."""

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    """adamw, sgd without momentum, or muon: matrices by Muon, embeddings, heads, routers and vectors by AdamW."""
    lr: float = 1e-5
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate that a decaying schedule reaches one step after the last."""
    weight_decay: float = 0.01
    """Decoupled weight decay; norms and biases have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 disables clipping."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """Shape after the warm-up; wsd holds lr and decays over the last wsd_decay_iters steps."""
    warmup_iters: int = 0
    """Steps of linear warm-up from 0."""
    wsd_decay_iters: int | None = None
    """Steps of the decay of schedule wsd; null is a tenth of train_iters."""
    muon_momentum: float = 0.95
    """Decay rate of Muon's momentum."""
    muon_nesterov: bool = True
    """Orthogonalise momentum and gradient mixed (Nesterov) instead of the momentum alone."""
    muon_num_ns_steps: int = 5
    """Newton-Schulz iterations that orthogonalise a matrix."""
    muon_extra_scale_factor: float = 0.2
    """Muon's update is this times sqrt(max(out, in)); 0.2 gives it the size of AdamW's, so that lr suits both."""
    muon_fp32_matmul_prec: Literal["highest", "high", "medium"] = "medium"
    """Matmuls of the Newton-Schulz iterations: fp32 (highest), TF32 (high) or bf16 (medium)."""
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    """Factor on the learning rate per part, for example {vision_tower: 0.1}."""


@dataclass(frozen=True)
class CheckpointSettings:
    """What is saved, loaded and exported."""

    save_interval: int | None = None
    """Steps between checkpoints; null saves only the last."""
    load: str | None = None
    """Run folder or checkpoint whose weights (only the weights) a new run starts from."""
    keep_last: int | None = None
    """Newest checkpoints to keep; null keeps all."""
    async_save: bool = True
    """Write checkpoints in the background while training goes on."""
    export_hf: str | None = None
    """Directory that receives the model in HF format after the last step; must be empty or absent."""


@dataclass(frozen=True)
class LoggingSettings:
    """Where figures go besides the console and metrics.jsonl."""

    tensorboard: bool = False
    """Write TensorBoard events under run_dir/tensorboard."""
    wandb: str | None = None
    """Weights & Biases project to log to; null is off."""
    profile: list[int] | None = None
    """First and last step of a torch.profiler trace, written under run_dir/profile; null is off."""


@dataclass(frozen=True)
class Config:
    """One run."""

    run_dir: str
    """Folder that receives everything the run writes; starting again with the same folder resumes."""
    model: ModelSettings
    data: DataSettings
    train: TrainSettings
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where the run computes; auto takes CUDA where the machine has an NVIDIA device, and the CPU elsewhere."""
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)


def source_names(sources: Sequence[DataSource]) -> list[str]:
    """Return the names of data sources in logs."""
    stems = [PurePath(source.path).stem for source in sources]
    return [
        source.name or (stem if stems.count(stem) == 1 else source.path)
        for source, stem in zip(sources, stems, strict=True)
    ]


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain dictionaries, lists and scalars, in declaration order."""
    plain = dataclasses.asdict(config)
    plain["optimizer"]["betas"] = list(config.optimizer.betas)
    return plain


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML; `--config` reads it back to an equal `Config`."""
    import yaml

    text: str = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    return text


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield every key that differs between two results of `to_dict`, as "section.key OLD -> NEW"."""
    for key in dict.fromkeys((*before, *after)):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from changed_settings(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} {json.dumps(old)} -> {json.dumps(new)}"
