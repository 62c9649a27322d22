"""Refusals of what a model and its method cannot train: losses, frozen or idle weights, units of several dtypes."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.methods.methods import ADAPTERS
from memplan.core.errors import SpecError, refused
from memplan.program.graph import weights_of
from memplan.program.sharding.choice import sharding_of
from memplan.program.stack_facts import parameter_targets, ties_head
from memplan.program.structure import Structure
from memplan.resolve.open_run import OpenRun
from memplan.resolve.refusals.refuse import not_yet_with

_NARROWEST_FLEX_HEAD = 16


def model_classes(r: OpenRun) -> Iterator[SpecError]:
    """Yield errors for an attention kernel that the model's classes reject, and a profile whose classes were not read.

    Profiles other than transformers-5 have only been read for causal language models, and TRL's for its reward models.
    """
    if r.kernels.attention in r.model.family.attention.unsupported:
        supported = "eager" if r.library.attention.no_sdpa else "sdpa, sdpa_efficient, eager"
        text = f"{r.kernels.attention} is not supported yet for {r.name}; supported: {supported}"
        yield refused("kernels.attention", text)
    objective = r.model.objective
    if objective != "causal_lm" and r.profile != "transformers-5" and r.trainer != "reward":
        yield refused("profile", f"{r.profile} is not supported yet for {objective}; supported: transformers-5")


def flex_attention(r: OpenRun) -> Iterator[SpecError]:
    """Yield errors for what flex attention rejects, and what was not traced with it.

    Source: transformers 5.24 integrations/flex_attention.py flex_attention_forward, torch 2.13
    nn/attention/flex_attention.py _validate_embed_dim; Triton needs compute capability 7.0.
    """
    field, name, p = "kernels.attention", "flex_attention", r.parallelism
    if r.model.probability("attention_dropout") > 0:
        yield refused(field, f"{name} rejects attention_dropout in training, which {r.name} has; use sdpa")
    if min(r.model.head_widths) < _NARROWEST_FLEX_HEAD:
        yield refused(field, f"{name} needs heads at least {_NARROWEST_FLEX_HEAD} wide; use sdpa")
    if r.capability is not None and r.capability < (7, 0):
        yield refused(field, f"{name} needs compute capability 7.0 or later; use sdpa")
    if not r.model.family.attention.flex:
        yield refused(field, f"{name} is not supported yet for {r.model.model_type}; use sdpa")
    if not r.trains or r.trainer != "sft" or not r.library.attention.flex:
        yield refused(field, f"{name} is only supported yet in sft, with transformers 5 and trainers of it; use sdpa")
    others = {
        "batch.packing": bool(r.batch_facts.packing),
        "method.kind": bool(r.method.virtual_tokens),
        "parallelism.offload": p.offload.activations,
        **{f"parallelism.{degree}": getattr(p, degree) > 1 for degree in ("tp", "cp", "pp")},
        "parallelism.device_map": p.device_map is not None,
    }
    for other, is_set in others.items():
        if is_set:
            yield refused(field, f"{name} is not supported yet with {other}; use sdpa")


def smoothed_labels(r: OpenRun) -> Iterator[SpecError]:
    """Yield an error for smoothed labels of a model that also sees or hears: the Trainer does not shift them."""
    if r.kernels.loss == "label_smoothing" and any(r.model.get(key) for key in ("vision_config", "audio_config")):
        yield not_yet_with("kernels.loss", "label_smoothing and a vision or audio tower", "hf")


def training_objective(r: OpenRun) -> Iterator[SpecError]:
    """Yield errors for a loss, a version or a dtype that does not go with the model's objective."""
    if r.model.objective == "causal_lm":
        return
    yield from model_classes(r)
    is_reentrant = r.kernels.reentrant and r.kernels.checkpointing != "none"
    if r.model.family.training.shares_a_graph and is_reentrant and r.method.kind == "full":
        yield refused(
            "kernels.reentrant",
            f"torch fails in backward: every layer of {r.name} reads embeddings that train outside of it; use false",
        )
    smooths = r.kernels.loss == "label_smoothing" and r.model.objective != "feature_extraction"
    if r.kernels.loss != "hf" and not smooths:
        yield refused(
            "kernels.loss",
            f"{r.kernels.loss} only applies to causal language models; {r.name} is trained for {r.model.objective}, so "
            "use hf",
        )


