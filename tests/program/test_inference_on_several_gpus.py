"""Inference on several GPUs: tensor-parallel ranks and device_maps, against traces, transformers' placement, arithmetic
and laws."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.accuracy import passes_without_workspace
from benchmarks.golden import rows, trace_figures
from memplan import Estimate, RunSpec, estimate
from memplan.catalogue.parallelism.device_map_packing import HOST, gpu_shares, place_modules
from memplan.catalogue.parallelism.device_maps import ModulePlacement, place_operations
from memplan.core.errors import SpecError
from memplan.core.units import ITEMSIZE
from memplan.estimate.answer import phase_peaks
from memplan.estimate.estimate import needs_more_than_its_gpus
from memplan.models.cards import find_model
from memplan.planning.inference import questions
from memplan.program.graph import operations_of
from memplan.program.run import ResolvedRun
from memplan.resolve.decide import decide
from tests import cases
from tests.cases import in_groups
from tests.sampling import ALL, examples, sampled
from tests.tiny import TINY

DIVIDED: list[dict[str, Any]] = sampled(rows("traced_running_tp.jsonl"))
MAPPED: list[dict[str, Any]] = sampled(rows("traced_running_map.jsonl"))

laws = settings(max_examples=examples(10), deadline=None, suppress_health_check=[HealthCheck.too_slow])


def label(case: dict[str, Any]) -> str:
    run = case["run"]
    gpu = run["parallelism"].get("stage", "")
    return f"{case['name']}-{run['task']}-{run.get('kernels', {}).get('attention', '')}-{gpu}"


@in_groups([*DIVIDED, *MAPPED], label)
def test_every_pass_is_near_its_trace(case: dict[str, Any]) -> None:
    answer = trace_figures(case["run"])
    assert answer.parameters.total == case["parameters"] or "tp" in case["run"]["parallelism"]
    mine = passes_without_workspace(answer)
    for phase, bytes_ in case["phases"].items():
        if phase != "load":
            assert mine[phase] == pytest.approx(bytes_, rel=case.get("within", 1e-4)), phase


@ALL
@pytest.mark.parametrize(("cases", "mean", "worst"), [(DIVIDED, 2e-4, 0.01), (MAPPED, 1e-3, 0.01)])
def test_the_mean_error_of_all_passes_is_small(cases: list[dict[str, Any]], mean: float, worst: float) -> None:
    errors: list[float] = []
    for case in cases:
        mine = passes_without_workspace(trace_figures(case["run"]))
        errors += [abs(mine[phase] / n - 1) for phase, n in case["phases"].items() if phase != "load"]
    assert sum(errors) / len(errors) < mean
    assert max(errors) < worst


# --- tensor-parallel ranks


def running(model: Any = "llama-3.1-8b", **fields: Any) -> Estimate:
    batch = {"micro": 2, "sequence": 1000, "new_tokens": 25}
    return estimate(RunSpec(**{"model": model, "task": "generate", "batch": batch, **fields}))


def test_a_rank_has_its_heads_of_the_cache_and_norms_whole() -> None:
    answer = running(parallelism={"world": 4, "tp": 4})
    bytes_ = {line.what: line.bytes for line in answer.ledger}
    assert bytes_["self_attn.q_proj.weight"] == 32 * 4096 * 4096 // 4 * 2
    assert bytes_["input_layernorm.weight"] == 32 * 4096 * 2
    cached = sum(line.bytes for line in answer.ledger if line.what == "key cache")
    assert cached == pytest.approx(32 * 2 * 1000 * (8 // 4) * 128 * 2, rel=0.05)
    assert answer.beside[1:]  # NCCL's


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"parallelism": {"world": 2, "dp": 2, "strategy": "ddp"}}, "parallelism.dp"),
        ({"parallelism": {"world": 16, "tp": 16}}, "parallelism.tp"),
        ({"parallelism": {"world": 4, "tp": 2, "pp": 2}}, "parallelism.pp"),
        ({"parallelism": {"world": 2, "tp": 2, "ep": 2}}, "parallelism.ep"),
        ({"parallelism": {"world": 2, "pp": 2, "schedule": "gpipe"}}, "parallelism.schedule"),
        ({"parallelism": {"world": 2, "device_map": "auto", "stage": 2}}, "parallelism.stage"),
        ({"parallelism": {"world": 2, "tp": 2}, "method": {"quantization": {}}}, "method.quantization.format"),
        ({"parallelism": {"world": 2, "tp": 2}, "profile": "transformers-4.51"}, "parallelism.tp"),
        ({"parallelism": {"world": 2, "device_map": "auto"}, "task": "train", "batch": {}}, "parallelism.device_map"),
        ({"parallelism": {"world": 2, "device_map": "auto"}, "model": "gemma-4-e2b"}, "parallelism.device_map"),
        ({"parallelism": {"world": 3, "device_map": "auto"}, "profile": "litgpt-2024"}, "parallelism.device_map"),
        ({"parallelism": {"world": 20, "device_map": "sequential"}, "profile": "litgpt-2024"}, "parallelism.world"),
    ],
    ids=str,
)
def test_options_unsupported_on_several_gpus_are_refused_by_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(SpecError) as caught:
        running(**fields)
    assert caught.value.field == field
    assert "\n" not in str(caught.value)


def test_litgpt_shards_only_the_weights_in_its_blocks() -> None:
    """Full embeddings and head, and an eighth of 80 layers, as generate_tp.py took on 8 A100."""
    answer = running("llama-2-70b", profile="litgpt-2024", parallelism={"world": 8, "tp": 8})
    bytes_ = {line.what: line.bytes for line in answer.ledger}
    assert bytes_["transformer.wte.weight"] == bytes_["lm_head.weight"] == 32000 * 8192 * 2
    assert bytes_["attn.proj.weight"] == 80 * 8192 * 8192 // 8 * 2


# --- device_maps


def mapped(model: Any = "llama-3.1-8b", world: int = 2, device_map: str = "auto", **fields: Any) -> Estimate:
    return running(model, parallelism={"world": world, "device_map": device_map}, **fields)


@pytest.mark.parametrize("model", ["llama-3.1-8b", "llama-3.2-1b", "gpt2", "gemma-2-2b"])
def test_every_weight_is_on_one_gpu(model: str) -> None:
    answer = mapped(model, 2)
    assert sum(rank.parameters for rank in answer.ranks) == answer.parameters.total
    assert sum(rank.layers for rank in answer.ranks) == find_model(model).num_hidden_layers


def test_caches_follow_their_layers_and_a_tied_head_its_embeddings() -> None:
    heads, width = 8, 64
    for stage in (0, 1):
        answer = running("llama-3.2-1b", parallelism={"world": 2, "device_map": "auto", "stage": stage})
        layers = sum(line.count for line in answer.ledger if line.what == "mlp.down_proj.weight")
        cached = sum(line.bytes for line in answer.ledger if line.what in ("key cache", "value cache"))
        assert cached == 2 * layers * 2 * 1000 * heads * width * ITEMSIZE["bf16"]
        there = {line.what for line in answer.ledger}
        assert ("model.embed_tokens.weight" in there) == (stage == 0)


def test_modules_that_do_not_fit_stay_on_the_host_until_called() -> None:
    """Qwen2.5 14B has 29.5 GB of weights; nine tenths of a 3090's free memory hold 20.8."""
    answer = mapped("qwen2.5-14b", 1, gpu="3090")
    there = answer.categories["parameter"]
    assert there + answer.host_bytes == 2 * answer.parameters.total
    assert there < 0.9 * 23.7 * 2**30
    copied = [line for line in answer.ledger if line.what.startswith("copy of")]
    assert [line.what for line in copied] in ([], ["copy of mlp.down_proj.weight"], ["copy of lm_head.weight"])
    whole = running("qwen2.5-14b")
    assert answer.bytes.allocated < whole.bytes.allocated - answer.host_bytes + 2 * 152064 * 5120 * 2


