"""Commands of shell scripts: one that trains or serves, its flags, and what its launcher says. Nothing is executed.

Source: accelerate 1.15 commands/launch.py; torch 2.13 distributed/run.py; DeepSpeed 0.19.8 launcher/runner.py;
trl 1.16 cli; llamafactory 0.9.5 launcher.py, hparams/parser.py; axolotl 0.21 cli/main.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any, TypeAlias, cast

from memplan.core.errors import SpecError, printable
from memplan.core.records import NamedTuple
from memplan.frameworks.reading.container_images import entry_point, image_version, installed_versions
from memplan.frameworks.reading.document import Document, paths
from memplan.frameworks.reading.makefile import recipes_of
from memplan.frameworks.reading.shell_commands import ASSIGNMENT, commands_of, near_text, number_of
from memplan.frameworks.reading.shell_lines import LONG, WRITTEN
from memplan.frameworks.reading.shell_words import SECOND, loops_of

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
_ALL = "every GPU that it sees"
COUNTED = "counted by"  # in what a launcher says: what its number of processes is of
_MOST_GPUS = 1024  # of a machine
_AROUND = "the scripts around it"  # of a script's variables: no shell has one with spaces
_MOST_AROUND = 2
_MOST_LOOPS = 3  # around a command
_MOST_SHOWN = 60  # of a name
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
}
_HYDRA = "verl."  # programs that take key=value anywhere among their flags
_MODULE = re.compile(r"\w+(?:\.(?!py$)\w+)+")
_OVERRIDE = re.compile(r"\+{0,2}[\w.]+=")
_PREPARES = re.compile(r"(?:pre)?(?:pare|process)|tokeni[sz]e|download|convert", re.IGNORECASE)
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
    others      of each loop that runs it with other values: the loop, and its second run
    """

    program: str
    subcommand: str
    words: tuple[str, ...]
    flags: dict[str, Any]
    launcher: dict[str, Any]
    variables: Mapping[str, str]
    path: str
    line: int = 0
    others: tuple[tuple[str, Launched], ...] = ()

    @property
    def shown(self) -> str:
        return f"{self.program} {self.subcommand}".strip()

    @property
    def may_train(self) -> bool:
        """Whether it is no server, and no script without a launcher or a file that may prepare data: one without a
        model, or with a name that says so."""
        if _SERVER.match(self.shown):
            return False
        is_bare = self.program.endswith(".py") and not self.launcher and not self.config
        has_model = any("model" in flag for flag in self.flags)
        return not is_bare or (has_model and _PREPARES.match(self.program) is None)

    @property
    def unseen(self) -> str:
        """The script that would tell more if it were there, for messages; empty for other programs."""
        is_script = self.path.endswith(".py")
        return f", and {printable(self.path, _MOST_SHOWN)} is not there to be read" if is_script else ""

    @property
    def written(self) -> dict[str, str]:
        """The texts of the files that the script writes, by their path."""
        start = len(WRITTEN)
        return {key[start:]: text for key, text in self.variables.items() if key.startswith(WRITTEN)}

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
    """Return the first command that trains; else that serves, and of a loop's runs the first. Raises SpecError if there
    is none.

    variables  the environment that is known
    line       the line of all commands, if they are not a script's; 0 for a command that is typed
    folder     where files of variables that it sources are, if not in the working directory
    """
    variables = {**_directives(text), **(variables or {})}
    first = _first(text, name, programs, variables, line, folder)
    loops = list(loops_of(first.variables).items())[:_MOST_LOOPS]
    others = ((said, _first(text, name, programs, {**variables, SECOND: loop}, line, folder)) for loop, said in loops)
    return first._replace(others=tuple(others))


def _first(
    text: str, name: str, programs: Programs, variables: Mapping[str, str], line: int | None, folder: Path | None
) -> Launched:
    skipped, other, versions = "", None, dict[str, str]()
    for counted, words, environment in commands_of(text, name, variables, folder):
        at = counted if line is None else line
        versions |= installed_versions(words)
        known = {**versions, **environment}
        found = LONG if words == [LONG] else _launched(words, known, at, programs, folder)
        if isinstance(found, Launched) and (found.may_train or "Trainer(" in near_text(found.path, folder)):
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
    nodes = number_of(variables.get("SLURM_NNODES", "1")) or 1
    tasks = number_of(variables.get("SLURM_NTASKS_PER_NODE", "")) * nodes
    variables = {"SLURM_NTASKS": str(tasks), **variables} if tasks else variables
    gpus = number_of(said.get("gres", said.get("gpus-per-node", "")).partition(",")[0].rpartition(":")[2])
    gpus = gpus or number_of(said.get("gpus", "").rpartition(":")[2]) // nodes  # --gpus is of all nodes
    return {**variables, "SLURM_GPUS_ON_NODE": str(gpus), **visible(gpus)} if gpus else variables


