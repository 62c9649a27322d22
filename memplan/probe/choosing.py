"""How the next token is chosen of its logits, with the names that transformers' loops keep until the one after it.

Source: transformers 5.24 generation/utils.py _sample, _beam_search; generation/logits_process.py.
"""

from __future__ import annotations

from typing import Any

import torch

from memplan.catalogue.decoding import SUPPRESSES
from memplan.spec import Generation


class Greedy:
    """The likeliest token; the logits stay. Where the model `suppresses` tokens, the scores without them stay too."""

    def __init__(self, suppresses: bool) -> None:
        self.logits: Any = None
        self.scores: Any = None
        self.suppresses = suppresses

    def token(self, outputs: Any) -> Any:
        """The next token of every sequence [rows, 1]."""
        self.logits = outputs.logits[:, -1, :].to(copy=True, dtype=torch.float32)
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

    def token(self, outputs: Any) -> Any:
        self.logits = outputs.logits[:, -1, :].to(copy=True, dtype=torch.float32)
        self.scores = _top_p(_top_k(self.processed(self.logits) / 0.7, min(50, self.logits.shape[-1])))
        self.probabilities = torch.nn.functional.softmax(self.scores, dim=-1)
        return torch.multinomial(self.probabilities, num_samples=1)


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
    """The best continuations of each prompt's beams; the sums of their log probabilities stay too."""

    def __init__(self, beams: int, suppresses: bool) -> None:
        super().__init__(suppresses)
        self.beams, self.sums, self.order = beams, None, None

    def token(self, outputs: Any) -> Any:
        self.logits = outputs.logits[:, -1, :].to(copy=True, dtype=torch.float32)
        self.sums = torch.nn.functional.log_softmax(self.logits, dim=-1)
        self.sums = self.processed(self.sums)
        del outputs
        self.sums = self.sums + torch.zeros((len(self.logits), 1), device=self.logits.device)
        best = torch.topk(self.sums.reshape(-1, self.beams * self.logits.shape[-1]), self.beams)[1]
        self.order = (best % self.beams).flatten()
        return (best % self.logits.shape[-1]).reshape(-1, 1)

    def reorder(self, cache: Any) -> None:
        cache.reorder_cache(self.order)


def choosing(generation: Generation, model_type: str) -> Greedy:
    """How the run chooses."""
    suppresses = model_type in SUPPRESSES
    if generation.num_beams > 1:
        return Beams(generation.num_beams, suppresses)
    return Sampled(suppresses) if generation.do_sample else Greedy(suppresses)
