"""TRL's trainers between a model's forward and its backward pass: log-probabilities, the reference's pass, the loss.

A batch has the chosen sequences first, then the rejected ones. The reference's forward runs while the policy's graph is
alive; its operation carries that model (`memplan.core.ir.Op.model`). memplan counts every token but the first as one of
a completion.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.losses import begins_head, matrix_and_bias, nll
from memplan.catalogue.kernels.rewriting import idle, renamed, rewrite
from memplan.catalogue.kernels.trl_losses import fused_pair_loss, recomputed_log_probs, tiled_lm_head
from memplan.catalogue.kernels.unsloth_loss import chunked_log_probs
from memplan.catalogue.kernels.wiring import IN_PARTS, PAIRED, Trainer
from memplan.core.ir import MODEL, Keep, Op, Scratch, Stack, Tensor, Weight

_SOURCES = {
    "joined": "trl 0.24.0 trainer/dpo_trainer.py concatenated_forward, trainer/utils.py selective_log_softmax",
    "rolled": "ms-swift 4.6.0 rlhf_trainers/dpo_trainer.py concatenated_forward, rlhf_mixin.py get_per_token_logps",
    "shifted": "trl 1.13.0 trainer/dpo_trainer.py _compute_loss, trainer/utils.py selective_log_softmax",
    "kernel": "trl 1.14.1 trainer/dpo_trainer.py _compute_loss, kernels/logprob_entropy.py _LogProbEntropyFunction",
    "gathered": "llamafactory 0.9.5 train/dpo/trainer.py concatenated_forward, train/trainer_utils.py get_batch_logps",
    "tiled": "trl 1.16.0 trainer/dpo_trainer.py _compute_loss, trainer/utils.py add_fused_lm_head",
    "recomputed": "trl 1.14.1 trainer/dpo_trainer.py _get_per_token_logps_and_entropies",
    "chunked": "trl 1.15.0 trainer/dpo_trainer.py; unsloth 2026.10.9 models/rl.py _UnslothFusedLinearHead",
    "kto": "trl 1.16.0 trainer/kto_trainer.py _compute_loss, _compute_kl_logps",
    "reward": "trl 1.16.0 trainer/reward_trainer.py compute_loss",
    "orpo": "trl 1.16.0 experimental/orpo/orpo_trainer.py concatenated_forward, get_batch_logps",
    **dict.fromkeys(("cpo", "simpo"), "trl 1.16.0 experimental/cpo/cpo_trainer.py concatenated_forward"),
}
_SHIFTED = ("shifted", "kernel")
_KTO_COPIES = "llamafactory 0.9.5 train/kto/trainer.py concatenated_forward; trl 0.24.0 and 1.6.0 kto_trainer.py"
_FSDP2 = "torch 2.13 distributed/fsdp/_fully_shard/_fsdp_state.py _post_forward (output_dtype)"
_CASTS = "accelerate 1.15 utils/operations.py ConvertOutputsToFp32"


def source_of(trainer: Trainer) -> str:
    """Return where a trainer's step was read."""
    by_log_probs = _SOURCES[trainer.log_probs]
    return by_log_probs if trainer.log_probs == "gathered" else _SOURCES.get(trainer.name, by_log_probs)


