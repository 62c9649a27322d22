"""Fill in what a training run leaves open, and refuse what its model cannot do.

A profile (a framework and its version) decides what `null` means: see `memplan.catalogue.profiles.profiles`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from memplan.catalogue.attention.attention import SINGLE
from memplan.catalogue.attention.efficient_workspace import large_tiles
from memplan.catalogue.degrees import Degrees
from memplan.catalogue.experts.expert_loops import AS_MODULES
from memplan.catalogue.families import megatron
from memplan.catalogue.families.litgpt import KINDS
from memplan.catalogue.hardware.gpus import find_gpu
from memplan.catalogue.kernels.losses import adds_in_place
from memplan.catalogue.methods.methods import ADAPTERS, Recipe
from memplan.catalogue.optimizers.states import optimizer_names, spares_embeddings, takes_foreach
from memplan.catalogue.parallelism import context_parallel, expert_parallel, tensor_parallel
from memplan.catalogue.parallelism.sharding import MEGATRON, ZeroSettings
from memplan.catalogue.profiles.profiles import find_profile, profile_settings
from memplan.core.errors import SpecError
from memplan.core.ir import SavedTensors
from memplan.core.units import ITEMSIZE
from memplan.models.model import ModelSpec
from memplan.models.objectives import modules_to_train
from memplan.program.graph import Graph, weights_of
from memplan.program.run import ResolvedRun
from memplan.program.sharding import zero
from memplan.program.sharding.ranks import SINGLE_RANK, Ranks, mixed, mixed_trained_dtypes, ties_head
from memplan.program.stack_facts import parameter_targets
from memplan.program.stored.checkpoint import notes as stored_notes
from memplan.program.training.pipeline import one_process, pipeline_stage
from memplan.program.training.program import Structure
from memplan.resolve.communicators import communicators
from memplan.resolve.defaults import adapted_experts, check_classes
from memplan.resolve.kernels import (
    attention_compute_dtype,
    attention_wiring,
    fused_kernels,
    tower_kernel,
    version_attention,
    with_profile_wiring,
)
from memplan.resolve.method import check_head, check_time_steps, frozen_parts, method_recipe
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
from memplan.resolve.quantized_checkpoint import method_for_training
from memplan.resolve.refusals import (
    FSDP,
    ZERO,
    refuse_for_activation_offload,
    refuse_for_context_parallel,
    refuse_for_deepspeed_offload,
    refuse_for_expert_parallel,
    refuse_for_megatron,
    refuse_for_megatron_experts,
    refuse_for_optimizer_offload,
    refuse_for_pipeline,
    refuse_for_several_gpus,
    refuse_for_tensor_parallel,
    refuse_parts,
)
from memplan.spec.base import Part
from memplan.spec.parallelism import Parallelism, Zero
from memplan.spec.run import Batch
from memplan.spec.training import Kernels, Loop, Method, Optimizer, Precision


def _refuse_adapted_parameters(model: ModelSpec, method: Method) -> None:
    """Raise SpecError for adapters on parameters under FSDP1.

    peft reads such an adapter's weights without calling the module that holds them; FSDP1 makes each of these modules a
    unit, which it only gathers when it is called.

    Source: peft 0.21 tuners/lora/layer.py ParamWrapper._activate_lora, utils/other.py fsdp_auto_wrap_policy.
    """
    names = sorted({name for group in parameter_targets(model) for name in group})
    named = [name for name in names if method.targets == "all-linear" or name in method.targets]
    if method.kind in ADAPTERS and named:
        raise SpecError(
            f"method.targets: peft 0.21 cannot adapt {', '.join(named)} under FSDP1, because they are parameters, not "
            "linear layers, and peft reads their adapters without calling the modules that FSDP1 gathers; name linear "
            "layers such as q_proj and v_proj, or use fsdp2",
            "method.targets",
        )


PEFT_ALPHA = 8.0  # peft 0.21 LoraConfig.lora_alpha; memory does not depend on it


# For `parallelism.offload.activations`. A tensor is packed each time it is saved, weights included.
_SAVED_TENSORS = SavedTensors(
    weights=True, source="torch 2.13 autograd/graph.py save_on_cpu, csrc/autograd/saved_variable.cpp"
)


@lru_cache(maxsize=4096)
def decide_training(  # noqa: PLR0912, PLR0913, PLR0915, PLR0917 (one default after the other)
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
    is_single_sequence: bool,
    is_single_chunk: bool,
    parallelism: Parallelism,
    images: bool,
    has_uneven_patches: bool,
    microbatches: int,
) -> ResolvedRun:
    """Return the training run with every null filled in, and the structure of its program.

    accumulates   whether gradients are accumulated over micro-batches
    windowed      whether the sequence reaches the sliding window
    single        whether the micro-batch is one sequence
    short         whether the sequence is one chunk of the loss
    images        whether the batch has images
    uneven        whether the image patches are not a multiple of 8
    microbatches  micro-batches per step of a pipeline, else 1

    Raises SpecError, UnknownNameError or ConfigError.
    """
    is_explicit = kernels.fused is not None
    gpu = find_gpu(gpu_name) if gpu_name is not None else None
    capability = gpu.compute_capability if gpu else None
    trains_fp8 = bool(profile_settings(find_profile(profile).name, model.model_type, False)["trains_fp8"])
    checkpoint = method_for_training(model, method, trains_fp8, capability)
    method = checkpoint.method
    words = profile_settings(find_profile(profile).name, model.model_type, method.quantization is not None)
    if words["code"] == "torchtitan" and method.kind != "full":
        overrides: Mapping[str, Any] = {"code": "transformers", "logits": "padded"}
        words = {**words, **overrides}
        note = "torchtitan: adapters and frozen layers are counted with transformers' layers"
        checkpoint = checkpoint._replace(notes=(*checkpoint.notes, note))
    if words["code"] == "litgpt" and model.model_type not in KINDS:
        raise SpecError(
            f"profile: {profile} does not have {model.model_type}; supported: {', '.join(KINDS)}", "profile"
        )
    degrees = degrees_of(parallelism, words["tensor_parallel"])
    copies = replicas(parallelism)
    sharded = divides_weights(parallelism)
    under_deepspeed = copies > 1 and parallelism.strategy in ZERO
    if sharded or under_deepspeed:
        method = without_preparation(method)
    method, optimizer, kernels = fill_parts(method, optimizer, kernels, precision, words)
    is_megatron_model = model.model_type == megatron.KIND
    refuse_parts(
        method, precision, optimizer, kernels, _allowed_storages(sharded, under_deepspeed, precision), is_megatron_model
    )
    if is_megatron_model:
        refuse_for_megatron(profile, method, precision, kernels, loop)
    if is_megatron_model:
        refuse_for_megatron_experts(parallelism, *megatron.experts_and_width(model))
    else:
        refuse_for_expert_parallel(parallelism, method, precision, loop, profile, words["tensor_parallel"], accumulates)
        if parallelism.ep > 1:
            expert_parallel.check(model, degrees)
    if degrees.tp > 1:
        refuse_for_tensor_parallel(
            parallelism, method, precision, optimizer, kernels, profile, words["tensor_parallel"], is_megatron_model
        )
        tensor_parallel.check(model, degrees, ITEMSIZE[precision.weights], adapted_experts(model, method))
    if under_deepspeed:
        refuse_for_deepspeed_offload(parallelism, str(optimizer.name), loop.trainer)
    elif parallelism.offload.optimizer and not sharded:
        refuse_for_optimizer_offload(str(optimizer.name))
    if parallelism.offload.activations:
        refuse_for_activation_offload(parallelism, method, kernels, model, profile, words["saved_tensors"], images)
    if copies > 1:
        refuse_for_several_gpus(parallelism, method, precision, optimizer, loop)
    if parallelism.pp > 1:
        refuse_for_pipeline(parallelism, method, loop, model.objective, images)
    if degrees.cp > 1:
        refuse_for_context_parallel(parallelism, kernels, loop, profile, words["tensor_parallel"], is_megatron_model)
    check_time_steps(model, method)
    _check_objective(model, kernels, precision, profile)
    check_head(model, method, kernels)
    if kernels.loss == "chunked_lm_head" and precision.autocast and not words["converts"]:
        raise SpecError(
            "kernels.loss: chunked_lm_head under autocast needs a litgpt profile; use chunked",
            "kernels.loss",
        )
    if words["experts"] == "modules" and model.model_type in AS_MODULES:
        model = ModelSpec({**model.config, "experts_implementation": "modules"}, model.name, model.card)
    elif "E" in model.axes() and words["experts"] != "stacked" and not is_megatron_model:
        raise SpecError(
            f"profile: the experts of {profile} ({words['experts']}) are not supported yet; use transformers-5 or "
            "trl-0.24",
            "profile",
        )
    if copies > 1 and parallelism.strategy == "fsdp":
        _refuse_adapted_parameters(model, method)
    notes: list[str] = list(_sharding_notes(parallelism, method, loop.trainer))
    if gpu is not None and gpu_name is not None:
        notes += gpu_notes(gpu, gpu_name)
    precision, method, optimizer = (
        fill_precision(precision),
        _completed_method(method, model),
        fill_optimizer(optimizer),
    )
    if under_deepspeed:
        precision, method = _deepspeed_dtypes(precision, method)
        if parallelism.zero == Zero():
            notes.append(_DEEPSPEED_NOTE)
    if copies > 1 and parallelism.strategy == MEGATRON:
        precision = _megatron_precision(precision)
        notes.append(_MEGATRON_NOTE if is_megatron_model else f"{_MEGATRON_NOTE}; {_NOT_ITS_CODE}")
    notes += dtype_notes(gpu, str(precision.compute))
    notes += [*stored_notes(model), *checkpoint.notes]
    notes += kernel_notes(model)
    recipe, more_notes = method_recipe(model, method, precision, words["code"], checkpoint.as_stored)
    recipe = recipe._replace(frozen=frozen_parts(model, method), keeps=words["keeps_matrix"])
    kernels, idle = fused_kernels(model, method, kernels, words["code"], words["keeps_matrix"])
    notes += [f"kernels.fused: {name} has nothing to fuse in this run" for name in idle if is_explicit]
    recipe = recipe._replace(fused="lora" in (kernels.fused or ()), again=words["dora_again"])
    if not is_megatron_model:
        degrees = degrees._replace(etp=1)
    elif not megatron.has_experts(model):
        degrees = degrees._replace(ep=1, etp=1)
    recipe, ranks = _ranks(parallelism, recipe, method, loop.trainer, accumulates, model.axes()["h"], words)
    if is_megatron_model and ranks.world > 1 and degrees.ep * degrees.etp > 1:
        ranks = ranks._replace(experts=ranks.world * degrees.tp // (degrees.ep * degrees.etp))
    if sharded and not words["quantised_there"]:
        ranks = ranks._replace(loads_whole=False)
    if not is_megatron_model and ranks.world > 1 and degrees.ep > 1:
        ranks = ranks._replace(expert_replicas=ranks.world * degrees.tp // degrees.ep)
    ranks = ranks._replace(regathers=sharded and words["gathers_again"] and kernels.checkpointing != "none")
    notes += more_notes
    attention, checkpoints, more_notes = version_attention(model, kernels, profile, words)
    notes += more_notes
    attention_dtype = attention_compute_dtype(model, recipe)
    if not words["has_family"]:
        notes.append(unknown_note(model, profile))
    padded = loop.padded and bool(words["masks_padding"])
    if loop.padded and not padded:
        notes.append(unmasked_note(profile))
    graph = Graph(
        model,
        recipe,
        with_profile_wiring(
            attention_wiring(model, attention, attention_dtype, recipe, capability, padded, windowed),
            words,
            str(kernels.attention),
        )._replace(
            caches=words["caches"],
            is_single_sequence=is_single_sequence and model.model_type in SINGLE,
            has_fp32_inputs=attention_dtype == "fp32",
            images=images,
            pads_image_mask=has_uneven_patches,
            tower=tower_kernel(model, recipe, kernels, capability) if images else "",
            checkpoints=checkpoints,
            by_name=words["by_name"] and checkpoints and not is_megatron_model,
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
        input_requires_grad=kernels.checkpointing != "none"
        and model.only_sequence is None  # the model reads token ids
        and (method.kind in ADAPTERS or bool(method.frozen) or (method.kind == "freeze" and words["frozen_inputs"])),
        logits=_logits(words, degrees) if kernels.loss in ("hf", "fused") else "padded",
        has_one_sequence=is_single_sequence
        and (kernels.loss == "chunked_lm_head" or (kernels.loss in ("hf", "fused") and words["logits"] != "padded")),
        has_single_chunk=is_single_chunk and kernels.loss == "chunked_lm_head",
        fused=tuple(sorted(kernels.fused or ())),
        casts_outputs=words["converts"]
        or (loop.trainer and precision.autocast and kernels.loss == "hf" and words["logits"] != "model"),
        code=words["code"],
        holds_previous_outputs=words["lingers"] and parallelism.pp == 1,
        degrees=degrees,
        flattens_frozen=words["code"] == "litgpt" and method.kind in ADAPTERS and ranks.world > 1 and ranks.row.flat,
    )
    if degrees.cp > 1 and not is_megatron_model:
        wiring = graph.wiring
        masked = any(wiring.has_mask(layer.sliding) for layer in model.layers)
        context_parallel.check(model.model_type, wiring.backend, masked, degrees)
        if degrees.context == "ulysses":
            context_parallel.check_heads(model, degrees)
    graph, pipe = pipeline_stage(graph, parallelism, words["pipeline"], microbatches)
    notes += pipeline_notes(graph.degrees, pipe, parallelism)
    structure = Structure(
        graph,
        accumulates=accumulates and not optimizer.in_backward,
        optimizer=str(optimizer.name),
        foreach=optimizer.foreach if takes_foreach(str(optimizer.name)) else None,
        state_dtype=optimizer.state_dtype,
        momentum=optimizer.momentum,
        in_backward=optimizer.in_backward,
        grads=precision.grads
        if is_megatron_model or precision.grads != precision.weights or ranks.strategy == MEGATRON
        else None,
        master=None if ranks.strategy in ZERO else precision.master,
        clips=bool(loop.clip_grad_norm) and not optimizer.in_backward,
        scales=loop.grad_scaler,
        trainer=loop.trainer,
        holds_outputs=loop.hold_outputs == "step"
        or words["code"] == "torchtitan"  # its trainer keeps references to a step's batches until the step ends
        or (degrees.sequence_parallel and degrees.style == "megatron"),
        on_host=parallelism.offload.optimizer and not ranks.offloads,
        ranks=ranks,
        pipe=pipe,
        buffers=is_megatron_model,
        workspace=megatron.engine_workspace_bytes(model, capability) if is_megatron_model else 0,
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
            f"under transformers' Trainer {optimizer.name} keeps the states of embeddings in fp32: "
            "set loop.trainer (--trainer) to count that"
        )
    if accumulates and optimizer.in_backward:
        raise SpecError("optimizer.in_backward: needs batch.accumulation 1", "optimizer.in_backward")
    if accumulates and str(optimizer.name).endswith("_layerwise"):
        raise SpecError(
            f"batch.accumulation: {optimizer.name} steps in backward, so transformers' Trainer only accepts 1",
            "batch.accumulation",
        )
    parts: dict[str, Part] = {"method": method, "precision": precision, "optimizer": optimizer, "kernels": kernels}
    groups = () if one_process(structure) else communicators(parallelism)
    tiles = large_tiles(capability)
    return ResolvedRun(
        structure, Batch(), gpu, attention_dtype != "fp32", tiles, tuple(notes), parts, communicators=groups
    )


_DEEPSPEED_NOTE = (
    "DeepSpeed: fp32 masters, and DeepSpeed's own defaults (reduce_bucket_size 5e8, sub_group_size 1e9, overlap_comm "
    "by stage, stage3_prefetch_bucket_size 5e7, stage3_max_reuse_distance 1e9), not transformers' auto"
)


def _wraps_no_blocks(p: Parallelism, method: Method, trainer: bool) -> bool:
    """Return whether blocks are not FSDP units of their own.

    transformers' Trainer has FSDP2 wrap a model with adapters by peft's policy, which accelerate ignores.

    Source: peft 0.21 utils/other.py fsdp_auto_wrap_policy, accelerate 1.15 utils/fsdp_utils.py
    fsdp2_prepare_auto_wrap_policy.
    """
    return p.strategy == "fsdp2" and replicas(p) > 1 and trainer and method.kind in ADAPTERS


def _sharding_notes(p: Parallelism, method: Method, trainer: bool) -> Iterator[str]:
    if _wraps_no_blocks(p, method, trainer):
        yield (
            "under transformers' Trainer FSDP2 gathers all weights of a model with adapters at once, because "
            "accelerate ignores peft's wrapping policy; FSDP1 or your own loop gathers block by block"
        )
    if p.static_graph:
        yield "parallelism.static_graph changes no memory"


def _logits(words: Mapping[str, Any], degrees: Degrees) -> str:
    """Return how the loss over all logits is written. torchtitan's is vocabulary-parallel."""
    return "parallel" if words["code"] == "torchtitan" and degrees.tp > 1 else words["logits"]


