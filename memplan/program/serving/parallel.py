"""How an engine's GPUs divide a model: tensor-parallel ranks, pipeline stages, and replicas that share experts.

vLLM's ranks are tp x dp x pp. In a model with experts the dp groups share them: each group divides its attention and
MLPs by tp, and the experts are divided by tp x dp, by their width or (ep) as whole experts. SGLang's groups are
replicas, except with data-parallel attention (`dp_attention`): then attention and embeddings are divided by tp, and
everything else by tp x dp, of which ep ranks take whole experts.

llama.cpp is one process that spreads layers over all its GPUs.

Source: vllm 0.33.0 model_executor/layers/fused_moe/config.py FusedMoEParallelConfig.make; sglang 0.5.23
arg_groups/fields/parallel.py attn_dp_size, layers/vocab_parallel_embedding.py, layers/moe/fused_moe_triton/layer.py.
"""

from __future__ import annotations

from memplan.catalogue.profiles.engines import ServingEngine
from memplan.models.model import ModelSpec
from memplan.program.serving.layer_ranges import Stage, by_card, pipeline, whole
from memplan.program.serving.settings import ServingRanks, Settings
from memplan.spec.serving import Serving


def stages_of(engine: ServingEngine, model: ModelSpec, ranks: ServingRanks, serving: Serving) -> tuple[Stage, ...]:
    """Return the layers of each GPU; tensor-parallel ranks count as one GPU."""
    layers = model.num_hidden_layers
    if engine.kind == "llama.cpp":
        split = serving.tensor_split or ()
        return by_card(layers, serving.gpu_layers or 0, ranks.cards, split if any(split) else ())
    if ranks.pp == 1:
        return (whole(layers),)
    stages = pipeline(layers, ranks.pp, "middle" if engine.kind == "vllm" else "last")
    if not model.tie_word_embeddings:
        return stages
    return (*stages[:-1], stages[-1]._replace(embedded=True))


def stage_settings(s: Settings) -> tuple[Settings, ...]:
    """Return the settings of every GPU that has different layers."""
    return tuple(s._replace(stage=stage) for stage in stages_of(s.engine, s.model, s.ranks, s.serving))
