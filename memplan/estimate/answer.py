"""The answer that `estimate` returns. Every number of bytes is an integer, per GPU."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.overhead import Overhead
from memplan.core.cached_property import cached_property
from memplan.core.errors import InternalError
from memplan.core.frozen import FrozenDict
from memplan.core.records import NamedTuple
from memplan.core.version import __version__
from memplan.estimate.usage import Answer, Band, Replay, Usage, calibration_of
from memplan.models.model import ModelSpec
from memplan.resolve.decide import profile_note, with_known_profile
from memplan.spec.run import RunSpec

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration
    from memplan.frameworks.reading.config import FieldOrigin

SCHEMA_VERSION = 1
BY_MEMORY = ("fits", "tight", "does not fit")
ANSWERS: tuple[Answer, ...] = get_args(Answer)
VIAS = ("engine", "trace")  # where an answer comes from: memplan's own stacks, or a traced step
BASES = ("derived", "measured", "assumed", "traced")


class Parameters(NamedTuple):
    """Parameter counts.

    total      of the model
    trainable  those that train
    active     those of the model that one token is multiplied by
    """

    total: int
    trainable: int
    active: int


class _Lazy:
    """Figures that are computed when asked for, and equal if they all are."""

    __slots__ = ("_usage",)

    def __init__(self, usage: Usage) -> None:
        self._usage = usage

    def as_dict(self) -> Mapping[str, object]:
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self.as_dict() == other.as_dict()

    def __hash__(self) -> int:
        return hash(tuple(self.as_dict().values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.as_dict().items())})"


class Bytes(_Lazy):
    """Peak bytes.

    allocated  torch's tensors, as torch.cuda.max_memory_allocated counts them
    reserved   torch's segments
    used       what nvidia-smi shows for the process

    `reserved` and `used` are computed when asked for.
    """

    __slots__ = ()

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


class Card(NamedTuple):
    """The GPU of the run: the usable bytes of one, and how many there are."""

    name: str
    usable: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride] (the contract's word)


class Verdict(_Lazy):
    """Whether the run fits.

    answer    fits, tight, does not fit, or does not start: the engine refuses the run though its requests fit; None
              without a GPU
    headroom  usable bytes minus used ones
    reason    why it does not start, else None
    """

    __slots__ = ()

    @property
    def answer(self) -> Answer | None:
        return self._usage.answer

    @property
    def headroom(self) -> int | None:
        return None if self._usage.usable is None else self._usage.usable - self._usage.used

    @property
    def reason(self) -> str | None:
        return self._usage.reason

    def as_dict(self) -> dict[str, str | int | None]:
        reason = {} if self.reason is None else {"reason": self.reason}
        return {"answer": self.answer, "headroom": self.headroom, **reason}


class Peak(NamedTuple):
    """The moment of the peak: its phase, and the operation at `where`."""

    phase: str
    where: str


class Phase(NamedTuple):
    """The peak of one phase. `step` is 1 or 2 if the first step differs from later ones, else None."""

    phase: str
    step: int | None
    peak: int
    where: str


class HostPhase(NamedTuple):
    """Host memory in one phase: loading, a step or a side task.

    phase   load, step, or the side task's
    rank    bytes of one process
    node    bytes of all processes on a node
    mapped  bytes of the files that they map and share
    """

    phase: str
    rank: int
    node: int
    mapped: int


class Host(NamedTuple):
    """Host memory, phase by phase. `ranks` is the number of the run's processes per node.

    Bytes of a rank are those of the process with the most.
    """

    ranks: int
    phases: tuple[HostPhase, ...]

    @property
    def peak(self) -> HostPhase:
        """The phase in which a node has the most; the later one of equals."""
        return max(reversed(self.phases), key=lambda phase: phase.node)

    def as_dict(self) -> dict[str, Any]:
        return {"ranks": self.ranks, "peak": self.peak.phase, "phases": [phase._asdict() for phase in self.phases]}


class Rank(NamedTuple):
    """The ranks of one pipeline stage, and their part of the answer.

    layers      layers of the stage
    parameters  parameters of the stage
    in_flight   most micro-batches whose saved tensors are held at once
    """

    stage: int
    layers: int
    parameters: int
    in_flight: int
    bytes: Bytes
    peak: Peak
    verdict: Verdict

    @classmethod
    def of(cls, usage: Usage, top: Phase, stage: int, layers: int, parameters: int, in_flight: int = 1) -> Rank:
        """Return the ranks of a stage from what one takes of its card, and the phase of its peak."""
        peak = Peak(top.phase, top.where)
        return cls(stage, layers, parameters, in_flight, Bytes(usage), peak, Verdict(usage))

    def as_dict(self) -> dict[str, Any]:
        parts = {"bytes": self.bytes.as_dict(), "peak": self.peak._asdict(), "verdict": self.verdict.as_dict()}
        return {**self._asdict(), **parts}


class Line(NamedTuple):
    """One kind of tensor alive at the peak: `count` tensors of `bytes` in all.

    shape  in the letters of `memplan.core.ir`
    dims   the same shape in numbers
    why    what keeps it alive
    basis  one of `BASES`
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


