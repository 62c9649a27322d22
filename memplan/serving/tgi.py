"""Text Generation Inference's pool: tokens of every layer, in what is left after a prompt's pass.

Only what is public was used; see the engine's rows.
"""

from __future__ import annotations

from memplan.serving import sglang
from memplan.serving.pool import Tokens
from memplan.serving.settings import Settings


def pool(s: Settings, available: int) -> Tokens:
    """What `available` bytes on each rank become: slots for tokens, of all layers alike."""
    return sglang.pool(s, available)
