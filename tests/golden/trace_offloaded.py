"""Trace training steps whose blocks are checkpointed by a function that keeps their inputs in host memory.

python tests/golden/trace_offloaded.py > tests/golden/traced_offloaded.jsonl

Like Unsloth, and after it Axolotl and LLaMA-Factory (unsloth_zoo 2026.10 gradient_checkpointing.py
Unsloth_Offloaded_Gradient_Checkpointer). Prints rows for tests/program/test_offload.py in ten seconds.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan import RunSpec
from memplan.probe.fake import fake_device
from memplan.probe.libraries import versions
from memplan.probe.run import child
from tests.tiny import TINY

fake_device.load()  # before torch, which then finds the device

import torch
import transformers.modeling_utils

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("llama", {}),
    "adapters": ("gpt2", {"method": {"kind": "lora", "rank": 4}, "optimizer": "sgd"}),
    "frozen": ("qwen3", {"method": {"kind": "freeze", "trainable_layers": 1}}),
    "accumulated": ("mistral", {"batch": {"micro": 2, "sequence": 24, "accumulation": 2}}),
}


class Offloaded(torch.autograd.Function):
    """Moves the block's first argument to the host, and back to recompute the block."""

    @staticmethod
    def forward(ctx: Any, function: Any, hidden: Any, *others: Any) -> Any:
        ctx.save_for_backward(hidden.to("cpu", non_blocking=True))
        ctx.function, ctx.others = function, others
        with torch.no_grad():
            return function(hidden, *others)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (saved,) = ctx.saved_tensors
        hidden = saved.to("cuda", non_blocking=True).detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.function(hidden, *ctx.others)
        torch.autograd.backward(output, gradients)
        return (None, hidden.grad, *(None for _ in ctx.others))


def checkpoint(function: Any, *args: Any, use_reentrant: bool) -> Any:
    assert use_reentrant
    return Offloaded.apply(function, *args)


def run_of(family: str, fields: dict[str, Any], checkpointing: str) -> dict[str, Any]:
    model = {"config": {"model_type": family, **TINY[family]}}
    kernels = {"checkpointing": checkpointing, "reentrant": True}
    return {"model": model, "batch": {"micro": 2, "sequence": 24}, **fields, "kernels": kernels}


def main() -> None:
    transformers.modeling_utils.checkpoint = checkpoint
    about = "Steps whose checkpoints keep inputs in host memory, traced by trace_offloaded.py next to this file."
    print(json.dumps({"about": about, "date": "2026-12-01", "versions": versions()}))
    parts = {"forward": "fwd", "loss": "fwd", "backward": "bwd"}
    for name, (family, fields) in RUNS.items():
        found = child._answer(RunSpec(**run_of(family, fields, "full")), steps=2, device="cuda", data=False)
        steps: dict[int, dict[str, int]] = {1: {}, 2: {}}
        for phase, step, _, _, peak, *_ in found["phases"]:
            peaks, part = steps.get(step, {}), parts.get(phase, "opt")  # there is loading before the steps
            peaks[part] = max(peak, peaks.get(part, 0))
        print(json.dumps({"name": name, "run": run_of(family, fields, "offload"), "steps": steps}))
    sys.stdout.flush()
    os._exit(0)  # torch's threads for the fake device cannot be joined


if __name__ == "__main__":
    main()
