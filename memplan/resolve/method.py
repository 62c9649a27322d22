"""What a run asks of the methods: the layers that adapters take, what is quantised, what is frozen.

What a model, or peft around it, does not let them do is refused here.
"""

from __future__ import annotations

from collections.abc import Iterable

from memplan.catalogue.methods.litgpt_lora import ROLES, SWITCHES
from memplan.catalogue.methods.methods import PARTS, Recipe, inside
from memplan.core.errors import SpecError, UnknownNameError
from memplan.models.model import ModelSpec
from memplan.program.stack_facts import adaptable, gates, linears, modules, parameter_targets, several
from memplan.spec.formats import Quantization
from memplan.spec.training import Kernels, Method, Precision


def frozen_parts(model: ModelSpec, method: Method) -> tuple[str, ...]:
    """The parts of the model that neither train nor are adapted, checked."""
    for part in method.frozen:
        if part not in PARTS:
            raise UnknownNameError("method.frozen", part, tuple(PARTS))
    if not method.frozen:
        return ()
    from memplan.models.configs.vision import is_vision

    if not is_vision(model.model_type):
        raise SpecError(f"method.frozen: {model.model_type} has no parts beside the language model", "method.frozen")
    if set(method.frozen) == set(PARTS):
        raise SpecError("method.frozen: nothing is left to train", "method.frozen")
    return tuple(part for part in PARTS if part in method.frozen)


def recipe_of(
    model: ModelSpec, method: Method, precision: Precision, code: str, stored: bool
) -> tuple[Recipe, list[str]]:
    """What the run asks of the methods, and notes. `stored`: the checkpoint itself is quantised."""
    compute, autocast = str(precision.compute), precision.autocast
    if method.kind in ("full", "freeze"):
        if method.quantization is not None:
            raise SpecError(
                f"method.quantization: {method.kind} does not train quantised weights; qlora and qdora adapt them",
                "method.quantization",
            )
        return Recipe(method.kind, precision.weights, compute, autocast), []
    q = method.quantization
    if method.kind in ("lora", "dora") and q is not None and not stored:
        raise SpecError(f"method.quantization: use q{method.kind} for quantised weights", "method.quantization")
    targets, notes = _targets(model, method) if code == "transformers" else (_switches(method), [])
    saved = _modules(model, "method.modules_to_save", method.modules_to_save)
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
    )
    if q is None:
        return recipe, notes
    if q.format == "int8":
        notes.append("LLM.int8 layers hold their inputs until the step ends, with or without checkpointing")
    recipe, more = quantised(model, recipe, q, stored)
    return recipe, [*more, *notes]


def quantised(model: ModelSpec, recipe: Recipe, q: Quantization, stored: bool) -> tuple[Recipe, list[str]]:
    """The recipe of a model whose matrices are quantised, and notes. `stored`: the checkpoint itself is."""
    preparation = {True: "fp32", False: "", "trl": "trl", None: ""}[q.kbit_preparation]
    clamped, notes = _unquantised(model, tuple(q.skip or ()))
    return recipe._replace(
        quantization=q.format,
        double_quant=q.double_quant and q.format in ("nf4", "fp4"),
        block_size=q.block_size,
        skip=(
            *(n for n in q.skip or () if n == "lm_head"),
            *_modules(model, "method.quantization.skip", (n for n in q.skip or () if n != "lm_head")),
            *clamped,
            *model.unquantised,
        ),
        preparation=preparation,
        packed=stored or q.format not in ("nf4", "fp4", "int8"),
    ), notes


# A role that a family may have fused into one matrix, and what the fused ones are called.
_FUSED = {
    **dict.fromkeys(
        ("q_proj", "k_proj", "v_proj"),
        ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "W_pack"),
    ),
    **dict.fromkeys(("gate_proj", "up_proj"), ("gate_up_proj", "dense_h_to_4h", "c_fc", "fc1", "w1")),
    "o_proj": ("dense", "out_proj", "c_proj", "wo"),
    "down_proj": ("dense_4h_to_h", "c_proj", "fc2", "w2"),
}


# Models of which peft takes no adapter around a mixer's convolution and output projection, because fused kernels read
# their weights. Source: peft 0.21 tuners/tuners_utils.py _check_lora_target_modules_mamba.
_READ_BY_KERNELS = ("out_proj", "conv1d")


_WITH_KERNELS = frozenset(("falcon_mamba", "mamba", "mamba2", "nemotron_h"))


