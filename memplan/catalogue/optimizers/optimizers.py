"""The optimizers, one row each: its states, the temporaries of a step, and the source of both.

`memplan.catalogue.optimizers.parameter_rules` defines which parameters and shapes a row may name,
`memplan.catalogue.optimizers.step_loops` the loops.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

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
from memplan.core.records import NamedTuple

_TRAINER = "transformers 5.24 trainer_optimizer.py"


class Rule(NamedTuple):
    """One state tensor per parameter.

    what      name of the state
    shape     its shape
    dtype     a literal, `own` for the parameter's dtype, or `moment` for the optimizer's dtype of moments
    of        the parameters that have it
    host      the parameters whose state is in host memory
    momentum  the state exists only with momentum
    """

    what: str
    shape: Shape = same
    dtype: Literal["moment", "own", "fp32", "uint8"] = "moment"
    of: Which = everything
    host: Which = nothing
    momentum: bool = False


class OptimizerRow(NamedTuple):
    """One optimizer: its states, and the temporaries of a step.

    states              per parameter, in the projected shape if the parameter is projected
    source              where the row was read
    scratch             the temporaries, in words
    basis               `derived` (traced or exact), or `assumed` if any part of it is
    moments             dtype of moments; empty for the parameter's
    shared              one tensor for all parameters, if any parameter matches its `of`
    projector           per projected parameter
    rank                rank of the projection
    lists               number of lists of moments that a foreach step makes, over parameters without a loop
    first_list_step     the first step that makes those lists
    exists_before_step  states exist before the first step, also of parameters that never get a gradient
    loop                what the turn of a parameter does
    takes               the parameters that have a loop
    projected           loop of a projected parameter
    foreach_loop        loop of torch's foreach=False; None if it has no such argument
    apex                mixed precision runs it as apex does: all parameters at once, in fp32, without temporaries
    frees_gradients     each gradient is freed in backward, once its parameter has been updated
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
    first_list_step: int = 1
    exists_before_step: bool = False
    loop: Loop = ()
    takes: Which = everything
    projected: Loop = ()
    foreach_loop: Loop | None = None
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
    """bitsandbytes' 8-bit states with an fp32 scale per 256 elements; parameters outside `of` have fp32 states."""
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
    """Code books: the 256 values that 8 bits can stand for."""
    return tuple(Rule(f"qmap{i}", vector(256), "fp32", of=of) for i in range(1, count + 1))


def _bitsandbytes(shapes: tuple[Shape, ...], bits: int, is_paged: bool = False) -> OptimizerRow:
    """bitsandbytes' kernels update in place. Paged states are fetched to the GPU at every step while there is room."""
    source = f"{_TRAINER}, trainer.py; bitsandbytes 0.50 optim/optimizer.py Optimizer2State, Optimizer1State"
    host = paged if is_paged else nothing
    if bits == 32:
        return OptimizerRow(
            tuple(Rule(f"state{i}", s, host=host) for i, s in enumerate(shapes, 1)), source, moments="fp32"
        )
    states = _eight_bit(shapes, large_no_embedding, host)
    return OptimizerRow(states, source, shared=_maps(len(shapes), large_no_embedding))


def _torchao(bits: int) -> OptimizerRow:
    """The Trainer uses blocks of 256 for both widths. Unquantised moments have the parameter's dtype."""
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
    return OptimizerRow(
        states,
        f"torchao 0.18 optim/adam.py, subclass_{bits}bit.py; temporaries as in the code Inductor generates",
        f"the largest parameter's new moments in fp32{', and their codes in int64' if bits == 4 else ''}",
        loop=loops.TORCHAO_4BIT if bits == 4 else loops.TORCHAO_8BIT,
        takes=quantised if bits == 4 else quantised_in_parts,
    )


_ADAMW = OptimizerRow(
    _ADAM,
    "torch 2.13 optim/adam.py _multi_tensor_adam",
    _ONE_LIST,
    lists=1,
    foreach_loop=loops.ADAMW,
    apex=True,
)
_LION, _SQUARES, _ADAM_MOMENTS, _ADEMAMIX = (same,), (same,), (same, same), (twice, same)
_NO_WORKSPACE = "without cuSOLVER's workspace for the SVD of one gradient"
_SVD = "torch 2.13 linalg.svd, without the workspace that cuSOLVER asks for at run time"

