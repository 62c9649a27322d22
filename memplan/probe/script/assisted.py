"""Assisted generation as transformers' own `generate` runs it, on tensors without data.

How many proposed tokens are accepted, and when the assistant stops proposing, depends on the data. Here no token is
accepted and the assistant never stops early, so every round is as long as possible and yields one new token. Prompt
lookup always finds as many tokens as it looks for.

Source: transformers 5.24 generation/utils.py _assisted_decoding, generation/candidate_generator.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from memplan.probe.fake.tracker import scalar_answers
from memplan.probe.libraries import library
from memplan.probe.script.model import base_of, build_model
from memplan.spec.generation import Generation
from memplan.spec.run import RunSpec
from memplan.spec.training import Method


def assistant_of(run: RunSpec) -> RunSpec | None:
    """Return the assistant's run, with its weights as `generation` sets them; None if the run has no assistant."""
    generation = run.generation
    if generation.assistant_model is None:
        return None
    weights = generation.assistant_dtype or run.precision.weights
    update: dict[str, Any] = {
        "model": generation.assistant_model,
        "method": Method(quantization=generation.assistant_quantization),
        "precision": run.precision.model_copy(update={"weights": weights, "compute": None}),
        "generation": Generation(),
    }
    return run.model_copy(update=update)


def build_assistant(run: RunSpec, device: torch.device) -> Any:
    """Return the assistant's model on `device`; None if the run has none."""
    assistant_run = assistant_of(run)
    return None if assistant_run is None else build_model(assistant_run, device)


def assist(
    model: Any, assistant: Any, run: RunSpec, ids: Any, options: dict[str, Any], phase: Callable[..., Any]
) -> None:
    """Generate from `ids` with the model's `options`; the first round is the phase `prefill`, the others `decode`."""
    generation, base = run.generation, base_of(model)
    for each in (base, assistant):
        if each is not None:
            each.generation_config.eos_token_id = None  # when it is generated depends on the data
    arguments: dict[str, Any] = {
        "max_new_tokens": run.batch.new_tokens,
        "do_sample": generation.do_sample,
        "use_cache": True,
    }
    arguments["disable_compile"] = True
    if generation.do_sample:
        arguments |= {"temperature": 0.7, "top_k": 50, "top_p": 0.9}
    if generation.cache_implementation == "static":
        arguments["cache_implementation"] = "static"
    if generation.prompt_lookup_num_tokens:
        arguments["prompt_lookup_num_tokens"] = generation.prompt_lookup_num_tokens
    elif generation.assistant_early_exit:
        arguments["assistant_early_exit"] = generation.assistant_early_exit
    proposer = assistant if assistant is not None else base
    if generation.num_assistant_tokens:
        proposer.generation_config.num_assistant_tokens = generation.num_assistant_tokens
    if generation.num_assistant_tokens_schedule:
        proposer.generation_config.num_assistant_tokens_schedule = generation.num_assistant_tokens_schedule
    with ExitStack() as stack, _without_data(run.loop.padded):
        stack.enter_context(phase("prefill"))

        def round_over() -> None:
            stack.close()
            if run.batch.new_tokens > 1:
                stack.enter_context(phase("decode"))

        with _after_first_round(base, round_over):
            base.generate(ids, assistant_model=assistant, **options, **arguments)


@contextmanager
def _after_first_round(base: Any, over: Callable[[], None]) -> Generator[None]:
    """Call `over` after the model's first round inside the context."""
    make: Any = base._get_candidate_generator

    def _get_candidate_generator(**arguments: Any) -> Any:
        generator: Any = make(**arguments)
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
    """Answer, inside the context, the questions that transformers' loops ask of the data.

    These are whether a mask is all ones, whether a sequence has its final length, how many proposed tokens are
    accepted, and what a lookup finds.
    """
    utils, candidates = library("transformers.generation.utils"), library("transformers.generation.candidate_generator")
    mixin, lookup = utils.GenerationMixin, candidates.PromptLookupCandidateGenerator
    criteria_of, unfinished, find = mixin._get_stopping_criteria, mixin._has_unfinished_sequences, lookup.get_candidates

    asked_of: Callable[..., Any] = utils.StoppingCriteriaList.__call__

    class Watched(utils.StoppingCriteriaList):
        """Records whether its model's sequence has reached the final length."""

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
    lookup.get_candidates = _find_candidates
    scalar_answers.append(lambda tensor: _answer_value(tensor, padded))
    try:
        yield
    finally:
        scalar_answers.pop()
        mixin._get_stopping_criteria, mixin._has_unfinished_sequences = criteria_of, unfinished
        lookup.get_candidates = find


def _answer_value(tensor: torch.Tensor, padded: bool) -> bool | int | float:
    """Answer a value read by transformers: masks are all ones unless `padded`, and no proposed token is accepted."""
    frame: Any = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None and f"{os.sep}transformers{os.sep}" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None:
        return False
    caller = frame.f_code.co_name
    if tensor.dtype != torch.bool:
        return 0.0 if tensor.is_floating_point() else int(caller == "_assisted_decoding")
    # _speculative_sampling checks `n_matches < gamma` before it draws a token `t`, and `n_matches > 0` after
    return (caller == "generate" and not padded) or (caller == "_speculative_sampling" and "t" not in frame.f_locals)


def _find_candidates(self: Any, input_ids: Any, **_: Any) -> tuple[Any, None]:
    """Return as many candidates as prompt lookup looks for, limited by the tokens before the last."""
    length = input_ids.shape[1]
    if self.max_length == length + 1 or length < 2:
        return input_ids, None
    chosen = input_ids[0, 1 : min(1 + self.num_output_tokens, length, self.max_length)]
    if self.logits_processor is not None:
        scores = torch.ones((1, self.vocab_size), device=input_ids.device, dtype=torch.float32)
        self.logits_processor(input_ids, scores)
    return torch.cat((input_ids, chosen.unsqueeze(0)), dim=1), None
