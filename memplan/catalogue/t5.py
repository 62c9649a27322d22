"""T5: RMSNorm without a cast of its input, positions as a bias that all layers of a stack add to their scores."""

from __future__ import annotations

from memplan.catalogue import ops
from memplan.catalogue.attention import Wiring, attention
from memplan.catalogue.bert import eager, projections
from memplan.catalogue.gpt import dropped, drops, gelu_new, relu
from memplan.catalogue.heads import decoder, labels_of, language_model_loss
from memplan.catalogue.llama import masks
from memplan.catalogue.seq2seq import crossing, decoding
from memplan.ir import Block, Keep, Op, Run, Scratch, Stack, Tensor, Weight
from memplan.models import ModelSpec

_SOURCE = "transformers 5.24 models/t5/modeling_t5.py"
_SORTED = ("ids", "order", "original order", "counts", "starts")  # of pairs of tokens, above 3072


def t5(m: ModelSpec, wiring: Wiring) -> Stack:
    """The head of a model that ties it scales what it is given; Flan-T5's, with a weight of its own, does not."""
    whole, wiring = wiring._replace(causal=False), wiring._replace(padded=False)  # of labels no mask is made
    tied = "shared.weight" if m.tie_word_embeddings else ""
    drop = drops(m, "dropout_rate")
    last = (
        *norm("decoder.final_layer_norm", "x", "normed"),
        ops.leave("x"),
        *dropped("decoder.dropout", "normed", "returned", "b s h", drop),
        *((ops.scale("scale", "returned", "n", "b s h"),) if tied else (ops.view("last", "returned", "n", "b s h"),)),
        ops.leave(
            "decoder.tokens", *_masks(wiring, "mask"), *_masks(whole, "cross_mask"), "decoder_bias", "cross_bias"
        ),
    )
    runs = (
        Run((_encoder(m, whole, True),), "L1"),
        Run((_encoder(m, whole, False),), "L2"),
        Run((_decoder(m, wiring, whole, True),), "D1", _between(m, wiring, whole)),
        Run((_decoder(m, wiring, whole, False),), "D2"),
    )
    after = (*decoding(last), decoder("lm_head", "n", tied, tokens="t"))
    loss = (*language_model_loss("t"), ops.leave("decoder_ids", "encoded", "returned", "n"))
    return Stack(_before(m, whole), tuple(run for run in runs if m.axes()[run.times]), after, loss)


def _masks(wiring: Wiring, name: str) -> tuple[str, ...]:
    return (name,) if wiring.has_mask() else ()


def norm(name: str, x: str, y: str) -> tuple[Op, ...]:
    return ops.rms_norm(name, x, y, "b s h", "h", of_x=True)


def _embedded(name: str, ids: str, y: str) -> Op:
    """The table is one for the encoder, the decoder and a tied head."""
    op = ops.embedding(name, ids, y, "v", "h")
    w = op.weights[0]._replace(name="shared.weight")
    return op._replace(weights=(w,), writes=(Tensor(y, "b s h", f"={w.name}"),), keeps=(Keep(ids, w.name),))


def _bias(name: str, y: str) -> tuple[Op, ...]:
    """A number a head for every distance of two tokens: the first block makes it, and all of its stack add it."""
    w = Weight(f"{name}.relative_attention_bias.weight", "buckets a", "embedding", rows=1)
    wide = Tensor("distances", "s s", "int64")
    steps = ("distances", "signs", "absolute", "large", "largest")[: 5 if y == "encoder_bias" else 4]
    return (
        Op(
            f"{y}.buckets",
            (),
            (Tensor(f"{y}.buckets", "s s", "int64"),),
            scratch=(*(wide._replace(name=step) for step in steps), Tensor("small", "s s", "bool")),
            source=f"{_SOURCE} _relative_position_bucket",
        ),
        Op(
            f"{y}.embedding",
            (f"{y}.buckets",),
            (Tensor(y, "s s a", f"={w.name}"),),
            (w,),
            (Keep(f"{y}.buckets", w.name),),
            scratch_back=(
                *(Scratch(Tensor(part, "pairs", "int64")) for part in _SORTED),
                Scratch(Tensor("segments", "pair_segments", "int64")),
                Scratch(Tensor("partial sums", "pair_segments a32", "fp32")),
            ),
            source="torch 2.13 aten/src/ATen/native/cuda/EmbeddingBackwardKernel.cu",
        ),
    )


def _before(m: ModelSpec, wiring: Wiring) -> tuple[Op, ...]:
    names = ("ids", *(("attention_mask",) if wiring.padded else ()))
    return (
        Op("inputs", (), (*(Tensor(n, "b s", "int64") for n in names), labels_of(m)), holds="step"),
        _embedded("encoder.embed_tokens", "ids", "tokens"),
        *_mask(wiring, "tokens", "encoder_mask"),
        *dropped("encoder.dropout", "tokens", "embeds", "b s h", drops(m, "dropout_rate")),
    )


def _mask(wiring: Wiring, x: str, name: str) -> tuple[Op, ...]:
    return tuple(
        op._replace(name=name, writes=tuple(t._replace(name=name) for t in op.writes)) for op in masks(wiring, x)
    )


