"""Shared by the options of several commands: their construction, help headings, choices and completion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand

METHODS = ("full", "lora", "qlora", "dora", "qdora", "freeze")
TASKS = ("generate", "forward")  # tasks without training
OBJECTIVES = (  # those of memplan.models.objectives.Objective, which is not imported to keep commands fast
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
TRAINING, SIDE_TASKS, GENERATION, ADAPTERS, DTYPES, KERNELS, GPUS, SEVERAL, OUTPUT = (
    "Training",
    "Evaluation, saving and merging",
    "Generation",
    "Adapters and quantisation",
    "Precision and optimizer",
    "Kernels",
    "GPUs",
    "Several GPUs",
    "Input and output",
)


def option(help: str, *names: str, of: str, complete: Callable[[str], list[str]] | None = None, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=of, autocompletion=complete, show_default=False, **more)


class Grouped(TyperCommand):
    """A command whose help groups options under headings."""

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


def complete_model(incomplete: str) -> list[str]:
    from memplan.models.cards import card_names, load_card

    cards = [load_card(name).card for name in card_names()] if "/" in incomplete else []
    ids = [str(name) for card in cards for name in (card["hf_id"], *card.get("aliases", ()))]
    return [name for name in (*card_names(), *ids) if name.startswith(incomplete)]


def complete_gpu(incomplete: str) -> list[str]:
    from memplan.catalogue.hardware.gpus import all_gpus

    names = [name for gpu in all_gpus() for name in (gpu.name, *gpu.aliases)]
    return [name for name in names if name.startswith(incomplete)]


def complete_optimizer(incomplete: str) -> list[str]:
    from memplan.catalogue.optimizers.states import optimizer_names

    return [name for name in optimizer_names() if name.startswith(incomplete)]


def complete_profile(incomplete: str) -> list[str]:
    from memplan.catalogue.profiles.engines import ENGINES
    from memplan.catalogue.profiles.profiles import PROFILES

    return [profile.name for profile in (*PROFILES, *ENGINES) if profile.name.startswith(incomplete)]


def complete_format(incomplete: str) -> list[str]:
    from typing import get_args

    from memplan.spec.formats import Format

    return [name for name in get_args(Format) if name.lower().startswith(incomplete.lower())]


def choices(*words: str) -> Callable[[str], list[str]]:
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]
