"""How a run's kernels, loop and parallel degrees change the operations of every model family."""

from __future__ import annotations

from typing import Any, Literal

from memplan.catalogue.kernels.packing import PackedRows
from memplan.core.records import NamedTuple


class Wiring(NamedTuple):
    """The choices of kernels, mask, cache and pass that change a model's operations.

    It has more than 20 fields because each is a choice that some family's code reads by itself.

    Attention kernels: flash, flash_2, efficient, math, flex or eager

    backend       kernel of layers without a mask
    masked        kernel of layers with a mask
    tower         kernel of the vision tower
    variant       kernel in place of flash attention 2: `3`, or `cudnn`
    target        dtype that flash attention 2 casts fp32 heads to, or of the mask that a packed batch comes with
    copies        copied before the kernel: `heads`, k and v repeated per query head; `all`, then q, k and v
    half_math     the math kernel computes in the inputs' dtype instead of fp32
    uncapped      sdpa runs although scores should be soft-capped, and skips the cap
    drops         attention_dropout is above 0; fused kernels apply it inside
    recomputes    backward recomputes attention from q, k and v
    accumulates   Megatron-core: products add weight gradients to the main gradients, if the config lets them
    keeps_last    offloaded checkpoints leave the last block's input on the GPU

    packages      installed packages whose kernels state spaces and linear attention run (`kernels.packages`)

    Masks and inputs

    padded              the batch comes with a 2-D mask that has zeros
    packed              the batch's sequences are packed into rows
    windowed            the sequence is longer than the sliding window
    causal              no token attends to later tokens; False in encoders, which mask only padding
    one_mask            eager's mask is shared by the whole batch, unless it is padded
    float_masks         sdpa masks are floats, as eager's are, instead of booleans
    window_masks        LitGPT's layers with a window make a mask of all pairs, of any sequence
    causal_buffers      every layer holds a causal mask for all positions as a buffer
    pads_image_mask     the image tokens attended to are no multiple of 8, so the kernel pads their mask
    media               what the batch contains: images, video or clips; "" for none
    pads_tower          audio clips or images are padded, and the padding is masked
    images              the batch contains images or audio clips
    is_one_image        they are one image, or one tile
    is_single_sequence  the batch is a single sequence; set if `single_sequence` of its family or its kernel tells
    scans_once          the sequence is one chunk of a layer that scans chunk by chunk
    has_fp32_inputs     the inputs of attention are fp32

    Model code

    whole_rotary               Phi-3 rotates whole heads, without slicing and joining
    scales_embeddings_outside  Gemma's model scales the embeddings, instead of the embedding module
    tables                     how every layer's own rotary tables are used
                               (`memplan.catalogue.attention.old_rotary_tables`)
    caches                     the model returns k and v of every layer although it trains
    checkpoints                blocks are checkpointed, which T5's code asks for (set for encoder-decoders)
    by_name                    masks and positions are passed to blocks as keyword arguments
    records                    autograd records; kernels then also return what backward needs

    Inference

    caching               keys and values are joined with those of earlier tokens, head by head in memory
    prefixed              in training, earlier tokens are a trained prefix, which needs a mask
    keeps_cache_layout    the cache returns keys and values in the layout in which they came
    decodes               one new token per sequence, which attends to all earlier tokens
    decodes_several       with `decodes`: more than one new token per sequence
    generates             the pass belongs to `generate`
    last_only             only the last token's logits of each sequence are computed
    encoder_decoder_half  the half of an encoder-decoder that runs: `encoder`, or `decoder` on the encoder's output
    beams                 several beams per prompt read the encoder's output
    has_cross_cache       keys and values of cross-attention are cached already
    static                the cache has room for all tokens, and a decoded token reads it through a mask
    opened_windows        kinds of compressed-key windows that the token is the first of
    filled_windows        kinds of compressed-key windows that the token is the last of
    """

    backend: str
    masked: str
    padded: bool = False
    windowed: bool = False
    target: str = ""
    variant: str = ""
    copies: str = ""
    caches: bool = False
    causal_buffers: bool = False
    tables: str = ""
    half_math: bool = False
    whole_rotary: bool = False
    uncapped: bool = False
    one_mask: bool = False
    scales_embeddings_outside: bool = False
    float_masks: bool = False
    window_masks: bool = False
    is_single_sequence: bool = False
    scans_once: bool = False
    has_fp32_inputs: bool = False
    images: bool = False
    is_one_image: bool = False
    tower: str = "flash"
    causal: bool = True
    checkpoints: bool = False
    pads_image_mask: bool = False
    media: str = ""
    pads_tower: bool = False
    by_name: bool = False
    recomputes: bool = False
    accumulates: bool = False
    keeps_last: bool = False
    packages: tuple[str, ...] = ()
    drops: bool = False
    records: bool = True
    caching: bool = False
    prefixed: bool = False
    keeps_cache_layout: bool = False
    decodes: bool = False
    generates: bool = False
    decodes_several: bool = False
    last_only: bool = False
    encoder_decoder_half: str = ""
    beams: bool = False
    has_cross_cache: bool = False
    static: bool = False
    opened_windows: tuple[str, ...] = ()
    filled_windows: tuple[str, ...] = ()
    packed: PackedRows | None = None

    @property
    def hears(self) -> bool:
        """Whether the batch contains audio clips."""
        return self.media == "clips"

    @property
    def is_varlen(self) -> bool:
        """Whether the kernel is told where the sequences of a packed row begin."""
        return self.packed is not None and self.packed.is_varlen

    @property
    def masks_rows(self) -> bool:
        """Whether each row has a mask of its own, because it is padded or packed."""
        return self.padded or (self.packed is not None and bool(self.packed.mask))

    @property
    def is_head_major(self) -> bool:
        """Whether a cache returns keys and values that are contiguous head by head."""
        return self.caching and not self.keeps_cache_layout

    @property
    def has_one_query(self) -> bool:
        """Whether each sequence has a single query, whose heads are contiguous without a copy."""
        return self.decodes and not self.decodes_several

    def has_mask(self, sliding: bool = False) -> bool:
        """Return whether transformers passes the layer's attention a mask.

        Eager and flex attention always get a causal one; sdpa gets one for padding, packing and sliding windows.
        """
        if self.backend == "flash_2" or self.is_varlen:
            return False
        causal = self.causal and (self.backend in ("eager", "flex") or (self.static and self.decodes) or self.prefixed)
        return causal or self.masks_rows or (sliding and self.windowed)


