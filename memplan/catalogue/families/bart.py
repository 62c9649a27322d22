"""BART, mBART, Marian, Pegasus, M2M-100: encoder and decoder, with norms before or after branches; BioGPT's decoder."""

from __future__ import annotations

from functools import partial

from memplan.catalogue.attention.attention import QUERIES, attention
from memplan.catalogue.decoder.encoder_decoder import (
    MASK,
    SOURCES,
    attend_to_encoder,
    cached_across,
    decoding,
    encoder_results,
    ids_of_labels,
    read_encoder_results,
)
from memplan.catalogue.decoder.frame import inputs, masks, returned
from memplan.catalogue.decoder.task_heads import labels_of, language_model_loss, vocabulary_projection
from memplan.catalogue.families.bert import plain_attention_ops, table
from memplan.catalogue.families.gpt import position_table
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.activations import activation, dropped, drops
from memplan.catalogue.kernels.positions import positions
from memplan.catalogue.kernels.rewriting import renamed, skipped
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Op, Run, Stack, Tensor, Weight
from memplan.core.records import NamedTuple
from memplan.models.model import ModelSpec

_ENCODER, _DECODER, _SHARED = "model.encoder", "model.decoder", "model.shared"
_CROSS = "mask.across"  # of the decoder's queries and the encoder's keys


class _Row(NamedTuple):
    """The differences between the families' code.

    before    norms are before the branches, and at the end of each half
    embedded  a norm follows the embeddings
    table     positions are looked up in a table that is `learned`, `frozen`, or a `buffer` and read by the tokens' ids
    scaled    the model scales the embeddings, instead of the embedding module
    biased    the logits have a bias
    indices   the decoder's function has a name for the indices of its positions
    apart     the activation is a statement of its own, before which the norm's output is gone
    """

    before: bool = True
    embedded: bool = False
    table: str = "learned"
    scaled: bool = False
    biased: bool = True
    indices: bool = False
    apart: bool = False


def _build(m: ModelSpec, wiring: Wiring, row: _Row) -> Stack:
    """Build a model for conditional generation. One table is the embeddings of both halves, and by default the head."""
    encoder_wiring = wiring._replace(causal=False, caching=False, decodes=False)
    cross_wiring, wiring = encoder_wiring._replace(caching=wiring.caching), wiring._replace(padded=False)
    half = wiring.encoder_decoder_half
    rows, t = ("prompts source", "s") if half else ("b s", "t")
    names = ("ids", *(("attention_mask",) if encoder_wiring.padded or half else ()))  # generate always passes one
    inputs = Op("inputs", (), (*(Tensor(n, rows, "int64") for n in names), labels_of(m)), holds="step")
    own = masks(encoder_wiring, "embeds.tokens")
    across = tuple(renamed(attend_to_encoder(masks(encoder_wiring, "stream.tokens"), wiring), {"mask.cross": _CROSS}))
    shifted = () if half else (ids_of_labels(),)
    before = (inputs, *shifted, *_embedded(m, row, _ENCODER, "ids", "embeds"), *own)
    stream = (*_embedded(m, row, _DECODER, "decoder_ids", "stream"), *masks(wiring, "stream.tokens"))
    output = (
        *_encoded(row, "encoded"),
        ops.release_names("embeds.tokens", "embeds.places", *(op.name for op in own)),
    )
    begun = (*decoding(stream, wiring), *across)
    last = "normed" if row.before else "x"
    head = vocabulary_projection("lm_head", last, f"{_SHARED}.weight" if m.tie_word_embeddings else "", tokens=t)
    bias = Weight("final_logits_bias", "v", "buffer", "", False)
    biased = (
        head._replace(writes=(Tensor("unbiased", f"b {t} v"),)),
        ops.add_weight("final_logits_bias", "unbiased", "logits", f"b {t} v", bias),
        ops.release_names("unbiased"),
    )
    places = ("stream.places", *(("stream.positions",) if row.indices else ()))
    frame = ops.release_names("stream.tokens", *places, *(op.name for op in masks(wiring, "stream.tokens")))
    after = (
        *decoding((*(_normed(_DECODER, last) if row.before else ()), frame), wiring),
        ops.release_names(*(t.name for op in across for t in op.writes)),
        *(biased if row.biased else (head,)),
    )
    encoder = Run((_encoder(m, row, encoder_wiring),), "L")
    if half == "encoder":
        return Stack(before, (encoder,), encoder_results(output, ("encoded",), "ids", "attention_mask", wiring.beams))
    block = _decoder(m, row, wiring, cross_wiring)
    if half:
        kept = read_encoder_results(SOURCES, MASK, Tensor("encoded", "rows source h", f"={_SHARED}.weight"))
        ids = Op("inputs", (), (Tensor("decoder_ids", "b s", "int64"),), holds="step")
        return Stack((*kept, ids, *renamed(begun, {"stream": "embeds"})), (Run((block,), "D"),), after)
    runs = (encoder, Run((block,), "D", (*output, *begun)))
    return Stack(before, runs, after, (*language_model_loss("t"), ops.release_names("decoder_ids", "encoded", last)))


