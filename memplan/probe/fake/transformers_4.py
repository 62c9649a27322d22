"""Further patches for tracing with transformers 4.

transformers 4 imports flash-attn when its own modules are imported, asks the model's class whether it may use it, and
reads from the values of the position ids whether sequences are packed. All answer here as on a card with flash-attn and
unpacked sequences.
"""

from __future__ import annotations

import contextlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from memplan.probe.fake import attention
from memplan.probe.libraries import library

_AVAILABILITY_CHECKS = (
    "is_flash_attn_2_available",
    "is_flash_attn_greater_or_equal",
    "is_flash_attn_greater_or_equal_2_10",
)


def flash_attention() -> None:
    """Put flash-attn's two functions in the places where transformers 4 looks for them."""
    for module in (library("transformers.utils.import_utils"), library("transformers.utils")):
        for name in _AVAILABILITY_CHECKS:
            setattr(module, name, _true)
    package: Any = ModuleType("flash_attn")
    package.__spec__ = ModuleSpec("flash_attn", None)
    padding: Any = ModuleType("flash_attn.bert_padding")
    padding.index_first_axis = padding.pad_input = padding.unpad_input = None
    sys.modules |= {"flash_attn": package, "flash_attn.bert_padding": padding}
    flash = library("transformers.modeling_flash_attention_utils")
    for module in (package, flash):
        module.flash_attn_func = attention.flash_attn_func
        module.flash_attn_varlen_func = attention.flash_attn_varlen_func
    flash._flash_supports_window_size = True
    flash.is_flash_attn_greater_or_equal = _true
    flash._flash_attention_forward = _without_positions(flash._flash_attention_forward)
    with contextlib.suppress(Exception):  # since 4.48
        library("transformers.integrations.flash_attention")._flash_attention_forward = flash._flash_attention_forward
    library("transformers.modeling_utils").PreTrainedModel._check_and_enable_flash_attn_2 = classmethod(_enable)


def _true(*_: object, **__: object) -> bool:
    return True


def _enable(cls: object, config: Any, *_: object, **__: object) -> Any:
    config._attn_implementation = "flash_attention_2"
    return config


def _without_positions(forward: Any) -> Any:
    """Return transformers' function without position ids, whose values it would read to detect packed sequences."""

    def without(*args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return without
