"""Snapshots: what a run's own allocations would have recorded is explained, and hostile files are refused."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import pytest
from typer.main import get_command

from benchmarks import snapshots
from memplan.cli.app import app
from memplan.core.errors import MemplanError
from memplan.core.units import MIB
from memplan.estimate.answer import Estimate
from memplan.estimate.estimate import walk
from memplan.estimate.training import TrainingWalk
from memplan.explain import snapshot as reading
from memplan.explain.history import History
from memplan.explain.snapshot import check_opcodes, is_snapshot, read_snapshot
from memplan.report.snapshot import FORMATS, render
from memplan.report.text import Screen
from memplan.spec.run import RunSpec

FRAMES = [
    snapshots.frame("/usr/lib/python3.12/site-packages/torch/nn/functional.py", 3059, "cross_entropy"),
    snapshots.frame("/usr/lib/python3.12/site-packages/transformers/loss/loss_utils.py", 46, "ForCausalLMLoss"),
]


def walk_of(**fields: object) -> TrainingWalk:
    walked = walk(RunSpec.model_validate({"model": "smollm2-135m", "method": "full", "gpu": "t4", **fields}))
    assert isinstance(walked, TrainingWalk)
    return walked


def history_of(snapshot: object) -> History:
    return History(read_snapshot(pickle.dumps(snapshot)))


@pytest.mark.parametrize(
    "fields", [{}, {"batch": {"micro": 4, "sequence": 300}}, {"kernels": {"checkpointing": "none"}}]
)
def test_a_runs_own_snapshot_has_its_peak_and_its_tensors(fields: dict[str, object]) -> None:
    walked = walk_of(**fields)
    answer, history = Estimate(walked), history_of(snapshots.snapshot_of(walked))
    assert history.start == 0
    assert abs(history.peak - answer.bytes.allocated) * 100 < answer.bytes.allocated
    assert sum(group.bytes for group in history.groups) == history.peak
    matches, rest = history.matches(answer)
    found = sum(match.found * match.unit for match in matches)
    assert found + sum(group.bytes for group in rest) == history.peak
    assert found * 100 > 98 * history.peak


def test_tensors_that_no_line_predicts_are_told_with_their_stack() -> None:
    walked = walk_of()
    snapshot = snapshots.snapshot_of(walked)
    extra = snapshots.event("alloc", 7, 333 * MIB, FRAMES, 0)
    snapshot["device_traces"][0].insert(0, extra)
    snapshot["segments"][0]["blocks"].append(
        {"address": 7, "size": 333 * MIB, "state": "active_allocated", "frames": FRAMES}
    )
    _, rest = history_of(snapshot).matches(Estimate(walked))
    assert (rest[0].bytes, rest[0].count, rest[0].words) == (333 * MIB, 1, "the head and the loss")
    assert rest[0].place == "loss/loss_utils.py:46 ForCausalLMLoss"


def test_what_was_there_before_the_history_counts() -> None:
    snapshot = snapshots.snapshot_of(walk_of())
    whole = history_of(snapshot)
    events = snapshot["device_traces"][0]
    for kept in (len(events) // 2, len(events) // 4, 10):
        cut = history_of({**snapshot, "device_traces": [events[-kept:]]})
        assert cut.end == whole.end
        assert list(cut.levels) == list(whole.levels)[-len(cut.levels) :]
        assert sum(group.bytes for group in cut.groups) == cut.peak


def test_an_out_of_memory_event_is_found() -> None:
    history = history_of(snapshots.made(1000))
    assert [(failed.size, failed.free) for failed in history.failed] == [(2**31, 10**8)]
    assert history.reserved == 400 * 2**27
    assert len(history.fragmented()) == 400


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_that_torch_writes_is_read(protocol: int) -> None:
    data = pickle.dumps(snapshots.made(2000), protocol=protocol)
    assert is_snapshot(data)
    assert History(read_snapshot(data)).peak > 0


@pytest.mark.parametrize("protocol", [2, 4])
def test_events_are_taken_from_a_file_part_by_part(monkeypatch: pytest.MonkeyPatch, protocol: int) -> None:
    made = snapshots.made(20_001)
    data, [events] = pickle.dumps(made, protocol), made["device_traces"]
    monkeypatch.setattr(reading, "MOST_KEPT", len(data) // 2)
    snapshot = read_snapshot(data)
    read = [(event.action, event.address, event.size) for event in snapshot.events()]
    assert read == [(event["action"], event.get("addr", 0), event["size"]) for event in events]
    stacks = [[(f["filename"], f["line"], f["name"]) for f in event["frames"]] for event in events]
    assert [snapshot.stack(event.frames) for event in snapshot.events()] == stacks
    monkeypatch.setattr(reading, "MOST_EVENTS", len(events) - 1)
    with pytest.raises(MemplanError, match="more than 20,000 events"):
        read_snapshot(data)
    others = {**made, "device_traces": [], "external_annotations": [{"name": f"{n:0100}"} for n in range(20_000)]}
    with pytest.raises(MemplanError, match="are no events"):
        read_snapshot(pickle.dumps(others, protocol))
    others = {**made, "device_traces": [], "allocator_settings": {str(n): n for n in range(10**5)}}
    with pytest.raises(MemplanError, match="a part of more than"):
        read_snapshot(pickle.dumps(others, protocol))


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("echo harm > /tmp/memplan-harm",)


def deep(levels: int) -> bytes:
    return b"\x80\x04" + b"]\x94" * levels + b"a" * (levels - 1) + b"."


HOSTILE = {
    "reduce": pickle.dumps({"segments": [_Evil()]}),
    "global": b"\x80\x02cos\nsystem\n.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "instance": b"\x80\x02(S'echo'\nios\nsystem\n.",
    "persistent": b"\x80\x02Psegments\n.",
    "extension": b"\x80\x02\x82\x01.",
    "huge text": b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"x.",
    "huge integer": b"\x80\x04\x8b" + (2**31 - 1).to_bytes(4, "little") + b".",
    "long integer": b"\x80\x04\x8a\xff" + b"\xff" * 255 + b".",
    "huge memo": b"\x80\x02]r\xff\xff\xff\xff.",
    "huge frame": b"\x80\x04\x95" + b"\xff" * 8 + b"].",
    "marks": b"\x80\x04" + b"(" * 10**6 + b".",
    "deep": deep(10**6),
    "no stop": b"\x80\x04}",
    "not a dictionary": pickle.dumps(["segments"]),
    "cut off": pickle.dumps(snapshots.made(100))[:-500],
    "bytes": pickle.dumps({"segments": b"x" * 100}),
    "set": pickle.dumps({"segments": {1, 2}}),
    "itself": b"\x80\x04}\x94\x8c\x08segmentsh\x00s.",
    "wrong size": pickle.dumps({"segments": [{"device": 0, "total_size": -1, "address": 0, "blocks": []}]}),
    "wrong block": pickle.dumps({"segments": [{"device": 0, "total_size": 1, "address": 0, "blocks": [7]}]}),
    "wrong event": pickle.dumps({"segments": [], "device_traces": [[{"action": "alloc", "size": "1"}]]}),
    "wrong trace": pickle.dumps({"segments": [], "device_traces": [[1, 2]]}),
    "list of itself": b"\x80\x04}(\x8c\x08segments]\x8c\x0ddevice_traces]\x94h\x00au.",
    "empty": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_a_line(name: str) -> None:
    with pytest.raises(MemplanError) as error:
        History(read_snapshot(HOSTILE[name]))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("snapshot: ")
    assert not Path("/tmp/memplan-harm").exists()


def test_code_is_refused_before_anything_is_unpickled() -> None:
    for name in ("reduce", "global", "stack global", "instance", "persistent", "extension"):
        with pytest.raises(MemplanError, match="runs code or is not plain data"):
            check_opcodes(HOSTILE[name])


_WRONG: list[object] = [
    *(None, -1, 0, 2**70, "x", "\x1b[31m", [], {}, [[]], True, 1.5, "a" * 500, [{}], {"frames": 3}, (1, 2)),
]


def places(of: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container in a snapshot with every key or index of it."""
    for key in of if isinstance(of, dict) else range(len(of)) if isinstance(of, list) else ():
        yield of, key
        yield from places(of[key])


