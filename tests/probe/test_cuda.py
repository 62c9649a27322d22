"""A step on the local GPU: its readings, every way it can end, and the command's output. The card is a fake."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from typer.main import get_command

import memplan
from memplan import RunSpec
from memplan.cli.app import app
from memplan.cli.estimate import ESTIMATE_OPTIONS
from memplan.cli.probe import command
from memplan.core.errors import MemplanError, ProbeError, SpecError
from memplan.probe import libraries
from memplan.probe.run import process, rows
from memplan.probe.run.cuda import Cuda, LocalGPU, Phase, Reading, TorchCuda, report_card, watch
from memplan.probe.run.driver import in_use
from memplan.probe.run.process import Machine, MeasuredRun, ProcessResult, local_machine, measure, start
from memplan.report import measurement as probed
from tests.sampling import ALL
from tests.tiny import SMALLEST

MIB = 2**20
TOTAL = 24_000 * MIB
A3090 = LocalGPU("NVIDIA GeForce RTX 3090", (8, 6), memplan.find_gpu("rtx-3090").usable, "GPU-1234")
MACHINE = Machine(A3090, "550.54.15", {"torch": "2.13.0+cu130", "peft": "0.21.2"}, "")
RUN = RunSpec(model={"config": SMALLEST}, gpu="rtx-3090")


class OutOfMemoryError(RuntimeError):
    """Raised by the fake card."""


class FakeCuda:
    """A fake card: `allocated` and `reserved` in torch, `context` outside it, and `others` in other programs."""

    def __init__(self, others: int = 0) -> None:
        self.others, self.context = others, 0
        self.allocated = self.reserved = self.most_allocated = self.most_reserved = 0
        self.waited = 0
        self.recorded: list[str] = []

    def card(self) -> LocalGPU:
        return A3090

    def create_context(self) -> None:
        self.context = 400 * MIB
        self.reserved = self.most_reserved = 2 * MIB

    def reset(self) -> None:
        self.most_allocated, self.most_reserved = self.allocated, self.reserved

    def peaks(self) -> tuple[int, int]:
        return self.most_allocated, self.most_reserved

    def held(self) -> int:
        return self.reserved

    def used(self) -> int:
        return self.others + self.context + self.reserved

    def shown(self) -> int | None:
        return self.used()

    def wait(self) -> None:
        self.waited += 1

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, OutOfMemoryError)

    def record_history(self) -> None:
        self.recorded.append("")

    def write_snapshot(self, path: str) -> None:
        self.recorded.append(path)

    def take(self, peak: int, after: int) -> None:
        """Allocate up to `peak` MiB, and keep `after`. Segments are a tenth larger, and stay."""
        if peak > 10_000:
            raise OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.68 GiB"
            )
        self.most_allocated, self.allocated = max(self.most_allocated, peak * MIB), after * MIB
        self.reserved = max(self.reserved, peak * MIB * 11 // 10)
        self.most_reserved = max(self.most_reserved, self.reserved)


class FakeScript:
    """Loads 1,000 MiB, and allocates the given MiB in each phase of a step; the first kernels grow the context."""

    def __init__(self, cuda: FakeCuda, phase: Phase, peaks: dict[str, int]) -> None:
        self.cuda, self.phase, self.peaks = cuda, phase, peaks
        with phase("load"):
            cuda.take(1100, 1000)

    def step(self) -> None:
        for name, peak in self.peaks.items():
            with self.phase(name):
                self.cuda.context = 500 * MIB
                self.cuda.take(peak, 1000)


PEAKS = {"forward": 3000, "backward": 4000, "clip": 1500, "step": 2000}


def watched(cuda: Cuda, build: Callable[[RunSpec, Phase], Any], steps: int = 2) -> list[dict[str, Any]]:
    """Return the events, as they come through the pipe."""
    events: list[dict[str, Any]] = []
    watch(RUN, steps, cuda, build, lambda event: events.append(json.loads(json.dumps(event))))
    return events


def measured(
    cuda: FakeCuda | None = None,
    peaks: dict[str, int] = PEAKS,
    said: str = "0",
    build: Callable[[FakeCuda, Phase], Any] | None = None,
) -> MeasuredRun:
    """Return a run measured on the fake card, after nvidia-smi `said` how many MiB were used before."""
    cuda = cuda or FakeCuda()
    make = build or (lambda cuda, phase: FakeScript(cuda, phase, peaks))

    def started(request: dict[str, Any], timeout: float) -> ProcessResult:
        assert RunSpec.model_validate(request["run"]) == RUN
        return ProcessResult(watched(cuda, lambda run, phase: make(cuda, phase), request["steps"]), 0, "")

    return measure(RUN, MACHINE, start=started, ask=lambda fields, uuid: said)


# --- readings ---


def test_a_run_is_read_phase_by_phase() -> None:
    run = measured()
    assert run.outcome == "measured"
    names = [(r.phase, r.step) for r in run.readings]
    step = ["forward", "backward", "clip", "step"]
    assert names == [("context", None), ("load", None), *((p, 1) for p in step), *((p, 2) for p in step)]
    assert [r.allocated for r in run.readings[1:4]] == [1100 * MIB, 3000 * MIB, 4000 * MIB]
    assert run.allocated == 4000 * MIB
    assert run.reserved == 4400 * MIB
    assert run.process == (4400 + 500) * MIB
    assert [run.context_bytes(r) // MIB for r in run.readings[:3]] == [400, 400, 500]
    assert run.shown == (4400 + 500) * MIB


@pytest.mark.parametrize("most", [1500, 20_000])
def test_a_snapshot_is_written_at_the_end_of_memory_too(most: int) -> None:
    cuda = FakeCuda()
    events: list[dict[str, Any]] = []
    watch(RUN, 1, cuda, lambda run, phase: FakeScript(cuda, phase, {"forward": most}), events.append, "s.pickle")
    assert cuda.recorded == ["", "s.pickle"]
    assert events[-1]["event"] == ("done" if most < 10_000 else "out of memory")


def test_memory_used_by_others_before_is_not_the_runs() -> None:
    assert measured(FakeCuda(others=700 * MIB), said="700").process == measured().process
    assert measured(FakeCuda(others=700 * MIB), said="").process == measured().process + 700 * MIB
    assert measured(FakeCuda(others=700 * MIB), said="").before is None
    assert measured(said="12").before == 12 * MIB


@pytest.mark.parametrize("said", ["", "[N/A]", "N/A", "-1", "1 MiB", "²"])
def test_unknown_nvidia_smi_values_are_not_numbers(said: str) -> None:
    assert in_use("", lambda fields, uuid: said) is None


def test_the_card_has_done_its_work_before_it_is_read() -> None:
    cuda = FakeCuda()
    watched(cuda, lambda run, phase: FakeScript(cuda, phase, PEAKS))
    assert cuda.waited == 1 + 2 * 4


def test_out_of_memory_is_a_result_with_phase_and_earlier_readings() -> None:
    run = measured(peaks={**PEAKS, "backward": 20_000})
    assert (run.outcome, run.phase, run.step) == ("out of memory", "backward", 1)
    assert run.said == "CUDA out of memory. Tried to allocate 2.00 GiB"
    assert [(r.phase, r.step) for r in run.readings][-2:] == [("forward", 1), ("backward", 1)]
    assert run.allocated == 3000 * MIB
    line = rows.row(run, MACHINE)
    assert (line["outcome"], line["phase"], line["step"]) == ("out of memory", "backward", 1)
    assert "allocated" not in line
    assert line["phases"]["forward"] == 3000 * MIB


def test_running_out_of_memory_while_loading_is_a_result() -> None:
    def build(cuda: FakeCuda, phase: Phase) -> Any:
        with phase("load"):
            cuda.take(20_000, 0)

    run = measured(build=build)
    assert (run.outcome, run.phase, run.step) == ("out of memory", "load", None)


def test_an_error_of_the_script_is_one_line() -> None:
    def build(cuda: FakeCuda, phase: Phase) -> Any:
        raise ValueError("two\nlines")

    run = measured(build=build)
    assert (run.outcome, run.said) == ("failed", "ValueError: two lines")


def test_a_run_that_the_script_refuses_says_which_field() -> None:
    def build(cuda: FakeCuda, phase: Phase) -> Any:
        raise SpecError("optimizer.name: a probe does not run it", "optimizer.name")

    run = measured(build=build)
    assert (run.outcome, run.said) == ("refused", "optimizer.name: a probe does not run it")


def test_a_device_that_stops_answering_does_not_hide_the_first_error() -> None:
    class Broken(FakeCuda):
        def used(self) -> int:
            if self.context == 500 * MIB:
                raise RuntimeError("CUDA error: an illegal memory access")
            return super().used()

    run = measured(Broken(), {**PEAKS, "forward": 20_000})
    assert (run.outcome, run.phase) == ("out of memory", "forward")


# --- the process ---

EVENT = '{"event": "begin", "phase": "forward", "step": 1}'
READING = json.dumps({"event": "reading", **Reading("load", None, 1, 2, 2, 3)._asdict()})


def child(code: str) -> Callable[[dict[str, Any], float], ProcessResult]:
    """Return a process that runs `code` in place of the probe's."""
    before = f"import os, sys, time\nprint('''{READING}''')\nprint('''{EVENT}''', flush=True)\n"
    return lambda request, timeout: start(request, timeout, (sys.executable, "-c", before + code))


