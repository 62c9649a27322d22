"""Commands of shell scripts: one that trains or serves, its flags, and what its launcher says. Nothing is executed.

Source: accelerate 1.15 commands/launch.py; torch 2.13 distributed/run.py; DeepSpeed 0.19.8 launcher/runner.py;
trl 1.16 cli; llamafactory 0.9.5 launcher.py, hparams/parser.py; axolotl 0.21 cli/main.py.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any, TypeAlias, cast

from memplan.core.errors import SpecError, printable
from memplan.core.files import expanded, is_file
from memplan.core.records import NamedTuple
from memplan.frameworks.reading.container_images import entry_point, image_version
from memplan.frameworks.reading.document import Document, is_there, paths
from memplan.frameworks.reading.shell_branches import Branches
from memplan.frameworks.reading.shell_lines import LONG, WRITTEN, joined_lines
from memplan.spec.file import read_text

SUFFIXES = (".sh", ".bash", ".sbatch", ".slurm")
_LAUNCHERS = ("accelerate", "torchrun", "deepspeed", "tune")
_SBATCH = re.compile(r"^#SBATCH\s+(?:--([\w-]+)[=\s]+|-([A-Za-z])\s*)(\S+)", re.MULTILINE)
_SHORT = {"N": "nodes", "n": "ntasks", "G": "gpus"}  # of sbatch
# Variable -> the directive that it repeats.
_SLURM = {
    "SLURM_NNODES": "nodes",
    "SLURM_JOB_NUM_NODES": "nodes",
    "SLURM_NTASKS": "ntasks",
    "SLURM_NTASKS_PER_NODE": "ntasks-per-node",
    "SLURM_GPUS_PER_NODE": "gpus-per-node",
    "SLURM_CPUS_PER_TASK": "cpus-per-task",
}
# $A, ${A}, ${A[@]}, ${A:-text}; bounded: braces may never be closed
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?:\[[@*]\])?(?::?[-=]((?:[^{}]|\{[^{}]*\}){0,1000}))?\})")
_DEFAULT = re.compile(r"\$\{(\w+):?=([^{}]{0,1000})\}")  # ${A:=text}, which sets it
# $((A * B)), $(expr 16 / $A)
_ARITHMETIC = re.compile(r"\$(?:\(\((.{1,200}?)\)\)(?!\))|\(expr +([^()]{1,200})\))")
_ASSIGNMENT = re.compile(r"(\w+)=(.*)", re.DOTALL)
_ARRAY = re.compile(r"\s*(?:(?:export|local|declare(?: -\w+)?) +)?(\w+)(\+?)=\((.*?)\)\s*(?:#[^\n]*)?", re.DOTALL)
_REDIRECTION = re.compile(r"[&\d]?>>?(.*)|<")  # > a.log, 2>&1, < a
_ALL = "every GPU that it sees"
COUNTED = "counted by"  # in what a launcher says: what its number of processes is of
_MOST_GPUS = 1024  # of a machine
_MOST_DIGITS = 10
# A quoted text, or a comment; a hash inside a word, such as data#500, begins none, as it does for shlex.
_COMMENT = re.compile(r"""(\\.|'[^']*'|"(?:\\.|[^"\\])*")|(?<![^\s;&|()])#[^\n]*""", re.DOTALL)
_MOST_TEXT = 2**22  # characters of all words, with variables resolved
_MOST_SHOWN = 60  # of a name
_LONGEST_VALUE = 65_536  # characters; a variable may hold another one twice, and that the one before
_ENDS = ("&&", "||", "|", ";", "&", "then", "do")
_WRAPPERS = ("exec", "nohup", "sudo", "time", "env", "srun", "uv", "poetry", "run", "python3", "python", "-u")
_WITHOUT_VALUE = frozenset(
    (
        *("use_fsdp", "use_deepspeed", "multi_gpu", "use_parallelism_config", "standalone", "tpu", "cpu", "use_cpu"),
        *("no_python", "module", "same_network", "debug", "quiet", "use_megatron_lm", "dynamo_use_fullgraph"),
    )
)
_CONTAINERS = ("docker", "podman", "singularity", "apptainer", "srun", "ray")
_MPI = ("mpirun", "mpiexec", "horovodrun")
_SHELLS = ("sh", "bash", "zsh")
# Beginning of a program's name -> what it is, and the nearest that is read.
_LATER = {
    "verl.": ("verl's other runs", "verl.trainer.main_ppo or verl.trainer.sft_trainer"),
    "openrlhf.": ("OpenRLHF's other runs", "openrlhf.cli.train_sft, train_dpo, train_rm or train_ppo_ray"),
    "megatron": ("Megatron-SWIFT's runs", "swift sft, or memplan MODEL --profile megatron-core"),
}
_HYDRA = "verl."  # programs that take key=value anywhere among their flags
_MODULE = re.compile(r"\w+(?:\.(?!py$)\w+)+")
_OVERRIDE = re.compile(r"\+{0,2}[\w.]+=")
_SERVER = re.compile(r"vllm|sglang|llama-|text-generation-launcher|swift (?:deploy|infer)")
Programs: TypeAlias = "Mapping[str, tuple[str, ...]]"  # program -> its subcommands that are read


