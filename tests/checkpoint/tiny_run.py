"""A run without a forward pass for checkpoint tests: named parameters in any layout, gradients from a formula.

What is saved, resharded and resumed are parameters, optimizer and schedule; how gradients arise does not matter. Each
gradient is a pure function of (parameter name, step), the same in every layout, so that `torch.optim` on whole tensors
in one process is a reference for every layout. Each rank's backward pass is taken to have left a share of it, as one
over other tokens would; the rest is the training loop's own.
"""

from __future__ import annotations

import functools
import gc
import math
import multiprocessing
import re
import zlib
from dataclasses import dataclass, field

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.checkpoint.manager import CheckpointManager
from megatron_vlm.checkpoint.run_folder import ModelIdentity
from megatron_vlm.config import OptimizerSettings
from megatron_vlm.families.build import buffer_layout
from megatron_vlm.parallel.gradients import finalize_gradients
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.parallel.parameters import Kind, Stages, declare, mark_copies, mark_matrices, normal, spec_of
from megatron_vlm.parallel.sharding import replica_group, splits
from megatron_vlm.training.optimizer import apply_gradients, build_optimizer, gradient_norm
from tests.checkpoint.whole_state import Pieces, pieces
from tests.parity.layouts import TestLayout

NUM_LAYERS = 4
FIRST_MOE_LAYER = 2  # so that some stages have experts and some have none
HIDDEN = 16
NUM_EXPERTS, EXPERT_HIDDEN = 4, 6
VOCABULARY = 64
LABEL_TOKENS = 8  # of the global batch; gradients are divided by it, without rounding
FROZEN = "vision_tower.embeddings.patch_embedding.weight"
# On the first stage, the layers' bucket ends between multiples of 128 elements because of it: padding follows.
PROJECTOR = "projector.mm_soft_emb_norm.weight"
EMBEDDING = "language_model.embed_tokens.weight"
FUSED_BIAS = "projector.qkv.bias"
CLIP_BOUND = "vision_tower.clip_bound"
TEMPERATURE = "projector.temperature"
ODD_ROWS = "projector.odd_rows.weight"  # which the shares of several data ranks begin and end within
PER_LAYER_NORM = "language_model.per_layer_norm.weight"  # on every chunk
IDENTITY = ModelIdentity("gemma3", "gemma3", text_only=False, tied=True, hf_config={"hidden_size": HIDDEN})
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY = 1e-2, (0.9, 0.95), 1e-8, 0.1


@dataclass
class Settings:
    layout: TestLayout = field(default_factory=TestLayout)
    optimizer: str = "adamw"
    distributed_optimizer: bool = True
    bf16: bool = False
    overlap_param_gather: bool = False
    freeze: str = FROZEN  # regular expression
    learning_rate: float = LEARNING_RATE
    clip_grad: float = 0.0
    num_layers: int = NUM_LAYERS


