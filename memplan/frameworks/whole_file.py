"""Complete config files and commands, and how a run is written as one.

Unlike `memplan.frameworks.change_table`, which writes a change, a complete file has every key that has a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from memplan.core.errors import refused
from memplan.core.records import NamedTuple
from memplan.frameworks.change_table import Value, yaml
from memplan.spec.run import RunSpec


class Nodes(NamedTuple):
    """The number of machines, and of GPUs in each."""

    nodes: int
    gpus: int


class FileFormat(NamedTuple):
    """A framework's file or command.

    name                 value of `--emit`
    title                name as shown
    source               version and files it was read from
    strategies           the strategies it supports
    unsupported_degrees  the degrees it does not support, which must be 1
    keys                 key -> value, for a run on some nodes; dots in keys divide sections, and None writes nothing
    remarks              comments on a run
    write                writes the text from values and comments
    """

    name: str
    title: str
    source: str
    strategies: tuple[str, ...]
    unsupported_degrees: tuple[str, ...]
    keys: Callable[[RunSpec, Nodes], Mapping[str, Value]]
    remarks: Callable[[RunSpec], Iterable[str]]
    write: Callable[[Mapping[str, Value], list[str], RunSpec, Nodes], str]

    def check(self, degrees: Mapping[str, int | None], strategy: str | None) -> None:
        """Raise SpecError for a degree or strategy that the framework does not support; None is not checked."""
        for degree in self.unsupported_degrees:
            if degrees.get(degree) not in (None, 1):
                field = f"parallelism.{degree}"
                raise refused(field, f"{self.title} has no {degree}, so {degrees[degree]} cannot be written")
        if strategy not in (None, "none", *self.strategies):
            field = "parallelism.strategy"
            supported = ", ".join(self.strategies)
            raise refused(field, f"{self.title} has no {strategy}; it has {supported}")


def write_file(framework: FileFormat, run: RunSpec, nodes: Nodes) -> str:
    """Return the text of the file. Raises SpecError if the framework does not support the run."""
    p = run.parallelism
    framework.check({degree: getattr(p, degree) for degree in framework.unsupported_degrees}, p.strategy)
    values = {key: value for key, value in framework.keys(run, nodes).items() if value is not None}
    return framework.write(values, list(framework.remarks(run)), run, nodes)


def nested(values: Mapping[str, Value]) -> dict[str, Any]:
    """Return the values with dotted keys turned into nested mappings."""
    root: dict[str, Any] = {}
    for key, value in values.items():
        *sections, last = key.split(".")
        inner = root
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return root


def yaml_lines(values: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Yield a mapping as lines of YAML, with nested mappings as indented blocks."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}:"
            yield from yaml_lines(value, f"{indent}  ")  # pyright: ignore[reportUnknownArgumentType]
        else:
            yield f"{indent}{key}: {yaml(value)}"


def command(first: str, arguments: list[str], comments: list[str]) -> str:
    """Return a shell command with comments before it and one argument per line."""
    lines = [*(f"# {comment}" for comment in comments), " \\\n    ".join([first, *arguments])]
    return "\n".join(lines) + "\n"


def torchrun(nodes: Nodes) -> str:
    """Return torch 2.13's command that starts one process per GPU; with several nodes, the same line on each."""
    if nodes.nodes == 1:
        return f"torchrun --standalone --nproc_per_node={nodes.gpus}"
    return (
        f"torchrun --nnodes={nodes.nodes} --nproc_per_node={nodes.gpus} --rdzv_backend=c10d "
        "--rdzv_endpoint=$HEAD_NODE:29500"
    )


def sequences(run: RunSpec) -> int:
    """Sequences per step over all GPUs."""
    return run.batch.micro * run.batch.accumulation * run.parallelism.dp


def profile_remark(run: RunSpec, profile: str) -> Iterator[str]:
    """Yield a remark if the run's memory was counted with another framework's profile."""
    if not run.profile.startswith(profile):
        yield f"memplan counted memory as {run.profile} uses it; --profile {profile} counts this framework's"


def head_node(nodes: Nodes) -> list[str]:
    """A comment on running on several nodes."""
    return ["run this line on every node, with HEAD_NODE set to the first node's address"] if nodes.nodes > 1 else []
