"""Assisted generation: the rounds in which an assistant proposes tokens and the model reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from memplan.catalogue.inference.one_pass import Pass
from memplan.engine.walk import size
from memplan.program.graph import Graph, Held
from memplan.program.inference.passes import Step
from memplan.program.run import Assistant, Decided

_CANDIDATES = "transformers 5.24 generation/candidate_generator.py"
_ROUND = "transformers 5.24 generation/utils.py GenerationMixin._assisted_decoding"


class Round(NamedTuple):
    """A round: its number from 1, how many tokens there are when it begins, how many are proposed in it, and how many
    were in the round before."""

    number: int
    tokens: int
    proposed: int
    before: int


def longest_draft(tokens: int, new: int) -> int:
    """The most tokens that a round proposes where it begins with so many, and two more for each that were all accepted.

    Source: transformers 5.24 generation/candidate_generator.py AssistedCandidateGenerator.update_candidate_strategy.
    """
    done = most = 0
    while done < new:
        proposed = min(tokens, new - done - 1)
        most, done, tokens = max(most, proposed), done + proposed + 1, tokens + 2
    return most


def round_of(assistant: Assistant, prompt: int, new: int, number: int) -> Round:
    """A round, where one token stayed of each before it."""

    def proposed(number: int) -> int:
        left = new - number
        if number < 1 or not left:
            return 0
        tokens = prompt + number - 1
        return min(assistant.tokens, tokens - 1 if assistant.looks else left)

    return Round(number, prompt + number - 1, proposed(number), proposed(number - 1))


_SPREAD = 3  # rounds that are replayed between the second and the last as long as any


def steps_of(decided: Decided, replayed: bool = False) -> tuple[Step, ...]:
    """The passes of the rounds among which the largest is, in order, or of some that are evenly spread, to be
    `replayed`: of those that propose a token the first two of a round, and the last."""
    assistant = decided.assistant
    assert assistant is not None
    prompt, new = decided.batch.sequence, decided.batch.new_tokens
    full = max(1, new - assistant.tokens)
    numbers = {1, 2, full, full + 1, new - 1, new}
    if replayed:
        between = (2 + (full - 2) * i // (_SPREAD + 1) for i in range(1, _SPREAD + 1))
        numbers = {1, 2, full, new, *(between if full > 2 else ())}
    found: list[Step] = []
    for number in sorted(n for n in numbers if 1 <= n <= new):
        one = round_of(assistant, prompt, new, number)
        found += _drafts(decided, assistant, one)
        found.append(_verifies(decided, assistant, one))
    return tuple(found)


def _drafts(decided: Decided, assistant: Assistant, one: Round) -> list[Step]:
    """The passes of a round that propose tokens: the first two, and the last."""
    if assistant.drafts is None or not one.proposed:
        return []
    before = round_of(assistant, decided.batch.sequence, decided.batch.new_tokens, one.number - 1)
    other = _verifies(decided, assistant, before)._replace(other=None, beside=()) if one.number > 1 else None
    beside = _named(decided, one)
    found: list[Step] = []
    for i in sorted({0, min(1, one.proposed - 1), one.proposed - 1}):
        step = _draft(assistant, one, i)
        found.append(step._replace(other=other, beside=(*beside, *_scores(decided, i), *_ids(decided, one, i))))
    return found


def _draft(assistant: Assistant, one: Round, i: int) -> Step:
    """The pass that proposes the `i`th token of a round. The first reads what its cache lacks: of the first round the
    prompt, of later ones two tokens, the last that it proposed and the model's own."""
    drafts = assistant.drafts
    assert drafts is not None
    graph, stacks = drafts.structure.graph, i == one.proposed - 1
    assert graph.inference is not None
    now = graph.inference._replace(
        phase="prefill" if one.number == 1 else "decode",
        proposes=True,
        stacks=stacks,
        records=True,
        batches=graph.inference.switches and i > 0,
    )
    window, tokens = graph.model.sliding_window or 0, one.tokens
    if one.number == 1:
        if i == 0:
            return Step(graph._replace(inference=now), 1, tokens, window=_within(tokens, window), grown=tokens)
        fed, past, cropped, grown = 1, tokens + i - 1, 0, tokens + i
        kept = grown - 1
    else:
        first = min(tokens - 2, window - 1) + 2 if window else tokens
        fed, past, cropped, grown = 1, tokens + i - 1, 0, first + i
        kept = grown - 1
        if i == 0:
            fed, past, cropped = 2, tokens - 2 + one.before, one.before
            early = tokens - 1 if one.number == 2 else min(tokens - 3, window - 1) + 2 if window else tokens - 1
            kept = early + one.before - 1
    seen = min(grown, window - 1 + fed) if window else grown
    one_pass = _over_cache(graph, now, fed, past - cropped + fed, window)
    return Step(one_pass, 1, fed, past, kept, seen, cropped=cropped, grown=grown, assists=True, proposed=one.proposed)


