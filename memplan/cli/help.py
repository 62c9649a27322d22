"""`memplan --help` on one screen, and help on a topic: the options of `memplan estimate` that belong to it."""

from __future__ import annotations

from typing import Any

from memplan.core.errors import UnknownNameError
from memplan.core.records import NamedTuple

SCREEN = """\
memplan MODEL [options]  how much GPU memory a run takes, when, and if it fits

  memplan qwen3-8b --method qlora --gpu 4060ti-16gb
  memplan llama-3.1-8b --method lora --gpu 2x4090 --batch-size 4 --seq-len 4k
  memplan qwen3-32b --method generate --profile vllm --gpu h100
  memplan axolotl.yml      the run of a framework's file, script or command

  --method METHOD          full, lora, qlora, dora ...; or generate, forward
  --gpu CARD               3090, 2x4090, 24gb, auto; 3090,4090 are two answers
  --batch-size N  --seq-len N  --rank N  --optimizer NAME  --profile NAME
  --details  --explain  --plain  --json  --format NAME  --output FILE  --strict

  fit, max, buy, advise    what makes it fit; its limits; cards to own or rent;
                           which method. plan has all of these, and clusters
  compare, explain         runs side by side; the values of a run's file
  init, check, diff, lock  budgets of runs in a repository, and their changes
  models, gpus, profiles   lists: models 7b, gpus --min 24GiB --sort price
  probe, calibrate, card   check with the real libraries; facts of a new model
  web, serve, webhook      a page; answers over HTTP; reviews of pods
  estimate, schema         the same as memplan MODEL; JSON Schemas

  memplan help TOPIC       training, parallel, generation, serving, gpus, ci
  memplan COMMAND --help   a command's options; --help-all those of every run
  --version, --install-completion, --show-completion
"""


class Topic(NamedTuple):
    """A topic of help.

    headings  of the options of `memplan estimate`
    options   the ones of these headings, if not all
    """

    text: str
    headings: tuple[str, ...]
    options: tuple[str, ...] = ()


TOPICS = {
    "training": Topic(
        "How a run trains: its method, batch, precision, optimizer and kernels.",
        (
            "Training",
            "Adapters and quantisation",
            "Precision and optimizer",
            "Kernels",
            "Evaluation, saving and merging",
        ),
    ),
    "parallel": Topic(
        "How several GPUs divide a run: --gpus 8 --zero 3, --gpu 2x4090 --fsdp fsdp2.", ("Several GPUs",)
    ),
    "generation": Topic(
        "Generating with transformers: --method generate --seq-len 4k --new-tokens 256.", ("Generation",)
    ),
    "serving": Topic("Engines: --method generate --profile vllm, sglang, tgi or llama.cpp.", ("Serving engines",)),
    "gpus": Topic(
        "A card is named by its id, alias, what nvidia-smi prints, or its size: 3090, 'rtx 4090', a100-40gb, 24gb. "
        "2x4090 is two of one, g5.12xlarge those of a cloud's machine, 3090,4090 are two answers, auto asks the "
        "driver. memplan gpus lists all cards.",
        ("GPUs", "Several GPUs"),
        ("gpu", "gpus", "gpus_per_node"),
    ),
    "ci": Topic(
        "Exit codes: 0 fits, or no GPU given; 1 does not fit or start; 2 wrong input; 3 the model's config is not "
        "available; 4 with --strict, something unsupported was left out. With --strict, tight is 1.",
        ("Input and output",),
        ("spec", "framework", "online", "format", "json", "output", "strict"),
    ),
}


def topic_help(name: str) -> str:
    """Return the help on a topic. Raises UnknownNameError."""
    from memplan.cli.commands import Subcommand
    from memplan.cli.estimate import ESTIMATE_OPTIONS, estimate
    from memplan.cli.plain import COMMANDS
    from memplan.cli.typer_commands import OptionsCommand

    if name not in TOPICS:
        raise UnknownNameError("help", name, (*TOPICS, *COMMANDS))
    topic = TOPICS[name]
    options = {
        heading: {
            row: option
            for row, option in ESTIMATE_OPTIONS[heading].items()
            if not topic.options or row in topic.options
        }
        for heading in topic.headings
    }
    command: Any = OptionsCommand(Subcommand("", estimate, options, topic.text), add_help_option=False)
    with command.make_context("memplan MODEL", [], resilient_parsing=True) as context:
        return command.get_help(context) + "\n"
