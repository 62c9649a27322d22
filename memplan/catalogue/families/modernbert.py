"""ModernBERT: rotary positions, sliding windows in two of three layers, LayerNorms without biases, gated MLPs."""

from __future__ import annotations

from memplan.catalogue.attention.attention import QUERIES, attention, mask_name
from memplan.catalogue.decoder.frame import BOTH, local, masks_of, returned, rotary_tables, runs, table_names
from memplan.catalogue.decoder.task_heads import (
    class_loss,
    dense,
    first_token,
    mean_loss,
    vocabulary_projection,
)
from memplan.catalogue.families.bert import inputs
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.activations import dropped, drops
from memplan.catalogue.kernels.losses import nll
from memplan.catalogue.kernels.positions import positions
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.errors import UnsupportedModelError
from memplan.core.ir import Block, Keep, Op, Stack, Tensor
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_SOURCE = "transformers 5.24 models/modernbert/modeling_modernbert.py apply_rotary_pos_emb"
_HALF = "b s a rot2"


def _rotated(name: str, x: str, y: str) -> tuple[Op, ...]:
    """Cast to fp32 twice, rotate, and cast back."""
    wide, again, cosine, turned, sine, both = (
        f"{y}.{t}" for t in ("wide", "again", "cosine", "turned", "sine", "rotated")
    )
    return (
        ops.cast(f"{name}.float", x, wide, QUERIES, "fp32"),
        Op(f"{name}.cos", (wide, "cos"), (Tensor(cosine, QUERIES),), (), (Keep("cos", wide),), source=_SOURCE),
        ops.cast(f"{name}.float_again", x, again, QUERIES, "fp32"),
        ops.rotate_half(f"{name}.rotate_half", again, turned, QUERIES, _HALF),
        Op(f"{name}.sin", (turned, "sin"), (Tensor(sine, QUERIES),), (), (Keep("sin", turned),), source=_SOURCE),
        ops.add(f"{name}.add", cosine, sine, both, QUERIES),
    )


def _attention(m: ModelSpec, wiring: Wiring, layer: Layer, x: str) -> tuple[Op, ...]:
    name, bias, drop = "attn", m.get("attention_bias", False), drops(m, "attention_dropout")
    parts = tuple(Tensor(t, QUERIES) for t in ("q1", "k1", "v"))
    return (
        ops.linear(f"{name}.Wqkv", x, "qkv", "3 a d", "h", "attention", bias),
        ops.view(f"{name}.heads", "qkv", "qkv.heads", "b s 3 a d"),
        ops.split(f"{name}.unbind", "qkv.heads", parts),
        *_rotated(f"{name}.rope_q", "q1", "q"),
        *_rotated(f"{name}.rope_k", "k1", "k"),
        *(ops.cast(f"{name}.cast_{t}", f"{t}.rotated", t, QUERIES, f"={t}1") for t in "qk"),
        ops.release_names("q.rotated", "k.rotated", "q1", "k1"),
        *attention(
            f"{name}.kernel",
            "q",
            "k",
            "v",
            "o",
            wiring._replace(drops=drop),
            False,
            layer.sliding,
            mask_name(layer.sliding),
        ),
        ops.linear(f"{name}.Wo", "o", "ao.whole", "h", "a d", "attention", bias),
        *dropped(f"{name}.out_drop", "ao.whole", "ao", "b s h", drop),
        ops.release_names("qkv", "q", "k", "v", "o", x),
    )


def _norm(m: ModelSpec, name: str, x: str, y: str, shape: str = "b s h", group: str = "norm") -> Op:
    return ops.layer_norm(name, x, y, shape, "h", bias=m.get("norm_bias", False), group=group)


