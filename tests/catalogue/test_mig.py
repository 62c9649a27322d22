"""MIG instances are GPUs of the table, with the usable bytes that the driver shows."""

from __future__ import annotations

import re
import tomllib
from fractions import Fraction
from typing import Any

import pytest

from memplan import MemplanError, estimate, find_gpu
from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.gpu_table import gpu_table
from memplan.catalogue.hardware.gpus import all_gpus, ambiguous_with, mig_instances
from memplan.core.package_data import data_path
from memplan.core.units import MIB

ROWS: dict[str, Any] = tomllib.loads(data_path("gpus.toml").read_text("utf-8"))["mig"]


def slices(gpu: GPU, whole: GPU) -> int:
    """Return how many eighths of its card's memory an instance has, by its name."""
    share = round(8 * gpu.memory_gb / whole.memory_gb)
    return min((1, 2, 4, 8), key=lambda n: abs(n - share))


def test_every_value_is_what_tomllib_reads() -> None:
    for row in ROWS.values():
        read = {profile: mib for source, rows in row.items() if source != "cards" for profile, mib in rows.items()}
        for card in row["cards"]:
            found = mig_instances(find_gpu(card))
            assert {gpu.mig for gpu in found} == set(read)
            assert [gpu.usable for gpu in found] == sorted(gpu.usable for gpu in found)
            for gpu in found:
                assert gpu.usable == min(read[gpu.mig] * MIB, find_gpu(card).usable)
                assert find_gpu(gpu.name) is gpu
                assert gpu.compute_capability == find_gpu(card).compute_capability
                assert gpu.source("torch_total")


def test_no_instance_has_more_than_its_slices() -> None:
    for card in {card for row in ROWS.values() for card in row["cards"]}:
        whole = find_gpu(card)
        found = mig_instances(whole)
        for gpu in found:
            assert gpu.usable <= whole.driver_total * slices(gpu, found[-1]) // 8, gpu.name


def test_an_instance_without_a_reading_has_the_least_share() -> None:
    shares: dict[int, list[Fraction]] = {}
    ruled: list[tuple[GPU, GPU, int]] = []
    for row in ROWS.values():
        for card in row["cards"]:
            whole, found = find_gpu(card), mig_instances(find_gpu(card))
            for gpu in found:
                n = slices(gpu, found[-1])
                if gpu.driver_basis == "rule":
                    ruled.append((gpu, whole, n))
                elif whole.torch_total is not None and gpu.usable < whole.usable:
                    shares.setdefault(n, []).append(Fraction(gpu.usable * 8, whole.usable * n))
    assert ruled
    for gpu, whole, n in ruled:
        assert gpu.usable <= whole.usable * n * min(shares[n]) / 8, gpu.name


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("a100-80gb:3g.40gb", "a100-sxm-80gb:3g.40gb"),
        ("A100:1g.5gb", "a100-pcie-40gb:1g.5gb"),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", "a100-sxm-80gb:3g.40gb"),
        ("NVIDIA-A100-80GB-PCIe-MIG-2g.20gb", "a100-pcie-80gb:2g.20gb"),
        ("h100:1g.20gb", "h100-sxm:1g.20gb"),
        ("b200:7g.180gb", "b200:7g.180gb"),
    ],
)
def test_an_instance_is_found_by_card_and_profile(typed: str, name: str) -> None:
    assert find_gpu(typed).name == name
    assert ambiguous_with(typed) == ()


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("h100:9g.99gb", "gpu: unknown name 'h100:9g.99gb'; did you mean h100-nvl:7g.94gb or"),
        ("3090:1g.5gb", "gpu: rtx-3090 has no MIG profiles in the table"),
    ],
)
def test_an_unknown_profile_is_refused_in_a_line(typed: str, line: str) -> None:
    with pytest.raises(MemplanError, match=re.escape(line)):
        find_gpu(typed)


def test_an_instance_answers_like_a_card_of_its_size() -> None:
    assert not any(gpu.mig for gpu in all_gpus())
    answer = estimate("qwen2-7b", method="qlora", gpu="h100:2g.20gb")
    assert answer.gpu is not None
    assert (answer.gpu.name, answer.gpu.usable) == ("h100-sxm:2g.20gb", 20096 * MIB)
    assert answer.bytes.allocated == estimate("qwen2-7b", method="qlora", gpu="h100").bytes.allocated
    assert gpu_table().mig_profiles("rtx-3090") == ()
