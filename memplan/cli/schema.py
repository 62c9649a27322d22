"""`memplan schema`: the JSON Schema of the output."""

from typing import Annotated, Any

import typer

from memplan.cli.outcome import run_and_report, show
from memplan.cli.typer_commands import completion, typer_command
from memplan.core.errors import UnknownNameError

_SCHEMAS = ("answer", "run", "comparison", "plan")


def command(name: str) -> Any:
    return typer_command(schema, name)


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
