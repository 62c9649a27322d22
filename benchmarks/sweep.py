"""Estimate every bundled model with every set of options, and check each answer against laws that hold for all.

    python -m benchmarks.sweep                          # everything: hours of CPU
    python -m benchmarks.sweep --share 64 --seed 3      # one pair of model and options in 64
    python -m benchmarks.sweep --models gemma-3-4b --options "--fsdp"

Prints each distinct failure with the command that shows it and how many pairs share it, then the totals; exits 1 if
anything failed. `tests/estimate/test_every_model.py` tests a sample in each run of the suite.

An answer fails if it

    crashes   raises anything but a refusal: a MemplanError of one printable line that is no InternalError
    negative  has a phase or line with bytes that are no integer or below zero, or a line that counts nothing
    sum       has a ledger or categories that do not sum to `allocated`, or a peak that is not the largest phase
    order     does not keep allocated <= reserved <= used, and used within its band
    sharded   takes more on each of several GPUs than on one, by more than its named buffers
    apart     takes under FSDP2 less than half of what it takes under FSDP1, or more than twice
    slow      takes more than 5 seconds of CPU
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Any, NamedTuple

from memplan import Estimate, MemplanError, RunSpec, estimate
from memplan.catalogue.profiles.engines import ENGINES
from memplan.catalogue.profiles.profiles import PROFILES
from memplan.cli.compare import command_of_run
from memplan.cli.runs import runs_of
from memplan.core.errors import InternalError
from memplan.models.cards import card_names, load_card
from tests.encoders import SMALL
from tests.tiny import TINY as DECODERS
from tests.tiny_vision import TINY as TOWERS

CPU_SECONDS = 5.0
DEFAULT_SEQUENCE = 2048
GPU = "a100-sxm-80gb"

METHODS = ("full", "freeze", "lora", "qlora", "dora", "qdora")
_KERNELS = (
    "--attention eager --no-gradient-checkpointing",
    "--attention sdpa_math --no-gradient-checkpointing --padded",
    "--attention flash_attention_2 --padded",
    "--attention sdpa_efficient --reentrant",
    "--loss chunked --hold-outputs",
    "--loss fused --fused rope,rms_norm,swiglu",
    "--loss chunked_lm_head --optimizer adafactor",
    "--precision amp --trainer",
    "--precision mixed --optimizer adamw_torch",
    "--dtype fp16 --optimizer adamw_bnb_8bit",
    "--dtype fp32 --batch-size 3 --seq-len 100",
    "--grad-accum 3 --optimizer muon",
    "--in-backward --optimizer sgd",
    "--checkpointing offload",
    "--offload optimizer",
    "--offload activations --no-gradient-checkpointing",
    "--method lora --precision amp --padded",
    "--method lora --targets q_proj,v_proj --modules-to-save lm_head",
    "--method lora --reentrant --lora-dropout 0.1 --batch-size 2",
    "--method qlora --fused lora",
    "--method qlora --quant-format int8 --kbit-preparation false",
    "--method qlora --kbit-preparation trl --grad-accum 2",
    "--images 1 --method lora --batch-size 2",
    "--images 1 --frozen vision --no-gradient-checkpointing",
    "--objective sequence_classification --padded",
)
_SIDE_TASKS = (
    "--eval-batch-size 2 --eval-keep-logits 3",
    "--method lora --save --merge trained",
    "--method qlora --merge reloaded --eval-generate 8",
)
_PROFILES = tuple(
    f"--profile {profile.name} --method {method}{padded}"
    for profile in PROFILES
    for method, padded in (("full", ""), ("lora", " --padded"), ("qlora", ""))
)
SHARDINGS = ("--fsdp full_shard", "--fsdp fsdp2", "--zero 1", "--zero 2", "--zero 3", "--zero 0")
_SHARDED = (
    *(f"--gpus {n} {how} --method {m}" for how in SHARDINGS for n, m in ((2, "full"), (4, "lora"))),
    *(f"--gpus 8 {how} --precision amp --trainer --grad-accum 2" for how in SHARDINGS),
    "--gpus 4 --fsdp fsdp2 --method lora --trainer",
    "--gpus 2 --fsdp fsdp2 --method qlora --quant-storage bf16",
    "--gpus 2 --fsdp full_shard --method qlora --quant-storage bf16",
    "--gpus 4 --fsdp fsdp2 --no-gradient-checkpointing --images 1",
    "--gpus 4 --fsdp fsdp2 --offload parameters",
    "--gpus 4 --zero 3 --offload parameters",
    "--gpus 4 --fsdp shard_grad_op",
)
_DIVIDED = (
    "--gpus 2 --tp 2",
    "--gpus 4 --tp 2 --fsdp fsdp2 --precision amp",
    "--gpus 2 --cp 2 --fsdp fsdp2 --seq-len 4096",
    "--gpus 2 --ep 2 --fsdp fsdp2",
    "--gpus 2 --pp 2",
    "--gpus 2 --pp 2 --profile megatron-core --grad-accum 4 --seq-len 512",
    "--gpus 4 --pp 2 --tp 2 --profile megatron-core --grad-accum 4 --sequence-parallel",
    "--gpus 2 --pp 2 --profile torchtitan --grad-accum 4",
    "--gpus 4 --pp 2 --virtual-stages 2 --grad-accum 4 --profile torchtitan",
    "--gpus 2 --pp 2 --schedule gpipe --grad-accum 2 --method lora",
    "--gpus 2 --pp 2 --schedule device_map --method lora",
)
_INFERENCE = (
    "--method forward --batch-size 2",
    "--method forward --padded --attention eager",
    "--method generate",
    "--method generate --batch-size 4 --padded --num-beams 3",
    "--method generate --dtype fp32 --do-sample --attention eager",
    "--method generate --cache-implementation static",
    "--method generate --cache-implementation quantized",
    "--method generate --cache-implementation offloaded --prefill-chunk-size 512",
    "--method generate --prompt-lookup-num-tokens 3",
    "--method generate --quant-format nf4",
    "--method generate --quant-format awq-int4",
    "--method generate --quant-format fp8",
    "--method generate --images 1",
    "--method generate --gpus 2 --tp 2",
    "--method generate --gpus 2 --device-map auto",
    "--method generate --profile transformers-4.48",
    "--method generate --profile litgpt-2024",
    "--method forward --gpus 4 --fsdp fsdp2",
)
_SERVING = (
    *(f"--method generate --profile {engine.name} --gpu {GPU}" for engine in ENGINES),
    *(f"--method generate --profile {engine.name} --gpu {GPU} --gpus 2 --tp 2" for engine in ENGINES[:-1]),
    f"--method generate --profile llama.cpp --gpu {GPU} --gpus 2 --stored Q4_K_M",
    f"--method generate --profile vllm --gpu {GPU} --stored fp8 --cache-dtype fp8 --lora-slots 2",
    f"--method generate --profile vllm --gpu {GPU} --stored w4a16 --max-model-len 4096 --speculative-method ngram",
    f"--method generate --profile sglang --gpu {GPU} --max-model-len 4096 --gpus 2 --dp-attention",
)
OPTIONS: tuple[str, ...] = tuple(
    dict.fromkeys(
        (
            *(f"--method {method}" for method in METHODS),
            *(f"--method {method} --gpu {GPU} --seq-len 512" for method in ("full", "lora", "qlora")),
            *_KERNELS,
            *_SIDE_TASKS,
            *_PROFILES,
            *_SHARDED,
            *_DIVIDED,
            *_INFERENCE,
            *_SERVING,
        )
    )
)

# Small configs of families without a bundled card.
FAMILIES: Mapping[str, Mapping[str, Any]] = {**DECODERS, **TOWERS, **SMALL}


class Failure(NamedTuple):
    """A broken law: one word of the list above, where it shows, and the details."""

    kind: str
    where: str
    detail: str = ""


class Asked(NamedTuple):
    """The result of a model with a set of options: failures, the reason for a refusal, and CPU seconds."""

    model: str
    options: str
    failures: tuple[Failure, ...]
    refused: str
    seconds: float


@cache
def models() -> tuple[str, ...]:
    """Return every bundled card, then every family without one, by its model_type."""
    names = tuple(card_names())
    carded = {load_card(name).config["model_type"] for name in names}
    return (*names, *(f"{name} (small)" for name in FAMILIES if name not in carded))


def run_of(model: str, options: str) -> RunSpec:
    """Return the run of the command line `MODEL OPTIONS`. Raises the errors the command would report."""
    small, _, is_small = model.partition(" ")
    named: Any = {"config": {"model_type": small, **FAMILIES[small]}} if is_small else model
    given = command_of_run().given(["x", *options.split()]) or {}
    return runs_of({**given, "model": named})[0]


def ask(model: str, options: str) -> Asked:
    """Answer one pair and check the answer against every law."""
    started = time.process_time()
    failures: list[Failure] = []
    refused = ""
    try:
        run = run_of(model, options)
        answer = estimate(run)
        failures += laws(answer)
        failures += _laws_between_runs(run, answer)
    except MemplanError as error:
        refused = str(error)
        if isinstance(error, InternalError):
            failures.append(Failure("crashes", "InternalError", refused))
        if not refused.isprintable():
            failures.append(Failure("crashes", "message is not one printable line", repr(refused)))
    except Exception as error:  # crashes are what this looks for
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__} in {frame.filename.rpartition('memplan/')[2]} {frame.name}"
        failures.append(Failure("crashes", place, f"{error!r} at line {frame.lineno}"))
    seconds = time.process_time() - started
    if seconds > CPU_SECONDS:
        failures.append(Failure("slow", f"over {CPU_SECONDS:.0f} s for {model}", f"{seconds:.1f} s"))
    return Asked(model, options, tuple(failures), refused, seconds)


def laws(answer: Estimate) -> Iterator[Failure]:
    """Yield the laws that an answer breaks by itself."""
    for phase in answer.phases:
        if type(phase.peak) is not int or phase.peak < 0:
            yield Failure("negative", f"phase {phase.phase}", str(phase))
    for line in answer.ledger:
        if type(line.bytes) is not int or line.bytes < 0 or line.count < 1:
            yield Failure("negative", "ledger", f"{line.what}: {line.count} x, {line.bytes} bytes")
            break
    allocated = answer.bytes.allocated
    if sum(line.bytes for line in answer.ledger) != allocated:
        yield Failure("sum", "ledger", f"{sum(line.bytes for line in answer.ledger)} != {allocated}")
    if sum(answer.categories.values()) != allocated:
        yield Failure("sum", "categories", f"{sum(answer.categories.values())} != {allocated}")
    if max(phase.peak for phase in answer.phases) != allocated:
        yield Failure("sum", "peak", f"{answer.phases} != {allocated}")
    bytes_, band = answer.bytes, answer.band
    if not allocated <= bytes_.reserved <= bytes_.used:
        yield Failure("order", "allocated <= reserved <= used", str(bytes_))
    if not 0 <= band.low <= bytes_.used <= band.high:
        yield Failure("order", "used within the band", f"{bytes_} {band}")


# Lines that several GPUs add: gathered, flattened, padded, sent and received tensors, and buckets.
_BUFFERS = re.compile(r"gather|reduce|bucket|padded|partition|receiv|sent|norms|parts|whole|broadcast|divided")


def _laws_between_runs(run: RunSpec, answer: Estimate) -> Iterator[Failure]:
    """Yield the laws that an answer breaks compared with the same run on one GPU and under FSDP1."""
    p = run.parallelism
    if p.strategy == "none" or p.dp != p.world or p.world == 1 or p.offload.parameters:
        return
    alone = _answer(run.model_copy(update={"parallelism": type(p)()}))
    buffers = sum(line.bytes for line in answer.ledger if _BUFFERS.search(line.what))
    # A checkpoint in fp8 may train as stored on one GPU, and in 16 bits where several divide the states.
    if alone is not None and alone.run.method.quantization == answer.run.method.quantization:
        one, each = alone.bytes.allocated, answer.bytes.allocated
        if each > one + buffers:
            yield Failure("sharded", p.strategy, f"{each} on each GPU, {one} on one: {each - one - buffers} too many")
    if p.strategy == "fsdp2" and not run.loop.trainer:  # a Trainer does not wrap models with adapters by block
        flat = _answer(run.model_copy(update={"parallelism": p.model_copy(update={"strategy": "fsdp"})}))
        if flat is not None and not flat.bytes.allocated / 2 <= answer.bytes.allocated <= flat.bytes.allocated * 2:
            yield Failure("apart", "fsdp2 and full_shard", f"{answer.bytes.allocated} and {flat.bytes.allocated}")


def _answer(run: RunSpec) -> Estimate | None:
    try:
        return estimate(run)
    except MemplanError:
        return None


def pairs(share: int = 1, seed: int | str = 0, wanted: Sequence[str] = (), options: str = "") -> list[tuple[str, str]]:
    """Return one in `share` of all pairs of a model and a set of options; each seed draws others.

    Only models in `wanted`, if given, and sets of options that contain `options`.
    """
    chosen = [(m, o) for m in models() if not wanted or m in wanted for o in OPTIONS if options in o]
    drawn = random.Random(seed)
    return drawn.sample(chosen, -(-len(chosen) // share))


def _asked(pair: tuple[str, str]) -> Asked:
    return ask(*pair)


def main(argv: Sequence[str] | None = None, show: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(description="Ask every bundled model with every set of options.")
    parser.add_argument("--share", type=int, default=1, help="ask one pair in this many")
    parser.add_argument("--seed", type=int, default=0, help="which of them")
    parser.add_argument("--models", nargs="*", default=(), help="only these models")
    parser.add_argument("--options", default="", help="only options that contain this")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args(argv)
    todo = sorted(pairs(given.share, given.seed, given.models, given.options))  # by model: cached structures
    found: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], tuple[Asked, Failure]] = {}
    refusals, slowest, count = 0, Asked("", "", (), "", 0.0), 0
    with ProcessPoolExecutor(given.processes) as pool:
        for asked in pool.map(_asked, todo, chunksize=16):
            count += 1
            refusals += bool(asked.refused)
            slowest = max(slowest, asked, key=lambda a: a.seconds)
            for failure in asked.failures:
                key = failure[:2]
                found[key] += 1
                if key not in first:
                    first[key] = asked, failure
                    show(f"{failure.kind}: {failure.where}: memplan {asked.model} {asked.options}: {failure.detail}")
    for (kind, where), n in found.most_common():
        asked, _ = first[kind, where]
        show(f"{n:6,} x {kind}: {where}, as in memplan {asked.model} {asked.options}")
    show(
        f"{count:,} pairs of {len(models())} models and {len(OPTIONS)} sets of options: {count - refusals:,} answered, "
        f"{refusals:,} refused, {sum(found.values()):,} failures of {len(found)} kinds; slowest {slowest.seconds:.1f} "
        f"s of CPU ({slowest.model} {slowest.options})"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
