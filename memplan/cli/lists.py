"""`memplan models`, `gpus`, `profiles` and `schema`: lists of valid input, and the schema of the output."""

from typing import Annotated

import typer

from memplan.cli.answering import run_and_report, show
from memplan.cli.options import choices, complete_gpu, complete_model, complete_profile

_TEXT = "Text to search for in names, ids and kinds. Default everything."
_MODEL = typer.Argument(help=_TEXT, autocompletion=complete_model)
_GPU = typer.Argument(help=_TEXT, autocompletion=complete_gpu)
_PROFILE = typer.Argument(help=_TEXT, autocompletion=complete_profile)
_JSON = typer.Option("--json", help="As JSON.")


def models(text: Annotated[list[str] | None, _MODEL] = None, json: Annotated[bool, _JSON] = False) -> int:
    """List the bundled models: parameters, layers, positions, licence."""

    def listed() -> int:
        from memplan.report.listing import models

        show(models(" ".join(text or ()), json), "json" if json else "table")
        return 0

    return run_and_report(listed)


def gpus(text: Annotated[list[str] | None, _GPU] = None, json: Annotated[bool, _JSON] = False) -> int:
    """List the GPUs: usable memory, compute capability, bf16 support, bandwidth, and dated prices."""

    def listed() -> int:
        from memplan.report.listing import cards

        show(cards(" ".join(text or ()), json), "json" if json else "table")
        return 0

    return run_and_report(listed)


def profiles(text: Annotated[list[str] | None, _PROFILE] = None, json: Annotated[bool, _JSON] = False) -> int:
    """List the profiles (frameworks and versions), and the defaults that each sets."""

    def listed() -> int:
        from memplan.report.listing import profiles

        show(profiles(" ".join(text or ()), json), "json" if json else "table")
        return 0

    return run_and_report(listed)


_SCHEMAS = ("answer", "run", "comparison", "plan")


def schema(
    of: Annotated[
        str,
        typer.Argument(help="answer (with the run in it), run, comparison or plan.", autocompletion=choices(*_SCHEMAS)),
    ] = "answer",
) -> int:
    """Print the JSON Schema of an answer, a run, a comparison or a plan."""

    def printed() -> int:
        import json

        from memplan.core.errors import UnknownNameError
        from memplan.report.schema import answer_schema, comparison_schema, plan_schema, run_schema

        if of not in _SCHEMAS:
            raise UnknownNameError("schema", of, _SCHEMAS)
        schemas = {"answer": answer_schema, "run": run_schema, "comparison": comparison_schema, "plan": plan_schema}
        show(json.dumps(schemas[of](), indent=2) + "\n", "json")
        return 0

    return run_and_report(printed)
