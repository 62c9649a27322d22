"""What a run leaves open is decided here, and what its model cannot do is refused here.

A profile (a framework and its version) says what `null` means: see `memplan.catalogue.profiles`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, cast

from memplan.cards import find_model
from memplan.catalogue.attention import JOINED, NO_FLASH_2, Wiring, large_tiles
from memplan.catalogue.experts import AS_MODULES
from memplan.catalogue.litgpt import KINDS
from memplan.catalogue.litgpt_lora import ROLES, SWITCHES
from memplan.catalogue.losses import adds_in_place
from memplan.catalogue.methods import ADAPTERS, PARTS, Recipe, inside
from memplan.catalogue.profiles import decided, find_profile
from memplan.catalogue.states import optimizer_names, spares_embeddings, takes_foreach
from memplan.checkpoint import notes as stored_notes
from memplan.errors import MemplanError, SpecError, UnknownNameError
from memplan.families.vision import PACKS, axes_of, is_vision, picture_of, sees
from memplan.gpus import GPU, ambiguous_with, find_gpu
from memplan.graph import (
    Graph,
    adaptable,
    attention_dtype,
    built,
    elements,
    fusible_kernels,
    gates,
    linears,
    modules,
    parameter_targets,
    several,
    tower_dtype,
    weights_of,
)
from memplan.models import ModelSpec, with_objective
from memplan.objectives import saved_with
from memplan.prequantized import trained
from memplan.program import Structure
from memplan.ranks import ONE, Ranks, mixed
from memplan.refusals import FSDP, ZERO, refuse, refuse_divided, refuse_on_host, refuse_parts
from memplan.spec import Batch, Kernels, Loop, Method, Optimizer, Parallelism, Part, Precision, RunSpec

_SEEN = "transformers-5"  # the profile whose vision-language models are counted with images
_PEFT_ALPHA = 8.0  # peft 0.21 LoraConfig.lora_alpha; memory does not depend on it


class Decided(NamedTuple):
    """A run with nothing left open. Of its `batch` the structure has only whether it accumulates, and whether it is one
    sequence.

    `half` is whether attention computes in 16 bits, `large_tiles` whether the card's shared memory holds tiles of
    128 x 128; `parts` are the spec's parts with every null filled in; `pictures` are the axes that images decide.
    """

    structure: Structure
    batch: Batch
    gpu: GPU | None
    half: bool
    large_tiles: bool
    notes: tuple[str, ...]
    parts: dict[str, Part]
    pictures: tuple[tuple[str, int], ...] = ()


def decide(run: RunSpec, model: ModelSpec | None = None) -> Decided:
    """Fill in every null of the run, which may be of a `model` that has been found already.

    Raises SpecError, UnknownNameError, ConfigError or FactsMissingError.
    """
    refuse(run)
    model = with_objective(model or find_model(run.model), run.objective)
    window = model.sliding_window
    pictures = _pictures(model, run)
    batch = _batch(run.batch, model)
    decided = _decide(
        model,
        run.method,
        run.precision,
        run.optimizer,
        run.kernels,
        run.loop,
        run.profile,
        run.gpu,
        run.batch.accumulation > 1,
        window is not None and batch.sequence >= window,
        batch.micro == 1,
        run.parallelism,
        bool(run.batch.images),
        dict(pictures).get("seen", 0) % 8 != 0,
    )
    decided = decided._replace(batch=batch, parts={**decided.parts, "batch": batch})
    if not pictures:
        return decided
    half = tower_dtype(model, decided.structure.graph.recipe) != "fp32"
    return decided._replace(pictures=(*pictures, ("tower_half", int(half))))


def objective_of(run: RunSpec) -> str:
    """What the run's model is trained for; a causal language model, where memplan does not know its family."""
    try:
        return with_objective(find_model(run.model), run.objective).objective
    except MemplanError:
        return run.objective or "causal_lm"


def _pictures(model: ModelSpec, run: RunSpec) -> tuple[tuple[str, int], ...]:
    """The axes that the images of the run decide. Raises SpecError where the model sees none, or they do not fit."""
    batch, called = run.batch, model.name or model.model_type
    if not batch.images:
        if batch.image_size is not None:
            raise SpecError("batch.image_size: the size of no image; say batch.images too", "batch.image_size")
        return ()
    if not is_vision(model.model_type) and not model.part("vision_config"):
        raise SpecError(f"batch.images: {called} has no vision tower", "batch.images")
    if not sees(model.model_type):
        raise SpecError(
            f"batch.images: what the tower of {model.model_type} takes for images is not supported yet; supported: 0, "
            "text alone",
            "batch.images",
        )
    if run.profile != _SEEN:
        raise SpecError(
            f"batch.images: images are counted as profile {_SEEN} has them, not {run.profile}", "batch.images"
        )
    picture = picture_of(model, batch.image_size)
    tokens = batch.images * picture.tokens
    if tokens > batch.sequence:
        raise SpecError(
            f"batch.images: {batch.images} of {picture.tokens} tokens each are more than batch.sequence, "
            f"{batch.sequence}; at least {tokens} hold them",
            "batch.images",
        )
    return tuple(axes_of(model, batch.images, picture).items())


def _batch(batch: Batch, model: ModelSpec) -> Batch:
    """The batch with its lengths: what an encoder of images or recordings reads, and what a decoder beside it is given.

    Raises SpecError for lengths that the model does not take.
    """
    name = model.name or model.model_type
    only, usual = model.only_sequence, Batch().sequence
    if only is not None and batch.sequence not in (only, usual):
        raise SpecError(
            f"batch.sequence: the encoder of {name} reads {only} tokens by its config, not {batch.sequence}; "
            "leave it out",
            "batch.sequence",
        )
    if not model.is_encoder_decoder:
        if batch.target_sequence is not None:
            raise SpecError(
                f"batch.target_sequence: {name} has no decoder beside an encoder; batch.sequence is its length",
                "batch.target_sequence",
            )
        return batch if only is None else batch.model_copy(update={"sequence": only})
    sequence = only or batch.sequence
    target = batch.target_sequence or model.longest_target or sequence
    if model.longest_target is not None and target > model.longest_target:
        raise SpecError(
            f"batch.target_sequence: {target} tokens, but the decoder of {name} has learned positions for "
            f"{model.longest_target}",
            "batch.target_sequence",
        )
    return batch.model_copy(update={"sequence": sequence, "target_sequence": target})


