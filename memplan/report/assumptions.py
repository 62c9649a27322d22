"""The assumptions of an estimate: batch, lengths, kernels, method, precision, optimizer, parallelism."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import get_args

from memplan.core.errors import printable
from memplan.estimate.answer import Estimate
from memplan.models.peft_methods import PEFT_METHODS, has_rank
from memplan.program.run import TOKENS
from memplan.report.blocks import Facts
from memplan.report.wording import adapters, asked, count, examples, images, lengths, model
from memplan.resolve.parallelism import is_wrapped
from memplan.resolve.roles import models_of
from memplan.spec.formats import GgufType, Quantization
from memplan.spec.generation import Generation
from memplan.spec.parallelism import Parallelism
from memplan.spec.run import RunSpec
from memplan.spec.training import Also, Kernels, Loop


def assumptions(answer: Estimate) -> list[tuple[str, str]]:
    """Return the assumptions as pairs of a name and a text."""
    if answer.serving is not None:
        from memplan.report.serving import assumptions as serving_assumptions

        return serving_assumptions(answer)
    run, batch, loop = answer.run, answer.run.batch, answer.run.loop
    total, trainable, active = answer.parameters
    size = f"{count(total)} parameters" + (f", {count(active)} active" if active != total else "")
    sequences = examples(run)
    if run.task != "train":
        return _inference_assumptions(answer, size)
    passes = "1 pass a step" if batch.accumulation == 1 else f"{batch.accumulation:,} passes a step"
    text = [
        ("model", f"{model(answer)}: {size}"),
        ("trains", f"{count(trainable)} ({trainable / total:.2%})"),
        *((("trainer", "; ".join(_trainer(run))),) if run.trainer != "sft" else ()),
        ("method", "; ".join(_method(answer))),
        ("precision", "; ".join(_precision(answer))),
        ("optimizer", "; ".join(_optimizer(answer))),
        (
            "batch",
            f"{sequences} of {lengths(batch)}{',' * bool(batch.target_sequence)}{images(batch)} per GPU; {passes}"
            + (f"; packed as {batch.packing}" if batch.packing else ""),
        ),
        ("checkpointing", "".join(_checkpointing(run))),
        ("attention", f"{run.kernels.attention}{'; padded batches' * loop.padded}"),
        ("loss", _loss(run) + _held_outputs(loop)),
        *((("between steps", "; ".join(_side_tasks(run))),) if run.also != Also() else ()),
        *((("answered by", "a trace of the step"),) if answer.via == "trace" else ()),
        *((("fused kernels", ", ".join(run.kernels.fused)),) if run.kernels.fused else ()),
        *((("kernels of packages", ", ".join(run.kernels.packages)),) if run.kernels.packages else ()),
        ("profile", run.profile),
    ]
    if run.parallelism.world > 1 or is_wrapped(run.parallelism):
        text.insert(-1, ("GPUs", ", ".join([f"{run.parallelism.world}", *strategies(run.parallelism)])))
    if run.parallelism.pp > 1:
        text.insert(-1, ("pipeline", _pipeline(run)))
    return text


def _trainer(run: RunSpec) -> Iterator[str]:
    """Yield the trainer, its reference and the other models of its step."""
    yield run.trainer
    yield _REFERENCES[run.reference or "none"]
    for role, other in models_of(run).items():
        name = other.model if isinstance(other.model, str) else other.model.config["model_type"]
        stored = other.quantization.format if other.quantization else other.dtype or run.precision.weights
        yield f"{role} {printable(str(name))} in {stored}" + " on a server" * (other.location == "server")


_REFERENCES = {
    "copy": "the reference is a copy of the model",
    "adapters": "the reference is the model with its adapters disabled",
    "precomputed": "the reference's log-probabilities are precomputed",
    "none": "no reference model",
}


def question(answer: Estimate) -> str:
    """Return what was asked in one line: the method, the model, and what decides most of the memory."""
    return ", ".join(_question(answer))


def is_one_question(answers: Sequence[Estimate]) -> bool:
    """Whether answers are of one run, on different cards."""
    return len({*_without_cards(answers)}) == 1


def _without_cards(answers: Sequence[Estimate]) -> list[RunSpec]:
    return [answer.asked.model_copy(update={"gpu": None}) for answer in answers]


def title(answers: Sequence[Estimate]) -> str:
    """Return what several answers are about: the question that they share, or how many runs they are."""
    return question(answers[0]) if is_one_question(answers) else f"{len(answers):,} runs"


def of_lengths(answers: Sequence[Estimate]) -> Iterator[Facts]:
    """Yield the longest and the typical batch of each run whose sequences differ."""
    if any(answer.asked.batch.lengths for answer in answers):
        from memplan.report.lengths import facts

        for name, answer in zip(names(answers), answers, strict=True):
            yield from facts(answer, name)


def names(answers: Sequence[Estimate]) -> list[str]:
    """Return what tells answers apart: their cards, or what they ask if that differs; nothing for a single one."""
    if len(answers) == 1:
        return [""]
    if is_one_question(answers):
        return [str(answer.run.gpu) for answer in answers]
    runs = _without_cards(answers)
    distinct = [*dict.fromkeys(runs)]
    numbered = [f"run {distinct.index(run) + 1}, {question(answer)}" for run, answer in zip(runs, answers, strict=True)]
    choices = ([*map(words, answers)] for words in (asked, question))
    told = next((texts for texts in choices if len({*texts}) == len(distinct)), numbered)
    return [text + (f" on {answer.run.gpu}" if answer.gpu else "") for text, answer in zip(told, answers, strict=True)]


def assumed(answers: Sequence[Estimate]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the assumptions of each run, under a title."""
    firsts: dict[RunSpec, tuple[str, Estimate]] = {}
    for run, name, answer in zip(_without_cards(answers), names(answers), answers, strict=True):
        firsts.setdefault(run, (name, answer))
    several = len(firsts) > 1
    return [(f"Assumed for {name}" if several else "Assumed", assumptions(of)) for name, of in firsts.values()]


