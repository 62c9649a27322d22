"""torch's flex attention as transformers calls it: a function that inductor compiles, and a mask of blocks.

Without a GPU, traces use a function that allocates what is described here. What is kept, and that the gradient of the
row sums is an input of backward, is read from the graphs that AOTAutograd makes of torch's function; what the compiled
code allocates inside (`largest scores`, `delta`) is assumed, from inductor's lowering.
"""

from __future__ import annotations

from memplan.catalogue.kernels import ops
from memplan.core.ir import Keep, Op, Scratch, Tensor

_TRANSFORMERS = "transformers 5.24 integrations/flex_attention.py flex_attention_forward"
_LOWERING = "torch 2.13 _inductor/kernel/flex/flex_attention.py, assumed: compiled without a GPU"


def block_mask(name: str, padded: bool) -> tuple[Op, ...]:
    """Return the mask: for every block of 128 queries, partial and full blocks of keys, and the other way round.

    `block_mask` counts the numbers of its eight tensors. No mask of single tokens is made: the blocks are counted in
    one compiled kernel, from a mask of the `padded` tokens, which the function that shows single tokens reads.
    """
    source, padding = "transformers 5.24 masking_utils.py", f"{name}.padding"
    tokens = (Op(padding, (), (Tensor(padding, "b s", "bool"),), source=source),) if padded else ()
    return (*tokens, Op(name, (), (Tensor(name, "block_mask", "int32"),), source=source))


def flex(
    name: str, q: str, k: str, v: str, y: str, grouped: bool, mask: str, width: str, padded: bool
) -> tuple[Op, ...]:
    """Return the compiled function, which keeps q, k, v, the output, the fp32 row sums, the mask and that of tokens.

    Autocast casts inside. Keys and values are read by head group, and their gradients are summed inside the kernel. The
    row sums are scaled into another tensor, whose copy in the model's dtype attention returns (`probs`), and whose
    gradient is zeros.
    """
    low = {q: f"{q}.lowered", k: "k.lowered", v: "v.lowered"}
    shapes = {q: "b s a d", k: f"b s {'k' if grouped else 'a'} d", v: f"b s {'k' if grouped else 'a'} {width}"}
    sums, scaled = f"{y}.lse", f"{y}.lse.scaled"
    masks = (mask, *((f"{mask}.padding",) if padded else ()))
    kept = (*low.values(), y, sums, *masks)
    return (
        *(ops.lowered(f"{name}.{t}", t, to, shapes[t]) for t, to in low.items()),
        Op(
            name,
            (*low.values(), *masks),
            (Tensor(y, f"b s a {width}", f"={low[q]}"), Tensor(sums, "b a s", "fp32"), Tensor(scaled, "b a s", "fp32")),
            (),
            tuple(Keep(what, of) for of in low.values() for what in kept),
            scratch=(Tensor("largest scores", "b a s", "fp32"),),
            scratch_back=(
                Scratch(Tensor("gradient of row sums", "b a s", "fp32")),
                Scratch(Tensor("delta", "b a s", "fp32")),
            ),
            product="attention",
            source=_LOWERING,
        ),
        ops.cast(f"{name}.lse", scaled, "probs", "b a s", f"={v}")._replace(source=_TRANSFORMERS),
        ops.release_names(sums, scaled),
    )
