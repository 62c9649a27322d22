"""Trains a small Llama as one rank of tensor parallelism under FSDP2, on the CPU, and reports peaks.

transformers' plan shards the matrices, and FSDP2 each rank's shards, on a fake process group. Run as a separate
process: the degrees of a run per line on stdin, its peaks per line on stdout.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from tests.sharded_child import Bytes, peaks

warnings.simplefilter("ignore")


class LocalBytes(Bytes):
    """Counts only the inner tensors of tensor subclasses."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ in ("DTensor", "AsyncCollectiveTensor") for kind in types):
            return NotImplemented
        return super().__torch_dispatch__(function, types, args, kwargs)


def rank(asked: dict[str, Any]) -> dict[str, int]:
    dp, tp = asked["dp"], asked["tp"]
    dist.init_process_group("fake", rank=0, world_size=dp * tp, store=FakeStore())
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("fsdp", "tp"))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**asked["config"]), dtype=torch.float32)
    model.train()
    apply_tensor_parallelism(model, mesh["tp"], model._expand_parallel_plan(model.tp_plan))
    if asked["checkpoint"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["fsdp"], reshard_after_forward=True)
    fully_shard(model.model.embed_tokens, mesh=mesh["fsdp"], reshard_after_forward=True)
    fully_shard([model.model.norm, model.lm_head], mesh=mesh["fsdp"], reshard_after_forward=False)
    fully_shard(model, mesh=mesh["fsdp"])
    found = peaks(model, asked["tokens"], LocalBytes())
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(rank(json.loads(line))) + "\n")
        sys.stdout.flush()
