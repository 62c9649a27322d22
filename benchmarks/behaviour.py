"""Compare every answer of the command with the one it gave before, by a digest for each of hundreds of command lines.

    python -m benchmarks.behaviour               # the cases whose answers differ from tests/golden/behaviour.txt
    python -m benchmarks.behaviour --show plan   # the cases that contain "plan"; prints each answer that differs
    python -m benchmarks.behaviour --write       # writes the file again, after an intended change
    python -m benchmarks.behaviour --shuffle 3   # in another order: answers must not depend on it

Exits 1 if any case differs, is missing from the file, or is in the file alone. To see what changed, run one case with
`--show` in both checkouts and diff the two outputs.

A case is a command line of `memplan`, with a here-string if it reads standard input, and several commands if they are
joined by `&& memplan`. The digest covers exit code, standard output, standard error and the files that were written;
for an estimate that succeeds also the JSON of the answer, its ledger and its timeline. `grid: MODEL OPTIONS | AXIS
VALUES` is a case of `memplan.grid`, which has no command. Class names of a `repr` are left out, as are folders, the
version, and the dates and durations that cards and probes print.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import sys
import time
from collections.abc import Generator, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from typer.testing import CliRunner

import memplan
from benchmarks.sweep import FAMILIES, run_of
from memplan.cli.app import app
from tests.checkpoints import TINY, folder_of, gguf_tensors, of_model, write_gguf

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "behaviour.txt"
COMMANDS = ("estimate", "compare", "plan", "probe", "calibrate", "card", "models", "gpus", "profiles", "schema")

_SMALL = "smollm2-135m"
_GENERATE = "--method generate --seq-len 512 --new-tokens 32"


def _each(model: str, options: str) -> tuple[str, ...]:
    """Return a case for each line of `options`."""
    return tuple(f"{model} {line.strip()}" for line in options.strip().splitlines())


def _names(text: str) -> list[str]:
    return text.split()


# One card of each family.
_DECODERS = _names("""
    baichuan2-7b bloom-560m chatglm3-6b codegemma-7b command-r7b aya-expanse-8b dbrx deepseek-v2-lite deepseek-v3
    deepseek-v3.2 deepseek-v4-flash ernie-4.5-0.3b exaone-4.0-32b falcon-7b gemma-2-2b gemma-3-1b
    glm-4-9b glm-4-9b-0414 glm-4.5-air glm-4.7-flash glm-5 gpt-j-6b gpt-neo-1.3b gpt-neox-20b gpt-oss-20b gpt2
    granite-3.1-1b-a400m granite-3.3-2b hunyuan-7b internlm2-7b internlm3-8b jamba-v0.1 kimi-k2
    llama-3.2-1b mamba-130m mamba-codestral-7b mimo-7b mimo-v2-flash minicpm-2b minimax-m2 minimax-m3
    mistral-7b-v0.1 mixtral-8x7b mpt-7b moonlight-16b-a3b nemotron-3-nano-30b-a3b nemotron-4-340b
    nemotron-super-49b-v1 olmo-1b olmo-2-1b olmo-3-7b olmoe-1b-7b opt-125m opt-350m phi-2 phi-3-mini-4k phi-4-mini
    phi-3.5-moe qwen-1.8b qwen1.5-moe-a2.7b qwen2-0.5b qwen3-0.6b qwen3-30b-a3b
    qwen3.5-0.8b-text seed-oss-36b smollm3-3b stablelm-2-1.6b starcoderbase-1b starcoder2-3b step-3.7-flash
""")
# Estimates of training these take tens of seconds, so only generation is tested.
_LONG = _names("deepseek-moe-16b gemma-3n-e4b-text gemma-4-e2b kimi-k3 kimi-linear-48b-a3b granite-4.0-h-tiny")
# Families without a card, or with slow ones: small configs in the folder `small`.
_SMALL_CONFIGS = _names("""
    minicpm3 hunyuan_v1_moe ernie4_5_moe llama4_text ministral gemma3n_text gemma4_text kimi_linear deepseek_v4
    granitemoehybrid qwen3_next
""")
_VISION = _names("""
    llama-4-scout ministral-3-3b qwen2-vl-2b qwen2.5-vl-3b qwen3-vl-2b qwen3-vl-30b-a3b qwen3.5-9b qwen3.5-35b-a3b
