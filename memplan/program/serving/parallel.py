"""How the cards of an engine divide a model: ranks of a matrix, stages of a pipeline, replicas that share experts.

vLLM's ranks are tp x dp x pp. Of a model with experts the dp groups of ranks share them: each divides its attention and
its MLPs by tp, and the experts are divided by tp x dp, by their width or (ep) one by one. SGLang's groups are replicas,
but with attention that is data parallel (`dp_attention`): then attention is divided by tp alone, all else but the
embeddings by tp x dp, of which ep take whole experts.

llama.cpp is one process that lays layers on all its cards.

Source: vllm 0.33.0 model_executor/layers/fused_moe/config.py FusedMoEParallelConfig.make; sglang 0.5.23
arg_groups/fields/parallel.py attn_dp_size, layers/vocab_parallel_embedding.py, layers/moe/fused_moe_triton/layer.py."""

from __future__ import annotations

from memplan.catalogue.profiles.engines import Engine
from memplan.models.model import ModelSpec
from memplan.program.serving.layer_ranges import Stage, by_card, pipeline, whole
from memplan.program.serving.settings import Ranks, Settings
from memplan.spec.serving import Serving


def stages_of(engine: Engine, model: ModelSpec, ranks: Ranks, serving: Serving) -> tuple[Stage, ...]:
    """What each card has, of ranks that divide matrices the first."""
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


def each(s: Settings) -> tuple[Settings, ...]:
    """The settings of every card that has another part of the layers."""
    return tuple(s._replace(stage=stage) for stage in stages_of(s.engine, s.model, s.ranks, s.serving))
