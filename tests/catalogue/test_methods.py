"""Methods against PEFT and bitsandbytes: trained parameters, and bytes of quantised ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memplan import RunSpec, estimate, load_card
from memplan.catalogue.hardware.gpus import find_gpu
from memplan.catalogue.hardware.overhead import cublas_workspace
from memplan.core.errors import MemplanError, UnknownNameError
from memplan.core.units import rounded
from memplan.engine.walk import alive, size
from memplan.program.graph import operations_of, parameters_of
from memplan.program.sharding.choice import sharding_of
from memplan.program.training.passes import pass_of
from memplan.program.training.program import program
from memplan.resolve.decide import decide
from tests.cases import each
from tests.golden.ask_libraries import trained
from tests.tiny import TINY

BF16, FP32 = 2, 4

# family -> its module names for: attention inputs only, attention, everything linear in one layer
TARGETS: dict[str, list[list[str]]] = {
    "llama": [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "down_proj"]],
    "mistral": [["q_proj", "v_proj"], ["o_proj"], ["up_proj", "down_proj", "k_proj"]],
    "qwen2": [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj"]],
    "qwen3": [["q_proj"], ["v_proj", "o_proj"], ["down_proj"]],
    "phi3": [["qkv_proj"], ["qkv_proj", "o_proj"], ["gate_up_proj", "down_proj"]],
    "gemma2": [["q_proj", "v_proj"], ["k_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]],
    "gpt2": [["c_attn"], ["c_attn", "c_proj"], ["c_fc"]],
    "gpt_neox": [["query_key_value"], ["query_key_value", "dense"], ["dense_h_to_4h", "dense_4h_to_h"]],
    "opt": [["q_proj", "v_proj"], ["k_proj", "out_proj"], ["fc1", "fc2"]],
    "bloom": [["query_key_value"], ["dense"], ["dense_h_to_4h", "dense_4h_to_h"]],
    "falcon": [["query_key_value"], ["dense"], ["dense_h_to_4h"]],
    "starcoder2": [["q_proj", "v_proj"], ["o_proj"], ["c_fc", "c_proj"]],
    "stablelm": [["q_proj", "v_proj"], ["k_proj", "o_proj"], ["gate_proj"]],
    "glm": [["q_proj", "v_proj"], ["o_proj"], ["gate_up_proj", "down_proj"]],
    "cohere": [["q_proj", "v_proj"], ["k_proj", "o_proj"], ["gate_proj", "down_proj"]],
    "phi": [["q_proj", "v_proj"], ["dense"], ["fc1", "fc2"]],
}


def run(model_type: str, **fields: Any) -> RunSpec:
    return RunSpec(model={"config": {"model_type": model_type, **TINY[model_type]}}, **fields)


def peft_counts(model_type: str, kind: str, targets: Any, live: bool = False, **more: Any) -> list[int] | str:
    """Return the parameters that peft trains, and all with these; `live` asks peft in any case."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(
        r=8, target_modules=targets, use_dora=kind == "dora", task_type="CAUSAL_LM", fan_in_fan_out=False, **more
    )
    return trained({"model_type": model_type, **TINY[model_type]}, lora, live=live)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("model_type", sorted(TARGETS))
def test_trainable_parameters_equal_pefts(model_type: str, kind: str) -> None:
    for targets in ("all-linear", *TARGETS[model_type]):
        method = {"kind": kind, "rank": 8, "targets": targets}
        mine = estimate(run(model_type, method=method, batch={"sequence": 64})).parameters
        theirs = peft_counts(model_type, kind, targets, model_type in ("gpt2", "mistral"))
        assert [mine.trainable, mine.total + mine.trainable] == theirs, targets


@pytest.mark.torch
def test_saved_modules_and_adapted_embeddings_train_as_in_peft() -> None:
    for more in ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens", "lm_head"]}):
        method = {"kind": "lora", "rank": 8, "targets": ["q_proj"], **more}
        trainable = estimate(run("llama", method=method)).parameters.trainable
        assert trainable == peft_counts("llama", "lora", ["q_proj"], True, **more)[0]
    method = {"kind": "lora", "rank": 8, "targets": ["q_proj", "embed_tokens"]}
    trainable = estimate(run("llama", method=method)).parameters.trainable
    assert trainable == peft_counts("llama", "lora", ["q_proj", "embed_tokens"], True)[0]