def filled(run: RunSpec) -> RunSpec:
    """The run with what it leaves open as its profile has it for any model. Raises UnknownNameError."""
    words = decided(find_profile(run.profile).name, "", run.method.quantization is not None)
    method, optimizer, kernels = _filled(run.method, run.optimizer, run.kernels, run.precision, words)
    return run.model_copy(update={"method": method, "optimizer": optimizer, "kernels": kernels})


def completed(run: RunSpec) -> RunSpec:
    """A run of any model with every null of its parts filled in, as an answer shows them. Raises as `filled` does."""
    run = filled(run)
    alpha = {"alpha": run.method.alpha or _PEFT_ALPHA} if run.method.kind in ADAPTERS else {}
    return run.model_copy(
        update={
            "method": run.method.model_copy(update=alpha),
            "precision": _precision(run.precision),
            "optimizer": _optimizer(run.optimizer),
        }
    )


def check_batch(batch: Batch, model: ModelSpec) -> str | None:
    """A note where the sequence is longer than the model's positions; SpecError where positions are learned."""
    most = model.longest_sequence
    if most is None or batch.sequence <= most or model.only_sequence is not None:
        return None
    if model.learned_positions:
        raise SpecError(
            f"batch.sequence: {batch.sequence} tokens, but {model.name or model.model_type} has learned positions "
            f"for {most}",
            "batch.sequence",
        )
    return f"sequence {batch.sequence} is beyond the {most} positions of the model's config"


