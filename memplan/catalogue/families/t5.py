"""T5: RMSNorm without a cast of its input, positions as a bias that all layers of a stack add to their scores."""

from __future__ import annotations

from collections.abc import Mapping

from memplan.catalogue.attention.attention import attention
from memplan.catalogue.decoder.encoder_decoder import (
    MASK,
    SOURCES,
    cached_across,
    crossing,
    decoding,
    found,
    ids_of_labels,
    left,
)
from memplan.catalogue.decoder.frame import masks
from memplan.catalogue.decoder.task_heads import decoder, labels_of, language_model_loss
from memplan.catalogue.decoder.windows import renamed
from memplan.catalogue.families.bert import eager, projections
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.activations import dropped, drops, gelu_new, relu
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Run, Scratch, Stack, Tensor, Weight
from memplan.models.model import ModelSpec

_SOURCE = "transformers 5.24 models/t5/modeling_t5.py"
_SORTED = ("ids", "order", "original order", "counts", "starts")  # of pairs of tokens, above 3072


def t5(m: ModelSpec, wiring: Wiring) -> Stack:
    """The head of a model that ties it scales what it is given; Flan-T5's, with a weight of its own, does not."""
    whole = wiring._replace(causal=False, caching=False, decodes=False)
    own = wiring._replace(padded=False)  # of labels no mask is made
    across = whole._replace(caching=wiring.caching)
    tied = "shared.weight" if m.tie_word_embeddings else ""
    drop = drops(m, "dropout_rate")
    last = (
        *norm("decoder.final_layer_norm", "x", "normed"),
        ops.leave("x"),
        *dropped("decoder.dropout", "normed", "returned", "b s h", drop),
        *((ops.scale("scale", "returned", "n", "b s h"),) if tied else (ops.view("last", "returned", "n", "b s h"),)),
        ops.leave("decoder.tokens", *_masks(own, "mask"), *_masks(whole, "cross_mask"), "decoder_bias", "cross_bias"),
    )
    encoder = (Run((_encoder(m, whole, True),), "L1"), Run((_encoder(m, whole, False),), "L2"))
    first, later = (_decoder(m, own, across, place) for place in (True, False))
    after = (
        *decoding(last, wiring),
        decoder("lm_head", "n", tied, tokens="s" if wiring.part else "t"),
        *((ops.leave("returned"),) if wiring.part else ()),
    )
    numbers = m.axes()
    if wiring.part == "encoder":
        names = ("encoded.normed", "encoded")
        last = left(_encoded(m, whole), names, "ids", "attention_mask", wiring.beams)
        return Stack(_before(m, whole), _there(encoder, numbers), last)
    made = _decoder_before(m, own, whole)
    if wiring.part:
        return Stack(_alone(made), _there((Run((first,), "D1"), Run((later,), "D2")), numbers), after)
    between = (*_encoded(m, whole), ids_of_labels(), *made)
    runs = (*encoder, Run((first,), "D1", between), Run((later,), "D2"))
    loss = (*language_model_loss("t"), ops.leave("decoder_ids", "encoded", "returned", "n"))
    return Stack(_before(m, whole), _there(runs, numbers), after, loss)


def _there(runs: tuple[Run, ...], numbers: Mapping[str, int]) -> tuple[Run, ...]:
    return tuple(run for run in runs if numbers[run.times])


def _masks(wiring: Wiring, name: str) -> tuple[str, ...]:
    return (name,) if wiring.has_mask() else ()


def norm(name: str, x: str, y: str) -> tuple[Op, ...]:
    return ops.rms_norm(name, x, y, "b s h", "h", of_x=True)


def _embedded(name: str, ids: str, y: str) -> Op:
    """The table is one for the encoder, the decoder and a tied head."""
    op = ops.embedding(name, ids, y, "v", "h")
    w = op.weights[0]._replace(name="shared.weight")
    return op._replace(weights=(w,), writes=(Tensor(y, "b s h", f"={w.name}"),), keeps=(Keep(ids, w.name),))


