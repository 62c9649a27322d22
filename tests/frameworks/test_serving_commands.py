"""Commands of serving engines: their flags are the fields of a run."""

from __future__ import annotations

from typing import Any

import pytest

from memplan.core.errors import SpecError
from memplan.frameworks.reading.config import defaults_of
from memplan.frameworks.reading.run_file import RunFile, read_command
from memplan.frameworks.reading.run_format import FORMATS
from memplan.resolve.serving import resolve_serving
from memplan.spec.run import RunSpec

MODEL = "Qwen/Qwen2-7B"  # 28 layers, 32,768 positions
VLLM = f"vllm serve {MODEL}"
SGLANG = f"python -m sglang.launch_server --model-path {MODEL}"
TGI = f"text-generation-launcher --model-id {MODEL}"
LLAMA_CPP = f"llama-server -m {MODEL}"

COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{VLLM} --max-model-len 32k --max-num-seqs 64 --gpu-memory-utilization=0.85 --block-size 32": (
        "vllm-0.33",
        {
            "serving.max_model_len": 32_000,
            "serving.max_num_seqs": 64,
            "serving.memory_utilization": 0.85,
            "serving.block_size": 32,
        },
    ),
    "vllm serve Qwen/Qwen3-8B-AWQ --max-model-len 4096": (
        "vllm-0.33",
        {"model": "qwen3-8b", "serving.weights": "awq-int4"},
    ),
    f"{VLLM} -tp 4 -pp 2 --no-enable-prefix-caching --enforce-eager --dtype half": (
        "vllm-0.33",
        {
            "parallelism.world": 4 * 2,
            "serving.prefix_caching": False,
            "serving.cuda_graphs": False,
            "precision.weights": "fp16",
        },
    ),
    f"{VLLM} --max-model-len auto --quantization fp8 --kv-cache-dtype fp8_e4m3": (
        "vllm-0.33",
        {"serving.max_model_len": None, "serving.weights": "fp8-tensor", "serving.cache_dtype": "fp8_e4m3"},
    ),
    "vllm serve MiniMaxAI/MiniMax-M2 --quantization fp8": ("vllm-0.33", {"serving.weights": None}),  # stored so
    f"{VLLM} --enable-lora --max-loras 4 --max-lora-rank 64 --quantization awq_marlin": (
        "vllm-0.33",
        {"serving.lora_slots": 4, "serving.lora_rank": 64, "serving.weights": None},
    ),
    f"""{VLLM} --speculative-config '{{"method": "ngram", "num_speculative_tokens": 5}}'""": (
        "vllm-0.33",
        {"serving.speculative_method": "ngram", "serving.num_speculative_tokens": 5},
    ),
    "docker run --gpus all -p 8000:8000 vllm/vllm-openai:latest --model Qwen/Qwen2-VL-7B-Instruct "
    "--limit-mm-per-prompt.image 2 --limit-mm-per-prompt.video 0": (
        "vllm-0.33",
        {"serving.limit_images": 2, "serving.limit_videos": 0},
    ),
    "docker run --gpus all vllm/vllm-openai:v0.6.4.post1 --model Qwen/Qwen2-7B": ("vllm-0.6", {}),
    "docker run --gpus 2 vllm/vllm-openai:v0.9.2 --model Qwen/Qwen2-7B": ("vllm-0.11", {}),
    "docker run --gpus 2 vllm/vllm-openai:v0.11.2 --model Qwen/Qwen2-7B -tp 2": ("vllm-0.11", {"parallelism.world": 2}),
    f"{SGLANG} --tp 2 --mem-fraction-static 0.8 --context-length 8192 --chunked-prefill-size 4096": (
        "sglang-0.5",
        {
            "parallelism.world": 2,
            "serving.memory_utilization": 0.8,
            "serving.max_model_len": 8192,
            "serving.max_num_batched_tokens": 4096,
        },
    ),
    f"{SGLANG} --tp-size 8 --dp-size 4 --enable-dp-attention --disable-radix-cache": (
        "sglang-0.5",
        {"parallelism.world": 8, "parallelism.tp": 8 // 4, "parallelism.dp": 4, "serving.dp_attention": True},
    ),
    f"{SGLANG} --speculative-algorithm NGRAM --speculative-num-draft-tokens 6 --disable-cuda-graph": (
        "sglang-0.5",
        {
            "serving.speculative_method": "ngram",
            "serving.num_speculative_tokens": 6,
            "serving.cuda_graphs": False,
        },
    ),
    f"NUM_SHARD=2 {TGI} --max-input-tokens 1000 --max-total-tokens 1500 --quantize bitsandbytes-nf4": (
        "tgi-3",
        {
            "parallelism.world": 2,
            "serving.max_model_len": 1500,
            "serving.max_num_batched_tokens": 1000 + 50,
            "serving.weights": "nf4",
            "batch.sequence": 1500 - 256,
            "batch.new_tokens": 256,
        },
    ),
    f"{LLAMA_CPP} -c 16384 -np 2 -ngl 20 -fa on -ctk q8_0 -ctv q8_0": (
        "llama.cpp-2026",
        {
            "serving.max_model_len": 16384 // 2,
            "serving.max_num_seqs": 2,
            "serving.gpu_layers": 20,
            "serving.flash_attention": True,
            "serving.cache_dtype": "q8_0",
        },
    ),
    "LLAMA_ARG_CTX_SIZE=0 CUDA_VISIBLE_DEVICES=0,1 llama-server -m Qwen/Qwen2-7B -ub 256 --swa-full": (
        "llama.cpp-2026",
        {
            "serving.max_model_len": 32_768,
            "serving.max_num_seqs": None,
            "serving.max_num_batched_tokens": 256,
            "parallelism.world": 2,
            "serving.hybrid_cache": False,
        },
    ),
    f"llama-cli -m {MODEL} --tensor-split 3,1 -ngl all --split-mode layer": (
        "llama.cpp-2026",
        {"serving.tensor_split": [3.0, 1.0], "parallelism.world": 2, "serving.gpu_layers": None},
    ),
    "llama-server -hf unsloth/Qwen3.6-27B-GGUF:UD-Q4_K_XL -np 1 --spec-type draft-mtp --spec-draft-n-max 2": (
        "llama.cpp-2026",
        {
            "model": "qwen3.6-27b",
            "serving.weights": "UD-Q4_K_XL",
            "serving.speculative_method": "mtp",
            "serving.num_speculative_tokens": 2,
        },
    ),
    "llama-server -hf unsloth/Qwen3-30B-A3B-GGUF -ngl 99 -ot a=CPU -ot b=CUDA0,c=CPU -cmoe --n-cpu-ffn 2 -ncmoe 9": (
        "llama.cpp-2026",
        {
            "model": "qwen3-30b-a3b",
            "serving.weights": "Q4_K_M",
            "serving.n_cpu_moe": 9,
            "serving.override_tensor": [
                *("a=CPU", "b=CUDA0", "c=CPU"),
                r"\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU",
                r"blk\.(0|1)\.ffn_(up|down|gate)\.=CPU",
            ],
        },
    ),
}


