"""What `benchmarks/kernels.py` times: each operator at the sizes of real models, beside others' ways to compute it.

A case builds its inputs and the sides that compute one result from them: ours, torch's operations one by one, and where
they exist Liger's kernels, FlexAttention, or the matrix products alone. Sizes are those of Qwen3-VL 8B and 30B-A3B and
of Gemma 3 27B with 8,192 tokens; tiny sizes, of which no number is a multiple of a kernel's vector, are for tests.

Shapes: T tokens, H hidden, F columns of gate and up, N query heads, G key heads, D head dim, R rotated elements or rows
of experts, E experts, V vocabulary, S sequence, B batch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch.nn import functional

from kernels.gated import Activation, gated, gated_halves
from kernels.linear_cross_entropy import Head, linear_cross_entropy
from kernels.permute import expert_permutation, permute, unpermute
from kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_add, rms_norm_add_rms_norm
from kernels.rope import qk_norm_rope
from kernels.span_attention import Spans, flex, operators
from megatron_vlm.data.collate import spans as spans_of

Tensors = Sequence[torch.Tensor]
Direction = Literal["forward", "backward", "both"]
OURS, TORCH, COMPILED, LIGER, FLEX, PRODUCTS = "ours", "torch", "compiled", "liger", "flex", "products"
TOKENS, EPS = 8192, 1e-6
GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """Where and how large a case is built."""

    device: torch.device
    dtype: torch.dtype
    is_tiny: bool

    def size(self, real: int, tiny: int) -> int:
        """The one that applies."""
        return tiny if self.is_tiny else real

    def randn(self, *shape: int) -> torch.Tensor:
        """A leaf with a gradient."""
        return torch.randn(shape, device=self.device, dtype=self.dtype).requires_grad_()


@dataclass(frozen=True)
class Floor:
    """What a direction cannot go below: bytes at the copy's speed, or operations at the matrix product's."""

    num_bytes: float = 0.0
    num_operations: float = 0.0


@dataclass(frozen=True)
class Target:
    """What is to be reached: a share of the floor, a side's time over ours, or temporary memory.

    Attributes:
        direction: of which.
        limit: least share or ratio, or most bytes.
        against: a side, "floor", "published" or "memory".
    """

    direction: Direction
    limit: float
    against: str


@dataclass
class Problem:
    """Inputs on a device, and what is done with them.

    Attributes:
        inputs: given to every side; those that require a gradient get one.
        sides: by name; each gives a tensor or several.
        floors: by direction, where the time of no side is the floor.
        into_main: position of the input whose gradient our side adds to its `main_grad`.
        label: sizes.
    """

    inputs: list[torch.Tensor]
    sides: dict[str, Callable[..., Any]]
    floors: dict[str, Floor]
    label: str
    into_main: int | None = None

    def __post_init__(self) -> None:
        self.originals = [tensor.detach().clone() for tensor in self.inputs]

    def restore(self) -> None:
        """Give the inputs their values again: some of Liger's backward passes write over them."""
        with torch.no_grad():
            for tensor, original in zip(self.inputs, self.originals, strict=True):
                tensor.copy_(original)


@dataclass(frozen=True)
class Case:
    """An operator at one size.

    Attributes:
        operator: its package.
        name: unique.
        build: makes the problem.
        targets: what issue 5 asks for.
        published: others' seconds by direction, on an H200.
        floor_side: side whose time is the floor.
        measures_memory: whether temporary memory is printed.
    """

    operator: str
    name: str
    build: Callable[[Setting], Problem]
    targets: tuple[Target, ...] = ()
    published: dict[str, float] = field(default_factory=dict)
    floor_side: str | None = None
    measures_memory: bool = False


def of_floor(share: float, *more: Target) -> tuple[Target, ...]:
    """At least this share of the floor in both directions."""
    return (Target("forward", share, "floor"), Target("backward", share, "floor"), *more)


