"""Trace steps with the kernels of packages, and print rows for tests/estimate/test_traced_steps.py.

pip install --no-deps --target /tmp/kernels flash-linear-attention==0.6.0 fla-core==0.6.0 triton==3.9.0 einops
PYTHONPATH=/tmp/kernels python tests/golden/trace_packages.py fla >> tests/golden/traced_packages.jsonl

Of causal-conv1d 1.7.0 and mamba-ssm 2.3.2, which cannot be installed without CUDA, unpack the source distributions and
put their folders on the path, too. Triton's kernels compute nothing; the functions of CUDA extensions allocate what
their C++ code does.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.probe.fake import fake_device
from memplan.probe.libraries import library
from memplan.probe.run import child
from memplan.probe.run.trace import read
from memplan.resolve.decide import fill_from_profile
from memplan.spec.run import RunSpec
from tests.golden.trace_families import config_of, method_of
from tests.golden.trace_runs import line
from tests.golden.trainer_scripts import without_launches

PACKAGES: dict[str, tuple[str, ...]] = {
    "fla": ("fla",),
    "fla and causal-conv1d": ("fla", "causal_conv1d"),
    "causal-conv1d": ("causal_conv1d",),
    "mamba-ssm": ("mamba_ssm", "causal_conv1d"),
}
FAMILIES = {
    "fla": (
        "qwen3_next",
        "qwen3_5_text",
        "qwen3_5_moe_text",
        "qwen3.5-0.8b-text",
        "grouped",
        "equal",
        "kimi_linear",
        "kda",
        "kimi-linear-48b-a3b",
    ),
    "causal_conv1d": ("nemotron_h", "jamba"),
    "mamba_ssm": (
        "mamba",
        "falcon_mamba",
        "jamba",
        "inner",
        "normed",
        "mamba2",
        "nemotron_h",
        "bamba",
        "granitemoehybrid",
        "falcon_h1",
        "granite-4.0-h-micro",
        "states",
        "C",
        "decays",
    ),
}


def _wide(family: str, keys: int, values: int) -> dict[str, Any]:
    """Return a config whose delta rule takes more than anything else."""
    heads = {"linear_num_key_heads": keys, "linear_num_value_heads": values}
    return {**config_of(family, 0), **heads, "linear_key_head_dim": 256, "linear_value_head_dim": 64}


def _scanned(**sizes: int) -> dict[str, Any]:
    """Return a config of Mamba 2 for which one moment of the scan's backward is the largest."""
    return {**config_of("mamba2", 0), "vocab_size": 64, "num_heads": 8, "expand": 1, **sizes}


CONFIGS = {
    "grouped": _wide("qwen3_next", 2, 4),
    "equal": _wide("qwen3_5_text", 4, 4),
    "kda": {**config_of("kimi_linear", 0), "vocab_size": 64, "linear_head_dim": 64, "moe_intermediate_size": 16},
    "inner": {**config_of("mamba", 0), "vocab_size": 64},
    "normed": {**config_of("falcon_mamba", 0), "vocab_size": 64},
    "states": _scanned(head_dim=16, state_size=24, n_groups=2, chunk_size=16),
    "C": _scanned(hidden_size=64, head_dim=8, state_size=64, n_groups=2, chunk_size=16),
    "decays": _scanned(num_heads=32, head_dim=4, state_size=8, n_groups=1, chunk_size=128),
}
SIZES = {"C": (1, 128), "decays": (4, 4096), "inner": (1, 4096), "normed": (1, 4096)}
EVERY: tuple[dict[str, Any], ...] = (
    *(
        {"method": {"kind": kind}, "kernels": {"checkpointing": how}}
        for kind in ("full", "lora")
        for how in ("full", "none")
    ),
    {"method": {"kind": "qlora"}},
    {"precision": {"weights": "fp32", "compute": "bf16", "autocast": True}, "kernels": {"checkpointing": "none"}},
    {"precision": {"weights": "fp32"}, "kernels": {"checkpointing": "none"}},
    {"loop": {"padded": True}, "kernels": {"checkpointing": "none"}},
)


def runs(packages: tuple[str, ...]) -> Iterator[tuple[str, RunSpec]]:
    """Yield every run of the package's families, at small widths and at those of a card."""
    for family in FAMILIES[packages[0]]:
        config = CONFIGS.get(family) or config_of(family, 4)  # the first four layers of a card
        first = (*SIZES.get(family, (4, 256)), (*EVERY[:4], EVERY[6]) if family in CONFIGS else EVERY)
        for micro, sequence, cases in (first, (2, 130, EVERY[1:3])):
            for options in cases:
                kernels = {**options.get("kernels", {}), "packages": packages}
                method = method_of(config["model_type"], options.get("method", {"kind": "full"}))
                yield (
                    f"{family}, {' and '.join(packages)}, {method['kind']}, {micro} x {sequence}{_how(options)}",
                    RunSpec.model_validate(
                        {
                            "model": {"config": config},
                            "batch": {"micro": micro, "sequence": sequence},
                            "gpu": "a100-sxm-80gb",
                            **options,
                            "method": method,
                            "kernels": kernels,
                        }
                    ),
                )