def _refuse_read_by_kernels(model: ModelSpec, targets: Iterable[str], layers: Iterable[str]) -> None:
    if model.model_type not in _WITH_KERNELS:
        return
    names = dict.fromkeys(path.rpartition(".")[2] for path in layers if "embed" not in path and path != "lm_head")
    found = next((name for name in targets if name in _READ_BY_KERNELS), None)
    if found is not None or tuple(targets) == ("all-linear",):
        able = ", ".join(name for name in names if name not in _READ_BY_KERNELS)
        raise SpecError(
            f"method.targets: peft takes no adapters around {found or 'out_proj'} in {model.model_type} models; "
            f"name others: {able}",
            "method.targets",
        )


# Families that peft's all-linear does not run with.
# Source: peft 0.21 tuners/lora/layer.py Linear.forward;
# transformers 5.24 models/llama4/modeling_llama4.py Llama4Router.
_ROUTER = (
    "peft's all-linear takes Llama 4's router too, and fails at its first step; name q_proj and the like. All linear "
    "layers but the router are counted"
)


_NO_ALL = {"llama4": _ROUTER, "llama4_text": _ROUTER}


def _targets(model: ModelSpec, method: Method) -> tuple[tuple[str, ...], list[str]]:
    """The names of the layers the adapters take, checked; a fused role is the whole fused matrix."""
    layers, groups = adaptable(model), parameter_targets(model)
    stood_for = {name for group in groups for name in group}
    layers = {path: dims for path, dims in layers.items() if path.rpartition(".")[2] not in stood_for}
    passed_over = [path for path in adaptable(model) if path not in layers]
    names = {path.rpartition(".")[2] for path in layers}
    more = several(model)
    for name in more if method.targets == "all-linear" else more.intersection(map(_end, method.targets)):
        raise SpecError(
            f"method.targets: the {name} of {model.model_type} returns more than its product, and peft's layer around "
            "it fails; name other targets",
            "method.targets",
        )
    asked = (method.targets,) if isinstance(method.targets, str) else tuple(method.targets)
    _refuse_read_by_kernels(model, tuple(target.rpartition(".")[2] for target in asked), layers)
    if method.targets == "all-linear":
        inner = {
            path: dims
            for path, dims in linears(model).items()
            if path in layers
            and model.vocab_size not in dims
            and min(dims) > 1
            and not inside(path, method.modules_to_save)
        }
        if not inner:
            raise SpecError(f"method: {model.model_type} has no linear layers to adapt", "method")
        few = gates(model)  # of a few rows each, adapted whatever the rank
        for path, dims in sorted(inner.items(), key=lambda item: min(item[1])):
            if path not in few and method.rank > min(dims):
                _refuse_rank(method.rank, path, dims)
        if groups:
            _check_parameters(method, "all-linear")
        notes = [f"method.targets: {_NO_ALL[model.model_type]}"] if model.model_type in _NO_ALL else []
        return ("all-linear",), [*notes, *_passed_over(passed_over)]
    if not method.targets:
        raise SpecError("method.targets: no module named", "method.targets")
    if "all-linear" in method.targets:
        raise SpecError("method.targets: all-linear stands alone, not in a list", "method.targets")
    found: list[str] = []
    notes: list[str] = []
    for target in method.targets:
        if _end(target) in stood_for:
            _check_parameters(method, target)
            found.append(_end(target))
            continue
        name = _last(target, "method.targets", layers)
        if name not in names:
            fused = next((f for f in _FUSED.get(name, ()) if f in names), None)
            if fused is None:
                raise UnknownNameError("method.targets", target, (*sorted(names | stood_for), "all-linear"))
            notes.append(f"{name} is part of {fused} in this family: the adapter is on all of {fused}")
            name = fused
        for path, dims in layers.items():
            if path.rpartition(".")[2] == name and method.rank > min(dims) > 1:
                _refuse_rank(method.rank, path, dims)
        found.append(name)
    for group in groups:
        lacking = [name for name in group if name not in found]
        if lacking and len(lacking) < len(group):
            raise SpecError(
                f"method.targets: {' and '.join(group)} are one parameter in this family, which peft adapts as a "
                f"whole; name {' and '.join(lacking)} too",
                "method.targets",
            )
    return tuple(dict.fromkeys(found)), notes + (_passed_over(passed_over) if stood_for.intersection(found) else [])


def _end(name: str) -> str:
    return name.rpartition(".")[2]


def _check_parameters(method: Method, target: str) -> None:
    """Raise SpecError for what peft does not do where it adapts parameters that are no linear layers.

    Source: peft 0.21 tuners/lora/layer.py ParamWrapper.
    """
    which = f"{target} is on experts or a router here, which are parameters"
    if "dora" in method.kind:
        raise SpecError(f"method.kind: {which}, and peft has no DoRA for those; name other targets", "method.kind")
    if method.dropout:
        raise SpecError(
            f"method.dropout: {which}, and peft drops nothing there; say 0, or name other targets", "method.dropout"
        )


