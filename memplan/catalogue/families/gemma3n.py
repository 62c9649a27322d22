"""Gemma 3n's text decoder: AltUp streams, Laurel branches, sparse FFNs, per-layer embeddings and reused keys.

A layer computes one of four residual streams, and predicts and corrects the others. Laurel is a low-rank branch next to
attention. Sparse FFNs keep only their largest gates. Later layers reuse the keys of earlier ones.

`P` streams of `b s h` are one tensor; `P1` counts all but the first.

Source: transformers 5.24 models/gemma3n/modeling_gemma3n.py.
"""

from __future__ import annotations

from memplan.catalogue.decoder.frame import (
    BOTH,
    after,
    inputs,
    local,
    masks,
    returned,
    rotary_tables,
    runs,
    table_names,
)
from memplan.catalogue.decoder.scaling import scaled_embedding
from memplan.catalogue.families.gemma import capped_logits
from memplan.catalogue.families.gemma4 import (
    gated_embedding,
    layer_embedding,
    per_layer_inputs,
    project_heads,
    project_key,
    project_query,
    release_shared,
    rms_norm,
    shared_attention,
    shared_names,
)
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.positions import positions
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Scratch, Stack, Tensor, Weight
from memplan.models.configs.gemma import REUSED, SPARSE, STORED
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_SOURCE = "transformers 5.24 models/gemma3n/modeling_gemma3n.py"
_ALL, _ONE, _ROW = "P b s h", "b s h", "b s"


def _stream(name: str, x: str, y: str) -> Op:
    """Select one of the streams: a view, whose gradient is as wide as all of them."""
    return Op(name, (x,), (Tensor(y, _ONE),), gradient="new", view=True, source=f"{ops.DERIVATIVES}: select.int")


def _modality_router(x: str, y: str, name: str = "altup") -> tuple[Op, ...]:
    """AltUp's router: one coefficient per stream, from the stream that was computed."""
    return (
        *rms_norm(f"{name}.router_norm", x, f"{y}.normed", _ONE, "h"),
        Op(
            f"{name}.router_input_scale",
            (f"{y}.normed",),
            (Tensor(f"{y}.in", _ONE, f"={x}"),),
            (Weight(f"{name}.router_input_scale", "", "buffer", "fp32", False),),
            (Keep(f"{name}.router_input_scale", f"{y}.normed"),),
            source=f"{ops.DERIVATIVES}: mul.Tensor",
        ),
        ops.release_names(f"{y}.normed"),
        ops.linear(f"{name}.modality_router", f"{y}.in", f"{y}.routed", "P", "h", "router"),
        ops.cast(f"{name}.float", f"{y}.routed", f"{y}.wide", "b s P", "fp32"),
        ops.keeping_output(f"{name}.tanh", f"{y}.wide", f"{y}.tanh", "b s P", "tanh"),
        ops.cast(f"{name}.type_as", f"{y}.tanh", y, "b s P", f"={x}"),
        ops.release_names(f"{y}.in", f"{y}.routed"),
    )


def _predict(name: str = "altup") -> tuple[Op, ...]:
    """Predict every stream as a mixture of all, with one matrix for each token: `x` to `predicted`."""
    return (
        _stream(f"{name}.active_of_x", "x", "x.active"),
        *_modality_router("x.active", "modes"),
        ops.linear(f"{name}.prediction_coefs", "modes", "coefs", "P P", "P", "router"),
        ops.matmul(f"{name}.mix", "x", "coefs", "mixed", _ALL),
        ops.add(f"{name}.add_x", "mixed", "x", "mixed.sum", _ALL)._replace(view=True),
        ops.copy(f"{name}.contiguous", "mixed.sum", "predicted", _ALL),
        ops.release_names("x.active", "modes", "coefs", "mixed.sum"),
    )


