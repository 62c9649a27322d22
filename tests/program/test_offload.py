"""Offloading of checkpointed inputs, of the optimizer and of saved tensors: host memory, and what stays on the GPU."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.accuracy import without_workspaces
from benchmarks.golden import rows, trace_figures
from memplan import Estimate, RunSpec, estimate
from memplan.catalogue.optimizers.optimizers import ON_HOST
from memplan.core.errors import MemplanError, SpecError
from memplan.core.units import rounded
from memplan.models.cards import load_card
from memplan.report.assumptions import assumptions
from memplan.resolve.request import spec_of
from tests.cases import each
from tests.estimate.test_laws import SHAPE, answer, laws, runs

HIDDEN, LAYERS = 896, 24  # qwen2-0.5b
PARAMETERS = 494_032_768


def asked(checkpointing: str, **fields: Any) -> Estimate:
    kernels = {"checkpointing": checkpointing, **fields.pop("kernels", {})}
    return estimate(RunSpec(**{"model": "qwen2-0.5b", **fields, "kernels": kernels}))


def moved(**fields: Any) -> Estimate:
    """Return a run with its optimizer on the host."""
    return estimate(RunSpec(**{"model": "qwen2-0.5b", "parallelism": {"offload": {"optimizer": True}}, **fields}))


# the inputs of blocks


@each(rows("traced_offloaded.jsonl"), lambda row: row["name"])
def test_a_function_that_keeps_inputs_on_the_host_has_the_estimated_peaks(row: dict[str, Any]) -> None:
    traced = {(int(step), part): peak for step, peaks in row["steps"].items() for part, peak in peaks.items()}
    assert without_workspaces(trace_figures(row["run"])) == traced


@laws
@given(runs(), st.booleans())
def test_offloaded_inputs_cost_at_most_one_copy_and_change_nothing_else(run: dict[str, Any], reentrant: bool) -> None:
    """The copy coexists with its original if the script or the graph keeps the original anyway."""

    def with_(checkpointing: str) -> Estimate:
        return answer(run, kernels={**run["kernels"], "checkpointing": checkpointing, "reentrant": reentrant})

    here, away = with_("full"), with_("offload")
    hidden = away.host_bytes - here.host_bytes
    assert hidden > 0
    for full, offloaded in zip(here.phases, away.phases, strict=True):
        assert offloaded.peak <= full.peak + rounded(hidden)
        assert full.phase != "step" or offloaded.peak == full.peak
        assert full.phase not in ("forward", "loss") or offloaded.peak <= full.peak


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_host_holds_one_input_a_layer(precision: str, reentrant: bool) -> None:
    away = asked("offload", precision=precision, batch={"micro": 3, "sequence": 100}, kernels={"reentrant": reentrant})
    itemsize = {"bf16": 2, "fp32": 4}[precision]
    assert away.host_bytes == LAYERS * 3 * 100 * HIDDEN * itemsize
    assert asked("full", precision=precision).host_bytes == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_long_sequence_saves_all_layer_inputs_except_the_current_one(reentrant: bool) -> None:
    fields: dict[str, Any] = {"method": {"kind": "lora", "rank": 8}, "batch": {"sequence": 16384}}
    kernels = {"loss": "fused", "reentrant": reentrant}
    here, away = (asked(word, **fields, kernels=kernels) for word in ("full", "offload"))
    one = 16384 * HIDDEN * 2
    assert here.peak.phase == away.peak.phase == "backward"
    saved = here.bytes.allocated - away.bytes.allocated
    # the peak moves to the first layer, where all other layers' gradients exist and the embeddings' output is held
    assert saved == (LAYERS - 2) * one - (away.categories["gradient"] - here.categories["gradient"])
    assert away.host_bytes == LAYERS * one


def test_more_layers_keep_more_on_the_host_but_not_the_gpu() -> None:
    def deep(layers: int) -> Estimate:
        config = {**SHAPE, "num_hidden_layers": layers}
        return asked("offload", model={"config": config}, method={"kind": "lora", "rank": 1}, optimizer="none")

    def moving(a: Estimate) -> int:
        return next(p.peak for p in a.phases if p.phase == "forward") - a.phases[0].peak

    few, many = deep(4), deep(40)
    assert moving(few) == moving(many)
    assert many.host_bytes == 10 * few.host_bytes
    assert 10 * few.host_bytes == 40 * 2048 * SHAPE["hidden_size"] * 2


def test_frozen_layers_before_all_that_trains_keep_nothing_anywhere() -> None:
    trained = asked("offload", method={"kind": "freeze", "trainable_layers": 2}, profile="transformers-4.51")
    assert trained.host_bytes == 2 * 2048 * HIDDEN * 2


def test_a_family_that_was_never_checkpointed_offloads_nothing() -> None:
    answer = asked("offload", model="starcoder2-3b", profile="transformers-4.48")
    assert answer.host_bytes == 0
    assert any("ignores gradient checkpointing" in note for note in answer.notes)


# the optimizer


@pytest.mark.parametrize(
    ("optimizer", "states"), [("adamw_torch", 2), ("sgd", 0), ({"name": "sgd", "momentum": 0.9}, 1), ("rmsprop", 1)]
)
@pytest.mark.parametrize(("precision", "itemsize"), [("bf16", 2), ("fp32", 4)])
def test_the_host_has_the_states_and_a_copy_of_parameters_and_gradients(
    optimizer: Any, states: int, precision: str, itemsize: int
) -> None:
    assert moved(optimizer=optimizer, precision=precision).host_bytes == (states + 2) * itemsize * PARAMETERS


def test_host_masters_replace_the_copy_and_have_gradients_of_their_dtype() -> None:
    away = moved(optimizer="adamw_torch", precision="mixed")
    assert away.host_bytes == (4 + 4 + 2 * 4) * PARAMETERS
    assert away.categories["optstate"] == 0
    assert away.bytes.allocated == moved(optimizer="adamw_torch").bytes.allocated


@pytest.mark.parametrize("name", ON_HOST)
def test_nothing_of_the_optimizer_and_its_step_is_on_the_gpu(name: str) -> None:
    away, here = moved(optimizer=name), estimate(RunSpec(model="qwen2-0.5b", optimizer=name))
    nothing = estimate(RunSpec(model="qwen2-0.5b", optimizer="none"))
    assert away.phases == nothing.phases
    assert away.bytes.as_dict() == nothing.bytes.as_dict()
    assert away.categories["optstate"] == 0
    assert away.bytes.allocated <= here.bytes.allocated
    assert here.host_bytes == 0


@laws
@given(runs(kinds=("full", "lora")), st.sampled_from(ON_HOST))
def test_the_host_relieves_the_gpu_whatever_the_run(run: dict[str, Any], name: str) -> None:
    run = {**run, "optimizer": name}
    away, here = answer(run, parallelism={"offload": {"optimizer": True}}), answer(run)
    assert sum(line.bytes for line in away.ledger) == away.bytes.allocated <= here.bytes.allocated
    assert away.bytes.allocated <= away.bytes.reserved
    assert away.host_bytes > here.host_bytes


def test_updates_in_backward_copy_each_gradient_to_the_host() -> None:
    stays = moved(optimizer="adamw_torch")
    goes = moved(optimizer={"name": "adamw_torch", "in_backward": True})
    assert goes.host_bytes == stays.host_bytes
    step = {name: next(p.peak for p in a.phases if p.phase == "step") for name, a in (("g", goes), ("s", stays))}
    assert 2 * PARAMETERS <= step["s"] - step["g"] < 2.01 * PARAMETERS
    assert not any(line.what.startswith("update of") for line in goes.ledger)


def test_both_add_up_on_the_host() -> None:
    both = moved(optimizer="adamw_torch", kernels={"checkpointing": "offload"}).host_bytes
    assert both == moved(optimizer="adamw_torch").host_bytes + asked("offload").host_bytes


# tensors saved by autograd


def saved(**fields: Any) -> Estimate:
    """Return a run with saved tensors on the host, by default without checkpointing."""
    parallelism = {**fields.pop("parallelism", {}), "offload": {"activations": True}}
    kernels = {"checkpointing": "none", **fields.pop("kernels", {})}
    return estimate(RunSpec(**{"model": "qwen2-0.5b", **fields, "kernels": kernels, "parallelism": parallelism}))


@laws
@given(runs(kinds=("full", "freeze", "lora", "dora")), st.sampled_from(["none", "full", "offload"]))
def test_activations_on_the_host_add_at_most_one_operations_copies(run: dict[str, Any], checkpointing: str) -> None:
    """Copies replace the saved tensors; copies of weights coexist with the weights, and those of logits and labels with
    what the script holds. None exist in the optimizer's step."""
    kernels = {**run["kernels"], "checkpointing": checkpointing, "loss": "hf"}
    here = answer(run, kernels=kernels)
    away = answer(run, kernels=kernels, parallelism={"offload": {"activations": True}})
    assert away.host_bytes > here.host_bytes
    assert away.bytes.allocated <= away.bytes.reserved
    model = load_card(run["model"])
    axes = model.axes()
    tokens = run["batch"]["micro"] * run["batch"]["sequence"]
    copies = 4 * (axes["v"] * axes["h"] + tokens * (axes["v"] + axes["h"]))  # the head's weight, logits and input
    for before, after in zip(here.phases, away.phases, strict=True):
        assert after.phase != "step" or after.peak == before.peak
        assert after.phase not in ("forward", "loss") or after.peak <= before.peak
        assert after.peak <= before.peak + copies


