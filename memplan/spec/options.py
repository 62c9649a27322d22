"""The command-line options that set a field of a run, a row each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from memplan.core.records import NamedTuple
from memplan.models.peft_methods import PEFT_METHODS
from memplan.spec.option_values import (
    TRAINERS,
    kbit_preparation,
    listed,
    method_word,
    names,
    pixels,
    proportions,
    role_model,
    saving,
    settings,
    tokens,
    trainer_word,
)


class Option(NamedTuple):
    """A command-line option. Its type, choices and default are those of the field, if it sets one.

    field        dotted path of the run's field that it sets, and that errors about it name; empty if it sets none
    help         what it does. `{choices}` stands for the choices. The default follows, unless the text has its own
    type         type of its value, if not that of the field; `list[...]` for an option that is repeated
    choices      words that the shell completes, if not those of the field
    parse        turns its text into the field's value; an option without one has the field's type
    metavar      name of its value in help, if not the type
    completes    option whose names the shell completes, if not its own
    combined     whether the command reads it together with other options, instead of setting its field alone
    is_argument  whether it is typed without its name
    is_required  whether it must be given
    aliases      other tools' names for it, with underscores
    spelling     turns what people type into the option's own words: `4k` into 4096
    alone        its values if it is typed without one, and so with --no-; None if it always has a value
    """

    field: str
    help: str
    type: Any = None
    choices: tuple[str, ...] = ()
    parse: Callable[[Any], Any] | None = None
    metavar: str | None = None
    completes: str = ""
    combined: bool = False
    is_argument: bool = False
    is_required: bool = False
    aliases: tuple[str, ...] = ()
    spelling: Callable[[str], str] | None = None
    alone: tuple[str, str] | None = None


MODEL = Option(
    "model",
    "A card's name (qwen2-7b), a Hugging Face id, or the path of a config.json, its folder, or a GGUF file.",
    metavar="MODEL",
    is_argument=True,
    aliases=("base_model", "model_name_or_path"),
)


def _role(role: str, what: str) -> Option:
    """Return the option that names another model of a trainer's step."""
    text = f"{what}: a model as for MODEL, and settings after commas, as in qwen2-7b,format=nf4 or qwen2-7b,dtype=fp32."
    return Option(f"roles.{role}", text, type=str, parse=role_model, metavar="MODEL")


