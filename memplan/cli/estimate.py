"""`memplan MODEL`, short for `memplan estimate MODEL`: the command and its options."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from memplan.cli.answering import run_and_report, show
from memplan.cli.options import (
    ADAPTERS,
    CACHE_DTYPES,
    CACHES,
    DTYPES,
    GENERATION,
    GPUS,
    KERNELS,
    METHODS,
    OBJECTIVES,
    OUTPUT,
    SERVING,
    SEVERAL,
    SIDE_TASKS,
    TASKS,
    TRAINING,
    choices,
    complete_format,
    complete_gpu,
    complete_model,
    complete_optimizer,
    complete_profile,
    option,
)
from memplan.cli.own_profile import own_profile
from memplan.cli.runs import exit_code, format_of, is_default, runs_of


def estimate(  # noqa: PLR0913, PLR0917 (an option each)
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A card's name (qwen2-7b), a Hugging Face id, or the path of a config.json, its folder, or a GGUF "
            "file.",
            autocompletion=complete_model,
            rich_help_panel="Model",
        ),
    ] = None,
    method: Annotated[
        str | None,
        option(
            f"{', '.join(METHODS)}; for inference {' or '.join(TASKS)}. Default full.",
            of=TRAINING,
            complete=choices(*METHODS, *TASKS),
        ),
    ] = None,
    objective: Annotated[
        str | None,
        option(
            f"Training objective, which decides head and loss: {', '.join(OBJECTIVES)}. Default from the config's "
            "architectures.",
            of=TRAINING,
            complete=choices(*OBJECTIVES),
        ),
    ] = None,
    batch_size: Annotated[int | None, option("Sequences per GPU and pass. Default 1.", of=TRAINING)] = None,
    seq_len: Annotated[int | None, option("Tokens per sequence. Default 2048.", of=TRAINING)] = None,
    target_len: Annotated[
        int | None,
        option(
            "Decoder tokens of an encoder-decoder. Default the encoder's length, or the decoder's positions; 1 when "
            "generating (4 for Whisper).",
            of=TRAINING,
        ),
    ] = None,
    grad_accum: Annotated[int | None, option("Passes per optimizer step. Default 1.", of=TRAINING)] = None,
    images: Annotated[
        int | None, option("Images in each sequence; their tokens count towards --seq-len. Default 0.", of=TRAINING)
    ] = None,
    image_size: Annotated[
        str | None,
        option(
            "Pixels of an image: 1024, or height x width as 768x1024. Default the vision tower's size.", of=TRAINING
        ),
    ] = None,
    frozen: Annotated[
        str | None,
        option(
            "Parts that neither train nor get adapters, comma-separated: vision, projector, language. Default none.",
            of=TRAINING,
            complete=choices("vision", "projector", "language"),
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        option(
            "Keep only each layer's input and recompute the rest in backward. Default on.",
            "--gradient-checkpointing/--no-gradient-checkpointing",
            of=TRAINING,
        ),
    ] = None,
    checkpointing: Annotated[
        str | None,
        option(
            "Kind of checkpointing: none, full, or offload (layer inputs in host memory). Default full.",
            of=TRAINING,
            complete=choices("none", "full", "offload"),
        ),
    ] = None,
    trainable_layers: Annotated[
        int | None, option("Last layers that --method freeze trains. Default 2.", of=TRAINING)
    ] = None,
    offload: Annotated[
        str | None,
        option(
            "What is kept in host memory: optimizer (with its step), parameters (FSDP, with the optimizer, or ZeRO 3), "
            "activations (all that autograd saves); none overrides the file. Default none.",
            of=TRAINING,
            complete=choices("optimizer", "parameters", "activations", "none"),
        ),
    ] = None,
    hold_outputs: Annotated[
        bool | None,
        option(
            "The script keeps the model's outputs through the backward pass. Default off.",
            "--hold-outputs/--no-hold-outputs",
            of=TRAINING,
        ),
    ] = None,
    padded: Annotated[
        bool | None,
        option("Batches are padded, and so have an attention mask. Default off.", "--padded/--no-padded", of=TRAINING),
    ] = None,
    trainer: Annotated[
        bool | None,
        option(
            "The loop is transformers' Trainer, which keeps embedding states in fp32 with bitsandbytes' 8-bit "
            "optimizers. Default off.",
            "--trainer/--no-trainer",
            of=TRAINING,
        ),
    ] = None,
    expandable_segments: Annotated[
        bool | None,
        option(
            "Use expandable segments in torch's allocator (PYTORCH_CUDA_ALLOC_CONF). Default off.",
            "--expandable-segments/--no-expandable-segments",
            of=TRAINING,
        ),
    ] = None,
    eval_batch_size: Annotated[
        int | None,
        option(
            "Also count an evaluation, with this many sequences per GPU and pass (per_device_eval_batch_size). Default "
            "none; 8 with another --eval option.",
            of=SIDE_TASKS,
        ),
    ] = None,
    eval_seq_len: Annotated[
        int | None, option("Tokens per sequence of an evaluation. Default --seq-len.", of=SIDE_TASKS)
    ] = None,
    eval_keep_logits: Annotated[
        int | None,
        option(
            "Batches whose logits are kept on the GPU, as for compute_metrics. Default 0: only the loss.",
            of=SIDE_TASKS,
        ),
    ] = None,
    eval_accumulation_steps: Annotated[
        int | None, option("Batches after which kept logits move to the host. Default after the last.", of=SIDE_TASKS)
    ] = None,
    eval_preprocess: Annotated[
        str | None,
        option(
            "argmax keeps the likeliest tokens instead of logits (preprocess_logits_for_metrics). Default logits.",
            of=SIDE_TASKS,
        ),
    ] = None,
    eval_generate: Annotated[
        int | None,
        option(
            "Tokens generated after each sequence of an evaluation (predict_with_generate). Default 0.", of=SIDE_TASKS
        ),
    ] = None,
    save: Annotated[
        bool | None, option("Also count saving a checkpoint. Default off.", "--save/--no-save", of=SIDE_TASKS)
    ] = None,
    merge: Annotated[
        str | None,
        option(
            "Also count merging the adapters: into the trained model, or into one reloaded for it. Default none.",
            of=SIDE_TASKS,
            complete=choices("trained", "reloaded"),
        ),
    ] = None,
    new_tokens: Annotated[
        int | None,
        option("Tokens generated after a --seq-len prompt. Default 256, with --method generate.", of=GENERATION),
    ] = None,
    cache_implementation: Annotated[
        str | None,
        option(
            f"KV cache: {', '.join(CACHES)}. Default the profile's.",
            of=GENERATION,
            complete=choices(*CACHES),
        ),
    ] = None,
    cache_backend: Annotated[
        str | None,
        option(
            "Backend of a quantized cache: quanto (2 or 4 bits), hqq (1, 2, 3, 4, 8) or fp8. Default quanto.",
            of=GENERATION,
            complete=choices("quanto", "hqq", "fp8"),
        ),
    ] = None,
    cache_bits: Annotated[
        int | None, option("Bits per number of a quantized cache (nbits). Default 4.", of=GENERATION)
    ] = None,
    cache_group_size: Annotated[
        int | None, option("Numbers per scale of a quantized cache (q_group_size). Default 64.", of=GENERATION)
    ] = None,
    cache_residual: Annotated[
        int | None,
        option(
            "Most recent tokens that a quantized cache keeps unquantised (residual_length). Default 128.",
            of=GENERATION,
        ),
    ] = None,
    prefill_chunk_size: Annotated[
        int | None, option("Prompt tokens read in one pass. Default all.", of=GENERATION)
    ] = None,
    num_beams: Annotated[int | None, option("Beams per prompt. Default 1.", of=GENERATION)] = None,
    do_sample: Annotated[
        bool | None,
        option(
            "Sample with temperature, top-k and top-p instead of greedy decoding. Default off.",
            "--do-sample/--no-do-sample",
            of=GENERATION,
        ),
    ] = None,
    assistant_model: Annotated[
        str | None,
        option(
            "Smaller model that proposes tokens, which the model verifies in one pass. Default none.", of=GENERATION
        ),
    ] = None,
    assistant_dtype: Annotated[
        str | None,
        option(
            "Dtype of the assistant's weights: bf16, fp16, fp32. Default the model's.",
            of=GENERATION,
            complete=choices("bf16", "fp16", "fp32"),
        ),
    ] = None,
    assistant_quant_format: Annotated[
        str | None,
        option("Weight format of the assistant, as for --quant-format. Default not quantised.", of=GENERATION),
    ] = None,
    num_assistant_tokens: Annotated[
        int | None, option("Tokens that an assistant proposes in a round. Default 20.", of=GENERATION)
    ] = None,
    num_assistant_tokens_schedule: Annotated[
        str | None,
        option(
            "How the number of proposed tokens changes: constant, heuristic, heuristic_transient. Default constant.",
            of=GENERATION,
            complete=choices("constant", "heuristic", "heuristic_transient"),
        ),
    ] = None,
    prompt_lookup_num_tokens: Annotated[
        int | None,
        option(
            "Tokens proposed in a round by prompt lookup, without an assistant. Default 0.",
            of=GENERATION,
        ),
    ] = None,
    assistant_early_exit: Annotated[
        int | None,
        option("First layers of the model that propose tokens in place of an assistant. Default none.", of=GENERATION),
    ] = None,
    rank: Annotated[int | None, option("Rank of the adapters. Default 16.", of=ADAPTERS)] = None,
    targets: Annotated[
        str | None, option("all-linear, or comma-separated module names. Default all-linear.", of=ADAPTERS)
    ] = None,
    lora_dropout: Annotated[float | None, option("Dropout before adapters, 0 to 1. Default 0.", of=ADAPTERS)] = None,
    modules_to_save: Annotated[
        str | None, option("Comma-separated names of modules that train in full. Default none.", of=ADAPTERS)
    ] = None,
    quant_format: Annotated[
        str | None,
        option(
            "Format of quantised weights: nf4, fp4, int8, gptq-int4, gptq-int8, awq-int4, fp8; for inference also "
            "w4a16, fp8-channel, mxfp4 and others. Default nf4, or the format of a quantised checkpoint.",
            of=ADAPTERS,
            complete=complete_format,
        ),
    ] = None,
    double_quant: Annotated[
        bool | None,
        option("Also quantise the quantisation scales. Default on.", "--double-quant/--no-double-quant", of=ADAPTERS),
    ] = None,
    quant_storage: Annotated[
        str | None,
        option(
            "The dtype 4-bit weights are stored in: uint8, or bf16, fp16, fp32 for FSDP. Default uint8.",
            of=ADAPTERS,
            complete=choices("uint8", "bf16", "fp16", "fp32"),
        ),
    ] = None,
    kbit_preparation: Annotated[
        str | None,
        option(
            "Casts of prepare_model_for_kbit_training: true, false, or trl (embeddings, head and adapters cast back, "
            "as TRL does). Default true.",
            of=ADAPTERS,
            complete=choices("true", "false", "trl"),
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        option("Weights: bf16, fp16, fp32. Default bf16.", of=DTYPES, complete=choices("bf16", "fp16", "fp32")),
    ] = None,
    precision: Annotated[
        str | None,
        option(
            "pure (all in --dtype), amp (fp32 weights, autocast to --dtype), "
            "mixed (weights and gradients in --dtype, fp32 masters and states). Default pure.",
            of=DTYPES,
            complete=choices("pure", "amp", "mixed"),
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        option(
            "A name from transformers' OptimizerNames, or none. Default adamw_torch_fused.",
            of=DTYPES,
            complete=complete_optimizer,
        ),
    ] = None,
    foreach: Annotated[
        bool | None,
        option(
            "torch's optimizers step all parameters in lists, not one at a time. Default on if torch supports both.",
            "--foreach/--no-foreach",
            of=DTYPES,
        ),
    ] = None,
    in_backward: Annotated[
        bool | None,
        option(
            "Step each parameter in backward as soon as its gradient is ready; without clipping, and with --grad-accum "
            "1. Default off.",
            "--in-backward/--no-in-backward",
            of=DTYPES,
        ),
    ] = None,
    attention: Annotated[
        str | None,
        option(
            "sdpa, flash_attention_2, eager, sdpa_math, sdpa_efficient. Default sdpa.",
            of=KERNELS,
            complete=choices("sdpa", "flash_attention_2", "eager", "sdpa_math", "sdpa_efficient"),
        ),
    ] = None,
    loss: Annotated[
        str | None,
        option(
            "hf, chunked, fused (with the head's matrix product, as in Liger and Cut Cross-Entropy), chunked_lm_head. "
            "Default hf.",
            of=KERNELS,
            complete=choices("hf", "chunked", "fused", "chunked_lm_head"),
        ),
    ] = None,
    fused: Annotated[
        str | None,
        option(
            "Comma-separated fused kernels: rope, rms_norm, swiglu, cross_entropy, lora. Default none.",
            of=KERNELS,
            complete=choices("rope", "rms_norm", "swiglu", "cross_entropy", "lora"),
        ),
    ] = None,
    reentrant: Annotated[
        bool | None,
        option(
            "Use torch's reentrant checkpointing. Default the profile's.",
            "--reentrant/--no-reentrant",
            of=KERNELS,
        ),
    ] = None,
    profile: Annotated[
        str | None,
        option(
            "Framework and version that fill in defaults (vllm: its newest); memplan profiles lists them. Default "
            "transformers-5.",
            of=KERNELS,
            complete=complete_profile,
        ),
    ] = None,
    stored: Annotated[
        str | None,
        option(
            "Weight format: fp8, w4a16, awq-int4, or a GGUF type. Default the checkpoint's.",
            of=SERVING,
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        option("Most tokens of a request that the engine admits. Default the model's positions.", of=SERVING),
    ] = None,
    max_num_seqs: Annotated[
        int | None, option("Most requests in a step; llama.cpp's slots. Default the engine's for the card.", of=SERVING)
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None,
        option(
            "Most tokens in a step: SGLang's chunked prefill size, llama.cpp's ubatch. Default the engine's.",
            of=SERVING,
        ),
    ] = None,
    memory_utilization: Annotated[
        float | None,
        option(
            "Share of the card's memory (gpu_memory_utilization, mem_fraction_static). Default the engine's.",
            of=SERVING,
        ),
    ] = None,
    block_size: Annotated[int | None, option("Tokens per cache block. Default the engine's.", of=SERVING)] = None,
    cache_dtype: Annotated[
        str | None,
        option(
            "Dtype of an engine's KV cache, by the engine's names: fp8, nvfp4, q8_0 and others. Default the model's "
            "dtype.",
            of=SERVING,
            complete=choices(*CACHE_DTYPES),
        ),
    ] = None,
    cuda_graphs: Annotated[
        bool | None,
        option("Capture decoding steps in CUDA graphs. Default on.", "--cuda-graphs/--no-cuda-graphs", of=SERVING),
    ] = None,
    prefix_caching: Annotated[
        bool | None,
        option(
            "Keep cache blocks of earlier requests. Default on.", "--prefix-caching/--no-prefix-caching", of=SERVING
        ),
    ] = None,
    gpu_layers: Annotated[
        int | None, option("Layers on the card; the head counts as one more (llama.cpp). Default all.", of=SERVING)
    ] = None,
    split_mode: Annotated[
        str | None,
        option(
            "How llama.cpp divides a model over GPUs: layer (some layers on each) or none (all on one). Default layer.",
            of=SERVING,
            complete=choices("layer", "none", "row", "tensor"),
        ),
    ] = None,
    tensor_split: Annotated[
        str | None,
        option("Proportions of the layers on llama.cpp's GPUs, as in 3,1. Default equal parts.", of=SERVING),
    ] = None,
    main_gpu: Annotated[
        int | None, option("GPU that has all layers with --split-mode none (llama.cpp). Default 0.", of=SERVING)
    ] = None,
    dp_attention: Annotated[
        bool | None,
        option(
            "Attention is data parallel over --gpus, and everything else tensor parallel (SGLang). Default off.",
            "--dp-attention/--no-dp-attention",
            of=SERVING,
        ),
    ] = None,
    limit_images: Annotated[
        int | None,
        option("Most images per request (vLLM's limit_mm_per_prompt). Default no limit.", of=SERVING),
    ] = None,
    limit_videos: Annotated[
        int | None, option("Most videos per request (vLLM's limit_mm_per_prompt). Default no limit.", of=SERVING)
    ] = None,
    lora_slots: Annotated[
        int | None, option("Most adapters in a step (vLLM's max_loras). Default 0.", of=SERVING)
    ] = None,
    lora_rank: Annotated[int | None, option("Largest rank of those adapters. Default 16.", of=SERVING)] = None,
    lora_cpu_slots: Annotated[
        int | None, option("Adapters in host memory (vLLM's max_cpu_loras). Default --lora-slots.", of=SERVING)
    ] = None,
    speculative_method: Annotated[
        str | None,
        option(
            "Speculative decoding: draft_model, eagle, eagle3, mtp, ngram. Default none, or draft_model if one is "
            "named.",
            of=SERVING,
            complete=choices("draft_model", "eagle", "eagle3", "mtp", "ngram"),
        ),
    ] = None,
    draft_model: Annotated[
        str | None,
        option("Smaller model that proposes tokens, or the config of an EAGLE head. Default none.", of=SERVING),
    ] = None,
    draft_weights: Annotated[
        str | None, option("Weight format of the draft model. Default the model's dtype.", of=SERVING)
    ] = None,
    num_speculative_tokens: Annotated[
        int | None, option("Tokens proposed per step. Default the engine's.", of=SERVING)
    ] = None,
    gpu: Annotated[
        list[str] | None,
        option(
            "A card's name (3090, a800, h100); repeat it to compare cards. Default none: lists every card that holds "
            "the run.",
            of=GPUS,
            complete=complete_gpu,
            metavar="NAME",
        ),
    ] = None,
    gpus: Annotated[int | None, option("Total number of GPUs. Default 1.", of=SEVERAL)] = None,
    zero: Annotated[int | None, option("DeepSpeed's ZeRO stage, 0 to 3. Default none.", of=SEVERAL)] = None,
    deepspeed: Annotated[
        str | None,
        option(
            "A DeepSpeed config, for its ZeRO stage, buckets, offload, precision and batch; options override it. "
            "Default none.",
            of=SEVERAL,
            metavar="FILE",
        ),
    ] = None,
    fsdp: Annotated[
        str | None,
        option(
            "full_shard, shard_grad_op, hybrid_shard, no_shard, fsdp2. Default none.",
            of=SEVERAL,
            complete=choices("full_shard", "shard_grad_op", "hybrid_shard", "no_shard", "fsdp2"),
        ),
    ] = None,
    tp: Annotated[int | None, option("Tensor-parallel GPUs. Default 1.", of=SEVERAL)] = None,
    sequence_parallel: Annotated[
        bool | None,
        option(
            "Tensor-parallel GPUs also divide the tokens between matrix products. Default off.",
            "--sequence-parallel/--no-sequence-parallel",
            of=SEVERAL,
        ),
    ] = None,
    pp: Annotated[int | None, option("Pipeline stages. Default 1.", of=SEVERAL)] = None,
    virtual_stages: Annotated[
        int | None, option("Chunks of layers per stage, interleaved by 1F1B. Default 1.", of=SEVERAL)
    ] = None,
    schedule: Annotated[
        str | None,
        option(
            "Pipeline schedule of the --grad-accum microbatches: 1f1b, gpipe, or device_map (as in transformers, one "
            "GPU after another). Default the profile's.",
            of=SEVERAL,
            complete=choices("1f1b", "gpipe", "device_map"),
        ),
    ] = None,
    first_stage_layers: Annotated[
        int | None, option("Layers on the first stage. Default the profile's division.", of=SEVERAL)
    ] = None,
    last_stage_layers: Annotated[
        int | None, option("Layers on the last stage. Default the profile's division.", of=SEVERAL)
    ] = None,
    ends_as_layers: Annotated[
        bool | None,
        option(
            "Embeddings and head count as one layer each when stages are divided. Default the profile's.",
            "--ends-as-layers/--no-ends-as-layers",
            of=SEVERAL,
        ),
    ] = None,
    device_map: Annotated[
        str | None,
        option(
            "How transformers places a model that runs on --gpus and the host: auto, balanced, balanced_low_0, "
            "sequential. Default none.",
            of=SEVERAL,
            complete=choices("auto", "balanced", "balanced_low_0", "sequential"),
        ),
    ] = None,
    gpus_per_node: Annotated[
        int | None,
        option("GPUs per machine, which share its host memory. Default 8.", of=SEVERAL),
    ] = None,
    stage: Annotated[
        int | None, option("Report this stage, counted from 0. Default the one that holds most.", of=SEVERAL)
    ] = None,
    cp: Annotated[int | None, option("Context-parallel GPUs. Default 1.", of=SEVERAL)] = None,
    ep: Annotated[int | None, option("Expert-parallel GPUs. Default 1.", of=SEVERAL)] = None,
    spec: Annotated[
        str | None, option("A run as JSON or YAML (- is standard input); options override it.", of=OUTPUT)
    ] = None,
    online: Annotated[
        bool,
        option(
            "Ask the Hugging Face Hub about a model without a card: its config and the headers of its weights. "
            "Default off.",
            "--online",
            of=OUTPUT,
        ),
    ] = False,
    revision: Annotated[
        str | None, option("Branch, tag or commit of the id, as in owner/name@revision. Default main.", of=OUTPUT)
    ] = None,
    via: Annotated[
        str | None,
        option(
            "engine (memplan's own description of the model), trace (the installed transformers' step, on tensors "
            "without data), or auto: trace only models that the engine does not know. Default auto.",
            of=OUTPUT,
            complete=choices("auto", "engine", "trace"),
        ),
    ] = None,
    cache: Annotated[
        bool | None,
        option("Read and write traces in the user's cache folder. Default on.", "--cache/--no-cache", of=OUTPUT),
    ] = None,
    format: Annotated[
        str | None,
        option(
            "table, json, markdown, csv, html. Default table.",
            of=OUTPUT,
            complete=choices("table", "json", "markdown", "csv", "html"),
        ),
    ] = None,
    json: Annotated[bool, option("Short for --format json.", "--json", of=OUTPUT)] = False,
    output: Annotated[str | None, option("Write to this file. Default standard output.", of=OUTPUT)] = None,
    explain: Annotated[
        bool, option("List every tensor alive at the peak. Default off.", "--explain", of=OUTPUT)
    ] = False,
    ranks: Annotated[
        bool, option("List every GPU that differs: pipeline stages or a device map. Default off.", "--ranks", of=OUTPUT)
    ] = False,
    strict: Annotated[
        bool,
        option("Exit 1 if tight, and 4 if something unsupported was left out. Default off.", "--strict", of=OUTPUT),
    ] = False,
    calibration: Annotated[
        bool | None,
        option(
            "Use this machine's own profile of the card, if memplan calibrate has written one. Default on.",
            "--calibration/--no-calibration",
            of=OUTPUT,
        ),
    ] = None,
) -> int:
    """Estimate whether a run fits, what takes the memory, and when.

    Exit codes: 0 fits, or no GPU given; 1 does not fit; 2 wrong input; 3 the model's config is not available; 4 with
    --strict, something unsupported was left out.
    """
    given = {name: value for name, value in ctx.params.items() if not is_default(name, value)}
    return run_and_report(lambda: _estimate(given), given)


def _estimate(given: Mapping[str, Any]) -> int:
    from memplan.estimate.estimate import estimate
    from memplan.probe.route import estimates
    from memplan.report import render

    format = format_of(given)
    runs = [(run, own_profile(run.gpu, given)) for run in runs_of(given)]
    answers = estimates(
        runs, given.get("via", "auto"), cache=given.get("cache", True), online="online" in given, engine=estimate
    )
    to = None
    if "output" in given and format == "table":
        from memplan.report.text import Screen

        to = Screen()
    show(render(format, answers, "explain" in given, to, "ranks" in given), format, given.get("output"))
    return exit_code(answers, "strict" in given)