def _passed_over(paths: list[str]) -> list[str]:
    """A note where linear layers are called as those are that experts stand for."""
    if not paths:
        return []
    return [f"peft takes these names for those of experts, and adapts no {', '.join(sorted(paths))}"]


def check_time_steps(model: ModelSpec, method: Method) -> None:
    """Raise SpecError where the model multiplies by a layer's weight itself, and that is quantised: packed codes.

    Source: transformers 5.24 models/mamba/modeling_mamba.py MambaMixer.forward; Falcon Mamba and Jamba call the layer.
    """
    q, field = method.quantization, "method.quantization.skip"
    if model.model_type == "mamba" and q is not None and "dt_proj" not in (q.skip or ()):
        raise SpecError(f"{field}: mamba models multiply by dt_proj's weight itself; name lm_head and dt_proj", field)


# Linear layers whose weights a family's own forward changes or reads, so that it cannot run with them quantised.
# Source: transformers 5.24 models/gemma3n/modeling_gemma3n.py Gemma3nTextAltUp.predict, correct;
# modeling_kimi_linear.py of moonshotai/Kimi-K3, _apply_attn_res.
_CHOOSING = ("self_attention_res_proj", "mlp_res_proj", "output_attn_res_proj")
_ITS_OWN = {
    "gemma3n_text": ("clamps", ("prediction_coefs", "correction_coefs")),
    **dict.fromkeys(("kimi_k3", "kimi_linear"), ("multiplies by", _CHOOSING)),
}


def _unquantised(model: ModelSpec, skip: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
    """Layers whose weights a family uses by itself, of those that `skip` does not name; and a note of them."""
    does, names = _ITS_OWN.get(model.model_type, ("", ()))
    there = () if names is _CHOOSING and not model.config.get("attn_res_block_size") else names
    missing = tuple(name for name in there if name not in skip)
    if not missing:
        return (), []
    note = f"{', '.join(missing)} cannot be quantised, as the model {does} them: name them in method.quantization.skip"
    return missing, [f"{note}. They are counted as they are"]


def check_head(model: ModelSpec, method: Method, kernels: Kernels) -> None:
    """Raise SpecError where the output projection, or another layer, is quantised and cannot be."""
    q, field = method.quantization, "method.quantization.skip"
    if q is None:
        return
    for name in several(model).difference(q.skip or ()):
        raise SpecError(
            f"{field}: the {name} of {model.model_type} returns more than its product, and bitsandbytes' layer in its "
            "place does not; name it",
            field,
        )
    if "lm_head" in (q.skip or ()):
        return
    if model.tie_word_embeddings:
        raise SpecError(f"{field}: the embeddings are the lm_head's weight, and are not quantised; name it", field)
    if kernels.loss == "fused":
        raise SpecError(f"{field}: a fused loss multiplies by the lm_head's weight as it is; name lm_head", field)


def _switches(method: Method) -> tuple[str, ...]:
    """The layers that LitGPT's LoRA adapts, as the switches of its command."""
    if method.targets == "all-linear":
        return tuple(switch for switch in SWITCHES if switch != "head")
    found = [ROLES.get(name.rpartition(".")[2], name) for name in method.targets]
    for name, switch in zip(method.targets, found, strict=True):
        if switch not in SWITCHES:
            raise UnknownNameError("method.targets", name, (*ROLES, *SWITCHES, "all-linear"))
    return tuple(switch for switch in SWITCHES if switch in found)


def _refuse_rank(rank: int, path: str, dims: tuple[int, int]) -> None:
    raise SpecError(
        f"method.rank: {rank} is larger than the smaller side of {path} ({dims[0]} x {dims[1]})", "method.rank"
    )


def _modules(model: ModelSpec, field: str, named: Iterable[str]) -> tuple[str, ...]:
    """The names of modules that a field lists, checked."""
    listed = tuple(named)
    if not listed:
        return ()
    names, found = modules(model), list[str]()
    for name in listed:
        last = _last(name, field, adaptable(model))
        if last not in names:
            raise UnknownNameError(field, name, sorted(names))
        found.append(last)
    return tuple(found)


def _last(name: str, field: str, paths: Iterable[str]) -> str:
    """The last part of a dotted name, where that means the same modules."""
    last = name.rpartition(".")[2]
    alike = [path for path in paths if path.rpartition(".")[2] == last]
    if "." in name and not all(f".{path}".endswith(f".{name}") for path in alike):
        raise SpecError(f"{field}: {name!r} is not every {last}, and some of them alone are not supported yet", field)
    return last
