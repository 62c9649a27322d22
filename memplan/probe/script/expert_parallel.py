"""Experts divided among ranks as transformers divides them, on a process group that sends nothing: one rank's part."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from memplan.probe.libraries import library
from memplan.spec.run import RunSpec


def divide(model: Any, run: RunSpec, tp_mesh: Any, ep_mesh: Any, config: Any) -> None:
    """Give a model without memory the rank's experts, and have it send the others' tokens there.

    Source: transformers 5.24 distributed/mixin.py maybe_distribute_model.
    """
    _, plan, _ = model._resolve_parallel_plans(config)
    library("transformers.distributed.expert_parallel").apply_expert_parallelism(model, ep_mesh, tp_mesh, plan)
    for module in model.modules():
        if hasattr(module, "_is_expert_parallel"):
            _spread(module, run.parallelism.ep)


def divide_alone(model: Any, run: RunSpec) -> None:
    """The same where ranks divide the batch, and their weights by FSDP2: those of experts among the ranks that have the
    same.

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
        made = [meshes.init_device_mesh("cuda", shape, mesh_dim_names=names) for shape, names in shapes]
    manager = library("transformers.distributed.utils").TransformersDeviceMesh(*made)
    model.config.distributed_config, model._mesh_manager = config, manager
    divide(model, run, manager.get_mesh("tp"), manager.get_mesh("ep"), config)


def shard(model: Any) -> None:
    """FSDP2 around the model, as transformers has it for a model whose experts ranks divide."""
    with library("torch.utils._python_dispatch")._disable_current_modes():
        _, experts, units = model._resolve_parallel_plans(model.config.distributed_config)
    sharding: Any = library("transformers.distributed.fsdp")
    sharding.apply_fully_sharded_data_parallelism(model, model._mesh_manager, units, experts)


def _spread(experts: Any, ranks: int) -> None:
    """How many rows go to which rank is in the data: as many to each."""
    forward = experts.forward

    def spread(*args: Any, **kwargs: Any) -> Any:
        with _Evenly(ranks):
            return forward(*args, **kwargs)

    experts.forward = spread


class _Evenly(TorchFunctionMode):
    """Counts of rows by rank, that are sent and that are received, are read as equal ones of all that are chosen."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self._ranks = ranks
        self._rows = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.argsort:
            self._rows = args[0].numel()
        made = func(*args, **(kwargs or {}))
        if func is torch.stack and made.shape == (2, self._ranks):
            made.tolist = self._counts
        return made

    def _counts(self) -> list[list[int]]:
        each, over = divmod(self._rows, self._ranks)
        sent = [each + (rank < over) for rank in range(self._ranks)]
        return [sent, [sent[0]] * self._ranks]
