"""Report of how to divide a run over a cluster: the grids that fit, fastest first, with traffic and rates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from memplan.catalogue.hardware.links import EXPOSED, Link
from memplan.core.records import NamedTuple
from memplan.core.units import gib
from memplan.estimate.answer import Estimate
from memplan.estimate.demand import Demand
from memplan.frameworks.command import option_lines
from memplan.planning.cluster import ClusterSearch, GridFit
from memplan.planning.step_time import Range
from memplan.planning.traffic import ParallelGrid, groups
from memplan.report import wording as words
from memplan.report.blocks import Block, Column, Heading, Pairs, Table, Text
from memplan.report.csv import CsvRows
from memplan.report.plans.changes import conditions, duration, figures, option_rows, picked, state

DEGREES = ("dp", "tp", "pp", "cp", "ep")
_NAMES = {
    "dp": "the replicas",
    "tp": "tensor parallelism",
    "pp": "the pipeline",
    "cp": "context parallelism",
    "ep": "expert parallelism",
}


class ClusterReport(NamedTuple):
    """The result of a cluster search."""

    demand: Demand
    cluster: ClusterSearch

    mode = "nodes"

    @property
    def answer(self) -> Estimate:
        return self.cluster.asked

    @property
    def found(self) -> list[Estimate]:
        return [placed.answer for placed in self.cluster.placed]

    @property
    def named(self) -> list[tuple[str, Estimate]]:
        """The runs that it shows, with what it calls them."""
        return [(grid_title(placed.grid), placed.answer) for placed in self.cluster.placed]

    def blocks(self, explain: bool = False) -> Iterator[Block]:
        found, condition = self.cluster, conditions(self.demand)
        grids = f"{found.grids:,} grid{'s' if found.grids > 1 else ''} of degrees and strategies on {_cluster(found)}"
        best = found.best
        if best is None:
            yield Text(f"Nothing fits{condition} among {grids}.", "bold red")
            if found.nearest is not None:
                yield Text(f"The nearest is {grid_title(found.nearest.grid)}: {state(found.nearest.answer)}.")
        else:
            step = f", a step of {_sequences(found)} in {duration(best.step.seconds)}" if _timed(best) else ""
            yield Text(
                f"Fastest of {grids}{condition}: {grid_title(best.grid)}; {state(best.answer)}{step}.", "bold green"
            )
            yield _table(found)
            yield Text(
                f"GiB are of tensors on the rank that holds most. Every grid processes {_sequences(found)} a step, in "
                "the number of passes shown. Ranks are numbered with tp first, then cp, dp and pp, so tp stays inside "
                "a node if it is no larger than one."
            )
        yield Text(compare_with_one_gpu(found))
        yield Text(_counts(found))
        for refused in found.refused[: None if explain else 4]:
            yield Text(f"Refused, {refused.grids:,}: {refused.reason}")
        if best is not None:
            yield Text(_basis(found))
            yield Pairs(option_rows(option_lines(found.asked.run, best.answer.run)))
        if explain:
            yield Heading("Sources")
            yield Pairs(list(_sources(found)))

    def dump(self) -> dict[str, Any]:
        found = self.cluster
        c = found.cluster
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
            "best": _proposed(found, found.best) if found.best else None,
            "nearest": _proposed(found, found.nearest) if found.nearest else None,
            "counts": {
                "grids": found.grids,
                "fit": len(found.placed),
                "slower": found.slower,
                "missed": found.missed,
                "too_large": found.too_large,
                "refused": sum(r.grids for r in found.refused),
            },
            "refused": [refused._asdict() for refused in found.refused],
            "together": {**found.together._asdict(), "text": compare_with_one_gpu(found)},
        }

    def rows(self) -> CsvRows:
        """Return the grids that fit, or the nearest miss if none does."""
        found = self.cluster
        shown = found.placed or ((found.nearest,) if found.nearest is not None else ())
        titles = [*_GRID, "verdict", "allocated", "sent", *(f"step_seconds_{end}" for end in Range._fields)]
        return CsvRows([_row(placed) for placed in shown], titles)


def grid_title(grid: ParallelGrid) -> str:
    """Return a short name of a grid.

    >>> grid_title(ParallelGrid(128, 4, 1, 1, 1, "fsdp2", 1, 4))
    'dp 128 x tp 4, fsdp2'
    """
    degrees = [f"{name} {getattr(grid, name):,}" for name in ("dp", "tp", "pp", "cp") if getattr(grid, name) > 1]
    strategy = f", {grid.strategy}" if grid.strategy != "none" else ""
    experts = f", experts over {grid.ep:,}" if grid.ep > 1 else ""
    return f"{' x '.join(degrees) or 'one GPU'}{strategy}{experts}"


def _cluster(found: ClusterSearch) -> str:
    c = found.cluster
    return f"{c.nodes:,} nodes of {c.each:,} × {c.gpu.title}" if c.nodes > 1 else f"{c.each:,} × {c.gpu.title}"


def _sequences(found: ClusterSearch) -> str:
    run = found.asked.run
    return f"{found.sequences:,} sequence{'s' if found.sequences > 1 else ''} of {run.batch.sequence:,} tokens"


def _timed(placed: GridFit) -> bool:
    return placed.step.computing.usual > 0


def compare_with_one_gpu(found: ClusterSearch) -> str:
    """Return a sentence that compares several GPUs with one, under ddp and fsdp2."""
    world, each, peaks = found.cluster.world, gib(found.cluster.gpu.usable), found.together
    if world == 1:
        return f"One GPU of {each} holds all of it: {gib(peaks.alone)} of tensors."
    several = "Two" if world == 2 else f"{world:,}"
    parts = [f"{several} GPUs of {each} are not one of {gib(world * found.cluster.gpu.usable)}"]
    if peaks.ddp is not None:
        parts.append(f"under ddp each holds everything, {gib(peaks.ddp)} of tensors at the peak")
    if peaks.fsdp2 is not None:
        parts.append(
            f"under fsdp2 each holds {gib(peaks.fsdp2)}: its shard of weights, gradients and states, the gathered "
            "layer, and all activations of its own sequences"
        )
    first, *others = parts
    alone = f"; one alone would hold {gib(peaks.alone)}"
    return f"{first}: {'; '.join(others)}{alone}." if others else f"{first}{alone}."


def _counts(found: ClusterSearch) -> str:
    refused = sum(r.grids for r in found.refused)
    kinds = (
        (len(found.placed), "fits and is shown", "fit and are shown"),
        (
            found.slower,
            "is slower and was not estimated (--each does)",
            "are slower and were not estimated (--each does)",
        ),
        (found.missed, "does not fit", "do not fit"),
        (found.too_large, *["cannot even hold weights, gradients and states"] * 2),
        (refused, "is refused", "are refused"),
    )
    counted = ", ".join(f"{n:,} {singular if n == 1 else plural}" for n, singular, plural in kinds if n)
    return f"Of {found.grids:,} grid{'s' if found.grids > 1 else ''} {counted}."


def _table(found: ClusterSearch) -> Table[GridFit]:
    columns: list[Column[GridFit]] = [
        Column("grid", lambda placed: grid_title(placed.grid), wraps=True),
        Column("GiB", _allocated, right=True, style=lambda placed: words.colour(placed.answer)),
        Column("step", lambda placed: duration(placed.step.seconds) if _timed(placed) else "", right=True),
        Column("GB sent", lambda placed: f"{placed.step.bytes / 1e9:,.1f}", right=True, optional=True),
        Column("between nodes", lambda p: ", ".join(crossing(found, p.grid)) or "nothing", optional=True),
        Column("passes", lambda placed: f"{placed.grid.accumulation:,}", right=True, optional=True),
    ]
    return Table(columns, found.placed)


def _allocated(placed: GridFit) -> str:
    return words.tenths(placed.answer.bytes.allocated)


def crossing(found: ClusterSearch, grid: ParallelGrid) -> list[str]:
    """Return the degrees whose groups span several nodes."""
    return [name for name, group in groups(found.cluster, grid).items() if group.ranks > 1 and group.crosses]


def _basis(found: ClusterSearch) -> str:
    near, far = found.cluster.inside, found.cluster.network
    links = [_rate(near)] if found.cluster.nodes == 1 else [_rate(near), _rate(far)]
    rate = (
        ""
        if any(map(_timed, found.placed))
        else " The catalogue has no rate for the card: times are communication only."
    )
    return (
        f"Ranked by the usual time: what one GPU would compute, divided evenly, and the bytes that rings send over "
        f"{' and '.join(links)}.{rate} How much of that hides behind computing is assumed."
    )


def _rate(link: Link) -> str:
    low, high = (link.bytes * share / 1e11 for share in (link.share.low, link.share.high))
    return f"{link.name} at {low:,.0f} to {high:,.0f} GB/s of {link.bytes / 1e9:,.0f} each way ({link.basis})"


def _sources(found: ClusterSearch) -> Iterator[tuple[str, str]]:
    for link in (found.cluster.inside, found.cluster.network):
        yield link.name, f"{link.bytes / 1e9:,.1f} GB/s one way; {link.basis}: {link.source}"
        yield "", f"{link.share.low} to {link.share.high} ({link.share.what}); {link.share.basis}: {link.share.source}"
        yield "", f"{link.hop.low} to {link.hop.high} ({link.hop.what}); {link.hop.basis}: {link.hop.source}"
    for kind, row in EXPOSED.items():
        yield _NAMES[kind], f"{row.low} to {row.high} ({row.what}); {row.basis}: {row.source}"


# --- JSON and CSV ------------------------------------------------------------------------------------------


_GRID = (*DEGREES, "strategy", "micro", "accumulation")


def _link(link: Link) -> dict[str, Any]:
    return {
        "name": link.name,
        "bytes_per_second": link.bytes,
        "basis": link.basis,
        "source": link.source,
        "share": picked(link.share, "low", "usual", "high"),
        "share_basis": link.share.basis,
        "share_source": link.share.source,
    }


def _grid(found: ClusterSearch, placed: GridFit) -> dict[str, Any]:
    return {
        **picked(placed.grid, *_GRID),
        "between_nodes": crossing(found, placed.grid),
        "step": {
            **picked(placed.step, "seconds", "computing", "bubble"),
            "sent": [
                {
                    **picked(sent, "kind", "bytes", "link"),
                    "between_nodes": sent.crosses,
                    **picked(sent, "seconds", "shown"),
                }
                for sent in placed.step.sent
            ],
        },
    }


def _placed(found: ClusterSearch, placed: GridFit) -> dict[str, Any]:
    return {
        **_grid(found, placed),
        "allocated": placed.answer.bytes.allocated,
        "verdict": placed.answer.verdict.answer,
    }


def _proposed(found: ClusterSearch, placed: GridFit) -> dict[str, Any]:
    own = option_lines(found.asked.run, placed.answer.run)
    return {**_grid(found, placed), "options": " ".join(own.lines), "note": own.note, **figures(placed.answer)}


def _row(placed: GridFit) -> dict[str, object]:
    seconds = placed.step.seconds._asdict() if _timed(placed) else {}
    return {
        **picked(placed.grid, *_GRID),
        "verdict": placed.answer.verdict.answer,
        "allocated": placed.answer.bytes.allocated,
        "sent": placed.step.bytes,
        **{f"step_seconds_{end}": value for end, value in seconds.items()},
    }
