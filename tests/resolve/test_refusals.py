"""No field of a run is ignored: unsupported or ineffective fields are errors that name the field."""

from __future__ import annotations

from typing import Any

import pytest

from memplan import MemplanError, RunSpec, estimate
from memplan.catalogue.optimizers.states import optimizer_names
from memplan.spec.parallelism import Parallelism
from memplan.spec.training import Loop, Method, Optimizer, Precision
from tests.encoders import SMALL
from tests.tiny import TINY

QWEN2: dict[str, Any] = {"model_type": "qwen2", **TINY["qwen2"]}


def refused(**fields: Any) -> MemplanError:
    with pytest.raises(MemplanError) as caught:
        estimate(RunSpec(**{"model": "qwen2-0.5b", **fields}))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(caught.value.field)
    assert caught.value.exit_code == 2
    return caught.value


NOT_YET: list[tuple[dict[str, Any], str]] = [
    ({"task": "generate", "parallelism": {"world": 2, "dp": 2, "strategy": "ddp"}}, "parallelism.dp"),
    ({"kernels": {"checkpointing": "selective", "reentrant": True}}, "kernels.checkpointing"),
    ({"kernels": {"checkpointing": "selective", "fused": ["rope"]}, "method": "lora"}, "kernels.checkpointing"),
    ({"kernels": {"every_n_layers": 2, "checkpointing": "offload"}}, "kernels.every_n_layers"),
    ({"kernels": {"every_n_layers": 2, "reentrant": True}}, "kernels.every_n_layers"),
    (
        {"model": "llama-3.2-1b", "kernels": {"every_n_layers": 2, "checkpointing": "full"}, "profile": "litgpt"},
        "kernels.every_n_layers",
    ),
    ({"precision": {"compute": "fp8"}}, "precision.compute"),
    ({"precision": {"compute": "float8"}}, "precision.compute"),
    (
        {"method": {"kind": "qlora", "quantization": {"format": "fp8", "block_size": 64}}},
        "method.quantization.block_size",
    ),
    ({"method": {"kind": "qlora", "quantization": {"storage": "bf16"}}}, "method.quantization.storage"),
    (
        {"model": "olmoe-1b-7b", "method": {"kind": "qlora", "quantization": {"format": "int8", "experts": True}}},
        "method.quantization.experts",
    ),
    (
        {
            "model": "olmoe-1b-7b",
            "method": {"kind": "qlora", "quantization": {"experts": True, "storage": "uint8"}},
            "parallelism": {"world": 2, "dp": 2, "strategy": "zero3"},
        },
        "method.quantization.experts",
    ),
    ({"method": {"kind": "dora", "options": {"bias": "all"}}}, "method.options.bias"),
    ({"method": {"kind": "lora", "modules_to_save": ["layers.3.mlp.up_proj"]}}, "method.modules_to_save"),
    ({"parallelism": {"world": 2, "tp": 2}, "method": "dora"}, "method.kind"),
    ({"parallelism": {"offload": {"parameters": True}}}, "parallelism.offload"),
    ({"parallelism": {"world": 2, "dp": 2, "strategy": "ddp", "offload": {"optimizer": True}}}, "parallelism.offload"),
]


@pytest.mark.parametrize(("fields", "field"), NOT_YET)
def test_known_but_unsupported_features_are_named_as_such(fields: dict[str, Any], field: str) -> None:
    error = refused(**fields)
    assert error.field == field
    assert "supported yet" in str(error)


UNTRAINABLE = [
    ("mxfp4", {}, "train dequantised"),
    ("torchao-int4", {}, "use torchao-int8"),
    ("hqq-int4", {}, "name modules, such as "),  # peft's all-linear does not find HQQ's layers
    ("torchao-int8", {"block_size": 64}, "has no blocks"),
]


@pytest.mark.parametrize(("format", "more", "words"), UNTRAINABLE, ids=str)
def test_a_format_that_nothing_trains_over_says_why(format: str, more: dict[str, Any], words: str) -> None:
    error = refused(method={"kind": "qlora", "quantization": {"format": format, **more}})
    assert words in str(error)
    assert refused(
        model="gpt2", method={"kind": "qlora", "targets": ["c_attn"], "quantization": {"format": "torchao-int8"}}
    ).field == ("method.quantization.format")


