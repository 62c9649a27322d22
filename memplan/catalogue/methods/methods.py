"""Methods as rewrites of a stack: freezing, adapters, quantised storage, weight dtypes.

A rewrite takes operations and returns operations; nothing else in the package knows what LoRA is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import (
    adaptable,
    idle,
    matrix,
    once_per_stack,
    rewrite,
    rewrite_blocks,
    rewrite_lists,
    rewrite_weights,
    with_last_adapter_gathered,
)
from memplan.catalogue.methods import litgpt_lora
from memplan.catalogue.methods.dora import adapt_embedding, dora
from memplan.catalogue.methods.fused_lora import LIBRARIES, LoraFunctions, fuse_lora, with_matrix_buffer
from memplan.catalogue.methods.parameter_lora import adapt_parameters, represented_layers, with_dequantised_stacks
from memplan.catalogue.methods.peft_layers import LAYERS, SHARED, Wrapped, features
from memplan.catalogue.quantization.fused_4bit import Copies
from memplan.catalogue.quantization.inference_formats import (
    InferenceFormat,
    product,
    resident,
    takes_alone,
    takes_experts,
    wide_bias,
    with_triton,
)
from memplan.catalogue.quantization.quantization import experts_fp8, family_of, quantised_linear, stored
from memplan.core.frozen import FrozenDict
from memplan.core.ir import Block, Op, Stack, Weight, operations, outside
from memplan.core.records import NamedTuple
from memplan.models.peft_methods import PEFT_METHODS, Value, trains_prefix, virtual_tokens

if TYPE_CHECKING:
    from memplan.catalogue.methods.selection import Selection

    Shared = Callable[[tuple[Wrapped, ...], str], Op]


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
    wide           modules whose weights are loaded in fp32 though the others are not
    experts        whether stacked experts are quantised too, by bitsandbytes' parametrization
    fp4_experts    an fp8 checkpoint has its stacked experts in fp4
    preparation    "", "fp32" (prepare_model_for_kbit_training), or whose training casts weights back after it: "trl",
                   "axolotl" or "axolotl-0.12"
    fused          whose autograd functions fuse adapted layers (unsloth, unsloth-2026, axolotl), or ""
    sharded_dtype  dtype of adapters that FSDP1 shards: peft casts their inputs to it, then FSDP1 to the adapters' dtype
                   once gathered
    casts_all      FSDP casts weights that the model keeps in fp32, too, once gathered
    fp32_ends      norms, embeddings and head train in fp32, whatever dtype the other weights have
    library        whose adapters they are: `peft` or `litgpt`
    again          DoRA multiplies by the base weight a second time even without dropout, as peft did until 0.13
    frozen         parts of the model that neither train nor are adapted, see `PARTS`
    keeps          torch keeps GPTQ's dequantised matrix for backward, see `quantised_linear`
    packed         quantised weights are loaded from a quantised checkpoint, not quantised while loading
    copies         when a product dequantises packed weights first: `always` in training
    running        how matrices run whose format nothing can train over
    rank           rank of the adapters of methods other than LoRA
    options        other settings of those methods, by peft's names
    moved          the Trainer has moved the model, and so all buffers, to the GPU
    selection      modules chosen by their paths; None if their names say which
    bias           biases that train: `none`, `all`, or `lora_only` for those of adapted layers
    tokens         number of trained rows of the embeddings
    magnitudes     dtype of DoRA's magnitudes, or "" if it is the adapters'
    decomposition  peft's `init_lora_weights` that decomposes the loaded matrices on the GPU: pissa, pissa_niter, olora
    ties           of saved modules, the embeddings and a head tied to them share one copy (`ensure_weight_tying`)
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
    wide: tuple[str, ...] = ()
    experts: bool = False
    fp4_experts: bool = False
    preparation: str = ""
    fused: str = ""
    fp32_ends: bool = False
    sharded_dtype: str = ""
    casts_all: bool = False
    library: str = "peft"
    again: bool = False
    frozen: tuple[str, ...] = ()
    keeps: bool = False
    packed: bool = False
    copies: Copies = "always"
    running: InferenceFormat | None = None
    rank: int = 0
    options: tuple[tuple[str, Value], ...] = ()
    moved: bool = False
    selection: Selection | None = None
    bias: str = "none"
    tokens: int = 0
    magnitudes: str = ""
    decomposition: str = ""
    ties: bool = False

    @property
    def virtual_tokens(self) -> int:
        """Number of trained tokens before each sequence."""
        return virtual_tokens(dict(self.options))

    @property
    def prefix(self) -> int:
        """Number of virtual tokens of which only keys and values exist, in every layer."""
        return self.virtual_tokens if trains_prefix(self.kind) else 0

    def by_rows(self) -> Recipe:
        """Return the recipe of a pass without gradients, in which few rows may read packed matrices."""
        return self._replace(copies="by rows") if self.copies else self

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
    return bool(modules) and not set(path.split(".")).isdisjoint(modules)


def ends_like(path: str, modules: tuple[str, ...]) -> bool:
    """Whether a name in a module's path ends like one of the `modules`, as `pre_classifier` does like `classifier`.

    Source: peft 0.21 utils/other.py _set_trainable.
    """
    return any(part.endswith(modules) for part in path.split("."))


@lru_cache(maxsize=1024)
def adapted(op: Op, recipe: Recipe) -> tuple[Op, ...]:
    """Return the linear layer with LoRA around it, for all models that have one like it."""
    return tuple(_with_adapter_dtype(o, recipe) for o in adapt(op, recipe))


def adapt(op: Op, recipe: Recipe) -> Iterator[Op]:
    """peft's LoRA layer around a frozen linear layer: `result + lora_B(lora_A(dropout(x))) * scaling`.

    If the base is unquantised, FP8, GPTQ, HQQ or torchao's, the input is cast to the adapter's dtype and the sum back
    to the result's. If it is 4-bit, the result is cloned first. Under autocast nothing is cast around 4 bits and HQQ.
    Source: peft 0.21 tuners/lora/layer.py Linear.forward, tuners/lora/bnb.py Linear4bit.forward, Linear8bitLt.forward,
    tuners/lora/gptq.py, awq.py, hqq.py, torchao.py; 0.13 tuners/lora/gptq.py, which casts as around a 4-bit layer.
    """
    (x,), y = op.reads, op.writes[0]
    n, p = op.name, y.name
    lead, out, into = ops.axes_of(op)
    flat = op.gradient == "new"
    w = adaptable(op)
    assert w is not None
    scheme = family_of(w) if w.stored else ""
    quantised = scheme in ("4bit", "int8", "awq") or (scheme == "gptq" and not recipe.keeps)
    casts = not ((quantised or scheme == "hqq") and recipe.autocast)
    result = f"{p}.base"
    yield from (
        quantised_linear(op, f"{n}.base_layer", result, recipe.compute, keeps=recipe.keeps, copies=recipe.copies)
        if scheme
        else (_as_base_layer(op, result),)
    )
    if scheme == "4bit" and w.stored[0].dtype == "uint8/2":
        yield ops.copy(f"{n}.clone", result, f"{p}.clone", y.shape)
        yield ops.release_names(result)
        result = f"{p}.clone"
    inner = x
    if casts:
        inner = f"{p}.x"
        kept = "" if recipe.is_dora else recipe.sharded_dtype
        yield ops.cast(f"{n}.cast", x, inner, f"{lead} {into}", kept or recipe.adapter_dtype)
    adapted = inner
    if recipe.dropout:
        adapted = f"{p}.dropped"
        yield ops.dropout(f"{n}.lora_dropout", inner, adapted, f"{lead} {into}")
    if recipe.is_dora:
        again, autocast = recipe.dropout or recipe.again, recipe.compute if recipe.autocast else ""
        yield from dora(op, adapted, result, recipe.adapter_dtype, again, autocast, recipe.magnitudes)
    else:
        if casts and recipe.sharded_dtype:
            yield ops.cast(f"{n}.lora_A.cast", adapted, f"{p}.as_gathered", f"{lead} {into}", recipe.adapter_dtype)
            adapted = f"{p}.as_gathered"
        yield ops.linear(f"{n}.lora_A", adapted, f"{p}.a", "r", into, "adapter", lead=lead, flat=flat)
        if recipe.dropout:
            yield ops.release_names(adapted)  # which autocast has copied
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


def _as_base_layer(op: Op, result: str) -> Op:
    return op._replace(name=f"{op.name}.base_layer", writes=(op.writes[0]._replace(name=result),))


LORA = ("lora", "qlora", "dora", "qdora")
ADAPTERS = (*LORA, *PEFT_METHODS)


# The parts of a model that can be frozen separately, with the groups of their weights. `language` is the remainder.
PARTS = {"vision": ("vision",), "audio": ("audio",), "projector": ("projector",), "language": ()}


def apply(
    stack: Stack, recipe: Recipe, axes: Mapping[str, int] = MappingProxyType({}), keeps_casts: bool = False
) -> Stack:
    """Return the stack as the method trains it: dtypes on every weight, adapters around their targets.

    axes         sizes of the model's axes, which some methods' adapters depend on
    keeps_casts  an earlier pass ran the operations that this one skips, and autocast keeps their weights' casts
    """
    needs_none = recipe.kind in ("full", "freeze", "stored", *LORA) and not recipe.fused
    return _applied(stack, recipe, FrozenDict({} if needs_none else axes), keeps_casts)


@once_per_stack
def _applied(stack: Stack, recipe: Recipe, axes: FrozenDict, keeps_casts: bool) -> Stack:
    if recipe.wide:
        stack = rewrite_weights(stack, lambda w: w._replace(dtype="fp32") if inside(w.name, recipe.wide) else w)
    if recipe.casts_all:
        stack = rewrite_weights(stack, lambda w: w if w.group == "buffer" else w._replace(dtype=""))
    stack = _rewritten(stack, recipe, axes)
    if recipe.kind == "xlora":
        from memplan.catalogue.methods.xlora import with_scalings

        stack = with_scalings(stack, dict(recipe.options), recipe.weights, axes)
    return _idle_unreached(_idle_unread(_drop_skipped(stack, keeps_casts)))


def _drop_skipped(stack: Stack, keeps_casts: bool) -> Stack:
    """Reduce operations that the run skips to their weights. Autocast keeps the casts of weights that would train."""

    def change(op: Op) -> Iterable[Op]:
        if not op.skipped:
            return (op,)
        autocast = op.autocast if keeps_casts and all(w.requires_grad for w in op.weights) else ""
        return (Op(op.name, weights=idle(op).weights, gradient="none", autocast=autocast),) if op.weights else ()

    if not any(op.skipped for op in operations(stack)):
        return stack
    return rewrite_lists(stack, lambda listed: tuple(new for op in listed for new in change(op)))


def _idle_unread(stack: Stack) -> Stack:
    """Mark the weights of blocks as idle whose output nothing reads."""

    def changed(block: Block) -> Block:
        return block._replace(ops=tuple(map(idle, block.ops))) if block.unread else block

    if not any(block.unread for run in stack.runs for block in run.blocks):
        return stack
    return stack._replace(runs=tuple(run._replace(blocks=tuple(map(changed, run.blocks))) for run in stack.runs))


def _idle_unreached(stack: Stack) -> Stack:
    """Mark weights as idle if only operations without a gradient use them."""
    having = [op for op in operations(stack) if op.weights]
    reached = {w.name for op in having if op.gradient != "none" for w in op.weights}
    if all(w.name in reached or not w.trains for op in having for w in op.weights):
        return stack
    return rewrite_weights(
        stack, lambda w: w if w.name in reached or not w.trains else w._replace(trains=False, idle=True)
    )


def is_frozen(w: Weight, frozen: tuple[str, ...]) -> bool:
    """Whether a weight belongs to a frozen part of the model, which neither trains nor is adapted."""
    return bool(frozen) and next((part for part, groups in PARTS.items() if w.group in groups), "language") in frozen


def _wrapped(op: Op, recipe: Recipe, axes: Mapping[str, int]) -> Wrapped:
    """The linear layer as a method other than LoRA wraps it."""
    _, out, into = ops.axes_of(op)
    w = matrix(op)
    rank = w.adapter if w is not None else ""
    return Wrapped(
        op,
        features(out, axes),
        features(into, axes),
        int(rank) if rank.isdigit() else recipe.rank,
        dict(recipe.options),
        recipe.adapter_dtype,
        recipe.compute,
        recipe.autocast,
        recipe.dropout,
        recipe.moved,
        recipe.copies,
    )


def _layers_of(kind: str) -> tuple[Callable[[Wrapped], Iterable[Op]] | None, Shared | None]:
    """How a method of peft other than LoRA wraps a linear layer, and what all of its layers share; None if nothing."""
    if kind in LORA or kind in LAYERS:
        return LAYERS.get(kind), SHARED.get(kind)
    from memplan.catalogue.methods.peft_formulas import FORMULAS, SHARED_FORMULAS
    from memplan.catalogue.methods.peft_updates import SHARED_BASES, UPDATES

    return UPDATES.get(kind, FORMULAS.get(kind)), SHARED_BASES.get(kind, SHARED_FORMULAS.get(kind))


def _rewritten(stack: Stack, recipe: Recipe, axes: Mapping[str, int]) -> Stack:
    if recipe.kind in ("full", "freeze"):
        return rewrite_weights(stack, lambda w: _trained(w, recipe))
    head = head_of(stack)
    unquantised = frozenset(w.name for w in head.weights) if head and "lm_head" in recipe.skip else frozenset[str]()
    cast_back = _cast_back(stack, recipe.preparation)

    def base(w: Weight) -> Weight:
        trains = recipe.bias == "all" and w.trains and w.group != "buffer" and f".{w.name}".endswith(".bias")
        return _frozen(w, recipe, unquantised, cast_back)._replace(trains=trains)

    stack = rewrite_weights(stack, base)
    if recipe.running is not None and recipe.running.kernel == "triton":
        stack = rewrite_lists(stack, with_triton)
    if recipe.saved:
        dtype = recipe.adapter_dtype if recipe.kind == "ln_tuning" else ""
        stack = rewrite(stack, lambda op: (_with_saved_copies(op, recipe.saved, recipe.ties, dtype),))
    if recipe.tokens or recipe.virtual_tokens or recipe.kind == "adaption_prompt":
        from memplan.catalogue.methods.prompts import with_trained_inputs

        dtypes = recipe.adapter_dtype, recipe.weights
        stack = with_trained_inputs(stack, recipe.kind, recipe.tokens, dtypes, dict(recipe.options))
    is_litgpt = recipe.library == "litgpt"  # whose bitsandbytes is older than 0.43
    stood_for = represented_layers(operations(stack)) if recipe.kind in LORA else frozenset[str]()
    all_linear = recipe.targets == ("all-linear",) and recipe.selection is None

    def takes(op: Op) -> bool:
        if is_litgpt:
            return litgpt_lora.takes(op, recipe.targets)
        w, name = adaptable(op), op.name.rpartition(".")[2]
        if w is None or is_frozen(w, recipe.frozen) or inside(op.name, recipe.saved) or name in stood_for:
            return False
        return _is_target(op, recipe) or (all_linear and (head is None or op.name != head.name))

    def takes_parameter(w: Weight) -> bool:
        return not is_frozen(w, recipe.frozen) and (all_linear or any(name in recipe.targets for name in w.stands_for))

    if stood_for:
        stack = rewrite_lists(stack, lambda listed: adapt_parameters(listed, takes_parameter, recipe.adapter_dtype))
    if recipe.experts:
        stack = rewrite_lists(stack, with_dequantised_stacks)
    if recipe.fused:
        stack = _with_fused_layers(stack, recipe, axes, takes)
    wrap, shared = _layers_of(recipe.kind)
    wrapped: list[Wrapped] = []

    def change(op: Op) -> Iterable[Op]:
        new = replacement(op)
        return new if op.gradient != "none" else (o._replace(gradient="none") for o in new)

    def replacement(op: Op) -> Iterable[Op]:
        w = adaptable(op)
        if any(v.group == "adapter" and v.matrix for v in op.weights):  # fused already
            return (op,)
        stacked = next((v for v in op.weights if v.stacked and v.stored and not v.kernel), None)
        if stacked is not None and not recipe.experts:
            return (experts_fp8(op, stacked, recipe.compute),)
        if w is None:
            is_embedding = recipe.kind in LORA and any(v.rows and v.group == "embedding" for v in op.weights)
            adapts = is_embedding and _is_target(op, recipe)
            return (
                _of_rank(tuple(adapt_embedding(op, recipe.adapter_dtype, recipe.is_dora, recipe.magnitudes)), op)
                if adapts
                else (op,)
            )
        if takes(op) and is_litgpt:
            return tuple(litgpt_lora.adapt(op, recipe.targets, recipe.adapter_dtype, recipe.compute, recipe.dropout))
        if takes(op):
            called = op if op.reads else _as_called(op)
            if recipe.bias == "lora_only":
                called = _with_trained_bias(called)
            if wrap is not None:
                wrapped.append(_wrapped(called, recipe, axes))
                new = tuple(_with_adapter_dtype(o, recipe) for o in wrap(wrapped[-1]))
            else:
                new = adapted(called, recipe)
            new = _of_rank(new, op)
            return (_idle_adapters(op, new), op) if w.bypasses_module and not w.stored else new
        if w.kernel and recipe.running is not None:
            return (op,) if op.skipped else tuple(product(op, op.name, op.writes[0].name, recipe.running))
        if w.stored:
            result = op.writes[0].name
            return tuple(quantised_linear(op, op.name, result, recipe.compute, is_litgpt, recipe.keeps, recipe.copies))
        return (op,)

    stack = rewrite(stack, change, weighted=True)
    if recipe.sharded_dtype:
        stack = rewrite_blocks(stack, with_last_adapter_gathered)
    if shared is None or not wrapped:
        return stack
    return stack._replace(before=(shared(tuple(wrapped), recipe.adapter_dtype), *stack.before))


def _with_fused_layers(stack: Stack, recipe: Recipe, axes: Mapping[str, int], takes: Callable[[Op], bool]) -> Stack:
    functions = LoraFunctions(LIBRARIES[recipe.fused], recipe.compute, recipe.dropout, recipe.is_dora)

    def fused(listed: tuple[Op, ...]) -> tuple[Op, ...]:
        if any(op.skipped for op in listed):
            return listed
        return fuse_lora(listed, takes, recipe.adapter_dtype, functions)

    stack = rewrite_lists(stack, fused)
    return with_matrix_buffer(stack, functions, axes) if functions.library.has_buffer else stack


def _with_saved_copies(op: Op, saved: tuple[str, ...], ties: bool, dtype: str = "") -> Op:
    """peft's `modules_to_save`: a copy of the module trains, and the frozen original stays in memory.

    A tied head, which multiplies by the embedding, is a module of its own: unless it `ties`, it has a copy of its own,
    and reads the frozen original if only the embedding is copied. The copies have the `dtype`, or the originals' own.

    Source: peft 0.21 utils/other.py ModulesToSaveWrapper.update, which deep-copies each module.
    """
    parameters = [w for w in op.weights if w.group != "buffer"]
    apart = op.product and not ties
    modules = {w.name: op.name if apart and w.group == "embedding" else w.name.rpartition(".")[0] for w in parameters}
    copy_of = {
        name: f"{module}.{name.rpartition('.')[2]}.saved"
        for name, module in modules.items()
        if ends_like(module, saved) or ends_like(op.name.rpartition(".")[2], saved)
    }
    if not copy_of:
        return op
    copies = tuple(
        w._replace(name=copy_of[w.name], group="adapter", trains=True, matrix=False, dtype=dtype or w.dtype)
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


def _of_rank(adapted: tuple[Op, ...], op: Op) -> tuple[Op, ...]:
    """The operations of an adapter with the rank that was chosen for the operation it is on."""
    rank = next((w.adapter for w in op.weights if w.adapter), "r")
    return adapted if rank == "r" else ops.with_axes(adapted, {"r": rank})


def _with_trained_bias(op: Op) -> Op:
    """The linear layer with a bias that trains."""
    return op._replace(weights=tuple(w if w.matrix else w._replace(trains=True) for w in op.weights))


def _idle_adapters(op: Op, adapted: tuple[Op, ...]) -> Op:
    """Only the weights of the adapters around a layer that is never called."""
    idle = {w.name: w._replace(trains=False, idle=True) for o in adapted for w in o.weights if w.group == "adapter"}
    return Op(f"{op.name}.adapters", weights=tuple(idle.values()), gradient="none")


def _with_adapter_dtype(op: Op, recipe: Recipe) -> Op:
    if not op.weights:
        return op
    adapters = tuple(
        w if w.dtype or w.group != "adapter" else w._replace(dtype=recipe.adapter_dtype) for w in op.weights
    )
    return op._replace(weights=adapters)


# Modules are cast back to half precision, or not cast at all, if their name contains one of these.
# Source: trl 0.12 trainer/utils.py peft_module_casting_to_bf16, which casts matrices; axolotl 0.12.2 and 0.21.0
# loaders/model.py _convert_embedding_modules_dtype, loaders/utils.py get_linear_embedding_layers.
_CAST_BACK = {"trl": ("lm_head", "embed_tokens", "wte", "wpe")}
AXOLOTLS_EMBEDDINGS = ("lm_head", "embed_tokens", "embed_in", "embed_out", "word_embeddings")


def _cast_back(stack: Stack, preparation: str) -> frozenset[str]:
    """Names of the weights that stay in half precision after a preparation. A tied weight counts under either name."""
    is_axolotls = preparation.startswith("axolotl")
    names = ("norm", *AXOLOTLS_EMBEDDINGS) if is_axolotls else _CAST_BACK.get(preparation, ())
    listed = operations(stack) if is_axolotls else (op for some in outside(stack) for op in some)
    return frozenset(
        w.name
        for op in listed
        for w in op.weights
        if (w.rows or is_axolotls) and any(part in name for part in names for name in (op.name, w.name))
    )


# Groups of the weights that axolotl casts to fp32 before full training.
# Source: axolotl 0.21 loaders/model.py _convert_embedding_modules_dtype, loaders/utils.py get_linear_embedding_layers.
_ENDS = ("norm", "embedding", "lm_head")


def _trained(w: Weight, recipe: Recipe) -> Weight:
    """A weight in full training, which may belong to a frozen part."""
    dtype = "fp32" if recipe.fp32_ends and w.group in _ENDS else w.dtype or recipe.weights
    return w._replace(dtype=dtype, trains=w.trains and not is_frozen(w, recipe.frozen))


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
    takes = (recipe.quantization != "mxfp4" and can_quantise(w, skipped)) or (
        w.stacked and (recipe.experts or recipe.quantization == "fp8")
    )
    if recipe.quantization and takes and w.name not in head:
        form = "fp8-fp4" if recipe.fp4_experts and w.stacked else recipe.quantization
        storage = stored(w, form, recipe.double_quant, recipe.block_size, recipe.compute)
        dtype = "fp16" if recipe.library == "litgpt" else w.dtype or recipe.weights  # lightning quantises from fp16
        return w._replace(dtype=dtype, trains=False, stored=storage)
    prepared = recipe.preparation and w.group != "buffer" and w.name not in cast_back  # it casts parameters only
    dtype = "fp32" if prepared else w.dtype or recipe.weights
    asks = recipe.kind == "stored" and w.trains  # nothing freezes a model that only runs
    return w._replace(dtype=dtype, trains=False, idle=asks)


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
    """Whether the layer is selected, or its path ends with a target."""
    if recipe.selection is not None:
        return any(w.adapter for w in op.weights)
    return any(f".{op.name}".endswith(f".{target}") for target in recipe.targets)
