"""Vision and audio towers that a text-only run loads but does not run.

Source: transformers 5.24 models/gemma4/modeling_gemma4.py, models/step3p7/modeling_step3p7.py, models/siglip and
siglip2.
"""

from __future__ import annotations

from collections.abc import Iterable

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import skipped
from memplan.core.ir import Block, Op, Run, Stack, Tensor, Weight
from memplan.models.model import ModelSpec


def _linear(name: str, out: str, into: str, bias: bool = False, group: str = "vision") -> Op:
    return ops.linear(name, "x", "unused", out, into, group, bias)


def _parameters(name: str, *shapes: tuple[str, str], group: str = "vision") -> Op:
    """Return parameters of the module `name`, given their names and shapes."""
    weights = tuple(Weight(f"{name}.{part}" if name else part, shape, group) for part, shape in shapes)
    return Op(name or shapes[0][0], ("x",), (Tensor("unused", "b"),), weights)


def _buffers(name: str, *shapes: tuple[str, str]) -> Op:
    weights = tuple(Weight(f"{name}.{part}", shape, "buffer", "fp32", False) for part, shape in shapes)
    return Op(f"{name} buffers", ("x",), (Tensor("unused", "b"),), weights)


def _norm(name: str, axis: str, bias: bool = False, group: str = "vision") -> Op:
    return _parameters(name, ("weight", axis), *((("bias", axis),) if bias else ()), group=group)


def _clipped(name: str, out: str, into: str, clips: bool, group: str = "vision") -> tuple[Op, ...]:
    """Return a linear layer whose wrapper module can clip input and output to bounds stored as buffers."""
    bounds = ("input_min", "input_max", "output_min", "output_max")
    linear = _linear(f"{name}.linear", out, into, group=group)
    return (linear, _buffers(name, *((bound, "") for bound in bounds))) if clips else (linear,)


def _frequencies(name: str) -> Op:
    return _buffers(name, ("inv_freq", "vd4"), ("original_inv_freq", "vd4"))


def _with_tower(stack: Stack, outside: tuple[Op, ...], blocks: Iterable[tuple[str, str, tuple[Op, ...]]]) -> Stack:
    """Return the stack with a skipped tower: its operations outside of blocks, and blocks by name and count axis."""
    skipped_runs = tuple(
        Run((Block(name, (ops.view("skip", "x", "y", "b s h"), *skipped(layer))),), times)
        for name, times, layer in blocks
    )
    return stack._replace(before=(*skipped(outside), *stack.before), runs=(*skipped_runs, *stack.runs))


def gemma4_towers(m: ModelSpec, made: Stack) -> Stack:
    """Return the stack with those towers of Gemma 4 that the config has."""
    image, sound = m.part("vision_config"), m.part("audio_config")
    if sound:
        clips = bool(sound.get("use_clipped_linears", True))
        made = _with_tower(made, _audio_outside(), (("model.audio_tower.layers", "uL", _audio_layer(clips)),))
    if image:
        clips = bool(image.get("use_clipped_linears", False))
        outside = _vision_outside(bool(image.get("standardize", False)))
        made = _with_tower(made, outside, (("model.vision_tower.encoder.layers", "vL", _vision_layer(clips)),))
    return made


def unified_embedders(m: ModelSpec, made: Stack, called: str = "") -> Stack:
    """Return the stack with the layers by which the unified Gemma 4 embeds pixels and sound, if the config has them and
    they are not those that are `called`."""
    n, name, group = "model.embed_vision", "embedding_projection", "projector"
    pixels = (
        _norm(f"{n}.patch_ln1", "vin", True),
        _linear(f"{n}.patch_dense", "vh", "vin", True),
        _norm(f"{n}.patch_ln2", "vh", True),
        _parameters(n, ("pos_embedding", "vpositions 2 vh")),
        _norm(f"{n}.pos_norm", "vh", True),
        _linear(f"{n}.multimodal_embedder.{name}", "h", "vo", group=group),
    )
    sound = (_linear(f"model.embed_audio.{name}", "h", "uo", group="audio"),)
    parts = (("vision_config", pixels), ("audio_config", sound))
    uncalled = tuple(op for key, layers in parts if m.part(key) and key != called for op in layers)
    return _with_tower(made, uncalled, ())


def _vision_outside(standardizes: bool) -> tuple[Op, ...]:
    tower = "model.vision_tower"
    return (
        _linear(f"{tower}.patch_embedder.input_proj", "vh", "vin"),
        _parameters(f"{tower}.patch_embedder", ("position_embedding_table", "2 vpositions vh")),
        _frequencies(f"{tower}.encoder.rotary_emb"),
        *((_buffers(tower, ("std_bias", "vh"), ("std_scale", "vh")),) if standardizes else ()),
        _linear("model.embed_vision.embedding_projection", "h", "vh", group="projector"),
    )


def _vision_layer(clips: bool) -> tuple[Op, ...]:
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


