"""The layers that a training method adapts, quantises and freezes.

What the model, or peft around it, does not allow is refused here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from memplan.catalogue.kernels.losses import READ_MATRIX
from memplan.catalogue.methods.litgpt_lora import ROLES, SWITCHES
from memplan.catalogue.methods.methods import LORA, PARTS, Recipe, inside
from memplan.catalogue.quantization.quantization import FORMATS
from memplan.core.errors import UnknownNameError, refused
from memplan.models.model import ModelSpec
from memplan.models.objectives import HEADS, modules_to_train
from memplan.models.peft_methods import EXCLUDING, PEFT_METHODS, filled_options, has_targets, refuses_layers
from memplan.program.stack_facts import (
    adaptable,
    has_conv1d,
    has_one_table,
    leads_through_blocks,
    linears,
    modules,
    modules_with_weights,
    multi_output_linears,
    parameter_targets,
    router_and_mixer_paths,
    takes_prefix,
)
from memplan.spec.formats import Quantization
from memplan.spec.training import Kernels, Method, Precision

if TYPE_CHECKING:
    from memplan.catalogue.methods.selection import Selection


def frozen_parts(model: ModelSpec, method: Method) -> tuple[str, ...]:
    """Return the validated parts of the model that are frozen and not adapted."""
    tower = model.family.images
    missing = "audio" if tower is None or tower.clip is None else "vision" if tower.picture is None else ""
    parts = tuple(part for part in PARTS if part != missing)
    for part in method.frozen:
        if part not in parts:
            raise UnknownNameError("method.frozen", part, parts)
    if not method.frozen:
        return ()
    if not model.has_tower:
        raise refused("method.frozen", f"{model.model_type} only has a language model, with no other parts to freeze")
    if method.kind in PEFT_METHODS and method.kind not in EXCLUDING:
        raise refused("method.frozen", f"{method.kind} has no exclude_modules in peft; name its targets instead")
    if set(method.frozen) == set(parts):
        raise refused("method.frozen", "nothing is left to train")
    return tuple(part for part in parts if part in method.frozen)


def loaded_wide(model: ModelSpec, precision: Precision) -> tuple[str, ...]:
    """Return the modules that transformers loads in fp32 although the run asks for another dtype."""
    return model.family.training.never_quantised if precision.weights == "fp16" else ()


def method_recipe(
    model: ModelSpec, method: Method, precision: Precision, code: str, stored: bool
) -> tuple[Recipe, list[str]]:
    """Return the run's recipe, and notes. `stored`: the checkpoint itself is quantised."""
    compute, autocast = str(precision.compute), precision.autocast
    if method.kind in ("full", "freeze"):
        if method.quantization is not None:
            raise refused("method.quantization", f"{method.kind} cannot train quantised weights; use qlora or qdora")
        return Recipe(method.kind, precision.weights, compute, autocast), []
    q = method.quantization
    if method.kind in ("lora", "dora") and q is not None and not stored:
        raise refused("method.quantization", f"use q{method.kind} for quantised weights")
    other = PEFT_METHODS.get(method.kind)
    if other is not None and q is not None and q.format not in other.formats:
        known = f"peft has {method.kind} over {', '.join(other.formats)} only, not {q.format}"
        message = known if other.formats else f"peft has no {method.kind} over quantised weights; use qlora"
        raise refused("method.quantization.format", message)
    if q is not None and q.format in FORMATS and not FORMATS[q.format].conv1d and has_conv1d(model):
        why = f"{q.format} is of linear layers, and those of {model.model_type} are Conv1D; use nf4"
        raise refused("method.quantization.format", why)
    if other is not None and not other.conv1d and has_conv1d(model):
        raise refused(
            "method.kind", f"peft's {method.kind} cannot wrap the Conv1D layers of {model.model_type}; use lora"
        )
    if refuses_layers(method.kind, model.model_type):
        of = model.model_type
        what = (
            f"the linear layers of {of}" if PEFT_METHODS[method.kind].targets else f"{of}, whose key heads it mistakes"
        )
        raise refused("method.kind", f"peft's {method.kind} refuses {what}; use lora")
    if other is not None and other.on == "attention":
        _check_attention(model, method)
    if other is not None and other.on == "blocks":
        _check_blocks(model, method)
    if other is not None and code != "transformers":
        raise refused("method.kind", f"{method.kind} is peft's, and {code} has its own adapters; use lora")
    targets, selection, notes = _adapted(model, method, code)
    absent = [name for name in method.modules_to_save if name in HEADS and name not in modules(model)]
    notes = [*notes, *(f"modules_to_save: this model has no {name}, and peft leaves it out" for name in absent)]
    present = (name for name in method.modules_to_save if name not in absent)
    saved = _modules(model, "method.modules_to_save", present)
    if other is not None and other.on == "norms":
        saved = (*_modules(model, "method.targets", () if isinstance(method.targets, str) else method.targets), *saved)
    recipe = Recipe(
        method.kind,
        precision.weights,
        compute,
        autocast,
        targets,
        saved,
        method.dropout > 0,
        str(method.adapter_dtype),
        library="peft" if code == "transformers" else code,
        selection=selection,
        tokens=method.trained_tokens,
        bias=str(method.options.get("bias") or "none") if method.kind in LORA else "none",
    )
    if method.options and other is None:
        from memplan.resolve.peft_options import decomposition, init_note, tied_copies

        tied = tied_copies(model, method, targets, saved)
        recipe = recipe._replace(decomposition=decomposition(method), saved=(*saved, *tied), ties=bool(tied))
        notes = [*notes, *init_note(method)]
    if other is not None:
        options = filled_options(method.kind, method.options, model.model_type)
        if other.on != "tokens":  # whose indices change nothing but their number
            recipe = recipe._replace(rank=method.rank if other.rank else 0, options=tuple(sorted(options.items())))
    if q is None:
        return recipe, notes
    if q.format == "int8":
        notes.append("LLM.int8 layers keep their inputs until the step ends, even with checkpointing")
    recipe, more_notes = quantised_recipe(model, recipe, q, stored)
    return recipe, [*more_notes, *notes]


