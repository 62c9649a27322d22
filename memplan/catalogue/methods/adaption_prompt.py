"""peft's adaption prompts (LLaMA-Adapter): the last layers' queries attend to learned tokens too, through a gate.

Source: peft 0.21.2 tuners/adaption_prompt/layer.py AdaptedAttention.forward, utils.py llama_compute_query_states.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import once_each
from memplan.core.ir import Keep, Op, Scratch, Stack, Tensor, Weight

_SOURCE = "peft 0.21.2 tuners/adaption_prompt/layer.py AdaptedAttention.forward"
_N = "self_attn"


def with_adaption_prompts(stack: Stack, tokens: int, dtype: str) -> Stack:
    """Return the stack whose layers in runs of trained ones (see `memplan.catalogue.methods.freezing`) have prompts.

    tokens   learned tokens of each layer
    dtype    their dtype
    """

    @once_each
    def changed(operations: tuple[Op, ...]) -> tuple[Op, ...]:
        return tuple(_adapted(operations, str(tokens), dtype))

    runs = tuple(
        run._replace(blocks=tuple(b._replace(ops=changed(b.ops)) for b in run.blocks))
        if run.times.endswith(".trained")
        else run
        for run in stack.runs
    )
    return stack._replace(runs=runs)


def _adapted(operations: tuple[Op, ...], tokens: str, dtype: str) -> Iterator[Op]:
    """Yield a layer's operations, with those of its prompt after the attention has returned."""
    layers = {op.name.rpartition(".")[2]: op for op in operations if op.name.startswith(f"{_N}.")}
    x, output = layers["q_proj"].reads[0], layers["o_proj"].writes[0].name
    returned = False
    for op in operations:
        if op is layers["o_proj"]:
            yield ops.renamed(op, lambda name: f"{output}.base" if name == output else name)
            returned = True
            continue
        yield op
        if returned:  # the attention's own locals are gone
            returned = False
            yield from _prompt(layers, x, output, tokens, dtype)


def _again(layer: Op, x: str, y: str, name: str) -> Op:
    """Return a layer's product with another input, whose weights are counted already."""
    old, out = layer.reads[0], layer.writes[0].name
    return ops.renamed(layer, lambda n: {old: x, out: y}.get(n, n))._replace(name=name)


def _prompt(layers: dict[str, Op], x: str, output: str, tokens: str, dtype: str) -> Iterator[Op]:
    """The operations after the layer's attention: keys and values of the prompt, queries again, their product."""
    n, heads, scores = f"{_N}.adaption", "b s a d", f"b a s {tokens}"
    prompt = Weight(f"{_N}.adaption_prompt", f"1 {tokens} h", "adapter", dtype, rows=2)
    gate = Weight(f"{_N}.adaption_gate", "1", "adapter", dtype)
    for t in "kv":
        layer = layers[f"{t}_proj"]
        yield Op(
            f"{n}.{t}_proj",
            (),
            (Tensor(f"ap.{t}", f"1 {tokens} k d"),),
            (prompt, *layer.weights),
            (Keep(layer.weights[0].name, prompt.name),),
            autocast="lower",
            source=_SOURCE,
        )
    for t in "kv":
        yield ops.copy(f"{n}.{t}_repeat", f"ap.{t}", f"ap.{t}.rows", f"b {tokens} k d", gradient="new")
    for t in "kv":
        yield ops.copy(f"{n}.{t}_heads", f"ap.{t}.rows", f"ap.{t}.heads", f"b {tokens} a d", gradient="new")
        yield ops.release_names(f"ap.{t}.rows")
    yield _again(layers["q_proj"], x, "ap.q0", f"{n}.q_proj")
    yield ops.view(f"{n}.q_heads", "ap.q0", "ap.q1", heads, "new")
    yield _again(layers["v_proj"], x, "ap.v0", f"{n}.v_proj")._replace(gradient="none")
    yield from ops.rotate(f"{n}.q", "ap.q1", "ap.q", heads, "b s a rot2")
    yield ops.release_names("ap.q0", "ap.q1", "ap.v0")
    yield ops.copy(f"{n}.q_flat", "ap.q", "ap.q.flat", heads)
    yield ops.matmul(f"{n}.scores", "ap.q.flat", "ap.k.heads", "ap.scores", scores)
    yield ops.scale(f"{n}.scaling", "ap.scores", "ap.scaled", scores)
    yield from ops.softmax(f"{n}.softmax", "ap.scaled", "ap.softmax", scores, "fp32")
    yield ops.cast(f"{n}.cast", "ap.softmax", "ap.probs", scores, "=ap.q")
    yield Op(
        f"{n}.gate",
        ("ap.probs",),
        (Tensor("ap.gated", scores),),
        (gate,),
        (Keep(gate.name, "ap.probs"), Keep("ap.probs", gate.name)),
        (),
        (Scratch(Tensor("product", scores, "=ap.gated"), gate.name, summed=True),),
        source=f"{ops.DERIVATIVES}: mul.Tensor",
    )
    yield ops.release_names("ap.scaled")
    yield ops.matmul(f"{n}.product", "ap.gated", "ap.v.heads", "ap.o", heads)
    yield ops.copy(f"{n}.reshape", "ap.o", "ap.out", heads)
    yield _again(layers["o_proj"], "ap.out", "ap.y", f"{n}.o_proj")
    yield ops.release_names("ap.out")
    added = (f"{output}.base", "ap.y")
    yield Op(f"{n}.sum", added, (Tensor(output, "b s h"),), gradient="same", source=f"{ops.DERIVATIVES}: add.Tensor")
    yield ops.release_names(x, *added, "ap.q", "ap.gated", *(f"ap.{t}{of}" for t in "kv" for of in ("", ".heads")))
