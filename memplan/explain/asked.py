"""The tensor behind a request that failed, by the traceback, by its size, and by the replay of the run."""

from __future__ import annotations

from collections.abc import Sequence

from memplan.core.units import MIB
from memplan.explain import forms
from memplan.explain.findings import ASKED, LIKELY, POSSIBLE, SURE, Explanation
from memplan.explain.frames import STATES, TOWER, WEIGHT, Position
from memplan.explain.message import Amount
from memplan.explain.requests import TensorRequest
from memplan.explain.tensors import Candidate, RunSizes, candidates, says_nothing
from memplan.models.model import ModelSpec

MOST_CANDIDATES = 3


def name_tensor(
    out: Explanation,
    sizes: RunSizes | None,
    model: ModelSpec | None,
    failed: TensorRequest | None,
    lengths_known: bool,
) -> None:
    """Find what asked: by the frames, by the size, and by the replay's own failure."""
    request, at = out.message.amount("request"), out.position
    if at.words:
        frame = at.frame
        assert frame is not None
        where = f"{frame.file.rpartition('/')[2]}:{frame.line} {frame.function}"
        phase = f" in {at.phase}" if at.phase else ""
        out.find(ASKED, f"{at.words}{phase}", SURE, f"the traceback's frame {where}: {frame.code[:80]}")
    elif at.phase:
        out.find(ASKED, f"the phase is {at.phase}", LIKELY, "the traceback's frames")
    if request is None or out.message.form.cause in (forms.HOST, forms.KILLED):
        return
    if out.message.form.cause == forms.DRIVER:
        text = f"{request.text} for {out.message.form.library} itself: not a tensor, but the card was full"
        out.find(ASKED, text, SURE, out.message.form.source)
        return
    if says_nothing(request):
        text = f"{request.text} says nothing about the tensor: torch asks for that much for every tensor up to "
        text += "1 MiB" if request.bytes < 4 * MIB else "10 MiB (the card was full by then)"
        out.find(ASKED, text, SURE, "torch's allocator takes segments of 2 and 20 MiB")
    if sizes is None or model is None:
        if not says_nothing(request):
            text = f"{request.text}: name the model to factorise it, as in memplan explain LOG MODEL"
            out.find(ASKED, text, SURE, "no model is given, and the log names none that memplan has a card of")
        return
    found = [] if says_nothing(request) else candidates(request, sizes, model, lengths_known)
    ranked = sorted(found, key=lambda c: -_score(c, at, failed, sizes, lengths_known))
    for candidate in ranked[:MOST_CANDIDATES]:
        certainty = _certainty(candidate, ranked, at, failed, sizes, lengths_known)
        out.candidates.append((candidate, certainty))
        out.find(ASKED, _named(request, candidate, at), certainty, _reason(candidate, at, failed, sizes, lengths_known))
    best = ranked[0] if ranked else None
    if best is not None and lengths_known and best.tensor.role in at.roles and _is_too_long(best, sizes):
        needed = f"{best.tensor.role} of {request.text} take {best.batch} x {best.sequence:,} tokens"
        out.contradictions.append(f"{needed}, and the run has {best.batch} x {sizes.sequence:,}")
    if not ranked and not says_nothing(request):
        out.find(
            ASKED, f"{request.text} is no product of {model.name}'s sizes", LIKELY, "tried every tensor of the run"
        )


_PRIORS = {
    "logits": 2.0,
    "attention scores": 1.0,
    TOWER: 1.5,
    WEIGHT: 1.5,
    "MLP": 1.0,
    "optimizer state": 1.0,
    "other": -2.0,
}

_IMPLAUSIBLE = 2**18  # tokens in one sequence that hardly any run without a stated length has


def _score(c: Candidate, at: Position, failed: TensorRequest | None, sizes: RunSizes, lengths_known: bool) -> float:
    """Return how likely a candidate is, as a sum of what speaks for it."""
    score = _PRIORS.get(c.tensor.role, 0.5)
    score += 4 if c.tensor.role in at.roles else 0
    score -= 2 if at.roles and c.tensor.role not in at.roles else 0
    score += 1 if at.phase and at.phase == c.tensor.phase else 0
    score -= 1.5 if c.tensor.role == WEIGHT and at.phase in ("forward", "backward") and WEIGHT not in at.roles else 0
    score += 1.5 if c.tensor.role == WEIGHT and at.phase == "load" else 0
    score += 3 if failed is not None and _same(c, failed) else 0
    if c.sequence and not c.given:
        longest = sizes.sequence if lengths_known and c.tensor.role != TOWER else _IMPLAUSIBLE
        score -= 3 if c.sequence > longest else 0
        score += 0.5 if c.sequence % 64 == 0 and c.sequence >= 64 else 0
        score -= 0.5 if c.note else 0
    elif c.given:
        score += 3 if c.sequence else 2.5
    return score


def _same(c: Candidate, failed: TensorRequest) -> bool:
    return (c.tensor.shape, c.tensor.dtype) == (failed.shape, failed.dtype) and c.given


def _certainty(
    c: Candidate,
    ranked: Sequence[Candidate],
    at: Position,
    failed: TensorRequest | None,
    sizes: RunSizes,
    lengths_known: bool,
) -> str:
    """Return how sure a candidate is. It is never sure by its size alone."""
    agrees = c.tensor.role in at.roles
    replayed = failed is not None and _same(c, failed)
    if agrees and replayed:
        return SURE
    if c is not ranked[0]:
        return POSSIBLE
    alone = not any(
        _score(o, at, failed, sizes, lengths_known) > _score(c, at, failed, sizes, lengths_known) - 1
        for o in ranked[1:]
    )
    too_long = lengths_known and _is_too_long(c, sizes)
    return LIKELY if (replayed or (agrees and (c.given or alone))) and not too_long else POSSIBLE


def _is_too_long(c: Candidate, sizes: RunSizes) -> bool:
    """Whether a candidate takes more tokens than a sequence of the run has."""
    return c.tensor.role != TOWER and not c.given and c.sequence > sizes.sequence


def _named(request: Amount, c: Candidate, at: Position) -> str:
    place = f" ({c.tensor.where})" if c.tensor.where else ""
    others = f" and {len(c.names) - 1} more of its shape" if len(c.names) > 1 else ""
    also = f", or {c.names[0]}{others}" if c.names else ""
    # an optimizer's states and temporaries have the sizes of weights
    like = "the size of " if c.tensor.role == WEIGHT and STATES in at.roles else ""
    return f"{request.text} = {c.factors}: {like}{c.tensor.what}{place} in {c.tensor.dtype}{also}"


def _reason(c: Candidate, at: Position, failed: TensorRequest | None, sizes: RunSizes, lengths_known: bool) -> str:
    why: list[str] = []
    if c.tensor.role in at.roles:
        why.append(f"the frame allocates {c.tensor.role}")
    elif at.roles:
        why.append(f"the frame allocates {' or '.join(at.roles)} instead")
    if failed is not None and _same(c, failed):
        why.append("the replay fails at it, too")
    if c.given:
        why.append("the run's own sizes" if c.sequence else "a weight's size does not depend on the batch")
    elif c.sequence:
        low, high = c.lengths
        noun = "patches" if c.tensor.role == TOWER else "tokens"
        span = f"{low:,} to {high:,}" if low != high else f"{low:,}"
        text = f"with {c.batch} x {span} {noun}" if c.tensor.role != TOWER else f"with {span} {noun}"
        if lengths_known and c.tensor.role != TOWER:
            text += f", and the run has {sizes.sequence:,}"
        why.append(text)
    if c.note:
        why.append(c.note)
    return "; ".join(why)
