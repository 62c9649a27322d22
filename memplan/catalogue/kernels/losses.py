"""The loss: from the logits, or from the hidden states where all logits are never there at once."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.kernels import ops
from memplan.core.ir import Keep, Op, Scratch, Stack, Tensor, Weight

_CHUNKS = 8  # torchtune 0.6 CEWithChunkedOutputLoss: num_output_chunks
CHUNK = 128  # tokens of each sequence; litgpt 0.5 lm_head_chunk_size


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
    short: bool = False,
) -> Stack:
    """`stack` with the loss of that kind; `hold_outputs` where the script's variable keeps the logits through backward.

    `autocast` is the compute dtype, or None; `adds_in_place` is for the fused loss, see `adds_in_place`; `logits`
    and `single` are for transformers' own, see `cross_entropy`; `fused` where a kernel of its own writes the gradient
    over the logits; `converts` where accelerate or Fabric make what the model returns fp32; `short` where no sequence
    has more than a chunk of CHUNK tokens.

    A stack that has a loss already, its class's own, keeps it.

    hf                transformers: all logits, then in fp32
    chunked           torchtune: logits in eight chunks, each in fp32 on its own
    chunked_lm_head   LitGPT: logits in chunks of 128 tokens, never in fp32, held by the training loop
    fused             Liger: the gradient is made chunk by chunk beside the loss, and logits are never all there
    """
    if stack.loss:
        return _own(stack, hold_outputs, converts)
    start = next(i for i, op in enumerate(stack.after) if _begins_head(op))
    body, head = stack.after[:start], stack.after[start:]
    let_go = {op for op in head if op.name == "return" and "n" in op.reads}  # the frame of the loss has no name for it
    head = tuple(op for op in head if op not in let_go)
    held = hold_outputs or (loss == "chunked_lm_head" and not converts)
    if held and not (loss == "hf" and logits == "model"):
        head = tuple(_held(op) if op is _last_writer(head) else op for op in head)
    last = _last_writer(head).writes[0].name
    match loss:
        case "hf":
            own = cross_entropy(last, logits, single, fused, held)
            own = tuple(_without(op, "n") for op in own) if let_go else own
            head = (*head, *let_go)
            return stack._replace(after=(*body, *head), loss=(*own, *((_converted(last),) if converts else ())))
        case "chunked":
            return stack._replace(after=body, loss=tuple(_chunked(head)))
        case "chunked_lm_head":
            if not converts:
                parts = _PARTS[-1:] if short else _PARTS
                after = (*body, *_heads_by_chunk(head, parts, single))
                return stack._replace(after=after, loss=tuple(_chunked_lm_head(last, parts, single)))
            summed = head if short else tuple(map(_summed_by_chunk, head))
            head = tuple(_cast_by_chunk(op, autocast) for op in _through_by_chunk(summed))
            return stack._replace(after=(*body, *head), loss=_converted_chunks(last))
        case "fused":
            matrix = next(w for op in head for w in op.weights if w.rows)
            unused = tuple(w for op in head for w in op.weights if w is not matrix)  # a bias, which Liger leaves out
            body = (*body, Op("loss.unused", weights=unused, gradient="none")) if unused else body
            return stack._replace(after=body, loss=_fused(matrix, autocast, adds_in_place, logits != "padded", single))
        case other:
            raise AssertionError(other)


def _begins_head(op: Op) -> bool:
    """Whether this is the head's first operation: a cast of its input, or the one that makes logits."""
    return bool(op.writes) and ("n" in op.reads or any("v" in t.shape.split() for t in op.writes))


def _own(stack: Stack, hold_outputs: bool, converts: bool) -> Stack:
    """Of a model that is no causal language model, with the loss its class computes of the `logits`."""
    made = next((t for op in stack.after for t in op.writes if t.name == "logits"), None)
    if made is None:
        return stack
    after = tuple(_held(op) if hold_outputs and made in op.writes else op for op in stack.after)
    outputs = (_converted("logits", made.shape),) if converts else ()
    return stack._replace(after=after, loss=(*stack.loss, *outputs))


def _without(op: Op, name: str) -> Op:
    return op._replace(reads=tuple(r for r in op.reads if r != name))


def _last_writer(head: tuple[Op, ...]) -> Op:
    return next(op for op in reversed(head) if op.writes)


def _held(op: Op) -> Op:
    return op._replace(holds="step")


