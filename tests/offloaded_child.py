"""Traces runs whose blocks are checkpointed by a function that keeps their inputs in host memory, one block at a time.

As Unsloth's does, and after it Axolotl's and LLaMA-Factory's (unsloth_zoo 2026.10 gradient_checkpointing.py
Unsloth_Offloaded_Gradient_Checkpointer). A process of its own: a run a line on stdin, and its peaks a line on stdout.
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
    """The block's first argument goes to the host, and comes back to run the block again."""

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
os._exit(0)  # torch's threads of a device that is not there cannot be joined
