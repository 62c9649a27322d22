"""Draw runs, configs, pairs of runs, command lines and files at random: nothing may crash, hang or contradict itself.

    python -m benchmarks.fuzz 20000                     # cases of seed 0
    python -m benchmarks.fuzz 20000 --seed 7 --only runs,lines
    python -m benchmarks.fuzz 1 --seed 7 --start 4711   # one case again

Prints each distinct failure with the smallest case that still shows it, as a command; exits 1 if there is one. Works in
one process, without network and without traces, each of which takes a process and seconds. `tests/test_fuzz.py` runs a
few hundred cases in each run of the suite.

A case fails if it

    crashes   raises anything but a MemplanError
    message   is refused in other than one printable line of at most 1,000 characters that names a field
    hangs     takes more than 5 seconds of CPU
    memory    brings the process above 600 MB
    law       takes less memory for more sequences, tokens, layers or rank
    again     gives another answer for the run that the answer holds, or for the same run as JSON
    output    prints a control character, JSON that cannot be read, nothing, or ends with an unknown exit code

or breaks one of the laws of a single answer (`benchmarks/sweep.py`).
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import resource
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, NoReturn
from unittest.mock import patch

from benchmarks.random_cases import Value, copied, draw_config, draw_file, draw_law, draw_line, put, random_run
from benchmarks.sweep import CPU_SECONDS, Failure, laws
from memplan import Estimate, MemplanError, ModelSpec, RunSpec, estimate
from memplan.catalogue.profiles.engines import ENGINES
from memplan.cli.app import app
from memplan.cli.plain import run_plain
from memplan.core.errors import ProbeError
from memplan.probe.run.trace import Tracer
from memplan.spec.failures import line_of

MEGABYTES = 600
LONGEST_MESSAGE = 1000  # characters
SHRINKING_SECONDS = 20.0  # of CPU for the smallest case of one failure
UNEVEN = 2**21  # bytes that a serving engine's pool of blocks, and device_map's placement, may differ by


class HangError(BaseException):
    """Raised in a case that takes too long. No Exception, so that no handler in memplan catches it."""


class Kind(NamedTuple):
    """A kind of cases: how often it is drawn, how, its check, and the command that shows a case."""

    weight: float
    draw: Callable[[Random], Value]
    check: Callable[[Value], Iterable[Failure]]
    command: Callable[[Value], str]


def check_run(spec: Value) -> Iterator[Failure]:
    """Estimate a run and check its answer, the answer's own run, and the same run with other batches."""
    run = RunSpec.model_validate(spec)
    answer = estimate(run)
    yield from quick_laws(answer)
    random = Random(repr(spec))
    for _ in range(8):
        grown = {name: random.choice((0, 1, 1, 2, 7, 16, 64)) for name in ("micro", "sequence", "accumulation")}
        batch = run.batch.model_copy(update={name: getattr(run.batch, name) + n for name, n in grown.items()})
        with suppress(MemplanError):
            yield from quick_laws(estimate(run.model_copy(update={"batch": batch})))
    if random.random() < 0.15:
        yield from laws(answer)
        yield from check_json(answer)


def quick_laws(answer: Estimate) -> Iterator[Failure]:
    """Yield the laws that an answer breaks, of those that need neither ledger nor replay."""
    counts, adapts = answer.parameters, answer.run.method.kind not in ("full", "freeze")
    most = (counts.total, math.inf if adapts else counts.total, counts.total)  # adapters may be larger than the model
    if not all(type(count) is int and 0 <= count <= limit for count, limit in zip(counts, most, strict=True)):
        yield Failure("negative", "parameters", str(counts))
    peaks = [phase.peak for phase in answer.phases]
    if not all(type(peak) is int and peak >= 0 for peak in (*peaks, answer.host_bytes)):
        yield Failure("negative", "phases or host", f"{answer.phases} {answer.host_bytes}")
    elif max(peaks) != answer.bytes.allocated:
        yield Failure("sum", "peak", f"{peaks} {answer.bytes.allocated}")


