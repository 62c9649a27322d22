"""The GPU table: every row sourced and below its marketed size, every name found."""

from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.catalogue.hardware.gpus import all_gpus, ambiguous_with, find_gpu, total_by_rule
from memplan.core.errors import UnknownNameError
from memplan.core.units import MIB
from tests.cases import each

# Facts about the card, each of which needs a source. The other fields name or sort it.
FACTS = (
    "memory_gb",
    "memory_options_gb",
    "driver_total",
    "torch_total",
    "compute_capability",
    "bandwidth_gbps",
    "bf16_tflops",
    "fp16_tflops",
    "fp16_fp16acc_tflops",
    "fp8_tflops",
    "fp4_tflops",
    "int8_tops",
    "pcie",
    "nvlink_gbps",
    "infinity_fabric_gbps",
    "tdp_watts",
    "slots",
    "launch_usd",
    "launch_date",
)

TYPED = {
    "3090": "rtx-3090",
    "RTX 3090": "rtx-3090",
    "rtx3090": "rtx-3090",
    "RTX 3090 24GB": "rtx-3090",
    " GeForce RTX-3090 ": "rtx-3090",
    "3080": "rtx-3080",
    "3080 12gb": "rtx-3080-12gb",
    "4060 Ti": "rtx-4060-ti-8gb",
    "4060 ti 16gb": "rtx-4060-ti-16gb",
    "1060 6gb": "gtx-1060-6gb",
    "rtx 4090 mobile": "rtx-4090-laptop",
    "a100": "a100-sxm-80gb",
    "a100-80gb": "a100-sxm-80gb",
    "A100 80G": "a100-sxm-80gb",
    "a100 80": "a100-sxm-80gb",
    "A100 40 GiB": "a100-sxm-40gb",
    "a100 pcie": "a100-pcie-80gb",
    "a100 pcie 40gb": "a100-pcie-40gb",
    "a800": "a800-sxm-80gb",
    "a800 40gb": "a800-pcie-40gb",
    "h100": "h100-sxm",
    "H100 SXM5 80GB": "h100-sxm",
    "h100 nvl": "h100-nvl",
    "h200": "h200-sxm",
    "v100": "v100-sxm2-16gb",
    "V100 32GB": "v100-sxm2-32gb",
    "p100": "p100-16gb",
    "t4": "t4",
    "T4 16GB": "t4",
    "teslat4": "t4",
    "l40s": "l40s",
    "b200 192gb": "b200",
    "rtx 6000 ada": "rtx-6000-ada",
    "RTX PRO 6000": "rtx-pro-6000",
    "titan rtx": "titan-rtx",
    "mi300x": "mi300x",
    "MI300X 192GB": "mi300x",
    "mi60": "mi50-32gb",
    "7900 XTX": "rx-7900-xtx",
    "strix halo": "strix-halo-128gb",
    "ryzen ai max+ 395": "strix-halo-128gb",
    "nvidia-rtx-4090": "rtx-4090",
    "nvidia/rtx4090": "rtx-4090",
    "rtx_4090": "rtx-4090",
    "4090 24gb": "rtx-4090",
    "gtx1080ti": "gtx-1080-ti",
    "GeForce GTX 1080 Ti": "gtx-1080-ti",
    "2070 super": "rtx-2070-super",
    "4070 ti super": "rtx-4070-ti-super",
    "5060 ti 16gb": "rtx-5060-ti-16gb",
    "a6000": "rtx-a6000",
    "6000 ada": "rtx-6000-ada",
    "rtx 8000": "quadro-rtx-8000",
    "a100_80gb": "a100-sxm-80gb",
    "NVIDIA-A100-SXM4-80GB": "a100-sxm-80gb",
    "nvidia-tesla-t4": "t4",
    "nvidia-l4": "l4",
    "h100-80gb": "h100-sxm",
    "h100 94gb": "h100-nvl",
    "gh200": "gh200-96gb",
    "grace hopper": "gh200-96gb",
    "dgx spark": "gb10",
    "MI300X OAM": "mi300x",
    "w7900": "radeon-pro-w7900",
    "m2 ultra": "apple-m2-ultra",
    "m2 ultra 192gb": "apple-m2-ultra-192gb",
    "trillium": "tpu-v6e",
    "ironwood": "tpu-v7x",
    "b580": "arc-b580",
    "gaudi 2": "gaudi2",
    "910b": "ascend-910b3",
    "tpu v5e": "tpu-v5e",
    "m3 max": "apple-m3-max",
    "M3 Max 64GB": "apple-m3-max-64gb",
}

