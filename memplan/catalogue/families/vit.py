"""ViT: an image in patches, preceded by a class token, learned positions, and norms before attention and MLP."""

from __future__ import annotations

from memplan.catalogue.decoder.frame import returned
from memplan.catalogue.decoder.task_heads import class_loss, dense, first_token, labels_of, mean_loss, pooler
from memplan.catalogue.families.bert import encoder_attention, projections
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.activations import activation, dropped, drops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Run, Scratch, Stack, Tensor, Weight
from memplan.models.model import ModelSpec

_SOURCE = "transformers 5.24 models/vit/modeling_vit.py"


def vit(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build ViT with a head that classifies images, or as a model with its pooler only."""
    wiring = wiring._replace(causal=False, padded=False, caching=False)
    body = "" if m.objective == "feature_extraction" else "vit."
    last = (ops.layer_norm(f"{body}layernorm", "x", "n", "b s h", "h"),)
    release = ops.release_names("x", "embeds", "pixels")
    if m.objective == "feature_extraction":
        after, loss = (
            (*last, *pooler(f"{body}pooler", "n", "pooled"), release),
            mean_loss("pooled", "n"),
        )
    else:
        head = (first_token("classifier.first", "n", "first"), dense("classifier", "first", "logits", "c", "h"))
        after, loss = (*last, release, *head), (*class_loss(m), ops.release_names("n", "first"))
    return Stack(_before(m, body), (Run((_block(m, wiring, body),), "L"),), after, loss)


def _before(m: ModelSpec, body: str) -> tuple[Op, ...]:
    """Patch embeddings. Images arrive in fp32 and are cast to the dtype of the patches' weights.

    cuDNN's workspace for this convolution is not counted.
    """
    name, patches = f"{body}embeddings", f"{body}embeddings.patch_embeddings.projection"
    w, bias = Weight(f"{patches}.weight", "h patch", "embedding", rows=1), Weight(f"{patches}.bias", "h", "embedding")
    token = Weight(f"{name}.cls_token", "h", "embedding")
    table = Weight(f"{name}.position_embeddings", "s h", "embedding", rows=1)
    labels = () if m.objective == "feature_extraction" else (labels_of(m),)
    drop = drops(m, "hidden_dropout_prob")
    return (
        Op("inputs", (), (Tensor("pixel_values", "b pixels", "fp32"), *labels), holds="step"),
        Op(
            f"{body}cast",
            ("pixel_values",),
            (Tensor("pixels", "b pixels", f"={w.name}"),),
            (w,),
            cast=True,
            gradient="none",
        ),
        Op(
            patches,
            ("pixels",),
            (Tensor("patches", "b patches h"),),
            (w, bias),
            (Keep("pixels", w.name), Keep(w.name, w.name)),
            scratch_back=(Scratch(Tensor("contiguous gradient", "b patches h", "=patches")),),
            autocast="lower",
            product="matrix",
            source=f"{ops.DERIVATIVES}: convolution",
        ),
        Op(f"{name}.cat", ("patches",), (Tensor("tokens", "b s h"),), (token,), gradient="same", source=_SOURCE),
        ops.add_weight(f"{name}.add_positions", "tokens", "summed" if drop else "embeds", "b s h", table),
        *((ops.dropout(f"{name}.dropout", "summed", "embeds", "b s h"),) if drop else ()),
        ops.release_names("pixels"),
    )


def _block(m: ModelSpec, wiring: Wiring, body: str) -> Block:
    name, drop = "attention", drops(m, "hidden_dropout_prob")
    bias = m.get("qkv_bias", True)
    return Block(
        f"{body}layers",
        (
            ops.layer_norm("layernorm_before", "x", "n1", "b s h", "h"),
            *projections(name, "n1", wiring, ("q_proj", "k_proj", "v_proj"), bias),
            *encoder_attention(m, wiring, f"{name}.attention", "attention_probs_dropout_prob", wide=True),
            ops.linear(f"{name}.o_proj", "o", "ao.whole", "h", "a d", "attention", bias=True),
            ops.release_names("q", "k", "v", "n1"),
            *dropped("dropout_1", "ao.whole", "ao", "b s h", drop),
            ops.add("residual_1", "ao", "x", "x1", "b s h"),
            ops.layer_norm("layernorm_after", "x1", "n2", "b s h", "h"),
            ops.linear("mlp.fc1", "n2", "up", "f", "h", "mlp", bias=True),
            *activation(m, "mlp.activation_fn", "up", "act", "b s f"),
            ops.linear("mlp.fc2", "act", "mo.whole", "h", "f", "mlp", bias=True),
            ops.release_names("n2", "act"),
            *dropped("dropout_2", "mo.whole", "mo", "b s h", drop),
            ops.add("residual_2", "mo", "x1", "y", "b s h"),
            ops.release_names(*returned(wiring)),
        ),
    )


BUILDERS = {"vit": vit}
