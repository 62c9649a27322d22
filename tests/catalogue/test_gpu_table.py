"""The reader of gpus.toml: what it reads is what the file says, and what it cannot read it refuses in one line."""

import tomllib
from typing import Any

import pytest

from memplan.catalogue.hardware.gpu import GPU, Price, Source
from memplan.catalogue.hardware.gpu_table import GPUTable, gpu_table
from memplan.core.errors import ConfigError
from memplan.core.package_data import data_path
from memplan.core.units import MIB

TEXT = """# A table of one card.
[sources.datasheet]
vendor = "the vendor's page {page} of 2026-09-01"

[sources.repo]
smi = "nvidia-smi output"

[sources.recalled]
recalled = "recalled ({tdp_watts} W)"

[dtypes]
plain = ["fp32", "fp16"]

[price_lists.shop]
source = "shop.example"
date = "2026-09-20"

[offers.shop-1x]
provider = "Shop"
terms = "on-demand, 1x"
list = "shop"

[gpu.x1]
title = "Example X1"
aliases = ["x-one", "one"]
vendor = "Example"
architecture = "First"
market = "consumer"
native_dtypes = "plain"
# Read on 2026-09-02.
vendor.page = "x1"
vendor.memory_gb = 8
smi.driver_total_mib = 8188
vendor.compute_capability = "12.0"
vendor.bandwidth_gbps = 448.5
recalled.tdp_watts = 150
prices.shop-1x = 0.25
note = "the first"
"""


def test_a_card_as_the_table_states_it() -> None:
    table = GPUTable(TEXT)
    assert table.owners == {"x1": "x1", "x-one": "x1", "one": "x1"}
    assert table.gpu("x1") == GPU(
        name="x1",
        title="Example X1",
        aliases=("x-one", "one"),
        vendor="Example",
        architecture="First",
        market="consumer",
        native_dtypes=("fp32", "fp16"),
        memory_gb=8,
        driver_total=8188 * MIB,
        driver_basis="driver",
        compute_capability=(12, 0),
        bandwidth_gbps=448.5,
        tdp_watts=150,
        sources=(
            Source(
                ("memory_gb", "compute_capability", "bandwidth_gbps"), "the vendor's page x1 of 2026-09-01", "datasheet"
            ),
            Source(("driver_total",), "nvidia-smi output", "repo"),
            Source(("tdp_watts",), "recalled (150 W)", "recalled"),
        ),
        prices=(Price("Shop", 0.25, "2026-09-20", "on-demand, 1x", "shop.example"),),
        note="the first",
    )


def test_a_card_is_read_once() -> None:
    table = GPUTable(TEXT)
    assert table.gpu("x1") is table.gpu("x1")
    assert gpu_table() is gpu_table()


@pytest.mark.parametrize("source", ["recalled", "vendor"])
def test_a_total_that_no_driver_showed_follows_the_rule(source: str) -> None:
    text = TEXT.replace("smi.driver_total_mib", f"{source}.driver_total_mib")
    assert GPUTable(text).gpu("x1").driver_basis == "rule"


