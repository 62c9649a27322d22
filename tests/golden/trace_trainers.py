"""Trace steps of trainers themselves, and print rows for tests/estimate/test_trainers.py.

python -m venv /tmp/trl
/tmp/trl/bin/pip install trl==1.16.0 transformers==5.24.0 peft==0.21.2 bitsandbytes==0.50.2 'torch==2.13.*' pydantic
/tmp/trl/bin/python tests/golden/trace_trainers.py trl-1.15 tests/golden/traced_trainers.jsonl >> /tmp/rows.jsonl

Runs with a row in a file that is given are not traced again. Other trainers need other packages:

    llamafactory  llamafactory==0.9.5 transformers==5.6.0 trl==0.24.0
    axolotl       axolotl==0.21.0 with what it pins, and triton (for Python 3.11 its wheel must be unpacked)
    unsloth       unsloth==2026.10.9 transformers==5.17.0 trl==1.15.0 (rows in traced_unsloth.jsonl)
    automodel     nemo-automodel==0.7.0 with megatron-fsdp==0.5.0, flashoptim and torchdata, without their dependencies
    ms-swift      ms-swift==4.6.0 transformers==5.17.0 trl==0.24.0 peft==0.20.0

The trainer itself wraps the model: it adds the adapters and casts them, enables checkpointing, patches the head and
prepares the model with accelerate. A step is its `training_step`, then clipping and its optimizer. Only loading the
weights from a file is left out. Tensors are fake, Triton's kernels compute nothing, and every label counts.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.probe.fake import fake_device
from memplan.probe.libraries import library
from memplan.probe.run import child
from memplan.probe.run.trace import read
from memplan.spec.run import RunSpec
from tests.golden.trace_runs import line
from tests.golden.trainer_scripts import (
    AutomodelScript,
    AxolotlScript,
    LlamaFactoryScript,
    SwiftScript,
    TrainerScript,
    UnslothScript,
)

LLAMA = {
    "model_type": "llama",
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 2816,
    "vocab_size": 128256,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "qwen2": {**LLAMA, "model_type": "qwen2", "vocab_size": 151936},
    "qwen3": {**LLAMA, "model_type": "qwen3", "vocab_size": 151936, "head_dim": 64},
    "mistral": {**LLAMA, "model_type": "mistral", "vocab_size": 32768, "sliding_window": None},
    "gemma2": {
        **LLAMA,
        "model_type": "gemma2",
        "vocab_size": 100000,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
    },
    "phi3": {**LLAMA, "model_type": "phi3", "vocab_size": 32064, "pad_token_id": 0},
    # So few words that a block is the largest moment, not the loss.
    "blocks": {**LLAMA, "hidden_size": 2048, "num_hidden_layers": 2, "intermediate_size": 5632, "vocab_size": 4096},
}
FP32, BF16 = ({"weights": dtype, "compute": "bf16", "autocast": True} for dtype in ("fp32", "bf16"))
# Family, method, precision, sequences and tokens; then what differs from the trainer's defaults.
CASES: tuple[tuple[str, str, dict[str, Any], int, int, dict[str, Any]], ...] = (
    ("llama", "full", FP32, 2, 1024, {}),
    ("llama", "full", BF16, 2, 1024, {}),
    ("llama", "full", BF16, 8, 4096, {}),
    ("llama", "full", BF16, 1, 512, {"checkpointing": "none"}),
    ("llama", "lora", BF16, 2, 1024, {}),
    ("llama", "lora", BF16, 4, 8192, {}),
    ("llama", "lora", FP32, 4, 2048, {}),
    ("llama", "lora", BF16, 2, 1024, {"checkpointing": "none"}),
    ("llama", "qlora", BF16, 2, 2048, {}),
    ("llama", "qlora", FP32, 2, 2048, {}),
    ("llama", "qlora", BF16, 1, 8192, {}),
    ("llama", "dora", BF16, 2, 1024, {}),
    ("tied", "full", FP32, 2, 1024, {}),
    ("tied", "full", BF16, 4, 2048, {}),
    ("tied", "lora", BF16, 4, 2048, {}),
    ("qwen2", "full", BF16, 2, 2048, {}),
    ("qwen2", "lora", BF16, 4, 4096, {}),
    ("qwen2", "qlora", BF16, 4, 1024, {}),
    ("qwen3", "full", FP32, 1, 2048, {}),
    ("qwen3", "lora", BF16, 2, 4096, {}),
    ("mistral", "full", BF16, 2, 4096, {}),
    ("mistral", "lora", BF16, 8, 1024, {}),
    ("mistral", "qlora", BF16, 2, 8192, {}),
    ("gemma2", "full", BF16, 2, 1024, {}),
    ("gemma2", "lora", BF16, 2, 2048, {}),
    ("phi3", "full", FP32, 2, 2048, {}),
    ("phi3", "lora", BF16, 4, 2048, {}),
    ("blocks", "full", BF16, 4, 4096, {}),
    ("blocks", "full", BF16, 2, 4096, {"checkpointing": "none"}),
    ("blocks", "lora", BF16, 4, 4096, {}),
    ("blocks", "lora", BF16, 2, 4096, {"checkpointing": "none"}),
    ("blocks", "qlora", BF16, 4, 4096, {}),
    ("blocks", "dora", BF16, 2, 4096, {}),
    ("blocks", "qdora", BF16, 2, 4096, {}),
    ("blocks", "lora", BF16, 4, 4096, {"checkpointing": "full"}),
    ("qwen3", "qlora", BF16, 2, 2048, {}),
    ("mistral", "lora", BF16, 2, 4096, {}),
    ("tied", "qlora", BF16, 2, 2048, {}),
)
# Of Unsloth, whose CASES are fewer: it trains no weights in full, and nothing in fp32.
OF_UNSLOTH: tuple[tuple[str, str, dict[str, Any], int, int, dict[str, Any]], ...] = (
    ("llama", "qlora", BF16, 8, 1024, {"checkpointing": "full"}),
    ("tied", "lora", BF16, 1, 8192, {}),
    ("qwen2", "lora", BF16, 2, 4096, {"checkpointing": "none"}),
    ("qwen2", "qlora", BF16, 2, 8192, {}),
    ("qwen3", "lora", BF16, 8, 1024, {"checkpointing": "full"}),
    ("qwen3", "qlora", BF16, 4, 4096, {}),
    ("qwen3", "dora", BF16, 2, 2048, {}),
    ("blocks", "qlora", BF16, 2, 4096, {"checkpointing": "none"}),
)
# Of Unsloth, for the trainers that compare: trainer, then as above.
COMPARED: tuple[tuple[str, str, str, int, int, dict[str, Any]], ...] = (
    ("dpo", "llama", "lora", 2, 1024, {}),
    ("dpo", "blocks", "lora", 2, 4096, {"checkpointing": "none"}),
    ("kto", "llama", "lora", 2, 1024, {}),
    ("kto", "blocks", "lora", 2, 4096, {"checkpointing": "none"}),
)


def fsdp2(world: int, accumulation: int = 1) -> dict[str, Any]:
    """Return what differs in a run on several GPUs."""
    return {"parallelism": {"world": world, "strategy": "fsdp2"}, "batch": {"accumulation": accumulation}}


# Of NeMo Automodel, whose recipes have dropout.
OF_AUTOMODEL: tuple[tuple[str, str, dict[str, Any], int, int, dict[str, Any]], ...] = (
    ("llama", "lora", BF16, 2, 2048, {"dropout": 0.1}),
    ("blocks", "lora", BF16, 4, 2048, {"dropout": 0.1}),
    ("qwen3", "full", BF16, 2, 1024, {"checkpointing": "full"}),
    ("qwen2", "lora", BF16, 2, 2048, {"checkpointing": "full"}),
    ("llama", "full", BF16, 2, 1024, fsdp2(4)),
    ("llama", "full", FP32, 2, 1024, fsdp2(2)),
    ("llama", "full", BF16, 2, 1024, fsdp2(4, 3)),
    ("llama", "full", FP32, 1, 2048, fsdp2(8, 2)),
    ("llama", "lora", BF16, 2, 1024, fsdp2(2)),
    ("tied", "full", BF16, 2, 1024, fsdp2(2)),
    ("tied", "full", BF16, 2, 1024, fsdp2(8, 2)),
    ("qwen2", "full", BF16, 1, 4096, fsdp2(16)),
    ("qwen3", "lora", BF16, 2, 1024, fsdp2(8, 2)),
    ("blocks", "full", BF16, 2, 2048, fsdp2(2)),
    ("blocks", "full", FP32, 2, 2048, fsdp2(4, 2)),
    ("blocks", "lora", BF16, 2, 4096, fsdp2(4)),
)
# Of TRL 1.15, without checkpointing and with `activation_offloading`.
OFFLOADED: tuple[tuple[str, str, dict[str, Any], int, int, dict[str, Any]], ...] = (
    ("llama", "full", BF16, 1, 512, {}),
    ("llama", "lora", BF16, 2, 1024, {}),
    ("blocks", "full", BF16, 2, 4096, {}),
    ("blocks", "lora", BF16, 2, 4096, {}),
    ("llama", "qlora", BF16, 2, 2048, {}),
    ("tied", "full", FP32, 2, 1024, {}),
    ("gemma2", "lora", BF16, 2, 2048, {}),
    ("phi3", "lora", BF16, 2, 2048, {}),
    ("phi3", "full", BF16, 2, 1024, {}),
    ("qwen3", "full", BF16, 1, 2048, {}),
    ("qwen2", "lora", BF16, 2, 2048, {"attention": "eager"}),
    ("llama", "dora", BF16, 2, 1024, {}),
)


_FLEX = {"attention": "flex_attention"}
FLEXIBLE: tuple[tuple[str, str, dict[str, Any], int, int, dict[str, Any]], ...] = (
    ("llama", "lora", BF16, 2, 2048, _FLEX),
    ("gemma2", "full", BF16, 1, 1024, _FLEX),
    ("qwen2", "qlora", BF16, 2, 1024, {**_FLEX, "checkpointing": "none"}),
)


def runs(profile: str) -> Iterator[tuple[str, RunSpec]]:
    """Yield the runs of `CASES` under a profile, as transformers' Trainer runs them."""
    framework = profile.rpartition("-")[0]
    offloaded = [(*case, {**changes, "checkpointing": "offloaded"}) for *case, changes in OFFLOADED]
    others = {
        "unsloth": OF_UNSLOTH,
        "automodel": OF_AUTOMODEL,
        "trl": (*offloaded, *FLEXIBLE) if profile == "trl-1.15" else (),
    }.get(framework, ())
    for family, method, precision, micro, tokens, changes in (*CASES, *others):
        if (framework, method, precision) == ("llamafactory", "full", BF16):
            continue  # it casts the weights to fp32
        kernels, offloads = dict(changes), changes.get("checkpointing") == "offloaded"
        parallelism, batch = kernels.pop("parallelism", {}), kernels.pop("batch", {})
        if framework in ("axolotl", "ms-swift", "unsloth", "automodel") and precision == FP32 and not parallelism:
            continue  # with bf16 they load weights in bf16
        if framework == "automodel" and ("dora" in method or family in ("gemma2", "phi3")):
            continue
        if framework == "unsloth" and (method == "full" or family == "phi3"):
            continue  # FastModel runs those, with transformers' code
        is_own_loop = framework == "automodel"  # without autocast
        if (framework, family) == ("axolotl", "phi3") and method != "full":
            kernels["fused"] = []  # its kernels refuse fused projections
        if (framework, family) == ("llamafactory", "gemma2"):
            kernels["attention"] = "eager"  # its configure_attn_implementation; transformers 5.6 would take sdpa
        named = ["q_proj", "v_proj", "down_proj"]
        # their kernels need adapters on all of q, k and v, or of an MLP
        if framework in ("axolotl", "unsloth") or (is_own_loop and family != "llama"):
            named = "all-linear"
        targets = {} if method == "full" else {"targets": named, "dropout": kernels.pop("dropout", 0.0)}
        yield (
            f"{profile} {family} {method} {precision['weights']} {micro}x{tokens}{_suffix(changes)}",
            RunSpec.model_validate(
                {
                    "model": {"config": CONFIGS[family]},
                    "method": {"kind": method, **targets},
                    "precision": {"weights": "bf16"} if is_own_loop and precision == BF16 else precision,
                    "batch": {"micro": micro, "sequence": tokens, **batch},
                    "kernels": {**kernels, **({"checkpointing": "none"} if offloads else {})},
                    "parallelism": {"offload": {"activations": True}} if offloads else parallelism,
                    "loop": {"trainer": not is_own_loop},
                    "profile": profile,
                }
            ),
        )

    for trainer, family, method, micro, tokens, kernels in COMPARED if framework == "unsloth" else ():
        yield (
            f"{profile} {trainer} {family} {method} bf16 {micro}x{tokens}{_suffix(kernels)}",
            RunSpec.model_validate(
                {
                    "model": {"config": CONFIGS[family]},
                    "trainer": trainer,
                    "method": {"kind": method, "targets": "all-linear"},
                    "precision": BF16,
                    "batch": {"micro": micro, "sequence": tokens},
                    "kernels": kernels,
                    "loop": {"trainer": True},
                    "profile": profile,
                }
            ),
        )


