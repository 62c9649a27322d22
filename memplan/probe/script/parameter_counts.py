"""Counts of a built model: its parameters, those active per token, and its learned positions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

# Config keys for the number of experts, and the number of experts per token.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k")


def parameters(base: Any) -> tuple[int, int | None]:
    """Return the total and active parameters of transformers' model without adapters.

    Active parameters include only the experts that a token is sent to; None if the config does not give their number.
    """
    total = in_experts = 0
    for name, parameter in base.named_parameters():
        parts = name.split(".")  # peft's name of the adapter is also that of copies that modules_to_save trains
        if not {"default", "lora_A", "lora_B"}.isdisjoint(parts) or parts[-1].startswith("adaption_"):
            continue
        state = getattr(parameter, "quant_state", None)
        shape: Any = state.shape if state is not None else parameter.shape
        if name.endswith(".W_q"):  # of a layer of hqq
            shape = base.get_submodule(name.removesuffix(".W_q")).meta["shape"]
        count = math.prod(shape)
        total += count
        in_experts += count if "experts" in name.split(".") else 0
    if not in_experts:
        return total, total
    config = base.config.get_text_config()
    experts, per_token = (next(filter(None, _ints(config, names)), None) for names in (_EXPERTS, _EXPERTS_PER_TOKEN))
    if experts is None or per_token is None or in_experts % experts:
        return total, None
    return total, total - in_experts + in_experts // experts * min(per_token, experts)


def _ints(config: Any, names: tuple[str, ...]) -> Iterator[int]:
    values = (getattr(config, name, None) for name in names)
    return (value for value in values if isinstance(value, int))


def positions(model: Any) -> Iterator[tuple[str, int]]:
    """Yield the name of each table of learned text positions and the longest sequence it allows.

    Some tables start with rows that are not positions: `offset` rows, or those up to the padding index.
    """
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        learned = ("position" in last and "rel" not in last) or last == "wpe"
        if not isinstance(module, nn.Embedding) or not learned or _NOT_TEXT.search(name):
            continue
        padding = module.padding_idx if type(module) is nn.Embedding else None
        leading_rows: int = getattr(module, "offset", 0 if padding is None else padding + 1)
        yield last, module.num_embeddings - leading_rows


_NOT_TEXT = re.compile(r"vision|visual|image|video|audio|speech|encoder")