def attach(  # noqa: PLR0911 (a return for each way to compute log-probabilities)
    stack: Stack, trainer: Trainer, reference: Stack | None, first_pass: Stack | None, autocast: str | None
) -> Stack:
    """Return the stack with the trainer's log-probabilities, the reference's pass and the loss.

    reference   operations of the reference model, if it runs in the step
    first_pass  operations of the model itself without gradients: KTO first runs it on completions of other prompts,
                which estimate the divergence (KL) from the reference; the reference runs on these, too
    """
    early = first_pass if trainer.log_probs != "gathered" else None
    before = tuple(new for op in stack.before for new in (_inputs(op, early) if op.name == "inputs" else (op,)))
    stack = stack._replace(before=before, loss=())
    if trainer.value_head:
        return _with_value_head(stack)
    if trainer.name == "reward":
        scores = Op("loss.reward", ("logits",), (Tensor("loss", "", "fp32"),), source=source_of(trainer))
        return stack._replace(loss=(RETURNED, scores))
    start = next(i for i, op in enumerate(stack.after) if begins_head(op))
    body, head = stack.after[:start], stack.after[start:]
    matrix, bias = matrix_and_bias(head)
    if trainer.log_probs == "joined":
        stack = returning_states(stack, "cache" if trainer.fused_gradients and trainer.is_reference else "states")
        body = stack.after[: start + 1]
    if trainer.fused_gradients and not (trainer.is_reference and trainer.name == "kto"):  # KTO first scores by logits
        if trainer.is_reference:
            return _without_head(stack)
        if reference is not None and trainer.copies:  # which it did before the step
            reference = _without_head(reference)
        return stack._replace(after=body, loss=fused_pair_loss(matrix, bias, trainer, reference))
    if trainer.log_probs in IN_PARTS:
        tail = log_probs_in_parts(matrix, bias, autocast, trainer)
        if trainer.log_probs == "recomputed":  # past the backbone, whose output the trainer holds
            tail = (RETURNED, *tail, *((ops.release_names("n"),) if trainer.is_reference else ()))
            return _finished(stack._replace(after=body), trainer, tail, reference, ("n",))
        return _finished(stack._replace(after=body), trainer, (*tail, RETURNED), reference, ())
    logits = next(op for op in reversed(head) if op.writes).writes[0].name
    tail, outputs, is_fp32 = returned(logits, trainer, autocast)
    if trainer.log_probs == "joined":
        tail = (*tail, *_joined_log_probs(logits, outputs, is_fp32, trainer.is_reference))
        return _finished(stack, trainer, tail, reference, ())
    if trainer.log_probs == "rolled":
        source = source_of(trainer)
        log_probs = selected_log_probs("loss.log_probs", outputs, "b s v", "s", is_fp32, "log_probs", source)
        return _finished(stack, trainer, (*tail, *log_probs, ops.release_names(outputs)), reference, ())
    if trainer.log_probs == "gathered":
        tail = (*tail, *_gathered_log_probs(outputs))
        if first_pass is not None:
            tail = (*tail, _other_completions(first_pass), *_halves("", outputs, trainer))
            return _finished(stack, trainer, tail, reference, ("halves",))
        return _finished(stack, trainer, tail, reference, (outputs,))
    if trainer.likelihood:
        tail = (*tail, *_likelihood(outputs, source_of(trainer)))
    if not trainer.is_reference:
        tail = (*tail, *_shifted_log_probs("", outputs, is_fp32, trainer))
        tail += tuple(_halves("", outputs, trainer))
    elif trainer.fused_gradients:
        stack = stack._replace(after=(*body, Op("return", releases="cache"), *head))
        read = (outputs,) if trainer.copies else (outputs, "n")  # a variable of the trainer's, since TRL 1.10
        tail = (*tail, *_shifted_log_probs("ref_", outputs, is_fp32, trainer), ops.release_names(*read))
    held = {"": (outputs, "shifted"), "halves": ("halves",), "all": (outputs, "shifted", "halves")}[trainer.copies]
    return _finished(stack, trainer, tail, reference, held, is_fp32)


def _without_head(stack: Stack) -> Stack:
    """Return the stack of a model whose head the loss reads later."""
    start = next(i for i, op in enumerate(stack.after) if begins_head(op))
    matrix, bias = matrix_and_bias(stack.after[start:])
    return stack._replace(after=(*stack.after[:start], Op("lm_head", weights=(matrix, *bias), gradient="none")))


def _with_value_head(stack: Stack) -> Stack:
    """Return the stack of a model that scores every token by a head of its own, next to the language model's.

    TRL's wrapper asks for all states and casts the logits to fp32; the trainer reads the scores alone. The graph of the
    logits, through which no gradient flows, keeps their input as autocast has cast it.
    """
    source = "llamafactory 0.9.5 train/rm/trainer.py compute_loss; trl 0.24.0 models/modeling_value_head.py"
    stack = returning_states(stack)
    start = next(i for i, op in enumerate(stack.after) if begins_head(op))
    logits = next(op for op in reversed(stack.after) if op.writes).writes[0].name
    tied = {w.name for op in stack.before for w in op.weights}
    unread = (
        (op if any(w.name in tied for w in op.weights) else idle(op))._replace(gradient="none")
        for op in renamed(stack.after[start:], {"n": "unread"})
    )
    score = ops.linear("v_head.summary", "v_head.wide", "values", "1", "h", "head", bias=True)
    scored = (
        ops.dropout("v_head.dropout", "n", "v_head.dropped", "b s h"),
        ops.cast("v_head.cast", "v_head.dropped", "v_head.wide", "b s h", "fp32"),
        ops.release_names("v_head.dropped"),
        score._replace(weights=tuple(w._replace(dtype="fp32") for w in score.weights)),
        ops.release_names("v_head.wide"),
        ops.cast("v_head.logits", logits, "wide_logits", "b s v", "fp32")._replace(gradient="none"),
        RETURNED._replace(releases="states"),
    )
    loss = Op("loss.reward", ("values",), (Tensor("loss", "", "fp32"),), source=source)
    return stack._replace(
        after=(*stack.after[:start], ops.lowered("lm_head", "n", "unread", "b s h"), *unread, *scored),
        loss=(loss, ops.release_names("values", "wide_logits", logits, "unread")),
    )


