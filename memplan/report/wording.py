"""What every report says in words: the verdict, the peak's moment, the assumptions."""

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


class Part(NamedTuple):
    """A part of what is used: a category of tensors, or what the allocator and CUDA take beside them."""

    key: str
    label: str
    bytes: int
    largest: str


def parts(answer: Estimate) -> list[Part]:
    """What is used at the peak, by category, then what is not torch's tensors. Sums to `bytes.used`."""
    out: list[Part] = []
    for kind, label in CATEGORIES.items():
        if answer.categories[kind]:
            largest = next(line for line in answer.ledger if line.kind == kind)
            out.append(
                Part(kind, label, answer.categories[kind], f"{times(largest)}{largest.what}, {gib(largest.bytes)}")
            )
    held = answer.bytes
    if not without_torch(answer):
        out.append(
            Part("allocator", "allocator's cache", held.reserved - held.allocated, "held by torch, in no tensor")
        )
    several = answer.run.parallelism.world > 1 and answer.run.parallelism.schedule != "device_map"
    beside = "the driver's, and loaded kernels"
    if several:
        groups = sum(row.what.startswith("NCCL's buffers") for row in answer.beside)
        beside = "the driver's, loaded kernels and NCCL's"
        beside += f", in {groups} communicators" if groups > 1 else ""
    if answer.serving is not None and answer.verdict.answer == "does not fit":
        beside += ", and what the engine leaves"
    out.append(Part("context", "CUDA context", held.used - held.reserved, beside))
    return out


def without_torch(answer: Estimate) -> bool:
    """Whether what runs has no torch, and so no allocator of its."""
    return answer.run.profile.startswith("llama.cpp")


def card(answer: Estimate) -> GPU | None:
    """The GPU's row, where one was asked."""
    return find_gpu(answer.gpu.name) if answer.gpu else None


def model(answer: Estimate) -> str:
    """The model's name."""
    asked = answer.asked.model
    name = asked if isinstance(asked, str) else str(asked.config.get("_name_or_path") or asked.config["model_type"])
    return printable(name)


def tenths(n: int) -> str:
    """Bytes in GiB with one decimal, without the unit."""
    return decimal(n, GIB, 1)


def hundredths(n: int) -> str:
    """Bytes in GiB with two decimals, without the unit.

    >>> hundredths(16_106_127_360), hundredths(512), hundredths(0)
    ('15.00', '<0.01', '0.00')
    """
    text = decimal(n, GIB, 2)
    return "<0.01" if n > 0 and text == "0.00" else text


def share(n: int, of: int) -> str:
    """What part of all bytes `n` are.

    >>> share(1, 4), share(1, 10_000)
    ('25.0%', '<0.1%')
    """
    text = f"{n / of:.1%}"
    return "<0.1%" if n > 0 and text == "0.0%" else text


def verdict(answer: Estimate) -> str:
    """The answer in one line."""
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
    """The band in words."""
    low, high, coverage = answer.band
    return f"{coverage:.0%} of runs take {tenths(low)} to {tenths(high)} GiB"


def headroom(answer: Estimate) -> str:
    """How much is left, and how sure that is."""
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
    """When the peak is, in words: "at the loss's backward in step 2, in loss.log_softmax"."""
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
    """The phase of the peak, the last where several are as large."""
    return [p for p in answer.phases if p.peak == answer.bytes.allocated][-1]


def times(line: Line) -> str:
    """How many of a tensor there are, where there are several: "28 × "."""
    return f"{line.count:,} × " if line.count > 1 else ""


def shape(line: Line) -> str:
    """A tensor's shape in letters and in numbers: "b·s·f = 1·2048·18944". Empty where it has none."""
    numbers = "·".join(map(str, line.dims))
    if not numbers:
        return "scalar" if line.bytes == line.count * _LEAST else ""
    return numbers if line.shape in ("", numbers) else f"{line.shape} = {numbers}"


_LEAST = rounded(1)  # what torch takes for a single number


def dtype(line: Line) -> str:
    """A tensor's dtype; of a packed one, how many numbers share one: "uint8 for every 2"."""
    stored, _, numbers = line.dtype.partition("/")
    return f"{stored} for every {int(numbers):,}" if numbers else stored


def notes(answers: Sequence[Estimate]) -> list[str]:
    """What was left out and what to know, of several answers once."""
    left_out = [f"not supported, and left out: {what}" for answer in answers for what in answer.unsupported]
    return list(dict.fromkeys([*left_out, *(note for answer in answers for note in answer.notes)]))


def host(answer: Estimate) -> str:
    """What the host holds; empty where it holds nothing. Of several processes, those of a node together."""
    found = answer.host.peak
    if answer.host.ranks == 1:
        return f"{gib(answer.host_bytes)} more are in the host's memory." if answer.host_bytes else ""
    if not found.node:
        return ""
    when = "while the model is loaded" if found.phase == "load" else "in the steps"
    return (
        f"Host memory: {gib(found.rank)} a process, {gib(found.node)} the {answer.host.ranks} of a node, most {when}."
    )


class PhaseRow(NamedTuple):
    """One phase: its peak in the first step and in later ones (the same where they do not differ)."""

    phase: str
    first: int
    later: int
    where: str
    peak: bool


def phase_rows(answer: Estimate) -> list[PhaseRow]:
    """The phases, in order."""
    top = peak_phase(answer)
    out: list[PhaseRow] = []
    for name in dict.fromkeys(p.phase for p in answer.phases):
        group = [p for p in answer.phases if p.phase == name]
        out.append(PhaseRow(name, group[0].peak, group[-1].peak, group[-1].where, top in group))
    return out


def phase_cells(answer: Estimate) -> list[tuple[str, str, str, str]]:
    """The phases as rows of a table: name, peak of the first step and of later ones in GiB, where."""
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
    """The ranks that differ as rows of a table, that of the answer with a mark."""
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
    """What the table of ranks is of."""
    p = answer.run.parallelism
    if p.device_map is not None:
        return "The GPUs, as device_map fills them; * the answer's"
    each = p.world // p.pp
    return f"The ranks of each stage, {each} GPU{'s' if each > 1 else ''} each; * the answer's"


def steps_differ(answer: Estimate) -> bool:
    """Whether the first step is not as the later ones."""
    return any(p.step == 2 for p in answer.phases)


def count(n: int) -> str:
    """A number of parameters, in words.

    >>> count(7_615_616_512), count(40_370_176), count(960)
    ('7.62 billion', '40.37 million', '960')
    """
    for word, size in (("billion", 10**9), ("million", 10**6)):
        if n >= size:
            return f"{n / size:.2f} {word}"
    return f"{n:,}"
