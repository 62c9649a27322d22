"""Divide experts among ranks as transformers does, on a fake process group: this process is one rank."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from memplan.probe.libraries import library
from memplan.spec.run import RunSpec


def divide(model: Any, run: RunSpec, tp_mesh: Any, ep_mesh: Any, config: Any) -> None:
    """Reduce a model on the meta device to the rank's experts, and have it send tokens to the other ranks.

    Source: transformers 5.24 distributed/mixin.py maybe_distribute_model.
    """
    _, plan, _ = model._resolve_parallel_plans(config)
    library("transformers.distributed.expert_parallel").apply_expert_parallelism(model, ep_mesh, tp_mesh, plan)
    for module in model.modules():
        if hasattr(module, "_is_expert_parallel"):
            _spread(module, run.parallelism.ep)


def divide_experts_for_fsdp2(model: Any, run: RunSpec) -> None:
    """Divide experts among data-parallel ranks; FSDP2 shards each expert among the ranks that have it.

    Source: transformers 5.24 distributed/utils.py initialize_distributed_mesh.
    """
    p = run.parallelism
    config: Any = library("transformers.distributed").DistributedConfig(tp_size=1, fsdp_size=p.dp, ep_size=p.ep)
    meshes: Any = library("torch.distributed.device_mesh")
    with library("torch.utils._python_dispatch")._disable_current_modes():
        shapes = (
            ((1, 1, p.dp, 1), ("pp", "dp_replicate", "fsdp", "tp")),
            ((1, 1, config.efsdp_size, p.ep), ("pp", "dp_replicate", "efsdp", "ep")),
        )
        created = [meshes.init_device_mesh("cuda", shape, mesh_dim_names=names) for shape, names in shapes]
    manager = library("transformers.distributed.utils").TransformersDeviceMesh(*created)
    model.config.distributed_config, model._mesh_manager = config, manager
    divide(model, run, manager.get_mesh("tp"), manager.get_mesh("ep"), config)


def shard(model: Any) -> None:
    """Apply FSDP2 as transformers does to an expert-parallel model."""
    with library("torch.utils._python_dispatch")._disable_current_modes():
        _, experts, units = model._resolve_parallel_plans(model.config.distributed_config)
    sharding: Any = library("transformers.distributed.fsdp")
    sharding.apply_fully_sharded_data_parallelism(model, model._mesh_manager, units, experts)


def _spread(experts: Any, ranks: int) -> None:
    """Send equal numbers of rows to all ranks, because the real numbers depend on the data."""
    forward = experts.forward

    def spread(*args: Any, **kwargs: Any) -> Any:
        with _Evenly(ranks):
            return forward(*args, **kwargs)

    experts.forward = spread


class _Evenly(TorchFunctionMode):
    """Replace the counts of rows sent to and received from each rank by equal shares of all rows."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self._ranks = ranks
        self._rows = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.argsort:
            self._rows = args[0].numel()
        output = func(*args, **(kwargs or {}))
        if func is torch.stack and output.shape == (2, self._ranks):
            output.tolist = self._counts
        return output

    def _counts(self) -> list[list[int]]:
        each, over = divmod(self._rows, self._ranks)
        sent = [each + (rank < over) for rank in range(self._ranks)]
        return [sent, [sent[0]] * self._ranks]