def test_lora_trains_rank_times_in_plus_out() -> None:
    h, layers, rank = 4096, 32, 8
    a = estimate(RunSpec(model="llama-2-7b", method={"kind": "lora", "rank": rank, "targets": ["q_proj", "v_proj"]}))
    assert a.parameters.trainable == layers * 2 * rank * (h + h)


def test_dora_adds_one_magnitude_an_output() -> None:
    h, f, k, layers = 3584, 18944, 4 * 128, 28
    trained = {
        kind: estimate(RunSpec(model="qwen2-7b", method={"kind": kind, "rank": 16})).parameters.trainable
        for kind in ("lora", "dora")
    }
    assert trained["dora"] - trained["lora"] == layers * (h + 2 * k + h + f + f + h)


def test_freeze_trains_the_last_layers_only() -> None:
    per_layer = 233_057_792  # qwen2-7b, tests/golden/parameters.json
    for layers in (1, 2, 28, 100):
        a = estimate(RunSpec(model="qwen2-7b", method={"kind": "freeze", "trainable_layers": layers}))
        assert a.parameters.trainable == min(layers, 28) * per_layer


def stored(quantization: dict[str, Any], weight: str) -> int:
    """Bytes of one quantised matrix of Llama-3.1-8B."""
    spec = RunSpec(model="llama-3.1-8b", method={"kind": "qlora", "quantization": quantization})
    held = parameters_of(decide(spec).structure.graph)
    return sum(h.bytes for h in held if h.what.startswith(f"{weight}.weight (") and h.where == "model.layers")


def test_four_bit_matrices_take_half_a_byte_and_their_scales() -> None:
    n = 14336 * 4096
    code, offset, nested_code = 512, 512, 1024  # 16, 1 and 256 fp32 numbers, each rounded to 512 bytes
    for form in ("nf4", "fp4"):
        double = stored({"format": form}, "mlp.up_proj")
        assert double == n // 2 + n // 64 + 4 * n // (64 * 256) + code + offset + nested_code
        single = stored({"format": form, "double_quant": False}, "mlp.up_proj")
        assert single == n // 2 + 4 * n // 64 + code
        coarse = stored({"format": form, "double_quant": False, "block_size": 256}, "mlp.up_proj")
        assert coarse == n // 2 + 4 * n // 256 + code


def test_int8_matrices_take_a_byte_and_a_scale_a_row() -> None:
    assert stored({"format": "int8"}, "mlp.up_proj") == 14336 * 4096 + 4 * 14336


def test_kbit_preparation_casts_unquantised_weights_to_fp32() -> None:
    v, h, layers = 128256, 4096, 32
    kept = {
        preparation: program(
            decide(
                RunSpec(
                    model="llama-3.1-8b", method={"kind": "qlora", "quantization": {"kbit_preparation": preparation}}
                )
            ).structure
        ).parameters
        for preparation in (True, False, "trl", "axolotl", "axolotl-0.12")
    }
    norms = (2 * layers + 1) * h * (FP32 - BF16)
    assert kept[True] - kept[False] == 2 * v * h * (FP32 - BF16) + norms
    assert kept["trl"] - kept[False] == norms
    assert kept["axolotl"] == kept["axolotl-0.12"] == kept[False]  # nothing else of a Llama is not quantised


