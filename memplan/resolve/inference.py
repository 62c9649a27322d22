"""Fill in what an inference run leaves open, and refuse what its model cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memplan.catalogue.attention.attention import SINGLE
from memplan.catalogue.attention.efficient_workspace import large_tiles
from memplan.catalogue.degrees import WHOLE, Degrees
from memplan.catalogue.experts.expert_loops import AS_MODULES
from memplan.catalogue.families.litgpt import KINDS
from memplan.catalogue.hardware.gpus import find_gpu
from memplan.catalogue.inference.caches import caches as caches_of
from memplan.catalogue.inference.decoding import CACHED_BY_ITS_CODE, NOT_YET, SUPPRESSES, keeping
from memplan.catalogue.inference.one_pass import LoadOptions, Pass
from memplan.catalogue.methods.methods import ADAPTERS, Recipe
from memplan.catalogue.parallelism.tensor_parallel import check
from memplan.catalogue.profiles.profiles import find_profile, profile_settings
from memplan.catalogue.quantization.inference_formats import MADE_WHEN_LOADED, RUNS, InferenceFormat
from memplan.catalogue.quantization.packed_kernels import BACKENDS
from memplan.core.errors import SpecError, UnsupportedModelError
from memplan.core.units import ITEMSIZE
from memplan.models.model import ModelSpec
from memplan.program.graph import Graph, operations_of
from memplan.program.inference.passes import cross_attends_to_images, decoder_graph
from memplan.program.run import ResolvedRun
from memplan.program.stack_facts import tower_dtype
from memplan.program.stored.checkpoint import notes as stored_notes
from memplan.program.training.program import Structure
from memplan.resolve.batches import image_axes, with_lengths
from memplan.resolve.caches import cache_implementation, cache_storage, decided_cache, refuse_cache
from memplan.resolve.communicators import communicators
from memplan.resolve.defaults import adapted_experts, check_classes
from memplan.resolve.device_map import place_litgpt_blocks, place_on_devices
from memplan.resolve.inference_formats import format_running, note_of
from memplan.resolve.kernels import (
    attention_compute_dtype,
    attention_wiring,
    tower_kernel,
    version_attention,
    with_profile_wiring,
)
from memplan.resolve.method import method_recipe, quantised_recipe
from memplan.resolve.notes import (
    dtype_notes,
    expert_notes,
    gpu_notes,
    kernel_notes,
    published_code_note,
    unknown_note,
    unmasked_note,
)
from memplan.resolve.parallelism import degrees_of
from memplan.resolve.quantized_checkpoint import method_for_inference
from memplan.resolve.refusals import refuse_for_tensor_parallel, refuse_parts, refuse_training_settings
from memplan.spec.base import Part
from memplan.spec.formats import Quantization
from memplan.spec.run import RunSpec
from memplan.spec.training import Kernels, Method, Optimizer, Precision


def decide_inference(run: RunSpec, model: ModelSpec) -> ResolvedRun:  # noqa: PLR0912, PLR0915 (one default after the other)
    """Return a forward or generate run with every null filled in, except what proposes its tokens.

    Raises SpecError, UnknownNameError, ConfigError or FactsMissingError.
    """
    refuse_training_settings(run)
    profile = find_profile(run.profile).name
    words = profile_settings(profile, model.model_type, run.method.quantization is not None)
    if words["code"] not in ("transformers", "litgpt") or words["pipeline"] != "device_map":
        raise SpecError(
            f"profile: inference is not supported with {run.profile}; use a transformers or LitGPT profile", "profile"
        )
    if words["code"] == "litgpt" and model.model_type not in KINDS:
        raise SpecError(
            f"profile: LitGPT does not have model_type {model.model_type}; supported: {', '.join(KINDS)}", "profile"
        )
    generates = run.task == "generate"
    if generates and model.objective not in ("causal_lm", "seq2seq_lm"):
        raise SpecError(
            f"task: generate is not supported yet for {model.objective}, the objective of "
            f"{model.name or model.model_type}; use forward",
            "task",
        )
    if generates and model.model_type in NOT_YET:
        raise UnsupportedModelError(
            f"task: generate is not supported yet for model_type {model.model_type}; use forward", "task"
        )
    check_classes(model, run.kernels, run.profile)
    if model.is_encoder_decoder and model.unquantised and run.precision.weights == "fp16":
        raise SpecError(
            f"precision.weights: fp16 is not supported yet for {model.name or model.model_type}, because transformers "
            f"then keeps {', '.join(model.unquantised)} in fp32; use bf16 or fp32",
            "precision.weights",
        )
    gpu = find_gpu(run.gpu) if run.gpu is not None else None
    capability = gpu.compute_capability if gpu else None
    precision = _precision(run.precision)
    if words["experts"] == "modules" and model.model_type in AS_MODULES:  # experts are linear layers
        model = ModelSpec({**model.config, "experts_implementation": "modules"}, model.name, model.card)
    formats = words["code"] == "transformers" and words["runs_formats"]
    checkpoint = method_for_inference(model, run.method, precision.weights, capability, formats)
    method, running = checkpoint.method, checkpoint.running
    published_format = model.card.get("stored") if method.kind not in ADAPTERS and method.quantization is None else None
    if (
        formats and published_format == "mxfp4" and not model.config.get("quantization_config")
    ):  # as from_pretrained loads it
        method = method.model_copy(update={"quantization": Quantization(format=published_format)})
    if running is None and formats and method.kind not in ADAPTERS and method.quantization is not None:
        running = format_running(model, method.quantization, precision.weights, capability)
        checkpoint = checkpoint._replace(
            notes=(*checkpoint.notes, *((note_of(running),) if running is not None else ()))
        )
    if method.kind in ADAPTERS:
        dtype = method.adapter_dtype or words["method.adapter_dtype"]
        method = method.model_copy(update={"adapter_dtype": precision.weights if dtype == "weights" else dtype})
    method = _fill_quantization(method, words["method.quantization.skip"], {f: words[f] for f in BACKENDS})
    kernels = run.kernels.model_copy(update={"checkpointing": "none", "reentrant": False, "fused": ()})
    refuse_parts(method, run.precision, run.optimizer, kernels, run_formats=tuple(RUNS) if running is not None else ())
    degrees = _degrees(run, model, method, kernels, precision, words)
    notes = [*gpu_notes(gpu, str(run.gpu))] if gpu is not None else []
    notes += [*dtype_notes(gpu, str(precision.compute)), *stored_notes(model), *checkpoint.notes, *kernel_notes(model)]
    recipe, more_notes = _recipe(model, method, precision, str(words["code"]), checkpoint.as_stored, running)
    notes += more_notes
    attention, _, more_notes = version_attention(model, kernels, run.profile, words)
    notes += more_notes
    returns_cache = generates or words["code"] == "transformers"  # LitGPT's forward only has a cache when told to
    caches = bool(run.loop.use_cache) and returns_cache and model.objective in ("causal_lm", "seq2seq_lm")
    pictures = image_axes(model, run)
    batch = with_lengths(run.batch, model, generates)
    window, attention_dtype = model.sliding_window, attention_compute_dtype(model, recipe)
    chunk = min(run.generation.prefill_chunk_size or batch.sequence, batch.sequence)
    windowed = window is not None and chunk >= window
    if not words["has_family"]:
        notes.append(unknown_note(model, run.profile))
    padded = run.loop.padded and words["code"] != "litgpt"  # LitGPT only masks its cache
    if run.loop.padded and not padded:
        notes.append(unmasked_note(run.profile))
    wiring = attention_wiring(model, attention, attention_dtype, recipe, capability, padded, windowed)
    wiring = with_profile_wiring(wiring, words, attention)._replace(
        is_single_sequence=batch.micro * run.generation.num_beams == 1 and model.model_type in SINGLE,
        has_fp32_inputs=attention_dtype == "fp32",
        images=bool(batch.images),
        pads_image_mask=dict(pictures).get("seen", 0) % 8 != 0,
        tower=tower_kernel(model, recipe, kernels, capability) if batch.images else "",
        records=False,
        caching=caches or words["forward_caches"],
        last_only=generates and words["last_logits"] and not model.is_encoder_decoder,
        generates=generates,
    )
    generation = decided_cache(run.generation, words, run.profile) if generates else run.generation
    if model.is_encoder_decoder and generation.cache_implementation == "legacy":
        raise SpecError(
            f"generation.cache_implementation: legacy is not supported yet for {model.name or model.model_type}; "
            "supported: dynamic, static",
            "generation.cache_implementation",
        )
    if generates:
        refuse_cache(run, generation, model, batch)
    stored = cache_storage(generation, model, batch)
    one_pass = Pass(
        "prefill" if generates else "forward",
        cache_implementation(generation) or ("dynamic" if wiring.caching else ""),
        words["last_logits"] and not model.is_encoder_decoder,
        words["logits"] == "model" or (generates and words["wide_logits"]),
        wiring.has_mask(),
        windowed and chunk > (window or 0),
        words["few_rows"],
        generation.num_beams > 1,
        generation.do_sample,
        generates and model.is_encoder_decoder,
        generates and model.model_type in SUPPRESSES,
        spans_autocast=generates and precision.autocast,
        loaded=LoadOptions(words["warms"], _stores_head(method, words["stores_head"]), _backend(method)),
        stored=stored,
        batches_later_passes=generates and words["experts"] == "stacked",
    )
    wiring = wiring._replace(keeps_cache_layout=stored is not None)
    graph = Graph(
        model,
        recipe,
        wiring,
        checkpoint=False,
        loss="",
        hold_outputs=False,
        adds_in_place=True,
        rank=method.rank,
        trainable_layers=0,
        code=words["code"],
        degrees=degrees,
        inference=one_pass,
    )
    if run.parallelism.pp > 1 or run.parallelism.device_map is not None:
        if words["code"] == "litgpt":
            placed, more_notes = place_litgpt_blocks(graph, run.parallelism)
            if recipe.weights != "fp32":  # LitGPT creates its caches in fp32
                graph = graph._replace(inference=one_pass._replace(allocated_dtype="fp32"))
        else:
            placed, more_notes = place_on_devices(graph, run.parallelism, gpu, words["device_map"] == "largest")
        notes += more_notes
        graph = graph._replace(placed=placed._replace(card=run.parallelism.stage or 0))
    if caches and not generates and not keeps_every_cache(graph):
        notes.append(
            f"the cache of {model.model_type} is only counted in part; set loop.use_cache false to leave it out"
        )
    if generates and not keeps_every_cache(graph):
        raise UnsupportedModelError(
            f"kernels.attention: generate with {kernels.attention} is not supported yet for model_type "
            f"{model.model_type}",
            "kernels.attention",
        )
    notes += expert_notes(graph, capability)
    if generates and model.model_type in CACHED_BY_ITS_CODE:
        notes.append(published_code_note(model.model_type))
    parts: dict[str, Part] = {
        "method": method,
        "precision": precision,
        "kernels": kernels,
        "batch": batch,
        "generation": generation,
        "loop": run.loop.model_copy(update={"use_cache": caches}),
    }
    if pictures:
        pictures = (*pictures, ("tower_half", int(tower_dtype(model, recipe) != "fp32")))
    structure = Structure(graph, accumulates=False, optimizer="none", clips=False)
    return ResolvedRun(
        structure,
        batch,
        gpu,
        attention_dtype != "fp32",
        large_tiles(capability),
        tuple(notes),
        parts,
        tuple(pictures),
        communicators(run.parallelism) if degrees.tp > 1 else (),
        beams=generation.num_beams,
        part=generation.prefill_chunk_size or 0,
    )


def _degrees(
    run: RunSpec,
    model: ModelSpec,
    method: Method,
    kernels: Kernels,
    precision: Precision,
    words: Mapping[str, Any],
) -> Degrees:
    """Return the degrees of a rank. Raises SpecError for what tensor-parallel ranks cannot run."""
    p = run.parallelism
    if p.tp == 1:
        return WHOLE
    untrained, plain_kernels = Optimizer(name="none"), kernels.model_copy(update={"loss": "hf"})
    style = words["tensor_parallel"]
    refuse_for_tensor_parallel(
        p, method, precision, untrained, plain_kernels, run.profile, style, own=False, trains=False
    )
    degrees = degrees_of(p, style)
    check(model, degrees, ITEMSIZE[precision.weights], adapted_experts(model, method))
    return degrees._replace(etp=1)


def keeps_every_cache(graph: Graph) -> bool:
    """Return whether the stack keeps a cache for every layer that the family's cache table lists."""
    graph = graph._replace(placed=None)
    one_pass = graph.inference
    if one_pass is not None and one_pass.cache.startswith("offloaded"):  # an offloaded cache leaves nothing on the GPU
        graph = graph._replace(inference=one_pass._replace(cache="static" if one_pass.static else "dynamic"))
    if graph.model.is_encoder_decoder:
        graph = decoder_graph(graph)
    stack, axes = operations_of(graph)
    kept = sum(axes[times] * blocks for times, blocks in keeping(stack))
    has_cross_attention = graph.model.is_encoder_decoder or cross_attends_to_images(
        graph
    )  # cross-attention layers only run with images
    expected = [
        layer
        for layer in caches_of(graph.model)
        if any(part.per != "source" or has_cross_attention for part in layer.parts)
    ]
    return kept == len(expected)


