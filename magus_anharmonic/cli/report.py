"""``report``: one page of a campaign, a search or a ranking."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magus_anharmonic.cli.common import Verbose, app, configure_logging, say, user_errors


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Where a campaign or a search was run, or the output of rank.")] = Path("."),
    verbose: Verbose = False,
) -> None:
    """Write one self-contained page, report.html, and the structures as CIF, POSCAR and extxyz beside it.

    Works at any moment of a run: the page says what is missing.
    """
    configure_logging(verbose)
    with user_errors():
        from magus_anharmonic.report import write_report

        page = write_report(folder)
        say(f"Report: {page.resolve()}\nStructures: {page.parent.resolve() / 'structures'}")
