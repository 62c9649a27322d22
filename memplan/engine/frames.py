"""`Frame`: one execution of a list of operations, with the `Node`s of the backward graph that it leaves."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from memplan.core.cached_property import cached_property
from memplan.core.identity import Identity
from memplan.core.ir import Op, Tensor
from memplan.engine.dtypes import Scope, with_cached_casts
from memplan.engine.operation_facts import NO_BACKWARD, Backward, GradientFlow, gradient_flow, weights_used_again
from memplan.engine.storages import Storage

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Node:
    """One operation of the backward graph.

    backward  what its backward computes
    targets   reads and weights that need a gradient
    pins      names of the tensors it keeps
    kept      the storages it keeps
    away      tensors it keeps in host memory
    fetched   copies of those on the GPU, during its backward
    """

    __slots__ = ("away", "backward", "fetched", "kept", "op", "pins", "targets")

    def __init__(self, op: Op, backward: Backward) -> None:
        self.op, self.backward = op, backward
        self.targets, self.pins = backward.targets, backward.pins
        self.kept: list[Storage] = []
        self.away: Mapping[str, Tensor] = NOTHING
        self.fetched: Mapping[str, Storage] = NOTHING


NOT_RECORDED = Node(Op(""), NO_BACKWARD)  # stands for every operation that autograd does not record


class Frame:
    """One execution of a list of operations, and the backward graph it leaves."""

    def __init__(
        self,
        ops: tuple[Op, ...],
        scope: Scope,
        outer: dict[str, Storage],
        flows: Iterable[str],
        block: str = "",
        layer: int | None = None,
    ) -> None:
        self.block = block
        self.uses = weights_used_again(ops) if block else {}  # weight -> operations of the block that use it
        self.where = "" if layer is None else f"{block}.{layer}."
        self.ops = ops
        self.scope = scope
        self.outer = outer
        self.flows = set(flows)
        self.flow: GradientFlow | None = None  # how they flow through the operations, if autograd records them
        self.names: dict[str, Storage] = {}
        self.checkpointed = False
        self.reentrant = False
        self.recomputed = False
        self.whole = False  # a checkpoint recomputes all of it
        self.exported: Collection[str] = ()
        self.checkpoint: list[Storage] = []  # kept by the checkpoint: the block's inputs
        self.named: list[Storage] = []  # kept by the checkpoint until the graph is freed: keyword arguments
        self.to_host = False  # the checkpoint keeps `x` in host memory
        self.saves: Container[str] = ()  # operations whose outputs the checkpoint keeps
        self.saved: dict[str, Storage] = {}  # those outputs
        self.begins: tuple[int, ...] = (0,)  # the first operation of each part that is recomputed by itself
        self.left = 0  # operations before this one are not recomputed yet
        self.shares: Collection[str] = ()  # outputs for later blocks, referenced by all checkpoints
        self.shared: list[Storage] = []
        self.lends = False  # its outputs for later blocks are in a dictionary, so reentrant ones keep their graph
        self.past: Mapping[str, Storage] = {}  # left by the previous pass
        self._kept: Sequence[Sequence[Storage]] = ()  # by each node, until there are nodes

    @property
    def backwards(self) -> Sequence[Backward]:
        """The backward of each operation; of none, if autograd does not record them."""
        return self.flow.backwards if self.flow is not None else ()

    @cached_property
    def nodes(self) -> list[Node]:
        """The graph's node of each operation; many frames are repeated, and never need them."""
        if self.flow is None:
            return [NOT_RECORDED] * len(self.ops)
        nodes = [*map(Node, self.ops, self.backwards)]
        for node, kept in zip(nodes, self._kept, strict=False):
            node.kept = [*kept]
        return nodes

    @property
    def kept(self) -> Sequence[Sequence[Storage]]:
        """The storages that each node keeps."""
        return [node.kept for node in self.nodes] if "nodes" in vars(self) else self._kept

    @kept.setter
    def kept(self, kept: Sequence[Sequence[Storage]]) -> None:
        vars(self).pop("nodes", None)
        self._kept = kept

    def detach(self, inputs: Container[Storage]) -> None:
        """Make leaves of these inputs, as a reentrant checkpoint does: autocast caches the casts of those in fp32."""
        entering = self.flow.entering if self.flow is not None else frozenset[str]()
        leaves = frozenset(n for n in entering if self.scope[n].dtype == "fp32" and self.outer[n] in inputs)
        ops = with_cached_casts(Identity(self.ops), leaves)
        if ops is not self.ops:
            self.ops, self.flow = ops, gradient_flow(ops, entering)
            vars(self).pop("nodes", None)

    def __getitem__(self, name: str) -> Storage:
        return self.names[name] if name in self.names else self.outer[name]

    def storage(self, name: str) -> Storage | None:
        """Return the storage of a tensor; None for a weight, which is always alive and not counted here."""
        return self.names.get(name) or self.outer.get(name)
