"""The run field that each command-line option sets."""

from __future__ import annotations

from collections.abc import Iterable

# Options that set exactly one field.
FIELDS = {
    "model": "model",
    "gpus": "parallelism.world",
    "batch_size": "batch.micro",
    "seq_len": "batch.sequence",
    "target_len": "batch.target_sequence",
    "objective": "objective",
    "grad_accum": "batch.accumulation",
    "images": "batch.images",
    "new_tokens": "batch.new_tokens",
    "cache_implementation": "generation.cache_implementation",
    "cache_backend": "generation.cache_config.backend",
    "cache_bits": "generation.cache_config.nbits",
    "cache_group_size": "generation.cache_config.q_group_size",
    "cache_residual": "generation.cache_config.residual_length",
    "prefill_chunk_size": "generation.prefill_chunk_size",
    "num_beams": "generation.num_beams",
    "do_sample": "generation.do_sample",
    "assistant_model": "generation.assistant_model",
    "assistant_dtype": "generation.assistant_dtype",
    "assistant_quant_format": "generation.assistant_quantization.format",
    "num_assistant_tokens": "generation.num_assistant_tokens",
    "num_assistant_tokens_schedule": "generation.num_assistant_tokens_schedule",
    "prompt_lookup_num_tokens": "generation.prompt_lookup_num_tokens",
    "assistant_early_exit": "generation.assistant_early_exit",
    "eval_batch_size": "also.evaluation.micro",
    "eval_seq_len": "also.evaluation.sequence",
    "eval_keep_logits": "also.evaluation.kept_batches",
    "eval_accumulation_steps": "also.evaluation.accumulation",
    "eval_preprocess": "also.evaluation.preprocess",
    "eval_generate": "also.evaluation.new_tokens",
    "merge": "also.merging",
    "rank": "method.rank",
    "lora_dropout": "method.dropout",
    "trainable_layers": "method.trainable_layers",
    "quant_format": "method.quantization.format",
    "double_quant": "method.quantization.double_quant",
    "quant_storage": "method.quantization.storage",
    "optimizer": "optimizer.name",
    "foreach": "optimizer.foreach",
    "in_backward": "optimizer.in_backward",
    "attention": "kernels.attention",
    "reentrant": "kernels.reentrant",
    "loss": "kernels.loss",
    "hold_outputs": "loop.hold_outputs",
    "padded": "loop.padded",
    "trainer": "loop.trainer",
    "expandable_segments": "loop.expandable_segments",
    "tp": "parallelism.tp",
    "sequence_parallel": "parallelism.sequence_parallel",
    "pp": "parallelism.pp",
    "gpus_per_node": "parallelism.gpus_per_node",
    "stage": "parallelism.stage",
    "virtual_stages": "parallelism.virtual_stages",
    "schedule": "parallelism.schedule",
    "first_stage_layers": "parallelism.first_stage_layers",
    "last_stage_layers": "parallelism.last_stage_layers",
    "ends_as_layers": "parallelism.ends_as_layers",
    "device_map": "parallelism.device_map",
    "cp": "parallelism.cp",
    "ep": "parallelism.ep",
    "stored": "serving.weights",
    "max_model_len": "serving.max_model_len",
    "max_num_seqs": "serving.max_num_seqs",
    "max_num_batched_tokens": "serving.max_num_batched_tokens",
    "memory_utilization": "serving.memory_utilization",
    "block_size": "serving.block_size",
    "cache_dtype": "serving.cache_dtype",
    "cuda_graphs": "serving.cuda_graphs",
    "prefix_caching": "serving.prefix_caching",
    "gpu_layers": "serving.gpu_layers",
    "split_mode": "serving.split_mode",
    "main_gpu": "serving.main_gpu",
    "dp_attention": "serving.dp_attention",
    "limit_images": "serving.limit_images",
    "limit_videos": "serving.limit_videos",
    "lora_slots": "serving.lora_slots",
    "lora_rank": "serving.lora_rank",
    "lora_cpu_slots": "serving.lora_cpu_slots",
    "speculative_method": "serving.speculative_method",
    "draft_model": "serving.draft_model",
    "draft_weights": "serving.draft_weights",
    "num_speculative_tokens": "serving.num_speculative_tokens",
    "profile": "profile",
}

# Options that set several fields or are parsed first, and the field that errors about them name.
WORDS = {
    "method": "method.kind",
    "targets": "method.targets",
    "modules_to_save": "method.modules_to_save",
    "frozen": "method.frozen",
    "image_size": "batch.image_size",
    "kbit_preparation": "method.quantization.kbit_preparation",
    "dtype": "precision.weights",
    "precision": "precision",
    "gradient_checkpointing": "kernels.checkpointing",
    "checkpointing": "kernels.checkpointing",
    "fused": "kernels.fused",
    "zero": "parallelism.strategy",
    "deepspeed": "parallelism.zero",
    "save": "also.saving",
    "tensor_split": "serving.tensor_split",
    "fsdp": "parallelism.strategy",
    "offload": "parallelism.offload",
}


def option_of(field: str, given: Iterable[str]) -> str:
    """Return the option among `given` that sets `field` or a part of it, or "" if none does."""
    if field == "task" and "method" in given:  # --method generate and --method forward set the task
        return "--method"
    for name in given:
        path = FIELDS.get(name) or WORDS.get(name) or name
        if name != "model" and (path == field or path.startswith(f"{field}.")):
            return "--" + name.replace("_", "-")
    return ""
