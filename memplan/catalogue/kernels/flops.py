"""The cost of an operation: floating-point operations of its products, and bytes it reads and writes.

Counts are shapes by axis; sizes are filled in per run. A multiply and an add are two operations. Only products
are counted in operations, as in torch's own counter (torch 2.13 utils/flop_counter.py). Everything else is bound by the
bytes it moves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from memplan.core.ir import Op, Tensor, Weight
from memplan.core.records import NamedTuple


class Points(NamedTuple):
    """`operations` floating-point operations at every point of `shape`."""

    shape: str
    operations: int


class MemoryTraffic(NamedTuple):
    """A tensor read or written `times` times."""

    tensor: Tensor
    times: int = 1


# Matrix products in one attention kernel, 2 operations each at every point of queries, keys and width. Forward computes
# two, scores and outputs. Backward computes five: the scores again, then the gradients of v, of the probabilities, of q
# and of k. Source: arXiv:2205.14135, algorithms 1 and 4; torch 2.13 utils/flop_counter.py, sdpa_backward.
_FORWARD, _BACKWARD = 2, 5
ATTENTION = ("attention", "whole attention")


def attends(op: Op) -> bool:
    """Return whether the operation is a fused attention kernel, with both products of attention."""
    return op.product.partition(" over ")[0] in ATTENTION


def causal_half(op: Op) -> bool:
    """Return whether an attention kernel skips the half of every product that the causal mask hides.

    Flash and memory-efficient attention skip it tile by tile if `is_causal` is set, but not if they get the mask as a
    tensor. A plain product of q and k never skips it. torch's counter counts the full product. Tiles that flash
    attention 2 skips outside a sliding window are counted here.
    Source: torch 2.13 aten/src/ATen/native/transformers/cuda/flash_attn/src/flash_fwd_kernel.h (n_block_max),
    mem_eff_attention/kernel_forward.h (num_keys).
    """
    return op.product in ("attention", "attention over s_own") and len(op.reads) == 3


def computes_in(op: Op, backward: bool = False) -> str:
    """Return the dtype of an operation's products. LLM.int8 dequantises the matrix for its backward."""
    if not backward and any(t.dtype == "int8" for w in op.weights for t in w.stored):
        return "int8"
    out = op.writes[0]
    if out.shape:
        return out.dtype
    return next((t.dtype for t in op.scratch if t.dtype in ("bf16", "fp16")), out.dtype)


_MATRICES = ("matrix", "grouped", "fold")


def forward(op: Op, tensors: Mapping[str, Tensor]) -> Iterator[Points]:
    """Yield the forward products, including those of gradients that the operation computes ahead of backward."""
    if attends(op):
        yield _attention(op, tensors, _FORWARD)
    elif op.product in _MATRICES:
        for product in _products(op, tensors):
            yield Points(product.shape, 2 * (1 + len(_ahead(op))))


def backward(op: Op, tensors: Mapping[str, Tensor], target: Tensor) -> Iterator[Points]:
    """Yield the products for the gradient of `target`: each product that `target` is a factor of, once.

    A fused attention kernel computes all gradients at once, so all are counted with its first read. LoRA written as one
    function recomputes the product with A for the gradient of B.
    """
    if attends(op):
        if target.name == op.reads[0]:
            yield _attention(op, tensors, _BACKWARD)
    elif op.product in _MATRICES and target.name not in _ahead(op):
        products = _products(op, tensors)
        for previous, product in zip((None, *products), products, strict=False):
            if _is_factor(op, product, target):
                yield Points(product.shape, 2)
            if previous and previous.is_adapter and product.name == target.name and len(products) > len(op.writes):
                yield Points(previous.shape, 2)


def forward_bytes(op: Op, tensors: Mapping[str, Tensor]) -> tuple[list[MemoryTraffic], list[MemoryTraffic]]:
    """Return the tensors that an operation reads and writes, and its extra traffic: scratch and quantised storage."""
    extra = [MemoryTraffic(t, 2) for t in op.scratch]
    if not op.writes or (op.view and not op.keeps):
        return [], extra
    traffic = [MemoryTraffic(tensors[r]) for r in dict.fromkeys(op.reads)]
    for w in _used(op):
        if w.stored:
            extra += [MemoryTraffic(t) for t in w.stored]
        # An embedding reads only the looked-up rows, as many bytes as it writes.
        if op.product or not (w.stored or w.rows):
            traffic.append(MemoryTraffic(tensors[w.name]))
    return traffic + [MemoryTraffic(t) for t in op.writes], extra


