"""Tensor parallelism: one rank's estimate against transformers' own sharding of a model, and laws."""

from __future__ import annotations

from statistics import mean
from typing import Any

import pytest

from benchmarks.accuracy import compared_with_trace, rows
from memplan import Estimate, RunSpec, estimate
from memplan.core.errors import SpecError
from memplan.core.ir import operations
from memplan.core.units import rounded
from memplan.estimate.answer import Line
from memplan.models.configs import families
from memplan.program.graph import operations_of
from memplan.program.sharding.choice import sharding_of
from memplan.resolve.decide import decide
from tests.cases import in_groups
from tests.sampling import sampled
from tests.tiny import TINY

EXPERTS = [name for name, row in families().items() if row.parallel.experts]
PLANS = {name: row.parallel.plan for name, row in families().items() if row.parallel.plan is not None}

TRACED: list[dict[str, Any]] = rows("traced_parallel_tp.jsonl")
DENSE = {name for name, plan in PLANS.items() if not plan.experts} - {
    *EXPERTS
}  # the others are in tests/program/test_expert_parallel.py
LLAMA = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
}


def run(tp: int, config: dict[str, Any] | None = None, **options: Any) -> RunSpec:
    parallelism = {"world": tp, "tp": tp, **options.pop("parallelism", {})}
    return RunSpec(model={"config": {**LLAMA, **(config or {})}}, parallelism=parallelism, **options)


def stored(tp: int, format: str = "fp8") -> RunSpec:
    return run(tp, method={"kind": "full", "quantization": {"format": format}}, task="generate")


def test_ranks_divide_fp8_weights() -> None:
    """As transformers 5.24 `apply_tensor_parallelism` divides `FP8Linear`; scales fill less than 512 bytes here."""
    for tp in (1, 2):
        layers = 3 * (512 * (512 + 256 + 256 + 512) + 3 * 512 * 1536) // tp
        rest = 2 * 2 * 4096 * 512 // tp + 2 * (2 * 3 + 1) * 512
        assert estimate(stored(tp)).categories["parameter"] == layers + 3 * 7 * 512 + rest


def test_ranks_divide_the_embeddings_and_the_head_of_gpt_oss_in_mxfp4() -> None:
    """Both are of 201,088 x 2,880 in bf16. Four ranks would not divide its blocks of 32."""
    one, four = (
        estimate(RunSpec(model="gpt-oss-20b", task="generate", parallelism={"world": tp, "tp": tp}, gpu="h100"))
        for tp in (1, 4)
    )
    assert one.categories["parameter"] - four.categories["parameter"] == 2 * 201_088 * 2_880 * 2 * 3 // 4


def label(case: dict[str, Any]) -> str:
    kernels = case["run"].get("kernels", {})
    method = case["run"].get("method", {}).get("kind", "full")
    return f"{case['name']}-{method}-{kernels.get('checkpointing', 'full')}"


@in_groups(sampled(TRACED, 8), label)
def test_a_ranks_estimate_equals_transformers_allocations(case: dict[str, Any]) -> None:
    compared = compared_with_trace(case)
    assert compared.peak < 2e-4, compared
    assert compared.same, compared
    assert compared.phase < 0.12, compared  # the second parameter group has no states while the first is stepped


def test_families_with_a_plan_have_0_01_per_cent_mean_error() -> None:
    traced = {case["run"]["model"]["config"]["model_type"] for case in TRACED}
    assert traced >= DENSE & set(TINY)
    assert mean(compared_with_trace(case).peak for case in sampled(TRACED, 8)) < 1e-4


def persistent(answer: Estimate) -> int:
    return sum(answer.categories[kind] for kind in ("parameter", "buffer", "optstate"))


@pytest.mark.parametrize("model_type", sampled(sorted(DENSE & set(TINY)), 4))
def test_more_ranks_never_hold_more_each(model_type: str) -> None:
    config = {"model_type": model_type, **TINY[model_type]}
    answers = [
        estimate(RunSpec(model={"config": config}, parallelism={"world": tp, "tp": tp}, batch={"sequence": 64}))
        for tp in (1, 2)
    ]
    assert answers[0].parameters == answers[1].parameters
    assert persistent(answers[1]) < persistent(answers[0])


def weights(answer: Estimate) -> dict[str, Line]:
    return {f"{line.where} {line.what}": line for line in answer.ledger if line.kind == "parameter"}


