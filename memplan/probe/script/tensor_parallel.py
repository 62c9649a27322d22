"""Divide a model among ranks as transformers does, on a fake process group: this process is one rank."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch

from memplan.core.errors import ProbeError
from memplan.probe.libraries import library
from memplan.probe.script import expert_parallel
from memplan.spec.run import RunSpec


def middle_rank(degree: int) -> int:
    """Return the context-parallel rank that needs most: see `memplan.catalogue.parallelism.context_parallel`."""
    return degree // 2 if degree > 2 else 0


def mesh_of(degree: int, rank: int = 0) -> Any:
    """Return a mesh of `degree` ranks, of which only this process exists."""
    dist = library("torch.distributed")
    if not dist.is_initialized() or (dist.get_rank(), dist.get_world_size()) != (rank, degree):
        if dist.is_initialized():
            dist.destroy_process_group()
        store = library("torch.testing._internal.distributed.fake_pg").FakeStore()
        dist.init_process_group("fake", rank=rank, world_size=degree, store=store)
    with library("torch.utils._python_dispatch")._disable_current_modes():  # it looks up its rank in a tensor with data
        return library("torch.distributed.device_mesh").init_device_mesh("cuda", (degree,))


def divide(model: Any, run: RunSpec) -> None:
    """Replace the weights of a model on the meta device by the rank's shards and add collectives, by the model's plan.

    Source: transformers 5.24 distributed/mixin.py maybe_distribute_model.
    """
    degree, ep = run.parallelism.tp, run.parallelism.ep
    if not model.tp_plan:
        raise ProbeError(f"parallelism.tp: transformers has no plan for {type(model).__name__}", "parallelism.tp")
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is table.weight:  # they are tied again once both are divided
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight), head.weight.requires_grad)
    model._device_mesh, model._tp_size = mesh_of(degree), degree
    config: Any = library("transformers.distributed").DistributedConfig(tp_size=degree, ep_size=ep)
    model.config.distributed_config = config  # peft reads it
    plan, _, _ = model._resolve_parallel_plans(config)
    library("transformers.distributed.tensor_parallel").apply_tensor_parallelism(model, model._device_mesh, plan)
    if ep > 1:
        expert_parallel.divide(model, run, model._device_mesh, model._device_mesh, config)


def is_part(tensor: Any) -> bool:
    """Return whether the tensor is a DTensor: a rank's shard, or replicated on a mesh."""
    return isinstance(tensor, library("torch.distributed.tensor").DTensor)


def local_of(tensor: Any) -> Any:
    """Return this rank's shard of a DTensor; other tensors unchanged."""
    return tensor._local_tensor if is_part(tensor) else tensor


def part_of(tensor: Any, local: torch.Tensor) -> Any:
    """Return a DTensor like `tensor` whose shard is `local`."""
    return library("torch.distributed.tensor").DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def by_mesh(parameters: Iterable[Any]) -> list[list[Any]]:
    """Group the parameters by device mesh, with plain ones in a group of their own: no call takes both.

    Source: transformers 5.24 trainer.py create_optimizer, _mixed_mesh_grad_norm.
    """
    groups: dict[Any, list[Any]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.device_mesh if is_part(parameter) else None, []).append(parameter)
    return list(groups.values())


def group_by_mesh(optimizer: Any) -> None:
    """Split the optimizer's parameter group by device mesh."""
    (group,) = optimizer.param_groups
    optimizer.param_groups = [{**group, "params": params} for params in by_mesh(group["params"])]


def clip(parameters: Iterable[Any], norm: float) -> None:
    """Clip gradients, with a separate norm for each device mesh."""
    groups = by_mesh(p for p in parameters if p.grad is not None)
    clipping: Any = library("torch.nn.utils")
    linalg: Any = library("torch.linalg")
    norms = [clipping.get_total_norm([p.grad for p in group], foreach=True) for group in groups]
    total = linalg.vector_norm(torch.stack([n.full_tensor() if is_part(n) else n for n in norms]))
    for group in groups:
        clipping.clip_grads_with_norm_(group, norm, total, foreach=True)


@contextmanager
def ring_attention_backend(degree: int) -> Generator[None]:
    """Run torch's ring attention inside the context: each rank has a part of the tokens and passes on keys and values.

    Source: torch 2.13 distributed/tensor/experimental/_context_parallel/_attention.py context_parallel.
    """
    cp: Any = library("torch.distributed.tensor.experimental._context_parallel._attention")
    cp._dispatch_mode, cp._cp_options.enable_load_balance = cp._DispatchMode.MONKEY_PATCH, True
    cp._enable_context_parallel_dispatcher_impl(seq_dim=2, mesh=mesh_of(degree, middle_rank(degree)))
    try:
        yield
    finally:
        cp._disable_context_parallel_dispatcher_impl()


def part_of_tokens(run: RunSpec) -> RunSpec:
    """Return the run with sequences as long as one context-parallel rank's part."""
    batch = run.batch.model_copy(update={"sequence": run.batch.sequence // run.parallelism.cp})
    return run.model_copy(update={"batch": batch})


@contextmanager
def ulysses_attention(degree: int) -> Generator[None]:
    """Run DeepSpeed's Ulysses attention inside the context: ranks divide tokens, but heads within attention.

    Source: DeepSpeed 0.19.8 runtime/sequence_parallel/ulysses_sp.py UlyssesSPAttentionHF.
    """
    attention: Any = library("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    sdpa = attention["sdpa"]

    def forward(module: Any, query: Any, key: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        parts: list[Any] = [t.permute(2, 0, 1, 3) for t in (query, key, value)]
        received = [_gather_tokens(t, degree) for t in parts]
        for i in range(len(received)):
            received[i] = received[i].permute(1, 2, 0, 3).contiguous()
        context, _ = sdpa(module, *received, mask, *args, **kwargs)
        context = context.transpose(0, 1)
        context = context.reshape(*context.shape[:2], -1)
        out = _scatter_tokens(context, degree).transpose(0, 1)
        return out.reshape(*out.shape[:2], -1), None

    attention["sdpa"] = forward
    try:
        yield
    finally:
        attention["sdpa"] = sdpa


def _gather_tokens(t: Any, n: int) -> Any:
    """Exchange this rank's tokens with all heads for all tokens with some: [s, b, a, d] to [s n, b, a / n, d]."""
    s, b, heads, d = t.shape
    if heads < n:
        t = t.repeat_interleave(n // heads, dim=2)
    t = t.reshape(s, b, n, -1, d)
    out: Any = _all_to_all(t.permute(2, 0, 1, 3, 4).contiguous())
    return out.reshape(n * s, *out.shape[2:]).contiguous()


def _scatter_tokens(t: Any, n: int) -> Any:
    """Exchange all tokens with some heads for this rank's with all: [s n, b, h / n] to [s, b, h]."""
    t = t.reshape(n, t.shape[0] // n, *t.shape[1:]).contiguous()
    out: Any = _all_to_all(t)
    out = out.permute(1, 2, 0, 3)
    return out.reshape(*out.shape[:2], -1).contiguous()


def _all_to_all(t: Any) -> Any:
    function: Any = _AllToAll
    return function.apply(t)


class _AllToAll(torch.autograd.Function):
    """An all-to-all exchange: a new tensor of the same size, in forward and in backward."""

    @staticmethod
    def forward(ctx: Any, t: Any) -> Any:
        return torch.empty_like(t)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.empty_like(gradient.contiguous())
