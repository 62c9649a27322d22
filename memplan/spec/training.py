"""Method, precision, optimizer, kernels, loop and side tasks of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from memplan.core.errors import UnknownNameError, refused
from memplan.core.frozen import FrozenDict
from memplan.models.peft_methods import PEFT_METHODS, trains_prefix, virtual_tokens
from memplan.spec.base import Count, Dtype, Flag, Json, Names, Natural, Number, Part
from memplan.spec.checks import Strict
from memplan.spec.formats import Quantization

MethodKind = Literal[
    "full",
    "freeze",
    "lora",
    "qlora",
    "dora",
    "qdora",
    "adalora",
    "adamss",
    "adaption_prompt",
    "beft",
    "boft",
    "c3a",
    "cartridge",
    "cpt",
    "deft",
    "delora",
    "fourierft",
    "frod",
    "glora",
    "gralora",
    "hira",
    "hra",
    "ia3",
    "lily",
    "ln_tuning",
    "loha",
    "lokr",
    "miss",
    "multitask_prompt_tuning",
    "oft",
    "osf",
    "p_tuning",
    "peanut",
    "poly",
    "prefix_tuning",
    "prompt_tuning",
    "psoft",
    "pvera",
    "randlora",
    "road",
    "shadow",
    "shira",
    "supertuning",
    "tinylora",
    "trainable_tokens",
    "unilora",
    "vblora",
    "vera",
    "waveft",
    "xlora",
]

Attention = Literal[
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
    "eager",
    "sdpa_math",
    "sdpa_efficient",
    "sdpa_cudnn",
]
_ChunkedLoss = Literal["chunked_lm_head", "chunked_nll", "chunked_nll_fp32", "tiled_lm_head", "fused_chunks"]
LossKind = Literal["hf", "chunked", "fused", _ChunkedLoss, "label_smoothing"]


class Method(Part):
    """Which weights train, and how.

    kind              full, freeze (only the last layers train), LoRA's (lora, qlora, dora, qdora), or another of peft's
                      methods by peft's name
    rank              rank of the adapters; the default of a method other than LoRA is peft's
    alpha             scale of the adapters (`lora_alpha`)
    targets           module or role names that get adapters, `all-linear`, or `default` for peft's choice for the
                      model, which is the default of all methods but LoRA's; any other string is a regular expression
                      of modules' paths, as in peft
    dropout           dropout of the adapters' input, 0 to 1
    modules_to_save   modules that train in full, in addition to the adapters
    adapter_dtype     dtype of the adapter weights
    trainable_layers  number of last layers that `freeze` trains
    frozen            parts of a vision-language model that neither train nor get adapters
    quantization      how the frozen base weights are stored; NF4 for qlora and qdora if not given
    options           other arguments of peft's config, such as `use_rslora`, `rank_pattern`, `layers_to_transform`
    """

    kind: MethodKind = "full"
    rank: Count = 16
    alpha: Annotated[Number, Strict(gt=0)] | None = None
    targets: Names | str = "all-linear"
    dropout: Annotated[Number, Strict(ge=0, lt=1)] = 0.0
    modules_to_save: Names = ()
    adapter_dtype: Dtype | None = None
    trainable_layers: Count = 2
    frozen: Names = ()
    quantization: Quantization | None = None
    options: Json = FrozenDict()

    @classmethod
    def expanded(cls, value: Any) -> Any:
        """Accept a kind as the whole method; quantise `qlora` and `qdora`, to NF4 by default."""
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping):
            return value
        values = dict(cast(Mapping[str, Any], value))
        kind = values.get("kind")
        if isinstance(kind, str) and (name := kind.lower().replace("-", "_")) in PEFT_METHODS:
            kind = values["kind"] = name
            rank = PEFT_METHODS[name].rank
            values = {"targets": "default", **({"rank": rank} if rank else {}), **values}
        if kind in ("forward", "generate"):
            raise refused("method.kind", f"{kind!r} is a task, not a method; set the run's task to it")
        if isinstance(kind, str) and kind.lower() == "bone":
            raise refused("method.kind", "peft has no bone since it has its successor; use miss")
        if kind in ("qlora", "qdora") and values.get("quantization") is None:
            values["quantization"] = {}
        return values

    @property
    def pattern(self) -> str:
        """The regular expression of the adapted modules' paths; empty if targets are names."""
        return self.targets if isinstance(self.targets, str) and self.targets not in ("all-linear", "default") else ""

    @property
    def chooses_paths(self) -> bool:
        """Whether adapters are on modules chosen by their paths, not only by names that all layers share."""
        o = self.options
        if self.pattern or o.get("rank_pattern") or o.get("exclude_modules"):
            return True
        numbered = not isinstance(self.targets, str) and any(
            part.isdecimal() for target in self.targets for part in target.split(".")[1:-1]
        )
        return numbered or o.get("layers_to_transform") not in (None, ())

    @property
    def last_layers(self) -> int:
        """Number of last layers that alone train or have adapters; 0 for methods without."""
        return self.trainable_layers if self.kind == "freeze" else int(self.options.get("adapter_layers") or 0)

    @property
    def has_prefix(self) -> bool:
        """Whether it trains keys and values of virtual tokens in every layer."""
        return trains_prefix(self.kind)

    @property
    def virtual_tokens(self) -> int:
        """Number of trained tokens that the method puts before each sequence."""
        has_prompt = self.kind in PEFT_METHODS and PEFT_METHODS[self.kind].on in ("prompt", "prefix")
        return virtual_tokens(self.options) if has_prompt else 0

    @property
    def trained_tokens(self) -> int:
        """Number of tokens whose embeddings train."""
        indices: Any = self.options.get(
            "token_indices" if self.kind == "trainable_tokens" else "trainable_token_indices"
        )
        return len(cast(tuple[Any, ...], indices)) if isinstance(indices, tuple) else 0

    def adapts(self, name: str) -> bool:
        """Whether a module of this name, which is a linear layer, is among the targets."""
        return self.targets == "all-linear" or (not isinstance(self.targets, str) and name in self.targets)

    def written(self, values: dict[str, Any]) -> dict[str, Any]:
        """Add what has another default in a method of its own, so that it is read back as it was."""
        return {**values, "rank": self.rank, "targets": self.targets} if self.kind in PEFT_METHODS else values


