"""What a run of inference leaves open is decided here, and what its model cannot do is refused here."""

from __future__ import annotations

from collections.abc import Mapping

from memplan.batches import axes_of_images, lengths
from memplan.caching import decided_cache, kind_of, refuse_cache, stored_of
from memplan.catalogue.attention import JOINED, large_tiles
from memplan.catalogue.caches import caches as caches_of
from memplan.catalogue.decoding import NOT_YET, Loaded, Pass, keeping
from memplan.catalogue.expert_loops import AS_MODULES
from memplan.catalogue.litgpt import KINDS
from memplan.catalogue.methods import ADAPTERS, Recipe
from memplan.catalogue.packed import BACKENDS
from memplan.catalogue.profiles import decided, find_profile
from memplan.checkpoint import notes as stored_notes
from memplan.errors import SpecError, UnsupportedModelError
from memplan.gpus import find_gpu
from memplan.graph import Graph, built, tower_dtype
from memplan.kernels import as_the_version_has, dtype_of_attention, in_words, kernel_of_tower, wiring_of
from memplan.models import ModelSpec
from memplan.notes import dtype_notes, expert_notes, gpu_notes, kernel_notes
from memplan.prequantized import served
from memplan.program import Structure
from memplan.recipes import quantised, recipe_of
from memplan.refusals import refuse_of_inference, refuse_parts
from memplan.resolve import Decided, with_new_tokens, with_use_cache
from memplan.spec import Method, Part, Precision, RunSpec


def decide_inference(run: RunSpec, model: ModelSpec) -> Decided:
    """Fill in every null of a run whose task is forward or generate.

    Raises SpecError, UnknownNameError, ConfigError or FactsMissingError.
    """
    refuse_of_inference(run)
    run = with_use_cache(with_new_tokens(run))
    profile = find_profile(run.profile).name
    words = decided(profile, model.model_type, run.method.quantization is not None)
    if words["code"] not in ("transformers", "litgpt") or words["pipeline"] != "device_map":
        raise SpecError(f"profile: {run.profile} has no inference here; transformers' and LitGPT's have", "profile")
    if words["code"] == "litgpt" and model.model_type not in KINDS:
        raise SpecError(
            f"profile: LitGPT has no model_type {model.model_type} here; supported: {', '.join(KINDS)}", "profile"
        )
    generates = run.task == "generate"
    if generates and model.objective != "causal_lm":
        raise SpecError(
            f"task: {model.name or model.model_type} is taken for {model.objective}, and generate is not supported yet "
            "for that; forward is",
            "task",
        )
    if not generates and model.model_type == "deepseek_v4":
        raise UnsupportedModelError("task: forward is not supported yet for model_type deepseek_v4", "task")
    if generates and model.model_type in NOT_YET:
        raise UnsupportedModelError(
            f"task: generate is not supported yet for model_type {model.model_type}; forward is", "task"
        )
    gpu = find_gpu(run.gpu) if run.gpu is not None else None
    capability = gpu.compute_capability if gpu else None
    over = served(model, run.method, capability)
    method, precision = over.method, _precision(run.precision)
    if method.kind in ADAPTERS:
        dtype = method.adapter_dtype or words["method.adapter_dtype"]
        method = method.model_copy(update={"adapter_dtype": precision.weights if dtype == "weights" else dtype})
    method = _quantised(method, words["method.quantization.skip"], {f: words[f] for f in BACKENDS})
    kernels = run.kernels.model_copy(update={"checkpointing": "none", "reentrant": False, "fused": ()})
    refuse_parts(method, run.precision, run.optimizer, kernels)
    if words["experts"] == "modules" and model.model_type in AS_MODULES:
        model = ModelSpec({**model.config, "experts_implementation": "modules"}, model.name, model.card)
    notes = [*gpu_notes(gpu, str(run.gpu))] if gpu is not None else []
    notes += [*dtype_notes(gpu, str(precision.compute)), *stored_notes(model), *over.notes, *kernel_notes(model)]
    recipe, more = _recipe(model, method, precision, str(words["code"]), over.as_stored)
    notes += more
    attention, _, more = as_the_version_has(model, kernels, run.profile, words)
    notes += more
    returns = generates or words["code"] == "transformers"  # LitGPT's model has a cache where it is told to
    caches = bool(run.loop.use_cache) and returns and model.objective == "causal_lm"
    pictures = axes_of_images(model, run)
    batch = lengths(run.batch, model)
    window, seen = model.sliding_window, dtype_of_attention(model, recipe)
    read = min(run.generation.prefill_chunk_size or batch.sequence, batch.sequence)
    windowed = window is not None and read >= window
    wiring = wiring_of(model, attention, seen, recipe, capability, run.loop.padded, windowed)
    wiring = in_words(wiring, words, attention)._replace(
        flattens=batch.micro * run.generation.num_beams == 1 and model.model_type in JOINED,
        wide=seen == "fp32",
        images=bool(batch.images),
        uneven=dict(pictures).get("seen", 0) % 8 != 0,
        tower=kernel_of_tower(model, recipe, kernels, capability) if batch.images else "",
        records=False,
        caching=caches or words["forward_caches"],
        last_only=generates and words["last_logits"],
    )
    generation = decided_cache(run.generation, words, run.profile) if generates else run.generation
    if generation.do_sample and generation.num_beams > 1:
        raise SpecError(
            "generation.do_sample: with several beams is not supported yet; say one", "generation.do_sample"
        )
    if generates:
        refuse_cache(generation, model, batch)
    stored = stored_of(generation, model, batch)
    now = Pass(
        "prefill" if generates else "forward",
        kind_of(generation) or ("dynamic" if wiring.caching else ""),
        words["last_logits"],
        words["logits"] == "model",
        wiring.has_mask(),
        windowed and read > (window or 0),
        words["few_rows"],
        generation.num_beams > 1,
        generation.do_sample,
        loaded=Loaded(words["warms"], _stores_head(method, words["stores_head"]), _backend(method)),
        stored=stored,
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
        inference=now,
    )
    if caches and not generates and not caches_all(graph):
        notes.append(f"the cache that {model.model_type} returns is not counted whole: say loop.use_cache false")
    if generates and batch.images and any(part.per == "source" for layer in caches_of(model) for part in layer.parts):
        raise SpecError(
            f"batch.images: keys and values of images, which {model.model_type} caches, are not supported yet with "
            "task generate; supported: 0, text alone",
            "batch.images",
        )
    if (
        generates
        and run.loop.padded
        and any(part.per == "sequence" for layer in caches_of(model) for part in layer.parts)
    ):
        raise SpecError(
            f"loop.padded: true is not supported yet with task generate for {model.model_type}, whose layers keep "
            "states; supported: false",
            "loop.padded",
        )
    if generates and not caches_all(graph):
        raise UnsupportedModelError(
            f"kernels.attention: generate with {kernels.attention} is not supported yet for model_type "
            f"{model.model_type}",
            "kernels.attention",
        )
    notes += expert_notes(graph, capability)
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
        beams=generation.num_beams,
        part=generation.prefill_chunk_size or 0,
    )


