"""Turns typed options, on top of the fields of a file if there is one, into the fields of a run."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from memplan.core.errors import FactsMissingError, MemplanError, SpecError, UnknownNameError
from memplan.spec.option_values import listed
from memplan.spec.options import FIELDS, OPTIONS, STRATEGIES

if TYPE_CHECKING:
    from memplan.frameworks.reading.run_file import RunFile
    from memplan.spec.training import Method


def spec_of(
    given: Mapping[str, Any], spec: Mapping[str, Any] | None = None, *, keeps_strategy: bool = False
) -> dict[str, Any]:
    """Return the fields of a run: those of `spec`, overridden by the options `given`.

    keeps_strategy  whether the strategy of `spec` holds for any number of GPUs, as in a framework's file
    """
    out: dict[str, Any] = {str(k): v for k, v in (spec or {}).items()}
    if type(out.get("gpu")) is int:  # YAML's `gpu: 3090`
        out["gpu"] = str(out["gpu"])
    _drop_stale(out, given)
    if given.get("precision") in _DTYPES and given.get("dtype", given["precision"]) != given["precision"]:
        raise SpecError(f"precision: --precision {given['precision']} and --dtype {given['dtype']} differ", "precision")
    word = out.get("precision")
    if "dtype" in given and "precision" not in given and isinstance(word, str):
        given = {**given, "precision": word}  # the file's precision, in the typed dtype
    for group in OPTIONS.values():
        for name, option in group.items():
            if name in given and not option.combined:
                _put(out, option.field, option.parse(given[name]) if option.parse else given[name])
    for path, value in _combined(given):
        _put(out, path, value)
    _spread(out, given, keeps_strategy)
    return out


def with_framework_config(spec: Mapping[str, Any], config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the fields of `spec`, overridden by those of a framework's config, section by section."""
    out = dict(spec)
    for part, fields in config.items():
        old: object = out.get(part)
        word = {_MAIN[part]: old} if isinstance(old, str) and part in _MAIN else {}
        kept = dict(cast(Mapping[str, Any], old)) if isinstance(old, Mapping) else word
        out[part] = {**kept, **fields}
    return out


_DTYPES = ("bf16", "fp16", "fp32")
_MAIN = {"method": "kind", "optimizer": "name"}  # the field that a section given as one word sets


# Fields that only some methods have.
_ADAPTERS = ("rank", "alpha", "targets", "dropout", "modules_to_save", "adapter_dtype", "options")
_METHOD_FIELDS: dict[str, tuple[str, ...]] = {
    "full": ("frozen",),
    "freeze": ("frozen", "trainable_layers"),
    **dict.fromkeys(("lora", "dora"), ("frozen", *_ADAPTERS)),
    **dict.fromkeys(("qlora", "qdora"), ("frozen", *_ADAPTERS, "quantization")),
}