DividedLogits = Literal["in_place", "held", "released"]
KtoCopies = Literal["", "halves", "all"]
FusedGradients = Literal["", "trained", "always", "compiled", "recomputed"]
LogitsDtype = Literal["autocast", "fp32", "model"]
LogProbs = Literal[
    "joined", "rolled", "shifted", "kernel", "gathered", "tiled", "recomputed", "chunked", "overwritten", "sliced"
]

IN_PARTS: tuple[LogProbs, ...] = ("tiled", "recomputed", "chunked")  # ways that never hold all logits


class TrainerFacts(NamedTuple):
    """A trainer as it is in every release of TRL that has it.

    reference    by default: `own`, the model without its adapters, or a copy of one that has none; or `none`. Empty if
                 it can have none
    models       other models that run inside its step, by role
    rows         sequences of one example
    least        examples that a pass needs
    completions  of a prompt by default; 0 if it generates none
    tokens       of a completion by default; 0 if the release decides
    older        it is as all trainers were in TRL 0.24
    likelihood   its loss adds the likelihood of the chosen half
    packs        some release of it packs its batches
    rescores     it always computes the log-probabilities of completions once more before the step
    backbone     the loss with which its step calls the model's backbone, past the forward that accelerate wraps in
                 autocast, or `every` loss; empty if it calls the model. Source: trl 1.16.0 models/utils.py
                 _ForwardRedirection, trainer/distillation_trainer.py _get_last_hidden_state; trl 1.13.0
                 trainer/grpo_trainer.py compute_liger_loss, trainer/dpo_trainer.py, kto_trainer.py _compute_loss_liger
    no_dropout   it turns dropout off, also that of adapters, unless `disable_dropout` is false. Source: trl 0.24.0 and
                 1.16.0 trainer/utils.py disable_dropout_in_model; llamafactory 0.9.5 train/dpo, train/kto; ms-swift
                 4.6.0 rlhf_trainers/rlhf_mixin.py
    own_loop     it does not run transformers' loop. Its own checkpoints nothing, prepares no quantised model, casts no
                 adapters, clips nothing, leaves use_cache on, divides logits in place, and holds the outputs of a
                 micro-batch and the logits of all completions until the next ones exist. A value model trains in the
                 policy's pass
    """

    reference: str = ""
    models: tuple[str, ...] = ()
    rows: int = 1
    least: int = 1
    completions: int = 0
    tokens: int = 0
    older: bool = False
    likelihood: bool = False
    packs: bool = False
    rescores: bool = False
    backbone: str = ""
    no_dropout: bool = False
    own_loop: bool = False

    @property
    def together(self) -> int:
        """Return the examples of the smallest pass: the completions of a prompt, if it generates."""
        return self.completions or self.least


TRAINERS = {
    "sft": TrainerFacts(packs=True),
    "dpo": TrainerFacts("own", rows=2, packs=True, backbone="fused", no_dropout=True),
    "kto": TrainerFacts("own", least=2, backbone="fused", no_dropout=True),
    "orpo": TrainerFacts(rows=2, older=True, likelihood=True, no_dropout=True),
    "cpo": TrainerFacts(rows=2, older=True, likelihood=True, no_dropout=True),
    "simpo": TrainerFacts(rows=2, older=True, no_dropout=True),
    "reward": TrainerFacts(rows=2, no_dropout=True),
    "grpo": TrainerFacts("none", ("reward",), completions=8, backbone="fused"),  # beta is 0; RLOO's is 0.05
    "rloo": TrainerFacts("own", ("reward",), completions=2, rescores=True),
    # trl 1.12.0 experimental/ppo/ppo_config.py, 0.24.0 trainer/utils.py OnPolicyConfig: response_length
    "ppo": TrainerFacts("own", ("reward", "value"), completions=1, tokens=53, no_dropout=True, own_loop=True),
    "gkd": TrainerFacts(models=("teacher",), packs=True, no_dropout=True),
    "distill": TrainerFacts(models=("teacher",), completions=1, backbone="every"),
}
PAIRED = tuple(name for name, facts in TRAINERS.items() if facts.older)
GENERATING = tuple(name for name, facts in TRAINERS.items() if facts.completions)
DISTILLING = tuple(name for name, facts in TRAINERS.items() if "teacher" in facts.models)