@lru_cache(maxsize=4096)
def _decide(
    model: ModelSpec,
    method: Method,
    precision: Precision,
    optimizer: Optimizer,
    kernels: Kernels,
    loop: Loop,
    profile: str,
    gpu_name: str | None,
    accumulates: bool,
    windowed: bool,
    single: bool,
    parallelism: Parallelism,
    images: bool,
    uneven: bool,
) -> Decided:
    asked = kernels.fused is not None
    gpu = find_gpu(gpu_name) if gpu_name is not None else None
    capability = gpu.compute_capability if gpu else None
    trains_fp8 = bool(decided(find_profile(profile).name, model.model_type, False)["trains_fp8"])
    over = trained(model, method, trains_fp8, capability)
    method = over.method
    words = decided(find_profile(profile).name, model.model_type, method.quantization is not None)
    if words["code"] == "litgpt" and model.model_type not in KINDS:
        raise SpecError(f"profile: {profile} has no {model.model_type}; it has {', '.join(KINDS)}", "profile")
    sharded = parallelism.world > 1 and parallelism.strategy in FSDP
    if sharded:
        method = _unprepared(method)
    method, optimizer, kernels = _filled(method, optimizer, kernels, precision, words)
    refuse_parts(method, precision, optimizer, kernels, sharded)
    if parallelism.offload.optimizer:
        refuse_on_host(str(optimizer.name))
    if parallelism.world > 1:
        refuse_divided(parallelism, method, precision, optimizer, loop)
    _check_time_steps(model, method)
    _check_objective(model, kernels, precision, profile)
    _check_head(model, method, kernels)
    if kernels.loss == "chunked_lm_head" and precision.autocast and not words["converts"]:
        raise SpecError(
            "kernels.loss: chunked_lm_head under autocast is not supported but by profile litgpt-...; chunked is",
            "kernels.loss",
        )
    if words["experts"] == "modules" and model.model_type in AS_MODULES:
        model = ModelSpec({**model.config, "experts_implementation": "modules"}, model.name, model.card)
    elif "E" in model.axes() and words["experts"] != "stacked":
        raise SpecError(
            f"profile: {profile} has experts written otherwise ({words['experts']}), which is not supported yet; "
            "transformers-5 and trl-0.24 have them as they are counted",
            "profile",
        )
    notes: list[str] = []
    if gpu is not None and gpu_name is not None:
        notes += gpu_notes(gpu, gpu_name)
    precision, method, optimizer = _precision(precision), _method(method, model), _optimizer(optimizer)
    if parallelism.world > 1 and parallelism.strategy in ZERO:
        precision, method = _under_deepspeed(precision, method)
        notes.append(_DEEPSPEED)
    notes += dtype_notes(gpu, str(precision.compute))
    notes += [*stored_notes(model), *over.notes]
    notes += _kernel_notes(model)
    recipe, more = _recipe(model, method, precision, words["code"], over.as_stored)
    recipe = recipe._replace(frozen=_frozen(model, method), keeps=words["keeps_matrix"])
    kernels, idle = _fusing(model, method, kernels, words["code"], words["keeps_matrix"])
    notes += [f"kernels.fused: {name} finds nothing to do in this run, and changes nothing" for name in idle if asked]
    recipe = recipe._replace(fused="lora" in (kernels.fused or ()), again=words["dora_again"])
    recipe, ranks = _ranks(parallelism, recipe, method, loop.trainer, accumulates)
    ranks = ranks._replace(inside=sharded and words["gathers_again"] and kernels.checkpointing != "none")
    notes += more
    attention, checkpoints, more = _had(model, kernels, profile, words)
    notes += more
    seen = _attention_dtype(model, recipe)
    graph = Graph(
        model,
        recipe,
        _wiring(model, attention, seen, recipe, capability, loop.padded, windowed)._replace(
            copies=words["flash_2_copies" if kernels.attention == "flash_attention_2" else "sdpa_copies"],
            caches=words["caches"],
            triangles=words["triangles"],
            half_math=words["half_math"],
            whole_rotary=words["whole_rotary"],
            uncapped=words["uncapped"],
            one_mask=words["one_mask"],
            scales_apart=words["scales_apart"],
            flattens=single and model.model_type in JOINED,
            wide=seen == "fp32",
            images=images,
            uneven=uneven,
            tower=_tower(model, recipe, kernels, capability) if images else "",
            checkpoints=checkpoints,
            by_name=words["by_name"] and checkpoints,
        ),
        checkpoint=checkpoints,
        loss=str(kernels.loss),
        hold_outputs=bool(loop.hold_outputs),
        adds_in_place=kernels.loss != "fused" or adds_in_place(capability),
        rank=method.rank,
        trainable_layers=method.trainable_layers if method.kind == "freeze" else 0,
        reentrant=bool(kernels.reentrant) and checkpoints,
        to_host=kernels.checkpointing == "offload" and checkpoints,
        leaf=kernels.checkpointing != "none"
        and model.only_sequence is None  # of a model that is given token ids
        and (method.kind in ADAPTERS or bool(method.frozen) or (method.kind == "freeze" and words["frozen_inputs"])),
        logits=words["logits"] if kernels.loss in ("hf", "fused") else "padded",
        single=single and kernels.loss in ("hf", "fused") and words["logits"] != "padded",
        fused=tuple(sorted(kernels.fused or ())),
        converts=words["converts"]
        or (loop.trainer and precision.autocast and kernels.loss == "hf" and words["logits"] != "model"),
        code=words["code"],
        lingers=words["lingers"],
    )
    structure = Structure(
        graph,
        accumulates=accumulates and not optimizer.in_backward,
        optimizer=str(optimizer.name),
        foreach=optimizer.foreach if takes_foreach(str(optimizer.name)) else None,
        state_dtype=optimizer.state_dtype,
        momentum=optimizer.momentum,
        in_backward=optimizer.in_backward,
        grads=precision.grads if precision.grads != precision.weights else None,
        master=None if ranks.strategy in ZERO else precision.master,
        clips=bool(loop.clip_grad_norm) and not optimizer.in_backward,
        scales=loop.grad_scaler,
        trainer=loop.trainer,
        holds_outputs=loop.hold_outputs == "step",
        on_host=parallelism.offload.optimizer,
        ranks=ranks,
    )
    notes += _expert_notes(graph, capability)
    if recipe.frozen and method.kind in ADAPTERS and not any(w.group == "adapter" for w, _, _ in weights_of(graph)):
        raise SpecError("method.frozen: nothing is left to adapt of method.targets", "method.frozen")
    if method.kind in ADAPTERS and not any(w.trains for w, _, _ in weights_of(graph)):
        raise SpecError(
            f"method.targets: {model.model_type} models do not call {', '.join(recipe.targets)}, and adapters there "
            "get no gradients; name others too",
            "method.targets",
        )
    if ranks.world > 1 and any(w.idle and w.group != "adapter" for w, _, _ in weights_of(graph)):
        raise SpecError(
            "batch.images: without images the tower gets no gradients, which several GPUs would wait for; say images, "
            "or method.frozen vision and projector",
            "batch.images",
        )
    if ranks.world > 1 and ranks.row.flat:
        _check_flat(graph, ranks)
    if (
        spares_embeddings(str(optimizer.name))
        and not loop.trainer
        and (method.kind == "full" or method.modules_to_save)
    ):
        notes.append(
            f"under transformers' Trainer, {optimizer.name} keeps the states of embeddings in fp32: "
            "say so with loop.trainer (--trainer)"
        )
    if accumulates and optimizer.in_backward:
        raise SpecError("optimizer.in_backward: needs batch.accumulation 1", "optimizer.in_backward")
    if accumulates and str(optimizer.name).endswith("_layerwise"):
        raise SpecError(
            f"batch.accumulation: {optimizer.name} steps in backward, and transformers' Trainer takes only 1 with it",
            "batch.accumulation",
        )
    parts: dict[str, Part] = {"method": method, "precision": precision, "optimizer": optimizer, "kernels": kernels}
    return Decided(structure, Batch(), gpu, seen != "fp32", large_tiles(capability), tuple(notes), parts)


_DEEPSPEED = (
    "DeepSpeed: fp32 masters, and its own defaults (reduce_bucket_size and sub_group_size 5e8 and 1e9, overlap_comm as "
    "the stage has it, stage3_prefetch_bucket_size 5e7, stage3_max_reuse_distance 1e9), not transformers' auto"
)


def _under_deepspeed(precision: Precision, method: Method) -> tuple[Precision, Method]:
    """The model, adapters too, is in one dtype, with an fp32 copy of what trains.

    Source: DeepSpeed 0.19.8 runtime/engine.py _configure_distributed_model.
    """
    master = None if precision.weights == "fp32" else "fp32"
    if method.kind in ADAPTERS:
        method = method.model_copy(update={"adapter_dtype": precision.weights})
    return precision.model_copy(update={"master": master}), method


def _unprepared(method: Method) -> Method:
    """Weights that are divided are not prepared for training in 4 bits, unless that is said.

    Source: trl 0.25 models/utils.py, trainer/sft_trainer.py is_sharded_qlora.
    """
    q = method.quantization
    if q is None or q.kbit_preparation is not None:
        return method
    return method.model_copy(update={"quantization": q.model_copy(update={"kbit_preparation": False})})