def _correct(x: str, y: str, name: str = "altup") -> tuple[Op, ...]:
    """Add the computed minus the predicted active stream to every stream, times a coefficient for each.

    The coefficients are multiplied by the layer's weight directly, so an adapter around the module has no effect.
    """
    w = Weight(f"{name}.correction_coefs.weight", "P P", "router", rows=1)
    module = ops.linear(f"{name}.correction_coefs", "modes.corrected", "unused", "P", "P", "router")
    clamped = Tensor("coefs.clamped", "P P", f"={w.name}")
    return (
        *_modality_router(x, "modes.corrected"),
        _stream(f"{name}.active_prediction", "predicted", "predicted.active"),
        ops.view(f"{name}.negative", "predicted.active", "predicted.negative", _ONE, gradient="new"),
        ops.add(f"{name}.innovation", x, "predicted.negative", "innovation", _ONE),
        ops.copy(f"{name}.repeat", "innovation", "innovations", _ALL, gradient="new"),
        ops.release_names("innovation"),
        Op(
            f"{name}.clamp",
            (),
            (clamped,),
            (w,),
            (Keep(w.name, w.name),),
            scratch_back=(Scratch(Tensor("within", "P P", "bool")),),
            source=f"{ops.DERIVATIVES}: clamp",
        ),
        ops.matmul(f"{name}.correct.linear", "modes.corrected", clamped.name, "coefs.correct", "b s P", "mm"),
        module._replace(skipped=True),
        ops.add_number(f"{name}.plus_one", "coefs.correct", "coefs.plus_one", "b s P"),
        ops.spread(f"{name}.weigh", "innovations", "coefs.plus_one", "corrections", _ALL),
        ops.add(f"{name}.add_predicted", "corrections", "predicted", y, _ALL)._replace(view=True),
        ops.release_names("modes.corrected", "innovations", clamped.name, "coefs.plus_one"),
    )


def _sparse_gates(x: str, y: str, name: str = "mlp") -> tuple[Op, ...]:
    """Subtract from the gates their mean plus a multiple of their standard deviation, and set negative values to 0."""
    shape, mean, deviation, cut, shifted = "b s f", f"{y}.mean", f"{y}.deviation", f"{y}.cut", f"{y}.shifted"
    return (
        Op(f"{name}.mean", (x,), (Tensor(mean, _ROW),), source=f"{ops.DERIVATIVES}: mean.dim"),
        Op(
            f"{name}.std",
            (x,),
            (Tensor(deviation, _ROW),),
            (),
            (Keep(x, x), Keep(deviation, x)),
            scratch_back=(Scratch(Tensor("less mean", shape, f"={x}")), Scratch(Tensor("product", shape, f"={x}"))),
            source=f"{ops.DERIVATIVES}: std.correction",
        ),
        Op(f"{name}.multiplier", (x,), (Tensor(f"{y}.multiplier", "", f"={x}"),), gradient="none"),
        ops.with_constant(
            f"{name}.deviations", deviation, f"{y}.multiplier", f"{deviation}.scaled", _ROW, "mul.Tensor", f"={x}"
        ),
        ops.add(f"{name}.cutoff", mean, f"{deviation}.scaled", cut, _ROW),
        ops.subtract(f"{name}.less_cutoff", x, cut, shifted, shape),
        Op(f"{name}.relu", (shifted,), (Tensor(y, shape),), (), (Keep(y, shifted),), source=f"{ops.DERIVATIVES}: relu"),
        ops.release_names(x, mean, deviation, cut),
    )


def _mlp(x: str, y: str, sparse: bool, name: str = "mlp") -> tuple[Op, ...]:
    gate = "gate.largest" if sparse else "gate"
    return (
        ops.linear(f"{name}.gate_proj", x, "gate", "f", "h", "mlp"),
        *(_sparse_gates("gate", gate) if sparse else ()),
        ops.activation(f"{name}.act_fn", gate, "act", "b s f"),
        ops.linear(f"{name}.up_proj", x, "up", "f", "h", "mlp"),
        ops.mul(f"{name}.product", "act", "up", "product", "b s f"),
        ops.linear(f"{name}.down_proj", "product", y, "h", "f", "mlp"),
        ops.release_names(gate, "act", "up"),
    )


