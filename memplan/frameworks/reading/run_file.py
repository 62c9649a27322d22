"""Read a run's file: which framework's it is, and the run that the framework would start."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from memplan.catalogue.methods.methods import ADAPTERS
from memplan.catalogue.profiles.profile_table import known_name, nearest_versions
from memplan.core.errors import SpecError, UnknownNameError, printable
from memplan.core.files import is_folder, open_file
from memplan.core.records import NamedTuple
from memplan.frameworks.reading import shell, trainer
from memplan.frameworks.reading.command_flags import (
    engines_command,
    flags_and_config,
    of_loops,
    processes_of,
    script_of,
    unresolved,
)
from memplan.frameworks.reading.config import TYPED, Config, FieldOrigin, Typed, Unread, defaults_of, version_number
from memplan.frameworks.reading.container_images import version_of
from memplan.frameworks.reading.document import (
    Document,
    named_document,
    paths,
    read_document,
    with_references,
)
from memplan.frameworks.reading.makefile import is_makefile, recipes_of
from memplan.frameworks.reading.run_format import FORMATS, PROGRAMS, RunFormat, format_named
from memplan.frameworks.reading.unread import by_line, unread_keys
from memplan.spec.base import Part
from memplan.spec.file import read_text
from memplan.spec.run import NEWEST, RunSpec

if TYPE_CHECKING:
    from memplan.frameworks.reading.manifests import Container

ADAPTERS_FILE = "adapter_config.json"
SCRIPTS = (".py", ".ipynb")
_WITH_SCRIPTS = ("trl", "transformers", "unsloth")
_MODEL_FLAGS = {"model_name_or_path", "sft_model_path"}  # of TRL's own scripts, which are read as its commands
_MANIFEST = re.compile(r"^(?:services|apiVersion):|\A(?=.*^(?:run|commands):).*^resources:", re.MULTILINE | re.DOTALL)
# Keys of files that are known, but not read as a run.
_COMPANIONS = {"accelerate": ("distributed_type", "compute_environment"), "deepspeed": ("zero_optimization",)}
_LATER = {
    **dict.fromkeys(("model_class", "dist_config", "kernel_config"), "LLaMA-Factory v1's (USE_V1=1: a preview)"),
    "tokenizer_dir": "LitGPT's pretraining",
    "policy_model": "torchtune's PPO",
    "grpo_samples": "torchtune's GRPO",
    "checkpointer": "torchtune's evaluation and generation",
}
_ENGINES = {name: FORMATS[name].model for name in ("vllm", "sglang")}  # of other frameworks' commands
_OF_MODELS = {"model_type", "architectures", "hidden_size"}  # keys of config.json
_MAIN_FIELDS = {"method": "method.kind", "optimizer": "optimizer.name"}
_ADAPTER_FIELDS = tuple(
    f"method.{name}" for name in ("rank", "alpha", "targets", "dropout", "modules_to_save", "adapter_dtype", "options")
)
_SEEN = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")  # variables that say which GPUs a program sees


class RunSource(NamedTuple):
    """The arguments of `read_as` that a run was read with, so that it can be read again with other values of keys."""

    document: Document
    form: RunFormat
    asked: str | None = None
    told: tuple[str, ...] = ()
    companions: Mapping[str, Document] | None = None
    typed: Mapping[str, Any] | None = None
    flags: Mapping[str, Typed] | None = None
    command: str = ""
    own_defaults: Mapping[str, Any] | None = None

    @property
    def keys(self) -> dict[str, Any]:
        """The file's keys that have a value, by their path with dots; a command's flags replace them."""
        said = dict(paths(self.document.values))
        return {**said, **{key: flag.value for key, flag in (self.flags or {}).items()}}

    def with_key(self, key: str, value: Any) -> RunSource:
        """Return the source with another value of a key; None takes the key away."""
        flags = {name: flag for name, flag in (self.flags or {}).items() if name != key}
        said = {name: each for name, each in paths(self.document.values) if name != key}
        values = nested(said if value is None else {**said, key: value})
        return self._replace(document=self.document._replace(values=values), flags=flags)


class RunFile(NamedTuple):
    """A run's file as it was read.

    framework  the framework's name, `memplan` for a run's own fields
    title      the framework and version, as shown
    told       the keys that told the framework
    origins    the fields that the file, the framework or a rule sets, and why
    unread     keys that may take memory and are not understood
    fields     the run's fields as sections
    typed      fields whose typed value is in `fields` already
    source     what it was read of; None for a run's own fields
    """

    name: str
    framework: str
    title: str
    told: tuple[str, ...]
    origins: tuple[FieldOrigin, ...]
    unread: tuple[Unread, ...]
    fields: Mapping[str, Any]
    typed: frozenset[str] = frozenset()
    source: RunSource | None = None

    @property
    def is_own(self) -> bool:
        """Whether the file has a run's own fields, rather than a framework's keys."""
        return self.framework == "memplan"

    @property
    def headline(self) -> str:
        """The framework and the keys that told it: `run.yaml: axolotl 0.21, by base_model and micro_batch_size`."""
        by = f", by {' and '.join(self.told)}" if self.told else ""
        return f"{self.name}: {self.title}{by}"

    @property
    def notes(self) -> tuple[str, ...]:
        """Return a line for each key that is not understood."""
        return tuple(printable(f"{each.key} ({each.where}): {each.note}") for each in self.unread)

    def origins_of(self, run: RunSpec) -> tuple[FieldOrigin, ...]:
        """Return the origins of a run that options have changed."""
        out: list[FieldOrigin] = []
        for origin in self.origins:
            value: Any = run
            for part in origin.field.split("."):
                value = _inside(value, part)
            value = list(cast("tuple[str, ...]", value)) if isinstance(value, tuple) else value
            is_as_read = isinstance(value, Part) or str(value) == str(origin.value)
            why = origin.why if value == origin.value else TYPED  # 2e8 is 200000000
            out.append(origin if is_as_read else FieldOrigin(origin.field, value, why))
        return tuple(out)


def read_run(
    name: str,
    framework: str | None = None,
    companions: Mapping[str, str] | None = None,
    typed: Mapping[str, Any] | None = None,
    text: str | None = None,
) -> RunFile:
    """Return the run of a file. Raises SpecError if it is no framework's, or several's, or has an unsupported value.

    framework   NAME or NAME-VERSION; None to tell it by the file's keys
    companions  files given along with it, by kind: `accelerate`, `deepspeed`
    typed       field -> value that replaces the file's before the framework's rules see it: the number of GPUs, and
                fields that one key sets
    text        what to read instead of the file's text, as if the file had it
    """
    others = {kind: read_document(each) for kind, each in (companions or {}).items()}
    if is_script(name):
        script = read_text(name) if text is None else text
        command = command_in(script, printable(Path(name).name, 60), Path(name).parent)
        return _read_launched(command, printable(Path(name).name, 60), Path(name), framework, others, typed)
    with suppress(OSError, ValueError):  # reading says why
        name = str(Path(name) / ADAPTERS_FILE) if is_folder(Path(name)) else name
    if name.lower().endswith(SCRIPTS):
        return _read_python(name, framework, {}, others, typed)
    if is_modelfile(name):
        from memplan.frameworks.reading import modelfile

        return read_as(modelfile.read_modelfile(name), format_named("ollama"), None, (), others, typed)
    if is_manifest(name):
        shown = printable(Path(name).name, 60)
        command, _ = manifest_command(read_text(name) if text is None else text, shown, Path(name).parent)
        return _read_launched(command, shown, Path(name), framework, others, typed)
    document = read_document(name, text)
    if framework is not None:
        return read_as(document, *_named(framework), (), others, typed)
    found = detect(document)
    if found is None:
        return RunFile(document.name, "memplan", "memplan", (), _own_origins(document), (), document.values)
    form, told = found
    return read_as(document, form, None, told, others, typed)


def _inside(section: object, name: str) -> Any:
    """Return a field of a part, or of a mapping; None if it has none."""
    if isinstance(section, Mapping):
        return cast("Mapping[str, Any]", section).get(name)
    return getattr(section, name, None)


def _own_origins(document: Document) -> tuple[FieldOrigin, ...]:
    """Return the line of each field of a run's own file. A section may be one word, of its main field."""
    out: list[FieldOrigin] = []
    for path, value in paths(document.values):
        if not path.startswith("model."):
            out.append(FieldOrigin(_MAIN_FIELDS.get(path, path), value, f"{document.where(path)} {path}"))
    return tuple(out)