def ended(code: str, timeout: float = 60) -> MeasuredRun:
    return measure(RUN, MACHINE, timeout=timeout, start=child(code), ask=lambda fields, uuid: "0")


def test_a_killed_process_leaves_its_earlier_events() -> None:
    run = ended("os.kill(os.getpid(), 9)")
    assert (run.outcome, run.phase, run.step) == ("killed", "forward", 1)
    assert run.said == "the process was killed by SIGKILL, as the system does when the host's memory runs out"
    assert [r.phase for r in run.readings] == ["load"]


@ALL
def test_a_hanging_process_is_killed_with_its_children() -> None:
    run = ended("import subprocess\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])", 2)
    assert (run.outcome, run.phase, run.said) == ("no answer", "forward", "no answer in 2 seconds")
    assert [r.phase for r in run.readings] == ["load"]


def test_a_line_cut_off_by_the_end_is_left_out() -> None:
    run = ended("""sys.stdout.write('{"event": "rea'); sys.stdout.flush(); os._exit(3)""")
    assert (run.outcome, run.said) == ("failed", "the process ended with code 3")


def test_the_last_stderr_line_of_a_process_is_repeated() -> None:
    run = ended("sys.exit('a library\\nsaid \\x1b[31m this')")
    assert run.said == "the process ended with code 1: said \\x1b[31m this"


