"""Vision and audio towers that a text-only run loads but does not run.

Source: transformers 5.24 models/gemma4_unified/modeling_gemma4_unified.py, models/step3p7/modeling_step3p7.py,
models/siglip and siglip2.
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


def _frequencies(name: str) -> Op:
    return _buffers(name, ("inv_freq", "vd4"), ("original_inv_freq", "vd4"))


def _with_tower(stack: Stack, outside: tuple[Op, ...], blocks: Iterable[tuple[str, str, tuple[Op, ...]]]) -> Stack:
    """Return the stack with a skipped tower: its operations outside of blocks, and blocks by name and count axis."""
    skipped_runs = tuple(
        Run((Block(name, (ops.view("skip", "x", "y", "b s h"), *skipped(layer))),), times)
        for name, times, layer in blocks
    )
    return stack._replace(before=(*skipped(outside), *stack.before), runs=(*skipped_runs, *stack.runs))


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