_MEGATRON_NOTE = (
    "Megatron: main gradients in fp32 (--accumulate-allreduce-grads-in-fp32, on with --bf16), fp32 masters, no "
    "--overlap-grad-reduce"
)
_NOT_ITS_CODE = "the layers counted are transformers', not Megatron's"


def _megatron_precision(precision: Precision) -> Precision:
    """Return the precision with main gradients and master weights in fp32.

    Source: Megatron-LM megatron/training/arguments.py.
    """
    master = None if precision.weights == "fp32" else "fp32"
    return precision.model_copy(update={"grads": "fp32", "master": master})


def _deepspeed_dtypes(precision: Precision, method: Method) -> tuple[Precision, Method]:
    """Return the precision and method under DeepSpeed: the model and its adapters have one dtype, with fp32 masters.

    Source: DeepSpeed 0.19.8 runtime/engine.py _configure_distributed_model.
    """
    master = None if precision.weights == "fp32" else "fp32"
    if method.kind in ADAPTERS:
        method = method.model_copy(update={"adapter_dtype": precision.weights})
    return precision.model_copy(update={"master": master}), method


def divides_weights(parallelism: Parallelism) -> bool:
    """Return whether FSDP shards the weights over ranks."""
    return replicas(parallelism) > 1 and parallelism.strategy in FSDP


