"""`memplan plan`: every figure is arithmetic on estimates, every proposal can be typed, every line fits the screen,
every error is one line.
"""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.main import get_command

import memplan
from memplan import Estimate, RunSpec, estimate
from memplan.catalogue.hardware.gpus import all_gpus, find_gpu
from memplan.catalogue.profiles.costs import cost_of
from memplan.cli.app import app
from memplan.core.cached_property import cached_property
from memplan.core.errors import SpecError
from memplan.core.units import GIB, MIB, amount_of, size_of
from memplan.estimate.answer import ANSWERS
from memplan.estimate.demand import Demand
from memplan.planning.advice import advise
from memplan.planning.cluster import FixedDegrees, cluster_of, search
from memplan.planning.inference import places, questions
from memplan.planning.ladder import ladder
from memplan.planning.offers import CardFilter, offers, parse_owned_cards
from memplan.planning.plan import SEVERITIES, plan
from memplan.planning.reach import frontier, reach
from memplan.report.heat import short
from memplan.report.plans import dump, render
from memplan.report.plans.advice import AdviceReport, simplest_run
from memplan.report.plans.changes import freed, signed
from memplan.report.plans.cluster import ClusterReport, compare_with_one_gpu, grid_title
from memplan.report.plans.inference import Places, QuestionsReport
from memplan.report.plans.ladder import LadderReport
from memplan.report.plans.levers import Levers, missing_bytes, singles
from memplan.report.plans.offers import OffersReport
from memplan.report.plans.reach import ReachReport
from memplan.report.schema import plan_model, plan_schema
from memplan.report.text import Screen
from tests.report.test_reports import conforms
from tests.sampling import ALL, examples, sampled

if TYPE_CHECKING:
    from memplan.report.plans import Planned

COMMAND = get_command(app)
FITS = Demand()


def run(**fields: Any) -> RunSpec:
    return RunSpec.model_validate({"model": "pythia-70m", **fields})


