"""Tensor parallelism: one rank's part of a model, as a library divides it, and the collectives between the ranks.

A rank has a part of the heads and of the FFN's width, and so is a model of fewer heads and a narrower FFN; what it has
of a matrix is written in its shape (`v/4 h`: a fourth of the rows). Norms, the residual stream and what is made outside
of the blocks every rank has whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from memplan.catalogue.degrees import Degrees
from memplan.catalogue.families import litgpt, torchtitan
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import matrix, rewrite
from memplan.catalogue.parallelism import megatron_parallel
from memplan.catalogue.parallelism.expert_parallel import lent
from memplan.core.errors import SpecError
from memplan.core.ir import Op, Scratch, Stack, Tensor, Weight, operations
from memplan.models.configs.megatron import padded
from memplan.models.model import ModelSpec

_SOURCE = "transformers 5.24 distributed/tensor_parallel.py"


class Plan(NamedTuple):
    """How transformers divides a family: its linear layers by the last part of their names.

    columns    each rank has some rows of the matrix, and makes as much of the output, which stays divided
    rows       each rank has some columns, and makes a summand of the output; all summands are added up
    gathered   as `columns`, and the output is gathered at once, because something reads all of it
    split      as `rows`, of an input that every rank has whole
    experts    each rank has a part of every expert's width
    whole      modules whose layers every rank has whole, whatever they are called
    """

    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    gathered: tuple[str, ...] = ()
    split: tuple[str, ...] = ()
    experts: bool = False
    whole: tuple[str, ...] = ()

    @property
    def heads(self) -> bool:
        """Whether a rank computes the attention of some heads only."""
        return not {"q_proj", "q_b_proj", "query_key_value", "c_attn", "qkv_proj", "linear_qkv", "attn"}.isdisjoint(
            self.columns
        )

    @property
    def width(self) -> bool:
        """Whether a rank computes a part of the FFN's width only."""
        return not {"down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "linear_fc2", "proj"}.isdisjoint(self.rows)


_QKV, _GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_LLAMA = Plan((*_QKV, *_GATED), ("o_proj", "down_proj"))
_OLMO_2 = Plan(_GATED, ("down_proj",), _QKV, ("o_proj",))
_GLM = Plan(_QKV, ("o_proj",), ("gate_up_proj",), ("down_proj",))
_MIXTURE = _LLAMA._replace(experts=True)
_OF_WIDTH = Plan(_GATED, ("down_proj",), experts=True)
_LATENT = Plan(("q_proj", "q_b_proj", "kv_b_proj", *_GATED), ("o_proj", "down_proj"))
_DELTA = ("in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")

# Source: transformers 5.24 models/*/configuration_*.py base_model_tp_plan. The embeddings and the head are divided by
# the vocabulary in all of them (distributed/mixin.py init_parallel_plans, the classes' _tp_plan).
PLANS: dict[str, Plan] = {
    **dict.fromkeys(
        (
            *("cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "granite", "internlm3"),
            *("llama", "ministral", "ministral3", "mistral", "olmo", "qwen2", "qwen3", "seed_oss", "smollm3"),
        ),
        _LLAMA,
    ),
    **dict.fromkeys(("glm", "glm4"), _GLM),
    **dict.fromkeys(("olmo2", "olmo3"), _OLMO_2),
    **dict.fromkeys(("ernie4_5_moe", "glm4_moe", "mixtral", "qwen3_moe"), _MIXTURE),
    **dict.fromkeys(("minimax_m2", "olmoe"), Plan((), (), _QKV, ("o_proj",), experts=True)),
    **dict.fromkeys(("granitemoe", "granitemoehybrid", "hunyuan_v1_moe", "jamba", "phimoe"), Plan(experts=True)),
    **dict.fromkeys(("deepseek_v3", "kimi_linear"), _OF_WIDTH),
    **dict.fromkeys(("deepseek_v2", "deepseek_v32", "glm_moe_dsa"), _LATENT._replace(experts=True)),
    "glm4_moe_lite": _LATENT._replace(experts=True, whole=("shared_experts",)),
    "minicpm3": _LATENT,
    **dict.fromkeys(("gpt_oss", "hunyuan_v1_dense"), Plan()),
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe_text"), _MIXTURE._replace(gathered=_DELTA)),
    "qwen3_5_text": _LLAMA._replace(gathered=_DELTA),
    "qwen2_moe": _MIXTURE._replace(whole=("shared_expert",)),
    "gpt_neox": Plan(("query_key_value", "dense_h_to_4h"), ("dense", "dense_4h_to_h")),
    "gptj": Plan((*_QKV, "fc_in"), ("out_proj", "fc_out")),
    "nemotron": Plan((*_QKV, "up_proj"), ("o_proj", "down_proj")),
    "phi": Plan((*_QKV, "fc1"), ("dense", "fc2")),
    "phi3": Plan((), (), ("qkv_proj", "gate_up_proj"), ("o_proj", "down_proj")),
    "starcoder2": Plan((*_QKV, "c_fc"), ("o_proj", "c_proj")),
}


# Megatron-core has one projection of q, k and v, whose rows lie group by group, and one of gate and up.
MEGATRON: dict[str, Plan] = {
    **{name: plan for name, plan in PLANS.items() if not plan.gathered and not plan.experts},
    **dict.fromkeys(("glm", "glm4"), Plan((*_QKV, "gate_up_proj"), ("o_proj", "down_proj"))),
    "gpt2": Plan(("c_attn", "c_fc"), ("c_proj",)),
    "megatron_gpt": Plan(("linear_qkv", "linear_fc1"), ("linear_proj", "linear_fc2")),
    "phi3": Plan(("qkv_proj", "gate_up_proj"), ("o_proj", "down_proj")),
}
_TITAN: dict[str, Plan] = dict.fromkeys(
    torchtitan.KINDS, Plan(("qkv_proj",), ("down_proj",))
)  # heads and width are divided
# LitGPT divides what is in its blocks, and has embeddings and head whole. Source: litgpt 0.5.3 generate/tp.py.
_LITGPT: dict[str, Plan] = dict.fromkeys(litgpt.KINDS, Plan(("attn", "fc", "fc_1", "fc_2"), ("proj",)))
STYLES = {"transformers": PLANS, "megatron": MEGATRON, "torchtitan": _TITAN, "litgpt": _LITGPT}


def part_of(model: ModelSpec, degrees: Degrees) -> ModelSpec:
    """The model that one rank computes: as many heads as it has, and as much of the FFN's width."""
    t, plan, v = degrees.tp, STYLES[degrees.style][model.model_type], model.vocab_size
    a, k, f = model.num_attention_heads, model.num_key_value_heads, model.intermediate_size
    if plan.heads:
        a, k = a // t, k // t
    if degrees.style == "megatron":
        v = padded(v, t)
    if degrees.style == "torchtitan":
        v = -(-v // t)
    return model.narrowed(a, k, -(-f // t) if plan.width else f, v)


def axes_of_part(model: ModelSpec, degrees: Degrees) -> dict[str, int]:
    """How wide a rank's parts of the experts are, which it has whole where ranks have other experts each; and of those
    that all tokens use, where they are divided."""
    t, plan, axes = degrees.tp, STYLES[degrees.style][model.model_type], model.axes()
    if not plan.experts or "m" not in axes:
        return {}
    shared = {"fs": axes["fs"] // t} if "fs" in axes and plan.width and not plan.whole else {}
    return {"m": axes["m"] // (t if degrees.ep == 1 else 1), **shared}


# What has a plan in transformers 5.24, and fails in its own code.
_FAILS = {
    "llama4_text": "its experts' output is added to in place (modeling_llama4.py), which autograd refuses of a tensor "
    "that DTensor hands out",
}


def check(model: ModelSpec, degrees: Degrees, itemsize: int, adapted: tuple[str, ...] = ()) -> None:
    """Raise SpecError for a family that cannot be divided, naming those that can, or by a degree that does not divide
    its heads, naming every number that it does not divide. `adapted` are the targets that experts' matrices stand for.

    Rows that are multiplied in one grouped product are a multiple of 16 bytes, of numbers of `itemsize`.
    Source: torch 2.13 aten/src/ATen/native/GroupedMMUtils.h check_valid_strides_and_return_transposed.
    """
    t, field = degrees.tp, "parallelism.tp"
    plan = STYLES[degrees.style].get(model.model_type)
    if plan is None:
        if degrees.style != "megatron" and model.model_type in _FAILS:
            reason = _FAILS[model.model_type]
            raise SpecError(f"{field}: transformers 5.24 does not run {model.model_type} on {t}: {reason}", field)
        known = ", ".join(sorted(STYLES[degrees.style]))
        raise SpecError(f"{field}: {t} is not supported yet for {model.model_type}; supported: {known}", field)
    axes = model.axes()
    width = axes.get("m", 0) if plan.experts and degrees.ep == 1 else 0
    counted = {
        "attention heads": model.num_attention_heads if plan.heads else 0,
        "key/value heads": model.num_key_value_heads if plan.heads else 0,
        "of the FFN's width": model.intermediate_size if degrees.style == "megatron" else 0,
        "of an expert's width": width,
        "of the shared experts' width": axes.get("fs", 0) if plan.experts and plan.width and not plan.whole else 0,
    }
    left = [f"{n} {what}" for what, n in counted.items() if n % t]
    if left:
        raise SpecError(f"{field}: {t} does not divide {' and '.join(left)}", field)
    if width // t * itemsize % 16:
        raise SpecError(
            f"{field}: {t} leaves experts {width // t} wide, and torch's grouped products take rows of a multiple of "
            f"16 bytes ({16 // itemsize} numbers)",
            field,
        )
    if plan.experts and adapted:
        raise SpecError(
            f"method.targets: peft 0.21 fails to adapt experts ({', '.join(adapted)}) that tensor parallelism has "
            "divided; name linear layers, such as q_proj and o_proj",
            "method.targets",
        )


def check_sequence(sequence: int, degrees: Degrees) -> None:
    """Raise SpecError where ranks that divide the tokens would not have the same number of them."""
    t, field = degrees.tp, "parallelism.sequence_parallel"
    if degrees.sequence_parallel and sequence % t:
        raise SpecError(f"{field}: {t} ranks do not divide a sequence of {sequence} tokens", field)


def divide(stack: Stack, model_type: str, degrees: Degrees, records: bool = True) -> Stack:
    """The rank's operations of a stack that was built of the rank's part of the model, its adapters around it.

    Where autograd does not record (`records`), linear layers are given tensors of the rank's own instead of DTensors.
    """
    t, plan = degrees.tp, STYLES[degrees.style][model_type]
    records = records or degrees.style == "litgpt"  # whose all-reduce writes another tensor
    if degrees.style == "megatron":
        return megatron_parallel.divide(stack, plan.columns, plan.rows, degrees.sequence_parallel)
    if degrees.style == "torchtitan":
        return torchtitan.divide(stack, degrees.sequence_parallel)
    uses = Counter(w.name for op in operations(stack) for w in op.weights)

    def change(op: Op) -> Iterator[Op]:
        if plan.experts and degrees.ep == 1 and op.name.endswith("experts.sort"):
            yield lent(op.name.removesuffix(".sort"))
        if degrees.style == "litgpt" and _module(op)[0] not in (*plan.columns, *plan.rows):
            yield op
            return
        if not op.weights or not set(plan.whole).isdisjoint(op.name.split(".")):
            yield op
            return
        w, (name, half) = matrix(op), _module(op)
        if any(v.group == "embedding" and v.rows and not v.matrix for v in op.weights):
            yield _embedding(op, t, tied=uses[op.weights[0].name] > 1)
        elif w is None:
            yield op
        elif name in plan.columns:
            yield from (op,) if half == "lora_A" else _columns(op)
        elif name in plan.rows:
            yield from (op,) if half == "lora_B" else _rows(op) if records else _rows_in_place(op)
        elif half:
            yield op
        elif name in plan.gathered or op in stack.after:
            yield from _gathered(op, t, records)
        elif name in plan.split:
            yield from _split(op, t, records)
        else:
            yield op

    return rewrite(stack, change)


def _module(op: Op) -> tuple[str, str]:
    """The linear layer that the operation is of, and which half of an adapter around it, if that.

    Of a layer whose output stays divided the second half is divided as it is, of one whose input is the first half;
    the other half every rank has whole, and both around any other layer.
    Source: peft 0.21 tuners/lora/model.py _create_and_replace, add_lora_tp_hooks_dtensor.
    """
    path, _, last = op.name.rpartition(".")
    if last in ("lora_A", "lora_B", "base_layer"):
        return path.rpartition(".")[2], last.removeprefix("base_layer")
    return last, ""


def _with(op: Op, **names: str) -> Op:
    """The operation with other names for tensors it reads or writes."""

    def new(name: str) -> str:
        return names.get(name, name)

    return op._replace(
        reads=tuple(map(new, op.reads)),
        writes=tuple(t._replace(name=new(t.name)) for t in op.writes),
        keeps=tuple(k._replace(what=new(k.what), of=new(k.of)) for k in op.keeps),
    )


def _received(op: Op) -> tuple[Op, str]:
    """Every rank reads the same input, and makes a summand of its gradient, which are added up into another tensor."""
    (x,) = op.reads
    lead, _, into = ops.axes_of(op)
    here = f"{op.name}.input"
    return ops.view(here, x, here, f"{lead} {into}", "new")._replace(source=f"{_SOURCE} ColwiseParallel"), here


def _columns(op: Op) -> Iterator[Op]:
    """The output stays divided."""
    view, here = _received(op)
    yield view
    yield _with(op, **{op.reads[0]: here})


def _summed(name: str, x: str, y: str, shape: str, style: str) -> Op:
    """An all-reduce writes another tensor than it reads, and hands the gradient on."""
    return Op(name, (x,), (Tensor(y, shape),), gradient="same", source=f"{_SOURCE} {style}")


def _rows(op: Op) -> Iterator[Op]:
    """The ranks' summands are added up."""
    y = op.writes[0]
    summand = f"{op.name}.summand"
    yield _with(op, **{y.name: summand})
    yield _summed(f"{op.name}.all_reduce", summand, y.name, y.shape, "RowwiseParallel")


def _rows_in_place(op: Op, x: str = "") -> Iterator[Op]:
    """The ranks' summands are added up where they lie, and the bias then makes another tensor. The input, or what it
    is a part of (`x`), is there until then.

    Source: transformers 5.24 distributed/tensor_parallel.py RowwiseParallel.transform_output_post_forward.
    """
    matrices = tuple(w for w in op.weights if w.matrix or w.stored)
    biases = tuple(w for w in op.weights if w not in matrices)
    y, summand = op.writes[0], f"{op.name}.summand"
    yield _with(op, **{y.name: summand})._replace(weights=matrices)
    inputs = tuple(dict.fromkeys((*op.reads[:1], *filter(None, (x,)))))
    if not biases:
        yield ops.view(f"{op.name}.all_reduce", summand, y.name, y.shape)._replace(source=f"{_SOURCE} RowwiseParallel")
        return
    source = f"{_SOURCE} RowwiseParallel"
    yield Op(f"{op.name}.bias", (summand, *inputs), (y,), weights=biases, source=source)


def _part(axes: str, t: int) -> str:
    """A rank's part of the product of axes, of the rank that has most."""
    return f"{axes.replace(' ', '*')}/{t}"


def _gathered(op: Op, t: int, records: bool = True) -> Iterator[Op]:
    """The output is gathered, a rank's part after the other, and copied so that they lie side by side."""
    view, here = _received(op)
    lead, out, into = ops.axes_of(op)
    y, mine, every = op.writes[0], f"{op.name}.part", f"{op.name}.parts"
    part = _part(out, t)

    def divided(w: Weight) -> Weight:
        return w._replace(shape=f"{part} {into}", rows=1) if w.matrix else w._replace(shape=part)

    yield view
    yield _with(op, **{op.reads[0]: here})._replace(
        writes=(Tensor(mine, f"{lead} {part}"),), weights=tuple(map(divided, op.weights))
    )
    yield Op(
        f"{op.name}.gather",
        (mine,) if records else (mine, here),  # the layer's call has its input
        (y,),
        scratch=(Tensor(every, f"{t} {lead} {part}", f"={mine}"),),
        source=f"{_SOURCE} ColwiseParallel",
    )


def _split(op: Op, t: int, records: bool = True) -> Iterator[Op]:
    """Of an input that is whole the rank's part is copied; the summands are added up."""
    lead, out, into = ops.axes_of(op)
    x, y, mine, summand = op.reads[0], op.writes[0], f"{op.name}.input", f"{op.name}.summand"
    part = _part(into, t)
    yield ops.copy(f"{op.name}.split", x, mine, f"{lead} {part}", "new")
    weights = tuple(w._replace(shape=f"{out} {part}") if w.matrix else w for w in op.weights)
    if not records:
        yield from _rows_in_place(_with(op, **{x: mine})._replace(weights=weights), x)
        return
    yield _with(op, **{x: mine, y.name: summand})._replace(weights=weights)
    yield _summed(f"{op.name}.all_reduce", summand, y.name, y.shape, "RowwiseParallel")


def _embedding(op: Op, t: int, tied: bool) -> Op:
    """Each rank looks up the tokens whose rows it has, and the others' are added up.

    The gradient is made of the whole table, and so stays, unless it is added to the head's of a part: the rank's part
    is copied out, and the sum is another tensor.
    Source: torch 2.13 distributed/tensor/_ops/_embedding_ops.py, which divides no gradient by rows.
    """
    y, (w, *others) = op.writes[0], op.weights
    rows, axis = w.shape.split()
    part = f"{_part(rows, t)} {axis}"
    table = w._replace(shape=part, gradient="" if tied else w.shape)
    of_all = (Tensor("gradient of all rows", w.shape, f"={w.name}"), Tensor("sum of gradients", part, f"={w.name}"))
    back = tuple(Scratch(tensor, w.name) for tensor in of_all) if tied else ()
    return op._replace(
        weights=(table, *others),
        scratch=(*op.scratch, Tensor("the rank's summand", y.shape, y.dtype)),
        scratch_back=(*op.scratch_back, *back),
        source=f"{_SOURCE} EmbeddingParallel",
    )