def adapted_parameters(r: OpenRun) -> Iterator[SpecError]:
    """Yield an error for adapters on parameters under FSDP1.

    peft reads such an adapter's weights without calling the module that holds them; FSDP1 makes each of these modules a
    unit, which it only gathers when it is called.

    Source: peft 0.21 tuners/lora/layer.py ParamWrapper._activate_lora, utils/other.py fsdp_auto_wrap_policy.
    """
    names = sorted({name for group in parameter_targets(r.model) for name in group})
    named = [name for name in names if r.method.adapts(name)]
    if r.method.kind in ADAPTERS and named:
        yield refused(
            "method.targets",
            f"peft 0.21 cannot adapt {', '.join(named)} under FSDP1, because they are parameters, not linear layers, "
            "and peft reads their adapters without calling the modules that FSDP1 gathers; name linear layers such "
            "as q_proj and v_proj, or use fsdp2",
        )


_IMAGES = ("images", "vision tower", "vision and projector")
# What calls an encoder, by the group of its weights; its name; and the parts to freeze if nothing calls it.
_ENCODERS = {"vision": _IMAGES, "projector": _IMAGES, "audio": ("clips", "audio encoder", "audio")}


def trained_weights(structure: Structure, finds_unused: bool) -> Iterator[SpecError]:
    """Yield errors if nothing is left to train, if ranks would wait for gradients that never come, or if weights of
    several dtypes would be sharded together.

    finds_unused  DDP looks for weights without gradients although the model is checkpointed, where transformers'
                  Trainer does not. Source: transformers 5.24 trainer.py, trl 1.16.0 trainer/sft_trainer.py
    """
    graph, ranks = structure.graph, structure.ranks
    weights, recipe = [w for w, _, _ in weights_of(graph)], graph.recipe
    adapts = recipe.kind in ADAPTERS
    if recipe.frozen and adapts and not any(w.group == "adapter" for w in weights):
        yield refused("method.frozen", "freezes all of method.targets, so nothing is left to adapt")
    if adapts and not any(w.trains for w in weights):
        yield refused(
            "method.targets",
            f"{graph.model.model_type} models never call {', '.join(recipe.targets)}, so their adapters get no "
            "gradients; name other targets too",
        )
    idle = next((w for w in weights if w.idle and w.group != "adapter"), None) if ranks.world > 1 else None
    # FSDP2 leaves it out of what it reduces, which was traced with gpt-oss's sinks, not with DeepSeek V4's indexers:
    # torch 2.13 _fully_shard/_fsdp_param_group.py post_backward
    is_left_out = idle is not None and ranks.strategy == "fsdp2" and len(idle.shape.split()) == 1
    if idle is not None and not is_left_out and idle.group not in _ENCODERS:
        yield refused(
            "method.kind",
            f"{idle.name} of {graph.model.model_type} is trainable but never gets a gradient, which several GPUs "
            "would wait for; use lora, or one GPU",
        )
    if idle is not None and ranks.strategy == "ddp" and graph.checkpoint and not finds_unused:
        without, tower, parts = _ENCODERS.get(idle.group, _IMAGES)
        yield refused(
            "parallelism.find_unused_parameters",
            f"without {without} the {tower} gets no gradients, which DDP would wait for; set it to true, "
            f"set {without}, use --fsdp fsdp2, or freeze {parts} (method.frozen)",
        )
    if graph.flattens_frozen and ranks.row.gathers and any(w.stored for w in weights):
        yield refused(
            "method.quantization",
            "quantised weights are not supported under fsdp with LitGPT, which flattens adapters and frozen weights "
            "together; supported: lora, or profile transformers-5",
        )
    dtypes, field = " and ".join(sharding_of(structure).mixed_dtypes()), "parallelism.strategy"
    if dtypes and ranks.row.flat:
        yield refused(
            field,
            f"fsdp flattens the weights of a unit in one dtype, but these are {dtypes}; use fsdp2, or one dtype for "
            "weights and quantised storage with kbit_preparation false",
        )
    if ranks.expert_replicas and ties_head(graph):
        yield refused(
            "parallelism.ep",
            f"{graph.degrees.ep} is not supported yet with fsdp2 for models with tied embeddings; supported: 1",
        )
    if dtypes:
        yield refused(
            field,
            f"fsdp2 reduces the gradients of a unit in one dtype, but those of {graph.model.model_type} are {dtypes}; "
            + ("use ep 1" if ranks.expert_replicas else "use precision amp, which keeps trainable weights in fp32"),
        )