SCRIPTS = {
    "trl": TrainerScript,
    "llamafactory": LlamaFactoryScript,
    "axolotl": AxolotlScript,
    "ms-swift": SwiftScript,
    "unsloth": UnslothScript,
    "automodel": AutomodelScript,
}


def _suffix(changes: dict[str, Any]) -> str:
    names = {"none": " plain", "full": " checkpointed", "offloaded": " offloaded"}
    if "parallelism" in changes:
        return f" fsdp2 {changes['parallelism']['world']} x{changes['batch']['accumulation']}"
    return names.get(changes.get("checkpointing", ""), "") + (
        " flex" if changes.get("attention") in _FLEX.values() else ""
    )


def main(runs: Callable[[str], Iterator[tuple[str, RunSpec]]] = runs) -> None:
    profile, *files = sys.argv[1:]
    framework = profile.rpartition("-")[0]
    trainer = SCRIPTS[framework]
    output, sys.stdout = sys.stdout, sys.stderr  # trainers print, too
    done = {json.loads(row).get("name") for file in files for row in Path(file).read_text("utf-8").splitlines()}
    release = " ".join(profile.rpartition("-")[::2])
    prepare(trainer)
    if framework == "trl":
        release = f"trl {library(framework).__version__}"
    for name, run in runs(profile):
        if name in done:
            continue
        process = os.fork()  # trainers patch classes, as long as their process lasts
        if process:
            os.waitpid(process, 0)
            continue
        try:
            row = traced(name, run, release)
            print(json.dumps(row), file=output, flush=True)
        except Exception:
            print(name, traceback.format_exc(), file=sys.stderr, flush=True)
        os._exit(0)


