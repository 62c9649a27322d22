"""Serving engines: vLLM, SGLang, Text Generation Inference, llama.cpp. They load a model, measure a step, and make a
pool for keys and values of what is left of their share of a card.

`serve` is the answer for a run whose profile is an engine's (`memplan.catalogue.engines`); `pool_tokens` and `requests`
are its two figures by themselves.
"""

from memplan.serving.answer import FACTS, facts, pool_tokens, requests, serve
from memplan.serving.budget import Budget, budget
from memplan.serving.settings import Settings, serves, settled

__all__ = ["FACTS", "Budget", "Settings", "budget", "facts", "pool_tokens", "requests", "serve", "serves", "settled"]
