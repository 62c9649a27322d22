"""TRL's trainers that generate, GRPO and RLOO, from a model's head to the loss of one micro-batch of completions.

The step generates its batch first (`memplan.estimate.rollout`), and the reference's forward runs on it before the
policy's. Only completions have log-probabilities: the axis `completion` counts the tokens of one, `completion_rows`
those of a micro-batch, `kept` the tokens of one sequence whose logits are computed, one more.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.losses import begins_head, matrix_and_bias
from memplan.catalogue.kernels.preference import RETURNED, log_probs_in_parts, returned, selected_log_probs
from memplan.catalogue.kernels.trl_losses import fused_policy_loss
from memplan.catalogue.kernels.wiring import IN_PARTS, Trainer
from memplan.core.ir import Keep, Op, Scratch, Stack, Tensor

_ROWS = "completion_rows"
_COPIES = ("copied", "divided")
_SOURCES = {
    "tiled": "trl 1.16.0 trainer/grpo_trainer.py _get_per_token_logps_and_entropies, utils.py add_fused_lm_head",
    "recomputed": "trl 1.14.1 trainer/grpo_trainer.py _get_per_token_logps_and_entropies, trainer/utils.py",
    "chunked": "unsloth_zoo 2026.10.9 rl_replacements.py grpo_accumulated_loss, grpo_chunked_hidden_states_logprobs",
    "kernel": "trl 1.14.1 trainer/grpo_trainer.py _full_logits_logps, kernels/logprob_entropy.py",
    "shifted": "trl 1.13.0 trainer/grpo_trainer.py _get_per_token_logps_and_entropies",
    "rolled": "ms-swift 4.6.0 rlhf_trainers/grpo_trainer.py _get_logps_via_local_forward",
    "sliced": "trl 1.12.0 experimental/ppo/ppo_trainer.py train, the same in trl 0.24.0",
    "joined": "trl 0.24.0 trainer/grpo_trainer.py _get_per_token_logps_and_entropies",
    "overwritten": "verl 0.9.1 workers/engine/fsdp/transformer_impl.py prepare_model_outputs: inplace_backward",
}
_LOSS = "trl 1.16.0 trainer/grpo_trainer.py _compute_loss"
_BATCH = "trl 1.16.0 trainer/grpo_trainer.py _generate_and_score_completions"


def attach(
    stack: Stack, trainer: Trainer, reference: Stack | None, first_pass: Stack | None, autocast: str | None
) -> Stack:
    """Return the stack with log-probabilities of completions, their entropies, and the loss.

    reference   operations of the reference model, if it runs in the step
    first_pass  operations of the policy without gradients, if log-probabilities are computed before its step, too
    """
    scored: tuple[Op, ...] = ()
    if not trainer.is_reference:
        scored = tuple(_scored("forward", "old_log_probs", first_pass, trainer))
        scored += tuple(_scored("reference", "ref_log_probs", reference, trainer))
        before = (
            new for op in stack.before for new in ((with_generated(op), *scored) if op.name == "inputs" else (op,))
        )
        stack = stack._replace(before=tuple(before))
    start = next(i for i, op in enumerate(stack.after) if begins_head(op))
    body, head = stack.after[:start], stack.after[start:]
    if trainer.log_probs in IN_PARTS or (trainer.fused_gradients and not trainer.is_reference):
        matrix, bias = matrix_and_bias(head)
        if trainer.fused_gradients:
            read = tuple(t.name for op in scored for t in op.writes)
            ends = ops.release_names(*read)
            return stack._replace(after=body, loss=(*fused_policy_loss(matrix, bias, trainer.fused_gradients), ends))
        after, loss = (
            body,
            (*log_probs_in_parts(matrix, bias, autocast, trainer, _ROWS), ops.release_names("n"), RETURNED),
        )
    else:
        after = (*body, *(head if trainer.prompt_logits else _kept_tokens(head, trainer)))
        logits = next(op for op in reversed(after) if op.writes).writes[0].name
        tail, outputs, is_fp32 = returned(logits, trainer, autocast, "b kept v")
        held: tuple[Tensor, ...] = ()
        if trainer.is_reference and trainer.has_parts and not trainer.prompt_logits:
            held = tuple(_held(trainer, "fp32" if is_fp32 else "=embeds"))
            stack = stack._replace(before=(*stack.before, Op("hold", ("embeds",), held, gradient="none")))
        released = ops.release_names(*(t.name for t in held))
        loss = (*tail, released, *log_probs_of_logits(outputs, trainer, is_fp32))
    if trainer.is_reference:
        return stack._replace(after=(*after, *loss), loss=())
    bonus = trainer.entropy_bonus and trainer.log_probs == "shifted"  # later kernels have the entropies in any case
    read = ("log_probs", *(("entropies",) if bonus else ()), *(t.name for op in scored for t in op.writes))
    last = Op(f"loss.{trainer.name}", read, (Tensor("loss", "", "fp32"),), source=_LOSS)
    return stack._replace(after=after, loss=(*loss, last, ops.release_names(*read)))


def with_generated(op: Op) -> Op:
    """Return the inputs with the generation batch, of which each micro-batch is a part."""
    parts = tuple(Tensor(f"generated {what}", "generated s", "int64") for what in ("tokens", "masks"))
    return op._replace(writes=(*op.writes, Tensor("attention_mask", "b s", "int64"), *parts), source=_BATCH)


def _scored(phase: str, name: str, model: Stack | None, trainer: Trainer) -> Iterator[Op]:
    """Yield a model's pass over the generation batch, a micro-batch at a time."""
    if model is not None:
        written = (Tensor(name, "generated completion", "fp32"),)
        yield Op(phase, (), written, gradient="none", model=model, source=_SOURCES[trainer.log_probs])