def test_matrices_are_divided_and_norms_are_not() -> None:
    one, four = (weights(estimate(run(tp))) for tp in (1, 4))
    assert one.keys() == four.keys()
    for name, line in one.items():
        parts = 1 if "norm" in name else 4
        assert four[name].bytes == line.count * rounded(line.bytes // line.count // parts), name


def test_an_adapter_around_a_divided_output_is_whole_in_its_first_half() -> None:
    """peft shards lora_B by rows: the gradient of its input is summed over ranks, that of lora_A's is not."""
    stack, _ = operations_of(decide(run(2, method="lora")).structure.graph)
    summed = {op.name for op in operations(stack) if op.name.endswith(".input")}
    columns = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in summed if ".lora_B." in name}
    assert columns == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert not any(".lora_A." in name for name in summed)
    (a,) = {line.dims for line in estimate(run(2, method="lora")).ledger if line.what.endswith("q_proj.lora_A.weight")}
    (b,) = {line.dims for line in estimate(run(2, method="lora")).ledger if line.what.endswith("q_proj.lora_B.weight")}
    assert (a, b) == ((16, 512), (8 // 2, 64, 16))


def test_a_vocabulary_that_does_not_divide_is_rounded_up() -> None:
    vocabulary = weights(estimate(run(4, {"vocab_size": 4097})))
    assert vocabulary[" lm_head.weight"].dims == (1025, 512)  # 4097 / 4, rounded up
    assert vocabulary[" model.embed_tokens.weight"].dims == (1025, 512)


def test_the_embeddings_gradient_covers_the_full_table() -> None:
    """DTensor has no rule that would shard it by rows."""
    for tied, parts in ((False, 1), (True, 4)):  # if tied, it is added to the head's shard
        structure = decide(run(4, {"tie_word_embeddings": tied})).structure
        (held,) = (held for held in sharding_of(structure).gradients() if held.what == "model.embed_tokens.weight.grad")
        assert held.bytes == 2 * 4096 * 512 // parts


def test_fsdp2_divides_the_rest_of_the_weights_once_more() -> None:
    both = estimate(run(2, parallelism={"world": 8, "dp": 4, "strategy": "fsdp2"}))
    alone = estimate(run(2))
    assert both.categories["optstate"] < alone.categories["optstate"] / 3
    assert both.gpu is None or both.gpu.count == 8


def megatron(tp: int, tokens_divided: bool = False, **options: Any) -> Estimate:
    return estimate(
        run(tp, profile="megatron-core", parallelism={"sequence_parallel": tokens_divided}, **options),
    )


def test_megatron_pads_the_vocabulary_and_keeps_no_gradient_of_a_whole_table() -> None:
    table = weights(megatron(4, config={"vocab_size": 4097}))[" lm_head.weight"]
    assert table.dims == (9 * 128, 512)  # 4097 / (128 * 4), rounded up, times 128
    asked = run(4, profile="megatron-core")
    (held,) = (
        held
        for held in sharding_of(decide(asked).structure).gradients()
        if held.what == "embedding.word_embeddings.weight.grad"
    )
    assert held.bytes == 2 * 4096 * 512 // 4


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_dividing_the_tokens_never_takes_more(checkpointing: str) -> None:
    options: dict[str, Any] = {"kernels": {"checkpointing": checkpointing}, "batch": {"sequence": 4096}}
    plain, divided = megatron(4, **options), megatron(4, tokens_divided=True, **options)
    assert persistent(plain) == persistent(divided)
    assert divided.bytes.allocated < plain.bytes.allocated


def test_inputs_of_sharded_matrices_are_gathered_into_one_buffer() -> None:
    answer = megatron(4, tokens_divided=True, batch={"sequence": 4096})
    (line,) = (line for line in answer.ledger if line.what == "gathered")
    assert (line.count, line.bytes) == (1, 2 * 4096 * 512)
    kept = next(line for line in answer.ledger if line.what == "n1")
    assert kept.dims == (1, 1024, 512)


REFUSED = {
    "heads": (run(3), "parallelism.tp: 3 does not divide 8 attention heads and 4 key/value heads"),
    "key heads": (run(8), "parallelism.tp: 8 does not divide 4 key/value heads"),
    "family": (
        RunSpec(model="gpt2", parallelism={"world": 2, "tp": 2}),
        "parallelism.tp: 2 is not supported yet for gpt2; supported: 63 families, such as gptj, gpt_oss",
    ),
    "strategy": (run(2, parallelism={"world": 4, "dp": 2, "strategy": "ddp"}), "use fsdp2"),
    "method": (run(2, method="qlora"), "method.kind: transformers 5.24 cannot run qlora"),
    "optimizer": (run(2, optimizer="adafactor"), "optimizer.name: 'adafactor' is not supported yet"),
    "loss": (run(2, kernels={"loss": "fused"}), "kernels.loss: Liger's fused loss cannot"),
    "tokens": (
        run(4, profile="megatron-core", parallelism={"sequence_parallel": True}, batch={"sequence": 1002}),
        "parallelism.sequence_parallel: 4 ranks do not divide a sequence of 1002 tokens",
    ),
    "width": (
        run(4, {"intermediate_size": 1538}, profile="megatron-core"),
        "parallelism.tp: 4 does not divide 1538 of the FFN's width",
    ),
    "style": (
        run(2, parallelism={"sequence_parallel": True}),
        "parallelism.sequence_parallel: is not supported with profile transformers-5",
    ),
    "alone": (
        run(1, parallelism={"sequence_parallel": True}),
        "parallelism.sequence_parallel: needs tensor parallelism",
    ),
    "replicas": (
        run(2, {"model_type": "glm"}, profile="megatron-core", parallelism={"world": 4, "dp": 2, "strategy": "ddp"}),
        "parallelism.dp",
    ),
    "adapters": (run(2, profile="megatron-core", method="dora"), "method.kind: 'dora' is not supported yet"),
    "nf4": (stored(2, "nf4"), "method.quantization.format: transformers 5.24 cannot run nf4 with tensor"),
    "blocks": (stored(8), "parallelism.tp: 8 ranks would divide blocks of 128 x 128 fp8 weights (of 256)"),
    "profile": (run(2, profile="transformers-4.48"), "parallelism.tp: 2 is not supported yet with profile"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_indivisible_runs_are_refused_in_one_line(kind: str) -> None:
    asked, said = REFUSED[kind]
    with pytest.raises(SpecError) as error:
        estimate(asked)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