# What nvidia-smi, rocm-smi and torch print.
PRINTED = {
    "NVIDIA GeForce RTX 3090": "rtx-3090",
    "NVIDIA GeForce RTX 4090 Laptop GPU": "rtx-4090-laptop",
    "NVIDIA GeForce GTX 1060 6GB": "gtx-1060-6gb",
    "NVIDIA TITAN RTX": "titan-rtx",
    "NVIDIA TITAN Xp": "titan-xp",
    "Quadro RTX 8000": "quadro-rtx-8000",
    "NVIDIA RTX A6000": "rtx-a6000",
    "NVIDIA RTX 6000 Ada Generation": "rtx-6000-ada",
    "NVIDIA RTX 4000 SFF Ada Generation": "rtx-4000-sff-ada",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "rtx-pro-6000",
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": "rtx-pro-6000-max-q",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "rtx-pro-6000-server",
    "Tesla T4": "t4",
    "Tesla P100-PCIE-16GB": "p100-16gb",
    "Tesla V100-SXM2-16GB": "v100-sxm2-16gb",
    "Tesla V100-PCIE-32GB": "v100-pcie-32gb",
    "NVIDIA A10G": "a10g",
    "NVIDIA A100-SXM4-40GB": "a100-sxm-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-sxm-80gb",
    "NVIDIA A100-PCIE-40GB": "a100-pcie-40gb",
    "NVIDIA A100 80GB PCIe": "a100-pcie-80gb",
    "NVIDIA A800-SXM4-80GB": "a800-sxm-80gb",
    "NVIDIA A800 40GB Active": "a800-pcie-40gb",
    "NVIDIA H100 80GB HBM3": "h100-sxm",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H20-3e": "h20-141gb",
    "NVIDIA GH200 480GB": "gh200-96gb",  # the CPU's memory
    "NVIDIA GH200 144G HBM3e": "gh200-144gb",
    "NVIDIA B200": "b200",
    "NVIDIA GB10": "gb10",
    "AMD Instinct MI300X": "mi300x",
    "AMD Instinct MI250X/MI250": "mi250x",
    "AMD Radeon RX 7900 XTX": "rx-7900-xtx",
    "AMD Radeon PRO W7900": "radeon-pro-w7900",
    "Intel(R) Arc(TM) A770 Graphics": "arc-a770-16gb",
    "Intel(R) Data Center GPU Max 1550": "max-1550",
    "Ascend910B3": "ascend-910b3",
    "HL-225": "gaudi2",
    "Apple M3 Max": "apple-m3-max",
}


def test_there_are_at_least_184_cards() -> None:
    assert len(all_gpus()) >= 184


def test_the_driver_total_lies_below_the_marketed_size() -> None:
    for gpu in all_gpus():
        marketed = int(gpu.memory_gb * 1024) * MIB
        assert type(gpu.driver_total) is int, gpu.name
        assert 0 < gpu.driver_total * gpu.devices <= marketed, gpu.name


def test_discrete_cards_hold_back_less_than_an_eighth() -> None:
    # Inline ECC takes a sixteenth and firmware a little more: a larger gap is a typing error.
    for gpu in all_gpus():
        marketed = int(gpu.memory_gb * 1024) * MIB
        assert gpu.unified or gpu.driver_total * gpu.devices > marketed * 7 // 8, gpu.name


def test_torch_shows_a_little_less_than_the_driver() -> None:
    read = [(gpu.name, gpu.torch_total, gpu.driver_total) for gpu in all_gpus() if gpu.torch_total is not None]
    assert "t4" in [name for name, _, _ in read]
    for name, total, usable in read:
        assert usable * 15 // 16 < total < usable, name


def test_each_fact_has_one_source_and_each_source_a_fact() -> None:
    for gpu in all_gpus():
        cited = [fact for source in gpu.sources for fact in source.facts]
        stated = [fact for fact in FACTS if getattr(gpu, fact) not in (None, ())]
        assert sorted(cited) == sorted(stated), gpu.name
        assert all(source.source for source in gpu.sources), gpu.name


def test_the_basis_of_driver_total_agrees_with_its_source() -> None:
    for gpu in all_gpus():
        source = gpu.source("driver_total")
        assert source is not None, gpu.name
        assert (source.grade == "repo") == (gpu.driver_basis == "driver"), gpu.name


