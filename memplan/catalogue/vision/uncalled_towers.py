"""Towers for images and sound that a run on text does not call: of them there are only the weights.

Source: transformers 5.24 models/gemma4/modeling_gemma4.py, models/step3p7/modeling_step3p7.py.
"""

from __future__ import annotations

from collections.abc import Iterable

from memplan.catalogue.kernels import ops
from memplan.catalogue.vision.vision import skipped
from memplan.core.ir import Block, Op, Run, Stack, Tensor, Weight
from memplan.models.model import ModelSpec


def _linear(name: str, out: str, into: str, bias: bool = False, group: str = "vision") -> Op:
    return ops.linear(name, "x", "unused", out, into, group, bias)


def _own(name: str, *shapes: tuple[str, str], group: str = "vision") -> Op:
    """Parameters of the module `name`, by their own names and shapes."""
    weights = tuple(Weight(f"{name}.{part}" if name else part, shape, group) for part, shape in shapes)
    return Op(name or shapes[0][0], ("x",), (Tensor("unused", "b"),), weights)


def _buffers(name: str, *shapes: tuple[str, str]) -> Op:
    weights = tuple(Weight(f"{name}.{part}", shape, "buffer", "fp32", False) for part, shape in shapes)
    return Op(f"{name} buffers", ("x",), (Tensor("unused", "b"),), weights)


def _norm(name: str, axis: str, bias: bool = False, group: str = "vision") -> Op:
    return _own(name, ("weight", axis), *((("bias", axis),) if bias else ()), group=group)


def _clipped(name: str, out: str, into: str, clips: bool, group: str = "vision") -> tuple[Op, ...]:
    """A linear layer in a module that may clip what goes in and comes out, by bounds of its own."""
    bounds = ("input_min", "input_max", "output_min", "output_max")
    made = _linear(f"{name}.linear", out, into, group=group)
    return (made, _buffers(name, *((bound, "") for bound in bounds))) if clips else (made,)


def _frequencies(name: str) -> Op:
    return _buffers(name, ("inv_freq", "vd4"), ("original_inv_freq", "vd4"))


def _beside(made: Stack, outside: tuple[Op, ...], blocks: Iterable[tuple[str, str, tuple[Op, ...]]]) -> Stack:
    """The stack, with what lies outside of a tower's blocks, and blocks by name and the axis that counts them."""
    still = tuple(
        Run((Block(name, (ops.view("skip", "x", "y", "b s h"), *skipped(layer))),), times)
        for name, times, layer in blocks
    )
    return made._replace(before=(*skipped(outside), *made.before), runs=(*still, *made.runs))


def gemma4_towers(m: ModelSpec, made: Stack) -> Stack:
    """Of Gemma 4, as far as its config has them."""
    image, sound = m.part("vision_config"), m.part("audio_config")
    if sound:
        clips = bool(sound.get("use_clipped_linears", True))
        made = _beside(made, _ears(), (("model.audio_tower.layers", "uL", _ear(clips)),))
    if image:
        clips = bool(image.get("use_clipped_linears", False))
        outside = _eyes(bool(image.get("standardize", False)))
        made = _beside(made, outside, (("model.vision_tower.encoder.layers", "vL", _eye(clips)),))
    return made


def _eyes(standardizes: bool) -> tuple[Op, ...]:
    tower = "model.vision_tower"
    return (
        _linear(f"{tower}.patch_embedder.input_proj", "vh", "vin"),
        _own(f"{tower}.patch_embedder", ("position_embedding_table", "2 vpositions vh")),
        _frequencies(f"{tower}.encoder.rotary_emb"),
        *((_buffers(tower, ("std_bias", "vh"), ("std_scale", "vh")),) if standardizes else ()),
        _linear("model.embed_vision.embedding_projection", "h", "vh", group="projector"),
    )


def _eye(clips: bool) -> tuple[Op, ...]:
    heads = {"q": "va vd", "k": "vk vd", "v": "vk vd"}
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    return (
        *(op for t, out in heads.items() for op in _clipped(f"self_attn.{t}_proj", out, "vh", clips)),
        *_clipped("self_attn.o_proj", "vh", "va vd", clips),
        _norm("self_attn.q_norm", "vd"),
        _norm("self_attn.k_norm", "vd"),
        *(op for t in ("gate", "up") for op in _clipped(f"mlp.{t}_proj", "vf", "vh", clips)),
        *_clipped("mlp.down_proj", "vh", "vf", clips),
        *(_norm(f"{name}_layernorm", "vh") for name in norms),
    )


