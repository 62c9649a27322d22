"""Methods as rewrites of a stack: freezing, adapters, quantised storage, the dtypes of weights.

A rewrite takes operations and returns operations; nothing else in the package knows what LoRA is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import matrix, reweigh, rewrite, rewrite_lists
from memplan.catalogue.methods import litgpt_lora
from memplan.catalogue.methods.fused_lora import fuse_lora
from memplan.catalogue.methods.parameter_lora import adapt_parameters, standing
from memplan.catalogue.quantization.inference_formats import (
    Running,
    product,
    resident,
    takes_alone,
    takes_experts,
    wide_bias,
    with_triton,
)
from memplan.catalogue.quantization.quantization import dequantise, experts_fp8, family_of, quantised_linear, stored
from memplan.core.ir import Keep, Op, Run, Scratch, Stack, Tensor, Weight, operations, outside


class Adapter(NamedTuple):
    """How a LoRA-like adapter computes; `compute` is what the 4-bit layer inside it does.

    `again`: DoRA multiplies by the base weight once more though nothing is dropped, as peft did until 0.13. `keeps` and
    `copies`: as in `quantised_linear`.
    """

    dtype: str
    compute: str
    dropout: bool
    dora: bool
    again: bool = False
    keeps: bool = False
    copies: bool = True


def head_of(stack: Stack) -> Op | None:
    """The output projection of a language model, which PEFT's `all-linear` and quantisation leave alone: the last
    operation with a matrix. None in a model without one."""
    last = next((op for op in reversed(stack.after) if any(w.rows for w in op.weights)), None)
    return None if last is None or any(w.group == "head" for w in last.weights) else last


def inside(path: str, modules: tuple[str, ...]) -> bool:
    """Whether a module's path is one of the `modules`, or inside one.

    Source: peft 0.21 tuners/tuners_utils.py _check_target_module_exists.
    """
    return not set(path.split(".")).isdisjoint(modules)


def adapt(op: Op, adapter: Adapter, autocast: bool) -> Iterator[Op]:
    """peft's LoRA layer around a frozen linear layer: `result + lora_B(lora_A(dropout(x))) * scaling`.

    Around a full-width layer, one of FP8 and one of GPTQ the input is cast to the adapter's dtype and the sum back to
    the result's; around a 4-bit layer the result is cloned first, and under autocast nothing is cast.
    Source: peft 0.21 tuners/lora/layer.py Linear.forward, tuners/lora/bnb.py Linear4bit.forward, Linear8bitLt.forward,
    tuners/lora/gptq.py, tuners/lora/awq.py; 0.13 tuners/lora/gptq.py, which casts as around a 4-bit layer.
    """
    (x,), y = op.reads, op.writes[0]
    n, p = op.name, y.name
    lead, out, into = ops.axes_of(op)
    flat = op.gradient == "new"
    w = matrix(op)
    assert w is not None
    how = family_of(w) if w.stored else ""
    quantised = how in ("4bit", "int8", "awq") or (how == "gptq" and not adapter.keeps)
    casts = not (quantised and autocast)
    result = f"{p}.base"
    yield from (
        quantised_linear(op, f"{n}.base_layer", result, adapter.compute, keeps=adapter.keeps, copies=adapter.copies)
        if how
        else (_renamed(op, result),)
    )
    if w.stored and w.stored[0].dtype == "uint8/2":
        yield ops.copy(f"{n}.clone", result, f"{p}.clone", y.shape)
        yield ops.leave(result)
        result = f"{p}.clone"
    inner = x
    if casts:
        inner = f"{p}.x"
        yield ops.cast(f"{n}.cast", x, inner, f"{lead} {into}", adapter.dtype)
    adapted = inner
    if adapter.dropout:
        adapted = f"{p}.dropped"
        yield ops.dropout(f"{n}.lora_dropout", inner, adapted, f"{lead} {into}")
    if adapter.dora:
        yield from _dora(op, adapted, result, adapter, adapter.compute if autocast else "")
    else:
        yield ops.linear(f"{n}.lora_A", adapted, f"{p}.a", "r", into, "adapter", lead=lead, flat=flat)
        yield ops.linear(f"{n}.lora_B", f"{p}.a", f"{p}.b", out, "r", "adapter", lead=lead, flat=flat)
        yield ops.scale(f"{n}.scaling", f"{p}.b", f"{p}.delta", y.shape)
    if quantised and not adapter.dora:
        if casts:
            yield ops.cast(f"{n}.cast_back", f"{p}.delta", f"{p}.delta.cast", y.shape, f"={result}")
        add = ops.add(f"{n}.add", result, f"{p}.delta.cast" if casts else f"{p}.delta", p, y.shape)
        yield add._replace(view=how == "gptq")  # peft's older GPTQ layer adds into the result
    else:
        yield ops.add(f"{n}.add", result, f"{p}.delta", f"{p}.sum", y.shape)
        if adapter.dora:
            yield ops.leave(adapted)
        yield ops.cast(f"{n}.cast_back", f"{p}.sum", p, y.shape, f"={result}" if casts else f"={p}.sum")
    yield ops.leave(x, inner)  # the call of a module holds its arguments until it returns


def _lora_embedding(op: Op, dtype: str) -> Iterator[Op]:
    """peft's LoRA around an embedding: rows of A looked up like the embedding's, then multiplied by B.

    A is stored transposed, so its gradient is made once for the lookup and copied into A's layout.
    Source: peft 0.21 tuners/lora/layer.py Embedding.forward.
    """
    (ids,), y = op.reads, op.writes[0]
    n, p = op.name, y.name
    w = op.weights[0]
    rows, width = w.shape.split(" ")[: w.rows], w.shape.split(" ")[w.rows :]
    a = Weight(f"{n}.lora_embedding_A", " ".join(("r", *rows)), "adapter", dtype, rows=1)
    b = Weight(f"{n}.lora_embedding_B", " ".join((*width, "r")), "adapter", dtype, rows=len(width))
    yield op._replace(name=f"{n}.base_layer", writes=(y._replace(name=f"{p}.base"),))
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
    yield ops.scale(f"{n}.scaling", f"{p}.b", f"{p}.delta", y.shape)
    yield ops.add(f"{n}.add", f"{p}.base", f"{p}.delta", f"{p}.sum", y.shape)
    yield ops.cast(f"{n}.cast_back", f"{p}.sum", p, y.shape, f"={p}.base")


def _renamed(op: Op, result: str) -> Op:
    return op._replace(name=f"{op.name}.base_layer", writes=(op.writes[0]._replace(name=result),))


_DORA = "peft 0.21 tuners/lora/dora.py"
_TRANSPOSED = (
    f"{_DORA} with utils/other.py transpose, which makes a parameter of the weight, where no cast made it less"
)


def _dora(op: Op, x: str, result: str, adapter: Adapter, low: str) -> Iterator[Op]:
    """DoRA: the norm of `W + scaling * B A` row by row, as a constant, scales the product and the base result.

    The product B A is made by running the adapter on an identity matrix as wide as the input. `low`: what autocast
    multiplies in.
    Source: peft 0.21 tuners/lora/dora.py DoraLinearLayer.forward.
    """
    y = op.writes[0]
    n, p = f"{op.name}.dora", y.name
    lead, out, into = ops.axes_of(op)
    flat = op.gradient == "new"
    w = matrix(op)
    assert w is not None
    full, like = f"{out} {into}", f"={x}"
    magnitude = Weight(f"{op.name}.lora_magnitude_vector.weight", out, "adapter", adapter.dtype)
    yield Op(f"{n}.eye", (), (Tensor(f"{p}.eye", f"{into} {into}", adapter.dtype),))
    yield Op(f"{n}.eye.cast", (f"{p}.eye",), (Tensor(f"{p}.eye_in", f"{into} {into}"),), cast=True, autocast="lower")
    for half, read, made, shape in (
        (ops.linear(f"{op.name}.lora_A", "", "", "r", into, "adapter"), f"{p}.eye_in", f"{p}.eye_a", f"{into} r"),
        (ops.linear(f"{op.name}.lora_B", "", "", out, "r", "adapter"), f"{p}.eye_a", f"{p}.eye_b", full),
    ):
        name = f"{n}.eye_{half.name[-1]}"
        write = Tensor(made, shape)
        yield Op(name, (read,), (write,), half.weights, gradient="none", autocast="lower", product="matrix")
    yield ops.leave(f"{p}.eye")
    yield ops.cast(f"{n}.product", f"{p}.eye_b", f"{p}.product", full, like)
    if w.stored:
        yield dequantise(w, f"{n}.dequantise", f"{p}.w4", full)
        yield ops.cast(f"{n}.weight", f"{p}.w4", f"{p}.w", full, like)
    else:
        yield Op(f"{n}.weight", (), (Tensor(f"{p}.w", full, like),), (w._replace(trains=False),), cast=True)
    yield ops.scale(f"{n}.scaled_product", f"{p}.product", f"{p}.scaled_product", full)
    yield Op(f"{n}.adapted_weight", (f"{p}.w", f"{p}.scaled_product"), (Tensor(f"{p}.adapted", full),))
    yield Op(f"{n}.norm", (f"{p}.adapted",), (Tensor(f"{p}.norm", out, like),))
    yield Op(
        f"{n}.magnitude",
        (f"{p}.norm",),
        (Tensor(f"{p}.scale", out),),
        (magnitude,),
        (Keep(f"{p}.norm", magnitude.name),),
        source=f"{ops.DERIVATIVES}: div.Tensor",
    )
    yield ops.linear(f"{op.name}.lora_A", x, f"{p}.a", "r", into, "adapter", lead=lead, flat=flat)
    yield ops.linear(f"{op.name}.lora_B", f"{p}.a", f"{p}.b", out, "r", "adapter", lead=lead, flat=flat)
    base = result
    if adapter.dropout or adapter.again:  # the base result must see the same dropped input
        base = f"{p}.dropped_base"
        weight, wraps = f"{p}.w", ()
        if w.transposed and not w.stored and w.dtype == adapter.dtype:
            wraps = (Tensor(f"{p}.transposed", full, w.dtype),)
        if wraps and low and w.dtype == "fp32":  # autocast keeps what it casts of a parameter
            weight = f"{p}.low"
            yield Op(
                f"{n}.transposed",
                (f"{p}.w",),
                (Tensor(weight, full, low),),
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
        base = f"{p}.unbiased"
        yield Op(f"{n}.unbias", (result,), (Tensor(base, y.shape),), bias, gradient="same")
    yield Op(f"{n}.minus_one", (f"{p}.scale",), (Tensor(f"{p}.less", out),), gradient="same")
    for a, b, made in ((f"{p}.less", base, f"{p}.base_part"), (f"{p}.scale", f"{p}.b", f"{p}.lora_part")):
        yield Op(
            f"{n}.times",
            (a, b),
            (Tensor(made, y.shape),),
            (),
            (Keep(b, a), Keep(a, b)),
            scratch_back=(Scratch(Tensor("product", y.shape, f"={made}"), a),),
            source=f"{ops.DERIVATIVES}: mul.Tensor",
        )
    yield ops.scale(f"{n}.scaling", f"{p}.lora_part", f"{p}.lora_scaled", y.shape)
    yield ops.add(f"{n}.sum", f"{p}.base_part", f"{p}.lora_scaled", f"{p}.delta", y.shape)
    yield ops.leave(*(f"{p}.{t}" for t in ("product", "w", "norm", "scale", "b")), base)
    yield ops.leave(f"{p}.eye_in", f"{p}.eye_a")._replace(recorded=True)  # by the graph of the product


class Recipe(NamedTuple):
    """What a run asks of the methods, resolved: structure only, no sizes.

    kind: a method's, or `stored` where nothing trains over quantised weights.
    weights: dtype the model is loaded in. compute: what quantised layers compute in. quantization: "" or a format.
    preparation: "", "fp32" (prepare_model_for_kbit_training) or "trl" (that, with most embeddings and heads cast back).
    targets: names of linear layers, or ("all-linear",). fused: adapted layers are one function where one exists.
    library: whose adapters they are, `peft` or `litgpt`, whose targets are the switches of its command. again, keeps:
    see `Adapter`. frozen: parts of the model that neither train nor are adapted, see `PARTS`. packed: quantised weights
    are loaded as they are stored, and not made from whole ones. copies: a product with packed weights makes a whole
    matrix of them first, as of more than a few rows, and in training. running: how matrices of a format run that
    nothing trains over.
    """

    kind: str
    weights: str
    compute: str
    autocast: bool = False
    targets: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    dropout: bool = False
    adapter_dtype: str = "fp32"
    quantization: str = ""
    double_quant: bool = True
    block_size: int = 64
    skip: tuple[str, ...] = ("lm_head",)
    preparation: str = ""
    fused: bool = False
    library: str = "peft"
    again: bool = False
    frozen: tuple[str, ...] = ()
    keeps: bool = False
    packed: bool = False
    copies: bool = True
    running: Running | None = None


ADAPTERS = ("lora", "qlora", "dora", "qdora")


# What may be frozen by itself, and the groups of its weights; the language model is all the others.
PARTS = {"vision": ("vision",), "projector": ("projector",), "language": ()}


def apply(stack: Stack, recipe: Recipe) -> Stack:
    """The stack as the method trains it: dtypes on every weight, adapters around their targets."""
    return _unreached(_left_out(_applied(stack, recipe)))


def _left_out(stack: Stack) -> Stack:
    """Of operations that a run leaves out, only the weights."""

    def change(op: Op) -> Iterable[Op]:
        if not op.skipped:
            return (op,)
        weights = tuple(w._replace(trains=False, idle=w.trains) for w in op.weights)
        return (Op(op.name, weights=weights, gradient="none"),) if weights else ()

    return rewrite_lists(stack, lambda some: tuple(new for op in some for new in change(op)))


def _unreached(stack: Stack) -> Stack:
    """Weights that only operations without a gradient use never get one."""
    reached = {w.name for op in operations(stack) if op.gradient != "none" for w in op.weights}
    if all(w.name in reached or not w.trains for op in operations(stack) for w in op.weights):
        return stack
    return reweigh(stack, lambda w: w if w.name in reached or not w.trains else w._replace(trains=False, idle=True))


def is_frozen(w: Weight, frozen: tuple[str, ...]) -> bool:
    """Whether a weight is of a part of the model that neither trains nor is adapted."""
    part = next((part for part, groups in PARTS.items() if w.group in groups), "language")
    return part in frozen


def _applied(stack: Stack, recipe: Recipe) -> Stack:
    if recipe.kind in ("full", "freeze"):
        return reweigh(
            stack,
            lambda w: w._replace(dtype=w.dtype or recipe.weights, trains=w.trains and not is_frozen(w, recipe.frozen)),
        )
    head = head_of(stack)
    wide = frozenset(w.name for w in head.weights) if head and "lm_head" in recipe.skip else frozenset[str]()
    narrow = _narrowed(stack) if recipe.preparation == "trl" else frozenset[str]()
    stack = reweigh(stack, lambda w: _frozen(w, recipe, wide, narrow))
    if recipe.running is not None and recipe.running.kernel == "triton":
        stack = rewrite_lists(stack, with_triton)
    if recipe.saved:
        stack = rewrite(stack, lambda op: (_saved(op, recipe.saved),))
    adapter = Adapter(
        recipe.adapter_dtype,
        recipe.compute,
        recipe.dropout,
        "dora" in recipe.kind,
        recipe.again,
        recipe.keeps,
        recipe.copies,
    )
    stood_for = standing(operations(stack))
    every = recipe.targets == ("all-linear",)

    def takes(op: Op) -> bool:
        if recipe.library == "litgpt":
            return litgpt_lora.takes(op, recipe.targets)
        w, name = matrix(op), op.name.rpartition(".")[2]
        if w is None or is_frozen(w, recipe.frozen) or inside(op.name, recipe.saved) or name in stood_for:
            return False
        return _named(op, recipe) or (every and (head is None or op.name != head.name))

    def takes_parameter(w: Weight) -> bool:
        return not is_frozen(w, recipe.frozen) and (every or any(name in recipe.targets for name in w.stands_for))

    if stood_for:
        stack = rewrite_lists(stack, lambda some: adapt_parameters(some, takes_parameter, recipe.adapter_dtype))

    older = recipe.library == "litgpt"

    if recipe.fused:
        stack = rewrite_lists(
            stack,
            lambda some: (
                some
                if any(op.skipped for op in some)
                else fuse_lora(some, takes, recipe.adapter_dtype, recipe.compute, recipe.dropout)
            ),
        )

    def change(op: Op) -> Iterable[Op]:
        made = changed(op)
        return made if op.gradient != "none" else (o._replace(gradient="none") for o in made)

    def changed(op: Op) -> Iterable[Op]:
        w = matrix(op)
        if any(v.group == "adapter" and v.matrix for v in op.weights):  # joined already
            return (op,)
        stacked = next((v for v in op.weights if v.stacked and v.stored and not v.kernel), None)
        if stacked is not None:
            return (experts_fp8(op, stacked, recipe.compute),)
        if w is None:
            looks_up = any(v.rows and v.group == "embedding" for v in op.weights)
            return tuple(_lora_embedding(op, recipe.adapter_dtype)) if looks_up and _named(op, recipe) else (op,)
        if takes(op) and recipe.library == "litgpt":
            return tuple(
                litgpt_lora.adapt(op, recipe.targets, recipe.adapter_dtype, recipe.compute, recipe.dropout, older)
            )
        if takes(op):
            called = op if op.reads else _as_called(op)
            adapted = tuple(_dressed(o, recipe) for o in adapt(called, adapter, recipe.autocast))
            return (_idle(op, adapted), op) if w.direct and not w.stored else adapted
        if w.kernel and recipe.running is not None:
            return (op,) if op.skipped else tuple(product(op, op.name, op.writes[0].name, recipe.running))
        if w.stored:
            made = op.writes[0].name
            return tuple(quantised_linear(op, op.name, made, recipe.compute, older, recipe.keeps, recipe.copies))
        return (op,)

    return rewrite(stack, change)


def freeze(stack: Stack, axes: dict[str, int], trainable: int) -> tuple[Stack, dict[str, int]]:
    """Only the last `trainable` layers train: runs are split where the frozen layers end.

    Embeddings, final norm and head are frozen too, as LLaMA-Factory's freeze tuning has it.
    """

    def still(operations: tuple[Op, ...]) -> tuple[Op, ...]:
        return tuple(o._replace(weights=tuple(w._replace(trains=False) for w in o.weights)) for o in operations)

    axes = dict(axes)
    frozen = sum(len(r.blocks) * axes[r.times] for r in stack.runs) - trainable
    runs: list[Run] = []
    for run in stack.runs:
        period, copies = len(run.blocks), axes[run.times]
        whole = min(copies, frozen // period)
        part = min(period * (copies - whole), frozen - whole * period)
        frozen -= whole * period + part
        stilled = tuple(b._replace(ops=still(b.ops)) for b in run.blocks)
        mixed = (*stilled[:part], *run.blocks[part:])
        between = still(run.before)
        for blocks, name, count in (
            (stilled, "frozen", whole),
            (mixed, "mixed", 1 if part else 0),
            (run.blocks, "trained", copies - whole - (1 if part else 0)),
        ):
            axes[f"{run.times}.{name}"] = count
            if count:
                runs.append(Run(blocks, f"{run.times}.{name}", between))
                between = ()
    return Stack(still(stack.before), tuple(runs), still(stack.after), stack.loss), axes


def _saved(op: Op, saved: tuple[str, ...]) -> Op:
    """peft's `modules_to_save`: a copy of the module trains, and the frozen original stays beside it."""
    own = [w for w in op.weights if w.group != "buffer"]
    ours = {w.name: f"{w.name}.saved" for w in own if inside(w.name.rpartition(".")[0], saved)}
    if op.name.rpartition(".")[2] in saved:
        ours = {w.name: f"{w.name}.saved" for w in own}
    if not ours:
        return op
    copies = tuple(
        w._replace(name=ours[w.name], group="adapter", trains=True, matrix=False) for w in op.weights if w.name in ours
    )
    keeps = tuple(k._replace(what=ours.get(k.what, k.what), of=ours.get(k.of, k.of)) for k in op.keeps)
    scratch = tuple(s._replace(of=ours.get(s.of, s.of)) for s in op.scratch_back)
    return op._replace(weights=(*copies, *op.weights), keeps=keeps, scratch_back=scratch)


