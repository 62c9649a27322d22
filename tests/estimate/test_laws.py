"""Laws that hold for every run: more never takes less, the ledger sums to the peak, everything allocated is freed."""

from __future__ import annotations

from operator import mul
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from benchmarks.sweep import FAMILIES, run_of
from memplan import Estimate, RunSpec, estimate
from memplan.catalogue import build
from memplan.catalogue.kernels.losses import loss_chunks
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.optimizers.states import optimizer_names, takes_foreach
from memplan.catalogue.profiles.profiles import PROFILES
from memplan.core.arithmetic import ONE_RUN
from memplan.core.errors import InternalError, MemplanError
from memplan.core.ir import operations
from memplan.engine.largest import PhaseTerms
from memplan.engine.walk import alive, bytes_at_each, largest, rows, size, values
from memplan.estimate.training import least_bytes
from memplan.models.configs.images import takes_images
from memplan.models.model import ModelSpec
from memplan.program.axes import run_axes
from memplan.program.graph import operations_of
from memplan.program.inference.steps import steps_of
from memplan.program.training.passes import PHASES, pass_of, pass_options, step_moments
from memplan.program.training.pipeline import every_stage
from memplan.program.training.program import program
from memplan.resolve.decide import decide
from tests.cases import each
from tests.encoders import SMALL as ENCODERS
from tests.sampling import COMPLETE, examples, sampled
from tests.tiny import TINY as DECODERS
from tests.tiny_vision import TINY as TOWERS

laws = settings(max_examples=examples(10), deadline=None, suppress_health_check=[HealthCheck.too_slow])

MODELS = ("llama-3.2-1b", "qwen2-0.5b", "qwen3-0.6b", "phi-4-mini", "granite-3.3-2b")
KINDS = ("full", "freeze", "lora", "qlora", "dora", "qdora")
KERNELS = st.fixed_dictionaries(
    {
        "attention": st.sampled_from(["sdpa", "eager", "sdpa_efficient", "sdpa_math"]),
        "checkpointing": st.sampled_from(["none", "full", "offload"]),
        "reentrant": st.booleans(),
        "loss": st.sampled_from(["hf", "chunked", "fused", "chunked_lm_head", "chunked_nll", "tiled_lm_head"]),
    }
)
PRECISION = st.sampled_from(["pure", "amp", "mixed", "fp16", "fp32"])
ATTENTION = ("sdpa", "eager", "flash_attention_2", "sdpa_math", "sdpa_efficient")


@st.composite
def runs(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS) -> dict[str, Any]:
    """Draw a run as the fields of a RunSpec."""
    kind = draw(st.sampled_from(kinds))
    method: dict[str, Any] = {"kind": kind}
    if kind not in ("full", "freeze"):
        method["rank"] = draw(st.integers(1, 64))
        method["dropout"] = draw(st.sampled_from([0.0, 0.1]))
    if kind.startswith("q"):
        method["quantization"] = {
            "format": draw(st.sampled_from(["nf4", "fp4", "int8"])),
            "double_quant": draw(st.booleans()),
            "kbit_preparation": draw(st.sampled_from([True, False, "trl", "axolotl", "axolotl-0.12"])),
        }
    precision = draw(PRECISION) if not kind.startswith("q") else draw(st.sampled_from(["pure", "fp16"]))
    kernels = draw(KERNELS)
    if (precision, kernels["loss"]) == ("amp", "chunked_lm_head"):  # refused
        kernels["loss"] = "chunked"
    return {
        "model": draw(st.sampled_from(MODELS)),
        "method": method,
        "precision": precision,
        "optimizer": draw(st.sampled_from(["adamw_torch_fused", "adamw_torch", "sgd", "adamw_bnb_8bit", "adafactor"])),
        "batch": {
            "micro": draw(st.integers(1, 4)),
            "sequence": draw(st.integers(1, 512)),
            "accumulation": draw(st.sampled_from([1, 3])),
        },
        "kernels": kernels,
        "loop": {"padded": draw(st.booleans()), "hold_outputs": draw(st.sampled_from([False, True, "step"]))},
    }


