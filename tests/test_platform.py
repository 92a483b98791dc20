"""The CPU layer: torch stays honest outside megatron-core, and each replacement is needed by a real function of it."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import io
import json
import os
import pkgutil
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import pytest
import torch
import torch.distributed
from megatron.core import utils
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, clip_grads, distrib_optimizer, get_megatron_optimizer
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.timers import Timer
from megatron.core.transformer.module import MegatronModule
from torch._inductor import config as inductor
from torch._inductor.async_compile import get_compile_threads

from megatron_vlm import platform
from megatron_vlm.checkpoint.manager import CheckpointManager
from megatron_vlm.checkpoint.run_folder import ModelIdentity
from megatron_vlm.errors import ConfigError
from megatron_vlm.parallel.groups import build_groups
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.mcore_config import build_mcore_config
from megatron_vlm.parallel.parameters import declare, normal, zeros
from megatron_vlm.platform import device, megatron_cpu
from megatron_vlm.platform.fused_adam import FusedLayoutAdam
from megatron_vlm.training.step import run_global_batch
from tests.checkpoint.tiny_run import prepare_process
from tests.families import gemma3, qwen3_vl
from tests.parity.layouts import TestLayout, own_micro_batches, set_up
from tests.platform_calls import recorded, replacements, without
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[1]
CALL_SITES = Path(__file__).with_name("megatron_call_sites.txt")
on_cpu = pytest.mark.skipif(platform.current().accelerated, reason="nothing is replaced on CUDA")


# CUDA's allocator

# Starts on a GPU, as far as a host gets, with each environment: torch's own account of its allocator, which works
# without a device. They are forked from a process that has imported everything and used no allocator.
STARTED_ON_A_GPU = """
import json, os, sys
from unittest import mock
import megatron.core.optimizer, torch
from megatron_vlm import platform
for given in json.loads(sys.argv[1]):
    if os.fork():
        os.wait()
        continue
    os.environ.update(given)
    asked_before = []
    is_set = lambda device: asked_before.append("expandable_segments:True" in os.environ.get("PYTORCH_ALLOC_CONF", ""))
    faked = {"is_available": lambda: True, "device_count": lambda: 1, "set_device": is_set}
    with mock.patch.multiple("torch.cuda", **faked):
        platform.initialize()
    settings = torch._C._cuda_memorySnapshot(None)["allocator_settings"]
    children = {name: value for name, value in os.environ.items() if name.endswith("ALLOC_CONF")}
    assert asked_before == [settings["expandable_segments"]]
    print(json.dumps([settings["expandable_segments"], settings["max_split_size"], children]), flush=True)
    os._exit(0)  # without the seconds that an interpreter takes to end
"""


@on_cpu
@pytest.mark.full
def test_memory_is_held_in_expandable_segments_unless_the_user_says_otherwise() -> None:
    cases: list[tuple[dict[str, str], bool, int]] = [
        ({}, True, -1),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}, False, 128 << 20),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, False, 128 << 20),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, False, -1),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    command = [sys.executable, "-c", STARTED_ON_A_GPU, json.dumps([given for given, *_ in cases])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    expected = [
        [expandable, max_split_size, given or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}]
        for given, expandable, max_split_size in cases
    ]
    assert found == expected, done.stderr


@on_cpu
def test_a_machine_with_an_nvidia_device_does_not_train_on_its_cpu_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here torch finds no driver, which is what it says."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert not device._takes_cuda("auto") and not device._takes_cuda("cpu")
    with pytest.raises(ConfigError, match=r"device is cuda, but torch .* cannot use CUDA: .*\w+.* -- repair"):
        platform.initialize("cuda")
    monkeypatch.setattr(device, "_nvidia_devices", lambda: ["/dev/nvidia0"])
    with pytest.raises(ConfigError, match=r"has an NVIDIA device \(/dev/nvidia0\), but torch .* cannot use CUDA"):
        device._takes_cuda("auto")
    assert not device._takes_cuda("cpu")
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not device._takes_cuda("auto"), "the user hides the device"


def test_every_rank_of_a_machine_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Slurm shows each task only one; fewer devices than ranks are an error instead of a shared device."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device._device_number() == 3
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ConfigError, match="number 4 of its machine, which has 4 GPUs"):
        device._device_number()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="which has 1 GPU "):
        device._device_number()
    monkeypatch.setenv("SLURM_STEP_GPUS", "2")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert device._device_number() == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(ConfigError, match="which has 1 GPU "):
        device._device_number()


@on_cpu
def test_ranks_share_the_cores_for_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torch's compiler was imported before, which reads the user's number then."""
    monkeypatch.setattr(inductor, "compile_threads", 32)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    for cores, workers in ((192, 24), (4, 1), (1024, 32)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: set(range(cores)))
        device._limit_compile_workers()
        assert get_compile_threads() == workers
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "5")
    monkeypatch.setattr(inductor, "compile_threads", inductor.decide_compile_threads())
    device._limit_compile_workers()
    assert get_compile_threads() == 5


