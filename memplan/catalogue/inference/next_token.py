"""How the next token comes of a pass's logits: chosen, drawn, ranked among beams, proposed by an assistant or looked
up, and verified; and what the loop's names keep of the token or round before until they have another.

Source: transformers 5.24 generation/utils.py and logits_process.py, candidate_generator.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from memplan.catalogue.inference.one_pass import Pass
from memplan.catalogue.kernels import ops
from memplan.core.ir import Op, Tensor

GENERATE = "transformers 5.24 generation/utils.py GenerationMixin._sample"
_MULTINOMIAL = "torch 2.13 aten/src/ATen/native/Distributions.cpp multinomial"
_BEFORE = " of the token before"
OF_PART = "logits of the part before"
_BEFORE_ROUND = " of the round before"
_FLOATS = ("logits in fp32", "copy of the logits")
_WARPERS = "transformers 5.24 generation/logits_process.py"
_TOP_P = (  # what TopPLogitsWarper has names for
    Tensor("sorted", "b v", "fp32"),
    Tensor("order", "b v", "int64"),
    Tensor("sums of their probabilities", "b v", "fp32"),
    *(Tensor(name, "b v", "bool") for name in ("removed of those", "removed")),
)
_ROUND = "transformers 5.24 generation/utils.py GenerationMixin._assisted_decoding"
_SPECULATIVE = "transformers 5.24 generation/utils.py _speculative_sampling"
_CANDIDATES = "transformers 5.24 generation/candidate_generator.py AssistedCandidateGenerator._generate_candidates"


def named_before(now: Pass) -> Iterator[Tensor]:
    """What the loop's names keep of the token before until they have another: its logits, and what was made of them; of
    the part of a prompt before, what the model made of its last token."""
    if now.part:
        yield Tensor(OF_PART, "b v", "=embeds")
        return
    if now.verifies:
        outputs = "verified_before" if now.last_only else "outputs_before"
        if now.follows:
            yield Tensor(f"logits{_BEFORE_ROUND}", f"b {outputs} v", now.verifies)
            names = _FLOATS if now.verifies != "fp32" else _FLOATS[1:]
            names += ("probabilities",) if now.samples and now.looks else ()
            yield from (Tensor(f"{what}{_BEFORE_ROUND}", "b verified_before v", "fp32") for what in names)
        return
    if now.proposes and not (now.samples and now.goes_on):  # a list has the logits, where they are not drawn from
        return
    more = ("sums of log probabilities",) if now.beams else ("scores", "probabilities") if now.samples else ()
    more = more or (("scores",) if now.suppresses else ())
    for what in ("logits", *more):
        yield Tensor(f"{what}{_BEFORE}", "b v", "fp32")
    if now.beams:
        yield Tensor(f"order{_BEFORE}", "b", "int64")


def next_token(after: tuple[Op, ...], now: Pass, cached: Iterable[Tensor]) -> Iterator[Op]:
    """The last token's logits, copied in fp32, and the token they say, are drawn for, or the sequences they rank."""
    if not now.chooses:
        return
    logits = next(op for op in reversed(after) if op.writes).writes[0].name
    if now.verifies:
        yield from _verified(logits, now)
        return
    if now.proposes:
        yield from _proposed(logits, now)
        return

    def made(name: str, *reads: str, y: str, scratch: tuple[Tensor, ...] = (), shape: str = "b v") -> Op:
        return Op(f"generate.{name}", reads, (Tensor(y, shape, "fp32"),), scratch=scratch, source=GENERATE)

    def forgotten(what: str) -> tuple[Op, ...]:
        return (ops.leave(f"{what}{_BEFORE}"),) if now.decodes else ()

    def chosen_of(scores: str, y: str) -> Op:
        """Scores without those of tokens that are suppressed."""
        tokens, which = Tensor("all tokens", "v", "int64"), Tensor("suppressed tokens", "v", "bool")
        among = (tokens, which, Tensor("minus infinity", "", "fp32"))
        return made("suppress", scores, y=y, scratch=among)

    exponentials = Tensor("exponentials", "b v", "fp32")
    yield made("scores", logits, y="next token logits")
    yield from forgotten("logits")
    if now.beams:
        scores = "log probabilities"
        yield made("log_softmax", "next token logits", y=scores)
        yield from forgotten("sums of log probabilities")
        if now.suppresses:
            yield chosen_of(scores, f"{scores} left")
            yield ops.leave(scores)
            scores = f"{scores} left"
        if now.samples:
            given, scores = scores, "next token scores"
            yield from _warped(given, scores)
            yield ops.leave(given)
        yield ops.leave(logits)
        sums, beams = "sums of log probabilities", Tensor("scores of beams", "b", "fp32")
        yield made("accumulate", scores, y=sums, scratch=(beams,))
        yield ops.leave(scores)
        if now.samples:
            drawn = (Tensor("probabilities", "b v", "fp32"), exponentials)
            yield Op("generate.multinomial", (sums,), scratch=drawn, source=_MULTINOMIAL)
        yield Op("generate.order", (sums,), (Tensor("order", "b", "int64"),), source=GENERATE)
        yield from forgotten("order")
        source = "transformers 5.24 generation/utils.py GenerationMixin._beam_search, cache_utils.py reorder_cache"
        for t in dict.fromkeys(cached):
            copy = t._replace(name=f"{t.name} in another order", dtype=f"={logits}")
            yield Op("generate.reorder", ("next token logits",), scratch=(copy,), source=source)
        yield ops.leave("next token logits", sums, "order")
        return
    if now.samples:
        scores = "next token logits"
        if now.suppresses:
            yield chosen_of(scores, "scores left")
            scores = "scores left"
        yield from _warped(scores, "next token scores", ("scores left",) if now.suppresses else ())
        yield from forgotten("scores")
        yield made("softmax", "next token scores", y="next token probabilities")
        yield from forgotten("probabilities")
        yield Op(
            "generate.multinomial",
            ("next token probabilities",),
            (Tensor("next token", "b", "int64"),),
            scratch=(exponentials,),
            source=_MULTINOMIAL,
        )
        yield ops.leave(logits, "next token logits", "next token scores", "next token probabilities")
        return
    scores = "next token logits"
    if now.suppresses:
        yield chosen_of(scores, "next token scores")
        yield from forgotten("scores")
        scores = "next token scores"
    yield Op("generate.argmax", (scores,), (Tensor("next token", "b", "int64"),), source=GENERATE)
    yield ops.leave(logits, "next token logits", scores)


