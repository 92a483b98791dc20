"""torch.compile for a GPU on a machine that has none: everything up to the machine code of its kernels; nothing runs.

Dynamo traces calls with tensors on the host, with its own guards, so that variants are counted as they would be on a
GPU. What AOTAutograd makes of a trace is moved to "cuda" and given to Inductor, which lowers it, chooses kernels and
writes their source. The call itself then runs uncompiled on the host.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.compile_fx
import torch._inductor.graph
import torch._inductor.scheduler
from torch._inductor.runtime import triton_heuristics
from torch._inductor.runtime.hints import DeviceProperties
from torch.nn.attention import flex_attention as flex_module
from torch.utils import _pytree
from triton import compile as triton_compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from tests.kernels.span_compile import SHARED_BYTES
from vlm_kernels.span_attention import flex

GPU = torch.device("cuda", 0)
_TEMPLATE = re.compile(r"async_compile\.triton\('(triton_tem_\w+)', '''\n(.*?)''', device_str='cuda'\)", re.S)


class _WrittenError(Exception):
    """Ends a compilation once the source is written."""


@dataclass(frozen=True)
class Launch:
    """A kernel made from a template, such as attention, and how the compiler would launch it."""

    name: str
    source: str

    def machine_code(self, major: int) -> Any:
        """What Triton compiles for a major compute capability, with `metadata.shared`, bytes of a program."""
        found = {}

        def template(num_stages: int, num_warps: int, triton_meta: dict[str, Any], **others: Any) -> Callable[..., Any]:
            return lambda function: found.update(
                function=function, meta=triton_meta, options={"num_stages": num_stages, "num_warps": num_warps}
            )

        with mock.patch.object(triton_heuristics, "template", template):
            exec(compile(self.source, self._file(), "exec"), {"__name__": self.name})
        meta = found["meta"]
        source = ASTSource(found["function"], meta["signature"], meta["constants"], *meta["configs"])
        return triton_compile(source, GPUTarget("cuda", major * 10, 32), found["options"])

    def _file(self) -> str:
        """Name under which Triton, which reads the source of functions, finds it."""
        name = f"<{self.name} {hash(self.source)}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(keepends=True), name)
        return name


@dataclass
class Compilations:
    """What was compiled, one entry for each variant of a function.

    Attributes:
        variants: sources of a variant, of its forward pass and, where it trains, of its backward pass.
    """

    variants: list[list[str]] = field(default_factory=list)

    def launches(self) -> list[Launch]:
        """Kernels from templates, of all variants."""
        sources = [source for variant in self.variants for source in variant]
        return [Launch(*match) for source in sources for match in _TEMPLATE.findall(source)]


@contextmanager
def compiling_flex_attention(major: int = 9) -> Iterator[Compilations]:
    """FlexAttention as `flex.compiled` makes it for GPUs of a major compute capability; gives what is compiled.

    Raises what the compiler raises, where the function is called.
    """
    compilations = Compilations()
    torch._dynamo.reset()
    flex.compiled.cache_clear()
    compile_for_cpu = torch.compile

    def compile_for_gpu(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return compile_for_cpu(function, backend=lambda *traced: _compile(*traced, compilations), **options)

    with _as_on_a_gpu(major), mock.patch.object(torch, "compile", compile_for_gpu):
        yield compilations
    torch._dynamo.reset()
    flex.compiled.cache_clear()


def _compile(traced: torch.fx.GraphModule, inputs: Sequence[Any], compilations: Compilations) -> Callable[..., Any]:
    sources: list[str] = []

    def write(graph: Any) -> None:
        code = graph.codegen()[0]
        sources.append(getattr(code, "value", code))
        raise _WrittenError

    def lower(module: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        with mock.patch.object(torch._inductor.graph.GraphLowering, "compile_to_module", write):
            try:
                torch._inductor.compile_fx.compile_fx_inner(*_on_gpu(module, inputs), **options)
            except Exception as error:
                if not any(isinstance(raised, _WrittenError) for raised in _chain(error)):
                    raise
        return lambda arguments: [None]

    torch._inductor.compile_fx.compile_fx(traced, inputs, inner_compile=lower)
    compilations.variants.append(sources)
    return traced.forward


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it was raised from or while handling."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__ or getattr(error, "inner_exception", None)


def _on_gpu(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> tuple[torch.fx.GraphModule, list[Any]]:
    """A graph of the host's, with all its subgraphs and inputs, moved to the GPU."""
    mode = torch._guards.detect_fake_mode(inputs)

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            with mode:
                return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)
        return GPU if isinstance(value, torch.device) else value

    for graph_module in module.modules():
        if isinstance(graph_module, torch.fx.GraphModule):
            for node in graph_module.graph.nodes:
                node.kwargs = _pytree.tree_map_only(torch.device, move, dict(node.kwargs))
                node.meta["val"] = _pytree.tree_map(move, node.meta.get("val"))
            graph_module.recompile()
    return module, [move(value) for value in inputs]


@contextmanager
def _as_on_a_gpu(major: int) -> Iterator[None]:
    """What torch and Triton ask a GPU for while they compile; sizes are an H200's."""
    properties = SimpleNamespace(
        name=f"a GPU of compute capability {major}.0",
        major=major,
        minor=0,
        multi_processor_count=132,
        total_memory=140 << 30,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        shared_memory_per_block_optin=SHARED_BYTES[major],
        L2_cache_size=50 << 20,
        gcnArchName="",
    )
    known = {name: value for name, value in vars(properties).items() if name in DeviceProperties._fields}
    device = DeviceProperties(**{**known, "type": "cuda", "index": 0, "cc": 10 * major})
    stand_in = mock.Mock(spec_set=["get_current_device", "get_current_stream", "get_current_target"])
    stand_in.get_current_target.return_value = GPUTarget("cuda", 10 * major, 32)
    stand_in.get_current_device.return_value = 0
    with ExitStack() as stack:
        for owner, name, value in (
            (driver, "_active", stand_in),  # not `reset_active`, which asks for a GPU
            (DeviceProperties, "create", lambda device_asked: device),
            (torch.cuda, "get_device_properties", lambda device=None: properties),
            (torch.cuda, "get_device_capability", lambda device=None: (major, 0)),
            (torch.cuda, "current_device", lambda: 0),
            (torch._inductor.scheduler, "has_triton", lambda **options: True),
            (torch._inductor.compile_fx, "_check_triton_bf16_support", lambda graph: None),
            # FlexAttention refuses gradients on the host before it is traced.
            (flex_module, "_validate_device", lambda *tensors: None),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield
