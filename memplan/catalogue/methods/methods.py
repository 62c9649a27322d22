"""Methods as rewrites of a stack: freezing, adapters, quantised storage, weight dtypes.

A rewrite takes operations and returns operations; nothing else in the package knows what LoRA is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import matrix, rewrite, rewrite_lists, rewrite_weights
from memplan.catalogue.methods import litgpt_lora
from memplan.catalogue.methods.fused_lora import fuse_lora
from memplan.catalogue.methods.parameter_lora import adapt_parameters, represented_layers
from memplan.catalogue.methods.peft_layers import LAYERS, SHARED, Wrapped, features
from memplan.catalogue.quantization.inference_formats import (
    InferenceFormat,
    product,
    resident,
    takes_alone,
    takes_experts,
    wide_bias,
    with_triton,
)
from memplan.catalogue.quantization.quantization import dequantise, experts_fp8, family_of, quantised_linear, stored
from memplan.core.ir import Keep, Op, Run, Scratch, Stack, Tensor, Weight, operations, outside
from memplan.core.records import NamedTuple
from memplan.models.peft_methods import PEFT_METHODS, Value


class Recipe(NamedTuple):
    """The resolved training method: structure only, no sizes.

    It has more than 20 fields because each rewrites the operations by itself, and a stack is cached by all of them.

    kind           name of the method, or `stored` for quantised weights without training
    weights        dtype the model is loaded in
    compute        compute dtype of quantised layers
    autocast       whether the run uses autocast
    targets        names of the adapted linear layers, ("all-linear",), or LitGPT's command-line switches
    saved          peft's `modules_to_save`
    dropout        whether the adapters have dropout
    adapter_dtype  dtype of the adapters
    quantization   format of the quantised weights, or ""
    double_quant   whether bitsandbytes' scales are quantised too
    block_size     weights per scale
    skip           modules that are not quantised
    preparation    "", "fp32" (prepare_model_for_kbit_training) or "trl" (most embeddings and heads cast back after it)
    fused          adapted layers are fused into one autograd function if one exists
    library        whose adapters they are: `peft` or `litgpt`
    again          DoRA multiplies by the base weight a second time even without dropout, as peft did until 0.13
    frozen         parts of the model that neither train nor are adapted, see `PARTS`
    keeps          torch keeps GPTQ's dequantised matrix for backward, see `quantised_linear`
    packed         quantised weights are loaded from a quantised checkpoint, not quantised while loading
    copies         a product dequantises packed weights first, as it does for more than a few rows and in training
    running        how matrices run whose format nothing can train over
    rank           rank of the adapters of methods other than LoRA
    options        other settings of those methods, by peft's names
    moved          the Trainer has moved the model, and so all buffers, to the GPU
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
    running: InferenceFormat | None = None
    rank: int = 0
    options: tuple[tuple[str, Value], ...] = ()
    moved: bool = False

    @property
    def is_dora(self) -> bool:
        return "dora" in self.kind


def head_of(stack: Stack) -> Op | None:
    """The output projection of a language model, which PEFT's `all-linear` and quantisation skip; None without one.

    It is the last operation with a matrix.
    """
    last = next((op for op in reversed(stack.after) if any(w.rows for w in op.weights)), None)
    return None if last is None or any(w.group == "head" for w in last.weights) else last


def inside(path: str, modules: tuple[str, ...]) -> bool:
    """Whether a module's path is, or lies inside, one of the `modules`.

    Source: peft 0.21 tuners/tuners_utils.py _check_target_module_exists.
    """
    return not set(path.split(".")).isdisjoint(modules)


def adapt(op: Op, recipe: Recipe) -> Iterator[Op]:
    """peft's LoRA layer around a frozen linear layer: `result + lora_B(lora_A(dropout(x))) * scaling`.

    If the base is unquantised, FP8 or GPTQ, the input is cast to the adapter's dtype and the sum back to the result's.
    If it is 4-bit, the result is cloned first, and nothing is cast under autocast.
    Source: peft 0.21 tuners/lora/layer.py Linear.forward, tuners/lora/bnb.py Linear4bit.forward, Linear8bitLt.forward,
    tuners/lora/gptq.py, tuners/lora/awq.py; 0.13 tuners/lora/gptq.py, which casts as around a 4-bit layer.
    """
    (x,), y = op.reads, op.writes[0]
    n, p = op.name, y.name
    lead, out, into = ops.axes_of(op)
    flat = op.gradient == "new"
    w = matrix(op)
    assert w is not None
    scheme = family_of(w) if w.stored else ""
    quantised = scheme in ("4bit", "int8", "awq") or (scheme == "gptq" and not recipe.keeps)
    casts = not (quantised and recipe.autocast)
    result = f"{p}.base"
    yield from (
        quantised_linear(op, f"{n}.base_layer", result, recipe.compute, keeps=recipe.keeps, copies=recipe.copies)
        if scheme
        else (_as_base_layer(op, result),)
    )
    if w.stored and w.stored[0].dtype == "uint8/2":
        yield ops.copy(f"{n}.clone", result, f"{p}.clone", y.shape)
        yield ops.release_names(result)
        result = f"{p}.clone"
    inner = x
    if casts:
        inner = f"{p}.x"
        yield ops.cast(f"{n}.cast", x, inner, f"{lead} {into}", recipe.adapter_dtype)
    adapted = inner
    if recipe.dropout:
        adapted = f"{p}.dropped"
        yield ops.dropout(f"{n}.lora_dropout", inner, adapted, f"{lead} {into}")
    if recipe.is_dora:
        yield from _dora(op, adapted, result, recipe)
    else:
        yield ops.linear(f"{n}.lora_A", adapted, f"{p}.a", "r", into, "adapter", lead=lead, flat=flat)
        yield ops.linear(f"{n}.lora_B", f"{p}.a", f"{p}.b", out, "r", "adapter", lead=lead, flat=flat)
        yield ops.scale(f"{n}.scaling", f"{p}.b", f"{p}.delta", y.shape)
    if quantised and not recipe.is_dora:
        if casts:
            yield ops.cast(f"{n}.cast_back", f"{p}.delta", f"{p}.delta.cast", y.shape, f"={result}")
        add = ops.add(f"{n}.add", result, f"{p}.delta.cast" if casts else f"{p}.delta", p, y.shape)
        yield add._replace(view=scheme == "gptq")  # peft's older GPTQ layer adds into the result in place
    else:
        yield ops.add(f"{n}.add", result, f"{p}.delta", f"{p}.sum", y.shape)
        if recipe.is_dora:
            yield ops.release_names(adapted)
        yield ops.cast(f"{n}.cast_back", f"{p}.sum", p, y.shape, f"={result}" if casts else f"={p}.sum")
    yield ops.release_names(x, inner)  # a module call holds its arguments until it returns


def _lora_embedding(op: Op, dtype: str) -> Iterator[Op]:
    """peft's LoRA around an embedding: rows of A are looked up as the embedding's are, then multiplied by B.

    A is stored transposed, so its gradient is computed for the lookup and then copied into A's layout.
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


def _as_base_layer(op: Op, result: str) -> Op:
    return op._replace(name=f"{op.name}.base_layer", writes=(op.writes[0]._replace(name=result),))


_DORA = "peft 0.21 tuners/lora/dora.py"
_TRANSPOSED = f"{_DORA} with utils/other.py transpose, which wraps the weight in a parameter, unless a cast copied it"


def _dora(op: Op, x: str, result: str, recipe: Recipe) -> Iterator[Op]:
    """DoRA: the row norms of `W + scaling * B A`, as constants, scale the product and the base result.

    The product B A is computed by running the adapter on an identity matrix as wide as the input.
    Source: peft 0.21 tuners/lora/dora.py DoraLinearLayer.forward.
    """
    y = op.writes[0]
    n, p = f"{op.name}.dora", y.name
    lead, out, into = ops.axes_of(op)
    flat = op.gradient == "new"
    w = matrix(op)
    assert w is not None
    full, like = f"{out} {into}", f"={x}"
    magnitude = Weight(f"{op.name}.lora_magnitude_vector.weight", out, "adapter", recipe.adapter_dtype)
    yield Op(f"{n}.eye", (), (Tensor(f"{p}.eye", f"{into} {into}", recipe.adapter_dtype),))
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
    if recipe.dropout or recipe.again:  # the base result must see the same dropped input
        base = f"{p}.dropped_base"
        weight, wraps = f"{p}.w", ()
        if w.transposed and not w.stored and w.dtype == recipe.adapter_dtype:
            wraps = (Tensor(f"{p}.transposed", full, w.dtype),)
        if wraps and recipe.autocast and w.dtype == "fp32":  # autocast caches the cast of a parameter
            weight = f"{p}.low"
            yield Op(
                f"{n}.transposed",
                (f"{p}.w",),
                (Tensor(weight, full, recipe.compute),),
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
    for a, b, output in ((f"{p}.less", base, f"{p}.base_part"), (f"{p}.scale", f"{p}.b", f"{p}.lora_part")):
        yield Op(
            f"{n}.times",
            (a, b),
            (Tensor(output, y.shape),),
            (),
            (Keep(b, a), Keep(a, b)),
            scratch_back=(Scratch(Tensor("product", y.shape, f"={output}"), a),),
            source=f"{ops.DERIVATIVES}: mul.Tensor",
        )
    yield ops.scale(f"{n}.scaling", f"{p}.lora_part", f"{p}.lora_scaled", y.shape)
    yield ops.add(f"{n}.sum", f"{p}.base_part", f"{p}.lora_scaled", f"{p}.delta", y.shape)
    yield ops.release_names(*(f"{p}.{t}" for t in ("product", "w", "norm", "scale", "b")), base)
    yield ops.release_names(f"{p}.eye_in", f"{p}.eye_a")._replace(
        needs_recording=True
    )  # the product's graph holds them


LORA = ("lora", "qlora", "dora", "qdora")
ADAPTERS = (*LORA, *PEFT_METHODS)


# The parts of a model that can be frozen separately, with the groups of their weights. `language` is the remainder.
PARTS = {"vision": ("vision",), "projector": ("projector",), "language": ()}


def apply(stack: Stack, recipe: Recipe, axes: Mapping[str, int] = MappingProxyType({})) -> Stack:
    """Return the stack as the method trains it: dtypes on every weight, adapters around their targets.

    `axes` are the sizes of the model's axes, which some methods' adapters depend on.
    """
    return _idle_unreached(_drop_skipped(_rewritten(stack, recipe, axes)))


def _drop_skipped(stack: Stack) -> Stack:
    """Reduce operations that the run skips to their weights."""

    def change(op: Op) -> Iterable[Op]:
        if not op.skipped:
            return (op,)
        weights = tuple(w._replace(trains=False, idle=w.trains) for w in op.weights)
        return (Op(op.name, weights=weights, gradient="none"),) if weights else ()

    return rewrite_lists(stack, lambda listed: tuple(new for op in listed for new in change(op)))


def _idle_unreached(stack: Stack) -> Stack:
    """Mark weights as idle if only operations without a gradient use them."""
    reached = {w.name for op in operations(stack) if op.gradient != "none" for w in op.weights}
    if all(w.name in reached or not w.trains for op in operations(stack) for w in op.weights):
        return stack
    return rewrite_weights(
        stack, lambda w: w if w.name in reached or not w.trains else w._replace(trains=False, idle=True)
    )


def is_frozen(w: Weight, frozen: tuple[str, ...]) -> bool:
    """Whether a weight belongs to a frozen part of the model, which neither trains nor is adapted."""
    part = next((part for part, groups in PARTS.items() if w.group in groups), "language")
    return part in frozen


def _wrapped(op: Op, recipe: Recipe, axes: Mapping[str, int]) -> Wrapped:
    """The linear layer as a method other than LoRA wraps it."""
    _, out, into = ops.axes_of(op)
    return Wrapped(
        op,
        features(out, axes),
        features(into, axes),
        recipe.rank,
        dict(recipe.options),
        recipe.adapter_dtype,
        recipe.compute,
        recipe.autocast,
        recipe.dropout,
        recipe.moved,
    )


def _rewritten(stack: Stack, recipe: Recipe, axes: Mapping[str, int]) -> Stack:
    if recipe.kind in ("full", "freeze"):
        return rewrite_weights(
            stack,
            lambda w: w._replace(dtype=w.dtype or recipe.weights, trains=w.trains and not is_frozen(w, recipe.frozen)),
        )
    head = head_of(stack)
    unquantised = frozenset(w.name for w in head.weights) if head and "lm_head" in recipe.skip else frozenset[str]()
    cast_back = _cast_back_by_trl(stack) if recipe.preparation == "trl" else frozenset[str]()
    stack = rewrite_weights(stack, lambda w: _frozen(w, recipe, unquantised, cast_back))
    if recipe.running is not None and recipe.running.kernel == "triton":
        stack = rewrite_lists(stack, with_triton)
    if recipe.saved:
        stack = rewrite(stack, lambda op: (_with_saved_copies(op, recipe.saved),))
    stood_for = represented_layers(operations(stack)) if recipe.kind not in LAYERS else frozenset[str]()
    all_linear = recipe.targets == ("all-linear",)

    def takes(op: Op) -> bool:
        if recipe.library == "litgpt":
            return litgpt_lora.takes(op, recipe.targets)
        w, name = matrix(op), op.name.rpartition(".")[2]
        if w is None or is_frozen(w, recipe.frozen) or inside(op.name, recipe.saved) or name in stood_for:
            return False
        return _is_target(op, recipe) or (all_linear and (head is None or op.name != head.name))

    def takes_parameter(w: Weight) -> bool:
        return not is_frozen(w, recipe.frozen) and (all_linear or any(name in recipe.targets for name in w.stands_for))

    if stood_for:
        stack = rewrite_lists(stack, lambda listed: adapt_parameters(listed, takes_parameter, recipe.adapter_dtype))

    older = recipe.library == "litgpt"

    if recipe.fused:
        stack = rewrite_lists(
            stack,
            lambda listed: (
                listed
                if any(op.skipped for op in listed)
                else fuse_lora(listed, takes, recipe.adapter_dtype, recipe.compute, recipe.dropout)
            ),
        )

    wrapped: list[Wrapped] = []

    def change(op: Op) -> Iterable[Op]:
        new = replacement(op)
        return new if op.gradient != "none" else (o._replace(gradient="none") for o in new)

    def replacement(op: Op) -> Iterable[Op]:
        w = matrix(op)
        if any(v.group == "adapter" and v.matrix for v in op.weights):  # fused already
            return (op,)
        stacked = next((v for v in op.weights if v.stacked and v.stored and not v.kernel), None)
        if stacked is not None:
            return (experts_fp8(op, stacked, recipe.compute),)
        if w is None:
            is_embedding = recipe.kind in LORA and any(v.rows and v.group == "embedding" for v in op.weights)
            adapts = is_embedding and _is_target(op, recipe)
            return tuple(_lora_embedding(op, recipe.adapter_dtype)) if adapts else (op,)
        if takes(op) and recipe.library == "litgpt":
            return tuple(
                litgpt_lora.adapt(op, recipe.targets, recipe.adapter_dtype, recipe.compute, recipe.dropout, older)
            )
        if takes(op):
            called = op if op.reads else _as_called(op)
            if recipe.kind in LAYERS:
                wrapped.append(_wrapped(called, recipe, axes))
                new = LAYERS[recipe.kind](wrapped[-1])
            else:
                new = adapt(called, recipe)
            adapted = tuple(_with_adapter_dtype(o, recipe) for o in new)
            return (_idle_adapters(op, adapted), op) if w.bypasses_module and not w.stored else adapted
        if w.kernel and recipe.running is not None:
            return (op,) if op.skipped else tuple(product(op, op.name, op.writes[0].name, recipe.running))
        if w.stored:
            result = op.writes[0].name
            return tuple(quantised_linear(op, op.name, result, recipe.compute, older, recipe.keeps, recipe.copies))
        return (op,)

    stack = rewrite(stack, change)
    if recipe.kind not in SHARED or not wrapped:
        return stack
    return stack._replace(before=(SHARED[recipe.kind](tuple(wrapped), recipe.adapter_dtype), *stack.before))


def freeze(stack: Stack, axes: dict[str, int], trainable: int) -> tuple[Stack, dict[str, int]]:
    """Return the stack with only the last `trainable` layers training, runs split where the frozen layers end.

    Embeddings, final norm and head are frozen too, as in LLaMA-Factory's freeze tuning.
    """

    def frozen_ops(operations: tuple[Op, ...]) -> tuple[Op, ...]:
        return tuple(o._replace(weights=tuple(w._replace(trains=False) for w in o.weights)) for o in operations)

    axes = dict(axes)
    frozen = sum(len(r.blocks) * axes[r.times] for r in stack.runs) - trainable
    runs: list[Run] = []
    for run in stack.runs:
        period, copies = len(run.blocks), axes[run.times]
        periods = min(copies, frozen // period)
        part = min(period * (copies - periods), frozen - periods * period)
        frozen -= periods * period + part
        frozen_blocks = tuple(b._replace(ops=frozen_ops(b.ops)) for b in run.blocks)
        mixed = (*frozen_blocks[:part], *run.blocks[part:])
        between = frozen_ops(run.before)
        for blocks, name, count in (
            (frozen_blocks, "frozen", periods),
            (mixed, "mixed", 1 if part else 0),
            (run.blocks, "trained", copies - periods - (1 if part else 0)),
        ):
            axes[f"{run.times}.{name}"] = count
            if count:
                runs.append(Run(blocks, f"{run.times}.{name}", between))
                between = ()
    return Stack(frozen_ops(stack.before), tuple(runs), frozen_ops(stack.after), stack.loss), axes


def _with_saved_copies(op: Op, saved: tuple[str, ...]) -> Op:
    """peft's `modules_to_save`: a copy of the module trains, and the frozen original stays in memory."""
    parameters = [w for w in op.weights if w.group != "buffer"]
    copy_of = {w.name: f"{w.name}.saved" for w in parameters if inside(w.name.rpartition(".")[0], saved)}
    if op.name.rpartition(".")[2] in saved:
        copy_of = {w.name: f"{w.name}.saved" for w in parameters}
    if not copy_of:
        return op
    copies = tuple(
        w._replace(name=copy_of[w.name], group="adapter", trains=True, matrix=False)
        for w in op.weights
        if w.name in copy_of
    )
    keeps = tuple(k._replace(what=copy_of.get(k.what, k.what), of=copy_of.get(k.of, k.of)) for k in op.keeps)
    scratch = tuple(s._replace(of=copy_of.get(s.of, s.of)) for s in op.scratch_back)
    return op._replace(weights=(*copies, *op.weights), keeps=keeps, scratch_back=scratch)