def _check_attention(model: ModelSpec, method: Method) -> None:
    """Refuse models whose attention peft does not wrap, and more layers than there are."""
    kind, axes = method.kind, model.axes()
    if not has_targets(kind, model.model_type):
        families = ", ".join(PEFT_METHODS[kind].targets)
        raise refused("method.kind", f"{kind} is counted for {families}, not for {model.model_type}; use lora")
    if axes["a"] * axes["d"] != axes["h"]:
        raise refused("method.kind", f"peft's {kind} refuses heads that are not as wide as the hidden size; use lora")
    if method.last_layers > model.num_hidden_layers:
        of = f"{method.last_layers} is more than the model's {model.num_hidden_layers} layers"
        raise refused("method.options.adapter_layers", of)


def _check_blocks(model: ModelSpec, method: Method) -> None:
    """Refuse models whose layers peft does not find, or whose layers do not pass on one tensor of hidden states."""
    if not leads_through_blocks(model):
        what = (
            f"{method.kind} is counted for causal_lm of decoders whose layers are alike and pass on hidden states only"
        )
        raise refused("method.kind", f"{what}, not for {model.objective} of {model.model_type}; use lora")
    width = method.options.get("shadow_intermediate_size")
    if width is not None and not {"intermediate_size", "ffn_dim", "n_inner"}.intersection(model.config):
        field = "method.options.shadow_intermediate_size"
        raise refused(field, f"peft finds no such size in the config of {model.model_type}; leave it out")


