"""Published inference runs: each is met, or misses by at most its stated cause."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from benchmarks.golden import RUNNING, RUNNING_NEAR, Ran, not_expressed, ran, rows, running
from memplan import RunSpec, estimate, find_gpu
from memplan.core.errors import SpecError
from memplan.estimate.inference import loaded
from tests.cases import each
from tests.sampling import ALL, COMPLETE, sampled
from tests.walks import lines_at, walk

ROWS: list[dict[str, Any]] = rows("inference.jsonl")
MIB = 2**20


@each(lambda: running() if COMPLETE else map(ran, sampled(ROWS)), lambda r: r.id)
def test_a_published_run_is_met_or_misses_by_its_stated_cause(r: Ran) -> None:
    if r.cause:
        assert abs(r.off) > r.slack / 2  # if this fails the run is met, and its cause can be removed
        assert abs(r.error) <= r.within
    else:
        assert abs(r.off) <= r.slack


def test_every_row_states_its_source_and_kind() -> None:
    for row in ROWS:
        assert row["source"].startswith("https://")
        assert row["date"][:2] == "20"
        assert {"family", "stack", "measured", "digits"} <= row.keys()
        assert row["metric"] == "max_memory_allocated"
        run = RunSpec(**row["run"])
        assert RunSpec.model_validate_json(run.model_dump_json()) == run
        assert run.task in ("forward", "generate")
        usable = find_gpu(run.gpu or "").usable * (run.parallelism.world if row.get("summed") else 1)
        assert row["allocated"] < usable or "more than the two GPUs" in row["cause"]


def test_no_measurement_is_counted_twice() -> None:
    ids = [row["id"] for row in ROWS] + [id for group in not_expressed() for id in group["ids"]]
    assert [id for id, times in Counter(ids).items() if times > 1] == []


def means() -> dict[str, list[Ran]]:
    found: dict[str, list[Ran]] = {}
    for r in running():
        found.setdefault(r.family, []).append(r)
    return found


@ALL
def test_every_familys_large_peaks_have_at_most_three_per_cent_mean_error() -> None:
    for family, those in means().items():
        errors = [abs(r.error) for r in those if r.large]
        assert sum(errors) <= RUNNING * len(errors), family


@ALL
def test_small_peaks_without_a_cause_are_met_within_150_mib() -> None:
    assert {r.id: r.off for r in running() if not r.large and not r.cause and abs(r.off) > RUNNING_NEAR} == {}


@ALL
def test_torchs_reserved_memory_for_growing_caches_is_met() -> None:
    errors = [abs(r.answer.bytes.reserved / r.reserved - 1) for r in running() if r.reserved]
    assert sum(errors) <= 0.01 * len(errors)
    assert max(errors) <= 0.08


def test_caches_that_grow_leave_blocks_that_no_later_one_fits() -> None:
    """Llama-2-7B with eight sequences of 256 + 512 tokens took 60.8 GB of an A100, of which 19 GB are tensors."""
    row = next(row for row in ROWS if row["id"] == "optimum-7b-fp16-fa2-generate-b8")
    answer = estimate(RunSpec(**row["run"]))
    assert answer.bytes.allocated < 0.35 * row["reserved"]
    assert answer.bytes.reserved == pytest.approx(row["reserved"], rel=0.02)


# --- older libraries


def generating(model: str, profile: str, **fields: Any) -> RunSpec:
    return RunSpec(**{"model": model, "task": "generate", "profile": profile, "gpu": "a100-80gb", **fields})


def bytes_of(run: RunSpec, *words: str) -> int:
    """Return the bytes of tensors at the peak whose names contain one of the words."""
    return sum(line.bytes for line in estimate(run).ledger if any(word in line.what for word in words))


def test_every_layer_kept_rotary_tables_of_all_positions_before_4_40() -> None:
    fields: dict[str, Any] = {"batch": {"sequence": 16, "new_tokens": 4}}
    then, later = (bytes_of(generating("qwen2-7b", f"transformers-{v}", **fields), "_cached") for v in ("4.38", "4.46"))
    layers, positions, width, bf16 = 28, 32768, 128, 2
    assert (then, later) == (layers * 2 * positions * width * bf16, 0)


def test_llama_in_4_38_also_keeps_a_mask_of_all_positions() -> None:
    run = generating("llama-2-7b", "transformers-4.38", batch={"sequence": 16, "new_tokens": 4})
    assert bytes_of(run, "causal_mask") == 4096 * 4096


GPTQ: list[tuple[str, str, int]] = [
    # the largest matrix in half precision, and one row of its wider side
    ("transformers-4.46", "exllama_v1", 2 * 11008 * 4096 + 2 * 11008),
    # in addition fp32 outputs of 2,048 tokens of eight sequences; either part has 128 spare bytes
    ("transformers-4.46", "exllama_v2", 2 * 11008 * 4096 + 128 + 4 * 2048 * 8 * 11008 + 128),
    ("transformers-5", "", 0),
]


@pytest.mark.parametrize(("profile", "backend", "expected"), GPTQ)
def test_exllamas_buffers_have_their_stated_size(profile: str, backend: str, expected: int) -> None:
    quantization = {"format": "gptq-int4", **({"backend": backend} if backend == "exllama_v2" else {})}
    run = generating("llama-2-7b", profile, method={"quantization": quantization}, precision="fp16")
    found = estimate(run).run.method.quantization
    assert found is not None
    assert (found.backend, found.block_size) == (backend, 128)
    assert bytes_of(run, "exllama") == -(-expected // 512) * 512


@pytest.mark.parametrize(("format", "rows", "bytes_a_weight"), [("awq-int4", 1024, 2), ("gptq-int8", 128, 6)])
def test_many_rows_of_packed_weights_make_a_whole_matrix(format: str, rows: int, bytes_a_weight: int) -> None:
    """One more row of a prompt, and a layer's matrix is dequantised in full; it is as large as the prompt's tensors."""
    config = {"model_type": "qwen2", "hidden_size": 8192, "intermediate_size": 8192, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32, "tie_word_embeddings": False}
    fields: dict[str, Any] = {"method": {"quantization": {"format": format}}, "precision": "fp16"}
    few, many = (
        next(
            p.peak
            for p in estimate(
                RunSpec(
                    model={"config": config},
                    task="generate",
                    profile="transformers-4.46",
                    batch={"sequence": tokens, "new_tokens": 1},
                    **fields,
                )
            ).phases
            if p.phase == "prefill"
        )
        for tokens in (rows - 1, rows)
    )
    matrix, activations = bytes_a_weight * 8192 * 8192, 4 * 2 * rows * 8192
    assert many - few == pytest.approx(matrix, abs=activations)


def test_block_remainders_count_when_weights_are_loaded_one_by_one() -> None:
    """A matrix of 135 MiB has a block of 136, whose last MiB is too small to split off: three per layer, 40 layers."""
    run = generating("llama-2-13b", "transformers-4.35", precision="fp16")
    _, unsplit, most = loaded(walk(run).models, False)
    assert 135 * MIB == 2 * 13824 * 5120
    assert unsplit == 40 * 3 * MIB
    assert most == estimate(run).phases[0].peak
    assert (
        estimate(run.model_copy(update={"profile": "transformers-5"})).categories["other"] < 10 * MIB
    )  # one block, and its remainder


def test_an_awq_checkpoint_is_loaded_with_its_head_even_if_tied() -> None:
    run = generating("qwen2.5-1.5b", "transformers-4.46", method={"quantization": {"format": "awq-int4"}})
    load, resting = estimate(run).phases[0].peak, walk(run).persistent_bytes
    head = 151936 * 1536 * 2
    workspace = 8_519_680
    assert 0 <= load - (resting - workspace) - head < 2 * MIB  # plus the remainder of its block


def test_in_4_38_the_prompts_logits_outlive_its_pass() -> None:
    """The loop's variable still holds the output of the prompt's pass: the prompt's fp32 logits."""
    run = generating("qwen2-72b", "transformers-4.38", batch={"sequence": 14336, "new_tokens": 2})
    lines = {line.what: line.bytes for line in lines_at(run, "decode")}
    assert lines["logits of the prompt"] == 14336 * 152064 * 4