def _targets(source: str) -> Op:
    """Labels padded by one and shifted: a copy, except that a single row shifted is a view of the padded one."""
    return Op(
        "loss.shift_labels",
        ("labels",),
        (Tensor("targets", "targets", "int64"), Tensor("padded_labels", "padded_labels", "int64")),
        source=source,
    )


def cross_entropy(
    logits: str, form: str = "padded", single: bool = False, fused: bool = False, held: bool = False
) -> tuple[Op, ...]:
    """transformers' loss of all logits, as it was written at the time.

    padded    labels are padded by one and shifted, the logits cast to fp32 as they are
    shifted   logits are cast to fp32 in the loss, and all rows but the last copied; the model still holds them in half
    model     the model itself casts to fp32, so that half-precision logits go at once; then as shifted
    half      never cast: all rows but the last are copied, and the loss is in the logits' dtype
    plain     torchtitan's: cast to fp32, and no more, as labels come shifted
    parallel  the same of each rank's part of the vocabulary
    in_place  Megatron's: cast to fp32, and softmax and gradient are written over that; labels come shifted

    `single`: of a single sequence all rows but the last are contiguous already, and no copy is made. `fused`: a kernel
    that keeps the logits it is given and writes their gradient over them; half-precision ones where they are padded.
    `held`: the script keeps what the model returned to the end of the step.
    """
    kernel = _overwriting if fused else nll
    if form == "padded":
        source = "transformers 5.24 loss/loss_utils.py ForCausalLMLoss"
        wide = logits if fused else "logits32"
        return (
            *(() if fused else (_float(logits, source),)),
            _targets(source),
            *kernel("loss", wide, "log_probs", "targets", "b s v", "loss"),
            ops.leave(wide, "padded_labels", "targets", logits, "n"),
        )
    if form in ("plain", "parallel"):
        source = "torchtitan 0.3.0 components/loss.py"
        own = _of_parts("loss", "logits32", "labels") if form == "parallel" else None
        return (
            _float(logits, source),
            *(own or nll("loss", "logits32", "log_probs", "labels", "b s v", "loss")),
            ops.leave("logits32", logits, "n"),
        )
    if form == "in_place":
        source = "megatron-core 0.12 tensor_parallel/cross_entropy.py"
        return (
            _float(logits, source),
            *_overwriting("loss", "logits32", "", "labels", "b s v", "loss"),
            ops.leave("logits32", logits, "n"),
        )
    source, wide = _SHIFTED[form], logits if form == "half" else "logits32"
    return (
        *(() if form == "half" else (_float(logits, source),)),
        *((ops.leave(logits),) if form == "model" else ()),
        *(
            (ops.view("loss.returned", wide, "returned", "b s v")._replace(holds="step"),)
            if form == "model" and held
            else ()
        ),
        *_shifted(wide, source, single),
        *kernel("loss", "shifted", "log_probs", "targets", "shifted_rows v", "loss"),
        ops.leave("shifted", "targets", wide, *((logits,) if form == "shifted" else ()), "n"),
    )


def _of_parts(n: str, logits: str, targets: str) -> tuple[Op, ...]:
    """Each rank's part of the vocabulary: log-probabilities are kept, and on the way back exponents of them are added
    to a matrix of zeros with one number a row."""
    shape, source = "b s v", "torchtitan 0.3.0 components/loss.py _LossParallelCrossEntropy"
    wide = Tensor("shifted", shape, "fp32")
    return (
        Op(
            f"{n}.cross_entropy",
            (logits, targets),
            (Tensor("loss", "", "fp32"), Tensor("log_probs", shape, "fp32")),
            (),
            (Keep("log_probs", logits), Keep(targets, logits)),
            scratch=(wide, *(Tensor(what, "b s", "fp32") for what in ("maxima", "sums", "own"))),
            scratch_back=(
                *(Scratch(wide._replace(name=what)) for what in ("zeros", "exponents")),
                *(Scratch(Tensor(what, "b s", "int64")) for what in ("labels", "own labels", "rows")),
                *(Scratch(Tensor(what, "b s", "fp32")) for what in ("updates", "gradients")),
                Scratch(Tensor("others", "b s", "bool")),
            ),
            source=source,
        ),
    )


def _converted(logits: str, shape: str = "b s v") -> Op:
    """Under autocast accelerate casts the outputs to fp32 before it hands them on, the logits too."""
    source = "accelerate 1.0 utils/operations.py ConvertOutputsToFp32"
    return Op("loss.outputs", (logits,), (Tensor("outputs", shape, "fp32"),), cast=True, gradient="none", source=source)


