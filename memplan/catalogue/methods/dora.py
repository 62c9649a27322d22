"""LoRA around an embedding, and DoRA around embeddings and linear layers.

DoRA trains a magnitude for each output, and scales the layer by the magnitudes over the norms of the adapted weight.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import matrix
from memplan.catalogue.quantization.quantization import dequantise
from memplan.core.ir import Keep, Op, Scratch, Tensor, Weight


def adapt_embedding(op: Op, dtype: str, is_dora: bool, magnitudes: str = "") -> Iterator[Op]:
    """peft's LoRA around an embedding: rows of A are looked up as the embedding's are, then multiplied by B.

    A is stored transposed, so its gradient is computed for the lookup and then copied into A's layout.
    DoRA scales both the embedding's rows and the product by the column norms of `W + scaling * A B`.
    Source: peft 0.21 tuners/lora/layer.py Embedding.forward, tuners/lora/dora.py DoraEmbeddingLayer.forward.
    """
    (ids,), y = op.reads, op.writes[0]
    n, p = op.name, y.name
    w = op.weights[0]
    rows, width = w.shape.split(" ")[: w.rows], w.shape.split(" ")[w.rows :]
    a = Weight(f"{n}.lora_embedding_A", " ".join(("r", *rows)), "adapter", dtype, rows=1)
    b = Weight(f"{n}.lora_embedding_B", " ".join((*width, "r")), "adapter", dtype, rows=len(width))
    yield op._replace(name=f"{n}.base_layer", writes=(y._replace(name=f"{p}.base"),))
    if is_dora:
        yield from _embedding_scale(op, (a, b), " ".join(width), magnitudes or dtype)
    yield Op(
        f"{n}.lora_embedding_A",
        (ids,),
        (Tensor(f"{p}.a", "b s r", dtype),),
        (a,),
        (Keep(ids, a.name),),
        scratch_back=(*op.scratch_back, Scratch(Tensor("transposed gradient", a.shape, dtype))),
        source=op.source,
    )
    yield Op(
        f"{n}.lora_embedding_B",
        (f"{p}.a",),
        (Tensor(f"{p}.b", y.shape),),
        (b,),
        (Keep(b.name, f"{p}.a"), Keep(f"{p}.a", b.name)),
        gradient="view",
        autocast="lower",
        product="matrix",
        source=f"{ops.DERIVATIVES}: mm",
    )
    base, product = f"{p}.base", f"{p}.b"
    if is_dora:
        base, product = f"{p}.base_part", f"{p}.lora_part"
        yield times_scale(n, f"{p}.scale", f"{p}.b", product, y.shape)
    yield ops.scale(f"{n}.scaling", product, f"{p}.delta", y.shape)
    if is_dora:
        yield ops.release_names(f"{p}.product", f"{p}.norm", f"{p}.b")
        yield times_scale(n, f"{p}.scale", f"{p}.base", base, y.shape)
    yield ops.add(f"{n}.add", base, f"{p}.delta", f"{p}.sum", y.shape)
    yield ops.cast(f"{n}.cast_back", f"{p}.sum", p, y.shape, f"={p}.base")


def _embedding_scale(op: Op, adapters: tuple[Weight, Weight], out: str, dtype: str) -> Iterator[Op]:
    """DoRA's scale of an embedding's columns: the magnitudes by the norms of the embedding with its adapter."""
    w, n, p = op.weights[0], f"{op.name}.dora", op.writes[0].name
    product = Tensor(f"{p}.product", w.shape)
    yield Op(f"{n}.product", (), (product,), adapters, gradient="none", autocast="lower", product="fold")
    yield ops.scale(f"{n}.scaled_product", product.name, f"{p}.scaled_product", w.shape)
    yield Op(f"{n}.adapted_weight", (f"{p}.scaled_product",), (Tensor(f"{p}.adapted", w.shape),), (w,))
    yield from magnitude(op.name, p, out, dtype, f"={p}.adapted")


_DORA = "peft 0.21 tuners/lora/dora.py"
_TRANSPOSED = f"{_DORA} with utils/other.py transpose, which wraps the weight in a parameter, unless a cast copied it"


def dora(op: Op, x: str, result: str, dtype: str, again: bool, autocast: str, magnitudes: str = "") -> Iterator[Op]:
    """DoRA: the row norms of `W + scaling * B A`, as constants, scale the product and the base result.

    The product B A is computed by running the adapter on an identity matrix as wide as the input. With `again`, the
    base weight multiplies a second time, since the base result must see the adapter's input, with its dropout.

    dtype       dtype of the adapter
    autocast    the compute dtype under autocast, or empty
    magnitudes  dtype of the magnitudes, or empty if it is the adapter's

    Source: peft 0.21 tuners/lora/dora.py DoraLinearLayer.forward.
    """
    y = op.writes[0]
    n, p = f"{op.name}.dora", y.name
    lead, out, into = ops.axes_of(op)
    flat = op.gradient == "new"
    w = matrix(op)
    assert w is not None
    full, like = f"{out} {into}", f"={x}"
    yield Op(f"{n}.eye", (), (Tensor(f"{p}.eye", f"{into} {into}", dtype),))
    yield Op(f"{n}.eye.cast", (f"{p}.eye",), (Tensor(f"{p}.eye_in", f"{into} {into}"),), cast=True, autocast="lower")
    for half, read, written, shape in (
        (ops.linear(f"{op.name}.lora_A", "", "", "r", into, "adapter"), f"{p}.eye_in", f"{p}.eye_a", f"{into} r"),
        (ops.linear(f"{op.name}.lora_B", "", "", out, "r", "adapter"), f"{p}.eye_a", f"{p}.eye_b", full),
    ):
        name = f"{n}.eye_{half.name[-1]}"
        output = Tensor(written, shape)
        yield Op(name, (read,), (output,), half.weights, gradient="none", autocast="lower", product="matrix")
    yield ops.release_names(f"{p}.eye")
    yield ops.cast(f"{n}.product", f"{p}.eye_b", f"{p}.product", full, like)
    if w.stored:
        yield dequantise(w, f"{n}.dequantise", f"{p}.w4", full)
        yield ops.cast(f"{n}.weight", f"{p}.w4", f"{p}.w", full, like)
    else:
        yield Op(f"{n}.weight", (), (Tensor(f"{p}.w", full, like),), (w._replace(trains=False),), cast=True)
    yield ops.scale(f"{n}.scaled_product", f"{p}.product", f"{p}.scaled_product", full)
    yield Op(f"{n}.adapted_weight", (f"{p}.w", f"{p}.scaled_product"), (Tensor(f"{p}.adapted", full),))
    yield from magnitude(op.name, p, out, magnitudes or dtype, like)
    yield ops.linear(f"{op.name}.lora_A", x, f"{p}.a", "r", into, "adapter", lead=lead, flat=flat)
    yield ops.linear(f"{op.name}.lora_B", f"{p}.a", f"{p}.b", out, "r", "adapter", lead=lead, flat=flat)
    base = result
    if again:
        base = f"{p}.dropped_base"
        weight, wraps = f"{p}.w", ()
        if w.transposed and not w.stored and w.dtype == dtype:
            wraps = (Tensor(f"{p}.transposed", full, w.dtype),)
        if wraps and autocast and w.dtype == "fp32":  # autocast caches the cast of a parameter
            weight = f"{p}.low"
            yield Op(
                f"{n}.transposed",
                (f"{p}.w",),
                (Tensor(weight, full, autocast),),
                cast=True,
                holds="forward",
                wraps=wraps,
                source=_TRANSPOSED,
            )
            wraps = ()
        yield Op(
            f"{n}.base",
            (x, weight),
            (Tensor(base, y.shape),),
            (),
            (Keep(weight, x), *(Keep(x, t) for t in (weight, *(t.name for t in wraps)))),
            wraps=wraps,
            gradient=op.gradient,
            autocast="lower",
            product="matrix",
            source=_TRANSPOSED if w.transposed else _DORA,
        )
    elif bias := tuple(v._replace(trains=False) for v in op.weights if not v.matrix):
        base, like = (
            f"{p}.unbiased",
            f"={result}" if w.stored else "",
        )  # bitsandbytes casts the bias itself to its input
        yield Op(f"{n}.unbias", (result,), (Tensor(base, y.shape, like),), bias, gradient="same")
    yield Op(f"{n}.minus_one", (f"{p}.scale",), (Tensor(f"{p}.less", out),), gradient="same")
    for a, b, output in ((f"{p}.less", base, f"{p}.base_part"), (f"{p}.scale", f"{p}.b", f"{p}.lora_part")):
        yield times_scale(op.name, a, b, output, y.shape)
    yield ops.scale(f"{n}.scaling", f"{p}.lora_part", f"{p}.lora_scaled", y.shape)
    yield ops.add(f"{n}.sum", f"{p}.base_part", f"{p}.lora_scaled", f"{p}.delta", y.shape)
    yield ops.release_names(*(f"{p}.{t}" for t in ("product", "w", "norm", "scale", "b")), base)
    yield ops.release_names(f"{p}.eye_in", f"{p}.eye_a")._replace(
        needs_recording=True
    )  # the product's graph holds them


def magnitude(name: str, p: str, out: str, dtype: str, norm: str) -> Iterator[Op]:
    """The magnitude vector by the norms of the adapted weight, which are a constant of dtype `norm`."""
    vector = Weight(f"{name}.lora_magnitude_vector.weight", out, "adapter", dtype)
    yield Op(f"{name}.dora.norm", (f"{p}.adapted",), (Tensor(f"{p}.norm", out, norm),))
    yield Op(
        f"{name}.dora.magnitude",
        (f"{p}.norm",),
        (Tensor(f"{p}.scale", out),),
        (vector,),
        (Keep(f"{p}.norm", vector.name),),
        source=f"{ops.DERIVATIVES}: div.Tensor",
    )


def times_scale(name: str, scale: str, x: str, y: str, shape: str) -> Op:
    """A tensor times DoRA's scale of each column. The scale's gradient is summed from the tensor's shape."""
    return Op(
        f"{name}.dora.times",
        (scale, x),
        (Tensor(y, shape),),
        (),
        (Keep(x, scale), Keep(scale, x)),
        scratch_back=(Scratch(Tensor("product", shape, f"={y}"), scale),),
        source=f"{ops.DERIVATIVES}: mul.Tensor",
    )
