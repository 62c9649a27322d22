"""Multi-head latent attention: keys and values, and mostly queries, are projected from one narrow vector per token.

Axes of this module:

    ql       rank of the queries' vector
    kl       rank of the vector for keys and values
    klr      that rank plus the rotated part that all heads share
    dn       per head, the part that is not rotated
    d        per head, both parts (`dn` and `rot`)
    dv       per head, the values
    dkv      per head, the output of the projection of keys and values (`dn` and `dv`)
"""

from __future__ import annotations

from collections.abc import Callable

from memplan.catalogue.attention.attention import QUERIES, attention, cached
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.positions import rotary_table
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Keep, Op, Scratch, Tensor
from memplan.models.model import ModelSpec

_VALUES = "b s a dv"
_SOURCE = "transformers 5.24 models/deepseek_v3/modeling_deepseek_v3.py"

PartRotation = Callable[[str], tuple[Op, ...]]  # makes `q.turned` and `k.turned`
rotated_halves = ops.rotate


def halves(name: str) -> tuple[Op, ...]:
    """Rotate as Llama does: one half of a head against the other."""
    return (
        *rotated_halves(f"{name}.rope_q", "q.rot", "q.turned", "b s a rot", "b s a rot2"),
        *rotated_halves(f"{name}.rope_k", "k.rot", "k.turned", "b s rot", "b s rot2"),
    )


def pairs(name: str) -> tuple[Op, ...]:
    """Rotate pair by pair: even and odd numbers are sliced, rotated and joined."""
    return (
        *rotated_pairs(f"{name}.rope_q", "q.rot", "q.turned", "b s a rot", "b s a rot2"),
        *rotated_pairs(f"{name}.rope_k", "k.rot", "k.turned", "b s rot", "b s rot2"),
    )


def rotated_pairs(name: str, x: str, y: str, shape: str, half: str) -> tuple[Op, ...]:
    """Return `cat(even * cos - odd * sin, odd * cos + even * sin)`. A slice's gradient has its input's width."""

    def turned(part: str, table: str, product: str) -> Op:
        read = f"{y}.{part}"
        return Op(
            f"{name}.{product}",
            (read, table),
            (Tensor(f"{y}.{product}", half),),
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
        *concat_parts(f"{name}.cat", (f"{y}.first", f"{y}.second"), y, shape),
    )


def complex_pairs(name: str) -> tuple[Op, ...]:
    """Rotate as complex numbers in fp32, and cast the products back."""
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
        ops.release_names("q.rot32", "k.rot32"),
    )


def complex_table() -> tuple[Op, ...]:
    """Return a complex number of unit length for every position and pair, stored as two fp32 numbers."""
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
        ops.release_names("angles"),
    )


def concat_parts(name: str, parts: tuple[str, ...], y: str, shape: str) -> tuple[Op, ...]:
    """Concatenate parts in new storage. Their gradients are views of one tensor."""
    return (
        *(ops.view(f"{name}.{i}", part, f"{part}.part", shape) for i, part in enumerate(parts)),
        ops.cat(name, tuple(f"{part}.part" for part in parts), y, shape),
    )


def latent_attention(
    m: ModelSpec,
    wiring: Wiring,
    rotate: PartRotation,
    sparse: tuple[Op, ...] = (),
    mask: str = "mask",
    held: tuple[str, ...] = (),
    scaled: tuple[Op, ...] = (),
) -> tuple[Op, ...]:
    """Return attention, from `n1` to `ao`, whose queries and keys have a rotated and an unrotated part.

    Values have their own width.

    Queries are concatenated. A key is copied part by part into empty storage; in backward each copy takes its part of a
    full-size copy of the gradient (torch's CopySlices). Queries and keys are contiguous head by head, values in the
    layout of their projection.

    rotate  rotates the parts
    sparse  operations that compute the `mask` for attention from the normalised queries, `q.normed`
    held    tensors of `sparse` that live until the function returns
    scaled  operations that make the queries of the rotated ones, `q.rotated`
    """
    name, x, group, bias = "self_attn", "n1", "attention", m.get("attention_bias", False)
    return (
        *latent_queries(m, name, x, bias),
        ops.view(f"{name}.q_heads", "q0", "q1", QUERIES, gradient="new"),
        ops.split(f"{name}.q_split", "q1", (Tensor("q.pass", "b s a dn"), Tensor("q.rot", "b s a rot"))),
        ops.linear(f"{name}.kv_a_proj_with_mqa", x, "kv.low", "klr", "h", group, bias),
        ops.split(f"{name}.kv_split", "kv.low", (Tensor("kv.latent", "b s kl"), Tensor("k.rot", "b s rot"))),
        *ops.rms_norm(f"{name}.kv_a_layernorm", "kv.latent", "kv.normed", "b s kl", "kl"),
        *rotate(name),
        *cached(f"{name}.attention", wiring, (), tensors=("kv.normed", "k.turned")),
        *concat_parts(f"{name}.q_cat", ("q.pass", "q.turned"), "q.rotated" if scaled else "q", QUERIES),
        *scaled,
        *expanded_keys(name),
        *sparse,
        *attend(f"{name}.attention", m, wiring._replace(caching=False), mask),
        ops.linear(f"{name}.o_proj", "o", "ao", "h", "a dv", group, bias),
        ops.release_names("q0", "kv.low", "kv.normed", "q.turned", "k.turned", "q", "k", "v", "o", x),
        *((ops.release_names("q.normed", "index.others", mask, *held),) if sparse else ()),
    )


