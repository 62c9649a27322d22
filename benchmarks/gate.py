"""Time `memplan check` of 50 run files on 3 GPUs, and `memplan diff` of a change of 5 of them, in cold processes.

    python benchmarks/gate.py [rounds]

CPU time as a ratio to `benchmarks/floor.py`, because other work on the machine changes it less than wall time, and the
wall time, which several cores share. A team's files differ in lengths, batch sizes and models more than in methods:
there are 5 models, 2 frameworks and 5 sizes of each.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import HERE, QUESTION, environment, run

MODELS = ("Qwen/Qwen2-7B", "meta-llama/Llama-3.1-8B", "mistralai/Mistral-7B-v0.1", "qwen2.5-1.5b", "gemma-2-2b")
SIZES = ((1024, 1), (2048, 1), (2048, 2), (4096, 1), (4096, 2))
AXOLOTL = """base_model: {model}
load_in_4bit: true
adapter: qlora
lora_r: 16
lora_alpha: 32
lora_target_linear: true
sequence_len: {sequence}
micro_batch_size: {micro}
gradient_accumulation_steps: 4
optimizer: adamw_torch_fused
bf16: true
gradient_checkpointing: true
flash_attention: true
"""
LLAMAFACTORY = """model_name_or_path: {model}
stage: sft
finetuning_type: lora
lora_rank: 8
lora_target: all
cutoff_len: {sequence}
per_device_train_batch_size: {micro}
gradient_accumulation_steps: 8
bf16: true
"""
BUDGET = '[[budget]]\nruns = ["configs/*.yaml"]\ngpu = ["3090", "a100-40gb", "h100"]\n'


def write(folder: Path) -> None:
    """Write the 50 files and their budget."""
    (folder / "configs").mkdir()
    (folder / "memplan.toml").write_text(BUDGET, "utf-8")
    for number, model in enumerate(MODELS):
        for name, text in (("axolotl", AXOLOTL), ("llamafactory", LLAMAFACTORY)):
            for sequence, micro in SIZES:
                path = folder / "configs" / f"{number}-{name}-{sequence}x{micro}.yaml"
                path.write_text(text.format(model=model, sequence=sequence, micro=micro), "utf-8")


def commit(folder: Path) -> None:
    """Commit the files, and change five of them."""
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "--quiet"], ["add", "--all"], [*who, "commit", "--quiet", "--message", "base"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    for number in range(len(MODELS)):
        path = folder / "configs" / f"{number}-axolotl-2048x1.yaml"
        path.write_text(path.read_text("utf-8").replace("2048", "3072"), "utf-8")


def timed(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """Return the seconds of CPU and wall time that a command takes."""
    start = time.perf_counter()
    return run(command, env), time.perf_counter() - start


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "team").mkdir()
        write(folder / "team")
        commit(folder / "team")
        env = environment(folder)
        team = str(folder / "team")
        inside = "import os, sys; os.chdir({!r}); from memplan.cli import main; sys.argv = ['memplan', *{!r}]; main()"
        commands = {
            "floor": [sys.executable, str(HERE / "floor.py"), *QUESTION],
            "check": [sys.executable, "-c", inside.format(team, ["check", "--format", "markdown"])],
            "diff": [
                sys.executable,
                "-c",
                inside.format(team, ["diff", "HEAD", "--format", "markdown"]),
            ],
        }
        for command in commands.values():
            run(command, env)  # compiles
        figures = {label: [timed(command, env) for _ in range(rounds)] for label, command in commands.items()}
    floor = statistics.median(cpu for cpu, _ in figures["floor"])
    for label, of_label in figures.items():
        cpu, wall = (statistics.median(figure) for figure in zip(*of_label, strict=True))
        print(f"{label:6} {cpu:5.2f} s of CPU, {cpu / floor:5.1f} times the floor; {wall:5.2f} s in all")


if __name__ == "__main__":
    main()
