"""What every report says in words: the verdict, the peak's moment, the assumptions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, get_args

from memplan.answer import Estimate, Line, Phase
from memplan.assisted import TOKENS
from memplan.errors import printable
from memplan.gpus import GPU, find_gpu
from memplan.spec import Also, Batch, Generation, GgufType, Kernels, Loop, Parallelism, Quantization, RunSpec
from memplan.units import GIB, decimal, gib, rounded

CATEGORIES = {
    "parameter": "parameters",
    "gradient": "gradients",
    "optstate": "optimizer states",
    "activation": "activations",
    "temp": "temporaries",
    "buffer": "buffers",
    "other": "workspaces",
}


class Part(NamedTuple):
    """A part of what is used: a category of tensors, or what the allocator and CUDA take beside them."""

    key: str
    label: str
    bytes: int
    largest: str


def parts(answer: Estimate) -> list[Part]:
    """What is used at the peak, by category, then what is not torch's tensors. Sums to `bytes.used`."""
    out: list[Part] = []
    for kind, label in CATEGORIES.items():
        if answer.categories[kind]:
            largest = next(line for line in answer.ledger if line.kind == kind)
            out.append(
                Part(kind, label, answer.categories[kind], f"{times(largest)}{largest.what}, {gib(largest.bytes)}")
            )
    held = answer.bytes
    if not without_torch(answer):
        out.append(
            Part("allocator", "allocator's cache", held.reserved - held.allocated, "held by torch, in no tensor")
        )
    several = answer.run.parallelism.world > 1 and answer.run.parallelism.schedule != "device_map"
    beside = "the driver's, and loaded kernels"
    if several:
        groups = sum(row.what.startswith("NCCL's buffers") for row in answer.beside)
        beside = "the driver's, loaded kernels and NCCL's"
        beside += f", in {groups} communicators" if groups > 1 else ""
    if answer.serving is not None and answer.verdict.answer == "does not fit":
        beside += ", and what the engine leaves"
    out.append(Part("context", "CUDA context", held.used - held.reserved, beside))
    return out


def without_torch(answer: Estimate) -> bool:
    """Whether what runs has no torch, and so no allocator of its."""
    return answer.run.profile.startswith("llama.cpp")


def card(answer: Estimate) -> GPU | None:
    """The GPU's row, where one was asked."""
    return find_gpu(answer.gpu.name) if answer.gpu else None


def model(answer: Estimate) -> str:
    """The model's name."""
    asked = answer.asked.model
    name = asked if isinstance(asked, str) else str(asked.config.get("_name_or_path") or asked.config["model_type"])
    return printable(name)


def tenths(n: int) -> str:
    """Bytes in GiB with one decimal, without the unit."""
    return decimal(n, GIB, 1)


def hundredths(n: int) -> str:
    """Bytes in GiB with two decimals, without the unit.

    >>> hundredths(16_106_127_360), hundredths(512), hundredths(0)
    ('15.00', '<0.01', '0.00')
    """
    text = decimal(n, GIB, 2)
    return "<0.01" if n > 0 and text == "0.00" else text


def share(n: int, of: int) -> str:
    """What part of all bytes `n` are.

    >>> share(1, 4), share(1, 10_000)
    ('25.0%', '<0.1%')
    """
    text = f"{n / of:.1%}"
    return "<0.1%" if n > 0 and text == "0.0%" else text


def verdict(answer: Estimate) -> str:
    """The answer in one line."""
    used, gpu, headroom = tenths(answer.bytes.used), card(answer), answer.verdict.headroom
    if gpu is None or headroom is None:
        return f"uses {used} GiB ({band(answer)})"
    have = f"{tenths(gpu.usable)} GiB"
    match answer.verdict.answer:
        case "fits":
            return f"fits: {used} of {have} used on {gpu.title}, {tenths(headroom)} GiB free"
        case "tight":
            room = f"{tenths(headroom)} GiB free" if headroom >= 0 else f"{tenths(-headroom)} GiB over"
            return f"tight: {used} of {have} used on {gpu.title}, {room}; {band(answer)}"
        case _:
            return f"does not fit: needs {used} of {have} on {gpu.title}, {tenths(-headroom)} GiB too much"