def caches_all(graph: Graph) -> bool:
    """Whether as many layers leave something for the tokens to come as the table of caches has."""
    now = graph.inference
    if now is not None and now.cache.startswith("offloaded"):  # none is left on the card
        graph = graph._replace(inference=now._replace(cache="static" if now.static else "dynamic"))
    stack, axes = built(graph)
    kept = sum(axes[times] * blocks for times, blocks in keeping(stack))
    own = [layer for layer in caches_of(graph.model) if any(part.per != "source" for part in layer.parts)]
    return kept == len(own)


def _precision(p: Precision) -> Precision:
    return p.model_copy(update={"compute": p.compute or p.weights})


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
    if q.backend and q.backend not in known:
        field = "method.quantization.backend"
        raise SpecError(f"{field}: {q.backend} is no kernel of {q.format}; known: {', '.join(known) or 'none'}", field)
    update = {
        "kbit_preparation": False,
        "skip": skip if q.skip is None else q.skip,
        "backend": backends.get(q.format, "") if q.backend is None else q.backend,
    }
    return method.model_copy(update={"quantization": q.model_copy(update=update)})


def _recipe(
    model: ModelSpec, method: Method, precision: Precision, code: str, stored: bool
) -> tuple[Recipe, list[str]]:
    """Adapters as they train, but that nothing is dropped; without them, weights as they are stored."""
    if method.kind in ADAPTERS:
        recipe, notes = recipe_of(model, method, precision, code, stored)
        return recipe._replace(dropout=False), [note for note in notes if not note.startswith("LLM.int8")]
    bare = Recipe("full", precision.weights, str(precision.compute), library="peft" if code == "transformers" else code)
    bare = bare._replace(copies=method.quantization is None or method.quantization.format in ("nf4", "fp4"))
    if method.quantization is None:
        return bare, []
    return quantised(model, bare._replace(kind="stored"), method.quantization, stored)
