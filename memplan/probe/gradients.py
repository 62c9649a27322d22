"""LoRA's gradients three ways: by hand, by torch.autograd, and by peft's own layer, for each shape a model has.

A layer with W [out, in], A [r, in] and B [out, r] computes, with s = alpha / r, for x [tokens, in]

    y = x W^T + s (x A^T) B^T

and backward, with g [tokens, out] the gradient of y:

    dA = s (g B)^T x        needs x
    dB = s g^T (x A^T)      needs x A^T, r numbers a token
    dx = g W + s (g B) A    needs W: the frozen matrix is multiplied in backward too

LoRA so saves W's gradient and its optimizer states, but neither W nor the product with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from memplan.probe.libraries import library, require
from memplan.program.stack_facts import adaptable
from memplan.resolve.decide import decide
from memplan.spec.run import RunSpec

TOKENS = 16
PEFT_ALPHA = 8.0  # peft 0.21 LoraConfig.lora_alpha
_ROWS = 2048  # of W that are turned into fp64 at a time
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class Shape(NamedTuple):
    """One shape of linear layer: W is [out, into]; `layers` are the names that have it."""

    out: int
    into: int
    layers: tuple[str, ...]


class Compared(NamedTuple):
    """The largest differences of one shape's gradients, each over the largest gradient: of autograd and of peft.

    `tolerance` is what rounding in the dtype explains.
    """

    shape: Shape
    autograd: dict[str, float]
    peft: dict[str, float]
    tolerance: float

    @property
    def worst(self) -> float:
        """The largest of them."""
        return max(*self.autograd.values(), *self.peft.values())

    @property
    def agree(self) -> bool:
        """Whether the three ways agree."""
        return self.worst <= self.tolerance


def shapes(run: RunSpec) -> list[Shape]:
    """The distinct shapes of the layers that the run's adapters are on, the largest first.

    Raises as `memplan.estimate` does for what the run must not say.
    """
    graph = decide(run).structure.graph
    model, targets = graph.model, graph.recipe.targets
    found: dict[tuple[int, int], list[str]] = {}
    for path, (out, into) in adaptable(model).items():
        name = path.rpartition(".")[2]
        wanted = model.vocab_size not in (out, into) if targets == ("all-linear",) else name in targets
        if wanted:
            found.setdefault((out, into), []).append(name)
    made = [Shape(out, into, tuple(dict.fromkeys(names))) for (out, into), names in found.items()]
    return sorted(made, key=lambda shape: (-shape.out * shape.into, shape.out))


def compare(run: RunSpec) -> Iterator[Compared]:
    """Each shape's gradients, compared as they are asked for. Raises ProbeError where torch or peft is missing."""
    require("torch", "peft")
    alpha = run.method.alpha or PEFT_ALPHA
    for shape in shapes(run):
        yield check(shape, run.method.rank, alpha, run.precision.weights)


def check(shape: Shape, rank: int, alpha: float, dtype: str) -> Compared:
    """One shape's gradients, by autograd and by peft in `dtype`, against those by hand in fp64 of the same numbers."""
    torch = library("torch")
    x, w, a, b, g = _tensors(torch, shape, rank, getattr(torch, _DTYPES[dtype]))
    by_hand = _by_hand(torch, x, w, a, b, g, alpha / rank)
    y = x @ w.T + (x @ a.T @ b.T) * (alpha / rank)
    autograd = torch.autograd.grad(y, (a, b, x), g)
    layer = _peft_layer(torch, w, a, b, rank, alpha)
    peft = torch.autograd.grad(layer(x), (*_adapters(layer), x), g)
    return Compared(
        shape,
        dict(zip(("A", "B", "x"), map(_difference, autograd, by_hand), strict=True)),
        dict(zip(("A", "B", "x"), map(_difference, peft, by_hand), strict=True)),
        tolerance(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps, max(shape.out, shape.into)),
    )


def tolerance(eps: float, eps_of_sums: float, terms: int) -> float:
    """What rounding explains of a difference, over the largest gradient.

    The longest chain, that of dx, rounds five times to the dtype (s g, its product with B, that with A, g W, and their
    sum), each time by eps / 2 at most; products of up to `terms` terms add them in fp32, whose roundings grow as the
    square root of their number.
    """
    return 5 * eps / 2 + terms**0.5 * eps_of_sums


def _tensors(torch: Any, shape: Shape, rank: int, dtype: Any) -> tuple[Any, Any, Any, Any, Any]:
    """x, W, A, B and the gradient of y, of the size they have in a model: B is not zero, as after some steps."""
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
    """dA, dB and dx in fp64 by the formulas above. W is widened some rows at a time: it is most of the memory."""
    with torch.no_grad():
        x, a, b, g = x.double(), a.double(), b.double(), g.double()
        through = g @ b
        dx = s * through @ a
        for top in range(0, w.shape[0], _ROWS):
            dx += g[:, top : top + _ROWS] @ w[top : top + _ROWS].double()
        return s * through.T @ x, s * g.T @ (x @ a.T), dx


def _peft_layer(torch: Any, w: Any, a: Any, b: Any, rank: int, alpha: float) -> Any:
    """peft's LoRA layer over W, with the same A and B."""
    peft = library("peft")
    base = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta", dtype=w.dtype)
    base.weight = torch.nn.Parameter(w, requires_grad=False)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"])
    adapted = peft.get_peft_model(torch.nn.Sequential(base), config, autocast_adapter_dtype=False)
    layer = adapted.base_model.model[0]
    with torch.no_grad():
        for mine, theirs in zip((a, b), _adapters(layer), strict=True):
            theirs.data = mine.detach().clone()
    return layer


def _adapters(layer: Any) -> tuple[Any, Any]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def _difference(theirs: Any, mine: Any) -> float:
    return float((theirs.double() - mine).abs().max() / mine.abs().max())


def as_json(compared: Compared) -> dict[str, Any]:
    """One shape's comparison, for programs."""
    shape = compared.shape
    return {
        "shape": [shape.out, shape.into],
        "layers": list(shape.layers),
        "autograd": compared.autograd,
        "peft": compared.peft,
        "tolerance": compared.tolerance,
        "agree": compared.agree,
    }
