"""T5: RMSNorm that does not cast its input, and positions as a bias that all layers of a stack add to their scores."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from memplan.catalogue.attention.attention import attention
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
from memplan.catalogue.decoder.frame import masks
from memplan.catalogue.decoder.task_heads import labels_of, language_model_loss, vocabulary_projection
from memplan.catalogue.families.bert import plain_attention_ops, projections
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.activations import dropped, drops, gelu_new, relu
from memplan.catalogue.kernels.rewriting import renamed, skipped
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Run, Scratch, Stack, Tensor, Weight
from memplan.models.model import ModelSpec

_SOURCE = "transformers 5.24 models/t5/modeling_t5.py"
_SORTED = ("ids", "order", "original order", "counts", "starts")  # for pairs of tokens, if there are more than 3072


def t5(m: ModelSpec, wiring: Wiring, shares_bias: bool = True) -> Stack:
    """Build T5. A head tied to the embeddings scales its input; Flan-T5's, which has a separate weight, does not.

    `shares_bias`: the first block's bias is that of all blocks. If not, as in UMT5, every block has its own, and the
    zeros for the encoder's tokens never require a gradient.
    """
    wiring = wiring._replace(checkpoints=wiring.checkpoints and shares_bias)
    encoder_wiring = wiring._replace(causal=False, caching=False, decodes=False)
    decoder_wiring = wiring._replace(padded=False)  # labels get no mask
    cross_wiring = encoder_wiring._replace(caching=wiring.caching)
    tied = "shared.weight" if m.tie_word_embeddings else ""
    drop = drops(m, "dropout_rate")
    last = (
        *norm("decoder.final_layer_norm", "x", "normed"),
        ops.release_names("x"),
        *dropped("decoder.dropout", "normed", "returned", "b s h", drop),
        *((ops.scale("scale", "returned", "n", "b s h"),) if tied else (ops.view("last", "returned", "n", "b s h"),)),
        ops.release_names(
            "decoder.tokens",
            *_masks(decoder_wiring, "mask"),
            *_masks(encoder_wiring, "cross_mask"),
            *(("decoder_bias", *_cross_biases(wiring, cross_wiring)) if shares_bias else ()),
        ),
    )
    encoder = tuple(Run((_encoder(m, encoder_wiring, times == "L1", shares_bias),), times) for times in ("L1", "L2"))
    first, later = (_decoder(m, decoder_wiring, cross_wiring, place, shares_bias) for place in (True, False))
    after = (
        *decoding(last, wiring),
        vocabulary_projection("lm_head", "n", tied, tokens="s" if wiring.encoder_decoder_half else "t"),
        *((ops.release_names("returned"),) if wiring.encoder_decoder_half else ()),
    )
    numbers, output = m.axes(), _encoder_output(m, encoder_wiring, ("encoder_bias",) if shares_bias else ())
    if wiring.encoder_decoder_half == "encoder":
        names = ("encoded.normed", "encoded")
        last = encoder_results(output, names, "ids", "attention_mask", wiring.beams)
        return Stack(_before(m, encoder_wiring), _nonempty(encoder, numbers), last)
    decoder_ops = _decoder_before(m, decoder_wiring, encoder_wiring)
    if wiring.encoder_decoder_half:
        return Stack(
            _standalone_decoder(decoder_ops), _nonempty((Run((first,), "D1"), Run((later,), "D2")), numbers), after
        )
    between = (*output, ids_of_labels(), *decoder_ops)
    runs = (*encoder, Run((first,), "D1", between), Run((later,), "D2"))
    loss = (*language_model_loss("t"), ops.release_names("decoder_ids", "encoded", "returned", "n"))
    return Stack(_before(m, encoder_wiring), _nonempty(runs, numbers), after, loss)


def _nonempty(runs: tuple[Run, ...], numbers: Mapping[str, int]) -> tuple[Run, ...]:
    return tuple(run for run in runs if numbers[run.times])


def _masks(wiring: Wiring, name: str) -> tuple[str, ...]:
    return (name,) if wiring.has_mask() else ()


def _cross_biases(wiring: Wiring, cross_wiring: Wiring) -> tuple[str, ...]:
    """Names of the biases for the encoder's tokens. A kernel that pads rows keeps its padded copy, not the bias."""
    is_kept = wiring.records and wiring.backend != "eager" and not cross_wiring.has_mask()
    return ("cross_bias", "cross_bias.uneven") if is_kept else ("cross_bias",)


