"""Many runs at once: batch x sequence x rank, with numpy arrays in place of a single run's numbers.

A program's moments are linear in its variables (see `memplan.engine.walk`), so all runs of one program are one matrix
product. Every rank needs a program of its own, and so do a batch of one sequence, sequences longer than the model's
window, and sequences that fit in one chunk of the loss.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from operator import index, mul
from typing import TYPE_CHECKING, Any, cast

from memplan.catalogue.kernels.losses import loss_chunks
from memplan.catalogue.kernels.wiring import GENERATING
from memplan.core.arithmetic import ONE_RUN, Arithmetic
from memplan.core.cached_property import cached_property
from memplan.core.errors import MemplanError, SpecError
from memplan.core.records import NamedTuple
from memplan.engine.walk import values
from memplan.estimate.answer import BY_MEMORY
from memplan.estimate.estimate import estimate
from memplan.estimate.training_peaks import resident_bytes, workspace_of
from memplan.estimate.usage import SegmentRoom, calibration_of, enough_for_segments, room, run_overhead
from memplan.models.cards import find_model
from memplan.models.configs.images import pictures_of, takes_images
from memplan.planning.trials import FIELDS
from memplan.program.axes import run_axes
from memplan.program.run import ResolvedRun
from memplan.program.sharding.choice import sharding_of
from memplan.program.training.program import Program, phase_offsets, program
from memplan.resolve.batches import check_batch
from memplan.resolve.decide import decide
from memplan.resolve.refusals.across_parts import refuse_unless_training
from memplan.spec.run import RunSpec, changed
from memplan.spec.training import Also

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from memplan.estimate.calibration import Calibration

STEP_PHASES = (
    *("load", "forward", "loss", "backward", "step", "eval", "generate", "save", "merge"),
    *("reference", "teacher", "reward"),
)
FITS, TIGHT, DOES_NOT_FIT = range(len(BY_MEMORY))
UNCLEAR, CANNOT_RUN = 3, 4
_CHUNK = 16384  # runs per call: few enough to stay in the cache, enough to be worth a call
_BLAS_SERIAL = 2**17  # multiplications per call: with more, BLAS starts threads, which takes longer than it saves
_INT64_OVERFLOW = 2**63  # bytes that int64 cannot hold
_MAX_EXACT = 2**53  # larger integers are not exact in a double


class Grid:
    """The answers of a run over a grid of values. Arrays have an axis for each swept field, in the order batch,
    sequence, rank; runs that memplan refuses (more tokens than learned positions, say) are -1.

    run         the run the grid was made from
    axes        the values of each swept field
    allocated   int64: `bytes.allocated` of each run
    phases      int8: the phase of the peak, as an index into `STEP_PHASES`
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
        """Number of runs whose verdict needs a replay of their allocations, which takes milliseconds each."""
        import numpy as np

        return 0 if self._clear is None else int(np.count_nonzero(self._clear == UNCLEAR))

    @cached_property
    def answers(self) -> NDArray[np.int8] | None:
        """int8: each verdict as an index into `memplan.estimate.answer.BY_MEMORY`, or -1. None without a GPU.

        Computed on first access, which replays the runs that are unclear.
        """
        import numpy as np

        if self._clear is None:
            return None
        codes = np.where(self._clear == CANNOT_RUN, np.int8(-1), self._clear)
        for place in map(tuple, np.argwhere(self._clear == UNCLEAR)):
            answer = estimate(self.at(*map(int, place)), self._calibration)
            codes[place] = FITS if answer.fits else TIGHT if answer.may_fit else DOES_NOT_FIT
        return codes

    @property
    def verdict(self) -> NDArray[np.str_] | None:
        """Verdicts as strings: fits, tight, does not fit, or empty if the run is refused. None without a GPU."""
        import numpy as np

        return None if self.answers is None else np.array([*BY_MEMORY, ""])[self.answers]

    def at(self, *place: int) -> RunSpec:
        """Return the run at an index of the arrays."""
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
    """Estimate the run for all combinations of the given `batch.micro`, `batch.sequence` and `method.rank` values.

    Results equal those of `estimate`. Handles millions of runs per second, except for verdicts that need a replay (see
    `Grid.unclear`). Needs numpy.

    Raises SpecError if no values are given or a value is invalid, and whatever `estimate` raises if every run is
    refused.
    """
    import numpy as np

    refuse_unless_training(run, "a grid")
    arguments = {"batch": batch, "sequence": sequence, "rank": rank}
    axes = {name: tuple(map(index, listed)) for name, listed in arguments.items() if listed is not None}
    if not axes:
        raise SpecError("grid: give the values to try for batch, sequence or rank", "grid")
    for name, listed in axes.items():
        if not listed:
            raise SpecError(f"{name}: no value to try", name)
        for value in (min(listed), max(listed)):  # every value between valid ones is valid
            _changed(run, {name: value})
    values = {name: sorted(set(axes.get(name) or (_value(run, name),))) for name in ("rank", "batch", "sequence")}
    shape = tuple(map(len, values.values()))
    out = _Arrays(np.full(shape, -1, np.int64), np.full(shape, -1, np.int8), np.full(shape, CANNOT_RUN, np.int8))
    refused: MemplanError | None = None
    for k, value in enumerate(values["rank"]):
        ranked = _changed(run, {"rank": value}) if "rank" in axes else run
        for rows, columns in _same_program(ranked, values["batch"], values["sequence"]):
            part = out.part(k, rows, columns)
            try:
                _fill(part, ranked, calibration, values["batch"][rows], values["sequence"][columns])
            except MemplanError as error:  # a rank that is too large, say; others may work
                refused = refused or error
    if refused is not None and not (out.allocated >= 0).any():
        raise refused
    places = [[bisect_left(values[name], value) for value in axes.get(name) or values[name]] for name in FIELDS]
    swept = tuple(map(len, axes.values()))

    def in_given_order(array: NDArray[Any]) -> NDArray[Any]:
        """Reorder the array to the given values, with an axis for each swept field."""
        array = np.moveaxis(array, 0, -1)
        for axis, place in enumerate(places):
            if place != list(range(array.shape[axis])):
                array = array.take(place, axis)
        return array.reshape(swept)

    clear = None if run.gpu is None else in_given_order(out.clear)
    return Grid(run, axes, calibration, in_given_order(out.allocated), in_given_order(out.phases), clear)


