"""Trace steps with the masks of an older transformers, and print rows for tests/catalogue/test_profiles.py.

python tests/golden/trace_versions.py transformers-4.51 >> tests/golden/traced_versions.jsonl

Run it in an environment with that version of transformers, torch 2.13 and peft. It traces padded batches, and sequences
longer than a window without padding. If rows are not a multiple of 8, the kernel pads every layer's mask.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.core.errors import MemplanError
from memplan.probe.run.trace import traces
from memplan.spec.run import RunSpec
from tests.golden.trace_runs import line

SIZES = {
    "hidden_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1408,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}
WINDOWS = {"mistral": 128, "phi3": 128, "starcoder2": 128}
FAMILIES = ("llama", "mistral", "qwen2", "phi3", "starcoder2", "gpt_neox")
# Until 4.45 every layer of Mistral, Phi-3 and StarCoder 2 computed its own rotary tables, and GPT-NeoX copied no heads
# for a mask: neither is modelled yet.
UNTIL_4_45 = ("llama", "qwen2")


def runs(profile: str) -> Iterator[tuple[str, RunSpec]]:
    for family in UNTIL_4_45 if profile == "transformers-4.45" else FAMILIES:
        config = {"model_type": family, **SIZES, "sliding_window": WINDOWS.get(family)}
        ways = [(True, 512, "full", "none")]
        ways += [(True, 500, "lora", "full")] if family != "starcoder2" else []  # which is not checkpointed
        ways += [(False, 512, "full", "none")] if family in WINDOWS else []
        for padded, sequence, method, checkpointing in ways:
            version, masked = profile.rpartition("-")[2], "padded" if padded else "window"
            yield (
                f"{version} {family} {method} bf16 {masked} {sequence}",
                RunSpec.model_validate(
                    {
                        "model": {"config": config},
                        "method": {"kind": method},
                        "precision": {"weights": "bf16"},
                        "optimizer": "adamw_torch_fused",
                        "batch": {"micro": 2, "sequence": sequence},
                        "kernels": {"attention": "sdpa", "checkpointing": checkpointing, "reentrant": False},
                        "loop": {"padded": padded},
                        "profile": profile,
                    }
                ),
            )


def main() -> None:
    import peft
    import transformers

    versions: Any = f"transformers {transformers.__version__}, peft {peft.__version__}"
    wanted = list(runs(sys.argv[1]))
    for (name, run), traced in zip(wanted, traces([run for _, run in wanted]), strict=True):
        if isinstance(traced, MemplanError):
            print(f"{name}: {traced}", file=sys.stderr)
        else:
            print(json.dumps({**line(name, run, traced), "versions": versions}), flush=True)


if __name__ == "__main__":
    main()