def read_command(
    text: str,
    framework: str | None = None,
    companions: Mapping[str, str] | None = None,
    typed: Mapping[str, Any] | None = None,
) -> RunFile:
    """Return the run that a shell command starts, with the files it names in the working directory. See `read_run`."""
    others = {kind: read_document(each) for kind, each in (companions or {}).items()}
    command = shell.launched(text, "the command", _subcommands(), line=0)
    return _read_launched(command, command.shown, None, framework, others, typed)


def is_script(name: str) -> bool:
    """Whether a file's name is that of a shell script or a Makefile."""
    return name.lower().endswith(shell.SUFFIXES) or is_makefile(name)


def is_modelfile(name: str) -> bool:
    """Whether a file's name is that of a Modelfile."""
    lowered = Path(name).name.lower()
    return lowered.partition(".")[0] == "modelfile" or lowered.endswith(".modelfile")


def _read_python(
    name: str,
    framework: str | None,
    flags: Mapping[str, Typed],
    companions: dict[str, Document],
    typed: Mapping[str, Any] | None,
    variables: Mapping[str, str] | None = None,
) -> RunFile:
    """Return the run that a Python script or a notebook starts, with flags and variables of its command line.

    Raises SpecError if its trainer is not the framework's.
    """
    from memplan.frameworks.reading.python_calls import read_script
    from memplan.frameworks.reading.python_script import run_of_script

    try:
        script = read_script(name, {key: flag.value for key, flag in flags.items()})
        run = run_of_script(script)
    except SpecError:
        file = _notebooks_command(name, framework, companions, typed) if name.lower().endswith(".ipynb") else None
        if file is None:
            raise
        return file
    others = {key: flag for key, flag in flags.items() if key not in script.arguments} if run.parses_flags else {}
    form, version = (
        (run.form, version_of(run.form.packages, variables or {})) if framework is None else _named(framework)
    )
    if form.name != run.form.name:
        raise SpecError(f"framework: {run.told[0]} is {run.form.title}'s, not {form.title}'s; leave --framework out")
    file = read_as(run.document, run.form, version, run.told, companions, typed, others, run.command, run.defaults)
    return file._replace(unread=(*file.unread, *run.unread))