def _ranks(
    parallelism: Parallelism, recipe: Recipe, method: Method, trainer: bool, accumulates: bool
) -> tuple[Recipe, Ranks]:
    """How ranks divide the run, and the recipe of what they compute.

    Under autocast FSDP's mixed precision is on: weights are gathered in the dtype that is computed in, and what trains
    is kept in fp32. With 4-bit weights transformers' Trainer has it on in their storage's dtype in any case.
    Source: accelerate 1.15 accelerator.py prepare_model, utils/fsdp_utils.py fsdp2_prepare_model; transformers 5.24
    distributed/fsdp.py update_fsdp_plugin_peft.
    """
    if parallelism.world == 1:
        return recipe, ONE
    ranks = Ranks(parallelism.strategy, parallelism.world)
    if parallelism.strategy not in FSDP:
        return recipe, ranks
    ranks = ranks._replace(delayed=trainer and accumulates)
    q = method.quantization
    if q is not None:
        ranks = ranks._replace(storage=q.storage)
    if not recipe.autocast:
        if q is not None and trainer:
            return recipe._replace(adapter_dtype=q.storage), ranks._replace(trained=recipe.adapter_dtype)
        return recipe, ranks
    kept = recipe.weights if recipe.weights != recipe.compute else ""
    return recipe._replace(weights=recipe.compute, adapter_dtype=recipe.compute), ranks._replace(
        trained="fp32", frozen=kept
    )


def _check_flat(graph: Graph, ranks: Ranks) -> None:
    """Raise SpecError where FSDP1 would lay weights of several dtypes together, or keeps what is not modelled.

    Where transformers until 4.52 has a frozen block checkpointed by the reentrant kind, together with its FSDP wrapper,
    the hook on the recomputation's input keeps that and its gradient alive: published LoRA and QLoRA runs of Llama and
    Mistral hold a copy of hidden states more for all blocks but two. Those of Granite and GPT-BigCode, whose embeddings
    are scaled or added to, do not.
    """
    if graph.code == "litgpt" and graph.recipe.kind in ADAPTERS:
        raise SpecError(
            "method.kind: adapters under fsdp are not supported yet as LitGPT has them, in one flat parameter with "
            "frozen weights, of which gradients are made too; supported: full, or profile transformers-5",
            "method.kind",
        )
    before = built(graph)[0].before
    bare = any(w.group == "embedding" for op in before for w in op.weights if op.writes[0].name == "embeds")
    if ranks.inside and graph.reentrant and graph.leaf and bare:
        raise SpecError(
            "kernels.reentrant: true is not supported yet for adapters under fsdp with this profile; supported: false, "
            "or profile transformers-5",
            "kernels.reentrant",
        )
    dtypes = mixed(graph, ranks)
    if dtypes:
        field = "parallelism.strategy"
        raise SpecError(
            f"{field}: fsdp lays the weights of a unit together in one dtype, and these are {' and '.join(dtypes)}; "
            "fsdp2 does not, or say one dtype for weights and quantised storage, and kbit_preparation false",
            field,
        )


def _had(model: ModelSpec, kernels: Kernels, profile: str, words: Mapping[str, Any]) -> tuple[str, bool, list[str]]:
    """The attention and whether blocks are checkpointed, as the version has them for the model, and what it lacks."""
    attention, checkpoints, notes = kernels.attention, kernels.checkpointing != "none", list[str]()
    if words["no_sdpa"] and attention == "sdpa":
        attention = "eager"
        notes.append(f"{profile} has no sdpa for {model.model_type}: eager attention is counted")
    if words["no_checkpoints"] and checkpoints:
        checkpoints = False
        notes.append(f"{profile} does not checkpoint {model.model_type}, though it is asked to: nothing is recomputed")
    return attention, checkpoints, notes


def _filled(
    method: Method, optimizer: Optimizer, kernels: Kernels, precision: Precision, words: Mapping[str, Any]
) -> tuple[Method, Optimizer, Kernels]:
    """The parts with what they leave open as the profile's words have it."""

    def fill(part: Any, path: str) -> Any:
        open_ = {field for field, value in part if value is None and f"{path}.{field}" in words}
        return part.model_copy(update={field: words[f"{path}.{field}"] for field in open_}) if open_ else part

    if method.kind in ADAPTERS and method.adapter_dtype is None:
        dtype = words["method.adapter_dtype"]
        method = method.model_copy(update={"adapter_dtype": precision.weights if dtype == "weights" else dtype})
    if method.quantization is not None:
        method = method.model_copy(update={"quantization": fill(method.quantization, "method.quantization")})
    return method, fill(optimizer, "optimizer"), fill(kernels, "kernels")


def dtype_notes(gpu: GPU | None, compute: str) -> Iterator[str]:
    """What to know of a card on which a run computes in some dtype."""
    if gpu is not None and compute == "bf16" and "bf16" not in gpu.native_dtypes:
        yield f"bf16 is not native to {gpu.title}: slow or refused there; fp16 takes the same memory"


def gpu_notes(gpu: GPU, typed: str) -> Iterator[str]:
    """What to know of a card, and of the name it was asked by."""
    others = () if typed == gpu.name else ambiguous_with(typed)
    if others:
        yield f"{typed!r} is taken as {gpu.title}; also: {', '.join(o.name for o in others)}"
    if gpu.driver_basis == "rule":
        yield f"no driver reading of {gpu.title}'s usable memory was found: a conservative rule stands in for it"
    if gpu.vendor != "NVIDIA":
        yield f"kernels are taken as on an NVIDIA card of compute capability 8.0, not measured on {gpu.vendor}"


def _precision(p: Precision) -> Precision:
    compute = p.compute or ("bf16" if p.autocast and p.weights == "fp32" else p.weights)
    return p.model_copy(update={"compute": compute, "grads": p.grads or p.weights})