def _normed(half: str, y: str) -> tuple[Op, ...]:
    return (ops.layer_norm(f"{half}.layer_norm", "x", y, "b s h", "h"), ops.release_names("x"))


def _encoded(row: _Row, y: str) -> tuple[Op, ...]:
    """The encoder's output, normalised if its branches' outputs are not. The model returns it, too."""
    whole = f"{y}.whole" if row.before else "x"
    output = ops.view(y, whole, y, "b s h")._replace(holds="forward")
    return (*_normed(_ENCODER, whole), output, ops.release_names(whole)) if row.before else (output,)


def _embedded(m: ModelSpec, row: _Row, half: str, ids: str, y: str) -> tuple[Op, ...]:
    """Scaled embeddings and positions. BART's encoder makes its positions for the batch, its decoder for a sequence."""
    tokens, positions, summed = f"{y}.tokens", f"{y}.positions", f"{y}.normed" if not row.embedded else f"{y}.summed"
    rows = "b s" if row.table == "buffer" or (row.table == "learned" and half == _ENCODER) else "s"
    lookup = ops.embedding(_SHARED, ids, tokens, "v", "h")
    length = (m.max_position_embeddings or 0) + (0 if row.table == "frozen" else 2)
    places = table(f"{half}.embed_positions", positions, f"{y}.places", str(length), rows)
    weight = places.weights[0]._replace(trains=row.table == "learned")
    if row.table == "buffer":
        weight = Weight(f"{half}.embed_positions.weights", weight.shape, "buffer", "", False)
        places = places._replace(writes=(Tensor(f"{y}.places", "b s h", f"={weight.name}"),), keeps=(), scratch_back=())
    unscaled = Tensor(f"{y}.unscaled", "b s h", f"={lookup.weights[0].name}")
    scaled = (
        lookup._replace(writes=(unscaled,)),
        ops.scale(f"{half}.embed_scale", unscaled.name, tokens, "b s h"),
        ops.release_names(unscaled.name),
    )
    return (
        *(scaled if row.scaled else (lookup._replace(scratch=(unscaled,)),)),
        Op(f"{half}.positions", (), (Tensor(positions, rows, "int64"),)),
        places._replace(weights=(weight,)),
        *((ops.release_names(positions),) if row.table != "learned" else ()),
        ops.add(f"{half}.add_positions", tokens, f"{y}.places", summed, "b s h"),
        *(
            (ops.layer_norm(f"{half}.layernorm_embedding", summed, f"{y}.normed", "b s h", "h"),)
            if row.embedded
            else ()
        ),
        ops.release_names(*((summed,) if row.embedded else ())),
        *dropped(f"{half}.dropout", f"{y}.normed", y, "b s h", drops(m, "dropout")),
        *(() if row.indices and half == _DECODER else (ops.release_names(positions),)),
    )


