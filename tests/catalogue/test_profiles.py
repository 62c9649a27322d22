"""Profiles: complete tables of what a framework's version decides, and their effect in bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.accuracy import compared_with_trace
from benchmarks.golden import rows
from memplan import Estimate, RunSpec, estimate
from memplan.catalogue.profiles.behaviour import PRINTED, LibraryBehaviour, RunDefaults
from memplan.catalogue.profiles.engines import EngineBehaviour, EngineDefaults, engine_names, find_engine
from memplan.catalogue.profiles.profile_table import WHEN, Profile, field_types, tables
from memplan.catalogue.profiles.profiles import (
    PROFILES,
    behaviour_of,
    find_profile,
    library_behaviour,
)
from memplan.catalogue.profiles.profiles import rows as profile_rows
from memplan.cli.app import app
from memplan.core.errors import MemplanError, SpecError, UnknownNameError
from memplan.core.units import GIB, rounded
from memplan.engine.walk import alive, size
from memplan.program.graph import lower_training, operations_of
from memplan.report.profiles import EXAMPLE, MAIN
from memplan.resolve.decide import decide, fill_defaults
from memplan.spec.run import NEWEST
from tests.cases import in_groups
from tests.sampling import sampled
from tests.tiny import TINY

NAMES = [profile.name for profile in PROFILES]
FIELDS = [field for record in field_types(LibraryBehaviour).values() for field in record._fields]
PARTS = ("kernels", "optimizer", "method", "quantization")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 1408,
    "vocab_size": 32000,
    "num_hidden_layers": 4,
    "tie_word_embeddings": False,
}


TRACED = sampled(rows("traced_versions.jsonl"))


def model(**changes: Any) -> dict[str, Any]:
    return {"config": {**LLAMA, **changes}}


def peak(answer: Estimate, phase: str) -> int:
    return max(p.peak for p in answer.phases if p.phase == phase)


def test_a_framework_without_a_version_means_the_newest() -> None:
    names = [*NAMES, *engine_names()]
    assert RunSpec(model="qwen2-7b", task="generate", profile="vLLM").profile == NEWEST["vllm"]
    versioned = {name.rsplit("-", 1)[0] for name in names if name[-1].isdigit()} - set(names)
    assert set(NEWEST) == versioned

    def order(name: str) -> list[int]:
        return [int(part) for part in name.rsplit("-", 1)[1].split(".")]

    for framework, newest in NEWEST.items():
        # transformers-5.14 is transformers-5 with an older Liger.
        ours = [n for n in names if n.rsplit("-", 1)[0] == framework and n != "transformers-5.14"]
        assert newest == max(ours, key=order)


def test_every_framework_has_profiles() -> None:
    versions = {f"transformers-{v}" for v in ("4.35", "4.38", "4.45", "4.46", "4.48", "4.51", "5")}
    assert versions | {"litgpt-2023", "litgpt-2024", "megatron-core", "fsdp_qlora", "torchtitan", "torchtune"} < set(
        NAMES
    )
    for framework in ("trl-", "axolotl-", "llamafactory-", "unsloth-"):
        assert any(name.startswith(framework) for name in NAMES)
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.name)
def test_a_profile_states_the_source_of_each_row(profile: Profile) -> None:
    assert profile.title
    assert profile.read
    for row in profile.rows:
        assert row.field in FIELDS or row.field.split(".")[-2] in PARTS
        assert row.source
        assert row.when in WHEN
    like = profile
    while like.like:
        like = find_profile(like.like)
    assert like.name == "transformers-5"


def test_no_profile_row_repeats_an_earlier_one() -> None:
    for profile in PROFILES:
        keys = [(row.field, row.when, row.model_types) for row in profile.rows]
        assert len(set(keys)) == len(keys), profile.name


@pytest.mark.parametrize(
    ("name", "counted"),
    [
        ("trl-1.16", "trl-1.15"),
        ("trl-1.14.2", "trl-1.14"),
        ("trl-2.0", "trl-1.15"),
        ("transformers-5.24", "transformers-5"),
        ("transformers-5.3", "transformers-5.14"),
        ("transformers-4.57", "transformers-4.51"),
        ("unsloth-2026.3", "unsloth-2025"),
        ("torchtune-0.6.1", "torchtune"),
    ],
)
def test_a_version_is_counted_as_the_nearest_at_or_below_it(name: str, counted: str) -> None:
    run = RunSpec(model="tinyllama-1.1b", profile=name)
    answer = estimate(run)
    same = estimate(RunSpec(model="tinyllama-1.1b", profile=counted))
    assert (answer.bytes.allocated, answer.run) == (same.bytes.allocated, same.run)
    assert answer.notes == (f"profile: {name} is counted as {counted}, the nearest version at or below it", *same.notes)
    assert find_engine("vllm-0.20") is find_engine("vllm-0.9") is find_engine("vllm-0.11")
    assert find_engine("vllm-0.7.3") is find_engine("vllm-0.7")


@pytest.mark.parametrize(
    "name", ["transformers-4.3", "litgpt-2022", "trl-", "trl-9.1", "unsloth-2026.13", "TRANSFORMERS-5", ""]
)
def test_an_unknown_profile_is_an_error_that_names_near_ones(name: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        estimate(RunSpec(model="qwen2-0.5b", profile=name))
    assert caught.value.field == "profile"
    assert any(
        f"{framework}-" in str(caught.value) for framework in ("transformers", "litgpt", "trl", "unsloth", "verl")
    )


def test_a_completed_run_has_the_same_loop_as_its_estimate() -> None:
    run = RunSpec(model="qwen2-0.5b")
    assert fill_defaults(run).loop == estimate(run).run.loop
    assert fill_defaults(run).loop.use_cache is False


@pytest.mark.parametrize("name", sampled(NAMES, 4))
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_an_answers_run_is_complete_and_gives_the_same_answer(name: str, method: str) -> None:
    answer = estimate(RunSpec(model=model(), method=method, profile=name))
    run = answer.run
    kernels = run.kernels
    assert None not in (kernels.checkpointing, kernels.loss, kernels.fused, kernels.reentrant, run.optimizer.name)
    if method != "full":
        assert run.method.adapter_dtype is not None
    if run.method.quantization is not None:
        assert None not in (run.method.quantization.skip, run.method.quantization.kbit_preparation)
    again = estimate(RunSpec.model_validate_json(run.model_dump_json()))
    assert again.bytes == answer.bytes
    assert again.phases == answer.phases
    assert sum(line.bytes for line in answer.ledger) == answer.bytes.allocated


OTHERS: dict[str, Any] = {
    "optimizer.name": "sgd",
    "kernels.checkpointing": "none",
    "kernels.reentrant": False,
    "kernels.loss": "chunked",
    "kernels.fused": (),
    "method.adapter_dtype": "fp32",
    "method.quantization.skip": ("lm_head",),
    "method.quantization.kbit_preparation": True,
}


@pytest.mark.parametrize("name", NAMES)
def test_the_users_fields_override_the_profile(name: str) -> None:
    said: dict[str, Any] = {"method": {"kind": "qlora"}}
    for path, value in OTHERS.items():
        inner = said
        *parts, field = path.split(".")
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[field] = value
    run = estimate(RunSpec(model=model(), profile=name, **said)).run
    for path, value in OTHERS.items():
        found: Any = run
        for part in path.split("."):
            found = getattr(found, part)
        assert found == value, path


def test_open_fields_get_transformers_5s_defaults() -> None:
    rows = {row.field: row.value for row in find_profile("transformers-5").rows}
    said = RunSpec(
        model=model(),
        optimizer=rows["optimizer.name"],
        kernels={field: rows[f"kernels.{field}"] for field in ("checkpointing", "reentrant", "loss", "fused")},
    )
    assert estimate(said).phases == estimate(RunSpec(model=model())).phases


def test_a_row_may_be_for_some_families_or_quantised_weights_only() -> None:
    assert library_behaviour("transformers-4.48", "llama", False).loss.logits == "shifted"
    assert library_behaviour("transformers-4.48", "gpt_bigcode", False).loss.logits == "half"
    assert library_behaviour("transformers-4.51", "gpt_bigcode", False).loss.logits == "padded"
    assert library_behaviour("litgpt-2023", "llama", False).defaults.optimizer_name == "adamw_torch"
    assert library_behaviour("litgpt-2023", "llama", True).defaults.optimizer_name == "paged_adamw_32bit"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quantised", [False, True])
def test_every_row_sets_a_field_to_a_value_of_its_type(name: str, quantised: bool) -> None:
    families = {family for row in find_profile(name).rows for family in row.model_types}
    for family in ("", *families):
        behaviour = library_behaviour(name, family, quantised)
        for field, value in behaviour.defaults._asdict().items():
            row = [r for r in profile_rows(find_profile(name)) if r.field.replace(".", "_") == field]
            assert value in [r.value for r in row]


@pytest.mark.parametrize("model", ["gemma-3-1b", "gemma-3-4b"])
def test_unsloth_runs_gemma_3_with_eager_attention_before_ampere(model: str) -> None:
    for gpu, eager in (("t4", True), ("v100-16gb", True), ("3090", False), (None, False)):
        run = RunSpec(model=model, method="lora", profile="unsloth", precision="fp16", gpu=gpu)
        assert any("counted with eager attention" in note for note in decide(run).notes) == eager, gpu


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("lingers", True, "lingers is no field that a profile sets"),
        ("kernels_losses", "hf", "kernels_losses is no field"),
        ("logits", "shifty", "logits cannot be 'shifty'"),
        ("no_sdpa", 1, "no_sdpa cannot be 1"),
        ("no_sdpa", "true", "no_sdpa cannot be 'true'"),
        ("few_rows", True, "few_rows cannot be True"),
        ("few_rows", None, "few_rows cannot be None"),
        ("method_quantization_kbit_preparation", 1, "method_quantization_kbit_preparation cannot be 1"),
        ("kernels_fused", "rope", "kernels_fused cannot be 'rope'"),
        ("kernels_fused", ["rope"], "kernels_fused cannot be"),
        ("method_quantization_skip", (1,), "method_quantization_skip cannot be"),
    ],
)
def test_a_wrong_row_is_an_error_that_names_it(field: str, value: object, error: str) -> None:
    valid = {f: v for record in library_behaviour("transformers-5", "", False) for f, v in record._asdict().items()}
    assert behaviour_of(valid, "mine") == library_behaviour("transformers-5", "", False)
    with pytest.raises(ValueError, match=f"profile mine: {error}"):
        behaviour_of({**valid, field: value}, "mine")


def test_every_group_of_families_is_named_by_a_row() -> None:
    conditions = {c for table in tables()["profile"].values() for row in table["rows"] for c in row[3:]}
    assert set(tables()["families"]) <= conditions
    assert not {c for c in conditions if " " in c} - set(tables()["families"])


def test_a_profile_sets_every_field() -> None:
    valid = {f: v for record in library_behaviour("transformers-5", "", False) for f, v in record._asdict().items()}
    del valid["cache"]
    with pytest.raises(ValueError, match="profile mine: does not set cache"):
        behaviour_of(valid, "mine")


def test_fields_are_unique_and_records_short() -> None:
    assert len(set(FIELDS)) == len(FIELDS)
    assert all(len(record._fields) <= 20 for record in field_types(LibraryBehaviour).values())
    printed = [PRINTED.get(field, field) for field in (*FIELDS, *EngineDefaults._fields, *EngineBehaviour._fields)]
    assert len(set(printed)) == len(printed)
    assert set(PRINTED) <= {*FIELDS, *EngineBehaviour._fields}
    assert all(field.split("_")[0] in ("optimizer", "kernels", "method") for field in RunDefaults._fields)


# Bytes per bf16 logit at the loss's forward and backward peaks. In 4.45 the model frees the logits at once.
PER_LOGIT = {
    "transformers-5": (10, 12),
    "transformers-4.51": (10, 12),
    "transformers-4.48": (14, 12),
    "transformers-4.45": (12, 12),
}


@pytest.mark.parametrize(("name", "expected"), PER_LOGIT.items())
def test_each_loss_has_its_bytes_per_logit(name: str, expected: tuple[int, int]) -> None:
    b, s, more = 4, 512, 64000
    small, large = (
        estimate(RunSpec(model=model(vocab_size=v), method="lora", profile=name, batch={"micro": b, "sequence": s}))
        for v in (more, 2 * more)
    )
    weights = 2 * 2 * more * LLAMA["hidden_size"]  # embeddings and head
    for phase, bytes_ in zip(("loss", "backward"), expected, strict=True):
        logits = peak(large, phase) - peak(small, phase) - weights
        assert logits == pytest.approx(bytes_ * b * s * more, rel=0.003), phase


def test_a_single_sequence_is_not_copied_to_be_shifted() -> None:
    ones, fours = (
        [
            peak(estimate(RunSpec(model=model(), profile=name, batch={"micro": b, "sequence": 512})), "loss")
            for name in ("transformers-4.48", "transformers-4.51")
        ]
        for b in (1, 4)
    )
    assert abs(ones[0] - ones[1]) < 2**20
    assert fours[0] - fours[1] == pytest.approx(4 * 4 * 512 * LLAMA["vocab_size"], rel=0.01)


def test_a_loss_in_half_precision_has_three_tensors_of_logits() -> None:
    """gpt2 under transformers 4.48: logits, all rows but the last, and log-probabilities, all in bf16."""
    b, s = 4, 512
    small, large = (
        peak(
            estimate(RunSpec(model=gpt2(v), profile="transformers-4.48", batch={"micro": b, "sequence": s})),
            "loss",
        )
        for v in (64000, 128000)
    )
    states = 4 * 2 * 64000 * 256  # tied embeddings without their gradient yet, and two moments
    assert large - small == pytest.approx(3 * 2 * b * s * 64000 + states * 3 / 4, rel=0.003)


def gpt2(v: int) -> dict[str, Any]:
    return {
        "config": {"model_type": "gpt2", "n_embd": 256, "n_layer": 2, "n_head": 4, "vocab_size": v, "n_positions": 512}
    }


def test_megatron_writes_the_softmax_and_its_gradient_over_the_logits() -> None:
    b, s, v = 4, 512, 64000
    answers = [
        estimate(
            RunSpec(
                model=model(vocab_size=n),
                method="lora",
                profile="megatron-core",
                batch={"micro": b, "sequence": s},
            )
        )
        for n in (v, 2 * v)
    ]
    weights = 2 * 2 * v * LLAMA["hidden_size"]
    growth = peak(answers[1], "loss") - peak(answers[0], "loss") - weights
    assert growth == pytest.approx((2 + 4) * b * s * v, rel=0.003)


def test_reentrant_checkpointing_holds_a_blocks_output_and_its_gradient() -> None:
    """A block's backward holds two more tensors of the residual stream, and all of its saved tensors at once."""
    runs = [
        estimate(
            RunSpec(
                model=model(vocab_size=100),
                kernels={"reentrant": reentrant, "attention": "flash_attention_2"},
                batch={"micro": 8, "sequence": 2048},
            )
        )
        for reentrant in (False, True)
    ]
    stream = 8 * 2048 * LLAMA["hidden_size"] * 2
    assert [run.peak.where.split(".")[0] for run in runs] == ["model", "model"]
    more = peak(runs[1], "backward") - peak(runs[0], "backward")
    assert more % stream < 2**20 or stream - more % stream < 2**20
    assert 0 < more <= 2 * stream
    assert peak(runs[0], "forward") == peak(runs[1], "forward")


