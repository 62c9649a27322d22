"""Encoders and encoder-decoders: traces, heads, sequence lengths and refusals."""

from __future__ import annotations

from statistics import mean
from typing import Any

import pytest

from benchmarks.accuracy import compared_with_trace
from benchmarks.golden import rows, trace_figures
from memplan import RunSpec, estimate
from memplan.core.errors import ConfigError, SpecError, UnsupportedModelError
from memplan.models.model import ModelSpec, with_objective
from memplan.models.objectives import modules_to_train
from memplan.planning.step_time import work
from memplan.planning.sweep import grid
from memplan.program.graph import operations_of
from memplan.program.training.program import program
from memplan.resolve.decide import decide
from tests.cases import in_groups
from tests.encoders import HEADS, SMALL
from tests.estimate.test_traced_steps import label
from tests.sampling import ALL, sampled

TRACED: list[dict[str, Any]] = sampled(rows("traced_encoders.jsonl"))
HEADED = [(name, objective) for name, objectives in HEADS.items() for objective in objectives]


def run(name: str, **options: Any) -> RunSpec:
    fixed = SMALL[name]["model_type"] in ("vit", "whisper")
    given = {"batch": {"micro": 2, **({} if fixed else {"sequence": 64})}, **options}
    return RunSpec(model={"config": SMALL[name]}, **given)


@in_groups(TRACED, label)
def test_an_encoders_estimate_is_near_its_trace(case: dict[str, Any]) -> None:
    answer = trace_figures(case["run"])
    assert answer.parameters.total == case["parameters"]
    assert answer.parameters.trainable == case["trainable"]
    compared = compared_with_trace(case)
    assert compared.peak <= 0.0005, compared
    assert compared.phase <= (0.02 if "vit" in case["name"] else 0.002), compared


@ALL
def test_the_encoders_mean_error_is_one_tenthousandth_at_most() -> None:
    traced = rows("traced_encoders.jsonl")
    assert {row["run"]["model"] for row in traced if isinstance(row["run"]["model"], str)} == {
        *("bert-base-uncased", "flan-t5-base", "t5-base", "whisper-large-v3-turbo", "vit-base")
    }
    assert mean(compared_with_trace(row).peak for row in traced[::4]) < 1e-4


@pytest.mark.parametrize(("name", "objective"), HEADED)
def test_a_configs_class_determines_the_objective(name: str, objective: str) -> None:
    model = with_objective(ModelSpec(SMALL[name]), objective)
    assert model.objective == objective
    assert ModelSpec(model.config).objective == objective  # by its architectures
    answer = estimate(run(name, objective=objective))
    assert answer.run.objective == objective


