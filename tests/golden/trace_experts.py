"""Trace QLoRA with quantised experts, and print rows for tests/estimate/test_traced_steps.py.

python tests/golden/trace_experts.py [AXOLOTL] >> tests/golden/traced_experts.jsonl

AXOLOTL is the folder of an unpacked axolotl 0.21.0 wheel. With it the runs are traced whose adapters are on the
experts, which peft finds only with Axolotl's patches; without it all others.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.probe import refusals
from memplan.probe.fake import fake_device
from memplan.probe.libraries import library
from memplan.probe.run import child
from memplan.probe.run.trace import read
from memplan.spec.run import RunSpec
from tests.golden.trace_runs import line, write

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
AUTOCAST = {"weights": "bf16", "compute": "bf16", "autocast": True}


def qlora(model: str, quantization: dict[str, Any] | None = None, sequence: int = 256, **more: Any) -> dict[str, Any]:
    """Return a run. `targets` and `rank` belong to its method."""
    method = {key: more.pop(key) for key in ("targets", "rank") if key in more}
    formats = {"experts": True, **(quantization or {})}
    return {
        "model": model,
        "method": {"kind": "qlora", "quantization": formats, **method},
        "batch": {"sequence": sequence, **more.pop("batch", {})},
        **more,
    }


UNCHECKPOINTED = {"kernels": {"checkpointing": "none"}}
PACKED, SHARDED = {"storage": "bf16"}, {"parallelism": {"world": 4, "dp": 4, "strategy": "fsdp2"}}
CASES: dict[str, dict[str, Any]] = {
    "qwen3_moe": qlora("qwen3-30b-a3b"),
    "qwen3_moe, attention": qlora("qwen3-30b-a3b", targets=ATTENTION, sequence=2048, precision=AUTOCAST),
    "qwen3_moe, 8-bit states": qlora("qwen3-30b-a3b", rank=32, optimizer="adamw_8bit"),
    "mixtral": qlora("mixtral-8x7b", sequence=512),
    "mixtral, uncheckpointed": qlora("mixtral-8x7b", targets=ATTENTION, **UNCHECKPOINTED),
    "gpt_oss": qlora("gpt-oss-20b"),
    "gpt_oss, uncheckpointed": qlora("gpt-oss-20b", targets=ATTENTION, **UNCHECKPOINTED),
    "glm4_moe_lite, attention": qlora("glm-4.7-flash", targets=["q_a_proj", "q_b_proj", "o_proj"], rank=32),
    "deepseek_v2, attention": qlora("deepseek-v2-lite", targets=["q_proj", "o_proj"], precision=AUTOCAST),
    "olmoe, scales not quantised": qlora("olmoe-1b-7b", {"double_quant": False}, batch={"micro": 2}, **UNCHECKPOINTED),
    "qwen2_moe, fp4": qlora("qwen1.5-moe-a2.7b", {"format": "fp4"}, targets=ATTENTION, batch={"micro": 2}),
    "glm4_moe, attention": qlora("glm-4.5-air", targets=ATTENTION),
    "qwen3_moe, fsdp2": qlora("qwen3-30b-a3b", PACKED, targets=ATTENTION, **SHARDED),
    "qwen3_moe, fsdp2, Trainer": qlora(
        "qwen3-30b-a3b", PACKED, targets=ATTENTION, sequence=512, loop={"trainer": True}, **SHARDED
    ),
    "mixtral, fsdp2": qlora("mixtral-8x7b", PACKED, targets=ATTENTION, sequence=512, precision=AUTOCAST, **SHARDED),
    "gpt_oss, fsdp2, uncheckpointed": qlora("gpt-oss-20b", PACKED, targets=ATTENTION, **UNCHECKPOINTED, **SHARDED),
    "prepared": qlora("qwen3-30b-a3b", {"kbit_preparation": True}, targets=ATTENTION),
}
EXPERTS = ["gate_proj", "up_proj", "down_proj"]
ADAPTED: dict[str, dict[str, Any]] = {
    "experts of qwen3_moe": qlora("qwen3-30b-a3b", targets=["q_proj", "v_proj", *EXPERTS]),
    "experts of qwen3_moe, rank 4": qlora("qwen3-30b-a3b", targets=EXPERTS, rank=4, precision=AUTOCAST),
    "experts of deepseek_v2": qlora("deepseek-v2-lite"),
    "experts of mixtral": qlora("mixtral-8x7b", targets=["q_proj", "w1", "w2", "w3"]),
    "experts of olmoe, uncheckpointed": qlora("olmoe-1b-7b", targets=[*ATTENTION, *EXPERTS], **UNCHECKPOINTED),
}


def patch(axolotl: Path) -> None:
    """Let peft find quantised experts, as Axolotl does."""
    logs: Any = ModuleType("axolotl.utils.logging")
    logs.get_logger = logging.getLogger
    sys.modules["axolotl.utils.logging"] = logs
    spec = spec_from_file_location("moe_quant", axolotl / "axolotl" / "monkeypatch" / "moe_quant.py")
    assert spec is not None
    assert spec.loader is not None
    patches = module_from_spec(spec)
    spec.loader.exec_module(patches)
    patches.patch_peft_target_parameters_matching()


def trace_adapted(axolotl: Path) -> None:
    fake_device.load()
    for name in ("transformers", "transformers.modeling_utils", "peft", "bitsandbytes"):
        library(name)  # before the patches, which their imports do not survive
    from memplan.catalogue.quantization.fused_4bit import card_of
    from memplan.probe.fake import fake_tensor_patches

    fake_tensor_patches.apply(card_of(None))
    patch(axolotl)
    refusals.adapted_experts = lambda *_: ()
    for name, fields in ADAPTED.items():
        process = os.fork()
        if process:
            os.waitpid(process, 0)
            continue
        run = RunSpec(**fields)
        row = line(name, run, read(run, child._answer(run, 2, "cuda", False)))
        print(json.dumps(row), flush=True)
        os._exit(0)


def main() -> None:
    if sys.argv[1:]:
        trace_adapted(Path(sys.argv[1]))
    else:
        write([(name, RunSpec(**fields)) for name, fields in CASES.items()])


if __name__ == "__main__":
    main()
