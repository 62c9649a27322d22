"""SARIF 2.1.0, which code scanning shows: one rule per status."""

from __future__ import annotations

import json
from urllib.parse import quote

from memplan.gate.rows import Check
from memplan.report.gate import wording as words
from memplan.report.gate.findings import Finding, findings

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_RULES = {
    "over": "over-budget",
    "wrong": "mistake",
    "moved": "facts-moved",
    "unknown": "cannot-say",
    "near": "near-budget",
    "note": "note",
}
_LEVELS = {**dict.fromkeys(("over", "wrong", "moved"), "error"), "near": "warning", "unknown": "note", "note": "note"}


def render(check: Check) -> str:
    rules = [{"id": f"memplan/{_RULES[key]}", "shortDescription": {"text": words.TITLES[key]}} for key in _RULES]
    driver = {
        "name": "memplan",
        "version": check.version,
        "informationUri": "https://github.com/memplan/memplan",
        "rules": rules,
    }
    run = {"tool": {"driver": driver}, "results": [_result(finding) for finding in findings(check)]}
    return json.dumps({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1, ensure_ascii=False) + "\n"


def _result(finding: Finding) -> dict[str, object]:
    file = {"uri": quote(finding.file or "memplan.toml")}
    place = {"artifactLocation": file, "region": {"startLine": finding.line or 1}}
    return {
        "ruleId": f"memplan/{_RULES[finding.status]}",
        "ruleIndex": list(_RULES).index(finding.status),
        "level": _LEVELS[finding.status],
        "message": {"text": finding.text},
        "locations": [{"physicalLocation": place}],
    }
