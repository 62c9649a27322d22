"""CSV reports: a row per GPU, or with `explain` a row per line of the ledger. Bytes are integers."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from io import StringIO

from memplan.core.records import NamedTuple
from memplan.estimate.answer import Estimate, Line
from memplan.report.wording import CATEGORIES, PhaseRow, model, notes, peak_phase, phase_rows


def render(answers: Sequence[Estimate], explain: bool = False, ranks: bool = False) -> str:
    """Return the answers as CSV; `ranks` gives a row per pipeline stage if the ranks differ."""
    rows: list[dict[str, object]] = []
    for answer in answers:
        rows += _ledger(answer) if explain else _ranks(answer) if ranks and answer.ranks else [facts(answer)]
    return written(rows)


class CsvRows(NamedTuple):
    """Rows by column title; `titles` are those of the first row if empty. Values may be left out."""

    rows: Sequence[Mapping[str, object]]
    titles: Sequence[str] = ()


def written(rows: Sequence[Mapping[str, object]], titles: Sequence[str] = ()) -> str:
    """Return the rows as CSV; the titles are those of the first row if none are given."""
    out = StringIO()
    writer = csv.DictWriter(out, titles or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({title: _as_text(value) for title, value in row.items()} for row in rows)
    return out.getvalue()


def _as_text(value: object) -> object:
    """Return a cell that no spreadsheet takes for a formula: text that begins like one, as a path may, gets a quote.

    An option, such as --offload, is left as it is typed. Source: owasp.org/www-community/attacks/CSV_Injection.
    """
    is_formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if is_formula and not _OPTION.match(str(value)) else value


_OPTION = re.compile(r"--[a-z][a-z-]*( |$)")


def facts(answer: Estimate) -> dict[str, object]:
    """Return one answer as a flat row."""
    run, phase = answer.run, peak_phase(answer)
    return {
        "model": model(answer),
        "task": run.task,
        "objective": run.objective or "causal_lm",
        "method": run.method.kind,
        "gpu": run.gpu or "",
        "verdict": answer.verdict.answer or "",
        "used": answer.bytes.used,
        "usable": answer.gpu.usable if answer.gpu else "",
        "headroom": "" if answer.verdict.headroom is None else answer.verdict.headroom,
        "band_low": answer.band.low,
        "band_high": answer.band.high,
        "allocated": answer.bytes.allocated,
        "reserved": answer.bytes.reserved,
        **{kind: answer.categories[kind] for kind in CATEGORIES},
        "host_bytes": answer.host_bytes,
        "peak_phase": phase.phase,
        "peak_step": phase.step or "",
        "peak_where": phase.where,
        **{f"{row.phase}_{step}": peak for row in phase_rows(answer) for step, peak in _steps(row)},
        "parameters": answer.parameters.total,
        "trainable": answer.parameters.trainable,
        "batch": run.batch.micro,
        "sequence": run.batch.sequence,
        "accumulation": run.batch.accumulation,
        "weights": run.precision.weights,
        "compute": run.precision.compute,
        "optimizer": run.optimizer.name,
        "checkpointing": run.kernels.checkpointing,
        "attention": run.kernels.attention,
        "loss": run.kernels.loss,
        "profile": run.profile,
        "via": answer.via,
        "notes": "; ".join(notes([answer])),
    }


def _ranks(answer: Estimate) -> list[dict[str, object]]:
    """Return a flat row per rank that differs."""
    return [
        {
            "model": model(answer),
            "gpu": answer.run.gpu or "",
            "stage": rank.stage,
            "layers": rank.layers,
            "parameters": rank.parameters,
            "in_flight": rank.in_flight,
            "verdict": rank.verdict.answer or "",
            **rank.bytes.as_dict(),
            "headroom": "" if rank.verdict.headroom is None else rank.verdict.headroom,
            "peak_phase": rank.peak.phase,
            "peak_where": rank.peak.where,
        }
        for rank in answer.ranks
    ]


def _steps(row: PhaseRow) -> list[tuple[str, int]]:
    """Return a phase's peaks in the first step and in later ones; loading has only one."""
    return [("peak", row.first)] if row.phase == "load" else [("step_1", row.first), ("later", row.later)]


def _ledger(answer: Estimate) -> list[dict[str, object]]:
    start: dict[str, object] = {"model": model(answer), "gpu": answer.run.gpu or ""}
    return [
        {**start, **line._asdict(), "dims": "x".join(map(str, line.dims))} for line in answer.ledger or [_EMPTY_LINE]
    ]


_EMPTY_LINE = Line("", "", "", "", (), "", 0, 0, "", "")  # gives an empty ledger its column titles
