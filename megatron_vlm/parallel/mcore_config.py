"""The settings that megatron-core's layers, schedules and data parallelism ask for."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.parallel.layout import Layout


def build_mcore_config(
    hidden_size: int, num_attention_heads: int, dtype: torch.dtype, layout: Layout, deterministic: bool = False
) -> TransformerConfig:
    """Build a `TransformerConfig` for megatron-core only; our modules read the family's model configuration.

    Two choices guard against silent errors of megatron-core 0.19.2 (tests/distributed/test_megatron_traps.py): virtual
    stages always overlap their sends, because with two pipeline ranks batched sends mix up the two directions, and
    the loss is divided by the number of tokens once, in `finalize_model_grads`.
    """
    interleaved = layout.virtual_size > 1
    return TransformerConfig(
        num_layers=layout.num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        tensor_model_parallel_size=layout.tensor_size,
        pipeline_model_parallel_size=layout.pipeline_size,
        virtual_pipeline_model_parallel_size=layout.virtual_size if interleaved else None,
        sequence_parallel=layout.sequence_parallel and layout.tensor_size > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        transformer_impl="local",
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # required by variable_seq_lengths, also without experts
        gradient_accumulation_fusion=False,  # needs apex
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        batch_p2p_sync=False,  # for an old torch; the host would wait for the device at every exchange
        deallocate_pipeline_outputs=True,
        calculate_per_token_loss=True,
        perform_initialization=False,
        use_cpu_initialization=True,  # parameters are created under our own device context
        add_bias_linear=False,
        deterministic_mode=deterministic,
    )
