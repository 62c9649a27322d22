"""Choose the next token from its logits, keeping the tensors that transformers' loops keep until the next one.

Source: transformers 5.24 generation/utils.py _sample, _beam_search; generation/logits_process.py.
"""

from __future__ import annotations

from typing import Any

import torch

from memplan.probe.libraries import library
from memplan.spec.generation import Generation


class Greedy:
    """Choose the most likely token. Keeps the logits and, if the model `suppresses` tokens, the masked scores."""

    def __init__(self, suppresses: bool) -> None:
        self.logits: Any = None
        self.scores: Any = None
        self.suppresses = suppresses

    def token(self, outputs: list[Any]) -> Any:
        """Return the next token of every sequence [rows, 1].

        `outputs` is a list with the model's output; beam search clears it early.
        """
        self.logits = outputs[0].logits[:, -1, :].to(copy=True, dtype=torch.float32)
        self.scores = self.processed(self.logits)
        return self.scores.argmax(-1, keepdim=True)

    def processed(self, scores: Any) -> Any:
        """Return the scores with suppressed tokens masked; which tokens does not affect memory."""
        if not self.suppresses:
            return scores
        tokens = torch.arange(scores.shape[-1], device=scores.device)
        suppressed = tokens < 0
        return torch.where(suppressed, -float("inf"), scores)

    def reorder(self, cache: Any) -> None:
        """Reorder the cache once the tokens are chosen; only beam search does."""

    def forget(self) -> None:
        """Drop all tensors at the end of the loop."""
        vars(self).update(dict.fromkeys(vars(self)))


class Sampling(Greedy):
    """Sample a token, after temperature, top-k and top-p."""

    def __init__(self, suppresses: bool) -> None:
        super().__init__(suppresses)
        self.probabilities: Any = None

    def token(self, outputs: list[Any]) -> Any:
        self.logits = outputs[0].logits[:, -1, :].to(copy=True, dtype=torch.float32)
        self.scores = _warped(self.processed(self.logits))
        self.probabilities = torch.nn.functional.softmax(self.scores, dim=-1)
        return torch.multinomial(self.probabilities, num_samples=1)


def _warped(scores: Any) -> Any:
    return _top_p(_top_k(scores / 0.7, min(50, scores.shape[-1])))


def _top_k(scores: Any, k: int) -> Any:
    removed = scores < torch.topk(scores, k)[0][..., -1, None]
    return scores.masked_fill(removed, -float("inf"))


def _top_p(scores: Any) -> Any:
    ordered, order = torch.sort(scores, descending=False)
    sums = ordered.softmax(dim=-1).cumsum(dim=-1)  # kept in a variable, as in TopPLogitsWarper
    removed_ordered = sums <= 0.1
    removed = removed_ordered.scatter(1, order, removed_ordered)
    return scores.masked_fill(removed, -float("inf"))


class Beams(Greedy):
    """Choose the best, or sampled, continuations of each prompt's beams; also keeps the summed log probabilities."""

    def __init__(self, beams: int, draws: bool, suppresses: bool) -> None:
        super().__init__(suppresses)
        self.beams, self.draws, self.sums, self.order = beams, draws, None, None

    def token(self, outputs: list[Any]) -> Any:
        self.logits = outputs[0].logits[:, -1, :].to(copy=True, dtype=torch.float32)
        self.sums = torch.nn.functional.log_softmax(self.logits, dim=-1)
        self.sums = self.processed(self.sums)
        if self.draws:
            self.sums = _warped(self.sums)
        outputs.clear()
        self.sums = self.sums + torch.zeros((len(self.logits), 1), device=self.logits.device)
        best = self._chosen(self.sums.reshape(-1, self.beams * self.logits.shape[-1]))
        self.order = (best % self.beams).flatten()
        return (best % self.logits.shape[-1]).reshape(-1, 1)

    def _chosen(self, sums: Any) -> Any:
        if not self.draws:
            return torch.topk(sums, self.beams)[1]
        drawn = torch.multinomial(torch.nn.functional.softmax(sums, dim=-1), num_samples=self.beams)
        order = torch.gather(sums, 1, drawn).sort(dim=-1, descending=True)[1]
        return drawn.gather(-1, order)

    def reorder(self, cache: Any) -> None:
        """Reorder the cache. Layers of a static cache are reordered here, because `reorder_cache` reads their length
        from a tensor, which has no data."""
        static_layer: Any = library("transformers.cache_utils").StaticLayer
        parts = ("self_attention_cache", "cross_attention_cache")
        for part in [getattr(cache, name) for name in parts if hasattr(cache, name)] or [cache]:
            if not all(isinstance(layer, static_layer) for layer in part.layers):
                part.reorder_cache(self.order)
                continue
            for layer in part.layers:
                if layer.is_initialized:
                    layer.keys = layer.keys.index_select(0, self.order)
                    layer.values = layer.values.index_select(0, self.order)


def token_chooser(generation: Generation, suppresses: bool) -> Greedy:
    """Return the run's way of choosing tokens; `suppresses`: some tokens are never chosen."""
    if generation.num_beams > 1:
        return Beams(generation.num_beams, generation.do_sample, suppresses)
    return Sampling(suppresses) if generation.do_sample else Greedy(suppresses)
