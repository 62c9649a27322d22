"""Granite with windows: each head's output is scaled by how far its scores exceed a learned number, the head's sink.

Layers with a base of 0 are not rotated. Attention is eager: sdpa knows no sinks.

Source: transformers 5.24 models/granite_swa/modeling_granite_swa.py, models/granitemoe_swa/modeling_granitemoe_swa.py.
"""

from __future__ import annotations

from memplan.catalogue.attention.attention import QUERIES, SCORES, attention
from memplan.catalogue.decoder.decoder import Decoder, decoder
from memplan.catalogue.decoder.frame import BOTH
from memplan.catalogue.decoder.scaling import scaled_embeddings
from memplan.catalogue.experts import routers
from memplan.catalogue.families.dense import GRANITE
from memplan.catalogue.families.gpt_oss import SINKS
from memplan.catalogue.families.mixtures import granite_experts
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import renamed
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Keep, Op, Scratch, Stack, Tensor, Weight
from memplan.models.model import ModelSpec

_ROWS = "b a s"


def _attend(
    name: str, q: str, k: str, v: str, y: str, wiring: Wiring, grouped: bool, sliding: bool, mask: str
) -> tuple[Op, ...]:
    """Eager attention whose output is multiplied by the sigmoid of the scores' logarithmic sum less the sink."""
    kernel = attention(name, q, k, v, y, wiring, grouped, sliding, mask)
    x = "masked" if mask else "scaled"
    seen, last = (next(i for i, op in enumerate(kernel) if t in (t.name for t in op.writes)) for t in (x, y))
    like, exponents = f"={x}", Tensor("exponents", SCORES, f"={x}")
    weigh = (
        Op(
            f"{name}.logsumexp",
            (x,),
            (Tensor("sums", _ROWS, like),),
            (),
            (Keep(x, x), Keep("sums", x)),
            scratch=(exponents,),
            scratch_back=(Scratch(exponents), Scratch(Tensor("differences", SCORES, like))),
            source=f"{ops.DERIVATIVES}: logsumexp",
        ),
        ops.add_weight(f"{name}.less_sinks", "sums", "excess", _ROWS, SINKS),
        ops.cast(f"{name}.float", "excess", "excess32", _ROWS, "fp32"),
        routers.sigmoid(f"{name}.sigmoid", "excess32", "share32", _ROWS),
        ops.release_names("excess", "excess32"),
    )
    scale = (
        ops.cast(f"{name}.share", "share32", "share", _ROWS, "=heads"),
        ops.spread(f"{name}.scale", "heads", "share", "heads.scaled", QUERIES),
    )
    ends = renamed(kernel[last:], {"heads": "heads.scaled"})
    return (*kernel[: seen + 1], *weigh, *kernel[seen + 1 : last], *scale, *ends, ops.release_names("sums", "share32"))


def _unused_table() -> Op:
    """The rotary embedding that the class makes and does not call."""
    names = ("inv_freq", "original_inv_freq")
    buffers = tuple(Weight(f"model.rotary_embs.0.{n}", "rot2", "buffer", "fp32", False) for n in names)
    return Op("rotary_embs", weights=buffers, gradient="none")


_SWA = GRANITE._replace(attend=_attend, masks=BOTH, embedded=(*scaled_embeddings(), _unused_table()))


def granite_swa(m: ModelSpec, wiring: Wiring, row: Decoder = _SWA) -> Stack:
    """Build Granite with windows."""
    return decoder(m, wiring._replace(backend="eager", masked="eager"), row)


def granitemoe_swa(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Granite with windows and experts."""
    return granite_swa(m, wiring, _SWA._replace(experts=granite_experts))


BUILDERS = {"granite_swa": granite_swa, "granitemoe_swa": granitemoe_swa}
