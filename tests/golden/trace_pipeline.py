"""Train stages of small Llamas and a GPT-2 with torch.distributed.pipelining, on the CPU, and print their peaks.

python tests/golden/trace_pipeline.py > tests/golden/traced_pipeline.jsonl
python tests/golden/trace_pipeline.py gpt2 >> tests/golden/traced_pipeline.jsonl

With the argument gpt2 or frozen only those stages are traced, with another one only the stages sharded by FSDP2.

The schedules are torch's own, on a fake process group: a stage receives whatever is in its buffers. Each stage is given
the shapes of its inputs. tests/program/test_pipeline.py compares with the lines. Takes a few
minutes. Stages whose gradients are reduced in fp32 are of torchtitan's own layers: see tests/golden/trace_titan.py.
"""

from __future__ import annotations

import json
import sys
import warnings
import weakref
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import _PipelineSchedule
from torch.distributed.pipelining.stage import InferenceMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.golden import trace_titan

warnings.simplefilter("ignore")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Bytes(TorchDispatchMode):
    """Counts the bytes of all storages alive, each rounded up to 512."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, weakref.ref[Any]] = {}
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def watch(self, tensor: Any) -> None:
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu":
            return
        storage = tensor.untyped_storage()
        key, bytes_ = storage._cdata, -(-storage.nbytes() // 512) * 512

        def freed(_: Any) -> None:
            del self.alive[key]
            self.now -= self.sizes.pop(key)

        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, freed)
        self.now += bytes_ - self.sizes.get(key, 0)  # FSDP resizes a storage to free it, and back
        self.sizes[key] = bytes_
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            self.watch(tensor)
        return out


_SIZED = {name: getattr(_fsdp_param, name) for name in ("alloc_storage", "free_storage")}


def resized(counted: Bytes) -> None:
    """Count storages that FSDP frees and allocates again."""
    for name, plain in _SIZED.items():

        def watched(tensor: torch.Tensor, plain: Any = plain) -> None:
            plain(tensor)
            counted.watch(tensor)

        setattr(_fsdp_param, name, watched)


def told(schedule: Any, stages: list[Any], *_: Any) -> None:
    """Replace the exchange of shapes between stages by the given ones."""
    for stage in stages:
        stage._inference_mode = InferenceMode.STATIC


_PipelineSchedule._warmup_p2p = told


class Stage(nn.Module):
    """Some of a model's layers, with embeddings in the first stage, and last norm and head in the last."""

    def __init__(self, model: Any, start: int, end: int, first: bool, last: bool) -> None:
        super().__init__()
        self.embed_tokens = model.model.embed_tokens if first else None
        self.layers = model.model.layers[start:end]
        self.norm, self.lm_head = (model.model.norm, model.lm_head) if last else (None, None)
        self.rotary_emb = model.model.rotary_emb

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = embeds = x if self.embed_tokens is None else self.embed_tokens(x)  # a frame of transformers' holds them
        positions = torch.arange(embeds.shape[1]).unsqueeze(0)
        tables = self.rotary_emb(x, position_ids=positions)
        for layer in self.layers:
            x = layer(x, attention_mask=None, position_embeddings=tables, position_ids=positions)
        if self.norm is None:
            return x
        return self.lm_head(self.norm(x))


class LearnedStage(nn.Module):
    """Some of GPT-2's layers; only the first stage looks up positions."""

    def __init__(self, model: Any, start: int, end: int, first: bool, last: bool) -> None:
        super().__init__()
        body = model.transformer
        self.wte, self.wpe = (body.wte, body.wpe) if first else (None, None)
        self.layers = body.h[start:end]
        self.norm, self.lm_head = (body.ln_f, model.lm_head) if last else (None, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.wte is not None and self.wpe is not None:
            x = self.wte(x) + self.wpe(torch.arange(x.shape[1]).unsqueeze(0))
        for layer in self.layers:
            x = layer(x)
        return x if self.norm is None or self.lm_head is None else self.lm_head(self.norm(x))


class TitanStage(nn.Module):
    """Some of torchtitan's layers."""

    def __init__(self, config: dict[str, Any], start: int, end: int, first: bool, last: bool, tokens: int) -> None:
        super().__init__()
        asked = {"flavour": "debugmodel", "layers": config["num_hidden_layers"], "tokens": tokens}
        model = trace_titan.model_of(asked).build()
        model.init_states(buffer_device=torch.device("cpu"))
        self.embed_tokens = model.tok_embeddings if first else None
        self.layers = nn.ModuleList([*model.layers.values()][start:end])
        self.norm, self.lm_head = (model.norm, model.lm_head) if last else (None, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        positions = torch.zeros(x.shape[:2], dtype=torch.int64)
        for layer in self.layers:
            x = layer(x, None, positions)
        return x if self.norm is None else self.lm_head(self.norm(x))


def divided(module: Any, mesh: Any, reduces: str) -> None:
    """Apply FSDP2 as torchtitan does in stages: weights stay gathered after forward, gradients reduce in `reduces`."""
    lower = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, DTYPES[reduces])} if reduces else {}
    units: list[Any] = [*module.layers, *([module.embed_tokens] if module.embed_tokens is not None else [])]
    units += [] if module.norm is None else [[module.norm, module.lm_head]]
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=False, **lower)
    fully_shard(module, mesh=mesh, **lower)