SMALL = run(method="lora", gpu="3060")
LARGE = run(gpu="3060", batch={"micro": 9})
ROOM = Demand(headroom=11 * GIB + GIB // 2)
TINY = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
SPARING = {"checkpointing": "offload", "loss": "fused", "attention": "flash_attention_2"}
HELD = run(model={"config": TINY}, gpu="3060", optimizer="sgd", batch={"sequence": 128}, kernels=SPARING)
WIDE = run(gpu="3060", batch={"micro": 4})
BIG = run(model="qwen2-72b")
SERVED = run(model="llama-3.2-1b", task="generate", profile="vllm-0.33", batch={"sequence": 4000, "new_tokens": 96})
ROWED = run(model="qwen2.5-7b", task="generate", profile="llama.cpp-2026", gpu="3060")


class Plans:
    """A plan of every kind, made when a test first asks for it: collecting the tests makes none."""

    @cached_property
    def answer(self) -> Estimate:
        return estimate(SMALL)

    @cached_property
    def ways(self) -> Levers:
        return Levers(plan(LARGE), (reach(LARGE, "batch"), reach(LARGE, "sequence")))

    @cached_property
    def free(self) -> Levers:
        return Levers(plan(SMALL), tuple(reach(SMALL, axis) for axis in ("batch", "sequence", "rank")))

    @cached_property
    def none(self) -> Levers:
        far = tuple(reach(HELD, axis, ROOM) for axis in ("batch", "sequence"))
        return Levers(plan(HELD, headroom=ROOM.headroom), far)

    @cached_property
    def batch(self) -> ReachReport:
        return ReachReport(self.answer, FITS, reach(SMALL, "batch"), frontier(SMALL))

    @cached_property
    def rank(self) -> ReachReport:
        return ReachReport(self.answer, FITS, self.free.reach[2], None)

    @cached_property
    def no_batch(self) -> ReachReport:
        return ReachReport(self.answer, ROOM, reach(SMALL, "batch", ROOM), None)

    @cached_property
    def ladder(self) -> LadderReport:
        return LadderReport(estimate(WIDE), FITS, ladder(WIDE))

    @cached_property
    def no_card(self) -> LadderReport:
        return LadderReport(estimate(run()), FITS, ladder(run()))

    @cached_property
    def rented(self) -> OffersReport:
        return OffersReport(self.answer, FITS, offers(SMALL, tokens=10**9, most=6), 10**9)

    @cached_property
    def there(self) -> Estimate:
        return estimate(run(model="qwen2-72b", gpu="rtx-3090"))

    @cached_property
    def nothing_offered(self) -> OffersReport:
        found = offers(BIG, CardFilter(owned=parse_owned_cards("3090")))
        return OffersReport(estimate(BIG), FITS, found, None, self.there)

    @cached_property
    def advice(self) -> AdviceReport:
        return AdviceReport(self.answer, FITS, advise(SMALL))

    @cached_property
    def grids(self) -> ClusterReport:
        return ClusterReport(FITS, search(run(model="llama-3.2-1b"), cluster_of(find_gpu("h100"), 2, 4)))

    @cached_property
    def no_grid(self) -> ClusterReport:
        asked = run(model="llama-3.1-8b", method="lora")
        return ClusterReport(FITS, search(asked, cluster_of(find_gpu("t4"), 1, 2), FixedDegrees(pp=1)))

    @cached_property
    def asked(self) -> QuestionsReport:
        return QuestionsReport(questions(SERVED.model_copy(update={"gpu": "3060"})))

    @cached_property
    def too_large(self) -> QuestionsReport:
        return QuestionsReport(questions(ROWED))

    @cached_property
    def placed(self) -> Places:
        return Places(estimate(SERVED), FITS, places(SERVED, CardFilter(owned=parse_owned_cards("8xl4,3090"))))

    @cached_property
    def no_place(self) -> Places:
        return Places(estimate(SERVED), FITS, ())


PLANS = Plans()
ROWS = ("batch", "rank", "no_batch", "ladder", "no_card", "rented", "nothing_offered", "grids", "no_grid")
ROWS += ("placed", "no_place")
CASES = ("ways", "free", "none", "advice", "asked", "too_large", *ROWS)
SCHEMA = cache(plan_schema)
every_case = pytest.mark.parametrize("case", CASES, indirect=True)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Planned:
    """Return the plan of a case's name."""
    return getattr(PLANS, request.param)


def words_of(text: str) -> str:
    return " ".join(text.split())


# --- every mode in every format ---


@every_case
@pytest.mark.parametrize("width", sampled([40, 80, 120], 3))
@pytest.mark.parametrize("explain", sampled([True, False], 2))
def test_every_line_fits_the_screen(case: Planned, width: int, explain: bool) -> None:
    text = render("table", case, explain, Screen(width))
    assert "\x1b" not in text
    assert [line for line in text.splitlines() if len(line) > width or line != line.rstrip()] == []


@every_case
def test_a_terminal_shows_the_same_text_but_rules_and_the_maps_signs(case: Planned) -> None:
    piped, coloured = (render("table", case, False, Screen(120, colour, colour)) for colour in (False, True))
    bare = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert bare != coloured
    assert [line for line in bare.splitlines() if len(line) > 120] == []
    shown = [re.sub(r"─{9,}", "", text.partition("Longest sequence for every batch")[0]) for text in (bare, piped)]
    assert sorted(shown[0].split()) == sorted(shown[1].split())


@every_case
def test_json_matches_the_schema_without_extra_fields(case: Planned) -> None:
    text = render("json", case, False, Screen())
    dumped = json.loads(text)
    conforms(dumped, SCHEMA(), SCHEMA())
    read: Any = plan_model().validate_json(text)
    assert read.model_dump(mode="json", exclude_unset=True) == dumped
    assert json.loads(json.dumps(dump(case))) == dumped
    bytes_, gpu = dumped["bytes"], dumped["gpu"]
    if gpu:
        assert bytes_["used"] + dumped["verdict"]["headroom"] == gpu["usable"]


@pytest.mark.parametrize(
    ("name", "wrong"), [("mode", "lever"), ("proposals", [{}]), ("reach", 3), ("demand", {"tight": False})]
)
def test_documents_that_are_not_plans_are_invalid(name: str, wrong: object) -> None:
    dumped = {**json.loads(json.dumps(dump(PLANS.ways))), name: wrong}
    with pytest.raises(AssertionError):
        conforms(dumped, SCHEMA(), SCHEMA())


@every_case
def test_markdown_tables_are_whole(case: Planned) -> None:
    text = render("markdown", case, True, Screen())
    assert "\x1b" not in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in block.splitlines()}) == 1, block
    assert text.count("```") % 2 == 0
    assert ("```text\nbatch " in text) == (case is PLANS.batch)


@pytest.mark.parametrize("case", ROWS, indirect=True)
def test_csv_has_a_row_for_each_and_never_none(case: Planned) -> None:
    rows = list(csv.DictReader(io.StringIO(render("csv", case, False, Screen()))))
    if isinstance(case, LadderReport):
        assert [int(row["used"]) for row in rows] == [answer.bytes.used for answer, _ in case.every]
    elif isinstance(case, ReachReport) and case.frontier:
        assert [(int(row["batch"]), int(row["sequence"])) for row in rows] == list(case.frontier.longest)
    elif isinstance(case, OffersReport) and case.found:
        assert [int(row["headroom"]) for row in rows] == [a.verdict.headroom for a in case.found]
        told = dump(case)["offers"]
        assert [float(row["whole_usd_high"]) for row in rows] == [offer["whole"]["usd"]["high"] for offer in told]
    elif isinstance(case, ClusterReport) and case.found:
        assert [int(row["allocated"]) for row in rows] == [a.bytes.allocated for a in case.found]
        for row, placed in zip(rows, case.cluster.placed, strict=True):
            assert float(row["step_seconds_usual"]) == placed.step.seconds.usual
            assert (int(row["tp"]), row["strategy"]) == (placed.grid.tp, placed.grid.strategy)
    elif isinstance(case, Places):
        assert [int(row["used"]) for row in rows] == [placed.answer.bytes.used for placed in case.places]
    else:
        assert len(rows) == 1


# --- a cluster ---


def test_a_grids_options_typed_make_its_run(plan_: Command) -> None:
    told = dump(PLANS.grids)["best"]
    options = told["options"].split()
    answer = json.loads(plan_.typed("llama-3.2-1b", "--gpu", "h100", *options, "--json").out)
    assert answer["bytes"] == told["bytes"]
    assert told["run"]["parallelism"]["world"] == 8


