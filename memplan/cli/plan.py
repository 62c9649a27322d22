"""`memplan plan`: what makes a run fit, how far it goes, and what to buy for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.main import get_command

from memplan.cli.answering import answered, show
from memplan.cli.options import Grouped, complete_gpu, option
from memplan.cli.own_profile import own_profile
from memplan.cli.runs import format_of, left_out, runs_of

if TYPE_CHECKING:
    from memplan.estimate.answer import Estimate
    from memplan.estimate.calibration import Calibration
    from memplan.estimate.demand import Demand
    from memplan.planning.offers import Offers, Owned, Wanted
    from memplan.report.plans import Planned
    from memplan.spec.run import RunSpec

# Of `estimate` alone, or with a meaning of their own here.
_NONE = ("explain", "online", "revision", "via", "cache")
_OF_TRAINING = ("ladder", "advice", "nodes")
_MODES = ("max", "ladder", "buy", "advice", "nodes")
_SWITCHES = ("tight", "ladder", "buy", "advice", "each")
_OF_BUYING = ("tokens", "vendor", "market", "min_memory", "max_memory", "max_price", "have", "count")
_OF_NODES = ("network_gbps", "global_batch", "emit")
_OF_BOTH = ("most", "each")
_DIVIDING = ("gpus", "tp", "pp", "cp", "ep", "zero", "fsdp")  # with --nodes, what of the search is asked for
_AXES = ("batch", "sequence", "rank", "model")
_MARKETS = ("consumer", "workstation", "data centre", "laptop", "integrated")
PLAN, BUYING, CLUSTER = "Plan", "What to buy", "A cluster"


class PlanCommand(Grouped):
    """The run, and what is asked of it; what was typed is read off the context."""

    def invoke(self, ctx: Any) -> int:
        params: Mapping[str, Any] = ctx.params
        given = {
            name: value
            for name, value in params.items()
            if not left_out(name, value) and not (name in _SWITCHES and value is False)
        }
        return answered(lambda: _plan(given), given)


def command(estimate: Sequence[Any]) -> Any:
    """The command, with the options in `estimate` that say what a run is, and how the answer is shown."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command("plan", cls=PlanCommand)(plan)
    made: Any = get_command(app)
    [model, *others] = [param for param in estimate if param.name not in _NONE]
    made.params = [model, *made.params, *others]
    return made


def _words(*words: str) -> Any:
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]  # pyright: ignore


