"""Side tasks of training (evaluation, generation, saving, merging): traces, arithmetic and laws."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.golden import TraceFigures, rows, trace_figures
from memplan import Estimate, RunSpec, estimate
from memplan.catalogue.hardware.overhead import cublas_workspace
from memplan.catalogue.methods.saving import checkpoint_copies
from memplan.core.errors import MemplanError
from memplan.core.ir import Weight
from memplan.estimate.answer import phase_peaks
from memplan.models.configs import family
from memplan.planning.sweep import STEP_PHASES, grid
from tests.cases import in_groups
from tests.sampling import ALL, examples, sampled

CASES: list[dict[str, Any]] = sampled(rows("traced_asides.jsonl"), 12)
ASIDES = ("eval", "generate", "save", "merge")
WORKSPACES = 2 * cublas_workspace((8, 0)).usual
MODEL = "qwen2.5-0.5b"

laws = settings(max_examples=examples(15), deadline=None, suppress_health_check=[HealthCheck.too_slow])


def label(case: dict[str, Any]) -> str:
    run = case["run"]
    method = run.get("method", {})
    evaluation = run["also"].get("evaluation", {})
    more = [method.get("kind", ""), method.get("quantization", {}).get("format", ""), *run["also"], *evaluation]
    more += ["autocast" if run.get("precision", {}).get("autocast") else "", run.get("kernels", {}).get("loss", "")]
    return "-".join([case["name"], *filter(None, more)])


def without_workspaces(answer: TraceFigures) -> dict[str, int]:
    """Return the peak of the side tasks without cuBLAS's workspaces, as in a trace."""
    return {p.phase: p.peak - WORKSPACES for p in answer.phases if p.phase in ASIDES}


@in_groups(CASES, label)
def test_side_tasks_are_near_their_traces(case: dict[str, Any]) -> None:
    mine = without_workspaces(trace_figures(case["run"]))
    assert mine.keys() == case["phases"].keys()
    for phase, bytes_ in case["phases"].items():
        assert mine[phase] == pytest.approx(bytes_, rel=case.get("within", 4e-3)), phase


@ALL
def test_reserved_memory_is_near_a_replay_of_the_trace() -> None:
    real = [case for case in CASES if isinstance(case["run"]["model"], str) and "method" in case["run"]]
    assert len(real) == 2  # with adapters, whose states do not affect the segments
    for case in real:
        assert estimate(RunSpec(**case["run"])).bytes.reserved == pytest.approx(case["reserved"], rel=5e-3)


@ALL
def test_the_mean_error_is_below_a_tenth_of_a_percent() -> None:
    errors: list[float] = []
    for case in CASES:
        mine = without_workspaces(trace_figures(case["run"]))
        errors += [abs(mine[phase] / n - 1) for phase, n in case["phases"].items()]
    assert len(errors) > 200
    assert sum(errors) / len(errors) < 5e-4
    assert errors.count(0) > len(errors) / 2


# --- components


def asked(also: dict[str, Any], **fields: Any) -> Estimate:
    batch = {"sequence": 64}
    return estimate(RunSpec(**{"model": MODEL, "method": "lora", "batch": batch, "also": also, **fields}))


def peak(answer: Estimate, phase: str) -> int:
    return phase_peaks(answer)[phase]


LOGITS = 3 * 100 * 151936 * 2  # batch x tokens x vocabulary, bf16
LABELS = 3 * 100 * 8


def evaluated(**fields: Any) -> Estimate:
    return asked({"evaluation": {"micro": 3, "sequence": 100, **fields}})


