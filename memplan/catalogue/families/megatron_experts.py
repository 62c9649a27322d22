"""Megatron-core's mixtures of experts: a router, tokens sent to the ranks whose experts they chose, and experts' MLPs.

Of `E` experts, `m` wide, a token's are `e`. Ranks divide them: `eg` ranks exchange tokens, of whom `et` divide each
expert's matrices, and a rank has `Eown` experts. It has `tokens_own` tokens, all ranks of its group `tokens_gathered`,
and to its experts go `tokens_routed`, as many as to any other's: tokens are counted as spread evenly. The scores of the
router are multiplied in after the activation.
"""

from __future__ import annotations

from memplan.catalogue.experts.experts import stack
from memplan.catalogue.kernels import ops
from memplan.core.ir import Keep, Op, Scratch, Tensor, Weight
from memplan.models.configs.megatron import dispatches_all, experts_of, groups_products, is_gated, router_in_fp32
from memplan.models.model import ModelSpec

_MOE = "megatron-core 0.12 transformer/moe"
_ROWS, _ALL = "tokens_routed", "tokens_gathered"


def mixture(m: ModelSpec, x: str, y: str) -> tuple[Op, ...]:
    """From `x` to `y`, with the expert that all tokens use, where there is one."""
    shared = m.axes().get("fs", 0) > 0
    routed = "routed" if shared else y
    name = "mlp.shared_experts"
    return (
        *_router(m, x),
        *(_sent_to_all(m, x, routed) if dispatches_all(m) else _sent(m, x, routed)),
        *(
            (
                ops.linear(f"{name}.linear_fc1", x, "shared.up", "2 fs" if is_gated(m) else "fs", "h", "mlp"),
                ops.activation(f"{name}.activation", "shared.up", "shared.act", "b s fs"),
                ops.leave("shared.up"),
                ops.linear(f"{name}.linear_fc2", "shared.act", "shared", "h", "fs", "mlp"),
                ops.leave("shared.act"),
                ops.add("mlp.add", "routed", "shared", y, "b s h"),
            )
            if shared
            else ()
        ),
        ops.leave(x, "router.probs", "router.map"),
    )


def _router(m: ModelSpec, x: str) -> tuple[Op, ...]:
    """Scores of all experts for each token, those that are not chosen 0; in fp32, the input is cast for the product.

    Of the balancing loss what is kept is a few numbers a token and expert.
    """
    name, wide = "mlp.router", router_in_fp32(m)
    dtype = "fp32" if wide else ""
    w = Weight(f"{name}.weight", "E h", "router", rows=1)
    given = f"{x}.float" if wide else x
    cast = "router.weight" if wide else ""
    source = f"{_MOE}/router.py TopKRouter"
    scores, chosen = Tensor("router.chosen", "b s e", dtype), Tensor("router.indices", "b s e", "int64")
    return (
        *((ops.cast(f"{name}.float", x, given, "b s h", "fp32"),) if wide else ()),
        Op(
            name,
            (given,),
            (Tensor("router.logits", "b s E", dtype), *((Tensor(cast, "E h", "fp32"),) if wide else ())),
            (w,),
            (Keep(cast or w.name, given), Keep(given, w.name)),
            gradient="view",
            product="matrix",
            source=source,
        ),
        *((ops.leave(given),) if wide else ()),
        Op(
            f"{name}.topk",
            ("router.logits",),
            (scores, chosen),
            (),
            (Keep(chosen.name, "router.logits"),),
            source=source,
        ),
        *ops.softmax(f"{name}.softmax", scores.name, "router.softmax", "b s e", "fp32"),
        Op(
            f"{name}.scatter",
            ("router.softmax", chosen.name),
            (Tensor("router.probs", "b s E", "=router.logits"), Tensor("router.map", "b s E", "bool")),
            (),
            (Keep(chosen.name, "router.softmax"),),
            scratch=(Tensor("map of numbers", "b s E", "int32"),),
            source=source,
        ),
        *ops.softmax(f"{name}.aux_loss", "router.logits", "router.all_scores", "b s E", "fp32"),
    )


def buffer(m: ModelSpec) -> tuple[Op, ...]:
    """What all tokens are gathered into, in every layer.

    Source: megatron-core 0.12 tensor_parallel/utils.py GlobalMemoryBuffer.
    """
    if not experts_of(m) or not dispatches_all(m) or m.axes()["eg"] == 1:
        return ()
    made = Tensor("gathered", f"{_ALL} h", "=embeds")
    source = "megatron-core 0.12 tensor_parallel/utils.py GlobalMemoryBuffer"
    return (Op("all-gather buffer", (), (made,), gradient="none", holds="step", source=source),)


def _sent_to_all(m: ModelSpec, x: str, y: str) -> tuple[Op, ...]:
    """All tokens of all ranks are gathered into the buffer that ranks have for that, and each takes those that its
    experts are chosen for. What they made is summed over ranks.

    Source: megatron-core 0.12 transformer/moe/token_dispatcher.py MoEAllGatherTokenDispatcher.
    """
    name, source = "mlp.token_dispatcher", f"{_MOE}/token_dispatcher.py MoEAllGatherTokenDispatcher"
    alone = m.axes()["eg"] == 1
    return (
        ops.view(f"{name}.gather", x, "tokens.all", f"{_ALL} h", "same" if alone else "new"),
        _permuted(f"{name}.permute", "tokens.all", "rows", source),
        ops.leave("tokens.all"),
        *_experts(m, "rows", "made"),
        _unpermuted(f"{name}.unpermute", "made", "experts.summed", f"{_ALL} h", source),
        ops.leave("made", "order"),
        ops.view(f"{name}.combine", "experts.summed", y, "b s h")
        if alone
        else Op(f"{name}.reduce_scatter", ("experts.summed",), (Tensor(y, "b s h"),), source=source),
        ops.leave("experts.summed"),
    )