def peaks(asked: dict[str, Any]) -> dict[str, int]:
    """Return the peaks of two steps, of passes and optimizer."""
    p, chunks, rank, m = asked["stages"], asked["chunks"], asked["stage"], asked["microbatches"]
    each = asked.get("replicas", 1)
    dist.init_process_group("fake", rank=rank * each, world_size=p * each, store=FakeStore())
    mesh = init_device_mesh("cpu", (p, each), mesh_dim_names=("pp", "dp"))
    torch.manual_seed(0)
    config = AutoConfig.for_model(**asked["config"])
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    whole.train()
    if "lora" in asked:
        kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        get_peft_model(whole, LoraConfig(r=asked["lora"], target_modules=kinds, task_type="CAUSAL_LM"))
    if "trainable" in asked:
        whole.requires_grad_(False)
        whole.model.layers[-asked["trainable"] :].requires_grad_(True)
    if asked["checkpoint"]:
        whole.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers, tokens, width = asked["layers"], asked["tokens"], config.hidden_size
    counted = Bytes()
    resized(counted)
    with counted:
        made: list[Any] = []
        for index in range(rank, p * chunks, p):
            start, first, last = sum(layers[:index]), index == 0, index == p * chunks - 1
            ends = (start, start + layers[index], first, last)
            titan = asked.get("reduces")
            kind = LearnedStage if config.model_type == "gpt2" else Stage
            module = TitanStage(asked["config"], *ends, tokens) if titan else kind(whole, *ends)
            if titan and asked["checkpoint"]:
                module.layers = nn.ModuleList([checkpoint_wrapper(layer, early_stop=False) for layer in module.layers])
            if each > 1:
                divided(module, mesh["dp"], asked["reduces"])
            between = torch.bfloat16 if asked.get("reduces") else torch.float32
            hidden = torch.empty(1, tokens, width, dtype=between, device="meta", requires_grad=True)
            ids = torch.empty(1, tokens, dtype=torch.int64, device="meta")
            logits = torch.empty(1, tokens, config.vocab_size, dtype=between, device="meta", requires_grad=True)
            given, out = (ids if first else hidden), (logits if last else hidden)
            stage = PipelineStage(
                module,
                index,
                p * chunks,
                torch.device("cpu"),
                input_args=(given,),
                output_args=(out,),
                group=mesh["pp"].get_group(),
            )
            made.append(stage)
        loss = partial(_titan_loss if asked.get("reduces") else _loss, vocab_size=config.vocab_size)
        kinds = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
        schedule: Any = (
            ScheduleInterleaved1F1B(made, m, loss_fn=loss, scale_grads=False)
            if chunks > 1
            else kinds[asked["schedule"]](made[0], m, loss_fn=loss, scale_grads=False)
        )
        del whole, module, stage
        own = [t for s in made for t in (*s.submod.parameters(), *s.submod.buffers())]
        for tensor in own:
            counted.watch(tensor)
        trained = [t for s in made for t in s.submod.parameters() if t.requires_grad]
        optimizer = torch.optim.AdamW(trained, foreach=True) if trained else None
        found: dict[str, int] = {}
        for step in (1, 2):
            ids = torch.zeros((m, tokens), dtype=torch.int64) if rank == 0 else None
            labels = torch.zeros((m, tokens), dtype=torch.int64) if rank == p - 1 else None
            counted.peak = 0
            given = (ids,) if rank == 0 else ()
            schedule.step(*given, target=labels, return_outputs=False)
            found[f"passes {step}"] = counted.peak
            counted.peak = counted.now
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            found[f"step {step}"] = counted.peak
    dist.destroy_process_group()
    return found


def _loss(logits: Any, labels: Any, vocab_size: int) -> Any:
    return ForCausalLMLoss(logits, labels, vocab_size)


def _titan_loss(logits: Any, labels: Any, vocab_size: int) -> Any:
    from torchtitan.components.loss import cross_entropy_loss

    return cross_entropy_loss(logits, labels)


