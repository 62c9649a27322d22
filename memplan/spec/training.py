"""Method, precision, optimizer, kernels, loop and side tasks of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import Field, model_validator

from memplan.core.errors import SpecError, UnknownNameError
from memplan.core.frozen import FrozenDict
from memplan.spec.base import Count, Dtype, Flag, Json, Names, Natural, Number, Part
from memplan.spec.formats import Quantization

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
