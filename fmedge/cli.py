"""The command line: one module for each command under fmedge.commands, put together here.

Errors that fmedge raises on purpose become one line on stderr and exit code 1; usage errors exit with 2, an interrupt
with 130 (typer sees to both). `--debug` shows the traceback.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from fmedge_runtimes.errors import FmedgeError
from fmedge_runtimes.version import __version__

from fmedge.commands import bench, build, chat, check, doctor, evaluate, export, generate, inspect, plan, train, verify

EXAMPLES = """
[bold]Examples[/bold]

  fmedge train text out/model --minutes 3

  fmedge train image out/painter --minutes 4

  fmedge export out/model out/bundle --quantize int4

  fmedge generate out/bundle "The list type"

  fmedge generate out/images "a red circle" --output circle.png

  fmedge chat out/bundle

  fmedge plan out/bundle --slots 8 --memory 2GiB

  fmedge bench out/bundle

  fmedge doctor out/bundle

  fmedge check out/engine-bundle --target orin-nano-8gb

  fmedge build out/engine-bundle

  fmedge inspect out/bundle

  fmedge eval out/painter
"""

app = typer.Typer(
    name="fmedge",
    help="Train, export and run language and image models on edge devices.",
    epilog=EXAMPLES,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(train.app, name="train")
app.command("export", epilog=export.EPILOG)(export.command)
app.command("generate", epilog=generate.EPILOG)(generate.command)
app.command("chat", epilog=chat.EPILOG)(chat.command)
app.command("inspect")(inspect.command)
app.command("check", epilog=check.EPILOG)(check.command)
app.command("doctor", epilog=doctor.EPILOG)(doctor.command)
app.command("build", epilog=build.EPILOG)(build.command)
app.command("plan", epilog=plan.EPILOG)(plan.command)
app.command("bench", epilog=bench.EPILOG)(bench.command)
app.command("verify")(verify.command)
app.command("eval", epilog=evaluate.EPILOG)(evaluate.command)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"fmedge {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Train, export and run language and image models on edge devices."""
    del debug  # main() looks for it before typer runs, since it decides what becomes of errors


def main() -> None:
    """Run the command line."""
    debug = "--debug" in sys.argv[1:2]
    try:
        app()
    except FmedgeError as error:
        if debug:
            raise
        typer.secho(f"fmedge: error: {error}", fg=typer.colors.RED if sys.stderr.isatty() else None, err=True)
        sys.exit(1)
