"""A change of a run as a patch of the run's file: the keys to set, and the run that the patched file gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import unified_diff
from pathlib import Path
from typing import Any, cast

from memplan.core.errors import SpecError
from memplan.core.records import NamedTuple
from memplan.frameworks.change_table import Value, differing, field, value_of
from memplan.frameworks.patching.json_text import edited_json
from memplan.frameworks.patching.manifest_text import edited_manifest
from memplan.frameworks.patching.script_text import edited_script, with_processes
from memplan.frameworks.patching.yaml_text import edited_yaml
from memplan.frameworks.reading import shell
from memplan.frameworks.reading.config import defaults_of, shown
from memplan.frameworks.reading.document import parsed
from memplan.frameworks.reading.manifests import Container
from memplan.frameworks.reading.run_file import (
    RunFile,
    command_in,
    defaults_in,
    is_manifest,
    is_script,
    manifest_command,
)
from memplan.frameworks.reading.run_format import format_named
from memplan.spec.base import Part
from memplan.spec.file import read_text, spec_with_lines
from memplan.spec.run import RunSpec

_LENGTH = "batch.sequence"
_Path = tuple[str, ...]
_Edits = dict[_Path, Value]


class Original(NamedTuple):
    """A run's file that is to be patched.

    name   its path, as typed
    text   its text
    file   as it was read
    run    the run that it gives
    read   returns the run that another text of the file gives; raises MemplanError
    """

    name: str
    text: str
    file: RunFile
    run: RunSpec
    read: Callable[[str], RunSpec]


class Patched(NamedTuple):
    """A file's new text, and the run that it gives."""

    text: str
    run: RunSpec


def original_of(name: str, file: RunFile, read: Callable[[str], RunSpec]) -> Original:
    """Return the file to patch. Raises MemplanError if it cannot be read."""
    text = read_text(name)
    return Original(name, text, file, read(text), read)


def patched(original: Original, wanted: RunSpec, fields: Iterable[str]) -> Patched:
    """Return the file with the keys that turn its run into `wanted`.

    fields  fields that must be as wanted, whether the file's run has them so already or not

    A framework's rules may set other fields in consequence, so the new text is read again: the run returned is the one
    that it gives. A length of rows is the longest that a key can say. Raises SpecError if a field of `wanted` is not
    what the file says then.
    """
    edits, exports = _edits(original, wanted)
    world, before = wanted.parallelism.world, original.run.parallelism.world
    if world != before and is_command(original) and format_named(original.file.framework).trains:
        original = original._replace(text=with_processes(original.text, world, before))
    new = _read(original, edits, exports)
    length, longest = new.run.batch.sequence, wanted.batch.sequence
    path = next(_keys_of(original, _LENGTH, edits), None) if length != longest else None
    if path is not None:
        edits[path] = _solved(original, edits, exports, path, length, longest)
        new = _read(original, edits, exports)
    for name in dict.fromkeys((*differing(original.run, wanted), *fields)):
        value = value_of(wanted, name)
        is_rounded = path is not None and name == _LENGTH and new.run.batch.sequence < longest
        if value_of(new.run, name) != value and not is_rounded:
            raise SpecError(f"no key of {original.file.title} sets {name} to {shown(value)}")
    return new


def diff(name: str, before: str, after: str) -> str:
    """Return the change of a file as a unified diff, which `patch -p0` applies."""
    lines = unified_diff(before.splitlines(keepends=True), after.splitlines(keepends=True), name, name)
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def _edits(original: Original, changed: RunSpec) -> tuple[_Edits, list[str]]:
    """Return the keys to set, and the lines of a shell script to add above its command."""
    if original.file.is_own:
        return dict(_own_edits(_values(original), original.run, changed)), []
    form = format_named(original.file.framework)
    defaults = defaults_in(form, original.file.title.rpartition(" ")[2])
    known = {part for name in form.defaults for key in defaults_of(name).keys for part in (key, key.partition(".")[0])}
    values = _values(original)
    old_names = {
        new: old for old, new in form.aliases.items() if values.get(old) is not None and values.get(new) is None
    }
    edits: _Edits = {}
    exports: list[str] = []
    for key in form.table.keys:
        of = key.value or field(key.fields[0])
        old, new = of(original.run), of(changed)
        if old == new:
            continue
        if key.place == "shell" and str(new).startswith("export "):
            exports.append(str(new))
        if key.place != "yaml" or not {key.key, key.key.partition(".")[0]} & known:
            continue
        name = old_names.get(key.key, key.key)
        path = (name,) if name in values or is_command(original) else tuple(name.split("."))
        is_default = new is not None and new == defaults.get(key.key)
        value = _at(values, path)
        if is_default and value is None and not is_command(original):
            continue
        edits |= _leaves(path, old, new, value, original)
        edits |= {(other,): None for other in form.replaces.get(key.key, ()) if other in values}
    return edits, exports


def _at(values: Mapping[str, Any], path: _Path) -> Any:
    """Return a value inside sections; None if there is none."""
    value: Any = values
    for name in path:
        value = cast("Mapping[str, Any]", value).get(name) if isinstance(value, Mapping) else None
    return value


