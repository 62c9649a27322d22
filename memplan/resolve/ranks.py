"""How ranks divide a training run: what FSDP, DeepSpeed, DDP and Megatron shard, and the dtypes they keep."""

from __future__ import annotations

from memplan.catalogue.families import megatron
from memplan.catalogue.methods.methods import ADAPTERS
from memplan.catalogue.parallelism.sharding import MEGATRON, ZeroSettings
from memplan.program.sharding.ranks import SINGLE_RANK, Ranks
from memplan.resolve.open_run import OpenRun
from memplan.resolve.parallelism import FSDP, ZERO, degrees_of
from memplan.spec.parallelism import Parallelism, Zero
from memplan.spec.training import Method

_ZERO_NOTE = (
    "DeepSpeed: fp32 masters, and DeepSpeed's own defaults (reduce_bucket_size 5e8, sub_group_size 1e9, overlap_comm "
    "by stage, stage3_prefetch_bucket_size 5e7, stage3_max_reuse_distance 1e9), not transformers' auto"
)
_MEGATRON_NOTE = (
    "Megatron: main gradients in fp32 (--accumulate-allreduce-grads-in-fp32, on with --bf16), fp32 masters, no "
    "--overlap-grad-reduce"
)
NOT_ITS_CODE = "megatron-core: the layers counted are transformers', not Megatron's"
_HALF_GRADIENTS = (
    "Megatron-core keeps gradients and master weights in fp32 with --bf16: use precision {weights: bf16, grads: fp32, "
    "master: fp32}, or strategy megatron_dist_opt, to count them so"
)


def note_sharding(run: OpenRun) -> None:
    """Note what the libraries that shard the run do not do."""
    if run.parallelism.static_graph:
        run.notes.append("parallelism.static_graph changes no memory")


def divide_ranks(run: OpenRun) -> None:
    """Fill in the degrees of a rank, and what sharding changes of quantised weights."""
    run.degrees = degrees_of(run.parallelism, run.library.sharding)
    run.storages = _allowed_storages(run)
    if run.is_sharded or run.under_deepspeed:
        run.method = without_preparation(run.method)


def set_sharded_dtypes(run: OpenRun) -> None:
    """Set the dtypes that DeepSpeed and Megatron keep, whatever the run says, and note them.

    Both keep fp32 masters. The model and its adapters have one dtype; Megatron's main gradients are in fp32.

    Source: DeepSpeed 0.19.8 runtime/engine.py _configure_distributed_model; Megatron-LM megatron/training/arguments.py.
    """
    weights = run.precision.weights
    master = {"master": None if weights == "fp32" else "fp32"}
    if (run.under_deepspeed or run.is_megatron_model) and run.method.kind in ADAPTERS:
        run.method = run.method.model_copy(update={"adapter_dtype": weights})
    if run.under_deepspeed:
        run.precision = run.precision.model_copy(update=master)
        if run.parallelism.zero == Zero():
            is_zero = run.parallelism.strategy != "zero0"
            run.notes.append(_ZERO_NOTE if is_zero else "DeepSpeed without ZeRO: fp32 masters on every rank")
    if run.copies > 1 and run.parallelism.strategy == MEGATRON:
        run.precision = run.precision.model_copy(update={"grads": "fp32", **master})
        run.notes.append(_MEGATRON_NOTE)
    elif run.is_megatron_model and weights != "fp32" and run.precision.grads != "fp32":
        run.notes.append(_HALF_GRADIENTS)


def without_preparation(method: Method) -> Method:
    """Return the method without k-bit preparation, unless the run asks for it: sharded 4-bit weights are not prepared.

    Source: trl 0.25 models/utils.py, trainer/sft_trainer.py is_sharded_qlora.
    """
    q = method.quantization
    if q is None or q.kbit_preparation is not None:
        return method
    return method.model_copy(update={"quantization": q.model_copy(update={"kbit_preparation": False})})


def _allowed_storages(run: OpenRun) -> tuple[str, ...]:
    """Return the dtypes that 4-bit weights may be stored in.

    FSDP cannot shard integers, and DeepSpeed would cast any other float.
    """
    if run.is_sharded:
        return ("bf16", "fp16", "fp32")
    return ("uint8", run.precision.weights) if run.under_deepspeed else ("uint8",)


def _deepspeed_knobs(p: Parallelism, hidden: int, copies: int) -> ZeroSettings:
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
        in_place=copies == 1 and not p.offload.parameters,
        pins=(optimizer.pin_memory, weights.pin_memory),
        swaps=(optimizer.buffer_count, weights.buffer_count, weights.buffer_size, weights.max_in_cpu),
    )