def kept(changes: dict[str, Any], **run: Any) -> int:
    """Return the bytes that one more layer keeps from forward to backward for 1 x 512 tokens."""
    spec = RunSpec(
        model=model(**changes),
        kernels={"checkpointing": "none", "attention": "flash_attention_2", **run.pop("kernels", {})},
        **run,
    )
    structure = decide(spec).structure
    low = lower_training(structure.graph)
    _, axes = operations_of(structure.graph)
    numbers = {**axes, "b": 1, "s": 512, "s8": 512, "s32": 512, "s128": 512, "targets": 513, "padded_labels": 0}
    numbers |= {
        "shifted_rows": 511,
        "shifted_labels": 0,
        "further_chunks": 3,
        "sorted_ids": 0,
        "segments": 0,
        "lc": 64,
        "fc": 64,
    }

    def at(layers: int) -> int:
        there = {**numbers, "L": layers}
        return sum(
            n * size(low.sizes[key][0], low.sizes[key][1], there)[1]
            for key, n in alive(low.kept, low.runs, there).items()
        )

    return at(5) - at(4)


def test_fused_kernels_keep_less_of_a_layer() -> None:
    """In bf16, per token: each norm keeps its input and one number instead of an fp32 copy; no activated gate."""
    h, q, k, i, heads = 512, 512, 128, 1408, 8
    random_state = 512 + 512  # flash attention's
    statistics = 2 * 4 + 4 * heads
    plain = 16 * h + 4 * q + 4 * k + 8 * i + statistics
    fused = 8 * h + 4 * q + 4 * k + 6 * i + statistics
    assert kept({}) == 512 * plain + random_state
    assert kept({}, kernels={"fused": ["rope", "rms_norm", "swiglu"]}) == 512 * fused + random_state


