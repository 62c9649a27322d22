"""What the user says: a run, in Hugging Face's words. Frozen, hashable, and the same in Python, JSON and YAML."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from memplan.errors import SpecError, UnknownNameError
from memplan.objectives import Objective

Dtype = Literal["bf16", "fp16", "fp32"]
MethodKind = Literal["full", "freeze", "lora", "qlora", "dora", "qdora"]

# The other methods of peft 0.21, by its names in small letters: known, and not supported yet.
LATER_METHODS = frozenset(
    (
        *("adalora", "adamss", "adaption_prompt", "beft", "boft", "c3a", "cartridge", "cpt", "deft", "delora"),
        *("fourierft", "frod", "glora", "gralora", "hira", "hra", "ia3", "lily", "ln_tuning", "loha", "lokr", "miss"),
        *("multitask_prompt_tuning", "oft", "osf", "p_tuning", "peanut", "poly", "prefix_tuning", "prompt_tuning"),
        *("psoft", "pvera", "randlora", "road", "shadow", "shira", "supertuning", "tinylora", "trainable_tokens"),
        *("unilora", "vblora", "vera", "waveft", "xlora"),
    )
)

_MOST = 2**40  # no batch, sequence or rank is larger: absurd input must not become an absurd answer
Count = Annotated[int, Field(ge=1, le=_MOST, strict=True)]
Natural = Annotated[int, Field(ge=0, le=_MOST, strict=True)]
GPUs = Annotated[int, Field(ge=1, le=2**20, strict=True)]  # more than any cluster has
Rank = Annotated[int, Field(ge=0, lt=2**20, strict=True)]  # one of them, counted from 0
Pixels = Annotated[int, Field(ge=1, le=2**20, strict=True)]
Number = Annotated[float, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]

# A framework without a version is the newest that is read.
NEWEST = {
    "transformers": "transformers-5",
    "trl": "trl-0.24",
    "axolotl": "axolotl-0.12",
    "llamafactory": "llamafactory-0.9",
    "unsloth": "unsloth-2025",
    "litgpt": "litgpt-2024",
    "vllm": "vllm-0.33",
    "sglang": "sglang-0.5",
    "tgi": "tgi-3",
    "llama.cpp": "llama.cpp-2026",
}


def _versioned(name: str) -> str:
    return NEWEST.get(name.lower(), name)


ProfileName = Annotated[str, AfterValidator(_versioned)]


def frozen(value: Any) -> Any:
    """Lists become tuples, mappings FrozenDicts, all the way down."""
    if value is None or isinstance(value, (str, int, float)):  # first, as asking whether it is a Mapping is slow
        return value
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value)
        return FrozenDict({str(k): frozen(v) for k, v in items.items()})
    if isinstance(value, (list, tuple)):
        return tuple(frozen(v) for v in cast(tuple[Any, ...], value))
    return value


class FrozenDict(dict[str, Any]):
    """A mapping that cannot change and can be hashed, for the parts of a spec that are free-form JSON.

    Equal only to a mapping whose values have the same types. Answers are cached by equality, and of the sizes 2, 2.0
    and True one is answered and two are refused.
    """

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(frozenset(self.items()))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, dict) or not super().__eq__(cast(dict[str, Any], other)):
            return False
        for a, b in zip(self.values(), map(cast(dict[str, Any], other).__getitem__, self), strict=True):
            if a is not b and (type(a) is not type(b) or (type(a) is tuple and not _same_types(a, b))):
                return False
        return True

    def __ne__(self, other: object) -> bool:
        return not self == other

    def _refuse(self, *_: object, **__: object) -> Any:
        raise TypeError("a FrozenDict cannot be changed")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse  # pyright: ignore[reportAssignmentType]

    def __copy__(self) -> FrozenDict:
        return self

    def __deepcopy__(self, memo: object) -> FrozenDict:
        return self

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[str, Any]]]:
        return FrozenDict, (dict(self),)


def _same_types(a: Any, b: Any) -> bool:
    """Whether equal values have the same types, all the way down. Mappings inside have compared theirs already."""
    return type(a) is type(b) and (not isinstance(a, tuple) or all(map(_same_types, cast(tuple[Any, ...], a), b)))


def _json(value: dict[str, Any]) -> FrozenDict:
    """A frozen copy of what JSON can hold. Raises ValueError for anything else."""

    def check(inner: Any, depth: int) -> None:
        if depth > _DEEPEST:
            raise ValueError(f"is nested more than {_DEEPEST} deep")
        if inner is None or isinstance(inner, (str, int)):
            return
        if isinstance(inner, float):
            if not isfinite(inner):
                raise ValueError(f"holds {inner}, which JSON cannot")
        elif isinstance(inner, (Mapping, list, tuple)):
            items = cast(Mapping[str, Any], inner).values() if isinstance(inner, Mapping) else cast(list[Any], inner)
            for item in items:
                check(item, depth + 1)
        else:
            raise ValueError(f"holds a {type(inner).__name__}, which JSON cannot")

    check(value, 0)
    return frozen(value)


def _ordered(value: Any) -> Any:
    """A set as a sorted list: it has no order of its own, and equal runs are to have equal JSON."""
    return sorted(cast(set[str], value), key=str) if isinstance(value, (set, frozenset)) else value


_DEEPEST = 64
Json = Annotated[dict[str, Any], AfterValidator(_json)]
Names = Annotated[tuple[str, ...], BeforeValidator(_ordered)]


class Part(BaseModel, frozen=True):
    """Base of every part of a run: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


