"""A GPU: memory, compute capability, dtypes, prices, and the source of each."""

from __future__ import annotations

from typing import Literal

from memplan.core.records import NamedTuple
from memplan.core.units import MIB

Market = Literal["consumer", "workstation", "data centre", "laptop", "integrated"]
Basis = Literal["driver", "rule"]
Grade = Literal["datasheet", "repo", "computed", "recalled"]


class Source(NamedTuple):
    """The source of some facts of a card.

    facts   names of the fields
    source  the page, repository, package or formula
    grade   how far to trust it: `datasheet` (the vendor's page was read), `repo` (a public repository or package),
            `computed` (a formula or rule), `recalled` (from memory, without a reference)
    """

    facts: tuple[str, ...]
    source: str
    grade: Grade


class Price(NamedTuple):
    """A provider's price for one GPU for one hour, in US dollars, on `date` (ISO 8601)."""

    provider: str
    usd_per_hour: float
    date: str
    terms: str
    source: str


class GPU(NamedTuple):
    """One card, one chip with its own memory, or one MIG instance of a card.

    A fact is None if it is unknown or the card does not support it. Rates are dense (no sparsity). There are 33 fields
    because each fact has its own: `Source.facts` names them, and `memplan gpus --json` prints them all.
    """

    name: str
    """The id, e.g. "rtx-3090"."""
    title: str
    """The product's name, e.g. "GeForce RTX 3090"."""
    vendor: str
    architecture: str
    market: Market
    """Read off the product's name: GeForce is "consumer", "Laptop" is "laptop", and so on."""
    memory_gb: float
    """The marketed size. For Apple's chips the smallest of `memory_options_gb`: the chip's name does not tell how much
    memory a machine has, and assuming more could promise memory that does not exist."""
    driver_total: int
    """Bytes of one device: the total that nvidia-smi (rocm-smi, torch.xpu, XLA ...) reports."""
    driver_basis: Basis
    """"driver": a published driver reading. "rule": no reading was found; see `total_by_rule`."""
    sources: tuple[Source, ...]
    aliases: tuple[str, ...] = ()
    memory_options_gb: tuple[float, ...] = ()
    """Every memory size the chip is sold with, if its name does not tell."""
    devices: int = 1
    """Number of devices that torch sees on one card. `driver_total` is for one device, the other facts for the card."""
    unified: bool = False
    """The memory is shared with the CPU and the operating system."""
    ecc: bool = False
    """`driver_total` was read with inline ECC on, which takes about 1/16 of GDDR memory; with ECC off more is free."""
    torch_total: int | None = None
    """Bytes that torch shows as the device's total memory, the smallest reading found. Less than `driver_total` on
    recent NVIDIA drivers, whose total includes a reserve that no program can use."""
    compute_capability: tuple[int, int] | None = None
    native_dtypes: tuple[str, ...] = ()
    bandwidth_gbps: float | None = None
    """GB/s of the card's memory, decimal."""
    bf16_tflops: float | None = None
    """TFLOPS with fp32 accumulation, like the rates of fp16, fp8 and fp4."""
    fp16_tflops: float | None = None
    fp16_fp16acc_tflops: float | None = None
    """TFLOPS with fp16 accumulation: twice the fp32-accumulation rate on GeForce cards."""
    fp8_tflops: float | None = None
    fp4_tflops: float | None = None
    int8_tops: float | None = None
    pcie: str | None = None
    nvlink_gbps: float | None = None
    """GB/s, both directions together."""
    infinity_fabric_gbps: float | None = None
    """GB/s, both directions together."""
    tdp_watts: int | None = None
    slots: int | None = None
    """Slots of a case that the card covers; None for modules of a server."""
    launch_usd: float | None = None
    """The list price of one card when it was first sold."""
    launch_date: str | None = None
    """The day that `launch_usd` is of (ISO 8601)."""
    prices: tuple[Price, ...] = ()
    note: str = ""
    mig: str = ""
    """The profile of a MIG instance, e.g. "3g.40gb"; empty for a card."""

    @property
    def usable(self) -> int:
        """Bytes that all programs on one device can use together: the total memory that torch shows.

        Without such a reading, the driver's total; for NVIDIA minus 3 %, at least 512 MiB: torch has shown 3.62 GiB of
        4, 5.60 of 6, 7.51 of 8 and 11.50 of 12, and at most 3.05 % less on larger cards (RTX 5060 Ti, 497 MiB).
        """
        if self.torch_total is not None:
            return self.torch_total
        return self.driver_total - (max(self.driver_total * 3 // 100, 512 * MIB) if self.vendor == "NVIDIA" else 0)

    def source(self, fact: str) -> Source | None:
        """Return the source of a fact, by field name; None if the fact is unknown."""
        return next((source for source in self.sources if fact in source.facts), None)