def test_the_default_objective_is_the_familys_pretraining_objective() -> None:
    usual = {name: ModelSpec(config).objective for name, config in SMALL.items()}
    assert usual == {
        **dict.fromkeys(
            (name for name, heads in HEADS.items() if "token_classification" in heads or "masked_lm" in heads),
            "masked_lm",
        ),
        **dict.fromkeys(
            ("bart", "m2m_100", "marian", "mbart", "pegasus", "mt5", "t5", "flan-t5", "t5gemma", "umt5", "whisper"),
            "seq2seq_lm",
        ),
        "vit": "image_classification",
        **dict.fromkeys(("llama", "gemma2"), "causal_lm"),
    }
    assert ModelSpec({**SMALL["vit"], "architectures": ["ViTModel"]}).objective == "feature_extraction"
    assert ModelSpec({**SMALL["bert"], "architectures": ["BertForPreTraining"]}).objective == "masked_lm"
    assert ModelSpec({**SMALL["t5"], "architectures": ["T5WithLMHeadModel"]}).objective == "seq2seq_lm"


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("bert", "BertForNextSentencePrediction"),
        ("bert", "BertForQuestionAnswering"),
        ("t5", "T5EncoderModel"),
        ("vit", "ViTForMaskedImageModeling"),
        ("whisper", "WhisperForAudioClassification"),
        ("llama", "LlamaForMultipleChoice"),
        ("llama", "LlamaForRewardModel"),
    ],
)
def test_another_head_is_refused_by_its_class(name: str, architecture: str) -> None:
    with pytest.raises(UnsupportedModelError, match=architecture) as caught:
        ModelSpec({**SMALL[name], "architectures": [architecture]})
    assert caught.value.field == "architectures"


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "bert",
        {"objective": "causal_lm"},
        "objective: causal_lm is not supported for model_type bert; supported: masked",
    ),
    ("bert", {"kernels": {"loss": "fused"}}, "kernels.loss: fused only applies to causal language models"),
    ("whisper", {"kernels": {"loss": "chunked"}}, "kernels.loss: chunked only applies to causal language models"),
    ("bert", {"profile": "transformers-4.46"}, "profile: transformers-4.46 is not supported yet for masked_lm"),
    ("bert", {"batch": {"sequence": 301}}, "batch.sequence: 301 tokens exceed the 300 learned positions of bert"),
    ("roberta", {"batch": {"sequence": 299}}, "batch.sequence: 299 tokens exceed the 298 learned positions of roberta"),
    ("bert", {"batch": {"sequence": 8, "target_sequence": 8}}, "batch.target_sequence: bert is not an encoder-decoder"),
    ("vit", {"batch": {"sequence": 64}}, "batch.sequence: the encoder of vit always reads 197 tokens"),
    ("whisper", {"batch": {"target_sequence": 97}}, "batch.target_sequence: 97 tokens exceed the"),
    (
        "t5",
        {"kernels": {"attention": "flash_attention_2"}},
        "kernels.attention: t5 does not run with flash_attention_2: it adds positions to the",
    ),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_unsupported_encoder_options_are_refused_in_one_line_with_the_field(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError) as caught:
        estimate(run(name, **options))
    assert str(caught.value).startswith(message)
    assert caught.value.field == message.partition(":")[0]


def test_a_class_without_gradient_checkpointing_is_counted_without_it() -> None:
    default, plain = (estimate(run("mpnet", kernels=k)) for k in ({}, {"checkpointing": "none"}))
    assert default.bytes == plain.bytes
    assert set(default.notes) - set(plain.notes) == {"transformers has no gradient checkpointing for mpnet; use none"}


@pytest.mark.parametrize("name", ["t5", "flan-t5"])
def test_the_first_block_of_each_stack_has_the_biases_of_all(name: str) -> None:
    whole = estimate(run(name)).parameters.total
    one = {**SMALL[name], "num_layers": 1, "num_decoder_layers": 1}
    single = estimate(RunSpec(model={"config": one}, batch={"micro": 2, "sequence": 64})).parameters.total
    h, heads, wide, f = 128, 4, 4 * 32, 256
    attention, mlp = 4 * h * wide + h, (3 if name == "flan-t5" else 2) * h * f + h
    assert whole - single == 2 * (attention + mlp) + (2 if name == "t5" else 1) * (2 * attention + mlp)
    tables = 600 * h * (2 if name == "flan-t5" else 1)
    assert single == tables + 3 * attention + 2 * mlp + 2 * 32 * heads + 2 * h  # two biases, two last norms


