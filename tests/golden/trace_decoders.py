"""Trace unusual decoders, small and at real widths, and print the rows for tests/catalogue/test_decoders.py.

python tests/golden/trace_decoders.py gpt_oss gemma4-small >> tests/golden/traced_decoders.jsonl
python tests/golden/trace_decoders.py --layers 4 gpt-oss-20b >> tests/golden/traced_decoders.jsonl

A name is a model_type of tests/tiny.py, a config of tests/tiny_towers.py, or a card, cut to its first `--layers`. Each
is traced with full, LoRA and QLoRA, with and without checkpointing, and small ones with eager attention and in fp32;
models with additive masks of their own (`MASKED`) also with torch's math attention, padded and not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.spec.run import RunSpec
from tests.golden.trace_families import config_of
from tests.golden.trace_runs import write
from tests.tiny_towers import TINY

SMALL = ("lm_head", "prediction_coefs", "correction_coefs")  # modules that Gemma 3n cannot quantise
MASKED = ("minimax_m3_vl_text",)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # all but Llama 4's router


def method(model_type: str, kind: str) -> dict[str, Any]:
    """Return a method that peft and bitsandbytes support for the family."""
    asked: dict[str, Any] = {"kind": kind}
    if kind != "full" and model_type.startswith("llama4"):
        asked["targets"] = LINEAR
    if kind == "qlora" and model_type == "gemma3n_text":
        asked["quantization"] = {"skip": SMALL}
    return asked


def runs(names: list[str], layers: int, sequence: int) -> Iterator[tuple[str, RunSpec]]:
    for name in names:
        config = TINY[name] if name in TINY else config_of(name, layers)
        plain = product(("full", "lora", "qlora"), ("none", "full"), ("sdpa",), ("bf16",))
        more = (("full", "none", "eager", "bf16"), ("lora", "full", "sdpa", "fp32"), ("full", "none", "sdpa", "amp"))
        masked = (("full", "none", "sdpa_math", "bf16", False), ("lora", "full", "sdpa_math", "bf16", True))
        every = [(*asked, False) for asked in (*plain, *(() if layers else more))]
        every += masked if name in MASKED else ()
        for kind, checkpointing, attention, precision, padded in every:
            yield (
                f"{name}-{kind}",
                RunSpec(
                    model={"config": config},
                    method=method(config["model_type"], kind),
                    batch={"micro": 1 if layers else 2, "sequence": sequence},
                    precision=precision,
                    kernels={"checkpointing": checkpointing, "attention": attention},
                    loop={"padded": padded},
                    gpu="a100-sxm-80gb",
                ),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", help="model_types of tests/tiny.py, configs of tests/tiny_towers.py, cards")
    parser.add_argument("--layers", type=int, default=0, help="trace only the first layers of a card")
    parser.add_argument("--sequence", type=int, default=256)
    asked = parser.parse_args()
    wanted = list(runs(asked.names, asked.layers, asked.sequence))
    write(wanted)


if __name__ == "__main__":
    main()