def check_json(answer: Estimate) -> Iterator[Failure]:
    """Yield whether an answer's JSON is none, or its run another run or has another answer."""
    text = json.loads(answer.model_dump_json(), parse_constant=not_json)
    again = RunSpec.model_validate(text["run"])
    if again != answer.run or hash(again) != hash(answer.run):
        yield Failure("again", "run in JSON", f"{again} != {answer.run}")
    try:
        phases = estimate(again).phases
    except MemplanError as error:
        yield Failure("again", f"refused: {without_numbers(str(error))[:90]}", str(error))
    else:
        if phases != answer.phases:
            yield Failure("again", "answer", f"{phases} != {answer.phases}")


def not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} in JSON")


def spec_command(spec: Value) -> str:
    return f"memplan --spec - <<< {shlex.quote(json.dumps(spec))}"


def check_config(value: Value) -> Iterator[Failure]:
    """Read a config and count its axes; estimate its run if it has one."""
    if value.get("run") is not None:
        yield from check_run({**value["run"], "model": {"config": value["config"]}})
        return
    model = ModelSpec(value["config"])
    wrong = {name: size for name, size in model.axes().items() if type(size) is not int or size < 0}
    if wrong:
        yield Failure("negative", f"axes {','.join(wrong)}", str(wrong))
    _ = model.runs, model.longest_sequence, model.longest_target, model.num_labels, model.sliding_window


def config_command(value: Value) -> str:
    return spec_command({**(value.get("run") or {}), "model": {"config": value["config"]}})


def check_law(value: Value) -> Iterator[Failure]:
    """Compare a run with one that has more of something."""
    more = copied(value["run"])
    if value["field"] == "layers" and isinstance(more["model"], str):
        return
    answer = estimate(RunSpec.model_validate(value["run"]))
    if value["field"] == "layers":  # as many for every pipeline stage: fewer also even out what the first and last hold
        more["model"]["config"]["num_hidden_layers"] += value["more"] * answer.run.parallelism.pp
    part, _, name = value["field"].partition(".")
    if name:
        if isinstance(more.get(part), str):
            more[part] = {"kind": more[part]}
        put(
            more, value["field"], (getattr(getattr(answer.run, part), name) or 256) + value["more"]
        )  # 0 new tokens are 256
    yield from quick_laws(answer)
    if value["field"] == "batch.sequence" and answer.run.kernels.loss == "chunked":
        return  # torch's chunk: with a token more the last chunk may be shorter, and its loss is the largest moment
    less, most = answer.bytes.allocated, estimate(RunSpec.model_validate(more)).bytes.allocated
    is_uneven = answer.run.parallelism.device_map is not None or "serving" in value["run"].get("profile", "")
    is_uneven = is_uneven or answer.run.profile in {engine.name for engine in ENGINES}
    if most < less - UNEVEN * is_uneven:
        yield Failure("law", f"{value['field']} up, {answer.run.profile}", f"{less} > {most} with {value['more']} more")


def law_command(value: Value) -> str:
    return f"{spec_command(value['run'])}   # and with {value['more']} more of {value['field']}"


