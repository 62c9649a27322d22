"""`memplan models`, `gpus`, `profiles` and `schema`: what there is to ask for, and what comes out."""

from typing import Annotated

import typer

from memplan.cli.answering import answered, show
from memplan.cli.options import choices, complete_gpu, complete_model, complete_profile

_TEXT = "What to look for in names, ids and kinds. Default everything."
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

    return answered(listed)


def gpus(text: Annotated[list[str] | None, _GPU] = None, json: Annotated[bool, _JSON] = False) -> int:
    """List the GPUs: usable memory, capability, bf16, bandwidth, prices with their date."""

    def listed() -> int:
        from memplan.report.listing import cards

        show(cards(" ".join(text or ()), json), "json" if json else "table")
        return 0

    return answered(listed)


def profiles(text: Annotated[list[str] | None, _PROFILE] = None, json: Annotated[bool, _JSON] = False) -> int:
    """List the profiles, frameworks and their versions, and what each sets where a run leaves it open."""

    def listed() -> int:
        from memplan.report.listing import profiles

        show(profiles(" ".join(text or ()), json), "json" if json else "table")
        return 0

    return answered(listed)


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
        made = {"answer": answer_schema, "run": run_schema, "comparison": comparison_schema, "plan": plan_schema}[of]()
        show(json.dumps(made, indent=2) + "\n", "json")
        return 0

    return answered(printed)