def is_command(original: Original) -> bool:
    """Whether the file has a command whose flags are the run's keys: a script or a manifest."""
    return is_script(original.name) or is_manifest(original.name)


def _command(original: Original, text: str) -> tuple[shell.Launched, Container | None]:
    """Return the command in a script, or in a container of a manifest."""
    if is_script(original.name):
        return command_in(text, original.file.name, Path(original.name).parent), None
    return manifest_command(text, original.file.name, Path(original.name).parent)


def _values(original: Original) -> Mapping[str, Any]:
    """Return the file's values; of a script, its flags."""
    if is_command(original):
        flags = _command(original, original.text)[0].flags
        return {key: parsed(value) if isinstance(value, str) else value for key, value in flags.items()}
    return spec_with_lines(original.text, original.name)[0]


def _leaves(path: _Path, old: Value, new: Value, value: Any, original: Original) -> Iterator[tuple[_Path, Value]]:
    """Yield the edits that turn a key's value into another: of a section that the file has, only what changes."""
    if isinstance(value, str) and isinstance(new, Mapping):
        raise SpecError(f"{path[-1]} names the file {value!r:.60}, which stays as it is")
    if isinstance(value, Mapping) and isinstance(new, Mapping):
        before = cast("Mapping[str, Value]", old if isinstance(old, Mapping) else {})
        section = cast("Mapping[str, Any]", value)
        for name in {**before, **new}:
            if before.get(name) != new.get(name):
                yield from _leaves((*path, name), before.get(name), new.get(name), section.get(name), original)
    elif isinstance(value, list) and old is None and isinstance(new, tuple):
        items = cast("list[Value]", value)
        yield path, [*items, *(item for item in new if item not in items)]
    elif new is not None or value is not None:
        yield path, new


def _own_edits(values: Mapping[str, Any], asked: RunSpec, changed: RunSpec) -> Iterator[tuple[_Path, Value]]:
    """Yield the edits of a file of memplan's own fields."""
    for name in differing(asked, changed):
        part, *rest = name.split(".")
        value = value_of(changed, name)
        if rest and not isinstance(values.get(part, {}), Mapping):  # a section given as one word
            section = getattr(changed, part)
            yield (part,), section.model_dump(mode="json", exclude_defaults=True)
        elif rest[:1] == ["quantization"] and changed.method.quantization is None:
            yield ("method", "quantization"), None
        else:
            yield (part, *rest), value.model_dump(mode="json") if isinstance(value, Part) else value


def _read(original: Original, edits: _Edits, exports: list[str]) -> Patched:
    """Return the file with the edits, and the run that it gives. Raises SpecError if other values have changed."""
    if is_command(original):
        command, container = _command(original, original.text)
        sections = _with(_values(original), edits)
        flags = {path[0]: cast(Value, sections.get(path[0])) for path in edits}
        if container is None:
            text = edited_script(original.text, command, flags, exports)
        else:
            text = edited_manifest(original.text, command, container, flags)
        expected, new = {**command.flags, **flags}, _command(original, text)[0].flags
    else:
        text = (edited_json if original.name.lower().endswith(".json") else edited_yaml)(original.text, edits)
        expected, new = _with(_values(original), edits), spec_with_lines(text, original.name)[0]
    changed = {path[0] for path in edits}
    other = next((key for key in {**expected, **new} if key not in changed and expected.get(key) != new.get(key)), None)
    if other is not None:
        raise SpecError(f"{other} would change too")
    return Patched(text, original.read(text))


def _with(values: Mapping[str, Any], edits: Mapping[_Path, Value]) -> dict[str, Any]:
    """Return nested values with the edits."""
    out = dict(values)
    for (name, *rest), value in edits.items():
        if rest:
            inner: Any = out.get(name)
            out[name] = _with(cast("dict[str, Any]", inner) if isinstance(inner, dict) else {}, {(*rest,): value})
        elif value is None:
            out.pop(name, None)
        else:
            out[name] = value
    return out


def _keys_of(original: Original, name: str, edits: _Edits) -> Iterator[_Path]:
    """Yield the edited keys of a framework that say a field."""
    if original.file.is_own:
        return
    form = format_named(original.file.framework)
    names = {key.key for key in form.table.keys if key.is_same and key.fields[0] == name}
    yield from (path for path in edits if form.aliases.get(path[0], path[0]) in names)


def _solved(original: Original, edits: _Edits, exports: list[str], path: _Path, once: int, wanted: int) -> int:
    """Return the largest value of a key for which rows are at most as long as wanted.

    once  their length for the key's value in the edits; it grows by a constant with the key
    """
    at = cast(int, edits[path])
    twice = _read(original, {**edits, path: 2 * at}, exports).run.batch.sequence
    solved = at + (wanted - once) * at // (twice - once) if twice > once else 0
    if solved < 1:
        raise SpecError(f"no key of {original.file.title} sets {_LENGTH} to {wanted}")
    return solved
