"""Trace steps of LitGPT's LoRA, and print rows for tests/estimate/test_trainers.py.

python tests/golden/trace_litgpt.py > tests/golden/traced_litgpt.jsonl

Needs litgpt 0.5.3 in addition to the other libraries; its imports of lightning and the Hub are stubbed.
A step is that of finetune/lora.py: logits in chunks of 128 tokens, which lightning's Fabric casts to fp32, the chunked
loss, backward, and torch's AdamW. Tensors are fake.
"""

from __future__ import annotations

import ast
import gc
import importlib
import importlib.machinery
import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.probe.fake import fake_device

SIZES = {"n_layer": 4, "n_embd": 1024, "n_head": 16, "intermediate_size": 2816, "padded_vocab_size": 32064}
PHI = {"n_query_groups": 16, "block_size": 8192, "mlp_class_name": "LLaMAMLP", "norm_class_name": "RMSNorm"}
PHI |= {"rotary_percentage": 1.0, "parallel_residual": False, "bias": False}


def cases() -> Iterator[dict[str, Any]]:
    plain = {"window": 2048, "groups": 16, "micro": 2, "tokens": 512, "passes": 1}
    for more in (
        *({}, {"window": None}, {"groups": 4}, {"groups": 1}, {"passes": 2}, {"micro": 1}),
        *(
            {"tokens": 1000},
            {"tokens": 3001, "micro": 1},
            {"tokens": 1001},
            {"tokens": 4096, "window": 1024, "micro": 1},
        ),
    ):
        yield {**plain, **more}


def with_adapters(folder: Path) -> Any:
    """Return LitGPT's module of models with adapters."""
    spec: Any = importlib.machinery.PathFinder.find_spec("litgpt", [str(folder)])
    package = importlib.util.module_from_spec(spec)
    sys.modules["litgpt"] = package  # whose own imports are not needed
    for name in ("litgpt.utils", "litgpt.scripts.convert_hf_checkpoint"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__getattr__ = lambda name: MagicMock(name=name)  # type: ignore[method-assign]
    return importlib.import_module("litgpt.lora")


def chunked_loss(folder: Path) -> Any:
    """Return LitGPT's loss of logits in chunks, without its module, which imports lightning."""
    import torch

    tree = ast.parse((folder / "litgpt" / "utils.py").read_text("utf-8"))
    [node] = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "chunked_cross_entropy"]
    found: dict[str, Any] = {"torch": torch}
    exec(f"from __future__ import annotations\n{ast.unparse(node)}", found)
    return found["chunked_cross_entropy"]


def traced(asked: dict[str, Any], lora: Any, compute_loss: Any) -> dict[str, int]:
    """Return the peaks by phase and step, in bytes."""
    import torch

    from memplan.catalogue.hardware.gpus import find_gpu
    from memplan.catalogue.quantization.fused_4bit import card_of
    from memplan.probe.fake import recording
    from memplan.probe.fake.tracker import Tracker, new_operation_cache

    card = card_of(find_gpu("a100-sxm-80gb").compute_capability)
    tracker = Tracker("cuda", new_operation_cache(card))
    tracker.calibrate()
    known = recording.StorageLabels(tracker)
    sizes = {**SIZES, **PHI, "n_query_groups": asked["groups"], "sliding_window_size": asked["window"]}
    adapters = {"lora_r": 8, "lora_alpha": 16, "lora_query": True, "lora_value": True}
    gc.disable()
    with tracker.resizing(), tracker:
        with tracker.phase("load"):
            torch.set_default_dtype(torch.bfloat16)
            with torch.device("cuda"):
                model = lora.GPT(lora.Config(**sizes, **adapters))
            lora.mark_only_lora_as_trainable(model)
            model.max_seq_length = asked["tokens"]
            torch.set_default_dtype(torch.float32)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        logits = loss = None
        for step in (1, 2):
            tracker.step = step
            for _ in range(asked["passes"]):
                with tracker.phase("forward"):
                    ids, targets = (
                        torch.zeros((asked["micro"], asked["tokens"]), dtype=torch.int64, device="cuda")
                        for _ in range(2)
                    )
                    logits = [chunk.float() for chunk in model(ids, lm_head_chunk_size=128)]
                    logits[-1] = logits[-1][..., :-1, :]
                    loss = compute_loss(logits, targets[..., 1:])
                with tracker.phase("backward"):
                    (loss / asked["passes"]).backward()
            with tracker.phase("step"):
                optimizer.step()
                optimizer.zero_grad()
    gc.enable()
    peaks: dict[str, int] = {}
    for name, step, _, _, peak, *_ in recording.report(tracker, known)["phases"]:
        peaks[f"{name} {step}"] = max(peaks.get(f"{name} {step}", 0), peak)
    return peaks


if __name__ == "__main__":
    fake_device.load()
    import torch.nn.attention.flex_attention  # noqa: F401
    import transformers.modeling_utils  # noqa: F401

    from memplan.catalogue.hardware.gpus import find_gpu
    from memplan.catalogue.quantization.fused_4bit import card_of
    from memplan.probe.fake import fake_tensor_patches

    fake_tensor_patches.apply(card_of(find_gpu("a100-sxm-80gb").compute_capability))
    spec = importlib.machinery.PathFinder.find_spec("litgpt")
    assert spec is not None
    assert spec.origin is not None
    home = Path(spec.origin).parents[1]
    module, chunked = with_adapters(home), chunked_loss(home)
    for case in cases():
        print(json.dumps({**case, "peaks": traced(case, module, chunked)}), flush=True)
