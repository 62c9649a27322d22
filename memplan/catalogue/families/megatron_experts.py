"""Megatron-core's mixtures of experts: a router, tokens sent to the ranks of their experts, and expert MLPs.

Tokens are counted as spread evenly over experts. The router's scores are multiplied in after the activation.

E, e, m          experts, experts per token, width of an expert
eg               ranks that exchange tokens
et               ranks of those that divide each expert's matrices
Eown             experts of this rank
tokens_own       tokens of this rank
tokens_gathered  tokens of all ranks of its group
tokens_routed    rows that go to this rank's experts, as many as to any other's
"""

from __future__ import annotations

from memplan.catalogue.experts.experts import stack
from memplan.catalogue.kernels import ops
from memplan.core.ir import Keep, Op, Scratch, Tensor, Weight
from memplan.models.configs.megatron import dispatches_all, experts_of, groups_products, is_gated, router_in_fp32
from memplan.models.model import ModelSpec

_MOE = "megatron-core 0.12 transformer/moe"
_ROWS, _ALL = "tokens_routed", "tokens_gathered"


def megatron_mixture(m: ModelSpec, x: str, y: str) -> tuple[Op, ...]:
    """The mixture from `x` to `y`, with the shared expert if there is one."""
    shared = m.axes().get("fs", 0) > 0
    routed = "routed" if shared else y
    name = "mlp.shared_experts"
    return (
        *_router(m, x),
        *(_dispatch_all_gather(m, x, routed) if dispatches_all(m) else _dispatch_all_to_all(m, x, routed)),
        *(
            (
                ops.linear(f"{name}.linear_fc1", x, "shared.up", "2 fs" if is_gated(m) else "fs", "h", "mlp"),
                ops.activation(f"{name}.activation", "shared.up", "shared.act", "b s fs"),
                ops.release_names("shared.up"),
                ops.linear(f"{name}.linear_fc2", "shared.act", "shared", "h", "fs", "mlp"),
                ops.release_names("shared.act"),
                ops.add("mlp.add", "routed", "shared", y, "b s h"),
            )
            if shared
            else ()
        ),
        ops.release_names(x, "router.probs", "router.map"),
    )