def looked_up(now: Pass) -> Op:
    """The tokens are looked up; whether each may be is asked of a row of ones, as if those were its logits."""
    ones, left = Tensor("ones", "b v", "fp32"), tuple(Tensor(name, "b v", "fp32") for name in ("top k", "scores"))
    source = "transformers 5.24 generation/candidate_generator.py PromptLookupCandidateGenerator.get_candidates"
    return Op("generate.lookup", (), scratch=(ones, *(left + _TOP_P if now.samples else ())), source=source)


def _warped(x: str, y: str, done: tuple[str, ...] = ()) -> Iterator[Op]:
    """The scores `y` of a token that are left of its logits `x` by temperature, top-k and top-p; temperature is the
    last to read those that are `done` then."""

    def made(name: str, x: str, y: str, scratch: tuple[Tensor, ...] = ()) -> Op:
        return Op(f"generate.{name}", (x,), (Tensor(y, "b v", "fp32"),), scratch=scratch, source=_WARPERS)

    yield made("temperature", x, "warmed")
    yield ops.leave(*done)
    yield made("top_k", "warmed", "top k", (Tensor("not among the first", "b v", "bool"),))
    yield ops.leave("warmed")
    yield made("top_p", "top k", y, _TOP_P)
    yield ops.leave("top k")