NO_FLEX: dict[str, tuple[dict[str, Any], str]] = {
    "dropout": ({"model": {"config": {**QWEN2, "attention_dropout": 0.1}}}, "flex_attention rejects attention_dropout"),
    "narrow heads": ({"model": {"config": {**QWEN2, "num_attention_heads": 16}}}, "needs heads at least 16 wide"),
    "an old card": ({"gpu": "p100"}, "needs compute capability 7.0"),
    "another class": ({"model": "opt-125m"}, "is not supported yet for opt"),
    "generating": ({"task": "generate"}, "is only supported yet in sft, with transformers 5"),
    "a profile": ({"profile": "trl-0.13"}, "is only supported yet in sft, with transformers 5"),
    "a trainer": ({"trainer": "dpo", "method": "lora"}, "is only supported yet in sft, with transformers 5"),
    "packing": (
        {"batch": {"packing": "sample_packing"}, "profile": "axolotl"},
        "is not supported yet with batch.packing",
    ),
    "ranks": ({"parallelism": {"world": 2, "tp": 2}}, "is not supported yet with parallelism.tp"),
    "images": (
        {"model": "gemma-3-4b", "batch": {"images": 1}},
        "flex_attention is not supported yet with images of gemma3",
    ),
}


@pytest.mark.parametrize(("fields", "words"), NO_FLEX.values(), ids=NO_FLEX)
def test_flex_attention_is_refused_where_it_fails_or_was_not_traced(fields: dict[str, Any], words: str) -> None:
    error = refused(kernels={"attention": "flex_attention"}, **fields)
    assert error.field == "kernels.attention"
    assert words in str(error)


def test_checkpointing_of_some_layers_needs_checkpointing() -> None:
    kernels = {"every_n_layers": 2, "checkpointing": "none"}
    assert "only applies with checkpointing" in str(refused(kernels=kernels))


def test_each_layer_that_is_not_checkpointed_takes_more() -> None:
    peaks = [
        estimate(RunSpec(model="qwen2-0.5b", kernels={"every_n_layers": n}, batch={"sequence": 4096})).bytes.allocated
        for n in (1, 2, 3, 24)
    ]
    none = estimate(RunSpec(model="qwen2-0.5b", kernels={"checkpointing": "none"}, batch={"sequence": 4096}))
    assert peaks == sorted(set(peaks))
    assert peaks[-1] < none.bytes.allocated


def test_eight_bit_states_that_differ_by_layer_are_refused() -> None:
    run: dict[str, Any] = {
        "model": {"config": {"model_type": "umt5", **SMALL["umt5"]}},
        "loop": {"trainer": True},
        "optimizer": {"name": "adamw_8bit", "in_backward": True},
    }
    assert refused(**run).field == "optimizer.in_backward"
    estimate(RunSpec(**{**run, "method": "lora"}))  # trains no embedding
    estimate(RunSpec(**{**run, "model": "t5-base"}))  # which has one table for all layers


def test_reentrant_checkpoints_that_share_a_graph_are_refused() -> None:
    """torch: "Trying to backward through the graph a second time", in every layer but the last."""
    run: dict[str, Any] = {"model": "deberta-v3-base", "kernels": {"reentrant": True}, "batch": {"sequence": 64}}
    assert refused(**run).field == "kernels.reentrant"
    for change in ({"method": "lora"}, {"kernels": {"reentrant": True, "checkpointing": "none"}}):
        assert estimate(RunSpec.model_validate({**run, **change})).bytes.allocated


def test_adapters_under_reentrant_checkpointing_need_inputs_that_require_a_gradient() -> None:
    asked = {"model": "vit-base", "method": "lora", "kernels": {"reentrant": True}}
    assert any("enable_input_require_grads" in note for note in estimate(RunSpec(**asked)).notes)
    assert estimate(RunSpec(**{**asked, "kernels": {}})).notes == ()


def test_a_world_unequal_to_its_degrees_product_names_every_degree() -> None:
    assert str(refused(parallelism={"world": 8, "dp": 3, "strategy": "ddp"})) == (
        "parallelism.world: a world of 8 GPUs is not dp 3 x tp 1 x pp 1 x cp 1 = 3"
    )


@pytest.mark.parametrize(
    "field", [f for f in Parallelism.model_fields if f not in ("world", "strategy", "offload", "pp", "tp", "cp")]
)
def test_no_field_of_parallelism_is_ignored(field: str) -> None:
    words: dict[str, Any] = {
        "sequence_parallel": True,
        "zero": {"reduce_bucket_size": 2},
        "backward_prefetch": "post",
        "cpu_ram_efficient_loading": False,
        "reshard_after_forward": False,
        "schedule": "gpipe",
        "ends_as_layers": True,
        "context": "ulysses",
        "device_map": "auto",
    }
    value = words.get(field, Parallelism.model_fields[field].default is False or 2)
    assert refused(parallelism={field: value}).field == f"parallelism.{field}"


