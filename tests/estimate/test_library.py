"""The library: runs are values; answers are equal in every thread and process, and round-trip as JSON."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from memplan import Estimate, MemplanError, RunSpec, estimate
from memplan.catalogue.hardware.gpus import all_gpus
from memplan.catalogue.hardware.overhead import COVERAGE, PREDICTION_BAND, cuda_context
from memplan.core.errors import InternalError
from memplan.estimate.answer import Line, Phase
from memplan.estimate.training import TrainingWalk
from memplan.resolve.decide import decide
from tests.sampling import ALL, examples
from tests.tiny import SMALLEST

RUN = RunSpec(model="qwen2-7b", method="qlora", gpu="3090")

runs = st.builds(
    RunSpec,
    model=st.sampled_from(["llama-3.2-1b", "qwen2-0.5b", "phi-4-mini"]),
    method=st.sampled_from(["full", "lora", "qlora", "dora", {"kind": "lora", "targets": ["o_proj"], "dropout": 0.1}]),
    precision=st.sampled_from(["pure", "amp", "mixed", "fp16", {"weights": "bf16", "autocast": True}]),
    optimizer=st.sampled_from(["adamw_torch", "sgd", "adafactor", {"name": "adamw_torch", "foreach": False}]),
    batch=st.fixed_dictionaries({"micro": st.integers(1, 64), "sequence": st.integers(1, 8192)}),
    gpu=st.sampled_from([None, "a100-80gb", "t4"]),
)


def test_an_answer_has_the_contracts_fields() -> None:
    answer = estimate(RUN)
    b = answer.bytes
    assert answer.verdict.answer == "fits"
    assert b.allocated <= b.reserved <= b.used
    assert answer.band.low <= b.used <= answer.band.high
    assert answer.gpu is not None
    assert answer.verdict.headroom == answer.gpu.usable - b.used
    assert answer.parameters.total == 7_615_616_512
    assert answer.peak.phase in ("load", "forward", "loss", "backward", "step")
    assert max(p.peak for p in answer.phases) == b.allocated


@settings(deadline=None, max_examples=examples(15))
@given(runs)
def test_a_run_and_its_answer_round_trip_as_json(run: RunSpec) -> None:
    again = RunSpec.model_validate_json(run.model_dump_json())
    assert again == run
    assert hash(again) == hash(run)
    answer = estimate(run)
    dumped = json.loads(answer.model_dump_json())
    assert dumped == answer.model_dump() == estimate(again).model_dump()
    resolved = RunSpec.model_validate(dumped["run"])
    assert resolved == answer.run
    assert estimate(resolved).bytes == answer.bytes


def test_a_resolved_run_leaves_nothing_open() -> None:
    run = estimate(RunSpec(model="qwen2-7b", method="lora")).run
    assert run.precision.compute == run.precision.grads == "bf16"
    assert run.method.adapter_dtype == "fp32"
    assert run.method.alpha == 8.0
    assert run.optimizer.foreach is not None


def test_numbers_are_integers_all_the_way_down() -> None:
    def check(value: Any, path: str = "") -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                check(inner, f"{path}.{key}")
        elif isinstance(value, list):
            for inner in value:
                check(inner, path)
        elif isinstance(value, float):
            assert path in (
                ".band.coverage",
                ".run.method.alpha",
                ".run.method.dropout",
                ".run.loop.clip_grad_norm",
                ".run.optimizer.momentum",
                ".run.parallelism.expert_imbalance",
            ), path

    huge = RunSpec(model="llama-3.1-405b", batch={"micro": 2**40, "sequence": 2**40})
    for run in (RUN, huge):
        check(json.loads(estimate(run).model_dump_json()))
    assert estimate(huge).bytes.allocated > 2**80


@pytest.mark.parametrize(
    ("path", "value"),
    [("model", "gpt2"), ("batch.micro", 2), ("method.rank", 3), ("method.quantization.block_size", 128)],
)
def test_a_run_cannot_be_changed(path: str, value: Any) -> None:
    *parts, last = path.split(".")
    part: Any = RUN
    for name in parts:
        part = getattr(part, name)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(part, last, value)


def test_free_form_parts_cannot_be_changed_either() -> None:
    config = {"model_type": "llama", "hidden_size": 64, "layer_types": ["full"]}
    run = RunSpec(model={"config": config})
    config["hidden_size"] = 128
    held: Any = run.model
    assert held.config["hidden_size"] == 64
    assert held.config["layer_types"] == ("full",)
    with pytest.raises(TypeError):
        held.config["hidden_size"] = 1
    with pytest.raises(TypeError):
        held.config.update(a=1)
    assert len({run, RunSpec.model_validate_json(run.model_dump_json())}) == 1


TINY: dict[str, Any] = {**SMALLEST, "rope_scaling": {"factor": 2.0, "types": ["a", ["b"]]}}


def test_a_frozen_mapping_has_no_way_in() -> None:
    held: Any = RunSpec(model={"config": TINY}).model
    before = hash(held)
    for change in (
        lambda d: d.__ior__({"a": 1}),
        lambda d: d.setdefault("a", 1),
        lambda d: d.pop("hidden_size"),
        lambda d: d.popitem(),
        lambda d: d.clear(),
        lambda d: d.__delitem__("hidden_size"),
        lambda d: d["rope_scaling"].update(a=1),
    ):
        with pytest.raises(TypeError, match="cannot be changed"):
            change(held.config)
    assert hash(held) == before


@pytest.mark.parametrize("model", ["qwen2-0.5b", {"config": TINY}], ids=["a name", "a config"])
def test_runs_and_answers_are_copied_and_sent_to_other_processes(model: Any) -> None:
    run = RunSpec(model=model, method="qlora", gpu="t4")
    answer = estimate(run)
    assert pickle.loads(pickle.dumps(run)) == copy.deepcopy(run) == copy.copy(run) == run
    for again in (pickle.loads(pickle.dumps(answer)), copy.deepcopy(answer)):
        assert again == answer
        assert again.model_dump() == answer.model_dump()


@pytest.mark.parametrize(
    "value",
    [{1}, object(), b"x", float("nan"), float("inf"), [float("-inf")], {"a": {2}}, 3 + 4j],
    ids=lambda v: type(v).__name__,
)
def test_values_that_json_cannot_hold_are_refused_in_a_run(value: Any) -> None:
    with pytest.raises(MemplanError, match="which JSON cannot"):
        RunSpec(model={"config": {**TINY, "further": value}})


def test_an_infinitely_nested_config_is_refused_in_a_run() -> None:
    config: dict[str, Any] = dict(TINY)
    config["self"] = config
    with pytest.raises(MemplanError, match="nested"):
        RunSpec(model={"config": config})


def test_a_set_of_names_has_an_order() -> None:
    names = ("v_proj", "q_proj", "k_proj", "o_proj", "up_proj")
    run = RunSpec(model="qwen2-0.5b", method={"kind": "lora", "targets": set(names)})
    assert run.method.targets == tuple(sorted(names))


def test_an_answer_cannot_be_changed() -> None:
    answer = estimate(RUN)
    dumped = answer.model_dump()
    for name in ("bytes", "verdict", "unsupported", "ledger", "anything"):
        with pytest.raises(AttributeError, match="cannot be changed"):
            setattr(answer, name, None)
    with pytest.raises(AttributeError, match="cannot be changed"):
        del answer.bytes
    with pytest.raises(TypeError, match="cannot be changed"):
        answer.categories["parameter"] = 0
    for part in ("bytes", "categories", "run"):
        answer.model_dump()[part].clear()
    assert answer.model_dump() == dumped


def test_runs_are_keys_of_a_dict() -> None:
    table = {RUN: 1, RunSpec(model="qwen2-7b", method="lora", gpu="3090"): 2}
    assert table[RunSpec(model="qwen2-7b", method={"kind": "qlora"}, gpu="3090")] == 1


@ALL
def test_threads_get_the_same_answers() -> None:
    grid = [
        RunSpec(model=model, method=method, batch={"micro": micro, "sequence": sequence}, gpu=gpu)
        for model in ("qwen2-0.5b", "gemma-2-2b")
        for method in ("full", "qlora")
        for micro in (1, 3)
        for sequence in (512, 4096)
        for gpu in (None, "t4")
    ]

    def answer(run: RunSpec) -> str:
        return estimate(run).model_dump_json()

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(answer, grid * 2))
    assert together == [answer(run) for run in grid] * 2


def test_a_separate_process_gives_the_same_answer() -> None:
    code = (
        "import memplan\n"
        "run = memplan.RunSpec(model='qwen2-7b', method='qlora', gpu='3090')\n"
        "print(memplan.estimate(run).model_dump_json())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == estimate(RUN).model_dump()


def test_answers_are_values() -> None:
    a, b = estimate(RUN), estimate(RUN)
    assert a == b
    assert hash(a) == hash(b)
    assert a != estimate(RunSpec(model="qwen2-7b", method="lora", gpu="3090"))
    assert "qwen2-7b" in repr(a)
    assert isinstance(a, Estimate)


@pytest.mark.parametrize(
    "fields",
    [
        {"batch": {"micro": 0}},
        {"batch": {"micro": -1}},
        {"batch": {"sequence": 0}},
        {"batch": {"micro": 2.0}},
        {"batch": {"micro": "2"}},
        {"batch": {"micro": True}},
        {"batch": {"micro": 2**41}},
        {"batch": {"micro": float("nan")}},
        {"method": {"kind": "lora", "rank": 0}},
        {"method": {"kind": "lora", "dropout": 1.0}},
        {"method": "qloar"},
        {"precision": "bf17"},
        {"kernels": {"attention": "flash"}},
        {"unknown": 1},
        {"method": {"kind": "lora", "unknown": 1}},
        {"loop": {"clip_grad_norm": -1.0}},
        {"loop": {"padded": "yes"}},
        {"loop": {"padded": 1}},
        {"kernels": {"compile": "true"}},
        {"method": {"kind": "lora", "alpha": "16"}},
        {"method": {"kind": "lora", "dropout": True}},
        {"method": {"kind": "lora", "targets": 3}},
        {"gpu": 3090},
        {"method": {"kind": "qlora", "quantization": {"block_size": 65}}},
    ],
)
def test_a_field_out_of_range_is_a_validation_error(fields: dict[str, Any]) -> None:
    with pytest.raises(MemplanError):
        RunSpec(model="qwen2-7b", **fields)


def test_a_model_and_fields_stand_for_a_run() -> None:
    assert estimate("qwen2-7b", method="qlora", gpu="3090") == estimate(RUN)
    assert estimate(RUN, gpu="a100") == estimate(RUN.model_copy(update={"gpu": "a100"}))
    assert estimate({"config": SMALLEST}) == estimate(RunSpec(model={"config": SMALLEST}))


@pytest.mark.parametrize(
    ("given", "derived"),
    [
        ({"world": 2, "strategy": "fsdp2"}, {"dp": 2}),
        ({"world": 2}, {"dp": 2, "strategy": "ddp"}),
        ({"tp": 2}, {"world": 2, "dp": 1}),
        ({"world": 4, "tp": 2, "strategy": "fsdp2"}, {"dp": 2}),
        ({"world": 2, "dp": 2, "strategy": "fsdp2"}, {}),
        ({}, {}),
    ],
)
def test_gpus_are_divided_as_the_command_line_divides_them(given: dict[str, Any], derived: dict[str, Any]) -> None:
    answer = estimate("llama-3.2-1b", method="lora", parallelism=given)
    assert {origin.field.partition(".")[2]: origin.value for origin in answer.origins} == derived
    assert answer == estimate(RunSpec(model="llama-3.2-1b", method="lora", parallelism={**given, **derived}))


@pytest.mark.parametrize(
    ("fields", "code", "field", "suggestions"),
    [
        ({"methd": "lora"}, "unknown_field", "methd", ("method",)),
        ({"rank": 8}, "unknown_field", "rank", ("method.rank",)),
        ({"method": {"kind": "lora", "rnk": 8}}, "unknown_field", "method.rnk", ("rank",)),
        ({"method": "qlor"}, "invalid_value", "method.kind", ("qlora",)),
        ({"batch": {"micro": 0}}, "invalid_value", "batch.micro", ()),
        ({"batch": {"micro": "1"}}, "invalid_value", "batch.micro", ()),
        ({"gpu": "h10"}, "unknown_name", "gpu", ("h100-sxm", "h20", "a10")),
        ({"kernels": {"loss": "chunked"}, "task": "generate"}, "invalid_run", "kernels.loss", ()),
        ({"method": "shadow", "kernels": {"fused": ["rope"]}}, "not_supported", "method.kind", ()),
        ({"model": {"config": {"model_type": "llama"}}}, "unreadable", "hidden_size", ()),
        ({"model": {"config": {**SMALLEST, "model_type": "rwkv"}}}, "unsupported_model", "model_type", ()),
        ({"model": "nobody/no-such-model"}, "model_not_available", "model", ()),
    ],
)
def test_an_error_has_a_code_and_a_field_and_is_copied(
    fields: dict[str, Any], code: str, field: str, suggestions: tuple[str, ...]
) -> None:
    with pytest.raises(MemplanError) as caught:
        estimate(**{"run": fields.get("model", RUN.model), **{k: v for k, v in fields.items() if k != "model"}})
    error = caught.value
    assert (error.code, error.field, error.suggestions) == (code, field, suggestions)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_a_run_without_a_model_misses_a_field() -> None:
    with pytest.raises(MemplanError) as caught:
        RunSpec(method="lora")  # type: ignore[call-arg]
    assert (caught.value.code, str(caught.value)) == ("missing_field", "model: is missing")


def test_equal_layers_states_are_one_line_of_the_ledger() -> None:
    answer = estimate(RunSpec(model="qwen2-7b", method="lora"))
    states = [line for line in answer.ledger if line.kind == "optstate" and "down_proj.lora_A" in line.what]
    assert [line.count for line in states] == [28, 28, 28]  # two moments and, fused, a step count on the GPU


def test_used_is_reserved_plus_the_context() -> None:
    answer = estimate(RunSpec(model="qwen2-7b", method="qlora", gpu="a100-80gb"))
    assert answer.bytes.reserved > answer.bytes.allocated
    assert answer.bytes.used == answer.bytes.reserved + cuda_context((8, 0)).usual
    assert answer.band.low == answer.bytes.used * (1000 + PREDICTION_BAND.low) // 1000
    assert answer.band.high == answer.bytes.used * (1000 + PREDICTION_BAND.high) // 1000
    assert answer.band.coverage == COVERAGE


def test_on_a_nearly_full_card_torch_reserves_what_is_available() -> None:
    roomy = estimate(
        RunSpec(model="smollm2-360m", batch={"micro": 4, "sequence": 4096}, kernels={"attention": "eager"})
    )
    usable = roomy.bytes.used - 1
    gpu = min((g for g in all_gpus() if roomy.bytes.allocated < g.usable <= usable), key=lambda g: -g.usable)
    full = estimate(roomy.asked.model_copy(update={"gpu": gpu.name}))
    assert full.verdict.answer in ("fits", "tight")
    assert full.bytes.allocated < full.bytes.used <= gpu.usable < roomy.bytes.used


def test_expandable_segments_reserve_little_more_than_is_allocated() -> None:
    run = RunSpec(model="qwen2-7b", method="lora", gpu="a100-80gb")
    grown = estimate(run.model_copy(update={"loop": run.loop.model_copy(update={"expandable_segments": True})}))
    usual = estimate(run)
    assert grown.bytes.allocated == usual.bytes.allocated
    assert grown.bytes.allocated <= grown.bytes.reserved < usual.bytes.reserved


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        ("a100-80gb", "'a100-80gb' is taken to mean A100 SXM4 80GB; it could also be a100-pcie-80gb"),
        ("gtx-1070", "GeForce GTX 1070's usable memory is a conservative estimate: no driver reading was found"),
        ("mi100", "kernels are assumed to be those of NVIDIA compute capability 8.0; not measured on AMD"),
        ("a100-sxm-80gb", ""),
    ],
)
def test_a_cards_peculiarities_are_notes(gpu: str, said: str) -> None:
    notes = estimate(RunSpec(model={"config": SMALLEST}, precision="fp16", gpu=gpu)).notes
    about = [note for note in notes if any(w in note for w in ("taken to mean", "assumed to be", "driver reading"))]
    assert any(note.startswith(said) for note in about) if said else about == []


class _WrongWalk(TrainingWalk):
    """The walk of a deliberately wrong answer."""

    def __init__(self, phase: Phase, *lines: Line) -> None:
        super().__init__(RUN, decide(RUN))
        self.phases = [phase]
        self._lines = list(lines)

    def lines(self, at: Phase) -> list[Line]:
        del at
        return self._lines


def _answer(phase: Phase, *lines: Line) -> Estimate:
    return Estimate(_WrongWalk(phase, *lines))


@pytest.mark.parametrize("peak", [-1, 1.5])
def test_every_phase_of_an_answer_has_a_number_of_bytes(peak: Any) -> None:
    with pytest.raises(InternalError, match=r"backward takes .* bytes at loss.*report"):
        _ = _answer(Phase("backward", 1, peak, "loss")).phases


def test_a_ledger_has_no_line_that_counts_less_than_nothing() -> None:
    line = Line("y1", "activation", "layers", "b h", (1, 2), "bf16", -2, -4, "", "")
    with pytest.raises(InternalError, match="-2 × y1 take -4 bytes"):
        _ = _answer(Phase("forward", None, 0, ""), line).ledger


def test_a_ledger_that_does_not_sum_to_the_peak_is_an_error() -> None:
    line = Line("y1", "activation", "layers", "b h", (1, 2), "bf16", 1, 4, "", "")
    with pytest.raises(InternalError, match="sum to 4 bytes"):
        _ = _answer(Phase("forward", None, 0, ""), line).ledger
