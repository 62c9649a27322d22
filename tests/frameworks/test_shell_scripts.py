"""Shell scripts that start a training framework."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.core.errors import SpecError
from memplan.frameworks.reading.run_file import RunFile, read_command, read_run
from memplan.frameworks.reading.shell import launched

FILES = {
    "axolotl.yml": "base_model: Qwen/Qwen2-7B\nmicro_batch_size: 4\nsequence_len: 256\n",
    "factory.yaml": "model_name_or_path: Qwen/Qwen2-7B\nstage: sft\nbf16: true\n",
    "trl.yaml": "model_name_or_path: Qwen/Qwen2-7B\ndataset_name: mine\nmax_length: 64\n",
    "auto.yaml": "model: {pretrained_model_name_or_path: Qwen/Qwen2-7B}\nstep_scheduler: {local_batch_size: 4}\n"
    "packed_sequence: {packed_sequence_size: 64}\n",
    ".env": "# where\nexport LEN='48' # tokens\nHALF=\"unclosed\nSIZE=${LEN}\n",
    "hosts": "# two\na slots=4\nb slots=2\n",
    "zero3.yaml": "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {zero_stage: 3}\n",
}


def read(tmp_path: Path, script: str, name: str = "train.sh") -> RunFile:
    for file, text in {**FILES, name: script}.items():
        (tmp_path / file).write_text(text, "utf-8")
    return read_run(str(tmp_path / name))


SCRIPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "trl sft --config trl.yaml --per_device_train_batch_size 3 --torch_dtype=bfloat16": (
        "trl",
        {"batch.micro": 3, "batch.sequence": 64, "precision.weights": "bf16"},
    ),
    'python unsloth-cli.py --model_name "unsloth/llama-3-8b" --max_seq_length 64 --dtype None --r 64 --lora_alpha 32 '
    '--use_gradient_checkpointing "unsloth" --per_device_train_batch_size 4 --optim adamw_8bit --save_model': (
        "unsloth",
        {
            "method.kind": "lora",
            "method.rank": 64,
            "batch.micro": 4,
            "batch.sequence": 64,
            "kernels.checkpointing": "offload",
        },
    ),
    "python unsloth-cli.py --load_in_4bit --max_seq_length 64": ("unsloth", {"method.kind": "qlora"}),
    "trl sft --config /workspace/runs/trl.yaml": ("trl", {"batch.sequence": 64}),  # of a container
    "trl sft --config trl.yaml --accelerate_config zero3.yaml": ("trl", {"parallelism.strategy": "zero3"}),
    "LEN=32\ntrl sft --config trl.yaml \\\n  --max_length $LEN --use_peft": (
        "trl",
        {"batch.sequence": 32, "method.kind": "lora"},
    ),
    "python prepare.py --model_name_or_path a\ntrl sft --config trl.yaml": ("trl", {"batch.sequence": 64}),
    'uv pip install -q "trl[peft]==0.24.0"\ntrl sft --config trl.yaml': ("trl", {"profile": "trl-0.24"}),
    "echo pip install trl==0.24.0\ntrl sft --config trl.yaml": ("trl", {"profile": "trl-1.15"}),
    "set -a; source .env\ntrl sft --config trl.yaml --max_length $SIZE": ("trl", {"batch.sequence": 48}),
    "swift deploy --model Qwen/Qwen2-7B --infer_backend vllm --vllm_max_model_len 4096 --vllm_tensor_parallel_size 2 "
    "--torch_dtype float16 --adapters a --port 8000": (
        "vllm",
        {
            "model": "Qwen/Qwen2-7B",
            "serving.max_model_len": 4096,
            "parallelism.tp": 2,
            "precision.weights": "fp16",
            "serving.lora_slots": 1,
        },
    ),
    "swift sft --model Qwen/Qwen2-7B --torch_dtype bfloat16 --packing true --attn_impl flash_attn --max_length 64 "
    "--packing_length 256": ("ms-swift", {"batch.sequence": 256, "batch.packing": "binpack"}),
    "swift rlhf --rlhf_type grpo --model Qwen/Qwen2-7B --torch_dtype bfloat16 --max_length 64 --reward_model "
    "Qwen/Qwen2-1.5B --use_vllm true --vllm_mode colocate --vllm_enforce_eager true": (
        "ms-swift",
        {"roles.reward.model": "Qwen/Qwen2-1.5B", "serving.cuda_graphs": False},
    ),
    "trl grpo --model_name_or_path Qwen/Qwen2-7B --dataset_name a --max_prompt_length 64 --reward_model_name_or_path "
    "Qwen/Qwen2-1.5B": ("trl", {"roles.reward.model": "Qwen/Qwen2-1.5B"}),
    "swift infer --model Qwen/Qwen2-7B --infer_backend sglang --sglang_context_length 512": (
        "sglang",
        {"model": "Qwen/Qwen2-7B", "serving.max_model_len": 512},
    ),
    "swift sft --model Qwen/Qwen2.5-7B-Instruct-GPTQ-Int8 --tuner_type lora --max_length 64": (
        "ms-swift",
        {"model": "qwen2.5-7b", "method.kind": "qlora", "method.quantization.format": "gptq-int8"},
    ),
    "swift sft --model Qwen/Qwen2.5-7B-Instruct-FP8 --tuner_type lora --max_length 64": (
        "ms-swift",
        {"model": "Qwen/Qwen2.5-7B-Instruct-FP8", "method.kind": "lora"},
    ),
    "automodel finetune llm -c auto.yaml --step_scheduler.local_batch_size 2": (
        "automodel",
        {"batch.micro": 2, "batch.sequence": 64},
    ),
    "vllm serve a &\nswift rlhf --model Qwen/Qwen2-7B --max_length 64": (
        "ms-swift",
        {"trainer": "dpo", "batch.sequence": 64},
    ),
    "accelerate launch ppo.py --sft_model_path Qwen/Qwen2-7B --reward_model_path org/scores --response_length 64 "
    "--dataset_name mine": (
        "trl",
        {
            "trainer": "ppo",
            "model": "Qwen/Qwen2-7B",
            "roles.reward.model": "Qwen/Qwen2-7B",
            "batch.new_tokens": 64,
            "kernels.checkpointing": "none",
        },
    ),
    "axolotl train axolotl.yml --micro-batch-size 2 --launcher torchrun -- --nproc_per_node=4": (
        "axolotl",
        {"batch.micro": 2, "parallelism.world": 4, "parallelism.strategy": "ddp"},
    ),
    "accelerate launch --config_file zero3.yaml --num_processes 8 -m axolotl.cli.train axolotl.yml": (
        "axolotl",
        {"parallelism.world": 8, "parallelism.strategy": "zero3"},
    ),
    "export PYTORCH_ALLOC_CONF=expandable_segments:False\naxolotl train axolotl.yml": (
        "axolotl",
        {"loop.expandable_segments": False},
    ),
    "FORCE_TORCHRUN=1 NPROC_PER_NODE=2 llamafactory-cli train factory.yaml cutoff_len=128": (
        "llamafactory",
        {"parallelism.world": 2, "batch.sequence": 128},
    ),
    "CUDA_VISIBLE_DEVICES=0,1,2 llamafactory-cli train factory.yaml": ("llamafactory", {"parallelism.world": 3}),
    "NPROC_PER_NODE=4 NNODES=2 swift sft --model Qwen/Qwen2-7B --train_type lora --max_length 64 --deepspeed zero3": (
        "ms-swift",
        {"parallelism.world": 4 * 2, "parallelism.strategy": "zero3", "batch.sequence": 64},
    ),
    "#SBATCH -N 2\n#SBATCH --gpus-per-node=h100:4,nvme:1\nsrun torchrun --nnodes $SLURM_NNODES --nproc_per_node gpu "
    "x.py --config trl.yaml": ("trl", {"parallelism.world": 2 * 4}),
    "#SBATCH --nodes=2\n#SBATCH --gpus 16\naccelerate launch --num_processes $(($SLURM_NNODES * SLURM_GPUS_ON_NODE)) "
    "x.py --config trl.yaml --gradient_accumulation_steps $(expr 32 / $SLURM_GPUS_ON_NODE)": (
        "trl",
        {"parallelism.world": 16, "batch.accumulation": 32 // 8},
    ),
    "#SBATCH --gres=gpu:3\naccelerate launch x.py --config trl.yaml": ("trl", {"parallelism.world": 3}),
    "deepspeed --include localhost:1,3 x.py --config trl.yaml": ("trl", {"parallelism.world": 2}),
    "CUDA_VISIBLE_DEVICES=2,3 trl sft --config trl.yaml": ("trl", {"parallelism.world": 2}),
    "CUDA_VISIBLE_DEVICES=2,3 axolotl train axolotl.yml": ("axolotl", {"parallelism.world": 2}),
    "mpirun --hostfile hosts -x A=1 python x.py --config trl.yaml": ("trl", {"parallelism.world": 4 + 2}),
    "mpirun -H a:4,b:4 python x.py --config trl.yaml": ("trl", {"parallelism.world": 4 + 4}),
    "deepspeed --hostfile=hosts x.py --config trl.yaml": ("trl", {"parallelism.world": 4 + 2}),
    "deepspeed --hostfile hosts --num_gpus 2 --num_nodes 1 x.py --config trl.yaml": ("trl", {"parallelism.world": 2}),
    "docker run --gpus 3 --rm image accelerate launch x.py --config trl.yaml": ("trl", {"parallelism.world": 3}),
    "docker run --gpus '\"device=0,2\"' axolotl accelerate launch x.py --config trl.yaml": (
        "trl",
        {"parallelism.world": 2},
    ),
    "docker run -e CUDA_VISIBLE_DEVICES=0,1,2 image trl sft --config trl.yaml": ("trl", {"parallelism.world": 3}),
    "accelerate launch --num_processes 2 -m trl.scripts.sft --config trl.yaml": ("trl", {"parallelism.world": 2}),
    "srun --nodes=2 --gres=gpu:4 torchrun --nnodes 2 --nproc_per_node gpu x.py --config trl.yaml": (
        "trl",
        {"parallelism.world": 2 * 4},
    ),
    "LEN=$((2 * (16 + 8) - 4 / 2))\nARGS=(\n  --max_length ${LEN:-8}  # tokens (all)\n  --use_peft  # (q) # k\n)  # (e)"
    '\nARGS+=(--gradient_accumulation_steps 5)\npython3 prepare.py --out a\ntrl sft --config trl.yaml "${ARGS[@]}"': (
        "trl",
        {"batch.sequence": 2 * (16 + 8) - 2, "method.kind": "lora", "batch.accumulation": 5},
    ),
    "read -r -d '' line <<EOF\nopenrlhf.cli.train_sft \\\n  --model.model_name_or_path Qwen/Qwen2-7B \\\n"
    "  --data.max_len 64\nEOF\ndeepspeed --module $line": ("openrlhf", {"batch.sequence": 64}),
    ': "${LEN:=32}"\nD=conf\nmkdir -p $D && cat > $D/a.yml <<EOF\nbase_model: Qwen/Qwen2-7B\nmicro_batch_size: 1\n'
    "sequence_len: $LEN\nEOF\naxolotl train ./conf/a.yml": ("axolotl", {"batch.sequence": 32}),
    "cat <<'EOF' > zero.yaml\ndistributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 2}\nEOF\n"
    "accelerate launch --config_file zero.yaml --num_processes 2 x.py --config trl.yaml": (
        "trl",
        {"parallelism.strategy": "zero2"},
    ),
    "sudo tee a.yaml >/dev/null <<EOF\nmodel_name_or_path: Qwen/Qwen2-7B\nstage: sft\ncutoff_len: 48\nEOF\n"
    "llamafactory-cli train a.yaml": ("llamafactory", {"batch.sequence": 48}),
    'case ${1:-small}-x in\n  big*|huge*) LEN=64;;\n  "small"*)\n    case $2 in (a) B=1 ;; *) B=5;; esac\n    LEN=16\n'
    "    ;;\n"
    "  *) LEN=32 ;;\nesac\ntrl sft --config trl.yaml --max_length $LEN --per_device_train_batch_size $B": (
        "trl",
        {"batch.sequence": 16, "batch.micro": 5},  # of a word that is not known, the last
    ),
    "ray job submit -- python3 -m openrlhf.cli.train_ppo_ray --pretrain Qwen/Qwen2-7B --advantage_estimator group_norm "
    "--n_samples_per_prompt 4 --prompt_max_len 512 --generate_max_len 4096 --flash_attn": (
        "openrlhf",
        {"batch.sequence": 512, "batch.new_tokens": 4096},
    ),
    "MODEL=${MODEL:-${BASE}/models/Qwen2___5-7B-Instruct}\ntrl sft --model_name_or_path $MODEL --dataset_name mine": (
        "trl",
        {"model": "Qwen2.5-7B-Instruct"},
    ),
    "llama-server -m /none/Qwen2.5-7B-Instruct-Q4_K_M-00001-of-00002.gguf -c 64": (
        "llama.cpp",
        {"model": "qwen2.5-7b", "serving.weights": "Q4_K_M"},
    ),
    'B=${B:-a}\nif [ "$B" = a ]; then\n  LEN=16\nelif [[ -n $B ]]; then\n  LEN=32\nelse LEN=64\nfi\n'
    'if ! [ 3 -le 2 ] && [ -z "$LEN" ]; then\n  A=(--use_peft)\nfi\n'
    'if [ $LEN -gt 20 ]; then\n  A=(--max_length 8)\nfi\ntrl sft --config trl.yaml --max_length $LEN "${A[@]}"': (
        "trl",
        {"batch.sequence": 16, "method.kind": "lora"},
    ),
    "trl sft --model_name_or_path unsloth/Qwen2-7B-bnb-4bit --dataset_name mine --use_peft": (
        "trl",
        {"model": "qwen2-7b", "method.kind": "qlora", "method.quantization.format": "nf4"},
    ),
    "vllm serve /none/hub/models--Qwen--Qwen2-7B/snapshots/1a2b": ("vllm", {"model": "Qwen2-7B"}),
    "vllm serve https://huggingface.co/Qwen/Qwen2-7B": ("vllm", {"model": "https://huggingface.co/Qwen/Qwen2-7B"}),
    "accelerate launch scripts/run_dpo.py --config trl.yaml": ("trl", {"trainer": "dpo", "parallelism.world": 1}),
    "python examples/scripts/reward_modeling.py --config trl.yaml": ("trl", {"trainer": "reward"}),
    "mpirun -np 8 -H a:4,b:4 --allow-run-as-root -x A=1 python x.py --config trl.yaml": (
        "trl",
        {"parallelism.world": 8},
    ),
    "cd here && torchrun --standalone --nproc_per_node 4 --nnodes=2 train.py --model_name_or_path Qwen/Qwen2-7B "
    "--bf16 True --per_device_train_batch_size ${BS:-2}; echo done": (
        "transformers",
        {"parallelism.world": 4 * 2, "batch.micro": 2, "precision.compute": "bf16"},
    ),
    "accelerate launch --use_fsdp --fsdp_version 2 --num_processes=2 sft.py --model_name_or_path Qwen/Qwen2-7B "
    "--use_peft --lora_target_modules q_proj k_proj --dataset_name mine": (
        "trl",
        {"parallelism.strategy": "fsdp2", "parallelism.dp": 2, "method.targets": ["q_proj", "k_proj"]},
    ),
    "deepspeed --num_gpus 4 --module openrlhf.cli.train_sft --pretrain Qwen/Qwen2-7B --micro_train_batch_size 2 "
    "--train_batch_size 256 --max_len 64 --zero_stage 3 --adam_offload --packing_samples --gradient_checkpointing": (
        "openrlhf",
        {
            "model": "Qwen/Qwen2-7B",
            "batch.accumulation": 256 // (2 * 4),
            "batch.packing": "padding_free",
            "kernels.checkpointing": "full",
            "parallelism.strategy": "zero3",
            "parallelism.offload.optimizer": True,
            "precision.master": "fp32",
            "profile": "openrlhf-0.11",
        },
    ),
    "deepspeed --num_gpus 2 --module openrlhf.cli.train_dpo --model.model_name_or_path Qwen/Qwen2-7B --ds.lora.rank 8 "
    "--ds.load_in_4bit": (
        "openrlhf",
        {"trainer": "dpo", "reference": "copy", "method.kind": "qlora", "batch.micro": 8, "batch.sequence": 512},
    ),
    "ray job submit --address=a -- python3 -m openrlhf.cli.train_ppo_ray --actor.model_name_or_path Qwen/Qwen2-7B "
    "--algo.advantage.estimator group_norm --train.colocate_all --vllm.num_engines 2 --vllm.enable_sleep "
    "--vllm.tensor_parallel_size 2 "
    "--ds.enable_sleep --rollout.n_samples_per_prompt 8 --rollout.max_new_tokens 48 --data.max_len 64 "
    "--actor.num_gpus_per_node 4 --train.batch_size 64": (
        "openrlhf",
        {
            "trainer": "grpo",
            "reference": "copy",
            "rollout": "colocate",
            "batch.generations": 8,
            "batch.sequence": 64 - 48,
            "batch.new_tokens": 48,
            "batch.accumulation": 64 // 4,
            "serving.sleep": True,
            "serving.memory_utilization": 0.95,
            "serving.tensor_parallel": 2,
            "serving.trainer_offload": ["optimizer"],
            "parallelism.world": 4,
        },
    ),
    "python3 -m openrlhf.cli.train_ppo_ray --actor.model_name_or_path Qwen/Qwen2.5-7B-Instruct --train.colocate_all "
    "--algo.advantage.estimator gae --reward.model_name_or_path Qwen/Qwen2.5-1.5B-Instruct --ds.zero_stage 3 "
    "--rollout.micro_batch_size 4": (
        "openrlhf",
        {
            "trainer": "rloo",
            "roles.value.model": "Qwen/Qwen2.5-1.5B-Instruct",
            "roles.reward.model": "Qwen/Qwen2.5-1.5B-Instruct",
            "roles.reward.micro": 4,
            "batch.scored": 4,
            "batch.generations": 1,
        },
    ),
    "python3 -m openrlhf.cli.train_ppo_ray --actor.model_name_or_path Qwen/Qwen2.5-7B-Instruct "
    "--algo.advantage.estimator gae --reward.remote_url http://a --data.max_len 64 --use_dynamic_batch "
    "--train_max_tokens_per_gpu 128 --rollout_max_tokens_per_gpu 512": (
        "openrlhf",
        {
            "roles.value.model": "Qwen/Qwen2.5-7B-Instruct",
            "roles.value.location": "server",
            "batch.micro": 128 // 64,
            "batch.scored": 512 // 64,
        },
    ),
    "python3 -m verl.trainer.main_ppo data.max_prompt_length=512 data.max_response_length=512 "
    "actor_rollout_ref.model.path=Qwen/Qwen2.5-7B-Instruct actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 "
    "critic.model.path=Qwen/Qwen2.5-1.5B-Instruct critic.ppo_micro_batch_size_per_gpu=16 "
    "reward_model.enable=True reward_model.model.path=a reward_model.rollout.name=vllm "
    "reward_model.rollout.gpu_memory_utilization=0.8": (
        "verl",
        {
            "serving.memory_utilization": 0.8,
            "trainer": "rloo",
            "roles.value.model": "Qwen/Qwen2.5-1.5B-Instruct",
            "roles.value.micro": 16,
            "batch.micro": 4,
        },
    ),
    "python3 -m verl.trainer.main_ppo algorithm.adv_estimator=grpo data.train_files=$FILES data.max_prompt_length=16 "
    "data.max_response_length=48 actor_rollout_ref.model.path=Qwen/Qwen2-7B actor_rollout_ref.rollout.n=8 "
    "actor_rollout_ref.actor.ppo_mini_batch_size=32 actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16 "
    "actor_rollout_ref.actor.use_kl_loss=True +actor_rollout_ref.actor.fsdp_config.optimizer_offload=True "
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16 data.train_batch_size=64 "
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=128 "
    "actor_rollout_ref.rollout.tensor_model_parallel_size=1 trainer.n_gpus_per_node=4 trainer.nnodes=2 "
    "--config-name=ppo_trainer": (
        "verl",
        {
            "trainer": "grpo",
            "reference": "none",  # on the host
            "rollout": "colocate",
            "batch.micro": 16,
            "batch.accumulation": 32 * 8 // (4 * 2) // 16,
            "batch.scored": 64 * 8 // (4 * 2),  # of the reference: all completions of a GPU
            "precision.weights": "fp32",
            "parallelism.world": 8,
            "parallelism.strategy": "fsdp",
            "serving.sleep": True,
            "serving.memory_utilization": 0.5,
            "serving.trainer_offload": ["optimizer"],
            "profile": "verl-0.9",
        },
    ),
    "python3 -m verl.trainer.main_ppo algorithm.adv_estimator=grpo data.max_prompt_length=16 "
    "data.max_response_length=48 actor_rollout_ref.model.path=Qwen/Qwen2-7B "
    "actor_rollout_ref.actor.use_dynamic_bsz=True actor_rollout_ref.actor.ppo_max_token_len_per_gpu=128 "
    "actor_rollout_ref.actor.strategy=fsdp2 algorithm.use_kl_in_reward=True "
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=256": (
        "verl",
        {"batch.micro": 128 // (16 + 48), "batch.scored": 256 // (16 + 48), "reference": "none"},
    ),
    "torchrun --nproc_per_node=2 -m verl.trainer.fsdp_sft_trainer model.partial_pretrain=Qwen/Qwen2-7B "
    "data.max_length=64 data.micro_batch_size_per_gpu=3": (
        "verl-sft",
        {"batch.micro": 3, "batch.packing": "padding_free", "kernels.fused": ["cross_entropy"], "parallelism.dp": 2},
    ),
    "python3 -m verl.trainer.sft_trainer model.path=Qwen/Qwen2-7B data.max_length=64 data.max_token_len_per_gpu=640": (
        "verl-sft",
        {"batch.micro": 640 // 64, "parallelism.world": 1},
    ),
}


def test_a_python_script_is_of_the_version_that_its_shell_script_installs(tmp_path: Path) -> None:
    trains = "from trl import SFTConfig, SFTTrainer\nSFTTrainer('Qwen/Qwen2-7B', SFTConfig(max_length=32)).train()\n"
    (tmp_path / "sft.py").write_text(trains, "utf-8")
    file = read(tmp_path, "pip install trl==0.24.0\naccelerate launch sft.py")
    assert (file.name, file.fields["profile"]) == ("sft.py", "trl-0.24")


@pytest.mark.parametrize(("script", "expected"), SCRIPTS.items(), ids=SCRIPTS.keys())
def test_a_script_is_the_run_that_it_starts(tmp_path: Path, script: str, expected: tuple[str, dict[str, Any]]) -> None:
    file = read(tmp_path, f"#!/bin/bash\nset -e  # stops\n{script}\n")
    found = {origin.field: origin.value for origin in file.origins}
    framework, fields = expected
    assert (file.framework, file.name, file.unread) == (framework, "train.sh", ())
    assert {field: found.get(field) for field in fields} == fields


def test_a_command_that_is_typed_is_the_run_that_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read(tmp_path, "trl sft --config trl.yaml")
    monkeypatch.chdir(tmp_path)
    file = read_command("CUDA_VISIBLE_DEVICES=0,1 llamafactory-cli train factory.yaml cutoff_len=128")
    reasons = {origin.field: origin.why for origin in file.origins}
    assert file.headline == "llamafactory-cli train: LLaMA-Factory 0.9.5"
    assert file.fields["parallelism"]["world"] == 2
    assert reasons["batch.sequence"] == "llamafactory-cli train --cutoff_len"
    with pytest.raises(SpecError, match="trl ppo is not supported yet; supported: trl sft"):
        read_command("trl ppo")


def test_trls_script_of_ppo_is_its_command_also_where_the_script_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ppo.py").write_text("from trl import PPOTrainer\ntrainer = PPOTrainer(args=make())\ntrainer.train()\n")
    monkeypatch.chdir(tmp_path)
    file = read_command(
        "accelerate launch ppo.py --sft_model_path qwen2-0.5b --reward_model_path qwen2-0.5b", "trl-1.12"
    )
    assert (file.fields["trainer"], file.fields["model"]) == ("ppo", "qwen2-0.5b")
    assert file.fields["roles"] == {"reward": {"model": "qwen2-0.5b"}}
    assert read_command("python ppo.py --sft_model_path qwen2-0.5b --reward_model_path qwen2-0.5b").framework == "trl"


INSIDE: dict[str, str] = {
    "a shell": "bash -lc 'cd /work && trl sft --config trl.yaml --max_length 32'",
    "a container": "docker run --gpus all -v /a:/b pytorch/pytorch:2.13 trl sft --config trl.yaml --max_length 32",
    "a job step": "srun --ntasks=1 bash -c 'trl sft --config trl.yaml --max_length 32'",
    "a wrapper": "nohup uv run trl sft --config trl.yaml --max_length 32 &",
    "Slurm's variables": "#SBATCH --cpus-per-task=32\ntrl sft --config trl.yaml --max_length $SLURM_CPUS_PER_TASK",
}


@pytest.mark.parametrize("script", INSIDE.values(), ids=INSIDE.keys())
def test_a_command_inside_another_is_read(tmp_path: Path, script: str) -> None:
    assert read(tmp_path, script, "train.sbatch").fields["batch"]["sequence"] == 32


def test_slurm_directives_say_how_many_gpus_train(tmp_path: Path) -> None:
    script = (
        "#!/bin/bash\n#SBATCH --nodes=2\n#SBATCH --gres=gpu:a100:4\n"
        "srun torchrun --nnodes $SLURM_NNODES --nproc_per_node $SLURM_GPUS_ON_NODE sft.py --model_name_or_path a "
        "--dataset_name b\n"
    )
    assert read(tmp_path, script, "train.sbatch").fields["parallelism"]["world"] == 2 * 4


def test_a_number_of_processes_that_is_not_known_is_named(tmp_path: Path) -> None:
    script = "torchrun --nproc_per_node $GPUS sft.py --model_name_or_path Qwen/Qwen2-7B --dataset_name mine"
    file = read(tmp_path, f"set -x\n{script}\n")
    assert file.notes == ("the number of processes (train.sh:2): $GPUS is not known here; add --gpus",)


COUNTED = (
    "$(nvidia-smi -L | wc -l)",
    "`nvidia-smi --query-gpu=name --format=csv,noheader | wc -l`",
    "$(echo $CUDA_VISIBLE_DEVICES | tr ',' '\\n' | wc -l)",
    "$(python -c 'import torch; print(torch.cuda.device_count())')",
    '$(echo "$CUDA_VISIBLE_DEVICES" | awk -F, "{print NF}")',
    "gpu",
)


@pytest.mark.parametrize("count", COUNTED)
def test_a_command_that_counts_the_machines_gpus_is_their_number(tmp_path: Path, count: str) -> None:
    """It is that of the GPUs that the script sees, or that is typed; else it is not known."""
    script = f"N={count}\ntorchrun --nproc_per_node $N a.py --model_name_or_path Qwen/Qwen2-7B --dataset_name mine"
    (note,) = read(tmp_path, script).notes
    assert note == "the number of processes (train.sh:2): how many GPUs the machine has is not known here; add --gpus"
    file = read_run(str(tmp_path / "train.sh"), typed={"parallelism.world": 4})
    assert (file.fields["parallelism"]["world"], file.notes) == (4, ())
    file = read(tmp_path, f"export CUDA_VISIBLE_DEVICES=0,1,2\n{script}")
    assert (file.fields["parallelism"]["world"], file.notes) == (3, ())
    assert read(tmp_path, f"export CUDA_VISIBLE_DEVICES=$(seq -s, 0 $X)\n{script}").notes == (note.replace(":2", ":3"),)


SUBSTITUTED = {
    'DIR=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" &> /dev/null && pwd)\ntrl sft --config $DIR/trl.yaml': 64,
    "cd `dirname $0`; trl sft --config `pwd`/trl.yaml --output_dir out/$(date +%F)": 64,
    "LEN=$(echo 32)\ntrl sft --config trl.yaml --max_length $LEN": 32,
    "for i in $(seq 0 3); do trl sft --config trl.yaml --max_length $((32 + i)); break; done": 32,
    "for n in {3..5}{0,1}; do trl sft --config trl.yaml --max_length $n; done": 30,
    "for ((n=2; n<4; n++)); do\ntrl sft --config trl.yaml --max_length $((n * 16))\ndone": 32,
    'N=32; while [[ $# -gt 0 ]]; do case $1 in --n) N="$2"; shift;; --n=*) N=${1#*=};; esac; shift; done\n'
    "trl sft --config trl.yaml --max_length $N": 32,
    "while getopts n: o; do case $o in n) N=$OPTARG;; esac; done\ntrl sft --config trl.yaml --max_length ${N:-32}": 32,
    "run() {\n  local n=$2\n  trl sft --config $1.yaml --max_length $n\n}\nrun trl 32\nrun trl 64": 32,
    'function run {\n  "$@" --max_length 32\n}\nrun trl sft --config trl.yaml': 32,
    'main() {\n  inner "${@:2}" --max_length 32\n}\ninner() {\n  trl sft "$@"\n}\nmain a --config trl.yaml': 32,
    "never() {\n  trl sft --config trl.yaml --max_length 32\n}\nsleep 1": 32,
    "again() {\n  again\n}\nagain\ntrl sft --config trl.yaml --max_length 32": 32,
}


@pytest.mark.parametrize("script", SUBSTITUTED)
def test_what_a_shell_puts_in_place_of_words_is_read(tmp_path: Path, script: str) -> None:
    assert read(tmp_path, script).fields["batch"]["sequence"] == SUBSTITUTED[script]


def test_the_first_run_of_a_loop_is_counted(tmp_path: Path) -> None:
    start = 'MODELS=(Qwen/Qwen2-1.5B "Qwen/Qwen2-7B")\nfor model in "${MODELS[@]}"; do\n  for bs in 2 4; do'
    command = (
        "trl sft --config trl.yaml --model_name_or_path $model --per_device_train_batch_size $bs --learning_rate $lr"
    )
    file = read(tmp_path, f"{start}\n    for lr in 1e-4 2e-4; do\n{command}\n    done\n  done\ndone\n")
    assert (file.fields["model"], file.fields["batch"]["micro"]) == ("Qwen/Qwen2-1.5B", 2)
    said = "the first run of the loop over"
    assert file.notes == (
        f"--model_name_or_path (train.sh:5): {said} Qwen/Qwen2-1.5B, Qwen/Qwen2-7B is counted",
        f"--per_device_train_batch_size (train.sh:5): {said} 2, 4 is counted",
    )
    loop = "for name in trl auto; do trl sft --config $name.yaml; done"
    assert read(tmp_path, loop).notes == (f"--config (train.sh:1): {said} trl, auto is counted",)
    assert read(tmp_path, "for file in *.yaml; do trl sft --config trl.yaml --lora_r $file; done").notes == (
        "--lora_r (train.sh:1): a variable that is not set",
    )
    served = read(tmp_path, "for size in 0.5B 1.5B; do vllm serve Qwen/Qwen2-$size; done")
    assert (served.fields["model"], len(served.notes)) == ("Qwen/Qwen2-0.5B", 1)


_GRPO = "swift rlhf --rlhf_type grpo --model Qwen/Qwen2-7B --max_length 64 --torch_dtype bfloat16"
LEFT_OUT = {
    "swift rlhf --rlhf_type gkd --model Qwen/Qwen2-1.5B --teacher_model Qwen/Qwen2-7B --max_length 64 --torch_dtype "
    "bfloat16 --gkd_logits_topk 64": ["gkd_logits_topk"],
    "trl grpo --model_name_or_path Qwen/Qwen2-7B --dataset_name a --max_prompt_length 64 --cast_lm_head_to_fp32": [
        "cast_lm_head_to_fp32"
    ],
    f"{_GRPO} --reward_model Qwen/Qwen2-1.5B Qwen/Qwen2-7B": ["reward_model"],
    f"{_GRPO} --reward_model mine/none": ["reward_model"],
    "llamafactory-cli train factory.yaml adapter_name_or_path=a pref_ftx=0.1 freeze_trainable_modules=mlp": [
        "adapter_name_or_path",
        "pref_ftx",
    ],
    "llamafactory-cli train factory.yaml adapter_name_or_path=a create_new_adapter=true": [],
    "trl sft --config trl.yaml --max_lenth 5": ["max_lenth"],
    "llamafactory-cli train factory.yaml finetuning_type=freeze freeze_trainable_modules=mlp": [
        "freeze_trainable_modules"
    ],
    "axolotl train axolotl.yml --eval_sequence_len 512 --kd_trainer --spectrum_top_fraction 0.5 --lora_model_dir a": [
        *("eval_sequence_len", "kd_trainer", "spectrum_top_fraction", "lora_model_dir"),
    ],
    "axolotl train axolotl.yml --model_quantization_config A --model_quantization_config_kwargs.dequantize": [],
}


@pytest.mark.parametrize("command", LEFT_OUT)
def test_keys_that_may_take_memory_are_listed(tmp_path: Path, command: str) -> None:
    assert sorted(each.key for each in read(tmp_path, command).unread) == sorted(LEFT_OUT[command])


def test_of_several_reward_models_the_first_is_counted(tmp_path: Path) -> None:
    script = "python3 -m openrlhf.cli.train_ppo_ray --actor.model_name_or_path Qwen/Qwen2-7B --train.colocate_all "
    file = read(tmp_path, f"{script} --reward.model_name_or_path Qwen/Qwen2-7B,Qwen/Qwen2-1.5B")
    assert file.fields["roles"]["reward"]["model"] == "Qwen/Qwen2-7B"
    assert file.notes == ("reward.model_name_or_path (train.sh:1): only the first of 2 reward models is counted",)


def test_gpus_without_processes_are_named(tmp_path: Path) -> None:
    file = read(tmp_path, "CUDA_VISIBLE_DEVICES=0,1 swift sft --model Qwen/Qwen2-7B --max_length 64")
    note = "several GPUs, and no number of processes: one is counted; add --gpus"
    assert file.notes == (f"CUDA_VISIBLE_DEVICES (train.sh:1): {note}",)
    file = read(tmp_path, "docker run --gpus all -it image swift sft --model Qwen/Qwen2-7B --max_length 64")
    assert file.notes == (f"NVIDIA_VISIBLE_DEVICES (train.sh:1): {note}",)


QUOTED = {
    "over several lines": "bash -c '\ncd /work\ntrl sft --config trl.yaml --max_length 32\n'",
    "over many lines": "bash -c '\n" + 300 * "# a line\n" + "trl sft --config trl.yaml --max_length 32\n'",
    "after a here-document": "cat > a.txt <<'EOF'\nIt's \"open\nEOF\ntrl sft --config trl.yaml --max_length 32",
    "before its log": "nohup trl sft --config trl.yaml --max_length 32 > a.log 2>&1 &",
    "before a pipe": "trl sft --config trl.yaml --max_length 32 2>&1|tee a.log",
    "between files": 'trl sft --config trl.yaml < in &>> out --max_length 32 "$@"',
    "after a hash in a word": "trl sft --dataset_name a#500 'b#1' \\\n  --config trl.yaml --max_length 32",
    "after a comment that ends in a backslash": "# trl sft \\\ntrl sft --config trl.yaml --max_length 32",
    "after a comment": "# it's here\ntrl sft --config trl.yaml --max_length 32  # don't",
}


@pytest.mark.parametrize("script", QUOTED.values(), ids=QUOTED.keys())
def test_quotes_and_here_documents_may_span_lines(tmp_path: Path, script: str) -> None:
    assert read(tmp_path, script).fields["batch"]["sequence"] == 32


def test_a_quote_that_is_never_closed_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"^train\.sh:1: a quote is not closed$"):
        read(tmp_path, "echo 'a\n" + "b\n" * 10_000)


def test_a_value_of_a_script_says_its_line(tmp_path: Path) -> None:
    flags = "--per_device_train_batch_size 3 --lora_r $RANK --output_dir $OUT --dataset_name $DATA"
    file = read(tmp_path, f"# a comment\ntrl sft --config trl.yaml {flags}\n")
    reasons = {origin.field: origin.why for origin in file.origins}
    assert reasons["batch.micro"] == "train.sh:2 --per_device_train_batch_size"
    assert reasons["batch.sequence"] == "trl.yaml:3 max_length"
    assert file.notes == ("--lora_r (train.sh:2): a variable that is not set",)


REFUSED = {
    "torchrun --nproc_per_node 2 full.py --model a/b": "train.sh names no framework, and full.py is not there",
    "ls": "train.sh does not train or serve; accelerate launch, torchrun, deepspeed, ",
    "": "train.sh does not train or serve",
    "A=(ab)\n" + 'A+=("${A[@]}" "${A[@]}")\n' * 60: "train.sh does not train or serve",
    "A=ab\n" + "A=$A$A\n" * 60: "train.sh does not train or serve",  # 2 ** 60 letters, if it went on
    "swift infer --model a": "swift infer with infer_backend transformers is not supported yet; supported: ",
    "swift deploy run.yaml": "swift deploy with a file is not supported yet",
    "python3 -m verl.trainer.main_eval data.x=1": "train.sh:1: verl.trainer.main_eval: verl's other runs are not read",
    "python3 -m verl.trainer.main_ppo --config-name=ppo_megatron_trainer": "config_name: 'ppo_megatron_trainer' is not",
    "deepspeed --module openrlhf.cli.train_kd": "train.sh:1: openrlhf.cli.train_kd: OpenRLHF's other runs are not read",
    "megatron export --model a": "megatron export is not supported yet; supported: megatron sft or megatron pt or ",
    "swift rlhf --rlhf_type gkd --model a --teacher_model_server http://b": (
        "teacher_model_server: gkd against the top logits of a server is not supported yet; name a teacher_model"
    ),
    "trl ppo --model_name_or_path a": "train.sh:1: trl ppo is not supported yet; supported: trl sft",
    "trl sft --config none.yaml": "there is no file 'none.yaml' next to train.sh or here",
    "python online_dpo.py --config trl.yaml": "online_dpo.py is taken for ONLINEDPO, which is not supported yet; --tr",
    "python3 -m verl.trainer.main_ppo actor_rollout_ref.actor.megatron.x=1 --config-name=$C": (
        "actor_rollout_ref.actor.megatron: verl with Megatron is not supported yet; supported: fsdp"
    ),
    "trl sft 'unclosed": "train.sh:1: a quote is not closed",
    "trl sft --config trl.yaml --max_length long": "train.sh:1 --max_length: must be a number, not 'long'",
}


@pytest.mark.parametrize(("script", "expected"), REFUSED.items())
def test_a_script_that_is_not_understood_is_one_line(tmp_path: Path, script: str, expected: str) -> None:
    with pytest.raises(SpecError) as error:
        read(tmp_path, script)
    assert expected in str(error.value)


def test_a_line_of_data_is_no_command(tmp_path: Path) -> None:
    """shlex takes time quadratic in the length of a word."""
    with pytest.raises(SpecError, match=r"train\.sh does not train or serve"):
        read(tmp_path, f"trl sft --config {20_000 * 'x'}")
    long = 4 * (10_000 * "x" + "\n")
    with pytest.raises(SpecError, match=r"train\.sh:1: more than 20,000 characters in quotes, which are not read"):
        read(tmp_path, f"trl sft '{long}' --config trl.yaml")
    with pytest.raises(SpecError, match=r"train\.sh:1: a quote is not closed"):
        read(tmp_path, f"trl sft '{20 * long}")
    text = f"A='{long}'\nB=\"it's {300 * (chr(92) + chr(34) + chr(10))}\"\ntrl sft --config trl.yaml --max_length 32"
    assert read(tmp_path, text).fields["batch"]["sequence"] == 32


WORDS = [
    "trl",
    "sft",
    "accelerate",
    "launch",
    "torchrun",
    "--config",
    "--x=1",
    "-m",
    "--",
    "$A",
    "${B:-c}",
    "A=1",
    "\\\n",
    "\n",
]


@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=5), max_size=12))
def test_any_text_is_a_command_or_refused(words: list[str]) -> None:
    try:
        command = launched(" ".join(words), "train.sh", {"trl": ("sft",), "axolotl.cli.train": ()})
    except SpecError:
        return
    assert command.line >= 1
