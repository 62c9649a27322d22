"""LoRA's gradients computed by hand, by torch.autograd and by peft's layer, for each shape of layer in a model.

A layer with W [out, in], A [r, in] and B [out, r] computes, with s = alpha / r, for x [tokens, in]

    y = x W^T + s (x A^T) B^T

and backward, with g [tokens, out] the gradient of y:

    dA = s (g B)^T x        needs x
    dB = s g^T (x A^T)      needs x A^T, r numbers per token
    dx = g W + s (g B) A    needs W: the frozen matrix is multiplied in backward too

So LoRA saves W's gradient and its optimizer states, but neither W nor the products with W.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from memplan.catalogue.methods.selection import module_paths
from memplan.core.records import NamedTuple
from memplan.probe.libraries import library, require
from memplan.program.stack_facts import adaptable, default_stack
from memplan.resolve.decide import decide
from memplan.spec.run import RunSpec

TOKENS = 16
PEFT_ALPHA = 8.0  # peft 0.21 LoraConfig.lora_alpha
_ROWS = 2048  # of W, converted to fp64 at a time
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class Shape(NamedTuple):
    """The shape of a linear layer: W is [out, into]; `layers` are the names of the layers that have it."""

    out: int
    into: int
    layers: tuple[str, ...]


class GradientCheck(NamedTuple):
    """How far one shape's gradients differ from those computed by hand.

    autograd, peft  largest difference of dA, dB and dx, each relative to the largest gradient
    tolerance       the difference that rounding in the dtype explains
    """

    shape: Shape
    autograd: dict[str, float]
    peft: dict[str, float]
    tolerance: float

    @property
    def worst(self) -> float:
        """The largest difference, of autograd or peft."""
        return max(*self.autograd.values(), *self.peft.values())

    @property
    def agree(self) -> bool:
        """Whether the three ways agree."""
        return self.worst <= self.tolerance


def shapes(run: RunSpec) -> list[Shape]:
    """Return the distinct shapes of the layers that the run's adapters are on, largest first.

    Raises the errors of `memplan.estimate` for an invalid run.
    """
    graph = decide(run).structure.graph
    model, targets, selection = graph.model, graph.recipe.targets, graph.recipe.selection
    if selection is not None:
        paths = module_paths(default_stack(model), model.axes())
        targets = tuple({path.rpartition(".")[2] for path in paths if selection.takes(path)})
    layers_by_shape: dict[tuple[int, int], list[str]] = {}
    for path, (out, into) in adaptable(model).items():
        name = path.rpartition(".")[2]
        has_adapter = model.vocab_size not in (out, into) if targets == ("all-linear",) else name in targets
        if has_adapter:
            layers_by_shape.setdefault((out, into), []).append(name)
    distinct = [Shape(out, into, tuple(dict.fromkeys(names))) for (out, into), names in layers_by_shape.items()]
    return sorted(distinct, key=lambda shape: (-shape.out * shape.into, shape.out))


def compare(run: RunSpec) -> Iterator[GradientCheck]:
    """Yield the comparison of each shape's gradients. Raises ProbeError if torch or peft is missing."""
    require("torch", "peft")
    alpha = run.method.alpha or PEFT_ALPHA
    for shape in shapes(run):
        yield check(shape, run.method.rank, alpha, run.precision.weights)


def check(shape: Shape, rank: int, alpha: float, dtype: str) -> GradientCheck:
    """Compare one shape's gradients, by autograd and by peft in `dtype`, with the fp64 formulas on the same numbers."""
    torch = library("torch")
    x, w, a, b, g = _tensors(torch, shape, rank, getattr(torch, _DTYPES[dtype]))
    by_hand = _by_hand(torch, x, w, a, b, g, alpha / rank)
    y = x @ w.T + (x @ a.T @ b.T) * (alpha / rank)
    autograd = torch.autograd.grad(y, (a, b, x), g)
    layer = _peft_layer(torch, w, a, b, rank, alpha)
    peft = torch.autograd.grad(layer(x), (*_adapters(layer), x), g)
    return GradientCheck(
        shape,
        dict(zip(("A", "B", "x"), map(_difference, autograd, by_hand), strict=True)),
        dict(zip(("A", "B", "x"), map(_difference, peft, by_hand), strict=True)),
        tolerance(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps, max(shape.out, shape.into)),
    )


def tolerance(eps: float, eps_of_sums: float, terms: int) -> float:
    """Return the difference that rounding explains, relative to the largest gradient.

    The longest chain, dx, rounds to the dtype five times (s g, times B, times A, g W, and the sum), by at most eps / 2
    each time. Products sum up to `terms` terms in fp32; their rounding errors grow as the square root of that number.
    """
    return 5 * eps / 2 + terms**0.5 * eps_of_sums


def _tensors(torch: Any, shape: Shape, rank: int, dtype: Any) -> tuple[Any, Any, Any, Any, Any]:
    """Return x, W, A, B and the gradient of y, scaled as in a model. B is not zero, as after a few steps."""
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int, scale: float) -> Any:
        return (torch.randn(rows, columns, generator=generator) * scale).to(dtype)

    return (
        random(TOKENS, shape.into, 1).requires_grad_(),
        random(shape.out, shape.into, shape.into**-0.5),
        random(rank, shape.into, shape.into**-0.5).requires_grad_(),
        random(shape.out, rank, rank**-0.5).requires_grad_(),
        random(TOKENS, shape.out, 1),
    )


def _by_hand(torch: Any, x: Any, w: Any, a: Any, b: Any, g: Any, s: float) -> tuple[Any, Any, Any]:
    """Return dA, dB and dx in fp64 by the formulas above. W, the largest tensor, is converted some rows at a time."""
    with torch.no_grad():
        x, a, b, g = x.double(), a.double(), b.double(), g.double()
        g_b = g @ b
        dx = s * g_b @ a
        for top in range(0, w.shape[0], _ROWS):
            dx += g[:, top : top + _ROWS] @ w[top : top + _ROWS].double()
        return s * g_b.T @ x, s * g.T @ (x @ a.T), dx


def _peft_layer(torch: Any, w: Any, a: Any, b: Any, rank: int, alpha: float) -> Any:
    """Return peft's LoRA layer over W, with the same A and B."""
    peft = library("peft")
    base = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta", dtype=w.dtype)
    base.weight = torch.nn.Parameter(w, requires_grad=False)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"])
    adapted = peft.get_peft_model(torch.nn.Sequential(base), config, autocast_adapter_dtype=False)
    layer = adapted.base_model.model[0]
    with torch.no_grad():
        for ours, theirs in zip((a, b), _adapters(layer), strict=True):
            theirs.data = ours.detach().clone()
    return layer


def _adapters(layer: Any) -> tuple[Any, Any]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def _difference(theirs: Any, ours: Any) -> float:
    return float((theirs.double() - ours).abs().max() / ours.abs().max())


def as_json(compared: GradientCheck) -> dict[str, Any]:
    """Return one shape's comparison as JSON types."""
    shape = compared.shape
    return {
        "shape": [shape.out, shape.into],
        "layers": list(shape.layers),
        "autograd": compared.autograd,
        "peft": compared.peft,
        "tolerance": compared.tolerance,
        "agree": compared.agree,
    }
