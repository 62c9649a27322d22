"""Shell scripts: the command that trains, its flags, and what its launcher says. Nothing is executed.

Source: accelerate 1.15 commands/launch.py; torch 2.13 distributed/run.py; DeepSpeed 0.19.8 launcher/runner.py;
trl 1.16 cli; llamafactory 0.9.5 launcher.py, hparams/parser.py; axolotl 0.21 cli/main.py.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any, cast

from memplan.core.errors import SpecError, printable
from memplan.core.records import NamedTuple
from memplan.frameworks.reading.document import Document, paths

SUFFIXES = (".sh", ".bash", ".sbatch", ".slurm")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::?-([^}]*))?\})")
_ASSIGNMENT = re.compile(r"(\w+)=(.*)", re.DOTALL)
_ENDS = ("&&", "||", "|", ";", "&", "then", "do")
_WRAPPERS = ("exec", "nohup", "sudo", "time", "env", "srun", "uv", "poetry", "run", "python3", "python", "-u")
_WITHOUT_VALUE = frozenset(
    (
        *("use_fsdp", "use_deepspeed", "multi_gpu", "use_parallelism_config", "standalone", "tpu", "cpu", "use_cpu"),
        *("no_python", "module", "same_network", "debug", "quiet", "use_megatron_lm", "dynamo_use_fullgraph"),
    )
)
_DOES_NOT_READ = {"swift": "ms-swift", "vllm": "vLLM", "tune": "torchtune", "litgpt": "LitGPT", "unsloth": "Unsloth"}


class Launched(NamedTuple):
    """A command that trains.

    program    trl, llamafactory-cli, axolotl, or a script's or module's name
    config     the run's file that it names; empty if all is said by flags
    flags      its flags, as a file's keys
    launcher   what the launcher says, as accelerate's keys
    variables  the environment
    line       the line of the script that it begins in
    """

    program: str
    config: str
    flags: dict[str, Any]
    launcher: dict[str, Any]
    variables: Mapping[str, str]
    line: int


def launched(text: str, name: str) -> Launched:
    """Return the first command of a script that trains. Raises SpecError if there is none."""
    unread = ""
    for line, words, variables in _commands(text, name):
        found = _launched(words, variables, line)
        if isinstance(found, Launched):
            return found
        unread = unread or (f"spec: {name}:{line}: {found}'s commands are not read yet" if found else "")
    wanted = "accelerate launch, torchrun, deepspeed, trl, llamafactory-cli or axolotl"
    raise SpecError(unread or f"spec: {name} has no command that trains; {wanted} are read", "spec")


def launcher_document(command: Launched, name: str) -> Document:
    """Return what a command's launcher says as accelerate's config."""
    sections = [(key,) for key in command.launcher]
    keys = [tuple(path.split(".")) for path, _ in paths(command.launcher)]
    return Document(name, None, command.launcher, dict.fromkeys([*sections, *keys], command.line))


def _commands(text: str, name: str) -> Iterator[tuple[int, list[str], dict[str, str]]]:
    """Yield the commands of a script: line, words with variables resolved, and the environment."""
    variables: dict[str, str] = {}
    for line, joined in _joined_lines(text):
        try:
            words = shlex.split(joined, comments=True)
        except ValueError:
            raise SpecError(f"spec: {name}:{line}: a quote is not closed", "spec") from None
        for simple in _simple(words):
            resolved = [part for word in simple for part in _resolved(word, variables)]
            if resolved[:1] in (["export"], ["set"]):
                resolved = resolved[1:]
            own = dict(variables)
            while resolved and (match := _ASSIGNMENT.fullmatch(resolved[0])):
                own[match[1]] = match[2]
                resolved = resolved[1:]
            if resolved:
                yield line, resolved, own
            else:
                variables = own


def _joined_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield each line with the lines that continue it, and its number."""
    start, parts = 1, ""
    for number, line in enumerate(text.splitlines(), 1):
        start = start if parts else number
        if line.rstrip().endswith("\\"):
            parts += f"{line.rstrip()[:-1]} "
            continue
        yield start, parts + line
        parts = ""
    yield start, parts


def _simple(words: list[str]) -> Iterator[list[str]]:
    """Yield the words of each command in a line."""
    command: list[str] = []
    for word in words:
        if word in _ENDS or word.endswith(";"):
            command += [word[:-1]] if word.endswith(";") and len(word) > 1 else []
            if command:
                yield command
            command = []
        else:
            command.append(word)
    if command:
        yield command


def _resolved(word: str, variables: Mapping[str, str]) -> list[str]:
    """Return a word with the variables that the script sets; a variable alone is split into words."""

    def value(match: re.Match[str]) -> str:
        return variables.get(match[1] or match[2], match[3] if match[3] is not None else match[0])

    text = _VARIABLE.sub(value, word)
    return text.split() if _VARIABLE.fullmatch(word) and text != word else [text]