def answer(run: dict[str, Any], **changes: Any) -> Estimate:
    return estimate(RunSpec(**{**run, **changes}))


def allocated(run: dict[str, Any], **changes: Any) -> int:
    return answer(run, **changes).bytes.allocated


@each(sampled([*DECODERS, *TOWERS, *ENCODERS], 4))
def test_no_tensor_has_a_weights_name(name: str) -> None:
    """Gradients are named after their tensors, so equal names would be confused."""
    config = {"model_type": name, **{**DECODERS, **TOWERS, **ENCODERS}[name]}
    model = ModelSpec(config)
    for wiring in (Wiring("flash", "efficient"), Wiring("eager", "eager", padded=True, images=takes_images(model))):
        made = tuple(operations(build(model, wiring)))
        weights = {w.name for op in made for w in op.weights}
        assert weights.isdisjoint(t.name for op in made for t in op.writes)


# The options that decide which masks, positions and tables a stack makes, and which operations read them.
WIRINGS = (
    *(f"--attention {a} --padded --no-gradient-checkpointing" for a in ATTENTION),
    *(f"--attention {a} --method lora --reentrant --seq-len 96" for a in ATTENTION),
    *(f"--profile {p.name} --padded" for p in PROFILES),
    *(f"--profile {p.name} --attention eager --method lora --seq-len 96" for p in PROFILES),
    *(f"--profile {p.name} --method qlora --loss chunked --attention sdpa_efficient" for p in PROFILES),
    "--loss fused --fused rope,rms_norm,swiglu --padded",
    "--method qlora --fused lora,rope,swiglu --lora-dropout 0.1",
    "--method qdora --loss chunked --precision amp",
    "--gpus 2 --pp 2 --padded",
    "--gpus 2 --pp 2 --schedule gpipe --grad-accum 2 --method lora --attention eager",
    "--gpus 3 --pp 3 --profile megatron-core --grad-accum 3 --seq-len 96",
    "--gpus 3 --pp 3 --profile torchtitan --grad-accum 3 --attention sdpa_math --padded",
    "--gpus 2 --tp 2 --padded",
    "--gpus 2 --cp 2 --fsdp fsdp2",
    "--gpus 2 --ep 2 --fsdp fsdp2 --padded",
    "--images 1 --attention sdpa_efficient --padded",
    "--objective sequence_classification --attention eager --padded",
    "--method forward --attention sdpa_math --padded",
    *(f"--method generate --attention {a} --padded --seq-len 60 --new-tokens 9" for a in ATTENTION),
    *(
        f"--method generate --seq-len 60 --new-tokens 9 {how}"
        for how in (
            "--cache-implementation static --attention eager",
            "--cache-implementation quantized --padded",
            "--cache-implementation offloaded --prefill-chunk-size 16",
            "--prompt-lookup-num-tokens 3",
            "--prompt-lookup-num-tokens 3 --padded --attention eager",
            "--num-beams 2 --do-sample --batch-size 2",
            "--profile transformers-4.48 --padded",
            "--profile transformers-4.38",
            "--profile litgpt --padded",
            "--gpus 2 --device-map auto",
            "--images 1",
        )
    ),
)


@pytest.mark.parametrize("family", sampled(list(FAMILIES), 8))
def test_every_read_of_a_stack_has_a_writer(family: str) -> None:
    """Tests a share of the option sets for each family, so that every set is tested with some twenty families.

    Every pipeline stage and generation pass; what builds a stack raises an InternalError if a read has no writer.
    """
    place, share = list(FAMILIES).index(family), 8 if COMPLETE else 24
    for options in WIRINGS[place % share :: share]:
        try:
            structure = (decided := decide(run_of(f"{family} (small)", options))).structure
            steps = steps_of(decided) if structure.graph.inference else every_stage(structure)
            for step in steps:
                operations_of(step.graph)
        except InternalError:  # no refusal, but what is looked for
            raise
        except MemplanError:
            continue


