"""Qwen3-VL, dense and with experts, and Qwen3.5 with images: a tower like Qwen2-VL's with learned positions.

Some blocks of Qwen3-VL's tower also pass their output to the language model (`deepstack`).
"""

from __future__ import annotations

from memplan.catalogue.decoder.decoder import decoder
from memplan.catalogue.experts import experts, routers
from memplan.catalogue.families import qwen3_next as delta
from memplan.catalogue.families.dense import QWEN_3
from memplan.catalogue.families.qwen2_vl import (
    MROPE_POSITIONS,
    merger,
    qwen_after,
    qwen_attention,
    qwen_before,
    qwen_inputs,
    with_mrope,
    without_positions,
)
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.vision import towers as t
from memplan.catalogue.vision.towers import Tower
from memplan.catalogue.vision.vision import scattered, text_with_tower
from memplan.core.ir import Keep, Op, Run, Scratch, Stack, Tensor, Weight
from memplan.core.records import NamedTuple
from memplan.models.configs.towers import deepstack, run_lengths, size
from memplan.models.model import ModelSpec

_DEEPSTACK = "transformers 5.24 models/qwen3_vl/modeling_qwen3_vl.py Qwen3VLTextModel._deepstack_process"


class Mergers(NamedTuple):
    """Names of what merges patches: the list of deepstack's, and the norm and linear layers of each."""

    deepstack: str = "deepstack_merger_list"
    norm: str = "norm"
    layers: tuple[str, str] = ("linear_fc1", "linear_fc2")


_MERGERS = Mergers()


def qwen3_tower(m: ModelSpec, wiring: Wiring, mergers: Mergers = _MERGERS) -> Tower:
    """The tower: positions interpolated between four of a learned grid, and a merger for each deepstack block."""
    act = str(m.part("vision_config").get("hidden_act", "gelu_pytorch_tanh"))
    layers = ("linear_fc1", "linear_fc2")
    block = t.block("visual.blocks", qwen_attention(wiring), t.mlp("mlp", "v.n2", "v.mo", act, layers))
    shape, four = f"{t.P} vh", f"{t.P} 4 vh"
    embedding = Weight("visual.pos_embed.weight", "vpositions vh", "vision", rows=1)
    first, pixels, patches, *table = qwen_before(asks=False, bias=True)
    before = (
        first,
        Op(
            "visual.interpolation",
            (),
            (Tensor("v.corners", f"{t.P} 4", "int64"), Tensor("v.weights", f"{t.P} 4", "fp32")),
        ),
        pixels,
        patches._replace(writes=(patches.writes[0]._replace(name="v.patches"),)),
        ops.lookup("visual.pos_embed", "v.corners", "v.four", four, embedding),
        Op(  # the gradient of the sum is expanded, without a copy
            "visual.pos_embed.sum",
            ("v.four", "v.weights"),
            (Tensor("v.position", shape, "fp32"),),
            (),
            (Keep("v.weights", "v.four"),),
            scratch=(Tensor("weighed", four, "fp32"),),
            scratch_back=(Scratch(Tensor("weighed", four, "fp32")),),
            source=f"{ops.DERIVATIVES}: mul.Tensor, sum.dim_IntList",
        ),
        ops.cast("visual.pos_embed.to", "v.position", "v.place", shape, "=v.patches"),
        ops.add("visual.place", "v.patches", "v.place", "embeds", shape),
        *table,
    )
    deep = deepstack(m)
    count = len(tuple(run_lengths(size(m, "depth"), deep)))
    runs = [Run((block,), "vL1")]
    for i in range(1, count):
        merged = _deepstack_merger(m, i - 1, mergers)
        runs.append(Run((block,), f"vL{i + 1}", (*merged, ops.cast("stream", "x", "stream", shape, "=x"))))
    normed = t.norm(f"visual.merger.{mergers.norm}", "x", "features.normed", shape, "vh", "projector")
    last = max(deep, default=-1) == size(m, "depth") - 1
    tail = _deepstack_merger(m, len(deep) - 1, mergers) if last else ()
    merged = merger("visual.merger", "x", "features", mergers.layers, normed)
    more = tuple(f"deep{i}" for i in range(len(deep)))
    after = (*qwen_after((*tail, *merged), *more), ops.release_names("v.corners", "v.weights", "v.position"))
    return Tower(qwen_inputs(), before, tuple(runs), after)


def _deepstack_merger(m: ModelSpec, i: int, mergers: Mergers) -> tuple[Op, ...]:
    """Merge the output of the `i`th deepstack block. The norm is over merged patches here.

    Without a layer to add it to, the output gets no gradient.
    """
    name = f"visual.{mergers.deepstack}.{i}"
    normed = (
        ops.view(f"{name}.shuffle", "x", f"deep{i}.shuffled", "b merged vm"),
        *t.norm(f"{name}.{mergers.norm}", f"deep{i}.shuffled", f"deep{i}.normed", "b merged vm", "vm", "projector"),
    )
    merged = merger(name, "x", f"deep{i}", mergers.layers, normed)
    return merged if i < m.num_hidden_layers else tuple(op._replace(gradient="none") for op in merged)


