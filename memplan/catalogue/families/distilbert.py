"""DistilBERT: BERT's block without token types, pooler and dropout after attention."""

from __future__ import annotations

from memplan.catalogue.decoder.frame import masks, returned
from memplan.catalogue.decoder.task_heads import (
    class_loss,
    dense,
    first_token,
    language_model_loss,
    mean_loss,
    vocabulary_projection,
)
from memplan.catalogue.families.bert import encoder_attention, inputs, projections, table
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.activations import activation, dropped, drops, relu
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Op, Run, Stack, Tensor, Weight
from memplan.models.model import ModelSpec


def distilbert(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build the model with the head of the run's objective."""
    wiring = wiring._replace(causal=False, caching=False)
    body, drop = "" if m.objective == "feature_extraction" else "distilbert.", drops(m, "dropout")
    name, longest = f"{body}embeddings", str(m.max_position_embeddings)
    ids = Weight(f"{name}.position_ids", longest, "buffer", "int64", False)
    before = (
        inputs(m, wiring.padded),
        ops.embedding(f"{name}.word_embeddings", "ids", "tokens", "v", "h"),
        Op("position_ids", (), (Tensor("position_ids", "", "int64"),), (ids,)),
        table(f"{name}.position_embeddings", "position_ids", "places", longest, "s"),
        ops.add("add_positions", "tokens", "places", "summed", "b s h"),
        ops.layer_norm(f"{name}.LayerNorm", "summed", "normed", "b s h", "h"),
        ops.release_names("summed"),
        *dropped(f"{name}.dropout", "normed", "embeds", "b s h", drop),
        ops.release_names("tokens", "places", "position_ids"),
        *masks(wiring, "embeds"),
    )
    block = Block(
        f"{body}transformer.layer",
        (
            *projections("attention", "x", wiring, ("q_lin", "k_lin", "v_lin")),
            *encoder_attention(m, wiring, "attention.kernel", "attention_dropout"),
            ops.linear("attention.out_lin", "o", "ao", "h", "a d", "attention", bias=True),
            ops.release_names("q", "k", "v", "o"),
            ops.add("attention.residual", "ao", "x", "sum1", "b s h"),
            ops.layer_norm("sa_layer_norm", "sum1", "x1", "b s h", "h"),
            ops.release_names("ao"),
            ops.linear("ffn.lin1", "x1", "up", "f", "h", "mlp", bias=True),
            *activation(m, "ffn.activation", "up", "act", "b s f"),
            ops.release_names("up"),
            ops.linear("ffn.lin2", "act", "mo.whole", "h", "f", "mlp", bias=True),
            ops.release_names("act"),
            *dropped("ffn.dropout", "mo.whole", "mo", "b s h", drop),
            ops.add("residual", "mo", "x1", "sum2", "b s h"),
            ops.layer_norm("output_layer_norm", "sum2", "y", "b s h", "h"),
            ops.release_names("mo", "x1", *returned(wiring)),
        ),
    )
    head, loss = _head(m, wiring, name)
    return Stack(before, (Run((block,), "L"),), head, loss)


def _head(m: ModelSpec, wiring: Wiring, embeddings: str) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    release = ops.release_names("embeds", *(op.name for op in masks(wiring, "embeds")))
    match m.objective:
        case "masked_lm":
            tied = f"{embeddings}.word_embeddings.weight" if m.tie_word_embeddings else ""
            return (
                release,
                ops.linear("vocab_transform", "x", "wide", "h", "h", "lm_head", bias=True),
                *activation(m, "activation", "wide", "act", "b s h"),
                ops.layer_norm("vocab_layer_norm", "act", "n", "b s h", "h"),
                vocabulary_projection("vocab_projector", "n", tied, "vocab_projector.bias"),
                ops.release_names("x"),  # the model's own output refers to it
            ), language_model_loss()
        case "token_classification":
            return (
                release,
                *dropped("dropout", "x", "dropped", "b s h", drops(m, "dropout")),
                dense("classifier", "dropped", "logits", "c", "h", tokens=True),
                ops.release_names("dropped"),
            ), class_loss(m, "b s c")
        case "sequence_classification":
            return (
                release,
                first_token("first", "x", "first"),
                dense("pre_classifier", "first", "wide", "h", "h"),
                relu("relu", "wide", "pooled", "b h"),
                *dropped("dropout", "pooled", "dropped", "b h", drops(m, "seq_classif_dropout")),
                dense("classifier", "dropped", "logits", "c", "h"),
                ops.release_names("dropped"),
            ), class_loss(m)
        case _:
            return (release,), mean_loss("x")


BUILDERS = {"distilbert": distilbert}