def _method(m: Method, model: ModelSpec) -> Method:
    if m.kind == "freeze":  # as LLaMA-Factory has it: all layers where there are fewer
        return m.model_copy(update={"trainable_layers": min(m.trainable_layers, model.num_hidden_layers)})
    if m.kind not in ADAPTERS:
        return m
    saved = saved_with(model.objective, m.modules_to_save, model.objectives[0] == "causal_lm")
    return m.model_copy(update={"alpha": m.alpha or _PEFT_ALPHA, "modules_to_save": saved})


def _optimizer(o: Optimizer) -> Optimizer:
    name = str(o.name)
    if o.foreach and not takes_foreach(name):
        have = ", ".join(filter(takes_foreach, optimizer_names()))
        raise SpecError(f"optimizer.foreach: {name} has no foreach step; {have} have", "optimizer.foreach")
    foreach = o.foreach if o.foreach is not None else takes_foreach(name)
    momentum = o.momentum if o.momentum is not None else 0.0
    return o.model_copy(update={"foreach": foreach, "momentum": momentum})


def _attention_dtype(model: ModelSpec, recipe: Recipe) -> str:
    """The dtype attention computes in. Whether norms that were cast to fp32 hand on fp32 depends on the family."""
    if recipe.autocast:
        return recipe.compute
    return attention_dtype(model, recipe) if recipe.preparation else recipe.weights


def _wiring(
    model: ModelSpec,
    attention: str,
    dtype: str,
    recipe: Recipe,
    capability: tuple[int, int] | None,
    padded: bool,
    windowed: bool,
) -> Wiring:
    """The kernel torch takes: flash needs 16 bits, no mask, compute capability 8 and heads up to 256 wide; the
    memory-efficient one needs head widths of a multiple of 16 bytes; what is left is the plain product. Flash takes no
    values of another width than the keys'. For flash attention 2 transformers itself casts fp32 queries to the dtype
    the model was loaded in, or autocast's.

    Source: torch 2.13 aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, transformers 5.24
    integrations/flash_attention.py get_target_dtype.
    """
    half = dtype != "fp32"
    widths = model.head_widths
    aligned = all(width % (8 if half else 4) == 0 for width in widths)
    efficient = "efficient" if aligned else "math"
    if attention == "eager":
        return Wiring("eager", "eager", padded, windowed)
    if attention == "sdpa_math":
        return Wiring("math", "math", padded, windowed)
    if attention == "sdpa_efficient":
        return Wiring(efficient, efficient, padded, windowed)
    if attention == "flash_attention_2":
        if model.model_type in NO_FLASH_2:
            raise SpecError(
                f"kernels.attention: {model.model_type} does not run with flash_attention_2: "
                f"{NO_FLASH_2[model.model_type]}; say sdpa",
                "kernels.attention",
            )
        target = recipe.compute if recipe.autocast else recipe.weights
        if target == "fp32":
            raise SpecError("kernels.attention: flash_attention_2 needs bf16 or fp16", "kernels.attention")
        if capability is not None and capability < (8, 0):
            raise SpecError(
                "kernels.attention: flash_attention_2 needs compute capability 8.0 or later", "kernels.attention"
            )
        return Wiring("flash_2", "flash_2", padded, windowed, target)
    flash = half and widths[0] == widths[1] <= 256 and (capability is None or capability >= (8, 0))
    return Wiring("flash" if flash else efficient, efficient, padded, windowed)


def _tower(model: ModelSpec, recipe: Recipe, kernels: Kernels, capability: tuple[int, int] | None) -> str:
    """The kernel of the attention in the tower that sees images, by the same rules."""
    known = ("sdpa", "sdpa_efficient", *(("flash_attention_2",) if model.model_type in PACKS else ()))
    if kernels.attention not in known:
        raise SpecError(
            f"kernels.attention: {kernels.attention} is not supported yet with images of {model.model_type}; "
            f"supported: {', '.join(known)}",
            "kernels.attention",
        )
    if kernels.checkpointing == "offload" and model.model_type in ("mistral3", "mllama"):
        raise SpecError(
            f"kernels.checkpointing: offload is not supported yet with images of {model.model_type}, whose masks go to "
            "the host, too; supported: none, full",
            "kernels.checkpointing",
        )
    if model.model_type == "llama4" and (kernels.checkpointing == "offload" or kernels.reentrant):
        field, value = ("reentrant", "true") if kernels.reentrant else ("checkpointing", "offload")
        raise SpecError(
            f"kernels.{field}: {value} is not supported yet with images of llama4, whose tower's layers are given "
            "hidden states by name: those neither go to the host nor have gradients by reentrant checkpointing; "
            "supported: none, full, not reentrant",
            f"kernels.{field}",
        )
    if model.model_type == "llama4" and not (recipe.autocast or recipe.quantization or recipe.weights == "bf16"):
        raise SpecError(
            f"precision.weights: llama4's processor makes pixels in bf16, which a tower in {recipe.weights} does not "
            "take; supported: bf16, or autocast",
            "precision.weights",
        )
    if kernels.attention == "flash_attention_2":
        return "flash_2"
    d = model.axes()["vd"]
    half = tower_dtype(model, recipe) != "fp32"
    if d % (8 if half else 4):
        raise SpecError(
            f"batch.images: the tower's heads are {d} wide, for which no kernel of sdpa is counted yet", "batch.images"
        )
    flash = kernels.attention == "sdpa" and half and d <= 256 and (capability is None or capability >= (8, 0))
    return "flash" if flash else "efficient"


def _frozen(model: ModelSpec, method: Method) -> tuple[str, ...]:
    """The parts of the model that neither train nor are adapted, checked."""
    for part in method.frozen:
        if part not in PARTS:
            raise UnknownNameError("method.frozen", part, tuple(PARTS))
    if method.frozen and not is_vision(model.model_type):
        raise SpecError(f"method.frozen: {model.model_type} has no parts beside the language model", "method.frozen")
    if set(method.frozen) == set(PARTS):
        raise SpecError("method.frozen: nothing is left to train", "method.frozen")
    return tuple(part for part in PARTS if part in method.frozen)