@pytest.mark.parametrize("name", ["accelerate", "deepspeed", "torchrun", "torchtitan", "megatron"])
def test_the_fastest_grid_is_written_for_a_framework(plan_: Command, tmp_path: Path, name: str) -> None:
    asked = ("llama-3.2-1b", "--gpu", "h100", "--nodes", "2", "--gpus", "4")
    plain = plan_(*asked, "--emit", name)
    assert (plain.code, plain.err) == (0, "")
    file = tmp_path / "run"
    assert plan_(*asked, "--emit", name, "--output", str(file)) == (0, "", "")
    assert file.read_text("utf-8") == plain.out
    world = {"accelerate": "num_processes: 8", "deepspeed": '"train_batch_size": 8'}.get(
        name, "--nnodes=2 --nproc_per_node=4"
    )
    assert world in plain.out


def test_a_way_that_offloads_says_what_the_host_holds(plan_: Command) -> None:
    out = plan_("llama-3.1-8b", "--gpu", "4090").out
    assert "1. DeepSpeed ZeRO 3 with optimizer and weights on the host: fits" in out
    assert "GiB in the host's memory" in out
    assert "--zero 3 --offload parameters,optimizer" in out
    out = plan_("llama-3.1-8b", "--gpu", "4090", "--gpus", "2").out
    found = re.search(r"  host +([\d.]+) GiB in the host's memory, ([\d.]+) GiB of each of 2 processes\n", out)
    assert found is not None
    assert float(found[1]) == pytest.approx(2 * float(found[2]), abs=0.02)


def test_no_file_is_written_if_nothing_fits(plan_: Command) -> None:
    ran = plan_("llama-3.1-8b", "--gpu", "3090", "--nodes", "1", "--gpus", "2", "--emit", "accelerate")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == ("memplan: emit (--emit): nothing that accelerate can run fits; leave out --emit to see why\n")


def test_the_fastest_layout_is_shown_with_its_traffic_and_assumptions() -> None:
    text = words_of(render("table", PLANS.grids, True, Screen(120)))
    best, counts = PLANS.grids.cluster.placed[0], dump(PLANS.grids)["counts"]
    assert f"on 2 nodes of 4 × {find_gpu('h100').title}: {grid_title(best.grid)}; fits" in text
    assert f"Of {counts['grids']:,} grids {counts['fit']:,} fit and are shown" in text
    assert "network at 25 to 45 GB/s of 50 each way (assumed)" in text
    assert "tp stays inside a node" in text
    for s in best.step.sent:
        assert s.link == ("network" if s.crosses else "NVLink")
    assert counts["grids"] == sum(n for kind, n in counts.items() if kind != "grids")


def test_two_cards_are_not_one_twice_as_large() -> None:
    held = PLANS.no_grid.cluster.together
    assert held.ddp is not None
    assert held.fsdp2 is not None
    assert held.fsdp2 < held.alone < held.ddp
    usable = find_gpu("t4").usable
    sentence = compare_with_one_gpu(PLANS.no_grid.cluster)
    assert sentence.startswith(
        f"Two GPUs of {usable / GIB:.2f} GiB are not one of {2 * usable / GIB:.2f} GiB: under ddp "
    )
    assert f"each holds everything, {held.ddp / GIB:.2f} GiB" in sentence
    assert f"under fsdp2 each holds {held.fsdp2 / GIB:.2f} GiB" in sentence
    told = dump(PLANS.no_grid)
    assert told["together"]["text"] == sentence
    assert sentence in words_of(render("markdown", PLANS.no_grid, False, Screen()))
    assert told["best"] is None
    assert told["nearest"]["verdict"]["answer"] != "fits"


# --- what makes it fit ---


def test_a_proposals_saving_is_the_difference_of_two_estimates() -> None:
    before = estimate(LARGE)
    assert PLANS.ways.plan.proposals
    for proposal, told in zip(PLANS.ways.plan.proposals, dump(PLANS.ways)["proposals"], strict=True):
        after = estimate(proposal.run)
        assert told["bytes"] == after.bytes.as_dict()
        assert told["saves"] == before.bytes.allocated - after.bytes.allocated
        assert sum(lever["saves"] for lever in told["levers"]) == told["saves"]
        assert told["host_bytes"] == after.host_bytes * after.host.ranks
        assert told["verdict"]["headroom"] == find_gpu("3060").usable - after.bytes.used
        assert told["severity"] == max(lever["severity"] for lever in told["levers"])
        assert RunSpec.model_validate(told["run"]) == after.run


def test_a_proposals_options_typed_make_its_run(plan_: Command) -> None:
    for told in dump(PLANS.ways)["proposals"]:
        answer = json.loads(
            plan_.typed("pythia-70m", "--gpu", "3060", "--batch-size", "9", *told["options"].split(), "--json").out
        )
        assert answer["bytes"] == told["bytes"]


