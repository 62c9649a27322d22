"""A family is one row: no other module compares a model_type, keeps a table of them, or names one."""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

import memplan
from memplan.core.errors import UnsupportedModelError
from memplan.models.configs import MODULES, families, family
from memplan.models.configs.model_types import nearest_families
from memplan.models.facts import Family
from memplan.models.family_facts import CheckpointFacts, GenerationFacts
from memplan.models.model import ModelSpec
from tests.cases import each

PACKAGE = Path(memplan.__file__).parent
ROOMS = ("models", "catalogue.families")  # what may name families: their rows and their stacks

# Modules outside of the rooms with strings that are also names of families, and why. The list may only shrink.
ELSEWHERE = {
    "catalogue.inference.engine_step": "mamba is a token mixer",
    "catalogue.quantization.gguf": "architectures of GGUF files",
    "frameworks.reading.torchtitan": "torchtitan's modules",
    "frameworks.torchtitan": "torchtitan's modules",
    "probe.script": "what a trace gives a model that memplan's row does not have",
    "program.serving.llama_cpp": "mamba is a token mixer",
    "program.stored.gguf": "architectures of GGUF files",
    "report.trace": "opt is the optimizer's step",
    "resolve.notes": "mamba is a token mixer",
    "resolve.refusals": "mamba is a token mixer",
}
# Modules that compare a model_type with a table, and whose table it is. The list may only shrink.
COMPARES = {
    "catalogue.profiles.profiles": "the families of a profile's row",
    "probe.libraries": "transformers' own tables of classes",
    "probe.script.images": "each tower takes its own inputs in a trace",
    "probe.script.model": "Llama 4's outputs need a field in a trace",
}
# Families named in more than three modules of the rooms: LitGPT and torchtitan have stacks of some, the config of a
# GGUF file depends on the family, a wrapper's row is that of its text model, and unsupported models are told apart by
# parts of their names. The numbers may only fall.
OFTEN = {
    **dict.fromkeys(("gemma", "gemma2", "gpt_neox", "phi", "phi3"), 4),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "stablelm"), 4),
    **dict.fromkeys(("gemma3_text", "qwen3_5_moe_text", "qwen3_5_text"), 4),
    **dict.fromkeys(("dbrx", "mamba", "t5", "vit"), 4),
    **dict.fromkeys(("bert", "falcon", "roberta"), 5),
    "llama": 6,
    "mistral": 4,
}

COLUMNS = (*Family._fields, *CheckpointFacts._fields, *GenerationFacts._fields)


@cache
def modules() -> list[tuple[str, ast.Module]]:
    """Return the package's modules, parsed."""
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
    return [(name.removesuffix(".__init__"), ast.parse(path.read_text("utf-8"))) for name, path in names.items()]


def within(name: str, places: object) -> bool:
    assert isinstance(places, (tuple, dict))
    return any(name == place or name.startswith(f"{place}.") for place in places)


def named(tree: ast.Module) -> set[str]:
    """Return the families that a module's strings name: strings that are one name, or a list of names.

    Columns of a row, such as `stack` and `gguf`, name modules and architectures, which may be called like a family.
    """
    columns = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg in COLUMNS}
    strings = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in columns)
    words = (node.value.split() for node in strings if isinstance(node.value, str))
    return {word for listed in words if listed and set(listed) <= set(MODULES) for word in listed}


def is_model_type(node: ast.expr) -> bool:
    return (isinstance(node, ast.Name) and node.id == "model_type") or (
        isinstance(node, ast.Attribute) and node.attr == "model_type"
    )


def compares(tree: ast.Module) -> bool:
    """Whether a module compares a model_type with anything but another one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [is_model_type(side) for side in (node.left, *node.comparators)]
            if any(sides) and not all(sides):
                return True
        if isinstance(node, ast.Match) and is_model_type(node.subject):
            return True
    return False


def test_no_module_but_the_rows_and_the_stacks_names_a_family() -> None:
    naming = {name for name, tree in modules() if named(tree) and not within(name, ROOMS)}
    assert {name for name in naming if not within(name, ELSEWHERE)} == set()
    assert {place for place in ELSEWHERE if not any(within(name, (place,)) for name in naming)} == set()


def test_no_module_but_the_rows_and_the_stacks_compares_a_model_type() -> None:
    comparing = {name for name, tree in modules() if compares(tree) and not within(name, ROOMS)}
    assert comparing == set(COMPARES)


def test_a_family_is_named_in_its_row_its_stack_and_the_index() -> None:
    where = [(name, tree) for name, tree in modules() if within(name, ROOMS) and name != "models.peft_methods"]
    counts = Counter(word for _, tree in where for word in named(tree))  # peft's targets are by model_type
    often = {name: count for name, count in counts.items() if count > 3}
    assert {name: count for name, count in often.items() if count > OFTEN.get(name, 3)} == {}
    assert {name: count for name, count in OFTEN.items() if often.get(name, 3) < count} == {}


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
