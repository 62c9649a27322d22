"""Experts in a Python loop, one after the other: as modules, or as slices of parameters.

An expert's rows depend on the data; `routed` is the number of rows if tokens are spread evenly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from memplan.catalogue.experts.experts import stack, weighed
from memplan.catalogue.experts.routers import CHOSEN, PAIRS, SCORES
from memplan.catalogue.kernels import ops
from memplan.core.errors import ConfigError
from memplan.core.ir import Keep, Op, Scratch, Tensor, Weight
from memplan.models.model import ModelSpec

MOST_EXPERTS = 512  # in a layer, if looped over; no model in use has more than 160
MOST_MODULES = 16_384  # in all layers; no model in use has more than 12,032
ROWS = "routed"
OF_A_GROUP = "spread"  # the axis of the rows of a group of experts
Expert = Callable[[str, str], tuple[Op, ...]]  # takes its name and prefix t, and makes `t.out` of `t.in`


def experts_of(m: ModelSpec) -> int:
    """Return the number of experts in a layer, which are looped over. Raises ConfigError if there are too many."""
    number, layers = m.axes()["E"], sum(layer.ffn == "experts" for layer in m.layers) or m.num_hidden_layers
    if number > MOST_EXPERTS or number * layers > MOST_MODULES:
        raise ConfigError(
            f"config: num_experts: {number:,} in each of {layers:,} layers are modules of their own, of which at most "
            f"{MOST_EXPERTS:,} in a layer and {MOST_MODULES:,} in all can be estimated",
            "num_experts",
        )
    return number


def loop(x: str, y: str, name: str, experts: Sequence[Expert], each: str = ROWS, hit: bool = True) -> tuple[Op, ...]:
    """Gather each expert's rows of x, and add the expert's output to the sum in place.

    each  the axis of an expert's rows
    hit   experts that no token chose are found first and skipped

    If one entry stands for a group of experts, the kept bytes are exact, and temporaries have the group's rows, which
    are more than one expert's. Source: transformers 5.24 models/dbrx/modeling_dbrx.py DbrxExperts,
    models/step3p7/modeling_step3p7.py.
    """
    rows, last, classes = f"{each} h", "experts.sum", "E1" if hit else "E"
    operations: list[Op] = [
        Op(f"{name}.zeros", (), (Tensor(last, "b s h", f"={x}"),), gradient="none"),
        Op(f"{name}.one_hot", (CHOSEN,), (Tensor("experts.mask", f"{PAIRS} {classes}", "int64"),), gradient="none"),
    ]
    if hit:
        operations.append(
            Op(f"{name}.hit", ("experts.mask",), (Tensor("experts.hit", classes, "int64"),), gradient="none")
        )
    for i, expert in enumerate(experts):
        t, n = f"expert{i}", f"{name}.{i}"
        places, added = f"{t}.places", f"{t}.sum"
        operations += (
            Op(f"{n}.where", ("experts.mask",), (Tensor(places, f"2 {each}", "int64"),), gradient="none"),
            ops.index(f"{n}.gather", x, places, f"{t}.in", rows),
            *expert(n, t),
            ops.index(f"{n}.scores", SCORES, places, f"{t}.scores", each),
            weighed(n, f"{t}.out", f"{t}.scores", f"{t}.weighted", rows),
            ops.cast(f"{n}.cast", f"{t}.weighted", f"{t}.added", rows, f"={x}"),
            Op(
                f"{n}.index_add",
                (last, f"{t}.added", places),
                (Tensor(added, "b s h", f"={x}"),),
                (),
                (Keep(places, f"{t}.added"), Keep(f"{t}.added", f"{t}.added")),
                gradient="same",
                view=True,
                source=f"{ops.DERIVATIVES}: index_add",
            ),
        )
        last = added
    held = ("experts.mask", "experts.hit") if hit else ("experts.mask",)
    return (*operations, ops.view(f"{name}.view", last, y, "b s h"), ops.release_names(*held, x))


# Experts that are modules


def added(
    x: str,
    y: str,
    number: int,
    used: int,
    name: str = "mlp.experts",
    roles: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> tuple[Op, ...]:
    """Return the loop of transformers before 5 over `number` experts, of which a token uses `used`.

    Source: transformers 4.48.1 models/mixtral/modeling_mixtral.py MixtralSparseMoeBlock, and alike.
    """
    return loop(x, y, name, [partial(_module, used=i < used, roles=roles) for i in range(number)], hit=False)


def modules(x: str, y: str, number: int, used: int, name: str = "mlp.experts") -> tuple[Op, ...]:
    """Return experts that are modules, of which a token uses `used`: rows are gathered and written back by masks.

    They are written in place, so backward allocates the full gradient again for every expert.
    Source: the code published with DeepSeek-MoE, DeepseekMoE.forward.
    """
    pairs, rows = f"{PAIRS} h", "experts.rows"
    operations: list[Op] = [
        ops.copy(f"{name}.repeat", x, rows, pairs, gradient="new"),
        Op(f"{name}.empty", (), (Tensor("experts.out", pairs, f"={rows}"),), gradient="none"),
    ]
    last = "experts.out"
    for i in range(number):
        t, n = f"expert{i}", f"{name}.{i}"
        for part in ("picked", "placed"):
            mask = Tensor(f"{t}.{part}", PAIRS, "bool")
            operations.append(Op(f"{n}.{part}", (CHOSEN,), (mask,), gradient="none"))
            if part == "picked":
                operations.append(ops.index(f"{n}.pick", rows, mask.name, f"{t}.in", f"{ROWS} h"))
                operations += _module(n, t, i < used)
        result = f"{t}.all"
        operations.append(
            Op(
                f"{n}.place",
                (last, f"{t}.out", f"{t}.placed"),
                (Tensor(result, pairs, f"={rows}"),),
                (),
                (Keep(f"{t}.placed", last), Keep(f"{t}.placed", f"{t}.out")),
                view=True,
                source=f"{ops.DERIVATIVES}: index_put_",
            )
        )
        last = result
    return (
        *operations,
        weighed(name, last, SCORES, "experts.weighted"),
        Op(f"{name}.sum", ("experts.weighted",), (Tensor(y, "b s h"),), autocast="wide", source=ops.DERIVATIVES),
        ops.release_names("experts.weighted", rows, last),
    )


def _module(
    name: str, t: str, used: bool, roles: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[Op, ...]:
    """Return one expert's MLP. `used` marks as many experts as a token chooses, whichever they are."""
    shape, (gate, up, down) = f"{ROWS} m", roles

    def linear(role: str, x: str, y: str, out: str, into: str) -> Op:
        op = ops.linear(f"{name}.{role}", x, y, out, into, "mlp", lead=ROWS, flat=True)
        return op if used else op._replace(weights=(op.weights[0]._replace(chosen="none"),))

    return (
        linear(gate, f"{t}.in", f"{t}.gate", "m", "h"),
        ops.activation(f"{name}.act_fn", f"{t}.gate", f"{t}.act", shape),
        linear(up, f"{t}.in", f"{t}.up", "m", "h"),
        ops.mul(f"{name}.product", f"{t}.act", f"{t}.up", f"{t}.inner", shape),
        linear(down, f"{t}.inner", f"{t}.out", "h", "m"),
        ops.release_names(f"{t}.in"),
    )