def _kept_tokens(head: tuple[Op, ...], trainer: Trainer) -> Iterator[Op]:
    """Yield the head over the tokens of completions and the one before. Those of several sequences are copied."""

    def kept(text: str) -> str:
        return " ".join("kept" if axis == "s" else axis for axis in text.split())

    x = head[0].reads[0]
    part = f"{x} of completions"
    yield Op("loss.kept", (x,), (Tensor(part, "b kept h", f"={x}"),), view=trainer.has_one_sequence, source=_BATCH)
    yield ops.release_names(x)
    for whole in head:
        op = ops.with_shapes(whole, kept)
        reads = tuple(part if name == x else name for name in op.reads)
        keeps = tuple(k._replace(**{f: part for f in ("what", "of") if getattr(k, f) == x}) for k in op.keeps)
        yield op._replace(reads=reads, keeps=keeps)
    yield ops.release_names(part)


def _held(trainer: Trainer, dtype: str) -> Iterator[Tensor]:
    """Yield what variables of the loop over parts of a batch hold of the part before until the model has returned."""
    divides = trainer.log_probs == "shifted" and trainer.divided_logits != "in_place"
    if not divides or trainer.divided_logits == "held":
        yield Tensor("logits of the part before", "b kept v", dtype)
    if divides:
        yield Tensor("divided logits of the part before", f"{_ROWS} v", dtype)


def log_probs_of_logits(outputs: str, trainer: Trainer, is_fp32: bool, logits_shape: str = "b kept v") -> Iterator[Op]:
    """Compute log-probabilities and entropies from all logits, which the temperature divides first.

    A kernel divides, and computes the entropies, by itself. ms-swift computes no entropies unless it logs them.
    """
    source, shape = _SOURCES[trainer.log_probs], f"{_ROWS} v"
    logits = "logits of completions"
    if trainer.prompt_logits:  # a kernel reads the logits as they are, and may overwrite them with their gradient
        written = tuple(Tensor(what, "b kept", "fp32") for what in ("log_probs", "log_probs.log_z"))
        is_gradient = trainer.log_probs == "overwritten"
        kept = (Keep(outputs, outputs, is_gradient=is_gradient), Keep("log_probs.log_z", outputs))
        yield Op("loss.log_probs", (outputs, "ids"), written, keeps=kept, gradient="own", source=source)
        yield ops.release_names(outputs, "log_probs.log_z")
        return
    if trainer.divided_logits == "in_place" and trainer.log_probs in ("shifted", "rolled", "sliced"):
        # backward of an operation in place on a view copies the gradient of all logits, and of the view twice
        parts = tuple(Scratch(Tensor(f"gradient of the view, {what}", shape, f"={outputs}")) for what in _COPIES)
        divided = (Tensor("divided", logits_shape, f"={outputs}"),)
        yield Op("loss.temperature", (outputs,), divided, view=True, scratch_back=parts, source=source)
        yield ops.release_names(outputs)
        outputs = "divided"
    yield Op("loss.drop_last", (outputs,), (Tensor("shifted", shape, f"={outputs}"),), view=True, source=source)
    yield Op("loss.keep", ("shifted",), (Tensor(logits, shape, f"={outputs}"),), view=True, source=source)
    if trainer.log_probs == "kernel":
        numbers = tuple(f"log_probs.{what}" for what in ("entropy", "log_z", "expected_logit"))
        written = tuple(Tensor(what, _ROWS, "fp32") for what in ("log_probs", *numbers))
        kept = tuple(Keep(what, logits) for what in (logits, *numbers[1:]))
        yield Op("loss.log_probs", (logits, "ids"), written, keeps=kept, gradient="own", source=source)
        yield ops.release_names(outputs, "shifted", logits, *numbers)
        return
    if trainer.divided_logits != "in_place":
        yield Op("loss.temperature", (logits,), (Tensor("scaled", shape, f"={outputs}"),), source=source)
        yield ops.release_names(*(() if trainer.divided_logits == "held" else (outputs,)), "shifted", logits)
        logits = "scaled"
    yield from selected_log_probs("loss.log_probs", logits, shape, "completion", is_fp32, "log_probs", source)
    if not trainer.is_reference and trainer.log_probs not in ("rolled", "sliced"):
        names = ("log-softmax", "probabilities", "products")
        chunk = tuple(Tensor(f"{name} of a chunk", "entropy_rows v", f"={logits}") for name in names)
        flat = (
            (Tensor("flat logits", shape, f"={logits}"),)
            if trainer.divided_logits == "in_place" and not trainer.has_one_sequence
            else ()
        )
        if trainer.entropy_bonus:  # chunks have gradients of their own, which are joined
            kept = tuple(Tensor(f"{name} of all chunks", shape, f"={logits}") for name in names[:2])
            parts, written = Scratch(kept[0]._replace(name="gradients of chunks")), Tensor("entropies", _ROWS, "=chunk")
            one, keeps = Tensor("chunk", "entropy_rows v", f"={logits}"), tuple(Keep(t.name, "chunk") for t in kept)
            yield Op("loss.chunks", (logits,), (one,), view=True, scratch_back=(parts,), source=source)
            back = tuple(Scratch(t._replace(name=f"{t.name}, gradients")) for t in chunk[:2])
            yield Op("loss.entropy", ("chunk",), (written, *kept), (), keeps, chunk[2:], back, source=source)
            yield ops.release_names("chunk", *(t.name for t in kept))
        else:
            yield Op("loss.entropy", (logits,), gradient="none", scratch=(*flat, *chunk), source=source)
    held = {"in_place": (outputs, "shifted"), "held": (outputs,), "released": ()}[trainer.divided_logits]
    yield ops.release_names(*held, logits)
