"""The command: options become a run, every error is one line with its exit code, the output fits its reader."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from csv import DictReader
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
from typer.main import get_command

import memplan
from memplan.catalogue.profiles.engines import engine_names
from memplan.catalogue.profiles.profiles import PROFILES
from memplan.cli.app import app
from memplan.cli.estimate import ESTIMATE_OPTIONS
from memplan.cli.help import SCREEN, TOPICS
from memplan.cli.plain import COMMANDS
from memplan.cli.typer_commands import parameters
from memplan.core.identity import Identity
from memplan.core.version import __version__
from memplan.engine.native import library
from memplan.report.csv import written
from memplan.report.schema import plan_model, run_schema
from memplan.resolve.request import spec_of
from memplan.spec.fields import field_of
from memplan.spec.options import FIELDS
from memplan.spec.run import RunSpec
from memplan.spec.training import Kernels, MethodKind
from tests.sampling import sampled

COMMAND = get_command(app)
QLORA = ("qwen2-7b", "--method", "qlora", "--gpu", "3090")
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Memplan = Callable[..., Ran]


@pytest.fixture(name="memplan_")
def _memplan(capsys: pytest.CaptureFixture[str]) -> Memplan:
    def run(*args: str) -> Ran:
        with pytest.raises(SystemExit) as left:
            COMMAND.main(list(args))
        code = left.value.code
        assert isinstance(code, int)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


def fails(ran: Ran, code: int, *words: str) -> None:
    """Assert exit code `code`, empty standard output, and one line on standard error with all of `words`."""
    assert ran.code == code, ran
    assert ran.out == ""
    assert ran.err.count("\n") == 1
    assert ran.err.startswith("memplan: ")
    assert [word for word in words if word not in ran.err] == [], ran.err


def run_of(ran: Ran) -> dict[str, Any]:
    return json.loads(ran.out)["run"]


# --- from options to a run ---


def test_a_model_is_short_for_estimating_it(memplan_: Memplan) -> None:
    short = memplan_(*QLORA, "--json")
    assert short == memplan_("estimate", *QLORA, "--json")
    assert short.code == 0
    assert memplan_("--json", *QLORA) == short


def test_the_command_answers_as_the_library_does(memplan_: Memplan) -> None:
    answer = memplan.estimate(RunSpec.model_validate({"model": "qwen2-7b", "method": "qlora", "gpu": "3090"}))
    assert json.loads(memplan_(*QLORA, "--json").out) == json.loads(answer.model_dump_json())


def test_an_unexpected_error_is_one_line_that_asks_for_a_report(
    memplan_: Memplan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(given: object) -> int:
        raise KeyError("mask\n")

    monkeypatch.setattr("memplan.cli.estimate.estimate", broken)
    fails(
        memplan_(*QLORA), 2, "contradicts itself", "KeyError", "mask", "test_command.py", "report this run at https://"
    )
    monkeypatch.setenv("MEMPLAN_TRACEBACK", "1")
    with pytest.raises(KeyError):
        COMMAND.main(list(QLORA))


OPTIONS = {
    "--batch-size 3": ("batch.micro", 3),
    "--seq-len 512": ("batch.sequence", 512),
    "--grad-accum 4": ("batch.accumulation", 4),
    "--method lora --rank 8": ("method.rank", 8),
    "--method lora --targets q_proj,v_proj": ("method.targets", ["q_proj", "v_proj"]),
    "--method lora --targets all-linear": ("method.targets", "all-linear"),
    "--method lora --lora-dropout 0.1": ("method.dropout", 0.1),
    "--method lora --modules-to-save lm_head": ("method.modules_to_save", ["lm_head"]),
    "--method freeze --trainable-layers 3": ("method.trainable_layers", 3),
    "--method qlora --quant-format fp4": ("method.quantization.format", "fp4"),
    "--method qlora --no-double-quant": ("method.quantization.double_quant", False),
    "--method qlora --kbit-preparation trl": ("method.quantization.kbit_preparation", "trl"),
    "--method qlora --kbit-preparation false": ("method.quantization.kbit_preparation", False),
    "--dtype fp16": ("precision.weights", "fp16"),
    "--precision amp": ("precision.weights", "fp32"),
    "--precision amp --dtype fp16": ("precision.compute", "fp16"),
    "--precision amp --dtype fp32": ("precision.compute", "bf16"),
    "--precision autocast": ("precision.autocast", True),
    "--precision autocast --dtype fp16": ("precision.weights", "fp16"),
    "--precision mixed": ("precision.master", "fp32"),
    "--optimizer sgd": ("optimizer.name", "sgd"),
    "--optimizer adamw_torch --no-foreach": ("optimizer.foreach", False),
    "--in-backward": ("optimizer.in_backward", True),
    "--checkpointing none": ("kernels.checkpointing", "none"),
    "--checkpointing full --gradient-checkpointing": ("kernels.checkpointing", "full"),
    "--reentrant": ("kernels.reentrant", True),
    "--attention eager": ("kernels.attention", "eager"),
    "--loss chunked": ("kernels.loss", "chunked"),
    "--no-gradient-checkpointing": ("kernels.checkpointing", "none"),
    "--gradient-checkpointing": ("kernels.checkpointing", "full"),
    "--hold-outputs": ("loop.hold_outputs", True),
    "--trainer": ("loop.trainer", True),
    "--padded": ("loop.padded", True),
    "--profile transformers-5": ("profile", "transformers-5"),
    "--gpu a800": ("gpu", "a800-sxm-80gb"),
}


@pytest.mark.parametrize(("options", "expected"), OPTIONS.items())
def test_an_option_sets_its_field(memplan_: Memplan, options: str, expected: tuple[str, object]) -> None:
    value: Any = run_of(memplan_("qwen2-7b", *options.split(), "--json"))
    for part in expected[0].split("."):
        value = value[part]
    assert value == expected[1]


def test_every_field_an_option_sets_is_one_of_a_run() -> None:
    schema = run_schema()
    for path in FIELDS.values():
        node = schema
        for part in path.split("."):
            options = [node, *node.get("anyOf", ())]
            names = [option["$ref"].rpartition("/")[2] for option in options if "$ref" in option]
            node = (schema["$defs"][names[0]] if names else node)["properties"][part]


PARAMETERS = {parameter.name: parameter for parameter in parameters(Identity(ESTIMATE_OPTIONS))}


def completed(option: str) -> list[str]:
    with COMMAND.make_context("memplan", ["qwen2-7b"]) as context:
        return [item.value for item in PARAMETERS[option].shell_complete(context, "")]


def test_the_choices_of_an_option_are_those_of_its_field() -> None:
    assert set(completed("method")) == {*get_args(MethodKind), "generate", "forward"}
    assert set(completed("cache_implementation")) < set(field_of("generation.cache_implementation").choices)
    for name in ("attention", "loss"):
        words = str(Kernels.model_fields[name].annotation)
        assert set(completed(name)) == set(re.findall(r"'(\w+)'", words))
    assert completed("profile") == [*(profile.name for profile in PROFILES), *engine_names()]


PARALLEL = {
    "--gpus 8 --zero 3": {"world": 8, "dp": 8, "strategy": "zero3"},
    "--gpus 8 --zero 0": {"world": 8, "dp": 8, "strategy": "ddp"},
    "--gpus 8 --tp 2 --pp 2": {"world": 8, "dp": 2, "tp": 2, "pp": 2, "strategy": "ddp"},
    "--tp 4": {"world": 4, "dp": 1, "tp": 4},
    "--gpus 4 --fsdp full_shard": {"world": 4, "dp": 4, "strategy": "fsdp"},
    "--gpus 16 --fsdp hybrid_shard": {"world": 16, "dp": 16, "strategy": "fsdp", "shard_group": 8},
    "--gpus 4 --fsdp hybrid_shard": {"world": 4, "dp": 4, "strategy": "fsdp", "shard_group": 4},
    "--gpus 4 --fsdp shard_grad_op": {
        "world": 4,
        "dp": 4,
        "strategy": "fsdp",
        "reshard_after_forward": False,
    },
    "--gpus 4 --fsdp fsdp2 --cp 2": {"world": 4, "dp": 2, "cp": 2, "strategy": "fsdp2"},
    "--gpus 4 --ep 4": {"world": 4, "dp": 4, "ep": 4, "strategy": "ddp"},
    "--offload optimizer,parameters": {"offload": {"optimizer": True, "parameters": True}},
}


@pytest.mark.parametrize(("options", "expected"), PARALLEL.items())
def test_options_of_several_gpus_divide_the_world(options: str, expected: dict[str, object]) -> None:
    words = options.split()
    typed = {name.lstrip("-"): int(v) if v.isdigit() else v for name, v in zip(words[::2], words[1::2], strict=True)}
    fields = spec_of({"model": "qwen2-7b", **typed})
    assert fields["parallelism"] == expected
    run = RunSpec.model_validate(fields).parallelism
    assert run.world == run.dp * run.tp * run.pp * run.cp or "gpus" not in typed


@pytest.mark.parametrize(
    "options",
    [
        "--tp 2 --profile transformers-4.48",
        "--offload optimizer --gpus 2",
    ],
)
def test_unsupported_features_are_named_as_such(memplan_: Memplan, options: str) -> None:
    fails(memplan_("qwen2-7b", *options.split()), 2, "parallelism", "not supported yet")


STAGES = ("llama-3.2-1b", "--pp=4", "--grad-accum=8", "--seq-len=128", "--gpu=3090", "--profile=megatron-core")


@pytest.mark.parametrize("format", ["table", "markdown", "csv", "html", "json"])
def test_all_ranks_are_shown_on_request(memplan_: Memplan, format: str) -> None:
    alone, ranks = (memplan_(*STAGES, "--format", format, *more) for more in ((), ("--ranks",)))
    assert alone.code == ranks.code == 0
    if format == "json":
        found = [(rank["stage"], rank["layers"], rank["in_flight"]) for rank in json.loads(ranks.out)["ranks"]]
        assert ranks.out == alone.out
    elif format == "csv":
        found = [
            (int(row["stage"]), int(row["layers"]), int(row["in_flight"])) for row in DictReader(io.StringIO(ranks.out))
        ]
        assert "in_flight" not in alone.out
    else:
        cells = [re.sub(r"[|*]|<[^>]+>", " ", line).split() for line in ranks.out.replace("<tr>", "\n").splitlines()]
        found = [(*map(int, row[:3]),) for row in cells if len(row) > 6 and row[0].isdigit() and row[5] == "fits"]
        assert re.findall(r"in flight *[<|]", alone.out) == []
    assert found == [(0, 4, 4), (1, 4, 3), (2, 4, 2), (3, 4, 1)]


def test_one_gpu_has_no_other_ranks_to_show(memplan_: Memplan) -> None:
    plain, ranks = (memplan_("llama-3.2-1b", "--gpu", "3090", *more) for more in ((), ("--ranks",)))
    assert plain == ranks


def test_one_pipeline_stage_can_be_requested(memplan_: Memplan) -> None:
    run = run_of(memplan_(*STAGES, "--stage", "2", "--json"))
    assert (run["parallelism"]["stage"], run["parallelism"]["schedule"]) == (2, "1f1b")
    fails(memplan_(*STAGES, "--stage", "4"), 2, "parallelism.stage (--stage)", "0 to 3")


@pytest.mark.parametrize("method", ["generate", "forward"])
def test_inference_is_a_task(memplan_: Memplan, method: str) -> None:
    assert spec_of({"model": "qwen2-7b", "method": method}) == {"model": "qwen2-7b", "task": method}


@pytest.mark.parametrize(
    "options", ["--gradient-checkpointing --checkpointing none", "--no-gradient-checkpointing --checkpointing full"]
)
def test_checkpointing_is_not_both_on_and_off(memplan_: Memplan, options: str) -> None:
    fails(memplan_("qwen2-7b", *options.split()), 2, "kernels.checkpointing", "exclude each other")


def test_options_can_undo_a_files_offloading() -> None:
    spec = {"model": "qwen2-7b", "parallelism": {"offload": {"parameters": True, "optimizer": True}}}
    assert spec_of({"offload": "none"}, spec)["parallelism"]["offload"] == {}
    assert spec_of({"offload": "none,activations"}, spec)["parallelism"]["offload"] == {"activations": True}
    assert spec["parallelism"] == {"offload": {"parameters": True, "optimizer": True}}


# --- spec files ---


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_spec_file_is_a_run(memplan_: Memplan, tmp_path: Path, suffix: str) -> None:
    spec = tmp_path / f"run.{suffix}"
    spec.write_text('{"model": "qwen2-7b", "method": "qlora", "gpu": "3090", "batch": {"sequence": 512}}')
    run = run_of(memplan_("--spec", str(spec), "--json"))
    assert (run["model"], run["method"]["kind"], run["batch"]["sequence"], run["gpu"]) == (
        "qwen2-7b",
        "qlora",
        512,
        "rtx-3090",
    )


def test_a_yaml_number_may_name_a_gpu(memplan_: Memplan, tmp_path: Path) -> None:
    spec = tmp_path / "run.yaml"
    spec.write_text("model: qwen2-7b\nmethod: qlora\ngpu: 3090\n")
    assert run_of(memplan_("--spec", str(spec), "--json"))["gpu"] == "rtx-3090"


def test_options_override_a_spec_file(memplan_: Memplan, tmp_path: Path) -> None:
    spec = tmp_path / "run.yaml"
    spec.write_text(
        "model: qwen2-7b\nmethod: qlora\nprecision: amp\noptimizer: sgd\nbatch: {micro: 2, sequence: 512}\n"
    )
    typed = ("--rank", "4", "--batch-size", "3", "--gpu", "h100", "--dtype", "fp16")
    run = run_of(memplan_("qwen3-8b", "--spec", str(spec), *typed, "--json"))
    assert (run["model"], run["gpu"], run["optimizer"]["name"]) == ("qwen3-8b", "h100-sxm", "sgd")
    assert (run["method"]["kind"], run["method"]["rank"]) == ("qlora", 4)
    assert (run["batch"]["micro"], run["batch"]["sequence"]) == (3, 512)
    assert (run["precision"]["weights"], run["precision"]["compute"]) == ("fp32", "fp16")


CHANGES: dict[str, tuple[str, str]] = {
    "--method full": ("qlora", "{kind: full}"),
    "--method freeze": ("{kind: lora, rank: 8}", "{kind: freeze}"),
    "--method lora": ("{kind: qlora, rank: 8, quantization: {format: int8}}", "{kind: lora, rank: 8}"),
    "--method qlora": ("{kind: freeze, trainable_layers: 3}", "qlora"),
    "--method dora": ("{kind: lora, rank: 8, targets: [q_proj]}", "{kind: dora, rank: 8, targets: [q_proj]}"),
    "--optimizer adamw_8bit": (
        "full, optimizer: {name: sgd, momentum: 0.9, foreach: true}",
        "full, optimizer: adamw_8bit",
    ),
    "--dtype fp16": ("full, precision: {weights: bf16, compute: bf16, grads: bf16}", "full, precision: fp16"),
}


@pytest.mark.parametrize(("typed", "files"), CHANGES.items())
def test_an_option_that_replaces_a_files_choice_drops_its_settings(
    memplan_: Memplan, tmp_path: Path, typed: str, files: tuple[str, str]
) -> None:
    phases: list[Any] = []
    for text, options in ((files[0], typed.split()), (files[1], [])):
        (tmp_path / "run.yaml").write_text(f"{{model: qwen2-0.5b, method: {text}}}")
        phases.append(json.loads(memplan_("--spec", str(tmp_path / "run.yaml"), "--json", *options).out)["phases"])
    assert phases[0] == phases[1]


def test_options_do_not_hide_a_files_error(memplan_: Memplan, tmp_path: Path) -> None:
    spec = tmp_path / "run.yaml"
    spec.write_text("{model: qwen2-0.5b, method: {kind: lora, rnk: 8}}")
    fails(memplan_("--spec", str(spec), "--method", "full"), 2, "method.rnk: no such key")
    spec.write_text("{model: qwen2-0.5b, method: {kind: full, rank: 8}}")
    fails(memplan_("--spec", str(spec), "--method", "full"), 2, "method.rank: method.kind full has no adapters")


@pytest.mark.parametrize("method", sampled(["qlora", "full", "lora", "freeze"]))
def test_an_answers_run_can_be_asked_again_another_way(memplan_: Memplan, tmp_path: Path, method: str) -> None:
    spec = tmp_path / "again.json"
    spec.write_text(json.dumps(run_of(memplan_("qwen2-0.5b", "--method", method, "--json"))))
    for typed in ("--method dora --rank 4", "--method full", "--optimizer lomo", "--dtype fp16", "--precision amp"):
        assert memplan_("--spec", str(spec), *typed.split()).code == 0, typed


def test_an_answers_run_is_a_spec_that_gives_the_same_answer(memplan_: Memplan, tmp_path: Path) -> None:
    answer = json.loads(memplan_(*QLORA, "--seq-len", "777", "--json").out)
    spec = tmp_path / "again.json"
    spec.write_text(json.dumps(answer["run"]))
    assert json.loads(memplan_("--spec", str(spec), "--json").out) == answer


BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 8)}]\n" for i in range(8)
)
BAD_SPECS = {
    "an alias bomb": (BOMB, "more than 10,000 values"),
    "an alias in itself": ("model: &m [*m]", "contains itself"),
    "nesting without end": ("model: " + "[" * 70 + "]" * 70, "64 levels"),
    "a huge file": ("#" * (2**20 + 1), "larger than 1 MiB"),
    "code": ('model: !!python/object/apply:os.system ["true"]', "not YAML"),
    "no YAML": ("model: [qwen2-7b", "not YAML"),
    "no whole number": ('model: !!int ""', "its tag does not allow"),
    "no truth value": ("model: !!bool abc", "its tag does not allow"),
    "no timestamp": ("model: !!timestamp abc", "its tag does not allow"),
    "a format that is a mapping": ("{model: qwen2-7b, method: {quantization: {format: {a: 1}}}}", "format: unknown"),
    "an impossible date": ("model: 2001-99-99", "month must be in 1..12"),
    "a date": ("model: 2001-01-01", "that JSON cannot represent"),
    "a set": ("model: {config: {a: !!set {x}}}", "that JSON cannot represent"),
    "not a number": ("model: qwen2-7b\nmethod: {alpha: .nan}", "that JSON cannot represent"),
    "a number without end": ("model: qwen2-7b\nbatch: {micro: 0x" + "f" * 9000 + "}", "that JSON cannot represent"),
    "a large number": ("model: qwen2-7b\nbatch: {micro: 0x" + "f" * 90 + "}", "batch.micro: must be at most"),
    "a key that is a number": ("model: qwen2-7b\nbatch: {1: 2}", "batch.1: no such key"),
    "a list": ("[1, 2]", "must be a mapping"),
    "nothing": ("", "is empty"),
    "no model": ("gpu: '3090'", "model: name one"),
    "an unknown key": ("model: qwen2-7b\nmethud: lora", "methud: no such key; did you mean method?"),
    "an unknown key further in": ("model: qwen2-7b\nmethod: {rnk: 8}", "method.rnk: no such key; did you mean rank?"),
    "a word for a number": ("model: qwen2-7b\nbatch: {micro: two}", "batch.micro: must be a whole number, not 'two'"),
    "a number for a part": ("model: qwen2-7b\nbatch: 2", "batch: must be a mapping, not 2"),
    "a number for a model": ("model: 3", "model: must be a string"),
    "a key twice": ("model: qwen2-7b\nmodel: gpt2", "the key 'model' appears twice, again in line 2"),
    "a key twice further in": ("model: qwen2-7b\nbatch: {micro: 1, micro: 2}", "the key 'micro' appears twice"),
    "a key of a part": ("model: qwen2-7b\nrank: 8", "rank: no such key; did you mean method.rank?"),
    "an option for a key": ("model: qwen2-7b\nseq_len: 8", "seq_len: no such key; did you mean batch.sequence?"),
    "a key without letters": ("model: qwen2-7b\n'': 1", "'': no such key; choose from model"),
    "a key with an escape": ('model: qwen2-7b\n"a\\x1b[31mb\\n": 1', r"a\x1b[31mb\n: no such key"),
    "a key without end": ("model: qwen2-7b\n? " + "k" * 9000 + "\n: 1", "k...: no such key"),
    "two documents": ("model: qwen2-7b\n---\nmodel: gpt2", "line 2, column 1: found another document"),
    "a control character": ("model: \a", "control characters are not allowed"),
    "a word for a switch": ("model: qwen2-7b\nloop: {padded: 'yes'}", "loop.padded: must be true or false, not 'yes'"),
    "a list for a word": ("model: qwen2-7b\nmethod: [lora]", "method: must be a name or a mapping, not ['lora']"),
    "no value": ("model: qwen2-7b\nmethod:", "method: must be a name or a mapping, not null"),
    "a word for targets": (
        "model: qwen2-7b\nmethod: {kind: lora, targets: q_proj}",
        "method.targets: the regular expression 'q_proj' matches no layer",
    ),
    "a number for a target": (
        "model: qwen2-7b\nmethod: {kind: lora, targets: [1]}",
        "method.targets: must be a string, not 1",
    ),
    "a word for modules": (
        "model: qwen2-7b\nmethod: {kind: lora, modules_to_save: lm_head}",
        "method.modules_to_save: must be a list of names, not 'lm_head'",
    ),
    "a truth for a GPU": ("model: qwen2-7b\ngpu: true", "gpu: must be a string, not true"),
    "a model without a config": ("model: {}", "model.config: is missing"),
    "a model whose config is none": ("model: {config: [1]}", "model.config: must be a mapping, not [1]"),
    "a model with another key": ("model: {confg: {}}", "model.confg: no such key; did you mean config?"),
    "a size there is none of": (
        "model: qwen2-7b\nmethod: {kind: qlora, quantization: {block_size: 65}}",
        "block_size: unknown 65; did you mean 64?",
    ),
}


@pytest.mark.parametrize(("text", "expected"), BAD_SPECS.values(), ids=BAD_SPECS.keys())
def test_a_bad_spec_is_one_line(memplan_: Memplan, tmp_path: Path, text: str, expected: str) -> None:
    spec = tmp_path / "run.yaml"
    spec.write_text(text)
    fails(memplan_("--spec", str(spec)), 2, expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not JSON"),
        ('{"model": NaN}', "NaN"),
        ("[1]", "not a JSON object"),
        ("[" * 5000, "nested too deeply"),
        ("\n", "it is empty"),
        ('{"model": ' + "9" * 5000 + "}", "too many digits"),
        ('{"model": "qwen2-7b", "model": "gpt2"}', "the key 'model' appears twice"),
        ('{"model": "qwen2-7b", "batch": {"micro": 1, "micro": 2}}', "the key 'micro' appears twice"),
    ],
)
def test_a_bad_json_spec_is_one_line(memplan_: Memplan, tmp_path: Path, text: str, expected: str) -> None:
    spec = tmp_path / "run.json"
    spec.write_text(text)
    fails(memplan_("--spec", str(spec)), 2, expected)


def test_a_spec_that_cannot_be_read_is_one_line(memplan_: Memplan, tmp_path: Path) -> None:
    fails(memplan_("--spec", str(tmp_path / "none.yaml")), 2, "No such file")
    fails(memplan_("--spec", str(tmp_path)), 2, "directory")
    fails(memplan_("--spec", "~no-such-user/run.yaml"), 2, "home directory")
    fails(memplan_("--spec", "a\0b\x1b.json"), 2, r"'a\x00b\x1b.json'", "null byte")
    (tmp_path / "run.yaml").symlink_to(tmp_path / "run.yaml")
    fails(memplan_("--spec", str(tmp_path / "run.yaml")), 2, "symbolic links")
    (tmp_path / "run.yaml").unlink()
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    fails(memplan_("--spec", str(tmp_path / "run.yaml")), 2, "not text in UTF-8")


def test_numbers_with_an_exponent_are_numbers(memplan_: Memplan, tmp_path: Path) -> None:
    spec = tmp_path / "run.yaml"
    spec.write_text(
        "model: qwen2-0.5b\nmethod: {kind: lora, alpha: 1e1, dropout: 1e-1}\nloop: {clip_grad_norm: 5E-1}\n"
    )
    run = run_of(memplan_("--spec", str(spec), "--json"))
    assert (run["method"]["alpha"], run["method"]["dropout"], run["loop"]["clip_grad_norm"]) == (10.0, 0.1, 0.5)


def test_a_spec_from_standard_input(memplan_: Memplan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"model: qwen2-0.5b\ngpu: 3090\n")))
    assert run_of(memplan_("--spec", "-", "--json"))["gpu"] == "rtx-3090"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    fails(memplan_("--spec", "-"), 2, "standard input is not text in UTF-8")
    monkeypatch.setattr(sys, "stdin", None)
    fails(memplan_("--spec", "-"), 2, "standard input is closed")


def test_a_deep_config_inside_a_spec_is_one_line(memplan_: Memplan, tmp_path: Path) -> None:
    spec = tmp_path / "run.json"
    spec.write_text('{"model": {"config": ' + '{"a": ' * 450 + "1" + "}" * 450 + "}}")
    fails(memplan_("--spec", str(spec)), 2)


# --- mistyped options ---

MISTAKES = {
    "": ("model", "qwen2-7b --method qlora --gpu 3090"),
    "qwen2-7c": ("model", "did you mean qwen2-7b"),
    "qwen2-7b --gpu rtx-3091": ("gpu (--gpu)", "rtx-3090"),
    "qwen2-7b --method qlra": ("method.kind (--method)", "did you mean qlora?"),
    "qwen2-7b --optimizer adamw_troch": ("optimizer.name (--optimizer)", "adamw_torch"),
    "qwen2-7b --method lora --targets q_prj": ("method.targets (--targets)", "q_proj"),
    "qwen2-7b --method lora --modules-to-save lm_hed": ("method.modules_to_save (--modules-to-save)", "lm_head"),
    "qwen2-7b --batch-size -1": ("batch.micro (--batch-size)", "at least 1, not -1"),
    "qwen2-7b --batch-size 0": ("batch.micro (--batch-size)", "at least 1, not 0"),
    "qwen2-7b --batch-size two": ("--batch-size", "must be a whole number, not 'two'"),
    "qwen2-7b --batch-size 1.5": ("--batch-size", "whole number"),
    "qwen2-7b --batch-size 99999999999999999999": ("batch.micro (--batch-size)", "at most"),
    "qwen2-7b --seq-len 0": ("batch.sequence (--seq-len)", "at least 1"),
    "gpt2 --seq-len 1025": ("batch.sequence (--seq-len)", "1024"),
    "qwen2-7b --grad-accum 0": ("batch.accumulation (--grad-accum)", "at least 1"),
    "qwen2-7b --method lora --rank 9999": ("method.rank (--rank)", "larger than the smaller side"),
    "qwen2-7b --method lora --lora-dropout 1": ("method.dropout (--lora-dropout)", "less than 1"),
    "qwen2-7b --method lora --lora-dropout nan": ("method.dropout (--lora-dropout)", "must be a number"),
    "qwen2-7b --method qlora --quant-format nf5": ("method.quantization.format (--quant-format)", "nf4"),
    "qwen2-7b --method qlora --quant-format awq": ("method.quantization.format", "awq-int4"),
    "qwen2-7b --method qlora --kbit-preparation no": ("kbit_preparation (--kbit-preparation)", "true, false, trl"),
    "qwen2-7b --precision ampp": ("precision (--precision)", "amp"),
    "qwen2-7b --precision mixed --dtype fp32": ("precision (--precision)", "bf16 or fp16"),
    "qwen2-7b --dtype fp8": ("precision.weights (--dtype)", "write bf16 (quantised weights: --method qlora, --stored)"),
    "qwen2-7b --method rm": ("method.kind (--method)", "choose from full, freeze, lora, qlora"),
    "qwen2-7b --attention sdpaa": ("kernels.attention (--attention)", "did you mean sdpa?"),
    "qwen2-7b --loss fusd": ("kernels.loss (--loss)", "did you mean fused?"),
    "qwen2-7b --gpu v100 --attention flash_attention_2": ("kernels.attention (--attention)", "capability"),
    "qwen2-7b --profile transformers-9": ("profile (--profile)", "transformers-5"),
    "qwen2-7b --zero 4 --gpus 2": ("parallelism.strategy (--zero)", "0 to 3"),
    "qwen2-7b --zero 1 --fsdp full_shard": ("parallelism.strategy", "exclude"),
    "qwen2-7b --fsdp full_shrd": ("parallelism.strategy (--fsdp)", "full_shard"),
    "qwen2-7b --gpus 3 --tp 2": ("parallelism.world (--gpus)", "3 GPUs do not divide into groups of 2"),
    "qwen2-7b --offload disk": ("parallelism.offload (--offload)", "optimizer"),
    "qwen2-7b --method generate --profile litgpt --gpus 2": (
        "parallelism.dp",
        "tp (--tp) or a device_map (--device-map)",
    ),
    "qwen2-7b --new-tokens 5": ("batch.new_tokens (--new-tokens)", "only task generate"),
    "qwen2-7b --rank 8": ("method.rank (--rank)", "full has no adapters; lora, qlora"),
    "qwen2-7b --rank 16": ("method.rank (--rank)", "full has no adapters"),
    "qwen2-7b --targets all-linear": ("method.targets (--targets)", "full has no adapters"),
    "qwen2-7b --method freeze --lora-dropout 0": ("method.dropout (--lora-dropout)", "freeze has no adapters"),
    "qwen2-7b --method freeze --modules-to-save x": ("(--modules-to-save)", "freeze has no adapters"),
    "qwen2-7b --method lora --trainable-layers 2": ("method.trainable_layers (--trainable-layers)", "freeze"),
    "qwen2-7b --method lora --quant-format nf4": ("method.quantization (--quant-format)", "use qlora"),
    "qwen2-7b --method qlora --quant-format int8 --double-quant": ("double_quant (--double-quant)", "int8"),
    "qwen2-7b --method lora --targets all_linear": ("method.targets (--targets)", "did you mean all-linear"),
    "qwen2.5-1.5b --trainer gkd --teacher qwen2.5-7b": (
        "roles.teacher.model (--teacher)",
        "its vocabulary has 152,064",
    ),
    "qwen2-vl-2b --method shadow": ("method.kind (--method)", "shadow is counted for causal_lm of decoders"),
    "qwen2-7b --method forward --loss fused": ("kernels.loss (--loss)", "task forward has no loss"),
    "qwen2-7b --profile transformers-4.2": ("profile (--profile)", "did you mean transformers-4.35"),
    "qwen2-7b --precision bf16 --dtype fp16": ("precision (--precision)", "differ"),
    "qwen2-7b --optimizer adamw_torhc": ("optimizer.name (--optimizer)", "adamw_torch"),
    "qwen2-7b --method lora --quant-format awq": (
        "method.quantization.format (--quant-format)",
        "did you mean awq-int4",
    ),
    "qwen2-7b --method generate --stored Q8_0": ("serving (--stored)", "profiles of engines are vllm, sglang, tgi and"),
    "qwen2-7b --tp 99999999999999999999": ("parallelism.tp (--tp)", "at most"),
    "qwen2-7b --gpus 99999999999999999999": ("parallelism.world (--gpus)", "at most"),
    "qwen2-7b --tp 3": ("parallelism.tp (--tp)", "3 does not divide 28 attention heads and 4 key/value heads"),
    "qwen2-7b --pp 3 --profile megatron-core": ("parallelism.pp (--pp)", "pp 3 stages do not divide 28 layers"),
    "qwen2-7b --pp 4 --schedule 1f1b": ("batch.accumulation", "fewer than pp 4"),
    "qwen2-7b --pp 4 --schedule 1f2b": ("parallelism.schedule (--schedule)", "1f1b"),
    "qwen2-7b --gpus 4 --fsdp full_shard --method dora": ("method.kind (--method)", "supported: full, freeze, lora"),
    "qwen2-7b --gpus 2 --fsdp fsdp2 --optimizer adafactor": ("optimizer.name (--optimizer)", "adamw_torch_fused"),
    "qwen2-7b --gpus 2 --fsdp fsdp2 --method qlora": (
        "bf16, fp16, fp32",
        "--quant-storage bf16 packs them into floats",
    ),
    "qwen2-7b --gpus 12 --fsdp hybrid_shard": ("parallelism.shard_group", "12 GPUs do not divide into groups of 8"),
    "qwen2-7b --offload activations --profile trl-0.24": ("parallelism.offload (--offload)", "checkpointing offload"),
    "qwen2-7b --offload activations --profile trl-1.15": ("kernels.checkpointing", "none with activations offloaded"),
    "qwen2-7b --offload activations --gpus 2 --zero 2": ("parallelism.strategy", "ddp, fsdp2"),
    "qwen2-7b --offload optimizer,parameters": ("parallelism.offload (--offload)", "'parameters' is not supported yet"),
    "qwen2-7b --offload optimizer --optimizer adamw_8bit": ("parallelism.offload (--offload)", "adamw_torch"),
    "qwen2-7b --checkpointing offlaod": ("kernels.checkpointing (--checkpointing)", "did you mean offload"),
    "qwen2-7b --method qlora --quant-format hqq-int4 --checkpointing selective": (
        "kernels.checkpointing (--checkpointing)",
        "full",
    ),
    "qwen2-7b --checkpointing none --gradient-checkpointing": ("kernels.checkpointing", "exclude each other"),
    "qwen2-7b --checkpointing offload --no-gradient-checkpointing": ("kernels.checkpointing", "exclude each other"),
    "run.yaml --gpu 3090": ("run.yaml", "cannot be read"),
    "qwen2-7b --output ": ("output (--output)", "''"),
    "qwen2-7b --output a\0b": ("output (--output)", r"'a\x00b'", "null byte"),
    "qwen2-7b --gpu \x1b[31m": ("gpu (--gpu)", r"'\x1b[31m'"),
    "qwen2-7b --format yml": ("format (--format)", "did you mean"),
    "qwen2-7b --json --format csv": ("format", "exclude"),
    "qwen2-7b --gup 3090": ("No such option", "--gpu"),
    "qwen2-7b qwen3-8b": ("unexpected", "qwen3-8b"),
    "a" * 5000: ("unknown name", "aaa"),
    "qwen2-7b --gpu": ("--gpu", "requires an argument"),
    "qwen2-7b --fsdp": ("--fsdp", "requires an argument: full_shard, shard_grad_op"),
    "qwen2-7b --strategy zero3": ("--strategy", "write --zero 3"),
    "qwen2-7b --output /nowhere/at/all.html": ("output", "No such file"),
    "qwen2-7b --format html --date yesterday": ("date", "write 2026-11-29 or today"),
    "qwen2-7b --date today": ("date", "only pages show it"),
    "models nosuchmodel": ("model", "nosuchmodel"),
    "gpus rtx-3091": ("gpu", "rtx-3090"),
    "schema runn": ("schema", "run"),
}


@pytest.mark.parametrize(("typed", "expected"), MISTAKES.items(), ids=[typed[:60] for typed in MISTAKES])
def test_an_error_is_one_line_with_the_field_and_the_fix(
    memplan_: Memplan, typed: str, expected: tuple[str, ...]
) -> None:
    fails(memplan_(*(typed.split(" ") if typed else ())), 2, *expected)


@pytest.mark.parametrize("command", ["emit"])
def test_an_unknown_command_is_not_taken_for_a_model(memplan_: Memplan, command: str) -> None:
    for rest in ((), ("qwen2-7b",), ("--help",)):
        fails(memplan_(command, *rest), 2, f"{command} is not supported yet; commands are estimate, models, gpus")


CONFIGS = {
    "not JSON": ("{not json", "not JSON"),
    "a list": ([], "not a JSON object"),
    "nothing": ("", "not JSON"),
    "no end": ("[" * 5000, "not JSON"),
    "a key missing": ({"hidden_size": None}, "hidden_size"),
    "a string": ({"hidden_size": "64"}, "hidden_size must be a whole number"),
    "not a number": ({"hidden_size": float("nan")}, "hidden_size must be a whole number"),
    "a fraction": ({"hidden_size": 64.5}, "hidden_size must be a whole number"),
    "negative": ({"num_hidden_layers": -1}, "num_hidden_layers"),
    "zero": ({"vocab_size": 0}, "vocab_size"),
    "absurd": ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
    "heads that do not divide": ({"num_attention_heads": 5}, "does not divide"),
    "key heads that do not divide": ({"num_key_value_heads": 3}, "does not divide"),
    "no model_type": ({"model_type": None}, "model_type"),
    "an unknown family": ({"model_type": "lama"}, "did you mean llama"),
    "a family of experts": ({"num_experts": 8}, "mixture of experts"),
}


@pytest.mark.parametrize(("config", "expected"), CONFIGS.values(), ids=CONFIGS.keys())
def test_a_broken_config_is_one_line(memplan_: Memplan, tmp_path: Path, config: Any, expected: str) -> None:
    path = tmp_path / "config.json"
    if isinstance(config, dict):
        config = {k: v for k, v in {**TINY, **config}.items() if v is not None}
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    for given in (path, tmp_path):
        fails(memplan_(str(given), "--via", "engine"), 2, expected)


def test_a_config_as_a_path_is_a_model(memplan_: Memplan, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    by_file = json.loads(memplan_(str(tmp_path / "config.json"), "--json").out)
    by_folder = json.loads(memplan_(str(tmp_path), "--json").out)
    assert by_file["parameters"] == by_folder["parameters"]
    assert by_file["parameters"]["total"] == 2 * 100 * 64 + 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64)


# --- exit codes ---


def test_0_fits_or_no_gpu(memplan_: Memplan) -> None:
    assert memplan_(*QLORA).code == 0
    assert memplan_("qwen2-7b").code == 0


def test_1_does_not_fit_on_any_of_the_gpus(memplan_: Memplan) -> None:
    assert memplan_("qwen2-7b", "--gpu", "3090").code == 1
    assert memplan_("qwen2-7b", "--gpu", "h200", "--gpu", "3090", "--json").code == 1


def test_tight_exits_0_and_1_with_strict(memplan_: Memplan) -> None:
    found = memplan_("qwen2-7b", "--method", "lora", "--json", "--gpu", "rtx-4000-ada")
    assert json.loads(found.out)["verdict"]["answer"] == "tight"
    assert found.code == 0
    assert memplan_("qwen2-7b", "--method", "lora", "--strict", "--gpu", "rtx-4000-ada").code == 1
    assert memplan_(*QLORA, "--strict").code == 0


def test_3_facts_missing(memplan_: Memplan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    fails(memplan_("nobody/nothing"), 3, "model", "nobody/nothing")
    fails(memplan_(str(tmp_path / "config.json")), 2, "config.json")


def test_4_unsupported_and_strict(memplan_: Memplan, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = memplan.estimate

    def estimate(run: RunSpec, calibration: object, model: object = None) -> memplan.Estimate:
        answer = asked(run)
        vars(answer)["unsupported"] = ("a kernel nobody has measured",)
        return answer

    monkeypatch.setattr(sys.modules["memplan.estimate.estimate"], "estimate", estimate)
    loose = memplan_(*QLORA)
    assert loose.code == 0
    assert "a kernel nobody has measured" in loose.out
    assert memplan_(*QLORA, "--strict").code == 4
    assert memplan_("qwen2-7b", "--gpu", "3090", "--strict").code == 4


def test_an_interrupt_is_quiet(memplan_: Memplan, monkeypatch: pytest.MonkeyPatch) -> None:
    def estimate(run: RunSpec, calibration: object, model: object = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["memplan.estimate.estimate"], "estimate", estimate)
    assert memplan_(*QLORA) == Ran(130, "", "")


# --- other commands ---


@pytest.mark.parametrize(
    ("name", "start"),
    [("a.html", "<!DOCTYPE html>"), ("a.md", "**fits"), ("a.csv", "model,"), ("a.json", "{"), ("a.txt", "FITS  ")],
)
def test_a_file_is_written_in_the_format_its_name_says(
    memplan_: Memplan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, start: str
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)  # colour is for the terminal, not for the file
    monkeypatch.setenv("TERM", "xterm")
    assert memplan_(*QLORA, "--output", str(tmp_path / name)) == Ran(0, "", "")
    assert (tmp_path / name).read_text("utf-8").startswith(start)


def test_the_schema_of_an_answer_holds_that_of_a_run(memplan_: Memplan) -> None:
    answer, run = json.loads(memplan_("schema").out), json.loads(memplan_("schema", "run").out)
    resolved = answer["$defs"]["RunSpec"]["properties"]
    assert list(resolved) == list(run["properties"])
    assert resolved["batch"] == run["properties"]["batch"]
    assert run["properties"]["method"]["anyOf"][0] == {"$ref": resolved["method"]["$ref"]}
    assert {name: answer["$defs"][name] for name in run["$defs"]} == run["$defs"]


def test_models_are_listed_and_searched(memplan_: Memplan) -> None:
    everything = memplan_("models").out.splitlines()
    assert len(everything) == 1 + len(memplan.card_names())
    found = json.loads(memplan_("models", "qwen2-7", "--json").out)
    assert [model["name"] for model in found] == ["llava-onevision-qwen2-7b", "qwen2-72b", "qwen2-7b"]
    assert found[2]["parameters"] == 7_615_616_512
    assert found[2]["layers"] == 28
    assert found[2]["licence"] == "apache-2.0"
    assert "qwen2-7b" in memplan_("models", "Qwen/Qwen2-7B").out


def test_a_listing_takes_words_as_they_are_typed(memplan_: Memplan) -> None:
    assert "rtx-4090-laptop" in memplan_("gpus", "RTX", "4090").out
    assert "llama-3.1-70b" in memplan_("models", "llama", "3.1").out
    assert "qwen2-7b" not in memplan_("models", "llama", "3.1").out


def test_gpus_are_listed_and_searched(memplan_: Memplan) -> None:
    found = json.loads(memplan_("gpus", "3090", "--json").out)
    assert [gpu["name"] for gpu in found] == ["rtx-3090", "rtx-3090-ti"]
    assert {"provider", "usd_per_hour", "date"} <= set(found[0]["prices"][0])
    assert found[0]["usable"] == memplan.find_gpu("3090").usable
    assert [gpu["name"] for gpu in json.loads(memplan_("gpus", "NVIDIA GB10", "--json").out)] == ["gb10"]
    row = next(line for line in memplan_("gpus", "rtx-3090").out.splitlines() if line.startswith("rtx-3090 "))
    assert row.split()[1:5] == ["23.68", "8.6", "yes", "936.2"]


def test_help_names_every_option_with_its_default(memplan_: Memplan) -> None:
    ran = memplan_("estimate", "--help")
    assert ran.code == 0
    for parameter in PARAMETERS.values():
        if parameter.param_type_name == "option" and "--help" not in parameter.opts:
            assert parameter.opts[0] in ran.out
            assert "Default " in (parameter.help or "") or parameter.opts[0] in ("--json", "--spec")


def test_help_is_one_screen_that_names_every_command(memplan_: Memplan) -> None:
    for words in (("--help",), ("help",), ("-h",)):
        ran = memplan_(*words)
        assert (ran.code, ran.err) == (0, "")
        assert ran.out.strip() == SCREEN.strip()
    assert len(SCREEN.splitlines()) <= 24
    assert max(map(len, SCREEN.splitlines())) <= 80
    assert [name for name in COMMANDS if not re.search(rf"\b{name}\b", SCREEN)] == []
    assert [topic for topic in TOPICS if not re.search(rf"\b{topic}\b", SCREEN)] == []


@pytest.mark.parametrize("topic", TOPICS)
def test_a_topic_has_the_options_that_belong_to_it(memplan_: Memplan, topic: str) -> None:
    ran = memplan_("help", topic)
    assert (ran.code, ran.err) == (0, "")
    assert [heading for heading in TOPICS[topic].headings if f"{heading}:" not in ran.out] == []
    every = memplan_("--help-all").out
    assert [word for word in re.findall(r"^  (--[\w-]+)", ran.out, re.M) if f"  {word} " not in every] == []


def test_lists_filter_and_sort(memplan_: Memplan) -> None:
    names = [one["name"] for one in json.loads(memplan_("models", "7b", "--json").out)]
    assert "qwen2-7b" in names
    assert [name for name in names if "27b" in name or "397b" in name] == []
    sizes = [one["parameters"] for one in json.loads(memplan_("models", "--min", "7B", "--max", "8B", "--json").out)]
    assert sizes
    assert all(7e9 <= size <= 8e9 for size in sizes)
    cards = json.loads(memplan_("gpus", "--min", "24GiB", "--sort", "price", "--json").out)
    prices = [card["launch_usd"] for card in cards if card["launch_usd"] is not None]
    assert prices == sorted(prices)
    assert all(card["memory_gb"] >= 24 for card in cards)
    of_24 = json.loads(memplan_("gpus", "24gb", "--json").out)
    assert all(24 in (card["memory_gb"], *card["memory_options_gb"]) for card in of_24)
    assert " 7.6B " in memplan_("models", "qwen2-7b").out
    assert memplan_("gpus", "--sort", "size").err.startswith("memplan: sort (--sort): unknown name 'size'")


def test_help_calls_no_option_unsupported() -> None:
    for parameter in PARAMETERS.values():
        panel = getattr(parameter, "rich_help_panel", None) or ""
        assert "refused" not in f"{panel} {parameter.help}", parameter.name


def test_a_listing_in_a_pipe_has_every_column(memplan_: Memplan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    rows = memplan_("models").out.splitlines()
    for name in memplan.card_names():
        assert any(row.startswith(f"{name} ") and row.endswith(memplan.load_card(name).card["hf_id"]) for row in rows)
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, memplan_("models").out.splitlines())) <= 60


def test_version(memplan_: Memplan) -> None:
    replays = "in Python" if library() is None else "compiled"
    text = f"memplan {memplan.__version__}\nreplays of torch's allocator: {replays}\n"
    assert memplan_("--version") == Ran(0, text, "")


COMPLETIONS = {
    "memplan qwen2-7": "qwen2-72b qwen2-7b",
    "memplan gpu": "gpus",
    "memplan --quan": "--quant-format",
    "memplan qwen2-7b --gpu rtx-309": "rtx-3090 rtx-3090-ti",
    "memplan qwen2-7b --method q": "qlora qdora",
    "memplan estimate qwen2-72": "qwen2-72b",
    "memplan qwen2-7b --optimizer lom": "lomo",
    "memplan Qwen/Qwen2-7": "Qwen/Qwen2-7B",
    "memplan models gemma-2-2": "gemma-2-2b",
    "memplan gpus rtx-309": "rtx-3090 rtx-3090-ti",
    "memplan schema r": "run",
}


@pytest.mark.parametrize(("typed", "expected"), COMPLETIONS.items())
def test_the_shell_completes_models_gpus_and_choices(
    memplan_: Memplan, monkeypatch: pytest.MonkeyPatch, typed: str, expected: str
) -> None:
    monkeypatch.setenv("_MEMPLAN_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    assert set(memplan_().out.split()) >= set(expected.split())
    assert [word for word in memplan_().out.split() if not word.startswith(typed.rpartition(" ")[2])] == []


# --- pipes and terminals ---


def shell(*args: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a new process with its standard output as a pipe."""
    code = "from memplan.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        check=False,
        env={**os.environ, "FORCE_COLOR": "", **environment},
    )


