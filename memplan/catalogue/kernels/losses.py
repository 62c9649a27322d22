"""The loss, computed from the logits, or from the hidden states if the logits never exist all at once."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import once_per_stack
from memplan.catalogue.kernels.trl_losses import CHUNK as NLL_CHUNK
from memplan.catalogue.kernels.trl_losses import TRL_LOSSES, chunked_nll, tiled_lm_head
from memplan.catalogue.kernels.unsloth_loss import fused_chunks
from memplan.core.ir import Keep, Op, Scratch, Stack, Tensor, Weight

_CHUNKS = 8  # torchtune 0.6 CEWithChunkedOutputLoss: num_output_chunks
CHUNK = 128  # tokens of each sequence; litgpt 0.5 lm_head_chunk_size
SINGLE_CHUNK = CHUNK + 1  # the last token predicts nothing, so a second chunk of it alone has no backward


OF_ALL_LOGITS = ("hf", "label_smoothing")  # values of `kernels.loss` whose logits the model returns all at once
READ_MATRIX = (*TRL_LOSSES, "fused_chunks")  # values of `kernels.loss` that read the head's own matrix


@once_per_stack
def attach(
    stack: Stack,
    loss: str,
    hold_outputs: bool = False,
    autocast: str | None = None,
    adds_in_place: bool = True,
    logits: str = "padded",
    single: bool = False,
    fused: bool = False,
    converts: bool = False,
    chunks: int = 0,
) -> Stack:
    """Return `stack` with a loss of that kind. A stack with its class's own loss keeps it.

    hf                transformers: all logits, then cast to fp32
    chunked           torchtune: logits in eight chunks, each cast to fp32 separately
    chunked_lm_head   LitGPT: logits in chunks of 128 tokens, never in fp32, held by the training loop
    fused             Liger: gradients are computed chunk by chunk with the loss; logits never exist all at once
    chunked_nll       TRL 1.13 and 1.14: chunks of 256 tokens, which backward computes again
    chunked_nll_fp32  TRL 1.6 to 1.12: the same, but each chunk casts the head to fp32
    tiled_lm_head     TRL 1.15 and later: tiles of logits, folded into a few numbers per token
    fused_chunks      Unsloth 2026: logits in fp32, by chunk or tile, and their gradients in forward
    label_smoothing   transformers' Trainer: log-probabilities of all logits, outside of the model

    hold_outputs    the script's variable keeps the logits through backward
    autocast        the compute dtype, or None
    adds_in_place   for the fused loss, see the function `adds_in_place`
    logits, single  for transformers' own loss, see `form` and `single` of `cross_entropy`
    fused           a kernel writes the gradient over the logits
    converts        accelerate or Fabric casts the model's outputs to fp32
    chunks          of a loss computed in chunks, see `loss_chunks`
    """
    if stack.loss or loss == "label_smoothing":
        if loss == "label_smoothing":
            stack = _label_smoothing(stack, hold_outputs, converts, logits, single)
        else:
            stack = _with_class_loss(stack, hold_outputs, converts)
        return stack
    start = next(i for i, op in enumerate(stack.after) if begins_head(op))
    body, head = stack.after[:start], stack.after[start:]
    released = {op for op in head if op.name == "return" and "n" in op.reads}  # the loss's frame does not reference it
    head = tuple(op for op in head if op not in released)
    holds = not converts and (hold_outputs or loss == "chunked_lm_head")
    if holds and not (loss == "hf" and logits == "model"):
        head = tuple(_held(op) if op is _last_writer(head) else op for op in head)
    last = _last_writer(head).writes[0].name
    match loss:
        case "hf":
            loss_ops = cross_entropy(last, logits, single, fused, holds)
            loss_ops = tuple(_without(op, "n") for op in loss_ops) if released else loss_ops
            head = (*head, *released)
            outputs = _converted(last, hold_outputs) if converts else ()
            return stack._replace(after=(*body, *head), loss=(*loss_ops, *outputs))
        case "chunked":
            return stack._replace(after=body, loss=tuple(_chunked(head, chunks)))
        case "chunked_lm_head":
            if not converts:
                parts = _PARTS[-chunks:]
                after = (*body, *_heads_by_chunk(head, parts, single))
                return stack._replace(after=after, loss=tuple(_chunked_lm_head(last, parts, single)))
            summed = head if chunks == 1 else tuple(map(_summed_by_chunk, head))
            head = tuple(_cast_by_chunk(op, autocast) for op in _intermediates_by_chunk(summed))
            convert, *loss_of_chunks = _converted_chunks(last, single)
            after = (*body, *head, ops.release_names("n"), convert)
            return stack._replace(after=after, loss=tuple(loss_of_chunks))
        case "fused":
            matrix, unused = matrix_and_bias(head)  # a bias, which Liger ignores
            body = (*body, Op("loss.unused", weights=unused, gradient="none")) if unused else body
            return stack._replace(after=body, loss=_fused(matrix, autocast, adds_in_place, logits != "padded", single))
        case "tiled_lm_head" | "fused_chunks":
            write = tiled_lm_head if loss == "tiled_lm_head" else fused_chunks
            return stack._replace(after=body, loss=write(*matrix_and_bias(head), autocast))
        case "chunked_nll" | "chunked_nll_fp32":
            matrix, bias = matrix_and_bias(head)
            return stack._replace(
                after=body, loss=chunked_nll(head, matrix, bias, autocast, loss == "chunked_nll_fp32", chunks == 1)
            )
        case other:
            raise AssertionError(other)


def matrix_and_bias(head: tuple[Op, ...]) -> tuple[Weight, tuple[Weight, ...]]:
    """Return the head's matrix and its other weights."""
    matrix = next(w for op in head for w in op.weights if w.rows)
    return matrix, tuple(w for op in head for w in op.weights if w is not matrix)


