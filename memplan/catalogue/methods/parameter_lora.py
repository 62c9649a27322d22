"""peft's LoRA on parameters that are not linear layers: stacked expert matrices, and routers.

A stack is folded: `W + scaling * B A` is computed for all experts whenever the module runs and lives until it returns;
autograd keeps it for backward if the activations require a gradient. A stack that stands for two linear layers has
twice the rank. A router's product B A is computed and added to its weight.
Source: peft 0.21 tuners/lora/layer.py ParamWrapper, utils/transformers_weight_conversion.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from memplan.catalogue.kernels import ops
from memplan.catalogue.quantization.quantization import dequantise
from memplan.core.ir import Keep, Op, Scratch, Tensor, Weight

_SOURCE = "peft 0.21 tuners/lora/layer.py ParamWrapper"


def represented_layers(operations: Iterable[Op]) -> frozenset[str]:
    """Names of the linear layers that parameters stand for. peft adapts no real linear layer of such a name."""
    return frozenset(name for op in operations if (w := parameter(op)) is not None for name in w.stands_for)


def parameter(op: Op) -> Weight | None:
    """The operation's parameter that peft can adapt, if any. A linear layer is one only if it is not quantised."""
    return next((w for w in op.weights if w.stands_for and not (w.matrix and w.stored)), None)


def adapt_parameters(operations: tuple[Op, ...], takes: Callable[[Weight], bool], dtype: str) -> tuple[Op, ...]:
    """Return the operations with adapters, in `dtype`, on the parameters that `takes` accepts.

    A and B of a module's stacks are cast when the module begins, the last stack's first. The casts and the folded
    weights live until the module returns.
    """
    adapted = {op.name: w for op in operations if (w := parameter(op)) is not None and takes(w)}
    modules: dict[str, list[Weight]] = {}
    for name, w in adapted.items():
        if w.stacked:
            modules.setdefault(name.rpartition(".")[0], []).append(w)
    entered, out = set[str](), list[Op]()
    for op in operations:
        module = op.name.rpartition(".")[0]
        stacks = modules.get(module, [])
        if stacks and module not in entered:
            entered.add(module)
            out += [op for w in reversed(stacks) for op in _entered(w, dtype)]
        if op.name in adapted:
            w = adapted[op.name]
            adapter = (_fold(w, dtype),) if w.stacked else tuple(_add(w._replace(matrix=False), dtype))
            out += (*adapter, _with_tensor_for_weight(op, w, adapter[-1].writes[0].name))
        elif op.name == f"{module}.return":
            entries = (t.name for w in stacks for entry in _entered(w, dtype) for t in entry.writes)
            out.append(op._replace(reads=(*op.reads, *(f"{w.name}.folded" for w in stacks), *entries)))
        else:
            out.append(op)
    return tuple(out)


def with_dequantised_stacks(operations: tuple[Op, ...]) -> tuple[Op, ...]:
    """Return the operations with stacks dequantised as soon as their module reads them.

    The dequantised stack lives until the module returns, or until an adapter is folded into it.
    Source: bitsandbytes 0.50 nn/parametrize.py Bnb4bitParametrization, _register_parametrization_hooks.
    """
    unread = {w.name: w for op in operations for w in op.weights if w.stacked and w.stored}
    live: list[str] = []
    out: list[Op] = []
    for op in operations:
        if op.gradient == "none":
            out.append(op)
            continue
        for w in [w for w in unread.values() if w in op.weights or (op.reads and op.name.startswith(f"{w.name}."))]:
            del unread[w.name]
            live.append(f"{w.name}.dequantised")
            out.append(dequantise(w, f"{w.name}.dequantise", live[-1], w.shape))
        w = next((w for w in op.weights if w.stacked and w.stored), None)
        returned = live if op.name.endswith(".return") else ()
        out.append(
            _with_tensor_for_weight(op, w, f"{w.name}.dequantised")
            if w is not None
            else op._replace(reads=(*op.reads, *returned))
        )
        if op.product == "fold" and live:
            out.append(ops.release_names(live.pop()))
    return tuple(out)


