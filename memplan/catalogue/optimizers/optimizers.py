"""The optimizers, one row each: the states it keeps, what a step needs besides, and where that was read.

Rows are in the words of `memplan.catalogue.optimizers.parameter_rules` (which parameters, what shapes) and
`memplan.catalogue.optimizers.step_loops`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from memplan.catalogue.optimizers import step_loops as loops
from memplan.catalogue.optimizers.parameter_rules import (
    Rank,
    Shape,
    Which,
    all_vectors,
    blocks,
    blocks_twice,
    capped_rank,
    columns,
    everything,
    first_axis,
    fixed_rank,
    fp32,
    hidden_matrix,
    large,
    large_no_embedding,
    matrix,
    nothing,
    other_than,
    packed,
    paged,
    quantised,
    quantised_in_parts,
    random_projection,
    rows,
    same,
    scalar,
    second_axis,
    some_vectors,
    twice,
    vector,
)
from memplan.catalogue.optimizers.step_language import Loop

_TRAINER = "transformers 5.24 trainer_optimizer.py"


class Rule(NamedTuple):
    """A state of the parameters it is `of`, on the host for some.

    `dtype` is a literal, `own` for the parameter's, or `moment` for the optimizer's choice for moments.
    """

    what: str
    shape: Shape = same
    dtype: Literal["moment", "own", "fp32", "uint8"] = "moment"
    of: Which = everything
    host: Which = nothing
    momentum: bool = False  # only with momentum


class Optimizer(NamedTuple):
    """One optimizer: what it keeps, and what a step needs.

    states      of every parameter; where it is projected, of a parameter of the projected shape
    basis       derived (traced or exact) or assumed, in part at least
    moments     the dtype of moments, where it is not the parameter's
    shared      once for all parameters, if there is one that each is `of`
    projector   of every projected parameter; `rank` is what it is projected to
    lists       how many lists of moments a foreach step makes, for the parameters the loop does not take
    since       the step from which on it makes them
    at_once     its states are there before the first step
    loop        what the turn of a parameter does that the loop `takes`; `projected` that of a projected one
    alone       the loop that torch runs with foreach=False, where it takes that
    apex        whether mixed precision runs it as apex does: all at once, in fp32, with nothing of its own
    """

    states: tuple[Rule, ...]
    source: str
    scratch: str = ""
    basis: str = "derived"
    moments: str = ""
    shared: tuple[Rule, ...] = ()
    projector: tuple[Rule, ...] = ()
    rank: Rank | None = None
    lists: int = 0
    since: int = 1
    at_once: bool = False
    loop: Loop = ()
    takes: Which = everything
    projected: Loop = ()
    alone: Loop | None = None
    apex: bool = False
    frees_gradients: bool = False


_ADAM = (Rule("exp_avg"), Rule("exp_avg_sq"))
_FACTORED = (
    Rule("exp_avg_sq_row", rows, "fp32", of=matrix),
    Rule("exp_avg_sq_col", columns, "fp32", of=matrix),
    Rule("exp_avg_sq", same, "fp32", of=other_than(matrix)),
    Rule("RMS", scalar, "fp32"),
)
_ONE_LIST = "one more copy of the second moments, all at once"


def _eight_bit(shapes: tuple[Shape, ...], of: Which, host: Which = nothing) -> tuple[Rule, ...]:
    """bitsandbytes' states 1, 2 in 8 bits with an fp32 scale for every 256 of some parameters, of others in fp32."""
    return tuple(
        rule
        for i, shape in enumerate(shapes, 1)
        for rule in (
            Rule(f"state{i}", shape, "uint8", of=of, host=host),
            Rule(f"state{i}", shape, "fp32", of=other_than(of), host=host),
            Rule(f"absmax{i}", blocks_twice if shape is twice else blocks, "fp32", of=of),
        )
    )


def _maps(count: int, of: Which) -> tuple[Rule, ...]:
    """The values that 8 bits stand for."""
    return tuple(Rule(f"qmap{i}", vector(256), "fp32", of=of) for i in range(1, count + 1))


