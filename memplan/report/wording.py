"""Wording shared by all reports: the verdict, the moment of the peak, tables of phases and ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.gpus import ambiguous_with, find_gpu
from memplan.catalogue.kernels.wiring import GENERATING
from memplan.core.errors import printable
from memplan.core.records import NamedTuple
from memplan.core.units import GIB, decimal, gib, rounded
from memplan.estimate.answer import Estimate, Line, Phase, Rank
from memplan.models.peft_methods import has_rank
from memplan.report.blocks import Column, Table
from memplan.spec.run import Batch, RunSpec
from memplan.spec.training import Method

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
    if has_unused_share(answer):
        contents += ", and what the engine leaves free"
    gpu = card(answer)
    name = "CUDA context" if gpu is None or gpu.vendor == "NVIDIA" else "driver's context"
    out.append(MemoryPart("context", name, held.used - held.reserved, contents))
    return out


def has_unused_share(answer: Estimate) -> bool:
    """Whether the bytes used include the share of a card that the engine leaves free: a card of that size would do."""
    return answer.serving is not None and answer.verdict.answer == "does not fit"


def without_torch(answer: Estimate) -> bool:
    """Whether the run does not use torch, and so has no caching allocator."""
    return answer.run.profile.startswith("llama.cpp")


def adapters(method: Method) -> Iterator[str]:
    """Yield the rank of a method's adapters and the layers that have them, as far as it has either."""
    on = method.targets if isinstance(method.targets, str) else ", ".join(method.targets)
    words = [f"rank {method.rank}"] if has_rank(method.kind) else []
    if on:
        words.append(f"on {on}")
    if words:
        yield " ".join(words)


def card(answer: Estimate) -> GPU | None:
    """Return the GPU's catalogue row, if the run has a GPU."""
    return find_gpu(answer.gpu.name) if answer.gpu else None


def also_meant(answer: Estimate) -> tuple[GPU, ...]:
    """Return the other cards that the GPU's name may mean."""
    typed = answer.asked.gpu
    return ambiguous_with(typed) if typed is not None and answer.gpu and typed != answer.gpu.name else ()


def other_cards(answer: Estimate) -> str:
    """Return a line about the other cards that the GPU's name may mean; empty if there are none."""
    others = also_meant(answer)
    if not others:
        return ""
    more = f" and {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
    named = ", ".join(gpu.name for gpu in others[:_MOST_NAMED])
    return f"{printable(answer.asked.gpu or '')} may also mean {named}{more}"


_MOST_NAMED = 4  # other cards in one line


def on_card(answer: Estimate) -> str:
    """Return the GPU and its usable memory: " on GeForce RTX 3090, 23.3 GiB usable"; empty without a GPU."""
    gpu = card(answer)
    return f" on {gpu.title}, {tenths(gpu.usable)} GiB usable" if gpu else ""


def model(answer: Estimate) -> str:
    """Return the model's name."""
    asked = answer.asked.model
    name = asked if isinstance(asked, str) else str(asked.config.get("_name_or_path") or asked.config["model_type"])
    return printable(name)


# Methods as people call them; peft's others go by their own names.
_METHODS = {
    "full": "full fine-tuning",
    "freeze": "training the last layers",
    "lora": "LoRA",
    "qlora": "QLoRA",
    "dora": "DoRA",
    "qdora": "QDoRA",
    "generate": "generation",
    "forward": "forward pass",
}


def asked(answer: Estimate) -> str:
    """Return what was asked in a few words: "QLoRA of qwen3-8b"."""
    run = answer.run
    if answer.serving is not None:
        return f"serving {model(answer)} with {run.profile}"
    word = run.method.kind if run.task == "train" else run.task
    trainer = {"reward": "reward modelling", "distill": "distillation", "simpo": "SimPO"}.get(
        run.trainer, "PPO" if run.roles.value is not None else run.trainer.upper()
    )
    return f"{f'{trainer} with ' if run.trainer != 'sft' else ''}{_METHODS.get(word, word)} of {model(answer)}"


