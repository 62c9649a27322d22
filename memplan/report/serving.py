"""Report of a serving engine: its KV-cache pool, how many requests that holds, and the assumptions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from memplan.core.units import gib
from memplan.estimate.answer import Estimate
from memplan.program.stored.weights import UNQUANTISED
from memplan.report import wording as words
from memplan.spec.serving import Serving


def pool(answer: Estimate) -> list[tuple[str, str]]:
    """Return the pool and what it holds, as pairs of a name and a text; empty without a serving engine."""
    s = answer.serving
    if s is None:
        return []
    each = f"requests of {s['context']:,} tokens"
    requested = answer.run.batch.micro
    rows = [("pool", f"{gib(s['pool'])}: {_size(s)}")]
    if answer.gpu is None:
        return [("pool", f"{gib(s['needed'])} for {requested:,} of the {each} at once")]
    needs = "needs" if requested == 1 else "need"
    rows.append(
        ("holds", f"{s['concurrency']:,.2f} {each} at once; the run's {requested:,} {needs} {gib(s['needed'])}")
    )
    if s["concurrency"] and s["max_model_len"] != s["context"]:
        rows.append(("longest", f"{s['longest_concurrency']:,.2f} requests of {s['max_model_len']:,} tokens"))
    return rows


def _size(s: Any) -> str:
    blocks = f", {s['blocks']:,} blocks of {s['block_size']} at {s['block_bytes']:,} bytes" if _blocks(s) else ""
    return f"{s['tokens']:,} tokens in {s['cache_dtype']}{blocks}"


def _blocks(s: Any) -> bool:
    return s["blocks"] != s["tokens"]


def assumptions(answer: Estimate) -> list[tuple[str, str]]:
    """Return the assumptions of the estimate, as pairs of a name and a text."""
    run, total, active = answer.run, answer.parameters.total, answer.parameters.active
    size = f"{words.count(total)} parameters" + (f", {words.count(active)} active" if active != total else "")
    s, settings = answer.serving or {}, run.serving
    q = run.method.quantization
    stored = settings.weights or (q.format if q is not None else "")
    if stored.lower() == UNQUANTISED:
        stored = ""
    text = [
        ("model", f"{words.model(answer)}: {size}"),
        ("engine", f"{run.profile}, {', '.join(_engine(answer))}"),
        ("weights", f"stored in {stored}, else {run.precision.weights}" if stored else str(run.precision.weights)),
        ("requests", f"{run.batch.micro:,} of {s.get('context', 0):,} tokens at once"),
        ("steps", f"at most {settings.max_num_batched_tokens:,} tokens of {_requests(settings.max_num_seqs)}"),
    ]
    if settings.speculative_method:
        text.append(("speculation", _speculation(settings)))
    if settings.lora_slots:
        text.append(("adapters", f"{settings.lora_slots} slots of rank {settings.lora_rank}"))
    if run.parallelism.world > 1:
        text.append(("GPUs", ", ".join([f"{run.parallelism.world:,}", *divisions(answer)])))
    return text


def _speculation(s: Serving) -> str:
    """Return what proposes tokens, and how many."""
    draft = s.draft_model if isinstance(s.draft_model, str) else ""
    method = f"{s.speculative_method}{f' {draft}' if draft else ''}"
    return f"{method}, {s.num_speculative_tokens:,} tokens a step"


def divisions(answer: Estimate) -> Iterator[str]:
    """Yield how an engine's GPUs divide the model."""
    p, s = answer.run.parallelism, answer.run.serving
    if answer.run.profile.startswith("llama.cpp"):
        split = f" in proportions {' : '.join(f'{part:g}' for part in s.tensor_split)}" if s.tensor_split else ""
        yield "all on one GPU" if s.split_mode == "none" else f"layers split over the GPUs{split}"
        return
    is_dp_attention = s.dp_attention or ((answer.serving or {}).get("sharing", 1) > 1)
    if p.tp > 1:
        yield f"{'attention ' if is_dp_attention else ''}tensor parallel over {p.tp}"
    if p.pp > 1:
        yield f"a pipeline of {p.pp} stages"
    if p.dp > 1:
        yield f"attention data parallel over {p.dp}" if is_dp_attention else f"{p.dp} replicas"
    if p.ep > 1:
        yield f"experts divided among {p.ep}"


def _requests(n: int | None) -> str:
    return "1 request" if n == 1 else f"{n:,} requests"


def _engine(answer: Estimate) -> Iterator[str]:
    settings = answer.run.serving
    if answer.run.profile.startswith("llama.cpp"):
        yield f"{settings.gpu_layers} layers on the card"
        for pattern, _, buffer in (text.rpartition("=") for text in settings.override_tensor or ()):
            yield f"{pattern} on {buffer}"
        if settings.n_cpu_moe:
            yield f"experts of the first {settings.n_cpu_moe} layers on the host"
        yield "flash attention" if settings.flash_attention else "scores written out"
        return
    yield f"{settings.memory_utilization:.3g} of the card"
    yield "CUDA graphs" if settings.cuda_graphs else "no CUDA graphs"
    yield "prefix caching" if settings.prefix_caching else "no prefix caching"