@laws
@given(runs(kinds=("full", "lora")), st.integers(1, 3))
def test_tensors_saved_on_the_host_grow_with_batch_and_depth(run: dict[str, Any], more: int) -> None:
    kernels = {**run["kernels"], "checkpointing": "none", "loss": "hf"}
    parallelism = {"offload": {"activations": True}}
    one = answer(run, kernels=kernels, parallelism=parallelism)
    batch = {**run["batch"], "micro": run["batch"]["micro"] + more}
    assert answer(run, kernels=kernels, parallelism=parallelism, batch=batch).host_bytes > one.host_bytes


def test_more_layers_leave_nothing_of_a_pass_on_the_gpu() -> None:
    def deep(layers: int) -> Estimate:
        config = {**SHAPE, "num_hidden_layers": layers}
        return saved(model={"config": config}, method={"kind": "lora", "rank": 1}, optimizer="none")

    def moving(a: Estimate, phase: str) -> int:
        return next(p.peak for p in a.phases if p.phase == phase) - a.phases[0].peak

    few, many, more = deep(4), deep(40), deep(76)
    assert moving(few, "forward") == moving(many, "forward")
    assert many.host_bytes - few.host_bytes == more.host_bytes - many.host_bytes > 0


def test_the_host_holds_each_saved_tensor_of_a_llama() -> None:
    """Two kernels that save the same tensor have a copy each, and weights count too."""
    b, s, h, a, k, d, f, v, layers = 3, 128, 64, 4, 2, 16, 176, 1000, 5
    config = {"model_type": "llama", "vocab_size": v, "num_hidden_layers": layers, "tie_word_embeddings": False}
    config |= {"hidden_size": h, "num_attention_heads": a, "num_key_value_heads": k, "head_dim": d}
    config |= {"intermediate_size": f}
    found = saved(model={"config": config}, batch={"micro": b, "sequence": s}, precision="bf16")
    tokens, half = b * s, 2
    wide, row = 4 * tokens * h, 4 * tokens
    norm = wide + row + (wide + row) + half * (tokens * h + h)  # pow, rsqrt, their product, and the weight's
    projections = 3 * half * tokens * h + half * h * (a + 2 * k) * d
    rotary = 4 * half * s * d  # cos and sin, of q and of k
    flash = half * tokens * (2 * a + 2 * k) * d + 4 * tokens * a + 3 * 8  # q, k, v, the output, row sums, random state
    out = half * (tokens * a * d + h * a * d)
    mlp = half * (2 * tokens * h + 2 * f * h) + half * 3 * tokens * f + half * (tokens * f + f * h)
    layer = 2 * norm + projections + rotary + flash + out + mlp
    head = norm + half * (tokens * h + h * v)
    loss = 4 * tokens * v + 4 * tokens * v + 8 * tokens + 4  # log_softmax; nll_loss: the same again, labels, a sum
    assert found.host_bytes == 8 * tokens + layers * layer + head + loss


