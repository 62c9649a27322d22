"""A GPU's row: memory, compute capability, dtypes, prices, and the source of each."""

from __future__ import annotations

from typing import Literal, NamedTuple

from memplan.core.units import MIB

Market = Literal["consumer", "workstation", "data centre", "laptop", "integrated"]
Basis = Literal["driver", "rule"]
Grade = Literal["datasheet", "repo", "computed", "recalled"]


class Source(NamedTuple):
    """Where some facts of a row come from.

    `grade` says how far to trust them: "datasheet" (the vendor's own page was read), "repo" (a public
    repository or package, named in `source`), "computed" (a formula or a rule, named in `source`),
    "recalled" (from memory, nothing to show).
    """

    facts: tuple[str, ...]
    source: str
    grade: Grade


class Price(NamedTuple):
    """What a provider asked for one GPU for one hour, in US dollars, on `date` (ISO 8601)."""

    provider: str
    usd_per_hour: float
    date: str
    terms: str
    source: str


class GPU(NamedTuple):
    """One card, or one chip with memory of its own.

    A fact that is unknown, or that the card cannot do, is None. Rates are dense (no sparsity).
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
    """The size on the box. For Apple's chips the smallest of `memory_options_gb`: a chip's name alone does
    not say how much memory a machine was bought with, and assuming more would promise what is not there."""
    driver_total: int
    """Bytes of one device: the total that nvidia-smi (rocm-smi, torch.xpu, XLA ...) reports."""
    driver_basis: Basis
    """"driver": somebody's driver reported `driver_total`. "rule": nobody's was found; see `total_by_rule`."""
    sources: tuple[Source, ...]
    aliases: tuple[str, ...] = ()
    memory_options_gb: tuple[float, ...] = ()
    """Every size the chip is sold with, where the name does not tell."""
    devices: int = 1
    """How many devices torch sees on one card. `driver_total` is for one of them, the other facts for the card."""
    unified: bool = False
    """The memory is shared with the CPU and the operating system."""
    ecc: bool = False
    """`driver_total` is with inline ECC on, which takes about 1/16 of GDDR memory; with ECC off more is usable."""
    torch_total: int | None = None
    """Bytes that torch shows as the device's total memory (the smallest reading found). Less than
    `driver_total` on recent NVIDIA drivers, whose total includes a reserve that no program gets."""
    compute_capability: tuple[int, int] | None = None
    native_dtypes: tuple[str, ...] = ()
    bandwidth_gbps: float | None = None
    """GB/s of the card's memory, decimal."""
    bf16_tflops: float | None = None
    """TFLOPS with fp32 accumulation, as are fp16, fp8 and fp4."""
    fp16_tflops: float | None = None
    fp16_fp16acc_tflops: float | None = None
    """TFLOPS with fp16 accumulation: twice as many on GeForce cards."""
    fp8_tflops: float | None = None
    fp4_tflops: float | None = None
    int8_tops: float | None = None
    pcie: str | None = None
    nvlink_gbps: float | None = None
    """GB/s, both directions together."""
    infinity_fabric_gbps: float | None = None
    """GB/s, both directions together."""
    tdp_watts: int | None = None
    prices: tuple[Price, ...] = ()
    note: str = ""

    @property
    def usable(self) -> int:
        """Bytes that the programs on one device get between them: what torch shows as its total memory.

        Where no such reading was found, NVIDIA's total less 3 %, and no less than 512 MiB: torch has shown
        3.62 GiB of 4, 5.60 of 6, 7.51 of 8 and 11.50 of 12, and on larger cards left out 3.05 % at most
        (RTX 5060 Ti, 497 MiB).
        """
        if self.torch_total is not None:
            return self.torch_total
        return self.driver_total - (max(self.driver_total * 3 // 100, 512 * MIB) if self.vendor == "NVIDIA" else 0)

    def source(self, fact: str) -> Source | None:
        """The source of one fact, by its field name, or None where it has none (a fact that is None)."""
        return next((source for source in self.sources if fact in source.facts), None)