def cases() -> Iterator[dict[str, Any]]:
    """Yield each of four stages under each schedule, with 4 and more microbatches, checkpointed or not."""
    for schedule, chunks, layers in (
        ("1f1b", 1, (3, 4, 3, 2)),
        ("gpipe", 1, (3, 4, 3, 2)),
        ("1f1b", 2, (2, 3, 2, 2, 2, 2, 2, 1)),
    ):
        for stage in range(4):
            for microbatches, checkpoint in ((4, schedule == "1f1b"), (8, schedule == "gpipe")):
                yield {
                    "stages": 4,
                    "chunks": chunks,
                    "stage": stage,
                    "schedule": schedule,
                    "layers": layers,
                    "microbatches": microbatches,
                    "tokens": 256,
                    "checkpoint": checkpoint,
                    "config": _config(layers),
                }
    yield from _divided()
    yield from _learned()
    yield from _frozen()


def _frozen() -> Iterator[dict[str, Any]]:
    """Yield every stage of a Llama whose last four layers train, of which the first two stages have none."""
    for stage, (schedule, microbatches, checkpoint) in product(
        range(4), (("1f1b", 8, False), ("1f1b", 4, True), ("gpipe", 4, True))
    ):
        layers = (3, 4, 3, 2)
        plain = {"stages": 4, "chunks": 1, "stage": stage, "schedule": schedule, "layers": layers}
        more = {"microbatches": microbatches, "tokens": 256, "checkpoint": checkpoint, "trainable": 4}
        yield {**plain, **more, "config": _config(layers)}


def _learned() -> Iterator[dict[str, Any]]:
    """Yield every stage of a GPT-2 without dropout and with an untied head."""
    layers = (3, 4, 3, 2)
    config = {"model_type": "gpt2", "n_embd": 128, "n_layer": sum(layers), "n_head": 4, "vocab_size": 1000}
    config |= {"n_positions": 512, "tie_word_embeddings": False, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    for stage in range(4):
        plain = {"stages": 4, "chunks": 1, "stage": stage, "schedule": "1f1b", "layers": layers}
        yield {**plain, "microbatches": 4, "tokens": 256, "checkpoint": stage % 2 == 0, "config": config}


def _config(layers: tuple[int, ...]) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": sum(layers),
        "num_attention_heads": 4,
        "vocab_size": 1000,
        "max_position_embeddings": 512,
    }


# FSDP2 among the ranks of a stage: in fp32, and computing in bf16 with gradients reduced in fp32, as in torchtitan.
_SHARDED: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    ((7, 7), {"stages": 2, "replicas": 2}),
    ((7, 7), {"stages": 2, "replicas": 8, "lora": 8}),
    ((3, 4, 3, 2), {"replicas": 2, "checkpoint": False}),
    ((3, 4, 3, 2), {"replicas": 4, "lora": 8}),
    ((3, 4, 3, 2), {"replicas": 4, "lora": 8, "tokens": 8}),
    ((3, 4, 3, 2), {"replicas": 4, "reduces": "fp32"}),
    ((3, 4, 3, 2), {"replicas": 4, "reduces": "fp32", "tokens": 8}),
    ((3, 4, 3, 2), {"replicas": 3, "schedule": "gpipe"}),
    ((2, 3, 2, 2, 2, 2, 2, 1), {"replicas": 4, "chunks": 2}),
    ((2, 3, 2, 2, 2, 2, 2, 1), {"replicas": 4, "chunks": 2, "reduces": "fp32", "microbatches": 4}),
    ((2, 3, 2, 2, 2, 2, 2, 1), {"replicas": 4, "chunks": 2, "lora": 8, "tokens": 8}),
    ((2, 3, 3, 3, 3, 2), {"stages": 2, "chunks": 3, "replicas": 2, "microbatches": 4}),
)


# torchtitan's debugmodel.
_TITAN = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 16, "vocab_size": 2048}


def _divided() -> Iterator[dict[str, Any]]:
    """Yield the first and the last stage."""
    for layers, more in _SHARDED:
        plain = {"stages": 4, "chunks": 1, "schedule": "1f1b", "microbatches": 8, "tokens": 128, "checkpoint": True}
        for stage in (0, more.get("stages", 4) - 1):
            config = {**_config(layers), **(_TITAN if "reduces" in more else {})}
            yield {**plain, "reduces": "", **more, "stage": stage, "layers": layers, "config": config}


if __name__ == "__main__":
    made = {"about": "torch 2.13 distributed/pipelining with layers of transformers 5.24, fp32, AdamW, on the CPU"}
    if len(sys.argv) == 1:
        sys.stdout.write(json.dumps(made) + "\n")
    torch.set_num_threads(1)
    trace_titan.leave_out()
    trace_titan.norms_of_one_kernel()
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    named = {"gpt2": _learned, "frozen": _frozen}
    some = named[wanted]() if wanted in named else [c for c in _divided() if wanted in ("sharded", c["reduces"])]
    for case in some if wanted else cases():
        sys.stdout.write(json.dumps({**case, "peaks": peaks(case)}) + "\n")
        sys.stdout.flush()
