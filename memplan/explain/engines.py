"""Findings from the lines that serving engines and the host print."""

from __future__ import annotations

from memplan.core.units import gib
from memplan.estimate.answer import Estimate
from memplan.explain import forms
from memplan.explain.findings import (
    ASKED,
    CHANGE,
    EXPECTED,
    HELD,
    LIKELY,
    POSSIBLE,
    SURE,
    WHOSE,
    Explanation,
    MemoryRow,
)
from memplan.explain.message import Amount
from memplan.models.model import ModelSpec

# Field of a statement -> what it is.
_STATED = {
    "weights": "weights",
    "activations": "the largest forward pass's activations",
    "non_torch": "memory outside torch",
    "kv": "left for the KV cache",
    "available": "left for the KV cache",
    "tokens": "tokens of the KV cache",
    "peak": "the most torch allocated before",
    "max_len": "tokens that one request may have",
}


def statements(out: Explanation) -> None:
    for said in out.log.statements:
        for name, value in said.values.items():
            if name in _STATED and value != out.message.values.get(name):
                shown = value.text if isinstance(value, Amount) else f"{value:,}" if isinstance(value, int) else value
                out.find(HELD, f"{_STATED[name]}: {shown}", SURE, f"line {said.line}, as {said.form.library} prints it")


_NEAR = 5  # percent by which what an engine prints may differ from its estimate
_MICRO_BATCH = 512  # llama.cpp's --ubatch-size


# Fields of an engine's lines, in the order in which it fills its card, and those of an answer's `serving`.
_FILLED = (("weights", "weights"), ("activations", "activations"), ("available", "pool"), ("kv", "pool"))


def compare_statements(out: Explanation, answer: Estimate) -> None:
    """Put what an engine printed next to its estimate, and name the first that parts from it."""
    serving = answer.serving
    if serving is None:
        return
    said: dict[str, Amount] = {}
    for message in (*out.log.statements, out.message):
        said |= {name: value for name, value in message.values.items() if isinstance(value, Amount)}
    parts = ""
    for name, key in _FILLED:
        if name not in said or key not in serving:
            continue
        measured, predicted = said[name].bytes, int(serving[key])
        out.rows.append(MemoryRow(_STATED[name], measured, predicted))
        if not parts and abs(measured - predicted) * 100 > _NEAR * max(measured, predicted, 1):
            parts = _STATED[name]
            text = f"the log and the estimate part at {parts}: {said[name].text}, predicted {gib(predicted)}"
            out.find(HELD, text, LIKELY, "the first of what the engine prints that differs by more than 5 %")


def buffers(out: Explanation, model: ModelSpec, answer: Estimate | None) -> None:
    """Name the buffer of llama.cpp that did not fit: it makes one for weights, one for the cache and one to compute.

    Source: llama.cpp b9000 src/llama-context.cpp graph_reserve, ggml/src/ggml-backend.cpp: weights of the host that
    the card multiplies with are copied into the buffer to compute.
    """
    request = out.message.amount("request")
    if request is None:
        return
    axes, serving = model.axes(), answer.serving if answer else None
    logits, output = _MICRO_BATCH * axes["v"] * 4, axes["v"] * axes["h"] * 2
    known = [
        ("the buffer to compute: logits of 512 tokens in fp32", logits),
        (
            "the buffer to compute: logits of 512 tokens in fp32, and a copy of the output matrix in 16 bits",
            logits + output,
        ),
    ]
    for what, key in (("the weights", "weights"), ("the KV cache", "pool"), ("the buffer to compute", "activations")):
        if serving is not None and serving.get(key):
            known.insert(0, (what, int(serving[key])))
    near = sorted((abs(bytes_ - request.bytes), what, bytes_) for what, bytes_ in known)
    for off, what, bytes_ in near[:1]:
        if off * 100 <= _NEAR * request.bytes:
            out.find(ASKED, f"{request.text} is near {what}: {gib(bytes_)}", POSSIBLE, f"within {_NEAR} %")
            return
    out.find(
        ASKED,
        f"{request.text} is none of the buffers that memplan knows of {model.name}",
        POSSIBLE,
        "a buffer of llama.cpp",
    )


def budget(out: Explanation) -> None:
    values = out.message.values
    free, total, desired = (out.message.amount(name) for name in ("free", "total", "desired"))
    if free is not None and total is not None and total.bytes:
        hundredths = free.bytes * 100 // total.bytes
        held = gib(max(total.bytes - free.bytes, 0))
        wanted = f" of the {desired.text} it wants" if desired else ""
        out.find(ASKED, f"the engine's share: {gib(free.bytes)} are free{wanted}", SURE, "the message's own numbers")
        out.find(
            WHOSE,
            f"{held} were in use before the engine started: other processes, or its own last run",
            SURE,
            "total minus free",
        )
        out.find(
            CHANGE,
            f"end the other processes, or --gpu-memory-utilization {hundredths / 100:.2f}",
            SURE,
            "free over total, rounded down",
        )
    needed, available = out.message.amount("needed"), out.message.amount("available")
    longest = values.get("possible_len", values.get("tokens"))
    if needed is not None:
        left = f", and {available.text} are left" if available else ""
        out.find(ASKED, f"a KV cache of {needed.text} for one request{left}", SURE, "the message's own numbers")
    if isinstance(longest, int):
        out.find(CHANGE, f"--max-model-len {longest}", SURE, "the longest request that the cache holds, by the message")
    elif out.message.form.library == "vLLM" and free is None:
        text = "a larger --gpu-memory-utilization, a shorter --max-model-len, or a smaller --max-num-batched-tokens"
        out.find(CHANGE, text, LIKELY, "weights and activations leave no room for the cache")
    if out.message.form.library == "SGLang":
        text = "a larger --mem-fraction-static: it is the share that weights and cache have together"
        if "requested_tokens" in values:
            text = "fewer or shorter requests (--max-running-requests), or a larger --mem-fraction-static"
        out.find(CHANGE, text, LIKELY, out.message.form.source)


def host(out: Explanation) -> None:
    message = out.message
    request = message.amount("request")
    asked = f": {request.text}" if request else ""
    if message.form.cause == forms.KILLED:
        text = "the operating system ended the process (SIGKILL), usually because host memory was used up"
        out.find(ASKED, text, LIKELY, f"{message.form.library}: {message.form.source}")
    else:
        out.find(ASKED, f"host memory, not the GPU's{asked}", SURE, f"{message.form.library}: {message.form.source}")
    if out.answer is not None:
        host = out.answer.host
        text = f"{gib(host.peak.node)} on a node in {host.peak.phase} ({host.ranks} processes)"
        out.find(EXPECTED, f"the run takes {text} of host memory", LIKELY, "the estimate's host memory")
