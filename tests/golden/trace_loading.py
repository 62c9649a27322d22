"""Trace how FSDP shards a model on loading, and print the rows for tests/program/test_loading.py.

python tests/golden/trace_loading.py > tests/golden/traced_loading.jsonl

A small Llama on three and four GPUs, by FSDP1 and FSDP2: sent by one process of a node or loaded by each, with its
shards on the GPU or on the host, in several precisions and methods; and a real one. Takes five minutes on one core.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.core.errors import MemplanError
from memplan.probe.libraries import versions
from memplan.probe.run.trace import traces
from memplan.spec.run import RunSpec
from tests.golden.trace_ranks import LLAMA, LORA, TIED, TRAINER, divided

QLORA = {"kind": "qlora", "rank": 8, "quantization": {"storage": "bf16"}}
RUNS: tuple[dict[str, Any], ...] = (
    {},
    {"precision": "amp"},
    {"precision": {"weights": "bf16", "autocast": True}},
    {"method": LORA},
    {"method": LORA, **TRAINER},
    TIED,
    {"method": {"kind": "freeze", "trainable_layers": 2}},
    {"method": QLORA},
)
REAL = ({"model": "llama-3.2-1b"}, {"model": "llama-3.2-1b", "method": LORA})


def draw() -> Iterator[dict[str, Any]]:
    small = {"model": {"config": LLAMA}, "batch": {"micro": 1, "sequence": 8}}
    for strategy, moved, sent, run in product(("fsdp2", "fsdp"), (False, True), (True, False), (*RUNS, *REAL)):
        if sent is False and "method" in run and run["method"] is QLORA:
            continue  # a quantised model is never sent
        for world in (3, 4) if not moved and sent else (4,):
            fields = divided(strategy, world)
            how = {"offload": {"parameters": moved}, "cpu_ram_efficient_loading": sent}
            yield {**small, **run, **fields, "parallelism": {**fields["parallelism"], **how}}


def main() -> None:
    about = "The most a GPU holds while FSDP divides a model, traced: see tests/golden/trace_loading.py."
    print(json.dumps({"about": about, "date": "2026-11-26", "versions": dict(versions())}), flush=True)
    runs = [RunSpec.model_validate(fields) for fields in draw()]
    for run, traced in zip(runs, traces(runs, 1), strict=True):
        if isinstance(traced, MemplanError):
            print(traced, file=sys.stderr, flush=True)
        else:
            said = run.model_dump(mode="json", exclude_defaults=True)
            print(json.dumps({"run": said, "load": traced.peak_of("load", 0)}), flush=True)


if __name__ == "__main__":
    main()
