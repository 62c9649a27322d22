"""Set and remove flags of the command in a shell script that trains; every other line stays as it is."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence

from memplan.core.errors import SpecError
from memplan.frameworks.change_table import Value
from memplan.frameworks.reading.shell import Launched

_WORD = r"""(?:"(?:\\.|[^"\\])*"|'[^']*'|\$\{[^}]*\}|\\.|[^\s"'\\])+"""
_TOKEN = re.compile(rf"(?:[ \t]|\\\r?\n)*({_WORD})")
_ENDS = ("&&", "||", "|", ";", "&", "#", "--")


def edited_script(text: str, command: Launched, edits: Mapping[str, Value], exports: Sequence[str] = ()) -> str:
    """Return the script with flags of its command set to values, or removed if the value is None.

    exports  lines to put above the command

    Raises SpecError for a value that the program's command line cannot take.
    """
    lines = text.splitlines(keepends=True)
    start = sum(map(len, lines[: command.line - 1]))
    for name, value in edits.items():
        text = _edited(text, start, command, name, value)
    indent = re.match(r"[ \t]*", text[start:])
    above = "".join(f"{indent[0] if indent else ''}{line}\n" for line in exports)
    return text[:start] + above + text[start:]


# Where a command or the script around it says how many processes a node has.
_PROCESSES = re.compile(
    r"((?:--?(?:nproc[-_]per[-_]node|num[-_]processes|num[-_]gpus)(?:[ =\"',]|\\\r?\n|\r?\n\s*- )+"
    r"|\bNPROC_PER_NODE=)[\"']?)(?:(?P<gpus>\d{1,9})|\$[{(]?(\w+))"
)
_SLURM_GPUS = r"#SBATCH\s+--?(?:gres|gpus-per-node|gpus|G)[=\s]*(?:[\w.]+:)*(?P<gpus>\d{1,9})"
_VISIBLE = r"\bCUDA_VISIBLE_DEVICES=[\"']?(?P<gpus>\d{1,9}(?:,\d{1,9})*)"
_LIMITS = r"nvidia\.com/gpu[\"']?\s*:\s*[\"']?(?P<gpus>\d{1,9})"
_ACCELERATORS = r"\baccelerators\s*:\s*[\"']?\{?\s*[\w-]+\s*:\s*(?P<gpus>\d{1,9})\b"
_DOCKER = r"\bdocker\s[^\n]{0,400}--gpus[= ](?P<gpus>\d{1,9})\b"
# `count` of the devices of a Compose file: on their line, or below it and further to the right.
_DEVICES = (
    r"^(?P<indent>[ ]*)(?:- )?[^\n#]{0,99}\b(?:devices|gpus)\s*:[^\n]{0,99}?(?:\n(?P=indent)[ -][^\n]{0,99}?){0,9}?"
    r"\bcount\s*:\s*[\"']?(?P<gpus>\d{1,9})"
)
_ACCELERATE = re.compile(r"\baccelerate\s+launch\b")


def with_processes(text: str, times: int, per: int) -> str:
    """Return the script or manifest with `times` processes in each node for every `per` that it has: where its launcher
    says the number or a variable is assigned, and where Slurm or Kubernetes is asked for as many GPUs, or they are made
    visible. A launcher whose config file says the number is given a flag. Raises SpecError if it does not say it."""
    found = _PROCESSES.search(text)
    if found is not None and found[2] is None:
        by_slurm = found[3].startswith("SLURM_")
        found = re.search(_SLURM_GPUS if by_slurm else rf"\b{found[3]}\s*[:?]?=\s*[\"']?(?P<gpus>\d{{1,9}})", text)
    count = int(found["gpus"]) if found is not None else None
    places = {found.span("gpus"): found["gpus"]} if found is not None else {}
    for pattern in (_SLURM_GPUS, _VISIBLE, _LIMITS, _DEVICES, _DOCKER, _ACCELERATORS):
        for match in re.finditer(pattern, text, re.MULTILINE):
            gpus = match["gpus"].count(",") + 1 if pattern == _VISIBLE else int(match["gpus"])
            count = gpus if count is None else count
            if gpus == count:
                places[match.span("gpus")] = match["gpus"]
    launch = _ACCELERATE.search(text)
    if not places and launch is not None and "--config_file" in text[launch.end() :]:
        return f"{text[: launch.end()]} --num_processes {times}{text[launch.end() :]}"
    for (start, end), number in sorted(places.items(), reverse=True):
        is_list = text[:start].rstrip("\"'").endswith("CUDA_VISIBLE_DEVICES=")
        old = number.count(",") + 1 if is_list else int(number)
        if old * times % per:
            break
        new = old * times // per
        text = text[:start] + (",".join(map(str, range(new))) if is_list else str(new)) + text[end:]
    else:
        if places:
            return text
    raise SpecError("the script does not say how many processes train")


