"""Estimates of TRL's trainers that generate against traces of the trainers' own steps, generation included."""

from __future__ import annotations

from collections import Counter
from statistics import mean
from typing import Any

import pytest

from benchmarks.accuracy import compared_with_trace, rows, trace_figures
from memplan import Estimate, RunSpec, estimate, grid
from memplan.catalogue.kernels.trl_losses import fused_policy_loss
from memplan.core.errors import SpecError
from memplan.core.ir import Weight
from memplan.core.units import GIB, gib
from memplan.engine.walk import size
from memplan.models.cards import find_model
from memplan.planning.levers import levers_of, pull
from memplan.planning.plan import plan
from memplan.planning.reach import reach
from memplan.program.serving.budget import budget
from memplan.resolve.decide import decide
from memplan.resolve.roles import decided_at
from memplan.resolve.serving import resolve_serving
from memplan.spec.roles import RoleModel, Roles
from memplan.spec.run import Batch
from tests.cases import each, in_groups
from tests.sampling import sampled

ROWS: list[dict[str, Any]] = rows("traced_generation.jsonl")


@in_groups(sampled(ROWS), lambda row: row["name"])
def test_a_step_is_near_its_trace(row: dict[str, Any]) -> None:
    answer = trace_figures(row["run"])
    assert (answer.parameters.total, answer.parameters.trainable) == (row["parameters"], row["trainable"])
    compared = compared_with_trace(row)
    if compared.cause:  # a known miss
        return
    assert compared.peak < 1e-3, compared
    assert compared.phase < 5e-3, compared
    assert compared.same


@in_groups(rows("traced_critics.jsonl"), lambda row: row["name"])
def test_a_critics_update_is_near_its_trace(row: dict[str, Any]) -> None:
    compared = compared_with_trace(row)
    assert compared.peak < 1e-3, compared
    assert compared.phase < 5e-3, compared
    assert compared.same


def test_steps_are_held_to_traces() -> None:
    counts = Counter((row["run"]["trainer"], row["run"]["profile"]) for row in ROWS)
    assert min(counts["grpo", profile] for profile in ("trl-1.15", "trl-1.14", "trl-1.13")) >= 18
    assert min(counts["grpo", "trl-1.6"], counts["grpo", "trl-0.24"], counts["rloo", "trl-1.15"]) >= 8
    assert counts["distill", "trl-1.15"] >= 10
    assert min(counts["ppo", profile] for profile in ("trl-1.10", "trl-0.24", "trl-1.6")) >= 8
    assert sum(row["run"].get("roles", {}).get("teacher", {}).get("location") == "server" for row in ROWS) >= 2
    assert sum("reward" in row["run"].get("roles", {}) for row in ROWS) >= 4
    assert sum(row["run"].get("kernels", {}).get("loss") == "fused" for row in ROWS) >= 10
    assert sum(row["run"].get("loop", {}).get("entropy_bonus", False) for row in ROWS) >= 9
    assert mean(compared_with_trace(row).peak for row in ROWS) < 1e-4
    assert sum("cause" in row for row in ROWS) <= 2
    assert sum("evaluation" in row["run"].get("also", {}) for row in ROWS) >= 6
    divided = Counter(row["run"].get("parallelism", {}).get("strategy") for row in ROWS)
    assert min(divided[strategy] for strategy in ("ddp", "fsdp", "fsdp2")) >= 7


@each([(4, 7.2352), (8, 7.3602)])
def test_ligers_loss_takes_what_its_own_benchmark_measured(case: tuple[int, float]) -> None:
    """Forward and backward of `fused_linear_grpo_loss_token` on an A100: liger-kernel 0.6.1 all_benchmark_data.csv.

    Two heads and two references exist, Liger's and torch's, and the head's gradient of the repetition before; the
    inputs, those of the reference, and the inputs' gradient.
    """
    completions, gib = case
    axes = {"v": 128256, "h": 4096, "completion": 1024, "completion_rows": 1024 * completions}
    axes["earlier_rows"] = 1024 * (completions - 1)
    loss = fused_policy_loss(Weight("head", "v h", "lm_head", "bf16"), (), "compiled")
    made = next(op.scratch for op in loss if op.name == "loss.logits")
    held = [("v h", "bf16")] * 5 + [("completion_rows h", "bf16")] * 3
    held += [(t.shape, t.dtype.replace("=kept", "bf16")) for t in made]
    assert sum(size(*tensor, axes)[1] for tensor in held) / 2**30 == pytest.approx(gib, rel=0.01)


