"""Multi-head latent attention: keys and values come out of one narrow vector a token, queries mostly too.

Axes of its own: `ql` and `kl` the ranks of the queries' and of the keys' and values' vector, `klr` the latter with the
rotated part that all heads share; of a head, `dn` the part that is not rotated, `d` the whole (`dn` and `rot`), `dv`
its values, `dkv` what one projection makes of it (`dn` and `dv`)."""

from __future__ import annotations

from collections.abc import Callable

from memplan.catalogue.attention.attention import attention, cached
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.positions import rotary_table
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Keep, Op, Scratch, Tensor
from memplan.models.model import ModelSpec

_Q, _VALUES = "b s a d", "b s a dv"
_SOURCE = "transformers 5.24 models/deepseek_v3/modeling_deepseek_v3.py"

Turn = Callable[[str], tuple[Op, ...]]
rotated_halves = ops.rotate


def halves(name: str) -> tuple[Op, ...]:
    """The rotated parts as Llama rotates: one half of a head against the other."""
    return (
        *rotated_halves(f"{name}.rope_q", "q.rot", "q.turned", "b s a rot", "b s a rot2"),
        *rotated_halves(f"{name}.rope_k", "k.rot", "k.turned", "b s rot", "b s rot2"),
    )


def pairs(name: str) -> tuple[Op, ...]:
    """The rotated parts pair by pair: even numbers and odd ones are slices, which are turned and joined."""
    return (
        *rotated_pairs(f"{name}.rope_q", "q.rot", "q.turned", "b s a rot", "b s a rot2"),
        *rotated_pairs(f"{name}.rope_k", "k.rot", "k.turned", "b s rot", "b s rot2"),
    )


def rotated_pairs(name: str, x: str, y: str, shape: str, half: str) -> tuple[Op, ...]:
    """`cat(even * cos - odd * sin, odd * cos + even * sin)`. The gradient of a slice is as wide as what it is of."""

    def turned(part: str, table: str, made: str) -> Op:
        read = f"{y}.{part}"
        return Op(
            f"{name}.{made}",
            (read, table),
            (Tensor(f"{y}.{made}", half),),
            (),
            (Keep(table, read),),
            source=f"{_SOURCE} apply_rotary_pos_emb_interleave",
        )

    return (
        ops.view(f"{name}.even", x, f"{y}.even", half, gradient="new"),
        ops.view(f"{name}.odd", x, f"{y}.odd", half, gradient="new"),
        turned("even", "cos", "even_cos"),
        turned("odd", "sin", "odd_sin"),
        ops.view(f"{name}.negative", f"{y}.odd_sin", f"{y}.less", half, gradient="new"),
        ops.add(f"{name}.subtract", f"{y}.even_cos", f"{y}.less", f"{y}.first", half),
        turned("odd", "cos", "odd_cos"),
        turned("even", "sin", "even_sin"),
        ops.add(f"{name}.add", f"{y}.odd_cos", f"{y}.even_sin", f"{y}.second", half),
        *joined(f"{name}.cat", (f"{y}.first", f"{y}.second"), y, shape),
    )


def complex_pairs(name: str) -> tuple[Op, ...]:
    """The rotated parts as complex numbers, in fp32; the products are cast back."""
    parts = (("q", "b s a rot"), ("k", "b s rot"))
    return (
        *(ops.cast(f"{name}.{t}_float", f"{t}.rot", f"{t}.rot32", shape, "fp32") for t, shape in parts),
        *(
            op
            for t, shape in parts
            for op in (
                Op(
                    f"{name}.rotate_{t}",
                    (f"{t}.rot32", "turns"),
                    (Tensor(f"{t}.turned32", shape),),
                    (),
                    (Keep("turns", f"{t}.rot32"),),
                    scratch_back=(Scratch(Tensor("conjugate", "s rot", "fp32")),),
                    source="transformers 5.24 models/deepseek_v2/modeling_deepseek_v2.py apply_rotary_emb",
                ),
                ops.cast(f"{name}.{t}_type_as", f"{t}.turned32", f"{t}.turned", shape, f"={t}.rot"),
            )
        ),
        ops.leave("q.rot32", "k.rot32"),
    )


def complex_table() -> tuple[Op, ...]:
    """A complex number of unit length for every position and pair, two fp32 numbers each."""
    angles, *_ = rotary_table("embeds")
    source = "transformers 5.24 models/deepseek_v2/modeling_deepseek_v2.py DeepseekV2RotaryEmbedding"
    return (
        angles,
        Op(
            "rotary.polar",
            ("angles",),
            (Tensor("polar", "s rot", "fp32"),),
            scratch=(Tensor("ones", "s rot2", "fp32"),),
        ),
        Op("rotary.scale", ("polar",), (Tensor("turns", "s rot", "fp32"),), source=source),
        ops.leave("angles"),
    )


def joined(name: str, parts: tuple[str, ...], y: str, shape: str) -> tuple[Op, ...]:
    """Parts side by side in new storage; their gradients are views of one."""
    return (
        *(ops.view(f"{name}.{i}", part, f"{part}.part", shape) for i, part in enumerate(parts)),
        Op(
            name,
            tuple(f"{part}.part" for part in parts),
            (Tensor(y, shape),),
            gradient="same",
            source=f"{ops.DERIVATIVES}: cat",
        ),
    )


