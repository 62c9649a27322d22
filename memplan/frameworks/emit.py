"""A run as the file or command that starts it: accelerate, DeepSpeed, torchtitan, Megatron-LM, torchrun."""

from __future__ import annotations

from collections.abc import Mapping

from memplan.catalogue.parallelism.sharding import STRATEGIES
from memplan.core.errors import UnknownNameError
from memplan.frameworks.accelerate import ACCELERATE
from memplan.frameworks.change_table import Value
from memplan.frameworks.deepspeed_json import DEEPSPEED
from memplan.frameworks.megatron import MEGATRON
from memplan.frameworks.torchtitan import TORCHTITAN
from memplan.frameworks.whole_file import Nodes, Written, command, head_node, torchrun, written
from memplan.spec.run import RunSpec


def _write(values: Mapping[str, Value], remarks: list[str], run: RunSpec, nodes: Nodes) -> str:
    return command(f"{torchrun(nodes)} train.py", [], [*head_node(nodes), *remarks])


def _as_counted(run: RunSpec) -> str:
    p = run.parallelism
    degrees = " x ".join(f"{name} {getattr(p, name)}" for name in ("dp", "tp", "pp", "cp"))
    return f"train.py divides its {p.world} ranks as {degrees}, {p.strategy}"


TORCHRUN = Written(
    "torchrun", "torchrun", "torch 2.13 distributed/run.py", tuple(STRATEGIES), (), (), (_as_counted,), _write
)

WRITTEN = {each.name: each for each in (ACCELERATE, DEEPSPEED, TORCHRUN, TORCHTITAN, MEGATRON)}


def find(name: str) -> Written:
    """Raises UnknownNameError, naming the nearest."""
    if name not in WRITTEN:
        raise UnknownNameError("emit", name, WRITTEN)
    return WRITTEN[name]


def emit(name: str, run: RunSpec, nodes: Nodes) -> str:
    """The run, with nothing left open (`Estimate.run`), in a framework's file or command on so many nodes.

    Raises UnknownNameError for another framework, SpecError where that has not what the run says.
    """
    return written(find(name), run, nodes)