def test_fused_lora_keeps_the_input_once() -> None:
    """unsloth with all layers adapted, in bf16: inputs of q, k, v, of o and of the MLP, the gate and its factor."""
    h, q, k, i, heads = 512, 512, 128, 1408, 8
    run: dict[str, Any] = {
        "method": "qlora",
        "profile": "unsloth-2025",
        "precision": {"weights": "bf16", "autocast": True},
    }
    norms = 2 * (2 * h + 4)
    attention = 2 * h + 2 * (q + 2 * k) + 2 * q + 4 * heads
    mlp = 2 * h + 2 * i + 2 * i
    stored_random_state = 512 + 512
    assert kept({}, **run) == 512 * (norms + attention + mlp) + stored_random_state


def test_a_fused_lora_function_covers_one_module() -> None:
    """A mixture's experts stay unfused; the shared expert is a gated MLP with its own width."""
    config = {"model_type": "qwen2_moe", **TINY["qwen2_moe"]}
    run = RunSpec(model={"config": config}, method="qlora", profile="transformers-4.51", kernels={"fused": ["lora"]})
    stack, _ = operations_of(decide(run).structure.graph)
    ops = {op.name: op for op in stack.runs[0].blocks[0].ops}
    joined = {name for name in ops if name.endswith((".lora_qkv", ".lora_mlp"))}
    assert joined == {"self_attn.lora_qkv", "mlp.shared_expert.lora_mlp"}
    shared = ops["mlp.shared_expert.lora_mlp"]
    assert {t.name: t.shape for t in shared.writes if t.name in ("gate", "up")} == {"gate": "b s fs", "up": "b s fs"}
    assert {"mlp.experts.0.gate_proj.lora_A", "mlp.experts.0.product"} <= ops.keys()