def up(n: int) -> int:
    return -(-n // 512) * 512


def test_concatenating_kept_logits_needs_both_copies() -> None:
    answer = evaluated(kept_batches=5)
    standing = peak(asked({"saving": {}}), "save")
    joined = up(5 * LOGITS) + up(4 * LOGITS) + up(LOGITS)
    during = peak(evaluated(), "eval") + up(4 * LOGITS) + up(LOGITS) + up(4 * LABELS) + up(LABELS)
    labels = up(4 * LABELS) + up(LABELS)
    assert peak(answer, "eval") == max(during, standing + joined + labels + 512)  # plus the loss
    lines = {line.what: line.bytes for line in answer.ledger}
    assert lines["logits of the previous batches"] == up(4 * LOGITS)


def test_batches_moved_to_the_host_leave_the_gpu() -> None:
    assert peak(evaluated(kept_batches=20, accumulation=2), "eval") == peak(evaluated(kept_batches=2), "eval")
    assert peak(evaluated(kept_batches=20, accumulation=1), "eval") == peak(evaluated(), "eval")
    assert peak(evaluated(kept_batches=20, batch_metrics=True), "eval") == peak(evaluated(), "eval") - 512  # the loss


def test_a_list_of_logits_is_not_joined() -> None:
    in_list = peak(evaluated(kept_batches=5, concatenates=False), "eval")
    assert in_list == peak(evaluated(), "eval") + 4 * up(LOGITS) + 4 * up(LABELS)


def test_a_loss_that_keeps_no_logits_in_training_returns_them_in_evaluation() -> None:
    fields = {"profile": "unsloth-2025", "method": "lora", "also": {"evaluation": {"kept_batches": 3}}}
    answers = [estimate(RunSpec(model=MODEL, kernels=k, **fields)) for k in ({}, {"loss": "fused"})]
    assert [a.phases for a in answers] == [answers[0].phases] * 2
    assert sum(line.bytes for line in answers[0].ledger if line.what.startswith("logits of")) > 0


@pytest.mark.parametrize(
    ("profile", "loss"),
    [
        ("transformers-5", "fused"),
        *((name, "hf") for name in ("transformers-5.14", "transformers-4.51", "axolotl-0.12")),
    ],
)
def test_ligers_loss_has_all_logits_in_evaluation_unless_the_trainer_skips_them(profile: str, loss: str) -> None:
    fields = {"profile": profile, "method": "lora", "also": {"evaluation": {"micro": 8}}}
    fused, alike = (
        next(p for p in estimate(RunSpec(model=MODEL, kernels={"loss": name}, **fields)).phases if p.phase == "eval")
        for name in ("fused", "hf")
    )
    assert (fused.where.partition(".")[0] == "loss", fused.peak == alike.peak) == (loss == "hf", loss == "hf")


def test_cut_cross_entropy_has_no_logits_in_evaluation_whatever_the_trainer_does() -> None:
    """axolotl-ai-cloud/ml-cross-entropy transformers/utils.py PatchOptions.use_lce: train_only is false."""

    def evaluation(**fields: Any) -> int:
        also = {"evaluation": {"micro": 8, **fields}}
        return peak(
            estimate(RunSpec(model=MODEL, profile="axolotl-0.12", kernels={"loss": "fused"}, also=also)), "eval"
        )

    assert evaluation(fuses=True) < evaluation() == evaluation(fuses=False)
    assert evaluation(fuses=True, kept_batches=1) >= evaluation()


def test_keeping_only_argmax_takes_eight_bytes_per_token() -> None:
    kept = peak(evaluated(kept_batches=5, preprocess="argmax"), "eval")
    tokens = up(4 * LABELS) + up(LABELS)  # int64, as labels are
    assert kept == peak(evaluated(), "eval") + 2 * tokens


def test_kept_logits_reach_the_host_in_fp32() -> None:
    each = 3 * 100 * (151936 * 4 + 8)
    assert evaluated(kept_batches=5).host_bytes == 5 * each
    assert evaluated(kept_batches=6, accumulation=2).host_bytes == 2 * 6 * each  # old and new, while concatenated


def test_evaluation_keeps_optimizer_states_but_no_gradients() -> None:
    answer = estimate(RunSpec(model=MODEL, also={"evaluation": {"micro": 64}}))
    assert answer.peak.phase == "eval"
    assert answer.categories["gradient"] == 0
    assert answer.categories["optstate"] > 2 * 490_000_000 * 2  # two, bf16


def test_nothing_is_dropped_in_evaluation() -> None:
    answer = estimate(RunSpec(model="gpt2", batch={"sequence": 512}, also={"evaluation": {"micro": 32}}))
    assert answer.peak.phase == "eval"
    assert not [line for line in answer.ledger if "mask" in line.what]


def test_a_merge_makes_the_product_twice() -> None:
    standing = peak(asked({"saving": {}}), "save")
    assert peak(asked({"merging": {}}), "merge") == standing + 2 * 4864 * 896 * 4  # the MLP's, in the adapters' fp32


def test_a_quantised_weight_is_sent_to_the_host_and_back() -> None:
    fields: dict[str, Any] = {"method": {"kind": "qlora", "quantization": {"double_quant": False}}}
    answer = asked({"merging": {}}, **fields)
    standing, n = peak(asked({"saving": {}}, **fields), "save"), 4864 * 896
    whole = n * 2 + 3 * n * 4  # dequantised in bf16; the product, the sum, and the sum from the host in fp32
    stored = n // 2 + up(n // 64 * 4) + 512  # packed, scales, the code
    assert peak(answer, "merge") == standing + whole + stored
    assert answer.host_bytes == n * 4


def test_a_model_reloaded_to_merge_is_whole_and_has_no_states() -> None:
    trained = asked({"merging": {}}, method="qlora")
    again = asked({"merging": "reloaded"}, method="qlora")
    assert peak(again, "merge") > peak(trained, "merge")
    wide = asked({"merging": {"model": "reloaded", "dtype": "fp32"}}, method="qlora")
    assert peak(wide, "merge") > 1.9 * (peak(again, "merge") - WORKSPACES)
    assert again.bytes.reserved >= again.bytes.allocated


def test_experts_are_split_into_copies_to_be_saved() -> None:
    stack = Weight("mlp.experts.gate_up_proj", "E 2 m h", "mlp", "bf16", rows=3, stacked=True)
    assert [t.shape for t in checkpoint_copies(stack, family("qwen3_moe").checkpoint.experts)] == ["E m h", "E m h"]
    assert not [*checkpoint_copies(stack, family("gpt_oss").checkpoint.experts)]
    full, adapters = (asked({"saving": {}}, model="qwen3-30b-a3b", method=method) for method in ("full", "lora"))
    copies = 48 * 2 * 128 * 768 * 2048 * 2  # layers x gate and up x experts x width x hidden, bf16
    states = 2 * full.parameters.total * 2
    assert peak(full, "save") == pytest.approx(full.parameters.total * 2 + states + copies, rel=1e-3)
    assert peak(adapters, "save") < peak(adapters, "backward")  # adapters are saved unchanged


RANKS: dict[str, Any] = {"world": 4, "dp": 4}


def test_fsdp_gathers_a_unit_and_fsdp2_a_tensor() -> None:
    saving = {"saving": {"state_dict": "full", "optimizer": False}}
    two = asked(saving, method="full", parallelism={**RANKS, "strategy": "fsdp2"})
    none = asked({"saving": {"state_dict": "sharded"}}, method="full", parallelism={**RANKS, "strategy": "fsdp2"})
    assert peak(two, "save") - peak(none, "save") == 151936 * 896 * 2  # the tied embeddings
    one = asked(saving, method="full", parallelism={**RANKS, "strategy": "fsdp"})
    none = asked({"saving": {"state_dict": "sharded"}}, method="full", parallelism={**RANKS, "strategy": "fsdp"})
    assert peak(one, "save") - peak(none, "save") == up((151936 * 896 + 896) * 2)  # with the last norm
    assert one.host_bytes == 494_032_768 * 2
    assert [(p.phase, p.rank, p.node) for p in one.host.phases[1:]] == [
        ("step", 0, 0),
        ("save", *[494_032_768 * 2] * 2),
    ]
    assert none.host_bytes == 0


def test_zero_gathers_a_module() -> None:
    zero3 = {**RANKS, "strategy": "zero3"}
    full = asked({"saving": {"state_dict": "full"}}, method="full", parallelism=zero3)
    none = asked({"saving": {}}, method="full", parallelism=zero3)  # stage3_gather_16bit_weights_on_model_save is off
    assert peak(full, "save") - peak(none, "save") == 151936 * 896 * 2


# --- laws


@st.composite
def trainings(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a run and its side tasks as the fields of a RunSpec."""
    method = draw(st.sampled_from(["full", "lora", "qlora", "dora"]))
    kept = draw(st.integers(0, 6))
    evaluation = {
        "micro": draw(st.integers(1, 9)),
        "sequence": draw(st.integers(1, 900)),
        "kept_batches": kept,
        "accumulation": draw(st.integers(1, 4)) if kept and draw(st.booleans()) else None,
        "new_tokens": 0 if kept else draw(st.sampled_from([0, 3])),
    }
    merges: dict[str, Any] = {"merging": draw(st.sampled_from(["trained", "reloaded"]))} if method != "full" else {}
    return {
        "model": draw(st.sampled_from([MODEL, "llama-3.2-1b", "gemma-2-2b"])),
        "method": method,
        "batch": {"micro": draw(st.integers(1, 3)), "sequence": draw(st.integers(1, 900))},
        "precision": draw(st.sampled_from(["bf16", "amp"])) if method != "qlora" else "bf16",
        "also": {"evaluation": evaluation, "saving": {}, **merges},
    }


@laws
@given(trainings())
def test_side_tasks_never_lower_the_peak_or_change_a_step(fields: dict[str, Any]) -> None:
    plain = estimate(RunSpec(**{k: v for k, v in fields.items() if k != "also"}))
    more = estimate(RunSpec(**fields))
    assert more.phases[: len(plain.phases)] == plain.phases
    assert more.bytes.allocated >= plain.bytes.allocated
    assert more.bytes.reserved >= plain.bytes.reserved


@laws
@given(trainings())
def test_the_ledger_and_the_timeline_reach_the_peak(fields: dict[str, Any]) -> None:
    answer = estimate(RunSpec(**fields))
    assert sum(line.bytes for line in answer.ledger) == answer.bytes.allocated
    assert max(moment.peak for moment in answer.timeline) <= answer.bytes.allocated <= answer.bytes.reserved
    assert [sum(kinds.values()) for kinds in answer.timeline_kinds] == [moment.peak for moment in answer.timeline]


@laws
@given(trainings(), st.sampled_from(["micro", "sequence", "kept_batches"]), st.integers(1, 20))
def test_a_larger_evaluation_never_takes_less(fields: dict[str, Any], axis: str, more: int) -> None:
    evaluation = {**fields["also"]["evaluation"], "accumulation": None, "new_tokens": 0}
    larger = {**evaluation, axis: evaluation[axis] + more}
    peaks = [
        phase_peaks(estimate(RunSpec(**{**fields, "also": {"evaluation": e}})))["eval"] for e in (evaluation, larger)
    ]
    assert peaks[0] <= peaks[1]


@laws
@given(trainings())
def test_an_evaluation_at_training_size_takes_no_more_than_training(fields: dict[str, Any]) -> None:
    evaluation = {**fields["batch"]}
    answer = estimate(RunSpec(**{**fields, "kernels": {"checkpointing": "none"}, "also": {"evaluation": evaluation}}))
    peaks = phase_peaks(answer)
    assert peaks["eval"] <= max(peaks["forward"], peaks["loss"], peaks["backward"])


def test_a_sweep_includes_side_tasks() -> None:
    run = RunSpec(model=MODEL, method="lora", also={"evaluation": {"micro": 4}})
    swept = grid(run, sequence=[64, 4096])
    for i, sequence in enumerate((64, 4096)):
        answer = estimate(run.model_copy(update={"batch": run.batch.model_copy(update={"sequence": sequence})}))
        assert swept.allocated[i] == answer.bytes.allocated
        assert STEP_PHASES[swept.phases[i]] == answer.peak.phase


# --- refusals

KEPT = "also.evaluation"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"task": "forward", "also": {"saving": {}}}, "also"),
    ({"also": {"merging": {}}}, "also.merging"),
    ({"method": "lora", "also": {"merging": {"dtype": "bf16"}}}, "also.merging.dtype"),
    ({"also": {"evaluation": {"accumulation": 2}}}, f"{KEPT}.accumulation"),
    ({"also": {"evaluation": {"preprocess": "argmax"}}}, f"{KEPT}.preprocess"),
    ({"also": {"evaluation": {"batch_metrics": True}}}, f"{KEPT}.batch_metrics"),
    (
        {"also": {"evaluation": {"kept_batches": 2, "batch_metrics": True, "accumulation": 2}}},
        f"{KEPT}.accumulation",
    ),
    ({"also": {"evaluation": {"kept_batches": 2, "new_tokens": 2}}}, f"{KEPT}.kept_batches"),
    ({"kernels": {"loss": "chunked"}, "also": {"evaluation": {"kept_batches": 2}}}, f"{KEPT}.kept_batches"),
    ({"profile": "trl", "method": "lora", "also": {"evaluation": {"kept_batches": 2}}}, f"{KEPT}.kept_batches"),
    ({"parallelism": {"world": 2, "tp": 2}, "also": {"saving": {}}}, "also.saving"),
    (
        {"parallelism": {"world": 2, "tp": 2}, "also": {"evaluation": {"kept_batches": 2}}},
        f"{KEPT}.kept_batches",
    ),
    (
        {"parallelism": {**RANKS, "strategy": "fsdp2"}, "also": {"evaluation": {"new_tokens": 2}}},
        f"{KEPT}.new_tokens",
    ),
    (
        {"method": "lora", "parallelism": {**RANKS, "strategy": "ddp"}, "also": {"merging": {}}},
        "also.merging.model",
    ),
    ({"task": "generate", "profile": "vllm-0.33", "also": {"saving": {}}}, "also"),
]


@pytest.mark.parametrize(("fields", "field"), REFUSED, ids=str)
def test_impossible_side_tasks_are_refused_by_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(MemplanError) as caught:
        estimate(RunSpec(**{"model": MODEL, **fields}))
    assert caught.value.field == field
    assert "\n" not in str(caught.value)


def test_kept_logits_of_a_head_in_fp32_need_no_cast() -> None:
    """Mamba casts its logits to fp32, in which its head computes after kbit preparation. Labels are int64."""

    def taken(kept: int) -> int:
        evaluation = {"micro": 1, "kept_batches": kept, "concatenates": False}
        fields = {"method": {"kind": "qlora", "targets": ["in_proj"]}, "batch": {"sequence": 256}}
        run = RunSpec.model_validate({"model": "falcon-mamba-7b", **fields, "also": {"evaluation": evaluation}})
        return next(p.peak for p in estimate(run).phases if p.phase == "eval")

    assert taken(6) - taken(3) == 3 * 256 * (65024 * 4 + 8)