""")
_ENCODERS = (
    *_each("bert-base-uncased", "--seq-len 512 --gpu t4\n--seq-len 512 --method forward --padded"),
    *_each("roberta-base", "--method lora --seq-len 256 --objective token_classification"),
    *_each("xlm-roberta-base", "--seq-len 256 --gpus 2 --fsdp fsdp2 --trainer\n--seq-len 256 --objective causal_lm"),
    *_each(
        "bge-reranker-v2-m3", "--method forward --seq-len 512 --batch-size 8 --gpu t4\n--method qlora --seq-len 512"
    ),
    *_each("vit-base", "--batch-size 8 --gpu t4 --dtype fp32\n--method lora --batch-size 4\n--method forward"),
    *_each("flan-t5-small", "--seq-len 256 --target-len 64 --gpu t4\n--method qlora --seq-len 256 --precision amp"),
    *_each("flan-t5-small", f"{_GENERATE} --num-beams 4 --gpu t4\n{_GENERATE} --gpus 2 --tp 2"),
    *_each("t5-base", "--method lora --seq-len 512 --gpus 2 --zero 2\n--method forward --seq-len 512 --target-len 32"),
    *_each("whisper-large-v3-turbo", "--method lora --batch-size 2 --gpu t4\n--method generate --new-tokens 64"),
)

_TRAINING = """
    --method full --gpu t4 --gpu 3060 --gpu h100
    --method freeze --trainable-layers 4 --gpu 3060
    --method lora --rank 64 --lora-dropout 0.1 --gpu 3060
    --method lora --targets q_proj,v_proj --modules-to-save lm_head --gpu t4
    --method qlora --gpu 3060 --explain
    --method qlora --quant-format int8 --kbit-preparation false --gpu t4
    --method qlora --quant-format fp4 --no-double-quant --quant-storage bf16
    --method qlora --quant-format gptq-int4 --gpu 3060
    --method qlora --quant-format awq-int4 --gpu 3060
    --method qlora --kbit-preparation trl --grad-accum 2
    --method qlora --fused lora --batch-size 2
    --method dora --gpu 3060
    --method qdora --rank 8 --gpu 3060
    --attention eager --no-gradient-checkpointing --seq-len 512
    --attention sdpa_math --no-gradient-checkpointing --padded --seq-len 512
    --attention flash_attention_2 --padded
    --attention sdpa_efficient --reentrant
    --loss chunked --hold-outputs
    --loss fused --fused rope,rms_norm,swiglu
    --loss fused --fused cross_entropy --no-gradient-checkpointing
    --loss chunked_lm_head --optimizer adafactor
    --precision amp --trainer --gpu 3060
    --precision mixed --optimizer adamw_torch
    --precision amp --dtype fp16
    --dtype fp16 --optimizer adamw_bnb_8bit --trainer
    --dtype fp32 --batch-size 3 --seq-len 100
    --trainer dpo --profile trl-1.13 --loss fused --precision autocast --batch-size 2 --seq-len 512
    --trainer dpo --profile unsloth-2026.10 --method lora --seq-len 512
    --trainer kto --profile trl-0.24 --precision autocast --batch-size 2 --seq-len 512
    --trainer kto --profile trl-1.6 --method lora --precision autocast --batch-size 2 --seq-len 512
    --trainer kto --profile trl-1.13 --loss fused --method lora --batch-size 2 --seq-len 512
    --trainer grpo --profile trl-1.13 --entropy-bonus --precision autocast --batch-size 8 --new-tokens 64
    --grad-accum 3 --no-foreach --optimizer adamw_torch
    --in-backward --optimizer sgd
    --checkpointing offload --gpu 3060
    --offload optimizer --gpu 3060
    --offload activations --no-gradient-checkpointing --method lora
    --expandable-segments --batch-size 4 --gpu 3060
    --objective sequence_classification --padded
    --batch-size 64 --seq-len 8192 --gpu h100 --strict
    --eval-batch-size 2 --eval-keep-logits 3 --gpu 3060
    --eval-batch-size 4 --eval-seq-len 256 --eval-keep-logits 4 --eval-accumulation-steps 2 --eval-preprocess argmax
    --eval-batch-size 2 --eval-generate 16
    --method lora --save --merge trained --gpu 3060
    --method lora --merge reloaded --eval-batch-size 1
    --method qlora --merge reloaded --eval-generate 8 --gpu 3060
    --save --gpus 2 --fsdp fsdp2 --eval-batch-size 2
    --save --gpus 2 --zero 3
"""
_OPTIMIZERS = _names("""
    adamw_torch adamw_anyprecision adamw_torch_4bit adamw_torch_8bit ademamix sgd adagrad adamw_8bit ademamix_8bit
    lion_8bit lion_32bit paged_adamw_32bit paged_adamw_8bit paged_ademamix_8bit paged_lion_8bit rmsprop rmsprop_bnb
    rmsprop_bnb_8bit galore_adamw galore_adamw_8bit galore_adafactor galore_adamw_layerwise lomo adalomo grokadamw
    schedule_free_radam schedule_free_adamw schedule_free_sgd apollo_adamw apollo_adamw_layerwise stable_adamw none muon
""")
_PROFILES = _names("""
    transformers-5.14 transformers-4.51 transformers-4.48 transformers-4.46 transformers-4.45 transformers-4.38
    transformers-4.35 trl-0.24 trl-0.13 axolotl-0.12 llamafactory-0.9 unsloth-2025 torchtune torchtune-0.1 torchtitan
    megatron-core megatron-swift fsdp_qlora litgpt-2024 litgpt-2023
""")

_SHARDED = """
    --gpus 2 --gpu 3060
    --gpus 8 --zero 0 --method lora
    --gpus 8 --zero 1 --precision mixed --gpu 3060
    --gpus 8 --zero 2 --precision mixed --dtype fp16
    --gpus 8 --zero 2 --grad-accum 4
    --gpus 8 --zero 3 --precision mixed --gpu 3060
    --gpus 4 --zero 3 --offload parameters
    --gpus 4 --zero 2 --offload optimizer --optimizer adamw_torch
    --gpus 4 --zero 3 --method qlora --kbit-preparation false
    --gpus 2 --zero 3 --batch-size 2 --seq-len 100 --explain
    --gpus 4 --deepspeed zero3.json --gpu 3060
    --gpus 4 --deepspeed zero2.json
    --gpus 8 --fsdp full_shard --precision amp --trainer --grad-accum 2
    --gpus 8 --fsdp full_shard --method lora
    --gpus 8 --fsdp shard_grad_op --gpu 3060
    --gpus 8 --fsdp no_shard
    --gpus 16 --fsdp hybrid_shard --gpu a100-80gb
    --gpus 2 --fsdp full_shard --method qlora --quant-storage bf16 --gpu 4090
    --gpus 4 --fsdp full_shard --offload parameters
    --gpus 8 --fsdp fsdp2 --gpu 3060 --format json
    --gpus 8 --fsdp fsdp2 --precision amp --trainer --grad-accum 2
    --gpus 4 --fsdp fsdp2 --method lora --trainer
    --gpus 2 --fsdp fsdp2 --method qlora --quant-storage bf16
    --gpus 4 --fsdp fsdp2 --method dora
    --gpus 4 --fsdp fsdp2 --offload parameters
    --gpus 4 --fsdp fsdp2 --offload activations --no-gradient-checkpointing
    --gpus 4 --fsdp fsdp2 --optimizer sgd --gpus-per-node 2