def test_skipped_layers_stay_as_loaded() -> None:
    skipped = {"kind": "qlora", "quantization": {"skip": ["lm_head", "o_proj"]}}
    whole = program(decide(RunSpec(model="llama-3.1-8b", method="qlora")).structure).parameters
    partly = program(decide(RunSpec(model="llama-3.1-8b", method=skipped)).structure).parameters
    n = 4096 * 4096
    assert partly - whole == 32 * (FP32 * n - (n // 2 + n // 64 + 4 * n // 16384 + 2048))


def test_mixed_precision_is_sixteen_bytes_a_parameter() -> None:
    a = estimate(RunSpec(model="llama-2-7b", precision="mixed", batch={"sequence": 1}))
    p = a.parameters.total
    held = {k: sum(line.bytes for line in a.ledger if line.kind == k) for k in ("parameter", "optstate", "gradient")}
    assert held == {"parameter": 2 * p, "optstate": 12 * p, "gradient": 2 * p}


def test_pure_half_precision_is_eight_and_foreach_adds_two() -> None:
    def step(optimizer: str) -> int:
        phases = estimate(RunSpec(model="llama-2-7b", optimizer=optimizer)).phases
        return next(p.peak for p in phases if p.phase == "step" and p.step == 2)

    p = 6_738_415_616
    workspaces, rotary = 2 * 8_519_680, 2 * 512
    tensors = 32 * 9 + 3
    assert step("adamw_torch") == (2 + 2 + 4 + 2) * p + workspaces + rotary
    # fused: only a 512-byte step count per tensor, so the peak is clipping on top of all states:
    # one norm per tensor, and 4 bytes for each 65,536 elements of the largest
    norms = 512 * tensors + rounded(4 * tensors * (32000 * 4096 // 65536))
    assert step("adamw_torch_fused") == (2 + 2 + 4) * p + 512 * tensors + norms + workspaces + rotary


def test_targets_in_a_fused_matrix_adapt_all_of_it_with_a_note() -> None:
    a = estimate(RunSpec(model="phi-4", method={"kind": "lora", "targets": ["q_proj"]}))
    b = estimate(RunSpec(model="phi-4", method={"kind": "lora", "targets": ["qkv_proj"]}))
    assert a.parameters == b.parameters
    assert any("q_proj is part of qkv_proj" in note for note in a.notes)
    assert b.notes == ()


def test_the_trainer_projects_linear_layers_and_not_gpt2s_conv1d() -> None:
    def states(model: str, optimizer: str) -> int:
        answer = estimate(RunSpec(model=model, optimizer=optimizer, batch={"sequence": 64}))
        return sum(line.bytes for line in answer.ledger if line.kind == "optstate")

    assert states("gpt2", "galore_adamw") == states("gpt2", "adamw_torch") > 0
    assert 0 < states("qwen2-0.5b", "galore_adamw") < states("qwen2-0.5b", "adamw_torch")


def test_the_trainer_keeps_embedding_states_in_32_bits() -> None:
    vocabulary, h = 152064, 3584
    bare, trained = (
        estimate(RunSpec(model="qwen2-7b", optimizer="adamw_bnb_8bit", loop={"trainer": t})) for t in (False, True)
    )
    states = [sum(line.bytes for line in a.ledger if line.kind == "optstate") for a in (bare, trained)]
    n = vocabulary * h  # the head is no embedding, and untied here
    assert states[1] - states[0] == 2 * (4 * n - (n + 4 * n // 256))
    assert any("--trainer" in note for note in bare.notes)
    assert trained.notes == ()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"method": {"kind": "lora", "targets": ["q_prj"]}}, "method.targets"),
        ({"method": {"kind": "lora", "targets": []}}, "method.targets"),
        ({"method": {"kind": "lora", "modules_to_save": ["lm_hed"]}}, "method.modules_to_save"),
        ({"method": {"kind": "lora", "rank": 5000}}, "method.rank"),
        ({"method": {"kind": "lora", "quantization": {}}}, "method.quantization"),
        ({"method": {"kind": "full", "quantization": {}}}, "method.quantization"),
        ({"optimizer": "adamw_troch"}, "optimizer.name"),
        ({"optimizer": {"in_backward": True}, "batch": {"accumulation": 2}}, "optimizer.in_backward"),
        ({"optimizer": "galore_adamw_layerwise", "batch": {"accumulation": 2}}, "batch.accumulation"),
        ({"profile": "transformers-7"}, "profile"),
        ({"batch": {"new_tokens": 1}}, "batch.new_tokens"),
        ({"task": "generate", "kernels": {"loss": "fused"}}, "kernels.loss"),
        ({"kernels": {"attention": "flash_attention_2"}, "precision": "fp32"}, "kernels.attention"),
        ({"kernels": {"attention": "flash_attention_2"}, "gpu": "t4"}, "kernels.attention"),
        ({"parallelism": {"world": 2, "dp": 1}}, "parallelism.world"),
        ({"gpu": "rtx 9999"}, "gpu"),
        ({"precision": {"compute": "fp8"}}, "precision.compute"),
        ({"method": {"kind": "qlora", "quantization": {"block_size": 16}}}, "method.quantization.block_size"),
        (
            {"method": {"kind": "qlora", "quantization": {"format": "fp8", "block_size": 64}}},
            "method.quantization.block_size",
        ),
    ],
)
def test_impossible_methods_are_refused_by_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(MemplanError) as caught:
        estimate(RunSpec(model="qwen2-7b", **fields))
    assert caught.value.field == field
    assert "\n" not in str(caught.value)


def test_unknown_targets_name_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="q_proj"):
        estimate(RunSpec(model="qwen2-7b", method={"kind": "lora", "targets": ["q_prj"]}))


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "dora"])
def test_a_family_implemented_like_another_takes_the_same_memory(method: str) -> None:
    """Families that transformers cannot build, at sizes at which they equal a family that it can."""
    sizes = {**TINY["llama"], "num_hidden_layers": 4}
    block = {"attention": {"n_heads_in_group": 2}, "ffn": {"intermediate_size": sizes["intermediate_size"]}}
    alike = {
        "nemotron-nas": ({**sizes, "block_configs": [block] * 4}, "llama", sizes),
        "mimo": (sizes, "qwen2", sizes),
    }
    for model_type, (config, like, other) in alike.items():
        ours, theirs = (
            estimate(
                RunSpec(model={"config": {**c, "model_type": t}}, method=method, batch={"micro": 2, "sequence": 64})
            )
            for t, c in ((model_type, config), (like, other))
        )
        assert ours.phases == theirs.phases, model_type


