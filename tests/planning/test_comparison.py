"""Runs side by side: every difference subtracts two answers, every run is distinguishable, every line fits."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.main import get_command

import memplan
from memplan import Comparison, Estimate, RunSpec, compare, estimate
from memplan.cli.app import app
from memplan.core.errors import FactsMissingError, SpecError
from memplan.core.units import GIB, gib
from memplan.estimate import calibration
from memplan.estimate.calibration import calibrate_card
from memplan.planning.comparison import changed_tensors, compare_answers
from memplan.report import comparison as report
from memplan.report import differences
from memplan.report.assumptions import assumptions
from memplan.report.schema import comparison_model, comparison_schema
from memplan.report.text import Screen
from memplan.report.wording import times
from memplan.resolve.request import override
from tests.estimate.test_calibration import ORIGIN, measurements
from tests.report.test_reports import conforms
from tests.sampling import examples

COMMAND, SCHEMA = get_command(app), cache(comparison_schema)


def run(**fields: Any) -> RunSpec:
    return RunSpec.model_validate({"model": "qwen2-0.5b", **fields})


METHODS = compare([run(method="lora", gpu="3090"), run(method="qlora", gpu="3090"), run(gpu="3090")])
CARDS = compare([run(model="qwen2-7b", method="lora", gpu=gpu) for gpu in ("3090", "t4", "h100")])
MODELS = compare([run(model=name, method="lora") for name in ("qwen2-0.5b", "llama-3.2-1b")])
ALIKE = compare([run(), run()])
MANY = compare(
    [run(method=method, batch={"micro": n}, gpu="3090") for method in ("lora", "qlora", "full") for n in (1, 2, 4, 8)]
)
CASES = {"methods": METHODS, "cards": CARDS, "models": MODELS, "alike": ALIKE, "many": MANY}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def words_of(text: str) -> str:
    return " ".join(text.split())


# --- the library ---


@every_case
def test_a_difference_is_one_answer_less_the_first(case: Comparison) -> None:
    first, *others = case.answers
    assert [(d.run, d.against) for d in case.differences] == [(n, 0) for n in range(1, len(case.answers))]
    for d, answer in zip(case.differences, others, strict=True):
        assert d.bytes == {
            "allocated": answer.bytes.allocated - first.bytes.allocated,
            "reserved": answer.bytes.reserved - first.bytes.reserved,
            "used": answer.bytes.used - first.bytes.used,
            "host": answer.host_bytes - first.host_bytes,
        }
        assert d.categories == {kind: n - first.categories[kind] for kind, n in answer.categories.items()}


RUNS = st.builds(
    lambda model, method, micro, optimizer, checkpointing: run(
        model=model,
        method=method,
        batch={"micro": micro, "sequence": 512},
        optimizer=optimizer,
        kernels={"checkpointing": checkpointing},
    ),
    st.sampled_from(["qwen2-0.5b", "llama-3.2-1b", "gpt2"]),
    st.sampled_from(["full", "lora", "qlora", "freeze"]),
    st.integers(1, 8),
    st.sampled_from(["adamw_torch", "sgd", "paged_adamw_8bit"]),
    st.sampled_from(["none", "full"]),
)


@settings(max_examples=examples(6), deadline=None)
@given(RUNS, RUNS)
def test_differences_of_categories_and_tensors_sum_to_the_difference_of_peaks(one: RunSpec, other: RunSpec) -> None:
    case = compare([one, other])
    [d] = case.differences
    assert sum(d.categories.values()) == d.bytes["allocated"]
    assert sum(c.after - c.before for c in changed_tensors(*case.answers)) == d.bytes["allocated"]
    back = compare([other, one]).differences[0]
    assert back.bytes == {name: -n for name, n in d.bytes.items()}
    assert back.fields == {path: (b, a) for path, (a, b) in d.fields.items()}


def test_fields_are_those_of_the_runs_that_differ_as_decided() -> None:
    lora, full = (run(method=method) for method in ("lora", "full"))
    assert compare([lora, full]).differences[0].fields == {
        "method.kind": ("lora", "full"),
        "method.alpha": (8.0, None),  # peft's default for any rank
        "method.adapter_dtype": ("fp32", None),
    }
    batches = compare([run(), run(batch={"micro": 4}, gpu="3090")]).differences[0].fields
    assert batches == {"batch.micro": (1, 4), "gpu": (None, "rtx-3090")}
    named = compare([run(gpu="rtx 3090"), run(gpu="3090", kernels={"checkpointing": "full"})])
    assert named.differences[0].fields == {}


def test_a_model_by_its_config_differs_key_by_key() -> None:
    tiny = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 99,
    }
    case = compare([run(model={"config": tiny}), run(model={"config": {**tiny, "num_hidden_layers": 3}})])
    assert case.differences[0].fields == {"model.config.num_hidden_layers": (2, 3)}


def test_tensors_only_one_of_the_answers_has() -> None:
    lora, qlora, _ = METHODS.answers
    changes = {(c.line.what, c.line.where): c for c in changed_tensors(lora, qlora)}
    [whole] = [line for line in lora.ledger if line.what == "mlp.down_proj.weight"]
    [packed] = [line for line in qlora.ledger if line.what == "mlp.down_proj.weight (packed)"]
    assert changes[whole.what, whole.where] == (whole, whole.bytes, 0)
    assert changes[packed.what, packed.where] == (packed, 0, packed.bytes)
    sizes = [abs(c.after - c.before) for c in changed_tensors(lora, qlora)]
    assert sizes == sorted(sizes, reverse=True)
    assert changed_tensors(lora, lora) == []


@pytest.mark.parametrize("runs", [[], [run()]])
def test_a_comparison_needs_two_runs(runs: list[RunSpec]) -> None:
    with pytest.raises(SpecError, match=rf"^runs: a comparison takes two or more, not {len(runs)}$"):
        compare(runs)


def test_a_comparison_is_of_the_answers_as_they_are() -> None:
    answers = [estimate(run(method=method, gpu="3090")) for method in ("lora", "qlora", "full")]
    assert compare_answers(answers) == METHODS
    assert compare_answers(answers).answers[0] is answers[0]
    assert hash(compare_answers(answers)) == hash(METHODS)


# --- JSON and its schema ---


@every_case
def test_json_matches_the_schema_without_extra_fields(case: Comparison) -> None:
    text = report.render("json", case, Screen())
    dumped = json.loads(text)
    assert dumped == json.loads(case.model_dump_json())
    assert dumped["answers"] == [json.loads(answer.model_dump_json()) for answer in case.answers]
    conforms(dumped, SCHEMA(), SCHEMA())
    read = comparison_model().model_validate_json(text)
    assert read.model_dump(mode="json", exclude_unset=True) == dumped  # `origins` is left out without a run's file


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("run", "1"), ("fields", {"method.kind": ["lora"]}), ("bytes", {"allocated": 1}), ("categories", {})],
)
def test_documents_that_are_not_comparisons_are_invalid(name: str, wrong: object) -> None:
    dumped = json.loads(METHODS.model_dump_json())
    dumped["differences"][0][name] = wrong
    with pytest.raises(AssertionError):
        conforms(dumped, SCHEMA(), SCHEMA())


# --- wording ---


def test_a_run_is_named_by_what_distinguishes_it() -> None:
    assert differences.names(METHODS.answers) == ["lora", "qlora", "full"]
    assert differences.names(CARDS.answers) == ["rtx-3090", "t4", "h100-sxm"]
    assert differences.names(MODELS.answers) == ["qwen2-0.5b", "llama-3.2-1b"]
    assert differences.names(ALIKE.answers) == ["run 1", "run 2"]
    assert differences.names(MANY.answers) == [f"run {n}" for n in range(1, 13)]
    batches = [estimate(run(batch={"micro": n})) for n in (1, 4)]
    assert differences.names(batches) == ["batch 1", "batch 4"]
    lengths = [estimate(run(batch={"sequence": n})) for n in (512, 1024)]
    assert differences.names(lengths) == ["512 tokens", "1,024 tokens"]
    assert differences.names([estimate(run()), estimate(run(gpu="t4"))]) == ["no GPU", "t4"]


HEADED: dict[str, tuple[list[dict[str, Any]], dict[str, tuple[str, ...]]]] = {
    "of a method what it has a use for": (
        [{"method": "full"}, {"method": {"kind": "lora", "rank": 8}}, {"method": {"kind": "qlora", "rank": 32}}],
        {"method": ("full", "lora", "qlora"), "rank": ("", "8", "32")},
    ),
    "not what follows from it": (
        [{"method": "lora"}, {"method": {"kind": "qlora", "rank": 16}}],
        {"method": ("lora", "qlora")},
    ),
    "not what is the same when decided": (
        [{"kernels": {"checkpointing": "full"}}, {}, {"loop": {"padded": True}}],
        {"padded": ("no", "no", "yes")},
    ),
    "what was left open by what it became": (
        [{}, {"kernels": {"checkpointing": "none"}}],
        {"checkpointing": ("full", "none")},
    ),
    "what is usual first, then in the order of a run": (
        [{}, {"loop": {"padded": True}, "kernels": {"attention": "eager", "loss": "fused"}, "batch": {"micro": 2}}],
        {"batch": ("1", "2"), "attention": ("sdpa", "eager"), "loss": ("hf", "fused"), "padded": ("no", "yes")},
    ),
    "lists": (
        [{"method": {"kind": "lora", "targets": ["q_proj", "v_proj"]}}, {"method": "lora"}],
        {"targets": ("q_proj, v_proj", "all-linear")},
    ),
    "layers of freezing": (
        [{"method": {"kind": "freeze", "trainable_layers": n}} for n in (1, 4)],
        {"layers trained": ("1", "4")},
    ),
    "storage": (
        [{"method": {"kind": "qlora", "quantization": {"format": f}}} for f in ("nf4", "int8")],
        {"storage": ("nf4", "int8")},
    ),
}


@pytest.mark.parametrize(("runs", "expected"), HEADED.values(), ids=HEADED.keys())
def test_columns_are_headed_by_the_differences(
    runs: list[dict[str, Any]], expected: dict[str, tuple[str, ...]]
) -> None:
    heads = dict(differences.headings([estimate(run(**fields)) for fields in runs]))
    assert [head for head in heads.items() if head[0] != "run"] == list(expected.items())


@every_case
def test_common_facts_are_shown_once_and_differences_per_run(case: Comparison) -> None:
    alike, apart = dict(differences.same(case.answers)), dict(differences.differ(case.answers))
    heads = dict(differences.headings(case.answers))
    for n, answer in enumerate(case.answers):
        for label, text in assumptions(answer):
            for part in text.split("; "):
                of_it = [told.text for told in apart.get(label, []) if n in told.runs]
                said = [
                    *alike.get(label, "").split("; "),
                    *heads.get(label, [""] * 12)[n : n + 1],
                    *"; ".join(of_it).split("; "),
                ]
                assert part in said, (label, part)
    assert [label for label, of in apart.items() if len(of) == 1 and len(of[0].runs) == len(case.answers)] == []


def test_a_sentence_says_which_categories_make_the_difference() -> None:
    lora, qlora, full = METHODS.answers
    parameters = qlora.categories["parameter"] - lora.categories["parameter"]
    [first, second] = differences.reasons(METHODS, ["lora", "qlora", "full"])
    used = METHODS.differences[0].bytes["used"]
    assert first.startswith(f"qlora uses {abs(used) / 2**20:.1f} MiB {'more' if used > 0 else 'less'} than lora: ")
    assert f"parameters {differences.signed(parameters)}" in first
    for name, changes in (
        ("Only lora", [c for c in changed_tensors(lora, qlora) if not c.after]),
        ("only qlora", [c for c in changed_tensors(lora, qlora) if not c.before]),
    ):
        shown = [f"{times(c.line)}{c.line.what} ({gib(c.before or c.after)})" for c in changes[:3]]
        assert f"{name} has {', '.join(shown)} and " in first
    states = full.categories["optstate"] - lora.categories["optstate"]
    assert f"optimizer states {differences.signed(states)}" in second
    assert differences.reasons(ALIKE, ["run 1", "run 2"]) == ["Run 2 uses as much as run 1, category by category."]


def test_the_categories_named_make_up_most_of_the_difference_or_are_three() -> None:
    rows = [row for row in differences.categories(MANY.answers) if row.kind]
    for n, text in enumerate(differences.reasons(MANY, differences.names(MANY.answers)), 1):
        named = re.findall(r"([a-zA-Z' ]+?) [+-]<?[\d.]+", text.partition(": ")[2].partition(" GiB.")[0])
        changes = {row.label: abs(row.changes[n] or 0) for row in rows}
        taken = [changes[name.strip(", ")] for name in named]
        assert taken == sorted(changes.values(), reverse=True)[: len(taken)]
        assert len(taken) == 3 or sum(taken) >= 0.9 * sum(changes.values())


def test_a_note_is_shown_once_with_its_runs() -> None:
    text = report.render("table", CARDS, Screen(100))
    for note in dict.fromkeys(note for answer in CARDS.answers for note in answer.notes):
        of = [n for n, answer in enumerate(CARDS.answers) if note in answer.notes]
        assert words_of(text).count(note) == 1
        suffix = (
            "" if len(of) == len(CARDS.answers) else f" ({', '.join(differences.names(CARDS.answers)[n] for n in of)})"
        )
        assert f"- {note}{suffix}" in words_of(text)


# --- the terminal, markdown, CSV ---


@every_case
@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_line_is_wider_than_the_screen(case: Comparison, width: int) -> None:
    lines = report.render("table", case, Screen(width)).splitlines()
    assert [line for line in lines if len(line) > width] == []


def row_of(text: str, label: str) -> list[str]:
    """Return the words after a label at the start of a line."""
    found = re.search(rf"^ *{re.escape(label)}  +(.*)$", text, re.M)
    assert found is not None, (label, text)
    return found[1].split()


def test_three_runs_have_columns_followed_by_their_differences() -> None:
    text = report.render("table", METHODS, Screen(80))
    lora, _, full = METHODS.answers
    assert text.splitlines()[0].split() == ["method", "lora", "qlora", "full"]
    assert row_of(text, "answer") == ["fits"] * 3
    for label, n in (
        ("GiB used", [answer.bytes.used for answer in METHODS.answers]),
        ("allocated", [answer.bytes.allocated for answer in METHODS.answers]),
        ("parameters", [answer.categories["parameter"] for answer in METHODS.answers]),
        ("load", [answer.phases[0].peak for answer in METHODS.answers]),
    ):
        figures = [f"{n[0] / GIB:.2f}"]
        for more in n[1:]:
            figures += [f"{more / GIB:.2f}", *([f"{(more - n[0]) / GIB:+.2f}"] if more != n[0] else [])]
        assert row_of(text, label) == figures
    trained = {"lora, qlora": lora, "full": full}
    for names, answer in trained.items():
        assert row_of(text.replace("trains", "      "), names)[:2] == [
            f"{answer.parameters.trainable / 10**6:.2f}",
            "million",
        ]
    assert "GeForce RTX 3090" in text.split("Same for all")[1]


def test_too_many_columns_become_one_row_per_run_with_numbered_columns() -> None:
    text = report.render("table", MANY, Screen(80))
    lines = text.splitlines()
    assert lines[0].split()[:4] == ["run", "method", "batch", "answer"]
    for n, (line, answer) in enumerate(zip(lines[1:13], MANY.answers, strict=True), 1):
        assert line.split()[:3] == [str(n), answer.run.method.kind, str(answer.run.batch.micro)]
        assert f"{answer.bytes.used / GIB:.2f}" in line.split()
        assert f"  {answer.verdict.answer}  " in line
    heads = [re.findall(r"run (\d+)", line) for line in lines if re.fullmatch(r"( +run \d+)+", line)]
    assert [int(n) for head in heads for n in head] == list(range(1, 13))
    figures = re.findall(r"^allocated +(.*)\n +(.*)$", text, re.M)
    allocated = [answer.bytes.allocated for answer in MANY.answers]
    assert [n for values, _ in figures for n in values.split()] == [f"{n / GIB:.2f}" for n in allocated]
    changes = [n for _, values in figures for n in values.split()]
    assert changes == [f"{(n - allocated[0]) / GIB:+.2f}" for n in allocated if n != allocated[0]]


@every_case
def test_a_terminal_shows_the_same_text(case: Comparison) -> None:
    for width in (80, 120):
        piped, coloured = (report.render("table", case, Screen(width, colour, colour)) for colour in (False, True))
        assert "\x1b" not in piped
        bare = re.sub(r"\x1b\[[\d;]*m", "", coloured)
        assert bare != coloured
        assert [line for line in bare.splitlines() if len(line) > width] == []
        assert sorted(re.sub("─+", "", bare).split()) == sorted(piped.split())


def test_the_largest_difference_is_highlighted() -> None:
    rows = differences.categories(METHODS.answers)
    text = report.render("table", METHODS, Screen(80, True, True))
    markdown = report.render("markdown", METHODS, Screen())
    for n in (1, 2):
        row = max((row for row in rows if row.kind), key=lambda row: abs(row.changes[n] or 0))
        change = differences.signed(row.changes[n])
        assert f"\x1b[1;{31 if change[0] == '+' else 32}m{change}\x1b[0m" in text.replace(" ", "")
        assert re.search(rf"\*\*[^*|]+ \({re.escape(change)}\)\*\*", markdown)
    assert len(re.findall(r"\)\*\*", markdown)) == 2


@every_case
def test_markdown_tables_are_whole(case: Comparison) -> None:
    text = report.render("markdown", case, Screen())
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.M)
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in block.splitlines()}) == 1, block
    rows = [line for line in blocks[0].splitlines() if line.startswith(("| run ", "| 1 "))]
    assert len(rows) == (12 if case is MANY else 0)


@every_case
def test_csv_is_a_row_for_each_run_with_its_differences(case: Comparison) -> None:
    rows = list(csv.DictReader(io.StringIO(report.render("csv", case, Screen()))))
    assert [int(row["run"]) for row in rows] == list(range(1, len(case.answers) + 1))
    for row in rows:
        assert int(row["used_difference"]) == int(row["used"]) - int(rows[0]["used"])
        assert int(row["temp_difference"]) == int(row["temp"]) - int(rows[0]["temp"])


# --- the command ---


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Compare = Callable[..., Ran]


@pytest.fixture(name="compare_")
def _compare(capsys: pytest.CaptureFixture[str]) -> Compare:
    def ran(*args: str) -> Ran:
        with pytest.raises(SystemExit) as left:
            COMMAND.main(["compare", *args])
        code = left.value.code
        assert isinstance(code, int)
        return Ran(code, *capsys.readouterr())

    return ran


def asked(ran: Ran) -> list[RunSpec]:
    """Return the runs of a comparison in JSON."""
    return [RunSpec.model_validate(answer["run"]) for answer in json.loads(ran.out)["answers"]]


def test_the_command_compares_as_the_library_does(compare_: Compare) -> None:
    words = [f"qwen2-0.5b --method {method}" for method in ("lora", "qlora", "full")]
    assert compare_(*words, "--gpu", "3090", "--json") == Ran(0, METHODS.model_dump_json(indent=2) + "\n", "")
    text = report.render("table", METHODS, Screen(80))
    assert "\x1b" not in text
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        assert compare_(*words, "--gpu", "3090").out == text


def test_a_runs_own_options_override_the_shared_ones(compare_: Compare) -> None:
    shared = ("--method", "lora", "--batch-size", "4", "--no-gradient-checkpointing", "--json")
    first, second = asked(compare_("qwen2-0.5b", "gpt2 --batch-size 2 --seq-len 512 --gradient-checkpointing", *shared))
    assert (first.model, first.method.kind, first.batch.micro, first.kernels.checkpointing) == (
        *("qwen2-0.5b", "lora", 4),
        "none",
    )
    assert (second.model, second.method.kind, second.batch.micro, second.kernels.checkpointing) == (
        *("gpt2", "lora", 2),
        "full",
    )


OVER: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({"method": "qlora", "rank": 8, "quant_format": "fp4"}, {"method": "lora"}, {"method": "lora", "rank": 8}),
    ({"method": "lora", "rank": 8, "batch_size": 2}, {"method": "full"}, {"method": "full", "batch_size": 2}),
    ({"method": "lora", "rank": 8}, {"method": "lora"}, {"method": "lora", "rank": 8}),
    ({"rank": 8}, {"method": "full"}, {"rank": 8, "method": "full"}),
    ({"dtype": "fp16"}, {"precision": "bf16"}, {"precision": "bf16"}),
    ({"precision": "bf16"}, {"dtype": "fp16"}, {"dtype": "fp16"}),
    ({"precision": "amp"}, {"dtype": "fp16"}, {"precision": "amp", "dtype": "fp16"}),
    ({"zero": 3}, {"fsdp": "fsdp2"}, {"fsdp": "fsdp2"}),
    ({"gpu": ["3090", "t4"]}, {"gpu": ["h100"]}, {"gpu": ["h100"]}),
]


@pytest.mark.parametrize(("shared", "own", "expected"), OVER)
def test_another_method_drops_the_shared_methods_settings(
    shared: dict[str, Any], own: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert override(shared, own) == expected


def test_every_run_is_answered_for_every_card(compare_: Compare) -> None:
    ran = compare_("qwen2-0.5b", "gpt2 --seq-len 512 --gpu h100", "--gpu", "3090", "--gpu", "t4", "--json")
    assert [(r.model, r.gpu) for r in asked(ran)] == [
        ("qwen2-0.5b", "rtx-3090"),
        ("qwen2-0.5b", "t4"),
        ("gpt2", "h100-sxm"),
    ]
    assert len(asked(compare_("qwen2-0.5b", "--gpu", "3090", "--gpu", "t4", "--json"))) == 2


def test_an_option_with_several_choices_is_a_run_with_each(compare_: Compare) -> None:
    typed = ("qwen2-0.5b", "gpt2 --method full", "--method", "lora,qlora", "--loss", "fused,hf", "--json")
    runs = asked(compare_(*typed))
    wanted = [
        (model, method, loss)
        for model in ("qwen2-0.5b", "gpt2")
        for method in ("lora", "qlora")
        for loss in ("fused", "hf")
    ]
    assert [(run.model, run.method.kind, run.kernels.loss) for run in runs] == [
        (model, "full" if model == "gpt2" else method, loss) for model, method, loss in wanted
    ]


def test_a_run_may_be_a_file(compare_: Compare, tmp_path: Path) -> None:
    spec, other = tmp_path / "a run.yaml", tmp_path / "run.JSON"
    spec.write_text("model: qwen2-0.5b\nmethod: qlora\nbatch: {micro: 3}\n", "utf-8")
    other.write_text('{"model": "gpt2", "batch": {"micro": 3, "sequence": 256}}', "utf-8")
    config = tmp_path / "config.json"
    config.write_text(
        '{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, '
        '"vocab_size": 99}',
        "utf-8",
    )
    ran = compare_(
        str(spec), f"'{spec}' --batch-size 5", str(other), f"{config} --seq-len 128", "--rank", "8", "--json"
    )
    assert (
        ran.err
        == "memplan: run 3: method.rank (--rank): method.kind full has no adapters; lora, qlora, dora, qdora have\n"
    )
    first, second, third, fourth = asked(
        compare_(
            str(spec), f"'{spec}' --batch-size 5", str(other), f"{config} --seq-len 128", "--grad-accum", "2", "--json"
        )
    )
    assert (first.model, first.method.kind, first.batch.micro, first.batch.accumulation) == (
        "qwen2-0.5b",
        "qlora",
        3,
        2,
    )
    assert (second.method.kind, second.batch.micro) == ("qlora", 5)
    assert (third.model, third.batch.micro, third.batch.sequence) == ("gpt2", 3, 256)
    assert (fourth.model, fourth.batch.sequence) == (str(config), 128)


MISTAKES: dict[tuple[str, ...], str] = {
    (): "Missing argument 'RUN",
    ("qwen2-7b",): "runs: only one is given; add another, or several choices, as in --method lora,qlora",
    ("qwen2-7b", "--gpu", "3090"): "runs: only one is given",
    ("qwen2-7b", ""): "run 2: is empty; write a model",
    (" ", "qwen2-7b"): "run 1: is empty",
    ("qwen2-7b", "qwen2-7b --gup 3090"): "run 2: No such option: --gup",
    ("qwen2-7b", "qwen2-7b --help"): "run 2: No such option: --help",
    ("qwen2-7b", "qwen2-7b --method 'lora"): "run 2: a quote inside it is not closed",
    ("qwen2-7b", "qwen2-7b --format csv"): "run 2: --format applies to the whole comparison; put it outside the quotes",
    ("qwen2-7b", "qwen2-7b --json"): "run 2: --json applies to the whole comparison",
    ("qwen2-7b", "qwen2-7b --output a.md"): "run 2: --output applies to the whole comparison",
    ("qwen2-7b", "qwen2-7b --strict"): "run 2: --strict applies to the whole comparison",
    ("qwen2-7b", "qwen2-7b --explain"): "run 2: --explain only applies to memplan estimate",
    ("qwen2-7b", "qwen2-7b --spec r.yaml"): "run 2: --spec: name the file in place of the model, as in 'r.yaml'",
    ("compare qwen2-7b", "qwen2-7b"): "run 1: compare is not a model; a run is a model and its options",
    ("qwen2-7b", "memplan qwen2-7b"): "run 2: memplan is not a model",
    ("qwen2-7b", "nowhere.yaml"): "run 2: spec: 'nowhere.yaml' cannot be read (No such file or directory)",
    ("qwen2-7b", "nowhere.json --gpu t4"): "run 2: spec: 'nowhere.json' cannot be read",
    ("qwen2-7b", "qwen2-7c"): "run 2: model: unknown name 'qwen2-7c'; did you mean qwen2-7b",
    ("qwen2-7b", "qwen2-7b llama-3.1-8b"): "run 2: Got unexpected extra argument",
    ("qwen2-7b", "qwen2-7b --batch-size 0"): "run 2: batch.micro (--batch-size): must be at least 1, not 0",
    ("qwen2-7b", "qwen2-7b --batch-size two"): "run 2: --batch-size: must be a whole number, not 'two'",
    ("qwen2-7b", "qwen2-7b --gpu 3091"): "run 2: gpu (--gpu): unknown name '3091'",
    ("qwen2-7b", "qwen2-7b --method lora", "--rank", "8"): "run 1: method.rank (--rank): method.kind full has no",
    ("qwen2-7b", "--", "--gpu 3090"): "run 2: model: name one",
    ("qwen2-7b", "--method lora"): "No such option: --method lora",
    ("qwen2-7b", "gpt2", "--explain"): "No such option: --explain",
    ("qwen2-7b", "qwen2-7b --batch-size 2", "--output", "/nowhere/a.md"): "output (--output): '/nowhere/a.md' cannot",
}


@pytest.mark.parametrize(("typed", "expected"), MISTAKES.items(), ids=[" ".join(typed)[:60] for typed in MISTAKES])
def test_a_mistake_is_one_line_that_names_the_run(compare_: Compare, typed: tuple[str, ...], expected: str) -> None:
    ran = compare_(*typed)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran
    assert ran.err.startswith(f"memplan: {expected}"), ran.err


def test_the_exit_code_is_of_all_runs_together(compare_: Compare) -> None:
    assert compare_("qwen2-0.5b", "gpt2 --seq-len 512").code == 0
    assert compare_("qwen2-0.5b", "qwen2-72b", "--method", "lora", "--gpu", "3090").code == 1
    tight = ("qwen2-7b --gpu rtx-4000-ada", "qwen2-7b --gpu h100", "--method", "lora")
    assert compare_(*tight).code == 0
    assert compare_(*tight, "--strict").code == 1
    assert [
        a.verdict.answer for a in compare([run(model="qwen2-7b", method="lora", gpu="rtx-4000-ada")] * 2).answers
    ] == [
        "tight",
        "tight",
    ]


def test_missing_facts_exit_with_3(compare_: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(run: RunSpec, calibration: object = None) -> Estimate:
        if run.model == "gpt2":
            raise FactsMissingError("model: not here", "model")
        return estimate(run)

    monkeypatch.setattr(sys.modules["memplan.estimate.estimate"], "estimate", missing)
    assert compare_("qwen2-0.5b", "gpt2") == Ran(3, "", "memplan: run 2: model: not here\n")


@pytest.mark.parametrize(
    ("name", "start"), [("a.md", "|  | lora |"), ("a.csv", "run,model,"), ("a.json", "{"), ("a.txt", "method ")]
)
def test_a_file_is_written_in_the_format_its_name_says(
    compare_: Compare, tmp_path: Path, name: str, start: str
) -> None:
    words = ("qwen2-0.5b --method lora", "qwen2-0.5b --method qlora", "--output", str(tmp_path / name))
    assert compare_(*words) == Ran(0, "", "")
    assert (tmp_path / name).read_text("utf-8").startswith(start)


def test_the_manual_quotes_help(compare_: Compare) -> None:
    manual = " ".join((Path(memplan.__file__).parents[1] / "docs" / "reference" / "cli.md").read_text("utf-8").split())
    text = compare_("--help").out
    says = [" ".join(part.split()) for part in text.partition("Training:")[0].split("\n\n")[1:3]]
    assert [part for part in says if part not in manual] == []
    assert "--gpu" in text
    assert [option for option in ("--spec", "--explain", "--online") if option in text.split()] == []


def test_an_unused_machine_profile_is_explained_once(
    compare_: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    old = calibrate_card(measurements(30), ORIGIN._replace(memplan="0.0.1"))
    calibration.write(old, calibration.file_of("rtx-3090"))
    ran = compare_("qwen2-0.5b --method lora", "qwen2-0.5b --method qlora", "--gpu", "3090", "--json")
    assert ran.err.count("this machine's profile of rtx-3090 is ignored") == 1
    own = old.model_copy(update={"memplan": memplan.__version__})
    calibration.write(own, calibration.file_of("rtx-3090"))
    ran = compare_("qwen2-0.5b --method lora", "qwen2-0.5b --method lora --no-calibration", "--gpu", "3090", "--json")
    first, second = json.loads(ran.out)["answers"]
    run_ = run(method="lora", gpu="3090")
    assert (first["bytes"], second["bytes"]) == (
        estimate(run_, own).bytes.as_dict(),
        estimate(run_).bytes.as_dict(),
    )


def test_4_something_was_left_out_and_strict(compare_: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(run: RunSpec, calibration: object = None) -> Estimate:
        answer = copy.copy(estimate(run))
        vars(answer).update(unsupported=("a kernel",) if run.model == "gpt2" else (), host_bytes=3 * GIB)
        return answer

    monkeypatch.setattr(sys.modules["memplan.estimate.estimate"], "estimate", without)
    ran = compare_("qwen2-0.5b", "gpt2 --seq-len 512", "--strict")
    assert ran.code == 4
    assert "- not supported, and left out: a kernel (run 2)" in ran.out
    assert row_of(ran.out, "GiB on the host") == ["3.00", "3.00"]
    assert compare_("qwen2-0.5b", "gpt2 --seq-len 512").code == 0


@pytest.mark.parametrize(("typed", "expected"), [("compare qwen2-7", "qwen2-7b"), ("schema c", "comparison")])
def test_the_shell_completes_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, typed: str, expected: str
) -> None:
    monkeypatch.setenv("_MEMPLAN_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"memplan {typed}")
    monkeypatch.setenv("COMP_CWORD", "2")
    with pytest.raises(SystemExit):
        COMMAND.main([])
    assert expected in capsys.readouterr().out.split()
