"""What every command shares: the application, ``-v`` and ``-q``, how errors end, where log lines
go, and the defaults that its help shows."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

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

if TYPE_CHECKING:
    from magus_anharmonic.settings import Settings

app = typer.Typer(
    name="magus-anharmonic",
    help=(
        "Crystal structure prediction with quantum ions: MAGUS, MatterSim and SSCHA in one loop."
    ),
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
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
        typer.Option(
            "-V", "--version", help="Show the version.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Crystal structure prediction with quantum ions: MAGUS, MatterSim and SSCHA in one loop."""


Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show debugging lines too.")]
Quiet = Annotated[
    bool, typer.Option("-q", "--quiet", help="Show warnings alone; the results are in files.")
]
SETTINGS = "of the settings"
"""``show_default`` of an option that is called as a key of `Settings`, of ``sscha`` or of the
calculator."""


class Command(TyperCommand):
    """Shows for `SETTINGS` the defaults of the settings, read only when somebody asks for help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        from magus_anharmonic.settings import CalculatorSettings, Settings, SschaSettings

        fields = {
            **Settings.model_fields, **CalculatorSettings.model_fields, **SschaSettings.model_fields
        }  # fmt: skip
        for option in self.params:
            if isinstance(option, TyperOption) and option.show_default == SETTINGS:
                # the help ends the process: what is read of it here is never used
                option.default, option.show_default = fields[option.name or ""].default, True
        super().format_help(ctx, formatter)


def command(
    name: str | None = None, *, go_on: str = "run the same command again"
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command: it gets ``-v`` and ``-q``, and `user_errors`, for which ``go_on`` is."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*, verbose: bool, quiet: bool, **options: Any) -> None:
            level = logging.DEBUG if verbose else logging.INFO
            configure_logging(logging.WARNING if quiet else level)
            with open(os.devnull, "w") if quiet else contextlib.nullcontext(sys.stdout) as screen:
                with contextlib.redirect_stdout(screen), user_errors(go_on):
                    function(**options)

        signature = inspect.signature(function, eval_str=True)
        flags = {"verbose": Verbose, "quiet": Quiet}
        own = [
            inspect.Parameter(flag, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
            for flag, kind in flags.items()
        ]
        run.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*signature.parameters.values(), *own]
        )
        run.__annotations__ = {**function.__annotations__, **flags}
        return app.command(name, cls=Command)(run)

    return register


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
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        wanted = "file" if isinstance(error, IsADirectoryError) else "folder"
        say(f"input error: {reason_of(error)}; give the path of a {wanted}", err=True)
        raise typer.Exit(INPUT_ERROR) from None
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


def configure_logging(level: int) -> None:
    """Log lines from ``level`` on to standard error: coloured on a terminal, else plain with a time
    stamp."""
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
    logging.getLogger("magus_anharmonic").setLevel(level)


def settings_of(
    input_file: Path | None,
    pressure: float | None,
    seed: int | None,
    calculator: tuple[str | None, str | None, str | None],
    **sscha: Any,
) -> Settings:
    """`rank_settings` of options, where a key that neither we nor MAGUS know is an ``InputError``
    too; ``calculator``: that, its checkpoint and device, ``sscha``: keys of that block."""
    from magus_anharmonic.search.keys import unknown_to_magus
    from magus_anharmonic.settings import rank_settings

    given = {"pressure": pressure, "seed": seed}
    block = dict(zip(("calculator", "checkpoint", "device"), calculator, strict=True))
    settings = rank_settings(input_file, given, calculator=block, sscha=sscha)
    if unknown := unknown_to_magus(settings):
        raise InputError(*unknown)
    return settings


def key(help: str) -> Any:
    """An option that is called as a key of the settings, whose default it shows."""
    return typer.Option(help=help, show_default=SETTINGS)


def measured(unit: str, help: str = "", **more: Any) -> Any:
    """An option that is a number in ``unit``, or one with a unit: ``--pressure 150GPa``."""

    def parse(text: Any) -> float:
        from magus_anharmonic.units import quantity

        try:
            return quantity(text, unit)
        except ValueError as error:
            raise typer.BadParameter(f"{text!r}: {error}") from None

    return typer.Option(parser=parse, metavar=unit, help=help, **more)


InputFile = Annotated[
    Path, typer.Option("-i", "--input-file", help="The input file in YAML, MAGUS's keys and ours.")
]
SettingsFile = Annotated[
    Path | None,
    typer.Option("-i", "--input-file", help="Keys as for search, in YAML; options go before them."),
]
Checkpoint = Annotated[str | None, key("A MatterSim name, a path, or a shipped checkpoint.")]
Calculator = Annotated[
    str | None,
    typer.Option(
        help="Instead of MatterSim: a name of an installed package, or the import path of an ASE"
        " calculator, e.g. ase.calculators.emt.EMT;"
        " its arguments in the file of -i."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda.")]
Results = Annotated[Path, typer.Option("-o", "--output", help="Folder for all results.")]
Seed = Annotated[int | None, typer.Option(help="Same input and seed, same result; left out: 0.")]
