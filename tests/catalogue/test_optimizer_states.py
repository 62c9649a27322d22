"""Optimizers: the states of each, as arithmetic on its shapes, and the options that change them.

Every name is in `GOLDEN` with the arithmetic of its library's source. The optimizers of torch, transformers and
bitsandbytes are built as the Trainer builds them, on meta tensors, and compared tensor by tensor.
"""

from collections.abc import Callable, Iterable, Iterator
from math import prod
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.catalogue.optimizers.optimizers import REFUSED
from memplan.catalogue.optimizers.parameter_rules import Parameter
from memplan.catalogue.optimizers.states import (
    GRAD_SCALER,
    OptimizerMemory,
    clipping,
    optimizer_memory,
    optimizer_names,
)
from memplan.core.errors import SpecError, UnknownNameError


def r(n: int) -> int:
    """Rounded up to 512, as torch's allocator does."""
    return (n + 511) // 512 * 512


# A parameter of every kind, by elements: E is not a multiple of 256, Q is; S and N are below 4096.
E, Q, S, N, B = 1000 * 150, 512 * 640, 64 * 33, 700, 5000


def example(dtype: str) -> list[Parameter]:
    return [
        Parameter("embed", (1000, 150), dtype, embedding=True, vocabulary=True),
        Parameter("q", (512, 640), dtype, target=True),
        Parameter("small", (64, 33), dtype, target=True),
        Parameter("norm", (700,), dtype),
        Parameter("bias", (5000,), dtype),
    ]


class Expected(NamedTuple):
    """On the GPU, and on the host."""

    states: int
    first: int = 0
    later: int = 0
    backward: int = 0
    host: int = 0


def every(e: int) -> int:
    """Return the bytes of a tensor like every parameter, with e bytes per element."""
    return r(e * E) + r(e * Q) + r(e * S) + r(e * N) + r(e * B)


def adamw_torch(e: int) -> Expected:
    return Expected(2 * every(e), every(e), every(e))


