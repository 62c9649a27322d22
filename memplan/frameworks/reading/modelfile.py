"""Ollama's Modelfile, which llama.cpp serves.

Source: Ollama's documentation, Modelfile: FROM, PARAMETER, ADAPTER; parser/parser.go.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from memplan.core.errors import SpecError, printable
from memplan.frameworks.reading import trainer
from memplan.frameworks.reading.config import Config, Rule
from memplan.frameworks.reading.document import Document, is_there
from memplan.frameworks.reading.serving import GGUF, request, serves
from memplan.spec.file import read_text

_INSTRUCTIONS = ("from", "parameter", "template", "system", "adapter", "license", "message", "requires", "renderer")
_MORE = ("parser", "draft")
# Parameters of sampling and of the host.
_SILENT = frozenset(
    (
        *("mirostat", "mirostat_eta", "mirostat_tau", "repeat_last_n", "repeat_penalty", "temperature", "seed"),
        *("stop", "num_predict", "top_k", "top_p", "min_p", "tfs_z", "typical_p", "num_keep", "presence_penalty"),
        *("frequency_penalty", "penalize_newline", "num_thread", "numa", "use_mmap", "use_mlock", "low_vram"),
        *("f16_kv", "vocab_only", "logits_all"),
    )
)
_TAGGED = re.compile(  # llama3.1:8b-instruct-q8_0
    r"(?P<family>[a-z]+)-?(?P<version>[\d.]*)(?P<more>[\w.-]*):(?P<size>\d[\w.]*[bm])(?P<rest>.*)"
)


def read_modelfile(name: str) -> Document:
    """Return the parameters of a Modelfile. Raises SpecError with the line."""
    shown = printable(Path(name).name, 60)
    values: dict[str, Any] = {}
    lines: dict[tuple[str, ...], int] = {}
    for number, instruction, text in _instructions(read_text(name)):
        key, value = instruction, text
        if instruction == "parameter":
            key, _, value = text.partition(" ")
        if instruction not in (*_INSTRUCTIONS, *_MORE):
            raise SpecError(f"{shown}:{number}: {printable(instruction, 40)} is not an instruction of a Modelfile")
        if key in ("from", "adapter", "draft") or (instruction == "parameter" and key not in _SILENT):
            values[key], lines[(key,)] = value.strip().strip('"'), number
    if "from" not in values:
        raise SpecError(f"{shown} has no FROM, which names the model")
    return Document(shown, Path(name), values, lines)


def _instructions(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield each instruction: its line, its name in lower case, and the rest; not the lines of a long text."""
    is_text = False
    for number, line in enumerate(text.splitlines(), 1):
        opens = line.count('"""') % 2 == 1
        if not is_text and line.strip() and not line.lstrip().startswith("#"):
            name, _, rest = line.strip().partition(" ")
            yield number, name.lower(), rest.strip()
        is_text ^= opens


def _model(config: Config) -> None:
    """FROM names a GGUF file, a repository on the Hub, or a model and a tag of Ollama's library."""
    name = config.text("from") or ""
    folder = config.document.path.parent if config.document.path is not None else Path()
    repository, _, tag = name.partition(":")
    if is_there(folder / name) and ("/" in name or name.endswith(".gguf")):
        trainer.set_model(config, str(folder / name), "from")
    elif repository.startswith(("hf.co/", "huggingface.co/")):
        trainer.set_model(config, repository.partition("/")[2], "from")
        if GGUF.fullmatch(tag):
            config.set("serving.weights", tag, "from")
    elif "/" in name and not tag:
        trainer.checkpoint(config, name, "from", trains=False)
    else:
        _library(config, name)


def _library(config: Config, name: str) -> None:
    match = _TAGGED.fullmatch(name.lower())
    known = trainer.card_of(match["family"], match["version"], match["size"]) if match and not match["more"] else None
    if "model" not in config.options and known is None:
        raise config.error("from", f"{name!r:.60} is not known here; write memplan MODEL --spec {config.document.name}")
    trainer.set_model(config, known, "from", why="assumed to be Ollama's")
    stored = match["rest"].rpartition("-")[2] if match else ""
    if GGUF.fullmatch(stored):
        config.set("serving.weights", stored.upper(), "from")
    else:
        config.set("serving.weights", "Q4_K_M", "from", why="assumed: Ollama's usual format")


def _settings(config: Config) -> None:
    layers = config.whole("num_gpu")
    if layers is not None and layers >= 0:
        config.set("serving.gpu_layers", layers, "num_gpu")
    if config.value("serving.max_model_len") is None:
        why = "assumed: num_ctx is not set, so that the card decides; as long as a request"
        config.found.pop("serving.max_model_len", None)
        config.set("serving.max_num_seqs", 1, why=why)


RULES: Mapping[str, tuple[Rule, ...]] = {
    "ollama": (serves, _model, _settings, request),
}