class Launched(NamedTuple):
    """A command that trains or serves.

    program     trl, llamafactory-cli, axolotl, or a script's or module's name
    subcommand  sft of `trl sft`; may be empty
    words       words that are neither flags nor their values
    flags       its flags, as a file's keys
    launcher    what the launcher says, as accelerate's keys
    variables   the environment
    path        the program as it is written
    line        the line of the script that it begins in; 0 if it is typed
    """

    program: str
    subcommand: str
    words: tuple[str, ...]
    flags: dict[str, Any]
    launcher: dict[str, Any]
    variables: Mapping[str, str]
    path: str
    line: int = 0

    @property
    def shown(self) -> str:
        return f"{self.program} {self.subcommand}".strip()

    @property
    def may_train(self) -> bool:
        """Whether it is no server, and no script without a launcher, a file or a model, which may prepare data."""
        if _SERVER.match(self.shown):
            return False
        is_bare = self.program.endswith(".py") and not self.launcher and not self.config
        return not is_bare or any("model" in flag for flag in self.flags)

    @property
    def unseen(self) -> str:
        """The script that would tell more if it were there, for messages; empty for other programs."""
        is_script = self.path.endswith(".py")
        return f", and {printable(self.path, _MOST_SHOWN)} is not there to be read" if is_script else ""

    @property
    def config(self) -> str:
        """The first word, or the short flag, that is a file with a run's keys; empty if there is none."""
        return next(filter(is_config, (*self.words, str(self.flags.get("c", "")))), "")


def is_config(word: str) -> bool:
    """Whether a word of a command is a file with a run's keys."""
    return word.lower().endswith((".yaml", ".yml", ".json", ".toml"))


def launched(
    text: str,
    name: str,
    programs: Programs,
    variables: Mapping[str, str] | None = None,
    line: int | None = None,
    folder: Path | None = None,
) -> Launched:
    """Return the first command that trains; else that serves. Raises SpecError if there is none.

    variables  the environment that is known
    line       the line of all commands, if they are not a script's; 0 for a command that is typed
    folder     where files of variables that it sources are, if not in the working directory
    """
    skipped, other = "", None
    for counted, words, environment in _commands(text, name, {**_directives(text), **(variables or {})}, folder):
        at = counted if line is None else line
        found = LONG if words == [LONG] else _launched(words, environment, at, programs, folder)
        if isinstance(found, Launched) and (found.may_train or "Trainer(" in _near_text(found.path, folder)):
            return found
        if isinstance(found, Launched):
            other = other or found
            continue
        skipped = skipped or (f"{name}:{at}: {found}" if found and at else found or "")
    if other is not None:
        return other
    *others, last = sorted(name for name in programs if "." not in name and "_" not in name)
    known = f"accelerate launch, torchrun, deepspeed, tune run, {', '.join(others)} and {last} are read"
    raise SpecError(skipped or f"{name} does not train or serve; {known}")