@pytest.mark.parametrize("kind", ["generate", "forward"])
def test_a_task_is_not_a_method(kind: str) -> None:
    assert "task" in str(refused(method=kind))


def test_a_quantised_head_needs_untied_weights_and_a_supporting_loss() -> None:
    qlora = {"kind": "qlora", "quantization": {"skip": []}}
    for fields in ({"model": "llama-3.2-1b"}, {"model": "llama-3.1-8b", "kernels": {"loss": "fused"}}):
        assert refused(**fields, method=qlora).field == "method.quantization.skip"


def test_quantised_experts_need_experts_and_training() -> None:
    quantised = {"kind": "qlora", "quantization": {"experts": True}}
    assert str(refused(method=quantised)) == "method.quantization.experts: qwen2 has no experts; leave it out"
    modules = refused(model="olmoe-1b-7b", profile="transformers-4.51", method=quantised)
    assert "has experts as linear layers, which are quantised anyway" in str(modules)
    generating = refused(model="olmoe-1b-7b", task="generate", method={**quantised, "kind": "full"})
    assert str(generating) == "method.quantization.experts: only applies to training; leave it out"


ADAPTER_FIELDS: dict[str, Any] = {
    "rank": 8,
    "alpha": 32.0,
    "targets": ["q_proj"],
    "dropout": 0.1,
    "modules_to_save": ["lm_head"],
    "adapter_dtype": "bf16",
    "options": {"use_rslora": True},
}


@pytest.mark.parametrize(("field", "value"), ADAPTER_FIELDS.items())
@pytest.mark.parametrize("kind", ["full", "freeze"])
def test_adapter_options_need_an_adapter_method(kind: str, field: str, value: Any) -> None:
    error = refused(method={"kind": kind, field: value})
    assert error.field == f"method.{field}"
    assert "lora, qlora, dora, qdora have" in str(error)
    assert estimate(RunSpec(model="qwen2-0.5b", method={"kind": "lora", field: value})).bytes.allocated > 0


def test_every_field_of_a_method_is_for_adapters_or_checked_otherwise() -> None:
    assert set(Method.model_fields) == {*ADAPTER_FIELDS, "kind", "trainable_layers", "frozen", "quantization"}


@pytest.mark.parametrize("kind", ["full", "lora", "qlora", "dora", "qdora"])
def test_layers_that_train_are_counted_for_freeze_only(kind: str) -> None:
    assert refused(method={"kind": kind, "trainable_layers": 3}).field == "method.trainable_layers"


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_cache_of_keys_and_values_changes_no_memory(checkpointing: str) -> None:
    plain, cached = (
        estimate(RunSpec(model="qwen2-0.5b", kernels={"checkpointing": checkpointing}, loop={"use_cache": on}))
        for on in (False, True)
    )
    assert plain.phases == cached.phases


def test_rank_stabilised_lora_changes_no_memory() -> None:
    plain, stabilised = (
        estimate(RunSpec(model="qwen2-0.5b", method={"kind": "lora", "options": options}))
        for options in ({}, {"use_rslora": True})
    )
    assert plain.phases == stabilised.phases
    assert refused(method={"kind": "lora", "options": {"use_rslora": "yes"}}).field == "method.options.use_rslora"
    assert "method.kind dora" in str(refused(method={"kind": "lora", "options": {"use_dora": True}}))


@pytest.mark.parametrize(
    ("precision", "field"),
    [
        ({"compute": "fp16"}, "precision.compute"),
        ({"weights": "fp32", "compute": "bf16"}, "precision.compute"),
        ({"autocast": True, "compute": "fp32"}, "precision.compute"),
        ({"weights": "fp32", "autocast": True, "compute": "fp32"}, "precision.compute"),
        ({"master": "bf16"}, "precision.master"),
        ({"weights": "fp32", "master": "fp32"}, "precision.master"),
    ],
)
def test_a_dtype_that_nothing_would_be_in_is_refused(precision: dict[str, Any], field: str) -> None:
    assert refused(precision=precision).field == field


def test_four_bit_layers_have_their_own_compute_dtype() -> None:
    run = RunSpec(model="qwen2-0.5b", method="qlora", precision={"weights": "fp16", "compute": "bf16"})
    assert estimate(run).run.precision.compute == "bf16"


def test_the_answers_own_run_is_never_refused() -> None:
    for fields in ({"method": "qlora"}, {"precision": "mixed"}, {"method": "freeze"}, {"optimizer": "adamw_8bit"}):
        answer = estimate(RunSpec(model="qwen2-0.5b", **fields))
        assert estimate(RunSpec.model_validate_json(answer.run.model_dump_json())).phases == answer.phases


