"""What a run of inference leaves open is decided here, and what its model cannot do is refused here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memplan.catalogue.attention.attention import SINGLE, large_tiles
from memplan.catalogue.degrees import WHOLE, Degrees
from memplan.catalogue.experts.expert_loops import AS_MODULES
from memplan.catalogue.families.litgpt import KINDS
from memplan.catalogue.hardware.gpus import find_gpu
from memplan.catalogue.inference.caches import caches as caches_of
from memplan.catalogue.inference.decoding import CACHED_BY_ITS_CODE, NOT_YET, SUPPRESSES, keeping
from memplan.catalogue.inference.one_pass import Loaded, Pass
from memplan.catalogue.methods.methods import ADAPTERS, Recipe
from memplan.catalogue.parallelism.tensor_parallel import check
from memplan.catalogue.profiles.profiles import decided, find_profile
from memplan.catalogue.quantization.inference_formats import MADE_WHEN_LOADED, RUNS, Running
from memplan.catalogue.quantization.packed_kernels import BACKENDS
from memplan.core.errors import SpecError, UnsupportedModelError
from memplan.core.units import ITEMSIZE
from memplan.models.model import ModelSpec
from memplan.program.graph import Graph, built
from memplan.program.inference.passes import looks_across, over_source
from memplan.program.run import Decided
from memplan.program.stack_facts import tower_dtype
from memplan.program.stored.checkpoint import notes as stored_notes
from memplan.program.training.program import Structure
from memplan.resolve.batches import axes_of_images, lengths
from memplan.resolve.caches import decided_cache, kind_of, refuse_cache, stored_of
from memplan.resolve.communicators import communicators
from memplan.resolve.defaults import adapted_experts, check_classes
from memplan.resolve.device_map import placed_in_sequence, placed_on
from memplan.resolve.inference_formats import note_of, running_of
from memplan.resolve.kernels import as_the_version_has, dtype_of_attention, in_words, kernel_of_tower, wiring_of
from memplan.resolve.method import quantised, recipe_of
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
from memplan.resolve.quantized_checkpoint import served
from memplan.resolve.refusals import refuse_of_inference, refuse_parts, refuse_parts_of_matrices
from memplan.spec.base import Part
from memplan.spec.formats import Quantization
from memplan.spec.run import RunSpec
from memplan.spec.training import Kernels, Method, Optimizer, Precision


def decide_inference(run: RunSpec, model: ModelSpec) -> Decided:
    """Fill in every null of a run whose task is forward or generate, but for what proposes its tokens.

    Raises SpecError, UnknownNameError, ConfigError or FactsMissingError.
    """
    refuse_of_inference(run)
    profile = find_profile(run.profile).name
    words = decided(profile, model.model_type, run.method.quantization is not None)
    if words["code"] not in ("transformers", "litgpt") or words["pipeline"] != "device_map":
        raise SpecError(f"profile: {run.profile} has no inference here; transformers' and LitGPT's have", "profile")
    if words["code"] == "litgpt" and model.model_type not in KINDS:
        raise SpecError(
            f"profile: LitGPT has no model_type {model.model_type} here; supported: {', '.join(KINDS)}", "profile"
        )
    generates = run.task == "generate"
    if generates and model.objective not in ("causal_lm", "seq2seq_lm"):
        raise SpecError(
            f"task: {model.name or model.model_type} is taken for {model.objective}, and generate is not supported yet "
            "for that; forward is",
            "task",
        )
    if generates and model.model_type in NOT_YET:
        raise UnsupportedModelError(
            f"task: generate is not supported yet for model_type {model.model_type}; forward is", "task"
        )
    check_classes(model, run.kernels, run.profile)
    if model.is_encoder_decoder and model.unquantised and run.precision.weights == "fp16":
        raise SpecError(
            f"precision.weights: fp16 is not supported yet for {model.name or model.model_type}, of which transformers "
            f"keeps {', '.join(model.unquantised)} in fp32 then; bf16 and fp32 are",
            "precision.weights",
        )
    gpu = find_gpu(run.gpu) if run.gpu is not None else None
    capability = gpu.compute_capability if gpu else None
    precision = _precision(run.precision)
    if words["experts"] == "modules" and model.model_type in AS_MODULES:  # experts are linear layers
        model = ModelSpec({**model.config, "experts_implementation": "modules"}, model.name, model.card)
    formats = words["code"] == "transformers" and words["runs_formats"]
    over = served(model, run.method, precision.weights, capability, formats)
    method, running = over.method, over.running
    published = model.card.get("stored") if method.kind not in ADAPTERS and method.quantization is None else None
    if formats and published == "mxfp4" and not model.config.get("quantization_config"):  # as from_pretrained loads it
        method = method.model_copy(update={"quantization": Quantization(format=published)})
    if running is None and formats and method.kind not in ADAPTERS and method.quantization is not None:
        running = running_of(model, method.quantization, precision.weights, capability)
        over = over._replace(notes=(*over.notes, *((note_of(running),) if running is not None else ())))
    if method.kind in ADAPTERS:
        dtype = method.adapter_dtype or words["method.adapter_dtype"]
        method = method.model_copy(update={"adapter_dtype": precision.weights if dtype == "weights" else dtype})
    method = _quantised(method, words["method.quantization.skip"], {f: words[f] for f in BACKENDS})
    kernels = run.kernels.model_copy(update={"checkpointing": "none", "reentrant": False, "fused": ()})
    refuse_parts(method, run.precision, run.optimizer, kernels, runs=tuple(RUNS) if running is not None else ())
    degrees = _degrees(run, model, method, kernels, precision, words)
    notes = [*gpu_notes(gpu, str(run.gpu))] if gpu is not None else []
    notes += [*dtype_notes(gpu, str(precision.compute)), *stored_notes(model), *over.notes, *kernel_notes(model)]
    recipe, more = _recipe(model, method, precision, str(words["code"]), over.as_stored, running)
    notes += more
    attention, _, more = as_the_version_has(model, kernels, run.profile, words)
    notes += more
    returns = generates or words["code"] == "transformers"  # LitGPT's model has a cache where it is told to
    caches = bool(run.loop.use_cache) and returns and model.objective in ("causal_lm", "seq2seq_lm")
    pictures = axes_of_images(model, run)
    batch = lengths(run.batch, model, generates)
    window, seen = model.sliding_window, dtype_of_attention(model, recipe)
    read = min(run.generation.prefill_chunk_size or batch.sequence, batch.sequence)
    windowed = window is not None and read >= window
    if not words["has_family"]:
        notes.append(unknown_note(model, run.profile))
    padded = run.loop.padded and words["code"] != "litgpt"  # which has a mask of its cache alone
    if run.loop.padded and not padded:
        notes.append(unmasked_note(run.profile))
    wiring = wiring_of(model, attention, seen, recipe, capability, padded, windowed)
    wiring = in_words(wiring, words, attention)._replace(
        single=batch.micro * run.generation.num_beams == 1 and model.model_type in SINGLE,
        wide=seen == "fp32",
        images=bool(batch.images),
        uneven=dict(pictures).get("seen", 0) % 8 != 0,
        tower=kernel_of_tower(model, recipe, kernels, capability) if batch.images else "",
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
    stored = stored_of(generation, model, batch)
    now = Pass(
        "prefill" if generates else "forward",
        kind_of(generation) or ("dynamic" if wiring.caching else ""),
        words["last_logits"] and not model.is_encoder_decoder,
        words["logits"] == "model" or (generates and words["wide_logits"]),
        wiring.has_mask(),
        windowed and read > (window or 0),
        words["few_rows"],
        generation.num_beams > 1,
        generation.do_sample,
        generates and model.is_encoder_decoder,
        generates and model.model_type in SUPPRESSES,
        around=generates and precision.autocast,
        loaded=Loaded(words["warms"], _stores_head(method, words["stores_head"]), _backend(method)),
        stored=stored,
        switches=generates and words["experts"] == "stacked",
    )
    wiring = wiring._replace(handed_back=stored is not None)
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
        inference=now,
    )
    if run.parallelism.pp > 1 or run.parallelism.device_map is not None:
        if words["code"] == "litgpt":
            placed, more = placed_in_sequence(graph, run.parallelism)
            if recipe.weights != "fp32":  # which its caches are made in
                graph = graph._replace(inference=now._replace(made="fp32"))
        else:
            placed, more = placed_on(graph, run.parallelism, gpu, words["device_map"] == "largest")
        notes += more
        graph = graph._replace(placed=placed._replace(card=run.parallelism.stage or 0))
    if caches and not generates and not caches_all(graph):
        notes.append(f"the cache that {model.model_type} returns is not counted whole: say loop.use_cache false")
    if generates and not caches_all(graph):
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
    return Decided(
        structure,
        batch,
        gpu,
        seen != "fp32",
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
    """Which part of each matrix a rank has. Raises SpecError for what ranks that divide them cannot run."""
    p = run.parallelism
    if p.tp == 1:
        return WHOLE
    untrained, plain = Optimizer(name="none"), kernels.model_copy(update={"loss": "hf"})
    style = words["tensor_parallel"]
    refuse_parts_of_matrices(p, method, precision, untrained, plain, run.profile, style, own=False, trains=False)
    degrees = degrees_of(p, style)
    check(model, degrees, ITEMSIZE[precision.weights], adapted_experts(model, method))
    return degrees._replace(etp=1)


def caches_all(graph: Graph) -> bool:
    """Whether as many layers leave something for the tokens to come as the table of caches has."""
    graph = graph._replace(placed=None)
    now = graph.inference
    if now is not None and now.cache.startswith("offloaded"):  # none is left on the card
        graph = graph._replace(inference=now._replace(cache="static" if now.static else "dynamic"))
    if graph.model.is_encoder_decoder:
        graph = over_source(graph)
    stack, axes = built(graph)
    kept = sum(axes[times] * blocks for times, blocks in keeping(stack))
    across = graph.model.is_encoder_decoder or looks_across(graph)  # without images nothing attends to them
    own = [layer for layer in caches_of(graph.model) if any(part.per != "source" or across for part in layer.parts)]
    return kept == len(own)


def _precision(p: Precision) -> Precision:
    compute = p.compute or ("bf16" if p.autocast and p.weights == "fp32" else p.weights)
    return p.model_copy(update={"compute": compute})


def _stores_head(method: Method, awq: bool) -> bool:
    q = method.quantization
    return awq and q is not None and q.format == "awq-int4"


def _backend(method: Method) -> str:
    q = method.quantization
    return (q.backend or "") if q is not None else ""


def _quantised(method: Method, skip: tuple[str, ...], backends: Mapping[str, str]) -> Method:
    """Nothing is prepared for training; packed weights have a kernel, by their format."""
    q = method.quantization
    if q is None:
        return method
    if q.kbit_preparation:
        field = "method.quantization.kbit_preparation"
        raise SpecError(f"{field}: prepares weights for training, and nothing trains", field)
    known = BACKENDS.get(q.format, ())
    if q.backend and q.backend not in (*known, *RUNS.get(q.format, ())):
        field = "method.quantization.backend"
        raise SpecError(f"{field}: {q.backend} is no kernel of {q.format}; known: {', '.join(known) or 'none'}", field)
    update = {
        "kbit_preparation": False,
        "skip": skip if q.skip is None else q.skip,
        "backend": (backends.get(q.format, "") or RUNS.get(q.format, ("",))[0]) if q.backend is None else q.backend,
    }
    return method.model_copy(update={"quantization": q.model_copy(update=update)})


def _recipe(
    model: ModelSpec, method: Method, precision: Precision, code: str, stored: bool, running: Running | None
) -> tuple[Recipe, list[str]]:
    """Adapters as they train, but that nothing is dropped; without them, weights as they are stored."""
    if method.kind in ADAPTERS:
        recipe, notes = recipe_of(model, method, precision, code, stored)
        return recipe._replace(dropout=False), [note for note in notes if not note.startswith("LLM.int8")]
    bare = Recipe(
        "full",
        precision.weights,
        str(precision.compute),
        precision.autocast,
        library="peft" if code == "transformers" else code,
    )
    bare = bare._replace(copies=method.quantization is None or method.quantization.format in ("nf4", "fp4"))
    if method.quantization is None and running is not None:  # whole, once it is loaded
        return bare._replace(kind="stored", skip=running.skip, running=running, packed=True), []
    if method.quantization is None:
        return bare, []
    recipe, notes = quantised(model, bare._replace(kind="stored"), method.quantization, stored)
    packed = stored or (recipe.packed and (running is None or running.kernel not in MADE_WHEN_LOADED))
    return recipe._replace(running=running, packed=packed), notes
