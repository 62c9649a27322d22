"""How a cluster should divide a run: the grids that fit, fastest first, what they send, and on what that rests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from memplan.catalogue.hardware.links import SHOWN, Link
from memplan.core.units import gib
from memplan.estimate.answer import Estimate
from memplan.estimate.demand import Demand
from memplan.frameworks.command import own_lines
from memplan.planning.cluster import Found, Placed
from memplan.planning.traffic import Grid, Sent, groups
from memplan.report import wording as words
from memplan.report.blocks import Block, Heading, Pairs, Table, Text
from memplan.report.plans.wording import duration, figures, state, wish
from memplan.report.table import COLOURS
from memplan.report.text import Column

DEGREES = ("dp", "tp", "pp", "cp", "ep")
_NAMES = {
    "dp": "the replicas",
    "tp": "tensor parallelism",
    "pp": "the pipeline",
    "cp": "context parallelism",
    "ep": "expert parallelism",
}


class Divided(NamedTuple):
    """What a search of a cluster found."""

    demand: Demand
    cluster: Found

    @property
    def found(self) -> list[Estimate]:
        return [placed.answer for placed in self.cluster.placed]


def named(grid: Grid) -> str:
    """A grid in a few words.

    >>> named(Grid(128, 4, 1, 1, 1, "fsdp2", 1, 4))
    'dp 128 x tp 4, fsdp2'
    """
    degrees = [f"{name} {getattr(grid, name):,}" for name in ("dp", "tp", "pp", "cp") if getattr(grid, name) > 1]
    strategy = f", {grid.strategy}" if grid.strategy != "none" else ""
    experts = f", experts over {grid.ep:,}" if grid.ep > 1 else ""
    return f"{' x '.join(degrees) or 'one GPU'}{strategy}{experts}"


def blocks(divided: Divided, explain: bool = False) -> Iterator[Block]:
    found, asked = divided.cluster, wish(divided.demand)
    where = _cluster(found)
    looked = f"{found.grids:,} grid{'s' if found.grids > 1 else ''} of degrees and strategies on {where}"
    best = found.best
    if best is None:
        yield Text(f"Nothing fits{f' ({asked})' if asked else ''}: {looked}.", "bold red")
        if found.nearest is not None:
            yield Text(f"The nearest is {named(found.nearest.grid)}: {state(found.nearest.answer)}.")
    else:
        step = f", a step of {_sequences(found)} in {duration(best.step.seconds)}" if _timed(best) else ""
        yield Text(
            f"Fastest of {looked}{f' ({asked})' if asked else ''}: {named(best.grid)}; {state(best.answer)}{step}.",
            "bold green",
        )
        yield _table(found)
        yield Text(
            f"GiB are of tensors on the rank that holds most. Every grid takes {_sequences(found)} a step: passes are "
            "counted so. Ranks are numbered with tp first, then cp, dp and pp: tp stays inside a node while it is no "
            "larger than one."
        )
    yield Text(bring(found))
    yield Text(_counts(found))
    for refused in found.refused[: None if explain else 4]:
        yield Text(f"Not answered, {refused.grids:,}: {refused.reason}")
    if best is not None:
        yield Text(_basis(found))
        own = own_lines(found.asked.run, best.answer.run)
        yield Pairs([("options", " ".join(own.lines)), *([("", own.note)] if own.note else [])])
    if explain:
        yield Heading("Sources")
        yield Pairs(list(_sources(found)))


def _cluster(found: Found) -> str:
    c = found.cluster
    return f"{c.nodes:,} nodes of {c.each:,} × {c.gpu.title}" if c.nodes > 1 else f"{c.each:,} × {c.gpu.title}"


def _sequences(found: Found) -> str:
    run = found.asked.run
    return f"{found.sequences:,} sequence{'s' if found.sequences > 1 else ''} of {run.batch.sequence:,} tokens"


def _timed(placed: Placed) -> bool:
    return placed.step.computing.usual > 0


def bring(found: Found) -> str:
    """What so many cards bring, and what they do not, in a sentence."""
    world, each, held = found.cluster.world, gib(found.cluster.gpu.usable), found.together
    if world == 1:
        return f"One GPU of {each} holds all of it: {gib(held.alone)} of tensors."
    several = "Two" if world == 2 else f"{world:,}"
    parts = [f"{several} GPUs of {each} are not one of {gib(world * found.cluster.gpu.usable)}"]
    if held.ddp is not None:
        parts.append(f"under ddp each holds everything, {gib(held.ddp)} of tensors at the peak")
    if held.fsdp2 is not None:
        parts.append(
            f"under fsdp2 each holds {gib(held.fsdp2)}: its part of weights, gradients and states, the layer that is "
            "gathered, and all activations of its own sequences"
        )
    first, *others = parts
    alone = f"; one alone would hold {gib(held.alone)}"
    return f"{first}: {'; '.join(others)}{alone}." if others else f"{first}{alone}."


def _counts(found: Found) -> str:
    refused = sum(r.grids for r in found.refused)
    kinds = (
        (len(found.placed), "fits and is shown", "fit and are shown"),
        (
            found.slower,
            "is slower, and was not looked at (--each does)",
            "are slower, and were not looked at (--each does)",
        ),
        (found.missed, "does not fit", "do not fit"),
        (found.too_large, *(f"{verb} not hold even weights, gradients and states" for verb in ("does", "do"))),
        (refused, *["memplan does not answer"] * 2),
    )
    counted = ", ".join(f"{n:,} {one if n == 1 else several}" for n, one, several in kinds if n)
    return f"Of {found.grids:,} grid{'s' if found.grids > 1 else ''} {counted}."


def _table(found: Found) -> Table:
    columns = [
        Column("grid", wraps=True),
        Column("GiB", right=True),
        Column("a step", right=True),
        Column("GB sent", right=True, optional=True),
        Column("between nodes", optional=True),
        Column("passes", right=True, optional=True),
    ]
    rows = [tuple(_cells(found, placed)) for placed in found.placed]
    styles = [f"|{COLOURS[str(placed.answer.verdict.answer)]}||||" for placed in found.placed]
    return Table(columns, rows, styles)


def _cells(found: Found, placed: Placed) -> Iterator[str]:
    yield named(placed.grid)
    yield words.tenths(placed.answer.bytes.allocated)
    yield duration(placed.step.seconds) if _timed(placed) else ""
    yield f"{placed.step.bytes / 1e9:,.1f}"
    yield ", ".join(crossing(found, placed.grid)) or "nothing"
    yield f"{placed.grid.accumulation:,}"


def crossing(found: Found, grid: Grid) -> list[str]:
    """The degrees whose groups do not lie in one node."""
    return [name for name, among in groups(found.cluster, grid).items() if among.ranks > 1 and among.crosses]


def _basis(found: Found) -> str:
    near, far = found.cluster.inside, found.cluster.network
    links = [_rate(near)] if found.cluster.nodes == 1 else [_rate(near), _rate(far)]
    rate = "" if any(map(_timed, found.placed)) else " The catalogue has no rate for the card: times are what is sent."
    return (
        f"Ranked by the usual time: what one GPU would compute, divided evenly, and the bytes that rings send over "
        f"{' and '.join(links)}.{rate} How much of that hides behind computing is assumed."
    )


def _rate(link: Link) -> str:
    low, high = (link.bytes * share / 1e11 for share in (link.share.low, link.share.high))
    return f"{link.name} at {low:,.0f} to {high:,.0f} GB/s of {link.bytes / 1e9:,.0f} each way ({link.basis})"


def _sources(found: Found) -> Iterator[tuple[str, str]]:
    for link in (found.cluster.inside, found.cluster.network):
        yield link.name, f"{link.bytes / 1e9:,.1f} GB/s one way; {link.basis}: {link.source}"
        yield "", f"{link.share.low} to {link.share.high} ({link.share.what}); {link.share.basis}: {link.share.source}"
        yield "", f"{link.hop.low} to {link.hop.high} ({link.hop.what}); {link.hop.basis}: {link.hop.source}"
    for kind, row in SHOWN.items():
        yield _NAMES[kind], f"{row.low} to {row.high} ({row.what}); {row.basis}: {row.source}"


# --- JSON and CSV ------------------------------------------------------------------------------------------


def dump(divided: Divided) -> dict[str, Any]:
    found = divided.cluster
    c = found.cluster
    best = found.best or found.nearest
    return {
        "cluster": {
            "gpu": c.gpu.name,
            "nodes": c.nodes,
            "gpus": c.each,
            "world": c.world,
            "inside": _link(c.inside),
            "network": _link(c.network),
        },
        "sequences": found.sequences,
        "grids": [_placed(found, placed) for placed in found.placed],
        "best": None if found.best is None or best is None else _proposed(found, best),
        "nearest": None if found.nearest is None or best is None else _proposed(found, best),
        "counts": {
            "grids": found.grids,
            "fit": len(found.placed),
            "slower": found.slower,
            "missed": found.missed,
            "too_large": found.too_large,
            "refused": sum(r.grids for r in found.refused),
        },
        "refused": [refused._asdict() for refused in found.refused],
        "together": {**found.together._asdict(), "text": bring(found)},
    }


def _link(link: Link) -> dict[str, Any]:
    share = {"low": link.share.low, "usual": link.share.usual, "high": link.share.high}
    return {
        "name": link.name,
        "bytes_per_second": link.bytes,
        "basis": link.basis,
        "source": link.source,
        "share": share,
        "share_basis": link.share.basis,
        "share_source": link.share.source,
    }


def _grid(found: Found, placed: Placed) -> dict[str, Any]:
    grid = placed.grid
    return {
        **{name: getattr(grid, name) for name in DEGREES},
        "strategy": grid.strategy,
        "micro": grid.micro,
        "accumulation": grid.accumulation,
        "between_nodes": crossing(found, grid),
        "step": {
            "seconds": placed.step.seconds._asdict(),
            "computing": placed.step.computing._asdict(),
            "bubble": placed.step.bubble._asdict(),
            "sent": [_sent(sent) for sent in placed.step.sent],
        },
    }


def _sent(sent: Sent) -> dict[str, Any]:
    return {
        "kind": sent.kind,
        "bytes": sent.bytes,
        "link": sent.link,
        "between_nodes": sent.crosses,
        "seconds": sent.seconds._asdict(),
        "shown": sent.shown._asdict(),
    }


def _placed(found: Found, placed: Placed) -> dict[str, Any]:
    return {
        **_grid(found, placed),
        "allocated": placed.answer.bytes.allocated,
        "verdict": placed.answer.verdict.answer,
    }


def _proposed(found: Found, placed: Placed) -> dict[str, Any]:
    own = own_lines(found.asked.run, placed.answer.run)
    return {
        **_grid(found, placed),
        "options": " ".join(own.lines),
        "note": own.note,
        **figures(placed.answer),
    }


def rows(divided: Divided) -> tuple[list[str], list[dict[str, object]]]:
    """For CSV: titles, and a row a grid; where none fits, what comes nearest."""
    found = divided.cluster
    shown = found.placed or ((found.nearest,) if found.nearest is not None else ())
    titles = [*DEGREES, "strategy", "micro", "accumulation", "verdict", "allocated", "sent"]
    titles += [f"step_seconds_{end}" for end in ("low", "usual", "high")]
    return titles, [_row(placed) for placed in shown]


def _row(placed: Placed) -> dict[str, object]:
    grid, seconds = placed.grid, placed.step.seconds
    timed = {f"step_seconds_{end}": s for end, s in seconds._asdict().items()} if _timed(placed) else {}
    return {
        **{name: getattr(grid, name) for name in DEGREES},
        "strategy": grid.strategy,
        "micro": grid.micro,
        "accumulation": grid.accumulation,
        "verdict": placed.answer.verdict.answer,
        "allocated": placed.answer.bytes.allocated,
        "sent": placed.step.bytes,
        **timed,
    }