def launcher_document(launcher: Mapping[str, Any], line: int, name: str) -> Document:
    """Return what a command's launcher says as accelerate's config."""
    names = {"num_processes": launcher[COUNTED]} if COUNTED in launcher else {}
    values = {key: value for key, value in launcher.items() if key != COUNTED}
    keys = [*((key,) for key in values), *(tuple(path.split(".")) for path, _ in paths(values))]
    return Document(name, None, values, dict.fromkeys(keys, line) if line else {}, names)


def _directives(text: str) -> dict[str, str]:
    """Return the variables that Slurm sets by a script's `#SBATCH` lines: the GPUs of a node among them."""
    said = {long or _SHORT.get(short, short): value for long, short, value in _SBATCH.findall(text)}
    variables = {name: said[key] for name, key in _SLURM.items() if said.get(key, "").isdecimal()}
    nodes = _number(variables.get("SLURM_NNODES", "1")) or 1
    tasks = _number(variables.get("SLURM_NTASKS_PER_NODE", "")) * nodes
    variables = {"SLURM_NTASKS": str(tasks), **variables} if tasks else variables
    gpus = _number(said.get("gres", said.get("gpus-per-node", "")).partition(",")[0].rpartition(":")[2])
    gpus = gpus or _number(said.get("gpus", "").rpartition(":")[2]) // nodes  # --gpus is of all nodes
    return {**variables, "SLURM_GPUS_ON_NODE": str(gpus), **visible(gpus)} if gpus else variables


