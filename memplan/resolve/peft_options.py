"""Settings of peft's LoraConfig other than rank, alpha, dropout and targets, by peft's names: `method.options`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from memplan.catalogue.methods.selection import Selection, module_paths
from memplan.core.errors import MemplanError, SpecError, UnknownNameError, nearest, refused
from memplan.models.model import ModelSpec
from memplan.program.stack_facts import default_stack, parameter_targets, tied_modules
from memplan.spec.training import Method

_BIAS = ("none", "all", "lora_only")
# Values of init_lora_weights after which a step takes what it takes after the default. mica freezes half an adapter.
_INITS = ("gaussian", "orthogonal", "olora", "pissa", "loftq", "corda", "eva")
_ON_DATA = {
    "corda": "each adapted layer's covariance of inputs, in fp32",
    "eva": "each adapted layer's singular vectors of inputs, after which it moves ranks between layers",
}


def _is_true_or_false(value: Any) -> bool:
    return isinstance(value, bool)


def _are_names(value: Any) -> bool:
    words = cast(tuple[Any, ...], value if isinstance(value, (list, tuple)) else (value,))
    return all(isinstance(word, str) for word in words)


def _are_numbers(value: Any) -> bool:
    return _is_number(value) or (isinstance(value, (list, tuple)) and all(map(_is_number, cast(list[Any], value))))


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_pattern(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        _is_number(rank) and rank for rank in cast(Mapping[str, Any], value).values()
    )


def _is_init(value: Any) -> bool:
    return isinstance(value, bool) or value in _INITS or re.fullmatch(r"pissa_niter_\d+", str(value)) is not None


def token_indices(field: str, value: Any, repeats: bool = False) -> Iterator[SpecError]:
    """Yield an error for what is not a list of token numbers, of which each is named once unless it `repeats`."""
    numbers = cast(tuple[Any, ...], value if isinstance(value, tuple) else ())
    if not numbers or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in numbers):
        given = f"must be given (--peft-options {field.rpartition('.')[2]}=[5,6])"
        shown = given if value is None else f"must be a list of whole numbers, not {value!r:.40}"
        yield refused(field, f"{shown}: the numbers of the tokens whose embeddings train")
    elif len(set(numbers)) < len(numbers) and not repeats:
        yield refused(field, "names a token twice")


# The names by which peft finds modules to tie. Source: peft 0.21 utils/constants.py EMBEDDING_LAYER_NAMES.
_TIED = frozenset({"embed_tokens", "lm_head"})

# Each setting, what a value must be, and a test of it.
_SETTINGS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "alpha_pattern": ("a mapping of patterns to numbers", _is_pattern),
    "bias": (" or ".join(_BIAS), lambda value: value in _BIAS),
    "ensure_weight_tying": ("true or false", _is_true_or_false),
    "exclude_modules": ("names, or a regular expression", _are_names),
    "fan_in_fan_out": ("true or false", _is_true_or_false),
    "init_lora_weights": (f"true, false, {', '.join(_INITS)}, or pissa_niter_N", _is_init),
    "layers_pattern": ("a name, or names", _are_names),
    "layers_to_transform": ("numbers of layers", _are_numbers),
    "rank_pattern": ("a mapping of patterns to ranks", _is_pattern),
    "trainable_token_indices": ("numbers of tokens", lambda value: not any(token_indices("", value))),
    "use_rslora": ("true or false", _is_true_or_false),
}


def lora_options(m: Method) -> Iterator[SpecError]:
    """Yield errors for settings that peft's LoRA or memplan does not have, and for those that contradict others."""
    for name, value in m.options.items():
        field = f"method.options.{name}"
        if name == "use_dora":
            yield refused(field, "use method.kind dora or qdora")
        elif name not in _SETTINGS:
            near = nearest(name, tuple(_SETTINGS), 1)
            hint = f"did you mean {near[0]}?" if near else f"supported: {', '.join(_SETTINGS)}"
            yield refused(field, f"is not supported yet; {hint}")
        elif value is not None and not _SETTINGS[name][1](value):
            yield refused(field, f"must be {_SETTINGS[name][0]}, not {value!r:.40}")
    o = m.options
    field = "method.options.layers_to_transform"
    if o.get("layers_to_transform") is not None and isinstance(m.targets, str) and m.targets != "default":
        yield refused(field, f"peft has it for names of targets only, not with {m.targets!r:.40}")
    if o.get("layers_pattern") and o.get("layers_to_transform") is None:
        yield refused("method.options.layers_pattern", "needs layers_to_transform")
    if "dora" in m.kind and o.get("bias", "none") != "none":
        yield refused("method.options.bias", f"{o['bias']} is not supported yet with {m.kind}; supported: none")
    if m.quantization is not None and str(o.get("init_lora_weights", "")).startswith(("pissa", "loftq", "corda")):
        yield refused(
            "method.options.init_lora_weights", f"peft has {o['init_lora_weights']} over unquantised weights only"
        )
    for name in ("exclude_modules", "rank_pattern", "alpha_pattern"):
        value = o.get(name)
        patterns = cast(Mapping[str, int], value) if isinstance(value, Mapping) else ()
        for pattern in (value,) if isinstance(value, str) else patterns:
            yield from _pattern(f"method.options.{name}", pattern)


