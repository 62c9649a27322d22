"""Whisper: two convolutions over a recording's frames, an encoder of a fixed length, a decoder that attends to it."""

from __future__ import annotations

from memplan.catalogue.attention.attention import attention, laid_out_as
from memplan.catalogue.decoder.encoder_decoder import cached_across, crossing, decoding, found, ids_of_labels, left
from memplan.catalogue.decoder.frame import masks, returned
from memplan.catalogue.decoder.task_heads import decoder, labels_of, language_model_loss
from memplan.catalogue.decoder.windows import renamed
from memplan.catalogue.families.bert import eager
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.activations import activation, dropped, drops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Run, Stack, Tensor, Weight
from memplan.models.model import ModelSpec

_Q = "b s a d"
_SOURCE = "transformers 5.24 models/whisper/modeling_whisper.py"
_ENCODER, _DECODER = "model.encoder", "model.decoder"


def whisper(m: ModelSpec, wiring: Wiring) -> Stack:
    own = wiring._replace(padded=False)
    whole = own._replace(causal=False, caching=False, decodes=False)
    tied = f"{_DECODER}.embed_tokens.weight" if m.tie_word_embeddings else ""
    last = (
        ops.layer_norm(f"{_DECODER}.layer_norm", "x", "n", "b s h", "h"),
        ops.leave("x", "tokens", "places", "position_ids", *_masks(own)),
    )
    after = (*decoding(last, wiring), decoder("proj_out", "n", tied, tokens="s" if wiring.part else "t"))
    encoder = Run((_encoder(m, whole),), "L")
    if wiring.part == "encoder":
        return Stack(_before(m, True), (encoder,), left(_encoded(), ("encoded",), "features", "", wiring.beams))
    block = _decoder(m, own, whole._replace(caching=wiring.caching))
    if wiring.part:
        return Stack(_alone(m, own), (Run((block,), "D"),), after)
    between = (*_encoded(), *decoding(_embedded(m, own), wiring))
    loss = (*language_model_loss("t"), ops.leave("decoder_ids", "encoded", "n"))
    return Stack(_before(m, False), (encoder, Run((block,), "D", between)), after, loss)


def _masks(wiring: Wiring) -> tuple[str, ...]:
    return tuple(op.name for op in masks(wiring, "tokens"))


def _before(m: ModelSpec, alone: bool) -> tuple[Op, ...]:
    """The encoder's table of positions is made of sines, and never trains. cuDNN's own workspace is not counted."""
    drop = drops(m, "dropout")
    first, second = f"{_ENCODER}.conv1", f"{_ENCODER}.conv2"
    table = Weight(f"{_ENCODER}.embed_positions.weight", "s h", "embedding", trains=False, rows=1)
    own = Weight(f"{first}.weight", "h mel 3", "embedding")
    return (
        Op(
            "inputs",
            (),
            (Tensor("features", "prompts mel frames" if alone else "b mel frames", f"={own.name}"), labels_of(m)),
            (own,),
            gradient="none",
            holds="step",
        ),
        *(() if alone else (ids_of_labels(),)),
        _convolution(first, "features", "c1", "b frames h", own),
        ops.activation(f"{_ENCODER}.gelu_1", "c1", "g1", "b frames h"),
        _convolution(second, "g1", "c2", "b s h", Weight(f"{second}.weight", "h h 3", "embedding")),
        ops.activation(f"{_ENCODER}.gelu_2", "c2", "g2", "b s h"),
        ops.leave("c1", "g1", "c2"),
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
        ops.leave("rows"),
    )


def _convolution(name: str, x: str, y: str, shape: str, w: Weight) -> Op:
    """Keeps its input and its weight."""
    bias = Weight(f"{name}.bias", "h", "embedding")
    return Op(
        name,
        (x,),
        (Tensor(y, shape),),
        (w, bias),
        (Keep(w.name, x), Keep(x, w.name), Keep(w.name, w.name)),
        autocast="lower",
        product="matrix",
        source=f"{ops.DERIVATIVES}: convolution",
    )


def _encoded() -> tuple[Op, ...]:
    """The encoder's last norm."""
    return (
        ops.layer_norm(f"{_ENCODER}.layer_norm", "x", "encoded", "b s h", "h"),
        ops.leave("x", "g2", "all_positions"),
    )


def _embedded(m: ModelSpec, wiring: Wiring) -> tuple[Op, ...]:
    """The decoder's embeddings and mask."""
    drop = drops(m, "dropout")
    longest = m.longest_target
    places = Weight(f"{_DECODER}.embed_positions.weight", f"{longest} h", "embedding", rows=1)
    return (
        Op("position_ids", (), (Tensor("position_ids", "b s", "int64"),), scratch=(Tensor("arange", "s", "int64"),)),
        ops.embedding(f"{_DECODER}.embed_tokens", "decoder_ids", "tokens", "v", "h"),
        Op(
            f"{_DECODER}.embed_positions",
            ("position_ids",),
            (Tensor("places", "b s h", f"={places.name}"),),
            (places,),
            (Keep("position_ids", places.name),),
            source=f"{ops.DERIVATIVES}: index",
        ),
        ops.add(f"{_DECODER}.add_positions", "tokens", "places", "summed.decoder" if drop else "stream", "b s h"),
        *((ops.dropout(f"{_DECODER}.dropout", "summed.decoder", "stream", "b s h"),) if drop else ()),
        *masks(wiring, "tokens"),
    )


