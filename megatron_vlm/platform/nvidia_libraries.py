"""What megatron-core must not take from NVIDIA Transformer Engine and apex, which it uses wherever it can import them.

Of what is used here, megatron-core changes with them: Adam (`fused_adam` chooses it), SGD, and the sums of squares of
the gradient norm. All else of theirs in megatron-core's code is behind settings that are off
(`gradient_accumulation_fusion`, `moe_permute_fusion`, `use_te_rng_tracker`, fp8, graphs), or in its own layers.
"""

from __future__ import annotations

import torch


def guard(accelerated: bool) -> None:
    """Put back what megatron-core does without the libraries, where theirs would do something else.

    Args:
        accelerated: whether this process computes on CUDA.
    """
    import megatron.core.optimizer as optimizer
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    # Theirs keeps a momentum of every parameter, in memory and in checkpoints, also where there is none.
    optimizer.SGD = torch.optim.SGD
    if not accelerated:  # their kernels take no other tensors
        clip_grads.multi_tensor_applier = utils.local_multi_tensor_applier
        clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
        clip_grads.multi_tensor_scale_tensor_impl = None