@laws
@given(runs())
def test_the_ledger_sums_to_the_peak_and_the_categories_too(run: dict[str, Any]) -> None:
    a = answer(run)
    assert sum(line.bytes for line in a.ledger) == a.bytes.allocated
    assert all(line.count > 0 and line.bytes >= 0 for line in a.ledger)
    assert sum(a.categories.values()) == a.bytes.allocated
    assert a.bytes.allocated == max(p.peak for p in a.phases)
    assert a.bytes.allocated <= a.bytes.reserved <= a.bytes.used
    assert a.band.low <= a.bytes.used <= a.band.high


@laws
@given(runs())
def test_everything_allocated_in_a_step_is_freed_except_gradients(run: dict[str, Any]) -> None:
    structure = decide(RunSpec(**run)).structure
    low = pass_of(structure)
    for key, count in alive(low.left, low.runs, operations_of(structure.graph)[1]).items():
        kind, name = low.sizes[key][2], low.sizes[key][5]
        assert count == 0 or kind == "gradient" or name == "head_gradient", (name, count)


def small_buckets(stage: str) -> dict[str, Any]:
    """Return DeepSpeed's keys for buckets of 1,000 elements."""
    at_all = {"reduce_bucket_size": 1000, "overlap_comm": False}
    at_3 = {"stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}
    return at_all | (at_3 if stage == "zero3" else {"allgather_bucket_size": 1000})


@pytest.mark.parametrize("model", sampled(["bloom-560m", "opt-1.3b"]))
def test_a_higher_stage_takes_less_but_for_its_buckets(model: str) -> None:
    def peak(strategy: str, buckets: dict[str, Any]) -> int:
        zero = {"zero": buckets} if strategy.startswith("zero") else {}
        parallelism = {"world": 4, "dp": 4, "strategy": strategy, **zero}
        return allocated({"model": model, "parallelism": parallelism, "batch": {"sequence": 512}})

    stages = ("ddp", "zero1", "zero2", "zero3")
    small = [peak(stage, small_buckets(stage)) for stage in stages]
    assert small == sorted(small, reverse=True)
    usual = [peak(stage, {}) for stage in stages]
    assert usual != sorted(usual, reverse=True)  # see "A higher stage may take more" in docs/several-gpus.md


@laws
@given(runs(), st.integers(1, 3))
def test_a_larger_batch_never_takes_less(run: dict[str, Any], more: int) -> None:
    batch = run["batch"]
    assert allocated(run, batch={**batch, "micro": batch["micro"] + more}) >= allocated(run)


@laws
@given(runs(), st.integers(1, 700))
def test_a_longer_sequence_never_takes_less(run: dict[str, Any], more: int) -> None:
    batch = {**run["batch"], "sequence": min(run["batch"]["sequence"], 320)}
    longer = {**batch, "sequence": batch["sequence"] + more}
    # a chunk fewer is a cast of the head fewer, and one chunk adds the gradients of tied weights in a third tensor
    chunks = [dict(loss_chunks(given["micro"], given["sequence"])) for given in (batch, longer)]
    assume(chunks[0].get(run["kernels"]["loss"]) == chunks[1].get(run["kernels"]["loss"]))
    assert allocated(run, batch=longer) >= allocated(run, batch=batch)


@laws
@given(runs(kinds=("lora", "qlora", "dora", "qdora")), st.integers(1, 64))
def test_a_higher_rank_never_takes_less(run: dict[str, Any], more: int) -> None:
    method = run["method"]
    higher = allocated(run, method={**method, "rank": method["rank"] + more})
    assert higher >= allocated(run)


SHAPE = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 704,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
}