def _bias(name: str, y: str, keys: str = "s") -> tuple[Op, ...]:
    """A number a head for every distance of two tokens: the first block makes it, and all of its stack add it."""
    w = Weight(f"{name}.relative_attention_bias.weight", "buckets a", "embedding", rows=1)
    wide, distances, places = Tensor("distances", f"s {keys}", "int64"), f"{y}.distances", (f"{y}.rows", f"{y}.columns")
    steps = ("signs", "absolute", "large", "largest")[: 4 if y == "encoder_bias" else 3]
    source = f"{_SOURCE} T5Attention.compute_bias, _relative_position_bucket"
    return (
        Op(f"{y}.rows", (), (Tensor(places[0], "s 1", "int64"),), scratch=(Tensor("arange", "s", "int64"),)),
        Op(f"{y}.columns", (), (Tensor(places[1], f"1 {keys}", "int64"),)),
        Op(distances, places, (wide._replace(name=distances),), source=source),
        Op(
            f"{y}.buckets",
            (distances,),
            (Tensor(f"{y}.buckets", f"s {keys}", "int64"),),
            scratch=(*(wide._replace(name=step) for step in steps), Tensor("small", f"s {keys}", "bool")),
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
        ops.leave(distances, *places),
    )


def _before(m: ModelSpec, wiring: Wiring) -> tuple[Op, ...]:
    names = ("ids", *(("attention_mask",) if wiring.padded or wiring.part else ()))  # generate is given one always
    shape = "prompts source" if wiring.part else "b s"
    return (
        Op("inputs", (), (*(Tensor(n, shape, "int64") for n in names), labels_of(m)), holds="step"),
        _embedded("encoder.embed_tokens", "ids", "tokens"),
        *_mask(wiring, "tokens", "encoder_mask"),
        *dropped("encoder.dropout", "tokens", "embeds", "b s h", drops(m, "dropout_rate")),
    )


def _mask(wiring: Wiring, x: str, name: str) -> tuple[Op, ...]:
    return tuple(
        op._replace(name=name, writes=tuple(t._replace(name=name) for t in op.writes)) for op in masks(wiring, x)
    )


def _encoded(m: ModelSpec, wiring: Wiring) -> tuple[Op, ...]:
    """The encoder's last norm."""
    drop = drops(m, "dropout_rate")
    return (
        *norm("encoder.final_layer_norm", "x", "encoded.normed"),
        ops.leave("x"),
        *dropped("encoder.dropout", "encoded.normed", "encoded", "b s h", drop),
        ops.leave("tokens", "encoder_bias", *_masks(wiring, "encoder_mask")),
    )


def _decoder_before(m: ModelSpec, wiring: Wiring, whole: Wiring) -> tuple[Op, ...]:
    """The decoder's embeddings and masks."""
    drop = drops(m, "dropout_rate")
    made = (
        _embedded("decoder.embed_tokens", "decoder_ids", "decoder.tokens"),
        *_mask(wiring, "decoder.tokens", "mask"),
    )
    return (
        *decoding(made, wiring),
        *crossing(_mask(whole, "decoder.tokens", "cross_mask"), wiring, "cross_mask"),
        *decoding(dropped("decoder.dropout", "decoder.tokens", "stream", "b s h", drop), wiring),
    )


def _alone(made: tuple[Op, ...]) -> tuple[Op, ...]:
    """The decoder's first operations over what the encoder has left; the sources and their mask stay beside it."""
    inputs = Op("inputs", (), (Tensor("decoder_ids", "b s", "int64"),), holds="step")
    kept = found(SOURCES, MASK, Tensor("encoded", "rows source h", "=shared.weight"))
    return (*kept, inputs, *renamed(made, {"stream": "embeds"}))


def _attention(
    m: ModelSpec,
    wiring: Wiring,
    name: str,
    x: str,
    y: str,
    bias: str,
    mask: str,
    states: str = "",
    made: tuple[Op, ...] = (),
) -> tuple[Op, ...]:
    """`bias`, which is `made` here or in the first block, is added to the scores, and `mask` where there is one.
    `states`: whose keys and values they are."""
    drop, masked = drops(m, "dropout_rate"), wiring.has_mask()
    n, crosses = f"{name}.attention", bool(states)
    caching = wiring.caching
    plain = wiring = wiring._replace(caching=False)
    if wiring.backend == "eager":
        kernel = eager(n, drop, (bias, *((mask,) if masked else ())), wiring.decodes, caching)
    else:  # flash attention adds nothing to the scores
        plain = wiring._replace(backend="efficient", masked="efficient", padded=True, drops=drop)
        rows = "b a s" if wiring.padded else "a s"
        padded = f"{rows} s_uneven{8 * (crosses and not masked) or ''}"  # the other of two, where there are two
        triangle = wiring.causal and not (masked or wiring.decodes)
        given = _added(n, bias, mask if masked else "", f"{rows} s", triangle, crosses)
        each = not (wiring.single or wiring.padded)  # of several sequences, none of which has a mask of its own
        kernel = tuple(
            new
            for op in attention(n, "q", "k", "v", "o", plain, False)
            for new in (given if op.name == f"{n}.mask" else (_with_bias(op, padded, each) if op.name == n else (op,)))
        )
    projected = projections(name, x, plain, ("q", "k", "v"), bias=False)
    if wiring.crossed and crosses:
        projected = tuple(op for op in projected if op.writes[0].name[0] == "q")
    if caching:
        own = (Op(f"{n}.cache", ("k", "v"), caches="kv"),)
        made = (*(cached_across(n, "q", wiring.crossed) if crosses else own), *made)
    seen = (Op(f"{name}.past_seen_tokens", (), (Tensor("past_seen_tokens", "", "int64"),), source=_SOURCE),)
    return (
        *(seen if caching and wiring.static else ()),
        *(
            op._replace(reads=(states,), keeps=_of(op.keeps, x, states))
            if states and op.name[-2:] in (".k", ".v")
            else op
            for op in projected
        ),
        *made,
        *kernel,
        ops.linear(f"{name}.o", "o", f"{y}.whole", "h", "a d", "attention"),
        ops.leave("q", "k", "v", "o", *(("past_seen_tokens",) if caching and wiring.static else ())),
        *dropped(f"{name}.dropout", f"{y}.whole", y, "b s h", drop),
    )


def _of(keeps: tuple[Keep, ...], x: str, states: str) -> tuple[Keep, ...]:
    return tuple(k._replace(what=states if k.what == x else k.what, of=states if k.of == x else k.of) for k in keeps)


def _added(n: str, bias: str, mask: str, rows: str, triangle: bool, crosses: bool) -> tuple[Op, ...]:
    """What torch's attention is given to add: the bias laid out anew, the least number where a mask hides a token.

    The bias lies with its heads innermost, but the zeros of the encoder's tokens, and what is chosen of it lies so too.
    Where its rows are no multiple of 8 the kernel pads them in another tensor. Source: transformers 5.24
    integrations/sdpa_attention.py create_position_bias_mask.
    """
    if mask or triangle:
        hidden = f"{n}.hidden"
        least = Tensor("least", "", f"={bias}")
        seen = () if mask else (Op(f"{n}.triangle", (), (Tensor(hidden, "s s", "bool"),)),)
        told, chosen = mask or hidden, "bias.added" if crosses else "bias.chosen"
        where = Op(
            f"{n}.where",
            (bias, told),
            (Tensor(chosen, f"{rows}8" if crosses else rows, f"={bias}"),),
            (),
            (Keep(told, bias),),
            scratch=(least,),
            source=f"{ops.DERIVATIVES}: where",
        )
        laid = () if crosses else (ops.copy(f"{n}.contiguous_bias", chosen, "bias.added", f"{rows}8"),)
        made: tuple[Op, ...] = (*seen, where, *laid)
    elif crosses:
        made = (ops.view(f"{n}.added", bias, "bias.added", "a s s8"),)
    else:
        made = (ops.copy(f"{n}.contiguous_bias", bias, "bias.added", "a s s8"),)
    lowered = Op(
        f"{n}.bias.autocast",
        ("bias.added",),
        (Tensor("o.bias", made[-1].writes[0].shape),),
        cast=True,
        autocast="lower",
    )
    return (*made, lowered)


def _with_bias(op: Op, padded: str, each: bool) -> tuple[Op, ...]:
    """The kernel with a bias that trains. `padded` is the shape of the bias before or after the kernel pads it.

    If sequences share the bias (`each`), the kernel makes its gradient for each of them, and then they are summed.
    """
    bias = "o.bias.each" if each else "o.bias"
    expand = (ops.view(f"{op.name}.expand_bias", "o.bias", bias, "b a s s8", gradient="new"),) if each else ()
    reads = tuple(bias if name == "o.bias" else name for name in op.reads)
    keeps = tuple(k._replace(what=bias) if k.what == "o.bias" else k for k in op.keeps)
    kept = tuple(k._replace(of=bias) for k in keeps if k.of == op.reads[0])
    scratch = (Tensor("bias, as it is padded", padded, "=o.bias"),)
    return (*expand, op._replace(reads=reads, keeps=(*keeps, *kept), scratch=scratch))


def _mlp(m: ModelSpec, name: str, x: str, y: str) -> tuple[Op, ...]:
    """wo is given what its weight's dtype is, which the norm has already."""
    kind = str(m.get("feed_forward_proj", "relu"))
    gated, act = kind.startswith("gated-"), "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-")
    inner, shape, drop = f"{name}.DenseReluDense", "b s f", drops(m, "dropout_rate")
    one, two = ("wi_0", "wi_1") if gated else ("wi", "")
    product = "act" if not gated else "product"
    if act == "gelu_new":
        made = gelu_new(f"{inner}.act", "gate", "act", shape)
    elif act == "relu":
        made = (relu(f"{inner}.act", "gate", "act", shape),)
    else:
        made = (ops.activation(f"{inner}.act", "gate", "act", shape),)
    return (
        *norm(f"{name}.layer_norm", x, "n.ff"),
        ops.linear(f"{inner}.{one}", "n.ff", "gate", "f", "h", "mlp"),
        *made,
        *(
            (
                ops.linear(f"{inner}.{two}", "n.ff", "up", "f", "h", "mlp"),
                ops.mul(f"{inner}.product", "act", "up", "product", shape),
            )
            if gated
            else ()
        ),
        *dropped(f"{inner}.dropout", product, "dropped.ff", shape, drop),
        ops.cast(f"{inner}.cast", "dropped.ff", "wide.ff", shape, "=n.ff"),
        ops.linear(f"{inner}.wo", "wide.ff", "mo.whole", "h", "f", "mlp"),
        ops.leave("n.ff", *(("act", "up") if gated else ())),
        *dropped(f"{name}.dropout", "mo.whole", "mo", "b s h", drop),
        ops.add(f"{name}.residual", x, "mo", y, "b s h"),
    )


