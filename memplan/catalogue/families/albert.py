"""ALBERT: BERT whose layers of a group have the same weights, with embeddings narrower than its layers.

Source: transformers 5.24 models/albert/modeling_albert.py.
"""

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
from memplan.catalogue.families.bert import embeddings, encoder_attention, projections
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.activations import activation, dropped, drops
from memplan.catalogue.kernels.rewriting import renamed
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Op, Run, Stack
from memplan.models.model import ModelSpec


def albert(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build the model with the head of the run's objective.

    Its layers are outside of blocks, since every block has weights of its own.
    """
    wiring = wiring._replace(causal=False, caching=False)
    body = "" if m.objective == "feature_extraction" else "albert."
    narrow = renamed(ops.with_axes(embeddings(m, wiring, body, False), {"h": "p"}), {"embeds": "narrow"})
    mapped = ops.linear(f"{body}encoder.embedding_hidden_mapping_in", "narrow", "layer.0", "h", "p", "embedding", True)
    held = ops.release_names("narrow", "embeds", *(op.name for op in masks(wiring, "narrow")))
    head, loss = _head(m, body)
    unchanged = Block(f"{body}encoder", (ops.view("encoder", "x", "y", "b s h"),), never_checkpointed=True)
    return Stack((*narrow, mapped, *_layers(m, wiring, body)), (Run((unchanged,), "L1"),), (held, *head), loss)


def _layers(m: ModelSpec, wiring: Wiring, body: str) -> tuple[Op, ...]:
    """Every pass through a group's layer, from `layer.0` to `embeds`."""
    passes, of_group = m.num_hidden_layers, m.num_hidden_layers // m.config_int("num_hidden_groups", 1)

    def layer(i: int) -> tuple[Op, ...]:
        one = _layer(m, wiring, f"{body}encoder.albert_layer_groups.{i // of_group}.albert_layers.0")
        names = {t.name: f"{t.name}.{i}" for op in one for t in op.writes}
        return renamed(one, {**names, "x": f"layer.{i}", "y": f"layer.{i + 1}" if i < passes - 1 else "embeds"})

    return tuple(op for i in range(passes) for op in layer(i))


def _layer(m: ModelSpec, wiring: Wiring, name: str) -> tuple[Op, ...]:
    attention, drop = f"{name}.attention", drops(m, "hidden_dropout_prob")
    return (
        *projections(attention, "x", wiring, ("query", "key", "value")),
        *encoder_attention(m, wiring, f"{attention}.kernel", "attention_probs_dropout_prob"),
        ops.linear(f"{attention}.dense", "o", "ao.whole", "h", "a d", "attention", bias=True),
        *dropped(f"{attention}.output_dropout", "ao.whole", "ao", "b s h", drop),
        ops.add(f"{attention}.residual", "x", "ao", "sum1", "b s h"),
        ops.layer_norm(f"{attention}.LayerNorm", "sum1", "x1", "b s h", "h"),
        ops.release_names("q", "k", "v", "o", "ao"),
        ops.linear(f"{name}.ffn", "x1", "up", "f", "h", "mlp", bias=True),
        *activation(m, f"{name}.activation", "up", "act", "b s f"),
        ops.release_names("up"),
        ops.linear(f"{name}.ffn_output", "act", "mo", "h", "f", "mlp", bias=True),
        ops.release_names("act"),
        ops.add(f"{name}.residual", "mo", "x1", "sum2", "b s h"),
        ops.layer_norm(f"{name}.full_layer_layer_norm", "sum2", "y", "b s h", "h"),
        ops.release_names("x", "mo", "x1", *returned(wiring)),
    )


def _head(m: ModelSpec, body: str) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    drop = drops(m, "classifier_dropout_prob")
    pooled = (
        first_token(f"{body}pooler.first", "x", "first"),
        dense(f"{body}pooler", "first", "pooled.dense", "h", "h"),
        ops.keeping_output(f"{body}pooler_activation", "pooled.dense", "pooled", "b h", "tanh"),
        ops.release_names("first"),
    )
    match m.objective:
        case "masked_lm":
            n = "predictions"
            tied = f"{body}embeddings.word_embeddings.weight" if m.tie_word_embeddings else ""
            return (
                ops.linear(f"{n}.dense", "x", "wide", "p", "h", "lm_head", bias=True),
                *activation(m, f"{n}.activation", "wide", "act", "b s p"),
                *ops.with_axes(
                    (
                        ops.layer_norm(f"{n}.LayerNorm", "act", "n", "b s h", "h"),
                        vocabulary_projection(f"{n}.decoder", "n", tied, f"{n}.bias"),
                    ),
                    {"h": "p"},
                ),
                ops.release_names("wide"),
            ), language_model_loss()
        case "token_classification":
            return (
                *dropped("dropout", "x", "dropped", "b s h", drop),
                dense("classifier", "dropped", "logits", "c", "h", tokens=True),
                ops.release_names("dropped"),
            ), class_loss(m, "b s c")
        case "sequence_classification":
            return (
                *pooled,
                *dropped("dropout", "pooled", "dropped", "b h", drop),
                dense("classifier", "dropped", "logits", "c", "h"),
                ops.release_names("pooled", "dropped"),
            ), class_loss(m)
        case _:
            return pooled, mean_loss("pooled", "x")


BUILDERS = {"albert": albert}
