"""init, campaign, status, report, validate and doctor.

``init``: the first input of a project.

``campaign``: the paper's two stages over several pressures, from one file.

``status``: where a running or dead search is.

``report``: one page of a campaign, a search, a ranking or a phase diagram.

``validate``: does a campaign reproduce what is known?

``doctor``: what is installed, registered and missing.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from magus_anharmonic.cli.common import Checkpoint, command, console, measured, say
from magus_anharmonic.errors import InputError


@command()
def campaign(
    source: Annotated[
        str, typer.Argument(help="campaign.yaml, or the word [bold]status[/bold].", metavar="FILE")
    ],
    file: Annotated[
        Path | None,
        typer.Argument(
            help="After [bold]status[/bold]: campaign.yaml, or its folder.", metavar="[FILE]"
        ),
    ] = None,
    show: Annotated[
        bool,
        typer.Option("--status", help="Show the steps, their counts, times and cost, and stop."),
    ] = False,
    only: Annotated[
        str | None, typer.Option(help="Run this step alone, again if it is done.")
    ] = None,
) -> None:
    """Run a whole campaign, or go on with it: learning searches, final model, production, SSCHA,
    checks, figures, report.

    Works in the folder of the file and leaves everything in [bold]campaign/[/bold] there. Finished
    steps are skipped; a step whose settings have changed runs again, and so does what depends on
    it.
    """
    from magus_anharmonic.campaign.run import campaign_file

    asked = source == "status"
    if file is not None and not asked:
        raise InputError(
            f"campaign: {file}: one campaign file at a time (campaign status FILE shows the steps)"
        )
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

    from magus_anharmonic.campaign.run import status

    found = status(path)
    table = Table(title=str(path))
    for name in found.columns:
        table.add_column(name, justify="left" if name in ("step", "status", "remark") else "right")
    for row in found.rows:
        table.add_row(*row)
    screen = console(140)
    screen.print(table)
    for line in found.missing:
        screen.print(f"* {line}", highlight=False, soft_wrap=True)
    if not found.missing:
        screen.print(
            f"Everything is done: {path.resolve().parent / 'campaign'}",
            highlight=False,
            soft_wrap=True,
        )


@command()
def status(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder of a search (with results/) or of a campaign (with campaign/)."
        ),
    ] = Path("."),
) -> None:
    """Say where a search or campaign is, what it waits for, how fast it goes, and what failed last.
    Only reads."""
    from magus_anharmonic.runs.status import status as status_of

    for line in status_of(folder).lines():
        say(line)


@command()
def report(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Where a campaign or a search was run, or the output of rank or phase-diagram."
        ),
    ] = Path("."),
) -> None:
    """Write one self-contained page, report.html, and the structures as CIF, POSCAR and extxyz
    beside it.

    Works at any moment of a run: the page says what is missing.
    """
    from magus_anharmonic.report import write_report

    page = write_report(folder)
    structures = page.resolve().parent / "structures"
    say(f"Report: {page.resolve()}" + f"\nStructures: {structures}" * structures.is_dir())


@command()
def validate(
    campaign: Annotated[Path | None, typer.Argument(help="The folder of a campaign.")] = None,
    expected: Annotated[
        Path | None, typer.Argument(help="Expected values: YAML as inputs/h3s-paper/expected.yaml.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Folder for validation.csv and validation.json; left out: beside the tables.",
        ),
    ] = None,
    names: Annotated[
        bool, typer.Option("--names", help="List the values that can be validated, and stop.")
    ] = False,
) -> None:
    """Compare a campaign with expected values: found, expected, difference, agrees or not, and what
    could explain a difference.

    Exit code 0 when everything that was found agrees, 1 when something disagrees, 2 for a wrong
    input.
    """
    from magus_anharmonic.paper import script

    if names:
        expectations = script("expected")
        for name, one in expectations.NAMES.items():
            needs = f" Needs {', '.join(one.needs)}." if one.needs else ""
            units = " or ".join(expectations.UNITS[one.dimension])
            say(f"{name}: {one.meaning}; in {units}.{needs}")
        return
    if campaign is None or expected is None:
        raise InputError("give the folder of a campaign and a YAML of expected values")
    validation = script("validate")
    rows = validation.validate(campaign, expected)
    validation.write_validation(rows, output or validation.tables_folder(campaign).parent)
    for row in rows:
        say(row.line)
        for reason in filter(None, row.could_explain.split("; ")):
            say(f"{'':17s}could explain it: {reason}")
    words = {"agrees": "agree", "disagrees": "disagree", "not in this run": "not in this run"}
    counts = [
        f"{sum(row.verdict == verdict for row in rows)} {word}" for verdict, word in words.items()
    ]
    say(f"\n{', '.join(counts)}")
    if any(row.verdict == "disagrees" for row in rows):
        raise typer.Exit(1)


class Kind(StrEnum):
    """What an input is for."""

    search = "search"
    campaign = "campaign"
    phase_diagram = "phase-diagram"


@command()
def init(
    compound: Annotated[str, typer.Argument(help="Chemical formula, e.g. H3S.")],
    pressure: Annotated[
        list[float] | None, measured("GPa", "Of a campaign or phase diagram more than once.")
    ] = None,
    temperature: Annotated[list[float] | None, measured("K", "More than once for several.")] = None,
    labeler: Annotated[
        str | None,
        typer.Option(
            help="gpaw, espresso, vasp, another package's, an import path, or none; left out: the"
            " first DFT code that is here."
        ),
    ] = None,
    kind: Annotated[Kind, typer.Option(help="Which command it is for.")] = Kind.search,
    checkpoint: Checkpoint = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="The file, or a folder for input.yaml, campaign.yaml, ...; left out: this one.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write over a file that is there.")
    ] = False,
) -> None:
    """Write a commented input for a compound; structures of it that lie beside the file are its
    phases."""
    from magus_anharmonic.starter import write_input

    written = write_input(
        kind.value,
        compound,
        pressure or [0.0],
        temperature or [0.0],
        labeler=labeler,
        checkpoint=checkpoint,
        path=output,
        force=force,
    )
    say(f"{written}: written; its first lines say how to run it")


@command()
def doctor(
    input_file: Annotated[
        Path | None, typer.Option("-i", "--input-file", help="Check what this input needs.")
    ] = None,
) -> None:
    """Say what is installed, what is registered, and what is missing; exit code 1 when the input
    needs it."""
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
