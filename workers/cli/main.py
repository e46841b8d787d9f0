"""The entry point: finds the command, and turns errors into one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from ps.errors import ConfigError, PsError
from ps.storage.files import reason
from workers.cli import audit, before, certs, chaos, checkpoint, export, inspect, plot, roles, status, train
from workers.launch.processes import ERROR_PREFIX
from workers.launch.slips import hint_for_option

# The root of "wrong usage" in whichever click this typer brings.
_CLICK_ERROR: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    help="A sharded parameter server for PyTorch.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_COMMANDS: tuple[Callable[..., int], ...] = (
    before.init,
    before.validate,
    train.train,
    train.resume,
    inspect.evaluate,
    inspect.sample,
    inspect.digest,
    export.export,
    status.status,
    plot.plot,
    train.prepare,
    roles.coordinator,
    roles.shard,
    roles.worker,
    roles.health,
)
for _command in _COMMANDS:
    app.command()(_command)
app.command("audit")(audit.audit_run)
app.command("chaos")(chaos.chaos)
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(certs.app, name="certs")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"windlass {version('windlass')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _windlass(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 2 for wrong usage, 1 for what else went wrong, 128 + a signal's number.

    Args:
        arguments: without the program's name; those of the process when absent.
    """
    try:
        command = typer.main.get_command(app)
        result = command.main(args=arguments, prog_name="windlass", standalone_mode=False)
    except PsError as error:
        return _fail(error.message, 2 if isinstance(error, ConfigError) else 1)
    except _CLICK_ERROR as error:
        message = " ".join(str(getattr(error, "format_message", error.__str__)()).split())
        typed = sys.argv[1:] if arguments is None else arguments
        return _fail(message + hint_for_option(getattr(error, "option_name", None), typed), 2)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except SystemExit as error:
        # What typer makes of a broken pipe: exit code 1, which is to say that something is wrong.
        if isinstance(error.__context__, BrokenPipeError):
            return _unwritten(error.__context__)
        raise
    code = result if isinstance(result, int) else 0
    try:
        # What is left of the output is written here: at exit nobody could say why it is not.
        print(end="", flush=True)
    except OSError as error:
        return code or _unwritten(error)
    return code


def _unwritten(error: OSError) -> int:
    """The exit code when what is printed cannot be written: whoever read it has gone (`| head`), or a disk is full."""
    # It would be tried again at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE
    return _fail(f"the output cannot be written: {reason(error)}", 1)


def _fail(message: str, code: int) -> int:
    print(f"{ERROR_PREFIX}{message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