def _verifies(decided: Decided, assistant: Assistant, one: Round) -> Step:
    """The model's pass of a round."""
    graph = decided.structure.graph
    assert graph.inference is not None
    model, first, fed = graph.model, one.number == 1, one.proposed + 1
    drafted = assistant.drafts is not None and one.proposed > 0
    now = graph.inference._replace(
        phase="prefill" if first else "decode",
        verifies=graph.recipe.compute,
        follows=not first,
        drafted=drafted,
        looks=assistant.looks and one.proposed > 0,
        records=True,
        batches=graph.inference.switches and not first,
    )
    window, tokens = model.sliding_window or 0, one.tokens
    outputs = one.before + 1 + (decided.batch.sequence - 1 if one.number == 2 else 0)
    if first:
        all_rows = graph._replace(wiring=graph.wiring._replace(last_only=False), inference=now)
        step = Step(all_rows, 1, tokens + one.proposed, window=_within(tokens, window))
    else:
        past, kept = tokens - 1 + one.before, tokens - 1 + one.before
        if window and one.number > 2:
            kept = min(tokens - 2, window - 1) + one.before + 1
        grown = min(tokens - 1, window - 1) + fed if window else tokens - 1 + fed
        one_pass = _over_cache(graph, now, fed, tokens - 1 + fed, window)
        step = Step(one_pass, 1, fed, past, kept, grown, cropped=one.before, grown=grown)
    beside = (*(_candidates(decided, one.proposed) if drafted else ()), *_ids(decided, one))
    other = None
    if assistant.drafts is not None and (one.proposed or one.before):
        made = (
            one
            if one.proposed
            else round_of(assistant, decided.batch.sequence, decided.batch.new_tokens, one.number - 1)
        )
        other = _draft(assistant, made, made.proposed - 1)
    return step._replace(
        room=decided.batch.sequence + decided.batch.new_tokens - 1,
        beside=beside,
        other=other,
        rows=fed,
        before=one.before + 1,
        outputs=outputs,
        proposed=one.proposed,
    )


def _over_cache(graph: Graph, now: Pass, fed: int, keys: int, window: int) -> Graph:
    """The graph of a pass over `fed` tokens after those that a cache has, `keys` together."""
    wiring = graph.wiring._replace(
        decodes=True, several=fed > 1, images=False, tower="", windowed=bool(window) and keys >= window
    )
    wiring = wiring._replace(padded=wiring.padded or fed > 1 or now.cache == "static")
    recipe = graph.recipe._replace(copies=False) if fed <= now.few_rows else graph.recipe
    now = now._replace(goes_on=True, longer=bool(window) and keys > window)
    return graph._replace(wiring=wiring, recipe=recipe, inference=now)


def _within(tokens: int, window: int) -> int:
    return min(tokens, window) if window else tokens