@laws
@given(runs(), st.integers(2, 40), st.integers(1, 200))
def test_a_deeper_model_never_takes_less(run: dict[str, Any], layers: int, more: int) -> None:
    def deep(n: int) -> dict[str, Any]:
        return {"config": {**SHAPE, "num_hidden_layers": n}}

    assert allocated(run, model=deep(layers + more)) >= allocated(run, model=deep(layers))


@laws
@given(runs())
def test_checkpointing_never_raises_kept_bytes(run: dict[str, Any]) -> None:
    """Apart from tables shared by all blocks, which a checkpoint holds; even less with offloaded inputs."""

    def kept(checkpointing: str) -> int:
        spec = RunSpec(**{**run, "kernels": {**run["kernels"], "checkpointing": checkpointing}})
        structure = decide(spec).structure
        low, axes = pass_of(structure), operations_of(structure.graph)[1]
        p = program(structure)
        numbers = run_axes(p, run["batch"]["micro"], run["batch"]["sequence"], True, True, ONE_RUN)
        total = 0
        for key, count in alive(low.kept, low.runs, axes).items():
            shape, dtype, _, _, _, name, _ = low.sizes[key]
            if name not in ("mask", "positions", "cos", "sin"):
                variable, n = size(shape, dtype, axes)
                total += count * n * values([variable], numbers)[0]
        return total

    assert kept("offload") <= kept("full") <= kept("none")


@laws
@given(runs(kinds=("lora", "dora")))
def test_adapters_train_less_than_everything(run: dict[str, Any]) -> None:
    a = answer(run)
    assert 0 < a.parameters.trainable < a.parameters.total


@laws
@given(st.sampled_from([n for n in optimizer_names() if "paged" in n or n == "grokadamw"]))
def test_paged_states_are_on_the_host_and_not_on_the_gpu(name: str) -> None:
    run = {"model": "qwen2-0.5b", "optimizer": name}
    a = answer(run)
    assert a.host_bytes > 0
    assert a.categories["optstate"] < a.host_bytes


@laws
@given(runs())
def test_the_same_run_gives_the_same_answer(run: dict[str, Any]) -> None:
    assert answer(run).model_dump() == answer(run).model_dump()


@laws
@given(runs())
def test_a_run_survives_json(run: dict[str, Any]) -> None:
    spec = RunSpec(**run)
    again = RunSpec.model_validate_json(spec.model_dump_json())
    assert again == spec
    assert hash(again) == hash(spec)
    filled = answer(run).run
    assert estimate(filled).phases == answer(run).phases


@laws
@given(runs(), st.sampled_from(["none", "ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp2"]), st.booleans())
def test_the_bound_without_a_pass_is_never_more_than_the_peak(run: dict[str, Any], strategy: str, layers: bool) -> None:
    """With gradients that are freed in backward or reduced in buckets, the weights alone."""
    world = 1 if strategy == "none" else 4
    run = {**run, "parallelism": {"world": world, "dp": world, "strategy": strategy}}
    if layers:
        run = {**run, "optimizer": {"name": "sgd", "in_backward": True}, "batch": {**run["batch"], "accumulation": 1}}
    try:
        peak = allocated(run)
    except MemplanError:
        return
    assert 0 < least_bytes(decide(RunSpec(**run))) <= peak


