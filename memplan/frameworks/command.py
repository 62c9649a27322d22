"""The command-line options of memplan that turn one run into another."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, cast

from memplan.catalogue.methods.methods import ADAPTERS
from memplan.core.errors import refused
from memplan.core.records import NamedTuple
from memplan.frameworks.change_table import Lines, differing, value_of
from memplan.models.peft_methods import has_rank
from memplan.spec.options import OPTIONS as GROUPS
from memplan.spec.options import flag
from memplan.spec.parallelism import Offload, Parallelism
from memplan.spec.run import RunSpec
from memplan.spec.training import Method, Optimizer, Precision, precision_of

_LEFT_TO_A_FILE = ("quant_storage", "gpus_per_node", "save", "merge")
_ROLLOUT = (
    *("batch.new_tokens", "batch.generations", "batch.scored", "rollout"),
    *("serving.sleep", "serving.memory_utilization", "serving.max_model_len"),
)
# Field of a training run -> the option that sets it. `_has_option` lists the exceptions.
OPTIONS = {
    option.field: flag(name)
    for heading, group in GROUPS.items()
    for name, option in group.items()
    if (heading not in ("Generation", "Serving engines") or option.field in _ROLLOUT) and name not in _LEFT_TO_A_FILE
} | {"loop.trainer": flag("trainer")}  # alone, it sets this field
_ADAPTER_FIELDS = ("rank", "alpha", "targets", "dropout", "modules_to_save", "adapter_dtype", "options")
_CHECKPOINTING = {"full": "--gradient-checkpointing", "none": "--no-gradient-checkpointing"}


class ChangeOptions(NamedTuple):
    """Options that make a change.

    options                the options, quoted for a shell
    fields_without_option  fields that no option can set to their value
    """

    options: str
    fields_without_option: tuple[str, ...]


def options(asked: RunSpec, changed: RunSpec) -> str:
    """Return the options that turn a file with the run `asked` into `changed`.

    Raises SpecError if no option can set a field that differs.
    """
    command = _command(asked, changed)
    if command.fields_without_option:
        field = command.fields_without_option[0]
        raise refused(field, "no option sets this value; write it in a file for --spec")
    return command.options


def option_lines(asked: RunSpec, changed: RunSpec) -> Lines:
    """Return the options as a line to paste; the note has those to leave out, and fields that no option sets."""
    command = _command(asked, changed)
    unsaid = command.fields_without_option
    unset = [field for field in unsaid if field in OPTIONS and value_of(changed, field) is None]
    others = [field for field in unsaid if field not in unset]
    notes = [f"without {', '.join(OPTIONS[field] for field in unset)}"] if unset else []
    notes += [f"set in a file for --spec: {', '.join(others)}"] if others else []
    return Lines("memplan", "memplan options", (command.options,) if command.options else (), "; ".join(notes))


def _command(asked: RunSpec, changed: RunSpec) -> ChangeOptions:
    arguments: list[str] = []
    unsaid: list[str] = []
    for field, field_arguments in _arguments_by_field(asked, changed):
        if field_arguments is None:
            unsaid.append(field)
        else:
            arguments += field_arguments
    return ChangeOptions(shlex.join(arguments), tuple(unsaid))


def _arguments_by_field(asked: RunSpec, changed: RunSpec) -> Iterator[tuple[str, list[str] | None]]:
    """Yield each field that differs with the arguments that set it; None if no option does."""
    if asked.model != changed.model:
        yield "model", [changed.model] if isinstance(changed.model, str) else None
    if asked.method.kind != changed.method.kind:
        yield "method.kind", ["--method", changed.method.kind]
    if asked.optimizer.name != changed.optimizer.name:
        yield "optimizer.name", _arguments("optimizer.name", changed.optimizer.name)
    if asked.precision != changed.precision:
        yield "precision", _precision(changed.precision)
    intermediate = _after_first_options(asked, changed)
    for field in differing(intermediate, changed):
        if field in OPTIONS and _has_option(changed, field):
            yield field, _arguments(field, value_of(changed, field))
        else:
            yield field, None
    yield from _parallel_degrees(asked.parallelism, changed.parallelism)
    if asked.parallelism.offload != changed.parallelism.offload:
        yield "parallelism.offload", _offload(asked.parallelism.offload, changed.parallelism.offload)


def _after_first_options(asked: RunSpec, changed: RunSpec) -> RunSpec:
    """The run after the options for model, method, optimizer, precision and parallelism.

    A new method or optimizer drops the settings of the old one.
    """
    old, new = asked.method, changed.method
    if old.kind != new.kind:
        kept = _ADAPTER_FIELDS if new.kind in ADAPTERS else ()
        fields = {"kind": new.kind, **{name: getattr(old, name) for name in kept}}
        old = Method.model_validate(fields | ({"quantization": old.quantization} if new.kind.startswith("q") else {}))
    optimizer = asked.optimizer
    if optimizer.name != changed.optimizer.name:
        if optimizer.name is not None:
            optimizer = Optimizer(in_backward=optimizer.in_backward)
        optimizer = optimizer.model_copy(update={"name": changed.optimizer.name})
    others = {"model": changed.model, "precision": changed.precision, "parallelism": _parallelism(asked, changed)}
    return asked.model_copy(update={"method": old, "optimizer": optimizer, **others})


def _parallelism(asked: RunSpec, changed: RunSpec) -> Parallelism:
    """The parallelism of `asked` with the degrees, strategy and offload of `changed`."""
    fields = (*_DEGREES, "offload")
    return asked.parallelism.model_copy(update={name: getattr(changed.parallelism, name) for name in fields})


def _has_option(run: RunSpec, field: str) -> bool:
    """Whether an option can set the field to its value in such a run."""
    kind, quantization = run.method.kind, run.method.quantization
    match field:
        case "method.trainable_layers":
            return kind == "freeze"
        case "method.rank":
            return kind in ADAPTERS and has_rank(kind)
        case "method.options":
            return kind in ADAPTERS
        case "method.targets" | "method.dropout" | "method.modules_to_save":
            return kind in ADAPTERS
        case "method.quantization.double_quant":
            return quantization is not None and (quantization.format != "int8" or not quantization.double_quant)
        case "loop.hold_outputs":
            return run.loop.hold_outputs != "step"
        case _:
            return True


def _arguments(field: str, value: Any) -> list[str] | None:
    option = OPTIONS[field]
    if value is None:
        return None
    if field == "kernels.checkpointing" and value in _CHECKPOINTING:
        return [_CHECKPOINTING[value]]
    if field == "method.quantization.kbit_preparation":
        return [option, str(value).lower()]
    if isinstance(value, bool):
        return [option if value else option.replace("--", "--no-", 1)]
    if field == "batch.image_size" and isinstance(value, tuple):
        return [option, "x".join(map(str, cast(tuple[int, ...], value)))]
    if isinstance(value, Mapping):
        settings = cast(Mapping[str, Any], value).items()
        return [option, ",".join(f"{name}={v if isinstance(v, str) else json.dumps(v)}" for name, v in settings)]
    if isinstance(value, tuple):
        return [option, ",".join(cast(tuple[str, ...], value))]
    return [option, str(value)]


def _precision(wanted: Precision) -> list[str] | None:
    """The preset and dtype that give the precision, if any do."""
    for preset, dtype in product(("pure", "amp", "autocast", "mixed"), ("bf16", "fp16", "fp32")):
        if (preset, dtype) != ("mixed", "fp32") and Precision.model_validate(precision_of(preset, dtype)) == wanted:
            return ["--precision", preset, *(["--dtype", dtype] if dtype != "bf16" else [])]
    return None


_DEGREES = ("world", "dp", "tp", "pp", "cp", "strategy")
_STRATEGIES = {
    "zero1": ["--zero", "1"],
    "zero2": ["--zero", "2"],
    "zero3": ["--zero", "3"],
    "fsdp": ["--fsdp", "full_shard"],
    "fsdp2": ["--fsdp", "fsdp2"],
    "ddp": ["--zero", "0"],
}


def _parallel_degrees(old: Parallelism, new: Parallelism) -> Iterator[tuple[str, list[str] | None]]:
    """Yield the arguments for degrees and strategy.

    The command computes dp from the other degrees, and then defaults to ddp.
    """
    if all(getattr(old, name) == getattr(new, name) for name in _DEGREES):
        return
    if new.dp * new.tp * new.pp * new.cp != new.world:
        yield "parallelism.dp", None
        return
    changed = [name for name in ("tp", "pp", "cp") if getattr(old, name) != getattr(new, name)]
    if (old.world, old.dp) != (new.world, new.dp):
        changed.insert(0, "world")
    for name in changed:
        yield f"parallelism.{name}", _arguments(f"parallelism.{name}", getattr(new, name))
    if new.strategy != ("ddp" if changed and new.dp > 1 else old.strategy):
        no_strategy = ["--zero", "0"] if new.strategy == "none" and new.dp == 1 else None
        yield "parallelism.strategy", _STRATEGIES.get(new.strategy, no_strategy)


def _offload(old: Offload, new: Offload) -> list[str]:
    """The option adds to what a file offloads; `none` overrides the file."""
    wanted = [name for name in Offload.model_fields if getattr(new, name)]
    is_less = any(getattr(old, name) and name not in wanted for name in Offload.model_fields)
    return ["--offload", ",".join(["none", *wanted] if is_less else wanted)]
