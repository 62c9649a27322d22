"""Ernie 4.5: Llama with neighbouring dimensions rotated as pairs, in fp32."""

from __future__ import annotations

from memplan.catalogue.decoder.attention import llama_attention
from memplan.catalogue.decoder.frame import after, before, decoder_block, returned
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.decoder.rotation_fp32 import rope_in_fp32
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Run, Stack
from memplan.models.model import ModelSpec


def ernie(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Ernie 4.5. Its attention never applies dropout, whatever the config says."""
    bias, wiring = m.get("use_bias", False), wiring._replace(drops=False)
    block = decoder_block(
        llama_attention(m, wiring, "n1", "ao", bias=bias, out_bias=bias, turn=rope_in_fp32),
        gated_mlp("n2", "mo", bias=bias),
        held=returned(wiring),
    )
    return Stack(before(wiring, table_dtype="fp32"), (Run((block,), "L"),), after(m, wiring))


BUILDERS = {"ernie4_5": ernie}