def band(answer: Estimate) -> str:
    """The band in words."""
    low, high, coverage = answer.band
    return f"{coverage:.0%} of runs take {tenths(low)} to {tenths(high)} GiB"


def headroom(answer: Estimate) -> str:
    """How much is left, and how sure that is."""
    left = answer.verdict.headroom
    if left is None:
        return f"{band(answer)}."
    room = f"{gib(left)} of headroom" if left >= 0 else f"{gib(-left)} too much"
    return f"{room}; {band(answer)}."


_MOMENTS = {
    "load": "while the weights are loaded",
    "forward": "in the forward pass",
    "loss": "in the loss",
    "backward": "in the backward pass",
    "step": "in the optimizer's step",
    "eval": "in evaluation",
    "generate": "in generation",
    "encode": "while the encoder reads",
    "prefill": "while the prompt is read",
    "decode": "while tokens are generated",
    "save": "while the model is saved",
    "merge": "while adapters are merged",
}


def moment(answer: Estimate) -> str:
    """When the peak is, in words: "at the loss's backward in step 2, in loss.log_softmax"."""
    phase, where = answer.peak
    words = _MOMENTS.get(phase, f"in phase {phase}")
    if phase == "backward" and where.startswith("loss."):
        words = "at the loss's backward"
    if where == "clipping":
        words = "while gradients are clipped"
    at = peak_phase(answer)
    step = {1: " in step 1", 2: " in step 2 and later"}.get(at.step or 0, "")
    named = where and where not in ("clipping", "optimizer")
    return f"{words}{step}" + (f", in {where}" if named else "")


def peak_phase(answer: Estimate) -> Phase:
    """The phase of the peak, the last where several are as large."""
    return [p for p in answer.phases if p.peak == answer.bytes.allocated][-1]


def times(line: Line) -> str:
    """How many of a tensor there are, where there are several: "28 × "."""
    return f"{line.count:,} × " if line.count > 1 else ""


def shape(line: Line) -> str:
    """A tensor's shape in letters and in numbers: "b·s·f = 1·2048·18944". Empty where it has none."""
    numbers = "·".join(map(str, line.dims))
    if not numbers:
        return "scalar" if line.bytes == line.count * _LEAST else ""
    return numbers if line.shape in ("", numbers) else f"{line.shape} = {numbers}"


_LEAST = rounded(1)  # what torch takes for a single number


def dtype(line: Line) -> str:
    """A tensor's dtype; of a packed one, how many numbers share one: "uint8 for every 2"."""
    stored, _, numbers = line.dtype.partition("/")
    return f"{stored} for every {int(numbers):,}" if numbers else stored


def notes(answers: Sequence[Estimate]) -> list[str]:
    """What was left out and what to know, of several answers once."""
    left_out = [f"not supported, and left out: {what}" for answer in answers for what in answer.unsupported]
    return list(dict.fromkeys([*left_out, *(note for answer in answers for note in answer.notes)]))


def host(answer: Estimate) -> str:
    """What the host holds; empty where it holds nothing. Of several processes, those of a node together."""
    found = answer.host.peak
    if answer.host.ranks == 1:
        return f"{gib(answer.host_bytes)} more are in the host's memory." if answer.host_bytes else ""
    if not found.node:
        return ""
    when = "while the model is loaded" if found.phase == "load" else "in the steps"
    return (
        f"Host memory: {gib(found.rank)} a process, {gib(found.node)} the {answer.host.ranks} of a node, most {when}."
    )


class PhaseRow(NamedTuple):
    """One phase: its peak in the first step and in later ones (the same where they do not differ)."""

    phase: str
    first: int
    later: int
    where: str
    peak: bool


