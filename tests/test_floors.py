"""Structure of the package: sub-packages, allowed imports, sizes of files and functions, late imports, and the few
modules that know families of models.
"""

from __future__ import annotations

import ast
import fnmatch
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import memplan
from memplan.models.configs import MODULES
from memplan.models.facts import Family
from memplan.models.family_facts import CheckpointFacts, GenerationFacts

PACKAGE = Path(memplan.__file__).parent
ROOT = PACKAGE.parent

# Lowest first. A sub-package ("room") imports from lower floors only, and not from rooms on its own floor.
FLOORS = (
    {"core"},
    {"engine", "models"},
    {"spec", "catalogue"},
    {"program", "frameworks"},
    {"resolve"},
    {"estimate"},
    {"planning", "probe", "gate"},
    {"explain"},
    {"report"},
    {"serve"},
    {"cli"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FACE = {"__init__.py", "__main__.py", "py.typed"}  # files next to the rooms
TOP_LEVEL = {
    *("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "pyproject.toml", "hatch_build.py"),
    *("action.yml", "gpus.toml", "profiles.toml", "templates"),
    *("benchmarks", "docs", "memplan", "model_cards", "tests", "web"),
}

LONGEST_FUNCTION, LONGEST_FILE = 100, 600
BUDGET = 124_268
# Rooms or modules that import other memplan modules inside functions, with the reason: what start-up does not import.
# Every such import counts as an import.
LATE = {
    "__init__": "a public name is imported when it is used",
    "cli": "a command imports only what it runs",
    "report": "a format imports only what it prints",
    "serve.server": "the libraries of the extra, and what needs them, are imported for a server",
    "probe": "torch is imported in the process of a trace, and a trace only if one is asked for",
    "catalogue": "a family's module is imported for a model of that family",
    "frameworks.reading.run_file": "a reader is imported for a file of its kind",
    "frameworks.reading.shell_commands": "a syntax tree is for a script that computes numbers",
    "planning": "a calibration is only a type, whose module imports pydantic",
    "estimate.colocated": "a calibration is only a type, whose module imports pydantic",
    "estimate.rollout": "an engine is imported for a run that has one",
    "models.cards": "the Hub is asked for an id without a card",
    "resolve.batches": "towers are of vision-language models",
    "resolve.decide": "a training run needs nothing of inference",
    "program.run": "an engine's budget is only a type, of runs that have one",
    "resolve.method": "settings of peft's adapters are read for a run that has some",
    "resolve.request": "settings of precision and adapters are read for a run that has some",
    "resolve.refusals.settings": "settings of peft's adapters are read for a run that has some",
    "resolve.serving": "an engine's module is imported for a run of that engine",
    "spec.run": "lengths are read for a run that has some",
    "spec.base": "errors are worded for a run that has some",
    "program.serving.engine_step": "an engine's module is imported for a run of that engine",
    "program.sharding.choice": "a strategy's module is imported for a run that uses it",
    "program.inference.steps": "assisted generation is imported for a run that uses it",
    "estimate.answer": "a calibration is read only for a machine that has one",
    "estimate.usage": "a calibration is read only for a machine that has one",
    "estimate.inference": "assisted generation is imported for a run that uses it",
    "estimate.estimate": "serving is imported for a run that has it",
    "estimate.serving": "a quantised checkpoint is read for a run that has one",
    "estimate.training": "side tasks are imported for a run that has them",
}

ROOMS = ("models", "catalogue.families")  # what may name families: their rows and their stacks

# Modules outside of the rooms with strings that are also names of families, and why. The list may only shrink.
ELSEWHERE = {
    "catalogue.inference.engine_step": "mamba is a token mixer",
    "catalogue.quantization.gguf": "architectures of GGUF files",
    "frameworks.reading.torchtitan": "torchtitan's modules",
    "frameworks.torchtitan": "torchtitan's modules",
    "probe.script": "what a trace gives a model that memplan's row does not have",
    "program.serving.llama_cpp": "mamba is a token mixer",
    "program.stored.gguf": "architectures of GGUF files",
    "report.trace": "opt is the optimizer's step",
    "resolve.notes": "mamba is a token mixer",
    "resolve.refusals": "mamba is a token mixer",
}
# Modules that compare a model_type with a table, and whose table it is. The list may only shrink.
COMPARES = {
    "catalogue.profiles.profiles": "the families of a profile's row",
    "probe.libraries": "transformers' own tables of classes",
    "probe.script.images": "each tower takes its own inputs in a trace",
    "probe.script.model": "Llama 4's outputs need a field in a trace",
}
# Families named in more than three modules of the rooms: LitGPT and torchtitan have stacks of some, the config of a
# GGUF file depends on the family, a wrapper's row is that of its text model, and unsupported models are told apart by
# parts of their names. The numbers may only fall.
OFTEN = {
    **dict.fromkeys(("gemma", "gemma2", "gpt_neox", "phi", "phi3"), 4),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "stablelm"), 4),
    **dict.fromkeys(("gemma3_text", "qwen3_5_moe_text", "qwen3_5_text"), 4),
    **dict.fromkeys(("dbrx", "mamba", "t5", "vit"), 4),
    **dict.fromkeys(("bert", "falcon", "roberta"), 5),
    "llama": 6,
    "mistral": 4,
}

COLUMNS = (*Family._fields, *CheckpointFacts._fields, *GenerationFacts._fields)

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "numpy", "huggingface_hub")
# Modules that a dense model does not need.
OTHERS = (
    "memplan.models.configs.vision",
    "memplan.models.configs.ssm",
    "memplan.catalogue.vision.vision",
    "memplan.models.hub",
    "memplan.planning.sweep",
)


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text("utf-8"))