def _float(logits: str, source: str) -> Op:
    return Op("loss.float", (logits,), (Tensor("logits32", "b s v", "fp32"),), cast=True, source=source)


def _shifted(logits: str, source: str, single: bool) -> tuple[Op, ...]:
    """All rows but the last, and all labels but the first. The gradient of the logits is made whole again."""
    rows = Tensor("shifted", "shifted_rows v")
    copy = Op("loss.shift", (logits,), (rows,), gradient="new", view=single, source=source)
    return (
        copy,
        Op("loss.shift_labels", ("labels",), (Tensor("targets", "shifted_labels", "int64"),), source=source),
    )


_SHIFTED = {
    "shifted": "transformers 4.48 loss/loss_utils.py ForCausalLMLoss",
    "model": "transformers 4.45 models/llama/modeling_llama.py LlamaForCausalLM.forward",
    "half": "transformers 4.48 models/gpt_bigcode/modeling_gpt_bigcode.py GPTBigCodeForCausalLM.forward",
}


def _overwriting(n: str, logits: str, made: str, targets: str, shape: str, loss: str) -> tuple[Op, ...]:
    """A kernel that keeps the logits and an fp32 number a row, and hands back the logits' storage as their gradient."""
    rows = shape.removesuffix(" v")
    sums = f"{n}.logsumexp"
    return (
        Op(
            f"{n}.cross_entropy",
            (logits, targets),
            (Tensor(loss, "", "fp32"), Tensor(sums, rows, "fp32")),
            (),
            (Keep(logits, logits, becomes=True), Keep(sums, logits), Keep(targets, logits)),
            scratch=(Tensor("losses", rows, "fp32"),),
            scratch_back=(Scratch(Tensor("gradient of losses", rows, "fp32")),),
            source="unsloth 2025.1 kernels/cross_entropy_loss.py Fast_CrossEntropyLoss",
        ),
    )


def nll(n: str, logits: str, log_probs: str, targets: str, shape: str, loss: str) -> tuple[Op, ...]:
    """cross_entropy names the logits' own dtype to log_softmax, which autocast then leaves alone."""
    weight = f"{loss}.total_weight"
    return (
        Op(
            f"{n}.log_softmax",
            (logits,),
            (Tensor(log_probs, shape),),
            (),
            (Keep(log_probs, logits),),
            source=f"{ops.DERIVATIVES}: _log_softmax",
        ),
        Op(
            f"{n}.nll",
            (log_probs, targets),
            (Tensor(loss), Tensor(weight)),
            (),
            (Keep(log_probs, log_probs), Keep(targets, log_probs), Keep(weight, log_probs)),
            autocast="fp32",
            source=f"{ops.DERIVATIVES}: nll_loss_forward",
        ),
    )


def _chunked(head: tuple[Op, ...]) -> Iterator[Op]:
    """Every chunk (`lc` tokens of each sequence) has its own head and loss; all heads run before the first loss."""
    source = "torchtune 0.6 modules/loss/ce_chunked_output_loss.py"
    chunks = range(_CHUNKS)
    yield _targets(source)
    yield ops.split("loss.chunk", "n", tuple(Tensor(f"n{i}", "b lc h") for i in chunks))
    for i in chunks:
        for op in head:
            yield _chunk_of(op, i)
    logits = _last_writer(head).writes[0].name
    for i in chunks:
        yield Op(f"loss.float{i}", (f"{logits}{i}",), (Tensor(f"logits32{i}", "b lc v", "fp32"),), cast=True)
        yield from nll(f"loss{i}", f"logits32{i}", f"log_probs{i}", "targets", "b lc v", f"loss{i}")
        yield ops.leave(f"logits32{i}")
    parts = tuple(f"loss{i}" for i in chunks)
    yield Op("loss.sum", parts, (Tensor("loss", "", "fp32"),), gradient="same", source=source)
    yield ops.leave(*(f"{logits}{i}" for i in chunks), "padded_labels")


def _chunk_of(op: Op, i: int | str, rows: str = "lc") -> Op:
    """The head's operation for chunk `i` of `rows` tokens: all its tensors are the chunk's own, but not its weights."""

    def rename(name: str) -> str:
        return name if any(name == w.name for w in op.weights) else f"{name}{i}"

    def rows_of(t: Tensor) -> Tensor:
        return t._replace(shape=t.shape.replace("b s ", f"b {rows} ", 1))

    chunk = ops.renamed(op, rename)
    return chunk._replace(
        writes=tuple(map(rows_of, chunk.writes)),
        scratch=tuple(map(rows_of, chunk.scratch)),
        scratch_back=tuple(s._replace(tensor=rows_of(s.tensor)) for s in chunk.scratch_back),
    )


