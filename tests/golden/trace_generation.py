"""Trace steps of TRL's trainers that generate, and print rows for tests/estimate/test_generation.py.

As tests/golden/trace_preference.py, with the same packages: every row is a step of GRPO or RLOO, generation included.

/tmp/trl/bin/python tests/golden/trace_generation.py trl-1.15 grpo traced_generation.jsonl >> /tmp/rows.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.catalogue.kernels.wiring import DISTILLING
from memplan.spec.run import RunSpec
from tests.golden.trace_preference import STRATEGIES, divided, main, teachers
from tests.golden.trace_trainers import BF16, CONFIGS, FP32

# Family, method, precision; completions of a micro-batch, tokens of a prompt and of a completion, completions of a
# prompt, micro-batches; the reference and what differs from the trainer's defaults.
CASES: tuple[tuple[str, str, dict[str, Any], tuple[int, int, int, int, int], str, dict[str, Any]], ...] = (
    ("llama", "full", BF16, (4, 256, 64, 4, 1), "none", {}),
    ("llama", "full", BF16, (4, 256, 16, 4, 1), "copy", {}),
    ("llama", "full", FP32, (2, 512, 8, 4, 2), "none", {}),
    ("llama", "full", BF16, (1, 1024, 24, 2, 2), "none", {"checkpointing": "none"}),
    ("llama", "lora", BF16, (4, 256, 16, 4, 1), "none", {}),
    ("llama", "lora", BF16, (8, 512, 12, 8, 1), "adapters", {}),
    ("llama", "lora", FP32, (2, 256, 16, 4, 2), "none", {}),
    ("llama", "qlora", BF16, (4, 512, 16, 4, 1), "none", {}),
    ("llama", "qlora", BF16, (4, 256, 8, 8, 4), "adapters", {}),
    ("tied", "full", BF16, (4, 128, 16, 4, 2), "none", {}),
    ("tied", "lora", FP32, (2, 256, 12, 2, 1), "adapters", {"checkpointing": "none"}),
    ("qwen2", "full", BF16, (2, 512, 16, 2, 1), "copy", {}),
    ("qwen2", "lora", BF16, (8, 256, 16, 8, 1), "none", {}),
    ("qwen2", "qlora", BF16, (1, 1024, 16, 4, 4), "none", {}),
    ("mistral", "full", BF16, (4, 512, 16, 4, 1), "none", {}),
    ("mistral", "lora", BF16, (8, 1024, 8, 8, 1), "adapters", {}),
    ("gemma2", "full", BF16, (2, 256, 16, 4, 2), "none", {}),
    ("gemma2", "lora", BF16, (4, 512, 12, 4, 1), "none", {}),
    ("blocks", "full", BF16, (8, 1024, 16, 8, 1), "none", {}),
    ("blocks", "full", FP32, (4, 1024, 16, 4, 1), "copy", {}),
    ("blocks", "lora", BF16, (16, 512, 16, 16, 1), "none", {"checkpointing": "none"}),
    ("blocks", "qlora", BF16, (8, 1024, 16, 8, 1), "adapters", {}),
)


# On four GPUs, under each strategy.
DIVIDED: tuple[tuple[str, str, dict[str, Any], tuple[int, int, int, int, int], str, dict[str, Any]], ...] = (
    ("llama", "full", BF16, (4, 256, 16, 4, 1), "copy", {}),
    ("blocks", "full", BF16, (2, 512, 8, 4, 2), "none", {}),
    ("blocks", "lora", BF16, (4, 512, 8, 4, 1), "adapters", {}),
)
# With a reward model on the GPU, of another size than the policy.
REWARDED: tuple[tuple[str, str, dict[str, Any], tuple[int, int, int, int, int], str, dict[str, Any]], ...] = (
    ("llama", "full", BF16, (4, 256, 16, 4, 2), "none", {}),
    ("tied", "lora", FP32, (4, 512, 8, 4, 1), "adapters", {}),
    ("blocks", "qlora", BF16, (8, 1024, 8, 8, 1), "none", {}),
    ("qwen2", "lora", BF16, (8, 256, 8, 8, 1), "none", {}),
)
# With an evaluation on twice as many completions after the steps; the first also on four GPUs.
EVALUATED: tuple[tuple[str, str, dict[str, Any], tuple[int, int, int, int, int], str, dict[str, Any]], ...] = (
    ("llama", "full", BF16, (4, 256, 12, 4, 1), "copy", {}),
    ("blocks", "lora", BF16, (4, 512, 8, 4, 2), "adapters", {}),
    ("qwen2", "qlora", BF16, (4, 256, 8, 4, 1), "none", {}),
)
# Under PPO, whose reward and value models are like the policy unless they are `rewarded`.
PURE = {"weights": "bf16"}
PPO: tuple[tuple[str, str, dict[str, Any], tuple[int, int, int, int, int], str, dict[str, Any]], ...] = (
    ("llama", "full", BF16, (4, 256, 64, 1, 1), "none", {}),
    ("llama", "full", PURE, (2, 512, 16, 1, 2), "none", {}),
    ("llama", "full", FP32, (2, 256, 8, 1, 2), "none", {}),
    ("llama", "full", PURE, (1, 1024, 24, 1, 1), "none", {}),
    ("llama", "lora", BF16, (4, 256, 16, 1, 1), "none", {}),
    ("llama", "lora", PURE, (2, 512, 12, 1, 4), "none", {}),
    ("llama", "lora", FP32, (2, 256, 16, 1, 2), "copy", {}),
    ("llama", "lora", PURE, (12, 32, 4, 1, 6), "none", {}),
    ("llama", "qlora", PURE, (4, 512, 16, 1, 1), "none", {}),
    ("llama", "qlora", PURE, (4, 256, 8, 1, 2), "none", {}),
    ("tied", "full", BF16, (4, 128, 16, 1, 2), "none", {}),
    ("tied", "lora", FP32, (2, 256, 12, 1, 1), "none", {}),
    ("qwen2", "full", PURE, (2, 512, 16, 1, 1), "none", {}),
    ("qwen2", "lora", BF16, (8, 256, 16, 1, 1), "none", {}),
    ("qwen2", "qlora", PURE, (1, 1024, 16, 1, 4), "none", {}),
    ("mistral", "full", BF16, (4, 512, 16, 1, 1), "none", {}),
    ("mistral", "lora", PURE, (8, 512, 8, 1, 1), "none", {}),
    ("gemma2", "full", BF16, (2, 256, 16, 1, 2), "none", {}),
    ("gemma2", "lora", BF16, (4, 256, 12, 1, 1), "none", {}),
    ("blocks", "full", BF16, (8, 512, 16, 1, 1), "none", {}),
    ("blocks", "full", FP32, (4, 512, 16, 1, 1), "none", {}),
    ("blocks", "lora", PURE, (16, 512, 16, 1, 1), "none", {}),
    ("blocks", "qlora", PURE, (8, 512, 16, 1, 1), "none", {}),
)
# With adapters on the value model, as ms-swift adds them, whose dropout the trainer turns off.
ADAPTED: tuple[tuple[str, str, dict[str, Any], tuple[int, int, int, int, int], str, dict[str, Any]], ...] = (
    ("llama", "lora", BF16, (4, 256, 16, 1, 1), "none", {}),
    ("llama", "lora", PURE, (2, 512, 12, 1, 2), "none", {}),
    ("tied", "lora", FP32, (2, 256, 12, 1, 1), "none", {}),
    ("qwen2", "qlora", PURE, (2, 512, 16, 1, 2), "none", {}),
    ("gemma2", "lora", PURE, (2, 256, 8, 1, 1), "copy", {}),
    ("blocks", "lora", BF16, (8, 512, 16, 1, 1), "none", {}),
    ("blocks", "qlora", PURE, (8, 512, 16, 1, 1), "none", {}),
)
# On four GPUs under DDP: its generation fails under FSDP.
PPO_DIVIDED: tuple[tuple[str, str, dict[str, Any], tuple[int, int, int, int, int], str, dict[str, Any]], ...] = (
    ("llama", "full", BF16, (4, 256, 16, 1, 1), "none", {}),
    ("blocks", "full", PURE, (2, 512, 8, 1, 2), "none", {}),
    ("llama", "lora", BF16, (4, 256, 8, 1, 2), "copy", {}),
    ("tied", "full", FP32, (2, 256, 8, 1, 2), "none", {}),
    ("blocks", "lora", PURE, (8, 512, 8, 1, 1), "copy", {}),
    ("mistral", "qlora", PURE, (4, 256, 8, 1, 1), "copy", {}),
)
# With a teacher on a server.
SERVED: tuple[tuple[str, str, dict[str, Any], tuple[int, int, int, int, int], str, dict[str, Any]], ...] = (
    ("llama", "full", BF16, (2, 64, 64, 1, 2), "none", {}),
    ("tied", "lora", FP32, (4, 64, 32, 1, 1), "none", {}),
)
_LIGER = {"trl-1.13": CASES[::2], "trl-1.10": CASES[1:14:6], "trl-1.6": CASES[1:14:6]}
# With `entropy_coef`; later kernels keep nothing for its gradient.
_BONUS = {"trl-1.15": CASES[1:2], "trl-1.14": CASES[1:2], "trl-1.13": CASES[2::4], "trl-1.10": CASES[1::7]}
_ALL = (("trl-1.15", "grpo"), ("trl-1.14", "grpo"), ("trl-1.13", "grpo"))


def scorer(family: str) -> dict[str, Any]:
    """Return the roles of a run whose completions a model of the family scores: twice as wide, of eight layers."""
    config = {**CONFIGS[family], "hidden_size": 2048, "num_hidden_layers": 8, "intermediate_size": 5632}
    return {"reward": {"model": {"config": config}}}


def runs(profile: str, trainer: str) -> Iterator[tuple[str, RunSpec]]:
    """Yield the runs of `CASES` under a profile and a trainer; every second of them where others are traced in full."""
    cases = CASES if (profile, trainer) in _ALL else CASES[1::2]
    cases = [*((case, "") for case in cases), *((case, strategy) for case in DIVIDED for strategy in STRATEGIES)]
    cases += [
        (case, "rewarded") for case in REWARDED[:: 1 if profile == "trl-1.15" else 2] if trainer not in DISTILLING
    ]
    cases += [(case, "evaluated") for case in EVALUATED[:: 1 if profile == "trl-1.15" else 3]]
    if (profile, trainer) == ("trl-1.15", "grpo"):
        cases += [(EVALUATED[0], f"evaluated {strategy}") for strategy in STRATEGIES]
    if trainer == "grpo" and profile in _LIGER:  # Liger's loss, in the releases that have it
        cases += [(case, "liger") for case in _LIGER[profile]]
        if profile != "trl-1.6":
            cases += [(case, f"{strategy} liger") for case in DIVIDED[:1] for strategy in STRATEGIES[1:]]
    if trainer == "grpo" and profile in _BONUS:
        cases += [(case, "bonus") for case in _BONUS[profile]]
    if trainer == "ppo":
        cases = [
            *((case, "") for case in PPO[:: {"trl-1.10": 1, "trl-0.24": 2}.get(profile, 3)]),
            *((case, "rewarded") for case in REWARDED),
            *((case, "adapted") for case in (ADAPTED if profile == "trl-1.10" else ())),
            *((case, "ddp") for case in PPO_DIVIDED[:: 1 if profile == "trl-1.10" else 3]),
            *((case, "evaluated") for case in PPO[:: {"trl-1.10": 5, "trl-0.24": 9}.get(profile, 11)]),
        ]
    if trainer in DISTILLING:
        cases += [(("qwen3", "full", BF16, (2, 512, 8, 1, 1), "none", {}), "experts")]
        cases += [(case, "server") for case in SERVED]
        cases += [(("llama", method, FP32, (4, 256, 8, 1, 1), "none", {}), "") for method in ("full", "lora")]
    for (family, method, said, (micro, prompt, new, group, parts), reference, kernels), how in cases:
        strategy = how.removeprefix("evaluated ").removesuffix(" liger")
        precision = PURE if (trainer, method) == ("ppo", "qlora") else said  # which fails under autocast
        words = [reference, *(["plain"] if kernels.get("checkpointing") == "none" else ()), how]
        targets = {} if method == "full" else {"targets": ["q_proj", "v_proj", "down_proj"]}
        targets |= {"dropout": 0.05} if how == "adapted" else {}
        distills = trainer in DISTILLING
        if distills and reference != "none":
            continue
        batch = {"micro": micro, "sequence": prompt, "new_tokens": new, "accumulation": parts}
        batch |= {"generations": 1 if distills or trainer == "ppo" else group}
        shape = f"{micro}x({prompt}+{new}) {parts} parts"
        dtype = precision["weights"] if precision.get("autocast") else f"pure {precision['weights']}"
        name = f"{profile} {trainer} {family} {method} {dtype} {shape} {' '.join(words)}"
        yield (
            name.strip(),
            RunSpec.model_validate(
                {
                    "model": {"config": CONFIGS[family]},
                    "trainer": trainer,
                    "reference": None if distills or (trainer, reference) == ("ppo", "none") else reference,
                    "roles": {"teacher": {"model": {"config": CONFIGS[family]}, "location": "server"}}
                    if strategy == "server"
                    else teachers(family, method, strategy)
                    if distills
                    else scorer(family)
                    if strategy == "rewarded"
                    else {
                        role: {"model": {"config": CONFIGS[family]}, **own}
                        for role, own in (("reward", {}), ("value", {"method": {"kind": method, **targets}}))
                        if role == "reward" or strategy == "adapted"
                    }
                    if trainer == "ppo"
                    else {},
                    "method": {"kind": method, **targets},
                    "precision": precision,
                    "batch": batch,
                    "kernels": {**kernels, **({"loss": "fused"} if how.endswith("liger") else {})},
                    "loop": {"entropy_bonus": how == "bonus"},
                    "parallelism": divided(strategy) if strategy in STRATEGIES else {},
                    "also": {"evaluation": {"micro": 2 * micro}} if how.startswith("evaluated") else {},
                    "profile": profile,
                }
            ),
        )


if __name__ == "__main__":
    main(runs)
