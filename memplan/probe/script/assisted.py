"""Assisted generation as transformers' own `generate` runs it, on tensors without data.

How many of the proposed tokens are accepted is in the data, and so is when the assistant doubts: here none is, and it
never does, so that every round is as long as it may be and there are as many as new tokens. What prompt lookup finds is
in the data too: it finds as much as it looks for.

Source: transformers 5.24 generation/utils.py _assisted_decoding, generation/candidate_generator.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from memplan.probe.fake.tracker import answering
from memplan.probe.libraries import library
from memplan.probe.script.model import base_of, build_model
from memplan.spec.generation import Generation
from memplan.spec.run import RunSpec
from memplan.spec.training import Method


def assistant_of(run: RunSpec) -> RunSpec | None:
    """The run of the assistant's model by itself, None where there is none: its weights as `generation` has them."""
    asked = run.generation
    if asked.assistant_model is None:
        return None
    weights = asked.assistant_dtype or run.precision.weights
    update: dict[str, Any] = {
        "model": asked.assistant_model,
        "method": Method(quantization=asked.assistant_quantization),
        "precision": run.precision.model_copy(update={"weights": weights, "compute": None}),
        "generation": Generation(),
    }
    return run.model_copy(update=update)


def build_assistant(run: RunSpec, device: torch.device) -> Any:
    """The assistant's model on `device`; None where the run has none."""
    one = assistant_of(run)
    return None if one is None else build_model(one, device)


def assist(
    model: Any, assistant: Any, run: RunSpec, ids: Any, options: dict[str, Any], phase: Callable[..., Any]
) -> None:
    """Generate after `ids`, with `options` of the model's; the first round is the phase `prefill`, others `decode`."""
    asked, base = run.generation, base_of(model)
    for one in (base, assistant):
        if one is not None:
            one.generation_config.eos_token_id = None  # whether it is met is in the data
    given: dict[str, Any] = {"max_new_tokens": run.batch.new_tokens, "do_sample": asked.do_sample, "use_cache": True}
    given["disable_compile"] = True
    if asked.do_sample:
        given |= {"temperature": 0.7, "top_k": 50, "top_p": 0.9}
    if asked.cache_implementation == "static":
        given["cache_implementation"] = "static"
    if asked.prompt_lookup_num_tokens:
        given["prompt_lookup_num_tokens"] = asked.prompt_lookup_num_tokens
    elif asked.assistant_early_exit:
        given["assistant_early_exit"] = asked.assistant_early_exit
    proposes = assistant if assistant is not None else base
    if asked.num_assistant_tokens:
        proposes.generation_config.num_assistant_tokens = asked.num_assistant_tokens
    if asked.num_assistant_tokens_schedule:
        proposes.generation_config.num_assistant_tokens_schedule = asked.num_assistant_tokens_schedule
    with ExitStack() as stack, _without_data(run.loop.padded):
        stack.enter_context(phase("prefill"))

        def round_over() -> None:
            stack.close()
            if run.batch.new_tokens > 1:
                stack.enter_context(phase("decode"))

        with _rounds(base, round_over):
            base.generate(ids, assistant_model=assistant, **options, **given)


@contextmanager
def _rounds(base: Any, over: Callable[[], None]) -> Generator[None]:
    """While inside, `over` is called when the model's first round is."""
    make: Any = base._get_candidate_generator

    def _get_candidate_generator(**given: Any) -> Any:
        generator: Any = make(**given)
        update: Any = generator.update_candidate_strategy

        def first(*args: Any, **kwargs: Any) -> None:
            update(*args, **kwargs)
            del generator.update_candidate_strategy
            over()

        generator.update_candidate_strategy = first
        return generator

    base._get_candidate_generator = _get_candidate_generator
    try:
        yield
    finally:
        del base._get_candidate_generator


@contextmanager
def _without_data(padded: bool) -> Generator[None]:
    """While inside, what transformers' loops ask the data for is answered: whether a mask is of ones, when a sequence
    is as long as it may be, how many proposed tokens are accepted, what a lookup finds."""
    utils, candidates = library("transformers.generation.utils"), library("transformers.generation.candidate_generator")
    mixin, lookup = utils.GenerationMixin, candidates.PromptLookupCandidateGenerator
    criteria_of, unfinished, find = mixin._get_stopping_criteria, mixin._has_unfinished_sequences, lookup.get_candidates

    asked_of: Callable[..., Any] = utils.StoppingCriteriaList.__call__

    class Watched(utils.StoppingCriteriaList):
        """Notes whether the longest sequence of its model is there."""

        owner: Any

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            self.owner._is_long_enough = input_ids.shape[1] >= self.max_length
            return asked_of(self, input_ids, scores, **kwargs)

    def _get_stopping_criteria(self: Any, *args: Any, **kwargs: Any) -> Any:
        watched = Watched(criteria_of(self, *args, **kwargs))
        watched.owner, self._is_long_enough = self, False
        return watched

    def _has_unfinished_sequences(self: Any, *_: Any, **__: Any) -> bool:
        return not self._is_long_enough

    mixin._get_stopping_criteria, mixin._has_unfinished_sequences = _get_stopping_criteria, _has_unfinished_sequences
    lookup.get_candidates = _looked_up
    answering.append(lambda tensor: _none_accepted(tensor, padded))
    try:
        yield
    finally:
        answering.pop()
        mixin._get_stopping_criteria, mixin._has_unfinished_sequences = criteria_of, unfinished
        lookup.get_candidates = find


def _none_accepted(tensor: torch.Tensor, padded: bool) -> bool | int | float:
    """A mask is of ones, unless it is `padded`; of each round the model's own token stays; nothing else is so."""
    frame: Any = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None and f"{os.sep}transformers{os.sep}" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None:
        return False
    asks = frame.f_code.co_name
    if tensor.dtype != torch.bool:
        return 0.0 if tensor.is_floating_point() else int(asks == "_assisted_decoding")
    # in the other `if n_matches < gamma` comes before a token `t` is drawn, `if n_matches > 0` after
    return (asks == "generate" and not padded) or (asks == "_speculative_sampling" and "t" not in frame.f_locals)


def _looked_up(self: Any, input_ids: Any, **_: Any) -> tuple[Any, None]:
    """As much as prompt lookup looks for, if there is so much before the last token."""
    length = input_ids.shape[1]
    if self.max_length == length + 1 or length < 2:
        return input_ids, None
    chosen = input_ids[0, 1 : min(1 + self.num_output_tokens, length, self.max_length)]
    if self.logits_processor is not None:
        given = torch.ones((1, self.vocab_size), device=input_ids.device, dtype=torch.float32)
        self.logits_processor(input_ids, given)
    return torch.cat((input_ids, chosen.unsqueeze(0)), dim=1), None