def norm(name: str, x: str, y: str) -> tuple[Op, ...]:
    return ops.rms_norm(name, x, y, "b s h", "h", of_x=True)


def _shared_embedding(name: str, ids: str, y: str) -> Op:
    """Look up tokens in the table that the encoder, the decoder and a tied head share."""
    op = ops.embedding(name, ids, y, "v", "h")
    w = op.weights[0]._replace(name="shared.weight")
    return op._replace(weights=(w,), writes=(Tensor(y, "b s h", f"={w.name}"),), keeps=(Keep(ids, w.name),))


def relative_bias(name: str, y: str, keys: str = "s", shared: bool = True) -> tuple[Op, ...]:
    """One number per head for each distance of two tokens.

    `shared`: the first block makes it, and all blocks of its stack add it. UMT5, whose blocks each make one, has a name
    for the logarithms until the buckets are made.
    """
    w = Weight(f"{name}.relative_attention_bias.weight", "buckets a", "embedding", rows=1)
    wide, distances, places = Tensor("distances", f"s {keys}", "int64"), f"{y}.distances", (f"{y}.rows", f"{y}.columns")
    steps = ("signs", "absolute", "large", "largest")[: 4 if y == "encoder_bias" else 3]
    logarithms = () if shared else (wide._replace(name="logarithms", dtype="fp32"),)
    source = f"{_SOURCE} T5Attention.compute_bias, _relative_position_bucket"
    return (
        Op(f"{y}.rows", (), (Tensor(places[0], "s 1", "int64"),), scratch=(Tensor("arange", "s", "int64"),)),
        Op(f"{y}.columns", (), (Tensor(places[1], f"1 {keys}", "int64"),)),
        Op(distances, places, (wide._replace(name=distances),), source=source),
        Op(
            f"{y}.buckets",
            (distances,),
            (Tensor(f"{y}.buckets", f"s {keys}", "int64"),),
            scratch=(*(wide._replace(name=step) for step in steps), *logarithms, Tensor("small", f"s {keys}", "bool")),
            gradient="none",
            source=source,
        ),
        Op(
            f"{y}.embedding",
            (f"{y}.buckets",),
            (Tensor(y, f"s {keys} a", f"={w.name}"),),
            (w,),
            (Keep(f"{y}.buckets", w.name),),
            scratch_back=(
                *(Scratch(Tensor(part, "pairs", "int64")) for part in _SORTED),
                Scratch(Tensor("segments", "pair_segments", "int64")),
                Scratch(Tensor("partial sums", "pair_segments a32", "fp32")),
            ),
            source="torch 2.13 aten/src/ATen/native/cuda/EmbeddingBackwardKernel.cu",
        ),
        ops.release_names(distances, *places),
    )


def _before(m: ModelSpec, wiring: Wiring) -> tuple[Op, ...]:
    names = (
        "ids",
        *(("attention_mask",) if wiring.padded or wiring.encoder_decoder_half else ()),
    )  # generate always passes one
    shape = "prompts source" if wiring.encoder_decoder_half else "b s"
    return (
        Op("inputs", (), (*(Tensor(n, shape, "int64") for n in names), labels_of(m)), holds="step"),
        _shared_embedding("encoder.embed_tokens", "ids", "tokens"),
        *_mask(wiring, "tokens", "encoder_mask"),
        *dropped("encoder.dropout", "tokens", "embeds", "b s h", drops(m, "dropout_rate")),
    )


