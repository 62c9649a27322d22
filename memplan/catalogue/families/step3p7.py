"""Step-3.7: heads gated one by one, layers with and without a sliding window, a shared expert plus routed ones.

transformers loops over the experts that tokens selected. Here all have the same number of rows, and if there are many,
a group of experts counts as one.

Source: transformers 5.24 models/step3p7/modeling_step3p7.py.
"""

from __future__ import annotations

from memplan.catalogue.attention.attention import attention, mask_name
from memplan.catalogue.decoder.frame import decoder_block, returned, runs
from memplan.catalogue.decoder.gemma_norm import rms_norm
from memplan.catalogue.decoder.rotation import rotate_part
from memplan.catalogue.decoder.windows import after, before, local, tables
from memplan.catalogue.experts import expert_loops, routers
from memplan.catalogue.families.gpt_oss import without_adapter_targets
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.vision.uncalled_towers import step_tower
from memplan.core.ir import Block, Keep, Op, Scratch, Stack, Tensor
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_Q, _K = "b s a d", "b s k d"


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


def _mlp(x: str, y: str, name: str, width: str, bias: bool) -> tuple[Op, ...]:
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


def _mixture(x: str, y: str, number: int, bias: bool, name: str = "mlp") -> tuple[Op, ...]:
    parts = expert_loops.in_stacks(f"{name}.experts", _expert)
    return (
        *_mlp(x, "shared", f"{name}.shared_experts", "fs", bias),
        *without_adapter_targets(routers.sigmoid_router(f"{name}.gate", x, f"{name}.gate.e_score_correction_bias")),
        *expert_loops.loop(x, "chosen", f"{name}.experts", [parts] * number, expert_loops.OF_A_GROUP),
        ops.scale(f"{name}.scale", "chosen", "experts.scaled", "b s h"),
        ops.release_names("chosen"),
        ops.add(f"{name}.add", "experts.scaled", "shared", y, "b s h"),
        ops.release_names("experts.scaled", "shared", *routers.HELD, x),
    )


def _heads(m: ModelSpec, wiring: Wiring, layer: Layer, x: str, y: str, name: str = "self_attn") -> tuple[Op, ...]:
    bias = m.get("attention_bias", False)
    operations = (
        ops.linear(f"{name}.q_proj", x, "q0", "a d", "h", "attention", bias),
        ops.view(f"{name}.q_heads", "q0", "qh", _Q),
        *rms_norm(f"{name}.q_norm", "qh", "q1", _Q, "d"),
        ops.release_names("qh"),
        ops.linear(f"{name}.k_proj", x, "k0", "k d", "h", "attention", bias),
        ops.view(f"{name}.k_heads", "k0", "kh", _K),
        *rms_norm(f"{name}.k_norm", "kh", "k1", _K, "d"),
        ops.release_names("kh"),
        ops.linear(f"{name}.v_proj", x, "v", "k d", "h", "attention", bias),
        ops.linear(f"{name}.g_proj", x, "gates", "a", "h", "attention"),
        *rotate_part(f"{name}.rope", partial=m.rotary_width < m.head_dim),
        ops.release_names("q1", "k1"),
        *attention(f"{name}.attention", "q", "k", "v", "oh", wiring, True, layer.sliding, mask_name(layer.sliding)),
        routers.sigmoid(f"{name}.sigmoid", "gates", "gates.open", "b s a"),
        Op(
            f"{name}.gate",
            ("oh", "gates.open"),
            (Tensor("o", _Q),),
            (),
            (Keep("gates.open", "oh"), Keep("oh", "gates.open")),
            scratch_back=(Scratch(Tensor("product", _Q, "=o"), "gates.open"),),
            source=f"{ops.DERIVATIVES}: mul.Tensor",
        ),
        ops.release_names("oh", "gates.open"),
        ops.linear(f"{name}.o_proj", "o", y, "h", "a d", "attention", bias),
        ops.release_names("q", "k", "v", "o", "gates", x),
    )
    return ops.with_axes(operations, {"a": "aw"}) if layer.sliding else operations


def step3p7(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build the model as it reads a text: its vision tower is loaded, and not called."""
    bias, number = m.get("mlp_bias", False), m.axes()["groups"]

    def block(layer: Layer) -> Block:
        ffn = _mixture("n2", "mo", number, bias) if layer.ffn == "experts" else _mlp("n2", "mo", "mlp", "f", bias)
        layer_block = decoder_block(_heads(m, wiring, layer, "n1", "ao"), ffn, norm=rms_norm, held=returned(wiring))
        return local(layer_block) if layer.sliding else layer_block

    has_sliding = any(layer.sliding for layer in m.layers)
    first = before(wiring, has_sliding, tables(has_sliding))
    return step_tower(m, Stack(first, runs(m, block), after(m, wiring, has_sliding, rms_norm, has_sliding)))


BUILDERS = {"step3p7": step3p7}