def _question(answer: Estimate) -> Iterator[str]:
    run, batch, p = answer.run, answer.run.batch, answer.run.parallelism
    word = run.method.kind if run.task == "train" else run.task
    yield asked(answer)
    if answer.serving is not None:
        yield f"{batch.micro:,} request{'s' * (batch.micro > 1)} of {answer.serving['context']:,} tokens"
    else:
        yield f"{examples(run)} of {lengths(batch)}{images(batch)}"
    if run.task == "train":
        yield from (f"{batch.accumulation:,} passes a step",) * (batch.accumulation > 1)
        yield from (f"rank {run.method.rank}",) * (word not in ("full", "freeze") and has_rank(word))
        yield str(run.optimizer.name)
    elif answer.serving is None and run.task == "generate":
        yield f"{batch.new_tokens:,} new tokens"
    if p.world > 1 or is_wrapped(p):
        yield f"{p.world:,} GPU{'s' * (p.world > 1)}" + "".join(f" ({how})" for how in [*strategies(p)][:1])
    if answer.serving is None:
        yield run.profile


def _side_tasks(run: RunSpec) -> Iterator[str]:
    """Yield what the run does in addition to its steps."""
    e, saving, merging = run.also.evaluation, run.also.saving, run.also.merging
    if e is not None:
        size = f"{e.micro:,} sequence{'s' if e.micro > 1 else ''} of {e.sequence or run.batch.sequence:,} tokens"
        kept = f", logits of {e.kept_batches:,} batches kept" if e.kept_batches else ""
        kept += ", only argmax tokens" if e.preprocess else ""
        host = f", moved to the host every {e.accumulation:,}" if e.accumulation is not None else ""
        yield f"evaluation of {size}{kept}{host}" + (f", {e.new_tokens:,} new tokens each" if e.new_tokens else "")
    if saving is not None:
        yield "a checkpoint" + (f" with a {saving.state_dict} state dict" if saving.state_dict else "")
    if merging is not None:
        dtype = f" in {merging.dtype}" if merging.dtype else ""
        yield "adapters merged" + (f" into a model reloaded{dtype}" if merging.model == "reloaded" else "")


