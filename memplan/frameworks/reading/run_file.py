"""Read a run's file: which framework's it is, and the run that the framework would start."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, cast

from memplan.catalogue.methods.methods import ADAPTERS
from memplan.catalogue.profiles.profiles import PROFILES
from memplan.core.errors import SpecError, UnknownNameError, nearest, printable
from memplan.core.records import NamedTuple
from memplan.frameworks.reading import axolotl, llamafactory, shell, trainer, trl
from memplan.frameworks.reading.config import TYPED, Config, FieldOrigin, Typed, Unread, defaults_of, version_number
from memplan.frameworks.reading.document import Document, named_document, paths, read_document
from memplan.frameworks.reading.run_format import RunFormat
from memplan.spec.file import read_text
from memplan.spec.run import NEWEST, RunSpec

FORMATS = {each.name: each for each in (axolotl.FORMAT, llamafactory.FORMAT, trl.FORMAT, trl.TRAINER)}
# Keys of files that are known, but not read as a run.
_COMPANIONS = {"accelerate": ("distributed_type", "compute_environment"), "deepspeed": ("zero_optimization",)}
_LATER = {
    "ms-swift": ("tuner_type", "train_type", "swift_type", "vit_lr", "lora_type"),
    "LLaMA-Factory v1": ("model_class",),
    "torchtune": ("tokenizer._component_", "model._component_"),
    "LitGPT": ("checkpoint_dir",),
    "NeMo Automodel": ("recipe", "step_scheduler"),
    "verl": ("actor_rollout_ref",),
    "Unsloth": ("training.training_type", "lora.lora_r"),
}
# Beginnings of keys that memory does not depend on, which recipes have and the frameworks themselves do not.
_SILENT = ("chat_template", "dataset", "hub_", "overwrite_output_dir", "system_prompt", "wandb", "warmup")
_PROGRAMS = {"trl": "trl", "llamafactory-cli": "llamafactory", "axolotl": "axolotl", "axolotl.cli.train": "axolotl"}
_OF_MODELS = {"model_type", "architectures", "hidden_size"}  # keys of config.json
_ALIKE = 0.6  # of the letters of a misspelt key are in the one that is meant
_ADAPTER_FIELDS = tuple(
    f"method.{name}" for name in ("rank", "alpha", "targets", "dropout", "modules_to_save", "adapter_dtype", "options")
)


class RunFile(NamedTuple):
    """A run's file as it was read.

    framework  the framework's name, `memplan` for a run's own fields
    title      the framework and version, as shown
    told       the keys that told the framework
    origins    the fields that the file, the framework or a rule sets, and why
    unread     keys that may take memory and are not understood
    fields     the run's fields as sections
    typed      fields whose typed value is in `fields` already
    """

    name: str
    framework: str
    title: str
    told: tuple[str, ...]
    origins: tuple[FieldOrigin, ...]
    unread: tuple[Unread, ...]
    fields: Mapping[str, Any]
    typed: frozenset[str] = frozenset()

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
        return tuple(f"{each.key} ({each.where}): {each.note}" for each in self.unread)

    def origins_of(self, run: RunSpec) -> tuple[FieldOrigin, ...]:
        """Return the origins of a run that options have changed."""
        out: list[FieldOrigin] = []
        for origin in self.origins:
            value: Any = run
            for part in origin.field.split("."):
                value = getattr(value, part, None)
            value = list(cast("tuple[str, ...]", value)) if isinstance(value, tuple) else value
            out.append(origin if value == origin.value else FieldOrigin(origin.field, value, TYPED))
        return tuple(out)


def read_run(
    name: str,
    framework: str | None = None,
    companions: Mapping[str, str] | None = None,
    typed: Mapping[str, Any] | None = None,
) -> RunFile:
    """Return the run of a file.

    framework   NAME or NAME-VERSION; None to tell it by the file's keys
    companions  files given along with it, by kind: `accelerate`, `deepspeed`
    typed       field -> value that replaces the file's before the framework's rules see it: the number of GPUs, and
                fields that one key sets

    Raises SpecError for a file that is no framework's, or several frameworks', or that has a value not supported.
    """
    others = {kind: read_document(each) for kind, each in (companions or {}).items()}
    if name.lower().endswith(shell.SUFFIXES):
        return _read_script(name, framework, others, typed)
    document = read_document(name)
    if framework is not None:
        return read_as(document, *_named(framework), (), others, typed)
    found = detect(document)
    if found is None:
        return RunFile(document.name, "memplan", "memplan", (), (), (), document.values)
    form, told = found
    return read_as(document, form, None, told, others, typed)


def _read_script(
    name: str, framework: str | None, companions: dict[str, Document], typed: Mapping[str, Any] | None
) -> RunFile:
    """Return the run that a shell script starts: of its flags, and of the file that they name."""
    script = printable(Path(name).name, 60)
    command = shell.launched(read_text(name), script)
    lines = {(key,): command.line for key in ("config", "config_file", *command.flags)}
    document = Document(script, Path(name), command.flags, lines)
    if command.launcher:
        launch = shell.launcher_document(command, script)
        if "config_file" in command.launcher:
            file = named_document(str(command.launcher["config_file"]), document, "config_file")
            launch = file._replace(values={**file.values, **command.launcher})
        companions.setdefault("accelerate", launch)
    left_out = [
        Unread(document.where(key), f"--{key}", "a variable that is not set") for key in shell.unresolved(command.flags)
    ]
    resolved = {key: value for key, value in command.flags.items() if key not in {each.key[2:] for each in left_out}}
    document = document._replace(values=resolved)
    flags: dict[str, Typed] = {}
    if command.config:
        flags = {key: Typed(value, f"{document.where(key)} --{key}") for key, value in resolved.items()}
        document = named_document(command.config, document, "config")
    by_program = _PROGRAMS.get(command.program)
    if framework is not None:
        form, version, told = *_named(framework), ()
    elif by_program is not None:
        form, version, told = FORMATS[by_program], None, (f"{script}:{command.line} {command.program}",)
    else:
        found = detect(document)
        if found is None:
            raise SpecError(f"spec: {document.name} names no framework; name it with --framework", "spec")
        form, told = found
        version = None
    file = read_as(document, form, version, told, companions, typed, flags)
    origins = {origin.field: origin for origin in file.origins}
    for variable in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if variable in command.variables:
            is_on = "expandable_segments:true" in command.variables[variable].lower()
            origins["loop.expandable_segments"] = FieldOrigin(
                "loop.expandable_segments", is_on, f"{script}: {variable}"
            )
    found = tuple(origins.values())
    return file._replace(name=script, origins=found, fields=sections(found), unread=(*file.unread, *left_out))


def is_known(name: str) -> bool:
    """Whether a JSON file is a run's or a framework's rather than a model's; False if it cannot be read."""
    try:
        values: object = json.loads(Path(name).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(values, dict) or _OF_MODELS & values.keys():
        return False
    document = Document(name, None, cast("dict[str, Any]", values), {})
    told = any(form.told_by(document.values) for form in FORMATS.values())
    return told or "model" in document.values or bool(_later(document))


def read_accelerate(name: str, method: str) -> dict[str, Any]:
    """Return the parts of a run with a method that an accelerate config sets, by name.

    Raises SpecError or ConfigError.
    """
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
    told = {name: form.told_by(values) for name, form in FORMATS.items()}
    for are_general in (False, True):
        candidates = [name for name in told if told[name] and FORMATS[name].is_general == are_general]
        if len(candidates) > 1:
            text = f"may be {' or '.join(FORMATS[name].title for name in candidates)}; name it with --framework"
            raise SpecError(f"spec: {document.name} {text}", "spec")
        later = _later(document)
        if later and (are_general or not candidates):
            raise SpecError(later, "spec")
        if candidates:
            return FORMATS[candidates[0]], told[candidates[0]]
    if values.keys() & RunSpec.model_fields.keys():
        return None
    known = ", ".join(form.title for form in FORMATS.values())
    raise SpecError(f"spec: {document.name} is not a file of {known}, nor a run's; --framework names one", "spec")


def _later(document: Document) -> str:
    """Return why a file that is known is not read as a run; empty if it is not known."""
    for kind, keys in _COMPANIONS.items():
        if any(key in document.values for key in keys):
            return f"spec: {document.name} is {kind}'s config, without a model; add it to a run with --{kind}"
    names = {path for path, _ in paths(document.values)} | document.values.keys()
    for title, keys in _LATER.items():
        key = next((key for key in keys if key in names), None)
        if key is not None:
            return f"{document.where(key)}: {key}: {title}'s files are not read yet"
    return ""


def _named(name: str) -> tuple[RunFormat, str | None]:
    """Return the framework and the version of NAME or NAME-VERSION."""
    key, _, version = name.lower().partition("-")
    if key not in FORMATS:
        raise UnknownNameError("framework", name, FORMATS)
    if version and not version_number(version):
        raise SpecError(f"framework: {name!r:.60} has no version number; write {key}-{_newest(key)}")
    return FORMATS[key], version or None


def _newest(framework: str) -> str:
    return max(defaults_of(FORMATS[framework].defaults[0]).read, key=version_number)


def read_as(
    document: Document,
    form: RunFormat,
    asked: str | None = None,
    told: tuple[str, ...] = (),
    companions: Mapping[str, Document] | None = None,
    typed: Mapping[str, Any] | None = None,
    flags: Mapping[str, Typed] | None = None,
) -> RunFile:
    """Return the run of a framework's file, read as by the `asked` version, or else the newest.

    flags  key -> value of a command that replaces the file's
    """
    every = [defaults_of(name) for name in form.defaults]
    version = every[0].newest_until(asked)
    shared = [each.defaults[each.newest_until(None)] for each in every[1:]]
    defaults = {key: value for each in (*shared, every[0].defaults[version]) for key, value in each.items()}
    document, old_names = _renamed(document, form)
    config = Config(document, f"{form.title} {asked or version}", defaults, companions or {})
    config.renamed = old_names
    typed_keys = {key.key: key.fields[0] for key in form.table.keys if key.is_same and key.fields[0] in (typed or {})}
    typed_keys = {key: field for key, field in typed_keys.items() if field != "parallelism.world"}
    config.gpus = (typed or {}).get("parallelism.world")
    from_options = {key: Typed(typed[field], TYPED) for key, field in typed_keys.items()} if typed else {}
    config.typed = {**{form.aliases.get(key, key): value for key, value in (flags or {}).items()}, **from_options}
    for key in form.refused:
        if config.get(key) not in (None, False, "false", 0):
            raise config.refuse(key)
    if config.text(form.model) is not None:
        config.set("model", config.text(form.model), form.model)
    config.read_same(form.table)
    for rule in form.rules:
        rule(config)
    if config.value("method.kind") not in ADAPTERS:
        for field in (*_ADAPTER_FIELDS, "method.quantization"):
            config.found.pop(field, None)
    profile = profile_of(form.defaults[0], asked or version)
    nearness = "" if profile.endswith(f"-{version}") else "nearest "
    config.set("profile", profile, why=f"the {nearness}profile of {config.title}")
    keys = {key for each in every for key in each.keys} | {key.key for key in form.table.keys}
    config.unread += _unread(config, form, keys)
    origins = tuple(config.found.values())
    unread = tuple(sorted(config.unread, key=lambda each: each.where))
    applied = frozenset(field for field in typed_keys.values() if field in config.found)
    return RunFile(document.name, form.name, config.title, told, origins, unread, sections(origins), applied)


def _renamed(document: Document, form: RunFormat) -> tuple[Document, dict[str, str]]:
    """Return the document with old names of keys replaced, and the old name of each key that was."""
    values, lines = dict(document.values), dict(document.lines)
    old_names: dict[str, str] = {}
    for old, new in form.aliases.items():
        if values.get(old) is not None and values.get(new) is None:
            values[new] = values.pop(old)
            lines |= {(new, *path[1:]): line for path, line in document.lines.items() if path[0] == old}
            old_names[new] = old
    return document._replace(values=values, lines=lines), old_names


def profile_of(framework: str, version: str) -> str:
    """Return the framework's newest profile that is not newer than the version; else its oldest."""
    if framework == "transformers":
        return NEWEST["transformers"]
    names = [each.name for each in PROFILES if each.name.startswith(f"{framework}-")]
    numbers = {name: version_number(name.partition("-")[2]) for name in names}
    older = [name for name in names if numbers[name] <= version_number(version)]
    return max(older, key=numbers.__getitem__) if older else min(names, key=numbers.__getitem__)


def _unread(config: Config, form: RunFormat, known: Collection[str]) -> Iterator[Unread]:
    """Yield the keys that may take memory and that no rule read: known ones that matter, and unknown ones."""
    for path in config.left():
        top = path.partition(".")[0]
        value = config.document.values[top]
        if top in form.matter:
            if value not in (False, "false", 0):
                yield Unread(config.document.where(path), path, f"{form.matter[top]}, not supported yet")
        elif top not in known and not top.startswith(_SILENT):
            near = nearest(top, known, 1)
            hint = f"; did you mean {near[0]}?" if near and _alike(top, near[0]) else ""
            yield Unread(config.document.where(path), path, f"unknown key of {form.title}{hint}")


def _alike(a: str, b: str) -> bool:
    """Whether two keys share most of their letters, in order."""
    return SequenceMatcher(None, a, b).ratio() > _ALIKE


def sections(origins: tuple[FieldOrigin, ...]) -> dict[str, Any]:
    """Return the fields as nested sections, as a run's file has them."""
    out: dict[str, Any] = {}
    for origin in origins:
        *parts, name = origin.field.split(".")
        inner = out
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[name] = origin.value
    return out
