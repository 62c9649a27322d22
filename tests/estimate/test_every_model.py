"""A sample of all bundled models and option sets: nothing crashes, no bytes are negative, all sums hold.

Every run of the suite draws other pairs; `benchmarks/sweep.py` runs all of them. A failure prints the command lines to
reproduce it.
"""

from __future__ import annotations

import os
from itertools import cycle, product
from typing import Any

import pytest

from benchmarks import sweep
from benchmarks.sweep import FAMILIES, OPTIONS, ask, models, pairs
from memplan import MemplanError, ModelSpec, RunSpec
from memplan.core.arithmetic import ONE_RUN
from memplan.core.errors import InternalError
from memplan.engine.events import FREED
from memplan.engine.walk import bytes_at_each, size, values
from memplan.models.configs.images import picture_of, takes_images
from memplan.program.axes import axes_of
from memplan.program.graph import operations_of
from memplan.program.training.passes import pass_of
from memplan.program.training.replay import pass_of as recorded_pass_of
from memplan.resolve.decide import decide
from tests.sampling import COMPLETE, sampled

PARTS = 8
SHARE = 300 if COMPLETE else 2400  # one pair in this many is estimated, over all parts
# Differs between runs, but is equal in all processes of one run, so that they draw the same pairs.
SEED = os.environ.get("PYTEST_XDIST_TESTRUNUID", "alone")


def test_the_sweep_covers_every_model_and_enough_options() -> None:
    assert len(models()) > 280
    assert len(OPTIONS) > 113
    assert len(set(OPTIONS)) == len(OPTIONS)


@pytest.mark.parametrize("part", range(PARTS))
def test_no_answer_breaks_a_law(part: int) -> None:
    asked = [ask(*pair) for pair in pairs(SHARE, SEED)[part::PARTS]]
    failures = [
        f"memplan {pair.model} {pair.options}: {failure.kind}: {failure.where}: {failure.detail}"
        for pair in asked
        for failure in pair.failures
        if failure.kind != "slow"  # seconds depend on the machine
    ]
    assert failures == []


def test_a_mistake_of_memplan_is_a_failure_and_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: RunSpec) -> None:
        raise InternalError("attention reads keys, which nothing writes")

    monkeypatch.setattr(sweep, "estimate", fail)
    assert [failure.kind for failure in ask("qwen2-0.5b", "--method lora").failures] == ["crashes"]


DIVIDED = ("none", "fsdp", "fsdp2")
METHODS = ({"kind": "full"}, {"kind": "full", "frozen": ["vision", "projector"]}, {"kind": "lora"})


def _peaks(run: RunSpec) -> tuple[int, int]:
    """Return the most bytes alive in a pass, by its moments and by its recorded sequence."""
    decided = decide(run)
    structure, b = decided.structure, decided.batch
    low, recording = pass_of(structure, later=False), recorded_pass_of(structure, later=False)
    fixed = operations_of(structure.graph)[1]
    sizes = {key: size(*key, fixed) for key in {key[:2] for key in (*low.sizes, *recording.sizes)}}
    needs = frozenset(axis for variable, _ in sizes.values() for axis in variable.axes)
    lengths = (decided.pictures, b.target_sequence)
    own = axes_of(structure.graph, needs, b.micro, b.sequence, decided.half, decided.large_tiles, ONE_RUN, *lengths)
    axes = {**fixed, **own}
    bytes_of = {key: n * values([variable], axes)[0] for key, (variable, n) in sizes.items()}

    lowered = [bytes_of[key[:2]] for key in low.sizes]
    of_moments = max(bytes_at_each(low.moments.unnamed, low.runs, axes, lowered))
    made = [bytes_of[key[:2]] for key in recording.sizes]
    bytes_by_number: dict[int, int] = {}
    live = most = 0
    for number, key in recording.unrolled():
        live += -bytes_by_number.pop(number) if key == FREED else bytes_by_number.setdefault(number, made[key])
        most = max(most, live)
    return of_moments, most


@pytest.mark.parametrize("name", sampled(sorted(FAMILIES), 16))
def test_equal_layers_are_counted_as_if_each_were_run(name: str) -> None:
    """In every family, with towers, images, windows, tied tables and experts, one copy stands for all copies.

    Sharding and method are paired in every way; each of either is run with and without images.
    """
    model = ModelSpec({"model_type": name, **FAMILIES[name]})
    batches: list[dict[str, Any]] = [{"micro": 2, **({} if model.only_sequence else {"sequence": 96})}]
    if takes_images(model):
        side = {} if model.family.images and model.family.images.is_fixed else {"image_size": 64}
        tokens = picture_of(model, side.get("image_size")).tokens
        batches.append({"micro": 2, "sequence": max(96, tokens), "images": 1, **side})
    asked = 0
    for batch, (strategy, method) in zip(cycle(batches), product(DIVIDED, METHODS), strict=False):
        ranks = {"world": 4, "dp": 4, "strategy": strategy} if strategy != "none" else {}
        parts = {"method": method, "precision": "fp32", "parallelism": ranks, "batch": batch}
        run = RunSpec.model_validate({"model": {"config": model.config}, **parts})
        try:
            of_moments, of_sequence = _peaks(run)
        except MemplanError:
            continue
        assert of_moments == of_sequence, (batch, strategy, method)
        asked += 1
    assert asked