def backward_bytes(
    op: Op, tensors: Mapping[str, Tensor], of: Sequence[Tensor], target: Tensor
) -> tuple[list[MemoryTraffic], list[MemoryTraffic]]:
    """Return the tensors and the extra traffic moved for the gradient of `target`, given the output gradients `of`.

    Scratch that serves all gradients is left to `scratch_back`.
    """
    kept = [tensors[name] for name in dict.fromkeys(k.what for k in op.keeps if k.of == target.name)]
    if attends(op) and target.name != op.reads[0]:
        return [MemoryTraffic(target)], []
    same_layout = (of[0].shape, of[0].dtype) == (target.shape, target.dtype)
    if op.gradient == "same" and not kept and (op.view or same_layout):
        return [], []  # the incoming gradient itself
    if op.product == "matrix":
        if target.name in _ahead(op):
            return [], []
        kept += [tensors[w.name] for w in _used(op) if w.stored and target.name in op.reads]
    extra = [MemoryTraffic(s.tensor, 2) for s in op.scratch_back if s.of == target.name]
    return [*map(MemoryTraffic, (*of, *kept, target))], extra


def scratch_back(op: Op, targets: Sequence[str]) -> Iterator[MemoryTraffic]:
    """Yield the traffic of an operation's backward that does not depend on which gradients it computes."""
    yield from (MemoryTraffic(s.tensor, 2) for s in op.scratch_back if not s.of)
    if targets:
        yield from (MemoryTraffic(t) for w in _used(op) for t in w.stored)


class Passes(NamedTuple):
    """How many times an optimizer step reads or writes its states, gradients and parameters."""

    states: int
    gradients: int
    parameters: int
    source: str


# A single kernel reads gradient, states and parameter, and writes states and parameter.
AT_ONCE = Passes(2, 1, 2, "torch 2.13 aten/src/ATen/native/cuda/fused_adam_utils.cuh; assumed of other steps")
# One kernel per line: lerp (exp_avg: 3 with addcdiv), mul, addcmul and sqrt (exp_avg_sq: 5), and 6 for the temporary
# list between them: 14 for two states.
IN_LISTS = Passes(7, 2, 2, "torch 2.13 torch/optim/adam.py _multi_tensor_adam; assumed of other steps with lists")
CLIPPING = 3  # times every gradient: the norm reads it, scaling reads and writes it. torch 2.13 nn/utils/clip_grad.py
UNSCALING = 2  # torch 2.13 amp/grad_scaler.py _unscale_grads_
ADDING = 3  # accumulating a gradient reads two tensors and writes one


class _Product(NamedTuple):
    """The points at which a `matrix` operation multiplies, and its matrix if that is a weight."""

    shape: str
    matrix: Weight | None

    @property
    def name(self) -> str:
        return self.matrix.name if self.matrix else ""

    @property
    def is_adapter(self) -> bool:
        return self.matrix is not None and self.matrix.group == "adapter"


def _attention(op: Op, tensors: Mapping[str, Tensor], products: int) -> Points:
    """Return the points of `b s a d` queries against `s` keys, or against the key axis the product names."""
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
    if len(op.writes) == len(matrices) > 1:  # each matrix has its own output
        return [_Product(f"{t.shape} {_columns(w)}", w) for t, w in zip(op.writes, matrices, strict=True)]
    width = len(matrices[0].shape.split()) - matrices[0].rows
    rows = " ".join(tensors[op.reads[0]].shape.split()[:-width])
    return [_Product(f"{rows} {_matrix(w)}", w) for w in matrices]


def _joined(*shapes: str) -> str:
    """Return every axis that at least one of the shapes has."""
    counts: Counter[str] = Counter()
    for shape in shapes:
        counts |= Counter(shape.split())
    return " ".join(counts.elements())


def _matrix(w: Weight) -> str:
    """Return the axes of one matrix of a weight: the chosen one, if the weight stacks several."""
    return w.shape.partition(" ")[2] if w.chosen else w.shape


def _is_factor(op: Op, product: _Product, target: Tensor) -> bool:
    """Return whether a product multiplies the target: its matrix or a read, but not a bias that autocast has cast."""
    if op.product == "fold":
        return target.name in op.reads or any(w.name == target.name and w.group == "adapter" for w in op.weights)
    if target.name in op.reads:
        return not op.writes[0].shape.endswith(f" {target.shape}")
    return target.name == product.name


def _columns(w: Weight) -> str:
    return " ".join(w.shape.split()[w.rows :])


def _used(op: Op) -> list[Weight]:
    """Return the weights that take part, without buffers; a module's trained copy replaces its original."""
    names = {w.name for w in op.weights}
    return [w for w in op.weights if w.group != "buffer" and f"{w.name}.saved" not in names]


def _ahead(op: Op) -> set[str]:
    """Return the names whose gradients the product already computes in its forward pass."""
    outputs = {t.name for t in op.writes}
    return {k.of for k in op.keeps if k.is_gradient and k.what in outputs}
