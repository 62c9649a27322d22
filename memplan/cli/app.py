"""The command as typer's: help, completion, errors of usage, and the commands that typer parses."""

import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from memplan.cli.commands import Subcommand
from memplan.cli.outcome import fail, run_and_report, show, unwritten
from memplan.cli.plain import COMMANDS, HELP, HELP_ALL, RESERVED_COMMANDS, command_of, run_plain, with_method
from memplan.cli.typer_commands import OptionsCommand, UsageError, usage


class Memplan(TyperGroup):
    """A first argument that is not a command is a model: `memplan MODEL` is `memplan estimate MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        group_options = {option for param in self.get_params(ctx) for option in param.opts}
        if args[:1] == [HELP]:
            from memplan.cli.help import TOPICS, topic_help

            if args[1:] and (args[1] in TOPICS or args[1] not in COMMANDS):
                raise typer.Exit(run_and_report(lambda: show(topic_help(args[1])) or 0))
            args = [*args[1:2], "--help"]
        if args == [HELP_ALL]:
            args = ["estimate", "--help"]
        first = args[0].partition("=")[0] if args else ""
        if first in group_options:
            return super().parse_args(ctx, args)
        if first in RESERVED_COMMANDS:
            ctx.fail(f"{first} is not supported yet; commands are {', '.join(COMMANDS)}")
        if first not in COMMANDS and (args or not ctx.resilient_parsing):
            args = ["estimate", *args]
        params, self.params, self.add_help_option = self.params, [], False  # typer is slow at options, given or not
        try:
            return super().parse_args(ctx, args)
        finally:
            self.params, self.add_help_option = params, True

    def get_help(self, ctx: Any) -> str:
        from memplan.cli.help import SCREEN

        return SCREEN.rstrip("\n")

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = command_of(cmd_name) if cmd_name in COMMANDS else None
        return OptionsCommand(command) if isinstance(command, Subcommand) else command

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Complete commands, and the models and options of `estimate`."""
        estimate = self.get_command(ctx, "estimate")
        with estimate.make_context("estimate", [], parent=ctx, resilient_parsing=True) as inner:
            complete = estimate if incomplete.startswith("-") else estimate.params[0]
            more = complete.shell_complete(inner, incomplete)
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
        """Run the command and exit. Every error that the user can fix is one line on standard error."""
        try:
            code = run_plain(args or ())
            if code is None:
                words = with_method(sys.argv[1:] if args is None else args)
                code = super().main(words, prog_name or "memplan", complete_var, False, windows_expand_args, **extra)
        except UsageError as error:
            code = fail(usage(error), error.exit_code)
        except (typer.Abort, KeyboardInterrupt):
            code = 130
        except SystemExit:  # click ends so when the reader of help has gone
            code = 0
        except OSError as error:  # writing help or the version failed; other output handles its own errors
            code = fail(unwritten(error), 2)
        sys.exit(code or 0)


app = typer.Typer(
    cls=Memplan,
    name="memplan",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="How much GPU memory a language model takes to train or run, when, and whether it fits.",
    epilog="memplan MODEL [options] is short for memplan estimate MODEL [options].",
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _version(asked: bool) -> None:
    if asked:
        from memplan.core.version import __version__
        from memplan.engine.native import library

        replays = "in Python" if library() is None else "compiled"
        text = f"memplan {__version__}\nreplays of torch's allocator: {replays}\n"
        raise typer.Exit(run_and_report(lambda: show(text) or 0))


@app.callback()
def _root(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass
