"""Constructors of operations: what each kernel reads, writes and keeps for backward, with its source.

In every constructor `x` names the input and `y` the output. Inner tensors are named after the output (`y.rstd`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import ParamSpec, TypeVar

from memplan.core.ir import Keep, Op, Scratch, Tensor, Weight

DERIVATIVES = "torch 2.13 tools/autograd/derivatives.yaml"

_Arguments = ParamSpec("_Arguments")
_Operations = TypeVar("_Operations", Op, tuple[Op, ...])


def shared(make: Callable[_Arguments, _Operations]) -> Callable[_Arguments, _Operations]:
    """Decorate a constructor of operations that models have in common: with equal arguments it is called once."""
    return lru_cache(maxsize=4096)(make)  # pyright: ignore[reportReturnType] (typeshed forgets the parameters)


@shared
def linear(
    name: str,
    x: str,
    y: str,
    out: str,
    into: str,
    group: str,
    bias: bool = False,
    lead: str = "b s",
    flat: bool = False,
) -> Op:
    """Return `y[lead out] = x[lead into] @ W[out into].T`. The gradient of x needs W, the gradient of W needs x.

    A three-dimensional input is flattened by a view, and so is its gradient, which autograd then cannot add into in
    place. `flat`: the model has already flattened the input to two dimensions, so there is no view.
    """
    w = Weight(f"{name}.weight", f"{out} {into}", group, matrix=True, rows=len(out.split()))
    b = (Weight(f"{name}.bias", out, group),) if bias else ()
    return Op(
        name,
        (x,),
        (Tensor(y, f"{lead} {out}"),),
        (w, *b),
        (Keep(w.name, x), Keep(x, w.name)),
        gradient="new" if flat else "view",
        autocast="lower",
        product="matrix",
        source=f"{DERIVATIVES}: mm, addmm",
    )


def axes_of(op: Op) -> tuple[str, str, str]:
    """Return the axes of a linear layer, or of one of stacked ones: leading axes, output axes and input axes."""
    w = next(w for w in op.weights if w.matrix or w.stacked)
    axes, rows = w.shape.split()[w.stacked :], w.rows - w.stacked
    out = " ".join(axes[:rows])
    return op.writes[0].shape.removesuffix(out).strip(), out, " ".join(axes[rows:])


@shared
def cast(name: str, x: str, y: str, shape: str, dtype: str) -> Op:
    """Return `x.to(dtype)`. The casting rules drop the operation if x has that dtype already."""
    return Op(name, (x,), (Tensor(y, shape, dtype),), cast=True, source=f"{DERIVATIVES}: _to_copy")


@shared
def lowered(name: str, x: str, y: str, shape: str) -> Op:
    """Cast x to the compute dtype as autocast does for a function's arguments. Does nothing without autocast."""
    source = "torch 2.13 aten/src/ATen/autocast_mode.h lower_precision_fp"
    return Op(f"{name}.autocast", (x,), (Tensor(y, shape),), cast=True, autocast="lower", source=source)


@shared
def add(name: str, a: str, b: str, y: str, shape: str) -> Op:
    return Op(name, (a, b), (Tensor(y, shape),), gradient="same", source=f"{DERIVATIVES}: add.Tensor")


@shared
def mul(name: str, a: str, b: str, y: str, shape: str) -> Op:
    return Op(name, (a, b), (Tensor(y, shape),), (), (Keep(b, a), Keep(a, b)), source=f"{DERIVATIVES}: mul.Tensor")


@shared
def divide(name: str, x: str, by: str, y: str, shape: str, quotient: str = "") -> Op:
    """Return `x / by`. If `by` is smaller, backward sums a full-size `quotient` of that dtype for its gradient."""
    scratch = (Scratch(Tensor("quotient", shape, quotient), by),) if quotient else ()
    keeps = (Keep(by, x), Keep(x, by), Keep(by, by))
    return Op(name, (x, by), (Tensor(y, shape),), (), keeps, (), scratch, source=f"{DERIVATIVES}: div.Tensor")


def with_constant(name: str, x: str, constant: str, y: str, shape: str, kernel: str, dtype: str = "") -> Op:
    """Return an operation of x and a tensor without a gradient, which it keeps: an index, a mask, a constant factor."""
    written = (Tensor(y, shape, dtype),)
    return Op(name, (x, constant), written, (), (Keep(constant, x),), source=f"{DERIVATIVES}: {kernel}")