def test_flash_attention_2_gets_half_precision_after_fp32_norms() -> None:
    run = RunSpec(
        model="llama-3.1-8b",
        method="qlora",
        kernels={"attention": "flash_attention_2", "checkpointing": "none"},
        gpu="a100-80gb",
    )
    low = pass_of(decide(run).structure)
    kept = {low.sizes[key][5]: low.sizes[key][1] for key, n in low.kept.counts.items() if n}
    assert {name: kept[name] for name in ("q.target", "k.target", "v.heads.target")} == dict.fromkeys(
        ("q.target", "k.target", "v.heads.target"), "bf16"
    )


def test_bitsandbytes_does_not_quantise_falcons_linear_class() -> None:
    def quantised(model: str) -> bool:
        held = parameters_of(decide(RunSpec(model=model, method="qlora")).structure.graph)
        return any("(packed)" in h.what for h in held)

    assert not quantised("falcon-7b")
    assert quantised("llama-2-7b")


@pytest.mark.parametrize(
    ("model", "preparation", "autocast", "noted"),
    [
        ("falcon-7b", "trl", False, True),
        ("gpt2", "trl", False, True),
        ("falcon-7b", "trl", True, False),
        ("falcon-7b", True, False, False),  # embeddings are in fp32 too
        ("falcon-7b", False, False, False),  # norms are in 16 bits too
        ("llama-2-7b", "trl", False, False),  # its norms are not fused, and cast
    ],
)
def test_a_layer_norm_that_a_card_refuses_is_noted(model: str, preparation: Any, autocast: bool, noted: bool) -> None:
    method = {"kind": "qlora", "quantization": {"kbit_preparation": preparation}}
    precision = {"weights": "fp16", "compute": "fp16", "autocast": autocast}
    answer = estimate(RunSpec(model=model, method=method, precision=precision, batch={"sequence": 64}))
    said = "embeddings are in fp16 and the layer norms after them in fp32: on a GPU torch rejects that without autocast"
    assert [note for note in answer.notes if "layer norms" in note] == [said] * noted


@pytest.mark.parametrize(("head_dim", "kernel"), [(20, "sdpa_math"), (24, "sdpa_efficient"), (288, "sdpa_efficient")])
@pytest.mark.parametrize("padded", [True, False])
def test_heads_unsupported_by_a_kernel_use_another(head_dim: int, kernel: str, padded: bool) -> None:
    """A mask rules out flash, which takes heads up to 256 wide; the next kernel needs multiples of 16 bytes, not 40."""
    config = {"model_type": "llama", **TINY["llama"], "head_dim": head_dim}

    def allocated(attention: str) -> int:
        return estimate(
            RunSpec(
                model={"config": config},
                batch={"micro": 4, "sequence": 512},
                kernels={"attention": attention, "checkpointing": "none"},
                loop={"padded": padded},
            )
        ).bytes.allocated

    assert (allocated("sdpa") == allocated(kernel)) == (padded or head_dim > 256)


