"""Mixtures of experts: adapters, quantisation, active parameters and optimizers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.golden import SLACK
from memplan import RunSpec, estimate
from memplan.catalogue.experts import expert_loops, routers
from memplan.core.errors import ConfigError, MemplanError
from memplan.core.ir import Tensor
from memplan.models.cards import load_card
from memplan.models.configs import families
from memplan.models.configs.moe import FAMILIES
from memplan.models.model import ModelSpec
from memplan.planning.step_time import work
from memplan.probe.libraries import model_class
from memplan.program.graph import parameters_of, weights_of
from memplan.program.sharding.choice import sharding_of
from memplan.program.training.program import program
from memplan.resolve.decide import decide
from tests.golden.ask_libraries import trained
from tests.sampling import examples, sampled
from tests.tiny import TINY

EVERY = sorted(name for name, config in TINY.items() if "E" in ModelSpec({"model_type": name, **config}).axes())
MIXTURES = [name for name in EVERY if name in FAMILIES]
NAMES: tuple[Any, ...] = (
    ["q_proj", "gate"],
    ["gate_proj", "up_proj", "down_proj"],
    ["w1", "w2", "w3"],
    ["w1"],
    ["gate_proj"],
)


def run(model_type: str, **fields: Any) -> RunSpec:
    model = {"config": {"model_type": model_type, **TINY[model_type]}}
    return RunSpec(model=model, **{"batch": {"micro": 2, "sequence": 64}, **fields})


def in_peft(model_type: str, targets: Any) -> int | None:
    """Return the number of trained parameters; None if peft refuses."""
    lora = pytest.importorskip("peft").LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    config = {"model_type": model_type, **TINY[model_type]}
    found = trained(config, lora, model_class(model_type), live=model_type in EVERY[::8])
    if isinstance(found, str):
        assert found == "ValueError"
        return None
    return found[0]


def here(model_type: str, targets: Any) -> int | None:
    try:
        return estimate(run(model_type, method={"kind": "lora", "rank": 4, "targets": targets})).parameters.trainable
    except MemplanError:
        return None


# One of their linear layers returns more than a product, so peft's wrapper around it fails.
FAILING = ("deepseek_v4", "llama4_text", "phimoe")


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize("model_type", [name for name in EVERY if name not in FAILING])
def test_all_linear_means_what_it_means_to_peft(model_type: str) -> None:
    mine = here(model_type, "all-linear")  # None where both refuse: peft adapts no out_proj of a state space
    assert mine == in_peft(model_type, "all-linear")
    assert mine is not None or model_type == "nemotron_h"


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys", "ignore:target_parameters=")
@pytest.mark.parametrize("model_type", [name for name in MIXTURES if name != "phimoe"])
def test_peft_adapts_experts_and_routers_by_the_names_they_had(model_type: str) -> None:
    alone = in_peft(model_type, ["q_proj"])
    for targets in NAMES:
        mine, theirs = here(model_type, targets), in_peft(model_type, targets)
        if alone is None and "gate" in targets:  # a name that stands for a fused layer here does not in peft
            assert mine == here(model_type, ["q_proj"]), targets
        else:
            assert mine == theirs, targets


def test_adapters_on_fused_experts_have_the_rank_of_all_fused_layers() -> None:
    """A fused stack has an A and a B per expert, whose rank is multiplied by the number of layers it replaces."""
    h, m, experts, layers, rank = 64, 176, 8, 3, 4
    gate_up = 2 * rank * experts * (h + 2 * m)
    down = rank * experts * (m + h)
    router = rank * (h + experts)
    for targets, each in ((["w1", "w3"], gate_up), (["w2"], down), (["gate"], router)):
        assert here("mixtral", targets) == layers * each


@pytest.mark.parametrize(
    ("model_type", "method", "field"),
    [
        ("mixtral", {"kind": "lora", "dropout": 0.1}, "method.dropout"),
        ("mixtral", {"kind": "dora"}, "method.kind"),
        ("mixtral", {"kind": "lora", "targets": ["w1", "q_proj"]}, "method.targets"),
        ("mixtral", {"kind": "lora", "targets": ["gate_up_proj"]}, "method.targets"),
        ("qwen3_moe", {"kind": "qdora", "targets": ["down_proj"]}, "method.kind"),
        ("phimoe", {"kind": "lora"}, "method.targets"),
        ("phimoe", {"kind": "qlora", "targets": ["q_proj"]}, "method.quantization.skip"),
    ],
)
def test_unsupported_adapters_and_quantisation_of_experts_are_refused(
    model_type: str, method: dict[str, Any], field: str
) -> None:
    with pytest.raises(MemplanError) as caught:
        estimate(run(model_type, method=method))
    assert caught.value.field == field
    assert "\n" not in str(caught.value)


def test_other_targets_of_the_same_models_take_dropout_and_dora() -> None:
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    for method in ({"kind": "lora", "dropout": 0.1}, {"kind": "dora"}, {"kind": "qdora"}):
        assert estimate(run("qwen3_moe", method={**method, "targets": attention})).notes is not None
    skip = {"skip": ["lm_head", "router"]}
    assert estimate(run("phimoe", method={"kind": "qlora", "targets": attention, "quantization": skip})).notes


def test_linear_layers_named_like_former_experts_get_no_adapter_but_a_note() -> None:
    h, f, a, k, rank = 64, 176, 64, 32, 8
    dense = rank * 3 * (h + f)
    attention = rank * ((h + a) + 2 * (h + k) + (a + h))
    every = estimate(run("qwen3_moe", method="lora"))  # its middle layer is dense
    assert any("leaves mlp.down_proj, mlp.gate_proj, mlp.up_proj unadapted" in note for note in every.notes)
    experts, m = 8, 48
    mixture = 2 * rank * experts * (h + 2 * m) + rank * experts * (m + h) + rank * (h + experts)
    rank_16 = estimate(run("qwen3_moe", method={"kind": "lora", "rank": rank})).parameters.trainable
    assert rank_16 == 3 * attention + 2 * mixture
    assert dense not in (0, rank_16 - 3 * attention - 2 * mixture)


def test_bitsandbytes_leaves_experts_and_routers_unquantised_and_a_note_says_so() -> None:
    spec = RunSpec(model="mixtral-8x7b", method="qlora", batch={"sequence": 64})
    held = {h.what: h for h in parameters_of(decide(spec).structure.graph)}
    h, f, experts = 4096, 14336, 8
    assert held["mlp.experts.gate_up_proj"].bytes == experts * 2 * f * h * 4  # fp32, after kbit preparation
    assert held["mlp.gate.weight"].dtype == "fp32"
    attention = 32 * 2 * (h * h + h * 1024)
    share = f"{100 * attention / 46_702_792_704:.1f}% of the parameters are quantised"
    assert any(share in note and "leaves them in fp32" in note for note in estimate(spec).notes)
    unprepared = {"kind": "qlora", "quantization": {"kbit_preparation": False}}
    notes = estimate(spec.model_copy(update={"method": RunSpec(model="gpt2", method=unprepared).method})).notes
    assert any("leaves them in bf16" in note for note in notes)


def test_active_parameters_exclude_unchosen_experts() -> None:
    p = estimate(RunSpec(model="mixtral-8x7b", batch={"sequence": 64})).parameters
    assert p.total - p.active == 32 * (8 - 2) * 3 * 14336 * 4096
    dense = estimate(RunSpec(model="qwen2-7b", batch={"sequence": 64})).parameters
    assert dense.active == dense.total


def test_optimizers_see_a_stack_as_one_parameter_of_three_axes() -> None:
    structure = decide(run("olmoe")).structure
    shapes = {p.name: p.shape for p in sharding_of(structure).trained()}
    assert shapes["model.layers.mlp.experts.gate_up_proj"] == (8, 2 * 176, 64)
    assert shapes["model.layers.mlp.experts.down_proj"] == (8, 64, 176)
    assert shapes["model.layers.mlp.gate.weight"] == (8, 64)


def test_adafactor_factors_a_stack_over_its_last_two_axes() -> None:
    def states(model_type: str) -> int:
        answer = estimate(run(model_type, optimizer="adafactor"))
        return sum(line.bytes for line in answer.ledger if line.kind == "optstate" and "gate_up_proj" in line.what)

    rows, columns, rms = 8 * 2 * 176, 8 * 64, 512
    assert states("olmoe") == 3 * (4 * (rows + columns) + rms)


@pytest.mark.parametrize(
    ("strategy", "each"), [("ddp", 2), ("fsdp", 1), ("fsdp2", 1), ("zero2", 2 + 4 / 2), ("zero3", (2 + 4) / 2)]
)
def test_ranks_shard_expert_stacks_like_other_weights(strategy: str, each: float) -> None:
    parallelism = {"world": 2, "dp": 2, "strategy": strategy}
    spec = RunSpec(model="granite-3.1-1b-a400m", batch={"sequence": 256}, parallelism=parallelism)
    held = program(decide(spec).structure).parameters  # of DeepSpeed's, with fp32 masters
    assert held == pytest.approx(each * estimate(spec).parameters.total, rel=0.01)


@settings(max_examples=examples(25))
@given(experts=st.integers(1, 64), chosen=st.integers(1, 64), width=st.integers(1, 512))
def test_experts_per_token_cannot_exceed_all_experts(experts: int, chosen: int, width: int) -> None:
    sizes = {"num_experts": experts, "num_experts_per_tok": chosen, "moe_intermediate_size": width}
    config = {**TINY["qwen3_moe"], "model_type": "qwen3_moe", "mlp_only_layers": [], **sizes}
    if chosen > experts:
        with pytest.raises(ConfigError, match="num_experts_per_tok"):
            ModelSpec(config).axes()
        return
    answer = estimate(RunSpec(model={"config": config}, batch={"sequence": 16}))
    assert answer.parameters.total - answer.parameters.active == 3 * (experts - chosen) * 3 * width * 64


def test_activations_grow_with_experts_per_token_and_not_with_all_experts() -> None:
    def moving(**sizes: int) -> int:
        config = {**TINY["olmoe"], "model_type": "olmoe", "intermediate_size": 512, **sizes}
        spec = RunSpec(model={"config": config}, batch={"micro": 8, "sequence": 512}, kernels={"checkpointing": "none"})
        answer = estimate(spec)
        return sum(line.bytes for line in answer.ledger if line.kind in ("activation", "temp"))

    base = moving(num_experts=32, num_experts_per_tok=2)
    assert moving(num_experts=32, num_experts_per_tok=4) > 1.5 * base
    assert moving(num_experts=64, num_experts_per_tok=2) < 1.1 * base


def test_the_config_determines_a_mixtures_dense_layers() -> None:
    assert [layer.ffn for layer in load_card("glm-4.5").layers] == ["dense"] * 3 + ["experts"] * 89
    base = {**TINY["qwen3_moe"], "model_type": "qwen3_moe", "num_hidden_layers": 6}
    sparse = {**base, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert [layer.ffn[0] for layer in ModelSpec(sparse).layers] == list("deddde")
    for wrong in ("1", {"1": 2}, ["one"], 3):
        with pytest.raises(ConfigError, match="mlp_only_layers"):
            ModelSpec({**base, "mlp_only_layers": wrong})


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_routers_own_loss_keeps_their_logits_of_every_layer(checkpointing: str) -> None:
    def forward(balanced: bool) -> int:
        config = {"model_type": "mixtral", **TINY["mixtral"], "output_router_logits": balanced}
        batch = {"micro": 2, "sequence": 512}
        answer = estimate(RunSpec(model={"config": config}, batch=batch, kernels={"checkpointing": checkpointing}))
        return next(p.peak for p in answer.phases if p.phase == "loss")

    tokens, experts, layers = 2 * 512, 8, 3
    assert forward(True) - forward(False) == layers * (2 * tokens * experts)


def test_a_profile_whose_version_writes_experts_otherwise_is_refused() -> None:
    for model_type, profile in (("mixtral", "torchtune"), ("qwen2_moe", "megatron-core"), ("glm4_moe", "axolotl-0.12")):
        with pytest.raises(MemplanError, match=r"the experts of .* are not supported yet") as caught:
            estimate(run(model_type, profile=profile))
        assert caught.value.field == "profile"
    assert estimate(run("mixtral", profile="trl-0.24")).fits is not None


@pytest.mark.parametrize(
    "model_type", sampled([name for name, row in families().items() if row.training.experts_were], 4)
)
def test_before_transformers_5_experts_were_linear_layers_like_any(model_type: str) -> None:
    def asked(profile: str, **fields: Any) -> Any:
        return estimate(run(model_type, profile=profile, **fields))

    old, new = asked("transformers-4.51"), asked("transformers-5")
    assert old.parameters == new.parameters
    assert asked("transformers-4.51", method={"kind": "dora", "dropout": 0.1}).parameters.trainable > 0
    held = parameters_of(decide(run(model_type, profile="transformers-4.51", method="qlora")).structure.graph)
    packed = [h.what for h in held if ".experts." in h.what and "(packed)" in h.what]
    sparse = 1 if model_type in ("qwen2_moe", "qwen3_moe") else 0  # their middle layer is dense: two runs of the others
    assert len(packed) == (1 + sparse) * 3 * 8
    names = ["w1", "w2"] if model_type == "mixtral" else ["gate_proj", "down_proj"]
    assert asked("transformers-4.51", method={"kind": "lora", "targets": names}).parameters.trainable > 0


def test_every_stacked_weight_names_its_expert_axis() -> None:
    for model_type in MIXTURES:
        found = [w for w, _, _ in weights_of(decide(run(model_type)).structure.graph) if w.chosen]
        assert {w.shape.split()[0] for w in found} == {"E"}
        assert {w.chosen for w in found} == {"e"}


@pytest.mark.torch
def test_experts_in_modules_keep_what_the_published_loop_saves() -> None:
    torch = pytest.importorskip("torch")
    from tests.catalogue.test_autograd import AXES, B, H, S, in_bytes, leaf, one_block, saved_bytes

    number, chosen, width = 4, 2, 48
    axes = {**AXES, "E": number, "e": chosen, "m": width, "routed": B * S * chosen // number}
    inputs = (Tensor("in", "b s h", "bf16"), Tensor(routers.SCORES, "b s e", "bf16"))
    choice = (Tensor(routers.CHOSEN, "b s e", "int64"),)
    made = expert_loops.modules("in", "out", number, chosen)
    mine = in_bytes(one_block(made, "bf16", "out", inputs, constants=choice), axes, ("embeds", "y", "loss"))

    x, scores = (leaf(B * S, n, dtype=torch.bfloat16) for n in (H, chosen))
    flat = torch.arange(B * S * chosen) % number
    shapes = ((width, H), (width, H), (H, width))
    weights = [[torch.ones(s, dtype=torch.bfloat16, requires_grad=True) for s in shapes] for _ in range(number)]

    def loop() -> Any:
        rows = x.repeat_interleave(chosen, dim=0)
        y = torch.empty_like(rows)
        for i, (gate, up, down) in enumerate(weights):
            some = rows[flat == i]
            y[flat == i] = (torch.nn.functional.silu(some @ gate.T) * (some @ up.T)) @ down.T
        return (y.view(B * S, chosen, H) * scores.unsqueeze(-1)).sum(dim=1)

    out = B * S * H * 2
    assert mine == saved_bytes(loop, own=[w for some in weights for w in some]) - out


def test_rows_are_multiplied_by_their_chosen_experts_matrices() -> None:
    h, m, layers, tokens, experts_ = 64, 176, 3, 2 * 64, 8

    def forward(model_type: str, method: Any = "full", **sizes: int) -> int:
        config = {**TINY[model_type], "model_type": model_type, **sizes}
        spec = RunSpec(model={"config": config}, batch={"micro": 2, "sequence": 64}, method=method)
        return work(spec).forward

    for model_type in ("olmoe", "mixtral"):
        one_more = forward(model_type, num_experts_per_tok=3) - forward(model_type, num_experts_per_tok=2)
        assert one_more == layers * 2 * tokens * 3 * m * h
    lora = {"kind": "lora", "rank": 4, "targets": ["gate_proj", "up_proj"]}
    folded = experts_ * (2 * 4) * h * 2 * m  # all experts, chosen or not
    assert forward("olmoe", lora) - forward("olmoe", {**lora, "targets": ["q_proj"]}) == layers * 2 * (
        folded - tokens * 4 * (h + h)
    )


@pytest.mark.parametrize("model_type", sampled(EVERY, 8))
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_mixtures_flops_can_be_counted(model_type: str, method: str) -> None:
    targets = {"targets": [{"dbrx": "out_proj", "deepseek_v4": "o_b_proj"}.get(model_type, "o_proj")]}
    found = work(run(model_type, method=method if method == "full" else {"kind": "lora", **targets}))
    assert found.operations > found.forward > 0


def test_cards_without_grouped_mm_have_a_note_if_experts_are_frozen() -> None:
    def said(gpu: str, method: str) -> bool:
        answer = estimate(run("mixtral", method=method, gpu=gpu, precision="fp16"))
        return any("in a fallback loop" in note for note in answer.notes)

    assert said("t4", "lora")
    assert not said("a100-80gb", "lora")
    assert not said("t4", "full")


FMS = "https://github.com/foundation-model-stack/fms-acceleration/tree/876e2ed/scripts/benchmarks/refs/a100_80gb.csv"
ATTENTION = {"rank": 16, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"], "dropout": 0.1}
NF4, GPTQ = {"kind": "qlora", **ATTENTION}, {"format": "gptq-int4", "block_size": 4096, "kbit_preparation": False}
FUSED = {"fused": ["rope", "rms_norm", "cross_entropy", "lora"]}
# Mixtral 8x7B with adapters on attention, by transformers 4.48.1 on an A100 (FMS): torch's max_memory_allocated, the
# bytes after a step, and the allowed error. The GPTQ checkpoint has one scale per column; 4,096 is the largest group
# that can be given. An expert's number of rows depends on the data: if one expert's backward is the peak, as with trl's
# preparation, the answer for evenly spread rows is a hundredth too low.
MIXTRAL: dict[str, tuple[bool, int, dict[str, Any], dict[str, Any], int, int, float]] = {
    "nf4": (False, 8, {"kbit_preparation": False}, {}, 48_770_183_680, 24_664_894_464, 1e-4),
    "nf4, fused": (False, 8, {"kbit_preparation": False}, FUSED, 44_280_442_880, 24_664_894_464, 1e-4),
    "nf4, prepared": (False, 8, {"kbit_preparation": "trl"}, {}, 60_545_920_512, 24_665_426_944, 0.011),
    "nf4, prepared, 4": (False, 4, {"kbit_preparation": "trl"}, {}, 42_794_268_160, 24_665_033_728, 0.011),
    "gptq": (True, 4, GPTQ, {}, 36_041_912_832, 23_974_571_008, 2e-4),
    "gptq, fused": (True, 4, GPTQ, FUSED, 33_783_410_688, 23_974_571_008, 2e-4),
    "gptq, fused, 8": (True, 8, GPTQ, FUSED, 43_590_512_640, 23_974_964_224, 2e-4),
}


@pytest.mark.parametrize("name", MIXTRAL)
def test_mixtral_is_estimated_as_measured_on_a_card(name: str) -> None:
    gptq, micro, quantization, kernels, peak, after, within = MIXTRAL[name]
    half = "fp16" if gptq else "bf16"
    spec = RunSpec(
        model="mixtral-8x7b",
        method={**NF4, "quantization": quantization},
        precision={"weights": half, "compute": half, "autocast": True},
        optimizer="adamw_torch",
        batch={"micro": micro, "sequence": 4096},
        kernels={"attention": "flash_attention_2", **kernels},
        loop={"trainer": True, "grad_scaler": gptq},
        profile="transformers-4.48",
        gpu="a100-80gb",
    )
    answer = estimate(spec)
    assert answer.bytes.allocated == pytest.approx(peak, rel=within)
    made = program(decide(spec).structure)
    assert made.parameters + made.states == pytest.approx(after, abs=SLACK)


@pytest.mark.parametrize(("method", "micro"), [("full", 4), ({"kind": "lora", **ATTENTION}, 4)])
def test_out_of_memory_runs_of_mixtral_do_not_fit(method: Any, micro: int) -> None:
    batch, kernels = {"micro": micro, "sequence": 4096}, {"attention": "flash_attention_2"}
    spec = RunSpec(
        model="mixtral-8x7b",
        method=method,
        optimizer="adamw_torch",
        batch=batch,
        kernels=kernels,
        profile="transformers-4.48",
        gpu="a100-80gb",
    )
    assert not estimate(spec).fits


@pytest.mark.torch
@pytest.mark.parametrize("transposed", [True, False])
def test_traced_grouped_products_have_gradients_with_the_strides_of_torchs(transposed: bool) -> None:
    torch = pytest.importorskip("torch")
    product = pytest.importorskip("memplan.probe.fake.experts").grouped_mm(None)
    strides: list[list[tuple[int, ...]]] = []
    for grouped in (torch.nn.functional.grouped_mm, product):
        rows = torch.ones(6, 8, requires_grad=True)
        weight = torch.ones(2, *((16, 8) if transposed else (8, 16)), requires_grad=True)
        seen: list[tuple[int, ...]] = []
        matrices = weight.transpose(-2, -1) if transposed else weight * 1
        matrices.register_hook(lambda gradient, seen=seen: seen.append(gradient.stride()))
        out = grouped(rows, matrices, offs=torch.tensor([2, 6], dtype=torch.int32))
        out.backward(torch.ones_like(out))
        strides.append([out.stride(), rows.grad.stride(), *seen])
    assert strides[0] == strides[1]