# With fp32 gradients the projection is a slice, so all singular vectors of the narrow side stay alive. Other gradients
# have a copy in their dtype.
_GALORE_PROJECTOR = (
    Rule("projection", some_vectors, "own", of=other_than(fp32)),
    Rule("projection", all_vectors, "fp32", of=fp32),
)
_GALORE = OptimizerRow(
    _ADAM,
    f"galore-torch 1.0 adamw.py, galore_projector.py; {_SVD}",
    f"one target's update in full, twice, and its SVD when the projection is renewed ({_NO_WORKSPACE})",
    "assumed",
    projector=_GALORE_PROJECTOR,
    rank=capped_rank,
    loop=loops.GALORE_OTHERS,
    projected=loops.GALORE_ADAMW,
)
_GALORE_8 = OptimizerRow(
    (*_eight_bit(_ADAM_MOMENTS, large), Rule("unorm_vec", vector(1), "fp32")),
    f"galore-torch 1.0 adamw8bit.py with bitsandbytes 0.50 (which reads its arguments as max_unorm=100); {_SVD}",
    f"one target and its update in full, while gradients shrink, and its SVD when it is projected ({_NO_WORKSPACE})",
    "assumed",
    shared=_maps(2, large),
    projector=_GALORE_PROJECTOR,
    rank=capped_rank,
    loop=loops.GALORE_8BIT_OTHERS,
    projected=loops.GALORE_8BIT,
)
_GALORE_FACTORED = OptimizerRow(
    _FACTORED,
    f"galore-torch 1.0 adafactor.py, galore_projector.py (which sees an fp32 gradient: always the view); {_SVD}",
    f"one target's parameter, gradient and updates in fp32, and its SVD when it is projected ({_NO_WORKSPACE})",
    "assumed",
    projector=(Rule("projection", all_vectors, "fp32"),),
    rank=capped_rank,
    loop=loops.ADAFACTOR,
    projected=loops.GALORE_ADAFACTOR,
)
_APOLLO_ADAMW = OptimizerRow(
    _ADAM,
    "apollo-torch 1.0 apollo.py, random_projector.py",
    "one target's scaled gradient in full, twice",
    projector=(Rule("projection", random_projection, "own"), Rule("scaled_grad", scalar, "own")),
    rank=fixed_rank,
    loop=loops.GALORE_OTHERS,
    projected=loops.APOLLO,
)


def stepped_in_backward(row: OptimizerRow) -> OptimizerRow:
    """Return the row with one optimizer per parameter, which steps in backward as soon as the gradient is ready.

    Every parameter then has its own copy of the shared states.
    """
    return row._replace(states=(*row.states, *row.shared), shared=(), frees_gradients=True)


def _layerwise(row: OptimizerRow) -> OptimizerRow:
    return stepped_in_backward(row)._replace(source=f"{_TRAINER} _setup_low_rank_optimizer; {row.source}")


_SCHEDULE_FREE = OptimizerRow((Rule("z", dtype="own"), Rule("exp_avg_sq")), "", _ONE_LIST, lists=1)