# Formats that adapters train over; formats that a model only runs in; llama.cpp's types of GGUF files.
TrainedOver = Literal["nf4", "fp4", "int8", "gptq-int4", "gptq-int8", "awq-int4", "fp8"]
OnlyRuns = Literal[
    "fp8-tensor",
    "fp8-channel",
    "w8a8-int8",
    "w4a16",
    "w8a16",
    "mxfp4",
    "mxfp8",
    "nvfp4",
    "torchao-int8",
    "torchao-int4",
    "hqq-int4",
    "quanto-int8",
    "quanto-int4",
]
GgufType = Literal[
    "F32",
    "F16",
    "BF16",
    "Q1_0",
    "Q2_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q2_K_S",
    "Q3_K_S",
    "Q3_K_M",
    "Q3_K_L",
    "Q4_K_S",
    "Q4_K_M",
    "Q5_K_S",
    "Q5_K_M",
    "Q6_K",
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ2_M",
    "IQ3_XXS",
    "IQ3_XS",
    "IQ3_S",
    "IQ3_M",
    "IQ4_NL",
    "IQ4_XS",
    "TQ1_0",
    "TQ2_0",
    "MXFP4_MOE",
]
Format = Literal[TrainedOver, OnlyRuns, GgufType]
# Kernels of GPTQ's and AWQ's weights, and what runs those of formats that nothing trains over (catalogue/running.py).
Packed = Literal["", "exllama_v1", "exllama_v2", "cuda_old", "gemm"]
Runs = Literal["decompressed", "scaled_mm", "fbgemm", "torchao", "quanto", "triton", "dequantised"]
Backend = Literal[Packed, Runs]
_FORMATS: dict[str, str] = {name.lower(): name for name in get_args(Format)}
# Weights that share a scale, where a run says no other number: what the formats' own libraries make.
# Source: transformers 5.24 utils/quantization_config.py GPTQConfig, AwqConfig; torchao 0.18; compressed-tensors 0.20.
_GROUPS = {
    "fp8": 128,
    "gptq-int4": 128,
    "gptq-int8": 128,
    "awq-int4": 128,
    "w4a16": 128,
    "w8a16": 128,
    "mxfp4": 32,
    "mxfp8": 32,
    "nvfp4": 16,
    "torchao-int4": 128,
    "quanto-int4": 128,
}


def _named(value: Any) -> Any:
    """A format by its own name, in any case: `gguf:q4_k_m` is `Q4_K_M`."""
    if not isinstance(value, str):
        return value
    lowered = value.strip().lower()
    known = _FORMATS.get(lowered.removeprefix("gguf:")) or _FORMATS.get(lowered.replace("_", "-"))
    alias = _FORMATS.get(f"{lowered.removeprefix('gguf:')}_m") if lowered.endswith("_k") else None
    return known or alias or value.strip().removeprefix("gguf:")