def test_proposals_are_listed_in_order_with_their_costs() -> None:
    text = words_of(render("table", PLANS.ways, False, Screen(120)))
    places: list[int] = []
    for n, proposal in enumerate(PLANS.ways.plan.proposals, 1):
        used, usable = proposal.answer.bytes.used, find_gpu("3060").usable
        title = " and ".join(lever.title for lever in proposal.levers)
        assert f"{n}. {title}: fits, {used / GIB:.1f} of {usable / GIB:.1f} GiB used" in text
        places.append(text.index(f"{n}. {title}: "))
        start, end = places[-1], text.find(f" {n + 1}. ", places[-1])
        told = text[start : end if end > 0 else None]
        assert SEVERITIES[proposal.severity] in told
        for effect in proposal.effects:
            assert f"{signed(freed(effect))} GiB used" in told
            assert all(words_of(cost.quality) in told for cost in effect.lever.costs)
        assert proposal.time is not None
        assert re.search(rf"time {proposal.time.low:.2f} (to {proposal.time.high:.2f} )?times as long", told), told
    assert places == sorted(places)


def test_explain_shows_every_layouts_framework_settings_and_sources() -> None:
    """Without --explain only the best layout has each framework's settings."""
    short_, long = (render("table", PLANS.ways, explain, Screen(120)) for explain in (False, True))
    assert short_.count("  LLaMA-Factory\n") == 1
    assert long.count("  LLaMA-Factory\n") == len(PLANS.ways.plan.proposals)
    source = cost_of(PLANS.ways.plan.proposals[0].levers[0].keys[0]).quality_source
    assert source in words_of(long)
    assert source not in words_of(short_)
    assert render("markdown", PLANS.ways, False, Screen()).count("LLaMA-Factory:") == 1
    assert [sorted(told["lines"]) for told in dump(PLANS.ways)["proposals"]] == [
        ["axolotl", "llamafactory", "trl"]
    ] * len(PLANS.ways.plan.proposals)


def test_a_run_that_fits_lists_every_change_by_saving() -> None:
    text = render("table", PLANS.free, False, Screen(120))
    assert text.splitlines()[0].startswith("fits: ")
    assert "Nothing has to change" in text
    found = [(effect.lever.title, freed(effect)) for effect in singles(PLANS.free.plan)]
    assert [n for _, n in found] == sorted((n for _, n in found), reverse=True)
    assert found[-1][1] > 0
    for title, n in found:
        assert re.search(rf"^{re.escape(title)} +{signed(n)} ", text, re.M), title


def test_if_nothing_fits_the_nearest_is_shown_with_the_missing_memory() -> None:
    nearest = PLANS.none.plan.nearest
    assert nearest is not None
    assert nearest.answer.verdict.headroom is not None
    missing = ROOM.headroom - nearest.answer.verdict.headroom
    assert missing_bytes(PLANS.none.plan) == missing > 0
    text = words_of(render("table", PLANS.none, False, Screen(120)))
    assert "runs tried fits (11.50 GiB free)" in text
    assert (
        f"lowers the peak it needs {missing / (GIB if missing >= GIB else MIB):.{2 if missing >= GIB else 1}f}" in text
    )
    assert dump(PLANS.none)["nearest"]["bytes"]["used"] == nearest.answer.bytes.used
    assert dump(PLANS.none)["proposals"] == []


# --- how far ---


def test_the_largest_fits_and_the_next_does_not() -> None:
    for far, part, field in ((PLANS.batch, "batch", "micro"), (PLANS.rank, "method", "rank")):
        [told] = dump(far)["reach"]
        assert told["at"]["run"][part][field] == told["value"]
        assert told["at"]["verdict"]["answer"] == "fits"
        beyond = told["beyond"]
        assert beyond is None or beyond["verdict"]["answer"] != "fits"
    assert [r["binds"] for r in (*dump(PLANS.batch)["reach"], *dump(PLANS.rank)["reach"])] == ["memory", "rank"]
    assert "the dimensions of the matrices" in render("table", PLANS.rank, False, Screen())


def test_if_no_batch_fits_the_nearest_is_named() -> None:
    text = words_of(render("table", PLANS.no_batch, False, Screen()))
    answer = PLANS.no_batch.reach.beyond
    assert answer is not None
    assert text.startswith("No batch fits on GeForce RTX 3060 12GB (with 11.50 GiB free). The nearest: batch 1 would")
    assert f"{(answer.verdict.headroom or 0) / GIB:.2f} GiB free" in text
    assert dump(PLANS.no_batch)["reach"][0]["value"] is None


def map_of(text: str) -> dict[tuple[str, str], str]:
    """Return each cell's letters, by batch and sequence."""
    out: dict[tuple[str, str], str] = {}
    heads: list[str] = []
    for line in text.splitlines():
        if re.fullmatch(r" *batch( +\d+[kMG]?)+", line):
            heads = line.split()[1:]
        elif heads and re.fullmatch(r" *\d+[kMG]?( +\S+)+", line):
            batch, *cells = line.split()
            out.update({(batch, head): cell for head, cell in zip(heads, cells, strict=True)})
    return out