class Walk(Replay):
    """A run on one rank, walked through its phases. Training, inference, serving and a trace each implement it.

    An `Estimate` is made of one walk: it reads the peaks at once and everything else when asked. Bytes are of one GPU.

    phases         peak of each phase, in the order they run
    is_calibrated  whether a machine's own profile says something about the run

    The other attributes are as in `Estimate`.
    """

    run: RunSpec
    phases: Sequence[Phase]
    via: str = "engine"
    unsupported: tuple[str, ...] = ()
    is_calibrated: bool = True

    @property
    def top(self) -> Phase:
        """The phase of the peak."""
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def peak(self) -> int:
        return self.top.peak

    @classmethod
    def fullest(cls, walks: Sequence[Walk]) -> Walk:
        """Return the walk of the rank with the most, among ranks that differ."""
        return max(walks, key=lambda walk: walk.peak)

    def with_side_tasks(self, model: ModelSpec | None) -> Walk:
        """Return the walk with what the run asks for in addition (`also`). `model` is the run's, if looked up already.

        Raises SpecError for a side task that the run cannot have.
        """
        del model
        return self

    @property
    def parts(self) -> Mapping[str, object]:
        """The parts of the run with every null filled in."""
        raise NotImplementedError

    @property
    def parameters(self) -> Parameters:
        raise NotImplementedError

    @property
    def host_bytes(self) -> int:
        """Peak bytes of one process in host memory."""
        return 0

    def host(self) -> Host:
        """Return host memory, phase by phase."""
        return Host(1, (HostPhase("step", self.host_bytes, self.host_bytes, 0),))

    def notes(self) -> Iterable[str]:
        """Yield notes for the report."""
        raise NotImplementedError

    def serving(self) -> Mapping[str, Any] | None:
        """Return how a serving engine divides its card; None without an engine."""
        return None

    def usage(self, calibration: Calibration | None) -> Usage:
        """Return what the rank takes of its card."""
        return Usage(self, calibration)

    def lines(self, at: Phase) -> Iterable[Line]:
        """Return every tensor alive at the peak of a phase, largest first."""
        raise NotImplementedError

    def moments(self) -> Iterable[Phase]:
        """Yield the bytes allocated whenever memory is about to fall, in order, in the step with the peak."""
        raise NotImplementedError

    def kinds(self) -> Iterable[Mapping[str, int]]:
        """Yield the bytes of each kind at every moment of `moments`."""
        return (bytes_by_kind(self.lines(phase)) for phase in self.moments())

    def ranks(self, calibration: Calibration | None) -> Iterable[Rank]:
        """Yield the ranks that differ, by stage; nothing if all are alike."""
        del calibration
        return ()

    def counts(self, at: Phase) -> Iterable[Mapping[int, int]] | None:
        """Return for each moment of a phase how many tensors of each size in bytes are alive; None if unknown."""
        del at


def bytes_by_kind(lines: Iterable[Line]) -> Counter[str]:
    """Return the bytes of each kind of tensor in a ledger."""
    out: Counter[str] = Counter()
    for line in lines:
        out[line.kind] += line.bytes
    return out


def largest_first(lines: Iterable[Line]) -> list[Line]:
    """Return a ledger's lines in its order."""
    return sorted(lines, key=lambda line: (-line.bytes, line.where, line.what))


