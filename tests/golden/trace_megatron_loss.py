"""Trace the loss of megatron-core, and print rows for tests/catalogue/test_megatron.py.

pip download --no-deps --only-binary :all: --python-version 3.12 --platform manylinux_2_28_x86_64 megatron-core==0.19.2

Each FOLDER has one release unpacked. torch's compiler runs for the CPU, without a GPU: which buffers its code allocates
is decided before it writes kernels. The allocator reports each to the profiler.

python tests/golden/trace_megatron_loss.py FOLDER ... > tests/golden/traced_megatron_loss.jsonl
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from typing import Any

import torch

TOKENS, WORDS = 640, 5120
# form of the loss -> its module and function
LOSSES = {
    "in_place": ("tensor_parallel.cross_entropy", "vocab_parallel_cross_entropy"),
    "compiled": ("fusions.fused_cross_entropy", "fused_vocab_parallel_cross_entropy"),
}


def largest(profile: Any) -> int:
    """Return the most bytes that were allocated at once, of those allocated while it was recorded."""
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def traced(name: str) -> tuple[int, int]:
    """Return the bytes kept for backward, and the most that backward allocates next to them."""
    module, function = LOSSES[name]
    loss: Any = getattr(import_module(f"megatron.core.{module}"), function)
    group = (torch.distributed.group.WORLD,) if loss.__code__.co_argcount > 2 and name == "compiled" else ()
    for step in range(2):  # the first compiles
        logits = torch.randn(TOKENS, 1, WORDS, dtype=torch.bfloat16, requires_grad=True)
        found = loss(logits, torch.randint(0, WORDS, (TOKENS, 1)), *group)
        kept = sum(t.nbytes for t in found.grad_fn.saved_tensors)
        gradient = torch.ones_like(found)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            torch.autograd.grad(found, logits, gradient)
        if step:
            return kept, largest(profile)
    raise AssertionError


def main() -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29555")
    if len(sys.argv) > 2:
        for folder in sys.argv[1:]:
            subprocess.run([sys.executable, __file__, folder], check=True)
        return
    sys.path.insert(0, sys.argv[1])
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    import_module("megatron.core.parallel_state").initialize_model_parallel(1)
    version = import_module("megatron.core.package_info").__version__
    for name in LOSSES:
        kept, backward = traced(name)
        row = {"loss": name, "tokens": TOKENS, "words": WORDS, "kept": kept, "backward": backward}
        print(json.dumps({**row, "megatron-core": version, "torch": torch.__version__.partition("+")[0]}), flush=True)


if __name__ == "__main__":
    main()