def examples(run: RunSpec) -> str:
    """Return how many examples a micro-batch has."""
    n, is_pair = run.batch.micro, run.trainer not in ("sft", *GENERATING)
    kind = "prompt" if run.task == "generate" else "pair" if is_pair else "sequence"
    kind = "completion" if run.trainer in GENERATING else kind
    return f"{n:,} {kind}{'s' * (n > 1)}{' of sequences' * is_pair}"


def lengths(batch: Batch) -> str:
    tokens = f"{batch.sequence:,} tokens"
    if batch.generations:
        return f"{batch.new_tokens:,} tokens after prompts of {batch.sequence:,}, {batch.generations:,} of each prompt"
    return tokens if batch.target_sequence is None else f"{tokens}, and {batch.target_sequence:,} for the decoder"


def images(batch: Batch) -> str:
    """Return the number and size of each sequence's images, frames or audio clips."""
    if not batch.sees:
        return ""
    if batch.clips:
        long = f" of {batch.clip_seconds:,} s" if batch.clip_seconds else ""
        return f" with {batch.clips:,} audio clip{'s' if batch.clips > 1 else ''}{long}"
    sides = batch.image_size if isinstance(batch.image_size, tuple) else (batch.image_size,) * 2
    size = f" of {sides[0]} x {sides[1]} pixels" if sides[0] else ""
    if batch.frames:
        return f" with a video of {batch.frames:,} frame{'s' if batch.frames > 1 else ''}{size}"
    return f" with {batch.images:,} image{'s' if batch.images > 1 else ''}{size}"


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
        case "does not start":
            return f"does not start on {gpu.title}: {answer.verdict.reason}"
        case _:
            return f"does not fit: needs {used} of {have} on {gpu.title}, {tenths(-headroom)} GiB too much"


def figures(answer: Estimate) -> str:
    """Return the used memory of the usable, and the expected range."""
    used, gpu, left = tenths(answer.bytes.used), card(answer), answer.verdict.headroom
    expected = f"expect {band_ends(answer)}"
    if gpu is None or left is None:
        return f"{used} GiB needed, {expected}"
    room = f"{tenths(left)} free" if left >= 0 else f"{tenths(-left)} too much"
    if answer.verdict.answer == "does not start":
        return str(answer.verdict.reason)
    return f"{used} of {tenths(gpu.usable)} GiB used, {room}; {expected}"


COLOURS = {"fits": "green", "tight": "yellow", "does not fit": "red", "does not start": "red"}


def colour(answer: Estimate | Rank) -> str:
    """Return the colour of the verdict; empty without a GPU."""
    return COLOURS.get(answer.verdict.answer or "", "")


def band(answer: Estimate) -> str:
    """Return the band as text."""
    return f"{answer.band.coverage:.0%} of runs take {band_ends(answer)} GiB"


def band_ends(answer: Estimate) -> str:
    """Return the ends of the band in GiB, without the unit."""
    return f"{tenths(answer.band.low)} to {tenths(answer.band.high)}"


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
    "teacher": "in the teacher's pass",
    "reward": "in the reward model's pass",
    "rollout": "while completions are scored",
    "critic": "in the critic's update",
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


def dims(line: Line) -> str:
    """Return a tensor's shape in numbers: "1 x 2,048 x 4,096"."""
    return " x ".join(f"{n:,}" for n in line.dims)


_SCALAR_BYTES = rounded(1)  # torch's smallest allocation


def dtype(line: Line) -> str:
    """Return a tensor's dtype; for a packed one, how many numbers share an element: "uint8 for every 2"."""
    stored, _, numbers = line.dtype.partition("/")
    return f"{stored} for every {int(numbers):,}" if numbers else stored


def notes(answers: Sequence[Estimate]) -> list[str]:
    """Return what was left out and the notes of all answers, without repetition."""
    return list(dict.fromkeys([*left_out(answers), *(note for answer in answers for note in answer.notes)]))


