"""Trace what torch.compile keeps for backward, and print rows for tests/estimate/test_compiled.py.

python tests/golden/trace_compiled.py [NAME ...] > tests/golden/traced_compiled.jsonl

AOTAutograd divides a step into a forward and a backward graph, and its partitioner chooses the tensors between them.
It needs no GPU. Eager tensors are counted by hooks on saved tensors, one storage once; neither count has weights. A row
has the bytes per layer, and those outside the layers, of a model of 2 layers and of one with 3.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 16384,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}
TOKENS = (1, 512)
FAMILIES = ("llama", "qwen3", "gemma", "gpt_neox", "phi", "olmo2")
CASES = {
    **{name: (name, "full", "bf16") for name in FAMILIES},
    "llama lora": ("llama", "lora", "bf16"),
    "qwen2 lora": ("qwen2", "lora", "bf16"),
    "llama autocast": ("llama", "full", "fp32"),
}


def kept(model_type: str, method: str, weights: str, layers: int) -> tuple[int, int]:
    """Return the bytes that eager autograd keeps, and that the partitioner keeps."""
    torch._dynamo.reset()
    config = AutoConfig.for_model(model_type, **SIZES, num_hidden_layers=layers, use_cache=False)
    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()
    if method == "lora":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=8))
    between = 0

    def backward(graph: Any, _: Any) -> Any:
        nonlocal between
        for node in graph.graph.find_nodes(op="placeholder"):
            value = node.meta["val"]
            if isinstance(value, torch.Tensor) and not node.name.startswith(("primals", "tangents")):
                between += value.numel() * value.element_size()
        return graph.forward

    backend = aot_autograd(
        fw_compiler=lambda graph, _: graph.forward,
        bw_compiler=backward,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table,
    )
    ids, saved = torch.randint(0, SIZES["vocab_size"], TOKENS), dict[int, Any]()
    resident = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in resident:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autocast("cpu", torch.bfloat16, enabled=weights == "fp32"):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(input_ids=ids, labels=ids).loss
        eager = sum(storage.nbytes() for storage in saved.values())
        saved.clear()
        del loss
        loss = torch.compile(model, backend=backend)(input_ids=ids, labels=ids).loss
    loss.backward()
    return eager, between


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for name in sys.argv[1:] or CASES:
        two, three = (kept(*CASES[name], layers) for layers in (2, 3))
        layer = [b - a for a, b in zip(two, three, strict=True)]
        rest = [total - 2 * of_layer for total, of_layer in zip(two, layer, strict=True)]
        row = {"id": name, "layer": layer, "outside": rest, "torch": torch.__version__.partition("+")[0]}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