@shared
def index(name: str, x: str, indices: str, y: str, shape: str) -> Op:
    """Return the rows of x at `indices`, or those where a mask is set."""
    return with_constant(name, x, indices, y, shape, "index", f"={x}")


def masked_fill(name: str, x: str, mask: str, y: str, shape: str) -> Op:
    """Return x with a number where the mask is set."""
    return with_constant(name, x, mask, y, shape, "masked_fill", f"={x}")


def cat(name: str, parts: tuple[str, ...], y: str, shape: str, dtype: str = "", gradient: str = "same") -> Op:
    """Return the parts joined in new storage. By default their gradients are views of the incoming one."""
    return Op(name, parts, (Tensor(y, shape, dtype),), gradient=gradient, source=f"{DERIVATIVES}: cat")


def add_weight(name: str, x: str, y: str, shape: str, w: Weight, dtype: str = "") -> Op:
    """Return `x + w` in a new tensor."""
    return Op(name, (x,), (Tensor(y, shape, dtype),), (w,), gradient="same", source=f"{DERIVATIVES}: add.Tensor")


def lookup(name: str, ids: str, y: str, shape: str, w: Weight, kernel: str = "embedding") -> Op:
    """Return the rows of a small table that `ids` choose. It keeps the ids, and backward sorts nothing."""
    written = (Tensor(y, shape, f"={w.name}"),)
    return Op(name, (ids,), written, (w,), (Keep(ids, w.name),), source=f"{DERIVATIVES}: {kernel}")


def square(name: str, x: str, y: str, shape: str, dtype: str = "fp32") -> Op:
    """Return `x.pow(2)`, which keeps x. Backward makes x to the power of 1, and twice that, in `dtype`."""
    steps = tuple(Scratch(Tensor(step, shape, dtype)) for step in ("pow", "2x"))
    return Op(name, (x,), (Tensor(y, shape),), (), (Keep(x, x),), (), steps, source=f"{DERIVATIVES}: pow.Tensor_Scalar")


def product_with_itself(name: str, x: str, y: str, shape: str) -> Op:
    """Return `x * x`, which keeps x. Backward makes one product for each factor."""
    other = Scratch(Tensor("other factor", shape, f"={x}"))
    return Op(name, (x,), (Tensor(y, shape),), (), (Keep(x, x),), (), (other,), source=f"{DERIVATIVES}: mul.Tensor")


def rsqrt(name: str, x: str, y: str, shape: str) -> Op:
    """Return `1 / sqrt(x)` in fp32, which keeps its output."""
    steps = tuple(Scratch(Tensor(step, shape, "fp32")) for step in ("cube", "half"))
    return Op(name, (x,), (Tensor(y, shape),), (), (Keep(y, x),), (), steps, source=f"{DERIVATIVES}: rsqrt")


def subtract(name: str, x: str, small: str, y: str, shape: str) -> Op:
    """Return `x - small`, broadcasting `small`, whose gradient is negated in full size before it is summed."""
    negative = Scratch(Tensor("negative", shape, f"={x}"), small)
    return Op(
        name,
        (x, small),
        (Tensor(y, shape),),
        gradient="same",
        scratch_back=(negative,),
        source=f"{DERIVATIVES}: sub.Tensor",
    )


@shared
def scale(name: str, x: str, y: str, shape: str) -> Op:
    """Return the product with a Python number, which keeps nothing."""
    return Op(name, (x,), (Tensor(y, shape),), source=f"{DERIVATIVES}: mul.Scalar")


@shared
def activation(name: str, x: str, y: str, shape: str) -> Op:
    """Return an activation that keeps its input: silu, gelu (exact or tanh) or relu squared."""
    return Op(name, (x,), (Tensor(y, shape),), (), (Keep(x, x),), source=f"{DERIVATIVES}: silu, gelu")


def keeping_output(name: str, x: str, y: str, shape: str, kernel: str) -> Op:
    """Return an activation that keeps its output: tanh, sigmoid, relu or exp."""
    return Op(name, (x,), (Tensor(y, shape),), (), (Keep(y, x),), source=f"{DERIVATIVES}: {kernel}")


def add_number(name: str, x: str, y: str, shape: str) -> Op:
    """Return the sum with a Python number, which passes the incoming gradient on unchanged."""
    return Op(name, (x,), (Tensor(y, shape),), gradient="same", source=f"{DERIVATIVES}: add.Scalar")