class Quantization(Part, frozen=True):
    """How the frozen base weights are stored. Hugging Face's `BitsAndBytesConfig`, in shorter words.

    A `block_size` of -1 is GPTQ's and AWQ's group_size of -1: one scale a column. FP8 has squares of 128. The other
    formats that a model only runs in have groups of their own, and types of GGUF files none that can be said. `backend`
    is the kernel that weights run with, where a format has several or makes something beside its output.
    """

    format: Annotated[Format, BeforeValidator(_named)] = "nf4"
    double_quant: Flag = True
    block_size: Literal[-1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    storage: Literal["uint8", "bf16", "fp16", "fp32"] = "uint8"
    skip: Names | None = None
    kbit_preparation: Literal[True, False, "trl"] | None = None
    backend: Backend | None = None

    @model_validator(mode="before")
    @classmethod
    def _squares(cls, value: Any) -> Any:
        """A format's own size of blocks, where none is said."""
        if not isinstance(value, Mapping):
            return value
        given = dict(cast(Mapping[str, Any], value))
        size = _GROUPS.get(_named(given.get("format", "")))
        return {"block_size": size, **given} if size is not None else given


class Method(Part, frozen=True):
    """What trains. `targets` are module or role names, or `all-linear`; `rank` to `quantization` are for adapters.

    `frozen` are parts of a vision-language model that neither train nor are adapted.
    """

    kind: MethodKind = "full"
    rank: Count = 16
    alpha: Annotated[Number, Field(gt=0)] | None = None
    targets: Literal["all-linear"] | Names = "all-linear"
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    modules_to_save: Names = ()
    adapter_dtype: Dtype | None = None
    trainable_layers: Count = 2
    frozen: Names = ()
    quantization: Quantization | None = None
    options: Json = Field(default_factory=FrozenDict)

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        """A word is the kind; `qlora` and `qdora` quantise, to NF4 unless something else is said."""
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping):
            return value
        given = dict(cast(Mapping[str, Any], value))
        kind = given.get("kind")
        if kind in ("forward", "generate"):
            raise SpecError(f"method.kind: {kind!r} is a task, not a method: write it as the run's task", "method.kind")
        if isinstance(kind, str) and kind.lower().replace("-", "_") in LATER_METHODS:
            supported = ", ".join(get_args(MethodKind))
            raise SpecError(f"method.kind: {kind!r} is not supported yet; supported: {supported}", "method.kind")
        if kind in ("qlora", "qdora") and given.get("quantization") is None:
            given["quantization"] = {}
        return given


class Precision(Part, frozen=True):
    """`weights` is the dtype the model is loaded in, `compute` what autocast or 4-bit layers compute in.

    `grads` and `master` (and the states with it) differ from `weights` in mixed precision as Megatron and DeepSpeed
    mean it. The words `pure`, `amp` and `mixed` are accepted for the whole, a dtype for pure precision in it.
    """

    weights: Dtype = "bf16"
    compute: Dtype | Literal["fp8", "float8"] | None = None
    autocast: Flag = False
    grads: Dtype | None = None
    master: Dtype | None = None

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return precision_of(value) if isinstance(value, str) else value


PRECISIONS = ("pure", "amp", "mixed", "bf16", "fp16", "fp32")


def precision_of(word: str, dtype: str = "bf16") -> dict[str, Any]:
    """The fields of `Precision` that `pure`, `amp`, `mixed` or a dtype mean.

    Raises SpecError for `mixed` of fp32, UnknownNameError for another word.
    """
    match word:
        case "amp":  # over fp32 weights anyway, so fp32 names no dtype to compute in
            return {"weights": "fp32", "compute": "bf16" if dtype == "fp32" else dtype, "autocast": True}
        case "mixed":
            if dtype == "fp32":
                raise SpecError("precision: mixed keeps bf16 or fp16 weights beside fp32 ones, not fp32", "precision")
            return {"weights": dtype, "grads": dtype, "master": "fp32"}
        case "pure":
            return {"weights": dtype}
        case "bf16" | "fp16" | "fp32":
            return {"weights": word}
        case _:
            raise UnknownNameError("precision", word, PRECISIONS)


