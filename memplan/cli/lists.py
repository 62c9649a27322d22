"""`memplan models`, `gpus`, `profiles` and `schema`: lists of valid input, and the schema of the output."""

from typing import Annotated, Any

import typer

from memplan.cli.answering import run_and_report, show
from memplan.cli.options import complete_gpu, complete_model, complete_profile, completion, typer_command
from memplan.core.errors import UnknownNameError

_TEXT = "Text to search for in names, ids and kinds. Default everything."
_LISTS = {
    "models": ("List the bundled models: parameters, layers, positions, licence.", complete_model),
    "gpus": (
        "List the GPUs: usable memory, compute capability, bf16 support, bandwidth, and dated prices.",
        complete_gpu,
    ),
    "profiles": ("List the profiles (frameworks and versions), and the defaults that each sets.", complete_profile),
}
_SCHEMAS = ("answer", "run", "comparison", "plan")


def command(name: str) -> Any:
    if name == "schema":
        return typer_command(schema, name)
    help, complete = _LISTS[name]

    def listing(
        text: Annotated[list[str] | None, typer.Argument(help=_TEXT, autocompletion=complete)] = None,
        json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    ) -> int:
        return run_and_report(lambda: _print_list(name, " ".join(text or ()), json))

    listing.__doc__ = help
    return typer_command(listing, name)


def _print_list(name: str, text: str, json: bool) -> int:
    from memplan.report.listing import cards, models, profiles

    show({"models": models, "gpus": cards, "profiles": profiles}[name](text, json), "json" if json else "table")
    return 0


def schema(
    of: Annotated[
        str,
        typer.Argument(
            help="answer (with the run in it), run, comparison or plan.", autocompletion=completion(*_SCHEMAS)
        ),
    ] = "answer",
) -> int:
    """Print the JSON Schema of an answer, a run, a comparison or a plan."""

    def printed() -> int:
        import json

        from memplan.report.schema import answer_schema, comparison_schema, plan_schema, run_schema

        if of not in _SCHEMAS:
            raise UnknownNameError("schema", of, _SCHEMAS)
        schemas = {"answer": answer_schema, "run": run_schema, "comparison": comparison_schema, "plan": plan_schema}
        show(json.dumps(schemas[of](), indent=2) + "\n", "json")
        return 0

    return run_and_report(printed)
