"""What vision-language models share: a tower, and a language model that reads what it makes of images in place of their
tokens.

Without images the tower's weights are there, and nothing of it runs. What towers are made of is in
`memplan.catalogue.vision.towers`; each family has a module of its own.
"""

from __future__ import annotations

from memplan.catalogue.decoder.windows import renamed
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.vision.towers import Tower
from memplan.core.ir import Block, Keep, Op, Run, Scratch, Stack, Tensor

_INDEX = "torch 2.13 aten/src/ATen/native/cuda/IndexKernel.cpp masked_scatter__cuda, masked_select_out_cuda_impl"


def skipped(operations: tuple[Op, ...]) -> tuple[Op, ...]:
    """The operations that have weights, which a run leaves out."""
    return tuple(op._replace(skipped=True, unit="", asks=False) for op in operations if op.weights)


def joined(
    wiring: Wiring, text: Stack, tower: Tower, scatter: tuple[Op, ...] = (), held: tuple[str, ...] = ()
) -> Stack:
    """The tower, and then the text's stack on what `scatter` makes (`stream`) of its embeddings `text` and `features`.

    `held`: what the model's frame refers to until its language model has returned.
    """
    if not wiring.images:
        between = tuple(op for run in tower.runs for op in run.before)
        still = tuple(
            Run(
                tuple(Block(b.name, (ops.view("skip", "x", "y", "b s h"), *skipped(b.ops))) for b in run.blocks),
                run.times,
            )
            for run in tower.runs
        )
        before = (*skipped((*tower.before, *between, *tower.after)), *text.before)
        return text._replace(before=before, runs=(*still, *text.runs))
    at = next(i for i, op in enumerate(text.before) if any(w.name == "embeds" for w in op.writes))
    inputs, *embedding = text.before[: at + 1]
    rest = renamed(text.before[at + 1 :], {"embeds": "stream"})
    first, *others = (r._replace(before=renamed(r.before, {"embeds": "stream"})) for r in text.runs)
    return text._replace(
        before=(
            inputs._replace(writes=(*inputs.writes, *tower.inputs)),
            *renamed(tuple(embedding), {"embeds": "text"}),
            *tower.before,
        ),
        runs=(*tower.runs, first._replace(before=(*tower.after, *scatter, *rest)), *others),
        after=outlived(renamed(text.after, {"embeds": "stream"}), held),
    )


def outlived(after: tuple[Op, ...], held: tuple[str, ...]) -> tuple[Op, ...]:
    """What follows the last block, where the frame of the decoder that returns lets go of `held`, too."""
    done = next(i for i, op in enumerate(after) if op.name == "return" and "x" in op.reads)
    return (*after[:done], after[done]._replace(reads=(*after[done].reads, *held)), *after[done + 1 :])


def scattered(features: str = "features", joined: bool = True) -> tuple[Op, ...]:
    """Features in place of the embeddings of the tokens that stand for them.

    `joined`: they are split into images, and joined again. On the way back the mask is spread over the hidden axis, and
    every place that it marks has an index of three numbers.
    """
    shape, whole = "b merged h", "b s h"
    parts = (
        (
            ops.view("images.split", features, "images.parts", shape, gradient="new"),
            ops.copy("images.cat", "images.parts", "images.all", shape),
        )
        if joined
        else (ops.view("images.view", features, "images.all", shape),)
    )
    spread = Tensor("mask spread", whole, "bool")
    return (
        *parts,
        ops.cast("images.to", "images.all", "image_embeds", shape, "=text"),
        Op("image_mask", (), (Tensor("image_mask", "b s", "bool"),), scratch=(Tensor("video mask", "b s", "bool"),)),
        Op(
            "masked_scatter",
            ("text", "image_embeds", "image_mask"),
            (Tensor("stream", whole, "=text"),),
            (),
            (Keep("image_mask", "text"), Keep("image_mask", "image_embeds")),
            scratch=(spread, Tensor("prefix sums", whole, "int64")),
            scratch_back=(
                Scratch(spread, "image_embeds"),
                Scratch(Tensor("indices", f"3 {shape}", "int64"), "image_embeds"),
            ),
            source=_INDEX,
        ),
    )
