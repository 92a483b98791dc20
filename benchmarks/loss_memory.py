"""Memory of the loss for a vocabulary of 262,144 (Gemma's): chunked and vocabulary-parallel, against the plain one.

    python benchmarks/loss_memory.py [--output FILE.json]

The plain loss is transformers': logits of all tokens, soft-capped in the model's dtype, then cross-entropy in fp32.
Both compute the gradients of hidden states and of the weight.

Counted at 8,192 tokens, on tensors without memory: what forward and backward pass allocate at most beyond hidden
states, weight and both gradients; the chunked loss also as one of eight tensor ranks. Measured at 512 tokens in fp32,
each loss in a process of its own: how far the resident memory grows beyond the same, with chunks of 64 MiB (the default
of 768 would hold all 512 tokens, and without a GPU every step on a chunk makes a copy). Loss and gradients must be
equal there (1e-6, and 1e-5 of the largest value).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]

from benchmarks.figures import commit, write  # noqa: E402
from megatron_vlm.layers.vocab_parallel_loss import Head, linear_cross_entropy  # noqa: E402
from megatron_vlm.parallel.layout import Layout  # noqa: E402
from megatron_vlm.parallel.simulate import simulated_rank  # noqa: E402
from megatron_vlm.planning.recorder import Recorder, fake_tensors  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "loss_memory.json"
VOCABULARY, SOFTCAP = 262_144, 30.0
HIDDEN_SIZE = 2560  # of E4B
COUNTED_TOKENS, MEASURED_TOKENS = 8192, 512
MEASURED_CHUNK_BYTES = 64 * 2**20
MEASURED_HIDDEN_SIZE = 256  # the weight and its gradient would take most of the memory
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any], torch.Tensor]


def chunked(x_SBH: torch.Tensor, weight: torch.Tensor, labels_BS: torch.Tensor, group: Any) -> torch.Tensor:
    """Return the mean loss by this project's head."""
    tokens = labels_BS.numel()
    chunk_bytes = MEASURED_CHUNK_BYTES if tokens == MEASURED_TOKENS else Head.chunk_bytes
    head = Head(VOCABULARY, group, softcap=SOFTCAP, chunk_bytes=chunk_bytes)
    index = torch.arange(tokens)
    return linear_cross_entropy(x_SBH, weight, labels_BS, index, head).mean()


def plain(x_SBH: torch.Tensor, weight: torch.Tensor, labels_BS: torch.Tensor, group: Any) -> torch.Tensor:
    """Return the mean loss as transformers computes it."""
    logits = torch.nn.functional.linear(x_SBH.transpose(0, 1), weight)
    logits = torch.tanh(logits / SOFTCAP) * SOFTCAP
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels_BS.flatten())


def counted_bytes(loss: Loss, dtype: torch.dtype, ranks: int = 1) -> int:
    """Return the most memory of forward and backward pass beyond inputs and gradients."""
    layout = Layout.over(ranks, num_layers=1, tensor_size=ranks)
    with simulated_rank(0, layout) as groups, fake_tensors():
        x_SBH = torch.empty(COUNTED_TOKENS, 1, HIDDEN_SIZE, dtype=dtype, requires_grad=True)
        weight = torch.empty(VOCABULARY // ranks, HIDDEN_SIZE, dtype=dtype, requires_grad=True)
        weight.main_grad = torch.empty(weight.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        labels_BS = torch.zeros(1, COUNTED_TOKENS, dtype=torch.int64)
        recorder = Recorder({groups.tp.group_name: "tensor"})
        with recorder:
            loss(x_SBH, weight, labels_BS, groups.tp).backward()
            gradients = [tensor.grad for tensor in (x_SBH, weight) if tensor.grad is not None]
            return recorder.peak_bytes - recorder.bytes_of(gradients)


def measured(name: str) -> dict[str, Any]:
    """Return the memory, loss and largest gradients of one loss; call it in a fresh process."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    # Capped logits of about ten: the cap bends them.
    x_SBH = torch.randn(MEASURED_TOKENS, 1, MEASURED_HIDDEN_SIZE, generator=generator, requires_grad=True)
    weight = torch.randn(VOCABULARY, MEASURED_HIDDEN_SIZE, generator=generator).mul_(10 / MEASURED_HIDDEN_SIZE**0.5)
    weight.requires_grad_()
    labels_BS = torch.randint(VOCABULARY, (1, MEASURED_TOKENS), generator=generator)
    x_SBH.grad, weight.grad = torch.zeros_like(x_SBH), torch.zeros_like(weight)
    with simulated_rank(0, Layout.over(1, num_layers=1)) as groups:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        loss = LOSSES[name](x_SBH, weight, labels_BS, groups.tp)
        loss.backward()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    sample = torch.randint(VOCABULARY, (4096,), generator=generator)
    return {
        "bytes": grown * 1024,
        "loss": loss.item(),
        "x_gradient": x_SBH.grad.flatten().tolist(),
        "weight_gradient": weight.grad[torch.cat((labels_BS[0], sample))].flatten()[::16].tolist(),
    }


LOSSES: dict[str, Loss] = {"chunked": chunked, "plain": plain}


def main() -> int:
    """Count, measure, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"results (default: {RESULTS.name})")
    parser.add_argument("--measure", choices=LOSSES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(options.measure)))
        return 0
    counted = {
        f"{name}, {str(dtype).removeprefix('torch.')}{', TP8' if ranks > 1 else ''}": counted_bytes(loss, dtype, ranks)
        for dtype in (torch.bfloat16, torch.float32)
        for name, loss, ranks in (("plain", plain, 1), ("chunked", chunked, 1), ("chunked", chunked, 8))
    }
    print(f"counted at {COUNTED_TOKENS:,} tokens, vocabulary {VOCABULARY:,}:")
    for name, count in counted.items():
        print(f"  {name:24s} {count / 1e9:6.2f} GB")
    command = [sys.executable, str(Path(__file__).resolve()), "--measure"]
    results = {
        name: json.loads(subprocess.run([*command, name], check=True, capture_output=True, text=True).stdout)
        for name in LOSSES
    }
    ours, theirs = results["chunked"], results["plain"]
    loss_error = abs(ours["loss"] / theirs["loss"] - 1)
    errors = {name: _error(ours[name], theirs[name]) for name in ("x_gradient", "weight_gradient")}
    print(f"measured at {MEASURED_TOKENS} tokens in fp32:")
    for name, result in results.items():
        print(f"  {name:24s} {result['bytes'] / 1e9:6.2f} GB")
    print(f"  loss differs by {loss_error:.1e}, gradients by {max(errors.values()):.1e}")
    write(
        options.output,
        {
            "torch": torch.__version__,
            "commit": commit(),
            "tokens": COUNTED_TOKENS,
            "vocabulary": VOCABULARY,
            "counted_bytes": counted,
            "measured_tokens": MEASURED_TOKENS,
            "measured_bytes": {name: result["bytes"] for name, result in results.items()},
            "loss_error": loss_error,
            "gradient_errors": errors,
        },
    )
    return 0 if loss_error <= LOSS_TOLERANCE and max(errors.values()) <= GRADIENT_TOLERANCE else 1


def _error(ours: list[float], theirs: list[float]) -> float:
    left, right = torch.tensor(ours), torch.tensor(theirs)
    return ((left - right).abs().max() / right.abs().max()).item()


if __name__ == "__main__":
    sys.exit(main())
