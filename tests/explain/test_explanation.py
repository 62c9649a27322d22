"""Explanations of messages: the tensor, the owners, the run's part, and never more than is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import memplan
from benchmarks import messages
from memplan.core.units import GIB, MIB, gib
from memplan.estimate.estimate import walk
from memplan.estimate.training import TrainingWalk
from memplan.explain.findings import ASKED, CHANGE, EXPECTED, HELD, LIKELY, SURE, WHOSE, Explanation
from memplan.explain.message import Amount
from memplan.explain.requests import requests
from memplan.explain.tensors import says_nothing, tensors_behind
from memplan.program import graph

LOGITS = messages.TRACEBACK + messages.TORCH + "\n"


def message(request: str, total: str = "14.56 GiB", free: str = "1.00 GiB", more: str = "") -> str:
    return (
        f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {request}. GPU 0 has a total capacity of "
        f"{total} of which {free} is free. {more}\n"
    )


def texts(found: Explanation, question: str) -> str:
    return "\n".join(f"{f.certainty}: {f.text} ({f.why})" for f in found.of(question))


def test_logits_are_found_with_the_length_of_the_batch_that_asked() -> None:
    run = memplan.RunSpec(
        model="llama-3.1-8b", method="qlora", gpu="t4", batch={"micro": 2, "sequence": 18000}, profile="unsloth-2025"
    )
    candidate, certainty = memplan.explain(LOGITS, run, with_plan=False).candidates[0]
    low, high = candidate.lengths
    assert (candidate.tensor.role, candidate.tensor.dtype, certainty) == ("logits", "fp32", LIKELY)
    assert low <= 9910 <= high
    assert candidate.bytes == 2 * candidate.sequence * 128_256 * 4


def test_a_weights_request_is_found_among_the_models_weights() -> None:
    found = memplan.explain(message("84.00 MiB", "31.35 GiB"), memplan.RunSpec(model="gemma-4-31b"), with_plan=False)
    named = {candidate.tensor.what: candidate.bytes for candidate, _ in found.candidates}
    assert named["self_attn.q_proj.weight"] == 32 * 256 * 5376 * 2 == 84 * MIB


def test_the_message_of_a_runs_own_replay_names_its_tensor() -> None:
    run = memplan.RunSpec(model="smollm2-135m", method="full", gpu="t4", batch={"micro": 16, "sequence": 2048})
    walked = walk(run)
    assert isinstance(walked, TrainingWalk)
    capacity = 12 * GIB
    failed = [*requests(walked, capacity)][-1]
    assert failed.failed
    rest, free = failed.reserved - failed.allocated, capacity - failed.reserved
    held = (
        f"Of the allocated memory {failed.allocated / GIB:.2f} GiB is allocated by PyTorch, and {rest / GIB:.2f} GiB "
    )
    text = message(
        f"{failed.segment / GIB:.2f} GiB",
        free=f"{free / GIB:.2f} GiB",
        more=f"{held}is reserved by PyTorch but unallocated.",
    )
    found = memplan.explain(text, run)
    assert any((c.tensor.shape, c.tensor.dtype) == (failed.shape, failed.dtype) for c, _ in found.candidates[:1])
    assert found.candidates[0][1] != SURE  # no frame agrees
    assert "as the run predicts" in texts(found, HELD)
    assert "does not fit" in texts(found, EXPECTED)
    assert found.plan is not None
    assert found.of(CHANGE)
    assert found.contradictions == []


def test_tensors_keep_their_names_if_a_pass_is_recorded_again() -> None:
    walked = walk(memplan.RunSpec(model="smollm2-135m", gpu="t4"))
    assert isinstance(walked, TrainingWalk)
    before = [*requests(walked, None)]
    vars(graph)["_recorded"].cache_clear()  # as many other runs do
    assert [*requests(walked, None)] == before
    assert any(each.name for each in before)


@pytest.mark.parametrize(("request_", "nothing"), [("20.00 MiB", True), ("2.00 MiB", True), ("22.00 MiB", False)])
def test_requests_of_the_pools_say_nothing(request_: str, nothing: bool) -> None:
    found = memplan.explain(message(request_))
    asked = found.message.amount("request")
    assert asked is not None
    assert says_nothing(asked) is nothing
    assert ("says nothing" in texts(found, ASKED)) is nothing


def test_a_request_is_what_a_tensor_is_rounded_up_to() -> None:
    amount = Amount("84.00 MiB", 84 * MIB, 5243)
    assert 82 * MIB + 1 in tensors_behind(amount)
    assert 84 * MIB in tensors_behind(amount)
    assert 81 * MIB not in tensors_behind(amount)


def test_the_owners_of_the_card_are_told_apart() -> None:
    whose = texts(memplan.explain(LOGITS), WHOSE)
    assert "sure: process 2670: 1.02 GiB" in whose
    in_use, reserved = 9.95, 9.20 + 623.81 / 1024
    assert f"{gib(round((in_use - reserved) * GIB))[:5]}" in whose


def test_a_process_in_a_container_is_this_one() -> None:
    more = (
        "Process 99 has 13.50 GiB memory in use. Of the allocated memory 12.90 GiB is allocated by PyTorch, and "
        "200.00 MiB is reserved by PyTorch but unallocated."
    )
    assert "likely: process 99 with 13.50 GiB is this one" in texts(
        memplan.explain(message("1.50 GiB", more=more)), WHOSE
    )


@pytest.mark.parametrize(
    ("rest", "certainty"), [("3.00 GiB", "sure: 3.00 GiB were reserved but free"), ("1.20 GiB", "likely: 1.20 GiB")]
)
def test_fragmentation_is_told_by_what_is_reserved_but_free(rest: str, certainty: str) -> None:
    more = (
        f"Of the allocated memory 9.00 GiB is allocated by PyTorch, and {rest} is reserved by PyTorch but unallocated."
    )
    assert certainty in texts(memplan.explain(message("2.00 GiB", more=more)), WHOSE)


def test_a_number_that_no_card_has_is_called_one() -> None:
    more = "Including non-PyTorch memory, this process has 17179869184.00 GiB memory in use."
    assert "is no number of bytes" in texts(memplan.explain(message("1.95 GiB", more=more)), WHOSE)


def test_another_card_than_the_runs_is_a_contradiction() -> None:
    run = memplan.RunSpec(model="smollm2-135m", method="lora", gpu="a100")
    found = memplan.explain(message("84.00 MiB"), run, with_plan=False)
    assert len(found.contradictions) == 1
    assert "14.56 GiB" in found.contradictions[0]
    assert found.answer is not None
    assert found.answer.gpu is not None
    assert found.answer.gpu.name == "t4"


def test_a_run_that_memplan_refuses_leaves_the_message_explained() -> None:
    run = memplan.RunSpec(model="smollm2-135m", method="lora", gpu="t4", parallelism={"world": 2, "pp": 3})
    found = memplan.explain(LOGITS, run)
    assert len(found.contradictions) == 1
    assert found.of(ASKED)


def test_engines_and_the_host_are_explained_by_their_own_numbers() -> None:
    vllm = memplan.explain(
        "ValueError: Free memory on device cuda:0 (7.34/15.49 GiB) on startup is less than desired GPU memory "
        "utilization (0.8, 12.39 GiB).\n"
    )
    assert "--gpu-memory-utilization 0.47" in texts(vllm, CHANGE)  # 7.34 / 15.49 = 0.4738
    cache = memplan.explain(
        "(10.00 GiB KV cache is needed, which is larger than the available KV cache memory (1.25 GiB). Based on the "
        "available memory, the estimated maximum model length is 5120. Try\n"
    )
    assert "--max-model-len 5120" in texts(cache, CHANGE)
    killed = memplan.explain("./train.sh: line 3: 777 Killed                  python train.py\n")
    assert "likely: the operating system ended the process" in texts(killed, ASKED)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("loss 0.1", "there is no out-of-memory message"),
        ("java.lang.OutOfMemoryError: Java heap space", "line 1 is Java's own"),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1073741824 bytes.", "asked for 1073741824 bytes"),
    ],
)
def test_a_log_of_another_library_is_refused_in_a_line(text: str, said: str) -> None:
    with pytest.raises(memplan.MemplanError, match=said):
        memplan.explain(text)


def test_two_different_messages_are_said() -> None:
    found = memplan.explain(LOGITS + messages.BEFORE_2_1)
    assert any("other messages: line 9" in note for note in found.notes)


def test_the_size_alone_is_never_sure() -> None:
    run = memplan.RunSpec(model="smollm2-135m", method="full", gpu="t4")
    for request in ("84.00 MiB", "384.00 MiB", "1.50 GiB", "3.00 GiB"):
        found = memplan.explain(message(request), run, with_plan=False)
        assert all(certainty != SURE for _, certainty in found.candidates)


ROWS = [
    json.loads(line) for line in (Path(__file__).parents[1] / "golden" / "oom_requests.jsonl").read_text().splitlines()
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["source"])
def test_a_reported_requests_tensor_is_among_the_first_three(row: dict[str, Any]) -> None:
    text = message(row["request"], row["total"])
    if row["frame"]:
        file, function, code = row["frame"]
        text = f'Traceback (most recent call last):\n  File "/x/{file}", line 1, in {function}\n    {code}\n{text}'
    found = memplan.explain(text, memplan.RunSpec.model_validate(row["run"]), with_plan=False)
    named = {(candidate.tensor.role, candidate.tensor.what) for candidate, _ in found.candidates}
    assert row["role"] in {role for role, _ in named}
    assert row["what"] in {None, *(what for _, what in named)}
    assert all(certainty != SURE for _, certainty in found.candidates)


def test_a_longer_batch_than_the_runs_is_a_contradiction() -> None:
    run = memplan.RunSpec(model="llama-3.1-8b", method="qlora", gpu="t4", batch={"micro": 2, "sequence": 4096})
    found = memplan.explain(LOGITS, run, with_plan=False)
    assert any("and the run has 2 x 4,096" in line for line in found.contradictions)


def test_a_rank_and_a_phase_without_the_run_are_contradictions() -> None:
    frame = '[rank5]:   File "/x/trainer.py", line 1, in evaluation_loop\n[rank5]:     self.prediction_step(model)\n'
    text = f"[rank5]: Traceback (most recent call last):\n{frame}[rank5]: {message('84.00 MiB')}"
    run = memplan.RunSpec(model="smollm2-135m", method="lora", gpu="t4")
    said = memplan.explain(text, run, with_plan=False).contradictions
    assert [line for line in said if "rank 5" in line or "--eval-batch-size" in line] == said
    assert len(said) == 2


def test_what_an_engine_prints_is_compared_in_its_order() -> None:
    run = memplan.RunSpec(model="llama-3.1-8b", task="generate", profile="vllm-0.11", gpu="3090")
    serving = memplan.estimate(run).serving
    assert serving is not None
    weights = f"Model loading took {serving['weights'] / GIB:.4f} GiB and 3.2 seconds\n"
    found = memplan.explain(
        f"{weights}Available KV cache memory: 0.10 GiB\nNo available memory for the cache blocks.\n", run
    )
    assert "part at left for the KV cache: 0.10 GiB" in texts(found, HELD)
    assert [row.what for row in found.rows if row.measured][:1] == ["weights"]


def test_an_explanation_is_json() -> None:
    found = memplan.explain(LOGITS, memplan.RunSpec(model="smollm2-135m", method="lora", gpu="t4"), with_plan=False)
    data = json.loads(found.as_json())
    assert data["message"]["values"]["request"] == {"text": "9.47 GiB", "bytes": 10168335073, "slack": 5368710}
    assert {finding["certainty"] for finding in data["findings"]} <= {"sure", "likely", "possible"}
