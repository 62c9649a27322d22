"""Set flags of a container's command in a Compose file or a Kubernetes manifest, and nothing else."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from yaml import SafeLoader

from memplan.core.errors import SpecError
from memplan.frameworks.change_table import Value
from memplan.frameworks.patching.script_text import edited_script, new_flag, values_of
from memplan.frameworks.patching.yaml_text import end_of, newline_of
from memplan.frameworks.reading.manifests import Container
from memplan.frameworks.reading.shell import Launched

_KEYS = ("entrypoint", "command", "args", "run", "commands")


def edited_manifest(text: str, command: Launched, container: Container, edits: Mapping[str, Value]) -> str:
    """Return the text with flags of the container's command set to values. Raises SpecError for a flag that the text
    cannot say: one that is taken away or has several values in a list of words, or in a quoted command."""
    for name, value in edits.items():
        words = list(_words(text, container))
        script = next((node for node in words if command.program in node.value and " " in node.value.strip()), None)
        if script is None and len(words) == 1 and re.match("-.* ", words[0].value):  # flags of the image's own program
            script, command = words[0], command._replace(program="")
        if script is None:
            text = _in_list(text, words, command, name, value)
        elif script.style in ("'", '"', ">"):
            raise SpecError(f"the command is quoted or folded in the file, so {name} stays as it is")
        else:
            end = end_of(script, text)
            line = text.count("\n", 0, text.index(command.program, script.start_mark.index)) + 1
            text = edited_script(text[:end], command._replace(line=line), {name: value}) + text[end:]
    return text


def _words(text: str, container: Container) -> Iterator[Any]:
    """Yield the scalar nodes of a container's command."""
    loader: Any = SafeLoader(text)
    documents: list[Any] = []
    while loader.check_node():
        documents.append(loader.get_node())
    node = documents[container.document]
    for name in container.path:
        pairs = node.value if node.id == "mapping" else ()
        node = node.value[int(name)] if node.id == "sequence" else next(v for key, v in pairs if key.value == name)
    for wanted in _KEYS:
        for key, value in node.value:
            if key.value == wanted:
                yield from value.value if value.id == "sequence" else [value]


def _in_list(text: str, words: Sequence[Any], command: Launched, name: str, value: Value) -> str:
    """Return the text with a flag of a command that is a list of words."""
    said = [] if value in (None, True) else shlex.split(values_of(command, name, value))
    if value is None or len(said) > 1 or not words or any(" " in node.value.strip() for node in words):
        raise SpecError(f"the file's words of the command cannot say {name}, which stays as it is")
    word = "".join(said)
    for index, node in enumerate(words):
        flag, equals, _ = node.value.partition("=")
        if not flag.startswith("-") or flag.lstrip("-").replace("-", "_") != name:
            continue
        following = words[index + 1] if not equals and index + 1 < len(words) else None
        if word and following is not None and not following.value.startswith("-"):
            return _replaced(text, following, word)
        return _replaced(text, node, f"{flag}={word}" if word else flag)
    flag = new_flag(command, name).rstrip("= ")
    item = json.dumps(f"{flag}={word}" if word else flag)
    last = words[-1]
    end = end_of(last, text)
    line = text.rfind("\n", 0, last.start_mark.index) + 1
    before = text[line : last.start_mark.index]
    is_block = not before.strip(" -")
    return f"{text[:end]}{newline_of(text) + before if is_block else ', '}{item}{text[end:]}"


def _replaced(text: str, node: Any, word: str) -> str:
    """Return the text with another word in place of a scalar, in its quotes."""
    written = word if node.style is None else json.dumps(word) if node.style == '"' else f"'{word}'"
    return text[: node.start_mark.index] + written + text[end_of(node, text) :]