def _ears() -> tuple[Op, ...]:
    tower, g = "model.audio_tower", "audio"
    convolutions = f"{tower}.subsample_conv_projection"
    return (
        *(
            op
            for i, into in ((0, "1"), (1, "uc0"))
            for op in (
                _own(f"{convolutions}.layer{i}.conv", ("weight", f"uc{i} {into} 3 3"), group=g),
                _norm(f"{convolutions}.layer{i}.norm", f"uc{i}", group=g),
            )
        ),
        _linear(f"{convolutions}.input_proj_linear", "uh", "uin", group=g),
        _buffers(f"{tower}.rel_pos_enc", ("inv_timescales", "uh2")),
        _linear(f"{tower}.output_proj", "uo", "uh", True, g),
        _linear("model.embed_audio.embedding_projection", "h", "uo", group=g),
    )


def _ear(clips: bool) -> tuple[Op, ...]:
    g = "audio"
    feeds = ("feed_forward1", "feed_forward2")
    norms = ("lconv1d.pre_layer_norm", "lconv1d.conv_norm", "norm_pre_attn", "norm_post_attn", "norm_out")
    layers = {
        **{f"{feed}.ffw_layer_1": ("4 uh", "uh") for feed in feeds},
        **{f"{feed}.ffw_layer_2": ("uh", "4 uh") for feed in feeds},
        **{f"self_attn.{name}": ("uh", "uh") for name in ("q_proj", "k_proj", "v_proj", "post")},
        "lconv1d.linear_start": ("2 uh", "uh"),
        "lconv1d.linear_end": ("uh", "uh"),
    }
    return (
        *(op for name, (out, into) in layers.items() for op in _clipped(name, out, into, clips, g)),
        _linear("self_attn.relative_k_proj", "uh", "uh", group=g),
        _own("self_attn", ("per_dim_scale", "ud"), group=g),
        _buffers("self_attn", ("softcap", "")),
        _own("lconv1d.depthwise_conv1d", ("weight", "uh 1 ukernel"), group=g),
        *(_norm(f"{feed}.{name}", "uh", group=g) for feed in feeds for name in ("pre_layer_norm", "post_layer_norm")),
        *(_norm(name, "uh", group=g) for name in norms),
    )


def _plain_layer(projections: tuple[str, ...], norms: tuple[str, ...]) -> tuple[Op, ...]:
    """A layer of a plain vision transformer, all of whose layers have biases."""
    return (
        *(_linear(f"self_attn.{name}", "vh", "vh", True) for name in projections),
        _linear("mlp.fc1", "vf", "vh", True),
        _linear("mlp.fc2", "vh", "vf", True),
        *(_norm(name, "vh", True) for name in norms),
    )


def step_tower(m: ModelSpec, made: Stack) -> Stack:
    tower = "model.vision_model"
    outside = (
        _own(f"{tower}.embeddings.patch_embedding", ("weight", "vh vin")),
        _own(f"{tower}.embeddings.position_embedding", ("weight", "vpositions vh")),
        _norm(f"{tower}.pre_layernorm", "vh", True),
        _own(f"{tower}.downsampler1", ("weight", "2 vh vh 3 3"), ("bias", "2 vh")),
        _own(f"{tower}.downsampler2", ("weight", "4 vh 2 vh 3 3"), ("bias", "4 vh")),
        _linear("model.multi_modal_projector", "h", "4 vh", m.get("projector_bias", False), "projector"),
        _frequencies(f"{tower}.rotary_emb"),
        Op("", weights=(Weight(f"{tower}.embeddings.position_ids", "1 vpositions", "buffer", "int64", False),)),
    )
    layer = (
        *_plain_layer(("q_proj", "k_proj", "v_proj", "out_proj"), ("layernorm_before", "layernorm_after")),
        _own("", ("lambda_1", "vh"), ("lambda_2", "vh")),
    )
    return _beside(made, outside, ((f"{tower}.layers", "vL", layer),))
