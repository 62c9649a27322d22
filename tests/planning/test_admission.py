"""The guide's admission function works as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from memplan import find_gpu

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "scheduler.md"
QLORA = {"run": {"model": "qwen2-7b", "method": "qlora"}}


def admission() -> dict[str, Any]:
    block = re.search(r"```python\n(\"\"\"Admit.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
    assert block is not None
    names: dict[str, Any] = {}
    exec(block[1], names)
    assert block[1].count("\n") <= 42
    return names


def test_a_job_is_started_waits_or_is_rejected() -> None:
    admit = admission()["admit"]
    started = admit(QLORA, ["3090"])
    assert (started["do"], started["gpu"], started["where"]) == ("start", "rtx-3090", [("3090-0", (0,))])
    assert started["limit_bytes"] <= find_gpu("3090").usable
    assert admit({"run": {"model": "llama-3-70b"}}, ["8x h100"])["code"] == "too_large"
    assert admit({**QLORA, "gpus": [2]}, ["3090"])["do"] == "reject"
    wrong = admit({"run": {"model": "qwen2-7b", "methd": "qlora"}}, ["3090"])
    assert (wrong["do"], wrong["code"], wrong["field"]) == ("reject", "unknown_field", "run.methd")


def test_a_queue_is_admitted_together() -> None:
    decisions = admission()["admit_all"]([QLORA, QLORA, {"run": {"model": "nobody/nothing"}}], ["3090"])
    assert [decision for decision, _ in decisions] == ["start", "wait", "reject"]
