"""BERT with a norm before each branch and after the last layer: Megatron-BERT, RoBERTa-PreLayerNorm, XLM-RoBERTa-XL.

Source: transformers 5.24 models/megatron_bert/modeling_megatron_bert.py,
models/roberta_prelayernorm/modeling_roberta_prelayernorm.py and models/xlm_roberta_xl/modeling_xlm_roberta_xl.py.
"""

from __future__ import annotations

from functools import partial

from memplan.catalogue.decoder.frame import returned
from memplan.catalogue.families.bert import embeddings, encoder_attention, heads, inputs, projections
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.activations import activation, dropped, drops
from memplan.catalogue.kernels.rewriting import renamed
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Op, Run, Stack, Tensor
from memplan.core.records import NamedTuple
from memplan.models.model import ModelSpec


class _Row(NamedTuple):
    """The differences between the families.

    name      name of the model inside its heads' classes
    norms     names of the norms before attention, before the MLP and after the last layer
    embedded  a norm ends the embeddings
    roberta   positions are counted from the ids, and the heads are RoBERTa's
    drops     dropout ends the MLP
    written   attention is written out with a mask of its own making, and a layer returns its probabilities
    held      until when the MLP's input is referenced: its `activation`, or its end (`mlp`); else empty
    """

    name: str
    norms: tuple[str, str, str]
    embedded: bool = False
    roberta: bool = True
    drops: bool = True
    written: bool = False
    held: str = ""


def _build(m: ModelSpec, wiring: Wiring, *, row: _Row) -> Stack:
    """Build the model with the head of the run's objective."""
    wiring, given = wiring._replace(causal=False, caching=False), inputs(m, wiring.padded)
    if row.written:
        wiring = wiring._replace(backend="eager", masked="eager", padded=True)
    body = "" if m.objective == "feature_extraction" else f"{row.name}."
    head, loss = (renamed(part, {"x": "last"}) for part in heads(m, wiring, body, row.roberta))
    last = (
        *((ops.release_names("probs"),) if row.written else ()),
        ops.layer_norm(f"{body}{row.norms[2]}", "x", "last", "b s h", "h"),
    )
    block = Block(f"{body}encoder.layer", _block(m, wiring, row))
    before = embeddings(m, wiring, body, row.roberta, row.embedded)
    if row.written:
        before = tuple(map(_with_own_types, before))
    return Stack((given, *before[1:]), (Run((block,), "L"),), (*last, *head), loss)


def _with_own_types(op: Op) -> Op:
    """Megatron-BERT makes its token types for the batch, and adds positions in place."""
    match op.name:
        case "token_type_ids":
            return op._replace(reads=(), writes=(Tensor("token_type_ids", "b s", "int64"),))
        case "position_ids":
            return op._replace(weights=op.weights[:1])
        case "add_positions":
            return op._replace(view=True)
        case _:
            return op


def _block(m: ModelSpec, wiring: Wiring, row: _Row) -> tuple[Op, ...]:
    name, drop = "attention.self", drops(m, "hidden_dropout_prob")
    first, second, _ = row.norms
    return (
        ops.layer_norm(first, "x", "n1", "b s h", "h"),
        *projections(name, "n1", wiring, ("query", "key", "value")),
        *encoder_attention(m, wiring, f"{name}.attention", "attention_probs_dropout_prob"),
        ops.release_names("q", "k", "v", *(("with.mask",) if row.written else ())),
        ops.linear("attention.output.dense", "o", "ao.whole", "h", "a d", "attention", bias=True),
        *dropped("attention.output.dropout", "ao.whole", "ao", "b s h", drop),
        ops.add("attention.residual", "ao", "x", "x1", "b s h"),
        ops.release_names("ao", "o", "n1"),
        ops.layer_norm(second, "x1", "n2", "b s h", "h"),
        ops.linear("intermediate.dense", "n2", "up", "f", "h", "mlp", bias=True),
        *activation(m, "intermediate.act", "up", "act", "b s f"),
        ops.release_names("up", *(("n2",) if row.held == "activation" else ())),
        ops.linear("output.dense", "act", "mo.whole", "h", "f", "mlp", bias=True),
        *dropped("output.dropout", "mo.whole", "mo", "b s h", drop and row.drops),
        ops.add("residual", "mo", "x1", "y", "b s h"),
        ops.release_names("mo", "act", "x1", *(("n2",) if row.held == "mlp" else ()), *returned(wiring)),
    )


_ROWS = {
    "megatron-bert": _Row("bert", ("attention.ln", "ln", "encoder.ln"), roberta=False, written=True, held="mlp"),
    "roberta-prelayernorm": _Row(
        "roberta_prelayernorm", ("attention.LayerNorm", "intermediate.LayerNorm", "LayerNorm"), embedded=True
    ),
    "xlm-roberta-xl": _Row(
        "roberta", ("attention.self_attn_layer_norm", "LayerNorm", "encoder.LayerNorm"), drops=False, held="activation"
    ),
}
BUILDERS = {model_type: partial(_build, row=row) for model_type, row in _ROWS.items()}