def _inference_assumptions(answer: Estimate, size: str) -> list[tuple[str, str]]:
    """Return the assumptions of a run that does not train."""
    run, batch = answer.run, answer.run.batch
    after = f"; {batch.new_tokens:,} new tokens after each" if run.task == "generate" else ""
    return [
        ("model", f"{model(answer)}: {size}"),
        ("task", "; ".join(_method(answer))),
        ("precision", "; ".join(_precision(answer))),
        ("batch", f"{examples(run)} of {lengths(batch)}{images(batch)}{after}"),
        *((("cache", "; ".join(_cache(run.generation))),) if run.task == "generate" else ()),
        *((("assistant", "; ".join(_assistant(run.generation))),) if run.generation.assisted else ()),
        ("attention", f"{run.kernels.attention}{'; padded batches' * run.loop.padded}"),
        *((("answered by", "a trace of the passes"),) if answer.via == "trace" else ()),
        *((("GPUs", ", ".join(_devices(run.parallelism))),) if _is_divided(run.parallelism) else ()),
        ("profile", run.profile),
    ]


def _is_divided(p: Parallelism) -> bool:
    return p.tp > 1 or p.device_map is not None


def _devices(p: Parallelism) -> Iterator[str]:
    """Yield the number of GPUs that a model runs on, and how they divide it."""
    yield f"{p.world}"
    yield from strategies(p)
    if p.device_map is not None:
        yield f"device_map {p.device_map}; this is GPU {p.stage or 0}"


def _decoding(generation: Generation) -> str:
    if generation.num_beams > 1:
        return f"{generation.num_beams:,} beams a prompt"
    return "sampled" if generation.do_sample else "greedy"


def _cache(generation: Generation) -> Iterator[str]:
    """Yield how keys and values are cached."""
    yield generation.cache_implementation or "the library's default"
    config = generation.cache_config
    if config is not None and config.backend == "fp8":
        yield "fp8, with one scale for a layer's keys and one for its values"
    elif config is not None:
        yield f"{config.nbits} bits by {config.backend} in groups of {config.q_group_size}"
        yield f"up to {config.residual_length} tokens unquantised"
    if generation.prefill_chunk_size is not None:
        yield f"prompts in chunks of {generation.prefill_chunk_size:,} tokens"


def _assistant(generation: Generation) -> Iterator[str]:
    """Yield what proposes tokens, and how many in a round."""
    lookup, layers, assistant = (
        generation.prompt_lookup_num_tokens,
        generation.assistant_early_exit,
        generation.assistant_model,
    )
    if lookup:
        yield f"{lookup:,} tokens looked up in the prompt"
        return
    if layers:
        yield f"the model's first {layers:,} layers"
    elif assistant is not None:
        yield assistant if isinstance(assistant, str) else str(assistant.config.get("model_type", ""))
        q = generation.assistant_quantization
        weights = q.format if q is not None else generation.assistant_dtype
        yield f"{weights} weights" if weights else "weights in the model's dtype"
    yield f"{generation.num_assistant_tokens or TOKENS:,} tokens a round at most"


def _pipeline(run: RunSpec) -> str:
    p = run.parallelism
    chunks = f", {p.virtual_stages} chunks of layers on each" if p.virtual_stages > 1 else ""
    ends = ((p.first_stage_layers, "first"), (p.last_stage_layers, "last"))
    uneven = "".join(f"; {n} layers on the {end}" for n, end in ends if n is not None)
    ends_ = {True: "; embeddings and head count as layers", False: "; only layers count", None: ""}[p.ends_as_layers]
    return f"{p.pp} stages{chunks}, {p.schedule}{uneven}{ends_}; this is stage {p.stage}"


def strategies(parallelism: Parallelism) -> Iterator[str]:
    """Yield how the GPUs divide the run: the kinds of parallelism and their degrees."""
    for name, degree in (("tensor", parallelism.tp), ("context", parallelism.cp), ("expert", parallelism.ep)):
        if degree > 1:
            yield f"{name} parallel over {degree}"
    if parallelism.strategy != "none":
        yield str(parallelism.strategy)


def _loss(run: RunSpec) -> str:
    """Return the loss kernel, or the objective if it is not causal language modelling."""
    return str(run.kernels.loss) if run.objective in (None, "causal_lm") else f"of {run.objective}"


