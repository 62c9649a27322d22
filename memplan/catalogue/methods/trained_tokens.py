"""peft's trainable tokens: some rows of the embeddings train, and are written into a copy of the table in every pass.

Source: peft 0.21.2 tuners/trainable_tokens/layer.py TrainableTokensLayer, tuners/trainable_tokens/model.py.
"""

from __future__ import annotations

from memplan.catalogue.kernels import ops
from memplan.core.ir import Keep, Op, Scratch, Stack, Tensor, Weight

_SOURCE = "peft 0.21.2 tuners/trainable_tokens/layer.py TrainableTokensLayer.get_merged_weights"


def with_trained_tokens(stack: Stack, number: int, dtype: str) -> Stack:
    """Return the stack with `number` rows of the embeddings trained in `dtype`, also in a head that is tied to them."""
    table = next(op for op in stack.before if op.reads == ("ids",) and any(w.group == "embedding" for w in op.weights))
    w = next(w for w in table.weights if w.group == "embedding")
    return stack._replace(
        before=_with_rows(stack.before, w, number, dtype), after=_with_rows(stack.after, w, number, dtype)
    )


def _with_rows(operations: tuple[Op, ...], w: Weight, number: int, dtype: str) -> tuple[Op, ...]:
    """Return the operations with every use of the table reading a copy of it with the trained rows."""
    changed: list[Op] = []
    for op in operations:
        if any(v.name == w.name for v in op.weights):
            changed += (*_copy(op.name, w, number, dtype), _reading_copy(op, w))
            changed.append(ops.release_names(f"{op.name}.merged", f"{op.name}.rows", f"{op.name}.index"))
        else:
            changed.append(op)
    return tuple(changed)


def _copy(name: str, w: Weight, number: int, dtype: str) -> tuple[Op, ...]:
    """The copy of the table: `table.index_copy(0, index, rows)`."""
    rows = f"{number} {w.shape.split(' ', 1)[1]}"
    path = w.name.rpartition(".")[0]
    trained = Weight(f"{path}.trainable_tokens_delta", rows, "adapter", dtype, rows=1)
    original = Weight(f"{path}.trainable_tokens_original", rows, "buffer", dtype, trains=False)
    index, cast = f"{name}.index", f"{name}.rows"
    return (
        Op(f"{name}.index", (), (Tensor(index, str(number), "int64"),), (original,), gradient="none", source=_SOURCE),
        Op(f"{name}.to", (), (Tensor(cast, rows, w.dtype),), (trained,), cast=True, source=_SOURCE),
        Op(
            f"{name}.base_layer",
            (cast,),
            (Tensor(f"{name}.merged", w.shape, w.dtype),),
            (w,),
            (Keep(index, cast), Keep(cast, cast)),
            source=f"{ops.DERIVATIVES}: index_copy",
        ),
    )


def _reading_copy(op: Op, w: Weight) -> Op:
    """The operation that used the table, reading the copy."""
    copy = f"{op.name}.merged"

    def new(name: str) -> str:
        return copy if name == w.name else name

    return op._replace(
        reads=(*op.reads, copy),
        writes=tuple(t._replace(dtype=f"={copy}" if t.dtype == f"={w.name}" else t.dtype) for t in op.writes),
        weights=tuple(v for v in op.weights if v.name != w.name),
        keeps=tuple(Keep(new(k.what), new(k.of)) for k in op.keeps),
        scratch_back=tuple(Scratch(s.tensor, new(s.of)) for s in op.scratch_back),
    )