def _as_called(op: Op) -> Op:
    """A layer whose weight the model reads without calling it, as if it were called, so that adapters can wrap it."""
    w = next(w for w in op.weights if w.matrix)
    out, into = (" ".join(axes) for axes in (w.shape.split()[: w.rows], w.shape.split()[w.rows :]))
    return ops.linear(op.name, "of nothing", "nothing", out, into, w.group)


def _idle_adapters(op: Op, adapted: tuple[Op, ...]) -> Op:
    """Only the weights of the adapters around a layer that is never called."""
    idle = {w.name: w._replace(trains=False, idle=True) for o in adapted for w in o.weights if w.group == "adapter"}
    return Op(f"{op.name}.adapters", weights=tuple(idle.values()), gradient="none")


def _with_adapter_dtype(op: Op, recipe: Recipe) -> Op:
    adapters = tuple(
        w if w.dtype or w.group != "adapter" else w._replace(dtype=recipe.adapter_dtype) for w in op.weights
    )
    return op._replace(weights=adapters)


# trl casts modules back to half precision if their name contains one of these.
# Source: trl 0.12 trainer/utils.py peft_module_casting_to_bf16.
_CAST_BACK = ("lm_head", "embed_tokens", "wte", "wpe")


def _cast_back_by_trl(stack: Stack) -> frozenset[str]:
    """Names of the weights that trl casts back. A tied weight counts under either name; biases are not cast."""
    return frozenset(
        w.name
        for listed in outside(stack)
        for op in listed
        for w in op.weights
        if w.rows and any(part in name for part in _CAST_BACK for name in (op.name, w.name))
    )


