"""`Stash`: saved tensors that stay on the GPU while another stream copies them to host memory, or back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection

from memplan.engine.storages import Storage

Part = tuple[Storage, str]  # a storage, and the part of it that a tensor begins with, if that is not the first


class Stash:
    """References to saved tensors in forward, and to the copies of the last operation's in backward.

    most  number of saves, of any tensors, after which one leaves
    drop  drops a reference

    Source: trl 1.16.0 models/activation_offloading.py OffloadActivations
    """

    def __init__(self, most: int, drop: Callable[[Storage], None]) -> None:
        self._most, self._drop = most, drop
        self._saves = 0
        self._held: dict[int, Part] = {}  # by the number of their save
        self._latest: dict[Part, int] = {}  # the last save of what was here when it was saved
        self._copies: list[Storage] = []

    def takes(self, part: Part | None) -> bool:
        """Count a save, and return whether what is saved leaves: what is here already stays, and so does None."""
        self._saves += 1
        if part is None:
            return False
        leaves = part not in self._latest
        if leaves:
            for number in [n for n in self._held if n <= self._saves - self._most]:
                self._leave(number)
            self._held[self._saves] = part
            part[0].refs += 1
        self._latest[part] = self._saves
        return leaves

    def _leave(self, number: int) -> None:
        part = self._held.pop(number)
        if self._latest[part] == number:
            del self._latest[part]
        self._drop(part[0])

    @property
    def held(self) -> list[Storage]:
        """The saved tensors of the forward pass that it still holds."""
        return [storage for storage, _ in self._held.values()]

    def pass_by(self, fetched: Collection[Storage]) -> None:
        """Hold the copies that an operation has fetched, in place of those before and of what is left of forward."""
        before, held = self._copies, self.held
        self._copies = [storage for storage in fetched if storage not in held]
        for storage in self._copies:
            storage.refs += 1
        for storage in before:
            self._drop(storage)
        for number in [*self._held]:
            self._leave(number)

    @property
    def alone(self) -> list[Storage]:
        """The storages that nothing else references, which the next copy of a block finds here."""
        held = Counter((*self.held, *self._copies))
        return [storage for storage, references in held.items() if storage.refs == references]
