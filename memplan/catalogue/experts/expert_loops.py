"""Experts one after the other, as Python writes a loop: as modules, or as parts of parameters.

How many rows each has depends on the data: `routed` is how many where they are spread evenly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from memplan.catalogue.experts.experts import moved, stack, weighed
from memplan.catalogue.experts.routers import CHOSEN, PAIRS, SCORES
from memplan.catalogue.kernels import ops
from memplan.core.errors import ConfigError
from memplan.core.ir import Keep, Op, Scratch, Tensor, Weight
from memplan.models.model import ModelSpec

AS_MODULES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")  # also counted as versions before transformers 5 have them
MOST_EXPERTS = 512  # in a layer, if they are walked one by one; no model in use has more than 160
MOST_MODULES = 16_384  # in all layers; no model in use has more than 12,032
ROWS = "routed"
OF_A_GROUP = "spread"  # how many rows a group of experts has
Expert = Callable[[str, str], tuple[Op, ...]]  # by its name: what makes `t.out` of `t.in`


def experts_of(m: ModelSpec) -> int:
    """The number of experts in a layer, which are walked one by one. Raises ConfigError if they are too many."""
    every, layers = m.axes()["E"], sum(layer.ffn == "experts" for layer in m.layers) or m.num_hidden_layers
    if every > MOST_EXPERTS or every * layers > MOST_MODULES:
        raise ConfigError(
            f"config: num_experts: {every:,} in each of {layers:,} layers are modules of their own, of which at most "
            f"{MOST_EXPERTS:,} in a layer and {MOST_MODULES:,} in all can be estimated",
            "num_experts",
        )
    return every


def loop(x: str, y: str, name: str, experts: Sequence[Expert], each: str = ROWS, hit: bool = True) -> tuple[Op, ...]:
    """Each expert picks its rows of x and adds what it makes of them to the sum in place.

    `each`: how many rows one has. `hit`: those that no token chose are found first and left out. Where a group of
    experts stands for one, what is kept is the same to the byte, and what is there for a moment is a group's rows,
    which are more.
    Source: transformers 5.24 models/dbrx/modeling_dbrx.py DbrxExperts, models/step3p7/modeling_step3p7.py.
    """
    rows, last, classes = f"{each} h", "experts.sum", "E1" if hit else "E"
    out: list[Op] = [
        Op(f"{name}.zeros", (), (Tensor(last, "b s h", f"={x}"),), gradient="none"),
        Op(f"{name}.one_hot", (CHOSEN,), (Tensor("experts.mask", f"{PAIRS} {classes}", "int64"),), gradient="none"),
    ]
    if hit:
        out.append(Op(f"{name}.hit", ("experts.mask",), (Tensor("experts.hit", classes, "int64"),), gradient="none"))
    for i, expert in enumerate(experts):
        t, n = f"expert{i}", f"{name}.{i}"
        places, added = f"{t}.places", f"{t}.sum"
        out += (
            Op(f"{n}.where", ("experts.mask",), (Tensor(places, f"2 {each}", "int64"),), gradient="none"),
            moved(f"{n}.gather", x, places, f"{t}.in", rows),
            *expert(n, t),
            moved(f"{n}.scores", SCORES, places, f"{t}.scores", each),
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
    return (*out, ops.view(f"{name}.view", last, y, "b s h"), ops.leave(*held, x))


# Experts that are modules


def added(
    x: str,
    y: str,
    number: int,
    used: int,
    name: str = "mlp.experts",
    roles: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> tuple[Op, ...]:
    """For transformers before 5, the loop over `number` of them, `used` a token.

    Source: transformers 4.48.1 models/mixtral/modeling_mixtral.py MixtralSparseMoeBlock, and alike.
    """
    return loop(x, y, name, [partial(_module, used=i < used, roles=roles) for i in range(number)], hit=False)


def modules(x: str, y: str, number: int, used: int, name: str = "mlp.experts") -> tuple[Op, ...]:
    """Experts that are modules, `used` of `number` a token: rows are picked by a mask, and put in place by another.

    In place, so that backward makes the whole gradient anew for every expert.
    Source: the code published with DeepSeek-MoE, DeepseekMoE.forward.
    """
    every, whole = f"{PAIRS} h", "experts.rows"
    out: list[Op] = [
        ops.copy(f"{name}.repeat", x, whole, every, gradient="new"),
        Op(f"{name}.empty", (), (Tensor("experts.out", every, f"={whole}"),), gradient="none"),
    ]
    last = "experts.out"
    for i in range(number):
        t, n = f"expert{i}", f"{name}.{i}"
        for part in ("picked", "placed"):
            mask = Tensor(f"{t}.{part}", PAIRS, "bool")
            out.append(Op(f"{n}.{part}", (CHOSEN,), (mask,), gradient="none"))
            if part == "picked":
                out.append(moved(f"{n}.pick", whole, mask.name, f"{t}.in", f"{ROWS} h"))
                out += _module(n, t, i < used)
        placed = f"{t}.all"
        out.append(
            Op(
                f"{n}.place",
                (last, f"{t}.out", f"{t}.placed"),
                (Tensor(placed, every, f"={whole}"),),
                (),
                (Keep(f"{t}.placed", last), Keep(f"{t}.placed", f"{t}.out")),
                view=True,
                source=f"{ops.DERIVATIVES}: index_put_",
            )
        )
        last = placed
    return (
        *out,
        weighed(name, last, SCORES, "experts.weighted"),
        Op(f"{name}.sum", ("experts.weighted",), (Tensor(y, "b s h"),), autocast="wide", source=ops.DERIVATIVES),
        ops.leave("experts.weighted", whole, last),
    )


def _module(
    name: str, t: str, used: bool, roles: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[Op, ...]:
    """One expert's MLP, a module like any; a token uses as many of them as it chooses, whichever these are."""
    shape, (gate_, up, down) = f"{ROWS} m", roles

    def linear(role: str, x: str, y: str, out: str, into: str) -> Op:
        op = ops.linear(f"{name}.{role}", x, y, out, into, "mlp", lead=ROWS, flat=True)
        return op if used else op._replace(weights=(op.weights[0]._replace(chosen="none"),))

    return (
        linear(gate_, f"{t}.in", f"{t}.gate", "m", "h"),
        ops.activation(f"{name}.act_fn", f"{t}.gate", f"{t}.act", shape),
        linear(up, f"{t}.in", f"{t}.up", "m", "h"),
        ops.mul(f"{name}.product", f"{t}.act", f"{t}.up", f"{t}.inner", shape),
        linear(down, f"{t}.inner", f"{t}.out", "h", "m"),
        ops.leave(f"{t}.in"),
    )


