"""Ask llama.cpp what it reserves on simulated cards, and print rows for tests/golden/serving.jsonl.

python tests/golden/trace_llama_cpp.py SOURCES BUILD

SOURCES is llama.cpp's source tree (vendor/llama.cpp of llama-cpp-python 0.3.36's sdist) and BUILD where it was built:
cmake -DBUILD_SHARED_LIBS=ON -DLLAMA_BUILD_COMMON=OFF, then ninja llama. Files have headers only: nothing is loaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan import find_model
from memplan.program.stored.gguf import gguf_file
from memplan.spec.serving import Serving

_ALL = {"override_tensor": ["exps=CPU"]}
CASES: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("qwen3-30b-a3b", 1, {"n_cpu_moe": 24}),
    ("qwen3-30b-a3b", 1, {"n_cpu_moe": 24, "gpu_layers": 40}),
    ("qwen3-30b-a3b", 2, {"n_cpu_moe": 24}),
    ("qwen3-30b-a3b", 2, _ALL),
    ("mixtral-8x7b", 1, _ALL),
    ("deepseek-v2-lite", 1, _ALL),
    ("llama-3-8b", 1, {"override_tensor": [r"blk\.[0-3]\.ffn_(up|down|gate)\.=CPU"]}),
)
SOURCE = (
    "llama.cpp of llama-cpp-python 0.3.36, run without data (llama_model_params.no_alloc) on simulated cards: "
    "llama_get_memory_breakdown"
)


def write_header(name: str, path: Path) -> None:
    """Write the header of a model's F16 file, and make the file as long as it would be."""
    import gguf  # pyright: ignore[reportMissingImports]
    import numpy as np

    model = find_model(name)
    axes, number = model.axes(), model.config_int
    arch = model.family.checkpoint.gguf
    is_latent = "kl" in axes
    head = number("kv_lora_rank") + number("qk_rope_head_dim") if is_latent else axes["d"]
    fields: dict[str, int] = {
        "vocab_size": model.vocab_size,
        "block_count": model.num_hidden_layers,
        "context_length": model.max_position_embeddings or 32768,
        "embedding_length": model.hidden_size,
        "feed_forward_length": max(layer.f for layer in model.layers) or axes.get("m", 0),
        "attention.head_count": model.num_attention_heads,
        "attention.head_count_kv": 1 if is_latent else model.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": number("kv_lora_rank") if is_latent else head,
        "rope.dimension_count": number("qk_rope_head_dim") if is_latent else head,
    }
    if "E" in axes:
        fields |= {"expert_count": axes["E"], "expert_used_count": axes["e"]}
        fields["expert_feed_forward_length"] = axes.get("m") or max(layer.f for layer in model.layers)
    if is_latent:
        fields |= {
            "attention.kv_lora_rank": number("kv_lora_rank"),
            "attention.key_length_mla": number("qk_nope_head_dim") + number("qk_rope_head_dim"),
            "attention.value_length_mla": number("v_head_dim"),
            "leading_dense_block_count": number("first_k_dense_replace"),
            "expert_shared_count": number("n_shared_experts"),
            "expert_gating_func": 1,
        }
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    for key, value in fields.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-6)
    tensors = gguf_file(model, "F16").tensors
    for t in tensors:
        kind = gguf.GGMLQuantizationType[t.type]
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + sum(-(-t.bytes // 32) * 32 for t in tensors) + 64)


def main() -> None:
    sources, build = map(Path, sys.argv[1:])
    sys.path.insert(0, str(sources / "gguf-py"))
    with tempfile.TemporaryDirectory() as folder:
        program, libraries = Path(folder, "cards"), build / "bin"
        code = Path(__file__).with_name("trace_llama_cpp.cpp")
        include = [f"-I{sources / part}" for part in ("include", "ggml/include", "ggml/src", "src")]
        link = [f"-L{libraries}", "-lllama", "-lggml", "-lggml-base", "-lggml-cpu", f"-Wl,-rpath,{libraries}"]
        subprocess.run(["c++", "-std=c++17", *include, str(code), "-o", str(program), *link], check=True)
        for model, cards, more in CASES:
            file = Path(folder, f"{model}.gguf")
            if not file.exists():
                write_header(model, file)
            serving = {"max_model_len": 8192, "max_num_batched_tokens": 512, "flash_attention": True, "weights": "F16"}
            overrides = [f"{pattern}={buffer}" for pattern, buffer in Serving.model_validate(more).overrides]
            words = [str(program), str(file), str(cards), str(more.get("gpu_layers", 99)), "8192", "512", *overrides]
            out = subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()
            have = {name: [*map(int, numbers)] for name, *numbers in map(str.split, out)}
            what = f"{next(iter(more))} {next(iter(more.values()))}"
            row = {"kind": "reserved", "id": f"{model}, {what}, {cards}", "model": model, "cards": cards, "seqs": 1}
            row |= {"serving": serving | more, "cards_have": [have[f"CUDA{i}"] for i in range(cards)]}
            print(json.dumps(row | {"source": SOURCE}), flush=True)


if __name__ == "__main__":
    main()
