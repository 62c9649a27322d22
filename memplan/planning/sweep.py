"""Many runs at once: batch x sequence x rank as arrays, by the walk of one run over arrays instead of numbers.

A program's moments are linear in its variables (see `memplan.engine.walk`): for many runs that is a product of
matrices. Each rank is a program of its own, as are a batch of one sequence, sequences beyond the model's window, and
those of one chunk of the loss.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from operator import index, mul
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from memplan.catalogue.kernels.losses import CHUNK
from memplan.core.arithmetic import ONE_RUN, Arithmetic
from memplan.core.cached_property import cached_property
from memplan.core.errors import MemplanError, SpecError
from memplan.engine.walk import values
from memplan.estimate.answer import ANSWERS
from memplan.estimate.calibration import Calibration, calibration_of
from memplan.estimate.estimate import estimate
from memplan.estimate.usage import Room, around_of, enough, resident, room
from memplan.estimate.walk import workspace_of
from memplan.models.cards import find_model
from memplan.models.configs.images import picture_of, sees
from memplan.program.axes import run_axes
from memplan.program.run import Decided
from memplan.program.training.program import PHASES, Program, phase_peaks, program
from memplan.program.training.replay import streams_apart
from memplan.resolve.batches import check_batch
from memplan.resolve.decide import decide
from memplan.resolve.refusals import refuse_untrained
from memplan.spec.run import RunSpec, changed
from memplan.spec.training import Also

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STEP_PHASES = ("load", *PHASES, "step", "eval", "generate", "save", "merge")
FITS, TIGHT, DOES_NOT_FIT = range(len(ANSWERS))
UNCLEAR, CANNOT_RUN = 3, 4
FIELDS = {"batch": ("batch", "micro"), "sequence": ("batch", "sequence"), "rank": ("method", "rank")}
_CHUNK = 16384  # runs at a time: what they take stays near the core, and a call is worth its while
_ONE_CORE = (
    2**17
)  # multiplications at a time: with more a BLAS shares them among cores, which takes longer than they do
_HELD = 2**63  # bytes from which on int64 does not hold them
_EXACT = 2**53  # whole numbers above are not all in a double


class Grid:
    """The answers of a run for every value of some of its fields. Arrays have an axis for each field that was swept,
    in the order batch, sequence, rank.

    axes        the fields that were swept, and their values
    allocated   int64: `bytes.allocated` of each run; -1 where a run cannot be (more tokens than learned positions, say)
    phases      int8: the phase of the peak, as an index into `STEP_PHASES`; -1 where a run cannot be
    """

    def __init__(
        self,
        run: RunSpec,
        axes: Mapping[str, tuple[int, ...]],
        calibration: Calibration | None,
        allocated: NDArray[np.int64],
        phases: NDArray[np.int8],
        clear: NDArray[np.int8] | None,
    ) -> None:
        self.run = run
        self.axes = dict(axes)
        self.allocated = allocated
        self.phases = phases
        self._calibration = calibration
        self._clear = clear

    @property
    def unclear(self) -> int:
        """How many runs have a verdict that takes a replay of their allocations, milliseconds each."""
        import numpy as np

        return 0 if self._clear is None else int(np.count_nonzero(self._clear == UNCLEAR))

    @cached_property
    def answers(self) -> NDArray[np.int8] | None:
        """int8: each verdict as an index into `memplan.estimate.answer.ANSWERS`; -1 where a run cannot be. None without
        a GPU.

        Made when asked for: what is unclear is replayed.
        """
        import numpy as np

        if self._clear is None:
            return None
        codes = np.where(self._clear == CANNOT_RUN, np.int8(-1), self._clear)
        for place in map(tuple, np.argwhere(self._clear == UNCLEAR)):
            answer = estimate(self.at(*map(int, place)), self._calibration).verdict.answer
            codes[place] = ANSWERS.index(str(answer))
        return codes

    @property
    def verdict(self) -> NDArray[np.str_] | None:
        """The verdicts in words: fits, tight, does not fit, or empty where a run cannot be. None without a GPU."""
        import numpy as np

        return None if self.answers is None else np.array([*ANSWERS, ""])[self.answers]

    def at(self, *place: int) -> RunSpec:
        """The run at a place of the arrays."""
        changes = {name: values[i] for (name, values), i in zip(self.axes.items(), place, strict=True)}
        return _changed(self.run, changes)


def grid(
    run: RunSpec,
    *,
    batch: Sequence[int] | None = None,
    sequence: Sequence[int] | None = None,
    rank: Sequence[int] | None = None,
    calibration: Calibration | None = None,
) -> Grid:
    """The run for every `batch.micro`, `batch.sequence` and `method.rank` that is listed, each as `estimate` has it.

    Millions of runs a second, but for verdicts that a bound does not tell (see `Grid.unclear`). Needs numpy.

    Raises SpecError where nothing is listed, or a value is none that a run can have, and what `estimate` raises where
    the run cannot be answered whatever the values.
    """
    import numpy as np

    refuse_untrained(run, "a grid")
    given = {"batch": batch, "sequence": sequence, "rank": rank}
    axes = {name: tuple(map(index, listed)) for name, listed in given.items() if listed is not None}
    if not axes:
        raise SpecError("grid: name batch, sequence or rank, and the values it is to have", "grid")
    for name, listed in axes.items():
        if not listed:
            raise SpecError(f"{name}: no value to try", name)
        for value in (min(listed), max(listed)):  # all are good where these are
            _changed(run, {name: value})
    whole = {name: sorted(set(axes.get(name) or (_value(run, name),))) for name in ("rank", "batch", "sequence")}
    shape = tuple(map(len, whole.values()))
    out = _Found(np.full(shape, -1, np.int64), np.full(shape, -1, np.int8), np.full(shape, CANNOT_RUN, np.int8))
    refused: MemplanError | None = None
    for k, of_rank in enumerate(whole["rank"]):
        one = _changed(run, {"rank": of_rank}) if "rank" in axes else run
        for rows, columns in _alike(one, whole["batch"], whole["sequence"]):
            part = out.part(k, rows, columns)
            try:
                _fill(part, one, calibration, whole["batch"][rows], whole["sequence"][columns])
            except MemplanError as error:  # of a rank that is too large, say: others may do
                refused = refused or error
    if refused is not None and not (out.allocated >= 0).any():
        raise refused
    places = [[bisect_left(whole[name], value) for value in axes.get(name) or whole[name]] for name in FIELDS]
    swept = tuple(map(len, axes.values()))

    def asked(array: NDArray[Any]) -> NDArray[Any]:
        """As the values were listed, with an axis for each list."""
        array = np.moveaxis(array, 0, -1)
        for axis, place in enumerate(places):
            if place != list(range(array.shape[axis])):
                array = array.take(place, axis)
        return array.reshape(swept)

    clear = None if run.gpu is None else asked(out.clear)
    return Grid(run, axes, calibration, asked(out.allocated), asked(out.phases), clear)


class _Found(NamedTuple):
    """Arrays of runs: bytes allocated, the phase of the peak, and the verdict as far as bounds tell it."""

    allocated: NDArray[np.int64]
    phases: NDArray[np.int8]
    clear: NDArray[np.int8]

    def part(self, *place: int | slice) -> _Found:
        """Views of the arrays."""
        return _Found(self.allocated[place], self.phases[place], self.clear[place])


def _changed(run: RunSpec, values: Mapping[str, int]) -> RunSpec:
    for name, value in values.items():
        part, field = FIELDS[name]
        run = changed(run, part, **{field: value})
    return run


def _value(run: RunSpec, name: str) -> int:
    part, field = FIELDS[name]
    return cast(int, getattr(getattr(run, part), field))


def _alike(run: RunSpec, batches: list[int], sequences: list[int]) -> Iterator[tuple[slice, slice]]:
    """Batches and sequences, both sorted, that share a program, and that the model has positions for or has not."""
    model = find_model(run.model)
    ends = {0, len(sequences)}
    if model.sliding_window is not None:
        ends.add(bisect_left(sequences, model.sliding_window))
    if run.batch.images and sees(model.model_type):
        tokens = run.batch.images * picture_of(model, run.batch.image_size).tokens
        ends.add(bisect_left(sequences, tokens))  # shorter ones do not hold the images
    if run.kernels.loss == "chunked_lm_head":
        ends.add(bisect_right(sequences, CHUNK))
    if model.learned_positions and model.longest_sequence is not None:
        ends.add(bisect_right(sequences, model.longest_sequence))
    for rows in pairwise(sorted({0, bisect_right(batches, 1), len(batches)})):
        for columns in pairwise(sorted(ends)):
            yield slice(*rows), slice(*columns)


def _fill(out: _Found, run: RunSpec, calibration: Calibration | None, batches: list[int], sequences: list[int]) -> None:
    """Answer the runs of one program: an axis for batches, one for sequences."""
    import numpy as np

    first = _changed(run, {"batch": batches[0], "sequence": sequences[0]})
    decided = decide(first)
    # which stage holds most is each run's own, and what it does beside its steps
    if decided.structure.graph.degrees.pp > 1 or run.also != Also():
        _one_by_one(out, run, calibration, batches, sequences)
        return
    p = program(decided.structure)
    check_batch(decided.batch, p.structure.graph.model)
    if decided.batch.sequence != first.batch.sequence:  # what the model's config fixes
        sequences = [decided.batch.sequence] * len(sequences)
    target = _target(decided, run)
    lengths = (decided.pictures, target)
    top = run_axes(p, batches[-1], sequences[-1], decided.half, decided.large_tiles, ONE_RUN, *lengths)
    if _most(p, values(p.variables, top)) >= _EXACT:
        _one_by_one(out, run, calibration, batches, sequences)
        return
    b, s = np.array(batches)[:, None], np.array(sequences)[None, :]
    walk = _Walk(decided, calibration_of(decided.gpu, calibration), target)
    wide = min(_CHUNK, len(sequences))
    tall = max(1, _CHUNK // wide)
    for i in range(0, len(batches), tall):
        for j in range(0, len(sequences), wide):
            rows, columns = slice(i, i + tall), slice(j, j + wide)
            walk.over(b[rows], s[:, columns], out.part(rows, columns))


def _target(decided: Decided, run: RunSpec) -> int | None:
    """The decoder's length where it is not the encoder's, whatever that is."""
    model = decided.structure.graph.model
    return run.batch.target_sequence or model.longest_target


def _most(p: Program, values: Sequence[int]) -> int:
    """The most that a variable or a moment is, where every variable is at its most."""
    rows = [term.coefficients for terms in (p.first, p.later) for phase in terms.values() for term in phase]
    return max(*values, *(sum(map(mul, row, values)) for row in (*rows, p.held)))


def _one_by_one(
    out: _Found, run: RunSpec, calibration: Calibration | None, batches: list[int], sequences: list[int]
) -> None:
    """Where doubles do not hold the bytes. No card comes near, so that bounds tell every verdict."""
    largest = estimate(_changed(run, {"batch": batches[-1], "sequence": sequences[-1]}))
    if largest.bytes.allocated >= _HELD:
        raise SpecError(f"batch: {batches[-1]} x {sequences[-1]} tokens take more bytes than int64 holds", "batch")
    for i, batch in enumerate(batches):
        for j, sequence in enumerate(sequences):
            answer = estimate(_changed(run, {"batch": batch, "sequence": sequence}), calibration)
            out.allocated[i, j] = answer.bytes.allocated
            out.phases[i, j] = STEP_PHASES.index(answer.peak.phase)
            if answer.gpu is not None:
                out.clear[i, j] = ANSWERS.index(str(answer.verdict.answer))


class _Walk:
    """The walk of one program over arrays."""

    def __init__(self, decided: Decided, calibration: Calibration | None, target: int | None) -> None:
        import numpy as np

        p = program(decided.structure)
        self._program, self._decided, self._target = p, decided, target
        none = dict.fromkeys(PHASES, 0)
        passes = [(p.first, none)] + ([(p.later, p.accumulated)] if p.structure.accumulates else [])
        self._terms: list[tuple[str, slice, int]] = []  # of a phase and pass: the moments' rows, bytes beside them
        rows: list[tuple[int, ...]] = []
        for phase in PHASES:
            for terms, beside in passes:
                start = len(rows)
                rows += [term.coefficients for term in terms[phase]]
                self._terms.append((phase, slice(start, len(rows)), beside[phase]))
        if p.held:
            rows.append(p.held)
        matrix = np.array(rows, float)
        used = [v for v in range(len(p.variables)) if matrix[:, v].any()]
        self._matrix = matrix[:, used]
        self._variables = [p.variables[v] for v in used]
        self._block = max(64, _ONE_CORE // self._matrix.size)
        found: dict[str, tuple[int, int]] = {"load": (p.loading, 0)}
        for i, (phase, _, bytes_) in enumerate(phase_peaks(p, workspace_of(decided), [0, 0, 0], 0), 1):
            found[phase] = max(found.get(phase, (0, 0)), (bytes_, i))
        self._beside = [(phase, found[phase][0]) for phase in sorted(found, key=lambda phase: found[phase][1])]
        gpu = decided.gpu
        self._room: Room | None = None
        if gpu is not None:
            left = room(gpu.usable, around_of(gpu, decided.communicators, calibration))
            self._room = left._replace(sure=left.sure - streams_apart(decided.structure))

    def over(self, b: NDArray[np.int64], s: NDArray[np.int64], out: _Found) -> None:
        """The runs of a column of batches and a row of sequences."""
        import numpy as np

        p, decided = self._program, self._decided
        target = None if self._target is None else np.full_like(s, self._target)
        axes = run_axes(p, b, s, decided.half, decided.large_tiles, _many(), decided.pictures, target)
        shape = (b.shape[0], s.shape[1])
        numbers = np.empty((len(self._variables), *shape))
        for row, value in zip(numbers, values(self._variables, axes), strict=True):
            row[...] = value
        flat = numbers.reshape(len(numbers), -1)
        product = np.empty((len(self._matrix), flat.shape[1]))
        for i in range(0, flat.shape[1], self._block):
            np.matmul(self._matrix, flat[:, i : i + self._block], out=product[:, i : i + self._block])
        moments = product.reshape(-1, *shape)
        moving: dict[str, Any] = {}
        for phase, rows, beside in self._terms:
            most = moments[rows].max(axis=0)
            most += beside
            moving[phase] = np.maximum(moving[phase], most) if phase in moving else most
        if p.held:
            moving["step"] = moments[-1]
        allocated = np.zeros(shape)
        for phase, bytes_ in self._beside:
            peak = moving.get(phase, 0) + bytes_
            np.copyto(out.phases, STEP_PHASES.index(phase), where=peak >= allocated)
            np.maximum(allocated, peak, out=allocated)
        out.allocated[...] = allocated
        if self._room is not None:
            # The verdicts that bounds tell; see memplan.estimate.usage.Usage.told.
            lives = enough(out.allocated, resident(p), p.loading, _many()) <= self._room.sure
            out.clear[...] = UNCLEAR
            np.copyto(out.clear, FITS, where=lives)
            np.copyto(out.clear, DOES_NOT_FIT, where=out.allocated > self._room.possible)


@cache
def _many() -> Arithmetic[NDArray[np.int64]]:
    """How many runs are counted."""
    import numpy as np

    def power_of_two(n: NDArray[np.int64]) -> NDArray[np.int64]:
        _, exponent = np.frexp((n - 1).astype(float))  # a whole number below 2**exponent, and not below half of it
        return np.left_shift(np.int64(1), exponent.astype(np.int64))

    return Arithmetic(np.minimum, np.maximum, np.where, power_of_two)
