"""Vision-language models: a tower, and a language model in which its features replace image tokens.

Without images only the tower's weights exist and nothing of it runs. Parts of towers are in
`memplan.catalogue.vision.towers`; each family has its own module.
"""

from __future__ import annotations

from collections.abc import Callable

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import renamed, skipped
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.vision.towers import Tower
from memplan.core.ir import Block, Keep, Op, Run, Scratch, Stack, Tensor

_INDEX = "torch 2.13 aten/src/ATen/native/cuda/IndexKernel.cpp masked_scatter__cuda, masked_select_out_cuda_impl"


def text_with_tower(
    wiring: Wiring,
    text: Stack,
    tower: Tower,
    scatter: tuple[Op, ...] = (),
    held: tuple[str, ...] = (),
    last: str = "embeds",
) -> Stack:
    """Return the tower followed by the text's stack.

    scatter  operations that merge the embeddings `text` and the tower's `features` into `stream`
    held     tensors that the model's frame references until its language model has returned
    last     what the text's operations before the tower write last
    """
    if not wiring.images:
        between = tuple(op for run in tower.runs for op in run.before)
        skipped_runs = tuple(
            Run(
                tuple(Block(b.name, (ops.view("skip", "x", "y", "b s h"), *skipped(b.ops))) for b in run.blocks),
                run.times,
            )
            for run in tower.runs
        )
        before = (*skipped((*tower.before, *between, *tower.after)), *text.before)
        return text._replace(before=before, runs=(*skipped_runs, *text.runs))
    at = next(i for i, op in enumerate(text.before) if any(w.name == last for w in op.writes))
    while text.before[at + 1].name == "return":
        at += 1
    inputs, *embedding = text.before[: at + 1]
    inputs = inputs._replace(writes=(*inputs.writes, *tower.inputs))
    own = renamed(tuple(embedding), {"embeds": "text"})
    if not tower.runs:
        joined = (*tower.before, *tower.after, *renamed(scatter, {"stream": "embeds"}))
        before = (inputs, *own, *joined, *text.before[at + 1 :])
        return text._replace(before=before, after=outlived(text.after, held))
    rest = renamed(text.before[at + 1 :], {"embeds": "stream"})
    first, *others = (r._replace(before=renamed(r.before, {"embeds": "stream"})) for r in text.runs)
    return text._replace(
        before=(inputs, *own, *tower.before),
        runs=(*tower.runs, first._replace(before=(*tower.after, *scatter, *rest)), *others),
        after=outlived(renamed(text.after, {"embeds": "stream"}), held),
    )


def masked_text(masked: bool, wiring: Wiring, build: Callable[[Wiring], Stack]) -> Stack:
    """Return the text's stack. Tokens of an image attend to each other: if `masked`, all layers have a mask."""
    text = build(wiring._replace(padded=wiring.padded or masked))
    if wiring.padded or not masked:
        return text
    first = text.before[0]
    without_mask = first._replace(writes=tuple(w for w in first.writes if w.name != "attention_mask"))
    return text._replace(before=(without_mask, *text.before[1:]))


def outlived(after: tuple[Op, ...], held: tuple[str, ...]) -> tuple[Op, ...]:
    """Return the operations after the last block, with `held` released when the decoder's frame returns."""
    index = next(i for i, op in enumerate(after) if op.name == "return" and not {"x", "stream"}.isdisjoint(op.reads))
    return (*after[:index], after[index]._replace(reads=(*after[index].reads, *held)), *after[index + 1 :])


def scattered(joined: bool = True, checks: bool = False) -> tuple[Op, ...]:
    """Replace the embeddings of image tokens by the tower's features.

    `joined`: features are split into images and concatenated again. Backward expands the mask to the hidden axis, and
    each marked element takes an index of three numbers. `checks`: elements that the mask, which is there already, marks
    are selected to be counted.
    """
    shape, whole = "b merged h", "b s h"
    indices = Tensor("indices", f"3 {shape}", "int64")
    parts = (
        (
            ops.view("images.split", "features", "images.parts", shape, gradient="new"),
            ops.copy("images.cat", "images.parts", "images.all", shape),
        )
        if joined
        else (ops.view("images.view", "features", "images.all", shape),)
    )
    spread = Tensor("mask spread", whole, "bool")
    return (
        *parts,
        ops.cast("images.to", "images.all", "image_embeds", shape, "=text"),
        *(
            (
                Op("image_check", ("image_mask",), (Tensor("image_tokens", "", "int64"),), gradient="none"),
                Op("image_check.places", ("text",), scratch=(spread, indices)),
                Op("image_check.rows", ("text",), scratch=(indices, Tensor("marked", shape, "=text"))),
            )
            if checks
            else (
                Op(
                    "image_mask",
                    (),
                    (Tensor("image_mask", "b s", "bool"),),
                    scratch=(Tensor("video mask", "b s", "bool"),),
                ),
            )
        ),
        Op(
            "masked_scatter",
            ("text", "image_embeds", "image_mask"),
            (Tensor("stream", whole, "=text"),),
            (),
            (Keep("image_mask", "text"), Keep("image_mask", "image_embeds")),
            scratch=(spread, Tensor("prefix sums", whole, "int64")),
            scratch_back=(
                Scratch(spread, "image_embeds"),
                Scratch(indices, "image_embeds"),
            ),
            source=_INDEX,
        ),
    )
