"""A guard compares steps with the estimate, warns before one that would fail, and explains one that does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import memplan
from memplan.core.units import GIB
from memplan.explain.guard import StepWouldFailError, TrainingGuard, predicted_until

RUN = memplan.RunSpec(model="smollm2-135m", method="full", gpu="t4", batch={"micro": 2, "sequence": 1024})
ANSWER = memplan.estimate(RUN)


class FakeOutOfMemoryError(RuntimeError):
    pass


class FakeDevice:
    """A device on which steps take what the estimate says, and `more`."""

    def __init__(self, more: int = 0, room: int = 14 * GIB) -> None:
        self.more, self._room, self.step = more, room, 0
        self.hooks: list[Callable[[], None]] = []
        self.written: list[str] = []

    def peaks(self) -> tuple[int, int]:
        peak = predicted_until(ANSWER, self.step) + self.more
        return peak, peak

    def room(self) -> int:
        return self._room

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, FakeOutOfMemoryError)

    def on_step(self, after: Callable[[], None]) -> Callable[[], None]:
        self.hooks.append(after)
        return self.hooks.clear

    def record_history(self) -> None:
        self.written.append("recording")

    def write_snapshot(self, path: str) -> None:
        self.written.append(path)

    def take_steps(self, count: int) -> None:
        for _ in range(count):
            self.step += 1
            for hook in self.hooks:
                hook()


def guarded(device: FakeDevice, *, stop: bool = False, snapshot: str = "") -> tuple[TrainingGuard, list[str]]:
    said: list[str] = []
    return TrainingGuard(RUN, stop=stop, snapshot=snapshot, say=said.append, device=device), said


def test_the_first_two_steps_are_compared_and_no_more() -> None:
    device = FakeDevice()
    guard, said = guarded(device)
    with guard:
        device.take_steps(5)
    assert [(r.step, r.allocated - r.predicted) for r in guard.readings] == [(1, 0), (2, 0)]
    assert [line[:16] for line in said] == ["memplan: step 1:", "memplan: step 2:"]
    assert "(+0.0 %)" in said[0]
    assert (guard.warnings, device.hooks) == ([], [])


@pytest.mark.parametrize(("more", "room"), [(2 * GIB, ANSWER.bytes.allocated + GIB), (0, ANSWER.bytes.allocated - 1)])
def test_a_step_that_would_fail_is_warned_of(more: int, room: int) -> None:
    device = FakeDevice(more, room)
    guard, _ = guarded(device)
    with guard:
        device.take_steps(1)
    assert len(guard.warnings) == 1
    assert "2 x 1,024 tokens would allocate" in guard.warnings[0]


def test_a_guard_that_stops_ends_the_script_before_that_step() -> None:
    device = FakeDevice(2 * GIB, ANSWER.bytes.allocated + GIB)
    guard, _ = guarded(device, stop=True)
    with pytest.raises(StepWouldFailError, match="will run out of memory"), guard:
        device.take_steps(3)
    assert (device.step, device.hooks) == (1, [])


def test_running_out_is_explained_and_the_error_goes_on() -> None:
    device = FakeDevice()
    guard, said = guarded(device, snapshot="s.pickle")
    text = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.56 GiB of which 1.00 GiB is "
        "free. Including non-PyTorch memory, this process has 13.50 GiB memory in use. Of the allocated memory "
        "12.00 GiB is allocated by PyTorch, and 1.00 GiB is reserved by PyTorch but unallocated."
    )
    with pytest.raises(FakeOutOfMemoryError), guard:
        raise FakeOutOfMemoryError(text)
    assert device.written == ["recording", "s.pickle"]
    assert any(line.startswith("memplan: whose memory: ") for line in said)
    assert any("memplan explain s.pickle" in line for line in said)


def test_another_error_is_left_alone() -> None:
    device = FakeDevice()
    guard, said = guarded(device, snapshot="s.pickle")
    with pytest.raises(ValueError, match="other"), guard:
        raise ValueError("other")
    assert (said, device.written) == ([], ["recording"])


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    device = FakeDevice(2 * GIB, ANSWER.bytes.allocated)
    guard, said = guarded(device)
    with guard:
        device.take_steps(2)
    assert said == []
    assert len(guard.warnings) == 2
