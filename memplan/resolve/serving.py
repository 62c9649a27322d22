"""Fill in the settings of a serving engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.gpus import find_gpu
from memplan.catalogue.inference.cache_formats import FIRST_VLLM, cache_format, formats_of
from memplan.catalogue.inference.caches import caches
from memplan.catalogue.profiles.engines import ENGINES, ServingEngine, engine_settings, find_engine
from memplan.core.errors import SpecError, UnknownNameError, refused
from memplan.core.units import GIB
from memplan.models.cards import find_model
from memplan.models.model import ModelSpec
from memplan.program.serving.parallel import stages_of
from memplan.program.serving.settings import COMPRESSES, ENTRIES, ServingRanks, Settings
from memplan.program.stored.quantization_config import FIELD
from memplan.program.stored.weights import UNQUANTISED, format_of
from memplan.resolve.defaults import NEW_TOKENS
from memplan.resolve.refusals.refuse import refuse
from memplan.resolve.refusals.vendors import not_on
from memplan.resolve.serving_draft import decide_draft
from memplan.resolve.serving_parallel import attention_free, ranks_of
from memplan.spec.generation import Generation
from memplan.spec.run import Batch, RunSpec
from memplan.spec.serving import Serving
from memplan.spec.training import Also, Kernels, Loop, Method, Optimizer, Precision


def serving_engine(run: RunSpec) -> ServingEngine | None:
    """Return the serving engine that the run's profile names, or None.

    Raises SpecError if the run's task is not generate.
    """
    engine = find_engine(run.profile)
    if engine is not None and run.task != "generate":
        raise refused("profile", f"{run.profile} is a serving engine and needs task generate, not {run.task}")
    return engine


def resolve_serving(run: RunSpec, model: ModelSpec | None = None) -> Settings:
    """Return the run's serving settings, with every null filled in by its engine.

    Raises SpecError for what the engine rejects, UnknownNameError for a profile that is not an engine's, and as
    `memplan.models.cards.find_model` does.
    """
    engine = serving_engine(run)
    if engine is None:
        raise UnknownNameError("profile", run.profile, [e.name for e in ENGINES])
    _, behaviour = engine_settings(engine)
    model = model or find_model(run.model)
    gpu = find_gpu(run.gpu) if run.gpu is not None else None
    _refuse(run, engine, model)
    ranks = ranks_of(run, engine, model)
    if gpu is not None:
        refuse(_too_old(gpu, engine, behaviour.capability), not_on(gpu, run))
    context = run.batch.sequence + (run.batch.new_tokens or NEW_TOKENS)
    serving = _with_defaults(run.serving, engine, model, gpu, run, context, ranks)
    if serving.max_model_len is not None and context > serving.max_model_len:
        raise refused(
            "serving.max_model_len",
            f"{serving.max_model_len:,} is less than the {context:,} tokens of a request (batch.sequence + "
            "batch.new_tokens)",
        )
    settings = Settings(
        engine,
        behaviour,
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
    draft = decide_draft(settings)
    return settings if draft is None else _with_draft(run, settings._replace(draft=draft))


def _with_draft(run: RunSpec, s: Settings) -> Settings:
    """Return the settings with the changes that speculative decoding makes: SGLang defaults to 48 requests.

    Source: sglang 0.5.23 arg_groups/speculative_hook.py _handle_eagle_family, _handle_ngram.
    """
    draft = s.draft
    assert draft is not None
    fields: dict[str, Any] = {"speculative_method": draft.method, "num_speculative_tokens": draft.tokens}
    if s.engine.kind == "sglang" and run.serving.max_num_seqs is None:
        fields["max_num_seqs"] = 48
    return s._replace(serving=s.serving.model_copy(update=fields))


def _with_defaults(
    s: Serving,
    engine: ServingEngine,
    model: ModelSpec,
    gpu: GPU | None,
    run: RunSpec,
    context: int,
    ranks: ServingRanks,
) -> Serving:
    defaults, behaviour = engine_settings(engine)
    fields: dict[str, Any] = {name: value for name, value in defaults._asdict().items() if value is not None}
    fields = {name: value for name, value in fields.items() if getattr(s, name) is None}
    if run.method.quantization is None:
        fields["weights"] = _published_format(model, engine)
    if s.max_model_len is None:
        positions = model.longest_sequence or 0
        fields["max_model_len"] = context if engine.kind == "llama.cpp" else max(positions, context)
    longest = s.max_model_len or fields["max_model_len"]
    tokens, requests = _default_steps(behaviour.default_step, longest, gpu, ranks.tp * ranks.sharing)
    if engine.kind == "vllm":
        seqs = s.max_num_seqs or requests
        batched = s.max_num_batched_tokens or min(tokens, seqs * longest)
        fields |= {"max_num_batched_tokens": batched, "max_num_seqs": s.max_num_seqs or min(seqs, batched)}
        if attention_free(model) and s.prefix_caching is None:  # config/model.py is_prefix_caching_supported
            fields["prefix_caching"] = False
        if model.has_compressed_cache:
            fields["block_size"] = ENTRIES
        elif _uses_mla(model):
            fields["block_size"] = 64  # required by the FlashMLA, FlashInfer and sparse MLA kernels
    if engine.kind == "sglang":
        fields["max_num_batched_tokens"] = s.max_num_batched_tokens or tokens
        fields["max_num_seqs"] = s.max_num_seqs or requests
        chunk = fields["max_num_batched_tokens"]
        if s.max_num_batched_tokens is None:  # the share of each dp group. Source: arg_groups/parallel_hook.py
            fields["max_num_batched_tokens"] = max(1, chunk // ranks.sharing)
        if s.memory_utilization is None:
            from memplan.program.serving.sglang import static_fraction, tower_factor

            graphs = s.cuda_graphs is not False
            total = gpu.usable if gpu else 80 * GIB
            share = static_fraction(total, chunk, requests, ranks, _uses_mla(model), graphs)
            if share <= 0:
                field = "serving.max_num_batched_tokens"
                raise refused(
                    field,
                    f"a step of {chunk:,} tokens leaves SGLang none of the card's {total / GIB:.1f} GiB for weights "
                    "and a KV cache; use fewer tokens, or set memory_utilization",
                )
            fields["memory_utilization"] = share * tower_factor(model)
    if engine.kind == "llama.cpp":
        fields["max_num_seqs"] = s.max_num_seqs or run.batch.micro
        fields["gpu_layers"] = model.num_hidden_layers + 1 if s.gpu_layers is None else s.gpu_layers
    fields = {name: value for name, value in fields.items() if getattr(s, name) is None}
    return s.model_copy(update=fields)


def _published_format(model: ModelSpec, engine: ServingEngine) -> str | None:
    """Return the format of the weights that the engine loads from a checkpoint, None for the one in its config."""
    published = model.card.get("stored")
    config: dict[str, Any] = model.config.get(FIELD) or {}
    if engine.kind != "llama.cpp" or (published or config.get("quant_method")) in _KEPT_IN_GGUF:
        return published
    return UNQUANTISED if config else None


# Formats of a checkpoint that a GGUF file keeps; others are converted to bf16.
# Source: llama.cpp of llama-cpp-python 0.3.36, conversion/base.py repack_mxfp4_blocks, dequant_model.
_KEPT_IN_GGUF = ("mxfp4",)


def _is_plain(model: ModelSpec) -> bool:
    """Whether the model has no image encoder, and each layer caches keys and values of all tokens."""
    return model.family.images is None and not _uses_mla(model) and {c.kind for c in caches(model)} == {"attention"}


def _uses_mla(model: ModelSpec) -> bool:
    return "kl" in model.axes()


def _default_steps(decided_by: str, longest: int, gpu: GPU | None, tp: int) -> tuple[int, int]:
    """Return the default tokens and requests per step of vLLM, by its `EngineBehaviour.default_step`, or of SGLang.

    Source: vLLM's rows; sglang 0.5.23 arg_groups/memory_hook.py handle_gpu_memory_settings, where the requests are
    those that decoding graphs are captured for.
    """
    total = gpu.usable if gpu else 80 * GIB
    if decided_by == "request":  # prompts longer than 32,768 tokens are read in parts
        return 512 if longest > 32768 else max(longest, 2048), 256
    if decided_by:
        if total >= 160 * GIB and decided_by == "card":
            return 16384, 1024
        small = gpu is not None and ("a100" in gpu.name or gpu.unified)
        return (8192, 1024) if total >= 70 * GIB and not small else (2048, 256)
    for below, tokens, few, many in _SGLANG:
        if total < below * GIB:
            return tokens, few if tp < 4 else many
    return 16384, 512


_SGLANG = ((20, 2048, 8, 8), (35, 4096, 48, 160), (60, 4096, 32, 160), (90, 8192, 256, 512), (160, 8192, 256, 512))


def _too_old(gpu: GPU, engine: ServingEngine, least: int) -> Iterator[SpecError]:
    """Yield an error for a card that is too old for the engine's kernels."""
    if gpu.compute_capability is not None and gpu.compute_capability < divmod(least, 10):
        has = ".".join(map(str, gpu.compute_capability))
        yield refused("gpu", f"{engine.title} needs compute capability {least / 10:g}, and {gpu.title} has {has}")


