"""Traces runs whose blocks are checkpointed, one at a time, by a function that keeps their inputs in host memory.

Like Unsloth, and after it Axolotl and LLaMA-Factory (unsloth_zoo 2026.10 gradient_checkpointing.py
Unsloth_Offloaded_Gradient_Checkpointer). Run as a separate process: a run per line on stdin, its peaks on stdout.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from memplan import RunSpec
from memplan.probe.fake import fake_device
from memplan.probe.run import child

fake_device.load()

import torch  # noqa: E402 (the device that is not there comes first)
import transformers.modeling_utils  # noqa: E402


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


transformers.modeling_utils.checkpoint = checkpoint
for line in sys.stdin:
    found = child._answer(RunSpec.model_validate_json(line), steps=2, device="cuda", data=False)
    peaks = [[phase, step, peak] for phase, step, _, _, peak, *_ in found["phases"]]
    sys.stdout.write(json.dumps(peaks) + "\n")
sys.stdout.flush()
os._exit(0)  # torch's threads for the fake device cannot be joined
