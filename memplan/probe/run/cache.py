"""Traces kept on disk, so that a question asked again is answered at once.

An entry is JSON, compressed, named by a digest of all that decides it, and has that in it too; one that is not what it
should be counts as none, and is made again. The oldest go where all together are too large.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from memplan.core.errors import MemplanError
from memplan.core.units import MIB
from memplan.core.user_folders import caches
from memplan.core.version import __version__
from memplan.estimate.answer import KINDS
from memplan.probe.libraries import versions
from memplan.probe.run.trace import Traced, read
from memplan.spec.run import RunSpec

_ALL, _ONE = 256 * MIB, 512 * MIB  # bytes of all entries as they lie there, and of one as it is read


def key_of(run: RunSpec, config: Mapping[str, Any], capability: tuple[int, int], steps: int) -> dict[str, Any]:
    """All that decides a trace, in JSON's types: the config, the run without its card's name, the kind of card, the
    libraries' versions, and memplan's own with a digest of the code that traces."""
    return {
        "config": config,
        "run": run.model_dump(mode="json", exclude={"model", "gpu"}),
        "capability": list(capability),
        "steps": steps,
        "versions": versions(),
        "memplan": [__version__, _code()],
    }


@cache
def _code() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(__file__).parents[1].rglob("*.*") if path.suffix in (".py", ".cpp")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def found(run: RunSpec, key: Mapping[str, Any]) -> Traced | None:
    """The trace that is kept for `key`; None where there is none that can be used."""
    try:
        path = _path(key)
        text = _unpacked(path.read_bytes())
        with contextlib.suppress(OSError):
            path.touch()  # it is used, so not among the oldest
        entry = json.loads(text)
        if _text(entry["key"]) != _text(key):
            return None
        traced = read(run, entry["traced"])
        _check(traced)
    except (OSError, MemplanError, zlib.error, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return traced


def keep(key: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
    """Keep what the process that traces answered. Where that cannot be written nothing is kept, and nothing is said."""
    text = json.dumps({"key": key, "traced": answer}).encode()
    packed = zlib.compress(text, 5)
    if len(text) > _ONE or len(packed) > _ALL:
        return
    with contextlib.suppress(OSError, MemplanError):
        path = _path(key)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        handle, made = tempfile.mkstemp(dir=path.parent, suffix=".new")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(packed)
            Path(made).replace(path)
        finally:
            Path(made).unlink(missing_ok=True)
        _bound(path.parent)


def _bound(folder: Path) -> None:
    """Remove the entries that were used longest ago, until the others are few enough."""
    entries = [(stat.st_mtime, stat.st_size, path) for path in folder.iterdir() for stat in (path.stat(),)]
    size = sum(bytes_ for _, bytes_, _ in entries)
    for _, bytes_, path in sorted(entries):
        if size <= _ALL:
            return
        path.unlink(missing_ok=True)
        size -= bytes_


def _path(key: Mapping[str, Any]) -> Path:
    return caches() / "traces" / f"{hashlib.sha256(_text(key).encode()).hexdigest()}.json.z"


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _unpacked(packed: bytes) -> bytes:
    """As many bytes as an entry may have: of one that is larger, or cut short, what there is is no JSON."""
    return zlib.decompressobj().decompress(packed, _ONE)


def _check(traced: Traced) -> None:
    """Raise ValueError or TypeError for what is no trace: storages are made and freed once, phases lie in events."""
    alive = [False] * len(traced.storages)
    made = 0
    for event in traced.events:
        if event >= 0:
            if event != made:
                raise ValueError("a storage is made out of turn")
            alive[event] = True
            made += 1
        else:
            if not alive[~event]:
                raise ValueError("a storage is freed that is not there")
            alive[~event] = False
    if made != len(traced.storages) or not traced.phases:
        raise ValueError("a storage is never made, or there is no phase")
    for s in traced.storages:
        if not (0 <= s.born < s.died <= len(traced.events) and s.bytes >= 0 and all(n >= 0 for n in s.shape)):
            raise ValueError("a storage is of no size or time")
        if s.kind not in KINDS:
            raise ValueError("a storage is of no kind")
        "".join((s.dtype, s.op, s.module, s.name))  # a TypeError where one is no text
    for p in traced.phases:
        if not (0 <= p.start <= p.end <= len(traced.events) and p.peak >= 0 and p.step >= 0):
            raise ValueError("a phase is of no time")
        if not 0 <= p.peak_at < len(traced.events):
            raise ValueError("a peak is nowhere")
    if traced.trainable < 0 or traced.parameters < 1 or (traced.active or 0) < 0:
        raise ValueError("no model")
    "".join((traced.built, *traced.notes, *traced.versions.values()))