def check_line(value: Value) -> Iterator[Failure]:
    """Run a command line in a folder with the files, and check its output and exit code."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True) for _ in range(2))
    words, before = value["words"], Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        for name, text in value["files"].items():
            Path(folder, name).write_text(text, "utf-8", newline="")
        os.chdir(folder)
        try:
            with redirect_stdout(out), redirect_stderr(err), patch.object(Tracer, "answer", _untraced):
                code: Any = run_plain(words)
                code = app(words) if code is None else code
        except SystemExit as end:
            code = end.code
        finally:
            os.chdir(before)
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    yield from output_failures(words, code, *texts)


def _untraced(*_: object) -> NoReturn:
    raise ProbeError("probe: torch is not installed; what a probe needs: pip install 'memplan[probe]'")


def output_failures(words: Sequence[str], code: Any, out: str, err: str) -> Iterator[Failure]:
    """Yield what is wrong with a command's output."""
    if "contradicts itself" in err or "Traceback" in err:
        yield Failure("crashes", without_numbers(err.strip())[:160], err)
    if code not in (0, 1, 2, 3, 4):
        yield Failure("output", f"exit code {code}", err)
    lines = [line for line in err.splitlines() if line]
    if code in (2, 3):
        if len(lines) != 1 or not lines[0].startswith("memplan: ") or out:
            yield Failure("message", f"{len(lines)} lines and {len(out)} characters of output", err)
        yield from message_failures(lines[0] if lines else "")
        if lines and not NAMES_PLACE.match(lines[0]):
            yield Failure("message", f"names no place: {without_numbers(lines[0])[:60]}", lines[0])
    elif not out:
        yield Failure("output", "nothing", err)
    if re.search(r"[\x00\x1b\x07]", out):
        yield Failure("output", "control characters", repr(out[:200]))
    if code in (0, 1) and "--json" in words and words[0] != "profiles":
        try:
            json.loads(out, parse_constant=not_json)
        except ValueError as error:
            yield Failure("output", "no JSON", str(error))


# A field, a key or a line of a file before a colon, or a file, an option or a command.
NAMES_PLACE = re.compile(r"memplan: (.{1,500}?: |.*(--?\w|[Oo]ption|argument|command|MODEL|\.(json|yaml|py|sh)\b))")


def message_failures(line: str) -> Iterator[Failure]:
    """Yield what is wrong with the line of an error."""
    if not line.isprintable() or not line.strip():
        yield Failure("message", "not one printable line", repr(line)[:400])
    if len(line) > LONGEST_MESSAGE:
        yield Failure("message", f"longer than {LONGEST_MESSAGE} characters: {line[:50]}", line)


def line_command(value: Value) -> str:
    files = [
        f"printf %s {shlex.quote(text)} > {name}" if text.isprintable() else f"printf %b {_octal(text)} > {name}"
        for name, text in value["files"].items()
    ]
    return "; ".join((*files, f"memplan {shlex.join(value['words'])}"))


def _octal(text: str) -> str:
    inner = "".join(
        chr(b) if chr(b).isprintable() and b < 128 and b not in b"\\" else f"\\0{b:03o}" for b in text.encode()
    )
    return shlex.quote(inner)


KINDS: Mapping[str, Kind] = {
    "runs": Kind(0.3, random_run, check_run, spec_command),
    "configs": Kind(0.4, draw_config, check_config, config_command),
    "laws": Kind(0.1, draw_law, check_law, law_command),
    "lines": Kind(0.1, draw_line, check_line, line_command),
    "files": Kind(0.1, draw_file, check_line, line_command),
}


def without_numbers(text: str) -> str:
    return re.sub(r"[0-9]+(,[0-9]+)*", "N", text)


def peak_megabytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000


def failures_of(kind: str, value: Value, seconds: float = CPU_SECONDS) -> tuple[list[Failure], bool]:
    """Return how a case fails, and whether it was refused."""
    found: list[Failure] = []
    before = peak_megabytes()
    try:
        with time_limit(seconds):
            found += KINDS[kind].check(value)
        return found, False
    except HangError as error:
        found.append(Failure("hangs", place_of(error, "memplan/")))
    except MemplanError as error:
        if not error.field:
            found.append(Failure("message", f"no field: {without_numbers(str(error))[:70]}", str(error)))
        elif not str(error).isprintable():
            found.append(Failure("message", "not one printable line", repr(str(error))[:400]))
        try:
            found += message_failures(line_of(error))
        except Exception as inner:
            found.append(Failure("crashes", place_of(inner), repr(inner)[:400]))
    except Exception as error:
        found.append(Failure("crashes", place_of(error), repr(error)[:400]))
    finally:
        if before <= MEGABYTES < peak_megabytes():
            found.append(Failure("memory", f"above {MEGABYTES} MB", f"{before} to {peak_megabytes()} MB"))
    return found, True


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise HangError in the block once this process has used so much CPU."""

    def interrupt(*_: object) -> NoReturn:
        raise HangError

    previous = signal.signal(signal.SIGPROF, interrupt)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def place_of(error: BaseException, package: str = "") -> str:
    """Return the error and the innermost function that raised it, of a package if given."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if package in f.filename]
    frame = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {frame.filename.rpartition('memplan/')[2]} {frame.name}"


