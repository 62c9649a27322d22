"""Settings of `generate`."""

from __future__ import annotations

from typing import Literal

from memplan.spec.base import Count, Dtype, Flag, Json, Part
from memplan.spec.formats import Quantization


class CacheConfig(Part):
    """How a quantised cache stores keys and values, with the names of transformers' `QuantizedCache`.

    None is the backend's own default. Backend `fp8` has one scale for a layer's keys and one for its values, and takes
    none of the other fields.

    backend          library that quantises
    nbits            bits per element
    axis_key         axis along which keys are grouped
    axis_value       axis along which values are grouped
    q_group_size     elements that share a scale and a zero point
    residual_length  newest tokens that stay unquantised; once there are this many, the whole cache is quantised again
    """

    backend: Literal["quanto", "hqq", "fp8"] = "quanto"
    nbits: Literal[1, 2, 3, 4, 8] | None = None
    axis_key: Literal[-1, 0, 1] | None = None
    axis_value: Literal[-1, 0, 1] | None = None
    q_group_size: Count | None = None
    residual_length: Count | None = None


class InlineModel(Part):
    """A model given by its config, with Hugging Face's keys, instead of by name."""

    config: Json


class Generation(Part):
    """How tokens are generated, mostly with the names of transformers' `GenerationConfig`.

    The prompt has `batch.sequence` tokens, followed by `batch.new_tokens`.

    cache_implementation           what stores keys and values:
        dynamic                    each new token reallocates them one layer at a time
        legacy                     each new token reallocates them in all layers before the old ones are freed
        static                     allocated at the start for the prompt and all new tokens
        quantized                  stored as `cache_config` says
        offloaded                  in host memory, except for the running layer and the next
        offloaded_static           static and offloaded; formerly `offloaded_hybrid`
    cache_config                   settings of a quantised cache
    prefill_chunk_size             prompt tokens per forward pass; None for the whole prompt
    num_beams                      sequences per prompt
    do_sample                      sample with temperature, top-k and top-p instead of taking the likeliest token
    assistant_model                smaller model that proposes tokens
    assistant_dtype                dtype of the assistant's weights; None for the model's
    assistant_quantization         how the assistant's weights are quantised
    num_assistant_tokens           tokens proposed per round, at most 16,384
    num_assistant_tokens_schedule  how that number changes from round to round
    prompt_lookup_num_tokens       tokens proposed per round by prompt lookup, which needs no other model
    assistant_early_exit           number of the model's first layers that propose tokens in place of an assistant
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
        """Whether generation is assisted: tokens are proposed for the model to check."""
        return bool(self.assistant_model or self.prompt_lookup_num_tokens or self.assistant_early_exit)