def test_bitsandbytes_runs_no_layer_on_the_host() -> None:
    answer = mapped("qwen2.5-72b", 1, gpu="3090", method={"quantization": {}})
    assert answer.host_bytes == 0
    assert answer.verdict.answer == "does not fit"
    assert any("refuses to load" in note for note in answer.notes)


def test_packed_weights_on_the_host_are_buffers_and_stay() -> None:
    gptq = {"quantization": {"format": "gptq-int4"}}
    one, whole = (
        running("qwen2.5-72b", parallelism=p, gpu="3090", method=gptq, precision="fp16")
        for p in ({"world": 1, "device_map": "auto"}, {})
    )
    assert one.categories["parameter"] > 0.9 * whole.categories["parameter"]


def test_the_answer_is_of_the_gpu_whose_verdict_is_worst() -> None:
    answer = mapped("qwen2.5-32b", 2, gpu="3090", batch={"sequence": 2048, "new_tokens": 256})
    assert [rank.verdict.answer for rank in answer.ranks].count("does not fit") >= 1
    assert answer.verdict.answer == "does not fit"


def test_sequential_fills_gpus_in_order_and_low_zero_spares_the_first() -> None:
    modules, layers = [10, *[10] * 10, 10], slice(1, 11)
    assert gpu_shares(modules, layers, 10, 3, "sequential", 90, False) == [90, 90, 90]
    assert (
        place_modules(modules, [90, 90, 90], True) == [0] * 8 + [1] * 4
    )  # and there is room for one more on the first
    assert gpu_shares(modules, layers, 10, 3, "balanced", 90, False) == [52, 52, 90]  # 120 / 3 and 1.25 times 10
    assert gpu_shares(modules, layers, 10, 3, "balanced_low_0", 90, False) == [0, 72, 90]
    assert gpu_shares(modules, layers, 10, 2, "balanced_low_0", 90, False) == [120 - 90, 90]
    assert gpu_shares(modules, layers, 10, 3, "balanced", 90, True) == [
        46,
        46,
        81,
    ]  # with bitsandbytes nine tenths of it
    assert gpu_shares(modules, layers, 10, 1, "balanced", 90, False) == [81]
    assert place_modules(modules, [81], True) == [0] * 7 + [HOST] * 5
    assert place_modules(modules, [81], False) == [0] * 12