def grpo(**run: Any) -> Estimate:
    batch = {"micro": 8, "sequence": 256, "new_tokens": 128, "generations": 4, **run.pop("batch", {})}
    fields = {"model": "llama-3.2-1b", "trainer": "grpo", "precision": "autocast", "batch": batch, **run}
    return estimate(RunSpec(**fields))


def peak_of(answer: Estimate, phase: str) -> int:
    return max(p.peak for p in answer.phases if p.phase == phase)


def test_defaults_are_those_of_trl() -> None:
    run = estimate(RunSpec(model="llama-3.2-1b", trainer="grpo", batch={"micro": 8})).run
    assert (run.batch.new_tokens, run.batch.generations, run.profile) == (512, 8, "trl-1.15")
    assert grpo(batch={"new_tokens": 0}, profile="trl-1.6").run.batch.new_tokens == 256
    assert estimate(RunSpec(model="llama-3.2-1b", trainer="rloo", batch={"micro": 2})).run.batch.generations == 2


def test_unsloths_engine_shares_the_policys_weights() -> None:
    serving = {"max_model_len": 2048, "memory_utilization": 0.5}
    fields: dict[str, Any] = {"method": "lora", "reference": "adapters", "gpu": "4090", "rollout": "colocate"}
    held, trainable = {}, 0
    for profile in ("unsloth-2026.10", "trl-1.15"):
        answer = grpo(profile=profile, serving=serving, **fields)
        held[profile] = {line.what: line.bytes for line in answer.ledger}
        trainable = answer.parameters.trainable
        assert sum(line.bytes for line in answer.ledger) == answer.bytes.allocated
    unsloth, trl = held.values()
    assert unsloth["vLLM's KV cache"] == trl["vLLM's KV cache"]
    assert "vLLM's weights" in set(trl) - set(unsloth)
    copied = sum(size for what, size in unsloth.items() if what.startswith("ref."))
    assert copied == pytest.approx(4 * trainable, rel=1e-3)


def test_a_reward_model_reads_all_completions_of_a_step_at_once() -> None:
    def scored(parts: int) -> Estimate:
        return grpo(method="lora", roles={"reward": "llama-3.1-8b"}, batch={"micro": 4, "accumulation": parts})

    few, many = scored(1), scored(16)
    for answer in (few, many):
        assert sum(line.bytes for line in answer.ledger) == answer.bytes.allocated
    assert many.peak.phase == "reward"
    cache = (
        2 * 60 * 384 * 32 * 2 * 8 * 128
    )  # bf16 keys and values of 60 more completions, in 32 layers of 8 heads of 128
    assert peak_of(many, "reward") - peak_of(few, "reward") > cache
    away = grpo(method="lora", roles={"reward": {"model": "llama-3.1-8b", "location": "server"}}, batch={"micro": 4})
    assert away.bytes.allocated == grpo(method="lora", batch={"micro": 4}).bytes.allocated


def test_a_student_generates_by_itself_or_with_vllm() -> None:
    def distilled(**run: Any) -> Estimate:
        batch = {"micro": 4, "generations": 1}
        return grpo(trainer="distill", method="lora", roles={"teacher": "llama-3.2-3b"}, batch=batch, gpu="h100", **run)

    assert {"teacher", "generate"} <= {phase.phase for phase in distilled().phases}
    serving = {"max_model_len": 4096, "memory_utilization": 0.3}
    alone, with_vllm = distilled(), distilled(rollout="colocate", serving=serving)
    assert alone.gpu is not None
    assert 0 < with_vllm.bytes.allocated - alone.bytes.allocated < 0.3 * (alone.gpu.usable or 0)
    assert "generate" not in {phase.phase for phase in distilled(rollout="server").phases}