def test_a_fused_kernel_that_finds_nothing_is_noted() -> None:
    fused = ("rope", "compiled_cross_entropy", "cross_entropy")
    answer = estimate(RunSpec(model=gpt2(1000), batch={"sequence": 512}, kernels={"fused": fused}))
    assert answer.run.kernels.fused == ("cross_entropy",)
    for name in fused[:2]:
        assert any(f"{name} has nothing to fuse" in note for note in answer.notes)
    profiled = estimate(RunSpec(model=gpt2(1000), batch={"sequence": 512}, profile="unsloth-2025"))
    assert not any("has nothing to fuse" in note for note in profiled.notes)


def test_litgpt_keeps_the_tensors_its_code_holds() -> None:
    """LoRA on query and value, per token: inputs of two fp32 norms, a dropout mask and its output, one storage of q, k
    and v, the rotated heads, attention's output, its copy into zeros, and three tensors of the MLP."""
    h, i, heads, r = 512, 1408, 8, 8
    run: dict[str, Any] = {
        "method": {"kind": "lora", "rank": r, "targets": ["q_proj", "v_proj"], "dropout": 0.05},
        "profile": "litgpt-2024",
    }
    norms = 2 * (4 * h + 4 + 4)
    adapter = h + 2 * h + 2 * 2 * r + 2 * 2 * h
    attention = 2 * 3 * h + 2 * 2 * h + 2 * h + 4 * heads
    factors = 2 * 4 * h  # the norms' weights in fp32
    random_state = 512 + 512
    expected = 512 * (norms + adapter + attention + 2 * 3 * i) + factors + random_state
    assert kept({"num_key_value_heads": 8}, kernels={"attention": "sdpa"}, **run) == pytest.approx(expected, rel=1e-3)