def shard(run: OpenRun) -> Ranks:
    """Return how ranks divide the run, after setting the recipe's dtypes to what they compute in."""
    if not run.is_megatron_model:
        run.degrees = run.degrees._replace(etp=1)
    elif not megatron.has_experts(run.model):
        run.degrees = run.degrees._replace(ep=1, etp=1)
    ranks, degrees = _ranks(run), run.degrees
    if ranks.world > 1 and run.is_megatron_model and degrees.ep * degrees.etp > 1:
        ranks = ranks._replace(experts=ranks.world * degrees.tp // (degrees.ep * degrees.etp))
    if ranks.world > 1 and not run.is_megatron_model and degrees.ep > 1:
        ranks = ranks._replace(expert_replicas=ranks.world * degrees.tp // degrees.ep)
    if not run.is_sharded:
        return ranks._replace(regathers=False)
    library = run.library.sharding
    return ranks._replace(
        loads_whole=ranks.loads_whole and library.quantises_before_sharding,
        moves_whole=library.moves_before_sharding and run.method.quantization is None and not ranks.efficient,
        ends_apart=library.ends_apart,
        root_has_ends="" if ranks.row.flat else library.root_has_ends,
        regathers=library.regathers_weights and run.kernels.checkpointing != "none",
    )


def _ranks(run: OpenRun) -> Ranks:
    """Return how ranks divide the run, and set the recipe to what they compute.

    Under autocast FSDP's mixed precision is on: weights are gathered in the compute dtype, and what trains is kept in
    fp32. With 4-bit weights transformers' Trainer always turns it on, in the dtype of their storage.
    Source: accelerate 1.15 accelerator.py prepare_model, utils/fsdp_utils.py fsdp2_prepare_model; transformers 5.24
    distributed/fsdp.py update_fsdp_plugin_peft.
    """
    p, q, copies, trainer = run.parallelism, run.method.quantization, run.copies, run.loop.trainer
    accumulates = run.batch_facts.accumulates and not run.loop.sync_each_batch
    waits = p.strategy in run.library.sharding.delays_reduction
    if not run.is_wrapped:
        return SINGLE_RANK
    if p.strategy in ZERO:
        knobs = _deepspeed_knobs(p, run.model.axes()["h"], copies)
        if q is None:
            return Ranks(p.strategy, copies, knobs=knobs)
        # transformers creates no quantised model under deepspeed.zero.Init: modeling_utils.py get_init_context
        return Ranks(p.strategy, copies, knobs=knobs._replace(divides_loading=False), storage=q.storage)
    if p.strategy not in FSDP:
        waits = trainer and accumulates and p.bucket_view  # gradients stay outside of the buckets until reduced
        records = p.strategy == "ddp" and not run.is_megatron_model and run.library.sharding.records_streams
        return Ranks(p.strategy, copies, views=p.bucket_view, delayed=waits, records_streams=records)
    is_nf4 = run.method.kind == "qlora" and q is not None and q.format == "nf4"
    stages = is_nf4 and p.strategy == "fsdp2" and run.library.sharding.stages_nf4
    ranks = Ranks(
        p.strategy,
        copies if p.shard_group in (None, 1) else p.shard_group,
        delayed=(trainer or run.library.sharding.owns_loop) and accumulates and waits,
        replicated=p.shard_group not in (None, 1, copies),
        keeps=p.reshard_after_forward is False or p.pp > 1,
        ahead=p.forward_prefetch,
        prefetches_at=p.backward_prefetch,
        offloads=p.offload.parameters,
        efficient=p.cpu_ram_efficient_loading and (q is None or stages),
        is_unsharded=p.shard_group == 1 or (copies == 1 and p.strategy == "fsdp"),
        reduces=run.library.sharding.fsdp_reduces if p.strategy == "fsdp2" else "",
    )
    if q is not None:
        ranks = ranks._replace(storage="uint8" if ranks.efficient else q.storage)
    recipe = run.recipe
    if not recipe.autocast:
        if q is not None and trainer:
            run.recipe = recipe._replace(adapter_dtype=q.storage)
            return ranks._replace(trained=recipe.adapter_dtype)
        return ranks
    casts = p.strategy == "fsdp2" and run.library.sharding.fsdp2_casts_frozen
    frozen_dtype = "fp32" if casts else recipe.weights if recipe.weights != recipe.compute else ""
    autocast = not (p.strategy == "fsdp2" and run.library.sharding.fsdp_casts)
    kept = "fp32" if ranks.row.flat and recipe.compute != "fp32" else ""
    run.recipe = recipe._replace(
        autocast=autocast,
        weights=recipe.compute,
        adapter_dtype=recipe.compute,
        sharded_dtype=kept,
        casts_all=recipe.weights == "fp32" or not ranks.row.flat,
    )
    return ranks._replace(trained="fp32", frozen=frozen_dtype, casts_last=casts)