def _recipe(
    model: ModelSpec, method: Method, precision: Precision, code: str, stored: bool
) -> tuple[Recipe, list[str]]:
    """What the run asks of the methods, and notes. `stored`: the checkpoint itself is quantised."""
    compute, autocast = str(precision.compute), precision.autocast
    if method.kind in ("full", "freeze"):
        if method.quantization is not None:
            raise SpecError(
                f"method.quantization: {method.kind} does not train quantised weights; qlora and qdora adapt them",
                "method.quantization",
            )
        return Recipe(method.kind, precision.weights, compute, autocast), []
    q = method.quantization
    if method.kind in ("lora", "dora") and q is not None and not stored:
        raise SpecError(f"method.quantization: use q{method.kind} for quantised weights", "method.quantization")
    targets, notes = _targets(model, method) if code == "transformers" else (_switches(method), [])
    saved = _modules(model, "method.modules_to_save", method.modules_to_save)
    recipe = Recipe(
        method.kind,
        precision.weights,
        compute,
        autocast,
        targets,
        saved,
        method.dropout > 0,
        str(method.adapter_dtype),
        library="peft" if code == "transformers" else code,
    )
    if q is None:
        return recipe, notes
    preparation = {True: "fp32", False: "", "trl": "trl", None: ""}[q.kbit_preparation]
    clamped, more = _unquantised(model, tuple(q.skip or ()))
    notes += more
    if q.format == "int8":
        notes.append("LLM.int8 layers hold their inputs until the step ends, with or without checkpointing")
    return recipe._replace(
        quantization=q.format,
        double_quant=q.double_quant and q.format in ("nf4", "fp4"),
        block_size=q.block_size,
        skip=(
            *(n for n in q.skip or () if n == "lm_head"),
            *_modules(model, "method.quantization.skip", (n for n in q.skip or () if n != "lm_head")),
            *clamped,
            *model.unquantised,
        ),
        preparation=preparation,
        packed=stored or q.format not in ("nf4", "fp4", "int8"),
    ), notes


# Packages whose kernels transformers takes in place of its torch code, by what mixes tokens. Source: transformers 5.24
# models/mamba2, models/qwen3_next: use_kernel_func_from_hub_with_fallback.
_KERNELS = {"mamba": "mamba-ssm", "linear_attention": "flash-linear-attention"}


def _kernel_notes(model: ModelSpec) -> Iterator[str]:
    """What a model with fused kernels takes is less than what is counted."""
    for package in sorted({_KERNELS[layer.mixer] for layer in model.layers if layer.mixer in _KERNELS}):
        yield (
            f"{model.model_type}: layers without attention are counted as transformers' torch code computes them; with "
            f"{package} and causal-conv1d installed, or their kernels from the hub, their activations take less"
        )
    if model.model_type == "llama4":
        yield (
            "llama4: transformers 5.24's model for images and text fails as it returns its loss, with images and "
            "without (its decoder's outputs have no image_outputs); counted as if it had them"
        )


def checkpoint_notes(config: Mapping[str, Any], method: Method, precision: Precision) -> Iterator[str]:
    """What a config says of a checkpoint that is stored quantised, where the run is traced: dense, or as the run
    quantises it. Raises SpecError where it does not train so."""
    stored: Any = config.get("quantization_config")
    if not isinstance(stored, Mapping) or not stored:
        return
    how = str(cast(Mapping[str, object], stored).get("quant_method", "?"))
    if how in ("fp8", "mxfp4", "compressed-tensors"):
        yield f"the checkpoint is stored in {how}, and is taken as dequantised in {precision.weights}"
    elif how != "bitsandbytes":
        raise SpecError(f"quantization_config: a checkpoint of {how:.40} is not supported yet", "model")
    elif method.quantization is None:
        raise SpecError("quantization_config: the checkpoint is quantised by bitsandbytes; use qlora or qdora", "model")


def _expert_notes(graph: Graph, capability: tuple[int, int] | None) -> Iterator[str]:
    """How much of a mixture of experts bitsandbytes quantises: linear layers alone, and experts are parameters. Before
    compute capability 8.0 torch has no grouped product.

    Source: transformers 5.24 integrations/moe.py _can_use_grouped_mm, _grouped_mm_fallback_setup_context.
    """
    _, axes = built(graph)
    weights = [(w, elements(w, axes) * n) for w, n, _ in weights_of(graph) if w.group not in ("adapter", "buffer")]
    left = {w.dtype for w, _ in weights if w.chosen and not w.stored}
    frozen = any(w.stacked and not w.trains for w, _ in weights)
    if frozen and capability is not None and capability < (8, 0):
        yield (
            "before compute capability 8.0 transformers multiplies experts in a loop of its own, which keeps their "
            "rows and makes gradients of matrices that are frozen: that is not counted"
        )
    if graph.recipe.quantization and left:
        share = 100 * sum(n for w, n in weights if w.stored) / sum(n for _, n in weights)
        yield (
            f"{share:.1f}% of the parameters are quantised: experts are no linear layers in transformers 5, and "
            f"bitsandbytes leaves them in {' and '.join(sorted(left))}"
        )


# A role that a family may have fused into one matrix, and what the fused ones are called.
_FUSED = {
    **dict.fromkeys(
        ("q_proj", "k_proj", "v_proj"),
        ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "W_pack"),
    ),
    **dict.fromkeys(("gate_proj", "up_proj"), ("gate_up_proj", "dense_h_to_4h", "c_fc", "fc1", "w1")),
    "o_proj": ("dense", "out_proj", "c_proj", "wo"),
    "down_proj": ("dense_4h_to_h", "c_proj", "fc2", "w2"),
}


