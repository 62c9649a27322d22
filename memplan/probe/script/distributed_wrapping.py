"""Wrap a run's model for several GPUs, as accelerate 1.15 does for transformers' Trainer.

Only the first rank runs: torch's process group `fake` stands in for the others, and sends nothing.

Source: accelerate 1.15 accelerator.py prepare_model, utils/fsdp_utils.py fsdp2_prepare_model; transformers 5.24
trainer.py, distributed/fsdp.py update_fsdp_plugin_peft.
"""

from __future__ import annotations

import functools
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]

from memplan.catalogue.methods.methods import ADAPTERS
from memplan.catalogue.profiles.profiles import library_behaviour
from memplan.probe.fake import fake_process_group as group
from memplan.probe.libraries import library
from memplan.probe.script import expert_parallel, tensor_parallel
from memplan.probe.script.model import DTYPES, base_of, lower_of
from memplan.resolve.parallelism import divides_weights, is_wrapped
from memplan.spec.run import RunSpec


def load_device(run: RunSpec, device: torch.device) -> torch.device:
    """Return where the model is built: on the host if FSDP shards it, unless it is quantised, which needs the GPU."""
    divides = divides_weights(run.parallelism)
    return torch.device("cpu") if divides and run.method.quantization is None else device


@contextmanager
def ranks(run: RunSpec) -> Generator[None]:
    """Make this process, inside the context, the first of the run's ranks."""
    distributed: Any = library("torch.distributed")
    if not is_wrapped(run.parallelism):
        yield
        return
    fake = library("torch.testing._internal.distributed.fake_pg")
    group.apply()
    with _disable_current_modes():
        if distributed.is_initialized():
            distributed.destroy_process_group()
        distributed.init_process_group(
            "fake",
            rank=tensor_parallel.middle_rank(run.parallelism.cp),
            world_size=run.parallelism.world,
            store=fake.FakeStore(),
        )
    try:
        yield
    finally:
        with _disable_current_modes():
            distributed.destroy_process_group()


def wrap(model: Any, run: RunSpec, device: torch.device) -> Any:
    """Return the wrapped model; the model itself on one GPU."""
    if not is_wrapped(run.parallelism):
        return model
    if run.precision.autocast and run.loop.trainer:
        _autocast_forward(model, lower_of(run.precision), device)
    match run.parallelism.strategy:
        case "ddp":
            return _wrap_ddp(model, run, device)
        case "fsdp":
            return _wrap_fsdp1(model, run, device)
        case "fsdp2":
            return _wrap_fsdp2(model, run, device)
        case other:
            raise AssertionError(other)


