"""BERT with rotary positions: Nomic BERT, GTE and Jina Embeddings 3.

Source: transformers 5.24 models/nomic_bert/modeling_nomic_bert.py, models/gte/modeling_gte.py and
models/jina_embeddings_v3/modeling_jina_embeddings_v3.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from memplan.catalogue.decoder.attention import project_heads, rope
from memplan.catalogue.decoder.frame import LOCAL, masks, returned, rotary_tables
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.decoder.task_heads import mean_loss
from memplan.catalogue.families.bert import encoder_attention, heads, inputs, table
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.activations import activation, dropped, drops
from memplan.catalogue.kernels.positions import positions
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Op, Run, Stack, Tensor, Weight
from memplan.core.records import NamedTuple
from memplan.models.model import ModelSpec
from memplan.models.objectives import ENCODER


class _Row(NamedTuple):
    """The differences between the families.

    name     name of the model inside its heads' classes
    mlp      the MLP from x1 to mo
    bias     attention's projections have biases
    buffers  the embeddings hold ids of positions and token types
    roberta  objectives with RoBERTa's heads, whose base class has a pooler; others have BERT's, whose has none
    unused   what a layer gets and does not use, which checkpoints keep
    """

    name: str
    mlp: Callable[[ModelSpec], tuple[Op, ...]]
    bias: bool = True
    buffers: bool = True
    roberta: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def _build(m: ModelSpec, wiring: Wiring, *, row: _Row) -> Stack:
    """Build the model with the head of the run's objective."""
    wiring = wiring._replace(causal=False, caching=False)
    plain = m.objective == "feature_extraction"
    body = "" if plain else f"{row.name}."
    roberta = m.objective in row.roberta
    head, loss = heads(m, wiring, body, roberta)
    release = ops.release_names("positions", *LOCAL)
    if plain and not roberta:
        names = ("embeds", *(op.name for op in masks(wiring, "embeds")))
        head, loss = (ops.release_names(*names),), mean_loss("x")
    block = Block(f"{body}layers", _block(m, wiring, row))
    before = _embeddings(m, wiring, body, row.buffers)
    return Stack(before, (Run((block,), "L"),), (*head[:-1], release, head[-1]), loss)


def _embeddings(m: ModelSpec, wiring: Wiring, body: str, holds_ids: bool) -> tuple[Op, ...]:
    """Embeddings without a table of positions, masks and the rotary table."""
    n, types = f"{body}embeddings", m.config_int("type_vocab_size", 2, 0)
    longest = str(m.max_position_embeddings)
    buffers = (Weight(f"{n}.{t}", longest, "buffer", "int64", False) for t in ("position_ids", "token_type_ids"))
    ids = Op("token_type_ids", (), (Tensor("token_type_ids", "b s", "int64"),), gradient="none")
    typed = (
        ids._replace(weights=tuple(buffers) if holds_ids else ()),
        table(f"{n}.token_type_embeddings", "token_type_ids", "types", str(types), "b s"),
        ops.add("add_types", "tokens", "types", "typed", "b s h"),
        ops.release_names("tokens"),
    )
    return (
        inputs(m, wiring.padded),
        positions(),
        ops.embedding(f"{n}.word_embeddings", "ids", "tokens", "v", "h"),
        *(typed if types else (ops.view("untyped", "tokens", "typed", "b s h"),)),
        ops.layer_norm(f"{n}.LayerNorm", "typed", "normed", "b s h", "h"),
        ops.release_names("typed"),
        *dropped(f"{n}.dropout", "normed", "embeds", "b s h", drops(m, "hidden_dropout_prob")),
        ops.release_names(*(("types", "token_type_ids") if types else ())),
        *masks(wiring, "embeds"),
        *rotary_tables(),
    )


def _block(m: ModelSpec, wiring: Wiring, row: _Row) -> tuple[Op, ...]:
    drop, name = drops(m, "hidden_dropout_prob"), "self_attn"
    return (
        *project_heads(name, "x", row.bias, gradient="new"),
        *rope(m, name, "q1", "k1"),
        *encoder_attention(m, wiring, f"{name}.attention", "attention_probs_dropout_prob"),
        ops.linear(f"{name}.o_proj", "o", "ao", "h", "a d", "attention", row.bias),
        ops.release_names("q", "k", "v", "o"),
        *dropped("post_attention_dropout", "ao", "ao.kept", "b s h", drop),
        ops.add("attention.residual", "x", "ao.kept", "sum1", "b s h"),
        ops.release_names("ao.kept"),
        ops.layer_norm("post_attention_layernorm", "sum1", "x1", "b s h", "h"),
        ops.release_names("sum1"),
        *row.mlp(m),
        *dropped("post_mlp_dropout", "mo", "mo.kept", "b s h", drop),
        ops.add("residual", "x1", "mo.kept", "sum2", "b s h"),
        ops.release_names("mo", "mo.kept"),
        ops.layer_norm("post_mlp_layernorm", "sum2", "y", "b s h", "h"),
        ops.release_names("x1", "ao", *row.unused, *returned(wiring)),
    )


def _gated(_: ModelSpec) -> tuple[Op, ...]:
    return gated_mlp("x1", "mo")


def _plain(m: ModelSpec) -> tuple[Op, ...]:
    return (
        ops.linear("mlp.fc1", "x1", "up", "f", "h", "mlp", bias=True),
        *activation(m, "mlp.activation_fn", "up", "act", "b s f"),
        ops.release_names("up"),
        ops.linear("mlp.fc2", "act", "mo", "h", "f", "mlp", bias=True),
        ops.release_names("act"),
    )


def _dropping(m: ModelSpec) -> tuple[Op, ...]:
    """A gated MLP with dropout of the product."""
    *gated, _, release = _gated(m)
    return (
        *gated,
        *dropped("mlp.dropout", "product", "product.kept", "b s f", drops(m, "hidden_dropout_prob")),
        ops.linear("mlp.down_proj", "product.kept", "mo", "h", "f", "mlp", bias=True),
        release,
    )


_ROWS = {
    "gte": _Row("gte", _dropping, buffers=False, roberta=("masked_lm",)),
    "jina_embeddings_v3": _Row("roberta", _plain, roberta=ENCODER),
    "nomic_bert": _Row("nomic_bert", _gated, bias=False, unused=("positions",)),
}
BUILDERS = {model_type: partial(_build, row=row) for model_type, row in _ROWS.items()}
