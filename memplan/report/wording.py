"""Wording shared by all reports: the verdict, the moment of the peak, tables of phases and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.gpus import find_gpu
from memplan.core.errors import printable
from memplan.core.units import GIB, decimal, gib, rounded
from memplan.estimate.answer import Estimate, Line, Phase

CATEGORIES = {
    "parameter": "parameters",
    "gradient": "gradients",
    "optstate": "optimizer states",
    "activation": "activations",
    "temp": "temporaries",
    "buffer": "buffers",
    "other": "workspaces",
}


class MemoryPart(NamedTuple):
    """A part of the used memory: a category of tensors, the allocator's cache, or the CUDA context."""

    key: str
    label: str
    bytes: int
    largest: str


def parts(answer: Estimate) -> list[MemoryPart]:
    """Return what is used at the peak: tensors by category, then the rest. Sums to `bytes.used`."""
    out: list[MemoryPart] = []
    for kind, label in CATEGORIES.items():
        if answer.categories[kind]:
            largest = next(line for line in answer.ledger if line.kind == kind)
            out.append(
                MemoryPart(
                    kind, label, answer.categories[kind], f"{times(largest)}{largest.what}, {gib(largest.bytes)}"
                )
            )
    held = answer.bytes
    if not without_torch(answer):
        out.append(
            MemoryPart(
                "allocator", "allocator's cache", held.reserved - held.allocated, "reserved by torch, in no tensor"
            )
        )
    uses_nccl = answer.run.parallelism.world > 1 and answer.run.parallelism.schedule != "device_map"
    contents = "driver and loaded kernels"
    if uses_nccl:
        groups = sum(row.what.startswith("NCCL's buffers") for row in answer.beside)
        contents = "driver, loaded kernels and NCCL"
        contents += f", in {groups} communicators" if groups > 1 else ""
    if answer.serving is not None and answer.verdict.answer == "does not fit":
        contents += ", and what the engine leaves free"
    out.append(MemoryPart("context", "CUDA context", held.used - held.reserved, contents))
    return out


def without_torch(answer: Estimate) -> bool:
    """Whether the run does not use torch, and so has no caching allocator."""
    return answer.run.profile.startswith("llama.cpp")


def card(answer: Estimate) -> GPU | None:
    """Return the GPU's catalogue row, if the run has a GPU."""
    return find_gpu(answer.gpu.name) if answer.gpu else None


def model(answer: Estimate) -> str:
    """Return the model's name."""
    asked = answer.asked.model
    name = asked if isinstance(asked, str) else str(asked.config.get("_name_or_path") or asked.config["model_type"])
    return printable(name)


def tenths(n: int) -> str:
    """Format bytes in GiB with one decimal, without the unit."""
    return decimal(n, GIB, 1)


def hundredths(n: int) -> str:
    """Format bytes in GiB with two decimals, without the unit.

    >>> hundredths(16_106_127_360), hundredths(512), hundredths(0)
    ('15.00', '<0.01', '0.00')
    """
    text = decimal(n, GIB, 2)
    return "<0.01" if n > 0 and text == "0.00" else text


def share(n: int, of: int) -> str:
    """Format `n` bytes as a percentage.

    >>> share(1, 4), share(1, 10_000)
    ('25.0%', '<0.1%')
    """
    text = f"{n / of:.1%}"
    return "<0.1%" if n > 0 and text == "0.0%" else text


def verdict(answer: Estimate) -> str:
    """Return the answer in one line."""
    used, gpu, headroom = tenths(answer.bytes.used), card(answer), answer.verdict.headroom
    if gpu is None or headroom is None:
        return f"uses {used} GiB ({band(answer)})"
    have = f"{tenths(gpu.usable)} GiB"
    match answer.verdict.answer:
        case "fits":
            return f"fits: {used} of {have} used on {gpu.title}, {tenths(headroom)} GiB free"
        case "tight":
            room = f"{tenths(headroom)} GiB free" if headroom >= 0 else f"{tenths(-headroom)} GiB over"
            return f"tight: {used} of {have} used on {gpu.title}, {room}; {band(answer)}"
        case _:
            return f"does not fit: needs {used} of {have} on {gpu.title}, {tenths(-headroom)} GiB too much"


def band(answer: Estimate) -> str:
    """Return the band as text."""
    low, high, coverage = answer.band
    return f"{coverage:.0%} of runs take {tenths(low)} to {tenths(high)} GiB"


def headroom(answer: Estimate) -> str:
    """Return how much memory is left, and the band."""
    left = answer.verdict.headroom
    if left is None:
        return f"{band(answer)}."
    room = f"{gib(left)} of headroom" if left >= 0 else f"{gib(-left)} too much"
    return f"{room}; {band(answer)}."


_MOMENTS = {
    "load": "while the weights are loaded",
    "forward": "in the forward pass",
    "loss": "in the loss",
    "backward": "in the backward pass",
    "step": "in the optimizer's step",
    "eval": "in evaluation",
    "generate": "in generation",
    "encode": "while the encoder reads",
    "prefill": "while the prompt is read",
    "decode": "while tokens are generated",
    "save": "while the model is saved",
    "merge": "while adapters are merged",
}


