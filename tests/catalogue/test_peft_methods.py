"""peft's methods other than LoRA against peft: names, settings, default targets, and trained parameters."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest

from memplan import RunSpec, estimate
from memplan.catalogue.methods.peft_formulas import FORMULAS
from memplan.catalogue.methods.peft_layers import LAYERS, factorization, nearest_divisor
from memplan.catalogue.methods.peft_updates import UPDATES
from memplan.core.errors import MemplanError
from memplan.models.peft_methods import FEEDFORWARD, PEFT_METHODS, default_targets, filled_options
from memplan.spec.training import Method, MethodKind
from tests.cases import in_groups
from tests.golden.ask_libraries import trained
from tests.tiny import TINY

FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "gemma2", "gpt_neox", "opt", "bloom", "falcon", "phi", "gpt2")
# Settings of each method that change its number of parameters.
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "adalora": ({"rank": 5},),
    "adamss": ({"rank": 5, "options": {"num_subspaces": 3, "subspace_rank": 4}},),
    "boft": ({"options": {"boft_block_size": 8}}, {"options": {"boft_block_size": 0, "boft_block_num": 4}}),
    "beft": ({"adapter_dtype": "bf16"},),
    "c3a": ({"options": {"block_size": 16}},),
    "cartridge": ({"targets": "default", "options": {"num_virtual_tokens": 5, "num_frozen_tokens": 0}},),
    "cpt": ({"targets": "default", "options": {"cpt_token_ids": [5, 5, 7]}},),
    "deft": ({"rank": 5}, {"options": {"para": True}}),
    "delora": ({"rank": 3},),
    "fourierft": ({"options": {"n_frequency": 100}},),
    "frod": ({"options": {"sparse_rate": 0.05}}, {"options": {"sparse_rate": 0.0}}),
    "glora": (
        {"rank": 5},
        {"options": {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}},
        {"options": {"config_A_B": "constant", "config_C": "none", "config_D_E": "none"}},
    ),
    "gralora": ({"rank": 6}, {"rank": 8, "options": {"gralora_k": 4, "hybrid_r": 3}}),
    "hira": ({"rank": 5},),
    "hra": ({"rank": 5},),
    "ia3": ({"options": {"feedforward_modules": "q_proj"}},),
    "lily": ({"rank": 5, "options": {"num_B": 3}},),
    "loha": ({"rank": 3},),
    "ln_tuning": ({"targets": ["input_layernorm"], "adapter_dtype": "bf16"},),
    "lokr": ({"rank": 3}, {"options": {"decompose_both": True}, "rank": 2}, {"options": {"decompose_factor": 4}}),
    "osf": ({"options": {"effective_rank": 5}},),
    "peanut": ({"rank": 5}, {"options": {"depth": 3}}),
    "poly": ({"rank": 5, "options": {"n_tasks": 3, "n_skills": 5, "n_splits": 4}},),
    "psoft": ({"rank": 5}, {"options": {"psoft_orth": False}}, {"options": {"psoft_mag_a": False}}),
    "pvera": ({"rank": 6},),
    "shadow": (
        {"targets": "default", "rank": 5, "options": {"update_hidden_size": 12}},
        {"targets": "default", "options": {"shadow_num_hidden_layers": 3, "shadow_intermediate_size": 24}},
        {"targets": "default", "options": {"share_embeddings": False}},
        {"targets": "default", "modules_to_save": ["lm_head"]},
    ),
    "shira": ({"rank": 5},),
    "supertuning": ({"options": {"sparsity": 0.7}},),
    "tinylora": ({"rank": 5}, {"options": {"u": 7}}),
    "unilora": ({"rank": 5}, {"options": {"theta_d_length": 33}}),
    "vblora": ({"rank": 5, "options": {"vector_length": 8, "num_vectors": 20}},),
    "waveft": ({"options": {"n_frequency": 77}}, {"options": {"use_idwt": False}}),
    "oft": (
        {"options": {"oft_block_size": 24}},
        {"options": {"r": 3, "oft_block_size": 0}},
        {"options": {"block_share": True}},
    ),
    "miss": ({"rank": 5},),
    "multitask_prompt_tuning": (
        {"targets": "default", "options": {"num_virtual_tokens": 5, "num_tasks": 3, "num_ranks": 2}},
    ),
    "p_tuning": ({"targets": "default", "options": {"num_virtual_tokens": 5, "encoder_hidden_size": 12}},),
    "prefix_tuning": (
        {"targets": "default", "options": {"num_virtual_tokens": 5, "prefix_projection": True}},
        {
            "targets": "default",
            "options": {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 12},
        },
    ),
    "prompt_tuning": ({"targets": "default", "options": {"num_virtual_tokens": 5}},),
    "randlora": ({"rank": 5},),
    "road": (
        {"options": {"variant": "road_2", "group_size": 8}},
        {"options": {"variant": "road_4", "group_size": 8}},
    ),
    "trainable_tokens": ({"targets": "default", "options": {"token_indices": [3, 5, 7]}},),
    "vera": ({"rank": 6},),
    "xlora": (
        {"options": {"adapters": 3, "layerwise_scalings": True, "xlora_depth": 3, "xlora_size": 48}},
        {"rank": 5, "options": {"adapters": {"a": "x", "b": "y"}, "use_trainable_adapters": True}},
    ),
}
ASKED = sorted(PEFT_METHODS)[::8]  # peft itself is asked about these in every run: its other answers are recorded
# Settings that a method does not run without, in models this small.
NEEDED: dict[str, dict[str, Any]] = {
    "multitask_prompt_tuning": {"options": {"num_virtual_tokens": 7}},
    "p_tuning": {"options": {"num_virtual_tokens": 7}},
    "adaption_prompt": {"options": {"adapter_len": 7, "adapter_layers": 2}},
    "cartridge": {"options": {"num_virtual_tokens": 7}},
    "cpt": {"options": {"cpt_token_ids": [0, 2, 9, 4, 4]}},
    "prefix_tuning": {"options": {"num_virtual_tokens": 7}},
    "prompt_tuning": {"options": {"num_virtual_tokens": 7}},
    "c3a": {"options": {"block_size": 8}},
    "ln_tuning": {"adapter_dtype": "bf16"},
    "road": {"options": {"group_size": 8}},
    "vblora": {"options": {"vector_length": 8}},
    "waveft": {"options": {"n_frequency": 200}},
    "trainable_tokens": {"options": {"token_indices": [0, 2, 9]}},
    "xlora": {"options": {"adapters": 2}},
}


def run(model_type: str, **method: Any) -> RunSpec:
    model = {"config": {"model_type": model_type, **TINY[model_type]}}
    return RunSpec(model=model, method=method, batch={"sequence": 64})


def peft_trains(model_type: str, live: bool = False, **fields: Any) -> int | str:
    """Return the parameters that peft trains, or the name of its error; `live` asks peft in any case."""
    pytest.importorskip("peft")
    from memplan.probe.script.model import adapter_config

    method = Method.model_validate(fields)
    targets: Any = method.targets if isinstance(method.targets, str) else list(method.targets)
    if method.kind == "xlora" and targets == "default":  # adapters are saved with their modules' names
        targets = list(default_targets("xlora", model_type))
    more = (
        {}
        if method.virtual_tokens or method.kind in ("trainable_tokens", "shadow")
        else {"target_modules": None if targets == "default" else targets}
    )
    saved = {"modules_to_save": list(method.modules_to_save)} if method.modules_to_save else {}
    wanted = adapter_config(method, model_type, **more, **saved, task_type="CAUSAL_LM")
    found = trained({"model_type": model_type, **TINY[model_type]}, wanted, live=live)
    return found if isinstance(found, str) else found[0]


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@in_groups([(kind, model_type) for model_type in FAMILIES for kind in sorted(PEFT_METHODS)], "-".join)
def test_every_method_trains_as_many_parameters_as_in_peft(case: tuple[str, str]) -> None:
    kind, model_type = case
    row = PEFT_METHODS[kind]
    shares = kind != "lily" or model_type in ("llama", "mistral", "qwen2", "gemma2")  # which have 20 layers to name
    for targets in ("default", "all-linear") if row.on == "linear" and shares else ("default",):
        method: dict[str, Any] = {"kind": kind, "targets": targets, **NEEDED.get(kind, {})}
        if row.rank:
            method["rank"] = 4
        has_default = row.on in ("prompt", "prefix", "tokens", "blocks") or model_type in row.targets
        refuses = (model_type == "gpt2" and not row.conv1d) or model_type in row.refuses
        # OPT's fc1 reads flattened tokens, and the adapters of layers outside of `model` cannot be loaded
        refuses |= (kind in ("poly", "xlora") and (model_type, targets) == ("opt", "all-linear")) or (
            kind == "xlora" and model_type in ("bloom", "falcon", "gpt_neox")
        )
        if refuses or (targets == "default" and not has_default):
            with pytest.raises(
                MemplanError,
                match=r"no default|the Conv1D layers|peft's .* refuses|is counted for|fails on|loads no",
            ):
                estimate(run(model_type, **method))
            theirs = peft_trains(model_type, **method)
            trains = isinstance(theirs, int) and theirs > 0
            assert not trains or row.on == "prefix" or kind in ("poly", "xlora") or model_type == "gpt2"  # a step fails
        else:
            mine = estimate(run(model_type, **method)).parameters.trainable
            assert mine == peft_trains(model_type, model_type == "llama" and kind in ASKED, **method), targets


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "settings"), [(kind, s) for kind, each in SETTINGS.items() for s in each], ids=str)
def test_every_setting_counts_as_in_peft(kind: str, settings: dict[str, Any]) -> None:
    for model_type in ("llama", "qwen2"):
        method = {"kind": kind, "targets": ["q_proj", "down_proj"], **settings}
        assert estimate(run(model_type, **method)).parameters.trainable == peft_trains(model_type, **method)


@pytest.mark.torch
def test_methods_are_pefts() -> None:
    peft = pytest.importorskip("peft")
    known = {t.value.lower() for t in peft.PeftType} - {"lora"}
    assert {*PEFT_METHODS} == known
    assert {*PEFT_METHODS} == {*get_args(MethodKind)} - {"full", "freeze", "lora", "qlora", "dora", "qdora"}
    assert {*LAYERS, *UPDATES, *FORMULAS} == {kind for kind, row in PEFT_METHODS.items() if row.on == "linear"}


@pytest.mark.torch
@pytest.mark.parametrize("kind", sorted(PEFT_METHODS))
def test_defaults_are_pefts(kind: str) -> None:
    peft = pytest.importorskip("peft")
    constants = pytest.importorskip("peft.utils.constants")
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[kind.upper()]]
    configs = (config, *((peft.LoraConfig,) if kind == "xlora" else ()))  # whose adapters are LoRA's
    theirs = {field.name: field.default for each in configs for field in dataclasses.fields(each)}
    row = PEFT_METHODS[kind]
    if row.rank:
        assert theirs[row.r] == row.rank
    assert all(theirs[name] in (value, dataclasses.MISSING) for name, value in row.options.items())
    assert all(name in theirs for name in (row.alpha, row.dropout) if name)
    mapping = (
        f"TRANSFORMERS_MODELS_TO_{kind.upper().replace('LN_', 'LN').replace('XLORA', 'LORA')}_TARGET_MODULES_MAPPING"
    )
    targets = getattr(constants, mapping) if row.on in ("linear", "norms") else {}
    for model_type, names in targets.items():
        if model_type in row.targets or (model_type in TINY and isinstance(names, list)):
            assert default_targets(kind, model_type) == tuple(names), model_type


@pytest.mark.torch
def test_the_inputs_that_ia3_scales_are_pefts() -> None:
    constants = pytest.importorskip("peft.utils.constants")
    for model_type, names in constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.items():
        if model_type in FEEDFORWARD:
            assert FEEDFORWARD[model_type].split() == names
    assert filled_options("ia3", {}, "llama") == {"feedforward_modules": "down_proj"}


@pytest.mark.torch
def test_dimensions_are_divided_as_in_peft() -> None:
    lokr = pytest.importorskip("peft.tuners.lokr.layer")
    oft = pytest.importorskip("peft.tuners.oft.layer").OFTLayer
    for dimension in (*range(1, 70), 96, 100, 127, 128, 1408, 3584, 18944):
        for factor in (-1, 1, 4, 6, 8, 40):
            assert factorization(dimension, factor) == lokr.factorization(dimension, factor)
        for wanted in (1, 3, 8, 24, 32):
            assert nearest_divisor(dimension, wanted) == oft.adjust_oft_parameters(None, dimension, wanted)


REFUSED = [
    ({"kind": "ia3", "rank": 8}, "method.rank: ia3 has no rank in peft"),
    ({"kind": "oft", "dropout": 0.1}, "method.dropout: oft has no dropout in peft"),
    ({"kind": "vera", "alpha": 8}, "method.alpha: vera has no alpha in peft"),
    ({"kind": "oft", "options": {"oft_blocksize": 64}}, "did you mean oft_block_size?"),
    ({"kind": "oft", "options": {"oft_block_size": "large"}}, "must be a whole number, not 'large'"),
    ({"kind": "lokr", "quantization": {"format": "nf4"}}, "peft has no lokr over quantised weights"),
    (
        {"kind": "vera", "quantization": {"format": "gptq-int4"}},
        "peft has vera over nf4, fp4, int8 only, not gptq-int4",
    ),
    ({"kind": "prompt_tuning"}, "num_virtual_tokens: must be given"),
    ({"kind": "p_tuning", "options": {"num_virtual_tokens": 0}}, "must be a whole number above 0, not 0"),
    ({"kind": "prompt_tuning", "targets": ["q_proj"], "options": {"num_virtual_tokens": 4}}, "adapts no linear layer"),
    ({"kind": "prefix_tuning"}, "num_virtual_tokens: must be given"),
    (
        {"kind": "adaption_prompt", "options": {"adapter_len": 4}},
        "adapter_layers: must be given (--peft-options adapter_layers=8): the number of layers",
    ),
    (
        {"kind": "adaption_prompt", "options": {"adapter_len": 4, "adapter_layers": 1}},
        "adaption_prompt is counted for llama, mistral, not for qwen2",
    ),
    (
        {"kind": "cartridge", "options": {"num_virtual_tokens": 2, "num_frozen_tokens": 2}},
        "method.options.num_frozen_tokens: 2 of 2 tokens leave none to train",
    ),
    ({"kind": "c3a"}, "method.options.block_size: 256 does not divide the 64 features of self_attn.q_proj"),
    ({"kind": "road", "options": {"variant": "road_3"}}, "unknown name 'road_3'; did you mean road_4"),
    ({"kind": "fourierft", "options": {"n_frequency": 9999999}}, "9999999 is not among the"),
    (
        {"kind": "supertuning", "options": {"sparsity": 1.0}},
        "method.options.sparsity: must be at least 0 and less than 1",
    ),
    ({"kind": "supertuning", "options": {"sparsity": "1"}}, "must be a fraction such as 0.5, not '1'"),
    ({"kind": "tinylora", "options": {"u": 0}}, "method.options.u: must be at least 1, not 0"),
    ({"kind": "tinylora", "options": {"u": 10**30}}, f"method.options.u: must be at most {2**40}, not 1000"),
    ({"kind": "hra", "rank": 65}, "method.rank: 65 is more than the 64 features of self_attn.q_proj"),
    ({"kind": "osf", "options": {"effective_rank": "half"}}, "must be a whole number above 0, not 'half'"),
    ({"kind": "lily", "options": {"num_B": 1}}, "method.options.num_B: must be at least 2, not 1"),
    ({"kind": "glora", "options": {"config_C": "vectr"}}, "unknown name 'vectr'; did you mean vector"),
    ({"kind": "gralora", "options": {"gralora_k": 3}}, "method.options.gralora_k: 3 does not divide the 64 features"),
    ({"kind": "vblora"}, "method.options.vector_length: 256 does not divide the 64 features of self_attn.q_proj"),
    ({"kind": "trainable_tokens"}, "token_indices: must be given"),
    ({"kind": "cpt"}, "cpt_token_ids: must be given (--peft-options cpt_token_ids=[5,6])"),
    ({"kind": "cpt", "options": {"cpt_token_ids": 8}}, "cpt_token_ids: must be a list of whole numbers, not 8"),
    ({"kind": "trainable_tokens", "options": {"token_indices": [1, 1]}}, "names a token twice"),
    ({"kind": "lora", "options": {"trainable_token_indices": "1"}}, "must be numbers of tokens, not '1'"),
    (
        {"kind": "xlora"},
        "method.options.adapters: must be given (--peft-options adapters=4): a whole number from 1 to 256",
    ),
    ({"kind": "adamss", "options": {"num_subspaces": 10**9}}, "num_subspaces: must be a whole number from 1 to 256"),
    ({"kind": "shadow", "options": {"shadow_model": "a/b"}}, "shadow_model: 'a/b' is not supported yet"),
    ({"kind": "shadow", "options": {"update_hidden_size": 0}}, "must be a whole number above 0, not 0"),
    ({"kind": "shadow", "options": {"auxiliary_loss_weight": 0}}, "auxiliary_loss_weight: must be above 0, not 0"),
    ({"kind": "shadow", "options": {"shadow_hidden_size": 8}}, "shadow has no such setting in memplan"),
    ({"kind": "shadow", "targets": ["q_proj"]}, "method.targets: shadow adapts no linear layer"),
    ({"kind": "ln_tuning"}, "copies of the norms are in fp32, and layers in bf16 cannot read their output"),
    ({"kind": "ia3", "targets": ["q_prj"]}, "unknown name 'q_prj'; did you mean q_proj"),
]


@pytest.mark.parametrize(("method", "message"), REFUSED, ids=str)
def test_settings_that_a_method_does_not_have_are_refused(method: dict[str, Any], message: str) -> None:
    with pytest.raises(MemplanError) as error:
        estimate(run("qwen2", **method))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_prompts_and_trained_tokens_are_of_decoders_with_one_table() -> None:
    methods = (
        {"kind": "prompt_tuning", "options": {"num_virtual_tokens": 4}},
        {"kind": "lora", "options": {"trainable_token_indices": [1, 2]}},
    )
    for model in ("t5-base", "gemma-3n-e4b-text", "qwen2-vl-2b", "gemma-4-e2b"):
        for method in methods:
            with pytest.raises(MemplanError, match="are not supported yet"):
                estimate(RunSpec(model=model, method=method))  # type: ignore[arg-type]
    for fields in ({"kernels": {"loss": "chunked"}}, {"task": "generate"}):
        with pytest.raises(MemplanError, match="not supported yet"):
            estimate(RunSpec(model="qwen2-0.5b", method=methods[1], **fields))  # type: ignore[arg-type]


def test_a_second_stream_goes_through_decoders_alone_and_unpacked() -> None:
    for fields in (
        {"model": "t5-base"},
        {"model": "mamba-130m"},
        {"model": "gemma-3n-e4b-text"},
        {"model": "opt-350m"},
        {"trainer": "dpo"},
        {"kernels": {"fused": ["rms_norm"]}},
        {"parallelism": {"world": 2, "strategy": "fsdp"}},
        {"also": {"evaluation": {"new_tokens": 8}}},
        {"profile": "trl-1.15", "batch": {"packing": "bfd"}, "kernels": {"loss": "hf"}},
    ):
        with pytest.raises(MemplanError, match="shadow"):
            estimate(RunSpec(**{"model": "qwen2-0.5b", "method": "shadow", **fields}))  # type: ignore[arg-type]


def test_names_are_read_as_people_write_them() -> None:
    for name in ("IA3", "ia3"):
        assert Method.model_validate(name).kind == "ia3"
    assert Method.model_validate("vera").rank == 256
    assert Method.model_validate({"kind": "vera", "rank": 8}).rank == 8
    assert Method.model_validate("vera").targets == "default"
    assert Method.model_validate("lora").targets == "all-linear"
