"""Whisper: two convolutions over audio frames, an encoder of fixed length, and a decoder that attends to it."""

from __future__ import annotations

from memplan.catalogue.attention.attention import QUERIES, attention, laid_out_as
from memplan.catalogue.decoder.encoder_decoder import (
    attend_to_encoder,
    cached_across,
    decoding,
    encoder_results,
    ids_of_labels,
    read_encoder_results,
)
from memplan.catalogue.decoder.frame import masks, returned
from memplan.catalogue.decoder.task_heads import labels_of, language_model_loss, vocabulary_projection
from memplan.catalogue.families.bert import plain_attention_ops
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.activations import activation, dropped, drops
from memplan.catalogue.kernels.rewriting import renamed, skipped
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Run, Stack, Tensor, Weight
from memplan.models.model import ModelSpec

_SOURCE = "transformers 5.24 models/whisper/modeling_whisper.py"
_ENCODER, _DECODER = "model.encoder", "model.decoder"


def whisper(m: ModelSpec, wiring: Wiring) -> Stack:
    decoder_wiring = wiring._replace(padded=False)
    encoder_wiring = decoder_wiring._replace(causal=False, caching=False, decodes=False)
    tied = f"{_DECODER}.embed_tokens.weight" if m.tie_word_embeddings else ""
    last = (
        ops.layer_norm(f"{_DECODER}.layer_norm", "x", "n", "b s h", "h"),
        ops.release_names("x", "tokens", "places", "position_ids", *_masks(decoder_wiring)),
    )
    after = (
        *decoding(last, wiring),
        vocabulary_projection("proj_out", "n", tied, tokens="s" if wiring.encoder_decoder_half else "t"),
    )
    encoder = Run((encoder_block(m, encoder_wiring),), "L")
    if wiring.encoder_decoder_half == "encoder":
        return Stack(
            _before(m, True), (encoder,), encoder_results(_encoder_output(), ("encoded",), "features", "", wiring.beams)
        )
    block = _decoder(m, decoder_wiring, encoder_wiring._replace(caching=wiring.caching))
    if wiring.encoder_decoder_half:
        return Stack(_standalone_decoder(m, decoder_wiring), (Run((block,), "D"),), after)
    between = (*_encoder_output(), *decoding(_decoder_embeddings(m, decoder_wiring), wiring))
    loss = (*language_model_loss("t"), ops.release_names("decoder_ids", "encoded", "n"))
    return Stack(_before(m, False), (encoder, Run((block,), "D", between)), after, loss)


def _masks(wiring: Wiring) -> tuple[str, ...]:
    return tuple(op.name for op in masks(wiring, "tokens"))


def _before(m: ModelSpec, runs_alone: bool) -> tuple[Op, ...]:
    """The convolutions and positions of the encoder. The table of positions holds sines and never trains.

    cuDNN's workspace is not counted.
    """
    drop = drops(m, "dropout")
    first, second = f"{_ENCODER}.conv1", f"{_ENCODER}.conv2"
    table = Weight(f"{_ENCODER}.embed_positions.weight", "s h", "embedding", trains=False, rows=1)
    conv_weight = Weight(f"{first}.weight", "h mel 3", "embedding")
    return (
        Op(
            "inputs",
            (),
            (
                Tensor("features", "prompts mel frames" if runs_alone else "b mel frames", f"={conv_weight.name}"),
                labels_of(m),
            ),
            (conv_weight,),
            gradient="none",
            holds="step",
        ),
        *(() if runs_alone else (ids_of_labels(),)),
        convolution(first, "features", "c1", "b frames h", conv_weight),
        ops.activation(f"{_ENCODER}.gelu_1", "c1", "g1", "b frames h"),
        convolution(second, "g1", "c2", "b s h", Weight(f"{second}.weight", "h h 3", "embedding")),
        ops.activation(f"{_ENCODER}.gelu_2", "c2", "g2", "b s h"),
        ops.release_names("c1", "g1", "c2"),
        Op(f"{_ENCODER}.positions", (), (Tensor("all_positions", "s", "int64"),)),
        Op(
            f"{_ENCODER}.embed_positions",
            ("all_positions",),
            (Tensor("rows", "s h", f"={table.name}"),),
            (table,),
            gradient="none",
        ),
        Op(
            f"{_ENCODER}.add_positions",
            ("g2", "rows"),
            (Tensor("summed" if drop else "embeds", "b s h"),),
            gradient="same",
            source=f"{ops.DERIVATIVES}: add.Tensor",
        ),
        *((ops.dropout(f"{_ENCODER}.dropout", "summed", "embeds", "b s h"),) if drop else ()),
        ops.release_names("rows"),
    )