def test_determinism_fills_no_new_tensors() -> None:
    """torch would fill each with NaN."""
    fills = torch.utils.deterministic.fill_uninitialized_memory
    try:
        platform.current().use_deterministic_algorithms()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.empty(4096).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fills


def test_nvidia_devices_are_found_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (vendor, kind) in {
        "0000:01:00.0": ("0x10de", "0x030200"),
        "0000:01:00.1": ("0x10de", "0x040300"),  # its sound
        "0000:02:00.0": ("0x8086", "0x030000"),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    monkeypatch.setattr(device, "_PCI_DEVICES", f"{tmp_path}/*")
    assert device._nvidia_devices() == ["PCI 0000:01:00.0"]


# torch outside megatron-core


@on_cpu
def test_torch_stays_honest_for_everyone_else() -> None:
    assert not torch.cuda.is_available()
    assert type(torch) is type(torch.cuda) is type(sys)
    for attempt in (
        lambda: torch.zeros(1, device="cuda"),
        lambda: torch.tensor([1.0], device="cuda"),
        lambda: torch.zeros(1).cuda(),
        torch.cuda.current_device,
        torch.cuda.synchronize,
    ):
        with pytest.raises((RuntimeError, AssertionError)):
            attempt()
    assert torch.zeros(1).type() == "torch.FloatTensor"
    names = {name: vars(torch)[name] for name in megatron_cpu._FACTORIES}
    assert not any(getattr(function, "__module__", "") == megatron_cpu.__name__ for function in names.values())


@on_cpu
def test_modules_of_megatron_imported_later_are_substituted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """`energy_monitor` makes a tensor on "cuda"; nothing else imports it."""
    name = "megatron.core.energy_monitor"

    def sees_cuda() -> torch.Tensor:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name).torch.tensor([1], device="cuda")

    assert sees_cuda().device.type == "cpu"
    finders = [finder for finder in sys.meta_path if not isinstance(finder, megatron_cpu._SubstituteOnImport)]
    monkeypatch.setattr(sys, "meta_path", finders)
    with pytest.raises((RuntimeError, AssertionError)):
        sees_cuda()
    monkeypatch.delitem(sys.modules, name)


# One function of megatron-core for each replacement


def _gradients() -> list[torch.nn.Parameter]:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    return [parameter]


def _tracked_streams() -> list[torch.Tensor]:
    """Two draws from each of two named streams, in turns: a stream goes on where it was, whatever others drew."""
    tracker = CudaRNGStatesTracker()
    tracker.add("one", 1)
    tracker.add("two", 2)
    draws = []
    for name in ("one", "two", "one", "two"):
        with tracker.fork(name):
            draws.append(torch.rand(2))
    return draws


def _check_streams() -> None:
    before = torch.get_rng_state()
    draws = _tracked_streams()
    assert torch.equal(torch.get_rng_state(), before)
    for seed, (first, second) in enumerate((draws[::2], draws[1::2]), start=1):
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(first, torch.rand(2, generator=generator))
        assert torch.equal(second, torch.rand(2, generator=generator))


def _time() -> None:
    timer = Timer("test")
    timer.start()
    timer.stop()


def _norm_of_gradients() -> None:
    total, _ = utils.local_multi_tensor_l2_norm(0, None, [[_gradients()[0].grad]], False)
    assert total.item() == 5.0


def _clip() -> None:
    parameters = _gradients()
    clip_grads.clip_grad_by_total_norm_fp32(parameters, max_norm=1.0, total_norm=5.0)
    assert torch.allclose(parameters[0].grad, torch.tensor([0.6, 0.8]))