class Trainer(NamedTuple):
    """A trainer of TRL as its step runs the model.

    name          its name in `run.trainer`
    log_probs     how log-probabilities of tokens are computed: from all logits, of all tokens (`joined`, TRL 0.24;
                  `rolled`, ms-swift, which copies none) or of all but the last (`shifted`), or by a kernel that makes
                  no copies (`kernel`, TRL 1.14) and may overwrite them with their gradient (`overwritten`, verl); from
                  the log-softmax of all logits (`gathered`, LLaMA-Factory); or tile by tile (`tiled`; in torch's
                  own operations `recomputed`, TRL 1.14 with use_liger_kernel), or with their gradients in forward
                  (`chunked`, Unsloth)
    reference     where the reference's come from: `copy`, `adapters`, `precomputed` or `none`
    copies_adapters  the reference has a frozen copy of the adapters
    trains_copy   a copy's weights require gradients, though none flows, so that autocast keeps its casts of them
    caches_copy   a copy returns the keys and values of all layers
    copy_dtype    dtype of a copy: of the policy's `weights`, or of its computation (`compute`)
    shards_copy   how FSDP2 shards a copy, which nothing wraps in autocast: as one `unit` or in `blocks`; under
                  FSDP1 either, and empty if no rank does
    logits_dtype  the model's logits are cast to fp32 if autocast runs (`autocast`, by accelerate) or always (`fp32`),
                  or stay as they are (`model`)
    casts_back    FSDP2 then casts them to the dtype that it computes in
    likelihood    the loss adds the likelihood of the chosen half, from a copy of its logits
    copies        what KTO copies of the logits (`TrainerBehaviour.kto_copies`)
    is_reference  the model is the reference, whose pass records nothing
    rows          sequences of one example
    value_head    a reward model's scores are of a head next to the language model's
    teacher_dtype dtype of what a teacher returns; empty without one on this GPU
    has_parts     a step has several micro-batches

    fused_gradients  Liger's loss, tile by tile with its gradients in forward: of the head if it is `trained`, or
                     `always`; or all logits of a completion at once, `compiled`; empty without it. Of pairs, `compiled`
                     and `always` are the same. A profile's may be `recomputed`: then `log_probs` is

    For trainers that generate:

    has_one_sequence  a micro-batch is one completion
    generates         the model itself generates the completions
    old_log_probs     log-probabilities of completions are computed before the step, too
    prompt_logits     logits of prompts are computed, too, and log-probabilities read all of them
    divided_logits    the temperature divides the logits `in_place`, or into a copy, while the model's are `held` or
                      `released`
    entropy_bonus     the loss rewards entropy, whose gradient is computed
    scored_in         dtype to which autocast computes passes without gradients, if the step itself has no autocast
    """

    name: str
    log_probs: LogProbs
    reference: str
    copies_adapters: bool = False
    trains_copy: bool = True
    caches_copy: bool = False
    copy_dtype: str = "weights"
    shards_copy: str = ""
    logits_dtype: LogitsDtype = "autocast"
    casts_back: bool = False
    likelihood: bool = False
    copies: KtoCopies = ""
    is_reference: bool = False
    rows: int = 2
    value_head: bool = False
    teacher_dtype: str = ""
    has_one_sequence: bool = False
    has_parts: bool = False
    generates: bool = False
    old_log_probs: bool = False
    prompt_logits: bool = False
    divided_logits: DividedLogits = "released"
    fused_gradients: FusedGradients = ""
    entropy_bonus: bool = False
    scored_in: str = ""

    @property
    def calls_backbone(self) -> bool:
        """Whether the step calls the model without its head, past the forward that accelerate wraps in autocast."""
        return (self.name == "distill" and bool(self.teacher_dtype)) or bool(self.fused_gradients)

    @property
    def scoring(self) -> dict[str, Any]:
        """The fields of the recipe in which passes without gradients differ from the step."""
        return {"autocast": True, "compute": self.scored_in} if self.scored_in else {}

    @property
    def has_reference_pass(self) -> bool:
        """Whether a reference model runs in the step."""
        return self.reference in ("copy", "adapters") and not self.is_reference

    @property
    def has_first_pass(self) -> bool:
        """Whether the model first runs without gradients: on completions of other prompts (KTO), or for the
        log-probabilities that generated the completions."""
        return (self.name == "kto" or self.old_log_probs) and not self.is_reference

    def widens(self, autocast: str | None) -> bool:
        """Whether the loss reads fp32 logits, if the model runs under autocast to this dtype."""
        return self.logits_dtype == "fp32" or (self.logits_dtype == "autocast" and autocast is not None)
