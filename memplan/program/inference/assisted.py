"""Assisted generation: rounds in which an assistant proposes tokens and the model verifies them."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.inference.one_pass import Pass
from memplan.core.records import NamedTuple
from memplan.engine.walk import size
from memplan.program.graph import Graph, TensorGroup
from memplan.program.inference.passes import InferenceStep, within
from memplan.program.run import Assistant, ResolvedRun

_CANDIDATES = "transformers 5.24 generation/candidate_generator.py"
_ROUND = "transformers 5.24 generation/utils.py GenerationMixin._assisted_decoding"


class Round(NamedTuple):
    """One round of assisted generation.

    number    counted from 1
    tokens    tokens generated or read before the round
    proposed  tokens proposed in the round
    before    tokens proposed in the previous round
    """

    number: int
    tokens: int
    proposed: int
    before: int


def longest_draft(tokens: int, new: int) -> int:
    """Return the most tokens that any round proposes, if the first proposes `tokens` and each later one two more, as
    when all proposals are accepted.

    Source: transformers 5.24 generation/candidate_generator.py AssistedCandidateGenerator.update_candidate_strategy.
    """
    generated = most = 0
    while generated < new:
        proposed = min(tokens, new - generated - 1)
        most, generated, tokens = max(most, proposed), generated + proposed + 1, tokens + 2
    return most


def round_of(assistant: Assistant, prompt: int, new: int, number: int) -> Round:
    """Return a round, if every round before it kept a single token."""

    def proposed(number: int) -> int:
        remaining = new - number
        if number < 1 or not remaining:
            return 0
        tokens = prompt + number - 1
        return min(assistant.tokens, tokens - 1 if assistant.looks_up_prompt else remaining)

    return Round(number, prompt + number - 1, proposed(number), proposed(number - 1))


_SPREAD = 3  # rounds replayed between the second and the last round with the most proposals


def steps_of(decided: ResolvedRun, replayed: bool = False) -> tuple[InferenceStep, ...]:
    """Return the passes of the rounds that can be the largest, in order; of a round's passes that propose a token, the
    first two and the last. With `replayed`, the passes of evenly spread rounds, for a replay of the allocator."""
    assistant = decided.assistant
    assert assistant is not None
    prompt, new = decided.batch.sequence, decided.batch.new_tokens
    full = max(1, new - assistant.tokens)
    numbers = {1, 2, full, full + 1, new - 1, new}
    if replayed:
        between = (2 + (full - 2) * i // (_SPREAD + 1) for i in range(1, _SPREAD + 1))
        numbers = {1, 2, full, new, *(between if full > 2 else ())}
    steps: list[InferenceStep] = []
    for number in sorted(n for n in numbers if 1 <= n <= new):
        round_ = round_of(assistant, prompt, new, number)
        steps += _draft_steps(decided, assistant, round_)
        steps.append(_verification(decided, assistant, round_))
    return tuple(steps)


def _draft_steps(decided: ResolvedRun, assistant: Assistant, round_: Round) -> list[InferenceStep]:
    """Return the passes of a round that propose tokens: the first two, and the last."""
    if assistant.drafts is None or not round_.proposed:
        return []
    before = round_of(assistant, decided.batch.sequence, decided.batch.new_tokens, round_.number - 1)
    other = (
        _verification(decided, assistant, before)._replace(other=None, loop_tensors=()) if round_.number > 1 else None
    )
    named = _outputs_of_previous_round(decided, round_)
    steps: list[InferenceStep] = []
    for i in sorted({0, min(1, round_.proposed - 1), round_.proposed - 1}):
        step = _draft(assistant, round_, i)
        steps.append(step._replace(other=other, loop_tensors=(*named, *_scores(decided, i), *_ids(decided, round_, i))))
    return steps


def _draft(assistant: Assistant, round_: Round, i: int) -> InferenceStep:
    """Return the pass that proposes the `i`th token of a round.

    The first pass reads the tokens that its cache does not have yet: in the first round the prompt, in later rounds two
    tokens, the last one it proposed and the model's own.
    """
    drafts = assistant.drafts
    assert drafts is not None
    graph, is_last = drafts.structure.graph, i == round_.proposed - 1
    assert graph.inference is not None
    pass_ = graph.inference._replace(
        phase="prefill" if round_.number == 1 else "decode",
        proposes=True,
        stacks=is_last,
        records=True,
        batches=graph.inference.batches_later_passes and i > 0,
    )
    window, tokens = graph.model.sliding_window or 0, round_.tokens
    if round_.number == 1:
        if i == 0:
            return InferenceStep(
                graph._replace(inference=pass_), 1, tokens, window=within(tokens, window), grown=tokens
            )
        fed, past, cropped, grown = 1, tokens + i - 1, 0, tokens + i
        kept = grown - 1
    else:
        first = min(tokens - 2, window - 1) + 2 if window else tokens
        fed, past, cropped, grown = 1, tokens + i - 1, 0, first + i
        kept = grown - 1
        if i == 0:
            fed, past, cropped = 2, tokens - 2 + round_.before, round_.before
            early = tokens - 1 if round_.number == 2 else min(tokens - 3, window - 1) + 2 if window else tokens - 1
            kept = early + round_.before - 1
    seen = min(grown, window - 1 + fed) if window else grown
    one_pass = _over_cache(graph, pass_, fed, past - cropped + fed, window)
    proposed = round_.proposed
    return InferenceStep(
        one_pass, 1, fed, past, kept, seen, cropped=cropped, grown=grown, assists=True, proposed=proposed
    )


def _verification(decided: ResolvedRun, assistant: Assistant, round_: Round) -> InferenceStep:
    """Return the model's pass of a round."""
    graph = decided.structure.graph
    assert graph.inference is not None
    model, first, fed = graph.model, round_.number == 1, round_.proposed + 1
    drafted = assistant.drafts is not None and round_.proposed > 0
    pass_ = graph.inference._replace(
        phase="prefill" if first else "decode",
        verifies=graph.recipe.compute,
        follows=not first,
        drafted=drafted,
        uses_lookup=assistant.looks_up_prompt and round_.proposed > 0,
        records=True,
        batches=graph.inference.batches_later_passes and not first,
    )
    window, tokens = model.sliding_window or 0, round_.tokens
    outputs = round_.before + 1 + (decided.batch.sequence - 1 if round_.number == 2 else 0)
    if first:
        all_rows = graph._replace(wiring=graph.wiring._replace(last_only=False), inference=pass_)
        step = InferenceStep(all_rows, 1, tokens + round_.proposed, window=within(tokens, window))
    else:
        past, kept = tokens - 1 + round_.before, tokens - 1 + round_.before
        if window and round_.number > 2:
            kept = min(tokens - 2, window - 1) + round_.before + 1
        grown = min(tokens - 1, window - 1) + fed if window else tokens - 1 + fed
        one_pass = _over_cache(graph, pass_, fed, tokens - 1 + fed, window)
        step = InferenceStep(one_pass, 1, fed, past, kept, grown, cropped=round_.before, grown=grown)
    held = (*(_candidates(decided, round_.proposed) if drafted else ()), *_ids(decided, round_))
    other = None
    if assistant.drafts is not None and (round_.proposed or round_.before):
        latest = (
            round_
            if round_.proposed
            else round_of(assistant, decided.batch.sequence, decided.batch.new_tokens, round_.number - 1)
        )
        other = _draft(assistant, latest, latest.proposed - 1)
    return step._replace(
        room=decided.batch.sequence + decided.batch.new_tokens - 1,
        loop_tensors=held,
        other=other,
        rows=fed,
        before=round_.before + 1,
        outputs=outputs,
        proposed=round_.proposed,
    )


