"""Cache of traces on disk, so that the same question is answered at once the next time.

An entry is compressed JSON, named by a digest of its key and containing the key. Invalid entries count as missing and
are traced again. When the cache is too large, the least recently used entries are removed.
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
from memplan.probe.run.trace import TracedRun, read
from memplan.spec.run import RunSpec

_CACHE_LIMIT, _ENTRY_LIMIT = 256 * MIB, 512 * MIB  # bytes of all entries, compressed; of one, decompressed


def key_of(run: RunSpec, config: Mapping[str, Any], capability: tuple[int, int], steps: int) -> dict[str, Any]:
    """Return everything that determines a trace, as JSON types.

    The config, the run without its card's name, the card's compute capability, the libraries' versions, and memplan's
    version with a digest of the tracing code.
    """
    return {
        "config": config,
        "run": run.model_dump(mode="json", exclude={"model", "gpu"}),
        "capability": list(capability),
        "steps": steps,
        "versions": versions(),
        "memplan": [__version__, _code_digest()],
    }


@cache
def _code_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(__file__).parents[1].rglob("*.*") if path.suffix in (".py", ".cpp")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def cached_trace(run: RunSpec, key: Mapping[str, Any]) -> TracedRun | None:
    """Return the cached trace for `key`; None if there is no usable one."""
    try:
        path = _path(key)
        text = _decompress(path.read_bytes())
        with contextlib.suppress(OSError):
            path.touch()  # the least recently used entries are removed first
        entry = json.loads(text)
        if _text(entry["key"]) != _text(key):
            return None
        traced = read(run, entry["traced"])
        _check(traced)
    except (OSError, MemplanError, zlib.error, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return traced


def store_trace(key: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
    """Store the tracing process's answer. Does nothing if it cannot be written."""
    text = json.dumps({"key": key, "traced": answer}).encode()
    packed = zlib.compress(text, 5)
    if len(text) > _ENTRY_LIMIT or len(packed) > _CACHE_LIMIT:
        return
    with contextlib.suppress(OSError, MemplanError):
        path = _path(key)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".new")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(packed)
            Path(temporary).replace(path)
        finally:
            Path(temporary).unlink(missing_ok=True)
        _evict(path.parent)


def _evict(folder: Path) -> None:
    """Remove the least recently used entries until the cache is within its limit."""
    entries = [(stat.st_mtime, stat.st_size, path) for path in folder.iterdir() for stat in (path.stat(),)]
    size = sum(bytes_ for _, bytes_, _ in entries)
    for _, bytes_, path in sorted(entries):
        if size <= _CACHE_LIMIT:
            return
        path.unlink(missing_ok=True)
        size -= bytes_


def _path(key: Mapping[str, Any]) -> Path:
    return caches() / "traces" / f"{hashlib.sha256(_text(key).encode()).hexdigest()}.json.z"


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _decompress(packed: bytes) -> bytes:
    """Decompress at most an entry's largest size; a larger or truncated entry then fails to parse as JSON."""
    return zlib.decompressobj().decompress(packed, _ENTRY_LIMIT)


def _check(traced: TracedRun) -> None:
    """Raise ValueError or TypeError for an invalid trace, such as one that frees a storage twice."""
    alive = [False] * len(traced.storages)
    created = 0
    for event in traced.events:
        if event >= 0:
            if event != created:
                raise ValueError("storages are not created in order")
            alive[event] = True
            created += 1
        else:
            if not alive[~event]:
                raise ValueError("a storage is freed that is not alive")
            alive[~event] = False
    if created != len(traced.storages) or not traced.phases:
        raise ValueError("a storage is never created, or there is no phase")
    for s in traced.storages:
        if not (0 <= s.born < s.died <= len(traced.events) and s.bytes >= 0 and all(n >= 0 for n in s.shape)):
            raise ValueError("a storage has an invalid size or lifetime")
        if s.kind not in KINDS:
            raise ValueError("a storage has an unknown kind")
        "".join((s.dtype, s.op, s.module, s.name))  # TypeError unless all are strings
    for p in traced.phases:
        if not (0 <= p.start <= p.end <= len(traced.events) and p.peak >= 0 and p.step >= 0):
            raise ValueError("a phase is outside the events")
        if not 0 <= p.peak_at < len(traced.events):
            raise ValueError("a peak is outside the events")
    if traced.trainable < 0 or traced.parameters < 1 or (traced.active or 0) < 0:
        raise ValueError("invalid parameter counts")
    "".join((traced.built, *traced.notes, *traced.versions.values()))