def _attention(m: ModelSpec, wiring: Wiring, name: str, x: str, y: str, states: str = "") -> tuple[Op, ...]:
    """Attention, with keys and values computed from x or from `states`, or read from a cache of these."""
    n, masked, caching = f"{name}.attention", wiring.has_mask(), wiring.caching
    backend, source, drop = wiring.masked if masked else wiring.backend, states or x, drops(m, "attention_dropout")
    back = "new" if backend in ("eager", "math") else "same"
    keys_and_values = (
        ops.linear(f"{name}.k_proj", source, "k0", "a d", "h", "attention", bias=True),
        ops.linear(f"{name}.v_proj", source, "v", "a d", "h", "attention", bias=True),
        ops.view(f"{name}.k_heads", "k0", "k", QUERIES, back),
    )
    self_cache = (Op(f"{n}.cache", ("k", "v"), caches="kv"),)
    cache = cached_across(n, "q", wiring.has_cross_cache) if states else self_cache
    kernel = (
        plain_attention_ops(n, drop, ("mask",) if masked else (), wiring.decodes, caching)
        if wiring.backend == "eager"
        else attention(n, "q", "k", "v", "o", wiring._replace(drops=drop), False)[caching:]  # without its own cache
    )
    return (
        ops.linear(f"{name}.q_proj", x, "q0", "a d", "h", "attention", bias=True),
        ops.view(f"{name}.q_heads", "q0", "q", QUERIES, back),
        *(skipped(keys_and_values) if states and wiring.has_cross_cache else keys_and_values),
        *(cache if caching else ()),
        *kernel,
        ops.linear(f"{name}.out_proj", "o", f"{y}.whole", "h", "a d", "attention", bias=True),
        ops.release_names("q", "k", "v", "o", *_own(x)),
        *dropped(f"{name}.dropout", f"{y}.whole", y, "b s h", drops(m, "dropout")),
    )


def _begun(row: _Row, norm: str, x: str, branch: str) -> tuple[str, tuple[Op, ...]]:
    """Return the name of what a branch reads, and the norm that makes it, if it has one before it."""
    y = f"{branch}.in"
    return (y, (ops.layer_norm(norm, x, y, "b s h", "h"),)) if row.before else (x, ())


def _own(x: str) -> tuple[str, ...]:
    """Return the name of what a branch reads, if nothing else reads it."""
    return (x,) if x.endswith(".in") else ()


def _added(row: _Row, norm: str, x: str, branch: str, y: str) -> tuple[Op, ...]:
    """Add a branch to x, and normalise the sum if the branch had no norm before it."""
    if row.before:
        return (ops.add(f"{norm}.residual", x, branch, y, "b s h"), ops.release_names(branch))
    return (
        ops.add(f"{norm}.residual", x, branch, f"{y}.sum", "b s h"),
        ops.release_names(branch),
        ops.layer_norm(norm, f"{y}.sum", y, "b s h", "h"),
        ops.release_names(f"{y}.sum"),
    )


def _mlp(m: ModelSpec, row: _Row, x: str, y: str, width: str) -> tuple[Op, ...]:
    """The last branch of a block, added to x."""
    norm = "final_layer_norm"
    n, begun = _begun(row, norm, x, "mo")
    return (
        *begun,
        ops.linear("fc1", n, "up", width, "h", "mlp", bias=True),
        *activation(m, "activation_fn", "up", "act.whole", f"b s {width}"),
        ops.release_names("up", *(() if row.apart else _own(n))),
        *dropped("activation_dropout", "act.whole", "act", f"b s {width}", drops(m, "activation_dropout")),
        ops.linear("fc2", "act", "mo.whole", "h", width, "mlp", bias=True),
        ops.release_names("act"),
        *dropped("dropout", "mo.whole", "mo", "b s h", drops(m, "dropout")),
        *_added(row, norm, x, "mo", y),
    )


def _self_attention(m: ModelSpec, row: _Row, wiring: Wiring) -> tuple[Op, ...]:
    norm = "self_attn_layer_norm"
    n, begun = _begun(row, norm, "x", "ao")
    return (*begun, *_attention(m, wiring, "self_attn", n, "ao"), *_added(row, norm, "x", "ao", "x1"))


def _seen_finite(x: str, y: str) -> Op:
    """Look whether all numbers are finite, as those of a model that trains are: BART only clamps others."""
    masks = tuple(Tensor(name, "b s h", "bool") for name in ("numbers", "not infinite", "finite"))
    seen = (*masks, Tensor("magnitudes", "b s h", f"={x}"))
    return ops.view("isfinite", x, y, "b s h")._replace(scratch=seen)