def _held(what: str, rows: int, vocabulary: int, dtype: str, count: int, source: str) -> Held:
    shape = f"1 {rows} {vocabulary}"
    return Held("activation", what, "generate", shape, dtype, count, size(shape, dtype, {})[1], source)


def _named(decided: Decided, one: Round) -> tuple[Held, ...]:
    """What the loop has names for of the round before, while the next one's tokens are proposed."""
    if one.number == 1:
        return ()
    graph, rows = decided.structure.graph, one.before + 1
    v, dtype = graph.model.vocab_size, graph.recipe.compute
    assert graph.inference is not None
    every = rows + decided.batch.sequence - 1 if one.number == 2 and not graph.inference.last_only else rows
    names = (("logits in fp32",) if dtype != "fp32" else ()) + ("copy of the logits",)
    floats = (_held(f"{what} of the round before", rows, v, "fp32", 1, _ROUND) for what in names)
    return (
        _held("logits of the round before", every, v, dtype, 1, _ROUND),
        *floats,
        *(_candidates(decided, one.before)),
    )


def _candidates(decided: Decided, proposed: int) -> tuple[Held, ...]:
    """The logits of a round's proposed tokens."""
    v = decided.structure.graph.model.vocab_size
    what = "logits of all proposed tokens"
    return (_held(what, proposed, v, "fp32", 1, _CANDIDATES),) if proposed else ()


def _ids(decided: Decided, one: Round, drafts: int | None = None) -> Iterator[Held]:
    """Token ids, their positions and masks, by the names of both loops, in a round: while its token `drafts` is
    proposed, or, without that, while the model reads all of them; but for those that the pass itself is given."""
    assistant, padded = decided.assistant, decided.structure.graph.wiring.padded
    assert assistant is not None
    prompt, rows, later, verifies = decided.batch.sequence, one.before + 1, one.number > 1, drafts is None
    proposes = assistant.drafts is not None
    kinds = 2 if padded else 1  # positions, and a mask beside them

    def held(what: str, length: int, count: int = 1, source: str = _ROUND) -> Iterator[Held]:
        if count and length:
            shape = f"1 {length}"
            yield Held("activation", what, "generate", shape, "int64", count, size(shape, "int64", {})[1], source)

    yield from held("ids of the prompt", prompt)
    own = not later and not drafts and not verifies  # the pass's own positions are those of the prompt
    yield from held("positions and mask of the prompt", prompt, kinds - own)
    yield from held("special tokens", 1, (4 if proposes else 2) + (0 if verifies else 2))
    yield from held("sequences that are unfinished", 1, (1 if verifies else 2) + later)
    if later:
        yield from held("ids so far", one.tokens)
        yield from held("positions and mask so far", one.tokens, kinds * (2 if proposes else 1))
        yield from held("selected tokens of the round before", rows)
        if one.before:
            lasts = one.tokens - 1 + one.before
            yield from held("ids of the round before", lasts, 1)
            if not verifies:
                yield from held("positions and mask of the round before", lasts, kinds)
        if not verifies:
            whole_before = one.number == 2
            yield from held(
                "inputs of the round before", prompt + one.before if whole_before else rows, 1 if whole_before else 2
            )
    if verifies and one.proposed:
        length = one.tokens + one.proposed
        yield from held("ids with those proposed", length)
        yield from held(
            "positions and mask of those", length, kinds - (not later)
        )  # of the first round the pass's own positions are those
    elif drafts:
        length = one.tokens + drafts
        yield from held("ids with those proposed so far", length, 1, _CANDIDATES)
        yield from held("positions and mask of those", length, kinds, _CANDIDATES)
        yield from held("token before", 1, 1, _CANDIDATES)


def _scores(decided: Decided, count: int) -> tuple[Held, ...]:
    """The logits of the tokens that a round has proposed so far, in a list."""
    v = decided.structure.graph.model.vocab_size
    what = "logits of a proposed token"
    return (_held(what, 1, v, "fp32", count, _CANDIDATES),) if count else ()