def _notebooks_command(
    name: str, framework: str | None, companions: dict[str, Document], typed: Mapping[str, Any] | None
) -> RunFile | None:
    """Return the run that a command in a notebook starts; None if none does. Raises SpecError for one that is wrong."""
    from memplan.frameworks.reading.notebook import MOST_BYTES, shell_script

    shown = printable(Path(name).name, 60)
    try:
        text, places = shell_script(read_text(name, MOST_BYTES), shown)
        command = command_in(text, shown, Path(name).parent)
    except SpecError:
        return None
    place = f"{shown}:{places[command.line]}"
    return _read_launched(command._replace(line=0), place, Path(name), framework, companions, typed)


def manifest_command(text: str, name: str, folder: Path | None = None) -> tuple[shell.Launched, Container]:
    """Return the first command of a Compose file's or a Kubernetes manifest's containers that trains or serves."""
    from memplan.frameworks.reading.manifests import command_of

    return command_of(text, name, _subcommands(), folder)


def read_container(container: Container, name: str) -> RunFile | None:
    """Return the run that a container's command starts, `name` in messages; None if it does not train or serve."""
    try:
        command = shell.launched(container.text, name, _subcommands(), container.variables, container.line)
    except SpecError:
        return None
    return _read_launched(command, name, None, None, {}, None)


def is_manifest(name: str) -> bool:
    """Whether a file is a Compose file, a Kubernetes manifest, or a task of SkyPilot or dstack."""
    return name.lower().endswith((".yaml", ".yml")) and bool(_MANIFEST.search(read_text(name)))


def has_own_keys(name: str) -> bool:
    """Whether a file has a run's keys or its command, so that they can be changed there: no folder, Modelfile, TOML or
    Python."""
    return not (Path(name).is_dir() or is_modelfile(name) or name.lower().endswith((*SCRIPTS, ".toml")))


def command_in(text: str, name: str, folder: Path | None = None) -> shell.Launched:
    """Return the first command of a script or a Makefile that trains or serves. Raises SpecError if there is none."""
    text = recipes_of(text) if is_makefile(name) else text
    return shell.launched(text, name, _subcommands(), folder=folder)


def _subcommands() -> shell.Programs:
    return {program: FORMATS[name].signature.programs[program] for program, name in PROGRAMS.items()}