# Experts that are parts of parameters: backward makes the whole parameter's gradient for each


def in_rows(name: str) -> Expert:
    """For `loop`, a gated MLP whose matrices lie one after the other in parameters that are not stacked."""
    gate_, up, down = (Weight(f"{name}.mlp.{w}", "E f h", "mlp", rows=2, chosen="e") for w in ("w1", "v1", "w2"))
    wide = f"{ROWS} f"

    def expert(n: str, t: str) -> tuple[Op, ...]:
        return (
            _part(f"{n}.w1", f"{t}.in", f"{t}.gate", wide, gate_),
            _part(f"{n}.v1", f"{t}.in", f"{t}.up", wide, up),
            ops.activation(f"{n}.activation_fn", f"{t}.gate", f"{t}.act", wide),
            ops.mul(f"{n}.product", f"{t}.act", f"{t}.up", f"{t}.inner", wide),
            _part(f"{n}.w2", f"{t}.inner", f"{t}.out", f"{ROWS} h", down),
            ops.leave(f"{t}.in", f"{t}.up", f"{t}.act"),
        )

    return expert


def in_stacks(name: str, act: Callable[[str, str, str], tuple[Op, ...]]) -> Expert:
    """For `loop` in groups, matrices stacked as in `experts`, which peft takes for no linear layers, and its `act`."""
    up = stack(f"{name}.gate_up_proj", "E 2 m h", 3, ())
    down = stack(f"{name}.down_proj", "E h m", 2, ())

    def expert(n: str, t: str) -> tuple[Op, ...]:
        return (
            _part(f"{n}.gate_up_proj", f"{t}.in", f"{t}.gate_up", f"{OF_A_GROUP} 2 m", up),
            ops.leave(f"{t}.in"),
            *act(n, f"{t}.gate_up", f"{t}.inner"),
            ops.leave(f"{t}.gate_up"),
            _part(f"{n}.down_proj", f"{t}.inner", f"{t}.out", f"{OF_A_GROUP} h", down),
        )

    return expert


def _part(name: str, x: str, y: str, shape: str, w: Weight) -> Op:
    """A product with one expert's part of a parameter."""
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
