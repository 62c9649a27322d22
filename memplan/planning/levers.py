"""The levers: changes to a run that save memory, each with the fields it sets and the row of its cost.

Levers of one group exclude each other and are listed from the mildest to the strongest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from memplan.catalogue.kernels.wiring import GENERATING, TRAINERS
from memplan.catalogue.methods.methods import ADAPTERS, LORA
from memplan.catalogue.parallelism.sharding import STAGES
from memplan.catalogue.parallelism.sharding import STRATEGIES as ROWS
from memplan.catalogue.profiles.costs import LeverCost, cost_of
from memplan.catalogue.profiles.profiles import library_behaviour
from memplan.core.records import NamedTuple
from memplan.models.cards import find_config, find_model
from memplan.models.peft_methods import has_rank
from memplan.resolve.refusals.parallelism import ONE_GPU, SETTINGS_OF_STRATEGIES
from memplan.spec.formats import Quantization
from memplan.spec.parallelism import Offload
from memplan.spec.run import NEWEST, RunSpec, changed
from memplan.spec.serving import Serving
from memplan.spec.training import Method, Precision, precision_of

Fields = tuple[tuple[str, Any], ...]  # (path of a run's field, new value)


STACKS = ("unsloth", "trl", "axolotl", "llamafactory", "ms-swift", "transformers")
_MORE_HARDWARE_TIER = 4  # above every severity


class Lever(NamedTuple):
    """One change to a run.

    keys     keys of its rows in `memplan.catalogue.profiles.costs`
    title    its name in reports
    group    what it changes; a run takes at most one lever of a group
    fields   the fields it sets
    """

    keys: tuple[str, ...]
    title: str
    group: str
    fields: Fields

    @property
    def costs(self) -> tuple[LeverCost, ...]:
        return tuple(map(cost_of, self.keys))

    @property
    def severity(self) -> int:
        """How much the training result changes, from 0 to 3: see `memplan.catalogue.profiles.costs`."""
        return max(cost.severity for cost in self.costs)

    @property
    def tier(self) -> int:
        """Rank of the lever's price: its severity, or above every severity if it needs more hardware."""
        return _MORE_HARDWARE_TIER if "more_gpus" in self.keys else self.severity


def pull(run: RunSpec, levers: Iterable[Lever]) -> RunSpec:
    """Return the run with the levers' fields set. Raises SpecError if the resulting run is invalid."""
    return with_fields(run, (field for lever in levers for field in lever.fields))


def with_fields(run: RunSpec, fields: Iterable[tuple[str, Any]]) -> RunSpec:
    """Return the run with the fields set. Raises SpecError if the resulting run is invalid."""
    parts: dict[str, dict[str, Any]] = {}
    for path, value in fields:
        part, *inner = path.split(".")
        if not inner:  # a field of the run itself
            run = RunSpec.model_validate({**dict(run), part: value})
            continue
        field, *within = inner
        values = parts.setdefault(part, {})
        if within:  # merge with what an earlier field set in the same nested part
            values[field] = {**dict(values.get(field) or getattr(getattr(run, part), field)), within[0]: value}
        else:
            values[field] = value
    for part, values in parts.items():
        run = changed(run, part, **values)
    return run


def levers_of(run: RunSpec) -> tuple[Lever, ...]:
    """Return every lever that changes the run, mildest first.

    Levers are ordered by how much the result changes, then in the order below, which follows the time they usually
    cost; more GPUs come last. The run must be a decided one, such as `Estimate.run`.
    """
    levers = [
        *_segments(run),
        *_evaluation(run),
        *_optimizer(run),
        *_loss(run),
        *_reference(run),
        *_rollout(run),
        *_attention(run),
        *_checkpointing(run),
        *_micro_batch(run),
        *_offload(run),
        *_sharding(run),
        *_more_gpus(run),
        *_roles(run),
        *_double_quant(run),
        *_experts(run),
        *_precision(run),
        *_method(run),
        *_rank(run),
        *_targets(run),
        *_sequence(run),
        *_completions(run),
    ]
    return tuple(sorted(levers, key=lambda lever: lever.tier))


# Stacks that quantise each expert of a mixture apart, where the newest ones keep all in one 16-bit tensor.
_WITH_SEPARATE_EXPERTS = ("unsloth-2025", "transformers-4.51", "llamafactory-0.9", "axolotl-0.12")