class _Arrays(NamedTuple):
    """Arrays over runs: allocated bytes, the phase of the peak, and the verdict if bounds decide it."""

    allocated: NDArray[np.int64]
    phases: NDArray[np.int8]
    clear: NDArray[np.int8]

    def part(self, *place: int | slice) -> _Arrays:
        """Return views of the arrays."""
        return _Arrays(self.allocated[place], self.phases[place], self.clear[place])


def _changed(run: RunSpec, values: Mapping[str, int]) -> RunSpec:
    for name, value in values.items():
        part, field = FIELDS[name]
        run = changed(run, part, **{field: value})
    return run


def _value(run: RunSpec, name: str) -> int:
    part, field = FIELDS[name]
    return cast(int, getattr(getattr(run, part), field))


def _same_program(run: RunSpec, batches: list[int], sequences: list[int]) -> Iterator[tuple[slice, slice]]:
    """Yield slices of the sorted batches and sequences that share a program, and are all valid or all invalid."""
    model = find_model(run.model)
    ends = {0, len(sequences)}
    if model.sliding_window is not None:
        ends.add(bisect_left(sequences, model.sliding_window))
    ends.add(bisect_right(sequences, model.scan_chunk))
    if run.batch.sees and takes_images(model, bool(run.batch.clips)):
        images, picture = pictures_of(model, *run.batch.seen)
        ends.add(bisect_left(sequences, images * picture.tokens))  # the images do not fit into shorter sequences
    if model.learned_positions and model.longest_sequence is not None:
        ends.add(bisect_right(sequences, model.longest_sequence))
    loss = run.kernels.loss or ""
    one_by_one = run.trainer in GENERATING  # a batch that is not one of whole prompts is invalid
    one_by_one |= "chunked_nll" in loss  # whose chunks are of all sequences
    starts = range(len(batches)) if one_by_one else (0, bisect_right(batches, 1))
    for rows in pairwise(sorted({*starts, len(batches)})):
        chunks = [dict(loss_chunks(batches[rows[0]], length)).get(loss) for length in sequences]
        for columns in pairwise(sorted(ends.union(i for i in range(1, len(chunks)) if chunks[i] != chunks[i - 1]))):
            yield slice(*rows), slice(*columns)


