"""Refusals of runs that libraries cannot run on a GPU of another vendor than they were written for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from memplan.catalogue.hardware.gpu import GPU
from memplan.core.errors import SpecError, refused
from memplan.core.records import NamedTuple
from memplan.spec.run import RunSpec


class _Gap(NamedTuple):
    """Something that a vendor's GPUs do not run.

    field   the field that asks for it
    asks    whether a run on this many GPUs does
    reason  why it does not run, and what does instead
    source  where that was read
    """

    field: str
    asks: Callable[[RunSpec, int], bool]
    reason: str
    source: str


def _profile(name: str) -> Callable[[RunSpec, int], bool]:
    return lambda run, _: run.profile.startswith(name)


def _pages(run: RunSpec, _: int) -> bool:
    return (run.optimizer.name or "").startswith("paged_")


def _bitsandbytes_8bit(run: RunSpec, _: int) -> bool:
    name = (run.optimizer.name or "").removesuffix("_layerwise")
    return name.endswith("8bit") and name != "adamw_torch_8bit"


def _flash_2(run: RunSpec, _: int) -> bool:
    return run.kernels.attention == "flash_attention_2"


def _several(_: RunSpec, gpus: int) -> bool:
    return gpus > 1


_GAPS: dict[str, tuple[_Gap, ...]] = {
    "Apple": (
        _Gap(
            "profile",
            _profile("vllm"),
            "vLLM has no code for Apple's GPUs; use llama.cpp",
            "vllm 0.33 platforms/__init__.py: the CPU on Darwin",
        ),
        _Gap(
            "profile",
            _profile("sglang"),
            "SGLang runs on Apple's GPUs with MLX, which memplan does not count; use llama.cpp",
            "sglang 0.5.23 srt/hardware_backend/mlx",
        ),
        _Gap(
            "profile",
            _profile("tgi"),
            "TGI has no code for Apple's GPUs; use llama.cpp",
            "text-generation-inference 3.3 backends",
        ),
        _Gap(
            "profile",
            _profile("unsloth"),
            "Unsloth runs on Apple's GPUs with MLX, which memplan does not count; use trl",
            "unsloth 2026.10.9 device_type.py",
        ),
        _Gap(
            "optimizer.name",
            _pages,
            "bitsandbytes has no paged memory on Apple's GPUs; use adamw_torch or adafactor",
            "bitsandbytes 0.50 functional.py get_paged",
        ),
        _Gap(
            "optimizer.name",
            _bitsandbytes_8bit,
            "bitsandbytes has no 8-bit optimizers on Apple's GPUs; use adamw_torch_8bit or adafactor",
            "bitsandbytes 0.50 backends/mps/ops.py, backends/default/ops.py",
        ),
        _Gap(
            "kernels.attention",
            _flash_2,
            "flash_attention_2 has no kernel for Apple's GPUs; use sdpa",
            "transformers 5.24 utils/import_utils.py is_flash_attn_2_available",
        ),
        _Gap(
            "parallelism.world",
            _several,
            "torch has no collectives for Apple's GPUs; a Mac has one GPU",
            "torch 2.13 distributed/distributed_c10d.py Backend.default_device_backend_map",
        ),
    )
}


def not_on(gpu: GPU, run: RunSpec, gpus: int | None = None) -> Iterator[SpecError]:
    """Yield an error for each thing that the run asks for and this vendor's GPUs do not run.

    gpus  as many as the run would take, if not as many as it says
    """
    for gap in _GAPS.get(gpu.vendor, ()):
        if gap.asks(run, gpus or run.parallelism.world):
            yield refused(gap.field, gap.reason)
