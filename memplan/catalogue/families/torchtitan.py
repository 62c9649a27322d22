"""torchtitan's Llama: q, k and v in one projection, complex rotation in fp32, fused norms.

Its tensor parallelism divides heads, FFN width and vocabulary. With sequence parallelism a rank has a part of the
tokens (`s_tp`) between a block's matrices, and the gathered inputs of the matrices are kept for backward.

Source: torchtitan 0.3.0 models/llama3/, models/common/.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.attention.attention import KEYS, QUERIES
from memplan.catalogue.attention.attention import attention as kernel
from memplan.catalogue.decoder.frame import inputs, lm_head
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import matrix, rewrite
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Run, Scratch, Stack, Tensor
from memplan.models.model import ModelSpec

KINDS = ("llama",)

_SOURCE = "torchtitan 0.3.0 models/common"
_ALL, _PART = "b s h", "b s_tp h"
_GATHERED = {"attention_norm": "n1", "ffn_norm": "n2", "norm": "n"}  # norm: its output, gathered for the matrices
_ROWS = ("wo", "w2")


def build(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build the model as torchtitan has it. Every layer holds a rotation table for all positions of the sequence."""
    positions = Op(
        "positions", (), (Tensor("positions", "b s", "int64"),), holds="step", source="torchtitan 0.3.0 trainer.py"
    )
    tables = Op("rope.cache", (), (Tensor("cache", "L s d", "fp32"),), holds="step", source=f"{_SOURCE}/rope.py")
    tied = "tok_embeddings.weight" if m.tie_word_embeddings else ""
    return Stack(
        (inputs(False), positions, tables, ops.embedding("tok_embeddings", "ids", "embeds", "v", "h")),
        (Run((_block(m, wiring),), "L"),),
        (_norm("norm", "x", "n"), ops.release_names("x"), lm_head("n", tied)),
    )


def _block(m: ModelSpec, wiring: Wiring) -> Block:
    return Block(
        "layers",
        (
            _norm("attention_norm", "x", "n1"),
            *_attention(m, wiring, "n1", "ao"),
            ops.add("residual_1", "x", "ao", "x1", _ALL),
            ops.release_names("ao"),
            _norm("ffn_norm", "x1", "n2"),
            *_ffn("n2", "mo"),
            ops.add("residual_2", "x1", "mo", "y", _ALL),
            ops.release_names("mo"),
        ),
        recomputes_all=True,  # distributed/activation_checkpoint.py FullAC: early_stop is off
    )


def _norm(name: str, x: str, y: str) -> Op:
    """`nn.RMSNorm`, one kernel: keeps x and one fp32 number per row."""
    return ops.fused_rms_norm(name, x, y, _ALL, "h", f"{ops.DERIVATIVES}: _fused_rms_norm")


def _attention(m: ModelSpec, wiring: Wiring, x: str, y: str) -> tuple[Op, ...]:
    """Attention. q, k and v are copied out of the projection."""
    n = "attention"
    parts = (Tensor("q0", QUERIES), Tensor("k0", KEYS), Tensor("v0", KEYS))
    grouped = m.num_key_value_heads != m.num_attention_heads
    return (
        ops.linear(f"{n}.qkv_linear.wqkv", x, "qkv", "qkv", "h", "attention"),
        ops.split(f"{n}.qkv_linear.split", "qkv", parts),
        *(
            ops.copy(f"{n}.qkv_linear.copy_{t[0]}", t, f"{t[0]}1" if t != "v0" else "v", QUERIES if t == "q0" else KEYS)
            for t in ("q0", "k0", "v0")
        ),
        ops.release_names("qkv", "q0", "k0", "v0"),
        *_rope(f"{n}.rope"),
        *kernel(f"{n}.inner_attention", "q", "k", "v", "o", wiring, grouped),
        ops.linear(f"{n}.wo", "o", y, "h", "a d", "attention"),
        ops.release_names("q", "k", "v", "o"),
    )


def _rope(n: str) -> Iterator[Op]:
    """q and k as complex numbers in fp32, times the table's rows for their positions."""
    source = f"{_SOURCE}/rope.py ComplexRoPE"
    yield Op(f"{n}.rows", ("positions",), (Tensor("rows", "b s d", "fp32"),), source=source)
    for t, shape in (("q", QUERIES), ("k", KEYS)):
        yield ops.cast(f"{n}.float_{t}", f"{t}1", f"{t}.complex", shape, "fp32")
    for t, shape in (("q", QUERIES), ("k", KEYS)):
        yield Op(
            f"{n}.turn_{t}",
            (f"{t}.complex", "rows"),
            (Tensor(f"{t}.turned", shape, "fp32"),),
            (),
            (Keep("rows", f"{t}.complex"),),
            scratch_back=(Scratch(Tensor("conjugate rows", "b s d", "fp32")),),
            source=source,
        )
    for t, shape in (("q", QUERIES), ("k", KEYS)):
        yield ops.cast(f"{n}.cast_{t}", f"{t}.turned", t, shape, f"={t}1")
    yield ops.release_names(*(f"{t}{of}" for t in "qk" for of in ("1", ".complex", ".turned")), "rows")