def prepare(trainer: type[TrainerScript]) -> None:
    """Import the trainer, and let it and the libraries see a GPU that does not exist."""
    fake_device.load()
    import torch

    for name in trainer.unused:
        sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None), __version__="0")
    for module in trainer.imported:
        library(module)  # before the patches, some of which these imports do not survive

    from memplan.catalogue.quantization.fused_4bit import card_of
    from memplan.probe.fake import fake_tensor_patches as patches
    from memplan.probe.script import script

    patches.apply(card_of(None))
    cuda: Any = torch.cuda
    cuda.device_count, cuda.set_device, cuda.get_device_name = (lambda: 1), (lambda device: None), (lambda *_: "A100")
    library("transformers.masking_utils").fast_all = lambda mask: True  # nothing is padded
    storages: dict[int, Any] = {}  # weak references, without which another storage would get the same number
    kept: Any = library("torch.multiprocessing.reductions").StorageWeakRef

    def number(self: Any) -> int:
        """Stand in for the address of a fake storage, by which TRL knows what it has offloaded."""
        storages.setdefault(self._cdata, kept(self))
        return self._cdata

    torch.UntypedStorage.data_ptr = number
    arguments: Any = library("transformers.training_args")
    arguments.is_torch_bf16_gpu_available = arguments.is_torch_tf32_available = lambda: True
    script.build = trainer


def traced(name: str, run: RunSpec, release: str) -> dict[str, Any]:
    """Return the row of a run."""
    from memplan.probe.fake import tracker
    from memplan.probe.libraries import versions

    trainer = SCRIPTS[run.profile.rpartition("-")[0]]
    trainer.patch()
    tracker.scalar_answers.append(partial(trainer.answer, run))
    read_versions = f"{release}, " + ", ".join(f"{k} {v}" for k, v in versions().items())
    return {**line(name, run, read(run, child._answer(run, 2, "cuda", False))), "versions": read_versions}


if __name__ == "__main__":
    main()
