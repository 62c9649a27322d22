"""Which kernels a run uses: of attention, by the rules of torch and transformers, and fused ones."""

from __future__ import annotations

from memplan.catalogue import build
from memplan.catalogue.families import megatron
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.methods.fused_lora import LIBRARIES
from memplan.catalogue.methods.methods import Recipe
from memplan.catalogue.profiles.behaviour import LibraryBehaviour
from memplan.catalogue.profiles.profiles import find_profile
from memplan.core.errors import refused
from memplan.models.family_facts import NO_CLASS
from memplan.models.model import ModelSpec
from memplan.program.stack_facts import attention_dtype, fusible_kernels, tower_dtype
from memplan.resolve.defaults import with_defaults
from memplan.resolve.open_run import OpenRun
from memplan.resolve.refusals.refuse import not_yet_with
from memplan.spec.training import Kernels, Method

_LONGEST_VARLEN_HEAD = 256
_TOWER_KERNELS = {"eager": "eager", "flash_attention_2": "flash_2"}
_COMPILED = {"in_place": ("compiled_cross_entropy",)}  # losses over all logits that torch's compiler was read for
FLASH_PACKAGES = {"flash_attention_2": "", "flash_attention_3": "3"}  # -> `Wiring.variant`


def separates_rows(model: ModelSpec, wiring: Wiring, code: str) -> bool:
    """Return whether the model's operations, as far as they were read, keep the sequences of a packed row apart."""
    if any(layer.mixer != "attention" for layer in model.layers):
        return False
    inputs = (op for op in build(model, wiring, code).before if op.name == "inputs")
    return any(t.name == "position_ids" for op in inputs for t in op.writes)


def runs_varlen(run: OpenRun) -> bool:
    """Return whether Axolotl runs torch's varlen attention over packed rows, instead of sdpa with a mask.

    Source: axolotl 0.21.0 loaders/patch_manager.py _apply_sdpa_varlen_patch.
    """
    keys, values = run.model.head_widths
    fits = keys == values <= _LONGEST_VARLEN_HEAD and not any(layer.sliding for layer in run.model.layers)
    return run.attention == "sdpa" and run.attention_dtype != "fp32" and fits


def default_attention(library: LibraryBehaviour) -> str:
    """Return the attention that a model has by default: sdpa, or eager if its class has no sdpa."""
    return "eager" if library.attention.no_sdpa is True else "sdpa"


def with_attention(kernels: Kernels, model: ModelSpec, library: LibraryBehaviour) -> Kernels:
    """Return the kernels with the default attention filled in. Raises SpecError for sdpa with a class that has none.

    Source: transformers 5.24 modeling_utils.py get_correct_attn_implementation.
    """
    default, asked = default_attention(library), kernels.attention
    if default == "eager" and asked is not None and asked.startswith("sdpa"):
        raise refused("kernels.attention", f"{model.model_type} does not run with {asked}: {NO_CLASS}; use eager")
    return with_defaults(kernels, attention=default)


def version_attention(
    model: ModelSpec, kernels: Kernels, profile: str, library: LibraryBehaviour, capability: tuple[int, int] | None
) -> tuple[str, bool, list[str]]:
    """Return the attention and whether blocks are checkpointed, as this version of the framework does it, and notes.

    Raises SpecError for an attention that the framework's own model does not have.
    """
    unchecked = ("none", "selective") if model.is_megatron else ("none",)
    attention, checkpoints, notes = str(kernels.attention), kernels.checkpointing not in unchecked, list[str]()
    if attention == "eager" and library.model.code in ("litgpt", "torchtitan"):
        raise refused(
            "kernels.attention",
            f"{find_profile(profile).title} has no eager attention; supported: sdpa, sdpa_efficient, sdpa_math",
        )
    is_old = capability is not None and capability < (8, 0)
    if library.attention.no_sdpa == "before 8.0" and is_old and attention == "sdpa":
        attention = "eager"
        on = f"{model.model_type} before compute capability 8.0"
        notes.append(f"{profile} has no sdpa for {on}: counted with eager attention")
    if library.checkpointing.no_checkpoints and checkpoints:
        checkpoints = False
        notes.append(f"{profile} ignores gradient checkpointing for {model.model_type}: nothing is recomputed")
    if model.family.training.no_checkpoints and checkpoints:
        checkpoints = False
        notes.append(f"transformers has no gradient checkpointing for {model.model_type}; use none")
    return attention, checkpoints, notes


