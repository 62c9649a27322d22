"""Exact parameter counts, by kind and by layer, of the model each card describes.

Builds the transformers class on the meta device from the card's [config], so nothing is allocated or downloaded:

    python tests/golden/count_parameters.py > tests/golden/parameters.json
    python tests/golden/count_parameters.py qwen2-7b gpt2

Needs torch and transformers; parameters.json was written with torch 2.13 and transformers 5.24.
"""

import json
import os
import sys
import tomllib
from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.initialization import no_init_weights

Config = dict[str, Any]
Parameter = tuple[str, str | None, int]  # kind, layer's path or None, number of elements

CARDS = Path(__file__).resolve().parents[2] / "model_cards"
KINDS = ("embedding", "attention", "mlp", "norm", "lm_head", "other")
FURTHER = ("mixer", "router", "vision", "audio", "head")  # rare kinds: listed only if present
LAYER_LISTS = {"layers", "layer", "h", "block", "blocks", "transformer"}
ATTENTION = {"self_attn", "attn", "attention", "self_attention", "SelfAttention", "EncDecAttention", "encoder_attn"}
ATTENTION |= {"cross_attn", "cross_attn_attn_gate", "cross_attn_mlp_gate"}
MLP = {"mlp", "ffn", "fc1", "fc2", "feed_forward", "block_sparse_moe", "DenseReluDense", "intermediate", "output"}
MLP |= {"shared_mlp", "ffn_output"}
MLP |= {"experts", "altup", "laurel", "per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"}
ATTENTION |= {"self_attention_res_proj", "mlp_res_proj", "output_attn_res_proj"}
MLP |= {"altup_projections", "altup_unembed_projections"}
MIXER = {"mamba", "mixer", "linear_attn", "conv"}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
FEEDS = {"experts", "shared_experts", "up_proj", "down_proj", "fc1_latent_proj", "fc2_latent_proj"}
MIXER |= {"attn_hc", "ffn_hc", "hc_head"}
ROUTER = {"gate", "router"}  # of experts; within an MLP, unlike gate_proj
ROUTER |= {"expert_bias", "modality_router", "prediction_coefs", "correction_coefs"}  # of streams
VISION = {"visual", "vision_tower", "vision_model", "multi_modal_projector", "embed_vision", "vision_embedder"}
VISION |= {"mm_projector", "connector", "image_newline"}
AUDIO = {"audio_tower", "embed_audio"}
EMBEDDING_PROJECTIONS = {
    "project_in",
    "project_out",
    "embeddings_project",
    "embedding_hidden_mapping_in",
}  # OPT-350m, ELECTRA, ALBERT
EMBEDDINGS = {"embeddings", "conv1", "conv2"}  # of patches and frames, and class tokens
LANGUAGE_HEADS = {"cls", "head", "lm_head", "predictions", "vocab_transform"}
HEADS = {"pooler", "classifier"}
# Shapes that a card's config may name by the keys of its remote code.
SHAPES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "tie_word_embeddings",
)  # fmt: skip


def nearest(config: Config) -> Config | None:
    """Return the config of a transformers class with equal shapes, for a family of remote code."""
    shapes = {key: config[key] for key in SHAPES if key in config}
    match config["model_type"]:
        case "baichuan" | "internlm2" | "minicpm":  # without biases; some keep q, k and v in one matrix
            return {"model_type": "llama", **shapes}
        case "mimo":
            return {"model_type": "qwen2", **shapes}
        case "kimi_k2":
            return {**config, "model_type": "deepseek_v3"}
        case "qwen":  # its intermediate_size counts gate and up together
            half = config["intermediate_size"] // 2
            heads = config["num_attention_heads"]
            return {"model_type": "qwen2", **shapes, "intermediate_size": half, "num_key_value_heads": heads}
        case "deepseek":  # its experts are modules, GLM-4.5's are stacked; there the router's bias is a buffer
            more = ("moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok")
            sizes = {key: config[key] for key in (*more, "first_k_dense_replace")}
            width = config["hidden_size"] // config["num_attention_heads"]
            return {"model_type": "glm4_moe", **shapes, **sizes, "head_dim": width, "pad_token_id": 0}
        case "chatglm":
            return {
                "model_type": "glm",
                **shapes,
                "intermediate_size": config["ffn_hidden_size"],
                "num_hidden_layers": config["num_layers"],
                "num_key_value_heads": config["multi_query_group_num"],
                "head_dim": config["kv_channels"],
                "vocab_size": config["padded_vocab_size"],
                "attention_bias": config["add_qkv_bias"],
                "pad_token_id": config["pad_token_id"],
            }
    return None