def _buffer() -> None:
    assert utils.GlobalMemoryBuffer().get_tensor([2, 3], torch.float32, "test").shape == (2, 3)


def _wrapped_model(overlap: bool = False, hidden_size: int = 4) -> tuple[Any, Any]:
    """A linear layer under distributed data parallelism."""
    groups = build_groups(Layout.over(torch.distributed.get_world_size()))
    config = build_mcore_config(hidden_size, 1, torch.float32, Layout.over(1, num_layers=1))
    module = MegatronModule(config)
    module.linear = torch.nn.Linear(hidden_size, hidden_size)
    declare(module.linear.weight, "matrix", normal)
    declare(module.linear.bias, "vector", zeros)
    module.forward = module.linear.forward
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=overlap)
    return DistributedDataParallel(config, settings, module, pg_collection=groups), groups


def _reduce_gradients() -> None:
    model, _ = _wrapped_model()
    model(torch.ones(1, 4)).sum().backward()
    model.finish_grad_sync()
    assert torch.equal(model.module.linear.weight.main_grad, torch.ones(4, 4))


def _distributed_optimizer(model: Any, groups: Any) -> Any:
    return get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=0.1, clip_grad=0.0, use_distributed_optimizer=True),
        [model],
        use_gloo_process_groups=False,
        pg_collection=groups,
    )


def _step(model: Any, optimizer: Any) -> None:
    model.zero_grad_buffer()
    optimizer.zero_grad()
    model(torch.arange(4.0).view(1, 4)).square().sum().backward()
    model.finish_grad_sync()
    optimizer.step()


def _gather_uneven() -> None:
    rank = torch.distributed.get_rank()
    rows = torch.full((rank + 1, 2), float(rank))
    gathered = gather_from_sequence_parallel_region(
        rows, group=torch.distributed.group.WORLD, output_split_sizes=[1, 2]
    )
    assert gathered[:, 0].tolist() == [0.0, 1.0, 1.0]


SINGLE: dict[str, Callable[[], None]] = {
    "torch.tensor": _norm_of_gradients,
    "torch.zeros": _clip,
    "Tensor.type": _clip,
    "torch.cuda.current_device": _buffer,
    "torch.cuda.synchronize": _time,
    "torch.cuda.get_rng_state": _check_streams,
    "torch.cuda.manual_seed": _check_streams,
    "megatron.core.tensor_parallel.random._get_cuda_rng_state": _check_streams,
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": _check_streams,
}
ON_RANKS: dict[str, tuple[int, Callable[[], None]]] = {
    "torch.cuda.current_stream": (1, _reduce_gradients),
    "torch.distributed.all_gather": (2, _gather_uneven),
}


def _fails_only_without(name: str, use: Callable[[], None]) -> None:
    use()
    with without(name), pytest.raises(Exception) as caught:
        use()
    assert not isinstance(caught.value, NameError | ImportError)
    use()


@on_cpu
@pytest.mark.parametrize("name", SINGLE)
def test_megatron_needs(name: str) -> None:
    _fails_only_without(name, SINGLE[name])


@on_cpu
@pytest.mark.parametrize("name", ON_RANKS)
def test_megatron_needs_on_ranks(name: str) -> None:
    world_size, use = ON_RANKS[name]
    run_ranks(world_size, _fails_only_without, name, use)


@on_cpu
def test_every_replacement_is_tested() -> None:
    assert set(SINGLE) | set(ON_RANKS) == set(replacements()) | {"Tensor.type"}


# What a training step with a checkpoint meets


def _train_and_save(hf_dir: str, experts_dir: str, folder: str) -> set[str]:
    prepare_process()
    layout = TestLayout(4, tensor=2, pipeline=2, sequence_parallel=True, distributed_optimizer=True)
    with recorded() as sites:
        for experts in ({"expert": 2}, {"expert_tensor": 2}):
            model, groups = set_up(experts_dir, replace(layout, **experts))
            batches = [qwen3_vl.make_batch(rows).batch for rows in qwen3_vl.CASES["mixed"][:2]]
            run_global_batch(model, own_micro_batches(model, batches, groups, layout), groups)
        model, groups = set_up(hf_dir, layout)
        optimizer = get_megatron_optimizer(
            OptimizerConfig(optimizer="adam", lr=1e-3, clip_grad=1.0, use_distributed_optimizer=True),
            model,
            use_gloo_process_groups=False,
            pg_collection=groups,
        )
        batches = [gemma3.make_batch(gemma3.ROWS[case]) for case in ("text", "mixed")]
        run_global_batch(model, own_micro_batches(model, batches, groups, layout), groups)
        optimizer.step()
        identity = ModelIdentity("gemma3", "gemma3", text_only=False, tied=True)
        manager = CheckpointManager(folder, groups, identity, {"tensor": 2, "pipeline": 2}, "fp32", async_save=True)
        manager.save(1, model, optimizer, None, {}, "")
        manager.finalize(blocking=True)
    return sites


