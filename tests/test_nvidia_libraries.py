"""Transformer Engine and apex beside megatron-core: whose Adam it gets, and what it must not take of them.

Both are stand-ins here: modules with their names, whose functions would fail on a host as theirs do.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import pytest
import torch
from megatron.core.optimizer import clip_grads, distrib_optimizer

from megatron_vlm import platform
from megatron_vlm.checkpoint.optimizer_state import match_groups
from megatron_vlm.errors import ConfigError
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.mcore_config import build_mcore_config
from megatron_vlm.platform import nvidia_libraries
from megatron_vlm.platform.fused_adam import FusedLayoutAdam, select

LIBRARIES = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C", "fused_weight_gradient_mlp_cuda")


class FusedAdam(torch.optim.AdamW):
    """NVIDIA's, of either library."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("Found no NVIDIA driver on your system")


class FusedSGD(FusedAdam):
    pass


def kernel(*_: Any, **__: Any) -> None:
    raise RuntimeError("expected input to be on cuda")


FUNCTIONS = dict.fromkeys(("multi_tensor_applier", "multi_tensor_l2norm", "multi_tensor_scale"), kernel)
OPTIMIZERS = {"FusedAdam": FusedAdam, "FusedSGD": FusedSGD}
APEX: dict[str, dict[str, Any]] = {
    "apex": {},
    "apex.optimizers": OPTIMIZERS,
    "apex.multi_tensor_apply": {"multi_tensor_applier": kernel},
}
INSTALLED: dict[str, dict[str, dict[str, Any]]] = {
    "nothing": {},
    "transformer_engine": {
        "transformer_engine": {},
        "transformer_engine.pytorch": {},
        "transformer_engine.pytorch.optimizers": {**OPTIMIZERS, **FUNCTIONS, "multi_tensor_scale_tensor": kernel},
    },
    "apex": {**APEX, "amp_C": {**FUNCTIONS, "multi_tensor_adam": kernel}},
    "apex without extensions": APEX,
    # The package of that name on PyPI: a toolkit for web pages.
    "another apex": {"apex": {}, "apex.lib": {}},
}


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let just these be imported, whatever this environment has."""
    for library in LIBRARIES:
        monkeypatch.setitem(sys.modules, library, None)
    for name in names:
        for module_name, contents in INSTALLED[name].items():
            module = ModuleType(module_name)
            module.__path__ = []
            vars(module).update(contents)
            monkeypatch.setitem(sys.modules, module_name, module)


@pytest.fixture(autouse=True)
def megatron_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is set in megatron-core is undone."""
    for module, names in {
        megatron_optimizer: ("Adam", "SGD", "USING_PYTORCH_OPTIMIZER"),
        distrib_optimizer: ("Adam", "HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER", "USING_APEX_OPTIMIZER"),
        clip_grads: ("multi_tensor_applier", "l2_norm_impl", "multi_tensor_scale_tensor_impl"),
    }.items():
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name))
    yield