def test_bitsandbytes_exiting_for_lack_of_memory_is_a_result() -> None:
    run = ended("sys.exit('Error out of memory at line 382 in file /src/csrc/pythonInterface.cpp')")
    assert (run.outcome, run.phase) == ("out of memory", "forward")


def test_a_process_that_never_reads_its_request_does_not_block() -> None:
    many = RunSpec(model={"config": {**SMALLEST, "comment": ["x" * 1000] * 1000}})
    run = measure(many, MACHINE, start=child("os.close(0); os._exit(4)"), ask=lambda fields, uuid: "")
    assert run.outcome == "failed"


# --- the local card ---


def looked(cuda: Any) -> Callable[[dict[str, Any], float], ProcessResult]:
    def started(request: dict[str, Any], timeout: float) -> ProcessResult:
        assert request == {}
        events: list[dict[str, Any]] = []
        report_card(cuda, events.append)
        return ProcessResult(events, 0, "")

    return started


def test_the_card_driver_and_versions_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    machine = local_machine(looked(FakeCuda()), lambda fields, uuid: f"{fields} of {uuid}")
    assert machine.card == A3090
    assert machine.driver == "driver_version of GPU-1234"
    assert machine.versions == libraries.versions()
    assert machine.allocator == "expandable_segments:True"


