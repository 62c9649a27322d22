"""Trace steps of TRL's trainers other than SFT, and print rows for tests/estimate/test_preference.py.

python -m venv /tmp/trl
/tmp/trl/bin/pip install trl==1.16.0 transformers==5.24.0 peft==0.21.2 bitsandbytes==0.50.2 'torch==2.13.*' pydantic
/tmp/trl/bin/python tests/golden/trace_preference.py trl-1.15 dpo traced_preference.jsonl >> /tmp/rows.jsonl

The profile is that of the installed TRL. Runs with a row in a file that is given are not traced again. Every run is
traced for DPO with three releases, every fourth with others and for other trainers. A row is what
`memplan probe --trace` traces: the trainer makes its reference model, computes its loss on a batch as its collator
makes it, and steps. With `ms-swift-4.6` and dpo, kto, orpo, cpo, simpo, reward or gkd it is ms-swift's own, with
`llamafactory-0.9.5` and dpo, kto, orpo, simpo or reward LLaMA-Factory's, with the packages of trace_trainers.py.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.catalogue.kernels.wiring import DISTILLING
from memplan.probe.run import child
from memplan.probe.run.trace import read
from memplan.spec.run import RunSpec
from tests.golden.trace_runs import line
from tests.golden.trace_trainers import BF16, CONFIGS, FP32, SCRIPTS, prepare, traced

SWIFT, FACTORY = "ms-swift-4.6", "llamafactory-0.9.5"
_STEPS = dict.fromkeys(
    (*((name, "dpo") for name in ("trl-1.15", "trl-1.13", "trl-0.24", SWIFT)), (FACTORY, "reward")), 1
)
WITH_REFERENCE = ("dpo", "kto")
# Family, method, precision, examples and tokens; then the reference and what differs from the trainer's defaults.
CASES: tuple[tuple[str, str, dict[str, Any], int, int, str | None, dict[str, Any]], ...] = (
    ("llama", "full", FP32, 1, 1024, None, {}),
    ("llama", "full", BF16, 2, 1024, None, {}),
    ("llama", "full", BF16, 1, 512, "precomputed", {}),
    ("llama", "full", BF16, 4, 2048, "precomputed", {"checkpointing": "none"}),
    ("llama", "lora", BF16, 2, 1024, None, {}),
    ("llama", "lora", BF16, 1, 4096, "precomputed", {}),
    ("llama", "lora", FP32, 2, 1024, None, {}),
    ("llama", "qlora", BF16, 2, 1024, None, {}),
    ("llama", "qlora", BF16, 1, 2048, "precomputed", {}),
    ("tied", "full", FP32, 2, 1024, None, {}),
    ("tied", "lora", BF16, 2, 2048, None, {"checkpointing": "none"}),
    ("qwen2", "full", BF16, 1, 2048, None, {}),
    ("qwen2", "lora", BF16, 2, 2048, None, {}),
    ("qwen2", "qlora", BF16, 2, 1024, None, {}),
    ("mistral", "full", BF16, 2, 2048, None, {}),
    ("mistral", "lora", BF16, 4, 1024, None, {}),
    ("mistral", "qlora", BF16, 1, 4096, None, {}),
    ("gemma2", "full", BF16, 1, 1024, None, {}),
    ("gemma2", "lora", BF16, 2, 1024, None, {}),
    ("gemma2", "qlora", BF16, 1, 2048, None, {}),
    ("blocks", "full", BF16, 2, 4096, None, {}),
    ("blocks", "full", FP32, 2, 2048, None, {}),
    ("blocks", "full", BF16, 2, 2048, "precomputed", {"checkpointing": "none"}),
    ("blocks", "lora", BF16, 2, 4096, None, {}),
    ("blocks", "lora", BF16, 2, 2048, None, {"checkpointing": "none"}),
    ("blocks", "qlora", BF16, 2, 4096, None, {}),
)

# With Liger's loss of DPO and KTO, whose compiled part memplan.probe.script.trl_losses.compiled_pair stands for.
FUSED = ("trl-1.14", "trl-1.13", "trl-1.10", "trl-1.6", "trl-0.24")
FUSED_CASES: tuple[tuple[str, str, dict[str, Any], int, int, str | None, dict[str, Any]], ...] = (
    ("llama", "full", BF16, 2, 1024, None, {}),
    ("llama", "full", FP32, 1, 1024, None, {}),
    ("tied", "lora", BF16, 2, 1024, None, {}),
    ("qwen2", "qlora", BF16, 4, 512, None, {}),
    ("mistral", "lora", FP32, 2, 512, None, {}),
    ("blocks", "full", BF16, 2, 4096, None, {"checkpointing": "none"}),
    ("blocks", "lora", BF16, 4, 2048, None, {}),
)

# With `padding_free` of TRL 0.24.
JOINED: tuple[tuple[str, str, dict[str, Any], int, int, str | None, dict[str, Any]], ...] = (
    ("llama", "full", BF16, 2, 512, None, {"attention": "flash_attention_2"}),
    ("qwen2", "qlora", BF16, 1, 1024, None, {}),
    ("blocks", "lora", BF16, 2, 2048, None, {"attention": "flash_attention_2", "checkpointing": "none"}),
)

# On four GPUs, under each of these strategies.
STRATEGIES = ("ddp", "fsdp", "fsdp2")
PACKED = ("binpack", "padding_free")
DIVIDED: tuple[tuple[str, str, dict[str, Any], int, int, str | None, dict[str, Any]], ...] = (
    ("llama", "full", BF16, 2, 1024, None, {}),
    ("blocks", "full", BF16, 2, 2048, None, {}),
    ("llama", "lora", BF16, 2, 1024, None, {}),
    ("tied", "full", FP32, 2, 1024, None, {}),
    ("qwen2", "full", BF16, 2, 2048, "precomputed", {"checkpointing": "none"}),
)
_DIVIDED_STEPS = dict.fromkeys(
    (("trl-1.15", "dpo"), ("trl-1.13", "dpo"), ("trl-0.24", "dpo"), ("trl-1.15", "kto"), ("trl-1.15", "reward")), 2
)


EXPERTS = {
    **CONFIGS["qwen3"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": 6,
    "moe_intermediate_size": 768,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


def teachers(family: str, method: str, kind: str = "") -> dict[str, Any]:
    """Return the roles of a run that learns from a teacher: a wider and deeper model, in 4 bits for every qlora, with
    a larger vocabulary or with experts."""
    if kind == "experts":
        return {"teacher": {"model": {"config": EXPERTS}}}
    config = {**CONFIGS[family], "hidden_size": 1536, "num_hidden_layers": 6, "intermediate_size": 4096}
    config["vocab_size"] += 640 * (kind == "words")
    stored = {"quantization": {"format": "nf4"}} if method == "qlora" else {}
    return {"teacher": {"model": {"config": config}, **stored}}


# With an evaluation after the steps: profile, trainer, family, method, examples and tokens.
EVALUATED = (
    ("trl-1.15", "dpo", "llama", "full", 2, 1024),
    ("trl-1.15", "kto", "blocks", "full", 2, 1024),
    ("trl-1.15", "reward", "blocks", "full", 2, 1024),
    ("trl-1.15", "orpo", "llama", "lora", 2, 1024),
    ("trl-1.13", "dpo", "llama", "lora", 2, 1024),
    ("trl-1.15", "gkd", "llama", "full", 2, 512),
    ("trl-1.15", "gkd", "blocks", "lora", 2, 512),
)


def divided(strategy: str) -> dict[str, Any]:
    """Return the parallelism of four ranks. Where weights are loaded changes no step."""
    loads = {} if strategy == "ddp" else {"cpu_ram_efficient_loading": False}
    return {"world": 4, "dp": 4, "strategy": strategy, **loads}


def runs(profile: str, trainer: str) -> Iterator[tuple[str, RunSpec]]:
    """Yield the runs of `CASES` under a profile and a trainer, and those of `DIVIDED` under every strategy."""
    cases = [(case, "") for case in CASES[:: _STEPS.get((profile, trainer), 4)]]
    cases += [
        (case, strategy) for case in DIVIDED[:: _DIVIDED_STEPS.get((profile, trainer), 9)] for strategy in STRATEGIES
    ]
    cases += [
        ((family, method, BF16, micro, tokens, None, {}), "evaluated")
        for version, name, family, method, micro, tokens in EVALUATED
        if (version, name) == (profile, trainer)
    ]
    cases += [(("qwen3", "full", BF16, 2, 512, None, {}), "experts")] * (trainer in DISTILLING)
    cases += [(("llama", "lora", BF16, 2, 1024, None, {}), "dropout")] * (profile == "trl-1.10")
    cases += [(case, "padding_free") for case in JOINED if (trainer, profile) == ("dpo", "trl-0.24")]
    if trainer in ("dpo", "kto") and profile in FUSED:  # TRL 0.24 fails under adapters, and KTO of 1.6 refuses them
        older = ("trl-0.24", "trl-1.6")
        fused = [case for case in FUSED_CASES if case[1] == "full" or profile not in older]
        cases += [((*case[:-1], {**case[-1], "loss": "fused"}), "fused") for case in fused]
    if (profile, trainer) == (SWIFT, "gkd"):
        flash = {"attention": "flash_attention_2"}
        cases += [(("llama", "lora", BF16, 2, 256, None, {}), "words")]
        cases += [(("llama", "full", BF16, 2, 1024, None, flash), kind) for kind in PACKED]
    for (family, method, precision, examples, tokens, said, kernels), strategy in cases:
        micro = max(examples, 2) if trainer == "kto" and profile.startswith("trl") else examples
        if profile == SWIFT and (precision == FP32 or said):
            continue  # it loads weights in bf16, and precomputes nothing
        if trainer in DISTILLING and (said == "precomputed" or (profile == SWIFT and strategy.startswith("fsdp"))):
            continue  # FSDP divides ms-swift's teacher
        if profile == FACTORY and (said or (method, precision) == ("full", BF16) or family == "gemma2" or strategy):
            continue  # it casts trained weights to fp32, and runs gemma2 with other attention
        if (profile, trainer, method, precision) == (FACTORY, "reward", "lora", FP32):
            continue  # it loads frozen weights in bf16, and the graph of unread logits keeps no cast of their head
        reference = said if trainer in WITH_REFERENCE else None
        words = [reference or "", *(["plain"] if kernels.get("checkpointing") == "none" else ()), strategy]
        also = {"evaluation": {"micro": 4}} if strategy == "evaluated" else {}
        targets = {} if method == "full" else {"targets": ["q_proj", "v_proj", "down_proj"]}
        targets |= {"dropout": 0.05} if strategy == "dropout" else {}
        name = f"{profile} {trainer} {family} {method} {precision['weights']} {micro}x{tokens} {' '.join(words)}"
        yield (
            " ".join(name.split()),
            RunSpec.model_validate(
                {
                    "model": {"config": CONFIGS[family]},
                    "trainer": trainer,
                    "reference": reference,
                    "roles": teachers(family, method, strategy) if trainer in DISTILLING else {},
                    "method": {"kind": method, **targets},
                    "precision": precision,
                    "batch": {"micro": micro, "sequence": tokens, "packing": strategy if strategy in PACKED else None},
                    "kernels": kernels,
                    "parallelism": divided(strategy) if strategy in STRATEGIES else {},
                    "also": also,
                    "profile": profile,
                }
            ),
        )


def _traced(name: str, run: RunSpec) -> dict[str, Any]:
    found = read(run, child._answer(run, 2, "cuda", False))
    return {**line(name, run, found), "versions": ", ".join(f"{k} {v}" for k, v in found.versions.items())}


def main(runs: Callable[[str, str], Iterator[tuple[str, RunSpec]]] = runs) -> None:
    profile, trainer, *files = sys.argv[1:]
    output, sys.stdout = sys.stdout, sys.stderr  # trainers print, too
    done = {json.loads(row).get("name") for file in files for row in Path(file).read_text("utf-8").splitlines()}
    framework = profile.rpartition("-")[0]
    if framework != "trl":
        prepare(SCRIPTS[framework])
    for name, run in runs(profile, trainer):
        if name in done:
            continue
        process = os.fork()  # trainers patch classes, as long as their process lasts
        if process:
            os.waitpid(process, 0)
            continue
        try:
            row = _traced(name, run) if framework == "trl" else traced(name, run, profile.replace("-", " "))
            print(json.dumps(row), file=output, flush=True)
        except Exception:
            print(name, traceback.format_exc(), file=sys.stderr, flush=True)
        os._exit(0)


if __name__ == "__main__":
    main()
