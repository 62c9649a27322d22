"""The lines of a shell script, each with those that continue it, and the files and variables of its here-documents."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

_ARRAYS_END = re.compile(r"^[^#]*\)\s*(?:#.*)?$")
_OPEN_ARRAY = re.compile(r"\s*(?:(?:export|local|declare(?: -\w+)?) +)?\w+\+?=\(")
_HERE = re.compile(r"<<-?\s*['\"]?(\w+)")
# cat > FILE <<EOF, cat <<EOF > FILE, tee FILE <<EOF
_WRITE = re.compile(
    r"\bcat\s*>\s*([^\s<]{1,999})\s*<<|\bcat\s*<<-?\s*\S{1,99}\s*>\s*(\S{1,999})|\btee\s+([^\s<]{1,999})[^;|]{0,99}<<"
)
WRITTEN = "the file "  # of a script's variables: no shell has one with spaces
_READ = re.compile(r"\s*(?:IFS=\S* )?read\b.{0,99}?\b(\w{1,99})\s*<<")  # read -r NAME <<EOF; bounded: it may be data
_CONTINUED = "\\\n"
LONGEST_LINE = 20_000  # characters; a longer one is data, over whose words shlex takes quadratic time
_LONGEST_ARRAY = 200  # lines
LONG = f"more than {LONGEST_LINE:,} characters in quotes, which are not read"
_QUOTES = re.compile(r"\\.|['\"]|(?<![^\s;&|()])#.*")  # and comments, in which they are none
_QUOTES_END = re.compile(r"\\.|\"")


def joined_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield each line with the lines that continue it, its quotes or its array, and its number. A here-document is left
    out; or it is a variable's value if `read` gets it, or the text of the file that it becomes."""
    start, joined, end, name, here, quote = 1, "", "", "", "", ""
    for number, line in enumerate((line if len(line) < LONGEST_LINE else "" for line in text.splitlines()), 1):
        if end:
            is_end = line.strip() == end
            here += "" if is_end else f"{line}\n"
            if is_end and name.startswith(WRITTEN):
                yield start, f"{name}\n{here}"
            elif is_end and name:
                yield start, f"{name}={shlex.quote(here.replace(_CONTINUED, ' '))}"
            end, name, here = ("", "", "") if is_end else (end, name, here)
            continue
        start = start if joined else number
        quote = _open_quote(line, quote)
        if line.rstrip().endswith("\\") and (joined or not line.lstrip().startswith("#")):
            joined += f"{line.rstrip()[:-1]} "
            continue
        joined += line
        is_long = len(joined) >= LONGEST_LINE
        is_array = not is_long and number - start < _LONGEST_ARRAY and _OPEN_ARRAY.match(joined)
        if quote or (is_array and not _ARRAYS_END.search(line)):
            joined += "\n"
            continue
        ending, reading = _HERE.search(joined), _READ.match(joined)
        end, name = ending[1] if ending is not None else "", reading[1] if reading is not None else ""
        if end and (writing := _WRITE.search(joined)) is not None:
            name = WRITTEN + (writing[1] or writing[2] or writing[3]).strip("\"'")
        yield start, LONG if is_long and "\n" in joined else joined
        joined = ""
    yield start, quote or joined  # a quote that is never closed, which shlex reads in quadratic time


def _open_quote(line: str, quote: str) -> str:
    """Return the quote that is open after a line, of which `quote` was open before it; empty if none is."""
    at = 0
    while at < len(line):
        if quote == "'":
            at = line.find(quote, at) + 1 or len(line) + 1
            quote = quote if at > len(line) else ""
            continue
        match = (_QUOTES_END if quote else _QUOTES).search(line, at)
        if match is None:
            break
        at = match.end()
        if match[0] in ("'", '"'):
            quote = "" if quote else match[0]
    return quote