def _between(m: ModelSpec, wiring: Wiring, whole: Wiring) -> tuple[Op, ...]:
    """The encoder's last norm; the decoder's ids, embeddings and masks."""
    drop = drops(m, "dropout_rate")
    made = (
        Op(
            "decoder_input_ids",
            ("labels",),
            (Tensor("decoder_ids", "b s", "int64"),),
            scratch=(Tensor("clone", "b s", "int64"), Tensor("ignored", "b s", "bool")),
        ),
        _embedded("decoder.embed_tokens", "decoder_ids", "decoder.tokens"),
        *_mask(wiring, "decoder.tokens", "mask"),
    )
    return (
        *norm("encoder.final_layer_norm", "x", "encoded.normed"),
        ops.leave("x"),
        *dropped("encoder.dropout", "encoded.normed", "encoded", "b s h", drop),
        ops.leave("tokens", "encoder_bias", *_masks(whole, "encoder_mask")),
        *decoding(made),
        *crossing(_mask(whole, "decoder.tokens", "cross_mask"), "cross_mask"),
        *decoding(dropped("decoder.dropout", "decoder.tokens", "stream", "b s h", drop)),
    )


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
    plain = wiring
    if wiring.backend == "eager":
        kernel = eager(n, drop, (bias, *((mask,) if masked else ())))
    else:  # flash attention adds nothing to the scores
        plain = wiring._replace(backend="efficient", masked="efficient", padded=True, drops=drop)
        given = _added(n, bias, mask if masked else "", wiring.causal and not masked, crosses)
        kernel = tuple(
            new
            for op in attention(n, "q", "k", "v", "o", plain, False)
            for new in (given if op.name == f"{n}.mask" else (_with_bias(op) if op.name == n else op,))
        )
    projected = projections(name, x, plain, ("q", "k", "v"), bias=False)
    return (
        *(
            op._replace(reads=(states,), keeps=_of(op.keeps, x, states))
            if states and op.name[-2:] in (".k", ".v")
            else op
            for op in projected
        ),
        *made,
        *kernel,
        ops.linear(f"{name}.o", "o", f"{y}.whole", "h", "a d", "attention"),
        ops.leave("q", "k", "v", "o"),
        *dropped(f"{name}.dropout", f"{y}.whole", y, "b s h", drop),
    )


def _of(keeps: tuple[Keep, ...], x: str, states: str) -> tuple[Keep, ...]:
    return tuple(k._replace(what=states if k.what == x else k.what, of=states if k.of == x else k.of) for k in keeps)


def _added(n: str, bias: str, mask: str, triangle: bool, crosses: bool) -> tuple[Op, ...]:
    """What torch's attention is given to add: the bias laid out anew, the least number where a mask hides a token.

    Source: transformers 5.24 integrations/sdpa_attention.py create_position_bias_mask.
    """
    if mask or triangle:
        hidden = f"{n}.hidden"
        least = Tensor("least", "", f"={bias}")
        rows = "b a s s8" if mask else "a s s8"
        seen = () if mask else (Op(f"{n}.triangle", (), (Tensor(hidden, "s s", "bool"),)),)
        told = mask or hidden
        where = Op(
            f"{n}.where",
            (bias, told),
            (Tensor("bias.added", rows, f"={bias}"),),
            (),
            (Keep(told, bias),),
            scratch=(least,),
            source=f"{ops.DERIVATIVES}: where",
        )
        made: tuple[Op, ...] = (*seen, where)
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


def _with_bias(op: Op) -> Op:
    """The kernel, which makes the bias's gradient for every sequence, whose sum it is."""
    kept = tuple(k._replace(of="o.bias") for k in op.keeps if k.of == op.reads[0])
    each = Scratch(Tensor("gradient of the bias", "b a s s8", "=o.bias"), "o.bias")
    return op._replace(keeps=(*op.keeps, *kept), scratch_back=(*op.scratch_back, each))


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
    made = _bias(f"{name}.SelfAttention", bias) if first else ()
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
    own, crossed = "decoder_bias", "cross_bias"
    zeros = Op(
        crossed,
        ("q",),
        (Tensor(crossed, "a s s", "=q"),),
        gradient="none",
        asks=wiring.checkpoints,
        source=f"{_SOURCE} T5Attention.forward",
    )
    given = (zeros,) if first else ()
    cross = _attention(m, whole, f"{name}.EncDecAttention", "n2", "co", crossed, "cross_mask", "encoded", given)
    before = (*_self(m, wiring, own, "mask", first), *norm(f"{name}.layer_norm", "x1", "n2"))
    after = (
        ops.leave("probs") if wiring.backend == "eager" else ops.leave("x1"),
        ops.add(f"{name}.residual", "x1", "co", "x2", "b s h"),
        ops.leave("n2"),
        *_mlp(m, "layer.2", "x2", "y"),
        ops.leave(own, crossed, *held),
    )
    made = (*decoding(before), *crossing(cross, "co", crossed), *decoding(after))
    return Block("decoder.block", made, (own, crossed) if first else (), returned=True)


BUILDERS = {"t5": t5}
