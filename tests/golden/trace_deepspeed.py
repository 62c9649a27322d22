"""Trace steps of DeepSpeed without ZeRO, and print rows for tests/program/test_traced_ranks.py.

FOLDER has DeepSpeed's source unpacked (pip download --no-deps --no-binary :all: deepspeed==0.19.8), next to which are
what it imports: hjson, py-cpuinfo, einops, msgpack. DeepSpeed's own optimizer and reduction of gradients run on a model
that memplan's script has cast, as DeepSpeed does. What would read a number from the GPU, overflows and norms, is
replaced by its allocations, and a sum over ranks by nothing.

DS_ACCELERATOR=cpu python tests/golden/trace_deepspeed.py FOLDER >> tests/golden/traced_ranks.jsonl
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), sys.argv[1]]

from memplan.probe.libraries import library
from memplan.probe.run import child
from memplan.probe.run.trace import read
from memplan.spec.run import RunSpec
from tests.golden.trace_ranks import LLAMA, LORA, PLAIN, THREE, TIED
from tests.golden.trace_runs import line

LARGE = {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 128_256, "num_hidden_layers": 16}
RUNS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "foreach": {"optimizer": "adamw_torch"},
    "sgd": {"optimizer": "sgd"},
    "fp16": {"precision": "fp16"},
    "fp32": {"precision": "fp32"},
    "tied": TIED,
    "three": THREE,
    "lora": {"method": {**LORA, "adapter_dtype": "bf16"}},
    "buckets": {"model": {"config": LARGE}, "batch": {"micro": 1, "sequence": 2048}},
    "buckets-foreach": {"model": {"config": LARGE}, "optimizer": "adamw_torch", "batch": {"micro": 1, "sequence": 512}},
}


def engine() -> Any:
    """Return what DeepSpeed's engine reads of itself to reduce gradients."""
    kind: Any = library("deepspeed.runtime.engine").DeepSpeedEngine
    flat: Any = library("torch._utils")
    own = SimpleNamespace(
        flatten=flat._flatten_dense_tensors,
        unflatten=flat._unflatten_dense_tensors,
        gradient_average=True,
        postscale_gradients=lambda: True,
        gradient_predivide_factor=lambda: 1.0,
        has_moe_layers=False,
        pipeline_parallelism=False,
        optimizer=None,
    )
    for name in ("allreduce_bucket", "allreduce_and_copy", "allreduce_no_retain", "_get_gradients_for_reduction"):
        setattr(own, name, getattr(kind, name).__get__(own))
    return own


def patch() -> None:
    """Put DeepSpeed's optimizer and its reduction into the script of a step."""
    import torch

    script: Any = library("memplan.probe.script.script")
    unfused: Any = library("deepspeed.runtime.fp16.unfused_optimizer")
    utils: Any = library("deepspeed.runtime.utils")
    engines: Any = library("deepspeed.runtime.engine")
    own = engine()
    engines.dist = SimpleNamespace(all_reduce=lambda *_, **__: None, get_world_size=lambda **_: 2)
    unfused.dist = SimpleNamespace(get_rank=lambda: 1)
    unfused.get_accelerator = lambda: SimpleNamespace(is_available=lambda: True, current_device_name=lambda: "cuda")
    unfused.get_weight_norm = lambda gradients, mpu: [g.data.float().norm(2) for g in gradients] and 1.0
    unfused.get_global_norm = lambda norm_list: 1.0
    unfused.is_invalid_grad_norm = lambda norm: False

    def checks(checker: Any) -> bool:
        for p in checker.params:
            utils.has_inf_or_nan(p.grad.data)
        return False

    unfused.CheckOverflow.check = checks
    unfused.split_params_grads_into_shared_and_expert_params = lambda group: ([p.grad for p in group], [])
    build = script.Script._optimizer

    def optimizer(self: Any) -> Any:
        basic, dtype = build(self), self.parameters[0].dtype
        own.communication_data_type = dtype
        if dtype == torch.float32:
            return basic
        return unfused.FP16_UnfusedOptimizer(basic, low_precision_dtype=dtype, static_loss_scale=1.0, clip_grad=1.0)

    def reduced(model: Any, run: RunSpec, parameters: list[Any]) -> None:
        own.module = model
        gradients, _ = own._get_gradients_for_reduction()
        own.allreduce_no_retain(gradients, None, dp_world_size=2)
        if parameters[0].dtype == torch.float32:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)

    script.Script._optimizer = optimizer
    script.clip = reduced


def main() -> None:
    output, sys.stdout = sys.stdout, sys.stderr
    for name, fields in RUNS.items():
        if process := os.fork():  # a trace patches classes, as long as its process lasts
            os.waitpid(process, 0)
            continue
        shape = {"model": {"config": LLAMA}, "batch": {"micro": 2, "sequence": 64}, "gpu": "a100-sxm-80gb"}
        run = {**shape, **fields}
        try:
            context = child._trainers_context

            def patched(run: RunSpec, context: Any = context) -> Any:
                patch()
                return context(run)

            child._trainers_context = patched
            alone = RunSpec.model_validate(run)
            row = line(f"zero0-{name}", alone, read(alone, child._answer(alone, 2, "cuda", False)))
            row["run"] |= {"parallelism": {"world": 2, "dp": 2, "strategy": "zero0"}}
            print(json.dumps(row), file=output, flush=True)
        finally:
            os._exit(0)


if __name__ == "__main__":
    main()