def _through_by_chunk(head: tuple[Op, ...], chunk: str = "128") -> Iterator[Op]:
    """What lies between the projection and the logits comes chunk by chunk, and so do its gradients; only what is kept
    of it is there for all tokens."""
    last = _last_writer(head)
    same = {r for op in head if op.cast for r in op.reads}  # may be the logits themselves, in the dtype they have
    inner = {t.name for op in head if op is not last for t in op.writes if t.shape == "b s v"} - same
    kept = {k.what for op in head for k in op.keeps} & inner
    for op in head:
        made = tuple(t._replace(shape=f"b {chunk} v") if t.name in inner else t for t in op.writes)
        whole = tuple(Tensor(f"{t.name}.kept", "b s v", f"={t.name}") for t in op.writes if t.name in kept)
        keeps = tuple(k._replace(what=f"{k.what}.kept") if k.what in kept else k for k in op.keeps)
        yield op._replace(writes=(*made, *whole), keeps=keeps)


def _summed_by_chunk(op: Op) -> Op:
    """A weight's gradient is the sum of every chunk's: beside it the next one and their sum, since they are views."""
    sums = tuple(Scratch(Tensor(f"{what} of {w.name}", w.shape, w.dtype), w.name) for w in op.weights for what in _SUM)
    return op._replace(scratch_back=(*op.scratch_back, *sums))


def _cast_by_chunk(op: Op, autocast: str | None) -> Op:
    """Autocast casts a frozen head for every chunk of 128 tokens anew, and each product keeps its cast."""
    w = next((w for w in op.weights if w.matrix), None)
    if autocast is None or w is None or w.trains or w.stored or w.dtype == autocast:
        return op
    casts = Tensor(f"casts of {w.name} for further chunks", f"further_chunks {w.shape}", autocast)
    return op._replace(writes=(*op.writes, casts), keeps=(*op.keeps, Keep(casts.name, op.reads[0])))


_SUM = ("gradient of a chunk", "sum of gradients")


# Of chunks of CHUNK tokens, by the axes that count their tokens: all before the last two, the one before the last, and
# the last. On the way back the last is first, and the head's gradients of it and of the one before are summed.
_PARTS = ("lm_rest", "lm_next", "lm_last")


def _heads_by_chunk(head: tuple[Op, ...], parts: tuple[str, ...], single: bool) -> Iterator[Op]:
    """Hidden states are split, which copies a chunk of several sequences, and every chunk has its own product."""
    source = "litgpt 0.5 model.py GPT.forward"
    yield ops.split("lm_head.split", "n", tuple(Tensor(f"n.{part}", f"b {part} h") for part in parts))
    for part in parts:
        yield ops.copy("lm_head.flatten", f"n.{part}", f"n{part}", f"b {part} h")._replace(view=single, source=source)
        for op in _through_by_chunk(head, "lm_one") if part == "lm_rest" else head:
            yield _chunk_of(op, part, part)
        yield ops.leave(f"n{part}")
    yield ops.leave("n")


def _chunked_lm_head(logits: str, parts: tuple[str, ...], single: bool) -> Iterator[Op]:
    """Log-probabilities stay in the logits' dtype; a chunk's gradient comes as its log-probabilities go.

    The last row of the last chunk has no label: without it, several sequences' logits are copied, and their gradient is
    made whole again. Under autocast all is otherwise, and a frozen fp32 head is cast for every chunk: refused where the
    run is decided.
    """
    source = "litgpt 0.5 utils.py chunked_cross_entropy"
    *others, last = parts
    read = {**{part: f"{logits}{part}" for part in others}, last: "loss.rows"}
    labels = (Tensor("targets", "shifted_labels", "int64"),)
    yield Op("loss.shift_labels", ("labels",), labels, view=single, source=source)
    shifted = (Tensor("loss.rows", "b lm_rows v"),)
    yield Op("loss.shift", (f"{logits}{last}",), shifted, view=single, source=source)
    for part in parts:
        x, log_probs, rows = read[part], f"log_probs.{part}", "lm_rows" if part == last else part
        chunk = Tensor("gradient of a chunk", f"b {'lm_one' if part == 'lm_rest' else rows} v", f"={x}")
        yield Op(
            "loss.chunks",
            (x, "targets"),
            (Tensor(f"losses.{part}", f"b {rows}", f"={x}"), Tensor(log_probs, f"b {rows} v", f"={x}")),
            (),
            (Keep(log_probs, x, becomes=True), Keep("targets", x)),
            scratch_back=(Scratch(chunk), Scratch(chunk)),
            source=source,
        )
    losses = tuple(f"losses.{part}" for part in parts)
    yield Op("loss.cat", losses, (Tensor("losses", "shifted_rows"),), gradient="view", source=source)
    yield Op("loss.sum", ("losses",), (Tensor("loss", "", "fp32"),), gradient="view", source=source)
    yield ops.leave("losses", *losses, "loss.rows", "targets", *(f"{logits}{part}" for part in parts))