def tied_copies(model: ModelSpec, m: Method, targets: tuple[str, ...], saved: tuple[str, ...]) -> tuple[str, ...]:
    """Return the embeddings and the head tied to them if `ensure_weight_tying` saves one copy of both; else nothing.

    Source: peft 0.21 tuners/tuners_utils.py BaseTuner._check_tied_modules. Raises SpecError if it ties adapters.
    """
    tied = tied_modules(model) if m.options.get("ensure_weight_tying") else frozenset[str]()
    if tied and _TIED.intersection(saved):
        return tuple(sorted(tied))
    if tied and _TIED.intersection(targets):
        field = "method.options.ensure_weight_tying"
        raise refused(field, f"is not supported yet with adapters on {' or '.join(sorted(tied))}; leave it out")
    return ()


def init_note(m: Method) -> list[str]:
    """Return a note on an initialisation if what it allocates, or its pass over data, is not counted."""
    init = str(m.options.get("init_lora_weights", ""))
    if init in _ON_DATA:
        return [f"{init} first runs the model on data and holds {_ON_DATA[init]}: that pass is not counted"]
    if not init.startswith("loftq") and (init != "olora" or m.quantization is None):
        return []
    return [f"{init} decomposes each adapted matrix in fp32 while loading: its temporaries are not counted"]


def decomposition(m: Method) -> str:
    """Return the initialisation that decomposes the loaded matrices, if what it allocates is counted; else ""."""
    init = str(m.options.get("init_lora_weights", "")).rstrip("0123456789").removesuffix("_")
    return init if init in ("pissa", "pissa_niter", "olora", "corda") and m.quantization is None else ""


def _pattern(field: str, pattern: str) -> Iterator[SpecError]:
    try:
        re.compile(pattern)
    except re.error as error:
        yield refused(field, f"{pattern!r:.60} is not a regular expression: {error}")


def selection_of(
    model: ModelSpec, m: Method, names_of: Callable[[], tuple[tuple[str, ...], list[str]]]
) -> tuple[tuple[str, ...], Selection, list[str]]:
    """Return the targets, the modules that the method chooses by their paths, and notes.

    `names_of` returns the targets' names in this model and notes. Raises SpecError if nothing is chosen.
    """
    o, notes, targets = m.options, list[str](), (m.pattern,)
    if m.pattern:
        for error in _pattern("method.targets", m.pattern):
            raise error
    elif any(part.isdecimal() for target in m.targets for part in target.split(".")):
        targets = tuple(m.targets)
    else:
        targets, notes = names_of()
    experts = {name for group in parameter_targets(model) for name in group}
    experts |= {"gate_proj", "up_proj", "down_proj"} if model.family.training.fuses_experts else set()
    if model.has_tower or (experts and (m.pattern or m.targets == "all-linear" or experts.intersection(targets))):
        which = "" if model.has_tower else " and experts"
        raise refused(
            "method.targets", f"modules of {model.model_type}{which} chosen by their paths are not supported yet"
        )
    layers, lists, excluded = o.get("layers_to_transform"), o.get("layers_pattern"), o.get("exclude_modules")
    selection = Selection(
        () if m.pattern else targets,
        m.pattern,
        excluded if isinstance(excluded, str) else tuple(excluded or ()),
        None
        if layers in (None, ())
        else (layers,)
        if isinstance(layers, int)
        else tuple(cast(tuple[int, ...], layers)),
        (lists,) if isinstance(lists, str) and lists else tuple(lists or ()),
        tuple(cast(Mapping[str, int], o.get("rank_pattern") or {}).items()),
    )
    paths = tuple(module_paths(default_stack(model), model.axes()))
    taken = [path for path in paths if selection.takes(path)]
    if not taken:
        raise _none_taken(model, m, selection, paths)
    unused = [p for p, _ in selection.ranks if not any(re.match(rf"(.*\.)?({p})$", path) for path in taken)]
    if unused:
        notes.append(f"no adapted module matches {', '.join(unused)} of rank_pattern, and peft ignores them")
    return targets, selection, notes


def _none_taken(model: ModelSpec, m: Method, selection: Selection, paths: tuple[str, ...]) -> MemplanError:
    """Return the error that the targets leave no module to adapt."""
    example = paths[len(paths) // 2]
    if m.pattern:
        hint = f"matches no layer, such as {example}; to name modules, write a list"
        return refused("method.targets", f"the regular expression {m.pattern!r:.60} {hint}")
    if not any(selection._replace(layers=None, excluded=()).takes(path) for path in paths):
        return UnknownNameError("method.targets", selection.names[0], paths)
    if selection.layers is not None:
        hint = f"leaves no module to adapt; layers are numbered 0 to {model.num_hidden_layers - 1}, as in {example}"
        return refused("method.options.layers_to_transform", hint)
    return refused("method.options.exclude_modules", "leaves no module to adapt")
