"""The share of a card's peak rates that a training step reaches: rows, each with basis and source. None is derived.

Measured rows hold for the cards and libraries they name; for all others rows are assumed.
"""

from __future__ import annotations

from memplan.core.records import NamedTuple


class Rate(NamedTuple):
    """A range, in the unit named in `what`; `basis` is `measured` or `assumed`."""

    what: str
    low: int
    usual: int
    high: int
    basis: str
    source: str


_SHARE = "matrix products: % of the card's dense peak"
_ATTENTION = "fused attention: % of the card's dense peak"
_FMS = "foundation-model-stack/fms-acceleration scripts/benchmarks/refs"
_FOUNDRY = "mosaicml/llm-foundry scripts/train/benchmarking/README.md at 061f2c7"

# The usual figures of an A100 (all three rates together) fit the times of these runs best, by least squares of
# logarithms, within 7 %. Low and high are set so that every run lies between them.
_RUNS = (
    "45 runs on one A100 with transformers, 2023 to 2025: "
    f"{_FMS}; VectorInstitute/vectorlm docs/reference_throughput.md; QwenLM/Qwen README.md"
)
_SHARDED = f"25 runs on eight H100 with sharded weights, communication included: {_FOUNDRY} (2023)"
_PRODUCTS: dict[tuple[int, int] | None, Rate] = {
    (8, 0): Rate(_SHARE, 68, 79, 92, "measured", _RUNS),
    (9, 0): Rate(_SHARE, 42, 55, 68, "measured", _SHARDED),
}
_PUBLISHED = (
    "from the least measured on an H100 to the most on an A100; published for entire steps: 38 to 43 % (Llama 3, H100, "
    "arXiv:2407.21783), 46 % (PaLM, TPU v4, arXiv:2204.02311), 51 to 61 % (A100, torchtitan docs/performance.md)"
)
ANY_PRODUCTS = Rate(_SHARE, 42, 65, 92, "assumed", _PUBLISHED)


def products(capability: tuple[int, int] | None) -> Rate:
    """Return the share of the peak that matrix products reach at a compute capability."""
    return _PRODUCTS.get(capability, ANY_PRODUCTS)


# Only operations that a causal mask leaves are counted, as in these papers.
_FLASH_2, _FLASH_3 = "arXiv:2307.08691 (FlashAttention-2)", "arXiv:2407.08608 (FlashAttention-3)"
_ON_A100 = f"{_RUNS}; range: 25 to 50 % of the first, 50 to 73 % of {_FLASH_2}"
_ON_H100 = f"35 to 40 % of the second, up to 75 % of {_FLASH_3}; low: {_FOUNDRY}"
_ATTENTIONS: dict[tuple[int, int] | None, Rate] = {
    (8, 0): Rate(_ATTENTION, 30, 60, 73, "measured", _ON_A100),
    (9, 0): Rate(_ATTENTION, 20, 38, 75, "measured", _ON_H100),
}
ANY_ATTENTION = Rate(_ATTENTION, 20, 45, 75, "assumed", "from the least on an H100 to the most")


def attention(capability: tuple[int, int] | None) -> Rate:
    """Return the share of the peak that fused attention reaches at a compute capability."""
    return _ATTENTIONS.get(capability, ANY_ATTENTION)


_AGREED = f"{_RUNS}; at this value runs with and without fused kernels agree"
BANDWIDTH = Rate("everything else: % of the memory bandwidth", 55, 65, 80, "measured", _AGREED)


def bandwidth(capability: tuple[int, int] | None) -> Rate:
    """Return the share of the memory bandwidth that everything else reaches: the A100's, for any card."""
    return BANDWIDTH if capability == (8, 0) else BANDWIDTH._replace(basis="assumed", source="as on an A100")


_LAUNCHES = (
    "24 to 26 for steps of 256 tokens (QwenLM/Qwen README.md, LoRA of 1.8B, 7B and 14B, transformers), 60 for one "
    "sequence (Lightning-AI/litgpt tutorials/resource-tables.md), both A100, 2023; the low end is assumed"
)
LAUNCH = Rate("the host: microseconds per kernel of forward and backward", 8, 25, 60, "measured", _LAUNCHES)

_PINNED = "pinned memory reaches most of it, pageable memory about half; overlap with computation is left out"
BUS = Rate("copies between the card and host memory: % of the PCIe bandwidth", 35, 70, 85, "assumed", _PINNED)

_DDR = "from one core with two channels of DDR4 to all cores of a server with eight channels of DDR5"
HOST_MEMORY = Rate("an update on the host: GB/s read and written", 15, 50, 150, "assumed", _DDR)

# GB/s of one lane in one direction, after encoding. Source: PCI-SIG, PCI Express base specifications 3.0 to 6.0.
_LANE = {"3.0": 0.985, "4.0": 1.969, "5.0": 3.938, "6.0": 7.563}


def bus_gbps(pcie: str | None) -> float:
    """Return the GB/s of a card's PCIe lanes in one direction; 16 lanes of PCIe 4.0 if unknown.

    >>> round(bus_gbps("PCIe 5.0 x8"), 1), round(bus_gbps(None), 1)
    (31.5, 31.5)
    """
    _, generation, *lanes = (pcie or "PCIe 4.0").split()
    return _LANE[generation] * int(lanes[0].removeprefix("x") if lanes else 16)


class Units(NamedTuple):
    """One fp32 operation takes as long as `per` 16-bit ones, or half as many if the 16-bit rate is halved."""

    per: int
    basis: str
    source: str


# Results per clock and multiprocessor in fp32 against tensor cores, without TF32, which torch leaves off by default.
_GUIDE = "NVIDIA CUDA C++ programming guide, arithmetic instructions; the architectures' whitepapers for tensor cores"
_FP32 = {(7, 0): 8, (7, 5): 8, (8, 0): 16, (8, 6): 4, (8, 9): 4, (9, 0): 16, (12, 0): 4}


def fp32_units(capability: tuple[int, int] | None) -> Units:
    """Return how many times longer an fp32 operation takes than a 16-bit one."""
    if capability in _FP32:
        return Units(_FP32[capability], "derived", _GUIDE)
    return Units(16, "assumed", "as on an A100 and an H100")