def _held_outputs(loop: Loop) -> str:
    if loop.hold_outputs == "step":
        return "; outputs held to the step's end"
    return "; outputs held through backward" if loop.hold_outputs else ""


def _checkpointing(run: RunSpec) -> Iterator[str]:
    yield str(run.kernels.checkpointing)
    if run.kernels.every_n_layers > 1:
        yield f", one of every {run.kernels.every_n_layers} layers"
    if _is_reentrant(run.kernels):
        yield ", reentrant"
    if run.parallelism.offload.activations:
        yield "; tensors saved for backward are in host memory"


def _is_reentrant(kernels: Kernels) -> bool:
    return bool(kernels.reentrant) and kernels.checkpointing != "none"


def _method(answer: Estimate) -> Iterator[str]:
    m = answer.run.method
    if answer.run.task == "train":
        yield m.kind
    else:
        yield answer.run.task
        yield "all logits" if answer.run.task == "forward" else _decoding(answer.run.generation)
        if m.kind != "full":
            yield f"adapters of {m.kind}"
    if m.kind == "freeze":
        yield f"the last {m.trainable_layers} layers train" if m.trainable_layers > 1 else "the last layer trains"
    elif m.kind != "full":
        yield from adapters(m)
        yield from (f"{name} {value}" for name, value in m.options.items() if m.kind in PEFT_METHODS)
        yield f"adapters in {m.adapter_dtype}"
        if m.dropout:
            yield f"dropout {m.dropout:g}"
        if m.modules_to_save:
            yield f"{', '.join(m.modules_to_save)} train in full"
    if m.frozen:
        yield f"{', '.join(m.frozen)} frozen"
    q = m.quantization
    if q is not None:
        is_4bit = q.format in ("nf4", "fp4")
        blocks = "one block per column" if q.block_size < 0 else f"in blocks of {q.block_size}"
        yield q.format + (f" {blocks}" if _has_blocks(q) else "")
        if answer.asked.method.quantization is None:
            yield "as the checkpoint is stored"
        if is_4bit:
            yield "double quantisation" if q.double_quant else "no double quantisation"
        if answer.run.task != "train":
            return
        if isinstance(q.kbit_preparation, str):
            yield f"kbit preparation as {q.kbit_preparation} does it"
        else:
            yield "kbit preparation" if q.kbit_preparation else "no kbit preparation"
        skipped = [name for name in q.skip or () if name != "lm_head"]
        if skipped:
            yield f"{', '.join(skipped)} not quantised"


def _has_blocks(q: Quantization) -> bool:
    """Whether a format has blocks of weights of a configurable size."""
    without_blocks = ("int8", "w8a8-int8", "torchao-int8", "quanto-int8", "fp8-tensor", "fp8-channel")
    return q.format not in (*without_blocks, *get_args(GgufType))


def _precision(answer: Estimate) -> Iterator[str]:
    p = answer.run.precision
    yield f"weights {p.weights}"
    yield f"{'autocast to' if p.autocast else 'computes in'} {p.compute}"
    if p.grads and p.grads != p.weights:
        yield f"gradients {p.grads}"
    if p.master:
        yield f"master weights {p.master}"
    if answer.run.loop.grad_scaler:
        yield "the loss is scaled"


def _optimizer(answer: Estimate) -> Iterator[str]:
    o = answer.run.optimizer
    yield str(o.name)
    states = [line for line in answer.ledger if line.kind == "optstate"]
    if states:
        yield f"states {', '.join(dict.fromkeys(line.dtype for line in states if line.bytes >= states[0].bytes // 10))}"
    if o.foreach:
        yield "foreach"
    if o.momentum:
        yield f"momentum {o.momentum:g}"
    if o.in_backward:
        yield "steps in backward"
    if answer.run.parallelism.offload.optimizer:
        yield f"{'masters, ' if answer.run.precision.master else ''}states and step in host memory"
    clip = answer.run.loop.clip_grad_norm
    yield f"gradients clipped at {clip:g}" if clip and not o.in_backward else "no clipping"
    if answer.run.loop.trainer:
        yield "driven by transformers' Trainer"