def _heads(m: ModelSpec, wiring: Wiring, layer: Layer, x: str, y: str, name: str = "self_attn") -> tuple[Op, ...]:
    bias = m.get("attention_bias", False)
    key_value_ops: tuple[Op, ...] = ()
    if layer.mixer != REUSED:
        key_value_ops = (
            *project_heads(name, x, "k", bias),
            *project_key(name),
            ops.release_names("k1"),
            *project_heads(name, x, "v", bias),
            *rms_norm(f"{name}.v_norm", "v1", "v", "b s k d", "d", affine=False),
            ops.release_names("v1"),
        )
    held_names = () if layer.mixer == REUSED else ("k", "v")
    return (
        *project_query(name, x, bias),
        *key_value_ops,
        *shared_attention(m, wiring, layer, y, name, bias),
        ops.release_names("q", *held_names, "o"),
    )


def _laurel(x: str, y: str, name: str = "laurel") -> tuple[Op, ...]:
    return (
        ops.linear(f"{name}.linear_left", x, "laurel.low", "laurel", "h", "mlp"),
        ops.linear(f"{name}.linear_right", "laurel.low", "laurel.high", "h", "laurel", "mlp"),
        ops.release_names("laurel.low"),
        *rms_norm(f"{name}.post_laurel_norm", "laurel.high", "laurel.normed", _ONE, "h"),
        ops.add(f"{name}.add", x, "laurel.normed", y, _ONE),
        ops.release_names("laurel.high", "laurel.normed"),
    )


def _per_layer_gate(x: str, y: str) -> tuple[Op, ...]:
    """The first stream, scaled, gated by the per-layer embeddings, normalised, and added to the other streams."""
    return (
        _stream("altup.first", x, "first.view"),
        ops.copy("altup.first.clone", "first.view", "first", _ONE),
        ops.multiply_weight("altup", "first", "first.scaled", _ONE, Weight("altup.correct_output_scale", "h", "mlp")),
        ops.release_names("first"),
        *gated_embedding("first.scaled", "first.scaled"),
        Op(
            "altup.add_to_rest",
            (x, "own.normed"),
            (Tensor(y, _ALL, f"={x}"),),
            gradient="new",
            view=True,
            scratch_back=(Scratch(Tensor("slice", "P1 b s h", f"={x}")),),
            source="torch 2.13 torch/csrc/autograd/functions/tensor.cpp CopySlices",
        ),
    )


def _block(m: ModelSpec, wiring: Wiring, layer: Layer) -> Block:
    operations = (
        layer_embedding(),
        *_predict(),
        _stream("altup.active", "predicted", "active"),
        *rms_norm("input_layernorm", "active", "n1", _ONE, "h"),
        *_laurel("n1", "lo"),
        *_heads(m, wiring, layer, "n1", "ao"),
        *rms_norm("post_attention_layernorm", "ao", "ao.normed", _ONE, "h"),
        ops.release_names("ao"),
        ops.add("residual_1", "active", "ao.normed", "x1.attention", _ONE),
        ops.add("residual_laurel", "x1.attention", "lo", "x1.sum", _ONE),
        ops.scale("residual_scale", "x1.sum", "x1", _ONE),
        *rms_norm("pre_feedforward_layernorm", "x1", "n2", _ONE, "h"),
        *ops.with_axes(_mlp("n2", "mo", layer.ffn == SPARSE), {"f": f"f{layer.f}"}),
        *rms_norm("post_feedforward_layernorm", "mo", "mo.normed", _ONE, "h"),
        ops.add("residual_2", "x1", "mo.normed", "x2", _ONE),
        *_correct("x2", "corrected"),
        *_per_layer_gate("corrected", "y"),
        ops.release_names("predicted", "n1", "lo", "ao.normed", "x1.attention", "x1", "n2", "mo", "mo.normed", "x2"),
        ops.release_names("own.normed", "positions", *returned(wiring)),
    )
    block = Block("model.layers", operations, shared_names(layer.sliding) if layer.mixer == STORED else ())
    return local(block) if layer.sliding else block


