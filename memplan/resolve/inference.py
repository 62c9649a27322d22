"""Fill in what an inference run leaves open, and refuse what its model cannot do, in steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from memplan.catalogue.attention.efficient_workspace import large_tiles
from memplan.catalogue.families.litgpt import SUPPORTED, has_family
from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.inference.caches import caches as caches_of
from memplan.catalogue.inference.decoding import keeping
from memplan.catalogue.inference.one_pass import LoadOptions, Pass
from memplan.catalogue.methods.methods import ADAPTERS, Recipe
from memplan.catalogue.profiles.profiles import library_behaviour
from memplan.catalogue.quantization.inference_formats import MADE_WHEN_LOADED, RUNS, InferenceFormat
from memplan.catalogue.quantization.packed_kernels import BACKENDS
from memplan.core.errors import UnsupportedModelError, refused
from memplan.models.model import ModelSpec
from memplan.program.graph import Graph, operations_of
from memplan.program.inference.passes import cross_attends_to_images, decoder_graph
from memplan.program.run import ResolvedRun
from memplan.program.stack_facts import tower_dtype
from memplan.program.structure import Structure
from memplan.resolve import steps
from memplan.resolve.batches import image_axes, with_lengths
from memplan.resolve.caches import cache_implementation, cache_storage, decided_cache, refuse_cache
from memplan.resolve.card import find_card
from memplan.resolve.communicators import communicators
from memplan.resolve.defaults import fill_precision, with_adapter_dtype, with_defaults
from memplan.resolve.device_map import place_litgpt_blocks, place_on_devices
from memplan.resolve.inference_formats import format_running, note_of
from memplan.resolve.kernels import with_attention
from memplan.resolve.method import loaded_wide, method_recipe, quantised_recipe
from memplan.resolve.notes import expert_notes, published_code_note
from memplan.resolve.open_run import BatchFacts, OpenRun, Parts, found_later
from memplan.resolve.parallelism import degrees_of
from memplan.resolve.quantized_checkpoint import method_for_inference
from memplan.resolve.refusals.across_parts import training_settings
from memplan.resolve.refusals.models import model_classes
from memplan.resolve.refusals.refuse import refuse
from memplan.resolve.refusals.settings import settings
from memplan.spec.base import Part
from memplan.spec.formats import Quantization
from memplan.spec.generation import Generation
from memplan.spec.run import Batch, RunSpec
from memplan.spec.training import Method, Precision


class OpenInference(OpenRun):
    """A forward or generate run while it is resolved.

    asked        the run as it was asked for
    gpu          the GPU, if one was given
    generates    the run generates tokens
    batch        its batch, whose lengths are filled in
    generation   its generation, whose cache is filled in
    pictures     the axes that images decide
    uses_cache   the model returns its cache
    one_pass     how the pass uses the cache, and how the weights are loaded
    """

    asked: RunSpec
    gpu: GPU | None = None
    generates: bool
    batch: Batch
    generation: Generation
    pictures: tuple[tuple[str, int], ...] = ()
    uses_cache: bool = False
    one_pass: Pass = found_later()
    graph: Graph = found_later()

    @property
    def keeps_formats(self) -> bool:
        """Whether weights run in formats that nothing trains over."""
        return self.code == "transformers" and self.library.weights.runs_formats


def decide_inference(run: RunSpec, model: ModelSpec, generates: bool) -> ResolvedRun:
    """Return a forward or generate run with every null filled in, except what proposes its tokens.

    Raises SpecError, UnknownNameError, ConfigError or FactsMissingError.
    """
    refuse(training_settings(run))
    r = OpenInference(
        notes=[],
        model=model,
        batch_facts=BatchFacts(),
        trains=False,
        asked=run,
        generates=generates,
        batch=run.batch,
        generation=run.generation,
        **Parts.of(run)._asdict(),
    )
    for step in STEPS:
        step(r)
    names = "method", "precision", "kernels", "batch", "generation"
    parts: dict[str, Part] = {name: getattr(r, name) for name in names}
    parts["loop"] = run.loop.model_copy(update={"use_cache": r.uses_cache})
    return ResolvedRun(
        Structure(r.graph, accumulates=False, optimizer="none", clips=False),
        r.batch,
        r.gpu,
        r.attention_dtype != "fp32",
        large_tiles(r.capability),
        tuple(r.notes),
        parts,
        r.pictures,
        communicators(run.parallelism) if r.degrees.tp > 1 else (),
        beams=r.generation.num_beams,
        part=r.generation.prefill_chunk_size or 0,
    )


def _look_up_library(r: OpenInference) -> None:
    """Look up what the profile's library does for the model, and refuse what it cannot run."""
    model, kind = r.model, r.model.model_type
    r.library = library_behaviour(r.profile, kind, r.method.quantization is not None)
    if r.code not in ("transformers", "litgpt") or r.library.sharding.pipeline != "device_map":
        raise refused("profile", f"inference is not supported with {r.profile}; use a transformers or LitGPT profile")
    if r.code == "litgpt" and not has_family(model):
        raise refused("profile", f"LitGPT does not have model_type {kind}; supported: {SUPPORTED}")
    if r.generates and model.objective not in ("causal_lm", "seq2seq_lm"):
        raise refused(
            "task",
            f"generate is not supported yet for {model.objective}, the objective of {r.name}; use forward",
        )
    if r.generates and not model.family.generation.is_modelled:
        raise UnsupportedModelError(f"task: generate is not supported yet for model_type {kind}; use forward", "task")
    refuse(model_classes(r))