@pytest.mark.parametrize(
    ("line", "written", "error"),
    [
        ('market = "consumer"', 'market = "retail"', "x1: market must be one of consumer, workstation, "),
        ('market = "consumer"', 'markt = "consumer"', "x1: unknown key 'markt'; did you mean market?"),
        ('market = "consumer"', "", "x1: market is missing"),
        ('title = "Example X1"', 'title = ""', 'x1: title must be text, not ""'),
        (
            'title = "Example X1"',
            "title = Example",
            "x1: cannot read 'title = Example'; write `key = value` on one line",
        ),
        ('title = "Example X1"', 'title = "X1" # new', "x1: cannot read 'title = \"X1\" # new'; write `key = value`"),
        ('note = "the first"', 'note = "the first"\nnote = "again"', "x1: note stands there twice"),
        ('note = "the first"', "unified = false", "x1: unified must be true, or left out, not false"),
        ('note = "the first"', "devices = 0", "x1: devices must be an integer above 0, not 0"),
        ('aliases = ["x-one", "one"]', 'aliases = "one"', 'x1: aliases must be a list of texts, not "one"'),
        ('aliases = ["x-one", "one"]', 'aliases = ["x1"]', "x1: the name 'x1' is already that of x1"),
        ('native_dtypes = "plain"', 'native_dtypes = "plan"', "x1: unknown set of dtypes 'plan'; did you mean plain?"),
        ("vendor.memory_gb = 8", 'vendor.memory_gb = "8"', 'x1, vendor: memory_gb must be a number above 0, not "8"'),
        ("vendor.memory_gb = 8", "vendor.memory_gb = true", "x1, vendor: memory_gb must be a number above 0, not true"),
        ("vendor.memory_gb = 8", "vendor.memory_gb = 8_000", "x1: cannot read 'vendor.memory_gb = 8_000'"),
        (
            "vendor.memory_gb = 8",
            "vendor.memory_options_gb = 8",
            "x1, vendor: memory_options_gb must be a list of numb",
        ),
        ("vendor.memory_gb = 8", "", "x1: memory_gb is missing"),
        ("vendor.memory_gb = 8", "vendr.memory_gb = 8", "x1: unknown source 'vendr'; did you mean vendor?"),
        ("vendor.memory_gb = 8", "memory_gb = 8", "x1: unknown key 'memory_gb'"),
        ("smi.driver_total_mib = 8188", "", "x1: driver_total_mib is missing"),
        (
            "smi.driver_total_mib = 8188",
            "smi.driver_total_mib = 8188.5",
            "x1, smi: driver_total_mib must be an i",
        ),
        (
            'vendor.compute_capability = "12.0"',
            "vendor.compute_capability = 12.0",
            "x1, vendor: compute_capability must ",
        ),
        (
            'vendor.compute_capability = "12.0"',
            'vendor.compute_capability = "12"',
            'must be text such as "8.6", not "12"',
        ),
        ('vendor.page = "x1"', "", "x1, vendor: page is missing"),
        (
            "recalled.tdp_watts = 150",
            'recalled.tdp_watts = 150\nrecalled.page = "a"',
            "x1, recalled: unknown key 'page'",
        ),
        ("recalled.tdp_watts = 150", "recalled.memory_gb = 8", "x1: memory_gb has two sources"),
        ("prices.shop-1x = 0.25", "prices.shop-8x = 0.25", "x1, prices: unknown key 'shop-8x'; did you mean shop-1x?"),
        ("prices.shop-1x = 0.25", 'prices.shop-1x = "free"', "x1, prices: shop-1x must be a number above 0"),
        ('list = "shop"', 'list = "shops"', "x1, prices: unknown price list 'shops'; did you mean shop?"),
        ('list = "shop"', "", "offers.shop-1x: list is missing"),
        ('date = "2026-09-20"', "date = 2026-09-20", "price_lists.shop: cannot read 'date = 2026-09-20'"),
        ("[dtypes]", "[kinds]", "kinds: unknown table; that of a card is [gpu.NAME]"),
        ("[sources.recalled]", "[sources.rumour]", "sources.rumour: unknown table; that of a card is [gpu.NAME]"),
        ("[dtypes]", "[gpu.one]\n[dtypes]", "x1: the name 'one' is already that of one"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_in_one_line(line: str, written: str, error: str) -> None:
    assert TEXT.count(line) == 1
    with pytest.raises(ConfigError) as caught:
        GPUTable(TEXT.replace(line, written)).gpu("x1")
    assert str(caught.value).startswith("gpus.toml, ")
    assert error in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_value_is_what_tomllib_reads() -> None:
    document = tomllib.loads(data_path("gpus.toml").read_text("utf-8"))
    sources = {key: (text, grade) for grade, texts in document["sources"].items() for key, text in texts.items()}
    assert list(document["gpu"]) == [names.name for names in gpu_table().names]
    for name, keys in document["gpu"].items():
        gpu = gpu_table().gpu(name)
        by_source = {key: keys.pop(key) for key in list(keys) if isinstance(keys[key], dict)}
        prices = by_source.pop("prices", {})
        assert {price.usd_per_hour for price in gpu.prices} == set(prices.values()), name
        assert [price.source for price in gpu.prices] == [_price_list(document, offer)["source"] for offer in prices]
        assert list(gpu.native_dtypes) == document["dtypes"][keys.pop("native_dtypes")], name
        assert [(source.source, source.grade) for source in gpu.sources] == [
            (text.format(**facts), grade) for key, facts in by_source.items() for text, grade in [sources[key]]
        ]
        facts = {key: value for facts in by_source.values() for key, value in facts.items() if key != "page"}
        assert {key: _as_written(gpu, key) for key in keys | facts} == keys | facts, name


def _price_list(document: dict[str, Any], offer: str) -> dict[str, str]:
    return document["price_lists"][document["offers"][offer]["list"]]


def _as_written(gpu: GPU, key: str) -> object:
    value = getattr(gpu, key.removesuffix("_mib"))
    if key == "compute_capability":
        return "{}.{}".format(*value)
    if key.endswith("_mib"):
        return value / MIB
    return list(value) if isinstance(value, tuple) else value


def test_every_source_and_offer_is_used() -> None:
    document = tomllib.loads(data_path("gpus.toml").read_text("utf-8"))
    cards = document["gpu"].values()
    sources = [key for grade in document["sources"].values() for key in grade]
    used = {key for card in cards for key, value in card.items() if isinstance(value, dict)} - {"prices"}
    used |= {key for row in document["mig"].values() for key in row} - {"cards"}
    assert sorted(sources) == sorted(used)
    assert set(document["dtypes"]) == {card["native_dtypes"] for card in cards}
    assert set(document["offers"]) == {offer for card in cards for offer in card.get("prices", ())}
    assert set(document["price_lists"]) == {offer["list"] for offer in document["offers"].values()}