def _ffn(x: str, y: str) -> tuple[Op, ...]:
    n = "feed_forward"
    return (
        ops.linear(f"{n}.w1", x, "gate", "f", "h", "mlp"),
        ops.activation(f"{n}.silu", "gate", "act", "b s f"),
        ops.linear(f"{n}.w3", x, "up", "f", "h", "mlp"),
        ops.mul(f"{n}.product", "act", "up", "product", "b s f"),
        ops.linear(f"{n}.w2", "product", y, "h", "f", "mlp"),
        ops.release_names("gate", "act", "up", "product"),
    )


# Tensor and sequence parallelism.


def divide(stack: Stack, sequence: bool) -> Stack:
    """Return the rank's operations. `stack` must be built from the rank's part of the model."""

    def change(op: Op) -> Iterator[Op]:
        name = op.name.rpartition(".")[2]
        if op.name == "tok_embeddings":
            yield from _parallel_embedding(op, sequence)
        elif name in _GATHERED:
            yield from _gathered_norm(op, sequence)
        elif matrix(op) and name in _ROWS:
            yield from _reduced_product(op, sequence)
        elif sequence and op.name.startswith("residual"):
            yield op._replace(writes=tuple(t._replace(shape=_PART) for t in op.writes))
        else:
            yield op

    return rewrite(stack, change)


_PARTS = (Tensor("the ranks' parts, one after the other", _ALL),)  # read by a reduce-scatter of tokens


def _collective(name: str, x: str, y: str, shape: str, *scratch: Tensor, back: tuple[Tensor, ...] = ()) -> Op:
    return Op(
        name,
        (x,),
        (Tensor(y, shape),),
        scratch=scratch,
        scratch_back=tuple(map(Scratch, back)),
        source="torch 2.13 distributed/_functional_collectives.py",
    )


def _gathered_norm(op: Op, sequence: bool) -> Iterator[Op]:
    """A norm and its output as matrices read it: gathered over ranks with sequence parallelism.

    Otherwise the output is the same on all ranks, and every rank makes a summand of its gradient.
    """
    y, rstd = op.writes
    local_name = f"{y.name}.part"
    shape, rows = (_PART, "b s_tp") if sequence else (_ALL, "b s")
    keeps = tuple(k._replace(what=local_name if k.what == y.name else k.what) for k in op.keeps)
    yield op._replace(writes=(y._replace(name=local_name, shape=shape), rstd._replace(shape=rows)), keeps=keeps)
    if sequence:
        yield _collective(f"{op.name}.all_gather", local_name, y.name, _ALL, back=_PARTS)
        yield ops.release_names(local_name)
    else:
        yield ops.view(f"{op.name}.input", local_name, y.name, _ALL, gradient="new")


def _reduced_product(op: Op, sequence: bool) -> Iterator[Op]:
    """A product whose outputs are summed over ranks. With sequence parallelism each rank keeps its tokens' sums."""
    y = op.writes[0]
    summand = f"{op.name}.summand"
    yield op._replace(writes=(y._replace(name=summand),))
    kind = "reduce_scatter" if sequence else "all_reduce"
    yield _collective(f"{op.name}.{kind}", summand, y.name, _PART if sequence else _ALL, *_PARTS[:sequence])
    yield ops.release_names(summand)


def _parallel_embedding(op: Op, sequence: bool) -> Iterator[Op]:
    """Look up embeddings of a divided vocabulary. Other ranks' tokens are looked up too, set to zero, and summed."""
    (w,), (y,) = op.weights, op.writes
    local_ids, other_rows = Tensor("own_ids", "b s", "int64"), Tensor("own", "b s", f"={w.name}")
    yield Op(f"{op.name}.own", ("ids",), (local_ids,), scratch=(Tensor("others", "b s", "bool"),), gradient="none")
    yield op._replace(
        reads=(local_ids.name,),
        writes=(y._replace(name="rows.looked_up"), other_rows),
        keeps=tuple(k._replace(what=local_ids.name) for k in op.keeps),
    )
    yield Op(
        f"{op.name}.mask",
        ("rows.looked_up", other_rows.name),
        (Tensor("rows.summand", _ALL),),
        (),
        (Keep(other_rows.name, "rows.looked_up"),),
        source=f"{_SOURCE}/embedding.py Embedding",
    )
    yield ops.release_names("rows.looked_up", local_ids.name, other_rows.name)
    kind = "reduce_scatter" if sequence else "all_reduce"
    yield _collective(f"{op.name}.{kind}", "rows.summand", y.name, _PART if sequence else _ALL, *_PARTS[:sequence])
    yield ops.release_names("rows.summand")