def eight_bit(n: int) -> int:
    """A moment in 8 bits and its scales."""
    return r(n) + r(4 * -(-n // 256))


def bitsandbytes(moments: int) -> int:
    """8-bit moments: the embedding's and small ones are in fp32."""
    per_moment = r(4 * E) + eight_bit(Q) + r(4 * S) + r(4 * N) + eight_bit(B) + 1024
    return moments * per_moment


def torchao(e: int, codes: int, qmap: int) -> int:
    """Only q's moments are quantised."""
    return 2 * (every(e) - r(e * Q) + codes + r(4 * (Q // 256)) + qmap)


def factored(*shape: int) -> int:
    """Adafactor's states of one parameter."""
    return sum(r(4 * n) for n in shape) + 512


def adafactor(e: int) -> Expected:
    """The peak is q's update, with the embedding's update still alive; in the first step, before later states exist."""
    after = factored(64, 33) + factored(700) + factored(5000)
    states = factored(1000, 150) + factored(512, 640) + after
    peak = (4 if e == 2 else 2) * r(4 * Q) + r(4 * E)
    return Expected(states, peak - after, peak)


# q projected to rank 128, and small to 33, its full rank
Q_LOW, S_LOW = 128 * 640, 64 * 33
SVD_Q = r(4 * 512 * 512) + r(4 * 512) + r(4 * 512 * 640)  # U, s, Vh


def projections(e: int) -> tuple[int, int]:
    """GaLore's projections of q and small: slices copied to bf16, or views of the full narrow side in fp32."""
    return (r(2 * 128 * 512), r(2 * 33 * 33)) if e == 2 else (r(4 * 512 * 512), r(4 * 33 * 33))


def projecting_q(e: int) -> int:
    """GaLore's new projection: the gradient in fp32, the vectors, and the copy that cuSOLVER overwrites.

    That copy is larger than what comes after it: the rebuilt matrix with its diagonal, or with the slice in bf16.
    """
    return (r(4 * Q) if e == 2 else 0) + SVD_Q + r(4 * Q)


def galore_adamw(e: int) -> Expected:
    q, small = projections(e)
    q, small = q + 2 * r(e * Q_LOW), small + 2 * r(e * S_LOW)
    states = 2 * (r(e * E) + r(e * N) + r(e * B)) + q + small
    update = 3 * r(e * Q_LOW) + 2 * r(e * Q)
    projecting = projecting_q(e) + 2 * r(e * B)  # the bias, updated before: its update and denominator
    return Expected(states, max(projecting - q - small, update - small), max(projecting, update))


def galore_adamw_layerwise(e: int) -> Expected:
    update = 3 * r(e * Q_LOW) + 2 * r(e * Q)
    return Expected(galore_adamw(e).states, backward=max(update, projecting_q(e)))


def galore_adamw_8bit(e: int) -> Expected:
    """Embeddings are no exception; every parameter has a norm."""
    q, small = projections(e)
    q, small = q + 2 * eight_bit(Q_LOW) + 512, small + 2 * r(4 * S_LOW) + 512
    states = 2 * eight_bit(E) + 2 * r(4 * N) + 2 * eight_bit(B) + 3 * 512 + q + small + 2048
    return Expected(states, projecting_q(e) - q - small, projecting_q(e))


def galore_adamw_8bit_layerwise(e: int) -> Expected:
    """With separate maps for the embedding, q and the bias."""
    return Expected(galore_adamw_8bit(e).states + 2 * 2048, backward=projecting_q(e))


def galore_adafactor(e: int) -> Expected:
    """The gradient is projected in fp32, so the view is kept even in bf16."""
    small = factored(64, 33) + r(4 * 33 * 33)
    states = factored(1000, 150) + factored(700) + factored(5000) + factored(128, 640) + r(4 * 512 * 512) + small
    update = (3 if e == 2 else 2) * r(4 * Q) + 2 * r(4 * Q_LOW)
    projecting = projecting_q(e) + (2 if e == 2 else 1) * r(4 * B)  # the bias, updated before: its update and copy
    q = factored(128, 640) + r(4 * 512 * 512)
    return Expected(states, max(projecting - q - small, update - small), max(projecting, update))


def apollo_adamw(e: int) -> Expected:
    """Its rank stays 128 even if the matrix has 33."""
    q = 2 * r(e * Q_LOW) + r(e * 128 * 512) + 512
    small = 2 * r(e * 128 * 64) + r(e * 128 * 33) + 512
    states = 2 * (r(e * E) + r(e * N) + r(e * B)) + q + small
    first_update = 3 * r(e * Q_LOW) + r(e * 640) + r(e * Q)
    later_update = first_update + 1024 + r(e * Q)  # growth is limited
    projecting = r(4 * Q) + 2 * r(4 * 128 * 512) + 2 * r(e * B)
    if e == 2:
        return Expected(states, projecting - q - small, projecting)
    return Expected(states, first_update - small, later_update)


def apollo_adamw_layerwise(e: int) -> Expected:
    update = 3 * r(e * Q_LOW) + r(e * 640) + 1024 + 2 * r(e * Q)
    projecting = r(4 * Q) + 2 * r(4 * 128 * 512)
    return Expected(apollo_adamw(e).states, backward=projecting if e == 2 else update)


def anyprecision(e: int) -> Expected:
    peak = 2 * r(4 * Q) + r(4 * E)
    return Expected(2 * every(4), peak - 2 * (r(4 * S) + r(4 * N) + r(4 * B)), peak)


def muon(e: int) -> Expected:
    states = r(e * Q) + r(e * S) + 2 * (r(e * E) + r(e * N) + r(e * B))
    iteration = r(e * Q) + 2 * r(2 * Q) + 2 * r(2 * 512 * 512)
    return Expected(states, iteration, iteration)


def adalomo(e: int) -> Expected:
    states = r(4 * 1000) + r(4 * 150) + r(4 * 512) + r(4 * 640) + r(4 * 64) + r(4 * 33) + r(4 * 700) + r(4 * 5000)
    return Expected(states, backward=3 * r(4 * Q) + r(4 * 512) + r(4 * 640))  # with its factors of rows and columns


def grokadamw(e: int) -> Expected:
    peak = r(e * E) + 5 * r(e * Q)
    return Expected(0, peak, peak, host=3 * e * (E + Q + S + N + B))


def torchao_8bit(e: int) -> Expected:
    peak = 2 * r(4 * Q) + 2 * r(4 * (Q // 256))
    return Expected(torchao(e, r(Q), 1024), peak, peak)


def torchao_4bit(e: int) -> Expected:
    peak = 2 * r(4 * Q) + 2 * r(4 * (Q // 256)) + 2 * r(8 * Q)
    return Expected(torchao(e, r(Q // 2), 512), peak, peak)


SMALL = r(4 * S) + r(4 * N) + r(4 * B)  # not paged, in fp32
SMALL_8 = r(4 * S) + r(4 * N) + eight_bit(B) + r(4 * (Q // 256)) + 1024  # in 8 bits, with q's scales and the map
MIXED = r(8 * E) + r(2 * Q) + r(8 * (Q // 256)) + r(8 * S) + r(8 * N) + r(2 * B) + r(8 * 20) + 1024  # (2, ...)
MIXED_SMALL_8 = r(8 * (Q // 256)) + r(8 * S) + r(8 * N) + r(2 * B) + r(8 * 20) + 1024

# By names of transformers 5.24 training_args.OptimizerNames, and two more. The bytes were read from, and traced with,
# torch 2.13, transformers 5.24, bitsandbytes 0.50, torchao 0.18 (as Inductor compiles it for sm80), galore-torch 1.0,
# apollo-torch 1.0, lomo-optim 0.1, grokadamw 0.1, schedulefree 1.4, torch-optimi 0.3 and torchdistx 0552f1b; read only:
# torch_npu and torch_xla.
GOLDEN: dict[str, Callable[[int], Expected]] = {
    "adamw_torch": adamw_torch,
    "adamw_torch_fused": lambda e: Expected(2 * every(e) + 5 * 512),
    "adamw_torch_xla": adamw_torch,
    "adamw_torch_npu_fused": lambda e: Expected(2 * every(e), 2 * every(e), 2 * every(e)),
    "adafactor": adafactor,
    "adamw_anyprecision": anyprecision,
    "adamw_torch_4bit": torchao_4bit,
    "adamw_torch_8bit": torchao_8bit,
    "sgd": lambda e: Expected(0),
    "adagrad": lambda e: Expected(every(e) + 5 * 512, 2 * every(e), 2 * every(e)),
    "rmsprop": lambda e: Expected(every(e), every(e), every(e)),
    "adamw_bnb_8bit": lambda e: Expected(bitsandbytes(2)),
    "adamw_8bit": lambda e: Expected(bitsandbytes(2)),
    "paged_adamw_32bit": lambda e: Expected(2 * SMALL, host=2 * 4 * (E + Q)),
    "paged_adamw_8bit": lambda e: Expected(2 * SMALL_8, host=2 * (4 * E + Q)),
    "ademamix": lambda e: Expected(every(8) + every(4)),
    "ademamix_8bit": lambda e: Expected(MIXED + bitsandbytes(1)),
    "paged_ademamix_32bit": lambda e: Expected(r(8 * S) + r(8 * N) + r(8 * B) + SMALL, host=(8 + 4) * (E + Q)),
    "paged_ademamix_8bit": lambda e: Expected(MIXED_SMALL_8 + SMALL_8, host=(8 + 4) * E + (2 + 1) * Q),
    "lion_32bit": lambda e: Expected(every(4)),
    "lion_8bit": lambda e: Expected(bitsandbytes(1)),
    "paged_lion_32bit": lambda e: Expected(SMALL, host=4 * (E + Q)),
    "paged_lion_8bit": lambda e: Expected(SMALL_8, host=4 * E + Q),
    "rmsprop_bnb": lambda e: Expected(every(4)),
    "rmsprop_bnb_8bit": lambda e: Expected(bitsandbytes(1)),
    "rmsprop_bnb_32bit": lambda e: Expected(every(4)),
    "galore_adamw": galore_adamw,
    "galore_adamw_8bit": galore_adamw_8bit,
    "galore_adafactor": galore_adafactor,
    "galore_adamw_layerwise": galore_adamw_layerwise,
    "galore_adamw_8bit_layerwise": galore_adamw_8bit_layerwise,
    "apollo_adamw": apollo_adamw,
    "apollo_adamw_layerwise": apollo_adamw_layerwise,
    "lomo": lambda e: Expected(0, backward=(2 if e == 2 else 1) * r(4 * Q)),
    "adalomo": adalomo,
    "grokadamw": grokadamw,
    "schedule_free_radam": lambda e: Expected(2 * every(e), 0, every(e)),
    "schedule_free_adamw": adamw_torch,
    "schedule_free_sgd": lambda e: Expected(every(e)),
    "stable_adamw": lambda e: Expected(3 * every(2) + 5 * 1024 if e == 2 else 2 * every(4) + 5 * 1536),
    "none": lambda e: Expected(0),
    "muon": muon,
}


NAMES = [name for name in GOLDEN if name not in ("none", "muon")]


def gpu(memory: OptimizerMemory) -> int:
    return sum(s.bytes * s.count for s in memory.states if not s.host)


def host(memory: OptimizerMemory) -> int:
    return sum(s.bytes * s.count for s in memory.states if s.host)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", optimizer_names())
def test_golden(name: str, dtype: str) -> None:
    memory = optimizer_memory(name, example(dtype))
    found = Expected(gpu(memory), memory.first, memory.later, memory.backward, host(memory))
    assert found == GOLDEN[name](4 if dtype == "fp32" else 2)


def test_names() -> None:
    assert set(optimizer_names()) == set(GOLDEN)
    assert not set(GOLDEN) & set(REFUSED)


@pytest.mark.torch
def test_every_name_of_transformers_is_answered_or_refused() -> None:
    training_args = pytest.importorskip("transformers.training_args")
    assert {member.value for member in training_args.OptimizerNames} == {*NAMES, *REFUSED}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_optimizer_options_are_refused(name: str) -> None:
    with pytest.raises(SpecError, match=rf"^optimizer\.name: {name}: .*cannot") as error:
        optimizer_memory(name, example("bf16"))
    assert error.value.field == "optimizer.name"


@pytest.mark.parametrize(
    ("typed", "nearest"), [("adamw_troch", "adamw_torch"), ("paged_adamw", "paged_adamw_8bit"), ("SGD", "sgd")]
)
def test_unknown_name(typed: str, nearest: str) -> None:
    with pytest.raises(UnknownNameError, match=rf"^optimizer\.name: unknown name '{typed}'.*{nearest}") as error:
        optimizer_memory(typed, example("bf16"))
    assert error.value.field == "optimizer.name"
    assert nearest in error.value.suggestions


def test_states_are_named() -> None:
    states = optimizer_memory("adamw_bnb_8bit", example("bf16")).states
    assert [(s.what, s.shape, s.dtype, s.bytes) for s in states if s.parameter == "q"] == [
        ("state1", (512, 640), "uint8", 512 * 640),
        ("absmax1", (1280,), "fp32", 5120),
        ("state2", (512, 640), "uint8", 512 * 640),
        ("absmax2", (1280,), "fp32", 5120),
    ]
    assert [(s.what, s.dtype) for s in states if s.parameter == "embed"] == [("state1", "fp32"), ("state2", "fp32")]
    assert [(s.what, s.bytes) for s in states if not s.parameter] == [("qmap1", 1024), ("qmap2", 1024)]


def test_mixed_precision_is_16_bytes_a_parameter() -> None:
    parameters = [Parameter("w", (4096, 512), "bf16", copies=7), Parameter("b", (256,), "bf16", copies=7)]
    elements = 7 * (4096 * 512 + 256)
    memory = optimizer_memory("adamw_torch_fused", parameters, master="fp32")
    weights_and_gradients = (2 + 2) * elements
    assert weights_and_gradients + gpu(memory) == 16 * elements
    assert {s.what: s.dtype for s in memory.states} == {
        "master weight": "fp32",
        "exp_avg": "fp32",
        "exp_avg_sq": "fp32",
    }
    assert (memory.first, memory.later) == (0, 0)


def test_mixed_precision_keeps_no_copy_of_fp32_weights() -> None:
    memory = optimizer_memory("adamw_torch", [Parameter("norm", (4096,), "fp32")], master="fp32")
    assert [s.what for s in memory.states] == ["exp_avg", "exp_avg_sq"]


def test_mixed_precision_of_a_loop_is_that_of_fp32_parameters() -> None:
    memory, fp32 = optimizer_memory("adafactor", example("bf16"), master="fp32"), adafactor(4)
    assert (gpu(memory), memory.first, memory.later) == (fp32.states + every(4), fp32.first, fp32.later)


@pytest.mark.parametrize("e", [4, 2])
@pytest.mark.parametrize(
    ("name", "own", "before"),
    [("adamw_torch", 2, 1), ("rmsprop", 1, 1), ("adagrad", 1, 1), ("sgd", 0, 0)],
)
def test_single_tensor_loop(name: str, own: int, before: int, e: int) -> None:
    memory = optimizer_memory(name, example("fp32" if e == 4 else "bf16"), foreach=False)
    peak = own * r(e * Q) + before * r(e * E)
    assert (memory.first, memory.later) == (peak, peak)
    assert all(s.what != "step" for s in memory.states) or name == "adagrad"


def test_the_parameter_before_decides() -> None:
    large, small = Parameter("large", (1024, 512), "bf16"), Parameter("small", (1024,), "bf16")
    loop = {
        order: optimizer_memory("adamw_torch", parameters, foreach=False).later
        for order, parameters in (("rising", [small, large]), ("equal", [small, large, large]))
    }
    n = 2 * 1024 * 512
    assert loop == {"rising": 2 * n + 2 * 1024, "equal": 3 * n}


def test_the_first_of_repeated_blocks_follows_the_last() -> None:
    a, b = Parameter("a", (1024, 512), "bf16"), Parameter("b", (512, 512), "bf16")
    once = optimizer_memory("adamw_torch", [a, b], foreach=False).later
    thrice = optimizer_memory("adamw_torch", [p._replace(copies=3) for p in (a, b)], foreach=False).later
    assert (once, thrice) == (2 * 1024 * 1024, 2 * 1024 * 1024 + 512 * 1024)


def test_a_group_of_two_dtypes_holds_both_lists() -> None:
    memory = optimizer_memory("adamw_torch", [Parameter("a", (1024,), "bf16"), Parameter("b", (1024,), "fp32")])
    assert memory.later == 2 * 1024 + 4 * 1024


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_block_as_wide_as_a_row_is_requantised_in_place(dtype: str) -> None:
    wide, square = Parameter("w", (640, 256), dtype), Parameter("w", (256, 640), dtype)
    n = 256 * 640
    assert optimizer_memory("adamw_torch_8bit", [wide]).later == 0
    assert optimizer_memory("adamw_torch_8bit", [square]).later == 2 * (4 * n + r(4 * n // 256))
    assert optimizer_memory("adamw_torch_4bit", [wide]).later == 2 * (4 * n + r(4 * n // 256) + 8 * n)


@pytest.mark.parametrize(("n", "states"), [(4095, 2 * r(4 * 4095)), (4096, 2 * (4096 + 512) + 2048)])
def test_bitsandbytes_quantises_from_4096_elements(n: int, states: int) -> None:
    assert gpu(optimizer_memory("adamw_8bit", [Parameter("w", (n,), "bf16")])) == states


@pytest.mark.parametrize(("n", "states"), [(4095, 2 * r(2 * 4095)), (4096, 2 * (4096 + 512 + 1024))])
def test_torchao_quantises_from_4096_elements(n: int, states: int) -> None:
    assert gpu(optimizer_memory("adamw_torch_8bit", [Parameter("w", (n,), "bf16")])) == states


def test_only_adafactor_has_row_and_column_factors() -> None:
    assert optimizer_memory("adafactor", [Parameter("w", (1000, 300), "bf16")]).later == (
        4 * r(4 * 1000 * 300) + r(4 * 1000) + r(4 * 300)
    )


def test_galore_8bit_copies_small_parameters_for_their_norm() -> None:
    assert optimizer_memory("galore_adamw_8bit", [Parameter("w", (1000,), "bf16")]).later == r(4 * 1000) + 512


def test_a_target_follows_a_target() -> None:
    """Leftovers of one parameter in GaLore and APOLLO stay alive while the next is projected."""
    targets = [Parameter("w", (512, 640), "bf16", copies=2, target=True)]
    left = r(2 * Q_LOW) + r(2 * Q)  # the denominator and the full update
    assert optimizer_memory("galore_adamw", targets).later == left + projecting_q(2)
    left += r(2 * 640) + 1024  # the factors, the norm of the scaled gradient, and what limits it
    assert optimizer_memory("apollo_adamw", targets).later == left + r(4 * Q) + 2 * r(4 * 128 * 512)


def test_momentum() -> None:
    def states(name: str, momentum: float | None) -> int:
        return gpu(optimizer_memory(name, example("bf16"), momentum=momentum))

    assert [states("sgd", m) for m in (None, 0.0, 0.9)] == [0, 0, every(2)]
    assert [states("rmsprop", m) for m in (None, 0.0, 0.9)] == [every(2), every(2), 2 * every(2)]
    assert states("muon", None) == muon(2).states  # its own buffer always exists


def test_state_dtype() -> None:
    memory = optimizer_memory("adamw_torch", example("bf16"), state_dtype="fp32")
    assert (gpu(memory), memory.later) == (2 * every(4), every(4))
    assert gpu(optimizer_memory("schedule_free_adamw", example("bf16"), state_dtype="fp32")) == every(2) + every(4)
    assert gpu(optimizer_memory("adamw_8bit", example("bf16"), state_dtype="fp32")) == bitsandbytes(2)


def test_updates_in_backward_free_gradients_at_once() -> None:
    freeing = {name for name in optimizer_names() if optimizer_memory(name, example("bf16")).frees_gradients}
    assert freeing == {"lomo", "adalomo", *(name for name in NAMES if name.endswith("layerwise"))}


@pytest.mark.parametrize("e", [4, 2])
@pytest.mark.parametrize("name", ["adamw_torch", "adafactor", "adamw_8bit", "galore_adamw_8bit", "lomo", "none"])
def test_updates_in_backward_need_one_optimizer_per_parameter(name: str, e: int) -> None:
    parameters = example("fp32" if e == 4 else "bf16")
    memory = optimizer_memory(name, parameters, in_backward=True)
    assert memory.frees_gradients
    assert (memory.first, memory.later) == (0, 0)
    states, backward = gpu(memory), memory.backward
    match name:
        case "adamw_torch":
            assert (states, backward) == (2 * every(e), r(e * Q))
        case "adafactor":  # in 16 bits with a copy of the parameter
            assert (states, backward) == (adafactor(e).states, alone_in_adafactor(e))
        case "adamw_8bit":  # with separate maps for q and the bias
            assert (states, backward) == (bitsandbytes(2) + 2048, 0)
        case "galore_adamw_8bit":
            assert memory.states == optimizer_memory("galore_adamw_8bit_layerwise", parameters).states
            assert backward == galore_adamw_8bit_layerwise(e).backward
        case _:
            assert memory == optimizer_memory(name, parameters)._replace(frees_gradients=True)


def alone_in_adafactor(e: int) -> int:
    """q's temporaries: gradient and parameter cast to fp32 if needed, two updates, and row and column factors."""
    return (4 if e == 2 else 2) * r(4 * Q) + r(4 * 512) + r(4 * 640)


def test_only_targets_are_projected() -> None:
    matrix = Parameter("w", (512, 640), "bf16")
    galore, adamw = (optimizer_memory(name, [matrix]) for name in ("galore_adamw", "adamw_torch"))
    assert galore.states == adamw.states
    assert [s.shape for s in optimizer_memory("galore_adamw", [matrix._replace(target=True)]).states] == [
        (128, 512),
        (128, 640),
        (128, 640),
    ]


def test_rows_say_how_sure_they_are() -> None:
    def basis(name: str) -> str:
        return optimizer_memory(name, []).basis

    assert {name for name in optimizer_names() if basis(name) == "assumed"} == {
        "adamw_torch_xla",
        "adamw_torch_npu_fused",
        *(name for name in NAMES if name.startswith("galore")),  # without cuSOLVER's workspace
    }
    assert optimizer_memory("adafactor", [], master="fp32").basis == "assumed"
    assert all(optimizer_memory(name, []).source for name in optimizer_names())


def test_clipping() -> None:
    assert clipping([]) == 0
    # Five norms, their stack (10 bytes) and the total, which exceed 5 x 5 partial sums
    assert clipping(example("bf16")) == 5 * 512 + 512 + 512
    # Partial sums of 100 chunks of each of 200
    assert clipping([Parameter("w", (65536, 100), "bf16", copies=200)]) == 200 * 512 + r(4 * 200 * 100)
    # A chunk has 65536 elements
    assert clipping([Parameter("w", (65537,), "bf16", copies=400)]) == 400 * 512 + r(4 * 400 * 2)
    # Two dtypes: kernels one after the other, one stack of the wider
    mixed = [Parameter("w", (10,), "bf16", copies=600), Parameter("b", (10,), "fp32", copies=400)]
    assert clipping(mixed) == 1000 * 512 + r(4 * 1000) + 512


def test_grad_scaler() -> None:
    assert [(s.what, s.dtype, s.bytes) for s in GRAD_SCALER] == [
        ("scale", "fp32", 512),
        ("growth_tracker", "int32", 512),
        ("found_inf", "fp32", 512),
    ]


# The real classes, built by the Trainer for `example` on meta tensors, one group in its order.

TORCH = ("adamw_torch", "sgd", "adagrad", "rmsprop", "adafactor")
BITSANDBYTES = (
    *("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
    *("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
)
DTYPES = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.uint8": "uint8"}

Tensors = dict[str, Any]  # by name
Kept = tuple[str, str, tuple[int, ...], str, bool]  # parameter, what, shape, dtype, whether on the host


def module_of(parameters: Iterable[Parameter], device: str) -> tuple[Any, Tensors]:
    """Return a module with these parameters in order, and the parameters by name."""
    torch = pytest.importorskip("torch")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    model = torch.nn.Module()
    for p in parameters:
        options = {"device": device, "dtype": dtypes[p.dtype]}
        if p.embedding:
            module = torch.nn.Embedding(*p.shape, **options)
        elif p.target:
            module = torch.nn.Linear(*reversed(p.shape), bias=False, **options)
        else:
            module = torch.nn.Module()
            module.weight = torch.nn.Parameter(torch.zeros(p.shape, **options))
        model.add_module(p.name, module)
    return model, {p.name: getattr(model, p.name).weight for p in parameters}


def trainers(name: str, model: Any) -> Any:
    """Return the optimizer of transformers' Trainer, with weight decay on all parameters."""
    transformers = pytest.importorskip("transformers")
    trainer = SimpleNamespace(
        args=transformers.TrainingArguments(output_dir="unused", optim=name, use_cpu=True, report_to=[]),
        model=model,
        optimizer=None,
        optimizer_cls_and_kwargs=None,
        get_optimizer_cls_and_kwargs=transformers.Trainer.get_optimizer_cls_and_kwargs,
        get_decay_parameter_names=lambda model: [name for name, _ in model.named_parameters()],
    )
    return transformers.Trainer.create_optimizer(trainer)


def step(optimizer: Any, tensors: Tensors) -> None:
    torch = pytest.importorskip("torch")
    for p in tensors.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()


def kept_by(optimizer: Any, tensors: Tensors) -> Iterator[Kept]:
    """Return the state tensors of each parameter and, without a parameter's name, shared ones."""
    shared: set[int] = set()
    for name, p in tensors.items():
        for what, tensor in optimizer.state[p].items():
            if what.startswith("qmap"):
                if id(tensor) in shared:
                    continue
                shared.add(id(tensor))
            if hasattr(tensor, "shape") and tensor.device == p.device:
                host = getattr(tensor, "is_paged", False)
                yield (
                    "" if what.startswith("qmap") else name,
                    what,
                    tuple(tensor.shape),
                    DTYPES[str(tensor.dtype)],
                    host,
                )


def kept_in(memory: OptimizerMemory) -> list[Kept]:
    return sorted((s.parameter, s.what, s.shape, s.dtype, s.host) for s in memory.states)


def numbered(parameters: Iterable[Parameter]) -> list[Parameter]:
    return [p._replace(name=f"p{i}") for i, p in enumerate(parameters)]


# In addition to `example`: thresholds of 4096 and 100,000 elements, rank 8, a small embedding
EDGES = [(4095,), (4096,), (99_999,), (100_000,), (8, 512), (512, 8), (1, 1)]


def edges(dtype: str) -> list[Parameter]:
    embeddings = [Parameter("", shape, dtype, embedding=True) for shape in ((64, 63), (64, 64))]
    return numbered([*(Parameter("", shape, dtype) for shape in EDGES), *embeddings, *example(dtype)])


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [*TORCH, "adamw_torch_fused"])
def test_states_of_torch_and_transformers(name: str, dtype: str) -> None:
    accelerate = pytest.importorskip("accelerate.optimizer")
    parameters = edges(dtype)
    # no fused step on meta tensors; the CPU has one
    model, tensors = module_of(parameters, "cpu" if name == "adamw_torch_fused" else "meta")
    optimizer = trainers(name, model)
    if name == "adagrad":  # its states already exist, and accelerate's AcceleratedOptimizer moves them to the GPU
        state = accelerate.move_to_device(optimizer.state_dict(), next(iter(tensors.values())).device)
        optimizer.load_state_dict(state)
    else:
        step(optimizer, tensors)
        step(optimizer, tensors)
    assert sorted(kept_by(optimizer, tensors)) == kept_in(optimizer_memory(name, parameters))


@pytest.mark.torch
@pytest.mark.parametrize("name", ["sgd", "rmsprop"])
def test_states_of_momentum(name: str) -> None:
    parameters = edges("bf16")
    model, tensors = module_of(parameters, "meta")
    optimizer = trainers(name, model)
    for group in optimizer.param_groups:
        group["momentum"] = 0.9
    step(optimizer, tensors)
    assert sorted(kept_by(optimizer, tensors)) == kept_in(optimizer_memory(name, parameters, momentum=0.9))


@pytest.fixture
def paged_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch bitsandbytes to work without a driver: managed memory is a marked meta tensor; runs share no state."""
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    optimizer = pytest.importorskip("bitsandbytes.optim.optimizer")

    def get_paged(*shape: int, dtype: Any, device: Any) -> Any:
        tensor = torch.empty(*shape, dtype=dtype, device=device)
        tensor.is_paged = True
        return tensor

    monkeypatch.setattr(functional, "get_paged", get_paged)
    monkeypatch.setattr(functional, "fill", lambda *_: None)
    monkeypatch.setattr(optimizer.GlobalOptimManager, "_instance", None)
    monkeypatch.setattr(functional.GlobalPageManager, "_instance", None)


@pytest.mark.torch
@pytest.mark.usefixtures("paged_on_meta")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_states_of_bitsandbytes(name: str, dtype: str) -> None:
    parameters = edges(dtype)
    model, tensors = module_of(parameters, "meta")
    optimizer = trainers(name, model)
    optimizer.check_overrides()  # what step() does before the update, which meta tensors do not support
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            optimizer.init_state(group, p, i, j)
    assert sorted(kept_by(optimizer, tensors)) == kept_in(optimizer_memory(name, parameters))


def test_untested_optimizers_belong_to_libraries_that_are_not_installed_here() -> None:
    others = {*NAMES} - {*TORCH, *BITSANDBYTES, "adamw_torch_fused"}
    libraries = ("adamw_torch_", "adamw_any", "galore", "apollo", "lomo", "adalomo", "grok", "schedule_free", "stable")
    assert all(name.startswith(libraries) for name in others)


def peaks(parameters: list[Parameter], build: Callable[[Tensors], list[Any]]) -> tuple[int, int, int]:
    """Return states, and additional bytes in the first and later steps: meta storages counted after every call."""
    torch = pytest.importorskip("torch")
    dispatch = pytest.importorskip("torch.utils._python_dispatch")
    reductions = pytest.importorskip("torch.multiprocessing.reductions")

    class Storages(dispatch.TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.sizes: dict[Any, int] = {}
            self.peak = 0

        def alive(self) -> int:
            return sum(size for ref, size in self.sizes.items() if not ref.expired())

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                    storage = tensor.untyped_storage()
                    self.sizes.setdefault(reductions.StorageWeakRef(storage), r(storage.nbytes()))
            self.peak = max(self.peak, self.alive())
            return out

    steps: list[tuple[int, int]] = []
    with Storages() as storages:
        _, tensors = module_of(parameters, "meta")
        optimizers = build(tensors)
        for _ in range(3):
            for p in tensors.values():
                p.grad = torch.zeros_like(p)
            before = storages.alive()
            storages.peak = 0
            for optimizer in optimizers:
                optimizer.step()
            steps.append((storages.peak - before, storages.alive() - before))
    states = steps[0][1]
    return states, steps[0][0] - states, max(peak for peak, _ in steps[1:])


ORDERS = {"falling": [0, 1, 2, 3, 4], "rising": [3, 2, 4, 0, 1], "mixed": [1, 0, 3, 1, 4, 2, 1]}


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("foreach", [True, False])
def test_temporaries_of_torch_and_transformers(name: str, order: str, dtype: str, foreach: bool) -> None:
    transformers = pytest.importorskip("transformers")
    args = transformers.TrainingArguments(output_dir="unused", optim=name, use_cpu=True, report_to=[])
    parameters = numbered(example(dtype)[i] for i in ORDERS[order])
    momentum = 0.9 if name in ("sgd", "rmsprop") else None

    def build(tensors: Tensors) -> list[Any]:
        cls, options = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
        more: dict[str, Any] = {} if name == "adafactor" else {"foreach": foreach}  # foreach is the default on CUDA
        more |= {"momentum": momentum} if momentum else {}
        return [cls(tensors.values(), weight_decay=0.0, **options, **more)]

    memory = optimizer_memory(name, parameters, foreach=foreach, momentum=momentum)
    states, first, later = peaks(parameters, build)
    assert (first, later) == (memory.first, memory.later)
    assert states == (0 if name == "adagrad" else gpu(memory))  # adagrad creates its states before the first step


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("order", ORDERS)
def test_muon(order: str, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch before 2.9")
    head = Parameter("head", (1000, 150), dtype, target=True, vocabulary=True)
    parameters = numbered([*(example(dtype)[i] for i in ORDERS[order]), head])

    def build(tensors: Tensors) -> list[Any]:
        matrices = [tensors[p.name] for p in parameters if p.target and not p.vocabulary]
        others = [tensors[p.name] for p in parameters if not p.target or p.vocabulary]
        return [torch.optim.Muon(matrices, weight_decay=0.0), torch.optim.AdamW(others, foreach=True)]

    memory = optimizer_memory("muon", parameters)
    states, first, later = peaks(parameters, build)
    assert (states, later) == (gpu(memory), memory.later)
    assert first <= memory.first  # AdamW's states come only after Muon's iterations


shapes = st.one_of(
    st.tuples(st.sampled_from([1, 64, 700, 4095, 4096, 99_999, 100_000])),
    st.tuples(st.sampled_from([8, 33, 257, 640]), st.sampled_from([7, 64, 256, 300])),
)


def made(name: str, shape: tuple[int, ...], kind: str, dtype: str = "bf16", copies: int = 1) -> Parameter:
    is_matrix = len(shape) == 2
    return Parameter(name, shape, dtype, copies, is_matrix and kind == "embedding", is_matrix and kind == "target")


def lists_of(dtype: str, most: int = 5) -> st.SearchStrategy[list[Parameter]]:
    kinds = st.sampled_from(["embedding", "target", "plain"])
    return st.lists(st.builds(made, st.just("w"), shapes, kinds, st.just(dtype)), min_size=1, max_size=most)


dtypes = st.sampled_from(["fp32", "bf16", "fp16"])


@given(name=st.sampled_from(optimizer_names()), data=st.data(), dtype=dtypes)
def test_more_parameters_never_have_less_state(name: str, data: st.DataObject, dtype: str) -> None:
    some, more = data.draw(lists_of(dtype)), data.draw(lists_of(dtype))
    less, all_ = optimizer_memory(name, some), optimizer_memory(name, some + more)
    assert gpu(less) <= gpu(all_)
    assert host(less) <= host(all_)


@given(name=st.sampled_from(optimizer_names()), data=st.data(), dtype=dtypes, copies=st.integers(1, 6))
def test_copies_are_the_parameters_again(name: str, data: st.DataObject, dtype: str, copies: int) -> None:
    before, block, after = (data.draw(lists_of(dtype, 3)) for _ in range(3))
    repeated = [p._replace(copies=copies) for p in block]
    short = optimizer_memory(name, before + block + repeated + after)
    long = optimizer_memory(name, before + block + block * copies + after)
    assert (gpu(short), host(short)) == (gpu(long), host(long))
    assert (short.first, short.later, short.backward) == (long.first, long.later, long.backward)


@given(name=st.sampled_from([name for name in NAMES if name.startswith("paged_")]), data=st.data(), dtype=dtypes)
def test_states_on_the_host_are_not_on_the_gpu(name: str, data: st.DataObject, dtype: str) -> None:
    parameters = [p._replace(name=str(i)) for i, p in enumerate(data.draw(lists_of(dtype)))]
    elements = {p.name: prod(p.shape) for p in parameters}
    itemsize = {"uint8": 1, "fp32": 4}
    paged = optimizer_memory(name, parameters)
    for s in paged.states:
        size = prod(s.shape) * itemsize[s.dtype]
        assert s.host == (s.what.startswith("state") and elements[s.parameter] >= 100_000)
        assert s.bytes == (size if s.host else r(size))
    unpaged = name.removeprefix("paged_").replace("ademamix_32bit", "ademamix")
    if unpaged != "adamw_32bit":  # no name means it
        moved = sum(r(s.bytes) for s in paged.states if s.host)
        assert gpu(paged) + moved == gpu(optimizer_memory(unpaged, parameters))