def _find_card(r: OpenInference) -> None:
    """Look up the GPU."""
    if r.asked.gpu is not None:
        r.gpu, r.card = find_card(r.asked.gpu, r.parallelism.world > 1)


def _fill_parts(r: OpenInference) -> None:
    """Fill in the compute dtype, and the kernels of a run without a backward pass."""
    r.precision = fill_precision(r.precision, trains=False)
    kernels = with_attention(r.kernels, r.model, r.library)
    r.kernels = kernels.model_copy(update={"checkpointing": "none", "reentrant": False, "fused": ()})


def _read_checkpoint(r: OpenInference) -> None:
    """Fill in the quantisation of the checkpoint, and the format that it runs in."""
    model, weights = r.model, r.precision.weights
    checkpoint = method_for_inference(model, r.method, weights, r.capability, r.keeps_formats)
    method = checkpoint.method
    if r.keeps_formats and method.kind not in ADAPTERS:
        is_plain = method.quantization is None and not model.config.get("quantization_config")
        if is_plain and model.card.get("stored") == "mxfp4":  # as from_pretrained loads it
            method = method.model_copy(update={"quantization": Quantization(format="mxfp4")})
        if checkpoint.running is None and method.quantization is not None:
            running = format_running(model, method.quantization, weights, r.capability)
            if running is not None:
                checkpoint = checkpoint._replace(running=running, notes=(*checkpoint.notes, note_of(running)))
    r.checkpoint = checkpoint
    r.run_formats = tuple(RUNS) if checkpoint.running is not None else ()
    r.method = _fill_quantization(r, with_adapter_dtype(method, r.precision, r.library.defaults))


def _fill_quantization(r: OpenInference, method: Method) -> Method:
    """Return the method with its quantisation filled in: nothing is prepared for training, and packed weights have a
    kernel.
    """
    q, field = method.quantization, "method.quantization"
    if q is None:
        return method
    for setting in ("kbit_preparation", "experts"):
        if getattr(q, setting):
            raise refused(f"{field}.{setting}", "only applies to training; leave it out")
    known = BACKENDS.get(q.format, ())
    if q.backend and q.backend not in (*known, *RUNS.get(q.format, ())):
        choices = ", ".join(known) or "none"
        raise refused(f"{field}.backend", f"{q.backend} does not run {q.format}; choose {choices}")
    backend = r.library.weights.kernel(q.format) or RUNS.get(q.format, ("",))[0]
    skip = r.library.defaults.method_quantization_skip
    filled = with_defaults(q, kbit_preparation=False, skip=skip, backend=backend, experts=False)
    return method.model_copy(update={"quantization": filled})


