"""The answer: what `estimate` returns. Every number of bytes is an integer, per GPU."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.overhead import Overhead
from memplan.core.cached_property import cached_property
from memplan.core.errors import InternalError
from memplan.core.frozen import FrozenDict
from memplan.core.version import __version__
from memplan.estimate.calibration import Calibration
from memplan.estimate.usage import Band, Usage
from memplan.spec.run import RunSpec

SCHEMA_VERSION = 1
ANSWERS = ("fits", "tight", "does not fit")
VIAS = ("engine", "trace")  # how an answer was come by: from memplan's own stacks, or from a traced step
BASES = ("derived", "measured", "assumed", "traced")


class Parameters(NamedTuple):
    """How many parameters: of the model, of those that train, and of the model that a token meets."""

    total: int
    trainable: int
    active: int


class Bytes:
    """Peaks: `allocated` as torch.cuda.max_memory_allocated counts, `reserved` in torch's segments, `used` as
    nvidia-smi shows for the process. The last two are made when asked for."""

    __slots__ = ("_usage",)

    def __init__(self, usage: Usage) -> None:
        self._usage = usage

    @property
    def allocated(self) -> int:
        return self._usage.allocated

    @property
    def reserved(self) -> int:
        return self._usage.reserved

    @property
    def used(self) -> int:
        return self._usage.used

    def as_dict(self) -> dict[str, int]:
        return {"allocated": self.allocated, "reserved": self.reserved, "used": self.used}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bytes) and self.as_dict() == other.as_dict()

    def __hash__(self) -> int:
        return hash(tuple(self.as_dict().values()))

    def __repr__(self) -> str:
        return f"Bytes(allocated={self.allocated}, reserved={self.reserved}, used={self.used})"


class Card(NamedTuple):
    """The GPU asked for: `usable` bytes of one, and how many."""

    name: str
    usable: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride] (the contract's word)


class Verdict:
    """`answer` is fits, tight or does not fit; None without a GPU. `headroom` is usable minus used."""

    __slots__ = ("_usable", "_usage")

    def __init__(self, usage: Usage, usable: int | None) -> None:
        self._usage, self._usable = usage, usable

    @property
    def answer(self) -> str | None:
        return self._usage.answer

    @property
    def headroom(self) -> int | None:
        return None if self._usable is None else self._usable - self._usage.used

    def as_dict(self) -> dict[str, str | int | None]:
        return {"answer": self.answer, "headroom": self.headroom}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Verdict) and self.as_dict() == other.as_dict()

    def __hash__(self) -> int:
        return hash(tuple(self.as_dict().values()))

    def __repr__(self) -> str:
        return f"Verdict(answer={self.answer!r}, headroom={self.headroom})"


class Peak(NamedTuple):
    """The moment of the peak: `phase`, and the operation at `where`."""

    phase: str
    where: str


class Phase(NamedTuple):
    """The peak of one phase; `step` is 1 or 2 where the first step differs from the later ones."""

    phase: str
    step: int | None
    peak: int
    where: str


class HostPhase(NamedTuple):
    """Host memory in a phase, `load`, `step` or one beside the steps: of one process, of all of a node, and the
    `mapped` files they share."""

    phase: str
    rank: int
    node: int
    mapped: int


class Host(NamedTuple):
    """Host memory: how many processes of the run a node has, and the phases. Bytes of the process that has most."""

    ranks: int
    phases: tuple[HostPhase, ...]

    @property
    def peak(self) -> HostPhase:
        """The phase in which a node has most, the later of equal ones."""
        return max(reversed(self.phases), key=lambda phase: phase.node)

    def as_dict(self) -> dict[str, Any]:
        return {"ranks": self.ranks, "peak": self.peak.phase, "phases": [phase._asdict() for phase in self.phases]}


class Rank(NamedTuple):
    """The ranks of one stage of a pipeline: how many of the model's layers and parameters they have, of how many
    microbatches they keep what backward needs at most, and what of an answer is theirs."""

    stage: int
    layers: int
    parameters: int
    in_flight: int
    bytes: Bytes
    peak: Peak
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        own = {"bytes": self.bytes.as_dict(), "peak": self.peak._asdict(), "verdict": self.verdict.as_dict()}
        return {**self._asdict(), **own}


class Line(NamedTuple):
    """One kind of tensor alive at the peak: `count` of them, `bytes` in all.

    `shape` is in the letters of `memplan.core.ir`, `dims` the same in numbers; `why` says what keeps it alive; `basis`
    is one of `BASES`.
    """

    what: str
    kind: str
    where: str
    shape: str
    dims: tuple[int, ...]
    dtype: str
    count: int  # pyright: ignore[reportIncompatibleMethodOverride] (the contract's word)
    bytes: int
    why: str
    source: str
    basis: str = "derived"


KINDS = ("parameter", "gradient", "optstate", "activation", "temp", "buffer", "other")


class Details(Protocol):
    """What of an answer is made when it is asked for."""

    def lines(self) -> Iterable[Line]:
        """Every tensor alive at the peak, largest first."""
        ...

    def moments(self) -> Iterable[Phase]:
        """What is allocated at every moment memory is about to fall, in order, in the step that peaks."""
        ...

    def ranks(self) -> Iterable[Rank]:
        """The ranks that differ, by stage; nothing where all are alike."""
        ...


class Estimate:
    """One run's answer. Immutable; equal if the run is, and how it was come by: `via` is one of `VIAS`.

    The ledger, the timeline and what torch reserves beyond its tensors are made when asked for.
    """

    asked: RunSpec
    parameters: Parameters
    bytes: Bytes
    gpu: Card | None
    verdict: Verdict
    peak: Peak
    phases: tuple[Phase, ...]
    host_bytes: int
    host: Host
    unsupported: tuple[str, ...]
    notes: tuple[str, ...]
    calibration: Calibration | None
    via: str
    details: Details
    serving: Mapping[str, Any] | None
    _parts: Mapping[str, object]
    _usage: Usage

    def __init__(
        self,
        asked: RunSpec,
        parts: Mapping[str, object],
        parameters: Parameters,
        usage: Usage,
        gpu: Card | None,
        peak: Peak,
        phases: tuple[Phase, ...],
        host_bytes: int,
        notes: tuple[str, ...],
        details: Details,
        calibration: Calibration | None,
        via: str = "engine",
        unsupported: tuple[str, ...] = (),
        serving: Mapping[str, Any] | None = None,
        host: Host | None = None,
    ) -> None:
        """`parts` are the run's with every null filled in; `serving` is what a serving engine makes of its card.

        Raises InternalError if a phase has a peak that is no number of bytes.
        """
        for phase in phases:
            if type(phase.peak) is not int or phase.peak < 0:
                raise InternalError(f"{phase.phase} takes {phase.peak} bytes at {phase.where or 'its peak'}")
        vars(self).update(
            asked=asked,
            parameters=parameters,
            bytes=Bytes(usage),
            gpu=gpu,
            verdict=Verdict(usage, gpu.usable if gpu else None),
            peak=peak,
            phases=phases,
            host_bytes=host_bytes,
            host=host or Host(1, (HostPhase("step", host_bytes, host_bytes, 0),)),
            unsupported=unsupported,
            notes=notes,
            calibration=calibration,
            via=via,
            details=details,
            serving=FrozenDict(serving) if serving is not None else None,
            _parts=parts,
            _usage=usage,
        )

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"an answer cannot be changed: {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"an answer cannot be changed: {name}")

    @cached_property
    def run(self) -> RunSpec:
        """The run with every null filled in as its profile decides."""
        gpu = self.gpu.name if self.gpu else None
        return self.asked.model_copy(update={**self._parts, "gpu": gpu})

    @property
    def fits(self) -> bool:
        """Whether the verdict is fits, which is sooner known than what else it is."""
        return self._usage.fits

    @property
    def least(self) -> int:
        """No card with fewer usable bytes holds the run."""
        return self._usage.least

    def told(self, usable: int, replayed: bool = False) -> bool | None:
        """Whether a card of the same kind with so many usable bytes surely holds the run, as far as bounds tell, or
        with `replayed` one replay for all such cards; None where they do not."""
        return self._usage.told(usable, replayed)

    @property
    def band(self) -> Band:
        """Where `bytes.used` lies in most runs."""
        return self._usage.band

    @property
    def beside(self) -> tuple[Overhead, ...]:
        """What the process has of the card beside torch's segments: the CUDA context, and NCCL's by communicator."""
        return self._usage.beside

    @cached_property
    def ledger(self) -> tuple[Line, ...]:
        """Every tensor alive at the peak, largest first. Sums to `bytes.allocated`.

        Raises InternalError if it does not, or if a line counts less than nothing.
        """
        lines = tuple(self.details.lines())
        for line in lines:
            if line.bytes < 0 or line.count < 1:
                raise InternalError(f"{line.count} × {line.what} take {line.bytes} bytes at the peak")
        total = sum(line.bytes for line in lines)
        if total != self.bytes.allocated:
            raise InternalError(f"the tensors at the peak sum to {total} bytes, not {self.bytes.allocated}")
        return lines

    @cached_property
    def timeline(self) -> tuple[Phase, ...]:
        """What is allocated at every moment memory is about to fall, in order, in the step that peaks."""
        return tuple(self.details.moments())

    @cached_property
    def ranks(self) -> tuple[Rank, ...]:
        """The ranks that differ, by stage of a pipeline; empty where all are alike. The answer is that of the one that
        holds most, or of the stage that was asked for."""
        return tuple(self.details.ranks())

    @cached_property
    def categories(self) -> dict[str, int]:
        """Bytes at the peak by kind (torch's MemTracker words). Sums to `bytes.allocated`."""
        out: dict[str, int] = dict.fromkeys(KINDS, 0)
        for line in self.ledger:
            out[line.kind] += line.bytes
        return FrozenDict(out)

    def model_dump(self) -> dict[str, Any]:
        """The answer as the JSON contract has it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "memplan_version": __version__,
            "via": self.via,
            "run": self.run.model_dump(mode="json"),
            "parameters": self.parameters._asdict(),
            "bytes": self.bytes.as_dict(),
            "band": self.band._asdict(),
            "gpu": self.gpu._asdict() if self.gpu else None,
            "verdict": self.verdict.as_dict(),
            "peak": self.peak._asdict(),
            "phases": [p._asdict() for p in self.phases],
            "categories": dict(self.categories),
            "ledger": [{**line._asdict(), "dims": list(line.dims)} for line in self.ledger],
            "beside": [row._asdict() for row in self.beside],
            "host_bytes": self.host_bytes,
            "serving": dict(self.serving) if self.serving is not None else None,
            "host": self.host.as_dict(),
            "ranks": [rank.as_dict() for rank in self.ranks],
            "unsupported": list(self.unsupported),
            "notes": list(self.notes),
        }

    def model_dump_json(self, indent: int | None = None) -> str:
        return json.dumps(self.model_dump(), indent=indent, ensure_ascii=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Estimate) and (self.asked, self.calibration, self.via) == (
            other.asked,
            other.calibration,
            other.via,
        )

    def __hash__(self) -> int:
        return hash(self.asked)

    def __repr__(self) -> str:
        return f"Estimate({self.asked.model!r}, allocated={self.bytes.allocated}, verdict={self.verdict.answer!r})"


def phase_peaks(answer: Estimate) -> dict[str, int]:
    """The peak of every phase, of all steps."""
    out: dict[str, int] = {}
    for phase in answer.phases:
        out[phase.phase] = max(out.get(phase.phase, 0), phase.peak)
    return out


class Holding(NamedTuple):
    """A GPU that holds the run, and how: fits or tight."""

    gpu: GPU
    answer: str