def fresh(module: ModuleType) -> Any:
    """A module of megatron-core as it is where it is imported now."""
    spec = importlib.util.spec_from_file_location(f"{module.__package__}.fresh", str(module.__file__))
    assert spec is not None and spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    return again


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("installed", "has_fused", "is_fused", "norm_is_local"),
    [
        ("nothing", False, False, True),
        ("transformer_engine", True, True, False),
        ("apex", True, True, False),
        ("apex without extensions", True, True, True),  # whose Adam cannot be built
        ("another apex", False, False, True),
    ],
)
def test_what_megatron_chooses_by_itself(
    installed: str, has_fused: bool, is_fused: bool, norm_is_local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the device; the rest of this file is what we make of it."""
    install(monkeypatch, installed)
    chosen, clip = fresh(distrib_optimizer), fresh(clip_grads)
    assert (chosen.HAVE_APEX_OR_TE, chosen.Adam is FusedAdam) == (has_fused, is_fused)
    assert (clip.l2_norm_impl is not kernel) == norm_is_local


@pytest.mark.parametrize(
    ("installed", "library"),
    [
        (("nothing",), "torch"),
        (("transformer_engine",), "transformer_engine"),
        (("apex",), "apex"),
        (("apex", "transformer_engine"), "transformer_engine"),
        (("apex without extensions",), "torch"),
        (("another apex",), "torch"),
        (("another apex", "transformer_engine"), "transformer_engine"),
    ],
)
def test_auto_takes_what_can_be_built(
    installed: tuple[str, ...], library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, *installed)
    for accelerated in (True, False):
        taken = select("auto", accelerated)
        assert taken == (library if accelerated else "torch"), "NVIDIA's kernels need a GPU"
        adam = FusedLayoutAdam if taken == "torch" else FusedAdam
        assert megatron_optimizer.Adam is distrib_optimizer.Adam is adam
        # All have the fused layout of state, in which the distributed optimizer saves and loads.
        assert distrib_optimizer.HAVE_APEX_OR_TE and not megatron_optimizer.USING_PYTORCH_OPTIMIZER
        assert (taken == "transformer_engine") == distrib_optimizer.USING_TE_OPTIMIZER
        assert (taken != "transformer_engine") == distrib_optimizer.USING_APEX_OPTIMIZER


def test_an_adam_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "apex", "transformer_engine")
    for library in ("torch", "apex", "transformer_engine"):
        assert select(library, True) == library
        assert (library == "transformer_engine") == distrib_optimizer.USING_TE_OPTIMIZER


@pytest.mark.parametrize(
    ("backend", "installed"),
    [
        ("transformer_engine", "nothing"),
        ("transformer_engine", "apex"),
        ("apex", "nothing"),
        ("apex", "another apex"),
        ("apex", "apex without extensions"),
        ("apex", "transformer_engine"),
    ],
)
def test_an_adam_that_is_absent_is_refused(backend: Any, installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, installed)
    for accelerated, reason in ((True, r"imported.* install it .*, or set"), (False, r"used on a CPU.* set")):
        with pytest.raises(ConfigError, match=rf"adam_backend is {backend}, but its fused Adam cannot be {reason}"):
            select(backend, accelerated)


@pytest.mark.parametrize(("before", "now"), [(False, True), (True, False), (True, True)])
def test_an_adam_continues_another_ones_checkpoint(before: bool, now: bool) -> None:
    """Groups of NVIDIA's Adams have a setting that torch's has not, and that theirs cannot step without."""
    group = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False, "eps": 1e-8}
    saved = {**group, "step": 3} | ({"bias_correction": True} if before else {})
    running = {**group, "params": []} | ({"bias_correction": True} if now else {})
    optimizer = SimpleNamespace(config=SimpleNamespace(optimizer="adam"), param_groups=[running])
    (matched,) = match_groups(optimizer, {"name": "adam", "groups": [saved]}, "")  # type: ignore[arg-type]
    assert matched["step"] == 3 and matched.get("bias_correction", not now)


def test_this_process_has_the_adam_of_its_device() -> None:
    platform.initialize()
    assert (megatron_optimizer.Adam is FusedLayoutAdam) or platform.current().accelerated


def test_gradient_norms_on_the_host_are_local(monkeypatch: pytest.MonkeyPatch) -> None:
    def norm() -> torch.Tensor:
        gradients = [torch.arange(6.0), torch.ones(3, 2)]
        found, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, torch.zeros(1), [gradients], False)
        return found

    for name in ("multi_tensor_applier", "l2_norm_impl", "multi_tensor_scale_tensor_impl"):
        monkeypatch.setattr(clip_grads, name, kernel)
    nvidia_libraries.guard(accelerated=True)
    with pytest.raises(RuntimeError, match="expected input to be on cuda"):
        norm()
    nvidia_libraries.guard(accelerated=False)
    assert norm().item() == pytest.approx(61**0.5)
    assert clip_grads.multi_tensor_scale_tensor_impl is None


def test_sgd_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs makes a momentum for every parameter, also where there is none."""
    monkeypatch.setattr(megatron_optimizer, "SGD", FusedSGD)
    nvidia_libraries.guard(accelerated=True)
    assert megatron_optimizer.SGD is torch.optim.SGD


# Modules of megatron-core that import something of either, by why that changes nothing here.
HARMLESS = {
    "the choice is ours": "optimizer optimizer.distrib_optimizer optimizer.clip_grads",
    "modules and functions that are not used": (
        "extensions.transformer_engine transformer.mlp transformer.transformer_layer transformer.moe.shared_experts "
        "transformer.moe.fused_a2a models.common.embeddings.rope_utils tensor_parallel.inference_layers "
        "inference.quantization.utils transformer.cuda_graphs pipeline_parallel.fine_grained_activation_offload "
        "pipeline_parallel.utils distributed.fsdp.src.megatron_fsdp.mixed_precision fusions.fused_layer_norm "
        "distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer distributed.fsdp.src.megatron_fsdp.utils "
        "transformer.attention transformer.moe.moe_utils models.mimo.partition.utils"
    ),
    "tensors of formats that are not used": (
        "fp4_utils fp8_utils dist_checkpointing.exchange_utils dist_checkpointing.strategies.torch "
        "tensor_parallel.generalized_tensor_parallelism"
    ),
    "settings that are off": "optimizer.optimizer_config tensor_parallel.layers tensor_parallel.random utils",
    # In bf16, main weights become parameters by `copy_`; the fused copy is that of fp16.
    "precisions that are not used": "optimizer.optimizer",
}
WRAPPERS = "megatron.core.extensions.transformer_engine"
OFF = "gradient_accumulation_fusion defer_embedding_wgrad_compute moe_permute_fusion moe_router_fusion fp8 fp4"


def imported_modules(node: ast.AST) -> list[str]:
    """Names of the modules that a statement imports, or imports from."""
    if isinstance(node, ast.ImportFrom):
        # Also by way of megatron-core's own module of wrappers.
        return ["transformer_engine" if node.module == WRAPPERS else node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_all_uses_in_megatron_are_known() -> None:
    """A new version of megatron-core that takes them elsewhere is seen; read the module, and add it with its reason."""
    known = {f"megatron.core.{name}" for names in HARMLESS.values() for name in names.split()}
    found = set()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core.") and not name.endswith(".fresh") and getattr(module, "__file__", None):
            for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
                if any(each.split(".")[0] in LIBRARIES for each in imported_modules(node)):
                    found.add(name)
    assert found <= known, f"new: {sorted(found - known)}"
    assert {f"megatron.core.{name}" for name in HARMLESS["the choice is ours"].split()} <= found
    mcore_config = build_mcore_config(8, 2, torch.bfloat16, Layout.over(1, num_layers=1))
    assert not [name for name in OFF.split() if getattr(mcore_config, name)]