def attention_compute_dtype(model: ModelSpec, recipe: Recipe) -> str:
    """Return the dtype attention computes in.

    peft's preparation casts all that is not quantised to fp32, and with it the hidden states. If embeddings or norms
    are then cast back, the family decides what the others pass on.
    """
    if recipe.autocast:
        return recipe.compute
    if recipe.preparation in ("", "fp32"):
        return recipe.preparation or recipe.weights
    return attention_dtype(model, recipe)


def with_profile_wiring(wiring: Wiring, library: LibraryBehaviour, attention: str) -> Wiring:
    """Return the wiring with what the profile says about the code around attention."""
    around = library.attention
    return wiring._replace(
        copies=wiring.copies or (around.flash_2_copies if attention in FLASH_PACKAGES else around.sdpa_copies),
        causal_buffers=around.causal_buffers,
        tables=around.rotary_tables,
        half_math=around.half_math,
        whole_rotary=around.rotates_entire_heads,
        uncapped=around.sdpa_skips_cap,
        one_mask=around.one_mask,
        scales_embeddings_outside=library.model.scales_embeddings_outside,
        float_masks=around.float_masks,
        window_masks=around.window_masks,
    )


def attention_wiring(
    model: ModelSpec,
    library: LibraryBehaviour,
    attention: str,
    dtype: str,
    recipe: Recipe,
    capability: tuple[int, int] | None,
    padded: bool,
    windowed: bool,
) -> Wiring:
    """Return the wiring with the attention kernel that torch picks.

    Flash attention needs 16 bits, no mask, compute capability 8, heads up to 256 wide, and values as wide as the keys.
    The memory-efficient kernel needs head widths of a multiple of 16 bytes. Otherwise torch uses plain matrix products.
    For FlashAttention-2 transformers itself casts fp32 queries to the dtype the model was loaded in, or autocast's.

    Source: torch 2.13 aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, transformers 5.24
    integrations/flash_attention.py get_target_dtype.
    """
    half = dtype != "fp32"
    widths = model.head_widths
    aligned = all(width % (8 if half else 4) == 0 for width in widths)
    efficient = "efficient" if aligned else "math"
    if model.is_megatron and attention.startswith("sdpa_"):
        raise refused(
            "kernels.attention",
            f"{attention} is a torch kernel, and Megatron-core uses Transformer Engine's; use sdpa (Transformer "
            "Engine's own choice), flash_attention_2 or eager",
        )
    if model.is_megatron and attention != "eager" and not megatron.uses_engine(model):
        raise refused(
            "kernels.attention", f"transformer_impl local only has unfused attention; use eager, not {attention}"
        )
    if model.is_megatron and attention == "sdpa":
        kernel = megatron.default_attention_kernel(half, capability)
        return Wiring(kernel, kernel)
    if attention == "eager":
        return Wiring("eager", "eager", padded, windowed)
    if attention == "sdpa_math":
        return Wiring("math", "math", padded, windowed)
    if attention == "sdpa_efficient":
        return Wiring(efficient, efficient, padded, windowed)
    if attention in FLASH_PACKAGES:
        facts = model.family.attention
        if facts.no_flash_2 and not (facts.flash_3 and FLASH_PACKAGES[attention] == "3"):
            other = f"{'flash_attention_3 or ' * facts.flash_3}{default_attention(library)}"
            why = f"{facts.no_flash_2}; use {other}"
            raise refused("kernels.attention", f"{model.model_type} does not run with {attention}: {why}")
        target = recipe.compute if recipe.autocast else recipe.weights
        if target == "fp32":
            raise refused("kernels.attention", f"{attention} needs bf16 or fp16")
        if capability is not None and capability < (8, 0):
            raise refused("kernels.attention", f"{attention} needs compute capability 8.0 or later")
        return Wiring("flash_2", "flash_2", padded, windowed, target, FLASH_PACKAGES[attention])
    if attention == "sdpa_cudnn":
        return _cudnn(half, widths, capability, padded, windowed)
    if attention == "flex_attention":
        heads = model.num_attention_heads  # repeated if they are no power of two: transformers' flex_attention_forward
        return Wiring("flex", "flex", padded, windowed, copies="heads" if heads & (heads - 1) else "")
    flash = half and widths[0] == widths[1] <= 256 and (capability is None or capability >= (8, 0))
    return Wiring("flash" if flash else efficient, efficient, padded, windowed)