def _alone(m: ModelSpec, wiring: Wiring) -> tuple[Op, ...]:
    """The decoder's first operations over what the encoder has left; the recordings stay beside it."""
    name = f"{_DECODER}.embed_tokens.weight"
    features = Tensor("features", "prompts mel frames", f"={name}")
    inputs = Op("inputs", (), (Tensor("decoder_ids", "b s", "int64"),), holds="step")
    kept = found(features, Tensor("encoded", "rows source h", f"={name}"))
    return (*kept, inputs, *renamed(_embedded(m, wiring), {"stream": "embeds"}))


def _attention(m: ModelSpec, wiring: Wiring, name: str, x: str, y: str, states: str = "") -> tuple[Op, ...]:
    """q is scaled; q, k and v are made contiguous head by head; keys have no bias. `states`: whose keys they are."""
    drop, source = drops(m, "attention_dropout"), states or x
    masked, caching = wiring.has_mask(), wiring.caching
    n, wiring = f"{name}.attention", wiring._replace(caching=False)
    backend = wiring.masked if masked else wiring.backend
    if wiring.backend == "eager":
        kernel = _as_they_lie(n, eager(n, drop, ("mask",) if masked else ()))
    else:
        heads = attention(n, "q", "k", "v", "o", wiring, False)
        kernel = laid_out_as("o", _as_they_lie(n, heads), backend == "flash")
    keyed = (
        ops.linear(f"{name}.k_proj", source, "k0", "a d", "h", "attention"),
        ops.copy(f"{name}.k_contiguous", "k0", "k", _Q),
        ops.linear(f"{name}.v_proj", source, "v0", "a d", "h", "attention", bias=True),
        ops.copy(f"{name}.v_contiguous", "v0", "v", _Q),
    )
    own = (Op(f"{n}.cache", ("k", "v"), caches="kv"),)
    cache = () if not caching else cached_across(n, "q", wiring.crossed) if states else own
    return (
        ops.linear(f"{name}.q_proj", x, "q0", "a d", "h", "attention", bias=True),
        ops.scale(f"{name}.scaling", "q0", "q1", _Q),
        ops.copy(f"{name}.q_contiguous", "q1", "q", _Q),
        *(() if states and wiring.crossed else keyed),
        *cache,
        *kernel,
        ops.linear(f"{name}.out_proj", "o", f"{y}.whole", "h", "a d", "attention", bias=True),
        ops.leave("q", "k", "v", x),
        *dropped(f"{name}.dropout", f"{y}.whole", y, "b s h", drops(m, "dropout")),
    )


def _as_they_lie(name: str, kernel: tuple[Op, ...]) -> tuple[Op, ...]:
    """The kernel without copies of heads, which lie one after another."""
    copies = {f"{name}.{t}_flat" for t in "qkv"}
    return tuple(op._replace(view=True) if op.name in copies else op for op in kernel)


def _mlp(m: ModelSpec, x: str, y: str, width: str) -> tuple[Op, ...]:
    return (
        ops.linear("fc1", x, "up", width, "h", "mlp", bias=True),
        *activation(m, "activation_fn", "up", "act.whole", f"b s {width}"),
        ops.leave(x),
        *dropped("activation_dropout", "act.whole", "act", f"b s {width}", drops(m, "activation_dropout")),
        ops.linear("fc2", "act", f"{y}.whole", "h", width, "mlp", bias=True),
        *dropped("dropout", f"{y}.whole", y, "b s h", drops(m, "dropout")),
    )


def _encoder(m: ModelSpec, wiring: Wiring) -> Block:
    return Block(
        f"{_ENCODER}.layers",
        (
            ops.layer_norm("self_attn_layer_norm", "x", "n1", "b s h", "h"),
            *_attention(m, wiring, "self_attn", "n1", "ao"),
            ops.add("residual_1", "x", "ao", "x1", "b s h"),
            ops.layer_norm("final_layer_norm", "x1", "n2", "b s h", "h"),
            *_mlp(m, "n2", "mo", "f"),
            ops.add("residual_2", "x1", "mo", "y", "b s h"),
            ops.leave(*returned(wiring)),
        ),
    )


def _decoder(m: ModelSpec, wiring: Wiring, whole: Wiring) -> Block:
    own = (
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
        ops.leave(*returned(wiring), *(("probs.cross",) if wiring.backend == "eager" else ())),
    )
    across = _attention(m, whole, "encoder_attn", "n2", "co", "encoded")
    return Block(
        f"{_DECODER}.layers",
        (*decoding(own, wiring), *crossing(across, wiring, "co"), *decoding(rest, wiring)),
    )


BUILDERS = {"whisper": whisper}
