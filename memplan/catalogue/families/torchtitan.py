"""torchtitan's own Llama: one projection for q, k and v, rotation of complex numbers in fp32, norms of one kernel.

Its tensor parallelism divides heads, the FFN's width and the vocabulary; with sequence parallelism a rank has a part of
the tokens (`s_tp`) between a block's matrices, and what is gathered for them is kept for the backward pass.

Source: torchtitan 0.3.0 models/llama3/, models/common/.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.attention.attention import attention as kernel
from memplan.catalogue.decoder.frame import inputs, lm_head
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import matrix, rewrite
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Run, Scratch, Stack, Tensor, Weight
from memplan.models.model import ModelSpec

KINDS = ("llama",)

_SOURCE = "torchtitan 0.3.0 models/common"
_ALL, _PART, _Q, _K = "b s h", "b s_tp h", "b s a d", "b s k d"
_GATHERED = {"attention_norm": "n1", "ffn_norm": "n2", "norm": "n"}  # what is gathered for matrices, by the norm's name
_ROWS = ("wo", "w2")


def build(m: ModelSpec, wiring: Wiring) -> Stack:
    """The model as torchtitan has it. Every layer has the table of its rotation, for so many positions as are asked."""
    positions = Op(
        "positions", (), (Tensor("positions", "b s", "int64"),), holds="step", source="torchtitan 0.3.0 trainer.py"
    )
    tables = Op("rope.cache", (), (Tensor("cache", "L s d", "fp32"),), holds="step", source=f"{_SOURCE}/rope.py")
    tied = "tok_embeddings.weight" if m.tie_word_embeddings else ""
    return Stack(
        (inputs(False), positions, tables, ops.embedding("tok_embeddings", "ids", "embeds", "v", "h")),
        (Run((_block(m, wiring),), "L"),),
        (_norm("norm", "x", "n"), ops.leave("x"), lm_head("n", tied)),
    )


def _block(m: ModelSpec, wiring: Wiring) -> Block:
    return Block(
        "layers",
        (
            _norm("attention_norm", "x", "n1"),
            *_attention(m, wiring, "n1", "ao"),
            ops.add("residual_1", "x", "ao", "x1", _ALL),
            ops.leave("ao"),
            _norm("ffn_norm", "x1", "n2"),
            *_ffn("n2", "mo"),
            ops.add("residual_2", "x1", "mo", "y", _ALL),
            ops.leave("mo"),
        ),
        whole=True,  # distributed/activation_checkpoint.py FullAC: early_stop is off
    )


def _norm(name: str, x: str, y: str) -> Op:
    """`nn.RMSNorm`, one kernel: keeps x and an fp32 number a row."""
    w, rstd = Weight(f"{name}.weight", "h", "norm"), Tensor(f"{y}.rstd", "b s", "fp32")
    kept = (x, rstd.name, w.name)
    return Op(
        name,
        (x,),
        (Tensor(y, _ALL, f"={x}"), rstd),
        (w,),
        (*(Keep(what, x) for what in kept), *(Keep(what, w.name) for what in kept[:2])),
        source=f"{ops.DERIVATIVES}: _fused_rms_norm",
    )


def _attention(m: ModelSpec, wiring: Wiring, x: str, y: str) -> tuple[Op, ...]:
    """The parts of the projection are copied out of it."""
    n = "attention"
    parts = (Tensor("q0", _Q), Tensor("k0", _K), Tensor("v0", _K))
    grouped = m.num_key_value_heads != m.num_attention_heads
    return (
        ops.linear(f"{n}.qkv_linear.wqkv", x, "qkv", "qkv", "h", "attention"),
        ops.split(f"{n}.qkv_linear.split", "qkv", parts),
        *(
            ops.copy(f"{n}.qkv_linear.copy_{t[0]}", t, f"{t[0]}1" if t != "v0" else "v", _Q if t == "q0" else _K)
            for t in ("q0", "k0", "v0")
        ),
        ops.leave("qkv", "q0", "k0", "v0"),
        *_rope(f"{n}.rope"),
        *kernel(f"{n}.inner_attention", "q", "k", "v", "o", wiring, grouped),
        ops.linear(f"{n}.wo", "o", y, "h", "a d", "attention"),
        ops.leave("q", "k", "v", "o"),
    )


def _rope(n: str) -> Iterator[Op]:
    """q and k as complex numbers in fp32, times the rows of the table that the positions ask for."""
    source = f"{_SOURCE}/rope.py ComplexRoPE"
    yield Op(f"{n}.rows", ("positions",), (Tensor("rows", "b s d", "fp32"),), source=source)
    for t, shape in (("q", _Q), ("k", _K)):
        yield ops.cast(f"{n}.float_{t}", f"{t}1", f"{t}.complex", shape, "fp32")
    for t, shape in (("q", _Q), ("k", _K)):
        yield Op(
            f"{n}.turn_{t}",
            (f"{t}.complex", "rows"),
            (Tensor(f"{t}.turned", shape, "fp32"),),
            (),
            (Keep("rows", f"{t}.complex"),),
            scratch_back=(Scratch(Tensor("conjugate rows", "b s d", "fp32")),),
            source=source,
        )
    for t, shape in (("q", _Q), ("k", _K)):
        yield ops.cast(f"{n}.cast_{t}", f"{t}.turned", t, shape, f"={t}1")
    yield ops.leave(*(f"{t}{of}" for t in "qk" for of in ("1", ".complex", ".turned")), "rows")


def _ffn(x: str, y: str) -> tuple[Op, ...]:
    n = "feed_forward"
    return (
        ops.linear(f"{n}.w1", x, "gate", "f", "h", "mlp"),
        ops.activation(f"{n}.silu", "gate", "act", "b s f"),
        ops.linear(f"{n}.w3", x, "up", "f", "h", "mlp"),
        ops.mul(f"{n}.product", "act", "up", "product", "b s f"),
        ops.linear(f"{n}.w2", "product", y, "h", "f", "mlp"),
        ops.leave("gate", "act", "up", "product"),
    )


# Tensor and sequence parallelism.


def divide(stack: Stack, sequence: bool) -> Stack:
    """The rank's operations of a stack that was built of the rank's part of the model."""

    def change(op: Op) -> Iterator[Op]:
        name = op.name.rpartition(".")[2]
        if op.name == "tok_embeddings":
            yield from _looked_up(op, sequence)
        elif name in _GATHERED:
            yield from _gathered(op, sequence)
        elif matrix(op) and name in _ROWS:
            yield from _summed(op, sequence)
        elif sequence and op.name.startswith("residual"):
            yield op._replace(writes=tuple(t._replace(shape=_PART) for t in op.writes))
        else:
            yield op

    return rewrite(stack, change)


_PARTS = (Tensor("the ranks' parts, one after the other", _ALL),)  # that a reduce-scatter of tokens reads


def _collective(name: str, x: str, y: str, shape: str, *scratch: Tensor, back: tuple[Tensor, ...] = ()) -> Op:
    return Op(
        name,
        (x,),
        (Tensor(y, shape),),
        scratch=scratch,
        scratch_back=tuple(map(Scratch, back)),
        source="torch 2.13 distributed/_functional_collectives.py",
    )


def _gathered(op: Op, sequence: bool) -> Iterator[Op]:
    """A norm, and what matrices read of it: with the tokens divided those of all ranks, else the same, of which every
    rank makes a summand of the gradient."""
    y, rstd = op.writes
    mine = f"{y.name}.part"
    shape, rows = (_PART, "b s_tp") if sequence else (_ALL, "b s")
    keeps = tuple(k._replace(what=mine if k.what == y.name else k.what) for k in op.keeps)
    yield op._replace(writes=(y._replace(name=mine, shape=shape), rstd._replace(shape=rows)), keeps=keeps)
    if sequence:
        yield _collective(f"{op.name}.all_gather", mine, y.name, _ALL, back=_PARTS)
        yield ops.leave(mine)
    else:
        yield ops.view(f"{op.name}.input", mine, y.name, _ALL, gradient="new")


def _summed(op: Op, sequence: bool) -> Iterator[Op]:
    """All ranks' summands of the output are added up, and with the tokens divided each rank's are kept."""
    y = op.writes[0]
    summand = f"{op.name}.summand"
    yield op._replace(writes=(y._replace(name=summand),))
    kind = "reduce_scatter" if sequence else "all_reduce"
    yield _collective(f"{op.name}.{kind}", summand, y.name, _PART if sequence else _ALL, *_PARTS[:sequence])
    yield ops.leave(summand)


def _looked_up(op: Op, sequence: bool) -> Iterator[Op]:
    """Rows of other ranks' tokens are looked up anyhow, and made zero; then as after a matrix."""
    (w,), (y,) = op.weights, op.writes
    own, there = Tensor("own_ids", "b s", "int64"), Tensor("own", "b s", f"={w.name}")
    yield Op(f"{op.name}.own", ("ids",), (own,), scratch=(Tensor("others", "b s", "bool"),), gradient="none")
    yield op._replace(
        reads=(own.name,),
        writes=(y._replace(name="rows.looked_up"), there),
        keeps=tuple(k._replace(what=own.name) for k in op.keeps),
    )
    yield Op(
        f"{op.name}.mask",
        ("rows.looked_up", there.name),
        (Tensor("rows.summand", _ALL),),
        (),
        (Keep(there.name, "rows.looked_up"),),
        source=f"{_SOURCE}/embedding.py Embedding",
    )
    yield ops.leave("rows.looked_up", own.name, there.name)
    kind = "reduce_scatter" if sequence else "all_reduce"
    yield _collective(f"{op.name}.{kind}", "rows.summand", y.name, _PART if sequence else _ALL, *_PARTS[:sequence])
    yield ops.leave("rows.summand")
