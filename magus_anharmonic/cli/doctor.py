"""``doctor``: what is installed, registered and missing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magus_anharmonic.cli.common import app, console, user_errors


@app.command()
def doctor(
    input_file: Annotated[Path | None, typer.Option("-i", "--input-file", help="Check what this input needs.")] = None,
) -> None:
    """Say what is installed, what is registered, and what is missing; exit code 1 when the input needs it."""
    with user_errors():
        from rich.table import Table
        from rich.text import Text

        from magus_anharmonic.doctor import collect, exit_code
        from magus_anharmonic.settings import load_settings

        checks = collect(load_settings(input_file) if input_file else None)
        shown = Table("", "what", "found", "what to do", box=None, pad_edge=False)
        for check in checks:
            missing = Text("missing", "red") if check.needed else "absent"
            mark = {True: Text("ok", "green"), False: missing, None: "-"}[check.ok]
            shown.add_row(mark, check.name, check.detail, "" if check.ok else check.fix)
        console(160).print(shown)
        if exit_code(checks):
            raise typer.Exit(1)