def test_cards_without_a_driver_reading_follow_the_rule() -> None:
    ruled = [gpu for gpu in all_gpus() if gpu.driver_basis == "rule"]
    assert ruled
    for gpu in ruled:
        source = gpu.source("driver_total")
        if source is not None and source.grade == "recalled":
            assert gpu.driver_total < total_by_rule(gpu), gpu.name
        else:
            assert gpu.driver_total == total_by_rule(gpu), gpu.name


def test_the_rule_by_hand() -> None:
    # The arithmetic of `total_by_rule`'s docstring, computed separately.
    assert find_gpu("3060 ti").driver_total == 8_188 * MIB  # 24564/24576 of 8192
    assert find_gpu("rtx-5090-laptop").driver_total == 24_453 * MIB  # 8151/8192 of 24576
    assert find_gpu("4070 ti super").driver_total == 16_376 * MIB  # the smallest of the 16 GB cards of its generation
    assert find_gpu("b100").driver_total == 183_360 * MIB  # 275040/294912 of 196608
    assert find_gpu("radeon pro w7800").driver_total == 30_709 * MIB  # 46064/49152 of 32768, ECC on
    assert find_gpu("strix halo").driver_total == 64_225 * MIB  # 49/100 of 131072
    assert find_gpu("mi300a").driver_total == 96 * 1024 * MIB  # as AMD documents it


@pytest.mark.parametrize(
    ("text", "mib"),
    [
        ("m1 8gb", 5_461),
        ("m1 16gb", 10_922),
        ("m3 pro 36gb", 24_576),
        ("m4 pro 48gb", 36_864),
        ("m2 ultra 192gb", 147_456),
    ],
)
def test_apple_allows_two_thirds_to_36_gb_and_three_quarters_above(text: str, mib: int) -> None:
    assert find_gpu(text).driver_total == mib * MIB


def test_a_chip_sold_with_several_sizes_counts_with_the_smallest() -> None:
    chip = find_gpu("m3 max")
    assert (chip.memory_gb, chip.memory_options_gb) == (48, (48, 64, 128))
    assert [other.memory_gb for other in ambiguous_with("m3 max")] == [64, 128]
    larger = find_gpu("m3 max 128gb")
    assert larger.driver_total == 98_304 * MIB
    assert find_gpu(larger.name) == larger
    with pytest.raises(UnknownNameError):
        find_gpu("m3 max 50gb")


def test_ids_and_aliases_resolve_to_their_row() -> None:
    for gpu in all_gpus():
        for name in (gpu.name, *gpu.aliases):
            assert find_gpu(name) is gpu, name
            # Names in the table are looked up; others are parsed. Both must agree.
            assert find_gpu(name.upper().replace("-", " ")) is gpu, name
            assert gpu.name not in [other.name for other in ambiguous_with(name)], name


def test_titles_resolve_to_their_row_or_name_it_among_others() -> None:
    for gpu in all_gpus():
        title = gpu.title.split("/")[0]
        assert gpu in (find_gpu(title), *ambiguous_with(title)), title


def test_ids_and_aliases_are_unique_across_the_table() -> None:
    names = [name for gpu in all_gpus() for name in (gpu.name, *gpu.aliases)]
    assert len(names) == len(set(names))


@each([*TYPED.items(), *PRINTED.items()])
def test_names_as_typed_by_people_and_printed_by_tools_resolve(case: tuple[str, str]) -> None:
    text, name = case
    assert find_gpu(text).name == name


@pytest.mark.parametrize(
    ("text", "others"),
    [
        ("a100", ["a100-pcie-40gb", "a100-sxm-40gb", "a100-pcie-80gb"]),
        ("a100 80gb", ["a100-pcie-80gb"]),
        ("v100 sxm2", ["v100-sxm2-32gb"]),
        ("h100", ["h100-pcie", "h100-nvl"]),
        ("5060 ti", ["rtx-5060-ti-8gb"]),
        ("mi50", ["mi50-32gb"]),
        ("RTX 6000", ["rtx-6000-ada", "rtx-pro-6000"]),
        ("NVIDIA H100 80GB HBM3", []),
        ("h100 80gb", ["h100-pcie"]),
        ("Quadro RTX 6000", []),
        ("NVIDIA A100-SXM4-80GB", []),
        ("3090", []),
    ],
)
def test_the_other_cards_a_name_may_mean(text: str, others: list[str]) -> None:
    assert [gpu.name for gpu in ambiguous_with(text)] == others


@pytest.mark.parametrize("name", ["gtx-1080-ti", "p100-16gb", "v100-sxm2-16gb", "t4", "rtx-2080-ti", "apple-m1"])
def test_cards_without_bf16(name: str) -> None:
    card = find_gpu(name)
    assert "bf16" not in card.native_dtypes
    assert card.bf16_tflops is None


