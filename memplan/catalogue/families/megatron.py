"""Megatron-core's GPT with Transformer Engine's layers: what the fused kernels keep, and the copies between them.

Its hidden states are `s b h`, which takes as much as `b s h`; batch-first tensors are copied.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.attention.attention import KEYS, QUERIES, SCORES
from memplan.catalogue.attention.flash_attention import flash
from memplan.catalogue.decoder.frame import lm_head
from memplan.catalogue.degrees import Degrees
from memplan.catalogue.families.gpt import position_table
from memplan.catalogue.families.megatron_experts import gather_buffer, megatron_mixture
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import rewrite
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Run, Scratch, Stack, Tensor, Weight
from memplan.core.units import MIB
from memplan.models.configs.megatron import (
    EXPERT_RANKS,
    EXPERT_TENSOR_RANKS,
    TENSOR_RANKS,
    attention_drops,
    experts_of,
    groups_products,
    has_mean,
    is_gated,
    positions_of,
    uses_engine,
)
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

KIND = "megatron_gpt"
_STREAMS = 4  # CUDA streams of grouped products, each with its own workspace
CORE, ENGINE = "megatron-core 0.12", "TransformerEngine 2.3"
_DPA = f"{ENGINE} pytorch/attention/dot_product_attention"


def default_attention_kernel(half: bool, capability: tuple[int, int] | None) -> str:
    """Return the attention kernel that Transformer Engine selects by itself.

    Fused kernels need 16 bits. From Hopper on, cuDNN's comes before flash attention 2.

    Source: TransformerEngine 2.3 pytorch/attention/dot_product_attention/utils.py get_attention_backend.
    """
    if not half:
        return "eager"
    return "cudnn" if capability is not None and capability >= (9, 0) else "flash_2"


def engine_workspace_bytes(m: ModelSpec, capability: tuple[int, int] | None) -> int:
    """Return the bytes of Transformer Engine's cuBLAS workspace, separate from torch's; 0 without its layers.

    Source: TransformerEngine 2.3 pytorch/module/base.py get_cublas_workspace_size_bytes.
    """
    if not uses_engine(m):
        return 0
    streams = 1 + (_STREAMS if experts_of(m) and groups_products(m) else 0)
    return streams * _workspace(capability)


def _workspace(capability: tuple[int, int] | None) -> int:
    return 32 * MIB if capability is not None and capability >= (9, 0) else 4 * MIB


def megatron_gpt(m: ModelSpec, wiring: Wiring) -> Stack:
    stack = Stack(
        _before(m),
        tuple(Run(tuple(_block(m, wiring, layer) for layer in run.pattern), run.times) for run in m.runs),
        _after(m),
    )
    return _with_fused_accumulation(stack) if wiring.accumulates and uses_engine(m) else stack


def _with_fused_accumulation(stack: Stack) -> Stack:
    """Return the stack with weight gradients accumulated into the main gradients by the product that computes them.

    Autograd is given an uninitialised tensor instead, one for all weights of a shape, which stays from then on.

    Source: TransformerEngine 2.11 pytorch/module/base.py get_dummy_wgrad, module/linear.py _Linear.backward.
    """
    shapes: dict[str, None] = {}

    def change(op: Op) -> tuple[Op, ...]:
        weights = tuple(w._replace(accumulates=w.matrix or bool(w.stacked)) for w in op.weights)
        shapes.update((w.shape.removeprefix("Eown "), None) for w in weights if w.accumulates)
        return (op._replace(weights=weights),)

    runs = rewrite(stack._replace(before=(), after=(), loss=()), change).runs
    source = "TransformerEngine 2.11 pytorch/module/base.py get_dummy_wgrad"
    placeholders = tuple(Tensor(f"gradient placeholder {shape}", shape, "=embeds") for shape in shapes)
    made = Op("gradient placeholders", (), placeholders, gradient="none", holds="step", source=source)
    return stack._replace(before=(*stack.before, made), runs=runs)


def has_experts(m: ModelSpec) -> bool:
    return m.model_type == KIND and experts_of(m) > 0


def experts_and_width(m: ModelSpec) -> tuple[int, int]:
    """Return the number of experts and the width of each; zeros for a dense model."""
    return (experts_of(m), m.axes()["m"]) if experts_of(m) else (0, 0)


def with_divided_experts(m: ModelSpec, degrees: Degrees) -> ModelSpec:
    """Return the model as one of the ranks that divide its experts has it."""
    parts = {EXPERT_RANKS: degrees.ep, EXPERT_TENSOR_RANKS: degrees.etp, TENSOR_RANKS: degrees.tp}
    return ModelSpec({**m.config, **parts}, m.name, m.card, m.checkpoint)


def _before(m: ModelSpec) -> tuple[Op, ...]:
    """Look up tokens and positions, add them, and transpose to sequence-first.

    The data loader also makes a boolean mask, unless told not to, which stays alive for the forward pass, used or not.
    """
    learned, drops = positions_of(m) == "learned_absolute", m.probability("hidden_dropout") > 0
    laid = "laid" if drops else "embeds"
    return (
        Op(
            "inputs",
            (),
            (
                *(Tensor(name, "b s", "int64") for name in ("ids", "labels", "positions")),
                Tensor("loss_mask", "b s", "fp32"),
                *((Tensor("attention_mask", "b s s", "bool"),) if m.get("create_attention_mask", True) else ()),
            ),
            holds="forward",
            source="Megatron-LM 0.12 training/utils.py get_batch_on_this_tp_rank",
        ),
        ops.embedding("embedding.word_embeddings", "ids", "tokens", "v", "h"),
        *(
            (
                position_table(
                    "embedding.position_embeddings", "positions", "places", f"{m.max_position_embeddings} h", "b s"
                ),
                ops.add("embedding.add", "tokens", "places", "summed", "b s h"),
            )
            if learned
            else (ops.view("embedding.tokens", "tokens", "summed", "b s h"),)
        ),
        ops.copy("embedding.transpose_flat", "summed", laid, "b s h"),
        *((ops.dropout("embedding.dropout", laid, "embeds", "b s h"),) if drops else ()),
        ops.release_names("tokens", *(("places",) if learned else ())),
        *((_angles(),) if positions_of(m) == "rope" else ()),
        *gather_buffer(m),
    )


def _angles() -> Op:
    """The table of angles for all tokens, made once and cached."""
    source = f"{CORE} models/common/embeddings/rotary_pos_embedding.py RotaryEmbedding"
    return Op("rotary_pos_emb", (), (Tensor("angles", "s rot", "fp32"),), holds="step", source=source)


def _after(m: ModelSpec) -> tuple[Op, ...]:
    tied = "embedding.word_embeddings.weight" if m.tie_word_embeddings else ""
    head = lm_head("n", tied)
    return (
        _norm(m, "decoder.final_layernorm", "x", "n"),
        ops.release_names("x", "embeds"),
        head._replace(name="output_layer"),
    )


def _norm(m: ModelSpec, name: str, x: str, y: str, shape: str = "b s h", axis: str = "h") -> Op:
    """One fused kernel, which keeps its input and one fp32 number per row, or two for LayerNorm.

    Source: TransformerEngine 2.3 pytorch/module/layernorm_linear.py.
    """
    if has_mean(m):
        return ops.layer_norm(name, x, y, shape, axis)
    return ops.fused_rms_norm(name, x, y, shape, axis, f"{ENGINE} pytorch/module/layernorm_linear.py")


def _block(m: ModelSpec, wiring: Wiring, layer: Layer) -> Block:
    sparse = layer.ffn == "experts"
    return Block(
        "decoder.layers",
        (
            _norm(m, "self_attention.linear_qkv.layer_norm", "x", "n1"),
            *_attention(m, wiring),
            *_bias_dropout_add(m, "self_attn_bda", "self_attention.linear_proj.bias", "ao", "x", "x1"),
            ops.release_names("ao"),
            _norm(m, "pre_mlp_layernorm" if sparse else "mlp.linear_fc1.layer_norm", "x1", "n2"),
            *(megatron_mixture(m, "n2", "mo") if sparse else _mlp(m, "n2", "mo")),
            *_bias_dropout_add(m, "mlp_bda", "" if sparse else "mlp.linear_fc2.bias", "mo", "x1", "y"),
            ops.release_names("mo", "x1"),
        ),
    )


def _bias_dropout_add(m: ModelSpec, name: str, bias: str, x: str, residual: str, y: str) -> tuple[Op, ...]:
    """Bias, dropout and residual in one compiled kernel, which keeps only the mask.

    Source: megatron-core 0.12 fusions/fused_bias_dropout.py.
    """
    source = f"{CORE} fusions/fused_bias_dropout.py"
    group = "mlp" if bias.startswith("mlp") else "attention"
    w = (Weight(bias, "h", group),) if bias and m.get("use_bias", True) else ()
    if m.probability("hidden_dropout") == 0:
        added = ops.add(name, residual, x, y, "b s h")._replace(weights=w, source=source)
        return (added,)
    mask, dropped = f"{y}.mask", f"{y}.dropped"  # an adapter of x has a copy `x.dropped`
    return (
        Op(f"{name}.mask", (x,), (Tensor(mask, "b s h", "bool"),), gradient="none", source=source),
        Op(
            f"{name}.dropout",
            (x, mask),
            (Tensor(dropped, "b s h"),),
            w,
            (Keep(mask, x), *(Keep(mask, v.name) for v in w)),
            view=True,
            source=source,
        ),
        ops.add(name, residual, dropped, y, "b s h")._replace(source=source),
    )


def _mlp(m: ModelSpec, x: str, y: str) -> tuple[Op, ...]:
    """Up-projection, activation with its bias, down-projection. The last bias is added with the residual."""
    gated, biased = is_gated(m), m.get("use_bias", True)
    up = f"{'2 ' if gated else ''}f"
    return (
        ops.linear("mlp.linear_fc1", x, "up", up, "h", "mlp"),
        *_bias_activation(m, "mlp.activation", "up", "act", biased),
        ops.linear("mlp.linear_fc2", "act", y, "h", "f", "mlp"),
        ops.release_names("act"),
    )


def _bias_activation(m: ModelSpec, name: str, x: str, y: str, biased: bool) -> tuple[Op, ...]:
    """Bias and activation in one kernel, which keeps its input without the bias.

    Squared ReLU and the exact GELU have the bias added before.

    Source: megatron-core 0.12 fusions/fused_bias_gelu.py, fused_bias_swiglu.py, transformer/mlp.py.
    """
    gated = is_gated(m)
    up = f"{'2 ' if gated else ''}f"
    w = (Weight("mlp.linear_fc1.bias", up, "mlp"),) if biased else ()
    source = f"{CORE} fusions/fused_bias_{'swiglu' if gated else 'gelu'}.py"
    if biased and m.hidden_act in ("relu2", "squared_relu"):
        added = Op(f"{name}.bias", (x,), (Tensor("up.biased", f"b s {up}"),), w, gradient="same")
        return (added, Op(name, ("up.biased",), (Tensor(y, "b s f"),), (), (Keep("up.biased", "up.biased"),)))
    return (
        Op(
            name,
            (x,),
            (Tensor(y, "b s f"),),
            w,
            (Keep(x, x), *(Keep(what, v.name) for v in w for what in (x, v.name))),
            source=source,
        ),
    )


def _attention(m: ModelSpec, wiring: Wiring) -> tuple[Op, ...]:
    """Attention with q, k and v in one projection. As long as one head view is kept, so is the projection's output.

    Heads that do not share one layout, because there are fewer key heads or q and k were rotated, are made contiguous.

    Source: megatron-core 0.12 transformer/attention.py SelfAttention; TransformerEngine 2.3
    pytorch/attention/dot_product_attention/utils.py get_qkv_layout.
    """
    name = "self_attention"
    grouped, rope = m.num_key_value_heads != m.num_attention_heads, positions_of(m) == "rope"
    normed = m.get("qk_layernorm", False)
    needs_copies = grouped or rope or normed
    heads = (Tensor("q0", QUERIES), Tensor("k0", KEYS), Tensor("v0", KEYS))
    steps: list[Op] = []
    q, k = "q0", "k0"
    if grouped:
        steps.append(ops.copy(f"{name}.query", q, "q1", QUERIES))
        q = "q1"
    if normed:
        steps += (
            _norm(m, f"{name}.q_layernorm", q, "q2", QUERIES, "d"),
            _norm(m, f"{name}.k_layernorm", k, "k2", KEYS, "d"),
        )
        q, k = "q2", "k2"
    if rope:
        steps += (_fused_rope(f"{name}.rope_q", q, "q", QUERIES), _fused_rope(f"{name}.rope_k", k, "k", KEYS))
    else:
        is_contiguous = normed or not needs_copies
        steps += (
            ops.view(f"{name}.q", q, "q", QUERIES),
            (ops.view if is_contiguous else ops.copy)(f"{name}.k", k, "k", KEYS),
        )
    return (
        ops.linear(f"{name}.linear_qkv", "n1", "qkv", "qkv", "h", "attention", bias=_has_qkv_bias(m)),
        ops.split(f"{name}.split", "qkv", heads),
        *steps,
        *((ops.release_names("q1"),) if grouped else ()),
        (ops.copy if needs_copies else ops.view)(f"{name}.v", "v0", "v", KEYS),
        *_core(m, wiring, grouped, needs_copies),
        ops.linear(f"{name}.linear_proj", "o", "ao", "h", "a d", "attention"),
        ops.release_names("qkv", "q", "k", "v", "o"),
    )


def _has_qkv_bias(m: ModelSpec) -> bool:
    return m.get("use_bias", True) or m.get("add_qkv_bias", False)


def _fused_rope(name: str, x: str, y: str, shape: str) -> Op:
    """Rotate in one kernel, which keeps the angles."""
    source = f"{CORE} models/common/embeddings/rope_utils.py fused_apply_rotary_pos_emb"
    return Op(name, (x, "angles"), (Tensor(y, shape, f"={x}"),), (), (Keep("angles", x),), source=source)


def _core(m: ModelSpec, wiring: Wiring, grouped: bool, contiguous: bool) -> tuple[Op, ...]:
    """Attention from `q`, `k` and `v` to `o`."""
    name = "self_attention.core_attention"
    match wiring.backend:
        case "eager":
            operations = _unfused(name, grouped, attention_drops(m))
        case "cudnn":
            operations = (_cudnn(name),)
        case _:
            operations = _flash_2(name, grouped, contiguous)
    return (_recomputed(name, operations),) if wiring.recomputes else operations


def _cudnn(name: str) -> Op:
    """cuDNN's kernel, which reads heads in any layout and writes its output sequence-first.

    What else its backward allocates is not published; it is assumed to be as much as flash attention's.
    """
    op = flash(name, "q", "k", "v", "o", False)
    return op._replace(source=f"{_DPA}/backends.py FusedAttnFunc")


def _flash_2(name: str, grouped: bool, contiguous: bool) -> tuple[Op, ...]:
    """Flash attention 2. Heads are copied to batch-first, its output is copied back, and it keeps its own copies.

    With a single sequence, heads that are already contiguous are not copied.
    """
    laid = "_flat" if contiguous else ""
    return (
        *(
            ops.copy(f"{name}.{t}{laid}", t, f"{t}.laid", shape)
            for t, shape in (("q", QUERIES), ("k", KEYS), ("v", KEYS))
        ),
        flash(name, "q.laid", "k.laid", "v.laid", "o.laid", grouped)._replace(
            source=f"{_DPA}/backends.py FlashAttention"
        ),
        ops.release_names("q.laid", "k.laid", "v.laid"),
        ops.copy(f"{name}.transpose_flat", "o.laid", "o", QUERIES),
    )


def _unfused(name: str, grouped: bool, drops: bool) -> tuple[Op, ...]:
    """Scores, a fused softmax in half precision with scale and mask, dropout, and the product with v."""
    k, v = ("k.all", "v.all") if grouped else ("k", "v")
    probs = "dropped" if drops else "probs"
    return (
        *(ops.copy(f"{name}.repeat_{t}", t, f"{t}.all", QUERIES, "new") for t in "kv" if grouped),
        ops.matmul(f"{name}.scores", "q", k, "scores", SCORES),
        Op(
            f"{name}.softmax",
            ("scores",),
            (Tensor("probs", SCORES),),
            (),
            (Keep("probs", "scores"),),
            gradient="same",
            source=f"{_DPA}/softmax.py ScaledMaskedSoftmax, whose backward writes over the gradient it is given",
        ),
        *((ops.dropout(f"{name}.attention_dropout", "probs", probs, SCORES),) if drops else ()),
        ops.matmul(f"{name}.context", probs, v, "heads", QUERIES),
        ops.copy(f"{name}.transpose", "heads", "o", QUERIES),
        ops.release_names("scores", probs, *((k, v) if grouped else ())),
    )


def _recomputed(name: str, operations: tuple[Op, ...]) -> Op:
    """Return the operations as one that keeps q, k and v, and recomputes the rest in backward.

    All that is recomputed is then alive together with the gradient of the largest.

    Source: megatron-core 0.12 transformer/attention.py _checkpointed_attention_forward.
    """
    written = {t.name: t._replace(dtype=t.dtype or "=q") for op in operations if not op.view for t in op.writes}
    kept = [
        t for name, t in written.items() if name != "o" and any(k.what == name for op in operations for k in op.keeps)
    ]
    scratch = tuple(t for name, t in written.items() if name != "o")
    back = [s.tensor for op in operations for s in op.scratch_back]
    back = [t._replace(dtype="=q" if t.dtype.startswith("=") else t.dtype) for t in back]
    pairs = [Tensor("gradient of probabilities", SCORES, "=q") for t in kept if t.name == "probs"]
    return Op(
        name,
        ("q", "k", "v"),
        (Tensor("o", QUERIES),),
        (),
        tuple(Keep(what, of) for of in "qkv" for what in "qkv"),
        scratch=scratch,
        scratch_back=tuple(map(Scratch, (*kept, Tensor("o again", QUERIES, "=q"), *back, *pairs))),
        product="attention",
        source=f"{CORE} transformer/attention.py _checkpointed_attention_forward",
    )


def ring_attention(stack: Stack, degrees: Degrees) -> Stack:
    """Return the operations of one rank if ranks divide the sequence (context parallelism).

    Keys and values are joined and sent from rank to rank; a rank keeps those it received last.

    Source: TransformerEngine 2.3 pytorch/attention/dot_product_attention/context_parallel.py AttnFuncWithCPAndKVP2P.
    """
    source = f"{_DPA}/context_parallel.py AttnFuncWithCPAndKVP2P"

    def change(op: Op) -> Iterator[Op]:
        if op.product != "attention":
            yield op
            return
        q, k, v = op.reads
        local_q, joined, shape = f"{q}.own", "kv", "b s 2 k d"
        yield (
            ops.copy(f"{op.name}.contiguous", q, local_q, QUERIES)
            if q == "q"
            else ops.view(f"{op.name}.q", q, local_q, QUERIES)
        )
        yield Op(f"{op.name}.join", (k, v), (Tensor(joined, shape, f"={k}"),), source=source)
        names = {q: local_q, k: joined, v: joined}
        kept = dict.fromkeys(Keep(names.get(x.what, x.what), names.get(x.of, x.of)) for x in op.keeps)
        received = Tensor("keys and values received", f"{degrees.cp - 1} {shape}", f"={local_q}")
        step = Tensor("output of a step", QUERIES, f"={local_q}")
        back = Tensor("keys and values and their gradients", f"4 {shape}", f"={local_q}")
        yield op._replace(
            reads=(local_q, joined),
            keeps=tuple(kept),
            scratch=(received, step),
            scratch_back=(Scratch(back), *(s for s in op.scratch_back if "expanded" not in s.tensor.name)),
            source=source,
        )

    return rewrite(stack, change)


def exchanged_heads(stack: Stack, degrees: Degrees) -> Stack:
    """Return the operations of one rank if ranks exchange their tokens of all heads for all tokens of some heads.

    The kernel keeps its output before the exchange, and the next projection its input after it.

    Source: TransformerEngine 2.11 pytorch/attention/dot_product_attention/context_parallel.py
    AttnFuncWithCPAndQKVOA2A, flash_attn_a2a_communicate.
    """
    source = (
        "TransformerEngine 2.11 pytorch/attention/dot_product_attention/context_parallel.py AttnFuncWithCPAndQKVOA2A"
    )

    def change(op: Op) -> Iterator[Op]:
        if op.product != "attention":
            yield op
            return
        y, shapes = op.writes[0].name, dict(zip(op.reads, (QUERIES, KEYS, KEYS), strict=True))
        sent: tuple[Tensor, ...] = ()
        for t, shape in shapes.items():
            sent = (*sent, Tensor(f"{t} to send", shape, f"={t}"))
            back = (*sent, Tensor(f"gradient of {t} to send", shape, f"={t}"))
            yield ops.copy(f"{op.name}.exchange_{t}", t, f"{t}.exchanged", shape, "new")._replace(
                scratch=sent, scratch_back=tuple(map(Scratch, back)), source=source
            )
        yield ops.renamed(op, lambda name: f"{name}.exchanged" if name in (*shapes, y) else name)
        parts = tuple(Tensor(f"output {what}", QUERIES, f"={y}.exchanged") for what in ("to send", "received"))
        yield ops.copy(f"{op.name}.exchange", f"{y}.exchanged", y, QUERIES, "new")._replace(
            scratch=parts, scratch_back=tuple(map(Scratch, parts)), source=source
        )
        yield ops.release_names(f"{y}.exchanged", *(f"{t}.exchanged" for t in shapes))

    return rewrite(stack, change)


BUILDERS = {KIND: megatron_gpt}