def test_one_completion_has_no_largest_group() -> None:
    run = RunSpec(model="llama-3.2-1b", trainer="distill", roles={"teacher": "llama-3.2-3b"}, gpu="h100")
    with pytest.raises(SpecError, match="several completions of a prompt: grpo, rloo"):
        reach(run, "generations")


def test_a_critic_updates_next_to_the_policy() -> None:
    alone = estimate(
        RunSpec(
            model="qwen2.5-7b",
            objective="sequence_classification",
            precision="autocast",
            batch={"micro": 8, "sequence": 256 + 128},
        )
    )
    policy, both = grpo(), grpo(roles={"value": "qwen2.5-7b"}, batch={"generations": 1})
    assert sum(line.bytes for line in both.ledger) == both.bytes.allocated
    held = sum(line.bytes for line in both.ledger if line.what.startswith("value."))
    weights, states = 2 * alone.parameters.total, 2 * 2 * alone.parameters.total  # bf16, two states each
    assert held == pytest.approx(weights + states, rel=1e-3)
    assert peak_of(both, "backward") - peak_of(policy, "backward") == pytest.approx(held, rel=1e-6)
    standing = peak_of(both, "critic") - alone.bytes.allocated
    assert standing == pytest.approx(6 * policy.parameters.total, rel=1e-2)  # the policy's weights and states, bf16
    away = grpo(roles={"value": {"model": "qwen2.5-7b", "location": "server"}}, batch={"generations": 1})
    assert away.bytes.allocated == policy.bytes.allocated
    assert f"{gib(alone.bytes.allocated)} allocated on each" in away.unsupported[0]
    long = grpo(roles={"value": "qwen2.5-7b"}, batch={"generations": 1, "sequence": 2048})
    levers = {lever.title: lever for lever in levers_of(long.run)}
    for title in ("the value model on other GPUs", "micro-batch 1 of the value model"):
        assert estimate(pull(long.run, [levers[title]])).bytes.allocated < long.bytes.allocated, title


def test_nothing_is_compared_without_a_reference() -> None:
    weights = 2 * 1_235_814_400  # bf16; the embeddings are tied
    assert grpo(reference="copy").bytes.allocated - grpo().bytes.allocated == pytest.approx(weights, rel=1e-2)
    assert not any(phase.phase == "reference" for phase in grpo().phases)
    assert any(phase.phase == "reference" for phase in grpo(method="lora", reference="adapters").phases)


def test_a_step_generates_for_all_its_micro_batches_at_once() -> None:
    cache = 2 * 16 * 2 * 8 * 64  # bytes of a token: keys and values of 16 layers, 8 heads of 64 numbers, bf16
    one, four = (grpo(method="lora", batch={"accumulation": parts, "new_tokens": 512}) for parts in (1, 4))
    longer = peak_of(four, "generate") - peak_of(one, "generate")
    assert longer > 3 * 8 * (256 + 511) * cache
    gradients = 4 * four.parameters.trainable
    assert 0 <= peak_of(four, "forward") - peak_of(one, "forward") - gradients < 2**21  # the batch's tokens


def ppo(**run: Any) -> Estimate:
    batch = {"generations": 1, "accumulation": 2, "micro": 4, **run.pop("batch", {})}
    fields = {"profile": "trl-1.10", "precision": "bf16", "roles": {"reward": "llama-3.2-1b"}, **run}
    return grpo(trainer="ppo", batch=batch, **fields)


