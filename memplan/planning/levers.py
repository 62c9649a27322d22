"""What can be changed about a run so that it takes less: each lever as the fields it sets, and the row of its cost.

Levers of one group exclude each other, and stand from the mildest to the strongest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from memplan.catalogue.methods.methods import ADAPTERS
from memplan.catalogue.parallelism.sharding import STRATEGIES as ROWS
from memplan.catalogue.profiles.costs import Cost, cost_of
from memplan.models.cards import find_config
from memplan.spec.formats import Quantization
from memplan.spec.parallelism import Offload
from memplan.spec.run import RunSpec, changed
from memplan.spec.training import Method, Precision

Fields = tuple[tuple[str, Any], ...]  # paths of a run's fields, and what they are set to


_BOUGHT = 4  # above every severity


class Lever(NamedTuple):
    """One change.

    keys     of its rows in `memplan.catalogue.profiles.costs`
    title    in words
    group    what it changes: of one group a run takes one lever
    fields   what it sets
    """

    keys: tuple[str, ...]
    title: str
    group: str
    fields: Fields

    @property
    def costs(self) -> tuple[Cost, ...]:
        return tuple(map(cost_of, self.keys))

    @property
    def severity(self) -> int:
        """How far the result differs, 0 to 3: see `memplan.catalogue.profiles.costs`."""
        return max(cost.severity for cost in self.costs)

    @property
    def tier(self) -> int:
        """How dear the lever is, for ranking: by its severity, and what has to be bought after all of that."""
        return _BOUGHT if self.group == "gpus" else self.severity


def pull(run: RunSpec, levers: Iterable[Lever]) -> RunSpec:
    """The run with the levers' fields set. Raises SpecError where a run cannot have them."""
    return with_fields(run, (field for lever in levers for field in lever.fields))


def with_fields(run: RunSpec, fields: Iterable[tuple[str, Any]]) -> RunSpec:
    """The run with those fields set. Raises SpecError where a run cannot have them."""
    parts: dict[str, dict[str, Any]] = {}
    for path, value in fields:
        part, field, *within = path.split(".")
        values = parts.setdefault(part, {})
        if within:  # a field of a part of the part, which others may have changed already
            values[field] = {**dict(values.get(field) or getattr(getattr(run, part), field)), within[0]: value}
        else:
            values[field] = value
    for part, values in parts.items():
        run = changed(run, part, **values)
    return run


def levers_of(run: RunSpec) -> tuple[Lever, ...]:
    """Every lever that changes the run, whose fields must be decided (`Estimate.run`), the mildest first: by how far
    the result differs, then as they stand here, which is by the time they usually take; more GPUs last."""
    found = [
        *_segments(run),
        *_evaluation(run),
        *_optimizer(run),
        *_loss(run),
        *_attention(run),
        *_checkpointing(run),
        *_micro_batch(run),
        *_offload(run),
        *_more_gpus(run),
        *_double_quant(run),
        *_precision(run),
        *_method(run),
        *_rank(run),
        *_targets(run),
        *_sequence(run),
    ]
    return tuple(sorted(found, key=lambda lever: lever.tier))


def _segments(run: RunSpec) -> Iterator[Lever]:
    if not run.loop.expandable_segments:
        fields = (("loop.expandable_segments", True),)
        yield Lever(("expandable_segments",), "expandable segments", "allocator", fields)


def _optimizer(run: RunSpec) -> Iterator[Lever]:
    name = str(run.optimizer.name)

    def other(key: str, title: str, to: str) -> Lever:
        left = tuple((f"optimizer.{field}", None) for field in ("foreach", "state_dtype", "momentum"))
        return Lever((key,), title, "optimizer", (("optimizer.name", to), *left))

    if name == "adamw_torch":
        yield other("optimizer_fused", "the fused optimizer", "adamw_torch_fused")
    if name in ("adamw_torch", "adamw_torch_fused"):
        yield other("optimizer_8bit", "8-bit optimizer states", "adamw_8bit")
        yield other("optimizer_paged", "paged 8-bit optimizer states", "paged_adamw_8bit")
        yield other("optimizer_adafactor", "Adafactor", "adafactor")
        yield other("optimizer_sgd", "SGD without momentum", "sgd")
    elif name == "adamw_8bit":
        yield other("optimizer_paged", "paged 8-bit optimizer states", "paged_adamw_8bit")
    if run.batch.accumulation == 1 and not run.optimizer.in_backward:
        fields = (("optimizer.in_backward", True),)
        yield Lever(("in_backward",), "the optimizer's step in backward", "in backward", fields)