def _read_launched(
    command: shell.Launched,
    name: str,
    path: Path | None,
    framework: str | None,
    companions: dict[str, Document],
    typed: Mapping[str, Any] | None,
) -> RunFile:
    """Return the run that a command starts: of its flags, and of the file that they name. `name` is the file that has
    the command, as shown, `path` its path, next to which other files are searched; None if the command is typed."""
    command = engines_command(command, _ENGINES)
    form = format_named(PROGRAMS[command.program]) if command.program in PROGRAMS else None
    flags, config = flags_and_config(command, form)
    keys = ("config", "config_file", *flags) if command.line else ()
    document = Document(
        name, path, flags, {tuple(key.split(".")): command.line for key in keys}, written=command.written
    )
    launcher = command.launcher or processes_of(command, form)
    note, models = "a variable that is not set", {each.model for each in FORMATS.values()}
    open_keys = {key for key in unresolved(flags) if key not in models or "$" in str(flags[key]).split("/")[-1]}
    silent = form.silent if form is not None else ()
    left_out = [
        Unread(document.where(key), f"--{key}", note) for key in flags if key in open_keys and key not in silent
    ]
    left_out += of_loops(command, form, document)
    seen = next((name for name in _SEEN if command.variables.get(name)), "")
    several = "," in command.variables.get(seen, "") or command.variables.get(seen) == "all"
    sees_more = (form is None or form.trains) and several and not {"num_processes", "config_file"} & launcher.keys()
    place = f"{name}:{command.line}" if command.line else name
    processes = launcher.get("num_processes")
    if isinstance(processes, str):
        launcher = {key: value for key, value in launcher.items() if key != "num_processes"}
    if isinstance(processes, str) and (typed or {}).get("parallelism.world") is None:
        said = "how many GPUs the machine has" if processes in ("gpu", "auto") else printable(processes, 40)
        left_out.append(Unread(place, "the number of processes", f"{said} is not known here; add --gpus"))
    if launcher:
        companions.setdefault("accelerate", _launch(launcher, command, document))
    resolved = {key: value for key, value in flags.items() if key not in open_keys}
    document = document._replace(values=nested(resolved))
    script = script_of(command, path)
    over = {key: Typed(value, f"{document.where(key)} --{key}") for key, value in resolved.items()}
    has_calls = framework is None or _named(framework)[0].name in _WITH_SCRIPTS
    if script and form is None and has_calls and not config and _MODEL_FLAGS.isdisjoint(command.flags):
        file = _read_python(script, framework, over, companions, typed, command.variables)
        return file._replace(unread=(*file.unread, *left_out))
    if config:
        document = named_document(config, document, "config")
    told = (f"{name}:{command.line} {command.shown}",) if command.line and framework is None else ()
    if framework is not None:
        form = _named(framework)[0]
    elif form is None:
        found = detect(document)
        if found is None:
            unseen = "" if script else command.unseen
            raise SpecError(f"spec: {document.name} names no framework{unseen}; name it with --framework", "spec")
        form, told = found
    version = _named(framework)[1] if framework else version_of(form.packages, command.variables)
    shown = _trainer_in(script) or command.shown
    file = read_as(document, form, version, told, companions, typed, over if config else {}, shown)
    origins = {origin.field: origin for origin in file.origins}
    for variable in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if variable in command.variables and form.trains:
            is_on = "expandable_segments:true" in command.variables[variable].lower()
            origins["loop.expandable_segments"] = FieldOrigin("loop.expandable_segments", is_on, f"{name}: {variable}")
    world = origins.get("parallelism.world")
    if sees_more and (world is None or world.value == 1):
        note = "several GPUs, and no number of processes: one is counted; add --gpus"
        left_out.append(Unread(place, seen, note))
    found = tuple(origins.values())
    return file._replace(name=name, origins=found, fields=sections(found), unread=(*file.unread, *left_out))


def _launch(launcher: Mapping[str, Any], command: shell.Launched, document: Document) -> Document:
    """Return what a launcher says, and the file that it names."""
    launch = shell.launcher_document(launcher, command.line, document.name)
    if "config_file" not in launcher:
        return launch
    file = named_document(str(launcher["config_file"]), document, "config_file")
    names = {key: f"{key}, replaced by the command" for key in launch.values if key in file.values}
    return file._replace(values={**file.values, **launch.values}, names=names)


def _trainer_in(script: str | None) -> str:
    """Return a script's name and the class of its trainer; empty if it has none that is known."""
    if script is None:
        return ""
    from memplan.frameworks.reading.python_calls import read_script
    from memplan.frameworks.reading.python_script import trainer_of

    with suppress(SpecError):
        training = trainer_of(read_script(script))
        return f"{Path(script).name} {training.name}" if training is not None else ""
    return ""