def _mask(wiring: Wiring, x: str, name: str) -> tuple[Op, ...]:
    return tuple(
        op._replace(name=name, writes=tuple(t._replace(name=name) for t in op.writes)) for op in masks(wiring, x)
    )


def _encoder_output(m: ModelSpec, wiring: Wiring, bias: tuple[str, ...]) -> tuple[Op, ...]:
    """The encoder's last norm. The model also returns its output."""
    return (
        *norm("encoder.final_layer_norm", "x", "encoded.normed"),
        ops.release_names("x"),
        *dropped("encoder.dropout", "encoded.normed", "encoded", "b s h", drops(m, "dropout_rate")),
        ops.view("encoder.last_hidden_state", "encoded", "last_hidden_state", "b s h")._replace(holds="forward"),
        ops.release_names("tokens", *bias, *_masks(wiring, "encoder_mask")),
    )


def _decoder_before(m: ModelSpec, wiring: Wiring, encoder_wiring: Wiring) -> tuple[Op, ...]:
    """The decoder's embeddings and masks."""
    drop = drops(m, "dropout_rate")
    operations = (
        _shared_embedding("decoder.embed_tokens", "decoder_ids", "decoder.tokens"),
        *_mask(wiring, "decoder.tokens", "mask"),
    )
    return (
        *decoding(operations, wiring),
        *attend_to_encoder(_mask(encoder_wiring, "decoder.tokens", "cross_mask"), wiring, "cross_mask"),
        *decoding(dropped("decoder.dropout", "decoder.tokens", "stream", "b s h", drop), wiring),
    )


def _standalone_decoder(operations: tuple[Op, ...]) -> tuple[Op, ...]:
    """The first operations of a decoder that runs alone; the encoder's output, the source ids and their mask stay
    alive.
    """
    inputs = Op("inputs", (), (Tensor("decoder_ids", "b s", "int64"),), holds="step")
    kept = read_encoder_results(SOURCES, MASK, Tensor("encoded", "rows source h", "=shared.weight"))
    return (*kept, inputs, *renamed(operations, {"stream": "embeds"}))


def _attention(
    m: ModelSpec,
    wiring: Wiring,
    name: str,
    x: str,
    y: str,
    bias: str,
    mask: str,
    states: str = "",
    bias_ops: tuple[Op, ...] = (),
    own: tuple[str, ...] = (),
) -> tuple[Op, ...]:
    """Attention with `bias` added to the scores, and `mask` if there is one.

    bias_ops  ops that make the bias, if this block does
    own       names of biases that no other block adds, which are freed with the heads
    states    what keys and values are computed from, if it is not x
    """
    drop, masked = drops(m, "dropout_rate"), wiring.has_mask()
    n, crosses = f"{name}.attention", bool(states)
    caching = wiring.caching
    plain = wiring = wiring._replace(caching=False)
    if wiring.backend == "eager":
        kernel = plain_attention_ops(n, drop, (bias, *((mask,) if masked else ())), wiring.decodes, caching)
    else:  # flash attention takes no bias
        plain = wiring._replace(backend="efficient", masked="efficient", padded=True, drops=drop)
        rows = "b a s" if wiring.padded else "a s"
        padded = f"{rows} s_uneven"  # before the kernel pads it
        triangle = wiring.causal and not (masked or wiring.decodes)
        pads = crosses and wiring.records and not masked  # layers share the bias; each keeps its own padded copy
        added_ops = _bias_to_add(n, bias, mask if masked else "", f"{rows} s", triangle, crosses, pads)
        per_sequence = not (
            wiring.is_single_sequence or wiring.padded
        )  # without masks, several sequences share one bias
        kernel = tuple(
            new
            for op in attention(n, "q", "k", "v", "o", plain, False)
            for new in (
                added_ops
                if op.name == f"{n}.mask"
                else (_with_bias(op, "" if pads else padded, per_sequence) if op.name == n else (op,))
            )
        )
        kernel = (*kernel, ops.release_names("bias.added"))  # which autocast has copied
    projected = projections(name, x, plain, ("q", "k", "v"), bias=False)
    if wiring.has_cross_cache and crosses:
        projected = (
            *(op for op in projected if op.writes[0].name[0] == "q"),
            *skipped(tuple(op for op in projected if op.writes[0].name[0] != "q")),
        )
    if caching:
        cache_ops = (Op(f"{n}.cache", ("k", "v"), caches="kv"),)
        bias_ops = (*(cached_across(n, "q", wiring.has_cross_cache) if crosses else cache_ops), *bias_ops)
    seen = (Op(f"{name}.past_seen_tokens", (), (Tensor("past_seen_tokens", "", "int64"),), source=_SOURCE),)
    return (
        *(seen if caching and wiring.static else ()),
        *(
            op._replace(reads=(states,), keeps=_read_states(op.keeps, x, states))
            if states and op.name[-2:] in (".k", ".v")
            else op
            for op in projected
        ),
        *bias_ops,
        *kernel,
        ops.linear(f"{name}.o", "o", f"{y}.whole", "h", "a d", "attention"),
        ops.release_names("q", "k", "v", "o", *own, *(("past_seen_tokens",) if caching and wiring.static else ())),
        *dropped(f"{name}.dropout", f"{y}.whole", y, "b s h", drop),
    )