# Heading in help -> name on the command line, with underscores -> option.
OPTIONS: dict[str, dict[str, Option]] = {
    "Model": {"model": MODEL},
    "Training": {
        "method": Option(
            "method.kind",
            "full, lora, qlora, dora, qdora, freeze, or another of peft's methods by its name: "
            f"{', '.join(PEFT_METHODS)}; for inference generate or forward.",
            choices=("full", "lora", "qlora", "dora", "qdora", "freeze", *PEFT_METHODS, "generate", "forward"),
            combined=True,
            aliases=("finetuning_type",),
            spelling=method_word,
        ),
        "objective": Option(
            "objective",
            "Training objective, which decides head and loss: {choices}. Default from the config's architectures.",
        ),
        "batch_size": Option(
            "batch.micro",
            "Sequences per GPU and pass.",
            aliases=("batch", "bs", "bsz", "per_device_train_batch_size", "micro_batch_size"),
        ),
        "seq_len": Option(
            "batch.sequence",
            "Tokens per sequence.",
            aliases=(
                *("context", "ctx", "cutoff_len", "max_length", "max_seq_len", "max_seq_length"),
                *("model_max_length", "num_ctx", "seq", "seq_length", "sequence_len", "sequence_length"),
            ),
            spelling=tokens,
        ),
        "target_len": Option(
            "batch.target_sequence",
            "Decoder tokens of an encoder-decoder. Default the encoder's length, or Whisper's positions; 1 when "
            "generating (4 for Whisper).",
            aliases=("max_target_length",),
            spelling=tokens,
        ),
        "grad_accum": Option(
            "batch.accumulation",
            "Passes per optimizer step.",
            aliases=("ga", "grad_acc", "gradient_accumulation", "gradient_accumulation_steps"),
        ),
        "images": Option("batch.images", "Images in each sequence; their tokens count towards --seq-len."),
        "frames": Option("batch.frames", "Frames of a video in each sequence, instead of images; their tokens count."),
        "image_size": Option(
            "batch.image_size",
            "Pixels of an image or frame: 1024, or height x width as 768x1024. Default the vision tower's size.",
            parse=pixels,
        ),
        "clips": Option("batch.clips", "Audio clips in each sequence; their tokens count towards --seq-len."),
        "clip_seconds": Option("batch.clip_seconds", "Seconds of each clip. Default the audio encoder's window, 30."),
        "frozen": Option(
            "method.frozen",
            "Parts that neither train nor get adapters, comma-separated: vision, audio, projector, language.",
            parse=listed,
            choices=("vision", "audio", "projector", "language"),
        ),
        "gradient_checkpointing": Option(
            "kernels.checkpointing",
            "Keep only each layer's input and recompute the rest in backward. Default on.",
            type=bool,
            combined=True,
        ),
        "compile": Option("kernels.compile", "Run with torch.compile. Default off.", aliases=("torch_compile",)),
        "checkpointing": Option(
            "kernels.checkpointing",
            "Kind of checkpointing: none, full, selective (keeps products and attention), or offload (layer inputs in "
            "host memory). Default full.",
            choices=("none", "full", "selective", "offload"),
            combined=True,
        ),
        "every_n_layers": Option("kernels.every_n_layers", "Checkpoint only one of every n layers."),
        "trainable_layers": Option("method.trainable_layers", "Last layers that --method freeze trains."),
        "offload": Option(
            "parallelism.offload",
            "What is kept in host memory: optimizer (with its step), parameters (FSDP, with the optimizer, or ZeRO "
            "3), activations (all that autograd saves); none overrides the file. Default none.",
            choices=("optimizer", "parameters", "activations", "none"),
            combined=True,
        ),
        "hold_outputs": Option("loop.hold_outputs", "The script keeps the model's outputs through the backward pass."),
        "packing": Option(
            "batch.packing",
            "How sequences are packed into rows, as the profile's framework names it: {choices}. padding_free joins "
            "those of a batch; knapsack and binpack are `packing` of LLaMA-Factory and of ms-swift.",
            aliases=("packing_strategy",),
        ),
        "lengths": Option(
            "batch.lengths",
            "Token counts of the sequences: a file (a column, CSV or JSON lines), max, or p50=700,p99=3800,max=8192. "
            "The answer is then for the longest batch that can occur; --seq-len is what they are cut to. Default all "
            "equal.",
        ),
        "batching": Option(
            "batch.batching",
            "How sequences of --lengths come into batches: {choices}; `grouped` by length, `padded` to the maximum. "
            "Default what a run's file says, or packed with --packing, or random.",
        ),
        "padded": Option("loop.padded", "Batches are padded, and so have an attention mask."),
        "trainer": Option(
            "trainer",
            "A trainer of TRL: {choices}. Alone it says that the loop is transformers' Trainer, which keeps embedding "
            "states in fp32 with bitsandbytes' 8-bit optimizers. Default a loop of one's own.",
            choices=TRAINERS,
            combined=True,
            aliases=("rl", "rlhf_type"),
            spelling=trainer_word,
            alone=("on", "off"),
        ),
        "reference": Option(
            "reference",
            "Reference model: {choices}. Default adapters if the method has them, else copy; none with grpo.",
        ),
        "teacher": _role("teacher", "Teacher of --trainer gkd or distill"),
        "reward_model": _role("reward", "Model that scores completions, with --trainer grpo, rloo or ppo"),
        "value_model": _role(
            "value", "Model that predicts scores, with --trainer ppo. Default like the reward model's"
        ),
        "reference_model": _role("reference", "Reference model that is no copy of the trained one"),
        "expandable_segments": Option(
            "loop.expandable_segments", "Use expandable segments in torch's allocator (PYTORCH_CUDA_ALLOC_CONF)."
        ),
        "sync_each_batch": Option(
            "loop.sync_each_batch", "Reduce gradients in every pass of a step (accelerate's sync_each_batch)."
        ),
    },
    "Evaluation, saving and merging": {
        "eval_batch_size": Option(
            "also.evaluation.micro",
            "Also count an evaluation, with this many sequences per GPU and pass (per_device_eval_batch_size). "
            "Default none; 8 with another --eval option.",
            aliases=("per_device_eval_batch_size",),
        ),
        "eval_seq_len": Option(
            "also.evaluation.sequence",
            "Tokens per sequence of an evaluation. Default --seq-len.",
            spelling=tokens,
        ),
        "eval_keep_logits": Option(
            "also.evaluation.kept_batches",
            "Batches whose logits are kept on the GPU, as for compute_metrics. Default 0: only the loss.",
        ),
        "eval_accumulation_steps": Option(
            "also.evaluation.accumulation", "Batches after which kept logits move to the host. Default after the last."
        ),
        "eval_preprocess": Option(
            "also.evaluation.preprocess",
            "argmax keeps the likeliest tokens instead of logits (preprocess_logits_for_metrics). Default logits.",
        ),
        "eval_generate": Option(
            "also.evaluation.new_tokens", "Tokens generated after each evaluated sequence (predict_with_generate)."
        ),
        "save": Option("also.saving", "Also count saving a checkpoint. Default off.", parse=saving, type=bool),
        "merge": Option(
            "also.merging",
            "Also count merging the adapters: into the trained model, or into one reloaded for it.",
            choices=("trained", "reloaded"),
        ),
    },
    "Generation": {
        "new_tokens": Option(
            "batch.new_tokens",
            "Tokens generated after a --seq-len prompt. Default 256, with --method generate; TRL's longest completion "
            "with --trainer grpo or rloo.",
            aliases=("max_new_tokens", "max_completion_length", "max_tokens"),
            spelling=tokens,
        ),
        "rollout": Option(
            "rollout",
            "What generates with --trainer grpo, rloo or distill: {choices}. colocate is vLLM with a share of --gpu "
            "(--gpu-memory-utilization, 0.3, or Unsloth's 0.5), server one on other GPUs.",
        ),
        "sleep": Option("serving.sleep", "--rollout colocate: vLLM frees weights and cache while the step trains."),
        "generations": Option(
            "batch.generations",
            "Completions of each prompt, with --trainer grpo or rloo. Default 8, or 2 with rloo.",
            aliases=("num_generations",),
        ),
        "rollout_tp": Option("serving.tensor_parallel", "--rollout colocate: GPUs that share one vLLM. Default 1."),
        "entropy_bonus": Option("loop.entropy_bonus", "GRPO's loss rewards entropy (entropy_coef). Default off."),
        "score_batch_size": Option(
            "batch.scored", "Completions scored at once before a step of grpo or rloo. Default --batch-size."
        ),
        "cache_implementation": Option(
            "generation.cache_implementation",
            "KV cache: dynamic, static, quantized, offloaded, offloaded_static, legacy. Default the profile's.",
            choices=("dynamic", "static", "quantized", "offloaded", "offloaded_static", "legacy"),
        ),
        "cache_backend": Option(
            "generation.cache_config.backend",
            "Backend of a quantized cache: quanto (2 or 4 bits), hqq (1, 2, 3, 4, 8) or fp8.",
        ),
        "cache_bits": Option(
            "generation.cache_config.nbits", "Bits per number of a quantized cache (nbits). Default 4."
        ),
        "cache_group_size": Option(
            "generation.cache_config.q_group_size", "Numbers per scale of a quantized cache (q_group_size). Default 64."
        ),
        "cache_residual": Option(
            "generation.cache_config.residual_length",
            "Most recent tokens that a quantized cache keeps unquantised (residual_length). Default 128.",
        ),
        "prefill_chunk_size": Option(
            "generation.prefill_chunk_size",
            "Prompt tokens read in one pass. Default all.",
            spelling=tokens,
        ),
        "num_beams": Option("generation.num_beams", "Beams per prompt."),
        "do_sample": Option(
            "generation.do_sample", "Sample with temperature, top-k and top-p instead of greedy decoding."
        ),
        "assistant_model": Option(
            "generation.assistant_model", "Smaller model that proposes tokens, which the model verifies in one pass."
        ),
        "assistant_dtype": Option(
            "generation.assistant_dtype", "Dtype of the assistant's weights: {choices}. Default the model's."
        ),
        "assistant_quant_format": Option(
            "generation.assistant_quantization.format",
            "Weight format of the assistant, as for --quant-format. Default not quantised.",
        ),
        "num_assistant_tokens": Option(
            "generation.num_assistant_tokens", "Tokens that an assistant proposes in a round. Default 20."
        ),
        "num_assistant_tokens_schedule": Option(
            "generation.num_assistant_tokens_schedule",
            "How the number of proposed tokens changes: {choices}. Default constant.",
        ),
        "prompt_lookup_num_tokens": Option(
            "generation.prompt_lookup_num_tokens",
            "Tokens proposed in a round by prompt lookup, without an assistant. Default 0.",
        ),
        "assistant_early_exit": Option(
            "generation.assistant_early_exit", "First layers of the model that propose tokens in place of an assistant."
        ),
    },
    "Adapters and quantisation": {
        "rank": Option(
            "method.rank",
            "Rank of the adapters.",
            aliases=("lora_r", "r"),
        ),
        "targets": Option(
            "method.targets",
            "all-linear, default (peft's choice for the model), comma-separated module names, or a regular expression "
            "of their paths. Default all-linear, or default for methods other than LoRA.",
            parse=names,
            aliases=("lora_target", "lora_target_modules", "target_modules"),
        ),
        "peft_options": Option(
            "method.options",
            "Other settings of the method, by peft's names, comma-separated; values are JSON or words: "
            "bias=all,layers_to_transform=[0,1].",
            type=str,
            parse=settings,
        ),
        "lora_dropout": Option("method.dropout", "Dropout before adapters, 0 to 1."),
        "modules_to_save": Option(
            "method.modules_to_save",
            "Comma-separated names of modules that train in full.",
            parse=names,
            aliases=("additional_target", "lora_modules_to_save"),
        ),
        "quant_format": Option(
            "method.quantization.format",
            "Format of quantised weights: nf4, fp4, int8, gptq-int4, gptq-int8, awq-int4, fp8, hqq-int4, "
            "torchao-int8; for inference also w4a16, fp8-channel, mxfp4 and others. Default nf4, or the format of a "
            "quantised checkpoint.",
            aliases=("bnb_4bit_quant_type",),
        ),
        "double_quant": Option("method.quantization.double_quant", "Also quantise the quantisation scales."),
        "quant_storage": Option(
            "method.quantization.storage", "The dtype 4-bit weights are stored in: uint8, or bf16, fp16, fp32 for FSDP."
        ),
        "quantize_experts": Option(
            "method.quantization.experts",
            "Also quantise experts that are stacked in one parameter, as Axolotl's quantize_moe_experts does. Default "
            "the profile's: on in Unsloth's, off in others.",
            aliases=("quantize_moe_experts",),
        ),
        "kbit_preparation": Option(
            "method.quantization.kbit_preparation",
            "Casts of prepare_model_for_kbit_training: true, false, trl (embeddings, head and adapters cast back, "
            "as TRL does), axolotl (norms cast back, embeddings and head not cast) or axolotl-0.12 (norms, embeddings "
            "and head cast back). Default true.",
            parse=kbit_preparation,
        ),
    },
    "Precision and optimizer": {
        "dtype": Option(
            "precision.weights",
            "Weights: {choices}.",
            combined=True,
            aliases=("torch_dtype",),
        ),
        "precision": Option(
            "precision",
            "pure (all in --dtype), amp (fp32 weights, autocast to --dtype), autocast (weights in --dtype, autocast "
            "too, as a Trainer's bf16 over bf16 weights), mixed (weights and gradients in --dtype, fp32 masters and "
            "states). Default pure.",
            choices=("pure", "amp", "autocast", "mixed"),
            combined=True,
        ),
        "optimizer": Option(
            "optimizer.name",
            "A name from transformers' OptimizerNames, or none. Default adamw_torch_fused.",
            aliases=("optim",),
        ),
        "foreach": Option(
            "optimizer.foreach",
            "torch's optimizers step all parameters in lists, not one at a time. Default on if torch supports both.",
        ),
        "in_backward": Option(
            "optimizer.in_backward",
            "Step each parameter in backward as soon as its gradient is ready; without clipping, and with "
            "--grad-accum 1.",
        ),
    },
    "Kernels": {
        "attention": Option(
            "kernels.attention", "{choices}. Default sdpa, else eager.", aliases=("attn_implementation",)
        ),
        "loss": Option(
            "kernels.loss",
            "hf, chunked, fused (with the head's matrix product, as in Liger and Cut Cross-Entropy), chunked_lm_head "
            "(LitGPT), chunked_nll and chunked_nll_fp32 (TRL 1.13 and 1.6), tiled_lm_head (TRL 1.15), fused_chunks "
            "(Unsloth 2026), label_smoothing (transformers' Trainer). Default the profile's.",
        ),
        "fused": Option("kernels.fused", "Comma-separated fused kernels: {choices}.", parse=listed),
        "packages": Option("kernels.packages", "Installed packages with kernels to use: {choices}.", parse=listed),
        "reentrant": Option("kernels.reentrant", "Use torch's reentrant checkpointing. Default the profile's."),
        "profile": Option(
            "profile", "Framework and version that fill in defaults (vllm: its newest); memplan profiles lists them."
        ),
    },
    "Serving engines": {
        "stored": Option(
            "serving.weights", "Weight format: fp8, w4a16, awq-int4, or a GGUF type. Default the checkpoint's."
        ),
        "max_model_len": Option(
            "serving.max_model_len",
            "Most tokens of a request that the engine admits. Default the model's positions.",
            aliases=("context_length", "ctx_size"),
            spelling=tokens,
        ),
        "max_num_seqs": Option(
            "serving.max_num_seqs",
            "Most requests in a step; llama.cpp's slots. Default the engine's for the card.",
            aliases=("max_running_requests",),
        ),
        "max_num_batched_tokens": Option(
            "serving.max_num_batched_tokens",
            "Most tokens in a step: SGLang's chunked prefill size, llama.cpp's ubatch. Default the engine's.",
            spelling=tokens,
        ),
        "memory_utilization": Option(
            "serving.memory_utilization",
            "Share of the card's memory (gpu_memory_utilization, mem_fraction_static). Default the engine's.",
            aliases=("gpu_memory_utilization", "mem_fraction_static"),
        ),
        "block_size": Option("serving.block_size", "Tokens per cache block. Default the engine's."),
        "cache_dtype": Option(
            "serving.cache_dtype",
            "Dtype of an engine's KV cache, by the engine's names: fp8, nvfp4, q8_0 and others. Default the model's "
            "dtype.",
            aliases=("kv_cache_dtype",),
        ),
        "cuda_graphs": Option("serving.cuda_graphs", "Capture decoding steps in CUDA graphs. Default on."),
        "prefix_caching": Option("serving.prefix_caching", "Keep cache blocks of earlier requests. Default on."),
        "gpu_layers": Option(
            "serving.gpu_layers", "Layers on the card; the head counts as one more (llama.cpp). Default all."
        ),
        "n_cpu_moe": Option(
            "serving.n_cpu_moe",
            "First layers whose experts stay on the host (llama.cpp). Default 0.",
            aliases=("ncmoe",),
        ),
        "override_tensor": Option(
            "serving.override_tensor",
            "PATTERN=BUFFER, separated by commas: tensors to keep on the CPU or a card, as in exps=CPU (llama.cpp). "
            "Default none.",
            parse=listed,
            aliases=("ot",),
        ),
        "split_mode": Option(
            "serving.split_mode",
            "How llama.cpp divides a model over GPUs: layer (some layers on each) or none (all on one). Default layer.",
        ),
        "tensor_split": Option(
            "serving.tensor_split",
            "Proportions of the layers on llama.cpp's GPUs, as in 3,1. Default equal parts.",
            parse=proportions,
        ),
        "main_gpu": Option(
            "serving.main_gpu", "GPU that has all layers with --split-mode none (llama.cpp). Default 0."
        ),
        "dp_attention": Option(
            "serving.dp_attention",
            "Attention is data parallel over --gpus, and everything else tensor parallel (SGLang). Default off.",
        ),
        "limit_images": Option(
            "serving.limit_images", "Most images per request (vLLM's limit_mm_per_prompt). Default no limit."
        ),
        "limit_videos": Option(
            "serving.limit_videos", "Most videos per request (vLLM's limit_mm_per_prompt). Default no limit."
        ),
        "lora_slots": Option("serving.lora_slots", "Most adapters in a step (vLLM's max_loras). Default 0."),
        "lora_rank": Option("serving.lora_rank", "Largest rank of those adapters. Default 16."),
        "lora_cpu_slots": Option(
            "serving.lora_cpu_slots", "Adapters in host memory (vLLM's max_cpu_loras). Default --lora-slots."
        ),
        "speculative_method": Option(
            "serving.speculative_method",
            "Speculative decoding: {choices}. Default none, or draft_model if one is named.",
        ),
        "draft_model": Option(
            "serving.draft_model", "Smaller model that proposes tokens, or the config of an EAGLE head."
        ),
        "draft_weights": Option(
            "serving.draft_weights", "Weight format of the draft model. Default the model's dtype."
        ),
        "num_speculative_tokens": Option(
            "serving.num_speculative_tokens", "Tokens proposed per step. Default the engine's."
        ),
    },
    "GPUs": {
        "gpu": Option(
            "gpu",
            "A card's name (3090, a800, h100); repeat it to compare cards. Default none: lists every card that holds "
            "the run.",
            type=list[str],
            metavar="NAME",
            combined=True,
        ),
    },
    "Several GPUs": {
        "gpus": Option(
            "parallelism.world",
            "Total number of GPUs.",
            aliases=("n_gpus", "nproc_per_node", "num_gpus", "num_processes"),
        ),
        "use_distributed_optimizer": Option(
            "parallelism.strategy", "Megatron's distributed optimizer. Default off.", type=bool, combined=True
        ),
        "zero": Option(
            "parallelism.strategy",
            "DeepSpeed's ZeRO stage, 1 to 3; 0 for DDP.",
            type=int,
            combined=True,
            aliases=("zero_stage",),
        ),
        "deepspeed": Option(
            "parallelism.zero",
            "A DeepSpeed config, for its ZeRO stage, buckets, offload, precision and batch; options override it. "
            "Default none.",
            metavar="FILE",
            combined=True,
        ),
        "accelerate": Option(
            "parallelism.strategy",
            "accelerate's config file, for its processes, FSDP or DeepSpeed; options override it. Default none.",
            metavar="FILE",
            combined=True,
        ),
        "fsdp": Option(
            "parallelism.strategy",
            "full_shard, shard_grad_op, hybrid_shard, no_shard, fsdp2.",
            choices=("full_shard", "shard_grad_op", "hybrid_shard", "no_shard", "fsdp2"),
            combined=True,
        ),
        "find_unused_parameters": Option(
            "parallelism.find_unused_parameters",
            "DDP ranks look for weights without gradients. Default as the trainer does.",
            aliases=("ddp_find_unused_parameters",),
        ),
        "tp": Option("parallelism.tp", "Tensor-parallel GPUs.", aliases=("tensor_parallel", "tensor_parallel_size")),
        "sequence_parallel": Option(
            "parallelism.sequence_parallel", "Tensor-parallel GPUs also divide the tokens between matrix products."
        ),
        "pp": Option("parallelism.pp", "Pipeline stages.", aliases=("pipeline_parallel_size",)),
        "virtual_stages": Option("parallelism.virtual_stages", "Chunks of layers per stage, interleaved by 1F1B."),
        "schedule": Option(
            "parallelism.schedule",
            "Pipeline schedule of the --grad-accum microbatches: 1f1b, gpipe, or device_map (as in transformers, one "
            "GPU after another). Default the profile's.",
        ),
        "first_stage_layers": Option(
            "parallelism.first_stage_layers", "Layers on the first stage. Default the profile's division."
        ),
        "last_stage_layers": Option(
            "parallelism.last_stage_layers", "Layers on the last stage. Default the profile's division."
        ),
        "ends_as_layers": Option(
            "parallelism.ends_as_layers",
            "Embeddings and head count as one layer each when stages are divided. Default the profile's.",
        ),
        "device_map": Option(
            "parallelism.device_map", "How transformers places a model that runs on --gpus and the host: {choices}."
        ),
        "gpus_per_node": Option(
            "parallelism.gpus_per_node", "GPUs per machine, which share its host memory. Default 8."
        ),
        "stage": Option("parallelism.stage", "Report this stage, counted from 0. Default the one that holds most."),
        "cp": Option("parallelism.cp", "Context-parallel GPUs.", aliases=("context_parallel_size",)),
        "ep": Option("parallelism.ep", "Expert-parallel GPUs.", aliases=("expert_parallel_size",)),
    },
}

# Option -> the field that it sets.
STRATEGIES = ("zero", "fsdp", "use_distributed_optimizer")  # options of which one may say how replicas share
FIELDS = {name: option.field for options in OPTIONS.values() for name, option in options.items()}


def flag(name: str) -> str:
    """Return an option as it is typed."""
    return f"--{name.replace('_', '-')}"


def option_of(field: str, given: Iterable[str]) -> str:
    """Return the option among `given` that sets `field`, a part of it, or what it is a part of; "" if none does."""
    if field == "task" and "method" in given:  # --method generate and --method forward set the task
        return "--method"
    paths = {name: FIELDS.get(name, name) for name in given if name != "model"}
    near = [name for name, path in paths.items() if path == field or path.startswith(f"{field}.")]
    near += [name for name, path in paths.items() if path and field.startswith(f"{path}.")]
    return flag(near[0]) if near else ""