def _edited(text: str, start: int, command: Launched, name: str, value: Value) -> str:
    words = list(_words(text, start, command.program))
    begin, end, written = _place(text, words, name)
    values = "" if value is None else values_of(command, name, value)
    if written:
        if value is None:
            return text[:begin].rstrip(" \t") + text[end:]
        return text[:begin] + (f"{written}{values}" if values else written.rstrip("= ")) + text[end:]
    if value is None:
        return text
    if not words:  # bash -c "..."
        raise SpecError(f"{command.program} is inside a quoted command, which stays as it is")
    begin, end = words[-1]
    line = text.rfind("\n", 0, begin) + 1
    before = text[line:begin]
    indent = before[: len(before) - len(before.lstrip())] or "    "
    gap = f" \\\n{indent}" if "\n" in text[start:end] else " "
    return f"{text[:end]}{gap}{new_flag(command, name)}{values}".rstrip("= ") + text[end:]


def _place(text: str, words: Sequence[tuple[int, int]], name: str) -> tuple[int, int, str]:
    """Return where a flag or pair and its values begin and end, and how it is written up to its values.

    The last is empty if the command does not have it.
    """
    dashed = name.replace("_", "[-_]")
    for pattern in (rf"(--?{dashed})(=?)", rf"({dashed})(=)"):
        for n, (begin, end) in enumerate(words):
            match = re.match(pattern, text[begin:end])
            if match is None or not (match[2] or match.end() == end - begin):
                continue
            last = n
            while not match[2] and last + 1 < len(words) and not re.match(r"--?[A-Za-z]", text[words[last + 1][0] :]):
                last += 1
            return begin, words[last][1], f"{match[1]}{match[2] or ' '}"
    return 0, 0, ""


def _words(text: str, position: int, program: str) -> Iterator[tuple[int, int]]:
    """Yield the positions of the words of the command, from its program on, until another command or `--`."""
    began = False
    while (match := _TOKEN.match(text, position)) is not None:
        word = match[1]
        position = match.end()
        began = began or not program or re.split(r"[/\\]", word.strip("\"'"))[-1] == program
        if began and (word in _ENDS or word[0] in "&|;<>#" or re.match(r"\d+>", word)):
            return
        if began:
            end = match.end() - (word.endswith(";") and word != ";")
            yield match.start(1), end
            if end < match.end():
                return


def new_flag(command: Launched, name: str) -> str:
    """Return a flag as the program takes it: with dashes for Axolotl and engines; `key=` of verl, torchtune and
    LLaMA-Factory."""
    if command.program.startswith(("axolotl", "vllm", "sglang")):
        return f"--{name.replace('_', '-')} "
    return f"{name}=" if _takes_pairs(command) else f"--{name} "


def _takes_pairs(command: Launched) -> bool:
    is_hydra = command.program.startswith("verl.") or "_finetune_" in command.program  # of tune run
    return is_hydra or (command.program == "llamafactory-cli" and bool(command.config))


def values_of(command: Launched, name: str, value: Value) -> str:
    """Return a flag's words; empty for a switch of Axolotl's or OpenRLHF's. Raises SpecError if the program cannot take
    it."""
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else None
    program = command.program.partition(".")[0]
    if program in ("axolotl", "openrlhf"):
        if value is False or isinstance(value, Mapping) or (items is not None and program == "axolotl"):
            raise SpecError(f"{program}'s command line cannot set {name} to {json.dumps(value)}")
        if value is True:
            return ""
    if items is not None and _takes_pairs(command):
        return shlex.quote(f"[{','.join(map(str, items))}]")
    if items is not None:
        return " ".join(shlex.quote(str(item)) for item in items)
    return shlex.quote(value if isinstance(value, str) else json.dumps(value))
