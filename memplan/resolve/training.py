"""Fill in what a training run leaves open, and refuse what its model cannot do, in steps.

A profile (a framework and its version) decides what `null` means: see `memplan.catalogue.profiles.profiles`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

from memplan.catalogue.attention.efficient_workspace import large_tiles
from memplan.catalogue.families import megatron
from memplan.catalogue.families.litgpt import SUPPORTED, has_family
from memplan.catalogue.kernels.losses import OF_ALL_LOGITS, adds_in_place
from memplan.catalogue.kernels.wiring import DISTILLING, TRAINERS, Trainer
from memplan.catalogue.methods.methods import ADAPTERS
from memplan.catalogue.optimizers.states import spares_embeddings, takes_foreach
from memplan.catalogue.parallelism import context_parallel, expert_parallel
from memplan.catalogue.parallelism.sharding import MEGATRON
from memplan.catalogue.profiles.profiles import library_behaviour
from memplan.core.errors import refused
from memplan.core.ir import SavedTensors
from memplan.core.once import once
from memplan.models.configs.megatron import fuses_accumulation, gpt_config
from memplan.models.model import ModelSpec, without_dropout
from memplan.models.peft_methods import PEFT_METHODS, leads_stream
from memplan.program.graph import Graph, without_gradients
from memplan.program.run import ResolvedRun
from memplan.program.sharding.choice import sharding_of
from memplan.program.sharding.ranks import Ranks
from memplan.program.stack_facts import trained_tables
from memplan.program.structure import Pipe, Structure
from memplan.program.training.pipeline import pipeline_stage
from memplan.resolve import steps
from memplan.resolve.card import GPUFacts
from memplan.resolve.communicators import communicators
from memplan.resolve.defaults import complete_method, defaults_of, fill_optimizer, fill_parts, fill_precision
from memplan.resolve.kernels import fused_kernels, with_attention
from memplan.resolve.method import check_head, check_time_steps, frozen_parts, loaded_wide, method_recipe
from memplan.resolve.notes import expert_notes, norm_notes, pipeline_notes, wrapping_notes
from memplan.resolve.open_run import BatchFacts, OpenRun, Parts, found_later
from memplan.resolve.parallelism import ZERO
from memplan.resolve.quantized_checkpoint import method_for_training
from memplan.resolve.ranks import NOT_ITS_CODE, divide_ranks, note_sharding, set_sharded_dtypes, shard
from memplan.resolve.refusals import packing, trainers
from memplan.resolve.refusals import training as refusals
from memplan.resolve.refusals.models import adapted_parameters, smoothed_labels, trained_weights, training_objective
from memplan.resolve.refusals.refuse import not_yet_with, refuse
from memplan.resolve.refusals.settings import optimizer_offload, settings
from memplan.resolve.roles import step_precision
from memplan.spec.base import Part
from memplan.spec.run import Batch

# For `parallelism.offload.activations`, by `saved_tensors` of the profile. torch packs a tensor each time it is saved,
# weights included.
_SAVED_TENSORS = {
    "torch": SavedTensors(
        weights=True, source="torch 2.13 autograd/graph.py save_on_cpu, csrc/autograd/saved_variable.cpp"
    ),
    "trl": SavedTensors(
        weights=False,
        source="trl 1.16.0 models/activation_offloading.py OffloadActivations",
        stash=5,
        stays="lm_head",
    ),
}


class OpenTraining(OpenRun):
    """A training run while it is resolved.

    names_fused  the run itself names its fused kernels
    others       graphs of the other models of the trainer's step, by role
    step         how a trainer of TRL runs the model; None if the loss is the model's own
    """

    names_fused: bool
    others: tuple[tuple[str, Graph], ...]
    ranks: Ranks = found_later()
    graph: Graph = found_later()
    pipe: Pipe = Pipe()
    structure: Structure = found_later()
    step: Trainer | None = None


@lru_cache(maxsize=512)
def _shared(part: Part, given: frozenset[str]) -> Part:
    """Return one part for equal ones: thousands of runs are kept, and few of their parts differ."""
    return part


@lru_cache(maxsize=1024)
@once
def decide_training(
    model: ModelSpec,
    asked: Parts,
    card: GPUFacts | None,
    batch_facts: BatchFacts,
    others: tuple[tuple[str, Graph], ...] = (),
) -> ResolvedRun:
    """Return the training run with every null filled in, and the structure of its program, without batch and GPU.

    `others` are the graphs of the other models of its step, by role (`memplan.resolve.roles`).

    Raises SpecError, UnknownNameError or ConfigError.
    """
    names_fused = asked.kernels.fused is not None
    run = OpenTraining(
        model=model,
        card=card,
        notes=[],
        batch_facts=batch_facts,
        trains=True,
        names_fused=names_fused,
        others=others,
        **asked._asdict(),
    )
    for step in STEPS:
        step(run)
    is_divided = asked.parallelism.world > 1 and not run.structure.is_one_process
    parts: dict[str, Part] = {name: getattr(run, name) for name in ("method", "precision", "optimizer", "kernels")}
    if step_precision(run.trainer, asked.kernels.loss, asked.precision) != asked.precision:
        parts["precision"] = fill_precision(asked.precision)
    parts = {name: _shared(part, frozenset(part.model_fields_set)) for name, part in parts.items()}
    return ResolvedRun(
        run.structure,
        Batch(),
        None,
        run.attention_dtype != "fp32",
        large_tiles(run.capability),
        tuple(run.notes),
        parts,
        communicators=communicators(asked.parallelism) if is_divided else (),
    )


def _read_checkpoint(run: OpenTraining) -> None:
    """Fill in the quantisation of the checkpoint."""
    p, library = run.parallelism, library_behaviour(run.profile, run.model.model_type, False)
    why = "" if library.weights.trains_fp8 else "this profile cannot train over it"
    if p.tp > 1 or p.strategy not in ("none", "ddp"):
        casts = p.tp == 1 and p.strategy in ("zero1", "zero2")  # DeepSpeed 0.19.7 runtime/engine.py
        why = why or (refusals.FP8_IN_ZERO if casts else "it is not counted where GPUs divide the weights")
    run.checkpoint = method_for_training(run.model, run.method, why, run.capability)
    run.method = run.checkpoint.method


def _look_up_library(run: OpenTraining) -> None:
    """Look up what the profile's library does for the model."""
    kind = run.model.model_type
    library = library_behaviour(run.profile, kind, run.method.quantization is not None)
    if library.model.code == "torchtitan" and run.method.kind != "full":
        model, loss = library.model._replace(code="transformers"), library.loss._replace(logits="padded")
        library = library._replace(model=model, loss=loss)
        note = "torchtitan: adapters and frozen layers are counted with transformers' layers"
        run.checkpoint = run.checkpoint._replace(notes=(*run.checkpoint.notes, note))
    if library.sharding.tensor_parallel == "megatron" and not run.is_megatron_model:
        config = gpt_config(run.model)
        if config is not None and refusals.runs_in_megatron(run):
            run.model = ModelSpec(config, run.model.name)
        else:
            run.notes.append(NOT_ITS_CODE)
    if library.model.code == "litgpt" and not has_family(run.model):
        raise refused("profile", f"{run.profile} does not have {kind}; supported: {SUPPORTED}")
    run.library = library


