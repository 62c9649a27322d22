"""How the next token is computed from a pass's logits: greedy choice, sampling, beam search, assisted generation.

Also what the loop's names keep of the previous token or round until they are reassigned.

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
_TOP_P = (  # names in TopPLogitsWarper
    Tensor("sorted", "b v", "fp32"),
    Tensor("order", "b v", "int64"),
    Tensor("sums of their probabilities", "b v", "fp32"),
    *(Tensor(name, "b v", "bool") for name in ("removed of those", "removed")),
)
_ROUND = "transformers 5.24 generation/utils.py GenerationMixin._assisted_decoding"
_SPECULATIVE = "transformers 5.24 generation/utils.py _speculative_sampling"
_CANDIDATES = "transformers 5.24 generation/candidate_generator.py AssistedCandidateGenerator._generate_candidates"


def named_before(now: Pass) -> Iterator[Tensor]:
    """Yield the tensors that the loop's names keep of the previous token until they are reassigned.

    After a part of a prompt these are the logits of the part's last token.
    """
    if now.part:
        yield Tensor(OF_PART, "b v", "product" if now.spans_autocast else "=embeds")
        return
    if now.verifies:
        outputs = "verified_before" if now.last_only else "outputs_before"
        if now.follows:
            yield Tensor(f"logits{_BEFORE_ROUND}", f"b {outputs} v", now.verifies)
            names = _FLOATS if now.verifies != "fp32" else _FLOATS[1:]
            names += ("probabilities",) if now.samples and now.uses_lookup else ()
            yield from (Tensor(f"{what}{_BEFORE_ROUND}", "b verified_before v", "fp32") for what in names)
        return
    if now.proposes and not (
        now.samples and now.follows_passes
    ):  # a list holds the logits, unless they are sampled from
        return
    names = ("sums of log probabilities",) if now.beams else ("scores", "probabilities") if now.samples else ()
    names = names if now.warps else ("probabilities",)
    names = names or (("scores",) if now.suppresses else ())
    for what in ("logits", *names):
        yield Tensor(f"{what}{_BEFORE}", "b v", "fp32")
    if now.beams:
        yield Tensor(f"order{_BEFORE}", "b", "int64")


def next_token(after: tuple[Op, ...], now: Pass, cached: Iterable[Tensor]) -> Iterator[Op]:
    """Yield the choice of the next token from the last token's fp32 logits: argmax, sampling or beam ranking."""
    if not now.chooses:
        return
    logits = next(op for op in reversed(after) if op.writes).writes[0].name
    if now.verifies:
        yield from _verified(logits, now)
        return
    if now.proposes:
        yield from _proposed(logits, now)
        return

    def logits_op(name: str, *reads: str, y: str, scratch: tuple[Tensor, ...] = ()) -> Op:
        return Op(f"generate.{name}", reads, (Tensor(y, "b v", "fp32"),), scratch=scratch, source=GENERATE)

    def release(what: str) -> tuple[Op, ...]:
        return (ops.release_names(f"{what}{_BEFORE}"),) if now.decodes else ()

    def suppressed(scores: str, y: str) -> Op:
        """Set the scores of suppressed tokens to minus infinity."""
        tokens, is_suppressed = Tensor("all tokens", "v", "int64"), Tensor("suppressed tokens", "v", "bool")
        temporaries = (tokens, is_suppressed, Tensor("minus infinity", "", "fp32"))
        return logits_op("suppress", scores, y=y, scratch=temporaries)

    yield logits_op("scores", logits, y="next token logits")
    yield from release("logits")
    if now.beams:
        scores = "log probabilities"
        yield logits_op("log_softmax", "next token logits", y=scores)
        yield from release("sums of log probabilities")
        if now.suppresses:
            yield suppressed(scores, f"{scores} left")
            yield ops.release_names(scores)
            scores = f"{scores} left"
        if now.samples:
            before, scores = scores, "next token scores"
            yield from _warped(before, scores)
            yield ops.release_names(before)
        yield ops.release_names(logits)
        sums, beams = "sums of log probabilities", Tensor("scores of beams", "b", "fp32")
        yield logits_op("accumulate", scores, y=sums, scratch=(beams,))
        yield ops.release_names(scores)
        if now.samples:
            scratch = tuple(Tensor(what, "b v", "fp32") for what in ("probabilities", "exponentials"))
            yield Op("generate.multinomial", (sums,), scratch=scratch, source=_MULTINOMIAL)
        yield Op("generate.order", (sums,), (Tensor("order", "b", "int64"),), source=GENERATE)
        yield from release("order")
        source = "transformers 5.24 generation/utils.py GenerationMixin._beam_search, cache_utils.py reorder_cache"
        for t in dict.fromkeys(cached):
            copy = t._replace(name=f"{t.name} in another order", dtype=f"={logits}")
            yield Op("generate.reorder", ("next token logits",), scratch=(copy,), source=source)
        yield ops.release_names("next token logits", sums, "order")
        return
    if now.samples:
        scores = "next token logits"
        if now.suppresses:
            yield suppressed(scores, "scores left")
            scores = "scores left"
        if now.warps:
            yield from _warped(scores, "next token scores", ("scores left",) if now.suppresses else ())
            yield from release("scores")
            scores = "next token scores"
        yield logits_op("softmax", scores, y="next token probabilities")
        yield from release("probabilities")
        yield _drawn("next token probabilities", "next token")
        yield ops.release_names(logits, "next token logits", scores, "next token probabilities")
        return
    scores = "next token logits"
    if now.suppresses:
        yield suppressed(scores, "next token scores")
        yield from release("scores")
        scores = "next token scores"
    yield Op("generate.argmax", (scores,), (Tensor("next token", "b", "int64"),), source=GENERATE)
    yield ops.release_names(logits, "next token logits", scores)