def test_ppo_trains_a_value_model_and_keeps_all_logits() -> None:
    answer, other = ppo(method="lora"), ppo(method="lora", roles={"reward": "llama-3.2-1b", "value": "qwen2.5-0.5b"})
    for trained in (answer, other):
        assert sum(line.bytes for line in trained.ledger) == trained.bytes.allocated
    policy = 1_235_814_400
    adapters = grpo(method="lora").parameters.trainable
    assert answer.parameters.trainable == adapters + policy + 2048  # whose head is a score
    assert 494_000_000 < other.parameters.trainable - adapters < 495_000_000
    kept = next(line for line in answer.ledger if line.what == "logits of all completions")
    assert kept.bytes == 4 * 4 * 2 * 128 * 128256
    assert {"generate", "rollout", "reward"} <= {phase.phase for phase in answer.phases}
    rows = answer.run.batch.micro * answer.run.batch.accumulation
    evaluated = ppo(method="lora", also={"evaluation": {"micro": rows}})  # which generates and scores as many
    assert peak_of(evaluated, "eval") == max(peak_of(answer, "generate"), peak_of(answer, "reward") + kept.bytes)
    with pytest.raises(SpecError, match=r"also\.saving: is not supported yet with trainer ppo"):
        ppo(method="lora", also={"saving": {}})


def test_ppo_divides_all_its_models_under_zero3_only() -> None:
    zero2, zero3 = (
        ppo(precision="mixed", parallelism={"world": 4, "dp": 4, "strategy": strategy})
        for strategy in ("zero2", "zero3")
    )
    whole = 2 * (4 * 1_235_814_400 + 2 * 2048)  # bf16 weights of policy, reference, value and reward model
    held = [
        sum(line.bytes for line in answer.ledger if line.kind == "parameter" and "weight" in line.what.split(",")[0])
        - sum(
            line.bytes for line in answer.ledger if line.what in ("gathered weights", "fp32 partition of the weights")
        )
        for answer in (zero2, zero3)
    ]
    assert held == [whole, pytest.approx(whole / 4, rel=1e-3)]  # and norms, which stay whole
    titles = {lever.title for lever in levers_of(ppo().run)}
    assert "4 GPUs, sharded by zero3" in titles
    assert "gradient checkpointing" not in titles  # which PPOTrainer's loop does not enable


def test_ppo_generates_and_scores_64_completions_at_once() -> None:
    chunk = 4 * 64 * 8 * 128256  # logits of 64 completions of 8 tokens

    def peaks(rows: int, kept: int) -> tuple[int, int]:
        answer = ppo(method="lora", batch={"micro": 1, "accumulation": rows, "new_tokens": 8})
        return peak_of(answer, "rollout") - kept, peak_of(answer, "generate") - kept

    (scored, generated), (scored_twice, generated_twice) = peaks(64, chunk), peaks(128, 2 * chunk)
    assert 0 < scored_twice - scored < 2**21  # the batch's tokens
    assert 0 <= generated_twice - generated - chunk < 2**21  # the first chunk's, while the second is generated
    assert peaks(65, 2 * chunk)[0] == pytest.approx(scored, rel=1e-4)  # the second chunk is padded


def test_only_completions_have_logits() -> None:
    few, many = (
        grpo(method="lora", profile="trl-1.14", batch={"new_tokens": n, "sequence": 512 - n}) for n in (128, 256)
    )
    logits = 8 * 128 * 128256 * (2 + 4)  # bf16, and cast to fp32
    assert peak_of(many, "loss") - peak_of(few, "loss") == pytest.approx(logits, rel=0.01)
    tiled, whole = (peak_of(grpo(profile=version, method="lora"), "loss") for version in ("trl-1.15", "trl-1.13"))
    assert tiled < whole


def test_the_ledger_of_each_phase_sums_to_its_peak() -> None:
    answer = grpo(method="lora", batch={"accumulation": 8, "new_tokens": 1024})
    assert answer.peak.phase == "generate"
    assert sum(line.bytes for line in answer.ledger) == answer.bytes.allocated


def colocated(**serving: Any) -> Estimate:
    return grpo(method="lora", gpu="4090", rollout="colocate", serving={"max_model_len": 2048, **serving})


@each(("qwen3-0.6b", "gemma-2-2b"))  # without and with a window
def test_batches_that_share_a_decision_have_its_operations(name: str) -> None:
    several, model = RunSpec(model=name, profile="trl-1.6", method="lora", batch={"micro": 2}), find_model(name)
    several = several.model_copy(update={"trainer": "ppo", "roles": Roles(reward=RoleModel(model=name))})
    for micro, sequence in ((1, 512), (2, 64), (8, 512), (8, 8192)):
        own = decide(several.model_copy(update={"batch": Batch(micro=micro, sequence=sequence)}))
        shared = decided_at(own.batch, several, model, decide)
        assert shared.structure.graph == own.structure.graph
        assert shared.batch == own.batch


