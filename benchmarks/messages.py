"""Out-of-memory messages of every form, and mutations of them: `python -m benchmarks.messages [COUNT] [--seed N]`.

A mutated log must never end in a traceback, and no number may be read that is not in it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from random import Random

from memplan.explain.forms import FIELDS, FORMS, STATEMENTS
from memplan.explain.message import Amount, Log, clean, read_log

_EXAMPLES = {"number": "3", "tokens": "23,648", "share": "0.9", "shape": "[246534, 1280]", "plain bytes": "2629828608"}
_EXAMPLES["negative bytes"] = "-1.05 GiB"
TORCH = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 9.47 GiB. GPU 0 has a total capacity of 14.75 GiB "
    "of which 3.78 GiB is free. Process 2670 has 1.02 GiB memory in use. Including non-PyTorch memory, this process "
    "has 9.95 GiB memory in use. Of the allocated memory 9.20 GiB is allocated by PyTorch, with 12.00 MiB allocated in "
    "private pools (e.g., CUDA Graphs), and 623.81 MiB is reserved by PyTorch but unallocated. If reserved but "
    "unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
BEFORE_2_1 = (
    "RuntimeError: CUDA out of memory. Tried to allocate 376.00 MiB (GPU 1; 3.95 GiB total capacity; 1.72 GiB already "
    "allocated; 354.88 MiB free; 2.46 GiB reserved in total by PyTorch) If reserved memory is >> allocated memory try"
)
TRACEBACK = """Traceback (most recent call last):
  File "/usr/lib/python3.12/site-packages/transformers/trainer.py", line 2052, in training_step
    loss = self.compute_loss(model, inputs)
           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  File "/usr/lib/python3.12/site-packages/accelerate/utils/operations.py", line 781, in _convert_to_fp32
    return tensor.float()
           ^^^^^^^^^^^^^^
"""


def example(part: str, amount: str = "1.25 GiB") -> str:
    """Return a part of a form with a number in each field."""

    def value(match: re.Match[str]) -> str:
        if match[0] in ("<*>", "<line end>"):
            return "CUDA0" if match[0] == "<*>" else ""
        return _EXAMPLES.get(FIELDS[match[0][1:-1]], amount)

    return re.sub(r"<\*>|<line end>|<\w+>", value, part)


def samples() -> list[str]:
    """Return a log for every form, and torch's messages in full."""
    rows = ["ERROR " + " ".join(map(example, (form.start, *form.details))) + "\n" for form in FORMS]
    return [TRACEBACK + TORCH + "\n", BEFORE_2_1 + "\n", *rows, *(example(form.start) + " \n" for form in STATEMENTS)]


_NOISE = (
    *("\x1b[31m", "\x1b[0m", "\r 42%|####      | 5/12 [00:13<00:01,  4.50it/s]\r", "\n", "\x00", "│ ", "[rank1]: "),
    *("9", ".", "GiB", " MiB ", "\ud800", "e308", "-", ",", "CUDA out of memory. Tried to allocate "),
    "Traceback (most recent call last):\n",
)


def mutated(random: Random, text: str) -> str:
    """Return a log after a few cuts, insertions, repetitions and exchanges."""
    for _ in range(random.randint(1, 4)):
        start, end = sorted(random.randint(0, len(text)) for _ in range(2))
        match random.randrange(6):
            case 0:
                text = text[:start]
            case 1:
                text = text[:start] + text[min(end, start + 9) :]
            case 2:
                text = text[:start] + random.choice(_NOISE) + text[start:]
            case 3:
                text = text[:end] + text[start:]
            case 4:
                text = text[:start] + random.choice("0123456789.,GMKiB ()[]") + text[start + 1 :]
            case _:
                lines = text.splitlines(keepends=True)
                random.shuffle(lines)
                text = "".join(lines)
        text = text[:20_000]
    return text


def numbers(log: Log) -> Iterator[str]:
    """Yield the text of every number that was read of a log."""
    for message in (*log.messages, *log.statements):
        for value in message.values.values():
            yield (
                value.text.split()[0].rstrip("bytesBkKMGTi")
                if isinstance(value, Amount)
                else f"{value:g}"
                if isinstance(value, float)
                else str(value)
            )
        for process in message.processes:
            yield str(process.pid)
            yield process.in_use.text.split()[0].rstrip("bytesBkKMGTi")


def invented(log: Log, text: str) -> list[str]:
    """Return the numbers that were read though they are not in the log."""
    plain = clean(text)
    joined = plain + plain.replace(",", "")
    return [number for number in numbers(log) if number not in joined]


def main(count: int = 100_000, seed: int = 1) -> int:
    random, logs = Random(seed), samples()
    for number in range(count):
        text = mutated(random, random.choice(logs))
        try:
            wrong = invented(read_log(text), text)
        except Exception as error:
            print(f"{number}: {error!r} for {text!r}")
            return 1
        if wrong:
            print(f"{number}: {wrong} is not in {text!r}")
            return 1
    print(f"{count:,} mutated logs of {len(logs)} forms: no traceback, no invented number")
    return 0


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word.isdecimal()]
    sys.exit(main(*map(int, words)))