def no_gpu() -> LocalGPU:
    raise MemplanError("cuda: no GPU is here", "cuda")


def broken() -> LocalGPU:
    raise RuntimeError("CUDA driver version is insufficient")


@pytest.mark.parametrize(
    ("started", "line"),
    [
        (looked(SimpleNamespace(card=no_gpu)), "cuda: no GPU is here"),
        (looked(SimpleNamespace(card=broken)), "cuda: RuntimeError: CUDA driver version is insufficient"),
        (lambda request, timeout: ProcessResult([], None, ""), "cuda: the driver did not answer in 180 seconds"),
        (
            lambda request, timeout: ProcessResult([], -11, ""),
            "cuda: the process that asks for the GPU was killed by SIGSEGV",
        ),
        (
            lambda request, timeout: ProcessResult([], 1, "No module named 'torch'"),
            "cuda: the process that asks for the GPU ended with code 1: No module named 'torch'",
        ),
    ],
)
def test_a_machine_without_a_card_that_answers_is_one_line(started: Any, line: str) -> None:
    with pytest.raises(MemplanError) as raised:
        local_machine(started, lambda fields, uuid: "")
    assert str(raised.value) == line
    assert raised.value.field == "cuda"


# --- torch.cuda itself ---


class FakeTorch:
    """The part of torch that a probe uses."""

    __version__ = "2.13.0+cu130"
    version = SimpleNamespace(cuda="13.0", hip=None)

    class OutOfMemoryError(RuntimeError):
        pass

    class cuda:  # noqa: N801
        is_available = staticmethod(lambda: True)
        mem_get_info = staticmethod(lambda device: (TOTAL - 900, TOTAL))
        get_device_properties = staticmethod(
            lambda device: SimpleNamespace(name="A card", major=8, minor=6, uuid="12-34")
        )
        max_memory_allocated = staticmethod(lambda device: 1)
        max_memory_reserved = staticmethod(lambda device: 2)
        memory_reserved = staticmethod(lambda device: 3)
        reset_peak_memory_stats = staticmethod(lambda device: None)
        synchronize = staticmethod(lambda device: None)
        device_memory_used = staticmethod(lambda device: 77)


def test_the_probe_calls_torchs_memory_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = TorchCuda(FakeTorch)
    assert cuda.card() == LocalGPU("A card", (8, 6), TOTAL, "GPU-12-34")
    assert cuda.peaks() == (1, 2)
    assert (cuda.held(), cuda.used()) == (3, 900)
    monkeypatch.setattr("memplan.probe.run.cuda.in_use", lambda uuid: 5 if uuid == "GPU-12-34" else None)
    assert cuda.shown() == 5
    monkeypatch.setattr("memplan.probe.run.cuda.in_use", lambda uuid: None)
    assert cuda.shown() == 77