def test_checkpointed_layers_save_only_their_inputs() -> None:
    batch = {"micro": 2, "sequence": 100}
    plain, checkpointed = (saved(batch=batch, kernels={"checkpointing": word}) for word in ("none", "full"))
    inputs = asked("offload", batch=batch).host_bytes
    outside = checkpointed.host_bytes - inputs
    assert 0 < outside < plain.host_bytes - inputs
    assert saved(batch=batch, kernels={"checkpointing": "offload"}).host_bytes == checkpointed.host_bytes
    deeper = [
        saved(batch=batch, model={"config": {**SHAPE, "num_hidden_layers": n}}, kernels={"checkpointing": "full"})
        for n in (4, 5)
    ]
    assert deeper[1].host_bytes - deeper[0].host_bytes == 2 * 100 * SHAPE["hidden_size"] * 2


def test_a_view_that_repeats_a_mask_is_saved_whole() -> None:
    """Memory-efficient attention has one mask for all heads."""
    fields: dict[str, Any] = {"batch": {"micro": 2, "sequence": 256}, "kernels": {"attention": "sdpa_efficient"}}
    with_mask, without = saved(**fields, loop={"padded": True}), saved(**fields)
    repeated = LAYERS * 14 * 2 * 256 * 256 * 2  # heads, sequences, rows, columns, bytes
    assert with_mask.host_bytes - without.host_bytes == repeated


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"profile": "trl-0.24"}, "parallelism.offload", "profile trl-0.24"),
        ({"profile": "torchtune"}, "parallelism.offload", "profile torchtune"),
        ({"parallelism": {"world": 2, "tp": 2}}, "parallelism.tp", "1 with activations offloaded"),
        ({"parallelism": {"world": 2, "dp": 2, "strategy": "zero2"}}, "parallelism.strategy", "ddp, fsdp2"),
        ({"kernels": {"fused": ["rope"]}}, "kernels.fused", "none with activations offloaded"),
        ({"kernels": {"loss": "chunked_lm_head"}}, "kernels.loss", "hf, chunked, fused"),
        ({"method": {"kind": "qlora", "quantization": {"format": "int8"}}}, "method.quantization.format", "nf4, fp4"),
        ({"model": "mamba-130m"}, "parallelism.offload", "mamba"),
    ],
)
def test_options_unsupported_with_activation_offload_are_refused(fields: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(SpecError, match=said) as caught:
        saved(**fields)
    assert caught.value.field == field


# messages

ABOUT = "states and step in host memory"


def test_the_assumptions_list_what_is_on_the_host() -> None:
    told = dict(assumptions(moved(kernels={"checkpointing": "offload", "reentrant": True})))
    assert told["checkpointing"] == "offload, reentrant"
    assert dict(assumptions(saved()))["checkpointing"] == "none; tensors saved for backward are in host memory"
    assert ABOUT in told["optimizer"]
    assert f"masters, {ABOUT}" in dict(assumptions(moved(precision="mixed")))["optimizer"]
    assert ABOUT not in dict(assumptions(asked("full")))["optimizer"]


def test_the_answers_own_run_has_the_same_answer() -> None:
    for a in (asked("offload"), moved(optimizer="adamw_torch"), saved()):
        again = estimate(RunSpec.model_validate_json(a.run.model_dump_json()))
        assert (again.phases, again.host_bytes) == (a.phases, a.host_bytes)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_32bit", "adafactor", "galore_adamw", "lomo", "none"])
def test_an_optimizer_that_does_not_step_on_the_host_is_refused(name: str) -> None:
    with pytest.raises(
        MemplanError, match=rf"{name} \(optimizer.name\) cannot step on the host; use adamw_torch or "
    ) as caught:
        moved(optimizer=name)
    assert caught.value.field == "parallelism.offload"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"checkpointing": "offload"}, "offload"),
        ({"checkpointing": "offload", "gradient_checkpointing": True}, "offload"),
        ({"checkpointing": "none", "gradient_checkpointing": False}, "none"),
        ({"gradient_checkpointing": False}, "none"),
        ({"gradient_checkpointing": True}, "full"),
    ],
)
def test_the_flag_and_the_option_may_agree(options: dict[str, Any], word: str) -> None:
    assert spec_of({"model": "qwen2-7b", **options})["kernels"] == {"checkpointing": word}


def test_an_option_overrides_the_file() -> None:
    spec = {"model": "qwen2-7b", "kernels": {"checkpointing": "none", "loss": "fused"}}
    assert spec_of({"checkpointing": "offload"}, spec)["kernels"] == {"checkpointing": "offload", "loss": "fused"}
