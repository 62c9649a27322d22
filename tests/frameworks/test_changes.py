"""A change as a user writes it: memplan's options give exactly the changed run, the frameworks' lines are YAML."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.catalogue.methods.methods import ADAPTERS
from memplan.catalogue.optimizers.states import optimizer_names
from memplan.cli.estimate import command
from memplan.cli.runs import runs_of
from memplan.cli.typer_commands import given_by_typer
from memplan.core.errors import SpecError
from memplan.frameworks import FRAMEWORKS, Lines, lines, options
from memplan.frameworks.change_table import differing
from memplan.frameworks.change_table import yaml as in_yaml
from memplan.spec.run import RunSpec
from tests.sampling import examples


def run(**fields: Any) -> RunSpec:
    return RunSpec.model_validate({"model": "qwen2-7b", **fields})


def typed_over(asked: RunSpec, typed: str) -> RunSpec:
    """Return the run that the command makes of a file and overriding options."""
    import shlex

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        file.write_text(asked.model_dump_json())
        words, estimate = [*shlex.split(typed), "--spec", str(file)], command("estimate")
        return runs_of(estimate.given(words) or given_by_typer(estimate, words))[0]


# --- memplan's options ---

NAMES = st.lists(st.sampled_from(["q_proj", "k_proj", "v_proj", "down_proj", "lm_head"]), unique=True).map(tuple)
FLAGS = st.booleans()


@st.composite
def methods(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["full", "freeze", "lora", "qlora", "dora", "qdora"]))
    method: dict[str, Any] = {"kind": kind}
    if kind == "freeze":
        method["trainable_layers"] = draw(st.integers(1, 40))
    if kind in ADAPTERS:
        method |= {
            "rank": draw(st.integers(1, 256)),
            "targets": draw(st.just("all-linear") | NAMES),
            "dropout": draw(st.sampled_from([0.0, 0.05, 0.1, 1e-5])),
            "modules_to_save": draw(NAMES),
        }
    if kind.startswith("q"):
        method["quantization"] = {
            "format": draw(st.sampled_from(["nf4", "fp4"])),
            "double_quant": draw(FLAGS),
            "kbit_preparation": draw(st.sampled_from([True, False, "trl", "axolotl", "axolotl-0.12"])),
        }
    return method


@st.composite
def parallelisms(draw: st.DrawFn) -> dict[str, Any]:
    dp, tp, pp, cp = (draw(st.sampled_from([1, 2, 4])) for _ in range(4))
    strategies = ["zero1", "zero2", "zero3", "fsdp", "fsdp2", "ddp" if dp > 1 else "none"]
    moved = ("parameters", "optimizer", "activations")
    return {
        "world": dp * tp * pp * cp,
        "dp": dp,
        "tp": tp,
        "pp": pp,
        "cp": cp,
        "ep": draw(st.sampled_from([1, 2])),
        "strategy": draw(st.sampled_from(strategies)),
        "offload": {name: draw(FLAGS) for name in moved},
    }


@st.composite
def runs(draw: st.DrawFn) -> RunSpec:
    """Draw a run with every field decided that has an option."""
    gpu, word = draw(st.sampled_from(["3090", "h100", "l4"])), draw(st.sampled_from(["pure", "amp", "mixed", "fp16"]))
    return run(
        model=draw(st.sampled_from(["qwen2-7b", "llama-3.1-8b", "Qwen/Qwen3-8B"])),
        method=draw(methods()),
        precision=word if word != "pure" else draw(st.sampled_from(["bf16", "fp32"])),
        optimizer={
            "name": draw(st.sampled_from(optimizer_names())),
            "foreach": draw(FLAGS),
            "in_backward": draw(FLAGS),
        },
        batch={name: draw(st.integers(1, 2**20)) for name in ("micro", "sequence", "accumulation")},
        kernels={
            "attention": draw(st.sampled_from(["sdpa", "flash_attention_2", "eager", "sdpa_math", "sdpa_efficient"])),
            "checkpointing": draw(st.sampled_from(["none", "full", "offload"])),
            "reentrant": draw(FLAGS),
            "loss": draw(st.sampled_from(["hf", "chunked", "fused", "chunked_lm_head", "tiled_lm_head"])),
            "fused": draw(st.lists(st.sampled_from(["rope", "rms_norm", "swiglu", "lora"]), unique=True)),
        },
        also={
            "evaluation": {
                **{name: draw(st.integers(1, 64)) for name in ("micro", "sequence", "accumulation")},
                **{name: draw(st.integers(0, 64)) for name in ("kept_batches", "new_tokens")},
                "preprocess": "argmax",
            }
        },
        loop={name: draw(FLAGS) for name in ("hold_outputs", "padded", "trainer", "expandable_segments")},
        parallelism=draw(parallelisms()),
        profile=draw(st.sampled_from(["transformers-5", "axolotl-0.12"])),
        gpu=gpu,
    )


@settings(max_examples=examples(200), deadline=None)
@given(runs(), runs())
def test_the_printed_options_turn_the_run_into_the_changed_one(asked: RunSpec, changed: RunSpec) -> None:
    assert typed_over(asked, options(asked, changed)) == changed


@settings(max_examples=examples(50), deadline=None)
@given(runs())
def test_no_change_is_nothing_to_write(asked: RunSpec) -> None:
    assert options(asked, asked) == ""
    assert [(each.lines, each.note) for each in lines(asked, asked)] == [((), "")] * (1 + len(FRAMEWORKS))


TYPED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "--method qlora --batch-size 2 --grad-accum 8": ({}, {"method": "qlora", "batch": {"micro": 2, "accumulation": 8}}),
    "--method lora": ({"method": {"kind": "qlora", "rank": 8}}, {"method": {"kind": "lora", "rank": 8}}),
    "--no-double-quant": (
        {"method": "qlora"},
        {"method": {"kind": "qlora", "quantization": {"double_quant": False}}},
    ),
    "--precision pure --dtype fp16": ({"precision": "amp"}, {"precision": "fp16"}),
    "--gradient-checkpointing": ({"kernels": {"checkpointing": "none"}}, {"kernels": {"checkpointing": "full"}}),
    "--checkpointing offload": ({"kernels": {"checkpointing": "full"}}, {"kernels": {"checkpointing": "offload"}}),
    "--gpus 8 --zero 3 --offload optimizer": (
        {},
        {"parallelism": {"world": 8, "dp": 8, "strategy": "zero3", "offload": {"optimizer": True}}},
    ),
    "--gpus 8": ({}, {"parallelism": {"world": 8, "dp": 8, "strategy": "ddp"}}),
    "--zero 0": (
        {"parallelism": {"world": 2, "dp": 2, "strategy": "zero1"}},
        {"parallelism": {"world": 2, "dp": 2, "strategy": "ddp"}},
    ),
    "--offload none": ({"parallelism": {"offload": {"optimizer": True}}}, {}),
    "llama-3.1-8b --gpu h100": ({}, {"model": "llama-3.1-8b", "gpu": "h100"}),
    "--eval-batch-size 2 --eval-preprocess argmax": (
        {"also": {"evaluation": {"kept_batches": 4}}},
        {"also": {"evaluation": {"kept_batches": 4, "micro": 2, "preprocess": "argmax"}}},
    ),
}


@pytest.mark.parametrize(("typed", "runs_"), TYPED.items())
def test_only_the_options_of_the_change_are_printed(typed: str, runs_: tuple[dict[str, Any], dict[str, Any]]) -> None:
    asked, changed = (run(**fields) for fields in runs_)
    assert options(asked, changed) == typed
    assert typed_over(asked, typed) == changed


UNSAID: dict[str, dict[str, Any]] = {
    "method.alpha": {"method": {"kind": "lora", "alpha": 4}},
    "method.quantization.block_size": {"method": {"kind": "qlora", "quantization": {"block_size": 128}}},
    "method.quantization.double_quant": {
        "method": {"kind": "qlora", "quantization": {"format": "int8", "double_quant": True}}
    },
    "precision": {"precision": {"weights": "bf16", "autocast": True}},
    "loop.clip_grad_norm": {"loop": {"clip_grad_norm": None}},
    "loop.hold_outputs": {"loop": {"hold_outputs": "step"}},
    "parallelism.dp": {"parallelism": {"world": 4, "dp": 1}},
    "parallelism.etp": {"parallelism": {"etp": 2}},
    "parallelism.strategy": {"parallelism": {"world": 2, "dp": 2}},
    "task": {"task": "forward"},
    "model": {"model": {"config": {"model_type": "llama"}}},
}


@pytest.mark.parametrize(("field", "fields"), UNSAID.items())
def test_fields_without_an_option_are_an_error_and_a_note(field: str, fields: dict[str, Any]) -> None:
    quantization = {"double_quant": False}
    asked = run(**({"method": {"kind": "qlora", "quantization": quantization}} if field.endswith("_quant") else {}))
    with pytest.raises(SpecError, match=f"^{field}: no option sets this value"):
        options(asked, run(**fields))
    assert field in lines(asked, run(**fields))[0].note


def test_a_decided_field_is_left_open_again_without_its_option() -> None:
    asked = run(kernels={"checkpointing": "full"}, gpu="3090")
    assert lines(asked, run())[0] == Lines("memplan", "memplan options", (), "without --checkpointing, --gpu")


# --- the frameworks ---

CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qlora": ({}, {"method": "qlora"}),
    "int8": ({"method": "qlora"}, {"method": {"kind": "qlora", "quantization": {"format": "int8"}}}),
    "full": ({"method": "lora"}, {}),
    "dora": ({"method": "lora"}, {"method": "dora"}),
    "rank": ({"method": "lora"}, {"method": {"kind": "lora", "rank": 8}}),
    "targets": ({"method": "lora"}, {"method": {"kind": "lora", "targets": ["q_proj", "v_proj"]}}),
    "dropout": ({"method": "lora"}, {"method": {"kind": "lora", "dropout": 0.1}}),
    "saved": ({"method": "lora"}, {"method": {"kind": "lora", "modules_to_save": ["lm_head", "embed_tokens"]}}),
    "double quantisation": (
        {"method": {"kind": "qlora", "quantization": {"double_quant": False}}},
        {"method": "qlora"},
    ),
    "batch": ({"batch": {"micro": 8}}, {"batch": {"micro": 2, "sequence": 1024, "accumulation": 4}}),
    "checkpointing": ({"kernels": {"checkpointing": "none"}}, {"kernels": {"checkpointing": "full"}}),
    "offloaded checkpoints": ({"kernels": {"checkpointing": "full"}}, {"kernels": {"checkpointing": "offload"}}),
    "reentrant": ({}, {"kernels": {"reentrant": False}}),
    "flash": ({"kernels": {"attention": "eager"}}, {"kernels": {"attention": "flash_attention_2"}}),
    "sdpa": ({"kernels": {"attention": "eager"}}, {}),
    "fused loss": ({}, {"kernels": {"loss": "fused"}}),
    "chunked loss": ({}, {"kernels": {"loss": "chunked"}}),
    "fused kernels": ({}, {"kernels": {"fused": ["rope", "swiglu"]}}),
    "pure bf16": ({"precision": "amp"}, {}),
    "amp": ({}, {"precision": "amp"}),
    "mixed": ({}, {"precision": "mixed"}),
    "fp16": ({"precision": "amp"}, {"precision": {"weights": "fp32", "compute": "fp16", "autocast": True}}),
    "8-bit states": ({}, {"optimizer": "paged_adamw_8bit"}),
    "segments": ({}, {"loop": {"expandable_segments": True}}),
    "reduction": ({}, {"loop": {"sync_each_batch": True}}),
    "ZeRO": ({}, {"parallelism": {"world": 8, "dp": 8, "strategy": "zero2", "offload": {"optimizer": True}}}),
    "FSDP": ({}, {"parallelism": {"world": 8, "dp": 8, "strategy": "fsdp2"}}),
    "model": ({}, {"model": "llama-3.1-8b"}),
    "Muon": ({"optimizer": "adamw_torch"}, {"optimizer": "muon"}),
    "clipping": ({}, {"loop": {"clip_grad_norm": None}}),
    "efficient": ({}, {"kernels": {"attention": "sdpa_efficient"}}),
    "freeze": ({}, {"method": {"kind": "freeze", "trainable_layers": 3}}),
    "preparation": (
        {"method": "qlora"},
        {"method": {"kind": "qlora", "quantization": {"kbit_preparation": True, "skip": ["lm_head"]}}},
    ),
    "adapters in bf16": ({"method": "lora"}, {"method": {"kind": "lora", "adapter_dtype": "bf16"}}),
    "all activations": ({}, {"parallelism": {"offload": {"activations": True}}}),
    "evaluation": (
        {"also": {"evaluation": {"kept_batches": 4}}},
        {"also": {"evaluation": {"kept_batches": 4, "micro": 2, "accumulation": 1, "preprocess": "argmax"}}},
    ),
}
_DEEPSPEED = (
    "deepspeed: {zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}, bf16: {enabled: auto}, "
    "fp16: {enabled: auto}, gradient_clipping: auto, gradient_accumulation_steps: auto, "
    "train_micro_batch_size_per_gpu: auto, train_batch_size: auto}"
)
_EXPORT = "# shell: export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
_TORCHRUN = "# shell: axolotl train run.yaml --launcher torchrun -- --nproc_per_node=8"
_EFFICIENT = (
    "# Python: with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION): trainer.train()"
)
_LIGER = "plugins: [axolotl.integrations.liger.LigerPlugin]"
GOLDEN: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "qlora": (
        (
            "load_in_4bit: true",
            "bnb_4bit_quant_type: nf4",
            "use_bnb_nested_quant: true",
            "use_peft: true",
            "lora_r: 16",
            "lora_dropout: 0.0",
            "lora_target_modules: all-linear",
        ),
        ("adapter: qlora", "load_in_4bit: true", "lora_r: 16", "lora_dropout: 0.0", "lora_target_linear: true"),
        (
            "bf16: true",
            "pure_bf16: false",
            "finetuning_type: lora",
            "quantization_bit: 4",
            "quantization_type: nf4",
            "double_quantization: true",
            "lora_rank: 16",
            "lora_dropout: 0.0",
            "lora_target: all",
        ),
    ),
    "int8": (
        ("load_in_4bit: false", "load_in_8bit: true", "# remove: bnb_4bit_quant_type, use_bnb_nested_quant"),
        ("adapter: lora", "load_in_4bit: false", "load_in_8bit: true"),
        ("quantization_bit: 8", "# remove: quantization_type, double_quantization"),
    ),
    "full": (
        ("use_peft: false", "# remove: lora_r, lora_dropout, lora_target_modules"),
        ("# remove: adapter, lora_r, lora_dropout, lora_target_linear",),
        ("bf16: false", "pure_bf16: true", "finetuning_type: full", "# remove: lora_rank, lora_dropout, lora_target"),
    ),
    "dora": (("use_dora: true",), ("peft_use_dora: true",), ("use_dora: true",)),
    "rank": (("lora_r: 8",), ("lora_r: 8",), ("lora_rank: 8",)),
    "targets": (
        ("lora_target_modules: [q_proj, v_proj]",),
        ("lora_target_linear: false", "lora_target_modules: [q_proj, v_proj]"),
        ('lora_target: "q_proj,v_proj"',),
    ),
    "dropout": (("lora_dropout: 0.1",), ("lora_dropout: 0.1",), ("lora_dropout: 0.1",)),
    "saved": (
        ("lora_modules_to_save: [lm_head, embed_tokens]",),
        ("lora_modules_to_save: [lm_head, embed_tokens]",),
        ('additional_target: "lm_head,embed_tokens"',),
    ),
    "double quantisation": (
        ("use_bnb_nested_quant: true",),
        ("# remove: bnb_config_kwargs",),
        ("double_quantization: true",),
    ),
    "batch": (
        ("per_device_train_batch_size: 2", "gradient_accumulation_steps: 4", "max_length: 1024"),
        ("micro_batch_size: 2", "gradient_accumulation_steps: 4", "sequence_len: 1024"),
        ("per_device_train_batch_size: 2", "gradient_accumulation_steps: 4", "cutoff_len: 1024"),
    ),
    "checkpointing": (
        ("gradient_checkpointing: true",),
        ("gradient_checkpointing: true",),
        ("disable_gradient_checkpointing: false",),
    ),
    "offloaded checkpoints": (
        ("gradient_checkpointing_kwargs: {offload: true}",),
        ("activation_offloading: hidden_states",),
        ("use_unsloth_gc: true",),
    ),
    "reentrant": (
        ("gradient_checkpointing_kwargs: {use_reentrant: false}",),
        ("gradient_checkpointing_kwargs: {use_reentrant: false}",),
        ("use_reentrant_gc: false",),
    ),
    "flash": (
        ("attn_implementation: flash_attention_2",),
        ("attn_implementation: flash_attention_2",),
        ("flash_attn: fa2",),
    ),
    "sdpa": (("# remove: attn_implementation",), ("# remove: attn_implementation",), ("flash_attn: sdpa",)),
    "fused loss": (
        ("use_liger_kernel: true", "liger_kernel_config: {rope: false, rms_norm: false, swiglu: false}"),
        (_LIGER, "liger_fused_linear_cross_entropy: true"),
        ("enable_liger_kernel: true",),
    ),
    "chunked loss": ((), ("chunked_cross_entropy: true",), ()),
    "fused kernels": (
        (
            "use_liger_kernel: true",
            "liger_kernel_config: {rope: true, rms_norm: false, swiglu: true, fused_linear_cross_entropy: false, "
            "cross_entropy: false}",
        ),
        (_LIGER, "liger_rope: true", "liger_glu_activation: true"),
        ("enable_liger_kernel: true",),
    ),
    "pure bf16": (("dtype: bfloat16", "bf16: false"), ("bf16: true",), ("bf16: false", "pure_bf16: true")),
    "amp": (("dtype: float32", "bf16: true"), ("bf16: false",), ("bf16: true", "pure_bf16: false")),
    "mixed": (("bf16: true",), (), ("bf16: true", "pure_bf16: false")),
    "fp16": (("bf16: false", "fp16: true"), (), ("bf16: false", "fp16: true")),
    "8-bit states": (("optim: paged_adamw_8bit",), ("optimizer: paged_adamw_8bit",), ("optim: paged_adamw_8bit",)),
    "segments": ((_EXPORT,), ("# shell: unset PYTORCH_ALLOC_CONF",), (_EXPORT,)),
    "ZeRO": (
        (_DEEPSPEED, "num_processes: 8"),
        (_DEEPSPEED, _TORCHRUN),
        (_DEEPSPEED, "# shell: FORCE_TORCHRUN=1 NPROC_PER_NODE=8 llamafactory-cli train run.yaml"),
    ),
    "FSDP": (
        (
            "fsdp: true",
            "fsdp_config: {version: 2, reshard_after_forward: true, cpu_offload: false}",
            "num_processes: 8",
        ),
        (
            "fsdp_version: 2",
            "fsdp_config: {auto_wrap_policy: TRANSFORMER_BASED_WRAP, reshard_after_forward: true, "
            "offload_params: false, cpu_ram_efficient_loading: true}",
            _TORCHRUN,
        ),
        (
            "# shell: accelerate launch --num_processes 8 --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy "
            "TRANSFORMER_BASED_WRAP --fsdp_offload_params false src/train.py run.yaml",
        ),
    ),
    "Muon": (("# remove: optim",), ("optimizer: muon",), ("use_muon: true", "# remove: optim")),
    "clipping": (("max_grad_norm: 0.0",), ("max_grad_norm: 0.0",), ("max_grad_norm: 0.0",)),
    "efficient": (("attn_implementation: sdpa", _EFFICIENT), ("attn_implementation: sdpa", _EFFICIENT), (_EFFICIENT,)),
    "freeze": (
        ("# Python: model.requires_grad_(False); model.model.layers[-3:].requires_grad_(True)",),
        (),
        ("finetuning_type: freeze", "freeze_trainable_layers: 3"),
    ),
    "preparation": (
        (
            "# Python: BitsAndBytesConfig(..., llm_int8_skip_modules=['lm_head'])",
            "# Python: model = peft.prepare_model_for_kbit_training(model)",
        ),
        ("bnb_config_kwargs: {llm_int8_skip_modules: [lm_head]}",),
        (),
    ),
    "adapters in bf16": (
        ("# Python: get_peft_model(model, config, autocast_adapter_dtype=False)",),
        ("peft_autocast_adapter_dtype: false",),
        ("bf16: false", "pure_bf16: true"),
    ),
    "reduction": (("accelerator_config: {gradient_accumulation_kwargs: {sync_each_batch: true}}",),) * 3,
    "all activations": (("activation_offloading: true",), ("activation_offloading: true",), ()),
    "evaluation": (
        (
            "per_device_eval_batch_size: 2",
            "eval_accumulation_steps: 1",
            "# Python: trainer = SFTTrainer(..., preprocess_logits_for_metrics=lambda logits, labels: "
            "logits.argmax(-1))",
        ),
        ("eval_batch_size: 2",),
        ("per_device_eval_batch_size: 2", "eval_accumulation_steps: 1", "compute_accuracy: true"),
    ),
    "model": (
        ("model_name_or_path: meta-llama/Llama-3.1-8B",),
        ("base_model: meta-llama/Llama-3.1-8B",),
        ("model_name_or_path: meta-llama/Llama-3.1-8B",),
    ),
}


@pytest.mark.parametrize(("name", "expected"), GOLDEN.items())
def test_a_change_in_each_frameworks_words(name: str, expected: tuple[tuple[str, ...], ...]) -> None:
    asked, changed = (run(**fields) for fields in CHANGES[name])
    assert tuple(each.lines for each in lines(asked, changed)[1:]) == expected


def test_axolotl_has_no_key_for_how_long_logits_are_kept() -> None:
    asked, changed = (run(also={"evaluation": {"accumulation": n}}) for n in (4, 1))
    axolotl = next(each for each in lines(asked, changed) if each.framework == "axolotl")
    assert axolotl.lines == ()
    assert axolotl.note.startswith("kept logits go to the host every gradient_accumulation_steps batches")


def test_every_change_has_its_golden_lines() -> None:
    assert set(CHANGES) == set(GOLDEN)


NOTES: dict[str, tuple[dict[str, Any], tuple[str, str, str]]] = {
    "in backward": ({"optimizer": {"in_backward": True}}, ("no key steps the optimizer in backward",) * 3),
    "foreach": ({"optimizer": {"foreach": False}}, ("foreach=False",) * 3),
    "GPU": ({"gpu": "h100"}, ("run it on H100 SXM5 80GB",) * 3),
    "profile": ({"profile": "trl-0.24"}, ("trl-0.24 is a version of the framework",) * 3),
    "masters": ({"precision": "mixed"}, ("fp32 master weights next to bf16 weights need DeepSpeed",) * 3),
    "GaLore": ({"optimizer": "galore_adamw"}, ("optim_target_modules",) * 3),
    "no optimizer": ({"optimizer": "none"}, ("no key trains without an optimizer",) * 3),
    "Muon": ({"optimizer": "muon"}, ("transformers has no muon", "", "")),
    "GPTQ": ({"method": {"kind": "qlora", "quantization": {"format": "gptq-int4"}}}, ("gptq-int4 comes from",) * 3),
    "amp": ({"precision": "amp"}, ("", "fp32 weights under autocast have no key", "")),
    "fused": (
        {"kernels": {"loss": "fused"}},
        ("TRL 1.16 never makes full logits", "plugins", "the fused loss together"),
    ),
    "chunked": ({"kernels": {"loss": "chunked"}}, ("chunks its loss without a key", "", "no chunked loss")),
    "LitGPT": ({"kernels": {"loss": "chunked_lm_head"}}, ("only LitGPT",) * 3),
    "LoRA kernels": ({"kernels": {"fused": ["lora"]}}, ("Unsloth's", "", "use_unsloth")),
    "freeze": ({"method": "freeze"}, ("", "unfrozen_parameters", "")),
    "reference": (
        {"method": "lora", "trainer": "dpo", "reference": "adapters"},
        ("pass no ref_model", "no key for trainer (dpo), reference (adapters)", "no key for"),
    ),
    "held": (
        {"loop": {"hold_outputs": True}},
        tuple(f"{f.title} has no key for loop.hold_outputs (true)" for f in FRAMEWORKS),  # type: ignore[dict-item]
    ),
}


@pytest.mark.parametrize(("fields", "expected"), NOTES.values(), ids=NOTES.keys())
def test_fields_without_a_framework_key_are_reported(fields: dict[str, Any], expected: tuple[str, ...]) -> None:
    for each, words in zip(lines(run(), run(**fields))[1:], expected, strict=True):
        assert words in each.note
        assert words or not each.note


@settings(max_examples=examples(40), deadline=None)
@given(runs(), runs())
def test_the_emitted_file_is_yaml_with_every_field(asked: RunSpec, changed: RunSpec) -> None:
    for framework, each in zip(FRAMEWORKS, lines(asked, changed)[1:], strict=True):
        written = yaml.safe_load("\n".join(each.lines)) or {}
        keys = {key.key: key for key in framework.keys}
        assert len(written) == len([line for line in each.lines if not line.startswith("# ")])
        assert all(keys[name].place == "yaml" for name in written)
        assert all("\n" not in line for line in (*each.lines, each.note))
    for name in differing(asked, changed):
        one = _with(asked, changed, name)
        if one is not None:
            assert all(each.lines or each.note for each in lines(asked, one)), name


def _with(asked: RunSpec, changed: RunSpec, path: str) -> RunSpec | None:
    """Return the run with one field of the changed run; None if the field's parent is missing."""
    fields: Any = asked.model_dump()
    inner: Any = fields
    *parts, last = path.split(".")
    for part in parts:
        inner = inner[part]
    if inner is None:
        return None
    value: Any = changed.model_dump()
    for part in path.split("."):
        value = value and value[part]
    inner[last] = value
    return RunSpec.model_validate(fields) if value is not None else None


TEXT = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")))


@given(
    st.recursive(
        st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
        lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
        max_leaves=8,
    )
)
def test_a_value_reads_back_from_yaml(value: Any) -> None:
    text = in_yaml(value)
    assert "\n" not in text
    assert json.dumps(yaml.safe_load(text), sort_keys=True) == json.dumps(value, sort_keys=True)


def test_every_table_names_the_version_it_was_read_from() -> None:
    assert [framework.name for framework in FRAMEWORKS] == ["trl", "axolotl", "llamafactory"]
    for framework in FRAMEWORKS:
        assert framework.source.startswith(f"{framework.name} ")
        assert len({key.key for key in framework.keys}) == len(framework.keys)
