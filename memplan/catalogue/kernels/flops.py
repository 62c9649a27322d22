"""What an operation costs: the floating-point operations of its products, and the bytes that it reads and writes.

Counts are shapes, in axes: sizes are put in where a run has them. A multiply and an add are two operations. Only
products are counted in operations, as torch's own counter does (torch 2.13 utils/flop_counter.py); everything else is
bound by the bytes it moves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from memplan.core.ir import Op, Tensor, Weight


class Points(NamedTuple):
    """`operations` at every point of `shape`."""

    shape: str
    operations: int


class Moved(NamedTuple):
    """A tensor that is read or written `times`."""

    tensor: Tensor
    times: int = 1


# Products of one kernel of attention, each of them 2 operations at every point of queries, keys and width: forward two,
# scores and outputs; backward five, because the scores are made again before the gradients of v, of the probabilities,
# of q and of k. Source: arXiv:2205.14135, algorithms 1 and 4; torch 2.13 utils/flop_counter.py, sdpa_backward.
_FORWARD, _BACKWARD = 2, 5
ATTENTION = ("attention", "whole attention")


def attends(op: Op) -> bool:
    """Whether it is both products of attention in one kernel."""
    return op.product.partition(" over ")[0] in ATTENTION


def causal_half(op: Op) -> bool:
    """Whether a kernel of attention leaves out what the causal mask hides, half of every product.

    Flash attention and the memory-efficient kernel do, tile by tile, where they are told `is_causal`; given a mask as a
    tensor they do not, and a plain product of q and k never does. torch's counter counts the whole. What else flash
    attention 2 leaves out, beyond a sliding window, is not taken off.
    Source: torch 2.13 aten/src/ATen/native/transformers/cuda/flash_attn/src/flash_fwd_kernel.h (n_block_max),
    mem_eff_attention/kernel_forward.h (num_keys).
    """
    return op.product == "attention" and len(op.reads) == 3


def computes_in(op: Op, backward: bool = False) -> str:
    """The dtype that an operation's products are computed in; LLM.int8's backward makes the matrix whole again."""
    if not backward and any(t.dtype == "int8" for w in op.weights for t in w.stored):
        return "int8"
    out = op.writes[0]
    if out.shape:
        return out.dtype
    return next((t.dtype for t in op.scratch if t.dtype in ("bf16", "fp16")), out.dtype)


_MATRICES = ("matrix", "grouped", "fold")


def forward(op: Op, tensors: Mapping[str, Tensor]) -> Iterator[Points]:
    """The products that an operation computes, with those of the gradients that it makes ahead of backward."""
    if attends(op):
        yield _attention(op, tensors, _FORWARD)
    elif op.product in _MATRICES:
        for product in _products(op, tensors):
            yield Points(product.shape, 2 * (1 + len(_ahead(op))))


def backward(op: Op, tensors: Mapping[str, Tensor], target: Tensor) -> Iterator[Points]:
    """The products that the gradient of `target` takes: each that it is a factor of, once more.

    One kernel of attention makes all of its gradients: they are counted as that of the first read. In LoRA as one
    function the product with A is made again for the gradient of B.
    """
    if attends(op):
        if target.name == op.reads[0]:
            yield _attention(op, tensors, _BACKWARD)
    elif op.product in _MATRICES and target.name not in _ahead(op):
        several = _products(op, tensors)
        for before, product in zip((None, *several), several, strict=False):
            if _is_factor(op, product, target):
                yield Points(product.shape, 2)
            if before and before.is_adapter and product.name == target.name and len(several) > len(op.writes):
                yield Points(before.shape, 2)


def forward_bytes(op: Op, tensors: Mapping[str, Tensor]) -> tuple[list[Moved], list[Moved]]:
    """What an operation itself reads and writes, and what it moves beside that: its scratch, and quantised storage."""
    beside = [Moved(t, 2) for t in op.scratch]
    if not op.writes or (op.view and not op.keeps):
        return [], beside
    own = [Moved(tensors[r]) for r in dict.fromkeys(op.reads)]
    for w in _used(op):
        if w.stored:
            beside += [Moved(t) for t in w.stored]
        if op.product or not (w.stored or w.rows):  # of a table only the rows looked up are read: what is written
            own.append(Moved(tensors[w.name]))
    return own + [Moved(t) for t in op.writes], beside


def backward_bytes(
    op: Op, tensors: Mapping[str, Tensor], of: Sequence[Tensor], target: Tensor
) -> tuple[list[Moved], list[Moved]]:
    """The same for the gradient of `target`, from those `of` the outputs, but for what `scratch_back` counts."""
    kept = [tensors[name] for name in dict.fromkeys(k.what for k in op.keeps if k.of == target.name)]
    if attends(op) and target.name != op.reads[0]:
        return [Moved(target)], []
    alike = (of[0].shape, of[0].dtype) == (target.shape, target.dtype)
    if op.gradient == "same" and not kept and (op.view or alike):
        return [], []  # the incoming gradient itself
    if op.product == "matrix":
        if target.name in _ahead(op):
            return [], []
        kept += [tensors[w.name] for w in _used(op) if w.stored and target.name in op.reads]
    beside = [Moved(s.tensor, 2) for s in op.scratch_back if s.of == target.name]
    return [*map(Moved, (*of, *kept, target))], beside


def scratch_back(op: Op, targets: Sequence[str]) -> Iterator[Moved]:
    """What an operation's backward moves beside its gradients, whichever of them it makes."""
    yield from (Moved(s.tensor, 2) for s in op.scratch_back if not s.of)
    if targets:
        yield from (Moved(t) for w in _used(op) for t in w.stored)