def _how(options: dict[str, Any]) -> str:
    precision, kernels = options.get("precision", {}), options.get("kernels", {})
    autocast = ", autocast" if precision.get("autocast") else f", {precision['weights']}" if precision else ""
    return autocast + ", padded" * ("loop" in options) + ", not checkpointed" * (kernels.get("checkpointing") == "none")


def prepare(packages: tuple[str, ...]) -> None:
    """Import the packages, which see an A100 that does not exist, and let transformers find no others."""
    fake_device.load()
    import torch

    from memplan.catalogue.quantization.fused_4bit import card_of

    cuda: Any = torch.cuda
    cuda.device_count, cuda.get_device_capability, cuda.get_device_name = (
        (lambda: 1),
        (lambda *_: (8, 0)),
        lambda *_: "A100",
    )
    cuda._exchange_device = cuda._maybe_exchange_device = lambda device: 0
    cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=108)
    extension: Any = ModuleType("causal_conv1d_cuda")
    extension.causal_conv1d_fwd = extension.causal_conv1d_bwd = extension.causal_conv1d_update = lambda *_: None
    scan: Any = ModuleType("selective_scan_cuda")
    scan.fwd, scan.bwd = _scan_forward, _scan_backward
    sys.modules.update({"causal_conv1d_cuda": extension, "selective_scan_cuda": scan})
    library("triton.runtime").driver.set_active(_Driver())
    without_launches()
    library("triton.runtime").Autotuner.best_config = SimpleNamespace(kwargs={"BLOCK_SIZE": 64, "BLOCK_SIZE_M": 32})
    for module in ("torch._dynamo", "transformers.modeling_utils", *packages):
        library(module)  # before the patches, which these imports do not survive

    from memplan.probe.fake import fake_tensor_patches as patches

    patches.apply(card_of((8, 0)))


def _scan_forward(*given: Any) -> list[Any]:
    """mamba-ssm 2.3.2 csrc/selective_scan/selective_scan.cpp selective_scan_fwd."""
    import torch

    u, delta, rate, b, c, d, z, bias, _softplus = given
    assert {t.dtype for t in (u, delta, b, c, z)} == {u.dtype}, "the scan's inputs have several dtypes"
    assert {t.dtype for t in (rate, d, bias)} == {torch.float32}, "the scan's parameters are not fp32"
    gated, out = torch.empty_like(z), torch.empty_like(delta)
    batch, width, tokens = u.shape
    chunks, numbers = -(-tokens // 2048), 2 * rate.shape[1]
    states = torch.empty((batch, width, chunks, numbers), dtype=rate.dtype, device=u.device)
    return [out, states, gated]


def _scan_backward(*given: Any) -> list[Any]:
    """selective_scan_bwd there."""
    import torch

    u, delta, rate, b, c, d, z, bias, _of_out, _states, out, of_z, _softplus, again = given
    of_z = torch.empty_like(z) if of_z is None else of_z
    gated = [torch.empty_like(out)] if again else []
    of_u, of_delta, of_rate = torch.empty_like(u), torch.empty_like(delta), torch.zeros_like(rate)
    of_b, of_c = (torch.zeros_like(t, dtype=torch.float32) for t in (b, c))
    of_d, of_bias = torch.zeros_like(d), torch.zeros_like(bias)
    lowered = of_b.to(b.dtype), of_c.to(c.dtype)
    return [of_u, of_delta, of_rate, *lowered, of_d, of_bias, of_z, *gated]


class _Driver:
    """Triton's driver of an A100."""

    utils = ModuleType("utils")
    utils.get_device_properties = lambda device: {"max_shared_mem": 166912, "multiprocessor_count": 108}  # type: ignore[attr-defined]

    @staticmethod
    def get_current_target() -> Any:
        return library("triton.backends.compiler").GPUTarget("cuda", 80, 32)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def main() -> None:
    [name, *files] = sys.argv[1:]
    packages = PACKAGES[name]
    output, sys.stdout = sys.stdout, sys.stderr
    done = {json.loads(row).get("name") for file in files for row in Path(file).read_text("utf-8").splitlines()}
    prepare(packages)
    for label, run in runs(packages):
        if label in done:
            continue
        process = os.fork()
        if process:
            os.waitpid(process, 0)
            continue
        try:
            plain = run.model_copy(update={"kernels": run.kernels.model_copy(update={"packages": ()})})
            traced = read(run, child._answer(fill_from_profile(plain), 2, "cuda", False))
            print(json.dumps(line(label, run, traced)), file=output, flush=True)
        except Exception:
            print(label, traceback.format_exc(), file=sys.stderr, flush=True)
        os._exit(0)


if __name__ == "__main__":
    main()