def _cudnn(
    half: bool, widths: tuple[int, int], capability: tuple[int, int] | None, padded: bool, windowed: bool
) -> Wiring:
    """Return the wiring with cuDNN's attention alone, as torch.backends.cuda.sdp_kernel chooses it.

    Source: torch 2.13 aten/src/ATen/native/transformers/cuda/sdp_utils.cpp use_cudnn_attention.
    """
    field = "kernels.attention"
    if not half or widths[0] != widths[1] or widths[0] > 128 or widths[0] % 8:
        raise refused(field, "sdpa_cudnn needs bf16 or fp16, and heads up to 128 wide in multiples of 8; use sdpa")
    if capability is not None and capability < (8, 0):
        raise refused(field, "sdpa_cudnn needs compute capability 8.0 or later")
    if padded or windowed:
        raise not_yet_with(field, "masks of padded batches and sliding windows", "sdpa, sdpa_efficient, sdpa_math")
    return Wiring("flash", "flash", variant="cudnn")


def tower_kernel(model: ModelSpec, recipe: Recipe, kernels: Kernels, capability: tuple[int, int] | None) -> str:
    """Return the attention kernel of the vision tower or audio encoder, by the same rules as `attention_wiring`."""
    images = model.family.images
    assert images is not None
    count, media = ("batch.images", "images") if images.picture is not None else ("batch.clips", "clips")
    known = ("sdpa", "sdpa_efficient", "eager", *(("flash_attention_2",) if images.is_packed else ()))
    if kernels.attention not in known:
        raise refused(
            "kernels.attention",
            f"{kernels.attention} is not supported yet with {media} of {model.model_type}; supported: "
            f"{', '.join(known)}",
        )
    if kernels.checkpointing == "offload" and images.has_masks:
        raise refused(
            "kernels.checkpointing",
            f"offload is not supported yet with {media} of {model.model_type}, whose masks would be offloaded too; "
            "supported: none, full",
        )
    if images.by_keyword and (kernels.checkpointing == "offload" or kernels.reentrant):
        field, value = ("reentrant", "true") if kernels.reentrant else ("checkpointing", "offload")
        raise refused(
            f"kernels.{field}",
            f"{value} is not supported yet with {media} of {model.model_type}, whose vision tower passes hidden "
            "states to its layers by keyword: they are neither offloaded nor get gradients from reentrant "
            "checkpointing; supported: none, full, not reentrant",
        )
    if images.sets_dtype and recipe.quantization and images.sets_dtype not in recipe.skip:
        raise refused(
            "method.quantization.skip",
            f"{model.model_type} casts pixels to the dtype of {images.sets_dtype}, which is an integer if quantised: "
            f"name {images.sets_dtype} there, and lm_head",
        )
    if images.by_keyword and not (recipe.autocast or recipe.quantization or recipe.weights == "bf16"):
        raise refused(
            "precision.weights",
            f"{model.model_type}'s processor returns bf16 pixels, which a vision tower in {recipe.weights} rejects; "
            "supported: bf16, or autocast",
        )
    if kernels.attention in _TOWER_KERNELS:
        return _TOWER_KERNELS[kernels.attention]
    d = model.axes().get("vd", 0)  # Gemma 4's unified model has no attention outside of the text's
    half = tower_dtype(model, recipe) != "fp32"
    if d % (8 if half else 4):
        raise refused(count, f"sdpa is not supported yet for a head width of {d} in the tower")
    flash = kernels.attention == "sdpa" and half and d <= 256 and (capability is None or capability >= (8, 0))
    return "flash" if flash else "efficient"


def fused_kernels(
    model: ModelSpec, method: Method, kernels: Kernels, code: str, behaviour: LibraryBehaviour
) -> tuple[Kernels, list[str]]:
    """Return the kernels with the fused ones that apply, and the names of those that do not.

    Fused LoRA only takes bitsandbytes' and auto-gptq's weights, and some of its functions have DoRA.
    """
    asked = kernels.fused or ()
    if not asked:
        return kernels, []
    applicable = set(fusible_kernels(model, code))
    if kernels.loss == "hf" and model.objective == "causal_lm":
        applicable.update(("cross_entropy", *_COMPILED.get(behaviour.loss.logits, ())))
    q = method.quantization
    others = ("awq-int4", "fp8", "hqq-int4", "torchao-int8")
    keeps = behaviour.weights.keeps_matrix  # another library runs GPTQ's
    is_unsupported = q is not None and (q.format in others or (keeps and q.format.startswith("gptq")))
    is_dora, library = method.kind in ("dora", "qdora"), LIBRARIES[behaviour.model.fused_lora]
    if is_dora and library.owns_swiglu:
        applicable.discard("swiglu")
    takes = method.kind in ("lora", "qlora") or (is_dora and library.takes_dora)
    if takes and code == "transformers" and not is_unsupported:
        applicable.add("lora")
    used = tuple(name for name in asked if name in applicable)
    return kernels.model_copy(update={"fused": used}), [name for name in asked if name not in applicable]