def test_decoder_length_defaults_to_the_encoders_or_to_its_positions() -> None:
    assert estimate(run("t5")).run.batch.target_sequence == 64
    assert estimate(run("bart")).run.batch.target_sequence == 64  # as in a trace, though it has learned positions
    assert estimate(run("whisper")).run.batch.target_sequence == 96
    assert estimate(run("whisper")).run.batch.sequence == 200
    assert estimate(run("vit")).run.batch.sequence == (112 // 8) ** 2 + 1
    assert estimate(run("bert")).run.batch.target_sequence is None
    short = estimate(run("t5", batch={"micro": 2, "sequence": 64, "target_sequence": 16}))
    assert short.bytes.allocated < estimate(run("t5")).bytes.allocated


@pytest.mark.parametrize("name", ["bert", "t5", "whisper"])
def test_a_grid_of_batches_and_lengths_is_what_each_run_is(name: str) -> None:
    whole = run(name, method="lora", kernels={"checkpointing": "none"})
    sequences = [whole.batch.sequence] if name == "whisper" else [16, 64, 250]
    found = grid(whole, batch=[1, 3], sequence=sequences)
    for i, batch in enumerate((1, 3)):
        for j, sequence in enumerate(sequences):
            lengths = whole.batch.model_copy(update={"micro": batch, "sequence": sequence})
            one = whole.model_copy(update={"batch": lengths})
            assert found.allocated[i, j] == estimate(one).bytes.allocated


def test_a_classification_head_trains_with_the_adapters_and_is_unquantised() -> None:
    for name, h, classes in (("bert", 128, 2), ("vit", 128, 2)):
        objective = "sequence_classification" if name == "bert" else "image_classification"
        with_head, without = (
            estimate(run(name, method=kind, objective=one)).parameters.trainable
            for kind, one in (("lora", objective), ("lora", "feature_extraction"))
        )
        pooler = 16 * (h + h)  # adapters on the pooler of the bare model; BERT for classification has one too
        assert with_head == without + classes * (h + 1) - (pooler if name == "vit" else 0)
        graph = decide(run(name, method="qlora", objective=objective)).structure.graph
        stored = {w.name for op in operations_of(graph)[0].after for w in op.weights if w.stored}
        assert not any("classifier" in one for one in stored)
    assert modules_to_train("masked_lm", ("x",)) == ("x",)
    assert modules_to_train("token_classification", ("x",)) == ("x", "classifier")
    assert modules_to_train("token_classification", ("classifier",)) == ("classifier",)


def test_a_decoder_that_classifies_has_scores_in_place_of_its_head() -> None:
    whole, scored = (estimate(run("llama", objective=one)) for one in ("causal_lm", "sequence_classification"))
    assert whole.parameters.total - scored.parameters.total == 600 * 128 - 1 * 128
    assert scored.bytes.allocated < whole.bytes.allocated
    adapted = (run("llama", method="lora", objective=one) for one in ("causal_lm", "sequence_classification"))
    less, more = (estimate(one).parameters.trainable for one in adapted)
    assert more - less == 1 * 128  # its copy trains
    with pytest.raises(SpecError, match="fused only applies to causal language models"):
        estimate(run("llama", objective="sequence_classification", kernels={"loss": "fused"}))


def test_t5s_second_matrix_is_never_quantised() -> None:
    stack, _ = operations_of(decide(run("flan-t5", method="qlora")).structure.graph)
    stored = {
        w.name.split(".")[-2] for r in stack.runs for b in r.blocks for op in b.ops for w in op.weights if w.stored
    }
    assert {"wi_0", "wi_1", "q", "k", "v", "o"} <= stored
    assert not {"wo", "lm_head"} & stored


def test_flan_t5_has_an_untied_head_and_t5_a_tied_one() -> None:
    own = estimate(run("flan-t5")).parameters.total
    tied = program(decide(RunSpec(model={"config": {**SMALL["flan-t5"], "tie_word_embeddings": True}})).structure)
    assert own - tied.counts.total == 600 * 128


def test_whispers_table_of_sines_does_not_train() -> None:
    found = estimate(run("whisper")).parameters
    assert found.total - found.trainable == 200 * 128


def test_images_have_one_token_per_patch_and_a_class_token() -> None:
    def tokens(**sizes: Any) -> int | None:
        return ModelSpec({**SMALL["vit"], **sizes}).only_sequence

    assert tokens(image_size=[64, 32], patch_size=16) == 4 * 2 + 1
    assert tokens(image_size=100, patch_size=[30, 20]) == 3 * 5 + 1
    for wrong in ({"image_size": "large"}, {"patch_size": [8]}, {"patch_size": 0}, {"patch_size": 200}):
        with pytest.raises(ConfigError):
            tokens(**wrong)


def test_encoder_attention_costs_twice_the_flops_of_causal_attention() -> None:
    """The products q k^T and p v take 4 b a s s d operations forward, and 10 b a s s d backward."""
    b, s, a, d = 2, 64, 4, 32
    products = [
        p.operations
        for p in work(run("bert", method="full", kernels={"checkpointing": "none"})).products
        if p.attention
    ]
    assert set(products) == {4 * b * a * s * s * d, 10 * b * a * s * s * d}
