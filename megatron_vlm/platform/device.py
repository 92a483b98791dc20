"""Which device this process computes on, and what depends on that: backend, memory figures, synchronisation.

On CUDA: NCCL and megatron-core as it is. On CPU: gloo, with `megatron_cpu` making megatron-core's own code run.
"""

from __future__ import annotations

import glob
import importlib.util
import logging
import os
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from megatron_vlm.errors import ConfigError
from megatron_vlm.platform import fused_adam, megatron_cpu, single_rank

# megatron-core warns at import and at build of what is missing or deprecated in parts that are not used here.
warnings.filterwarnings("ignore", module=r"megatron\.")
logging.getLogger("megatron").setLevel(logging.ERROR)
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

# Dense bf16 peak by name (NVIDIA data sheets, without sparsity); MFU is not printed for others.
_PEAK_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12}

_PCI_DEVICES = "/sys/bus/pci/devices/*"
_COMPILE_VARIABLE = "TORCHINDUCTOR_COMPILE_THREADS"
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


@dataclass(frozen=True)
class Platform:
    """The device of this process.

    Attributes:
        device: where parameters and activations live.
        backend: torch.distributed backend for it.
        accelerated: true on CUDA.
    """

    device: torch.device
    backend: str
    accelerated: bool

    def leave_process_group(self, failed: bool) -> None:
        """End torch.distributed; after a failure NCCL would first wait for the other ranks, so there exit ends it."""
        if torch.distributed.is_initialized() and not (failed and self.accelerated):
            torch.distributed.destroy_process_group()

    def synchronize(self) -> None:
        """Wait for what the device has been given to do."""
        if self.accelerated:
            torch.cuda.synchronize()

    def mark(self) -> Any:
        """Return a point in time: on CUDA when the device comes to it."""
        if not self.accelerated:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, first: Any, last: Any) -> float:
        """Return the time between two marks, to which the device has come."""
        return first.elapsed_time(last) / 1e3 if self.accelerated else last - first

    def span(self, name: str) -> AbstractContextManager[None]:
        """Return a context that profilers of CUDA show as a named range (NVTX)."""
        return torch.cuda.nvtx.range(name) if self.accelerated else nullcontext()

    def peak_memory_bytes(self) -> int:
        """Return the most memory held so far: allocator peak on CUDA, resident set of the process on CPU."""
        if self.accelerated:
            return torch.cuda.max_memory_allocated()
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def peak_flops(self) -> float | None:
        """Return the dense bf16 FLOP/s of the data sheet, None where unknown."""
        if not self.accelerated:
            return None
        name = torch.cuda.get_device_name()
        return next((peak for key, peak in _PEAK_BF16_FLOPS.items() if key in name), None)

    @property
    def device_name(self) -> str:
        """Name of the device for people."""
        return torch.cuda.get_device_name() if self.accelerated else "CPU"

    @property
    def driver_version(self) -> str | None:
        """Version of the NVIDIA driver, where it says one."""
        path = Path("/sys/module/nvidia/version")
        return path.read_text().strip() if self.accelerated and path.exists() else None

    def use_deterministic_algorithms(self) -> None:
        """Let torch refuse operations whose result depends on timing; call before the first device operation.

        New tensors are not filled first, as torch then does by default: nothing reads what it has not written, and it
        would cost one more operator for each tensor.
        """
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    def profiler_activities(self) -> list[torch.profiler.ProfilerActivity]:
        """Return what `torch.profiler` can record here."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        return activities + ([torch.profiler.ProfilerActivity.CUDA] if self.accelerated else [])


_CURRENT: Platform | None = None


class HostCopy:
    """A tensor on its way to the host, while the device goes on."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copy = tensor.to("cpu", non_blocking=True)  # into pinned memory
        self._arrival = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def wait(self) -> torch.Tensor:
        """Return the tensor on the host once it is there, not waiting for what the device was given later."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._copy


def initialize(device_type: str = "auto") -> Platform:
    """Choose the device and make megatron-core work on it; call once per process, before using megatron-core.

    The CUDA device is the one of LOCAL_RANK, or the only one that Slurm shows a task. Without Transformer Engine and
    apex, megatron-core's distributed optimizer is given an Adam whose state has the layout that it expects
    (`fused_adam`).

    Args:
        device_type: "cuda", "cpu", or "auto": CUDA where the machine has an NVIDIA device.

    Raises:
        ConfigError: CUDA is asked for, or the machine has an NVIDIA device, and torch cannot use it.
    """
    global _CURRENT
    if _CURRENT is not None and device_type in ("auto", _CURRENT.device.type):
        return _CURRENT
    takes_cuda = _takes_cuda(device_type)
    assert _CURRENT is None, f"this process computes on {_CURRENT.device} already"
    if takes_cuda:
        _ask_for_expandable_segments()
        device = torch.device("cuda", _device_number())
        torch.cuda.set_device(device)
        _limit_compile_workers()
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32 in convolutions too, as it does in torch's matmul
        _CURRENT = Platform(device, "nccl", True)
    else:
        megatron_cpu.install()
        single_rank.install()
        _CURRENT = Platform(torch.device("cpu"), "gloo", False)
    if not has_transformer_engine() and importlib.util.find_spec("apex") is None:
        fused_adam.install()
    return _CURRENT


def _device_number() -> int:
    """Return the number of this rank's GPU, among those that its process sees.

    Raises:
        ConfigError: there are fewer GPUs than ranks on this machine.
    """
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank < count:
        return local_rank
    if count == 1 and "SLURM_STEP_GPUS" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0  # srun --gpus-per-task shows each task its own
    raise ConfigError(
        f"rank {os.environ.get('RANK', '0')} is number {local_rank} of its machine, which has {count} GPU"
        + "s" * (count > 1),
        "device",
        "start as many ranks on a machine as it has GPUs",
    )


def _takes_cuda(device_type: str) -> bool:
    """Return whether to compute on CUDA; a machine whose driver is broken must not train on its CPU unasked."""
    if device_type == "cpu":
        return False
    if torch.cuda.is_available():
        return True
    devices = _nvidia_devices()
    if device_type == "auto" and (not devices or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")):
        return False
    asked = "device is cuda" if device_type == "cuda" else f"this machine has an NVIDIA device ({devices[0]})"
    raise ConfigError(
        f"{asked}, but torch {torch.__version__} cannot use CUDA: {_why_cuda_fails()}",
        "device",
        "repair the driver or install a torch that fits it, or set device to cpu",
    )


def _nvidia_devices() -> list[str]:
    """Return traces of NVIDIA devices on this machine, whatever state their driver is in."""
    nodes = sorted(glob.glob("/dev/nvidia[0-9]*"))
    for folder in sorted(glob.glob(_PCI_DEVICES)):
        try:
            vendor, kind = (Path(folder, name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == "0x10de" and kind.startswith(("0x0300", "0x0302")):  # display and 3D controllers
            nodes.append(f"PCI {Path(folder).name}")
    return nodes


def _why_cuda_fails() -> str:
    try:
        torch.cuda.init()
    except Exception as error:  # whatever torch raises is the reason
        return " ".join(str(error).split())
    return "no CUDA device is visible"


def _ask_for_expandable_segments() -> None:
    """Let CUDA memory be held in segments that grow, unless the user has configured the allocator.

    Micro-batches differ in shape, and free blocks of fixed segments that fit no later shape would be lost. torch reads
    the variable when its allocator is first used.
    """
    if not any(name in os.environ for name in _ALLOCATOR_VARIABLES):
        os.environ[_ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def _limit_compile_workers() -> None:
    """Share the machine's cores among its ranks for compilation, unless the user has set the number of workers.

    torch's compiler would start one worker per core, up to 32, in every rank. It has read the variable on import.
    """
    if _COMPILE_VARIABLE not in os.environ:
        from torch._inductor import config

        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        config.compile_threads = max(1, min(32, len(os.sched_getaffinity(0)) // ranks))


def current() -> Platform:
    """Return the platform that `initialize` chose."""
    return initialize()


def has_transformer_engine() -> bool:
    """Return whether NVIDIA Transformer Engine can be imported; nothing here needs it."""
    return importlib.util.find_spec("transformer_engine") is not None