def begins_head(op: Op) -> bool:
    """Return whether the operation starts the head: a cast of its input, or the operation that computes the logits."""
    return bool(op.writes) and ("n" in op.reads or any("v" in t.shape.split() for t in op.writes))


def _with_class_loss(stack: Stack, hold_outputs: bool, converts: bool) -> Stack:
    """Return the stack of a model that is no causal language model, whose class computes the loss from `logits`."""
    logits = next((t for op in stack.after for t in op.writes if t.name == "logits"), None)
    if logits is None:
        return stack
    holds = hold_outputs and not converts
    after = tuple(_held(op) if holds and logits in op.writes else op for op in stack.after)
    outputs = _converted("logits", hold_outputs, logits.shape) if converts else ()
    return stack._replace(after=after, loss=(*stack.loss, *outputs))


def _label_smoothing(stack: Stack, hold_outputs: bool, converts: bool, logits: str, single: bool) -> Stack:
    """Return the stack with the Trainer's smoothed loss of the logits that the model returns.

    Only causal models' labels are shifted. The Trainer's frame holds the model's outputs until the loss is computed.
    """
    source = "transformers 5.24 trainer_pt_utils.py LabelSmoother, trainer.py Trainer.compute_loss"
    is_causal, after = not stack.loss, stack.after
    given, last = _last_writer(after).writes[0], after.index(_last_writer(after))
    returned, outputs, ends = given.name, (), tuple(op for op in stack.loss if op.name == "return")
    if converts or logits == "model":
        outputs = (ops.cast("loss.outputs", returned, "outputs", given.shape, "fp32"), ops.release_names(returned, "n"))
        returned = "outputs"
    elif is_causal:
        outputs = (ops.release_names("n"),)
    after = (*after[:last], after[last], *outputs, *after[last + 1 :])
    if hold_outputs:
        after = tuple(_held(op) if any(t.name == returned for t in op.writes) else op for op in after)
    rows = "shifted_rows v" if is_causal else given.shape
    lead = rows.rpartition(" ")[0]
    shifting = shifted_rows(returned, Tensor("shifted", rows), source, single) if is_causal else ()
    x, targets = ("shifted", "targets") if is_causal else (returned, "labels")
    clamped, padding = Tensor("clamped", lead, "int64"), Tensor("padding", lead, "bool")
    smoothed = (
        *shifting,
        Op("loss.log_softmax", (x,), (Tensor("log_probs", rows),), (), (Keep("log_probs", x),), autocast="fp32"),
        ops.scale("loss.negative", "log_probs", "negative", rows),
        *((ops.release_names("shifted"),) if is_causal else ()),
        Op("loss.padding", (targets,), (padding, clamped), gradient="none", source=source),
        Op(
            "loss.smooth",
            ("negative", "clamped", "padding"),
            (Tensor("loss"), Tensor("likelihoods", lead, "=negative"), Tensor("sums", lead, "fp32")),
            (),
            tuple(Keep(what, "negative") for what in ("negative", "clamped", "padding")),
            scratch=(Tensor("tokens that count", lead, "int64"),),
            scratch_back=(Scratch(Tensor("gradient of the sums, expanded and cast", rows, "=negative!sums")),),
            source=source,
        ),
        ops.release_names("negative", "log_probs", "clamped", "padding", "likelihoods", "sums", returned),
        *((ops.release_names("targets"),) if is_causal else ()),
    )
    return stack._replace(after=after, loss=(*smoothed, *ends))