def _choose_trainer(run: OpenTraining) -> None:
    """Choose how the trainer's step runs the model and its reference, unless the loss is the model's own."""
    if run.trainer == "sft" and run.reference is None:
        return
    refuse(trainers.trainer(run))
    name, behaviour, facts = run.trainer, run.library.trainer, TRAINERS[run.trainer]
    own = "adapters" if run.method.kind in ADAPTERS else "copy"
    if name in DISTILLING:
        recipes = [other.recipe for role, other in run.others if role == "teacher"]
        dtype = "".join("fp32" if teacher.autocast else teacher.weights for teacher in recipes)  # empty on a server
        run.step = Trainer(name, behaviour.log_probs, "none", rows=1, teacher_dtype=dtype)
    elif facts.own_loop:
        run.reference = run.reference or own
        run.step = Trainer(name, "sliced", run.reference, trains_copy=False, rows=facts.rows)
        behaviour = behaviour._replace(divided_logits="in_place")
        if run.precision.autocast:
            run.notes.append(
                "ppo: PPOTrainer makes an Accelerator that does not read bf16 of its config with transformers 5, so "
                "autocast runs only with accelerate launch --mixed_precision bf16 (or fp16)"
            )
        # both models' outputs stay until the mini-batch is over, and nothing clips
        run.loop = run.loop.model_copy(update={"hold_outputs": "step", "clip_grad_norm": False})
    elif not facts.reference:
        log_probs = behaviour.log_probs if behaviour.log_probs in ("gathered", "kernel") else "shifted"
        likelihood, head = facts.likelihood and log_probs != "gathered", name == "reward" and behaviour.value_head
        run.step = Trainer(name, log_probs, "none", likelihood=likelihood, value_head=head)
    else:
        run.reference = run.reference or (own if facts.reference == "own" else "none")
        log_probs = "shifted" if (name, behaviour.log_probs) == ("kto", "joined") else behaviour.log_probs
        run.step = Trainer(
            name,
            log_probs,
            run.reference,
            copies_adapters=behaviour.copies_adapters and run.reference == "adapters",
            trains_copy=bool(facts.completions) or behaviour.trained_reference,
            caches_copy=(name, run.reference, log_probs) == ("kto", "copy", "shifted")  # until trl 1.13
            and not (behaviour.kto_copies and run.kernels.loss == "fused"),
            copy_dtype=behaviour.reference_dtype,
            copies=behaviour.kto_copies if name == "kto" else "",
            shards_copy=behaviour.fsdp2_reference if run.is_sharded else "",
            rows=facts.rows,
        )
        if run.step.shards_copy == "unit" and run.reference == "copy" and run.parallelism.strategy == "fsdp2":
            run.notes.append(
                "TRL shards a reference copy under FSDP2 as one unit, so its pass gathers all weights at once; FSDP1 "
                "gathers block by block, and a precomputed reference needs neither"
            )
    if facts.no_dropout and not run.step.value_head:  # which is LLaMA-Factory's
        if run.method.dropout:
            run.notes.append(f"{name}: the trainer turns dropout off (disable_dropout)")
        run.model, run.method = without_dropout(run.model), run.method.model_copy(update={"dropout": 0.0})
    casts_back = run.parallelism.strategy == "fsdp2" and run.is_sharded and not run.library.sharding.fsdp_casts
    run.step = run.step._replace(
        logits_dtype=behaviour.logits_dtype,
        casts_back=casts_back,
        has_parts=run.batch_facts.accumulates,
        fused_gradients=behaviour.fused_gradients if run.kernels.loss == "fused" else "",
    )
    if run.step.fused_gradients == "recomputed":
        run.step = run.step._replace(log_probs="recomputed", fused_gradients="")
    if facts.completions:
        run.step = run.step._replace(
            has_one_sequence=run.batch_facts.is_single_sequence,
            generates=run.rollout == "transformers",
            old_log_probs=name not in DISTILLING
            and (facts.rescores or run.rollout != "transformers" or behaviour.log_probs == "rolled"),
            prompt_logits=behaviour.prompt_logits,
            divided_logits=behaviour.divided_logits,
            entropy_bonus=run.loop.entropy_bonus,
        )
    _without_autocast(run, run.step)
    run.library = run.library._replace(defaults=defaults_of(run.library, name))


