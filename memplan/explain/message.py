"""Reading a log: the out-of-memory messages in it, their numbers, and the frames of the traceback above each.

Every number that is read is in the log as it is quoted (`Amount.text`). What is cut off or garbled is left out.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from memplan.core.frozen import FrozenDict
from memplan.core.records import NamedTuple
from memplan.core.units import GIB, KIB, MIB
from memplan.explain.forms import BUDGET, DRIVER, FIELDS, FORMS, GPU, HOST, KILLED, STATEMENTS, Form, keyword, pattern

LONGEST = 16 * MIB  # characters of a log's end that are read
_MOST_MESSAGES = 200  # of a form, and different ones in all
_MOST_FRAMES = 200
_AROUND = 400  # characters before and after a word of a form in which the rest of it is
_WINDOW = 14  # lines that a message may be wrapped over
_UNITS = {"bytes": 1, "b": 1, "k": KIB, "m": MIB, "g": GIB, "t": 2**40}  # every library divides by powers of 1,024
_URGENCY = (GPU, BUDGET, DRIVER, HOST, KILLED)


class Amount(NamedTuple):
    """Bytes as a log prints them.

    text   as printed
    bytes  the number
    slack  half of the last digit: how far the true number may be from it
    """

    text: str
    bytes: int
    slack: int = 0


Value = Amount | int | float | str


class TraceFrame(NamedTuple):
    """One frame of a traceback: `code` is its line, if the traceback shows it."""

    file: str
    line: int
    function: str
    code: str = ""


class ProcessUse(NamedTuple):
    """Memory that another line of the message gives to a process."""

    pid: int
    in_use: Amount


class Message(NamedTuple):
    """One out-of-memory message.

    form       the row that found it
    line       its line in the log, from 1
    ranks      ranks whose lines have it, empty if the log does not tell
    values     field -> value, see `memplan.explain.forms.FIELDS`
    processes  those it names with a number, this one among them in a container
    frames     the traceback above it, outermost first
    times      how often it is in the log
    """

    form: Form
    line: int
    ranks: tuple[int, ...]
    values: Mapping[str, Value]
    processes: tuple[ProcessUse, ...] = ()
    frames: tuple[TraceFrame, ...] = ()
    times: int = 1

    def amount(self, *fields: str) -> Amount | None:
        """Return the first of these fields that the message has."""
        found = (self.values.get(field) for field in fields)
        return next((value for value in found if isinstance(value, Amount)), None)


class Log(NamedTuple):
    """Messages of a log, different ones only, in order of their lines.

    statements  the last of each kind of line about memory, whose message is not an error
    is_cut      only its end was read
    names       owner/name words, which may be models
    """

    messages: tuple[Message, ...]
    statements: tuple[Message, ...] = ()
    is_cut: bool = False
    names: tuple[str, ...] = ()

    @property
    def main(self) -> Message | None:
        """The message to explain: the earliest of the cause that is closest to the tensor, with its numbers."""
        known = [m for m in self.messages if m.form.cause in _URGENCY]
        return min(known, key=lambda m: (_URGENCY.index(m.form.cause), not m.values, m.line), default=None)


# Before the text of a line: colours and cursor movements, links and titles of a terminal.
_CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b\n]*(?:\x07|\x1b\\)?|\x1b[@-Z\\^_]|[\x00-\x08\x0e-\x1a\x7f]"
)
_PREFIX = re.compile(
    r"\s*(?:\[rank(?P<a>\d{1,6})\]:?|\[default(?P<b>\d{1,6})\]:|(?P<c>\d{1,5}):(?=\s)|\[\d+,(?P<d>\d{1,6})\]<std(?:err|out)>:"
    r"|\(\w{2,30} (?:rank=(?P<e>\d{1,6}) )?pid=\d+[^()\n]{0,40}\)|rank:\s+(?P<f>\d{1,6}) \|"
    r"|(?:ERROR|INFO|WARNING|CRITICAL|DEBUG) \d\d-\d\d \d\d:\d\d:\d\d(?:[.,]\d+)? \[[^\]\n]{1,80}\]"
    r"|\[?\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?(?: (?:[DPE]P\d+ )?TP(?P<g>\d{1,6}))?\]?"
    r"|[\w.-]{1,40}\s*\|(?=\s)|[│┃║╭╰>]|E(?=\s{3}))\s?"
)
_BOX_END = re.compile(r"\s*[│┃║╮╯]\s*$")
_PLACES = (
    re.compile(r'File "(?P<file>[^"\n]{1,400})", line (?P<line>\d{1,7}), in (?P<function>[\w.<>]{1,120})'),
    re.compile(r"(?P<file>/[^\s:\n]{1,300}\.py):(?P<line>\d{1,7}) in (?P<function>[\w.<>]{1,120})"),
    re.compile(r"File (?P<file>[^\s:\n]{1,300}\.py):(?P<line>\d{1,7}), in (?P<function>[\w.<>]{1,120})"),
    re.compile(r"^(?P<file>[/~][^\s:\n]{1,300}\.py) in (?P<function>[\w.<>]{1,120})"),
)
_MARKED = re.compile(r"(?:-{1,4}>|❱)\s*(?P<line>\d{1,7})\s*[│|]?\s?(?P<code>.*)")
_START_OF_TRACEBACK = "Traceback (most recent call last"
_NAME = re.compile(r"(?<![\w./-])[A-Za-z][\w.-]{1,40}/[A-Za-z][\w.-]{2,80}(?![\w/])")


class _Lines(NamedTuple):
    """A log's lines without colours and prefixes, and the rank that each line's prefix names."""

    lines: list[str]
    ranks: list[int | None]


def clean(text: str) -> str:
    """Return a log's text as it is searched: without colours, and without the prefixes of launchers and loggers.

    >>> clean("\\x1b[31m[rank3]: torch.OutOfMemoryError\\x1b[0m")
    'torch.OutOfMemoryError'
    """
    return "\n".join(_lines_of(text).lines)


def _lines_of(text: str) -> _Lines:
    lines: list[str] = []
    ranks: list[int | None] = []
    plain = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\f"))
    for line in plain.split("\n"):
        rank: int | None = None
        at = 0
        for _ in range(5):
            match = _PREFIX.match(line, at)
            if match is None:
                break
            at = match.end()
            rank = next((int(number) for number in match.groups() if number), rank)
        lines.append(_BOX_END.sub("", line[at:]) if "│" in line or "┃" in line or "║" in line else line[at:])
        ranks.append(rank)
    return _Lines(lines, ranks)


def read_log(text: str) -> Log:
    """Return the out-of-memory messages of a log, or of a pasted part of one."""
    is_cut = len(text) > LONGEST
    skipped = text.count("\n", 0, len(text) - LONGEST) if is_cut else 0
    read = _lines_of(text[-LONGEST:] if is_cut else text)
    joined = "\n".join(read.lines)
    starts = [0, *accumulate(len(line) + 1 for line in read.lines)]
    taken: set[int] = set()
    found: list[Message] = []
    for form in FORMS:
        for at, match in _starts(form, joined, starts):
            if at in taken:
                continue
            taken.update(range(at, bisect_right(starts, match.end() - 1)))
            window = _window(read, at, 0 if form.is_told else match.start() - starts[at])
            frames = _frames(read, at) if form.cause in _URGENCY[:3] else ()
            rank = read.ranks[at]
            values, processes = _values(form, match, window)
            found.append(Message(form, skipped + at + 1, () if rank is None else (rank,), values, processes, frames))
    found.sort(key=lambda message: message.line)
    said: dict[str, Message] = {}
    for form in STATEMENTS:
        for at, match in _starts(form, joined, starts):
            values, _ = _values(form, match, "")
            rank = read.ranks[at]
            said[form.start] = Message(form, skipped + at + 1, () if rank is None else (rank,), values)
    names = tuple(dict.fromkeys(match[0] for match in _NAME.finditer(joined)))[:_MOST_MESSAGES]
    return Log(tuple(_merged(found))[:_MOST_MESSAGES], tuple(said.values()), is_cut, names)


def _starts(form: Form, joined: str, starts: list[int]) -> Iterator[tuple[int, re.Match[str]]]:
    """Yield where a form is found: the index of its first line, and the match. It is looked for around a word of it."""
    word, found, done = keyword(form.start), 0, 0
    at = joined.find(word)
    while at >= 0 and found < _MOST_MESSAGES:
        match = pattern(form.start).search(joined, max(done, at - _AROUND), at + _AROUND)
        if match is not None:
            yield bisect_right(starts, match.start()) - 1, match
            found, done = found + 1, match.end()
        at = joined.find(word, max(at + len(word), done))


def _window(read: _Lines, at: int, column: int) -> str:
    """Return a message with the lines that it may be wrapped over: those of its rank, up to the next traceback."""
    out = [read.lines[at][column:]]
    for i in range(at + 1, min(at + _WINDOW, len(read.lines))):
        line = read.lines[i]
        if read.ranks[i] != read.ranks[at]:
            continue
        if "out of memory" in line or _START_OF_TRACEBACK in line or 'File "' in line:
            break
        out.append(line)
    return "\n".join(out)


def _values(form: Form, match: re.Match[str], window: str) -> tuple[Mapping[str, Value], tuple[ProcessUse, ...]]:
    values: dict[str, Value] = {}
    processes: list[ProcessUse] = []
    for part in form.details:
        if keyword(part) not in window:
            continue
        for found in pattern(part).finditer(window):
            read = _fields(found)
            pid, other = read.get("pid"), read.get("other")
            if isinstance(pid, int) and isinstance(other, Amount):
                processes.append(ProcessUse(pid, other))
                continue
            values = {**read, **values}
            break
    return FrozenDict(_with_units({**values, **_fields(match)})), tuple(processes)


def _with_units(values: dict[str, Value]) -> dict[str, Value]:
    """Return the values with the request's unit, or another one's, for told amounts that have none."""
    units = {value.text.split()[-1] for value in values.values() if isinstance(value, Amount) and " " in value.text}
    unit = max(units, key=lambda name: "BKMGT".find(name[0]), default="")  # the card's numbers are the largest
    out: dict[str, Value] = {}
    for name, value in values.items():
        if isinstance(value, Amount) and value.text.replace(".", "").isdigit():
            if unit in ("GiB", "MiB", "GB", "MB"):
                out.setdefault(name, _amount(f"{value.text} {unit}", value.text, unit))
            continue
        out[name] = value
    return out


def _fields(match: re.Match[str]) -> dict[str, Value]:
    """Return the fields of a match. The first of a pair has the unit of the second."""
    out: dict[str, Value] = {}
    unit = ""
    for name, text in reversed(match.groupdict().items()):
        match FIELDS[name]:
            case "told bytes" if not _split(text)[1]:
                out[name.removesuffix("_told")] = Amount(text, 0)
            case "bytes" | "plain bytes" | "negative bytes" | "told bytes":
                number, own = _split(text)
                unit = own or ("bytes" if FIELDS[name] == "plain bytes" else unit)
                out[name.removesuffix("_bytes").removesuffix("_told")] = _amount(
                    text if own or not unit else f"{text} {unit}", number, unit
                )
            case "number" | "tokens":
                out[name] = int(text.replace(",", ""))
            case "share":
                out[name] = float(text)
            case _:
                out[name] = text
    return dict(reversed(out.items()))


def _split(text: str) -> tuple[str, str]:
    digits = text.rstrip("bytesBkKMGTi ")
    return digits, text[len(digits) :].strip()


def _amount(text: str, number: str, unit: str) -> Amount:
    """Return an amount.

    >>> _amount("9.47 GiB", "9.47", "GiB")
    Amount(text='9.47 GiB', bytes=10168335073, slack=5368710)
    """
    factor = _UNITS["bytes" if unit == "bytes" else unit[0].lower()]
    whole, _, fraction = number.partition(".")
    scale = 10 ** len(fraction)
    return Amount(text, int(whole + fraction) * factor // scale, -(-factor // (2 * scale)) if factor > 1 else 0)


def _frames(read: _Lines, at: int) -> tuple[TraceFrame, ...]:
    """Return the frames of the traceback that ends at a line, of its rank."""
    rank = read.ranks[at]
    lines = [i for i in range(max(0, at - 40 * _MOST_FRAMES), at) if read.ranks[i] == rank]
    begin = next((n for n in range(len(lines) - 1, -1, -1) if _START_OF_TRACEBACK in read.lines[lines[n]]), 0)
    found = list(_traced([read.lines[i] for i in lines[begin:]]))
    return tuple(found[-_MOST_FRAMES:])


def _traced(lines: list[str]) -> Iterator[TraceFrame]:
    open_frame: TraceFrame | None = None
    for line in lines:
        match = next((m for place in _PLACES if (m := place.search(line))), None)
        if match is not None:
            if open_frame is not None:
                yield open_frame
            found = match.groupdict()
            open_frame = TraceFrame(found["file"], int(found.get("line") or 0), found["function"])
            continue
        if open_frame is None:
            continue
        marked = _MARKED.search(line)
        if marked is not None:  # IPython and rich show lines around the frame's
            open_frame = open_frame._replace(line=open_frame.line or int(marked["line"]), code=marked["code"].strip())
        elif not open_frame.code and line.strip() and not re.fullmatch(r"[\s^~│|]*|\s*\d+ .*", line):
            open_frame = open_frame._replace(code=line.strip()[:200])
    if open_frame is not None:
        yield open_frame


def _merged(messages: Iterable[Message]) -> list[Message]:
    """Return different messages: equal ones of several ranks, or logged twice, are one."""
    out: dict[tuple[object, ...], Message] = {}
    for message in messages:
        key = (message.form.library, message.form.start, tuple(sorted(message.values.items(), key=str)))
        first = out.setdefault(key, message._replace(times=0))
        ranks = tuple(dict.fromkeys((*first.ranks, *message.ranks)))
        out[key] = first._replace(ranks=ranks, times=first.times + 1, frames=first.frames or message.frames)
    return [*out.values()]