# Models of which peft takes no adapter around a mixer's convolution and output projection, because fused kernels read
# their weights. Source: peft 0.21 tuners/tuners_utils.py _check_lora_target_modules_mamba.
_READ_BY_KERNELS = ("out_proj", "conv1d")
_WITH_KERNELS = frozenset(("falcon_mamba", "mamba", "mamba2", "nemotron_h"))


def _refuse_read_by_kernels(model: ModelSpec, targets: Iterable[str], layers: Iterable[str]) -> None:
    if model.model_type not in _WITH_KERNELS:
        return
    names = dict.fromkeys(path.rpartition(".")[2] for path in layers if "embed" not in path and path != "lm_head")
    found = next((name for name in targets if name in _READ_BY_KERNELS), None)
    if found is not None or tuple(targets) == ("all-linear",):
        able = ", ".join(name for name in names if name not in _READ_BY_KERNELS)
        raise SpecError(
            f"method.targets: peft takes no adapters around {found or 'out_proj'} in {model.model_type} models; "
            f"name others: {able}",
            "method.targets",
        )


# Families that peft's all-linear does not run with.
# Source: peft 0.21 tuners/lora/layer.py Linear.forward;
# transformers 5.24 models/llama4/modeling_llama4.py Llama4Router.
_ROUTER = (
    "peft's all-linear takes Llama 4's router too, and fails at its first step; name q_proj and the like. All linear "
    "layers but the router are counted"
)
_NO_ALL = {"llama4": _ROUTER, "llama4_text": _ROUTER}


def _targets(model: ModelSpec, method: Method) -> tuple[tuple[str, ...], list[str]]:
    """The names of the layers the adapters take, checked; a fused role is the whole fused matrix."""
    layers, groups = adaptable(model), parameter_targets(model)
    stood_for = {name for group in groups for name in group}
    layers = {path: dims for path, dims in layers.items() if path.rpartition(".")[2] not in stood_for}
    passed_over = [path for path in adaptable(model) if path not in layers]
    names = {path.rpartition(".")[2] for path in layers}
    more = several(model)
    for name in more if method.targets == "all-linear" else more.intersection(map(_end, method.targets)):
        raise SpecError(
            f"method.targets: the {name} of {model.model_type} returns more than its product, and peft's layer around "
            "it fails; name other targets",
            "method.targets",
        )
    asked = (method.targets,) if isinstance(method.targets, str) else tuple(method.targets)
    _refuse_read_by_kernels(model, tuple(target.rpartition(".")[2] for target in asked), layers)
    if method.targets == "all-linear":
        inner = {
            path: dims
            for path, dims in linears(model).items()
            if path in layers
            and model.vocab_size not in dims
            and min(dims) > 1
            and not inside(path, method.modules_to_save)
        }
        if not inner:
            raise SpecError(f"method: {model.model_type} has no linear layers to adapt", "method")
        few = gates(model)  # of a few rows each, adapted whatever the rank
        for path, dims in sorted(inner.items(), key=lambda item: min(item[1])):
            if path not in few and method.rank > min(dims):
                _refuse_rank(method.rank, path, dims)
        if groups:
            _check_parameters(method, "all-linear")
        notes = [f"method.targets: {_NO_ALL[model.model_type]}"] if model.model_type in _NO_ALL else []
        return ("all-linear",), [*notes, *_passed_over(passed_over)]
    if not method.targets:
        raise SpecError("method.targets: no module named", "method.targets")
    if "all-linear" in method.targets:
        raise SpecError("method.targets: all-linear stands alone, not in a list", "method.targets")
    found: list[str] = []
    notes: list[str] = []
    for target in method.targets:
        if _end(target) in stood_for:
            _check_parameters(method, target)
            found.append(_end(target))
            continue
        name = _last(target, "method.targets", layers)
        if name not in names:
            fused = next((f for f in _FUSED.get(name, ()) if f in names), None)
            if fused is None:
                raise UnknownNameError("method.targets", target, (*sorted(names | stood_for), "all-linear"))
            notes.append(f"{name} is part of {fused} in this family: the adapter is on all of {fused}")
            name = fused
        for path, dims in layers.items():
            if path.rpartition(".")[2] == name and method.rank > min(dims) > 1:
                _refuse_rank(method.rank, path, dims)
        found.append(name)
    for group in groups:
        lacking = [name for name in group if name not in found]
        if lacking and len(lacking) < len(group):
            raise SpecError(
                f"method.targets: {' and '.join(group)} are one parameter in this family, which peft adapts as a "
                f"whole; name {' and '.join(lacking)} too",
                "method.targets",
            )
    return tuple(dict.fromkeys(found)), notes + (_passed_over(passed_over) if stood_for.intersection(found) else [])


def _end(name: str) -> str:
    return name.rpartition(".")[2]


def _check_parameters(method: Method, target: str) -> None:
    """Raise SpecError for what peft does not do where it adapts parameters that are no linear layers.

    Source: peft 0.21 tuners/lora/layer.py ParamWrapper.
    """
    which = f"{target} is on experts or a router here, which are parameters"
    if "dora" in method.kind:
        raise SpecError(f"method.kind: {which}, and peft has no DoRA for those; name other targets", "method.kind")
    if method.dropout:
        raise SpecError(
            f"method.dropout: {which}, and peft drops nothing there; say 0, or name other targets", "method.dropout"
        )


def _passed_over(paths: list[str]) -> list[str]:
    """A note where linear layers are called as those are that experts stand for."""
    if not paths:
        return []
    return [f"peft takes these names for those of experts, and adapts no {', '.join(sorted(paths))}"]