class Estimate:
    """The answer for one run. Immutable; equal if the run, the calibration and `via` (one of `VIAS`) are.

    All but the bytes of the peak is computed when asked for.
    """

    asked: RunSpec
    walk: Walk
    parameters: Parameters
    bytes: Bytes
    gpu: Card | None
    verdict: Verdict
    peak: Peak
    phases: tuple[Phase, ...]
    unsupported: tuple[str, ...]
    notes: tuple[str, ...]
    origins: tuple[FieldOrigin, ...]
    calibration: Calibration | None
    via: str
    _usage: Usage

    def __init__(self, walk: Walk, calibration: Calibration | None = None) -> None:
        """Create the answer for the run of a walk. A `calibration` of another card is ignored."""
        calibration = calibration_of(walk.gpu, calibration) if walk.is_calibrated else None
        usage = walk.usage(calibration)
        own = {"asked": walk.run, "walk": walk, "calibration": calibration, "origins": (), "via": walk.via}
        vars(self).update(own, _usage=usage, bytes=Bytes(usage), verdict=Verdict(usage))

    if not TYPE_CHECKING:  # whose attributes are those above

        def __getattr__(self, name):
            if name not in _COMPUTED:
                raise AttributeError(f"an answer has no {name}", name=name, obj=self)
            return vars(self).setdefault(name, _COMPUTED[name](self))

    def read_from(self, origins: tuple[FieldOrigin, ...], unread: tuple[str, ...]) -> Estimate:
        """Return the answer for a run that was read from a file: with each value's origin, and the keys left out."""
        answer = object.__new__(Estimate)
        vars(answer).update(vars(self), origins=origins, unsupported=(*self.unsupported, *unread))
        return answer

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"an answer cannot be changed: {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"an answer cannot be changed: {name}")

    @cached_property
    def run(self) -> RunSpec:
        """The run with every null filled in, as its profile decides."""
        gpu = self.gpu.name if self.gpu else None
        return with_known_profile(self.asked).model_copy(update={**self.walk.parts, "gpu": gpu})

    @cached_property
    def host_bytes(self) -> int:
        """Peak bytes of one process in host memory."""
        return self.walk.host_bytes

    @cached_property
    def host(self) -> Host:
        """Host memory, phase by phase."""
        return self.walk.host()

    @cached_property
    def serving(self) -> Mapping[str, Any] | None:
        """How a serving engine divides its card; None without an engine."""
        facts = self.walk.serving()
        return None if facts is None else FrozenDict(facts)

    @property
    def fits(self) -> bool:
        """Whether the run's memory fits the card, also if its engine does not start. Cheaper than the verdict."""
        return self._usage.fits

    @property
    def is_ruled_out(self) -> bool:
        """Whether bounds tell, without a long replay, that the run does not surely fit its card."""
        return self._usage.is_ruled_out

    @property
    def may_fit(self) -> bool:
        """Whether memory that does not fit may fit. Cheaper than the verdict."""
        return self._usage.may_fit

    @property
    def least(self) -> int:
        """The fewest usable bytes that a card needs to hold the run."""
        return self._usage.least

    @property
    def ample(self) -> int:
        """The fewest usable bytes with which a card of this kind surely holds the run, as far as the bounds tell."""
        return self._usage.ample

    @property
    def most(self) -> int:
        """The most that a card with room to spare may show for the run: what a shared card sets aside for it."""
        return self._usage.most

    def answer_on(self, usable: int) -> Answer:
        """Return the answer for a card of the same kind with `usable` bytes. A serving engine's is of its own card."""
        return self._usage.answer_on(usable)

    def fits_card_of(self, usable: int, replayed: bool = False) -> bool | None:
        """Return whether a card of this kind with `usable` bytes holds the run, or None if the bounds do not tell.

        `replayed` also allows one replay of the allocations, shared by all such cards.
        """
        return self._usage.fits_card_of(usable, replayed)

    @property
    def band(self) -> Band:
        """The range in which `bytes.used` falls in most runs."""
        return self._usage.band

    @property
    def beside(self) -> tuple[Overhead, ...]:
        """Memory of the process outside torch's segments: the CUDA context and NCCL's communicators."""
        return self._usage.overheads

    @cached_property
    def ledger(self) -> tuple[Line, ...]:
        """Every tensor alive at the peak, largest first. Sums to `bytes.allocated`.

        Raises InternalError if it does not, or if a line is negative.
        """
        lines = tuple(self.walk.lines(self.walk.top))
        for line in lines:
            if line.bytes < 0 or line.count < 1:
                raise InternalError(f"{line.count} × {line.what} take {line.bytes} bytes at the peak")
        total = sum(line.bytes for line in lines)
        if total != self.bytes.allocated:
            raise InternalError(f"the tensors at the peak sum to {total} bytes, not {self.bytes.allocated}")
        return lines

    @cached_property
    def timeline(self) -> tuple[Phase, ...]:
        """The bytes allocated whenever memory is about to fall, in order, in the step with the peak."""
        return tuple(self.walk.moments())

    @cached_property
    def timeline_kinds(self) -> tuple[Mapping[str, int], ...]:
        """The bytes of each kind at every moment of the timeline; they sum to its peaks."""
        return tuple(self.walk.kinds())

    @cached_property
    def ranks(self) -> tuple[Rank, ...]:
        """The ranks that differ, by pipeline stage; empty if all are alike.

        The answer is that of the stage with the most, or of the stage that the run asks for.
        """
        return tuple(self.walk.ranks(self.calibration))

    @cached_property
    def categories(self) -> dict[str, int]:
        """Bytes at the peak by kind, in torch MemTracker's terms. Sums to `bytes.allocated`."""
        return FrozenDict({**dict.fromkeys(KINDS, 0), **bytes_by_kind(self.ledger)})

    def model_dump(self, include: Collection[str] | None = None) -> dict[str, Any]:
        """Return the answer as the JSON contract defines it; only the parts in `include`, whose others cost nothing."""
        names = (name for name in DUMPED if name != "origins" or self.origins) if include is None else include
        return {name: DUMPED[name](self) for name in names}

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