def _read_states(keeps: tuple[Keep, ...], x: str, states: str) -> tuple[Keep, ...]:
    return tuple(k._replace(what=states if k.what == x else k.what, of=states if k.of == x else k.of) for k in keeps)


def _bias_to_add(n: str, bias: str, mask: str, rows: str, triangle: bool, crosses: bool, pads: bool) -> tuple[Op, ...]:
    """The bias as torch's attention takes it: contiguous, and the least number where a mask hides a token.

    Heads are the innermost dimension of the bias, and of what `where` makes of it, but not of the zeros for the
    encoder's tokens. If rows are no multiple of 8, the kernel pads them in another tensor, and keeps that instead of
    the zeros (`pads`). Source: transformers 5.24 integrations/sdpa_attention.py create_position_bias_mask.
    """
    if mask or triangle:
        hidden = f"{n}.hidden"
        least = Tensor("least", "", f"={bias}")
        seen = () if mask else (Op(f"{n}.triangle", (), (Tensor(hidden, "s s", "bool"),)),)
        mask_name, chosen = mask or hidden, "bias.added" if crosses else "bias.chosen"
        where = Op(
            f"{n}.where",
            (bias, mask_name),
            (Tensor(chosen, f"{rows}8" if crosses else rows, f"={bias}"),),
            (),
            (Keep(mask_name, bias),),
            scratch=(least,),
            source=f"{ops.DERIVATIVES}: where",
        )
        contiguous = () if crosses else (ops.copy(f"{n}.contiguous_bias", chosen, "bias.added", f"{rows}8"),)
        operations: tuple[Op, ...] = (*seen, where, *contiguous)
        returns = () if mask else (ops.release_names(hidden),)  # the function that makes the triangle holds it
    else:
        copied = () if crosses else (ops.copy(f"{n}.contiguous_bias", bias, "bias.added", "a s s8"),)
        shape = "a s s_even" if pads else "a s s8"
        operations, returns = copied or (ops.view(f"{n}.added", bias, "bias.added", shape),), ()
    lowered = Op(
        f"{n}.bias.autocast",
        ("bias.added",),
        (Tensor("o.bias", operations[-1].writes[0].shape),),
        cast=True,
        autocast="lower",
    )
    return (*operations, *returns, lowered, *(_padded(n, f"{bias}.uneven") if pads else ()))


def _padded(n: str, bias: str) -> tuple[Op, ...]:
    """Pad the zeros' rows if they are no multiple of 8. Source: torch 2.13 attention.cpp pad_bias."""
    return (
        ops.lowered(f"{n}.uneven", bias, "o.uneven", "a s s_uneven"),
        ops.copy(f"{n}.pad_bias", "o.uneven", "o.padded", "a s s_uneven8", "new"),
        ops.release_names("o.uneven"),
    )


