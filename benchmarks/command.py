"""Time cold commands against a minimal one: CPU time as a ratio, and peak memory.

    python benchmarks/command.py [rounds]

`benchmarks/floor.py` takes the same options with the same libraries and prints one table. If FITCHECK names the
executable of fitcheck-llm, that answers the same question too, offline, from a config in its own cache. CPU time,
because other work on the machine changes it less than wall time.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from memplan.models.cards import load_card

HERE = Path(__file__).resolve().parent
QUESTION = ["qwen2-7b", "--method", "qlora", "--gpu", "3090"]
PLANS = (
    "plan llama-3.1-8b --gpu 4090",
    "plan qwen2-7b --method qlora --gpu 3090 --max sequence",
    "plan qwen2-7b --method qlora --gpu 3090 --max batch",
    "plan qwen2-7b --method lora --buy",
    "plan qwen2.5-32b --method generate --gpu h100",
)
IMPORT_FLOOR = "import pydantic\nclass Model(pydantic.BaseModel, frozen=True):\n    name: str = ''\n    size: int = 1\n"


def environment(folder: Path) -> dict[str, str]:
    """Return an environment without variables that affect start-up; compiled files are cached separately."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "COLUMNS")}
    return {**kept, "PYTHONPYCACHEPREFIX": str(folder / "compiled"), "PYTHONPATH": str(HERE.parent), "COLUMNS": "100"}


def fitcheck(folder: Path) -> tuple[list[str], dict[str, str]] | None:
    executable = os.environ.get("FITCHECK") or shutil.which("fitcheck")
    if executable is None:
        return None
    snapshot = folder / "hub" / "models--Qwen--Qwen2-7B" / "snapshots" / "0"
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("0", "utf-8")
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(dict(load_card("qwen2-7b").config)), "utf-8")
    more = {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    return [executable, "Qwen/Qwen2-7B", "--qlora", "--gpu", "3090"], more


def run(command: list[str], env: dict[str, str]) -> float:
    """Return the seconds of CPU time that a command takes, in user and system mode."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, check=False, env=env, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def peak_mib(command: list[str], env: dict[str, str]) -> int:
    """Return the peak resident memory of a command, measured in a process without other children."""
    code = (
        "import resource, subprocess, sys\n"
        f"subprocess.run({command!r}, stdout=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    per_mib = 2**20 if sys.platform == "darwin" else 1024
    return int(out) // per_mib


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as name:
        env = environment(Path(name))
        python = [sys.executable]
        memplan = [*python, "-m", "memplan"]
        cases: dict[str, tuple[list[str], dict[str, str], str]] = {
            "floor": ([*python, str(HERE / "floor.py"), *QUESTION], env, ""),
            "memplan, one card": ([*memplan, *QUESTION], env, "floor"),
            "memplan --json": ([*memplan, *QUESTION, "--json"], env, "floor"),
            "memplan, does not fit": ([*memplan, "qwen2-7b", "--gpu", "3090"], env, "floor"),
            "memplan, no card": ([*memplan, *QUESTION[:3]], env, "floor"),
            **{f"memplan {line}": ([*memplan, *line.split()], env, "floor") for line in PLANS},
            "import pydantic, one model": ([*python, "-c", IMPORT_FLOOR], env, ""),
            "import memplan": ([*python, "-c", "import memplan"], env, "import pydantic, one model"),
            "import memplan's RunSpec and estimate": (
                [*python, "-c", "from memplan import RunSpec, estimate"],
                env,
                "import pydantic, one model",
            ),
        }
        other = fitcheck(Path(name))
        if other is not None:
            cases["fitcheck-llm"] = (other[0], {**env, **other[1]}, "floor")
        times: dict[str, list[float]] = {case: [] for case in cases}
        for command, its_env, _ in cases.values():
            run(command, its_env)
        for _ in range(rounds):
            for case, (command, its_env, _) in cases.items():
                times[case].append(run(command, its_env))
        for case, (_, _, reference) in cases.items():
            median = statistics.median(times[case])
            ratio = f"{median / statistics.median(times[reference]):.2f} of {reference}" if reference else ""
            print(f"{case:40s} {median * 1000:7.1f} ms   {ratio}")
        print(f"peak memory of the command: {peak_mib([*memplan, *QUESTION], env)} MiB")


if __name__ == "__main__":
    main()
