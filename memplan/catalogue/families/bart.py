"""BART: an encoder and a decoder with learned positions and a norm after each residual."""

from __future__ import annotations

from memplan.catalogue.attention.attention import QUERIES
from memplan.catalogue.decoder.encoder_decoder import attend_to_encoder, decoding, ids_of_labels
from memplan.catalogue.decoder.frame import masks, returned
from memplan.catalogue.decoder.task_heads import labels_of, language_model_loss, vocabulary_projection
from memplan.catalogue.families.bert import encoder_attention, table
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.activations import activation, dropped, drops
from memplan.catalogue.kernels.rewriting import renamed
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Op, Run, Stack, Tensor, Weight
from memplan.models.model import ModelSpec

_ENCODER, _DECODER, _SHARED = "model.encoder", "model.decoder", "model.shared"
_CROSS = "mask.across"  # of the decoder's queries and the encoder's keys


def bart(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build BART for conditional generation. One table is the embeddings of both halves, and by default the head."""
    cross_wiring, wiring = wiring._replace(causal=False), wiring._replace(padded=False)
    encoder_wiring = cross_wiring._replace(caching=False)
    mask = (Tensor("attention_mask", "b s", "int64"),) if encoder_wiring.padded else ()
    inputs = Op("inputs", (), (Tensor("ids", "b s", "int64"), *mask, labels_of(m)), holds="step")
    own = masks(encoder_wiring, "embeds.tokens")
    across = tuple(renamed(attend_to_encoder(masks(encoder_wiring, "stream.tokens"), wiring), {"mask.cross": _CROSS}))
    before = (inputs, ids_of_labels(), *_embedded(m, _ENCODER, "ids", "embeds", "b s"), *own)
    between = (
        ops.view("encoded", "x", "encoded", "b s h")._replace(holds="forward"),  # the model also returns it
        ops.release_names("embeds.tokens", "embeds.places", *(op.name for op in own)),
        *decoding((*_embedded(m, _DECODER, "decoder_ids", "stream", "s"), *masks(wiring, "stream.tokens")), wiring),
        *across,
    )
    head = vocabulary_projection("lm_head", "x", f"{_SHARED}.weight" if m.tie_word_embeddings else "", tokens="t")
    bias = Weight("final_logits_bias", "v", "buffer", "", False)
    after = (
        *decoding(
            (ops.release_names("stream.tokens", "stream.places", *(op.name for op in masks(wiring, "stream.tokens"))),),
            wiring,
        ),
        ops.release_names(*(t.name for op in across for t in op.writes)),
        head._replace(writes=(Tensor("unbiased", "b t v"),)),
        ops.add_weight("final_logits_bias", "unbiased", "logits", "b t v", bias),
        ops.release_names("unbiased"),
    )
    runs = (Run((_encoder(m, encoder_wiring),), "L"), Run((_decoder(m, wiring, cross_wiring),), "D", between))
    return Stack(before, runs, after, (*language_model_loss("t"), ops.release_names("decoder_ids", "encoded", "x")))


def _embedded(m: ModelSpec, half: str, ids: str, y: str, rows: str) -> tuple[Op, ...]:
    """Scaled embeddings and positions, normalised. The encoder makes its positions for the batch."""
    tokens, positions = f"{y}.tokens", f"{y}.positions"
    lookup = ops.embedding(_SHARED, ids, tokens, "v", "h")
    return (
        lookup._replace(scratch=(Tensor("unscaled", "b s h", f"={lookup.weights[0].name}"),)),
        Op(f"{half}.positions", (), (Tensor(positions, rows, "int64"),)),
        table(f"{half}.embed_positions", positions, f"{y}.places", str(2 + (m.max_position_embeddings or 0)), rows),
        ops.add(f"{half}.add_positions", tokens, f"{y}.places", f"{y}.summed", "b s h"),
        ops.layer_norm(f"{half}.layernorm_embedding", f"{y}.summed", f"{y}.normed", "b s h", "h"),
        ops.release_names(f"{y}.summed"),
        *dropped(f"{half}.dropout", f"{y}.normed", y, "b s h", drops(m, "dropout")),
        ops.release_names(positions),
    )


def _attention(m: ModelSpec, wiring: Wiring, name: str, x: str, y: str, states: str = "") -> tuple[Op, ...]:
    """Attention, with keys and values computed from x or from `states`."""
    backend, source = wiring.masked if wiring.has_mask() else wiring.backend, states or x
    back = "new" if backend in ("eager", "math") else "same"
    return (
        ops.linear(f"{name}.q_proj", x, "q0", "a d", "h", "attention", bias=True),
        ops.view(f"{name}.q_heads", "q0", "q", QUERIES, back),
        ops.linear(f"{name}.k_proj", source, "k0", "a d", "h", "attention", bias=True),
        ops.linear(f"{name}.v_proj", source, "v", "a d", "h", "attention", bias=True),
        ops.view(f"{name}.k_heads", "k0", "k", QUERIES, back),
        *encoder_attention(m, wiring, f"{name}.attention", "attention_dropout"),
        ops.linear(f"{name}.out_proj", "o", f"{y}.whole", "h", "a d", "attention", bias=True),
        ops.release_names("q", "k", "v", "o"),
        *dropped(f"{name}.dropout", f"{y}.whole", y, "b s h", drops(m, "dropout")),
    )


def _added(norm: str, x: str, branch: str, y: str) -> tuple[Op, ...]:
    """Add a branch to x and normalise the sum."""
    return (
        ops.add(f"{norm}.residual", x, branch, f"{y}.sum", "b s h"),
        ops.release_names(branch),
        ops.layer_norm(norm, f"{y}.sum", y, "b s h", "h"),
        ops.release_names(f"{y}.sum"),
    )


def _mlp(m: ModelSpec, x: str, y: str, width: str) -> tuple[Op, ...]:
    return (
        ops.linear("fc1", x, "up", width, "h", "mlp", bias=True),
        *activation(m, "activation_fn", "up", "act.whole", f"b s {width}"),
        ops.release_names("up"),
        *dropped("activation_dropout", "act.whole", "act", f"b s {width}", drops(m, "activation_dropout")),
        ops.linear("fc2", "act", f"{y}.whole", "h", width, "mlp", bias=True),
        ops.release_names("act"),
        *dropped("dropout", f"{y}.whole", y, "b s h", drops(m, "dropout")),
    )


def _encoder(m: ModelSpec, wiring: Wiring) -> Block:
    return Block(
        f"{_ENCODER}.layers",
        (
            *_attention(m, wiring, "self_attn", "x", "ao"),
            *_added("self_attn_layer_norm", "x", "ao", "x1"),
            *_mlp(m, "x1", "mo", "f"),
            *_added("final_layer_norm", "x1", "mo", "y"),
            ops.release_names("x1", *returned(wiring)),
        ),
    )


def _decoder(m: ModelSpec, wiring: Wiring, cross_wiring: Wiring) -> Block:
    self_ops = (*_attention(m, wiring, "self_attn", "x", "ao"), *_added("self_attn_layer_norm", "x", "ao", "x1"))
    cross_ops = renamed(_attention(m, cross_wiring, "encoder_attn", "x1", "co", "encoded"), {"mask": _CROSS})
    rest = (
        *_added("encoder_attn_layer_norm", "x1", "co", "x2"),
        *_mlp(m, "x2", "mo", "fd"),
        *_added("final_layer_norm", "x2", "mo", "y"),
        ops.release_names("x2", *returned(wiring), *(("probs.cross",) if wiring.backend == "eager" else ())),
    )
    return Block(
        f"{_DECODER}.layers",
        (*decoding(self_ops, wiring), *attend_to_encoder(cross_ops, wiring, "co"), *decoding(rest, wiring)),
    )


BUILDERS = {"bart": bart}