def _autocast_forward(model: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Run the model's forward under autocast, and cast its outputs to fp32."""
    to_fp32 = library("accelerate.utils.operations").convert_outputs_to_fp32
    autocast: Any = torch.autocast(device.type, dtype=dtype)
    model.forward = MethodType(to_fp32(autocast(model.forward.__func__)), model)


def _wrap_ddp(model: Any, run: RunSpec, device: torch.device) -> Any:
    replicated = library("torch.nn.parallel").DistributedDataParallel
    p = run.parallelism
    wrapped = replicated(
        model,
        device_ids=[0],
        output_device=0,
        gradient_as_bucket_view=p.bucket_view,
        static_graph=p.static_graph,
    )
    group.reduce_locally(wrapped)
    return wrapped


def _blocks(model: Any) -> set[type]:
    """Return the classes of blocks to wrap as FSDP units, as the model's class names them."""
    find = library("accelerate.utils.dataclasses").get_module_class_from_name
    names = getattr(model, "_no_split_modules", None) or ()
    classes = (find(model, name) for name in names)
    return {kind for kind in classes if kind is not None}


def _wrap_fsdp1(model: Any, run: RunSpec, device: torch.device) -> Any:
    fsdp: Any = library("torch.distributed.fsdp")
    policy = library("peft.utils.other").fsdp_auto_wrap_policy(model) if run.method.kind in ADAPTERS else None
    wrapped = fsdp.FullyShardedDataParallel(
        model,
        device_mesh=_groups(run, device) if (run.parallelism.shard_group or 1) > 1 else None,
        device_id=device,
        **{**_fsdp1_options(model, run), **({"auto_wrap_policy": policy} if policy is not None else {})},
    )
    if run.precision.autocast:
        for unit in fsdp.FullyShardedDataParallel.fsdp_modules(wrapped):
            flat = unit._flat_param if unit._has_params else None
            if flat is not None and flat.dtype != torch.float32 and flat.requires_grad:
                flat.data = flat.data.to(torch.float32)
                unit._handle._orig_param_dtype = torch.float32
    return wrapped


def _fsdp1_options(model: Any, run: RunSpec) -> dict[str, Any]:
    """Return FSDP1's options, with a unit for each of the model's blocks."""
    fsdp: Any = library("torch.distributed.fsdp")
    p, prefetch, lower = run.parallelism, fsdp.BackwardPrefetch, _mixed_precision_dtype(run)
    strategy = _STRATEGIES[p.shard_group is not None, p.reshard_after_forward is not False]
    if p.shard_group == 1:
        strategy = "NO_SHARD"
    blocks = library("torch.distributed.fsdp.wrap").transformer_auto_wrap_policy
    mixed = fsdp.MixedPrecision(param_dtype=lower, reduce_dtype=lower, buffer_dtype=lower) if lower else None
    return {
        "sharding_strategy": getattr(fsdp.ShardingStrategy, strategy),
        "auto_wrap_policy": functools.partial(blocks, transformer_layer_cls=_blocks(model)),
        "mixed_precision": mixed,
        "cpu_offload": fsdp.CPUOffload(offload_params=True) if p.offload.parameters else None,
        "forward_prefetch": p.forward_prefetch,
        "backward_prefetch": {"pre": prefetch.BACKWARD_PRE, "post": prefetch.BACKWARD_POST}.get(p.backward_prefetch),
        "use_orig_params": True,
        "sync_module_states": _loads_on_one_rank(run),
        "limit_all_gathers": True,
    }


def prepare_reference(model: Any, run: RunSpec, device: torch.device) -> Any:
    """Return a trainer's copy of the model as TRL shards it under FSDP, without accelerate's autocast."""
    model.forward = getattr(model, "_original_forward", model.forward)
    plugin = SimpleNamespace(
        fsdp_version=1 if run.parallelism.strategy == "fsdp" else 2,
        ignored_modules=None,
        param_init_fn=None,
        reshard_after_forward=run.parallelism.reshard_after_forward is not False,
        set_auto_wrap_policy=nullcontext,
    )
    if plugin.fsdp_version == 1:
        options = _fsdp1_options(model, run)
        vars(plugin).update(options, mixed_precision_policy=options["mixed_precision"])
    else:
        vars(plugin).update(mixed_precision_policy=_fsdp2_policy(run), cpu_offload=_fsdp2_offload(run))
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        device=device,
        torch_device_mesh={(): _groups(run, device)},
        parallelism_config=SimpleNamespace(fsdp_dim_names=()),
    )
    return library("trl.models.utils").prepare_fsdp(model, accelerator)


# FSDP1's strategies, by whether groups of ranks are replicas, and whether weights are resharded after forward.
_STRATEGIES = {
    (False, True): "FULL_SHARD",
    (False, False): "SHARD_GRAD_OP",
    (True, True): "HYBRID_SHARD",
    (True, False): "_HYBRID_SHARD_ZERO2",
}


def _groups(run: RunSpec, device: torch.device) -> Any:
    """Return the ranks as a mesh: shards, or replicas by shards if groups of ranks are replicas."""
    world, group = run.parallelism.world, run.parallelism.shard_group
    shape = (world // group, group) if group else (world,)
    names = ("replicate", "shard")[-len(shape) :]
    with _disable_current_modes():
        return library("torch.distributed.device_mesh").init_device_mesh(device.type, shape, mesh_dim_names=names)


def _mixed_precision_dtype(run: RunSpec) -> torch.dtype | None:
    """Return the dtype in which FSDP's mixed precision gathers and reduces; None if it is off."""
    if run.precision.autocast:
        return lower_of(run.precision)
    q = run.method.quantization
    return DTYPES[q.storage] if q is not None and run.loop.trainer and q.storage in DTYPES else None


def _wrap_fsdp2(model: Any, run: RunSpec, device: torch.device) -> Any:
    if run.parallelism.ep > 1:
        expert_parallel.shard(model)
        return model
    fsdp: Any = library("torch.distributed.fsdp")
    mesh = _groups(run, device)
    sharding = library_behaviour(run.profile, "", False).sharding
    casts = run.precision.autocast and run.method.quantization is None
    if casts and not sharding.fsdp2_casts_frozen:
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                parameter.data = parameter.data.to(torch.float32)
    root = {"mesh": mesh, "mp_policy": _fsdp2_policy(run)}
    if run.parallelism.offload.parameters:
        root["offload_policy"] = _fsdp2_offload(run)
    unit = {**root, "reshard_after_forward": run.parallelism.reshard_after_forward is not False}
    shard = fsdp.fully_shard
    loaded: Any = model.state_dict() if _loads_on_one_rank(run) else {}
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in loaded} if loaded else {}
    if loaded:
        model = model.to(torch.device("meta"))
        base_of(model).tie_weights()
    blocks = tuple(_blocks(model))
    for module in _bottom_up(model):
        if isinstance(module, blocks) and not isinstance(module, fsdp.FSDPModule):
            shard(module, **unit)
    if not sharding.root_has_ends:
        _wrap_ends(model, unit)
    shard(model, **(unit if sharding.root_has_ends == "freed" else root))
    if loaded:
        _load_shards(model, run, device, loaded, buffers)
    return model.to(torch.float32) if casts and sharding.fsdp2_casts_frozen else model


