"""DiffLlama: the same queries and keys attend to each half of the values' heads, and one result is subtracted.

Source: transformers 5.24 models/diffllama/modeling_diffllama.py.
"""

from __future__ import annotations

from memplan.catalogue.attention.attention import KEYS, QUERIES, attention, cached
from memplan.catalogue.decoder.attention import llama_attention
from memplan.catalogue.decoder.decoder import Decoder, decoder
from memplan.catalogue.decoder.frame import returned
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import renamed
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.errors import ConfigError
from memplan.core.ir import Keep, Op, Stack, Tensor, Weight
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_BOTH = "b s a 2 d"


def _share(name: str, half: str) -> tuple[Op, ...]:
    """Return the exponential of the product of two learned vectors, in the dtype of q."""
    a, b = (Weight(f"{name}.lambda_{t}{half}", "d", "attention") for t in "qk")
    product, total, exponential = (f"lambda{half}.{step}" for step in ("product", "sum", "exp"))
    return (
        Op(
            f"{name}.lambda_{half}",
            (),
            (Tensor(product, "d", f"={a.name}"),),
            (a, b),
            (Keep(a.name, b.name), Keep(b.name, a.name)),
            source=f"{ops.DERIVATIVES}: mul.Tensor",
        ),
        Op(f"{name}.sum_{half}", (product,), (Tensor(total, "", "fp32"),), source=f"{ops.DERIVATIVES}: sum.dim"),
        ops.release_names(product),
        ops.keeping_output(f"{name}.exp_{half}", total, exponential, "", "exp"),
        ops.release_names(total),
        ops.cast(f"{name}.cast_{half}", exponential, f"lambda{half}", "", "=q"),
        ops.release_names(exponential),
    )


def _minus(name: str, a: str, b: str, y: str, shape: str) -> tuple[Op, ...]:
    negative = f"{y}.negative"
    return (ops.view(f"{name}.minus", b, negative, shape, "new"), ops.add(name, a, negative, y, shape))


def _attend(
    name: str, q: str, k: str, v: str, y: str, wiring: Wiring, grouped: bool, sliding: bool, mask: str
) -> tuple[Op, ...]:
    """Attend to each half of v, repeated for all heads, and subtract a learned share of half the heads' outputs."""
    kernels: list[Op] = []
    for half in "12":
        value, out = f"{v}{half}", f"{y}{half}"
        plain = attention(f"{name}{half}", q, k, value, out, wiring._replace(caching=False), grouped, sliding, mask)
        own = {t.name for op in plain for t in op.writes} - {out} if half == "2" else set[str]()
        kernels += renamed(plain, {t: f"{t}.2" for t in own})
    halves = tuple(Tensor(f"{v}.half{half}", "b s k_half d") for half in "12")
    split = (
        ops.split(f"{name}.chunk_values", v, halves),
        *(ops.copy(f"{name}.repeat_{t}", f"{v}.half{t}", f"{v}{t}", KEYS, "new") for t in "12"),
        ops.release_names(*(t.name for t in halves)),
    )
    parts = (Tensor("attended1", QUERIES), Tensor("attended2", QUERIES))
    scaled, outer = "attended2.scaled", "self_attn"
    return (
        *cached(name, wiring, split, sliding, (k, v)),
        *kernels,
        *(ops.view(f"{name}.part_{t}", f"{y}{t}", f"{y}{t}.part", _BOTH) for t in "12"),
        ops.cat(f"{name}.cat", (f"{y}1.part", f"{y}2.part"), f"{y}.both", _BOTH),
        ops.split(f"{name}.chunk", f"{y}.both", parts),
        ops.release_names(f"{y}1", f"{y}2"),
        *_share(outer, "1"),
        *_share(outer, "2"),
        *_minus(f"{outer}.lambda", "lambda1", "lambda2", "difference", ""),
        ops.add_number(f"{outer}.lambda_init", "difference", "share", ""),
        ops.release_names("difference"),
        ops.spread(f"{name}.share", "attended2", "share", scaled, QUERIES, small_first=True)._replace(
            writes=(Tensor(scaled, QUERIES, "=attended2"),)  # a scalar promotes nothing
        ),
        *_minus(f"{name}.subtract", "attended1", scaled, f"{y}.less", QUERIES),
        Op(
            f"{outer}.groupnorm",
            (f"{y}.less",),
            (Tensor(f"{y}.normed", QUERIES), Tensor(f"{y}.rstd", "b s a_half", "fp32")),
            (),
            (Keep(f"{y}.less", f"{y}.less"), Keep(f"{y}.rstd", f"{y}.less")),
            autocast="fp32",
            source=f"{ops.DERIVATIVES}: _fused_rms_norm",
        ),
        ops.scale(f"{outer}.scale", f"{y}.normed", y, QUERIES),
        ops.release_names(f"{y}.normed", f"{y}.less"),
    )


def _attention(m: ModelSpec, wiring: Wiring, layer: Layer) -> tuple[Op, ...]:
    bias = m.get("attention_bias", False)
    heads = llama_attention(m, wiring, "n1", "ao", bias=bias, out_bias=bias, attend=_attend)
    held = ("v1", "v2", "attended1", "attended2", "lambda1", "lambda2", "share", *(f"{t}.2" for t in returned(wiring)))
    return (*heads, ops.release_names(*held))


def diffllama(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build DiffLlama. Its class refuses dropout in attention, and key heads that it cannot halve."""
    if m.probability("attention_dropout"):
        raise ConfigError("config: attention_dropout must be 0 for diffllama", "attention_dropout")
    if m.num_key_value_heads % 2:
        text = f"config: num_key_value_heads must be even for diffllama, not {m.num_key_value_heads}"
        raise ConfigError(text, "num_key_value_heads")
    return decoder(m, wiring, Decoder(attention=_attention))


BUILDERS = {"diffllama": diffllama}
