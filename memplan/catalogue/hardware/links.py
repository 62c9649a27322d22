"""What GPUs send each other over: rows, each with its basis and source. A card's own facts are in
`memplan.catalogue.hardware.gpu_table`.

Bytes a second are one way out of one GPU; what is reached of them is a share, and none of it is derived.
"""

from __future__ import annotations

from typing import NamedTuple

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.rates import Rate, bus_gbps


class Link(NamedTuple):
    """One way out of a GPU.

    bytes   a second, one way, as the vendor has them
    share   hundredths of that which collectives reach
    hop     tenths of a microsecond from one GPU to the next
    basis   of `bytes`: a card's fact, assumed, or given by who asks
    """

    name: str
    bytes: float
    share: Rate
    hop: Rate
    basis: str
    source: str


_VOLTAGE_PARK = "aigatech/vpbenchmarking README (4 nodes of 8 H100, 400 Gb/s of InfiniBand each, NCCL 2.24)"
_SHARE = "collectives: hundredths of what the link carries one way"
_HOP = "from one GPU to the next: tenths of a microsecond"
_TUNING = (
    "NVIDIA/nccl src/graph/tuning.cc hwLat, rings: low with protocol LL, usual LL128, high Simple; what a kernel takes "
    "to start is not in it"
)

NVLINK_SHARE = Rate(
    _SHARE,
    40,
    70,
    100,
    "measured",
    f"within one node 183 of 450 GB/s in all-gathers of 256 MiB, 480 in all-reduces of 8 GiB, which the switch adds up "
    f"({_VOLTAGE_PARK}); 195 of 300 between A100 (li-plus/playground cuda/nccl.md); the usual is between",
)
NETWORK_SHARE = Rate(
    _SHARE,
    50,
    80,
    90,
    "measured",
    f"on 4 nodes 331, 324 and 286 of 400 GB/s a node in all-reduces, all-gathers and broadcasts ({_VOLTAGE_PARK}); the "
    "low end, for Ethernet and larger clusters, is assumed",
)
PCIE_SHARE = Rate(
    _SHARE,
    20,
    45,
    80,
    "assumed",
    "through a switch most of it, through the host's memory about half; cards without peer access copy twice",
)
NVLINK_HOP = Rate(_HOP, 6, 19, 34, "assumed", _TUNING)
PCIE_HOP = Rate(_HOP, 10, 25, 57, "assumed", _TUNING)
NETWORK_HOP = Rate(_HOP, 27, 40, 140, "assumed", _TUNING)

# Gb/s of network for each GPU, by compute capability: what the vendor's own servers of eight have.
_DGX = {
    (7, 0): (100, "DGX-2"),
    (8, 0): (200, "DGX A100"),
    (9, 0): (400, "DGX H100"),
    (10, 0): (400, "DGX B200"),
    (10, 3): (800, "DGX B300"),
}
_OTHER_SERVER, _NO_SERVER = 200, 25

_BRIDGE = 2  # cards that an NVLink bridge joins, where there is no switch


def inside(gpu: GPU, each: int) -> Link:
    """What `each` such cards of one node send over: NVLink or Infinity Fabric where all are joined by it, else PCIe."""
    switched = gpu.market == "data centre" and not ("-pcie" in gpu.name or gpu.name.endswith("-nvl"))
    if gpu.nvlink_gbps is not None and (switched or each <= _BRIDGE):
        return Link("NVLink", gpu.nvlink_gbps / 2 * 1e9, NVLINK_SHARE, NVLINK_HOP, *_fact(gpu, "nvlink_gbps"))
    if gpu.infinity_fabric_gbps is not None:
        share = NVLINK_SHARE._replace(basis="assumed", source="as NVLink's")
        both = gpu.infinity_fabric_gbps * 1e9
        return Link("Infinity Fabric", both / 2, share, NVLINK_HOP, *_fact(gpu, "infinity_fabric_gbps"))
    basis, source = _fact(gpu, "pcie") if gpu.pcie else ("assumed", "16 lanes of PCIe 4.0")
    return Link("PCIe", bus_gbps(gpu.pcie) * 1e9, PCIE_SHARE, PCIE_HOP, basis, source)


def _fact(gpu: GPU, name: str) -> tuple[str, str]:
    """The basis and source of a fact of a card."""
    source = gpu.source(name)
    return "fact of the card", source.source if source else gpu.title


def network(gpu: GPU, gbps: float | None = None) -> Link:
    """What such cards send over between nodes, each: `gbps` Gb/s, or as the vendor's servers have it."""
    if gbps is not None:
        return Link("network", gbps / 8 * 1e9, NETWORK_SHARE, NETWORK_HOP, "given", f"{gbps:g} Gb/s for each GPU")
    if gpu.market != "data centre":
        each, source = _NO_SERVER, "25 Gb/s for each GPU, for cards that no vendor's server of eight has"
    elif gpu.vendor == "NVIDIA" and gpu.compute_capability in _DGX:
        each, server = _DGX[gpu.compute_capability]
        source = f"{each} Gb/s for each GPU, as in a {server}"
    else:
        each, source = _OTHER_SERVER, "200 Gb/s for each GPU, as in most servers of eight"
    return Link("network", each / 8 * 1e9, NETWORK_SHARE, NETWORK_HOP, "assumed", source)


# How much of the time that a kind of collective takes shows, beside what is computed meanwhile: hundredths. What the
# computing is too short to hide shows in any case.
_SHOWN = "time that shows beside computing: hundredths"
SHOWN = {
    "dp": Rate(
        _SHOWN,
        0,
        20,
        100,
        "assumed",
        "gradients are reduced and weights gathered while other layers compute; the first and the last of them are not",
    ),
    "tp": Rate(_SHOWN, 100, 100, 100, "assumed", "the next product waits for the sum; asynchronous TP is left out"),
    "pp": Rate(_SHOWN, 0, 50, 100, "assumed", "sent while the next microbatch computes, or waited for"),
    "cp": Rate(_SHOWN, 0, 30, 100, "assumed", "keys and values go round while attention computes the ones before"),
    "ep": Rate(_SHOWN, 100, 100, 100, "assumed", "experts wait for their tokens, and the residual stream for experts"),
}