@cache
def nodes(name: str) -> tuple[ast.AST, ...]:
    """Return all of a module's syntax, which takes as long to visit as to parse."""
    return tuple(ast.walk(tree(name)))


def imports(name: str) -> Iterator[tuple[ast.stmt, str]]:
    """Return every import of a memplan module, including in functions and for type checkers, and the module's name."""
    for node in nodes(name):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "memplan":
            for alias in node.names:
                for module in (f"{node.module}.{alias.name}", node.module):
                    target = module.removeprefix("memplan").lstrip(".") or "__init__"
                    if target in FILES:
                        yield node, target
                        break
        elif isinstance(node, ast.Import):
            yield from ((node, a.name.removeprefix("memplan.")) for a in node.names if a.name.startswith("memplan."))


@cache
def arrows() -> dict[str, set[str]]:
    """Return the modules that each module imports."""
    return {name: {module for _, module in imports(name)} - {name} for name in FILES}


def room(name: str) -> str:
    return name.partition(".")[0]


def folder(name: str) -> str:
    """Return a module's sub-folder within its room; empty for a file of the room itself."""
    inside = FILES[name].relative_to(PACKAGE).parent.parts
    return ".".join(inside) if len(inside) > 1 else ""


def circles(arrows: Mapping[str, set[str]]) -> list[str]:
    """Return one cycle of each strongly connected group, as a path."""
    found: list[str] = []
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> None:
        if node in path:
            found.append(" -> ".join([*path[path.index(node) :], node]))
        elif node not in done:
            for other in sorted(arrows.get(node, ())):
                visit(other, [*path, node])
            done.add(node)

    for node in sorted(arrows):
        visit(node, [])
    return found


def test_the_package_holds_its_rooms_and_no_loose_file() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"} == FACE | set(FLOOR)


def test_the_repositorys_top_level_has_only_known_files() -> None:
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text("utf-8").split()]
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert {name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)} == TOP_LEVEL


def test_a_room_imports_only_from_lower_floors() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in arrows().items()
        if room(name) in FLOOR
        for other in others
        if room(other) != room(name) and FLOOR.get(room(other), len(FLOORS)) >= FLOOR[room(name)]
    ]
    assert wrong == []


def test_no_two_files_import_each_other_however_indirectly() -> None:
    assert circles({name: others for name, others in arrows().items() if name != "__init__"}) == []


def test_no_two_sub_folders_of_a_room_import_each_other() -> None:
    between: dict[str, set[str]] = {}
    for name, others in arrows().items():
        for other in others:
            if folder(name) and folder(other) and folder(name) != folder(other) and room(name) == room(other):
                between.setdefault(folder(name), set()).add(folder(other))
    assert between
    assert circles(between) == []


def test_import_cycles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b -> c -> b"]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def _late(name: str) -> bool:
    """Return whether a module imports another memplan module anywhere but at its top."""
    return any(node not in tree(name).body for node, _ in imports(name))