def values(file: RunFile) -> dict[str, Any]:
    resolve_serving(RunSpec.model_validate(file.fields))  # the engine takes these settings
    return {origin.field: origin.value for origin in file.origins}


@pytest.mark.parametrize(("command", "expected"), COMMANDS.items(), ids=COMMANDS.keys())
def test_flags_of_an_engine_are_fields(command: str, expected: tuple[str, dict[str, Any]]) -> None:
    file = read_command(command)
    profile, fields = expected
    found = values(file)
    assert (found["profile"], found["task"], file.unread) == (profile, "generate", ())
    assert {field: found.get(field) for field in fields} == fields


def test_a_quantised_repository_of_llama_cpp_names_the_format() -> None:
    fields = read_command("llama-server -hf someone/Qwen2-7B-GGUF:Q4_K_M").fields
    assert (fields["model"], fields["serving"]["weights"]) == ("someone/Qwen2-7B-GGUF", "Q4_K_M")


LEFT_OUT = {
    f"{VLLM} --cpu-offload-gb 4": "cpu_offload_gb (vllm serve): weights or caches on the host, not supported yet",
    f"{VLLM} --max-modle-len 4": "max_modle_len (vllm serve): unknown key of vLLM; did you mean max_model_len?",
    f"{VLLM} --gpu l4": "gpu (vllm serve): unknown key of vLLM; memplan's own --gpu stands in front of --",
    f"{VLLM} --quantization made-up": "quantization (vllm serve): 'made-up': the weights are counted as the checkpoint",
    f"{SGLANG} --max-total-tokens 9": "max_total_tokens (sglang.launch_server): the pool's size, not supported yet",
    f"{LLAMA_CPP} -ctk q8_0 -ctv f16": "cache_type_k (llama-server): differs from cache_type_v",
    f"{LLAMA_CPP} --device CUDA1": "device (llama-server): where weights are, not supported yet",
    "llama-server -m google/gemma-3-4b-it": "parallel (llama-server): several slots share one cache: the windows",
}


@pytest.mark.parametrize(("command", "note"), LEFT_OUT.items())
def test_a_flag_that_is_not_counted_is_named(command: str, note: str) -> None:
    notes = read_command(command).notes
    assert len(notes) == 1
    assert notes[0].startswith(note)


REFUSED = {
    f"{VLLM} --max-model-len long": "vllm serve: max_model_len: must be a number of tokens, as in 32768 or 32K",
    f"{VLLM} --dtype int3": "vllm serve: dtype: must be auto, bfloat16, ",
    f"vllm bench {MODEL}": "vllm bench is not supported yet; supported: vllm serve",
    f"{LLAMA_CPP} -ts a,b": "llama-server: ts: must be proportions, as in 3,1, not 'a,b'",
    f"{LLAMA_CPP} -c many": "llama-server: c: must be a number, not 'many'",
}


@pytest.mark.parametrize(("command", "error"), REFUSED.items())
def test_a_wrong_flag_is_one_line(command: str, error: str) -> None:
    with pytest.raises(SpecError) as raised:
        read_command(command)
    assert error in str(raised.value)


@pytest.mark.parametrize(
    "form", [form for form in FORMATS.values() if form.module == "serving"], ids=lambda form: form.name
)
def test_every_row_of_an_engine_is_one_of_its_flags(form: Any) -> None:
    known = defaults_of(form.defaults[0]).keys
    rows = {key.key for key in form.table.keys} | set(form.matter) | set(form.aliases.values())
    assert rows - known == {"draft_max", "no_kv_offload"} & rows - known
