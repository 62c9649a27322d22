"""`memplan plan`: what makes a run fit, what its limits are, and what to buy for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

from memplan.cli.commands import Subcommand, Switch, own, without
from memplan.cli.estimate import EMIT_OPTIONS, ESTIMATE_OPTIONS, SYSTEMS, emitted
from memplan.cli.outcome import show, warn
from memplan.cli.own_profile import own_profile
from memplan.cli.run_files import explained, headline, run_file
from memplan.cli.runs import check_count, format_of, runs_of, screen_of, stamp_of
from memplan.core.errors import SpecError, UnknownNameError, UnsupportedModelError
from memplan.core.records import NamedTuple
from memplan.models.peft_methods import has_rank
from memplan.spec.options import MODEL, STRATEGIES

if TYPE_CHECKING:
    from memplan.estimate.answer import Estimate
    from memplan.estimate.demand import Demand
    from memplan.planning.file_levers import FileLevers
    from memplan.planning.offers import CardFilter, OwnedCards
    from memplan.report.plans import Planned
    from memplan.report.plans.planned import PlanRequest
    from memplan.spec.run import RunSpec

_MODES = ("max", "ladder", "buy", "advice", "nodes")
_OF_BUYING = ("to", "tokens", "vendor", "market", "min_memory", "max_memory", "max_price", "have", "count")
_OF_NODES = ("network_gbps", "global_batch", "emit")
_OF_BOTH = ("most", "each")
_DIVIDING = ("gpus", "tp", "pp", "cp", "ep", *STRATEGIES)  # with --nodes these fix part of the search
_AXES = ("batch", "sequence", "rank", "completion", "generations", "model")
_MARKETS = ("consumer", "workstation", "data centre", "laptop", "integrated")
PLAN_OPTIONS = {
    "Plan": {
        "headroom": own("Bytes to leave free, as in 2GiB or 2e9. Default 0."),
        "tight": own("Count a tight run as fitting. Default off.", Switch),
        "max": own(
            "Find the largest batch, sequence, rank, completion, generations or model that fits. Default the changes "
            "that make it fit.",
            choices=_AXES,
        ),
        "ladder": own("Apply changes one by one to a plain run, with what each saves. Default off.", Switch),
        "advice": own("Choose a method step by step, with figures for each. Default off.", Switch),
        "buy": own("List cards that hold the run, cheapest first. Default if no --gpu is given.", Switch),
        "write": own(
            "Write a copy of the run's file with the patch, next to it, as in run.patched.yaml. Default off.", Switch
        ),
        "explain": own("Show sources, and lines to paste for every proposal. Default off.", Switch),
    },
    "What to buy": {
        "tokens": own("Training tokens, as in 100M or 2e9: adds their time and cost. Default none."),
        "vendor": own("NVIDIA, AMD, Intel, Apple; repeat it for several. Default all.", list[str]),
        "market": own(
            "consumer, workstation, datacenter, laptop, integrated; repeat it for several. Default all.",
            list[str],
            choices=("consumer", "workstation", "datacenter", "laptop", "integrated"),
        ),
        "min_memory": own("Least usable bytes of one card, as in 20GiB. Default 0."),
        "max_memory": own("Most usable bytes of one card. Default no limit."),
        "max_price": own("Most US dollars per hour for all cards together. Default no limit.", float),
        "have": own("Only these cards, which you have: 2x3090,1xa100. Default any."),
        "count": own(
            "Number of cards; repeat it for several. Default those of one machine: up to 4 to own, up to 8 to rent, "
            "and 16, 32 or 64 if no fewer hold the run.",
            list[int],
        ),
        "to": own(
            "own (by list price, with watts and slots) or rent (by the price of a million tokens). Default rent; own "
            "for memplan buy.",
            choices=("own", "rent"),
        ),
        "most": own("Most offers, or grids of a cluster, to list. Default 20 offers, 5 grids.", int),
        "each": own(
            "List every count of a card, not only the smallest that fits; every grid that fits. Default off.",
            Switch,
        ),
    },
    "A cluster": {
        "nodes": own(
            "Find how to divide the run over this many nodes, each with --gpus of --gpu; --tp, --pp, --cp, --ep, "
            "--zero and --fsdp fix part of the search. Default none.",
            int,
        ),
        "network_gbps": own("Network Gb/s per GPU, one way. Default that of the vendor's own servers.", float),
        "global_batch": own(
            "Sequences per step, all GPUs together. Default --batch-size x --grad-accum x all GPUs.", int
        ),
        "emit": own(
            "Print, instead of the plan, the config file or command of the fastest grid for accelerate, deepspeed, "
            "torchrun, torchtitan or megatron; or what a scheduler takes for the first run that fits "
            "(memplan MODEL --help lists them). Default none.",
            choices=("accelerate", "deepspeed", "torchrun", "torchtitan", "megatron", *SYSTEMS),
        ),
    },
}


class _Mode(NamedTuple):
    """A mode of a plan as a command of its own.

    given    what it sets of the options of `plan`
    options  its options of "Plan"
    """

    help: str
    given: Mapping[str, Any]
    options: tuple[str, ...] = ("headroom", "tight", "explain")
    headings: tuple[str, ...] = ()


_MODE_COMMANDS = {
    "fit": _Mode(
        "Find what makes a run fit its card, with what each change saves and costs.",
        {},
        ("headroom", "tight", "write", "explain"),
    ),
    "max": _Mode("Find the largest batch, sequence, rank or model that fits a card.", {"max": "sequence"}),
    "buy": _Mode(
        "List cards to own or to rent that hold a run.",
        {"buy": True, "to": "own"},
        ("headroom", "tight", "explain"),
        ("What to buy",),
    ),
    "advise": _Mode("Choose a method step by step, with figures for each.", {"advice": True}),
}


def command(name: str) -> Subcommand:
    others = without(ESTIMATE_OPTIONS, "model", "details", "explain", "online", "revision", "via", "cache", "emit")
    model = {"Model": {"model": MODEL}}
    if name not in _MODE_COMMANDS:
        return Subcommand(name, plan, {**model, **PLAN_OPTIONS, **others})
    mode = _MODE_COMMANDS[name]
    options = {row: option for row, option in PLAN_OPTIONS["Plan"].items() if row in mode.options}
    if name == "max":
        options = {"of": PLAN_OPTIONS["Plan"]["max"]._replace(help=_OF), **options}

    def work(given: dict[str, Any]) -> int:
        axis = {"max": given.pop("of")} if "of" in given else {}
        return plan({**mode.given, **given, **axis})

    groups = {name.capitalize(): options, **{heading: PLAN_OPTIONS[heading] for heading in mode.headings}}
    return Subcommand(name, work, {**model, **groups, **others}, f"{mode.help}\n\n{_EXIT_CODES}")


_OF = f"{', '.join(_AXES[:-1])} or {_AXES[-1]}. Default sequence."
_EXIT_CODES = (
    "Exit codes: 0 the run or a proposal fits; 1 nothing does; 2 wrong input; 3 the model's config is not available; 4 "
    "with --strict, something unsupported was left out."
)


def plan(given: Mapping[str, Any]) -> int:
    """Find what makes a run fit, with what each change saves and costs; what its limits are; what to buy for it.

    Exit codes: 0 the run or a proposal fits; 1 nothing does; 2 wrong input; 3 the model's config is not available; 4
    with --strict, something unsupported was left out.
    """
    from memplan.probe.route import without_a_trace
    from memplan.report.plans import render
    from memplan.report.plans.planned import MODES

    mode = _mode(given)
    divides = _DIVIDING if mode == "nodes" else ()
    file = run_file(given)
    runs = runs_of({name: value for name, value in given.items() if name not in divides}, file)
    if len(runs) > 1:
        raise SpecError("gpu: a plan is for one card; --buy --have compares several", "gpu")
    run = runs[0]
    mode = mode or ("levers" if run.gpu else "buy")
    if mode not in MODES.get(run.task, (mode,)):
        if "levers" in MODES[run.task] or mode in ("ladder", "advice", "nodes"):
            raise SpecError(f"{mode}: only applies to training, not to task {run.task}", mode)
        raise SpecError("task: for task forward, plan only has --max", "task")
    for name in ("tokens", "each") if run.task != "train" else ():
        if name in given:
            raise SpecError(f"{name}: only applies to training, not to task {run.task}", name)
    for names, modes in ((_OF_BUYING, ("buy",)), (_OF_NODES, ("nodes",)), (_OF_BOTH, ("buy", "nodes"))):
        for name in names:
            if name in given and mode not in modes and (name != "emit" or given["emit"] not in SYSTEMS):
                raise SpecError(f"{name}: only applies with {' or '.join(f'--{other}' for other in modes)}", name)
    format = _format(given, mode)
    demand = _demand(given, run, mode)
    levers = None
    if mode == "levers" and file is not None:
        from memplan.cli.file_patches import file_levers

        levers = file_levers(given, file, run)
    if "write" in given and levers is None:
        raise SpecError("write: only applies to a plan for the file of a run on a card", "write")
    scheduled = given.get("emit") in SYSTEMS
    asked = {name: value for name, value in given.items() if name not in EMIT_OPTIONS} if scheduled else given
    try:
        planned = _planned(mode, run, demand, asked, levers)
    except UnsupportedModelError as error:
        raise without_a_trace(error, "a plan") from None
    if scheduled and planned.found:
        show(emitted(given, planned.found[:1]), "emit", given.get("output"))
        return _exit_code(planned.found, "strict" in given)
    if "emit" in given:
        return _emitted(planned, given)
    origins = file.origins_of(planned.answer.asked) if file is not None and not file.is_own else ()
    text = render(format, planned, "explain" in given, screen_of(given), stamp_of(given, format), origins)
    if "explain_run" in given and format == "table" and file is not None:
        text += "\n" + explained(planned.answer, file, is_wide="output" in given)
    if levers is not None and "write" in given:
        from memplan.cli.file_patches import write_copy

        warn(write_copy(getattr(planned, "patch", None)))
    show(headline(file, format, with_notes=True) + text, format, given.get("output"))
    left_out = 4 if "strict" in given and file is not None and file.unread else 0
    return left_out or _exit_code(planned.found, "strict" in given)


def _mode(given: Mapping[str, Any]) -> str:
    """Return the mode that was given; empty if none was."""
    first, *others = [mode for mode in _MODES if mode in given] or [""]
    if others:
        raise SpecError(f"{first}: cannot be combined with --{others[0]}", first)
    if first == "max" and given["max"] not in _AXES:
        raise UnknownNameError("max", given["max"], _AXES)
    return first


def _format(given: Mapping[str, Any], mode: str) -> str:
    from memplan.report.plans import FORMATS, IN_ROWS

    format = format_of(given)
    formats = (*FORMATS, "csv") if mode in IN_ROWS else FORMATS
    if format not in formats:
        also = "" if mode in IN_ROWS else f"; csv works with {', '.join(f'--{name}' for name in IN_ROWS)}"
        *others, last = formats
        raise SpecError(f"format: this plan cannot be {format}; choose {', '.join(others)} or {last}{also}", "format")
    return format


def _demand(given: Mapping[str, Any], run: RunSpec, mode: str) -> Demand:
    """Return what counts as fitting. Raises SpecError if the mode or the demand does not apply to the run."""
    from memplan.catalogue.hardware.gpus import find_gpu
    from memplan.catalogue.methods.methods import ADAPTERS
    from memplan.core.units import size_of
    from memplan.estimate.demand import Demand

    demand = Demand("tight" in given, size_of(given["headroom"], "headroom") if "headroom" in given else 0)
    if mode == "buy":
        return demand
    if run.gpu is None:
        if mode == "ladder" and demand == Demand():
            return demand
        field = mode if mode != "ladder" else ("headroom" if demand.headroom else "tight")
        raise SpecError(f"{field}: needs a card; name one with --gpu", field)
    ranked = [kind for kind in ADAPTERS if has_rank(kind)]
    if given.get("max") == "rank" and run.method.kind not in ranked:
        raise SpecError(f"max: method.kind {run.method.kind} has no rank; {', '.join(ranked)} do", "max")
    demand.check(find_gpu(run.gpu))
    return demand


def _planned(mode: str, run: RunSpec, demand: Demand, given: Mapping[str, Any], of_file: FileLevers | None) -> Planned:
    from memplan.report.plans.levers import Levers
    from memplan.report.plans.planned import PlanRequest, planned

    asked = PlanRequest(mode, run, demand, own_profile(run.gpu, given), given.get("max", "sequence"), of_file)
    if mode == "buy":
        asked = _of_buying(asked, given)
    if mode == "nodes":
        asked = _of_nodes(asked, given)
    found = planned(asked)
    if isinstance(found, Levers) and found.plan.is_partial:
        warn(f"stopped after {found.plan.tried:,} runs; these are the ways found so far")
    if of_file is not None:
        from memplan.planning.file_levers import file_patch, serving_patch
        from memplan.report.plans.inference import QuestionsReport

        if isinstance(found, Levers) and found.plan.proposals:
            return found._replace(patch=file_patch(found.plan, of_file, asked.calibration))
        if isinstance(found, QuestionsReport):
            return found._replace(patch=serving_patch(found.questions, of_file, asked.calibration))
    return found


def _of_buying(asked: PlanRequest, given: Mapping[str, Any]) -> PlanRequest:
    from memplan.core.units import amount_of

    most = given.get("most", 20)
    tokens = amount_of(given["tokens"], "tokens") if "tokens" in given else None
    check_count("most", most)
    check_count("tokens", tokens)
    return asked._replace(
        cards=_wanted(given), tokens=tokens, most=most, each="each" in given, to=given.get("to", "rent")
    )


def _of_nodes(asked: PlanRequest, given: Mapping[str, Any]) -> PlanRequest:
    from memplan.catalogue.hardware.gpus import find_gpu
    from memplan.planning.cluster import DEGREES, FixedDegrees, cluster_of
    from memplan.resolve.request import strategy_of

    if "emit" in given and {"format", "json"} & set(given):
        raise SpecError("emit: writes its own file format; leave out --format and --json", "emit")
    if "gpus" not in given:
        raise SpecError("gpus: give the number of GPUs per node", "gpus")
    for name in (*DEGREES, "global_batch", "most"):
        check_count(name, given.get(name))
    assert asked.run.gpu is not None  # checked by `_demand`
    cluster = cluster_of(find_gpu(asked.run.gpu), given["nodes"], given["gpus"], given.get("network_gbps"))
    degrees = {name: given.get(name) for name in DEGREES}
    strategy = strategy_of(given, cluster.world) if {*STRATEGIES} & set(given) else None
    strategies = None if strategy is None else (strategy,)
    most = None if "each" in given else given.get("most", 5)
    if "emit" in given:
        from memplan.frameworks.emit import find

        framework = find(given["emit"])
        framework.check(degrees, strategy)
        strategies = strategies or framework.strategies
        degrees |= {name: degrees.get(name) or 1 for name in framework.unsupported_degrees if name in degrees}
        most = 1
    pinned = FixedDegrees(**degrees, strategies=strategies, sequences=given.get("global_batch"))
    return asked._replace(cluster=cluster, pinned=pinned, most=most)


def _emitted(planned: Planned, given: Mapping[str, Any]) -> int:
    """Print only the fastest grid's file. Raises SpecError if nothing fits."""
    from memplan.frameworks.emit import emit
    from memplan.frameworks.whole_file import Nodes
    from memplan.report.plans.cluster import ClusterReport

    best = planned.cluster.best if isinstance(planned, ClusterReport) else None
    if best is None:
        error = SpecError(f"emit: nothing that {given['emit']} can run fits; leave out --emit to see why", "emit")
        error.exit_code = 1
        raise error
    show(emit(given["emit"], best.answer.run, Nodes(given["nodes"], given["gpus"])), "emit", given.get("output"))
    return _exit_code(planned.found, "strict" in given)


