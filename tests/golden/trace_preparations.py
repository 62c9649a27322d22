"""Trace QLoRA as Axolotl prepares a model, and print the rows for tests/program/test_loading.py.

python tests/golden/trace_preparations.py > tests/golden/traced_preparations.jsonl

Small models of families whose norms, biases, experts and embeddings have different names, by the preparation of
Axolotl 0.12 and 0.21. Takes two minutes on one core.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.core.errors import MemplanError
from memplan.probe.libraries import versions
from memplan.probe.run.trace import traces
from memplan.spec.run import RunSpec

MODELS = ("qwen2-0.5b", "tinyllama-1.1b", "gpt2", "pythia-410m", "gemma-3-1b", "olmoe-1b-7b")
PREPARATIONS = ("axolotl", "axolotl-0.12")


def main() -> None:
    about = "QLoRA as Axolotl prepares a model, traced: see tests/golden/trace_preparations.py."
    print(json.dumps({"about": about, "date": "2026-11-29", "versions": dict(versions())}), flush=True)
    runs = [
        RunSpec.model_validate(
            {
                "model": model,
                "method": {"kind": "qlora", "rank": 8, "quantization": {"kbit_preparation": preparation}},
                "precision": {"weights": "bf16", "autocast": True},
                "batch": {"sequence": 128},
            }
        )
        for model, preparation in product(MODELS, PREPARATIONS)
    ]
    for run, traced in zip(runs, traces(runs, 2), strict=True):
        if isinstance(traced, MemplanError):
            print(traced, file=sys.stderr, flush=True)
        else:
            said = run.model_dump(mode="json", exclude_defaults=True)
            row = {"run": said, "load": traced.peak_of("load", 0), "backward": traced.peak_of("backward", 2)}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