def smaller(value: Any) -> Iterator[Any]:
    """Yield values with one part left out or made shorter, the largest steps first."""
    if isinstance(value, dict):
        yield from ({k: v for k, v in value.items() if k != key} for key in value)
        yield from ({**value, key: less} for key, inner in value.items() for less in smaller(inner))
    elif isinstance(value, list):
        if len(value) > 3:
            yield from (value[: len(value) // 2], value[len(value) // 2 :])
        yield from (value[:i] + value[i + 1 :] for i in range(min(len(value), 40)))
        yield from (
            [*value[:i], less, *value[i + 1 :]] for i in range(min(len(value), 10)) for less in smaller(value[i])
        )
    elif isinstance(value, str) and len(value) > 3:
        yield from (value[: len(value) // 2], value[len(value) // 2 :])
        lines = value.splitlines(keepends=True)
        yield from ("".join(lines[:i] + lines[i + 1 :]) for i in range(len(lines) if 1 < len(lines) < 40 else 0))
    elif type(value) is int and value > 4:
        yield from (1, value // 2)


def shrunk(kind: str, value: Value, failure: Failure) -> Value:
    """Return the smallest case found that fails in the same way."""
    end = time.process_time() + SHRINKING_SECONDS
    is_smaller = failure.kind not in ("memory",)
    while is_smaller:
        is_smaller = False
        for less in smaller(value):
            if time.process_time() > end:
                return value
            with suppress(Exception):
                KINDS[kind].command(less)  # raises unless less is still a case
                if failure[:2] in [each[:2] for each in failures_of(kind, less)[0]]:
                    value, is_smaller = less, True
                    break
    return value


def cases(count: int, seed: int, start: int = 0, only: Iterable[str] = KINDS) -> Iterator[tuple[int, str, Value]]:
    """Yield the cases of a seed: each is drawn from the seed and its own index."""
    kinds = {name: KINDS[name].weight for name in only}
    for index in range(start, start + count):
        random = Random(f"{seed}:{index}")
        kind = random.choices(list(kinds), list(kinds.values()))[0]
        yield index, kind, KINDS[kind].draw(random)


def main(argv: Sequence[str] | None = None, show: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(description="Draw cases at random and look for failures.")
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--only", default=",".join(KINDS))
    given = parser.parse_args(argv)
    tried: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    found: Counter[tuple[str, str]] = Counter()
    slowest, begun = (0.0, ""), time.time()
    with suppress(KeyboardInterrupt):  # an interrupted run is summed up too
        for index, kind, value in cases(given.count, given.seed, given.start, given.only.split(",")):
            started = time.process_time()
            failures, is_refused = failures_of(kind, value)
            slowest = max(slowest, (time.process_time() - started, f"case {index} of {kind}"))
            tried[kind] += 1
            refused[kind] += is_refused
            for failure in failures:
                found[failure[:2]] += 1
                if found[failure[:2]] == 1:
                    command = KINDS[kind].command(shrunk(kind, value, failure))
                    shown = f"{failure.kind}: {failure.where} (case {index}): {failure.detail[:300]}"
                    show(f"{shown}\n    {command[:2000]}")
    for (kind, where), count in found.most_common():
        show(f"{count:6,} x {kind}: {where}")
    counts = ", ".join(f"{number:,} {kind} ({refused[kind]:,} refused)" for kind, number in tried.items())
    show(
        f"seed {given.seed}, {sum(tried.values()):,} cases from {given.start}: {counts}; "
        f"slowest {slowest[0]:.1f} s of CPU ({slowest[1]}); {peak_megabytes()} MB at most; "
        f"{time.time() - begun:.0f} s; {sum(found.values()):,} failures of {len(found)} kinds"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
