"""What a model without a causal language model's head ends in, and the loss that its own class computes.

Every loss here is of the logits in the dtype they have, and of labels as they are given: nothing is shifted.
"""

from __future__ import annotations

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.losses import nll
from memplan.core.ir import Keep, Op, Stack, Tensor, Weight
from memplan.models.model import ModelSpec


def labels_of(m: ModelSpec) -> Tensor:
    """The labels a batch comes with: one a token, or one a sequence; numbers where a class of one is a regression."""
    match m.objective:
        case "masked_lm" | "token_classification":
            return Tensor("labels", "b s", "int64")
        case "seq2seq_lm":
            return Tensor("labels", "b t", "int64")
        case _:
            return Tensor("labels", "b", "fp32" if m.num_labels == 1 else "int64")


def decoder(name: str, x: str, tied_to: str, bias: str = "", tokens: str = "s") -> Op:
    """The projection to the vocabulary with the embeddings' weight, and a bias of its own by the name `bias`."""
    op = ops.linear(name, x, "logits", "v", "h", "lm_head")
    own = op.weights[0].name
    tied = Weight(tied_to or own, "v h", "embedding" if tied_to else "lm_head", matrix=True, rows=1)
    keeps = tuple(k._replace(what=k.what.replace(own, tied.name), of=k.of.replace(own, tied.name)) for k in op.keeps)
    biases = (Weight(bias, "v", "lm_head"),) if bias else ()
    return op._replace(weights=(tied, *biases), keeps=keeps, writes=(Tensor("logits", f"b {tokens} v"),))


def language_model_loss(tokens: str = "s") -> tuple[Op, ...]:
    """Cross entropy of all logits, of masked tokens or of a decoder's, which has let go of its last block's output."""
    held = ("logits", "x") if tokens == "s" else ("logits",)
    return (*nll("loss", "logits", "log_probs", "labels", f"b {tokens} v", "loss"), ops.leave(*held))


def class_loss(m: ModelSpec, shape: str = "b c") -> tuple[Op, ...]:
    """Cross entropy of the classes; of a single one, its squared error, which keeps both sides."""
    if m.num_labels > 1 or shape != "b c":
        return (*nll("loss", "logits", "log_probs", "labels", shape, "loss"), ops.leave("logits", "x"))
    kept = (Keep("logits", "logits"), Keep("labels", "logits"))
    error = Op("loss.mse", ("logits", "labels"), (Tensor("loss"),), (), kept, source=f"{ops.DERIVATIVES}: mse_loss")
    return (error, ops.leave("logits", "x"))


def classifying(m: ModelSpec, stack: Stack) -> Stack:
    """A decoder that classifies sequences, by the scores of the last token of each, in place of its language model's
    head. Source: transformers 5.24 modeling_layers.py GenericForSequenceClassification."""
    start = next(i for i, op in enumerate(stack.after) if any("v" in t.shape.split() for t in op.writes))
    x = stack.after[start].reads[0]
    label = labels_of(m)
    before = tuple(
        op._replace(writes=tuple(label if t.name == "labels" else t for t in op.writes)) for op in stack.before
    )
    score = ops.linear("score", x, "scores", "c", "h", "head")
    last = Op("score.last", ("scores",), (Tensor("logits", "b c"),), source=f"{ops.DERIVATIVES}: index")
    loss = (*class_loss(m), ops.leave(x, "scores"))
    return stack._replace(before=before, after=(*stack.after[:start], score, last), loss=loss)


def mean_loss(x: str) -> tuple[Op, ...]:
    """The script's own loss of a model without a head, in its smallest form: the mean of what the model returns."""
    return (Op("loss.mean", (x,), (Tensor("loss"),), source=f"{ops.DERIVATIVES}: mean"), ops.leave(x, "x"))


def first_token(name: str, x: str, y: str) -> Op:
    """The hidden states of the first token: a view, whose gradient is zero for all the others."""
    return ops.view(name, x, y, "b h", gradient="new")


def dense(name: str, x: str, y: str, out: str, into: str, tokens: bool = False) -> Op:
    """A linear layer of a head, with a bias: of one row a sequence, or of every token."""
    return ops.linear(name, x, y, out, into, "head", bias=True, lead="b s" if tokens else "b", flat=not tokens)


def tanh(name: str, x: str, y: str, shape: str) -> Op:
    return Op(name, (x,), (Tensor(y, shape),), (), (Keep(y, x),), source=f"{ops.DERIVATIVES}: tanh")


def pooler(name: str, x: str, out: str = "h") -> tuple[Op, ...]:
    """`pooled` from the first token of x."""
    return (
        first_token(f"{name}.first", x, "first"),
        dense(f"{name}.dense", "first", "pooled.dense", out, "h"),
        tanh(f"{name}.activation", "pooled.dense", "pooled", f"b {out}"),
        ops.leave("first"),
    )
