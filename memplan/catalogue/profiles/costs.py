"""Costs of memory-saving changes: in quality, and in time if counting operations does not tell.

A row compares a run with the change to the same run without it. A combined change has several rows: going from full
training to QLoRA is `method_lora` and `method_qlora`.
"""

from __future__ import annotations

from typing import Literal

from memplan.core.errors import UnknownNameError
from memplan.core.records import NamedTuple


class LeverCost(NamedTuple):
    """The cost of one change.

    lever           its key
    time_source     source of the time
    quality         its effect on the result, in a sentence
    quality_source  source of the effect
    severity        0 same result, 1 hardly noticeable, 2 noticeable in some tasks, 3 expect a different result
    low             lower end of the step time, as a multiple of the time without it; None if operations are counted
    high            upper end, likewise
    basis           basis of the time: derived, measured or assumed
    """

    lever: str
    time_source: str
    quality: str
    quality_source: str
    severity: int
    low: float | None = None
    high: float | None = None
    basis: Literal["derived", "measured", "assumed"] = "derived"


_LORA_LEARNS_LESS = "Biderman et al. 2024, LoRA Learns Less and Forgets Less, arXiv:2405.09673"
_QLORA = "Dettmers et al. 2023, QLoRA, arXiv:2305.14314"
_REGRET = "Schulman et al. 2025, LoRA Without Regret, thinkingmachines.ai/blog/lora"
_EIGHT_BITS = "Dettmers et al. 2021, 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861, table 1"
_TORCHTUNE = "torchtune documentation, memory optimization overview"
_CHECKPOINT = "torch documentation, torch.utils.checkpoint"
_STATES = "counted: the bytes of states, gradients and parameters that a step reads and writes"