def _with_tensor_for_weight(op: Op, w: Weight, name: str) -> Op:
    """The operation reading the tensor `name` instead of the weight."""
    keeps = tuple(
        k._replace(what=name if k.what == w.name else k.what, of=name if k.of == w.name else k.of) for k in op.keeps
    )
    return op._replace(reads=(*op.reads, name), weights=tuple(v for v in op.weights if v is not w), keeps=keeps)


def _matrices(w: Weight, dtype: str) -> tuple[Weight, Weight]:
    """The adapter's A and B. For a stack they hold the rows and columns of all experts."""
    axes = w.shape.split()
    out, into = axes[: w.rows], axes[w.rows :]
    ranks = ["r", *([str(len(w.stands_for))] if len(w.stands_for) > 1 else [])]
    if w.stacked:
        ranks, out = [axes[0], *ranks], out[1:]
    a = Weight(f"{w.name}.lora_A", " ".join((*ranks, *into)), "adapter", dtype, rows=len(ranks))
    b = Weight(f"{w.name}.lora_B", " ".join((*out, *ranks)), "adapter", dtype, rows=len(out))
    return a, b


def _entered(w: Weight, dtype: str) -> tuple[Op, ...]:
    """Return the operations that begin the module of an adapted stack.

    A quantised stack is dequantised for as long as the module runs, and again to fold the adapter once as a check.
    Gradients of A and B are accumulated when the backward of all that the module runs is over.
    Source: peft 0.21 tuners/lora/layer.py ParamWrapper._activate_lora, torch 2.13 torch/nn/utils/parametrize.py
    register_parametrization.
    """
    begins = _casts(w, dtype) or (Op(f"{w.name}.lora", lends=w.name, gradient="none", source=_SOURCE),)
    if not w.stored:
        return begins
    matrix = Tensor(f"{w.name}.param", w.shape, w.dtype)
    check = Op(f"{w.name}.register", scratch=(matrix, matrix._replace(name=f"{w.name}.check")), gradient="none")
    held = dequantise(w, f"{w.name}.get_param", matrix.name, w.shape)._replace(gradient="none")
    return (held, *begins, check)


def _casts(w: Weight, dtype: str) -> tuple[Op, ...]:
    """Casts of A and B to the stack's dtype; empty if they already have it."""
    if w.dtype == dtype:
        return ()
    return tuple(
        Op(f"{v.name}.to", (), (Tensor(f"{v.name}.cast", v.shape, w.dtype),), (v,), cast=True, source=_SOURCE)
        for v in _matrices(w, dtype)
    )


def _fold(w: Weight, dtype: str) -> Op:
    """The stack plus the product B A, in one `baddbmm`."""
    both, casts = _matrices(w, dtype), _casts(w, dtype)
    inputs = [c.writes[0].name for c in casts] or [v.name for v in both]
    a, b = inputs
    return Op(
        f"{w.name}.fold",
        tuple(inputs) if casts else (),
        (Tensor(f"{w.name}.folded", w.shape, w.dtype),),
        (w, *(() if casts else both)),
        (Keep(a, b), Keep(b, a)),
        scratch_back=(Scratch(Tensor(f"product for {both[0].name}", both[0].shape, w.dtype), a),),  # B's is freed first
        product="fold",
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
        product="fold",
        source=_SOURCE,
    )
    yield ops.scale(f"{n}.scaling", f"{n}.product", f"{n}.scaled", w.shape)
    yield ops.cast(f"{n}.cast_delta", f"{n}.scaled", f"{n}.delta", w.shape, w.dtype)
    yield Op(f"{n}.add", (f"{n}.delta",), (Tensor(f"{n}.adapted", w.shape),), (w,), gradient="same")
