"""BERT, RoBERTa, XLM-RoBERTa, data2vec, ERNIE and ELECTRA: a norm after each residual, dropout, and the heads."""

from __future__ import annotations

from functools import partial

from memplan.catalogue.attention.attention import QUERIES, attention
from memplan.catalogue.decoder.frame import masks, returned
from memplan.catalogue.decoder.task_heads import (
    class_loss,
    dense,
    first_token,
    labels_of,
    language_model_loss,
    mean_loss,
    pooler,
    vocabulary_projection,
)
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.activations import activation, dropped, drops
from memplan.catalogue.kernels.rewriting import renamed
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Run, Stack, Tensor, Weight
from memplan.models.model import ModelSpec

_SOURCE = "transformers 5.24 models/bert/modeling_bert.py BertEmbeddings"


def bert(m: ModelSpec, wiring: Wiring, *, name: str = "bert", roberta: bool = False) -> Stack:
    """Build the model with the head of the run's objective.

    `roberta`: positions are counted from the ids, and the heads are other modules.
    """
    wiring = wiring._replace(causal=False, caching=False)
    body = "" if m.objective == "feature_extraction" else f"{name}."
    head, loss = heads(m, wiring, body, roberta)
    return Stack(embeddings(m, wiring, body, roberta), (Run((_block(m, wiring, body),), "L"),), head, loss)