def _without(op: Op, name: str) -> Op:
    return op._replace(reads=tuple(r for r in op.reads if r != name))


def _last_writer(head: tuple[Op, ...]) -> Op:
    return next(op for op in reversed(head) if op.writes)


def _held(op: Op) -> Op:
    return op._replace(holds="step")


def _targets(source: str) -> Op:
    """Pad the labels by one and shift them: a copy, or for a single row a view of the padded labels."""
    return Op(
        "loss.shift_labels",
        ("labels",),
        (Tensor("targets", "targets", "int64"), Tensor("padded_labels", "padded_labels", "int64")),
        source=source,
    )


def cross_entropy(
    logits: str, form: str = "padded", single: bool = False, fused: bool = False, held: bool = False
) -> tuple[Op, ...]:
    """Return transformers' loss of all logits, in one of the forms that versions and other libraries have used.

    padded    labels are padded by one and shifted; the logits are cast to fp32 unshifted
    shifted   the loss casts logits to fp32 and copies all rows but the last; the model keeps its half-precision logits
    model     the model casts to fp32, so half-precision logits are freed at once; then as `shifted`
    half      never cast: all rows but the last are copied, and the loss has the logits' dtype
    plain     torchtitan: only cast to fp32, since labels come shifted
    parallel  `plain` on each rank's part of the vocabulary
    in_place  Megatron: cast to fp32, then overwritten by softmax and gradient; labels come shifted. If `fused`,
              Transformer Engine's kernel overwrites the logits themselves
    compiled  Megatron's fused loss: as `in_place`, but backward copies the probabilities

    single  a single sequence: all rows but the last are contiguous already and are not copied
    fused   a kernel keeps the logits it is given (half precision if `padded`) and overwrites them with their gradient
    held    the script keeps the model's output to the end of the step
    """
    kernel = _overwriting if fused else nll
    if form == "padded":
        source = "transformers 5.24 loss/loss_utils.py ForCausalLMLoss"
        kernel_logits = logits if fused else "logits32"
        return (
            *(() if fused else (_float(logits, source),)),
            _targets(source),
            *kernel("loss", kernel_logits, "log_probs", "targets", "b s v"),
            ops.release_names(kernel_logits, "padded_labels", "targets", logits, "n"),
        )
    if form in _LABELS_SHIFTED:
        source, kernel = _LABELS_SHIFTED[form]
        is_megatron = kernel in (_overwriting, _compiled)
        x = logits if kernel is _compiled or (fused and is_megatron) else "logits32"
        inside = ("n",) if is_megatron else ()  # else the model has returned
        return (
            *(() if inside else (ops.release_names("n"),)),
            *(() if x == logits else (_float(logits, source),)),
            *kernel("loss", x, "log_probs", "labels", "b s v"),
            ops.release_names(*dict.fromkeys((x, logits, *inside))),
        )
    source, kernel_logits = _SHIFTED[form], logits if form == "half" else "logits32"
    return (
        *(() if form == "half" else (_float(logits, source),)),
        *((ops.release_names(logits),) if form == "model" else ()),
        *(
            (ops.view("loss.returned", kernel_logits, "returned", "b s v")._replace(holds="step"),)
            if form == "model" and held
            else ()
        ),
        *shifted_rows(kernel_logits, Tensor("shifted", "shifted_rows v"), source, single),
        *kernel("loss", "shifted", "log_probs", "targets", "shifted_rows v"),
        ops.release_names("shifted", "targets", kernel_logits, *((logits,) if form == "shifted" else ()), "n"),
    )