def _wrap_ends(model: Any, unit: dict[str, Any]) -> None:
    """Make FSDP2 units of the embeddings, and of the last norm and the head, or one of all three if they are tied."""
    fsdp: Any = library("torch.distributed.fsdp")
    shard = fsdp.fully_shard
    table, head = _embeddings(model)
    tied = table is not None and head is not None and table.weight is head.weight
    sharing = _sharing_modules(model, table, head)
    if not tied and table is not None and not isinstance(table, fsdp.FSDPModule):
        shard([table, *sharing], **unit)
    norm = library("accelerate.utils.fsdp_utils")._find_final_norm(model)
    tail = (norm, table, *sharing, head) if tied else (norm, head)
    unwrapped = [module for module in tail if module is not None and not isinstance(module, fsdp.FSDPModule)]
    if unwrapped:
        shard(unwrapped, **{**unit, "reshard_after_forward": False})


def _fsdp2_policy(run: RunSpec) -> Any:
    lower, kind = _mixed_precision_dtype(run), library("torch.distributed.fsdp").MixedPrecisionPolicy
    return kind(param_dtype=lower, reduce_dtype=lower, output_dtype=lower) if lower else kind()


def _fsdp2_offload(run: RunSpec) -> Any:
    """Return FSDP2's policy for parts of weights; None keeps them on the GPU, as `prepare_fsdp` passes it on."""
    fsdp: Any = library("torch.distributed.fsdp")
    return fsdp.CPUOffloadPolicy(pin_memory=True) if run.parallelism.offload.parameters else None


def _loads_on_one_rank(run: RunSpec) -> bool:
    """Return whether one process loads the model and sends the others their shards."""
    return run.parallelism.cpu_ram_efficient_loading and run.method.quantization is None


def _load_shards(model: Any, run: RunSpec, device: torch.device, loaded: Any, buffers: dict[str, Any]) -> None:
    """Load a sharded model on the meta device as accelerate does: weights arrive in full, one after the other."""
    first = SimpleNamespace(is_main_process=True)
    load = library("accelerate.utils.fsdp_utils").fsdp2_load_full_state_dict
    load(first, model, loaded, cpu_offload=run.parallelism.offload.parameters)
    for name, buffer in buffers.items():
        parent, _, own = name.rpartition(".")
        model.get_submodule(parent).register_buffer(own, buffer.to(device), persistent=False)
    base_of(model).tie_weights()


def _embeddings(model: Any) -> tuple[Any, Any]:
    """Return the model's input embeddings and its head, each None if missing."""
    missing: Any = lambda: None  # noqa: E731
    return getattr(model, "get_input_embeddings", missing)(), getattr(model, "get_output_embeddings", missing)()


def _sharing_modules(model: Any, table: Any, head: Any) -> list[Any]:
    """Return further modules that share the embedding table, as T5's encoder and decoder do.

    accelerate 1.15 leaves them to the root, which torch 2.13 refuses: modules that share a parameter must be in one
    group.
    """
    weight = getattr(table, "weight", None)
    return [m for m in model.modules() if m not in (table, head) and getattr(m, "weight", None) is weight is not None]


def _bottom_up(module: Any) -> Generator[Any]:
    """Yield every module below this one, children first."""
    for child in module.children():
        yield from _bottom_up(child)
        yield child


def unreduced_gradients(model: Any, run: RunSpec) -> AbstractContextManager[None]:
    """Skip the reduction of gradients inside the context: only the last micro-batch reduces them."""
    if not is_wrapped(run.parallelism):
        return nullcontext()
    if run.parallelism.strategy == "fsdp2":
        return _without_reduction(model)
    return model.no_sync()


@contextmanager
def _without_reduction(model: Any) -> Generator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def clip(model: Any, run: RunSpec, parameters: list[Any]) -> None:
    """Clip the gradients' norm; with FSDP1 by its own method."""
    max_norm = float(run.loop.clip_grad_norm or 0)
    if run.parallelism.tp > 1 or run.parallelism.ep > 1:
        tensor_parallel.clip(parameters, max_norm)
    elif is_wrapped(run.parallelism) and run.parallelism.strategy == "fsdp":
        model.clip_grad_norm_(max_norm)
    else:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)