def modernbert(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build the model with the head of the run's objective."""
    wiring = wiring._replace(causal=False, caching=False)
    body = "" if m.objective == "feature_extraction" else "model."
    mlp_drop, bias = drops(m, "mlp_dropout"), m.get("mlp_bias", False)

    def block(layer: Layer) -> Block:
        x = "n1" if layer.mixer == "attention" else "x"  # the first layer has no norm before its attention
        body_ops = (
            *((_norm(m, "attn_norm", "x", "n1"),) if x == "n1" else ()),
            *_attention(m, wiring, layer, x),
            ops.add("residual_1", "x", "ao", "x1", "b s h"),
            _norm(m, "mlp_norm", "x1", "n2"),
            ops.linear("mlp.Wi", "n2", "gate_up", "2 f", "h", "mlp", bias),
            ops.split("mlp.chunk", "gate_up", (Tensor("up", "b s f"), Tensor("gate", "b s f"))),
            ops.activation("mlp.act", "up", "act", "b s f"),
            ops.mul("mlp.product", "act", "gate", "product", "b s f"),
            *dropped("mlp.drop", "product", "product.kept", "b s f", mlp_drop),
            ops.linear("mlp.Wo", "product.kept", "mo", "h", "f", "mlp", bias),
            ops.release_names("gate_up", "up", "gate", "n2"),
            ops.add("residual_2", "x1", "mo", "y", "b s h"),
            ops.release_names("ao", *returned(wiring)),
        )
        made = Block(f"{body}layers", body_ops)
        return local(made) if layer.sliding and has_two else made

    has_two = len({layer.sliding for layer in m.layers}) > 1  # each kind of layer has its own rotary table

    before = (
        inputs(m, wiring.padded),
        positions(),
        ops.embedding(f"{body}embeddings.tok_embeddings", "ids", "tokens", "v", "h"),
        _norm(m, f"{body}embeddings.norm", "tokens", "normed"),
        ops.release_names("tokens"),
        *dropped(f"{body}embeddings.drop", "normed", "embeds", "b s h", drops(m, "embedding_dropout")),
        *masks_of(wiring, BOTH),
        *rotary_tables(has_two),
    )
    head, loss = _head(m, body)
    last = (
        _norm(m, f"{body}final_norm", "x", "n"),
        ops.release_names(
            "x", "embeds", "positions", *table_names(has_two), *(op.name for op in masks_of(wiring, BOTH))
        ),
        *head,
    )
    return Stack(before, runs(m, block), last, loss)


def _prediction(m: ModelSpec, x: str, y: str, tokens: bool, group: str) -> tuple[Op, ...]:
    """A dense layer, an activation and a norm."""
    lead = "b s" if tokens else "b"
    return (
        ops.linear(
            "head.dense", x, "wide", "h", "h", group, m.get("classifier_bias", False), lead=lead, flat=not tokens
        ),
        ops.activation("head.act", "wide", "act", f"{lead} h"),
        _norm(m, "head.norm", "act", y, f"{lead} h"),
    )


def _head(m: ModelSpec, body: str) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    drop = drops(m, "classifier_dropout")
    match m.objective:
        case "masked_lm":
            if m.get("sparse_prediction", False):
                raise UnsupportedModelError("sparse_prediction: is not supported yet", "sparse_prediction")
            tied = f"{body}embeddings.tok_embeddings.weight" if m.tie_word_embeddings else ""
            bias = "decoder.bias" if m.get("decoder_bias", True) else ""
            head = (
                *_prediction(m, "n", "out", True, "lm_head"),
                vocabulary_projection("decoder", "out", tied, bias),
            )
            wide = ops.cast("loss.float", "logits", "logits32", "b s v", "fp32")
            return head, (
                wide,
                *nll("loss", "logits32", "log_probs", "labels", "b s v"),
                ops.release_names("n", "logits"),
            )
        case "token_classification":
            return (
                *_prediction(m, "n", "out", True, "head"),
                *dropped("drop", "out", "dropped", "b s h", drop),
                dense("classifier", "dropped", "logits", "c", "h", tokens=True),
                ops.release_names("dropped"),
            ), (*class_loss(m, "b s c"), ops.release_names("n"))
        case "sequence_classification":
            if m.get("classifier_pooling", "cls") != "cls":
                raise UnsupportedModelError(
                    "classifier_pooling: only cls is supported yet for modernbert", "classifier_pooling"
                )
            return (
                first_token("first", "n", "first"),
                *_prediction(m, "first", "pooled", False, "head"),
                *dropped("drop", "pooled", "dropped", "b h", drop),
                dense("classifier", "dropped", "logits", "c", "h"),
                ops.release_names("first", "dropped"),
            ), (*class_loss(m), ops.release_names("n"))
        case _:
            return (), mean_loss("n")


BUILDERS = {"modernbert": modernbert}
