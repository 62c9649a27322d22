"""OpenMetrics text, which GitLab compares between branches and Prometheus reads.

Source: the OpenMetrics 1.0 specification, "Text format".
"""

from __future__ import annotations

from memplan.gate.rows import Check, CheckedRun

_GAUGES = {"peak": "Peak bytes of one GPU.", "limit": "Bytes over which the run fails."}


def render(check: Check) -> str:
    rows = [row for row in check.rows if row.limit]
    lines: list[str] = []
    for field, help in _GAUGES.items():
        name = f"memplan_{field}_bytes"
        lines += [f"# TYPE {name} gauge", f"# UNIT {name} bytes", f"# HELP {name} {help}"]
        lines += [f"{name}{_labels(row)} {getattr(row, field)}" for row in rows]
    return "\n".join([*lines, "# EOF"]) + "\n"


def _labels(row: CheckedRun) -> str:
    labels = {"run": row.run, "gpu": row.gpu, "gpus": str(row.gpus)}
    return "{" + ",".join(f'{name}="{_escaped(text)}"' for name, text in labels.items()) + "}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
