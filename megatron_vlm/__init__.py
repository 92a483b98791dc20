"""Vision-language models trained natively in parallel on megatron-core's primitives, on CPU and on CUDA."""