def phase_rows(answer: Estimate) -> list[PhaseRow]:
    """The phases, in order."""
    top = peak_phase(answer)
    out: list[PhaseRow] = []
    for name in dict.fromkeys(p.phase for p in answer.phases):
        group = [p for p in answer.phases if p.phase == name]
        out.append(PhaseRow(name, group[0].peak, group[-1].peak, group[-1].where, top in group))
    return out


def phase_cells(answer: Estimate) -> list[tuple[str, str, str, str]]:
    """The phases as rows of a table: name, peak of the first step and of later ones in GiB, where."""
    return [
        (
            f"{row.phase} (peak)" if row.peak else row.phase,
            hundredths(row.first),
            "" if row.phase == "load" else hundredths(row.later),
            row.where,
        )
        for row in phase_rows(answer)
    ]


RANKS = ("stage", "layers", "in flight", "GiB allocated", "used", "answer", "peak")


def rank_rows(answer: Estimate) -> list[tuple[str, ...]]:
    """The ranks that differ as rows of a table, that of the answer with a mark."""
    return [
        (
            f"{rank.stage} *" if rank.stage == answer.run.parallelism.stage else str(rank.stage),
            str(rank.layers),
            str(rank.in_flight),
            hundredths(rank.bytes.allocated),
            hundredths(rank.bytes.used),
            rank.verdict.answer or "",
            f"{rank.peak.phase} {rank.peak.where}".strip(),
        )
        for rank in answer.ranks
    ]


def ranks_title(answer: Estimate) -> str:
    """What the table of ranks is of."""
    p = answer.run.parallelism
    if p.device_map is not None:
        return "The GPUs, as device_map fills them; * the answer's"
    each = p.world // p.pp
    return f"The ranks of each stage, {each} GPU{'s' if each > 1 else ''} each; * the answer's"


def steps_differ(answer: Estimate) -> bool:
    """Whether the first step is not as the later ones."""
    return any(p.step == 2 for p in answer.phases)


def count(n: int) -> str:
    """A number of parameters, in words.

    >>> count(7_615_616_512), count(40_370_176), count(960)
    ('7.62 billion', '40.37 million', '960')
    """
    for word, size in (("billion", 10**9), ("million", 10**6)):
        if n >= size:
            return f"{n / size:.2f} {word}"
    return f"{n:,}"


def assumptions(answer: Estimate) -> list[tuple[str, str]]:
    """What the number rests on, as pairs of a name and a text."""
    if answer.serving is not None:
        from memplan.report.served import assumptions as of_serving

        return of_serving(answer)
    run, batch, loop = answer.run, answer.run.batch, answer.run.loop
    total, trainable, active = answer.parameters
    size = f"{count(total)} parameters" + (f", {count(active)} active" if active != total else "")
    sequences = "1 sequence" if batch.micro == 1 else f"{batch.micro:,} sequences"
    if run.task != "train":
        return _of_inference(answer, size, sequences)
    passes = "1 pass a step" if batch.accumulation == 1 else f"{batch.accumulation:,} passes a step"
    text = [
        ("model", f"{model(answer)}: {size}"),
        ("trains", f"{count(trainable)} ({trainable / total:.2%})"),
        ("method", "; ".join(_method(answer))),
        ("precision", "; ".join(_precision(answer))),
        ("optimizer", "; ".join(_optimizer(answer))),
        (
            "batch",
            f"{sequences} of {_lengths(batch)}{',' * bool(batch.target_sequence)}{_images(batch)} per GPU; {passes}",
        ),
        ("checkpointing", "".join(_checkpointing(run))),
        ("attention", run.kernels.attention + ("; padded batches" if loop.padded else "")),
        ("loss", _loss(run) + _held_outputs(loop)),
        *((("beside the steps", "; ".join(_beside(run))),) if run.also != Also() else ()),
        *((("answered by", "a trace of the step"),) if answer.via == "trace" else ()),
        *((("fused kernels", ", ".join(run.kernels.fused)),) if run.kernels.fused else ()),
        ("profile", run.profile),
    ]
    if run.parallelism.world > 1:
        text.insert(-1, ("GPUs", ", ".join([f"{run.parallelism.world}", *_strategies(run.parallelism)])))
    if run.parallelism.pp > 1:
        text.insert(-1, ("pipeline", _pipeline(run)))
    return text