class Passes(NamedTuple):
    """How often an optimizer's step reads and writes what it works on."""

    states: int
    gradients: int
    parameters: int
    source: str


# One kernel reads gradient, states and parameter and writes the last two.
AT_ONCE = Passes(2, 1, 2, "torch 2.13 aten/src/ATen/native/cuda/fused_adam_utils.cuh; assumed of other steps")
# One kernel a line: lerp (exp_avg 3 with addcdiv), mul, addcmul and sqrt (exp_avg_sq 5), and 6 of the list between
# them: 14 for two states.
IN_LISTS = Passes(7, 2, 2, "torch 2.13 torch/optim/adam.py _multi_tensor_adam; assumed of other steps with lists")
CLIPPING = 3  # times every gradient: the norm reads it, scaling reads and writes it. torch 2.13 nn/utils/clip_grad.py
UNSCALING = 2  # torch 2.13 amp/grad_scaler.py _unscale_grads_
ADDING = 3  # two tensors read and one written, where gradients add up


class _Product(NamedTuple):
    """The points that a `matrix` operation multiplies at, and its matrix if that is a weight."""

    shape: str
    matrix: Weight | None

    @property
    def name(self) -> str:
        return self.matrix.name if self.matrix else ""

    @property
    def is_adapter(self) -> bool:
        return self.matrix is not None and self.matrix.group == "adapter"


def _attention(op: Op, tensors: Mapping[str, Tensor], products: int) -> Points:
    """`b s a d` queries against as many keys, or as many as the product says."""
    keys = op.product.partition(" over ")[2] or "s"
    return Points(f"{tensors[op.reads[0]].shape} {keys}", products * 2 // (2 if causal_half(op) else 1))


def _products(op: Op, tensors: Mapping[str, Tensor]) -> list[_Product]:
    matrices = [w for w in _used(op) if w.rows]
    if op.product == "grouped":
        return [_Product(_joined(tensors[op.reads[0]].shape, op.writes[0].shape), next(iter(matrices), None))]
    if op.product == "fold":
        adapters = (w.shape for w in matrices if w.group == "adapter")
        return [_Product(_joined(*(tensors[r].shape for r in op.reads), *adapters), None)]
    if not matrices:
        return [_Product(_joined(*(tensors[r].shape for r in op.reads), op.writes[0].shape), None)]
    if len(op.writes) == len(matrices) > 1:  # each matrix has an output of its own
        return [_Product(f"{t.shape} {_columns(w)}", w) for t, w in zip(op.writes, matrices, strict=True)]
    width = len(matrices[0].shape.split()) - matrices[0].rows
    rows = " ".join(tensors[op.reads[0]].shape.split()[:-width])
    return [_Product(f"{rows} {_matrix(w)}", w) for w in matrices]


def _joined(*shapes: str) -> str:
    """Every axis that one of the shapes has."""
    axes: Counter[str] = Counter()
    for shape in shapes:
        axes |= Counter(shape.split())
    return " ".join(axes.elements())


def _matrix(w: Weight) -> str:
    """The axes of one matrix of a weight, of several that follow each other that of the one chosen."""
    return w.shape.partition(" ")[2] if w.chosen else w.shape


def _is_factor(op: Op, product: _Product, target: Tensor) -> bool:
    """Whether the target is what a product multiplies: its matrix, or a read, but for a bias that autocast has cast."""
    if op.product == "fold":
        return target.name in op.reads or any(w.name == target.name and w.group == "adapter" for w in op.weights)
    if target.name in op.reads:
        return not op.writes[0].shape.endswith(f" {target.shape}")
    return target.name == product.name


def _columns(w: Weight) -> str:
    return " ".join(w.shape.split()[w.rows :])


def _used(op: Op) -> list[Weight]:
    """The weights that take part: no buffer, and the trained copy of a module instead of the module's own."""
    names = {w.name for w in op.weights}
    return [w for w in op.weights if w.group != "buffer" and f"{w.name}.saved" not in names]


def _ahead(op: Op) -> set[str]:
    """Whose gradients a product makes in its forward pass already."""
    made = {t.name for t in op.writes}
    return {k.of for k in op.keeps if k.becomes and k.what in made}