# Experts that are slices of parameters: backward makes the whole parameter's gradient for each


def in_rows(name: str) -> Expert:
    """Return a gated MLP for `loop`, whose matrices are consecutive rows of parameters that are not stacked."""
    gate, up, down = (Weight(f"{name}.mlp.{w}", "E f h", "mlp", rows=2, chosen="e") for w in ("w1", "v1", "w2"))
    shape = f"{ROWS} f"

    def expert(n: str, t: str) -> tuple[Op, ...]:
        return (
            _part(f"{n}.w1", f"{t}.in", f"{t}.gate", shape, gate),
            _part(f"{n}.v1", f"{t}.in", f"{t}.up", shape, up),
            ops.activation(f"{n}.activation_fn", f"{t}.gate", f"{t}.act", shape),
            ops.mul(f"{n}.product", f"{t}.act", f"{t}.up", f"{t}.inner", shape),
            _part(f"{n}.w2", f"{t}.inner", f"{t}.out", f"{ROWS} h", down),
            ops.release_names(f"{t}.in", f"{t}.up", f"{t}.act"),
        )

    return expert


def in_stacks(name: str, act: Callable[[str, str, str], tuple[Op, ...]]) -> Expert:
    """Return an MLP for a grouped `loop`, with the stacks of `experts`, which peft does not adapt, and its `act`."""
    up = stack(f"{name}.gate_up_proj", "E 2 m h", 3, ())
    down = stack(f"{name}.down_proj", "E h m", 2, ())

    def expert(n: str, t: str) -> tuple[Op, ...]:
        return (
            _part(f"{n}.gate_up_proj", f"{t}.in", f"{t}.gate_up", f"{OF_A_GROUP} 2 m", up),
            ops.release_names(f"{t}.in"),
            *act(n, f"{t}.gate_up", f"{t}.inner"),
            ops.release_names(f"{t}.gate_up"),
            _part(f"{n}.down_proj", f"{t}.inner", f"{t}.out", f"{OF_A_GROUP} h", down),
        )

    return expert


def _part(name: str, x: str, y: str, shape: str, w: Weight) -> Op:
    """Multiply by one expert's slice of a parameter."""
    return Op(
        name,
        (x,),
        (Tensor(y, shape),),
        (w,),
        (Keep(w.name, x), Keep(x, w.name)),
        scratch_back=(Scratch(Tensor("of one expert", w.shape.partition(" ")[2], f"={w.name}"), w.name),),
        autocast="lower",
        product="matrix",
        source=f"{ops.DERIVATIVES}: mm, select_backward",
    )
