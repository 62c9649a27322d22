"""Questions of 2026 as people type them: each is answered without reading help, and suggestions for typos work."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

import pytest

from memplan.cli.app import app
from memplan.cli.plain import run_plain
from tests.sampling import sampled

# A command line -> its exit code and what its first line says.
QUESTIONS = {
    "qwen3-8b --method qlora --gpu 4060ti": (1, "DOES NOT FIT  QLoRA of qwen3-8b on GeForce RTX 4060 Ti 8GB"),
    "qwen3 8b --method qlora --gpu 4090": (0, "FITS  QLoRA of qwen3 8b on GeForce RTX 4090"),
    "llama3.1:8b --method lora --gpu 3090": (0, "FITS  LoRA of llama3.1:8b on GeForce RTX 3090"),
    "meta-llama/Llama-3.1-8B-Instruct --method qlora --gpu 3060": (1, "DOES NOT FIT  QLoRA"),
    "https://huggingface.co/Qwen/Qwen3-8B --method qlora --gpu 3090": (0, "FITS  QLoRA"),
    "Qwen/Qwen3-30B-A3B --method qlora --gpu a6000": (1, "DOES NOT FIT  QLoRA"),
    "unsloth/Qwen3-8B-bnb-4bit --gpu 3090": (0, "FITS  QLoRA of qwen3-8b"),
    "Qwen3-8B-GGUF --gpu 3060": (0, "FITS  serving qwen3-8b with llama.cpp-2026"),
    "Qwen/Qwen3-8B-AWQ --gpu 3060 --method generate": (0, "FITS  generation of qwen3-8b"),
    "Qwen/Qwen3-8B-FP8 --gpu 4090": (0, "FITS  generation of qwen3-8b"),
    "gemma3:12b --method inference --gpu 24gb": (1, "DOES NOT FIT  generation of gemma3:12b"),
    "gpt-oss-20b --profile ollama --gpu 4080": (0, "FITS  serving gpt-oss-20b with llama.cpp-2026"),
    "gpt-oss-20b --profile llamacpp --gpu 16gb": (0, "FITS  serving gpt-oss-20b"),
    "deepseek-r1 --profile vllm --gpu 8xh200": (0, "FITS  serving deepseek-r1 with vllm-0.33 on 8 x H200"),
    "deepseek-r1-distill-qwen-7b --method qlora --gpu 3090": (0, "FITS  QLoRA"),
    "mistral-7b --method QLoRA --gpu 'RTX 3060 12GB'": (0, "FITS  QLoRA of mistral-7b"),
    "mistral:7b --method lora --gpus 2 --gpu 3090": (0, "FITS  LoRA of mistral:7b on 2 x GeForce RTX 3090"),
    "phi-4 --qlora --gpu 24gb": (0, "FITS  QLoRA of phi-4"),
    "qwen3-8b --method sft --gpu 4090": (1, "DOES NOT FIT  full fine-tuning of qwen3-8b"),
    "qwen3-8b --method fft --gpu h100": (0, "FITS  full fine-tuning of qwen3-8b"),
    "qwen3-8b --method qlora --vram 24": (0, "FITS  QLoRA of qwen3-8b"),
    "qwen3-8b --qlora --gpu rtx4090 --ctx 8k": (1, "DOES NOT FIT  QLoRA of qwen3-8b"),
    "qwen3-8b --method full --gpu 4xa100 --deepspeed zero3": (0, "FITS  full fine-tuning of qwen3-8b on 4 x A100"),
    "qwen3-8b --method lora --lora-r 32 --gpu 4090 --max-seq-length 1024": (0, "FITS  LoRA of qwen3-8b"),
    "llama-3.3-70b --method qlora --gpus 2x4090": (1, "DOES NOT FIT  QLoRA of llama-3.3-70b on 2 x"),
    "smollm3 --method full --gpu 4090 --optim paged_adamw_8bit": (0, "FITS  full fine-tuning of smollm3"),
    "bert-base --method full --gpu t4": (0, "FITS  full fine-tuning of bert-base"),
    "whisper-large-v3 --method full --gpu 3090": (0, "FITS  full fine-tuning of whisper-large-v3"),
    "qwen2.5-vl-7b --method lora --gpu a100": (0, "FITS  LoRA of qwen2.5-vl-7b"),
    "qwen3-8b --method generate --gpu 'm3 max 64gb'": (0, "FITS  generation of qwen3-8b on Apple M3 Max"),
    "qwen3-8b --method qlora --gpu t4 --per-device-train-batch-size 2 --max-length 1k": (0, "FITS  QLoRA of qwen3-8b"),
    "qwen3-4b --method qlora --profile llama-factory --gpu 3060": (0, "FITS  QLoRA of qwen3-4b"),
    "qwen3-4b --method qlora --profile trl-latest --gpu 3060": (0, "FITS  QLoRA of qwen3-4b"),
    "qwen3-4b --method lora --profile torchtune-latest --gpu 4090": (0, "FITS  LoRA of qwen3-4b"),
    "qwen3-8b --method lora --profile megatron-core --gpus 4 --tp 2 --use-distributed-optimizer --gpu a100": (
        0,
        "FITS  LoRA of qwen3-8b",
    ),
    "qwen3-4b-instruct-2507 --method qlora --gpu 4090": (0, "FITS  QLoRA of qwen3-4b-instruct-2507"),
    "https://huggingface.co/unsloth/Qwen3-8B-bnb-4bit --method QLoRA --gpu 3090": (0, "FITS  QLoRA of qwen3-8b"),
    "qwen3-0.6b --trainer grpo --value-model qwen3-0.6b --gpu 3090": (
        0,
        "FITS  PPO with full fine-tuning of qwen3-0.6b",
    ),
    "qwen3-0.6b --method lora --trainer kto --gpu 3090": (0, "FITS  KTO with LoRA of qwen3-0.6b"),
    "qwen3-0.6b --method GRPO --gpu 3090": (0, "FITS  GRPO with full fine-tuning of qwen3-0.6b"),
    "qwen3-0.6b --method DPO --gpu 3090": (0, "FITS  DPO with full fine-tuning of qwen3-0.6b"),
    "qlora qwen3-8b --gpu 3090": (0, "FITS  QLoRA of qwen3-8b on GeForce RTX 3090"),
    "sft qwen3-0.6b --method lora --gpu 3090": (0, "FITS  LoRA of qwen3-0.6b"),
    "inference qwen3-8b --gpu 3090": (0, "FITS  generation of qwen3-8b"),
    "dpo qwen3-0.6b --method lora --gpu 3090": (0, "FITS  DPO with LoRA of qwen3-0.6b"),
    "GRPO qlora qwen3-0.6b --gpu 3090": (0, "FITS  GRPO with QLoRA of qwen3-0.6b"),
    "qwen3-0.6b --method lora --trainer IPO --gpu 3090": (0, "FITS  DPO with LoRA of qwen3-0.6b"),
    "buy pythia-70m --have 7900xtx": (0, "To own, of one combination of card, count and strategy: rx-7900-xtx.\n"),
}
# A wrong line -> the wrong word, and how the suggestion is put in its place.
TYPOS = {
    "lama-3-8b --method qlora --gpu 4090": "lama-3-8b",
    "llama3.2 --method qlora --gpu 4090": "llama3.2",
    "qwen3-8b --mehtod qlora --gpu 4090": "--mehtod",
    "qwen3-8b --method qlra --gpu 4090": "qlra",
    "qwen3-8b --method qlora --gpu 4900": "4900",
    "qwen3-8b --method qlora --gpu colab": "colab",
    "qwen3-8b --method qlora --profile axolotll --gpu 4090": "axolotll",
    "qwen3-0.6b --method lora --gpu macbook": "macbook",
}
# Options of other tools that are other words here.
OTHERS = ("load-in-4bit", "bf16", "fp16", "flash_attn", "use_unsloth", "use-peft", "vllm", "int8", "full")

Printed = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Printed:
    def run(line: str) -> tuple[int, str, str]:
        words = shlex.split(line)
        code = run_plain(words)
        if code is None:
            with pytest.raises(SystemExit) as left:
                app(words)
            code = int(str(left.value.code))
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_there_are_thirty_questions() -> None:
    assert len(QUESTIONS) >= 30


@pytest.mark.parametrize("line", sampled(list(QUESTIONS)))
def test_a_question_is_answered_as_it_is_typed(line: str, typed: Printed) -> None:
    code, out, err = typed(line)
    assert (code, err) == (QUESTIONS[line][0], "")
    assert out.startswith(QUESTIONS[line][1])


@pytest.mark.parametrize("name", OTHERS)
def test_an_option_of_another_tool_names_the_words_that_work(name: str, typed: Printed) -> None:
    code, out, err = typed(f"qwen3-0.6b --{name}")
    assert (code, out) == (2, "")
    found = re.search(rf"No such option: --{name}; write (.*)$", err.strip())
    assert found, err
    assert typed(f"qwen3-0.6b {found[1]}")[0] == 0


@pytest.mark.parametrize("words", ["--method pissa", "--method rslora", "--attention fa2", "--attention flash-attn"])
def test_a_word_of_another_tool_names_the_words_that_work(words: str, typed: Printed) -> None:
    code, out, err = typed(f"qwen3-0.6b {words}")
    option, _, word = words.partition(" ")
    found = re.search(rf"{option}\): unknown '{word}'; write (.*)$", err.strip())
    assert (code, out) == (2, "")
    assert found, err
    assert typed(f"qwen3-0.6b {option} {found[1]}")[0] == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("vllm qwen3-8b", "'vllm' takes no model; write qwen3-8b --method generate --profile vllm"),
        (
            "qwen3-0.6b --rollout vllm",
            "rollout (--rollout): unknown 'vllm'; write colocate (vLLM on the same GPUs) or server",
        ),
        (
            "buy pythia-70m --vendor amd",
            "to: no card that matches has a list price; --to rent has those without one",
        ),
        ("max qwen3-8b 2x3090", "'2x3090' is no option; write --gpu 2x3090"),
        ("qwen3-8b qlora --gpu 3090", "'qlora' is no option; write --method qlora"),
        ("qwen3-8b more", "Got unexpected extra argument(s) (more)"),
    ],
)
def test_a_word_that_is_no_option_names_the_one_it_means(line: str, said: str, typed: Printed) -> None:
    assert typed(line) == (2, "", f"memplan: {said}\n")


def test_an_engine_that_does_not_start_is_offered_what_starts(typed: Printed) -> None:
    code, out, _ = typed("kimi-k2 --gpu 8xb200 --profile vllm")
    offered = re.search(r"^  memplan (.*)$", out, re.MULTILINE)
    assert (code, out.partition("  ")[0]) == (1, "DOES NOT START")
    assert "would fit  --tp 8 (uses" in out
    assert offered is not None
    assert typed(offered[1])[0] == 0


def test_an_option_that_takes_no_memory_may_be_left_out(typed: Printed) -> None:
    assert typed("qwen3-0.6b --learning_rate 1e-4")[2].endswith("--learning_rate; leave it out, it takes no memory\n")


@pytest.mark.parametrize("line", sampled(list(TYPOS)))
def test_each_suggestion_for_a_typo_works_there(line: str, typed: Printed) -> None:
    code, out, err = typed(line)
    assert (code, out) == (2, "")
    found = re.search(r"did you mean (.*)\?$|Possible options: (.*)\)$", err.strip())
    assert found, err
    suggestions = re.split(r" or |, ", found[1] or found[2])
    first = typed(line.replace(TYPOS[line], suggestions[0]))
    assert first[0] in (0, 1), first
    assert len(set(suggestions)) == len(suggestions)
