"""Links between GPUs, and the share of their bandwidth that collectives reach: rows, each with basis and source.

Bandwidths are bytes per second out of one GPU, in one direction. A card's own facts are in `gpus.toml`. No share is
derived.
"""

from __future__ import annotations

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.rates import Rate, bus_gbps
from memplan.core.records import NamedTuple


class Link(NamedTuple):
    """A link from one GPU to others.

    name    NVLink, Infinity Fabric, PCIe or network
    bytes   the vendor's bytes per second, in one direction
    share   percent of them that collectives reach
    hop     tenths of a microsecond from one GPU to the next
    basis   basis of `bytes`: `fact of the card`, `assumed`, or `given` by the user
    source  source of `bytes`
    """

    name: str
    bytes: float
    share: Rate
    hop: Rate
    basis: str
    source: str


_VOLTAGE_PARK = "aigatech/vpbenchmarking README (4 nodes of 8 H100, 400 Gb/s of InfiniBand each, NCCL 2.24)"
_SHARE = "collectives: % of the link's bandwidth in one direction"
_HOP = "latency from one GPU to the next: tenths of a microsecond"
_TUNING = (
    "NVIDIA/nccl src/graph/tuning.cc hwLat, rings: low with protocol LL, usual LL128, high Simple; without the launch "
    "of the kernel"
)

_WITHIN = (
    f"within one node 183 of 450 GB/s in all-gathers of 256 MiB, 480 in all-reduces of 8 GiB, which the switch sums "
    f"({_VOLTAGE_PARK}); 195 of 300 between A100 (li-plus/playground cuda/nccl.md); the usual value is in between"
)
_BETWEEN = (
    f"on 4 nodes 331, 324 and 286 of 400 GB/s per node in all-reduces, all-gathers, broadcasts ({_VOLTAGE_PARK}); the "
    "low end, for Ethernet and larger clusters, is assumed"
)
_THROUGH = "most of it through a switch, about half through host memory; cards without peer access copy twice"

NVLINK_SHARE = Rate(_SHARE, 40, 70, 100, "measured", _WITHIN)
NETWORK_SHARE = Rate(_SHARE, 50, 80, 90, "measured", _BETWEEN)
PCIE_SHARE = Rate(_SHARE, 20, 45, 80, "assumed", _THROUGH)
NVLINK_HOP = Rate(_HOP, 6, 19, 34, "assumed", _TUNING)
PCIE_HOP = Rate(_HOP, 10, 25, 57, "assumed", _TUNING)
NETWORK_HOP = Rate(_HOP, 27, 40, 140, "assumed", _TUNING)

# Network Gb/s per GPU in NVIDIA's own DGX servers, by compute capability.
_DGX = {
    (7, 0): (100, "DGX-2"),
    (8, 0): (200, "DGX A100"),
    (9, 0): (400, "DGX H100"),
    (10, 0): (400, "DGX B200"),
    (10, 3): (800, "DGX B300"),
}
_OTHER_SERVER, _NO_SERVER = 200, 25

_BRIDGE = 2  # cards that an NVLink bridge connects, without a switch


def node_link(gpu: GPU, each: int) -> Link:
    """Return the link among `each` cards of one node: NVLink or Infinity Fabric if it connects them all, else PCIe."""
    is_switched = gpu.market == "data centre" and not ("-pcie" in gpu.name or gpu.name.endswith("-nvl"))
    if gpu.nvlink_gbps is not None and (is_switched or each <= _BRIDGE):
        return Link("NVLink", gpu.nvlink_gbps / 2 * 1e9, NVLINK_SHARE, NVLINK_HOP, *_fact(gpu, "nvlink_gbps"))
    if gpu.infinity_fabric_gbps is not None:
        share = NVLINK_SHARE._replace(basis="assumed", source="assumed to equal NVLink's")
        both_ways = gpu.infinity_fabric_gbps * 1e9
        return Link("Infinity Fabric", both_ways / 2, share, NVLINK_HOP, *_fact(gpu, "infinity_fabric_gbps"))
    basis, source = _fact(gpu, "pcie") if gpu.pcie else ("assumed", "16 lanes of PCIe 4.0")
    return Link("PCIe", bus_gbps(gpu.pcie) * 1e9, PCIE_SHARE, PCIE_HOP, basis, source)


def _fact(gpu: GPU, name: str) -> tuple[str, str]:
    """Return the basis and source of a card's fact."""
    source = gpu.source(name)
    return "fact of the card", source.source if source else gpu.title


def network(gpu: GPU, gbps: float | None = None) -> Link:
    """Return the network link of each card between nodes: `gbps` Gb/s, else that of the vendor's servers."""
    if gbps is not None:
        return Link("network", gbps / 8 * 1e9, NETWORK_SHARE, NETWORK_HOP, "given", f"{gbps:g} Gb/s per GPU")
    if gpu.market != "data centre":
        each, source = _NO_SERVER, "25 Gb/s per GPU, for cards that are not sold in servers of eight"
    elif gpu.vendor == "NVIDIA" and gpu.compute_capability in _DGX:
        each, server = _DGX[gpu.compute_capability]
        source = f"{each} Gb/s per GPU, as in a {server}"
    else:
        each, source = _OTHER_SERVER, "200 Gb/s per GPU, as in most servers of eight"
    return Link("network", each / 8 * 1e9, NETWORK_SHARE, NETWORK_HOP, "assumed", source)


# Percent of a collective's time that is not overlapped with computation, by kind of parallelism. If the computation is
# too short to hide the rest, more of it shows.
_SHOWN = "communication that is not overlapped with computation: %"
_REDUCED = "gradients are reduced and weights gathered while other layers compute, except the first and the last"
EXPOSED = {
    "dp": Rate(_SHOWN, 0, 20, 100, "assumed", _REDUCED),
    "tp": Rate(_SHOWN, 100, 100, 100, "assumed", "the next product waits for the sum; asynchronous TP is left out"),
    "pp": Rate(_SHOWN, 0, 50, 100, "assumed", "sent while the next microbatch computes, or waited for"),
    "cp": Rate(_SHOWN, 0, 30, 100, "assumed", "keys and values travel while attention computes with the previous ones"),
    "ep": Rate(_SHOWN, 100, 100, 100, "assumed", "experts wait for their tokens, and the residual stream for experts"),
}
