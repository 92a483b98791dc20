"""What other training stacks call the settings here, for the hint beside an unknown key.

Names are those of Hugging Face's Trainer, axolotl, LLaMA-Factory, ms-swift, Megatron-LM (as `_` or `-`) and torchtitan.
A name that has the same last part here (`--tensor-model-parallel-size`) needs no entry. Dotted names win over their
last part.
"""

from __future__ import annotations

# Our key : its names elsewhere.
_NAMES_OF = {
    "run_dir": "output_dir save_dir logging_dir save dump_folder job.dump_folder checkpoint.folder tensorboard_dir",
    "model.hf_path": (
        "model model_name_or_path base_model model_id model_path pretrained_model_name_or_path hf_assets_path "
        "tokenizer_model tokenizer_path tokenizer_name_or_path tokenizer_config"
    ),
    "model.freeze": (
        "freeze_vision_tower freeze_multi_modal_projector freeze_language_model freeze_vit freeze_llm freeze_aligner "
        "freeze_parameters trainable_parameters unfrozen_parameters freeze_trainable_modules train_mm_proj_only"
    ),
    "model.recompute": (
        "gradient_checkpointing use_gradient_checkpointing recompute_granularity recompute_activations "
        "recompute_method activation_checkpoint.mode ac_mode activation_checkpointing"
    ),
    "model.attention_backend": "flash_attention flash_attn attn_impl attn_implementation use_flash_attn",
    "model.moe_aux_loss_coeff": "router_aux_loss_coef aux_loss_coeff moe_aux_loss_coef",
    "model.moe_load_balancing": "moe_router_load_balancing_type output_router_logits",
    "data.train": (
        "dataset datasets train_file train_data data_path data_paths dataset_dir training.dataset dataset_path "
        "train_data_path data_files"
    ),
    "data.valid": "eval_dataset test_datasets val_dataset valid_data_path validation_file validation.dataset",
    "data.seq_length": (
        "sequence_len max_seq_length max_seq_len seq_len cutoff_len max_length model_max_length "
        "max_position_embeddings training.seq_len max_tokens"
    ),
    "data.packing": "sample_packing neat_packing padding_free",
    "data.too_long": "truncation_strategy excess_length_strategy truncate",
    "data.min_pixels": "image_min_pixels",
    "data.max_pixels": "image_max_pixels",
    "data.num_workers": "dataloader_num_workers preprocessing_num_workers dataset_num_proc dataset_processes",
    "data.shuffle": "train_dataset_shuffle dataset_shuffle shuffle_dataset shuffle_merged_datasets",
    "train.train_iters": (
        "max_steps num_train_steps total_steps steps training.steps num_training_steps max_train_steps train_samples"
    ),
    "train.global_batch_size": "batch_size train_batch_size total_batch_size",
    "train.micro_batch_size": (
        "per_device_train_batch_size per_device_eval_batch_size per_gpu_train_batch_size local_batch_size "
        "eval_batch_size"
    ),
    "train.precision": "bf16 fp16 tf32 fp32 mixed_precision torch_dtype dtype training.dtype params_dtype fp8",
    "train.eval_interval": "eval_steps eval_strategy evaluation_strategy validation.freq evals_per_epoch",
    "train.eval_iters": "validation.steps max_eval_samples",
    "train.log_interval": "logging_steps log_freq metrics.log_freq",
    "train.deterministic": "full_determinism deterministic_mode use_deterministic_algorithms",
    "train.exit_interval": "exit_duration_in_mins",
    "train.seed": "data_seed random_seed",
    "optimizer.name": "optim optimizer optimizer_type optimizer_name",
    "optimizer.lr": "learning_rate base_lr max_lr peak_lr",
    "optimizer.min_lr": "min_lr_ratio cosine_min_lr_ratio lr_scheduler.min_lr_factor learning_rate_min",
    "optimizer.betas": "adam_beta1 adam_beta2 beta1 beta2 adam_betas",
    "optimizer.eps": "adam_eps adam_epsilon epsilon",
    "optimizer.clip_grad": "max_grad_norm gradient_clipping training.max_norm max_norm grad_clip gradient_clip_val",
    "optimizer.schedule": (
        "lr_scheduler lr_scheduler_type lr_decay_style scheduler scheduler_type lr_scheduler.decay_type"
    ),
    "optimizer.warmup_iters": (
        "warmup_steps lr_warmup_iters lr_scheduler.warmup_steps num_warmup_steps warmup warmup_ratio "
        "lr_warmup_fraction lr_warmup_samples"
    ),
    "optimizer.wsd_decay_iters": "lr_wsd_decay_iters num_decay_steps lr_scheduler.decay_ratio",
    "optimizer.lr_multipliers": "vit_lr aligner_lr vision_tower_lr mm_projector_lr mm_vision_tower_lr merger_lr",
    "checkpoint.save_interval": "save_steps save_strategy saves_per_epoch checkpoint.interval save_freq",
    "checkpoint.load": "resume_from_checkpoint pretrained_checkpoint initial_load_path checkpoint_path load_path",
    "checkpoint.keep_last": "save_total_limit keep_latest_k checkpoint.keep_latest_k max_to_keep",
    "checkpoint.async_save": "async_mode checkpoint.async_mode",
    "checkpoint.export_hf": "hub_model_id export_dir save_safetensors merge_and_export",
    "logging.wandb": "wandb_project wandb_entity wandb_name use_wandb enable_wandb metrics.enable_wandb report_to",
    "logging.tensorboard": "use_tensorboard enable_tensorboard metrics.enable_tensorboard",
    "logging.profile": "profile_step_start profile_step_end enable_profiling profiling.enable_profiling profile_freq",
    "parallel.tensor_model_parallel_size": "tp tp_size tensor_parallel_size tensor_parallel_degree tensor_parallel",
    "parallel.pipeline_model_parallel_size": "pp pp_size pipeline_parallel_size pipeline_parallel_degree",
    "parallel.virtual_pipeline_model_parallel_size": (
        "vpp vpp_size num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank"
    ),
    "parallel.pipeline_layout": (
        "pipeline_model_parallel_layout decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers "
        "pipeline_parallel_split_points"
    ),
    "parallel.vision_pipeline_layout": "encoder_pipeline_model_parallel_size",
    "parallel.context_parallel_size": "cp cp_size context_parallel_degree sequence_parallel_degree",
    "parallel.expert_model_parallel_size": "ep ep_size expert_parallel_size expert_parallel_degree",
    "parallel.expert_tensor_parallel_size": "etp etp_size expert_tensor_parallel_degree",
    "parallel.use_distributed_optimizer": "zero_stage zero_optimization data_parallel_shard_degree",
    "parallel.distributed_timeout_minutes": "ddp_timeout init_timeout_seconds comm.init_timeout_seconds nccl_timeout",
}
ALIASES = {name: key for key, names in _NAMES_OF.items() for name in names.split()}

