"""The options of memplan's own command that change a run into another."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple, cast

from memplan.catalogue.methods.methods import ADAPTERS
from memplan.core.errors import SpecError
from memplan.frameworks.change_table import Lines, differing, value_of
from memplan.spec.parallelism import Offload, Parallelism
from memplan.spec.run import RunSpec
from memplan.spec.training import Method, Optimizer, Precision, precision_of

# The option that sets a field to any value it may have, but for those in `_sayable`.
OPTIONS = {
    "method.kind": "--method",
    "method.rank": "--rank",
    "method.targets": "--targets",
    "method.dropout": "--lora-dropout",
    "method.modules_to_save": "--modules-to-save",
    "method.trainable_layers": "--trainable-layers",
    "method.frozen": "--frozen",
    "method.quantization.format": "--quant-format",
    "method.quantization.double_quant": "--double-quant",
    "method.quantization.kbit_preparation": "--kbit-preparation",
    "optimizer.name": "--optimizer",
    "optimizer.foreach": "--foreach",
    "optimizer.in_backward": "--in-backward",
    "batch.micro": "--batch-size",
    "batch.sequence": "--seq-len",
    "batch.target_sequence": "--target-len",
    "objective": "--objective",
    "batch.accumulation": "--grad-accum",
    "batch.images": "--images",
    "batch.image_size": "--image-size",
    "kernels.attention": "--attention",
    "kernels.checkpointing": "--checkpointing",
    "kernels.reentrant": "--reentrant",
    "kernels.loss": "--loss",
    "kernels.fused": "--fused",
    "also.evaluation.micro": "--eval-batch-size",
    "also.evaluation.sequence": "--eval-seq-len",
    "also.evaluation.kept_batches": "--eval-keep-logits",
    "also.evaluation.accumulation": "--eval-accumulation-steps",
    "also.evaluation.preprocess": "--eval-preprocess",
    "also.evaluation.new_tokens": "--eval-generate",
    "loop.hold_outputs": "--hold-outputs",
    "loop.padded": "--padded",
    "loop.trainer": "--trainer",
    "loop.expandable_segments": "--expandable-segments",
    "parallelism.world": "--gpus",
    "parallelism.tp": "--tp",
    "parallelism.sequence_parallel": "--sequence-parallel",
    "parallelism.pp": "--pp",
    "parallelism.virtual_stages": "--virtual-stages",
    "parallelism.schedule": "--schedule",
    "parallelism.first_stage_layers": "--first-stage-layers",
    "parallelism.last_stage_layers": "--last-stage-layers",
    "parallelism.ends_as_layers": "--ends-as-layers",
    "parallelism.device_map": "--device-map",
    "parallelism.stage": "--stage",
    "parallelism.cp": "--cp",
    "parallelism.ep": "--ep",
    "profile": "--profile",
    "gpu": "--gpu",
}
_OF_ADAPTERS = ("rank", "alpha", "targets", "dropout", "modules_to_save", "adapter_dtype", "options")
_CHECKPOINTING = {"full": "--gradient-checkpointing", "none": "--no-gradient-checkpointing"}


class Command(NamedTuple):
    """What is typed, and the fields that no option sets so."""

    options: str
    unsaid: tuple[str, ...]


def options(asked: RunSpec, changed: RunSpec) -> str:
    """The options that, typed over a file with the run `asked`, make it `changed`.

    Raises SpecError where a field differs that no option sets so.
    """
    command = _command(asked, changed)
    if command.unsaid:
        field = command.unsaid[0]
        raise SpecError(f"{field}: no option sets it so; write it in a file for --spec", field)
    return command.options


def own_lines(asked: RunSpec, changed: RunSpec) -> Lines:
    """The same as a line to paste, with the fields no option sets in the note."""
    command = _command(asked, changed)
    note = f"to be written in a file for --spec: {', '.join(command.unsaid)}" if command.unsaid else ""
    return Lines("memplan", "memplan options", (command.options,) if command.options else (), note)


def _command(asked: RunSpec, changed: RunSpec) -> Command:
    typed: list[str] = []
    unsaid: list[str] = []
    for field, words in _typed(asked, changed):
        if words is None:
            unsaid.append(field)
        else:
            typed += words
    return Command(shlex.join(typed), tuple(unsaid))


def _typed(asked: RunSpec, changed: RunSpec) -> Iterator[tuple[str, list[str] | None]]:
    """The words that set each field that differs, None where none do."""
    if asked.model != changed.model:
        yield "model", [changed.model] if isinstance(changed.model, str) else None
    if asked.method.kind != changed.method.kind:
        yield "method.kind", ["--method", changed.method.kind]
    if asked.optimizer.name != changed.optimizer.name:
        yield "optimizer.name", _words("optimizer.name", changed.optimizer.name)
    if asked.precision != changed.precision:
        yield "precision", _precision(changed.precision)
    left = _left(asked, changed)
    for field in differing(left, changed):
        if field in OPTIONS:
            sayable = _sayable(changed, field)
            yield field, _words(field, value_of(changed, field)) if sayable else None
        else:
            yield field, None
    yield from _divided(asked.parallelism, changed.parallelism)
    if asked.parallelism.offload != changed.parallelism.offload:
        yield "parallelism.offload", _offload(asked.parallelism.offload, changed.parallelism.offload)


def _left(asked: RunSpec, changed: RunSpec) -> RunSpec:
    """The run once method and optimizer are typed, which leave behind what was the others', and with the rest done."""
    old, new = asked.method, changed.method
    if old.kind != new.kind:
        kept = _OF_ADAPTERS if new.kind in ADAPTERS else ()
        fields = {"kind": new.kind, **{name: getattr(old, name) for name in kept}}
        old = Method.model_validate(fields | ({"quantization": old.quantization} if new.kind.startswith("q") else {}))
    optimizer = asked.optimizer
    if optimizer.name != changed.optimizer.name:
        if optimizer.name is not None:
            optimizer = Optimizer(in_backward=optimizer.in_backward)
        optimizer = optimizer.model_copy(update={"name": changed.optimizer.name})
    apart = {"model": changed.model, "precision": changed.precision, "parallelism": _apart(asked, changed)}
    return asked.model_copy(update={"method": old, "optimizer": optimizer, **apart})


