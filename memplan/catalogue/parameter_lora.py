"""peft's LoRA on parameters that are no linear layers: stacks of experts' matrices, and routers.

A stack is folded: `W + scaling * B A` is made whole, for all experts, whenever the module runs, and stays until it
returns; where activations ask for a gradient autograd keeps it for backward. The rank is one for each of the linear
layers that the stack stands for. A router's product B A is made and added.
Source: peft 0.21 tuners/lora/layer.py ParamWrapper, utils/transformers_weight_conversion.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from memplan.catalogue import ops
from memplan.ir import Keep, Op, Scratch, Tensor, Weight

_SOURCE = "peft 0.21 tuners/lora/layer.py ParamWrapper"


def standing(operations: Iterable[Op]) -> frozenset[str]:
    """The names of linear layers that parameters stand for: peft adapts no linear layer that is called so."""
    return frozenset(name for op in operations for w in op.weights for name in w.stands_for)


def parameter(op: Op) -> Weight | None:
    """The parameter of the operation that peft adapts, if there is one."""
    return next((w for w in op.weights if w.stands_for and not w.matrix), None)


def adapt_parameters(operations: tuple[Op, ...], takes: Callable[[Weight], bool], dtype: str) -> tuple[Op, ...]:
    """The operations with adapters, in `dtype`, on those parameters that `takes` says yes to."""
    folded: dict[str, list[str]] = {}
    out: list[Op] = []
    for op in operations:
        w = parameter(op)
        if w is None or not takes(w):
            module = op.name.removesuffix(".return")
            held = folded.get(module, ()) if module != op.name else ()
            out.append(op._replace(reads=(*op.reads, *held)))
            continue
        made = tuple(_fold(w, dtype) if w.stacked else _add(w, dtype))
        for t in made[-1].writes if w.stacked else ():
            folded.setdefault(op.name.rpartition(".")[0], []).append(t.name)
        out += (*made, _reading(op, w, made[-1].writes[0].name))
    return tuple(out)


def _reading(op: Op, w: Weight, name: str) -> Op:
    """The operation with the tensor `name` instead of the weight."""
    keeps = tuple(
        Keep(name if k.what == w.name else k.what, name if k.of == w.name else k.of, k.becomes) for k in op.keeps
    )
    return op._replace(reads=(*op.reads, name), weights=tuple(v for v in op.weights if v is not w), keeps=keeps)


def _matrices(w: Weight, dtype: str) -> tuple[Weight, Weight]:
    """A and B; those of a stack hold the rows and columns of all experts."""
    axes = w.shape.split()
    out, into = axes[: w.rows], axes[w.rows :]
    ranks = ["r", *([str(len(w.stands_for))] if len(w.stands_for) > 1 else [])]
    if w.stacked:
        ranks, out = [axes[0], *ranks], out[1:]
    a = Weight(f"{w.name}.lora_A", " ".join((*ranks, *into)), "adapter", dtype, rows=len(ranks))
    b = Weight(f"{w.name}.lora_B", " ".join((*out, *ranks)), "adapter", dtype, rows=len(out))
    return a, b


def _fold(w: Weight, dtype: str) -> Iterator[Op]:
    """One product added to the stack; A and B are cast to its dtype first."""
    a, b = _matrices(w, dtype)
    cast = tuple(Tensor(f"{v.name}.cast", v.shape, w.dtype) for v in (a, b)) if w.dtype != dtype else ()
    seen_a, seen_b = (t.name for t in cast) if cast else (a.name, b.name)
    yield Op(
        f"{w.name}.fold",
        (),
        (Tensor(f"{w.name}.folded", w.shape, w.dtype), *cast),
        (w, a, b),
        (Keep(seen_a, b.name), Keep(seen_b, a.name)),
        scratch_back=tuple(Scratch(Tensor(f"product for {v.name}", v.shape, w.dtype), v.name) for v in (a, b)),
        source=f"{_SOURCE}, torch 2.13 tools/autograd/derivatives.yaml: baddbmm",
    )


def _add(w: Weight, dtype: str) -> Iterator[Op]:
    a, b = _matrices(w, dtype)
    n = w.name
    yield Op(
        f"{n}.lora",
        (),
        (Tensor(f"{n}.product", w.shape),),
        (a, b),
        (Keep(a.name, b.name), Keep(b.name, a.name)),
        autocast="lower",
        product="matrix",
        source=_SOURCE,
    )
    yield ops.scale(f"{n}.scaling", f"{n}.product", f"{n}.scaled", w.shape)
    yield ops.cast(f"{n}.cast_delta", f"{n}.scaled", f"{n}.delta", w.shape, w.dtype)
    yield Op(f"{n}.add", (f"{n}.delta",), (Tensor(f"{n}.adapted", w.shape),), (w,), gradient="same")
