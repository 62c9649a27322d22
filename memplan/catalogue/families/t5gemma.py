"""T5Gemma: an encoder and a decoder with Gemma 2's layers, and attention to the encoder's output between the branches.

Source: transformers 5.24 models/t5gemma/modeling_t5gemma.py.
"""

from __future__ import annotations

from memplan.catalogue.attention.attention import KEYS, QUERIES, attention, mask_name
from memplan.catalogue.decoder.attention import Attend, llama_attention
from memplan.catalogue.decoder.encoder_decoder import attend_to_encoder, decoding, ids_of_labels
from memplan.catalogue.decoder.frame import BOTH, masks, returned, rotary_tables, table_names
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.decoder.norms import gemma_norm
from memplan.catalogue.decoder.task_heads import labels_of, vocabulary_projection
from memplan.catalogue.families.gemma import capped_attention, capped_logits
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.losses import nll
from memplan.catalogue.kernels.positions import positions
from memplan.catalogue.kernels.rewriting import renamed
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Op, Run, Stack, Tensor
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_ENCODER, _DECODER, _CROSS = "model.encoder", "model.decoder", "mask.across"
_MASKS = tuple(mask_name(sliding) for sliding in BOTH)
_HELD = ("tokens", "positions", "given", *table_names(), *_MASKS)  # names of a half's frame