def test_every_trained_weight_ends_with_a_gradient() -> None:
    for targets in (["q_proj", "lm_head"], ["embed_tokens"], "all-linear"):
        for kind in ("lora", "dora") if "embed_tokens" not in targets else ("lora",):
            run = RunSpec(model="llama-3.2-1b", method={"kind": kind, "targets": targets})
            structure = decide(run).structure
            _, axes = operations_of(structure.graph)
            all_of_them = sum(h.bytes * h.copies for h in sharding_of(structure).gradients())
            for later in (False, True):  # a later micro-batch adds to existing gradients
                low = pass_of(structure, later)
                left = sum(
                    size(low.sizes[key][0], low.sizes[key][1], axes)[1] * n
                    for key, n in alive(low.left, low.runs, axes).items()
                    if low.sizes[key][2] == "gradient"
                )
                assert left == (0 if later else all_of_them), (kind, targets, later)


@pytest.mark.parametrize(
    ("loaded", "compute", "made"), [("bf16", "bf16", ["bf16"]), ("fp32", "bf16", ["fp32", "bf16"])]
)
def test_backward_dequantises_to_the_dtype_that_was_loaded_and_casts_that(
    loaded: str, compute: str, made: list[str]
) -> None:
    precision = {"weights": loaded, "compute": compute}
    stack, _ = operations_of(decide(run("llama", method="qlora", precision=precision)).structure.graph)
    layer = next(op for op in stack.runs[0].blocks[0].ops if op.name == "mlp.up_proj.base_layer")
    assert [s.tensor.dtype for s in layer.scratch_back if s.tensor.name == "dequantised"] == made
    assert [t.dtype for t in layer.scratch if t.name == "dequantised"] == [compute]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("model", ["llama-3.2-1b", "qwen2-0.5b", "gpt2", "gemma-2-2b"])
def test_adapted_embeddings_run_in_every_precision(model: str, checkpointing: str, autocast: bool) -> None:
    targets = ["wte"] if model == "gpt2" else ["embed_tokens"]
    answer = estimate(
        RunSpec(
            model=model,
            method={"kind": "lora", "rank": 8, "targets": targets},
            precision={"autocast": autocast},
            kernels={"checkpointing": checkpointing},
            batch={"sequence": 256},
        )
    )
    facts = answer.run.method.rank, answer.parameters.trainable
    assert facts[1] % facts[0] == 0
    assert facts[1] > 0


def test_litgpts_phi_3_is_its_llama() -> None:
    """Its configs of Phi-3.5 and phi-4 differ from Llama's in sizes only."""
    phi = {**load_card("phi-3.5-mini").config, "tie_word_embeddings": False, "sliding_window": None}
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    llama = {"model_type": "llama", "tie_word_embeddings": False, **{name: phi[name] for name in sizes}}
    first, second = (
        estimate(RunSpec(model={"config": config}, profile="litgpt-2024", method="lora")) for config in (phi, llama)
    )
    assert first.bytes == second.bytes


def test_every_layer_of_litgpt_keeps_a_mask_of_its_window() -> None:
    """Also of a shorter sequence. LitGPT's config of Phi-3.5-mini has no window, and lit_gpt had none at all."""

    def masks(model: str, profile: str = "litgpt-2024", tokens: int = 512) -> list[int]:
        run = RunSpec(model=model, profile=profile, method="lora", batch={"sequence": tokens})
        return [line.bytes for line in estimate(run).ledger if "mask" in line.what and line.bytes]

    for model in ("phi-3-mini-4k", "phi-4-mini", "mistral-7b-v0.1"):
        assert masks(model) == [32 * 512 * 512 * 2]
    assert masks("phi-4-mini", tokens=511) == [32 * 511 * 512 * 2]
    assert masks("phi-3.5-mini") == masks("mistral-7b-v0.2") == masks("phi-3-mini-4k", "litgpt-2023") == []


_LITGPT = Path(__file__).parents[1] / "golden" / "traced_litgpt.jsonl"