def _vocabulary_parallel(loss: str, logits: str, log_probs: str, targets: str, shape: str) -> tuple[Op, ...]:
    """Return the vocabulary-parallel loss.

    It keeps log-probabilities; backward adds their exponents to a matrix of zeros with one number per row.
    """
    shifted = Tensor("shifted", shape, "fp32")
    return (
        Op(
            f"{loss}.cross_entropy",
            (logits, targets),
            (Tensor(loss, "", "fp32"), Tensor(log_probs, shape, "fp32")),
            (),
            (Keep(log_probs, logits), Keep(targets, logits)),
            scratch=(shifted, *(Tensor(what, "b s", "fp32") for what in ("maxima", "sums", "own"))),
            scratch_back=(
                *(Scratch(shifted._replace(name=what)) for what in ("zeros", "exponents")),
                *(Scratch(Tensor(what, "b s", "int64")) for what in ("labels", "own labels", "rows")),
                *(Scratch(Tensor(what, "b s", "fp32")) for what in ("updates", "gradients")),
                Scratch(Tensor("others", "b s", "bool")),
            ),
            source="torchtitan 0.3.0 components/loss.py _LossParallelCrossEntropy",
        ),
    )


def _converted(logits: str, holds: bool, shape: str = "b s v") -> tuple[Op, Op]:
    """Cast the outputs to fp32, logits included, as accelerate does before returning them, once autocast has ended.

    The script then only has the cast: if it holds the outputs, it holds that.
    """
    source = "accelerate 1.0 utils/operations.py ConvertOutputsToFp32"
    outputs = Op(
        "loss.outputs", (logits,), (Tensor("outputs", shape, "fp32"),), cast=True, gradient="none", source=source
    )
    return Op("loss.end_autocast", releases="autocast"), _held(outputs) if holds else outputs


def _float(logits: str, source: str) -> Op:
    return Op("loss.float", (logits,), (Tensor("logits32", "b s v", "fp32"),), cast=True, source=source)


def shifted_rows(x: str, rows: Tensor, source: str, single: bool) -> tuple[Op, ...]:
    """Drop the last row of `x` and the first label. The gradient of `x` gets its full size back in a new tensor."""
    labels = (Tensor("targets", "shifted_labels", "int64"),)
    return (
        Op("loss.shift", (x,), (rows,), gradient="new", view=single, source=source),
        Op("loss.shift_labels", ("labels",), labels, source=source),
    )


_SHIFTED = {
    "shifted": "transformers 4.48 loss/loss_utils.py ForCausalLMLoss",
    "model": "transformers 4.45 models/llama/modeling_llama.py LlamaForCausalLM.forward",
    "half": "transformers 4.48 models/gpt_bigcode/modeling_gpt_bigcode.py GPTBigCodeForCausalLM.forward",
}


def _overwriting(loss: str, logits: str, log_probs: str, targets: str, shape: str) -> tuple[Op, ...]:
    """Keep the logits and one fp32 number per row, and return the logits' storage as their gradient."""
    rows = shape.removesuffix(" v")
    sums = f"{loss}.logsumexp"
    return (
        Op(
            f"{loss}.cross_entropy",
            (logits, targets),
            (Tensor(loss, "", "fp32"), Tensor(sums, rows, "fp32")),
            (),
            (Keep(logits, logits, is_gradient=True), Keep(sums, logits), Keep(targets, logits)),
            scratch=(Tensor("losses", rows, "fp32"),),
            scratch_back=(Scratch(Tensor("gradient of losses", rows, "fp32")),),
            source="unsloth 2025.1 kernels/cross_entropy_loss.py Fast_CrossEntropyLoss",
        ),
    )


def _compiled(loss: str, logits: str, log_probs: str, targets: str, shape: str) -> tuple[Op, ...]:
    """Keep probabilities in fp32, and return their gradient in the logits' dtype.

    torch compiles the function that computes it: subtracting one at each target, which it does not do in place, copies
    the probabilities.
    """
    rows, probabilities = shape.removesuffix(" v"), "probabilities"
    whose = (Tensor("others' targets", rows, "bool"), Tensor("own targets", rows, "int64"))
    return (
        Op(
            f"{loss}.cross_entropy",
            (logits, targets),
            (Tensor(loss, "", "fp32"), Tensor(probabilities, shape, "fp32"), *whose),
            (),
            tuple(Keep(what, logits) for what in (probabilities, *(t.name for t in whose))),
            scratch_back=(Scratch(Tensor("probabilities less one at each target", shape, "fp32")),),
            gradient="own",
            source=_LABELS_SHIFTED["compiled"][0],
        ),
    )


