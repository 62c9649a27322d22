"""A machine's overhead, computed from measured runs, and the file it is stored in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command

import memplan
from memplan import RunSpec
from memplan.cli.app import app
from memplan.cli.own_profile import profile_of
from memplan.core.errors import MemplanError, SpecError
from memplan.core.user_folders import calibrations
from memplan.estimate import calibration
from memplan.estimate.calibration import MIN_RUNS, Calibration, Measurement, Origin, calibrate_card

COMMAND = get_command(app)
MIB = 2**20
ORIGIN = Origin("rtx-3090", "550.54.15", "", "torch 2.13.0+cu130", "0.1.0", "2026-11-25T10:00:00+00:00")


def measurements(n: int, context: int = 400 * MIB) -> list[Measurement]:
    """Return runs of which run i took i % more than estimated, in segments and in total."""
    return [
        Measurement(
            reserved=1000 * MIB * (100 + i) // 100,
            process=(1000 * MIB + context) * (100 + i) // 100,
            context=context,
            estimated=1000 * MIB,
        )
        for i in range(n)
    ]


def test_nineteen_runs_make_a_band_from_the_least_to_the_most() -> None:
    profile = calibrate_card(measurements(19), ORIGIN)
    assert profile.runs == MIN_RUNS == 19
    assert profile.coverage == 1 - 2 / 20
    assert (profile.used_error.low, profile.used_error.usual, profile.used_error.high) == (0, 0.09, 0.18)
    assert (profile.reserved_error.low, profile.reserved_error.usual, profile.reserved_error.high) == (0, 0.09, 0.18)
    assert (profile.context.low, profile.context.usual, profile.context.high) == (400 * MIB,) * 3


def test_many_runs_give_a_range_that_holds_95_of_100_further_runs() -> None:
    profile = calibrate_card(measurements(99), ORIGIN)
    k = 2  # a further run has 100 possible ranks: 2 below the second smallest and 2 above the second largest
    assert profile.coverage == 1 - 2 * k / 100
    assert (profile.used_error.low, profile.used_error.high) == (0.01, 0.97)


def test_fewer_runs_make_no_band() -> None:
    with pytest.raises(SpecError, match="lines: a band needs at least 19 measured runs, and there are 18 on rtx-3090"):
        calibrate_card(measurements(18), ORIGIN)


@given(st.lists(st.integers(-900, 3000), min_size=19, max_size=120, unique=True), st.randoms(use_true_random=False))
def test_the_band_holds_its_coverage_of_runs_like_those_measured(errors: list[int], random: Any) -> None:
    """Leave each run out in turn: the promised share lies within the range of the others, apart from ties."""
    made = [Measurement(1000 + e, 1000 + e, 0, 1000) for e in errors]
    random.shuffle(made)
    if len(made) == MIN_RUNS:
        made += [Measurement(5000, 5000, 0, 1000)]
    inside = 0
    coverage = 1.0
    for i, one in enumerate(made):
        profile = calibrate_card(made[:i] + made[i + 1 :], ORIGIN)
        coverage = profile.coverage
        low, _, high = profile.around(1000)
        inside += low <= one.process <= high
    assert inside >= round(coverage * len(made)) - 1e-9


def test_a_runs_range_is_segments_plus_context_scaled_by_observed_errors() -> None:
    profile = calibrate_card(measurements(19), ORIGIN)
    low, usual, high = profile.around(2000 * MIB)
    assert low == 2400 * MIB
    assert usual == 2400 * MIB + round(0.09 * 2400 * MIB)
    assert high == 2400 * MIB + round(0.18 * 2400 * MIB)


def test_the_profile_is_named_with_its_runs_card_driver_and_date() -> None:
    named = calibrate_card(measurements(19), ORIGIN._replace(allocator="expandable_segments:True")).named()
    for word in ("19 runs", "rtx-3090", "550.54.15", "2026-11-25,", "torch 2.13.0+cu130", "expandable_segments:True"):
        assert word in named


# --- the file ---


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


def test_a_profile_is_kept_in_the_users_configuration(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = calibrate_card(measurements(19), ORIGIN)
    path = calibration.file_of("rtx-3090")
    assert path == home / "config" / "memplan" / "calibration" / "rtx-3090.json"
    assert calibration.local("rtx-3090") is None
    calibration.write(profile, path)
    assert calibration.local("rtx-3090") == profile
    assert [p.name for p in path.parent.iterdir()] == ["rtx-3090.json"]
    monkeypatch.setenv("HOME", str(home))
    for said in ("", "not/absolute"):
        monkeypatch.setenv("XDG_CONFIG_HOME", said)
        assert calibration.file_of("t4") == home / ".config" / "memplan" / "calibration" / "t4.json"


def broken(**changed: Any) -> str:
    fields = calibrate_card(measurements(19), ORIGIN).model_dump(mode="json")
    return json.dumps({k: v for k, v in {**fields, **changed}.items() if v is not None})


BROKEN = {
    "nothing": ("", "it: invalid JSON"),
    "no JSON": ("{", "it: invalid JSON"),
    "a list": ("[]", "it: "),
    "a field too many": (broken(fudge=1.1), "fudge: extra inputs"),
    "a field missing": (broken(context=None), "context: field required"),
    "too few runs": (broken(runs=3), "runs: input should be greater than or equal to 19"),
    "no number": (broken(coverage="most"), "coverage: "),
    "errors out of order": (broken(used_error={"low": 0.2, "usual": 0, "high": 1}), "used_error: must ascend"),
    "negative bytes": (broken(context={"low": -1, "usual": 0, "high": 1}), "context.low: "),
    "too large": (" " * 2**17, "larger than 64 KiB"),
    "not text": ("\udcff", "it: "),
}


@pytest.mark.parametrize(("text", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_profile_is_one_line_with_file_and_field(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "rtx-3090.json"
    path.write_text(text, "utf-8", errors="surrogateescape")
    with pytest.raises(SpecError) as raised:
        calibration.read(path)
    line = str(raised.value)
    assert line.startswith("calibration: ")
    assert "rtx-3090.json" in line
    assert said in line
    assert "\n" not in line
    assert raised.value.field == "calibration"


def test_a_missing_or_unwritable_profile_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"calibration: .*none\.json' cannot be read \(No such file"):
        calibration.read(tmp_path / "none.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(MemplanError, match=r"output: .* cannot be written"):
        calibration.write(calibrate_card(measurements(19), ORIGIN), tmp_path / "file" / "below.json")


def test_an_answer_takes_the_profile_of_its_card_and_of_its_version(home: Path) -> None:
    profile = calibrate_card(measurements(19), ORIGIN)
    assert profile_of("3090") == (None, "")
    calibration.write(profile, calibration.file_of("rtx-3090"))
    assert profile_of("3090") == (profile, profile.named())
    assert profile_of("4090") == (None, "")
    calibration.write(profile.model_copy(update={"memplan": "0.0.1"}), calibration.file_of("rtx-3090"))
    found, said = profile_of("3090")
    assert found is None
    assert "memplan 0.0.1" in said
    calibration.file_of("rtx-3090").write_text("{}")
    with pytest.raises(SpecError, match="calibration: "):
        profile_of("3090")


# --- the command ---


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(name="calibrate")
def _calibrate(capsys: pytest.CaptureFixture[str], home: Path) -> Callable[..., Ran]:
    def run(*args: str) -> Ran:
        with pytest.raises(SystemExit) as left:
            COMMAND.main(["calibrate", *args])
        captured = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return Ran(left.value.code, captured.out, captured.err)

    return run


Calibrating = Callable[..., Ran]
TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


def line(i: int, **changed: Any) -> dict[str, Any]:
    """Return a row with segments and process i per mille above the estimate, and a context of 400 MiB."""
    run = {"model": {"config": TINY}, "gpu": changed.pop("gpu", "rtx-3090")}
    estimated = memplan.estimate(RunSpec(**run)).bytes.reserved
    return {
        "run": run,
        "outcome": "measured",
        "date": f"2026-11-25T10:00:{i:02}+00:00",
        "driver": "550.54.15",
        "allocator": "",
        "stack": "torch 2.13.0+cu130",
        "reserved": estimated * (1000 + i) // 1000,
        "process": (estimated + 400 * MIB) * (1000 + i) // 1000,
        "context": {"first": 300 * MIB, "last": 400 * MIB},
        **changed,
    }


def written(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return str(path)


def test_measured_lines_become_the_cards_profile(calibrate: Calibrating, home: Path) -> None:
    ran = calibrate(written(home / "lines.jsonl", [line(i) for i in range(20)]))
    assert (ran.code, ran.err) == (0, "")
    profile = calibration.local("rtx-3090")
    assert profile is not None
    assert (profile.gpu, profile.runs, profile.driver) == ("rtx-3090", 20, "550.54.15")
    assert profile.date == "2026-11-25T10:00:19+00:00"
    assert profile.memplan == memplan.__version__
    assert profile.context.usual == 400 * MIB
    assert profile.used_error.low == 0
    assert profile.used_error.high == pytest.approx(0.019, abs=1e-5)
    assert str(calibration.file_of("rtx-3090")) in ran.out
    assert "20 runs" in ran.out
    assert "400.0 MiB" in ran.out


def test_lines_of_no_use_are_counted_by_the_reason(calibrate: Calibrating, home: Path) -> None:
    others = [
        {"about": "a line about the file"},
        line(1, outcome="out of memory"),
        line(2, context=None),
        line(3, process="much"),
        line(4, reserved=2**60),
        {**line(5), "run": {"model": {"config": TINY}}},
        {**line(6), "run": {"model": {"config": {**TINY, "model_type": "falcon_h1"}}, "gpu": "rtx-3090"}},
    ]
    ran = calibrate(written(home / "lines.jsonl", [line(i) for i in range(19)] + others))
    assert ran.code == 0
    assert ran.out.splitlines()[-4:] == [
        "left out: 1 that memplan probe --cuda did not finish measuring",
        "left out: 3 without bytes of segments, process and context",
        "left out: 1 on a card that memplan does not know",
        "left out: 1 that memplan cannot estimate",
    ]


def test_runs_of_another_driver_allocator_or_library_are_left_out(calibrate: Calibrating, home: Path) -> None:
    old = [line(i, driver="535", date="2025-01-01") for i in range(3)]
    old.append(line(4, stack="torch 2.6.0", date="2025-01-01"))
    old.append(line(5, allocator="expandable_segments:True", date="2025-01-01"))
    ran = calibrate(written(home / "lines.jsonl", old + [line(i) for i in range(19)]))
    assert "left out: 5 runs with another driver, allocator setting or library" in ran.out
    profile = calibration.local("rtx-3090")
    assert profile is not None
    assert profile.runs == 19


def test_each_card_has_its_own_profile(calibrate: Calibrating, home: Path) -> None:
    both = [line(i, gpu=gpu) for gpu in ("3090", "t4") for i in range(19)]  # an alias is the card it means
    first, second = written(home / "a.jsonl", both[:19]), written(home / "b.jsonl", both[19:])
    assert calibrate(first, second).code == 0
    assert [calibration.local(name) is not None for name in ("rtx-3090", "t4")] == [True, True]
    ran = calibrate(first, second, "--output", str(home / "one.json"))
    assert (ran.code, ran.err) == (
        2,
        "memplan: output (--output): a file holds the profile of one card, and the runs are of rtx-3090, t4\n",
    )


def test_a_profile_is_written_to_the_requested_path(calibrate: Calibrating, home: Path) -> None:
    ran = calibrate(written(home / "lines.jsonl", [line(i) for i in range(19)]), "--output", str(home / "own.json"))
    assert ran.code == 0
    assert calibration.read(home / "own.json").runs == 19
    assert calibration.local("rtx-3090") is None


FILES = {
    "no runs": ("\n", "lines: no run to calibrate with (there are none)"),
    "no JSON": ('{"run"', "lines.jsonl, line 1 is not JSON"),
    "a list": ("[1]", "lines.jsonl, line 1 is not a JSON object"),
    "no run in it": ('\n{"run": {"model": 3}}', "lines: lines.jsonl, line 2: model: "),
    "an unknown field": ('{"run": {"model": "qwen2-7b", "rank": 3}}', "did you mean method.rank?"),
    "too few": (json.dumps(line(1)), "lines: a band needs at least 19 measured runs, and there are 1 on rtx-3090"),
}


@pytest.mark.parametrize(("text", "said"), FILES.values(), ids=FILES)
def test_a_file_that_makes_no_profile_is_one_line(calibrate: Calibrating, home: Path, text: str, said: str) -> None:
    (home / "lines.jsonl").write_text(text)
    ran = calibrate(str(home / "lines.jsonl"))
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.count("\n") == 1
    assert said in ran.err
    assert not calibrations().exists()


def test_a_profile_is_json_both_ways() -> None:
    profile = calibrate_card(measurements(30), ORIGIN)
    assert Calibration.model_validate_json(profile.model_dump_json()) == profile


def test_an_answer_rests_on_the_machines_own_profile_and_names_it(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = calibrate_card(measurements(30), ORIGIN._replace(memplan=memplan.__version__))
    run = RunSpec(model="qwen2-0.5b", method="lora", gpu="3090")
    plain, own = memplan.estimate(run), memplan.estimate(run, profile)
    around = profile.around(plain.bytes.reserved)
    assert own.bytes.reserved == plain.bytes.reserved
    assert abs(own.bytes.used - around.usual) <= 1
    assert abs(own.band.low - around.low) <= 1
    assert abs(own.band.high - around.high) <= 1
    assert own.band.coverage == profile.coverage
    assert own.notes == (*plain.notes, profile.named())
    assert memplan.estimate(run.model_copy(update={"gpu": "rtx-4090"}), profile).band.coverage != profile.coverage

    calibration.write(profile, calibration.file_of("rtx-3090"))
    for options, used in ((), own), (("--no-calibration",), plain):
        with pytest.raises(SystemExit):
            COMMAND.main(["qwen2-0.5b", "--method", "lora", "--gpu", "3090", "--json", *options])
        assert json.loads(capsys.readouterr().out)["bytes"] == used.bytes.as_dict()
