"""The settings of a serving engine, with every null filled in."""

from __future__ import annotations

from typing import Any

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.gpus import find_gpu
from memplan.catalogue.inference.cache_formats import cache_format, formats_of
from memplan.catalogue.profiles.engines import ENGINES, Engine, decided, find_engine
from memplan.core.errors import SpecError, UnknownNameError
from memplan.core.frozen import frozen
from memplan.core.units import GIB
from memplan.models.cards import find_model
from memplan.models.model import ModelSpec
from memplan.program.serving.parallel import stages_of
from memplan.program.serving.settings import COMPRESSED, COMPRESSES, ENTRIES, Ranks, Settings
from memplan.program.stored.weights import format_of
from memplan.resolve.serving_draft import decide
from memplan.resolve.serving_parallel import attention_free, ranks_of
from memplan.spec.generation import Generation
from memplan.spec.run import Batch, RunSpec
from memplan.spec.serving import Serving
from memplan.spec.training import Also, Kernels, Loop, Method, Optimizer, Precision

NEW_TOKENS = 256  # where a run says nothing of them


def serves(run: RunSpec) -> Engine | None:
    """The engine that the run's profile names, where it is one that serves and the run generates.

    Raises SpecError where such a profile is asked for another task.
    """
    engine = find_engine(run.profile)
    if engine is not None and run.task != "generate":
        raise SpecError(f"profile: {run.profile} serves models: it needs task generate, not {run.task}", "profile")
    return engine


def settled(run: RunSpec, model: ModelSpec | None = None) -> Settings:
    """Fill in every null of the run by its engine.

    Raises SpecError for what an engine does not take, UnknownNameError for a profile that is no engine's, and as
    `memplan.models.cards.find_model` does.
    """
    engine = serves(run)
    if engine is None:
        raise UnknownNameError("profile", run.profile, [e.name for e in ENGINES])
    words = decided(engine)
    model = model or find_model(run.model)
    gpu = find_gpu(run.gpu) if run.gpu is not None else None
    _refuse(run, engine, model)
    ranks = ranks_of(run, engine, model)
    _refuse_card(gpu, engine, words)
    context = run.batch.sequence + (run.batch.new_tokens or NEW_TOKENS)
    serving = _filled(run.serving, engine, words, model, gpu, run, context, ranks)
    if serving.max_model_len is not None and context > serving.max_model_len:
        raise SpecError(
            f"serving.max_model_len: {serving.max_model_len:,} is less than the {context:,} tokens of a request "
            "(batch.sequence and batch.new_tokens)",
            "serving.max_model_len",
        )
    found = Settings(
        engine,
        frozen(words),
        model,
        gpu,
        run.precision.weights,
        serving.weights or run.method.quantization,
        serving,
        context,
        run.batch.sequence,
        run.batch.micro,
        ranks,
        stages_of(engine, model, ranks, serving)[0],
    )
    draft = decide(found)
    return found if draft is None else _drafting(run, found._replace(draft=draft))


def _drafting(run: RunSpec, s: Settings) -> Settings:
    """The settings with what speculative decoding changes of them: SGLang has 48 requests at once, where nothing is
    said. Source: sglang 0.5.23 arg_groups/speculative_hook.py _handle_eagle_family, _handle_ngram."""
    draft = s.draft
    assert draft is not None
    fields: dict[str, Any] = {"speculative_method": draft.method, "num_speculative_tokens": draft.tokens}
    if s.engine.kind == "sglang" and run.serving.max_num_seqs is None:
        fields["max_num_seqs"] = 48
    return s._replace(serving=s.serving.model_copy(update=fields))