def plan(
    headroom: Annotated[str | None, option("Bytes to leave free, as in 2GiB or 2e9. Default 0.", of=PLAN)] = None,
    tight: Annotated[bool, option("What is tight counts as fitting. Default off.", "--tight", of=PLAN)] = False,
    max: Annotated[
        str | None,
        option(
            "How far it goes: the largest batch, sequence, rank or model that fits. Default the changes that make it "
            "fit.",
            of=PLAN,
            complete=_words(*_AXES),
        ),
    ] = None,
    ladder: Annotated[
        bool, option("From the plain run, what each change brings. Default off.", "--ladder", of=PLAN)
    ] = False,
    advice: Annotated[
        bool, option("Which method, step by step, with figures for each. Default off.", "--advice", of=PLAN)
    ] = False,
    buy: Annotated[
        bool,
        option("Cards that run it, cheapest first. Default where no --gpu is asked.", "--buy", of=PLAN),
    ] = False,
    explain: Annotated[
        bool,
        option("Sources, and lines to paste for every proposal. Default off.", "--explain", of=PLAN),
    ] = False,
    tokens: Annotated[
        str | None, option("Tokens of the whole run, as in 100M or 2e9: their time and cost too.", of=BUYING)
    ] = None,
    vendor: Annotated[
        list[str] | None, option("NVIDIA, AMD, Intel, Apple; repeat it for several. Default all.", of=BUYING)
    ] = None,
    market: Annotated[
        list[str] | None,
        option(
            "consumer, workstation, datacenter, laptop, integrated; repeat it for several. Default all.",
            of=BUYING,
            complete=_words("consumer", "workstation", "datacenter", "laptop", "integrated"),
        ),
    ] = None,
    min_memory: Annotated[
        str | None, option("Usable bytes of one card at least, as in 20GiB. Default 0.", of=BUYING)
    ] = None,
    max_memory: Annotated[str | None, option("Usable bytes of one card at most. Default no limit.", of=BUYING)] = None,
    max_price: Annotated[
        float | None, option("US dollars an hour at most, of all cards together. Default no limit.", of=BUYING)
    ] = None,
    have: Annotated[
        str | None,
        option("Only cards that are there, as in 2x3090,1xa100. Default any.", of=BUYING, complete=complete_gpu),
    ] = None,
    count: Annotated[
        list[int] | None, option("How many of a card; repeat it for several. Default 1 to 8, 16, 32, 64.", of=BUYING)
    ] = None,
    most: Annotated[
        int | None, option("Offers at most, or grids of a cluster. Default 20, of grids 5.", of=BUYING)
    ] = None,
    each: Annotated[
        bool,
        option(
            "Every count of a card, not only the smallest that runs it; every grid that fits a cluster. Default off.",
            "--each",
            of=BUYING,
        ),
    ] = False,
    nodes: Annotated[
        int | None,
        option(
            "How this many nodes, each with --gpus of --gpu, should divide the run; --tp, --pp, --cp, --ep, --zero and "
            "--fsdp hold what they say. Default none.",
            of=CLUSTER,
        ),
    ] = None,
    network_gbps: Annotated[
        float | None,
        option("Gb/s of network for each GPU, one way. Default as the vendor's own servers have it.", of=CLUSTER),
    ] = None,
    global_batch: Annotated[
        int | None,
        option("Sequences a step, all GPUs together. Default --batch-size x --grad-accum x all GPUs.", of=CLUSTER),
    ] = None,
    emit: Annotated[
        str | None,
        option(
            "accelerate, deepspeed, torchrun, torchtitan, megatron: print, instead of the plan, the file or command of "
            "the fastest grid that it can run. Default none.",
            of=CLUSTER,
            complete=_words("accelerate", "deepspeed", "torchrun", "torchtitan", "megatron"),
        ),
    ] = None,
) -> None:
    """What makes a run fit, and what each change saves and costs; how far it goes; what to buy for it.

    Exit codes: 0 the run fits, or something proposed does; 1 nothing does; 2 wrong input; 3 the model's facts are not
    here; 4 with --strict, something unsupported was left out.
    """


def _plan(given: Mapping[str, Any]) -> int:
    from memplan.core.errors import SpecError, UnsupportedModelError
    from memplan.probe.route import without_a_trace
    from memplan.report.plans import render
    from memplan.report.text import Screen, screen

    mode = _mode(given)
    divides = _DIVIDING if mode == "nodes" else ()
    runs = runs_of({name: value for name, value in given.items() if name not in divides})
    if len(runs) > 1:
        raise SpecError("gpu: a plan is for one card; --buy --have compares several", "gpu")
    run = runs[0]
    mode = mode or ("levers" if run.gpu else "buy")
    _check_task(run, mode, given)
    for names, modes in ((_OF_BUYING, ("buy",)), (_OF_NODES, ("nodes",)), (_OF_BOTH, ("buy", "nodes"))):
        for name in names:
            if name in given and mode not in modes:
                raise SpecError(f"{name}: is of {' and '.join(f'--{of}' for of in modes)} alone", name)
    format = _format(given, mode)
    demand = _demand(given, run, mode)
    try:
        planned = _planned(mode, run, demand, given)
    except UnsupportedModelError as error:
        raise without_a_trace(error, "a plan") from None
    if "emit" in given:
        return _emitted(planned, given)
    to = Screen() if "output" in given else screen()
    show(render(format, planned, "explain" in given, to), format, given.get("output"))
    return _exit_code(planned.found, "strict" in given)