def _beside(run: RunSpec) -> Iterator[str]:
    """What the run does beside its steps."""
    e, saving, merging = run.also.evaluation, run.also.saving, run.also.merging
    if e is not None:
        size = f"{e.micro:,} sequence{'s' if e.micro > 1 else ''} of {e.sequence or run.batch.sequence:,} tokens"
        kept = f", logits of {e.kept_batches:,} batches kept" if e.kept_batches else ""
        kept += ", the likeliest tokens alone" if e.preprocess else ""
        host = f", to the host every {e.accumulation:,}" if e.accumulation is not None else ""
        yield f"evaluation of {size}{kept}{host}" + (f", {e.new_tokens:,} new tokens each" if e.new_tokens else "")
    if saving is not None:
        yield "a checkpoint" + (f" with a {saving.state_dict} state dict" if saving.state_dict else "")
    if merging is not None:
        dtype = f" in {merging.dtype}" if merging.dtype else ""
        yield "adapters merged" + (f" into a model reloaded{dtype}" if merging.model == "reloaded" else "")


def _of_inference(answer: Estimate, size: str, sequences: str) -> list[tuple[str, str]]:
    """The same where nothing trains."""
    run, batch = answer.run, answer.run.batch
    prompts = sequences.replace("sequence", "prompt") if run.task == "generate" else sequences
    after = f"; {batch.new_tokens:,} new tokens after each" if run.task == "generate" else ""
    return [
        ("model", f"{model(answer)}: {size}"),
        ("task", "; ".join(_method(answer))),
        ("precision", "; ".join(_precision(answer))),
        ("batch", f"{prompts} of {_lengths(batch)}{_images(batch)}{after}"),
        *((("cache", "; ".join(_cache(run.generation))),) if run.task == "generate" else ()),
        *((("assistant", "; ".join(_assistant(run.generation))),) if run.generation.assisted else ()),
        ("attention", run.kernels.attention + ("; padded batches" if run.loop.padded else "")),
        *((("answered by", "a trace of the passes"),) if answer.via == "trace" else ()),
        *((("GPUs", ", ".join(_running_on(run.parallelism))),) if _several(run.parallelism) else ()),
        ("profile", run.profile),
    ]


def _several(p: Parallelism) -> bool:
    return p.tp > 1 or p.device_map is not None


def _running_on(p: Parallelism) -> Iterator[str]:
    """On how many GPUs a model runs, and how they divide it."""
    yield f"{p.world}"
    yield from _strategies(p)
    if p.device_map is not None:
        yield f"device_map {p.device_map}; this is GPU {p.stage or 0}"


def _choosing(generation: Generation) -> str:
    if generation.num_beams > 1:
        return f"{generation.num_beams:,} beams a prompt"
    return "sampled" if generation.do_sample else "greedy"


def _cache(generation: Generation) -> Iterator[str]:
    """What keeps keys and values."""
    yield generation.cache_implementation or "as the library has it"
    config = generation.cache_config
    if config is not None and config.backend == "fp8":
        yield "fp8, with a scale for a layer's keys and one for its values"
    elif config is not None:
        yield f"{config.nbits} bits by {config.backend} in groups of {config.q_group_size}"
        yield f"up to {config.residual_length} tokens as they are"
    if generation.prefill_chunk_size is not None:
        yield f"the prompt {generation.prefill_chunk_size:,} tokens at a time"


def _assistant(generation: Generation) -> Iterator[str]:
    """What proposes tokens, and how many in a round."""
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


