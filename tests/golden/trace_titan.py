"""Trace a step of one rank of torchtitan's Llama 3, and print the rows for tests/catalogue/test_torchtitan.py.

python tests/golden/trace_titan.py > tests/golden/traced_titan.jsonl

torchtitan's model, its plan of tensor and sequence parallelism, its FSDP2, checkpointing and losses run unchanged, on a
fake card and a fake process group. Attention is torch's fused kernel: torchtitan's compiled one keeps the same tensors.
Needs torchtitan 0.3.0 and spmd_types in addition to the other libraries; its imports of expert kernels, missing in a
build of torch without CUDA, are stubbed.
"""

from __future__ import annotations

import gc
import importlib.abc
import importlib.machinery
import itertools
import json
import sys
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.probe.fake import fake_device

_ABSENT = tuple(f"torchtitan.distributed.{name}" for name in ("minimal_async_ep", "deepep", "flex_shard"))


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A stub module in which every name exists."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        left_out = any(name == absent or name.startswith(f"{absent}.") for absent in _ABSENT)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if left_out else None

    def create_module(self, spec: Any) -> Any:
        made = types.ModuleType(spec.name)
        made.__getattr__ = lambda name: MagicMock(name=name)  # type: ignore[method-assign]
        made.__path__ = []
        return made

    def exec_module(self, module: Any) -> None:
        pass


def norms_of_one_kernel() -> None:
    """Use CUDA's RMSNorm kernel; a build of torch without CUDA uses operations that keep more."""
    import torch
    from torch.distributed.tensor import DTensor, Partial, Replicate

    class Norm(torch.autograd.Function):
        """Saves what `_fused_rms_norm` saves."""

        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any) -> Any:
            rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
            ctx.save_for_backward(x, rstd, weight)
            return torch.empty_like(x)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            x, _, weight = ctx.saved_tensors
            return torch.empty_like(x), torch.empty_like(weight)

    def rms_norm(x: Any, shape: Any, weight: Any = None, eps: Any = None) -> Any:
        if not isinstance(x, DTensor):
            return Norm.apply(x, weight)
        summands = [Replicate() if p.is_replicate() else Partial() for p in x.placements]
        made = Norm.apply(x.to_local(), weight.to_local(grad_placements=summands))
        return DTensor.from_local(made, x.device_mesh, x.placements, run_check=False)

    functional: Any = torch.nn.functional
    functional.rms_norm = rms_norm


def flavours() -> Any:
    from torchtitan.models.llama3 import llama3_configs

    return llama3_configs


def leave_out() -> None:
    """Make imports of missing modules succeed."""
    sys.meta_path.insert(0, _Absent())


def model_of(asked: dict[str, Any]) -> Any:
    """Return torchtitan's config of a size, with `layers` layers and an attention that runs without compiling."""
    import dataclasses

    from torchtitan.models.common.attention import ScaledDotProductAttention

    config = flavours()[asked["flavour"]](attn_backend="flex")
    config.layers = [
        dataclasses.replace(
            layer,
            attention=dataclasses.replace(
                layer.attention,
                inner_attention=ScaledDotProductAttention.Config(),
                rope=dataclasses.replace(layer.attention.rope, max_seq_len=asked["tokens"]),
            ),
        )
        for layer in (config.layers * asked["layers"])[: asked["layers"]]
    ]
    return config