def _check_task(run: RunSpec, mode: str, given: Mapping[str, Any]) -> None:
    """Raise SpecError where the mode, or one of its options, is of another task than the run's."""
    from memplan.core.errors import SpecError

    if run.task == "train":
        return
    if mode in _OF_TRAINING:
        raise SpecError(f"{mode}: is of training, not of task {run.task}", mode)
    if run.task == "forward" and mode != "max":
        raise SpecError("task: a plan of task forward has --max alone", "task")
    for name in ("tokens", "each"):
        if name in given:
            raise SpecError(f"{name}: is of training, not of task {run.task}", name)


def _mode(given: Mapping[str, Any]) -> str:
    """The one that is typed; empty where none is."""
    from memplan.core.errors import SpecError, UnknownNameError

    first, *others = [mode for mode in _MODES if mode in given] or [""]
    if others:
        raise SpecError(f"{first}: excludes --{others[0]}", first)
    if first == "max" and given["max"] not in _AXES:
        raise UnknownNameError("max", given["max"], _AXES)
    return first


def _format(given: Mapping[str, Any], mode: str) -> str:
    from memplan.core.errors import SpecError
    from memplan.report.plans import FORMATS, IN_ROWS

    format = format_of(given)
    there = (*FORMATS, "csv") if mode in IN_ROWS else FORMATS
    if format not in there:
        also = "" if mode in IN_ROWS else f", and csv with {', '.join(f'--{name}' for name in IN_ROWS)}"
        raise SpecError(f"format: {format!r} is not there for a plan; there are {', '.join(there)}{also}", "format")
    return format


def _demand(given: Mapping[str, Any], run: RunSpec, mode: str) -> Demand:
    """What counts as fitting. Raises SpecError where the mode or that asks for what the run cannot have."""
    from memplan.catalogue.hardware.gpus import find_gpu
    from memplan.catalogue.methods.methods import ADAPTERS
    from memplan.core.errors import SpecError
    from memplan.core.units import size_of
    from memplan.estimate.demand import Demand

    demand = Demand("tight" in given, size_of(given["headroom"], "headroom") if "headroom" in given else 0)
    if mode == "buy":
        return demand
    if run.gpu is None:
        if mode == "ladder" and demand == Demand():
            return demand
        asks = mode if mode != "ladder" else ("headroom" if demand.headroom else "tight")
        raise SpecError(f"{asks}: what fits depends on the card; name one with --gpu", asks)
    if given.get("max") == "rank" and run.method.kind not in ADAPTERS:
        raise SpecError(f"max: method.kind {run.method.kind} has no rank; {', '.join(ADAPTERS)} have", "max")
    demand.check(find_gpu(run.gpu))
    return demand


def _planned(mode: str, run: RunSpec, demand: Demand, given: Mapping[str, Any]) -> Planned:
    from memplan.estimate.estimate import estimate

    own = own_profile(run.gpu, given)
    if run.task == "generate" and mode in ("levers", "buy"):
        return _generating(mode, run, demand, given, own)
    if mode == "levers":
        return _levers(run, demand, own)
    if mode == "nodes":
        return _divided(run, demand, given, own)
    answer = estimate(run, own)
    match mode:
        case "max":
            from memplan.planning.reach import frontier, reach
            from memplan.report.plans.reach import Far

            found = reach(run, given["max"], demand, own)
            both = given["max"] in ("batch", "sequence") and found.answer is not None and run.task == "train"
            return Far(answer, demand, found, frontier(run, demand, own) if both else None)
        case "ladder":
            from memplan.planning.ladder import ladder
            from memplan.report.plans.ladder import Rungs

            return Rungs(answer, demand, ladder(run, own))
        case "advice":
            from memplan.planning.advice import advise
            from memplan.report.plans.advice import Advised

            return Advised(answer, demand, advise(run, demand, own))
        case _:
            return _bought(run, answer, demand, given)


