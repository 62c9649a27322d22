"""Answers by trace without torch: reading a trace, the cache, and refusals before tracing."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.main import get_command

import memplan
from memplan import RunSpec
from memplan.catalogue.hardware.gpus import find_gpu
from memplan.catalogue.hardware.overhead import cublas_workspace, cuda_context
from memplan.cli.app import app
from memplan.core.errors import ConfigError, ProbeError, SpecError, UnknownNameError, UnsupportedModelError
from memplan.core.units import GIB, MIB
from memplan.probe import limits
from memplan.probe.answer import _architecture_notes
from memplan.probe.route import estimates
from memplan.probe.run import cache
from memplan.probe.run.trace import Tracer
from memplan.report.schema import answer_model
from tests.checkpoints import folder_of, write_gguf
from tests.sampling import examples
from tests.tiny import SMALLEST

COMMAND = get_command(app)
VERSIONS = {"torch": "2.13.0", "transformers": "5.24.0", "peft": "0.21.2", "bitsandbytes": "0.50.2"}
XGLM = {
    "model_type": "xglm",
    "vocab_size": 300,
    "d_model": 64,
    "ffn_dim": 128,
    "num_layers": 2,
    "attention_heads": 4,
    "max_position_embeddings": 128,
}
WEIGHT, GRADIENT, STATE, KEPT, LOGITS = 40 * MIB, 40 * MIB, 80 * MIB, 12 * MIB, 24 * MIB


class Recording:
    """A trace as the tracing process answers it: storages in order of creation, phases with their peaks."""

    def __init__(self) -> None:
        self.storages: list[list[Any]] = []
        self.events: list[int] = []
        self.phases: list[list[Any]] = []

    def make(self, bytes_: int, kind: str, op: str, module: str = "", name: str = "") -> int:
        number = len(self.storages)
        self.storages.append([bytes_, bytes_, [bytes_ // 2], "bfloat16", op, module, kind, len(self.events), -1, name])
        self.events.append(number)
        return number

    def free(self, *numbers: int) -> None:
        for number in numbers:
            self.storages[number][8] = len(self.events)
            self.events.append(~number)

    def phase(self, name: str, step: int, start: int) -> None:
        sizes = [self.storages[e][0] if e >= 0 else -self.storages[~e][0] for e in self.events]
        inside = list(accumulate(sizes))[max(0, start - 1) :]
        at = max(0, start - 1) + inside.index(max(inside))
        self.phases.append([name, step, start, len(self.events), max(inside), at, inside[-1]])

    def answer(self, **more: Any) -> dict[str, Any]:
        for storage in self.storages:
            storage[8] = len(self.events) if storage[8] < 0 else storage[8]
        return {
            "storages": self.storages,
            "events": self.events,
            "phases": self.phases,
            "parameters": WEIGHT // 2,
            "trainable": WEIGHT // 2,
            "active": WEIGHT // 2,
            "built": "XGLMForCausalLM",
            "versions": VERSIONS,
            "seconds": 0.1,
            "notes": ["a note of the trace"],
            **more,
        }


def two_steps(**more: Any) -> dict[str, Any]:
    """Return a trace with two layers' weights; per step a saved tensor, logits and gradients; states from step 1 on."""
    r = Recording()
    for layer in range(2):
        r.make(WEIGHT // 2, "parameter", "empty_strided", name=f"model.layers.{layer}.fc.weight")
    r.phase("load", 0, 0)
    for step in (1, 2):
        start = len(r.events)
        kept = r.make(KEPT, "activation", "mul", "model.layers.1.fc")
        r.phase("forward", step, start)
        start = len(r.events)
        logits = r.make(LOGITS, "temp", "log_softmax")
        r.phase("loss", step, start)
        start = len(r.events)
        r.free(logits)
        gradients = [
            r.make(GRADIENT // 2, "gradient", "mm", name=f"gradient of model.layers.{n}.fc.weight") for n in (1, 0)
        ]
        r.free(kept)
        r.phase("backward", step, start)
        r.phase("clip", step, len(r.events))
        start = len(r.events)
        if step == 1:
            for layer in range(2):
                r.make(STATE // 2, "optstate", "zeros_like", name=f"model.layers.{layer}.fc.weight exp_avg")
        r.free(*gradients)
        r.phase("step", step, start)
    return r.answer(**more)


Asked = list[RunSpec]


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Asked]:
    """Make every trace `two_steps`, with an empty cache; return the list of traced runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("memplan.probe.run.cache.versions", lambda: dict(VERSIONS))

    def with_(outcome: Mapping[str, Any] | Exception | None = None) -> Asked:
        asked: Asked = []

        def answer(self: Tracer, run: RunSpec, steps: int = 2, **_: Any) -> Any:
            asked.append(run)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome or two_steps()

        monkeypatch.setattr(Tracer, "answer", answer)
        return asked

    return with_


def xglm(**parts: Any) -> RunSpec:
    config = {**XGLM, **parts.pop("config", {})}
    return RunSpec(model={"config": config}, **{"batch": {"micro": 2, "sequence": 24}, **parts})


Traces = Callable[..., Asked]


# --- answers from a trace


@pytest.mark.parametrize("gpu", [None, "3090", "h100"])
def test_an_answer_s_peaks_are_the_trace_s_and_cublas_workspaces(traces: Traces, gpu: str | None) -> None:
    traces()
    answer = memplan.estimate(xglm(gpu=gpu), via="trace")
    one = cublas_workspace(find_gpu(gpu).compute_capability if gpu else None).usual
    first = {
        ("load", None): WEIGHT,
        ("forward", 1): WEIGHT + KEPT + one,
        ("loss", 1): WEIGHT + KEPT + LOGITS + one,
        ("backward", 1): WEIGHT + KEPT + GRADIENT + 2 * one,
        ("step", 1): WEIGHT + GRADIENT + STATE + 2 * one,
    }
    later = {
        ("forward", 2): WEIGHT + STATE + KEPT + 2 * one,
        ("loss", 2): WEIGHT + STATE + KEPT + LOGITS + 2 * one,
        ("backward", 2): WEIGHT + STATE + KEPT + GRADIENT + 2 * one,
        ("step", 2): WEIGHT + STATE + GRADIENT + 2 * one,
    }
    assert {(p.phase, p.step): p.peak for p in answer.phases} == first | later
    assert answer.bytes.allocated == later["backward", 2]
    assert answer.peak == ("backward", "loss.mm")
    assert answer.categories == {
        "parameter": WEIGHT,
        "gradient": GRADIENT,
        "optstate": STATE,
        "activation": KEPT,
        "temp": 0,
        "buffer": 0,
        "other": 2 * one,
    }
    assert [p.where for p in answer.phases if p.phase == "step"] == ["optimizer", "clipping"]


def test_reserved_is_a_replay_and_used_adds_the_context(traces: Traces) -> None:
    traces()
    answer = memplan.estimate(xglm(), via="trace")
    # one segment each: two weights of 20 MiB, the saved tensor, the logits, two states of 40 MiB; one gradient reuses
    # the logits' segment, the other has its own; both workspaces share a segment of 20 MiB
    assert answer.bytes.reserved == WEIGHT + KEPT + LOGITS + STATE + GRADIENT // 2 + 20 * MIB
    assert answer.bytes.used == answer.bytes.reserved + cuda_context(None).usual
    assert answer.band.low < answer.bytes.used < answer.band.high
    plain = memplan.estimate(xglm(loop={"expandable_segments": True}), via="trace")
    assert answer.bytes.allocated == plain.bytes.allocated <= plain.bytes.reserved
    assert plain.bytes.reserved != answer.bytes.reserved


def test_the_ledger_groups_equal_layers_and_names_their_source(traces: Traces) -> None:
    traces()
    answer = memplan.estimate(xglm(), via="trace")
    lines = {line.what: line for line in answer.ledger}
    assert lines["model.layers.fc.weight"].count == 2
    assert lines["model.layers.fc.weight"].bytes == WEIGHT
    assert (lines["mul"].where, lines["mul"].dtype, lines["mul"].dims) == ("model.layers.fc", "bf16", (KEPT // 2,))
    assert lines["gradient of model.layers.fc.weight"].kind == "gradient"
    bases = {line.basis for what, line in lines.items() if what != "cuBLAS workspace"}
    sources = {line.source for line in answer.ledger if line.basis == "traced"}
    assert bases == {"traced"}
    assert sources == {"torch 2.13.0, transformers 5.24.0, peft 0.21.2"}
    assert max(p.peak for p in answer.timeline) == answer.bytes.allocated
    assert [sum(kinds.values()) for kinds in answer.timeline_kinds] == [moment.peak for moment in answer.timeline]


def test_equal_steps_are_shown_as_one(traces: Traces) -> None:
    r = Recording()
    r.make(WEIGHT, "parameter", "empty_strided", name="w")
    r.phase("load", 0, 0)
    for step in (1, 2):
        for name in ("forward", "backward", "clip", "step"):
            start = len(r.events)
            r.free(r.make(KEPT, "temp", "mm", "m"))
            r.phase(name, step, start)
    traces(r.answer())
    answer = memplan.estimate(xglm(), via="trace")
    assert [(p.phase, p.step) for p in answer.phases] == [(n, None) for n in ("load", "forward", "backward", "step")]
    assert {p.peak for p in answer.phases[1:]} == {WEIGHT + KEPT + 2 * cublas_workspace(None).usual}


def test_an_answer_says_that_it_is_traced(traces: Traces) -> None:
    traces()
    answer = memplan.estimate(xglm(gpu="3090"), via="trace")
    dumped = json.loads(answer.model_dump_json())
    assert dumped["via"] == "trace"
    assert any("traced" in note and "transformers 5.24.0" in note for note in dumped["notes"])
    assert "a note of the trace" in dumped["notes"]
    assert answer_model().model_validate(dumped).model_dump(mode="json")["via"] == "trace"
    assert dumped["run"]["precision"]["compute"] == "bf16"
    assert dumped["run"]["kernels"]["checkpointing"] == "full"
    assert answer.verdict.answer == "fits"
    assert memplan.estimate(RunSpec(model={"config": SMALLEST})).via == "engine"


def test_a_card_smaller_than_the_live_tensors_does_not_fit(traces: Traces) -> None:
    r = Recording()
    r.make(30 * GIB, "parameter", "empty_strided", name="w")
    r.phase("load", 0, 0)
    r.phase("forward", 1, 0)
    traces(r.answer(parameters=15 * GIB))
    answer = memplan.estimate(xglm(gpu="3090"), via="trace")
    assert answer.verdict.answer == "does not fit"
    assert answer.bytes.used > 30 * GIB


def test_quantities_invisible_to_a_trace_are_left_out_and_noted(traces: Traces) -> None:
    traces(two_steps(active=None))
    answer = memplan.estimate(xglm(kernels={"checkpointing": "offload"}), via="trace")
    assert [what.partition(":")[0] for what in answer.unsupported] == ["parameters.active", "host_bytes"]
    assert answer.parameters == (WEIGHT // 2,) * 3


# --- engine or trace


def test_auto_traces_only_what_the_engine_has_no_stack_for(traces: Traces) -> None:
    asked = traces()
    known = RunSpec(model={"config": SMALLEST})
    assert memplan.estimate(known, via="auto").via == "engine"
    assert asked == []
    assert memplan.estimate(xglm(), via="auto").via == "trace"
    assert memplan.estimate(known, via="trace").via == "trace"
    assert len(asked) == 2
    for via in ("engine", None):
        with pytest.raises(UnsupportedModelError, match=r"'xglm' is not supported yet"):
            memplan.estimate(xglm(), **({"via": via} if via else {}))
    with pytest.raises(UnknownNameError, match="via: unknown name 'engin'; did you mean engine"):
        memplan.estimate(xglm(), via="engin")  # pyright: ignore[reportArgumentType]


def test_an_activation_unknown_to_a_familys_stack_is_traced(traces: Traces) -> None:
    asked = traces()
    odd = RunSpec(model={"config": {**SMALLEST, "hidden_act": "relu"}})
    assert memplan.estimate(odd, via="auto").via == "trace"
    assert len(asked) == 1
    with pytest.raises(UnsupportedModelError, match='hidden_act: "relu" is not supported yet'):
        memplan.estimate(odd, via="engine")
    traces(MISSING)
    with pytest.raises(UnsupportedModelError, match="mish, relu6; nor can its step be traced: torch is not") as error:
        memplan.estimate(odd, via="auto", cache=False)
    assert error.value.field == "hidden_act"


def test_errors_that_a_trace_cannot_avoid_are_not_traced(traces: Traces, tmp_path: Path) -> None:
    asked = traces()
    head = {"config": {**SMALLEST, "architectures": ["LlamaForQuestionAnswering"]}}
    write_gguf(tmp_path / "model.gguf", {"general.architecture": "mamba"}, [])
    for model, field in ((head, "architectures"), (str(tmp_path / "model.gguf"), "model")):
        with pytest.raises(UnsupportedModelError) as error:
            memplan.estimate(RunSpec(model=model), via="auto")
        assert error.value.field == field
        assert "traced" not in str(error.value)
    assert asked == []


MISSING = ProbeError("probe: torch is not installed; what a probe needs: pip install 'memplan[probe]'")
NO_CLASS = ProbeError(
    "model: transformers 5.24.0 has no class for causal language models of model_type 'xglm'", "model"
)


def test_without_the_extra_the_error_names_nearest_family_and_install_command(traces: Traces) -> None:
    traces(MISSING)
    with pytest.raises(UnsupportedModelError) as error:
        memplan.estimate(xglm(), via="auto")
    assert "did you mean glm" in str(error.value)
    assert "nor can its step be traced: torch is not installed" in str(error.value)
    assert "pip install 'memplan[probe]'" in str(error.value)
    assert (error.value.field, error.value.exit_code) == ("model_type", 2)
    with pytest.raises(ProbeError, match="torch is not installed"):
        memplan.estimate(xglm(), via="trace")


def test_code_from_a_hub_is_never_run_and_the_line_says_so(traces: Traces) -> None:
    traces(NO_CLASS)
    remote = {"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}
    with pytest.raises(UnsupportedModelError, match=r"custom code \(auto_map\), which memplan never runs; nor can"):
        memplan.estimate(xglm(config=remote), via="auto")
    traces()
    notes = memplan.estimate(xglm(config=remote), via="auto").notes
    assert any("never run: transformers' XGLMForCausalLM was traced" in note for note in notes)


def test_a_run_unsupported_by_probes_is_refused_with_its_field(traces: Traces) -> None:
    asked = traces()
    with pytest.raises(
        UnsupportedModelError, match="nor can its step be traced: parallelism: an answer by trace covers"
    ):
        memplan.estimate(xglm(parallelism={"world": 2, "dp": 2, "strategy": "ddp"}), via="auto")
    with pytest.raises(SpecError, match=r"optimizer\.name: a probe does not run galore_adamw"):
        memplan.estimate(xglm(optimizer="galore_adamw"), via="trace")
    assert asked == []


def test_a_trace_with_another_head_than_the_configs_is_refused(traces: Traces) -> None:
    traces()
    with pytest.raises(UnsupportedModelError, match="architectures: XGLMForSequenceClassification has a head"):
        memplan.estimate(xglm(config={"architectures": ["XGLMForSequenceClassification"]}), via="auto")
    odd = memplan.estimate(xglm(config={"architectures": ["OldXGLMForCausalLM"]}), via="auto")
    assert any("the config is of OldXGLMForCausalLM" in note for note in odd.notes)
    same = memplan.estimate(xglm(config={"architectures": ["XGLMForCausalLM"]}), via="auto")
    assert not any("architectures" in note for note in same.notes)


def test_towers_unused_by_text_are_noted(traces: Traces) -> None:
    traces()
    notes = memplan.estimate(xglm(config={"vision_config": {"hidden_size": 32}}), via="auto").notes
    assert any("traced on text alone" in note for note in notes)
    assert list(_architecture_notes({"vision_config": {"hidden_size": 32}}, "", sees=True)) == []


def test_a_checkpoint_that_is_stored_quantised_is_not_taken_for_another(traces: Traces) -> None:
    traces()
    stored = {"quantization_config": {"quant_method": "awq"}}
    with pytest.raises(UnsupportedModelError, match="quantization_config: awq checkpoints"):
        memplan.estimate(xglm(config=stored), via="auto")


# --- hostile configs: refused before a process starts


DEEP: Any = []
for _ in range(100):
    DEEP = [DEEP]
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "layers without end": ({"num_layers": 10**30}, "config: num_layers has more digits"),
    "many layers": ({"num_layers": 10**5}, "config: num_layers 100,000: a trace takes at most 1,000 layers"),
    "many layers inside": ({"text_config": {"num_hidden_layers": 10**5}}, "num_hidden_layers 100,000"),
    "many experts": ({"num_local_experts": 10**6}, "num_local_experts 1,000,000: a trace takes at most 10,000 experts"),
    "a negative size without end": ({"d_model": -(10**30)}, "config: d_model has more digits"),
    "deep": ({"a": DEEP}, "config: a is nested more than 64 deep"),
    "many values": ({"a": [0] * 200_000}, "config: holds more than 100,000 values"),
}


@pytest.mark.parametrize(("config", "line"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_config_is_one_line_and_nothing_is_traced(
    traces: Traces, tmp_path: Path, config: dict[str, Any], line: str
) -> None:
    asked = traces()
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**XGLM, **config}))
    with pytest.raises(ConfigError, match=line):
        memplan.estimate(RunSpec(model=str(path)), via="auto")
    assert asked == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


def refusal(config: dict[str, Any]) -> str:
    """Return the error about a config that is not traced; empty if it is traced."""
    try:
        limits.check(config)
    except ConfigError as error:
        return str(error)
    return ""


@settings(max_examples=examples(40))
@given(st.dictionaries(st.sampled_from([*XGLM, "num_experts", "depths", "x"]), JSON))
def test_any_config_is_taken_or_one_line(config: dict[str, Any]) -> None:
    assert re.fullmatch(r"(config: .+)?", refusal(config))


# --- the cache


def test_a_repeated_question_is_answered_from_the_cache(traces: Traces) -> None:
    asked = traces()
    first, second = (memplan.estimate(xglm(gpu=gpu), via="trace") for gpu in ("a100-80gb", None))
    assert len(asked) == 1  # without a card an A100 is assumed
    assert first.phases == second.phases
    assert first.gpu is not None
    memplan.estimate(xglm(), via="trace", cache=False)
    assert len(asked) == 2


@pytest.mark.parametrize(
    "other",
    [
        {"config": {"d_model": 128}},
        {"method": "lora"},
        {"batch": {"micro": 2, "sequence": 25}},
        {"optimizer": "sgd"},
        {"gpu": "t4"},
        {"kernels": {"checkpointing": "none"}},
    ],
)
def test_all_that_decides_a_trace_is_in_its_key(traces: Traces, other: dict[str, Any]) -> None:
    asked = traces()
    memplan.estimate(xglm(), via="trace")
    memplan.estimate(xglm(**other), via="trace")
    assert len(asked) == 2


def test_other_library_versions_are_traced_again(traces: Traces, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = traces()
    memplan.estimate(xglm(), via="trace")
    monkeypatch.setattr("memplan.probe.run.cache.versions", lambda: {**VERSIONS, "peft": "0.22.0"})
    memplan.estimate(xglm(), via="trace")
    assert len(asked) == 2


def entry(tmp_path: Path) -> Path:
    [path] = (tmp_path / "cache" / "memplan" / "traces").iterdir()
    return path


def changed(text: bytes, **more: Any) -> bytes:
    return json.dumps({**json.loads(text), **more}).encode()


def traced_but(text: bytes, **more: Any) -> bytes:
    return changed(text, traced={**json.loads(text)["traced"], **more})


WRONG: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda text: b"",
    "no JSON": lambda text: text[:-10],
    "not an object": lambda text: b"[]",
    "of another question": lambda text: changed(text, key={}),
    "without events": lambda text: traced_but(text, events=[]),
    "an event of no storage": lambda text: traced_but(text, events=[0, 7]),
    "freed twice": lambda text: traced_but(text, events=[0, 1, 2, -1, -1]),
    "storages of text": lambda text: traced_but(text, storages="x"),
    "no phases": lambda text: traced_but(text, phases=[]),
    "no number": lambda text: traced_but(text, parameters="many"),
    "deep": lambda text: b"[" * 100_000 + b"]" * 100_000,
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_an_invalid_cache_entry_is_traced_again(
    traces: Traces, tmp_path: Path, wrong: Callable[[bytes], bytes]
) -> None:
    asked = traces()
    first = memplan.estimate(xglm(), via="trace")
    path = entry(tmp_path)
    path.write_bytes(zlib.compress(wrong(zlib.decompress(path.read_bytes()))))
    again = memplan.estimate(xglm(), via="trace")
    assert len(asked) == 2
    assert again.phases == first.phases
    memplan.estimate(xglm(), via="trace")
    assert len(asked) == 2


def test_a_truncated_or_oversized_cache_entry_is_traced_again(
    traces: Traces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = traces()
    memplan.estimate(xglm(), via="trace")
    path = entry(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    memplan.estimate(xglm(), via="trace")
    assert len(asked) == 2
    monkeypatch.setattr(cache, "_ENTRY_LIMIT", 100)
    memplan.estimate(xglm(), via="trace")
    assert len(asked) == 3


def test_the_least_recently_used_entries_are_evicted(
    traces: Traces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = traces()
    memplan.estimate(xglm(), via="trace")
    first = entry(tmp_path)
    os.utime(first, (1, 1))
    monkeypatch.setattr(cache, "_CACHE_LIMIT", first.stat().st_size * 3 // 2)
    memplan.estimate(xglm(method="lora"), via="trace")
    assert entry(tmp_path) != first
    memplan.estimate(xglm(method="lora"), via="trace")
    assert len(asked) == 2
    os.utime(entry(tmp_path), (1, 1))
    memplan.estimate(xglm(method="lora"), via="trace")
    assert entry(tmp_path).stat().st_mtime > 1  # it was used


@pytest.mark.parametrize("most", ["_ENTRY_LIMIT", "_CACHE_LIMIT"])
def test_a_trace_that_is_too_large_is_not_kept(
    most: str, traces: Traces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces()
    monkeypatch.setattr(cache, most, 100)
    assert memplan.estimate(xglm(), via="trace").via == "trace"
    assert not (tmp_path / "cache" / "memplan" / "traces").exists()


def test_cached_traces_belong_to_the_code_that_made_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "run" / "cache.py"))
    digests = set[str]()
    for code in ("a", "b", "a"):
        (tmp_path / "script.py").write_text(code)
        cache._code_digest.cache_clear()
        digests.add(cache._code_digest())
    cache._code_digest.cache_clear()
    assert len(digests) == 2


def test_a_cache_that_cannot_be_written_is_done_without(
    traces: Traces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = traces()
    (tmp_path / "cache" / "memplan").mkdir(parents=True)
    (tmp_path / "cache" / "memplan" / "traces").write_text("a file")
    assert memplan.estimate(xglm(), via="trace").via == "trace"
    assert len(asked) == 1


# --- the command


class Ran:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Ran]:
    """Return a function that runs `memplan` on a config.json of a family without a stack."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(XGLM))

    def run(*words: str) -> Ran:
        with pytest.raises(SystemExit) as left:
            COMMAND.main([word.replace("CONFIG", str(path)) for word in words])
        captured = capsys.readouterr()
        return Ran(int(left.value.code or 0), captured.out, captured.err)

    return run


def test_the_command_traces_and_lists_cards_with_the_same_kernels(traces: Traces, command: Callable[..., Ran]) -> None:
    asked = traces()
    ran = command("CONFIG", "--details")
    assert (ran.code, ran.err) == (0, "")
    assert "answered by" in ran.out
    assert "of compute capability 8 and later" in ran.out
    assert "rtx-3090" in ran.out
    assert " t4" not in ran.out
    several = command("CONFIG", "--gpu", "3090", "--gpu", "4090", "--format", "csv")
    assert several.out.count(",trace,") == 2
    assert len(asked) == 3
    command("CONFIG", "--no-cache")
    assert len(asked) == 4


def test_the_command_can_disable_tracing(traces: Traces, command: Callable[..., Ran]) -> None:
    asked = traces()
    ran = command("CONFIG", "--via", "engine")
    assert (ran.code, ran.out, asked) == (2, "", [])
    assert "did you mean glm" in ran.err
    assert "via (--via): unknown name 'x'" in command("CONFIG", "--via", "x").err


@pytest.mark.parametrize("format", ["table", "json", "markdown", "csv", "html"])
def test_every_format_has_a_traced_answer(traces: Traces, command: Callable[..., Ran], format: str) -> None:
    traces()
    ran = command("CONFIG", "--gpu", "t4", "--explain", "--format", format)
    assert ran.code == 0, ran.err
    assert "traced" in ran.out


def test_a_traced_run_that_does_not_fit_names_the_smallest_fitting_card(
    traces: Traces, command: Callable[..., Ran]
) -> None:
    r = Recording()
    r.make(30 * GIB, "parameter", "empty_strided", name="w")
    r.phase("load", 0, 0)
    r.phase("forward", 1, 0)
    traces(r.answer(parameters=15 * GIB))
    ran = command("CONFIG", "--gpu", "3090")
    assert ran.code == 1
    assert "the smallest NVIDIA card that holds it" in " ".join(ran.out.split())


def test_traced_and_estimated_runs_are_compared(traces: Traces, command: Callable[..., Ran]) -> None:
    traces()
    ran = command("compare", "CONFIG", "gpt2 --seq-len 512", "--json")
    assert ran.code == 0, ran.err
    assert [answer["via"] for answer in json.loads(ran.out)["answers"]] == ["trace", "engine"]


def test_a_plan_uses_only_the_engine(traces: Traces, command: Callable[..., Ran], tmp_path: Path) -> None:
    asked = traces()
    ran = command("plan", "CONFIG", "--gpu", "3090")
    assert (ran.code, ran.out, asked) == (2, "", [])
    assert "memplan estimate can trace it, but a plan tries too many runs for that" in ran.err
    head = {"model": {"config": {**SMALLEST, "architectures": ["LlamaForQuestionAnswering"]}}}
    spec = tmp_path / "run.json"
    spec.write_text(json.dumps(head), "utf-8")
    ran = command("plan", "--spec", str(spec), "--gpu", "3090")
    assert (ran.code, ran.out, asked) == (2, "", [])
    assert "has a head of its own" in ran.err
    assert "trace" not in ran.err


# --- the Hub


def test_a_hub_model_is_traced_once_its_config_is_cached(
    traces: Traces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memplan.models.cards import PublishedModel

    asked = traces()
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**XGLM, "limit": float("inf")}))
    monkeypatch.setattr("memplan.models.cards._from_hub", lambda hf_id: PublishedModel(json.loads(path.read_text())))
    monkeypatch.setattr("memplan.models.hub.cached", lambda hf_id: path)
    run = RunSpec(model="owner/unknown", batch={"sequence": 24})
    [answer] = estimates([(run, None)], online=True)
    assert [run.model for run in asked] == ["owner/unknown"]
    assert (answer.via, answer.run.model) == ("trace", "owner/unknown")
    path.write_text(json.dumps(XGLM))
    estimates([(RunSpec(model="unknown", batch={"sequence": 24}), None)], online=True)  # an id without an owner
    model = asked[-1].model
    assert not isinstance(model, str)
    assert model.config["_name_or_path"] == "unknown"


def test_a_checkpoint_with_another_parameter_count_is_noted(traces: Traces, tmp_path: Path) -> None:
    traces()
    tensors = {"model.embed_tokens.weight": ("BF16", (300, 64))}
    lacking = folder_of(tmp_path / "lacking", XGLM, tensors)
    whole = folder_of(tmp_path / "whole", XGLM, {**tensors, "rest": ("BF16", (WEIGHT // 2 - 300 * 64,))})
    packed = folder_of(tmp_path / "packed", XGLM, {"w": ("U8", (300,))})
    said = {
        folder.name: [note for note in answer.notes if "checkpoint" in note]
        for folder in (lacking, whole, packed)
        for answer in [memplan.estimate(RunSpec(model=str(folder), batch={"sequence": 24}), via="trace")]
    }
    assert said["lacking"] == [
        f"the checkpoint has {300 * 64:,} numbers, and the model is built with {WEIGHT // 2:,} parameters"
    ]
    assert said["whole"] == said["packed"] == []