def _strategies(parallelism: Parallelism) -> Iterator[str]:
    """How the GPUs share the run: what each has a part of, and how many do."""
    for name, degree in (("tensor", parallelism.tp), ("context", parallelism.cp), ("expert", parallelism.ep)):
        if degree > 1:
            yield f"{name} parallel over {degree}"
    if parallelism.strategy != "none":
        yield str(parallelism.strategy)


def _images(batch: Batch) -> str:
    """How many images each sequence has, and how large they are."""
    if not batch.images:
        return ""
    sides = batch.image_size if isinstance(batch.image_size, tuple) else (batch.image_size,) * 2
    size = f" of {sides[0]} x {sides[1]} pixels" if sides[0] else ""
    return f" with {batch.images:,} image{'s' if batch.images > 1 else ''}{size}"


def _loss(run: RunSpec) -> str:
    """Whose it is; of a model that is no causal language model, what it is trained for."""
    return str(run.kernels.loss) if run.objective in (None, "causal_lm") else f"of {run.objective}"


def _lengths(batch: Batch) -> str:
    tokens = f"{batch.sequence:,} tokens"
    return tokens if batch.target_sequence is None else f"{tokens}, and {batch.target_sequence:,} for the decoder"


def _held_outputs(loop: Loop) -> str:
    if loop.hold_outputs == "step":
        return "; outputs held to the step's end"
    return "; outputs held through backward" if loop.hold_outputs else ""


def _checkpointing(run: RunSpec) -> Iterator[str]:
    yield str(run.kernels.checkpointing)
    if _reenters(run.kernels):
        yield ", reentrant"
    if run.parallelism.offload.activations:
        yield "; what autograd saves is in host memory"


def _reenters(kernels: Kernels) -> bool:
    return bool(kernels.reentrant) and kernels.checkpointing != "none"


def _method(answer: Estimate) -> Iterator[str]:
    m = answer.run.method
    if answer.run.task == "train":
        yield m.kind
    else:
        yield answer.run.task
        yield "all logits" if answer.run.task == "forward" else _choosing(answer.run.generation)
        if m.kind != "full":
            yield f"adapters of {m.kind}"
    if m.kind == "freeze":
        yield f"the last {m.trainable_layers} layers train" if m.trainable_layers > 1 else "the last layer trains"
    elif m.kind != "full":
        targets = m.targets if isinstance(m.targets, str) else ", ".join(m.targets)
        yield f"rank {m.rank} on {targets}"
        yield f"adapters in {m.adapter_dtype}"
        if m.dropout:
            yield f"dropout {m.dropout:g}"
        if m.modules_to_save:
            yield f"{', '.join(m.modules_to_save)} train in full"
    if m.frozen:
        yield f"{', '.join(m.frozen)} frozen"
    q = m.quantization
    if q is not None:
        four = q.format in ("nf4", "fp4")
        blocks = "one block a column" if q.block_size < 0 else f"in blocks of {q.block_size}"
        yield q.format + (f" {blocks}" if _has_blocks(q) else "")
        if answer.asked.method.quantization is None:
            yield "as the checkpoint is stored"
        if four:
            yield "double quantisation" if q.double_quant else "no double quantisation"
        if answer.run.task != "train":
            return
        prepared = {True: "kbit preparation", False: "no kbit preparation", "trl": "kbit preparation as trl does it"}
        yield prepared[bool(q.kbit_preparation) if q.kbit_preparation != "trl" else "trl"]
        whole = [name for name in q.skip or () if name != "lm_head"]
        if whole:
            yield f"{', '.join(whole)} not quantised"


def _has_blocks(q: Quantization) -> bool:
    """Whether a format has blocks of weights whose size can be said."""
    whole = ("int8", "w8a8-int8", "torchao-int8", "quanto-int8", "fp8-tensor", "fp8-channel")
    return q.format not in (*whole, *get_args(GgufType))


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
