"""``magus-anharmonic``: parse, call, print. Every library is imported inside the command that needs
it."""

from __future__ import annotations

import signal
import sys
from importlib import import_module

import typer

from magus_anharmonic.cli.common import app

COMMANDS = ("search", "physics", "study")
"""The modules of this package, in the order in which ``--help`` lists their commands; importing one
registers it."""

for _name in COMMANDS:
    import_module(f"magus_anharmonic.cli.{_name}")


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except KeyboardInterrupt:  # before a command has begun, while its options are read
        typer.echo("interrupted", err=True)
        sys.exit(128 + signal.SIGINT)