@pytest.mark.parametrize("name", ["a100-sxm-80gb", "rtx-3090", "rtx-4090", "h100-sxm", "mi300x"])
def test_cards_with_bf16(name: str) -> None:
    card = find_gpu(name)
    assert "bf16" in card.native_dtypes
    assert card.bf16_tflops


def test_a_rate_is_stated_only_for_a_dtype_with_hardware() -> None:
    for gpu in all_gpus():
        rates = {
            "bf16": gpu.bf16_tflops,
            "fp16": gpu.fp16_tflops,
            "fp8": gpu.fp8_tflops,
            "fp4": gpu.fp4_tflops,
            "int8": gpu.int8_tops,
        }
        stated = {dtype for dtype, rate in rates.items() if rate is not None}
        assert stated <= set(gpu.native_dtypes), gpu.name
        assert all(rate is None or rate > 0 for rate in rates.values()), gpu.name


def test_prices_are_dated_and_sourced() -> None:
    prices = [price for gpu in all_gpus() for price in gpu.prices]
    assert len(prices) >= 73
    for price in prices:
        assert 0 < price.usd_per_hour < 50
        assert date.fromisoformat(price.date)
        assert price.source


@pytest.mark.parametrize("text", ["", "  ", "nvidia", "rtx 9999", "3090 48gb", "AMD 3090", "Tesla M4", "9" * 5000])
def test_unknown_names_raise(text: str) -> None:
    with pytest.raises(UnknownNameError):
        find_gpu(text)
    with pytest.raises(UnknownNameError):
        ambiguous_with(text)


@pytest.mark.parametrize(
    ("text", "nearest"), [("rtx-3091", "rtx-3090"), ("mi300z", "mi300x"), ("h10o-sxm", "h100-sxm")]
)
def test_an_unknown_name_suggests_the_nearest(text: str, nearest: str) -> None:
    with pytest.raises(UnknownNameError, match=nearest):
        find_gpu(text)


@given(st.text(max_size=40) | st.from_regex(r"(rtx|a|h|m)? ?[0-9]{1,6} ?(gb|g|ti|max)?", fullmatch=True))
def test_any_text_is_found_or_unknown(text: str) -> None:
    try:
        card = find_gpu(text)
    except UnknownNameError:
        return
    # Every result is found again by its name.
    assert find_gpu(card.name) == card


def test_usable_memory_is_the_total_that_torch_reported() -> None:
    t4 = find_gpu("t4")
    assert t4.usable == t4.torch_total == 14_909 * MIB
    assert find_gpu("h100").usable == 80_995 * MIB  # 79.097 GiB
    assert find_gpu("4090").usable == 24_074 * MIB  # 23.51 GiB
    # Memory shared with the CPU has a reading too: 119.698 GiB of a GB10's 128.
    assert find_gpu("dgx spark").usable == 122_570 * MIB
    m3 = find_gpu("m3 max")
    assert m3.torch_total is None
    assert m3.usable == m3.driver_total


def test_without_a_torch_reading_nvidia_reserves_three_percent_or_half_a_gib() -> None:
    a100 = find_gpu("a100 pcie 80gb")
    assert a100.torch_total is None
    assert a100.usable == a100.driver_total - a100.driver_total * 3 // 100
    # torch's readings of unnamed 4, 6, 8 and 12 GB cards.
    for name, hundredths_of_gib in (("gtx 1650", 362), ("rtx 2060", 560), ("rtx 4060", 751), ("rtx 3080 ti", 1150)):
        card = find_gpu(name)
        assert card.torch_total is None
        assert card.usable == card.driver_total - 512 * MIB <= hundredths_of_gib * 1024 * MIB // 100


def test_no_reading_reserves_less_than_the_rule() -> None:
    kept = [(gpu.driver_total - gpu.torch_total, gpu) for gpu in all_gpus() if gpu.torch_total and not gpu.unified]
    assert len(kept) > 20
    for reserve, gpu in kept:
        assert reserve <= max(gpu.driver_total * 3 // 100, 512 * MIB), gpu.name


@pytest.mark.parametrize("text", ["cuda", "gpu", "jetson orin", "k80", "8xH100", "4090ti", "g4dn", "quadro rtx 5000"])
def test_even_a_nonsense_name_gets_three_suggestions(text: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        find_gpu(text)
    assert len(caught.value.suggestions) == 3
    assert all(find_gpu(name).name == name for name in caught.value.suggestions)
