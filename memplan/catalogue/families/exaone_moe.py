"""EXAONE 4 with experts: its attention, Llama's norms, and DeepSeek V3's mixture. Kolibri: GLM 4's norms."""

from __future__ import annotations

from functools import partial

from memplan.catalogue.decoder.decoder import Decoder
from memplan.catalogue.experts import routers
from memplan.catalogue.families.mixtures import X, sigmoid_mixture, with_shared_experts
from memplan.catalogue.families.olmo import exaone_attention
from memplan.core.ir import Op
from memplan.models.model import ModelSpec

_EXAONE_MOE = Decoder(attention=partial(exaone_attention, x="n1"), experts=sigmoid_mixture)


def _kolibri(m: ModelSpec) -> tuple[Op, ...]:
    """Kolibri's mixture. peft does not know its experts."""
    return with_shared_experts(
        routers.late_sigmoid_router("mlp.gate", X, m.get("norm_topk_prob", False)), adapted=False
    )


BUILDERS = {
    "exaone_moe": _EXAONE_MOE,
    "kolibri1": _EXAONE_MOE._replace(
        experts=_kolibri,
        norms=("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    ),
}
