"""TRL's PPOTrainer: policy and value model, one after the other in one pass, forward and backward.

The value model's operations come first, with axes and names of its own. All models return every layer's input
(`output_hidden_states`), and those that train their caches too.
"""

from __future__ import annotations

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.own_axes import joined, with_own_names
from memplan.catalogue.kernels.policy_gradient import log_probs_of_logits, with_generated
from memplan.catalogue.kernels.preference import RETURNED, converted, converted_states, returning_states
from memplan.catalogue.kernels.rewriting import rewrite
from memplan.catalogue.kernels.wiring import Trainer
from memplan.core.ir import Op, Stack, Tensor

_SOURCE = "trl 1.12.0 experimental/ppo/ppo_trainer.py PolicyAndValueWrapper, train; the same in trl 0.24.0"
_RETURNED = "value"  # value of `Op.holds` for what the value model returns


def attach(stack: Stack, trainer: Trainer, value: Stack | None, autocast: str | None) -> Stack:
    """Return the policy's stack after the value model's, with the loss; that of another model, which returns states.

    value  operations of the value model, as of another model
    """
    scores = next((i for i, op in enumerate(stack.after) if op.name == "score"), None)
    if scores is not None:  # the score of every token
        stack = stack._replace(after=stack.after[: scores + 1])
    stack = returning_states(stack)._replace(loss=())
    if trainer.is_reference:
        return stack if scores is not None else stack._replace(after=(*stack.after, _scored(stack, trainer)))
    assert value is not None
    stack = _held(stack, "step", "cache")
    logits = next(op for op in reversed(stack.after) if op.writes).writes[0].name
    outputs = "outputs" if autocast else logits
    returned = [Op("return", releases=_RETURNED), RETURNED]
    if autocast:
        returned += [op._replace(holds="step") for op in (converted(logits), *converted_states(logits))]
    else:
        stack = _held(stack, "step", "states")
        last = stack.after[-1]
        stack = stack._replace(after=(*stack.after[:-1], last._replace(holds="step")))
    stack = stack._replace(after=(*stack.after, *returned))  # the model that accelerate wraps casts what it returns
    tail: list[Op] = []
    if trainer.has_parts:  # of the micro-batch before, until those of this one exist; counted in its stead
        probabilities = Tensor("probabilities of completions", "completion_rows v", f"={outputs}")
        tail.append(Op("loss.entropy", (outputs,), (probabilities,), gradient="none", holds="step", source=_SOURCE))
    loss = Op("loss.ppo", ("log_probs", "value.scores"), (Tensor("loss", "", "fp32"),), source=_SOURCE)
    tail += [*log_probs_of_logits(outputs, trainer, bool(autocast), "b s v"), loss]
    before = tuple(with_generated(op) if op.name == "inputs" else op for op in stack.before)
    tail.append(ops.release_names("log_probs", "value.scores"))
    value = with_own_names(_held(_held(value, _RETURNED, "cache"), _RETURNED, "states"), "value")
    return joined(value, stack._replace(before=before, loss=tuple(tail)))


def _scored(stack: Stack, trainer: Trainer) -> Op:
    """Compute log-probabilities sequence by sequence: the log-softmax of two at a time, or exponents of one in fp32."""
    logits = next(op for op in reversed(stack.after) if op.writes).writes[0].name
    is_alone = trainer.has_one_sequence and not trainer.has_parts
    dtype = f"={logits}" if is_alone else "fp32"
    row = Tensor("log-softmax of two sequences, or exponents of one", "completion v", dtype)
    return Op("log_probs", (logits,), (Tensor("ref_log_probs", "b s", "fp32"),), scratch=(row,), gradient="none")


def _held(stack: Stack, by: str, what: str) -> Stack:
    """Return the stack with its `cache` or its `states` held as `by` says."""

    def change(op: Op) -> tuple[Op, ...]:
        if op.releases == f"last {what}":
            op = op._replace(releases=f"last {by}")
        return (op._replace(holds=by) if op.holds == what else op,)

    return rewrite(stack, change)
