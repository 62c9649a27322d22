"""What a change that saves memory costs: in the result, and in time where counted operations do not tell.

A row compares a run with the change to the same run without it. Changes that come together have each its own row: from
full to QLoRA is `method_lora` and `method_qlora`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from memplan.core.errors import UnknownNameError


class Cost(NamedTuple):
    """One change.

    lever       its key
    low, high   the time of a step as a multiple of the time without it; None where the operations are counted
    basis       of the time: derived, measured or assumed
    quality     what it does to the result, in a sentence
    severity    0 the same result, 1 hardly seen, 2 seen in some tasks, 3 a different result must be expected
    """

    lever: str
    low: float | None
    high: float | None
    basis: Literal["derived", "measured", "assumed"]
    time_source: str
    quality: str
    quality_source: str
    severity: int


_LORA_LEARNS_LESS = "Biderman et al. 2024, LoRA Learns Less and Forgets Less, arXiv:2405.09673"
_QLORA = "Dettmers et al. 2023, QLoRA, arXiv:2305.14314"
_REGRET = "Schulman et al. 2025, LoRA Without Regret, thinkingmachines.ai/blog/lora"
_EIGHT_BITS = "Dettmers et al. 2021, 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861, table 1"
_TORCHTUNE = "torchtune documentation, memory optimization overview"
_CHECKPOINT = "torch documentation, torch.utils.checkpoint"
_STATES = "counted: the bytes of states, gradients and parameters that a step reads and writes"

COSTS = (
    Cost(
        "checkpointing",
        None,
        None,
        "derived",
        "counted: the blocks' forward pass once more. Published: about 20 % (transformers documentation, gradient "
        "checkpointing), 30 to 40 % (Korthikanti et al. 2022, arXiv:2205.05198)",
        "none: the same numbers, computed again",
        f"Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174; {_CHECKPOINT}: dropout "
        "draws the same numbers",
        0,
    ),
    Cost(
        "reentrant",
        None,
        None,
        "derived",
        "counted: either kind runs a block's forward pass once more; the other kind stops at the last tensor it needs",
        "none: the same numbers, computed again",
        f"{_CHECKPOINT}, use_reentrant",
        0,
    ),
    Cost(
        "attention_flash",
        None,
        None,
        "derived",
        "counted: scores are neither written nor read, and made once more in backward",
        "none: attention is exact, summed in another order",
        "Dao et al. 2022, FlashAttention, arXiv:2205.14135; Dao 2023, FlashAttention-2, arXiv:2307.08691",
        0,
    ),
    Cost(
        "fused_loss",
        None,
        None,
        "derived",
        "counted: the head's products once or twice, its logits in chunks",
        "none: the loss is exact, summed in another order; Cut Cross-Entropy leaves out gradients too small for bf16",
        "Hsu et al. 2024, Liger Kernel, arXiv:2410.10989; Wijmans et al. 2024, Cut Your Losses in Large-Vocabulary "
        "Language Models, arXiv:2411.09009",
        0,
    ),
    Cost(
        "chunked_loss",
        None,
        None,
        "derived",
        "counted: the same operations, chunk by chunk",
        "none: the loss is exact, summed in another order",
        "torchtune documentation, modules.loss.CEWithChunkedOutputLoss",
        0,
    ),
    Cost(
        "optimizer_fused",
        None,
        None,
        "derived",
        f"{_STATES}: once, where lists are read and written again for every operation",
        "none: the same update, rounded elsewhere",
        "torch documentation, torch.optim: foreach and fused implementations of one algorithm",
        0,
    ),
    Cost(
        "optimizer_8bit",
        None,
        None,
        "derived",
        _STATES,
        "hardly any: as good as with 32-bit states over language modelling, translation, GLUE and images, at the same "
        "learning rate",
        _EIGHT_BITS,
        1,
    ),
    Cost(
        "optimizer_paged",
        1.0,
        2.0,
        "assumed",
        f"{_QLORA}: as fast as unpaged at batch 16, where only bursts are paged; the high end is assumed, for states "
        "that pass over the bus at every step",
        "hardly any: that of 8-bit states; paging changes no number",
        f"{_EIGHT_BITS}; {_QLORA}, section 3",
        1,
    ),
    Cost(
        "optimizer_adafactor",
        None,
        None,
        "derived",
        _STATES,
        "another optimizer: as good as Adam in translation, with a learning rate and schedule of its own to be found",
        "Shazeer and Stern 2018, Adafactor, arXiv:1804.04235",
        2,
    ),
    Cost(
        "optimizer_sgd",
        None,
        None,
        "derived",
        _STATES,
        "another optimizer, and a worse one for transformers unless much is tuned anew",
        "Zhang et al. 2020, Why are Adaptive Methods Good for Attention Models?, arXiv:1912.03194",
        3,
    ),
    Cost(
        "in_backward",
        0.95,
        1.15,
        "assumed",
        "assumed: the update is the same, in a kernel or more for each parameter; gradients are read while in cache",
        "gradients cannot be clipped by their whole norm nor accumulated, so the batch is one micro-batch",
        f"Lv et al. 2023, LOMO, arXiv:2306.09782; {_TORCHTUNE}: not compatible with gradient accumulation",
        2,
    ),
    Cost(
        "micro_batch",
        None,
        None,
        "derived",
        "counted: every pass reads the weights, launches its kernels and adds up the gradients; that short products "
        "get less of a card's peak is not",
        "none with the same batch in all, where the loss is divided by the tokens of all passes (transformers from "
        "4.46 on)",
        "Hugging Face blog 2024, Fixing Gradient Accumulation, huggingface.co/blog/gradient_accumulation",
        0,
    ),
    Cost(
        "sequence",
        None,
        None,
        "derived",
        "counted: fewer tokens a step, and fewer pairs of them in attention",
        "longer examples are cut or dropped: what was beyond the end is not learned",
        "TRL documentation, SFTConfig.max_length; Ding et al. 2024, Fewer Truncations Improve Language Modeling, "
        "arXiv:2404.10830",
        3,
    ),
    Cost(
        "rank",
        None,
        None,
        "derived",
        "counted: narrower products of the adapters",
        "less can be learned: not seen in small data sets, and sooner the more data there is",
        f"Hu et al. 2021, LoRA, arXiv:2106.09685, table 6; {_REGRET}",
        2,
    ),
    Cost(
        "targets",
        None,
        None,
        "derived",
        "counted: fewer adapters",
        "adapters on attention alone learn less than on all linear layers, at equal numbers of parameters too",
        f"{_QLORA}, figure 2; {_LORA_LEARNS_LESS}; {_REGRET}",
        2,
    ),
    Cost(
        "precision_pure",
        None,
        None,
        "derived",
        "counted: fewer bytes, and no casts",
        "an update below about 1/256 of a weight is rounded away in bf16: slow training can stall",
        "Zamirai et al. 2020, Revisiting BFloat16 Training, arXiv:2010.06192",
        2,
    ),
    Cost(
        "method_lora",
        None,
        None,
        "derived",
        "counted: no gradients of frozen weights, and the adapters' products",
        "learns less than full training in code, mathematics and continued pretraining, and forgets less; as good on "
        "data sets of the usual size for instructions",
        f"{_LORA_LEARNS_LESS}; {_REGRET}",
        2,
    ),
    Cost(
        "method_qlora",
        None,
        None,
        "derived",
        "counted: weights are dequantised whenever they are used. Published: 39 % more time than LoRA for 33 % less "
        "memory (Raschka 2023, Practical Tips for Finetuning LLMs Using LoRA)",
        "hardly any: NF4 with double quantisation was as good as LoRA in 16 bits from 7B to 65B",
        f"{_QLORA}, tables 3 and 4",
        1,
    ),
    Cost(
        "double_quant",
        None,
        None,
        "derived",
        "counted: the scales are dequantised too",
        "hardly any: no loss was found, for 0.37 bits a parameter",
        f"{_QLORA}, section 3 and table 4",
        1,
    ),
    Cost(
        "evaluation_batch",
        1.0,
        1.0,
        "derived",
        "a step is as fast as before; the evaluation takes more passes for as many sequences",
        "none to the model; a loss that is averaged by batches weighs short ones otherwise",
        "transformers documentation, TrainingArguments: per_device_eval_batch_size; 5.24 trainer.py "
        "Trainer.evaluation_loop: a batch's loss counts once for each of its sequences",
        0,
    ),
    Cost(
        "evaluation_host",
        1.0,
        1.0,
        "derived",
        "a step is as fast as before; the evaluation waits for its logits to pass over the bus",
        "none: the same logits, in the host's memory, which must hold them all",
        "transformers documentation, TrainingArguments: eval_accumulation_steps",
        0,
    ),
    Cost(
        "evaluation_argmax",
        1.0,
        1.0,
        "derived",
        "a step is as fast as before",
        "none to the model; metrics see the likeliest token and no probabilities: accuracy can be had, perplexity not",
        "transformers documentation, Trainer: preprocess_logits_for_metrics",
        0,
    ),
    Cost(
        "offload_activations",
        None,
        None,
        "assumed",
        "counted: the bytes that pass over the bus, at a rate that is assumed, none of it hidden by the computation. "
        "Published: about 1 %, copied beside it (Unsloth's README)",
        "none: the same numbers, copied there and back",
        f"{_TORCHTUNE}: activation offloading; Unsloth blog 2024, Unsloth Gradient Checkpointing",
        0,
    ),
    Cost(
        "offload_optimizer",
        None,
        None,
        "assumed",
        "counted: gradients and weights pass over the bus and the host reads and writes the states, at rates that are "
        "assumed, once however many passes are accumulated. Published: 40 TFLOPS for 10B parameters on a V100 (Ren et "
        "al. 2021, arXiv:2101.06840)",
        "none: the same update, computed by the host",
        "Ren et al. 2021, ZeRO-Offload, arXiv:2101.06840",
        0,
    ),
    Cost(
        "more_gpus",
        1.0,
        1.5,
        "assumed",
        "assumed, at the same batch per GPU: ZeRO's stages 1 and 2 send what data parallelism sends, stage 3 half as "
        "much again (Rajbhandari et al. 2020, arXiv:1910.02054, section 7); how fast that goes depends on the links",
        "none with the same batch in all: accumulate less, or every GPU adds to it",
        "Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054",
        0,
    ),
    Cost(
        "expandable_segments",
        1.0,
        1.05,
        "assumed",
        "assumed: mapping pages takes time in the first steps, and nothing once the segments have grown",
        "none: the allocator alone",
        "torch documentation, CUDA semantics: PYTORCH_CUDA_ALLOC_CONF",
        0,
    ),
)

_BY_LEVER = {cost.lever: cost for cost in COSTS}


def cost_of(lever: str) -> Cost:
    """The row of a lever. Raises UnknownNameError, which names the nearest."""
    found = _BY_LEVER.get(lever)
    if found is None:
        raise UnknownNameError("lever", lever, _BY_LEVER)
    return found