def stacks_of(run: RunSpec, newest: bool = False) -> Iterator[Lever]:
    """Yield a lever for each other stack that may run the decided run on one GPU, or only for the newest of each."""
    if run.parallelism.world > 1 or not run.profile.startswith(STACKS):
        return
    profiles = [NEWEST[stack] for stack in STACKS if not run.profile.startswith(stack)]
    if not newest and "E" in find_model(run.model).axes():
        profiles += _WITH_SEPARATE_EXPERTS
    for profile in profiles:
        if profile != run.profile:
            yield _lever("stack", profile, "stack", ("profile", profile))


def _lever(key: str, title: str, group: str, *fields: tuple[str, Any]) -> Lever:
    """Return the lever with one cost row that sets the fields."""
    return Lever((key,), title, group, fields)


def _segments(run: RunSpec) -> Iterator[Lever]:
    if not run.loop.expandable_segments:
        yield _lever("expandable_segments", "expandable segments", "allocator", ("loop.expandable_segments", True))


def _optimizer(run: RunSpec) -> Iterator[Lever]:
    name = str(run.optimizer.name)

    def switch(key: str, title: str, to: str) -> Lever:
        cleared = ((f"optimizer.{field}", None) for field in ("foreach", "state_dtype", "momentum"))
        return _lever(key, title, "optimizer", ("optimizer.name", to), *cleared)

    if name == "adamw_torch":
        yield switch("optimizer_fused", "the fused optimizer", "adamw_torch_fused")
    if name in ("adamw_torch", "adamw_torch_fused"):
        yield switch("optimizer_8bit", "8-bit optimizer states", "adamw_8bit")
        yield switch("optimizer_paged", "paged 8-bit optimizer states", "paged_adamw_8bit")
        yield switch("optimizer_adafactor", "Adafactor", "adafactor")
        yield switch("optimizer_sgd", "SGD without momentum", "sgd")
    elif name == "adamw_8bit":
        yield switch("optimizer_paged", "paged 8-bit optimizer states", "paged_adamw_8bit")
    if run.batch.accumulation == 1 and not run.optimizer.in_backward:
        field = ("optimizer.in_backward", True)
        yield _lever("in_backward", "the optimizer's step in backward", "in backward", field)


def _reference(run: RunSpec) -> Iterator[Lever]:
    if run.reference == "copy" and run.method.kind in ADAPTERS:
        yield _lever("reference_adapters", "adapters as the reference", "reference", ("reference", "adapters"))
    if run.trainer in GENERATING:
        if run.reference in ("copy", "adapters") and not TRAINERS[run.trainer].own_loop:
            yield _lever("reference_none", "no reference model (beta 0)", "reference", ("reference", "none"))
        return
    if run.reference in ("copy", "adapters"):
        precomputed = ("reference", "precomputed")
        yield _lever("reference_precomputed", "a precomputed reference", "reference", precomputed)


def _roles(run: RunSpec) -> Iterator[Lever]:
    """Yield another model of the step in 4 bits; a reward model or critic on other GPUs; smaller passes of a critic."""
    inside = TRAINERS[run.trainer].models
    for role, other in run.roles.named:
        if other.location == "gpu" and other.quantization is None and role != "value":  # which trains
            stored = other.model_copy(update={"quantization": Quantization()})
            yield _lever("role_quantized", f"the {role} model in NF4", f"{role} format", (f"roles.{role}", stored))
        if other.location == "gpu" and (role == "reward" or role not in inside):
            away = other.model_copy(update={"location": "server"})
            yield _lever("role_server", f"the {role} model on other GPUs", f"{role} format", (f"roles.{role}", away))
        for micro in _halves(other.micro or run.batch.micro) if role not in inside else ():
            smaller = other.model_copy(update={"micro": micro})
            title = f"micro-batch {micro:,} of the {role} model"
            yield _lever("micro_batch", title, f"{role} format", (f"roles.{role}", smaller))


_LEAST_SHARE = 0.1