def _over_cache(graph: Graph, pass_: Pass, fed: int, keys: int, window: int) -> Graph:
    """Return the graph of a pass over `fed` tokens that follow cached ones; `keys` counts both."""
    wiring = graph.wiring._replace(
        decodes=True, decodes_several=fed > 1, images=False, tower="", windowed=bool(window) and keys >= window
    )
    wiring = wiring._replace(padded=wiring.padded or fed > 1 or pass_.cache == "static")
    pass_ = pass_._replace(follows_passes=True, longer=bool(window) and keys > window)
    return graph._replace(wiring=wiring, inference=pass_)


def _loop_tensor(what: str, rows: int, vocabulary: int, dtype: str, count: int, source: str) -> TensorGroup:
    shape = f"1 {rows} {vocabulary}"
    return TensorGroup("activation", what, "generate", shape, dtype, count, size(shape, dtype, {})[1], source)


def _outputs_of_previous_round(decided: ResolvedRun, round_: Round) -> tuple[TensorGroup, ...]:
    """Return the outputs of the previous round that the loop still references while tokens are proposed."""
    if round_.number == 1:
        return ()
    graph, rows = decided.structure.graph, round_.before + 1
    v, dtype = graph.model.vocab_size, graph.recipe.compute
    assert graph.inference is not None
    returned = rows + decided.batch.sequence - 1 if round_.number == 2 and not graph.inference.last_only else rows
    names = (("logits in fp32",) if dtype != "fp32" else ()) + ("copy of the logits",)
    floats = (_loop_tensor(f"{what} of the round before", rows, v, "fp32", 1, _ROUND) for what in names)
    return (
        _loop_tensor("logits of the round before", returned, v, dtype, 1, _ROUND),
        *floats,
        *(_candidates(decided, round_.before)),
    )