def _phases(answer: Estimate) -> tuple[Phase, ...]:
    """Return the peak of each phase, in the order they run. Raises InternalError if one is not a byte count."""
    for phase in answer.walk.phases:
        if type(phase.peak) is not int or phase.peak < 0:
            raise InternalError(f"{phase.phase} takes {phase.peak} bytes at {phase.where or 'its peak'}")
    return tuple(answer.walk.phases)


def _card(answer: Estimate) -> Card | None:
    gpu = answer.walk.gpu
    return Card(gpu.name, gpu.usable, answer.asked.parallelism.world) if gpu else None


def _notes(answer: Estimate) -> tuple[str, ...]:
    measured = (answer.calibration.named(),) if answer.calibration else ()
    return (*profile_note(answer.asked), *answer.walk.notes(), *measured)


# Field of an answer -> what computes it when it is first asked for.
_COMPUTED: Mapping[str, Callable[[Estimate], Any]] = {
    "parameters": lambda answer: answer.walk.parameters,
    "gpu": _card,
    "peak": lambda answer: Peak(answer.walk.top.phase, answer.walk.top.where),
    "phases": _phases,
    "unsupported": lambda answer: answer.walk.unsupported,
    "notes": _notes,
}

# Part of an answer as JSON -> what writes it.
DUMPED: Mapping[str, Callable[[Estimate], Any]] = {
    "schema_version": lambda _: SCHEMA_VERSION,
    "memplan_version": lambda _: __version__,
    "via": lambda answer: answer.via,
    "run": lambda answer: answer.run.model_dump(mode="json"),
    "parameters": lambda answer: answer.parameters._asdict(),
    "bytes": lambda answer: answer.bytes.as_dict(),
    "band": lambda answer: answer.band._asdict(),
    "gpu": lambda answer: answer.gpu._asdict() if answer.gpu else None,
    "verdict": lambda answer: answer.verdict.as_dict(),
    "peak": lambda answer: answer.peak._asdict(),
    "phases": lambda answer: [phase._asdict() for phase in answer.phases],
    "categories": lambda answer: dict(answer.categories),
    "ledger": lambda answer: [{**line._asdict(), "dims": list(line.dims)} for line in answer.ledger],
    "beside": lambda answer: [row._asdict() for row in answer.beside],
    "host_bytes": lambda answer: answer.host_bytes,
    "serving": lambda answer: dict(answer.serving) if answer.serving is not None else None,
    "host": lambda answer: answer.host.as_dict(),
    "ranks": lambda answer: [rank.as_dict() for rank in answer.ranks],
    "unsupported": lambda answer: list(answer.unsupported),
    "notes": lambda answer: list(answer.notes),
    "origins": lambda answer: [origin._asdict() for origin in answer.origins],
}


def phase_peaks(answer: Estimate) -> dict[str, int]:
    """Return the peak of every phase over all steps."""
    out: dict[str, int] = {}
    for phase in answer.phases:
        out[phase.phase] = max(out.get(phase.phase, 0), phase.peak)
    return out


class Holding(NamedTuple):
    """A GPU that holds the run, and whether it fits or is tight."""

    gpu: GPU
    answer: Answer
