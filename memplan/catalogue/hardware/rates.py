"""How much of what a card can do a training step gets: rows, each with its basis and source. None is derived.

What is measured was measured on those cards with those libraries; elsewhere a row is assumed.
"""

from __future__ import annotations

from typing import NamedTuple


class Rate(NamedTuple):
    """A range, in the unit that `what` says; `basis` is measured or assumed."""

    what: str
    low: int
    usual: int
    high: int
    basis: str
    source: str


_SHARE = "products of matrices: hundredths of the card's dense peak"
_ATTENTION = "attention in one kernel: hundredths of the card's dense peak"
_FMS = "foundation-model-stack/fms-acceleration scripts/benchmarks/refs"
_FOUNDRY = "mosaicml/llm-foundry scripts/train/benchmarking/README.md at 061f2c7"

# Usual figures of an A100 are those that meet the times of these runs best, all three rates together: least squares of
# logarithms, 7 % off. Low and high ones are set so that every one of the runs lies between.
_RUNS = (
    "45 runs on one A100 with transformers, 2023 to 2025: "
    f"{_FMS}; VectorInstitute/vectorlm docs/reference_throughput.md; QwenLM/Qwen README.md"
)
_PRODUCTS = {
    (8, 0): Rate(_SHARE, 68, 79, 92, "measured", _RUNS),
    (9, 0): Rate(
        _SHARE,
        42,
        55,
        68,
        "measured",
        f"25 runs on eight H100 that share the weights, so that what they send each other is in it: {_FOUNDRY} (2023)",
    ),
}
ANY_PRODUCTS = Rate(
    _SHARE,
    42,
    65,
    92,
    "assumed",
    "from the least measured on an H100 to the most on an A100; published of whole steps: 38 to 43 % (Llama 3, H100, "
    "arXiv:2407.21783), 46 % (PaLM, TPU v4, arXiv:2204.02311), 51 to 61 % (A100, torchtitan docs/performance.md)",
)


def products(capability: tuple[int, int] | None) -> Rate:
    """The share of the peak that products get on a card of that compute capability."""
    return ANY_PRODUCTS if capability is None else _PRODUCTS.get(capability, ANY_PRODUCTS)


# A kernel is only counted for what a causal mask leaves, as in these papers.
_FLASH_2, _FLASH_3 = "arXiv:2307.08691 (FlashAttention-2)", "arXiv:2407.08608 (FlashAttention-3)"
_ATTENTIONS = {
    (8, 0): Rate(
        _ATTENTION, 30, 60, 73, "measured", f"{_RUNS}; range: 25 to 50 % of the first, 50 to 73 % of {_FLASH_2}"
    ),
    (9, 0): Rate(
        _ATTENTION, 20, 38, 75, "measured", f"35 to 40 % of the second, up to 75 % of {_FLASH_3}; low: {_FOUNDRY}"
    ),
}
ANY_ATTENTION = Rate(_ATTENTION, 20, 45, 75, "assumed", "from the least on an H100 to the most")


def attention(capability: tuple[int, int] | None) -> Rate:
    """The share of the peak that a kernel of attention gets on a card of that compute capability."""
    return ANY_ATTENTION if capability is None else _ATTENTIONS.get(capability, ANY_ATTENTION)


BANDWIDTH = Rate(
    "everything else: hundredths of the memory's bandwidth",
    55,
    65,
    80,
    "measured",
    f"{_RUNS}; with it runs with and without fused kernels agree",
)


def bandwidth(capability: tuple[int, int] | None) -> Rate:
    """The share of the memory's bandwidth that everything else gets: an A100's, on any card."""
    return BANDWIDTH if capability == (8, 0) else BANDWIDTH._replace(basis="assumed", source="as on an A100")


LAUNCH = Rate(
    "the host: microseconds for every kernel of forward and backward, or so",
    8,
    25,
    60,
    "measured",
    "24 to 26 for steps of 256 tokens (QwenLM/Qwen README.md, LoRA of 1.8B, 7B and 14B, transformers), 60 for one "
    "sequence (Lightning-AI/litgpt tutorials/resource-tables.md), both A100, 2023; the low end is assumed",
)


BUS = Rate(
    "copies between the card and host memory: hundredths of what its PCIe lanes carry",
    35,
    70,
    85,
    "assumed",
    "pinned memory gets most of it, pageable memory about half; that a copy may overlap with computing is left out",
)
HOST_MEMORY = Rate(
    "an update on the host: GB a second that it reads and writes",
    15,
    50,
    150,
    "assumed",
    "from two channels of DDR4, on one core, to a server's eight of DDR5 with all of them",
)

# GB a second of one lane, one way, after encoding. Source: PCI-SIG, PCI Express base specifications 3.0 to 6.0.
_LANE = {"3.0": 0.985, "4.0": 1.969, "5.0": 3.938, "6.0": 7.563}


def bus_gbps(pcie: str | None) -> float:
    """GB a second that a card's PCIe lanes carry one way; 16 lanes of PCIe 4.0 where that is not known.

    >>> round(bus_gbps("PCIe 5.0 x8"), 1), round(bus_gbps(None), 1)
    (31.5, 31.5)
    """
    _, generation, *lanes = (pcie or "PCIe 4.0").split()
    return _LANE[generation] * int(lanes[0].removeprefix("x") if lanes else 16)


class Units(NamedTuple):
    """One fp32 operation takes the time of `per` in 16 bits; of half as many where the 16-bit rate is halved."""

    per: int
    basis: str
    source: str


# fp32 results a clock and multiprocessor against those of tensor cores, without TF32, which torch leaves off.
_GUIDE = "NVIDIA CUDA C++ programming guide, arithmetic instructions; the architectures' whitepapers for tensor cores"
_FP32 = {
    (7, 0): Units(8, "derived", _GUIDE),
    (7, 5): Units(8, "derived", _GUIDE),
    (8, 0): Units(16, "derived", _GUIDE),
    (8, 6): Units(4, "derived", _GUIDE),
    (8, 9): Units(4, "derived", _GUIDE),
    (9, 0): Units(16, "derived", _GUIDE),
    (12, 0): Units(4, "derived", _GUIDE),
}
_FP32_ANY = Units(16, "assumed", "as on an A100 and an H100")


def fp32_units(capability: tuple[int, int] | None) -> Units:
    """How many times longer an fp32 operation takes than one in 16 bits."""
    return _FP32_ANY if capability is None else _FP32.get(capability, _FP32_ANY)