def _verified(logits: str, now: Pass) -> Iterator[Op]:
    """The logits of the proposed tokens in fp32, twice, and which of the tokens stay. Their names have those of the
    round before until then."""

    def forgotten(what: str) -> tuple[Op, ...]:
        return (ops.leave(f"{what}{_BEFORE_ROUND}"),) if now.follows else ()

    def made(name: str, x: str, y: str, axis: str = "verified", source: str = _ROUND) -> Op:
        return Op(f"generate.{name}", (x,), (Tensor(y, f"b {axis} v", "fp32"),), source=source)

    wide, copy = _FLOATS
    if now.verifies == "fp32":  # which they are, as they were made
        wide = logits
    else:
        yield from forgotten("logits")
        yield made("float", logits, wide)
    yield from forgotten(wide if wide != logits else "logits")
    yield made("clone", wide, copy)
    yield from forgotten(copy)
    if not now.samples:
        found = tuple(Tensor(name, "b proposed", "bool") for name in ("same", "other"))
        chosen = (Tensor("selected tokens", "b verified", "int64"),)
        yield Op("generate.argmax", (wide,), chosen, source=_ROUND)
        yield Op("generate.matches", ("selected tokens",), scratch=found, source=_ROUND)
        yield ops.leave("selected tokens")
        yield ops.leave(logits, wide, copy)
        return
    yield from _warped(wide, "scores of a row")
    yield ops.leave("scores of a row")
    if now.drafted:
        yield Op("generate.q", (), (Tensor("q", "b proposed v", "fp32"),), source=_SPECULATIVE)
        yield made("p", wide, "p", source=_SPECULATIVE)
        yield Op(
            "generate.rejected",
            ("p", "q"),
            (Tensor("p less q", "b v", "fp32"),),
            scratch=(Tensor("difference", "b v", "fp32"),),
            source=_SPECULATIVE,
        )
        drawn = Tensor("exponentials", "b v", "fp32")
        yield Op(
            "generate.multinomial",
            ("p less q",),
            (Tensor("drawn token", "b", "int64"),),
            scratch=(drawn,),
            source=_MULTINOMIAL,
        )
        yield ops.leave("p less q", "p", "q")
    else:
        yield made("softmax", wide, "probabilities")
        yield from forgotten("probabilities") if now.looks else ()
        yield Op(
            "generate.multinomial",
            ("probabilities",),
            (Tensor("selected tokens", "b verified", "int64"),),
            scratch=(Tensor("exponentials", "b verified v", "fp32"),),
            source=_MULTINOMIAL,
        )
        yield ops.leave("probabilities")
    yield ops.leave(logits, wide, copy)


def _proposed(logits: str, now: Pass) -> Iterator[Op]:
    """The token that an assistant proposes, and how sure it is of that. A list keeps its logits (or scores, where it is
    drawn), which are joined when the last one is there."""

    def forgotten(what: str) -> tuple[Op, ...]:
        return (ops.leave(f"{what}{_BEFORE}"),) if now.goes_on else ()

    kept = "next token logits"
    yield Op("generate.scores", (logits,), (Tensor(kept, "b v", "fp32"),), source=GENERATE)
    chosen, more = Tensor("next token", "b", "int64"), ()
    if now.samples:
        yield from forgotten("logits")
        yield from _warped(kept, "next token scores")
        kept, more = "next token scores", ("next token logits", "next token probabilities")
        yield Op("generate.softmax", (kept,), (Tensor(more[1], "b v", "fp32"),), source=GENERATE)
        yield from forgotten("probabilities")
        drawn = (Tensor("exponentials", "b v", "fp32"),)
        yield Op("generate.multinomial", more[1:], (chosen,), scratch=drawn, source=_MULTINOMIAL)
    else:
        yield Op("generate.argmax", (kept,), (chosen,), source=GENERATE)
    sure = (Tensor("probabilities of the token", "b v", "fp32"),)
    source = "transformers 5.24 generation/stopping_criteria.py ConfidenceCriteria"
    yield Op("generate.confidence", (kept,), scratch=sure, source=source)
    yield ops.leave(logits, *more)
    if now.stacks:
        joined = Tensor("logits of all proposed tokens", "b proposed v", "fp32")
        yield Op("generate.stack", (kept,), scratch=(joined,), source=_CANDIDATES)
    yield ops.leave(kept)