def _refuse_settings(r: OpenInference) -> None:
    refuse(settings(r))


def _divide_ranks(r: OpenInference) -> None:
    """Fill in the degrees of a tensor-parallel rank."""
    if r.parallelism.tp > 1:
        r.degrees = degrees_of(r.parallelism, r.library.sharding)


def _choose_recipe(r: OpenInference) -> None:
    """Choose the dtypes, the adapters, and what is quantised."""
    if r.parallelism.tp > 1:
        r.degrees = r.degrees._replace(etp=1)
    recipe, notes = _recipe(r.model, r.method, r.precision, r.code, r.checkpoint.as_stored, r.checkpoint.running)
    r.recipe = recipe._replace(wide=loaded_wide(r.model, r.precision))
    r.notes += notes


def _read_batch(r: OpenInference) -> None:
    """Fill in the lengths of the batch, and what the wiring depends on of it."""
    run, model = r.asked, r.model
    is_single = run.batch.micro * run.generation.num_beams == 1
    returns_cache = r.generates or r.code == "transformers"  # LitGPT's forward only has a cache when told to
    r.uses_cache = bool(run.loop.use_cache) and returns_cache and model.objective in ("causal_lm", "seq2seq_lm")
    r.pictures = image_axes(model, run.batch, run.profile)
    r.batch = with_lengths(run.batch, model, r.generates)
    r.batch_facts = BatchFacts(
        windowed=model.sliding_window is not None and _chunk(r) >= model.sliding_window,
        is_single_sequence=is_single,
        scans_once=_chunk(r) <= model.scan_chunk,
        is_one_image=is_single and dict(r.pictures).get("images") == 1,
        has_uneven_patches=dict(r.pictures).get("seen", 0) % 8 != 0,
        media=r.batch.media,
        pads_tower=dict(r.pictures).get("unread", 0) > 0,
    )


def _chunk(r: OpenInference) -> int:
    """Return the prompt tokens of the longest pass."""
    return min(r.generation.prefill_chunk_size or r.batch.sequence, r.batch.sequence)


def _wire_inference(r: OpenInference) -> None:
    """Add to the wiring what only matters without a backward pass."""
    r.wiring = r.wiring._replace(
        records=False,
        caching=r.uses_cache,
        last_only=r.generates and _takes_last(r),
        generates=r.generates,
    )


def _takes_last(r: OpenInference) -> bool:
    """Whether the head reads only the last token."""
    return r.library.generation.last_logits and not r.model.has_all_logits


def _choose_cache(r: OpenInference) -> None:
    """Fill in the cache of a run that generates."""
    if r.generates:
        r.generation = decided_cache(r.generation, r.library, r.profile)
    if r.model.is_encoder_decoder and r.generation.cache_implementation == "legacy":
        raise refused(
            "generation.cache_implementation",
            f"legacy is not supported yet for {r.name}; supported: dynamic, static",
        )
    if r.model.is_encoder_decoder and r.generation.prefill_chunk_size is not None:
        r.generation = r.generation.model_copy(update={"prefill_chunk_size": None})
        r.notes.append(
            "generation.prefill_chunk_size only divides the decoder's prompt of a few tokens; the encoder reads its "
            "sequence in one pass"
        )
    if r.generates:
        refuse_cache(r.asked, r.generation, r.model, r.batch)


