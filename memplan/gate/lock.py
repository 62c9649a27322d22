"""memplan.lock: the facts behind each answer, so that CI needs no network, and what moved is told by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from memplan.core.errors import FactsMissingError, MemplanError, SpecError, printable
from memplan.core.records import NamedTuple
from memplan.core.units import GIB, decimal
from memplan.core.version import __version__
from memplan.gate.rows import Check, CheckedRun
from memplan.models.cards import PublishedModel, facts_of, is_bundled
from memplan.models.model import ModelSpec

NAME = "memplan.lock"
SCHEMA = 1
_MOST_BYTES = 2**26


class LockedModel(NamedTuple):
    """A model's config: its hash, where it is from, and the config itself unless memplan or the repository has it."""

    sha256: str
    source: str
    config: Mapping[str, Any] | None


class LockedRun(NamedTuple):
    """A run on a GPU as it was answered: the hash of its file, its model and profile, and the peak in bytes."""

    digest: str
    model: str
    profile: str
    peak: int


class Lock(NamedTuple):
    """The facts of all runs. `runs` are by the run, its GPU and how many there are."""

    memplan: str
    models: Mapping[str, LockedModel]
    runs: Mapping[tuple[str, str, int], LockedRun]

    def specs(self) -> dict[str, ModelSpec]:
        """Return the models whose configs are in the lock, which nothing else has to find."""
        return {name: ModelSpec(each.config, name) for name, each in self.models.items() if each.config is not None}

    def text(self) -> str:
        """Return the lock as it is written to its file."""
        runs = [
            {"run": run, "gpu": gpu, "gpus": gpus, **each._asdict()}
            for (run, gpu, gpus), each in sorted(self.runs.items())
        ]
        models = {name: each._asdict() for name, each in sorted(self.models.items())}
        values = {"schema_version": SCHEMA, "memplan": self.memplan, "models": models, "runs": runs}
        return json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def lock_of(check: Check, online: bool = False) -> Lock:
    """Return the lock of a check; `online` asks the Hub for configs. Raises MemplanError for a run without facts."""
    models: dict[str, LockedModel] = {}
    runs: dict[tuple[str, str, int], LockedRun] = {}
    for row in check.rows:
        if row.status in ("wrong", "unknown"):
            kind = FactsMissingError if row.error_code == FactsMissingError.exit_code else SpecError
            raise kind(f"{row.run}: {row.error}", "files")
        name = _model(row)
        if _is_locked(name) and name not in models:
            models[name] = _locked(facts_of(name, online), is_bundled(name))
        runs[_key(row)] = LockedRun(row.digest, name, str(row.fields.get("profile", "")), row.peak)
    return Lock(__version__, models, runs)


def _model(row: CheckedRun) -> str:
    """Return the name of a row's model; empty for one that the file itself describes."""
    model = row.fields.get("model")
    return model if isinstance(model, str) else ""


def _key(row: CheckedRun) -> tuple[str, str, int]:
    return row.run, row.key[1], row.gpus


def _is_locked(name: str) -> bool:
    """Whether a model's config is not in the repository itself."""
    return name != "" and not Path(name).exists()


def _locked(facts: PublishedModel, is_bundled: bool) -> LockedModel:
    config = None if is_bundled else json.loads(json.dumps(facts.config))
    return LockedModel(_digest(facts.config), facts.source, config)


def _digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def read_lock(path: Path = Path(NAME)) -> Lock | None:
    """Return the lock of the working directory; None if there is none. Raises SpecError for one of another schema."""
    try:
        text = path.read_text("utf-8") if path.stat().st_size <= _MOST_BYTES else ""
        values: Any = json.loads(text)
        schema = values["schema_version"]
        if schema != SCHEMA:
            text = f"{NAME}: has schema {printable(str(schema), 20)}, and this memplan reads {SCHEMA}: run memplan lock"
            raise SpecError(text, "locked")
        models = {str(name): LockedModel(**each) for name, each in values["models"].items()}
        runs = {
            (str(each.pop("run")), str(each.pop("gpu")), int(each.pop("gpus"))): LockedRun(**each)
            for each in values["runs"]
        }
        texts = [text for model in models.values() for text in (model.sha256, model.source)]
        texts += [text for run in runs.values() for text in (run.digest, run.model, run.profile)]
        configs = [model.config for model in models.values() if model.config is not None]
        is_sound = all(type(text) is str for text in texts) and all(type(run.peak) is int for run in runs.values())
        if not is_sound or not all(isinstance(config, dict) for config in configs):
            raise ValueError("a value of another type")
        return Lock(str(values["memplan"]), models, runs)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SpecError(f"{NAME}: cannot be read ({error.strerror or error})", "locked") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SpecError(f"{NAME}: is not a lock that memplan wrote; run memplan lock", "locked") from None


def with_lock(check: Check, lock: Lock, locked: bool = False) -> Check:
    """Return the check with what it says about its lock: facts that moved, which fail if `locked` and else are notes;
    and runs that another memplan answers otherwise for the same facts."""
    facts: list[str] = []
    notes: list[str] = []
    for name in sorted({_model(row) for row in check.rows if row.limit}):
        facts += _moved_model(name, lock.models.get(name)) if _is_locked(name) else ()
    for row in check.rows:
        was = lock.runs.get(_key(row))
        if not row.limit:
            continue
        if was is None:
            facts.append(f"{row.run} on {row.key[1]} is not in {NAME}")
        elif was.digest != row.digest:
            continue  # the run itself is another one
        elif was.profile != row.fields.get("profile"):
            facts.append(f"{row.run}: profile {was.profile} is now {row.fields.get('profile')}")
        elif was.peak != row.peak and was.model == _model(row):
            old, new = (f"{decimal(n, GIB, 2)} GiB" for n in (was.peak, row.peak))
            notes.append(f"{row.run} on {row.key[1]}: {old} by memplan {lock.memplan}, {new} by {__version__}")
    if locked:
        return check._replace(moved=tuple(facts), notes=(*check.notes, *notes))
    return check._replace(notes=(*check.notes, *facts, *notes))


def _moved_model(name: str, locked: LockedModel | None) -> Iterable[str]:
    """Yield how a model's config here differs from the lock's; nothing if only the lock has it."""
    if locked is None:
        yield f"{name} is not in {NAME}"
        return
    if locked.config is not None:
        if _digest(locked.config) != locked.sha256:
            yield f"{name}: the config in {NAME} is not that of its hash"
        return
    try:
        facts = facts_of(name)
    except MemplanError as error:
        yield f"{name}: {error}"
        return
    if _digest(facts.config) != locked.sha256:
        was, now = (source.rpartition("@")[2] or source for source in (locked.source, facts.source))
        yield f"{name}: another config.json ({was[:12]} is now {now[:12]})"