def t5gemma(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build the model for conditional generation. Attention is eager, which soft-caps the scores."""
    wiring = wiring._replace(backend="eager", masked="eager", caching=False)
    own = wiring._replace(causal=False, padded=True)  # a mask of the ids that are no padding is made, if none is given
    causal, across = wiring._replace(padded=True), wiring._replace(causal=False)
    names = ("ids", *(("attention_mask",) if wiring.padded else ()))
    inputs = Op("inputs", (), (*(Tensor(n, "b s", "int64") for n in names), labels_of(m)), holds="step")
    cross_mask = renamed(attend_to_encoder(masks(across, "tokens"), wiring), {"mask.cross": _CROSS})
    stream = {"embeds": "stream", **{name: f"target.{name}" for name in (*_HELD, "angles", "both", "cos32", "sin32")}}
    begun = renamed(decoding(_embedded(_DECODER, "decoder_ids", causal, given=False), wiring), stream)
    output = (
        *gemma_norm(f"{_ENCODER}.norm", "x", "encoded", "b s h", "h"),
        ops.view("encoder_outputs", "encoded", "encoder_outputs", "b s h")._replace(holds="forward"),
        ops.release_names("x", *(name for name in _HELD if name != "given" or not wiring.padded)),
    )
    tied = f"{_DECODER}.embed_tokens.weight" if m.tie_word_embeddings else ""
    frame = ops.release_names("x", *(stream[name] for name in _HELD))
    head = vocabulary_projection("lm_head.out_proj", "normed", tied, tokens="t")
    after = (
        *decoding((*gemma_norm(f"{_DECODER}.norm", "x", "normed", "b s h", "h"), frame), wiring),
        ops.release_names(*(t.name for op in cross_mask for t in op.writes)),
        head,
    )
    if m.get("final_logit_softcapping", 0.0) > 0:
        after = tuple(decoding(capped_logits(after), wiring))
    loss = (
        ops.cast("loss.float", "logits", "logits32", "b t v", "fp32"),
        *nll("loss", "logits32", "log_probs", "labels", "b t v"),
        ops.release_names("decoder_ids", "encoded", "normed", "logits"),
    )
    first, *rest = ((tuple(_decoder(m, causal, across, stream, a) for a in r.pattern), r) for r in m.runs)
    encoder = tuple(Run(tuple(_encoder(m, own, layer) for layer in r.pattern), r.times) for r in m.runs)
    between = (*output, *begun, *cross_mask)
    decoder = (Run(first[0], _own(first[1].times), between), *(Run(blocks, _own(r.times)) for blocks, r in rest))
    before = (inputs, ids_of_labels(), *_embedded(_ENCODER, "ids", own, given=wiring.padded))
    return Stack(before, (*encoder, *decoder), after, loss)


def _own(times: str) -> str:
    return times.replace("L", "D")


def _embedded(half: str, ids: str, wiring: Wiring, given: bool) -> tuple[Op, ...]:
    """Scaled embeddings, masks and the rotary table. A 2-D mask is made, unless it is given."""
    angles, *table = rotary_tables()
    buffers = tuple(w._replace(name=w.name.replace("model.", f"{half}.")) for w in angles.weights)
    made = Op("given", (ids,), (Tensor("given", "b s", "int64"),), scratch=(Tensor("not padding", "b s", "bool"),))
    return (
        ops.embedding(f"{half}.embed_tokens", ids, "tokens", "v", "h"),
        positions(),
        *(() if given else (made._replace(gradient="none"),)),
        *(op for sliding in BOTH for op in masks(wiring, "tokens", sliding)),
        ops.scale(f"{half}.normalizer", "tokens", "embeds", "b s h"),
        angles._replace(weights=buffers),
        *table,
    )


def _branch(norms: str, x: str, n: str, inner: tuple[Op, ...], o: str, y: str) -> tuple[Op, ...]:
    """A norm, a branch from n to o, a norm of what it returns, and the sum."""
    return (
        *gemma_norm(f"pre_{norms}_layernorm", x, n, "b s h", "h"),
        *inner,
        *gemma_norm(f"post_{norms}_layernorm", o, f"{o}.normed", "b s h", "h"),
        ops.release_names(o),
        ops.add(f"{norms}.residual", x, f"{o}.normed", y, "b s h"),
        ops.release_names(f"{o}.normed"),
    )


def _self_attention(m: ModelSpec, wiring: Wiring, layer: Layer) -> tuple[Op, ...]:
    bias, attend = m.get("attention_bias", False), _attend(m)
    heads = llama_attention(m, wiring, "n1", "ao", bias=bias, out_bias=bias, sliding=layer.sliding, attend=attend)
    return _branch("self_attn", "x", "n1", heads, "ao", "x1")


def _attend(m: ModelSpec) -> Attend:
    return capped_attention if m.get("attn_logit_softcapping", 0.0) > 0 else attention


def _encoder(m: ModelSpec, wiring: Wiring, layer: Layer) -> Block:
    operations = (
        *_self_attention(m, wiring, layer),
        *_branch("feedforward", "x1", "n2", gated_mlp("n2", "mo"), "mo", "y"),
        ops.release_names("x1", "positions", *returned(wiring)),
    )
    return Block(f"{_ENCODER}.layers", operations)


def _decoder(m: ModelSpec, wiring: Wiring, across: Wiring, stream: dict[str, str], layer: Layer) -> Block:
    name, bias, grouped = "cross_attn", m.get("attention_bias", False), m.num_key_value_heads != m.num_attention_heads
    cross = (
        ops.linear(f"{name}.q_proj", "n2", "q0", "a d", "h", "attention", bias),
        ops.view(f"{name}.q_heads", "q0", "q", QUERIES, "new"),
        ops.linear(f"{name}.k_proj", "encoded", "k0", "k d", "h", "attention", bias),
        ops.view(f"{name}.k_heads", "k0", "k", KEYS, "new"),
        ops.linear(f"{name}.v_proj", "encoded", "v", "k d", "h", "attention", bias),
        *_attend(m)(f"{name}.attention", "q", "k", "v", "o", across, grouped, False, _CROSS),
        ops.linear(f"{name}.o_proj", "o", "co", "h", "a d", "attention", bias),
        ops.release_names("q", "k", "v", "o", "n2"),
    )
    before, after = _split(_branch("cross_attn", "x1", "n2", (Op("cross"),), "co", "x2"))
    rest = (
        *after,
        *_branch("feedforward", "x2", "n3", gated_mlp("n3", "mo"), "mo", "y"),
        ops.release_names("x1", "x2", "positions", *returned(wiring), "probs.cross"),
    )
    operations = (
        *decoding((*_self_attention(m, wiring, layer), *before), wiring),
        *attend_to_encoder(cross, wiring, "co"),
        *decoding(rest, wiring),
    )
    return Block(f"{_DECODER}.layers", renamed(operations, {name: stream[name] for name in _HELD}))


def _split(branch: tuple[Op, ...]) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    """The operations before and after the branch's own."""
    at = next(i for i, op in enumerate(branch) if op.name == "cross")
    return branch[:at], branch[at + 1 :]


BUILDERS = {"t5gemma": t5gemma}
