"""SGLang's pools: token slots for layers with full attention and with a sliding window, and states of requests.

Source: sglang 0.5.23 arg_groups/memory_hook.py handle_gpu_memory_settings, model_executor/pool_configurator.py,
mem_cache/kv_cache_configurator.py _profile_available_bytes and _handle_max_mamba_cache.

Text Generation Inference has the same slots. Its warm-up runs the longest prompts with a cache of their own; the pool
gets the tokens of that cache and 0.9 of the memory that was left (see `memplan.program.serving.budget`).

Source: text-generation-inference server/text_generation_server/models/flash_causal_lm.py FlashCausalLM.warmup.
"""

from __future__ import annotations

from memplan.core.errors import refused
from memplan.core.units import GIB, MIB
from memplan.models.model import ModelSpec
from memplan.program.serving.draft import layers_of
from memplan.program.serving.parallel import stage_settings
from memplan.program.serving.pool import Tokens
from memplan.program.serving.settings import ServingRanks, Settings

_STATES_A_REQUEST = 3  # with a radix cache: mem_cache/kv_cache_configurator.py _calculate_mamba_ratio


def static_fraction(total: int, chunk: int, graphs: int, ranks: ServingRanks, latent: bool, captures: bool) -> float:
    """Return the share of a GPU's bytes for weights and pools (`mem_fraction_static`).

    The rest is an allowance for activations of a chunk of tokens, for CUDA graphs of up to `graphs` requests if the
    engine `captures` them, and for the padding of data-parallel attention.
    """
    reserved = 512 + 1.5 * max(chunk, 2048) + ranks.tp * ranks.sharing * ranks.pp / 8 * 1024
    if captures:
        reserved += 2 * graphs + (1.5 * 1024 if latent else 8 * prefill_graphs(chunk))
    if ranks.sharing > 1:
        reserved += graphs * ranks.sharing * (4.5 if graphs > 300 else 3)
    if total > 60 * GIB:
        reserved = max(reserved, 10 * 1024)
    mib = total / MIB
    return round((mib - reserved) / mib, 3)


def tower_factor(model: ModelSpec) -> float:
    """Return the factor by which a vision tower reduces that share; the larger the tower, the smaller the factor.

    Source: arg_groups/memory_hook.py adjust_mem_fraction_for_vlm, which reads `num_hidden_layers` and `hidden_size` of
    the tower's config, by default 24 and 1,024.
    """
    tower = model.part("vision_config")
    if not tower:
        return 1.0
    layers, hidden = tower.get("num_hidden_layers", 24), tower.get("hidden_size", 1024)
    if not isinstance(layers, int) or not isinstance(hidden, int):
        layers, hidden = 24, 1024
    excess = layers * hidden**2 / (24 * 1024**2) - 1
    return 0.95 * max(0.8, min(1.05, 1 - 0.1 * excess))


def prefill_graphs(tokens: int) -> int:
    """Return how many prefill steps are captured as CUDA graphs.

    Source: arg_groups/cuda_graph_hook.py generate_prefill_cuda_graph_batch_sizes.
    """
    sizes = ((4, 32, 4), (48, 256, 16), (288, 512, 32), (576, 1024, 64), (1280, 4096, 256), (4608, tokens, 512))
    return sum(len(range(first, min(last, tokens) + 1, step)) for first, last, step in sizes)


def pool(s: Settings, available: int) -> Tokens:
    """Return the token slots and states that fit in `available` bytes on each rank."""
    layers = [c for c in s.caches if c.parts]
    full = sum(s.token_bytes(c, s.packed) for c in layers if c.kind in ("attention", "latent", "chunked"))
    sliding = sum(s.token_bytes(c, s.packed) for c in layers if c.kind == "sliding")
    window = max((c.window or 0 for c in layers if c.kind == "sliding"), default=0)
    dtype = s.dtype if s.behaviour.state_dtype == "model" else s.behaviour.state_dtype
    state = max(
        sum(of_stage.state_bytes(c, dtype) for c in of_stage.caches if c.kind == "state")
        for of_stage in stage_settings(s)
    )
    if state and not s.behaviour.state_share:
        raise refused("model", f"{s.model.model_type} keeps states, not supported yet with {s.engine.name}")
    if s.model.part("vision_config"):  # kept for the tower's outputs. Source: mm_runtime_reservation_gb
        available -= s.behaviour.image_cache_mib * MIB
    page, available = s.block, max(0, available)
    states = None
    if state:
        share = s.behaviour.state_share
        states = max(0, available * share // (1000 + share) // state - 1)  # one more is for padding
        available = max(0, available - (states + 1) * state)
    per_request = _STATES_A_REQUEST if s.serving.prefix_caching else 1
    if not full and not sliding:  # tokens take no memory: as many slots as the longest request
        return Tokens(s.longest, 0, page, states=states, state_bytes=state, per_request=per_request)
    if not s.serving.hybrid_cache:
        full, sliding = full + sliding, 0
    drafted = layers_of(s)
    if drafted and (sliding or state):
        raise refused(
            "serving.speculative_method",
            f"drafts of layers with windows or states are not supported yet with {s.engine.name}",
        )
    # SGLang assumes that a draft's layers are as wide as the model's: model_executor/pool_configurator.py
    share = full * len(drafted) // max(1, len(layers))
    more, full = sum(s.token_bytes(c, s.packed) for c in drafted) - share, full + share
    if full and sliding:
        share = s.behaviour.window_share
        slots = available * 1000 // (1000 * full + share * sliding) // page * page
        windowed = slots * share // 1000 // page * page
        return Tokens(slots, full, page, windowed, sliding, window, states, state, per_request)
    slots = available // (full or sliding) // page * page
    if full:
        return Tokens(slots, full, page, states=states, state_bytes=state, per_request=per_request, more_bytes=more)
    return Tokens(0, 0, page, slots, sliding, window, states, state, per_request)