def _loss(run: RunSpec) -> Iterator[Lever]:
    if run.kernels.loss == "hf":
        yield Lever(("chunked_loss",), "a chunked loss", "loss", (("kernels.loss", "chunked"),))
    if run.kernels.loss in ("hf", "chunked"):
        fields: Fields = (("kernels.loss", "fused"),)
        fused = run.kernels.fused or ()
        if "cross_entropy" in fused:  # the fused loss takes its place
            fields += (("kernels.fused", tuple(name for name in fused if name != "cross_entropy")),)
        yield Lever(("fused_loss",), "a fused loss", "loss", fields)


def _attention(run: RunSpec) -> Iterator[Lever]:
    if run.kernels.attention in ("eager", "sdpa_math"):
        yield Lever(("attention_flash",), "sdpa attention", "attention", (("kernels.attention", "sdpa"),))
    if run.kernels.attention != "flash_attention_2" and run.precision.compute != "fp32":
        flash = (("kernels.attention", "flash_attention_2"),)
        yield Lever(("attention_flash",), "flash attention 2", "attention", flash)


def _checkpointing(run: RunSpec) -> Iterator[Lever]:
    if run.kernels.checkpointing == "none":
        full = (("kernels.checkpointing", "full"),)
        yield Lever(("checkpointing",), "gradient checkpointing", "checkpointing", full)
    if run.kernels.checkpointing in ("none", "full"):
        keys = (
            ("offload_activations",)
            if run.kernels.checkpointing == "full"
            else ("checkpointing", "offload_activations")
        )
        host = (("kernels.checkpointing", "offload"),)
        yield Lever(keys, "checkpoints on the host", "checkpointing", host)
    if run.kernels.reentrant and run.kernels.checkpointing != "none":
        yield Lever(("reentrant",), "non-reentrant checkpointing", "reentrant", (("kernels.reentrant", False),))


