"""``status``: where a running or dead search is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magus_anharmonic.cli.common import app, configure_logging, say, user_errors


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="Folder of a search (with results/) or of a campaign (with campaign/).")] = Path("."),
) -> None:
    """Say where a search or campaign is, what it waits for, how fast it goes, and what failed last. Only reads."""
    configure_logging(False)
    with user_errors():
        from magus_anharmonic.status import status as status_of

        for line in status_of(folder).lines():
            say(line)
