"""What a run leaves open is decided here, and what its model cannot do is refused here.

A profile (a framework and its version) says what `null` means: see `memplan.catalogue.profiles.profiles`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from memplan.catalogue.attention.attention import SINGLE, large_tiles
from memplan.catalogue.degrees import Degrees
from memplan.catalogue.experts.expert_loops import AS_MODULES
from memplan.catalogue.families import megatron
from memplan.catalogue.families.litgpt import KINDS
from memplan.catalogue.hardware.gpus import find_gpu
from memplan.catalogue.kernels.losses import adds_in_place
from memplan.catalogue.methods.methods import ADAPTERS, Recipe
from memplan.catalogue.optimizers.states import optimizer_names, spares_embeddings, takes_foreach
from memplan.catalogue.parallelism import context_parallel, expert_parallel, tensor_parallel
from memplan.catalogue.parallelism.sharding import MEGATRON, Knobs
from memplan.catalogue.profiles.profiles import decided, find_profile
from memplan.core.errors import SpecError
from memplan.core.ir import SavedTensors
from memplan.core.units import ITEMSIZE
from memplan.models.model import ModelSpec
from memplan.models.objectives import saved_with
from memplan.program.graph import Graph, weights_of
from memplan.program.run import Decided
from memplan.program.sharding import zero
from memplan.program.sharding.ranks import ONE, Ranks, mixed, ties_head, uneven
from memplan.program.stack_facts import parameter_targets
from memplan.program.stored.checkpoint import notes as stored_notes
from memplan.program.training.pipeline import one_process, piped
from memplan.program.training.program import Structure
from memplan.resolve.communicators import communicators
from memplan.resolve.defaults import adapted_experts, check_classes
from memplan.resolve.kernels import (
    as_the_version_has,
    dtype_of_attention,
    fused_kernels,
    in_words,
    kernel_of_tower,
    wiring_of,
)
from memplan.resolve.method import check_head, check_time_steps, frozen_parts, recipe_of
from memplan.resolve.notes import (
    dtype_notes,
    expert_notes,
    gpu_notes,
    kernel_notes,
    norm_notes,
    pipeline_notes,
    unknown_note,
    unmasked_note,
    wrapping_notes,
)
from memplan.resolve.parallelism import degrees_of, replicas
from memplan.resolve.quantized_checkpoint import trained
from memplan.resolve.refusals import (
    FSDP,
    ZERO,
    refuse_divided,
    refuse_of_megatron,
    refuse_on_deepspeeds_host,
    refuse_on_host,
    refuse_parts,
    refuse_parts_of_experts,
    refuse_parts_of_matrices,
    refuse_parts_of_sequences,
    refuse_parts_of_whole_experts,
    refuse_saved_on_host,
    refuse_staged,
)
from memplan.spec.base import Part
from memplan.spec.parallelism import Parallelism, Zero
from memplan.spec.run import Batch
from memplan.spec.training import Kernels, Loop, Method, Optimizer, Precision


def _refuse_uncalled(model: ModelSpec, method: Method) -> None:
    """Raise SpecError for adapters whose weights peft reads without calling the modules that hold them, as it does
    where they adapt a parameter: FSDP1 has each such module a unit of its own, and gathers it when it is called.

    Source: peft 0.21 tuners/lora/layer.py ParamWrapper._activate_lora, utils/other.py fsdp_auto_wrap_policy.
    """
    names = sorted({name for those in parameter_targets(model) for name in those})
    found = [name for name in names if method.targets == "all-linear" or name in method.targets]
    if method.kind in ADAPTERS and found:
        raise SpecError(
            f"method.targets: peft 0.21 fails under FSDP1 to adapt {', '.join(found)}, which are parameters and no "
            "linear layers here: it reads their adapters without calling the modules that FSDP1 gathers; name linear "
            "layers, such as q_proj and v_proj, or say fsdp2",
            "method.targets",
        )


PEFT_ALPHA = 8.0  # peft 0.21 LoraConfig.lora_alpha; memory does not depend on it


# What `parallelism.offload.activations` means. A tensor is packed each time it is saved, and weights are tensors too.
_SAVED_TENSORS = SavedTensors(
    weights=True, source="torch 2.13 autograd/graph.py save_on_cpu, csrc/autograd/saved_variable.cpp"
)


@lru_cache(maxsize=4096)
def decide_training(
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
    short: bool,
    parallelism: Parallelism,
    images: bool,
    uneven: bool,
    microbatches: int,
) -> Decided:
    asked = kernels.fused is not None
    gpu = find_gpu(gpu_name) if gpu_name is not None else None
    capability = gpu.compute_capability if gpu else None
    trains_fp8 = bool(decided(find_profile(profile).name, model.model_type, False)["trains_fp8"])
    over = trained(model, method, trains_fp8, capability)
    method = over.method
    words = decided(find_profile(profile).name, model.model_type, method.quantization is not None)
    if words["code"] == "torchtitan" and method.kind != "full":
        over_words: Mapping[str, Any] = {"code": "transformers", "logits": "padded"}
        words = {**words, **over_words}
        said = "torchtitan: adapters and frozen layers are counted with transformers' layers"
        over = over._replace(notes=(*over.notes, said))
    if words["code"] == "litgpt" and model.model_type not in KINDS:
        raise SpecError(f"profile: {profile} has no {model.model_type}; it has {', '.join(KINDS)}", "profile")
    degrees = degrees_of(parallelism, words["tensor_parallel"])
    alike = replicas(parallelism)
    sharded = divides_weights(parallelism)
    under_deepspeed = alike > 1 and parallelism.strategy in ZERO
    if sharded or under_deepspeed:
        method = without_preparation(method)
    method, optimizer, kernels = with_profile(method, optimizer, kernels, precision, words)
    own = model.model_type == megatron.KIND
    refuse_parts(method, precision, optimizer, kernels, _storages(sharded, under_deepspeed, precision), own)
    if own:
        refuse_of_megatron(profile, method, precision, kernels, loop)
    if own:
        refuse_parts_of_experts(parallelism, *megatron.experts_and_width(model))
    else:
        refuse_parts_of_whole_experts(
            parallelism, method, precision, loop, profile, words["tensor_parallel"], accumulates
        )
        if parallelism.ep > 1:
            expert_parallel.check(model, degrees)
    if degrees.tp > 1:
        refuse_parts_of_matrices(
            parallelism, method, precision, optimizer, kernels, profile, words["tensor_parallel"], own
        )
        tensor_parallel.check(model, degrees, ITEMSIZE[precision.weights], adapted_experts(model, method))
    if under_deepspeed:
        refuse_on_deepspeeds_host(parallelism, str(optimizer.name), loop.trainer)
    elif parallelism.offload.optimizer and not sharded:
        refuse_on_host(str(optimizer.name))
    if parallelism.offload.activations:
        refuse_saved_on_host(parallelism, method, kernels, model, profile, words["saved_tensors"], images)
    if alike > 1:
        refuse_divided(parallelism, method, precision, optimizer, loop)
    if parallelism.pp > 1:
        refuse_staged(parallelism, method, loop, model.objective, images)
    if degrees.cp > 1:
        refuse_parts_of_sequences(parallelism, kernels, loop, profile, words["tensor_parallel"], own)
    check_time_steps(model, method)
    _check_objective(model, kernels, precision, profile)
    check_head(model, method, kernels)
    if kernels.loss == "chunked_lm_head" and precision.autocast and not words["converts"]:
        raise SpecError(
            "kernels.loss: chunked_lm_head under autocast is not supported but by profile litgpt-...; chunked is",
            "kernels.loss",
        )
    if words["experts"] == "modules" and model.model_type in AS_MODULES:
        model = ModelSpec({**model.config, "experts_implementation": "modules"}, model.name, model.card)
    elif "E" in model.axes() and words["experts"] != "stacked" and not own:
        raise SpecError(
            f"profile: {profile} has experts written otherwise ({words['experts']}), which is not supported yet; "
            "transformers-5 and trl-0.24 have them as they are counted",
            "profile",
        )
    if alike > 1 and parallelism.strategy == "fsdp":
        _refuse_uncalled(model, method)
    notes: list[str] = list(_wrapping(parallelism, method, loop.trainer))
    if gpu is not None and gpu_name is not None:
        notes += gpu_notes(gpu, gpu_name)
    precision, method, optimizer = (
        completed_precision(precision),
        _method(method, model),
        completed_optimizer(optimizer),
    )
    if under_deepspeed:
        precision, method = _under_deepspeed(precision, method)
        if parallelism.zero == Zero():
            notes.append(_DEEPSPEED)
    if alike > 1 and parallelism.strategy == MEGATRON:
        precision = _under_megatron(precision)
        notes.append(_MEGATRON if own else f"{_MEGATRON}; {_NOT_ITS_CODE}")
    notes += dtype_notes(gpu, str(precision.compute))
    notes += [*stored_notes(model), *over.notes]
    notes += kernel_notes(model)
    recipe, more = recipe_of(model, method, precision, words["code"], over.as_stored)
    recipe = recipe._replace(frozen=frozen_parts(model, method), keeps=words["keeps_matrix"])
    kernels, idle = fused_kernels(model, method, kernels, words["code"], words["keeps_matrix"])
    notes += [f"kernels.fused: {name} finds nothing to do in this run, and changes nothing" for name in idle if asked]
    recipe = recipe._replace(fused="lora" in (kernels.fused or ()), again=words["dora_again"])
    if not own:
        degrees = degrees._replace(etp=1)
    elif not megatron.has_experts(model):
        degrees = degrees._replace(ep=1, etp=1)
    recipe, ranks = _ranks(parallelism, recipe, method, loop.trainer, accumulates, model.axes()["h"], words)
    if own and ranks.world > 1 and degrees.ep * degrees.etp > 1:
        ranks = ranks._replace(experts=ranks.world * degrees.tp // (degrees.ep * degrees.etp))
    if sharded and not words["quantised_there"]:
        ranks = ranks._replace(there=False)
    if not own and ranks.world > 1 and degrees.ep > 1:
        ranks = ranks._replace(alone=ranks.world * degrees.tp // degrees.ep)
    ranks = ranks._replace(inside=sharded and words["gathers_again"] and kernels.checkpointing != "none")
    notes += more
    attention, checkpoints, more = as_the_version_has(model, kernels, profile, words)
    notes += more
    seen = dtype_of_attention(model, recipe)
    if not words["has_family"]:
        notes.append(unknown_note(model, profile))
    padded = loop.padded and bool(words["masks_padding"])
    if loop.padded and not padded:
        notes.append(unmasked_note(profile))
    graph = Graph(
        model,
        recipe,
        in_words(
            wiring_of(model, attention, seen, recipe, capability, padded, windowed),
            words,
            str(kernels.attention),
        )._replace(
            caches=words["caches"],
            single=single and model.model_type in SINGLE,
            wide=seen == "fp32",
            images=images,
            uneven=uneven,
            tower=kernel_of_tower(model, recipe, kernels, capability) if images else "",
            checkpoints=checkpoints,
            by_name=words["by_name"] and checkpoints and not own,
            recomputes=kernels.checkpointing == "selective",
        ),
        checkpoint=checkpoints,
        loss=str(kernels.loss),
        hold_outputs=bool(loop.hold_outputs),
        adds_in_place=kernels.loss != "fused" or (words["adds_products"] and adds_in_place(capability)),
        rank=method.rank,
        trainable_layers=method.trainable_layers if method.kind == "freeze" else 0,
        reentrant=bool(kernels.reentrant) and checkpoints,
        to_host=kernels.checkpointing == "offload" and checkpoints,
        saves=_SAVED_TENSORS if parallelism.offload.activations else None,
        leaf=kernels.checkpointing != "none"
        and model.only_sequence is None  # of a model that is given token ids
        and (method.kind in ADAPTERS or bool(method.frozen) or (method.kind == "freeze" and words["frozen_inputs"])),
        logits=_logits(words, degrees) if kernels.loss in ("hf", "fused") else "padded",
        single=single
        and (kernels.loss == "chunked_lm_head" or (kernels.loss in ("hf", "fused") and words["logits"] != "padded")),
        short=short and kernels.loss == "chunked_lm_head",
        fused=tuple(sorted(kernels.fused or ())),
        converts=words["converts"]
        or (loop.trainer and precision.autocast and kernels.loss == "hf" and words["logits"] != "model"),
        code=words["code"],
        lingers=words["lingers"] and parallelism.pp == 1,
        degrees=degrees,
        joined=words["code"] == "litgpt" and method.kind in ADAPTERS and ranks.world > 1 and ranks.row.flat,
    )
    if degrees.cp > 1 and not own:
        wiring = graph.wiring
        masked = any(wiring.has_mask(layer.sliding) for layer in model.layers)
        context_parallel.check(model.model_type, wiring.backend, masked, degrees)
        if degrees.context == "ulysses":
            context_parallel.check_heads(model, degrees)
    graph, pipe = piped(graph, parallelism, words["pipeline"], microbatches)
    notes += pipeline_notes(graph.degrees, pipe, parallelism)
    structure = Structure(
        graph,
        accumulates=accumulates and not optimizer.in_backward,
        optimizer=str(optimizer.name),
        foreach=optimizer.foreach if takes_foreach(str(optimizer.name)) else None,
        state_dtype=optimizer.state_dtype,
        momentum=optimizer.momentum,
        in_backward=optimizer.in_backward,
        grads=precision.grads if own or precision.grads != precision.weights or ranks.strategy == MEGATRON else None,
        master=None if ranks.strategy in ZERO else precision.master,
        clips=bool(loop.clip_grad_norm) and not optimizer.in_backward,
        scales=loop.grad_scaler,
        trainer=loop.trainer,
        holds_outputs=loop.hold_outputs == "step"
        or words["code"] == "torchtitan"  # the trainer's names have a step's batches until it is over
        or (degrees.sequence_parallel and degrees.style == "megatron"),
        on_host=parallelism.offload.optimizer and not ranks.offloads,
        ranks=ranks,
        pipe=pipe,
        buffers=own,
        workspace=megatron.workspace(model, capability) if own else 0,
    )
    notes += [*expert_notes(graph, capability), *norm_notes(graph), *wrapping_notes(graph, ranks)]
    _check_trained(graph, ranks)
    if under_deepspeed and gpu is not None:
        knobs = ranks.knobs._replace(flattens=zero.flattens(graph, gpu.usable))
        structure = structure._replace(ranks=ranks._replace(knobs=knobs))
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
    sends = () if one_process(structure) else communicators(parallelism)
    tiles = large_tiles(capability)
    return Decided(structure, Batch(), gpu, seen != "fp32", tiles, tuple(notes), parts, communicators=sends)


_DEEPSPEED = (
    "DeepSpeed: fp32 masters, and its own defaults (reduce_bucket_size and sub_group_size 5e8 and 1e9, overlap_comm as "
    "the stage has it, stage3_prefetch_bucket_size 5e7, stage3_max_reuse_distance 1e9), not transformers' auto"
)


def _unwrapped(p: Parallelism, method: Method, trainer: bool) -> bool:
    """Whether no block is a unit of its own: transformers' Trainer has FSDP2 wrap a model with adapters by peft's
    policy, which accelerate does not take.

    Source: peft 0.21 utils/other.py fsdp_auto_wrap_policy, accelerate 1.15 utils/fsdp_utils.py
    fsdp2_prepare_auto_wrap_policy.
    """
    return p.strategy == "fsdp2" and replicas(p) > 1 and trainer and method.kind in ADAPTERS


def _wrapping(p: Parallelism, method: Method, trainer: bool) -> Iterator[str]:
    if _unwrapped(p, method, trainer):
        yield (
            "transformers' Trainer has FSDP2 gather all weights of a model with adapters at once: accelerate does not "
            "take peft's wrapping policy; FSDP1, and a loop of your own, gather block by block"
        )
    if p.static_graph:
        yield "parallelism.static_graph changes no memory"


def _logits(words: Mapping[str, Any], degrees: Degrees) -> str:
    """How the loss of all logits is written; torchtitan's is of each rank's part of the vocabulary."""
    return "parallel" if words["code"] == "torchtitan" and degrees.tp > 1 else words["logits"]


_MEGATRON = (
    "Megatron: main gradients in fp32 (--accumulate-allreduce-grads-in-fp32, on with --bf16), fp32 masters, no "
    "--overlap-grad-reduce"
)
_NOT_ITS_CODE = "what is computed is transformers' code, not Megatron's"


def _under_megatron(precision: Precision) -> Precision:
    """Main gradients and masters are in fp32. Source: Megatron-LM megatron/training/arguments.py."""
    master = None if precision.weights == "fp32" else "fp32"
    return precision.model_copy(update={"grads": "fp32", "master": master})


def _under_deepspeed(precision: Precision, method: Method) -> tuple[Precision, Method]:
    """The model, adapters too, is in one dtype, with an fp32 copy of what trains.

    Source: DeepSpeed 0.19.8 runtime/engine.py _configure_distributed_model.
    """
    master = None if precision.weights == "fp32" else "fp32"
    if method.kind in ADAPTERS:
        method = method.model_copy(update={"adapter_dtype": precision.weights})
    return precision.model_copy(update={"master": master}), method


def divides_weights(parallelism: Parallelism) -> bool:
    """Whether ranks hold parts of the weights as FSDP divides them."""
    return replicas(parallelism) > 1 and parallelism.strategy in FSDP


def _knobs(p: Parallelism, hidden: int) -> Knobs:
    """DeepSpeed's configuration with nothing left open.

    Source: transformers 5.24 integrations/deepspeed.py trainer_config_finalize; DeepSpeed runtime/zero/config.py.
    """
    z = p.zero

    def filled(value: int | str, auto: int) -> int:
        return value if isinstance(value, int) else auto

    optimizer, weights = z.offload_optimizer, z.offload_param
    return Knobs(
        reduce_bucket=filled(z.reduce_bucket_size, hidden * hidden),
        prefetch=filled(z.stage3_prefetch_bucket_size, 9 * hidden * hidden // 10),
        persistent=filled(z.stage3_param_persistence_threshold, 10 * hidden),
        live=z.stage3_max_live_parameters,
        reuse=z.stage3_max_reuse_distance,
        sub_group=z.sub_group_size,
        overlaps=p.strategy == "zero3" if z.overlap_comm is None else z.overlap_comm,
        contiguous=z.contiguous_gradients,
        round_robin=z.round_robin_gradients,
        divides_loading=z.zero3_init_flag,
        optimizer=optimizer.device if p.offload.optimizer else "",
        parameters=weights.device if p.offload.parameters else "",
        pins=(optimizer.pin_memory, weights.pin_memory),
        swaps=(optimizer.buffer_count, weights.buffer_count, weights.buffer_size, weights.max_in_cpu),
    )


def _storages(sharded: bool, under_deepspeed: bool, precision: Precision) -> tuple[str, ...]:
    """What 4-bit weights may be stored in: FSDP divides no integers; DeepSpeed would cast another float."""
    if sharded:
        return ("bf16", "fp16", "fp32")
    return ("uint8", precision.weights) if under_deepspeed else ("uint8",)


def without_preparation(method: Method) -> Method:
    """Weights that are divided are not prepared for training in 4 bits, unless that is said.

    Source: trl 0.25 models/utils.py, trainer/sft_trainer.py is_sharded_qlora.
    """
    q = method.quantization
    if q is None or q.kbit_preparation is not None:
        return method
    return method.model_copy(update={"quantization": q.model_copy(update={"kbit_preparation": False})})


def _ranks(
    parallelism: Parallelism,
    recipe: Recipe,
    method: Method,
    trainer: bool,
    accumulates: bool,
    hidden: int,
    words: Mapping[str, Any],
) -> tuple[Recipe, Ranks]:
    """How ranks divide the run, and the recipe of what they compute.

    Under autocast FSDP's mixed precision is on: weights are gathered in the dtype that is computed in, and what trains
    is kept in fp32. With 4-bit weights transformers' Trainer has it on in their storage's dtype in any case.
    Source: accelerate 1.15 accelerator.py prepare_model, utils/fsdp_utils.py fsdp2_prepare_model; transformers 5.24
    distributed/fsdp.py update_fsdp_plugin_peft.
    """
    alike = replicas(parallelism)
    if alike == 1:
        return recipe, ONE
    p = parallelism
    if p.strategy in ZERO:
        q = method.quantization
        knobs = _knobs(p, hidden)
        if q is None:
            return recipe, Ranks(p.strategy, alike, knobs=knobs)
        # transformers makes no quantised model under deepspeed.zero.Init: modeling_utils.py get_init_context
        return recipe, Ranks(p.strategy, alike, knobs=knobs._replace(divides_loading=False), storage=q.storage)
    if p.strategy not in FSDP:
        waits = trainer and accumulates and p.bucket_view  # outside of the buckets until they are reduced
        return recipe, Ranks(p.strategy, alike, views=p.bucket_view, delayed=waits)
    ranks = Ranks(
        p.strategy,
        alike if p.shard_group in (None, 1) else p.shard_group,
        delayed=(trainer or words["code"] == "litgpt") and accumulates,  # fabric.no_backward_sync
        replicated=p.shard_group not in (None, 1, alike),
        keeps=p.reshard_after_forward is False or p.pp > 1,
        ahead=p.forward_prefetch,
        asks=p.backward_prefetch,
        wraps=not _unwrapped(p, method, trainer),
        offloads=p.offload.parameters,
        efficient=p.cpu_ram_efficient_loading and method.quantization is None,
        whole=p.shard_group == 1,
        reduces=words["fsdp_reduces"] if p.strategy == "fsdp2" else "",
    )
    q = method.quantization
    if q is not None:
        ranks = ranks._replace(storage=q.storage)
    if not recipe.autocast:
        if q is not None and trainer:
            return recipe._replace(adapter_dtype=q.storage), ranks._replace(trained=recipe.adapter_dtype)
        return recipe, ranks
    kept = recipe.weights if recipe.weights != recipe.compute else ""
    if p.strategy == "fsdp2" and words["fsdp_casts"]:
        recipe = recipe._replace(autocast=False)
    return recipe._replace(weights=recipe.compute, adapter_dtype=recipe.compute), ranks._replace(
        trained="fp32", frozen=kept
    )


def _check_trained(graph: Graph, ranks: Ranks) -> None:
    """Raise SpecError where nothing is left to train, or where ranks would wait for gradients that never come."""
    weights, recipe = [w for w, _, _ in weights_of(graph)], graph.recipe
    adapts = recipe.kind in ADAPTERS
    if recipe.frozen and adapts and not any(w.group == "adapter" for w in weights):
        raise SpecError("method.frozen: nothing is left to adapt of method.targets", "method.frozen")
    if adapts and not any(w.trains for w in weights):
        raise SpecError(
            f"method.targets: {graph.model.model_type} models do not call {', '.join(recipe.targets)}, and adapters "
            "there get no gradients; name others too",
            "method.targets",
        )
    idle = next((w for w in weights if w.idle and w.group != "adapter"), None) if ranks.world > 1 else None
    if idle is not None and idle.group not in ("vision", "projector", "audio"):
        raise SpecError(
            f"method.kind: {idle.name} of {graph.model.model_type} trains and never gets a gradient, which several "
            "GPUs would wait for; say lora, or one GPU",
            "method.kind",
        )
    if idle is not None:
        raise SpecError(
            "batch.images: without images the tower gets no gradients, which several GPUs would wait for; say images, "
            "or method.frozen vision and projector",
            "batch.images",
        )
    if ranks.world > 1 and ranks.row.flat and ranks.row.gathers:
        _check_flat(graph, ranks)
    if ranks.alone and ties_head(graph):
        raise SpecError(
            f"parallelism.ep: {graph.degrees.ep} is not supported yet with fsdp2 for a model whose head is its "
            "embeddings; supported: models that have a head of their own",
            "parallelism.ep",
        )
    dtypes = uneven(graph, ranks) if ranks.world > 1 and ranks.row.gathers and not ranks.row.flat else ()
    if dtypes:
        raise SpecError(
            f"parallelism.strategy: fsdp2 reduces the gradients of a unit in one dtype, and those of "
            f"{graph.model.model_type} are {' and '.join(dtypes)}; "
            + ("say ep 1" if ranks.alone else "say precision amp, which keeps what trains in fp32"),
            "parallelism.strategy",
        )


def _check_flat(graph: Graph, ranks: Ranks) -> None:
    """Raise SpecError where FSDP1 would lay weights of several dtypes together, or some that get no gradients."""
    if graph.joined and any(w.stored for w, _, _ in weights_of(graph)):
        raise SpecError(
            "method.quantization: adapters over quantised weights are not supported under fsdp as LitGPT has them, in "
            "one flat parameter with frozen weights; supported: lora, or profile transformers-5",
            "method.quantization",
        )
    dtypes = mixed(graph, ranks)
    if dtypes:
        field = "parallelism.strategy"
        raise SpecError(
            f"{field}: fsdp lays the weights of a unit together in one dtype, and these are {' and '.join(dtypes)}; "
            "fsdp2 does not, or say one dtype for weights and quantised storage, and kbit_preparation false",
            field,
        )


def with_profile(
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


def completed_precision(p: Precision) -> Precision:
    compute = p.compute or ("bf16" if p.autocast and p.weights == "fp32" else p.weights)
    return p.model_copy(update={"compute": compute, "grads": p.grads or p.weights})


def _method(m: Method, model: ModelSpec) -> Method:
    if m.kind == "freeze":  # as LLaMA-Factory has it: all layers where there are fewer
        return m.model_copy(update={"trainable_layers": min(m.trainable_layers, model.num_hidden_layers)})
    if m.kind not in ADAPTERS:
        return m
    saved = saved_with(model.objective, m.modules_to_save, model.objectives[0] == "causal_lm")
    return m.model_copy(update={"alpha": m.alpha or PEFT_ALPHA, "modules_to_save": saved})


def completed_optimizer(o: Optimizer) -> Optimizer:
    name = str(o.name)
    if o.foreach and not takes_foreach(name):
        have = ", ".join(filter(takes_foreach, optimizer_names()))
        raise SpecError(f"optimizer.foreach: {name} has no foreach step; {have} have", "optimizer.foreach")
    foreach = o.foreach if o.foreach is not None else takes_foreach(name)
    momentum = o.momentum if o.momentum is not None else 0.0
    return o.model_copy(update={"foreach": foreach, "momentum": momentum})


def _check_objective(model: ModelSpec, kernels: Kernels, precision: Precision, profile: str) -> None:
    """Raise SpecError where a loss is asked for that only causal language models have, a version that is not read, or
    what the model's classes do not take."""
    if model.objective == "causal_lm":
        return
    check_classes(model, kernels, profile)
    name = model.name or model.model_type
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
