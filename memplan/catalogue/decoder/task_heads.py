"""Heads other than a causal language model's, and the losses that their classes compute.

Every loss takes the logits in their own dtype and the labels unshifted.
"""

from __future__ import annotations

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.losses import nll
from memplan.core.ir import Keep, Op, Stack, Tensor, Weight
from memplan.models.model import ModelSpec


def labels_of(m: ModelSpec) -> Tensor:
    """Return the labels of a batch: one per token or one per sequence; floats for regression, which has one class."""
    match m.objective:
        case "masked_lm" | "token_classification":
            return Tensor("labels", "b s", "int64")
        case "seq2seq_lm":
            return Tensor("labels", "b t", "int64")
        case _:
            return Tensor("labels", "b", "fp32" if m.num_labels == 1 else "int64")


def vocabulary_projection(name: str, x: str, tied_to: str, bias: str = "", tokens: str = "s") -> Op:
    """Return the projection to the vocabulary, with the embeddings' weight and its own bias, named `bias`."""
    op = ops.linear(name, x, "logits", "v", "h", "lm_head")
    own_name = op.weights[0].name
    tied = Weight(tied_to or own_name, "v h", "embedding" if tied_to else "lm_head", matrix=True, rows=1)
    keeps = tuple(
        k._replace(what=k.what.replace(own_name, tied.name), of=k.of.replace(own_name, tied.name)) for k in op.keeps
    )
    biases = (Weight(bias, "v", "lm_head"),) if bias else ()
    return op._replace(weights=(tied, *biases), keeps=keeps, writes=(Tensor("logits", f"b {tokens} v"),))


def language_model_loss(tokens: str = "s") -> tuple[Op, ...]:
    """Return cross entropy of all logits. A decoder (`t` tokens) no longer holds its last block's output."""
    held = ("logits", "x") if tokens == "s" else ("logits",)
    return (*nll("loss", "logits", "log_probs", "labels", f"b {tokens} v"), ops.release_names(*held))


def class_loss(m: ModelSpec, shape: str = "b c") -> tuple[Op, ...]:
    """Return cross entropy of the classes, or for a single class its squared error, which keeps both inputs."""
    if m.num_labels > 1 or shape != "b c":
        return (*nll("loss", "logits", "log_probs", "labels", shape), ops.release_names("logits", "x"))
    kept = (Keep("logits", "logits"), Keep("labels", "logits"))
    error = Op("loss.mse", ("logits", "labels"), (Tensor("loss"),), (), kept, source=f"{ops.DERIVATIVES}: mse_loss")
    return (error, ops.release_names("logits", "x"))


def classifying(m: ModelSpec, stack: Stack) -> Stack:
    """Return a decoder that classifies sequences by the scores of their last tokens, without a language model head.

    Source: transformers 5.24 modeling_layers.py GenericForSequenceClassification.
    """
    start = next(i for i, op in enumerate(stack.after) if any("v" in t.shape.split() for t in op.writes))
    x = stack.after[start].reads[0]
    label = labels_of(m)
    before = tuple(
        op._replace(writes=tuple(label if t.name == "labels" else t for t in op.writes)) for op in stack.before
    )
    score = ops.linear("score", x, "scores", "c", "h", "head")
    last = Op("score.last", ("scores",), (Tensor("logits", "b c"),), source=f"{ops.DERIVATIVES}: index")
    loss = (*class_loss(m), ops.release_names(x, "scores"))
    return stack._replace(before=before, after=(*stack.after[:start], score, last), loss=loss)


def without_head(stack: Stack) -> Stack:
    """Return a decoder whose output is its last hidden states, as an embedding model's is."""
    start = next(i for i, op in enumerate(stack.after) if any("v" in t.shape.split() for t in op.writes))
    before = tuple(op._replace(writes=tuple(t for t in op.writes if t.name != "labels")) for op in stack.before)
    return stack._replace(before=before, after=stack.after[:start], loss=mean_loss(stack.after[start].reads[0]))


def mean_loss(x: str, *others: str) -> tuple[Op, ...]:
    """Return the script's own loss for a model without a head, in its smallest form: the mean of the model's output.

    `others` are the model's other outputs.
    """
    returned = (
        ops.view(f"returned {name}", name, f"{name}.returned", "b s h")._replace(holds="forward")
        for name in (x, *others)
    )
    mean = Op("loss.mean", (x,), (Tensor("loss"),), source=f"{ops.DERIVATIVES}: mean")
    return (*returned, mean, ops.release_names(x, "x", *others))


def first_token(name: str, x: str, y: str) -> Op:
    """Return the hidden states of the first token: a view, whose gradient is zero for all other tokens."""
    return ops.view(name, x, y, "b h", gradient="new")


def dense(name: str, x: str, y: str, out: str, into: str, tokens: bool = False) -> Op:
    """Return a head's linear layer with a bias, applied to one row per sequence or to every token."""
    return ops.linear(name, x, y, out, into, "head", bias=True, lead="b s" if tokens else "b", flat=not tokens)


def pooler(name: str, x: str, out: str = "h") -> tuple[Op, ...]:
    """Return `pooled`, computed from the first token of x."""
    return (
        first_token(f"{name}.first", x, "first"),
        dense(f"{name}.dense", "first", "pooled.dense", out, "h"),
        ops.keeping_output(f"{name}.activation", "pooled.dense", "pooled", f"b {out}", "tanh"),
        ops.release_names("first"),
    )