def test_requests_of_any_length_share_an_engines_step_and_pool() -> None:
    run = {
        "model": "qwen3-0.6b",
        "task": "generate",
        "profile": "vllm",
        "gpu": "l4",
        "serving": {"max_model_len": 4096},
    }
    short, long = (
        resolve_serving(RunSpec(**run, batch={"micro": n, "sequence": tokens, "new_tokens": 64}))
        for n, tokens in ((1, 64), (64, 2048))
    )
    few, many = (budget(settings, 20 * GIB) for settings in (short, long))
    assert few._replace(settings=many.settings) == many
    assert (few.settings, many.settings) == (short, long)
    assert few.room - many.room == many.pool.needs(2112, 64) - many.pool.needs(128, 1) > 0


def test_a_colocated_engine_takes_its_share_of_the_card() -> None:
    alone, shared = grpo(method="lora", gpu="4090", rollout="server"), colocated(memory_utilization=0.25)
    usable = alone.gpu.usable  # pyright: ignore[reportOptionalMemberAccess]
    taken = peak_of(shared, "backward") - peak_of(alone, "backward")
    step = next(line.bytes for line in lines_of(colocated(memory_utilization=0.25, sleep=True)) if "step" in line.what)
    assert taken + step == pytest.approx(usable * 0.25, rel=0.05)  # kernels that the driver loads are the rest
    assert not any(phase.phase == "generate" for phase in alone.phases)


def lines_of(answer: Estimate) -> list[Any]:
    return [line for line in answer.ledger if "vLLM" in line.what]


def test_an_engine_that_sleeps_frees_its_weights_and_cache_for_training() -> None:
    awake, asleep = colocated(), colocated(sleep=True)
    assert awake.peak.phase == "backward"
    assert asleep.peak.phase == "generate"
    assert asleep.bytes.allocated < awake.bytes.allocated
    assert asleep.bytes.reserved < awake.bytes.reserved
    assert peak_of(awake, "generate") == peak_of(asleep, "generate")
    for answer in (awake, asleep):
        assert sum(line.bytes for line in answer.ledger) == answer.bytes.allocated


def test_models_moved_to_the_host_are_not_on_the_card() -> None:
    run: dict[str, Any] = {"gpu": "a100-80gb", "rollout": "colocate", "profile": "verl-0.9", "precision": "amp"}
    parts = ([], ["optimizer"], ["parameters", "optimizer"])
    none, states, both = (grpo(**run, serving={"sleep": True, "trainer_offload": part or None}) for part in parts)
    parameters = 1_235_814_400
    first, second, third = (peak_of(answer, "generate") for answer in (none, states, both))
    assert first - second == pytest.approx(2 * 4 * parameters, rel=1e-3)
    assert second - third == pytest.approx(4 * parameters, rel=1e-3)
    assert peak_of(none, "backward") == peak_of(both, "backward")
    assert all(sum(line.bytes for line in each.ledger) == each.bytes.allocated for each in (none, states, both))


def test_an_engine_may_be_divided_among_cards() -> None:
    def weights(ranks: int) -> int:
        parallelism = {"world": 4, "dp": 4, "strategy": "ddp"}
        serving = {"max_model_len": 2048, "tensor_parallel": ranks}
        answer = grpo(method="lora", gpu="4090", rollout="colocate", parallelism=parallelism, serving=serving)
        return next(line.bytes for line in lines_of(answer) if "weights" in line.what)

    assert weights(1) / 2 < weights(2) < 0.55 * weights(1)  # norms are not divided
    with pytest.raises(SpecError, match=r"tensor_parallel: 3 does not divide the GPUs that train, 4; set --gpus"):
        weights(3)