@shared
def clamp(name: str, x: str, y: str, shape: str, bounds: int) -> Op:
    """Return a clamp with one or two `bounds`. It keeps its input and compares it with each bound again in backward."""
    masks = tuple(Scratch(Tensor(f"within bound {i}", shape, "bool")) for i in range(bounds))
    return Op(name, (x,), (Tensor(y, shape),), (), (Keep(x, x),), scratch_back=masks, source=f"{DERIVATIVES}: clamp")


@shared
def softmax(name: str, x: str, y: str, shape: str, dtype: str = "") -> tuple[Op, ...]:
    """Return a softmax, which keeps its output. Its backward first multiplies the gradient by that output.

    With a `dtype`, x is cast first. An fp16 input is not: the kernel reads fp16 and returns an fp16 gradient itself.
    """
    inner = f"{y}.in" if dtype else x
    widened = Op(f"{name}.float", (x,), (Tensor(inner, shape, dtype),), cast=True, uncast_dtype="fp16")
    kernel = Op(
        name,
        (inner,),
        (Tensor(y, shape, dtype),),
        (),
        (Keep(y, inner),),
        scratch_back=(Scratch(Tensor("gradient times softmax", shape, f"={y}")),),
        gradient="own",
        autocast="" if dtype else "fp32",
        source="torch 2.13 aten/src/ATen/native/cuda/SoftMax.cu softmax_backward_cuda_out",
    )
    return (widened, kernel) if dtype else (kernel,)


@shared
def dropout(name: str, x: str, y: str, shape: str) -> Op:
    mask = Tensor(f"{y}.mask", shape, "bool")
    return Op(name, (x,), (Tensor(y, shape), mask), (), (Keep(mask.name, x),), source=f"{DERIVATIVES}: native_dropout")


@shared
def view(name: str, x: str, y: str, shape: str, gradient: str = "same") -> Op:
    """Return the same storage under another shape. `gradient="new"` if the gradient's layout forces a copy."""
    return Op(name, (x,), (Tensor(y, shape),), gradient=gradient, view=True)


@shared
def matmul(name: str, a: str, b: str, y: str, shape: str, kernel: str = "bmm") -> Op:
    """Return a product of two activations, batched by default. It keeps both, and their gradients are views."""
    return Op(
        name,
        (a, b),
        (Tensor(y, shape),),
        (),
        (Keep(b, a), Keep(a, b)),
        gradient="view",
        autocast="lower",
        product="matrix",
        source=f"{DERIVATIVES}: {kernel}",
    )


@shared
def copy(name: str, x: str, y: str, shape: str, gradient: str = "same") -> Op:
    """Return new storage that keeps nothing: `contiguous`, `clone`, `expand` or `reshape`.

    `gradient="new"` if the copy has more elements than x (repeated heads), so that their gradients are summed.
    """
    return Op(name, (x,), (Tensor(y, shape),), gradient=gradient, source=f"{DERIVATIVES}: clone, expand")


def unit(name: str, *operations: Op) -> tuple[Op, ...]:
    """Return the operations as one unit, which a fused kernel can replace (`memplan.catalogue.kernels.fused`)."""
    return tuple(op._replace(unit=name) for op in operations)


def with_axes(operations: tuple[Op, ...], axes: Mapping[str, str]) -> tuple[Op, ...]:
    """Return the operations with axes replaced in their shapes, for layers whose widths differ from the model's."""

    def shape(text: str) -> str:
        return " ".join(axes.get(axis, axis) for axis in text.split())

    return tuple(
        with_shapes(op, shape)._replace(
            weights=tuple(w._replace(shape=shape(w.shape)) for w in op.weights),
            keeps=tuple(k._replace(seen=shape(k.seen)) for k in op.keeps),
        )
        for op in operations
    )


def with_shapes(op: Op, new: Callable[[str], str]) -> Op:
    """Return the operation with the shapes of its outputs and temporaries mapped by `new`."""

    def tensor(t: Tensor) -> Tensor:
        return t._replace(shape=new(t.shape))

    return op._replace(
        writes=tuple(map(tensor, op.writes)),
        scratch=tuple(map(tensor, op.scratch)),
        scratch_back=tuple(s._replace(tensor=tensor(s.tensor)) for s in op.scratch_back),
    )