def test_files_with_wrong_values_end_in_a_line_or_an_answer() -> None:
    random, read, made = Random(4), 0, snapshots.made(20, depth=3, segments=3)
    for _ in range(300):
        snapshot = deepcopy(made)
        for _ in range(random.randint(1, 3)):
            container, key = random.choice([*places(snapshot)])
            if isinstance(container, dict) and random.random() < 0.3:
                del container[key]
            else:
                container[key] = random.choice(_WRONG)
        with suppress(MemplanError):
            assert "\x1b" not in render("table", history_of(snapshot), None, Screen())
            read += 1
    assert read > 50


def test_a_snapshot_is_rendered_in_every_format() -> None:
    walked = walk_of()
    history = history_of(snapshots.snapshot_of(walked))
    texts = {format: render(format, history, Estimate(walked), Screen()) for format in FORMATS}
    assert [format for format, text in texts.items() if "trainer.py" not in text] == []
    assert json.loads(texts["json"])["predicted"] == walked.peak


def test_the_command_tells_a_snapshot_from_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(snapshots.snapshot_of(walk_of())))
    for words, said in (((), "Live at the peak"), (("smollm2-135m", "--method", "full"), "The estimate's tensors")):
        with pytest.raises(SystemExit) as left:
            get_command(app).main(["explain", str(path), *words])
        assert int(left.value.code or 0) == 0
        assert said in capsys.readouterr().out