def liger(name: str) -> Callable[..., Any]:
    """A function of Liger's, imported when it is called: it is no requirement."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module("liger_kernel.ops"), name).apply(*arguments)

    return call


# RMS norms


def torch_norm(x: torch.Tensor, weight: torch.Tensor | None, zero_centered: bool) -> torch.Tensor:
    """As transformers' modules compute it: Gemma's for weights around 0, Llama's for those around 1."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    if weight is None:
        return normed.to(x.dtype)
    return (normed * (1 + weight.float())).to(x.dtype) if zero_centered else weight * normed.to(x.dtype)


def liger_norm(x: torch.Tensor, weight: torch.Tensor, zero_centered: bool, in_place: bool = True) -> torch.Tensor:
    """Liger's, which writes the gradient over what it was given unless that is needed once more."""
    offset, casting = (1.0, "gemma") if zero_centered else (0.0, "llama")
    return liger("LigerRMSNormFunction")(x, weight, EPS, offset, casting, in_place)


def liger_add_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, zero_centered: bool) -> Tensors:
    """(sum, norm of the sum)."""
    offset, casting = (1.0, "gemma") if zero_centered else (0.0, "llama")
    normed, total = liger("LigerFusedAddRMSNormFunction")(x, residual, weight, EPS, offset, casting)
    return total, normed


def norm_sides(kind: str, zero_centered: bool) -> dict[str, Callable[..., Any]]:
    """Ours, torch's and Liger's of one of the four operators."""
    norm, other = partial(torch_norm, zero_centered=zero_centered), partial(liger_norm, zero_centered=zero_centered)
    other_add = partial(liger_add_norm, zero_centered=zero_centered)
    match kind:
        case "rms_norm":
            ours: Callable[..., Any] = rms_norm
            theirs: tuple[Callable[..., Any], ...] = (norm, other)
        case "add_rms_norm":
            ours = add_rms_norm
            theirs = (lambda x, residual, weight: ((total := residual + x), norm(total, weight)), other_add)
        case "rms_norm_add":
            ours = rms_norm_add
            theirs = (
                lambda x, residual, weight: residual + norm(x, weight),
                lambda x, residual, weight: residual + other(x, weight, in_place=False),
            )
        case _:
            ours = rms_norm_add_rms_norm
            theirs = (
                lambda x, residual, post, weight: ((total := residual + norm(x, post)), norm(total, weight)),
                lambda x, residual, post, weight: other_add(other(x, post, in_place=False), residual, weight),
            )
    return {OURS: lambda *inputs: ours(*inputs, EPS, zero_centered), TORCH: theirs[0], LIGER: theirs[1]}


# Tensors of x's size that are read or written: forward, backward.
NORM_PASSES = {"rms_norm": (2, 3), "add_rms_norm": (4, 4), "rms_norm_add": (3, 3), "rms_norm_add_rms_norm": (4, 6)}
NORM_TARGETS = of_floor(0.8, Target("backward", 1.5, LIGER))


def norm_problem(kind: str, hidden: int, zero_centered: bool, setting: Setting) -> Problem:
    """One of the four operators."""
    rows, hidden = setting.size(TOKENS, 6), setting.size(hidden, 37)
    num_activations = 1 if kind == "rms_norm" else 2
    num_weights = 2 if kind == "rms_norm_add_rms_norm" else 1
    inputs = [setting.randn(rows, hidden) for _ in range(num_activations)]
    forward, backward = (Floor(passes * inputs[0].nbytes) for passes in NORM_PASSES[kind])
    inputs += [setting.randn(hidden) for _ in range(num_weights)]
    floors = {"forward": forward, "backward": backward}
    return Problem(inputs, norm_sides(kind, zero_centered), floors, f"{rows} x {hidden}")


# Norm and rotation of queries and keys