def _router(m: ModelSpec, x: str) -> tuple[Op, ...]:
    """Scores of all experts for each token, 0 for those not selected. For an fp32 router the input is cast.

    What the balancing loss keeps is a few numbers per token and expert.
    """
    name, wide = "mlp.router", router_in_fp32(m)
    dtype = "fp32" if wide else ""
    w = Weight(f"{name}.weight", "E h", "router", rows=1)
    router_input = f"{x}.float" if wide else x
    cast = "router.weight" if wide else ""
    source = f"{_MOE}/router.py TopKRouter"
    scores, chosen = Tensor("router.chosen", "b s e", dtype), Tensor("router.indices", "b s e", "int64")
    return (
        *((ops.cast(f"{name}.float", x, router_input, "b s h", "fp32"),) if wide else ()),
        Op(
            name,
            (router_input,),
            (Tensor("router.logits", "b s E", dtype), *((Tensor(cast, "E h", "fp32"),) if wide else ())),
            (w,),
            (Keep(cast or w.name, router_input), Keep(router_input, w.name)),
            gradient="view",
            product="matrix",
            source=source,
        ),
        *((ops.release_names(router_input),) if wide else ()),
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


def gather_buffer(m: ModelSpec) -> tuple[Op, ...]:
    """The buffer into which all tokens are gathered in every layer; empty if tokens are not gathered.

    Source: megatron-core 0.12 utils.py GlobalMemoryBuffer.
    """
    if not experts_of(m) or not dispatches_all(m) or m.axes()["eg"] == 1:
        return ()
    gathered = Tensor("gathered", f"{_ALL} h", "=embeds")
    source = "megatron-core 0.12 utils.py GlobalMemoryBuffer"
    return (Op("all-gather buffer", (), (gathered,), gradient="none", holds="step", source=source),)


def _dispatch_all_gather(m: ModelSpec, x: str, y: str) -> tuple[Op, ...]:
    """Gather all ranks' tokens into the shared buffer; each rank computes those that selected its experts.

    The experts' outputs are summed over ranks.

    Source: megatron-core 0.12 transformer/moe/token_dispatcher.py MoEAllGatherTokenDispatcher.
    """
    name, source = "mlp.token_dispatcher", f"{_MOE}/token_dispatcher.py MoEAllGatherTokenDispatcher"
    is_single_rank = m.axes()["eg"] == 1
    return (
        ops.view(f"{name}.gather", x, "tokens.all", f"{_ALL} h", "same" if is_single_rank else "new"),
        _permute(f"{name}.permute", "tokens.all", "rows", source),
        ops.release_names("tokens.all"),
        *_experts(m, "rows", "made"),
        _unpermute(f"{name}.unpermute", "made", "experts.summed", f"{_ALL} h", source),
        ops.release_names("made", "order"),
        ops.view(f"{name}.combine", "experts.summed", y, "b s h")
        if is_single_rank
        else Op(f"{name}.reduce_scatter", ("experts.summed",), (Tensor(y, "b s h"),), source=source),
        ops.release_names("experts.summed"),
    )


def _dispatch_all_to_all(m: ModelSpec, x: str, y: str) -> tuple[Op, ...]:
    """Send each token to the ranks of the experts it selected, once for each expert, and receive their outputs.

    A rank with several experts sorts what it receives by expert.

    Source: megatron-core 0.12 transformer/moe/token_dispatcher.py MoEAlltoAllTokenDispatcher.
    """
    name, source = "mlp.token_dispatcher", f"{_MOE}/token_dispatcher.py MoEAlltoAllTokenDispatcher"
    axes = m.axes()
    exchanged, has_several_experts = axes["eg"] > 1, axes["Eown"] > 1
    outbound: list[Op] = []
    inbound: list[Op] = []
    rows, output = "sent", "made"
    if exchanged:
        outbound += (_move_rows(f"{name}.all_to_all", rows, "received", source), ops.release_names(rows))
        rows = "received"
        if has_several_experts:
            outbound += (_move_rows(f"{name}.sort", rows, "rows", source), ops.release_names(rows))
            inbound += (_move_rows(f"{name}.unsort", output, "made.unsorted", source), ops.release_names(output))
            rows, output = "rows", "made.unsorted"
        inbound += (_move_rows(f"{name}.all_to_all_back", output, "returned", source), ops.release_names(output))
        output = "returned"
    return (
        _permute(f"{name}.permute", x, "sent", source),
        *outbound,
        *_experts(m, rows, "made"),
        *inbound,
        _unpermute(f"{name}.unpermute", output, y, "b s h", source),
        ops.release_names(output, "order"),
    )


def _move_rows(name: str, x: str, y: str, source: str) -> Op:
    return Op(name, (x,), (Tensor(y, f"{_ROWS} h"),), source=source)


def _permute(name: str, x: str, y: str, source: str) -> Op:
    """The rows of selected tokens, and their scores. In backward they are added into zeros."""
    order, probs = Tensor("order", _ROWS, "int64"), Tensor("probs", _ROWS, "=router.probs")
    return Op(
        name,
        (x, "router.probs", "router.map"),
        (Tensor(y, f"{_ROWS} h", f"={x}"), order, probs),
        (),
        (Keep(order.name, x), Keep("router.map", "router.probs")),
        source=source,
    )


def _unpermute(name: str, x: str, y: str, shape: str, source: str) -> Op:
    """Rows added into zeros. Their places are kept."""
    return Op(name, (x, "order"), (Tensor(y, shape, f"={x}"),), (), (Keep("order", x),), source=source)


def _experts(m: ModelSpec, x: str, y: str) -> tuple[Op, ...]:
    """Grouped products, or one expert after the other with their outputs concatenated. Both keep the same.

    Source: megatron-core 0.12 transformer/moe/experts.py TEGroupedMLP, SequentialMLP.
    """
    name, gated, grouped = "mlp.experts", is_gated(m), groups_products(m)
    up = stack(f"{name}.linear_fc1.weight", f"Eown {'2 ' if gated else ''}m h", 3 if gated else 2, ())
    down = stack(f"{name}.linear_fc2.weight", "Eown h m", 2, ())
    wide = f"{_ROWS} {'2 ' if gated else ''}m"
    last = y if grouped or m.axes()["Eown"] == 1 else f"{y}.parts"
    return (
        _product(f"{name}.linear_fc1", x, "experts.up", wide, up),
        ops.release_names(x),
        *_weighted_activation(m, name, "experts.up", "experts.act", gated),
        _product(f"{name}.linear_fc2", "experts.act", last, f"{_ROWS} h", down),
        *((ops.copy(f"{name}.cat", last, y, f"{_ROWS} h"), ops.release_names(last)) if last != y else ()),
        ops.release_names("experts.act", "experts.up", "probs"),
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


def _weighted_activation(m: ModelSpec, name: str, x: str, y: str, gated: bool) -> tuple[Op, ...]:
    """The activation, times the router's scores.

    With a gate it is one kernel, which keeps its input and the scores. Otherwise it is the activation, its product with
    the scores in their dtype, and a cast.

    Source: megatron-core 0.16.1 fusions/fused_bias_swiglu.py weighted_swiglu, transformer/moe/experts.py bias_act_func.
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
                source="megatron-core 0.16.1 fusions/fused_bias_swiglu.py weighted_swiglu",
            ),
        )
    acted, weighed = f"{y}.whole", f"{y}.weighed"
    return (
        ops.activation(f"{name}.activation", x, acted, shape),
        ops.spread(f"{name}.weigh", acted, "probs", weighed, shape),
        ops.cast(f"{name}.cast", weighed, y, shape, f"={acted}"),
        ops.release_names(acted, weighed),
    )
