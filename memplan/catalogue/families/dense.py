"""Dense decoders that differ from Llama by known parts: one row a family, in the words of `Decoder`."""

from __future__ import annotations

from functools import partial
from typing import Any

from memplan.catalogue.attention.attention import attention
from memplan.catalogue.decoder.decoder import Decoder, branch_dropout, decoder
from memplan.catalogue.decoder.frame import BOTH, FULL
from memplan.catalogue.decoder.mlp import fused_mlp, gated_mlp
from memplan.catalogue.decoder.norms import layer_norm_in_fp32, rms_norm_of_cast_weight
from memplan.catalogue.decoder.rotation import (
    attend_heads_first,
    fused_heads,
    partial_rope_of_pairs,
    rope_and_norm,
    rope_and_scale,
    rope_of_pairs,
)
from memplan.catalogue.decoder.rotation_fp32 import norm_and_rope_of_casts, rope_in_fp32, rope_of_casts
from memplan.catalogue.decoder.scaling import scaled_branches, scaled_embeddings, scaled_logits
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.activations import activation
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Op, Stack
from memplan.models.model import ModelSpec

LLAMA = Decoder(bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias")
MISTRAL = Decoder(mlp_bias="mlp_bias")
MINISTRAL_3 = MISTRAL._replace(rotate=rope_and_scale)
QWEN_2 = Decoder(bias=True, mlp_bias="mlp_bias", masks=FULL)
QWEN_3 = LLAMA._replace(qk_norm="each")
GRANITE = LLAMA._replace(branch=scaled_branches, embedded=scaled_embeddings(), logits=scaled_logits)
ERNIE = Decoder(bias="use_bias", out_bias="use_bias", mlp_bias="use_bias", rotate=rope_in_fp32, table_dtype="fp32")
GLM_NORMS = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
_GLM = Decoder(bias="attention_bias", rotate=partial_rope_of_pairs, attend=attend_heads_first, mlp=fused_mlp)
_COHERE = Decoder(
    bias="attention_bias",
    out_bias="attention_bias",
    rotate=norm_and_rope_of_casts,
    norm=layer_norm_in_fp32,
    parallel=True,
    held=("n1", "ao", "mo"),
    logits=scaled_logits,
)


COHERE_2 = _COHERE._replace(rotate=rope_of_casts, masks=BOTH)


def ernie4_5(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Ernie 4.5. Its attention never applies dropout, whatever the config says."""
    return decoder(m, wiring._replace(drops=False), ERNIE)


def hyperclovax(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build HyperCLOVA X: Granite, whose branches may end with a norm before they are scaled."""
    ends = ("post_norm1", "post_norm2") if m.get("use_post_norm", True) else ("", "")
    return decoder(m, wiring, GRANITE._replace(norms=("input_layernorm", ends[0], "post_attention_layernorm", ends[1])))


def _attend_and_norm(name: str, q: str, k: str, v: str, y: str, *kernel: Any) -> tuple[Op, ...]:
    """Attend, and normalise the heads together."""
    normed = ops.rms_norm("self_attn.attn_sub_norm", "o.heads", y, "b s h", "h")
    return (*attention(name, q, k, v, "o.heads", *kernel), *normed, ops.release_names("o.heads"))


def bitnet(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build BitNet: Llama with an additional norm before the last projection of each branch."""
    act = activation(m, "mlp.act_fn", "gate", "act", "b s f")
    mlp = partial(gated_mlp, act=act, norm="ffn_sub_norm")
    return decoder(m, wiring, LLAMA._replace(attend=_attend_and_norm, mlp=mlp))


BUILDERS = {
    "bitnet": bitnet,
    "cohere": _COHERE,
    "cohere2": COHERE_2,
    "cwm": MISTRAL._replace(masks=BOTH),
    "ernie4_5": ernie4_5,
    "glm": _GLM,
    "glm4": _GLM._replace(norms=GLM_NORMS),
    "granite": GRANITE,
    "helium": LLAMA._replace(out_bias=False, norm=rms_norm_of_cast_weight, rotate=rope_of_pairs),
    "hunyuan_v1_dense": LLAMA._replace(rotate=rope_and_norm),
    "hyperclovax": hyperclovax,
    "internlm3": LLAMA,
    "llama": LLAMA,
    "mimo": Decoder(bias=True, mlp_bias="mlp_bias"),
    "ministral": MISTRAL._replace(masks=FULL),
    "ministral3": MINISTRAL_3,
    "mistral": MISTRAL,
    "phi3": Decoder(attention=fused_heads, mlp=fused_mlp, branch=branch_dropout("resid_pdrop", "dropout")),
    "qwen2": QWEN_2,
    "qwen3": QWEN_3._replace(masks=FULL),
    "seed_oss": LLAMA._replace(
        out_bias="attention_out_bias", branch=branch_dropout("residual_dropout", "residual_dropout")
    ),
    "smollm3": LLAMA._replace(masks=FULL),
}
