"""The keys of a framework's file that may take memory and that no rule read."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from memplan.core.errors import misspelt
from memplan.frameworks.reading.config import Config, Unread, defaults_of
from memplan.frameworks.reading.run_format import RunFormat
from memplan.spec.options import FIELDS, flag

# Beginnings of keys that memory does not depend on, which recipes have and the frameworks themselves do not: `x-` of
# sections that are only there for their anchors.
_SILENT = ("x_", "x-", "chat_template", "dataset", "hub_", "overwrite_output_dir", "system_prompt", "wandb", "warmup")
_DEGREES = "its GPUs"  # over which something is divided, unless it is 1


def unread_keys(config: Config, form: RunFormat, known: Collection[str]) -> Iterator[Unread]:
    """Yield the keys that may take memory and that no rule read: known ones that matter, and unknown ones."""
    sections = {key.rpartition(".")[0] for key in defaults_of(form.defaults[0]).keys if "." in key}
    for path in config.left():
        top = path.partition(".")[0]
        matter = form.matter.get(path) or form.matter.get(top)
        if matter is not None:
            # a key with a dot of its own is not in the section
            values = (config.document.values.get(top), config.said(path))
            off = ("false", "0", "1") if matter == _DEGREES else ("false", "0")
            if not any(str(value).lower() in off for value in values):
                yield Unread(config.where(path), path, f"{matter}, not supported yet")
        elif (name := _name(path, sections)) not in known and not {top, path} & set(form.silent):
            if top.startswith(_SILENT):
                continue
            start, dot, last = name.rpartition(".")
            near = misspelt(last, [key[len(start + dot) :] for key in known if key.rpartition(".")[0] == start])
            where = config.where(path)
            is_own = name in FIELDS and not by_line(where)[1]  # of a command that is typed
            own = f"; memplan's own {flag(name)} stands in front of --" if is_own else ""
            hint = f"; did you mean {start}{dot}{near}?" if near and not own else own
            yield Unread(where, path, f"unknown key of {form.title}{hint}")


def by_line(where: str) -> tuple[str, int]:
    """Return a file and a line, to sort by."""
    name, _, line = where.rpartition(":")
    return (name, int(line)) if line.isdecimal() else (where, 0)


def _name(path: str, sections: Collection[str]) -> str:
    """Return the part of a key's path by which it is known: one name, two in a section, all where sections nest."""
    if path.partition(".")[0] in {key.partition(".")[0] for key in sections if "." in key}:
        return path
    top, _, rest = path.partition(".")
    return f"{top}.{rest.partition('.')[0]}" if rest and top in sections else top