def test_frameworks_that_score_prompts_have_all_logits() -> None:
    def peak(profile: str, phase: str) -> int:
        batch, kernels = {"new_tokens": 128, "sequence": 896}, {"checkpointing": "full"}
        answer = grpo(method="lora", profile=profile, batch=batch, kernels=kernels, rollout="server")
        return peak_of(answer, phase)

    scored, all_tokens = peak("trl-1.14", "loss"), peak("openrlhf-0.11", "loss")
    logits = 8 * 896 * 128256 * (2 + 4)  # of prompts: bf16, and cast to fp32
    assert all_tokens - scored == pytest.approx(logits, rel=0.05)
    assert peak("verl-0.9", "backward") < all_tokens - logits / 2  # neither cast nor copied


def test_passes_for_log_probs_have_the_parameters_that_zero3_leaves_gathered() -> None:
    batch = {"micro": 4, "generations": 2, "accumulation": 8, "scored": 64}
    parallelism = {"world": 2, "dp": 2, "strategy": "zero3"}
    answer = grpo(profile="openrlhf-0.11", precision="mixed", rollout="server", batch=batch, parallelism=parallelism)
    assert answer.peak.phase == "rollout"
    assert sum(line.bytes for line in answer.ledger) == answer.bytes.allocated


def test_completions_are_scored_as_many_at_once_as_the_framework_does() -> None:
    def scored(rows: int, **batch: int) -> Estimate:
        fields = {"micro": 4, "generations": 1, "accumulation": 8, "scored": rows, **batch}  # which TRL refuses
        return grpo(method="lora", profile="verl-0.9", rollout="server", batch=fields)

    more = 16 * (256 + 128) * 2 * (128256 + 2048)  # logits and the final norm's output, in bf16
    assert peak_of(scored(32), "rollout") - peak_of(scored(16), "rollout") == pytest.approx(more, rel=1e-3)
    assert peak_of(scored(16), "rollout") < peak_of(scored(0, micro=16), "forward")  # which records
    assert {p.phase for p in scored(4).phases} == {p.phase for p in scored(0).phases}


def test_a_reward_model_keeps_its_cache_except_in_openrlhf() -> None:
    """24 layers of keys and values of two heads of 64, for 8 sequences of 1,536 tokens in bf16."""

    def reward(profile: str) -> int:
        batch = {"sequence": 1024, "new_tokens": 512}
        return peak_of(grpo(model="qwen2-0.5b", profile=profile, roles={"reward": "qwen2-0.5b"}, batch=batch), "reward")

    assert reward("trl-1.14") - reward("openrlhf-0.11") == 24 * 2 * (2 * 64) * 8 * 1536 * 2


@pytest.mark.parametrize("rollout", ["transformers", "server"])
def test_zero_3_gathers_all_weights_to_generate_or_to_merge_adapters(rollout: str) -> None:
    def generate(strategy: str, **run: Any) -> int:
        parallelism = {"world": 4, "dp": 4, "strategy": strategy}
        answer = grpo(precision="mixed", parallelism=parallelism, rollout=rollout, **run)
        assert sum(line.bytes for line in answer.ledger) == answer.bytes.allocated
        return max((p.peak for p in answer.phases if p.phase == "generate"), default=0)

    merged, weights = generate("zero3", method="lora"), 2 * 1_235_814_400
    assert merged > weights
    if rollout == "server":  # without adapters weights are pushed one by one, without ZeRO 3 none is gathered
        assert generate("zero2", method="lora") == 0
        table = 2 * 128_256 * 2048  # the largest
        states, bucket = 12 * 1_235_814_400, 2 * 500_000_000
        parts = (weights + weights + states) / 4  # weights, reduced gradients, and fp32 weights with two states
        assert generate("zero3") == pytest.approx(parts + bucket + table, rel=0.01)


def test_the_engine_checks_its_longest_request() -> None:
    answer = colocated(max_model_len=None)  # the model's 131,072 positions
    assert answer.verdict.answer == "does not start"
    assert "it starts with serving.max_model_len" in str(answer.verdict.reason)
    assert not answer.fits
    assert {p.answer.verdict.answer for p in plan(answer.asked).proposals} == {"fits"}
    [lever] = [lever for lever in levers_of(answer.run) if lever.keys == ("rollout_length",)]
    assert estimate(pull(answer.run, [lever])).fits
    assert colocated(memory_utilization=0.95).verdict.answer == "does not fit"


