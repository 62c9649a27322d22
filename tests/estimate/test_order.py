"""An answer does not depend on earlier questions: 2, 2.0, True and "2" differ, although 2 == 2.0 and 1 == True."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan import MemplanError, ModelSpec, RunSpec, estimate
from memplan.core.frozen import FrozenDict, frozen
from memplan.estimate.run_peaks import RunPeaks
from memplan.spec.base import Part
from tests.cases import each
from tests.encoders import SMALL as ENCODERS
from tests.sampling import examples
from tests.tiny import SMALLEST as LLAMA
from tests.tiny import TINY as DECODERS

QWEN2_MOE = {**LLAMA, "model_type": "qwen2_moe", "num_experts": 4, "moe_intermediate_size": 32}
GEMMA3 = {"model_type": "gemma3", "text_config": {**LLAMA, "model_type": "gemma3_text"}, "vision_config": {}}
QUANTIZED = {**LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
CASES = [
    *((LLAMA, key) for key in ("num_hidden_layers", "num_key_value_heads", "vocab_size", "max_position_embeddings")),
    *((LLAMA, key) for key in ("attention_bias", "tie_word_embeddings", "attention_dropout", "rope_theta")),
    *((LLAMA, key) for key in ("rope_scaling.factor", "architectures.0", "quantization_config.bits")),
    *(
        (QWEN2_MOE, key)
        for key in ("num_experts_per_tok", "decoder_sparse_step", "sliding_window", "mlp_only_layers.0")
    ),
    *((GEMMA3, key) for key in ("text_config.num_hidden_layers", "text_config.sliding_window")),
    *((QUANTIZED, key) for key in ("quantization_config.group_size", "quantization_config.desc_act")),
]
EQUAL: list[tuple[Any, ...]] = [(2, 2.0, "2"), (1, 1.0, True, "1"), (0, 0.0, False, "0")]
UNUSED = count()


def with_value(config: Any, path: str, value: Any) -> Any:
    """Return the config with a value at a path, in which numbers are list indices."""
    key, _, rest = path.partition(".")
    if key.isdigit():
        return [with_value({}, rest, value) if rest else value]
    return {**config, key: with_value(config.get(key, {}), rest, value) if rest else value}


def outcome(config: dict[str, Any], **fields: Any) -> object:
    try:
        answer = estimate(RunSpec(model={"config": config}, **fields))
    except MemplanError as error:
        return type(error), str(error)
    dumped = answer.model_dump()
    return repr({**dumped, "run": dumped["run"].get("serving")})  # 2 and 2.0 have different reprs


@pytest.mark.parametrize("values", EQUAL, ids=str)
@pytest.mark.parametrize(("config", "path"), CASES, ids=[path for _, path in CASES])
def test_equal_values_of_a_config_have_the_same_answers_in_any_order(
    config: dict[str, Any], path: str, values: tuple[Any, ...]
) -> None:
    answers: dict[str, set[object]] = {repr(value): set() for value in values}
    for start in range(len(values)):
        new = next(UNUSED)  # an unknown key makes the config new
        for value in (*values[start:], *values[:start]):
            answers[repr(value)].add(outcome({**with_value(config, path, value), "unused": new}))
    assert {value: len(found) for value, found in answers.items()} == dict.fromkeys(answers, 1)


OTHER_LENGTHS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    (LLAMA, {"method": "lora", "kernels": {"attention": "sdpa_efficient", "loss": "fused"}}),
    (LLAMA, {"profile": "litgpt", "batch": {"accumulation": 2}}),
    (LLAMA, {"profile": "torchtune", "optimizer": {"name": "sgd", "in_backward": True}}),
    (LLAMA, {"profile": "axolotl", "batch": {"packing": "sample_packing"}, "gpu": "3090"}),
    (LLAMA, {"trainer": "dpo", "method": "lora"}),
    (LLAMA, {"trainer": "grpo", "batch": {"generations": 2, "new_tokens": 9, "accumulation": 2}}),
    (LLAMA, {"trainer": "ppo", "profile": "trl-1.10", "roles": {"reward": {"model": {"config": LLAMA}}}}),
    (LLAMA, {"parallelism": {"world": 4, "cp": 2, "dp": 2, "strategy": "fsdp2"}}),
    (LLAMA, {"parallelism": {"world": 2, "pp": 2}, "batch": {"accumulation": 4}, "gpu": "t4"}),
    (LLAMA, {"also": {"evaluation": {"micro": 2}}}),
    ({**QWEN2_MOE, "num_key_value_heads": 2}, {"method": "lora", "kernels": {"checkpointing": "none"}}),
    ({"model_type": "mamba2", **DECODERS["mamba2"]}, {}),
    ({"model_type": "t5", **ENCODERS["t5"]}, {"batch": {"target_sequence": 40}}),
    ({"model_type": "gpt2", **DECODERS["gpt2"], "n_positions": 300}, {"kernels": {"attention": "eager"}}),
)


@each(OTHER_LENGTHS)
def test_runs_of_other_lengths_have_the_same_answers_in_any_order(case: tuple[dict[str, Any], dict[str, Any]]) -> None:
    config, fields = case
    lengths = ((1, 40), (2, 300), (5, 301), (1, 3080), (2, 40))
    answers: dict[tuple[int, int], set[object]] = {length: set() for length in lengths}
    for start in range(3):
        new = {**config, "unused": next(UNUSED)}
        for micro, sequence in (*lengths[start:], *lengths[:start]):
            batch = {**fields.get("batch", {}), "micro": micro, "sequence": sequence}
            answers[micro, sequence].add(outcome(new, **{**fields, "batch": batch}))
    assert {length: len(found) for length, found in answers.items()} == dict.fromkeys(lengths, 1)
    assert any(isinstance(found, str) for of_length in answers.values() for found in of_length)


GEMMA2 = {**LLAMA, "model_type": "gemma2", "sliding_window": 32, "head_dim": 16, "query_pre_attn_scalar": 16}
ALIKE: dict[str, dict[str, Any]] = {"model": {"config": LLAMA}}
GENERATES = {"new_tokens": 9, "accumulation": 2}
PAIRS = {**GENERATES, "generations": 2}
TRAINERS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    (LLAMA, {"trainer": "sft", "method": "lora"}),
    (LLAMA, {"trainer": "kto", "method": "lora"}),
    (LLAMA, {"trainer": "reward", "method": "lora"}),
    (LLAMA, {"trainer": "grpo", "method": "lora", "batch": PAIRS}),
    (LLAMA, {"trainer": "grpo", "roles": {"reward": ALIKE}, "batch": PAIRS}),
    (LLAMA, {"trainer": "grpo", "roles": {"reward": ALIKE}, "batch": {**PAIRS, "scored": 4}}),
    (LLAMA, {"trainer": "grpo", "kernels": {"loss": "tiled_lm_head"}, "batch": PAIRS}),
    (GEMMA2, {"trainer": "grpo", "method": "qlora", "batch": PAIRS, "gpu": "t4"}),
    (LLAMA, {"trainer": "gkd", "roles": {"teacher": ALIKE}, "profile": "trl-1.15"}),
    (LLAMA, {"trainer": "distill", "roles": {"teacher": ALIKE}, "profile": "trl-1.15", "batch": GENERATES}),
    (LLAMA, {"trainer": "ppo", "profile": "trl-1.10", "roles": {"reward": ALIKE}, "batch": GENERATES}),
    (LLAMA, {"trainer": "grpo", "rollout": "colocate", "gpu": "h100", "profile": "trl-0.24", "batch": PAIRS}),
    *(
        (LLAMA, {"trainer": "grpo", "rollout": "colocate", "gpu": "h100", "serving": serving, "batch": PAIRS})
        for serving in ({"max_model_len": 4096}, {"sleep": True, "trainer_offload": ["parameters", "optimizer"]})
    ),
)
LENGTHS = st.lists(st.tuples(st.sampled_from((1, 2, 4, 6)), st.integers(1, 3100)), min_size=3, max_size=6, unique=True)


@each(TRAINERS)
@settings(max_examples=examples(3), deadline=None)
@given(LENGTHS)
def test_a_repeated_answer_is_the_first_one_of_another_process(
    case: tuple[dict[str, Any], dict[str, Any]], lengths: list[tuple[int, int]]
) -> None:
    config, fields = case

    def answered(unused: int, micro: int, sequence: int) -> object:
        batch = {**fields.get("batch", {}), "micro": micro, "sequence": sequence}
        return outcome({**config, "unused": unused}, **{**fields, "batch": batch})

    repeated = next(UNUSED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunPeaks, "BEFORE", 2)
        answers = [answered(repeated, *each) for each in lengths]
    assert answers == [answered(next(UNUSED), *each) for each in lengths]


def test_a_fractional_size_is_refused_after_a_whole_one() -> None:
    config = {**LLAMA, "unused": next(UNUSED)}
    assert isinstance(outcome(config), str)
    for value in (2.0, "2"):
        with pytest.raises(MemplanError, match=r"num_hidden_layers must be a whole number"):
            estimate(RunSpec(model={"config": {**config, "num_hidden_layers": value}}))
    assert ModelSpec(config) == ModelSpec({**config})
    assert isinstance(outcome({**config, "num_hidden_layers": 1}), str)
    with pytest.raises(MemplanError, match=r"num_hidden_layers must be a whole number .*, not true"):
        estimate(RunSpec(model={"config": {**config, "num_hidden_layers": True}}))


def parts(model: type[Part]) -> Iterator[type[Part]]:
    """Yield a part of a run and all parts within it."""
    yield model
    for field in model.model_fields.values():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, Part):
                yield from parts(kind)


@pytest.mark.parametrize("part", dict.fromkeys(parts(RunSpec)), ids=lambda part: part.__name__)
def test_a_field_has_one_type_for_equal_values(part: type[Part]) -> None:
    given = {"model": "gpt2"} if part is RunSpec else {"config": {}} if "config" in part.model_fields else {}
    for name in part.model_fields:
        for values in (*EQUAL, (-1, -1.0), (64, 64.0)):
            taken: list[Any] = []
            for value in values:
                try:
                    taken.append(getattr(part.model_validate({**given, name: value}), name))
                except MemplanError:
                    continue
            assert all(repr(a) == repr(b) for a, b in combinations(taken, 2) if a == b), (name, taken)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"a": 1}, {"a": True}),
        ({"a": 2}, {"a": 2.0}),
        ({"a": 0}, {"a": False}),
        ({"a": [1, 2]}, {"a": [1, 2.0]}),
        ({"a": [[1]]}, {"a": [[True]]}),
        ({"a": [{"b": 1}]}, {"a": [{"b": 1.0}]}),
        ({"a": {"b": [1]}}, {"a": {"b": [1.0]}}),
    ],
)
def test_a_frozen_mapping_tells_types_apart(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a == b
    one, other = frozen(a), frozen(b)
    assert one != other
    assert not one == other  # noqa: SIM201 (it is an operator of its own)
    assert len({one, other}) == 2


def test_a_frozen_mapping_is_equal_in_any_order_of_its_keys() -> None:
    one, other = frozen({"a": 1, "b": [2, {"c": 3}]}), frozen({"b": [2, {"c": 3}], "a": 1})
    assert one == other
    assert hash(one) == hash(other)
    assert frozen({"a": 1}) == {"a": 1}
    assert FrozenDict(a=1) != [("a", 1)]
    assert frozen({"a": 1}) != frozen({"a": 1, "b": 1})
