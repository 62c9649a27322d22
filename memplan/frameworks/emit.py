"""Write a run as the file or command that starts it: accelerate, DeepSpeed, torchtitan, Megatron-LM, torchrun."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from memplan.catalogue.parallelism.sharding import STRATEGIES
from memplan.core.errors import UnknownNameError
from memplan.frameworks.accelerate import ACCELERATE
from memplan.frameworks.change_table import Value
from memplan.frameworks.deepspeed_json import DEEPSPEED
from memplan.frameworks.megatron import MEGATRON
from memplan.frameworks.torchtitan import TORCHTITAN
from memplan.frameworks.whole_file import FileFormat, Nodes, command, head_node, torchrun, write_file
from memplan.spec.run import RunSpec


def _write(values: Mapping[str, Value], remarks: list[str], run: RunSpec, nodes: Nodes) -> str:
    return command(f"{torchrun(nodes)} train.py", [], [*head_node(nodes), *remarks])


def _keys(run: RunSpec, nodes: Nodes) -> Mapping[str, Value]:
    return {}


def _remarks(run: RunSpec) -> Iterator[str]:
    p = run.parallelism
    degrees = " x ".join(f"{name} {getattr(p, name)}" for name in ("dp", "tp", "pp", "cp"))
    yield f"train.py divides its {p.world} ranks as {degrees}, {p.strategy}"


TORCHRUN = FileFormat(
    "torchrun", "torchrun", "torch 2.13 distributed/run.py", tuple(STRATEGIES), (), _keys, _remarks, _write
)

FILE_FORMATS = {each.name: each for each in (ACCELERATE, DEEPSPEED, TORCHRUN, TORCHTITAN, MEGATRON)}


def find(name: str) -> FileFormat:
    """Return the writer named `name`. Raises UnknownNameError with the nearest names."""
    if name not in FILE_FORMATS:
        raise UnknownNameError("emit", name, FILE_FORMATS)
    return FILE_FORMATS[name]


def emit(name: str, run: RunSpec, nodes: Nodes) -> str:
    """Return a run with all defaults filled in (`Estimate.run`) as a framework's file or command.

    Raises UnknownNameError for an unknown framework, SpecError if the framework does not support the run.
    """
    return write_file(find(name), run, nodes)
