"""GPT-2, GPT-BigCode, GPT-Neo, GPT-J, CodeGen: LayerNorm, biases, MLPs without a gate, positions from a table."""

from __future__ import annotations

from memplan.catalogue.attention.attention import KEYS, QUERIES, attention, cached, mask_name
from memplan.catalogue.decoder.frame import inputs, lm_head, masks, returned
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.activations import activation, dropped, drops
from memplan.catalogue.kernels.positions import positions
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Run, Stack, Tensor, Weight
from memplan.models.model import ModelSpec


def learned(m: ModelSpec, wiring: Wiring, drop: bool, name: str = "transformer") -> tuple[Op, ...]:
    """Look up tokens and learned positions, add them and make the masks: everything before the first block.

    The gradient of the positions is summed over the batch before it reaches their table.
    """
    return (
        inputs(wiring.padded),
        ops.embedding(f"{name}.wte", "ids", "tokens", "v", "h"),
        positions(),
        position_table(f"{name}.wpe", "positions", "places", f"{m.max_position_embeddings} h"),
        ops.add("add_positions", "tokens", "places", "embeds" if not drop else "summed", "b s h"),
        *masks(wiring, "tokens"),
        *((ops.dropout(f"{name}.drop", "summed", "embeds", "b s h"),) if drop else ()),
    )


def position_table(name: str, ids: str, y: str, shape: str, rows: str = "s") -> Op:
    w = Weight(f"{name}.weight", shape, "embedding", rows=1)
    return ops.lookup(name, ids, y, f"{rows} h", w)


def after(m: ModelSpec, wiring: Wiring, norm: str = "transformer.ln_f", held: tuple[str, ...] = ()) -> tuple[Op, ...]:
    mask_names = [op.name for op in masks(wiring, "embeds")]
    return (
        ops.layer_norm(norm, "x", "n", "b s h", "h"),
        ops.release_names("x", "positions", *held, *mask_names),
        lm_head("n", "transformer.wte.weight" if m.tie_word_embeddings else ""),
    )


