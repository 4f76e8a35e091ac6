"""``phase-diagram``: which phase is stable at which pressure and temperature, with confidence bands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magus_anharmonic.cli.common import Verbose, app, configure_logging, say, user_errors


@app.command("phase-diagram")
def phase_diagram(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="phase-diagram.yaml; or a CSV of free energies (gibbs.csv); or a folder of finished SSCHA runs; or structure files, one "
            "per phase, with --pressure, --temperature and --checkpoint."
        ),
    ],
    pressure: Annotated[list[float] | None, typer.Option(help="GPa, rising; more than once. With structure files.")] = None,
    temperature: Annotated[list[float] | None, typer.Option(help="K, rising; more than once. With structure files. [default: 0]")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="A MatterSim name, a path, or a shipped checkpoint. With structure files.")] = None,
    isotope: Annotated[
        list[str] | None, typer.Option(help="Masses beside the natural ones, e.g. D3S:H=2.014; more than once. With structure files.")
    ] = None,
    supercell: Annotated[tuple[int, int, int], typer.Option(help="Repetitions of the primitive cell. With structure files.")] = (2, 2, 2),
    n_configs: Annotated[int, typer.Option(help="Configurations per population, even. With structure files.")] = 1000,
    end_member: Annotated[
        list[str] | None, typer.Option(help="Formula or phase that formation energies count from; more than once. [default: the elements]")
    ] = None,
    model_error: Annotated[float | None, typer.Option(help="eV/atom, error of the potential in G of each phase; widens the bands.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same input and seed, same result. [default: 0, or what the input says]")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for all results; again: go on.")] = Path("phase-diagram"),
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    verbose: Verbose = False,
) -> None:
    """P-T phase diagram from SSCHA free energies: boundaries with confidence bands, isotope shifts, hull over composition.

    One smooth G(P,T) per phase is fitted to the free energies, volumes and entropies of the same ensembles, so that V = dG/dP and
    S = -dG/dT hold. Writes gibbs.csv, boundaries.csv, stability.csv, summary.json, phase-diagram.svg and .png;
    with several compositions hull.csv, hull.svg and hull.png.
    """
    configure_logging(verbose)
    with user_errors():
        from magus_anharmonic.analysis.phase_command import GridOptions, phase_diagram_command

        grid = GridOptions(tuple(pressure or ()), tuple(temperature or ()), checkpoint, tuple(isotope or ()), supercell, n_configs, device)
        lines, pictures = phase_diagram_command(sources, output, grid=grid, end_members=end_member, model_error=model_error, seed=seed)
        for line in lines:
            say(f"* {line}")
        hull = f"\nHull: {pictures['hull']}" if "hull" in pictures else ""
        say(f"\nPicture: {pictures['png']}{hull}\nEverything else: {output.resolve()}")