def _drop_stale(spec: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Drop the file's fields that only apply to its own method, optimizer or dtype, if an option names another one."""

    def drop(part: str, fields: Iterable[str]) -> None:
        spec[part] = {name: value for name, value in spec[part].items() if name not in fields}

    def overridden(name: str, part: str, field: str, default: str) -> str | None:
        """Return the file's value, if the option differs from it."""
        section: object = spec.get(part)
        old = cast(Mapping[str, Any], section).get(field, default) if isinstance(section, Mapping) else None
        return old if name in given and old is not None and old != given[name] else None

    if overridden("method", "method", "kind", "full") and given["method"] in _METHOD_FIELDS:
        every_field = {field for fields in _METHOD_FIELDS.values() for field in fields}
        drop("method", every_field - set(_METHOD_FIELDS[given["method"]]))
    if overridden("optimizer", "optimizer", "name", "adamw_torch_fused"):
        drop("optimizer", ("foreach", "momentum", "state_dtype"))
    weights = overridden("dtype", "precision", "weights", "bf16")
    if weights is not None:
        drop("precision", [field for field in ("compute", "grads") if spec["precision"].get(field) == weights])


def override(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shared options, overridden by one run's own.

    If the run has another method, shared options that only apply to the shared method are dropped.
    """
    own_paths = {FIELDS[name] for name in own if name in FIELDS}
    dropped = {name for name in shared if FIELDS.get(name) in own_paths}
    if "method" in shared and own.get("method", shared["method"]) != shared["method"]:
        kept = _METHOD_FIELDS.get(own["method"], ())
        for name, path in FIELDS.items():
            part, _, field = path.partition(".")
            if part == "method" and field != "kind" and field.partition(".")[0] not in kept:
                dropped.add(name)
    if own.get("precision") in _DTYPES:
        dropped.add("dtype")
    if "dtype" in own and shared.get("precision") in _DTYPES:
        dropped.add("precision")
    return {**{name: value for name, value in shared.items() if name not in dropped}, **own}


def _put(spec: dict[str, Any], path: str, value: Any) -> None:
    """Set one field by path, creating the sections around it; a section given as one word is expanded."""
    part, _, rest = path.partition(".")
    if not rest:
        spec[part] = value
        return
    old: object = spec.get(part)
    if isinstance(old, str):
        old = _expanded(part, old)
    inner: dict[str, Any] = dict(cast(Mapping[str, Any], old)) if isinstance(old, Mapping) else {}
    _put(inner, rest, value)
    spec[part] = inner


def _expanded(part: str, word: str) -> dict[str, Any]:
    from memplan.spec.training import precision_of

    return precision_of(word) if part == "precision" else {_MAIN.get(part, "kind"): word}


def _combined(given: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Yield the fields of options that set several fields, or one field together."""
    method = given.get("method")
    if method in ("generate", "forward"):
        yield "task", method
    elif method is not None:
        yield "method.kind", method
    if "checkpointing" in given or "gradient_checkpointing" in given:
        yield "kernels.checkpointing", _checkpointing(given.get("checkpointing"), given.get("gradient_checkpointing"))
    trainer = given.get("trainer")
    if trainer is not None:
        yield "loop.trainer", trainer != "off"
    if trainer not in (None, "on", "off"):
        yield "trainer", trainer
    if "precision" in given:
        yield "precision", _precision(given["precision"], given.get("dtype"))
    elif "dtype" in given:
        yield "precision.weights", given["dtype"]
    for word in listed(given.get("offload", "")):
        if word == "none":  # overrides the file
            yield "parallelism.offload", {}
            continue
        if word not in ("parameters", "optimizer", "activations"):
            raise UnknownNameError("parallelism.offload", word, ("parameters", "optimizer", "activations", "none"))
        yield f"parallelism.offload.{word}", True


def _checkpointing(word: str | None, on: bool | None) -> str:
    """Return the kind of checkpointing; `--checkpointing` and `--[no-]gradient-checkpointing` must agree."""
    if word is None:
        return "full" if on else "none"
    if on is not None and on == (word == "none"):
        flag = "--gradient-checkpointing" if on else "--no-gradient-checkpointing"
        raise SpecError(
            f"kernels.checkpointing: {flag} and --checkpointing {word} exclude each other", "kernels.checkpointing"
        )
    return word


def _precision(word: str, dtype: str | None) -> dict[str, Any]:
    """Return the fields of a word for the precision, or of a dtype, which means `pure`."""
    from memplan.spec.training import precision_of

    if word in _DTYPES:
        word, dtype = "pure", word
    return precision_of(word, dtype or "bf16")


_FSDP = {
    "full_shard": "fsdp",
    "fsdp": "fsdp",
    "fsdp1": "fsdp",
    "fsdp2": "fsdp2",
    **dict.fromkeys(("no_shard", "shard_grad_op", "hybrid_shard", "hybrid_shard_zero2"), "fsdp"),
}
_KEEPS_GATHERED = ("shard_grad_op", "hybrid_shard_zero2")
_DEFAULT_SHARD_GROUP = 8  # GPUs of a node
_MAX_GPUS = 2**40


def _spread(spec: dict[str, Any], given: Mapping[str, Any], keeps_strategy: bool) -> None:
    """Set how `--gpus` divide the work: by --tp, --pp and --cp, and the rest by ZeRO or FSDP or as plain replicas."""
    if not {"gpus", "tp", "pp", "cp", "zero", "fsdp"} & set(given):
        return
    old: object = spec.get("parallelism")
    parallelism: dict[str, Any] = dict(cast(Mapping[str, Any], old)) if isinstance(old, Mapping) else {}
    degrees = [parallelism.get(name, 1) for name in ("tp", "pp", "cp")]
    world = parallelism.get("world", 1)
    if parallelism.get("device_map") is not None and degrees == [1, 1, 1]:
        return  # a device_map already spans all GPUs
    if not all(isinstance(n, int) and 1 <= n <= _MAX_GPUS for n in (world, *degrees)):
        return  # validation of the run names the wrong one
    model_ranks = degrees[0] * degrees[1] * degrees[2]
    if "gpus" not in given and world == 1:
        world = model_ranks
    if world % model_ranks:
        text = f"parallelism.world: {world} GPUs do not divide into groups of {model_ranks}"
        raise SpecError(text, "parallelism.world")
    if parallelism.keys() <= {"world"} and spec.get("task", "train") != "train":
        return  # `RunSpec.expanded` spreads a model that does not train
    replicas = world // model_ranks
    spec["parallelism"] = {**parallelism, "world": world, "dp": replicas}
    strategy = strategy_of(given, replicas)
    set_by_file = (keeps_strategy or "deepspeed" in given) and "strategy" in parallelism
    set_by_file = set_by_file and not {*STRATEGIES} & set(given)
    if strategy is not None and not set_by_file:
        spec["parallelism"]["strategy"] = strategy
    word = given.get("fsdp")
    if word in _KEEPS_GATHERED:
        spec["parallelism"]["reshard_after_forward"] = False
    if word == "no_shard" and replicas > 1:
        spec["parallelism"]["shard_group"] = 1
    if str(word).startswith("hybrid") and "shard_group" not in spec["parallelism"] and replicas > 1:
        spec["parallelism"]["shard_group"] = min(_DEFAULT_SHARD_GROUP, replicas)


def unused_option_error(given: Iterable[str], method: Method) -> MemplanError | None:
    """Return an error about an option in `given` that has no effect with the run's method; None if all have."""
    from memplan.catalogue.methods.methods import ADAPTERS
    from memplan.resolve.refusals.settings import no_adapters, only_freeze

    if "trainable_layers" in given and method.kind != "freeze":
        return only_freeze(method.kind)
    for name in ("rank", "targets", "lora_dropout", "modules_to_save"):
        if name in given and method.kind not in ADAPTERS:
            return no_adapters(method.kind, FIELDS[name])
    q = method.quantization
    if "double_quant" in given and q is not None and q.format not in ("nf4", "fp4") and q.double_quant:
        field = "method.quantization.double_quant"
        return SpecError(f"{field}: {q.format} has no double quantisation; nf4 and fp4 do", field)
    return None


def strategy_of(given: Mapping[str, Any], replicas: int) -> str | None:
    """Return the strategy of the replicas: that of an option of `STRATEGIES`, else ddp; None for one without them."""
    named = [f"--{name.replace('_', '-')}" for name in STRATEGIES if given.get(name) not in (None, False)]
    if len(named) > 1:
        raise SpecError(f"parallelism.strategy: {' and '.join(named)} exclude each other", "parallelism.strategy")
    if given.get("use_distributed_optimizer"):
        return "megatron_dist_opt"
    if "zero" in given:
        zero = given["zero"]
        if zero not in (0, 1, 2, 3):
            raise SpecError(f"parallelism.strategy: ZeRO has stages 0 to 3, not {zero}", "parallelism.strategy")
        return f"zero{zero}" if zero else ("ddp" if replicas > 1 else "none")
    if "fsdp" in given:
        if given["fsdp"] not in _FSDP:
            raise UnknownNameError("parallelism.strategy", given["fsdp"], _FSDP)
        return _FSDP[given["fsdp"]]
    return "ddp" if replicas > 1 else None


@contextmanager
def errors_of(file: RunFile | None) -> Generator[None]:
    """Add to an error about a field where a run's file has its value from."""
    try:
        yield
    except MemplanError as error:
        if file is None or file.is_own:
            raise
        from memplan.spec.failures import line_of

        line = line_of(error)
        field = line.partition(":")[0]
        origins = {origin.field: origin.why for origin in file.origins}
        why = origins.get(field) or next((why for path, why in origins.items() if path.startswith(f"{field}.")), "")
        if field.startswith("parallelism.") and origins.get("parallelism.world", "").startswith("assumed"):
            why = "; ".join(filter(None, (why, origins["parallelism.world"])))
        if isinstance(error, FactsMissingError):
            again = f"--spec {file.name}" if "." in file.name else "-- COMMAND"
            line += f"; or name a card of its size: memplan CARD {again}"
        if why:
            error.args = (f"{line} ({why})",)
        raise