OPTIMIZERS: Mapping[str, OptimizerRow] = {
    "adamw_torch": _ADAMW,
    "adamw_torch_fused": OptimizerRow(  # also keeps the step count on the GPU
        (*_ADAM, Rule("step", scalar, "fp32")),
        "torch 2.13 optim/adam.py _fused_adam",
        apex=True,
    ),
    "adamw_torch_xla": _ADAMW._replace(
        source="pytorch/xla amp/syncfree/adamw.py: as torch's", basis="assumed", foreach_loop=None
    ),
    "adamw_torch_npu_fused": OptimizerRow(
        _ADAM,
        "Ascend torch_npu optim/npu_fused_adamw.py",
        "two more copies of the moments, all at once",
        "assumed",
        lists=2,
        apex=True,
    ),
    "adafactor": OptimizerRow(
        _FACTORED,
        "transformers 5.24 optimization.py Adafactor",
        "one parameter's gradient, value and updates in fp32, and the previous parameter's update",
        loop=loops.ADAFACTOR,
    ),
    "adamw_anyprecision": OptimizerRow(
        _ADAM,
        f"{_TRAINER}; torchdistx 0552f1b optimizers/anyprecision_optimizer.py",
        "one parameter's update, and the previous parameter's variance",
        moments="fp32",
        loop=loops.ANYPRECISION,
    ),
    "adamw_torch_4bit": _torchao(4),
    "adamw_torch_8bit": _torchao(8),
    "ademamix": _bitsandbytes(_ADEMAMIX, 32),
    "sgd": OptimizerRow(
        (Rule("momentum_buffer", momentum=True),), "torch 2.13 optim/sgd.py", foreach_loop=(), apex=True
    ),
    "adagrad": OptimizerRow(  # accelerate 1.15 optimizer.py moves `step`, made by the constructor, to the GPU
        (Rule("sum"), Rule("step", scalar, "fp32")),
        "torch 2.13 optim/adagrad.py; accelerate 1.15 optimizer.py AcceleratedOptimizer",
        "two more copies of the sums, all at once",
        lists=2,
        exists_before_step=True,
        foreach_loop=loops.ROOT,
        apex=True,
    ),
    "adamw_bnb_8bit": _bitsandbytes(_ADAM_MOMENTS, 8),
    "adamw_8bit": _bitsandbytes(_ADAM_MOMENTS, 8),
    "ademamix_8bit": _bitsandbytes(_ADEMAMIX, 8),
    "lion_8bit": _bitsandbytes(_LION, 8),
    "lion_32bit": _bitsandbytes(_LION, 32),
    "paged_adamw_32bit": _bitsandbytes(_ADAM_MOMENTS, 32, True),
    "paged_adamw_8bit": _bitsandbytes(_ADAM_MOMENTS, 8, True),
    "paged_ademamix_32bit": _bitsandbytes(_ADEMAMIX, 32, True),
    "paged_ademamix_8bit": _bitsandbytes(_ADEMAMIX, 8, True),
    "paged_lion_32bit": _bitsandbytes(_LION, 32, True),
    "paged_lion_8bit": _bitsandbytes(_LION, 8, True),
    "rmsprop": OptimizerRow(
        (Rule("square_avg"), Rule("momentum_buffer", momentum=True)),
        "torch 2.13 optim/rmsprop.py",
        _ONE_LIST,
        lists=1,
        foreach_loop=loops.ROOT,
        apex=True,
    ),
    "rmsprop_bnb": _bitsandbytes(_SQUARES, 32),
    "rmsprop_bnb_8bit": _bitsandbytes(_SQUARES, 8),
    "rmsprop_bnb_32bit": _bitsandbytes(_SQUARES, 32),
    "galore_adamw": _GALORE,
    "galore_adamw_8bit": _GALORE_8,
    "galore_adafactor": _GALORE_FACTORED,
    "galore_adamw_layerwise": _layerwise(_GALORE),
    "galore_adamw_8bit_layerwise": _layerwise(_GALORE_8),
    "lomo": OptimizerRow(
        (),
        "lomo-optim 0.1 lomo.py",
        "one parameter and its gradient in fp32",
        loop=loops.LOMO,
        frees_gradients=True,
    ),
    "adalomo": OptimizerRow(  # it also keeps states of frozen parameters, which are not counted here
        (
            Rule("exp_avg_sq_row", first_axis, "fp32", of=matrix),
            Rule("exp_avg_sq_col", second_axis, "fp32", of=matrix),
            Rule("exp_avg_sq", first_axis, "fp32", of=other_than(matrix)),
        ),
        "lomo-optim 0.1 adalomo.py",
        "one parameter's gradient and updates in fp32",
        exists_before_step=True,
        loop=loops.ADALOMO,
        frees_gradients=True,
    ),
    "grokadamw": OptimizerRow(
        tuple(Rule(what, host=everything) for what in ("exp_avg", "exp_avg_sq", "grok_ema")),
        "grokadamw 0.1 grokadamw.py",
        "one parameter's states, brought to the GPU, and its updates",
        loop=loops.GROKADAMW,
    ),
    "schedule_free_radam": _SCHEDULE_FREE._replace(source="schedulefree 1.4 radam_schedulefree.py", first_list_step=5),
    "schedule_free_adamw": _SCHEDULE_FREE._replace(source="schedulefree 1.4 adamw_schedulefree.py"),
    "schedule_free_sgd": OptimizerRow((Rule("z", dtype="own"),), "schedulefree 1.4 sgd_schedulefree.py"),
    "apollo_adamw": _APOLLO_ADAMW,
    "apollo_adamw_layerwise": _layerwise(_APOLLO_ADAMW),
    "stable_adamw": OptimizerRow(  # with Triton, whose kernels take a kahan_comp of one element with fp32 parameters
        (
            *_ADAM,
            Rule("kahan_comp", dtype="own", of=other_than(fp32)),
            Rule("kahan_comp", vector(1), "uint8", of=fp32),
            Rule("eps_sq", scalar, "own"),
            Rule("mean_square", vector(1), "fp32"),
        ),
        "torch-optimi 0.3 stableadamw.py",
    ),
    "none": OptimizerRow((), "no optimizer"),
    "muon": OptimizerRow(  # torch's Muon takes only matrices and recommends AdamW for the rest
        (
            Rule("momentum_buffer", of=hidden_matrix),
            Rule("exp_avg", of=other_than(hidden_matrix)),
            Rule("exp_avg_sq", of=other_than(hidden_matrix)),
        ),
        "torch 2.13 optim/_muon.py; optim/adam.py for embeddings, the head and vectors, as in llamafactory 0.9.4 "
        "train/trainer_utils.py _create_muon_optimizer",
        "one matrix's Newton-Schulz iteration in bf16, or AdamW's list for the others",
        lists=1,
        loop=loops.MUON,
        takes=hidden_matrix,
    ),
}

# torch.optim classes, the optimizers whose update the host can compute. Source: torchao 0.18 optim/cpu_offload.py.
ON_HOST = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")

# Names of transformers' OptimizerNames that cannot run, with the reason.
REFUSED: Mapping[str, str] = {
    "galore_adafactor_layerwise": (
        "transformers 5.24's Trainer cannot build it (ValueError: Cannot combine manual `lr` and `relative_step=True` "
        "options); galore_adafactor and galore_adamw_layerwise run"
    ),
}
