"""What every command shares: the application, how errors end, where log lines go."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from magus_anharmonic.errors import InputError, MagusAnharmonicError

app = typer.Typer(
    name="magus-anharmonic",
    help="Crystal structure prediction with moving ions: MAGUS, MatterSim and the SSCHA in one loop.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

INPUT_ERROR = 2


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors meant for the user into one clear message and an exit code (2 = the input is wrong)."""
    try:
        yield
    except InputError as error:
        for problem in error.problems:
            typer.echo(f"input error: {problem}", err=True)
        raise typer.Exit(INPUT_ERROR) from None
    except MagusAnharmonicError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("stopped; finished work is kept, run the same command with -r to go on", err=True)
        raise typer.Exit(130) from None


def configure_logging(verbose: bool) -> None:
    """Log lines to standard error: coloured on a terminal, plain with a time stamp when redirected."""
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S")
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    handler.set_name("magus-anharmonic")
    root = logging.getLogger()
    for earlier in [known for known in root.handlers if known.get_name() == handler.get_name()]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    logging.getLogger("magus_anharmonic").setLevel(logging.DEBUG if verbose else logging.INFO)


InputFile = Annotated[Path, typer.Option("-i", "--input-file", help="The input file in YAML, MAGUS's keys and ours.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show debugging lines too.")]
