"""Pages and drawings: self-contained, escaped, to scale, within their size, and with every fact of the answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from memplan import Estimate, RunSpec, estimate
from memplan.core.units import GIB
from memplan.planning.comparison import compare
from memplan.planning.ladder import ladder
from memplan.planning.reach import frontier, reach
from memplan.report import comparison, html, plans, render, svg
from memplan.report.assumptions import question
from memplan.report.blocks import Fold, Text
from memplan.report.display import display
from memplan.report.markdown import page as markdown_page
from memplan.report.markup import Markup, element, joined
from memplan.report.plans.ladder import LadderReport
from memplan.report.plans.reach import ReachReport
from memplan.report.stamp import Stamp
from memplan.report.text import Screen
from memplan.report.wording import CATEGORIES, parts, verdict

HOSTILE = "<img src=x onerror=alert(1)>\"'&</script><script>"
LARGEST = 300 * 1024
LORA = {"model": "llama-3.1-8b", "method": "lora"}


def ask(**fields: Any) -> Estimate:
    return estimate(RunSpec.model_validate({"model": "qwen2-0.5b", **fields}))


ANSWERS = {
    "training": {"method": "qlora", "gpu": "3090"},
    "does not fit": {"model": "qwen2-7b", "gpu": "3090"},
    "no card": {"method": "lora"},
    "generating": {"model": "qwen2-0.5b", "task": "generate", "gpu": "t4"},
    "serving": {"model": "llama-3.2-1b", "task": "generate", "profile": "vllm-0.33", "gpu": "4090"},
    "a pipeline": {"model": "tinyllama-1.1b", "parallelism": {"world": 2, "pp": 2}, "batch": {"accumulation": 4}},
}


@cache
def answer_of(name: str) -> Estimate:
    return ask(**ANSWERS[name])


def planned(mode: str) -> plans.Planned:
    answer, run = answer_of("training"), RunSpec(model="qwen2-0.5b", method="qlora", gpu="3090")
    if mode == "ladder":
        return LadderReport(answer, plans_demand(), ladder(run, None))
    limit = reach(run, "batch", plans_demand(), None)
    return ReachReport(answer, plans_demand(), limit, frontier(run, plans_demand(), None))


def plans_demand() -> Any:
    from memplan.estimate.demand import Demand

    return Demand()


def compared() -> Any:
    return compare([RunSpec(model="qwen2-0.5b", method=m, gpu="3090") for m in ("lora", "qlora", "full")])


SMALL = Screen()
PAGES: dict[str, Callable[[], str]] = {
    **{name: lambda name=name: render("html", [answer_of(name)], explain=True) for name in ANSWERS},
    "several cards": lambda: render("html", [ask(gpu=gpu) for gpu in ("3090", "t4", "h100")]),
    "a comparison": lambda: comparison.render("html", compared(), SMALL),
    "a ladder": lambda: plans.render("html", planned("ladder"), False, SMALL),
    "a frontier": lambda: plans.render("html", planned("max"), False, SMALL),
}
DRAWINGS: dict[str, Callable[[], str]] = {
    **{name: lambda name=name: render("svg", [answer_of(name)]) for name in ANSWERS},
    "several cards": lambda: render("svg", [ask(gpu=gpu) for gpu in ("3090", "t4", "h100")]),
    "a comparison": lambda: comparison.render("svg", compared(), SMALL),
    "a ladder": lambda: plans.render("svg", planned("ladder"), False, SMALL),
}
every_page = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES.keys())
every_drawing = pytest.mark.parametrize("drawing", DRAWINGS.values(), ids=DRAWINGS.keys())
every_answer = pytest.mark.parametrize("name", ANSWERS)


class Page(HTMLParser):
    """Collects the tags and texts of a page; an unclosed tag is an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def count(self, tag: str) -> int:
        return [name for name, _ in self.tags].count(tag)


# --- every page --------------------------------------------------------------------------------------------


@every_page
def test_a_page_is_one_file_that_asks_for_nothing(page: Callable[[], str]) -> None:
    text = page()
    read = Page(text)
    assert {"link", "img", "iframe", "object", "use", "image", "foreignobject"}.isdisjoint(tag for tag, _ in read.tags)
    references = {"src", "href", "srcset", "data", "action", "xlink:href"}
    assert [attributes for _, attributes in read.tags if references & set(attributes)] == []
    assert re.findall(r"https?://|//[a-z]+\.|@import|url\(|fetch\(|XMLHttp", text) == []
    assert "default-src 'none'" in str(dict(read.tags)["meta"].get("content"))
    assert len(text.encode()) < LARGEST


@every_page
def test_a_page_has_a_header_drawings_and_folds(page: Callable[[], str]) -> None:
    read = Page(page())
    assert [read.count(tag) for tag in ("h1", "header", "main", "html")] == [1, 1, 1, 1]
    assert read.count("figure") >= 2
    assert read.count("details") == read.count("summary") >= 1
    named = [attributes for tag, attributes in read.tags if tag == "svg" and "role" in attributes]
    assert all(attributes["aria-label"] for attributes in named)
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch(r"h\d", tag)]
    assert (levels[0], {*levels[1:]} <= {2}) == (1, True)


