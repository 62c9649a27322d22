"""A decoder as one row, which says what its code does otherwise than the plainest one, and the function that builds it.

The plainest decoder has RMSNorms before both branches, no biases, rotary positions and a gated MLP: Llama's first code.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from memplan.catalogue.attention.attention import attention
from memplan.catalogue.decoder.attention import Attend, Rotation, llama_attention, rope
from memplan.catalogue.decoder.frame import (
    PRE_NORM,
    Branch,
    Norm,
    Ops,
    after,
    before,
    decoder_block,
    local,
    returned,
    rotary_tables,
    runs,
    table_names,
)
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.activations import drops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Stack
from memplan.core.records import NamedTuple
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

Flag = bool | str  # whether, or the key of the config that says so; a missing key is false
Attention = Callable[[ModelSpec, Wiring, Layer], Ops]


class Decoder(NamedTuple):
    """A family's decoder, by what differs from the plainest one. Shapes are `b s h`, of heads `b s a d` and `b s k d`.

    Attention, from `n1` to `ao`

    bias         biases of the projections to q, k and v; or the names of those with one
    out_bias     bias of the output projection
    qk_norm      RMSNorm of q and k before they are rotated: of `each` head, or of `all` heads together
    rotate       `rotate(m, name, q, k)` makes `q` and `k`, rotated
    attend       attends with q, k and v, with the arguments of `attention`
    attention    the attention as a whole, if its projections are fused or otherwise unlike Llama's

    MLP, from `n2` to `mo`

    mlp          `mlp(x, y, bias=)` makes y from x
    mlp_bias     biases of its projections
    experts      the MLP of layers with experts

    Block

    norm         every norm over the hidden axis
    norms        names of the norms before and after attention, and before and after the MLP; empty for none
    parallel     attention and MLP read one norm's output, and both are added to the input
    branch       changes each branch before it is added; None if the config does not ask for it
    held         tensors that the block's function references to its end

    Around the blocks

    embedded     the operations that look up and scale embeddings, up to `embeds`
    table_dtype  dtype of the rotary table, if not the embeddings'
    local_table  layers with a sliding window have their own rotary table
    masks        kinds of layers whose mask is made even if no layer has it: without and with a sliding window
    head_bias    bias of the output projection to the vocabulary
    logits       changes the operations after the last block, which end with that projection
    """

    bias: Flag | tuple[str, ...] = False
    out_bias: Flag = False
    qk_norm: str = ""
    rotate: Rotation = rope
    attend: Attend = attention
    attention: Attention | None = None
    mlp: Callable[..., Ops] = gated_mlp
    mlp_bias: Flag = False
    experts: Callable[[ModelSpec], Ops] | None = None
    norm: Norm = ops.rms_norm
    norms: tuple[str, str, str, str] = PRE_NORM
    parallel: Flag = False
    branch: Callable[[ModelSpec], Branch | None] | None = None
    held: tuple[str, ...] = ()
    embedded: Ops = ()
    table_dtype: str = ""
    local_table: bool = False
    masks: tuple[bool, ...] = ()
    head_bias: Flag = False
    logits: Callable[[Ops], Ops] | None = None


def decoder(m: ModelSpec, wiring: Wiring, row: Decoder) -> Stack:
    """Return the stack of the decoder that `row` describes."""
    kinds = tuple(sorted({*(layer.sliding for layer in m.layers), *row.masks}))
    has_local_table = row.local_table and any(layer.sliding for layer in m.layers)
    experts = row.experts(m) if row.experts else ()
    branch = row.branch(m) if row.branch else None
    held, mlp_bias, parallel = returned(wiring), _is_set(m, row.mlp_bias), _is_set(m, row.parallel)

    def block(layer: Layer) -> Block:
        heads = row.attention(m, wiring, layer) if row.attention else _attention(m, wiring, row, layer)
        x = "n1" if parallel else "n2" if row.norms[2] else "x1"
        mlp = experts if layer.ffn == "experts" else row.mlp(x, "mo", bias=mlp_bias)
        if parallel:
            return _parallel_block(row, heads, mlp, held)
        sequential = decoder_block(
            heads, mlp, norm=row.norm, norms=row.norms, branch=branch, held=held, first_held=row.held
        )
        return local(sequential) if row.local_table and layer.sliding else sequential

    table = table_names(has_local_table)
    last = after(m, wiring, kinds, norm=row.norm, bias=_is_set(m, row.head_bias), table=table)
    return Stack(
        before(wiring, kinds, embedded=row.embedded, table=rotary_tables(has_local_table, row.table_dtype)),
        runs(m, block),
        row.logits(last) if row.logits else last,
    )


def stack_of(m: ModelSpec, wiring: Wiring, module: str, model_type: str) -> Stack:
    """Return the stack that a module of `memplan.catalogue.families` builds for this model_type."""
    row: Decoder | Callable[[ModelSpec, Wiring], Stack]
    row = import_module(f"memplan.catalogue.families.{module}").BUILDERS[model_type]
    return decoder(m, wiring, row) if isinstance(row, Decoder) else row(m, wiring)


def _is_set(m: ModelSpec, flag: Flag) -> bool:
    return m.get(flag, False) if isinstance(flag, str) else flag


def _attention(m: ModelSpec, wiring: Wiring, row: Decoder, layer: Layer) -> Ops:
    return llama_attention(
        m,
        wiring,
        "n1" if row.norms[0] else "x",
        "ao",
        bias=row.bias if isinstance(row.bias, tuple) else _is_set(m, row.bias),
        out_bias=_is_set(m, row.out_bias),
        qk_norm=row.qk_norm,
        rotary=layer.rotary,
        sliding=layer.sliding,
        rotate=row.rotate,
        attend=row.attend,
    )


def _parallel_block(row: Decoder, heads: Ops, mlp: Ops, held: tuple[str, ...]) -> Block:
    """Return a block whose attention and MLP read `n1`."""
    return Block(
        "model.layers",
        (
            *row.norm(row.norms[0], "x", "n1", "b s h", "h"),
            *heads,
            *mlp,
            ops.add("residual_1", "x", "ao", "x1", "b s h"),
            ops.add("residual_2", "x1", "mo", "y", "b s h"),
            ops.release_names(*row.held, "positions", *held),
        ),
    )


def branch_dropout(key: str, module: str) -> Callable[[ModelSpec], Branch | None]:
    """Return the `branch` of a decoder with dropout at the end of each branch, if the config's `key` is above 0."""

    def branch(m: ModelSpec) -> Branch | None:
        return (lambda name, x, y: (ops.dropout(f"{name}.{module}", x, y, "b s h"),)) if drops(m, key) else None

    return branch