def _rollout(run: RunSpec) -> Iterator[Lever]:
    """Yield ways in which an engine on the same GPU takes less of it."""
    if run.rollout != "colocate":
        return
    if not run.serving.sleep:
        yield _lever("rollout_sleep", "vLLM asleep while the step trains", "sleep", ("serving.sleep", True))
    if (run.serving.max_model_len or run.batch.tokens) > run.batch.tokens:
        title, longest = f"vLLM for requests of {run.batch.tokens:,} tokens", run.batch.tokens
        yield _lever("rollout_length", title, "requests", ("serving.max_model_len", longest))
    share = (run.serving.memory_utilization or 0) - 0.1
    while share >= _LEAST_SHARE:
        field = ("serving.memory_utilization", round(share, 2))
        yield _lever("rollout_share", f"{round(share, 2):.0%} of the GPU for vLLM", "share", field)
        share -= 0.1
    yield _lever("rollout_server", "vLLM on other GPUs", "share", ("rollout", "server"), ("serving", Serving()))


def _completions(run: RunSpec) -> Iterator[Lever]:
    """Yield fewer completions of each prompt, in as many fewer passes, and shorter ones; fewer scored at once."""
    if run.trainer not in GENERATING:
        return
    parts, group = run.batch.accumulation, run.batch.generations
    while parts % 2 == group % 2 == 0 and group > 2:
        parts, group = parts // 2, group // 2
        fields = (("batch.generations", group), ("batch.accumulation", parts))
        yield _lever("generations", f"{group} completions of a prompt", "generations", *fields)
    for rows in _halves(run.batch.scored, run.batch.micro):
        yield _lever("micro_batch", f"{rows:,} completions scored at once", "scored", ("batch.scored", rows))
    for tokens in _halves(run.batch.new_tokens, _MIN_SEQUENCE):
        yield _lever("completions", f"completions of {tokens:,} tokens", "completions", ("batch.new_tokens", tokens))


def _loss(run: RunSpec) -> Iterator[Lever]:
    if run.trainer != "sft":
        if run.trainer == "dpo" and run.profile.startswith("trl-") and run.kernels.loss == "hf":
            tiled = (("kernels.loss", None), ("profile", NEWEST["trl"]))
            yield _lever("tiled_loss", f"a tiled loss ({NEWEST['trl']})", "loss", *tiled)
        return
    if run.kernels.loss == "hf":
        yield _lever("chunked_loss", "a chunked loss", "loss", ("kernels.loss", "chunked"))
    if run.kernels.loss in ("hf", "chunked"):
        fields: Fields = (("kernels.loss", "fused"),)
        fused = run.kernels.fused or ()
        if "cross_entropy" in fused:  # the fused loss replaces the cross-entropy kernel
            fields += (("kernels.fused", tuple(name for name in fused if name != "cross_entropy")),)
        yield _lever("fused_loss", "a fused loss", "loss", *fields)


def _attention(run: RunSpec) -> Iterator[Lever]:
    if run.kernels.attention in ("eager", "sdpa_math"):
        yield _lever("attention_flash", "sdpa attention", "attention", ("kernels.attention", None))
    if run.kernels.attention != "flash_attention_2" and run.precision.compute != "fp32":
        flash = ("kernels.attention", "flash_attention_2")
        yield _lever("attention_flash", "flash attention 2", "attention", flash)


def _checkpointing(run: RunSpec) -> Iterator[Lever]:
    if TRAINERS[run.trainer].own_loop:  # which checkpoints nothing
        return
    if run.kernels.checkpointing in ("none", "selective"):
        full = ("kernels.checkpointing", "full")
        yield _lever("checkpointing", "gradient checkpointing", "checkpointing", full)
    if run.kernels.every_n_layers > 1:
        yield _lever("checkpointing", "every layer checkpointed", "checkpointing", ("kernels.every_n_layers", 1))
    elif run.kernels.checkpointing in ("none", "full"):
        keys = ("checkpointing", "offload_activations")[run.kernels.checkpointing == "full" :]
        host = (("kernels.checkpointing", "offload"),)
        yield Lever(keys, "checkpoints on the host", "checkpointing", host)
    if run.kernels.reentrant and run.kernels.checkpointing != "none":
        yield _lever("reentrant", "non-reentrant checkpointing", "reentrant", ("kernels.reentrant", False))