def test_litgpt_has_no_other_families_than_its_own() -> None:
    with pytest.raises(MemplanError, match="litgpt-2024 does not have qwen2"):
        estimate(RunSpec(model="qwen2-0.5b", profile="litgpt-2024"))


@pytest.mark.parametrize(
    ("profile", "known", "unknown"),
    [
        ("transformers-4.35", "llama", "mixtral"),
        ("transformers-4.45", "phi3", "glm"),
        ("transformers-4.48", "olmo2", "qwen3"),
        ("llamafactory-0.9", "gemma3_text", "gemma3n_text"),
        ("axolotl-0.12", "gemma3n_text", "gemma4_text"),
        ("unsloth-2025", "gemma2", "phi3"),
    ],
)
def test_a_family_that_came_after_the_version_is_noted(profile: str, known: str, unknown: str) -> None:
    def notes(family: str) -> str:
        run = RunSpec(model={"config": {"model_type": family, **TINY[family]}}, profile=profile, batch={"sequence": 64})
        return " ".join(estimate(run).notes)

    assert f"has no {unknown}: counted with the layers of transformers 5.24" in notes(unknown)
    assert "counted with the layers" not in notes(known)


@pytest.mark.parametrize("profile", ["litgpt", "torchtitan", "torchtune", "unsloth"])
def test_padding_adds_nothing_if_the_model_gets_no_mask(profile: str) -> None:
    def answer(padded: bool) -> Estimate:
        return estimate(RunSpec(model=model(), method="full", profile=profile, loop={"padded": padded}))

    assert answer(True).phases == answer(False).phases
    assert any("passes no attention mask for padding" in note for note in answer(True).notes)
    assert not any("mask" in note for note in answer(False).notes)


