"""`memplan.explain`: why a run ran out of memory, from its message and, if it is known, from the run itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from memplan.core.errors import MemplanError, SpecError
from memplan.core.units import gib, rounded
from memplan.estimate.estimate import walk
from memplan.explain import forms
from memplan.explain.asked import name_tensor
from memplan.explain.engines import budget, buffers, host, statements
from memplan.explain.findings import WHOSE, Explanation
from memplan.explain.memory import owners
from memplan.explain.message import Log, read_log
from memplan.explain.tensors import RunSizes
from memplan.explain.with_run import compare_with_run
from memplan.models.cards import find_model, is_bundled
from memplan.models.model import ModelSpec
from memplan.spec.run import RunSpec


def explain(text: str, run: RunSpec | None = None, *, with_plan: bool = True) -> Explanation:
    """Return why a run ran out of memory.

    text       its log, or the message alone
    run        the run, if it is known: what asked is then found by replaying it
    with_plan  whether to look for changes that make the run fit, which takes longest

    Raises SpecError if there is no out-of-memory message in the text.
    """
    log = read_log(text)
    message = log.main
    if message is None:
        raise SpecError(_no_message(log), "log")
    out = Explanation(log, message)
    out.owners = tuple(owners(message))
    _notes(out)
    for owner in out.owners:
        out.find(WHOSE, owner.text, owner.certainty, owner.why)
    statements(out)
    if run is not None:
        try:
            compare_with_run(out, run, with_plan)
        except MemplanError as error:  # a run that memplan refuses does not hide what the message says
            out.contradictions.append(f"the run is not answered: {error}")
            _without_run(out)
    else:
        _without_run(out)
    if message.form.cause == forms.BUDGET:
        budget(out)
    if message.form.cause in (forms.HOST, forms.KILLED):
        host(out)
    return out


def explain_request(bytes_: int, place: str, run: RunSpec | None) -> str:
    """Return what a request of exactly that many bytes may be, as a sentence; `place` is where it was asked for."""
    asked = f"{gib(bytes_)} at {place}"
    if run is None:
        return f"{asked}; name the run to factorise it"
    with suppress(MemplanError):
        sizes = RunSizes(walk(run))
        found = [t for t in sizes.tensors if rounded(sizes.bytes_at(t, sizes.sequence) or 0) == rounded(bytes_)]
        if found:
            names = ", ".join(dict.fromkeys(f"{t.where} {t.what}".strip() for t in found[:3]))
            return f"{asked}: the size of {names}" + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    return f"{asked}: no tensor of the run has that size"


def _no_message(log: Log) -> str:
    other = next((m for m in log.messages if m.form.cause == forms.OTHER), None)
    if other is None:
        return "log: there is no out-of-memory message in it; give the part with 'out of memory', or a run's file"
    request = other.amount("request")
    asked = f", which asked for {request.text}" if request else ""
    library = other.form.library
    text = f"line {other.line} is {library}'s own out-of-memory message{asked}"
    return f"log: {text}; memplan explains those of torch, vLLM, SGLang and llama.cpp"


def _notes(out: Explanation) -> None:
    log, message = out.log, out.message
    if log.is_cut:
        out.notes.append("The log is long: its last 16 MiB were read.")
    others = [m for m in log.messages if m is not message]
    if others:
        shown = ", ".join(f"line {m.line} ({m.form.library}, {m.form.cause})" for m in others[:4])
        more = f" and {len(others) - 4} more" if len(others) > 4 else ""
        out.notes.append(f"The log has other messages: {shown}{more}. Line {message.line} is explained.")
    if len(message.ranks) > 1:
        out.notes.append(f"Ranks {', '.join(map(str, sorted(message.ranks)[:16]))} have the same message.")


def _without_run(out: Explanation) -> None:
    model = _named_model(out.log.names)
    if model is not None:
        with suppress(MemplanError):
            run = RunSpec(model=model.name)
            out.notes.append(f"No run is given: sizes are those of {model.name}, which the log names.")
            if out.message.form.library == "llama.cpp":
                buffers(out, model, None)
                return
            name_tensor(out, RunSizes(walk(run)), model, None, lengths_known=False)
            return
    name_tensor(out, None, None, None, lengths_known=False)


def named_model(text: str) -> str | None:
    """Return the first model with a card that a log names."""
    model = _named_model(read_log(text).names)
    return None if model is None else model.name


def _named_model(names: Sequence[str]) -> ModelSpec | None:
    """Return the first model that a log names, if it is one with a card."""
    for name in names:
        with suppress(MemplanError, OSError, ValueError):
            if is_bundled(name):
                return find_model(name)
    return None
