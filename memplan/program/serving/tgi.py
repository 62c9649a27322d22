"""Text Generation Inference's pool: slots for tokens, in the memory left after a prefill step.

Its warm-up runs the longest prompts with a cache of their own. The pool then gets the tokens of that cache and 0.9 of
the memory that was left (see `memplan.program.serving.budget`).

Source: text-generation-inference server/text_generation_server/models/flash_causal_lm.py FlashCausalLM.warmup.
"""

from __future__ import annotations

from memplan.program.serving import sglang
from memplan.program.serving.pool import Tokens
from memplan.program.serving.settings import Settings


def pool(s: Settings, available: int) -> Tokens:
    """Return the slots for tokens that fit in `available` bytes on each rank, equal for all layers."""
    return sglang.pool(s, available)