def test_padding_adds_masks_if_the_model_gets_one() -> None:
    runs = (RunSpec(model=model(), profile="transformers-4.51", loop={"padded": p}) for p in (True, False))
    padded, plain = map(estimate, runs)
    assert padded.bytes.allocated > plain.bytes.allocated
    assert not padded.notes


@pytest.mark.parametrize("profile", ["litgpt", "torchtitan"])
def test_a_model_that_calls_torchs_attention_has_no_eager_one(profile: str) -> None:
    with pytest.raises(SpecError, match="has no eager attention; supported: sdpa, ") as caught:
        estimate(RunSpec(model=model(), profile=profile, kernels={"attention": "eager"}))
    assert caught.value.field == "kernels.attention"


@pytest.mark.parametrize("profile", ["transformers-4.48", "transformers-4.51", "transformers-5"])
def test_phi3s_layers_read_the_mask_of_their_window(profile: str) -> None:
    """Whether full heads are rotated, as until 4.48, or a part that is joined with the rest."""
    config = {"model_type": "phi3", **TINY["phi3"], "sliding_window": 32}
    run = RunSpec(model={"config": config}, profile=profile, loop={"padded": True})
    stack, _ = operations_of(decide(run).structure.graph)
    assert any(op.reads == ("window_mask",) for op in stack.runs[0].blocks[0].ops)