def _adapted(model: ModelSpec, method: Method, code: str) -> tuple[tuple[str, ...], Selection | None, list[str]]:
    """Return the targets of the adapters, the modules that are chosen by their paths if any are, and notes."""
    if code != "transformers":
        if method.options or method.pattern:
            field = "options" if method.options else "targets"
            raise refused(f"method.{field}", f"settings of peft's adapters only apply to peft, not to {code}")
        return _switches(method), None, []
    takes = takes_prefix if method.has_prefix else has_one_table
    if (method.virtual_tokens or method.trained_tokens) and not takes(model):
        what = "virtual" if method.virtual_tokens else "trained"
        raise refused(
            "method.options", f"{what} tokens of {model.model_type} are not supported yet; name other methods"
        )
    if method.kind in PEFT_METHODS and PEFT_METHODS[method.kind].on != "linear":
        return (), None, []
    if method.chooses_paths:
        from memplan.resolve.peft_options import selection_of

        return selection_of(model, method, lambda: _targets(model, method))
    targets, notes = _targets(model, method)
    return targets, None, notes


def quantised_recipe(model: ModelSpec, recipe: Recipe, q: Quantization, stored: bool) -> tuple[Recipe, list[str]]:
    """Return the recipe with quantised matrices, and notes. `stored`: the checkpoint itself is quantised."""
    said = q.kbit_preparation
    row = FORMATS.get(q.format)
    preparation = "" if row is not None and not row.casts else said if isinstance(said, str) else "fp32" if said else ""
    used_directly, notes = _used_directly(model, tuple(q.skip or ()))
    return recipe._replace(
        quantization=q.format,
        double_quant=q.double_quant and q.format in ("nf4", "fp4"),
        block_size=q.block_size,
        skip=(
            *(n for n in q.skip or () if n == "lm_head"),
            *_modules(model, "method.quantization.skip", (n for n in q.skip or () if n != "lm_head")),
            *used_directly,
            *model.family.training.never_quantised,
        ),
        experts=bool(q.experts),
        fp4_experts=stored and q.format == "fp8" and model.config.get("expert_dtype") == "fp4",
        preparation=preparation,
        packed=stored or q.format not in ("nf4", "fp4", "int8", "hqq-int4", "torchao-int8"),
    ), [*notes, *([row.note] if row is not None and row.note else [])]


# Layers that a family may fuse into one matrix, and the names of the fused matrix.
_FUSED_NAMES = {
    **dict.fromkeys(
        ("q_proj", "k_proj", "v_proj"),
        ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "W_pack"),
    ),
    **dict.fromkeys(("gate_proj", "up_proj"), ("gate_up_proj", "dense_h_to_4h", "c_fc", "fc1", "w1")),
    "o_proj": ("dense", "out_proj", "c_proj", "wo"),
    "down_proj": ("dense_4h_to_h", "c_proj", "fc2", "w2"),
}


# The linear layers that peft takes for the experts' matrices in some families, as groups that it adapts together.
# Source: peft 0.21.2 utils/transformers_weight_conversion.py _MOE_TARGET_MODULE_MAPPING, qwen2_moe.
_FUSED_EXPERTS = (("gate_proj", "up_proj"), ("down_proj",))

# Layers of these models that peft refuses to wrap, because fused kernels read their weights.
# Source: peft 0.21 tuners/tuners_utils.py _check_lora_target_modules_mamba.
_READ_BY_KERNELS = ("out_proj", "conv1d")


def targets_that_peft_takes(model: ModelSpec) -> tuple[str, ...]:
    """Return the layers to adapt where peft's all-linear includes some that it cannot wrap; else nothing."""
    refused_names = {*multi_output_linears(model), *(_READ_BY_KERNELS if model.family.training.fused_mixers else ())}
    if not refused_names:
        return ()
    layers = {path: dims for path, dims in linears(model).items() if path != "lm_head" and model.vocab_size not in dims}
    names = dict.fromkeys(map(_end, layers))
    return tuple(name for name in names if name not in refused_names) if refused_names.intersection(names) else ()


