"""Compare inference calculators with memplan and with the real memory of ten models.

python -m benchmarks.parity                              # memplan, and the tools' recorded answers
PARITY=/path/to/venv python -m benchmarks.parity         # runs the tools in the venv, and records

    python -m venv /tmp/parity && /tmp/parity/bin/pip install hf-mem==0.5.6 vramscout==0.7.0 llmfit==1.1.17

The reference is measured in the same run, if torch and transformers are installed: the model that transformers builds
from the config, without data, and the cache that a pass over the prompt leaves. No network is used. Tools get the
cards' configs; llmfit has its own figures. Missing answers are listed with their reasons below the table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from memplan import RunSpec, estimate, find_gpu, load_card
from memplan.catalogue.inference.caches import bytes_of, caches
from memplan.core.errors import MemplanError
from memplan.planning.roofline import Load, decode
from memplan.program.stored.weights import stored_weights

RECORD = Path(__file__).with_suffix(".jsonl")
GIB = 2**30
PROMPT, NEW = 8000, 192  # tokens; together a context of 8,192
CONTEXT = PROMPT + NEW
CARD, PROFILE = "rtx-4090", "nvidia-rtx-4090"  # for the speeds; llmfit's name for it
TOOLS = ("hf-mem", "vramscout", "llmfit")
MODELS = {
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "mistral-7b-v0.3": "mistralai/Mistral-7B-Instruct-v0.3",
    "gemma-2-9b": "google/gemma-2-9b-it",
    "gemma-3-12b": "google/gemma-3-12b-it",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "gpt-oss-20b": "openai/gpt-oss-20b",
    "deepseek-v2-lite": "deepseek-ai/DeepSeek-V2-Lite-Chat",
    "qwen3-next-80b-a3b": "Qwen/Qwen3-Next-80B-A3B-Instruct",
    "llama-3.3-70b": "meta-llama/Llama-3.3-70B-Instruct",
}


class Said(NamedTuple):
    """A tool's answer for a model at the context length; None if missing, with the reason in `why`.

    Bytes are for 16-bit weights, tokens per second for one request in 4 bits on the card.
    """

    weights: int | None = None
    cache: int | None = None
    total: int | None = None
    low: float | None = None
    high: float | None = None
    why: str = ""


def memplan_(name: str) -> Said:
    """Weights and caches as stored; the total is for a run with vLLM sized for one request."""
    model = load_card(name)
    weights = sum(w.bytes for w in stored_weights(model, "none"))
    cache = bytes_of(caches(model), CONTEXT - 1)
    batch = {"sequence": PROMPT, "new_tokens": NEW}
    total, why = None, ""
    try:
        total = estimate(RunSpec(model=name, task="generate", profile="vllm-0.33", batch=batch)).bytes.used
    except MemplanError as error:
        why = str(error)
    try:
        low, high = decode(Load(model, "Q4_K_M"), find_gpu(CARD), PROMPT, NEW).tokens_per_second
    except MemplanError as error:
        return Said(weights, cache, total, why="; ".join(filter(None, (why, str(error)))))
    return Said(weights, cache, total, low, high, why)


# --- the reference ---------------------------------------------------------------------------------------------


def reference(name: str) -> Said:
    """Return the bytes of transformers' model built from the card's config, and of its cache."""
    if not (find_spec("torch") and find_spec("transformers")):
        return Said(why="torch and transformers are not installed here")
    torch, transformers = map(import_module, ("torch", "transformers"))
    config = _config(name)
    made = transformers.AutoConfig.for_model(
        config.pop("model_type"), **{k: v for k, v in config.items() if k != "auto_map"}
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    model.eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    for module in model.modules():  # routing depends on data, and experts cache nothing
        if hasattr(module, "experts"):
            module.forward = _with_scores if made.model_type == "gpt_oss" else _same
    with torch.no_grad():
        ids = torch.zeros(1, CONTEXT - 1, dtype=torch.long, device="meta")
        try:
            done = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        except Exception as error:  # a pass that needs data
            return Said(weights, why=f"no pass without data: {type(error).__name__}: {str(error).splitlines()[0]:.80}")
    left = done["cache"] if "cache" in done else done["past_key_values"]
    return Said(weights, sum(_held(layer) for layer in left.layers))


def _same(hidden_states: Any, *args: Any, **more: Any) -> Any:
    return hidden_states


def _with_scores(hidden_states: Any, *args: Any, **more: Any) -> Any:
    return hidden_states, None


def _held(layer: Any) -> int:
    """Return the bytes of all tensors in a layer's cache."""
    tensor = import_module("torch").Tensor
    found: list[Any] = list(vars(layer).values())
    tensors: list[Any] = []
    while found:
        one = found.pop()
        if isinstance(one, tensor):
            tensors.append(one)
        elif isinstance(one, (list, tuple)):
            found += one
        elif isinstance(one, dict):
            found += one.values()
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