def _launched(words: list[str], variables: Mapping[str, str], line: int) -> Launched | str | None:
    """Return the command if it trains; the name of a program that is known but not read; else None."""
    launcher: dict[str, Any] = {}
    while words:
        program, rest = PurePath(words[0]).name, words[1:]
        if program == "accelerate" and rest[:1] == ["launch"]:
            words, launcher = _launcher(rest[1:], launcher, "num_processes", "num_machines_")
        elif program == "torchrun" or words[1:3] == ["-m", "torch.distributed.run"]:
            words, launcher = _launcher(rest[2 * (program != "torchrun") :], launcher, "nproc_per_node", "nnodes")
        elif program == "deepspeed":
            words, launcher = _launcher(rest, launcher, "num_gpus", "num_nodes")
        elif words[0] in ("-m", "--module") or program in _WRAPPERS or (words[0].startswith("-") and launcher == {}):
            words = rest
        else:
            break
    if not words:
        return None
    program = PurePath(words[0]).name
    if program in _DOES_NOT_READ:
        return _DOES_NOT_READ[program]
    if program not in ("trl", "llamafactory-cli", "axolotl", "axolotl.cli.train") and not words[0].endswith(".py"):
        return None
    own, _, after = _partition(words[1:], "--")
    positional, flags = flags_of(own)
    if after:  # axolotl train run.yml --launcher torchrun -- --nproc_per_node=2
        launcher = _launcher([*after, ""], launcher, "nproc_per_node", "nnodes")[1]
    if program == "trl" and positional[:1] not in (["sft"], []):
        flags["trl_command"] = positional[0]
    gpus = variables.get("NPROC_PER_NODE") or variables.get("CUDA_VISIBLE_DEVICES", "").count(",") + 1
    if program == "llamafactory-cli" and not launcher and str(gpus).isdecimal() and int(gpus) > 1:
        launcher = {"distributed_type": "MULTI_GPU", "num_processes": int(gpus)}
    if "num_processes" in flags and program == "trl":
        launcher |= {"distributed_type": "MULTI_GPU", "num_processes": flags.pop("num_processes")}
    files = [word for word in positional if word.lower().endswith((".yaml", ".yml", ".json"))]
    config = str(flags.pop("config", "") or (files[0] if files else ""))
    flags |= dict(word.split("=", 1) for word in positional if "=" in word)
    return Launched(program, config, flags, launcher, variables, line)


def _partition(words: list[str], end: str) -> tuple[list[str], list[str], list[str]]:
    index = words.index(end) if end in words else len(words)
    return words[:index], words[index : index + 1], words[index + 1 :]


def _launcher(words: list[str], before: dict[str, Any], per_node: str, nodes: str) -> tuple[list[str], dict[str, Any]]:
    """Return the words after a launcher's flags, and the flags as accelerate's config."""
    index = 0
    taken: list[str] = []
    while index < len(words) and words[index].startswith("-") and words[index] not in ("-m", "--module"):
        taken.append(words[index])
        name = words[index].lstrip("-").replace("-", "_")
        has_value = "=" not in name and name not in _WITHOUT_VALUE
        if has_value and index + 1 < len(words):
            taken.append(words[index + 1])
        index += 1 + has_value
    _, flags = flags_of(taken)
    out: dict[str, Any] = dict(before)
    kind = "FSDP" if flags.get("use_fsdp") else "DEEPSPEED" if flags.get("use_deepspeed") else ""
    if kind or "config_file" not in flags:
        out["distributed_type"] = kind or "MULTI_GPU"
    if "config_file" in flags:
        out["config_file"] = flags["config_file"]
    ranks, machines = str(flags.get(per_node, "")), str(flags.get(nodes, "1"))
    if ranks.isdecimal() and machines.isdecimal():
        out["num_processes"] = int(ranks) * int(machines)
    if "mixed_precision" in flags:
        out["mixed_precision"] = flags["mixed_precision"]
    for section, prefix in (("fsdp_config", "fsdp_"), ("deepspeed_config", ("zero", "offload_", "deepspeed_config"))):
        keys = {key: value for key, value in flags.items() if key.startswith(prefix)}
        if keys:
            out[section] = keys
    return words[index:], out


def flags_of(words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Return words before the first flag, and the flags: one without a value is true, one with several is a list."""
    positional: list[str] = []
    flags: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--") or (word.startswith("-") and word[1:2].isalpha()):
            name, _, value = word.lstrip("-").partition("=")
            name = name.replace("-", "_")
            flags[name] = value if "=" in word else True
        elif not name:
            positional.append(word)
        elif flags[name] is True:
            flags[name] = word
        else:
            old = flags[name]
            flags[name] = [*cast("list[str]", old), word] if isinstance(old, list) else [old, word]
    return positional, flags


def unresolved(flags: Mapping[str, Any]) -> Iterator[str]:
    """Yield the flags whose value holds a variable that the script does not set, or another command's output."""
    for key, value in flags.items():
        text = " ".join(cast("list[str]", value)) if isinstance(value, list) else str(value)
        if "$" in text or "`" in text:
            yield printable(key, 60)