def _as_called(op: Op) -> Op:
    """A layer that is not called, of which the model reads the weight alone, as if it were: adapters are around it."""
    w = next(w for w in op.weights if w.matrix)
    out, into = (" ".join(axes) for axes in (w.shape.split()[: w.rows], w.shape.split()[w.rows :]))
    return ops.linear(op.name, "of nothing", "nothing", out, into, w.group)


def _idle(op: Op, adapted: tuple[Op, ...]) -> Op:
    """The adapters alone, around a layer that nobody calls."""
    own = {w.name: w._replace(trains=False, idle=True) for o in adapted for w in o.weights if w.group == "adapter"}
    return Op(f"{op.name}.adapters", weights=tuple(own.values()), gradient="none")


def _dressed(op: Op, recipe: Recipe) -> Op:
    adapters = tuple(
        w if w.dtype or w.group != "adapter" else w._replace(dtype=recipe.adapter_dtype) for w in op.weights
    )
    return op._replace(weights=adapters)


# trl casts back to half precision what has one of these in its module's name.
# Source: trl 0.12 trainer/utils.py peft_module_casting_to_bf16.
_NARROWED = ("lm_head", "embed_tokens", "wte", "wpe")


def _narrowed(stack: Stack) -> frozenset[str]:
    """The weights that trl casts back: a tied one goes by either name, a bias by none."""
    return frozenset(
        w.name
        for some in outside(stack)
        for op in some
        for w in op.weights
        if w.rows and any(part in name for part in _NARROWED for name in (op.name, w.name))
    )