def _micro_batch(run: RunSpec) -> Iterator[Lever]:
    """Smaller micro-batches that make up the same batch."""
    micro, whole = run.batch.micro, run.batch.micro * run.batch.accumulation
    if run.optimizer.in_backward:
        return
    for smaller in _halves(micro):
        if whole % smaller == 0:
            fields = (("batch.micro", smaller), ("batch.accumulation", whole // smaller))
            title = f"micro-batch {smaller:,} with {whole // smaller:,} passes a step"
            yield Lever(("micro_batch",), title, "batch", fields)


def _halves(n: int, least: int = 1) -> Iterator[int]:
    while n // 2 >= least:
        n //= 2
        yield n


def _evaluation(run: RunSpec) -> Iterator[Lever]:
    """Fewer sequences at once in an evaluation, and less of what it keeps of them."""
    evaluation = run.also.evaluation
    if evaluation is None:
        return
    if evaluation.kept_batches and not evaluation.batch_metrics:
        if evaluation.accumulation != 1:
            fields = (("also.evaluation.accumulation", 1),)
            yield Lever(("evaluation_host",), "kept logits to the host after every batch", "kept logits", fields)
        if evaluation.preprocess is None:
            fields = (("also.evaluation.preprocess", "argmax"),)
            yield Lever(("evaluation_argmax",), "the likeliest tokens kept, not logits", "what is kept", fields)
    for smaller in _halves(evaluation.micro):
        fields = (("also.evaluation.micro", smaller),)
        title = "evaluation of one sequence at once" if smaller == 1 else f"evaluation of {smaller:,} sequences at once"
        yield Lever(("evaluation_batch",), title, "evaluation", fields)


def _offload(run: RunSpec) -> Iterator[Lever]:
    offload = run.parallelism.offload
    if not offload.optimizer:
        host = Offload.model_validate({**dict(offload), "optimizer": True})
        yield Lever(("offload_optimizer",), "the optimizer on the host", "offload", (("parallelism.offload", host),))


# By what they send: gradients once; the same, with states and gradients in parts; weights too, for every pass.
STRATEGIES = ("ddp", "zero2", "fsdp2", "zero3")
_SHARDING = "fsdp2"


def spread(run: RunSpec, world: int, strategy: str) -> Fields:
    """What makes the run one of `world` GPUs that divide the data, each with the same micro-batch."""
    fields: list[tuple[str, Any]] = [
        ("parallelism.world", world),
        ("parallelism.dp", world),
        ("parallelism.strategy", strategy if world > 1 else "none"),
    ]
    q = run.method.quantization
    if q is not None and world > 1 and ROWS[strategy].gathers:  # FSDP divides no integers
        stored = Quantization.model_validate({**dict(q), "storage": run.precision.weights})
        fields.append(("method.quantization", stored))
    return tuple(fields)


def _more_gpus(run: RunSpec) -> Iterator[Lever]:
    if run.parallelism.world == 1:
        for world in (2, 4, 8):
            fields = spread(run, world, _SHARDING)
            yield Lever(("more_gpus",), f"{world} GPUs, sharded by {_SHARDING}", "gpus", fields)


def _double_quant(run: RunSpec) -> Iterator[Lever]:
    q = run.method.quantization
    if q is not None and q.format in ("nf4", "fp4") and not q.double_quant:
        twice = Quantization.model_validate({**dict(q), "double_quant": True})
        yield Lever(("double_quant",), "double quantisation", "quantisation", (("method.quantization", twice),))


def _precision(run: RunSpec) -> Iterator[Lever]:
    p = run.precision
    if run.method.quantization is None and (p.weights == "fp32" or p.master is not None):
        pure = Precision(weights="bf16")
        fields = tuple((f"precision.{name}", getattr(pure, name)) for name in Precision.model_fields)
        yield Lever(("precision_pure",), "pure bf16", "precision", fields)


_TO_LORA = (("method.kind", "lora"), ("method.trainable_layers", Method().trainable_layers))
_QUANTISED = {"full": "qlora", "freeze": "qlora", "lora": "qlora", "dora": "qdora"}


def _method(run: RunSpec) -> Iterator[Lever]:
    kind = run.method.kind
    if kind not in ADAPTERS:
        yield Lever(("method_lora",), "LoRA", "method", _TO_LORA)
    if kind in _QUANTISED and not find_config(run.model).get("quantization_config"):  # else it is as it is stored
        to = _QUANTISED[kind]
        fields = (*_TO_LORA[1:], ("method.kind", to), ("method.quantization", Quantization()))
        title = {"qlora": "QLoRA", "qdora": "QDoRA"}[to]
        keys = ("method_qlora",) if kind in ADAPTERS else ("method_lora", "method_qlora")
        yield Lever(keys, title, "method", fields)


_LEAST_RANK = 4


def _rank(run: RunSpec) -> Iterator[Lever]:
    if run.method.kind in ADAPTERS:
        for rank in _halves(run.method.rank, _LEAST_RANK):
            yield Lever(("rank",), f"rank {rank:,}", "rank", (("method.rank", rank),))


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FIRST = ("q_proj", "v_proj")  # those of the paper (Hu et al. 2021), and peft's default for most families


def _targets(run: RunSpec) -> Iterator[Lever]:
    if run.method.kind not in ADAPTERS:
        return
    for targets in (ATTENTION, FIRST):
        if run.method.targets == "all-linear" or set(targets) < set(run.method.targets):
            yield Lever(
                ("targets",), f"adapters on {', '.join(targets)} alone", "targets", (("method.targets", targets),)
            )


_LEAST_SEQUENCE = 128  # tokens: fewer are no training run


def _sequence(run: RunSpec) -> Iterator[Lever]:
    for tokens in _halves(run.batch.sequence, _LEAST_SEQUENCE):
        yield sequence_of(tokens)


def sequence_of(tokens: int) -> Lever:
    """Sequences of so many tokens."""
    return Lever(("sequence",), f"sequences of {tokens:,} tokens", "sequence", (("batch.sequence", tokens),))
