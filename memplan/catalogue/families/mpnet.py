"""MPNet: RoBERTa with a bias of relative positions that all layers add to their scores, written out in every layer.

Source: transformers 5.24 models/mpnet/modeling_mpnet.py.
"""

from __future__ import annotations

from memplan.catalogue.families.bert import after_attention, embeddings, heads, plain_attention_ops, projections
from memplan.catalogue.families.t5 import relative_bias
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.activations import drops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Op, Run, Stack
from memplan.models.model import ModelSpec

# The block's modules by the names that BERT's have.
_NAMES = {"attention.output.dense": "attention.attn.o", "attention.output.LayerNorm": "attention.LayerNorm"}


def mpnet(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build the model with the head of the run's objective. Every sequence has its own copy of the bias."""
    wiring = wiring._replace(causal=False, caching=False, backend="eager", masked="eager")
    body = "" if m.objective == "feature_extraction" else "mpnet."
    before = (
        *embeddings(m, wiring, body, roberta=True),
        *relative_bias(f"{body}encoder", "encoder_bias"),
        ops.copy(f"{body}encoder.bias", "encoder_bias", "bias", "b a s s", gradient="new"),
        ops.release_names("encoder_bias"),
    )
    head, loss = heads(m, wiring, body, roberta=True)
    block = Block(f"{body}encoder.layer", _block(m, wiring), never_checkpointed=True)
    return Stack(before, (Run((block,), "L"),), (ops.release_names("bias"), *head), loss)


def _block(m: ModelSpec, wiring: Wiring) -> tuple[Op, ...]:
    """One layer, which adds the bias to its scores in place."""
    name, masked = "attention.attn", wiring.has_mask()
    drop = drops(m, "attention_probs_dropout_prob")
    attention = plain_attention_ops(name, drop, ("bias", *(("mask",) if masked else ())))
    output, *rest = map(_renamed, after_attention(m))
    return (
        *projections(name, "x", wiring, ("q", "k", "v")),
        *(op._replace(view=True) if op.name == f"{name}.add_bias" else op for op in attention),
        output,
        ops.release_names("q", "k", "v", "probs", "o", "with.mask" if masked else "with.bias"),
        *rest,
    )


def _renamed(op: Op) -> Op:
    """The operation with MPNet's name of its module."""
    name = _NAMES.get(op.name, op.name)
    weights = tuple(w._replace(name=w.name.replace(op.name, name)) for w in op.weights)
    names = {w.name: v.name for w, v in zip(op.weights, weights, strict=True)}
    keeps = tuple(k._replace(what=names.get(k.what, k.what), of=names.get(k.of, k.of)) for k in op.keeps)
    return op._replace(name=name, weights=weights, keeps=keeps)


BUILDERS = {"mpnet": mpnet}