def renamed(op: Op, new: Callable[[str], str]) -> Op:
    """Return the operation with every tensor name mapped by `new`."""

    def tensor(t: Tensor) -> Tensor:
        like, slash, per = t.dtype[1:].partition("/")
        return t._replace(name=new(t.name), dtype=f"={new(like)}{slash}{per}" if t.dtype.startswith("=") else t.dtype)

    return op._replace(
        reads=tuple(map(new, op.reads)),
        writes=tuple(map(tensor, op.writes)),
        keeps=tuple(k._replace(what=new(k.what), of=new(k.of)) for k in op.keeps),
        captures=tuple(map(new, op.captures)),
        recorded=tuple(map(new, op.recorded)),
        wraps=tuple(map(tensor, op.wraps)),
        past=tuple(map(tensor, op.past)),
        scratch=tuple(map(tensor, op.scratch)),
        scratch_back=tuple(s._replace(tensor=tensor(s.tensor), of=new(s.of) if s.of else "") for s in op.scratch_back),
    )


@shared
def release_names(*names: str) -> Op:
    """A Python frame returns and drops its local names, so the tensors they held can be freed."""
    return Op("return", names)


@shared
def rms_norm(name: str, x: str, y: str, shape: str, axis: str, *, of_x: bool = False) -> tuple[Op, ...]:
    """Return LlamaRMSNorm as transformers writes it: fp32 inside, `weight * x.to(input dtype)` outside.

    Keeps x in fp32, one fp32 number per row, and the normalised x in the input's dtype for the weight's gradient.
    `of_x`: T5LayerNorm, which multiplies x itself by that number and casts to the weight's dtype.
    """
    row = shape.rsplit(" ", 1)[0]
    x32, squared, mean, shifted, rstd, n32, hat = (
        f"{y}.{part}" for part in ("x32", "square", "mean", "shifted", "rstd", "n32", "hat")
    )
    w = Weight(f"{name}.weight", axis, "norm")
    scaled, like = (x, f"={w.name}") if of_x else (x32, f"={x}")
    source = "transformers 5.24 " + (
        "models/t5/modeling_t5.py T5LayerNorm" if of_x else "models/llama/modeling_llama.py LlamaRMSNorm"
    )
    operations = (
        Op(f"{name}.float", (x,), (Tensor(x32, shape, "fp32"),), cast=True, source=source),
        square(f"{name}.pow", x32, squared, shape),
        Op(f"{name}.mean", (squared,), (Tensor(mean, row),), source=f"{DERIVATIVES}: mean.dim"),
        Op(f"{name}.eps", (mean,), (Tensor(shifted, row),), gradient="same", source=f"{DERIVATIVES}: add.Scalar"),
        rsqrt(f"{name}.rsqrt", shifted, rstd, row),
        Op(
            f"{name}.scale",
            (scaled, rstd),
            (Tensor(n32, shape, "fp32" if of_x else ""),),
            (),
            (Keep(rstd, scaled), Keep(scaled, rstd)),
            scratch_back=(Scratch(Tensor("product", shape, "fp32"), rstd),),
            source=f"{DERIVATIVES}: mul.Tensor",
        ),
        Op(f"{name}.cast", (n32,), (Tensor(hat, shape, like),), cast=True, source=source),
        multiply_weight(f"{name}.weight", hat, y, shape, w),
        release_names(mean) if of_x else release_names(mean, n32),
    )
    return operations if of_x else unit(f"rms_norm {name}", *operations)


def fused_rms_norm(name: str, x: str, y: str, shape: str, axis: str, source: str) -> Op:
    """Return an RMSNorm in one kernel, which keeps x and one fp32 number per row."""
    w, rstd = Weight(f"{name}.weight", axis, "norm"), Tensor(f"{y}.rstd", shape.rpartition(" ")[0], "fp32")
    kept = (x, rstd.name, w.name)
    keeps = (*(Keep(what, x) for what in kept), *(Keep(what, w.name) for what in kept[:2]))
    return Op(name, (x,), (Tensor(y, shape, f"={x}"), rstd), (w,), keeps, source=source)


def multiply_weight(name: str, x: str, y: str, shape: str, w: Weight) -> Op:
    """Return `w * x` for a weight along the last axis. Backward sums a full-size product with x for w's gradient."""
    return Op(
        name,
        (x,),
        (Tensor(y, shape),),
        (w,),
        (Keep(w.name, x), Keep(x, w.name)),
        scratch_back=(Scratch(Tensor("product", shape, f"={y}"), w.name),),
        source=f"{DERIVATIVES}: mul.Tensor",
    )


