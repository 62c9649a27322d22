"""How tokens are generated."""

from __future__ import annotations

from typing import Literal

from memplan.spec.base import Count, Dtype, Flag, Json, Part
from memplan.spec.formats import Quantization


class CacheConfig(Part, frozen=True):
    """How a quantised cache stores keys and values, by the names of transformers' `QuantizedCache`.

    Of a backend that quantises in groups (quanto, hqq) a layer's keys have `nbits` a number, with a scale and a zero
    point for each `q_group_size` of them along `axis_key`, and so have its values along `axis_value`. The newest
    `residual_length` tokens stay as they are, until there are that many and all are quantised anew. `fp8` has one scale
    for a layer's keys and one for its values, and none of the other fields. None is the backend's own default.
    """

    backend: Literal["quanto", "hqq", "fp8"] = "quanto"
    nbits: Literal[1, 2, 3, 4, 8] | None = None
    axis_key: Literal[-1, 0, 1] | None = None
    axis_value: Literal[-1, 0, 1] | None = None
    q_group_size: Count | None = None
    residual_length: Count | None = None


class InlineModel(Part, frozen=True):
    """A model given by its config instead of by name, with Hugging Face's keys."""

    config: Json


class Generation(Part, frozen=True):
    """How tokens are generated, mostly by the names of transformers' `GenerationConfig`. The prompt is
    `batch.sequence`, and `batch.new_tokens` come after it.

    `cache_implementation` is what keeps keys and values: `dynamic` grows by a tensor of its own for every token, of one
    layer after the other; `legacy` does so of all layers, and lets the old ones go when it is done; `static` has room
    for the prompt and all new tokens from the start; `quantized` stores them as `cache_config` says; `offloaded` and
    `offloaded_static` (once `offloaded_hybrid`) keep them in host memory, but for the layer that runs and the next one.
    With `prefill_chunk_size` the prompt is read in passes of so many tokens. Of every prompt there are `num_beams`
    sequences. With `do_sample` tokens are drawn after temperature, top-k and top-p; else the likeliest is taken.

    In rounds of assisted generation `num_assistant_tokens` are proposed, which the model reads at once, and one more is
    its own: by `assistant_model`, whose weights are in `assistant_dtype` (the model's own, where that is None) and may
    be quantised by `assistant_quantization`; by the model's first `assistant_early_exit` layers; or, without another
    pass, `prompt_lookup_num_tokens` of what came before (prompt lookup). A round proposes at most 16,384.
    """

    cache_implementation: (
        Literal["dynamic", "static", "legacy", "quantized", "offloaded", "offloaded_static", "offloaded_hybrid"] | None
    ) = None
    cache_config: CacheConfig | None = None
    prefill_chunk_size: Count | None = None
    num_beams: Count = 1
    do_sample: Flag = False
    assistant_model: str | InlineModel | None = None
    assistant_dtype: Dtype | None = None
    assistant_quantization: Quantization | None = None
    num_assistant_tokens: Count | None = None
    num_assistant_tokens_schedule: Literal["constant", "heuristic", "heuristic_transient"] | None = None
    prompt_lookup_num_tokens: Count | None = None
    assistant_early_exit: Count | None = None

    @property
    def assisted(self) -> bool:
        """Whether tokens are proposed before the model is asked for them."""
        return bool(self.assistant_model or self.prompt_lookup_num_tokens or self.assistant_early_exit)