def _bitsandbytes(shapes: tuple[Shape, ...], bits: int, is_paged: bool = False) -> Optimizer:
    """Its kernels update in place. Paged states are fetched to the card at every step while there is room for them."""
    source = f"{_TRAINER}, trainer.py; bitsandbytes 0.50 optim/optimizer.py Optimizer2State, Optimizer1State"
    host = paged if is_paged else nothing
    if bits == 32:
        return Optimizer(
            tuple(Rule(f"state{i}", s, host=host) for i, s in enumerate(shapes, 1)), source, moments="fp32"
        )
    states = _eight_bit(shapes, large_no_embedding, host)
    return Optimizer(states, source, shared=_maps(len(shapes), large_no_embedding))


def _torchao(bits: int) -> Optimizer:
    """The Trainer's blocks are of 256 in both widths. Moments that are not quantised are the parameter's dtype."""
    states = tuple(
        rule
        for moment in ("exp_avg", "exp_avg_sq")
        for rule in (
            Rule(f"{moment}.codes", packed if bits == 4 else same, "uint8", of=quantised),
            Rule(f"{moment}.scale", blocks, "fp32", of=quantised),
            Rule(f"{moment}.qmap", vector(16 if bits == 4 else 256), "fp32", of=quantised),
            Rule(moment, of=other_than(quantised)),
        )
    )
    return Optimizer(
        states,
        f"torchao 0.18 optim/adam.py, subclass_{bits}bit.py; temporaries as in the code Inductor generates",
        f"the largest parameter's new moments in fp32{', and their codes in int64' if bits == 4 else ''}",
        loop=loops.TORCHAO_4BIT if bits == 4 else loops.TORCHAO_8BIT,
        takes=quantised if bits == 4 else quantised_in_parts,
    )


_ADAMW = Optimizer(
    _ADAM,
    "torch 2.13 optim/adam.py _multi_tensor_adam",
    _ONE_LIST,
    lists=1,
    alone=loops.ADAMW,
    apex=True,
)
_ONE, _BOTH, _MIX = (same,), (same, same), (twice, same)
_NO_WORKSPACE = "without cuSOLVER's workspace for the SVD of one gradient"
_SVD = "torch 2.13 linalg.svd, without the workspace that cuSOLVER asks for at run time"

# fp32 gradients: the slice is a view of all singular vectors on the narrow side. Others: a copy in their dtype.
_GALORE_PROJECTOR = (
    Rule("projection", some_vectors, "own", of=other_than(fp32)),
    Rule("projection", all_vectors, "fp32", of=fp32),
)
_GALORE = Optimizer(
    _ADAM,
    f"galore-torch 1.0 adamw.py, galore_projector.py; {_SVD}",
    f"one target's update in full, twice, and its SVD when the projection is renewed ({_NO_WORKSPACE})",
    "assumed",
    projector=_GALORE_PROJECTOR,
    rank=capped_rank,
    loop=loops.GALORE_OTHERS,
    projected=loops.GALORE_ADAMW,
)
_GALORE_8 = Optimizer(
    (*_eight_bit(_BOTH, large), Rule("unorm_vec", vector(1), "fp32")),
    f"galore-torch 1.0 adamw8bit.py with bitsandbytes 0.50 (which reads its arguments as max_unorm=100); {_SVD}",
    f"one target and its update in full, while gradients shrink, and its SVD when it is projected ({_NO_WORKSPACE})",
    "assumed",
    shared=_maps(2, large),
    projector=_GALORE_PROJECTOR,
    rank=capped_rank,
    loop=loops.GALORE_8BIT_OTHERS,
    projected=loops.GALORE_8BIT,
)
_GALORE_FACTORED = Optimizer(
    _FACTORED,
    f"galore-torch 1.0 adafactor.py, galore_projector.py (which sees an fp32 gradient: always the view); {_SVD}",
    f"one target's parameter, gradient and updates in fp32, and its SVD when it is projected ({_NO_WORKSPACE})",
    "assumed",
    projector=(Rule("projection", all_vectors, "fp32"),),
    rank=capped_rank,
    loop=loops.ADAFACTOR,
    projected=loops.GALORE_ADAFACTOR,
)
_APOLLO_ADAMW = Optimizer(
    _ADAM,
    "apollo-torch 1.0 apollo.py, random_projector.py",
    "one target's scaled gradient in full, twice",
    projector=(Rule("projection", random_projection, "own"), Rule("scaled_grad", scalar, "own")),
    rank=fixed_rank,
    loop=loops.GALORE_OTHERS,
    projected=loops.APOLLO,
)


