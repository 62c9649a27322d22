"""Decoders with rotary positions and an MLP without a gate: GPT-NeoX (Pythia), Phi, Nemotron, Arcee and others."""

from __future__ import annotations

from memplan.catalogue.attention.attention import KEYS, QUERIES, keys_and_values
from memplan.catalogue.decoder.attention import llama_attention, rope
from memplan.catalogue.decoder.decoder import Decoder, decoder
from memplan.catalogue.decoder.frame import after, before, decoder_block, returned, runs
from memplan.catalogue.decoder.norms import layer_norm, rms_norm_without_weight
from memplan.catalogue.decoder.rotation import NEOX, heads_first, partly_rotated
from memplan.catalogue.families.gemma import capped_logits, norm_heads
from memplan.catalogue.families.gpt import mlp, with_causal_buffers
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.activations import dropped, drops
from memplan.catalogue.kernels.rewriting import renamed
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Op, Run, Stack, Tensor
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_ARCEE = Decoder(bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias")


def embedded(name: str, drop: bool) -> tuple[Op, ...]:
    tokens = "tokens" if drop else "embeds"
    embedding = ops.embedding(name, "ids", tokens, "v", "h")
    return (embedding, ops.dropout("embedding_dropout", tokens, "embeds", "b s h")) if drop else (embedding,)


def _projections(name: str, outputs: tuple[str, str, str], bias: bool) -> tuple[Op, ...]:
    """q, k and v as heads. The gradients of q and k are stored head by head, and are copied."""
    return tuple(
        op
        for t, y, heads, gradient in zip("qkv", outputs, "akk", ("new", "new", "same"), strict=True)
        for op in (
            ops.linear(f"{name}.{t}_proj", "n1", f"{t}0", f"{heads} d", "h", "attention", bias),
            ops.view(f"{name}.{t}_heads", f"{t}0", y, f"b s {heads} d", gradient),
        )
    )


def gpt_neox(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build GPT-NeoX: q, k and v of a head side by side in one projection; attention and MLP in parallel or in
    sequence.
    """
    drop, bias = drops(m, "hidden_dropout"), m.get("attention_bias", True)
    heads = (
        ops.linear("attention.query_key_value", "n1", "qkv", "3 a d", "h", "attention", bias),
        ops.view("attention.heads", "qkv", "qkv.heads", "b s a 3 d", gradient="new"),
        ops.split("attention.chunk", "qkv.heads", (Tensor("q1", QUERIES), Tensor("k1", QUERIES), Tensor("v", QUERIES))),
        *partly_rotated(m, "attention.rope", "q1", "k1", NEOX),
        ops.release_names("q1", "k1"),
        *heads_first("attention.attention", "q", "k", "v", "o", wiring, False),
        ops.linear("attention.dense", "o", "ao.whole", "h", "a d", "attention", bias),
        ops.release_names("qkv", "q", "k", "o", "n1"),
        *dropped("post_attention_dropout", "ao.whole", "ao", "b s h", drop),
    )
    parallel = m.get("use_parallel_residual", True)
    layers = ("dense_h_to_4h", "dense_4h_to_h")
    feed = (
        *layer_norm("post_attention_layernorm", "x" if parallel else "x1", "n2", "b s h", "h"),
        *mlp(m, "n2", "mo", drop, layers),
    )
    joined = (
        (
            *feed,
            ops.add("parallel", "mo", "ao", "branches", "b s h"),
            ops.add("residual", "branches", "x", "y", "b s h"),
        )
        if parallel
        else (ops.add("residual_1", "ao", "x", "x1", "b s h"), *feed, ops.add("residual_2", "mo", "x1", "y", "b s h"))
    )
    ends = ops.release_names("mo", "ao" if parallel else "x1", "positions", *returned(wiring))
    operations = (*layer_norm("input_layernorm", "x", "n1", "b s h", "h"), *heads, *joined, ends)
    block = Block("gpt_neox.layers", with_causal_buffers(m, wiring, operations, "attention"))
    embedding, held = "gpt_neox.embed_in", "tokens" if drop else "embeds"
    last = after(m, wiring, norm=layer_norm, name="gpt_neox.final_layer_norm", embedding=embedding, held=held)
    return Stack(before(wiring, embedded=embedded(embedding, drop)), (Run((block,), "L"),), last)


def phi(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Phi: one norm for attention and MLP in parallel. The parts of q and k stay alive to the attention's end."""
    name, drop = "self_attn", drops(m, "resid_pdrop")
    normed = bool(m.get("qk_layernorm", False))
    block = Block(
        "model.layers",
        (
            *layer_norm("input_layernorm", "x", "n1", "b s h", "h"),
            *_projections(name, ("q2", "k2", "v") if normed else ("q1", "k1", "v"), True),
            *(
                op
                for t, shape in ((("q", QUERIES), ("k", KEYS)) if normed else ())
                for op in layer_norm(f"{name}.{t}_layernorm", f"{t}2", f"{t}1", shape, "d")
            ),
            *partly_rotated(m, f"{name}.rope", "q1", "k1", NEOX),
            *_attention(m, wiring),
            ops.linear(f"{name}.dense", "o", "ao.whole", "h", "a d", "attention", bias=True),
            ops.release_names("q", "k", "v", "o", "q1", "k1", "q.turned", "k.turned"),
            *dropped("resid_dropout", "ao.whole", "ao", "b s h", drop),
            *mlp(m, "n1", "mo", drop, ("fc1", "fc2")),
            ops.add("parallel", "ao", "mo", "branches", "b s h"),
            ops.add("residual", "branches", "x", "y", "b s h"),
            ops.release_names("n1"),
            ops.release_names("ao", "mo", "positions", *returned(wiring)),
        ),
    )
    return Stack(
        before(wiring, embedded=embedded("model.embed_tokens", drops(m, "embd_pdrop"))),
        (Run((block,), "L"),),
        after(m, wiring, norm=layer_norm, name="model.final_layernorm", bias=True),
    )


def _attention(m: ModelSpec, wiring: Wiring, name: str = "self_attn.attention") -> tuple[Op, ...]:
    repeated, k, v, wiring, grouped = keys_and_values(m, name, wiring)
    return (*repeated, *heads_first(name, "q", k, v, "o", wiring, grouped))


def _nemotron_attention(m: ModelSpec, wiring: Wiring, layer: Layer) -> tuple[Op, ...]:
    name, bias = "self_attn", m.get("attention_bias", False)
    return (
        *_projections(name, ("q1", "k1", "v"), bias),
        *partly_rotated(m, f"{name}.rope", "q1", "k1", NEOX),
        ops.release_names("q.turned", "k.turned"),
        ops.release_names("q1", "k1"),
        *_attention(m, wiring),
        ops.linear(f"{name}.o_proj", "o", "ao", "h", "a d", "attention", bias),
        ops.release_names("q", "k", "v", "o", "n1"),
    )


def nemotron(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Nemotron, whose LayerNorms multiply by `weight + 1`, and run in 16 bits under autocast."""

    row = Decoder(attention=_nemotron_attention, mlp_bias="mlp_bias", norm=_layer_norm_plus_one)
    return decoder(m, wiring, _without_gate(m, row))


def _without_gate(m: ModelSpec, row: Decoder, layers: tuple[str, str] = ("up_proj", "down_proj")) -> Decoder:
    """Return the row with Nemotron's MLP: an up-projection, the config's activation, a down-projection."""

    def feed(x: str, y: str, bias: bool) -> tuple[Op, ...]:
        return mlp(m, x, y, False, layers, bias=bias)

    return row._replace(mlp=feed)


def arcee(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Arcee: Llama with Nemotron's MLP."""
    return decoder(m, wiring, _without_gate(m, _ARCEE))


def jais2(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Jais 2: Arcee with LayerNorms."""
    return decoder(m, wiring, _without_gate(m, _ARCEE._replace(norm=layer_norm)))


def apertus(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Apertus: Arcee with normalised heads, and an activation with two weights."""
    row = _ARCEE._replace(
        qk_norm="each", norms=("attention_layernorm", "", "feedforward_layernorm", ""), mlp_bias=False
    )
    return decoder(m, wiring, _without_gate(m, row))


def _rope_and_norm(m: ModelSpec, name: str, q: str, k: str) -> tuple[Op, ...]:
    rotated = renamed(rope(m, name, q, k), {"q": "q.rotated", "k": "k.rotated"})
    return (*rotated, *norm_heads(name, "q.rotated", "k.rotated", "q", "k", rms_norm_without_weight))


def nanochat(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build nanochat: norms without weights, also of the embeddings and of rotated heads, and soft-capped logits."""
    row = _ARCEE._replace(rotate=_rope_and_norm, norm=rms_norm_without_weight, mlp_bias=False)
    stack = decoder(m, wiring, _without_gate(m, row, ("fc1", "fc2")))
    looked_up = renamed(stack.before, {"embeds": "looked_up"})
    last = after(m, wiring, norm=rms_norm_without_weight, held="looked_up")
    return stack._replace(
        before=(*looked_up, *rms_norm_without_weight("model.norm", "looked_up", "embeds", "b s h", "h")),
        after=capped_logits(last) if m.get("final_logit_softcapping", 0.0) > 0 else last,
    )


def _layer_norm_plus_one(name: str, x: str, y: str, shape: str, axis: str) -> tuple[Op, ...]:
    """LayerNorm with `weight + 1`, which is computed in every call and kept."""
    layer = ops.layer_norm(name, x, y, shape, axis)
    weight, bias = layer.weights
    plus = f"{y}.weight"
    keeps = tuple(
        k._replace(what=plus if k.what == weight.name else k.what, of=plus if k.of == weight.name else k.of)
        for k in layer.keeps
    )
    return (
        Op(f"{name}.plus_one", (), (Tensor(plus, axis),), (weight,), gradient="same"),
        layer._replace(reads=(x, plus), weights=(bias,), keeps=keeps, autocast="lower"),
    )


def starcoder2(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build StarCoder 2: Llama's attention with biases, and dropout after it and after the MLP."""
    bias, drop = m.get("use_bias", True), drops(m, "residual_dropout")

    def block(layer: Layer) -> Block:
        *heads, release = llama_attention(m, wiring, "n1", "ao.whole", bias=bias, out_bias=bias, sliding=layer.sliding)
        return decoder_block(
            (*heads, *dropped("residual_dropout", "ao.whole", "ao", "b s h", drop), release),
            mlp(m, "n2", "mo", drop, bias=bias),
            norm=layer_norm,
            held=returned(wiring),
        )

    sliding, embedding_drop = m.layers[0].sliding, drops(m, "embedding_dropout")
    return Stack(
        before(wiring, (sliding,), embedded=embedded("model.embed_tokens", embedding_drop)),
        runs(m, block),
        after(m, wiring, (sliding,), norm=layer_norm, held="tokens" if embedding_drop else "embeds"),
    )


BUILDERS = {
    "apertus": apertus,
    "arcee": arcee,
    "gpt_neox": gpt_neox,
    "jais2": jais2,
    "nanochat": nanochat,
    "nemotron": nemotron,
    "phi": phi,
    "starcoder2": starcoder2,
}