def _refuse(run: RunSpec, engine: ServingEngine, model: ModelSpec) -> None:  # noqa: PLR0912 (a branch for each refusal)
    """Raise SpecError for settings that do not apply to a serving engine, or are not supported yet."""
    for field, usual in (("optimizer", Optimizer()), ("kernels", Kernels()), ("loop", Loop())):
        if getattr(run, field) != usual:
            raise refused(field, f"only applies to training, not to {engine.name}")
    if run.also != Also():
        raise refused("also", f"only applies to training, not to {engine.name}")
    if run.generation != Generation():
        raise refused("generation", f"only applies to transformers' generate; configure {engine.name} with serving")
    if run.objective not in (None, "causal_lm"):
        raise refused("objective", f"{engine.name} needs causal_lm, not {run.objective}")
    if run.precision != Precision(weights=run.precision.weights, compute=run.precision.compute):
        raise refused("precision", f"{engine.name} only takes precision.weights")
    if run.precision.compute not in (None, run.precision.weights):
        raise refused(
            "precision.compute", f"{engine.name} computes in {run.precision.weights}, the dtype of unquantised weights"
        )
    if run.method != Method(quantization=run.method.quantization):
        raise refused(
            "method.kind", f"{engine.name} does not train; to serve adapters set serving.lora_slots and lora_rank"
        )
    if run.serving.weights is not None and run.method.quantization is not None:
        raise refused("serving.weights", "is the same as method.quantization; set only one of them")
    if run.batch != Batch(micro=run.batch.micro, sequence=run.batch.sequence, new_tokens=run.batch.new_tokens):
        raise refused(
            "batch", f"{engine.name} only takes micro, sequence and new_tokens; image tokens count towards the sequence"
        )
    if model.is_encoder_decoder and model.only_sequence and engine.kind == "vllm":
        raise refused(
            "model",
            f"{model.model_type} models are not supported yet with {engine.name}, which reserves memory for the "
            "encoder's audio before it creates the KV cache; use transformers-5",
        )
    if (
        model.is_encoder_decoder
        or model.objectives[0] != "causal_lm"
        or not model.family.serving.is_modelled
        or (model.has_compressed_cache and engine.name != COMPRESSES)
        or (engine.name in FIRST_VLLM and not _is_plain(model))
    ):
        raise refused("model", f"{model.model_type} models are not supported yet with {engine.name}")
    s = run.serving
    for name in ("weights", "draft_weights"):
        value = getattr(s, name)
        if value is None:
            continue
        try:
            format_of(value)
        except UnknownNameError as e:
            raise UnknownNameError(f"serving.{name}", value, e.suggestions, ranked=True) from None
    for name in ("limit_images", "limit_videos"):
        if getattr(s, name) is not None and engine.kind != "vllm":
            raise refused(f"serving.{name}", f"only applies to vLLM, not to {engine.name}")
    if s.lora_cpu_slots is not None:
        field, slots = "serving.lora_cpu_slots", s.lora_slots or 0
        if engine.kind != "vllm":
            raise refused(field, f"only applies to vLLM (max_cpu_loras), not to {engine.name}")
        if s.lora_cpu_slots < slots:
            raise refused(field, f"{s.lora_cpu_slots} is less than the {slots} slots (serving.lora_slots)")
    for name, default in (("lora_rank", 16), ("lora_cpu_slots", None)):  # an answer's own run names the default
        if getattr(s, name) not in (None, default) and not s.lora_slots:
            raise refused(f"serving.{name}", "needs slots for adapters; set lora_slots too")
    _refuse_cache(run, engine, model)
    if engine.kind != "llama.cpp":
        for name in ("gpu_layers", "flash_attention", "override_tensor", "n_cpu_moe"):
            if getattr(s, name) is not None:
                raise refused(f"serving.{name}", f"only applies to llama.cpp, not to {engine.name}")
    elif s.memory_utilization not in (None, 1.0):  # an answer's own run says 1.0
        field = "serving.memory_utilization"
        raise refused(field, "does not apply to llama.cpp, which takes what it needs")