def recorded(asked: dict[str, Any]) -> dict[str, Any]:  # noqa: PLR0915 (one step, part after part)
    """Return the record of two steps of the first rank: see `memplan.probe.fake.recording.report`."""
    import torch
    from torch.utils._python_dispatch import _disable_current_modes
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed import utils as dist_utils
    from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC, ptd_checkpoint_wrapper
    from torchtitan.models.llama3.parallelize import parallelize_llama
    from torchtitan.models.llama3.sharding import set_llama3_sharding_config

    from memplan.catalogue.hardware.gpus import find_gpu
    from memplan.catalogue.quantization.fused_4bit import card_of
    from memplan.probe.fake import fake_process_group as group
    from memplan.probe.fake import fake_tensor_patches as patches
    from memplan.probe.fake import recording
    from memplan.probe.fake.tracker import Tracker, new_operation_cache

    card = card_of(find_gpu("a100-sxm-80gb").compute_capability)
    patches.apply(card)
    group.apply()
    dist: Any = torch.distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dp, tp, backend = asked["dp"], asked["tp"], asked.get("backend", "partial_dtensor")
    world = dp * tp
    with _disable_current_modes():
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    parallelism = ParallelismConfig(
        data_parallel_shard_degree=dp,
        tensor_parallel_degree=tp,
        enable_sequence_parallel=asked["sequence_parallel"],
        spmd_backend=backend,
    )
    training = TrainingConfig(local_batch_size=asked["micro"], seq_len=asked["tokens"], dtype=asked["dtype"])
    with _disable_current_modes():
        dims = ParallelDims.from_config(parallelism, world)
        dims.build_mesh()
    dist_utils.set_spmd_backend(backend)
    config = model_of(asked)
    set_llama3_sharding_config(config, enable_sp=asked["sequence_parallel"])
    tracker = Tracker("cuda", new_operation_cache(card))
    tracker.calibrate()
    known = recording.StorageLabels(tracker)
    loss_config = CrossEntropyLoss.Config(global_vocab_size=config.vocab_size)
    chunked = asked["loss"] == "chunked"
    gc.disable()
    context = dist_utils.get_spmd_context(parallel_dims=dims)
    number, n = itertools.count(1), asked.get("every", 1)  # as _apply_layer_sac of torchtitan 0.2.2
    checkpointed = partial(ptd_checkpoint_wrapper, early_stop=False)
    FullAC._wrap_block = lambda _, block, **__: block if next(number) % n else checkpointed(block)
    with tracker.resizing(), tracker, context():
        with tracker.phase("load"):
            torch.set_default_dtype(getattr(torch, asked["dtype"]))
            with torch.device("meta"):
                model = config.build()
            torch.set_default_dtype(torch.float32)
            parallelize_llama(
                model,
                parallel_dims=dims,
                training=training,
                parallelism=parallelism,
                compile_config=CompileConfig(enable=False),
                ac_config={False: None, True: FullAC.Config(), "selective": SelectiveAC.Config()}[asked["checkpoint"]],
                dump_folder="",
            )
            model.to_empty(device="cuda")
            model.train()
            loss_fn = (ChunkedLossWrapper.Config(loss_fn=loss_config) if chunked else loss_config).build(
                compile_config=CompileConfig(enable=False)
            )
            if chunked:
                loss_fn.set_lm_head(model.lm_head)
                model._skip_lm_head = True
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, fused=True)
        for step in (1, 2):
            tracker.step = step
            for _ in range(asked["passes"]):
                with tracker.phase("forward"):
                    ids = torch.zeros((asked["micro"], asked["tokens"]), dtype=torch.int64, device="cuda")
                    labels = torch.zeros_like(ids)
                    positions = torch.zeros_like(ids)
                    pred = model(ids, positions=positions)
                    loss, _ = loss_fn(pred, labels, torch.ones((), device="cuda"))
                    del pred
                with tracker.phase("backward"):
                    loss.backward()
                    del loss
            with tracker.phase("clip"):
                pass
            with tracker.phase("step"):
                optimizer.step()
                optimizer.zero_grad()
    gc.enable()
    return recording.report(tracker, known)


def traced(asked: dict[str, Any]) -> dict[str, int]:
    """Return the peaks by phase and step, in bytes."""
    peaks: dict[str, int] = {}
    for name, step, _, _, peak, *_ in recorded(asked)["phases"]:
        key = f"{name} {step}"
        peaks[key] = max(peaks.get(key, 0), peak)
    return peaks


def cases() -> Iterator[dict[str, Any]]:
    plain = {"flavour": "debugmodel", "layers": 4, "micro": 1, "tokens": 512, "passes": 1, "dp": 4, "tp": 1}
    plain |= {"sequence_parallel": False, "dtype": "float32", "loss": "hf", "checkpoint": False}
    both = {"tp": 2, "sequence_parallel": True}
    for more in (
        *({}, {"checkpoint": True}, both, {**both, "checkpoint": True}, {**both, "micro": 2}, {"tp": 4}),
        *({"micro": 2, "passes": 2}, {**both, "passes": 2, "checkpoint": True}, {"dtype": "bfloat16"}, {"dp": 16}),
        *({**both, "tp": 8, "dp": 2, "checkpoint": True}, {"tp": 2, "checkpoint": True, "micro": 2}),
        {**both, "tp": 8, "dp": 2, "checkpoint": True, "micro": 2},
        *({"checkpoint": True, "every": 2, **more} for more in ({}, both, {"every": 3, "passes": 2}, {"layers": 5})),
        *({**more, "checkpoint": "selective"} for more in ({}, both, {"tp": 4}, {**both, "micro": 2, "passes": 2})),
    ):
        yield {**plain, **more}
    for more in (
        {"dp": 8, "checkpoint": True},
        {"dp": 8, "tp": 8, "sequence_parallel": True, "checkpoint": True},
        {"dp": 8, "tp": 2, "sequence_parallel": True},
        {"flavour": "70B", "dp": 32, "tp": 8, "sequence_parallel": True, "checkpoint": True, "layers": 3},
    ):
        yield {**plain, "flavour": "8B", "layers": 4, "tokens": 8192, **more}


if __name__ == "__main__":
    fake_device.load()
    import torch
    import torch.nn.attention.flex_attention  # noqa: F401

    leave_out()
    norms_of_one_kernel()
    for case in cases():
        print(json.dumps({**case, "peaks": traced(case)}), flush=True)