COSTS = (
    LeverCost(
        "checkpointing",
        "counted: the blocks' forward pass once more. Published: about 20 % (transformers documentation, gradient "
        "checkpointing), 30 to 40 % (Korthikanti et al. 2022, arXiv:2205.05198)",
        "none: the same numbers, computed again",
        f"Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174; {_CHECKPOINT}: dropout "
        "draws the same numbers",
        0,
    ),
    LeverCost(
        "reentrant",
        "counted: either kind runs a block's forward pass once more; the other kind stops at the last tensor it needs",
        "none: the same numbers, computed again",
        f"{_CHECKPOINT}, use_reentrant",
        0,
    ),
    LeverCost(
        "attention_flash",
        "counted: scores are neither written nor read, and recomputed in backward",
        "none: attention is exact, summed in another order",
        "Dao et al. 2022, FlashAttention, arXiv:2205.14135; Dao 2023, FlashAttention-2, arXiv:2307.08691",
        0,
    ),
    LeverCost(
        "fused_loss",
        "counted: the head's products once or twice, its logits in chunks",
        "none: the loss is exact, summed in another order; Cut Cross-Entropy leaves out gradients too small for bf16",
        "Hsu et al. 2024, Liger Kernel, arXiv:2410.10989; Wijmans et al. 2024, Cut Your Losses in Large-Vocabulary "
        "Language Models, arXiv:2411.09009",
        0,
    ),
    LeverCost(
        "chunked_loss",
        "counted: the same operations, chunk by chunk",
        "none: the loss is exact, summed in another order",
        "torchtune documentation, modules.loss.CEWithChunkedOutputLoss",
        0,
    ),
    LeverCost(
        "optimizer_fused",
        f"{_STATES}: only once, while lists are read and written again for every operation",
        "none: the same update, rounded elsewhere",
        "torch documentation, torch.optim: foreach and fused implementations of one algorithm",
        0,
    ),
    LeverCost(
        "optimizer_8bit",
        _STATES,
        "hardly any: as good as 32-bit states in language modelling, translation, GLUE and images, at the same "
        "learning rate",
        _EIGHT_BITS,
        1,
    ),
    LeverCost(
        "optimizer_paged",
        f"{_QLORA}: as fast as unpaged at batch 16, with only bursts paged; the high end is assumed, for states that "
        "cross the bus at every step",
        "hardly any: that of 8-bit states; paging changes no number",
        f"{_EIGHT_BITS}; {_QLORA}, section 3",
        1,
        low=1.0,
        high=2.0,
        basis="assumed",
    ),
    LeverCost(
        "optimizer_adafactor",
        _STATES,
        "another optimizer: as good as Adam in translation, but it needs its own learning rate and schedule",
        "Shazeer and Stern 2018, Adafactor, arXiv:1804.04235",
        2,
    ),
    LeverCost(
        "optimizer_sgd",
        _STATES,
        "another optimizer, and a worse one for transformers unless it is carefully retuned",
        "Zhang et al. 2020, Why are Adaptive Methods Good for Attention Models?, arXiv:1912.03194",
        3,
    ),
    LeverCost(
        "in_backward",
        "assumed: the update is the same, in one or more kernels per parameter; gradients are read while in cache",
        "gradients can be neither accumulated nor clipped by their global norm, so the batch is one micro-batch",
        f"Lv et al. 2023, LOMO, arXiv:2306.09782; {_TORCHTUNE}: not compatible with gradient accumulation",
        2,
        low=0.95,
        high=1.15,
        basis="assumed",
    ),
    LeverCost(
        "micro_batch",
        "counted: every pass reads the weights, launches its kernels and accumulates gradients. Not counted: small "
        "products reach less of a card's peak",
        "none at the same total batch, if the loss is divided by the tokens of all passes (transformers from 4.46 on)",
        "Hugging Face blog 2024, Fixing Gradient Accumulation, huggingface.co/blog/gradient_accumulation",
        0,
    ),
    LeverCost(
        "sequence",
        "counted: fewer tokens per step, and fewer pairs of tokens in attention",
        "longer examples are truncated or dropped: tokens beyond the limit are not learned",
        "TRL documentation, SFTConfig.max_length; Ding et al. 2024, Fewer Truncations Improve Language Modeling, "
        "arXiv:2404.10830",
        3,
    ),
    LeverCost(
        "rank",
        "counted: narrower products of the adapters",
        "less capacity to learn: not noticeable on small data sets, more so the more data there is",
        f"Hu et al. 2021, LoRA, arXiv:2106.09685, table 6; {_REGRET}",
        2,
    ),
    LeverCost(
        "targets",
        "counted: fewer adapters",
        "adapters on attention alone learn less than on all linear layers, even at equal numbers of parameters",
        f"{_QLORA}, figure 2; {_LORA_LEARNS_LESS}; {_REGRET}",
        2,
    ),
    LeverCost(
        "precision_pure",
        "counted: fewer bytes, and no casts",
        "an update below about 1/256 of a weight is rounded away in bf16: slow training can stall",
        "Zamirai et al. 2020, Revisiting BFloat16 Training, arXiv:2010.06192",
        2,
    ),
    LeverCost(
        "method_lora",
        "counted: no gradients of frozen weights, and the adapters' products",
        "learns less than full training in code, mathematics and continued pretraining, and forgets less; as good on "
        "instruction data sets of usual size",
        f"{_LORA_LEARNS_LESS}; {_REGRET}",
        2,
    ),
    LeverCost(
        "method_qlora",
        "counted: weights are dequantised at every use. Published: 39 % more time than LoRA for 33 % less memory "
        "(Raschka 2023, Practical Tips for Finetuning LLMs Using LoRA)",
        "hardly any: NF4 with double quantisation was as good as LoRA in 16 bits from 7B to 65B",
        f"{_QLORA}, tables 3 and 4",
        1,
    ),
    LeverCost(
        "double_quant",
        "counted: the scales are dequantised too",
        "hardly any: no loss of quality was found, at 0.37 bits saved per parameter",
        f"{_QLORA}, section 3 and table 4",
        1,
    ),
    LeverCost(
        "evaluation_batch",
        "a step is as fast as before; the evaluation needs more passes for the same number of sequences",
        "none to the model; an evaluation loss averaged over batches changes slightly with their size",
        "transformers documentation, TrainingArguments: per_device_eval_batch_size; 5.24 trainer.py "
        "Trainer.evaluation_loop: a batch's loss counts once for each of its sequences",
        0,
        low=1.0,
        high=1.0,
    ),
    LeverCost(
        "evaluation_host",
        "a step is as fast as before; the evaluation waits for its logits to cross the bus",
        "none: the same logits, in host memory, which must hold all of them",
        "transformers documentation, TrainingArguments: eval_accumulation_steps",
        0,
        low=1.0,
        high=1.0,
    ),
    LeverCost(
        "evaluation_argmax",
        "a step is as fast as before",
        "none to the model; metrics get only the most likely token: accuracy still works, perplexity does not",
        "transformers documentation, Trainer: preprocess_logits_for_metrics",
        0,
        low=1.0,
        high=1.0,
    ),
    LeverCost(
        "offload_activations",
        "counted: the bytes that cross the bus, at an assumed rate, without overlap with computation. Published: about "
        "1 % with overlap (Unsloth's README)",
        "none: the same numbers, copied to the host and back",
        f"{_TORCHTUNE}: activation offloading; Unsloth blog 2024, Unsloth Gradient Checkpointing",
        0,
        basis="assumed",
    ),
    LeverCost(
        "offload_optimizer",
        "counted: gradients and weights cross the bus and the host reads and writes the states, at assumed rates, once "
        "per step whatever the accumulation. Published: 40 TFLOPS for 10B parameters on a V100 (Ren et al. 2021, "
        "arXiv:2101.06840)",
        "none: the same update, computed by the host",
        "Ren et al. 2021, ZeRO-Offload, arXiv:2101.06840",
        0,
        basis="assumed",
    ),
    LeverCost(
        "more_gpus",
        "assumed, at the same batch per GPU: ZeRO stages 1 and 2 send as much as data parallelism, stage 3 50 % more "
        "(Rajbhandari et al. 2020, arXiv:1910.02054, section 7); its speed depends on the links",
        "none at the same total batch: accumulate less, because every GPU adds to the batch",
        "Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054",
        0,
        low=1.0,
        high=1.5,
        basis="assumed",
    ),
    LeverCost(
        "expandable_segments",
        "assumed: mapping pages takes time in the first steps, and none once the segments have grown",
        "none: only the allocator changes",
        "torch documentation, CUDA semantics: PYTORCH_CUDA_ALLOC_CONF",
        0,
        low=1.0,
        high=1.05,
        basis="assumed",
    ),
)

_BY_LEVER = {cost.lever: cost for cost in COSTS}


def cost_of(lever: str) -> LeverCost:
    """Return the cost of a lever. Raises UnknownNameError with the nearest names."""
    cost = _BY_LEVER.get(lever)
    if cost is None:
        raise UnknownNameError("lever", lever, _BY_LEVER)
    return cost
