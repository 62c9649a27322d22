"""Machines of clouds by their types: which GPUs they have, and how much host memory.

Compared with a published list: AWS's p3, p4, p5.48xlarge, g4dn and g5 (torchx 0.7.0 specs/named_resources_aws.py) and
g6e (torchx pull request 969); Oracle's with A10, V100 and A100 (skypilot-org/skypilot-catalog catalogs/v6/oci/vms.csv);
a2-highgpu-1g and -2g, a2-ultragpu-1g and a3-highgpu-8g (catalogs/v8/gcp); Azure's with A10 and H100, ND96isr_H200_v5
and ND96asr_v4 (microsoft/aspire AksNodeVmSizes.cs). The others are assumed, as the clouds are known to describe them.
"""

from __future__ import annotations

from functools import cache

from memplan.core.records import NamedTuple
from memplan.core.units import GIB

# What the types of a family begin with, the GPU, and for each type what follows, its GPUs and its GiB of host memory.
_FAMILIES = """
p3.              v100-sxm2-16gb  2xlarge:1:61 8xlarge:4:244 16xlarge:8:488
p3dn.            v100-sxm2-32gb  24xlarge:8:768
p4d.             a100-sxm-40gb   24xlarge:8:1152
p4de.            a100-sxm-80gb   24xlarge:8:1152
p5.              h100-sxm        4xlarge:1:256 48xlarge:8:2048
p5e.             h200-sxm        48xlarge:8:2048
p5en.            h200-sxm        48xlarge:8:2048
p6-b200.         b200            48xlarge:8:2048
p6-b300.         b300            48xlarge:8:4096
g4dn.            t4              xlarge:1:16 2xlarge:1:32 4xlarge:1:64 8xlarge:1:128 16xlarge:1:256 12xlarge:4:192
g4dn.            t4              metal:8:384
g5.              a10g            xlarge:1:16 2xlarge:1:32 4xlarge:1:64 8xlarge:1:128 16xlarge:1:256 12xlarge:4:192
g5.              a10g            24xlarge:4:384 48xlarge:8:768
g6.              l4              xlarge:1:16 2xlarge:1:32 4xlarge:1:64 8xlarge:1:128 16xlarge:1:256 12xlarge:4:192
g6.              l4              24xlarge:4:384 48xlarge:8:768
gr6.             l4              4xlarge:1:128 8xlarge:1:256
g6e.             l40s            xlarge:1:32 2xlarge:1:64 4xlarge:1:128 8xlarge:1:256 16xlarge:1:512 12xlarge:4:384
g6e.             l40s            24xlarge:4:768 48xlarge:8:1536
a2-highgpu-      a100-sxm-40gb   1g:1:85 2g:2:170 4g:4:340 8g:8:680
a2-megagpu-      a100-sxm-40gb   16g:16:1360
a2-ultragpu-     a100-sxm-80gb   1g:1:170 2g:2:340 4g:4:680 8g:8:1360
a3-highgpu-      h100-sxm        1g:1:234 2g:2:468 4g:4:936 8g:8:1872
a3-megagpu-      h100-sxm        8g:8:1872
a3-ultragpu-     h200-sxm        8g:8:2952
a4-highgpu-      b200            8g:8:3968
g2-standard-     l4              4:1:16 8:1:32 12:1:48 16:1:64 24:2:96 32:1:128 48:4:192 96:8:384
standard_nc      v100-pcie-16gb  6s_v3:1:112 12s_v3:2:224 24s_v3:4:448 24rs_v3:4:448
standard_nc      t4              4as_t4_v3:1:28 8as_t4_v3:1:56 16as_t4_v3:1:110 64as_t4_v3:4:440
standard_nc      a100-pcie-80gb  24ads_a100_v4:1:220 48ads_a100_v4:2:440 96ads_a100_v4:4:880
standard_nc      h100-nvl        40ads_h100_v5:1:320 80adis_h100_v5:2:640
standard_nd      v100-sxm2-32gb  40rs_v2:8:672
standard_nd      a100-sxm-40gb   96asr_v4:8:900
standard_nd      a100-sxm-80gb   96amsr_a100_v4:8:1900
standard_nd      h100-sxm        96isr_h100_v5:8:1900
standard_nd      h200-sxm        96isr_h200_v5:8:1850
standard_nd      mi300x          96isr_mi300x_v5:8:1850
standard_nv      a10             36ads_a10_v5:1:440 36adms_a10_v5:1:880 72ads_a10_v5:2:880
vm.gpu.          a10             a10.1:1:240 a10.2:2:480
bm.gpu.          a10             a10.4:4:1024
vm.gpu3.         v100-sxm2-16gb  1:1:90 2:2:180 4:4:360
bm.gpu3.         v100-sxm2-16gb  8:8:768
bm.gpu4.         a100-sxm-40gb   8:8:2048
bm.gpu.          a100-sxm-80gb   a100-v2.8:8:2048
bm.gpu.          h100-sxm        h100.8:8:2048
"""


class CloudMachine(NamedTuple):
    """A machine of a cloud: the name of its GPU, how many of it, and bytes of host memory."""

    gpu: str
    cards: int
    host_memory: int


@cache
def machines_by_type() -> dict[str, CloudMachine]:
    """Return every machine, by its type in lower case."""
    out: dict[str, CloudMachine] = {}
    for start, gpu, *types in map(str.split, _FAMILIES.strip().splitlines()):
        for end, cards, memory in (one.split(":") for one in types):
            out[start + end] = CloudMachine(gpu, int(cards), int(memory) * GIB)
    return out


def find_machine(text: str) -> CloudMachine | None:
    """Return the machine of a type, in any case and also with SageMaker's `ml.` before it; None if it is none.

    >>> find_machine("p4d.24xlarge").cards, find_machine("ml.g5.xlarge").gpu, find_machine("rtx-4090")
    (8, 'a10g', None)
    """
    return machines_by_type().get(text.strip().lower().removeprefix("ml."))
