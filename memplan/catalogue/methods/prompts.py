"""peft's methods that train virtual tokens before each sequence: prompt tuning, p-tuning, prefix tuning and cartridges.

Source: peft 0.21.2 peft_model.py PeftModelForCausalLM.forward and get_prompt, tuners/prompt_tuning/model.py,
tuners/p_tuning/model.py, tuners/prefix_tuning/model.py, tuners/cartridge/model.py,
tuners/multitask_prompt_tuning/model.py, tuners/cpt/model.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from memplan.catalogue.inference.decoding import with_cache, with_keys
from memplan.catalogue.inference.one_pass import Pass
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import once_each, rewrite_blocks
from memplan.catalogue.methods.adaption_prompt import with_adaption_prompts
from memplan.catalogue.methods.trained_tokens import with_trained_tokens
from memplan.core.ir import Keep, Op, Stack, Tensor, Weight
from memplan.models.peft_methods import trains_prefix, virtual_tokens

_SOURCE = "peft 0.21.2 peft_model.py PeftModelForCausalLM.forward"
TEXT = "text"  # axis of the tokens without the virtual ones, which the axis `s` includes


def with_trained_inputs(
    stack: Stack, kind: str, tokens: int, dtypes: tuple[str, str], options: Mapping[str, Any]
) -> Stack:
    """Return the stack with trained rows of the embeddings, or with the virtual tokens of a method of this `kind`.

    dtypes  of adapters, and of the model
    """
    stack = with_trained_tokens(stack, tokens, dtypes[0]) if tokens else stack
    if kind == "adaption_prompt":
        return with_adaption_prompts(stack, int(options["adapter_len"]), dtypes[1])
    if trains_prefix(kind):
        return with_prefix(stack, options)
    return with_prompt(stack, options) if virtual_tokens(options) else stack


def with_prefix(stack: Stack, options: Mapping[str, Any]) -> Stack:
    """Return the stack whose layers attend to trained keys and values too, which a cache joins with the tokens' own."""
    now = Pass("forward", "dynamic", follows_passes=True)

    @once_each
    def changed(operations: tuple[Op, ...]) -> tuple[Op, ...]:
        return tuple(
            op._replace(holds="forward", gradient="part" if op.past else op.gradient) if op.holds == "cache" else op
            for op in with_cache(operations, now)
            if not op.name.endswith(".window")  # its length is a number in training
        )

    stack = rewrite_blocks(stack, lambda block: block._replace(ops=changed(block.ops)))
    at = next(i for i, op in enumerate(stack.before, 1) if any(t.name == "embeds" for t in op.writes))
    before = tuple(with_keys(stack.before, now))
    return stack._replace(before=(*before[:at], *_prefix(options), *before[at:]))


def _prefix(options: Mapping[str, Any]) -> Iterator[Op]:
    """The keys and values of all layers' virtual tokens, projected from embeddings if asked for."""
    n, number = "prompt_encoder", str(options["num_virtual_tokens"])
    every, lead = "L 2 k d", f"b {number}"
    yield Op(f"{n}.tokens", (), (Tensor("prefix.ids", lead, "int64"),), gradient="none", source=_SOURCE)
    if "num_frozen_tokens" in options:
        yield from _cartridge(int(options["num_virtual_tokens"]), int(options["num_frozen_tokens"]), every)
    else:
        yield from _encoded(options, number, every, lead)
    yield ops.cast(f"{n}.cast", "prefix.wide", "prefix", f"{lead} {every}", "=embeds")
    joined = Tensor("prefixes", f"{lead} {every}", "=prefix")
    yield Op(f"{n}.split", ("prefix",), (joined,), holds="past", source=_SOURCE)
    yield Op(f"{n}.dealt", releases="past")