def test_a_pipe_gets_no_colour_and_only_encodable_characters() -> None:
    plain = shell(*QLORA, PYTHONIOENCODING="utf-8")
    assert (plain.returncode, plain.stderr) == (0, b"")
    assert b"\x1b" not in plain.stdout
    assert "│" in plain.stdout.decode()
    ascii_ = shell(*QLORA, "--explain", PYTHONIOENCODING="ascii")
    assert (ascii_.returncode, ascii_.stderr) == (0, b"")
    assert ascii_.stdout.isascii()
    assert b"|" in ascii_.stdout
    exact = shell(*QLORA, "--json", PYTHONIOENCODING="ascii")
    assert exact.stdout.isascii()
    assert json.loads(exact.stdout)["ledger"][0]["shape"] == "v·h"


LINES = sampled(["qwen2-0.5b", "--version", "--help", "models", "schema", "qwen2-0.5b --json"])
CLOSED = "import sys\nsys.{0} = None\nfrom memplan.cli import main\nmain()"  # as Python has it after `>&-`


@pytest.mark.parametrize(
    "line", sampled(["qwen2-0.5b", "--version", "--help", "models", "schema", "qwen2-0.5b --json"])
)
def test_a_closed_standard_output_is_ignored(line: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", CLOSED.format("stdout"), *line.split()], capture_output=True, check=False
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"", b"")