def _audio_outside() -> tuple[Op, ...]:
    tower, group = "model.audio_tower", "audio"
    convolutions = f"{tower}.subsample_conv_projection"
    return (
        *(
            op
            for i, into in ((0, "1"), (1, "uc0"))
            for op in (
                _parameters(f"{convolutions}.layer{i}.conv", ("weight", f"uc{i} {into} 3 3"), group=group),
                _norm(f"{convolutions}.layer{i}.norm", f"uc{i}", group=group),
            )
        ),
        _linear(f"{convolutions}.input_proj_linear", "uh", "uin", group=group),
        _buffers(f"{tower}.rel_pos_enc", ("inv_timescales", "uh2")),
        _linear(f"{tower}.output_proj", "uo", "uh", True, group),
        _linear("model.embed_audio.embedding_projection", "h", "uo", group=group),
    )


def _audio_layer(clips: bool) -> tuple[Op, ...]:
    group = "audio"
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
        *(op for name, (out, into) in layers.items() for op in _clipped(name, out, into, clips, group)),
        _linear("self_attn.relative_k_proj", "uh", "uh", group=group),
        _parameters("self_attn", ("per_dim_scale", "ud"), group=group),
        _buffers("self_attn", ("softcap", "")),
        _parameters("lconv1d.depthwise_conv1d", ("weight", "uh 1 ukernel"), group=group),
        *(
            _norm(f"{feed}.{name}", "uh", group=group)
            for feed in feeds
            for name in ("pre_layer_norm", "post_layer_norm")
        ),
        *(_norm(name, "uh", group=group) for name in norms),
    )


_HEADS = ("q_proj", "k_proj", "v_proj", "out_proj")


def _plain_layer(norms: tuple[str, ...]) -> tuple[Op, ...]:
    """Return a layer of a plain vision transformer. All linear layers and norms have biases."""
    return (
        *(_linear(f"self_attn.{name}", "vh", "vh", True) for name in _HEADS),
        _linear("mlp.fc1", "vf", "vh", True),
        _linear("mlp.fc2", "vh", "vf", True),
        *(_norm(name, "vh", True) for name in norms),
    )


def step_tower(m: ModelSpec, made: Stack) -> Stack:
    tower = "model.vision_model"
    outside = (
        _parameters(f"{tower}.embeddings.patch_embedding", ("weight", "vh vin")),
        _parameters(f"{tower}.embeddings.position_embedding", ("weight", "vpositions vh")),
        _norm(f"{tower}.pre_layernorm", "vh", True),
        _parameters(f"{tower}.downsampler1", ("weight", "2 vh vh 3 3"), ("bias", "2 vh")),
        _parameters(f"{tower}.downsampler2", ("weight", "4 vh 2 vh 3 3"), ("bias", "4 vh")),
        _linear("model.multi_modal_projector", "h", "4 vh", m.get("projector_bias", False), "projector"),
        _frequencies(f"{tower}.rotary_emb"),
        Op("", weights=(Weight(f"{tower}.embeddings.position_ids", "1 vpositions", "buffer", "int64", False),)),
    )
    layer = (
        *_plain_layer(("layernorm_before", "layernorm_after")),
        _parameters("", ("lambda_1", "vh"), ("lambda_2", "vh")),
    )
    return _with_tower(made, outside, ((f"{tower}.layers", "vL", layer),))


def siglip(m: ModelSpec, made: Stack, projector: tuple[Op, ...], numbered: bool = True) -> Stack:
    """Return the stack with SigLIP's tower, which may end with a head that pools, and a projector.

    `numbered`: the embeddings hold the numbers of patches, which SigLIP 2 does not need.
    """
    tower, n = "model.vision_tower", "model.vision_tower.head"
    ids = Weight(f"{tower}.embeddings.position_ids", "1 vpositions", "buffer", "int64", False)
    head = (
        _parameters(n, ("probe", "1 1 vh")),
        _parameters(f"{n}.attention", ("in_proj_weight", "3 vh vh"), ("in_proj_bias", "3 vh")),
        _linear(f"{n}.attention.out_proj", "vh", "vh", True),
        _norm(f"{n}.layernorm", "vh", True),
        _linear(f"{n}.mlp.fc1", "vf", "vh", True),
        _linear(f"{n}.mlp.fc2", "vh", "vf", True),
    )
    patches = f"{tower}.embeddings.patch_embedding"
    outside = (
        _parameters(patches, ("weight", "vh vin"), ("bias", "vh")) if numbered else _linear(patches, "vh", "vin", True),
        _parameters(f"{tower}.embeddings.position_embedding", ("weight", "vpositions vh")),
        *((Op("", weights=(ids,)),) if numbered else ()),
        _norm(f"{tower}.post_layernorm", "vh", True),
        *(head if m.part("vision_config").get("vision_use_head", True) else ()),
        *projector,
    )
    return _with_tower(
        made, outside, ((f"{tower}.encoder.layers", "vL1", _plain_layer(("layer_norm1", "layer_norm2"))),)
    )


def two_layers(name: str, out: str, into: str, between: str = "", bias: bool = True, norm: str = "") -> tuple[Op, ...]:
    """Return a projector of two linear layers; `between` is the input of the second, and `norm` comes first."""
    n, group = f"model.{name}", "projector"
    return (
        *((_norm(f"{n}.{norm}", into, True, group),) if norm else ()),
        _linear(f"{n}.linear_1", out, into, bias, group),
        _linear(f"{n}.linear_2", "h", between or out, bias, group),
    )


def newline() -> tuple[Op, ...]:
    """Return the embedding of the end of a row of patches."""
    return (_parameters("", ("model.image_newline", "h"), group="projector"),)