def visible(gpus: int) -> dict[str, str]:
    """Return the variable that says which GPUs a program sees: the first ones; nothing if there are none, or too many
    to be those of one machine."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))} if 0 < gpus <= _MOST_GPUS else {}


def _of_mpi(words: list[str], folder: Path | None) -> dict[str, Any]:
    """Return what the flags of an MPI launcher say as accelerate's config: a number of processes, or hosts."""
    _, flags = flags_of(words)
    ranks = next((number_of(str(flags[name])) for name in ("np", "n") if name in flags), 0)
    hosts = next((str(flags[name]) for name in ("H", "host") if name in flags), "")
    files = (_slots(str(flags[name]), folder) for name in ("hostfile", "machinefile") if name in flags)
    slots = [number_of(host.partition(":")[2]) or 1 for host in hosts.split(",") if host]
    slots = slots or [slot for file in files for slot in file]
    ranks, by = (ranks, "np") if ranks else (sum(slots), "slots of its hosts")
    return {"distributed_type": "MULTI_GPU"} | ({"num_processes": ranks, COUNTED: by} if ranks else {})


def _slots(name: str, folder: Path | None) -> list[int]:
    """Return the slots of each host in a file of hosts, `worker-1 slots=8`; none if the file is not here."""
    text = near_text(name, folder)
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
            out |= visible(said.count(",") + 1 if said.startswith("device=") else number_of(said))
            out |= {"NVIDIA_VISIBLE_DEVICES": said} if said == "all" else {}
        match = ASSIGNMENT.fullmatch(said)
        out |= {match[1]: match[2]} if name in ("e", "env") and match is not None else image_version(flag)
    return {**variables, **out}


def _launched(
    words: list[str], variables: Mapping[str, str], line: int, programs: Programs, folder: Path | None = None
) -> Launched | str | None:
    """Return the command if it trains or serves; why it is not read, if its program is known; else None."""
    launcher: dict[str, Any] = {}
    while words:
        program, rest = PurePath(words[0]).name, words[1:]
        inner = _inner_script(words, folder)
        if inner is not None:
            return _in_script(inner, variables, line, programs, folder)
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


def _inner_script(words: list[str], folder: Path | None) -> tuple[str, dict[str, str]] | None:
    """Return the script that a command runs, and its variables: of `bash -lc "trl sft"`, `sbatch train.sh 4` and
    `make -C FOLDER -f FILE TARGET NAME=VALUE`; None of another command."""
    program, rest = PurePath(words[0]).name, words[1:]
    if program == "make":
        given = {match[1]: match[2] for word in rest if (match := ASSIGNMENT.fullmatch(word)) is not None}
        flags = dict(pairwise([*rest, ""]))
        aside = [flags.get("-C", ""), flags.get("-f", "Makefile")]
        targets = [word for word in rest if not (word.startswith("-") or "=" in word or word in aside)]
        return recipes_of(near_text(str(PurePath(*aside)), folder), targets, given), given
    if program in _SHELLS and len(rest) > 1 and re.fullmatch("-[a-z]*c", rest[0]):
        return rest[1], {}
    words = rest if program in (*_SHELLS, "sbatch") else words
    words = words[next((index for index, word in enumerate(words) if not word.startswith("-")), len(words)) :]
    if words and words[0].endswith(SUFFIXES) and (text := near_text(words[0], folder)):
        return text, {**_directives(text), **{str(number): word for number, word in enumerate(words[1:], 1)}}
    return None


def _in_script(
    script: tuple[str, dict[str, str]],
    variables: Mapping[str, str],
    line: int,
    programs: Programs,
    folder: Path | None,
) -> Launched | str | None:
    """Return the first command of a script that trains, else that serves; else why it is not read, or None."""
    depth = len(variables.get(_AROUND, ""))
    if depth == _MOST_AROUND:  # a script may start itself
        return None
    inner = commands_of(script[0], "a script", {**variables, **script[1], _AROUND: "." * (depth + 1)}, folder)
    other: Launched | str | None = None
    for _, words, own in inner:
        found = _launched(words, own, line, programs, folder)
        if isinstance(found, Launched) and found.may_train:
            return found
        other = other if isinstance(other, Launched) else found or other
    return other


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
    hosts = hosts[: number_of(str(flags.get(nodes, ""))) or None]
    if hosts and "include" not in flags:
        ranks, machines = (ranks, str(len(hosts))) if ranks.isdecimal() else (str(sum(hosts)), "1")
    seen = str(flags.get("include", "")).rpartition(":")[2] or variables.get("CUDA_VISIBLE_DEVICES", "")
    seen = "" if "$" in seen else seen
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
    sections = {"fsdp": "fsdp_", "fp8": "fp8_", "deepspeed": ("zero", "offload_", "deepspeed_config")}
    for section, prefix in sections.items():
        keys = {key: value for key, value in flags.items() if key.startswith(prefix)}
        if keys:
            out[f"{section}_config"] = keys
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
