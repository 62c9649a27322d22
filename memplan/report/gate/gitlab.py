"""GitLab's code quality report.

Source: GitLab's documentation of code quality, "Code Quality report format".
"""

from __future__ import annotations

import hashlib
import json

from memplan.gate.rows import Check
from memplan.report.gate.findings import Finding, findings

_SEVERITIES = {
    "over": "critical",
    **dict.fromkeys(("wrong", "moved"), "major"),
    "near": "minor",
    **dict.fromkeys(("unknown", "note"), "info"),
}


def render(check: Check) -> str:
    out = [
        {
            "description": finding.text,
            "check_name": f"memplan/{finding.status}",
            "fingerprint": _fingerprint(finding),
            "severity": _SEVERITIES[finding.status],
            "location": {"path": finding.file or "memplan.toml", "lines": {"begin": finding.line or 1}},
        }
        for finding in findings(check)
    ]
    return json.dumps(out, indent=1, ensure_ascii=False) + "\n"


def _fingerprint(finding: Finding) -> str:
    """Return what tells a finding from others in any revision: not its line or its bytes."""
    return hashlib.sha256(f"{finding.status} {finding.file} {finding.gpu or finding.text}".encode()).hexdigest()