def _frozen(w: Weight, recipe: Recipe, head: frozenset[str], cast_back: frozenset[str]) -> Weight:
    """A base weight under an adapter: frozen, and either quantised or cast.

    head       names of the head's weights, which are not quantised
    cast_back  names of the weights that stay in half precision
    """
    skipped = (*recipe.skip, *recipe.saved)
    running = recipe.running
    if running is not None and w.name not in head and runs_in_format(w, running, skipped):
        w = w._replace(dtype=w.dtype or recipe.weights, trains=False, kernel=running.kernel)
        is_dequantised = w.stacked and running.whole
        return w if is_dequantised else w._replace(stored=resident(w, running))
    if running is not None:
        wide = "fp32" if wide_bias(w, running) else recipe.weights
        return w._replace(dtype=w.dtype or wide, trains=False)
    takes = can_quantise(w, skipped) or (w.stacked and recipe.quantization == "fp8")
    if recipe.quantization and takes and w.name not in head:
        storage = stored(w, recipe.quantization, recipe.double_quant, recipe.block_size)
        dtype = "fp16" if recipe.library == "litgpt" else w.dtype or recipe.weights  # lightning quantises from fp16
        return w._replace(dtype=dtype, trains=False, stored=storage)
    dtype = "fp32" if recipe.preparation and w.name not in cast_back else w.dtype or recipe.weights
    return w._replace(dtype=dtype, trains=False)


def runs_in_format(w: Weight, how: InferenceFormat, skip: tuple[str, ...]) -> bool:
    """Whether a weight runs in the format of `how`, which covers linear layers, stacked experts, or both."""
    if w.stacked:
        return takes_experts(how) and not inside(w.name.rpartition(".")[0], skip)
    return not takes_alone(how) and can_quantise(w, skip)


def can_quantise(w: Weight, skip: tuple[str, ...] = ()) -> bool:
    """Whether bitsandbytes can quantise the weight: it is the matrix of a plain linear layer.

    Source: transformers 5.24 integrations/bitsandbytes.py replace_with_bnb_linear.
    """
    return w.matrix and not w.is_read_as_view and not inside(w.name.rpartition(".")[0], skip)


def _is_target(op: Op, recipe: Recipe) -> bool:
    """Whether the path of the layer ends with a target."""
    return any(f".{op.name}".endswith(f".{target}") for target in recipe.targets)
