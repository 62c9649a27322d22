"""The first screen of an answer: the verdict, the settings, what takes the memory and what shrinks it, what to ask
next. It fits 80 columns and 24 lines; `--details` has the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from memplan.core.records import NamedTuple
from memplan.estimate.answer import Estimate, Line
from memplan.report import wording as words
from memplan.report.bar import bar
from memplan.report.blocks import Block, Column, Drawing, Pairs, Table, Text, Verbatim
from memplan.report.text import Screen
from memplan.resolve.parallelism import is_wrapped
from memplan.resolve.roles import models_of
from memplan.spec.options import FIELDS, flag

LABELS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "loss": "loss",
    "logits": "logits",
    "kv": "KV cache",
    "activations": "activations",
    "context": "cache, context",
}
_OF_KINDS = {"parameter": "weights", "gradient": "gradients", "optstate": "optimizer", "other": "context"}
_WIDE, _NARROW = 100, 72  # columns of a screen
_WORTH = 20  # a row gets an option, and an option is shown, if it is at least this part of the used memory


class MemoryShare(NamedTuple):
    """A share of the used memory in a reader's words.

    why     what it consists of
    more    names and shapes of that, for a screen with room
    option  what shrinks it, as it is typed; empty if nothing does
    saves   how many bytes that takes off the allocated peak
    """

    key: str
    bytes: int
    why: str
    more: str = ""
    option: str = ""
    saves: int = 0


class CommandLine(NamedTuple):
    """A command as it was typed, without what only concerns its output: the run, and its cards."""

    run: str
    cards: str = ""

    def changed(self, options: str = "") -> str:
        """Return the line with more options, which replace those of the same name; a card replaces all cards."""
        names = [word.partition(" ")[0] for word in options.split("--")]
        kept = [word for word in self.run.split(" --") if word.partition(" ")[0] not in names]
        cards = "" if "gpu" in names else self.cards
        return " ".join(filter(None, (" --".join(kept), cards, options)))


def overview(answer: Estimate, to: Screen, line: CommandLine | None) -> Iterator[Block]:
    """Yield the first screen; the next commands are made of the command line, if there was one."""
    yield from headline(answer, to)
    yield Text(words.other_cards(answer), indent="")
    shares = rows(answer)
    if not to.plain and answer.verdict.answer != "does not start":  # memory is not the question then
        yield Drawing(partial(bar, answer, [(row.key, row.bytes) for row in shares]))
    most = len(shares) if to.terminal else None  # where the line of other stacks costs more and uses the same work
    yield table(with_options(answer, shares, most), to)
    if answer.serving is not None:
        from memplan.report.serving import pool

        yield Pairs(pool(answer)[answer.gpu is not None :])  # on a card, the table has the pool
    yield from _after(answer, line)


def headline(answer: Estimate, to: Screen) -> Iterator[Text]:
    """Yield the verdict with the question in words, the figures, and the settings."""
    text, figures = verdict(answer), words.figures(answer)
    style = f"bold {words.colour(answer)}"
    one = f"{text}: {figures}"
    yield from (Text(one, style),) if len(one) <= to.width else (Text(text, style), Text(f"  {figures}", "bold"))
    yield Text("  " + ", ".join(settings(answer)), "dim")


def verdict(answer: Estimate) -> str:
    """Return the verdict and what was asked: "FITS  QLoRA of qwen3-8b on GeForce RTX 3090"."""
    gpu, n = words.card(answer), answer.run.parallelism.world
    asked = words.asked(answer)
    if gpu is not None:
        asked += f" on {f'{n:,} x ' if n > 1 else ''}{gpu.title}"
    return f"{answer.verdict.answer.upper()}  {asked}" if answer.verdict.answer else asked


def settings(answer: Estimate) -> Iterator[str]:
    """Yield what decides most of the memory."""
    run, batch, p = answer.run, answer.run.batch, answer.run.parallelism
    if answer.serving is not None:
        yield f"{batch.micro:,} request{'s' * (batch.micro > 1)} of {answer.serving['context']:,} tokens"
    else:
        yield f"{batch.micro:,} x {words.lengths(batch)}{words.images(batch)}"
    q = run.method.quantization
    if run.task == "train":
        yield from (f"{batch.accumulation:,} passes a step",) * (batch.accumulation > 1)
        if run.method.kind not in ("full", "freeze"):
            yield from words.adapters(run.method)
        if q is not None:
            yield q.format
        yield str(run.optimizer.name)
        kind, every = run.kernels.checkpointing, run.kernels.every_n_layers
        yield f"checkpointing every {every} layers" if every > 1 else f"checkpointing {kind}".removesuffix(" full")
    elif answer.serving is None:
        yield from (f"{batch.new_tokens:,} new tokens",) * (run.task == "generate")
        yield q.format if q is not None else str(run.precision.weights)
    if answer.serving is not None and p.world > 1:
        from memplan.report.serving import divisions

        yield ", ".join(divisions(answer))
    elif p.world > 1 or is_wrapped(p):
        from memplan.report.assumptions import strategies

        yield next(strategies(p), f"{p.world:,} GPUs")
    yield run.profile


def rows(answer: Estimate) -> list[MemoryShare]:
    """Return what the used memory consists of, largest first; the allocator's cache and the context come last."""
    lines: dict[str, list[Line]] = {key: [] for key in LABELS}
    for line in answer.ledger:
        lines[_key(line, answer)].append(line)
    held = answer.bytes
    out = [
        MemoryShare(key, sum(line.bytes for line in group), *_why(key, group, answer)) for key, group in lines.items()
    ]
    rest = out.pop()
    out.sort(key=lambda row: -row.bytes)
    return [row for row in out if row.bytes] + [rest._replace(bytes=rest.bytes + held.used - held.allocated)]