"""
_DIVIDED = """
    --tp 2 --gpu 3060
    --gpus 4 --tp 2 --fsdp fsdp2 --precision amp
    --tp 4 --method lora --gpu t4
    --gpus 2 --cp 2 --fsdp fsdp2 --seq-len 4096
    --gpus 8 --cp 4 --fsdp fsdp2 --seq-len 8192 --method lora
    --pp 2 --gpu 3060 --ranks
    --pp 4 --grad-accum 8 --schedule gpipe --profile torchtitan --ranks
    --pp 2 --profile megatron-core --grad-accum 4 --seq-len 512
    --gpus 4 --pp 2 --tp 2 --profile megatron-core --grad-accum 4 --sequence-parallel
    --gpus 8 --pp 2 --tp 2 --profile torchtitan --fsdp fsdp2 --grad-accum 4 --precision amp --gpu h100
    --gpus 4 --pp 4 --virtual-stages 2 --grad-accum 4 --profile torchtitan --stage 3
    --gpus 2 --pp 2 --first-stage-layers 3 --profile megatron-core --grad-accum 2
    --gpus 2 --pp 2 --last-stage-layers 3 --no-ends-as-layers --profile torchtitan --grad-accum 2
    --gpus 2 --pp 2 --schedule device_map --method lora --ranks --format markdown
    --gpus 4 --pp 2 --zero 1 --grad-accum 4
    --profile torchtitan --gpus 4 --tp 2 --sequence-parallel --fsdp fsdp2 --precision amp --gpu h100
    --profile megatron-core --tp 2 --sequence-parallel --seq-len 4096 --gpu h100
"""
_STATES = (
    *_each("falcon-mamba-7b", "--method lora --seq-len 128"),
    *_each("mamba-130m", "--method lora --targets in_proj,x_proj --gpu t4\n--seq-len 512 --explain\n--method forward"),
    *_each("mamba-codestral-7b", "--method qlora --targets in_proj --seq-len 512 --gpu 3090\n--seq-len 256"),
    *_each("jamba-v0.1", "--method qlora --targets q_proj,v_proj --seq-len 512\n--method forward --seq-len 128"),
    *_each("nemotron-3-nano-30b-a3b", f"--method lora --targets q_proj --seq-len 512\n{_GENERATE} --gpu h100"),
    *_each(
        "qwen3.5-0.8b-text", f"--seq-len 512 --gpu t4\n{_GENERATE} --batch-size 8\n{_GENERATE} --profile vllm --gpu l4"
    ),
)
_EXPERTS = (
    *_each("qwen3-30b-a3b", "--gpus 8 --ep 8 --fsdp fsdp2 --seq-len 4096 --gpu h100\n--gpus 8 --zero 3 --method lora"),
    *_each("olmoe-1b-7b", "--gpus 4 --ep 4 --fsdp fsdp2\n--gpus 4 --fsdp full_shard\n--gpus 2 --tp 2 --method lora"),
    *_each("mixtral-8x7b", "--method lora --targets q_proj,v_proj --tp 8 --ep 8 --seq-len 4096 --gpu a100-80gb"),
    *_each("gpt-oss-20b", "--method lora --gpus 2 --zero 2\n--gpus 8 --ep 8 --fsdp fsdp2\n--method generate --tp 2"),
    *_each("deepseek-v2-lite", "--gpus 8 --fsdp fsdp2 --method lora\n--method generate --gpus 2 --tp 2"),
)
_IMAGES = (
    *_each("gemma-3-4b", "--images 1 --gpu h100"),
    *_each("kimi-k2.5", "--images 1\n--method lora --targets o_proj --seq-len 512"),
    *_each("gemma-3-4b", "--images 1 --method lora --gpu 4090\n--images 1 --gpus 4 --fsdp fsdp2"),
    *_each(
        "qwen2.5-vl-3b",
        "--method lora --images 1 --image-size 1024\n--images 1 --image-size 448 --frozen vision\n--images 1",
    ),
    *_each(
        "qwen2-vl-2b", "--images 2 --image-size 768x1024 --seq-len 4096 --frozen language --no-gradient-checkpointing"
    ),
    *_each(
        "qwen3-vl-2b",
        "--method generate --images 1 --image-size 448\n--method generate --profile vllm --limit-images 0 --gpu l4",
    ),
    *_each("llama-3.2-11b-vision", "--method qlora --images 1 --seq-len 2048\n--method forward --images 1"),
)

_RUNNING = """
    --method forward --batch-size 2 --gpu t4
    --method forward --padded --attention eager --seq-len 512
    --method forward --profile litgpt-2023
    --method generate --batch-size 4 --padded --num-beams 3 --gpu t4
    --method generate --dtype fp32 --do-sample --attention eager
    --method generate --cache-implementation static --explain
    --method generate --cache-implementation offloaded --prefill-chunk-size 512
    --method generate --cache-implementation offloaded_static
    --method generate --cache-implementation legacy --profile transformers-4.46
    --method generate --cache-implementation quantized
    --method generate --cache-implementation quantized --cache-backend hqq --cache-bits 2 --cache-group-size 32
    --method generate --cache-implementation quantized --cache-backend fp8 --num-beams 2
    --method generate --cache-implementation quantized --cache-residual 64 --batch-size 8
    --method generate --prompt-lookup-num-tokens 3
    --method generate --assistant-early-exit 4 --gpu t4
    --method generate --quant-format nf4 --gpu t4
    --method generate --quant-format int8
    --method generate --quant-format awq-int4
    --method generate --quant-format gptq-int8
    --method generate --quant-format fp8 --gpu h100
    --method generate --quant-format mxfp4
    --method generate --tp 2 --gpu t4
    --method generate --gpus 2 --device-map auto --gpu t4 --ranks
    --method generate --gpus 3 --device-map balanced_low_0 --stage 1
    --method generate --device-map sequential --gpu 3060
    --method generate --profile transformers-4.48
    --method generate --profile transformers-4.35
    --method generate --profile litgpt-2024 --gpu t4
    --method generate --profile litgpt-2023 --quant-format nf4
    --method forward --gpus 4 --fsdp fsdp2
