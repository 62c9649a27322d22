"""What serving engines store keys and values in, beside the model's own dtype: bytes of a head, and who has it.

A head's keys are `numbers` to a block of `bytes`, and some have a scale for every token and head. Names are the
engines' own (`--kv-cache-dtype`, `--cache-type-k`).
"""

from __future__ import annotations

from typing import NamedTuple

from memplan.core.units import ITEMSIZE


class Format(NamedTuple):
    """A format of a cache.

    numbers, bytes  so many numbers are stored in so many bytes, their scales among them
    scale           bytes of a scale of each token and head, of keys and of values apart
    engines         profiles that have it
    capability      the least compute capability of an NVIDIA card, in tenths
    latent          whether a latent may be stored in it
    """

    name: str
    numbers: int
    bytes: int
    engines: tuple[str, ...]
    source: str
    scale: int = 0
    capability: int = 0
    latent: bool = True

    def head(self, width: int) -> int:
        """Bytes of so many numbers of one token and head."""
        return -(-width // self.numbers) * self.bytes + self.scale


_NEW, _OLD = "vllm-0.33", "vllm-0.11"
_SGLANG, _TGI, _GGML = "sglang-0.5", "tgi-3", "llama.cpp-2026"
_EIGHT = "one scale for all: vllm 0.33.0 config/cache.py CacheDType; sglang 0.5.23 mem_cache/kv_cache_dtype.py"
_TRITON = "vllm 0.33.0 v1/attention/backends/triton_attn.py TritonAttentionBackend.customize_spec"
_BLOCKS = "llama.cpp ggml/src/ggml-common.h, common/arg.cpp kv_cache_types"
_FOUR = "sglang 0.5.23 layers/quantization/fp4_kv_cache_quant_method.py compute_cell_size"

FORMATS = (
    Format("bf16", 1, ITEMSIZE["bf16"], (_NEW, _OLD, _SGLANG, _TGI, _GGML), "two bytes a number"),
    Format("fp16", 1, ITEMSIZE["fp16"], (_NEW, _OLD, _SGLANG, _TGI, _GGML), "two bytes a number"),
    Format("fp32", 1, ITEMSIZE["fp32"], (_NEW, _OLD, _SGLANG, _TGI, _GGML), "four bytes a number"),
    Format("fp8", 1, 1, (_NEW, _OLD, _SGLANG, _TGI), _EIGHT),
    Format("fp8_e4m3", 1, 1, (_NEW, _OLD, _SGLANG), _EIGHT),
    Format("fp8_e5m2", 1, 1, (_NEW, _OLD, _SGLANG, _TGI), _EIGHT),
    Format("fp8_e4m3fn", 1, 1, (_TGI,), "TGI's documentation, launcher: --kv-cache-dtype"),
    Format("int8_per_token_head", 1, 1, (_NEW,), _TRITON, scale=4, latent=False),
    Format("fp8_per_token_head", 1, 1, (_NEW,), _TRITON, scale=4, latent=False),
    Format("int4_per_token_head", 2, 1, (_NEW,), _TRITON, scale=4, latent=False),
    Format(
        *("nvfp4", 16, 9, (_NEW, _SGLANG)),
        f"vllm 0.33.0 utils/torch_utils.py nvfp4_kv_cache_full_dim; {_FOUR}",
        capability=100,
        latent=False,
    ),
    Format("fp4_mx_block16", 16, 9, (_SGLANG,), _FOUR, capability=100),
    Format("mxfp8", 32, 33, (_SGLANG,), "sglang 0.5.23 model_executor/pool_configurator.py _compute_cell_size"),
    Format("q8_0", 32, 34, (_GGML,), _BLOCKS),
    Format("q5_1", 32, 24, (_GGML,), _BLOCKS),
    Format("q5_0", 32, 22, (_GGML,), _BLOCKS),
    Format("q4_1", 32, 20, (_GGML,), _BLOCKS),
    Format("q4_0", 32, 18, (_GGML,), _BLOCKS),
    Format("iq4_nl", 32, 18, (_GGML,), _BLOCKS),
)

_BY_NAME = {one.name: one for one in FORMATS}


def cache_format(name: str) -> Format:
    """The format of that name."""
    return _BY_NAME[name]


def formats_of(engine: str) -> tuple[str, ...]:
    """The names of an engine's formats."""
    return tuple(one.name for one in FORMATS if engine in one.engines)