def _with_bias(op: Op, padded: str, per_sequence: bool) -> tuple[Op, ...]:
    """The kernel with a bias that trains. `padded` is its shape before the kernel pads it; empty if it is padded.

    per_sequence  sequences share the bias; the kernel makes its gradient for each of them, and they are summed
    """
    shapes = {"o.bias": "a s s8"} if padded else {"o.bias": "a s s_even", "o.padded": "a s s_uneven8"}
    each = {name: f"{name}.each" if per_sequence else name for name in shapes}
    expand = (
        ops.view(f"{op.name}.expand_{name}", name, each[name], f"b {shape}", gradient="new")
        for name, shape in shapes.items()
        if per_sequence
    )
    reads = (*(name for name in op.reads if name != "o.bias"), *each.values())
    kept = [what for what in dict.fromkeys(k.what for k in op.keeps) if what != "o.bias"]
    targets = dict.fromkeys(k.of for k in op.keeps)
    keeps = tuple(Keep(what, of) for of in (*targets, *each.values()) for what in (*kept, *each.values()))
    scratch = (Tensor("bias.padded", padded, "=o.bias"),) if padded else ()
    return (*expand, op._replace(reads=reads, keeps=keeps, scratch=scratch))


def _mlp(m: ModelSpec, name: str, x: str, y: str) -> tuple[Op, ...]:
    """The MLP. `wo` gets its input in its weight's dtype, which the norm's output already has."""
    kind = str(m.get("feed_forward_proj", "relu"))
    gated, act = kind.startswith("gated-"), "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-")
    inner, shape, drop = f"{name}.DenseReluDense", "b s f", drops(m, "dropout_rate")
    gate_name, up_name = ("wi_0", "wi_1") if gated else ("wi", "")
    product = "act" if not gated else "product"
    if act == "gelu_new":
        activation = gelu_new(f"{inner}.act", "gate", "act", shape)
    elif act == "relu":
        activation = (relu(f"{inner}.act", "gate", "act", shape),)
    else:
        activation = (ops.activation(f"{inner}.act", "gate", "act", shape),)
    return (
        *norm(f"{name}.layer_norm", x, "n.ff"),
        ops.linear(f"{inner}.{gate_name}", "n.ff", "gate", "f", "h", "mlp"),
        *activation,
        *(
            (
                ops.linear(f"{inner}.{up_name}", "n.ff", "up", "f", "h", "mlp"),
                ops.mul(f"{inner}.product", "act", "up", "product", shape),
            )
            if gated
            else ()
        ),
        *dropped(f"{inner}.dropout", product, "dropped.ff", shape, drop),
        ops.cast(f"{inner}.cast", "dropped.ff", "wide.ff", shape, f"={inner}.wo.weight"),
        ops.linear(f"{inner}.wo", "wide.ff", "mo.whole", "h", "f", "mlp"),
        ops.release_names("n.ff", *(("act", "up") if gated else ())),
        *dropped(f"{name}.dropout", "mo.whole", "mo", "b s h", drop),
        ops.add(f"{name}.residual", x, "mo", f"{y}.sum", "b s h"),
        *_clamped(f"{name}.clamp", f"{y}.sum", y),
    )


def _clamped(name: str, x: str, y: str) -> tuple[Op, ...]:
    """Clamp the sum after a layer if it is fp16, to a bound that depends on whether a number is infinite."""
    bound, least = f"{y}.bound", f"{y}.least"
    seen = (Tensor("magnitudes", "b s h", f"={x}"), Tensor("infinite", "b s h", "bool"), Tensor("any", "", "bool"))
    source = f"{_SOURCE} T5Block.forward"
    clamp = ops.clamp(name, x, y, "b s h", 2)
    operations = (
        Op(bound, (x,), (Tensor(bound, "", "fp32"),), scratch=seen, gradient="none", source=source),
        Op(least, (x, bound), (Tensor(least, "", "fp32"),), gradient="none", source=source),
        clamp._replace(
            reads=(x, least, bound),
            writes=(Tensor(y, "b s h", f"={x}"),),
            keeps=(*clamp.keeps, Keep(least, x), Keep(bound, x)),
        ),
    )
    return (*(op._replace(only_dtype="fp16") for op in operations), ops.release_names(x, least))


