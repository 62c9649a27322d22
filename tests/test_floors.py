"""The floors of the package: a file imports only from lower ones, and answering needs nothing heavy and no network."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import memplan

PACKAGE = Path(memplan.__file__).parent

# Lowest first. The catalogue and the engine are two wings of one floor: neither imports the other.
FLOORS = (
    {"errors", "units", "folders", "sizes", "cached_property"},
    {"spec", "gpus", "gpu_table", "config_classes", "families", "objectives", "models", "layers", "cards", "degrees"}
    | {"calibration", "headers", "gguf_configs", "hub"},
    {"ir"},
    {"catalogue", "engine"},
    {
        *("communicators", "graph", "ranks", "dividing", "fetching", "megatron", "zero", "unsharded", "program"),
        *("stages", "placing", "run_axes", "segments", "usage", "host"),
        *("refusals", "resolve", "batches", "kernels", "notes", "recipes", "prequantized", "checkpoint", "new_card"),
        *(
            "answer",
            "estimator",
            "ledger",
            "roofline",
            "speed",
            "stored",
            "gguf",
            "schemes",
            "running",
            "tensors",
            "inference",
            "passes",
            "replays",
            "generation",
            "caching",
            "assisted",
        ),
        *("serving", "also", "saving"),
    },
    {"sweep", "comparison", "planning"},
    {"frameworks"},
    {"report", "cli", "probe", "via"},
    {"__main__"},
)
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "numpy", "huggingface_hub")
# What a dense model needs nothing of.
OTHERS = ("memplan.families.vision", "memplan.families.ssm", "memplan.catalogue.vision", "memplan.hub", "memplan.sweep")


def imported(path: Path) -> set[str]:
    """The rooms of memplan that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "memplan":
            parts = node.module.split(".")
            found.update([parts[1]] if len(parts) > 1 else [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            found.update(a.name.split(".")[1] for a in node.names if a.name.startswith("memplan."))
    return found - {"__version__"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.name != "__init__.py" or p.parent != PACKAGE]


def test_every_file_has_a_floor() -> None:
    assert {room_of(p) for p in FILES} == set(FLOOR)


def test_a_file_imports_only_from_lower_floors_or_its_own_room() -> None:
    wrong = []
    for path in FILES:
        room = room_of(path)
        for other in imported(path):
            same_floor = FLOOR[other] == FLOOR[room] and {room, other} != {"catalogue", "engine"}
            if not (other == room or FLOOR[other] < FLOOR[room] or same_floor):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {other}")
    assert wrong == []


def test_the_engine_knows_no_model_and_no_method() -> None:
    words = ("llama", "lora", "adam", "qwen", "gpt")
    text = "".join(p.read_text("utf-8").lower() for p in (PACKAGE / "engine").glob("*.py"))
    assert [word for word in words if word in text] == []


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_memplan_imports_nothing_but_the_standard_library() -> None:
    loaded = "import sys, memplan; print(*(m for m in sys.modules if '.' not in m))"
    assert {"pydantic", "rich", "typer", "yaml", *HEAVY}.isdisjoint(fresh(loaded).split())


def test_answering_for_a_bundled_model_needs_no_network_and_nothing_heavy() -> None:
    code = f"""
import socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("network")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import memplan
answer = memplan.estimate(memplan.RunSpec(model="qwen2-7b", method="qlora", gpu="3090"))
answer.model_dump_json()
print(answer.verdict.answer, *(m for m in {HEAVY!r} + ("rich", "typer", "yaml", *{OTHERS!r}) if m in sys.modules))
"""
    assert fresh(code) == "fits"


def test_importing_the_library_needs_pydantic_and_the_standard_library_only() -> None:
    code = "import sys; from memplan import RunSpec, estimate; print(*sys.modules)"
    assert {"rich", "typer", "yaml", *HEAVY}.isdisjoint(fresh(code).split())
