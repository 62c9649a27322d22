"""Reports: every format has the same facts and fits where it is shown; the largest fitting sizes are exact."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
import subprocess
import sys
from functools import cache
from operator import itemgetter
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memplan import Estimate, RunSpec, estimate
from memplan.catalogue.hardware.gpus import all_gpus, find_gpu
from memplan.core.errors import MemplanError, SpecError
from memplan.core.units import GIB
from memplan.estimate.answer import KINDS
from memplan.planning.reach import cards_that_hold, largest_batch, largest_sequence
from memplan.report import FORMATS, render, table
from memplan.report.assumptions import assumptions, question
from memplan.report.bar import MARKS, bar
from memplan.report.blocks import Block, Column, Facts, Notes, Table, Text
from memplan.report.display import display, paragraph, plain
from memplan.report.next_steps import cards, help_line
from memplan.report.overview import rows
from memplan.report.overview import verdict as headline
from memplan.report.schema import answer_model, answer_schema, run_schema
from memplan.report.text import ASCII, Screen, screen
from memplan.report.wording import asked, dtype, hundredths, moment, parts, shape, share, verdict
from memplan.spec.run import changed
from tests.sampling import ALL, examples


def ask(**fields: Any) -> Estimate:
    return estimate(RunSpec.model_validate({"model": "qwen2-7b", **fields}))


FITS = ask(method="qlora", gpu="3090")
TIGHT = ask(method="lora", gpu="rtx-4000-ada")
REFUSED = ask(gpu="3090")
BARE = ask(method="lora")
NOTED = ask(method="qlora", gpu="t4")
STATELESS = ask(method="lora", optimizer="sgd", gpu="h100")
CASES = {"fits": FITS, "tight": TIGHT, "refused": REFUSED, "no GPU": BARE, "noted": NOTED, "stateless": STATELESS}
every_case = pytest.mark.parametrize("answer", CASES.values(), ids=CASES.keys())
SCHEMA = cache(answer_schema)


def test_the_cases_match_their_names() -> None:
    answers = {name: answer.verdict.answer for name, answer in CASES.items()}
    assert answers == {
        "fits": "fits",
        "tight": "tight",
        "refused": "does not fit",
        "no GPU": None,
        "noted": "fits",
        "stateless": "fits",
    }


# --- wording ---


def test_the_verdict_states_used_and_usable_memory() -> None:
    used, usable = FITS.bytes.used / GIB, find_gpu("3090").usable / GIB
    assert verdict(FITS) == (
        f"fits: {used:.1f} of {usable:.1f} GiB used on GeForce RTX 3090, {usable - used:.1f} GiB free"
    )
    assert verdict(TIGHT).startswith("tight: ")
    assert verdict(REFUSED).startswith("does not fit: ")
    assert f"{REFUSED.bytes.used / GIB - usable:.1f} GiB too much" in verdict(REFUSED)
    assert verdict(BARE).startswith(f"uses {BARE.bytes.used / GIB:.1f} GiB")


def test_the_peaks_moment_in_words() -> None:
    assert moment(FITS) == "at the loss's backward in step 2 and later, in loss.log_softmax"
    full = ask(model="qwen2-72b")
    assert (full.peak.phase, moment(full)) == ("step", "while gradients are clipped in step 2 and later")


@every_case
def test_the_parts_sum_to_used(answer: Estimate) -> None:
    assert sum(part.bytes for part in parts(answer)) == answer.bytes.used
    assert all(part.bytes > 0 for part in parts(answer))


def test_tiny_amounts_are_not_shown_as_zero() -> None:
    tiny = next(part for part in parts(FITS) if part.key == "buffer")
    assert tiny.bytes == 2 * 512 + 256 * 4  # frequencies of positions, codes of scales
    assert (hundredths(tiny.bytes), share(tiny.bytes, FITS.bytes.used)) == ("<0.01", "<0.1%")
    assert (hundredths(0), share(0, 1)) == ("0.00", "0.0%")
    for text in (render(format, [FITS]) for format in ("table", "markdown", "html")):
        assert "0.0 MiB" not in text
        assert "1.0 KiB" in text


def test_a_shape_is_shown_once_and_only_if_there_is_one() -> None:
    by_name = {line.what: line for line in FITS.ledger}
    assert shape(by_name["log_probs"]) == "b·s·v = 1·2048·152064"
    assert shape(by_name["mlp.down_proj.weight (code)"]) == "16"
    assert shape(by_name["loss"]) == "scalar"
    assert shape(by_name["cuBLAS workspace"]) == ""
    assert dtype(by_name["mlp.down_proj.weight (packed)"]) == "uint8 for every 2"
    assert dtype(by_name["mlp.down_proj.weight (nested absmax)"]) == "fp32 for every 16,384"
    assert dtype(by_name["log_probs"]) == "fp32"


def test_the_largest_of_a_kind_says_how_many_there_are() -> None:
    largest = {part.key: part.largest for part in parts(REFUSED)}
    assert largest["parameter"] == "28 × mlp.down_proj.weight, 3.54 GiB"
    assert {part.key: part.largest for part in parts(FITS)}["parameter"] == "lm_head.weight, 2.03 GiB"


def test_the_assumptions_list_given_and_decided_fields() -> None:
    answer = ask(
        method={"kind": "qlora", "rank": 8, "targets": ["q_proj", "v_proj"]},
        batch={"micro": 3, "sequence": 1111, "accumulation": 4},
        kernels={"checkpointing": "none", "loss": "fused", "attention": "eager"},
        optimizer="paged_adamw_8bit",
        loop={"padded": True},
    )
    said = dict(assumptions(answer))
    expected = {
        "model": ("qwen2-7b", "7.62 billion"),
        "method": ("qlora", "rank 8", "q_proj, v_proj", "nf4"),
        "precision": ("bf16",),
        "optimizer": ("paged_adamw_8bit",),
        "batch": ("3 sequences", "1,111 tokens", "4 passes"),
        "checkpointing": ("none",),
        "attention": ("eager", "padded"),
        "loss": ("fused",),
        "profile": ("transformers-5",),
    }
    assert [(name, w) for name, words in expected.items() for w in words if w not in said[name]] == []
    assert f"{answer.parameters.trainable / answer.parameters.total:.2%}" in said["trains"]


UNUSUAL: dict[str, tuple[dict[str, Any], str]] = {
    "momentum": ({"optimizer": {"name": "sgd", "momentum": 0.9}}, "momentum 0.9"),
    "in backward": ({"optimizer": {"in_backward": True}}, "no clipping"),
    "Trainer": ({"loop": {"trainer": True}}, "Trainer"),
    "scaler": ({"precision": "fp16", "loop": {"grad_scaler": True}}, "the loss is scaled"),
    "held": ({"loop": {"hold_outputs": True}}, "held through backward"),
    "held to the end": ({"loop": {"hold_outputs": "step"}}, "held to the step's end"),
    "skipped": ({"method": {"kind": "qlora", "quantization": {"skip": ["lm_head", "o_proj"]}}}, "o_proj not quantised"),
    "clipped": ({"loop": {"clip_grad_norm": 0.5}}, "clipped at 0.5"),
}


@pytest.mark.parametrize(("fields", "said"), UNUSUAL.values(), ids=UNUSUAL.keys())
def test_everything_unusual_is_among_the_assumptions(fields: dict[str, Any], said: str) -> None:
    usual = {**fields, **{key: {} for key in fields if key in ("loop", "optimizer")}}
    assert said in str(assumptions(ask(**fields)))
    if usual != fields:
        assert said not in str(assumptions(ask(**usual)))


# --- the terminal ---


@every_case
@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("explain", [False, True])
def test_no_line_is_wider_than_the_screen(answer: Estimate, width: int, explain: bool) -> None:
    lines = table.render([answer], explain, Screen(width)).splitlines()
    assert [line for line in lines if len(line) > width] == []


@every_case
def test_the_verdict_comes_first_and_nothing_is_left_out(answer: Estimate) -> None:
    text = table.render([answer], to=Screen(120))
    assert text.startswith(headline(answer))
    for part in parts(answer):
        assert f"{part.label} " in text
        assert re.search(
            rf"{re.escape(part.label)} +{hundredths(part.bytes)} +{share(part.bytes, answer.bytes.used)}", text
        )
    for phase in answer.phases:
        assert re.search(rf"^{phase.phase} .*{phase.peak / GIB:.2f}", text, re.M)
    assert f"The peak is {moment(answer)}." in text
    assert [value for _, value in assumptions(answer) if value not in " ".join(text.split())] == []
    assert [note for note in answer.notes if note not in text.replace("\n  ", " ")] == []


COLOUR = re.compile(r"\x1b\[[\d;]*m")
BAR = re.compile(r"^[WGOLKAc█]{4,}.*$|^─+$", re.M)  # the bar, and rules


def characters(text: str) -> list[str]:
    """Return the characters of a report but spaces, and but what a terminal shows in another way."""
    return sorted(re.sub(r"\s", "", BAR.sub("", COLOUR.sub("", text))))


@every_case
@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_terminal_shows_the_same_text_as_a_pipe(answer: Estimate, width: int) -> None:
    piped, uncoloured, coloured = (
        table.render([answer], to=to) for to in (Screen(width), Screen(width, True), Screen(width, True, True))
    )
    assert "\x1b" not in piped + uncoloured
    assert "\x1b[1" in coloured
    assert characters(uncoloured) == characters(coloured) == characters(piped)
    bare = COLOUR.sub("", coloured)
    assert [line for line in (*uncoloured.splitlines(), *bare.splitlines()) if len(line) > width] == []
    assert [line for line in uncoloured.splitlines() if line != line.rstrip()] == []


def test_a_terminal_reads_no_markup_and_gets_no_control_characters() -> None:
    text = "[red]a[/red] :smile: \x1b[31mb\x07"
    blocks: list[Block] = [Text(text), Facts("", [("name", text)]), Notes([text]), Table([Column(text, str)], [text])]
    for colour in (False, True):
        shown = display(blocks, Screen(120, True, colour))
        unwrapped = COLOUR.sub("", shown).replace("\n", "").replace(" ", "")
        assert unwrapped.count("[red]a[/red]:smile:\\x1b[31mb\\x07") == 5
        assert "\x07" not in shown


def test_a_pipe_does_not_import_rich() -> None:
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        "from memplan.cli import main\nmain()"
    )
    command = [sys.executable, "-c", code, "smollm2-135m", "--gpu", "3060"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "memplan.report.table" in ran.stderr.split()
    assert "rich" not in ran.stderr.split()


@pytest.mark.parametrize(
    ("terminal", "environment", "expected"),
    [
        (True, {"TERM": "xterm"}, Screen(50, True, True)),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, Screen(50, True)),
        (True, {"TERM": "xterm", "NO_COLOR": ""}, Screen(50, True, True)),
        (True, {"TERM": "dumb"}, Screen(50)),
        (False, {"TERM": "xterm"}, Screen(50)),
        (False, {"TERM": "dumb", "FORCE_COLOR": "1"}, Screen(50, True, True)),
        (False, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, Screen(50, True)),
        (True, {"TERM": "dumb", "FORCE_COLOR": "0"}, Screen(50)),
    ],
)
def test_colour_is_for_terminals_that_want_it(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, environment: dict[str, str], expected: Screen
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("COLUMNS", "50")
    assert screen() == expected


@every_case
@pytest.mark.parametrize("width", [40, 100])
def test_the_bar_is_to_scale(answer: Estimate, width: int) -> None:
    shares = [(row.key, row.bytes) for row in rows(answer)]
    drawn, band = ("".join(text for text, _ in line) for line in bar(answer, shares, Screen(width)))
    full = max(answer.band.high, answer.bytes.used, answer.gpu.usable if answer.gpu else 0)
    for key, size in shares:
        assert abs(drawn.count(MARKS[key][0]) - size / full * (width - 1)) <= 2
    assert abs(band.index("├") - answer.band.low / full * (width - 1)) <= 1
    assert ("│" in drawn) == (answer.gpu is not None)
    if answer.gpu:
        assert abs(drawn.index("│") - answer.gpu.usable / full * (width - 1)) <= 1


@given(
    st.lists(st.tuples(*[st.text("abc d_", max_size=60)] * 3), max_size=5),
    st.integers(30, 120),
    st.tuples(*[st.booleans()] * 3),
)
def test_a_table_with_room_to_wrap_fits_any_screen(
    rows: list[tuple[str, ...]], width: int, right: tuple[bool, ...]
) -> None:
    columns = [Column[Any]("title", itemgetter(n), right=r, wraps=True) for n, r in enumerate(right)]
    lines = list(plain([Table(columns, rows)], Screen(width)))
    assert [line for line in lines if len(line) > width] == []
    # Every letter is shown, in its column's order.
    assert sorted("".join(lines[1:]).replace(" ", "")) == sorted("".join(map("".join, rows)).replace(" ", ""))


def test_optional_columns_go_before_anything_wraps() -> None:
    columns = [
        Column[Any]("one", itemgetter(0), wraps=True),
        Column[Any]("two", itemgetter(1), optional=True),
        Column[Any]("three", itemgetter(2), optional=True),
    ]
    shown = [Table(columns, [("a" * 20, "b" * 20, "c" * 20)])]
    assert list(plain(shown, Screen(50))) == ["one" + " " * 19 + "two", "a" * 20 + "  " + "b" * 20]
    assert list(plain(shown, Screen(10))) == ["one", "a" * 10, "a" * 10]
    assert display(shown, Screen(10, True)) == f"one\n{'─' * 10}\n{'a' * 10}\n{'a' * 10}\n"


def test_an_optional_column_wraps_while_it_can_be_read() -> None:
    columns = [Column[Any]("one", itemgetter(0)), Column[Any]("two", itemgetter(1), wraps=True, optional=True)]
    shown = [Table(columns, [("a" * 20, " ".join(["word"] * 10))])]
    assert list(plain(shown, Screen(54))) == [
        "one" + " " * 19 + "two",
        "a" * 20 + "  word word word word word word",
        " " * 22 + "word word word word",
    ]
    assert list(plain(shown, Screen(53))) == ["one", "a" * 20]


def test_eighty_columns_show_the_largest_tensors() -> None:
    assert "lm_head.weight, 2.03 GiB" in table.render([FITS], to=Screen(80))
    assert "lm_head.weight" not in table.render([FITS], to=Screen(60))


def test_replacement_characters_have_the_same_width() -> None:
    assert all(chr(stand_in).isascii() for stand_in in ASCII.values())
    assert paragraph("a b c", 3, " ") == ["a b", " c"]


@every_case
def test_explain_lists_the_ledger_and_its_sum(answer: Estimate) -> None:
    text = table.render([answer], True, Screen(120)).split("Alive at the peak")[1]
    listed, sums = text.split("  sum\n")
    found = [int(n.replace(",", "")) for n in re.findall(r"^ *([\d,]+)  \S", listed, re.M)]
    assert sum(found) == answer.bytes.allocated
    assert found == sorted(found, reverse=True)
    assert f"{answer.bytes.allocated:,}  bytes allocated" in sums
    joined = " ".join(text.split())
    for line in answer.ledger:
        assert line.what in joined
        assert line.why in joined
        assert " ".join(line.source.split()) in joined
        assert "·".join(map(str, line.dims)) in joined


def test_several_gpus_are_a_row_each() -> None:
    small = ask(method="qlora", gpu="rtx-4060-ti-8gb")
    answers = [FITS, small, NOTED]
    asked, _, blank, titles, *lines = table.render(answers, to=Screen(100)).splitlines()
    assert (asked, blank) == ("QLoRA of qwen2-7b", "")
    assert titles.split() == ["GPU", "answer", "GiB", "used", "usable", "free", "94%", "of", "runs"]
    for line, answer in zip(lines, answers, strict=False):
        assert line.startswith(f"{answer.run.gpu} ")
        assert f" {answer.verdict.answer} " in line
        assert f"{answer.bytes.used / GIB:.1f}" in line
    words = " ".join(" ".join(lines).split())
    assert f"The peak is {moment(FITS)}." in words
    assert help_line(small) in words
    assert [n for n in NOTED.notes if n not in words] == []


def test_several_runs_are_a_row_each_with_what_was_asked() -> None:
    titles, *lines = table.render([FITS, REFUSED], to=Screen(120)).splitlines()
    assert titles.split() == ["run", "GPU", "answer", "GiB", "used", "usable", "free"]
    words = " ".join(" ".join(lines).split())
    for answer in (FITS, REFUSED):
        assert f"The peak of {asked(answer)} on {answer.run.gpu} is {moment(answer)}." in words
        assert question(answer).split(",")[0] in words


def test_the_question_is_said_in_one_line() -> None:
    def asked(**fields: Any) -> str:
        return question(estimate(RunSpec.model_validate(fields)))

    lora = {"kind": "lora", "rank": 8}
    assert asked(model="qwen2-0.5b", method=lora, batch={"micro": 2, "accumulation": 4}) == (
        "LoRA of qwen2-0.5b, 2 sequences of 2,048 tokens, 4 passes a step, rank 8, adamw_torch_fused, transformers-5"
    )
    sharded = {"world": 2, "dp": 2, "strategy": "fsdp2"}
    assert asked(model="qwen2-0.5b", parallelism=sharded).endswith(
        ", adamw_torch_fused, 2 GPUs (fsdp2), transformers-5"
    )
    assert asked(model="qwen2-0.5b", task="generate", batch={"new_tokens": 5}) == (
        "generation of qwen2-0.5b, 1 prompt of 2,048 tokens, 5 new tokens, transformers-5"
    )
    assert asked(model="qwen2-0.5b", task="generate", profile="vllm", gpu="h100-sxm") == (
        "serving qwen2-0.5b with vllm-0.33, 1 request of 2,304 tokens"
    )


def test_a_name_that_may_mean_other_cards_is_followed_by_them() -> None:
    lines = table.render([estimate(RunSpec(model="qwen2-0.5b", gpu="4060ti"))], to=Screen(100)).splitlines()
    assert "4060ti may also mean rtx-4060-ti-16gb" in lines[:4]


def test_without_a_gpu_every_card_that_holds_it_is_named() -> None:
    words = table.render([BARE], to=Screen(80)).split()
    held = list(cards_that_hold(BARE.asked))
    assert [h.gpu.name for h in held if h.gpu.name + "?" * (h.answer == "tight") not in words] == []
    names = [name.rstrip("?") for group in cards(BARE) for names in group.by_size.values() for name in names]
    assert sorted(names) == sorted(h.gpu.name for h in held)
    for group in cards(BARE):
        assert list(group.by_size) == sorted(group.by_size)


def left_out(answer: Estimate) -> Estimate:
    """Return the answer with an omission and host memory."""
    other = copy.copy(answer)
    vars(other).update(unsupported=("a kernel",), host_bytes=3 * GIB)
    return other


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("several", [False, True])
def test_every_format_shows_omissions_and_host_memory(format: str, several: bool) -> None:
    answer = left_out(NOTED)
    text = render(format, [answer, answer] if several else [answer])
    assert "a kernel" in text
    assert (NOTED.notes[0] in text.replace("\n  ", " ")) == (format != "svg")
    if format in ("json", "csv"):
        assert str(3 * GIB) in text
    else:
        assert "not supported, and left out: a kernel" in text
    if format in ("table", "markdown", "html"):
        assert "3.00 GiB more are in the host's memory." in text.replace("&#x27;", "'")
        assert "the host's memory" not in render(format, [NOTED])


def test_no_card_may_hold_it() -> None:
    [group] = cards(ask(model="qwen2-72b", batch={"micro": 64}))
    assert (group.title, group.by_size) == ("No catalogued card holds it.", {})


# --- markdown, csv ---


@pytest.mark.parametrize("explain", [False, True])
def test_markdown_tables_are_whole(explain: bool) -> None:
    text = render("markdown", [FITS], explain)
    assert text.startswith(f"**{verdict(FITS)}**\n")
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in block.splitlines()}
        assert len(widths) == 1, block
    assert f"| parameters | {FITS.categories['parameter'] / GIB:.2f} |" in text
    assert (f"**{FITS.bytes.allocated:,}**" in text) == explain
    assert help_line(REFUSED).replace("_", r"\_") in render("markdown", [REFUSED])
    assert r"rtx-4000-ada?" in render("markdown", [BARE])


def test_markdown_of_several_gpus_has_a_row_each() -> None:
    text = render("markdown", [FITS, ask(method="qlora", gpu="t4")])
    assert re.findall(r"^\| (rtx-3090|t4) \|", text, re.M)[:2] == ["rtx-3090", "t4"]


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_is_a_row_for_each_gpu() -> None:
    rows = rows_of(render("csv", list(CASES.values())))
    assert [row["verdict"] for row in rows] == [answer.verdict.answer or "" for answer in CASES.values()]
    for row, answer in zip(rows, CASES.values(), strict=True):
        assert sum(int(row[kind]) for kind in KINDS) == int(row["allocated"]) == answer.bytes.allocated
        assert int(row["used"]) == answer.bytes.used
        assert row["headroom"] == ("" if answer.verdict.headroom is None else str(answer.verdict.headroom))
        assert row["gpu"] == (answer.gpu.name if answer.gpu else "")
        assert (row["peak_phase"], row["peak_where"]) == answer.peak
        at = next(
            p for p in reversed(answer.phases) if (p.phase, p.where, p.peak) == (*answer.peak, answer.bytes.allocated)
        )
        assert row["peak_step"] == ("" if at.step is None else str(at.step))
        assert row["notes"] == "; ".join(answer.notes)
        for phase in answer.phases:
            columns = (
                ["peak"]
                if phase.phase == "load"
                else {1: ["step_1"], 2: ["later"], None: ["step_1", "later"]}[phase.step]
            )
            assert [int(row[f"{phase.phase}_{column}"]) for column in columns] == [phase.peak] * len(columns)


def test_csv_explains_with_a_row_for_each_line_of_the_ledger() -> None:
    rows = rows_of(render("csv", [FITS, BARE], explain=True))
    assert {row["gpu"] for row in rows} == {"rtx-3090", ""}
    assert len(rows) == len(FITS.ledger) + len(BARE.ledger)
    assert sum(int(row["bytes"]) for row in rows) == FITS.bytes.allocated + BARE.bytes.allocated
    assert (rows[0]["what"], rows[0]["dims"]) == ("lm_head.weight", "152064x3584")


# --- JSON and its schema ---


@every_case
def test_the_json_report_equals_the_librarys_dump(answer: Estimate) -> None:
    assert json.loads(render("json", [answer])) == json.loads(answer.model_dump_json())
    assert json.loads(render("json", [answer, answer])) == [json.loads(answer.model_dump_json())] * 2


@every_case
def test_a_real_answer_matches_the_schema_without_extra_fields(answer: Estimate) -> None:
    dumped = json.loads(render("json", [answer]))
    read = answer_model().model_validate_json(render("json", [answer]))
    verdict = {"reason": None, **dumped["verdict"]}
    assert read.model_dump(mode="json") == {**dumped, "origins": None, "verdict": verdict}
    conforms(dumped, SCHEMA(), SCHEMA())


def test_documents_that_are_not_answers_are_invalid() -> None:
    dumped = json.loads(render("json", [FITS]))
    for path, wrong in ((("bytes", "used"), 1.5), (("verdict", "answer"), "perhaps"), (("schema_version",), 2)):
        broken = json.loads(render("json", [FITS]))
        part = broken
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = wrong
        with pytest.raises(AssertionError):
            conforms(broken, SCHEMA(), SCHEMA())
    del dumped["ledger"]
    with pytest.raises(AssertionError):
        conforms(dumped, SCHEMA(), SCHEMA())


def conforms(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> None:
    """Check a value against the JSON Schema keywords that the published schemas use; an unknown keyword fails."""
    if "$ref" in schema:
        return conforms(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root)
    known = {"title", "description", "default", "$defs", "$schema", "type", "properties", "required", "items", "enum"}
    known |= {
        "additionalProperties",
        "allOf",
        "anyOf",
        "const",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "minItems",
        "maxItems",
    }
    assert set(schema) <= known, schema
    for part in schema.get("allOf", ()):
        conforms(value, part, root)
    if "anyOf" in schema:
        assert any(_valid(value, option, root) for option in schema["anyOf"]), value
    types = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None)}
    if "type" in schema:
        expected: Any = {**types, "boolean": bool}[schema["type"]]
        assert isinstance(value, expected), (value, schema)
        assert not isinstance(value, bool) or expected is bool, (value, schema)
    assert "const" not in schema or value == schema["const"]
    assert "enum" not in schema or value in schema["enum"], (value, schema)
    assert "minimum" not in schema or value >= schema["minimum"]
    assert "maximum" not in schema or value <= schema["maximum"]
    if isinstance(value, list):
        assert schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)), value
        for item in value:
            conforms(item, schema.get("items", {}), root)
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        assert set(schema.get("required", ())) <= set(value)
        if schema.get("additionalProperties") is False:
            assert set(value) <= set(properties), (value, properties)
        for key, item in value.items():
            others = schema.get("additionalProperties", {})
            conforms(item, properties.get(key, others if isinstance(others, dict) else {}), root)
    return None


def _valid(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    try:
        conforms(value, schema, root)
    except AssertionError:
        return False
    return True


@every_case
def test_the_run_of_an_answer_round_trips(answer: Estimate) -> None:
    run = json.loads(render("json", [answer]))["run"]
    conforms(run, run_schema(), run_schema())
    again = RunSpec.model_validate(run)
    assert again == answer.run
    assert json.loads(again.model_dump_json()) == run
    assert estimate(again).bytes == answer.bytes


WRITTEN: list[dict[str, Any]] = [
    {"model": "qwen2-7b"},
    {"model": "qwen2-7b", "method": "qlora", "precision": "amp", "optimizer": "sgd", "gpu": "3090"},
    {"model": "qwen2-7b", "gpu": 3090},
    {"model": {"config": {"model_type": "llama"}}, "method": {"kind": "lora", "targets": ["q_proj"], "alpha": 16}},
]


@pytest.mark.parametrize("run", WRITTEN)
def test_valid_files_match_the_schema(run: dict[str, Any]) -> None:
    conforms(run, run_schema(), run_schema())
    RunSpec.model_validate({**run, "gpu": str(run["gpu"]) if "gpu" in run else None})


@pytest.mark.parametrize("change", [{"method": "qloar"}, {"precision": "am"}, {"optimizer": 3}, {"gpus": "3090"}])
def test_invalid_files_do_not_match_the_schema(change: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        conforms({**WRITTEN[0], **change}, run_schema(), run_schema())
    with pytest.raises(MemplanError):
        RunSpec.model_validate({**WRITTEN[0], **change})


def test_numbers_too_large_for_a_float_are_exact() -> None:
    answer = ask(batch={"micro": 2**40, "sequence": 2**40}, gpu="h100")
    whole = (2 * answer.bytes.used * 10 + GIB) // (2 * GIB)
    assert f"needs {whole // 10:,}.{whole % 10} of 79" in verdict(answer)
    assert f" {hundredths(answer.categories['activation'])} " in table.render([answer], to=Screen(100))
    assert hundredths(2**100 * GIB + GIB // 4) == f"{2**100:,}.25"


def test_the_formats_are_those_of_the_contract() -> None:
    assert FORMATS == ("table", "json", "markdown", "csv", "html", "svg")


# --- the largest fitting sizes ---


@ALL
@settings(max_examples=examples(4), deadline=None)
@given(
    model=st.sampled_from(["qwen2-0.5b", "llama-3.2-1b", "qwen2-7b"]),
    method=st.sampled_from(["full", "lora", "qlora"]),
    gpu=st.sampled_from(["t4", "3090", "h100", "v100"]),
    micro=st.integers(1, 8),
    sequence=st.integers(64, 4096),
)
@example(model="llama-3.2-1b", method="full", gpu="3090", micro=5, sequence=64)  # one more token fits
def test_the_largest_batch_and_sequence_fit_and_one_more_does_not(
    model: str, method: str, gpu: str, micro: int, sequence: int
) -> None:
    run = RunSpec.model_validate(
        {"model": model, "method": method, "gpu": gpu, "batch": {"micro": micro, "sequence": sequence}}
    )
    for field, most in (("micro", largest_batch(run)), ("sequence", largest_sequence(run))):
        assert most == 0 or fits(changed(run, "batch", **{field: most}))
        assert not fits(changed(run, "batch", **{field: most + 1}))


def fits(run: RunSpec) -> bool:
    return estimate(run).verdict.answer == "fits"


def test_the_largest_sequence_is_bounded_by_learned_positions() -> None:
    assert largest_sequence(RunSpec.model_validate({"model": "gpt2", "method": "lora", "gpu": "h100"})) == 1024


def test_the_largest_batch_needs_a_gpu() -> None:
    with pytest.raises(SpecError, match="gpu"):
        largest_batch(BARE.asked)


@ALL
def test_the_help_line_names_fitting_cards_and_sizes() -> None:
    line = help_line(REFUSED)
    assert "--method lora" in line
    smallest = next(h.gpu for h in cards_that_hold(REFUSED.asked, "NVIDIA") if h.answer == "fits")
    assert smallest.title in line
    long = ask(method="qlora", gpu="3090", batch={"micro": 4, "sequence": 4096})
    assert long.verdict.answer == "does not fit"
    assert f"batch {largest_batch(long.asked)} at 4,096 tokens" in help_line(long)
    assert f"{largest_sequence(long.asked):,} tokens at batch 4" in help_line(long)
    assert help_line(FITS) == help_line(TIGHT) == help_line(BARE) == ""


def test_cards_that_hold_a_run_are_listed_least_memory_first() -> None:
    held = list(cards_that_hold(BARE.asked))
    assert [h.gpu.usable for h in held] == sorted(h.gpu.usable for h in held)
    by_name = {h.gpu.name: h.answer for h in held}
    for gpu in all_gpus():
        answer = ask(method="lora", gpu=gpu.name).verdict.answer
        assert by_name.get(gpu.name, "does not fit") == answer


def test_llama_cpp_has_no_allocator_of_torch() -> None:
    run = RunSpec(model="llama-3.1-8b", task="generate", profile="llama.cpp", gpu="3060", serving={"weights": "Q4_K_M"})
    answer = estimate(run)
    text = render("table", [answer])
    assert "ggml's buffers" in text
    assert "torch" not in text
    assert "tokens of 1 request" in text
    assert sum(part.bytes for part in parts(answer)) == answer.bytes.used