def _generating(mode: str, run: RunSpec, demand: Demand, given: Mapping[str, Any], own: Calibration | None) -> Planned:
    from memplan.estimate.estimate import estimate
    from memplan.planning.inference import places, questions
    from memplan.report.plans.inference import Asked, Places

    if mode == "levers":
        return Asked(questions(run, demand, own))
    found = places(run, _wanted(given), _most_of(given), demand)
    return Places(estimate(run.model_copy(update={"gpu": None})), demand, found)


def _most_of(given: Mapping[str, Any]) -> int:
    from memplan.core.errors import SpecError

    most: int = given.get("most", 20)
    if most < 1:
        raise SpecError(f"most: must be at least 1, not {most}", "most")
    return most


def _levers(run: RunSpec, demand: Demand, own: Calibration | None) -> Planned:
    from memplan.catalogue.methods.methods import ADAPTERS
    from memplan.planning.plan import plan
    from memplan.planning.reach import reach
    from memplan.report.plans.levers import Levers

    found = plan(run, headroom=demand.headroom, tight=demand.tight, calibration=own)
    axes = ("batch", "sequence", *(("rank",) if run.method.kind in ADAPTERS else ()))
    return Levers(found, tuple(reach(run, axis, demand, own) for axis in axes))


def _bought(run: RunSpec, answer: Estimate, demand: Demand, given: Mapping[str, Any]) -> Planned:
    from memplan.core.errors import SpecError
    from memplan.core.units import amount_of
    from memplan.planning.offers import offers
    from memplan.report.plans.offers import Bought

    most = given.get("most", 20)
    tokens = amount_of(given["tokens"], "tokens") if "tokens" in given else None
    for name, n in (("most", most), ("tokens", tokens)):
        if n is not None and n < 1:
            raise SpecError(f"{name}: must be at least 1, not {n}", name)
    found = offers(run, _wanted(given), tokens=tokens, most=most, each="each" in given, demand=demand)
    return Bought(answer, demand, found, tokens, _nearest(run, found))


def _divided(run: RunSpec, demand: Demand, given: Mapping[str, Any], own: Calibration | None) -> Planned:
    from memplan.catalogue.hardware.gpus import find_gpu
    from memplan.cli.request import strategy_of
    from memplan.core.errors import SpecError
    from memplan.planning.cluster import DEGREES, Pinned, cluster_of, search
    from memplan.report.plans.cluster import Divided

    if "emit" in given and {"format", "json"} & set(given):
        raise SpecError("emit: writes a file of its own form; leave --format and --json out", "emit")
    if "gpus" not in given:
        raise SpecError("gpus: say how many each node has", "gpus")
    for name in (*DEGREES, "global_batch", "most"):
        if given.get(name, 1) < 1:
            raise SpecError(f"{name}: must be at least 1, not {given[name]}", name)
    assert run.gpu is not None  # `_demand` has asked for one
    cluster = cluster_of(find_gpu(run.gpu), given["nodes"], given["gpus"], given.get("network_gbps"))
    degrees = {name: given.get(name) for name in DEGREES}
    strategy = strategy_of(given, cluster.world) if {"zero", "fsdp"} & set(given) else None
    strategies = None if strategy is None else (strategy,)
    most = None if "each" in given else given.get("most", 5)
    if "emit" in given:
        from memplan.frameworks.emit import find

        able = find(given["emit"])
        able.check(degrees, strategy)
        strategies = strategies or able.strategies
        degrees |= {name: degrees.get(name) or 1 for name in able.undivided if name in degrees}
        most = 1
    pinned = Pinned(**degrees, strategies=strategies, sequences=given.get("global_batch"))
    return Divided(demand, search(run, cluster, pinned, most=most, demand=demand, calibration=own))