def _magnitude(name: str, x: str, y: str) -> tuple[Op, ...]:
    """Root mean square of each row."""
    return (
        _square(name, x, y),
        Op(f"{name}.mean", (f"{y}.square",), (Tensor(f"{y}.mean", _ROW),), source=f"{ops.DERIVATIVES}: mean.dim"),
        Op(
            f"{name}.root",
            (f"{y}.mean",),
            (Tensor(y, _ROW),),
            (),
            (Keep(f"{y}.mean", f"{y}.mean"),),
            source=f"{ops.DERIVATIVES}: pow.Tensor_Scalar",
        ),
    )


def _square(name: str, x: str, y: str) -> Op:
    return ops.square(f"{name}.pow", x, f"{y}.square", _ONE, f"={x}")._replace(autocast="fp32")


def _project_to_magnitude(
    name: str, x: str, y: str, target: str, before: str = "", rebinds: tuple[str, ...] = ()
) -> tuple[Op, ...]:
    """Project x and scale it to the magnitude of the first stream.

    The model's variables for the product, the stream and its magnitude still hold those of the stream `before` until
    they are assigned. The first iteration of a loop also rebinds the variables in `rebinds`, which hold streams of an
    earlier loop.
    """
    new, clamped = f"{y}.magnitude", f"{y}.clamped"
    product = Op(
        f"{name}.times_target",
        (f"{y}.projected", target),
        (Tensor(f"{y}.scaled", _ONE),),
        (),
        (Keep(target, f"{y}.projected"), Keep(f"{y}.projected", target)),
        scratch_back=(Scratch(Tensor("product", _ONE, f"={y}.projected"), target),),
        source=f"{ops.DERIVATIVES}: mul.Tensor",
    )
    return (
        ops.linear(name, x, f"{y}.product", "h", "h", "mlp"),
        *((ops.release_names(f"{before}.product"),) if before and not rebinds else ()),
        ops.cast(f"{name}.to", f"{y}.product", f"{y}.projected", _ONE, "=tokens"),
        *((ops.release_names(*rebinds),) if rebinds else ()),
        _square(name, f"{y}.projected", y),
        Op(f"{name}.mean", (f"{y}.square",), (Tensor(f"{y}.mean", _ROW),), source=f"{ops.DERIVATIVES}: mean.dim"),
        *((ops.release_names(f"{before}.magnitude"),) if before else ()),
        ops.clamp(f"{name}.clamp", f"{y}.mean", clamped, _ROW, 1),
        Op(f"{name}.sqrt", (clamped,), (Tensor(new, _ROW),), (), (Keep(new, clamped),), source="sqrt"),
        ops.release_names(f"{y}.mean"),
        product,
        Op(
            f"{name}.over_magnitude",
            (f"{y}.scaled", new),
            (Tensor(y, _ONE),),
            (),
            (Keep(new, f"{y}.scaled"), Keep(f"{y}.scaled", new), Keep(new, new)),
            scratch_back=(
                Scratch(Tensor("quotient", _ONE, f"={y}"), new),
                Scratch(Tensor("negative", _ONE, f"={y}"), new),
            ),
            source=f"{ops.DERIVATIVES}: div.Tensor",
        ),
        ops.release_names(f"{y}.projected"),
    )


def _stack_streams(name: str, parts: tuple[str, ...], y: str) -> tuple[Op, ...]:
    """Stack the parts. Their gradients are views of one tensor."""
    views = tuple(ops.view(f"{name}.{part}", part, f"{part}.part", _ALL) for part in parts)
    joined = Op(name, tuple(v.writes[0].name for v in views), (Tensor(y, _ALL),), gradient="same", source="stack")
    return (*views, joined)