def _self(m: ModelSpec, wiring: Wiring, bias: str, mask: str, first: bool) -> tuple[Op, ...]:
    name = "layer.0"
    # a cache of fixed size has room for more keys, of which attention is given a part where it has no mask
    keys = "kv_static" if wiring.static else "kv" if wiring.decodes else "s"
    made = _bias(f"{name}.SelfAttention", bias, keys) if first else ()
    return (
        *norm(f"{name}.layer_norm", "x", "n1"),
        *_attention(m, wiring, f"{name}.SelfAttention", "n1", "ao", bias, mask, made=made),
        ops.add(f"{name}.residual", "x", "ao", "x1", "b s h"),
        ops.leave("n1"),
    )


def _encoder(m: ModelSpec, wiring: Wiring, first: bool) -> Block:
    held, bias = ("probs",) if wiring.backend == "eager" else (), "encoder_bias"
    made = (*_self(m, wiring, bias, "encoder_mask", first), *_mlp(m, "layer.1", "x1", "y"), ops.leave(bias, *held))
    return Block("encoder.block", made, (bias,) if first else (), returned=True)


def _decoder(m: ModelSpec, wiring: Wiring, whole: Wiring, first: bool) -> Block:
    """The biases of the encoder's tokens are all 0; under checkpointing they ask for a gradient."""
    name, held = "layer.1", ("probs.cross",) if wiring.backend == "eager" else ()
    own, across = "decoder_bias", "cross_bias"
    zeros = Op(
        across,
        ("q",),
        (Tensor(across, "a s s", "=q"),),
        gradient="none",
        asks=wiring.checkpoints,
        source=f"{_SOURCE} T5Attention.forward",
    )
    given = (zeros,) if first else ()
    cross = _attention(m, whole, f"{name}.EncDecAttention", "n2", "co", across, "cross_mask", "encoded", given)
    before = (*_self(m, wiring, own, "mask", first), *norm(f"{name}.layer_norm", "x1", "n2"))
    after = (
        ops.leave("probs") if wiring.backend == "eager" else ops.leave("x1"),
        ops.add(f"{name}.residual", "x1", "co", "x2", "b s h"),
        ops.leave("n2"),
        *_mlp(m, "layer.2", "x2", "y"),
        ops.leave(own, across, *held),
    )
    made = (*decoding(before, wiring), *crossing(cross, wiring, "co", across), *decoding(after, wiring))
    return Block("decoder.block", made, (own, across) if first else (), returned=True)


BUILDERS = {"t5": t5}