def _key(line: Line, answer: Estimate) -> str:
    if line.kind in _OF_KINDS:
        return _OF_KINDS[line.kind]
    if line.what.lower().endswith("cache"):
        return "kv"
    if line.where.startswith("loss") or "v" in line.shape.replace("·", " ").split():
        return "loss" if answer.run.task == "train" else "logits"
    return "activations"


def _why(key: str, lines: Sequence[Line], answer: Estimate) -> tuple[str, str]:
    """Return what a row consists of, and its names and shapes."""
    if key == "context":
        return _around(answer, lines), ""
    if not lines:
        return "", ""
    if key == "weights":
        return _stored(lines, answer)
    if key == "kv" and answer.serving is not None:
        return f"{answer.serving['tokens']:,} tokens in {answer.serving['cache_dtype']}", ""
    if key in ("gradients", "optimizer"):
        dtypes = dict.fromkeys(line.dtype.partition("/")[0] for line in lines if line.bytes >= lines[0].bytes // 10)
        return f"for {words.count(answer.parameters.trainable)}, {' and '.join(dtypes)}", ""
    first = lines[0]
    is_pool = first.dtype == "uint8" and " x " not in words.dims(first)  # a number of bytes
    if not first.dims or not first.dtype or is_pool:
        return first.what, ""
    n = sum(line.count for line in lines if (line.dims, line.dtype) == (first.dims, first.dtype))
    is_input = len(first.what) <= 1 and n >= max(line.count for line in answer.ledger)
    name = {"loss": "logits", "logits": "logits", "kv": "keys and values"}.get(key, "layer inputs" * is_input)
    name = name or (first.what if len(first.what) > _MIN_NAME else "tensors")
    return f"{n:,} x {first.dtype} {name}" if n > 1 else f"{first.dtype} {name}", f" of {words.dims(first)}"


_MIN_NAME = 2  # letters; shorter names are those of formulas


def _stored(lines: Sequence[Line], answer: Estimate) -> tuple[str, str]:
    """Return whose weights they are, if several models are on the GPU, or their formats: "4.6 in fp32, 3.5 in nf4"."""

    def of_role(line: Line, role: str) -> bool:
        return line.what.startswith(f"{role}.") or line.where.startswith(f"{role}.")

    roles = [*models_of(answer.run)]
    others = {role: sum(line.bytes for line in lines if of_role(line, role)) for role in roles}
    if any(others.values()):
        own = sum(line.bytes for line in lines) - sum(others.values())
        return ", ".join(f"{words.tenths(size)} of the {role}" for role, size in {"model": own, **others}.items()), ""
    q = answer.run.method.quantization
    packed = q.format if q is not None else "packed"
    sizes: dict[str, dict[str, int]] = {}
    for line in lines:
        names = sizes.setdefault(packed if "/" in line.dtype else line.dtype or packed, {})
        name = "adapters" if ".lora_" in line.what else "layers" if line.count > 1 else _short(line.what)
        name = "masters" if line.what.endswith(" master") else name
        names[name] = names.get(name, 0) + line.bytes
    total = {dtype: sum(names.values()) for dtype, names in sizes.items()}
    largest = sorted(total, key=lambda dtype: -total[dtype])
    shown = [dtype for dtype in largest[:2] if total[dtype] * _WORTH >= total[largest[0]]]
    if len(shown) == 1:
        return f"{words.count(answer.parameters.total)}, {shown[0]}", ""
    named = "; ".join(f"{dtype} is {_largest(sizes[dtype])}" for dtype in shown[:1])
    return ", ".join(f"{words.tenths(total[dtype])} in {dtype}" for dtype in shown), f" ({named})"


def _largest(sizes: dict[str, int]) -> str:
    top = sorted(sizes, key=lambda name: -sizes[name])
    return " and ".join(name for name in top[:2] if sizes[name] * _WORTH >= sizes[top[0]])


def _short(what: str) -> str:
    return what.removesuffix(".weight").rpartition(".")[2]


def _around(answer: Estimate, lines: Sequence[Line]) -> str:
    """Return what is used in addition to the tensors of the model."""
    held = answer.bytes
    parts = {"context and left free" if words.has_unused_share(answer) else "context": held.used - held.reserved}
    if not words.without_torch(answer):
        parts["cache"] = held.reserved - held.allocated
    for line in lines:
        parts[line.what] = parts.get(line.what, 0) + line.bytes
    shown = sorted(parts, key=lambda name: -parts[name])[:3]
    return ", ".join(f"{name} {words.tenths(parts[name])}" for name in shown if words.tenths(parts[name]) != "0.0")


def table(shares: Sequence[MemoryShare], to: Screen) -> Table[MemoryShare]:
    def why(row: MemoryShare) -> str:
        return row.why + row.more * (to.width >= _WIDE)

    columns: list[Column[MemoryShare]] = [
        Column("", lambda row: LABELS[row.key], style="bold"),
        Column("GiB", lambda row: words.tenths(row.bytes), right=True),
        Column("", why, wraps=True, optional=True, style="dim"),
    ]
    has_room = to.width >= _NARROW
    if has_room and any(row.option for row in shares):
        columns.append(Column("smaller with", lambda row: row.option))
    if has_room and any(row.saves for row in shares):
        columns.append(Column("saves", lambda row: words.tenths(row.saves) if row.saves else "", right=True))
    return Table(columns, [row for row in shares if words.tenths(row.bytes) != "0.0"])


# --- what to do next ------------------------------------------------------------------------------------------------


def _after(answer: Estimate, line: CommandLine | None) -> Iterator[Block]:
    """Yield what the card has room for, or what would fit, what was left out, and the next commands."""
    from memplan.report import next_steps

    facts: list[tuple[str, str]] = []
    commands: list[str] = []
    run = answer.asked
    match answer.verdict.answer:
        case "fits" | "tight" if answer.via != "trace" and answer.serving is None:
            if run.task == "train" and answer.verdict.answer == "fits":  # replays of inference take long
                facts += [("room for", text) for text in (" or ".join(next_steps.room_left(answer)),) if text]
            commands += [f"max {line.changed()}"] if line and answer.verdict.answer == "fits" else []
            commands += [f"fit {line.changed()}"] if line and answer.verdict.answer == "tight" else []
        case "does not start" if options := list(next_steps.mends(answer)):
            commands += [line.changed(option) for option in options] if line else []
        case "does not fit" | "does not start":
            ways = next_steps.ways(answer)
            facts += [("would fit", way.text) if n == 0 else ("", way.text) for n, way in enumerate(ways)]
            facts += [] if ways else [("", next_steps.without_a_way(answer))]
            commands += [line.changed(ways[0].options), *_plans(answer, line)] if line and ways else []
        case None:
            smallest = next_steps.smallest_cards(answer)
            facts.append(("held by", ", ".join(smallest) or "no catalogued card"))
            commands += [line.changed(f"--gpu {smallest[0]}"), f"buy {line.run}"] if line and smallest else []
        case _:  # an engine's pool takes what is free; a trace would be needed
            pass
    facts += [("left out", text) for text in answer.unsupported]
    host = words.host(answer)
    facts += [("host", host)] if host else []
    n = len(answer.notes)
    facts += [("notes", f"{n:,} on what was assumed, with --details")] if n else []
    if facts:
        yield Pairs(facts)
    if line is not None:
        commands.append(f"{line.changed()} --details")
        yield Verbatim([f"  memplan {command}" for command in commands], "sh")


def _plans(answer: Estimate, line: CommandLine) -> Iterator[str]:
    if answer.run.task == "train" and answer.via != "trace":
        yield f"fit {line.changed()}"


# --- what shrinks a row ---------------------------------------------------------------------------------------------

# MemoryShare -> groups of levers that shrink it, and which of a group: the first one is the mildest.
_GROUPS = {
    "weights": (("method", -1), ("quantisation", 0), ("precision", 0)),
    "gradients": (("in backward", 0),),
    "optimizer": (("optimizer", 0),),
    "loss": (("loss", -1),),
    "activations": (("gradient checkpointing", 0), ("batch", 0), ("sequence", 0)),
}


def with_options(answer: Estimate, shares: Sequence[MemoryShare], most: int | None = None) -> list[MemoryShare]:
    """Return the rows with what shrinks each that is worth it, as far as the run has such options.

    most  savings that are computed of options that change the operations, each of which costs as much as a tenth of a
          short command for a pipe; others are listed without what they save. Default one, and none for a run that fits
    """
    if answer.via == "trace" or answer.serving is not None:  # further traces would take long; a pool takes what is free
        return [*shares]
    if most is None:
        most = int(answer.verdict.answer != "fits")
    if not most and answer.run.task != "train":  # to judge another format takes as long as an estimate
        return [*shares]
    out: list[MemoryShare] = []
    for row in shares:
        fields = _fields(answer, row.key) if row.bytes * _WORTH >= answer.bytes.used else ()
        is_cheap = all(path.startswith(_SAME_OPERATIONS) for path, _ in fields)
        if fields and (is_cheap or most > 0):
            most -= not is_cheap
            saves = _saved(answer, fields)
            out.append(row._replace(option=_typed(fields), saves=saves) if saves * _WORTH >= answer.bytes.used else row)
        else:
            out.append(row._replace(option=_typed(fields) if fields and _is_possible(answer, fields) else ""))
    return out


_SAME_OPERATIONS = ("optimizer.", "batch.")
Fields = tuple[tuple[str, Any], ...]


def _saved(answer: Estimate, fields: Fields) -> int:
    """Return by how much a change of the run lowers its peak; 0 if memplan refuses it."""
    from memplan.planning.levers import with_fields
    from memplan.planning.trials import attempt

    other = attempt(lambda: with_fields(answer.asked, fields), answer.calibration)
    return answer.bytes.allocated - other.bytes.allocated if other is not None else 0


def _is_possible(answer: Estimate, fields: Fields) -> bool:
    """Whether memplan accepts a change of the run, judged without an estimate."""
    from memplan.core.errors import MemplanError
    from memplan.planning.levers import with_fields
    from memplan.resolve.decide import decide

    try:
        decide(with_fields(answer.asked, fields))
    except MemplanError:
        return False
    return True


def _fields(answer: Estimate, key: str) -> Fields:
    """Return the fields of the run that shrink a row; empty if there are none."""
    run = answer.run
    if run.task != "train":
        if key == "weights" and run.task == "generate" and run.method.quantization is None:
            return (("method.quantization", {"format": "nf4"}), ("method.quantization.format", "nf4"))
        return ()
    if key == "weights" and answer.asked.method.quantization is not None and run.method.quantization is not None:
        prepared = run.method.quantization.kbit_preparation
        return (("method.quantization.kbit_preparation", False),) if prepared is True else ()
    from memplan.planning.levers import levers_of

    levers = levers_of(run)
    for group, which in _GROUPS.get(key, ()):
        of_group = [lever for lever in levers if group in (lever.group, lever.title)]
        if of_group:
            return of_group[which].fields
    return ()


_IMPLIED = ("method.trainable_layers",)  # reset by a lever that changes the method
_FLAGS = {field: flag(name) for name, field in FIELDS.items()}


def _typed(fields: Fields) -> str:
    """Return fields as options are typed: "--loss fused"."""
    return " ".join(
        _option(path, value) for path, value in fields if type(value) in (str, int, bool) and path not in _IMPLIED
    )


def _option(path: str, value: object) -> str:
    if path == "kernels.checkpointing":
        return f"--checkpointing {value}"
    if value is True:
        return _FLAGS[path]
    return f"{_FLAGS[path]} {str(value).lower() if isinstance(value, bool) else value}"