def _frozen(w: Weight, recipe: Recipe, head: frozenset[str], narrow: frozenset[str]) -> Weight:
    """A base weight under an adapter: frozen, quantised unless it is the head's, or cast unless it is `narrow`."""
    left = (*recipe.skip, *recipe.saved)
    how = recipe.running
    if how is not None and w.name not in head and runs_so(w, how, left):
        w = w._replace(dtype=w.dtype or recipe.weights, trains=False, kernel=how.kernel)
        whole = w.stacked and how.whole
        return w if whole else w._replace(stored=resident(w, how))
    if how is not None:
        wide = "fp32" if wide_bias(w, how) else recipe.weights
        return w._replace(dtype=w.dtype or wide, trains=False)
    takes = quantisable(w, left) or (w.stacked and recipe.quantization == "fp8")
    if recipe.quantization and takes and w.name not in head:
        kept = stored(w, recipe.quantization, recipe.double_quant, recipe.block_size)
        dtype = "fp16" if recipe.library == "litgpt" else w.dtype or recipe.weights  # lightning quantises from fp16
        return w._replace(dtype=dtype, trains=False, stored=kept)
    dtype = "fp32" if recipe.preparation and w.name not in narrow else w.dtype or recipe.weights
    return w._replace(dtype=dtype, trains=False)


def runs_so(w: Weight, how: Running, skip: tuple[str, ...]) -> bool:
    """Whether a weight is of those that run so: matrices of linear layers, experts, or one of the two."""
    if w.stacked:
        return takes_experts(how) and not inside(w.name.rpartition(".")[0], skip)
    return not takes_alone(how) and quantisable(w, skip)


def quantisable(w: Weight, skip: tuple[str, ...] = ()) -> bool:
    """Whether bitsandbytes takes it: the matrix of a plain linear layer.

    Source: transformers 5.24 integrations/bitsandbytes.py replace_with_bnb_linear.
    """
    return w.matrix and not w.viewed and not inside(w.name.rpartition(".")[0], skip)


def _named(op: Op, recipe: Recipe) -> bool:
    return op.name.rpartition(".")[2] in recipe.targets
