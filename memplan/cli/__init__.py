"""The command `memplan`. Everything heavy is imported where it is used: most of a short command is imports."""

import gc
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:
    from memplan.answer import Estimate
    from memplan.calibration import Calibration
    from memplan.spec import RunSpec

LATER = ("check", "diff", "emit", "serve")  # commands that are not there yet, and no models either
APART = (
    "compare",
    "plan",
    "probe",
    "calibrate",
    "card",
)  # commands with a file each, which is imported when one is asked for

# click's error about wrong usage, wherever this typer keeps its click
UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class Memplan(TyperGroup):
    """A first argument that is no command is a model: `memplan MODEL` is `memplan estimate MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {option for param in self.get_params(ctx) for option in param.opts}
        first = args[0].partition("=")[0] if args else ""
        if first in LATER:
            ctx.fail(f"{first} is not supported yet; commands are {', '.join(self.list_commands(ctx))}")
        if first not in self.list_commands(ctx) and first not in own and (args or not ctx.resilient_parsing):
            args = ["estimate", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *APART]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in APART:
            return super().get_command(ctx, cmd_name)
        from importlib import import_module

        return import_module(f"memplan.cli.{cmd_name}").command(self.commands["estimate"].params)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Commands, and the models and options of `estimate`."""
        estimate_ = self.commands["estimate"]
        with estimate_.make_context("estimate", [], parent=ctx, resilient_parsing=True) as inner:
            more = estimate_.shell_complete(inner, incomplete)
            if not incomplete.startswith("-"):
                more = estimate_.params[0].shell_complete(inner, incomplete)
        return [*super().shell_complete(ctx, incomplete), *more]

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run the command and exit. Every error the user can mend is one line on standard error."""
        try:
            code = super().main(args, prog_name or "memplan", complete_var, False, windows_expand_args, **extra)
        except UsageError as error:
            code = _fail(usage(error), error.exit_code)
        except (typer.Abort, KeyboardInterrupt):
            code = 130
        except OSError as error:  # in writing help or the version: what else is written answers for itself
            code = _fail(_unwritten(error), 2)
        sys.exit(code or 0)


class Grouped(TyperCommand):
    """A command whose help lists options under the heading each one names."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                heading = getattr(param, "rich_help_panel", None) or "Other"
                groups.setdefault(heading, []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


app = typer.Typer(
    cls=Memplan,
    name="memplan",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="How much GPU memory a language model takes to train or run, when, and whether it fits.",
    epilog="memplan MODEL [options] is short for memplan estimate MODEL [options].",
    context_settings={"help_option_names": ["--help", "-h"]},
)


def main() -> None:
    """The entry point."""
    gc.disable()  # a command is over before its garbage is worth a look
    app()


def _fail(line: str, code: int) -> int:
    from memplan.errors import printable

    if sys.stderr is not None:  # pyright: ignore[reportUnnecessaryComparison] (where it was closed)
        with suppress(OSError):
            sys.stderr.write(f"memplan: {printable(line)}\n")
    return code


def _warn(line: str) -> None:
    _fail(line, 0)


def _unwritten(error: OSError) -> str:
    """One line for what kept standard output from being written; the exit's flush will not say it again."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return f"standard output cannot be written ({error.strerror or error})"


def usage(error: Any) -> str:
    """One line for what typer found wrong with the arguments."""
    param, text = getattr(error, "param", None), error.format_message()
    if param is not None and error.__cause__ is not None:
        from memplan.cli.failures import what

        text = f"{param.opts[0]}: {what(error.__cause__)}"
    return " ".join(text.split())


def answered(work: Callable[[], int], given: Iterable[str] = ()) -> int:
    """The exit code of `work`; what the user can mend becomes one line and its code."""
    from memplan.errors import MemplanError

    try:
        return work()
    except MemplanError as error:
        from memplan.cli.failures import line_of

        return _fail(line_of(error, given), error.exit_code)
    except RecursionError:
        return _fail("spec: nested too deeply to be a run or a model", 2)
    except OSError as error:
        return _fail(f"{error.strerror or error}: {str(error.filename or '')[:200]!r}", 2)
    except ValueError as error:
        from pydantic import ValidationError

        if not isinstance(error, ValidationError):
            return _fail(_unexpected(error), 2)
        from memplan.cli.failures import line_of

        return _fail(line_of(error, given), 2)
    except Exception as error:
        if isinstance(error, (UsageError, typer.Exit, typer.Abort)):
            raise
        return _fail(_unexpected(error), 2)


def _unexpected(error: Exception) -> str:
    """One line about an error memplan did not mean to raise. Raises it instead if MEMPLAN_TRACEBACK is set."""
    from traceback import extract_tb

    from memplan.errors import InternalError, printable

    if os.environ.get("MEMPLAN_TRACEBACK"):
        raise error
    at = extract_tb(error.__traceback__)[-1]
    what = f"{type(error).__name__} {printable(str(error), 80)}"
    return str(InternalError(f"{what} in {at.filename.rpartition('memplan/')[2]}:{at.lineno} ({at.name})"))


def show(text: str, format: str = "table", output: str | None = None) -> None:
    """Write to a file or standard output, which may be closed. A reader that has gone away is none of our business."""
    if output is not None:
        from pathlib import Path

        from memplan.errors import MemplanError

        try:
            Path(output).write_text(text, encoding="utf-8", errors="backslashreplace")
        except (OSError, ValueError) as error:  # ValueError: a NUL
            reason = getattr(error, "strerror", None) or error
            raise MemplanError(f"output: {output!r:.200} cannot be written ({reason})", "output") from None
        return
    if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison] (where it was closed)
        return
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = _in_ascii(text, format)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError as error:
        _unwritten(error)
    except OSError as error:
        from memplan.errors import MemplanError

        raise MemplanError(_unwritten(error)) from None


def _in_ascii(text: str, format: str) -> str:
    """The same for an encoding that has not all of its characters."""
    if format == "html":
        return text.encode("ascii", "xmlcharrefreplace").decode()
    if format == "json":
        import json

        return "".join(c if c.isascii() else json.dumps(c)[1:-1] for c in text)
    from memplan.report.text import ASCII

    return text.translate(ASCII).encode("ascii", "replace").decode()


def complete_model(incomplete: str) -> list[str]:
    from memplan.cards import card_names, load_card

    cards = [load_card(name).card for name in card_names()] if "/" in incomplete else []
    ids = [str(name) for card in cards for name in (card["hf_id"], *card.get("aliases", ()))]
    return [name for name in (*card_names(), *ids) if name.startswith(incomplete)]


def complete_gpu(incomplete: str) -> list[str]:
    from memplan.gpus import all_gpus

    names = [name for gpu in all_gpus() for name in (gpu.name, *gpu.aliases)]
    return [name for name in names if name.startswith(incomplete)]


def _complete_optimizer(incomplete: str) -> list[str]:
    from memplan.catalogue.states import optimizer_names

    return [name for name in optimizer_names() if name.startswith(incomplete)]


def _complete_profile(incomplete: str) -> list[str]:
    from memplan.catalogue.engines import ENGINES
    from memplan.catalogue.profiles import PROFILES

    return [profile.name for profile in (*PROFILES, *ENGINES) if profile.name.startswith(incomplete)]


def _complete_format(incomplete: str) -> list[str]:
    from typing import get_args

    from memplan.spec import Format

    return [name for name in get_args(Format) if name.lower().startswith(incomplete.lower())]


def _choices(*words: str) -> Callable[[str], list[str]]:
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def _version(asked: bool) -> None:
    if asked:
        from memplan import __version__

        raise typer.Exit(answered(lambda: show(f"memplan {__version__}\n") or 0))


def option(help: str, *names: str, of: str, complete: Callable[[str], list[str]] | None = None, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=of, autocompletion=complete, show_default=False, **more)


METHODS = ("full", "lora", "qlora", "dora", "qdora", "freeze")
TASKS = ("generate", "forward")  # where nothing trains
OBJECTIVES = (  # memplan.objectives.Objective, which is not imported here
    *("causal_lm", "masked_lm", "seq2seq_lm", "sequence_classification", "token_classification"),
    *("image_classification", "feature_extraction"),
)
CACHE_DTYPES = (
    *("auto", "bf16", "fp16", "fp32", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_e4m3fn", "int8_per_token_head"),
    *("fp8_per_token_head", "int4_per_token_head", "nvfp4", "fp4_mx_block16", "mxfp8"),
    *("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"),
)
CACHES = ("dynamic", "static", "quantized", "offloaded", "offloaded_static", "legacy")
SERVING = "Serving engines"
TRAINING, BESIDE, GENERATION, ADAPTERS, DTYPES, KERNELS, GPUS, SEVERAL, OUTPUT = (
    "Training",
    "Beside the steps",
    "Generation",
    "Adapters and quantisation",
    "Precision and optimizer",
    "Kernels",
    "GPUs",
    "Several GPUs",
    "Input and output",
)


@app.callback()
def _root(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command(cls=Grouped)
def estimate(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A card's name (qwen2-7b), a Hugging Face id, or the path of a config.json, its folder, or a GGUF "
            "file.",
            autocompletion=complete_model,
            rich_help_panel="Model",
        ),
    ] = None,
    method: Annotated[
        str | None,
        option(
            f"{', '.join(METHODS)}; for inference {' or '.join(TASKS)}. Default full.",
            of=TRAINING,
            complete=_choices(*METHODS, *TASKS),
        ),
    ] = None,
    objective: Annotated[
        str | None,
        option(
            f"What the model is trained for, its head and loss: {', '.join(OBJECTIVES)}. Default what the config's "
            "architectures say.",
            of=TRAINING,
            complete=_choices(*OBJECTIVES),
        ),
    ] = None,
    batch_size: Annotated[int | None, option("Sequences per GPU and pass. Default 1.", of=TRAINING)] = None,
    seq_len: Annotated[int | None, option("Tokens per sequence. Default 2048.", of=TRAINING)] = None,
    target_len: Annotated[
        int | None,
        option(
            "Tokens for the decoder beside an encoder. Default what the encoder reads, or its positions; to generate "
            "from, 1, of Whisper 4.",
            of=TRAINING,
        ),
    ] = None,
    grad_accum: Annotated[int | None, option("Passes per optimizer step. Default 1.", of=TRAINING)] = None,
    images: Annotated[
        int | None, option("Images in each sequence, whose tokens are part of --seq-len. Default 0.", of=TRAINING)
    ] = None,
    image_size: Annotated[
        str | None,
        option(
            "Pixels of an image: 1024, or height x width as 768x1024. Default the tower's, if it has one.", of=TRAINING
        ),
    ] = None,
    frozen: Annotated[
        str | None,
        option(
            "Parts that neither train nor are adapted: vision, projector, language, with commas between. Default none.",
            of=TRAINING,
            complete=_choices("vision", "projector", "language"),
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        option(
            "Keep only each layer's input and compute the rest again. Default on.",
            "--gradient-checkpointing/--no-gradient-checkpointing",
            of=TRAINING,
        ),
    ] = None,
    checkpointing: Annotated[
        str | None,
        option(
            "The same as a word: none, full, or offload, with the layers' inputs in host memory. Default full.",
            of=TRAINING,
            complete=_choices("none", "full", "offload"),
        ),
    ] = None,
    trainable_layers: Annotated[
        int | None, option("Layers at the end that --method freeze trains. Default 2.", of=TRAINING)
    ] = None,
    offload: Annotated[
        str | None,
        option(
            "What the host keeps: optimizer, and its step; parameters, under FSDP with all of that, and ZeRO 3; "
            "activations, all that autograd saves; none takes back what a file says. Default none.",
            of=TRAINING,
            complete=_choices("optimizer", "parameters", "activations", "none"),
        ),
    ] = None,
    hold_outputs: Annotated[
        bool | None,
        option(
            "The script keeps the model's outputs through the backward pass. Default off.",
            "--hold-outputs/--no-hold-outputs",
            of=TRAINING,
        ),
    ] = None,
    padded: Annotated[
        bool | None,
        option("Batches have padding, and so an attention mask. Default off.", "--padded/--no-padded", of=TRAINING),
    ] = None,
    trainer: Annotated[
        bool | None,
        option(
            "transformers' Trainer drives the step: it keeps embeddings' states in fp32 under bitsandbytes' 8-bit "
            "optimizers. Default off.",
            "--trainer/--no-trainer",
            of=TRAINING,
        ),
    ] = None,
    expandable_segments: Annotated[
        bool | None,
        option(
            "torch's allocator has expandable segments (PYTORCH_CUDA_ALLOC_CONF). Default off.",
            "--expandable-segments/--no-expandable-segments",
            of=TRAINING,
        ),
    ] = None,
    eval_batch_size: Annotated[
        int | None,
        option(
            "Sequences a GPU and pass of an evaluation, counted too (per_device_eval_batch_size). Default none; 8 with "
            "another of these.",
            of=BESIDE,
        ),
    ] = None,
    eval_seq_len: Annotated[
        int | None, option("Tokens per sequence of an evaluation. Default those of training.", of=BESIDE)
    ] = None,
    eval_keep_logits: Annotated[
        int | None,
        option(
            "Batches whose logits are kept on the GPU, as for compute_metrics. Default 0: the loss alone.",
            of=BESIDE,
        ),
    ] = None,
    eval_accumulation_steps: Annotated[
        int | None, option("Batches after which kept logits go to the host. Default after the last.", of=BESIDE)
    ] = None,
    eval_preprocess: Annotated[
        str | None,
        option(
            "Kept of logits: argmax, the likeliest tokens (preprocess_logits_for_metrics). Default all.",
            of=BESIDE,
        ),
    ] = None,
    eval_generate: Annotated[
        int | None,
        option("Tokens generated after each sequence of an evaluation (predict_with_generate). Default 0.", of=BESIDE),
    ] = None,
    save: Annotated[
        bool | None, option("Count saving a checkpoint too. Default off.", "--save/--no-save", of=BESIDE)
    ] = None,
    merge: Annotated[
        str | None,
        option(
            "Count merging the adapters too: into the model as it was trained, or one reloaded whole for that. Default "
            "none.",
            of=BESIDE,
            complete=_choices("trained", "reloaded"),
        ),
    ] = None,
    new_tokens: Annotated[
        int | None,
        option("Tokens generated after --seq-len of a prompt. Default 256, with --method generate.", of=GENERATION),
    ] = None,
    cache_implementation: Annotated[
        str | None,
        option(
            f"What keeps keys and values: {', '.join(CACHES)}. Default as the profile has it.",
            of=GENERATION,
            complete=_choices(*CACHES),
        ),
    ] = None,
    cache_backend: Annotated[
        str | None,
        option(
            "What quantises a quantized cache: quanto (2 or 4 bits), hqq (1, 2, 3, 4, 8) or fp8. Default quanto.",
            of=GENERATION,
            complete=_choices("quanto", "hqq", "fp8"),
        ),
    ] = None,
    cache_bits: Annotated[
        int | None, option("Bits a number of a quantized cache (nbits). Default 4.", of=GENERATION)
    ] = None,
    cache_group_size: Annotated[
        int | None, option("Numbers to a scale of a quantized cache (q_group_size). Default 64.", of=GENERATION)
    ] = None,
    cache_residual: Annotated[
        int | None,
        option(
            "Newest tokens that a quantized cache keeps as they are, at most (residual_length). Default 128.",
            of=GENERATION,
        ),
    ] = None,
    prefill_chunk_size: Annotated[
        int | None, option("Tokens of the prompt that are read in one pass. Default all.", of=GENERATION)
    ] = None,
    num_beams: Annotated[
        int | None, option("Sequences that are ranked for each prompt. Default 1.", of=GENERATION)
    ] = None,
    do_sample: Annotated[
        bool | None,
        option(
            "Draw tokens after temperature, top-k and top-p, instead of taking the likeliest. Default off.",
            "--do-sample/--no-do-sample",
            of=GENERATION,
        ),
    ] = None,
    assistant_model: Annotated[
        str | None,
        option("Smaller model that proposes tokens, which the model checks at once. Default none.", of=GENERATION),
    ] = None,
    assistant_dtype: Annotated[
        str | None,
        option(
            "Dtype of the assistant's weights: bf16, fp16, fp32. Default the model's.",
            of=GENERATION,
            complete=_choices("bf16", "fp16", "fp32"),
        ),
    ] = None,
    assistant_quant_format: Annotated[
        str | None,
        option("Storage of the assistant's weights, as --quant-format has it. Default not quantised.", of=GENERATION),
    ] = None,
    num_assistant_tokens: Annotated[
        int | None, option("Tokens that an assistant proposes in a round. Default 20.", of=GENERATION)
    ] = None,
    num_assistant_tokens_schedule: Annotated[
        str | None,
        option(
            "How their number changes by round: constant, heuristic, heuristic_transient. Default constant.",
            of=GENERATION,
            complete=_choices("constant", "heuristic", "heuristic_transient"),
        ),
    ] = None,
    prompt_lookup_num_tokens: Annotated[
        int | None,
        option(
            "Tokens proposed in a round without an assistant: what followed the same words before. Default 0.",
            of=GENERATION,
        ),
    ] = None,
    assistant_early_exit: Annotated[
        int | None,
        option("First layers of the model, which propose tokens instead of an assistant. Default none.", of=GENERATION),
    ] = None,
    rank: Annotated[int | None, option("Rank of the adapters. Default 16.", of=ADAPTERS)] = None,
    targets: Annotated[
        str | None, option("all-linear, or module names with commas between. Default all-linear.", of=ADAPTERS)
    ] = None,
    lora_dropout: Annotated[float | None, option("Dropout before adapters, 0 to 1. Default 0.", of=ADAPTERS)] = None,
    modules_to_save: Annotated[
        str | None, option("Module names, with commas between, that train in full. Default none.", of=ADAPTERS)
    ] = None,
    quant_format: Annotated[
        str | None,
        option(
            "Storage of quantised weights: nf4, fp4, int8, gptq-int4, gptq-int8, awq-int4, fp8; to run a model also "
            "w4a16, fp8-channel, mxfp4 and others. Default nf4; of a checkpoint that is stored quantised, its own.",
            of=ADAPTERS,
            complete=_complete_format,
        ),
    ] = None,
    double_quant: Annotated[
        bool | None,
        option("Quantise the quantisation's scales too. Default on.", "--double-quant/--no-double-quant", of=ADAPTERS),
    ] = None,
    quant_storage: Annotated[
        str | None,
        option(
            "The dtype 4-bit weights are stored in: uint8, or bf16, fp16, fp32 for FSDP. Default uint8.",
            of=ADAPTERS,
            complete=_choices("uint8", "bf16", "fp16", "fp32"),
        ),
    ] = None,
    kbit_preparation: Annotated[
        str | None,
        option(
            "prepare_model_for_kbit_training's casts: true, false, or trl for those trl casts back. Default true.",
            of=ADAPTERS,
            complete=_choices("true", "false", "trl"),
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        option("Weights: bf16, fp16, fp32. Default bf16.", of=DTYPES, complete=_choices("bf16", "fp16", "fp32")),
    ] = None,
    precision: Annotated[
        str | None,
        option(
            "pure (all in --dtype), amp (fp32 weights, autocast to --dtype), "
            "mixed (weights and gradients in --dtype, fp32 masters and states). Default pure.",
            of=DTYPES,
            complete=_choices("pure", "amp", "mixed"),
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        option(
            "A name of transformers' OptimizerNames, or none. Default adamw_torch_fused.",
            of=DTYPES,
            complete=_complete_optimizer,
        ),
    ] = None,
    foreach: Annotated[
        bool | None,
        option(
            "torch's optimizers step with lists of all parameters, not one at a time. Default on where torch has both.",
            "--foreach/--no-foreach",
            of=DTYPES,
        ),
    ] = None,
    in_backward: Annotated[
        bool | None,
        option(
            "Each parameter is stepped in backward, as its gradient comes. Nothing is clipped, and --grad-accum is 1. "
            "Default off.",
            "--in-backward/--no-in-backward",
            of=DTYPES,
        ),
    ] = None,
    attention: Annotated[
        str | None,
        option(
            "sdpa, flash_attention_2, eager, sdpa_math, sdpa_efficient. Default sdpa.",
            of=KERNELS,
            complete=_choices("sdpa", "flash_attention_2", "eager", "sdpa_math", "sdpa_efficient"),
        ),
    ] = None,
    loss: Annotated[
        str | None,
        option(
            "hf, chunked, fused (with the head's product, as Liger and Cut Cross-Entropy do), chunked_lm_head. "
            "Default hf.",
            of=KERNELS,
            complete=_choices("hf", "chunked", "fused", "chunked_lm_head"),
        ),
    ] = None,
    fused: Annotated[
        str | None,
        option(
            "Fused kernels, with commas between: rope, rms_norm, swiglu, cross_entropy, lora. Default none.",
            of=KERNELS,
            complete=_choices("rope", "rms_norm", "swiglu", "cross_entropy", "lora"),
        ),
    ] = None,
    reentrant: Annotated[
        bool | None,
        option(
            "torch's reentrant kind of checkpointing. Default as the profile has it.",
            "--reentrant/--no-reentrant",
            of=KERNELS,
        ),
    ] = None,
    profile: Annotated[
        str | None,
        option(
            "Framework and version that decide what is left open (vllm: its newest); memplan profiles lists them. "
            "Default transformers-5.",
            of=KERNELS,
            complete=_complete_profile,
        ),
    ] = None,
    stored: Annotated[
        str | None,
        option(
            "What the weights are stored in: fp8, w4a16, awq-int4, or a GGUF type. Default as the checkpoint is.",
            of=SERVING,
        ),
    ] = None,
    max_model_len: Annotated[
        int | None, option("Tokens of a request that the engine admits. Default the model's positions.", of=SERVING)
    ] = None,
    max_num_seqs: Annotated[
        int | None, option("Requests in one step; llama.cpp's slots. Default the engine's, by the card.", of=SERVING)
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None,
        option(
            "Tokens in one step: SGLang's chunked prefill size, llama.cpp's ubatch. Default the engine's.", of=SERVING
        ),
    ] = None,
    memory_utilization: Annotated[
        float | None,
        option("Share of the card: gpu_memory_utilization, mem_fraction_static. Default the engine's.", of=SERVING),
    ] = None,
    block_size: Annotated[int | None, option("Tokens of a block. Default the engine's.", of=SERVING)] = None,
    cache_dtype: Annotated[
        str | None,
        option(
            "Storage of keys and values in an engine: fp8, nvfp4, q8_0 and others, as it has them. Default the model's "
            "dtype.",
            of=SERVING,
            complete=_choices(*CACHE_DTYPES),
        ),
    ] = None,
    cuda_graphs: Annotated[
        bool | None,
        option("Record decoding steps. Default on.", "--cuda-graphs/--no-cuda-graphs", of=SERVING),
    ] = None,
    prefix_caching: Annotated[
        bool | None,
        option("Keep blocks of earlier requests. Default on.", "--prefix-caching/--no-prefix-caching", of=SERVING),
    ] = None,
    gpu_layers: Annotated[
        int | None, option("Layers on the card, the head one more (llama.cpp). Default all.", of=SERVING)
    ] = None,
    split_mode: Annotated[
        str | None,
        option(
            "How llama.cpp divides a model among GPUs: layer, some layers on each; none, all on one. Default layer.",
            of=SERVING,
            complete=_choices("layer", "none", "row", "tensor"),
        ),
    ] = None,
    tensor_split: Annotated[
        str | None,
        option("Proportions of the layers on llama.cpp's GPUs, as 3,1. Default equal parts.", of=SERVING),
    ] = None,
    main_gpu: Annotated[
        int | None, option("GPU that has all layers with --split-mode none (llama.cpp). Default 0.", of=SERVING)
    ] = None,
    dp_attention: Annotated[
        bool | None,
        option(
            "Attention is data parallel over --gpus, which divide all else (SGLang). Default off.",
            "--dp-attention/--no-dp-attention",
            of=SERVING,
        ),
    ] = None,
    limit_images: Annotated[
        int | None,
        option("Images of a request, at most (vLLM's limit_mm_per_prompt). Default any.", of=SERVING),
    ] = None,
    limit_videos: Annotated[
        int | None, option("Videos of a request, at most (the same). Default any.", of=SERVING)
    ] = None,
    lora_slots: Annotated[
        int | None, option("Adapters in one step, at most (vLLM's max_loras). Default 0.", of=SERVING)
    ] = None,
    lora_rank: Annotated[int | None, option("Largest rank of those adapters. Default 16.", of=SERVING)] = None,
    lora_cpu_slots: Annotated[
        int | None, option("Adapters on the host (vLLM's max_cpu_loras). Default as many as slots.", of=SERVING)
    ] = None,
    speculative_method: Annotated[
        str | None,
        option(
            "What proposes tokens: draft_model, eagle, eagle3, mtp, ngram. Default nothing, or the --draft-model.",
            of=SERVING,
            complete=_choices("draft_model", "eagle", "eagle3", "mtp", "ngram"),
        ),
    ] = None,
    draft_model: Annotated[
        str | None,
        option("Smaller model that proposes tokens, or the config of EAGLE's head. Default none.", of=SERVING),
    ] = None,
    draft_weights: Annotated[
        str | None, option("What the draft's weights are stored in. Default the model's dtype.", of=SERVING)
    ] = None,
    num_speculative_tokens: Annotated[
        int | None, option("Tokens proposed in a step. Default the engine's.", of=SERVING)
    ] = None,
    gpu: Annotated[
        list[str] | None,
        option(
            "A card's name (3090, a800, h100); repeat it to compare. Default none: the estimate and every card that "
            "holds it.",
            of=GPUS,
            complete=complete_gpu,
            metavar="NAME",
        ),
    ] = None,
    gpus: Annotated[
        int | None, option("How many GPUs, in all, each with a part of the batch. Default 1.", of=SEVERAL)
    ] = None,
    zero: Annotated[int | None, option("DeepSpeed's ZeRO stage, 0 to 3. Default none.", of=SEVERAL)] = None,
    deepspeed: Annotated[
        str | None,
        option(
            "A DeepSpeed config: its ZeRO stage, buckets, offload, precision and batch; options go over it. "
            "Default none.",
            of=SEVERAL,
            metavar="FILE",
        ),
    ] = None,
    fsdp: Annotated[
        str | None,
        option(
            "full_shard, shard_grad_op, hybrid_shard, no_shard, fsdp2. Default none.",
            of=SEVERAL,
            complete=_choices("full_shard", "shard_grad_op", "hybrid_shard", "no_shard", "fsdp2"),
        ),
    ] = None,
    tp: Annotated[int | None, option("Tensor-parallel GPUs. Default 1.", of=SEVERAL)] = None,
    sequence_parallel: Annotated[
        bool | None,
        option(
            "Tensor-parallel GPUs divide the tokens too, where no matrix is. Default off.",
            "--sequence-parallel/--no-sequence-parallel",
            of=SEVERAL,
        ),
    ] = None,
    pp: Annotated[int | None, option("Pipeline stages. Default 1.", of=SEVERAL)] = None,
    virtual_stages: Annotated[
        int | None, option("Chunks of layers on each stage, which 1F1B interleaves. Default 1.", of=SEVERAL)
    ] = None,
    schedule: Annotated[
        str | None,
        option(
            "How a pipeline runs its microbatches, which are --grad-accum: 1f1b, gpipe, or device_map (transformers', "
            "one GPU after another). Default as the profile has it.",
            of=SEVERAL,
            complete=_choices("1f1b", "gpipe", "device_map"),
        ),
    ] = None,
    first_stage_layers: Annotated[
        int | None, option("Layers on the first stage. Default as the profile divides them.", of=SEVERAL)
    ] = None,
    last_stage_layers: Annotated[
        int | None, option("Layers on the last stage. Default as the profile divides them.", of=SEVERAL)
    ] = None,
    ends_as_layers: Annotated[
        bool | None,
        option(
            "Embeddings count as a layer where stages divide them, and the head as one. Default as the profile has it.",
            "--ends-as-layers/--no-ends-as-layers",
            of=SEVERAL,
        ),
    ] = None,
    device_map: Annotated[
        str | None,
        option(
            "How transformers places a model that runs on --gpus and the host: auto, balanced, balanced_low_0, "
            "sequential. Default none.",
            of=SEVERAL,
            complete=_choices("auto", "balanced", "balanced_low_0", "sequential"),
        ),
    ] = None,
    gpus_per_node: Annotated[
        int | None,
        option("GPUs of one machine, which share its host memory. Default 8.", of=SEVERAL),
    ] = None,
    stage: Annotated[
        int | None, option("Answer for this stage, the first being 0. Default the one that holds most.", of=SEVERAL)
    ] = None,
    cp: Annotated[int | None, option("Context-parallel GPUs. Default 1.", of=SEVERAL)] = None,
    ep: Annotated[
        int | None, option("GPUs that divide the experts of a mixture, each having some. Default 1.", of=SEVERAL)
    ] = None,
    spec: Annotated[
        str | None, option("A run as JSON or YAML (- is standard input); options go over it.", of=OUTPUT)
    ] = None,
    online: Annotated[
        bool,
        option(
            "Ask the Hugging Face Hub for a model without a card: its config and the headers of its weights. "
            "Default off.",
            "--online",
            of=OUTPUT,
        ),
    ] = False,
    revision: Annotated[
        str | None, option("The id's branch, tag or commit, as owner/name@revision. Default main.", of=OUTPUT)
    ] = None,
    via: Annotated[
        str | None,
        option(
            "engine (memplan's own stacks), trace (the step as the installed transformers takes it, on tensors without "
            "data), or auto: engine, and trace for what it has no stack for. Default auto.",
            of=OUTPUT,
            complete=_choices("auto", "engine", "trace"),
        ),
    ] = None,
    cache: Annotated[
        bool | None,
        option(
            "Keep traces in the user's cache folder, and use those there. Default on.", "--cache/--no-cache", of=OUTPUT
        ),
    ] = None,
    format: Annotated[
        str | None,
        option(
            "table, json, markdown, csv, html. Default table.",
            of=OUTPUT,
            complete=_choices("table", "json", "markdown", "csv", "html"),
        ),
    ] = None,
    json: Annotated[bool, option("Short for --format json.", "--json", of=OUTPUT)] = False,
    output: Annotated[str | None, option("Write to this file. Default standard output.", of=OUTPUT)] = None,
    explain: Annotated[bool, option("Every tensor alive at the peak. Default off.", "--explain", of=OUTPUT)] = False,
    ranks: Annotated[
        bool, option("Every GPU that differs: stages of a pipeline or a device map. Default off.", "--ranks", of=OUTPUT)
    ] = False,
    strict: Annotated[
        bool,
        option("Exit 1 if tight, and 4 if something unsupported was left out. Default off.", "--strict", of=OUTPUT),
    ] = False,
    calibration: Annotated[
        bool | None,
        option(
            "Use this machine's own profile of the card, where memplan calibrate has written one. Default on.",
            "--calibration/--no-calibration",
            of=OUTPUT,
        ),
    ] = None,
) -> int:
    """Whether a run fits, what takes the memory, and when.

    Exit codes: 0 fits, or no GPU asked; 1 does not fit; 2 wrong input; 3 the model's facts are not here; 4 with
    --strict, something unsupported was left out.
    """
    given = {name: value for name, value in ctx.params.items() if not left_out(name, value)}
    return answered(lambda: _estimate(given), given)


def left_out(name: str, value: object) -> bool:
    """Whether an option was not given: its default stands for that, and for nothing else."""
    return value in (None, [], ()) or (value is False and name in _SWITCHES)


_SWITCHES = ("online", "json", "explain", "strict", "ranks")


def _estimate(given: Mapping[str, Any]) -> int:
    from memplan.estimator import estimate
    from memplan.report import render
    from memplan.via import estimates

    format = format_of(given)
    runs = [(run, own_profile(run.gpu, given)) for run in runs_of(given)]
    answers = estimates(
        runs, given.get("via", "auto"), cache=given.get("cache", True), online="online" in given, engine=estimate
    )
    to = None
    if "output" in given and format == "table":
        from memplan.report.text import Screen

        to = Screen()
    show(render(format, answers, "explain" in given, to, "ranks" in given), format, given.get("output"))
    return exit_code(answers, "strict" in given)


def own_profile(gpu: str | None, given: Mapping[str, Any]) -> "Calibration | None":
    """This machine's own profile of a card; None if it is not wanted, there is none, or it is left out with a
    warning."""
    if gpu is None or given.get("calibration") is False:
        return None
    from memplan.folders import has_calibrations

    if not has_calibrations():
        return None
    from memplan.cli.calibrate import profile_of

    profile, why_not = profile_of(gpu)
    if profile is None and why_not:
        _warn(why_not)
    return profile


def runs_of(given: Mapping[str, Any]) -> "list[RunSpec]":
    """The run that options and a spec file ask for, once for each GPU. Raises what says which field is wrong."""
    from memplan.cli.request import configured, idle, spec_of
    from memplan.errors import SpecError, printable
    from memplan.spec import RunSpec

    spec = None
    if "spec" in given:
        from memplan.cli.spec_file import read_spec

        spec = read_spec(given["spec"])
    if "deepspeed" in given:
        from memplan.cli.spec_file import read_deepspeed

        spec = configured(spec or {}, read_deepspeed(given["deepspeed"]))
    fields = spec_of(given, spec)
    if "model" not in fields:
        raise SpecError("model: name one, as in memplan qwen2-7b --method qlora --gpu 3090, or give --spec", "model")
    if "revision" in given:
        fields["model"] = revised(fields["model"], given["revision"])
    asked = [*given.get("gpu", ())] or [fields.get("gpu")]
    runs = [RunSpec.model_validate({**fields, "gpu": gpu}) for gpu in asked]
    if str(runs[0].model).endswith((".yaml", ".yml")):
        name = printable(str(runs[0].model), 200)
        raise SpecError(f"model: {name} is no model; a run in a file goes to --spec", "model")
    unused = idle(given, runs[0].method)
    if unused is not None:
        raise unused
    return runs


def revised(model: object, revision: str) -> str:
    """An id with its revision."""
    from memplan.errors import SpecError

    if not isinstance(model, str) or "@" in model or not revision.strip():
        raise SpecError("revision: is of a Hugging Face id, which names none itself", "revision")
    return f"{model}@{revision}"


def format_of(given: Mapping[str, Any]) -> str:
    """The format that is asked for, or that the output's name says."""
    from memplan.errors import SpecError, UnknownNameError
    from memplan.report import FORMATS

    if "json" in given and given.get("format", "json") != "json":
        raise SpecError(f"format: --json and --format {given['format']} exclude each other", "format")
    suffix = str(given.get("output", "")).rpartition(".")[2].lower()
    guessed = {"json": "json", "md": "markdown", "csv": "csv", "html": "html", "htm": "html"}.get(suffix, "table")
    format = "json" if "json" in given else given.get("format", guessed)
    if format not in FORMATS:
        raise UnknownNameError("format", format, FORMATS)
    return format


def exit_code(answers: "Sequence[Estimate]", strict: bool) -> int:
    """The command's, of several answers together."""
    if strict and any(answer.unsupported for answer in answers):
        return 4
    refused = ("does not fit", "tight") if strict else ("does not fit",)
    return int(any(answer.verdict.answer in refused for answer in answers))


_TEXT = "What to look for in names, ids and kinds. Default everything."
_MODEL = typer.Argument(help=_TEXT, autocompletion=complete_model)
_GPU = typer.Argument(help=_TEXT, autocompletion=complete_gpu)
_PROFILE = typer.Argument(help=_TEXT, autocompletion=_complete_profile)
_JSON = typer.Option("--json", help="As JSON.")


@app.command()
def models(text: Annotated[list[str] | None, _MODEL] = None, json: Annotated[bool, _JSON] = False) -> int:
    """List the bundled models: parameters, layers, positions, licence."""

    def listed() -> int:
        from memplan.report.listing import models

        show(models(" ".join(text or ()), json), "json" if json else "table")
        return 0

    return answered(listed)


@app.command()
def gpus(text: Annotated[list[str] | None, _GPU] = None, json: Annotated[bool, _JSON] = False) -> int:
    """List the GPUs: usable memory, capability, bf16, bandwidth, prices with their date."""

    def listed() -> int:
        from memplan.report.listing import cards

        show(cards(" ".join(text or ()), json), "json" if json else "table")
        return 0

    return answered(listed)


@app.command()
def profiles(text: Annotated[list[str] | None, _PROFILE] = None, json: Annotated[bool, _JSON] = False) -> int:
    """List the profiles, frameworks and their versions, and what each sets where a run leaves it open."""

    def listed() -> int:
        from memplan.report.listing import profiles

        show(profiles(" ".join(text or ()), json), "json" if json else "table")
        return 0

    return answered(listed)


_SCHEMAS = ("answer", "run", "comparison", "plan")


@app.command()
def schema(
    of: Annotated[
        str,
        typer.Argument(
            help="answer (with the run in it), run, comparison or plan.", autocompletion=_choices(*_SCHEMAS)
        ),
    ] = "answer",
) -> int:
    """Print the JSON Schema of an answer, a run, a comparison or a plan."""

    def printed() -> int:
        import json

        from memplan.errors import UnknownNameError
        from memplan.report.schema import answer_schema, comparison_schema, plan_schema, run_schema

        if of not in _SCHEMAS:
            raise UnknownNameError("schema", of, _SCHEMAS)
        made = {"answer": answer_schema, "run": run_schema, "comparison": comparison_schema, "plan": plan_schema}[of]()
        show(json.dumps(made, indent=2) + "\n", "json")
        return 0

    return answered(printed)
