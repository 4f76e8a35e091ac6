"""What every command shares: the application, how errors end, where log lines go."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from magus_anharmonic.errors import (
    InputError,
    LostLock,
    MagusAnharmonicError,
    Terminated,
    is_machine_error,
    printable,
    reason_of,
)
from magus_anharmonic.report.screen import console as console
from magus_anharmonic.units import quantity

app = typer.Typer(
    name="magus-anharmonic",
    help=(
        "Crystal structure prediction with quantum ions: MAGUS, MatterSim and SSCHA in one loop."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

INPUT_ERROR = 2


def _show_version(asked: bool) -> None:
    if asked:
        from magus_anharmonic import __version__

        typer.echo(f"magus-anharmonic {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Crystal structure prediction with quantum ions: MAGUS, MatterSim and SSCHA in one loop."""


def say(text: str, *, err: bool = False) -> None:
    """One line on the terminal (``err``: on standard error), whatever it quotes."""
    typer.echo(printable(text), err=err)


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextlib.contextmanager
def user_errors(go_on: str = "run the same command again") -> Iterator[None]:
    """Turn errors meant for the user into one clear message and an exit code (2 = the input is
    wrong); ``go_on``: how, after a stop."""
    try:
        with _terminating():
            yield
    except InputError as error:
        for problem in error.problems:
            say(f"input error: {problem}", err=True)
        raise typer.Exit(INPUT_ERROR) from None
    except MagusAnharmonicError as error:
        resume = f"; finished work is kept, mend it and {go_on} to go on"
        say(f"error: {error}{resume if is_machine_error(error) else ''}", err=True)
        raise typer.Exit(1) from None
    except (KeyboardInterrupt, Terminated) as error:
        say(f"{reason_of(error)}; finished work is kept, {go_on} to go on", err=True)
        raise typer.Exit(
            128 + (signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)
        ) from None
    except LostLock as error:
        say(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except Exception as error:
        if not (isinstance(error, OSError) or is_machine_error(error)):
            raise
        logging.getLogger(__name__).debug("stopped", exc_info=True)
        say(
            f"error: {reason_of(error)}; finished work is kept, mend it and {go_on} to go on",
            err=True,
        )
        raise typer.Exit(1) from None


@contextlib.contextmanager
def _terminating() -> Iterator[None]:
    """Let SIGTERM end the block as an exception, so that locks are given back and child processes
    end; a second one ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def configure_logging(verbose: bool) -> None:
    """Log lines to standard error: coloured on a terminal, plain with a time stamp when
    redirected."""
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.logging import RichHandler

        handler = RichHandler(
            console=console(stderr=True), show_path=False, log_time_format="%H:%M:%S"
        )
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(_Printable("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    handler.set_name("magus-anharmonic")
    root = logging.getLogger()
    for earlier in [known for known in root.handlers if known.get_name() == handler.get_name()]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    logging.getLogger("magus_anharmonic").setLevel(logging.DEBUG if verbose else logging.INFO)


def measured(unit: str, help: str = "", **more: Any) -> Any:
    """An option that is a number in ``unit``, or one with a unit: ``--pressure 150GPa``."""

    def parse(text: Any) -> float:
        try:
            return quantity(text, unit)
        except ValueError as error:
            raise typer.BadParameter(f"{text!r}: {error}") from None

    return typer.Option(parser=parse, metavar=unit, help=help, **more)


InputFile = Annotated[
    Path, typer.Option("-i", "--input-file", help="The input file in YAML, MAGUS's keys and ours.")
]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show debugging lines too.")]
