"""Trace training steps with saved tensors in host memory, and print rows for tests/estimate/test_traced_steps.py.

python tests/golden/trace_saved.py > tests/golden/traced_saved.jsonl

Each runs its forward pass under torch's `save_on_cpu`: full and adapter training of Qwen2 0.5B and others, checkpointed
or not, with each loss and kernel of attention, on one GPU and as one rank of four. Takes about two minutes on one core.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.probe.libraries import versions
from memplan.spec.run import RunSpec
from tests.golden.trace_runs import write

LORA = {"kind": "lora", "rank": 16}
FSDP2 = {"world": 4, "dp": 4, "strategy": "fsdp2"}
RUNS: dict[str, dict[str, Any]] = {
    "full": {},
    "full-checkpointed": {"kernels": {"checkpointing": "full"}},
    "full-reentrant": {"kernels": {"checkpointing": "full", "reentrant": True}},
    "full-amp": {"precision": "amp"},
    "full-accumulated": {"batch": {"micro": 2, "sequence": 1024, "accumulation": 2}},
    "full-fused": {"kernels": {"loss": "fused"}},
    "full-chunked": {"kernels": {"loss": "chunked"}},
    "full-held": {"loop": {"hold_outputs": True}},
    "full-eager": {"kernels": {"attention": "eager"}},
    "full-math": {"kernels": {"attention": "sdpa_math"}},
    "full-flash": {"kernels": {"attention": "flash_attention_2"}},
    "full-padded": {"kernels": {"attention": "sdpa_efficient"}, "loop": {"padded": True}},
    "full-in-backward": {"optimizer": {"name": "sgd", "in_backward": True}},
    "full-gpt2": {"model": "gpt2", "batch": {"micro": 4, "sequence": 1024}},
    "lora": {"method": LORA},
    "lora-checkpointed": {"method": LORA, "kernels": {"checkpointing": "full"}},
    "lora-dropout": {"method": {**LORA, "dropout": 0.1}},
    "lora-fused-long": {"method": LORA, "kernels": {"loss": "fused"}, "batch": {"sequence": 16384}},
    "lora-gemma-2-2b-eager": {"model": "gemma-2-2b", "method": LORA, "kernels": {"attention": "eager"}},
    "lora-llama-3.2-1b-fused": {"model": "llama-3.2-1b", "method": LORA, "kernels": {"loss": "fused"}},
    "dora": {"method": {"kind": "dora", "rank": 16}},
    "qlora": {"method": {"kind": "qlora", "rank": 16}},
    "freeze": {"method": {"kind": "freeze", "trainable_layers": 2}},
    "full-ddp": {"parallelism": {"world": 4, "dp": 4, "strategy": "ddp"}},
    "full-fsdp2": {"parallelism": FSDP2},
    "full-fsdp2-checkpointed": {"parallelism": FSDP2, "kernels": {"checkpointing": "full"}},
    "full-fsdp2-amp": {"parallelism": FSDP2, "precision": "amp"},
    "lora-fsdp2": {"parallelism": FSDP2, "method": LORA},
}


def run_of(fields: dict[str, Any]) -> RunSpec:
    """Return the run with saved tensors on the host, by default without checkpointing."""
    kernels = {"checkpointing": "none", **fields.get("kernels", {})}
    parallelism = {**fields.get("parallelism", {}), "offload": {"activations": True}}
    plain = {"model": "qwen2-0.5b", "batch": {"micro": 2, "sequence": 1024}}
    return RunSpec(**{**plain, **fields, "kernels": kernels, "parallelism": parallelism})


def main() -> None:
    about = "Training steps under torch's save_on_cpu, traced with memplan.probe by trace_saved.py next to this file."
    print(json.dumps({"about": about, "date": "2026-11-26", "versions": versions()}), flush=True)
    write([(name, run_of(fields)) for name, fields in RUNS.items()])


if __name__ == "__main__":
    main()