def _check_time_steps(model: ModelSpec, method: Method) -> None:
    """Raise SpecError where the model multiplies by a layer's weight itself, and that is quantised: packed codes.

    Source: transformers 5.24 models/mamba/modeling_mamba.py MambaMixer.forward; Falcon Mamba and Jamba call the layer.
    """
    q, field = method.quantization, "method.quantization.skip"
    if model.model_type == "mamba" and q is not None and "dt_proj" not in (q.skip or ()):
        raise SpecError(f"{field}: mamba models multiply by dt_proj's weight itself; name lm_head and dt_proj", field)


# Linear layers whose weights a family's own forward changes or reads, so that it cannot run with them quantised.
# Source: transformers 5.24 models/gemma3n/modeling_gemma3n.py Gemma3nTextAltUp.predict, correct.
_CLAMPED = {"gemma3n_text": ("prediction_coefs", "correction_coefs")}


def _unquantised(model: ModelSpec, skip: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
    """Layers that a family clamps as it trains, of those that `skip` does not name; and a note of them."""
    missing = tuple(name for name in _CLAMPED.get(model.model_type, ()) if name not in skip)
    if not missing:
        return (), []
    note = f"{', '.join(missing)} cannot be quantised, as the model clamps them: name them in method.quantization.skip"
    return missing, [f"{note}. They are counted as they are"]


def _check_objective(model: ModelSpec, kernels: Kernels, precision: Precision, profile: str) -> None:
    """Raise SpecError where a loss is asked for that only causal language models have, a version that is not read, or
    what the model's classes do not take."""
    if model.objective == "causal_lm":
        return
    name = model.name or model.model_type
    if kernels.attention in model.lacks:
        raise SpecError(
            f"kernels.attention: {kernels.attention} is not supported for {name}, whose positions are a bias of the "
            "scores; supported: sdpa, sdpa_efficient, eager",
            "kernels.attention",
        )
    if model.is_encoder_decoder and precision.weights == "fp16":
        raise SpecError(
            f"precision.weights: fp16 is not supported yet for {name}, whose layers clamp what they make in it; bf16 "
            "and fp32 are, and fp16 under autocast",
            "precision.weights",
        )
    if kernels.loss != "hf":
        raise SpecError(
            f"kernels.loss: {kernels.loss} is of causal language models; {name} is trained for "
            f"{model.objective}, whose class computes its own loss: hf",
            "kernels.loss",
        )
    if find_profile(profile).name != "transformers-5":
        raise SpecError(
            f"profile: {profile} is not supported yet for {model.objective}; supported: transformers-5", "profile"
        )


def _check_head(model: ModelSpec, method: Method, kernels: Kernels) -> None:
    """Raise SpecError where the output projection, or another layer, is quantised and cannot be."""
    q, field = method.quantization, "method.quantization.skip"
    if q is None:
        return
    for name in several(model).difference(q.skip or ()):
        raise SpecError(
            f"{field}: the {name} of {model.model_type} returns more than its product, and bitsandbytes' layer in its "
            "place does not; name it",
            field,
        )
    if "lm_head" in (q.skip or ()):
        return
    if model.tie_word_embeddings:
        raise SpecError(f"{field}: the embeddings are the lm_head's weight, and are not quantised; name it", field)
    if kernels.loss == "fused":
        raise SpecError(f"{field}: a fused loss multiplies by the lm_head's weight as it is; name lm_head", field)


def _fusing(model: ModelSpec, method: Method, kernels: Kernels, code: str, keeps: bool) -> tuple[Kernels, list[str]]:
    """The kernels with those fused ones that have something to do, and the names of those that have not.

    Joined adapters are of bitsandbytes' and auto-gptq's weights; `keeps` says that GPTQ's are another's.
    """
    asked = kernels.fused or ()
    if not asked:
        return kernels, []
    able = set(fusible_kernels(model, code))
    if kernels.loss == "hf" and model.objective == "causal_lm":
        able.add("cross_entropy")
    q = method.quantization
    apart = q is not None and (q.format in ("awq-int4", "fp8") or (keeps and q.format.startswith("gptq")))
    if method.kind in ("lora", "qlora") and code == "transformers" and not apart:
        able.add("lora")
    used = tuple(name for name in asked if name in able)
    return kernels.model_copy(update={"fused": used}), [name for name in asked if name not in able]


def _switches(method: Method) -> tuple[str, ...]:
    """The layers that LitGPT's LoRA adapts, as the switches of its command."""
    if method.targets == "all-linear":
        return tuple(switch for switch in SWITCHES if switch != "head")
    found = [ROLES.get(name.rpartition(".")[2], name) for name in method.targets]
    for name, switch in zip(method.targets, found, strict=True):
        if switch not in SWITCHES:
            raise UnknownNameError("method.targets", name, (*ROLES, *SWITCHES, "all-linear"))
    return tuple(switch for switch in SWITCHES if switch in found)


def _refuse_rank(rank: int, path: str, dims: tuple[int, int]) -> None:
    raise SpecError(
        f"method.rank: {rank} is larger than the smaller side of {path} ({dims[0]} x {dims[1]})", "method.rank"
    )


def _modules(model: ModelSpec, field: str, named: Iterable[str]) -> tuple[str, ...]:
    """The names of modules that a field lists, checked."""
    listed = tuple(named)
    if not listed:
        return ()
    names, found = modules(model), list[str]()
    for name in listed:
        last = _last(name, field, adaptable(model))
        if last not in names:
            raise UnknownNameError(field, name, sorted(names))
        found.append(last)
    return tuple(found)


def _last(name: str, field: str, paths: Iterable[str]) -> str:
    """The last part of a dotted name, where that means the same modules."""
    last = name.rpartition(".")[2]
    alike = [path for path in paths if path.rpartition(".")[2] == last]
    if "." in name and not all(f".{path}".endswith(f".{name}") for path in alike):
        raise SpecError(f"{field}: {name!r} is not every {last}, and some of them alone are not supported yet", field)
    return last