@pytest.mark.parametrize(
    ("error", "out"),
    [
        (FakeTorch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (MemoryError("CUDA error: out of memory"), False),
    ],
)
def test_only_errors_about_the_cards_memory_are_out_of_memory(error: BaseException, out: bool) -> None:
    assert TorchCuda(FakeTorch).is_out_of_memory(error) is out


def test_torch_without_cuda_is_distinguished_from_a_machine_without_a_card() -> None:
    class Without(FakeTorch):
        class cuda:  # noqa: N801
            is_available = staticmethod(lambda: False)

    with pytest.raises(MemplanError, match=r"no GPU is here: torch 2\.13\.0\+cu130 finds no GPU"):
        TorchCuda(Without).card()
    Without.version = SimpleNamespace(cuda=None, hip=None)
    with pytest.raises(MemplanError, match="is built without CUDA"):
        TorchCuda(Without).card()


@pytest.mark.torch
def test_the_installed_torch_has_every_function_the_probe_calls() -> None:
    import inspect

    import torch

    names = [name for name in vars(FakeTorch.cuda) if not name.startswith("_")]
    for name in names:
        function = getattr(torch.cuda, name)
        if name != "is_available":
            assert "device" in inspect.signature(function).parameters, name
    assert issubclass(torch.OutOfMemoryError, RuntimeError)


@pytest.mark.torch
def test_watch_reports_every_phase_of_the_training_script() -> None:
    """The real script, on the CPU: the fake card counts nothing, but sees every phase."""
    from memplan.probe.script.script import build

    events = watched(FakeCuda(), lambda run, phase: build(run, "cpu", phase))
    assert events[-1]["event"] == "done", events[-1]
    phases = [(e["phase"], e["step"]) for e in events if e["event"] == "reading"]
    step = ("forward", "backward", "clip", "step")
    assert phases == [("context", None), ("load", None), *((p, 1) for p in step), *((p, 2) for p in step)]


# The probe's own process, except for a fake card and the script on the CPU, printing to standard output.
PROCESS = """
import memplan.probe.run.cuda as cuda
import memplan.probe.script.script as script
from tests.probe.test_cuda import FakeCuda

real = script.build

def build(run, device, phase):
    print("a library prints this")
    assert device == "cuda"
    return real(run, "cpu", phase)

script.build, cuda.TorchCuda = build, lambda torch: FakeCuda()
cuda.main()
"""


@pytest.mark.torch
def test_a_child_process_runs_and_reports_all_steps() -> None:
    root = Path(memplan.__file__).parents[1]
    command = (sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{PROCESS}")
    run = measure(
        RUN.model_copy(update={"batch": RUN.batch.model_copy(update={"sequence": 16})}),
        MACHINE,
        steps=1,
        start=lambda request, timeout: start(request, timeout, command),
        ask=lambda fields, uuid: "0",
    )
    assert (run.outcome, run.said) == ("measured", "")
    assert [(r.phase, r.step) for r in run.readings] == [
        *(("context", None), ("load", None)),
        *((phase, 1) for phase in ("forward", "backward", "clip", "step")),
    ]


@pytest.mark.torch
def test_the_real_process_answers_on_this_machine() -> None:
    import torch

    if torch.cuda.is_available():
        assert local_machine().card.total > 0
    else:
        with pytest.raises(MemplanError, match="cuda: no GPU is here"):
            local_machine()


# --- lines of JSON ---


def test_a_line_is_a_golden_run() -> None:
    line = rows.row(measured(), MACHINE)
    assert (line["allocated"], line["reserved"], line["process"]) == (4000 * MIB, 4400 * MIB, 4900 * MIB)
    assert line["phases"] == {
        "load": 1100 * MIB,
        "forward": 3000 * MIB,
        "backward": 4000 * MIB,
        "step": 2000 * MIB,
    }
    assert line["context"] == {"first": 400 * MIB, "last": 500 * MIB}
    assert (line["measured"], line["driver"]) == ("NVIDIA GeForce RTX 3090", "550.54.15")
    assert line["stack"] == "torch 2.13.0+cu130, peft 0.21.2"
    assert RunSpec(**line["run"]) == RUN
    assert json.loads(json.dumps(line)) == line


def test_two_runs_have_two_names() -> None:
    runs = [RUN, RUN.model_copy(update={"batch": RUN.batch.model_copy(update={"micro": 2})})]
    runs.append(RunSpec(model={"config": SMALLEST}, loop={"padded": True}))
    assert len({rows.run_id(run) for run in runs}) == 3
    assert rows.run_id(RUN).startswith("llama-full-bf16-adamw_torch_fused-sdpa-hf-ckpt-b1-s2048-")


# --- the command ---

COMMAND = get_command(app)


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(name="probe")
def _probe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    monkeypatch.setattr(libraries, "require", lambda *names: None)
    monkeypatch.setattr(process, "local_machine", lambda: MACHINE)

    def run(*args: str) -> Ran:
        with pytest.raises(SystemExit) as left:
            COMMAND.main(["probe", *args])
        captured = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return Ran(left.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALLEST))
    return str(path)


class Card3090:
    """Measures every run on the fake card, and records the runs."""

    def __init__(self, peaks: dict[str, int] = PEAKS, **outcomes: str) -> None:
        self.peaks, self.outcomes = peaks, outcomes
        self.asked: list[RunSpec] = []

    def __call__(self, run: RunSpec, machine: Machine, steps: int = 2, timeout: float = 1) -> MeasuredRun:
        self.asked.append(run)
        outcome = self.outcomes.get(f"b{run.batch.micro}")
        found = measured(peaks=self.peaks)._replace(run=run)
        if outcome is None:
            return found
        return found._replace(
            outcome=outcome, readings=found.readings[:2], phase="load", step=None, said=f"the {outcome}"
        )


def on_card(monkeypatch: pytest.MonkeyPatch, card: Any) -> Any:
    monkeypatch.setattr(process, "measure", card)
    return card


Probing = Callable[..., Ran]


def test_the_command_shows_every_phase_next_to_the_estimate(
    probe: Probing, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = on_card(monkeypatch, Card3090())
    ran = probe(config, "--cuda")
    assert ran.code == 0, ran
    assert card.asked[0] == RUN  # the path became the config, and the card the local one
    assert ran.err == ""
    lines = ran.out.splitlines()
    assert lines[0] == "measured on NVIDIA GeForce RTX 3090: 4.8 GiB used, 3.9 GiB of them in torch's tensors"
    words = [line.split() for line in lines]
    assert [w[0] for w in words if len(w) > 4 and w[0] in ("load", "forward", "backward", "step")] == [
        *("load", "forward", "backward", "step", "forward", "backward", "step"),
    ]
    answer = memplan.estimate(RUN)
    row = next(w for w in words if w[:2] == ["backward", "2"])
    peak = max(p.peak for p in answer.phases if (p.phase, p.step) == ("backward", 2))
    assert row[2:6] == ["3.91", f"{peak / 2**30:.2f}", f"{100 * (peak / (4000 * MIB) - 1):+.2f}", "%"]


def test_the_command_writes_json(probe: Probing, config: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_card(monkeypatch, Card3090())
    found = json.loads(probe(config, "--cuda", "--json").out)
    assert found["allocated"] == 4000 * MIB
    assert found["estimate"]["bytes"]["allocated"] == memplan.estimate(RUN).bytes.allocated
    output = tmp_path / "out.json"
    ran = probe(config, "--cuda", "--json", "--output", str(output))
    assert ran.out == ""
    assert json.loads(output.read_text())["reserved"] == 4400 * MIB


@pytest.mark.parametrize(("outcome", "code"), [("out of memory", 0), ("killed", 1), ("no answer", 1), ("failed", 1)])
def test_every_outcome_has_its_line_and_code(
    probe: Probing, config: str, monkeypatch: pytest.MonkeyPatch, outcome: str, code: int
) -> None:
    on_card(monkeypatch, Card3090(b1=outcome))
    ran = probe(config, "--cuda")
    assert ran.code == code
    assert ran.out.startswith(f"{outcome} in load on NVIDIA GeForce RTX 3090: the {outcome}\n")


def test_a_refused_run_is_wrong_input(probe: Probing, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any) -> MeasuredRun:
        return measured()._replace(outcome="refused", said="kernels.compile: a probe does not run it")

    on_card(monkeypatch, refused)
    assert probe(config, "--cuda") == (2, "", "memplan: kernels.compile: a probe does not run it\n")


def test_a_card_that_is_too_small_is_reported_before_the_run(probe: Probing, monkeypatch: pytest.MonkeyPatch) -> None:
    card = on_card(monkeypatch, Card3090())
    ran = probe("qwen2-7b", "--cuda")
    assert ran.err.startswith("memplan: this run is expected to run out of memory: it needs ")
    assert ran.err.count("\n") == 1
    assert card.asked[0] == RunSpec(model="qwen2-7b", gpu="rtx-3090")


def test_runs_without_an_estimate_are_still_measured(
    probe: Probing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**SMALLEST, "model_type": "longcat_flash"}))
    on_card(monkeypatch, Card3090())
    ran = probe(str(path), "--cuda")
    assert ran.code == 0
    assert "- there is no estimate to compare with: " in ran.out


MISTAKES: dict[str, Sequence[str]] = {
    "qwen2-7b": ("probe: choose one of", "--trace, --cuda, --gradients"),
    "qwen2-7b --cuda --trace": ("probe: ", "exclude each other"),
    "--cuda": ("model: name one",),
    "qwen2-7b --cuda --gpu a100-80gb": (
        "gpu (--gpu): ",
        "A100",
        "is not in this machine, which has NVIDIA GeForce RTX 3090",
    ),
    "qwen2-7b --cuda --gpu 3090 --gpu t4": ("gpu (--gpu): a probe runs on one card",),
    "qwen2-7b --cuda --steps 0": ("steps (--steps): must be at least 1",),
    "qwen2-7b --cuda --timeout 0": ("timeout (--timeout): must be more than 0",),
    "qwen2-7b --cuda --rank 4": ("method.rank (--rank)", "no adapters"),
    "qwen2-8b --cuda": ("model", "qwen2-8b", "did you mean"),
    "qwen2-7b --cuda --dtype int4": ("precision.weights (--dtype)",),
    "qwen2-7b --gradients --method dora": ("method.kind (--method): gradients are compared for lora",),
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_one_line(probe: Probing, typed: str) -> None:
    ran = probe(*typed.split())
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.count("\n") == 1
    assert [word for word in MISTAKES[typed] if word not in ran.err] == [], ran.err


def test_a_missing_library_is_one_line_that_names_the_extra(
    probe: Probing, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*names: str) -> None:
        raise ProbeError("probe: torch is not installed; pip install 'memplan[probe]' installs what a probe needs")

    monkeypatch.setattr(libraries, "require", missing)
    ran = probe(config, "--cuda")
    assert (ran.code, ran.out) == (2, "")
    assert (
        ran.err == "memplan: probe: torch is not installed; pip install 'memplan[probe]' installs what a probe needs\n"
    )


def test_probe_has_every_option_of_a_run_that_estimate_has() -> None:
    estimate, mine = (
        {name for group in options.values() for name in group}
        for options in (ESTIMATE_OPTIONS, command("probe").options)
    )
    of_answers = {*("online", "revision", "via", "cache", "format", "explain", "strict", "date", "details", "plain")}
    of_answers |= {"emit", "patch", "share", "site"}
    assert estimate - mine == of_answers


# --- causes of deviations ---


def noted(card: LocalGPU = A3090, usable: int | None = A3090.total, **of_run: Any) -> list[str]:
    return list(probed.notes(measured()._replace(**of_run), MACHINE._replace(card=card), usable))


def test_causes_of_deviating_figures_are_noted() -> None:
    assert noted(shown=None) == []
    assert "nvidia-smi did not show" in noted(before=None)[0]
    assert noted(before=700 * MIB)[0].startswith("700.0 MiB on the card were in use before, by others")
    assert "catalogue does not have" in noted(shown=None, usable=None)[0]
    assert "memplan's catalogue has" in noted(card=A3090._replace(total=10_000 * MIB), shown=None)[0]


def test_an_estimate_without_later_steps_is_compared_with_every_step() -> None:
    run = RunSpec(model={"config": SMALLEST}, optimizer="sgd")
    answer = memplan.estimate(run)
    assert {p.step for p in answer.phases} == {None}
    assert probed.estimated_peak(answer, "backward", 1) == probed.estimated_peak(answer, "backward", 2)
    later = memplan.estimate(RUN)
    assert probed.estimated_peak(later, "backward", 3) == probed.estimated_peak(later, "backward", 2)
    assert probed.estimated_peak(later, "backward", 1) != probed.estimated_peak(later, "backward", 2)
