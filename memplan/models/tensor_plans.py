"""How libraries divide a family's linear layers among tensor-parallel ranks, and the plans that families share.

Source: transformers 5.24 models/*/configuration_*.py base_model_tp_plan. All families divide embeddings and head by the
vocabulary (distributed/mixin.py init_parallel_plans, the classes' _tp_plan).
"""

from __future__ import annotations

from typing import Any

from memplan.core.records import NamedTuple


class TensorParallelPlan(NamedTuple):
    """How transformers divides a family's linear layers, given by the last part of their names.

    columns     column parallel: each rank computes a part of the output, which stays divided
    rows        row parallel: each rank computes a partial sum of the output; an all-reduce adds them up
    gathered    like `columns`, but the output is gathered at once because something reads all of it
    split       like `rows`, but the input is replicated and each rank takes its slice
    experts     each rank has a part of every expert's width
    replicated  modules that are replicated on every rank, whatever their layers are called
    """

    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    gathered: tuple[str, ...] = ()
    split: tuple[str, ...] = ()
    experts: bool = False
    replicated: tuple[str, ...] = ()

    @property
    def heads(self) -> bool:
        """Whether each rank computes only some attention heads."""
        return not {"q_proj", "q_b_proj", "query_key_value", "c_attn", "qkv_proj", "linear_qkv", "attn"}.isdisjoint(
            self.columns
        )

    @property
    def width(self) -> bool:
        """Whether each rank computes only a part of the FFN's width."""
        return not {"down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "linear_fc2", "proj"}.isdisjoint(self.rows)


QKV, GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
LLAMA = TensorParallelPlan((*QKV, *GATED), ("o_proj", "down_proj"))
MIXTURE = LLAMA._replace(experts=True)
EXPERTS = TensorParallelPlan(experts=True)
GATHERED = TensorParallelPlan((), (), QKV, ("o_proj",), experts=True)
OLMO_2 = TensorParallelPlan(GATED, ("down_proj",), QKV, ("o_proj",))
GLM = TensorParallelPlan(QKV, ("o_proj",), ("gate_up_proj",), ("down_proj",))
FFN = TensorParallelPlan(GATED, ("down_proj",), experts=True)
LATENT = TensorParallelPlan(("q_proj", "q_b_proj", "kv_b_proj", *GATED), ("o_proj", "down_proj"))
LATENT_EXPERTS = LATENT._replace(experts=True)
_DELTA = ("in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
LLAMA_DELTA, MIXTURE_DELTA = LLAMA._replace(gathered=_DELTA), MIXTURE._replace(gathered=_DELTA)
# Megatron-core fuses q, k and v into one projection, with rows ordered by query group, and gate and up into another.
GLM_MEGATRON = TensorParallelPlan((*QKV, "gate_up_proj"), ("o_proj", "down_proj"))
# What Megatron-Bridge makes of families as Megatron-core's GPT. Source: megatron-bridge 0.3.1 models/*/*_bridge.py
# provider_bridge, models/conversion/model_bridge.py CONFIG_MAPPING.
GPT: dict[str, Any] = {
    "gated_mlp": True,
    "norm_type": "rmsnorm",
    "position_embedding_type": "rope",
    "use_bias": False,
    "hidden_dropout": 0.0,
    "create_attention_mask": False,
}
GPT_EXPERTS: dict[str, Any] = {**GPT, "moe_token_dispatcher_type": "alltoall", "moe_grouped_gemm": True}