def _encoder(m: ModelSpec, row: _Row, wiring: Wiring) -> Block:
    return Block(
        f"{_ENCODER}.layers",
        (
            *_self_attention(m, row, wiring),
            *_mlp(m, row, "x1", "y.sum", "f"),
            ops.release_names("x1"),
            (ops.clamp("clamp", "y.sum", "y", "b s h", 2) if row.before else _seen_finite("y.sum", "y"))._replace(
                only_dtype="fp16"
            ),
            ops.release_names(*returned(wiring)),
        ),
    )


def _decoder(m: ModelSpec, row: _Row, wiring: Wiring, cross_wiring: Wiring) -> Block:
    norm = "encoder_attn_layer_norm"
    n, begun = _begun(row, norm, "x1", "co")
    cross_ops = renamed(_attention(m, cross_wiring, "encoder_attn", n, "co", "encoded"), {"mask": _CROSS})
    rest = (
        ops.release_names(*returned(wiring)),  # the variable that holds them gets those of the other attention
        *_added(row, norm, "x1", "co", "x2"),
        *_mlp(m, row, "x2", "y", "fd"),
        ops.release_names("x2", *(("probs.cross",) if wiring.backend == "eager" else ())),
    )
    return Block(
        f"{_DECODER}.layers",
        (
            *decoding((*_self_attention(m, row, wiring), *begun), wiring),
            *attend_to_encoder(cross_ops, wiring, "co"),
            *decoding(rest, wiring),
        ),
    )


def biogpt(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build BioGPT: a decoder of BART's layers, normalised before. It makes a padding mask of ones if it is given none.

    Source: transformers 5.24 models/biogpt/modeling_biogpt.py BioGptModel.
    """
    name, row, rows = "biogpt", _Row(apart=True), str((m.max_position_embeddings or 0) + 2)
    lookup = ops.embedding(f"{name}.embed_tokens", "ids", "tokens", "v", "h")
    unscaled = Tensor("unscaled", "b s h", f"={lookup.weights[0].name}")
    counted = (Tensor("tokens so far", "", "int64"),) if wiring.static and wiring.decodes else ()
    ones = () if wiring.padded else (Op("ones", (), (*counted, Tensor("attention_mask", "b s", "fp32"))),)
    before = (
        inputs(wiring.padded),
        lookup._replace(scratch=(unscaled,) if m.get("scale_embedding", True) else ()),
        *ones,
        *masks(wiring, "tokens"),
        positions(),
        Op("positions.offset", ("positions",), (Tensor("rows", "s", "int64"),)),
        position_table(f"{name}.embed_positions", "rows", "places", f"{rows} h"),
        ops.release_names("rows"),
        ops.add("add_positions", "tokens", "places", "summed", "b s h"),
        *dropped("dropout", "summed", "embeds", "b s h", drops(m, "dropout")),
        ops.release_names("summed"),
    )
    block = Block(
        f"{name}.layers",
        (
            *_self_attention(m, row, wiring),
            *_mlp(m, row, "x1", "y", "f"),
            ops.release_names("x1", "positions", *returned(wiring)),
        ),
    )
    after = (
        ops.layer_norm(f"{name}.layer_norm", "x", "n", "b s h", "h"),
        ops.release_names("x", "tokens", "places", "positions", *(t.name for op in ones for t in op.writes)),
        ops.release_names(*(op.name for op in masks(wiring, "tokens"))),
        vocabulary_projection("output_projection", "n", f"{name}.embed_tokens.weight" * m.tie_word_embeddings),
    )
    return Stack(before, (Run((block,), "L"),), after)


BUILDERS = {
    "bart": partial(_build, row=_Row(before=False, embedded=True, indices=True)),
    "biogpt": biogpt,
    "m2m_100": partial(_build, row=_Row(table="buffer", biased=False)),
    "marian": partial(_build, row=_Row(before=False, table="frozen", scaled=True)),
    "mbart": partial(_build, row=_Row(embedded=True)),
    "pegasus": partial(_build, row=_Row(table="frozen", scaled=True)),
}
