"""Trains small Llamas as one rank of several, on the CPU, and reports peaks.

FSDP runs with a fake process group; DDP, whose reducer waits for an answer, in two processes. These are forks, which
need not import the libraries again, so DDP's runs come first: autograd refuses a fork of a process that ran it.

FSDP2 is wrapped as accelerate 1.15 wraps it (blocks; embeddings; norm and head together), FSDP1 as the Trainer of
transformers does. Tensor-parallel ranks have their shards of the matrices, by transformers' plan, before FSDP2 wraps
them. Run as a separate process: a run per line on stdin, its peaks per line on stdout.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import warnings
import weakref
from pathlib import Path
from typing import Any

sys.modules["bitsandbytes"] = None  # pyright: ignore[reportArgumentType] (peft would load it, and it torch's compiler)
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import BackwardPrefetch, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed.tensor_parallel import apply_tensor_parallelism
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

warnings.simplefilter("ignore")


class Bytes(TorchDispatchMode):
    """Counts the bytes of all live storages, each rounded up to 512, after every operation, while it `counts`.

    All storages are checked, because FSDP resizes them to zero and back without an operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, weakref.ref[Any]] = {}
        self.peak, self.counts = 0, False

    def watch(self, tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor):
            storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
            self.alive[storage._cdata] = weakref.ref(storage)

    def look(self) -> None:
        found = [(key, ref, storage) for key, ref in self.alive.items() if (storage := ref()) is not None]
        self.alive = {key: ref for key, ref, _ in found}
        self.peak = max(self.peak, sum(-(-storage.nbytes() // 512) * 512 for *_, storage in found))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            self.watch(tensor)
        if self.counts:
            self.look()
        return out


class LocalBytes(Bytes):
    """Counts only the inner tensors of tensor subclasses."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ in ("DTensor", "AsyncCollectiveTensor") for kind in types):
            return NotImplemented
        return super().__torch_dispatch__(function, types, args, kwargs)


def model(config: dict[str, Any], lora: bool, checkpoint: bool) -> Any:
    found = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    found.train()
    if checkpoint:
        found.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        found = get_peft_model(found, LoraConfig(r=4, target_modules=targets))
        if checkpoint:
            found.enable_input_require_grads()
    return found


def sharded(found: Any, strategy: str, lora: bool, mesh: Any) -> Any:
    if strategy == "fsdp2":
        base = found.base_model.model if lora else found
        for layer in base.model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        tail = [base.model.norm, base.lm_head]
        if base.config.tie_word_embeddings:
            tail.insert(1, base.model.embed_tokens)
        else:
            fully_shard(base.model.embed_tokens, mesh=mesh, reshard_after_forward=True)
        fully_shard(tail, mesh=mesh, reshard_after_forward=False)
        fully_shard(found, mesh=mesh)
        return found
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "LlamaDecoderLayer"
    blocks = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    return FullyShardedDataParallel(
        found,
        auto_wrap_policy=fsdp_auto_wrap_policy(found) if lora else blocks,
        use_orig_params=True,
        backward_prefetch=BackwardPrefetch.BACKWARD_PRE,
        limit_all_gathers=True,
        device_id=torch.device("cpu"),
    )


def peaks(trained: Any, tokens: int, counted: Bytes, steps: int = 2) -> dict[str, int]:
    """Return the peak of each phase of the last step: the first makes the optimizer's states."""
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], foreach=True)
    ids = torch.zeros((1, tokens), dtype=torch.int64)
    found: dict[str, int] = {}
    with counted:
        for tensor in (*trained.parameters(), *trained.buffers()):
            counted.watch(tensor)
        for step in range(1, steps + 1):
            counted.counts = step == steps
            for phase in ("forward", "backward", "step"):
                counted.peak = 0
                if phase == "forward":
                    loss = trained(input_ids=ids, labels=ids, use_cache=False).loss
                elif phase == "backward":
                    loss.backward()
                    del loss
                else:
                    optimizer.step()
                found[phase] = counted.peak
            optimizer.zero_grad()
    return found


def alone(asked: dict[str, Any]) -> dict[str, int]:
    """Return the peaks of an FSDP rank."""
    world, tp = asked["world"], asked["tp"]
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    plain = model(asked["config"], asked["lora"], asked["checkpoint"])
    mesh = init_device_mesh("cpu", (world // tp, tp), mesh_dim_names=("fsdp", "tp")) if tp > 1 else {"fsdp": None}
    if tp > 1:
        apply_tensor_parallelism(plain, mesh["tp"], plain._expand_parallel_plan(plain.tp_plan))
    trained = sharded(plain, asked["strategy"], asked["lora"], mesh["fsdp"])
    found = peaks(trained, asked["tokens"], LocalBytes() if tp > 1 else Bytes())
    dist.destroy_process_group()
    return found


def replica(rank: int, asked: dict[str, Any], folder: str) -> None:
    """Run one of two DDP ranks; the first writes its peaks into the folder."""
    store = Path(folder) / "store"
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=asked["world"])
    trained = DistributedDataParallel(model(asked["config"], asked["lora"], asked["checkpoint"]))
    found = peaks(trained, asked["tokens"], Bytes(), steps=3)  # DDP rebuilds its buckets in the second
    if rank == 0:
        (Path(folder) / "peaks.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def together(asked: dict[str, Any]) -> dict[str, int]:
    """Return the peaks of the first DDP rank."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(replica, args=(asked, folder), nprocs=asked["world"], start_method="fork")
        return json.loads((Path(folder) / "peaks.json").read_text())


if __name__ == "__main__":
    for line in sys.stdin:
        asked = json.loads(line)
        found = together(asked) if asked["strategy"] == "ddp" else alone(asked)
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
