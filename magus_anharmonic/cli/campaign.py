"""``campaign``: the paper's two stages over several pressures, from one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magus_anharmonic.cli.common import Verbose, app, configure_logging, console, user_errors
from magus_anharmonic.errors import InputError


@app.command()
def campaign(
    source: Annotated[str, typer.Argument(help="campaign.yaml, or the word [bold]status[/bold].", metavar="FILE")],
    file: Annotated[Path | None, typer.Argument(help="After [bold]status[/bold]: campaign.yaml, or its folder.", metavar="[FILE]")] = None,
    show: Annotated[bool, typer.Option("--status", help="Show the steps, their counts, times and cost, and stop.")] = False,
    only: Annotated[str | None, typer.Option(help="Run this step alone, again if it is done.")] = None,
    verbose: Verbose = False,
) -> None:
    """Run a whole campaign, or go on with it: learning searches, final model, production, SSCHA, checks, figures, report.

    Works in the folder of the file and leaves everything in [bold]campaign/[/bold] there. Finished steps are skipped; a step whose
    settings have changed runs again, and so does what depends on it.
    """
    configure_logging(verbose)
    with user_errors():
        from magus_anharmonic.campaign.status import campaign_file

        asked = source == "status"
        if file is not None and not asked:
            raise InputError(f"campaign: {file}: one campaign file at a time (campaign status FILE shows the steps)")
        if asked and file is None:
            raise InputError("campaign status: give campaign.yaml, or its folder")
        path = campaign_file(file if asked and file is not None else source)
        if asked or show:
            _show(path)
            return
        from magus_anharmonic.campaign.run import run_campaign, unfinished

        records = run_campaign(path, only=only)
        _show(path)
        if only is None and unfinished(records):
            raise typer.Exit(1)


def _show(path: Path) -> None:
    from rich.table import Table

    from magus_anharmonic.campaign.status import status

    found = status(path)
    table = Table(title=str(path))
    for name in found.columns:
        table.add_column(name, justify="left" if name in ("step", "status", "remark") else "right", overflow="fold")
    for row in found.rows:
        table.add_row(*row)
    screen = console(140)
    screen.print(table)
    for line in found.missing:
        screen.print(f"* {line}", highlight=False, soft_wrap=True)
    if not found.missing:
        screen.print(f"Everything is done: {path.resolve().parent / 'campaign'}", highlight=False, soft_wrap=True)