@every_drawing
def test_a_drawing_is_a_file_of_its_own(drawing: Callable[[], str]) -> None:
    text = drawing()
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert re.findall(r"url\(|@import|href|<script|<image", text) == []
    assert re.findall(r"https?://\S+", text) == ['http://www.w3.org/2000/svg"']
    assert len(text.encode()) < LARGEST


def test_a_page_of_many_runs_keeps_its_size() -> None:
    runs = [RunSpec.model_validate({**LORA, "batch": {"micro": n}}) for n in range(1, 13)]
    assert len(comparison.render("html", compare(runs), SMALL).encode()) < LARGEST
    cards = ["3090", "4090", "t4", "h100", "a100-80gb", "l4", "h200", "5090"]
    answers = [ask(**LORA, gpu=gpu) for gpu in cards]
    assert len(render("html", answers, explain=True).encode()) < LARGEST


def test_the_same_answer_gives_the_same_file() -> None:
    for format in ("html", "svg"):
        assert render(format, [answer_of("training")]) == render(format, [ask(**ANSWERS["training"])])


# --- what is in it -----------------------------------------------------------------------------------------


@every_answer
def test_a_page_has_every_fact_of_the_answer(name: str) -> None:
    answer = answer_of(name)
    read = Page(render("html", [answer], explain=True))
    assert verdict(answer) in read.texts
    assert f"{answer.bytes.allocated:,}" in read.texts
    shown = sorted(answer.ledger, key=lambda line: -line.bytes)[:200]
    assert [line.what for line in shown if line.what not in read.texts] == []
    assert [part.label for part in parts(answer) if part.label not in read.texts] == []
    assert ("open" in dict(read.tags)["details"]) is True


def test_a_long_ledger_names_its_largest_lines_and_sums_the_others() -> None:
    answer = answer_of("training")
    lines = [line._replace(what=f"tensor {n}") for n, line in enumerate(answer.ledger * 5)]
    vars(long := estimate(answer.asked)).update(ledger=tuple(lines))
    [table] = html.ledger(long).blocks
    *largest, rest, total = table.rows  # pyright: ignore[reportAttributeAccessIssue]
    assert [line.what for line in largest] == [f"tensor {n}" for n in range(200)]
    assert rest.what == f"{len(lines) - 200} smaller ones"
    assert sum(line.bytes for line in (*largest, rest)) == total.bytes == sum(line.bytes for line in lines)


def test_the_header_has_the_command_and_the_date_only_if_given() -> None:
    answer = answer_of("training")
    assert "memplan qwen2-0.5b --method qlora" not in render("html", [answer])
    stamp = Stamp("memplan qwen2-0.5b --method qlora --gpu 3090", "2026-11-29")
    for format in ("html", "markdown"):
        assert stamp.command in render(format, [answer], stamp=stamp)
    for format in ("html", "markdown", "svg"):
        assert stamp.line in render(format, [answer], stamp=stamp)
        assert "2026" not in render(format, [answer])


def test_runs_that_differ_are_named_by_what_they_ask() -> None:
    answers = [answer_of("training"), answer_of("does not fit")]
    names = ["QLoRA of qwen2-0.5b on rtx-3090", "full fine-tuning of qwen2-7b on rtx-3090"]
    page, text = (render(format, answers) for format in ("html", "markdown"))
    assert "<h1>2 runs</h1>" in page
    assert text.startswith("2 runs\n\n| run |")
    for name, answer in zip(names, answers, strict=True):
        assert f"Through the step: {name}" in page
        assert f"| {name} | **{answer.verdict.answer}** |" in text
        assert f"The peak of {name} is" in " ".join(render("table", answers, details=False).split())
    fused = ask(**ANSWERS["training"], kernels={"loss": "fused"})
    assert f"run 2, {question(fused)} on rtx-3090" in render("html", [answers[0], fused])
    assert page.count("Assumed for ") == text.count("assumed for ") == 2


def test_a_reviewer_reads_the_verdict_a_table_and_one_fold() -> None:
    text = render("markdown", [answer_of("training"), answer_of("does not fit")])
    head, _, folded = text.partition("<details>\n<summary>")
    assert re.search(r"^\| QLoRA of \S+ on rtx-3090 \| \*\*fits\*\* \|", head, re.MULTILINE)
    assert text.count("<details>") == text.count("</details>") == 1
    assert "at the peak" not in head
    assert "at the peak" in folded


