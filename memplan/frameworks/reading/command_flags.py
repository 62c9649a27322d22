"""The flags of a command that trains or serves, as a file's keys: what the environment adds, and what is not known."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from memplan.core.errors import SpecError, printable
from memplan.frameworks.reading.config import Unread, defaults_of
from memplan.frameworks.reading.document import Document, is_there
from memplan.frameworks.reading.run_format import RunFormat
from memplan.frameworks.reading.shell import COUNTED, Launched, is_config


def flags_and_config(command: Launched, form: RunFormat | None) -> tuple[dict[str, Any], str]:
    """Return a command's flags, and the file with a run's keys that it names; empty if it names none.

    A word that is no file is the model's name, as in `vllm serve MODEL`.
    """
    flags = {key: value for key, value in command.flags.items() if form is None or key not in form.processes}
    if form is not None and form.environment is not None:
        known = defaults_of(form.defaults[0]).keys
        for name, value in command.variables.items():
            if name.startswith(form.environment) and (key := name.removeprefix(form.environment).lower()) in known:
                flags.setdefault(key, value)
    config = str(flags.pop("config", flags.pop("job.config_file", "")) or command.config)
    others = [word for word in command.words if not is_config(word)]
    if form is not None and others and form.takes_model:
        flags.setdefault(form.model, others[0])
    return flags, config


def script_of(command: Launched, path: Path | None) -> str | None:
    """Return the Python script that a command starts, if it is there."""
    if not command.path.endswith(".py"):
        return None
    folders = (path.parent if path is not None else Path(), Path())
    return next((str(folder / command.path) for folder in folders if is_there(folder / command.path)), None)


def of_loops(command: Launched, form: RunFormat | None, document: Document) -> Iterator[Unread]:
    """Yield the flags that are others in the runs of the loops around a command, of which the first is counted."""
    flags, config = flags_and_config(command, form)
    for values, again in command.others:
        theirs, file = flags_and_config(again, form)
        differing = [
            key for key, value in {**theirs, "config": file}.items() if value != {**flags, "config": config}.get(key)
        ]
        for key in differing:
            if not _ASIDE.fullmatch(key):
                yield Unread(
                    document.where(key),
                    f"--{printable(key, 60)}",
                    f"the first run of the loop over {values} is counted",
                )


def processes_of(command: Launched, form: RunFormat | None) -> dict[str, Any]:
    """Return how many processes train as a launcher's keys, by the program's own flag or the environment."""
    for name in form.processes if form is not None else ():
        value = str(command.flags.get(name, command.variables.get(name, "")))
        count = value.count(",") + 1 if name == "CUDA_VISIBLE_DEVICES" else int(value) if value.isdecimal() else 0
        nodes = command.variables.get("NNODES", "1")
        count *= int(nodes) if name == "NPROC_PER_NODE" and nodes.isdecimal() else 1
        if count and value:
            several = {"distributed_type": "MULTI_GPU", "num_processes": count, COUNTED: name}
            return several if count > 1 else {}
    return {}


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