# --- the tools ---------------------------------------------------------------------------------------------------

_HF_MEM = """
import json, sys
from hf_mem.safetensors.kv_cache import compute_safetensors_kv_cache_size
config, context = json.load(sys.stdin), int(sys.argv[1])
config = config.get("text_config", config)
print(json.dumps({"cache": compute_safetensors_kv_cache_size(config, "BF16", context)}))
"""
_VRAMSCOUT = """
import json, sys
from vramscout.modern_v07 import plan_modern
plan = plan_modern(sys.argv[1], context=int(sys.argv[2]), weight_dtype="bf16", vram_gib=1000, reserve_gib=0,
                   calibration="none")
parts = plan.parts_gib
weights = next(n for name, n in parts.items() if "weights" in name)
apart = ("weights", "CUDA", "scratch", "reserve")
cache = sum(n for name, n in parts.items() if not any(word in name for word in apart))
told = {"weights": weights, "cache": cache, "total": plan.total_gib}
print(json.dumps({k: round(n * 2**30) for k, n in told.items()}))
"""


def hf_mem(venv: Path, name: str) -> Said:
    config = json.dumps(_config(name))
    told = _asked([str(venv / "bin" / "python"), "-c", _HF_MEM, str(CONTEXT)], config)
    if isinstance(told, str):
        return Said(why=told)
    return Said(cache=told["cache"], why="weights are read from files on the Hub, and no total without them")


def vramscout(venv: Path, name: str) -> Said:
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder) / name
        there.mkdir()
        (there / "config.json").write_text(json.dumps(_config(name)), "utf-8")
        told = _asked([str(venv / "bin" / "python"), "-c", _VRAMSCOUT, str(there), str(CONTEXT)])
    return Said(why=told) if isinstance(told, str) else Said(told["weights"], told["cache"], told["total"])


def llmfit(venv: Path, name: str) -> Said:
    """Uses its own catalogue of models; weights are in GB of 10**9 bytes, caches in GiB."""
    command = [str(venv / "bin" / "llmfit"), "--profile", PROFILE, "--no-dashboard", "plan", MODELS[name]]
    command += ["--context", str(CONTEXT), "--json", "--quant"]
    told, four = _asked([*command, "BF16"]), _asked([*command, "Q4_K_M"])
    if isinstance(told, str):
        return Said(why=told)
    weights = round(told["disk_size_gb"] * 1e9)
    cache = next(round(a["kv_cache_gb"] * GIB) for a in told["kv_alternatives"] if a["kv_quant"] == "fp16")
    total = round(told["minimum"]["vram_gb"] * 1e9)
    path = {} if isinstance(four, str) else next(p for p in four["run_paths"] if p["path"] == "gpu")
    speed = path.get("estimated_tps") if path.get("feasible") else None
    return Said(weights, cache, total, speed, speed)


ASK: dict[str, Callable[[Path, str], Said]] = {"hf-mem": hf_mem, "vramscout": vramscout, "llmfit": llmfit}


def _config(name: str) -> dict[str, Any]:
    """Write the card's config to a file."""
    return json.loads(json.dumps(load_card(name).config))


def _asked(command: list[str], given: str = "") -> Any:
    """Return a command's JSON output, or the last line of its error."""
    home = {**os.environ, "HOME": tempfile.gettempdir(), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, env=home, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}"
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).strip().splitlines() if line.strip()]
        return lines[-1][:160] if lines else f"exit code {done.returncode}"
    return json.loads(done.stdout)