class Precision(Part):
    """Dtypes of weights, computation and gradients. Also accepted: `pure`, `amp`, `autocast`, `mixed`, or a dtype for
    pure.

    weights   dtype the model is loaded in
    compute   dtype that autocast, 4-bit layers or FP8 matrix products compute in
    autocast  whether torch.autocast is on
    grads     dtype of gradients, if not that of the weights (mixed precision of Megatron and DeepSpeed)
    master    dtype of the optimizer's copy of the weights and of its states, if it keeps a copy
    """

    weights: Dtype = "bf16"
    compute: Dtype | Literal["fp8", "float8"] | None = None
    autocast: Flag = False
    grads: Dtype | None = None
    master: Dtype | None = None

    @classmethod
    def expanded(cls, value: Any) -> Any:
        return precision_of(value) if isinstance(value, str) else value


PRECISIONS = ("pure", "amp", "autocast", "mixed", "bf16", "fp16", "fp32")


def precision_of(word: str, dtype: str = "bf16") -> dict[str, Any]:
    """Return the fields of `Precision` that `pure`, `amp`, `autocast`, `mixed` or a dtype stands for.

    Raises SpecError for `mixed` with fp32, UnknownNameError for another word.
    """
    match word:
        case "amp":  # its weights are always fp32, so `dtype` can only mean the dtype to compute in
            return {"weights": "fp32", "compute": "bf16" if dtype == "fp32" else dtype, "autocast": True}
        case "autocast":  # over weights in 16 bits: what bf16=True of transformers' Trainer does to a model loaded so
            return precision_of("amp") if dtype == "fp32" else {"weights": dtype, "compute": dtype, "autocast": True}
        case "mixed":
            if dtype == "fp32":
                raise refused("precision", "mixed needs bf16 or fp16 weights, not fp32")
            return {"weights": dtype, "grads": dtype, "master": "fp32"}
        case "pure":
            return {"weights": dtype}
        case "bf16" | "fp16" | "fp32":
            return {"weights": word}
        case _:
            raise UnknownNameError("precision", word, PRECISIONS)