def latent_attention(
    m: ModelSpec,
    wiring: Wiring,
    x: str,
    y: str,
    turn: Turn,
    bias: bool = False,
    name: str = "self_attn",
    sparse: tuple[Op, ...] = (),
    mask: str = "mask",
    held: tuple[str, ...] = (),
) -> tuple[Op, ...]:
    """Queries and keys of two parts, of which one is rotated, and values of a width of their own.

    Queries are joined, and a key is copied part by part into empty storage: on the way back each copy takes its part
    of a whole copy of the gradient (torch's CopySlices). Both lie in memory head by head, values as projected.
    `sparse` makes the `mask` that attention takes, and reads what is normalised of the queries, `q.normed`;
    `held` of what it makes stays to the end.
    """
    g = "attention"
    if m.get("q_lora_rank"):
        queries = (
            ops.linear(f"{name}.q_a_proj", x, "q.low", "ql", "h", g, bias),
            *ops.rms_norm(f"{name}.q_a_layernorm", "q.low", "q.normed", "b s ql", "ql"),
            ops.leave("q.low"),
            ops.linear(f"{name}.q_b_proj", "q.normed", "q0", "a d", "ql", g),
        )
    else:
        queries = (ops.linear(f"{name}.q_proj", x, "q0", "a d", "h", g),)
    return (
        *queries,
        ops.view(f"{name}.q_heads", "q0", "q1", _Q, gradient="new"),
        ops.split(f"{name}.q_split", "q1", (Tensor("q.pass", "b s a dn"), Tensor("q.rot", "b s a rot"))),
        ops.linear(f"{name}.kv_a_proj_with_mqa", x, "kv.low", "klr", "h", g, bias),
        ops.split(f"{name}.kv_split", "kv.low", (Tensor("kv.latent", "b s kl"), Tensor("k.rot", "b s rot"))),
        *ops.rms_norm(f"{name}.kv_a_layernorm", "kv.latent", "kv.normed", "b s kl", "kl"),
        *turn(name),
        *cached(f"{name}.attention", wiring, (), tensors=("kv.normed", "k.turned")),
        *joined(f"{name}.q_cat", ("q.pass", "q.turned"), "q", _Q),
        ops.linear(f"{name}.kv_b_proj", "kv.normed", "kv", "a dkv", "kl", g),
        ops.view(f"{name}.kv_heads", "kv", "kv.heads", "b s a dkv", gradient="new"),
        ops.split(f"{name}.expand_kv", "kv.heads", (Tensor("k.pass", "b s a dn"), Tensor("v", _VALUES))),
        ops.view(f"{name}.k_expand", "k.turned", "k.shared", "b s a rot", gradient="new"),
        *copied_key(name),
        *sparse,
        *attend(f"{name}.attention", m, wiring._replace(caching=False), mask),
        ops.linear(f"{name}.o_proj", "o", y, "h", "a dv", g, bias),
        ops.leave("q0", "kv.low", "kv.normed", "q.turned", "k.turned", "q", "k", "v", "o", x),
        *((ops.leave("q.normed", "index.others", mask, *held),) if sparse else ()),
    )


def copied_key(name: str) -> tuple[Op, ...]:
    """The key, from `k.pass` and `k.shared`, in the dtype of what the values are in.

    Source: torch 2.13 torch/csrc/autograd/functions/tensor.cpp CopySlices::apply, CopyBackwards::apply.
    """
    source = "torch 2.13 torch/csrc/autograd/functions/tensor.cpp CopySlices"
    return (
        Op(
            f"{name}.copy_pass",
            ("k.pass",),
            (Tensor("k.begun", _Q, "=k.pass"),),
            scratch_back=(Scratch(Tensor("gradient of the whole", _Q, "=k.pass")),),
            gradient="own",
            source=source,
        ),
        Op(
            f"{name}.copy_rotated",
            ("k.begun", "k.shared"),
            (Tensor("k", _Q),),
            scratch_back=(Scratch(Tensor("zeros", "b s a rot", "=k.begun")),),
            gradient="own",
            view=True,
            source=source,
        ),
    )


def attend(name: str, m: ModelSpec, wiring: Wiring, mask: str, joined: bool = True) -> tuple[Op, ...]:
    """q, k and v to `o`. `joined`: queries are of two parts, and so lie head by head in memory.

    Flash attention, which values as wide as keys may take, writes head by head as it reads.
    """
    same = m.head_widths[0] == m.head_widths[1]
    if mask != "mask":
        wiring = wiring._replace(backend=wiring.masked, padded=True)
    kernel = attention(name, "q", "k", "v", "o", wiring, False, mask=mask, width="d" if same else "dv")
    match wiring.masked if wiring.has_mask() else wiring.backend:
        case "flash" | "flash_2" if same:
            heads = attention(name, "q", "k", "v", "o.heads", wiring, False)
            return (*heads, ops.copy(f"{name}.contiguous", "o.heads", "o", _Q))
        case "eager" | "math":
            flat = (*((f"{name}.q_flat",) if joined else ()), f"{name}.k_flat")
            return tuple(
                ops.view(op.name, op.reads[0], op.writes[0].name, _Q) if op.name in flat else op for op in kernel
            )
        case _:
            return kernel
