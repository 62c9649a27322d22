"""TRL's PPOTrainer: policy and value model, one after the other in one pass, forward and backward.

The value model's operations come first, with axes and names of its own. All models return every layer's input
(`output_hidden_states`), and those that train their caches too.
"""

from __future__ import annotations

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.policy_gradient import log_probs_of_logits, with_generated
from memplan.catalogue.kernels.preference import RETURNED, converted, converted_states, returning_states
from memplan.catalogue.kernels.rewriting import renamed, rewrite, rewrite_blocks, rewrite_lists
from memplan.catalogue.kernels.wiring import Trainer
from memplan.core.ir import Op, Run, Stack, Tensor, operations, outside

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
    return _joined(_own_names(value), stack._replace(before=before, loss=tuple(tail)))


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


def _own_names(stack: Stack) -> Stack:
    """Return the value model with the names of its tensors, and of weights outside of blocks, after its role."""
    stack = _held(_held(stack, _RETURNED, "cache"), _RETURNED, "states")
    weights = {w.name for op in operations(stack) for w in op.weights}
    lone = {w.name: f"value.{w.name}" for ops_ in outside(stack) for op in ops_ for w in op.weights}

    def new(name: str) -> str:
        if name in ("x", "y", "embeds") or name in weights:
            return lone.get(name, name)
        return f"value.{name}"

    def changed(operations_: tuple[Op, ...]) -> tuple[Op, ...]:
        return tuple(
            ops.renamed(op, new)._replace(weights=tuple(w._replace(name=lone.get(w.name, w.name)) for w in op.weights))
            for op in operations_
        )

    stack = rewrite_lists(stack, changed)
    lists = ("shares", "replaces", "passed")
    return rewrite_blocks(stack, lambda b: b._replace(**{name: tuple(map(new, getattr(b, name))) for name in lists}))


def _joined(value: Stack, policy: Stack) -> Stack:
    """Return both models in sequence: what precedes the policy's blocks comes between the two."""
    policy = rewrite_lists(policy, lambda operations_: renamed(operations_, {"embeds": "stream"}))
    first, *others = policy.runs
    first = Run(first.blocks, first.times, (*value.after, *policy.before, *first.before))
    return policy._replace(before=value.before, runs=(*value.runs, first, *others))