def _filled(
    s: Serving,
    engine: Engine,
    words: dict[str, Any],
    model: ModelSpec,
    gpu: GPU | None,
    run: RunSpec,
    context: int,
    ranks: Ranks,
) -> Serving:
    fields = {name: words[name] for name in type(s).model_fields if getattr(s, name) is None and name in words}
    if run.method.quantization is None and engine.kind != "llama.cpp":
        fields["weights"] = model.card.get("stored")  # as an engine finds the checkpoint
    if s.max_model_len is None:
        positions = model.longest_sequence or 0
        fields["max_model_len"] = context if engine.kind == "llama.cpp" else max(positions, context)
    tokens, requests = _steps(engine, gpu, ranks.tp * ranks.sharing)
    if engine.kind == "vllm":
        longest = s.max_model_len or fields["max_model_len"]
        seqs = s.max_num_seqs or requests
        batched = s.max_num_batched_tokens or min(tokens, seqs * longest)
        fields |= {"max_num_batched_tokens": batched, "max_num_seqs": s.max_num_seqs or min(seqs, batched)}
        if attention_free(model) and s.prefix_caching is None:  # config/model.py is_prefix_caching_supported
            fields["prefix_caching"] = False
        if _latent(model) and s.block_size is None:
            fields["block_size"] = 64  # FlashMLA's, FlashInfer's and sparse MLA's kernels
    if engine.kind == "sglang":
        fields["max_num_batched_tokens"] = s.max_num_batched_tokens or tokens
        fields["max_num_seqs"] = s.max_num_seqs or requests
        chunk = fields["max_num_batched_tokens"]
        if s.max_num_batched_tokens is None:  # each group's share. Source: arg_groups/parallel_hook.py
            fields["max_num_batched_tokens"] = max(1, chunk // ranks.sharing)
        if s.memory_utilization is None:
            from memplan.program.serving.sglang import seeing, static_fraction

            graphs = s.cuda_graphs is not False
            total = gpu.usable if gpu else 80 * GIB
            share = static_fraction(total, chunk, requests, ranks, _latent(model), graphs)
            if share <= 0:
                field = "serving.max_num_batched_tokens"
                raise SpecError(
                    f"{field}: a step of {chunk:,} tokens leaves SGLang nothing of {total / GIB:.1f} GiB for weights "
                    "and a pool; say fewer, or memory_utilization",
                    field,
                )
            fields["memory_utilization"] = share * seeing(model)
    if engine.kind == "llama.cpp":
        fields["max_num_seqs"] = s.max_num_seqs or run.batch.micro
        fields["gpu_layers"] = model.num_hidden_layers + 1 if s.gpu_layers is None else s.gpu_layers
    fields = {name: value for name, value in fields.items() if getattr(s, name) is None}
    return s.model_copy(update=fields)


def _latent(model: ModelSpec) -> bool:
    return "kl" in model.axes()


def _steps(engine: Engine, gpu: GPU | None, tp: int) -> tuple[int, int]:
    """Tokens and requests of a step where nothing is said, by the card's memory.

    Source: vllm 0.33.0 engine/arg_utils.py get_batch_defaults, as a server; sglang 0.5.23 arg_groups/memory_hook.py
    handle_gpu_memory_settings, whose decoding steps are recorded up to so many requests.
    """
    total = gpu.usable if gpu else 80 * GIB
    if engine.kind == "vllm":
        if total >= 160 * GIB and engine.name != "vllm-0.11":
            return 16384, 1024
        small = gpu is not None and ("a100" in gpu.name or gpu.unified)
        return (8192, 1024) if total >= 70 * GIB and not small else (2048, 256)
    for below, tokens, few, many in _SGLANG:
        if total < below * GIB:
            return tokens, few if tp < 4 else many
    return 16384, 512


_SGLANG = ((20, 2048, 8, 8), (35, 4096, 48, 160), (60, 4096, 32, 160), (90, 8192, 256, 512), (160, 8192, 256, 512))


def _refuse_card(gpu: GPU | None, engine: Engine, words: dict[str, Any]) -> None:
    """Raise SpecError for a card that is too old for the engine's kernels."""
    least = words.get("capability", 0)
    if gpu is not None and gpu.compute_capability is not None and gpu.compute_capability < divmod(least, 10):
        has = ".".join(map(str, gpu.compute_capability))
        raise SpecError(
            f"gpu: {engine.title} needs compute capability {least / 10:g}, and {gpu.title} has {has}", "gpu"
        )


def _refuse(run: RunSpec, engine: Engine, model: ModelSpec) -> None:
    """Raise SpecError for what a serving engine's run must not say, and for what is not described yet."""
    for field, usual in (("optimizer", Optimizer()), ("kernels", Kernels()), ("loop", Loop())):
        if getattr(run, field) != usual:
            raise SpecError(f"{field}: of training; {engine.name} has its own kernels and trains nothing", field)
    if run.also != Also():
        raise SpecError(f"also: of training; {engine.name} trains nothing", "also")
    if run.generation != Generation():
        raise SpecError(f"generation: of transformers' generate; {engine.name} has a pool (serving)", "generation")
    if run.objective not in (None, "causal_lm"):
        raise SpecError(f"objective: {engine.name} generates, which is causal_lm, not {run.objective}", "objective")
    if run.precision != Precision(weights=run.precision.weights, compute=run.precision.compute):
        raise SpecError(f"precision: of training; {engine.name} is told precision.weights alone", "precision")
    if run.precision.compute not in (None, run.precision.weights):
        raise SpecError(
            f"precision.compute: {engine.name} computes in {run.precision.weights}, the dtype of what is not quantised",
            "precision.compute",
        )
    if run.method != Method(quantization=run.method.quantization):
        raise SpecError(
            f"method.kind: {engine.name} trains nothing; adapters are serving.lora_slots and lora_rank", "method.kind"
        )
    if run.serving.weights is not None and run.method.quantization is not None:
        raise SpecError("serving.weights: says what method.quantization does; say one of them", "serving.weights")
    if run.batch != Batch(micro=run.batch.micro, sequence=run.batch.sequence, new_tokens=run.batch.new_tokens):
        raise SpecError(
            f"batch: {engine.name} is given micro, sequence and new_tokens alone; tokens of images are of the sequence",
            "batch",
        )
    if model.model_type == "whisper" and engine.kind == "vllm":
        raise SpecError(
            f"model: whisper models are not supported yet with {engine.name}, which sets aside what its encoder takes "
            "of recordings before it has a pool; transformers-5 generates with them",
            "model",
        )
    if (
        model.is_encoder_decoder
        or model.objectives[0] != "causal_lm"
        or model.model_type in _NOT_YET
        or (model.model_type == COMPRESSED and engine.name != COMPRESSES)
    ):
        raise SpecError(f"model: {model.model_type} models are not supported yet with {engine.name}", "model")
    s = run.serving
    for name in ("weights", "draft_weights"):
        given = getattr(s, name)
        if given is None:
            continue
        try:
            format_of(given)
        except UnknownNameError as e:
            raise UnknownNameError(f"serving.{name}", given, e.nearest, ranked=True) from None
    for name in ("limit_images", "limit_videos"):
        if getattr(s, name) is not None and engine.kind != "vllm":
            raise SpecError(
                f"serving.{name}: is of vLLM's run of its encoder, and {engine.name} has no such", f"serving.{name}"
            )
    if s.lora_cpu_slots is not None:
        field, slots = "serving.lora_cpu_slots", s.lora_slots or 0
        if engine.kind != "vllm":
            raise SpecError(f"{field}: is vLLM's max_cpu_loras, and {engine.name} has no such", field)
        if s.lora_cpu_slots < slots:
            raise SpecError(f"{field}: {s.lora_cpu_slots} is less than the {slots} slots (serving.lora_slots)", field)
    for name in ("lora_rank", "lora_cpu_slots"):
        if getattr(s, name) is not None and not s.lora_slots:
            raise SpecError(f"serving.{name}: is of slots for adapters; say lora_slots", f"serving.{name}")
    _refuse_cache(run, engine, model)
    if engine.kind != "llama.cpp":
        for name in ("gpu_layers", "flash_attention"):
            if getattr(s, name) is not None:
                raise SpecError(f"serving.{name}: is llama.cpp's, and {engine.name} has no such", f"serving.{name}")
    elif s.memory_utilization is not None:
        field = "serving.memory_utilization"
        raise SpecError(f"{field}: llama.cpp has no such; it takes what it needs of a card", field)


def _refuse_cache(run: RunSpec, engine: Engine, model: ModelSpec) -> None:
    """Raise SpecError for a format of keys and values that the engine, the card or the model's layers do not have."""
    s, field = run.serving, "serving.cache_dtype"
    if model.model_type == COMPRESSED:
        if s.block_size not in (None, ENTRIES):
            raise SpecError(
                f"serving.block_size: blocks of {model.model_type} have {ENTRIES} tokens", "serving.block_size"
            )
        if not (s.cache_dtype or "auto").startswith(("auto", "fp8")):
            raise SpecError(f"{field}: {engine.title} keeps entries of {model.model_type} in fp8 alone", field)
    if s.cache_dtype in (None, "auto"):
        return
    kept = cache_format(s.cache_dtype)
    if engine.name not in kept.engines:
        raise SpecError(
            f"{field}: {engine.name} has no {kept.name}; its caches are auto, {', '.join(formats_of(engine.name))}",
            field,
        )
    if kept.numbers > 1 and engine.kind == "llama.cpp" and s.flash_attention is False:
        raise SpecError(
            "serving.flash_attention: llama.cpp quantises values only with flash attention", "serving.flash_attention"
        )
    if not kept.latent and _latent(model):
        raise SpecError(f"{field}: {engine.title} stores no latent in {kept.name}; bf16 or fp8", field)
    capability = find_gpu(run.gpu).compute_capability if run.gpu is not None else None
    if capability is not None and capability < divmod(kept.capability, 10):
        raise SpecError(
            f"{field}: {kept.name} needs compute capability {kept.capability / 10:g}, and {run.gpu} has "
            f"{'.'.join(map(str, capability))}",
            field,
        )


# Whose pools are laid out in ways that were not read: keys of images; compressed entries but for vLLM's.
_NOT_YET = frozenset(("mllama", "megatron_gpt"))