def _candidates(decided: ResolvedRun, proposed: int) -> tuple[TensorGroup, ...]:
    """Return the logits of all tokens proposed in a round."""
    v = decided.structure.graph.model.vocab_size
    what = "logits of all proposed tokens"
    return (_loop_tensor(what, proposed, v, "fp32", 1, _CANDIDATES),) if proposed else ()


def _ids(decided: ResolvedRun, round_: Round, drafts: int | None = None) -> Iterator[TensorGroup]:
    """Yield the token ids, positions and masks that both loops reference in a round, without the inputs of the pass.

    With `drafts`, while the round's token of that index is proposed; without, while the model verifies all of them.
    """
    assistant, padded = decided.assistant, decided.structure.graph.wiring.padded
    assert assistant is not None
    prompt, rows, later, verifies = decided.batch.sequence, round_.before + 1, round_.number > 1, drafts is None
    proposes = assistant.drafts is not None
    kinds = 2 if padded else 1  # positions, and a mask if sequences are padded

    def held(what: str, length: int, count: int = 1, source: str = _ROUND) -> Iterator[TensorGroup]:
        if count and length:
            shape = f"1 {length}"
            yield TensorGroup(
                "activation", what, "generate", shape, "int64", count, size(shape, "int64", {})[1], source
            )

    yield from held("ids of the prompt", prompt)
    are_inputs = not later and not drafts and not verifies  # the pass's own positions are the prompt's
    yield from held("positions and mask of the prompt", prompt, kinds - are_inputs)
    yield from held("special tokens", 1, (4 if proposes else 2) + (0 if verifies else 2))
    yield from held("unfinished sequences", 1, (1 if verifies else 2) + later)
    if later:
        yield from held("ids so far", round_.tokens)
        yield from held("positions and mask so far", round_.tokens, kinds * (2 if proposes else 1))
        yield from held("selected tokens of the round before", rows)
        if round_.before:
            lasts = round_.tokens - 1 + round_.before
            yield from held("ids of the round before", lasts, 1)
            if not verifies:
                yield from held("positions and mask of the round before", lasts, kinds)
        if not verifies:
            was_first = round_.number == 2
            yield from held(
                "inputs of the round before", prompt + round_.before if was_first else rows, 1 if was_first else 2
            )
    if verifies and round_.proposed:
        length = round_.tokens + round_.proposed
        yield from held("ids with proposals", length)
        is_input = not later  # in the first round these positions are the pass's own
        yield from held("positions and mask with proposals", length, kinds - is_input)
    elif drafts:
        length = round_.tokens + drafts
        yield from held("ids with proposals so far", length, 1, _CANDIDATES)
        yield from held("positions and mask with proposals so far", length, kinds, _CANDIDATES)
        yield from held("token before", 1, 1, _CANDIDATES)


def _scores(decided: ResolvedRun, count: int) -> tuple[TensorGroup, ...]:
    """Return the logits of the tokens proposed so far in a round, kept in a list."""
    v = decided.structure.graph.model.vocab_size
    what = "logits of a proposed token"
    return (_loop_tensor(what, 1, v, "fp32", count, _CANDIDATES),) if count else ()