class Optimizer(Part):
    """The optimizer. A name is accepted for the whole.

    name         a name from transformers' `OptimizerNames`, or `none`
    state_dtype  dtype of the states; None for the optimizer's default
    foreach      whether torch steps lists of all parameters at once; None for the optimizer's default
    in_backward  whether each parameter is stepped during backward, as soon as its gradient is there
    momentum     momentum of optimizers that take one, such as SGD
    """

    name: str | None = None
    state_dtype: Dtype | None = None
    foreach: Flag | None = None
    in_backward: Flag = False
    momentum: Annotated[Number, Strict(ge=0, lt=1)] | None = None

    @classmethod
    def expanded(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class Kernels(Part):
    """Which implementations run.

    attention       attention implementation, in transformers' terms; by default sdpa, or eager for a class without it
    checkpointing   activation checkpointing; `offload` is `full` with the blocks' inputs in host memory. `selective`
                    keeps the outputs of matrix products and attention (torchtitan's SelectiveAC); under Megatron-core
                    it recomputes only attention
    every_n_layers  with checkpointing, only the first of every n layers is checkpointed (torchtitan: the last)
    reentrant       torch's reentrant checkpointing, which recomputes a block before any of its backward runs, so the
                    block's output and its gradient stay alive until the recomputation is done
    loss            loss implementation: transformers' own, chunked, fused with the head (Liger, Cut Cross-Entropy),
                    chunked together with the head (LitGPT, TRL 1.6 to 1.14, Unsloth), with the head in tiles (TRL
                    1.15), or with smoothed labels (transformers' Trainer)
    fused           fused kernels to use
    packages        packages with kernels of state spaces and linear attention that are installed, which transformers
                    then uses instead of its torch code: fla (flash-linear-attention), causal_conv1d, mamba_ssm
    compile         torch.compile
    """

    attention: Attention | None = None
    checkpointing: Literal["none", "full", "selective", "offload"] | None = None
    every_n_layers: Count = 1
    reentrant: Flag | None = None
    loss: LossKind | None = None
    fused: (
        tuple[Literal["rope", "rms_norm", "swiglu", "cross_entropy", "compiled_cross_entropy", "lora"], ...] | None
    ) = None
    packages: tuple[Literal["fla", "causal_conv1d", "mamba_ssm"], ...] = ()
    compile: Flag = False

    def written(self, values: dict[str, Any]) -> dict[str, Any]:
        """Leave out what few families have, unless it is set."""
        return {k: v for k, v in values.items() if v or k != "packages"}


class Loop(Part):
    """The training script around the step.

    hold_outputs         the script keeps a reference to the model's outputs through backward; `step`: through the
                         optimizer step too
    padded               batches are padded, so they have an attention mask
    use_cache            the model returns its key/value cache. Takes no memory in training: backward keeps the keys and
                         values anyway, or checkpointing turns the cache off. None: on if nothing trains
    clip_grad_norm       largest gradient norm; None or 0 for no clipping
    grad_scaler          gradients are scaled for fp16 (torch.amp.GradScaler)
    trainer              transformers' Trainer drives the step: under bitsandbytes' 8-bit optimizers it keeps the states
                         of embeddings in fp32
    expandable_segments  torch's allocator uses expandable segments (PYTORCH_CUDA_ALLOC_CONF)
    sync_each_batch      the Trainer, or a framework's own loop, reduces gradients in every pass of a step (accelerate's
                          `sync_each_batch`); else FSDP keeps them whole until the last one
    entropy_bonus        GRPO's loss rewards entropy (`entropy_coef`, `use_adaptive_entropy`)
    """

    hold_outputs: Flag | Literal["step"] = False
    padded: Flag = False
    use_cache: Flag | None = None
    clip_grad_norm: Annotated[Number, Strict(ge=0)] | None = 1.0
    grad_scaler: Flag = False
    trainer: Flag = False
    expandable_segments: Flag = False
    sync_each_batch: Flag = False
    entropy_bonus: Flag = False

    def written(self, values: dict[str, Any]) -> dict[str, Any]:
        """Leave out what only GRPO has, unless it is set."""
        return {k: v for k, v in values.items() if v or k != "entropy_bonus"}


class Evaluation(Part):
    """Evaluation between two training steps, as transformers' Trainer runs it.

    micro          sequences per GPU and forward pass (`per_device_eval_batch_size`)
    sequence       tokens per sequence; None for the training length
    kept_batches   number of batches whose logits stay on the GPU for `compute_metrics`; 0 for none
                   (`prediction_loss_only`). At most 32,768 at a time: see `accumulation`
    accumulation   batches after which kept logits move to the host (`eval_accumulation_steps`); None: after the last
    concatenates   each batch's logits are concatenated with the earlier ones (`eval_do_concat_batches`); false: kept in
                   a list
    preprocess     `argmax`: `preprocess_logits_for_metrics` keeps only the likeliest tokens
    batch_metrics  a batch's logits are freed once its metrics are computed (`batch_eval_metrics`)
    new_tokens     tokens generated after each sequence (`predict_with_generate`)
    fuses          a fused loss computes no logits in evaluation either, as Cut Cross-Entropy does; None: the profile's
    """

    micro: Count = 8
    sequence: Count | None = None
    kept_batches: Natural = 0
    accumulation: Count | None = None
    concatenates: Flag = True
    preprocess: Literal["argmax"] | None = None
    batch_metrics: Flag = False
    new_tokens: Natural = 0
    fuses: Flag | None = None


class Saving(Part):
    """Writing a checkpoint after a step.

    state_dict  `full` gathers whole weights on one rank, `sharded` has every rank write its shard; None for full
    optimizer   whether optimizer states are written too, as in the Trainer's checkpoints
    """

    state_dict: Literal["full", "sharded"] | None = None
    optimizer: Flag = True


class Merging(Part):
    """Merging the adapters into the base weights with peft's `merge_and_unload`. A word sets `model`.

    model  `trained`: merge in the training process; `reloaded`: load the base model unquantised in a new process
    dtype  dtype of a reloaded model
    """

    model: Literal["trained", "reloaded"] = "trained"
    dtype: Dtype | None = None

    @classmethod
    def expanded(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value


class Also(Part):
    """Other work of a training run whose memory counts too: evaluation, saving, merging. None leaves it out."""

    evaluation: Evaluation | None = None
    saving: Saving | None = None
    merging: Merging | None = None