def _sent(m: ModelSpec, x: str, y: str) -> tuple[Op, ...]:
    """Each rank sends its tokens, once for each expert that they chose, to the ranks that have those, and gets back
    what these made. Where a rank has several experts, what it was sent is sorted by them.

    Source: megatron-core 0.12 transformer/moe/token_dispatcher.py MoEAlltoAllTokenDispatcher.
    """
    name, source = "mlp.token_dispatcher", f"{_MOE}/token_dispatcher.py MoEAlltoAllTokenDispatcher"
    axes = m.axes()
    exchanged, several = axes["eg"] > 1, axes["Eown"] > 1
    there: list[Op] = []
    back: list[Op] = []
    rows, made = "sent", "made"
    if exchanged:
        there += (_moved(f"{name}.all_to_all", rows, "received", source), ops.leave(rows))
        rows = "received"
        if several:
            there += (_moved(f"{name}.sort", rows, "rows", source), ops.leave(rows))
            back += (_moved(f"{name}.unsort", made, "made.unsorted", source), ops.leave(made))
            rows, made = "rows", "made.unsorted"
        back += (_moved(f"{name}.all_to_all_back", made, "returned", source), ops.leave(made))
        made = "returned"
    return (
        _permuted(f"{name}.permute", x, "sent", source),
        *there,
        *_experts(m, rows, "made"),
        *back,
        _unpermuted(f"{name}.unpermute", made, y, "b s h", source),
        ops.leave(made, "order"),
    )


def _moved(name: str, x: str, y: str, source: str) -> Op:
    return Op(name, (x,), (Tensor(y, f"{_ROWS} h"),), source=source)


def _permuted(name: str, x: str, y: str, source: str) -> Op:
    """Rows of those tokens that are chosen, and their scores; on the way back they are added into zeros."""
    order, probs = Tensor("order", _ROWS, "int64"), Tensor("probs", _ROWS, "=router.probs")
    return Op(
        name,
        (x, "router.probs", "router.map"),
        (Tensor(y, f"{_ROWS} h", f"={x}"), order, probs),
        (),
        (Keep(order.name, x), Keep("router.map", "router.probs")),
        source=source,
    )


def _unpermuted(name: str, x: str, y: str, shape: str, source: str) -> Op:
    """Rows added into zeros; their places are kept."""
    return Op(name, (x, "order"), (Tensor(y, shape, f"={x}"),), (), (Keep("order", x),), source=source)


def _experts(m: ModelSpec, x: str, y: str) -> tuple[Op, ...]:
    """Grouped products, or one expert after the other, whose outputs are then joined; as much is kept.

    Source: megatron-core 0.12 transformer/moe/experts.py TEGroupedMLP, SequentialMLP.
    """
    name, gated, grouped = "mlp.experts", is_gated(m), groups_products(m)
    up = stack(f"{name}.linear_fc1.weight", f"Eown {'2 ' if gated else ''}m h", 3 if gated else 2, ())
    down = stack(f"{name}.linear_fc2.weight", "Eown h m", 2, ())
    wide = f"{_ROWS} {'2 ' if gated else ''}m"
    last = y if grouped or m.axes()["Eown"] == 1 else f"{y}.parts"
    return (
        _product(f"{name}.linear_fc1", x, "experts.up", wide, up),
        ops.leave(x),
        *_activated(m, name, "experts.up", "experts.act", gated),
        _product(f"{name}.linear_fc2", "experts.act", last, f"{_ROWS} h", down),
        *((ops.copy(f"{name}.cat", last, y, f"{_ROWS} h"), ops.leave(last)) if last != y else ()),
        ops.leave("experts.act", "experts.up", "probs"),
    )


def _product(name: str, x: str, y: str, shape: str, w: Weight) -> Op:
    return Op(
        name,
        (x,),
        (Tensor(y, shape, f"={w.name}"),),
        (w,),
        (Keep(w.name, x), Keep(x, w.name)),
        product="grouped",
        source=f"{_MOE}/experts.py TEGroupedMLP",
    )


def _activated(m: ModelSpec, name: str, x: str, y: str, gated: bool) -> tuple[Op, ...]:
    """Of a gate one kernel, which keeps what it is given and the scores; else the activation, its product with the
    scores in their dtype, and a cast.

    Source: megatron-core 0.12 fusions/fused_bias_swiglu.py weighted_swiglu, transformer/moe/experts.py bias_act_func.
    """
    shape = f"{_ROWS} m"
    if gated:
        back = (Scratch(Tensor("product", shape, "=probs"), "probs"),)
        return (
            Op(
                f"{name}.activation",
                (x, "probs"),
                (Tensor(y, shape, f"={x}"),),
                (),
                tuple(Keep(what, of) for of in (x, "probs") for what in (x, "probs")),
                scratch_back=back,
                source="megatron-core 0.12 fusions/fused_bias_swiglu.py",
            ),
        )
    acted, weighed = f"{y}.whole", f"{y}.weighed"
    return (
        ops.activation(f"{name}.activation", x, acted, shape),
        ops.spread(f"{name}.weigh", acted, "probs", weighed, shape),
        ops.cast(f"{name}.cast", weighed, y, shape, f"={acted}"),
        ops.leave(acted, weighed),
    )