def _fill(
    out: _Arrays, run: RunSpec, calibration: Calibration | None, batches: list[int], sequences: list[int]
) -> None:
    """Answer the runs of one program, with batches as rows and sequences as columns."""
    import numpy as np

    first = _changed(run, {"batch": batches[0], "sequence": sequences[0]})
    decided = decide(first)
    # a pipeline's worst stage depends on the run, as does the memory of evaluations, saves and a trainer's generation,
    # and a compiled run's range; in a packed row the window is reached by several sequences
    is_single = run.also != Also() or run.trainer in GENERATING or run.batch.packing is not None or run.kernels.compile
    if decided.structure.graph.degrees.pp > 1 or is_single:
        _one_by_one(out, run, calibration, batches, sequences)
        return
    p = program(decided.structure)
    check_batch(decided.batch, p.structure.graph.model)
    if decided.batch.sequence != first.batch.sequence:  # fixed by the model's config
        sequences = [decided.batch.sequence] * len(sequences)
    target = _target(decided, run)
    lengths = (decided.pictures, target)
    top = run_axes(p, batches[-1], sequences[-1], decided.half, decided.large_tiles, ONE_RUN, *lengths)
    if _upper_bound(p, values(p.moments.variables, top)) >= _MAX_EXACT:
        _one_by_one(out, run, calibration, batches, sequences)
        return
    b, s = np.array(batches)[:, None], np.array(sequences)[None, :]
    walk = _Walk(decided, calibration_of(decided.gpu, calibration), target)
    width = min(_CHUNK, len(sequences))
    height = max(1, _CHUNK // width)
    for i in range(0, len(batches), height):
        for j in range(0, len(sequences), width):
            rows, columns = slice(i, i + height), slice(j, j + width)
            walk.over(b[rows], s[:, columns], out.part(rows, columns))


def _target(decided: ResolvedRun, run: RunSpec) -> int | None:
    """Return the decoder's length if it does not follow the encoder's."""
    model = decided.structure.graph.model
    return run.batch.target_sequence or (model.longest_target if model.only_sequence is not None else None)


def _upper_bound(p: Program, values: Sequence[int]) -> int:
    """Return the largest variable or moment, given the largest value of every variable."""
    rows = [
        term.coefficients
        for terms in (p.moments.terms.first, p.moments.terms.later)
        for phase in terms.values()
        for term in phase
    ]
    return max(*values, *(sum(map(mul, row, values)) for row in (*rows, p.moments.held)))


def _one_by_one(
    out: _Arrays, run: RunSpec, calibration: Calibration | None, batches: list[int], sequences: list[int]
) -> None:
    """Answer runs separately, for pipelines and for bytes that a double cannot hold exactly."""
    largest = estimate(_changed(run, {"batch": batches[-1], "sequence": sequences[-1]}))
    if largest.bytes.allocated >= _INT64_OVERFLOW:
        raise SpecError(f"batch: {batches[-1]} x {sequences[-1]} tokens take more bytes than int64 holds", "batch")
    for i, batch in enumerate(batches):
        for j, sequence in enumerate(sequences):
            answer = estimate(_changed(run, {"batch": batch, "sequence": sequence}), calibration)
            out.allocated[i, j] = answer.bytes.allocated
            out.phases[i, j] = STEP_PHASES.index(answer.peak.phase)
            if answer.gpu is not None:
                out.clear[i, j] = BY_MEMORY.index(str(answer.verdict.answer))


class _Walk:
    """The walk of one program over arrays."""

    def __init__(self, decided: ResolvedRun, calibration: Calibration | None, target: int | None) -> None:
        import numpy as np

        p = program(decided.structure)
        self._program, self._decided, self._target = p, decided, target
        no_gradients = dict.fromkeys(p.accumulated, 0)
        passes = [(p.moments.terms.first, no_gradients)] + (
            [(p.moments.terms.later, p.accumulated)] if p.structure.accumulates else []
        )
        self._terms: list[tuple[str, slice, int]] = []  # per phase and pass: rows of its moments, constant bytes
        rows: list[tuple[int, ...]] = []
        for phase in p.accumulated:
            for terms, constant in passes:
                start = len(rows)
                rows += [term.coefficients for term in terms[phase]]
                self._terms.append((phase, slice(start, len(rows)), constant[phase]))
        if p.moments.held:
            rows.append(p.moments.held)
        matrix = np.array(rows, float)
        used = [v for v in range(len(p.moments.variables)) if matrix[:, v].any()]
        self._matrix = matrix[:, used]
        self._variables = [p.moments.variables[v] for v in used]
        self._block = max(64, _BLAS_SERIAL // self._matrix.size)
        peaks: dict[str, tuple[int, int]] = {"load": (p.loading, 0)}  # constant bytes, and order
        for i, offset in enumerate(phase_offsets(p.structure, workspace_of(decided)), 1):
            peaks[offset.phase] = max(peaks.get(offset.phase, (0, 0)), (offset.bytes, i))
        self._constant = [(phase, peaks[phase][0]) for phase in sorted(peaks, key=lambda phase: peaks[phase][1])]
        gpu = decided.gpu
        self._room: SegmentRoom | None = None
        if gpu is not None:
            left = room(gpu.usable, run_overhead(gpu, decided.communicators, calibration))
            self._room = left._replace(sure=left.sure - sharding_of(decided.structure).idle_in_streams())

    def over(self, b: NDArray[np.int64], s: NDArray[np.int64], out: _Arrays) -> None:
        """Answer the runs of a column of batches and a row of sequences."""
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
        variable: dict[str, Any] = {}
        for phase, rows, constant in self._terms:
            peak = moments[rows].max(axis=0)
            peak += constant
            variable[phase] = np.maximum(variable[phase], peak) if phase in variable else peak
        if p.moments.held:
            variable["step"] = moments[-1]
        allocated = np.zeros(shape)
        for phase, bytes_ in self._constant:
            peak = variable.get(phase, 0) + bytes_
            np.copyto(out.phases, STEP_PHASES.index(phase), where=peak >= allocated)
            np.maximum(allocated, peak, out=allocated)
        out.allocated[...] = allocated
        if self._room is not None:
            # Verdicts that bounds decide; see memplan.estimate.usage.Usage.told.
            lives = enough_for_segments(out.allocated, resident_bytes(p), p.loading, _many()) <= self._room.sure
            out.clear[...] = UNCLEAR
            np.copyto(out.clear, FITS, where=lives)
            np.copyto(out.clear, DOES_NOT_FIT, where=out.allocated > self._room.possible)


@cache
def _many() -> Arithmetic[NDArray[np.int64]]:
    """Return the arithmetic for arrays of runs."""
    import numpy as np

    def power_of_two(n: NDArray[np.int64]) -> NDArray[np.int64]:
        _, exponent = np.frexp((n - 1).astype(float))  # 2**(exponent - 1) <= n - 1 < 2**exponent
        return np.left_shift(np.int64(1), exponent.astype(np.int64))

    return Arithmetic(np.minimum, np.maximum, np.where, power_of_two)
