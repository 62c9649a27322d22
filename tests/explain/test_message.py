"""Messages of every form are read with all their numbers, whatever a launcher, a logger or a terminal does to them."""

from __future__ import annotations

import pytest

from benchmarks import messages
from memplan.core.units import GIB, MIB
from memplan.explain.forms import FIELDS, FORMS, STATEMENTS
from memplan.explain.message import Amount, Message, ProcessUse, read_log

FULL = messages.TRACEBACK + messages.TORCH + "\n"


def main_of(text: str) -> Message:
    main = read_log(text).main
    assert main is not None
    return main


def values_of(text: str) -> dict[str, object]:
    return {name: value.text if isinstance(value, Amount) else value for name, value in main_of(text).values.items()}


def test_torchs_message_is_read_in_full() -> None:
    message = main_of(FULL)
    assert values_of(FULL) == {
        "request": "9.47 GiB",
        "device": 0,
        "total": "14.75 GiB",
        "free": "3.78 GiB",
        "in_use": "9.95 GiB",
        "allocated": "9.20 GiB",
        "pools": "12.00 MiB",
        "unallocated": "623.81 MiB",
    }
    assert message.processes == (ProcessUse(2670, Amount("1.02 GiB", 102 * GIB // 100, -(-GIB // 200))),)
    assert [(frame.function, frame.line, frame.code) for frame in message.frames] == [
        ("training_step", 2052, "loss = self.compute_loss(model, inputs)"),
        ("_convert_to_fp32", 781, "return tensor.float()"),
    ]


def test_the_form_before_2_1_is_read() -> None:
    assert values_of(messages.BEFORE_2_1) == {
        "request": "376.00 MiB",
        "device": 1,
        "total": "3.95 GiB",
        "allocated": "1.72 GiB",
        "free": "354.88 MiB",
        "reserved": "2.46 GiB",
    }


@pytest.mark.parametrize(
    ("printed", "read"),
    [
        ("20.00 MiB", (20 * MIB, -(-MIB // 200))),
        ("1.5 GiB", (3 * GIB // 2, -(-GIB // 20))),
        ("136 bytes", (136, 0)),
        ("2 GB", (2 * GIB, GIB // 2)),
    ],
)
def test_an_amount_has_the_slack_of_its_last_digit(printed: str, read: tuple[int, int]) -> None:
    assert main_of(f"CUDA out of memory. Tried to allocate {printed}.").amount("request") == Amount(printed, *read)


@pytest.mark.parametrize("form", [*FORMS, *STATEMENTS], ids=lambda form: form.start[:40])
def test_every_form_is_found_with_all_its_fields(form: object) -> None:
    assert isinstance(form, type(FORMS[0]))
    log = read_log(" ".join(map(messages.example, (form.start, *form.details[:1]))) + " \n")
    assert [m.form.start for m in (*log.messages, *log.statements)][:1] == [form.start]
    fields = {part.split(">")[0] for part in form.start.split("<")[1:]} & set(FIELDS)
    assert {field.removesuffix("_bytes").removesuffix("_told") for field in fields} <= {
        *(log.messages or log.statements)[0].values
    }


@pytest.mark.parametrize(
    "prefix",
    [
        "[rank3]: ",
        "[default3]:",
        "3: ",
        "[1,3]<stderr>:",
        "(EngineCore_DP0 pid=6940) ",
        "(VllmWorker rank=3 pid=254) ERROR 06-02 05:17:18 [core.py:387] ",
        "[2026-02-24T20:21:58Z] (EngineCore_DP0 pid=6940) ",
        "[2026-02-24 20:21:58 TP3] ",
        "vllm-1  | ",
        "\x1b[36m(RayWorkerWrapper pid=7106, ip=192.168.10.10)\x1b[0m ",
        "│ ",
        "> ",
    ],
)
def test_prefixes_and_colours_change_nothing(prefix: str) -> None:
    text = "".join(f"{prefix}{line}\n" for line in FULL.splitlines())
    message = main_of(text)
    assert (message.values, message.processes) == (main_of(FULL).values, main_of(FULL).processes)
    assert [frame.code for frame in message.frames] == [frame.code for frame in main_of(FULL).frames]
    assert message.ranks in ((), (3,))


@pytest.mark.parametrize("width", [20, 37, 64, 80, 100])
def test_a_message_wrapped_by_a_terminal_is_read(width: int) -> None:
    lines = [""]
    for word in messages.TORCH.split(" "):
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += word + " "
    assert main_of("\n".join(lines)[:900]).values.items() >= main_of("\n".join(lines[:14])).values.items()
    assert values_of("\n".join(lines))["request"] == "9.47 GiB"


def test_progress_bars_and_line_ends_of_windows_are_passed_over() -> None:
    bars = "".join(f"\r {n}%|{'#' * n} | {n}/99 [00:01<00:02, 4.50it/s]" for n in range(99))
    assert main_of(bars + "\n" + FULL).values == main_of(FULL).values
    assert main_of(FULL.replace("\n", "\r\n")).values == main_of(FULL).values


def test_a_truncated_message_has_no_other_numbers_than_the_full_one() -> None:
    full = main_of(FULL)
    for end in range(len(messages.TRACEBACK) + 60, len(FULL)):
        cut = main_of(FULL[:end])
        assert cut.values.items() <= full.values.items()
        assert set(cut.processes) <= set(full.processes)


def test_ranks_with_the_same_message_are_one() -> None:
    text = "".join(f"[rank{rank}]: {messages.TORCH}\n" for rank in (0, 1, 2, 0))
    (message,) = read_log(text).messages
    assert (message.ranks, message.times) == ((0, 1, 2), 4)


def test_interleaved_tracebacks_keep_their_ranks_frames() -> None:
    one = [f"[rank0]: {line}" for line in FULL.splitlines()]
    two = [
        f"[rank1]: {line}" for line in FULL.replace("tensor.float", "other.call").replace("9.47", "1.00").splitlines()
    ]
    text = "\n".join(line for pair in zip(one, two, strict=True) for line in pair)
    codes = {message.ranks: message.frames[-1].code for message in read_log(text).messages}
    assert codes == {(0,): "return tensor.float()", (1,): "return other.call()"}


def test_a_tensor_that_did_not_fit_is_explained_before_a_killed_process() -> None:
    text = f"Killed\n{messages.TORCH}\nexit code 137\n"
    assert [m.form.cause for m in read_log(text).messages] == ["killed", "GPU", "killed"]
    assert main_of(text).form.cause == "GPU"


def test_frames_of_notebooks_and_rich_are_read() -> None:
    notebook = """/usr/lib/python3.11/site-packages/transformers/modeling_llama.py in forward(self, x)
    250     rel = self.pos(x)
--> 251     att = self.bias(x)
    252
OutOfMemoryError: CUDA out of memory. Tried to allocate 256.00 MiB.
"""
    rich = """╭── Traceback (most recent call last) ──╮
│ /usr/lib/python3.11/site-packages/transformers/modeling_llama.py:251 in forward      │
│   250     rel = self.pos(x)                                                          │
│ ❱ 251     att = self.bias(x)                                                         │
╰──────────────────────────────────────────╯
OutOfMemoryError: CUDA out of memory. Tried to allocate 256.00 MiB.
"""
    for text in (notebook, rich):
        (frame,) = main_of(text).frames
        assert (frame.function, frame.line, frame.code) == ("forward", 251, "att = self.bias(x)")


def test_a_log_without_a_message_has_none() -> None:
    for text in (
        "",
        "epoch 3 loss 0.1\n",
        "except torch.cuda.OutOfMemoryError:\n    retry()\n",
        "GPU memory 20.00 MiB",
    ):
        assert read_log(text).messages == ()


def test_mutated_messages_give_no_traceback_and_no_invented_number() -> None:
    assert messages.main(600, 7) == 0