@each(list(map(json.loads, _LITGPT.read_text("utf-8").splitlines())))
def test_a_step_of_litgpt_is_near_its_trace(row: dict[str, Any]) -> None:
    """The trace has no cuBLAS workspaces. The first step is counted as the later ones, which hold the last logits."""
    gpu = "a100-sxm-80gb"
    model = {"model_type": "phi3", "hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16}
    model |= {"num_key_value_heads": row["groups"], "intermediate_size": 2816, "vocab_size": 32064, "pad_token_id": 0}
    model |= {"tie_word_embeddings": False, "max_position_embeddings": 8192, "sliding_window": row["window"]}
    answer = estimate(
        RunSpec(
            model={"config": model},
            profile="litgpt-2024",
            method={"kind": "lora", "rank": 8, "targets": ["q_proj", "v_proj"]},
            optimizer="adamw_torch",
            batch={"micro": row["micro"], "sequence": row["tokens"], "accumulation": row["passes"]},
            loop={"clip_grad_norm": None},
            gpu=gpu,
        )
    )
    workspaces = 2 * cublas_workspace(find_gpu(gpu).compute_capability).usual
    found = {f"{phase.phase} {phase.step}": phase.peak - workspaces for phase in answer.phases}
    assert max(found.values()) == pytest.approx(max(row["peaks"].values()), rel=0.005)
    for phase in ("forward 2", "backward 2", "step 2"):
        assert max(found[phase], found["loss 2"] * (phase == "forward 2")) == pytest.approx(
            row["peaks"][phase], rel=0.01
        )


def test_a_quantised_head_is_given_each_chunk_in_its_own_dtype() -> None:
    """LitGPT also quantises the head, and a chunked head casts and keeps its input chunk."""
    config = {"model_type": "llama", **TINY["llama"]}
    run = RunSpec(model={"config": config}, profile="litgpt", method="qlora", kernels={"loss": "chunked"})
    stack, _ = operations_of(decide(run).structure.graph)
    heads = [op for op in stack.loss if op.name == "lm_head"]
    assert [op.captures for op in heads] == [op.reads for op in heads] == [(f"logits.in{i}",) for i in range(8)]
    casts = {op.reads: op.writes[0].shape for op in stack.loss if op.name == "lm_head.cast"}
    chunks = {**dict.fromkeys(range(7), "lc"), 7: "lc_last"}  # the last may be shorter
    assert casts == {(f"n{i}",): f"b {chunk} h" for i, chunk in chunks.items()}


def test_trainers_that_name_all_linear_layers_leave_out_experts_that_are_parameters() -> None:
    """Others pass all-linear to peft, which adapts experts and has no dropout for them."""

    def targets(profile: str, **method: Any) -> Any:
        run = RunSpec(model="qwen3-30b-a3b", profile=profile, method={"kind": "lora", **method})
        return estimate(run).run.method.targets

    for profile in ("ms-swift", "axolotl", "llamafactory"):
        assert targets(profile, dropout=0.05) == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert targets("trl") == "all-linear"


def test_unsloth_quantises_stacked_experts_and_adapts_them() -> None:
    for model, said, expected in (
        ("olmoe-1b-7b", None, True),
        ("qwen2-7b", None, False),
        ("olmoe-1b-7b", False, False),
    ):
        method = {"kind": "qlora", "quantization": {"experts": said}}
        found: Any = decide(RunSpec(model=model, method=method, profile="unsloth-2026.10")).parts["method"]
        assert (found.quantization.experts, found.targets) == (expected, "all-linear")
    stack, _ = operations_of(
        decide(RunSpec(model="gpt-oss-20b", method="lora", profile="unsloth-2026.10")).structure.graph
    )
    block = next(block for run in stack.runs for block in run.blocks)
    stored = {w.name: w.stored for op in block.ops for w in op.weights if w.stored}  # half a byte, and a byte for 32
    assert [*stored] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert {t.dtype for tensors in stored.values() for t in tensors} == {"uint8/2", "uint8/32"}


def test_a_module_with_adapted_quantised_experts_begins_by_folding_each_once() -> None:
    """peft dequantises the last stack first, holds it, casts its adapter, and checks what the two give."""
    method = {"kind": "qlora", "targets": ["gate_proj", "up_proj", "down_proj"], "quantization": {"experts": True}}
    stack, _ = operations_of(decide(RunSpec(model="olmoe-1b-7b", method=method)).structure.graph)
    block = next(block for run in stack.runs for block in run.blocks)
    begins = [op for op in block.ops if op.name.endswith((".get_param", ".register"))]
    down, up = "mlp.experts.down_proj", "mlp.experts.gate_up_proj"
    assert [op.name for op in begins] == [f"{n}.{part}" for n in (down, up) for part in ("get_param", "register")]
    held, check = begins[2:]
    assert [t.shape for t in (*held.writes, *check.scratch)] == ["E 2 m h"] * 3
    [returns] = [op for op in block.ops if op.name == "mlp.experts.return"]
    assert {f"{n}.param" for n in (down, up)} <= set(returns.reads)