"""
_SERVING = """
    --profile vllm --gpu 4090
    --profile vllm-0.11 --gpu 4090 --seq-len 2000
    --profile vllm --gpu l4 --stored fp8 --cache-dtype fp8 --lora-slots 2 --lora-rank 32
    --profile vllm --gpu l4 --stored w4a16 --max-model-len 4096 --speculative-method ngram --num-speculative-tokens 3
    --profile vllm --gpu l4 --gpus 2 --tp 2 --max-num-seqs 64 --max-num-batched-tokens 4096
    --profile vllm --gpu l4 --memory-utilization 0.5 --block-size 32 --no-cuda-graphs --no-prefix-caching
    --profile vllm --gpu h100 --batch-size 10000
    --profile sglang --gpu 4090
    --profile sglang --gpu l4 --gpus 2 --dp-attention --max-model-len 4096
    --profile sglang --gpu l4 --gpus 2 --tp 2 --cache-dtype fp8
    --profile tgi --gpu 4090
    --profile tgi --gpu l4 --stored awq-int4 --gpus 2 --tp 2
    --profile llama.cpp --gpu 3060 --stored Q4_K_M
    --profile llama.cpp --gpu 3060 --gpus 2 --stored Q4_K_M --tensor-split 3,1 --ranks
    --profile llama.cpp --gpu 3060 --gpus 2 --split-mode none --main-gpu 1 --stored Q8_0
    --profile llama.cpp --gpu 3060 --stored Q6_K --gpu-layers 8 --cache-dtype q8_0 --max-num-seqs 4