def nll(loss: str, logits: str, log_probs: str, targets: str, shape: str) -> tuple[Op, ...]:
    """Return log_softmax and nll_loss. cross_entropy passes a dtype to log_softmax, so autocast does not cast it."""
    weight = f"{loss}.total_weight"
    return (
        Op(
            f"{loss}.log_softmax",
            (logits,),
            (Tensor(log_probs, shape),),
            (),
            (Keep(log_probs, logits),),
            source=f"{ops.DERIVATIVES}: _log_softmax",
        ),
        Op(
            f"{loss}.nll",
            (log_probs, targets),
            (Tensor(loss), Tensor(weight)),
            (),
            (Keep(log_probs, log_probs), Keep(targets, log_probs), Keep(weight, log_probs)),
            autocast="fp32",
            source=f"{ops.DERIVATIVES}: nll_loss_forward",
        ),
    )


_LABELS_SHIFTED = {  # forms whose labels come shifted
    "plain": ("torchtitan 0.3.0 components/loss.py", nll),
    "parallel": ("torchtitan 0.3.0 components/loss.py", _vocabulary_parallel),
    "in_place": ("megatron-core 0.12 tensor_parallel/cross_entropy.py", _overwriting),
    "compiled": ("megatron-core 0.10 to 0.19 fusions/fused_cross_entropy.py calculate_gradients", _compiled),
}


def _chunked(head: tuple[Op, ...], count: int) -> Iterator[Op]:
    """Compute each chunk's own head and loss (`lc` tokens of each sequence, of the last `lc_last`). All heads run
    before the first loss."""
    source = "torchtune 0.6 modules/loss/ce_chunked_output_loss.py"
    chunks, rows = range(count), (*["lc"] * (count - 1), "lc_last")
    yield _targets(source)
    yield ops.split("loss.chunk", "n", tuple(Tensor(f"n{i}", f"b {rows[i]} h") for i in chunks))
    for i in chunks:
        for op in head:
            yield _chunk_of(op, i, rows[i])
    logits = _last_writer(head).writes[0].name
    for i in chunks:
        yield Op(f"loss.float{i}", (f"{logits}{i}",), (Tensor(f"logits32{i}", f"b {rows[i]} v", "fp32"),), cast=True)
        yield from nll(f"loss{i}", f"logits32{i}", f"log_probs{i}", "targets", f"b {rows[i]} v")
        yield ops.release_names(f"logits32{i}")
    parts = tuple(f"loss{i}" for i in chunks)
    yield Op("loss.sum", parts, (Tensor("loss", "", "fp32"),), gradient="same", source=source)
    yield ops.release_names(*(f"{logits}{i}" for i in chunks), "padded_labels")


def _chunk_of(op: Op, i: int | str, rows: str) -> Op:
    """Return the head's operation for chunk `i` of `rows` tokens: its own tensors, but shared weights."""

    def rename(name: str) -> str:
        return name if any(name == w.name for w in op.weights) else f"{name}{i}"

    return ops.with_shapes(ops.renamed(op, rename), lambda shape: shape.replace("b s ", f"b {rows} ", 1))


def _intermediates_by_chunk(head: tuple[Op, ...], chunk: str = "128") -> Iterator[Op]:
    """Yield the head with the tensors between projection and logits, and their gradients, sized for one chunk.

    Only what backward keeps of them exists for all tokens.
    """
    last = _last_writer(head)
    same = {r for op in head if op.cast for r in op.reads}  # may be the logits themselves, if no cast is needed
    inner = {t.name for op in head if op is not last for t in op.writes if t.shape == "b s v"} - same
    kept = {k.what for op in head for k in op.keeps} & inner
    for op in head:
        chunks = tuple(t._replace(shape=f"b {chunk} v") if t.name in inner else t for t in op.writes)
        kept_whole = tuple(Tensor(f"{t.name}.kept", "b s v", f"={t.name}") for t in op.writes if t.name in kept)
        keeps = tuple(k._replace(what=f"{k.what}.kept") if k.what in kept else k for k in op.keeps)
        yield op._replace(writes=(*chunks, *kept_whole), keeps=keeps)


def _summed_by_chunk(op: Op) -> Op:
    """Sum a weight's gradients over chunks. They are views, so the next chunk's gradient and the sum are copies."""
    sums = tuple(Scratch(Tensor(f"{what} of {w.name}", w.shape, w.dtype), w.name) for w in op.weights for what in _SUM)
    return op._replace(scratch_back=(*op.scratch_back, *sums))


