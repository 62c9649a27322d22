"""Kimi K2.5 and K3: DeepSeek V3's and Kimi Linear's decoders, and a tower for images and videos.

Only the weights of the tower are counted.
"""

from __future__ import annotations

from memplan.catalogue.decoder.decoder import decoder
from memplan.catalogue.families.deepseek import DEEPSEEK_V3
from memplan.catalogue.families.kimi_linear import kimi_linear
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import rewrite_weights
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.vision import towers as t
from memplan.catalogue.vision.towers import Tower
from memplan.catalogue.vision.vision import text_with_tower
from memplan.core.ir import Block, Op, Run, Stack, Tensor, Weight
from memplan.models.model import ModelSpec


def kimi_k25(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Kimi K2.5 for text only; what images take is not modelled. peft cannot tell what the experts stand for."""
    names = tuple(f"attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "proj"))
    act = str(m.part("vision_config").get("hidden_act", "gelu_pytorch_tanh"))
    block = t.block(
        "vision_tower.layers",
        t.plain_attention(names, wiring, t.P, bias=True),
        t.mlp("mlp", "v.n2", "v.mo", act),
    )
    shape, place = f"{t.P} vh", "vision_tower.patch_embed.pos_emb"
    places = Weight(f"{place}.position_embeddings", "vrows vrows vh", "vision", rows=2)
    times = Weight(f"{place}.time_position_embeddings", "vframes vh", "buffer", "fp32", False)
    angles = tuple(
        Weight(f"vision_tower.rotary_emb.{n}", "vd4", "buffer", "fp32", False)
        for n in ("inv_freq", "original_inv_freq")
    )
    g, p = "projector", "mm_projector"
    tower = Tower(
        (Tensor("pixel_values", f"{t.P} vin", "fp32"),),
        (
            *t.convolution("vision_tower.patch_embed.proj", "pixel_values", "v.patches", shape, True, asks=True),
            Op(place, ("v.patches",), (Tensor("embeds", shape),), (places, times, *angles)),
        ),
        (Run((block,), "vL1"),),
        (
            *t.norm("vision_tower.final_layernorm", "x", "v.last", shape, "vh"),
            *t.norm(f"{p}.pre_norm", "v.last", "v.normed", shape, "vp", g),
            t.linear(f"{p}.in_proj", "v.normed", "v.m1", "vm", "vm", g, "b merged"),
            ops.activation(f"{p}.act", "v.m1", "v.m2", "b merged vm"),
            t.linear(f"{p}.out_proj", "v.m2", "features", "h", "vm", g, "b merged"),
        ),
    )
    text = rewrite_weights(decoder(m, wiring, DEEPSEEK_V3), lambda w: w._replace(stands_for=()))
    return text_with_tower(wiring, _with_text_ids(text), tower)


def _with_text_ids(text: Stack) -> Stack:
    """Look up the embeddings in a copy of the ids without image tokens.

    The copy and the mask stay alive until the language model has returned.
    """
    at = next(i for i, op in enumerate(text.before) if op.name == "model.embed_tokens")
    lookup = text.before[at]
    held = (Tensor("text_ids", "b s", "int64"), Tensor("image_mask", "b s", "bool"))
    scratch = (Tensor("images", "b s", "bool"), Tensor("films", "b s", "bool"))
    copied = Op("text_ids", ("ids",), held, scratch=scratch, gradient="none")
    keeps = tuple(k._replace(what="text_ids") if k.what == "ids" else k for k in lookup.keeps)
    before = (*text.before[:at], copied, lookup._replace(reads=("text_ids",), keeps=keeps), *text.before[at + 1 :])
    after = tuple(
        op._replace(reads=(*op.reads, "text_ids", "image_mask")) if op.name == "return" and "x" in op.reads else op
        for op in text.after
    )
    return text._replace(before=before, after=after)


def kimi_k3(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Kimi K3 for text only. Of the tower only the weights are modelled, not how it attends.

    Source: modeling_kimi_k3.py of moonshotai/Kimi-K3, 2026.
    """
    vision = m.part("vision_config")
    bias, biased = (bool(vision.get(key, True)) for key in ("attn_bias", "linear_bias"))
    shape, place, p = f"{t.P} vh", "vision_tower.patch_embed", "mm_projector"
    block = Block(
        "vision_tower.encoder.blocks",
        (
            *t.rms_norm("norm0", "x", "v.n1", shape, "vh"),
            t.linear("wqkv", "v.n1", "v.qkv", "3 vq", "vh", bias=bias),
            t.linear("wo", "v.qkv", "v.ao", "vh", "vq", bias=bias),
            *t.rms_norm("norm1", "v.ao", "v.n2", shape, "vh"),
            t.linear("mlp.fc0", "v.n2", "v.up", "vf", "vh", bias=biased),
            t.linear("mlp.fc1", "v.up", "y", "vh", "vf", bias=biased),
        ),
    )
    tables = (
        Weight(f"{place}.pos_emb.weight", "vrows vcolumns vh", "vision", rows=2),
        Weight(f"{place}.pos_emb.time_weight", "vframes vh", "buffer", "fp32", False),
    )
    patches = bool(vision.get("patch_embed_proj_bias", True))
    tower = Tower(
        (Tensor("pixel_values", f"{t.P} vin", "fp32"),),
        (
            *t.convolution(f"{place}.proj", "pixel_values", "v.patches", shape, patches, asks=True),
            Op(f"{place}.pos_emb", ("v.patches",), (Tensor("embeds", shape),), tables),
        ),
        (Run((block,), "vL1"),),
        (
            *t.rms_norm("vision_tower.encoder.final_layernorm", "x", "v.last", shape, "vh"),
            t.linear(f"{p}.proj.0", "v.last", "v.m1", "vm", "vm", "projector", "b merged", bias=False),
            t.linear(f"{p}.proj.2", "v.m1", "v.m2", "h", "vm", "projector", "b merged", bias=False),
            *t.rms_norm(f"{p}.post_norm", "v.m2", "features", "b merged h", "h", "projector"),
        ),
    )
    return text_with_tower(wiring, kimi_linear(m, wiring), tower)


BUILDERS = {"kimi_k25": kimi_k25, "kimi_k3": kimi_k3}