def test_the_map_shows_each_runs_verdict_and_share() -> None:
    cells = map_of(render("table", PLANS.batch, False, Screen(80)))
    told = dump(PLANS.batch)["map"]
    assert len(cells) == len(told["batch"]) * len(told["sequence"])
    usable = find_gpu("3060").usable
    for i, batch in enumerate(told["batch"]):
        for j, tokens in enumerate(told["sequence"]):
            answer = estimate(run(method="lora", gpu="3060", batch={"micro": batch, "sequence": tokens}))
            assert told["verdict"][i][j] == answer.verdict.answer
            assert told["allocated"][i][j] == answer.bytes.allocated
            share = min(3, 4 * answer.bytes.allocated // usable)
            sign = {"fits": "░▒▓█"[share], "tight": "?", "does not fit": "x"}[str(answer.verdict.answer)]
            assert set(cells[short(batch), short(tokens)]) == {sign}
    assert {cell[0] for cell in cells.values()} >= {"x", "░"}
    assert map_of(render("table", PLANS.batch, False, Screen(40))) == cells


def test_the_map_in_ascii_still_tells_verdicts_apart(plan_: Command) -> None:
    from memplan.report.text import ASCII

    text = render("table", PLANS.batch, False, Screen(80)).translate(ASCII)
    assert text.isascii()
    assert len({cell[0] for cell in map_of(text).values()} | {"?"}) >= 4


def test_in_colour_the_map_is_shaded_and_its_verdicts_are_colours() -> None:
    text = render("table", PLANS.batch, False, Screen(80, True, True))
    assert "\x1b[32m ░░░░" in text
    assert "\x1b[31m ████" in text
    assert "x" not in "".join(map_of(re.sub(r"\x1b\[[\d;]*m", "", text)).values())


# --- the ladder ---


def test_each_rung_applies_to_the_result_of_the_previous_ones() -> None:
    told = dump(PLANS.ladder)
    answers = [told["plain"], *told["rungs"]]
    for below, above in zip(answers, told["rungs"], strict=False):
        assert above["saves"] == below["bytes"]["allocated"] - above["bytes"]["allocated"]
        assert estimate(RunSpec.model_validate(above["run"])).bytes.as_dict() == above["bytes"]
    text = render("table", PLANS.ladder, False, Screen(120))
    for rung in PLANS.ladder.ladder.rungs:
        used, time = rung.after.bytes.used, rung.time
        assert time is not None
        line = next(line for line in text.splitlines() if line.startswith(f"{rung.lever.title} "))
        assert f" {signed(freed(rung))} " in line
        assert f" {used / GIB:.1f}  {rung.after.verdict.answer} " in line
        assert f"{time.low:.2f}" in line
        bar = re.search(r"[█│][█│ ]*", line)
        assert bar is not None
        assert bar[0].count("│") == 1
    first = next(n for n, (answer, _) in enumerate(PLANS.ladder.every) if answer.verdict.answer == "fits")
    assert f"The first to fit is {PLANS.ladder.ladder.rungs[first - 1].lever.title}: " in words_of(text)


def test_without_a_card_the_ladder_has_no_verdicts() -> None:
    text = render("table", PLANS.no_card, False, Screen(120))
    assert not any(answer in text for answer in ANSWERS)
    assert [told["time"] for told in dump(PLANS.no_card)["rungs"]] == [None] * len(PLANS.no_card.ladder.rungs)


# --- what to buy ---


def test_an_offers_cost_is_its_time_at_its_price() -> None:
    told = dump(PLANS.rented)["offers"]
    assert len(told) == 6
    usual = [offer["million"]["usd"]["usual"] for offer in told]
    assert usual == sorted(usual)
    for offer in told:
        price, step, million, whole = (offer[name] for name in ("price", "step", "million", "whole"))
        for end in ("low", "high"):
            seconds = step["seconds"][end] * 10**6 / step["tokens"]
            assert million["seconds"][end] == pytest.approx(seconds)
            assert million["usd"][end] == pytest.approx(seconds / 3600 * price[end])
            assert whole["usd"][end] == pytest.approx(1000 * million["usd"][end])
        assert price["date"] == max(p.date for p in find_gpu(offer["gpu"]).prices)
        assert offer["bytes"]["used"] + offer["verdict"]["headroom"] == find_gpu(offer["gpu"]).usable


def test_offers_state_the_basis_of_their_times_and_prices() -> None:
    text = words_of(render("table", PLANS.rented, False, Screen(120)))
    paces = [offer.pace for offer in PLANS.rented.offers.offers]
    low = min(pace.products.low for pace in paces if pace)
    high = max(pace.products.high for pace in paces if pace)
    assert f"at assumed rates: {low} to {high} % of the card's peak for matrix products" in text
    assert "Prices are list prices of" in text
    assert "1,000,000,000 tokens" in text
    explained = words_of(render("table", PLANS.rented, True, Screen(120)))
    assert all(pace.bandwidth.source in explained for pace in paces if pace)


def test_without_an_offer_the_nearest_is_shown_with_the_missing_memory() -> None:
    text = words_of(render("table", PLANS.nothing_offered, False, Screen()))
    missing = PLANS.there.bytes.used - find_gpu("3090").usable
    assert text.startswith("Nothing holds it among ")
    assert "The nearest is rtx-3090: does not fit, " in text
    assert f"{missing / GIB:.1f} too much." in text
    assert dump(PLANS.nothing_offered)["nearest"]["lacks"] == missing


# --- advice ---


def test_advice_shows_four_steps_and_every_way_that_fits() -> None:
    text = words_of(render("table", PLANS.advice, False, Screen(120)))
    for n, step in enumerate(PLANS.advice.advice.steps, 1):
        assert f"{n}. {step.title}: {step.answer} {step.question} {step.answer.capitalize()}: {step.reason}." in text
        for choice in step.options:
            assert not choice.fits or choice.title in text
    told = dump(PLANS.advice)
    assert [len(step["choices"]) for step in told["steps"]] == [len(step.options) for step in PLANS.advice.advice.steps]
    assert told["best"] == told["steps"][0]["choices"][0]


def test_advice_names_only_the_options_it_needs() -> None:
    for step in PLANS.advice.advice.steps:
        for choice in step.options:
            fewer = simplest_run(PLANS.answer, choice.answer)
            assert estimate(fewer).run == choice.answer.run
            assert fewer.kernels == SMALL.kernels


# --- the command ---


class Ran(NamedTuple):
    code: int
    out: str
    err: str


class Command(NamedTuple):
    typed: Callable[..., Ran]

    def __call__(self, *args: str) -> Ran:
        return self.typed("plan", *args)


@pytest.fixture(name="plan_")
def _plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("COLUMNS", "80")

    def ran(*args: str) -> Ran:
        with pytest.raises(SystemExit) as left:
            COMMAND.main(list(args))
        code = left.value.code
        assert isinstance(code, int)
        return Ran(code, *capsys.readouterr())

    return Command(ran)


CARD = ("pythia-70m", "--method", "lora", "--gpu", "3060")
MODES: dict[tuple[str, ...], str] = {
    ("pythia-70m", "--gpu", "3060", "--batch-size", "9"): "ways",
    CARD: "free",
    (*CARD, "--max", "batch"): "batch",
    (*CARD, "--max", "rank"): "rank",
    (*CARD, "--max", "batch", "--headroom", "11.5GiB"): "no_batch",
    ("pythia-70m", "--gpu", "3060", "--batch-size", "4", "--ladder"): "ladder",
    (*CARD, "--buy", "--tokens", "1B", "--most", "6"): "rented",
    ("qwen2-72b", "--have", "3090"): "nothing_offered",
    (*CARD, "--advice"): "advice",
}


@pytest.mark.parametrize(("typed", "expected"), MODES.items(), ids=map(" ".join, MODES))
def test_the_command_answers_as_the_library_does(plan_: Command, typed: tuple[str, ...], expected: str) -> None:
    ran, known = plan_(*typed, "--json"), getattr(PLANS, expected)
    assert json.loads(ran.out) == json.loads(render("json", known, False, Screen()))
    assert (ran.code, ran.err) == (0 if known.found else 1, "")


def test_a_pipe_has_no_colour_and_the_screens_width(plan_: Command) -> None:
    assert plan_("pythia-70m", "--gpu", "3060", "--batch-size", "9").out == render(
        "table", PLANS.ways, False, Screen(80)
    )


@ALL
def test_tight_may_count_as_fitting_but_not_strictly(plan_: Command) -> None:
    beyond = PLANS.free.reach[1].beyond
    assert beyond is not None
    assert beyond.verdict.answer == "tight"
    tight = (*CARD, "--seq-len", str(beyond.run.batch.sequence))
    ran = plan_(*tight, "--tight")
    assert "Nothing has to change (tight counts as fitting)" in words_of(ran.out)
    assert ran.code == 0
    assert plan_(*tight, "--tight", "--strict").code == 1


def gpus_of(ran: Ran) -> list[tuple[str, int]]:
    return [(offer["gpu"], offer["count"]) for offer in json.loads(ran.out)["offers"]]


def test_offers_match_the_requested_cards(plan_: Command) -> None:
    small = ("pythia-70m", "--method", "lora", "--json")
    known = {gpu.name: gpu for gpu in all_gpus()}
    for typed, wanted in {
        ("--vendor", "amd"): lambda gpu: gpu.vendor == "AMD",
        ("--market", "datacenter"): lambda gpu: gpu.market == "data centre",
        ("--market", "laptop", "--market", "Data Centre"): lambda gpu: gpu.market in ("laptop", "data centre"),
        ("--min-memory", "20GiB", "--max-memory", "30GiB"): lambda gpu: 20 * GIB <= gpu.usable <= 30 * GIB,
        ("--max-price", "0.2"): lambda gpu: min(p.usd_per_hour for p in gpu.prices if p.date) <= 0.2,
        ("--have", "3090,2x4090"): lambda gpu: gpu.name in ("rtx-3090", "rtx-4090"),
        ("--most", "3", "--count", "1"): lambda gpu: True,
    }.items():
        found = gpus_of(plan_(*small, *typed))
        assert found, typed
        assert all(wanted(known[name]) for name, _ in found), typed
        assert "--most" not in typed or len(found) == 3


def test_a_price_limit_below_every_card_is_reported(plan_: Command) -> None:
    ran = plan_("pythia-70m", "--max-price", "0.0001")
    assert ran.code == 1
    assert "No such card has a dated price that low" in ran.out
    titles = plan_("pythia-70m", "--max-price", "0.0001", "--format", "csv").out
    assert titles.startswith("gpu,count,strategy,verdict,used,headroom,priced,usd_per_hour_low,")
    assert titles.count("\n") == 1


MISTAKES: dict[tuple[str, ...], str] = {
    (): "model: name one",
    ("qwen2-7c",): "model: unknown name 'qwen2-7c'; did you mean qwen2-7b",
    (*CARD, "--ladder", "--buy"): "ladder (--ladder): cannot be combined with --buy",
    (*CARD, "--max", "batch", "--advice"): "max (--max): cannot be combined with --advice",
    (*CARD, "--max", "batches"): "max (--max): unknown name 'batches'; did you mean batch",
    ("pythia-70m", "--gpu", "3060", "--max", "rank"): "max (--max): method.kind full has no rank; lora",
    ("pythia-70m", "--max", "batch"): "max (--max): needs a card; name one with --gpu",
    ("pythia-70m", "--advice"): "advice (--advice): needs a card",
    ("pythia-70m", "--ladder", "--headroom", "1GiB"): "headroom (--headroom): needs a card",
    ("pythia-70m", "--ladder", "--tight"): "tight (--tight): needs a card",
    (*CARD, "--headroom", "12GiB"): "headroom (--headroom): 12.00 GiB cannot be left free, GeForce RTX 3060 12GB has",
    (*CARD, "--headroom", "two"): "headroom (--headroom): 'two' is not a size; write 2GiB, 2048MiB, 2GB or bytes",
    (*CARD, "--headroom", "-1"): "headroom (--headroom): '-1' is not a size",
    (*CARD, "--tokens", "1e9"): "tokens (--tokens): only applies with --buy",
    (*CARD, "--each"): "each (--each): only applies with --buy or --nodes",
    (*CARD, "--global-batch", "8"): "global_batch (--global-batch): only applies with --nodes",
    (*CARD, "--emit", "megatron"): "emit (--emit): only applies with --nodes",
    (
        *CARD,
        "--nodes",
        "1",
        "--gpus",
        "2",
        "--emit",
        "megatrom",
    ): "emit (--emit): unknown name 'megatrom'; did you mean",
    (
        *CARD,
        "--nodes",
        "1",
        "--gpus",
        "2",
        "--emit",
        "torchrun",
        "--json",
    ): "emit (--emit): writes its own file format",
    (
        *CARD,
        "--nodes",
        "1",
        "--gpus",
        "2",
        "--emit",
        "accelerate",
        "--pp",
        "2",
    ): "parallelism.pp (--pp): accelerate has",
    (*CARD, "--nodes", "1", "--gpus", "2", "--emit", "deepspeed", "--fsdp", "fsdp2"): "parallelism.strategy (--fsdp): "
    "DeepSpeed has no fsdp2; it has zero0, zero1, zero2, zero3",
    (*CARD, "--ladder", "--method", "generate"): "ladder (--ladder): only applies to training, not to task generate",
    (
        *CARD,
        "--tokens",
        "1e9",
        "--buy",
        "--method",
        "generate",
    ): "tokens (--tokens): only applies to training, not to task",
    (*CARD, "--method", "forward"): "task (--method): for task forward, plan only has --max",
    (*CARD, "--nodes", "2"): "gpus: give the number of GPUs per node",
    (
        "pythia-70m",
        "--nodes",
        "2",
        "--gpus",
        "8",
    ): "nodes (--nodes): needs a card; name one with --gpu",
    (*CARD, "--nodes", "0", "--gpus", "8"): "nodes (--nodes): must be at least 1, not 0",
    (*CARD, "--nodes", "2", "--gpus", "4", "--tp", "0"): "tp: must be at least 1, not 0",
    (*CARD, "--nodes", "2", "--gpus", "4", "--zero", "4"): "parallelism.strategy (--zero): ZeRO has stages 0 to 3",
    (
        *CARD,
        "--nodes",
        "2",
        "--gpus",
        "4",
        "--tp",
        "3",
    ): "parallelism.tp (--tp): tp 3 does not divide 8 attention heads",
    (
        *CARD,
        "--nodes",
        "2",
        "--gpus",
        "4",
        "--tp",
        "4",
        "--cp",
        "4",
    ): "parallelism.world (--gpus): 2 x 4 = 8 GPUs are not a multiple of tp 4 x pp 1 x cp 4 = 16",
    (*CARD, "--ladder", "--max-price", "1"): "max_price (--max-price): only applies with --buy",
    ("pythia-70m", "--tokens", "1e9999"): "tokens (--tokens): '1e9999' is not a number; write 1e9, 100M, 2B",
    ("pythia-70m", "--tokens", "0"): "tokens (--tokens): must be at least 1, not 0",
    ("pythia-70m", "--most", "0"): "most (--most): must be at least 1, not 0",
    ("pythia-70m", "--count", "0"): "count (--count): must be at least 1",
    ("pythia-70m", "--max-price", "nan"): "max_price (--max-price): must be more than 0, not nan",
    ("pythia-70m", "--min-memory", "2GiB", "--max-memory", "1GiB"): "min_memory (--min-memory): 2.00 GiB is above",
    ("pythia-70m", "--vendor", "nvidea"): "vendor (--vendor): unknown name 'nvidea'; did you mean nvidia",
    ("pythia-70m", "--market", "gaming"): "market (--market): unknown name 'gaming'; did you mean",
    ("pythia-70m", "--have", "2x309"): "have (--have): unknown name '309'; did you mean rtx-3090",
    (
        "pythia-70m",
        "--have",
        "0x3090",
    ): "have (--have): '0x3090' is not a count and a card; write for example 2x3090,1xa100",
    ("pythia-70m", "--have", "3090", "--count", "2"): "count (--count): --count and --have exclude each other",
    ("pythia-70m", "--vendor", "apple", "--market", "laptop"): "buy: no catalogued card matches",
    (*CARD, "--gpu", "t4"): "gpu (--gpu): a plan is for one card",
    (
        *CARD,
        "--format",
        "csv",
    ): "format (--format): this plan cannot be csv; choose table, json, markdown, html or svg; csv",
    (*CARD, "--output", "a.csv"): "format: this plan cannot be csv",
    (*CARD, "--rank", "0"): "method.rank (--rank): must be at least 1",
    (*CARD, "--online"): "No such option: --online",
}


@pytest.mark.parametrize(("typed", "expected"), MISTAKES.items(), ids=[" ".join(typed)[:60] for typed in MISTAKES])
def test_a_mistake_is_one_line_that_names_the_option(plan_: Command, typed: tuple[str, ...], expected: str) -> None:
    ran = plan_(*typed)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran
    assert ran.err.startswith(f"memplan: {expected}"), ran.err


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("a.md", "**pythia-70m, batch 1"),
        ("a.csv", "rung,saves,"),
        ("a.json", "{"),
        ("a.txt", "pythia"),
        ("a.html", "<!DOCTYPE html>"),
        ("a.svg", "<svg "),
    ],
)
def test_a_file_is_written_in_the_format_its_name_says(plan_: Command, tmp_path: Path, name: str, start: str) -> None:
    assert plan_(*CARD, "--ladder", "--output", str(tmp_path / name)) == Ran(0, "", "")
    assert (tmp_path / name).read_text("utf-8").startswith(start)


