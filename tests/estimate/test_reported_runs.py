"""Runs that people reported: each large error, and each run that died and is said to fit, has its cause."""

from __future__ import annotations

from benchmarks import golden
from benchmarks.golden import Report
from tests.cases import each


def test_every_report_is_there_once() -> None:
    names = [report.row["id"] for report in golden.reports()]
    assert len(names) == len(set(names))


@each(golden.reports, name=lambda report: report.row["id"])
def test_a_report_that_is_missed_has_its_cause(report: Report) -> None:
    if report.verdict:
        assert ("cause" in report.row) == report.is_missed
    else:
        assert report.row["reason"]