def moment(answer: Estimate) -> str:
    """Return when the peak is: "at the loss's backward in step 2, in loss.log_softmax"."""
    phase, where = answer.peak
    words = _MOMENTS.get(phase, f"in phase {phase}")
    if phase == "backward" and where.startswith("loss."):
        words = "at the loss's backward"
    if where == "clipping":
        words = "while gradients are clipped"
    at = peak_phase(answer)
    step = {1: " in step 1", 2: " in step 2 and later"}.get(at.step or 0, "")
    named = where and where not in ("clipping", "optimizer")
    return f"{words}{step}" + (f", in {where}" if named else "")


def peak_phase(answer: Estimate) -> Phase:
    """Return the phase of the peak; of equal ones the last."""
    return [p for p in answer.phases if p.peak == answer.bytes.allocated][-1]


def times(line: Line) -> str:
    """Return the number of copies of a tensor, if there are several: "28 × "."""
    return f"{line.count:,} × " if line.count > 1 else ""


def shape(line: Line) -> str:
    """Return a tensor's shape in letters and in numbers: "b·s·f = 1·2048·18944"; empty if it has none."""
    numbers = "·".join(map(str, line.dims))
    if not numbers:
        return "scalar" if line.bytes == line.count * _SCALAR_BYTES else ""
    return numbers if line.shape in ("", numbers) else f"{line.shape} = {numbers}"


_SCALAR_BYTES = rounded(1)  # torch's smallest allocation


def dtype(line: Line) -> str:
    """Return a tensor's dtype; for a packed one, how many numbers share an element: "uint8 for every 2"."""
    stored, _, numbers = line.dtype.partition("/")
    return f"{stored} for every {int(numbers):,}" if numbers else stored


def notes(answers: Sequence[Estimate]) -> list[str]:
    """Return what was left out and the notes of all answers, without repetition."""
    left_out = [f"not supported, and left out: {what}" for answer in answers for what in answer.unsupported]
    return list(dict.fromkeys([*left_out, *(note for answer in answers for note in answer.notes)]))


def host(answer: Estimate) -> str:
    """Return the host memory as a sentence, for several processes per process and per node; empty if there is none."""
    peak = answer.host.peak
    if answer.host.ranks == 1:
        return f"{gib(answer.host_bytes)} more are in the host's memory." if answer.host_bytes else ""
    if not peak.node:
        return ""
    when = "while the model is loaded" if peak.phase == "load" else "during the steps"
    each = f"{gib(peak.rank)} per process, {gib(peak.node)} for the {answer.host.ranks} of a node"
    return f"Host memory: {each}; the peak is {when}."


class PhaseRow(NamedTuple):
    """One phase: its peak in the first step and in later ones, which may be equal."""

    phase: str
    first: int
    later: int
    where: str
    peak: bool


def phase_rows(answer: Estimate) -> list[PhaseRow]:
    """Return the phases, in order."""
    top = peak_phase(answer)
    out: list[PhaseRow] = []
    for name in dict.fromkeys(p.phase for p in answer.phases):
        group = [p for p in answer.phases if p.phase == name]
        out.append(PhaseRow(name, group[0].peak, group[-1].peak, group[-1].where, top in group))
    return out


def phase_cells(answer: Estimate) -> list[tuple[str, str, str, str]]:
    """Return the phases as table rows: name, peak in the first step and in later ones in GiB, and where it is."""
    return [
        (
            f"{row.phase} (peak)" if row.peak else row.phase,
            hundredths(row.first),
            "" if row.phase == "load" else hundredths(row.later),
            row.where,
        )
        for row in phase_rows(answer)
    ]


RANKS = ("stage", "layers", "in flight", "GiB allocated", "used", "answer", "peak")


def rank_rows(answer: Estimate) -> list[tuple[str, ...]]:
    """Return the ranks that differ as table rows, with a mark on the reported one."""
    return [
        (
            f"{rank.stage} *" if rank.stage == answer.run.parallelism.stage else str(rank.stage),
            str(rank.layers),
            str(rank.in_flight),
            hundredths(rank.bytes.allocated),
            hundredths(rank.bytes.used),
            rank.verdict.answer or "",
            f"{rank.peak.phase} {rank.peak.where}".strip(),
        )
        for rank in answer.ranks
    ]


def ranks_title(answer: Estimate) -> str:
    """Return the title of the table of ranks."""
    p = answer.run.parallelism
    if p.device_map is not None:
        return "The GPUs, as device_map fills them; * marks the one reported"
    each = p.world // p.pp
    return f"The ranks of each stage, {each} GPU{'s' if each > 1 else ''} each; * marks the stage reported"


def steps_differ(answer: Estimate) -> bool:
    """Whether later steps differ from the first."""
    return any(p.step == 2 for p in answer.phases)


def count(n: int) -> str:
    """Format a number of parameters.

    >>> count(7_615_616_512), count(40_370_176), count(960)
    ('7.62 billion', '40.37 million', '960')
    """
    for word, size in (("billion", 10**9), ("million", 10**6)):
        if n >= size:
            return f"{n / size:.2f} {word}"
    return f"{n:,}"