def _refuse_cache(run: RunSpec, engine: ServingEngine, model: ModelSpec) -> None:
    """Raise SpecError for a cache format that the engine, the card or the model does not support."""
    s, field = run.serving, "serving.cache_dtype"
    if model.has_compressed_cache:
        if s.block_size not in (None, ENTRIES):
            raise refused("serving.block_size", f"must be {ENTRIES} for {model.model_type}")
        if not (s.cache_dtype or "auto").startswith(("auto", "fp8")):
            raise refused(field, f"{engine.title} only stores the cache of {model.model_type} in fp8")
    if s.cache_dtype in (None, "auto"):
        return
    cache = cache_format(s.cache_dtype)
    if engine.name not in cache.engines:
        raise refused(
            field, f"{engine.name} has no {cache.name} cache; choose auto, {', '.join(formats_of(engine.name))}"
        )
    if cache.numbers > 1 and engine.kind == "llama.cpp" and s.flash_attention is False:
        raise refused("serving.flash_attention", "llama.cpp quantises values only with flash attention")
    if not cache.latent and _uses_mla(model):
        raise refused(field, f"{engine.title} cannot store MLA latents in {cache.name}; use bf16 or fp8")
    capability = find_gpu(run.gpu).compute_capability if run.gpu is not None else None
    if capability is not None and capability < divmod(cache.capability, 10):
        raise refused(
            field,
            f"{cache.name} needs compute capability {cache.capability / 10:g}, and {run.gpu} has "
            f"{'.'.join(map(str, capability))}",
        )