def nested(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return flags with dots as sections: `--limit-mm-per-prompt.image 2`."""
    out: dict[str, Any] = {}
    for key, value in flags.items():
        *parts, name = key.split(".")
        inner = out
        for part in parts:
            deeper: object = inner.get(part)
            inner[part] = inner = cast("dict[str, Any]", deeper) if isinstance(deeper, dict) else {}
        inner[name] = value
    return out


def is_known(name: str) -> bool:
    """Whether a JSON file is a run's or a framework's rather than a model's; False if it cannot be read."""
    try:
        with open_file(Path(name)) as file:
            values: object = json.loads(file.read())
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(values, dict) or _OF_MODELS & values.keys():
        return False
    document = Document(name, None, cast("dict[str, Any]", values), {})
    told = any(form.signature.told_by(document.values) for form in FORMATS.values())
    return told or "model" in document.values or bool(_later(document))


def read_accelerate(name: str, method: str) -> dict[str, Any]:
    """Return the parts of a run with a method that an accelerate config sets, by name. Raises MemplanError."""
    document = read_document(name)
    config = Config(document, "accelerate", {}, {})
    config.set("method.kind", method, why=TYPED)
    trainer.accelerate(config, document)
    trainer.degrees(config)
    if config.launched is not None:
        trainer.lower_precision(config, "bf16", None)
    return sections(tuple(origin for origin in config.found.values() if origin.field != "method.kind"))


def detect(document: Document) -> tuple[RunFormat, tuple[str, ...]] | None:
    """Return the framework whose file it is, and the keys that told; None if it has the fields of a run.

    Raises SpecError if it is neither, or may be of several frameworks.
    """
    values = document.values
    if not values or ("model" in values and values.keys() <= RunSpec.model_fields.keys()):
        return None
    told = {name: form.signature.told_by(values) for name, form in FORMATS.items()}
    for are_general in (False, True):
        candidates = [name for name in told if told[name] and FORMATS[name].signature.is_general == are_general]
        if len(candidates) > 1:
            text = f"may be {' or '.join(FORMATS[name].title for name in candidates)}; name it with --framework"
            raise SpecError(f"spec: {document.name} {text}", "spec")
        later = _later(document)
        if later and (are_general or not candidates):
            raise SpecError(later, "spec")
        if candidates:
            return format_named(candidates[0]), told[candidates[0]]
    if 2 * len(values.keys() & RunSpec.model_fields.keys()) >= len(values):  # others may have a key in common
        return None
    known = ", ".join(form.title for form in FORMATS.values() if form.signature.any_of)
    raise SpecError(f"spec: {document.name} is not a file of {known}, nor a run's; --framework names one", "spec")


def _later(document: Document) -> str:
    """Return why a file that is known is not read as a run; empty if it is not known."""
    for kind, keys in _COMPANIONS.items():
        if any(key in document.values for key in keys):
            return f"spec: {document.name} is {kind}'s config, without a model; add it to a run with --{kind}"
    names = {path for path, _ in paths(document.values)} | document.values.keys()
    for key, title in _LATER.items():
        if key in names:
            return f"{document.where(key)}: {key}: {title} files are not read yet"
    return ""


def _named(name: str) -> tuple[RunFormat, str | None]:
    """Return the framework and the version of NAME or NAME-VERSION."""
    known = [key for key in FORMATS if f"{name.lower()}-".startswith(f"{key}-")]
    key = max(known, key=len, default=name.lower())
    version = name.lower()[len(key) + 1 :].removesuffix("latest")
    if key not in FORMATS:
        raise UnknownNameError("framework", name, FORMATS)
    if version and not version_number(version):
        raise SpecError(f"framework: {name!r:.60} has no version number; write {key}-{_newest(key)}")
    return format_named(key), version or None


def _newest(framework: str) -> str:
    return max(defaults_of(format_named(framework).defaults[0]).read, key=version_number)


def read_as(
    document: Document,
    form: RunFormat,
    asked: str | None = None,
    told: tuple[str, ...] = (),
    companions: Mapping[str, Document] | None = None,
    typed: Mapping[str, Any] | None = None,
    flags: Mapping[str, Typed] | None = None,
    command: str = "",
    own_defaults: Mapping[str, Any] | None = None,
) -> RunFile:
    """Return the run of a framework's file, read as by the `asked` version, or else the newest.

    flags    key -> value of a command that replaces the file's
    command  the program and subcommand that it starts; empty for a file
    own_defaults  key -> default of a script's classes, where the framework's command line has another
    """
    source = RunSource(document, form, asked, told, companions, typed, flags, command, own_defaults)
    every = [defaults_of(name) for name in form.defaults]
    version = every[0].newest_until(asked)
    defaults = defaults_in(form, asked)
    keys = {key for each in every for key in each.keys} | {key.key for key in form.table.keys}
    defaults |= own_defaults or {}
    renamed, old_names = _renamed(document, form, keys)
    document = with_references(renamed, defaults)
    config = Config(document, f"{form.title} {asked or version}", defaults, companions or {})
    config.renamed, config.command = old_names, command
    typed_keys = {key.key: key.fields[0] for key in form.table.keys if key.is_same and key.fields[0] in (typed or {})}
    typed_keys = {key: field for key, field in typed_keys.items() if field != "parallelism.world"}
    config.options = typed or {}
    config.gpus = config.options.get("parallelism.world")
    from_options = {key: Typed(typed[field], TYPED) for key, field in typed_keys.items()} if typed else {}
    config.typed = {**{form.aliases.get(key, key): value for key, value in (flags or {}).items()}, **from_options}
    for key in form.refused:
        if config.get(key) not in (None, False, "false", 0):
            raise config.refuse(key)
    if "model" in config.options:
        config.set("model", config.options["model"], why=TYPED)
    elif (name := config.text(form.model)) is not None:
        trainer.checkpoint(config, name, form.model, form.trains)
    config.read_same(form.table)
    profile = form.profile or profile_of(form.defaults[0], asked or version)
    nearness = "" if profile.endswith(f"-{version}") else "nearest "
    config.set("profile", profile, why=f"the {nearness}profile of {config.title}")  # some rules ask for it
    for rule in (*form.rules, trainer.settle_attention):
        rule(config)
    if "profile" in config.found:  # a typed one is not
        config.found["profile"] = config.found.pop("profile")  # shown last
    if config.value("method.kind") not in ADAPTERS:
        for field in (*_ADAPTER_FIELDS, "method.quantization"):
            config.found.pop(field, None)
    config.unread += unread_keys(config, form, keys)
    origins = tuple(config.found.values())
    unread = tuple(sorted(config.unread, key=lambda each: by_line(each.where)))
    applied = frozenset(field for field in typed_keys.values() if field in config.found)
    return RunFile(document.name, form.name, config.title, told, origins, unread, sections(origins), applied, source)


def defaults_in(form: RunFormat, version: str | None) -> dict[str, Any]:
    """Return the defaults of a framework's version, over those of the frameworks that it builds on."""
    first, *shared = [defaults_of(name) for name in form.defaults]
    parts = [each.defaults[each.newest_until(None)] for each in shared]
    return {key: value for each in (*parts, first.defaults[first.newest_until(version)]) for key, value in each.items()}


def _renamed(document: Document, form: RunFormat, known: Collection[str]) -> tuple[Document, dict[str, str]]:
    """Return the document with old names of keys replaced, and the old name of each key that was."""
    is_deep = any("." in name for pair in form.aliases.items() for name in pair)
    values, lines = dict(paths(document.values) if is_deep else document.values), dict(document.lines)
    old_names: dict[str, str] = {}
    plain_names: dict[str, str] = {}
    for key in [key for key in values if "-" in key or key.startswith("no_")]:  # flags of a command, written in a file
        plain = key.replace("-", "_")
        is_off = plain not in known and plain.startswith("no_") and plain[3:] in known
        plain_names[key] = plain[3:] if is_off else plain
        values[plain_names[key]] = not values.pop(key) if is_off else values.pop(key)
    under = {path: line for path, line in document.lines.items() if path[0] in plain_names}
    lines |= {(plain_names[path[0]], *path[1:]): line for path, line in under.items()}
    for old, new in form.aliases.items():
        if values.get(old) is not None and values.get(new) is None:
            values[new] = values.pop(old)
            start, then = tuple(old.split(".")), tuple(new.split("."))
            at = len(start)
            lines |= {(*then, *path[at:]): line for path, line in document.lines.items() if path[:at] == start}
            old_names[new] = old
    return document._replace(values=nested(values) if is_deep else values, lines=lines), old_names


def profile_of(framework: str, version: str) -> str:
    """Return the framework's newest profile that is not newer than the version; else its oldest."""
    name = f"{framework}-{version}"
    names = () if framework == "transformers" else nearest_versions(name)
    known = known_name(name)
    return known if known in names else next(iter(names), NEWEST["transformers"])


def sections(origins: tuple[FieldOrigin, ...]) -> dict[str, Any]:
    """Return the fields as nested sections, as a run's file has them."""
    return nested({origin.field: origin.value for origin in origins})