def _without_autocast(run: OpenTraining, step: Trainer) -> None:
    """Let a step that calls the model's backbone compute without autocast, and its passes without gradients with it."""
    asked = run.precision
    if step.calls_backbone and not run.is_sharded:  # else FSDP's mixed precision, without autocast
        run.precision = step_precision(run.trainer, run.kernels.loss, asked)
        if asked.autocast and step.fused_gradients and (step.name == "grpo" or step.copies):
            step = step._replace(scored_in=asked.compute or "bf16")
    if run.precision.weights == "fp32" and not run.precision.autocast:
        step = step._replace(logits_dtype="fp32")
    run.step = step
    if asked.autocast and not run.precision.autocast and asked.weights == "fp32":
        run.notes.append(
            f"{run.trainer}: TRL calls the backbone past accelerate's autocast, so fp32 weights compute in fp32, "
            "except in generation; load them in bf16 (--dtype bf16) to compute in 16 bits"
        )


def _fill_from_profile(run: OpenTraining) -> None:
    """Fill in the defaults of the profile."""
    defaults, q = run.library.defaults, run.method.quantization
    stacked = run.library.model.experts == "stacked" and q is not None and q.format in ("nf4", "fp4")
    kernels = with_attention(run.kernels, run.model, run.library)
    run.method, run.optimizer, run.kernels = fill_parts(
        run.method, run.optimizer, kernels, run.precision, defaults, stacked and "E" in run.model.axes()
    )