def gpt2(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build GPT-2, whose q, k and v come from one fused projection.

    The projection's output stays alive as long as q, k or v is kept, and their gradients are concatenated. The linear
    layers are transformers' `Conv1D`, which stores its weight transposed.
    """
    stack = _stack(m, wiring, _fused_attention(m, wiring, _heads(m, wiring)), ("positions",))
    (run,) = stack.runs
    (block,) = run.blocks
    ops_ = tuple(op._replace(weights=tuple(w._replace(transposed=w.matrix) for w in op.weights)) for op in block.ops)
    ops_ = with_causal_buffers(m, wiring, ops_, "attn")
    return stack._replace(runs=(run._replace(blocks=(block._replace(ops=ops_),)),))


def with_causal_buffers(m: ModelSpec, wiring: Wiring, operations: tuple[Op, ...], name: str) -> tuple[Op, ...]:
    """Add the causal mask buffer that every layer holds in older versions of transformers, used or not.

    The buffer is boolean, with a row and a column for every position the model supports.
    """
    if not wiring.causal_buffers:
        return operations
    longest = m.max_position_embeddings or 2048  # GPT-NeoX's default
    buffers = (
        Weight(f"{name}.bias", f"{longest} {longest}", "buffer", "bool", False),
        Weight(f"{name}.masked_bias", "", "buffer", "fp32", False),
    )
    first, *others = operations
    return (first._replace(weights=(*first.weights, *buffers)), *others)


def _heads(m: ModelSpec, wiring: Wiring, wide: bool = False) -> tuple[Op, ...]:
    """Attention from q, k and v to o, with dropout on the probabilities."""
    name, drop = "attn.attention", drops(m, "attn_pdrop")
    if wiring.backend == "eager":
        return cached(name, wiring, written_out(name, "q", "k", "v", "o", drop, wide, laid=wiring.is_head_major))
    return attention(name, "q", "k", "v", "o", wiring._replace(drops=drop), False)


def gpt_bigcode(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build GPT-BigCode: one key/value head for all query heads, and a causal mask buffer that nothing reads."""
    grouped, longest = m.num_key_value_heads != m.num_attention_heads, m.max_position_embeddings
    heads = attention_with_dropout(m, wiring, "attn.attention", "attn_pdrop", grouped)
    unused = Weight("transformer.bias", f"{longest} {longest}", "buffer", "bool", False)
    stack = _stack(m, wiring, _fused_attention(m, wiring, heads, by_head=not grouped))
    return stack._replace(before=(stack.before[0]._replace(weights=(unused,)), *stack.before[1:]))


def _stack(m: ModelSpec, wiring: Wiring, attention_ops: tuple[Op, ...], held: tuple[str, ...] = ()) -> Stack:
    """Assemble the model around its attention. `held` names block arguments, which a checkpoint keeps."""
    block = gpt_block(attention_ops, mlp(m, "n2", "mo", drops(m, "resid_pdrop")), (*held, *returned(wiring)))
    before = learned(m, wiring, drops(m, "embd_pdrop"))
    return Stack(before, (Run((block,), "L"),), after(m, wiring, held=("tokens", "places")))


def _fused_attention(
    m: ModelSpec, wiring: Wiring, heads: tuple[Op, ...], by_head: bool = False, name: str = "attn"
) -> tuple[Op, ...]:
    """Attention with one fused projection for q, k and v.

    `by_head`: the projection interleaves q, k and v head by head, and their joined gradient is copied into that order.
    """
    backend = wiring.masked if wiring.has_mask() else wiring.backend
    back = "new" if backend in ("eager", "math") and not by_head else "same"
    qkv = "qkv" if not by_head else "qkv.heads"
    return (
        ops.linear(f"{name}.c_attn", "n1", "qkv", "qkv", "h", "attention", bias=True),
        *((ops.view(f"{name}.heads", "qkv", qkv, "b s a 3 d", gradient="new"),) if by_head else ()),
        *((ops.view(f"{name}.present", qkv, "present", "b s qkv")._replace(holds="forward"),) if wiring.caches else ()),
        ops.split(f"{name}.split", qkv, (Tensor("q0", QUERIES), Tensor("k0", KEYS), Tensor("v", KEYS))),
        ops.view(f"{name}.q_heads", "q0", "q", QUERIES, back),
        ops.view(f"{name}.k_heads", "k0", "k", KEYS, back),
        *heads,
        ops.linear(f"{name}.c_proj", "o", "ao.whole", "h", "a d", "attention", bias=True),
        *dropped(f"{name}.resid_dropout", "ao.whole", "ao", "b s h", drops(m, "resid_pdrop")),
        ops.release_names("qkv", "o", "n1"),
    )


def attention_with_dropout(
    m: ModelSpec, wiring: Wiring, name: str, key: str, grouped: bool, sliding: bool = False
) -> tuple[Op, ...]:
    """Attention from q, k and v to o. Dropout is an op if attention is written out; fused kernels drop inside."""
    k, v, spread = "k", "v", ()
    if m.num_key_value_heads == 1 and wiring.has_mask(sliding):  # expanding a single head makes no copy
        k, v, grouped = "k.all", "v.all", False
        spread = tuple(ops.view(f"{name}.repeat_{t}", t, f"{t}.all", QUERIES, gradient="new") for t in "kv")
        spread, wiring = cached(name, wiring, spread, sliding), wiring._replace(caching=False)
    wiring = wiring._replace(drops=drops(m, key))
    return (*spread, *attention(name, "q", k, v, "o", wiring, grouped, sliding, mask_name(sliding)))


def written_out(
    name: str,
    q: str,
    k: str,
    v: str,
    y: str,
    drop: bool,
    wide: bool = False,
    biased: tuple[Op, ...] | None = None,
    held: tuple[str, ...] = (),
    laid: bool = False,
) -> tuple[Op, ...]:
    """Attention written out, with the softmax in the dtype of the scores.

    wide    cast q and k to fp32
    biased  ops from `scores` to `masked`; by default the scores are scaled and the mask is added
    held    tensors that stay alive until the product with v is made
    laid    k and v are stored head by head, as in a cache, and need no copy
    """
    n, scores = name, "b a s s"
    q_in, k_in = (f"{q}.wide", f"{k}.wide") if wide else (q, k)
    return (
        *(ops.cast(f"{n}.{t}_float", t, f"{t}.wide", QUERIES, "fp32") for t in (q, k) if wide),
        ops.copy(f"{n}.q_flat", q_in, "q.flat", QUERIES)._replace(autocast="lower"),
        *(() if laid else (ops.copy(f"{n}.k_flat", k_in, "k.flat", QUERIES)._replace(autocast="lower"),)),
        ops.matmul(f"{n}.scores", "q.flat", k_in if laid else "k.flat", "scores", scores),
        *(
            biased
            or (ops.scale(f"{n}.scaling", "scores", "scaled", scores), add_mask(f"{n}.add_mask", "scaled", "masked"))
        ),
        *ops.softmax(f"{n}.softmax", "masked", "softmax", scores),
        ops.cast(f"{n}.cast", "softmax", "probs.whole", scores, f"={v}"),
        *((ops.release_names("masked"),) if wide and biased is None else ()),  # GPT-J casts in the same statement
        *dropped(f"{n}.attn_dropout", "probs.whole", "probs", scores, drop),
        *(() if laid else (ops.copy(f"{n}.v_flat", v, "v.flat", QUERIES),)),
        ops.matmul(f"{n}.product", "probs", v if laid else "v.flat", "heads", QUERIES),
        ops.release_names(*held),
        ops.copy(f"{n}.reshape", "heads", y, QUERIES, gradient="new"),
    )


def add_mask(name: str, x: str, y: str) -> Op:
    return Op(name, (x, "mask"), (Tensor(y, "b a s s"),), gradient="same", source=f"{ops.DERIVATIVES}: add.Tensor")


def gpt_neo(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build GPT-Neo: fp32 scores, masked by a boolean triangle over all positions that every layer holds.

    Local layers differ only in what their triangle contains. Scores are not scaled. Apart from eager attention there is
    only flash attention 2.
    """
    wiring = wiring if wiring.backend == "flash_2" else wiring._replace(backend="eager", masked="eager")
    name, longest = "attn.attention", m.max_position_embeddings
    triangle = Weight(f"{name}.bias", f"{longest} {longest}", "buffer", "bool", False)
    drop, resid = drops(m, "attention_dropout"), drops(m, "resid_dropout")
    back = "new" if wiring.backend == "eager" else "same"
    biased = (
        Op(
            f"{name}.where",
            ("scores",),
            (Tensor("causal", "b a s s", "=scores"), Tensor("least", "", "=scores")),
            (triangle,),
            source=f"{ops.DERIVATIVES}: where",
        ),
        add_mask(f"{name}.add_mask", "causal", "masked"),
    )
    kernel = (
        (Op(f"{name}.bias", weights=(triangle,), gradient="none"), *attention(name, "q", "k", "v", "o", wiring, False))
        if wiring.backend == "flash_2"
        else cached(
            name,
            wiring,
            written_out(
                name, "q", "k", "v", "o", drop, True, biased, ("q.wide", "k.wide", "least"), laid=wiring.is_head_major
            ),
        )
    )
    heads = (
        *(ops.linear(f"{name}.{t}_proj", "n1", f"{t}0", "a d", "h", "attention") for t in "qkv"),
        *(ops.view(f"{name}.{t}_heads", f"{t}0", t, QUERIES, back if t != "v" else "same") for t in "qkv"),
        *kernel,
        ops.linear(f"{name}.out_proj", "o", "ao.whole", "h", "a d", "attention", bias=True),
        *dropped(f"{name}.resid_dropout", "ao.whole", "ao", "b s h", resid),
        ops.release_names("q", "k", "v", "o"),
    )
    held = returned(wiring) or ("o",)  # flash attention 2 returns its output as the probabilities
    block = gpt_block(heads, mlp(m, "n2", "mo", resid), held)
    before = learned(m, wiring, drops(m, "embed_dropout"))
    return Stack(before, (Run((block,), "L"),), after(m, wiring, held=("tokens", "places", *held)))


def gptj(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build GPT-J: part of each head rotated from a table for all positions; one norm for attention and MLP in
    parallel.
    """
    cast = ops.cast("transformer.rotary_emb.cast", "sincos32", "sincos", "s rot", "=embeds")
    return _parallel_stack(m, wiring, _gptj_attention(m, _heads(m, wiring, wide=True)), ("sincos32", (cast,)))


def codegen(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build CodeGen: GPT-J with one projection for q, k and v, which rotates heads in fp32."""
    return _parallel_stack(m, wiring, _codegen_attention(m, _heads(m, wiring, wide=True)), ("sincos", ()))


def _parallel_stack(
    m: ModelSpec, wiring: Wiring, attention_ops: tuple[Op, ...], table: tuple[str, tuple[Op, ...]]
) -> Stack:
    """Assemble the model around its attention. `table`: what is looked up of sines and cosines, and what follows."""
    block = Block(
        "transformer.h",
        (
            ops.layer_norm("ln_1", "x", "n1", "b s h", "h"),
            *attention_ops,
            *mlp(m, "n1", "mo", drops(m, "resid_pdrop"), ("fc_in", "fc_out")),
            ops.add("parallel", "ao", "mo", "branches", "b s h"),
            ops.add("residual", "branches", "x", "y", "b s h"),
            ops.release_names("ao", "mo", "n1", "positions", *returned(wiring)),
        ),
    )
    embedded = drops(m, "embd_pdrop")
    width, (looked_up, more) = m.rotary_width, table
    rows = Weight(
        "transformer.rotary_emb.embed_positions", f"{m.max_position_embeddings} {width}", "buffer", "fp32", False
    )
    before = (
        inputs(wiring.padded),
        ops.embedding("transformer.wte", "ids", "tokens" if embedded else "embeds", "v", "h"),
        positions(),
        *masks(wiring, "tokens" if embedded else "embeds"),
        *((ops.dropout("transformer.drop", "tokens", "embeds", "b s h"),) if embedded else ()),
        Op("transformer.rotary_emb", ("positions",), (Tensor(looked_up, "s rot", f"={rows.name}"),), (rows,)),
        *more,
    )
    last = after(m, wiring, held=("sincos", "tokens" if embedded else "embeds"))
    head = lm_head("n", "transformer.wte.weight" if m.tie_word_embeddings else "", bias=True)
    return Stack(before, (Run((block,), "L"),), (*last[:-1], head))


def _gptj_attention(m: ModelSpec, kernel: tuple[Op, ...], name: str = "attn") -> tuple[Op, ...]:
    """Attention; the rotated and the remaining part of each head are concatenated into new storage.

    Both parts stay alive to the end, and the remaining part is a view that keeps all of q or k alive.
    """
    return (
        *(ops.linear(f"{name}.{t}_proj", "n1", f"{t}0", "a d", "h", "attention") for t in "qkv"),
        *(ops.view(f"{name}.{t}_heads", f"{t}0", f"{t}1" if t != "v" else t, QUERIES) for t in "qkv"),
        *_partly_turned(name, "q", "k"),
        *kernel,
        ops.linear(f"{name}.out_proj", "o", "ao.whole", "h", "a d", "attention"),
        *dropped(f"{name}.resid_dropout", "ao.whole", "ao", "b s h", drops(m, "resid_pdrop")),
        ops.release_names("q", "k", "v", "o", "q0", "k0", "q.turned", "k.turned"),
    )


def _codegen_attention(m: ModelSpec, kernel: tuple[Op, ...], name: str = "attn") -> tuple[Op, ...]:
    """Attention; q, k and v are copied out of a projection that is laid out in four parts.

    Source: transformers 5.24 models/codegen/modeling_codegen.py CodeGenAttention.
    """
    return (
        ops.linear(f"{name}.qkv_proj", "n1", "qkv", "qkv", "h", "attention"),
        ops.split(f"{name}.split", "qkv", tuple(Tensor(f"{t}0", QUERIES) for t in "qvk")),
        *(ops.copy(f"{name}.{t}_heads", f"{t}0", f"{t}1" if t != "v" else t, QUERIES) for t in "qkv"),
        *_partly_turned(name, "q32", "k32"),
        *(ops.cast(f"{name}.{t}_cast", f"{t}32", t, QUERIES, "=v") for t in "qk"),
        *kernel,
        ops.linear(f"{name}.out_proj", "o", "ao.whole", "h", "a d", "attention"),
        *dropped(f"{name}.resid_dropout", "ao.whole", "ao", "b s h", drops(m, "resid_pdrop")),
        ops.release_names("q", "k", "v", "o", "qkv", "q1", "k1", "q.turned", "k.turned"),
    )


def _partly_turned(name: str, q: str, k: str) -> tuple[Op, ...]:
    """Make q and k: the first part of each head of `q1` and `k1` rotated, and the remaining part."""
    return (
        *(
            op
            for t in "kq"
            for op in (
                ops.view(f"{name}.{t}_slice", f"{t}1", f"{t}.rot", "b s a rot", gradient="new"),
                ops.view(f"{name}.{t}_rest", f"{t}1", f"{t}.pass", QUERIES, gradient="new"),
            )
        ),
        *(op for t in "kq" for op in _rotate_pairs(f"{name}.rope_{t}", t)),
        *(ops.cat(f"{name}.{t}_cat", (f"{t}.part", f"{t}.pass"), y, QUERIES) for t, y in (("k", k), ("q", q))),
    )


def _rotate_pairs(name: str, t: str) -> tuple[Op, ...]:
    """Rotate q or k pair by pair. sin and cos are repeated for each pair, separately for q and for k, and kept."""
    shape, half = "b s a rot", "b s a rot2"
    cosine, pairs, sine = f"{t}.cosine", f"{t}.pairs", f"{t}.sine"
    return (
        ops.copy(f"{name}.sin_pairs", "sincos", f"{t}.sin", "s rot"),
        ops.copy(f"{name}.cos_pairs", "sincos", f"{t}.cos", "s rot"),
        Op(f"{name}.cos", (f"{t}.rot", f"{t}.cos"), (Tensor(cosine, shape),), (), (Keep(f"{t}.cos", f"{t}.rot"),)),
        ops.rotate_half(f"{name}.rotate_every_two", f"{t}.rot", pairs, shape, half),
        Op(f"{name}.sin", (pairs, f"{t}.sin"), (Tensor(sine, shape),), (), (Keep(f"{t}.sin", pairs),)),
        ops.add(f"{name}.add", cosine, sine, f"{t}.turned", shape),
        ops.view(f"{name}.part", f"{t}.turned", f"{t}.part", QUERIES),
        ops.release_names(f"{t}.sin", f"{t}.cos"),
    )


def mlp(
    m: ModelSpec,
    x: str,
    y: str,
    drop: bool,
    layers: tuple[str, str] = ("c_fc", "c_proj"),
    name: str = "mlp",
    bias: bool = True,
) -> tuple[Op, ...]:
    """Up-projection, activation, down-projection, dropout."""
    up, down = layers
    return (
        ops.linear(f"{name}.{up}", x, "up", "f", "h", "mlp", bias),
        *activation(m, f"{name}.act", "up", "act", "b s f"),
        ops.release_names("up"),
        ops.linear(f"{name}.{down}", "act", f"{y}.whole", "h", "f", "mlp", bias),
        ops.release_names("act"),
        *dropped(f"{name}.dropout", f"{y}.whole", y, "b s h", drop),
        ops.release_names(x),
    )


def gpt_block(attention_ops: tuple[Op, ...], mlp_ops: tuple[Op, ...], held: tuple[str, ...]) -> Block:
    """Norm, attention from `n1` to `ao`, residual; norm, MLP from `n2` to `mo`, residual.

    `held` names further tensors that stay alive to the end of the block.
    """
    return Block(
        "transformer.h",
        (
            ops.layer_norm("ln_1", "x", "n1", "b s h", "h"),
            *attention_ops,
            ops.add("residual_1", "ao", "x", "x1", "b s h"),
            ops.release_names("n1"),
            ops.layer_norm("ln_2", "x1", "n2", "b s h", "h"),
            *mlp_ops,
            ops.add("residual_2", "x1", "mo", "y", "b s h"),
            ops.release_names("n2"),
            ops.release_names("ao", "mo", *held),
        ),
    )


BUILDERS = {"codegen": codegen, "gpt2": gpt2, "gpt_bigcode": gpt_bigcode, "gpt_neo": gpt_neo, "gptj": gptj}