@dataclass(frozen=True)
class Shape:
    """Of a whole parameter, and how it is divided."""

    sizes: tuple[int, ...]
    tensor_dim: int | None = None
    kind: Kind = "matrix"
    expert: bool = False
    partial: bool = False
    stages: Stages = "one"

    @property
    def trains(self) -> bool:
        return self.kind != "buffer"

    def declare(self, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        return declare(
            parameter,
            self.kind,
            normal,
            tensor_dim=self.tensor_dim,
            is_expert=self.expert,
            partial=self.partial,
            stages=self.stages,
        )


def parameter_shapes(num_layers: int = NUM_LAYERS) -> dict[str, Shape]:
    """Of all parameters, by name."""
    shapes = {
        EMBEDDING: Shape((VOCABULARY, HIDDEN), 0, "table", stages="embedding_and_head"),
        FROZEN: Shape((8, 3, 2, 2), kind="filter"),
        CLIP_BOUND: Shape((), kind="buffer"),
        PROJECTOR: Shape((HIDDEN,), kind="vector"),
        FUSED_BIAS: Shape((3, 8), 1, "vector"),
        TEMPERATURE: Shape((), kind="vector"),
        ODD_ROWS: Shape((95, 23)),
        PER_LAYER_NORM: Shape((HIDDEN + 1,), kind="vector", partial=True, stages="all"),
    }
    for layer in range(num_layers):
        prefix = f"language_model.layers.{layer}"
        shapes[f"{prefix}.self_attn.q_proj.weight"] = Shape((HIDDEN, HIDDEN), 0)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = Shape((HIDDEN, HIDDEN), 1)
        shapes[f"{prefix}.self_attn.q_norm.weight"] = Shape((HIDDEN,), kind="vector", partial=True)
        shapes[f"{prefix}.mlp.up_proj.bias"] = Shape((2 * HIDDEN,), 0, "vector")
        shapes[f"{prefix}.layer_scalar"] = Shape((1,), kind="buffer")
        if layer >= FIRST_MOE_LAYER:
            up = (NUM_EXPERTS, 2, EXPERT_HIDDEN, HIDDEN)
            shapes[f"{prefix}.mlp.experts.gate_up_proj"] = Shape(up, 2, expert=True)
            shapes[f"{prefix}.mlp.experts.down_proj"] = Shape((NUM_EXPERTS, HIDDEN, EXPERT_HIDDEN), 2, expert=True)
    shapes["language_model.norm.weight"] = Shape((HIDDEN,), kind="vector")
    return shapes


def initial_value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def gradient(name: str, shape: tuple[int, ...], step: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{name}@{step}".encode())))


def gradient_norm_at(step: int) -> float:
    """Over all trained parameters, each counted once."""
    trained = {name: shape for name, shape in parameter_shapes().items() if shape.trains and name != FROZEN}
    squares = [gradient(name, shape.sizes, step).double().square().sum() for name, shape in trained.items()]
    return float(torch.stack(squares).sum().sqrt())


def share(rank: int, size: int) -> float:
    """What rank's part of a sum over a group is: 1/2, 1/4, 1/8, 1/8."""
    return 0.5 ** min(rank + 1, size - 1)


class Stage(MegatronModule):
    """The parameters of one pipeline chunk."""

    share_embeddings_and_output_weights = False  # as in `ModelChunk`

    def __init__(self, config: TransformerConfig, index: int, names: list[str], settings: Settings, groups) -> None:
        super().__init__(config)
        self.index, self.pre_process = index, index == 0
        for name in names:
            shape = parameter_shapes(settings.num_layers)[name]
            value = own_part(initial_value(name, shape.sizes), shape, groups).contiguous()
            parameter = shape.declare(torch.nn.Parameter(value.to(torch.bfloat16 if settings.bf16 else torch.float32)))
            if re.match(settings.freeze, name):
                parameter.requires_grad_(False)
            self._place(name, parameter)
        if settings.layout.pipeline > 1:
            mark_copies(self, self.pre_process, self.pre_process)

    def _place(self, name: str, parameter: torch.nn.Parameter) -> None:
        *path, last = name.split(".")
        module: torch.nn.Module = self
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, parameter)


def own_part(whole: torch.Tensor, shape: Shape, groups) -> torch.Tensor:
    """This rank's part, before there is a parameter."""
    for split in splits(shape.declare(torch.nn.Parameter(torch.empty(shape.sizes, device="meta"))), groups):
        whole = whole.chunk(split.group.size(), split.dim)[split.group.rank()]
    return whole


@functools.cache
def prepare_process() -> None:
    """Let this test process save: quickly, and with a writer process."""
    # megatron-core collects garbage at every save and load: 0.5 s over what is imported here, in a forked process.
    gc.freeze()
    # Pool workers are daemons so that they end with the tests; daemons may not start the process that writes.
    multiprocessing.current_process()._config["daemon"] = False


class Run:
    """Model, optimizer and schedule of one rank, with the checkpoint manager of a folder."""

    def __init__(self, settings: Settings, folder: str, **manager_arguments) -> None:
        prepare_process()
        self.settings = settings
        layout = settings.layout
        self.ranks = layout.ranks(settings.num_layers)
        self.groups = build_groups(self.ranks)
        initialize_megatron(1234, self.groups)
        config = TransformerConfig(
            num_layers=NUM_LAYERS, hidden_size=HIDDEN, num_attention_heads=4, calculate_per_token_loss=True
        )
        chunks = [Stage(config, index, names, settings, self.groups) for index, names in self._chunk_names()]
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=settings.distributed_optimizer,
            overlap_grad_reduce=settings.overlap_param_gather,
            overlap_param_gather=settings.overlap_param_gather,
            bucket_size=500 if settings.overlap_param_gather else None,  # elements: several buckets, padded ones too
        )
        if settings.optimizer == "muon" and settings.distributed_optimizer:
            for chunk in chunks:
                mark_matrices(chunk)
        self.chunks = [
            DistributedDataParallel(
                config,
                ddp_config,
                chunk,
                pg_collection=self.groups,
                full_param_layout=buffer_layout(chunk, 0, ddp_config, self.groups)
                if settings.distributed_optimizer
                else None,
            )
            for chunk in chunks
        ]
        self.optimizer = build_optimizer(
            self.chunks,
            OptimizerSettings(
                settings.optimizer,
                settings.learning_rate,
                weight_decay=WEIGHT_DECAY,
                betas=BETAS,
                muon_fp32_matmul_prec="highest",
            ),
            torch.bfloat16 if settings.bf16 else torch.float32,
            settings.distributed_optimizer,
            self.groups,
        )
        self.scheduler = OptimizerParamScheduler(
            self.optimizer, init_lr=0.0, max_lr=settings.learning_rate, min_lr=0.0, lr_warmup_steps=2,
            lr_decay_steps=100, lr_decay_style="cosine", start_wd=WEIGHT_DECAY, end_wd=WEIGHT_DECAY, wd_incr_steps=0,
            wd_incr_style="constant",
        )  # fmt: skip
        self.step = 0
        self.norms: list[float] = []
        self.manager = CheckpointManager(
            folder, self.groups, IDENTITY, self.ranks.sizes(), "bf16" if settings.bf16 else "fp32",
            **{"async_save": False, **manager_arguments},
        )  # fmt: skip

    def _chunk_names(self) -> list[tuple[int, list[str]]]:
        """The global number and the names of each of this rank's chunks."""
        shapes = parameter_shapes(self.settings.num_layers)
        chunks = []
        for chunk in self.ranks.chunks_of(self.groups.pp.rank()):
            layers = set(map(str, self.ranks.chunks[chunk]))
            names = [name for name in shapes if ".layers." in name and name.split(".")[2] in layers]
            first, last = chunk == 0, chunk == len(self.ranks.chunks) - 1
            names = (
                [EMBEDDING, FROZEN, CLIP_BOUND, PROJECTOR, FUSED_BIAS, TEMPERATURE, ODD_ROWS] * first
                + [PER_LAYER_NORM]
                + names
            )
            names += ["language_model.norm.weight"] * last + [EMBEDDING] * (last and not first)
            chunks.append((chunk, names))
        return chunks

    def train(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.compute_gradients()
            self.norms.append(gradient_norm(self.optimizer))
            apply_gradients(self.optimizer, self.norms[-1], self.settings.clip_grad)
            self.scheduler.step(increment=1)
            self.step += 1

    def compute_gradients(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        for chunk in self.chunks:
            for name, parameter in chunk.module.named_parameters():
                if parameter.requires_grad:
                    parameter.main_grad.copy_(self._own_gradient(chunk.module.index, name, parameter))
        num_tokens = torch.tensor(LABEL_TOKENS // self.ranks.data_size, dtype=torch.int)
        finalize_gradients(self.chunks, num_tokens, self.groups)

    def _own_gradient(self, chunk: int, name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
        """What this rank's tokens add in a chunk to the sum over all label tokens."""
        shape = parameter_shapes(self.settings.num_layers)[name]
        groups = [replica_group(parameter, self.groups)] + [self.groups.tp] * spec_of(parameter).partial
        if shape.stages == "embedding_and_head":
            groups.append(self.groups.embd)
        factor = math.prod([share(group.rank(), group.size()) for group in groups], start=float(LABEL_TOKENS))
        if shape.stages == "all":
            factor *= share(chunk, len(self.ranks.chunks))
        return own_part(gradient(name, shape.sizes, self.step), shape, self.groups) * factor

    def pieces(self) -> Pieces:
        return pieces(self.chunks, self.optimizer, self.groups)

    def save(self, **arguments) -> bool:
        data = {"seed": 1, "step": self.step}
        return self.manager.save(
            self.step, self.chunks, self.optimizer, self.scheduler, data, "run_dir: here\n", **arguments
        )

    def load(self):
        resumed = self.manager.load(self.chunks, self.optimizer, self.scheduler)
        if resumed is not None:
            self.step = resumed.step
        return resumed

    def local_state(self) -> dict[str, torch.Tensor | float]:
        """Everything this rank holds, as megatron-core holds it: parameters, optimizer tensors, group settings."""
        state: dict[str, torch.Tensor | float] = {}
        for number, chunk in enumerate(self.chunks):
            for name, parameter in chunk.module.named_parameters():
                state[f"parameter.{number}.{name}"] = parameter.detach().clone()
        states = [
            member.optimizer.state for member in self.optimizer.chained_optimizers if member.optimizer is not None
        ]
        tensors = {parameter: values for state_of_member in states for parameter, values in state_of_member.items()}
        for number, group in enumerate(self.optimizer.param_groups):
            state |= {f"group.{number}.{key}": value for key, value in group.items() if isinstance(value, (int, float))}
            for index, parameter in enumerate(group["params"]):
                state[f"main.{number}.{index}"] = parameter.detach().clone()
                for key, value in tensors.get(parameter, {}).items():
                    state[f"{key}.{number}.{index}"] = value.clone()
        state["num_steps"] = self.scheduler.num_steps
        return state