RETURNED = Op("return", releases="autocast", returns=MODEL)  # the model's own autocast context ends


def _finished(
    stack: Stack,
    trainer: Trainer,
    tail: tuple[Op, ...],
    reference: Stack | None,
    held: tuple[str, ...],
    is_fp32: bool = False,
) -> Stack:
    """Return the stack with `tail` after the model and, unless it is the reference's, that pass and the loss.

    held     names that the trainer's frame refers to until it returns
    is_fp32  the model's outputs are cast to fp32
    """
    if trainer.is_reference:
        return stack._replace(after=(*stack.after, *tail))
    others: tuple[str, ...] = ()
    loss: list[Op] = [*tail]
    if reference is not None:
        written = [Tensor("ref_log_probs", "b s", "fp32")]
        returns_logits = trainer.log_probs in _SHIFTED
        scores_twice = trainer.log_probs == "gathered" and trainer.has_first_pass
        is_lower = trainer.shards_copy and trainer.reference == "copy"  # nothing casts what it returns
        if returns_logits or scores_twice:
            written = [
                *written[returns_logits:],
                Tensor("ref_outputs", "b s v", "=embeds" if is_lower else f"={held[0]}"),
            ]
        loss.append(Op("reference", (), tuple(written), gradient="none", model=reference, source=source_of(trainer)))
        if scores_twice:
            again = (Tensor("ref_kl_log_probs", "b s", "fp32"),)
            loss.append(Op("reference", (), again, gradient="none", model=reference, source=source_of(trainer)))
        if trainer.log_probs in _SHIFTED:
            loss += _shifted_log_probs("ref_", "ref_outputs", is_fp32 and not is_lower, trainer)
            held = (*held, "ref_outputs", "ref_shifted")
        if trainer.copies == "halves":
            loss += [*_halves("ref_", "ref_outputs", trainer), ops.release_names("ref_halves")]
        others = ("ref_log_probs",)
    others += ("kl_log_probs",) * trainer.has_first_pass + ("chosen_loss",) * trainer.likelihood
    read = ("log_probs", *others)
    loss.append(Op(f"loss.{trainer.name}", read, (Tensor("loss", "", "fp32"),), source=source_of(trainer)))
    if trainer.log_probs in _SHIFTED and trainer.name not in PAIRED and not trainer.copies:
        loss += _metrics(trainer)
    loss.append(ops.release_names(*held, *read))
    return stack._replace(loss=tuple(loss))


def log_probs_in_parts(
    matrix: Weight, bias: tuple[Weight, ...], autocast: str | None, trainer: Trainer, labelled: str = "shifted_rows"
) -> tuple[Op, ...]:
    """Compute log-probabilities from the hidden states of the labelled tokens, in a way of `IN_PARTS`."""
    if trainer.log_probs == "chunked":
        return chunked_log_probs(matrix, bias, autocast, labelled, trainer)
    result = Tensor("log_probs", labelled, "fp32")
    if trainer.log_probs == "recomputed":
        return recomputed_log_probs(matrix, bias, autocast, result)
    return tiled_lm_head(matrix, bias, autocast, result, labelled)


def _inputs(op: Op, first_pass: Stack | None) -> Iterator[Op]:
    """Yield the inputs with the collator's masks, of attention and of completions, and KTO's first pass."""
    yield from with_masks(op, "completion_mask")
    if first_pass is not None:
        yield _other_completions(first_pass)


def _other_completions(model: Stack) -> Op:
    """Run KTO's pass over completions of other prompts."""
    written = (Tensor("kl_log_probs", "b s", "fp32"),)
    return Op("forward", (), written, gradient="none", model=model, source=_SOURCES["kto"])


def _halves(prefix: str, outputs: str, trainer: Trainer) -> Iterator[Op]:
    """Copy the logits of desirable examples and of the others, if KTO does. If it returns them, only they remain."""
    if trainer.copies:
        halves = Tensor(f"{prefix}halves", "b s v", f"={outputs}")
        yield Op("loss.halves", (outputs,), (halves,), gradient="none", source=_KTO_COPIES)
    if trainer.copies == "halves":
        yield ops.release_names(outputs, *((f"{prefix}shifted",) if trainer.log_probs in _SHIFTED else ()))