"""
_SERVED = (
    *_each(
        "smollm2-360m",
        """
        --method generate --assistant-model smollm2-135m --num-assistant-tokens 5
        --method generate --assistant-model smollm2-135m --assistant-quant-format nf4 --gpu t4
        --method generate --assistant-model smollm2-135m --assistant-dtype fp32 --seq-len 512
        --method generate --assistant-model smollm2-135m --num-assistant-tokens-schedule heuristic
        --method generate --assistant-model qwen2-0.5b
        --method generate --profile vllm --gpu l4 --draft-model smollm2-135m --num-speculative-tokens 4
        --method generate --profile vllm --gpu l4 --draft-model smollm2-135m --draft-weights fp8
        --method generate --profile sglang --gpu l4 --draft-model smollm2-135m
        --method generate --profile vllm --gpu l4 --draft-model qwen2-0.5b --num-speculative-tokens 4
        """,
    ),
    *_each(
        "deepseek-v2-lite", "--method generate --profile vllm --gpu h100\n--method generate --profile sglang --gpu h100"
    ),
    *_each(
        "qwen3-30b-a3b", "--method generate --profile vllm --gpu h100\n--method generate --profile llama.cpp --gpu 4090"
    ),
    *_each("gpt-oss-20b", "--method generate --profile vllm --gpu h100\n--method generate --profile sglang --gpu 4090"),
    *_each(
        "qwen3-next-80b-a3b", "--method generate --profile vllm --gpu h200\n--method generate --profile tgi --gpu h200"
    ),
    *_each("gemma-3-1b", "--method generate --profile vllm --gpu l4\n--method generate --profile llama.cpp --gpu l4"),
    *_each("mamba-130m", "--method generate --profile vllm --gpu l4\n--method generate --profile llama.cpp --gpu l4"),
    *_each("deepseek-v3", "--method generate --profile vllm --gpu h200 --gpus 8 --tp 8 --speculative-method mtp"),
    *_each(
        "qwen2.5-vl-3b",
        "--method generate --profile vllm --gpu l4 --limit-videos 0\n--method generate --profile sglang",
    ),
)

_FILES = (
    *_each("config.json", "--gpu 3060\n--method lora --json\n--method generate --gpu t4"),
    *_each("checkpoint", "--gpu 3060 --json\n--method generate\n--method generate --profile vllm --gpu l4"),
    *_each(
        "model.gguf", "--method generate --gpu t4 --json\n--method generate --profile llama.cpp --gpu t4\n--method lora"
    ),
    "--spec run.yaml",
    "--spec run.yaml --batch-size 2 --json",
    "--spec run.json --strict --format markdown --output table.md",
    "--spec run.json --output answer.html",
    "--spec run.json --explain --output answer.csv",
    "card new config.json",
    "card new checkpoint --hf-id someone/something",
    "card new model.gguf --out card.toml",
    "card new llama-3.2-1b",
    "calibrate lines.jsonl",
    "calibrate lines.jsonl --output profile.json",
    "calibrate run.json",
    "calibrate none.jsonl",
    "calibrate lines.jsonl && memplan smollm2-135m --gpu 3090 && memplan smollm2-135m --gpu 3090 --no-calibration",
    "calibrate lines.jsonl && memplan plan smollm2-135m --batch-size 32 --gpu 3090",
    "probe smollm2-135m",
    "probe --suite suite.jsonl --dry-run --gpu 3090 --json",
    "probe smollm2-135m --trace --zero 3 --gpus 2",
)


def _spec(**fields: Any) -> str:
    """Return a case that reads a run from standard input, for fields without an option."""
    return f"--spec - <<< {shlex.quote(json.dumps({'model': _SMALL, **fields}))}"


_MEGATRON = {
    "config": {
        "model_type": "megatron_gpt",
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 1024,
        "max_position_embeddings": 1024,
    }
}
_SPECS = (
    _spec(),
    _spec(gpu="3060", parallelism={"world": 8, "dp": 8, "strategy": "fsdp2", "reshard_after_forward": False}),
    _spec(parallelism={"world": 8, "dp": 8, "strategy": "fsdp", "shard_group": 4, "forward_prefetch": True}),
    _spec(parallelism={"world": 8, "dp": 8, "strategy": "fsdp", "backward_prefetch": "post"}),
    _spec(parallelism={"world": 4, "dp": 4, "strategy": "fsdp2", "cpu_ram_efficient_loading": False}),
    _spec(parallelism={"world": 4, "dp": 4, "strategy": "ddp", "bucket_view": True, "static_graph": True}),
    _spec(parallelism={"world": 4, "dp": 4, "strategy": "zero2", "zero": {"reduce_bucket_size": 2000000}}),
    _spec(model="tinyllama-1.1b", parallelism={"world": 4, "cp": 4, "strategy": "zero3", "context": "ulysses"}),
    _spec(
        model="olmoe-1b-7b", parallelism={"world": 4, "dp": 4, "ep": 4, "strategy": "fsdp2", "expert_imbalance": 1.5}
    ),
    _spec(method={"kind": "lora", "adapter_dtype": "fp32", "alpha": 32, "targets": ["q_proj"]}),
    _spec(method={"kind": "qlora", "quantization": {"format": "nf4", "double_quant": False}}),
    _spec(optimizer={"name": "sgd", "momentum": 0.9}, loop={"clip_grad_norm": 0.0}),
    _spec(precision={"weights": "bf16", "autocast": True, "grads": "fp32"}, loop={"grad_scaler": True}),
    _spec(task="generate", serving={"hybrid_cache": False}, profile="vllm-0.33", gpu="l4"),
    _spec(task="generate", serving={"flash_attention": False}, profile="llama.cpp-2026", gpu="l4"),
    _spec(model=_MEGATRON, profile="megatron-core", batch={"sequence": 512}),
    _spec(
        model=_MEGATRON,
        profile="megatron-core",
        batch={"sequence": 512, "accumulation": 4},
        parallelism={"world": 8, "dp": 2, "tp": 2, "pp": 2, "sequence_parallel": True, "strategy": "ddp"},
    ),
    _spec(kernels={"compile": True}),
    _spec(kernels={"checkpointing": "selective"}),
    _spec(precision={"compute": "fp8"}),
    _spec(method={"kind": "vera"}),
    _spec(method={"kind": "lora", "options": {"bias": "all"}}),
    _spec(parallelism={"world": 8, "dp": 3, "strategy": "ddp"}),
    _spec(parallelism={"world": 2, "dp": 2, "strategy": "ddp", "zero": {"reduce_bucket_size": 2}}),
    _spec(batches={"micro": 2}),
    _spec(batch={"micro": "many"}),
    _spec(model={"config": {"model_type": "llama", "hidden_size": 7}}),
    "--spec - <<< 'model: [unclosed'",
    "--spec none.yaml",
)

_REFUSED = """
    --batch-size 0
    --batch-size many
    --seq-len -1
    --seq-len 100000000
    --method loar
    --method full --rank 8
    --method lora --rank 0
    --method lora --targets nothing_proj
    --optimizer adamv
    --optimizer adamw_bnb_8bit --gpus 2 --fsdp fsdp2
    --dtype bf17
    --precision ampp
    --attention flash
    --gpu h1000
    --gpu 3090 --gpu h1000
    --profile transfomers-5
    --format pdf
    --json --format csv
    --frozen vision
    --images 1
    --new-tokens 8
    --num-beams 2
    --cache-implementation static
    --method generate --cache-dtype fp8
    --method generate --grad-accum 2
    --method generate --gpus 2 --fsdp fsdp2
    --method generate --save
    --method generate --profile vllm
    --method generate --profile vllm --gpu t4 --stored Q4_K_M
    --method generate --profile vllm --gpu t4 --num-beams 2
    --method forward --new-tokens 8
    --max-model-len 1024
    --gpus 3 --tp 2
    --tp 7
    --pp 2 --stage 2
    --pp 2 --zero 3
    --pp 2 --fsdp full_shard
    --ep 2
    --gpus 4 --zero 4
    --gpus 4 --fsdp fsdp3
    --gpus 4 --zero 3 --fsdp fsdp2
    --gpus 4 --fsdp fsdp2 --method qdora
    --gpus 2 --zero 1 --offload parameters
    --sequence-parallel
    --schedule gpipe
    --device-map auto
    --gpus 2 --deepspeed none.json
    --in-backward --grad-accum 2
    --eval-accumulation-steps 2
    --merge trained
    --lora-dropout 2
    --offload everything
    --output /nowhere/a.md
    --revision main
    --no-such-option
    --objective seq2seq_lm
    --trainable-layers 2
    --quant-format nf4
    --via engine --seq-len 128