def _refuse_read_by_kernels(model: ModelSpec, targets: Iterable[str], layers: Iterable[str]) -> None:
    if not model.family.training.fused_mixers:
        return
    names = dict.fromkeys(path.rpartition(".")[2] for path in layers if "embed" not in path and path != "lm_head")
    named = next((name for name in targets if name in _READ_BY_KERNELS), None)
    if named is not None or tuple(targets) == ("all-linear",):
        adaptable_names = ", ".join(name for name in names if name not in _READ_BY_KERNELS)
        raise refused(
            "method.targets",
            f"peft cannot adapt {named or 'out_proj'} in {model.model_type} models; choose from {adaptable_names}",
        )


def _targets(model: ModelSpec, method: Method) -> tuple[tuple[str, ...], list[str]]:
    """Return the names of the layers to adapt, checked, and notes. A fused layer stands for its whole matrix."""
    is_lora = method.kind in LORA  # only LoRA adapts embeddings and parameters; peft accepts larger ranks of others
    layers, groups, rank = (
        (adaptable(model), parameter_targets(model), method.rank) if is_lora else (linears(model), (), 0)
    )
    has_modules = any(".experts." in path for path in layers)  # one per expert
    absent = is_lora and not groups and not has_modules and model.family.training.fuses_experts
    groups = _FUSED_EXPERTS if absent else groups
    expert_names = {name for group in groups for name in group}
    layers = {path: dims for path, dims in layers.items() if path.rpartition(".")[2] not in expert_names}
    same_named = [path for path in adaptable(model) if path not in layers] if groups else []
    wrapped = multi_output_linears(model)
    for name in wrapped if method.targets == "all-linear" else wrapped.intersection(map(_end, method.targets)):
        raise refused(
            "method.targets",
            f"{name} of {model.model_type} returns more than one tensor, so peft cannot wrap it; name other targets",
        )
    asked = (method.targets,) if isinstance(method.targets, str) else tuple(method.targets)
    _refuse_read_by_kernels(model, tuple(target.rpartition(".")[2] for target in asked), layers)
    if method.targets == "all-linear":
        q = method.quantization
        if q is not None and q.format in FORMATS and not FORMATS[q.format].linear:
            names = ", ".join(dict.fromkeys(_end(path) for path in layers if "." in path))
            why = f"layers of {q.format} are no linear layers to peft's all-linear; name modules, such as {names}"
            raise refused("method.targets", why)
        saved = modules_to_train(model.objective, (), model.objectives[0] == "causal_lm")
        both = next((n for n in map(_end, layers) if n not in saved and saved and n.endswith(saved)), None)
        if both is not None:
            raise refused(
                "method.targets",
                f"peft copies {both} of {model.model_type}, whose name ends like {saved[0]}, and fails to adapt it "
                "too; name other targets",
            )
        inner = _inner_layers(model, method, layers, rank)
        numbered = next((path for path in inner if groups and _end(path).isdigit()), None)
        if numbered is not None:
            names = ", ".join(name for name in dict.fromkeys(map(_end, inner)) if not name.isdigit())
            why = f"fails in peft, which takes every module {_end(numbered)} for {numbered}; name modules, such as"
            raise refused("method.targets", f"all-linear {why} {names}")
        if groups and not absent:
            _check_parameters(method, "all-linear")
        note = model.family.training.all_linear_note
        notes = [f"method.targets: {note}"] if note else []
        return tuple(inner) if absent else ("all-linear",), [*notes, *_same_named_note(same_named)]
    if not method.targets:
        raise refused("method.targets", "is empty; name at least one module, or all-linear")
    if "all-linear" in method.targets:
        raise refused("method.targets", "all-linear stands alone, not in a list")
    experts = [_end(target) for target in method.targets if _end(target) in expert_names]
    for name in () if absent else experts:
        _check_parameters(method, name)
    for group in groups:
        missing = [name for name in group if name not in experts]
        if missing and len(missing) < len(group):
            raise refused(
                "method.targets",
                f"{' and '.join(group)} are one parameter in this family, and peft can only adapt them together; add "
                f"{' and '.join(missing)}",
            )
    resolved, unmatched, notes = _named_layers(method, layers, rank, () if absent else experts)
    if not resolved:
        known = {*map(_end, layers)} | (set[str]() if absent else expert_names)
        raise UnknownNameError("method.targets", unmatched[0], (*sorted(known), "all-linear"))
    others = modules_with_weights(model) - expert_names
    other = next((name for name in unmatched if _end(name) in others), None)
    if other is not None:
        why = f"{other} of {model.model_type} is no linear layer, so peft cannot wrap it; leave it out"
        raise refused("method.targets", why)
    if unmatched:
        notes.append(
            f"{model.model_type} has no {', '.join(unmatched)} that peft finds: only {', '.join(resolved)} "
            f"{'is' if len(resolved) == 1 else 'are'} adapted"
        )
    return tuple(resolved), notes + (_same_named_note(same_named) if experts else [])