def left_out(answers: Sequence[Estimate]) -> list[str]:
    """Return a line for everything that the answers leave out."""
    told = (f"not supported, and left out: {what}" for answer in answers for what in answer.unsupported)
    return list(dict.fromkeys(told))


def on_host(answer: Estimate) -> int:
    """Return the bytes that all processes of a node hold in the host's memory in a step."""
    return answer.host_bytes * answer.host.ranks


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


def summary(answer: Estimate) -> str:
    """Return a paragraph of when the peak is, what is left, and the host memory."""
    return f"The peak is {moment(answer)}. {headroom(answer)} {host(answer)}".rstrip()


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


def later_peak(row: PhaseRow) -> str:
    """Return a phase's peak in later steps in GiB; empty for loading, which runs once."""
    return "" if row.phase == "load" else hundredths(row.later)


def phase_table(answer: Estimate) -> Table[PhaseRow]:
    """Return the phases as a table for a page."""
    columns: list[Column[PhaseRow]] = [
        Column("phase", lambda row: f"{row.phase} (peak)" if row.peak else row.phase),
        Column("step 1, GiB", lambda row: hundredths(row.first), right=True),
        Column("later, GiB", later_peak, right=True),
        Column("largest at", lambda row: row.where),
    ]
    return Table(columns, phase_rows(answer))


def part_table(answer: Estimate) -> Table[MemoryPart]:
    """Return the parts of the used memory and their sum, as a table for a page."""
    used = answer.bytes.used

    def bold(part: MemoryPart) -> str:
        return "" if part.key else "bold"

    columns: list[Column[MemoryPart]] = [
        Column("at the peak", lambda part: part.label, style=bold),
        Column("GiB", lambda part: hundredths(part.bytes), right=True, style=bold),
        Column("share", lambda part: share(part.bytes, used), right=True, style=bold),
        Column("largest", lambda part: part.largest),
    ]
    return Table(columns, [*parts(answer), MemoryPart("", "used", used, "as nvidia-smi shows it")])


def ledger_table(answer: Estimate) -> Table[Line]:
    """Return the ledger and its sum, as a table for a page."""

    def bold(line: Line) -> str:
        return "" if line.kind else "bold"

    columns: list[Column[Line]] = [
        Column("bytes", lambda line: f"{line.bytes:,}", right=True, style=bold),
        Column("n", lambda line: str(line.count) if line.kind else "", right=True),
        Column("tensor", lambda line: line.what, style=bold),
        Column("kind", lambda line: line.kind),
        Column("where", lambda line: line.where),
        Column("shape", shape),
        Column("dtype", dtype),
        Column("why", lambda line: line.why),
        Column("source", lambda line: line.source),
        Column("basis", lambda line: line.basis),
    ]
    total = sum(line.bytes for line in answer.ledger)
    return Table(columns, [*answer.ledger, Line("allocated", "", "", "", (), "", 0, total, "", "", "")])


def ranks_table(answer: Estimate) -> Table[Rank]:
    """Return a table of the ranks that differ, with a mark on the reported one."""
    reported = answer.run.parallelism.stage
    columns: list[Column[Rank]] = [
        Column("stage", lambda rank: f"{rank.stage} *" if rank.stage == reported else str(rank.stage), right=True),
        Column("layers", lambda rank: str(rank.layers), right=True),
        Column("in flight", lambda rank: str(rank.in_flight), right=True),
        Column("GiB allocated", lambda rank: hundredths(rank.bytes.allocated), right=True),
        Column("used", lambda rank: hundredths(rank.bytes.used), right=True),
        Column("answer", lambda rank: rank.verdict.answer or "", style=colour),
        Column("peak", lambda rank: f"{rank.peak.phase} {rank.peak.where}".strip(), wraps=True),
    ]
    return Table(columns, answer.ranks)


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
