"""EuroBERT: Llama whose tokens attend to all others, with an encoder's heads.

Source: transformers 5.24 models/eurobert/modeling_eurobert.py.
"""

from __future__ import annotations

from memplan.catalogue.decoder.decoder import decoder
from memplan.catalogue.decoder.frame import inputs as decoder_inputs
from memplan.catalogue.decoder.frame import lm_head
from memplan.catalogue.decoder.task_heads import class_loss, dense, first_token, mean_loss
from memplan.catalogue.families.bert import inputs
from memplan.catalogue.families.dense import LLAMA
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.losses import nll
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.errors import UnsupportedModelError
from memplan.core.ir import Op, Stack, Tensor
from memplan.models.model import ModelSpec

_POOLING = "classifier_pooling"


def eurobert(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build the model with the head of the run's objective."""
    wiring = wiring._replace(causal=False, caching=False)
    stack = decoder(m, wiring, LLAMA)
    first = decoder_inputs(wiring.padded).name
    before = tuple(inputs(m, wiring.padded) if op.name == first else op for op in stack.before)
    head, loss = _head(m)
    return Stack(before, stack.runs, (*stack.after[:-1], *head), loss)


def _head(m: ModelSpec) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    match m.objective:
        case "masked_lm":
            tied = "model.embed_tokens.weight" if m.tie_word_embeddings else ""
            return (lm_head("n", tied, m.get("mlp_bias", False)),), (
                ops.cast("loss.float", "logits", "logits32", "b s v", "fp32"),
                *nll("loss", "logits32", "log_probs", "labels", "b s v"),
                ops.release_names("n", "logits"),
            )
        case "token_classification":
            head = (dense("classifier", "n", "logits", "c", "h", tokens=True),)
            return head, (*class_loss(m, "b s c"), ops.release_names("n"))
        case "sequence_classification":
            return _classifier(m), (*class_loss(m), ops.release_names("n"))
        case _:
            return (), mean_loss("n")


def _classifier(m: ModelSpec) -> tuple[Op, ...]:
    """The classes of a sequence: the mean of its tokens' or, with `bos`, its first token's."""
    pooling = m.get(_POOLING) or "late"
    if pooling not in ("bos", "late"):
        raise UnsupportedModelError(f"{_POOLING}: only bos and late are supported yet for eurobert", _POOLING)
    late = pooling == "late"
    x, rows = ("n", "b s h") if late else ("first", "b h")
    mean = Op("classifier.mean", ("token_logits",), (Tensor("logits", "b c"),), source=f"{ops.DERIVATIVES}: mean.dim")
    return (
        *(() if late else (first_token("classifier.first", "n", "first"),)),
        dense("dense", x, "wide", "h", "h", tokens=late),
        ops.activation("activation", "wide", "pooled", rows),
        ops.release_names("wide"),
        dense("classifier", "pooled", "token_logits" if late else "logits", "c", "h", tokens=late),
        *((mean, ops.release_names("token_logits")) if late else (ops.release_names("first"),)),
        ops.release_names("pooled"),
    )


BUILDERS = {"eurobert": eurobert}