def _apart(asked: RunSpec, changed: RunSpec) -> Parallelism:
    """The asked parallelism with the changed one's `_divided` fields and offload."""
    fields = (*_DIVIDED, "offload")
    return asked.parallelism.model_copy(update={name: getattr(changed.parallelism, name) for name in fields})


def _sayable(run: RunSpec, field: str) -> bool:
    """Whether the command takes an option for the field of such a run, and the option can say the field's value."""
    kind, quantization = run.method.kind, run.method.quantization
    match field:
        case "method.trainable_layers":
            return kind == "freeze"
        case "method.rank" | "method.targets" | "method.dropout" | "method.modules_to_save":
            return kind in ADAPTERS
        case "method.quantization.double_quant":
            return quantization is not None and (quantization.format != "int8" or not quantization.double_quant)
        case "loop.hold_outputs":
            return run.loop.hold_outputs != "step"
        case _:
            return True


def _words(field: str, value: Any) -> list[str] | None:
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
    if isinstance(value, tuple):
        return [option, ",".join(cast(tuple[str, ...], value))]
    return [option, str(value)]


def _precision(wanted: Precision) -> list[str] | None:
    """The word and dtype that stand for the whole of it."""
    for word, dtype in product(("pure", "amp", "mixed"), ("bf16", "fp16", "fp32")):
        if (word, dtype) != ("mixed", "fp32") and Precision.model_validate(precision_of(word, dtype)) == wanted:
            return ["--precision", word, *(["--dtype", dtype] if dtype != "bf16" else [])]
    return None


_DIVIDED = ("world", "dp", "tp", "pp", "cp", "strategy")
_STRATEGIES = {
    "zero1": ["--zero", "1"],
    "zero2": ["--zero", "2"],
    "zero3": ["--zero", "3"],
    "fsdp": ["--fsdp", "full_shard"],
    "fsdp2": ["--fsdp", "fsdp2"],
    "ddp": ["--zero", "0"],
}


def _divided(old: Parallelism, new: Parallelism) -> Iterator[tuple[str, list[str] | None]]:
    """What divides the work. The command counts the replicas itself, and where it does, takes ddp if told no other."""
    if all(getattr(old, name) == getattr(new, name) for name in _DIVIDED):
        return
    if new.dp * new.tp * new.pp * new.cp != new.world:
        yield "parallelism.dp", None
        return
    counted = [name for name in ("tp", "pp", "cp") if getattr(old, name) != getattr(new, name)]
    if (old.world, old.dp) != (new.world, new.dp):
        counted.insert(0, "world")
    for name in counted:
        yield f"parallelism.{name}", _words(f"parallelism.{name}", getattr(new, name))
    if new.strategy != ("ddp" if counted and new.dp > 1 else old.strategy):
        alone = ["--zero", "0"] if new.strategy == "none" and new.dp == 1 else None
        yield "parallelism.strategy", _STRATEGIES.get(new.strategy, alone)


def _offload(old: Offload, new: Offload) -> list[str]:
    """An option adds to what a file says; `none` takes that back."""
    kept = [name for name in Offload.model_fields if getattr(new, name)]
    less = any(getattr(old, name) and name not in kept for name in Offload.model_fields)
    return ["--offload", ",".join(["none", *kept] if less else kept)]