@dataclass(frozen=True)
class Heads:
    """Sizes of a rotation; with `norm`, heads are normalised before."""

    tokens: int
    queries: int
    keys: int
    head_dim: int
    norm: Literal["none", "plain", "zero_centered"] = "none"
    sections: int = 1


def rotate(x_TND: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor], sections: int) -> torch.Tensor:
    """Pairs half a section apart turn, in torch's operations."""
    parts = x_TND.unflatten(-1, (sections, 2, -1))
    cosine, sine = (values.unflatten(-1, (sections, -1)).unsqueeze(-3) for values in table)
    first, second = parts.unbind(-2)
    turned = torch.stack((first * cosine - second * sine, second * cosine + first * sine), dim=-2)
    return turned.flatten(-3)


def rope_problem(heads: Heads, setting: Setting) -> Problem:
    """Queries and keys are views of one projection, as in a vision tower and in fused decoders."""
    if setting.is_tiny:
        heads = replace(heads, tokens=5, queries=4, keys=min(heads.keys, 2), head_dim=12 * heads.sections)
    tokens, head_dim, is_normed = heads.tokens, heads.head_dim, heads.norm != "none"
    packed = torch.randn(tokens, heads.queries + 2 * heads.keys, head_dim, device=setting.device, dtype=setting.dtype)
    counts = [heads.queries, heads.keys, heads.keys]
    q, k = (part.detach().requires_grad_() for part in packed.split(counts, dim=1)[:2])
    angles = torch.rand(tokens, head_dim // 2, device=setting.device) * 6
    table = (angles.cos().to(setting.dtype), angles.sin().to(setting.dtype))
    weights = [setting.randn(head_dim) for _ in range(2 * is_normed)]
    zero_centered = heads.norm == "zero_centered"

    def ours(q: torch.Tensor, k: torch.Tensor, *weights: torch.Tensor) -> Tensors:
        of_norm = {"q_weight": weights[0], "k_weight": weights[1], "eps": EPS} if weights else {}
        return qk_norm_rope(q, k, table, zero_centered=zero_centered, sections=heads.sections, **of_norm)

    def by_torch(q: torch.Tensor, k: torch.Tensor, *weights: torch.Tensor) -> Tensors:
        if weights:
            q, k = torch_norm(q, weights[0], zero_centered), torch_norm(k, weights[1], zero_centered)
        return rotate(q, table, heads.sections), rotate(k, table, heads.sections)

    def by_liger(q: torch.Tensor, k: torch.Tensor, *weights: torch.Tensor) -> Tensors:
        q, k = (liger_norm(x, weight, zero_centered) for x, weight in zip((q, k), weights, strict=True))
        whole = (torch.cat((values, values), dim=-1).unsqueeze(0) for values in table)
        turned = liger("LigerRopeFunction")(*(x.transpose(0, 1).unsqueeze(0) for x in (q, k)), *whole)
        return [x.squeeze(0).transpose(0, 1) for x in turned]

    sides: dict[str, Callable[..., Any]] = {OURS: ours, TORCH: by_torch}
    if is_normed:  # Liger's rotation alone would write over the projection
        sides[LIGER] = by_liger
    size = q.nbytes + k.nbytes
    floors = {"forward": Floor(2 * size), "backward": Floor((3 if is_normed else 2) * size)}
    return Problem([q, k, *weights], sides, floors, f"{tokens} x {heads.queries}/{heads.keys} x {head_dim}")


# Gated activations


def torch_gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """activation(gate) * up."""
    return (functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")) * up


def gated_problem(activation: Activation, columns: int, setting: Setting) -> Problem:
    """Gate and up from products of their own."""
    rows, columns = setting.size(TOKENS, 5), setting.size(columns, 29)
    gate, up = setting.randn(rows, columns), setting.randn(rows, columns)
    sides = {
        OURS: partial(gated, activation=activation),
        TORCH: partial(torch_gated, activation=activation),
        LIGER: liger("LigerSiLUMulFunction" if activation == "silu" else "LigerGELUMulFunction"),
    }
    floors = {"forward": Floor(3 * gate.nbytes), "backward": Floor(5 * gate.nbytes)}
    return Problem([gate, up], sides, floors, f"{rows} x {columns}")


def gated_experts_problem(columns: int, setting: Setting) -> Problem:
    """Gate and up in one tensor, and a factor of each row, which has a gradient too."""
    rows, columns = setting.size(8 * TOKENS, 7), setting.size(columns, 22)
    gate_up, factor = setting.randn(rows, 2 * columns), torch.rand(rows, device=setting.device).requires_grad_()

    def by_torch(gate_up: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return (torch_gated(gate, up, "silu") * factor.unsqueeze(-1)).to(gate_up.dtype)

    sides = {OURS: lambda gate_up, factor: gated_halves(gate_up, "silu", factor), TORCH: by_torch}
    size = gate_up.nbytes / 2
    floors = {"forward": Floor(3 * size), "backward": Floor(5 * size)}
    return Problem([gate_up, factor], sides, floors, f"{rows} x {columns}")


# Expert permutation


def permute_problem(kind: Literal["permute", "unpermute", "unpermute weighted"], setting: Setting) -> Problem:
    """Qwen3-VL 30B-A3B: 8 of 128 experts."""
    tokens, experts, chosen = setting.size(TOKENS, 9), setting.size(128, 6), setting.size(8, 2)
    hidden = setting.size(2048, 19)
    choice = torch.rand(tokens, experts, device=setting.device).topk(chosen).indices
    routing_map = torch.zeros(tokens, experts, dtype=torch.bool, device=setting.device).scatter_(1, choice, True)
    permutation = expert_permutation(routing_map, tokens * chosen)
    entries = permutation.entry_of_row.long()
    token_of_row = entries // experts

    def torch_permute(x: torch.Tensor, probs: torch.Tensor) -> Tensors:
        return x.index_select(0, token_of_row), probs.flatten().index_select(0, entries)

    def torch_unpermute(y: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        y = (y * weights[0].unsqueeze(-1)).to(y.dtype) if weights else y
        return y.new_zeros((tokens, hidden)).index_add(0, token_of_row, y)

    x, y = setting.randn(tokens, hidden), setting.randn(tokens * chosen, hidden)
    if kind == "permute":
        inputs = [x, torch.rand(tokens, experts, device=setting.device).requires_grad_()]
        sides = {OURS: lambda x, probs: permute(x, permutation, probs), TORCH: torch_permute}
    else:
        weights = [torch.rand(tokens * chosen, device=setting.device).requires_grad_()]
        inputs = [y, *(weights if kind == "unpermute weighted" else [])]
        sides = {OURS: lambda y, *weights: unpermute(y, permutation, *weights), TORCH: torch_unpermute}
    # With weights, their gradient reads all rows again.
    backward = x.nbytes + y.nbytes * (2 if kind == "unpermute weighted" else 1)
    floors = {"forward": Floor(x.nbytes + y.nbytes), "backward": Floor(backward)}
    return Problem(inputs, sides, floors, f"{tokens} x {hidden}, {chosen} of {experts}")


# Linear cross-entropy


@dataclass(frozen=True)
class Alone:
    """A group of one rank."""

    def size(self) -> int:
        """Ranks."""
        return 1

    def rank(self) -> int:
        """This one's place."""
        return 0


class _Products(torch.autograd.Function):
    """The matrix products of our loss and nothing else, in its chunks: logits of all, again of all but the last, and
    both gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, head: Head) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.chunks = head.chunks(x.shape[0], weight)
        ctx.buffer = x.new_empty((len(x[ctx.chunks[0]]), weight.shape[0]))
        for chunk in ctx.chunks:
            rows = x[chunk]
            torch.mm(rows, weight.t(), out=ctx.buffer[: len(rows)])
        return x.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x_gradient, total = torch.empty_like(x), weight.main_grad
        for chunk in reversed(ctx.chunks):
            rows = x[chunk]
            logits = ctx.buffer[: len(rows)]
            if chunk != ctx.chunks[-1]:
                torch.mm(rows, weight.t(), out=logits)
            torch.mm(logits, weight, out=x_gradient[chunk])
            if x.dtype == total.dtype:
                total.addmm_(logits.t(), rows)
            else:
                torch.addmm(total, logits.t(), rows, out_dtype=total.dtype, out=total)
        ctx.buffer = None
        return x_gradient, None, None


def loss_problem(softcap: float | None, setting: Setting) -> Problem:
    """Gemma 3 27B's head; a cap as in Gemma 2."""
    tokens, hidden, vocabulary = setting.size(TOKENS, 11), setting.size(5376, 24), setting.size(262_144, 70)
    head = Head(vocabulary, Alone(), softcap=softcap)  # type: ignore[arg-type]
    if setting.is_tiny:
        head = replace(head, chunk_bytes=4 * vocabulary * 4)
    scale = hidden**-0.25  # logits of order one
    x, weight = (setting.randn(size, hidden).detach().mul_(scale).requires_grad_() for size in (tokens, vocabulary))
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    labels = torch.randint(vocabulary, (tokens,), device=setting.device)
    index = torch.arange(tokens, device=setting.device)

    def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(x.unsqueeze(1), weight, labels.unsqueeze(0), index, head).sum() / tokens

    def by_torch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(x, weight).float()
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return functional.cross_entropy(logits, labels)

    def by_liger(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        function = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
        return function(x, weight, labels, softcap=softcap)

    def products(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return _Products.apply(x, weight, head)

    sides = {OURS: ours, TORCH: by_torch, LIGER: by_liger, PRODUCTS: products}
    return Problem([x, weight], sides, {}, f"{tokens} x {hidden} x {vocabulary}", into_main=1)


# Span attention


@dataclass(frozen=True)
class Attention:
    """Sizes of an attention; `image_tokens` is the length of each of the images between the text, 0 for none."""

    queries: int
    keys: int
    head_dim: int
    window: int | None
    image_tokens: int = 256


def attention_problem(sizes: Attention, setting: Setting) -> Problem:
    """One row, images and text in turn."""
    length = setting.size(TOKENS, 150)
    if setting.is_tiny:
        sizes = replace(sizes, queries=4, keys=2, head_dim=64, window=sizes.window and 40)
        sizes = replace(sizes, image_tokens=min(sizes.image_tokens, 20))
    place = torch.arange(length)
    is_image = (place // max(sizes.image_tokens, 1) % 2 == 1) & (sizes.image_tokens > 0)
    low, high = spans_of(torch.ones(1, length, dtype=torch.bool), is_image.unsqueeze(0))
    visible = Spans(low.to(setting.device), high.to(setting.device))
    q, k, v = (setting.randn(1, heads, length, sizes.head_dim) for heads in (sizes.queries, sizes.keys, sizes.keys))
    window, scale = sizes.window, sizes.head_dim**-0.5
    is_causal = window is None and sizes.image_tokens == 0
    mask = None if is_causal else visible.dense(window)

    def by_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # Repeated, as transformers does: with fewer key heads and a mask, torch would hold all scores in memory.
        k, v = (x.repeat_interleave(sizes.queries // sizes.keys, dim=1) for x in (k, v))
        return functional.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale)

    sides = {
        # Whether or not they are proven on this GPU.
        OURS: lambda q, k, v: operators.attend(q, k, v, visible, window, scale),
        TORCH: by_torch,
    }
    if setting.device.type == "cuda":  # FlexAttention has no backward pass elsewhere
        sides[FLEX] = lambda q, k, v: flex.attend(q, k, v, visible, window, scale)
    pairs = (high - Spans(low, high).first_key(window) + 1).clamp(min=0).sum().item() * sizes.queries
    floors = {"forward": Floor(num_operations=4 * pairs * sizes.head_dim)}
    floors["backward"] = Floor(num_operations=10 * pairs * sizes.head_dim)
    label = f"{length} x {sizes.queries}/{sizes.keys} x {sizes.head_dim}, window {window}"
    return Problem([q, k, v], sides, floors, label)


def against(side: str, ratio: float) -> tuple[Target, ...]:
    """At least this ratio of a side's time to ours in both directions."""
    return (Target("forward", ratio, side), Target("backward", ratio, side))


# Published by ffpa-attn 0.2 for its CuTe kernels on an H200: causal, 8,192 tokens, 32 heads of 512.
FFPA_SECONDS = {"forward": 6.34e-3, "backward": 25.4e-3}
LOSS_TARGETS = (Target("both", 0.8, "floor"), Target("both", 1.0 * GIB, "memory"))  # 0.8 is 1 / 1.25


def _norm(kind: str, hidden: int, zero_centered: bool = False) -> Case:
    name = f"{kind} {hidden}" + " around 0" * zero_centered
    return Case("rms_norm", name, partial(norm_problem, kind, hidden, zero_centered), NORM_TARGETS)


def _rope(name: str, *sizes: Any) -> Case:
    return Case("rope", name, partial(rope_problem, Heads(*sizes)), of_floor(0.75))


def _attention(name: str, targets: tuple[Target, ...], *sizes: Any, **published: dict[str, float]) -> Case:
    return Case("span_attention", name, partial(attention_problem, Attention(*sizes)), targets, **published)


CASES = (
    _norm("rms_norm", 4096),
    _norm("rms_norm", 5376, True),
    _norm("add_rms_norm", 4096),
    _norm("rms_norm_add", 5376, True),
    _norm("rms_norm_add_rms_norm", 5376, True),
    _rope("Qwen3-VL 8B", TOKENS, 32, 8, 128, "plain"),
    _rope("Gemma 3 27B", TOKENS, 32, 16, 128, "zero_centered"),
    _rope("heads of 256", TOKENS, 32, 16, 256, "plain"),
    _rope("vision, two axes", 2 * TOKENS, 16, 16, 72, "none", 2),
    Case("gated", "SwiGLU 12288", partial(gated_problem, "silu", 12288), of_floor(0.85)),
    Case("gated", "GeGLU 21504", partial(gated_problem, "gelu_tanh", 21504), of_floor(0.85)),
    Case("gated", "SwiGLU of experts 768", partial(gated_experts_problem, 768), of_floor(0.85)),
    Case("permute", "permute", partial(permute_problem, "permute"), of_floor(0.75)),
    Case("permute", "unpermute", partial(permute_problem, "unpermute"), of_floor(0.75)),
    Case("permute", "unpermute weighted", partial(permute_problem, "unpermute weighted"), of_floor(0.75)),
    *(
        Case(
            "linear_cross_entropy",
            name,
            partial(loss_problem, softcap),
            LOSS_TARGETS,
            floor_side=PRODUCTS,
            measures_memory=True,
        )
        for name, softcap in (("plain", None), ("capped at 30", 30.0))
    ),
    _attention("64, images", against(FLEX, 1 / 1.3), 32, 8, 64, None),
    _attention("128, images, window 1024", against(FLEX, 1 / 1.3), 32, 16, 128, 1024),
    _attention("128, images", against(FLEX, 1 / 1.3), 32, 16, 128, None),
    _attention("256, images, window 1024", against(FLEX, 1 / 1.3), 32, 16, 256, 1024),
    _attention("512, images", against(TORCH, 2.0), 32, 4, 512, None),
    _attention(
        "512, causal",
        (*against(TORCH, 2.0), *against("published", 1 / 1.5)),
        32,
        4,
        512,
        None,
        0,
        published=FFPA_SECONDS,
    ),
)