@on_cpu
def test_places_in_megatron_that_meet_a_replacement(tmp_path: Path) -> None:
    """A new version of megatron-core that uses CUDA elsewhere, or no longer here, is seen.

    Read the difference, and write the new list if the CPU layer still is what it should be.
    """
    hf_dir = str(tmp_path / "hf")
    gemma3.build(with_vision=True).save_pretrained(hf_dir)
    experts_dir = str(tmp_path / "experts")
    qwen3_vl.build(moe=True).save_pretrained(experts_dir)
    found = set().union(*run_ranks(4, _train_and_save, hf_dir, experts_dir, str(tmp_path / "run")))
    expected = {line for line in CALL_SITES.read_text().splitlines() if not line.startswith("#")}
    assert not found - expected, "new places:\n" + "\n".join(sorted(found - expected))
    assert not expected - found, "places that are gone:\n" + "\n".join(sorted(expected - found))


@on_cpu
def test_megatron_is_imported_without_torchs_compiler() -> None:
    """Decorators in both of megatron-core's ways; torch's own function is back afterwards."""
    done = subprocess.run([sys.executable, "-c", IMPORTED], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "False False True\n", done.stdout + done.stderr


# In a process of its own: here another test may have imported megatron-core already.
IMPORTED = """
import torch
from megatron_vlm import platform
platform.initialize("cpu")
from megatron.core.fusions.fused_bias_geglu import geglu
from megatron.core.transformer.moe.router import InferenceTopKRouter
functions = geglu, InferenceTopKRouter._compiled_topk_routing, torch.compile(geglu)
print(*(hasattr(function, "_torchdynamo_orig_callable") for function in functions))
"""


# Adam with the fused layout


@pytest.mark.parametrize("adam_w_mode", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_layout_adam_is_torchs(adam_w_mode: bool, dtype: torch.dtype) -> None:
    """Bit for bit: it calls the same functional form. Groups differ in rate and decay; a parameter joins late."""

    def parameters() -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(3)
        return [torch.nn.Parameter(torch.randn(5, 3, generator=generator).to(dtype)) for _ in range(3)]

    def groups(own: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": own[:2], "weight_decay": 0.3}, {"params": own[2:], "lr": 0.05, "weight_decay": 0.0}]

    ours, theirs = parameters(), parameters()
    reference = torch.optim.AdamW if adam_w_mode else torch.optim.Adam
    settings: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-6}
    optimizers = (
        FusedLayoutAdam(groups(ours), adam_w_mode=adam_w_mode, **settings),
        reference(groups(theirs), fused=True, **settings),
    )
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator).to(dtype)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.02 / (step + 1)
            optimizer.step()
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other)
    assert [group["step"] for group in optimizers[0].param_groups] == [6, 6]
    assert all(set(state) == {"exp_avg", "exp_avg_sq"} for state in optimizers[0].state.values())


def _describe_a_new_optimizer() -> None:
    """What megatron-core stores of an optimizer beside its tensors, before and after a step."""
    model, groups = _wrapped_model()
    optimizer = _distributed_optimizer(model, groups)
    (inner,) = optimizer.chained_optimizers
    assert "step" not in inner.state_dict()["optimizer"]["param_groups"][0]
    _step(model, optimizer)
    assert inner.state_dict()["optimizer"]["param_groups"][0]["step"] == 1


def _describing_needs_the_fused_layout() -> None:
    _describe_a_new_optimizer()
    with pytest.MonkeyPatch.context() as patch:
        # As megatron-core sets them without Transformer Engine and apex.
        patch.setattr(megatron_optimizer, "Adam", torch.optim.AdamW)
        patch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", True)
        patch.setattr(distrib_optimizer, "Adam", torch.optim.AdamW)
        patch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", False)
        patch.setattr(distrib_optimizer, "USING_APEX_OPTIMIZER", False)
        with pytest.raises((AssertionError, KeyError)):
            _describe_a_new_optimizer()


