"""A short run of the fuzzer, with the same cases in each run of the suite; a failure prints the command that shows it.

`python -m benchmarks.fuzz 10000 --seed N` draws others by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import pytest

from benchmarks import fuzz
from benchmarks.sweep import Failure
from memplan import MemplanError, RunSpec, estimate
from tests.sampling import examples

PARTS = 4
SEED = 1


@pytest.mark.parametrize("part", range(PARTS))
def test_no_random_case_fails(part: int) -> None:
    shown: list[str] = []
    size = examples(60)
    for index, kind, value in fuzz.cases(size, SEED, part * size):
        failures = [failure for failure in fuzz.failures_of(kind, value)[0] if failure.kind not in ("hangs", "memory")]
        shown += [f"seed {SEED}, case {index}: {failure}\n{fuzz.KINDS[kind].command(value)}" for failure in failures]
    assert not shown, "\n".join(shown)


_TORCHRUN = "torchrun --nproc_per_node 2 train.py --per_device_train_batch_size 2 --fsdp full_shard"

# Cases that failed once, as the fuzzer made them small.
_TINY = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 1}
FAILED: tuple[tuple[str, fuzz.Value], ...] = (
    # An answer named what its engine refuses: a rank of adapters without slots, a share of the card.
    *(
        ("runs", {"task": "generate", "profile": name, "model": "qwen2-0.5b"})
        for name in ("sglang", "tgi", "llama.cpp")
    ),
    # The profile's loss holds no logits, which was only said of a run that names this loss.
    ("runs", {"profile": "unsloth", "model": "smolvlm-256m", "also": {"evaluation": {"kept_batches": 8}}}),
    # Unsloth trains experts in mxfp4, whose products in generation were sought among matrices in 16 bits.
    (
        "runs",
        {
            "model": "gpt-oss-20b",
            "method": "lora",
            "profile": "unsloth-2026.10",
            "trainer": "grpo",
            "batch": {"micro": 2, "sequence": 32, "new_tokens": 8, "generations": 2},
        },
    ),
    # The logits that come back to the first GPU were sought among the layers' inputs in host memory, too.
    (
        "runs",
        {"model": "mistral-7b-v0.1", "parallelism": {"world": 2, "pp": 2}, "kernels": {"checkpointing": "offload"}},
    ),
    ("runs", {"model": {"config": {"model_type": "t5", "d_model": 64, "architectures": ["\x1b["]}}}),
    # A table of no positions was divided among ranks.
    (
        "runs",
        {
            "parallelism": {"strategy": "fsdp2"},
            "model": {
                "config": {
                    "model_type": "aya_vision",
                    "text_config": {"vocab_size": 1},
                    "vision_config": {"image_size": 1},
                }
            },
        },
    ),
    ("runs", {"task": "generate", "profile": "tgi-3", "gpu": "rtx-2080-super", "model": "qwen2-vl-2b"}),
    ("runs", {"model": "gemma-3-4b", "parallelism": {"tp": 2}, "optimizer": {"name": "x" * 3000}}),  # said in full
    ("configs", {"config": {"model_type": "deberta-v2", "relative_attention": True, "pos_att_type": 1}, "run": {}}),
    (  # took 8 s
        "configs",
        {
            "config": {
                "model_type": "deepseek_v4",
                "hc_sinkhorn_iters": 10_000,
                "num_hidden_layers": 4,
                "hidden_size": 4096,
                "num_attention_heads": 64,
                "vocab_size": 129280,
            },
            "run": {},
        },
    ),
    # A gated MLP with dropout before its last layer was taken for one that is a single function.
    (
        "runs",
        {
            "model": "gte-multilingual-base",
            "method": {"kind": "lora", "dropout": 0.1},
            "kernels": {"fused": ["lora"]},
            "batch": {"sequence": 64},
        },
    ),
    ("files", {"words": ["train.py"], "files": {"train.py": "r-0for-0"}}),
    ("configs", {"config": {"model_type": "glm_moe_dsa", "q_lora_rank": 0, "vocab_size": 1}, "run": {}}),
    # A key of a script's arguments was printed with its control characters.
    # A merge so wide that a video has no token, adapters larger than the model, and a value repeated at full length.
    (
        "runs",
        {
            "task": "generate",
            "profile": "vllm",
            "model": {
                "config": {
                    "model_type": "qwen3_vl_moe",
                    "text_config": {**_TINY, "num_attention_heads": 16},
                    "vision_config": {"spatial_merge_size": 512},
                }
            },
        },
    ),
    ("runs", {"method": "lora", "model": {"config": {**_TINY, "model_type": "solar_open"}}}),
    (
        "runs",
        {
            "model": {
                "config": {**_TINY, "model_type": "deberta-v2", "relative_attention": True, "norm_rel_ebd": ["x"] * 999}
            }
        },
    ),
    (
        "files",
        {"words": ["t.sh"], "files": {"t.sh": f"{_TORCHRUN} --model_name_or_path Qwen/Qwen2-0.5B --\0bf16 True\n"}},
    ),
    (
        "files",
        {
            "words": ["plan", "t.sh", "--gpu", "3090"],
            "files": {"t.sh": f"{_TORCHRUN} --model_name_or_path qwen2-0.5b --per_d\0path 1\n"},
        },
    ),
    ("files", {"words": ["l.yaml"], "files": {"l.yaml": "finetuning_typ-0.0: lora\nper_device_train_batch_size: 2\n"}}),
)


@pytest.mark.parametrize(("kind", "value"), FAILED)
def test_what_failed_once_does_not_fail(kind: str, value: fuzz.Value) -> None:
    failures, is_refused = fuzz.failures_of(kind, value)
    if kind == "runs" and not is_refused:
        failures += fuzz.check_json(estimate(RunSpec.model_validate(value)))
    assert failures == []


def test_a_failure_is_shown_with_the_smallest_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(value: fuzz.Value) -> list[Failure]:
        return [Failure("law", "nine")] if 9 in value.get("sizes", []) else []

    monkeypatch.setitem(fuzz.KINDS, "runs", fuzz.KINDS["runs"]._replace(check=check))  # type: ignore[arg-type]
    case = {"model": "x", "sizes": [1, 2, 9, 4], "batch": {"micro": 8}}
    assert fuzz.shrunk("runs", case, Failure("law", "nine", "detail")) == {"sizes": [9]}


def test_crashes_hangs_and_unclear_errors_are_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    def kinds(work: Callable[[], object]) -> list[str]:
        def check(_: fuzz.Value) -> Iterator[Failure]:
            work()
            yield from ()

        monkeypatch.setitem(fuzz.KINDS, "runs", fuzz.KINDS["runs"]._replace(check=check))  # type: ignore[arg-type]
        return [failure.kind for failure in fuzz.failures_of("runs", {}, 0.05)[0]]

    def refuse(message: str, field: str) -> Callable[[], object]:
        def work() -> None:
            raise MemplanError(message, field)

        return work

    assert kinds(lambda: None) == []
    assert kinds(lambda: 1 / 0) == ["crashes"]
    assert kinds(lambda: sum(1 for _ in count())) == ["hangs"]
    assert kinds(refuse("model: unknown", "model")) == []
    assert kinds(refuse("unknown", "")) == ["message"]
    assert kinds(refuse(f"model: {'x' * 1000}", "model")) == ["message"]


def test_output_that_no_command_should_have_is_a_failure() -> None:
    def kinds(code: int, out: str, err: str = "") -> set[str]:
        return {failure.kind for failure in fuzz.output_failures(["qwen2-0.5b", "--json"], code, out, err)}

    assert kinds(0, '{"a": 1}') == set()
    assert kinds(0, '{"a": NaN}') == kinds(0, "") == kinds(7, "{}") == kinds(0, '"\x1b[31m"') == {"output"}
    assert kinds(2, "", "memplan: model: unknown name 'x'") == set()
    assert kinds(2, "", "memplan: wrong\nmemplan: again") == {"message"}
    assert "crashes" in kinds(1, "", "Traceback (most recent call last):")
