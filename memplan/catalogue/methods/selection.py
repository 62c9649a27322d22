"""The modules that peft adapts, chosen by their paths in the model: numbers of layers, patterns, ranks.

Source: peft 0.21.2 tuners/tuners_utils.py check_target_module_exists, utils/other.py get_pattern_key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import groupby

from memplan.core.ir import Block, Op, Run, Stack, Weight
from memplan.core.records import NamedTuple


class Selection(NamedTuple):
    """Which modules get adapters, and of which rank.

    names     ends of the modules' paths; `all-linear` for all linear layers but the head
    pattern   a regular expression of the entire path, instead of names
    excluded  ends of paths without adapters, or a regular expression
    layers    numbers of the adapted layers; None for all
    lists     names of the lists that have these numbers; empty for any
    ranks     ranks by a regular expression of the path's end; the first that matches counts
    """

    names: tuple[str, ...] = ()
    pattern: str = ""
    excluded: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None
    lists: tuple[str, ...] = ()
    ranks: tuple[tuple[str, int], ...] = ()

    def takes(self, path: str) -> bool:
        """Whether the module of this path is adapted, if peft can adapt it."""
        if self.excluded and _matches(self.excluded, path):
            return False
        if self.pattern:
            return re.fullmatch(self.pattern, path) is not None
        if path in self.names:
            return True
        return (self.names == ("all-linear",) or _matches(self.names, path)) and self._takes_layer(path)

    def _takes_layer(self, path: str) -> bool:
        if self.layers is None:
            return True
        lists = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.lists] or [r".*?\.[^.]*\.(\d+)\."]
        match = next(filter(None, (re.match(pattern, path) for pattern in lists)), None)
        return match is not None and int(match[1]) in self.layers

    def rank(self, path: str) -> str:
        """Return the rank of the adapter on a module: a number, or `r` for that of the run."""
        return next((str(rank) for pattern, rank in self.ranks if re.match(rf"(.*\.)?({pattern})$", path)), "r")

    def marked(self, stack: Stack, axes: dict[str, int]) -> tuple[Stack, dict[str, int]]:
        """Return the stack with the rank of its adapter in every selected weight, runs split where layers differ."""
        axes, runs = dict(axes), list[Run]()
        changed: dict[tuple[int, tuple[str, ...]], Block] = {}

        def ranks(block: Block, number: int) -> tuple[str, ...]:
            paths = (f"{block.name}.{number}.{op.name}" for op in block.ops)
            return tuple(
                self.rank(path) if _adaptable(op) and self.takes(path) else ""
                for op, path in zip(block.ops, paths, strict=True)
            )

        def of_ranks(block: Block, each: tuple[str, ...]) -> Block:
            key = (id(block), each)
            if key not in changed:
                changed[key] = block._replace(ops=tuple(map(_with_rank, block.ops, each)))
            return changed[key]

        def outside(operations: tuple[Op, ...]) -> tuple[Op, ...]:
            if self.names == ("all-linear",):  # neither embeddings nor the head
                return operations
            return tuple(_with_rank(op, self.rank(op.name) if self.takes(op.name) else "") for op in operations)

        for run, blocks in numbered_blocks(stack, axes):
            copies = [tuple(ranks(b.block, b.numbers[i]) for b in blocks) for i in range(axes[run.times])]
            parts = [(each, len(list(equal))) for each, equal in groupby(copies)]
            between = outside(run.before)
            for part, (each, count) in enumerate(parts):
                times = run.times if len(parts) == 1 else f"{run.times}.part{part}"
                axes[times] = count
                runs.append(Run(tuple(map(of_ranks, run.blocks, each)), times, between))
                between = ()
        return Stack(outside(stack.before), tuple(runs), outside(stack.after), stack.loss), axes


def _matches(names: tuple[str, ...] | str, path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(f".{path}".endswith(f".{name}") for name in names)


class NumberedBlock(NamedTuple):
    """A block of a run, and the number of each of its copies in its list of layers."""

    block: Block
    numbers: tuple[int, ...]


def numbered_blocks(stack: Stack, axes: Mapping[str, int]) -> Iterator[tuple[Run, tuple[NumberedBlock, ...]]]:
    """Yield every run with its blocks and the numbers of their copies."""
    first: dict[str, int] = {}
    for run in stack.runs:
        period, copies = len(run.blocks), axes[run.times]
        starts = [first.get(block.name, 0) + i for i, block in enumerate(run.blocks)]
        yield (
            run,
            tuple(
                NumberedBlock(block, tuple(start + copy * period for copy in range(copies)))
                for block, start in zip(run.blocks, starts, strict=True)
            ),
        )
        for name in {block.name for block in run.blocks}:
            first[name] = first.get(name, 0) + period * copies


def _adaptable(op: Op) -> Weight | None:
    """Return the weight of a linear layer or an embedding, or None for another operation."""
    return next((w for w in op.weights if w.matrix or (w.rows and w.group == "embedding")), None)


def module_paths(stack: Stack, axes: Mapping[str, int]) -> Iterator[str]:
    """Yield the path of every linear layer and embedding of the model."""
    yield from (op.name for op in stack.before if _adaptable(op))
    for run, blocks in numbered_blocks(stack, axes):
        yield from (op.name for op in run.before if _adaptable(op))
        for block, numbers in blocks:
            names = [op.name for op in block.ops if _adaptable(op)]
            yield from (f"{block.name}.{number}.{name}" for number in numbers for name in names)
    yield from (op.name for op in stack.after if _adaptable(op))


def _with_rank(op: Op, rank: str) -> Op:
    w = _adaptable(op)
    if not rank or w is None:
        return op
    return op._replace(weights=tuple(v._replace(adapter=rank) if v is w else v for v in op.weights))
