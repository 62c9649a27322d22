"""DeBERTa-v2 and v3: BERT with scores of content and relative position, computed without a fused kernel.

Source: transformers 5.24 models/deberta_v2/modeling_deberta_v2.py.
"""

from __future__ import annotations

from memplan.catalogue.attention.attention import QUERIES
from memplan.catalogue.decoder.task_heads import class_loss, dense, first_token, language_model_loss, mean_loss
from memplan.catalogue.families.bert import after_attention, inputs, predictions
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.activations import activation, dropped, drops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.errors import UnsupportedModelError
from memplan.core.ir import Block, Keep, Op, Run, Stack, Tensor, Weight
from memplan.models.model import ModelSpec

SCORES, SPANS = "b a s s", "b a s spans"
# What the class supports in other ways: key, and the value that is described here.
_ONLY = {
    "relative_attention": True,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "conv_kernel_size": 0,
    "legacy": True,
    "position_biased_input": False,
    "type_vocab_size": 0,
}


def deberta(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build the model with the head of the run's objective. The encoder returns every layer's output."""
    for key, value in _ONLY.items():
        if (said := m.config.get(key)) != value:
            raise UnsupportedModelError(f"{key}: {said!r:.60} is not supported yet; supported: {value!r}", key)
    if m.config.get("pos_att_type") not in ("p2c|c2p", "c2p|p2c", ("p2c", "c2p"), ("c2p", "p2c")):
        raise UnsupportedModelError("pos_att_type: only p2c|c2p is supported yet", "pos_att_type")
    body = "" if m.objective == "feature_extraction" else "deberta."
    head, loss = _head(m, body)
    given = () if wiring.padded else ("attention_mask",)
    release = ops.release_names("embeds", *given, "token_type_ids", "mask", "relative", "rel")
    return Stack(
        _before(m, wiring, body),
        (Run((_block(m, body),), "L"),),
        (release, Op("hidden_states", releases="states"), *head),
        loss,
    )


def _before(m: ModelSpec, wiring: Wiring, body: str) -> tuple[Op, ...]:
    """Embeddings with their padding set to zero, the mask, and normed embeddings of the distances."""
    name, encoder = f"{body}embeddings", f"{body}encoder"
    buffer = Weight(f"{name}.position_ids", str(m.max_position_embeddings or 0), "buffer", "int64", False)
    ones = () if wiring.padded else (Op("ones", (), (Tensor("attention_mask", "b s", "fp32"),)),)
    norm = ops.layer_norm(f"{encoder}.LayerNorm", "distances", "rel", "spans h", "h")
    distances = Weight(f"{encoder}.rel_embeddings.weight", "spans h", "embedding", rows=1)
    keeps = tuple(
        k._replace(
            what=distances.name if k.what == "distances" else k.what, of=distances.name if k.of == "distances" else k.of
        )
        for k in norm.keeps
    )
    return (
        inputs(m, wiring.padded),
        *ones,
        Op("token_types", (), (Tensor("token_type_ids", "b s", "int64"),), (buffer,)),
        ops.embedding(f"{name}.word_embeddings", "ids", "tokens", "v", "h"),
        Op("no_positions", (), (Tensor("places", "b s h", "=tokens"),)),
        ops.layer_norm(f"{name}.LayerNorm", "tokens", "normed", "b s h", "h"),
        ops.cast(f"{name}.mask", "attention_mask", "mask.rows", "b s", "=normed"),
        ops.with_constant(f"{name}.masked", "normed", "mask.rows", "masked", "b s h", "mul.Tensor"),
        ops.release_names("normed"),
        *dropped(f"{name}.dropout", "masked", "embeds", "b s h", drops(m, "hidden_dropout_prob")),
        _returned("embeds"),
        ops.release_names("tokens", "places", "mask.rows"),
        Op("mask", ("attention_mask",), (Tensor("mask", "b s s"),), gradient="none"),
        Op("relative", (), (Tensor("relative", "s s", "int64"),), scratch=(Tensor("logarithms", "s s", "fp32"),)),
        norm._replace(
            reads=(),
            writes=(norm.writes[0]._replace(dtype=f"={distances.name}"), *norm.writes[1:]),
            weights=(distances, *norm.weights),
            keeps=keeps,
        ),
    )


def _bmm(name: str, a: str, b: str, y: str, shape: str) -> Op:
    """A plain batched product, into whose gradients autograd can add in place."""
    return ops.matmul(name, a, b, y, shape)._replace(gradient="new")


def _of_distances(name: str, layer: str, y: str) -> tuple[Op, ...]:
    """The queries or keys of all distances, repeated for every sequence."""
    product = ops.linear(f"{name}.{layer}", "rel.dropped", f"{y}.one0", "a d", "h", "attention", True, lead="spans")
    return (
        product,
        ops.copy(f"{name}.{y}_contiguous", f"{y}.one0", f"{y}.one", "spans a d"),
        ops.copy(f"{name}.{y}_repeat", f"{y}.one", y, "b a spans d", gradient="new"),
        ops.release_names(f"{y}.one"),
    )


def _scores(name: str, t: str, x: str, of: str) -> tuple[Op, ...]:
    """The scores `t` of x with all distances, of which every pair of tokens takes one, scaled."""
    index = Op(
        f"{name}.{t}_index",
        ("relative",),
        (Tensor(f"{t}.index", "s s", "int64"),),
        scratch=(Tensor("shifted", "s s", "int64"),),
        gradient="none",
    )
    gather = ops.with_constant(f"{name}.{t}_gather", f"{t}.all", f"{t}.index", t, SCORES, "gather")
    return (
        _bmm(f"{name}.{t}_all", x, of, f"{t}.all", SPANS),
        index,
        gather._replace(keeps=(*gather.keeps, Keep(f"{t}.all", f"{t}.all"))),
        ops.scale(f"{name}.{t}_scale", t, f"{t}.scaled", SCORES),
    )


def _attention(m: ModelSpec, name: str = "attention.self") -> tuple[Op, ...]:
    summed = ops.view(f"{name}.sum", "c2p.score", "score", SCORES)._replace(reads=("c2p.score", "p2c.scaled"))
    return (
        *(
            op
            for t, layer in (("q", "query_proj"), ("k", "key_proj"), ("v", "value_proj"))
            for op in (
                ops.linear(f"{name}.{layer}", "x", f"{t}0", "a d", "h", "attention", bias=True),
                ops.copy(f"{name}.{t}_contiguous", f"{t}0", t, QUERIES),
            )
        ),
        ops.scale(f"{name}.key_scale", "k", "k.scaled", QUERIES),
        _bmm(f"{name}.scores", "q", "k.scaled", "content", SCORES),
        ops.release_names("k.scaled"),
        *dropped(f"{name}.pos_dropout", "rel", "rel.dropped", "spans h", drops(m, "hidden_dropout_prob")),
        *_of_distances(name, "query_proj", "pos.q"),
        *_of_distances(name, "key_proj", "pos.k"),
        *_scores(name, "c2p", "q", "pos.k"),
        ops.add_number(f"{name}.start", "c2p.scaled", "c2p.score", SCORES),
        *_scores(name, "p2c", "k", "pos.q"),
        summed,
        ops.release_names("pos.q", "pos.k", *(f"{t}{part}" for t in ("c2p", "p2c") for part in ("", ".index"))),
        ops.add(f"{name}.add", "content", "score", "scores", SCORES),
        Op(f"{name}.mask", ("mask",), (Tensor("kept", "b s s", "bool"),), gradient="none"),
        Op(f"{name}.not", ("kept",), (Tensor("left out", "b s s", "bool"),), gradient="none"),
        ops.with_constant(f"{name}.masked_fill", "scores", "left out", "filled", SCORES, "masked_fill"),
        *ops.softmax(f"{name}.softmax", "filled", "probs.whole", SCORES),
        *dropped(f"{name}.dropout", "probs.whole", "probs", SCORES, drops(m, "attention_probs_dropout_prob")),
        _bmm(f"{name}.product", "probs", "v", "heads", QUERIES),
        ops.copy(f"{name}.contiguous", "heads", "o", QUERIES),
        ops.release_names("q", "k", "v", "rel.dropped", "c2p.score", "score", "kept", "filled", "probs"),
    )


def _block(m: ModelSpec, body: str) -> Block:
    return Block(f"{body}encoder.layer", (*_attention(m), *after_attention(m), _returned("y")))


def _returned(y: str) -> Op:
    """Hold y until the model without its head returns, whose encoder returns it among its hidden states."""
    return Op("hidden_states", (y,), (Tensor(f"{y}.state", "b s h"),), view=True, holds="states")


def _head(m: ModelSpec, body: str) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    drop = drops(m, "hidden_dropout_prob" if m.config.get("cls_dropout") is None else "cls_dropout")
    match m.objective:
        case "masked_lm":
            return predictions(m, body), language_model_loss()
        case "token_classification":
            drop = drops(m, "hidden_dropout_prob")
            return (
                *dropped("dropout", "x", "dropped", "b s h", drop),
                dense("classifier", "dropped", "logits", "c", "h", tokens=True),
                ops.release_names("dropped"),
            ), class_loss(m, "b s c")
        case "sequence_classification":
            act = m.get("pooler_hidden_act", "gelu")
            if act != m.hidden_act:
                raise UnsupportedModelError(f"pooler_hidden_act: {act!r} is not supported yet", "pooler_hidden_act")
            return (
                first_token("pooler.first", "x", "first"),
                *dropped("pooler.dropout", "first", "first.dropped", "b h", drops(m, "pooler_dropout")),
                dense("pooler.dense", "first.dropped", "pooled.dense", "h", "h"),
                *activation(m, "pooler.activation", "pooled.dense", "pooled", "b h"),
                ops.release_names("first.dropped"),
                *dropped("dropout", "pooled", "out", "b h", drop),
                dense("classifier", "out", "logits", "c", "h"),
                ops.release_names("out"),
            ), class_loss(m)
        case _:
            return (), mean_loss("x")


BUILDERS = {"deberta-v2": deberta}