def visible(gpus: int) -> dict[str, str]:
    """Return the variable that says which GPUs a program sees: the first ones; nothing if there are none, or too many
    to be those of one machine."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))} if 0 < gpus <= _MOST_GPUS else {}


def variables_of(name: str, folder: Path | None) -> dict[str, str]:
    """Return the variables that a `.env` file in the folder, or the working directory, sets; none if it is not read."""
    out: dict[str, str] = {}
    for line in _near_text(name, folder).splitlines():
        with suppress(ValueError):  # a quote that is not closed
            for match in filter(None, map(_ASSIGNMENT.fullmatch, _words(line))):
                out[match[1]] = " ".join(resolved(match[2], out))
    return out


def _words(text: str) -> list[str]:
    """Return the words of a command, without comments. Raises ValueError for a quote that is not closed."""
    return shlex.split(_COMMENT.sub(lambda match: match[1] or "", text))


def _near_text(name: str, folder: Path | None) -> str:
    """Return the text of a file in the folder, or the working directory; empty if it is not read."""
    for path in (place / expanded(name) for place in (folder or Path(), Path())):
        with suppress(SpecError, OSError):
            if is_there(path) and is_file(path):
                return read_text(str(path))
    return ""


def _commands(
    text: str, name: str, variables: Mapping[str, str], folder: Path | None = None
) -> Iterator[tuple[int, list[str], dict[str, str]]]:
    """Yield the commands of a script: line, words with variables resolved, and the environment."""
    variables, spent, branches = dict(variables), 0, Branches()
    for line, joined in joined_lines(text):
        if joined == LONG:
            yield line, [LONG], dict(variables)
            continue
        if joined.startswith(WRITTEN):
            path, _, written = joined.partition("\n")
            spent += len(written)
            if not branches.is_skipping and spent < _MOST_TEXT:
                path, written = (_VARIABLE.sub(partial(_set, variables), each) for each in (path, written))
                variables[f"{WRITTEN}{PurePath(path.removeprefix(WRITTEN))}"] = written
            continue
        variables |= {match[1]: match[2] for match in _DEFAULT.finditer(joined) if not variables.get(match[1])}
        array = _ARRAY.fullmatch(joined)
        try:
            text = array[3] if array is not None else joined
            words = _words(_ARITHMETIC.sub(partial(_computed, variables), text))
        except ValueError:
            raise SpecError(f"{name}:{line}: a quote is not closed") from None
        if array is not None and branches.is_skipping:
            continue
        if array is not None:  # NAME=(a b), NAME+=(c)
            before = variables.get(array[1], "") if array[2] else ""
            parts = shlex.join(part for word in words for part in resolved(word, variables))
            spent += len(parts)
            if len(before) + len(parts) < min(_LONGEST_VALUE, _MOST_TEXT - spent):
                variables[array[1]] = f"{before} {parts}".strip()
            elif spent > _MOST_TEXT:
                variables[array[1]] = ""
            continue
        for simple in _simple(words):
            command = branches.followed([part for word in simple for part in resolved(word, variables)])
            spent += sum(map(len, command))
            if spent > _MOST_TEXT:
                raise SpecError(f"{name}:{line}: the variables of the script hold too much text")
            if command[:1] in (["export"], ["set"]):
                command = command[1:]
            if command[:1] in (["source"], ["."]) and len(command) > 1:
                variables = {**variables, **variables_of(command[1], folder)}
                continue
            own, start = dict(variables), 0
            while start < len(command) and (match := _ASSIGNMENT.fullmatch(command[start])):
                own[match[1]] = match[2]
                start += 1
            command = command[start:]
            if command:
                yield line, command, own
            else:
                variables = own


def _simple(words: list[str]) -> Iterator[list[str]]:
    """Yield the words of each command in a line, without redirections, `> a.log 2>&1`, and the script's own words."""
    command: list[str] = []
    is_file = False
    for word in words:
        redirection = _REDIRECTION.fullmatch(word)
        is_word = redirection is None and not is_file and not word.startswith(("$@", "$*", "${@"))
        is_file = redirection is not None and not redirection[1]
        if word.endswith(";;"):  # of a case
            command += [word[:-2]] * (is_word and len(word) > 2)
            yield from filter(None, (command, [";;"]))
            command = []
        elif word in _ENDS or word.endswith(";") or (redirection is not None and "|" in word):  # 2>&1|tee a.log
            command += [word[:-1]] if is_word and word.endswith(";") and len(word) > 1 else []
            if command:
                yield command
            command = []
        elif is_word:
            command.append(word)
    if command:
        yield command


def resolved(word: str, variables: Mapping[str, str]) -> list[str]:
    """Return a word with the variables that the script sets; a variable alone is split into words."""

    def value(match: re.Match[str]) -> str:
        default = match[0] if match[3] is None else _VARIABLE.sub(value, match[3])
        return variables.get(match[1] or match[2], default)

    text = _VARIABLE.sub(value, word)
    if len(text) > max(_LONGEST_VALUE, len(word)):
        return [word]
    if "[@]}" in word and _VARIABLE.fullmatch(word) and text != word:
        with suppress(ValueError):
            return shlex.split(text)
    return text.split() if _VARIABLE.fullmatch(word) and text != word else [text]


def _set(variables: Mapping[str, str], match: re.Match[str]) -> str:
    """Return the variable that is meant, or what stands there if it is not set."""
    return variables.get(match[1] or match[2], match[0])


def _computed(variables: Mapping[str, str], match: re.Match[str]) -> str:
    """Return what a shell would compute of whole numbers and variables, as text; else what it is."""
    from memplan.frameworks.reading.python_calls import arithmetic

    text = re.sub(r"\$\{?(\w+)\}?|\\", r"\1", match[1] or match[2]).replace("/", "//")
    value = arithmetic(text, {name: number for name, each in variables.items() if (number := _number(each))})
    return match[0] if value is None else str(value)