def auto(model: Any, world: int, **fields: Any) -> ResolvedRun:
    return decide(
        RunSpec(model=model, task="generate", parallelism={"world": world, "device_map": "auto"}, **fields),
    )


def test_matrices_in_four_bits_are_dealt_by_half_a_byte_a_number() -> None:
    layer = (4 * 4096 * 4096 + 3 * 4096 * 11008) // 2 + 2 * 4096 * 2
    table = 32000 * 4096 * 2  # embeddings, and the head, which is not quantised
    share = ((2 * table + 32 * layer + 4096 * 2) // 4 + table * 5 // 4) * 9 // 10
    first, each = (share - table - table) // layer, share // layer  # the first reserves room for the head
    placed_ = auto("llama-2-7b", 4, method={"quantization": {"double_quant": False}}).structure.graph.placed
    assert placed_ is not None
    assert (
        [placed_.layers.count(gpu) for gpu in range(4)] == [first, each, each, 32 - first - 2 * each] == [6, 11, 11, 4]
    )


def test_gpus_that_stay_empty_are_named() -> None:
    few, many = (" ".join(auto("llama-3.1-8b", world).notes) for world in (2, 8))
    assert "stay empty" not in few
    assert "modules are placed on 6 GPUs; 2 stay empty" in many


def test_a_host_layer_keeps_buffers_on_the_gpu_and_the_same_columns() -> None:
    run = RunSpec(model={"config": {"model_type": "glm4_moe", **TINY["glm4_moe"]}}, task="forward")
    stack, axes = operations_of(decide(run).structure.graph)
    own = {w.name: w for run_ in stack.runs for block in run_.blocks for op in block.ops for w in op.weights}
    ends = (("model.norm", 0), ("lm_head", 0))
    there, _ = place_operations(stack, axes, ModulePlacement((("model.embed_tokens", 0),), 0, (HOST, HOST, HOST), ends))
    found = [w for run_ in there.runs for block in run_.blocks for op in block.ops for w in op.weights]
    assert {(w.group == "buffer", w.shape.split()[0]) for w in found} == {(True, "@0"), (False, "@host")}
    assert all(w.shape.split()[w.rows :] == own[w.name].shape.split()[own[w.name].rows :] for w in found if w.rows)


def test_a_mask_that_is_one_for_all_sequences_is_copied_for_each() -> None:
    run = RunSpec(model={"config": {"model_type": "falcon", **TINY["falcon"]}}, task="forward")
    stack, axes = operations_of(decide(run).structure.graph)
    layers = (*(0,) * (TINY["falcon"]["num_hidden_layers"] - 1), 1)
    ends = (("transformer.ln_f", 1), ("lm_head", 1))
    there, _ = place_operations(stack, axes, ModulePlacement((("transformer.word_embeddings", 0),), 0, layers, ends, 2))
    made = {t.name: t.shape for run_ in there.runs for block in run_.blocks for op in block.ops for t in op.writes}
    assert next(t.shape for op in there.before for t in op.writes if t.name == "mask") == "@0 s s"
    assert made["mask here"] == "@1 b s s"


@pytest.mark.torch
@pytest.mark.parametrize("gpus", [2, 3, 5])
@pytest.mark.parametrize(
    "name",
    [
        *("llama-3.1-8b", "llama-3.2-1b", "qwen2-7b", "qwen2.5-0.5b", "mistral-7b-v0.3", "gemma-2-9b", "gpt2"),
        *("phi-4", "olmo-2-1b", "pythia-6.9b", "mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v2-lite"),
    ],
)
def test_device_maps_equal_transformers(name: str, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    library = pytest.importorskip("transformers.integrations.accelerate")
    monkeypatch.setattr(library, "get_max_memory", dict)
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(find_model(name).config)))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    placed = decide(
        RunSpec(model=name, task="generate", parallelism={"world": gpus, "device_map": "auto"})
    ).structure.graph.placed
    assert placed is not None
    found = library._get_device_map(model, "auto", dict.fromkeys(range(gpus), 2**50), None)
    layers = [gpu for module, gpu in found.items() if module.rpartition(".")[2].isdigit()]
    numbers = {gpu: i for i, gpu in enumerate(sorted(set(found.values())))}
    assert tuple(numbers[gpu] for gpu in layers) == placed.layers
    assert (
        numbers[found[next(path for path in reversed(found) if "head" in path or "embed_out" in path)]]
        == (placed.after[-1][1])
    )


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "model": draw(st.sampled_from(["llama-3.2-1b", "qwen2-0.5b", "gemma-2-2b", "gpt2"])),
        "task": "generate",
        "batch": {
            "micro": draw(st.integers(1, 8)),
            "sequence": draw(st.integers(1, 500)),
            "new_tokens": draw(st.integers(2, 50)),
        },
        "kernels": {"attention": draw(st.sampled_from([None, "eager"]))},
        "loop": {"padded": draw(st.booleans())},
    }