def _cast_by_chunk(op: Op, autocast: str | None) -> Op:
    """Under autocast, cast a frozen head again for every chunk of 128 tokens; each product keeps its cast."""
    w = next((w for w in op.weights if w.matrix), None)
    if autocast is None or w is None or w.trains or w.stored or w.dtype == autocast:
        return op
    casts = Tensor(f"casts of {w.name} for further chunks", f"further_chunks {w.shape}", autocast)
    return op._replace(writes=(*op.writes, casts), keeps=(*op.keeps, Keep(casts.name, op.reads[0])))


def loss_chunks(sequences: int, tokens: int) -> tuple[tuple[str, int], ...]:
    """Return the losses computed in chunks, each with their number as far as its operations depend on it.

    `chunked` divides sequences as torch's `chunk` does. Others have one chunk, or as many as differ from each other.
    """
    nll = 1 if sequences * (tokens - 1) <= NLL_CHUNK else 2
    return (
        ("chunked", -(-tokens // -(-tokens // _CHUNKS))),
        ("chunked_lm_head", 1 if tokens <= SINGLE_CHUNK else len(_PARTS)),
        ("chunked_nll", nll),
        ("chunked_nll_fp32", nll),
    )


_SUM = ("gradient of a chunk", "sum of gradients")


# Chunks of CHUNK tokens, by the axes that count their tokens: all before the last two, the second to last, the last.
# Backward starts with the last; the head's gradients of the last two are summed.
_PARTS = ("lm_rest", "lm_next", "lm_last")


def _heads_by_chunk(head: tuple[Op, ...], parts: tuple[str, ...], single: bool) -> Iterator[Op]:
    """Split the hidden states and compute each chunk's product. Chunks of several sequences are copied."""
    source = "litgpt 0.5 model.py GPT.forward"
    yield ops.split("lm_head.split", "n", tuple(Tensor(f"n.{part}", f"b {part} h") for part in parts))
    for part in parts:
        yield ops.copy("lm_head.flatten", f"n.{part}", f"n{part}", f"b {part} h")._replace(view=single, source=source)
        for op in _intermediates_by_chunk(head, "lm_one") if part == "lm_rest" else head:
            yield _chunk_of(op, part, part)
        yield ops.release_names(f"n{part}")
    yield ops.release_names("n")


def _chunked_lm_head(logits: str, parts: tuple[str, ...], single: bool) -> Iterator[Op]:
    """Compute LitGPT's loss. Log-probabilities keep the logits' dtype; each chunk's gradient replaces its own.

    The last row of the last chunk has no label. Dropping it copies the logits of several sequences, and their gradient
    gets its full size back in a new tensor. Autocast, which would cast a frozen fp32 head for every chunk, is refused
    when the run is resolved.
    """
    source = "litgpt 0.5 utils.py chunked_cross_entropy"
    *others, last = parts
    inputs = {**{part: f"{logits}{part}" for part in others}, last: "loss.rows"}
    labels = (Tensor("targets", "shifted_labels", "int64"),)
    yield Op("loss.shift_labels", ("labels",), labels, view=single, source=source)
    shifted = (Tensor("loss.rows", "b lm_rows v"),)
    yield Op("loss.shift", (f"{logits}{last}",), shifted, view=single, source=source)
    for part in parts:
        x, log_probs, rows = inputs[part], f"log_probs.{part}", "lm_rows" if part == last else part
        chunk = Tensor("gradient of a chunk", f"b {'lm_one' if part == 'lm_rest' else rows} v", f"={x}")
        yield Op(
            "loss.chunks",
            (x, "targets"),
            (Tensor(f"losses.{part}", f"b {rows}", f"={x}"), Tensor(log_probs, f"b {rows} v", f"={x}")),
            (),
            (Keep(log_probs, x, is_gradient=True), Keep("targets", x)),
            scratch_back=(Scratch(chunk), Scratch(chunk)),
            source=source,
        )
    losses = tuple(f"losses.{part}" for part in parts)
    yield Op("loss.cat", losses, (Tensor("losses", "shifted_rows"),), gradient="view", source=source)
    yield Op("loss.sum", ("losses",), (Tensor("loss", "", "fp32"),), gradient="view", source=source)
    yield ops.release_names("losses", *losses, "loss.rows", "targets", *(f"{logits}{part}" for part in parts))


def _converted_chunks(logits: str, single: bool) -> tuple[Op, ...]:
    """Compute LitGPT's loss under lightning's Fabric, whose module casts chunks of logits to fp32 and returns them to
    the training loop, which holds the last pass's until then. Of several sequences, the last chunk's rows are copied.

    A chunk's fp32 gradient replaces its log-probabilities and is cast before the next chunk's, so half the bytes of the
    log-probabilities remain.
    """
    source = (
        "lightning 2.2.5 fabric/plugins/precision/half.py convert_output; litgpt 0.5 utils.py chunked_cross_entropy"
    )
    outputs, chunk = "outputs", Tensor("gradient of a chunk", "b 128 v", "fp32")
    half, rest = Tensor("log_probs", "b s v", "fp32/2"), Tensor("log_probs, as many more", "b s v", "fp32/2")
    return (
        Op(
            "loss.convert_output",
            (logits,),
            (Tensor(outputs, "b s v", "fp32"),),
            gradient="own",
            holds="step",
            source=source,
        ),
        ops.release_names(logits),
        _targets(source),
        Op(
            "loss.chunks",
            (outputs, "targets"),
            (Tensor("loss", "", "fp32"), half, rest),
            (),
            (Keep(half.name, outputs, is_gradient=True), Keep(rest.name, outputs), Keep("targets", outputs)),
            scratch=() if single else (Tensor("rows of the last chunk", "b lm_rows v", "fp32"),),
            scratch_back=(Scratch(chunk), Scratch(chunk)),
            source=source,
        ),
        ops.release_names("padded_labels"),
    )


def adds_in_place(capability: tuple[int, int] | None) -> bool:
    """Return whether the fused loss adds half-precision products to the head's gradient without a copy of it."""
    return capability is None or capability >= (8, 0)


def _fused(matrix: Weight, autocast: str | None, in_place: bool, shifted: bool, single: bool) -> tuple[Op, ...]:
    """Compute Liger's loss in chunks of `fc` tokens: logits, overwritten by their gradient, and its two products.

    Forward computes what backward returns: a gradient the size of the hidden states, and one of the weight if it
    trains. In fp32, on GPUs before Ampere and with Liger 0.6 to 0.8.2, a chunk's share of the weight gradient is a
    separate fp32 tensor before it is added. Autocast casts the weight again for the first product of each chunk, which
    reads a view, but caches the cast for the second. `shifted`: up to Liger 0.5, all rows of hidden states but the last
    were copied (unless the batch is a `single` sequence), and the gradient of a chunk's logits was scaled into a copy.
    """
    source = f"liger-kernel {'0.5.2' if shifted else '0.8'} ops/fused_linear_cross_entropy.py"
    rows, hidden = ("shifted_rows h", "n.shifted") if shifted else ("b s h", "n")
    outputs = (Tensor("loss", "", "fp32"), Tensor("hidden_gradient", rows, "=n"))
    keeps = (Keep("hidden_gradient", hidden, is_gradient=True),)
    half = (autocast or matrix.dtype) != "fp32"
    temporaries: tuple[Tensor, ...] = ()
    kept: tuple[Tensor, ...] = ()
    if autocast and matrix.dtype != autocast:
        temporaries = (Tensor("head weight cast", matrix.shape, autocast),)
        kept = temporaries if matrix.trains else ()
    if matrix.trains:
        outputs += (Tensor("head_gradient", matrix.shape, matrix.dtype),)
        keeps += (Keep("head_gradient", matrix.name, is_gradient=True),)
        if not (half and in_place):
            product = Tensor("product of a chunk", matrix.shape, autocast or "")
            temporaries = (product, *((Tensor("product in fp32", matrix.shape, "fp32"),) if half else ()))
    chunk = Tensor("logits of a chunk", "fc v", autocast or "")
    return (
        *(shifted_rows("n", Tensor(hidden, rows), source, single) if shifted else (_targets(source),)),
        Op(
            "loss.fused",
            (hidden, "targets"),
            outputs,
            (matrix,),
            keeps,
            scratch=(
                Tensor("losses", "b s", "fp32"),
                chunk,
                *((chunk._replace(name="scaled gradient of a chunk"),) if shifted else ()),
                *kept,
                *temporaries,
            ),
            product="matrix",
            source=source,
        ),
        ops.release_names("targets" if shifted else "padded_labels", hidden, "n"),
    )