def test_a_run_may_be_a_file(plan_: Command, tmp_path: Path) -> None:
    spec = tmp_path / "run.json"
    spec.write_text('{"model": "pythia-70m", "method": "lora", "gpu": "3060"}', "utf-8")
    assert json.loads(plan_("--spec", str(spec), "--max", "rank", "--json").out) == dump(PLANS.rank)


def test_the_exit_code_tells_if_nothing_fits(plan_: Command, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY), "utf-8")
    sparing = [word for name, value in SPARING.items() for word in (f"--{name}", value)]
    ran = plan_(
        str(tmp_path), "--seq-len", "128", "--optimizer", "sgd", "--gpu", "3060", *sparing, "--headroom", "11.5GiB"
    )
    assert (ran.code, ran.err) == (1, "")
    assert "runs tried fits (11.50 GiB free)" in words_of(ran.out)


def test_a_plan_needs_no_numpy_and_no_torch() -> None:
    code = (
        "import sys\nfrom memplan.cli.app import app\n"
        "sys.argv = ['memplan', 'plan', 'pythia-70m', '--method', 'lora', '--gpu', '3060', '--json']\n"
        "try:\n    app()\nexcept SystemExit as left:\n    code = left.code\n"
        "print(code, *({'numpy', 'torch'} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "0\n"


def test_the_manual_quotes_help(plan_: Command) -> None:
    manual = " ".join((Path(memplan.__file__).parents[1] / "docs" / "reference" / "cli.md").read_text("utf-8").split())
    text = plan_("--help").out
    sections = re.findall(r"^(?:Plan|What to buy|A cluster):\n(?:  .*\n)+", text, re.M)
    assert len(sections) == 3
    says = [" ".join(part.split()) for part in (*text.partition("Model:")[0].split("\n\n")[1:3], *sections)]
    assert [part for part in says if part not in manual] == []


def test_the_shell_completes_a_plans_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for words, expected in {"plan qwen2-7": "qwen2-7b", "schema p": "plan"}.items():
        monkeypatch.setenv("_MEMPLAN_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", f"memplan {words}")
        monkeypatch.setenv("COMP_CWORD", "2")
        with pytest.raises(SystemExit):
            COMMAND.main([])
        assert expected in capsys.readouterr().out.split()


# --- sizes ---


@settings(max_examples=examples(30), deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([("", 1), ("KiB", 2**10), ("MiB", MIB), ("GiB", GIB), ("GB", 10**9)]))
def test_a_size_is_its_number_times_its_unit(n: int, unit: tuple[str, int]) -> None:
    name, size = unit
    assert size_of(f"{n}{name}", "headroom") == size_of(f" {n:,} {name.lower()} ", "headroom") == n * size
    assert size_of(f"{n}.5{name}", "headroom") == (2 * n + 1) * size // 2


def test_an_amount_may_have_an_exponent_or_a_letter() -> None:
    assert [amount_of(text, "tokens") for text in ("1e9", "100M", "2b", "1.5k", "1_000")] == [
        *(10**9, 100 * 10**6, 2 * 10**9, 1500, 1000)
    ]


@pytest.mark.parametrize("text", ["", "GiB", "2 gigs", "-1", "1e-3", "1e999", "½", "nan", "0x10", "2GiB2", "١GiB"])
def test_invalid_sizes_are_refused(text: str) -> None:
    with pytest.raises(SpecError, match=r"^headroom: .* is not a size; write 2GiB"):
        size_of(text, "headroom")
