"""How the next token is chosen of its logits, with the names that transformers' loops keep until the one after it.

Source: transformers 5.24 generation/utils.py _sample, _beam_search; generation/logits_process.py.
"""

from __future__ import annotations

from typing import Any

import torch

from memplan.catalogue.inference.decoding import SUPPRESSES
from memplan.probe.libraries import library
from memplan.spec.generation import Generation


class Greedy:
    """The likeliest token; the logits stay. Where the model `suppresses` tokens, the scores without them stay too."""

    def __init__(self, suppresses: bool) -> None:
        self.logits: Any = None
        self.scores: Any = None
        self.suppresses = suppresses

    def token(self, held: list[Any]) -> Any:
        """The next token of every sequence [rows, 1]. `held` has what the model returned, which a way of choosing may
        let go."""
        self.logits = held[0].logits[:, -1, :].to(copy=True, dtype=torch.float32)
        self.scores = self.processed(self.logits)
        return self.scores.argmax(-1, keepdim=True)

    def processed(self, scores: Any) -> Any:
        """The scores without those of suppressed tokens. Which ones are suppressed is no matter of memory."""
        if not self.suppresses:
            return scores
        tokens = torch.arange(scores.shape[-1], device=scores.device)
        suppressed = tokens < 0
        return torch.where(suppressed, -float("inf"), scores)

    def reorder(self, cache: Any) -> None:
        """What becomes of the cache once the tokens are chosen."""

    def forget(self) -> None:
        """The loop is over."""
        vars(self).update(dict.fromkeys(vars(self)))


class Sampled(Greedy):
    """A token drawn, after temperature, top-k and top-p."""

    def __init__(self, suppresses: bool) -> None:
        super().__init__(suppresses)
        self.probabilities: Any = None

    def token(self, held: list[Any]) -> Any:
        self.logits = held[0].logits[:, -1, :].to(copy=True, dtype=torch.float32)
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
    sums = ordered.softmax(dim=-1).cumsum(dim=-1)  # named, as in TopPLogitsWarper
    of_ordered = sums <= 0.1
    removed = of_ordered.scatter(1, order, of_ordered)
    return scores.masked_fill(removed, -float("inf"))


class Beams(Greedy):
    """The best continuations of each prompt's beams, or some that are drawn; the sums of their log probabilities stay
    too."""

    def __init__(self, beams: int, draws: bool, suppresses: bool) -> None:
        super().__init__(suppresses)
        self.beams, self.draws, self.sums, self.order = beams, draws, None, None

    def token(self, held: list[Any]) -> Any:
        self.logits = held[0].logits[:, -1, :].to(copy=True, dtype=torch.float32)
        self.sums = torch.nn.functional.log_softmax(self.logits, dim=-1)
        self.sums = self.processed(self.sums)
        if self.draws:
            self.sums = _warped(self.sums)
        held.clear()
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
        """A cache of fixed size has its length in a tensor, and of tensors without data none can say whether it is
        more than 0, as `reorder_cache` asks: its layers are put in order here."""
        fixed: Any = library("transformers.cache_utils").StaticLayer
        across = ("self_attention_cache", "cross_attention_cache")
        for one in [getattr(cache, name) for name in across if hasattr(cache, name)] or [cache]:
            if not all(isinstance(layer, fixed) for layer in one.layers):
                one.reorder_cache(self.order)
                continue
            for layer in one.layers:
                if layer.is_initialized:
                    layer.keys = layer.keys.index_select(0, self.order)
                    layer.values = layer.values.index_select(0, self.order)


def choosing(generation: Generation, model_type: str) -> Greedy:
    """How the run chooses."""
    suppresses = model_type in SUPPRESSES
    if generation.num_beams > 1:
        return Beams(generation.num_beams, generation.do_sample, suppresses)
    return Sampled(suppresses) if generation.do_sample else Greedy(suppresses)