def _cartridge(number: int, frozen: int, every: str) -> Iterator[Op]:
    """The rows of a cartridge, of which the first are `frozen`: the gradient of the others is a part of that of all."""
    n, rows = "prompt_encoder", f"{number} {every}"
    train = Weight(f"{n}.trainable_embedding", f"{number - frozen} {every}", "adapter", "fp32", rows=1, gradient=rows)
    first = Weight(f"{n}.frozen_embedding", f"{frozen} {every}", "adapter", "fp32", trains=False, rows=1)
    yield Op(f"{n}.cat", (), (Tensor("prefix.rows", rows, "fp32"),), (*((first,) if frozen else ()), train))
    yield ops.view(f"{n}.expand", "prefix.rows", "prefix.wide", f"b {rows}", "new")


def _encoded(options: Mapping[str, Any], number: str, every: str, lead: str) -> Iterator[Op]:
    """The rows of a prefix, looked up or projected from embeddings."""
    n, projected = "prompt_encoder", bool(options["prefix_projection"])
    rows = Weight(f"{n}.embedding.weight", f"{number} {'k d' if projected else every}", "adapter", "fp32", rows=1)
    prefix = "prefix.embedded" if projected else "prefix.wide"
    yield ops.lookup(f"{n}.embedding", "prefix.ids", prefix, f"{lead} {'k d' if projected else every}", rows)
    if projected:
        width = str(options["encoder_hidden_size"] or "k d")
        for i, (out, into) in enumerate(((width, "k d"), (every, width))):
            y = ("prefix.0", "prefix.wide")[i]
            layer = ops.linear(f"{n}.transform.{2 * i}", prefix, y, out, into, "adapter", True, lead)
            yield layer._replace(weights=tuple(w._replace(dtype="fp32", matrix=False) for w in layer.weights))
            if i == 0:
                prefix = "prefix.tanh"
                yield ops.keeping_output(f"{n}.transform.1", y, prefix, f"{lead} {width}", "tanh")


def with_prompt(stack: Stack, options: Mapping[str, Any]) -> Stack:
    """Return the stack with trained virtual tokens before the embedded ones, and labels that leave them out."""
    number = str(virtual_tokens(options))
    table = next(op for op in stack.before if op.reads == ("ids",) and any(w.group == "embedding" for w in op.weights))
    module = [op for op in stack.before if op is table or op.name.startswith(f"{table.name}.")]
    embeds = next(t.name for op in reversed(module) for t in op.writes)
    text = f"{embeds}.{TEXT}"
    before: list[Op] = []
    for op in stack.before:
        if op in module or any(t.name == "ids" for t in op.writes):
            names = {embeds: text, "labels": f"labels.{TEXT}"}
            before += ops.with_axes((ops.renamed(op, lambda name, names=names: names.get(name, name)),), {"s": TEXT})
        else:
            before.append(op)
        if op is module[-1]:
            before += _prompt(options, number, text, embeds)
    return stack._replace(before=tuple(before))


def _of_tasks(options: Mapping[str, Any], number: str, prompt: str) -> Iterator[Op]:
    """The virtual tokens, multiplied in place by the product of two small matrices of each sequence's task."""
    n, rank, tasks, rows = "prompt_encoder", str(options["num_ranks"]), str(options["num_tasks"]), f"b {number} h"
    yield Op(f"{n}.tasks", (), (Tensor("prompt.tasks", "b", "int64"),), gradient="none", holds="forward")
    for y, shape in (("cols", f"{number} {rank}"), ("rows", f"{rank} h")):
        w = Weight(f"{n}.prefix_task_{y}", f"{tasks} {shape}", "adapter", "fp32", rows=1)
        yield ops.lookup(f"{n}.{y}", "prompt.tasks", f"prompt.{y}", f"b {shape}", w, "index_select")
    yield ops.matmul(f"{n}.product", "prompt.cols", "prompt.rows", "prompt.product", rows)
    yield ops.copy(f"{n}.clone", prompt, "prompt.clone", rows, "none")  # autograd keeps what is overwritten
    weighed = ops.mul(f"{n}.mul_", prompt, "prompt.product", "prompt.repeated", rows)
    keeps = (Keep("prompt.product", prompt), Keep("prompt.clone", "prompt.product"))
    yield weighed._replace(reads=(*weighed.reads, "prompt.clone"), view=True, keeps=keeps)


