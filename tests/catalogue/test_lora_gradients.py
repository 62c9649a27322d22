"""LoRA saves storage, not the product with W: its backward by hand equals autograd's and peft's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.main import get_command

from memplan import RunSpec
from memplan.cli.app import app
from memplan.core.errors import MemplanError
from memplan.probe import gradients
from memplan.probe.gradients import Shape, check, compare, shapes, tolerance
from tests.cases import Lazy, each
from tests.tiny import SMALLEST, TARGETS, TINY

torch: Any = Lazy("torch")
pytestmark = pytest.mark.torch

COMMAND = get_command(app)
SMALL = Shape(10, 12, ("o_proj",))
EPS = {"fp32": 2.0**-23, "bf16": 2.0**-7, "fp16": 2.0**-10}


@pytest.mark.parametrize("dtype", EPS)
def test_the_three_ways_agree(dtype: str) -> None:
    found = check(SMALL, 3, 16.0, dtype)
    assert found.agree, found
    assert set(found.autograd) == set(found.peft) == {"A", "B", "x"}
    assert found.tolerance == tolerance(EPS[dtype], EPS["fp32"], 12) == 5 * EPS[dtype] / 2 + 12**0.5 * 2.0**-23


def test_rounding_is_seen_and_is_no_more_than_allowed() -> None:
    """No difference at all would mean that two of the three ways are the same."""
    assert 0 < check(SMALL, 3, 16.0, "bf16").worst < 5 * EPS["bf16"] / 2


def wrong_scale(by_hand: Callable[..., Any]) -> Callable[..., Any]:
    return lambda torch, x, w, a, b, g, s: by_hand(torch, x, w, a, b, g, s * 1.05)


def without_w(by_hand: Callable[..., Any]) -> Callable[..., Any]:
    """Compute gradients as if backward did not multiply by the frozen matrix."""
    return lambda torch, x, w, a, b, g, s: by_hand(torch, x, w * 0, a, b, g, s)


@pytest.mark.parametrize(("wrong", "names"), [(wrong_scale, "AB"), (without_w, "x")])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_formula_is_found(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Any], names: str, dtype: str
) -> None:
    monkeypatch.setattr(gradients, "_by_hand", wrong(gradients._by_hand))
    found = check(SMALL, 3, 16.0, dtype)
    assert not found.agree
    for name in names:
        assert found.autograd[name] > found.tolerance
        assert found.peft[name] > found.tolerance


def test_multiplying_adapters_and_weight_first_is_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w, a, b, g = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((7, 12), (10, 12), (3, 12), (10, 3), (7, 10))
    )
    s = 16.0 / 3
    for tensor in (x, a, b):
        tensor.requires_grad_()
    merged, apart = x @ (w + (b @ a) * s).T, x @ w.T + (x @ a.T @ b.T) * s
    torch.testing.assert_close(merged, apart)
    for mine, theirs in zip(
        torch.autograd.grad(merged, (x, a, b), g), torch.autograd.grad(apart, (x, a, b), g), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def lora(config: dict[str, Any], **method: Any) -> RunSpec:
    return RunSpec(model={"config": config}, method={"kind": "lora", "rank": 4, **method}, precision="fp32")


def test_every_layer_shape_is_compared_once() -> None:
    run = lora({**SMALLEST, "num_key_value_heads": 2})
    assert shapes(run) == [
        Shape(64, 128, ("down_proj",)),
        Shape(128, 64, ("gate_proj", "up_proj")),
        Shape(64, 64, ("q_proj", "o_proj")),
        Shape(32, 64, ("k_proj", "v_proj")),
    ]
    assert [c.shape for c in compare(run)] == shapes(run)
    assert all(c.agree for c in compare(run))
    assert shapes(lora(SMALLEST, targets=["o_proj", "lm_head"])) == [
        Shape(100, 64, ("lm_head",)),
        Shape(64, 64, ("o_proj",)),
    ]


@each(TINY)
def test_every_family_has_shapes_to_compare(family: str) -> None:
    assert shapes(lora({"model_type": family, **TINY[family]}, targets=TARGETS.get(family, "all-linear")))


@pytest.mark.parametrize(
    ("method", "field"), [({"rank": 2**30}, "method.rank"), ({"targets": ["q_prj"]}, "method.targets")]
)
def test_impossible_shapes_are_refused_before_allocation(method: dict[str, Any], field: str) -> None:
    with pytest.raises(MemplanError) as raised:
        list(compare(lora(SMALLEST, **method)))
    assert raised.value.field == field


# --- the command ---


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(name="probe")
def _probe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Ran]:
    (tmp_path / "config.json").write_text(json.dumps(SMALLEST))

    def run(*args: str) -> Ran:
        with pytest.raises(SystemExit) as left:
            COMMAND.main(["probe", str(tmp_path / "config.json"), "--gradients", *args])
        captured = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return Ran(left.value.code, captured.out, captured.err)

    return run


def test_the_command_compares_in_fp32_unless_it_is_told_otherwise(probe: Callable[..., Ran]) -> None:
    ran = probe()
    assert (ran.code, ran.err) == (0, "")
    assert "by torch.autograd and by peft agree with those by hand: rank 16, in fp32" in " ".join(ran.out.split())
    assert ran.out.count(" agree\n") == 3
    rows = json.loads(probe("--rank", "4", "--dtype", "bf16", "--json").out)
    assert [row["shape"] for row in rows] == [[64, 128], [128, 64], [64, 64]]
    assert all(row["agree"] and row["tolerance"] > 5 * EPS["bf16"] / 2 for row in rows)


def test_gradients_that_differ_are_exit_1(probe: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "_by_hand", without_w(gradients._by_hand))
    ran = probe()
    assert ran.code == 1
    assert "do not agree" in ran.out
    assert ran.out.count(" differ\n") == 3
