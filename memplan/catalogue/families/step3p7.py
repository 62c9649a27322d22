"""Step-3.7: heads gated one by one, layers with and without a sliding window, a shared expert plus routed ones.

transformers loops over the experts that tokens selected. Here all have the same number of rows, and if there are many,
a group of experts counts as one.

Source: transformers 5.24 models/step3p7/modeling_step3p7.py.
"""

from __future__ import annotations

from memplan.catalogue.attention.attention import QUERIES, attention, mask_name
from memplan.catalogue.decoder.attention import project_heads
from memplan.catalogue.decoder.decoder import Decoder, decoder
from memplan.catalogue.decoder.frame import FULL
from memplan.catalogue.decoder.norms import gemma_norm
from memplan.catalogue.decoder.rotation import PHI3, partly_rotated
from memplan.catalogue.experts import expert_loops, experts, routers
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.vision.uncalled_towers import step_tower
from memplan.core.ir import Op, Stack, Tensor
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec


def _gate(name: str, gate: str, y: str, shape: str) -> tuple[Op, ...]:
    """`min(act(gate), limit)`. Without a limit the comparison is with infinity."""
    return (
        ops.activation(f"{name}.act_fn", gate, f"{y}.act", shape),
        ops.clamp(f"{name}.clamp_gate", f"{y}.act", f"{y}.gate", shape, 1),
        ops.release_names(f"{y}.act"),
    )


def _expert(name: str, x: str, y: str) -> tuple[Op, ...]:
    shape = f"{expert_loops.OF_A_GROUP} m"
    half, other = Tensor(f"{y}.half", shape), Tensor(f"{y}.other", shape)
    return (
        ops.split(f"{name}.chunk", x, (half, other)),
        *_gate(name, half.name, y, shape),
        ops.clamp(f"{name}.clamp_up", other.name, f"{y}.up", shape, 2),
        ops.mul(f"{name}.product", f"{y}.gate", f"{y}.up", y, shape),
        ops.release_names(f"{y}.gate", f"{y}.up"),
    )


def _mlp(x: str, y: str, bias: bool, name: str = "mlp", width: str = "f") -> tuple[Op, ...]:
    """Dense MLP. The gate is clamped before the other half is projected; both live until the function returns."""
    operations = (
        ops.linear(f"{name}.gate_proj", x, "gate", "f", "h", "mlp", bias),
        *_gate(name, "gate", "product", "b s f"),
        ops.linear(f"{name}.up_proj", x, "up", "f", "h", "mlp", bias),
        ops.clamp(f"{name}.clamp_up", "up", "product.up", "b s f", 2),
        ops.mul(f"{name}.product", "product.gate", "product.up", "product", "b s f"),
        ops.linear(f"{name}.down_proj", "product", y, "h", "f", "mlp", bias),
        ops.release_names("product.gate", "product.up", x),
    )
    return ops.with_axes(operations, {"f": width})


def _mixture(m: ModelSpec) -> tuple[Op, ...]:
    x, y, name, gate = "n2", "mo", "mlp", "mlp.gate"
    bias, number = m.get("mlp_bias", False), m.axes()["groups"]
    parts = expert_loops.in_stacks(f"{name}.experts", _expert)
    return (
        *_mlp(x, "shared", bias, f"{name}.shared_experts", "fs"),
        *routers.without_adapter_targets(routers.sigmoid_router(gate, x, f"{gate}.e_score_correction_bias")),
        *expert_loops.loop(x, "chosen", f"{name}.experts", [parts] * number, expert_loops.OF_A_GROUP),
        *experts.scaled_and_shared(name, x, y),
    )


def _heads(m: ModelSpec, wiring: Wiring, layer: Layer) -> tuple[Op, ...]:
    name, x, y = "self_attn", "n1", "ao"
    bias = m.get("attention_bias", False)
    operations = (
        *project_heads(name, x, bias, norm=gemma_norm),
        ops.linear(f"{name}.g_proj", x, "gates", "a", "h", "attention"),
        *partly_rotated(m, f"{name}.rope", "q1", "k1", PHI3),
        ops.release_names("q1", "k1"),
        *attention(f"{name}.attention", "q", "k", "v", "oh", wiring, True, layer.sliding, mask_name(layer.sliding)),
        routers.sigmoid(f"{name}.sigmoid", "gates", "gates.open", "b s a"),
        ops.spread(f"{name}.gate", "oh", "gates.open", "o", QUERIES),
        ops.release_names("oh", "gates.open"),
        ops.linear(f"{name}.o_proj", "o", y, "h", "a d", "attention", bias),
        ops.release_names("q", "k", "v", "o", "gates", x),
    )
    return ops.with_axes(operations, {"a": "aw"}) if layer.sliding else operations


def step3p7(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build the model as it reads a text: its vision tower is loaded, and not called."""
    return step_tower(m, decoder(m, wiring, _STEP))


_STEP = Decoder(
    attention=_heads,
    mlp=_mlp,
    mlp_bias="mlp_bias",
    experts=_mixture,
    norm=gemma_norm,
    local_table=True,
    masks=FULL,
)


BUILDERS = {"step3p7": step3p7}