def _inner_layers(
    model: ModelSpec, method: Method, layers: Mapping[str, tuple[int, int]], rank: int
) -> dict[str, tuple[int, int]]:
    """Return all linear layers but the head, with their rows and columns, checked."""
    inner = {
        path: dims
        for path, dims in linears(model).items()
        if path in layers
        and model.vocab_size not in dims
        and min(dims) > 1
        and not inside(path, method.modules_to_save)
    }
    if not inner:
        raise refused("method", f"{model.model_type} has no linear layers to adapt")
    gated = router_and_mixer_paths(model)  # may have fewer rows than the rank, and are adapted all the same
    for path, dims in sorted(inner.items(), key=lambda item: min(item[1])):
        if path not in gated and rank > min(dims):
            _refuse_rank(method.rank, path, dims)
    return inner


def _named_layers(
    method: Method, layers: Mapping[str, tuple[int, int]], rank: int, experts: Iterable[str]
) -> tuple[list[str], list[str], list[str]]:
    """Return the targets' names in this model, targets that it does not have, which peft ignores, and notes."""
    names, notes, resolved, unmatched = {*map(_end, layers)}, list[str](), dict[str, None](), list[str]()
    for target in method.targets:
        if _end(target) in experts:
            resolved[_end(target)] = None
            continue
        some = _is_end_of_some(target, layers)
        name = target if some else _last(target, "method.targets", layers)
        if name not in names and not some:
            fused = next((f for f in _FUSED_NAMES.get(name, ()) if f in names), None)
            if fused is None:
                unmatched.append(target)
                continue
            notes.append(f"{name} is part of {fused} in this family: all of {fused} is adapted")
            name = fused
        for path, dims in layers.items():
            if f".{path}".endswith(f".{name}") and rank > min(dims) > 1:
                _refuse_rank(method.rank, path, dims)
        resolved[name] = None
    return list(resolved), unmatched, notes


def _end(name: str) -> str:
    return name.rpartition(".")[2]


def _is_end_of_some(target: str, paths: Iterable[str]) -> bool:
    """Whether a dotted target is the end of some, but not all, of the paths whose last part is the target's."""
    ends = {f".{path}".endswith(f".{target}") for path in paths if _end(path) == _end(target)}
    return ends == {True, False}


def _check_parameters(method: Method, target: str) -> None:
    """Raise SpecError for what peft does not support on parameters that are not linear layers.

    Source: peft 0.21 tuners/lora/layer.py ParamWrapper.
    """
    which = f"{target} here names experts or a router, which are bare parameters"
    if "dora" in method.kind:
        raise refused("method.kind", f"{which}, and peft has no DoRA for them; name other targets")
    if method.dropout:
        raise refused("method.dropout", f"{which}, and peft has no dropout for them; use 0, or name other targets")


def _same_named_note(paths: list[str]) -> list[str]:
    """Return a note if linear layers share their names with experts, and are therefore not adapted."""
    if not paths:
        return []
    return [f"peft takes these names for the experts' and leaves {', '.join(sorted(paths))} unadapted"]