def test_only_the_listed_modules_import_others_late() -> None:
    late = {name for name in FILES if _late(name)}
    assert {name for name in late if name not in LATE and room(name) not in LATE} == set()
    assert {entry for entry in LATE if not any(name == entry or room(name) == entry for name in late)} == set()


def test_functions_and_files_are_short() -> None:
    functions = {
        f"{name}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name in FILES
        for node in nodes(name)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    files = {name: len(path.read_text("utf-8").splitlines()) for name, path in FILES.items()}
    assert {name for name, lines in functions.items() if lines > LONGEST_FUNCTION} == set()
    assert {name for name, lines in files.items() if lines > LONGEST_FILE} == set()
    assert sum(files.values()) <= BUDGET


def test_a_class_name_means_one_thing() -> None:
    places: dict[str, list[str]] = {}
    for name in FILES:
        for node in tree(name).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(name)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_the_engine_knows_no_model_and_no_method() -> None:
    words = ("llama", "lora", "adam", "qwen", "gpt")
    text = "".join(path.read_text("utf-8").lower() for path in (PACKAGE / "engine").glob("*.py"))
    assert [word for word in words if word in text] == []


# --- A family is one row: no other module compares a model_type, keeps a table of them, or names one. ---


def within(name: str, places: object) -> bool:
    assert isinstance(places, (tuple, dict))
    return any(name == place or name.startswith(f"{place}.") for place in places)


@cache
def named(module: str) -> set[str]:
    """Return the families that a module's strings name: strings that are one name, or a list of names.

    Columns of a row, such as `stack` and `gguf`, name modules and architectures, which may be called like a family.
    """
    columns = {id(node.value) for node in nodes(module) if isinstance(node, ast.keyword) and node.arg in COLUMNS}
    strings = (node for node in nodes(module) if isinstance(node, ast.Constant) and id(node) not in columns)
    words = (node.value.split() for node in strings if isinstance(node.value, str))
    return {word for listed in words if listed and set(listed) <= set(MODULES) for word in listed}


def is_model_type(node: ast.expr) -> bool:
    return (isinstance(node, ast.Name) and node.id == "model_type") or (
        isinstance(node, ast.Attribute) and node.attr == "model_type"
    )


def compares(module: str) -> bool:
    """Whether a module compares a model_type with anything but another one."""
    for node in nodes(module):
        if isinstance(node, ast.Compare):
            sides = [is_model_type(side) for side in (node.left, *node.comparators)]
            if any(sides) and not all(sides):
                return True
        if isinstance(node, ast.Match) and is_model_type(node.subject):
            return True
    return False


def test_no_module_but_the_rows_and_the_stacks_names_a_family() -> None:
    naming = {name for name in FILES if named(name) and not within(name, ROOMS)}
    assert {name for name in naming if not within(name, ELSEWHERE)} == set()
    assert {place for place in ELSEWHERE if not any(within(name, (place,)) for name in naming)} == set()


def test_no_module_but_the_rows_and_the_stacks_compares_a_model_type() -> None:
    comparing = {name for name in FILES if compares(name) and not within(name, ROOMS)}
    assert comparing == set(COMPARES)


def test_a_family_is_named_in_its_row_its_stack_and_the_index() -> None:
    where = [name for name in FILES if within(name, ROOMS) and name != "models.peft_methods"]
    counts = Counter(word for name in where for word in named(name))  # peft's targets are by model_type
    often = {name: count for name, count in counts.items() if count > 3}
    assert {name: count for name, count in often.items() if count > OFTEN.get(name, 3)} == {}
    assert {name: count for name, count in OFTEN.items() if often.get(name, 3) < count} == {}


def fresh(code: str) -> str:
    """Return what a new interpreter prints."""
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
names = {HEAVY!r} + ("pydantic", "rich", "typer", "yaml", "dataclasses", "tempfile", "tomllib", *{OTHERS!r})
print(answer.verdict.answer, *(name for name in names if name in sys.modules))
"""
    assert fresh(code) == "fits"


def test_importing_the_library_needs_the_standard_library_only() -> None:
    code = "import sys; from memplan import RunSpec, estimate; print(*sys.modules)"
    assert {"pydantic", "rich", "typer", "yaml", *HEAVY}.isdisjoint(fresh(code).split())


def test_the_function_estimate_is_not_hidden_by_the_room_of_its_name() -> None:
    code = "import memplan.estimate.answer; from memplan import plan, estimate; print(callable(memplan.estimate))"
    assert fresh(code) == "True"
