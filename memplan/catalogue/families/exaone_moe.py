"""EXAONE 4 with experts: its attention, Llama's norms, and DeepSeek V3's mixture."""

from __future__ import annotations

from functools import partial

from memplan.catalogue.decoder.decoder import Decoder
from memplan.catalogue.families.mixtures import sigmoid_mixture
from memplan.catalogue.families.olmo import exaone_attention

BUILDERS = {
    "exaone_moe": Decoder(attention=partial(exaone_attention, x="n1"), experts=sigmoid_mixture),
}