def _refuse_settings(run: OpenTraining) -> None:
    """Refuse settings of the parts, and experts that ranks cannot divide."""
    refuse(settings(run), refusals.quantised_experts(run))
    if run.batch_facts.packing:
        refuse(packing.packed_batch(run))
    if run.is_megatron_model:
        refuse(refusals.megatron_model(run), refusals.megatron_experts(run))
    else:
        refuse(refusals.expert_parallel(run))
        if run.parallelism.ep > 1:
            expert_parallel.check(run.model, run.degrees)


def _refuse_several_gpus(run: OpenTraining) -> None:
    """Refuse offloading, sharding, pipelines and context parallelism that the run cannot have."""
    p = run.parallelism
    if run.under_deepspeed:
        refuse(refusals.deepspeed_offload(run))
    elif p.offload.optimizer and not run.is_sharded:
        refuse(optimizer_offload(str(run.optimizer.name)))
    if p.offload.activations:
        refuse(refusals.activation_offload(run))
    if run.is_wrapped:
        refuse(refusals.several_gpus(run))
    if p.pp > 1:
        refuse(refusals.pipeline(run))
    if run.degrees.cp > 1:
        refuse(refusals.context_parallel(run))


def _check_model(run: OpenTraining) -> None:
    """Refuse what the model's layers, its objective or its head do not allow."""
    check_time_steps(run.model, run.method)
    refuse(training_objective(run), smoothed_labels(run))
    check_head(run.model, run.method, run.kernels)
    if run.kernels.loss == "chunked_lm_head" and run.precision.autocast and not run.library.loss.casts_outputs:
        raise refused("kernels.loss", "chunked_lm_head under autocast needs a litgpt profile; use chunked")


def _refuse_adapted_parameters(run: OpenTraining) -> None:
    if run.is_sharded and run.parallelism.strategy == "fsdp":
        refuse(adapted_parameters(run))


def _complete_parts(run: OpenTraining) -> None:
    """Fill in the defaults of torch, peft and the optimizer."""
    run.precision = fill_precision(run.precision)
    run.method = complete_method(
        run.method, run.model, run.library.defaults.method_quantization_experts, run.library.model.names_linears
    )
    run.optimizer = fill_optimizer(run.optimizer)