def convolution(name: str, x: str, y: str, shape: str, w: Weight) -> Op:
    """A convolution, which keeps its input and its weight."""
    bias = Weight(f"{name}.bias", "h", "embedding")
    return Op(
        name,
        (x,),
        (Tensor(y, shape),),
        (w, bias),
        (Keep(w.name, x), Keep(x, w.name), Keep(w.name, w.name), Keep(x, x)),
        autocast="lower",
        product="matrix",
        source=f"{ops.DERIVATIVES}: convolution",
    )


def _encoder_output() -> tuple[Op, ...]:
    """The encoder's last norm. The model also returns its output."""
    return (
        ops.layer_norm(f"{_ENCODER}.layer_norm", "x", "encoded", "b s h", "h")._replace(holds="forward"),
        ops.release_names("x", "g2", "all_positions"),
    )


def _decoder_embeddings(m: ModelSpec, wiring: Wiring) -> tuple[Op, ...]:
    """The decoder's embeddings and mask."""
    drop = drops(m, "dropout")
    longest = m.longest_target
    places = Weight(f"{_DECODER}.embed_positions.weight", f"{longest} h", "embedding", rows=1)
    return (
        Op("position_ids", (), (Tensor("position_ids", "b s", "int64"),), scratch=(Tensor("arange", "s", "int64"),)),
        ops.embedding(f"{_DECODER}.embed_tokens", "decoder_ids", "tokens", "v", "h"),
        ops.lookup(f"{_DECODER}.embed_positions", "position_ids", "places", "b s h", places, "index"),
        ops.add(f"{_DECODER}.add_positions", "tokens", "places", "summed.decoder" if drop else "stream", "b s h"),
        *((ops.dropout(f"{_DECODER}.dropout", "summed.decoder", "stream", "b s h"),) if drop else ()),
        *masks(wiring, "tokens"),
    )


def _standalone_decoder(m: ModelSpec, wiring: Wiring) -> tuple[Op, ...]:
    """The first operations of a decoder that runs alone; the encoder's output and the features stay alive."""
    name = f"{_DECODER}.embed_tokens.weight"
    features = Tensor("features", "prompts mel frames", f"={name}")
    inputs = Op("inputs", (), (Tensor("decoder_ids", "b s", "int64"),), holds="step")
    kept = read_encoder_results(features, Tensor("encoded", "rows source h", f"={name}"))
    return (*kept, inputs, *renamed(_decoder_embeddings(m, wiring), {"stream": "embeds"}))


def _attention(m: ModelSpec, wiring: Wiring, name: str, x: str, y: str, states: str = "") -> tuple[Op, ...]:
    """Attention. q is scaled, and q, k and v are made contiguous head by head. Keys have no bias.

    `states` is what keys and values are computed from, if it is not x.
    """
    drop, source = drops(m, "attention_dropout"), states or x
    masked, caching = wiring.has_mask(), wiring.caching
    n, wiring = f"{name}.attention", wiring._replace(caching=False)
    backend = wiring.masked if masked else wiring.backend
    if wiring.backend == "eager":
        kernel = _without_head_copies(n, plain_attention_ops(n, drop, ("mask",) if masked else ()))
    else:
        heads = attention(n, "q", "k", "v", "o", wiring, False)
        kernel = laid_out_as("o", _without_head_copies(n, heads), backend == "flash")
    key_value_ops = (
        ops.linear(f"{name}.k_proj", source, "k0", "a d", "h", "attention"),
        ops.copy(f"{name}.k_contiguous", "k0", "k", QUERIES),
        ops.linear(f"{name}.v_proj", source, "v0", "a d", "h", "attention", bias=True),
        ops.copy(f"{name}.v_contiguous", "v0", "v", QUERIES),
    )
    self_cache = (Op(f"{n}.cache", ("k", "v"), caches="kv"),)
    cache = () if not caching else cached_across(n, "q", wiring.has_cross_cache) if states else self_cache
    return (
        ops.linear(f"{name}.q_proj", x, "q0", "a d", "h", "attention", bias=True),
        ops.scale(f"{name}.scaling", "q0", "q1", QUERIES),
        ops.copy(f"{name}.q_contiguous", "q1", "q", QUERIES),
        *(skipped(key_value_ops) if states and wiring.has_cross_cache else key_value_ops),
        *cache,
        *kernel,
        ops.linear(f"{name}.out_proj", "o", f"{y}.whole", "h", "a d", "attention", bias=True),
        ops.release_names("q", "k", "v", x),
        *dropped(f"{name}.dropout", f"{y}.whole", y, "b s h", drops(m, "dropout")),
    )


