"""Numbers of a model as it is built: its parameters, those a token meets, and how many positions it knows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

# What configs call the number of experts, and of those that a token is sent to.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k")


def parameters(base: Any) -> tuple[int, int | None]:
    """Parameters of transformers' model without adapters, and of those the ones that a token meets: of experts as many
    as it is sent to. None for the latter where the config does not say how many those are."""
    total = of_experts = 0
    for name, parameter in base.named_parameters():
        if "lora_" in name or ".modules_to_save." in name:
            continue
        state = getattr(parameter, "quant_state", None)
        number = math.prod(state.shape) if state is not None else parameter.numel()
        total += number
        of_experts += number if "experts" in name.split(".") else 0
    if not of_experts:
        return total, total
    config = base.config.get_text_config()
    experts, chosen = (next(filter(None, _ints(config, names)), None) for names in (_EXPERTS, _CHOSEN))
    if experts is None or chosen is None or of_experts % experts:
        return total, None
    return total, total - of_experts + of_experts // experts * min(chosen, experts)


def _ints(config: Any, names: tuple[str, ...]) -> Iterator[int]:
    found = (getattr(config, name, None) for name in names)
    return (value for value in found if isinstance(value, int))


def positions(model: Any) -> Iterator[tuple[str, int]]:
    """Tables of learned positions of text by name, and how many tokens they have a row for: no longer sequence runs.

    Some have rows of no position before the others: `offset` of them, or up to the padding's.
    """
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        learned = ("position" in last and "rel" not in last) or last == "wpe"
        if not isinstance(module, nn.Embedding) or not learned or _OF_OTHER_THINGS.search(name):
            continue
        padding = module.padding_idx if type(module) is nn.Embedding else None
        before: int = getattr(module, "offset", 0 if padding is None else padding + 1)
        yield last, module.num_embeddings - before


_OF_OTHER_THINGS = re.compile(r"vision|visual|image|video|audio|speech|encoder")