def _drawn(probabilities: str, token: str, rows: str = "b") -> Op:
    """Draw a token for each row of probabilities."""
    exponentials = (Tensor("exponentials", f"{rows} v", "fp32"),)
    drawn = (Tensor(token, rows, "int64"),)
    return Op("generate.multinomial", (probabilities,), drawn, scratch=exponentials, source=_MULTINOMIAL)


def looked_up(now: Pass) -> Op:
    """Look up proposed tokens in the text. Each is checked against a row of ones in place of logits."""
    ones, left = Tensor("ones", "b v", "fp32"), tuple(Tensor(name, "b v", "fp32") for name in ("top k", "scores"))
    source = "transformers 5.24 generation/candidate_generator.py PromptLookupCandidateGenerator.get_candidates"
    return Op("generate.lookup", (), scratch=(ones, *(left + _TOP_P if now.samples else ())), source=source)


def _warped(x: str, y: str, done: tuple[str, ...] = ()) -> Iterator[Op]:
    """Yield the scores `y` left of the logits `x` by temperature, top-k and top-p.

    Temperature is the last to read the tensors `done`.
    """

    def warper(name: str, x: str, y: str, scratch: tuple[Tensor, ...] = ()) -> Op:
        return Op(f"generate.{name}", (x,), (Tensor(y, "b v", "fp32"),), scratch=scratch, source=_WARPERS)

    yield warper("temperature", x, "warmed")
    yield ops.release_names(*done)
    yield warper("top_k", "warmed", "top k", (Tensor("not among the first", "b v", "bool"),))
    yield ops.release_names("warmed")
    yield warper("top_p", "top k", y, _TOP_P)
    yield ops.release_names("top k")


def _verified(logits: str, now: Pass) -> Iterator[Op]:
    """Yield the verification of proposed tokens: their logits in fp32, copied once, and which tokens are accepted.

    The loop's names keep the previous round's tensors until then.
    """

    def release(what: str) -> tuple[Op, ...]:
        return (ops.release_names(f"{what}{_BEFORE_ROUND}"),) if now.follows else ()

    def op(name: str, x: str, y: str, axis: str = "verified", source: str = _ROUND) -> Op:
        return Op(f"generate.{name}", (x,), (Tensor(y, f"b {axis} v", "fp32"),), source=source)

    logits32, copy = _FLOATS
    if now.verifies == "fp32":  # they are already fp32
        logits32 = logits
    else:
        yield from release("logits")
        yield op("float", logits, logits32)
    yield from release(logits32 if logits32 != logits else "logits")
    yield op("clone", logits32, copy)
    yield from release(copy)
    if not now.samples:
        matches = tuple(Tensor(name, "b proposed", "bool") for name in ("same", "other"))
        selected = (Tensor("selected tokens", "b verified", "int64"),)
        yield Op("generate.argmax", (logits32,), selected, source=_ROUND)
        yield Op("generate.matches", ("selected tokens",), scratch=matches, source=_ROUND)
        yield ops.release_names("selected tokens")
        yield ops.release_names(logits, logits32, copy)
        return
    yield from _warped(logits32, "scores of a row")
    yield ops.release_names("scores of a row")
    if now.drafted:
        yield Op("generate.q", (), (Tensor("q", "b proposed v", "fp32"),), source=_SPECULATIVE)
        yield op("p", logits32, "p", source=_SPECULATIVE)
        yield Op(
            "generate.rejected",
            ("p", "q"),
            (Tensor("p less q", "b v", "fp32"),),
            scratch=(Tensor("difference", "b v", "fp32"),),
            source=_SPECULATIVE,
        )
        yield _drawn("p less q", "drawn token")
        yield ops.release_names("p less q", "p", "q")
    else:
        yield op("softmax", logits32, "probabilities")
        yield from release("probabilities") if now.uses_lookup else ()
        yield _drawn("probabilities", "selected tokens", "b verified")
        yield ops.release_names("probabilities")
    yield ops.release_names(logits, logits32, copy)


def _proposed(logits: str, now: Pass) -> Iterator[Op]:
    """Yield an assistant's choice of a token, and its confidence.

    A list keeps the logits (or the scores if sampling), which are stacked after the round's last token.
    """

    def release(what: str) -> tuple[Op, ...]:
        return (ops.release_names(f"{what}{_BEFORE}"),) if now.follows_passes else ()

    kept = "next token logits"
    yield Op("generate.scores", (logits,), (Tensor(kept, "b v", "fp32"),), source=GENERATE)
    chosen, released = Tensor("next token", "b", "int64"), ()
    if now.samples:
        yield from release("logits")
        yield from _warped(kept, "next token scores")
        kept, released = "next token scores", ("next token logits", "next token probabilities")
        yield Op("generate.softmax", (kept,), (Tensor(released[1], "b v", "fp32"),), source=GENERATE)
        yield from release("probabilities")
        yield _drawn(released[1], chosen.name)
    else:
        yield Op("generate.argmax", (kept,), (chosen,), source=GENERATE)
    confidence = (Tensor("probabilities of the token", "b v", "fp32"),)
    source = "transformers 5.24 generation/stopping_criteria.py ConfidenceCriteria"
    yield Op("generate.confidence", (kept,), scratch=confidence, source=source)
    yield ops.release_names(logits, *released)
    if now.stacks:
        joined = Tensor("logits of all proposed tokens", "b proposed v", "fp32")
        yield Op("generate.stack", (kept,), scratch=(joined,), source=_CANDIDATES)
    yield ops.release_names(kept)