def _choose_recipe(run: OpenTraining) -> None:
    """Choose the dtypes, the adapters, what is quantised and frozen, and the fused kernels that apply."""
    model, method, library = run.model, run.method, run.library
    recipe, notes = method_recipe(model, method, run.precision, run.code, run.checkpoint.as_stored)
    is_lora, whole = recipe.kind == "lora" and not recipe.quantization, run.parallelism.strategy in ("none", "ddp")
    if library.weights.trains_mxfp4 and model.card.get("stored") == "mxfp4" and is_lora and whole:
        recipe = recipe._replace(quantization="mxfp4", experts=True, packed=True)
        notes.append("LoRA trains over the checkpoint's experts as stored: mxfp4")
    moved = run.loop.trainer and method.quantization is None  # by the Trainer, so peft adapts the model on the host
    frozen = frozen_parts(model, method)
    run.kernels, idle = fused_kernels(model, method, run.kernels, run.code, library)
    run.notes += [f"kernels.fused: {name} has nothing to fuse in this run" for name in idle if run.names_fused]
    run.recipe = recipe._replace(
        frozen=frozen,
        wide=loaded_wide(model, run.precision),
        keeps=library.weights.keeps_matrix,
        fused=library.model.fused_lora if "lora" in (run.kernels.fused or ()) else "",
        fp32_ends=library.model.fp32_ends and run.kernels.attention != "flash_attention_2",
        again=library.model.dora_multiplies_twice,
        magnitudes=library.model.magnitude_dtype,
        moved=moved and method.kind in PEFT_METHODS,
        decomposition="" if moved else recipe.decomposition,
    )
    run.notes += notes


def _shard(run: OpenTraining) -> None:
    run.ranks = shard(run)
    if run.step is not None and run.step.calls_backbone:
        run.recipe = run.recipe._replace(autocast=False)


def _wire_training(run: OpenTraining) -> None:
    """Add to the wiring what only matters for backward."""
    by_name = run.library.checkpointing.passes_keywords and run.checkpoints and not run.is_megatron_model
    run.wiring = run.wiring._replace(
        caches=run.library.model.returns_caches,
        caching=TRAINERS[run.trainer].own_loop or bool(run.recipe.prefix),
        prefixed=bool(run.recipe.prefix),
        checkpoints=run.checkpoints and run.model.is_encoder_decoder,
        by_name=by_name,
        recomputes=run.kernels.checkpointing == "selective" and run.is_megatron_model,
        accumulates=run.is_megatron_model and run.method.kind == "full" and fuses_accumulation(run.model),
        keeps_last=run.library.checkpointing.keeps_last and run.kernels.checkpointing == "offload",
    )


def _build_graph(run: OpenTraining) -> None:
    """Build the graph, and cut out the part that one rank runs."""
    method, kernels, loop, library, p = run.method, run.kernels, run.loop, run.library, run.parallelism
    loss, checkpoints, facts = str(run.kernels.loss), run.checkpoints, run.batch_facts
    trains_inputs = method.kind in ADAPTERS or bool(method.frozen)
    freezes_inputs = method.kind == "freeze" and library.checkpointing.frozen_inputs
    adds_logits = loss in (*OF_ALL_LOGITS, "fused")  # the loss reads all logits at once
    casts_logits = loop.trainer and run.precision.autocast and loss in OF_ALL_LOGITS and library.loss.logits != "model"
    run.graph = Graph(
        run.model,
        run.recipe,
        run.wiring,
        checkpoint=checkpoints,
        loss=loss,
        hold_outputs=bool(loop.hold_outputs),
        adds_in_place=loss != "fused" or (library.loss.adds_products and adds_in_place(run.capability)),
        rank=method.rank,
        trainable_layers=method.last_layers,
        reentrant=bool(kernels.reentrant) and checkpoints,
        to_host=kernels.checkpointing == "offload" and checkpoints,
        saves=_SAVED_TENSORS[library.checkpointing.saved_tensors] if p.offload.activations else None,
        input_requires_grad=(
            (kernels.checkpointing != "none" and not library.checkpointing.by_module)
            or library.checkpointing.adapted_inputs
        )
        and (run.model.only_sequence is None or bool(kernels.reentrant))  # by itself where the model reads token ids
        and (trains_inputs or freezes_inputs),
        logits=_logits(run) if adds_logits else "padded",
        has_one_sequence=facts.is_single_sequence
        and (
            loss in ("chunked_lm_head", "label_smoothing")
            or leads_stream(method.kind)
            or (adds_logits and library.loss.logits != "padded")
        ),
        loss_chunks=dict(facts.loss_chunks).get(loss, 0),
        fused=tuple(sorted({*(kernels.fused or ()), *library.model.own_kernels})),
        casts_outputs=library.loss.casts_outputs or casts_logits,
        code=run.code,
        holds_previous_outputs=_previous_outputs(run),
        degrees=run.degrees,
        flattens_frozen=run.code == "litgpt" and method.kind in ADAPTERS and run.ranks.world > 1 and run.ranks.row.flat,
        trainer=run.step,
        roles=tuple((role, _role(role, other, run.step)) for role, other in run.others),
        every_n_layers=kernels.every_n_layers,
        checkpoints_last=kernels.every_n_layers > 1 and library.checkpointing.last_of_n,
        saves_products=_saved_products(run),
    )