@shared
def spread(name: str, x: str, small: str, y: str, shape: str, *, summed: bool = False, small_first: bool = False) -> Op:
    """Return `x * small`, broadcasting `small`. Backward sums a full-size product for the gradient of `small`.

    summed       see `Scratch`
    small_first  the code writes `small * x`
    """
    a, b = (small, x) if small_first else (x, small)
    return Op(
        name,
        (a, b),
        (Tensor(y, shape),),
        (),
        (Keep(b, a), Keep(a, b)),
        scratch_back=(Scratch(Tensor("product", shape, f"={y}"), small, summed=summed),),
        source=f"{DERIVATIVES}: mul.Tensor",
    )


@shared
def layer_norm(
    name: str, x: str, y: str, shape: str, axis: str, *, bias: bool = True, affine: bool = True, group: str = "norm"
) -> Op:
    """Return `native_layer_norm`, which keeps x, and the mean and the inverse deviation of every row in fp32."""
    row = shape.rsplit(" ", 1)[0]
    mean, rstd = Tensor(f"{y}.mean", row, "fp32"), Tensor(f"{y}.rstd", row, "fp32")
    names = (("weight",) if affine else ()) + (("bias",) if affine and bias else ())
    weights = tuple(Weight(f"{name}.{n}", axis, group) for n in names)
    kept = (x, mean.name, rstd.name)
    return Op(
        name,
        (x,),
        (Tensor(y, shape, f"={x}"), mean, rstd),
        weights,
        (
            *(Keep(what, x) for what in (*kept, *(w.name for w in weights))),
            *(Keep(what, w.name) for w in weights for what in kept),
        ),
        autocast="fp32",
        source=f"{DERIVATIVES}: native_layer_norm",
    )


@shared
def split(name: str, x: str, parts: tuple[Tensor, ...]) -> Op:
    """Return views of parts of one tensor (`chunk`, `split`). Their gradients are joined in one new storage."""
    return Op(name, (x,), parts, gradient="new", view=True, source=f"{DERIVATIVES}: split")


def softcap(name: str, x: str, y: str, shape: str) -> tuple[Op, ...]:
    """Return `tanh(x / cap) * cap`. The tanh keeps its output."""
    return (
        scale(f"{name}.divide", x, f"{y}.divided", shape),
        keeping_output(f"{name}.tanh", f"{y}.divided", f"{y}.tanh", shape, "tanh"),
        scale(f"{name}.multiply", f"{y}.tanh", y, shape),
    )


@shared
def rotate(name: str, x: str, y: str, shape: str, half: str) -> tuple[Op, ...]:
    """Return `x * cos + rotate_half(x) * sin`, which keeps cos and sin but not x. `half`: the shape of half a head."""
    cosine, turned, sine = f"{y}.cosine", f"{y}.turned", f"{y}.sine"
    return unit(
        f"rope {name}",
        Op(f"{name}.cos", (x, "cos"), (Tensor(cosine, shape),), (), (Keep("cos", x),), source=f"{DERIVATIVES}: mul"),
        rotate_half(f"{name}.rotate_half", x, turned, shape, half),
        Op(
            f"{name}.sin",
            (turned, "sin"),
            (Tensor(sine, shape),),
            (),
            (Keep("sin", turned),),
            source=f"{DERIVATIVES}: mul",
        ),
        add(f"{name}.add", cosine, sine, y, shape),
    )


def rotate_half(name: str, x: str, y: str, shape: str, half: str) -> Op:
    """Negate one half of every head and swap the halves. Rotating pairs of numbers takes the same memory."""
    return Op(
        name,
        (x,),
        (Tensor(y, shape),),
        scratch=(Tensor("negative", half, f"={x}"),),
        scratch_back=(Scratch(Tensor("second half", shape, f"={x}")),),
        source=f"{DERIVATIVES}: cat, stack, neg, slice",
    )


@shared
def embedding(name: str, ids: str, y: str, rows: str, axis: str) -> Op:
    """Return an embedding lookup, which keeps the ids.

    If there are more than 3072 ids, its backward sorts them and sums rows in fp32 (`h32`: h rounded up to 32).
    """
    w = Weight(f"{name}.weight", f"{rows} {axis}", "embedding", rows=1)
    scratch = (
        *(Scratch(Tensor(part, "sorted_ids", "int64")) for part in ("ids", "positions", "sorted", "order")),
        Scratch(Tensor("segments", "segments", "int64")),
        Scratch(Tensor("partial sums", "segments h32", "fp32")),
    )
    return Op(
        name,
        (ids,),
        (Tensor(y, f"b s {axis}", f"={w.name}"),),
        (w,),
        (Keep(ids, w.name),),
        scratch_back=scratch,
        source="torch 2.13 aten/src/ATen/native/cuda/EmbeddingBackwardKernel.cu",
    )