def test_trainable_layers_are_capped_at_the_models_layers() -> None:
    run = estimate(RunSpec(model="qwen2-0.5b", method={"kind": "freeze", "trainable_layers": 999})).run
    assert run.method.trainable_layers == 24


@pytest.mark.parametrize("name", optimizer_names())
def test_a_setting_of_the_optimizer_changes_something_or_is_refused(name: str) -> None:
    def phases(**settings: Any) -> Any:
        run = RunSpec(model="qwen2-0.5b", optimizer={"name": name, **settings})
        try:
            return estimate(run).phases
        except MemplanError as error:
            return error.field

    plain = phases()
    for setting, values in {"momentum": (0.9,), "state_dtype": ("fp32", "fp16"), "foreach": (True,)}.items():
        found = [phases(**{setting: value}) for value in values]
        said = found == [f"optimizer.{setting}"] * len(values)
        default = setting == "foreach" and name in ("adamw_torch", "sgd", "adagrad", "rmsprop")
        assert said or default or any(phase != plain for phase in found), (setting, found)


def test_a_dotted_name_means_the_modules_it_ends() -> None:
    def phases(**method: Any) -> Any:
        return estimate(RunSpec(model="qwen2-0.5b", method={"kind": "lora", **method})).phases

    assert phases(targets=["self_attn.q_proj"]) == phases(targets=["q_proj"])
    assert phases(modules_to_save=["mlp.up_proj"]) == phases(modules_to_save=["up_proj"])
    some = RunSpec(model="gpt2", method={"kind": "lora", "targets": ["mlp.c_proj"], "rank": 8}, batch={"sequence": 64})
    h, f, layers = 768, 3072, 12
    assert estimate(some).parameters.trainable == layers * 8 * (f + h)  # without attn.c_proj


def test_names_of_modules_are_checked_wherever_they_are_given() -> None:
    skip = refused(method={"kind": "qlora", "quantization": {"skip": ["lm_head", "o_prj"]}})
    assert (skip.field, "o_proj" in str(skip)) == ("method.quantization.skip", True)
    assert "stands alone" in str(refused(method={"kind": "lora", "targets": ["all-linear", "q_proj"]}))
    assert "did you mean all-linear" in str(refused(method={"kind": "lora", "targets": ["all_linear"]}))


def test_the_defaults_are_never_refused() -> None:
    parts = {"method": Method(), "precision": Precision(), "optimizer": Optimizer(), "loop": Loop()}
    assert estimate(RunSpec(model="qwen2-0.5b", **parts)).bytes.allocated > 0  # type: ignore[arg-type]


def test_a_loss_in_chunks_of_the_head_is_refused_under_autocast() -> None:
    error = refused(kernels={"loss": "chunked_lm_head"}, precision={"autocast": True})
    assert error.field == "kernels.loss"
    assert "autocast" in str(error)


@pytest.mark.parametrize("task", ["generate", "forward"])
def test_a_task_without_a_loss_refuses_any_but_the_default(task: str) -> None:
    def run(**fields: Any) -> RunSpec:
        return RunSpec(model="qwen2-0.5b", task=task, **fields)  # type: ignore[arg-type]

    assert estimate(run(kernels={"loss": "hf"})).bytes == estimate(run()).bytes
    for fields in ({"kernels": {"loss": "fused"}}, {"kernels": {"loss": "hf"}, "profile": "trl-1.15"}):
        with pytest.raises(MemplanError, match=f"task {task} has no loss"):
            estimate(run(**fields))


def test_a_storage_of_null_is_the_default() -> None:
    method = {"kind": "qlora", "quantization": {"storage": None}}
    assert RunSpec.model_validate({"model": "qwen2-0.5b", "method": method}) == RunSpec(
        model="qwen2-0.5b",
        method="qlora",  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("name", "attention", "words"),
    [
        ("t5gemma", "flash_attention_2", "is not supported yet for t5gemma; supported: eager"),
        ("t5gemma", "sdpa", "t5gemma does not run with sdpa: its class does not support it; use eager"),
        ("t5", "flash_attention_3", "it adds positions to the attention scores; use sdpa"),
        ("t5", "sdpa_math", "is not supported yet for t5; supported: sdpa, sdpa_efficient, eager"),
        ("mpnet", "flash_attention_2", "its class does not support it; use eager"),
    ],
)
def test_attention_that_a_class_lacks_is_refused(name: str, attention: str, words: str) -> None:
    error = refused(model={"config": SMALL[name]}, kernels={"attention": attention})
    assert error.field == "kernels.attention"
    assert words in str(error)