def test_older_versions_repeat_even_the_keys_that_layers_share() -> None:
    config = {"model_type": "gemma4_text", **TINY["gemma4_text"]}
    run = RunSpec(model={"config": config}, profile="transformers-4.51", batch={"sequence": 16})
    stack, _ = operations_of(decide(run).structure.graph)
    repeats = (op for run in stack.runs for block in run.blocks for op in block.ops if ".repeat_" in op.name)
    shared = {(op.reads[0], op.writes[0].name) for op in repeats if not op.reads[0].startswith(("k.", "v."))}
    assert shared == {
        *(("keys.view", "k.given"), ("values.view", "v.given")),
        *(("local_keys.view", "k.given"), ("local_values.view", "v.given")),
    }


def test_gptq_stores_half_a_byte_a_weight_and_numbers_a_group() -> None:
    quantization = {"format": "gptq-int4", "block_size": 128, "kbit_preparation": False}
    answer = estimate(RunSpec(model=model(), method={"kind": "qlora", "quantization": quantization}))
    by_name = {line.what: line for line in answer.ledger if line.kind == "parameter" and "up_proj" in line.what}
    n = 512 * 1408
    assert by_name["mlp.up_proj.weight (qweight)"].bytes == 4 * n // 2
    assert by_name["mlp.up_proj.weight (scales)"].bytes == 4 * 2 * n // 128
    assert by_name["mlp.up_proj.weight (qzeros)"].bytes == 4 * rounded(4 * n // 128 // 8)
    assert by_name["mlp.up_proj.weight (g_idx)"].bytes == 4 * 4 * 512


def printed(*arguments: str) -> str:
    return CliRunner().invoke(app, ["profiles", *arguments]).output


def test_the_command_lists_every_profile_and_what_it_sets() -> None:
    facts = {row["name"]: row for row in json.loads(printed("--json"))}
    assert list(facts) == [*NAMES, *engine_names()]
    words = " ".join(printed("--all").split())
    for profile in PROFILES:
        assert f"{profile.name}: {profile.title}" in words
        for row in profile.rows:
            assert MAIN.get(row.field, row.field.rpartition(".")[2].replace("_", " ")).split()[0] in words
        rows = [{**row._asdict(), "field": PRINTED.get(row.field, row.field)} for row in profile.rows]
        assert facts[profile.name]["rows"] == json.loads(json.dumps(rows))
    found = printed("litgpt")
    assert "litgpt-2023" in found
    assert "torchtune" not in found


def test_a_list_of_profiles_has_a_line_for_each_with_an_example() -> None:
    text = printed()
    for profile in PROFILES:
        (line,) = (line for line in text.splitlines() if line.startswith(f"{profile.name} "))
        example = RunSpec.model_validate({**EXAMPLE, "profile": profile.name})
        assert line.split()[-1] == f"{estimate(example).bytes.allocated / GIB:.2f}"
    assert all(len(line) <= 100 for line in text.splitlines())


@pytest.mark.parametrize("arguments", [("trl-1",), ("unsloth",), ("vllm",), ("--all",)])
def test_settings_are_shown_in_plain_words_and_a_hundred_columns(arguments: tuple[str, ...]) -> None:
    text = printed(*arguments)
    assert all(len(line) <= 100 for line in text.splitlines())
    assert not any(name in text.split() for name in ("lingers", "wiggle", "by_name", "whole_rotary", "one_mask"))


def test_a_setting_shows_what_it_changes_against_the_base_profile() -> None:
    """TRL 1.10's loss against that of the profile it is like, TRL 1.13: the rest of the two is the same."""
    sizes = {
        name: estimate(RunSpec.model_validate({**EXAMPLE, "profile": name})).bytes.allocated
        for name in ("trl-1.10", "trl-1.13")
    }
    (line,) = (line for line in printed("trl-1.10").splitlines() if line.startswith("loss "))
    assert line.split()[-1] == f"{(sizes['trl-1.10'] - sizes['trl-1.13']) / GIB:+.2f}"


@in_groups(TRACED, lambda row: row["name"])
def test_a_step_of_an_older_version_equals_its_trace(row: dict[str, Any]) -> None:
    family = row["run"]["model"]["config"]["model_type"]
    assert compared_with_trace(row).phase < (0.007 if family == "gemma2" else 0.001)


@pytest.mark.parametrize(
    ("profile", "family"),
    [
        ("transformers-5", "bloom"),
        ("transformers-5", "gemma2"),
        ("transformers-5", "gpt_oss"),
        ("transformers-4.45", "opt"),
        ("transformers-4.35", "llama"),
    ],
)
def test_attention_is_eager_where_the_class_has_no_sdpa(profile: str, family: str) -> None:
    def run(attention: str | None) -> Estimate:
        model = {"config": {"model_type": family, **TINY[family]}}
        batch = {"micro": 1, "sequence": 64}
        return estimate(RunSpec(profile=profile, model=model, batch=batch, kernels={"attention": attention}))

    assert run(None).run.kernels.attention == "eager"
    assert run(None).bytes == run("eager").bytes
    for attention in ("sdpa", "sdpa_math"):
        with pytest.raises(SpecError, match=f"{family} does not run with {attention}: its class .*; use eager"):
            run(attention)


def test_gemma_2_has_sdpa_before_transformers_5_24() -> None:
    def attention(profile: str, family: str) -> str | None:
        return estimate(
            RunSpec(model={"config": {"model_type": family, **TINY[family]}}, profile=profile)
        ).run.kernels.attention

    assert {attention(profile, "gemma2") for profile in ("transformers-5.14", "axolotl", "axolotl-0.12")} == {"sdpa"}
    assert attention("transformers-5.14", "bloom") == "eager"


def test_checkpointing_that_a_version_ignores_is_left_out_with_a_note() -> None:
    config = {**LLAMA, "model_type": "starcoder2"}
    run: dict[str, Any] = {"model": {"config": config}, "method": "lora", "batch": {"micro": 2, "sequence": 512}}
    run["profile"] = "transformers-4.48"
    ignoring = estimate(RunSpec(**run))
    assert any("ignores gradient checkpointing" in note for note in ignoring.notes)
    without = estimate(RunSpec(kernels={"checkpointing": "none"}, **run))
    assert not any("ignores gradient checkpointing" in note for note in without.notes)
    assert abs(without.bytes.allocated - ignoring.bytes.allocated) <= 2 * 2 * 512 * 512 * 2


def test_torchs_plain_attention_keeps_its_scores_in_half_precision_before_2_5() -> None:
    def kept(profile: str) -> int:
        kernels = {"attention": "sdpa_math", "checkpointing": "none", "loss": "chunked"}
        run = RunSpec(model=model(), method="lora", batch={"sequence": 2048}, kernels=kernels, profile=profile)
        return peak(estimate(run), "forward")

    scores = 4 * 8 * 2048 * 2048
    assert kept("transformers-4.45") - kept("transformers-4.38") > 2 * scores


@pytest.mark.parametrize(
    ("profile", "projects"), [("transformers-5", True), ("llamafactory-0.9", False), ("ms-swift-3", False)]
)
@pytest.mark.parametrize("optimizer", ["galore_adamw", "apollo_adamw"])
def test_only_transformers_projects_the_heads_gradient(profile: str, projects: bool, optimizer: str) -> None:
    answer = estimate(RunSpec(model=model(), optimizer=optimizer, profile=profile, batch={"sequence": 8}))
    head, vocabulary = "lm_head.weight exp_avg", LLAMA["vocab_size"]
    [moment] = [line for line in answer.ledger if line.what == head]
    numbers = vocabulary * (128 if projects else LLAMA["hidden_size"])
    assert moment.bytes == rounded(numbers * 2)
