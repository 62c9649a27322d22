"""Trace a step of encoders and encoder-decoders, and print the rows for tests/catalogue/test_encoders.py.

python tests/golden/trace_encoders.py > tests/golden/traced_encoders.jsonl

Small models of every family with each of their heads, and one real model of each: full, LoRA and QLoRA, with and
without checkpointing; small ones also with eager attention, under autocast, with padding, and with reentrant
checkpointing. Takes about four minutes on one core.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.probe.libraries import versions
from memplan.spec.run import RunSpec
from tests.encoders import HEADS, SMALL
from tests.golden.trace_runs import write

REAL: dict[str, dict[str, Any]] = {
    "bert-base-uncased": {"batch": {"micro": 8, "sequence": 512}},
    "flan-t5-base": {"batch": {"micro": 8, "sequence": 512, "target_sequence": 128}},
    "whisper-large-v3-turbo": {"batch": {"micro": 2}},
    "vit-base": {"batch": {"micro": 16}, "objective": "image_classification"},
}
METHODS = ("full", "lora", "qlora")


def draw() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, config in SMALL.items():
        length = {} if config["model_type"] in ("vit", "whisper") else {"sequence": 256}
        target = {"target_sequence": 96} if "seq2seq_lm" in HEADS[name] else {}
        shared = {"model": {"config": config}, "batch": {"micro": 2, **length, **target}}
        for objective in HEADS[name]:
            for kind in METHODS:
                for checkpointing in ("full", "none"):
                    run = {**shared, "objective": objective, "method": {"kind": kind}}
                    yield f"{name}-{kind}", {**run, "kernels": {"checkpointing": checkpointing}}
        for kind in ("full", "lora"):
            run = {**shared, "objective": HEADS[name][0], "method": {"kind": kind}}
            yield f"{name}-{kind}", {**run, "kernels": {"attention": "eager", "checkpointing": "none"}}
            yield f"{name}-{kind}", {**run, "precision": "amp", "kernels": {"checkpointing": "none"}}
            if config["model_type"] not in ("vit", "whisper"):
                yield f"{name}-{kind}", {**run, "loop": {"padded": True}, "kernels": {"checkpointing": "none"}}
                yield f"{name}-{kind}", {**run, "kernels": {"reentrant": True}}
    for name, kind in (("bart", "full"), ("mbart", "full"), ("t5", "full"), ("mt5", "lora"), ("whisper", "full")):
        length = {} if name == "whisper" else {"sequence": 256}
        half = {"model": {"config": SMALL[name]}, "batch": {"micro": 2, **length}, "precision": "fp16"}
        yield f"{name}-{kind}", {**half, "method": {"kind": kind}, "kernels": {"checkpointing": "none"}}
    uneven = {"model": {"config": SMALL["t5"]}, "batch": {"micro": 2, "sequence": 63}}  # kernels pad rows
    yield "t5-full", {**uneven, "kernels": {"checkpointing": "none"}}
    for name, options in REAL.items():
        for kind in METHODS:
            for checkpointing in ("full", "none"):
                run = {"model": name, "method": {"kind": kind}, "kernels": {"checkpointing": checkpointing}}
                yield f"{name}-{kind}", {**run, **options}
    for micro in (1, 2):  # the scores' bias has a gradient per sequence, visible without optimizer states
        yield "t5-base-full", {"model": "t5-base", "optimizer": "sgd", "batch": {"micro": micro, "sequence": 1024}}


def main() -> None:
    about = "Training steps of encoders and encoder-decoders, traced: see tests/golden/trace_encoders.py."
    if not sys.argv[1:]:
        print(json.dumps({"about": about, "date": "2026-11-25", "versions": dict(versions())}), flush=True)
    named = sys.argv[1:]  # only these, without the head line
    wanted = [
        (name, RunSpec.model_validate({**run, "gpu": "a100-sxm-80gb"}))
        for name, run in draw()
        if not named or name.rpartition("-")[0] in named
    ]
    write(wanted)


if __name__ == "__main__":
    main()
