"""OPT: LayerNorm, biases, ReLU, positions looked up for every token of the batch; the 350M model is post-norm."""

from __future__ import annotations

from memplan.catalogue.attention.attention import QUERIES
from memplan.catalogue.decoder.frame import inputs, lm_head, masks, returned
from memplan.catalogue.families.gpt import attention_with_dropout
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.activations import activation, dropped, drops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Run, Stack, Tensor
from memplan.models.model import ModelSpec

_NAME = "model.decoder"


def opt(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build OPT. `p` is the width of embeddings and head; if it is not h, two projections lead in and out."""
    embedded = (
        "wide" if _projected(m) else "tokens",
        "places",
        "positions",
        *(op.name for op in masks(wiring, "tokens")),
    )
    held = embedded if _reads_mask(wiring) else (*embedded, "position_mask")
    return Stack(_before(m, wiring), (Run((_block(m, wiring),), "L"),), _after(m, held))


def _before(m: ModelSpec, wiring: Wiring) -> tuple[Op, ...]:
    """Embeddings and masks.

    Positions are counted from the padding mask, or from an fp32 mask of ones if there is none. Both summands of the
    embeddings stay alive to the end of the model. When decoding, positions are counted over all tokens so far.
    """
    mask = "attention_mask" if _reads_mask(wiring) else "position_mask"
    tokens = "b kv" if wiring.decodes else "b s"
    return (
        inputs(wiring.padded),
        _narrow(ops.embedding(f"{_NAME}.embed_tokens", "ids", "tokens", "v", "p")),
        *(() if _reads_mask(wiring) else (Op("position_mask", (), (Tensor(mask, tokens, "fp32"),)),)),
        Op("positions.cumsum", (mask,), (Tensor("counted", tokens),)),
        Op("positions.product", ("counted",), (Tensor("product", tokens),)),
        Op("positions.minus_one", ("product",), (Tensor("less", tokens),)),
        ops.cast("positions.long", "less", "positions", tokens, "int64"),
        ops.release_names("counted", "less"),
        *masks(wiring, "tokens"),
        Op("positions.offset", ("positions",), (Tensor("rows", "b s", "int64"),)),
        ops.embedding(f"{_NAME}.embed_positions", "rows", "places", str((m.max_position_embeddings or 0) + 2), "h"),
        *((_projection("project_in", "tokens", "wide", "h", "p"),) if _projected(m) else ()),
        ops.add("add_positions", "wide" if _projected(m) else "tokens", "places", "embeds", "b s h"),
    )


def _reads_mask(wiring: Wiring) -> bool:
    """Whether positions are counted from a padding mask.

    A pass over several tokens after cached ones is given no padding mask, though its attention has a mask.
    """
    return wiring.padded and not wiring.decodes_several


def _narrow(op: Op) -> Op:
    scratch = tuple(
        s._replace(tensor=s.tensor._replace(shape=s.tensor.shape.replace("h32", "p32"))) for s in op.scratch_back
    )
    return op._replace(scratch_back=scratch)


def _projected(m: ModelSpec) -> bool:
    return m.get("word_embed_proj_dim", m.hidden_size) != m.hidden_size


def _projection(name: str, x: str, y: str, out: str, into: str) -> Op:
    return ops.linear(f"{_NAME}.{name}", x, y, out, into, "embedding")


def _block(m: ModelSpec, wiring: Wiring) -> Block:
    """One layer, with norms before attention and MLP, or after each residual."""
    drop = drops(m, "dropout")
    first, second = "self_attn_layer_norm", "final_layer_norm"
    if m.get("do_layer_norm_before", True):
        n1, sum1, n2, sum2 = "n1", "x1", "n2", "y"
        norms = ((_norm(m, first, "x", n1),), (), (_norm(m, second, "x1", n2),), ())
    else:
        n1, sum1, n2, sum2 = "x", "sum1", "x1", "sum2"
        norms = ((), (_norm(m, first, sum1, "x1"),), (), (_norm(m, second, sum2, "y"),))
    return Block(
        f"{_NAME}.layers",
        (
            *norms[0],
            *_attention(m, wiring, n1, "ao.whole"),
            *dropped("dropout_1", "ao.whole", "ao", "b s h", drop),
            ops.add("residual_1", "x", "ao", sum1, "b s h"),
            *norms[1],
            *norms[2],
            *_mlp(m, n2, "mo.whole"),
            *dropped("dropout_2", "mo.whole", "mo", "b s h", drop),
            ops.add("residual_2", "x1", "mo", sum2, "b s h"),
            *norms[3],
            ops.release_names("positions", *returned(wiring)),
        ),
    )


def _attention(m: ModelSpec, wiring: Wiring, x: str, y: str, name: str = "self_attn") -> tuple[Op, ...]:
    """Attention. q is scaled before it is viewed as heads, which makes a new tensor and keeps nothing more."""
    bias = m.get("enable_bias", True)
    backend = wiring.masked if wiring.has_mask() else wiring.backend
    gradient = "new" if backend in ("eager", "math") else "same"
    return (
        ops.linear(f"{name}.q_proj", x, "q0", "a d", "h", "attention", bias),
        ops.scale(f"{name}.scaling", "q0", "q1", QUERIES),
        ops.view(f"{name}.q_heads", "q1", "q", QUERIES, gradient),
        ops.linear(f"{name}.k_proj", x, "k0", "a d", "h", "attention", bias),
        ops.linear(f"{name}.v_proj", x, "v", "a d", "h", "attention", bias),
        ops.view(f"{name}.k_heads", "k0", "k", QUERIES, gradient),
        *attention_with_dropout(m, wiring, f"{name}.attention", "attention_dropout", False),
        ops.linear(f"{name}.out_proj", "o", y, "h", "a d", "attention", bias),
        ops.release_names("q", "k", "v", x),
    )


def _mlp(m: ModelSpec, x: str, y: str) -> tuple[Op, ...]:
    bias = m.get("enable_bias", True)
    relu = m.hidden_act == "relu"
    return (
        ops.linear("fc1", x, "up", "f", "h", "mlp", bias, flat=True),
        *((_relu("activation_fn", "up", "act"),) if relu else activation(m, "activation_fn", "up", "act", "b s f")),
        ops.linear("fc2", "act", y, "h", "f", "mlp", bias, flat=True),
    )


def _relu(name: str, x: str, y: str) -> Op:
    """ReLU, which keeps its output. So does the layer after it."""
    return Op(name, (x,), (Tensor(y, "b s f"),), (), (Keep(y, x),), source=f"{ops.DERIVATIVES}: relu")


def _after(m: ModelSpec, held: tuple[str, ...]) -> tuple[Op, ...]:
    normed = m.get("do_layer_norm_before", True) and not m.get("_remove_final_layer_norm", False)
    last = ("normed" if _projected(m) else "n") if normed else "x"
    return (
        *((_norm(m, f"{_NAME}.final_layer_norm", "x", last),) if normed else ()),
        *((_projection("project_out", last, "n", "p", "h"),) if _projected(m) else ()),
        *((ops.view("last", "x", "n", "b s h"),) if last == "x" and not _projected(m) else ()),
        ops.release_names("x", "normed", *held) if last == "normed" else ops.release_names("x", *held),
        _head(m),
    )


def _head(m: ModelSpec) -> Op:
    op = lm_head("n", f"{_NAME}.embed_tokens.weight" if m.tie_word_embeddings else "")
    return op._replace(weights=(op.weights[0]._replace(shape="v p"),))


def _norm(m: ModelSpec, name: str, x: str, y: str) -> Op:
    return ops.layer_norm(name, x, y, "b s h", "h", affine=m.get("layer_norm_elementwise_affine", True))


BUILDERS = {"opt": opt}
