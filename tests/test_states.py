"""Optimizers: what each keeps, as the arithmetic of its shapes, and how that may change."""

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.catalogue.states import (
    GRAD_SCALER,
    OptimizerMemory,
    Parameter,
    clipping,
    optimizer_memory,
    optimizer_names,
)
from memplan.errors import UnknownNameError


def r(n: int) -> int:
    """Rounded up to 512, as torch's allocator does."""
    return (n + 511) // 512 * 512


# A parameter of every kind. Elements: E has no whole number of blocks of 256, Q has; S and N are below 4096.
E, Q, S, N, B = 1000 * 150, 512 * 640, 64 * 33, 700, 5000


def example(dtype: str) -> list[Parameter]:
    return [
        Parameter("embed", (1000, 150), dtype, embedding=True),
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
    """A tensor like every parameter, of e bytes an element."""
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
    """Of q alone the moments are quantised."""
    return 2 * (every(e) - r(e * Q) + codes + r(4 * (Q // 256)) + qmap)


def factored(*shape: int) -> int:
    """Adafactor's states of one parameter."""
    return sum(r(4 * n) for n in shape) + 512


def adafactor(e: int) -> Expected:
    """The peak is q's turn, with the embedding's update still there; in the first step, before the states after q's."""
    after = factored(64, 33) + factored(700) + factored(5000)
    states = factored(1000, 150) + factored(512, 640) + after
    peak = (4 if e == 2 else 2) * r(4 * Q) + r(4 * E)
    return Expected(states, peak - after, peak)


# q projected to rank 128, and small to 33, which is all it has
Q_LOW, S_LOW = 128 * 640, 64 * 33
SVD_Q = r(4 * 512 * 512) + r(4 * 512) + r(4 * 512 * 640)  # U, s, Vh


def projections(e: int) -> tuple[int, int]:
    """GaLore's projections of q and of small: slices copied to bf16, or views of the whole narrow side in fp32."""
    return (r(2 * 128 * 512), r(2 * 33 * 33)) if e == 2 else (r(4 * 512 * 512), r(4 * 33 * 33))


def projecting_q(e: int) -> int:
    """GaLore's new projection: the gradient in fp32, the vectors, the rebuilt matrix and then what is larger."""
    slices = r(2 * 128 * 512) if e == 2 else 0
    return (r(4 * Q) if e == 2 else 0) + SVD_Q + r(4 * Q_LOW) + max(r(4 * 128 * 128), slices)


def galore_adamw(e: int) -> Expected:
    q, small = projections(e)
    q, small = q + 2 * r(e * Q_LOW), small + 2 * r(e * S_LOW)
    states = 2 * (r(e * E) + r(e * N) + r(e * B)) + q + small
    update = 3 * r(e * Q_LOW) + 2 * r(e * Q)
    projecting = projecting_q(e) + 2 * r(e * B)  # the bias was before: its update and its denominator
    if e == 2:
        return Expected(states, projecting - q - small, projecting)
    return Expected(states, update - small, update)


def galore_adamw_layerwise(e: int) -> Expected:
    update = 3 * r(e * Q_LOW) + 2 * r(e * Q)
    return Expected(galore_adamw(e).states, backward=max(update, projecting_q(e)))


def galore_adamw_8bit(e: int) -> Expected:
    """There is no exception for embeddings; every parameter has a norm."""
    q, small = projections(e)
    q, small = q + 2 * eight_bit(Q_LOW) + 512, small + 2 * r(4 * S_LOW) + 512
    states = 2 * eight_bit(E) + 2 * r(4 * N) + 2 * eight_bit(B) + 3 * 512 + q + small + 2048
    update = r(e * Q) + 2 * r(e * Q_LOW)  # the parameter twice, less the gradient it replaced
    first = projecting_q(e) - q - small if e == 2 else update - small
    return Expected(states, first, projecting_q(e))


def galore_adamw_8bit_layerwise(e: int) -> Expected:
    """With maps for the embedding, q and the bias each."""
    return Expected(galore_adamw_8bit(e).states + 2 * 2048, backward=projecting_q(e))


def galore_adafactor(e: int) -> Expected:
    """The gradient is projected in fp32, so the view is kept in bf16 too."""
    small = factored(64, 33) + r(4 * 33 * 33)
    states = factored(1000, 150) + factored(700) + factored(5000) + factored(128, 640) + r(4 * 512 * 512) + small
    update = (3 if e == 2 else 2) * r(4 * Q) + 2 * r(4 * Q_LOW)
    return Expected(states, update - small, update)


def galore_adafactor_layerwise(e: int) -> Expected:
    return Expected(galore_adafactor(e).states, backward=galore_adafactor(e).later)


def apollo_adamw(e: int) -> Expected:
    """Its rank stays 128 where the matrix has 33."""
    q = 2 * r(e * Q_LOW) + r(e * 128 * 512) + 512
    small = 2 * r(e * 128 * 64) + r(e * 128 * 33) + 512
    states = 2 * (r(e * E) + r(e * N) + r(e * B)) + q + small
    first_update = 3 * r(e * Q_LOW) + r(e * 640) + r(e * Q)
    later_update = first_update + 512 + r(e * Q)  # growth is limited
    projecting = r(4 * Q) + 2 * r(4 * 128 * 512) + 2 * r(e * B)
    if e == 2:
        return Expected(states, projecting - q - small, projecting)
    return Expected(states, first_update - small, later_update)


def apollo_adamw_layerwise(e: int) -> Expected:
    update = 3 * r(e * Q_LOW) + r(e * 640) + 512 + 2 * r(e * Q)
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
    return Expected(states, backward=3 * r(4 * Q))


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

# By names of transformers 5.24 training_args.OptimizerNames, and two more
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
    "galore_adafactor_layerwise": galore_adafactor_layerwise,
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
    assert len(NAMES) == 41
    assert set(optimizer_names()) == set(GOLDEN)


def test_names_of_transformers() -> None:
    training_args = pytest.importorskip("transformers.training_args")
    assert {member.value for member in training_args.OptimizerNames} == set(NAMES)


@pytest.mark.parametrize(
    ("typed", "nearest"), [("adamw_troch", "adamw_torch"), ("paged_adamw", "paged_adamw_8bit"), ("SGD", "sgd")]
)
def test_unknown_name(typed: str, nearest: str) -> None:
    with pytest.raises(UnknownNameError, match=rf"^optimizer\.name: unknown name '{typed}'.*{nearest}") as error:
        optimizer_memory(typed, example("bf16"))
    assert error.value.field == "optimizer.name"
    assert nearest in error.value.nearest


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


def test_mixed_precision_has_no_copy_of_what_is_fp32() -> None:
    memory = optimizer_memory("adamw_torch", [Parameter("norm", (4096,), "fp32")], master="fp32")
    assert [s.what for s in memory.states] == ["exp_avg", "exp_avg_sq"]


def test_mixed_precision_of_a_loop_is_that_of_fp32_parameters() -> None:
    memory, fp32 = optimizer_memory("adafactor", example("bf16"), master="fp32"), adafactor(4)
    assert (gpu(memory), memory.first, memory.later) == (fp32.states + every(4), fp32.first, fp32.later)


@pytest.mark.parametrize("e", [4, 2])
@pytest.mark.parametrize(
    ("name", "own", "before"),
    [("adamw_torch", 2, 1), ("adamw_torch_fused", 2, 1), ("rmsprop", 1, 1), ("adagrad", 1, 1), ("sgd", 0, 0)],
)
def test_single_tensor_loop(name: str, own: int, before: int, e: int) -> None:
    memory = optimizer_memory(name, example("fp32" if e == 4 else "bf16"), foreach=False)
    peak = own * r(e * Q) + before * r(e * E)
    assert (memory.first, memory.later) == (peak, peak)
    assert all(s.what != "step" for s in memory.states) or name == "adagrad"


def test_foreach_is_not_fused() -> None:
    fused, lists = (optimizer_memory(n, example("bf16"), foreach=True) for n in ("adamw_torch_fused", "adamw_torch"))
    assert (fused.states, fused.later) == (lists.states, every(2))


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


def test_adafactor_alone_has_its_row_and_column_factors() -> None:
    assert optimizer_memory("adafactor", [Parameter("w", (1000, 300), "bf16")]).later == (
        4 * r(4 * 1000 * 300) + r(4 * 1000) + r(4 * 300)
    )


def test_galore_8bit_copies_small_parameters_for_their_norm() -> None:
    assert optimizer_memory("galore_adamw_8bit", [Parameter("w", (1000,), "bf16")]).later == r(4 * 1000) + 512


def test_a_target_follows_a_target() -> None:
    """What GaLore and APOLLO leave behind of one is there while the next one is projected."""
    targets = [Parameter("w", (512, 640), "bf16", copies=2, target=True)]
    left = r(2 * Q_LOW) + r(2 * Q)  # the denominator, and the update in full
    assert optimizer_memory("galore_adamw", targets).later == left + projecting_q(2)
    left += r(2 * 640) + 512  # the factors, and the norm of the scaled gradient
    assert optimizer_memory("apollo_adamw", targets).later == left + r(4 * Q) + 2 * r(4 * 128 * 512)


def test_momentum() -> None:
    def states(name: str, momentum: float | None) -> int:
        return gpu(optimizer_memory(name, example("bf16"), momentum=momentum))

    assert [states("sgd", m) for m in (None, 0.0, 0.9)] == [0, 0, every(2)]
    assert [states("rmsprop", m) for m in (None, 0.0, 0.9)] == [every(2), every(2), 2 * every(2)]
    assert states("muon", None) == muon(2).states  # its own buffer is always there


def test_state_dtype() -> None:
    memory = optimizer_memory("adamw_torch", example("bf16"), state_dtype="fp32")
    assert (gpu(memory), memory.later) == (2 * every(4), every(4))
    assert gpu(optimizer_memory("schedule_free_adamw", example("bf16"), state_dtype="fp32")) == every(2) + every(4)
    assert gpu(optimizer_memory("adamw_8bit", example("bf16"), state_dtype="fp32")) == bitsandbytes(2)


def test_gradients_go_in_backward() -> None:
    freeing = {name for name in optimizer_names() if optimizer_memory(name, example("bf16")).frees_gradients}
    assert freeing == {"lomo", "adalomo", *(name for name in NAMES if name.endswith("layerwise"))}


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
        "adamw_anyprecision",
        "galore_adamw_8bit_layerwise",
        "galore_adafactor_layerwise",
    }
    assert optimizer_memory("adafactor", [], master="fp32").basis == "assumed"
    assert all(optimizer_memory(name, []).source for name in optimizer_names())


def test_clipping() -> None:
    assert clipping([]) == 0
    # Five norms, and their stack (10 bytes) and the total, which are more than 5 x 5 partial sums
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


@settings(deadline=None)
@given(name=st.sampled_from(optimizer_names()), data=st.data(), dtype=dtypes)
def test_more_parameters_never_have_less_state(name: str, data: st.DataObject, dtype: str) -> None:
    some, more = data.draw(lists_of(dtype)), data.draw(lists_of(dtype))
    less, all_ = optimizer_memory(name, some), optimizer_memory(name, some + more)
    assert gpu(less) <= gpu(all_)
    assert host(less) <= host(all_)


@settings(deadline=None)
@given(name=st.sampled_from(optimizer_names()), data=st.data(), dtype=dtypes, copies=st.integers(1, 6))
def test_copies_are_the_parameters_again(name: str, data: st.DataObject, dtype: str, copies: int) -> None:
    before, block, after = (data.draw(lists_of(dtype, 3)) for _ in range(3))
    repeated = [p._replace(copies=copies) for p in block]
    short = optimizer_memory(name, before + block + repeated + after)
    long = optimizer_memory(name, before + block + block * copies + after)
    assert (gpu(short), host(short)) == (gpu(long), host(long))
    assert (short.first, short.later, short.backward) == (long.first, long.later, long.backward)


@settings(deadline=None)
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
    if unpaged != "adamw_32bit":  # which no name stands for
        moved = sum(r(s.bytes) for s in paged.states if s.host)
        assert gpu(paged) + moved == gpu(optimizer_memory(unpaged, parameters))
