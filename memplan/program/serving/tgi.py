"""Text Generation Inference's pool: tokens of every layer, in what is left after a prompt's pass.

Its warm-up reads the longest prompts into a cache of their own, and gives 0.9 of what is free after that to the pool,
beside as many tokens as those had: `memplan.program.serving.budget`.

Source: text-generation-inference server/text_generation_server/models/flash_causal_lm.py FlashCausalLM.warmup.
"""

from __future__ import annotations

from memplan.program.serving import sglang
from memplan.program.serving.pool import Tokens
from memplan.program.serving.settings import Settings


def pool(s: Settings, available: int) -> Tokens:
    """What `available` bytes on each rank become: slots for tokens, of all layers alike."""
    return sglang.pool(s, available)
