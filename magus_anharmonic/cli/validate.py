"""``validate``: does a campaign reproduce what is known?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magus_anharmonic.cli.common import app, say, user_errors
from magus_anharmonic.errors import InputError


@app.command()
def validate(
    campaign: Annotated[Path | None, typer.Argument(help="The folder of a campaign.")] = None,
    expected: Annotated[Path | None, typer.Argument(help="Expected values: YAML as inputs/h3s-paper/expected.yaml.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for validation.csv and validation.json. [default: beside the tables]")
    ] = None,
    names: Annotated[bool, typer.Option("--names", help="List the values that can be validated, and stop.")] = False,
) -> None:
    """Compare a campaign with expected values: found, expected, difference, agrees or not, and what could explain a difference.

    Exit code 0 when everything that was found agrees, 1 when something disagrees, 2 for a wrong input.
    """
    with user_errors():
        if names:
            from magus_anharmonic.analysis.expected import NAMES, UNITS

            for name, one in NAMES.items():
                needs = f" Needs {', '.join(one.needs)}." if one.needs else ""
                say(f"{name}: {one.meaning}; in {' or '.join(UNITS[one.dimension])}.{needs}")
            return
        if campaign is None or expected is None:
            raise InputError("give the folder of a campaign and a YAML of expected values")
        from magus_anharmonic.analysis.validate import tables_folder, write_validation
        from magus_anharmonic.analysis.validate import validate as compare

        rows = compare(campaign, expected)
        write_validation(rows, output or tables_folder(campaign).parent)
        for row in rows:
            say(row.line)
            for reason in row.could_explain:
                say(f"{'':17s}could explain it: {reason}")
        words = {"agrees": "agree", "disagrees": "disagree", "not in this run": "not in this run"}
        counts = [f"{sum(row.verdict == verdict for row in rows)} {word}" for verdict, word in words.items()]
        say(f"\n{', '.join(counts)}")
        if any(row.verdict == "disagrees" for row in rows):
            raise typer.Exit(1)