def with_masks(op: Op, *more: str) -> Iterator[Op]:
    """Yield the inputs with the attention mask and `more` masks of the collator, unless they have them."""
    masks = tuple(Tensor(name, "b s", "int64") for name in ("attention_mask", *more))
    present = {t.name for t in op.writes}
    yield op._replace(writes=(*op.writes, *(t for t in masks if t.name not in present)))


def returning_states(stack: Stack, holds: str = "states") -> Stack:
    """Return the stack of a model that returns each layer's input and the last norm's output (`output_hidden_states`).

    A layer's input is the output of the one before, so all outputs are held until the last layer has returned.
    """

    def held(op: Op) -> tuple[Op, ...]:
        is_state = any(t.name in ("y", "embeds") for t in op.writes)
        return (op._replace(holds=holds) if is_state and not op.holds else op,)

    stack = rewrite(stack, held)
    last = (op._replace(holds=holds) if any(t.name == "n" for t in op.writes) else op for op in stack.after)
    dtype = Op("state", ("x",), (Tensor("state", "0", "=x"),), gradient="none", releases=f"last {holds}")
    return stack._replace(after=(dtype, *last))


def converted(logits: str, shape: str = "b s v") -> Op:
    """Cast the model's outputs to fp32, as accelerate does."""
    return Op("loss.outputs", (logits,), (Tensor("outputs", shape, "fp32"),), cast=True, returns=MODEL, source=_CASTS)


def returned(
    logits: str, trainer: Trainer, autocast: str | None, shape: str = "b s v"
) -> tuple[tuple[Op, ...], str, bool]:
    """Return what happens to the logits until the trainer has them, their name then, and whether they are fp32."""
    if not trainer.widens(autocast):
        return (RETURNED,), logits, False
    widened = (RETURNED._replace(returns=""), converted(logits, shape))
    if not (trainer.casts_back and autocast):
        return widened, "outputs", True
    lower = (Tensor("lower_outputs", shape, autocast),)
    cast = Op("loss.lower_outputs", ("outputs",), lower, cast=True, source=_FSDP2)
    return (*widened, cast, ops.release_names("outputs")), "lower_outputs", False


def converted_states(logits: str) -> Iterator[Op]:
    """Cast the states that the model returns with its logits to fp32, as accelerate does."""
    embeds, states = Tensor("embeds32", "b s h", "fp32"), Tensor("states32", "L b s h", "fp32")
    yield Op("loss.embeddings", ("embeds",), (embeds,), cast=True, gradient="none", source=_CASTS)
    read = ("state", logits)
    yield Op("loss.states", read, (states,), cast=True, gradient="none", releases="states", source=_CASTS)


def selected_log_probs(
    name: str, x: str, shape: str, row: str, is_fp32: bool, log_probs: str, source: str, *, is_reference: bool = False
) -> Iterator[Op]:
    """Compute log-probabilities of the tokens, one sequence after the other.

    From fp32 logits it subtracts their logsumexp and keeps them; from others it keeps each sequence's log-softmax until
    the sequence's gradient is there. Backward makes every sequence's gradient, and joins them. A reference has none, so
    a sequence's log-softmax only lasts until the next one's exists.
    """
    written = Tensor(log_probs, "b s", f"={x}")
    if is_fp32:
        exponents = Tensor("exponents of a sequence", f"{row} v", f"={x}")
        gradients = Scratch(Tensor("gradients by sequence", shape, f"={x}"))
        inside = Scratch(Tensor("differences and exponents of a sequence", f"2 {row} v", f"={x}"), early=True)
        kept = (Keep(x, x),)
        yield Op(name, (x, "ids"), (written,), (), kept, (exponents,), (gradients, inside), source=source)
        return
    if is_reference:
        two = (Tensor("log-softmax of two sequences", f"2 {row} v", f"={x}"),)
        yield Op(name, (x, "ids"), (written,), scratch=two, gradient="none", source=source)
        return
    rows, all_ = f"{x} by sequence", Tensor(f"{log_probs}.all", shape, f"={x}")
    yield Op(f"{name}.sequences", (x,), (Tensor(rows, shape, f"={x}"),), view=True, source=source)
    yield Op(name, (rows, "ids"), (written, all_), keeps=(Keep(all_.name, rows),), source=source)