def _number(text: str) -> int:
    """Return the number that a text of at most nine digits is; 0 for any other."""
    return int(text) if text.isdecimal() and len(text) < _MOST_DIGITS else 0


def _of_mpi(words: list[str], folder: Path | None) -> dict[str, Any]:
    """Return what the flags of an MPI launcher say as accelerate's config: a number of processes, or hosts."""
    _, flags = flags_of(words)
    ranks = next((_number(str(flags[name])) for name in ("np", "n") if name in flags), 0)
    hosts = next((str(flags[name]) for name in ("H", "host") if name in flags), "")
    files = (_slots(str(flags[name]), folder) for name in ("hostfile", "machinefile") if name in flags)
    slots = [_number(host.partition(":")[2]) or 1 for host in hosts.split(",") if host]
    slots = slots or [slot for file in files for slot in file]
    ranks, by = (ranks, "np") if ranks else (sum(slots), "slots of its hosts")
    return {"distributed_type": "MULTI_GPU"} | ({"num_processes": ranks, COUNTED: by} if ranks else {})


def _slots(name: str, folder: Path | None) -> list[int]:
    """Return the slots of each host in a file of hosts, `worker-1 slots=8`; none if the file is not here."""
    text = _near_text(name, folder)
    lines = [line.partition("#")[0] for line in text.splitlines()]
    found = (re.search(r"slots\s*=\s*(\d{1,4})|:(\d{1,4})\s*$", line) for line in lines if line.strip())
    return [int(match[1] or match[2]) if match is not None else 1 for match in found]