def _build_pass(r: OpenInference) -> None:
    """Describe the pass over the prompt."""
    library, generation, q = r.library, r.generation, r.method.quantization
    stores_head = library.weights.stores_head and q is not None and q.format == "awq-int4"
    stored = cache_storage(generation, r.model, r.batch)
    r.one_pass = Pass(
        "prefill" if r.generates else "forward",
        cache_implementation(generation) or ("dynamic" if r.wiring.caching else ""),
        _takes_last(r),
        library.loss.logits == "model" or (r.generates and library.generation.casts_all_logits),
        r.wiring.has_mask(),
        r.batch_facts.windowed and _chunk(r) > (r.model.sliding_window or 0),
        library.weights.few_rows,
        generation.num_beams > 1,
        generation.do_sample,
        r.generates and r.model.is_encoder_decoder,
        r.generates and r.model.family.generation.suppresses,
        spans_autocast=r.generates and r.precision.autocast,
        loaded=LoadOptions(library.weights.preallocates, stores_head, (q.backend or "") if q is not None else ""),
        stored=stored,
        batches_later_passes=r.generates and library.model.experts == "stacked",
    )
    r.wiring = r.wiring._replace(keeps_cache_layout=stored is not None)


def _build_graph(r: OpenInference) -> None:
    """Build the graph, and place its modules on the GPUs of one process."""
    p = r.parallelism
    r.graph = Graph(
        r.model,
        r.recipe,
        r.wiring,
        checkpoint=False,
        loss="",
        hold_outputs=False,
        adds_in_place=True,
        rank=r.method.rank,
        trainable_layers=0,
        code=r.code,
        degrees=r.degrees,
        inference=r.one_pass,
    )
    if p.pp == 1 and p.device_map is None:
        return
    if r.code == "litgpt":
        placed, notes = place_litgpt_blocks(r.graph, p)
        if r.recipe.weights != "fp32":  # LitGPT creates its caches in fp32
            r.graph = r.graph._replace(inference=r.one_pass._replace(allocated_dtype="fp32"))
    else:
        placed, notes = place_on_devices(r.graph, p, r.gpu, r.library.sharding.device_map == "largest")
    r.notes += notes
    r.graph = r.graph._replace(placed=placed._replace(card=p.stage or 0))


def _check_caches(r: OpenInference) -> None:
    """Note or refuse a cache that is only counted in part, and note what is unusual about the experts."""
    kind = r.model.model_type
    if r.uses_cache and not r.generates and not keeps_every_cache(r.graph):
        r.notes.append(f"the cache of {kind} is only counted in part; set loop.use_cache false to leave it out")
    if r.generates and not keeps_every_cache(r.graph):
        raise UnsupportedModelError(
            f"kernels.attention: generate with {r.kernels.attention} is not supported yet for model_type {kind}",
            "kernels.attention",
        )
    r.notes += expert_notes(r.graph, r.capability)
    if r.generates and r.model.family.generation.published_cache:
        r.notes.append(published_code_note(kind))


def _check_tower(r: OpenInference) -> None:
    """Add the dtype of the vision tower to the axes of images."""
    if r.pictures:
        r.pictures = (*r.pictures, ("tower_half", int(tower_dtype(r.model, r.recipe) != "fp32")))


STEPS: tuple[Callable[[OpenInference], None], ...] = (
    _look_up_library,
    _find_card,
    _fill_parts,
    steps.write_experts,
    _read_checkpoint,
    _refuse_settings,
    _divide_ranks,
    steps.divide_matrices,
    steps.note_card,
    steps.note_weights,
    _choose_recipe,
    steps.choose_attention,
    _read_batch,
    steps.wire,
    _wire_inference,
    _choose_cache,
    _build_pass,
    _build_graph,
    _check_caches,
    _check_tower,
)


@lru_cache(maxsize=512)
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
        copies="always" if method.quantization is not None and method.quantization.format in ("nf4", "fp4") else "",
    )
    if method.quantization is None and running is not None:  # dequantised when it is loaded
        return base._replace(kind="stored", skip=running.skip, running=running, packed=True), []
    if method.quantization is None:
        return base, []
    recipe, notes = quantised_recipe(model, base._replace(kind="stored"), method.quantization, is_stored)
    packed = is_stored or (recipe.packed and (running is None or running.kernel not in MADE_WHEN_LOADED))
    return recipe._replace(running=running, packed=packed), notes