def test_help_whose_reader_has_gone_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    code = "from memplan.cli import main; main()"
    ran = subprocess.run([sys.executable, "-c", code, "--help"], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (0, b"")


def test_modules_of_the_current_folder_are_not_libraries(tmp_path: Path) -> None:
    for name in ("yaml", "json", "shlex", "rich"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    (tmp_path / "run.yaml").write_text("model: qwen2-0.5b")
    environment = {**os.environ, "PYTHONPATH": str(Path(memplan.__file__).parents[1])}
    command = [sys.executable, "-m", "memplan", "run.yaml"]
    ran = subprocess.run(command, capture_output=True, check=False, cwd=tmp_path, env=environment)
    assert (ran.returncode, ran.stderr) == (0, b"")


def test_text_that_begins_like_a_formula_is_quoted_in_csv(
    memplan_: Memplan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "=1+1.json").write_text(json.dumps(TINY))
    monkeypatch.chdir(tmp_path)
    assert [row["model"] for row in DictReader(memplan_("=1+1.json", "--format", "csv").out.splitlines())] == [
        "'=1+1.json"
    ]
    rows = [{"a": text, "b": 1} for text in ("=1+1", "@x", "-2", "+3", "--offload optimizer", "--x|calc", -4)]
    assert [line.partition(",")[0] for line in written(rows).splitlines()[1:]] == [
        *("'=1+1", "'@x", "'-2", "'+3", "--offload optimizer", "'--x|calc", "-4")
    ]


def test_an_error_that_cannot_be_printed_still_sets_its_exit_code() -> None:
    ran = subprocess.run([sys.executable, "-c", CLOSED.format("stderr"), "nope"], capture_output=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device")
@pytest.mark.parametrize(
    "line", sampled(["qwen2-0.5b", "--version", "--help", "models", "schema", "qwen2-0.5b --json"])
)
def test_a_full_disk_is_one_line(line: str) -> None:
    code = "from memplan.cli import main; main()"
    with Path("/dev/full").open("wb") as full:
        ran = subprocess.run(
            [sys.executable, "-c", code, *line.split()], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert ran.returncode == 2
    assert ran.stderr == b"memplan: standard output cannot be written (No space left on device)\n"


def test_control_characters_in_names_are_escaped(memplan_: Memplan, tmp_path: Path) -> None:
    spec = tmp_path / "run.json"
    spec.write_text(json.dumps({"model": {"config": {**TINY, "_name_or_path": "a\x1b[31mb\nc|d"}}}))
    for format in ("table", "markdown", "csv", "html"):
        out = memplan_("--spec", str(spec), "--format", format).out
        assert "\x1b" not in out
        assert "31mb" in out
        assert r"b\nc" in out.replace(r"\\n", r"\n")


def test_a_closed_pipe_is_not_an_error() -> None:
    code = "from memplan.cli import main; main()"
    command = [sys.executable, "-c", code, *QLORA, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_json_imports_neither_rich_nor_yaml_nor_another_format() -> None:
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        "from memplan.cli import main\nmain()"
    )
    ran = subprocess.run([sys.executable, "-c", code, *QLORA, "--json"], capture_output=True, text=True, check=True)
    unwanted = {"rich", "yaml", "huggingface_hub", "torch", "memplan.report.table", "memplan.planning"}
    assert unwanted.isdisjoint(ran.stderr.split())
    assert "memplan.report.json" in ran.stderr.split()


def test_several_files_are_several_runs_and_all_count(memplan_: Memplan, tmp_path: Path) -> None:
    big, small = tmp_path / "big.yaml", tmp_path / "small.yaml"
    big.write_text("model: qwen2-7b\ngpu: rtx-3090\n")
    small.write_text("model: qwen2-0.5b\nmethod: qlora\ngpu: rtx-3090\n")
    both = memplan_("--spec", str(big), "--spec", str(small), "--json")
    assert both.code == 1
    assert [one["verdict"]["answer"] for one in json.loads(both.out)] == ["does not fit", "fits"]
    table = memplan_("--spec", str(small), "--spec", str(big))
    assert table.code == 1
    assert table.out.index("QLoRA of qwen2-0.5b") < table.out.index("full fine-tuning of qwen2-7b")
    assert memplan_("--spec", str(small), "--spec", str(small)).code == 0
    refused = memplan_("plan", "--spec", str(small), "--spec", str(big))
    assert (refused.code, refused.err) == (
        2,
        "memplan: spec (--spec): only memplan estimate takes several files; name one\n",
    )


def test_a_frameworks_file_is_a_run(memplan_: Memplan, tmp_path: Path) -> None:
    file = tmp_path / "axolotl.yml"
    file.write_text("base_model: qwen2-0.5b\nmicro_batch_size: 2\nsequence_len: 64\nbf16: true\n")
    ran = memplan_(str(file), "--gpu", "3090", "--explain-run")
    assert ran.out.startswith("axolotl.yml: Axolotl 0.21, by base_model and micro_batch_size\n\nFITS  ")
    assert re.search(r"batch\.sequence +64 .*axolotl\.yml:3 sequence_len", ran.out)
    answer = json.loads(memplan_(str(file), "--seq-len", "32", "--json").out)
    assert {"field": "batch.sequence", "value": 32, "why": "the command line"} in answer["origins"]
    assert answer["run"]["batch"] == {**answer["run"]["batch"], "micro": 2, "sequence": 32}
    assert memplan_("plan", str(file), "--gpu", "3090").out.startswith("axolotl.yml: Axolotl 0.21, by ")
    planned = json.loads(memplan_("plan", str(file), "--seq-len", "32", "--gpu", "3090", "--json").out)
    assert (
        planned["origins"]
        == json.loads(memplan_(str(file), "--seq-len", "32", "--gpu", "3090", "--json").out)["origins"]
    )
    assert plan_model().validate_python(planned).model_dump(mode="json")["origins"] == planned["origins"]


def test_each_value_is_explained_by_what_it_changes(memplan_: Memplan, tmp_path: Path) -> None:
    file = tmp_path / "axolotl.yml"
    file.write_text("base_model: qwen2-0.5b\nmicro_batch_size: 2\nsequence_len: 1024\nbf16: true\n")
    typed = (str(file), "--gpu", "3090", "--optimizer", "adamw_8bit")
    rows = json.loads(memplan_("explain", *typed, "--json").out)
    by_field = {row["field"]: row for row in rows}
    sizes = [abs(row["bytes"]) for row in rows if row["bytes"] is not None]  # of a part's other fields there are none
    assert sizes == sorted(sizes, reverse=True)

    def used(*options: str) -> int:
        return json.loads(memplan_(*typed, *options, "--json").out)["bytes"]["used"]

    assert by_field["optimizer.name"]["why"] == "the command line"
    assert by_field["optimizer.name"]["bytes"] == used() - used("--optimizer", "adamw_torch_fused")
    assert by_field["batch.micro"]["why"] == "axolotl.yml:2 micro_batch_size"
    plain = RunSpec(model="qwen2-0.5b")
    assert by_field["batch.sequence"]["bytes"] == used() - used("--seq-len", str(plain.batch.sequence))
    assert memplan_("explain", *typed, "--format", "csv").out.startswith("field,value,why,bytes\n")
    table = memplan_("explain", *typed).out.partition("\n\n")[2]
    for command in ((*typed,), ("plan", *typed), ("compare", "qwen2-0.5b", " ".join(typed[:1]), *typed[1:])):
        ran = memplan_(*command, "--explain-run")
        assert ran.out.endswith(table), command
    assert "\nRun 2: axolotl.yml: Axolotl 0.21, by base_model and micro_batch_size\n\nfield " in ran.out


def test_a_runs_own_file_is_explained_too(memplan_: Memplan, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: qwen2-0.5b\nmethod: lora\ngpu: 3090\nbatch:\n  micro: 3\nprecision: amp\n")
    rows = {row["field"]: row for row in json.loads(memplan_("explain", str(file), "--json").out)}
    assert (rows["method.kind"]["value"], rows["method.kind"]["why"]) == ("lora", "run.yaml:2 method")
    assert (rows["batch.micro"]["value"], rows["batch.micro"]["why"]) == (3, "run.yaml:5 batch.micro")
    assert (rows["precision"]["value"], rows["gpu"]["why"]) == ("amp", "run.yaml:3 gpu")
    assert rows["batch.micro"]["bytes"] > 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("explain", "qwen2-0.5b"), "model: explain takes a log with an out-of-memory message, or a run's file"),
        (("explain", "FILE", "--gpu", "3090", "--gpu", "4090"), "gpu (--gpu): explain is for one card"),
        (("explain", "FILE", "--format", "html"), "explain cannot write html; choose table, json or csv"),
        (("compare", "qwen2-0.5b", "qwen2-1.5b", "--explain-run"), "--explain-run only applies to a run's file"),
        (("compare", "FILE --explain-run", "qwen2-0.5b"), "--explain-run applies to the whole comparison"),
        (("plan", "qwen2-0.5b", "--gpu", "3090", "--explain-run"), "--explain-run only applies to a run's file"),
    ],
)
def test_only_a_file_is_explained(memplan_: Memplan, tmp_path: Path, words: tuple[str, ...], expected: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: qwen2-0.5b\n")
    fails(memplan_(*(word.replace("FILE", str(file)) for word in words)), 2, expected)


def test_a_key_that_is_not_understood_is_left_out(memplan_: Memplan, tmp_path: Path) -> None:
    file = tmp_path / "axolotl.yml"
    file.write_text("base_model: qwen2-0.5b\nmicro_batch_size: 1\nsequence_lne: 64\n")
    left_out = "sequence_lne (axolotl.yml:3): unknown key of Axolotl; did you mean sequence_len?"
    assert left_out in json.loads(memplan_(str(file), "--json").out)["unsupported"]
    assert memplan_(str(file), "--gpu", "3090", "--strict").code == 4
    assert memplan_("plan", str(file), "--gpu", "3090", "--strict").code == 4
    fails(memplan_("qwen2-0.5b", "--framework", "axolotl"), 2, "--framework only applies to a run's file")


def test_an_error_about_a_file_names_its_line(memplan_: Memplan, tmp_path: Path) -> None:
    file = tmp_path / "axolotl.yml"
    file.write_text("base_model: no-such-model\nmicro_batch_size: 1\n")
    fails(memplan_(str(file)), 2, "model: unknown name", "(axolotl.yml:1 base_model)")
    file.write_text("base_model: someone/no-such-model\nmicro_batch_size: 1\n")
    fails(memplan_(str(file)), 3, "model: no card", "memplan CARD --spec axolotl.yml (axolotl.yml:1 base_model)")


# --- commands ---


TRAINS = ("trl", "sft", "--model_name_or_path", "Qwen/Qwen2-0.5B", "--dataset_name", "mine", "--max_length")


@pytest.mark.parametrize("before", [(), ("estimate",), ("plan",)], ids=" ".join)
def test_a_command_after_two_dashes_is_the_run(memplan_: Memplan, before: tuple[str, ...]) -> None:
    ran = memplan_(*before, "--gpu", "3090", "--batch-size", "2", "--", *TRAINS, "64")
    assert ran.out.startswith("trl sft: TRL 1.16\n")
    inner = run_of(memplan_("--json", "--batch-size", "2", "--", "HF_HOME=/tmp", *TRAINS, "64"))
    assert inner["batch"] == {**inner["batch"], "micro": 2, "sequence": 64}


def test_commands_are_compared(memplan_: Memplan) -> None:
    ran = memplan_("compare", "qwen2-0.5b --seq-len 16", " ".join((*TRAINS, "32")), "--json", "--", *TRAINS, "64")
    assert [answer["run"]["batch"]["sequence"] for answer in json.loads(ran.out)["answers"]] == [16, 32, 64]


def test_a_command_that_is_not_read_is_one_line(memplan_: Memplan) -> None:
    fails(memplan_("--", "trl", "ppo"), 2, "trl ppo is not supported yet; supported: trl sft or trl dpo")
    fails(memplan_("--", "make", "all"), 2, "the command does not train or serve; accelerate launch, ")
    fails(memplan_("--", *TRAINS, "long"), 2, "trl sft: max_length: must be a number, not 'long'")
    fails(memplan_("--", *TRAINS[:2], "--max_length", "8"), 2, "trl sft names none; write memplan MODEL -- COMMAND")
    assert memplan_("qwen2-0.5b", "--", *TRAINS[:2], "--max_length", "8").code == 0


def test_scripts_and_servers_are_runs(memplan_: Memplan, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("SFTTrainer(model='Qwen/Qwen2-0.5B', args=SFTConfig(max_length=64, optim=pick()))\n", "utf-8")
    ran = memplan_(str(script), "--gpu", "3090", "--strict")
    assert ran.out.startswith("train.py: TRL 1.16, by train.py:1 SFTTrainer\n")
    assert ran.code == 4  # the optimizer cannot be told
    server = ("vllm", "serve", "Qwen/Qwen2-0.5B", "--max-model-len", "4k")
    ran = memplan_("compare", f"{script} --seq-len 32", "--json", "--", *server)
    runs = [answer["run"] for answer in json.loads(ran.out)["answers"]]
    assert [(run["task"], run["profile"]) for run in runs] == [("train", "trl-1.15"), ("generate", "vllm-0.33")]
    assert "--explain-run" not in memplan_("--explain-run", "--gpu", "3090", "--", *server).err


def test_a_page_shows_the_command_but_not_where_it_writes(memplan_: Memplan, tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    ran = memplan_("qwen2-0.5b", "--gpu", "a100-80gb", "--output", str(path), "--date", "today")
    assert (ran.code, ran.out) == (0, "")
    assert "<code>memplan qwen2-0.5b --gpu a100-80gb</code>" in path.read_text("utf-8")
    assert f"memplan {__version__}, {date.today()}<" in path.read_text("utf-8")
    dated = memplan_("qwen2-0.5b", "--gpu=a100-80gb", "--format=html", "--date=2026-11-29").out
    assert "<code>memplan qwen2-0.5b --gpu=a100-80gb --format=html</code>" in dated
    assert f"memplan {__version__}, 2026-11-29<" in dated