def build(config: Config) -> PreTrainedModel:
    if config["model_type"] == "kimi_k3":
        sys.path.insert(0, str(CARDS.parent))
        from tests.kimi_k3 import Whole

        with torch.device("meta"):
            return Whole(config)  # pyright: ignore[reportReturnType]
    keys = {key: value for key, value in config.items() if key != "model_type"}
    named = getattr(transformers, next(iter(config.get("architectures", ())), ""), None)
    with torch.device("meta"), no_init_weights():
        described = AutoConfig.for_model(config["model_type"], **keys)
        decodes = type(described) in AutoModelForCausalLM._model_mapping  # not Mistral 4's, by transformers' tables
        auto = AutoModelForCausalLM if decodes else AutoModelForImageTextToText
        model = named(described) if named is not None else auto.from_config(described)
        model.tie_weights()  # which is a part of their initialisation
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        if config.get("tie_word_embeddings") is False and head is not None and head.weight is table.weight:
            head.weight = torch.nn.Parameter(torch.empty_like(head.weight))  # tied by T5's class, not by its checkpoint
    return model


def kind(name: str, owner: torch.nn.Module, is_head: bool) -> str:  # noqa: PLR0911 (a return for each kind of weight)
    path = set(name.split("."))
    if path & VISION:
        return "vision"
    if path & AUDIO:
        return "audio"
    if "norm" in type(owner).__name__.lower():
        return "norm"
    if path & MIXER:  # Nemotron-H uses this name for every kind of block
        if path & PROJECTIONS:
            return "attention"
        return "router" if "gate" in path else "mlp" if path & FEEDS else "mixer"
    if is_head or path & LANGUAGE_HEADS:
        return "lm_head"
    if path & HEADS:
        return "head"
    if path & EMBEDDINGS:
        return "embedding"
    if isinstance(owner, torch.nn.Embedding) or path & EMBEDDING_PROJECTIONS:
        return "embedding"
    if path & ATTENTION:
        return "attention"
    if path & ROUTER and path & {*MLP, "moe", "router"} and "shared_expert_gate" not in path:
        return "router"
    return "mlp" if path & MLP else "other"


def layer(name: str) -> str | None:
    """Return the path of a parameter's layer."""
    parts = name.split(".")
    found = (i for i, (at, index) in enumerate(pairwise(parts)) if at in LAYER_LISTS and index.isdigit())
    at = next(found, None)
    return None if at is None else ".".join(parts[: at + 2])


def parameters(model: PreTrainedModel) -> Iterator[Parameter]:
    """Yield each parameter once; a tied head counts as an embedding."""
    head, table = model.get_output_embeddings(), getattr(model.get_input_embeddings(), "weight", None)
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        of_kind = "embedding" if parameter is table else kind(name, owner, owner is head)
        yield of_kind, layer(name), parameter.numel()


def nemotron_nas(config: Config) -> Iterator[Parameter]:
    """Return Llama blocks with per-layer key/value heads and FFN widths, some without attention or FFN."""
    hidden, heads, table = config["hidden_size"], config["num_attention_heads"], config["vocab_size"]
    yield "embedding", None, table * hidden
    yield "norm", None, hidden
    yield "lm_head", None, table * hidden
    for index, block in enumerate(config["block_configs"]):
        attention, ffn = block["attention"], block["ffn"]
        if attention["replace_with_linear"] or ffn["replace_with_linear"]:
            raise NotImplementedError("a block replaced by a linear layer")
        if not attention["no_op"]:
            key_value = hidden // heads * (heads // attention["n_heads_in_group"])
            yield "norm", f"{index}", hidden
            yield "attention", f"{index}", 2 * hidden * hidden + 2 * hidden * key_value
        if not ffn["no_op"]:
            width = int(2 * ffn["ffn_mult"] * hidden / 3)
            width += -width % 256
            yield "norm", f"{index}", hidden
            yield "mlp", f"{index}", 3 * hidden * width


def count(card: Config) -> Config:
    config = json.loads(json.dumps(card["config"]))
    for name in card.get("nulls", []):
        part, _, key = name.rpartition(".")
        (config[part] if part else config)[key] = None
    if config["model_type"] == "nemotron-nas":
        found, via, tied = list(nemotron_nas(config)), "shapes, per block", config["tie_word_embeddings"]
    else:
        substitute = nearest(config)
        model = build(substitute or config)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        found, tied = list(parameters(model)), head is not None and head.weight is getattr(embedding, "weight", None)
        via = type(model).__name__ if config["model_type"] != "kimi_k3" else "tests/kimi_k3.py"
        via += f" (equal shapes; {config['model_type']} is remote code)" if substitute else ""
    by_kind = dict.fromkeys((*KINDS, *FURTHER), 0)
    by_layer: dict[str, int] = {}
    for of_kind, index, number in found:
        by_kind[of_kind] += number
        if index is not None:
            by_layer[index] = by_layer.get(index, 0) + number
    runs = [[len(list(equal)), size] for size, equal in groupby(by_layer.values())]
    kinds = {kind: number for kind, number in by_kind.items() if number or kind in KINDS}
    return {"total": sum(by_kind.values()), **kinds, "layers": runs, "via": via, "tied": tied}


def main(names: list[str]) -> None:
    names = names or sorted(path.stem for path in CARDS.glob("*.toml"))
    counts = {name: count(tomllib.loads((CARDS / f"{name}.toml").read_text("utf-8"))) for name in names}
    lines = (f"  {json.dumps(name)}: {json.dumps(counts[name])}" for name in names)
    print("{\n" + ",\n".join(lines) + "\n}")


if __name__ == "__main__":
    main(sys.argv[1:])
