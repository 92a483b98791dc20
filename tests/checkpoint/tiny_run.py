"""A run without a forward pass for checkpoint tests: named parameters in any layout, gradients from a formula.

What is saved, resharded and resumed are parameters, optimizer and schedule; how gradients arise does not matter. Each
gradient is a pure function of (parameter name, step), the same in every layout, so that `torch.optim` on whole tensors
in one process is a reference for every layout.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import re
import zlib
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.checkpoint.distributed import CheckpointManager
from megatron_vlm.checkpoint.run_folder import ModelIdentity
from megatron_vlm.parallel.groups import build_groups, initialize_megatron

NUM_LAYERS = 4
HIDDEN = 16
VOCABULARY = 64
FROZEN = "vision_tower.embeddings.patch_embedding.weight"
# On the first stage, the layers' bucket ends between multiples of 128 elements because of it: padding follows.
PROJECTOR = "projector.mm_soft_emb_norm.weight"
EMBEDDING = "language_model.embed_tokens.weight"
IDENTITY = ModelIdentity("gemma3", "gemma3", text_only=False, tied=True, hf_config={"hidden_size": HIDDEN})
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY = 1e-2, (0.9, 0.95), 1e-8, 0.1


@dataclass(frozen=True)
class Layout:
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    data: int = 1

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def sizes(self) -> dict[str, int]:
        return {"tensor": self.tensor, "pipeline": self.pipeline, "virtual": self.virtual, "data": self.data}


@dataclass
class Settings:
    layout: Layout = field(default_factory=Layout)
    optimizer: str = "adam"
    distributed_optimizer: bool = True
    bf16: bool = False
    overlap_param_gather: bool = False
    freeze: str = FROZEN  # regular expression
    learning_rate: float = LEARNING_RATE
    num_layers: int = NUM_LAYERS


def parameter_shapes(num_layers: int = NUM_LAYERS) -> dict[str, tuple[tuple[int, ...], int | None]]:
    """Name -> (global shape, dimension split over tensor ranks)."""
    shapes: dict[str, tuple[tuple[int, ...], int | None]] = {
        EMBEDDING: ((VOCABULARY, HIDDEN), 0),
        FROZEN: ((8, 3, 2, 2), None),
        PROJECTOR: ((HIDDEN,), None),
    }
    for layer in range(num_layers):
        prefix = f"language_model.layers.{layer}"
        shapes[f"{prefix}.self_attn.q_proj.weight"] = ((HIDDEN, HIDDEN), 0)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = ((HIDDEN, HIDDEN), 1)
        shapes[f"{prefix}.self_attn.q_norm.weight"] = ((HIDDEN,), None)
        shapes[f"{prefix}.mlp.up_proj.bias"] = ((2 * HIDDEN,), 0)
    shapes["language_model.norm.weight"] = ((HIDDEN,), None)
    return shapes


def initial_value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def gradient(name: str, shape: tuple[int, ...], step: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{name}@{step}".encode())))


class Stage(MegatronModule):
    """The parameters of one pipeline chunk."""

    def __init__(self, config: TransformerConfig, names: list[str], settings: Settings, groups, copy: bool) -> None:
        super().__init__(config)
        self.names = names
        for name in names:
            shape, dim = parameter_shapes(settings.num_layers)[name]
            value = initial_value(name, shape)
            if dim is not None:
                value = value.chunk(groups.tp.size(), dim)[groups.tp.rank()].contiguous()
            parameter = torch.nn.Parameter(value.to(torch.bfloat16 if settings.bf16 else torch.float32))
            set_tensor_model_parallel_attributes(parameter, dim is not None, 0 if dim is None else dim, 1)
            parameter.requires_grad_(not re.match(settings.freeze, name))
            if name == EMBEDDING and settings.layout.pipeline > 1:  # as megatron-core's pipelines mark it
                parameter.shared, parameter.shared_embedding = copy, True
            self._place(name, parameter)

    def _place(self, name: str, parameter: torch.nn.Parameter) -> None:
        *path, last = name.split(".")
        module: torch.nn.Module = self
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, parameter)


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
        assert dist.get_world_size() == layout.world_size
        self.groups = build_groups(layout.tensor, layout.pipeline)
        initialize_megatron(1234, self.groups)
        config = TransformerConfig(num_layers=NUM_LAYERS, hidden_size=HIDDEN, num_attention_heads=4)
        chunks = [Stage(config, names, settings, self.groups, copy) for names, copy in self._chunk_names()]
        ddp_config = DistributedDataParallelConfig(
            use_distributed_optimizer=settings.distributed_optimizer,
            overlap_grad_reduce=settings.overlap_param_gather,
            overlap_param_gather=settings.overlap_param_gather,
            bucket_size=600 if settings.overlap_param_gather else None,  # elements: several buckets
        )
        self.chunks = [
            DistributedDataParallel(config, ddp_config, chunk, pg_collection=self.groups) for chunk in chunks
        ]
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer=settings.optimizer,
                lr=settings.learning_rate,
                min_lr=0.0,
                weight_decay=WEIGHT_DECAY,
                adam_beta1=BETAS[0],
                adam_beta2=BETAS[1],
                adam_eps=EPS,
                sgd_momentum=0.0,
                clip_grad=0.0,
                bf16=settings.bf16,
                use_distributed_optimizer=settings.distributed_optimizer,
                overlap_param_gather=settings.overlap_param_gather,
            ),
            self.chunks,
            use_gloo_process_groups=False,
            pg_collection=self.groups,
        )
        self.scheduler = OptimizerParamScheduler(
            self.optimizer, init_lr=0.0, max_lr=settings.learning_rate, min_lr=0.0, lr_warmup_steps=2,
            lr_decay_steps=100, lr_decay_style="cosine", start_wd=WEIGHT_DECAY, end_wd=WEIGHT_DECAY, wd_incr_steps=0,
            wd_incr_style="constant",
        )  # fmt: skip
        self.step = 0
        self.manager = CheckpointManager(
            folder, self.groups, IDENTITY, layout.sizes(), "bf16" if settings.bf16 else "fp32",
            **{"async_save": False, **manager_arguments},
        )  # fmt: skip

    def _chunk_names(self) -> list[tuple[list[str], bool]]:
        """Names of each of this rank's chunks, and whether its embedding is the last stage's copy."""
        layout, rank = self.settings.layout, self.groups.pp.rank()
        num_chunks = layout.pipeline * layout.virtual
        per_chunk = self.settings.num_layers // num_chunks
        shapes = parameter_shapes(self.settings.num_layers)
        chunks = []
        for chunk in range(rank, num_chunks, layout.pipeline):
            layers = {str(layer) for layer in range(chunk * per_chunk, (chunk + 1) * per_chunk)}
            names = [name for name in shapes if ".layers." in name and name.split(".")[2] in layers]
            first, last = chunk == 0, chunk == num_chunks - 1
            names = [EMBEDDING, FROZEN, PROJECTOR] * first + names + ["language_model.norm.weight"] * last
            names = names + [EMBEDDING] * (last and not first)
            chunks.append((names, last and not first))
        return chunks

    def train(self, num_steps: int) -> None:
        for _ in range(num_steps):
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            for chunk in self.chunks:
                for name, parameter in chunk.module.named_parameters():
                    if parameter.requires_grad:
                        self._set_gradient(name, parameter)
                chunk.finish_grad_sync()
            self.optimizer.step()
            self.scheduler.step(increment=1)
            self.step += 1

    def _set_gradient(self, name: str, parameter: torch.nn.Parameter) -> None:
        shape, dim = parameter_shapes(self.settings.num_layers)[name]
        value = gradient(name, shape, self.step)
        if dim is not None:
            value = value.chunk(self.groups.tp.size(), dim)[self.groups.tp.rank()]
        parameter.main_grad.copy_(value)

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
        inner = self.optimizer.chained_optimizers[0].optimizer
        for number, group in enumerate(inner.param_groups):
            state |= {f"group.{number}.{key}": value for key, value in group.items() if isinstance(value, (int, float))}
            for index, parameter in enumerate(group["params"]):
                state[f"main.{number}.{index}"] = parameter.detach().clone()
                for key, value in inner.state.get(parameter, {}).items():
                    state[f"{key}.{number}.{index}"] = value.clone()
        state["num_steps"] = self.scheduler.num_steps
        return state