def _role(role: str, graph: Graph, step: Trainer | None) -> Graph:
    """Return the graph of another model inside the step. A value model trains, and caches as the policy does."""
    if role == "teacher" and step is not None:
        return without_gradients(graph._replace(trainer=step._replace(casts_back=False)))  # no rank divides it
    if role == "value" and step is not None:
        wiring = graph.wiring._replace(caching=True)
        return graph._replace(trainer=step._replace(is_reference=True), wiring=wiring, hold_outputs=False)
    return graph


def _saved_products(run: OpenTraining) -> str:
    """Return what checkpoints keep. torchtitan's selective ones recompute every second matrix product."""
    if run.checkpoints and run.kernels.checkpointing == "full" and run.library.checkpointing.by_module:
        return "modules"
    if run.kernels.checkpointing != "selective" or not run.checkpoints:
        return ""
    return "alternate" if run.style == "torchtitan" else "all"


def _previous_outputs(run: OpenTraining) -> Literal["", "outputs", "returned", "graph"]:
    """Return what variables of the training loop reference of the pass before."""
    if run.library.loss.holds_previous_outputs and run.parallelism.pp == 1:
        return "graph"
    if run.loop.hold_outputs != "step" or not run.batch_facts.accumulates:
        return ""
    return "returned" if TRAINERS[run.trainer].own_loop else "outputs"


def _logits(run: OpenTraining) -> str:
    """Return how the loss over all logits is written. torchtitan's is vocabulary-parallel."""
    if "compiled_cross_entropy" in (run.kernels.fused or ()):
        return "compiled"
    return "parallel" if run.code == "torchtitan" and run.degrees.tp > 1 else run.library.loss.logits


def _cut_out_rank(run: OpenTraining) -> None:
    """Check that context parallelism can divide the attention, and cut out the pipeline stage."""
    degrees, wiring = run.degrees, run.wiring
    if degrees.cp > 1 and not run.is_megatron_model:
        masked = any(wiring.has_mask(layer.sliding) for layer in run.model.layers)
        context_parallel.check(run.model, wiring.backend, masked, degrees)
        if degrees.context == "ulysses":
            context_parallel.check_heads(run.model, degrees)
    if run.parallelism.pp > 1:
        engine = run.library.sharding.pipeline
        run.graph, run.pipe = pipeline_stage(run.graph, run.parallelism, engine, run.batch_facts.microbatches)
    run.notes += pipeline_notes(run.graph.degrees, run.pipe, run.parallelism)