def test_one_pass_of_a_decoder_returns_its_cache_by_default() -> None:
    fields: dict[str, Any] = {"model": "llama-2-7b", "task": "forward", "batch": {"micro": 4, "sequence": 256}}
    with_it = estimate(RunSpec(**fields))
    without = estimate(RunSpec(**fields, loop={"use_cache": False}))
    assert (with_it.run.loop.use_cache, without.run.loop.use_cache) == (True, False)
    assert with_it.bytes.allocated - without.bytes.allocated == 4 * 256 * 32 * 2 * 4096 * 2
    assert estimate(RunSpec(model="llama-2-7b")).run.loop.use_cache is False


def test_generation_without_a_cache_and_a_kernel_of_another_format_are_refused() -> None:
    with pytest.raises(SpecError) as caught:
        estimate(generating("qwen2-0.5b", "transformers-5", loop={"use_cache": False}))
    assert caught.value.field == "loop.use_cache"
    quantization = {"format": "awq-int4", "backend": "exllama_v1"}
    with pytest.raises(SpecError, match="exllama_v1 does not run awq-int4; choose gemm") as caught:
        estimate(generating("qwen2-0.5b", "transformers-4.46", method={"quantization": quantization}))
    assert caught.value.field == "method.quantization.backend"


# --- LitGPT


def litgpt(model: str, **fields: Any) -> RunSpec:
    batch = {"sequence": 10, "new_tokens": 50}
    return RunSpec(**{"model": model, "task": "generate", "profile": "litgpt-2024", "batch": batch, **fields})


@pytest.mark.parametrize(
    ("model", "heads", "layers", "width"), [("llama-3.1-8b", 32, 32, 128), ("falcon-7b", 1, 32, 64)]
)
def test_litgpts_cache_has_all_heads_or_one_and_room_for_all_tokens(
    model: str, heads: int, layers: int, width: int
) -> None:
    run = litgpt(model)
    lines = lines_at(run, "decode")
    cached = sum(line.bytes for line in lines if "cache" in line.what and line.kind == "activation" and line.shape)
    room = 10 + 50 - 1  # the last token is not cached
    assert cached == layers * 2 * -(-heads * room * width * 2 // 512) * 512
    assert estimate(run).run.generation.cache_implementation == "static"


def test_litgpt_dequantises_its_4_bit_head_twice_to_read_a_prompt() -> None:
    """bitsandbytes before 0.43 dequantises to fp16, the dtype LitGPT quantised from, and then casts."""
    quantization = {"format": "nf4", "double_quant": False, "skip": []}
    lines = lines_at(litgpt("llama-2-7b", method={"quantization": quantization}), "prefill")
    assert [line.bytes for line in lines if line.what == "dequantised"] == [32000 * 4096 * 2] * 2


def test_a_forward_pass_of_litgpt_returns_only_logits() -> None:
    run = litgpt("llama-2-7b", task="forward", batch={"sequence": 256})
    assert estimate(run).run.loop.use_cache is False


def test_litgpt_supports_only_the_families_read_from_its_code() -> None:
    with pytest.raises(SpecError, match="LitGPT does not have model_type bloom; supported: llama, ") as caught:
        estimate(litgpt("bloom-560m"))
    assert caught.value.field == "profile"