@pytest.mark.parametrize(
    ("axis", "step"),
    [("batch", 4), ("completion", 1), ("generations", 2)],  # with 4 completions of a prompt in 2 passes of 8
)
def test_limits_are_those_of_whole_prompts(axis: str, step: int) -> None:
    run = grpo(method="lora", gpu="3060", batch={"accumulation": 2}).asked
    found = reach(run, axis)
    assert found.answer is not None
    assert found.beyond is not None
    assert (found.answer.fits, found.beyond.fits) == (True, False)
    assert int(found.value) % step == 0
    batch = found.answer.run.batch
    assert batch.micro * batch.accumulation % batch.generations == 0
    assert {"batch": batch.micro, "completion": batch.new_tokens, "generations": batch.generations}[axis] == found.value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": {"micro": 1}}, "8 completions of a prompt do not divide the 1 that a step generates"),
        ({"batch": {"micro": 4, "generations": 1}}, "needs at least 2 completions of a prompt"),
        ({"trainer": "dpo", "batch": {"generations": 4}}, "only applies to trainers that generate: grpo, rloo"),
        ({"trainer": "dpo", "batch": {"scored": 4}}, "batch.scored: only applies to trainers that score completions"),
        ({"trainer": "dpo", "batch": {"new_tokens": 4}}, "only task generate makes new tokens"),
        ({"reference": "adapters"}, "method full has no adapters to disable"),
        ({"reference": "precomputed"}, "grpo scores completions as it generates them; use none"),
        ({"rollout": "colocate"}, "colocate: vLLM takes a share of the GPU; name one"),
        ({"trainer": "dpo", "rollout": "server"}, "only applies to trainers that generate: grpo, rloo"),
        ({"serving": {"memory_utilization": 0.5}}, "only applies to serving engines, .* use --rollout colocate"),
        ({"roles": {"reference": "qwen2-0.5b"}}, "roles.reference.model: its vocabulary has 151,936 tokens"),
        ({"roles": {"reference": "llama-3.2-3b"}}, "roles.reference: a checkpoint of its own is not supported yet"),
        ({"serving": {"lora_rank": 64}}, "--rank sets that of an adapter that trains"),
        ({"profile": "llamafactory"}, "llamafactory-0.9.5 does not have grpo; use trl-1.15"),
        (
            {"method": "lora", "parallelism": {"world": 4, "dp": 4, "strategy": "fsdp2"}},
            "parallelism.strategy: peft generates past FSDP2's root, .* fails; use fsdp, zero3 or vLLM",
        ),
        *(
            ({"loop": {"entropy_bonus": True}, "profile": profile, "kernels": {"loss": loss}}, message)
            for profile, loss, message in (
                ("trl-1.6", "hf", "is not supported yet with trl-1.6; supported: trl-1.10 and later"),
                ("trl-1.13", "fused", "loop.entropy_bonus: TRL refuses it with Liger's loss; use loss hf"),
            )
        ),
        ({"kernels": {"loss": "fused"}}, "not supported yet with trainer grpo and trl-1.15; supported: tiled_lm_head"),
        (
            {
                "profile": "trl-1.13",
                "kernels": {"loss": "fused"},
                "parallelism": {"world": 4, "dp": 4, "strategy": "zero3"},
            },
            "not supported yet with full and loss fused; supported: ddp, zero0, zero1, zero2, fsdp, fsdp2",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        estimate(RunSpec(**{"model": "llama-3.2-1b", "trainer": "grpo", "batch": {"micro": 8}, **changes}))


def test_a_grid_counts_the_generation_of_whole_prompts() -> None:
    run = grpo(method="lora", batch={"accumulation": 1, "new_tokens": 2048}).asked
    found = grid(run, batch=[4, 6, 32])
    assert found.allocated.tolist() == [peak(run, 4), -1, peak(run, 32)]


def peak(run: RunSpec, micro: int) -> int:
    return estimate(run.model_copy(update={"batch": run.batch.model_copy(update={"micro": micro})})).bytes.allocated