def _of_container(words: list[str], variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that the flags of a container's or a job step's command set: `--gpus 2`, `--gres=gpu:2`."""
    out = _directives("\n".join(f"#SBATCH {flag} {value}" for flag, value in pairwise([*words, ""])))
    for flag, value in pairwise([*words, ""]):
        name, _, own = flag.lstrip("-").partition("=")
        said = (own or value).strip("\"'")
        if flag.startswith("--gpus"):
            out |= visible(said.count(",") + 1 if said.startswith("device=") else _number(said))
            out |= {"NVIDIA_VISIBLE_DEVICES": said} if said == "all" else {}
        match = _ASSIGNMENT.fullmatch(said)
        out |= {match[1]: match[2]} if name in ("e", "env") and match is not None else image_version(flag)
    return {**variables, **out}


def _launched(
    words: list[str], variables: Mapping[str, str], line: int, programs: Programs, folder: Path | None = None
) -> Launched | str | None:
    """Return the command if it trains or serves; why it is not read, if its program is known; else None."""
    launcher: dict[str, Any] = {}
    while words:
        program, rest = PurePath(words[0]).name, words[1:]
        if program == "accelerate" and rest[:1] == ["launch"]:
            words, launcher = _launcher(rest[1:], launcher, "num_processes", "num_machines_", variables)
        elif program == "torchrun" or words[1:3] == ["-m", "torch.distributed.run"]:
            own = rest[2 * (program != "torchrun") :]
            words, launcher = _launcher(own, launcher, "nproc_per_node", "nnodes", variables)
        elif program == "tune" and rest[:1] == ["run"]:
            words, launcher = _launcher(rest[1:], launcher, "nproc_per_node", "nnodes", variables)
        elif program == "deepspeed":
            words, launcher = _launcher(rest, launcher, "num_gpus", "num_nodes", variables, folder)
        elif program in _MPI:
            before, words = _inside(rest, programs)
            launcher = _of_mpi(before, folder)
        elif program in _SHELLS and len(rest) > 1 and re.fullmatch("-[a-z]*c", rest[0]):  # bash -lc 'trl sft ...'
            inner = (
                _launched(each, own, line, programs, folder) for _, each, own in _commands(rest[1], program, variables)
            )
            return next((each for each in inner if each), None)
        elif program in _CONTAINERS:
            before, words = _inside(rest, programs)
            variables = _of_container(before, variables)
        elif words[0] in ("-m", "--module") or program in _WRAPPERS or (words[0].startswith("-") and launcher == {}):
            words = rest
        else:
            break
    if not words:
        return None
    program = PurePath(words[0]).name
    later = (
        None
        if program in programs
        else next((found for start, found in _LATER.items() if program.startswith(start)), None)
    )
    if later is not None:
        return f"{printable(program, _MOST_SHOWN)}: {later[0]} are not read yet; near: {later[1]}"
    if launcher and program not in programs and _MODULE.fullmatch(words[0]):  # accelerate launch -m trl.scripts.sft
        words = [f"{words[0].replace('.', '/')}.py", *words[1:]]
        program = PurePath(words[0]).name
    if program not in programs and not words[0].endswith(".py"):
        return None
    subcommands = programs.get(program, ())
    subcommand, own = (words[1], words[2:]) if subcommands and len(words) > 1 else ("", words[1:])
    if subcommands and subcommand not in subcommands:
        supported = " or ".join(f"{program} {each}" for each in subcommands)
        return f"{printable(f'{program} {subcommand}', 60)} is not supported yet; supported: {supported}"
    own, _, after = _partition(own, "--")
    overrides = [word.lstrip("+") for word in own if _OVERRIDE.match(word)] if program.startswith(_HYDRA) else []
    positional, flags = flags_of([*overrides, *(word for word in own if word.lstrip("+") not in overrides)])
    if after:  # axolotl train run.yml --launcher torchrun -- --nproc_per_node=2
        launcher = _launcher([*after, ""], launcher, "nproc_per_node", "nnodes", variables)[1]
    flags |= dict(word.split("=", 1) for word in positional if "=" in word)
    positional = [word for word in positional if "=" not in word]
    return Launched(program, subcommand, tuple(positional), flags, launcher, variables, words[0], line)


def _inside(words: list[str], programs: Programs) -> tuple[list[str], list[str]]:
    """Return what comes before the command that a container or a job step runs, with its image, and that command."""
    for index, word in enumerate(words):
        entry, name = entry_point(word), PurePath(word).name
        if entry:
            return words[: index + 1], [*entry, *words[index + 1 :]]
        is_image = bool(programs.get(name)) and words[index + 1 : index + 2] and words[index + 1] in _LAUNCHERS
        if not is_image and name in (*programs, *_LAUNCHERS, *_SHELLS, *_MPI, "python", "python3"):
            return words[:index], words[index:]
    return words, []


def _partition(words: list[str], end: str) -> tuple[list[str], list[str], list[str]]:
    index = words.index(end) if end in words else len(words)
    return words[:index], words[index : index + 1], words[index + 1 :]


def _launcher(
    words: list[str],
    before: dict[str, Any],
    per_node: str,
    nodes: str,
    variables: Mapping[str, str],
    folder: Path | None = None,
) -> tuple[list[str], dict[str, Any]]:
    """Return the words after a launcher's flags, and the flags as accelerate's config. Unset, torchrun's are variables,
    and accelerate and DeepSpeed start a process for every GPU that they see."""
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
    ranks, machines = (
        str(flags.get(name, variables.get(f"PET_{name.upper()}", default)))
        for name, default in ((per_node, ""), (nodes, "1"))
    )
    hosts = _slots(str(flags["hostfile"]), folder) if "hostfile" in flags else []
    hosts = hosts[: _number(str(flags.get(nodes, ""))) or None]
    if hosts and "include" not in flags:
        ranks, machines = (ranks, str(len(hosts))) if ranks.isdecimal() else (str(sum(hosts)), "1")
    seen = str(flags.get("include", "")).rpartition(":")[2] or variables.get("CUDA_VISIBLE_DEVICES", "")
    takes_all = not ranks and per_node in ("num_processes", "num_gpus") and "config_file" not in flags
    if seen and (takes_all or ranks in ("gpu", "auto")):
        ranks = str(seen.count(",") + 1)
    if ranks.isdecimal() and machines.isdecimal():
        out["num_processes"] = int(ranks) * int(machines)
        out[COUNTED] = per_node if ranks == str(flags.get(per_node)) else _ALL
        out[COUNTED] += f" x {nodes}" * (machines != "1")
    elif ranks:  # a variable, or a word such as `gpu`
        out["num_processes"] = ranks if machines == "1" else f"{ranks} x {machines}"
    if "mixed_precision" in flags:
        out["mixed_precision"] = flags["mixed_precision"]
    for section, prefix in (("fsdp_config", "fsdp_"), ("deepspeed_config", ("zero", "offload_", "deepspeed_config"))):
        keys = {key: value for key, value in flags.items() if key.startswith(prefix)}
        if keys:
            out[section] = keys
    return words[index:], out


_REPEATED = ("ot", "override_tensor")  # llama.cpp's flags that add to what they said before


def flags_of(words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Return words before the first flag, and the flags: one without a value is true, one with several is a list."""
    positional: list[str] = []
    flags: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--") or (word.startswith("-") and word[1:2].isalpha()):
            name, _, value = word.lstrip("-").partition("=")
            name = name.replace("-", "_")
            if name not in _REPEATED or name not in flags:
                flags[name] = value if "=" in word else True
        elif not name:
            positional.append(word)
        elif flags[name] is True:
            flags[name] = word
        elif name == "config" and "=" in word:  # tune run recipe --config run.yaml batch_size=4
            positional.append(word)
        else:
            old = flags[name]
            flags[name] = [*cast("list[str]", old), word] if isinstance(old, list) else [old, word]
    return positional, flags


def engines_command(command: Launched, engines: Mapping[str, str]) -> Launched:
    """Return the command of the engine that `swift deploy` and `swift infer` start, with the engine's own flags; any
    other command as it is. Raises SpecError for an engine that is not read.

    engines  engine -> its flag that names the model

    Source: ms-swift 4.6.0 arguments/infer_args.py, base_args/model_args.py; infer_engine/vllm_engine.py.
    """
    if command.shown not in ("swift deploy", "swift infer"):
        return command
    engine = str(command.flags.get("infer_backend", "transformers"))
    if engine not in engines or command.config:
        said = "a file" if command.config else f"infer_backend {printable(engine, 40)}"
        supported = "flags with --infer_backend vllm or sglang"
        raise SpecError(f"spec: {command.shown} with {said} is not supported yet; supported: {supported}", "spec")
    names = {"model": engines[engine], "torch_dtype": "dtype"}
    flags = {names[key]: value for key, value in command.flags.items() if key in names}
    start = f"{engine}_"
    flags |= {key.removeprefix(start): value for key, value in command.flags.items() if key.startswith(start)}
    if command.flags.get("adapters"):
        flags["enable_lora"] = True
    return command._replace(program=engine, subcommand="", flags=flags)


# Flags of data, outputs and logs, on whose values memory does not depend.
_ASIDE = re.compile(
    r"(?:.*\.)?(?:(?:output|logging|log|cache|save|tensorboard|data|dataset)_dir|(?:train|validation|test|eval|data)_file"
    r"|datasets?|(?:val_|eval_|train_)?dataset(?:_\w+)?|data_path|save_path|run_name|hub_\w+|wandb\w*|learning_rate|seed"
    r"|ckpt\.\w+|reward\.remote_url|host|port)"
)


def unresolved(flags: Mapping[str, Any]) -> Iterator[str]:
    """Yield the flags whose value holds a variable that the script does not set, or another command's output."""
    for key, value in flags.items():
        text = " ".join(cast("list[str]", value)) if isinstance(value, list) else str(value)
        if ("$" in text or "`" in text) and not _ASIDE.fullmatch(key):
            yield printable(key, 60)
