"""The work of a traceback's frames: the phase, the operation, and the kinds of tensors that it allocates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from memplan.core.records import NamedTuple
from memplan.explain.message import TraceFrame

LOGITS, SCORES, MLP, ATTENTION, HIDDEN = "logits", "attention scores", "MLP", "attention", "hidden states"
WEIGHT, GRADIENT, STATES, CACHE, TOWER, OTHER_ROLE = (
    "weight",
    "gradient",
    "optimizer state",
    "cache",
    "vision tower",
    "other",
)


class FrameOperation(NamedTuple):
    """The work of frames with the pattern in `file:function: code`.

    words  in words
    roles  the kinds of tensors that it allocates; empty if it may be any
    """

    pattern: str
    words: str
    roles: tuple[str, ...] = ()


# Words of a frame, the operation that any of them tells, and its roles. The innermost frame that has some names the
# operation; of several rows, the first.
OPERATIONS: tuple[FrameOperation, ...] = tuple(
    FrameOperation("|".join(words.split()), operation, roles)
    for words, operation, roles in (
        (
            r"visual vision_tower vision_model siglip image_tower Vision\w*Attention _vit\b",
            "the vision tower",
            (TOWER,),
        ),
        (
            r"operations\.py:_?convert_to_fp32 cross_entropy log_softmax logsumexp ForCausalLMLoss loss_utils logits "
            r"lm_head output_layer logprobs log_probs loss_fct",
            "the head and the loss",
            (LOGITS,),
        ),
        (
            r"causal_mask attention_mask _make_mask prepare_4d masking_utils _expand_mask",
            "building the attention mask",
            (SCORES,),
        ),
        (
            r"eager_attention softmax\( attn_weights attention_scores baddbmm query.*key.*transpose key.*transpose",
            "attention by matrix products",
            (SCORES,),
        ),
        (
            r"initialize_kv_cache _allocate_kv_cache allocate_gpu_cache init_memory_pool KVPool cache_engine",
            "the engine's KV cache",
            (CACHE,),
        ),
        (r"cache_utils past_key DynamicCache StaticCache kv_cache", "the KV cache", (CACHE, ATTENTION)),
        (r"dequantize MatMul4Bit matmul_4bit dequant", "dequantising a weight", (WEIGHT,)),
        (
            r"quantize_4bit quantize_blockwise Params4bit Int8Params to_empty",
            "quantising a weight while it loads",
            (WEIGHT,),
        ),
        (
            r"_init_group init_state exp_avg _init_optimizer initialize_optimizer_states adam\w*\.py adamw?: "
            r"optimizer_update sgd\.py lion\.py optim/",
            "the optimizer's step",
            (STATES, GRADIENT, WEIGHT),
        ),
        (r"clip_grad _foreach_norm unscale_", "clipping gradients", (GRADIENT,)),
        (
            r"reduce_bucket flatten ipg reduce_scatter average_tensor grad_partition stage_1_and_2 bucket",
            "reducing gradients between ranks",
            (GRADIENT,),
        ),
        (
            r"all_?gather partition_parameters unshard _gather fetch_sub_module stage3",
            "gathering weights between ranks",
            (WEIGHT,),
        ),
        (
            r"create_weights _load_state_dict load_state_dict from_pretrained load_weights weight_loader load_model "
            r"set_module_tensor _load_parameter \bto_device _initialize_model param_applied t\.to\(device convert\(t "
            r"safe_open get_tensor",
            "loading weights",
            (WEIGHT,),
        ),
        (
            r"mlp act_fn gate_proj up_proj down_proj swiglu feed_forward ffn dense_h_to_4h experts",
            "the MLP",
            (MLP,),
        ),
        (r"rotate_half rotary apply_rope", "rotary embeddings", (ATTENTION,)),
        (r"scaled_dot_product sdpa flash_attn self_attn attention", "attention", (ATTENTION, SCORES)),
        (r"layer_?norm rms_?norm variance \.pow\(2\)", "a norm", (HIDDEN,)),
        (r"lora dropout", "an adapter", (HIDDEN, MLP, ATTENTION)),
        (r"embed_tokens embedding", "the embeddings", (HIDDEN, WEIGHT)),
        (r"checkpoint\.py", "recomputing a checkpointed layer", ()),
        (r"run_backward \.backward\( :backward", "the backward pass", ()),
        (r"generate _sample", "generating", ()),
    )
)
# The phase of a traceback: that of the first row of whose words any frame has some.
_PHASES = tuple(
    ("|".join(words.split()), phase)
    for words, phase in (
        (r"evaluat evaluation_loop prediction_step validation_step :validate", "eval"),
        (r"save_model save_pretrained save_checkpoint _save get_state_dict", "save"),
        (r"merge_and_unload unload_and_optionally_merge", "merge"),
        (r"run_backward \.backward\( :backward", "backward"),
        (r"optimizer\.step :optimizer_step lr_scheduler _take_model_step clip_grad_norm", "step"),
        (r"capture_model capture_graph cuda_?graph", "graph capture"),
        (r"profile_run determine_available_memory determine_num_available_blocks _dummy_run", "profiling"),
        (r"initialize_kv_cache init_memory_pool _allocate_kv_cache", "KV cache"),
        (r"generate\( :generate _sample execute_model forward_batch :decode :prefill", "generate"),
        (
            r"from_pretrained load_model load_weights _load_state_dict prepare_model_for_kbit \.to\( \.cuda\( "
            r"create_weights",
            "load",
        ),
        (r"training_step compute_loss :forward train\( model\(", "forward"),
    )
)


class Position(NamedTuple):
    """Where a traceback ends.

    phase  load, forward, backward, step, eval, save, merge, generate, or an engine's; empty if the frames do not tell
    words  the operation, in words
    roles  kinds of tensors that it allocates
    frame  the frame that tells the operation
    """

    phase: str = ""
    words: str = ""
    roles: tuple[str, ...] = ()
    frame: TraceFrame | None = None


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def position(frames: Sequence[TraceFrame]) -> Position:
    """Return where a traceback ends.

    >>> position([TraceFrame("accelerate/utils/operations.py", 781, "convert_to_fp32", "return tensor.float()")])[1:3]
    ('the head and the loss', ('logits',))
    """
    texts = [f"{frame.file}:{frame.function}: {frame.code}" for frame in frames]
    phase = next((name for pattern, name in _PHASES if any(_compiled(pattern).search(t) for t in texts)), "")
    for frame, text in zip(reversed(frames), reversed(texts), strict=True):
        for row in OPERATIONS:
            if _compiled(row.pattern).search(text):
                return Position(phase, row.words, row.roles, frame)
    return Position(phase)