"""
_REFUSED_MODELS = (
    "estimate",
    "qwen2-7",
    "someone/something",
    "someone/something --json",
    "run.yaml",
    "none.json",
    "unknown.json --via engine",
    "gpt2 --seq-len 2048",
    "vit-base --method generate",
    "bert-base-uncased --method generate",
    "mamba-130m --tp 2",
    "emit smollm2-135m",
    "serve --workers 0",
    "webhook --tight maybe",
)

_FORMATS = tuple(
    f"{command} --format {format}"
    for format in ("table", "json", "markdown", "csv", "html")
    for command in (
        f"{_SMALL} --gpu 3060",
        f"{_SMALL} --method lora --explain --gpu t4",
        f"{_SMALL} --gpu t4 --gpu h100",
        "tinyllama-1.1b --pp 2 --ranks",
        f"{_SMALL} {_GENERATE}",
        f"{_SMALL} --method generate --profile vllm --gpu l4",
        f"compare '{_SMALL} --method lora' '{_SMALL} --method qlora' --gpu 3060",
        f"plan {_SMALL} --batch-size 32 --gpu 3060",
        f"plan {_SMALL} --method lora --gpu 3060 --max batch",
    )
)
_COMPARISONS = (
    f"compare {_SMALL} qwen2-0.5b gpt2 --seq-len 512 --gpu 3060 --gpu t4",
    f"compare '{_SMALL} --gpus 4 --zero 3' '{_SMALL} --gpus 4 --fsdp fsdp2' '{_SMALL} --gpus 4'",
    f"compare '{_SMALL} --method generate' '{_SMALL} --method generate --num-beams 4' --gpu t4",
    "compare 'tinyllama-1.1b --pp 2' 'tinyllama-1.1b --tp 2' --ranks",
    "compare run.yaml 'run.yaml --batch-size 4' --format markdown --output table.md",
    "compare gemma-3-4b 'gemma-3-4b --images 1' --method lora",
    f"compare {_SMALL}",
    f"compare {_SMALL} '{_SMALL} --method lora' --rank 8",
    f"compare {_SMALL} gpt2 --explain",
)
_PLANS = tuple(
    f"plan {line.strip()}"
    for line in """
    pythia-70m --gpu 3060 --batch-size 9
    qwen2-0.5b --gpu 3060 --batch-size 8 --explain
    qwen2-7b --gpu 3090 --json
    qwen2-7b --method lora --gpu 4060-ti-16gb
    qwen2.5-72b --gpu t4
    olmoe-1b-7b --gpu 4090
    qwen2-0.5b --gpu 3060 --ladder
    qwen2-0.5b --gpu 3060 --ladder --format json
    qwen2-0.5b --ladder --format csv
    qwen2-0.5b --gpu 3060 --advice
    qwen2-7b --gpu 4060-ti-16gb --advice --json
    pythia-70m --method lora --gpu 3060 --max rank
    pythia-70m --method lora --gpu 3060 --max sequence --format json
    pythia-70m --method qlora --gpu 3060 --max model
    pythia-70m --method lora --gpu 3060 --max batch --headroom 11.5GiB
    pythia-70m --method generate --gpu t4 --max batch
    pythia-70m --gpu t4 --batch-size 16 --tight --headroom 2GiB
    qwen2-0.5b --gpu 3060 --gpus 2 --fsdp fsdp2 --batch-size 8
    pythia-70m --method lora --buy --most 5
    pythia-70m --method lora --buy --tokens 100M --most 6 --format markdown
    pythia-70m --method lora --buy --tokens 100M --most 6 --json
    qwen2-72b --method qlora --have 4x3090,1xa100 --each
    pythia-70m --vendor amd --market datacenter --max-price 5 --format csv
    pythia-70m --min-memory 20GiB --max-memory 30GiB --count 1 --count 2
    llama-3.1-8b --method generate --profile vllm-0.33 --have 2xl4,8x3090,2xh100
    qwen3-0.6b --method generate --gpu t4
    qwen3-0.6b --method generate --gpu t4 --json
    llama-3.1-8b --method generate --profile vllm-0.33 --gpu 4090 --seq-len 8000 --new-tokens 192
    llama-3.2-1b --method generate --profile sglang --gpu l4 --format markdown
    llama-3.2-1b --method generate --profile llama.cpp --gpu 3060 --stored Q4_K_M
    llama-3.1-8b --gpu a100-80gb --nodes 1 --gpus 4
    llama-3.1-8b --gpu a100-80gb --nodes 1 --gpus 4 --json --most 2
    llama-3.1-8b --gpu h100 --nodes 2 --gpus 4 --tp 2 --pp 1 --global-batch 64 --network-gbps 100 --explain
    llama-3.1-8b --precision amp --nodes 1 --gpus 8 --gpu h100 --fsdp fsdp2 --emit accelerate
    llama-3.1-8b --precision mixed --nodes 1 --gpus 8 --gpu h100 --zero 3 --emit deepspeed
    llama-3.2-1b --gpu h100 --nodes 2 --gpus 4 --emit torchrun
    llama-3.1-8b --precision amp --gpu h100 --nodes 1 --gpus 8 --profile torchtitan --emit torchtitan
    llama-3.2-1b --precision mixed --gpu h100 --nodes 1 --gpus 4 --profile megatron-core --emit megatron
    llama-3.2-1b --gpu h100 --nodes 2 --gpus 4 --emit accelerate --output accelerate.yaml
    pythia-70m --gpu 3060 --nodes 1 --gpus 2 --emit accelerate --pp 2
    pythia-70m --gpu 3060 --nodes 1 --gpus 2 --emit megatrom
    pythia-70m --gpu 3060 --emit megatron
    pythia-70m --gpu 3060 --nodes 2 --gpus 4 --tp 3
    pythia-70m --nodes 2 --gpus 8
    pythia-70m --gpu 3060 --ladder --buy
    pythia-70m --gpu 3060 --max batches
    pythia-70m --gpu 3060 --max rank
    pythia-70m --gpu 3060 --headroom two
    pythia-70m --gpu 3060 --tokens 1e9
    pythia-70m --gpu 3060 --gpu t4
    pythia-70m --gpu 3060 --format html
    pythia-70m --method forward --gpu 3060
    pythia-70m --vendor nvidea
    pythia-70m --have 2x309
    pythia-70m --max-price 0.0001
    pythia-70m --advice
    """.strip().splitlines()
)
_GRIDS = (
    "grid: pythia-70m --method lora --gpu 3060 | batch 1 2 8 64 | sequence 128 512 2048 4096",
    "grid: smollm2-135m --method qlora --gpu t4 --padded | batch 1 3 | rank 8 64 | sequence 100 1000",
    "grid: smollm2-135m --gpus 4 --fsdp fsdp2 | batch 1 2 4",
    "grid: bert-base-uncased --seq-len 128 | batch 1 16 | sequence 128 1024",
    "grid: pythia-70m | batch",
    "grid: pythia-70m --method generate | batch 1",
    "grid: pythia-70m | rank 8",
)
_LISTS = (
    *(f"{command} --help" for command in ("", *COMMANDS, "card new")),
    *("models", "models gemma-2", "models --json", "models nothing-like-this"),
    *("gpus", "gpus 4060", "gpus --json", "gpus nothing-like-this"),
    *("profiles", "profiles litgpt --json", "profiles vllm", "profiles nothing-like-this"),
    *("schema", "schema run", "schema comparison", "schema plan", "schema answers"),
)
# Steps traced with the installed torch and transformers.
_TRACED = (
    "config.json --via trace --method lora --seq-len 64 --no-cache",
    "probe config.json --trace --seq-len 64 --json",
)

CASES: tuple[str, ...] = tuple(
    line.strip()
    for line in dict.fromkeys(
        (
            *(f"{model} --method lora --gpu h100 --seq-len 1024" for model in _DECODERS),
            *(f"{model} --gpus 8 --zero 3 --seq-len 512" for model in _DECODERS[::3]),
            *(f"{model} --gpus 8 --fsdp fsdp2 --precision amp --seq-len 512" for model in _DECODERS[1::3]),
            *(f"{model} {_GENERATE}" for model in _DECODERS[2::3]),
            *(f"{model} {_GENERATE}" for model in _LONG),
            *(f"small/{name}/config.json --method lora --seq-len 128" for name in _SMALL_CONFIGS),
            *(
                f"small/{name}/config.json --gpus 4 --fsdp fsdp2 --precision amp --seq-len 128"
                for name in _SMALL_CONFIGS
            ),
            *(f"{model} --images 1 --image-size 448 --method full --gpu h100" for model in _VISION),
            *_ENCODERS,
            *_each(_SMALL, _TRAINING),
            *(f"{_SMALL} --optimizer {name} --seq-len 512" for name in _OPTIMIZERS),
            *(f"{_SMALL} --profile {name} --method full --gpu 3060" for name in _PROFILES),
            *(f"tinyllama-1.1b --profile {name} --method qlora --padded" for name in _PROFILES),
            *_each(_SMALL, _SHARDED),
            *_each("tinyllama-1.1b", _DIVIDED),
            *_STATES,
            *_EXPERTS,
            *_IMAGES,
            *_each("llama-3.2-1b", _RUNNING),
            *(case.replace(" ", " --method generate ", 1) for case in _each("llama-3.2-1b", _SERVING)),
            *_SERVED,
            *_FILES,
            *_SPECS,
            *_each(_SMALL, _REFUSED),
            *_REFUSED_MODELS,
            *_FORMATS,
            *_COMPARISONS,
            *_PLANS,
            *_GRIDS,
            *_LISTS,
            *_TRACED,
        )
    )
)

_FOLDER = "FOLDER"
_CACHE = "cache"  # kept between cases: traces compile a helper there
_CLASS = re.compile(r"\b_?[A-Z]\w*\(")
_DATED = ("card", "probe")
_DATE = re.compile(r"\d{4}-\d\d-\d\d(T[\d:]+(\+00:00|Z)?)?")
_DURATION = re.compile(r"\b\d+(\.\d+)? (ms|s|min|seconds|minutes)\b|\"seconds\": [\d.]+")


@contextlib.contextmanager
def workplace() -> Generator[None]:
    """Make a temporary folder with the files that cases name, and work in it."""
    with TemporaryDirectory() as name, contextlib.chdir(name):
        _write_files(Path())
        yield


def _write_files(folder: Path) -> None:
    def write(name: str, value: object) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")

    write("config.json", TINY)
    write("unknown.json", {**TINY, "model_type": "flex_olmo"})
    for name in _SMALL_CONFIGS:
        write(f"small/{name}/config.json", {"model_type": name, **FAMILIES[name]})
    run = {"model": _SMALL, "method": "qlora", "gpu": "3090"}
    write("run.json", run)
    write("run.yaml", "model: smollm2-135m\nmethod: qlora\ngpu: 3090\n")
    zero: dict[str, Any] = {"stage": 3, "reduce_bucket_size": 10**7, "offload_optimizer": {"device": "cpu"}}
    write("zero3.json", {"zero_optimization": zero, "bf16": {"enabled": True}})
    write("zero2.json", {"zero_optimization": {"stage": 2, "overlap_comm": True}, "gradient_accumulation_steps": 2})
    lines = [_measured({**run, "batch": {"micro": micro}}, micro) for micro in range(1, 24)]
    write("lines.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
    write("suite.jsonl", "".join(f"{json.dumps({**run, 'batch': {'micro': micro}})}\n" for micro in (1, 2)))
    folder_of(folder / "checkpoint", TINY, of_model(TINY))
    write_gguf(folder / "model.gguf", *_gguf())


def _measured(run: dict[str, Any], micro: int) -> dict[str, Any]:
    """Return a row like those of `memplan probe --suite`, with invented bytes."""
    reserved = (1 + micro) * 700 * 2**20
    return {
        "run": run,
        "outcome": "measured",
        "reserved": reserved,
        "process": reserved + 500 * 2**20,
        "context": {"first": 400 * 2**20, "last": 480 * 2**20},
        "driver": "550.54.15",
        "allocator": "",
        "stack": "torch 2.13.0",
        "date": f"2026-01-{micro:02}T10:00:00+00:00",
    }


def _gguf() -> tuple[dict[str, Any], list[tuple[str, str, Sequence[int]]]]:
    """Return the metadata and tensors of a small llama, as llama.cpp writes them."""
    heads = TINY["num_attention_heads"]
    metadata = {
        "general.architecture": "llama",
        "general.name": "Small",
        "llama.context_length": 2048,
        "llama.embedding_length": TINY["hidden_size"],
        "llama.block_count": TINY["num_hidden_layers"],
        "llama.feed_forward_length": TINY["intermediate_size"],
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": TINY["num_key_value_heads"],
        "llama.rope.dimension_count": TINY["hidden_size"] // heads,
        "llama.vocab_size": TINY["vocab_size"],
    }
    return metadata, gguf_tensors(TINY)


def text_of(case: str) -> str:
    """Return everything that a case prints, writes and answers, inside `workplace`."""
    if case.startswith("grid: "):
        return _normal(case, _grid(case.removeprefix("grid: ")))
    before = _paths()
    try:
        parts = [_command(line) for line in case.split(" && memplan ")]
        for path in sorted(_paths() - before):
            if path.is_file():
                parts.append(f"--- {path}\n{path.read_text('utf-8')}")
    finally:
        for path in sorted(_paths() - before, reverse=True):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    return _normal(case, "\n".join(parts))


def _paths() -> set[Path]:
    return {path for path in Path().rglob("*") if path.parts[0] != _CACHE}


def _command(line: str) -> str:
    """Return the exit code and output of one command; for an estimate that succeeds also the library's answer."""
    words, _, typed = line.partition(" <<< ")
    standard_input = "".join(shlex.split(typed))
    home = str(Path.cwd() / "home")
    environment = {
        "COLUMNS": "120",
        "NO_COLOR": "1",
        "XDG_CONFIG_HOME": home,
        "XDG_CACHE_HOME": str(Path.cwd() / _CACHE),
        "HF_HOME": home,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    result = CliRunner().invoke(app, shlex.split(words), input=standard_input, env=environment)
    parts = [f"exit {result.exit_code}", "--- standard output", result.stdout, "--- standard error", result.stderr]
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        parts.append(f"crash: {result.exception!r}")
    model, _, options = words.partition(" ")
    is_estimate = model not in COMMANDS and not model.startswith("-") and "--deepspeed" not in options
    is_estimate = is_estimate and not model.endswith(".yaml")  # a run's file
    if is_estimate and result.exit_code in (0, 1) and "--via" not in options:
        parts.append(_answer(model, options))
    return "\n".join(parts)


def _answer(model: str, options: str) -> str:
    answer = memplan.estimate(run_of(model, options))
    return "\n".join(("--- answer", answer.model_dump_json(), repr(answer.ledger), repr(answer.timeline)))


def _grid(case: str) -> str:
    command, *axes = case.split(" | ")
    model, _, options = command.partition(" ")
    named: dict[str, Any] = {name: [*map(int, values)] for name, *values in map(str.split, axes)}
    try:
        grid = memplan.grid(run_of(model, options), **named)
    except memplan.MemplanError as error:
        return f"error: {error}"
    verdict = None if grid.verdict is None else grid.verdict.tolist()
    return repr((grid.axes, grid.allocated.tolist(), grid.phases.tolist(), verdict, grid.unclear))


def _normal(case: str, text: str) -> str:
    """Return the text without folders, class names, the version, and the dates and durations of cards and probes."""
    for folder in (str(Path.cwd()), os.path.realpath("."), str(ROOT)):
        text = text.replace(folder, _FOLDER)
    text = _CLASS.sub("(", text).replace(memplan.__version__, "VERSION")
    if case.startswith(_DATED):
        text = _DURATION.sub("DURATION", _DATE.sub("DATE", text))
    return text


def digest(text: str) -> str:
    """Return the first 16 hexadecimal digits of the text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def golden() -> dict[str, str]:
    """Return the digest of each case in the golden file, by case."""
    lines = GOLDEN.read_text("utf-8").splitlines() if GOLDEN.exists() else []
    return {case: found for found, _, case in (line.partition("  ") for line in lines)}


def cases(text: str = "") -> list[str]:
    """Return the cases that contain `text`, without those that need torch if it is not installed."""
    traces = find_spec("torch") is not None
    return [case for case in CASES if text in case and (traces or case not in _TRACED)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare every answer with the one it gave before.")
    parser.add_argument("text", nargs="?", default="", help="only cases that contain this")
    parser.add_argument("--write", action="store_true", help="write the digests to tests/golden/behaviour.txt")
    parser.add_argument("--show", action="store_true", help="print every answer that differs")
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="run the cases in another order")
    parser.add_argument("--times", action="store_true", help="print the ten slowest cases")
    given = parser.parse_args(argv)
    todo = cases(given.text)
    if given.shuffle is not None:
        random.Random(given.shuffle).shuffle(todo)
    gc.set_threshold(2_000_000, 10, 10)  # lowering creates thousands of acyclic tuples
    before, found = golden(), dict[str, str]()
    seconds: dict[str, float] = {}
    differing = 0
    with workplace():
        for n, case in enumerate(todo, 1):
            started = time.process_time()
            text = text_of(case)
            seconds[case] = time.process_time() - started
            found[case] = digest(text)
            if not given.write and before.get(case) != found[case]:
                differing += 1
                print(f"{found[case]}  {case}" + ("" if case in before else "  (not in the file)"))
                if given.show:
                    print(text)
            if n % 100 == 0:
                print(f"{n} of {len(todo)} cases, {sum(seconds.values()):.0f} s", file=sys.stderr)
    for case in sorted(seconds, key=seconds.__getitem__, reverse=True)[: 10 if given.times else 0]:
        print(f"{seconds[case]:.1f} s  {case}")
    if given.write:
        lines = {**before, **found}
        GOLDEN.write_text("".join(f"{lines[case]}  {case}\n" for case in CASES if case in lines), "utf-8")
    else:
        gone = [case for case in before if case not in CASES]
        differing += len(gone)
        for case in gone:
            print(f"{before[case]}  {case}  (in the file alone)")
    print(f"{len(todo)} cases, {differing} differ; {sum(seconds.values()):.0f} s of CPU")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