def _joined_log_probs(logits: str, outputs: str, is_fp32: bool, is_reference: bool) -> Iterator[Op]:
    """Compute log-probabilities of all tokens, and mean logits of the chosen half from a copy of it.

    The model returned its hidden states too, which accelerate casts with the logits.
    """
    source, cast = _SOURCES["joined"], tuple(converted_states(logits)) if is_fp32 else ()
    yield from cast
    of = {"is_reference": is_reference}
    yield from selected_log_probs("loss.log_probs", outputs, "b s v", "s", is_fp32, "log_probs", source, **of)
    half = Tensor("logits of the chosen half", "half_tokens v", f"={outputs}")
    yield Op("loss.mean_logits", (outputs,), gradient="none", scratch=(half,), source=source)
    yield Op("return", (outputs, *(t.name for op in cast for t in op.writes)), releases="states")


def _shifted_log_probs(prefix: str, outputs: str, is_fp32: bool, trainer: Trainer) -> Iterator[Op]:
    """Compute log-probabilities of all tokens but the first, in a loop over sequences or by a kernel.

    The kernel keeps the logits, in any dtype, and four fp32 numbers per token.
    """
    kind, shifted, result = trainer.log_probs, f"{prefix}shifted", f"{prefix}log_probs"
    source, rows = _SOURCES[kind], (Tensor(shifted, "shifted_rows v", f"={outputs}"),)
    yield Op("loss.shift", (outputs,), rows, view=trainer.copies != "all", source=source)
    name = f"loss.{result}"
    if kind == "shifted":
        of = {"is_reference": bool(prefix)}
        yield from selected_log_probs(name, shifted, "shifted_rows v", "row_tokens", is_fp32, result, source, **of)
        return
    numbers = tuple(f"{result}.{what}" for what in ("entropy", "log_z", "expected_logit"))
    written = tuple(Tensor(what, "shifted_rows", "fp32") for what in (result, *numbers))
    kept = tuple(Keep(what, shifted) for what in (shifted, *numbers[1:]))
    yield Op(name, (shifted, "ids"), written, keeps=kept, gradient="own", source=source)


def _gathered_log_probs(outputs: str) -> Iterator[Op]:
    """Compute the log-softmax of all logits, which backward keeps, and gather the tokens' from it."""
    source, rows = _SOURCES["gathered"], "shifted_rows v"
    yield Op("loss.shift", (outputs,), (Tensor("shifted", rows, f"={outputs}"),), view=True, source=source)
    yield ops.keeping_output("loss.log_softmax", "shifted", "all_log_probs", rows, "_log_softmax")
    kept = (Keep("all_log_probs", "all_log_probs"),)
    written = (Tensor("log_probs", "b s", "=all_log_probs"),)
    yield Op("loss.gather", ("all_log_probs", "ids"), written, keeps=kept, source=source)
    yield ops.release_names("all_log_probs", "shifted")


def _likelihood(outputs: str, source: str) -> Iterator[Op]:
    """Compute the cross-entropy of the chosen half, outside of autocast. Several sequences are copied without their
    last logits."""
    chosen, rows = Tensor("chosen", "half_tokens v", f"={outputs}"), Tensor("chosen_rows", "chosen_copied v", "=chosen")
    yield Op("loss.chosen", (outputs,), (chosen,), view=True, source=source)
    yield Op("loss.shift_chosen", ("chosen",), (rows,), source=source)
    yield Op("loss.shift_labels", ("labels",), (Tensor("targets", "half_rows", "int64"),), gradient="none")
    losses = nll("chosen_loss", "chosen_rows", "chosen_log_probs", "targets", "half_rows v")
    yield from (op._replace(autocast="") for op in losses)
    yield ops.release_names("chosen", "chosen_rows")


def _metrics(trainer: Trainer) -> Iterator[Op]:
    """Compute entropies from a copy of the logits, 128 tokens at a time, and mean logits of one half after the other.

    A chunk's log-softmax is alive until the next chunk's exists. A kernel has computed the entropies already.
    """
    source = source_of(trainer)
    words = "entropy_rows v"
    names = ("log-softmax of a chunk", "probabilities of a chunk", "products of a chunk")
    flat = Tensor("flat logits", "shifted_rows v", "=shifted")
    chunk = tuple(Tensor(name, words, "=shifted") for name in names)
    if trainer.log_probs == "shifted":
        yield Op("loss.entropy", ("shifted",), gradient="none", scratch=(flat, *chunk), source=source)
    others = ("logits of the other", "logits of labelled tokens") if trainer.name == "kto" else ()
    halves = tuple(Tensor(name, "half_rows v", "=shifted") for name in ("logits of one half", *others))
    yield Op("loss.mean_logits", ("shifted",), gradient="none", scratch=halves, source=source)