def test_distributed_optimizer_cannot_describe_torchs_adam() -> None:
    """megatron-core 0.19.2 trips over its own fallback; what loads, and where, is in tests/checkpoint."""
    run_ranks(2, _describing_needs_the_fused_layout)


def test_fused_layout_is_installed_where_nothing_better_is() -> None:
    better = platform.has_transformer_engine() or importlib.util.find_spec("apex") is not None
    assert (megatron_optimizer.Adam is FusedLayoutAdam) == (not better)


# Who knows the device


def _words(path: Path) -> list[str]:
    """Tokens of a file, comments and docstrings too, that hold one of the two words."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    kinds = (tokenize.NAME, tokenize.STRING, tokenize.COMMENT, tokenize.FSTRING_MIDDLE)
    word = re.compile(r"(?<![a-z])(cpu|cuda)(?![a-z])", re.IGNORECASE)
    return [token.string for token in tokens if token.type in kinds and word.search(token.string)]


# Names of megatron-core's, and the sentence that says what the package is for.
ALLOWED_WORDS = {
    "megatron_vlm/__init__.py": {
        '"""Vision-language models trained natively in parallel on megatron-core\'s primitives, on CPU and on CUDA."""'
    },
    "megatron_vlm/parallel/groups.py": {"model_parallel_cuda_manual_seed"},
    "megatron_vlm/parallel/mcore_config.py": {"use_cpu_initialization"},
    "megatron_vlm/config.py": {
        '"cuda"',
        '"cpu"',
        '"""Where the run computes; auto takes CUDA where the machine has an NVIDIA device, and the CPU elsewhere."""',
    },
    "pretrain_vlm.py": {'"cpu"'},
    "megatron_vlm/planning/planner.py": {'"cpu"'},
    "tools/plan.py": {'"cpu"'},
    # Points that train beside each other get devices of their own.
    "megatron_vlm/sweeps/local_run.py": {'"CUDA_VISIBLE_DEVICES"', "cpu_count"},
    # A comparison runs on the host.
    "tools/compare_loss.py": {'"cpu"'},
    "megatron_vlm/conversion/loss_comparison.py": {'"cpu"'},
    "megatron_vlm/planning/dry_run.py": {'"cpu"'},
    "megatron_vlm/checkpoint/torch_dist.py": {'"cpu"'},  # into host memory, whatever the device
    "megatron_vlm/data/template_trial.py": {"RLIMIT_CPU"},  # of processors' time
    # Counting runs on the host beside training, and names operators of torch's.
    "megatron_vlm/planning/flops.py": {'"cpu"'},
    "megatron_vlm/planning/recorder.py": {
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    },
}


def test_only_the_platform_knows_the_device() -> None:
    files = [ROOT / "pretrain_vlm.py"]
    for folder in ("megatron_vlm", "kernels", "tools"):
        files += sorted((ROOT / folder).rglob("*.py"))
    assert len(files) > 40
    # The second one registers operators by device.
    knowing = ("megatron_vlm/platform/", "kernels/vlm_kernels/library.py", "kernels/vlm_kernels/device.py")
    found = {}
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(knowing):
            words = set(_words(path)) - ALLOWED_WORDS.get(name, set())
            if words:
                found[name] = words
    assert not found
    assert _words(ROOT / "megatron_vlm/platform/device.py"), "the scan finds nothing at all"


def test_nothing_imports_transformer_engine_or_apex() -> None:
    """Every module of ours imports here, where neither is installed (or, where one is, without asking for it)."""
    for package in ("megatron_vlm", "vlm_kernels"):
        folder = Path(str(importlib.import_module(package).__file__)).parent
        for found in pkgutil.walk_packages([str(folder)], package + "."):
            if found.name == "vlm_kernels._C":
                continue  # operators for torch, no module of Python's
            module = importlib.import_module(found.name)
            imported = {
                name.split(".")[0]
                for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text()))
                if isinstance(node, ast.Import | ast.ImportFrom)
                for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            }
            assert not imported & {"transformer_engine", "apex"}, found.name