def _wanted(given: Mapping[str, Any]) -> CardFilter:
    from memplan.catalogue.hardware.gpus import all_gpus
    from memplan.core.units import gib, size_of
    from memplan.planning.offers import ANY, IN_ONE_MACHINE

    if "have" in given and "count" in given:
        raise SpecError("count: --count and --have exclude each other", "count")
    counts = tuple(dict.fromkeys(given.get("count", ())))
    for n in counts:
        if not 1 <= n <= _MAX_COUNT:
            raise SpecError(f"count: must be at least 1 and at most {_MAX_COUNT:,}, not {n:,}", "count")
    least, most = (size_of(given[name], name) if name in given else None for name in ("min_memory", "max_memory"))
    if least is not None and most is not None and least > most:
        raise SpecError(f"min_memory: {gib(least)} is above --max-memory {gib(most)}", "min_memory")
    price: float | None = given.get("max_price")
    if price is not None and not (isfinite(price) and price > 0):
        raise SpecError(f"max_price: must be more than 0, not {price:g}", "max_price")
    if given.get("to", "rent") not in IN_ONE_MACHINE:
        raise UnknownNameError("to", given["to"], IN_ONE_MACHINE)
    vendors = tuple(dict.fromkeys(gpu.vendor for gpu in all_gpus()))
    return ANY._replace(
        vendors=tuple(_named("vendor", word, vendors) for word in given.get("vendor", ())),
        markets=tuple(_named("market", word, _MARKETS) for word in given.get("market", ())),
        memory=(least, most),
        usd_per_hour=price,
        owned=_owned(given["have"]) if "have" in given else (),
        counts=tuple(sorted(counts)),
        to=given.get("to", "rent"),
    )


_MAX_COUNT = 4096  # cards of one type


def _owned(text: str) -> tuple[OwnedCards, ...]:
    from memplan.planning.offers import parse_owned_cards

    try:
        return parse_owned_cards(text)
    except UnknownNameError as error:
        raise UnknownNameError("have", error.value, error.suggestions, ranked=True) from None


def _named(field: str, word: str, choices: Sequence[str]) -> str:
    """Return the matching choice, ignoring case, spaces and hyphens, and accepting `datacenter`."""
    normalized = "".join(word.lower().split()).replace("-", "").replace("datacenter", "datacentre")
    for choice in choices:
        if normalized == choice.lower().replace(" ", ""):
            return choice
    raise UnknownNameError(field, word, [choice.lower() for choice in choices])


def _exit_code(found: Sequence[Estimate], strict: bool) -> int:
    """Return 0 if something meets the demand; with `strict` it must not be tight or have anything left out."""
    if strict and any(answer.unsupported for answer in found):
        return 4
    accepted = [answer for answer in found if not (strict and answer.verdict.answer == "tight")]
    return 0 if accepted else 1