def _emitted(planned: Planned, given: Mapping[str, Any]) -> int:
    """The fastest grid's file, alone; where nothing fits there is none."""
    from memplan.core.errors import SpecError
    from memplan.frameworks.emit import emit
    from memplan.frameworks.whole_file import Nodes
    from memplan.report.plans.cluster import Divided

    assert isinstance(planned, Divided)
    best = planned.cluster.best
    if best is None:
        error = SpecError(f"emit: nothing that {given['emit']} can run fits; without --emit the plan says more", "emit")
        error.exit_code = 1
        raise error
    show(emit(given["emit"], best.answer.run, Nodes(given["nodes"], given["gpus"])), "emit", given.get("output"))
    return _exit_code(planned.found, "strict" in given)


def _nearest(run: RunSpec, found: Offers) -> Estimate | None:
    """The run on what comes nearest, where nothing is offered."""
    from memplan.estimate.estimate import estimate
    from memplan.planning.levers import spread, with_fields

    miss = found.nearest
    if miss is None:
        return None
    alone = with_fields(run.model_copy(update={"gpu": miss.gpu.name}), spread(run, 1, "none"))
    return estimate(with_fields(alone, spread(alone, miss.count, miss.strategy)) if miss.count > 1 else alone)


def _wanted(given: Mapping[str, Any]) -> Wanted:
    from memplan.catalogue.hardware.gpus import all_gpus
    from memplan.core.errors import SpecError
    from memplan.core.units import gib, size_of
    from memplan.planning.offers import ANY, COUNTS

    if "have" in given and "count" in given:
        raise SpecError("count: --count and --have exclude each other", "count")
    counts = tuple(dict.fromkeys(given.get("count", COUNTS)))
    for n in counts:
        if not 1 <= n <= _MOST:
            raise SpecError(f"count: must be at least 1 and at most {_MOST:,}, not {n:,}", "count")
    least, most = (size_of(given[name], name) if name in given else None for name in ("min_memory", "max_memory"))
    if least is not None and most is not None and least > most:
        raise SpecError(f"min_memory: {gib(least)} is above --max-memory {gib(most)}", "min_memory")
    price: float | None = given.get("max_price")
    if price is not None and not (isfinite(price) and price > 0):
        raise SpecError(f"max_price: must be more than 0, not {price:g}", "max_price")
    vendors = tuple(dict.fromkeys(gpu.vendor for gpu in all_gpus()))
    return ANY._replace(
        vendors=tuple(_named("vendor", word, vendors) for word in given.get("vendor", ())),
        markets=tuple(_named("market", word, _MARKETS) for word in given.get("market", ())),
        memory=(least, most),
        usd_per_hour=price,
        owned=_owned(given["have"]) if "have" in given else (),
        counts=tuple(sorted(counts)),
    )


_MOST = 4096  # of one card


def _owned(text: str) -> tuple[Owned, ...]:
    from memplan.core.errors import UnknownNameError
    from memplan.planning.offers import owned

    try:
        return owned(text)
    except UnknownNameError as error:
        raise UnknownNameError("have", error.value, error.nearest, ranked=True) from None


def _named(field: str, word: str, choices: Sequence[str]) -> str:
    """The choice that is meant, whatever its case and spaces; `datacenter` too."""
    from memplan.core.errors import UnknownNameError

    meant = "".join(word.lower().split()).replace("-", "").replace("datacenter", "datacentre")
    for choice in choices:
        if meant == choice.lower().replace(" ", ""):
            return choice
    raise UnknownNameError(field, word, [choice.lower() for choice in choices])


def _exit_code(found: Sequence[Estimate], strict: bool) -> int:
    """0 where something does what is asked; with `strict` it must fit, and have nothing left out."""
    if strict and any(answer.unsupported for answer in found):
        return 4
    good = [answer for answer in found if not (strict and answer.verdict.answer == "tight")]
    return 0 if good else 1