def one_each(row: Optimizer) -> Optimizer:
    """An optimizer for every parameter, which steps in backward as soon as its gradient is there.

    What parameters would share, each has then for itself.
    """
    return row._replace(states=(*row.states, *row.shared), shared=(), frees_gradients=True)


def _layerwise(row: Optimizer) -> Optimizer:
    return one_each(row)._replace(source=f"{_TRAINER} _setup_low_rank_optimizer; {row.source}")


_SCHEDULE_FREE = Optimizer((Rule("z", dtype="own"), Rule("exp_avg_sq")), "", _ONE_LIST, lists=1)

OPTIMIZERS: Mapping[str, Optimizer] = {
    "adamw_torch": _ADAMW,
    "adamw_torch_fused": Optimizer(  # the step count is on the GPU too
        (*_ADAM, Rule("step", scalar, "fp32")),
        "torch 2.13 optim/adam.py _fused_adam",
        apex=True,
    ),
    "adamw_torch_xla": _ADAMW._replace(
        source="pytorch/xla amp/syncfree/adamw.py: as torch's", basis="assumed", alone=None
    ),
    "adamw_torch_npu_fused": Optimizer(
        _ADAM,
        "Ascend torch_npu optim/npu_fused_adamw.py",
        "two more copies of the moments, all at once",
        "assumed",
        lists=2,
        apex=True,
    ),
    "adafactor": Optimizer(
        _FACTORED,
        "transformers 5.24 optimization.py Adafactor",
        "one parameter's gradient, value and updates in fp32, and the update of the one before",
        loop=loops.ADAFACTOR,
    ),
    "adamw_anyprecision": Optimizer(
        _ADAM,
        f"{_TRAINER}; torchdistx 0552f1b optimizers/anyprecision_optimizer.py",
        "one parameter's update, and the variance of the one before",
        moments="fp32",
        loop=loops.ANYPRECISION,
    ),
    "adamw_torch_4bit": _torchao(4),
    "adamw_torch_8bit": _torchao(8),
    "ademamix": _bitsandbytes(_MIX, 32),
    "sgd": Optimizer((Rule("momentum_buffer", momentum=True),), "torch 2.13 optim/sgd.py", alone=(), apex=True),
    "adagrad": Optimizer(  # made at construction: accelerate 1.15 optimizer.py moves the step count to the GPU
        (Rule("sum"), Rule("step", scalar, "fp32")),
        "torch 2.13 optim/adagrad.py; accelerate 1.15 optimizer.py AcceleratedOptimizer",
        "two more copies of the sums, all at once",
        lists=2,
        at_once=True,
        alone=loops.ROOT,
        apex=True,
    ),
    "adamw_bnb_8bit": _bitsandbytes(_BOTH, 8),
    "adamw_8bit": _bitsandbytes(_BOTH, 8),
    "ademamix_8bit": _bitsandbytes(_MIX, 8),
    "lion_8bit": _bitsandbytes(_ONE, 8),
    "lion_32bit": _bitsandbytes(_ONE, 32),
    "paged_adamw_32bit": _bitsandbytes(_BOTH, 32, True),
    "paged_adamw_8bit": _bitsandbytes(_BOTH, 8, True),
    "paged_ademamix_32bit": _bitsandbytes(_MIX, 32, True),
    "paged_ademamix_8bit": _bitsandbytes(_MIX, 8, True),
    "paged_lion_32bit": _bitsandbytes(_ONE, 32, True),
    "paged_lion_8bit": _bitsandbytes(_ONE, 8, True),
    "rmsprop": Optimizer(
        (Rule("square_avg"), Rule("momentum_buffer", momentum=True)),
        "torch 2.13 optim/rmsprop.py",
        _ONE_LIST,
        lists=1,
        alone=loops.ROOT,
        apex=True,
    ),
    "rmsprop_bnb": _bitsandbytes(_ONE, 32),
    "rmsprop_bnb_8bit": _bitsandbytes(_ONE, 8),
    "rmsprop_bnb_32bit": _bitsandbytes(_ONE, 32),
    "galore_adamw": _GALORE,
    "galore_adamw_8bit": _GALORE_8,
    "galore_adafactor": _GALORE_FACTORED,
    "galore_adamw_layerwise": _layerwise(_GALORE),
    "galore_adamw_8bit_layerwise": _layerwise(_GALORE_8),
    "lomo": Optimizer(
        (),
        "lomo-optim 0.1 lomo.py",
        "one parameter and its gradient in fp32",
        loop=loops.LOMO,
        frees_gradients=True,
    ),
    "adalomo": Optimizer(  # also for frozen parameters, which are not given here
        (
            Rule("exp_avg_sq_row", first_axis, "fp32", of=matrix),
            Rule("exp_avg_sq_col", second_axis, "fp32", of=matrix),
            Rule("exp_avg_sq", first_axis, "fp32", of=other_than(matrix)),
        ),
        "lomo-optim 0.1 adalomo.py",
        "one parameter's gradient and updates in fp32",
        at_once=True,
        loop=loops.ADALOMO,
        frees_gradients=True,
    ),
    "grokadamw": Optimizer(
        tuple(Rule(what, host=everything) for what in ("exp_avg", "exp_avg_sq", "grok_ema")),
        "grokadamw 0.1 grokadamw.py",
        "one parameter's states, brought to the GPU, and its updates",
        loop=loops.GROKADAMW,
    ),
    "schedule_free_radam": _SCHEDULE_FREE._replace(source="schedulefree 1.4 radam_schedulefree.py", since=5),
    "schedule_free_adamw": _SCHEDULE_FREE._replace(source="schedulefree 1.4 adamw_schedulefree.py"),
    "schedule_free_sgd": Optimizer((Rule("z", dtype="own"),), "schedulefree 1.4 sgd_schedulefree.py"),
    "apollo_adamw": _APOLLO_ADAMW,
    "apollo_adamw_layerwise": _layerwise(_APOLLO_ADAMW),
    "stable_adamw": Optimizer(  # with Triton, whose kernels take an empty compensation too
        (
            *_ADAM,
            Rule("kahan_comp", dtype="own", of=other_than(fp32)),
            Rule("kahan_comp", vector(1), "uint8", of=fp32),
            Rule("eps_sq", scalar, "own"),
            Rule("mean_square", vector(1), "fp32"),
        ),
        "torch-optimi 0.3 stableadamw.py",
    ),
    "none": Optimizer((), "no optimizer"),
    "muon": Optimizer(  # torch's takes matrices only; what it advises for the rest is AdamW
        (
            Rule("momentum_buffer", of=hidden_matrix),
            Rule("exp_avg", of=other_than(hidden_matrix)),
            Rule("exp_avg_sq", of=other_than(hidden_matrix)),
        ),
        "torch 2.13 optim/_muon.py; optim/adam.py for embeddings and vectors",
        "one matrix's Newton-Schulz iteration in bf16, or AdamW's list for the others",
        lists=1,
        loop=loops.MUON,
        takes=hidden_matrix,
    ),
}

# torch's own, whose update the host can compute as well. Source: torchao 0.18 optim/cpu_offload.py, which takes classes
# of torch.optim.
ON_HOST = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")

# Names that stand for nothing that could run, and why.
REFUSED: Mapping[str, str] = {
    "galore_adafactor_layerwise": (
        "transformers 5.24's Trainer cannot build it (ValueError: Cannot combine manual `lr` and `relative_step=True` "
        "options); galore_adafactor and galore_adamw_layerwise run"
    ),
}