def _precision(p: Precision) -> Precision:
    compute = p.compute or ("bf16" if p.autocast and p.weights == "fp32" else p.weights)
    return p.model_copy(update={"compute": compute})


def _stores_head(method: Method, awq: bool) -> bool:
    q = method.quantization
    return awq and q is not None and q.format == "awq-int4"


def _backend(method: Method) -> str:
    q = method.quantization
    return (q.backend or "") if q is not None else ""


def _fill_quantization(method: Method, skip: tuple[str, ...], backends: Mapping[str, str]) -> Method:
    """Return the method with its quantisation filled in: nothing is prepared for training, and packed weights have a
    kernel.
    """
    q = method.quantization
    if q is None:
        return method
    if q.kbit_preparation:
        field = "method.quantization.kbit_preparation"
        raise SpecError(f"{field}: only applies to training; leave it out", field)
    known = BACKENDS.get(q.format, ())
    if q.backend and q.backend not in (*known, *RUNS.get(q.format, ())):
        field = "method.quantization.backend"
        raise SpecError(f"{field}: {q.backend} does not run {q.format}; choose {', '.join(known) or 'none'}", field)
    update = {
        "kbit_preparation": False,
        "skip": skip if q.skip is None else q.skip,
        "backend": (backends.get(q.format, "") or RUNS.get(q.format, ("",))[0]) if q.backend is None else q.backend,
    }
    return method.model_copy(update={"quantization": q.model_copy(update=update)})


def _recipe(
    model: ModelSpec, method: Method, precision: Precision, code: str, is_stored: bool, running: InferenceFormat | None
) -> tuple[Recipe, list[str]]:
    """Return the recipe, and notes on it.

    Adapters are those of training without dropout; without adapters the weights stay as stored.
    """
    if method.kind in ADAPTERS:
        recipe, notes = method_recipe(model, method, precision, code, is_stored)
        return recipe._replace(dropout=False), [note for note in notes if not note.startswith("LLM.int8")]
    base = Recipe(
        "full",
        precision.weights,
        str(precision.compute),
        precision.autocast,
        library="peft" if code == "transformers" else code,
    )
    base = base._replace(copies=method.quantization is None or method.quantization.format in ("nf4", "fp4"))
    if method.quantization is None and running is not None:  # dequantised when it is loaded
        return base._replace(kind="stored", skip=running.skip, running=running, packed=True), []
    if method.quantization is None:
        return base, []
    recipe, notes = quantised_recipe(model, base._replace(kind="stored"), method.quantization, is_stored)
    packed = is_stored or (recipe.packed and (running is None or running.kernel not in MADE_WHEN_LOADED))
    return recipe._replace(running=running, packed=packed), notes