class Optimizer(Part, frozen=True):
    """`name` as in transformers' `OptimizerNames`, or `none`. `foreach` and `state_dtype` override its defaults."""

    name: str | None = None
    state_dtype: Dtype | None = None
    foreach: Flag | None = None
    in_backward: Flag = False
    momentum: Annotated[Number, Field(ge=0, lt=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class Batch(Part, frozen=True):
    """`micro` sequences of `sequence` tokens per GPU and pass, `accumulation` passes per step. In generation they are
    prompts, and `new_tokens` follow each: 256 where none are asked for.

    Each sequence has `images` of `image_size` pixels, a side or height and width; their tokens are part of `sequence`.
    Of an encoder-decoder `sequence` is what the encoder reads, and the decoder is given `target_sequence` tokens: by
    default as many, or as many as it has positions for. To generate it begins with those: with one by default, Whisper
    with four. What an encoder of images or recordings reads is fixed by its config.
    """

    micro: Count = 1
    sequence: Count = 2048
    accumulation: Count = 1
    new_tokens: Natural = 0
    images: Natural = 0
    image_size: Pixels | tuple[Pixels, Pixels] | None = None
    target_sequence: Count | None = None


class Kernels(Part, frozen=True):
    """Which implementations run. `reentrant`: torch's reentrant kind of checkpointing, which recomputes a whole block
    before any of its backward; a block's gradient and output stay until that is done. Checkpointing `offload` is `full`
    with the blocks' inputs in host memory."""

    attention: Literal["sdpa", "flash_attention_2", "eager", "sdpa_math", "sdpa_efficient"] = "sdpa"
    checkpointing: Literal["none", "full", "selective", "offload"] | None = None
    reentrant: Flag | None = None
    loss: Literal["hf", "chunked", "fused", "chunked_lm_head"] | None = None
    fused: tuple[Literal["rope", "rms_norm", "swiglu", "cross_entropy", "lora"], ...] | None = None
    compile: Flag = False


class Loop(Part, frozen=True):
    """What the training script does around the step.

    `use_cache` takes no memory in training: what it would hold is kept for backward anyway, or the model has it off
    under checkpointing. Where nothing trains it is on unless said otherwise, and a decoder's one pass returns its
    cache. `trainer`: transformers' Trainer drives it, which keeps the states of embeddings in fp32 under bitsandbytes'
    8-bit optimizers. `hold_outputs`: a name of the script's keeps the model's outputs through the
    backward pass, or, with the word `step`, through the optimizer's step too. `expandable_segments`: torch's allocator
    has them (PYTORCH_CUDA_ALLOC_CONF).
    """

    hold_outputs: Flag | Literal["step"] = False
    padded: Flag = False
    use_cache: Flag | None = None
    clip_grad_norm: Annotated[Number, Field(ge=0)] | None = 1.0
    grad_scaler: Flag = False
    trainer: Flag = False
    expandable_segments: Flag = False


class Offload(Part, frozen=True):
    """What lives on the host between uses. `activations` are all tensors that autograd saves in a forward pass, as
    under torch's `save_on_cpu`; the inputs of checkpointed layers alone are `kernels.checkpointing` `offload`."""

    parameters: Flag = False
    optimizer: Flag = False
    activations: Flag = False


def _whole(value: Any) -> Any:
    """5e8, as DeepSpeed's configs have it, is a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Elements = Annotated[Count, BeforeValidator(_whole)]
Fewest = Annotated[Natural, BeforeValidator(_whole)]
Auto = Literal["auto"]


class OffloadedOptimizer(Part, frozen=True):
    """DeepSpeed's `offload_optimizer`. `buffer_count` are the pinned buffers of what lies on NVMe, of a sub-group
    each."""

    device: Literal["cpu", "nvme"] = "cpu"
    pin_memory: Flag = True
    buffer_count: Count = 4


class OffloadedParameters(Part, frozen=True):
    """DeepSpeed's `offload_param`. Beside NVMe, `buffer_count` pinned buffers of `buffer_size` numbers are in host
    memory, and the first `max_in_cpu` numbers of the weights themselves."""

    device: Literal["cpu", "nvme"] = "cpu"
    pin_memory: Flag = True
    buffer_count: Count = 5
    buffer_size: Elements = 100_000_000
    max_in_cpu: Fewest = 1_000_000_000


class Zero(Part, frozen=True):
    """DeepSpeed's `zero_optimization`, by its own keys and with its own defaults (0.19.8 runtime/zero/config.py).

    Sizes are in numbers, not bytes. `auto` is what transformers' Trainer makes of the hidden size. `overlap_comm` is
    on at stage 3 where it is not said. `allgather_bucket_size` takes no memory: weights are gathered in place.
    `zero3_init_flag`, as accelerate calls it: at stage 3 every weight is divided as it is loaded; without it each rank
    loads the whole model, and divides that on its GPU. What is offloaded is said by `parallelism.offload`; how, here.
    """

    reduce_bucket_size: Elements | Auto = 500_000_000
    allgather_bucket_size: Elements | Auto = 500_000_000
    stage3_prefetch_bucket_size: Fewest | Auto = 50_000_000
    stage3_param_persistence_threshold: Fewest | Auto = 100_000
    stage3_max_live_parameters: Fewest = 1_000_000_000
    stage3_max_reuse_distance: Fewest = 1_000_000_000
    sub_group_size: Elements = 1_000_000_000
    overlap_comm: Flag | None = None
    contiguous_gradients: Flag = True
    round_robin_gradients: Flag = False
    zero3_init_flag: Flag = True
    offload_optimizer: OffloadedOptimizer = OffloadedOptimizer()
    offload_param: OffloadedParameters = OffloadedParameters()


class Parallelism(Part, frozen=True):
    """`world` GPUs and how they divide the work; `gpus_per_node` of them share a host's memory (8 unless said). `etp`
    is `tp` where it is not said, as Megatron has it.

    `schedule` is how a pipeline's microbatches run; with `virtual_stages` 1F1B is interleaved. `first_stage_layers` and
    `last_stage_layers` are what those stages have of the layers, the others the rest in equal parts; or, with
    `ends_as_layers`, embeddings count as a layer there, and the head as one. `zero`: how DeepSpeed is configured,
    under the strategies zero1 to zero3. `context`: ranks that divide sequences (`cp`) pass keys and values around, or
    exchange heads for tokens (DeepSpeed's Ulysses). `expert_imbalance`: of ranks that divide experts (`ep`) and
    take all rows they are sent, the one that is sent most gets so many times the mean. `device_map`: how transformers
    places the modules of a model that is run on the GPUs of one process, or on the host; `stage` is one of them.

    Of FSDP: `shard_group` ranks divide the weights, and such groups are replicas (hybrid sharding; None for all ranks);
    without `reshard_after_forward` weights stay whole from forward to backward (SHARD_GRAD_OP; None: they do in a
    pipeline's stages, where they stay whole for a step); `forward_prefetch` and `backward_prefetch` say when FSDP1 asks
    for the next unit; with `cpu_ram_efficient_loading` one process of a node loads the checkpoint, and the others are
    sent what they have of it. Of DDP: with `bucket_view` gradients lie in the buckets, and a `static_graph` is the same
    in every step.
    """

    world: GPUs = 1
    dp: GPUs = 1
    tp: GPUs = 1
    pp: GPUs = 1
    cp: GPUs = 1
    context: Literal["ring", "ulysses"] = "ring"
    ep: GPUs = 1
    etp: GPUs | None = None
    expert_imbalance: Annotated[Number, Field(ge=1, le=2**20)] = 1.0
    virtual_stages: GPUs = 1
    sequence_parallel: Flag = False
    strategy: Literal["none", "ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp2", "megatron_dist_opt"] = "none"
    shard_group: GPUs | None = None
    reshard_after_forward: Flag | None = None
    forward_prefetch: Flag = False
    backward_prefetch: Literal["pre", "post", "none"] = "pre"
    cpu_ram_efficient_loading: Flag = True
    bucket_view: Flag = False
    static_graph: Flag = False
    offload: Offload = Offload()
    zero: Zero = Zero()
    gpus_per_node: GPUs | None = None
    stage: Rank | None = None
    schedule: Literal["1f1b", "gpipe", "device_map"] | None = None
    first_stage_layers: Count | None = None
    last_stage_layers: Count | None = None
    ends_as_layers: Flag | None = None
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None


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


class Evaluation(Part, frozen=True):
    """Evaluation between two steps, as transformers' Trainer runs it: forward passes of `micro` sequences
    (`per_device_eval_batch_size`) of `sequence` tokens each, as long as those of training where that is None.

    kept_batches   of so many batches the logits are kept on the GPU, as they are for `compute_metrics`, unless
                   `prediction_loss_only`; 0 for none. At most 32,768 are there at once: see `accumulation`
    accumulation   after so many batches they go to the host (`eval_accumulation_steps`)
    concatenates   those of a further batch are joined with those before (`eval_do_concat_batches`); else a list is kept
    preprocess     `preprocess_logits_for_metrics` keeps the likeliest token alone
    batch_metrics  each batch's go when its metrics are computed (`batch_eval_metrics`)
    new_tokens     so many tokens are generated after each sequence (`predict_with_generate`)
    """

    micro: Count = 8
    sequence: Count | None = None
    kept_batches: Natural = 0
    accumulation: Count | None = None
    concatenates: Flag = True
    preprocess: Literal["argmax"] | None = None
    batch_metrics: Flag = False
    new_tokens: Natural = 0


class Saving(Part, frozen=True):
    """A checkpoint after a step. `state_dict`: `full` gathers whole weights, `sharded` has every rank write its part;
    None for full. `optimizer`: its states are written too, as they are in a checkpoint of the Trainer's."""

    state_dict: Literal["full", "sharded"] | None = None
    optimizer: Flag = True


class Merging(Part, frozen=True):
    """Adapters added to the weights they are beside, as peft's `merge_and_unload` does it: of the model that was
    `trained`, in its process; or of one `reloaded` for it on the GPU by another, in `dtype` and not quantised."""

    model: Literal["trained", "reloaded"] = "trained"
    dtype: Dtype | None = None

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value


class Also(Part, frozen=True):
    """What a training run does beside its steps, where it is to be counted: evaluate, save, merge its adapters."""

    evaluation: Evaluation | None = None
    saving: Saving | None = None
    merging: Merging | None = None


CacheDtype = Literal[
    "auto",
    "bf16",
    "fp16",
    "fp32",
    "fp8",
    "fp8_e4m3",
    "fp8_e5m2",
    "fp8_e4m3fn",
    "int8_per_token_head",
    "fp8_per_token_head",
    "int4_per_token_head",
    "nvfp4",
    "fp4_mx_block16",
    "mxfp8",
    "q8_0",
    "q5_1",
    "q5_0",
    "q4_1",
    "q4_0",
    "iq4_nl",
]


class Serving(Part, frozen=True):
    """How a serving engine is started (profiles `vllm-...`, `sglang-...`, `tgi-...`, `llama.cpp-...`).

    None is the engine's own default. A request is `batch.sequence` and `batch.new_tokens` together (256 of those where
    none are asked for), and `batch.micro` of them at once are to fit.

    weights                 what the weights are stored in, by name (`memplan.catalogue.storage`, or a GGUF type); None
                            for `method.quantization`, or as the checkpoint is stored
    max_model_len           the most tokens of a request that the engine admits; None for as many as the model has
                            positions for, and of llama.cpp for those of the run's requests
    max_num_seqs            requests in one step; of llama.cpp its parallel slots
    max_num_batched_tokens  tokens in one step: vLLM's word; SGLang's `chunked_prefill_size`, TGI's
                            `max_batch_prefill_tokens`, llama.cpp's `ubatch`
    memory_utilization      the share of the card it takes: `gpu_memory_utilization`, `mem_fraction_static`,
                            `cuda_memory_fraction`
    block_size              tokens of a block of the pool, or of a page
    cache_dtype             what keys and values are stored in; `auto` is the model's dtype
    cuda_graphs             steps of few tokens are recorded and replayed
    prefix_caching          blocks of requests that are over are kept for those that begin alike
    hybrid_cache            layers with a window keep that alone, where the engine can
    gpu_layers              of llama.cpp: the layers in the card's memory, from the last; one more is the head
    flash_attention         of llama.cpp: scores are not written out
    split_mode              of llama.cpp on several cards: `layer` lays whole layers on each, `none` all on one of them
    tensor_split            of llama.cpp: in which proportions cards have layers; None for equal parts
    main_gpu                of llama.cpp: the card that has all under split_mode `none`, the first is 0
    dp_attention            of SGLang: the `dp` groups of ranks share one model's experts, MLPs and head, and only
                            attention is theirs alone; without it they are replicas
    limit_images, limit_videos
                            how many of them a request may have (vLLM's `limit_mm_per_prompt`); None for any number. 0
                            of both: the tower is not there
    lora_slots, lora_rank   adapters that may be in one step, and the largest rank of them
    lora_cpu_slots          adapters that the host has (vLLM's `max_cpu_loras`); None for as many as there are slots
    speculative_method      what proposes tokens: `draft_model` (SGLang's STANDALONE), `eagle`, `eagle3`, `mtp` (NEXTN),
                            `ngram`; None for nothing, or a `draft_model` where one is said
    draft_model             the smaller model, or the config of EAGLE's head; `draft_weights` what it is stored in
    num_speculative_tokens  how many are proposed: SGLang's `speculative_num_draft_tokens`, llama.cpp's `draft-max`
    """

    weights: str | None = None
    max_model_len: Count | None = None
    max_num_seqs: Count | None = None
    max_num_batched_tokens: Count | None = None
    memory_utilization: Annotated[Number, Field(ge=0.001, le=1)] | None = None
    block_size: Count | None = None
    cache_dtype: CacheDtype | None = None
    cuda_graphs: Flag | None = None
    prefix_caching: Flag | None = None
    hybrid_cache: Flag | None = None
    gpu_layers: Natural | None = None
    flash_attention: Flag | None = None
    split_mode: Literal["layer", "none", "row", "tensor"] | None = None
    tensor_split: tuple[Annotated[Number, Field(ge=0, le=2**40)], ...] | None = None
    main_gpu: Rank | None = None
    dp_attention: Flag | None = None
    limit_images: Natural | None = None
    limit_videos: Natural | None = None
    lora_slots: Natural | None = None
    lora_rank: Count | None = None
    lora_cpu_slots: Natural | None = None
    speculative_method: Literal["draft_model", "eagle", "eagle3", "mtp", "ngram"] | None = None
    draft_model: str | InlineModel | None = None
    draft_weights: str | None = None
    num_speculative_tokens: Count | None = None


class RunSpec(Part, frozen=True):
    """A whole run. Words are accepted for parts: `method="qlora"`, `precision="amp"`, `optimizer="sgd"`.

    `objective` is what the model is trained for, its head and loss; None for what its config's `architectures` say.
    None is left to the profile (`memplan.catalogue.profiles`), which without a version is the newest of that framework;
    the answer's `run` holds what it decided.
    """

    if TYPE_CHECKING:  # what pydantic accepts is more than what the fields are

        def __init__(
            self,
            *,
            model: str | InlineModel | Mapping[str, Any],
            task: Literal["train", "forward", "generate"] = ...,
            objective: Objective | None = ...,
            method: Method | str | Mapping[str, Any] = ...,
            precision: Precision | str | Mapping[str, Any] = ...,
            optimizer: Optimizer | str | Mapping[str, Any] = ...,
            batch: Batch | Mapping[str, Any] = ...,
            kernels: Kernels | Mapping[str, Any] = ...,
            loop: Loop | Mapping[str, Any] = ...,
            generation: Generation | Mapping[str, Any] = ...,
            also: Also | Mapping[str, Any] = ...,
            parallelism: Parallelism | Mapping[str, Any] = ...,
            serving: Serving | Mapping[str, Any] = ...,
            profile: str = ...,
            gpu: str | None = ...,
        ) -> None: ...

    model: str | InlineModel
    task: Literal["train", "forward", "generate"] = "train"
    objective: Objective | None = None
    method: Method = Method()
    precision: Precision = Precision()
    optimizer: Optimizer = Optimizer()
    batch: Batch = Batch()
    kernels: Kernels = Kernels()
    loop: Loop = Loop()
    generation: Generation = Generation()
    also: Also = Also()
    parallelism: Parallelism = Parallelism()
    serving: Serving = Serving()
    profile: ProfileName = "transformers-5"
    gpu: str | None = None


def changed(run: RunSpec, part: str, **values: Any) -> RunSpec:
    """The run with some values of one part changed. Raises SpecError or pydantic's ValidationError for a bad one."""
    old: Part = getattr(run, part)
    return RunSpec.model_validate({**dict(run), part: {**dict(old), **values}})