def _labels_and_types(name: str, text: str, number: str) -> Op:
    """Return the labels of prompt and text and the type of each token, which tells what the loss reads."""
    whole, prefix = "b s", f"b {number}"
    return Op(
        name,
        (f"labels.{text}",),
        (
            Tensor("types.text", f"b {text}", "fp32"),
            Tensor("labels.prefix", prefix, "int64"),
            Tensor("labels", whole, "int64"),
            Tensor("types.prefix", prefix, "int64"),
            Tensor("types", whole, "fp32"),
            Tensor("labelled", whole, "bool"),
        ),
        gradient="none",
        holds="forward",
        source="peft 0.21.2 peft_model.py PeftModelForCausalLM._cpt_forward",
    )


def _in_context(name: str, ids: str, y: str, number: str) -> Iterator[Op]:
    """The frozen embeddings of the tokens, and what trains: a difference, whose storage each pass replaces."""
    one = f"1 {number} h"
    frozen = Weight(f"{name}.embedding.weight", f"{number} h", "adapter", "fp32", trains=False, rows=1)
    trained = frozen._replace(name=f"{name}.delta_embedding.weight", trains=True)
    yield ops.lookup(f"{name}.embedding", ids, f"{y}.frozen", one, frozen)
    yield ops.lookup(f"{name}.delta_embedding", ids, f"{y}.delta", one, trained)
    yield ops.add(f"{name}.add", f"{y}.frozen", f"{y}.delta", y, one)
    yield ops.release_names(f"{y}.frozen", f"{y}.delta")


def _prompt(options: Mapping[str, Any], number: str, text: str, embeds: str) -> Iterator[Op]:
    """The virtual tokens, put before the embeddings `text` of the others, and their labels."""
    n, one, rows = "prompt_encoder", f"1 {number} h", f"b {number} h"
    in_context = "cpt_token_ids" in options
    labels = Op(
        f"{n}.labels",
        (f"labels.{TEXT}",),
        (Tensor("labels.prefix", f"b {number}", "int64"), Tensor("labels", "b s", "int64")),
        gradient="none",
        holds="forward",
        source=_SOURCE,
    )
    yield _labels_and_types(labels.name, TEXT, number) if in_context else labels
    yield Op(f"{n}.tokens", (), (Tensor("prompt.ids", f"b {number}", "int64"),), gradient="none", source=_SOURCE)
    table = Weight(f"{n}.embedding.weight", f"{number} h", "adapter", "fp32", rows=1)
    prompt = "prompt.embedded"
    if in_context:
        yield from _in_context(n, "prompt.ids", prompt, number)
    else:
        yield ops.lookup(f"{n}.embedding", "prompt.ids", prompt, rows if "num_tasks" in options else one, table)
    if "num_tasks" in options:
        yield from _of_tasks(options, number, prompt)
    if "encoder_hidden_size" in options:
        width = str(options["encoder_hidden_size"] or "h")
        for i, (out, into) in enumerate(((width, "h"), (width, width), ("h", width))):
            name, lead = f"{n}.mlp_head.{2 * i}", f"1 {number}"
            layer = ops.linear(name, prompt, f"prompt.{i}", out, into, "adapter", True, lead)
            yield layer._replace(weights=tuple(w._replace(dtype="fp32", matrix=False) for w in layer.weights))
            prompt = f"prompt.{i}"
            if i < 2:
                name, prompt = f"{n}.mlp_head.{2 * i + 1}", f"{prompt}.relu"
                yield ops.keeping_output(name, f"prompt.{i}", prompt, f"{lead} {out}", "relu")
    if "num_tasks" not in options:
        yield ops.copy(f"{n}.repeat", prompt, "prompt.repeated", rows, "new")
    yield ops.cast(f"{n}.cast", "prompt.repeated", "prompt", rows, f"={text}")
    yield ops.view(f"{n}.held", "prompt", "prompts", rows)._replace(holds="forward")
    cat = ops.cat(f"{n}.cat", ("prompts", text), embeds, "b s h", f"={text}")
    yield cat._replace(holds="forward", source=_SOURCE)
