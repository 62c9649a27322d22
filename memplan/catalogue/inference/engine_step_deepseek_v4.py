"""Candidate peaks of a DeepSeek V4 step in vLLM.

Several residual streams replace the single residual, heads are padded to the kernel's width, and there is room for
gathered keys. Axes of this module:

    qp        the padded heads
    tk        entries that a token selects
    reserved  bytes that attention reserves permanently
    logits    bytes that an indexer's logits may take

Source: vllm 0.33.0 models/deepseek_v4/attention.py, nvidia/model.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.inference.instant import Instant
from memplan.core.ir import Tensor
from memplan.models.layers import Layer

LOGITS = 512 * 2**20  # VLLM_SPARSE_INDEXER_MAX_LOGITS_MB
_ATTENTION = "vllm 0.33.0 models/deepseek_v4/attention.py"
_STREAMS = Tensor("streams", "s nh")
_ALWAYS = (_STREAMS, Tensor("room for gathered keys", "reserved", "int8"), Tensor("chosen entries", "most tk", "int32"))
_ACTIVATIONS = (
    Tensor("hidden", "s h"),
    Tensor("q's latent and keys", "s ql"),
    Tensor("keys", "s d"),
    Tensor("output of padded heads", "s qp d"),
)
_SCORES = {
    "sparse": (
        Tensor("keys and gates to compress", "s 4 d", "fp32"),
        Tensor("the indexer's keys and gates", "s 4 id", "fp32"),
    ),
    "heavy": (Tensor("keys and gates to compress", "s 2 d", "fp32"),),
}


def compressed_instants(layers: tuple[Layer, ...]) -> Iterator[Instant]:
    """Yield the instants of each kind of attention in the layers, of the residual streams and of the experts."""
    for kind in dict.fromkeys(layer.mixer for layer in layers):
        alive = (*_ALWAYS, *_ACTIVATIONS, *_SCORES.get(kind, ()))
        index_q = (Tensor("the indexer's q", "s ih id", "int8"),) if kind == "sparse" else ()
        padded = Tensor("padded q", "s qp d")
        yield Instant(
            f"{kind}.attention", (*alive, Tensor("q", "s qh d"), padded), f"{_ATTENTION} _fused_qnorm_rope_kv_insert"
        )
        if index_q:
            logits = Tensor("the indexer's logits", "logits", "int8")
            yield Instant(
                f"{kind}.indexer", (*alive, *index_q, padded, logits), f"{_ATTENTION} _sparse_indexer_and_attn"
            )
    yield Instant(
        "streams",
        (*_ALWAYS, Tensor("streams, mixed", "s nh"), Tensor("hidden", "s h"), Tensor("hidden, mixed", "s h")),
        "vllm 0.33.0 models/deepseek_v4/nvidia/model.py mhc_fused_post_pre_tilelang",
    )
    rows = (Tensor("activated, then outputs", "se narrow"), Tensor("gates and ups, permuted", "se wide"))
    yield Instant(
        "experts",
        (_STREAMS, Tensor("chosen entries", "most tk", "int32"), Tensor("hidden", "all h"), *rows, _LOGITS),
        "vllm 0.33.0 model_executor/layers/fused_moe/experts/triton_moe.py workspace_shapes; assumed to hold for its "
        "mxfp4 kernels too",
        "assumed",
    )


_LOGITS = Tensor("router's logits", "all E", "fp32")