_BATCH = "set train.global_batch_size (rows per step) and train.micro_batch_size; the number of micro-batches follows"
_SHARDING = "remove it; optimizer states are sharded by parallel.use_distributed_optimizer, which is on by default"
_LENGTH = "set train.train_iters: steps = epochs x rows / train.global_batch_size"
_TEMPLATE = "the chat template is that of the model directory (model.hf_path)"
_ALL_RANKS = "remove it; the data-parallel size is the number of ranks over tensor x pipeline"
_ADAPTERS = "adapters are not built; model.freeze trains only parts of a model"
_RESUMES = "remove it; starting again with the same run_dir resumes"
_SPLIT = "list held-out files under data.valid"

# What has no key here, and what to do instead.
WITHOUT_KEY = {
    **dict.fromkeys(("gradient_accumulation_steps", "gradient_accumulation", "num_microbatches"), _BATCH),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "zero3", "fsdp_version", "deepspeed_config"), _SHARDING),
    **dict.fromkeys(("num_train_epochs", "num_epochs", "epochs", "max_epochs"), _LENGTH),
    **dict.fromkeys(("template", "chat_template", "prompt_template", "conversation_template"), _TEMPLATE),
    **dict.fromkeys(("data_parallel_size", "data_parallel_replicate_degree", "dp", "dp_size"), _ALL_RANKS),
    **dict.fromkeys(("adapter", "lora_r", "lora_rank", "lora_alpha", "lora_target", "target_modules"), _ADAPTERS),
    **dict.fromkeys(("finetuning_type", "train_type", "tuner_type", "lora_dropout", "load_in_4bit"), _ADAPTERS),
    **dict.fromkeys(("overwrite_output_dir", "auto_resume_from_checkpoints"), _RESUMES),
    **dict.fromkeys(("val_set_size", "val_size", "split", "split_dataset_ratio", "test_size"), _SPLIT),
    **dict.fromkeys(
        ("do_train", "do_eval", "stage", "trainer_type"), "remove it; a run trains, and evaluates data.valid"
    ),
    "trust_remote_code": "remove it; no code of a model directory is ever run",
}