def latent_queries(m: ModelSpec, name: str, x: str, bias: bool) -> tuple[Op, ...]:
    """Return the queries `q0`, projected from their narrow vector, if the config has one, or from x."""
    if not m.get("q_lora_rank"):
        return (ops.linear(f"{name}.q_proj", x, "q0", "a d", "h", "attention"),)
    return (
        ops.linear(f"{name}.q_a_proj", x, "q.low", "ql", "h", "attention", bias),
        *ops.rms_norm(f"{name}.q_a_layernorm", "q.low", "q.normed", "b s ql", "ql"),
        ops.release_names("q.low"),
        ops.linear(f"{name}.q_b_proj", "q.normed", "q0", "a d", "ql", "attention"),
    )


def expanded_keys(name: str) -> tuple[Op, ...]:
    """Return values, and keys joined from the heads' own part and the part that all heads share (`k.turned`)."""
    return (
        ops.linear(f"{name}.kv_b_proj", "kv.normed", "kv", "a dkv", "kl", "attention"),
        ops.view(f"{name}.kv_heads", "kv", "kv.heads", "b s a dkv", gradient="new"),
        ops.split(f"{name}.expand_kv", "kv.heads", (Tensor("k.pass", "b s a dn"), Tensor("v", _VALUES))),
        ops.view(f"{name}.k_expand", "k.turned", "k.shared", "b s a rot", gradient="new"),
        *_copied_key(name),
    )


def _copied_key(name: str) -> tuple[Op, ...]:
    """Return the key, joined from `k.pass` and `k.shared` in the values' dtype.

    Source: torch 2.13 torch/csrc/autograd/functions/tensor.cpp CopySlices::apply, CopyBackwards::apply.
    """
    source = "torch 2.13 torch/csrc/autograd/functions/tensor.cpp CopySlices"
    return (
        Op(
            f"{name}.copy_pass",
            ("k.pass",),
            (Tensor("k.begun", QUERIES, "=k.pass"),),
            scratch_back=(Scratch(Tensor("gradient of the whole", QUERIES, "=k.pass")),),
            gradient="own",
            source=source,
        ),
        Op(
            f"{name}.copy_rotated",
            ("k.begun", "k.shared"),
            (Tensor("k", QUERIES),),
            scratch_back=(Scratch(Tensor("zeros", "b s a rot", "=k.begun")),),
            gradient="own",
            view=True,
            source=source,
        ),
    )


def attend(name: str, m: ModelSpec, wiring: Wiring, mask: str, joined: bool = True) -> tuple[Op, ...]:
    """Attend with q, k and v to get `o`. `joined`: queries were concatenated, so they are contiguous head by head.

    Flash attention, available only if values are as wide as keys, writes its output in the layout of its input.
    """
    same_width = m.head_widths[0] == m.head_widths[1]
    if mask != "mask":
        wiring = wiring._replace(backend=wiring.masked, padded=True)
    kernel = attention(name, "q", "k", "v", "o", wiring, False, mask=mask, width="d" if same_width else "dv")
    match wiring.masked if wiring.has_mask() else wiring.backend:
        case "flash" | "flash_2" if same_width:
            heads = attention(name, "q", "k", "v", "o.heads", wiring, False)
            return (*heads, ops.copy(f"{name}.contiguous", "o.heads", "o", QUERIES))
        case "eager" | "math":
            flat = (*((f"{name}.q_flat",) if joined else ()), f"{name}.k_flat")
            return tuple(
                ops.view(op.name, op.reads[0], op.writes[0].name, QUERIES) if op.name in flat else op for op in kernel
            )
        case _:
            return kernel