def _self_attention(m: ModelSpec, wiring: Wiring, bias: str, mask: str, first: bool, shares: bool) -> tuple[Op, ...]:
    name, own = "layer.0", () if shares else (bias,)
    # a static cache has room for more keys; without a mask, attention reads only some of them
    keys = "kv_static" if wiring.static else "kv" if wiring.decodes else "s"
    bias_ops = relative_bias(f"{name}.SelfAttention", bias, keys, shares) if first else ()
    return (
        *norm(f"{name}.layer_norm", "x", "n1"),
        *_attention(m, wiring, f"{name}.SelfAttention", "n1", "ao", bias, mask, bias_ops=bias_ops, own=own),
        ops.add(f"{name}.residual", "x", "ao", "x1.sum", "b s h"),
        ops.release_names("n1"),
        *_clamped(f"{name}.clamp", "x1.sum", "x1"),
    )


def _encoder(m: ModelSpec, wiring: Wiring, first: bool, shares: bool) -> Block:
    held, bias = ("probs",) if wiring.backend == "eager" else (), "encoder_bias"
    operations = (
        *_self_attention(m, wiring, bias, "encoder_mask", first, shares),
        *_mlp(m, "layer.1", "x1", "y"),
        ops.release_names(*((bias,) if shares else ()), *held),
    )
    return Block("encoder.block", operations, (bias,) if first and shares else (), returned=True)


def _decoder(m: ModelSpec, wiring: Wiring, cross_wiring: Wiring, first: bool, shares: bool) -> Block:
    """A decoder block. The biases for the encoder's tokens are all 0; under checkpointing they require a gradient."""
    name, held = "layer.1", ("probs.cross",) if wiring.backend == "eager" else ()
    self_bias, biases = "decoder_bias", _cross_biases(wiring, cross_wiring)
    cross_bias, *uneven = biases
    whole, padded = Tensor(cross_bias, "a s s_even" if uneven else "a s s", "=q"), Tensor("", "a s s_uneven", "=q")
    zeros = Op(
        cross_bias,
        ("q",),
        (whole, *(padded._replace(name=other) for other in uneven)),
        gradient="none",
        requires_gradient=wiring.checkpoints,
        source=f"{_SOURCE} T5Attention.forward",
    )
    zero_bias, own = (zeros,) if first else (), () if shares else biases
    cross = _attention(
        m, cross_wiring, f"{name}.EncDecAttention", "n2", "co", cross_bias, "cross_mask", "encoded", zero_bias, own
    )
    before = (*_self_attention(m, wiring, self_bias, "mask", first, shares), *norm(f"{name}.layer_norm", "x1", "n2"))
    after = (
        ops.release_names("probs") if wiring.backend == "eager" else ops.release_names("x1"),
        ops.add(f"{name}.residual", "x1", "co", "x2.sum", "b s h"),
        ops.release_names("n2"),
        *_clamped(f"{name}.clamp", "x2.sum", "x2"),
        *_mlp(m, "layer.2", "x2", "y"),
        ops.release_names(*((self_bias, *biases) if shares else ()), *held),
    )
    operations = (
        *decoding(before, wiring),
        *attend_to_encoder(cross, wiring, "co", *(biases if shares else ())),
        *decoding(after, wiring),
    )
    return Block("decoder.block", operations, (self_bias, *biases) if first and shares else (), returned=True)


BUILDERS = {"mt5": t5, "t5": t5, "umt5": partial(t5, shares_bias=False)}
