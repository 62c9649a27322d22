"""Formats other than the model's dtype in which serving engines store keys and values, with their bytes and engines.

A head's keys are stored in blocks of `numbers` elements in `bytes` bytes; some formats have a scale per token and head.
Names are the engines' own (`--kv-cache-dtype`, `--cache-type-k`).
"""

from __future__ import annotations

from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE


class CacheFormat(NamedTuple):
    """A storage format of a KV cache.

    numbers     elements in one block
    bytes       bytes of one block, including its scales
    engines     profiles of the engines that support it
    scale       bytes of the scale of each token and head, for keys and for values separately
    capability  minimum compute capability of an NVIDIA GPU, times ten
    latent      whether a latent can be stored in it
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
        """Return the bytes of one token and head of `width` elements."""
        return -(-width // self.numbers) * self.bytes + self.scale


FIRST_VLLM = ("vllm-0.6", "vllm-0.7", "vllm-v0-0.8")  # of V0 only layers that cache all tokens were read
_NEW, _OLD = "vllm-0.33", "vllm-0.11"
_SGLANG, _TGI, _GGML = "sglang-0.5", "tgi-3", "llama.cpp-2026"
_EIGHT = "one scale for all: vllm 0.33.0 config/cache.py CacheDType; sglang 0.5.23 mem_cache/kv_cache_dtype.py"
_TRITON = "vllm 0.33.0 v1/attention/backends/triton_attn.py TritonAttentionBackend.customize_spec"
_BLOCKS = "llama.cpp ggml/src/ggml-common.h, common/arg.cpp kv_cache_types"
_FOUR = "sglang 0.5.23 layers/quantization/fp4_kv_cache_quant_method.py compute_cell_size"

FORMATS = (
    CacheFormat("bf16", 1, ITEMSIZE["bf16"], (_NEW, _OLD, *FIRST_VLLM, _SGLANG, _TGI, _GGML), "two bytes a number"),
    CacheFormat("fp16", 1, ITEMSIZE["fp16"], (_NEW, _OLD, *FIRST_VLLM, _SGLANG, _TGI, _GGML), "two bytes a number"),
    CacheFormat("fp32", 1, ITEMSIZE["fp32"], (_NEW, _OLD, *FIRST_VLLM, _SGLANG, _TGI, _GGML), "four bytes a number"),
    CacheFormat("fp8", 1, 1, (_NEW, _OLD, *FIRST_VLLM, _SGLANG, _TGI), _EIGHT),
    CacheFormat("fp8_e4m3", 1, 1, (_NEW, _OLD, *FIRST_VLLM, _SGLANG), _EIGHT),
    CacheFormat("fp8_e5m2", 1, 1, (_NEW, _OLD, *FIRST_VLLM, _SGLANG, _TGI), _EIGHT),
    CacheFormat("fp8_e4m3fn", 1, 1, (_TGI,), "TGI's documentation, launcher: --kv-cache-dtype"),
    CacheFormat("int8_per_token_head", 1, 1, (_NEW,), _TRITON, scale=4, latent=False),
    CacheFormat("fp8_per_token_head", 1, 1, (_NEW,), _TRITON, scale=4, latent=False),
    CacheFormat("int4_per_token_head", 2, 1, (_NEW,), _TRITON, scale=4, latent=False),
    CacheFormat(
        *("nvfp4", 16, 9, (_NEW, _SGLANG)),
        f"vllm 0.33.0 utils/torch_utils.py nvfp4_kv_cache_full_dim; {_FOUR}",
        capability=100,
        latent=False,
    ),
    CacheFormat("fp4_mx_block16", 16, 9, (_SGLANG,), _FOUR, capability=100),
    CacheFormat("mxfp8", 32, 33, (_SGLANG,), "sglang 0.5.23 model_executor/pool_configurator.py _compute_cell_size"),
    CacheFormat("q8_0", 32, 34, (_GGML,), _BLOCKS),
    CacheFormat("q5_1", 32, 24, (_GGML,), _BLOCKS),
    CacheFormat("q5_0", 32, 22, (_GGML,), _BLOCKS),
    CacheFormat("q4_1", 32, 20, (_GGML,), _BLOCKS),
    CacheFormat("q4_0", 32, 18, (_GGML,), _BLOCKS),
    CacheFormat("iq4_nl", 32, 18, (_GGML,), _BLOCKS),
)

_BY_NAME = {format_.name: format_ for format_ in FORMATS}


def cache_format(name: str) -> CacheFormat:
    """Return the format with that name."""
    return _BY_NAME[name]


def formats_of(engine: str) -> tuple[str, ...]:
    """Return the names of an engine's formats."""
    return tuple(format_.name for format_ in FORMATS if engine in format_.engines)
