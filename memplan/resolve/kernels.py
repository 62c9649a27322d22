"""Which kernels a run takes: of attention, by the rules of torch and of transformers, and fused ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memplan.catalogue.attention.attention import NO_FLASH_2
from memplan.catalogue.families import megatron
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.methods.methods import Recipe
from memplan.catalogue.profiles.profiles import find_profile
from memplan.core.errors import SpecError
from memplan.models.model import ModelSpec
from memplan.program.stack_facts import attention_dtype, fusible_kernels, tower_dtype
from memplan.spec.training import Kernels, Method


def as_the_version_has(
    model: ModelSpec, kernels: Kernels, profile: str, words: Mapping[str, Any]
) -> tuple[str, bool, list[str]]:
    """The attention and whether blocks are checkpointed, as the version has them for the model, and what it lacks.

    Raises SpecError for an attention that the framework's own model does not have.
    """
    attention, checkpoints, notes = kernels.attention, kernels.checkpointing not in ("none", "selective"), list[str]()
    if attention == "eager" and words["code"] in ("litgpt", "torchtitan"):
        raise SpecError(
            f"kernels.attention: {find_profile(profile).title} has no eager attention to choose; supported: sdpa, "
            "sdpa_efficient, sdpa_math",
            "kernels.attention",
        )
    if words["no_sdpa"] and attention == "sdpa":
        attention = "eager"
        notes.append(f"{profile} has no sdpa for {model.model_type}: eager attention is counted")
    if words["no_checkpoints"] and checkpoints:
        checkpoints = False
        notes.append(f"{profile} does not checkpoint {model.model_type}, though it is asked to: nothing is recomputed")
    return attention, checkpoints, notes


def dtype_of_attention(model: ModelSpec, recipe: Recipe) -> str:
    """The dtype attention computes in. Whether norms that were cast to fp32 hand on fp32 depends on the family."""
    if recipe.autocast:
        return recipe.compute
    return attention_dtype(model, recipe) if recipe.preparation else recipe.weights


def in_words(wiring: Wiring, words: Mapping[str, Any], attention: str) -> Wiring:
    """The wiring as a profile's words have the code around attention."""
    return wiring._replace(
        copies=words["flash_2_copies" if attention == "flash_attention_2" else "sdpa_copies"],
        triangles=words["triangles"],
        tables=words["rotary_tables"],
        half_math=words["half_math"],
        whole_rotary=words["whole_rotary"],
        uncapped=words["uncapped"],
        one_mask=words["one_mask"],
        scales_apart=words["scales_apart"],
        float_masks=words["float_masks"],
    )


def wiring_of(
    model: ModelSpec,
    attention: str,
    dtype: str,
    recipe: Recipe,
    capability: tuple[int, int] | None,
    padded: bool,
    windowed: bool,
) -> Wiring:
    """The kernel torch takes: flash needs 16 bits, no mask, compute capability 8 and heads up to 256 wide; the
    memory-efficient one needs head widths of a multiple of 16 bytes; what is left is the plain product. Flash takes no
    values of another width than the keys'. For flash attention 2 transformers itself casts fp32 queries to the dtype
    the model was loaded in, or autocast's.

    Source: torch 2.13 aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, transformers 5.24
    integrations/flash_attention.py get_target_dtype.
    """
    half = dtype != "fp32"
    widths = model.head_widths
    aligned = all(width % (8 if half else 4) == 0 for width in widths)
    efficient = "efficient" if aligned else "math"
    if model.model_type == megatron.KIND and attention.startswith("sdpa_"):
        raise SpecError(
            f"kernels.attention: {attention} is torch's, and Megatron-core takes Transformer Engine's: sdpa for what "
            "that chooses, flash_attention_2, eager",
            "kernels.attention",
        )
    if model.model_type == megatron.KIND and attention != "eager" and not megatron.uses_engine(model):
        raise SpecError(
            f"kernels.attention: transformer_impl local has unfused attention alone, eager, not {attention}",
            "kernels.attention",
        )
    if model.model_type == megatron.KIND and attention == "sdpa":
        own = megatron.chosen(half, capability)
        return Wiring(own, own)
    if attention == "eager":
        return Wiring("eager", "eager", padded, windowed)
    if attention == "sdpa_math":
        return Wiring("math", "math", padded, windowed)
    if attention == "sdpa_efficient":
        return Wiring(efficient, efficient, padded, windowed)
    if attention == "flash_attention_2":
        if model.model_type in NO_FLASH_2:
            raise SpecError(
                f"kernels.attention: {model.model_type} does not run with flash_attention_2: "
                f"{NO_FLASH_2[model.model_type]}; say sdpa",
                "kernels.attention",
            )
        target = recipe.compute if recipe.autocast else recipe.weights
        if target == "fp32":
            raise SpecError("kernels.attention: flash_attention_2 needs bf16 or fp16", "kernels.attention")
        if capability is not None and capability < (8, 0):
            raise SpecError(
                "kernels.attention: flash_attention_2 needs compute capability 8.0 or later", "kernels.attention"
            )
        return Wiring("flash_2", "flash_2", padded, windowed, target)
    flash = half and widths[0] == widths[1] <= 256 and (capability is None or capability >= (8, 0))
    return Wiring("flash" if flash else efficient, efficient, padded, windowed)


