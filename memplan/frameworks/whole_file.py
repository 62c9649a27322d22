"""What a table of a whole file's keys is made of, and how a run is written as that file.

Where `memplan.frameworks.change_table` says a change, these say a run: every key that has a value of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from memplan.core.errors import SpecError
from memplan.frameworks.change_table import Value, yaml
from memplan.spec.run import RunSpec


class Nodes(NamedTuple):
    """How many machines there are, and GPUs in each."""

    nodes: int
    gpus: int


class Said(NamedTuple):
    """`key` is `value` of a run on the nodes, None where nothing is to be written; dots lead into parts of a file."""

    key: str
    value: Callable[[RunSpec, Nodes], Value]


class Written(NamedTuple):
    """A framework's files at the version they were read from.

    strategies   those it has
    undivided    the degrees it has not, which are then 1
    remarks      what must be known beside the file, or nothing
    write        the file's text of its keys, and of comments
    """

    name: str
    title: str
    source: str
    strategies: tuple[str, ...]
    undivided: tuple[str, ...]
    keys: tuple[Said, ...]
    remarks: tuple[Callable[[RunSpec], str], ...]
    write: Callable[[Mapping[str, Value], list[str], RunSpec, Nodes], str]

    def check(self, degrees: Mapping[str, int | None], strategy: str | None) -> None:
        """Raise SpecError for a degree or strategy that the framework has not; None is any."""
        for degree in self.undivided:
            if degrees.get(degree) not in (None, 1):
                field = f"parallelism.{degree}"
                raise SpecError(f"{field}: {self.title} has none, and {degrees[degree]} cannot be written", field)
        if strategy not in (None, "none", *self.strategies):
            field = "parallelism.strategy"
            have = ", ".join(self.strategies)
            raise SpecError(f"{field}: {self.title} has no {strategy}; it has {have}", field)


def constant(value: Value) -> Callable[[RunSpec, Nodes], Value]:
    return lambda run, nodes: value


def of_run(value: Callable[[RunSpec], Value]) -> Callable[[RunSpec, Nodes], Value]:
    """What does not depend on the nodes."""
    return lambda run, nodes: value(run)


def where(
    holds: Callable[[RunSpec], bool], value: Callable[[RunSpec, Nodes], Value]
) -> Callable[[RunSpec, Nodes], Value]:
    """The value of a run of which something holds, None of another."""
    return lambda run, nodes: value(run, nodes) if holds(run) else None


def written(framework: Written, run: RunSpec, nodes: Nodes) -> str:
    """The file. Raises SpecError where the framework has not what the run says."""
    p = run.parallelism
    framework.check({degree: getattr(p, degree) for degree in framework.undivided}, p.strategy)
    values = {said.key: said.value(run, nodes) for said in framework.keys}
    remarks = list(filter(None, (remark(run) for remark in framework.remarks)))
    return framework.write({key: value for key, value in values.items() if value is not None}, remarks, run, nodes)


def nested(values: Mapping[str, Value]) -> dict[str, Any]:
    """The keys' parts as mappings in mappings."""
    made: dict[str, Any] = {}
    for key, value in values.items():
        *parts, last = key.split(".")
        inner = made
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return made


def yaml_lines(values: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """A mapping as YAML, mappings in it in blocks of their own."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}:"
            yield from yaml_lines(value, f"{indent}  ")  # pyright: ignore[reportUnknownArgumentType]
        else:
            yield f"{indent}{key}: {yaml(value)}"


def command(first: str, words: list[str], comments: list[str]) -> str:
    """A shell command, a word or a flag with its value a line."""
    lines = [*(f"# {comment}" for comment in comments), " \\\n    ".join([first, *words])]
    return "\n".join(lines) + "\n"


def torchrun(nodes: Nodes) -> str:
    """How torch 2.13 starts a process for every GPU; of several nodes the same line on each."""
    if nodes.nodes == 1:
        return f"torchrun --standalone --nproc_per_node={nodes.gpus}"
    return (
        f"torchrun --nnodes={nodes.nodes} --nproc_per_node={nodes.gpus} --rdzv_backend=c10d "
        "--rdzv_endpoint=$HEAD_NODE:29500"
    )


def sequences(run: RunSpec) -> int:
    """Of a step, all GPUs together."""
    return run.batch.micro * run.batch.accumulation * run.parallelism.dp


def counted_as(profile: str) -> Callable[[RunSpec], str]:
    """Whose memory was counted, where that is another framework's than the one that is written for."""

    def says(run: RunSpec) -> str:
        if run.profile.startswith(profile):
            return ""
        return f"memplan counted what {run.profile} takes; --profile {profile} counts this framework's"

    return says


def head_node(nodes: Nodes) -> list[str]:
    """What to know of several nodes."""
    return ["the same line on every node, HEAD_NODE being the first one's address"] if nodes.nodes > 1 else []