def _converted_chunks(logits: str) -> tuple[Op, ...]:
    """As lightning's Fabric has it: chunks of logits that are cast to fp32 before the training loop holds them.

    A chunk's gradient comes in fp32 as its log-probabilities go, and is cast before the next chunk's: as much as half
    of the log-probabilities is what stays.
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
        ops.leave(logits, "n"),
        _targets(source),
        Op(
            "loss.chunks",
            (outputs, "targets"),
            (Tensor("loss", "", "fp32"), half, rest),
            (),
            (Keep(half.name, outputs, becomes=True), Keep(rest.name, outputs), Keep("targets", outputs)),
            scratch_back=(Scratch(chunk), Scratch(chunk)),
            source=source,
        ),
        ops.leave("padded_labels"),
    )


def adds_in_place(capability: tuple[int, int] | None) -> bool:
    """Whether the fused loss adds half-precision products into the head's gradient without a copy of its size."""
    return capability is None or capability >= (8, 0)


def _fused(matrix: Weight, autocast: str | None, in_place: bool, shifted: bool, single: bool) -> tuple[Op, ...]:
    """Chunks of `fc` tokens: logits, their gradient over them, and its products with the head's weight and the input.

    What backward hands on was made in forward: a gradient as large as the hidden states, and one of the weight if
    it trains. In fp32, on cards before Ampere and by Liger 0.6 to 0.8.2, a chunk's part of that is made apart, in fp32,
    before it is added.
    Autocast casts the weight for the first product every time, since it sees a view of it, and keeps the second's cast.
    `shifted`: until Liger 0.5 the hidden states of all rows but the last were copied (not of a `single` sequence), and
    the gradient of a chunk's logits was scaled into a copy.
    """
    source = f"liger-kernel {'0.5.2' if shifted else '0.8'} ops/fused_linear_cross_entropy.py"
    rows, read = ("shifted_rows h", "n.shifted") if shifted else ("b s h", "n")
    made = (Tensor("loss", "", "fp32"), Tensor("hidden_gradient", rows, "=n"))
    keeps = (Keep("hidden_gradient", read, becomes=True),)
    half = (autocast or matrix.dtype) != "fp32"
    beside: tuple[Tensor, ...] = ()
    kept: tuple[Tensor, ...] = ()
    if autocast and matrix.dtype != autocast:
        beside = (Tensor("head weight cast", matrix.shape, autocast),)
        kept = beside if matrix.trains else ()
    if matrix.trains:
        made += (Tensor("head_gradient", matrix.shape, matrix.dtype),)
        keeps += (Keep("head_gradient", matrix.name, becomes=True),)
        if not (half and in_place):
            product = Tensor("product of a chunk", matrix.shape, autocast or "")
            beside = (product, *((Tensor("product in fp32", matrix.shape, "fp32"),) if half else ()))
    chunk = Tensor("logits of a chunk", "fc v", autocast or "")
    copied = Op("loss.shift", ("n",), (Tensor(read, rows),), gradient="new", view=single, source=source)
    labels = Op("loss.shift_labels", ("labels",), (Tensor("targets", "shifted_labels", "int64"),), source=source)
    return (
        *((copied, labels) if shifted else (_targets(source),)),
        Op(
            "loss.fused",
            (read, "targets"),
            made,
            (matrix,),
            keeps,
            scratch=(
                Tensor("losses", "b s", "fp32"),
                chunk,
                *((chunk._replace(name="scaled gradient of a chunk"),) if shifted else ()),
                *kept,
                *beside,
            ),
            product="matrix",
            source=source,
        ),
        ops.leave("targets" if shifted else "padded_labels", read, "n"),
    )
