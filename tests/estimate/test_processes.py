"""Use by a scheduler: errors and answers cross processes, and a process forked among busy threads answers."""

from __future__ import annotations

import copy
import os
import pickle
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from threading import Barrier, Thread

import pytest

import memplan
from memplan import MemplanError, RunSpec, estimate, load_card
from memplan.core.cached_property import cached_property
from memplan.core.errors import FieldError, InternalError, UnknownNameError, errors_about
from memplan.serve.problems import RequestError

RUN = RunSpec(model="qwen2-0.5b", method="qlora", gpu="t4")


def error_kinds() -> list[type[MemplanError]]:
    """Return MemplanError and every subclass defined in memplan."""
    for module in pkgutil.walk_packages(memplan.__path__, "memplan."):
        if not module.name.endswith("__main__"):
            try:
                import_module(module.name)
            except ModuleNotFoundError as error:
                if str(error.name).startswith("memplan"):  # the probe's modules need torch
                    raise

    def below(kind: type[MemplanError]) -> Iterator[type[MemplanError]]:
        yield kind
        for subclass in kind.__subclasses__():
            yield from below(subclass)

    return [kind for kind in below(MemplanError) if kind.__module__.startswith("memplan")]


def example(kind: type[MemplanError]) -> MemplanError:
    """Return an error of this class. A subclass with another constructor needs its own case here."""
    if kind is UnknownNameError:
        return UnknownNameError("model", "lama-3.1-8b", ["llama-3.1-8b", "qwen2-7b"])
    if kind is InternalError:
        return InternalError("logits are freed twice")
    if kind is FieldError:
        return FieldError("invalid_value", "batch.micro: must be at least 1, not 0", "batch.micro", ["1"])
    if kind is RequestError:
        return RequestError(400, "not_json", "the body is not JSON")
    return kind("batch.micro: must be at least 1, not 0", "batch.micro")


def test_every_error_is_copied_and_pickled_with_all_it_says() -> None:
    kinds = error_kinds()
    assert UnknownNameError in kinds
    for kind in kinds:
        error = example(kind)
        error.add_note("in line 3")
        pickled = [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
        for again in (*pickled, copy.copy(error), copy.deepcopy(error)):
            assert type(again) is kind
            assert again.args == error.args
            assert vars(again) == vars(error)
            assert (str(again), again.field, again.exit_code) == (str(error), error.field, error.exit_code)


def test_an_unknown_name_keeps_its_value_and_the_nearest() -> None:
    again = pickle.loads(pickle.dumps(example(UnknownNameError)))
    assert (again.value, again.suggestions[0]) == ("lama-3.1-8b", "llama-3.1-8b")


def test_a_pickled_error_keeps_the_field_it_was_renamed_to() -> None:
    with pytest.raises(UnknownNameError) as caught, errors_about("serving.draft_model"):
        raise example(UnknownNameError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.field == "serving.draft_model"
    assert str(again) == str(caught.value)


def test_a_mistyped_model_leaves_a_pool_of_processes_working() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        wrong = pool.submit(estimate, RUN.model_copy(update={"model": "lama-3.1-8b"}))
        right = pool.submit(estimate, RUN)
        with pytest.raises(UnknownNameError, match=r"^model: unknown name 'lama-3.1-8b'; did you mean llama-3.1-8b"):
            wrong.result()
        answer = right.result()
    assert answer == estimate(RUN)
    assert answer.model_dump() == estimate(RUN).model_dump()


def test_a_model_from_another_process_is_found_among_equals() -> None:
    code = "import pickle, memplan; card = memplan.load_card('gpt2'); hash(card); print(pickle.dumps(card).hex())"
    for seed in ("1", "2"):  # PYTHONHASHSEED
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert {load_card("gpt2"): "found"}[pickle.loads(bytes.fromhex(out.stdout))] == "found"


FORKS = """
import os, signal, threading
from memplan import RunSpec, estimate

def used(vocab_size):
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"model_type": "llama", "vocab_size": vocab_size, **sizes}
    return estimate(RunSpec(model={"config": config}, method="lora", gpu="t4")).bytes.used

def ask(first):
    for vocab_size in range(first, 2**27, 3):
        used(vocab_size)

expected = used(1000)  # every module that an answer needs is imported from here on
for first in range(2000, 2003):
    threading.Thread(target=ask, args=(first,), daemon=True).start()
for _ in range(4):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that waits for ever ends by this signal
        os._exit(used(1000) != expected or used(1001) <= 0)
    status = os.waitpid(child, 0)[1]
    print(status, flush=True)
    if status:
        break
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_among_busy_threads_answers() -> None:
    ran = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["0"] * 4, ran.stdout + ran.stderr


class Squared:
    def __init__(self, side: int) -> None:
        self.side, self.computed, self.both = side, 0, Barrier(2)

    @cached_property
    def area(self) -> int:
        """The side squared."""
        self.computed += 1
        return self.side**2

    @cached_property
    def mark(self) -> object:
        self.both.wait(60)
        return object()


def test_a_cached_property_is_computed_once_and_kept() -> None:
    square = Squared(3)
    assert (square.area, square.area, square.computed) == (9, 9, 1)
    assert vars(square)["area"] == 9
    assert isinstance(Squared.area, cached_property)
    assert Squared.area.__doc__ == "The side squared."


def test_threads_that_compute_a_cached_property_at_once_get_one_value() -> None:
    square = Squared(3)
    marks: list[object] = []
    threads = [Thread(target=lambda: marks.append(square.mark)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(marks) == 2
    assert marks[0] is marks[1] is square.mark