def test_a_fold_is_a_heading_without_a_page() -> None:
    fold = Fold("A < B", [Text("inside"), Fold("within", [Text("deep")])], is_open=True)
    assert display([fold], SMALL) == "A < B\ninside\n\nwithin\ndeep\n"
    assert display([fold], Screen(80, True)) == "A < B\ninside\n\nwithin\ndeep\n"
    assert markdown_page([fold]).startswith("<details open>\n<summary>A &lt; B</summary>\n\ninside\n")


# --- the timeline ------------------------------------------------------------------------------------------


@every_answer
def test_the_timeline_is_stacked_by_kind(name: str) -> None:
    answer = answer_of(name)
    assert [sum(kinds.values()) for kinds in answer.timeline_kinds] == [moment.peak for moment in answer.timeline]
    assert min(n for kinds in answer.timeline_kinds for n in kinds.values()) >= 0
    top = max(range(len(answer.timeline)), key=lambda i: (answer.timeline[i].peak, i))
    if answer.timeline[top].peak == answer.bytes.allocated:
        at_top = {kind: n for kind, n in answer.timeline_kinds[top].items() if n}
        assert at_top == {kind: n for kind, n in answer.categories.items() if n}


@every_answer
@pytest.mark.parametrize("most", [20, 400])
def test_the_drawing_has_the_moments_in_order_and_the_peak(name: str, most: int) -> None:
    answer = answer_of(name)
    moments = svg.drawn_moments(answer, most)
    assert all(a.end <= b.start + 1e-9 for a, b in pairwise(moments))
    assert (moments[0].start, round(moments[-1].end, 6)) == (0, 100)
    assert max(moment.bytes for moment in moments) == max(moment.peak for moment in answer.timeline)
    assert list(dict.fromkeys(m.phase for m in moments)) == list(dict.fromkeys(m.phase for m in answer.timeline))
    assert len(moments) <= max(2 * most, most + 10)
    assert all(moment.end - moment.start > 0 for moment in moments)


def test_the_slider_has_the_bytes_of_every_moment() -> None:
    answer = answer_of("training")
    figure = html.timeline(answer)
    data = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', figure)[0])
    labels = [label for _, label in data["kinds"]]
    assert {*labels} <= {*CATEGORIES.values()}
    assert len(data["moments"]) == len(answer.timeline)
    totals = [total for _, _, total, *_ in data["moments"]]
    assert totals == [round(moment.peak / GIB, 3) for moment in answer.timeline]
    sums = [sum(sizes) for _, _, _, *sizes in data["moments"]]
    assert sums == pytest.approx(totals, abs=0.01)
    held = [[kinds.get(kind, 0) > 0 for kind, _ in data["kinds"]] for kinds in answer.timeline_kinds]
    assert [[n > 0 for n in sizes] for _, _, _, *sizes in data["moments"]] == held
    [slider] = [attributes for tag, attributes in Page(figure).tags if tag == "input"]
    assert answer.timeline[int(slider["value"] or 0)].peak == answer.bytes.allocated
    assert int(slider["max"] or 0) == len(answer.timeline) - 1


def test_the_bars_are_to_one_scale() -> None:
    answers = [ask(gpu="3090", batch={"micro": n}) for n in (1, 8)]
    full = max(max(a.band.high, a.bytes.used, a.gpu.usable if a.gpu else 0) for a in answers)
    drawn = svg.bars([("", answer) for answer in answers])
    widths = [float(width) for width in re.findall(r'width="([\d.]+)%" height="24" class="piece', drawn)]
    expected = [100 * part.bytes / full for answer in answers for part in parts(answer)]
    assert widths == pytest.approx(expected, abs=0.006)


# --- escaping ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["html", "svg", "markdown"])
def test_names_from_input_are_text(format: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 100}
    model = {"config": {"_name_or_path": HOSTILE, "model_type": "llama", **sizes}}
    stamp = Stamp(f"memplan '{HOSTILE}\n```\n'", HOSTILE)
    answers = [ask(model=model, gpu=gpu) for gpu in ("3090", "t4")]
    for text in (render(format, answers[:1], True, stamp=stamp), render(format, answers, True, stamp=stamp)):
        markup = re.sub(r"^(`{3,})sh\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
        assert "<img" not in markup
        assert markup.count("<script") == (markup.count("</script>") if format == "html" else 0)
        if format == "svg":
            ElementTree.fromstring(text)
        if format == "html":
            assert any(HOSTILE in part for part in Page(text).texts)


def test_elements_escape_texts_and_attributes() -> None:
    made = element("p", HOSTILE, element("b", "&"), title=HOSTILE, class_="x", hidden=None)
    title = "&lt;img src=x onerror=alert(1)&gt;&quot;&#x27;&amp;&lt;/script&gt;&lt;script&gt;"
    assert made.startswith(f'<p title="{title}" class="x">')
    assert made.endswith("<b>&amp;</b></p>")
    assert "<img" not in made
    assert joined("a\x1b[31m\nb", Markup("<i>")) == "a\\x1b[31m\nb<i>"
    ElementTree.fromstring(element("p", "a\x00\x0bb", title="\x01"))