def electra(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build ELECTRA: BERT whose embeddings may be narrower than its layers, with a generator's head and no pooler."""
    wiring = wiring._replace(causal=False, caching=False)
    body = "" if m.objective == "feature_extraction" else "electra."
    drop = drops(m, "hidden_dropout_prob" if m.config.get("classifier_dropout") is None else "classifier_dropout")
    before = embeddings(m, wiring, body, False)
    if m.axes()["p"] != m.hidden_size:
        plain = tuple(op for op in before if not any(t.name.startswith("mask") for t in op.writes))
        project = ops.linear(f"{body}embeddings_project", "narrow", "embeds", "h", "p", "embedding", bias=True)
        narrow = renamed(ops.with_axes(plain, {"h": "p"}), {"embeds": "narrow"})
        before = (*narrow, project, ops.release_names("narrow"), *masks(wiring, "embeds"))
    release = ops.release_names("embeds", *(op.name for op in masks(wiring, "embeds")))
    match m.objective:
        case "masked_lm":
            n = "generator_predictions"
            tied = f"{body}embeddings.word_embeddings.weight" if m.tie_word_embeddings else ""
            norm = ops.layer_norm(f"{n}.LayerNorm", "act", "n", "b s p", "p")
            projection = vocabulary_projection("generator_lm_head", "n", tied, "generator_lm_head.bias")
            head = (
                release,
                ops.linear(f"{n}.dense", "x", "wide", "p", "h", "lm_head", bias=True),
                ops.activation(f"{n}.activation", "wide", "act", "b s p"),
                *ops.with_axes((norm, projection), {"h": "p"}),
            )
            loss = language_model_loss()
        case "sequence_classification":
            head = (
                release,
                first_token("classifier.first", "x", "first"),
                *dropped("classifier.dropout", "first", "dropped", "b h", drop),
                dense("classifier.dense", "dropped", "wide", "h", "h"),
                ops.activation("classifier.activation", "wide", "pooled", "b h"),
                *dropped("classifier.dropout_2", "pooled", "out", "b h", drop),
                dense("classifier.out_proj", "out", "logits", "c", "h"),
                ops.release_names("out"),
            )
            loss = class_loss(m)
        case "token_classification":
            head, loss = heads(m, wiring, body, False)
        case _:
            head, loss = (release,), mean_loss("x")
    return Stack(before, (Run((_block(m, wiring, body),), "L"),), head, loss)


def inputs(m: ModelSpec, padded: bool) -> Op:
    names = ("ids", *(("attention_mask",) if padded else ()))
    labels = () if m.objective == "feature_extraction" else (labels_of(m),)
    return Op("inputs", (), (*(Tensor(n, "b s", "int64") for n in names), *labels), holds="step")


def embeddings(m: ModelSpec, wiring: Wiring, body: str, roberta: bool, normed: bool = True) -> tuple[Op, ...]:
    """Embeddings, `normed` if a norm ends them, and masks.

    BERT's positions and token types are buffers that all sequences share; RoBERTa makes them for the batch.
    """
    name, drop = f"{body}embeddings", drops(m, "hidden_dropout_prob")
    longest = m.max_position_embeddings
    buffers = tuple(
        Weight(f"{name}.{n}", f"{longest}", "buffer", "int64", False) for n in ("position_ids", "token_type_ids")
    )
    rows = "b s" if roberta else "s"
    types = m.config_int("type_vocab_size", 2, 0)
    held = buffers[: 2 if types else 1] if roberta else ()
    kinds = (
        Op(
            "token_type_ids",
            ("position_ids",),
            (Tensor("token_type_ids", rows if types else "0", "int64"),),
            held,
            gradient="none",
            source=_SOURCE,
        ),
    )
    typed = (
        table(f"{name}.token_type_embeddings", "token_type_ids", "types", str(types), "b s"),
        ops.add("add_types", "tokens", "types", "typed", "b s h"),
    )
    typed = typed if types else (ops.view("untyped", "tokens", "typed", "b s h"),)
    counted = (
        Op(
            "position_ids.mask",
            ("ids",),
            (Tensor("not_padding", "b s", "int32"),),
            scratch=(Tensor("ne", "b s", "bool"),),
        ),
        Op("position_ids.cumsum", ("not_padding",), (Tensor("summed_ids", "b s", "int64"),)),
        Op("position_ids.type_as", ("summed_ids",), (Tensor("counted_ids", "b s", "int32"),)),
        Op("position_ids.add", ("counted_ids",), (Tensor("later_ids", "b s", "int32"),)),
        Op("position_ids.mul", ("later_ids", "not_padding"), (Tensor("incremental", "b s", "int32"),)),
        ops.release_names("counted_ids"),
        Op(
            "position_ids.add_padding",
            ("incremental",),
            (Tensor("position_ids", "b s", "int64"),),
            scratch=(Tensor("long", "b s", "int64"),),
        ),
        ops.release_names("not_padding", "incremental"),
    )
    tasks = str(m.config_int("task_type_vocab_size", 3)) if m.get("use_task_id", False) else ""
    task_ids = Op("task_type_ids", (), (Tensor("task_type_ids", "b s", "int64"),), gradient="none")
    by_task = (
        task_ids,
        table(f"{name}.task_type_embeddings", "task_type_ids", "tasks", tasks, "b s"),
        ops.add("add_tasks", "placed", "tasks", "summed", "b s h")._replace(view=True),
    )
    return (
        inputs(m, wiring.padded),
        *(counted if roberta else (Op("position_ids", (), (Tensor("position_ids", "", "int64"),), buffers),)),
        *kinds,
        ops.embedding(f"{name}.word_embeddings", "ids", "tokens", "v", "h"),
        *typed,
        table(f"{name}.position_embeddings", "position_ids", "places", str(longest), rows),
        ops.add("add_positions", "typed", "places", "placed" if tasks else "summed", "b s h"),
        ops.release_names("typed"),
        *(by_task if tasks else ()),
        *(
            (ops.layer_norm(f"{name}.LayerNorm", "summed", "normed", "b s h", "h"), ops.release_names("summed"))
            if normed
            else (ops.view(f"{name}.LayerNorm", "summed", "normed", "b s h"),)
        ),
        *dropped(f"{name}.dropout", "normed", "embeds", "b s h", drop),
        ops.release_names("tokens", *(("types",) if types else ()), "places", "position_ids", "token_type_ids"),
        ops.release_names(*(("tasks", "task_type_ids") if tasks else ())),
        *masks(wiring, "embeds"),
    )


def table(name: str, ids: str, y: str, rows: str, looked_up: str) -> Op:
    """Look up rows of a table of `rows` rows, for every token or position."""
    w = Weight(f"{name}.weight", f"{rows} h", "embedding", rows=1)
    op = ops.embedding(name, ids, y, rows, "h")
    segments = tuple(
        s._replace(tensor=s.tensor._replace(shape=s.tensor.shape.replace("segments", f"segments_{rows}")))
        for s in op.scratch_back
    )
    per_sequence = looked_up.startswith("b")
    return op._replace(
        writes=(Tensor(y, f"{looked_up} h", f"={w.name}"),),
        keeps=(Keep(ids, w.name),),
        scratch_back=segments if per_sequence else (),
    )


def encoder_attention(m: ModelSpec, wiring: Wiring, name: str, key: str, wide: bool = False) -> tuple[Op, ...]:
    """Attention from q, k and v to o. If it is written out, the softmax is in the scores' dtype unless `wide`.

    `key` is the config's key of the dropout.
    """
    drop = drops(m, key)
    if wiring.backend != "eager" or wide:
        return attention(name, "q", "k", "v", "o", wiring._replace(drops=drop), False)
    return plain_attention_ops(name, drop, ("mask",) if wiring.has_mask() else ())


def plain_attention_ops(
    name: str, drop: bool, added: tuple[str, ...] = (), one: bool = False, laid: bool = False
) -> tuple[Op, ...]:
    """Attention written out from q, k and v to o.

    added  tensors that are added to the scaled scores
    one    there is one query per sequence, whose heads need no copy
    laid   keys and values are stored head by head, as in a cache, and need no copy

    Only autocast casts. Source: transformers 5.24 models/bert/modeling_bert.py eager_attention_forward.
    """
    n, scores = name, "b a s s"
    flatten_query, flatten_key = (ops.view if is_view else ops.copy for is_view in (one, laid))
    steps = ["scaled", *(f"with.{a}" for a in added)]
    return (
        flatten_query(f"{n}.q_flat", "q", "q.flat", QUERIES)._replace(autocast="lower"),
        flatten_key(f"{n}.k_flat", "k", "k.flat", QUERIES)._replace(autocast="lower"),
        ops.matmul(f"{n}.scores", "q.flat", "k.flat", "scores", scores),
        ops.scale(f"{n}.scaling", "scores", "scaled", scores),
        *(
            Op(f"{n}.add_{a}", (x, a), (Tensor(y, scores),), gradient="same", source=f"{ops.DERIVATIVES}: add.Tensor")
            for a, x, y in zip(added, steps, steps[1:], strict=False)
        ),
        *ops.softmax(f"{n}.softmax", steps[-1], "probs.whole", scores),
        *dropped(f"{n}.dropout", "probs.whole", "probs", scores, drop),
        flatten_key(f"{n}.v_flat", "v", "v.flat", QUERIES)._replace(autocast="lower"),
        ops.matmul(f"{n}.product", "probs", "v.flat", "heads", QUERIES),
        ops.copy(f"{n}.contiguous", "heads", "o", QUERIES, gradient="new"),
    )


def projections(name: str, x: str, wiring: Wiring, parts: tuple[str, str, str], bias: bool = True) -> tuple[Op, ...]:
    """q, k and v as heads. Some kernels copy q and k, whose gradients are then copied back."""
    backend = wiring.masked if wiring.has_mask() else wiring.backend
    back = "new" if backend in ("eager", "math") else "same"
    q, k, v = parts
    return (
        ops.linear(f"{name}.{q}", x, "q0", "a d", "h", "attention", bias),
        ops.view(f"{name}.q_heads", "q0", "q", QUERIES, back),
        ops.linear(f"{name}.{k}", x, "k0", "a d", "h", "attention", bias),
        ops.view(f"{name}.k_heads", "k0", "k", QUERIES, back),
        ops.linear(f"{name}.{v}", x, "v", "a d", "h", "attention", bias),
    )


def _block(m: ModelSpec, wiring: Wiring, body: str) -> Block:
    name = "attention.self"
    return Block(
        f"{body}encoder.layer",
        (
            *projections(name, "x", wiring, ("query", "key", "value")),
            *encoder_attention(m, wiring, f"{name}.attention", "attention_probs_dropout_prob"),
            ops.release_names("q", "k", "v"),
            *after_attention(m, *returned(wiring)),
        ),
    )


def after_attention(m: ModelSpec, *held: str) -> tuple[Op, ...]:
    """The rest of a block, from attention's heads `o` to `y`; `held` are what the block references to its end."""
    drop = drops(m, "hidden_dropout_prob")
    return (
        ops.linear("attention.output.dense", "o", "ao.whole", "h", "a d", "attention", bias=True),
        *dropped("attention.output.dropout", "ao.whole", "ao", "b s h", drop),
        ops.add("attention.residual", "ao", "x", "sum1", "b s h"),
        ops.layer_norm("attention.output.LayerNorm", "sum1", "x1", "b s h", "h"),
        ops.release_names("ao", "o"),
        ops.linear("intermediate.dense", "x1", "up", "f", "h", "mlp", bias=True),
        *activation(m, "intermediate.act", "up", "act", "b s f"),
        ops.linear("output.dense", "act", "mo.whole", "h", "f", "mlp", bias=True),
        *dropped("output.dropout", "mo.whole", "mo", "b s h", drop),
        ops.add("residual", "mo", "x1", "sum2", "b s h"),
        ops.layer_norm("output.LayerNorm", "sum2", "y", "b s h", "h"),
        ops.release_names("mo", "act", "x1", *held),
    )


def heads(m: ModelSpec, wiring: Wiring, body: str, roberta: bool) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    release = ops.release_names("embeds", *(op.name for op in masks(wiring, "embeds")))
    drop = drops(m, "hidden_dropout_prob" if m.config.get("classifier_dropout") is None else "classifier_dropout")
    match m.objective:
        case "masked_lm":
            return (release, *predictions(m, body, roberta)), language_model_loss()
        case "token_classification":
            return (
                release,
                *dropped("dropout", "x", "dropped", "b s h", drop),
                dense("classifier", "dropped", "logits", "c", "h", tokens=True),
                ops.release_names("dropped"),
            ), class_loss(m, "b s c")
        case "sequence_classification" if roberta:
            return (
                release,
                first_token("classifier.first", "x", "first"),
                *dropped("classifier.dropout", "first", "dropped", "b h", drop),
                dense("classifier.dense", "dropped", "wide", "h", "h"),
                ops.keeping_output("classifier.tanh", "wide", "pooled", "b h", "tanh"),
                *dropped("classifier.dropout_2", "pooled", "out", "b h", drop),
                dense("classifier.out_proj", "out", "logits", "c", "h"),
                ops.release_names("out"),
            ), class_loss(m)
        case "sequence_classification":
            return (
                *pooler(f"{body}pooler", "x"),
                release,
                *dropped("dropout", "pooled", "dropped", "b h", drop),
                dense("classifier", "dropped", "logits", "c", "h"),
                ops.release_names("pooled", "dropped"),
            ), class_loss(m)
        case _:
            return (*pooler(f"{body}pooler", "x"), release), mean_loss("pooled", "x")


def predictions(m: ModelSpec, body: str, roberta: bool = False) -> tuple[Op, ...]:
    """A dense layer, its activation (RoBERTa's is always GELU), a norm, and a projection by the embeddings' weight."""
    name, norm = (
        ("lm_head", "lm_head.layer_norm")
        if roberta
        else ("cls.predictions.transform", "cls.predictions.transform.LayerNorm")
    )
    tied = f"{body}embeddings.word_embeddings.weight" if m.tie_word_embeddings else ""
    act = (
        (ops.activation(f"{name}.act", "wide", "act", "b s h"),)
        if roberta
        else activation(m, f"{name}.act", "wide", "act", "b s h")
    )
    names = ("lm_head.decoder", "lm_head.bias") if roberta else ("cls.predictions.decoder", "cls.predictions.bias")
    return (
        ops.linear(f"{name}.dense", "x", "wide", "h", "h", "lm_head", bias=True),
        *act,
        ops.layer_norm(norm, "act", "n", "b s h", "h"),
        vocabulary_projection(names[0], "n", tied, names[1]),
        ops.release_names("x"),  # the model's own output refers to it
    )


BUILDERS = {
    "bert": bert,
    "camembert": partial(bert, name="roberta", roberta=True),
    "data2vec-text": partial(bert, name="data2vec_text", roberta=True),
    "electra": electra,
    "ernie": partial(bert, name="ernie"),
    "roberta": partial(bert, name="roberta", roberta=True),
    "xlm-roberta": partial(bert, name="roberta", roberta=True),
}
