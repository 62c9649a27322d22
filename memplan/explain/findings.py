"""The parts of an explanation: what was found, how sure it is, and what it rests on."""

from __future__ import annotations

import json
from typing import Any

from memplan.core.records import NamedTuple
from memplan.estimate.answer import Estimate
from memplan.explain.frames import Position, position
from memplan.explain.memory import Owner
from memplan.explain.message import Amount, Log, Message
from memplan.explain.tensors import Candidate
from memplan.planning.plan import Plan

SURE, LIKELY, POSSIBLE = "sure", "likely", "possible"

ASKED, HELD, WHOSE, EXPECTED, CHANGE = (
    "What asked",
    "What stood there",
    "Whose memory",
    "Was it to be expected",
    "What to change",
)

QUESTIONS = (ASKED, HELD, WHOSE, EXPECTED, CHANGE)


class MemoryFinding(NamedTuple):
    """One answer.

    question   one of `QUESTIONS`
    text       the answer
    certainty  sure, likely or possible
    why        what it rests on
    """

    question: str
    text: str
    certainty: str
    why: str


class MemoryRow(NamedTuple):
    """The bytes of a row of memory at the failure: measured by the log, and predicted by the run; None if unknown."""

    what: str
    measured: int | None
    predicted: int | None


class Explanation:
    """Why a run ran out of memory.

    log             what was read
    message         the message that is explained
    position        where the traceback ends
    candidates      the tensors that the request may be, the most likely first, each with its certainty
    findings        the answers, by question
    rows            memory at the failure, measured and predicted
    contradictions  what the run says and the log contradicts
    notes           what else is to know
    answer          the estimate of the run on the log's card; None without a run
    plan            what would make it fit; None without a run, or if it fits
    """

    def __init__(self, log: Log, message: Message) -> None:
        self.log, self.message = log, message
        self.position: Position = position(message.frames)
        self.candidates: list[tuple[Candidate, str]] = []
        self.findings: list[MemoryFinding] = []
        self.rows: list[MemoryRow] = []
        self.contradictions: list[str] = []
        self.notes: list[str] = []
        self.answer: Estimate | None = None
        self.plan: Plan | None = None
        self.owners: tuple[Owner, ...] = ()

    def of(self, question: str) -> list[MemoryFinding]:
        return [finding for finding in self.findings if finding.question == question]

    def find(self, question: str, text: str, certainty: str, why: str) -> None:
        self.findings.append(MemoryFinding(question, text, certainty, why))

    def as_dict(self) -> dict[str, Any]:
        """Return the explanation as JSON has it."""
        message = self.message
        frame = self.position.frame
        return {
            "message": {
                "library": message.form.library,
                "cause": message.form.cause,
                "line": message.line,
                "ranks": list(message.ranks),
                "times": message.times,
                "source": message.form.source,
                "values": {name: _plain(value) for name, value in message.values.items()},
                "processes": [{"pid": p.pid, "in_use": _plain(p.in_use)} for p in message.processes],
            },
            "position": {
                "phase": self.position.phase,
                "operation": self.position.words,
                "frame": None if frame is None else frame._asdict(),
            },
            "candidates": [
                {
                    "what": candidate.tensor.what,
                    "where": candidate.tensor.where,
                    "role": candidate.tensor.role,
                    "also": list(candidate.names),
                    "shape": list(candidate.dims),
                    "dtype": candidate.tensor.dtype,
                    "bytes": candidate.bytes,
                    "sequence": candidate.sequence or None,
                    "certainty": certainty,
                }
                for candidate, certainty in self.candidates
            ],
            "findings": [finding._asdict() for finding in self.findings],
            "memory": [row._asdict() for row in self.rows],
            "contradictions": self.contradictions,
            "notes": self.notes,
            "verdict": None if self.answer is None else dict(self.answer.verdict.as_dict()),
        }

    def as_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.as_dict(), indent=indent, ensure_ascii=False)


def _plain(value: object) -> object:
    return value._asdict() if isinstance(value, Amount) else value
