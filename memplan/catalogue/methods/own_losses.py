"""The losses of peft's methods whose models add to the model's, or compute another one."""

from __future__ import annotations

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.losses import nll, shifted_rows
from memplan.catalogue.kernels.rewriting import once_per_stack, rewrite
from memplan.catalogue.methods.shadow import with_stream_loss
from memplan.core.ir import Keep, Op, Scratch, Stack, Tensor
from memplan.models.peft_methods import PEFT_METHODS


@once_per_stack
def with_own_loss(stack: Stack, kind: str, single: bool, trains: bool) -> Stack:
    """Return the stack with the loss of a method whose model has its own. `single`: the batch is one sequence."""
    loss = PEFT_METHODS[kind].own_loss if kind in PEFT_METHODS else ""
    if loss == "orthogonality" and trains:
        return _with_orthogonality(stack)
    if loss == "stream":
        return with_stream_loss(stack, single)
    return _with_context_loss(stack, single) if loss == "context" else stack


def _with_orthogonality(stack: Stack) -> Stack:
    """AdaLoRA's model with the regularisation that it adds to the loss, which makes A and B orthogonal.

    It is added last, so backward computes its gradients of all A and B first. They wait for those of the loss.
    Source: peft 0.21.2 tuners/adalora/model.py AdaLoraModel.forward.
    """
    known = "orthogonality"

    def of_loss(op: Op) -> tuple[Op, ...]:
        adapters = tuple(w for w in op.weights if w.trains and w.name.endswith((".lora_A", ".lora_B")))
        if not adapters:
            return (op,)
        keeps = tuple(Keep(known, w.name, is_gradient=True) for w in adapters)
        added = tuple(Scratch(Tensor("gradient to add", w.shape, w.dtype), w.name) for w in adapters)
        return Op(known, (known,)), op._replace(keeps=(*op.keeps, *keeps), scratch_back=(*op.scratch_back, *added))

    waiting = tuple(
        Tensor(f"{known}, gradients of {run.times} {block.name} {w.name}", f"{run.times} {w.shape}", w.dtype)
        for run in stack.runs
        for block in run.blocks
        for op in block.ops
        for w in op.weights
        if w.trains and w.name.endswith((".lora_A", ".lora_B"))
    )
    stack = rewrite(stack, of_loss)
    source = "peft 0.21.2 tuners/adalora/model.py AdaLoraModel.forward"
    constant = Op(known, (), (Tensor(known, "1", "fp32"),), gradient="none")
    last = Op(
        known, ("loss",), (Tensor("loss", "", "=loss"),), gradient="same", view=True, wraps=waiting, source=source
    )
    return stack._replace(before=(constant, *stack.before), loss=(*stack.loss, last))


def _with_context_loss(stack: Stack, single: bool) -> Stack:
    """Return the stack with CPT's loss of the tokens that are labels, in the dtype of the logits.

    The model's own loss is computed before, and kept until the new one replaces it. `single`: see `shifted_rows`.
    """
    logits = next(op for op in reversed(stack.after) if op.writes).writes[0].name
    own = {t.name: f"own.{t.name}" for op in stack.loss for t in op.writes}
    kept = tuple(dict.fromkeys(own.get(k.what, k.what) for op in stack.loss for k in op.keeps))
    first = tuple(
        ops.renamed(op, lambda name: own.get(name, name))._replace(gradient="none", keeps=(), scratch_back=())
        for op in stack.loss
    )
    first = tuple(
        op._replace(reads=tuple(r for r in op.reads if r != logits)) if op.name == "return" else op for op in first
    )
    rows = "shifted_rows"
    *log_probs, losses = nll("loss", "shifted", "log_probs", "targets", f"{rows} v")
    (_, weight), source = losses.writes, "peft 0.21.2 tuners/cpt/model.py CPTEmbedding.calculate_loss"
    numbers, places = Tensor("numbers", rows, "fp32"), Tensor("places", f"2 {rows}", "int64")
    chosen = Tensor("loss.chosen", rows, "fp32")
    return stack._replace(
        loss=(
            *first,
            *shifted_rows(logits, Tensor("shifted", f"{rows} v"), source, single),
            Op("loss.shift_types", ("types",), (Tensor("types.shifted", "shifted_labels", "fp32"),), gradient="none"),
            Op("loss.labelled", ("targets",), (Tensor("loss.labelled", rows, "bool"),), gradient="none"),
            *log_probs,
            losses._replace(writes=(Tensor("loss.rows", rows), weight)),
            Op("loss.weights", ("loss.labelled",), (Tensor("loss.weights", rows, "fp32"),), gradient="none"),
            Op(
                "loss.mean",
                ("loss.rows", "loss.labelled", "loss.weights"),
                (Tensor("loss", "", "fp32"), chosen),
                (),
                (Keep("loss.labelled", "loss.rows"), Keep("loss.chosen", "loss.rows")),
                scratch=(numbers, places),
                scratch_back=(Scratch(numbers), Scratch(places)),
                source=source,
            ),
            ops.release_names(
                *("shifted", "targets", "types.shifted", "loss.labelled", "loss.rows", "loss.weights"), logits, *kept
            ),
        )
    )