@laws
@given(runs(), st.integers(2, 3))
def test_several_gpus_each_need_at_most_one_gpus_memory_together_no_less(fields: dict[str, Any], world: int) -> None:
    alone, several = (estimate(RunSpec(**fields, parallelism=p)) for p in ({}, {"world": world, "device_map": "auto"}))
    assert several.bytes.allocated <= alone.bytes.allocated + 2**20
    assert sum(rank.bytes.allocated for rank in several.ranks) >= alone.bytes.allocated
    assert sum(line.bytes for line in several.ledger) == several.bytes.allocated
    assert several.bytes.reserved >= several.bytes.allocated


@laws
@given(runs())
def test_one_gpu_with_room_is_a_device_map_of_one(fields: dict[str, Any]) -> None:
    alone, one = (estimate(RunSpec(**fields, parallelism=p)) for p in ({}, {"device_map": "auto"}))
    assert phase_peaks(alone) == phase_peaks(one)
    assert alone.bytes.as_dict() == one.bytes.as_dict()


@cases.each([(world, micro) for world in (1, 2, 3) for micro in (1, 40, 200)])
def test_gpus_hold_a_run_if_its_estimate_says_so(case: tuple[int, int]) -> None:
    world, micro = case
    batch = {"micro": micro, "sequence": 1000, "new_tokens": 20}
    parallelism = {"world": world, "device_map": "auto"}
    run = RunSpec(model="qwen2.5-7b", task="generate", gpu="3060-12gb", batch=batch, parallelism=parallelism)
    answer = estimate(run)
    holds = world > 1 and micro == 1
    assert holds == (answer.fits and not answer.host_bytes)
    assert needs_more_than_its_gpus(run) != holds


@ALL
def test_one_gpu_needs_no_placement_and_empty_gpus_are_left_out() -> None:
    batch = {"sequence": 4000, "new_tokens": 4}
    found = questions(RunSpec(model="qwen2-0.5b", task="generate", gpu="3090", batch=batch))
    assert found.placed[0].answer is found.answer
    assert found.placed[0].requests == found.requests.value
    assert [choice.name for choice in found.placed] == ["1", "2"]  # of three GPUs two get layers


@ALL
def test_the_questions_have_how_many_gpus_in_either_way() -> None:
    run = RunSpec(model="qwen2.5-14b", task="generate", gpu="3090", batch={"sequence": 4096, "new_tokens": 8})
    found = questions(run)
    assert [choice.fits for choice in found.degrees] == [False, True, True, True, False]
    assert "does not divide" in found.degrees[-1].refused
    assert [choice.name for choice in found.placed][:2] == ["1", "2"]
    assert found.fewest is not None
    assert found.fewest.name == "2"  # with one, some layers are on the host
    assert found.placed[0].answer is not None
    assert found.placed[0].answer.host_bytes
    assert found.placed[0].pace is None