def check_time_steps(model: ModelSpec, method: Method) -> None:
    """Raise SpecError if the model multiplies by a quantised weight itself instead of calling its layer.

    Source: transformers 5.24 models/mamba/modeling_mamba.py MambaMixer.forward; Falcon Mamba and Jamba call the layer.
    """
    q, field = method.quantization, "method.quantization.skip"
    for layer in model.family.training.skips:
        if q is not None and layer not in (q.skip or ()):
            raise refused(
                field,
                f"{model.model_type} models read {layer}'s weight directly, so it cannot be quantised; add lm_head and "
                f"{layer}",
            )


def _used_directly(model: ModelSpec, skip: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
    """Return the layers whose weights the family uses directly, unless `skip` names them, and a note on them."""
    reads = model.family.training.direct_reads
    if reads is None or (reads.key and not model.config.get(reads.key)):
        return (), []
    missing = tuple(name for name in reads.layers if name not in skip)
    if not missing:
        return (), []
    names = ", ".join(missing)
    return missing, [
        f"{names}: counted unquantised, as the model {reads.verb} them; add them to method.quantization.skip"
    ]


def check_head(model: ModelSpec, method: Method, kernels: Kernels) -> None:
    """Raise SpecError if the output projection or another layer is quantised but cannot be."""
    q, field = method.quantization, "method.quantization.skip"
    if method.trained_tokens and model.tie_word_embeddings and kernels.loss != "hf":
        raise refused("kernels.loss", f"{kernels.loss} is not supported yet with trained tokens in a tied head; use hf")
    if kernels.loss in READ_MATRIX and any(name.rpartition(".")[2] == "lm_head" for name in _listed(method)):
        raise refused(
            "method.targets", f"the loss {kernels.loss} reads lm_head's matrix, not its adapters; leave it out"
        )
    if q is None:
        return
    for name in multi_output_linears(model).difference(q.skip or ()):
        raise refused(
            field,
            f"{name} of {model.model_type} returns more than one tensor, which bitsandbytes' layer cannot; add it",
        )
    if "lm_head" in (q.skip or ()):
        return
    if model.tie_word_embeddings:
        raise refused(field, "lm_head shares its weight with the embeddings, which are not quantised; add lm_head")
    if kernels.loss in ("fused", *READ_MATRIX):
        raise refused(field, f"the {kernels.loss} loss needs an unquantised lm_head; add lm_head")


def _listed(method: Method) -> tuple[str, ...]:
    """Return the module names that the method lists as targets."""
    return () if isinstance(method.targets, str) else method.targets


def _switches(method: Method) -> tuple[str, ...]:
    """Return the layers that LitGPT's LoRA adapts, as its command-line switches."""
    if method.targets == "all-linear":
        return tuple(switch for switch in SWITCHES if switch != "head")
    roles = [ROLES.get(name.rpartition(".")[2], name) for name in method.targets]
    for name, switch in zip(method.targets, roles, strict=True):
        if switch not in SWITCHES:
            raise UnknownNameError("method.targets", name, (*ROLES, *SWITCHES, "all-linear"))
    return tuple(switch for switch in SWITCHES if switch in roles)


def _refuse_rank(rank: int, path: str, dims: tuple[int, int]) -> None:
    raise refused("method.rank", f"{rank} is larger than the smaller side of {path} ({dims[0]} x {dims[1]})")


def _modules(model: ModelSpec, field: str, named: Iterable[str]) -> tuple[str, ...]:
    """Return the last parts of the module names that a field lists, checked."""
    wanted = tuple(named)
    if not wanted:
        return ()
    names, resolved = modules(model), list[str]()
    for name in wanted:
        last = _last(name, field, adaptable(model))
        if last not in names:
            raise UnknownNameError(field, name, sorted(names))
        resolved.append(last)
    return tuple(resolved)


def _last(name: str, field: str, paths: Iterable[str]) -> str:
    """Return the last part of a dotted name, if it denotes the same modules."""
    last = name.rpartition(".")[2]
    same_named = [path for path in paths if path.rpartition(".")[2] == last]
    if "." in name and not all(f".{path}".endswith(f".{name}") for path in same_named):
        raise refused(field, f"{name!r} is not every {last}, and adapting only some of them is not supported yet")
    return last
