"""Families of models: every row has a stack that exists, the index names every row, and an unknown type the nearest."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

import memplan
from memplan.core.errors import UnsupportedModelError
from memplan.models.configs import MODULES, families, family
from memplan.models.configs.model_types import nearest_families
from memplan.models.facts import Family
from memplan.models.model import ModelSpec
from tests.cases import each


@each(sorted(MODULES))
def test_every_row_names_a_stack_that_exists(model_type: str) -> None:
    row = family(model_type)
    assert isinstance(row, Family)
    assert find_spec(f"memplan.catalogue.families.{row.stack}") is not None, f"stack={row.stack!r}: no such module"
    if row.built_as:
        other = family(row.built_as)
        assert row._replace(defaults={}, keys=other.keys, built_as="", objectives=()) == other._replace(
            defaults={}, objectives=()
        )


def test_the_index_names_every_row_and_nothing_else() -> None:
    assert {name for name in MODULES if not family(name).built_as} == set(families())
    with pytest.raises(KeyError):
        family("no_such_family")


def test_the_nearest_families_share_a_stem_or_a_kind() -> None:
    assert nearest_families("llama5")[0].startswith("llama")
    assert nearest_families("zzz", ["vision-language"])
    with pytest.raises(UnsupportedModelError, match="did you mean qwen3"):
        memplan.estimate(memplan.RunSpec(model={"config": {"model_type": "qwen4"}}))


def test_a_published_text_config_is_the_class_that_transformers_builds() -> None:
    """MiniMax-M3's text config, whose lists of ones and zeros and activation its class in transformers rewrites."""
    flags = {"sparse_attention_freq": [0, 1], "sparse_num_index_heads": 2, "sparse_index_dim": 64}
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    older = {"moe_layer_freq": [0, 1], "sparse_attention_config": flags, "hidden_act": "swigluoai"}
    newer = {
        "mlp_layer_types": ["dense", "sparse"],
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_n_heads": 2,
        "index_head_dim": 64,
        "hidden_act": "silu",
    }
    published = ModelSpec({"model_type": "minimax_m3", **sizes, **older})
    built = ModelSpec({"model_type": "minimax_m3_vl_text", **sizes, **newer})
    assert (published.model_type, published.layers, published.axes()) == (built.model_type, built.layers, built.axes())
