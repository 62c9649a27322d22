"""A scheduler's jobs, and the nodes to place them on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, cast

from memplan.core.errors import printable, refused
from memplan.core.machines import find_machine
from memplan.core.several import several
from memplan.spec.base import Count, Flag, GPUs, Number, Part
from memplan.spec.checks import Strict
from memplan.spec.run import RunSpec

Bytes = Annotated[int, Strict(ge=0, le=2**60)]
USD = Annotated[Number, Strict(ge=0)]


def listed(field: str, values: object) -> list[Any]:
    """Return the values as a list. Raises SpecError for anything else, such as a single one that is not in a list."""
    if isinstance(values, Iterable) and not isinstance(values, (str, Mapping, Part)):
        return list(cast(Iterable[Any], values))
    raise refused(field, f"must be a list, not {printable(repr(cast(object, values)), 40)}")


class Job(Part):
    """A run to place. A run stands for the job that it is.

    run   the run; its own `gpu` is ignored
    gpus  how many GPUs it may use, the fewest preferred; empty for the run's own number. Other numbers change the
          data-parallel replicas, which FSDP2 shards if the run names no strategy
    name  name in the placement
    """

    if TYPE_CHECKING:

        def __init__(
            self, *, run: RunSpec | Mapping[str, Any], gpus: tuple[int, ...] | list[int] = ..., name: str = ...
        ) -> None: ...

    run: RunSpec
    gpus: tuple[GPUs, ...] = ()
    name: str = ""

    @classmethod
    def expanded(cls, value: Any) -> Any:
        """Return the job of a run."""
        if isinstance(value, RunSpec) or (isinstance(value, Mapping) and "model" in value):
            return {"run": cast(object, value)}
        return cast(object, value)


class NodeShape(Part):
    """Machines of one shape. The name of a GPU stands for a machine with one, `8x a100` for one with eight, and the
    type of a cloud's machine (`p4d.24xlarge`) also for its host memory.

    gpu           name of the GPU, or of a MIG instance: `a100-80gb:3g.40gb`
    cards         GPUs, or MIG instances, of one machine
    count         machines of this shape
    mig           MIG profiles that each GPU is divided into
    shared        whether jobs may share a GPU, each with the memory set aside for it
    host_memory   bytes of host memory of one machine; None for enough
    usd_per_hour  price of one GPU; None for the lowest dated price in the table
    name          name in the placement; empty for the GPU's
    """

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            gpu: str,
            cards: int = ...,
            count: int = ...,
            mig: tuple[str, ...] | list[str] = ...,
            shared: bool = ...,
            host_memory: int | None = ...,
            usd_per_hour: float | None = ...,
            name: str = ...,
        ) -> None: ...

    gpu: str
    cards: Count = 1
    count: Count = 1
    mig: tuple[str, ...] = ()
    shared: Flag = False
    host_memory: Bytes | None = None
    usd_per_hour: USD | None = None
    name: str = ""

    @classmethod
    def expanded(cls, value: Any) -> Any:
        """Return the node that a name of a GPU stands for."""
        if not isinstance(value, str):
            return value
        if machine := find_machine(value):
            return machine._asdict()
        number, gpu = several(value)
        return {"gpu": gpu, **({} if number is None else {"cards": number})}