def _micro_batch(run: RunSpec) -> Iterator[Lever]:
    """Yield smaller micro-batches with the same total batch."""
    micro, total = run.batch.micro, run.batch.micro * run.batch.accumulation
    if run.optimizer.in_backward:
        return
    for smaller in _halves(micro):
        if total % smaller == 0:
            fields = (("batch.micro", smaller), ("batch.accumulation", total // smaller))
            title = f"micro-batch {smaller:,} with {total // smaller:,} passes a step"
            yield _lever("micro_batch", title, "batch", *fields)


def _halves(n: int, least: int = 1) -> Iterator[int]:
    while n // 2 >= least:
        n //= 2
        yield n


def _evaluation(run: RunSpec) -> Iterator[Lever]:
    """Yield smaller evaluation batches, and ways to keep fewer logits during an evaluation."""
    evaluation = run.also.evaluation
    if evaluation is None:
        return
    if evaluation.kept_batches and not evaluation.batch_metrics:
        if evaluation.accumulation != 1:
            title = "evaluation logits moved to the host after every batch"
            yield _lever("evaluation_host", title, "kept logits", ("also.evaluation.accumulation", 1))
        if evaluation.preprocess is None:
            title = "evaluation keeps argmax tokens, not logits"
            yield _lever("evaluation_argmax", title, "what is kept", ("also.evaluation.preprocess", "argmax"))
    for smaller in _halves(evaluation.micro):
        title = f"evaluation batch size {smaller:,}"
        yield _lever("evaluation_batch", title, "evaluation", ("also.evaluation.micro", smaller))


def _offload(run: RunSpec) -> Iterator[Lever]:
    offload = run.parallelism.offload
    if not offload.optimizer:
        host = Offload.model_validate({**dict(offload), "optimizer": True})
        yield _lever("offload_optimizer", "the optimizer on the host", "offload", ("parallelism.offload", host))
    p = run.parallelism
    if p.world == 1 and p.strategy in ("none", *_WHOLE):
        yield _all_on_the_host(run, "gpus")
    elif p.strategy in ROWS and ROWS[p.strategy].parameters and not offload.parameters:
        yield _lever("offload_all", "optimizer and weights on the host", "offload", ("parallelism.offload", _HOST))


_HOST = Offload(optimizer=True, parameters=True)


def _all_on_the_host(run: RunSpec, group: str) -> Lever:
    world = run.parallelism.world
    fields = {**dict(spread(run, world, "zero3")), "parallelism.strategy": "zero3", "parallelism.offload": _HOST}
    title = "DeepSpeed ZeRO 3 with optimizer and weights on the host"
    return _lever("offload_all", title, group, *fields.items())


# From the least communication to the most: gradients once; the same with states and gradients sharded; weights too,
# in every pass.
STRATEGIES = ("ddp", "zero2", "fsdp2", "zero3")
_SHARDING = "fsdp2"
_WHOLE = ("ddp", "zero0", "zero1", "zero2")  # strategies under which a rank holds all weights


def spread(run: RunSpec, world: int, strategy: str) -> Fields:
    """Return the fields that spread the run over `world` data-parallel GPUs with the same micro-batch each."""
    fields: list[tuple[str, Any]] = [
        ("parallelism.world", world),
        ("parallelism.dp", world),
        ("parallelism.strategy", strategy if world > 1 else "none"),
    ]
    for name, strategies in SETTINGS_OF_STRATEGIES.items():
        if strategy not in strategies and name in run.parallelism.model_fields_set:
            fields.append((f"parallelism.{name}", getattr(ONE_GPU, name)))
    if strategy in STAGES and run.precision.autocast:  # DeepSpeed casts and scales itself, and keeps fp32 masters
        cast = {**precision_of("mixed", run.precision.compute or "bf16"), "compute": None, "autocast": False}
        fields += [(f"precision.{name}", value) for name, value in cast.items()]
        fields += [("loop.grad_scaler", False)] if run.loop.grad_scaler else []
    q = run.method.quantization
    if q is not None and world > 1 and ROWS[strategy].gathers:  # FSDP cannot shard integer storage
        stored = Quantization.model_validate({**dict(q), "storage": run.precision.weights})
        fields.append(("method.quantization", stored))
    return tuple(fields)


def _sharding(run: RunSpec) -> Iterator[Lever]:
    """Yield the strategies that shard what each of the run's replicas holds completely."""
    p = run.parallelism
    if p.strategy in _WHOLE and p.dp == p.world > 1:
        stage = STAGES.get(p.strategy, 0)
        for strategy in (name for name in STRATEGIES[1:] if not stage or STAGES.get(name, 0) > stage):
            yield _lever("sharding", f"sharded by {strategy}", "sharding", *spread(run, p.world, strategy))
        yield _all_on_the_host(run, "sharding")
    delays = run.loop.trainer or library_behaviour(run.profile, "", quantised=False).sharding.owns_loop
    keeps_whole = p.strategy in ("fsdp", "fsdp2") and delays and run.batch.accumulation > 1
    if keeps_whole and not run.loop.sync_each_batch:
        title = "gradients reduced in every pass"
        yield _lever("sync_each_batch", title, "reduction", ("loop.sync_each_batch", True))


def _more_gpus(run: RunSpec) -> Iterator[Lever]:
    if run.parallelism.world == 1:
        strategy = "zero3" if TRAINERS[run.trainer].own_loop else _SHARDING  # which it cannot generate under
        for world in (2, 4, 8):
            title = f"{world} GPUs, sharded by {strategy}"
            yield _lever("more_gpus", title, "gpus", *spread(run, world, strategy))


def _double_quant(run: RunSpec) -> Iterator[Lever]:
    q = run.method.quantization
    if q is not None and q.format in ("nf4", "fp4") and not q.double_quant:
        double = Quantization.model_validate({**dict(q), "double_quant": True})
        yield _lever("double_quant", "double quantisation", "quantisation", ("method.quantization", double))


def _experts(run: RunSpec) -> Iterator[Lever]:
    q = run.method.quantization
    if q is None or q.format not in ("nf4", "fp4") or q.experts or run.method.kind != "qlora":
        return
    if "E" in find_model(run.model).axes() and run.parallelism.strategy in ("none", "ddp"):
        without = ", without adapters" * (run.method.targets == "all-linear")
        field = ("method.quantization.experts", True)
        yield _lever("quantize_experts", f"quantised experts{without}", "quantisation", field)


def _precision(run: RunSpec) -> Iterator[Lever]:
    p = run.precision
    if run.method.quantization is None and (p.weights == "fp32" or p.master is not None):
        pure = Precision(weights="bf16")
        fields = ((f"precision.{name}", getattr(pure, name)) for name in Precision.model_fields)
        yield _lever("precision_pure", "pure bf16", "precision", *fields)


_TO_LORA = (("method.kind", "lora"), ("method.trainable_layers", Method().trainable_layers))
_QUANTISED = {"full": "qlora", "freeze": "qlora", "lora": "qlora", "dora": "qdora"}


def _method(run: RunSpec) -> Iterator[Lever]:
    kind = run.method.kind
    if kind not in ADAPTERS:
        yield _lever("method_lora", "LoRA", "method", *_TO_LORA)
    stored: Any = find_config(run.model).get("quantization_config") or {"quant_method": "fp8"}
    if kind in _QUANTISED and stored.get("quant_method") == "fp8":  # other formats than fp8 are kept
        to = _QUANTISED[kind]
        fields = (*_TO_LORA[1:], ("method.kind", to), ("method.quantization", Quantization()))
        title = {"qlora": "QLoRA", "qdora": "QDoRA"}[to]
        keys = ("method_qlora",) if kind in ADAPTERS else ("method_lora", "method_qlora")
        yield Lever(keys, title, "method", fields)


_MIN_RANK = 4


def _rank(run: RunSpec) -> Iterator[Lever]:
    if run.method.kind in ADAPTERS and has_rank(run.method.kind):
        for rank in _halves(run.method.rank, _MIN_RANK):
            yield _lever("rank", f"rank {rank:,}", "rank", ("method.rank", rank))


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FIRST = ("q_proj", "v_proj")  # the LoRA paper's targets (Hu et al. 2021), and peft's default for most families


def _targets(run: RunSpec) -> Iterator[Lever]:
    if run.method.kind not in LORA:
        return
    for targets in (ATTENTION, FIRST):
        if not run.method.pattern and all(map(run.method.adapts, targets)) and run.method.targets != targets:
            title = f"adapters on {', '.join(targets)} only"
            yield _lever("targets", title, "targets", ("method.targets", targets))


_MIN_SEQUENCE = 128  # tokens; shorter sequences make no sensible training run


def _sequence(run: RunSpec) -> Iterator[Lever]:
    for tokens in _halves(run.batch.sequence, _MIN_SEQUENCE):
        yield sequence_of(tokens)


def sequence_of(tokens: int) -> Lever:
    """Return the lever that sets the sequence length."""
    return _lever("sequence", f"sequences of {tokens:,} tokens", "sequence", ("batch.sequence", tokens))