def _deepspeed_knobs(p: Parallelism, hidden: int) -> ZeroSettings:
    """Return DeepSpeed's configuration with every value filled in.

    Source: transformers 5.24 integrations/deepspeed.py trainer_config_finalize; DeepSpeed runtime/zero/config.py.
    """
    z = p.zero

    def filled(value: int | str, auto: int) -> int:
        return value if isinstance(value, int) else auto

    optimizer, weights = z.offload_optimizer, z.offload_param
    return ZeroSettings(
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


def _allowed_storages(sharded: bool, under_deepspeed: bool, precision: Precision) -> tuple[str, ...]:
    """Return the dtypes that 4-bit weights may be stored in.

    FSDP cannot shard integers, and DeepSpeed would cast any other float.
    """
    if sharded:
        return ("bf16", "fp16", "fp32")
    return ("uint8", precision.weights) if under_deepspeed else ("uint8",)


def without_preparation(method: Method) -> Method:
    """Return the method without k-bit preparation, unless the run asks for it: sharded 4-bit weights are not prepared.

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
    """Return how ranks divide the run, and the recipe of what they compute.

    Under autocast FSDP's mixed precision is on: weights are gathered in the compute dtype, and what trains is kept in
    fp32. With 4-bit weights transformers' Trainer always turns it on, in the dtype of their storage.
    Source: accelerate 1.15 accelerator.py prepare_model, utils/fsdp_utils.py fsdp2_prepare_model; transformers 5.24
    distributed/fsdp.py update_fsdp_plugin_peft.
    """
    copies = replicas(parallelism)
    if copies == 1:
        return recipe, SINGLE_RANK
    p = parallelism
    if p.strategy in ZERO:
        q = method.quantization
        knobs = _deepspeed_knobs(p, hidden)
        if q is None:
            return recipe, Ranks(p.strategy, copies, knobs=knobs)
        # transformers creates no quantised model under deepspeed.zero.Init: modeling_utils.py get_init_context
        return recipe, Ranks(p.strategy, copies, knobs=knobs._replace(divides_loading=False), storage=q.storage)
    if p.strategy not in FSDP:
        waits = trainer and accumulates and p.bucket_view  # gradients stay outside of the buckets until reduced
        return recipe, Ranks(p.strategy, copies, views=p.bucket_view, delayed=waits)
    ranks = Ranks(
        p.strategy,
        copies if p.shard_group in (None, 1) else p.shard_group,
        delayed=(trainer or words["code"] == "litgpt") and accumulates,  # fabric.no_backward_sync
        replicated=p.shard_group not in (None, 1, copies),
        keeps=p.reshard_after_forward is False or p.pp > 1,
        ahead=p.forward_prefetch,
        prefetches_at=p.backward_prefetch,
        wraps=not _wraps_no_blocks(p, method, trainer),
        offloads=p.offload.parameters,
        efficient=p.cpu_ram_efficient_loading and method.quantization is None,
        is_unsharded=p.shard_group == 1,
        reduces=words["fsdp_reduces"] if p.strategy == "fsdp2" else "",
    )
    q = method.quantization
    if q is not None:
        ranks = ranks._replace(storage=q.storage)
    if not recipe.autocast:
        if q is not None and trainer:
            return recipe._replace(adapter_dtype=q.storage), ranks._replace(trained=recipe.adapter_dtype)
        return recipe, ranks
    frozen_dtype = recipe.weights if recipe.weights != recipe.compute else ""
    if p.strategy == "fsdp2" and words["fsdp_casts"]:
        recipe = recipe._replace(autocast=False)
    return recipe._replace(weights=recipe.compute, adapter_dtype=recipe.compute), ranks._replace(
        trained="fp32", frozen=frozen_dtype
    )


def _check_trained(graph: Graph, ranks: Ranks) -> None:
    """Raise SpecError if nothing is left to train, or if ranks would wait for gradients that never come."""
    weights, recipe = [w for w, _, _ in weights_of(graph)], graph.recipe
    adapts = recipe.kind in ADAPTERS
    if recipe.frozen and adapts and not any(w.group == "adapter" for w in weights):
        raise SpecError("method.frozen: freezes all of method.targets, so nothing is left to adapt", "method.frozen")
    if adapts and not any(w.trains for w in weights):
        raise SpecError(
            f"method.targets: {graph.model.model_type} models never call {', '.join(recipe.targets)}, so their "
            "adapters get no gradients; name other targets too",
            "method.targets",
        )
    idle = next((w for w in weights if w.idle and w.group != "adapter"), None) if ranks.world > 1 else None
    if idle is not None and idle.group not in ("vision", "projector", "audio"):
        raise SpecError(
            f"method.kind: {idle.name} of {graph.model.model_type} is trainable but never gets a gradient, which "
            "several GPUs would wait for; use lora, or one GPU",
            "method.kind",
        )
    if idle is not None:
        raise SpecError(
            "batch.images: without images the vision tower gets no gradients, which several GPUs would wait for; set "
            "images, or freeze vision and projector (method.frozen)",
            "batch.images",
        )
    if ranks.world > 1 and ranks.row.flat and ranks.row.gathers:
        _check_flat(graph, ranks)
    if ranks.expert_replicas and ties_head(graph):
        raise SpecError(
            f"parallelism.ep: {graph.degrees.ep} is not supported yet with fsdp2 for models with tied embeddings; "
            "supported: 1",
            "parallelism.ep",
        )
    dtypes = mixed_trained_dtypes(graph, ranks) if ranks.world > 1 and ranks.row.gathers and not ranks.row.flat else ()
    if dtypes:
        raise SpecError(
            f"parallelism.strategy: fsdp2 reduces the gradients of a unit in one dtype, but those of "
            f"{graph.model.model_type} are {' and '.join(dtypes)}; "
            + ("use ep 1" if ranks.expert_replicas else "use precision amp, which keeps trainable weights in fp32"),
            "parallelism.strategy",
        )


def _check_flat(graph: Graph, ranks: Ranks) -> None:
    """Raise SpecError if FSDP1 would flatten weights of several dtypes together."""
    if graph.flattens_frozen and any(w.stored for w, _, _ in weights_of(graph)):
        raise SpecError(
            "method.quantization: quantised weights are not supported under fsdp with LitGPT, which flattens adapters "
            "and frozen weights together; supported: lora, or profile transformers-5",
            "method.quantization",
        )
    dtypes = mixed(graph, ranks)
    if dtypes:
        field = "parallelism.strategy"
        raise SpecError(
            f"{field}: fsdp flattens the weights of a unit in one dtype, but these are {' and '.join(dtypes)}; use "
            "fsdp2, or one dtype for weights and quantised storage with kbit_preparation false",
            field,
        )


def fill_parts(
    method: Method, optimizer: Optimizer, kernels: Kernels, precision: Precision, words: Mapping[str, Any]
) -> tuple[Method, Optimizer, Kernels]:
    """Return the parts with what they leave open filled in from the profile."""

    def fill(part: Any, path: str) -> Any:
        open_ = {field for field, value in part if value is None and f"{path}.{field}" in words}
        return part.model_copy(update={field: words[f"{path}.{field}"] for field in open_}) if open_ else part

    if method.kind in ADAPTERS and method.adapter_dtype is None:
        dtype = words["method.adapter_dtype"]
        method = method.model_copy(update={"adapter_dtype": precision.weights if dtype == "weights" else dtype})
    if method.quantization is not None:
        method = method.model_copy(update={"quantization": fill(method.quantization, "method.quantization")})
    return method, fill(optimizer, "optimizer"), fill(kernels, "kernels")


def fill_precision(p: Precision) -> Precision:
    compute = p.compute or ("bf16" if p.autocast and p.weights == "fp32" else p.weights)
    return p.model_copy(update={"compute": compute, "grads": p.grads or p.weights})


def _completed_method(m: Method, model: ModelSpec) -> Method:
    if m.kind == "freeze":  # like LLaMA-Factory: all layers, if there are fewer
        return m.model_copy(update={"trainable_layers": min(m.trainable_layers, model.num_hidden_layers)})
    if m.kind not in ADAPTERS:
        return m
    saved = modules_to_train(model.objective, m.modules_to_save, model.objectives[0] == "causal_lm")
    return m.model_copy(update={"alpha": m.alpha or PEFT_ALPHA, "modules_to_save": saved})


def fill_optimizer(o: Optimizer) -> Optimizer:
    name = str(o.name)
    if o.foreach and not takes_foreach(name):
        supported = ", ".join(filter(takes_foreach, optimizer_names()))
        raise SpecError(f"optimizer.foreach: {name} has no foreach step; use {supported}", "optimizer.foreach")
    foreach = o.foreach if o.foreach is not None else takes_foreach(name)
    momentum = o.momentum if o.momentum is not None else 0.0
    return o.model_copy(update={"foreach": foreach, "momentum": momentum})


def _check_objective(model: ModelSpec, kernels: Kernels, precision: Precision, profile: str) -> None:
    """Raise SpecError for a loss, a version or a dtype that does not go with the model's objective."""
    if model.objective == "causal_lm":
        return
    check_classes(model, kernels, profile)
    name = model.name or model.model_type
    if model.is_encoder_decoder and precision.weights == "fp16":
        raise SpecError(
            f"precision.weights: fp16 is not supported yet for {name}, whose layers clamp their fp16 outputs; use "
            "bf16, fp32, or fp16 autocast",
            "precision.weights",
        )
    if kernels.loss != "hf":
        raise SpecError(
            f"kernels.loss: {kernels.loss} only applies to causal language models; {name} is trained for "
            f"{model.objective}, so use hf",
            "kernels.loss",
        )