def asked(venv: Path) -> list[dict[str, Any]]:
    """Run every installed tool for every model."""
    rows: list[dict[str, Any]] = []
    for tool in TOOLS:
        version = _asked([str(venv / "bin" / "python"), "-c", _VERSION, tool])
        if not isinstance(version, dict):
            print(f"{tool}: not in {venv}: {version}", file=sys.stderr)
            continue
        rows += [{"tool": tool, **version, "model": name, **ASK[tool](venv, name)._asdict()} for name in MODELS]
    return rows


_VERSION = """
import json, sys
from importlib.metadata import version
print(json.dumps({"version": version(sys.argv[1])}))
"""


def recorded() -> list[dict[str, Any]]:
    if not RECORD.exists():
        return []
    return [json.loads(line) for line in RECORD.read_text("utf-8").splitlines()]


# --- the table ---------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> list[str]:
    names = [tool for tool in TOOLS if any(row["tool"] == tool for row in rows)]
    said = {(row["tool"], row["model"]): Said(**{field: row[field] for field in Said._fields}) for row in rows}
    measured = {name: reference(name) for name in MODELS}
    own = {name: memplan_(name) for name in MODELS}
    out: list[str] = []
    for title, of in (
        ("weights in 16 bits, GiB (times the reference)", lambda s: s.weights),
        (f"cache of {CONTEXT:,} tokens, GiB (times the reference)", lambda s: s.cache),
    ):
        out += ["", title, _row("model", ("reference", "memplan", *names))]
        for name in MODELS:
            truth = of(measured[name])
            cells = [of(own[name]), *(of(said[tool, name]) for tool in names)]
            out.append(_row(name, (_gib(truth), *(_ratio(n, truth) for n in cells))))
    out += ["", "all of it, GiB (times weights and cache of the reference)", _row("model", ("memplan", *names))]
    for name in MODELS:
        truth = measured[name]
        both = None if truth.weights is None or truth.cache is None else truth.weights + truth.cache
        cells = [own[name].total, *(said[tool, name].total for tool in names)]
        out.append(_row(name, [_ratio(n, both) for n in cells]))
    out += ["", f"tokens a second of one request, Q4_K_M on an {CARD}", _row("model", ("memplan", "llmfit"))]
    for name in MODELS:
        speeds = [own[name], said.get(("llmfit", name), Said())]
        out.append(_row(name, [_speed(s) for s in speeds]))
    out += ["", "why not"]
    reasons: dict[str, list[str]] = {}
    for who, name, s in (
        *(("reference", name, measured[name]) for name in MODELS),
        *(("memplan", name, own[name]) for name in MODELS),
        *((tool, name, said[tool, name]) for tool in names for name in MODELS),
    ):
        if s.why:
            reasons.setdefault(f"{who}: {s.why}", []).append(name)
    out += [
        f"  {why} ({', '.join(models) if len(models) < len(MODELS) else 'every model'})"
        for why, models in reasons.items()
    ]
    missing = [tool for tool in TOOLS if tool not in names]
    out += [f"  {', '.join(missing)}: never asked here"] if missing else []
    return out


def _row(name: str, cells: Any) -> str:
    return f"{name:20}" + "".join(f"{cell:>18}" for cell in cells)


def _gib(n: int | None) -> str:
    return "–" if n is None else f"{n / GIB:,.2f}"


def _ratio(n: int | None, truth: int | None) -> str:
    return _gib(n) if n is None or not truth else f"{_gib(n)} ({n / truth:.3f})"


def _speed(s: Said) -> str:
    if s.low is None or s.high is None:
        return "–"
    return f"{s.low:,.0f}" if s.low == s.high else f"{s.low:,.0f} to {s.high:,.0f}"


def main() -> None:
    venv = os.environ.get("PARITY")
    rows = asked(Path(venv)) if venv else recorded()
    if venv and rows:
        RECORD.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    versions = {row["tool"]: row["version"] for row in rows}
    print("; ".join(f"{tool} {version}" for tool, version in versions.items()), "asked now" if venv else "as recorded")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