@laws
@given(runs(), st.integers(1, 4), st.integers(1, 3000))
def test_pruned_moments_never_miss_the_peak(run: dict[str, Any], micro: int, sequence: int) -> None:
    """Pruned moments are never the largest: the walk equals a walk over all moments, as the first one of a structure
    is."""
    if run["model"] in ("gpt2", "opt-125m"):
        sequence = min(sequence, 1000)
    spec = RunSpec(**{**run, "batch": {**run["batch"], "micro": micro, "sequence": sequence}})
    decided = decide(spec)
    p = program(decided.structure)
    axes = {
        **operations_of(decided.structure.graph)[1],
        **run_axes(p, micro, sequence, decided.half, decided.large_tiles, ONE_RUN),
    }
    low = pass_of(decided.structure)
    sizes = [size(k[0], k[1], operations_of(decided.structure.graph)[1]) for k in low.sizes]
    numbers = values(p.moments.variables, axes)
    live = [n * values([v], axes)[0] for v, n in sizes]
    options = tuple(pass_options(p.structure, later) for later in (False, True)[: 1 + p.structure.accumulates])
    counted = step_moments.__wrapped__(p.structure.graph, options, p.structure.holds_outputs).largest(numbers)
    terms = [of_pass[phase] for of_pass in (p.moments.terms.first, p.moments.terms.later) for phase in PHASES]
    if counted is not None:
        by_terms = PhaseTerms(terms[: len(counted.of_phases)]).largest(numbers)
        assert counted.of_phases == by_terms
        assert all(counted.where[0][i] == p.moments.terms.where[0][i] for _, i in by_terms[: len(PHASES)] if i >= 0)
    for phase in p.passing:
        every = bytes_at_each((m for m in low.moments if m.phase == phase), low.runs, axes, live)
        assert largest(p.moments.terms.first[phase], numbers)[0] == max(every)


@pytest.mark.parametrize("family", ["gemma2", "kimi_linear", "mamba2", "qwen3_next"])
def test_pruned_moments_of_layers_that_differ_never_miss_the_peak(family: str) -> None:
    """With attention windows and chunked scans, which have their own axes, on the main chain or next to it."""
    model = {"config": {"model_type": family, **DECODERS[family]}}
    run = RunSpec.model_validate({"model": model, "kernels": {"checkpointing": "none"}})
    structure = decide(run).structure
    p, low, own = program(structure), pass_of(structure), operations_of(structure.graph)[1]
    sizes = [size(key[0], key[1], own) for key in low.sizes]
    every = [*rows(low.moments, low.runs, own, sizes, p.moments.variables)]
    for micro, sequence in ((1, 1), (1, 2), (3, 1), (1, 63), (2, 64), (1, 65), (5, 257), (1, 4096)):
        axes = run_axes(p, micro, sequence, True, True, ONE_RUN)
        numbers = values(p.moments.variables, axes)
        for phase in p.passing:
            of_phase = [row for row, m in zip(every, low.moments, strict=True) if m.phase == phase]
            most = max(sum(map(mul, row, numbers)) for row in of_phase)
            assert largest(p.moments.terms.first[phase], numbers)[0] == most, (micro, sequence, phase)


@pytest.mark.parametrize("name", optimizer_names())
def test_the_ledger_sums_to_the_peak_under_every_optimizer(name: str) -> None:
    for foreach in (None, False) if takes_foreach(name) else (None,):
        optimizer = {"name": name, "foreach": foreach}
        answer = estimate(RunSpec(model="qwen2-0.5b", optimizer=optimizer, batch={"sequence": 16}))
        assert sum(line.bytes for line in answer.ledger) == answer.bytes.allocated == max(p.peak for p in answer.phases)
        if answer.peak.where == "optimizer":
            assert any(line.kind == "temp" and line.bytes for line in answer.ledger)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_ledger_sums_to_the_peak_if_layers_reuse_earlier_layers_tensors(method: str) -> None:
    # Gemma 4's later layers read keys and values of earlier ones, also under reentrant checkpointing.
    model = {"config": {"model_type": "gemma4_text", **DECODERS["gemma4_text"]}}
    batch, kernels = {"micro": 2, "sequence": 96}, {"checkpointing": "full", "reentrant": True}
    a = answer({"model": model, "method": method, "batch": batch, "kernels": kernels})
    assert sum(line.bytes for line in a.ledger) == a.bytes.allocated
    assert all(line.count > 0 for line in a.ledger)