def _without_head_copies(name: str, kernel: tuple[Op, ...]) -> tuple[Op, ...]:
    """Return the kernel without copies of heads, which are contiguous already."""
    copies = {f"{name}.{t}_flat" for t in "qkv"}
    return tuple(op._replace(view=True) if op.name in copies else op for op in kernel)


def _mlp(m: ModelSpec, x: str, y: str, width: str) -> tuple[Op, ...]:
    return (
        ops.linear("fc1", x, "up", width, "h", "mlp", bias=True),
        *activation(m, "activation_fn", "up", "act.whole", f"b s {width}"),
        ops.release_names(x),
        *dropped("activation_dropout", "act.whole", "act", f"b s {width}", drops(m, "activation_dropout")),
        ops.linear("fc2", "act", f"{y}.whole", "h", width, "mlp", bias=True),
        *dropped("dropout", f"{y}.whole", y, "b s h", drops(m, "dropout")),
    )


def encoder_of(m: ModelSpec) -> ModelSpec:
    """Return the encoder of an audio-language model, as a Whisper model."""
    return ModelSpec({**m.part("audio_config"), "model_type": "whisper", "vocab_size": 1})


def encoder_block(m: ModelSpec, wiring: Wiring) -> Block:
    """Return a layer of the encoder."""
    return Block(
        f"{_ENCODER}.layers",
        (
            ops.layer_norm("self_attn_layer_norm", "x", "n1", "b s h", "h"),
            *_attention(m, wiring, "self_attn", "n1", "ao"),
            ops.add("residual_1", "x", "ao", "x1", "b s h"),
            ops.layer_norm("final_layer_norm", "x1", "n2", "b s h", "h"),
            *_mlp(m, "n2", "mo", "f"),
            ops.add("residual_2", "x1", "mo", "y.sum", "b s h"),
            ops.release_names("mo", "x1"),
            ops.clamp("clamp", "y.sum", "y", "b s h", 2)._replace(only_dtype="fp16"),
            ops.release_names(*returned(wiring)),
        ),
    )


def _decoder(m: ModelSpec, wiring: Wiring, cross_wiring: Wiring) -> Block:
    self_ops = (
        ops.layer_norm("self_attn_layer_norm", "x", "n1", "b s h", "h"),
        *_attention(m, wiring, "self_attn", "n1", "ao"),
        ops.add("residual_1", "x", "ao", "x1", "b s h"),
        ops.layer_norm("encoder_attn_layer_norm", "x1", "n2", "b s h", "h"),
    )
    rest = (
        ops.add("residual_2", "x1", "co", "x2", "b s h"),
        ops.layer_norm("final_layer_norm", "x2", "n3", "b s h", "h"),
        *_mlp(m, "n3", "mo", "fd"),
        ops.add("residual_3", "x2", "mo", "y", "b s h"),
        ops.release_names(*returned(wiring), *(("probs.cross",) if wiring.backend == "eager" else ())),
    )
    cross_ops = _attention(m, cross_wiring, "encoder_attn", "n2", "co", "encoded")
    return Block(
        f"{_DECODER}.layers",
        (*decoding(self_ops, wiring), *attend_to_encoder(cross_ops, wiring, "co"), *decoding(rest, wiring)),
    )


BUILDERS = {"whisper": whisper}