def kernel_of_tower(model: ModelSpec, recipe: Recipe, kernels: Kernels, capability: tuple[int, int] | None) -> str:
    """The kernel of the attention in the tower that sees images, by the same rules."""
    from memplan.models.configs.images import PACKS

    known = ("sdpa", "sdpa_efficient", *(("flash_attention_2",) if model.model_type in PACKS else ()))
    if kernels.attention not in known:
        raise SpecError(
            f"kernels.attention: {kernels.attention} is not supported yet with images of {model.model_type}; "
            f"supported: {', '.join(known)}",
            "kernels.attention",
        )
    if kernels.checkpointing == "offload" and model.model_type in ("mistral3", "mllama"):
        raise SpecError(
            f"kernels.checkpointing: offload is not supported yet with images of {model.model_type}, whose masks go to "
            "the host, too; supported: none, full",
            "kernels.checkpointing",
        )
    if model.model_type == "llama4" and (kernels.checkpointing == "offload" or kernels.reentrant):
        field, value = ("reentrant", "true") if kernels.reentrant else ("checkpointing", "offload")
        raise SpecError(
            f"kernels.{field}: {value} is not supported yet with images of llama4, whose tower's layers are given "
            "hidden states by name: those neither go to the host nor have gradients by reentrant checkpointing; "
            "supported: none, full, not reentrant",
            f"kernels.{field}",
        )
    if model.model_type == "llama4" and not (recipe.autocast or recipe.quantization or recipe.weights == "bf16"):
        raise SpecError(
            f"precision.weights: llama4's processor makes pixels in bf16, which a tower in {recipe.weights} does not "
            "take; supported: bf16, or autocast",
            "precision.weights",
        )
    if kernels.attention == "flash_attention_2":
        return "flash_2"
    d = model.axes()["vd"]
    half = tower_dtype(model, recipe) != "fp32"
    if d % (8 if half else 4):
        raise SpecError(
            f"batch.images: the tower's heads are {d} wide, for which no kernel of sdpa is counted yet", "batch.images"
        )
    flash = kernels.attention == "sdpa" and half and d <= 256 and (capability is None or capability >= (8, 0))
    return "flash" if flash else "efficient"


def fused_kernels(
    model: ModelSpec, method: Method, kernels: Kernels, code: str, keeps: bool
) -> tuple[Kernels, list[str]]:
    """The kernels with those fused ones that have something to do, and the names of those that have not.

    Joined adapters are of bitsandbytes' and auto-gptq's weights; `keeps` says that GPTQ's are another's.
    """
    asked = kernels.fused or ()
    if not asked:
        return kernels, []
    able = set(fusible_kernels(model, code))
    if kernels.loss == "hf" and model.objective == "causal_lm":
        able.add("cross_entropy")
    q = method.quantization
    apart = q is not None and (q.format in ("awq-int4", "fp8") or (keeps and q.format.startswith("gptq")))
    if method.kind in ("lora", "qlora") and code == "transformers" and not apart:
        able.add("lora")
    used = tuple(name for name in asked if name in able)
    return kernels.model_copy(update={"fused": used}), [name for name in asked if name not in able]
