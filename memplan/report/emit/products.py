"""Each system's names for the GPUs of the table.

Source: NVML's product names; GPU Feature Discovery labels nodes with them, dashes for spaces; ray 2.48
util/accelerators/accelerators.py; gpuhunt 0.1.34 constraints.py (dstack); SkyPilot 0.14.1 catalog/common.py, and the
names in its documentation; Modal's documentation of `gpu=`. A name that is not there is unknown, and left out.
"""

from __future__ import annotations

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.gpus import find_gpu
from memplan.core.records import NamedTuple


class ProductNames(NamedTuple):
    """Names of one GPU: NVML's, by which HAMi, Volcano and DRA's driver know it, and those of clouds; "" for unknown
    ones."""

    nvml: str
    ray: str = ""
    dstack: str = ""
    sky: str = ""
    modal: str = ""

    @property
    def label(self) -> str:
        """The node label `nvidia.com/gpu.product`."""
        return self.nvml.replace(" ", "-")


PRODUCTS: dict[str, ProductNames] = {
    "t4": ProductNames("Tesla T4", "T4", "T4", "T4", "T4"),
    "v100-sxm2-16gb": ProductNames("Tesla V100-SXM2-16GB", "V100", "V100", "V100"),
    "v100-sxm2-32gb": ProductNames("Tesla V100-SXM2-32GB", "", "V100", "V100-32GB"),
    "v100-pcie-16gb": ProductNames("Tesla V100-PCIE-16GB", "V100"),
    "v100-pcie-32gb": ProductNames("Tesla V100-PCIE-32GB"),
    "a2": ProductNames("NVIDIA A2"),
    "a10": ProductNames("NVIDIA A10", "", "A10", "A10", "A10"),
    "a10g": ProductNames("NVIDIA A10G", "A10G", "A10G", "A10G", "A10"),
    "a16": ProductNames("NVIDIA A16"),
    "a30": ProductNames("NVIDIA A30", "", "A30"),
    "a40": ProductNames("NVIDIA A40", "", "A40"),
    "a100-sxm-40gb": ProductNames("NVIDIA A100-SXM4-40GB", "A100-40G", "A100", "A100", "A100-40GB"),
    "a100-pcie-40gb": ProductNames("NVIDIA A100-PCIE-40GB", "A100-40G", "A100"),
    "a100-sxm-80gb": ProductNames("NVIDIA A100-SXM4-80GB", "A100-80G", "A100", "A100-80GB", "A100-80GB"),
    "a100-pcie-80gb": ProductNames("NVIDIA A100 80GB PCIe", "A100-80G", "A100"),
    "l4": ProductNames("NVIDIA L4", "L4", "L4", "L4", "L4"),
    "l40": ProductNames("NVIDIA L40", "", "L40", "L40"),
    "l40s": ProductNames("NVIDIA L40S", "L40S", "L40S", "L40S", "L40S"),
    "h20": ProductNames("NVIDIA H20", "H20"),
    "h100-sxm": ProductNames("NVIDIA H100 80GB HBM3", "H100", "H100", "H100", "H100"),
    "h100-pcie": ProductNames("NVIDIA H100 PCIe", "", "H100"),
    "h100-nvl": ProductNames("NVIDIA H100 NVL"),
    "h200-sxm": ProductNames("NVIDIA H200", "H200", "H200", "H200", "H200"),
    "gh200-96gb": ProductNames("NVIDIA GH200 480GB", "", "GH200", "GH200"),
    "b200": ProductNames("NVIDIA B200", "B200", "B200", "B200", "B200"),
    "rtx-a4000": ProductNames("NVIDIA RTX A4000", "", "A4000", "RTXA4000"),
    "rtx-a5000": ProductNames("NVIDIA RTX A5000", "", "A5000", "RTXA5000"),
    "rtx-a6000": ProductNames("NVIDIA RTX A6000", "", "A6000", "RTXA6000"),
    "rtx-6000-ada": ProductNames("NVIDIA RTX 6000 Ada Generation", "", "RTX6000Ada"),
    "rtx-pro-6000-server": ProductNames("NVIDIA RTX PRO 6000 Blackwell Server Edition", "", "RTXPRO6000"),
    "rtx-3090": ProductNames("NVIDIA GeForce RTX 3090", "", "RTX3090", "RTX3090"),
    "rtx-4090": ProductNames("NVIDIA GeForce RTX 4090", "", "RTX4090", "RTX4090"),
    "rtx-5090": ProductNames("NVIDIA GeForce RTX 5090", "", "RTX5090", "RTX5090"),
}


def names_in(system: str, gpus: tuple[GPU, ...], least: int = 0) -> tuple[str, ...]:
    """Return a system's names of those GPUs that it names, each once. The system is one of `ProductNames`.

    A name that it also gives to a GPU with less than the `least` usable bytes is left out.
    """
    wanted = {gpu.name for gpu in gpus}
    named = [(name, getattr(row, system)) for name, row in PRODUCTS.items() if getattr(row, system)]
    small = {title for name, title in named if find_gpu(name).usable < least}
    return tuple(dict.fromkeys(title for name, title in named if name in wanted and title not in small))
