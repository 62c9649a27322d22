"""The defaults of frameworks, as their released packages are read for them, equal those of the installed classes."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from importlib.metadata import version
from typing import Any

import pytest

from benchmarks.framework_defaults import SOURCES
from memplan.frameworks.reading.config import defaults_of
from memplan.frameworks.reading.run_format import FORMATS, format_named

# Framework -> module and class of its config.
CLASSES = {
    "transformers": (("transformers", "TrainingArguments"), ("transformers", "Seq2SeqTrainingArguments")),
    "trl": (("trl", "SFTConfig"), ("trl", "ModelConfig")),
    "accelerate": (("accelerate.commands.config.config_args", "ClusterConfig"),),
}


def installed(framework: str) -> dict[str, Any]:
    """Return the default of each field of a framework's classes; MISSING for one without."""
    pytest.importorskip(framework)
    out: dict[str, Any] = {}
    for module, name in CLASSES[framework]:
        for field in dataclasses.fields(getattr(import_module(module), name)):
            made = field.default_factory
            default = field.default if made is dataclasses.MISSING else made()
            out[field.name] = getattr(default, "value", default)  # of an enum's member
    return out


@pytest.mark.torch
@pytest.mark.parametrize("framework", CLASSES)
def test_defaults_are_those_of_the_installed_classes(framework: str) -> None:
    classes = installed(framework)
    data = defaults_of(framework)
    release = ".".join(version(framework).split(".")[:2])
    if release not in data.defaults:
        pytest.skip(f"{framework} {release} has not been read")
    built_on = format_named(framework).defaults if framework in FORMATS else (framework,)
    assert classes.keys() <= {key for name in built_on for key in defaults_of(name).keys}
    defaults = data.defaults[release]
    wanted = [name for name in SOURCES[framework][2] if name in classes]
    assert wanted
    assert {name: classes[name] for name in wanted if name in defaults} == {
        name: defaults[name] for name in wanted if name in defaults
    }
    left = {name: classes[name] for name in wanted if name not in defaults}
    assert {name: value for name, value in left.items() if value not in (None, dataclasses.MISSING)} == {}