def gemma3n(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Gemma 3n. All streams start as projections of the embeddings, and are averaged at the end."""
    others = range(1, m.config_int("altup_num_inputs", least=2))
    has_sliding = any(layer.sliding for layer in m.layers)
    lookup = scaled_embedding()
    first = (
        inputs(wiring.padded),
        lookup._replace(writes=(lookup.writes[0]._replace(name="tokens"),)),
        *_per_layer_inputs(),
        positions(),
        *(
            op._replace(writes=tuple(t._replace(dtype=t.dtype.replace("embeds", "tokens")) for t in op.writes))
            for kind in (False, True)
            for op in masks(wiring, "tokens", kind)
        ),
        *_magnitude("model.magnitude", "tokens", "target"),
        *(
            op
            for i in others
            for op in _project_to_magnitude(
                f"model.altup_projections.{i - 1}", "tokens", f"stream{i}", "target", f"stream{i - 1}" if i > 1 else ""
            )
        ),
        *_stack_streams("model.stack", ("tokens", *(f"stream{i}" for i in others)), "embeds"),
        *rotary_tables(has_sliding),
    )
    newest = f"stream{max(others)}"  # held by the model's variables until its last loop assigns them
    last = after(m, wiring, BOTH, norm=rms_norm, table=table_names(has_sliding))
    norm = len(rms_norm("model.norm", "x", "n", "b s h", "h"))
    mean = (
        _stream("model.first_for_magnitude", "x", "x.first"),
        *_magnitude("model.last_magnitude", "x.first", "last_target"),
        ops.release_names("target"),
        _stream("model.first", "x", "last0"),
        ops.release_names(*(f"stream{i}" for i in others if f"stream{i}" != newest)),
        *(
            op
            for i in others
            for op in (
                _stream(f"model.stream_{i}", "x", f"x.{i}"),
                *_project_to_magnitude(
                    f"model.altup_unembed_projections.{i - 1}",
                    f"x.{i}",
                    f"last{i}",
                    "last_target",
                    f"last{i - 1}" if i > 1 else newest,
                    () if i > 1 else (newest,),
                ),
            )
        ),
        *_stack_streams("model.last_stack", tuple(f"last{i}" for i in (0, *others)), "all"),
        Op("model.mean", ("all",), (Tensor("one", _ONE),), source=f"{ops.DERIVATIVES}: mean.dim"),
        ops.release_names("all"),
    )
    # what the model's variables hold when it returns; one of them holds the stack of the last block's streams
    held = ("tokens", f"{newest}.product", "last_target", *(f"last{i}" for i in (0, *others)))
    held = (*held, *(f"last{max(others)}.{what}" for what in ("product", "magnitude")))
    held_names = {"x": ("one",), "embeds": held}
    tail = tuple(
        op._replace(reads=tuple(n for r in op.reads for n in held_names.get(r, (r,)))) if op.name == "return" else op
        for op in release_shared((*rms_norm("model.norm", "one", "n", "b s h", "h"), *last[norm:]), m, True)
    )
    return Stack(first, runs(m, lambda layer: _block(m, wiring, layer)), (*mean, *capped_logits(tail)))


def _per_layer_inputs() -> tuple[Op, ...]:
    """Per-layer embeddings. Token ids beyond their table are looked up as its first."""
    return (
        Op(
            "model.in_table",
            ("ids",),
            (Tensor("ple.ids", "b s", "int64"),),
            scratch=(Tensor("known", "b s", "bool"), Tensor("small", "b s", "bool"), Tensor("both", "b s", "bool")),
            gradient="none",
        ),
        *per_layer_inputs("tokens", ids="ple.ids", buffers=True),
    )


BUILDERS = {"gemma3n_text": gemma3n}