def _build_structure(run: OpenTraining) -> None:
    """Add to the graph how the step accumulates, shards and updates."""
    optimizer, precision, loop, ranks = run.optimizer, run.precision, run.loop, run.ranks
    own_gradients = run.is_megatron_model or precision.grads != precision.weights or ranks.strategy == MEGATRON
    run.structure = Structure(
        run.graph,
        accumulates=run.batch_facts.accumulates and not optimizer.in_backward,
        optimizer=str(optimizer.name),
        foreach=optimizer.foreach if takes_foreach(str(optimizer.name)) else None,
        state_dtype=optimizer.state_dtype,
        momentum=optimizer.momentum,
        in_backward=optimizer.in_backward,
        grads=precision.grads if own_gradients else None,
        master=None if ranks.strategy in ZERO else precision.master,
        clips=bool(loop.clip_grad_norm) and not optimizer.in_backward,
        scales=loop.grad_scaler,
        trainer=loop.trainer,
        projects_head=run.library.trainer.projects_head,
        holds_outputs=loop.hold_outputs == "step"
        or run.library.loss.holds_previous_outputs
        or leads_stream(run.method.kind)  # peft's model references the stream until its next pass
        or run.code == "torchtitan"  # its trainer keeps references to a step's batches until the step ends
        or (run.degrees.sequence_parallel and run.degrees.style == "megatron"),
        on_host=run.parallelism.offload.optimizer and not ranks.offloads,
        ranks=ranks,
        pipe=run.pipe,
        buffers=run.is_megatron_model,
        workspace=megatron.engine_workspace_bytes(run.model, run.capability) if run.is_megatron_model else 0,
    )
    run.notes += [*expert_notes(run.graph, run.capability), *norm_notes(run.graph), *wrapping_notes(run.graph, ranks)]
    if run.graph.input_requires_grad and run.model.only_sequence is not None:
        run.notes.append("reentrant checkpoints only train layers after model.enable_input_require_grads(): counted so")


def _check_trained(run: OpenTraining) -> None:
    """Refuse weights that cannot be trained so, and settle what the sharding decides by the size of the GPU."""
    finds = run.parallelism.find_unused_parameters
    if finds is None:  # reentrant checkpointing fails with it
        finds = run.library.sharding.finds_unused and not run.kernels.reentrant
    refuse(trained_weights(run.structure, finds))
    if run.card is not None and run.card.usable is not None:
        run.structure = sharding_of(run.structure).on_gpu(run.card.usable)
    if run.structure.ranks.records_streams:
        run.notes.append("DDP: torch before 2.8 may keep segments as large as the weights, which it sent at the start")


def _check_optimizer(run: OpenTraining) -> None:
    """Note what the Trainer adds to the optimizer, and refuse to accumulate gradients that are gone."""
    optimizer, name = run.optimizer, str(run.optimizer.name)
    trains_embeddings = run.method.kind == "full" or run.method.modules_to_save
    if spares_embeddings(name) and not run.loop.trainer and trains_embeddings:
        run.notes.append(
            f"under transformers' Trainer {name} keeps the states of embeddings in fp32: set loop.trainer (--trainer) "
            "to count that"
        )
    if run.batch_facts.accumulates and optimizer.in_backward:
        raise refused("optimizer.in_backward", "needs batch.accumulation 1")
    differs = run.loop.trainer and spares_embeddings(name) and any(several for _, several in trained_tables(run.graph))
    if optimizer.in_backward and differs:  # see `Sharding.trained`: layers have different states
        raise not_yet_with("optimizer.in_backward", f"{name} and embeddings in every layer", "false")
    if run.batch_facts.accumulates and name.endswith("_layerwise"):
        raise refused("batch.accumulation", f"{name} steps in backward, so transformers' Trainer only accepts 1")


STEPS: tuple[Callable[[OpenTraining], None], ...] = (
    _read_checkpoint,
    _look_up_library,
    _choose_trainer,
    divide_ranks,
    _fill_from_profile,
    _refuse_settings,
    steps.divide_matrices,
    _refuse_several_gpus,
    _check_model,
    steps.write_experts,
    _refuse_adapted_parameters,
    note_sharding,
    steps.note_card,
    _complete_parts,
    set_sharded_dtypes,
    steps.note_weights,
    _choose_recipe,
    _shard,
    steps.choose_attention,
    steps.wire,
    _wire_training,
    _build_graph,
    _cut_out_rank,
    _build_structure,
    _check_trained,
    _check_optimizer,
)