def with_deepstack(m: ModelSpec, stack: Stack) -> Stack:
    """Add a deepstack block's merged output to the image tokens after each of the first decoder layers.

    Hidden states are copied, and rows of the copy are replaced. Blocks beyond the last layer are not added.
    """
    (run,), deep = stack.runs, range(min(len(deepstack(m)), m.num_hidden_layers))
    if not deep:
        return stack
    joints = tuple(
        (
            Op(
                f"deepstack.{i}.rows",
                ("x", "image_mask"),
                (Tensor(f"deep{i}.rows", "b merged h"),),
                scratch=(Tensor("indices", "2 b merged", "int64"),),
                scratch_back=(Scratch(Tensor("indices", "2 b merged", "int64"), "x"),),
                source=_DEEPSTACK,
            ),
            ops.add(f"deepstack.{i}.add", f"deep{i}.rows", f"deep{i}.all", f"deep{i}.local", "b merged h"),
            Op(
                f"deepstack.{i}.put",
                ("x", f"deep{i}.local", "image_mask"),
                (Tensor(f"deep{i}.stream", "b s h"),),
                (),
                (Keep("image_mask", "x"), Keep("image_mask", f"deep{i}.local")),
                scratch=(Tensor("rows", "b merged h"),),
                scratch_back=(Scratch(Tensor("zeros", "b merged h", f"=deep{i}.local"), "x"),),
                source=_DEEPSTACK,
            ),
            ops.cast(f"deepstack.{i}", f"deep{i}.stream", "stream", "b s h", f"=deep{i}.stream"),
        )
        for i in deep
    )
    runs = (Run(run.blocks, "one"), *(Run(run.blocks, "one", joint) for joint in joints[:-1]))
    if len(deep) < m.num_hidden_layers:
        return stack._replace(runs=(*runs, Run(run.blocks, "after", joints[-1])))
    *joint, to_stream = joints[-1]
    (last,) = to_stream.reads
    rest = (ops.renamed(op, lambda name: last if name == "x" else name) for op in stack.after)
    return stack._replace(runs=runs, after=(*joint, *rest))


def deepstack_features(m: ModelSpec) -> tuple[Op, ...]:
    """The deepstack features, each split by image and concatenated again."""
    shape = "b merged h"
    return tuple(
        op
        for i in range(len(deepstack(m)))
        for op in (
            ops.view(f"deepstack.{i}.split", f"deep{i}", f"deep{i}.parts", shape, gradient="new"),
            ops.copy(f"deepstack.{i}.cat", f"deep{i}.parts", f"deep{i}.all", shape),
        )
    )


def _qwen3_vl(m: ModelSpec, wiring: Wiring, text: Stack) -> Stack:
    decoder = with_mrope(text, wiring, interleaved=True)
    held = ("image_embeds", "image_mask", *(f"deep{i}.all" for i in range(len(deepstack(m)))))
    decoder = with_deepstack(m, decoder) if wiring.images else decoder
    return text_with_tower(wiring, decoder, qwen3_tower(m, wiring), (*scattered(), *deepstack_features(m)), held)


def qwen3_vl(m: ModelSpec, wiring: Wiring) -> Stack:
    return _qwen3_vl(m, wiring, decoder(m, wiring, QWEN_3))


def qwen3_vl_moe(m: ModelSpec, wiring: Wiring) -> Stack:
    return _qwen3_vl(m, wiring, decoder(m, wiring, QWEN_3._replace(mlp_bias=False, experts=_mixture)))


def _mixture(m: ModelSpec) -> tuple[Op, ...]:
    """Qwen3's experts. peft adapts neither them nor their router."""
    routed = routers.softmax_router("mlp.gate", "n2", normalise=True, stands_for=())
    return experts.mixture("n2", routed, experts.experts("n2", "mo", gate_up=(), down=()))


def qwen3_5(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Qwen3.5 with a tower like Qwen3-VL's, but without deepstack."""
    text = delta.qwen3_5(m, wiring)
    if wiring.images:
        before = tuple(MROPE_POSITIONS if op.name == "positions" else op for op in text.before)
        text = text._replace(before=before, runs=without_positions(text.runs))
    return text_with_tower(wiring, text, qwen3_tower(m, wiring), scattered(), ("image_embeds", "image_mask"))


BUILDERS = {"qwen3_5": qwen3_5, "qwen3_5_moe": qwen3_5, "qwen3_vl": qwen3_vl, "qwen3_vl_moe": qwen3_vl_moe}
